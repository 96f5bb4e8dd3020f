"""TaskScope and move_on_after."""

import asyncio
import contextvars
import gc
import inspect
import sys
import weakref

import pytest

import aiotools
from aiotools import TaskScope, UnfinishedTasksError, cancel_and_wait, move_on_after


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def fail(exc=None):
    raise exc or ValueError("failed")


async def forever():
    await asyncio.get_running_loop().create_future()


def requests():
    return asyncio.current_task().cancelling()


class TestChildren:
    async def test_the_block_waits_for_its_children(self):
        done = []

        async def child(number):
            await turns(number)
            done.append(number)

        async with TaskScope() as scope:
            assert isinstance(scope, TaskScope)
            tasks = [scope.create_task(child(number), name=f"child {number}") for number in range(5)]
        assert done == [0, 1, 2, 3, 4]
        assert [task.get_name() for task in tasks] == [f"child {number}" for number in range(5)]
        assert all(type(task) is asyncio.Task for task in tasks)

    async def test_children_may_add_children_while_the_block_is_being_left(self):
        done = []

        async def child(scope, depth):
            await turns(1)
            done.append(depth)
            if depth < 5:
                scope.create_task(child(scope, depth + 1))

        async with TaskScope() as scope:
            scope.create_task(child(scope, 0))
        assert done == [0, 1, 2, 3, 4, 5]

    async def test_a_failing_child_disturbs_nobody_and_is_reported_at_once(self, loop_errors):
        done = []

        async def sibling():
            await turns()
            done.append("sibling")

        async with TaskScope() as scope:
            failing = scope.create_task(fail())
            scope.create_task(sibling())
            await turns()
            context = loop_errors.take_one(ValueError)
            assert set(context) == {"message", "exception", "task"} and context["task"] is failing
            done.append("body")
        assert set(done) == {"sibling", "body"}

    async def test_a_handler_is_called_with_each_failure(self):
        seen = []
        async with TaskScope(exception_handler=seen.append) as scope:
            tasks = [scope.create_task(fail(ValueError(number))) for number in range(3)]
        assert [context["exception"].args for context in seen] == [(0,), (1,), (2,)]
        assert [context["task"] for context in seen] == tasks

    async def test_without_a_handler_failures_are_dropped(self):
        async with TaskScope(exception_handler=None) as scope:
            scope.create_task(fail())

    async def test_cancelled_children_are_never_reported(self):
        async with TaskScope() as scope:
            task = scope.create_task(forever())
            await turns()
            task.cancel()

    async def test_what_a_handler_raises_is_reported_by_the_loop(self, loop_errors):
        def broken(context):
            raise KeyError("handler")

        async with TaskScope(exception_handler=broken) as scope:
            scope.create_task(fail())
        assert isinstance(loop_errors.take_one(KeyError)["exception"], KeyError)

    async def test_a_handler_that_cannot_be_called_is_reported_when_a_child_fails(self, loop_errors):
        async with TaskScope(exception_handler=3) as scope:
            scope.create_task(fail())
        loop_errors.take_one(RuntimeError)

    async def test_a_handler_may_create_tasks_and_abort(self):
        done = []

        async def other():
            done.append("other")

        def handler(context):
            scope.create_task(other())
            scope.abort()

        async with TaskScope(exception_handler=handler) as scope:
            sibling = scope.create_task(forever())
            scope.create_task(fail())
            await turns(4)
        assert sibling.cancelled()
        # An eager one ran before it could be cancelled.
        assert done in ([], ["other"])

    async def test_children_get_the_context_that_was_given(self):
        var = contextvars.ContextVar("var", default=0)
        context = contextvars.copy_context()
        context.run(var.set, 5)
        seen = []

        async def child():
            seen.append(var.get())

        async with TaskScope(context=context) as scope:
            scope.create_task(child())
            own = contextvars.copy_context()
            own.run(var.set, 6)
            scope.create_task(child(), context=own)
        assert sorted(seen) == [5, 6]

    async def test_a_context_that_is_none_is_refused_at_the_call(self):
        with pytest.raises(TypeError, match="contextvars.Context"):
            TaskScope(context=3)

    async def test_nothing_of_a_finished_child_is_kept(self):
        class Result:
            pass

        async def child():
            return Result()

        async with TaskScope(exception_handler=None) as scope:
            task = scope.create_task(child())
            failing = scope.create_task(fail())
            await turns()
            result = weakref.ref(task.result())
            error_of = weakref.ref(failing)
            del task, failing
            await turns(1)
            if asyncio.get_running_loop().get_task_factory() is not None:
                # The traceback of an eager failure refers to whoever created the task.
                gc.collect()
            assert result() is None and error_of() is None

    async def test_children_that_nobody_else_refers_to_are_not_collected(self):
        async def child():
            # This task, its future and its callback refer to each other only.
            await forever()

        async with TaskScope() as scope:
            for _ in range(10):
                scope.create_task(child())
            await turns()
            gc.collect()
            await turns()
            assert len(scope._tasks) == 10
            scope.abort()

    async def test_a_hundred_thousand_children(self, loop_kind):
        count = 0

        async def child():
            nonlocal count
            count += 1

        number = 1000 if loop_kind == "debug" else 100_000
        async with TaskScope() as scope:
            for _ in range(number):
                scope.create_task(child())
        assert count == number

    async def test_scopes_nested_a_thousand_deep(self):
        async def nest(depth):
            if depth == 0:
                return
            async with TaskScope(shield=depth % 100 == 0) as scope:
                scope.create_task(turns(1))
                await nest(depth - 1)

        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(10_000)
        try:
            await nest(1000)
        finally:
            sys.setrecursionlimit(limit)

    async def test_create_task_refuses_what_is_no_coroutine(self):
        async with TaskScope() as scope:
            with pytest.raises(TypeError):
                scope.create_task(3)
            with pytest.raises(TypeError):
                scope.create_task()
            with pytest.raises(TypeError):
                scope.create_task(3, 4)

    @pytest.mark.skipif(sys.version_info < (3, 14), reason="the call graph is new in 3.14")
    async def test_the_call_graph_of_a_child_shows_the_host(self):
        graphs = []

        async def child():
            graphs.append(asyncio.capture_call_graph())

        async with TaskScope() as scope:
            scope.create_task(turns(2)).add_done_callback(id)
            scope.create_task(child())
            await turns()
            host = asyncio.current_task()
        if graphs[0].awaited_by:
            assert [waiter.future for waiter in graphs[0].awaited_by] == [host]
        else:
            # It ran inside create_task(), before anybody could wait for it.
            assert asyncio.get_running_loop().get_task_factory() is asyncio.eager_task_factory


