"""VirtualClock: virtual time in the running loop."""

import asyncio
import contextlib
import contextvars
import gc
import inspect
import itertools
import math
import random
import signal
import socket
import sys
import threading
import time
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiotools
from aiotools import VirtualClock, _clock
from conftest import HAVE_UVLOOP, make_loop

PATCHED = ("time", "call_at", "call_later", "call_soon", "call_soon_threadsafe", "run_in_executor", "create_connection")


def replaced(loop):
    selector = getattr(loop, "_selector", None)
    return [name for name in PATCHED if name in vars(loop)] + [
        "select" for _ in [1] if selector is not None and "select" in vars(selector)
    ]


def real_now(loop):
    return time.monotonic()


async def turns(n=3):
    for _ in range(n):
        await asyncio.sleep(0)


class TestContract:
    def test_it_starts_at_zero_and_is_a_float(self):
        clock = VirtualClock()
        assert clock.vtime == 0.0 and type(clock.vtime) is float
        assert clock.virtual_time() == 0.0

    def test_it_takes_no_argument(self):
        assert str(inspect.signature(VirtualClock)) in ("()", "() -> 'VirtualClock'", "() -> VirtualClock")
        with pytest.raises(TypeError):
            VirtualClock(1)

    def test_vtime_can_be_set_to_any_finite_number(self):
        clock = VirtualClock()
        clock.vtime = 5
        assert clock.vtime == 5.0 and type(clock.vtime) is float
        clock.vtime = -1.5
        assert clock.virtual_time() == -1.5
        for bad, error in [(math.nan, ValueError), (math.inf, ValueError), ("1", TypeError), (None, TypeError)]:
            with pytest.raises(error, match="vtime"):
                clock.vtime = bad
        with pytest.raises(AttributeError):
            del clock.vtime
        assert clock.vtime == -1.5
        assert "-1.5" in repr(clock)

    def test_a_clock_is_an_ordinary_object(self):
        class Mine(VirtualClock):
            pass

        clock = Mine()
        clock.attribute = 1
        assert weakref.ref(clock)() is clock

    def test_patch_loop_needs_a_running_loop(self):
        with pytest.raises(RuntimeError, match="no running event loop"):
            with VirtualClock().patch_loop():
                pass

    async def test_time_jumps_to_the_next_deadline(self):
        clock = VirtualClock()
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        with clock.patch_loop() as given:
            assert given is clock
            assert loop.time() == 0.0
            await asyncio.sleep(3600)
            assert loop.time() == clock.vtime == 3600
            await aiotools.sleep(0.25)
            assert loop.time() == 3600.25
        assert time.monotonic() - began < 60
        assert clock.vtime == 3600.25

    async def test_the_real_clock_is_back_after_it(self):
        loop = asyncio.get_running_loop()
        with VirtualClock().patch_loop():
            await asyncio.sleep(100)
            assert replaced(loop)
        assert replaced(loop) == []
        assert abs(loop.time() - time.monotonic()) < 30
        await asyncio.sleep(0.001)

    async def test_vtime_survives_and_a_later_patch_goes_on(self):
        clock = VirtualClock()
        for n in range(3):
            with clock.patch_loop():
                await asyncio.sleep(10)
            assert clock.vtime == 10 * (n + 1)

    @pytest.mark.parametrize("start", [1.7e9, 1.7e9 + 1 / 3, -1e6, 2.0**52])
    async def test_large_values_work(self, start):
        clock = VirtualClock()
        clock.vtime = start
        fired = []
        with clock.patch_loop():
            loop = asyncio.get_running_loop()
            for n in range(100):
                await asyncio.sleep(1 if n % 2 else 0.001)
                await aiotools.sleep(2)
            loop.call_at(loop.time(), fired.append, "now")
            loop.call_at(loop.time() - 1, fired.append, "past")
            await turns()
            assert fired == ["now", "past"]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5):
                    await asyncio.sleep(1000)
        assert clock.vtime == pytest.approx(start + 50 + 0.05 + 200 + 5, abs=1e-4 if start < 1e15 else 200)

    async def test_setting_vtime_inside_makes_deadlines_due(self):
        clock = VirtualClock()
        fired = []
        with clock.patch_loop(manual=True):
            loop = asyncio.get_running_loop()
            loop.call_later(5, fired.append, 1)
            task = asyncio.create_task(aiotools.sleep(7, "slept"))
            await turns()
            clock.vtime = 6
            await turns(5)
            assert fired == [1]
            clock.vtime = 8
            assert await task == "slept"
            assert clock.vtime == 8

    async def test_patches_of_different_clocks_nest(self):
        outer, inner = VirtualClock(), VirtualClock()
        inner.vtime = 1000
        loop = asyncio.get_running_loop()
        with outer.patch_loop():
            await asyncio.sleep(1)
            with inner.patch_loop():
                assert loop.time() == 1000
                await asyncio.sleep(2)
                with outer.patch_loop():
                    await asyncio.sleep(3)
                    assert loop.time() == 4
                assert loop.time() == 1002
            assert loop.time() == 4
            await aiotools.sleep(4)
        assert (outer.vtime, inner.vtime) == (8, 1002)
        assert replaced(loop) == []

    async def test_patches_may_be_left_in_any_order(self):
        first, second = VirtualClock(), VirtualClock()
        second.vtime = 50
        loop = asyncio.get_running_loop()
        a, b = first.patch_loop(), second.patch_loop()
        a.__enter__()
        b.__enter__()
        a.__exit__(None, None, None)
        assert loop.time() == 50
        await asyncio.sleep(1)
        assert (first.vtime, second.vtime) == (0, 51)
        b.__exit__(None, None, None)
        assert replaced(loop) == []

    async def test_a_patch_is_for_one_use(self):
        patch = VirtualClock().patch_loop()
        with patch:
            pass
        with pytest.raises(RuntimeError, match="once"):
            patch.__enter__()
        with pytest.raises(RuntimeError, match="entered"):
            patch.__exit__(None, None, None)

    def test_a_clock_is_in_one_loop_at_a_time(self, new_loop):
        clock = VirtualClock()

        async def other():
            with clock.patch_loop():
                pass

        async def main():
            with clock.patch_loop():
                errors = []

                def run_other():
                    loop = new_loop()
                    try:
                        loop.run_until_complete(other())
                    except RuntimeError as exc:
                        errors.append(exc)
                    finally:
                        loop.close()

                await asyncio.to_thread(run_other)
                assert "another loop" in str(errors[0])

        loop = new_loop()
        loop.run_until_complete(main())
        loop.run_until_complete(loop.shutdown_default_executor())

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="io must be"):
            VirtualClock().patch_loop(io="never")
        with pytest.raises(TypeError):
            VirtualClock().patch_loop(True)


