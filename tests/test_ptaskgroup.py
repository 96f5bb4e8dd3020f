"""PersistentTaskGroup: deprecated, and whole."""

import asyncio
import gc
import sys
import warnings

import pytest

from aiotools import PersistentTaskGroup, current_ptaskgroup

pytestmark = pytest.mark.filterwarnings("ignore:Use aiotools.TaskScope instead.:DeprecationWarning")


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def fail():
    raise ValueError("failed")


async def forever():
    await asyncio.get_running_loop().create_future()


async def silent(*exc_info):
    pass


class TestChildren:
    async def test_the_future_has_the_result_and_the_exception(self):
        async with PersistentTaskGroup(exception_handler=silent) as group:
            good = group.create_task(asyncio.sleep(0, "result"), name="child")
            bad = group.create_task(fail())
            assert type(good) is not asyncio.Task and {task.get_name() for task in group._tasks} >= {"child"}
            assert await good == "result"
            with pytest.raises(ValueError):
                await bad

    async def test_cancelling_the_future_does_not_cancel_the_task(self):
        done = []

        async def child():
            await turns()
            done.append(1)

        async with PersistentTaskGroup() as group:
            group.create_task(child()).cancel()
        assert done == [1]

    async def test_failures_go_to_the_handler_in_the_childs_task_and_disturb_nobody(self):
        seen = []

        async def handler(exc_type, exc, tb):
            await turns(1)
            seen.append((exc_type, exc.args, tb is not None, sys.exc_info()[0], asyncio.current_task()))

        async with PersistentTaskGroup(exception_handler=handler) as group:
            group.create_task(fail())
            [task] = group._tasks or [None]
            good = group.create_task(asyncio.sleep(0, 1))
        assert seen == [(ValueError, ("failed",), True, ValueError, task or seen[0][4])] and good.result() == 1

    async def test_a_future_nobody_keeps_gets_nothing_and_nothing_is_logged(self):
        seen = []

        async def handler(*exc_info):
            seen.append(exc_info[0])

        async with PersistentTaskGroup(exception_handler=handler) as group:
            group.create_task(fail())
        gc.collect()
        assert seen == [ValueError]

    async def test_an_exception_of_the_handler_goes_to_the_loop(self, loop_errors):
        async def handler(*exc_info):
            raise KeyError

        async with PersistentTaskGroup(exception_handler=handler) as group:
            group.create_task(fail())
        assert set(loop_errors.take_one(KeyError)) == {"message", "exception", "task"}

    async def test_the_default_handler_prints_the_traceback(self, capsys):
        async with PersistentTaskGroup() as group:
            group.create_task(fail())
        assert "ValueError: failed" in capsys.readouterr().err

    async def test_after_the_block(self):
        async with PersistentTaskGroup() as group:
            pass
        with pytest.raises(RuntimeError):
            group.create_task(turns())


