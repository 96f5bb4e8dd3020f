"""Many children at once: the ends of a burst are looked for by sweeps, and everything holds as for a single child."""

import asyncio
import contextvars
import gc
import random
import sys
import weakref

import pytest

from aiotools import (
    Supervisor,
    TaskContext,
    TaskGroup,
    TaskGroupError,
    TaskScope,
    as_completed_safe,
    cancel_and_wait,
    gather_safe,
    race,
)

# More than get a done callback of their own (BURST_BEGINS in children.c).
MANY = 30


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def fail(number=0):
    raise ValueError(number)


async def forever():
    await asyncio.get_running_loop().create_future()


@pytest.fixture(params=[TaskScope, TaskGroup, Supervisor], ids=lambda owner: owner.__name__)
def Owner(request):
    return request.param


class TestEnds:
    async def test_the_block_waits_for_children_of_any_length(self, Owner):
        done = []

        async def child(number, length):
            await turns(length)
            done.append(number)

        async with Owner() as owner:
            for number in range(10 * MANY):
                owner.create_task(child(number, number % 7))
        assert sorted(done) == list(range(10 * MANY))
        assert not owner._tasks

    async def test_they_leave_when_they_have_ended_while_the_body_goes_on(self, Owner):
        event = asyncio.Event()
        async with Owner() as owner:
            for _ in range(MANY):
                owner.create_task(turns(1))
                owner.create_task(event.wait())
            await turns(8)
            assert len(owner._tasks) == MANY
            assert f"tasks={MANY}" in repr(owner)
            event.set()
            await turns(8)
            assert not owner._tasks

    async def test_bursts_follow_each_other(self, Owner):
        ended = 0

        async def child(length):
            nonlocal ended
            await turns(length)
            ended += 1

        async with Owner() as owner:
            for burst in range(20):
                for number in range(burst):
                    owner.create_task(child(number % 5))
                await turns(burst % 4)
        assert ended == sum(range(20))

    async def test_children_of_children_while_the_block_is_being_left(self, Owner):
        ended = 0

        async def child(owner, depth):
            nonlocal ended
            await turns(depth % 3)
            if depth:
                for _ in range(3):
                    owner.create_task(child(owner, depth - 1))
            ended += 1

        async with Owner() as owner:
            owner.create_task(child(owner, 5))
        assert ended == sum(3**depth for depth in range(6))

    async def test_the_host_goes_on_after_the_done_callbacks_of_its_children(self, Owner):
        called = []
        async with Owner() as owner:
            for number in range(MANY):
                task = owner.create_task(turns(number % 4))
                task.add_done_callback(called.append)
        assert len(called) == MANY

    async def test_nothing_of_a_finished_child_is_kept(self, Owner):
        class Result:
            pass

        async def child():
            await turns(1)
            return Result()

        gc.disable()
        try:
            async with Owner() as owner:
                kept = asyncio.Event()
                owner.create_task(kept.wait())
                references = []
                for _ in range(MANY):
                    task = owner.create_task(child())
                    task.add_done_callback(lambda task: references.append(weakref.ref(task.result())))
                    del task
                await turns(8)
                assert len(references) == MANY
                assert [reference() for reference in references] == [None] * MANY
                kept.set()
        finally:
            gc.enable()

    async def test_children_that_nobody_else_refers_to_are_not_collected(self, Owner):
        """Neither before their first step nor while they are looked at."""
        done = []

        async def child():
            for _ in range(3):
                await turns(1)
                gc.collect(0)
            done.append(1)

        async with Owner() as owner:
            for _ in range(MANY):
                owner.create_task(child())
            gc.collect()
        assert len(done) == MANY


