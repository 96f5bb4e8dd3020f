"""gather_safe, as_completed_safe, race, map_safe."""

import asyncio

import aiotools
from aiotools._aiotools import _Crew
from operations import operation


async def fail():
    raise ValueError


@operation("gather_safe")
async def results_and_failures():
    await aiotools.gather_safe([asyncio.sleep(0), fail()])
    await aiotools.gather_safe({"a": asyncio.sleep(0)}, limit=1)


@operation("gather_safe")
async def a_gather_that_is_cancelled():
    task = asyncio.create_task(aiotools.gather_safe([asyncio.sleep(60), asyncio.sleep(60)]))
    await asyncio.sleep(0)
    await aiotools.cancel_and_wait(task)


@operation("race")
async def a_race_that_nobody_wins():
    try:
        await aiotools.race([fail() for _ in range(12)], continue_on_error=True)
    except ExceptionGroup:
        pass
    try:
        await aiotools.race([fail(), asyncio.sleep(60)])
    except ValueError:
        pass


@operation("race")
async def a_race_that_is_cancelled():
    task = asyncio.create_task(aiotools.race([asyncio.sleep(60) for _ in range(12)]))
    await asyncio.sleep(0)
    await aiotools.cancel_and_wait(task)


@operation("as_completed_safe", "race")
async def ends_in_order():
    async with aiotools.aclosing(aiotools.as_completed_safe([asyncio.sleep(0), asyncio.sleep(60)])) as done:
        async for task in done:
            await task
            break
    await aiotools.race([asyncio.sleep(0), asyncio.sleep(60)])


@operation("map_safe")
async def a_bounded_map():
    async for _ in aiotools.map_safe(asyncio.sleep, [0, 0, 0], limit=2):
        pass


@operation("race")
async def a_crew_that_is_misused():
    crew = _Crew()
    for arguments in ((), (3,)):
        try:
            crew.spawn(*arguments)
        except TypeError:
            pass
    await crew.wait()
    await crew.close()
    try:
        crew.spawn(fail())
    except RuntimeError:
        pass
