"""gather_safe, as_completed_safe, race, map_safe."""

import asyncio
import contextvars
import gc
import itertools

import pytest

from aiotools import ShieldScope, aclosing, as_completed_safe, gather_safe, map_safe, race


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def give(value, count=1):
    await turns(count)
    return value


async def fail(value, count=1):
    await turns(count)
    raise ValueError(value)


async def forever():
    await asyncio.get_running_loop().create_future()


async def witness(log, name):
    try:
        await forever()
    finally:
        await turns(2)
        log.append(name)


async def cancel_self():
    asyncio.current_task().cancel()
    await turns()


async def aiter_of(items):
    for item in items:
        await asyncio.sleep(0)
        yield item


LIMITS = [None, 1, 2, 100]


class TestGather:
    @pytest.mark.parametrize("limit", LIMITS)
    @pytest.mark.parametrize("make", [list, iter, tuple, aiter_of], ids=["list", "iterator", "tuple", "async"])
    async def test_results_come_in_input_order_with_exceptions_in_their_places(self, limit, make):
        coros = [give(1, 5), fail("x", 3), give(3, 1), cancel_self(), give(5, 0)]
        results = await gather_safe(make(coros), limit=limit)
        assert results[0::2] == [1, 3, 5]
        assert isinstance(results[1], ValueError) and isinstance(results[3], asyncio.CancelledError)

    @pytest.mark.parametrize("limit", LIMITS)
    async def test_an_empty_input(self, limit):
        assert await gather_safe([], limit=limit) == []
        assert await gather_safe({}, limit=limit) == {}
        assert await gather_safe(aiter_of([]), limit=limit) == []

    @pytest.mark.parametrize("limit", LIMITS)
    async def test_a_mapping_gives_a_dict_with_the_same_keys(self, limit):
        results = await gather_safe({"a": give(1), "b": fail("x"), 3: give(3)}, limit=limit)
        assert list(results) == ["a", "b", 3] and results["a"] == 1 and results[3] == 3
        assert isinstance(results["b"], ValueError)

    @pytest.mark.parametrize("limit", [None, 3])
    async def test_a_cancelled_caller_cancels_all_and_waits(self, limit):
        log = []
        task = asyncio.create_task(gather_safe([witness(log, 1), witness(log, 2), give(1)], limit=limit))
        await turns(5)
        task.cancel("enough")
        await turns(2)
        task.cancel("again")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(log) == [1, 2] and task.cancelling() == 2

    @pytest.mark.parametrize("limit", [None, 1])
    async def test_under_a_timeout(self, limit):
        log = []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await gather_safe([witness(log, 1)], limit=limit)
        assert log == [1] and asyncio.current_task().cancelling() == 0

    @pytest.mark.parametrize("limit", [None, 1])
    async def test_what_is_no_coroutine_is_a_type_error_and_the_others_are_closed(self, limit):
        never = give(3)
        with pytest.raises(TypeError):
            await gather_safe([give(1), 2, never], limit=limit)
        with pytest.raises(RuntimeError, match="cannot reuse"):
            await never

    @pytest.mark.parametrize("bad", [None, 3])
    async def test_what_is_no_iterable(self, bad):
        for limit in (None, 1):
            with pytest.raises(TypeError, match="iterable"):
                await gather_safe(bad, limit=limit)

    @pytest.mark.parametrize("bad, error", [(0, ValueError), (1.5, TypeError), (True, TypeError)])
    async def test_what_is_no_limit(self, bad, error):
        with pytest.raises(error, match="limit"):
            await gather_safe([], limit=bad)

    @pytest.mark.parametrize("limit", [None, 2])
    async def test_children_get_the_context(self, limit):
        var = contextvars.ContextVar("var", default=0)
        context = contextvars.copy_context()
        context.run(var.set, 5)

        async def child():
            await turns(1)
            return var.get()

        loop = asyncio.get_running_loop()
        if loop.get_task_factory() is None:
            assert await gather_safe([child(), child()], context=context, limit=limit) == [5, 5]

    async def test_so_many_run_at_once(self):
        running = peak = 0

        async def child():
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            await turns(2)
            running -= 1

        await gather_safe((child() for _ in range(20)), limit=4)
        assert peak == 4

    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="an eager child raises where it is created")
    def test_a_base_error_of_a_child_is_raised(self, new_loop):
        loop = new_loop()

        async def child():
            raise KeyboardInterrupt

        task = loop.create_task(gather_safe([child(), give(1)]))
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)

    async def test_in_a_shield_it_completes(self):
        async def work():
            async with ShieldScope():
                results.append(await gather_safe([give(1, 6)]))

        results = []
        task = asyncio.create_task(work())
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert results == [[1]]


