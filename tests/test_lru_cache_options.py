"""What lru_cache does beyond its twin in functools: times, keys, weights, several loops."""

import asyncio
import functools
import gc
import inspect
import random
import sys
import threading
import traceback

import pytest

import aiotools
from aiotools import lru_cache
from conftest import make_loop

one_clock = pytest.mark.loop_kinds("default", "debug", reason="one way of driving the clock is enough")


class Source:
    """A cached function that can be held up and made to fail: each run returns (argument, number of the run)."""

    def __init__(self, *args, **options):
        self.runs = []
        self.error = None
        self.gate = None
        self.cancelled = 0

        @lru_cache(*args, **options)
        async def get(x=0):
            self.runs.append(x)
            number = len(self.runs)
            try:
                if self.gate is not None:
                    await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            if self.error is not None:
                raise self.error
            return x, number

        self.get = get

    def hold(self):
        self.gate = asyncio.Event()

    def release(self):
        self.gate.set()


async def turns(n=5):
    for _ in range(n):
        await asyncio.sleep(0)


class TestArguments:
    @pytest.mark.parametrize("name", ["jitter", "stale_while_refresh", "cache_errors_for"])
    @pytest.mark.parametrize(("wrong", "error"), [("1", TypeError), (-1, ValueError), (float("nan"), ValueError)])
    def test_wrong_seconds_are_named_where_they_are_written(self, name, wrong, error):
        with pytest.raises(error, match=name):
            lru_cache(expire_after=5, **{name: wrong})

    @pytest.mark.parametrize("name", ["jitter", "stale_while_refresh"])
    def test_what_follows_expiry_needs_one(self, name):
        with pytest.raises(ValueError, match=f"{name} needs expire_after"):
            lru_cache(**{name: 1})
        with pytest.raises(ValueError, match=f"{name} needs expire_after"):
            lru_cache(expire_after=float("inf"), **{name: 1})
        lru_cache(**{name: 0})
        lru_cache(**{name: None})

    def test_an_infinite_jitter_is_none(self):
        with pytest.raises(ValueError, match="jitter"):
            lru_cache(expire_after=1, jitter=float("inf"))

    def test_weight_and_max_weight_need_each_other(self):
        with pytest.raises(ValueError, match="weight needs max_weight"):
            lru_cache(weight=len)
        with pytest.raises(ValueError, match="max_weight needs weight"):
            lru_cache(max_weight=5)

    @pytest.mark.parametrize(
        ("wrong", "error"), [("5", TypeError), (1.5, TypeError), (-1, ValueError), (2**80, OverflowError)]
    )
    def test_a_wrong_max_weight_is_named(self, wrong, error):
        with pytest.raises(error, match="max_weight"):
            lru_cache(weight=len, max_weight=wrong)

    @pytest.mark.parametrize("name", ["key", "weight"])
    def test_functions_must_be_ordinary_functions(self, name):
        more = {"max_weight": 1} if name == "weight" else {}
        with pytest.raises(TypeError, match=f"{name} must be callable, not 'int'"):
            lru_cache(**{name: 5}, **more)

        async def wrong(*args):
            pass

        with pytest.raises(TypeError, match=f"{name} must be an ordinary function"):
            lru_cache(**{name: wrong}, **more)

    def test_typed_and_key_exclude_each_other(self):
        with pytest.raises(ValueError, match=r"typed .* key"):
            lru_cache(typed=True, key=len)

    def test_options_are_keyword_only_and_go_without_parentheses_too(self):
        with pytest.raises(TypeError):
            lru_cache(128, False, 5)

        async def f(x):
            return x

        assert lru_cache(f, expire_after=5, jitter=1).cache_parameters()["jitter"] == 1.0

    def test_parameters_tell_of_the_options_that_were_given(self):
        async def f(x):
            return x

        assert lru_cache(
            expire_after=5,
            jitter=1,
            stale_while_refresh=2,
            cache_errors_for=3,
            weight=len,
            max_weight=4,
            shared=True,
        )(f).cache_parameters() == {
            "maxsize": 128,
            "typed": False,
            "tasks": 0,
            "closed": False,
            "jitter": 1.0,
            "stale_while_refresh": 2.0,
            "cache_errors_for": 3.0,
            "shared": True,
            "max_weight": 4,
            "weight": 0,
        }

    def test_the_class_has_the_same_arguments(self):
        ours = inspect.signature(aiotools._aiotools.LruCache).parameters
        theirs = inspect.signature(lru_cache).parameters
        assert [name for name in ours if name != "func"] == list(theirs)


