"""sleep, sleep_until and checkpoint: what they promise, and that they can stand in for asyncio's."""

import asyncio
import collections.abc
import contextvars
import gc
import inspect
import math
import subprocess
import sys
import textwrap
import time
import warnings
import weakref

import pytest
from model.clock import HandClock

import aiotools
from aiotools import _aiotools as core

SLEEPS = [
    pytest.param(lambda: aiotools.sleep(60), id="sleep"),
    pytest.param(lambda: aiotools.sleep(0), id="sleep-0"),
    pytest.param(lambda: aiotools.sleep_until(1e12), id="sleep_until"),
    pytest.param(lambda: aiotools.checkpoint(), id="checkpoint"),
]


def counts():
    return core._loop_counts(asyncio.get_running_loop())


async def start(coro):
    """A task that has begun to wait."""
    task = asyncio.get_running_loop().create_task(coro)
    await asyncio.sleep(0)
    return task


class TestResult:
    async def test_it_is_none_unless_one_is_given(self):
        assert await aiotools.sleep(0.001) is None
        assert await aiotools.sleep(0) is None
        assert await aiotools.checkpoint() is None

    @pytest.mark.parametrize("result", [42, (), (1, 2), ValueError("not raised"), StopIteration(3), None])
    async def test_it_comes_back_as_it_was_given(self, result):
        assert await aiotools.sleep(0.0001, result) is result
        assert await aiotools.sleep(0, result=result) is result
        assert await aiotools.sleep_until(0, result) is result

    async def test_it_is_not_kept_alive_after_the_sleep(self):
        class Thing:
            pass

        thing = Thing()
        ref = weakref.ref(thing)
        await aiotools.sleep(0, thing)
        del thing
        gc.collect()
        assert ref() is None


class TestArguments:
    @pytest.mark.parametrize("function, name", [(aiotools.sleep, "delay"), (aiotools.sleep_until, "when")])
    @pytest.mark.parametrize("bad", ["1", None, b"", [], 1j])
    def test_what_is_no_number_is_a_type_error_that_names_the_argument(self, function, name, bad):
        with pytest.raises(TypeError, match=f"{name} must be a number of seconds, not '{type(bad).__name__}'"):
            function(bad)

    @pytest.mark.parametrize("function, name", [(aiotools.sleep, "delay"), (aiotools.sleep_until, "when")])
    def test_nan_is_a_value_error_at_the_call(self, function, name):
        with pytest.raises(ValueError, match=f"{name} .*NaN"):
            function(math.nan)

    def test_a_number_whose_conversion_fails_shows_its_own_error(self):
        class Bad:
            def __float__(self):
                raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            aiotools.sleep(Bad())

    @pytest.mark.parametrize("number", [True, 0, 10**3, -5, 0.5])
    def test_any_real_number_will_do(self, number):
        aiotools.sleep(number).close()

    def test_wrong_calls_say_what_is_wrong(self):
        with pytest.raises(TypeError, match="missing required argument 'delay'"):
            aiotools.sleep()
        with pytest.raises(TypeError, match="at most 2 positional arguments"):
            aiotools.sleep(1, 2, 3)
        with pytest.raises(TypeError, match="unexpected keyword argument 'until'"):
            aiotools.sleep(1, until=3)
        with pytest.raises(TypeError, match="multiple values for argument 'delay'"):
            aiotools.sleep(1, delay=3)
        with pytest.raises(TypeError):
            aiotools.checkpoint(1)

    def test_keywords_that_are_not_interned_are_understood(self):
        name = "".join(["de", "lay"])
        aiotools.sleep(**{name: 0}).close()