class TestEnding:
    async def test_shutdown_cancels_and_waits_and_the_body_goes_on(self):
        log = []

        async def child():
            try:
                await forever()
            finally:
                await turns()
                log.append("child")

        async with PersistentTaskGroup() as group:
            future = group.create_task(child())
            await turns()
            await asyncio.create_task(group.shutdown())
            await group.shutdown()
            log.append("body")
            assert future.cancelled()
        await group.shutdown()
        assert log == ["child", "body"]

    async def test_a_child_that_swallows_its_cancellation_is_awaited(self):
        log = []

        async def child():
            try:
                await forever()
            except asyncio.CancelledError:
                await turns()
                log.append("swallowed")

        group = PersistentTaskGroup()
        group.create_task(child())
        await turns()
        await group.shutdown()
        assert log == ["swallowed"]

    async def test_an_exception_of_the_body_cancels_the_children(self):
        with pytest.raises(KeyError):
            async with PersistentTaskGroup() as group:
                future = group.create_task(forever())
                raise KeyError
        assert future.cancelled()

    async def test_a_cancelled_parent_waits_through_repeated_cancellation(self):
        log = []

        async def child():
            try:
                await forever()
            finally:
                await turns(6)
                log.append("child")

        async def host():
            async with PersistentTaskGroup() as group:
                group.create_task(child())

        task = asyncio.create_task(host())
        await turns()
        task.cancel()
        await turns(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["child"]

    async def test_the_first_cancellation_of_the_parent_is_what_the_block_ends_with(self):
        async def child():
            try:
                await forever()
            finally:
                await turns(6)

        async def host():
            async with PersistentTaskGroup() as group:
                group.create_task(child())

        task = asyncio.create_task(host())
        await turns()
        task.cancel("first")
        await turns(2)
        task.cancel("second")
        with pytest.raises(asyncio.CancelledError, match="first"):
            await task

    async def test_a_cancellation_while_a_failed_block_waits_is_not_lost(self):
        async def child():
            try:
                await forever()
            finally:
                await turns(6)

        async def host():
            async with PersistentTaskGroup() as group:
                group.create_task(child())
                await turns()
                raise KeyError

        task = asyncio.create_task(host())
        await turns(5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert type(caught.value.__context__) is KeyError and task.cancelled()

    async def test_children_may_be_added_while_others_are_cancelled_and_are_awaited(self):
        log = []

        async def late():
            await turns()
            log.append("late")

        async def child():
            try:
                await forever()
            finally:
                group.create_task(late())

        async with PersistentTaskGroup() as group:
            group.create_task(child())
            await turns()
            await group.shutdown()
            assert log == ["late"] and group._unfinished_tasks == 0

    async def test_after_a_shutdown_it_takes_children_until_the_block_ends(self):
        group = PersistentTaskGroup()
        group.create_task(forever())
        await turns()
        await group.shutdown()
        assert await group.create_task(asyncio.sleep(0, "result")) == "result"
        second = group.create_task(forever())
        await turns()
        await group.shutdown()
        await turns()
        assert second.cancelled() and group not in PersistentTaskGroup.all_ptaskgroups()
        async with group:
            third = group.create_task(asyncio.sleep(0, "third"))
            assert group in PersistentTaskGroup.all_ptaskgroups()
        assert third.result() == "third" and group not in PersistentTaskGroup.all_ptaskgroups()
        with pytest.raises(RuntimeError, match="already been entered"):
            async with group:
                pass


class TestRegistry:
    async def test_all_ptaskgroups_and_the_current_one(self):
        with pytest.raises(LookupError):
            current_ptaskgroup.get()
        async with PersistentTaskGroup(name="one") as group:
            assert current_ptaskgroup.get() is group and group in PersistentTaskGroup.all_ptaskgroups()
        assert group not in PersistentTaskGroup.all_ptaskgroups()
        with pytest.raises(LookupError):
            current_ptaskgroup.get()

    async def test_names_and_repr(self):
        group = PersistentTaskGroup(name="one")
        assert group.get_name() == "one" and repr(group) == "<PersistentTaskGroup( name=one)>"
        assert PersistentTaskGroup().get_name().isdigit()
        future = group.create_task(forever())
        assert repr(group) == "<PersistentTaskGroup( name=one tasks=1 unfinished=1 entered)>"
        assert group._entered and group._unfinished_tasks == 1 and group._parent_task is asyncio.current_task()
        await turns()
        await group.shutdown()
        assert future.cancelled()

    async def test_it_is_deprecated(self):
        with pytest.warns(DeprecationWarning, match="Use aiotools.TaskScope instead."):
            PersistentTaskGroup()
        with pytest.warns(DeprecationWarning, match="Use aiotools.TaskScope instead."):

            class Mine(PersistentTaskGroup):
                pass

        assert PersistentTaskGroup.__deprecated__ == "Use aiotools.TaskScope instead."
        # Whoever made the class was told.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Mine()

    def test_outside_a_loop(self):
        with pytest.raises(RuntimeError):
            PersistentTaskGroup()