class TestAsCompleted:
    @pytest.mark.parametrize("limit", LIMITS)
    @pytest.mark.parametrize("make", [list, aiter_of], ids=["list", "async"])
    async def test_each_task_comes_once(self, limit, make):
        seen = []
        async for task in as_completed_safe(make([give(1, 5), fail("x", 3), give(3, 1)]), limit=limit):
            assert isinstance(task, asyncio.Task) and task.done()
            try:
                seen.append(await task)
            except ValueError as exc:
                seen.append(exc.args[0])
        assert sorted(map(str, seen)) == ["1", "3", "x"]
        if limit is None and make is list:
            assert seen == [3, "x", 1]

    async def test_children_that_fail_at_the_same_time_are_all_delivered(self):
        gate = asyncio.get_running_loop().create_future()

        async def child():
            await gate
            raise ValueError

        errors = 0
        asyncio.get_running_loop().call_later(0.001, gate.set_result, None)
        async for task in as_completed_safe([child() for _ in range(10)]):
            with pytest.raises(ValueError):
                await task
            errors += 1
        assert errors == 10

    @pytest.mark.parametrize("limit", [None, 3])
    async def test_leaving_early_cancels_the_rest_and_waits(self, limit):
        log = []
        async with aclosing(as_completed_safe([witness(log, 1), give(2), witness(log, 3)], limit=limit)) as done:
            async for task in done:
                assert await task == 2
                break
        assert sorted(log) == [1, 3]

    async def test_nothing_starts_before_the_first_iteration(self):
        started = []

        async def child():
            started.append(1)

        done = as_completed_safe([child()])
        await turns()
        assert started == []
        async for task in done:
            await task
        assert started == [1]

    async def test_an_endless_source_is_read_as_far_as_there_is_room(self):
        read = 0

        def source():
            nonlocal read
            for read in itertools.count(1):
                yield give(read, 1)

        count = 0
        async with aclosing(as_completed_safe(source(), limit=5)) as done:
            async for task in done:
                await task
                count += 1
                assert read - count <= 10
                if count == 100:
                    break

    async def test_leaving_an_async_source_early_closes_it(self):
        closed = []

        async def source():
            try:
                while True:
                    yield give(1)
            finally:
                closed.append(True)

        async with aclosing(as_completed_safe(source(), limit=2)) as done:
            async for task in done:
                await task
                break
        assert closed == [True]

    async def test_an_empty_input(self):
        assert [task async for task in as_completed_safe([])] == []

    async def test_a_source_that_fails(self):
        async def source():
            yield give(1)
            raise KeyError("source")

        with pytest.raises(KeyError):
            async for task in as_completed_safe(source()):
                await task