class TestFailures:
    async def test_each_is_handled_once_when_its_task_is_done_and_its_callbacks_have_run(self, loop_kind):
        told, called = [], []

        def handler(context):
            assert context["task"].done()
            told.append(context["exception"].args[0])

        async def child(number):
            await turns(number % 5)
            await fail(number)

        async with TaskScope(exception_handler=handler) as scope:
            tasks = [scope.create_task(child(number)) for number in range(MANY)]
            for task in tasks:
                task.add_done_callback(called.append)
        assert sorted(told) == list(range(MANY))
        assert sorted(map(id, called)) == sorted(map(id, tasks))

    async def test_the_loop_gets_each_by_default(self, loop_errors):
        async with TaskScope() as scope:
            tasks = {scope.create_task(fail(number)) for number in range(MANY)}
        contexts = loop_errors.take()
        assert {context["task"] for context in contexts} == tasks and len(contexts) == MANY

    async def test_a_group_collects_those_that_fail_together(self):
        with pytest.raises(TaskGroupError) as caught:
            async with TaskGroup() as group:
                for number in range(MANY):
                    group.create_task(fail(number))
        assert sorted(error.args[0] for error in caught.value.exceptions) == list(range(MANY))
        assert asyncio.current_task().cancelling() == 0

    async def test_a_late_failure_of_a_burst_cancels_siblings_and_body_of_a_group(self):
        cancelled = []

        async def child():
            try:
                await forever()
            except asyncio.CancelledError:
                cancelled.append(1)
                raise

        with pytest.raises(TaskGroupError) as caught:
            async with TaskGroup() as group:
                for _ in range(MANY):
                    group.create_task(child())
                group.create_task(fail())
                await forever()
        assert [type(error) for error in caught.value.exceptions] == [ValueError]
        # Who had not begun yet never does.
        assert len(cancelled) in (0, MANY)

    async def test_what_a_handler_raises_is_reported_for_each_and_stops_nothing(self, loop_errors):
        def handler(context):
            raise LookupError(context["exception"].args[0])

        async with TaskScope(exception_handler=handler) as scope:
            for number in range(MANY):
                scope.create_task(fail(number))
        errors = [context["exception"] for context in loop_errors.take()]
        assert sorted(error.args[0] for error in errors) == list(range(MANY))
        assert {type(error) for error in errors} == {LookupError}

    async def test_a_handler_may_create_tasks(self):
        told = []

        def handler(context):
            told.append(context["exception"].args[0])
            if len(told) <= 3 * MANY:
                scope.create_task(fail(len(told)))

        async with TaskScope(exception_handler=handler) as scope:
            scope.create_task(turns(20))
            for number in range(MANY):
                scope.create_task(fail(number))
        assert len(told) >= 3 * MANY and not scope._tasks

    async def test_a_handler_may_abort_the_scope(self):
        told = []

        def handler(context):
            told.append(context)
            scope.abort()

        async def child(number):
            await turns(1)
            await (forever() if number % 2 else fail())

        async with TaskScope(exception_handler=handler) as scope:
            tasks = [scope.create_task(child(number)) for number in range(MANY)]
        assert all(task.done() for task in tasks)
        assert told and all(task.cancelled() for task in tasks[1::2])

    async def test_the_handler_is_called_in_the_context_of_who_made_the_first_child(self):
        var = contextvars.ContextVar("var")
        seen = set()

        async def child():
            var.set("child")
            await fail()

        var.set("host")
        async with TaskScope(exception_handler=lambda context: seen.add(var.get())) as scope:
            for _ in range(MANY):
                scope.create_task(child())
        assert seen == {"host"}

    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="with eager children it leaves create_task()")
    @pytest.mark.parametrize("base", [KeyboardInterrupt, SystemExit])
    def test_a_base_error_of_a_handler_leaves_the_loop_and_the_rest_is_told_later(self, new_loop, base):
        told = []

        def handler(context):
            told.append(context["exception"].args[0])
            if len(told) == MANY // 2:
                raise base

        async def main():
            async with TaskScope(exception_handler=handler) as scope:
                for number in range(MANY):
                    scope.create_task(fail(number))

        loop = new_loop()
        task = loop.create_task(main())
        with pytest.raises(base):
            loop.run_until_complete(task)
        loop.run_until_complete(task)
        assert sorted(told) == list(range(MANY))

    @pytest.mark.parametrize("base", [KeyboardInterrupt, SystemExit])
    def test_a_base_error_of_a_child_is_raised_when_all_have_ended(self, new_loop, base, loop_kind):
        ended = []

        async def child(number):
            await turns(1)
            if number == MANY - 1:
                raise base("stop")
            ended.append(number)

        async def main():
            async with TaskScope() as scope:
                for number in range(MANY):
                    scope.create_task(child(number))

        loop = new_loop()
        task = loop.create_task(main())
        with pytest.raises(base, match="stop"):
            loop.run_until_complete(task)
        with pytest.raises(base, match="stop"):
            loop.run_until_complete(task)
        assert ended == list(range(MANY - 1))

    async def test_a_task_that_cannot_say_whether_it_is_done_is_asked_again(self, loop_kind, loop_errors):
        """One look fails; it is reported, and the next one is tried."""
        broken = []

        class Task(asyncio.Task):
            def done(self):
                if self not in broken:
                    broken.append(self)
                    raise LookupError("not now")
                return super().done()

        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()
        async with TaskGroup() as group:
            loop.set_task_factory(lambda loop, coro, **kwargs: Task(coro, loop=loop, **kwargs))
            try:
                tasks = [group.create_task(turns(1)) for _ in range(MANY)]
            finally:
                loop.set_task_factory(before)
        assert all(asyncio.Task.done(task) for task in tasks)
        errors = loop_errors.take()
        assert {type(context["exception"]) for context in errors} <= {LookupError}
        if not loop.get_debug():
            assert errors


