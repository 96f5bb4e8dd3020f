"""The services under every type of ours: waiters, their batched wake-ups, the timer queue, the state of a loop.

Users never get a waiter; here it is taken from an awaitable by hand, as a task takes it.
"""

import asyncio
import contextvars
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest

import aiotools
from aiotools import _aiotools as core


def counts():
    return core._loop_counts(asyncio.get_running_loop())


class Waiting:
    """A sleep that was started by hand, and its waiter."""

    def __init__(self, awaitable=None):
        self.awaitable = awaitable if awaitable is not None else aiotools.sleep(60)
        self.waiter = self.awaitable.send(None)

    def __enter__(self):
        return self.waiter

    def __exit__(self, *exc_info):
        self.awaitable.close()


def run_python(code, *options, timeout=60):
    """A script in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout
    )


class TestWaiter:
    """It speaks the protocol of asyncio.Future, with the same meaning."""

    async def test_it_is_a_future_to_asyncio_and_belongs_to_the_loop(self):
        with Waiting() as waiter:
            assert asyncio.isfuture(waiter)
            assert waiter._asyncio_future_blocking is True
            assert waiter.get_loop() is asyncio.get_running_loop()
            assert type(waiter).get_loop(waiter) is asyncio.get_running_loop()

    async def test_before_it_is_done(self):
        with Waiting() as waiter:
            assert not waiter.done() and not waiter.cancelled()
            with pytest.raises(asyncio.InvalidStateError):
                waiter.result()
            with pytest.raises(asyncio.InvalidStateError):
                waiter.exception()
            assert repr(waiter) == "<aiotools waiter pending>"

    async def test_once_it_was_woken(self):
        with Waiting(aiotools.checkpoint()) as waiter:
            assert waiter.done() and not waiter.cancelled()
            assert waiter.result() is None and waiter.exception() is None
            assert waiter.cancel() is False
            assert repr(waiter) == "<aiotools waiter woken>"

    @pytest.mark.parametrize(
        "args, kwargs, expected", [((), {}, ()), (("m",), {}, ("m",)), ((), {"msg": 5}, (5,)), ((None,), {}, ())]
    )
    async def test_once_it_was_cancelled(self, args, kwargs, expected):
        with Waiting() as waiter:
            assert waiter.cancel(*args, **kwargs) is True
            assert waiter.done() and waiter.cancelled()
            for ask in (waiter.result, waiter.exception):
                with pytest.raises(asyncio.CancelledError) as caught:
                    ask()
                assert caught.value.args == expected
            assert waiter.cancel() is False
            assert repr(waiter) == "<aiotools waiter cancelled>"

    async def test_wrong_calls_are_type_errors(self):
        with Waiting() as waiter:
            for call in (
                lambda: waiter.cancel(1, 2),
                lambda: waiter.cancel(message=1),
                lambda: waiter.add_done_callback(),
                lambda: waiter.add_done_callback(print, print),
                lambda: waiter.add_done_callback(print, loop=None),
                lambda: waiter.add_done_callback(print, context=5),
                lambda: type(waiter)(),
            ):
                with pytest.raises(TypeError):
                    call()
            with pytest.raises(AttributeError):
                del waiter._asyncio_future_blocking
            with pytest.raises(AttributeError):
                waiter.other = 1

    async def test_callbacks_run_later_in_order_each_in_its_context(self):
        variable = contextvars.ContextVar("variable", default="none")
        order = []
        with Waiting() as waiter:
            for name in "abc":
                context = contextvars.Context()
                context.run(variable.set, name)
                waiter.add_done_callback(lambda w: order.append((w is waiter, variable.get())), context=context)
            variable.set("current")
            waiter.add_done_callback(lambda w: order.append((w is waiter, variable.get())))
            waiter.cancel()
            assert order == []
            await asyncio.sleep(0)
            assert order == [(True, "a"), (True, "b"), (True, "c"), (True, "current")]

    async def test_a_callback_added_when_it_is_done_runs_soon(self):
        order = []
        with Waiting() as waiter:
            waiter.cancel()
            waiter.add_done_callback(lambda w: order.append(1))
            waiter.add_done_callback(lambda w: order.append(2))
            assert order == []
            await asyncio.sleep(0)
            assert order == [1, 2]
            waiter.add_done_callback(lambda w: order.append(3))
            await asyncio.sleep(0)
            assert order == [1, 2, 3]

    async def test_a_callback_that_adds_another_one_has_it_run_in_a_later_turn(self):
        order = []

        def again(waiter):
            order.append("first")
            waiter.add_done_callback(lambda w: order.append("second"))

        with Waiting() as waiter:
            waiter.add_done_callback(again)
            waiter.cancel()
            await asyncio.sleep(0)
            assert order == ["first"]
            await asyncio.sleep(0)
            assert order == ["first", "second"]

    async def test_removed_callbacks_do_not_run(self):
        order = []
        first, second, third = (lambda w, n=n: order.append(n) for n in (1, 2, 3))
        with Waiting() as waiter:
            for callback in (first, second, first, third):
                waiter.add_done_callback(callback)
            assert waiter.remove_done_callback(first) == 2
            assert waiter.remove_done_callback(first) == 0
            waiter.cancel()
            assert waiter.remove_done_callback(second) == 0
            await asyncio.sleep(0)
            assert order == [2, 3]

    async def test_removing_survives_a_comparison_that_raises_or_completes_the_waiter(self):
        class Hostile:
            def __init__(self, act):
                self.act = act

            def __call__(self, waiter):
                called.append(self)

            def __eq__(self, other):
                return self.act()

            __hash__ = None

        called = []
        with Waiting() as waiter:

            def complete():
                waiter.cancel()
                return True

            def fail():
                raise LookupError("compared")

            hostile = Hostile(fail)
            waiter.add_done_callback(hostile)
            with pytest.raises(LookupError, match="compared"):
                waiter.remove_done_callback(object())
            hostile.act = complete
            waiter.remove_done_callback(object())
            await asyncio.sleep(0)
            assert called == [hostile]


class TestBatch:
    async def test_a_callback_that_raises_is_reported_and_the_rest_runs(self, loop_errors):
        order = []

        def bad(waiter):
            raise LookupError("a bad callback")

        with Waiting() as one, Waiting() as two:
            one.add_done_callback(bad)
            one.add_done_callback(lambda w: order.append("one"))
            two.add_done_callback(lambda w: order.append("two"))
            one.cancel()
            two.cancel()
            await asyncio.sleep(0)
        assert order == ["one", "two"]
        loop_errors.take_one(LookupError)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_what_stops_the_loop_leaves_the_rest_of_the_batch_for_later(self, new_loop, loop_kind, error):
        loop = new_loop()
        order = []

        def interrupt(waiter):
            order.append("interrupt")
            raise error("stop")

        async def main():
            one, two = Waiting(), Waiting()
            one.waiter.add_done_callback(interrupt)
            two.waiter.add_done_callback(lambda w: order.append("two"))
            one.waiter.cancel()
            two.waiter.cancel()
            one.awaitable.close()
            two.awaitable.close()
            await asyncio.sleep(0.01)

        task = loop.create_task(main())
        with pytest.raises(error, match="stop"):
            loop.run_until_complete(task)
        # uvloop turns once more before it stops.
        assert order == ["interrupt"] or loop_kind == "uvloop"
        loop.run_until_complete(task)
        assert order == ["interrupt", "two"]

    @pytest.mark.loop_kinds("default", "uvloop", "eager", reason="debug mode has no batch")
    async def test_a_context_that_is_entered_already_is_an_error_of_that_callback_alone(self, monkeypatch, loop_errors):
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        drains = []
        order = []
        call_soon = loop.call_soon
        with Waiting() as one, Waiting() as two:
            one.add_done_callback(lambda w: order.append("one"), context=context)
            two.add_done_callback(lambda w: order.append("two"))
            with monkeypatch.context() as patch:
                patch.setattr(loop, "call_soon", lambda cb, **kw: (drains.append(cb), call_soon(cb, **kw))[1])
                one.cancel()
                two.cancel()
            context.run(drains[0])
            await asyncio.sleep(0)
        assert order == ["two"]
        loop_errors.take_one(RuntimeError)

    @pytest.mark.loop_kinds("default", "uvloop", "eager", reason="debug mode has no batch")
    async def test_a_batch_that_is_run_from_inside_itself_is_taken_over_by_the_inner_run(self, monkeypatch):
        """As a loop that is turned from inside a callback does; here the handle's function is called."""
        loop = asyncio.get_running_loop()
        drains = []
        call_soon = loop.call_soon

        def spy(callback, *args, **kwargs):
            drains.append(callback)
            return call_soon(callback, *args, **kwargs)

        order = []

        def nested(waiter):
            order.append("outer begins")
            drains[0]()
            order.append("outer ends")

        with Waiting() as one, Waiting() as two, Waiting() as three:
            one.add_done_callback(nested)
            for name, waiter in (("two", two), ("three", three)):
                waiter.add_done_callback(lambda w, name=name: order.append(name))
            with monkeypatch.context() as patch:
                patch.setattr(loop, "call_soon", spy)
                for waiter in (one, two, three):
                    waiter.cancel()
            assert len(drains) == 1
            await asyncio.sleep(0)
        assert order == ["outer begins", "two", "three", "outer ends"]

    async def test_wake_ups_are_first_in_first_out_and_never_later_than_call_soon(self):
        loop = asyncio.get_running_loop()
        order = []
        waiting = [Waiting() for _ in range(5)]
        for i, one in enumerate(waiting):
            one.waiter.add_done_callback(lambda w, i=i: order.append(i))
        for one in waiting:
            one.waiter.cancel()
        loop.call_soon(order.append, "foreign")
        await asyncio.sleep(0)
        assert [i for i in order if i != "foreign"] == [0, 1, 2, 3, 4]
        assert order[-1] == "foreign"
        for one in waiting:
            one.awaitable.close()

    @pytest.mark.loop_kinds("debug", reason="what debug mode adds")
    async def test_in_debug_mode_each_wake_up_is_a_handle_of_its_own(self, monkeypatch):
        loop = asyncio.get_running_loop()
        scheduled = []
        call_soon = loop.call_soon
        monkeypatch.setattr(
            loop, "call_soon", lambda cb, *args, **kw: (scheduled.append((cb, args)), call_soon(cb, *args, **kw))[1]
        )
        callbacks = [lambda w: None for _ in range(3)]
        waiting = [Waiting() for _ in callbacks]
        for one, callback in zip(waiting, callbacks, strict=True):
            one.waiter.add_done_callback(callback)
            one.waiter.cancel()
        assert scheduled == [(callback, (one.waiter,)) for one, callback in zip(waiting, callbacks, strict=True)]
        await asyncio.sleep(0)
        for one in waiting:
            one.awaitable.close()

    async def test_methods_patched_on_the_loop_are_used(self, monkeypatch):
        loop = asyncio.get_running_loop()
        calls = []
        for name in ("call_soon", "call_at"):
            method = getattr(loop, name)
            monkeypatch.setattr(
                loop, name, lambda *args, method=method, name=name, **kw: (calls.append(name), method(*args, **kw))[1]
            )
        await aiotools.checkpoint()
        await aiotools.sleep(0.001)
        assert {"call_soon", "call_at"} <= set(calls)

    async def test_a_call_soon_that_fails_leaves_the_waiter_pending(self, monkeypatch):
        loop = asyncio.get_running_loop()
        order = []
        with Waiting() as waiter:
            waiter.add_done_callback(lambda w: order.append("called"))

            def broken(*args, **kwargs):
                raise LookupError("broken call_soon")

            with monkeypatch.context() as patch:
                patch.setattr(loop, "call_soon", broken)
                with pytest.raises(LookupError, match="broken call_soon"):
                    waiter.cancel()
            assert not waiter.done()
            assert waiter.cancel() is True
            await asyncio.sleep(0)
            assert order == ["called"]

    async def test_a_call_at_that_fails_leaves_no_deadline(self, monkeypatch):
        loop = asyncio.get_running_loop()

        def broken(*args, **kwargs):
            raise LookupError("broken call_at")

        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_at", broken)
            with pytest.raises(LookupError, match="broken call_at"):
                await aiotools.sleep(0.001)
        assert counts() == (0, 0)
        await aiotools.sleep(0.001)