class TestUse:
    async def test_it_is_entered_once(self):
        async with TaskScope() as scope:
            with pytest.raises(RuntimeError, match="already been entered"):
                await scope.__aenter__()
        with pytest.raises(RuntimeError, match="already been entered"):
            await scope.__aenter__()

    def test_it_needs_a_running_loop(self):
        with pytest.raises(RuntimeError, match="no running event loop"):
            TaskScope()

    async def test_create_task_before_and_after_the_block(self):
        scope = TaskScope()
        with pytest.raises(RuntimeError, match="has not been entered"):
            scope.create_task(turns())
        async with scope:
            pass
        with pytest.raises(RuntimeError, match="is finished"):
            scope.create_task(turns())

    async def test_it_is_entered_within_a_task(self):
        loop = asyncio.get_running_loop()
        scope = TaskScope()
        outcome = loop.create_future()

        def callback():
            try:
                scope.__aenter__().send(None)
            except BaseException as exc:
                outcome.set_result(exc)

        loop.call_soon(callback)
        assert isinstance(await outcome, RuntimeError)

    async def test_it_is_left_by_its_own_task(self):
        scope = TaskScope()
        await scope.__aenter__()

        async def other():
            with pytest.raises(RuntimeError, match="by the task that entered it"):
                await scope.__aexit__(None, None, None)

        await asyncio.create_task(other())
        await scope.__aexit__(None, None, None)

    async def test_scopes_are_left_in_order(self):
        outer, inner = TaskScope(), TaskScope()
        await outer.__aenter__()
        await inner.__aenter__()
        with pytest.raises(RuntimeError, match="entered inside it"):
            await outer.__aexit__(None, None, None)
        await inner.__aexit__(None, None, None)
        await outer.__aexit__(None, None, None)

    async def test_repr(self):
        scope = TaskScope()
        assert repr(scope) == "<TaskScope >"
        async with scope:
            assert repr(scope) == "<TaskScope  entered>"
            task = scope.create_task(forever())
            assert repr(scope) == "<TaskScope  tasks=1 entered>"
            scope.abort()
            assert repr(scope) == "<TaskScope  tasks=1 cancelling>"
            await turns()
            assert task.cancelled()

    async def test_subclasses_with_attributes(self):
        class Mine(TaskScope):
            def __init__(self):
                super().__init__(exception_handler=None)
                self.attribute = 1

        async with Mine() as scope:
            scope.create_task(fail())
        assert scope.attribute == 1

    async def test_a_subclass_that_forgets_to_initialize(self):
        class Mine(TaskScope):
            def __init__(self):
                pass

        with pytest.raises(RuntimeError, match="__init__"):
            await Mine().__aenter__()
        with pytest.raises(RuntimeError, match="__init__"):
            Mine().create_task(turns())
        with pytest.raises(RuntimeError, match="__init__"):
            Mine().abort()


