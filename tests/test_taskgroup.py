"""TaskGroup: asyncio's, with a name, errors of its own, and what Python 3.15 has."""

import asyncio
import copy
import gc
import pickle
import re
import sys
import weakref

import pytest

import aiotools
from aiotools import MultiError, ShieldScope, TaskGroup, TaskGroupError, TaskScope, current_taskgroup


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def give(value, count=1):
    await turns(count)
    return value


async def fail(exc=None, count=1):
    await turns(count)
    raise exc or ValueError("failed")


async def forever():
    await asyncio.get_running_loop().create_future()


def requests():
    return asyncio.current_task().cancelling()


# Our group does all that asyncio's does: one class of cases runs on both.
BOTH = pytest.mark.parametrize("Group", [asyncio.TaskGroup, TaskGroup])


@BOTH
class TestAsAsyncio:
    async def test_children_are_awaited(self, Group):
        async with Group() as group:
            tasks = [group.create_task(give(number), name=f"n{number}") for number in range(3)]
        assert [task.result() for task in tasks] == [0, 1, 2] and tasks[1].get_name() == "n1"

    async def test_a_failure_cancels_siblings_and_body(self, Group):
        with pytest.raises(ExceptionGroup, match="unhandled errors in a TaskGroup") as caught:
            async with Group() as group:
                sibling = group.create_task(forever())
                group.create_task(fail())
                await forever()
        assert [type(exc) for exc in caught.value.exceptions] == [ValueError]
        assert sibling.cancelled() and requests() == 0
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
        await turns()

    async def test_several_failures_come_together(self, Group):
        async def late():
            try:
                await forever()
            finally:
                raise KeyError

        with pytest.raises(ExceptionGroup) as caught:
            async with Group() as group:
                group.create_task(late())
                group.create_task(fail())
        assert [type(exc) for exc in caught.value.exceptions] == [ValueError, KeyError]

    async def test_an_error_of_the_body_comes_in_the_group(self, Group):
        with pytest.raises(ExceptionGroup) as caught:
            async with Group() as group:
                child = group.create_task(forever())
                await turns()
                raise KeyError
        assert [type(exc) for exc in caught.value.exceptions] == [KeyError] and child.cancelled()

    async def test_a_cancelled_error_of_the_body_passes(self, Group):
        with pytest.raises(asyncio.CancelledError, match="mine"):
            async with Group() as group:
                group.create_task(forever())
                raise asyncio.CancelledError("mine")

    async def test_a_cancelled_child_is_no_failure(self, Group):
        async with Group() as group:
            task = group.create_task(forever())
            await turns()
            task.cancel()

    async def test_a_cancelled_host(self, Group):
        async def host():
            async with Group() as group:
                children.append(group.create_task(forever()))
                await forever()

        children = []
        task = asyncio.create_task(host())
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children[0].cancelled() and task.cancelling() == 1

    async def test_a_cancelled_host_while_it_waits(self, Group):
        async def host():
            async with Group() as group:
                group.create_task(forever())

        task = asyncio.create_task(host())
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_errors_win_over_a_cancellation_which_stays_pending(self, Group):
        if Group is asyncio.TaskGroup and sys.version_info < (3, 13):
            return  # asyncio promises it from 3.13 on, ours on every version

        async def child():
            try:
                await forever()
            finally:
                raise ValueError

        async def host():
            try:
                async with Group() as group:
                    group.create_task(child())
                    await forever()
            except ExceptionGroup:
                seen.append(requests())
                await forever()

        seen = []
        task = asyncio.create_task(host())
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == [1] and task.cancelling() == 1

    async def test_under_a_timeout(self, Group):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                async with Group() as group:
                    group.create_task(forever())
                    await forever()
        assert requests() == 0

    async def test_a_lone_generator_exit_is_raised_as_it_is(self, Group):
        if Group is asyncio.TaskGroup and sys.version_info < (3, 15):
            return
        with pytest.raises(GeneratorExit):
            async with Group() as group:
                group.create_task(forever())
                raise GeneratorExit

    async def test_nested_groups(self, Group):
        with pytest.raises(ExceptionGroup) as caught:
            async with Group() as outer:
                outer.create_task(fail(KeyError(), 3))
                async with Group() as inner:
                    inner.create_task(forever())
                    await forever()
        assert caught.value.exceptions[0].__class__ is KeyError and requests() == 0

    async def test_use_before_and_after(self, Group):
        group = Group()
        if sys.version_info >= (3, 13) or Group is TaskGroup:
            with pytest.raises(RuntimeError, match="has not been entered"):
                group.create_task(turns())
        async with group:
            with pytest.raises(RuntimeError, match="already been entered"):
                await group.__aenter__()
        coro = turns()
        with pytest.raises(RuntimeError, match="is finished"):
            group.create_task(coro)
        coro.close()

    async def test_children_of_children(self, Group):
        async def child(depth):
            await turns(1)
            if depth:
                group.create_task(child(depth - 1))

        async with Group() as group:
            group.create_task(child(5))

    async def test_no_child_is_taken_while_it_shuts_down(self, Group):
        async def child():
            try:
                await forever()
            finally:
                coro = turns()
                with pytest.raises(RuntimeError, match="shutting down"):
                    group.create_task(coro)
                coro.close()

        with pytest.raises(ExceptionGroup):
            async with Group() as group:
                group.create_task(child())
                group.create_task(fail())

    async def test_swallowing_the_cancellation_in_the_body(self, Group):
        with pytest.raises(ExceptionGroup):
            async with Group() as group:
                group.create_task(fail())
                try:
                    await forever()
                except asyncio.CancelledError:
                    pass
        assert requests() == 0

    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="an eager child raises where it is created")
    @pytest.mark.parametrize("base", [SystemExit, KeyboardInterrupt])
    def test_base_errors(self, Group, new_loop, base):
        async def main():
            async with Group() as group:
                group.create_task(forever())
                group.create_task(fail(base()))

        loop = new_loop()
        task = loop.create_task(main())
        with pytest.raises(base):
            loop.run_until_complete(task)
        with pytest.raises(base):
            loop.run_until_complete(task)

    async def test_repr(self, Group):
        group = Group()
        assert repr(group) == "<TaskGroup>"
        async with group:
            assert repr(group) == "<TaskGroup entered>"
            group.create_task(turns())
            assert repr(group) == "<TaskGroup tasks=1 entered>" and len(group._tasks) == 1

    async def test_a_finished_child_leaves_at_once(self, Group):
        async with Group() as group:
            for _ in range(100):
                reference = weakref.ref(group.create_task(give(1, 0)))
            await turns(4)
            assert len(group._tasks) == 0
            gc.collect()
            assert reference() is None