class TestTimerQueue:
    async def test_the_loop_sees_one_handle_for_any_number_of_deadlines(self, monkeypatch):
        loop = asyncio.get_running_loop()
        armed = []
        call_at = loop.call_at
        monkeypatch.setattr(loop, "call_at", lambda *args, **kw: (armed.append(args[0]), call_at(*args, **kw))[1])
        tasks = [loop.create_task(aiotools.sleep(10 + i)) for i in range(20)]
        await asyncio.sleep(0)
        assert len(armed) == 1
        earlier = loop.create_task(aiotools.sleep(5))
        await asyncio.sleep(0)
        assert len(armed) == 2 and armed[1] < armed[0]
        for task in (*tasks, earlier):
            task.cancel()
        await asyncio.wait([*tasks, earlier])
        assert counts()[0] == 0

    async def test_a_deadline_that_went_away_costs_one_early_wake_up_and_no_more(self):
        loop = asyncio.get_running_loop()
        short = loop.create_task(aiotools.sleep(0.005))
        long = loop.create_task(aiotools.sleep(0.02, "long"))
        await asyncio.sleep(0)
        short.cancel()
        assert await long == "long"

    async def test_a_wake_up_that_fails_in_a_tick_is_reported_and_tried_again(self, monkeypatch, loop_errors):
        loop = asyncio.get_running_loop()
        call_soon = loop.call_soon
        failures = 3

        def broken(*args, **kwargs):
            nonlocal failures
            if failures:
                failures -= 1
                raise MemoryError("for the test")
            return call_soon(*args, **kwargs)

        task = loop.create_task(aiotools.sleep(0.001, "result"))
        await asyncio.sleep(0)
        monkeypatch.setattr(loop, "call_soon", broken)
        done = loop.create_future()
        loop.call_later(0.5, done.cancel)
        task.add_done_callback(lambda task: done.done() or done.set_result(None))
        # Nothing here may depend on call_soon while it is broken; the loop turns for its timers.
        await done
        assert task.result() == "result" and failures == 0
        assert [type(context["exception"]) for context in loop_errors.take()] == [MemoryError] * 3

    async def test_the_clock_failing_is_an_error_of_the_call(self, monkeypatch):
        loop = asyncio.get_running_loop()

        def broken():
            raise LookupError("broken clock")

        with monkeypatch.context() as patch:
            patch.setattr(loop, "time", broken)
            with pytest.raises(LookupError, match="broken clock"):
                aiotools.sleep(1).send(None)
            patch.setattr(loop, "time", lambda: "noon")
            with pytest.raises(TypeError):
                aiotools.sleep(1).send(None)