class TestOrder:
    async def test_equal_deadlines_come_in_the_order_of_setting(self):
        order = []
        with VirtualClock().patch_loop():
            loop = asyncio.get_running_loop()
            for n in range(50):
                loop.call_later(1, order.append, n)
            await asyncio.sleep(2)
        assert order == list(range(50))

    async def test_what_is_due_now_runs_with_what_is_ready(self):
        order = []
        with VirtualClock().patch_loop():
            loop = asyncio.get_running_loop()
            loop.call_soon(order.append, 1)
            loop.call_later(0, order.append, 2)
            loop.call_at(-5, order.append, 3)
            loop.call_soon(order.append, 4)
            await turns()
        assert order == [1, 2, 3, 4]

    async def test_nothing_is_early(self):
        rng = random.Random(4)
        with VirtualClock().patch_loop():
            loop = asyncio.get_running_loop()

            async def sleeper(sleep, delay):
                due = loop.time() + delay
                await sleep(delay)
                assert loop.time() == due

            jobs = [(rng.choice([asyncio.sleep, aiotools.sleep]), rng.random() * 10) for _ in range(500)]
            await asyncio.gather(*(sleeper(*job) for job in jobs))

    async def test_a_left_over_of_our_own_queue_moves_no_time(self):
        clock = VirtualClock()
        with clock.patch_loop():
            task = asyncio.create_task(aiotools.sleep(10))
            await turns()
            task.cancel()
            await asyncio.wait([task])
            seen = []
            asyncio.get_running_loop().call_later(50, lambda: seen.append(clock.vtime))
            await aiotools.sleep(100)
            assert seen == [50]
        clock = VirtualClock()
        with pytest.raises(RuntimeError, match="nothing can wake"):
            with clock.patch_loop():
                task = asyncio.create_task(aiotools.sleep(10))
                await turns()
                task.cancel()
                await asyncio.wait([task])
                await asyncio.get_running_loop().create_future()
        assert clock.vtime == 0

    async def test_many_short_sleeps(self):
        clock = VirtualClock()
        with clock.patch_loop():
            for _ in range(3600):
                await aiotools.sleep(0.01)
        assert clock.vtime == pytest.approx(36)