class TestAbort:
    async def test_it_cancels_the_children_and_not_the_body(self):
        messages = []

        async def child():
            try:
                await forever()
            except asyncio.CancelledError as exc:
                messages.append(exc.args)
                raise

        async with TaskScope() as scope:
            scope.create_task(child())
            await turns()
            scope.abort("bye")
            scope.abort("again")
            await turns()
            with pytest.raises(RuntimeError, match="shutting down"):
                scope.create_task(turns())
        assert messages == [("bye",)]
        assert requests() == 0


class TestCancellation:
    async def test_a_cancelled_host_cancels_its_children_and_waits(self):
        done = []

        async def child():
            try:
                await forever()
            finally:
                await turns()
                done.append("child")

        async def host():
            async with TaskScope() as scope:
                scope.create_task(child())
                await forever()

        task = asyncio.create_task(host())
        await turns()
        task.cancel("stop")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["child"] and task.cancelling() == 1

    async def test_a_host_cancelled_twice_while_it_waits_still_waits(self):
        done = []

        async def child():
            try:
                await forever()
            finally:
                await turns(5)
                done.append("child")

        async def host():
            async with TaskScope() as scope:
                scope.create_task(child())

        task = asyncio.create_task(host())
        await turns()
        task.cancel("first")
        await turns(2)
        task.cancel("second")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["child"] and task.cancelling() == 2

    async def test_a_body_that_swallowed_a_request_raises_it_at_the_end(self):
        async def host():
            async with TaskScope():
                try:
                    await forever()
                except asyncio.CancelledError:
                    pass

        task = asyncio.create_task(host())
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_a_request_that_comes_with_the_last_step_of_the_body_is_delivered_once(self):
        caught = []

        async def host():
            try:
                async with TaskScope():
                    asyncio.current_task().cancel()
            except asyncio.CancelledError:
                caught.append(asyncio.current_task().uncancel())
            await asyncio.sleep(0)
            return "went on"

        assert await asyncio.create_task(host()) == "went on"
        assert caught == [0]

    async def test_a_child_that_cancels_its_host(self):
        async def host():
            me = asyncio.current_task()

            async def child():
                me.cancel("from a child")

            async with TaskScope() as scope:
                scope.create_task(child())
                await forever()

        task = asyncio.create_task(host())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    async def test_children_that_end_in_the_step_in_which_the_host_is_cancelled(self):
        gate = asyncio.get_running_loop().create_future()

        async def child():
            await gate

        async def host():
            async with TaskScope() as scope:
                for _ in range(3):
                    scope.create_task(child())

        task = asyncio.create_task(host())
        await turns()
        gate.set_result(None)
        await turns(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_an_exception_of_the_body_cancels_the_children_and_passes_unchanged(self):
        error = ValueError("body")
        with pytest.raises(ValueError) as caught:
            async with TaskScope() as scope:
                task = scope.create_task(forever())
                raise error
        assert caught.value is error and task.cancelled()

    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="an eager child raises where it is created")
    @pytest.mark.parametrize("base", [SystemExit, KeyboardInterrupt])
    def test_a_base_error_of_a_child_is_raised_at_the_end(self, new_loop, base):
        loop = new_loop()
        done = []

        async def sibling():
            await turns()
            done.append("sibling")

        async def main():
            async with TaskScope() as scope:
                scope.create_task(sibling())
                scope.create_task(fail(base()))

        task = loop.create_task(main())
        with pytest.raises(base):
            loop.run_until_complete(task)
        with pytest.raises(base):
            loop.run_until_complete(task)
        assert isinstance(task.exception(), base) and done == ["sibling"]

    async def test_closing_the_coroutine_of_the_host_abandons_the_children(self, loop_errors):
        done = []

        async def child():
            await turns()
            done.append("child")

        scope = TaskScope()
        await scope.__aenter__()
        task = scope.create_task(child())
        leaving = scope.__aexit__(None, None, None)
        leaving.send(None)
        leaving.close()
        await asyncio.wait([task])
        assert task.cancelled() and done == []


