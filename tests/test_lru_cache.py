import asyncio
import collections
import copy
import functools
import gc
import inspect
import pickle
import sys
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiotools
from aiotools import func, lru_cache


def counting(calls, **options):
    @lru_cache(**options)
    async def double(x, y=0):
        calls.append(x)
        await aiotools.checkpoint()
        return [x, y]

    return double


@lru_cache
async def at_module_level(x):
    """Its documentation."""
    return x


class TestDecoration:
    def test_is_exported(self):
        assert func.lru_cache is aiotools.lru_cache

    def test_works_with_and_without_arguments(self):
        async def f():
            pass

        assert lru_cache(f).cache_parameters() == {"maxsize": 128, "typed": False, "tasks": 0, "closed": False}
        assert lru_cache()(f).cache_parameters()["maxsize"] == 128
        assert lru_cache(32, expire_after=5)(f).cache_parameters()["maxsize"] == 32
        assert lru_cache(None, True)(f).cache_parameters() == {
            "maxsize": None,
            "typed": True,
            "tasks": 0,
            "closed": False,
        }

    def test_refuses_what_is_no_coroutine_function(self):
        for wrong in (len, lambda: None, functools.partial(len)):
            with pytest.raises(RuntimeError, match="coroutine function"):
                lru_cache(wrong)
            with pytest.raises(RuntimeError, match="coroutine function"):
                lru_cache()(wrong)

    @pytest.mark.parametrize("wrong", ["x", 1.5, object()])
    def test_refuses_what_is_neither_size_nor_function(self, wrong):
        with pytest.raises(NotImplementedError):
            lru_cache(wrong)

    @pytest.mark.parametrize(("wrong", "error"), [("1", TypeError), (-1, ValueError), (float("nan"), ValueError)])
    def test_refuses_a_wrong_expire_after_where_it_is_written(self, wrong, error):
        with pytest.raises(error, match="expire_after"):
            lru_cache(expire_after=wrong)

    def test_keeps_the_attributes_of_the_function(self):
        async def f(a, *, b: int = 1):
            """Says what."""

        f.mark = 1
        cached = lru_cache(f)
        assert not inspect.isfunction(cached)
        assert cached.__name__ == "f"
        assert cached.__qualname__ == f.__qualname__
        assert cached.__doc__ == "Says what."
        assert cached.__module__ == __name__
        assert cached.__wrapped__ is f
        assert cached.mark == 1
        assert cached.__dict__["mark"] == 1
        assert inspect.signature(cached) == inspect.signature(f)
        assert "lru_cache" in repr(cached)

    def test_counts_as_a_coroutine_function(self):
        if sys.version_info < (3, 14):
            assert asyncio.iscoroutinefunction(at_module_level)
        if hasattr(inspect, "markcoroutinefunction"):
            assert inspect.iscoroutinefunction(at_module_level)

    def test_pickles_and_copies_as_itself(self):
        assert pickle.loads(pickle.dumps(at_module_level)) is at_module_level
        assert copy.copy(at_module_level) is at_module_level
        assert copy.deepcopy(at_module_level) is at_module_level

    async def test_takes_partial_objects(self):
        async def add(a, b):
            return a + b

        cached = lru_cache(functools.partial(add, 1))
        assert await cached(2) == 3
        assert await cached(2) == 3
        assert cached.cache_info() == (1, 1, 128, 1)

    def test_is_collected_with_what_it_refers_to(self, run):
        async def f():
            return f

        cached = lru_cache(f)
        run(cached())
        ref = weakref.ref(cached)
        f.cached = cached
        f = cached = None
        gc.collect()
        assert ref() is None