class TestRace:
    async def test_the_first_result_decides(self):
        log = []
        assert await race([witness(log, 1), give(2), witness(log, 3)]) == (2, [])
        assert sorted(log) == [1, 3]

    async def test_the_first_exception_decides(self):
        log = []
        with pytest.raises(ValueError, match="x"):
            await race([witness(log, 1), fail("x")])
        assert log == [1]

    async def test_failures_can_be_collected(self):
        result, errors = await race([fail("a", 1), give(2, 9), fail("b", 5)], continue_on_error=True)
        assert result == 2 and [error.args[0] for error in errors] == ["a", "b"]

    async def test_when_all_fail(self):
        with pytest.raises(ExceptionGroup, match="All coroutines have failed in race") as caught:
            await race([fail("a", 1), fail("b", 5)], continue_on_error=True)
        assert [error.args[0] for error in caught.value.exceptions] == ["a", "b"]

    @pytest.mark.parametrize("continue_on_error", [False, True])
    async def test_an_empty_input(self, continue_on_error):
        with pytest.raises(ValueError):
            await race([], continue_on_error=continue_on_error)

    @pytest.mark.parametrize("limit", [None, 2])
    @pytest.mark.parametrize("continue_on_error", [False, True])
    async def test_a_child_that_cancels_itself_decides(self, continue_on_error, limit):
        async def child():
            asyncio.current_task().cancel("by itself")
            await asyncio.sleep(0)

        with pytest.raises(asyncio.CancelledError, match="by itself"):
            await race([child(), forever()], continue_on_error=continue_on_error, limit=limit)
        assert asyncio.current_task().cancelling() == 0

    async def test_with_a_limit_the_next_one_starts_when_one_has_failed(self):
        started = []

        async def child(number):
            started.append(number)
            await turns(1)
            if number < 3:
                raise ValueError(number)
            return number

        result, errors = await race((child(n) for n in itertools.count()), continue_on_error=True, limit=1)
        assert result == 3 and started == [0, 1, 2, 3] and len(errors) == 3

    async def test_an_async_source(self):
        assert (await race(aiter_of([give(1), forever()])))[0] == 1

    async def test_a_cancelled_caller(self):
        log = []
        task = asyncio.create_task(race([witness(log, 1), witness(log, 2)]))
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(log) == [1, 2]

    async def test_coroutines_that_never_started_are_closed(self):
        with pytest.raises(TypeError):
            await race([give(1), None, give(2)])
        assert (await race([give(1), give(2), give(3)], limit=1))[0] == 1
        gc.collect()


class TestMap:
    @pytest.mark.parametrize("limit", [1, 3, 100])
    @pytest.mark.parametrize("make", [range, lambda n: aiter_of(range(n))], ids=["sync", "async"])
    async def test_in_order(self, limit, make):
        async def double(number):
            await turns(number * 7 % 5)
            return number * 2

        assert [value async for value in map_safe(double, make(20), limit=limit)] == [n * 2 for n in range(20)]

    async def test_in_the_order_of_ending(self):
        async def child(number):
            return await give(number, 10 - number)

        values = [value async for value in map_safe(child, range(5), limit=5, ordered=False)]
        assert sorted(values) == list(range(5)) and values[0] == 4

    async def test_the_first_failure_is_raised_and_the_rest_cancelled(self):
        log = []

        def child(number):
            return fail("x", 4) if number == 2 else witness(log, number)

        with pytest.raises(ValueError, match="x"):
            async for _ in map_safe(child, range(4), limit=4):
                pass
        assert sorted(log) == [0, 1, 3]

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_an_endless_source_in_constant_memory(self, ordered):
        live = peak = 0

        class Item:
            def __init__(self):
                nonlocal live, peak
                live += 1
                peak = max(peak, live)

            def __del__(self):
                nonlocal live
                live -= 1

        async def child(item):
            await turns(1)
            return item

        count = 0
        items = (Item() for _ in itertools.count())
        async with aclosing(map_safe(child, items, limit=10, ordered=ordered)) as values:
            async for _ in values:
                count += 1
                if count == 500:
                    break
        assert peak < 60

    async def test_a_limit_is_needed(self):
        with pytest.raises(TypeError):
            async for _ in map_safe(give, [], limit=None):
                pass
