"""timeout, timeout_at, Timeout: beside asyncio's where both agree, and against a model."""

import asyncio
import contextlib
import fractions
import gc
import inspect
import math
import os
import subprocess
import sys
import textwrap
import time
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model.clock import HandClock

import aiotools
from aiotools import Timeout, timeout, timeout_at

HAS_3_13_RULES = sys.version_info >= (3, 13)
FUNCTIONS = [timeout, timeout_at, Timeout]


def current():
    return asyncio.current_task()


def now():
    return asyncio.get_running_loop().time()


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


async def forever():
    await asyncio.get_running_loop().create_future()


class TestExpiry:
    async def test_a_body_that_ends_in_time_sees_nothing(self):
        async with timeout(60) as cm:
            await asyncio.sleep(0)
            assert not cm.expired()
        assert not cm.expired()
        assert current().cancelling() == 0

    async def test_a_body_that_takes_too_long_is_a_timeout_error_from_the_cancellation(self):
        with pytest.raises(TimeoutError) as info:
            async with timeout(0.001) as cm:
                await forever()
        assert cm.expired()
        cause = info.value.__cause__
        assert type(cause) is asyncio.CancelledError and cause.args == ("timeout",)
        assert info.value.__context__ is cause
        assert info.value.__suppress_context__
        assert current().cancelling() == 0

    async def test_timeout_at_counts_on_the_clock_of_the_loop(self):
        when = now() + 0.002
        with pytest.raises(TimeoutError):
            async with timeout_at(when) as cm:
                assert cm.when() == when
                await forever()
        assert now() >= when - 0.001

    @pytest.mark.parametrize("delay", [0, 0.0, -1, -1e-9, -math.inf, False])
    async def test_no_time_expires_at_the_next_iteration(self, delay):
        with pytest.raises(TimeoutError):
            async with timeout(delay):
                await asyncio.sleep(0)

    @pytest.mark.parametrize("ago", [0, 1e-9, 1, math.inf])
    async def test_a_time_that_is_past_expires_at_the_next_iteration(self, ago):
        with pytest.raises(TimeoutError):
            async with timeout_at(now() - ago):
                await asyncio.sleep(0)

    async def test_a_timeout_made_long_before_it_is_entered_expires_at_the_next_iteration(self):
        manager = timeout(0.0005)
        await asyncio.sleep(0.003)
        with pytest.raises(TimeoutError):
            async with manager:
                await asyncio.sleep(0)

    async def test_a_body_that_does_not_suspend_does_not_expire(self):
        async with timeout(0) as cm:
            pass
        assert not cm.expired()
        await turns(3)

    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize("never", [None, math.inf])
    async def test_none_and_infinity_are_no_deadline(self, function, never):
        async with function(never) as cm:
            await turns(3)
            assert cm.when() == never
        assert not cm.expired()

    @pytest.mark.parametrize("function", ["timeout", "timeout_at", "reschedule"])
    async def test_it_never_comes_early(self, function):
        """Thousands of short deadlines, measured on the monotonic clock."""
        loop = asyncio.get_running_loop()

        async def one(i):
            delay = (i % 150) * 0.00013 + 0.0001
            # An absolute deadline is one on the clock of the loop, and uvloop's counts milliseconds.
            read = time.monotonic if function == "timeout" else loop.time
            began = read()
            with pytest.raises(TimeoutError):
                async with timeout(delay) if function == "timeout" else timeout_at(began + delay) as cm:
                    if function == "reschedule":
                        cm.reschedule(None)
                        cm.reschedule(began + delay)
                    await forever()
            return read() - (began + delay)

        for _ in range(3):
            assert min(await asyncio.gather(*[one(i) for i in range(500)])) >= 0

    async def test_a_body_that_swallows_the_cancellation_goes_on(self):
        async with timeout(0) as cm:
            with contextlib.suppress(asyncio.CancelledError):
                await forever()
        assert cm.expired()
        assert current().cancelling() == 0

    async def test_a_cancellation_of_the_body_s_own_is_none_of_ours(self):
        with pytest.raises(asyncio.CancelledError):
            async with timeout(60):
                raise asyncio.CancelledError
        assert current().cancelling() == 0

    async def test_another_exception_passes_unchanged(self):
        error = ValueError()
        with pytest.raises(ValueError) as info:
            async with timeout(60):
                raise error
        assert info.value is error and error.__context__ is None

    async def test_the_timeout_error_of_an_inner_block_passes_an_outer_one(self):
        async with timeout(60) as outer:
            with pytest.raises(TimeoutError):
                async with timeout(0):
                    await forever()
        assert not outer.expired()

    async def test_the_outer_deadline_interrupts_the_inner_block(self):
        with pytest.raises(TimeoutError):
            async with timeout(0.001) as outer:
                async with timeout(60) as inner:
                    await forever()
        assert outer.expired() and not inner.expired()
        assert current().cancelling() == 0

    async def test_equal_deadlines_nested(self):
        async def body():
            when = now() + 5
            with pytest.raises(TimeoutError):
                async with timeout_at(when) as outer:
                    try:
                        async with timeout_at(when) as inner:
                            await forever()
                    finally:
                        assert outer.expired() and inner.expired()
            assert current().cancelling() == 0

        with HandClock().patch() as clock:
            task = asyncio.create_task(body())
            await clock.advance(5)
            await task