class TestCalls:
    async def test_a_hit_completes_without_suspending_and_without_a_task(self):
        f = counting([])
        value = await f(1)
        call = f(1)
        with pytest.raises(StopIteration) as stop:
            call.send(None)
        assert stop.value.value is value
        assert f.cache_parameters()["tasks"] == 0

    @pytest.mark.parametrize("value", [None, False, (1, 2), ValueError("as a value")])
    async def test_gives_back_any_value(self, value):
        @lru_cache
        async def f():
            return value

        for _ in range(3):
            assert await f() is value

    def test_a_call_can_be_run_and_made_before_there_is_a_loop(self, run):
        assert run(at_module_level(3)) == 3
        at_module_level.cache_clear()

    async def test_hits_and_misses_can_be_tasks(self):
        f = counting([])
        assert await asyncio.create_task(f(1)) == [1, 0]
        assert await asyncio.create_task(f(1)) == [1, 0]
        assert await asyncio.wait_for(f(1), 5) == [1, 0]

    async def test_a_call_starts_when_it_is_awaited(self):
        calls = []
        f = counting(calls)
        call = f(1)
        assert calls == []
        assert f.cache_info() == (0, 0, 128, 0)
        call.close()

    async def test_keys_are_those_of_functools(self):
        calls = [((1,), {}), ((1.0,), {}), (("1",), {}), ((1, 2), {}), (((1, 2),), {}), ((), {"a": 1}), (("a", 1), {}),
                 ((), {"a": 1, "b": 2}), ((), {"b": 2, "a": 1}), ((), {}), ((True,), {}), ((1, 2.0), {})]  # fmt: skip
        for typed in (False, True):

            @functools.lru_cache(typed=typed)
            def theirs(*args, **kwargs):
                pass

            @lru_cache(typed=typed)
            async def ours(*args, **kwargs):
                pass

            for args, kwargs in calls * 2:
                theirs(*args, **kwargs)
                await ours(*args, **kwargs)
                assert tuple(ours.cache_info()) == tuple(theirs.cache_info())
            ours.cache_clear()

    async def test_unhashable_arguments_are_a_type_error(self):
        f = counting([])
        for _ in range(2):
            with pytest.raises(TypeError, match="unhashable"):
                await f([])
            await f(1)
        with pytest.raises(TypeError, match="unhashable"):
            f.cache_contains([])

    async def test_wrong_arguments_are_the_functions_own_error(self):
        f = counting([])
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            await f(1, z=2)
        assert f.cache_info().currsize == 0

    async def test_the_least_recently_used_result_goes(self):
        calls = []
        f = counting(calls, maxsize=2)
        for x in (1, 2, 1, 3, 1, 2):
            await f(x)
        assert calls == [1, 2, 3, 2]
        assert f.cache_info() == (2, 4, 2, 2)

    async def test_nothing_stays_with_a_size_of_zero(self):
        for size in (0, -5):
            calls = []
            f = counting(calls, maxsize=size)
            for _ in range(2):
                assert await f(1) == [1, 0]
            assert calls == [1, 1]
            assert f.cache_info() == (0, 2, 0, 0)

    async def test_all_stays_without_a_size(self):
        f = counting([], maxsize=None)
        for x in range(300):
            await f(x)
        assert f.cache_info() == (0, 300, None, 300)

    async def test_failures_are_not_kept(self):
        calls = []

        @lru_cache
        async def f():
            calls.append(1)
            raise ValueError(len(calls))

        for n in (1, 2):
            with pytest.raises(ValueError, match=str(n)):
                await f()
        assert f.cache_info() == (0, 2, 128, 0)


class TestResultsOfHits:
    """Up to 3.14 the interpreter takes a result from a StopIteration, and one is used again and again."""

    class Value:
        pass

    async def cached(self):
        values = [self.Value(), self.Value()]

        @lru_cache
        async def f(n):
            return values[n]

        for n in range(2):
            await f(n)
        return f, values

    async def test_nothing_keeps_a_result_once_it_was_delivered(self):
        f, values = await self.cached()
        ref = weakref.ref(await f(0))
        f.cache_clear()
        assert ref() is not None
        values.clear()
        assert ref() is None

    async def test_nothing_keeps_a_result_that_was_taken_by_hand(self):
        f, values = await self.cached()
        call = f(0)
        try:
            next(call.__await__())
        except StopIteration as stop:
            ref = weakref.ref(stop.value)
        f.cache_clear()
        values.clear()
        del call
        assert ref() is None

    async def test_who_catches_the_exception_keeps_its_value(self):
        f, values = await self.cached()
        caught = []
        for n in (0, 1, 0):
            try:
                f(n).__await__().__next__()
            except StopIteration as stop:
                caught.append(stop)
            assert await f(1 - n) is values[1 - n]
        assert [stop.value for stop in caught] == [values[0], values[1], values[0]]
        assert len(set(map(id, caught))) == 3

    async def test_a_finalizer_may_take_another_result_meanwhile(self):
        f, values = await self.cached()
        taken = []

        class Last:
            def __del__(self):
                try:
                    f(1).__await__().__next__()
                except StopIteration as stop:
                    taken.append(stop.value)

        @lru_cache
        async def g():
            return Last()

        await g()
        call = g()
        await call
        g.cache_clear()
        # The value of the call before may be dropped by now, or is dropped here.
        assert await f(0) is values[0]
        del call
        assert await f(0) is values[0]
        assert taken == [values[1]]