class TestLife:
    """What happens to waiters and deadlines when their loop goes, or the interpreter."""

    def test_a_loop_that_is_closed_with_sleepers_is_collected_with_them(self, new_loop, recwarn):
        class Marker:
            pass

        loop = asyncio.new_event_loop()
        marker = Marker()
        refs = [weakref.ref(loop), weakref.ref(marker)]

        async def sleeper(marker):
            await aiotools.sleep(60)

        tasks = [loop.create_task(sleeper(marker)) for _ in range(3)]
        loop.run_until_complete(asyncio.sleep(0))
        assert core._loop_counts(loop)[0] == 3
        loop.set_exception_handler(lambda loop, context: None)
        loop.close()
        del tasks, marker, sleeper, loop
        gc.collect()
        gc.collect()
        assert [ref() for ref in refs] == [None, None]

    @pytest.mark.loop_kinds("default", reason="the same on every loop")
    def test_a_closed_loop_without_any_goes_at_once(self, run):
        async def use_it():
            await aiotools.checkpoint()
            await aiotools.sleep(0.001)
            return weakref.ref(asyncio.get_running_loop())

        gc.collect()
        gc.disable()
        try:
            assert asyncio.run(use_it())() is None
        finally:
            gc.enable()

    def test_waking_on_a_closed_loop_is_a_runtime_error_and_changes_nothing(self, new_loop):
        loop = new_loop()
        kept = []

        async def main():
            one = Waiting()
            one.waiter.add_done_callback(print)
            kept.append(one)

        loop.run_until_complete(main())
        loop.close()
        [one] = kept
        with pytest.raises(RuntimeError, match="loop is closed"):
            one.waiter.cancel()
        assert not one.waiter.done()
        one.awaitable.close()

    def test_a_waiter_whose_loop_is_gone_says_so(self):
        loop = asyncio.new_event_loop()
        kept = []

        async def main():
            one = Waiting(aiotools.checkpoint())
            kept.append(one)

        loop.run_until_complete(main())
        loop.close()
        del loop
        gc.collect()
        [one] = kept
        with pytest.raises(RuntimeError, match="the event loop is gone"):
            one.waiter.get_loop()
        with pytest.raises(RuntimeError):
            one.waiter.add_done_callback(print)
        one.awaitable.close()

    @pytest.mark.loop_kinds("default", reason="a loop that takes no attributes is made from the default one")
    def test_a_loop_that_takes_no_attributes_works_as_well(self, run):
        class Strict(asyncio.SelectorEventLoop):
            def __setattr__(self, name, value):
                if name.startswith("_aiotools"):
                    raise AttributeError(f"no attribute {name}")
                super().__setattr__(name, value)

        async def main():
            results = await asyncio.gather(*[aiotools.sleep(0.001 * i, i) for i in range(3)], aiotools.checkpoint())
            async with asyncio.timeout(5):
                await aiotools.sleep(0.001)
            return results

        with asyncio.Runner(loop_factory=Strict) as runner:
            assert runner.run(main()) == [0, 1, 2, None]
            assert not hasattr(runner.get_loop(), "_aiotools_loopstate")

    def test_loops_in_many_threads_do_not_mix(self, new_loop):
        loops = [new_loop() for _ in range(4)]
        failed = []

        async def worker(loop):
            for i in range(50):
                assert asyncio.get_running_loop() is loop
                assert await aiotools.sleep(0.0001, i) == i
                await asyncio.gather(*[aiotools.checkpoint() for _ in range(5)])

        def work(loop):
            try:
                loop.run_until_complete(worker(loop))
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(loop,)) for loop in loops]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []

    @pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
    @pytest.mark.parametrize("how", ["", "loop.close()", "raise SystemExit(0)", "sys.exit()"])
    def test_the_interpreter_ends_with_live_sleepers(self, loop, how):
        if loop == "uvloop":
            pytest.importorskip("uvloop", reason="uvloop is not installed")
        done = run_python(
            f"""
            import asyncio, sys, {loop}
            import aiotools
            loop = {loop}.new_event_loop()
            async def sleeper():
                await aiotools.sleep(1000)
            tasks = [loop.create_task(sleeper()) for _ in range(5)]
            loop.run_until_complete(asyncio.sleep(0.001))
            loop.set_exception_handler(lambda loop, context: None)
            print("end")
            {how}
            """
        )
        assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
        assert "Fatal" not in done.stderr

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_has_a_loop_of_its_own_and_leaves_the_parent_s_alone(self):
        done = run_python(
            """
            import asyncio, os, sys
            import aiotools
            async def main():
                task = asyncio.create_task(aiotools.sleep(0.01, "parent"))
                await aiotools.checkpoint()
                pid = os.fork()
                if pid == 0:
                    asyncio.events._set_running_loop(None)
                    loop = asyncio.new_event_loop()
                    assert loop.run_until_complete(aiotools.sleep(0.02, "child")) == "child"
                    assert not task.done()
                    os._exit(7)
                assert await task == "parent"
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
                print("both")
            asyncio.run(main())
            """,
            "-W",
            "ignore::DeprecationWarning",
        )
        assert done.stdout == "both\n", done.stderr

    def test_an_interrupt_reaches_a_sleeping_main_task(self):
        done = run_python(
            """
            import asyncio, os, signal
            import aiotools
            async def main():
                asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
                try:
                    await aiotools.sleep(1000)
                finally:
                    print("cleaned up")
            try:
                asyncio.run(main())
            except KeyboardInterrupt:
                print("interrupted")
            """
        )
        assert done.stdout == "cleaned up\ninterrupted\n", done.stderr
        assert signal.SIGINT


class TestSubinterpreters:
    @pytest.mark.skipif(sys.version_info < (3, 12), reason="interpreters with a GIL of their own came with 3.12")
    def test_each_interpreter_has_a_core_of_its_own(self):
        done = run_python(
            """
            try:
                import _interpreters as interpreters
            except ImportError:
                import _xxsubinterpreters as interpreters
            code = '''
            import asyncio, aiotools
            async def main():
                assert await aiotools.sleep(0.001, "result") == "result"
                await asyncio.gather(*[aiotools.checkpoint() for _ in range(10)])
            asyncio.run(main())
            '''
            import textwrap, threading
            code = textwrap.dedent(code)
            exec(code)
            failed = []
            def work():
                for _ in range(2):
                    ident = interpreters.create()
                    try:
                        run = getattr(interpreters, "exec", None) or interpreters.run_string
                        error = run(ident, code)
                        if error is not None:
                            failed.append(error)
                    finally:
                        interpreters.destroy(ident)
            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            exec(code)
            assert not failed, failed
            print("fine")
            """
        )
        assert done.stdout == "fine\n", (done.returncode, done.stderr)