class TestCancelling:
    async def test_children_that_are_cancelled_before_their_first_step_never_run(self, Owner):
        ran = []

        async def child():
            ran.append(1)

        eager = asyncio.get_running_loop().get_task_factory() is not None
        async with Owner() as owner:
            tasks = [owner.create_task(child()) for _ in range(MANY)]
            for task in tasks:
                task.cancel()
        if not eager:
            assert not ran and all(task.cancelled() for task in tasks)
        assert not owner._tasks

    async def test_ending_the_scope_cancels_all(self, Owner):
        async with Owner() as owner:
            tasks = [owner.create_task(forever()) for _ in range(MANY)]
            owner.cancel()
        assert all(task.cancelled() for task in tasks)
        async with Owner() as owner:
            tasks = [owner.create_task(forever()) for _ in range(MANY)]
            await turns(2)
            owner.cancel()
        assert all(task.cancelled() for task in tasks)

    @pytest.mark.parametrize("after", range(7))
    async def test_a_host_that_is_cancelled_waits_for_all(self, Owner, after):
        ended = []

        async def child(number):
            try:
                await turns(number % 5)
            finally:
                async with TaskScope():
                    await turns(2)
                ended.append(number)

        async def host():
            async with Owner() as owner:
                for number in range(MANY):
                    tasks.append(owner.create_task(child(number)))

        tasks = []
        task = asyncio.create_task(host())
        await turns(after)
        task.cancel()
        await asyncio.wait([task])
        assert all(task.done() for task in tasks)

    async def test_a_context_that_is_closed(self):
        context = TaskContext()
        tasks = [context.create_task(forever()) for _ in range(MANY)]
        await turns(1)
        await context.aclose()
        assert all(task.cancelled() for task in tasks)

    def test_a_loop_that_is_closed_in_the_middle(self, new_loop, loop_errors):
        """What asyncio says of pending tasks is all that is said."""

        async def host():
            async with TaskScope() as scope:
                for _ in range(MANY):
                    scope.create_task(forever())

        loop = new_loop()
        task = loop.create_task(host())
        loop.run_until_complete(turns(2))
        tasks = asyncio.all_tasks(loop)
        for pending in tasks:
            pending.cancel()
        loop.run_until_complete(asyncio.wait(tasks))
        assert task.cancelled()

    async def test_a_closed_scope_closes_the_coroutines_that_it_refuses(self, Owner):
        async with Owner() as owner:
            pass
        for _ in range(MANY):
            coro = forever()
            with pytest.raises(RuntimeError, match="is finished"):
                owner.create_task(coro)
            assert coro.cr_frame is None