class TestAclose:
    async def test_from_another_task_it_cancels_children_and_host(self):
        scopes = []

        async def host():
            async with TaskScope() as scope:
                scopes.append(scope)
                scope.create_task(forever())
                await forever()

        task = asyncio.create_task(host())
        await turns()
        await scopes[0].aclose()
        with pytest.raises(asyncio.CancelledError):
            await task
        await scopes[0].aclose()

    async def test_from_the_host_itself_the_body_goes_on_to_the_end(self):
        reached = []

        async def host():
            async with TaskScope(shield=True) as scope:
                child = scope.create_task(forever())
                await scope.aclose()
                assert child.cancelled()
                await turns()
                reached.append("end")

        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(host())
        assert reached == ["end"]

    async def test_it_ignores_the_shield(self):
        scopes = []

        async def host():
            async with TaskScope(shield=True) as scope:
                scopes.append(scope)
                await forever()

        task = asyncio.create_task(host())
        await turns()
        await scopes[0].aclose()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_with_a_timeout_it_tells_who_did_not_end_and_where(self):
        release = asyncio.get_running_loop().create_future()

        async def stubborn():
            while not release.done():
                try:
                    await asyncio.shield(release)
                except asyncio.CancelledError:
                    pass

        async with TaskScope() as scope:
            task = scope.create_task(stubborn(), name="the stubborn one")
            await turns()
            with pytest.raises(
                UnfinishedTasksError, match="the stubborn one: .*stubborn at .*test_taskscope.py"
            ) as caught:
                try:
                    await scope.aclose(timeout=0.001)
                finally:
                    release.set_result(None)
            assert caught.value.tasks == (task,)
            scope.cancel()
            await turns()


class TestCancel:
    async def test_it_ends_the_block_without_an_error(self):
        async with TaskScope() as scope:
            child = scope.create_task(forever())
            scope.cancel()
            scope.cancel()
            await forever()
        assert child.cancelled() and requests() == 0
        scope.cancel()
        await turns()

    async def test_before_entry(self):
        scope = TaskScope()
        scope.cancel()
        async with scope:
            await forever()
        assert requests() == 0
        await turns()

    async def test_after_abort(self):
        async with TaskScope() as scope:
            scope.abort()
            scope.cancel()
            await forever()
        assert requests() == 0

    async def test_as_the_last_thing_of_the_body(self):
        async with TaskScope() as scope:
            scope.cancel()
        await turns()
        assert requests() == 0

    async def test_from_a_child(self):
        async with TaskScope() as scope:

            async def child():
                await turns()
                scope.cancel()

            scope.create_task(child())
            await forever()
        assert requests() == 0

    async def test_a_shielded_scope_can_be_cancelled(self):
        async with TaskScope(shield=True) as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            await forever()
        assert requests() == 0

    async def test_an_inner_shield_holds_it_off_until_it_is_left(self):
        seen = []
        async with TaskScope() as scope:
            async with aiotools.ShieldScope():
                scope.cancel()
                await turns()
                seen.append("shielded")
            seen.append("never")
        assert seen == ["shielded"] and requests() == 0

    async def test_a_request_from_outside_still_propagates(self):
        async def host():
            async with TaskScope() as scope:
                scope.cancel()
                asyncio.current_task().cancel()
                await forever()

        task = asyncio.create_task(host())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    async def test_with_a_request_that_was_pending_before(self):
        async def host():
            try:
                await forever()
            except asyncio.CancelledError:
                async with TaskScope() as scope:
                    scope.cancel()
                    await forever()
                assert requests() == 1
                await turns()
                return "cleaned up"

        task = asyncio.create_task(host())
        await turns()
        task.cancel()
        assert await task == "cleaned up"