class TestErrors:
    async def test_the_failure_is_a_task_group_error_and_an_exception_group(self):
        for catch in (TaskGroupError, MultiError, ExceptionGroup, Exception, BaseExceptionGroup):
            with pytest.raises(catch):
                async with TaskGroup() as group:
                    group.create_task(fail())
        try:
            async with TaskGroup() as group:
                group.create_task(fail())
        except* ValueError as caught:
            assert type(caught) is ExceptionGroup
        try:
            async with TaskGroup() as group:
                group.create_task(fail())
        except TaskGroupError as error:
            assert error.__errors__ == error.exceptions and error.get_error_types() == {ValueError}
            assert type(error).__name__ == "TaskGroupError"

    async def test_the_failure_can_be_pickled_and_copied(self):
        with pytest.raises(TaskGroupError) as caught:
            async with TaskGroup() as group:
                group.create_task(fail())
        caught.value.add_note("note")
        for twin in pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value):
            assert type(twin) is type(caught.value) and isinstance(twin, ExceptionGroup)
            assert [type(error) for error in twin.__errors__] == [ValueError] and twin.__notes__ == ["note"]
            assert twin.message == caught.value.message
        twin = pickle.loads(pickle.dumps(MultiError("text", [ValueError(1)])))
        assert type(twin) is MultiError and twin.get_error_types() == {ValueError}

    async def test_with_an_extraordinary_error_it_is_no_exception(self):
        class Extraordinary(BaseException):
            pass

        with pytest.raises(TaskGroupError) as caught:
            async with TaskGroup() as group:
                group.create_task(fail(Extraordinary()))
        assert not isinstance(caught.value, Exception)

    def test_multi_error(self):
        errors = [ValueError(1), KeyError(2)]
        error = MultiError("text", errors)
        assert error.__errors__ is errors and error.get_error_types() == {ValueError, KeyError}
        assert isinstance(error, BaseExceptionGroup) and not isinstance(error, Exception)
        match, rest = error.split(ValueError)
        assert type(match) is ExceptionGroup and type(rest) is ExceptionGroup
        assert TaskGroupError.__mro__[1:3] == (MultiError, BaseExceptionGroup)

    async def test_no_reference_cycle_keeps_the_errors(self):
        class Error(Exception):
            pass

        async def child():
            raise Error

        async def host():
            async with TaskGroup() as group:
                group.create_task(child())

        gc.collect()
        gc.disable()
        try:
            try:
                await host()
            except ExceptionGroup as caught:
                reference = weakref.ref(caught.exceptions[0])
            if asyncio.get_running_loop().get_task_factory() is not None:
                gc.collect()
            if not asyncio.get_running_loop().get_debug():
                assert reference() is None
        finally:
            gc.enable()

    async def test_thousands_of_errors(self):
        async def child():
            try:
                await forever()
            finally:
                raise ValueError

        with pytest.raises(ExceptionGroup) as caught:
            async with TaskGroup() as group:
                for _ in range(1000):
                    group.create_task(child())
                await turns()
                group.create_task(fail())
        assert len(caught.value.exceptions) == 1001


