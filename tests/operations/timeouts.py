"""timeout, timeout_at, Timeout."""

import asyncio

import aiotools
from operations import no_memory, operation


@operation("timeout", "Timeout")
async def a_timeout_that_does_not_fire():
    async with aiotools.timeout(60) as cm:
        cm.reschedule(cm.when() + 1)
        cm.expired(), repr(cm)


@operation("timeout", "timeout_at", "Timeout")
async def timeouts_that_fire():
    for manager in (aiotools.timeout(0), aiotools.timeout_at(0), aiotools.Timeout(1)):
        try:
            async with manager:
                await asyncio.sleep(60)
        except TimeoutError:
            pass


@operation("timeout")
async def a_timeout_around_a_group():
    for others in ([], [ValueError()]):
        try:
            async with aiotools.timeout(0):
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError as exc:
                    raise BaseExceptionGroup("group", [exc, *others]) from None
        except (TimeoutError, BaseExceptionGroup):
            pass


@operation("timeout")
async def a_timeout_whose_cancellation_is_a_context():
    try:
        async with aiotools.timeout(0):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise ValueError
    except ValueError:
        pass


@operation("Timeout")
async def steps_by_hand():
    manager = aiotools.timeout(None)
    await manager.__aenter__()
    await manager.__aexit__(None, None, None)
    manager.__aenter__().close()
    for bad in (manager.__aenter__(), manager.__aexit__(None, None, None)):
        try:
            await bad
        except RuntimeError:
            pass


@operation("timeout", "timeout_at", "Timeout")
async def bad_arguments():
    for function in (aiotools.timeout, aiotools.timeout_at, aiotools.Timeout):
        for bad in ("1", float("nan")):
            try:
                function(bad)
            except (TypeError, ValueError):
                pass


@no_memory("timeout_at", kinds=("default",))
async def making_a_timeout_at(fail):
    with fail:
        aiotools.timeout_at(60.0)


@no_memory("timeout", "Timeout", kinds=("default",))
async def entering_a_timeout(fail):
    manager = step = None
    try:
        with fail:
            manager = aiotools.timeout(60)
            step = manager.__aenter__()
            try:
                step.send(None)
            except StopIteration:
                pass
    finally:
        if step is not None:
            step.close()
        if manager is not None and "active" in repr(manager):
            await manager.__aexit__(None, None, None)