class TestCoroutine:
    """What is returned is a coroutine to everybody who looks."""

    @pytest.mark.parametrize("make", SLEEPS)
    def test_it_is_an_abstract_coroutine_and_awaitable(self, make):
        awaitable = make()
        assert isinstance(awaitable, collections.abc.Coroutine)
        assert inspect.isawaitable(awaitable)
        assert asyncio.iscoroutine(awaitable)
        assert not asyncio.isfuture(awaitable)
        awaitable.close()

    @pytest.mark.parametrize("make", SLEEPS)
    def test_nothing_happens_before_it_is_awaited(self, make):
        # Not even a running loop is needed.
        make().close()

    @pytest.mark.parametrize("make", SLEEPS)
    def test_dropping_it_unawaited_warns(self, make):
        with pytest.warns(RuntimeWarning, match=r"coroutine '\w+' was never awaited"):
            make()
            gc.collect()

    @pytest.mark.parametrize("make", SLEEPS)
    def test_a_warning_that_is_an_error_is_reported_and_not_raised(self, make, monkeypatch):
        unraisable = []
        monkeypatch.setattr("sys.unraisablehook", unraisable.append)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make()
        assert [type(args.exc_value) for args in unraisable] == [RuntimeWarning]

    def test_each_one_that_is_dropped_warns_however_many_came_before(self):
        for _ in range(100):
            with pytest.warns(RuntimeWarning, match="coroutine 'sleep' was never awaited"):
                aiotools.sleep(1)

    @pytest.mark.parametrize("make", SLEEPS)
    async def test_it_can_be_awaited_once(self, make):
        awaitable = make()
        awaitable.close()
        with pytest.raises(RuntimeError, match="cannot reuse already awaited"):
            await awaitable

    async def test_awaiting_it_again_after_it_ended_is_an_error(self):
        awaitable = aiotools.sleep(0)
        await awaitable
        with pytest.raises(RuntimeError, match=r"cannot reuse already awaited sleep\(\)"):
            await awaitable
        with pytest.raises(RuntimeError, match=r"cannot reuse already awaited sleep\(\)"):
            awaitable.send(None)
        with pytest.raises(RuntimeError, match=r"cannot reuse already awaited sleep\(\)"):
            awaitable.throw(ValueError)
        awaitable.close()

    @pytest.mark.parametrize("make", SLEEPS)
    def test_the_first_send_takes_none_only(self, make):
        awaitable = make()
        with pytest.raises(TypeError, match="can't send non-None value to a just-started coroutine"):
            awaitable.send(1)
        awaitable.close()

    @pytest.mark.parametrize("make", SLEEPS)
    def test_it_needs_a_running_loop_once_it_is_sent_to(self, make):
        with pytest.raises(RuntimeError, match="no running event loop"):
            make().send(None)

    @pytest.mark.parametrize("make", SLEEPS)
    @pytest.mark.parametrize("suspended", [False, True])
    async def test_what_is_thrown_in_comes_out(self, make, suspended):
        awaitable = make()
        if suspended:
            awaitable.send(None)
        error = LookupError("thrown")
        with pytest.raises(LookupError) as caught:
            awaitable.throw(error)
        assert caught.value is error
        assert counts() == (0, 0)

    async def test_throw_takes_what_a_coroutine_takes(self):
        for args, kind, text in [
            ((KeyError,), KeyError, ""),
            ((KeyError, "text"), KeyError, "'text'"),
            ((KeyError, ("a", "b")), KeyError, "('a', 'b')"),
            ((KeyError, KeyError("value"), None), KeyError, "'value'"),
        ]:
            with pytest.raises(kind) as caught:
                aiotools.sleep(1).throw(*args)
            assert str(caught.value) == text
        for args, match in [
            ((), "1 to 3 arguments"),
            ((1,), "exceptions must be classes or instances deriving from BaseException, not 'int'"),
            ((KeyError(), "value"), "may not have a separate value"),
            ((KeyError, None, "tb"), "must be a traceback"),
        ]:
            awaitable = aiotools.sleep(1)
            with pytest.raises(TypeError, match=match):
                awaitable.throw(*args)
            awaitable.close()

    @pytest.mark.parametrize("make", SLEEPS)
    async def test_closing_it_while_it_waits_leaves_nothing(self, make):
        awaitable = make()
        awaitable.send(None)
        awaitable.close()
        awaitable.close()
        assert counts()[0] == 0

    async def test_driving_it_by_hand_without_waiting_is_an_error_and_leaves_nothing(self):
        awaitable = aiotools.sleep(60)
        awaitable.send(None)
        with pytest.raises(RuntimeError, match="resumed before what it awaits was done"):
            awaitable.send(None)
        assert counts() == (0, 0)

    async def test_its_repr_in_a_task_names_the_function(self):
        task = await start(aiotools.sleep(60))
        assert "coro=<sleep() " in repr(task) or "coro=<sleep()>" in repr(task)
        await aiotools_cancel(task)

    def test_an_async_function_can_be_driven_without_any_loop_framework(self):
        async def coroutine():
            await aiotools.checkpoint()

        async def main():
            driven = coroutine()
            driven.send(None)
            driven.close()

        asyncio.run(main())