class TestHandles:
    async def test_they_look_like_those_of_asyncio(self):
        with VirtualClock().patch_loop():
            loop = asyncio.get_running_loop()
            calls = []
            handle = loop.call_at(5, calls.append, 1)
            assert handle.when() == 5 and not handle.cancelled()
            assert "when=5.0" in repr(handle)
            assert isinstance(handle.get_context(), contextvars.Context)
            handle.cancel()
            handle.cancel()
            assert handle.cancelled() and "cancelled" in repr(handle)
            late = loop.call_later(0, calls.append, 2)
            late.cancel()
            await asyncio.sleep(10)
            assert calls == []
            done = loop.call_later(1, calls.append, 3)
            await asyncio.sleep(2)
            assert calls == [3]
            done.cancel()

    async def test_callbacks_run_in_their_context(self):
        var = contextvars.ContextVar("var", default="outside")
        seen = []
        with VirtualClock().patch_loop():
            loop = asyncio.get_running_loop()
            context = contextvars.copy_context()
            context.run(var.set, "given")
            loop.call_later(1, lambda: seen.append(var.get()), context=context)
            var.set("at the call")
            loop.call_later(1, lambda: seen.append(var.get()))
            var.set("later")
            await asyncio.sleep(2)
        assert seen == ["given", "at the call"]

    async def test_callbacks_with_many_arguments(self):
        seen = []
        with VirtualClock().patch_loop():
            asyncio.get_running_loop().call_later(1, lambda *args: seen.append(args), *range(40))
            await asyncio.sleep(1)
        assert seen == [tuple(range(40))]

    async def test_a_callback_that_raises_is_reported(self, loop_errors):
        with VirtualClock().patch_loop():
            asyncio.get_running_loop().call_later(1, lambda: 1 / 0)
            await asyncio.sleep(2)
        loop_errors.take_one(ZeroDivisionError)

    async def test_wrong_arguments(self):
        with VirtualClock().patch_loop():
            loop = asyncio.get_running_loop()
            for method in (loop.call_at, loop.call_later):
                with pytest.raises(TypeError):
                    method(1)
                with pytest.raises(TypeError, match="number"):
                    method(None, print)
                with pytest.raises(ValueError, match="NaN"):
                    method(math.nan, print)
                with pytest.raises(TypeError, match="callable"):
                    method(1, "print")
                with pytest.raises(TypeError, match="keyword"):
                    method(1, print, other=1)
                with pytest.raises(TypeError, match="context"):
                    method(1, print, context=1)

    async def test_an_infinite_deadline_is_never(self):
        clock = VirtualClock()
        with clock.patch_loop():
            handle = asyncio.get_running_loop().call_at(math.inf, print)
            await asyncio.sleep(1)
            handle.cancel()
        assert clock.vtime == 1

    @pytest.mark.threads
    async def test_another_thread_is_refused(self):
        with VirtualClock().patch_loop():
            loop = asyncio.get_running_loop()
            handle = loop.call_later(1, print)

            def misuse():
                for call in (lambda: loop.call_later(1, print), handle.cancel):
                    with pytest.raises(RuntimeError, match="thread"):
                        call()

            await asyncio.to_thread(misuse)
            handle.cancel()

    def test_a_closed_loop_refuses(self, new_loop):
        loop = new_loop()
        loop_of = []

        async def main():
            patch = VirtualClock().patch_loop()
            patch.__enter__()
            asyncio.get_running_loop().call_later(1, print)
            loop_of.append(patch)

        loop.run_until_complete(main())
        loop.close()
        with pytest.raises(RuntimeError, match="closed"):
            loop.call_later(1, print)
        loop_of.pop().__exit__(None, None, None)
        assert replaced(loop) == []


class TestTimeouts:
    async def test_those_of_asyncio(self):
        with VirtualClock().patch_loop():
            loop = asyncio.get_running_loop()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(30):
                    await loop.create_future()
            assert loop.time() == 30
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.sleep(100), 20)
            assert loop.time() == 50
            done, pending = await asyncio.wait([asyncio.ensure_future(asyncio.sleep(5))], timeout=10)
            assert (len(done), len(pending), loop.time()) == (1, 0, 55)


# --- what is pending when a clock comes or goes --------------------------------------------------------------------


class TestRemainingDelay:
    async def test_what_asyncio_armed_before_stays_in_real_time(self):
        loop = asyncio.get_running_loop()
        fired = loop.create_future()
        began = real_now(loop)
        loop.call_later(0.02, fired.set_result, None)
        gone = loop.call_later(0.01, fired.set_exception, AssertionError("was cancelled"))
        later = loop.call_later(1000, fired.set_exception, AssertionError("is not due"))
        with VirtualClock().patch_loop() as clock:
            gone.cancel()
            await asyncio.sleep(1e9)
            # It comes after its real time and not before, however much virtual time goes by.
            await fired
            # uvloop rounds its own timers to the nearest millisecond.
            assert real_now(loop) >= began + 0.018
            assert clock.vtime == 1e9
        assert later.when() == pytest.approx(began + 1000, abs=10)
        later.cancel()

    async def test_a_real_timeout_around_the_block_guards_it(self):
        """Also when virtual time goes on without end."""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                with VirtualClock().patch_loop():
                    for _ in itertools.count():
                        await asyncio.sleep(1000)

    async def test_a_real_timeout_that_is_not_reached_does_not_fire_in_virtual_time(self):
        async with asyncio.timeout(60):
            with VirtualClock().patch_loop() as clock:
                await asyncio.sleep(86400)
                assert clock.vtime == 86400

    async def test_what_asyncio_armed_before_wakes_a_loop_that_has_nothing_else(self):
        loop = asyncio.get_running_loop()
        fired = loop.create_future()
        loop.call_later(0.02, fired.set_result, None)
        with VirtualClock().patch_loop(manual=True) as clock:
            await fired
            assert clock.vtime == 0

    async def test_what_asyncio_armed_before_goes_on_after_it(self):
        loop = asyncio.get_running_loop()
        fired = loop.create_future()
        loop.call_later(0.02, fired.set_result, None)
        with VirtualClock().patch_loop():
            await asyncio.sleep(1)
        await fired

    async def test_what_aiotools_armed_before_keeps_it(self):
        clock = VirtualClock()
        clock.vtime = 1e6
        tasks = [asyncio.create_task(aiotools.sleep(delay)) for delay in (1000, 2000, 3000)]
        await turns()
        with clock.patch_loop():
            await tasks[0]
            assert clock.vtime == pytest.approx(1e6 + 1000, abs=10)
            await tasks[1]
            assert clock.vtime == pytest.approx(1e6 + 2000, abs=10)
        real = asyncio.get_running_loop().time()
        tasks[2].cancel()
        await asyncio.wait(tasks)
        assert abs(asyncio.get_running_loop().time() - real) < 10

    async def test_what_was_armed_inside_goes_on_in_real_time(self):
        loop = asyncio.get_running_loop()
        clock = VirtualClock()
        clock.vtime = 5e8
        order = []
        with clock.patch_loop():
            tasks = [asyncio.create_task(sleep(0.02)) for sleep in (asyncio.sleep, aiotools.sleep)]
            loop.call_later(0.01, order.append, "first")
            far = loop.call_later(1000, order.append, "never")
            await turns()
            assert clock.vtime == 5e8
            began = real_now(loop)
            assert far.when() == 5e8 + 1000
        assert far.when() != 5e8 + 1000 or loop.time() > 1e8
        await asyncio.gather(*tasks)
        assert real_now(loop) - began >= 0.018
        assert order == ["first"]
        far.cancel()

    async def test_the_clocks_of_a_nest_do_the_same(self):
        outer, inner = VirtualClock(), VirtualClock()
        inner.vtime = 1e5
        with outer.patch_loop():
            long = asyncio.create_task(asyncio.sleep(100))
            ours = asyncio.create_task(aiotools.sleep(200))
            await asyncio.sleep(40)
            with inner.patch_loop():
                await long
                assert inner.vtime == 1e5 + 60
                await asyncio.sleep(10)
            await ours
            assert outer.vtime == 40 + (200 - 40 - 70)

    async def test_an_advance_that_is_left_alone_is_cancelled(self):
        clock = VirtualClock()
        with clock.patch_loop(manual=True):
            future = clock.advance(5)
        assert future.cancelled()
        assert clock.vtime == 0


