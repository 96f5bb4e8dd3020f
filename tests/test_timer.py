"""create_timer, TimerDelayPolicy, Timer: contract, policy, methods, bad input, bad times."""

import asyncio
import contextlib
import contextvars
import gc
import inspect
import io
import math
import os
import random
import subprocess
import sys
import textwrap
import time
import warnings
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model.clock import HandClock
from model.timer import TimerModel

import aiotools
from aiotools import Timer, TimerDelayPolicy, create_timer
from aiotools.timer import TimerStats

HAVE_EAGER_START = sys.version_info >= (3, 12)
var = contextvars.ContextVar("var", default="unset")


async def stop(timer):
    timer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await timer
    assert timer.done()


async def turns(n=3):
    for _ in range(n):
        await asyncio.sleep(0)


class Ticks:
    """A callback whose ticks run until the test ends them."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.started = []
        self.futures = []
        self.stubborn = set()
        self.cancelled = []

    async def __call__(self, interval):
        number = len(self.started)
        self.started.append(self.loop.time())
        self.futures.append(self.loop.create_future())
        while True:
            try:
                return await asyncio.shield(self.futures[number])
            except asyncio.CancelledError:
                self.cancelled.append(number)
                if number not in self.stubborn:
                    raise

    def end(self, number):
        if not self.futures[number].done():
            self.futures[number].set_result(None)

    def fail(self, number, exc):
        self.futures[number].set_exception(exc)


def counting():
    """A callback whose ticks end at once, and the list of the times at which they ran."""
    times = []

    async def tick(interval):
        times.append(asyncio.get_running_loop().time())

    return tick, times


@contextlib.contextmanager
def hand_clock():
    with HandClock().patch() as clock:
        yield clock


class TestContract:
    async def test_it_is_a_task_and_a_timer(self):
        tick, _ = counting()
        timer = create_timer(tick, 60)
        assert isinstance(timer, asyncio.Task) and type(timer) is Timer is aiotools.Timer
        assert timer in asyncio.all_tasks()
        assert asyncio.iscoroutine(timer.get_coro())
        assert asyncio.isfuture(timer)
        assert "<Timer pending" in repr(timer)
        timer.print_stack(file=io.StringIO())
        await stop(timer)

    async def test_the_first_tick_is_made_when_the_timer_task_first_runs(self):
        """Also on a loop whose task factory is eager: factories do not apply to the timer itself."""
        calls = []

        def cb(interval):
            calls.append(interval)
            return asyncio.sleep(0)

        timer = create_timer(cb, 60)
        assert calls == []
        await turns(1)
        assert calls == [60]
        await stop(timer)

    async def test_all_four_arguments_may_be_positional_and_loop_is_ignored(self):
        tick, times = counting()
        timer = create_timer(tick, 60, TimerDelayPolicy.DEFAULT, "no loop at all")
        await turns()
        assert len(times) == 1
        await stop(timer)

    def test_the_signature_is_that_of_the_contract(self):
        parameters = inspect.signature(create_timer).parameters
        assert list(parameters)[:4] == ["cb", "interval", "delay_policy", "loop"]
        assert parameters["delay_policy"].default is TimerDelayPolicy.DEFAULT
        assert parameters["loop"].default is None
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[4:])
        assert (TimerDelayPolicy.DEFAULT.value, TimerDelayPolicy.CANCEL.value) == (0, 1)

    def test_without_a_running_loop_it_is_a_runtime_error(self):
        with pytest.raises(RuntimeError, match="no running event loop"):
            create_timer(counting()[0], 1)

    async def test_the_timer_is_the_current_task_in_its_callback_and_each_tick_is_a_task_of_its_own(self):
        seen = []

        async def tick(interval):
            seen.append(asyncio.current_task())

        def cb(interval):
            seen.append(asyncio.current_task())
            return tick(interval)

        with hand_clock() as clock:
            timer = create_timer(cb, 1)
            await clock.advance(2)
            await stop(timer)
        assert seen[0] is seen[2] is seen[4] is timer
        assert len({id(task) for task in seen}) == 4
        assert asyncio.current_task() not in seen

    async def test_ticks_come_every_interval_and_may_pile_up(self):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 1)
            await clock.advance(3.5)
            assert ticks.started == [1000, 1001, 1002, 1003]
            assert ticks.cancelled == []
            await stop(timer)
        assert sorted(ticks.cancelled) == [0, 1, 2, 3]

    async def test_cancel_policy_cancels_the_previous_tick_before_the_next(self):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 1, TimerDelayPolicy.CANCEL)
            await clock.advance(2)
            assert ticks.started == [1000, 1001, 1002]
            assert ticks.cancelled == [0, 1]
            await stop(timer)

    async def test_cancel_policy_waits_for_a_slow_cleanup(self):
        log = []

        async def tick(interval):
            number = len(log)
            log.append("start")
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.5 if number == 0 else 0)
                log.append("end")

        with hand_clock() as clock:
            timer = create_timer(tick, 1, TimerDelayPolicy.CANCEL)
            await clock.advance(1.25)
            assert log == ["start"]
            await clock.advance(0.5)
            assert log == ["start", "end", "start"]
            await clock.advance(0.5)
            assert log == ["start", "end", "start", "end", "start"], "the phase is kept"
            await stop(timer)

    async def test_a_tick_that_fails_is_reported_and_the_timer_goes_on(self, loop_errors):
        async def tick(interval):
            raise ValueError("tick")

        with hand_clock() as clock:
            timer = create_timer(tick, 1)
            await clock.advance(1)
            assert not timer.done()
            await stop(timer)
        contexts = loop_errors.take()
        assert len(contexts) == 2
        for context in contexts:
            assert isinstance(context["exception"], ValueError)
            assert isinstance(context["task"], asyncio.Task) and context["task"] is not timer
            assert isinstance(context["message"], str)

    @pytest.mark.parametrize("when", [0, 1])
    async def test_a_callback_that_raises_ends_the_timer_after_its_ticks(self, when):
        with hand_clock() as clock:
            ticks = Ticks()

            def cb(interval):
                if len(ticks.started) > when:
                    raise LookupError("cb")
                return ticks(interval)

            timer = create_timer(cb, 1)
            await clock.advance(3)
            assert ticks.cancelled == list(range(when + 1))
            with pytest.raises(LookupError, match="cb"):
                await timer
            assert timer.done() and not timer.cancelled()

    async def test_a_first_callback_that_raises_ends_the_timer(self):
        def cb(interval):
            raise LookupError("cb")

        with pytest.raises(LookupError):
            await create_timer(cb, 1)

    @pytest.mark.parametrize("value", [None, 5, "future"])
    async def test_a_callback_that_returns_no_coroutine_ends_the_timer(self, value):
        def cb(interval):
            return asyncio.get_running_loop().create_future() if value == "future" else value

        with pytest.raises(TypeError, match="a coroutine was expected"):
            await create_timer(cb, 1)

    async def test_any_coroutine_will_do(self):
        with hand_clock() as clock:
            timer = create_timer(aiotools.sleep, 1)
            await clock.advance(3)
            assert timer.stats().ticks == 4
            await stop(timer)

    async def test_cancelling_cancels_and_awaits_all_ticks_and_ends_cancelled(self):
        ended = []

        async def tick(interval):
            try:
                await asyncio.sleep(60)
            finally:
                await turns()
                ended.append(asyncio.current_task())

        with hand_clock() as clock:
            timer = create_timer(tick, 1)
            await clock.advance(2)
            timer.cancel("enough")
            with pytest.raises(asyncio.CancelledError, match="enough"):
                await timer
        assert len(ended) == 3
        assert timer.cancelled()

    async def test_a_timer_cancelled_before_its_first_step_never_ticks(self):
        tick, times = counting()
        timer = create_timer(tick, 1)
        assert timer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await timer
        assert times == [] and timer.stats().ticks == 0

    async def test_no_tick_starts_after_cancel(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1)
            await turns()
            clock.now += 1
            # The timer is due in the same turn in which it learns that it is cancelled.
            timer.cancel()
            await clock.settle()
            assert len(times) == 1
            assert timer.cancelled()

    async def test_a_tick_that_swallows_the_end_is_waited_for(self):
        with hand_clock() as clock:
            ticks = Ticks()
            ticks.stubborn.add(0)
            timer = create_timer(ticks, 10)
            await clock.settle()
            timer.cancel()
            await clock.settle()
            assert ticks.cancelled == [0] and not timer.done()
            ticks.end(0)
            await clock.settle()
            assert timer.cancelled()

    async def test_cancelled_again_while_it_waits_for_ticks_it_passes_that_on(self):
        with hand_clock() as clock:
            ticks = Ticks()
            ticks.stubborn.add(0)
            timer = create_timer(ticks, 10)
            await clock.settle()
            timer.cancel()
            await clock.settle()
            timer.cancel("again")
            await clock.settle()
            assert ticks.cancelled == [0, 0] and not timer.done()
            ticks.end(0)
            with pytest.raises(asyncio.CancelledError, match="again"):
                await timer

    async def test_cancelled_while_it_ends_with_an_error_it_ends_cancelled_and_reports_the_error(self, loop_errors):
        with hand_clock() as clock:
            ticks = Ticks()
            ticks.stubborn.add(0)

            def cb(interval):
                if ticks.started:
                    raise LookupError("cb")
                return ticks(interval)

            timer = create_timer(cb, 1)
            await clock.advance(1)
            assert ticks.cancelled == [0] and not timer.done()
            timer.cancel()
            await clock.settle()
            ticks.end(0)
            with pytest.raises(asyncio.CancelledError) as caught:
                await timer
        context = loop_errors.take_one(LookupError)
        assert caught.value.__context__ is context["exception"]

    async def test_ticks_go_through_the_task_factory_of_the_loop(self, loop_kind):
        loop = asyncio.get_running_loop()
        made = []

        def factory(loop, coro, **kwargs):
            made.append(coro.__name__)
            return asyncio.Task(coro, loop=loop, **kwargs)

        async def a_tick(interval):
            pass

        before = loop.get_task_factory()
        loop.set_task_factory(factory)
        try:
            timer = create_timer(a_tick, 60)
            await turns()
            await stop(timer)
        finally:
            loop.set_task_factory(before)
        assert made == ["a_tick"]

    async def test_the_callback_runs_in_one_context_and_each_tick_in_a_copy(self):
        seen = []

        async def tick(interval):
            seen.append(var.get())
            var.set("tick")

        def cb(interval):
            seen.append(var.get())
            var.set(f"cb {len(seen)}")
            return tick(interval)

        var.set("creator")
        with hand_clock() as clock:
            timer = create_timer(cb, 1)
            var.set("later")
            await clock.advance(2)
            await stop(timer)
        assert seen == ["creator", "cb 1", "cb 1", "cb 3", "cb 3", "cb 5"]
        assert var.get() == "later"

    async def test_a_context_can_be_given(self):
        context = contextvars.Context()
        context.run(var.set, "given")
        seen = []

        def cb(interval):
            seen.append(var.get())
            var.set("changed")
            return asyncio.sleep(0)

        await create_timer(cb, 60, context=context, limit=1)
        assert seen == ["given"]
        assert context[var] == "changed"

    async def test_a_name_can_be_given(self):
        timer = create_timer(counting()[0], 60, name="heartbeat")
        assert timer.get_name() == "heartbeat"
        await stop(timer)

    async def test_a_timer_that_nobody_keeps_goes_on(self):
        with hand_clock() as clock:
            tick, times = counting()
            ref = weakref.ref(create_timer(tick, 1))
            for _ in range(5):
                await clock.advance(1)
                gc.collect()
            assert len(times) == 6
            await stop(ref())
            await turns()
        gc.collect()
        assert ref() is None

    @pytest.mark.parametrize("how", ["gather", "wait_for", "task group"])
    async def test_it_works_where_tasks_work(self, how):
        tick, times = counting()
        if how == "gather":
            await asyncio.gather(create_timer(tick, 0.001, limit=2), create_timer(tick, 0.001, limit=2))
            assert len(times) == 4
        elif how == "wait_for":
            timer = create_timer(tick, 0.001)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(timer, 0.005)
            assert timer.cancelled()
        else:
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(asyncio.wait([create_timer(tick, 0.001, limit=2)]))
            assert waiting.done() and len(times) == 2

    def test_asyncio_run_ends_the_timers_that_are_left(self):
        ended = []

        async def tick(interval):
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(1)

        async def main():
            create_timer(tick, 60)
            await turns()

        asyncio.run(main())
        assert ended == [1]

    async def test_nothing_or_less_is_one_tick_per_iteration(self):
        for interval in (0, -1, -0.5, 0.0, 1e-12):
            tick, times = counting()
            timer = create_timer(tick, interval)
            await turns(10)
            assert 8 <= len(times) <= 11
            await stop(timer)
            assert timer.stats().skipped == 0

    async def test_one_tick_per_iteration_with_the_cancel_policy(self):
        ticks = Ticks()
        timer = create_timer(ticks, 0, TimerDelayPolicy.CANCEL)
        await turns(20)
        assert len(ticks.started) >= 4
        assert ticks.cancelled == list(range(len(ticks.cancelled)))
        assert len(ticks.started) - len(ticks.cancelled) <= 1
        await stop(timer)


class TestPhase:
    async def test_a_million_ticks_later_the_error_is_the_rounding_of_a_double(self, loop_kind):
        """Jumps over most of them; the arithmetic is the same."""
        with hand_clock() as clock:
            start = clock.now
            tick, _ = counting()
            timer = create_timer(tick, 0.1)
            await clock.settle()
            for _ in range(100):
                await clock.jump(9999.95)
                k = round((timer.next_due - start) / 0.1)
                assert timer.next_due == start + k * 0.1
            assert k > 9_000_000
            await stop(timer)

    @pytest.mark.loop_kinds("default", "uvloop", reason="long; the other kinds differ in nothing that matters here")
    async def test_an_hour_of_ticks_at_ten_milliseconds_in_virtual_time(self):
        """All of them, each at its own time to the last bit. AIOTOOLS_LARGE=1: a million and more."""
        count = 1_100_000 if os.environ.get("AIOTOOLS_LARGE") else 360_001
        wrong = 0
        due = 0

        async def tick(interval):
            nonlocal wrong, due
            wrong += clock.vtime != due * 0.01
            due += 1

        clock = aiotools.VirtualClock()
        with clock.patch_loop():
            timer = create_timer(tick, 0.01, limit=count, eager=True)
            await timer
        assert (due, wrong) == (count, 0)
        assert clock.vtime == (count - 1) * 0.01
        stats = timer.stats()
        assert (stats.ticks, stats.skipped, stats.late_max) == (count, 0, 0)

    async def test_another_clock_in_the_loop_leaves_what_remains_to_the_next_tick(self):
        """The phase, and what all methods tell and do, go on in the time of that clock, and come back from it."""
        loop = asyncio.get_running_loop()
        clock = aiotools.VirtualClock()
        clock.vtime = 5e8
        tick, times = counting()
        timer = create_timer(tick, 10, first=10)
        late = create_timer(tick, 10, first=10)
        paused = create_timer(tick, 10, first=10)
        backing_off = create_timer(lambda interval: loop.create_future(), 10, first=25, tick_timeout=2)
        backing_off.cancel()
        await turns()
        paused.pause()
        late.pause()
        await stop(backing_off)
        with clock.patch_loop():
            assert timer.next_due == pytest.approx(5e8 + 10, abs=5)
            begin = timer.next_due
            await asyncio.sleep(35)
            assert times == [begin, begin + 10, begin + 20]
            paused.resume()
            assert paused.next_due == pytest.approx(begin + 30, abs=1)
            assert timer.stats().skipped == paused.stats().skipped == 0
            left = timer.next_due - loop.time()
        assert timer.next_due - loop.time() == pytest.approx(left, abs=2)
        assert paused.next_due - loop.time() == pytest.approx(left, abs=2)
        late.resume()
        assert late.next_due - loop.time() == pytest.approx(left, abs=2)
        for each in (timer, late, paused):
            await stop(each)

    async def test_a_tick_timeout_goes_on_in_the_time_of_another_clock(self, loop_errors):
        ticks = Ticks()
        timer = create_timer(ticks, 1000, tick_timeout=20)
        await turns()
        clock = aiotools.VirtualClock()
        clock.vtime = 1e6
        with clock.patch_loop():
            await turns()
        with aiotools.VirtualClock().patch_loop():
            await asyncio.sleep(15)
            assert ticks.cancelled == []
            await asyncio.sleep(10)
            assert ticks.cancelled == [0]
        loop_errors.take_one(TimeoutError)
        await stop(timer)

    async def test_slow_ticks_do_not_move_the_phase(self):
        with hand_clock() as clock:
            times = []

            async def tick(interval):
                times.append(clock.now)
                await asyncio.sleep(0.75)

            timer = create_timer(tick, 1)
            await clock.advance(5)
            assert times == [1000 + k for k in range(6)]
            await stop(timer)

    async def test_blocked_past_several_due_times_there_is_one_late_tick(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1)
            await clock.settle()
            await clock.jump(3.25)
            await clock.advance(1)
            assert times == [1000, 1003.25, 1004]
            stats = timer.stats()
            assert (stats.ticks, stats.skipped, stats.late_max) == (3, 2, 2.25)
            assert stats.late_mean == 0.75
            await stop(timer)

    async def test_catch_up_runs_all_that_were_missed(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1, missed="catch-up")
            await clock.settle()
            await clock.jump(3.25)
            await clock.advance(1)
            assert times == [1000, 1003.25, 1003.25, 1003.25, 1004]
            assert timer.stats().skipped == 0
            assert timer.stats().late_max == 2.25
            await stop(timer)

    async def test_catch_up_lets_the_loop_turn_between_ticks(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1, missed="catch-up")
            await turns()
            clock.now += 1000
            await turns(20)
            clock.loop.call_soon(lambda: None)
            await clock.settle(1)
            assert 0 < len(times) < 100
            await stop(timer)

    async def test_skip_waits_for_the_next_due_time(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1, missed="skip")
            await clock.settle()
            await clock.jump(3.75)
            assert times == [1000]
            await clock.advance(0.25)
            assert times == [1000, 1004]
            await clock.jump(1.25)
            assert times == [1000, 1004, 1005.25], "within the grace of half an interval"
            assert timer.stats().skipped == 3
            await stop(timer)

    @pytest.mark.parametrize(
        "missed, grace, late, expected",
        [
            ("late", 0.5, 2.25, [1002.25]),
            ("late", 0.125, 2.25, []),
            ("skip", 0.125, 1.25, []),
            ("skip", 10, 2.75, [1002.75]),
            ("catch-up", 1.5, 3.25, [1003.25] * 2),
            ("catch-up", 0, 3.25, []),
            ("late", 0, 3, [1003]),
        ],
    )
    async def test_a_tick_later_than_grace_is_left_out(self, missed, grace, late, expected):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1, missed=missed, grace=grace)
            await clock.settle()
            await clock.jump(late)
            assert times[1:] == expected
            assert timer.stats().skipped == int(late) - len(expected)
            await stop(timer)

    async def test_first_delays_the_first_tick_and_sets_the_phase(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1, first=0.25)
            await clock.advance(2.5)
            assert times == [1000.25, 1001.25, 1002.25]
            await stop(timer)

    async def test_jitter_delays_ticks_and_keeps_the_phase(self):
        drawn = [0.25, 0.0, 0.5, 0.125]
        given = iter(drawn + [0.0] * 9)
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1, jitter=lambda: next(given))
            await clock.advance(3.5)
            assert times == [1000 + k + late for k, late in enumerate(drawn)]
            assert timer.stats().late_max == 0
            await stop(timer)

    async def test_jitter_in_seconds_is_random_and_bounded(self):
        random.seed(1)
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1, jitter=0.5)
            await clock.advance(50.75)
            late = [when - 1000 - k for k, when in enumerate(times)]
            assert len(late) == 51 and len(set(late)) > 40
            assert all(0 <= seconds <= 0.5 for seconds in late)
            await stop(timer)

    @pytest.mark.parametrize("bad, error", [(-1, ValueError), (float("nan"), ValueError), ("x", TypeError)])
    async def test_a_bad_jitter_ends_the_timer(self, bad, error):
        with pytest.raises(error, match="what jitter returns"):
            await create_timer(counting()[0], 1, jitter=lambda: bad)

    async def test_a_jitter_that_raises_ends_the_timer(self):
        def jitter():
            raise LookupError

        with pytest.raises(LookupError):
            await create_timer(counting()[0], 1, jitter=jitter)

    @pytest.mark.loop_kinds("default", "uvloop", reason="real time, and the other kinds use the same clock")
    async def test_no_tick_is_ever_early(self):
        """Thousands of short deadlines, measured on the monotonic clock."""
        early = []
        count = 0

        def make(interval):
            start = time.monotonic()
            due = 0

            async def tick(_):
                pass

            def cb(_):
                nonlocal due, count
                now = time.monotonic()
                count += 1
                # The due time that this tick stands for is not after next_due - interval.
                if now < start + due * interval:
                    early.append((interval, due, now - start))
                due += 1
                return tick(_)

            return create_timer(cb, interval)

        dice = random.Random(2)
        timers = [make(dice.uniform(0.0003, 0.01)) for _ in range(100)]
        while count < 5000:
            await asyncio.sleep(0.001)
        for timer in timers:
            await stop(timer)
        assert early == []


class TestLimit:
    @pytest.mark.parametrize("limit", [1, 3])
    async def test_it_completes_with_none_after_so_many_ticks(self, limit):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1, limit=limit)
            await clock.advance(limit - 0.5)
            assert timer.done() and timer.result() is None
            assert times == [1000 + k for k in range(limit)]
            assert timer.next_due is None

    async def test_it_completes_after_its_last_tick_has_ended(self):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 1, limit=2)
            await clock.advance(3)
            assert len(ticks.started) == 2 and not timer.done()
            ticks.end(1)
            await clock.settle()
            assert not timer.done()
            ticks.end(0)
            await clock.settle()
            assert timer.done() and timer.result() is None
            assert ticks.cancelled == []

    async def test_cancelled_while_the_last_tick_runs_it_ends_cancelled(self):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 1, limit=1)
            await clock.advance(2)
            await stop(timer)
            assert timer.cancelled() and ticks.cancelled == [0]

    async def test_a_last_tick_that_fails_is_reported_all_the_same(self, loop_errors):
        async def tick(interval):
            raise ValueError

        assert await create_timer(tick, 1, limit=1) is None
        loop_errors.take_one(ValueError)

    async def test_in_every_turn_too(self):
        tick, times = counting()
        assert await create_timer(tick, 0, limit=5) is None
        assert len(times) == 5


class TestOverlap:
    async def run(self, overlap, seconds=3.5):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 1, overlap=overlap)
            await clock.advance(seconds)
            before = timer.stats()
            if ticks.futures and not ticks.futures[0].done():
                ticks.end(0)
            await clock.settle()
            after = timer.stats()
            await stop(timer)
        return before, after

    async def test_allow(self):
        before, after = await self.run("allow")
        assert (before.ticks, before.running, before.skipped) == (4, 4, 0)
        assert after.running == 3

    async def test_skip(self):
        before, after = await self.run("skip")
        assert (before.ticks, before.running, before.skipped) == (1, 1, 3)
        assert after.running == 0

    async def test_at_most_two(self):
        before, after = await self.run(2)
        assert (before.ticks, before.running, before.skipped) == (2, 2, 2)
        assert after.running == 1

    async def test_queue_one(self):
        before, after = await self.run("queue")
        assert (before.ticks, before.running, before.skipped) == (1, 1, 2)
        assert (after.ticks, after.running) == (2, 1)

    async def test_cancel(self):
        before, _ = await self.run("cancel")
        assert (before.ticks, before.running, before.skipped) == (4, 1, 0)

    async def test_cancel_is_what_the_delay_policy_says(self):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 1, TimerDelayPolicy.CANCEL, overlap="cancel")
            await clock.advance(1)
            assert ticks.cancelled == [0]
            await stop(timer)

    async def test_a_tick_that_swallows_its_cancellation_is_awaited_reported_and_the_timer_goes_on(self, loop_errors):
        with hand_clock() as clock:
            ticks = Ticks()
            ticks.stubborn.add(0)
            timer = create_timer(ticks, 1, TimerDelayPolicy.CANCEL)
            await clock.advance(2.5)
            assert ticks.cancelled == [0] and len(ticks.started) == 1
            ticks.end(0)
            await clock.settle()
            assert ticks.started == [1000, 1002.5], "one late tick for the two that were missed"
            context = loop_errors.take_one(asyncio.InvalidStateError, match="tick")
            assert context["task"].result() is None
            await clock.advance(0.5)
            assert ticks.started == [1000, 1002.5, 1003]
            await stop(timer)

    async def test_a_tick_that_fails_in_its_cleanup_is_reported_and_the_timer_goes_on(self, loop_errors):
        started = []

        async def tick(interval):
            started.append(1)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if len(started) == 1:
                    raise ValueError("cleanup") from None
                raise

        with hand_clock() as clock:
            timer = create_timer(tick, 1, TimerDelayPolicy.CANCEL)
            await clock.advance(2)
            assert len(started) == 3
            loop_errors.take_one(ValueError)
            await stop(timer)

    async def test_a_tick_that_takes_its_cancellation_back_is_no_failure(self):
        async def tick(interval):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                asyncio.current_task().uncancel()

        with hand_clock() as clock:
            timer = create_timer(tick, 1, TimerDelayPolicy.CANCEL)
            await clock.advance(2)
            assert timer.stats().ticks == 3 and timer.stats().errors == 0
            await stop(timer)

    async def test_a_tick_that_others_cancel_is_no_failure(self):
        tasks = []

        async def tick(interval):
            tasks.append(asyncio.current_task())
            await asyncio.sleep(60)

        with hand_clock() as clock:
            timer = create_timer(tick, 1)
            await clock.settle()
            tasks[0].cancel()
            await clock.settle()
            assert timer.stats().running == 0 and timer.stats().errors == 0
            await stop(timer)


class TestTickTimeout:
    async def test_a_tick_that_takes_longer_is_cancelled_and_has_failed(self, loop_errors):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 10, tick_timeout=2)
            await clock.advance(1.5)
            assert ticks.cancelled == []
            await clock.advance(0.5)
            assert ticks.cancelled == [0]
            context = loop_errors.take_one(TimeoutError, match="tick")
            assert "2.0 seconds" in str(context["exception"])
            assert timer.stats().errors == 1 and not timer.done()
            await stop(timer)

    async def test_one_that_ends_in_time_is_left_alone(self):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 10, tick_timeout=2)
            await clock.advance(1)
            ticks.end(0)
            await clock.advance(5)
            assert ticks.cancelled == [] and timer.stats().errors == 0
            await stop(timer)

    async def test_one_that_goes_on_regardless_has_failed_when_it_ends(self, loop_errors):
        with hand_clock() as clock:
            ticks = Ticks()
            ticks.stubborn.add(0)
            timer = create_timer(ticks, 10, tick_timeout=2)
            await clock.advance(3)
            assert ticks.cancelled == [0] and timer.stats().errors == 0
            ticks.end(0)
            await clock.settle()
            loop_errors.take_one(TimeoutError)
            await stop(timer)

    async def test_its_own_error_comes_first(self, loop_errors):
        async def tick(interval):
            try:
                await asyncio.sleep(60)
            finally:
                raise ValueError("cleanup")

        with hand_clock() as clock:
            timer = create_timer(tick, 10, tick_timeout=1)
            await clock.advance(1)
            loop_errors.take_one(ValueError)
            await stop(timer)

    async def test_it_ends_the_timer_with_on_error_stop(self):
        with hand_clock() as clock:
            timer = create_timer(Ticks(), 10, tick_timeout=1, on_error="stop")
            await clock.advance(1)
            with pytest.raises(TimeoutError):
                await timer


class TestEager:
    async def test_a_tick_runs_at_once_and_is_a_task(self):
        with hand_clock() as clock:
            log = []

            async def tick(interval):
                log.append(asyncio.current_task())
                if clock.now > 1000:
                    await asyncio.sleep(0.5)

            def cb(interval):
                clock.loop.call_soon(log.append, "next turn")
                return tick(interval)

            timer = create_timer(cb, 1, eager=True, limit=2)
            await clock.advance(1)
            if HAVE_EAGER_START:
                assert log[1::2] == ["next turn"] * 2
            tasks = [entry for entry in log if entry != "next turn"]
            assert len(tasks) == 2
            assert all(isinstance(task, asyncio.Task) and task is not timer for task in tasks)
            assert not timer.done()
            await clock.advance(0.5)
            assert timer.done()

    async def test_errors_and_limit_work_as_ever(self, loop_errors):
        async def tick(interval):
            raise ValueError

        assert await create_timer(tick, 0.001, limit=3, eager=True) is None
        assert [type(context["exception"]) for context in loop_errors.take()] == [ValueError] * 3
        with pytest.raises(ValueError):
            await create_timer(tick, 0.001, eager=True, on_error="stop")

    async def test_with_a_task_factory_it_asks_the_factory(self, loop_kind):
        loop = asyncio.get_running_loop()
        made = []

        def factory(loop, coro, **kwargs):
            made.append(kwargs)
            return asyncio.Task(coro, loop=loop, **kwargs)

        before = loop.get_task_factory()
        loop.set_task_factory(factory)
        try:
            tick, times = counting()
            await create_timer(tick, 0.001, eager=True, limit=2)
        finally:
            loop.set_task_factory(before)
        assert len(made) == len(times) == 2

    async def test_with_a_factory_that_takes_no_arguments_it_starts_as_usual(self):
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()

        def factory(loop, coro, *, context=None, name=None, eager_start=None):
            if eager_start:
                raise TypeError("no eager_start here")
            return asyncio.Task(coro, loop=loop)

        loop.set_task_factory(factory)
        try:
            tick, times = counting()
            await create_timer(tick, 0.001, eager=True, limit=2)
        finally:
            loop.set_task_factory(before)
        assert len(times) == 2

    async def test_in_the_callback_the_timer_and_in_the_tick_the_tick_is_current(self):
        seen = []

        async def tick(interval):
            seen.append(asyncio.current_task())
            await asyncio.sleep(0)
            seen.append(asyncio.current_task())

        def cb(interval):
            coro = tick(interval)
            seen.append(asyncio.current_task())
            return coro

        with hand_clock() as clock:
            timer = create_timer(cb, 1, eager=True, limit=2)
            await clock.advance(1)
            await timer
        assert [task is timer for task in seen] == [True, False, False] * 2
        assert seen[1] is seen[2]


class TestOnError:
    async def failing(self, interval):
        raise ValueError("tick")

    async def test_stop_ends_the_timer_with_the_exception_after_the_other_ticks(self):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 1, on_error="stop")
            await clock.advance(2)
            ticks.fail(1, ValueError("one"))
            await clock.settle()
            with pytest.raises(ValueError, match="one"):
                await timer
            assert sorted(set(ticks.cancelled)) == [0, 2]

    async def test_backoff_leaves_out_ticks_up_to_a_cap_and_recovers(self, loop_errors):
        times = []
        good = False

        async def tick(interval):
            times.append(clock.now - 1000)
            if not good:
                raise ValueError

        with hand_clock() as clock:
            timer = create_timer(tick, 1, on_error="backoff", backoff_cap=5)
            await clock.advance(20)
            assert times == [0, 2, 6, 11, 16]
            good = True
            times.clear()
            await clock.advance(4)
            assert times == [21, 22, 23, 24]
            assert timer.stats().skipped == 1 + 3 + 4 + 4 + 4
            await stop(timer)
        assert len(loop_errors.take()) == 5

    async def test_backing_off_without_a_cap_counts_as_far_as_a_counter_goes(self):
        async def tick(interval):
            raise ValueError

        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        with aiotools.VirtualClock().patch_loop():
            timer = create_timer(tick, 1, on_error="backoff", backoff_cap=math.inf)
            await asyncio.sleep(2.0**80)
            stats = timer.stats()
            assert 80 <= stats.ticks <= 82
            assert stats.skipped == 2**64 - 1
            await stop(timer)

    async def test_a_callable_gets_the_timer_and_the_exception(self):
        calls = []

        def handler(timer, exc):
            calls.append((timer, exc, asyncio.current_task(), var.get()))
            var.set("handled")

        var.set("context of the timer")
        with hand_clock() as clock:
            timer = create_timer(self.failing, 1, on_error=handler)
            var.set("other")
            await clock.advance(1)
            await stop(timer)
        assert [call[0] for call in calls] == [timer, timer] == [call[2] for call in calls]
        assert [call[3] for call in calls] == ["context of the timer", "handled"]
        assert str(calls[0][1]) == "tick"

    async def test_a_callable_that_raises_ends_the_timer(self):
        def handler(timer, exc):
            raise LookupError from exc

        with pytest.raises(LookupError) as caught:
            await create_timer(self.failing, 1, on_error=handler)
        assert isinstance(caught.value.__cause__, ValueError)

    async def test_a_callable_may_cancel_the_timer(self):
        timer = create_timer(self.failing, 1, on_error=lambda timer, exc: timer.cancel())
        with pytest.raises(asyncio.CancelledError):
            await timer
        assert timer.stats().ticks == 1

    async def test_ticks_that_fail_while_the_timer_ends_are_reported(self, loop_errors):
        async def tick(interval):
            try:
                await asyncio.sleep(60)
            finally:
                raise ValueError("cleanup")

        for on_error in ("report", "stop", "backoff"):
            timer = create_timer(tick, 1, on_error=on_error)
            await turns()
            await stop(timer)
            assert timer.cancelled()
            loop_errors.take_one(ValueError)

    @pytest.mark.loop_kinds(
        "default", "uvloop", "debug", reason="from an eager tick it comes out of create_task() and ends the timer"
    )
    @pytest.mark.parametrize("base", [SystemExit, KeyboardInterrupt])
    def test_what_stops_the_loop_is_not_reported_too(self, base, new_loop):
        async def tick(interval):
            raise base

        loop = new_loop()
        timers = []

        async def main():
            timers.append(create_timer(tick, 60))
            await asyncio.sleep(60)

        async def rest():
            await turns()
            assert timers[0].stats().errors == 1
            await stop(timers[0])

        with pytest.raises(base):
            loop.run_until_complete(main())
        for task in asyncio.all_tasks(loop) - set(timers):
            task.cancel()
        loop.run_until_complete(rest())


class TestMethods:
    async def test_next_due(self):
        with hand_clock() as clock:
            tick, _ = counting()
            timer = create_timer(tick, 1, first=0.5)
            assert timer.next_due == 1000.5
            await clock.settle()
            assert timer.next_due == 1000.5
            await clock.advance(1)
            assert timer.next_due == 1001.5
            timer.pause()
            assert timer.next_due is None
            timer.resume()
            assert timer.next_due == 1001.5
            await stop(timer)
            assert timer.next_due is None

    async def test_next_due_in_every_turn_is_now(self):
        timer = create_timer(counting()[0], 0)
        await turns()
        assert abs(timer.next_due - asyncio.get_running_loop().time()) < 1
        await stop(timer)

    async def test_reschedule_starts_a_new_phase(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1)
            await clock.advance(2.25)
            timer.reschedule(2)
            await clock.advance(5)
            assert times == [1000, 1001, 1002, 1004.25, 1006.25]
            timer.reschedule(0.5)
            await clock.advance(1)
            assert times[5:] == [1007.75, 1008.25]
            await stop(timer)

    async def test_the_callback_gets_the_new_interval(self):
        given = []

        async def tick(interval):
            given.append(interval)

        with hand_clock() as clock:
            timer = create_timer(tick, 1)
            await clock.settle()
            timer.reschedule(2)
            await clock.advance(2)
            await stop(timer)
        assert given == [1, 2]

    async def test_reschedule_before_the_first_step(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1)
            timer.reschedule(3)
            assert timer.next_due == 1003
            await clock.advance(6)
            assert times == [1003, 1006]
            await stop(timer)

    async def test_reschedule_to_every_turn_and_back(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 60)
            await clock.settle()
            timer.reschedule(0)
            await turns(10)
            assert 8 <= len(times) <= 12
            timer.reschedule(1)
            await clock.settle()
            times.clear()
            await clock.advance(2)
            assert times == [1001, 1002]
            await stop(timer)

    async def test_pause_and_resume_keep_the_phase(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1)
            await clock.advance(1.5)
            timer.pause()
            timer.pause()
            await clock.advance(2)
            assert times == [1000, 1001]
            timer.resume()
            timer.resume()
            await clock.advance(1)
            assert times == [1000, 1001, 1004]
            assert timer.stats().skipped == 0
            await stop(timer)

    async def test_a_paused_timer_that_nobody_keeps_stays(self):
        timer = create_timer(counting()[0], 1)
        await turns()
        timer.pause()
        ref = weakref.ref(timer)
        del timer
        gc.collect()
        assert ref() is not None
        await stop(ref())

    async def test_paused_before_its_first_step(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1)
            timer.pause()
            assert timer.next_due is None
            await clock.advance(1.5)
            assert times == []
            timer.resume()
            await clock.advance(1)
            assert times == [1002]
            await stop(timer)

    async def test_paused_in_every_turn(self):
        tick, times = counting()
        timer = create_timer(tick, 0)
        await turns(5)
        timer.pause()
        await turns()
        before = len(times)
        await turns(5)
        assert len(times) == before
        timer.resume()
        await turns(5)
        assert len(times) > before
        await stop(timer)

    async def test_trigger_runs_a_tick_beside_the_schedule(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 1)
            await clock.advance(0.25)
            timer.trigger()
            timer.trigger()
            assert times == [1000], "not inside the call"
            await clock.settle()
            assert times == [1000, 1000.25, 1000.25]
            await clock.advance(1)
            assert times[3:] == [1001]
            timer.pause()
            timer.trigger()
            await clock.settle()
            assert times[4:] == [1001.25]
            await stop(timer)

    async def test_trigger_obeys_overlap_and_limit(self):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 10, overlap="skip", limit=2)
            await clock.settle()
            timer.trigger()
            await clock.settle()
            assert (timer.stats().ticks, timer.stats().skipped) == (1, 1)
            ticks.end(0)
            await clock.settle()
            timer.trigger()
            await clock.settle()
            assert timer.stats().ticks == 2
            ticks.end(1)
            await clock.settle()
            assert timer.done()

    async def test_trigger_with_the_cancel_policy_cancels_the_running_tick(self):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 10, overlap="cancel")
            await clock.advance(1)
            timer.trigger()
            await clock.settle()
            assert ticks.cancelled == [0] and ticks.started == [1000, 1001]
            assert timer.next_due == 1010
            await stop(timer)

    async def test_trigger_before_the_first_step(self):
        with hand_clock() as clock:
            tick, times = counting()
            timer = create_timer(tick, 10, first=5)
            timer.trigger()
            await clock.advance(6)
            assert times == [1000, 1005]
            await stop(timer)

    async def test_stats(self, loop_errors):
        with hand_clock() as clock:
            ticks = Ticks()
            timer = create_timer(ticks, 1)
            assert timer.stats() == (0, 0, 0, 0, None, 0.0, 0.0)
            await clock.advance(1)
            exc = ValueError("last")
            ticks.fail(0, exc)
            await clock.settle()
            stats = timer.stats()
            assert isinstance(stats, TimerStats) and isinstance(stats, tuple)
            assert stats == (2, 1, 0, 1, exc, 0.0, 0.0)
            assert (stats.ticks, stats.running, stats.skipped, stats.errors, stats.last_error) == stats[:5]
            loop_errors.take_one(ValueError)
            await stop(timer)
            assert timer.stats().errors == 1, "also afterwards"

    async def test_what_has_ended_cannot_be_changed(self):
        done = create_timer(counting()[0], 1, limit=1)
        await done
        cancelled = create_timer(counting()[0], 1)
        await turns()
        cancelled.cancel()
        for timer in (done, cancelled):
            for call in (timer.pause, timer.resume, timer.trigger, lambda timer=timer: timer.reschedule(1)):
                with pytest.raises(RuntimeError, match="has ended"):
                    call()
        await stop(cancelled)

    @pytest.mark.loop_kinds("debug", reason="asyncio looks for this in debug mode only")
    async def test_another_thread_may_not_change_it(self):
        timer = create_timer(counting()[0], 60)
        await turns()

        def use():
            for call in (timer.pause, timer.resume, timer.trigger, lambda: timer.reschedule(1)):
                with pytest.raises(RuntimeError, match="Non-thread-safe"):
                    call()

        await asyncio.to_thread(use)
        await stop(timer)

    def test_it_cannot_be_made_directly(self):
        with pytest.raises(TypeError, match="cannot create"):
            Timer()
        with pytest.raises(TypeError):
            type("Mine", (Timer,), {})

    async def test_its_coroutine_runs_in_the_timer_only(self):
        timer = create_timer(counting()[0], 60)
        with pytest.raises(RuntimeError, match="in the timer only"):
            timer.get_coro().send(None)
        with pytest.raises(RuntimeError):
            await timer


PERIOD_MS = st.sampled_from([1.0, 0.5, 2.0])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("jump"), st.integers(0, 14).map(lambda n: n / 4)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.integers(0, 5)),
        st.tuples(st.just("stubborn"), st.integers(0, 5)),
        st.tuples(st.sampled_from(["pause", "resume", "trigger"]), st.just(0)),
        st.tuples(st.just("reschedule"), PERIOD_MS),
    ),
    max_size=12,
)


@given(
    interval=PERIOD_MS,
    first=st.sampled_from([0.0, 0.25, 3.0]),
    limit=st.sampled_from([None, 1, 3]),
    overlap=st.sampled_from(["allow", "skip", "queue", "cancel", 2]),
    missed=st.sampled_from(["late", "skip", "catch-up"]),
    grace=st.sampled_from([None, 0.0, 0.25, 1.25]),
    backoff=st.sampled_from([None, 2.0, 5.0]),
    eager=st.booleans(),
    steps=STEPS,
)
async def test_any_policy_and_course_of_events_gives_the_ticks_of_the_model(
    loop_errors, interval, first, limit, overlap, missed, grace, backoff, eager, steps
):
    if missed == "catch-up" and overlap in ("skip", "cancel"):
        return
    if backoff is not None and backoff < interval:
        return
    with hand_clock() as clock:
        options = {"first": first, "limit": limit, "overlap": overlap, "missed": missed, "grace": grace}
        ticks = Ticks()
        errors = {} if backoff is None else {"on_error": "backoff", "backoff_cap": backoff}
        timer = create_timer(ticks, interval, **options, **errors, eager=eager)
        await clock.settle()
        model = TimerModel(clock.now, interval, **options, backoff=backoff)

        def compare(step):
            starts = [start for start, _ in model.started]
            assert ticks.started == starts, step
            stats = timer.stats()
            assert (stats.ticks, stats.running, stats.skipped) == (
                len(starts),
                len(model.running),
                model.skipped,
            ), step
            late = [max(0.0, start - due) for start, due in model.started]
            assert stats.late_max == max(late, default=0.0)
            if not timer.done() and not model.over and not model.blocked:
                assert timer.next_due == model.next_due, step
            assert timer.done() == (model.over and not model.running), step

        compare("start")
        for step, value in steps:
            over = timer.done() or model.over
            if step == "jump":
                model.jump(value)
                await clock.jump(value)
            elif step in ("end", "fail"):
                if value not in model.running:
                    continue
                stubborn = value in ticks.stubborn and value in ticks.cancelled
                if stubborn and backoff is not None:
                    continue
                if step == "end":
                    ticks.end(value)
                else:
                    ticks.fail(value, ValueError(value))
                model.end(value, failed=step == "fail" or stubborn)
            elif step == "stubborn":
                ticks.stubborn.add(value)
                model.be_stubborn(value)
            elif over:
                continue
            elif step == "reschedule":
                if backoff is not None and backoff < value:
                    continue
                grace_now = model.grace
                timer.reschedule(value)
                model.reschedule(value)
                assert model.grace == grace_now
            else:
                getattr(timer, step)()
                getattr(model, step)()
            await clock.settle()
            compare((step, value))
        if not timer.done():
            ticks.stubborn.clear()
            timer.cancel()
            await clock.settle()
            assert timer.cancelled()
        assert timer.stats().running == 0
    assert {type(context["exception"]) for context in loop_errors.take()} <= {ValueError, asyncio.InvalidStateError}


GOOD = {"cb": lambda interval: asyncio.sleep(0), "interval": 1}


class TestBadInput:
    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"cb": 5}, TypeError, "cb must be callable, not 'int'"),
            ({"interval": "1"}, TypeError, "interval must be a number of seconds, not 'str'"),
            ({"interval": None}, TypeError, "interval"),
            ({"interval": float("nan")}, ValueError, "interval"),
            ({"interval": float("inf")}, ValueError, "interval must be finite"),
            ({"interval": -float("inf")}, ValueError, "interval must be finite"),
            ({"delay_policy": 1}, TypeError, "delay_policy must be a TimerDelayPolicy, not 'int'"),
            ({"delay_policy": None}, TypeError, "delay_policy"),
            ({"first": -1}, ValueError, "first must not be negative"),
            ({"first": float("inf")}, ValueError, "first must be finite"),
            ({"first": float("nan")}, ValueError, "first"),
            ({"first": "x"}, TypeError, "first"),
            ({"jitter": -1}, ValueError, "jitter must not be negative"),
            ({"jitter": 1}, ValueError, "jitter must be shorter than the interval"),
            ({"jitter": "x"}, TypeError, "jitter must be a number of seconds or a callable, not 'str'"),
            ({"jitter": float("nan")}, ValueError, "jitter"),
            ({"limit": 0}, ValueError, "limit must be at least 1, not 0"),
            ({"limit": -(2**70)}, ValueError, "limit"),
            ({"limit": 1.5}, TypeError, "limit must be a number of ticks, not float"),
            ({"limit": True}, TypeError, "limit"),
            ({"overlap": "alow"}, ValueError, "overlap must be 'allow', 'skip', 'cancel', 'queue' or .* not 'alow'"),
            ({"overlap": 0}, ValueError, "overlap must be at least 1"),
            ({"overlap": True}, TypeError, "overlap"),
            ({"overlap": 1.0}, TypeError, "overlap"),
            ({"missed": "never"}, ValueError, "missed must be 'late', 'skip' or 'catch-up', not 'never'"),
            ({"missed": 1}, TypeError, "missed"),
            ({"grace": -1}, ValueError, "grace must not be negative"),
            ({"grace": "x"}, TypeError, "grace"),
            ({"tick_timeout": 0}, ValueError, "tick_timeout must be greater than zero"),
            ({"tick_timeout": "x"}, TypeError, "tick_timeout"),
            ({"on_error": "ignore"}, ValueError, "on_error must be 'report', 'stop', 'backoff' or a callable"),
            ({"on_error": None}, TypeError, "on_error"),
            ({"backoff_cap": 5}, ValueError, "backoff_cap needs on_error='backoff'"),
            ({"on_error": "backoff", "backoff_cap": 0.5}, ValueError, "backoff_cap must not be shorter"),
            ({"on_error": "backoff", "backoff_cap": 0}, ValueError, "backoff_cap must be greater than zero"),
            ({"name": 5}, TypeError, "name must be a string, not 'int'"),
            ({"context": {}}, TypeError, "context must be a contextvars.Context, not 'dict'"),
            ({"delay_policy": TimerDelayPolicy.CANCEL, "overlap": "skip"}, ValueError, "overlap='skip' contradicts"),
            ({"interval": 0, "missed": "late"}, ValueError, "missed .* needs an interval greater than zero"),
            ({"interval": 0, "grace": 1}, ValueError, "grace"),
            ({"interval": -1, "jitter": 1}, ValueError, "jitter needs an interval greater than zero"),
            ({"interval": 0, "jitter": float}, ValueError, "jitter"),
            ({"interval": 0, "on_error": "backoff"}, ValueError, "on_error='backoff' needs an interval"),
            ({"missed": "catch-up", "overlap": "skip"}, ValueError, "missed='catch-up' needs an overlap"),
            ({"missed": "catch-up", "overlap": 1}, ValueError, "missed"),
            ({"missed": "catch-up", "delay_policy": TimerDelayPolicy.CANCEL}, ValueError, "missed"),
        ],
    )
    @pytest.mark.loop_kinds("default", reason="the arguments are looked at before the loop")
    async def test_the_call_says_what_is_wrong(self, arguments, error, message):
        before = asyncio.all_tasks()
        with pytest.raises(error, match=message):
            create_timer(**(GOOD | arguments))
        assert asyncio.all_tasks() == before

    def test_bad_input_is_seen_before_the_missing_loop(self):
        with pytest.raises(ValueError, match="limit"):
            create_timer(**GOOD, limit=0)

    def test_eager_that_cannot_say_whether_it_is_true(self):
        class Bad:
            def __bool__(self):
                raise LookupError

        with pytest.raises(LookupError):
            create_timer(**GOOD, eager=Bad())

    @pytest.mark.parametrize(
        "options, interval, error",
        [
            ({}, "x", TypeError),
            ({}, float("nan"), ValueError),
            ({}, float("inf"), ValueError),
            ({"jitter": 0.5}, 0.25, ValueError),
            ({"jitter": float}, 0, ValueError),
            ({"missed": "skip"}, 0, ValueError),
            ({"on_error": "backoff", "backoff_cap": 5}, 6, ValueError),
        ],
    )
    async def test_a_bad_reschedule_changes_nothing(self, options, interval, error):
        with hand_clock() as clock:
            timer = create_timer(counting()[0], 1, **options)
            await clock.settle()
            before = timer.next_due
            with pytest.raises(error):
                timer.reschedule(interval)
            assert timer.next_due == before
            await stop(timer)

    @pytest.mark.parametrize("name", ["interval", "first", "jitter", "grace", "tick_timeout", "backoff_cap"])
    async def test_an_integer_too_large_for_a_float_is_an_overflow_error_that_names_it(self, name):
        """As asyncio.sleep() and asyncio.timeout() have it."""
        tick, _ = counting()
        with pytest.raises(OverflowError, match=f"{name} is too large"):
            create_timer(tick, **{"interval": 1, name: 10**400})
        timer = create_timer(tick, 1)
        due = timer.next_due
        with pytest.raises(OverflowError, match="interval is too large"):
            timer.reschedule(10**400)
        assert timer.next_due == due
        await stop(timer)

    @pytest.mark.parametrize(
        "number", [2, 2.0, True, __import__("fractions").Fraction(2), __import__("decimal").Decimal(2)]
    )
    async def test_numbers_of_all_kinds_are_seconds(self, number):
        given = []

        async def tick(interval):
            given.append(interval)

        await create_timer(tick, number, first=number / 2000, jitter=number / 2000, limit=1)
        assert given == [number] and type(given[0]) is type(number)


class TestHostileCallbacks:
    async def test_a_callback_that_cancels_its_own_timer(self):
        for first in (0, 0.001):
            calls = []

            def cb(interval, calls=calls):
                calls.append(interval)
                asyncio.current_task().cancel()
                return asyncio.sleep(60)

            timer = create_timer(cb, 1, first=first)
            with pytest.raises(asyncio.CancelledError):
                await timer
            assert len(calls) == 1
            assert timer.stats().ticks == 0, "no tick starts after cancel()"

    async def test_a_callback_that_cancels_its_timer_and_raises(self, loop_errors):
        """In the timer's first step the error ends it; later it ends cancelled, and the error is reported."""

        def cb(interval):
            asyncio.current_task().cancel()
            raise LookupError

        for first in (0, 0.001):
            with pytest.raises(asyncio.CancelledError if first else LookupError):
                await create_timer(cb, 1, first=first)
        loop_errors.take_one(LookupError)

    async def test_a_tick_that_cancels_its_own_timer(self):
        async def tick(interval):
            timer.cancel()

        for eager in (False, True):
            timer = create_timer(tick, 0.001, eager=eager)
            with pytest.raises(asyncio.CancelledError):
                await timer
            assert timer.stats().ticks == 1

    async def test_a_tick_that_awaits_its_own_timer_is_cancelled_with_it(self):
        async def tick(interval):
            await timer

        timer = create_timer(tick, 60)
        await turns()
        await stop(timer)

    async def test_rescheduling_from_inside_the_callback_and_the_tick(self):
        with hand_clock() as clock:
            times = []

            async def tick(interval):
                times.append(clock.now - 1000)
                timer.reschedule(interval * 2)

            timer = create_timer(tick, 1)
            await clock.advance(16)
            assert times == [0, 2, 6, 14]
            await stop(timer)
            times.clear()

            def cb(interval):
                times.append(clock.now - 1016)
                asyncio.current_task().reschedule(interval * 2)
                return asyncio.sleep(0)

            timer = create_timer(cb, 1)
            await clock.advance(7)
            assert times == [0, 2, 6]
            await stop(timer)

    async def test_pausing_and_triggering_from_inside_the_callback(self):
        with hand_clock() as clock:
            calls = []

            def cb(interval):
                calls.append(clock.now)
                if len(calls) < 4:
                    timer.trigger()
                timer.pause()
                return asyncio.sleep(0)

            timer = create_timer(cb, 1)
            await clock.advance(5)
            assert calls == [1000] * 4
            await stop(timer)

    async def test_a_jitter_that_changes_the_timer(self):
        with hand_clock() as clock:
            calls = []

            def jitter():
                calls.append(1)
                if len(calls) == 2:
                    asyncio.current_task().reschedule(5)
                return 0.0

            tick, times = counting()
            timer = create_timer(tick, 1, jitter=jitter)
            await clock.advance(6)
            assert times == [1000, 1005]
            await stop(timer)

    async def test_a_callback_that_collects_garbage(self):
        def cb(interval):
            gc.collect()
            return asyncio.sleep(0)

        await create_timer(cb, 0.001, limit=3)

    async def test_a_tick_that_swallows_everything_ends_when_it_wants(self):
        async def tick(interval):
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)

        timer = create_timer(tick, 60)
        await turns()
        for _ in range(3):
            timer.cancel()
            await turns(6)
        assert timer.cancelled()

    async def test_an_exception_handler_that_raises_does_not_stop_the_timer(self):
        loop = asyncio.get_running_loop()
        called = []

        def handler(loop, context):
            called.append(context)
            raise LookupError("handler")

        async def tick(interval):
            raise ValueError

        old = loop.get_exception_handler()
        loop.set_exception_handler(handler)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                await create_timer(tick, 0.001, limit=2)
        finally:
            loop.set_exception_handler(old)
        assert len([c for c in called if isinstance(c.get("exception"), ValueError)]) >= 2

    @pytest.mark.parametrize("eager", [False, True])
    def test_a_tick_that_stops_the_loop(self, new_loop, eager):
        """Only one stop is asked for per run: a second one, of a tick in the same turn, would end the next run at once."""
        loop = new_loop()
        stopping = False
        stopped = 0

        async def tick(interval):
            nonlocal stopping, stopped
            if stopping:
                stopping = False
                stopped += 1
                loop.stop()

        async def main():
            return create_timer(tick, 0.001, first=0.001, eager=eager)

        timer = loop.run_until_complete(main())
        for n in range(3):
            stopping = True
            loop.run_forever()
            assert stopped == n + 1 and not timer.done()
        loop.run_until_complete(stop(timer))

    async def test_a_task_factory_that_fails_ends_the_timer_and_closes_the_coroutine(self):
        def factory(loop, coro, **kwargs):
            raise LookupError("factory")

        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()

        async def tick(interval):
            pass

        for eager in (False, True):
            timer = create_timer(tick, 1, eager=eager)
            loop.set_task_factory(factory)
            try:
                await turns()
            finally:
                loop.set_task_factory(before)
            with pytest.raises(LookupError, match="factory"):
                await timer

    async def test_a_task_that_is_none_of_asyncio(self):
        """A factory may return anything that is like a future."""
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()

        def factory(loop, coro, **kwargs):
            return asyncio.tasks._PyTask(coro, loop=loop)

        tick, times = counting()
        loop.set_task_factory(factory)
        try:
            await create_timer(tick, 0.001, limit=2)
        finally:
            loop.set_task_factory(before)
        assert len(times) == 2

    async def test_closing_its_coroutine_by_hand_leaves_the_ticks_cancelled(self):
        ticks = Ticks()
        timer = create_timer(ticks, 60)
        await turns()
        timer.get_coro().close()
        await turns()
        assert ticks.cancelled == [0]
        timer.cancel()
        with contextlib.suppress(asyncio.CancelledError, RuntimeError):
            await timer
        assert timer.done()