class TestReschedule:
    async def test_later(self):
        async with timeout(0.001) as cm:
            cm.reschedule(when := now() + 60)
            assert cm.when() == when
            await asyncio.sleep(0.003)
        assert not cm.expired()

    async def test_earlier(self):
        with pytest.raises(TimeoutError):
            async with timeout(60) as cm:
                cm.reschedule(when=now() + 0.001)
                await forever()

    async def test_to_the_past_and_back(self):
        async with timeout(60) as cm:
            cm.reschedule(now() - 1)
            cm.reschedule(now() + 60)
            await turns(3)
            cm.reschedule(-math.inf)
            cm.reschedule(None)
            await turns(3)
            assert cm.when() is None
        assert not cm.expired()
        with pytest.raises(TimeoutError):
            async with timeout(None) as cm:
                cm.reschedule(now())
                cm.reschedule(now() + 60)
                cm.reschedule(now())
                await asyncio.sleep(0)

    async def test_before_entry(self):
        with pytest.raises(RuntimeError, match="Timeout has not been entered"):
            timeout(1).reschedule(2)

    async def test_after_the_end(self):
        async with timeout(1) as cm:
            pass
        with pytest.raises(RuntimeError, match="Cannot change state of finished Timeout"):
            cm.reschedule(2)
        with pytest.raises(TimeoutError):
            async with timeout(0) as cm:
                try:
                    await forever()
                finally:
                    with pytest.raises(RuntimeError, match="Cannot change state of expiring Timeout"):
                        cm.reschedule(None)
        with pytest.raises(RuntimeError, match="Cannot change state of expired Timeout"):
            cm.reschedule(2)

    async def test_from_a_callback_of_the_loop(self):
        with pytest.raises(TimeoutError):
            async with timeout(60) as cm:
                asyncio.get_running_loop().call_soon(cm.reschedule, now())
                await forever()

    async def test_from_another_thread(self):
        async with timeout(60) as cm:
            with pytest.raises(RuntimeError, match="no running event loop"):
                await asyncio.to_thread(cm.reschedule, 1)