class TestCollecting:
    @pytest.mark.parametrize("seed", range(5))
    async def test_gathered_children_may_end_in_any_order(self, seed):
        order = list(range(3 * MANY))
        random.Random(seed).shuffle(order)
        events = [asyncio.Event() for _ in order]

        async def child(number):
            await events[number].wait()
            if number % 3 == 0:
                raise ValueError(number)
            return number

        async def release():
            for position, number in enumerate(order):
                events[number].set()
                if position % 4 == seed % 4:
                    await turns(1 + seed % 3)

        releasing = asyncio.create_task(release())
        results = await gather_safe(map(child, range(len(order))))
        await releasing
        for number, result in enumerate(results):
            if number % 3 == 0:
                assert type(result) is ValueError and result.args == (number,)
            else:
                assert result == number

    @pytest.mark.parametrize("after", range(8))
    async def test_a_gathering_that_is_cancelled_cancels_who_is_left_and_waits(self, after):
        ended = []

        async def child(number):
            try:
                await turns(number % 5)
            finally:
                await turns(1)
                ended.append(number)

        begun = []

        async def caller():
            coros = [child(number) for number in range(MANY)]
            begun.extend(coros)
            return await gather_safe(coros)

        task = asyncio.create_task(caller())
        await turns(after)
        done = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or done or len(ended) == MANY
        assert all(coro.cr_frame is None for coro in begun)

    @pytest.mark.parametrize("reverse", [False, True])
    async def test_children_that_end_one_by_one(self, reverse):
        """From the oldest to the youngest, or the other way round: both are waited for to the end."""
        events = [asyncio.Event() for _ in range(MANY)]

        async def child(number):
            await events[number].wait()
            return number

        async def release():
            for event in reversed(events) if reverse else events:
                event.set()
                await turns(3)

        releasing = asyncio.create_task(release())
        assert await gather_safe(map(child, range(MANY))) == list(range(MANY))
        await releasing

    async def test_ends_come_in_their_order_also_within_a_turn(self):
        """Those of the first step in order of creation, later ones as their events were set."""
        events = [asyncio.Event() for _ in range(MANY)]
        began = [0]
        all_wait = asyncio.Event()

        async def child(number):
            if number % 3:
                began[0] += 1
                if began[0] == sum(1 for n in range(MANY) if n % 3):
                    all_wait.set()
                await events[number].wait()
            return number

        expected = [number for number in range(MANY) if number % 3 == 0]
        late = [number for number in range(MANY) if number % 3]
        random.Random(1).shuffle(late)

        async def release():
            await all_wait.wait()
            for number in late:
                events[number].set()

        releasing = asyncio.create_task(release())
        found = []
        async for task in as_completed_safe(map(child, range(MANY))):
            found.append(await task)
        await releasing
        assert found == expected + late

    async def test_a_race_of_many(self):
        cancelled = []

        async def child(number):
            try:
                await (turns(3) if number == MANY - 2 else forever())
            except asyncio.CancelledError:
                cancelled.append(number)
                raise
            return number

        assert await race(map(child, range(MANY))) == (MANY - 2, [])
        assert sorted(cancelled) == [number for number in range(MANY) if number != MANY - 2]
        assert asyncio.current_task().cancelling() == 0

    async def test_a_race_whose_losers_take_their_time_to_clean_up(self):
        cleaned = []

        async def loser():
            try:
                await forever()
            finally:
                await turns(5)
                cleaned.append(1)

        async def winner():
            await turns(2)
            return "won"

        assert await race([loser() for _ in range(MANY)] + [winner()]) == ("won", [])
        assert len(cleaned) == MANY

    @pytest.mark.parametrize("after", range(8))
    async def test_a_race_whose_caller_is_cancelled(self, after):
        """The request wins over the result until the call is over; nobody goes on."""

        async def child(number):
            try:
                await turns(3 if number == 0 else 50)
            finally:
                await turns(1)

        async def caller():
            coros.extend(map(child, range(MANY)))
            return await race(coros)

        coros = []
        task = asyncio.create_task(caller())
        await turns(after)
        done = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or done
        assert all(coro.cr_frame is None for coro in coros)

    async def test_a_race_collects_failures_until_one_succeeds(self):
        async def child(number):
            await turns(number % 3)
            if number < MANY - 1:
                raise ValueError(number)
            await turns(3)
            return number

        result, errors = await race(map(child, range(MANY)), continue_on_error=True)
        assert result == MANY - 1
        assert sorted(error.args[0] for error in errors) == list(range(MANY - 1))

    async def test_a_race_keeps_no_reference_to_its_failure(self):
        class Error(Exception):
            pass

        async def child():
            await turns(1)
            raise Error

        gc.disable()
        try:
            try:
                await race([child(), forever()])
            except Error as exc:
                reference = weakref.ref(exc)
            if not asyncio.get_running_loop().get_debug():
                assert reference() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("reverse", [False, True])
    async def test_cancelled_tasks_may_end_in_any_order(self, reverse):
        async def child(number):
            try:
                await forever()
            finally:
                await turns(MANY - number if reverse else number)
                if number % 10 == 0:
                    raise ValueError(number)

        tasks = [asyncio.create_task(child(number)) for number in range(MANY)]
        await turns(1)
        with pytest.raises(ExceptionGroup) as caught:
            await cancel_and_wait(tasks)
        assert all(task.done() for task in tasks)
        assert [error.args[0] for error in caught.value.exceptions] == list(range(0, MANY, 10))