def in_subprocess(code, *options):
    code = "import asyncio, gc, os, sys\nimport aiotools\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return done


class TestBadTimes:
    def test_a_loop_closed_under_live_timers_does_not_crash(self, new_loop):
        ticks = []

        async def tick(interval):
            ticks.append(1)
            await asyncio.sleep(60)

        async def main():
            made = [create_timer(tick, 60) for _ in range(10)]
            late = create_timer(tick, 60)
            await turns()
            late.pause()
            return [*made, late]

        loop = new_loop()
        timers = loop.run_until_complete(main())
        tasks = asyncio.all_tasks(loop)
        loop.close()
        assert len(ticks) == 11
        for timer in timers[:10]:
            with pytest.raises(RuntimeError, match="closed"):
                timer.reschedule(0.001)
            with pytest.raises(RuntimeError, match="closed"):
                timer.trigger()
            assert timer.stats().ticks == 1
        for task in tasks:
            # Nothing else can end them.
            task._log_destroy_pending = False
        refs = [weakref.ref(timer) for timer in timers]
        del timer, timers, task, tasks, loop
        gc.collect()
        self.forget(new_loop)
        gc.collect()
        assert [ref for ref in refs if ref() is not None] == []

    def forget(self, new_loop):
        new_loop.__self__.loops.clear()

    def test_another_loop_after_that_works(self, run):
        async def main():
            tick, times = counting()
            await create_timer(tick, 0.001, limit=2)
            assert len(times) == 2

        run(main())
        run(main())

    def test_timers_live_on_between_runs_of_the_loop(self, new_loop):
        loop = new_loop()
        ticked = asyncio.Event()

        async def tick(interval):
            ticked.set()

        async def main():
            return create_timer(tick, 0.001)

        timer = loop.run_until_complete(main())
        for _ in range(3):
            ticked.clear()
            loop.run_until_complete(ticked.wait())
            before = timer.stats().ticks
            timer.pause()
            timer.resume()
        assert before >= 3
        loop.run_until_complete(stop(timer))

    @pytest.mark.parametrize("uvloop", [False, True])
    @pytest.mark.parametrize("how", ["exit", "sys.exit", "dropped", "closed"])
    def test_the_interpreter_exits_with_live_timers(self, how, uvloop):
        if uvloop:
            pytest.importorskip("uvloop")
        done = in_subprocess(
            f"""
            async def tick(interval):
                await asyncio.sleep(60)
            async def main():
                for eager in (False, True):
                    keep.append(aiotools.create_timer(tick, 60, eager=eager))
                    keep.append(aiotools.create_timer(tick, 0.001, overlap=3))
                    keep.append(aiotools.create_timer(tick, 60, first=5, tick_timeout=5))
                await asyncio.sleep(0.01)
                keep.append(aiotools.create_timer(tick, 60))
                for task in asyncio.all_tasks():
                    task._log_destroy_pending = False
            keep = []
            if {uvloop}:
                import uvloop
                loop = uvloop.new_event_loop()
            else:
                loop = asyncio.new_event_loop()
            loop.run_until_complete(main())
            if {how!r} == "sys.exit":
                sys.exit(0)
            if {how!r} == "closed":
                loop.close()
            if {how!r} in ("dropped", "closed"):
                del loop
                keep.clear()
                gc.collect()
            """
        )
        lines = [line for line in done.stderr.splitlines() if "destroyed but it is pending" not in line]
        assert "Fatal" not in done.stderr and "Segmentation" not in done.stderr
        if how == "closed":
            assert not [line for line in lines if "Traceback" in line], done.stderr

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_fork_with_live_timers(self):
        in_subprocess(
            """
            async def tick(interval):
                ticked.set()
            async def main():
                global ticked
                ticked = asyncio.Event()
                timer = aiotools.create_timer(tick, 0.001)
                await ticked.wait()
                pid = os.fork()
                if pid == 0:
                    # The loop of the parent does not run here; the timers of a new one do, and this one can be dropped.
                    asyncio.events._set_running_loop(None)
                    async def child():
                        other = aiotools.create_timer(tick, 0.001, limit=3)
                        await other
                        return other.stats().ticks
                    ticks = asyncio.run(child())
                    os._exit(0 if ticks == 3 and not timer.done() else 1)
                for _ in range(3):
                    ticked.clear()
                    await ticked.wait()
                timer.cancel()
                _, status = os.waitpid(pid, 0)
                assert os.waitstatus_to_exitcode(status) == 0, status
            asyncio.run(main())
            """,
            "-W",
            "ignore",
        )

    @pytest.mark.loop_kinds("default", "uvloop", reason="large; the other kinds differ in nothing that matters here")
    async def test_a_hundred_thousand_live_timers(self):
        tick, times = counting()
        with hand_clock() as clock:

            async def make(count):
                made = [create_timer(tick, 1000 + i / 1000, first=1000) for i in range(count)]
                await clock.settle(2)
                return made

            count = 100_000
            if os.environ.get("AIOTOOLS_DEBUG") or "ASAN_OPTIONS" in os.environ:
                count = 4000  # such a core (tools/test-sanitized) looks through the whole queue after each change
            timers = await make(count)
            assert times == []
            await clock.jump(1001, turns=3)
            assert len(times) == count
            for timer in timers:
                timer.cancel()
            await clock.settle(2)
            assert all(timer.done() for timer in timers)

    async def test_garbage_collection_at_every_moment(self, loop_errors):
        threshold = gc.get_threshold()
        gc.set_threshold(1)
        try:
            ticks = Ticks()
            timer = create_timer(ticks, 0.001, overlap="cancel", tick_timeout=0.005)
            await asyncio.sleep(0.01)
            await stop(timer)
            await create_timer(counting()[0], 0.001, limit=3, eager=True)
        finally:
            gc.set_threshold(*threshold)
        loop_errors.take()


