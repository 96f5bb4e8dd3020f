"""A cancellation at each suspension point of what uses a public name, once and twice: nothing is lost, doubled or left.

Each scenario runs undisturbed first, which counts the points at which its task suspends; then once for each point, with a
cancellation there. A scenario cleans up after itself as a program should, and no more.
"""

import asyncio
import contextvars
import warnings

import pytest

import aiotools
from aiotools import Retry, ShieldScope, Supervisor, TaskContext, TaskGroup, TaskScope, aclosing, cancel_and_wait


class Points:
    """Runs a coroutine in its task and calls interrupt() at its n-th suspension; counts them."""

    def __init__(self, coro, at=None, interrupt=None):
        self.coro = coro
        self.at = at
        self.interrupt = interrupt
        self.count = 0

    def __await__(self):
        steps = self.coro.__await__()
        send, value = steps.send, None
        while True:
            try:
                waited_for = send(value)
            except StopIteration as stop:
                return stop.value
            self.count += 1
            if self.count == self.at:
                # Called when the task is suspended, before anything that it waits for here can happen.
                self.interrupt()
            try:
                send, value = steps.send, (yield waited_for)
            except BaseException as exc:
                send, value = steps.throw, exc


async def pause(count=1):
    """Suspends in both ways: for a turn of the loop, and for a future."""
    loop = asyncio.get_running_loop()
    for _ in range(count):
        await asyncio.sleep(0)
        future = loop.create_future()
        loop.call_soon(lambda future=future: future.done() or future.set_result(None))
        await future


class Log:
    """What begins and ends; the ends include clean-up that takes its time."""

    def __init__(self):
        self.begun = self.ended = 0

    async def child(self, count=2):
        self.begun += 1
        try:
            await pause(count)
        finally:
            async with ShieldScope():
                await pause()
                self.ended += 1
        return count

    async def failing(self):
        await self.child(1)
        raise ValueError

    async def stream(self):
        for _ in range(3):
            await pause()
            yield self.child()


async def task_context(log):
    context = TaskContext(exception_handler=None)
    try:
        context.create_task(log.child())
        context.create_task(log.failing())
        await pause(2)
    finally:
        await context.aclose()


async def task_scope(log):
    async with TaskScope(exception_handler=None) as scope:
        scope.create_task(log.child())
        scope.create_task(log.failing())
        async with TaskScope(exception_handler=None, timeout=60) as inner:
            inner.create_task(log.child())
            await pause()
        await pause()


async def task_scope_that_is_aborted(log):
    async with TaskScope() as scope:
        scope.create_task(log.child())
        await pause()
        scope.abort()
        await pause()


async def task_scope_that_is_cancelled(log):
    async with TaskScope() as scope:
        scope.create_task(log.child())
        await pause()
        scope.cancel()
        await pause()
    await pause()


async def task_scope_with_a_limit(log):
    async with TaskScope(limit=1) as scope:
        scope.create_task(log.child())
        await scope.start_task(log.child())
        scope.create_task(log.child())
        await pause()


async def task_scope_whose_timeout_fires(log):
    with pytest.raises(TimeoutError):
        async with TaskScope(timeout=0) as scope:
            scope.create_task(log.child())
            await asyncio.get_running_loop().create_future()
    await pause()


async def shield_scope(log):
    async with ShieldScope() as scope:
        scope.create_task(log.child())
        await pause(2)
        async with TaskGroup() as group:
            group.create_task(log.child())
    await pause()


async def plain_shield_scope(log):
    log.begun += 1
    with ShieldScope():
        await pause(2)
        log.ended += 1
    await pause()


async def supervisor(log):
    failures = [ValueError, ValueError]

    async def flaky():
        await log.child(1)
        if failures:
            raise failures.pop()

    async with Supervisor() as scope:
        scope.create_task(flaky, retry=Retry(attempts=3, delay=0, jitter=0))
        scope.create_task(log.failing())
        await pause()


async def move_on_after(log):
    async with aiotools.move_on_after(60) as scope:
        scope.create_task(log.child())
        await pause()
    async with aiotools.move_on_after(0) as scope:
        scope.create_task(log.child())
        await asyncio.get_running_loop().create_future()
    await pause()


async def cancelling_one(log):
    task = asyncio.create_task(log.child())
    try:
        await pause()
    finally:
        await cancel_and_wait(task)


async def cancelling_several(log):
    tasks = [asyncio.create_task(log.child()) for _ in range(3)]
    try:
        await pause()
    finally:
        await cancel_and_wait(tasks, timeout=60)