class TestSingleFlight:
    async def test_concurrent_calls_share_one_task(self):
        calls = []
        f = counting(calls)
        results = await asyncio.gather(*(f(1) for _ in range(5)))
        assert calls == [1]
        assert all(result is results[0] for result in results)
        assert f.cache_info() == (4, 1, 128, 1)

    async def test_a_failure_reaches_all(self):
        @lru_cache
        async def f():
            await aiotools.checkpoint()
            raise ValueError

        first, second = await asyncio.gather(f(), f(), return_exceptions=True)
        assert isinstance(first, ValueError)
        assert first is second
        assert f.cache_info().currsize == 0

    async def test_one_cancelled_caller_does_not_hurt_the_others(self):
        release = asyncio.Event()

        @lru_cache
        async def f():
            await release.wait()
            return 1

        tasks = [asyncio.create_task(f()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.wait(tasks[:2])
        assert all(task.cancelled() for task in tasks[:2])
        assert f.cache_parameters()["tasks"] == 1
        release.set()
        assert await tasks[2] == 1
        assert f.cache_info() == (2, 1, 128, 1)

    async def test_the_last_cancelled_caller_cancels_the_task(self):
        ended = []

        @lru_cache
        async def f():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(1)
                raise

        tasks = [asyncio.create_task(f()) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert not f.cache_contains()
        await f.cache_close(wait=True)
        assert ended == [1]
        assert f.cache_parameters()["tasks"] == 0

    async def test_a_new_call_does_not_join_a_flight_that_was_cancelled(self):
        calls = []

        @lru_cache
        async def f():
            calls.append(1)
            if len(calls) == 1:
                await asyncio.Event().wait()
            return len(calls)

        task = asyncio.create_task(f())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert await f() == 2

    async def test_an_evicted_flight_still_serves_its_callers(self):
        release = asyncio.Event()

        @lru_cache(1)
        async def f(x):
            await release.wait()
            return x

        tasks = [asyncio.create_task(f(x)) for x in (1, 2, 1)]
        await asyncio.sleep(0)
        release.set()
        assert await asyncio.gather(*tasks) == [1, 2, 1]
        assert f.cache_info() == (0, 3, 1, 1)

    async def test_a_function_that_cancels_itself_cancels_its_callers(self):
        @lru_cache
        async def f():
            await aiotools.checkpoint()
            raise asyncio.CancelledError

        tasks = [asyncio.create_task(f()) for _ in range(2)]
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        assert f.cache_info().currsize == 0


class TestExpiry:
    @pytest.mark.loop_kinds("default", "debug", reason="one way of driving the clock is enough")
    async def test_counts_from_completion_and_is_exact(self):
        calls = []

        @lru_cache(expire_after=5)
        async def f():
            calls.append(1)
            await asyncio.sleep(3)
            return len(calls)

        with aiotools.VirtualClock().patch_loop():
            assert await f() == 1
            await asyncio.sleep(4.5)
            assert await f() == 1
            assert f.cache_contains()
            assert f.cache_info().currsize == 1
            await asyncio.sleep(0.5)
            assert f.cache_info().currsize == 0
            assert not f.cache_contains()
            assert not f.cache_invalidate()
            assert await f() == 2
        f.cache_clear()

    async def test_zero_expires_at_once_and_infinity_never(self):
        calls = []
        f = counting(calls, expire_after=0)
        await f(1)
        await f(1)
        assert calls == [1, 1]
        f = counting(calls, expire_after=float("inf"))
        await f(2)
        await f(2)
        assert calls == [1, 1, 2]


class TestMethods:
    async def test_invalidate_and_contains(self):
        f = counting([])
        await f(1, y=2)
        assert f.cache_contains(1, y=2)
        assert not f.cache_contains(1)
        assert f.cache_invalidate(1, y=2) is True
        assert f.cache_invalidate(1, y=2) is False
        assert f.cache_info() == (0, 1, 128, 0)

    async def test_clear_resets_the_counters(self):
        f = counting([])
        await f(1)
        await f(1)
        f.cache_clear()
        assert f.cache_info() == (0, 0, 128, 0)

    async def test_close_cancels_what_runs_and_refuses_calls(self):
        @lru_cache
        async def f(x):
            await asyncio.Event().wait()

        task = asyncio.create_task(f(1))
        await asyncio.sleep(0)
        await f.cache_close()
        await asyncio.wait([task])
        assert task.cancelled()
        assert f.cache_parameters()["closed"] is True
        with pytest.raises(RuntimeError, match="closed"):
            await f(1)

    async def test_close_can_wait_for_what_runs(self):
        f = counting([])
        task = asyncio.create_task(f(1))
        await asyncio.sleep(0)
        await f.cache_close(wait=True)
        assert await task == [1, 0]
        await f.cache_close()

    async def test_cached_methods_share_one_cache_with_the_instance_in_the_key(self):
        class Thing:
            @lru_cache
            async def method(self, x):
                """Of a thing."""
                return self, x

            async def _any(self, x):
                return self, x

            partial = lru_cache(functools.partialmethod(_any, 7))

        one, two = Thing(), Thing()
        assert await one.method(1) == (one, 1)
        assert await two.method(1) == (two, 1)
        assert await one.method(1) == (one, 1)
        bound = one.method
        assert await bound(1) == (one, 1)
        assert bound == one.method
        assert bound.__name__ == "method"
        assert bound.__doc__ == "Of a thing."
        assert (asyncio if sys.version_info < (3, 12) else inspect).iscoroutinefunction(bound)
        assert bound.cache_info() == Thing.method.cache_info() == (2, 2, 128, 2)
        assert bound.cache_contains(1)
        assert bound.cache_invalidate(1)
        assert not Thing.method.cache_contains(one, 1)
        assert two.method.cache_contains(1)
        assert bound.cache_parameters()["maxsize"] == 128
        assert await one.partial() == (one, 7)
        assert await one.partial() == (one, 7)
        assert one.partial.cache_info().hits == 1
        bound.cache_clear()
        await bound.cache_close()

    def test_another_loop_clears_it_and_is_warned_about_once(self, run):
        calls = []
        f = counting(calls)
        run(f(1))
        with pytest.warns(RuntimeWarning, match="another event loop"):
            run(f(1))
        assert calls == [1, 1]
        run(f(1))
        assert f.cache_info() == (0, 1, 128, 1)


@given(
    st.one_of(st.none(), st.integers(0, 4)),
    st.lists(st.tuples(st.sampled_from(["call", "invalidate", "contains", "clear"]), st.integers(0, 5))),
)
def test_behaves_like_an_ordered_dict(run, maxsize, steps):
    model = collections.OrderedDict()
    hits = misses = 0

    async def main():
        nonlocal hits, misses
        f = counting([], maxsize=maxsize)
        for action, x in steps:
            if action == "call":
                if x in model:
                    hits += 1
                    model.move_to_end(x)
                else:
                    misses += 1
                    model[x] = None
                    while maxsize is not None and len(model) > maxsize:
                        model.popitem(last=False)
                assert await f(x) == [x, 0]
            elif action == "invalidate":
                assert f.cache_invalidate(x) is (x in model)
                model.pop(x, None)
            elif action == "contains":
                assert f.cache_contains(x) is (x in model)
            else:
                f.cache_clear()
                model.clear()
                hits = misses = 0
            assert f.cache_info() == (hits, misses, maxsize, len(model))

    run(main())
