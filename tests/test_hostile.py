"""Hostile surroundings: loops whose methods use us in turn, comparisons that change what is compared, ends of programs.

Most of these crashed, or lost a wake-up, once. They are worth most under a sanitizer (`make test-asan`).
"""

import asyncio
import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref

import pytest

import aiotools


def run_program(text, *arguments):
    """The output of a program in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments],
        capture_output=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def once(loop, name, action, when=lambda *args: True):
    """Replaces a method of the loop until its first call that fits; action runs before that goes on to the original."""
    original = getattr(loop, name)

    def replacement(*args, **kwargs):
        if not when(*args):
            return original(*args, **kwargs)
        setattr(loop, name, original)
        action()
        return original(*args, **kwargs)

    setattr(loop, name, replacement)


def is_ours(*args):
    return any("aiotools" in repr(arg) for arg in args)


def fail():
    raise ZeroDivisionError


class TestLoopsThatUseUsInTheirMethods:
    """Each method of a loop may be patched, and in Python a signal handler may strike in any of them."""

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="puts methods onto the loop")
    async def test_a_sleep_may_be_closed_while_it_is_woken(self):
        loop = asyncio.get_running_loop()
        fired = []
        sleep = aiotools.sleep(0.001)
        sleep.send(None).add_done_callback(fired.append)
        gate = loop.create_future()
        loop.call_later(0.01, gate.set_result, None)
        once(loop, "get_debug", sleep.close)
        await gate
        assert len(fired) <= 1

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="puts methods onto the loop")
    async def test_a_waiter_that_is_completed_while_its_loop_fails_runs_its_callbacks_once(self, monkeypatch):
        loop = asyncio.get_running_loop()
        unraisable = []
        monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
        barrier = aiotools.Barrier(2)
        wait = barrier.wait()
        waiter = wait.send(None)
        called = []
        waiter.add_done_callback(called.append)

        def cancel_and_fail():
            waiter.cancel()
            fail()

        once(loop, "get_debug", cancel_and_fail)
        barrier.abort()
        await aiotools.checkpoint()
        await aiotools.checkpoint()
        assert called == [waiter]
        assert [type(item.exc_value) for item in unraisable] == [ZeroDivisionError]
        wait.close()

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="puts methods onto the loop")
    async def test_who_is_woken_while_the_loop_fails_is_not_forgotten(self, monkeypatch):
        """No memory or no stack left: a failed abort() left the others waiting for ever."""
        unraisable = []
        monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
        barrier = aiotools.Barrier(3)
        tasks = [asyncio.create_task(barrier.wait()) for _ in range(2)]
        await asyncio.sleep(0)
        once(asyncio.get_running_loop(), "get_debug", fail)
        barrier.abort()
        assert len(unraisable) == 1
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.BrokenBarrierError)

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="puts methods onto the loop")
    async def test_a_barrier_may_be_broken_while_a_wait_sets_its_alarm(self):
        barrier = aiotools.Barrier(2)
        once(asyncio.get_running_loop(), "call_at", barrier.abort, is_ours)
        with pytest.raises(asyncio.BrokenBarrierError):
            await barrier.wait(timeout=60)
        assert barrier.broken

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="puts methods onto the loop")
    async def test_a_wait_whose_alarm_cannot_be_set_leaves_the_barrier(self):
        barrier = aiotools.Barrier(2)
        once(asyncio.get_running_loop(), "call_at", fail, is_ours)
        with pytest.raises(ZeroDivisionError):
            await barrier.wait(timeout=60)
        assert barrier.n_waiting == 0

    @pytest.mark.loop_kinds(
        "default", "eager", reason="puts methods onto the loop; in debug mode a foreign thread is refused"
    )
    async def test_another_loop_cannot_take_a_barrier_over_while_a_wait_sets_its_alarm(self):
        barrier = aiotools.Barrier(3)
        outcomes = []

        async def elsewhere():
            try:
                await barrier.wait(timeout=60)
            except RuntimeError as exc:
                outcomes.append(exc)

        def run_elsewhere():
            thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
            thread.start()
            thread.join()

        once(asyncio.get_running_loop(), "call_at", run_elsewhere, is_ours)
        task = asyncio.create_task(barrier.wait(timeout=60))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(outcomes) == 1 and barrier.n_waiting == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="puts methods onto the loop")
    async def test_an_error_of_the_loop_does_not_cost_the_wake_ups_of_other_threads(self, loop_errors):
        loop = asyncio.get_running_loop()
        queue = aiotools.Queue()
        getter = asyncio.create_task(queue.async_q.get())
        await asyncio.sleep(0)
        thread = threading.Thread(target=queue.sync_q.put, args=("item",))
        thread.start()
        thread.join()
        once(loop, "get_debug", fail)
        assert await getter == "item"
        loop_errors.take_one(ZeroDivisionError)

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="puts methods onto the loop")
    @pytest.mark.parametrize("reading", [float("nan"), float("inf"), -float("inf")])
    async def test_a_clock_without_a_finite_reading_is_refused(self, reading, monkeypatch):
        sleep = aiotools.sleep(1)
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "time", lambda: reading)
            with pytest.raises(ValueError, match="finite"):
                sleep.send(None)
        with pytest.raises(RuntimeError, match="cannot reuse"):
            sleep.send(None)

    def test_a_metaclass_may_change_the_bases_of_the_loop_while_it_is_looked_at(self):
        class Meta(type(asyncio.SelectorEventLoop)):
            armed = False

            def __getattribute__(cls, name):
                if name == "__module__" and Meta.armed:
                    Meta.armed = False
                    Loop.__bases__ = (type("Other", (asyncio.SelectorEventLoop,), {}),)
                    gc.collect()
                return super().__getattribute__(name)

        class Base(asyncio.SelectorEventLoop):
            pass

        class Loop(Base, metaclass=Meta):
            pass

        async def main():
            Meta.armed = True
            await aiotools.checkpoint()

        loop = Loop()
        try:
            loop.run_until_complete(main())
        finally:
            loop.close()
        assert not Meta.armed


class TestLittleStack:
    @pytest.mark.loop_kinds("default", reason="its call_soon_threadsafe() is written in Python")
    async def test_a_getter_that_could_not_be_told_is_told_by_the_next_put(self, monkeypatch):
        """A put at the end of the stack, whose loop cannot be called there any more, left the getter waiting for ever."""
        queue = aiotools.Queue()

        def put_at_the_end_of_the_stack(spare):
            def depth(n=0):
                try:
                    return depth(n + 1)
                except RecursionError:
                    return n

            def deeper(n):
                if n:
                    deeper(n - 1)
                else:
                    queue.sync_q.put("item")

            deeper(depth() - spare)

        for spare in range(16):
            getter = asyncio.create_task(queue.async_q.get())
            await asyncio.sleep(0)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "unraisablehook", lambda _: None)
                thread = threading.Thread(target=put_at_the_end_of_the_stack, args=(spare,))
                thread.start()
                thread.join()
            queue.sync_q.put("item")
            assert await getter == "item"
            while not queue.empty():
                queue.sync_q.get()

    @pytest.mark.parametrize(
        "kind", ["sleep", "queue", "priority queue", "put", "closing", "resetting", "barrier", "done", "stop"]
    )
    def test_deeply_nested_objects_are_freed(self, kind):
        """Before 3.14 the dealloc of a container must see to the depth of the stack itself."""
        variable = contextvars.ContextVar("variable")

        def nest(inner):
            if kind == "sleep":
                return aiotools.sleep(1, inner)
            if kind in ("queue", "priority queue"):
                queue = aiotools.Queue() if kind == "queue" else aiotools.PriorityQueue()
                queue.sync_q.put(inner)
                return queue
            if kind == "put":
                return aiotools.Queue().async_q.put(inner)
            if kind == "closing":
                return aiotools.closing_async(inner)
            if kind == "resetting":
                return aiotools.resetting(variable, inner)
            if kind == "barrier":
                barrier = aiotools.Barrier(1)
                barrier.inner = inner
                return barrier
            if kind == "done":
                return aiotools.closing_async(inner).__aenter__()
            try:
                next(aiotools.closing_async(1).__aenter__())
            except StopIteration as exc:
                exc.__traceback__ = None
                exc.__context__ = inner
                return exc

        def build_and_drop():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                outer = None
                for _ in range(100_000):
                    outer = nest(outer)
                del outer

        before = threading.stack_size(4 * 1024 * 1024)
        try:
            thread = threading.Thread(target=build_and_drop)
            thread.start()
        finally:
            threading.stack_size(before)
        thread.join()


class TestCallbacks:
    async def test_a_callback_added_while_others_are_compared_stays(self):
        sleep = aiotools.sleep(0.001)
        waiter = sleep.send(None)
        called = []

        class Callback:
            def __init__(self, name):
                self.name = name

            def __eq__(self, other):
                if self.name == "first":
                    waiter.add_done_callback(lambda _: called.append("late"))
                return self.name == "first"

            __hash__ = None

            def __call__(self, _):
                called.append(self.name)

        waiter.add_done_callback(Callback("first"))
        waiter.add_done_callback(Callback("second"))
        assert waiter.remove_done_callback(Callback("other")) == 1
        await aiotools.sleep(0.01)
        assert called == ["second", "late"]
        sleep.close()


class TestTimers:
    """What a timer calls may end the timer, by its coroutine if need be."""

    @pytest.mark.parametrize("what", ["cb", "jitter", "on_error"])
    async def test_a_timer_may_be_closed_by_what_it_calls(self, what, loop_errors):
        calls = []

        class Closing:
            """Nobody but the timer keeps it."""

            def __call__(self, *args):
                calls.append(what)
                if len(calls) == 3:
                    timer.get_coro().close()
                    gc.collect()
                return tick() if what == "cb" else 0.0

        async def tick(*args):
            if what == "on_error":
                raise ZeroDivisionError

        options = {what: Closing()} if what != "cb" else {}
        with aiotools.VirtualClock().patch_loop():
            timer = aiotools.create_timer(Closing() if what == "cb" else tick, 1, **options)
            await asyncio.sleep(2.5)
            started = timer.stats().ticks
            await asyncio.sleep(10)
            assert len(calls) == 3 and timer.stats().ticks == started
            timer.cancel()
            # As with any coroutine that was closed under its task.
            with pytest.raises((RuntimeError, asyncio.CancelledError)):
                await timer

    async def test_a_timer_closed_while_its_new_interval_is_read_is_not_kept_by_the_loop(self):
        timers = []

        class Closing:
            def __float__(self):
                timers[0].get_coro().close()
                return 0.0

        class Interval(float):
            pass

        async def tick(interval):
            pass

        interval = Interval(60)
        gone = weakref.ref(interval)
        timers.append(aiotools.create_timer(tick, interval))
        del interval
        await asyncio.sleep(0)
        timers[0].reschedule(Closing())
        timers[0].cancel()
        with pytest.raises((RuntimeError, asyncio.CancelledError)):
            await timers[0]
        deadlines, _ = aiotools._aiotools._loop_counts(asyncio.get_running_loop())
        timers.clear()
        gc.collect()
        assert gone() is None
        assert deadlines == 0

    def test_the_coroutine_of_a_timer_may_outlive_its_loop(self):
        def make():
            loop = asyncio.new_event_loop()
            made = []

            async def tick(interval):
                pass

            def start():
                made.append(aiotools.create_timer(tick, 1).get_coro())
                loop.stop()

            loop.set_exception_handler(lambda loop, context: None)
            loop.call_soon(start)
            loop.run_forever()
            loop.close()
            return made.pop(), weakref.ref(loop)

        coro, loop = make()
        gc.collect()
        assert loop() is None
        with pytest.raises(RuntimeError, match="event loop"):
            coro.send(None)


class TestBursts:
    @pytest.mark.loop_kinds("default", "eager", reason="puts methods onto the loop; in debug mode there are no sweeps")
    async def test_a_look_that_the_loop_refuses_is_taken_later(self, loop_errors):
        """The scope waited for ever for children of which nobody would look whether they had ended."""
        loop = asyncio.get_running_loop()

        def is_sweep(*args):
            return type(args[0]).__name__ == "Sweep"

        async def child():
            for _ in range(20):
                await asyncio.sleep(0)

        async with aiotools.TaskScope() as scope:
            for _ in range(20):
                scope.create_task(child())
            await asyncio.sleep(0)
            # The one that a sweep asks for, when the host waits already.
            once(loop, "call_soon", fail, is_sweep)
        assert scope._n_done == 20
        assert [type(error["exception"]) for error in loop_errors] == [ZeroDivisionError]
        loop_errors.clear()


class TestComparisons:
    @pytest.mark.parametrize("name", ["_put", "_get"])
    def test_a_comparison_cannot_change_the_queue_that_compares(self, name):
        """It could call the default hooks, which mutated the heap under the comparison."""
        queue = aiotools.PriorityQueue()
        refused = []

        class Item:
            armed = False

            def __init__(self, n):
                self.n = n

            def __lt__(self, other):
                if Item.armed:
                    Item.armed = False
                    with pytest.raises(RuntimeError, match="comparisons"):
                        queue._put(Item(0)) if name == "_put" else queue._get()
                    refused.append(name)
                return self.n < other.n

        for n in range(16):
            queue.sync_q.put(Item(n))
        Item.armed = True
        assert queue.sync_q.get().n == 0
        Item.armed = True
        queue.sync_q.put(Item(0))
        assert refused == [name, name]
        assert [queue.sync_q.get().n for _ in range(16)] == [0, *range(1, 16)]


class TestEndOfTheProgram:
    def test_a_daemon_thread_may_wake_up_in_a_queue_while_the_interpreter_ends(self):
        """Up to 3.13 it ends there, with its stack, and what the queue knew of it was on that stack."""
        run_program("""
            import aiotools, threading, time

            queue = aiotools.Queue()

            class Late:
                def __del__(self, sleep=time.sleep, queue=queue):
                    sleep(0.2)
                    for i in range(10):
                        queue.sync_q.put(i)
                    queue.statistics()

            def get(depth):
                if depth:
                    return max(map(get, [depth - 1]))
                queue.sync_q.get(timeout=0.1)

            late = Late()
            for _ in range(4):
                threading.Thread(target=get, args=(50,), daemon=True).start()
            time.sleep(0.02)
        """)


class TestLoopsThatTakeNoAttribute:
    def test_their_place_in_the_table_goes_with_them(self):
        made = []
        probe = asyncio.new_event_loop()

        class Loop:
            __slots__ = ("__weakref__",)

            def get_debug(self):
                return False

            def time(self):
                return probe.time()

            def call_soon(self, *args, **kwargs):
                return probe.call_soon(*args, **kwargs)

        def table():
            return [d for d in gc.get_objects() if type(d) is dict and id(made[0]) in d]

        try:
            made.append(Loop())
            aiotools._aiotools._loop_counts(made[0])
            gc.collect()
            assert table() == []
        finally:
            probe.close()