async def gather_safe(log):
    await aiotools.gather_safe([log.child(), log.failing(), log.child(3)])
    await aiotools.gather_safe(log.stream(), limit=2)
    await aiotools.gather_safe({"a": log.child(), "b": log.failing()})


async def as_completed_safe(log):
    async with aclosing(aiotools.as_completed_safe([log.child(), log.failing()])) as done:
        async for task in done:
            task.exception()
            await pause()
    async with aclosing(aiotools.as_completed_safe(log.stream(), limit=1)) as done:
        async for _ in done:
            break


async def race(log):
    await aiotools.race([log.child(1), log.child(5)])
    await aiotools.race([log.failing(), log.child()], continue_on_error=True)


async def map_safe(log):
    async with aclosing(aiotools.map_safe(log.child, range(1, 5), limit=2, ordered=True)) as results:
        async for _ in results:
            await pause()


async def task_group(log):
    async with TaskGroup() as group:
        group.create_task(log.child())
        async with TaskGroup() as inner:
            inner.create_task(log.child())
            await pause()


async def task_group_that_fails(log):
    try:
        async with TaskGroup() as group:
            group.create_task(log.child(5))
            group.create_task(log.failing())
            await pause(8)
    except* ValueError:
        pass
    await pause()


async def persistent_task_group(log):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        group = aiotools.PersistentTaskGroup()
    async with group:
        group.create_task(log.child())
        await pause()
        await group.shutdown()
        await pause()


async def timeout(log):
    async with aiotools.timeout(60):
        async with TaskScope() as scope:
            scope.create_task(log.child())
            await pause()
    with pytest.raises(TimeoutError):
        async with aiotools.timeout(0):
            await asyncio.get_running_loop().create_future()
    await pause()


SCENARIOS = [
    task_context,
    task_scope,
    task_scope_that_is_aborted,
    task_scope_that_is_cancelled,
    task_scope_with_a_limit,
    task_scope_whose_timeout_fires,
    shield_scope,
    plain_shield_scope,
    supervisor,
    move_on_after,
    cancelling_one,
    cancelling_several,
    gather_safe,
    as_completed_safe,
    race,
    map_safe,
    task_group,
    task_group_that_fails,
    persistent_task_group,
    timeout,
]


WITH_TIMERS = (move_on_after, supervisor, task_scope_whose_timeout_fires, timeout)


async def run(scenario, at=None, times=1):
    """How often it suspended, and what became of it. The cancellations come at one point, a turn of the loop apart."""
    loop = asyncio.get_running_loop()
    log = Log()
    accepted = []

    def interrupt(left=times):
        # From outside: not in the context of the task, which may be in a shield.
        loop.call_soon(cancel, left, context=contextvars.Context())

    def cancel(left):
        if task.cancel():
            accepted.append(True)
        if left > 1:
            interrupt(left - 1)

    others = asyncio.all_tasks()
    points = Points(scenario(log), at, interrupt)

    async def whole():
        # The first point is one of ours: a task that starts eagerly would meet its own before anybody has it.
        await asyncio.sleep(0)
        return await points

    task = asyncio.create_task(whole())
    await asyncio.wait([task])
    # What was asked of the task in the very step in which it ended.
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == others, "something goes on"
    assert log.begun == log.ended, "a child was not awaited"
    assert getattr(task.cancel, "__self__", None) is task, "the task is left patched"
    assert task.cancelling() == len(accepted), "the count is wrong"
    return points.count, task, accepted


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda function: function.__name__)
async def test_cancelled_at_each_suspension_nothing_is_lost(scenario, times):
    count, task, _ = await run(scenario)
    task.result()
    assert count > 1 and task.cancelling() == 0
    for at in range(1, count + 1):
        reached, task, accepted = await run(scenario, at, times)
        if reached < at:
            # What fires after no time at all may do so one turn earlier or later.
            assert scenario in WITH_TIMERS and not accepted
            task.result()
            continue
        assert accepted, f"nothing was cancelled at point {at}"
        assert task.cancelled(), f"cancelled at point {at} of {count}, it ended with {task!r}"


def test_every_public_name_of_scopes_and_groups_is_here():
    names = {
        *("TaskContext", "TaskScope", "ShieldScope", "Supervisor", "TaskGroup", "PersistentTaskGroup"),
        *("move_on_after", "cancel_and_wait", "gather_safe", "as_completed_safe", "race", "map_safe", "timeout"),
    }
    used = {name for scenario in SCENARIOS for name in scenario.__code__.co_names}
    for inner in [
        const for scenario in SCENARIOS for const in scenario.__code__.co_consts if hasattr(const, "co_names")
    ]:
        used |= set(inner.co_names)
    assert names <= used
