"""sleep, sleep_until, checkpoint."""

import asyncio

import aiotools
from operations import no_memory, operation


@operation("sleep")
async def a_sleep_that_ends():
    assert await aiotools.sleep(1e-6, "result") == "result"


@operation("sleep", "sleep_until", "checkpoint")
async def sleeps_of_no_length():
    await aiotools.sleep(0)
    await aiotools.sleep_until(0)
    await aiotools.checkpoint()


@operation("sleep")
async def a_sleep_that_is_cancelled():
    task = asyncio.create_task(aiotools.sleep(60))
    await aiotools.checkpoint()
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass


@operation("sleep", "sleep_until", "checkpoint")
async def sleeps_that_are_closed():
    for awaitable in (aiotools.sleep(1), aiotools.sleep_until(1), aiotools.checkpoint()):
        awaitable.close()


@operation("sleep")
def a_bad_delay():
    for bad in ("1", float("nan")):
        try:
            aiotools.sleep(bad)
        except (TypeError, ValueError):
            pass


@no_memory("sleep", "sleep_until", "checkpoint", kinds=("default",))
async def starting_a_sleep(fail):
    first = second = third = None
    try:
        with fail:
            first = aiotools.sleep(60, "result")
            second = aiotools.sleep_until(1e9)
            third = aiotools.checkpoint()
            first.send(None)
            second.send(None)
            third.send(None)
    finally:
        for awaitable in (first, second, third):
            if awaitable is not None:
                awaitable.close()


@no_memory("sleep", kinds=("default",))
async def waking_a_sleeper(fail):
    # The task's part is played by a callback, as asyncio's own steps would fail too.
    awaitable = aiotools.sleep(60)
    waiter = awaitable.send(None)
    try:
        with fail:
            waiter.add_done_callback(id, context=None)
            waiter.cancel()
    finally:
        waiter.remove_done_callback(id)
        awaitable.close()