class TestJitter:
    @one_clock
    async def test_each_result_is_valid_for_a_random_part_longer(self):
        s = Source(None, expire_after=10, jitter=10)
        n = 200
        with aiotools.VirtualClock().patch_loop():
            for x in range(n):
                await s.get(x)
            await asyncio.sleep(9.999)
            assert s.get.cache_info().currsize == n
            await asyncio.sleep(5)
            left = s.get.cache_info().currsize
            assert 0 < left < n
            assert [x for x in range(n) if s.get.cache_contains(x)] != list(range(left))
            await asyncio.sleep(5.002)
            assert s.get.cache_info().currsize == 0
        s.get.cache_clear()

    @one_clock
    async def test_is_that_of_the_random_module(self):
        state = random.getstate()
        s = Source(expire_after=10, jitter=4)
        with aiotools.VirtualClock().patch_loop():
            try:
                random.seed(7)
                part = random.random()
                random.seed(7)
                await s.get()
            finally:
                random.setstate(state)
            await asyncio.sleep(10 + 4 * part - 0.001)
            assert s.get.cache_contains()
            await asyncio.sleep(0.002)
            assert not s.get.cache_contains()


class TestStaleWhileRefresh:
    @one_clock
    async def test_what_is_stale_is_given_out_while_a_task_makes_a_new_one(self):
        s = Source(expire_after=10, stale_while_refresh=5)
        with aiotools.VirtualClock().patch_loop():
            assert await s.get() == (0, 1)
            await asyncio.sleep(10)
            s.hold()
            call = s.get()
            with pytest.raises(StopIteration) as stop:
                call.send(None)
            assert stop.value.value == (0, 1)
            # One at a time.
            assert await s.get() == (0, 1)
            await turns()
            assert s.runs == [0, 0]
            assert s.get.cache_parameters()["tasks"] == 1
            s.release()
            await turns()
            assert await s.get() == (0, 2)
            assert s.get.cache_info() == (3, 1, 128, 1)
            # The new one has a time of its own.
            await asyncio.sleep(9.9)
            assert await s.get() == (0, 2)
            assert s.runs == [0, 0]
        assert s.get.cache_parameters()["tasks"] == 0

    @one_clock
    async def test_what_is_too_stale_is_not_given_out(self):
        s = Source(expire_after=10, stale_while_refresh=5)
        with aiotools.VirtualClock().patch_loop():
            await s.get()
            await asyncio.sleep(14.999)
            assert s.get.cache_contains()
            assert s.get.cache_info().currsize == 1
            await asyncio.sleep(0.001)
            assert not s.get.cache_contains()
            assert s.get.cache_info().currsize == 0
            assert await s.get() == (0, 2)

    @one_clock
    async def test_a_call_waits_for_the_refresh_that_is_under_way_when_the_old_result_is_over(self):
        s = Source(expire_after=10, stale_while_refresh=5)
        with aiotools.VirtualClock().patch_loop():
            await s.get()
            await asyncio.sleep(12)
            s.hold()
            assert await s.get() == (0, 1)
            await asyncio.sleep(5)
            waiting = asyncio.create_task(s.get())
            await turns()
            assert not waiting.done()
            s.release()
            assert await waiting == (0, 2)
            assert s.runs == [0, 0]
            assert s.get.cache_info() == (2, 1, 128, 1)

    @one_clock
    async def test_a_caller_that_leaves_does_not_cancel_a_refresh(self):
        s = Source(expire_after=10, stale_while_refresh=5)
        with aiotools.VirtualClock().patch_loop():
            await s.get()
            await asyncio.sleep(12)
            s.hold()
            await s.get()
            await asyncio.sleep(5)
            waiting = asyncio.create_task(s.get())
            await turns()
            waiting.cancel()
            await asyncio.wait([waiting])
            s.release()
            await turns()
            assert s.cancelled == 0
            assert await s.get() == (0, 2)

    @one_clock
    async def test_an_error_goes_to_the_handler_and_the_old_result_stays(self, loop_errors):
        s = Source(expire_after=10, stale_while_refresh=5)
        with aiotools.VirtualClock().patch_loop():
            await s.get()
            await asyncio.sleep(10)
            s.error = ValueError("down")
            assert await s.get() == (0, 1)
            await turns()
            context = loop_errors.take_one(ValueError, match="refreshing")
            assert isinstance(context["task"], asyncio.Task)
            # The next call tries again.
            assert await s.get() == (0, 1)
            await turns()
            loop_errors.take_one(ValueError)
            s.error = None
            assert await s.get() == (0, 1)
            await turns()
            assert await s.get() == (0, 4)

    @one_clock
    async def test_an_error_that_a_caller_gets_is_not_reported(self):
        s = Source(expire_after=10, stale_while_refresh=5)
        with aiotools.VirtualClock().patch_loop():
            await s.get()
            await asyncio.sleep(12)
            s.hold()
            s.error = ValueError("down")
            await s.get()
            await asyncio.sleep(5)
            waiting = asyncio.create_task(s.get())
            await turns()
            s.release()
            with pytest.raises(ValueError, match="down"):
                await waiting
            assert s.get.cache_info().currsize == 0

    @one_clock
    async def test_an_error_before_there_is_a_task_is_reported_too(self, loop_errors):
        @lru_cache(expire_after=10, stale_while_refresh=5)
        async def get():
            return 1

        def no_tasks(loop, coro, **kwargs):
            coro.close()
            raise OSError("no tasks")

        with aiotools.VirtualClock().patch_loop():
            await get()
            await asyncio.sleep(10)
            loop = asyncio.get_running_loop()
            loop.set_task_factory(no_tasks)
            assert await get() == 1
            loop.set_task_factory(None)
            loop_errors.take_one(OSError)
            assert get.cache_parameters()["tasks"] == 0

    @one_clock
    async def test_errors_that_are_kept_delay_the_next_refresh(self, loop_errors):
        s = Source(expire_after=10, stale_while_refresh=100, cache_errors_for=3)
        with aiotools.VirtualClock().patch_loop():
            await s.get()
            await asyncio.sleep(10)
            s.error = ValueError("down")
            for _ in range(4):
                assert await s.get() == (0, 1)
                await turns()
            loop_errors.take_one(ValueError)
            assert s.runs == [0, 0]
            await asyncio.sleep(3)
            s.error = None
            assert await s.get() == (0, 1)
            await turns()
            assert await s.get() == (0, 3)

    @one_clock
    @pytest.mark.parametrize("way", ["invalidate", "clear", "close", "evict", "where"])
    async def test_a_refresh_that_nobody_wants_any_more_is_cancelled(self, way):
        s = Source(1, expire_after=10, stale_while_refresh=5)
        with aiotools.VirtualClock().patch_loop():
            await s.get()
            await asyncio.sleep(10)
            s.hold()
            await s.get()
            await turns()
            if way == "invalidate":
                assert s.get.cache_invalidate()
            elif way == "clear":
                s.get.cache_clear()
            elif way == "where":
                assert s.get.cache_invalidate_where(lambda: True) == 1
            elif way == "evict":
                other = asyncio.create_task(s.get(1))
                await turns()
                other.cancel()
                await asyncio.wait([other])
            else:
                await s.get.cache_close()
            await turns()
            assert s.cancelled >= 1
            assert s.get.cache_parameters()["tasks"] == 0

    @one_clock
    async def test_close_can_wait_for_a_refresh(self):
        s = Source(expire_after=10, stale_while_refresh=5)
        with aiotools.VirtualClock().patch_loop():
            await s.get()
            await asyncio.sleep(10)
            s.hold()
            await s.get()
            closing = asyncio.create_task(s.get.cache_close(wait=True))
            await turns()
            assert not closing.done()
            s.release()
            await closing
            assert s.cancelled == 0

    def stale(self, new_loop, s):
        """A loop whose refresh of s.get() is under way."""
        loop = new_loop()

        async def main():
            with aiotools.VirtualClock().patch_loop():
                await s.get()
                await asyncio.sleep(10)
                s.hold()
                await s.get()
                await turns()

        loop.run_until_complete(main())
        assert s.get.cache_parameters()["tasks"] == 1
        return loop

    @one_clock
    def test_is_cancelled_with_its_loop_as_any_task(self, run):
        s = Source(expire_after=10, stale_while_refresh=float("inf"))

        async def main():
            with aiotools.VirtualClock().patch_loop():
                await s.get()
                await asyncio.sleep(10)
                s.hold()
                await s.get()
                await turns()
                # As asyncio.run() does at its end.
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                await turns()
                assert s.get.cache_parameters()["tasks"] == 0
                s.gate = None
                # The old result is there still, and the next call tries again.
                assert await s.get() == (0, 1)
                await turns()
                assert await s.get() == (0, 3)

        run(main())
        assert s.cancelled == 1

    @one_clock
    @pytest.mark.parametrize("shared", [False, True])
    def test_a_loop_that_is_closed_under_it_does_not_block_others(self, new_loop, run, loop_errors, shared):
        s = Source(expire_after=10, stale_while_refresh=float("inf"), shared=shared)
        loop = self.stale(new_loop, s)
        [task] = asyncio.all_tasks(loop)
        loop.close()
        s.gate = None

        async def main():
            with aiotools.VirtualClock().patch_loop():
                # On this loop's own clock.
                await asyncio.sleep(20)
                if shared:
                    assert await s.get() == (0, 1)
                    await turns()
                else:
                    with pytest.warns(RuntimeWarning, match="another event loop"):
                        await s.get()
                assert await s.get() == (0, 3)
                await s.get.cache_close(wait=True)

        run(main())
        # What became of the task is for asyncio to say.
        task._log_destroy_pending = False
        del task
        gc.collect()