class TestLeaving:
    async def test_while_a_delay_is_read(self):
        """call_later() went on with the clock that was there before, and crashed."""
        loop = asyncio.get_running_loop()
        leave = contextlib.ExitStack()
        leave.enter_context(VirtualClock().patch_loop())

        class Delay:
            def __float__(self):
                leave.close()
                return 0.0

        with contextlib.suppress(TypeError):
            # The loop's own takes it from there, and may want a genuine number.
            loop.call_later(Delay(), lambda: None).cancel()
        assert replaced(loop) == []

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="puts a method onto the loop")
    async def test_while_a_deadline_is_set(self, monkeypatch):
        loop = asyncio.get_running_loop()
        leave = contextlib.ExitStack()
        leave.enter_context(VirtualClock().patch_loop())

        def is_closed():
            leave.close()
            return False

        with monkeypatch.context() as patch:
            patch.setattr(loop, "is_closed", is_closed)
            with pytest.raises(RuntimeError, match="taken from the loop"):
                loop.call_at(5, lambda: None)
        assert replaced(loop) == []

    async def test_by_an_exception(self):
        loop = asyncio.get_running_loop()
        with pytest.raises(ZeroDivisionError):
            with VirtualClock().patch_loop():
                await asyncio.sleep(1)
                raise ZeroDivisionError
        assert replaced(loop) == []

    async def test_by_cancellation(self):
        loop = asyncio.get_running_loop()
        clock = VirtualClock()

        async def body():
            with clock.patch_loop(manual=True, detect_stuck=False):
                await asyncio.sleep(1000)

        task = asyncio.create_task(body())
        await turns()
        assert task.cancel("msg")
        with pytest.raises(asyncio.CancelledError, match="msg"):
            await task
        assert replaced(loop) == []

    def test_with_a_loop_stopped_in_the_middle(self, new_loop):
        loop = new_loop()
        clock = VirtualClock()

        async def body():
            with clock.patch_loop():
                await asyncio.sleep(5)
                loop.stop()
                await asyncio.sleep(5)

        task = loop.create_task(body())
        with pytest.raises(RuntimeError, match="stopped before"):
            loop.run_until_complete(task)
        assert clock.vtime == 5
        loop.run_until_complete(task)
        assert clock.vtime == 10
        assert replaced(loop) == []

    def test_with_a_coroutine_that_is_closed_when_no_loop_runs(self, new_loop):
        loop = new_loop()
        clock = VirtualClock()

        async def body():
            with clock.patch_loop():
                loop.call_later(1000, print)
                loop.stop()
                await loop.create_future()

        coro = body()
        loop.call_soon(coro.send, None)
        loop.run_forever()
        assert replaced(loop)
        coro.close()
        assert replaced(loop) == []

    @pytest.mark.loop_kinds("debug", reason="measures steps")
    async def test_asyncio_does_not_call_the_step_slow(self, caplog):
        loop = asyncio.get_running_loop()
        limit = loop.slow_callback_duration
        clock = VirtualClock()
        for _ in range(3):
            with clock.patch_loop():
                await asyncio.sleep(1)
            with clock.patch_loop():
                clock.vtime = 0
            await turns()
        assert caplog.records == []
        assert loop.slow_callback_duration == limit

    async def test_what_somebody_put_over_ours_stays(self):
        loop = asyncio.get_running_loop()
        with VirtualClock().patch_loop():
            ours = loop.time
            loop.time = lambda: ours() + 1
            put_over = loop.time
            assert loop.time() == 1
        assert vars(loop)["time"] is put_over
        assert abs(loop.time() - 1 - time.monotonic()) < 30
        del loop.time

    async def test_what_was_patched_before_comes_back(self):
        loop = asyncio.get_running_loop()
        real = loop.time
        loop.time = before = lambda: real() + 1000
        clock = VirtualClock()
        with clock.patch_loop():
            await asyncio.sleep(1)
        assert loop.time is before
        del loop.time

    async def test_references_to_the_methods_go_on_working(self):
        loop = asyncio.get_running_loop()
        with VirtualClock().patch_loop():
            call_later, call_at, call_soon, now = loop.call_later, loop.call_at, loop.call_soon, loop.time
        assert abs(now() - time.monotonic()) < 30
        done = loop.create_future()
        call_later(0.001, call_soon, call_at, now() + 0.001, done.set_result, 1)
        assert await done == 1

    def test_an_abandoned_loop_is_collected(self, new_loop):
        async def main():
            patch = VirtualClock().patch_loop()
            patch.__enter__()

        def run():
            loop = asyncio.new_event_loop()
            loop.run_until_complete(main())
            loop.close()
            return weakref.ref(loop)

        gone = run()
        gc.collect()
        assert gone() is None