class TestScale:
    @pytest.mark.loop_kinds("default", "uvloop", reason="the eager and debug modes add nothing but time")
    async def test_a_scope_that_lives_long_needs_constant_memory(self):
        """However many children it has had: none of a hundred thousand leaves anything behind."""
        batches = 100
        ended = 0

        async def child():
            nonlocal ended
            ended += 1

        async with TaskScope() as scope:
            blocks = 0
            for batch in range(batches):
                for _ in range(1000):
                    scope.create_task(child())
                while scope._tasks:
                    await turns(1)
                if batch == batches // 10:
                    gc.collect()
                    blocks = sys.getallocatedblocks()
            gc.collect()
            assert sys.getallocatedblocks() - blocks < 1000
        assert ended == 1000 * batches

    @pytest.mark.loop_kinds("default", "uvloop", reason="the eager and debug modes add nothing but time")
    async def test_failing_children_leave_nothing_behind_either(self):
        async with TaskScope(exception_handler=None) as scope:
            blocks = 0
            for batch in range(50):
                for _ in range(100):
                    scope.create_task(fail())
                while scope._tasks:
                    await turns(1)
                if batch == 10:
                    gc.collect()
                    blocks = sys.getallocatedblocks()
            gc.collect()
            assert sys.getallocatedblocks() - blocks < 300

    @pytest.mark.loop_kinds("default", "uvloop", reason="the eager and debug modes add nothing but time")
    async def test_a_group_of_thousands_of_failures(self):
        with pytest.raises(TaskGroupError) as caught:
            async with TaskGroup() as group:
                for number in range(5000):
                    group.create_task(fail(number))
        assert len(caught.value.exceptions) == 5000
        matched, rest = caught.value.split(lambda error: isinstance(error, ValueError) and error.args[0] % 2)
        assert len(matched.exceptions) == len(rest.exceptions) == 2500