class TestErrors:
    @one_clock
    async def test_are_kept_for_a_time_and_raised_again(self):
        s = Source(cache_errors_for=5)
        s.error = ValueError("no")
        with aiotools.VirtualClock().patch_loop():
            lengths = set()
            for _ in range(3):
                with pytest.raises(ValueError, match="no") as info:
                    await s.get()
                assert info.value is s.error
                lengths.add(len(traceback.extract_tb(info.tb)))
            assert len(lengths) == 1
            assert s.runs == [0]
            assert s.get.cache_info() == (2, 1, 128, 1)
            assert s.get.cache_contains()
            await asyncio.sleep(5)
            assert not s.get.cache_contains()
            assert s.get.cache_info().currsize == 0
            s.error = None
            assert await s.get() == (0, 2)
            # Results have a time of their own.
            await asyncio.sleep(1000)
            assert await s.get() == (0, 2)

    async def test_can_be_invalidated(self):
        s = Source(cache_errors_for=60)
        s.error = ValueError("no")
        with pytest.raises(ValueError):
            await s.get()
        assert s.get.cache_invalidate()
        s.error = None
        assert await s.get() == (0, 2)

    async def test_reach_all_who_wait_and_those_who_come_later(self):
        s = Source(cache_errors_for=60)
        s.error = ValueError("no")
        s.hold()
        tasks = [asyncio.create_task(s.get()) for _ in range(3)]
        await turns()
        s.release()
        results = await asyncio.gather(*tasks, s.get(), return_exceptions=True)
        assert all(result is s.error for result in results)
        assert s.runs == [0]

    async def test_cancellations_are_not_kept(self):
        s = Source(cache_errors_for=60)
        s.error = asyncio.CancelledError()
        task = asyncio.create_task(s.get())
        await asyncio.wait([task])
        assert task.cancelled()
        assert not s.get.cache_contains()

    async def test_base_exceptions_are_not_kept(self):
        class Base(BaseException):
            pass

        s = Source(cache_errors_for=60)
        s.error = Base()
        with pytest.raises(Base):
            await s.get()
        assert not s.get.cache_contains()

    async def test_a_shared_cache_raises_copies(self):
        s = Source(cache_errors_for=60, shared=True)
        s.error = ValueError("no", 1)
        s.error.__cause__ = cause = OSError()
        with pytest.raises(ValueError):
            await s.get()
        with pytest.raises(ValueError) as info:
            await s.get()
        assert info.value is not s.error
        assert info.value.args == ("no", 1)
        assert info.value.__cause__ is cause
        assert traceback.extract_tb(info.tb)[-1].name == "get"

    async def test_the_copies_show_what_was_being_handled_when_it_was_raised(self):
        s = Source(cache_errors_for=60, shared=True)
        s.error = ValueError()
        s.error.__context__ = context = KeyError()
        with pytest.raises(ValueError):
            await s.get()
        with pytest.raises(ValueError) as info:
            await s.get()
        assert info.value is not s.error
        assert info.value.__context__ is context and info.value.__cause__ is None
        assert info.value.__suppress_context__ is False

    async def test_what_cannot_be_copied_is_raised_as_it_is(self):
        class Odd(Exception):
            def __init__(self, a, b):
                super().__init__()

        s = Source(cache_errors_for=60, shared=True)
        s.error = Odd(1, 2)
        for _ in range(2):
            with pytest.raises(Odd) as info:
                await s.get()
            assert info.value is s.error
        assert s.runs == [0]


