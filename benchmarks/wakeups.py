"""Hops and sleeps: what it costs to suspend a task and to wake it."""

import asyncio
import time
import tracemalloc

import aiotools
from benchmarks.common import case

HOPPERS = 100
SLEEPERS = 2000
COUNTED = 2000


@case("hop_100_tasks", must={"asyncio.sleep(0)": (3, 1.5)}, aim={"asyncio.sleep(0)": (3.6, 1.75)}, n=100)
def hop(sides, loop_kind):
    """100 tasks, each woken once a turn; an operation is a turn of one task, divided by the tasks."""

    def side(name, hopper):
        async def measured(n):
            tasks = [asyncio.ensure_future(hopper(n)) for _ in range(HOPPERS)]
            began = time.thread_time_ns()
            for task in tasks:
                await task
            return (time.thread_time_ns() - began) / n / HOPPERS

        sides.add(name)(measured)

    async def ours(times, checkpoint=aiotools.checkpoint):
        for _ in range(times):
            await checkpoint()

    async def twin(times, sleep=asyncio.sleep):
        for _ in range(times):
            await sleep(0)

    side("ours", ours)
    side("asyncio.sleep(0)", twin)


@case("sleep_2000_sleepers", must={"asyncio.sleep": (3.5, 2.5)}, aim={"asyncio.sleep": (4, 3)}, n=5)
def sleep(sides, loop_kind):
    """2,000 tasks that sleep for about two milliseconds, again and again."""

    def side(name, function):
        async def sleeper(i, times):
            for _ in range(times):
                await function(0.002 + i * 1e-6)

        async def measured(n):
            tasks = [asyncio.ensure_future(sleeper(i, n)) for i in range(SLEEPERS)]
            began = time.thread_time_ns()
            for task in tasks:
                await task
            return (time.thread_time_ns() - began) / n / SLEEPERS

        sides.add(name)(measured)

    side("ours", aiotools.sleep)
    side("asyncio.sleep", asyncio.sleep)


@case("sleep_memory", must={"asyncio.sleep": 2}, aim={"asyncio.sleep": 4}, unit="bytes")
def sleep_memory(sides, loop_kind):
    """What a live deadline and its wait occupy: a suspended task without the task and its coroutine."""

    def side(name, suspend):
        async def measured(n):
            waits = [suspend(60) for _ in range(COUNTED)]
            tracemalloc.start()
            try:
                for wait in waits:
                    wait.send(None)
                started = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
            for wait in waits:
                wait.close()
            tracemalloc.start()
            try:
                waits = [suspend(60) for _ in range(COUNTED)]
                created = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
            for wait in waits:
                wait.close()
            return (started + created) / COUNTED

        sides.add(name)(measured)

    side("ours", aiotools.sleep)
    side("asyncio.sleep", asyncio.sleep)
