"""Scopes, shields, groups, cancel_and_wait."""

import asyncio
import contextvars

import aiotools
from aiotools import _aiotools
from operations import no_memory, operation

_TaskGroupCore = _aiotools._TaskGroupCore


async def fail():
    raise ValueError


async def forever():
    await asyncio.get_running_loop().create_future()


@operation("TaskScope", "TaskContext")
async def a_scope_with_children():
    async with aiotools.TaskScope(exception_handler=None) as scope:
        scope.create_task(asyncio.sleep(0))
        scope.create_task(fail(), name="x", context=contextvars.copy_context())


@operation("TaskScope")
async def a_scope_that_is_cancelled():
    async with aiotools.TaskScope() as scope:
        scope.create_task(forever())
        scope.cancel("msg")
        await forever()


@operation("TaskScope")
async def a_scope_that_times_out():
    try:
        async with aiotools.TaskScope(timeout=0) as scope:
            scope.create_task(forever())
            await forever()
    except TimeoutError:
        pass


@operation("TaskScope")
async def a_scope_that_is_misused():
    scope = aiotools.TaskScope()
    for method in (scope.__aenter__, scope.__aenter__):
        try:
            await method()
        except RuntimeError:
            pass
    await scope.__aexit__(None, None, None)
    coro = forever()
    try:
        scope.create_task(coro)
    except RuntimeError:
        pass
    repr(scope)


@operation("TaskContext")
async def a_context_that_is_closed():
    context = aiotools.TaskContext(exception_handler=None)
    context.create_task(forever())
    await context.aclose()
    aiotools.TaskContext().aclose().close()


@operation("ShieldScope")
async def a_shield_that_holds():
    task = asyncio.current_task()
    try:
        async with aiotools.ShieldScope() as scope:
            scope.create_task(asyncio.sleep(0))
            task.cancel("msg")
            task.cancel()
            task.uncancel()
    except asyncio.CancelledError:
        task.uncancel()
    with aiotools.ShieldScope():
        task.cancel()
        task.cancelling()
        task.uncancel()


@operation("ShieldScope")
async def a_plain_shield_that_holds_while_its_task_waits():
    async def work(wait):
        try:
            with aiotools.ShieldScope(), aiotools.ShieldScope():
                await wait
        except asyncio.CancelledError:
            await asyncio.sleep(0)

    for wait in (asyncio.sleep(0.001), aiotools.sleep(0.001), asyncio.sleep(0)):
        task = asyncio.create_task(work(wait))
        await asyncio.sleep(0)
        task.cancel("msg")
        task.cancel()
        task.uncancel()
        await asyncio.wait([task])


@operation("cancel_and_wait")
async def tasks_that_are_cancelled():
    await aiotools.cancel_and_wait([asyncio.create_task(forever()) for _ in range(3)])
    task = asyncio.create_task(forever())
    await asyncio.sleep(0)
    await aiotools.cancel_and_wait(task, "msg", timeout=60)


# More children than get a done callback of their own.
BURST = 12


@operation("TaskScope")
async def a_burst_of_children():
    async with aiotools.TaskScope(exception_handler=None) as scope:
        for _ in range(BURST):
            scope.create_task(asyncio.sleep(0))
            scope.create_task(fail())
            scope.create_task(forever())
        for _ in range(4):
            await asyncio.sleep(0)
        scope.abort()


@operation("TaskScope")
async def a_burst_that_is_cancelled_at_once():
    async with aiotools.TaskScope() as scope:
        for _ in range(BURST):
            scope.create_task(forever())
        scope.cancel()


@operation("TaskScope")
async def a_task_group():
    try:
        async with aiotools.TaskGroup() as group:
            group.create_task(forever())
            group.create_task(fail())
    except ExceptionGroup:
        pass


def step(awaitable):
    """Runs an awaitable that doesn't suspend; what it raises comes through."""
    try:
        awaitable.send(None)
    except StopIteration:
        return
    raise AssertionError("it was not to suspend")


# Without a shield: PyContextVar_Set itself crashes without memory (CPython 3.13.0).
@no_memory("TaskScope", kinds=("default",))
async def entering_and_leaving_a_scope(fail):
    scope = aiotools.TaskScope(timeout=60)
    try:
        with fail:
            step(scope.__aenter__())
            scope.abort()
            step(scope.__aexit__(None, None, None))
    finally:
        if scope._entered and not scope._exiting:
            step(scope.__aexit__(None, None, None))


# More tasks than there is room for at first. They have not begun: their cancellation allocates nothing of asyncio's.
@no_memory("cancel_and_wait", kinds=("default",))
async def cancelling_many_tasks(fail):
    tasks = [asyncio.create_task(forever()) for _ in range(20)]
    wait = aiotools.cancel_and_wait(tasks)
    try:
        with fail:
            wait.send(None)
    finally:
        wait.close()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@no_memory("TaskContext", "ShieldScope", "cancel_and_wait", kinds=("default",))
async def constructing(fail):
    # Tasks are left out: asyncio's own don't survive every failure.
    with fail:
        context = aiotools.TaskContext(exception_handler=None)
        repr(context)
        aiotools.ShieldScope(timeout=5).abort()
        aiotools.TaskScope(exception_handler=None).cancel()
        step(context.aclose())
        step(aiotools.cancel_and_wait([], timeout=5))