class TestTimeout:
    async def test_on_expiry_children_and_body_are_cancelled(self):
        with pytest.raises(TimeoutError) as caught:
            async with TaskScope(timeout=0.001) as scope:
                child = scope.create_task(forever())
                await forever()
        assert child.cancelled() and requests() == 0
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        await turns()

    async def test_it_covers_the_waiting_at_exit(self):
        with pytest.raises(TimeoutError):
            async with TaskScope(timeout=0.001) as scope:
                scope.create_task(forever())
        assert requests() == 0
        await turns()

    async def test_a_body_that_swallows_it_does_not_hide_it(self):
        with pytest.raises(TimeoutError) as caught:
            async with TaskScope(timeout=0.001):
                try:
                    await forever()
                except asyncio.CancelledError:
                    pass
        assert requests() == 0 and isinstance(caught.value.__cause__, asyncio.CancelledError)

    async def test_a_body_that_replaces_it_does_not_hide_it(self):
        with pytest.raises(TimeoutError):
            async with TaskScope(timeout=0.001):
                try:
                    await forever()
                except asyncio.CancelledError:
                    raise ValueError from None
        assert requests() == 0

    async def test_it_does_not_fire_when_the_block_is_in_time(self):
        async with TaskScope(timeout=60) as scope:
            scope.create_task(turns())
        assert requests() == 0

    async def test_it_pierces_the_shields_inside(self):
        with pytest.raises(TimeoutError):
            async with TaskScope(timeout=0.001):
                async with aiotools.ShieldScope():
                    await forever()
        assert requests() == 0

    async def test_a_group_after_it_is_not_cancelled(self):
        """2.2 left a request behind, which a later asyncio.TaskGroup took for its own (F-11)."""
        with pytest.raises(TimeoutError):
            async with TaskScope(timeout=0):
                await forever()
        async with asyncio.TaskGroup() as group:
            group.create_task(turns())
            await turns()

    async def test_a_request_from_outside_at_the_same_time_is_not_lost(self):
        async def host():
            try:
                async with TaskScope(timeout=0.001) as scope:
                    while not scope._expired:
                        try:
                            await asyncio.sleep(0.0005)
                        except asyncio.CancelledError:
                            asyncio.current_task().cancel()
                    await forever()
            except TimeoutError:
                assert requests() == 1
                await forever()

        task = asyncio.create_task(host())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 1

    @pytest.mark.parametrize("bad", ["1", float("nan")])
    async def test_what_is_no_time(self, bad):
        with pytest.raises((TypeError, ValueError)):
            TaskScope(timeout=bad)


class TestMoveOnAfter:
    async def test_it_goes_on_after_the_block(self):
        async with move_on_after(0.001) as scope:
            assert isinstance(scope, TaskScope)
            child = scope.create_task(forever())
            await forever()
        assert child.cancelled() and requests() == 0
        await turns()

    async def test_a_timeout_error_of_the_body_comes_through(self):
        with pytest.raises(TimeoutError, match="mine"):
            async with move_on_after(60):
                raise TimeoutError("mine")

    async def test_a_timeout_around_it_comes_through(self):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                async with move_on_after(60):
                    await forever()
        assert requests() == 0

    async def test_without_a_timeout(self):
        async with move_on_after() as scope:
            scope.create_task(turns())

    async def test_a_cancellation_comes_through(self):
        async def host():
            async with move_on_after(60):
                await forever()

        task = asyncio.create_task(host())
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


