"""cancel_and_wait, trace_cancellation."""

import asyncio
import sys
import traceback

import pytest

from aiotools import (
    ShieldScope,
    TaskScope,
    UnfinishedTasksError,
    cancel_and_wait,
    cancel_requests,
    trace_cancellation,
)


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def forever():
    await asyncio.get_running_loop().create_future()


async def start(coro, **kwargs):
    task = asyncio.create_task(coro, **kwargs)
    await turns()
    return task


async def slow_cleanup(done, count=5):
    try:
        await forever()
    finally:
        async with ShieldScope():
            await turns(count)
            done.append("clean")


async def failing_cleanup(exc):
    try:
        await forever()
    finally:
        raise exc


async def swallow(uncancel):
    try:
        await forever()
    except asyncio.CancelledError:
        if uncancel:
            asyncio.current_task().uncancel()
    return "result"


class TestOneTask:
    async def test_it_is_cancelled_and_awaited(self):
        done = []
        task = await start(slow_cleanup(done))
        assert await cancel_and_wait(task, "message") is None
        assert task.cancelled() and done == ["clean"] and task.cancelling() == 1

    async def test_the_message_arrives(self):
        seen = []

        async def child():
            try:
                await forever()
            except asyncio.CancelledError as exc:
                seen.append(exc.args)
                raise

        await cancel_and_wait(await start(child()), msg="message")
        assert seen == [("message",)]

    async def test_one_that_is_done_is_left_alone(self):
        async def fail():
            raise ValueError

        task = await start(fail())
        await cancel_and_wait(task)
        assert isinstance(task.exception(), ValueError) and task.cancelling() == 0

    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="an eager task has started when it is created")
    async def test_one_that_never_started_never_runs(self):
        ran = []

        async def child():
            ran.append(1)

        task = asyncio.create_task(child())
        await cancel_and_wait(task)
        assert task.cancelled() and ran == []

    async def test_one_that_is_being_cancelled_gets_one_more_request(self):
        done = []
        task = await start(slow_cleanup(done))
        task.cancel()
        await turns(1)
        await cancel_and_wait(task)
        assert task.cancelled() and task.cancelling() == 2 and done == ["clean"]

    async def test_somebody_elses_request_is_raised_again(self):
        done = []
        task = await start(slow_cleanup(done))
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await cancel_and_wait(task)
        assert task.cancelled() and asyncio.current_task().cancelling() == 0

    async def test_what_its_clean_up_raises_comes_through(self):
        error = ValueError("clean-up")
        with pytest.raises(ValueError) as caught:
            await cancel_and_wait(await start(failing_cleanup(error)))
        assert caught.value is error

    async def test_a_swallowed_cancellation_is_an_invalid_state(self):
        with pytest.raises(asyncio.InvalidStateError):
            await cancel_and_wait(await start(swallow(False)))

    async def test_a_request_that_was_taken_back_is_fine(self):
        task = await start(swallow(True))
        assert await cancel_and_wait(task) is None
        assert task.result() == "result"

    async def test_in_clean_up_of_an_earlier_cancellation(self):
        """The requests that a shield keeps count together with those that it doesn't."""
        done = []
        task = await start(slow_cleanup(done, 8))
        task.cancel()
        await turns(2)
        await cancel_and_wait(task)
        assert done == ["clean"] and task.cancelling() == 2

    async def test_a_cancelled_caller_forwards_it_and_ends_cancelled(self):
        seen = []

        async def target():
            try:
                await forever()
            except asyncio.CancelledError:
                try:
                    await forever()
                finally:
                    seen.append("second")

        task = await start(target())
        caller = await start(cancel_and_wait(task))
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert seen == ["second"] and task.cancelled() and caller.cancelled()

    async def test_a_cancelled_caller_ends_with_the_message_of_its_own_cancellation(self):
        async def target():
            try:
                await forever()
            finally:
                async with ShieldScope():
                    await turns(8)

        async def caller(tasks):
            try:
                await cancel_and_wait(tasks)
            except asyncio.CancelledError as exc:
                return exc

        for make in (lambda task: task, lambda task: [task]):
            waiting = await start(caller(make(await start(target()))))
            waiting.cancel("mine")
            assert (await waiting).args == ("mine",)

    async def test_a_cancelled_caller_is_told_by_whom_when_that_is_traced(self):
        async def caller(task):
            try:
                await cancel_and_wait(task)
            except asyncio.CancelledError as exc:
                return cancel_requests(exc)

        done = []
        with trace_cancellation():
            waiting = await start(caller(await start(slow_cleanup(done, 8))))
            waiting.cancel("mine")
            assert [request.message for request in await waiting] == ["mine"]
        assert done == ["clean"]

    async def test_a_cancelled_caller_ends_cancelled_whatever_the_target_ends_with(self):
        async def target():
            try:
                await forever()
            except asyncio.CancelledError:
                try:
                    await forever()
                except asyncio.CancelledError:
                    raise ValueError from None

        task = await start(target())
        caller = await start(cancel_and_wait(task))
        caller.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await caller
        assert caller.cancelled() and isinstance(task.exception(), ValueError)
        assert caught.value is not None

    async def test_a_task_cannot_wait_for_itself(self):
        with pytest.raises(RuntimeError, match="itself"):
            await cancel_and_wait(asyncio.current_task())
        assert asyncio.current_task().cancelling() == 0