class TestWhatAcceptanceFound:
    async def test_a_stop_iteration_from_jitter_ends_the_timer_with_a_runtime_error(self):
        """It would be taken for the end of the coroutine, or, on 3.11, leave the task pending for ever."""

        def jitter():
            raise StopIteration(1)

        tick, times = counting()
        timer = create_timer(tick, 60, jitter=jitter)
        with pytest.raises(RuntimeError, match="StopIteration") as info:
            await timer
        assert isinstance(info.value.__cause__, StopIteration)
        assert times == []

    async def test_jitter_is_asked_once_for_each_tick_of_a_limit(self):
        asked = iter([0.0, 0.25, 0.5])
        with aiotools.VirtualClock().patch_loop() as clock:
            tick, times = counting()
            await create_timer(tick, 1.0, jitter=lambda: next(asked), limit=3)
            assert times == [0.0, 1.25, 2.5]
            assert clock.vtime == 2.5
        assert list(asked) == []

    @pytest.mark.parametrize("overlap", ["skip", "queue", 1])
    async def test_jitter_is_asked_again_after_a_tick_that_had_no_room(self, overlap):
        asked = []

        def jitter():
            asked.append(None)
            return 0.0

        async def tick(interval):
            await asyncio.sleep(1.5)

        with aiotools.VirtualClock().patch_loop():
            await create_timer(tick, 1.0, jitter=jitter, limit=2, overlap=overlap)
        assert len(asked) >= 2

    async def test_the_last_tick_of_a_limit_may_ask_for_what_cannot_come_any_more(self):
        done = []

        async def tick(interval):
            timer.reschedule(5)
            timer.pause()
            timer.resume()
            timer.trigger()
            with pytest.raises(ValueError, match="interval"):
                timer.reschedule(float("nan"))
            done.append(interval)

        with aiotools.VirtualClock().patch_loop():
            timer = create_timer(tick, 1.0, limit=1)
            assert await timer is None
        assert done == [1.0] and timer.next_due is None
        assert timer.stats().ticks == 1 and timer.stats().errors == 0
        with pytest.raises(RuntimeError, match="the timer has ended"):
            timer.reschedule(1)

    @pytest.mark.parametrize("name", ["on_error", "jitter"])
    async def test_a_coroutine_function_is_refused_where_an_ordinary_callable_is_needed(self, name):
        async def never(*args):
            raise AssertionError

        tick, _ = counting()
        with pytest.raises(TypeError, match=f"{name} must be .*not a coroutine function"):
            create_timer(tick, 1.0, **{name: never})