class TestGroups:
    async def fail_with(self, others, cancellations=1):
        async with timeout(0) as self.cm:
            try:
                await forever()
            except asyncio.CancelledError as exc:
                self.group = BaseExceptionGroup("group", [exc] * cancellations + others)
                raise self.group

    async def test_nothing_but_cancellations_is_a_timeout_error_from_the_group(self):
        inner = BaseExceptionGroup("inner", [asyncio.CancelledError("x")])
        with pytest.raises(TimeoutError) as info:
            await self.fail_with([inner])
        assert info.value.__cause__ is self.group
        assert current().cancelling() == 0

    async def test_other_errors_come_beside_a_timeout_error(self):
        value, key = ValueError(1), KeyError(2)
        inner = BaseExceptionGroup("inner", [asyncio.CancelledError("x"), key])
        with pytest.raises(ExceptionGroup, match="timeout with collected inner exceptions") as info:
            await self.fail_with([value, inner])
        error, rest = info.value.exceptions
        assert type(error) is TimeoutError
        assert rest.message == "group" and rest.exceptions[0] is value
        assert rest.exceptions[1].message == "inner" and rest.exceptions[1].exceptions == (key,)
        assert info.value.__context__ is self.group and info.value.__cause__ is None
        assert current().cancelling() == 0

    async def test_a_base_error_among_them_makes_it_a_base_group(self):
        with pytest.raises(BaseExceptionGroup) as info:
            await self.fail_with([SystemExit(3)])
        assert not isinstance(info.value, ExceptionGroup)

    async def test_a_group_without_cancellations_passes_unchanged(self):
        error = ValueError()
        with pytest.raises(ExceptionGroup) as info:
            await self.fail_with([error], cancellations=0)
        assert info.value is self.group and info.value.exceptions == (error,)
        assert type(self.group.__context__) is TimeoutError
        assert type(self.group.__context__.__cause__) is asyncio.CancelledError
        assert current().cancelling() == 0

    async def test_a_group_passes_unchanged_when_somebody_else_cancels_too(self):
        with pytest.raises(BaseExceptionGroup) as info:
            async with timeout(0):
                try:
                    await forever()
                except asyncio.CancelledError as exc:
                    current().cancel()
                    raise BaseExceptionGroup("group", [exc]) from None
        assert info.value.message == "group"
        assert current().uncancel() == 0
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # up to 3.12 the request stays pending

    async def test_a_group_whose_split_is_broken(self):
        class Group(BaseExceptionGroup):
            def split(self, condition):
                return 1

        with pytest.raises(TypeError, match="split must return a 2-tuple"):
            async with timeout(0):
                try:
                    await forever()
                except asyncio.CancelledError as exc:
                    raise Group("group", [exc]) from None
        assert current().cancelling() == 0


class TestContexts:
    """An exception that merely carries our cancellation as its context, as 3.13's asyncio treats it."""

    async def raise_with(self, make, body):
        try:
            async with make(0):
                await body()
        except BaseException as exc:
            return exc

    @staticmethod
    async def other():
        try:
            await forever()
        except asyncio.CancelledError:
            raise ValueError

    @staticmethod
    async def nested():
        try:
            await forever()
        except asyncio.CancelledError:
            try:
                raise KeyError
            except KeyError:
                raise ValueError

    @staticmethod
    async def group_member():
        try:
            await forever()
        except asyncio.CancelledError:
            try:
                raise ValueError
            except ValueError as exc:
                error = exc
        raise ExceptionGroup("group", [error])

    @pytest.mark.parametrize("name", ["other", "nested", "group_member"])
    async def test_a_timeout_error_is_put_into_the_chain(self, name):
        def shape(exc):
            if exc is None:
                return None
            members = [shape(e) for e in exc.exceptions] if isinstance(exc, BaseExceptionGroup) else []
            return type(exc), shape(exc.__cause__), shape(exc.__context__), members

        ours = shape(await self.raise_with(timeout, getattr(self, name)))
        assert "TimeoutError" in str(ours)
        if HAS_3_13_RULES:
            assert ours == shape(await self.raise_with(asyncio.timeout, getattr(self, name)))
        assert current().cancelling() == 0

    async def test_a_ring_of_contexts_does_not_hang(self):
        first, second, third = ValueError(), KeyError(), IndexError()
        first.__context__, second.__context__, third.__context__ = second, third, second
        with pytest.raises(ValueError):
            async with timeout(0):
                with contextlib.suppress(asyncio.CancelledError):
                    await forever()
                try:
                    raise first
                finally:
                    first.__context__ = second