# --- nothing can wake the loop -------------------------------------------------------------------------------------


async def forever():
    await asyncio.get_running_loop().create_future()


class TestStuck:
    async def test_it_ends_the_block_and_names_what_waits(self):
        loop = asyncio.get_running_loop()
        asyncio.current_task().set_name("the main one")
        other = asyncio.create_task(forever(), name="the other one")
        clock = VirtualClock()
        with pytest.raises(RuntimeError) as info:
            with clock.patch_loop():
                await asyncio.sleep(5)
                await loop.create_future()
        text = str(info.value)
        assert "nothing can wake the event loop" in text
        assert "the main one" in text and "the other one (forever at test_clock.py:" in text
        assert clock.vtime == 5
        assert asyncio.current_task().cancelling() == 0
        assert replaced(loop) == []
        other.cancel()
        await asyncio.wait([other])

    async def test_in_manual_mode_it_says_so(self):
        with pytest.raises(RuntimeError, match=r"no advance\(\) of the clock"):
            with VirtualClock().patch_loop(manual=True):
                await asyncio.sleep(1)

    async def test_a_cancellation_from_outside_goes_first(self):
        async def body():
            with VirtualClock().patch_loop():
                try:
                    await forever()
                except asyncio.CancelledError:
                    asyncio.current_task().cancel()
                    raise

        task = asyncio.create_task(body())
        await asyncio.wait([task])
        assert task.cancelled()

    async def test_an_exception_of_the_body_goes_first(self):
        with pytest.raises(ZeroDivisionError):
            with VirtualClock().patch_loop():
                try:
                    await forever()
                finally:
                    raise ZeroDivisionError
        assert asyncio.current_task().cancelling() == 0

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="the error comes through the selector")
    def test_without_a_task_to_tell_it_ends_the_run(self, new_loop):
        loop = new_loop()
        clock = VirtualClock()
        patches = []

        async def enter():
            patches.append(clock.patch_loop())
            patches[0].__enter__()

        loop.run_until_complete(enter())
        task = loop.create_task(forever())
        with pytest.raises(RuntimeError, match="nothing can wake"):
            loop.run_until_complete(task)
        patches[0].__exit__(None, None, None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)

    @pytest.mark.loop_kinds("uvloop", reason="no exception but an exit goes through it")
    def test_without_a_task_to_tell_uvloop_reports_it_and_stops(self, new_loop, loop_errors):
        loop = new_loop()
        patches = []

        async def enter():
            patches.append(VirtualClock().patch_loop())
            patches[0].__enter__()

        loop.run_until_complete(enter())
        task = loop.create_task(forever())
        with pytest.raises(RuntimeError, match="stopped"):
            loop.run_until_complete(task)
        loop_errors.take_one(RuntimeError, match="nothing can wake")
        patches[0].__exit__(None, None, None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)

    async def test_a_body_that_swallows_it_is_told_harder(self, loop_kind, loop_errors):
        if loop_kind == "uvloop":
            return
        loop = asyncio.new_event_loop()

        async def body():
            with VirtualClock().patch_loop():
                with contextlib.suppress(asyncio.CancelledError):
                    await forever()
                await forever()

        def run():
            task = loop.create_task(body())
            with pytest.raises(RuntimeError, match="nothing can wake"):
                loop.run_until_complete(task)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, RuntimeError):
                loop.run_until_complete(task)
            loop.close()

        await asyncio.to_thread(run)

    @pytest.mark.threads
    async def test_switched_off_it_waits_for_other_threads(self):
        loop = asyncio.get_running_loop()
        with VirtualClock().patch_loop(detect_stuck=False):
            future = loop.create_future()
            thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(future.set_result, 1))
            loop.call_soon(thread.start)
            assert await future == 1
            thread.join()

    @pytest.mark.skipif(sys.platform == "win32", reason="no signal handlers of loops there")
    def test_a_signal_handler_can_wake_it(self, run):
        async def main():
            loop = asyncio.get_running_loop()
            with VirtualClock().patch_loop():
                future = loop.create_future()
                loop.add_signal_handler(signal.SIGUSR1, future.set_result, "signal")
                timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGUSR1])
                timer.start()
                assert await future == "signal"
                timer.join()
                loop.remove_signal_handler(signal.SIGUSR1)

        run(main())

    async def test_a_subprocess_can_wake_it(self):
        with VirtualClock().patch_loop():
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(0.05)")
            assert await process.wait() == 0
        # Its transport is closed by calls that come one after the other.
        await turns(5)


# --- what holds time -----------------------------------------------------------------------------------------------