async def aiotools_cancel(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class TestWithAsyncio:
    """Everything that takes a coroutine takes these."""

    def test_asyncio_run(self):
        assert asyncio.run(aiotools.sleep(0.001, "result")) == "result"

    async def test_create_task_and_gather(self):
        task = asyncio.get_running_loop().create_task(aiotools.sleep(0.001, 1))
        assert await asyncio.gather(task, aiotools.sleep(0.002, 2), aiotools.sleep(0, 3)) == [1, 2, 3]

    async def test_task_group(self):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(aiotools.sleep(0, i)) for i in range(3)]
        assert [task.result() for task in tasks] == [0, 1, 2]

    async def test_wait_for_ends_it(self):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(aiotools.sleep(math.inf), 0.001)
        assert counts()[0] == 0

    async def test_asyncio_timeout_ends_it(self):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await aiotools.sleep(math.inf)
        assert counts()[0] == 0

    async def test_shield_and_wait(self):
        with HandClock().patch() as clock:
            inner = asyncio.ensure_future(aiotools.sleep(5, "inner"))
            outer = asyncio.ensure_future(asyncio.shield(inner))
            await asyncio.sleep(0)
            outer.cancel()
            await clock.advance(5)
            assert outer.cancelled() and inner.result() == "inner"

    async def test_run_coroutine_threadsafe(self):
        loop = asyncio.get_running_loop()

        def work():
            return asyncio.run_coroutine_threadsafe(aiotools.sleep(0.001, "from a thread"), loop).result()

        assert await loop.run_in_executor(None, work) == "from a thread"

    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="makes a task of its own kind")
    async def test_a_task_written_in_python(self):
        loop = asyncio.get_running_loop()

        async def work():
            await aiotools.checkpoint()
            return await aiotools.sleep(0.001, "result")

        assert await asyncio.tasks._PyTask(work(), loop=loop) == "result"

    async def test_from_inside_a_generator_based_coroutine(self):
        import types

        @types.coroutine
        def old_style():
            return (yield from aiotools.sleep(0.001, "result").__await__())

        assert await old_style() == "result"


class TestCancellation:
    @pytest.mark.parametrize("make", SLEEPS)
    async def test_a_sleep_that_is_cancelled_raises_with_the_message_and_leaves_no_deadline(self, make):
        task = asyncio.get_running_loop().create_task(make())
        assert task.cancel("the message")
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert task.cancelled()
        assert caught.value.args in [("the message",), ()]
        assert counts() == (0, 0)

    async def test_the_message_reaches_the_sleeper(self):
        seen = []

        async def sleeper():
            try:
                await aiotools.sleep(60)
            except asyncio.CancelledError as error:
                seen.append(error.args)
                raise

        await aiotools_cancel_with(await start(sleeper()), "why")
        assert seen == [("why",)]

    async def test_a_request_that_is_pending_is_delivered_at_the_next_checkpoint(self):
        reached = []

        async def worker():
            asyncio.current_task().cancel()
            reached.append("before")
            await aiotools.checkpoint()
            reached.append("after")

        task = asyncio.get_running_loop().create_task(worker())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert reached == ["before"]

    async def test_a_cancel_between_the_wake_up_and_the_step_wins(self):
        """As with a future: the sleep is over, but its task hasn't gone on."""
        loop = asyncio.get_running_loop()
        task = await start(aiotools.sleep(0.001))
        woken = loop.create_future()

        def poll():
            if counts()[0]:
                loop.call_soon(poll)
            else:
                woken.set_result(task.cancel())

        loop.call_soon(poll)
        await woken
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_a_sleeper_that_swallows_its_cancellation_can_sleep_again(self):
        async def stubborn():
            try:
                await aiotools.sleep(60)
            except asyncio.CancelledError:
                asyncio.current_task().uncancel()
            await aiotools.sleep(0.001)
            return "went on"

        task = await start(stubborn())
        task.cancel()
        assert await task == "went on"


async def aiotools_cancel_with(task, message):
    task.cancel(message)
    with pytest.raises(asyncio.CancelledError):
        await task


