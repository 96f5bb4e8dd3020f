"""TaskContext."""

import asyncio
import gc
import sys
import warnings

import pytest

from aiotools import TaskContext
from aiotools.taskcontext import LoopExceptionHandler


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def fail():
    raise ValueError("failed")


async def forever():
    await asyncio.get_running_loop().create_future()


class TestChildren:
    async def test_failures_go_to_the_loop_by_default(self, loop_errors):
        context = TaskContext(exception_handler=LoopExceptionHandler.TOKEN)
        task = context.create_task(fail(), name="child")
        await turns()
        told = loop_errors.take_one(ValueError, match="failed")
        assert told["task"] is task and task.get_name() == "child"
        await context.aclose()

    async def test_none_drops_them_and_a_callable_gets_them(self):
        seen = []
        for handler in (None, seen.append):
            context = TaskContext(exception_handler=handler)
            context.create_task(fail())
            await turns()
            await context.aclose()
        assert [told["exception"].args for told in seen] == [("failed",)]

    async def test_a_reference_is_kept_until_the_child_is_done(self):
        context = TaskContext()
        done = []

        async def child():
            await asyncio.sleep(0)
            gc.collect()
            await asyncio.sleep(0)
            done.append(1)

        context.create_task(child())
        await turns(5)
        assert done == [1]
        await context.aclose()

    async def test_the_first_caller_is_the_owner(self):
        context = TaskContext()
        context.create_task(turns())

        async def other():
            with pytest.raises(RuntimeError, match="TaskContext .* belongs to another task"):
                context.create_task(turns())

        await asyncio.create_task(other())
        await context.aclose()

    async def test_a_call_from_no_task_is_an_assertion_error(self):
        context = TaskContext()
        outcome = asyncio.get_running_loop().create_future()

        def callback():
            try:
                context.create_task(turns())
            except BaseException as exc:
                outcome.set_result(exc)

        asyncio.get_running_loop().call_soon(callback)
        assert isinstance(await outcome, AssertionError)


class TestClosing:
    async def test_it_cancels_and_waits(self):
        context = TaskContext()
        done = []

        async def child():
            try:
                await forever()
            finally:
                await turns()
                done.append(1)

        context.create_task(child())
        await turns()
        await context.aclose()
        assert done == [1]
        with pytest.raises(RuntimeError):
            context.create_task(turns())
        await context.aclose()

    async def test_without_ever_having_been_used(self):
        await TaskContext().aclose()

    async def test_from_another_task(self):
        context = TaskContext()
        task = context.create_task(forever())
        await asyncio.create_task(context.aclose())
        assert task.cancelled()

    async def test_errors_of_clean_up_are_those_of_cancel_and_wait(self):
        async def child():
            try:
                await forever()
            finally:
                raise ValueError

        context = TaskContext(exception_handler=None)
        context.create_task(child())
        await turns()
        with pytest.raises(ExceptionGroup, match="grouped cancellation"):
            await context.aclose()

    async def test_forgetting_it_warns(self):
        context = TaskContext()
        line = sys._getframe().f_lineno - 1
        context.create_task(turns(1))
        await turns(5)
        with pytest.warns(ResourceWarning, match="TaskContext .* was never closed") as caught:
            del context
            gc.collect()
        assert f", created at {__file__}:{line}," in str(caught[0].message)

    async def test_one_that_was_never_used_or_was_closed_does_not_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            context = TaskContext()
            del context
            context = TaskContext()
            context.create_task(turns(1))
            await context.aclose()
            del context
            gc.collect()

    def test_without_a_loop_there_is_only_its_runtime_error(self, recwarn):
        with pytest.raises(RuntimeError, match="no running event loop"):
            TaskContext()
        gc.collect()
        assert not recwarn.list

    async def test_repr(self):
        context = TaskContext()
        assert repr(context) == "<TaskContext >"
        context.create_task(forever())
        assert repr(context) == "<TaskContext  tasks=1 entered>"
        await context.aclose()
        assert repr(context) == "<TaskContext  cancelling>"
