"""actxmgr, resetting, closing_async."""

import asyncio
import contextvars
import copy

import aiotools
from aiotools import _aiotools
from aiotools.context import AsyncContextGroup, actxmgr, closing_async, resetting
from operations import no_memory, operation

var = contextvars.ContextVar("var")


class Thing:
    async def close(self):
        await asyncio.sleep(0)


@actxmgr
async def manager(value=None, **options):
    await aiotools.checkpoint()
    try:
        yield value
    finally:
        await aiotools.checkpoint()


@actxmgr
async def straight():
    yield 1


@operation("AsyncContextManager")
async def managers_that_are_entered_and_left():
    async with manager(value=5, more=1) as value:
        assert value == 5
    async with straight() as value:
        assert value == 1


@operation("AsyncContextManager", "SendingContextManager")
async def managers_that_are_copied():
    for made in (manager(value=5), Sending(manager.__wrapped__, (), {})):
        made.attribute = made
        twin = copy.copy(made)
        async with twin:
            pass
        del made.attribute, twin.attribute


@operation("AsyncContextManager")
async def managers_that_pass_an_exception():
    for make in (manager, straight):
        try:
            async with make():
                raise KeyError
        except KeyError:
            pass


@operation("AsyncContextManager")
async def managers_that_fail():
    @actxmgr
    async def twice():
        yield 1
        yield 2

    @actxmgr
    async def never():
        if var is None:
            yield

    for make in (twice, never):
        try:
            async with make():
                pass
        except RuntimeError:
            pass
    try:
        async with actxmgr(lambda: 5)():
            pass
    except TypeError:
        pass


@operation("AsyncContextManager")
async def a_manager_that_decorates():
    @manager(1)
    async def func():
        pass

    await func()


@operation("AsyncContextManager")
async def a_manager_that_is_entered_twice():
    cm = straight()
    async with cm:
        try:
            async with cm:
                pass
        except AttributeError:
            pass


@operation("AsyncContextManager")
def managers_that_are_not_used():
    cm = straight()
    cm.me = cm
    cm.extra = 1
    assert cm.args == () and cm.kwds == {} and cm.func and cm.__doc__
    step = cm.__aenter__()
    step.close()
    cm.__aexit__(None, None, None).close()
    try:
        manager(1, 2, 3)
    except TypeError:
        pass


class Sending(_aiotools.SendingContextManager):
    yield_return = 5


@operation("SendingContextManager", "AsyncContextManager")
async def a_manager_that_sends():
    async def function():
        assert (yield 1) == 5

    async with Sending(function, (), {}) as value:
        assert value == 1


@operation("resetting")
async def a_variable_that_is_reset():
    with resetting(var, object()):
        pass
    async with resetting(var, object()):
        pass


@operation("resetting")
async def resetting_used_wrongly():
    cm = resetting(var, 1)
    with cm:
        try:
            cm.__enter__()
        except RuntimeError:
            pass
    for wrong in (cm.__exit__, lambda: resetting(1, 2), lambda: contextvars.copy_context().run(cm.__exit__)):
        try:
            wrong()
        except (RuntimeError, TypeError):
            pass
    cm.__aenter__().close()


@operation("closing_async")
async def a_thing_that_is_closed():
    async with closing_async(Thing()):
        pass
    try:
        async with closing_async(Thing()):
            raise KeyError
    except KeyError:
        pass


@operation("closing_async")
async def things_that_cannot_be_closed():
    for wrong in (object(), open):
        try:
            async with closing_async(wrong):
                pass
        except AttributeError:
            pass
    closing_async(1).__aexit__().close()


@operation("AsyncContextGroup")
async def groups():
    managers = [manager(0), straight(), closing_async(Thing()), resetting(var, 1)]
    async with AsyncContextGroup(managers) as values:
        assert values[1] == 1
    async with AsyncContextGroup({"a": manager(0), "b": straight()}, limit=1, strict=True):
        pass
    async with AsyncContextGroup([manager(0), straight()], same_task=True):
        pass


@actxmgr
async def failing():
    await aiotools.checkpoint()
    raise KeyError
    yield


@operation("AsyncContextGroup")
async def groups_that_fail():
    async with AsyncContextGroup([manager(0), failing()]):
        pass
    group = AsyncContextGroup(strict=True, rollback_timeout=60)
    first = straight()
    group.add(first)
    group.add(failing(), after=first)
    group.add(manager(1), after=first)
    try:
        async with group:
            pass
    except ExceptionGroup:
        pass
    try:
        async with AsyncContextGroup([manager(0), straight()]):
            raise KeyError
    except KeyError:
        pass


@operation("AsyncContextGroup")
async def a_group_that_is_cancelled():
    for turns in range(8):

        async def use():
            async with AsyncContextGroup([manager(0), straight(), manager(1)]):
                await aiotools.checkpoint()

        task = asyncio.create_task(use())
        for _ in range(turns):
            await aiotools.checkpoint()
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass


def run_out(awaitable):
    """Drive what does not suspend."""
    try:
        awaitable.send(None)
    except StopIteration:
        pass


@no_memory("AsyncContextManager", kinds=("default",))
async def making_and_entering_a_manager(fail):
    cm = None
    try:
        with fail:
            cm = straight(*())
            run_out(cm.__aenter__())
    finally:
        if cm is not None:
            await cm.gen.aclose()


@no_memory("AsyncContextManager", "SendingContextManager", kinds=("default",))
async def leaving_managers(fail):
    managers = [straight(), straight(), Sending(straight.__wrapped__, (), {})]
    try:
        for cm in managers:
            await cm.__aenter__()
        error = KeyError()
        with fail:
            run_out(managers[0].__aexit__(None, None, None))
            run_out(managers[2].__aexit__(None, None, None))
            run_out(managers[1].__aexit__(KeyError, error, None))
    finally:
        for cm in managers:
            await cm.gen.aclose()


@no_memory("resetting", "closing_async", kinds=("default",))
async def small_managers(fail):
    # ContextVar.set() itself crashes some Pythons when there is no memory.
    closing = closing_async(Thing())
    with fail:
        closing_async(5)
        resetting(var, 1).__aenter__().close()
        closing.__aenter__().close()
        closing.__aexit__().close()


class Books:
    """Counts itself in and out; no Python object is made on the way."""

    open = 0

    def __aenter__(self):
        Books.open += 1
        return aiotools.checkpoint()

    def __aexit__(self, *exc_info):
        Books.open -= 1
        return aiotools.checkpoint()


@no_memory("AsyncContextGroup", kinds=("default",))
async def starting_the_jobs_of_a_group(fail):
    books = [Books(), Books()]
    run = _aiotools._run_each(books, "__aenter__", (), [None, None], bytearray(2), 5, False, False, False)
    try:
        with fail:
            _aiotools._abort_run(run)
            _aiotools._run_each(books, "x", (), [None, None], bytearray(2), 5, 0, 0, 0).close()
    finally:
        run.close()
