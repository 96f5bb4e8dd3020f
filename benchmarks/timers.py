"""Timers: CPU time per tick, with each tick a task of its own; memory of a live timer."""

import asyncio
import gc
import sys
import tracemalloc

import aiotools
from benchmarks import common
from benchmarks.common import case

# Long enough that no side needs all of the time: one that is late has several ticks per turn of its loop, and pays less for
# each. (A rival that takes 18 us per tick is late with a thousand of them every 5 ms.)
INTERVAL = 0.02
TIMERS = 1000
TICKS = 10


async def tick(interval):
    pass


def with_limit(timers, **options):
    """Our timers, each for n / timers ticks."""

    async def run(n):
        made = [aiotools.create_timer(tick, INTERVAL, limit=max(1, n // timers), **options) for _ in range(timers)]
        await asyncio.wait(made)

    return run


def sleep_loop(timers, **options):
    async def one(ticks):
        for _ in range(ticks):
            task = asyncio.create_task(tick(INTERVAL))  # noqa: F841
            await asyncio.sleep(INTERVAL)

    async def run(n):
        await asyncio.wait([asyncio.create_task(one(max(1, n // timers))) for _ in range(timers)])

    return run


def pypi(timers, create_timer):
    async def run(n):
        left = max(n, timers)
        end = asyncio.Event()

        async def counted(interval):
            nonlocal left
            left -= 1
            if left == 0:
                end.set()

        made = [create_timer(counted, INTERVAL) for _ in range(timers)]
        await end.wait()
        for timer in made:
            timer.cancel()
        await asyncio.wait(made)

    return run


def add_rivals(sides, timers):
    sides.add("asyncio")(sleep_loop(timers))
    if (rival := common.rival("aiotools", common.RIVALS)) is not None:
        sides.add("PyPI aiotools")(pypi(timers, rival.create_timer))


@case(
    "timer_tick",
    must={"asyncio": (1.6, 1.5), "PyPI aiotools": 5},
    aim={"asyncio": (2, 1.8), "PyPI aiotools": 6},
    n=TIMERS * TICKS,
)
def timer_tick(sides, kind):
    sides.add("ours")(with_limit(TIMERS))
    add_rivals(sides, TIMERS)


if sys.version_info >= (3, 12):

    @case(
        "timer_tick_eager",
        must={"asyncio": (4, 3.3), "PyPI aiotools": 12},
        aim={"asyncio": (4.6, 3.8), "PyPI aiotools": 14},
        n=TIMERS * TICKS,
    )
    def timer_tick_eager(sides, kind):
        sides.add("ours")(with_limit(TIMERS, eager=True))
        add_rivals(sides, TIMERS)


@case("timer_tick_alone", must={"asyncio": 1}, n=20)
def timer_tick_alone(sides, kind):
    """One timer: nothing to batch."""
    sides.add("ours")(with_limit(1))
    add_rivals(sides, 1)


@case("timer_memory", must={"asyncio": 1}, unit="bytes")
def timer_memory(sides, kind):
    """Bytes per live timer that waits for its next tick."""

    def memory(make):
        async def run(n):
            count = 10_000
            tasks = [None] * count
            gc.collect()
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                for i in range(count):
                    tasks[i] = make()
                for _ in range(3):
                    await asyncio.sleep(0)
                gc.collect()
                used = tracemalloc.get_traced_memory()[0] - before
            finally:
                tracemalloc.stop()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return used / count

        return run

    async def one():
        while True:
            task = asyncio.create_task(tick(3600))  # noqa: F841
            await asyncio.sleep(3600)

    sides.add("ours")(memory(lambda: aiotools.create_timer(tick, 3600)))
    sides.add("asyncio")(memory(lambda: asyncio.create_task(one())))
    if (rival := common.rival("aiotools", common.RIVALS)) is not None:
        sides.add("PyPI aiotools")(memory(lambda: rival.create_timer(tick, 3600)))