class TestOutside:
    async def test_an_executor_job_holds_time(self):
        clock = VirtualClock()
        with clock.patch_loop():
            loop = asyncio.get_running_loop()
            ticks = []
            loop.call_later(1, ticks.append, 1)
            gate = threading.Event()
            job = loop.run_in_executor(None, gate.wait, 10)
            await turns(20)
            assert (ticks, clock.vtime) == ([], 0)
            gate.set()
            assert await job is True
            assert clock.vtime == 0
            await asyncio.sleep(2)
            assert ticks == [1]

    async def test_it_holds_also_with_nothing_else(self):
        with VirtualClock().patch_loop() as clock:
            assert await asyncio.to_thread(time.sleep, 0.02) is None
            assert clock.vtime == 0

    async def test_an_executor_job_does_not_hold_time_if_asked(self):
        gate = threading.Event()
        with VirtualClock().patch_loop(executor=False) as clock:
            job = asyncio.ensure_future(asyncio.to_thread(gate.wait, 10))
            await asyncio.sleep(100)
            assert clock.vtime == 100
            gate.set()
            await job

    async def test_a_cancelled_job_holds_it_no_more(self):
        gate = threading.Event()
        with VirtualClock().patch_loop() as clock:
            job = asyncio.get_running_loop().run_in_executor(None, gate.wait, 10)
            job.cancel()
            await asyncio.sleep(100)
            assert clock.vtime == 100
            gate.set()

    async def test_hold_holds_it(self):
        clock = VirtualClock()
        with pytest.raises(RuntimeError, match="not patched"):
            with clock.hold():
                pass
        with clock.patch_loop():
            loop = asyncio.get_running_loop()
            late = loop.call_later(1, print)
            future = loop.create_future()
            with clock.hold():
                thread = threading.Timer(0.02, loop.call_soon_threadsafe, [future.set_result, 1])
                thread.start()
                assert await future == 1
            assert clock.vtime == 0
            thread.join()
            late.cancel()

    async def test_real_sockets_work_at_their_own_speed(self):
        async def serve(reader, writer):
            while line := await reader.readline():
                writer.write(line.upper())
            writer.close()

        with VirtualClock().patch_loop() as clock:
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for n in range(20):
                # No deadline is set meanwhile: how fast a network stack delivers, even its own loopback, is its affair.
                writer.write(b"hello %d\n" % n)
                assert await reader.readline() == b"HELLO %d\n" % n
            assert clock.vtime == 0
            # A read that is merely registered does not hold time.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(60):
                    await reader.readline()
            assert clock.vtime == 60
            writer.close()
            await writer.wait_closed()
            server.close()
            await server.wait_closed()
            await turns(5)

    async def test_what_can_be_read_goes_before_time(self):
        """What was written to a socket pair can be read at once."""
        ours, theirs = socket.socketpair()
        with ours, theirs, VirtualClock().patch_loop() as clock:
            loop = asyncio.get_running_loop()
            ours.setblocking(False)
            for n in range(20):
                async with asyncio.timeout(1):
                    loop.call_soon(theirs.send, b"%d" % n)
                    assert await loop.sock_recv(ours, 10) == b"%d" % n
            assert clock.vtime == 0

    async def test_with_no_deadline_it_waits_for_the_read(self):
        ours, theirs = socket.socketpair()
        with ours, theirs, VirtualClock().patch_loop() as clock:
            loop = asyncio.get_running_loop()
            ours.setblocking(False)
            thread = threading.Timer(0.02, theirs.send, [b"x"])
            thread.start()
            assert await loop.sock_recv(ours, 1) == b"x"
            assert clock.vtime == 0
            thread.join()

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="uvloop does not show its I/O")
    async def test_a_registered_read_holds_time_if_asked(self):
        ours, theirs = socket.socketpair()
        with ours, theirs, VirtualClock().patch_loop(io="hold") as clock:
            loop = asyncio.get_running_loop()
            ours.setblocking(False)
            late = loop.call_later(1, print)
            thread = threading.Timer(0.02, theirs.send, [b"x"])
            thread.start()
            assert await loop.sock_recv(ours, 1) == b"x"
            assert clock.vtime == 0
            late.cancel()
            thread.join()
            await asyncio.sleep(5)
            assert clock.vtime == 5

    @pytest.mark.loop_kinds("uvloop", reason="the others can")
    async def test_uvloop_refuses_to(self):
        with pytest.raises(RuntimeError, match=r"uvloop\.Loop"):
            with VirtualClock().patch_loop(io="hold"):
                pass
        assert replaced(asyncio.get_running_loop()) == []

    async def test_io_that_is_ready_may_be_ignored(self):
        ours, theirs = socket.socketpair()
        with ours, theirs, VirtualClock().patch_loop(io="ignore") as clock:
            theirs.send(b"x")
            ours.setblocking(False)
            read = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(ours, 1))
            await asyncio.sleep(100)
            assert clock.vtime == 100
            assert await read == b"x"

    @pytest.mark.skipif(not HAVE_UVLOOP, reason="needs uvloop")
    @pytest.mark.loop_kinds("uvloop", reason="of a loop that is probed")
    async def test_a_loop_that_hides_its_queue_is_probed_longer(self, monkeypatch):
        monkeypatch.setattr(_clock, "_ready_queue", lambda loop: None)
        with VirtualClock().patch_loop() as clock:
            for _ in range(10):
                await asyncio.sleep(1)
                await asyncio.to_thread(int)
            assert clock.vtime == 10

    async def test_a_call_from_a_thread_runs_before_the_jump(self):
        with VirtualClock().patch_loop() as clock:
            loop = asyncio.get_running_loop()
            for _ in range(50):
                seen = []

                def job(loop=loop, seen=seen):
                    loop.call_soon_threadsafe(lambda: seen.append(clock.vtime))

                late = loop.call_later(1, print)
                before = clock.vtime
                await asyncio.to_thread(job)
                # A job that is done at once is not waited for at all.
                await turns(1)
                late.cancel()
                assert seen == [before] and clock.vtime == before


