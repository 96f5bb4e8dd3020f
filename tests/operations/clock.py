"""VirtualClock, and what drives a loop by it."""

import asyncio

import aiotools
from operations import no_memory, operation


@operation("VirtualClock", "_Clock", "_ClockDriver")
async def a_patch_with_sleeps_and_handles():
    clock = aiotools.VirtualClock()
    with clock.patch_loop():
        loop = asyncio.get_running_loop()
        loop.call_later(1, int)
        loop.call_later(0, int)
        loop.call_at(5, int, "1", 10)
        loop.call_later(3, int).cancel()
        await aiotools.sleep(2)
        await asyncio.sleep(10)


@operation("VirtualClock")
async def nested_patches_with_deadlines_pending():
    outer, inner = aiotools.VirtualClock(), aiotools.VirtualClock()
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(aiotools.sleep(100))
    with outer.patch_loop():
        handle = loop.call_later(50, int)
        await aiotools.checkpoint()
        with inner.patch_loop(manual=True):
            await inner.advance(10)
    handle.cancel()
    task.cancel()
    await asyncio.wait([task])


@operation("VirtualClock")
async def a_patch_in_which_nothing_can_wake_the_loop():
    try:
        with aiotools.VirtualClock().patch_loop():
            await asyncio.get_running_loop().create_future()
    except RuntimeError:
        pass
    else:
        raise AssertionError


@operation("VirtualClock")
async def wrong_arguments_of_virtual_handles():
    with aiotools.VirtualClock().patch_loop():
        loop = asyncio.get_running_loop()
        for args, kwargs in [((None, int), {}), ((1, None), {}), ((1,), {}), ((1, int), {"context": 1})]:
            try:
                loop.call_at(*args, **kwargs)
            except TypeError:
                pass


@no_memory("VirtualClock", kinds=("default",))
async def arming_and_cancelling_a_virtual_handle(fail):
    handle = None
    with aiotools.VirtualClock().patch_loop():
        loop = asyncio.get_running_loop()
        try:
            with fail:
                handle = loop.call_later(10, int, 1, 2, 3, 4, 5, 6)
                handle.when()
                repr(handle)
        finally:
            if handle is not None:
                handle.cancel()


@no_memory("VirtualClock", kinds=("default",))
async def jumping_without_memory(fail):
    loop = asyncio.get_running_loop()
    with aiotools.VirtualClock().patch_loop(detect_stuck=False):
        select = loop._selector.select
        handle = loop.call_later(10, int)
        try:
            with fail:
                select(None)
        finally:
            handle.cancel()