class TestTime:
    async def test_no_sleep_ends_early_on_a_monotonic_clock(self):
        """uvloop rounds its own timers to the nearest millisecond, so half of them would."""

        async def one(delay):
            began = time.monotonic()
            await aiotools.sleep(delay)
            return time.monotonic() - began - delay

        early = [
            await asyncio.gather(*[one(0.0003 * (i % 40) + 0.00007 * i / 500) for i in range(500)]) for _ in range(6)
        ]
        assert min(map(min, early)) >= 0

    async def test_no_absolute_deadline_is_early_on_the_clock_of_the_loop(self):
        loop = asyncio.get_running_loop()

        async def one(i):
            when = loop.time() + 0.0003 * (i % 40)
            await aiotools.sleep_until(when)
            return loop.time() - when

        assert min(await asyncio.gather(*[one(i) for i in range(1000)])) >= 0

    async def test_deadlines_come_in_their_order_and_ties_in_the_order_of_setting(self):
        loop = asyncio.get_running_loop()
        order = []

        async def one(name, when):
            await aiotools.sleep_until(when)
            order.append(name)

        with HandClock().patch() as clock:
            base = loop.time() + 10
            whens = [("c", base + 2), ("a1", base), ("b", base + 1), ("a2", base), ("a3", base)]
            tasks = [loop.create_task(one(name, when)) for name, when in whens]
            await clock.settle()
            # All are due at once: the order is theirs, not that of the loop's turns.
            await clock.jump(20)
            await asyncio.wait(tasks)
        assert order == ["a1", "a2", "a3", "b", "c"]

    async def test_an_endless_sleep_is_kept_alive_by_the_loop(self):
        """As a TimerHandle keeps its future: nobody else refers to the sleeper."""
        ended = []

        async def sleeper():
            try:
                await aiotools.sleep(math.inf)
            finally:
                ended.append(True)

        task = await start(sleeper())
        ref = weakref.ref(task)
        del task
        gc.collect()
        assert ref() is not None and not ended
        await aiotools_cancel(ref())

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="uvloop's own timers do not look at a patched clock")
    async def test_a_patched_clock_is_believed(self):
        loop = asyncio.get_running_loop()
        real = loop.time
        offset = 1000.0
        loop.time = lambda: real() + offset
        try:
            began = loop.time()
            task = await start(aiotools.sleep(2000.0))
            assert counts()[0] == 1
            offset += 3000.0
            # Something has to make the loop look at its deadlines.
            await aiotools.sleep(0.001)
            await task
            assert loop.time() - began >= 2000.0
        finally:
            del loop.time

    @pytest.mark.loop_kinds("default", reason="the default loop reads time.monotonic")
    async def test_a_patched_monotonic_clock_is_believed(self, monkeypatch):
        real = time.monotonic
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(time, "monotonic", lambda: real() + 5000.0)
        began = loop.time()
        await aiotools.sleep(0.001)
        assert loop.time() - began < 100
        task = await start(aiotools.sleep(50))
        monkeypatch.setattr(time, "monotonic", lambda: real() + 6000.0)
        await aiotools.sleep(0.001)
        await task

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="their type can be changed, and their time() tells")
    @pytest.mark.parametrize("place", ["instance", "type", "base type", "class of the instance", "time.monotonic"])
    async def test_a_clock_that_is_patched_after_it_was_read_is_believed_at_once(self, place, monkeypatch):
        """What was seen before holds only until it changes, wherever that is; and again after it was undone."""
        loop = asyncio.get_running_loop()
        kind = type(loop)
        real = time.monotonic

        def deadline():
            return aiotools.timeout(100).when()

        def patch(patched):
            if place == "instance":
                patched.setattr(loop, "time", lambda: real() + 5000)
            elif place == "type":
                patched.setattr(kind, "time", lambda self: real() + 5000)
            elif place == "base type":
                patched.setattr(asyncio.BaseEventLoop, "time", lambda self: real() + 5000)
            elif place == "time.monotonic":
                patched.setattr(time, "monotonic", lambda: real() + 5000)
            else:
                other = type("Other", (kind,), {"time": lambda self: real() + 5000})
                patched.setattr(loop, "__class__", other)

        for _ in range(3):
            assert 0 < deadline() - real() < 1000
            with monkeypatch.context() as patched:
                patch(patched)
                for _ in range(3):
                    assert 4000 < deadline() - real() < 6000
            assert 0 < deadline() - real() < 1000

    def test_without_watchers_a_patched_clock_is_believed_at_once(self):
        """An interpreter has eight watchers of types and of dictionaries; others may have taken them."""
        code = """
            import asyncio
            try:
                import _testcapi
                adders = _testcapi.add_type_watcher, _testcapi.add_dict_watcher
            except (ImportError, AttributeError):
                adders = ()
            for add in adders:
                try:
                    for _ in range(20):
                        add(0)
                except RuntimeError:
                    pass
            import aiotools

            async def main():
                loop = asyncio.get_running_loop()
                for _ in range(3):
                    assert abs(aiotools.timeout(100).when() - loop.time() - 100) < 50
                    type(loop).time = lambda self: 5000.0
                    assert aiotools.timeout(100).when() == 5100
                    del type(loop).time
                    await aiotools.sleep(0)

            asyncio.run(main())
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    @pytest.mark.loop_kinds("uvloop", reason="patched on the instance only")
    async def test_uvloop_s_clock_that_is_patched_after_it_was_read_is_believed_at_once(self):
        loop = asyncio.get_running_loop()
        for _ in range(3):
            assert abs(aiotools.timeout(100).when() - loop.time() - 100) < 50
            loop.time = lambda: 5000.0
            assert aiotools.timeout(100).when() == 5100
            del loop.time

    @pytest.mark.loop_kinds("default", reason="changes the type more often than the interpreter numbers its versions")
    async def test_a_loop_type_that_was_patched_a_thousand_times_is_looked_at_each_time(self):
        loop = asyncio.get_running_loop()
        kind = type("Often", (type(loop),), {})
        before = type(loop)
        loop.__class__ = kind
        try:
            for n in range(2500):
                kind.time = lambda self, n=n: 1000.0 * n
                assert aiotools.timeout(100).when() == 1000.0 * n + 100
                del kind.time
                assert abs(aiotools.timeout(100).when() - time.monotonic() - 100) < 50
        finally:
            loop.__class__ = before

    async def test_many_live_deadlines(self):
        tasks = [asyncio.ensure_future(aiotools.sleep(3600 + i % 7)) for i in range(2_000)]
        await aiotools.sleep(0.001)
        assert counts()[0] == 2_000
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert counts()[0] == 0


class TestOrder:
    async def test_a_checkpoint_lets_everything_that_is_ready_run_once(self):
        loop = asyncio.get_running_loop()
        order = []
        loop.call_soon(order.append, "ready")
        await aiotools.checkpoint()
        assert order == ["ready"]

    async def test_checkpoints_of_several_tasks_take_turns(self):
        order = []

        async def worker(name):
            for step in range(3):
                order.append((name, step))
                await aiotools.checkpoint()

        await asyncio.gather(*[worker(name) for name in "abc"])
        assert order == [(name, step) for step in range(3) for name in "abc"]

    async def test_tasks_that_do_nothing_but_checkpoints_starve_nobody(self):
        """The batch is bounded by what was ready when it began."""
        loop = asyncio.get_running_loop()
        turns = 0
        stop = False

        async def spinner():
            nonlocal turns
            while not stop:
                turns += 1
                await aiotools.checkpoint()

        spinners = [asyncio.ensure_future(spinner()) for _ in range(10)]
        for _ in range(5):
            before = turns
            await asyncio.sleep(0)
            assert turns - before <= 20
        done = loop.create_future()
        loop.call_later(0.001, done.set_result, None)
        await done
        stop = True
        await asyncio.gather(*spinners)

    async def test_each_task_goes_on_in_its_own_context(self):
        variable = contextvars.ContextVar("variable")

        async def worker(value):
            variable.set(value)
            for _ in range(3):
                await aiotools.checkpoint()
                assert variable.get() == value
                assert asyncio.current_task() is this[value]
                await aiotools.sleep(0.0001)
                assert variable.get() == value

        loop = asyncio.get_running_loop()
        this = {value: loop.create_task(worker(value)) for value in range(5)}
        await asyncio.gather(*this.values())

    async def test_a_deadline_that_is_set_by_a_woken_task_fires(self):
        """Waking and ticking are armed apart: one batch must not keep the other from being armed."""

        async def worker():
            await aiotools.checkpoint()
            await aiotools.sleep(0.001)
            await aiotools.checkpoint()
            return "done"

        assert await asyncio.gather(*[worker() for _ in range(3)]) == ["done"] * 3
