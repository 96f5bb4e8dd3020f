"""timeout: enter and exit, with other deadlines alive, around a hop; memory of a live one."""

import asyncio
import gc
import random
import tracemalloc

import aiotools
from benchmarks import common
from benchmarks.common import case

LIVE = 100_000


def peers():
    """The rivals' functions by name."""
    found = {"asyncio": asyncio.timeout}
    if (pypi := common.rival("aiotools", common.RIVALS)) is not None:
        found["PyPI aiotools"] = pypi.timeout
    return found


def empty(make):
    async def run(n):
        for _ in range(n):
            async with make(60):
                pass

    return run


class NullManager:
    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        return None


@case("timeout_empty", must={"asyncio": 6.5, "PyPI aiotools": 6.5}, aim={"asyncio": 8, "null manager in Python": 1})
def timeout_empty(sides, kind):
    sides.add("ours")(empty(aiotools.timeout))
    for name, make in peers().items():
        sides.add(name)(empty(make))

    @sides.add("null manager in Python")
    async def null(n):
        for _ in range(n):
            async with NullManager():
                pass


@case("timeout_at_empty", must={"asyncio": 5})
def timeout_at_empty(sides, kind):
    def at(make):
        async def run(n):
            when = asyncio.get_running_loop().time() + 60
            for _ in range(n):
                async with make(when):
                    pass

        return run

    sides.add("ours")(at(aiotools.timeout_at))
    sides.add("asyncio")(at(asyncio.timeout_at))


def with_live(make, delays):
    """The empty case while LIVE other tasks sit in timeouts."""

    async def run(n):
        async def live(delay, ready):
            async with make(delay):
                await ready.wait()

        end = asyncio.Event()
        tasks = [asyncio.create_task(live(delay, end)) for delay in delays]
        await asyncio.sleep(0)
        yield
        for _ in range(n):
            async with make(60):
                pass
        yield
        end.set()
        await asyncio.wait(tasks)

    return run


@case(
    "timeout_100k_live",
    must={"our empty case": 1 / 1.25},
    aim={"our empty case": 1 / 1.1},
    n=20_000,
    rounds=3,
)
def timeout_live(sides, kind):
    dice = random.Random(1)
    sides.add("ours")(with_live(aiotools.timeout, [dice.uniform(3000, 4000) for _ in range(LIVE)]))
    sides.add("our empty case")(empty(aiotools.timeout))
    sides.add("asyncio")(with_live(asyncio.timeout, [dice.uniform(3000, 4000) for _ in range(LIVE)]))


@case("timeout_hop", must={"asyncio": (1.7, 2.0)}, aim={"asyncio": (1.8, 2.2)})
def timeout_hop(sides, kind):
    def hop(make):
        async def run(n):
            sleep = asyncio.sleep
            for _ in range(n):
                async with make(60):
                    await sleep(0)

        return run

    sides.add("ours")(hop(aiotools.timeout))
    for name, make in peers().items():
        sides.add(name)(hop(make))

    @sides.add("the hop alone")
    async def bare(n):
        sleep = asyncio.sleep
        for _ in range(n):
            await sleep(0)


@case("timeout_memory", must={"asyncio": 2}, aim={"asyncio": 4}, unit="bytes")
def timeout_memory(sides, kind):
    """Bytes per live deadline: entered, not left; the task is there anyway."""

    def memory(make):
        async def run(n):
            count = 20_000
            managers = [None] * count
            gc.collect()
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                for i in range(count):
                    managers[i] = manager = make(3600)
                    await manager.__aenter__()
                gc.collect()
                used = tracemalloc.get_traced_memory()[0] - before
            finally:
                tracemalloc.stop()
            for manager in managers:
                await manager.__aexit__(None, None, None)
            return used / count

        return run

    sides.add("ours")(memory(aiotools.timeout))
    sides.add("asyncio")(memory(asyncio.timeout))