class TestCollections:
    async def test_all_are_cancelled_at_once(self):
        tasks = [await start(forever()) for _ in range(10)]
        for kind in (list, tuple, set, dict.fromkeys, frozenset):
            await cancel_and_wait(kind(tasks))
        assert all(task.cancelled() and task.cancelling() == 1 for task in tasks)

    async def test_an_empty_one(self):
        assert await cancel_and_wait([]) is None

    async def test_failures_are_collected_in_input_order(self):
        errors = [ValueError(1), KeyError(2)]
        tasks = [
            await start(failing_cleanup(errors[0])),
            await start(forever()),
            await start(failing_cleanup(errors[1])),
        ]
        with pytest.raises(ExceptionGroup, match="Unhandled exceptions during grouped cancellation") as caught:
            await cancel_and_wait(tasks)
        assert list(caught.value.exceptions) == errors

    async def test_a_swallowed_cancellation_is_one_of_them(self):
        with pytest.raises(ExceptionGroup) as caught:
            await cancel_and_wait([await start(swallow(False))])
        assert isinstance(caught.value.exceptions[0], asyncio.InvalidStateError)

    async def test_somebody_elses_request_wins_over_failures(self):
        done = []
        tasks = [await start(slow_cleanup(done)), await start(failing_cleanup(ValueError()))]
        asyncio.get_running_loop().call_soon(tasks[0].cancel)
        with pytest.raises(asyncio.CancelledError):
            await cancel_and_wait(tasks)
        assert done == ["clean"]

    async def test_a_cancelled_caller_waits_for_all_and_ends_cancelled(self):
        done = []
        tasks = [await start(slow_cleanup(done)) for _ in range(3)]
        caller = await start(cancel_and_wait(tasks))
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert done == ["clean"] * 3

    async def test_a_generator_is_none(self):
        with pytest.raises(TypeError, match="generator"):
            await cancel_and_wait(task for task in [])

    @pytest.mark.parametrize("bad", [None, 3, [3]])
    async def test_what_is_no_task(self, bad):
        with pytest.raises(TypeError, match="task"):
            await cancel_and_wait(bad)


class TestTimeout:
    async def test_who_did_not_end_is_told_with_the_place(self):
        release = asyncio.get_running_loop().create_future()

        async def released():
            await asyncio.shield(release)

        async def stubborn():
            while not release.done():
                try:
                    await released()
                except asyncio.CancelledError:
                    pass

        tasks = [await start(stubborn(), name="first"), await start(forever())]
        places = r"first: \S*stubborn at .*test_cancel\.py:\d+ > \S*released at .*test_cancel\.py:\d+"
        with pytest.raises(UnfinishedTasksError, match=places) as caught:
            await cancel_and_wait(tasks, timeout=0.001)
        assert caught.value.tasks == (tasks[0],) and isinstance(caught.value, TimeoutError)
        assert tasks[1].cancelled()
        release.set_result(None)
        await tasks[0]

    async def test_in_time_nothing_is_raised(self):
        await cancel_and_wait(await start(forever()), timeout=60)

    @pytest.mark.parametrize("bad", ["1", float("nan")])
    async def test_what_is_no_time(self, bad):
        with pytest.raises((TypeError, ValueError), match="timeout"):
            await cancel_and_wait([], timeout=bad)


