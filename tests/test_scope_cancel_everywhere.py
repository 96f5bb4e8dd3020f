"""A cancellation at each turn of the loop: every child ends, every request is accounted for."""

import asyncio

import pytest

from aiotools import ShieldScope, TaskGroup, TaskScope, aclosing, as_completed_safe, gather_safe, map_safe, race


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


async def slow(log):
    try:
        await turns(4)
    finally:
        log.append(-1)
        async with ShieldScope():
            await turns(2)
            log.append(1)


async def fail():
    await turns(2)
    raise ValueError


async def a_scope(log):
    async with TaskScope(exception_handler=None) as scope:
        scope.create_task(slow(log))
        scope.create_task(fail())
        await turns(3)


async def a_group(log):
    async with TaskGroup() as group:
        group.create_task(slow(log))
        async with TaskGroup() as inner:
            inner.create_task(slow(log))
            await turns(2)


async def a_failing_group(log):
    try:
        async with TaskGroup() as group:
            group.create_task(slow(log))
            group.create_task(fail())
            await turns(5)
    except* ValueError:
        pass
    await turns(1)


async def a_shielded_scope(log):
    async with TaskScope(shield=True) as scope:
        scope.create_task(slow(log))
        async with TaskScope(exception_handler=None) as inner:
            inner.create_task(slow(log))
            await turns(2)
    await turns(1)


async def a_cancelled_scope(log):
    async with TaskScope() as scope:
        scope.create_task(slow(log))
        await turns(2)
        scope.cancel()
        await turns(5)


async def gathering(log):
    await gather_safe([slow(log), fail(), slow(log)])
    await gather_safe([slow(log), fail(), slow(log)], limit=2)


async def completing(log):
    async with aclosing(as_completed_safe([slow(log), slow(log)])) as done:
        async for task in done:
            await task
    async with aclosing(map_safe(lambda item: slow(log), range(3), limit=2)) as results:
        async for _ in results:
            pass


async def racing(log):
    await race([slow(log), turns(2)])


SCENARIOS = [
    a_scope,
    a_group,
    a_failing_group,
    a_shielded_scope,
    a_cancelled_scope,
    gathering,
    completing,
    racing,
]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda function: function.__name__)
async def test_cancelled_at_each_turn_nothing_is_lost(scenario, times):
    for at in range(100):
        log = []
        others = asyncio.all_tasks()
        task = asyncio.create_task(scenario(log))
        await turns(at)
        was_done = task.done()
        for _ in range(times):
            task.cancel()
            await turns(1)
        await asyncio.wait([task])
        assert asyncio.all_tasks() == others, f"left running when cancelled at turn {at}"
        assert log.count(1) == log.count(-1)
        if was_done:
            assert task.exception() is None and task.cancelling() == 0
            return
        # A request that came with the very last step is seen by nobody, but it is counted.
        assert task.cancelled() or task.exception() is None
        assert task.cancelling() >= 1
    raise AssertionError("the scenario does not end")