class TestLostErrors:
    async def test_a_failure_whose_callers_were_all_cancelled_is_reported(self, loop_errors):
        @lru_cache
        async def stubborn():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("in clean-up") from None

        task = asyncio.create_task(stubborn())
        await turns()
        task.cancel()
        await asyncio.wait([task])
        await turns()
        assert task.cancelled()
        context = loop_errors.take_one(ValueError, match="after all its callers had left")
        assert isinstance(context["task"], asyncio.Task)
        assert stubborn.cache_info() == (0, 1, 128, 0)

    async def test_a_result_that_comes_after_all_left_is_not_kept(self):
        @lru_cache
        async def stubborn():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return 1

        task = asyncio.create_task(stubborn())
        await turns()
        task.cancel()
        await asyncio.wait([task])
        await turns()
        assert stubborn.cache_info() == (0, 1, 128, 0)
        assert stubborn.cache_parameters()["tasks"] == 0


class TestStatistics:
    async def test_each_call_counts_once_whatever_becomes_of_it(self):
        s = Source()
        s.hold()
        calls = 0
        for n in range(1, 6):
            tasks = [asyncio.create_task(s.get(n % 2)) for _ in range(n)]
            calls += n
            await turns()
            for task in tasks[: n - n // 2]:
                task.cancel()
            await turns()
            for task in tasks[n - n // 2 :]:
                task.cancel()
            await asyncio.wait(tasks)
            info = s.get.cache_info()
            assert info.hits + info.misses == calls
            assert info.misses == len(s.runs)
            assert info.currsize == 0
        await turns()
        assert s.cancelled == len(s.runs)
        assert s.get.cache_parameters()["tasks"] == 0

    async def test_a_call_that_was_never_awaited_does_not_count(self):
        s = Source()
        s.get().close()
        assert s.get.cache_info() == (0, 0, 128, 0)


class TestKey:
    async def test_is_what_the_function_makes_of_the_arguments(self):
        calls = []

        @lru_cache(key=lambda session, url, **kw: url.lower())
        async def fetch(session, url, *, retries=0):
            calls.append(url)
            return session, url

        assert await fetch([1], "A", retries=1) == ([1], "A")
        assert await fetch([2], "a") == ([1], "A")
        assert calls == ["A"]
        assert fetch.cache_contains([3], "a")
        assert fetch.cache_invalidate([3], "a")
        assert not fetch.cache_contains([3], "a")

    async def test_of_a_method_gets_self_first(self):
        class Client:
            tenant = 1

            @lru_cache(key=lambda self, x, *, y=0: (self.tenant, x, y))
            async def get(self, x, *, y=0):
                return self, x, y

        one, two = Client(), Client()
        assert (await one.get(1))[0] is one
        assert (await two.get(1))[0] is one
        bound = two.get
        assert (await bound(1, y=0))[0] is one
        assert (await bound(2, y=3)) == (two, 2, 3)
        assert bound.cache_contains(2, y=3)
        two.tenant = 2
        assert (await two.get(1))[0] is two

    async def test_what_it_raises_the_caller_gets(self):
        @lru_cache(key=lambda x: 1 // x)
        async def f(x):
            return x

        with pytest.raises(ZeroDivisionError):
            f(0)
        with pytest.raises(TypeError, match="positional argument"):
            f(1, 2)
        assert f.cache_info() == (0, 0, 128, 0)

    async def test_must_be_hashable(self):
        @lru_cache(key=lambda x: [x])
        async def f(x):
            return x

        with pytest.raises(TypeError, match="unhashable"):
            f(1)


class TestInvalidateWhere:
    async def test_forgets_what_the_predicate_says(self):
        s = Source()
        for x in range(6):
            await s.get(x)
        assert s.get.cache_invalidate_where(lambda x: x % 2) == 3
        assert [x for x in range(6) if s.get.cache_contains(x)] == [0, 2, 4]
        assert s.get.cache_invalidate_where(lambda x: False) == 0
        assert s.get.cache_info() == (0, 6, 128, 3)

    @pytest.mark.parametrize("typed", [False, True])
    async def test_the_predicate_gets_the_arguments_as_they_were_given(self, typed):
        @lru_cache(typed=typed)
        async def f(*args, **kwargs):
            return args

        given = [((), {}), ((1,), {}), (("x",), {}), ((1.5,), {}), (((1, 2),), {}), ((1, 2), {}), ((), {"a": 1}),
                 ((1,), {"a": 2, "b": 3}), ((1, "c"), {"d": None})]  # fmt: skip
        for args, kwargs in given:
            await f(*args, **kwargs)
        seen = []
        assert f.cache_invalidate_where(lambda *args, **kwargs: seen.append((args, kwargs))) == 0
        assert seen == given

    async def test_with_a_key_function_it_gets_the_key(self):
        @lru_cache(key=lambda x, y: (x, "key"))
        async def f(x, y):
            return y

        await f(1, 2)
        await f(3, 4)
        assert f.cache_invalidate_where(lambda key: key == (3, "key")) == 1
        assert f.cache_contains(1, 0)

    async def test_through_an_instance_it_is_about_that_one_only(self):
        class Thing:
            @lru_cache
            async def get(self, x):
                return x

        one, two = Thing(), Thing()
        for thing in (one, two):
            for x in range(4):
                await thing.get(x)
        assert one.get.cache_invalidate_where(lambda x: x < 3) == 3
        assert one.get.cache_info().currsize == 5
        assert two.get.cache_contains(0)
        assert Thing.get.cache_invalidate_where(lambda thing, x: thing is two) == 4

    async def test_a_predicate_that_raises_leaves_all_as_it_is(self):
        s = Source()
        for x in (1, 0, 2):
            await s.get(x)
        with pytest.raises(ZeroDivisionError):
            s.get.cache_invalidate_where(lambda x: 1 / x)
        assert s.get.cache_info().currsize == 3

    async def test_the_predicate_may_use_the_cache(self):
        s = Source()
        for x in range(4):
            await s.get(x)

        def predicate(x):
            s.get.cache_invalidate(3 - x)
            return True

        # Two are gone already when it is their turn to go.
        assert s.get.cache_invalidate_where(predicate) == 0
        assert s.get.cache_info().currsize == 0

    async def test_wrong_predicates_are_type_errors(self):
        s = Source()
        with pytest.raises(TypeError, match="predicate must be callable, not 'int'"):
            s.get.cache_invalidate_where(1)
        await s.get()

        async def predicate():
            return True

        with pytest.raises(TypeError, match="predicate must not be a coroutine function"):
            s.get.cache_invalidate_where(predicate)
        assert s.get.cache_contains()

    async def test_calls_under_way_go_on_for_who_waits(self):
        s = Source()
        s.hold()
        task = asyncio.create_task(s.get(1))
        await turns()
        assert s.get.cache_invalidate_where(lambda x: True) == 1
        s.release()
        assert await task == (1, 1)
        assert not s.get.cache_contains(1)


class TestWeight:
    def cache(self, max_weight, **options):
        @lru_cache(None, weight=len, max_weight=max_weight, **options)
        async def text(n, tag=""):
            return "x" * n

        return text

    async def test_the_least_recently_used_go_when_all_is_too_heavy(self):
        text = self.cache(10)
        for n in (1, 2, 3, 4):
            await text(n)
        assert text.cache_parameters()["weight"] == 10
        await text(1)
        await text(5)
        # 2 and 3 had to go, 1 was used since.
        assert [n for n in range(1, 6) if text.cache_contains(n)] == [1, 4, 5]
        assert text.cache_parameters()["weight"] == 10
        text.cache_invalidate(4)
        assert text.cache_parameters()["weight"] == 6
        text.cache_clear()
        assert text.cache_parameters()["weight"] == 0

    async def test_what_is_too_heavy_alone_is_not_kept(self):
        text = self.cache(10)
        await text(4)
        assert await text(11) == "x" * 11
        assert not text.cache_contains(11)
        assert text.cache_contains(4)
        assert await text(10) == "x" * 10
        assert not text.cache_contains(4)

    async def test_weightless_results_stay(self):
        text = self.cache(3)
        await text(0)
        for n in (1, 2, 3):
            await text(n)
        assert [n for n in range(4) if text.cache_contains(n)] == [0, 3]

    async def test_goes_together_with_maxsize(self):
        @lru_cache(2, weight=len, max_weight=100)
        async def text(n):
            return "x" * n

        for n in (1, 2, 3):
            await text(n)
        assert text.cache_info().currsize == 2
        assert text.cache_parameters()["weight"] == 5

    async def test_flights_are_not_evicted_for_their_weight(self):
        s = Source(None, weight=lambda value: 5, max_weight=10)
        s.hold()
        first = asyncio.create_task(s.get(0))
        await turns()
        gate, s.gate = s.gate, None
        for x in (1, 2, 3):
            await s.get(x)
        assert [x for x in range(4) if s.get.cache_contains(x)] == [0, 2, 3]
        gate.set()
        await first
        assert [x for x in range(4) if s.get.cache_contains(x)] == [0, 3]

    @pytest.mark.parametrize(
        ("weight", "error", "match"),
        [
            (lambda value: 1.5, TypeError, "weight must return an int, not 'float'"),
            (lambda value: None, TypeError, "weight must return an int"),
            (lambda value: -1, ValueError, "weight must not return a negative number, as -1"),
            (lambda value: -(2**80), ValueError, "weight must not return a negative number"),
            (lambda value: 1 // 0, ZeroDivisionError, ""),
        ],
    )
    async def test_a_wrong_weight_is_the_callers_error(self, weight, error, match):
        @lru_cache(weight=weight, max_weight=10)
        async def f():
            await asyncio.sleep(0)
            return 1

        results = await asyncio.gather(f(), f(), return_exceptions=True)
        for result in results:
            assert isinstance(result, error)
            assert match in str(result)
        assert f.cache_info().currsize == 0
        assert f.cache_parameters()["tasks"] == 0

    async def test_huge_weights_are_weights(self):
        @lru_cache(weight=lambda value: value, max_weight=sys.maxsize)
        async def f(x):
            return x

        await f(2**80)
        assert not f.cache_contains(2**80)
        for _ in range(2):
            await f(sys.maxsize - 1)
            await f(sys.maxsize)
        assert f.cache_info().currsize == 1
        assert f.cache_parameters()["weight"] == sys.maxsize

    @one_clock
    async def test_expired_results_weigh_nothing(self):
        text = self.cache(10, expire_after=5)
        with aiotools.VirtualClock().patch_loop():
            await text(4)
            await asyncio.sleep(3)
            await text(5)
            await asyncio.sleep(2)
            assert text.cache_parameters()["weight"] == 5
            await text(5, "other")
            assert text.cache_contains(5)

    @one_clock
    async def test_a_refresh_replaces_the_weight(self):
        sizes = [4, 7]

        @lru_cache(weight=len, max_weight=10, expire_after=5, stale_while_refresh=5)
        async def text(x):
            return "x" * sizes.pop(0)

        with aiotools.VirtualClock().patch_loop():
            await text(1)
            await asyncio.sleep(5)
            assert await text(1) == "xxxx"
            await turns()
            assert text.cache_parameters()["weight"] == 7

    async def test_errors_that_are_kept_weigh_one(self):
        @lru_cache(None, weight=len, max_weight=3, cache_errors_for=60)
        async def fails(x):
            raise ValueError(x)

        for x in range(5):
            with pytest.raises(ValueError):
                await fails(x)
        assert fails.cache_info().currsize == 3
        assert fails.cache_parameters()["weight"] == 3


class TestSeveralLoops:
    def test_a_shared_cache_keeps_its_results_for_all_loops(self, run, recwarn):
        s = Source(shared=True, expire_after=3600)
        assert run(s.get(1)) == (1, 1)

        async def main():
            call = s.get(1)
            with pytest.raises(StopIteration):
                call.send(None)

        run(main())
        assert s.get.cache_info() == (1, 1, 128, 1)
        assert s.get.cache_contains(1)
        assert not recwarn.list

    @pytest.mark.threads
    def test_each_loop_has_a_flight_of_its_own(self, loop_kind):
        s = Source(shared=True)
        started, release = threading.Barrier(3), threading.Event()

        @lru_cache(shared=True)
        async def get(x):
            s.runs.append(x)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, started.wait)
            await loop.run_in_executor(None, release.wait)
            return len(s.runs)

        async def main():
            return await asyncio.gather(get(1), get(1), get(1))

        threads = [aiotools.LoopThread(loop_factory=lambda: make_loop(loop_kind)) for _ in range(2)]
        with threads[0], threads[1]:
            futures = [thread.submit(main()) for thread in threads]
            started.wait()
            assert get.cache_parameters()["tasks"] == 2
            release.set()
            for future in futures:
                assert future.result() == [2, 2, 2]
            assert threads[0].run(main()) == [2, 2, 2]
        assert s.runs == [1, 1]
        info = get.cache_info()
        assert (info.hits, info.misses, info.currsize) == (7, 2, 1)

    @pytest.mark.threads
    def test_closing_cancels_what_runs_on_other_loops_and_waits_for_it(self, loop_kind):
        ended = []

        @lru_cache(shared=True)
        async def get(x):
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(x)

        async def main():
            await get.cache_close()
            assert ended == [1]
            with pytest.raises(RuntimeError, match="closed"):
                await get(1)

        started = threading.Event()
        with (
            aiotools.LoopThread(loop_factory=lambda: make_loop(loop_kind)) as one,
            aiotools.LoopThread(loop_factory=lambda: make_loop(loop_kind)) as two,
        ):
            future = one.submit(get(1))
            started.wait()
            two.run(main())
            with pytest.raises(BaseException) as info:
                future.result()
            assert type(info.value).__name__ == "CancelledError"
        assert get.cache_parameters()["tasks"] == 0

    def test_closing_does_not_wait_for_loops_that_do_not_run(self, new_loop, run):
        s = Source(shared=True)
        loop = new_loop()

        async def start():
            s.hold()
            task = asyncio.ensure_future(s.get(1))
            await turns()
            return task

        task = loop.run_until_complete(start())
        run(s.get.cache_close())
        assert s.get.cache_parameters()["tasks"] == 0
        # The cancellation waits there until the loop runs again.
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
        assert s.cancelled == 1

    @pytest.mark.threads
    def test_invalidation_from_another_thread_stops_a_refresh_in_its_loop(self, loop_kind):
        s = Source(expire_after=0, stale_while_refresh=3600, shared=True)

        async def start():
            await s.get()
            s.hold()
            assert await s.get() == (0, 1)
            await turns()

        async def end():
            await turns()
            while s.get.cache_parameters()["tasks"]:
                await asyncio.sleep(0)

        with aiotools.LoopThread(loop_factory=lambda: make_loop(loop_kind)) as thread:
            thread.run(start())
            assert s.get.cache_parameters()["tasks"] == 1
            assert s.get.cache_invalidate()
            thread.run(end())
        assert s.cancelled == 1

    @pytest.mark.threads
    def test_many_threads_use_one_cache(self, loop_kind):
        """Hits, misses, evictions, invalidations and cancellations on four loops at once."""
        runs = []

        @lru_cache(
            8,
            shared=True,
            expire_after=0.0005,
            stale_while_refresh=0.0005,
            cache_errors_for=0.0005,
            weight=lambda value: value % 5,
            max_weight=12,
        )
        async def get(x):
            runs.append(x)
            if x % 3:
                await asyncio.sleep(0)
            if x % 7 == 6:
                raise ValueError(x)
            return x

        async def calls(seed):
            rand = random.Random(seed)
            count = 0
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda loop, context: errors.append(context))
            for _ in range(120):
                x = rand.randrange(20)
                way = rand.randrange(20)
                if way == 0:
                    get.cache_invalidate(x)
                elif way == 1:
                    get.cache_invalidate_where(lambda y, x=x: y > x)
                elif way == 2:
                    get.cache_info()
                elif way == 3:
                    task = asyncio.create_task(get(x))
                    await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.wait([task])
                else:
                    results = await asyncio.gather(get(x), get(x), return_exceptions=True)
                    count += 2
                    for result in results:
                        assert result == x or (isinstance(result, ValueError) and result.args == (x,))
            return count

        errors = []
        threads = [aiotools.LoopThread(loop_factory=lambda: make_loop(loop_kind)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            counts = [thread.submit(calls(seed)) for seed, thread in enumerate(threads)]
            total = sum(count.result() for count in counts)
            threads[0].run(get.cache_close(wait=True))
        finally:
            for thread in threads:
                thread.stop()
        info = get.cache_info()
        assert info.hits + info.misses >= total
        assert info.currsize <= 8
        parameters = get.cache_parameters()
        assert parameters["tasks"] == 0
        assert 0 <= parameters["weight"] <= 12
        # Only refreshes fail with nobody there.
        assert all(isinstance(context.get("exception"), ValueError) for context in errors)
        get.cache_clear()
        assert get.cache_parameters()["weight"] == 0

    @one_clock
    def test_asking_needs_no_loop_also_when_that_of_the_cache_is_gone(self, run):
        s = Source(expire_after=3600)
        run(s.get(1))
        gc.collect()
        assert s.get.cache_info() == (0, 1, 128, 1)
        assert s.get.cache_contains(1)
        assert s.get.cache_invalidate(1)


class TestMethods:
    def make(self):
        class Thing:
            @lru_cache
            async def method(self, x: int, *, y: str = "") -> tuple:
                """Of a thing."""
                return self, x, y

            @classmethod
            @lru_cache
            async def of_class(cls, x):
                return cls, x

            @staticmethod
            @lru_cache
            async def static(x):
                return x

        return Thing

    def test_the_signature_of_a_bound_one_does_not_show_self(self):
        Thing = self.make()
        assert str(inspect.signature(Thing().method)) == "(x: int, *, y: str = '') -> tuple"
        assert str(inspect.signature(Thing.method)) == "(self, x: int, *, y: str = '') -> tuple"
        assert str(inspect.signature(Thing.of_class)) == "(x)"
        assert str(inspect.signature(Thing().static)) == "(x)"

    def test_a_bound_one_leads_to_the_bound_function(self):
        thing = self.make()()
        wrapped = thing.method.__wrapped__
        assert inspect.ismethod(wrapped)
        assert wrapped.__self__ is thing
        assert wrapped.__func__ is type(thing).method.__wrapped__

    async def test_class_methods_and_static_methods(self):
        Thing = self.make()

        class Other(Thing):
            pass

        assert await Thing.of_class(1) == (Thing, 1)
        assert await Other.of_class(1) == (Other, 1)
        assert await Other().of_class(1) == (Other, 1)
        assert Thing.__dict__["of_class"].__func__.cache_info() == (1, 2, 128, 2)
        assert await Thing.static(1) == 1
        assert await Thing().static(1) == 1
        assert Thing.static.cache_info() == (1, 1, 128, 1)

    async def test_overridden_methods_reach_their_parents_through_super(self):
        Thing = self.make()

        class Other(Thing):
            @lru_cache
            async def method(self, x):
                return await super().method(x), "other"

        other = Other()
        for _ in range(2):
            assert await other.method(1) == ((other, 1, ""), "other")
        assert Thing.method.cache_info() == (0, 1, 128, 1)
        assert Other.method.cache_info() == (1, 1, 128, 1)

    async def test_can_be_wrapped_and_wraps_again(self):
        @lru_cache
        async def f(x: int) -> int:
            """Its documentation."""
            return x

        @functools.wraps(f)
        async def outer(*args):
            return await f(*args)

        assert outer.__wrapped__ is f
        assert inspect.unwrap(outer) is f.__wrapped__
        assert inspect.signature(outer) == inspect.signature(f)
        assert outer.__doc__ == f.__doc__
        again = lru_cache(outer)
        assert await again(1) == await again(1) == 1
        assert f.cache_info().misses == 1
        assert again.cache_info() == (1, 1, 128, 1)

    async def test_partials_of_a_cached_function_work(self):
        @lru_cache
        async def f(x, y):
            return x, y

        assert await functools.partial(f, 1)(2) == (1, 2)
        assert await lru_cache(functools.partial(f, 1))(3) == (1, 3)
        assert f.cache_info().currsize == 2


async def test_a_stop_iteration_from_weight_is_not_taken_for_the_result():
    def weight(result):
        raise StopIteration("other")

    @aiotools.lru_cache(weight=weight, max_weight=10)
    async def f():
        return "result"

    for awaitable in (f(), asyncio.ensure_future(f())):
        with pytest.raises(RuntimeError, match="StopIteration"):
            await awaitable