class TestTrace:
    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="an eager task makes its request before it has a name")
    async def test_each_request_tells_who_made_it(self):
        async def canceller(task):
            task.cancel("enough")

        with trace_cancellation():
            task = await start(forever(), name="victim")
            await asyncio.create_task(canceller(task), name="killer")
            with pytest.raises(
                asyncio.CancelledError, match="enough .cancelled by task 'killer' in .*canceller at"
            ) as caught:
                await task
            [request] = cancel_requests(task)
            assert cancel_requests(caught.value) == [request]
        assert (request.message, request.task_name) == ("enough", "killer")
        assert request.filename == __file__ and request.function.endswith("canceller") and request.lineno > 0
        assert request.when > 1e9

    async def test_requests_of_callbacks_and_without_a_message(self):
        with trace_cancellation():
            task = await start(forever())
            asyncio.get_running_loop().call_soon(lambda: task.cancel())
            with pytest.raises(asyncio.CancelledError, match="cancelled by a callback in"):
                await task

    @pytest.mark.parametrize("is_async", [False, True])
    @pytest.mark.parametrize("waits", [False, True])
    async def test_a_request_that_a_shield_holds_off_is_noted_when_it_is_made(self, is_async, waits):
        release = asyncio.get_running_loop().create_future()

        async def wait():
            if waits:
                await release
            else:
                while not release.done():
                    await turns(1)

        async def work():
            if is_async:
                async with ShieldScope():
                    await wait()
            else:
                with ShieldScope():
                    await wait()

        async def killer(task):
            task.cancel("held")

        with trace_cancellation():
            task = await start(work())
            await asyncio.create_task(killer(task))
            [request] = cancel_requests(task)
            assert request.function.endswith("killer") and request.message == "held"
            release.set_result(None)
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            # Once, although it is delivered later; and the end of the shield tells of it.
            assert cancel_requests(task) == cancel_requests(caught.value) == [request]
            assert caught.value.args == () and "killer" in caught.value.__notes__[0]
        assert getattr(task.cancel, "__self__", None) is task

    async def test_a_trace_that_ends_while_a_task_is_in_a_shield_leaves_no_patch(self):
        async def work():
            async with ShieldScope():
                await release

        release = asyncio.get_running_loop().create_future()
        with trace_cancellation():
            task = await start(work())
        release.set_result(None)
        await task
        assert task.cancel.__self__ is task

    async def test_a_shield_that_is_left_while_the_trace_goes_on_leaves_the_trace(self):
        async def work():
            async with ShieldScope():
                await turns(2)
            await forever()

        with trace_cancellation():
            task = await start(work())
            await turns(5)
            task.cancel("later")
            with pytest.raises(asyncio.CancelledError, match="later .cancelled by"):
                await task
            assert len(cancel_requests(task)) == 1
        assert task.cancel.__self__ is task

    async def test_a_traceback_of_a_task_that_died_cancelled_shows_who_did_it(self):
        async def killer(task):
            task.cancel("enough")

        with trace_cancellation():
            task = await start(forever())
            await asyncio.create_task(killer(task))
            await asyncio.wait([task])
        try:
            await task
        except asyncio.CancelledError as exc:
            text = "".join(traceback.format_exception(exc))
        assert "enough (cancelled by" in text and f"killer at {__file__}:" in text

    async def test_requests_of_scopes_and_timeouts_are_traced_as_well(self):
        with trace_cancellation():
            async with TaskScope() as scope:
                task = scope.create_task(forever())
                await turns()
                scope.abort("over")
                line = sys._getframe().f_lineno - 1
            [request] = cancel_requests(task)
        assert (request.message, request.filename, request.lineno) == ("over", __file__, line)

    async def test_nested_traces_each_tell_the_caller(self):
        with trace_cancellation(), trace_cancellation():
            task = await start(forever())
            task.cancel("twice")
            with pytest.raises(asyncio.CancelledError, match="twice .cancelled by"):
                await task
        assert {request.filename for request in cancel_requests(task)} == {__file__}
        assert task.cancel.__self__ is task

    async def test_a_factory_that_somebody_else_keeps_traces_no_more(self):
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()
        try:
            with trace_cancellation():
                ours = loop.get_task_factory()
                loop.set_task_factory(lambda loop, coro, **kwargs: ours(loop, coro, **kwargs))
            task = await start(forever())
            assert task.cancel.__self__ is task
            await cancel_and_wait(task)
            assert cancel_requests(task) == []
        finally:
            loop.set_task_factory(before)

    async def test_it_costs_nothing_when_it_is_off(self):
        loop = asyncio.get_running_loop()
        factory = loop.get_task_factory()
        with trace_cancellation():
            pass
        task = await start(forever())
        assert loop.get_task_factory() is factory
        assert not hasattr(task, "_aiotools_cancel_requests") and task.cancel.__self__ is task
        await cancel_and_wait(task)

    async def test_afterwards_all_is_as_it_was(self):
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()
        with trace_cancellation():
            task = await start(forever())
            assert loop.get_task_factory() is not before
        assert loop.get_task_factory() is before
        assert task.cancel.__self__ is task
        await cancel_and_wait(task)
        assert cancel_requests(task) == []

    async def test_what_was_not_traced_has_no_requests(self):
        task = await start(forever())
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert cancel_requests(caught.value) == []

    async def test_a_loop_without_a_task_factory_is_named(self, monkeypatch):
        class Stub:
            def get_task_factory(self):
                return None

            def set_task_factory(self, factory):
                raise NotImplementedError

        monkeypatch.setattr(asyncio, "get_running_loop", Stub)
        with pytest.raises(RuntimeError, match="'Stub' objects take no task factory"):
            trace_cancellation().__enter__()
        monkeypatch.undo()

    async def test_it_is_entered_once(self):
        with trace_cancellation() as trace, pytest.raises(RuntimeError):
            trace.__enter__()