class TestManual:
    async def test_time_stands_still_until_it_is_moved(self):
        clock = VirtualClock()
        with clock.patch_loop(manual=True):
            loop = asyncio.get_running_loop()
            ticks = []

            async def ticker():
                while True:
                    await aiotools.sleep(1)
                    ticks.append(loop.time())

            task = asyncio.create_task(ticker())
            await turns(20)
            assert (ticks, clock.vtime) == ([], 0)
            await clock.advance(0.5)
            assert (ticks, clock.vtime) == ([], 0.5)
            await clock.advance(3)
            assert (ticks, clock.vtime) == ([1, 2, 3], 3.5)
            # What is due at the very time is done when it is reached.
            await clock.advance(0.5)
            assert (ticks, clock.vtime) == ([1, 2, 3, 4], 4)
            await clock.advance(0)
            assert clock.vtime == 4
            task.cancel()
            await asyncio.wait([task])

    async def test_it_moves_also_if_it_is_not_awaited(self):
        clock = VirtualClock()
        with clock.patch_loop(manual=True):
            clock.advance(10)
            await asyncio.sleep(7)
            assert clock.vtime == 7

    async def test_two_at_once(self):
        clock = VirtualClock()
        with clock.patch_loop(manual=True):
            near, far = clock.advance(1), clock.advance(2)
            await far
            assert near.done() and clock.vtime == 2

    async def test_one_that_is_cancelled_moves_nothing(self):
        clock = VirtualClock()
        with clock.patch_loop(manual=True, detect_stuck=False):
            clock.advance(5).cancel()
            await turns(20)
            assert clock.vtime == 0

    async def test_in_automatic_mode_it_is_a_sleep_that_ends_last(self):
        clock = VirtualClock()
        with clock.patch_loop():
            seen = []
            moved = clock.advance(5)
            asyncio.get_running_loop().call_later(5, seen.append, 1)
            await moved
            assert (seen, clock.vtime) == ([1], 5)

    async def test_wrong_use(self):
        clock = VirtualClock()
        for bad, error in [(-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("x", TypeError)]:
            with pytest.raises(error, match="seconds"):
                clock.advance(bad)
        with pytest.raises(TypeError):
            clock.advance(None)
        with pytest.raises(RuntimeError, match="not patched"):
            clock.advance(1)

    @pytest.mark.threads
    async def test_from_another_loop_it_is_refused(self):
        clock = VirtualClock()

        async def other():
            clock.advance(1)

        with clock.patch_loop():
            with pytest.raises(RuntimeError, match="another loop"):
                await asyncio.to_thread(asyncio.run, other())


class TestFakeTime:
    async def test_only_on_request(self):
        clock = VirtualClock()
        with clock.patch_loop():
            assert time.time() > 1e9
        clock.vtime = 1.5
        real = time.monotonic, time.time
        with clock.patch_loop(fake_time=True):
            assert time.time() == time.monotonic() == 1.5
            assert time.time_ns() == time.monotonic_ns() == 1_500_000_000
            await asyncio.sleep(60)
            assert time.monotonic() == 61.5
            held = time.monotonic
            # Other threads keep the real one.
            assert await asyncio.to_thread(lambda: time.time()) > 1e9
            inner = VirtualClock()
            with inner.patch_loop(fake_time=True):
                assert time.time() == 0
            assert time.time() == 61.5
        assert (time.monotonic, time.time) == real
        assert held() == pytest.approx(time.monotonic(), abs=30)

    async def test_what_somebody_put_over_it_stays(self, monkeypatch):
        with monkeypatch.context() as patch:
            with VirtualClock().patch_loop(fake_time=True):
                patch.setattr(time, "time", lambda: 42)
            assert time.time() == 42
        time.time = type(time)("time").__dict__.get("time", REAL_TIME)
        assert time.time() > 1e9


REAL_TIME = time.time


class TestOtherLoops:
    def refusing_loop(self, refused):
        class Refusing(asyncio.SelectorEventLoop):
            def __setattr__(self, name, value):
                if name in refused:
                    raise AttributeError(name)
                super().__setattr__(name, value)

        return Refusing()

    @pytest.mark.parametrize("refused", ["time", "call_later", "run_in_executor"])
    def test_one_whose_methods_cannot_be_replaced_is_refused_by_name(self, refused):
        loop = self.refusing_loop([refused])

        async def main():
            with VirtualClock().patch_loop():
                pass

        try:
            with pytest.raises(RuntimeError, match=r"test_clock\..*Refusing"):
                loop.run_until_complete(main())
            assert replaced(loop) == []
        finally:
            loop.close()

    def test_a_subclass_of_the_default_loop_works(self):
        class Mine(asyncio.SelectorEventLoop):
            pass

        loop = Mine()

        async def main():
            with VirtualClock().patch_loop() as clock:
                await asyncio.sleep(100)
                return clock.vtime

        try:
            assert loop.run_until_complete(main()) == 100
        finally:
            loop.close()


# --- the same trace on each loop -----------------------------------------------------------------------------------

# Few different values, so that deadlines meet.
DELAYS = st.sampled_from([0, 0.001, 0.0015, 0.01, 0.25, 1, 1, 1, 2, 3, 1e4])
STEPS = st.one_of(
    st.tuples(st.just("sleep"), DELAYS),
    st.tuples(st.just("our_sleep"), DELAYS),
    st.tuples(st.just("sleep_until"), DELAYS),
    st.tuples(st.just("checkpoint"), st.just(0)),
    st.tuples(st.just("timeout"), DELAYS),
    st.tuples(st.just("wait_for"), DELAYS),
    st.tuples(st.just("call_later"), DELAYS),
    st.tuples(st.just("cancelled_timer"), DELAYS),
    st.tuples(st.just("executor"), st.just(0)),
    st.tuples(st.just("socket"), st.just(0)),
    st.tuples(st.just("spawn"), DELAYS),
    st.tuples(st.just("cancel"), DELAYS),
    *([st.tuples(st.just("our_timeout"), DELAYS)] if hasattr(aiotools, "timeout") else []),
    *([st.tuples(st.just("timer"), st.sampled_from([0.3, 1, 2]))] if hasattr(aiotools, "create_timer") else []),
)
PROGRAMS = st.lists(st.lists(STEPS, min_size=1, max_size=6), min_size=1, max_size=5)


async def run_program(program):
    """Each list of steps is a task; the trace is what happened when."""
    loop = asyncio.get_running_loop()
    trace = []
    clock = VirtualClock()

    def note(*what):
        trace.append((loop.time(), *what))

    async def do(name, number, step, delay):
        match step:
            case "sleep":
                await asyncio.sleep(delay)
            case "our_sleep":
                await aiotools.sleep(delay)
            case "sleep_until":
                await aiotools.sleep_until(delay)
            case "checkpoint":
                await aiotools.checkpoint()
            case "timeout":
                async with asyncio.timeout(delay):
                    await aiotools.sleep(1)
            case "our_timeout":
                async with aiotools.timeout(delay):
                    await asyncio.sleep(1)
            case "wait_for":
                await asyncio.wait_for(aiotools.sleep(2), delay)
            case "call_later":
                loop.call_later(delay, note, name, number, "called")
            case "cancelled_timer":
                handle = loop.call_later(delay, note, name, number, "should not be called")
                loop.call_soon(handle.cancel)
            case "executor":
                note(name, "result", await loop.run_in_executor(None, pow, 2, 3))
            case "socket":
                ours, theirs = socket.socketpair()
                with ours, theirs:
                    ours.setblocking(False)
                    theirs.setblocking(False)
                    await loop.sock_sendall(ours, b"x")
                    note(name, "received", await loop.sock_recv(theirs, 1))
            case "spawn":
                await asyncio.gather(asyncio.sleep(delay), aiotools.sleep(delay), asyncio.sleep(0))
            case "cancel":
                task = asyncio.create_task(asyncio.sleep(1e6))
                loop.call_later(delay, task.cancel)
                await asyncio.wait([task])
            case "timer":
                ticks = []

                async def tick():
                    note(name, number, "tick")
                    ticks.append(1)
                    if len(ticks) == 3:
                        timer.cancel()

                timer = aiotools.create_timer(lambda interval: tick(), delay)
                await asyncio.wait([timer])

    async def runner(name, steps):
        for number, (step, delay) in enumerate(steps):
            try:
                await do(name, number, step, delay)
            except TimeoutError:
                note(name, number, "timed out")
            else:
                note(name, number, step)

    # Threads and sockets answer when they like: within one moment, the order is not ours to say then.
    outside = any(step in ("executor", "socket") for steps in program for step, _ in steps)
    with clock.patch_loop():
        await asyncio.gather(*(runner(name, steps) for name, steps in enumerate(program)))
        await asyncio.sleep(1e5)
    return sorted(trace, key=repr) if outside else trace


class TestTrace:
    # Not in debug mode: there, each wake-up of aiotools has a handle of its own, and other neighbours.

    def run_on(self, kind, program):
        loop = make_loop(kind)
        try:
            return loop.run_until_complete(run_program(program))
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    @given(program=PROGRAMS)
    def test_it_is_the_same_each_time_and_on_each_loop(self, program):
        expected = self.run_on("default", program)
        assert self.run_on("default", program) == expected
        if HAVE_UVLOOP:
            assert self.run_on("uvloop", program) == expected


def test_the_pattern_of_the_documentation_works_in_a_plain_test():
    """No fixture and no plugin: a test may use asyncio.run."""

    async def main():
        clock = VirtualClock()
        with clock.patch_loop():
            await asyncio.sleep(86400)
        return clock.vtime

    assert asyncio.run(main()) == 86400


class TestWhatAcceptanceFound:
    async def test_advance_names_the_type_that_is_no_number(self):
        clock = VirtualClock()
        with clock.patch_loop():
            for value in (None, "x", []):
                with pytest.raises(TypeError, match=f"seconds must be a number, not '{type(value).__name__}'"):
                    clock.advance(value)

    def test_a_loop_without_a_clock_is_refused_by_name(self):
        class Bare(asyncio.AbstractEventLoop):
            pass

        asyncio._set_running_loop(Bare())
        try:
            with pytest.raises(RuntimeError, match=r"VirtualClock cannot work on .*Bare"):
                VirtualClock().patch_loop().__enter__()
        finally:
            asyncio._set_running_loop(None)