class TestLimit:
    async def test_so_many_run_at_once_in_the_order_of_creation(self):
        running = peak = 0
        order = []

        async def child(number):
            nonlocal running, peak
            order.append(number)
            running += 1
            peak = max(peak, running)
            await turns(number % 3)
            running -= 1

        async with TaskScope(limit=3) as scope:
            for number in range(20):
                scope.create_task(child(number))
        assert peak == 3 and order == list(range(20))

    async def test_start_task_without_a_limit_does_not_wait(self):
        async with TaskScope() as scope:
            task = await scope.start_task(turns(1), name="child")
            assert task.get_name() == "child" and not task.done()
        assert task.done()
        coro = turns()
        with pytest.raises(RuntimeError, match="is finished"):
            await scope.start_task(coro)
        assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED

    async def test_start_task_waits_for_room(self):
        gate = asyncio.get_running_loop().create_future()

        async def child():
            await gate

        async with TaskScope(limit=2) as scope:
            await scope.start_task(child())
            await scope.start_task(child())
            third = asyncio.create_task(scope.start_task(child(), name="third"))
            await turns()
            assert not third.done() and len(scope._tasks) == 2
            gate.set_result(None)
            assert (await third).get_name() == "third"

    async def test_a_child_that_never_got_its_turn_is_closed_without_a_warning(self):
        async with TaskScope(limit=1) as scope:
            scope.create_task(forever())
            waiting = scope.create_task(turns())
            await turns()
            scope.abort()
        assert waiting.cancelled()

    async def test_a_cancelled_start_task_closes_its_coroutine_and_gives_its_turn_away(self):
        gate = asyncio.get_running_loop().create_future()

        async def child():
            await gate

        async with TaskScope(limit=1) as scope:
            await scope.start_task(child())
            waiting = asyncio.create_task(scope.start_task(turns()))
            await turns()
            await cancel_and_wait(waiting)
            gate.set_result(None)
            await (await scope.start_task(turns()))

    async def test_a_place_is_given_back_when_the_scope_refuses(self):
        async with TaskScope(limit=1) as scope:
            scope.abort()
            for _ in range(3):
                with pytest.raises(RuntimeError):
                    await scope.start_task(turns())

    @pytest.mark.parametrize("bad, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
    async def test_what_is_no_limit(self, bad, error):
        with pytest.raises(error, match="limit"):
            TaskScope(limit=bad)


class TestEagerStart:
    @pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are new in 3.12")
    async def test_a_child_runs_at_once_up_to_its_first_suspension(self):
        seen = []

        async def child(number):
            seen.append(number)
            await turns(1)

        async with TaskScope(eager_start=True) as scope:
            task = scope.create_task(child(1), name="one")
            assert seen == [1]
            assert task.get_name() == "one"
        async with TaskScope() as scope:
            scope.create_task(child(2), name="two", eager_start=True)
            assert seen == [1, 2]

    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="asyncio's eager factory itself fails there")
    async def test_it_is_left_out_where_the_context_is_entered(self):
        var = contextvars.ContextVar("var")
        here = contextvars.copy_context()

        async def child():
            return var.get()

        async def inside():
            var.set(1)
            async with TaskScope() as scope:
                task = scope.create_task(child(), context=here, eager_start=True)
                return await task

        task = asyncio.get_running_loop().create_task(inside(), context=here)
        assert await task == 1

    async def test_a_failure_in_the_eager_step_is_reported(self, loop_errors):
        async with TaskScope(eager_start=True) as scope:
            scope.create_task(fail())
        loop_errors.take_one(ValueError)

    @pytest.mark.parametrize("eager", [False, True])
    @pytest.mark.parametrize("where", ["instance", "class"])
    async def test_an_own_create_task_of_the_loop_is_honoured(self, monkeypatch, where, eager):
        """Also when it comes after the loop's was seen to be the plain one, and until it goes."""
        loop = asyncio.get_running_loop()
        before, made = loop.create_task, []

        def create_task(*args, **kwargs):
            made.append(args[-1])
            return before(args[-1], **kwargs)

        async with TaskScope(eager_start=eager) as scope:
            scope.create_task(turns(1))
            with monkeypatch.context() as patch:
                patch.setattr(loop if where == "instance" else type(loop), "create_task", create_task, raising=False)
                scope.create_task(turns(1))
                scope.create_task(turns(1))
            if where == "instance":
                # It put the bound method there.
                loop.__dict__.pop("create_task", None)
            scope.create_task(turns(1))
        assert len(made) == 2


class TestTasksAreRealTasks:
    async def test_coroutine_stack_and_repr_are_those_of_the_child(self):
        coro = forever()
        async with TaskScope() as scope:
            task = scope.create_task(coro, name="child")
            await turns(1)
            assert task.get_coro() is coro
            assert "forever() running at" in repr(task) and "test_taskscope.py" in repr(task)
            assert [frame.f_code.co_name for frame in task.get_stack()] == ["forever"]
            assert task in asyncio.all_tasks()
            scope.abort()

    async def test_a_task_factory_makes_them(self):
        class MyTask(asyncio.Task):
            pass

        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()
        loop.set_task_factory(lambda loop, coro, **kwargs: MyTask(coro, loop=loop, **kwargs))
        try:
            async with TaskScope() as scope:
                assert type(scope.create_task(turns(), eager_start=True)) is MyTask
        finally:
            loop.set_task_factory(before)