class TestNames:
    async def test_given_and_default(self):
        assert TaskGroup(name="mine").get_name() == "mine" and TaskGroup(name=3).get_name() == "3"
        first, second = TaskGroup().get_name(), TaskGroup().get_name()
        assert re.fullmatch(r"tg-\d+", first) and int(second[3:]) == int(first[3:]) + 1
        assert isinstance(TaskGroup(), asyncio.TaskGroup)

    async def test_current_taskgroup(self):
        async def child():
            await turns(1)
            return current_taskgroup.get()

        with pytest.raises(LookupError):
            current_taskgroup.get()
        async with TaskGroup() as outer:
            assert current_taskgroup.get() is outer
            task = outer.create_task(child())
            async with TaskGroup() as inner:
                assert current_taskgroup.get() is inner
            assert current_taskgroup.get() is outer
        assert task.result() is outer
        with pytest.raises(LookupError):
            current_taskgroup.get()


class TestCancel:
    async def test_it_ends_the_block_without_an_error(self):
        async with TaskGroup() as group:
            child = group.create_task(forever())
            group.cancel()
            group.cancel()
            await forever()
        group.cancel()
        assert child.cancelled() and requests() == 0
        await turns()

    async def test_before_entry(self):
        group = TaskGroup()
        group.cancel()
        async with group:
            await forever()
        assert requests() == 0

    async def test_from_a_child_while_the_host_waits(self):
        async with TaskGroup() as group:

            async def child():
                await turns(2)
                group.cancel("message")

            group.create_task(child())
            sibling = group.create_task(forever())
        assert sibling.cancelled() and requests() == 0

    async def test_a_failure_in_clean_up_is_still_raised(self):
        async def child():
            try:
                await forever()
            finally:
                raise ValueError

        with pytest.raises(ExceptionGroup):
            async with TaskGroup() as group:
                group.create_task(child())
                await turns()
                group.cancel()
                await forever()
        assert requests() == 0

    async def test_a_request_from_outside_propagates(self):
        async def host():
            async with TaskGroup() as group:
                group.cancel()
                asyncio.current_task().cancel()
                await forever()

        task = asyncio.create_task(host())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    @pytest.mark.parametrize("make", [TaskGroup, TaskScope])
    async def test_a_request_from_outside_that_comes_while_it_waits_keeps_its_message(self, make):
        loop = asyncio.get_running_loop()
        cancelling, release = loop.create_future(), loop.create_future()

        async def child():
            try:
                await forever()
            finally:
                cancelling.set_result(None)
                await release

        async def host():
            async with make() as group:
                group.create_task(child())
                await turns()
                group.cancel("own")

        task = asyncio.create_task(host())
        await cancelling
        await turns()
        task.cancel("from outside")
        release.set_result(None)
        with pytest.raises(asyncio.CancelledError, match="from outside"):
            await task
        assert task.cancelling() == 1

    async def test_without_a_suspension_in_the_body(self):
        async with TaskGroup() as group:
            group.cancel()
        await turns()
        assert requests() == 0


class TestIssuesOfAsyncio:
    """What asyncio's groups of some version do, and ours do not."""

    async def test_a_group_in_clean_up_of_a_cancelled_task_loses_no_request_and_adds_none(self):
        """A failing asyncio group there cancels its host anew: its account starts at 1, not 0."""

        async def host():
            try:
                await forever()
            except asyncio.CancelledError:
                try:
                    async with TaskGroup() as group:
                        group.create_task(fail())
                        await forever()
                except ExceptionGroup:
                    pass
                await turns()
                assert requests() == 1
                return "cleaned up"

        task = asyncio.create_task(host())
        await turns()
        task.cancel()
        assert await task == "cleaned up"

    async def test_a_failure_in_the_last_step_of_the_body_leaves_no_pending_request(self):
        """gh-109525 and the like: the request made for the body met the code after the block."""
        for delay in range(5):
            with pytest.raises(ExceptionGroup):
                async with TaskGroup() as group:
                    group.create_task(fail(count=2))
                    await turns(delay)
            await turns()
            assert requests() == 0

    async def test_an_eager_child_that_fails_at_once_does_not_interrupt_create_task(self):
        """gh-128550."""
        reached = []
        with pytest.raises(ExceptionGroup):
            async with TaskGroup() as group:
                group.create_task(fail(count=0), eager_start=True)
                reached.append(True)
                await forever()
        assert reached == [True]

    async def test_a_parent_cancelled_while_a_failing_group_shuts_down_is_cancelled(self):
        """gh-155433: the outside request came while the group's own was pending."""

        async def child():
            try:
                await forever()
            finally:
                await turns(3)

        async def host():
            async with TaskGroup() as group:
                group.create_task(child())
                await turns(2)
                group.cancel()
                await forever()

        task = asyncio.create_task(host())
        await turns(4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    async def test_a_shield_inside_the_body_outlasts_the_failure_of_a_child(self):
        done = []
        with pytest.raises(ExceptionGroup):
            async with TaskGroup() as group:
                group.create_task(fail())
                async with ShieldScope():
                    await turns(6)
                    done.append("shielded")
                done.append("never")
        assert done == ["shielded"] and requests() == 0


def test_the_root_names_are_those_of_the_module():
    assert aiotools.taskgroup.base.TaskGroup is TaskGroup and aiotools.taskgroup.types.TaskGroupError is TaskGroupError
