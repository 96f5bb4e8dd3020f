"""What was reported against asyncio about cancellation, tried on our types. docs/asyncio-issues.rst has the list.

Each test bears the number of the issue in python/cpython.
"""

import asyncio
import gc
import weakref

import pytest

import aiotools
from aiotools import ShieldScope, TaskContext, TaskGroup, TaskScope, as_completed_safe, gather_safe, race, timeout


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def forever():
    await asyncio.get_running_loop().create_future()


async def fail(error=ValueError, after=1):
    await turns(after)
    raise error


async def start(coro):
    task = asyncio.create_task(coro)
    await turns()
    return task


class TestSwallowed:
    """Requests that get lost."""

    @pytest.mark.parametrize("target_first", [False, True])
    async def test_86296_a_wait_that_ends_in_the_step_in_which_the_waiter_is_cancelled_does_not_hide_it(
        self, target_first
    ):
        release = asyncio.get_running_loop().create_future()
        reached = []

        async def work():
            async with timeout(60):
                await release
            reached.append("after the wait")
            await forever()

        task = await start(work())
        actions = [lambda: release.set_result(None), task.cancel]
        if not target_first:
            actions = [task.cancel, lambda: release.cancelled() or release.set_result(None)]
        for action in actions:
            action()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1 and reached == []

    @pytest.mark.parametrize("wait", [gather_safe, race], ids=["gather_safe", "race"])
    async def test_86296_children_that_end_in_the_step_in_which_the_host_is_cancelled_do_not_hide_it(self, wait):
        release = asyncio.get_running_loop().create_future()

        async def child():
            await release

        async def work():
            await wait([child(), child()])
            await forever()

        task = await start(work())
        release.set_result(None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    async def test_116720_an_inner_group_that_fails_does_not_swallow_the_request_of_an_outer_one(self):
        went_on = []

        async def work():
            with pytest.raises(ExceptionGroup) as caught:
                async with TaskGroup() as outer:
                    try:
                        async with TaskGroup() as inner:
                            inner.create_task(fail(KeyError, after=3))
                            outer.create_task(fail(IndexError, after=3))
                    except* KeyError:
                        pass
                    await forever()
                    went_on.append(True)
            assert caught.group_contains(IndexError)

        await work()
        assert not went_on and asyncio.current_task().cancelling() == 0

    async def test_133747_an_error_of_a_group_that_is_delayed_does_not_disturb_a_timeout_around_it(self):
        async def work():
            try:
                async with TaskGroup() as group:
                    group.create_task(fail())
            except* ValueError:
                await forever()

        with pytest.raises(TimeoutError):
            async with timeout(0.001):
                await work()
        assert asyncio.current_task().cancelling() == 0
        await turns()

    async def test_134471_a_timeout_of_0_does_not_swallow_an_earlier_request(self):
        async def work():
            asyncio.current_task().cancel()
            async with timeout(0):
                await forever()

        task = asyncio.create_task(work())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    async def test_155433_a_group_that_was_cancelled_lets_a_request_from_outside_through(self):
        release = asyncio.get_running_loop().create_future()

        async def child():
            try:
                await forever()
            finally:
                await release

        async def work():
            async with TaskGroup() as group:
                group.create_task(child())
                await turns(1)
                group.cancel()

        task = await start(work())
        await turns()
        task.cancel("from outside")
        await turns()
        release.set_result(None)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    async def test_95704_a_child_that_fails_in_its_clean_up_is_heard_when_its_group_is_cancelled(self):
        async def child():
            try:
                await forever()
            finally:
                raise KeyError("in clean-up")

        async def work():
            async with TaskGroup() as group:
                group.create_task(child())
                await forever()

        task = await start(work())
        task.cancel()
        with pytest.raises(ExceptionGroup) as caught:
            await task
        assert caught.group_contains(KeyError) and task.cancelling() == 1

    async def test_96037_a_timeout_says_so_also_when_something_else_fails_on_the_way_out(self):
        async def child():
            try:
                await forever()
            finally:
                raise KeyError("in clean-up")

        with pytest.raises(ExceptionGroup) as caught:
            async with timeout(60) as limit:
                async with asyncio.TaskGroup() as group:
                    group.create_task(child())
                    await turns(2)
                    limit.reschedule(asyncio.get_running_loop().time())
                    await forever()
        [error] = caught.value.exceptions
        # The timeout is told in the chain of the error.
        assert isinstance(error, KeyError) and isinstance(error.__context__, TimeoutError)
        assert asyncio.current_task().cancelling() == 0

    async def test_102780_a_timeout_in_the_clean_up_of_a_cancelled_task_is_a_timeout(self):
        async def work():
            try:
                await forever()
            finally:
                with pytest.raises(TimeoutError):
                    async with timeout(0.001):
                        await forever()

        task = await start(work())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1


class TestUnbalanced:
    """Counts that are wrong afterwards."""

    async def test_95289_a_body_that_replaces_the_groups_request_leaves_no_count(self):
        for replace in (None, KeyError):
            with pytest.raises(ExceptionGroup):
                async with TaskGroup() as group:
                    group.create_task(fail())
                    try:
                        await forever()
                    except asyncio.CancelledError:
                        if replace is not None:
                            raise replace from None
            assert asyncio.current_task().cancelling() == 0

    async def test_113848_a_subclass_of_cancelled_error_is_a_cancellation(self):
        class Special(asyncio.CancelledError):
            pass

        for block in (TaskGroup, TaskScope):
            async with block() as children:
                child = children.create_task(forever())
                await turns(1)
                child.cancel()
            assert child.cancelled()
            with pytest.raises(Special):
                async with block():
                    raise Special
        with pytest.raises(TimeoutError):
            async with timeout(0.001):
                try:
                    await forever()
                except asyncio.CancelledError:
                    raise Special from None
        assert asyncio.current_task().cancelling() == 0


class TestStuck:
    """Children that go on, never end, or vanish."""

    async def test_94398_nothing_starts_in_a_group_that_ends(self):
        refused = []

        async def late(group):
            try:
                await forever()
            finally:
                with pytest.raises(RuntimeError):
                    group.create_task(forever())
                refused.append(True)

        with pytest.raises(ExceptionGroup):
            async with TaskGroup() as group:
                group.create_task(late(group))
                group.create_task(fail())
        assert refused

    async def test_115957_a_coroutine_that_is_refused_is_closed(self):
        """Otherwise the suite would fail with "was never awaited"."""
        async with TaskGroup() as group, TaskScope() as scope:
            scope.abort()
            with pytest.raises(RuntimeError):
                scope.create_task(forever())
        with pytest.raises(RuntimeError):
            group.create_task(forever())

    async def test_128550_a_child_whose_own_child_fails_before_it_suspends_is_cancelled(self):
        async def third():
            raise ValueError

        async def second(group):
            group.create_task(third())
            await forever()

        with pytest.raises(ExceptionGroup):
            async with TaskGroup() as group:
                group.create_task(second(group))

    @pytest.mark.parametrize("block", [TaskGroup, TaskScope])
    async def test_155418_a_child_that_cancels_its_group_before_it_suspends_ends(self, block):
        async def child(scope):
            scope.cancel()
            await forever()

        async with block() as scope:
            scope.create_task(child(scope))
        assert asyncio.current_task().cancelling() == 0

    async def test_75633_no_child_goes_on_after_a_gathering_failed_or_was_left(self):
        before = asyncio.all_tasks()
        with pytest.raises(ValueError):
            await race([fail(), forever()])
        assert asyncio.all_tasks() == before
        with pytest.raises(TimeoutError):
            async with timeout(0.001):
                await gather_safe([forever(), forever()])
        assert asyncio.all_tasks() == before
        async with aiotools.aclosing(as_completed_safe([forever(), fail()])) as done:
            async for task in done:
                assert isinstance(task.exception(), ValueError)
                break
        assert asyncio.all_tasks() == before

    async def test_91887_a_child_that_nobody_refers_to_is_not_collected(self):
        done = []

        async def child():
            future = asyncio.get_running_loop().create_future()
            waiting.append(weakref.ref(future))
            await future
            done.append(True)

        waiting = []
        context = TaskContext()
        async with TaskScope() as scope:
            context.create_task(child())
            scope.create_task(child())
            await turns()
            gc.collect()
            for reference in waiting:
                reference().set_result(None)
            await turns()
            assert done == [True, True]
        await context.aclose()

    async def test_108951_a_group_can_be_ended_early_without_an_error(self):
        async with TaskGroup() as group:
            child = group.create_task(forever())
            group.cancel()
            group.cancel()
            await forever()
        assert child.cancelled() and asyncio.current_task().cancelling() == 0
        await turns()


class TestKept:
    """Errors and frames that stay alive."""

    @pytest.mark.parametrize("who", ["body", "child", "nested"])
    async def test_98543_124958_128552_what_a_group_raises_is_freed_at_once(self, who, loop_kind):
        class Done(Exception):
            pass

        class Local:
            pass

        seen = []

        async def work():
            local = Local()
            seen.append(weakref.ref(local))
            raise Done

        async def nested():
            async with TaskGroup() as inner:
                inner.create_task(work())

        gc.collect()
        gc.disable()
        try:
            try:
                async with TaskGroup() as group:
                    if who == "body":
                        await work()
                    else:
                        group.create_task(work() if who == "child" else nested())
            except* Done:
                pass
            await turns()
            [reference] = seen
            if loop_kind == "eager":
                # The frame of what was started eagerly refers to the frame that started it: the interpreter's cycle.
                gc.collect()
            assert reference() is None, "a cycle keeps the frame of the failed task alive"
        finally:
            gc.enable()


class TestShields:
    """What asyncio.shield() does not do."""

    async def test_99714_a_block_is_shielded_and_ends_before_the_cancellation_goes_on(self):
        done = []

        async def work():
            with ShieldScope():
                await turns(5)
                done.append("shielded")
            done.append("never")

        task = await start(work())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["shielded"] and task.cancelling() == 1

    async def test_86802_an_error_in_a_shield_reaches_its_task_although_it_was_cancelled(self):
        """asyncio.shield() leaves the task that it shields behind, and its error to the collector."""

        async def work():
            async with ShieldScope():
                await turns(5)
                raise ValueError("in the shield")

        task = await start(work())
        task.cancel()
        with pytest.raises(ValueError, match="in the shield"):
            await task
        assert task.cancelling() == 1