class TestCancellationFromOutside:
    @pytest.mark.parametrize("make", [timeout, asyncio.timeout])
    @pytest.mark.parametrize("order", ["cancel first", "expiry first"])
    async def test_in_the_iteration_of_the_expiry_it_wins(self, make, order):
        async def body():
            async with make(None) as cm:
                loop = asyncio.get_running_loop()
                task = current()
                if order == "cancel first":
                    loop.call_soon(task.cancel, "outside")
                    cm.reschedule(now())
                else:
                    cm.reschedule(now())
                    loop.call_soon(task.cancel, "outside")
                await forever()

        task = asyncio.create_task(body())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled() and task.cancelling() == 1

    async def test_before_the_expiry_it_wins(self):
        async def body():
            async with timeout(None) as cm:
                try:
                    await forever()
                except asyncio.CancelledError:
                    cm.reschedule(now())
                    await forever()  # clean-up that takes too long

        task = asyncio.create_task(body())
        await turns(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    @pytest.mark.parametrize("delay", [0, -1, 0.001])
    async def test_a_request_that_is_pending_at_entry_wins(self, delay):
        current().cancel("outside")
        with pytest.raises(asyncio.CancelledError):
            async with timeout(delay) as cm:
                try:
                    await asyncio.sleep(0)
                finally:
                    while not cm.expired():
                        with contextlib.suppress(asyncio.CancelledError):
                            await forever()
        assert current().cancelling() == 1
        current().uncancel()

    async def test_a_request_that_is_pending_at_entry_and_answered_inside_does_not_count(self):
        current().cancel()
        with pytest.raises(TimeoutError):
            async with timeout(60) as cm:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
                current().uncancel()
                cm.reschedule(now())
                await forever()
        assert current().cancelling() == 0

    async def test_a_request_delivered_before_entry_does_not_count(self):
        """A timeout in clean-up code is a timeout."""
        current().cancel()
        with pytest.raises(asyncio.CancelledError):
            try:
                await asyncio.sleep(0)
            finally:
                with pytest.raises(TimeoutError):
                    async with timeout(0):
                        await forever()
        assert current().uncancel() == 0

    @pytest.mark.parametrize("pending", [True, False])
    async def test_a_task_that_cannot_tell_whether_a_request_is_pending_goes_by_the_message(self, pending):
        class Silent(asyncio.Task):
            @property
            def _must_cancel(self):
                raise AttributeError

        async def body():
            current().cancel("timeout".lower())
            if not pending:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
            async with timeout(0.001) as cm:
                try:
                    await forever()
                finally:
                    while not cm.expired():
                        with contextlib.suppress(asyncio.CancelledError):
                            await forever()

        task = Silent(body(), loop=asyncio.get_running_loop())
        with pytest.raises(asyncio.CancelledError if pending else TimeoutError):
            await task
        assert task.cancelling() == 1

    async def test_both_swallowed_leaves_the_request_from_outside(self):
        async with timeout(0):
            with contextlib.suppress(asyncio.CancelledError):
                await forever()
            current().cancel()
        assert current().cancelling() == 1
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        assert current().uncancel() == 0


class TestWrongUse:
    async def test_entering_twice(self):
        async with timeout(1) as cm:
            with pytest.raises(RuntimeError, match="Timeout has already been entered"):
                async with cm:
                    raise AssertionError("not reached")
        with pytest.raises(RuntimeError, match="Timeout has already been entered"):
            async with cm:
                raise AssertionError("not reached")

    async def test_leaving_before_entry_and_twice(self):
        manager = timeout(1)
        with pytest.raises(RuntimeError, match="Timeout has not been entered"):
            await manager.__aexit__(None, None, None)
        async with manager:
            pass
        with pytest.raises(RuntimeError, match="Timeout has already been left"):
            await manager.__aexit__(None, None, None)

    async def test_entering_outside_of_a_task(self):
        manager = timeout(1)
        caught = asyncio.get_running_loop().create_future()

        def callback():
            try:
                manager.__aenter__().send(None)
            except RuntimeError as exc:
                caught.set_result(str(exc))

        asyncio.get_running_loop().call_soon(callback)
        assert await caught == "Timeout should be used inside a task"

    def test_without_a_running_loop(self):
        with pytest.raises(RuntimeError, match="no running event loop"):
            timeout(1)
        with pytest.raises(RuntimeError, match="no running event loop"):
            timeout(None)
        manager = timeout_at(1)
        assert manager.when() == 1
        with pytest.raises(RuntimeError, match="no running event loop"):
            manager.__aenter__().send(None)

    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize("bad", ["1", b"1", [], object(), 1j])
    async def test_what_is_no_number_is_a_type_error_that_names_it(self, function, bad):
        with pytest.raises(TypeError, match=r"(delay|when) must be a number of seconds, not"):
            function(bad)

    @pytest.mark.parametrize("function", FUNCTIONS)
    async def test_nan_is_a_value_error(self, function):
        with pytest.raises(ValueError, match="NaN"):
            function(math.nan)
        async with timeout(60) as cm:
            with pytest.raises(ValueError, match="when must be a number of seconds, not NaN"):
                cm.reschedule(math.nan)
            with pytest.raises(TypeError):
                cm.reschedule("soon")
            assert cm.when() < math.inf

    @pytest.mark.parametrize("number", [10**400, -(10**400), fractions.Fraction(10**400)])
    async def test_a_number_too_large_for_a_float_is_an_overflow_error_that_names_it(self, number):
        """As asyncio's."""
        with pytest.raises(OverflowError):
            asyncio.timeout(number)
        with pytest.raises(OverflowError, match="delay is too large"):
            timeout(number)
        with pytest.raises(OverflowError, match="when is too large"):
            timeout_at(number)
        async with timeout(60) as cm:
            when = cm.when()
            with pytest.raises(OverflowError, match="when is too large"):
                cm.reschedule(number)
            assert cm.when() == when

    @pytest.mark.parametrize("function", FUNCTIONS)
    async def test_wrong_arguments(self, function):
        for args, kwargs in [((), {}), ((1, 2), {}), ((), {"unknown": 1}), ((1,), {"when": 1})]:
            with pytest.raises(TypeError):
                function(*args, **kwargs)
        with pytest.raises(OverflowError):
            function(10**400)

    async def test_it_is_neither_awaitable_nor_callable_nor_a_sync_manager(self):
        manager = timeout(1)
        with pytest.raises(TypeError, match="can't be used in 'await'"):
            await manager
        with pytest.raises(TypeError, match="context manager"):
            with manager:
                pass
        with pytest.raises(TypeError):
            next(manager)
        with pytest.raises(TypeError, match="not callable"):
            manager(1)
        assert not inspect.isawaitable(manager)
        assert isinstance(manager, contextlib.AbstractAsyncContextManager)

    def test_it_is_final(self):
        with pytest.raises(TypeError):
            type("Sub", (Timeout,), {})
        with pytest.raises(TypeError):
            Timeout.when = None

    async def test_steps_that_are_not_awaited_do_nothing_and_warn(self):
        manager = timeout(0)
        with pytest.warns(RuntimeWarning, match=r"'Timeout.__aenter__' was never awaited"):
            manager.__aenter__()
        await turns(2)
        assert repr(manager) == "<Timeout [created]>"

    async def test_leaving_an_expired_one_in_another_task(self):
        manager = timeout(0)

        async def enter():
            await manager.__aenter__()
            with contextlib.suppress(asyncio.CancelledError):
                await forever()
            return current().cancelling()

        assert await asyncio.create_task(enter()) == 1
        with pytest.raises(RuntimeError, match="expired in another task"):
            await manager.__aexit__(None, None, None)

    async def test_leaving_in_another_task_is_fine_before_expiry(self):
        """As with asyncio's: fixtures are set up and torn down in different tasks."""
        manager = timeout(60)
        await asyncio.create_task(manager.__aenter__())
        await asyncio.create_task(manager.__aexit__(None, None, None))
        assert repr(manager) == "<Timeout [finished]>"


class TestObject:
    async def test_repr(self):
        manager = timeout_at(now() + 10)
        assert repr(manager) == "<Timeout [created]>"
        async with manager:
            assert repr(manager) == f"<Timeout [active] when={round(manager.when(), 3)}>"
            manager.reschedule(None)
            assert repr(manager) == "<Timeout [active] when=None>"
        assert repr(manager) == "<Timeout [finished]>"
        with pytest.raises(TimeoutError):
            async with timeout(0) as manager:
                try:
                    await forever()
                finally:
                    assert repr(manager) == "<Timeout [expiring]>" and manager.expired()
        assert repr(manager) == "<Timeout [expired]>"

    async def test_an_exit_stack_takes_it(self):
        with pytest.raises(TimeoutError):
            async with contextlib.AsyncExitStack() as stack:
                cm = await stack.enter_async_context(timeout(0))
                assert isinstance(cm, Timeout)
                await forever()

    def test_the_methods_look_like_methods(self):
        for name in ("__aenter__", "__aexit__", "when", "expired", "reschedule"):
            method = getattr(Timeout, name)
            assert method.__name__ == name and method.__doc__
            inspect.signature(method)
        assert list(inspect.signature(Timeout).parameters) == ["when"]
        assert list(inspect.signature(timeout).parameters) == ["delay"]
        assert list(inspect.signature(timeout_at).parameters) == ["when"]
        with pytest.raises(TypeError, match="Timeout as its first argument"):
            Timeout.__aenter__(1)
        with pytest.raises(TypeError, match="3 arguments"):
            Timeout.__aexit__(Timeout(None))
        with pytest.raises(TypeError, match="no more arguments"):
            Timeout.__aenter__(Timeout(None), 1)
        with pytest.raises(TypeError, match="doesn't apply"):
            Timeout.__dict__["__aenter__"].__get__(1)
        assert "__aenter__" in repr(Timeout.__aenter__)

    async def test_it_goes_when_nobody_has_it(self):
        manager = timeout(60)
        ref = weakref.ref(manager)
        async with manager:
            pass
        del manager
        assert ref() is None

    async def test_many_at_once(self):
        """AIOTOOLS_LARGE=1: a million of them."""
        count = 1_000_000 if os.environ.get("AIOTOOLS_LARGE") else 100_000
        if os.environ.get("AIOTOOLS_DEBUG") or "ASAN_OPTIONS" in os.environ:
            count = 4000  # such a core (tools/test-sanitized) looks through the whole queue after each change
        managers = [timeout(1000 + i % 7) for i in range(count)]
        for manager in managers:
            await manager.__aenter__()
        core = aiotools._aiotools
        assert core._loop_counts(asyncio.get_running_loop())[0] == count
        for manager in managers:
            await manager.__aexit__(None, None, None)
        assert core._loop_counts(asyncio.get_running_loop())[0] == 0

    async def test_steps_in_tasks_of_their_own(self):
        manager = timeout(60)
        [entered] = await asyncio.gather(manager.__aenter__())
        assert entered is manager
        [left] = await asyncio.gather(manager.__aexit__(None, None, None))
        assert left is None

    async def test_a_generator_that_is_collected_in_a_timeout(self):
        async def generate():
            async with timeout(60) as cm:
                managers.append(cm)
                yield

        managers = []
        generator = generate()
        await generator.__anext__()
        await generator.aclose()
        assert repr(managers[0]) == "<Timeout [finished]>"


class TestEnd:
    def test_a_loop_closed_over_a_live_timeout(self, new_loop):
        async def body():
            async with timeout(60):
                await forever()

        loop = new_loop()
        task = loop.create_task(body())
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        manager = None

        async def enter():
            nonlocal manager
            manager = timeout(60)
            await manager.__aenter__()

        loop.run_until_complete(enter())
        manager.__aexit__(None, None, None).close()
        loop.run_until_complete(manager.__aexit__(None, None, None))
        loop.close()
        with pytest.raises(RuntimeError):
            manager.reschedule(1)

    def test_a_loop_closed_over_live_timeouts_keeps_nothing(self, new_loop):
        class Probe:
            pass

        async def body(probe, delay):
            async with timeout(delay):
                await forever()

        async def start(a_probe):
            return [asyncio.ensure_future(body(a_probe, delay)) for delay in (60, None, math.inf, 0.5)]

        loop = new_loop()
        probe = Probe()
        ref = weakref.ref(probe)
        tasks = loop.run_until_complete(start(probe))
        loop.run_until_complete(asyncio.sleep(0))
        assert aiotools._aiotools._loop_counts(loop)[0] == 2
        loop.close()
        for task in tasks:
            # Nothing else can end them.
            task._log_destroy_pending = False
        loop_ref = weakref.ref(loop)
        del task, tasks, probe, loop
        new_loop.__self__.loops.clear()
        gc.collect()
        assert ref() is None and loop_ref() is None

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    @pytest.mark.parametrize("module", ["asyncio", "uvloop"])
    def test_fork_with_live_timeouts(self, module):
        """Those of the parent go on there; the child has none, and sets its own."""
        pytest.importorskip(module)
        code = f"""
            import aiotools, asyncio, {module}, os

            async def expire():
                try:
                    async with aiotools.timeout(0.001):
                        await asyncio.get_running_loop().create_future()
                except TimeoutError:
                    return True

            async def main():
                task = asyncio.create_task(expire())
                async with aiotools.timeout(60) as outer:
                    await asyncio.sleep(0)
                    pid = os.fork()
                    if pid == 0:
                        asyncio.events._set_running_loop(None)
                        fine = asyncio.run(expire()) and not outer.expired() and not task.done()
                        os._exit(0 if fine else 1)
                    assert await task
                    _, status = os.waitpid(pid, 0)
                    assert os.waitstatus_to_exitcode(status) == 0, status
                assert not outer.expired()

            loop = {module}.new_event_loop()
            loop.run_until_complete(main())
            loop.close()
        """
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr

    async def test_garbage_collection_at_every_moment(self):
        async def one(delay):
            async with timeout(60), timeout(delay):
                await forever()

        threshold = gc.get_threshold()
        gc.set_threshold(1)
        try:
            for delay in (0, 0.001):
                with pytest.raises(TimeoutError):
                    await one(delay)
            async with timeout(60) as cm:
                cm.reschedule(now() + 30)
        finally:
            gc.set_threshold(*threshold)

    async def test_another_clock_in_the_loop_leaves_what_remains(self):
        """What when() says goes by the clock of the loop, whenever the timeout was made and entered."""
        clock = aiotools.VirtualClock()
        clock.vtime = 5e8
        made_before = timeout(30)
        async with timeout(50) as entered_before:
            with clock.patch_loop():
                assert entered_before.when() == pytest.approx(5e8 + 50, abs=10)
                assert made_before.when() == pytest.approx(5e8 + 30, abs=10)
                with pytest.raises(TimeoutError):
                    async with made_before:
                        await forever()
                assert clock.vtime == pytest.approx(5e8 + 30, abs=10)
                entered_before.reschedule(clock.vtime + 3000)
                made_inside = timeout(20)
            assert entered_before.when() == pytest.approx(now() + 3000, abs=10)
            assert made_inside.when() == pytest.approx(now() + 20, abs=10)
            async with made_inside:
                await asyncio.sleep(0)
        assert not entered_before.expired() and not made_inside.expired()

    @pytest.mark.parametrize("module", ["asyncio", "uvloop"])
    def test_the_interpreter_ends_with_live_timeouts(self, module):
        pytest.importorskip(module)
        code = f"""
import asyncio, aiotools, {module}
async def body():
    async with aiotools.timeout(60):
        await asyncio.get_running_loop().create_future()
loop = {module}.new_event_loop()
tasks = [loop.create_task(body()) for _ in range(3)]
manager = aiotools.timeout_at(5)
loop.run_until_complete(asyncio.sleep(0))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    async def test_an_abandoned_task_is_collected_with_its_timeout(self):
        class Probe:
            pass

        async def body(probe):
            async with timeout(None):
                await forever()

        messages = []
        loop = asyncio.get_running_loop()
        # One that keeps the context would keep the task.
        loop.set_exception_handler(lambda loop, context: messages.append(context["message"]))
        probe = Probe()
        ref = weakref.ref(probe)
        loop.create_task(body(probe))
        await turns(2)
        del probe
        gc.collect()
        assert ref() is None
        assert messages == ["Task was destroyed but it is pending!"]


# --- the same random program with asyncio's timeouts gives the same trace ---


# A program is a list of steps; blocks nest.
STEPS = st.deferred(
    lambda: st.lists(
        st.one_of(
            st.just(("yield",)),
            st.just(("wait",)),
            st.tuples(st.just("raise"), st.sampled_from(["ValueError", "CancelledError"])),
            st.tuples(st.just("block"), st.sampled_from([None, -1, 5, 8]), STEPS),
            st.tuples(st.just("catch"), STEPS),
            st.tuples(st.just("reschedule"), st.sampled_from([None, -1, 5, 60])),
            st.just(("cancel soon",)),
            st.just(("uncancel",)),
        ),
        max_size=4,
    )
)


async def play(make_at, program):
    """Runs it in a task; returns what was seen. Deadlines: None, past (-1), and far (5..)."""
    trace = []
    task = None
    base = now()

    def at(offset):
        return None if offset is None else base + (offset if offset < 0 else 1000 * offset)

    async def run(steps, managers):
        for step in steps:
            trace.append((step[0], task.cancelling()))
            match step:
                case ("yield",):
                    await asyncio.sleep(0)
                case ("wait",):
                    asyncio.get_running_loop().call_later(0, (waiter := asyncio.Event()).set)
                    await waiter.wait()
                case ("raise", "ValueError"):
                    raise ValueError
                case ("raise", _):
                    raise asyncio.CancelledError
                case ("block", when, inner):
                    try:
                        async with make_at(at(when)) as cm:
                            await run(inner, [*managers, cm])
                    finally:
                        exc = sys.exc_info()[1]
                        trace.append((type(exc), cm.expired(), repr(cm), task.cancelling()))
                case ("catch", inner):
                    try:
                        await run(inner, managers)
                    except BaseException as exc:
                        # What 3.13 does with contexts, aiotools does on every version.
                        links = (type(exc.__context__), type(exc.__cause__)) if HAS_3_13_RULES else ()
                        trace.append(("caught", type(exc), *links))
                case ("reschedule", when):
                    for cm in managers[-1:]:
                        try:
                            cm.reschedule(at(when))
                        except RuntimeError as exc:
                            trace.append(str(exc))
                case ("cancel soon",):
                    asyncio.get_running_loop().call_soon(task.cancel)
                case ("uncancel",):
                    task.uncancel()

    async def start():
        nonlocal task
        task = current()
        await run(program, [])

    try:
        task = asyncio.get_running_loop().create_task(start())
        await task
    except BaseException as exc:
        trace.append(type(exc))
    trace.append(task.cancelling())
    return trace


@given(program=STEPS)
async def test_the_same_program_gives_the_same_trace(program):
    assert await play(timeout_at, program) == await play(asyncio.timeout_at, program)


async def test_cancelled_at_every_suspension():
    async def program():
        async with timeout(60):
            await asyncio.sleep(0)
            async with timeout(30):
                await asyncio.sleep(0)
            with contextlib.suppress(TimeoutError):
                async with timeout(0):
                    await forever()
            await asyncio.sleep(0)

    for point in range(1, 12):
        task = asyncio.create_task(program())
        await turns(point)
        was_done = task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled() or was_done
        assert task.cancelling() == (0 if was_done else 1)
    assert aiotools._aiotools._loop_counts(asyncio.get_running_loop())[0] == 0


class TestShields:
    async def test_a_timeout_inside_a_shield_interrupts_its_body(self):
        async with aiotools.ShieldScope():
            with pytest.raises(TimeoutError):
                async with timeout(0):
                    await forever()
        assert current().cancelling() == 0

    async def test_a_timeout_around_a_shield_waits_for_its_end(self):
        done = False
        with pytest.raises(TimeoutError):
            async with timeout(0) as cm:
                async with aiotools.ShieldScope():
                    await turns(5)
                    done = True
                await forever()
        assert done and cm.expired()
        assert current().cancelling() == 0

    async def test_a_request_that_the_shield_keeps_is_not_lost_and_does_not_end_the_timeout(self):
        async def body():
            async with aiotools.ShieldScope():
                task.cancel()
                with pytest.raises(TimeoutError):
                    async with timeout(0):
                        await forever()
                seen.append("timeout")
            seen.append("not reached")

        seen = []
        task = asyncio.get_running_loop().create_task(asyncio.sleep(0))
        await task

        async def start():
            nonlocal task
            task = current()
            await body()

        outer = asyncio.get_running_loop().create_task(start())
        with pytest.raises(asyncio.CancelledError):
            await outer
        assert seen == ["timeout"] and outer.cancelling() == 1
