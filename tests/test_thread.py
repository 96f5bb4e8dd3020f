import asyncio
import concurrent.futures
import contextvars
import functools
import gc
import inspect
import logging
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from aiotools.thread import LoopThread

# Long enough for anything that comes; only a test that fails waits for so long.
LONG = 30


def with_lt(test):
    """Gives the test a running LoopThread as `lt`.

    Not a fixture, so that the thread is stopped before leftovers are looked for.
    """

    @functools.wraps(test)
    def wrapper(self, *, new_loop, **kwargs):
        with LoopThread(loop_factory=new_loop) as lt:
            test(self, lt=lt, **kwargs)

    signature = inspect.signature(test)
    wrapper.__signature__ = signature.replace(
        parameters=[
            parameter.replace(name="new_loop") if parameter.name == "lt" else parameter
            for parameter in signature.parameters.values()
        ]
    )
    return wrapper


async def value_of(value):
    await asyncio.sleep(0)
    return value


async def fail_with(exc):
    await asyncio.sleep(0)
    raise exc


class Parked:
    """A coroutine that waits until it is released, and tells when it has begun and how it ended."""

    def __init__(self):
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.outcome = None
        self.release = None
        self.loop = None

    async def run(self):
        self.loop = asyncio.get_running_loop()
        self.release = asyncio.Event()
        self.begun.set()
        try:
            await self.release.wait()
            self.outcome = "finished"
            return "value"
        except asyncio.CancelledError:
            self.outcome = "cancelled"
            raise
        finally:
            self.ended.set()

    def let_go(self):
        self.loop.call_soon_threadsafe(self.release.set)


class TestLife:
    def test_start_returns_when_the_loop_runs(self, new_loop):
        lt = LoopThread(loop_factory=new_loop)
        assert not lt.is_running()
        assert lt.ident is None
        assert lt.start() is lt
        assert lt.is_running()
        assert lt.loop.is_running()
        assert lt.call(threading.get_ident) == lt.ident != threading.get_ident()
        lt.stop()
        assert not lt.is_running()
        assert lt.ident not in {thread.ident for thread in threading.enumerate()}

    def test_the_block_starts_and_stops_it(self, new_loop):
        with LoopThread(loop_factory=new_loop) as lt:
            loop = lt.loop
            assert lt.run(value_of(1)) == 1
        assert loop.is_closed()
        assert not lt.is_running()

    def test_uses_the_loops_of_asyncio_by_default(self):
        with LoopThread() as lt:
            other = asyncio.new_event_loop()
            other.close()
            assert type(lt.loop) is type(other)

    def test_the_name_is_that_of_the_thread(self, new_loop):
        with LoopThread(name="io", loop_factory=new_loop) as lt:
            assert lt.name == "io"
            assert lt.call(lambda: threading.current_thread().name) == "io"
        assert LoopThread().name

    def test_daemon_is_that_of_the_thread(self, new_loop):
        assert not LoopThread().daemon
        with LoopThread(loop_factory=new_loop, daemon=True) as lt:
            assert lt.daemon
            assert lt.call(lambda: threading.current_thread().daemon)

    def test_repr_tells_the_state(self, new_loop):
        lt = LoopThread(name="io", loop_factory=new_loop)
        assert repr(lt) == "<LoopThread 'io' created work=0>"
        lt.start()
        parked = Parked()
        lt.submit(parked.run())
        parked.begun.wait(LONG)
        assert repr(lt) == "<LoopThread 'io' running work=1>"
        lt.stop(drain=False)
        assert repr(lt) == "<LoopThread 'io' stopped work=0>"

    @with_lt
    def test_can_be_started_once(self, lt):
        with pytest.raises(RuntimeError, match="only once"):
            lt.start()
        lt.stop()
        with pytest.raises(RuntimeError, match="only once"):
            lt.start()

    def test_stopping_what_was_never_started_does_nothing(self, new_loop):
        lt = LoopThread(loop_factory=new_loop)
        lt.stop()
        with lt:
            assert lt.run(value_of(1)) == 1
        lt.stop()
        lt.stop()

    def test_the_error_of_the_factory_leaves_start(self):
        error = ZeroDivisionError()

        def factory():
            raise error

        lt = LoopThread(loop_factory=factory)
        with pytest.raises(ZeroDivisionError) as info:
            lt.start()
        assert info.value is error
        assert repr(lt).endswith("stopped work=0>")
        with pytest.raises(RuntimeError, match="does not accept"):
            lt.submit(value_of(1))

    def test_a_factory_that_returns_no_loop_makes_start_fail(self):
        with pytest.raises(AttributeError):
            LoopThread(loop_factory=object).start()

    async def test_the_error_of_the_factory_leaves_an_async_with(self):
        def factory():
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            async with LoopThread(loop_factory=factory):
                raise AssertionError("it must not be entered")

    def test_refuses_a_factory_that_cannot_be_called(self):
        with pytest.raises(TypeError, match="loop_factory must be callable, not 'int'"):
            LoopThread(loop_factory=1)

    @with_lt
    def test_loop_of_one_that_does_not_run_is_refused(self, lt):
        with pytest.raises(RuntimeError, match="no running loop"):
            _ = LoopThread().loop
        lt.stop()
        with pytest.raises(RuntimeError, match="no running loop"):
            _ = lt.loop

    async def test_async_with_starts_and_stops_it_from_another_loop(self, new_loop):
        async with LoopThread(loop_factory=new_loop) as lt:
            assert lt.loop is not asyncio.get_running_loop()
            assert await asyncio.wrap_future(lt.submit(value_of(1))) == 1
        assert not lt.is_running()

    async def test_async_with_leaves_the_outer_loop_running_while_it_drains(self, new_loop):
        parked = Parked()
        turns = 0

        async def release():
            nonlocal turns
            while parked.release is None:
                await asyncio.sleep(0)
            while turns < 10:
                await asyncio.sleep(0)
                turns += 1
            parked.let_go()

        async with LoopThread(loop_factory=new_loop) as lt:
            future = lt.submit(parked.run())
            task = asyncio.create_task(release())
        await task
        assert turns == 10
        assert future.result() == "value"

    async def test_cancellation_while_draining_cancels_the_work_and_is_kept(self, new_loop):
        parked = Parked()
        lt = LoopThread(loop_factory=new_loop)

        async def use():
            async with lt:
                lt.submit(parked.run())

        task = asyncio.create_task(use())
        while parked.release is None:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert parked.outcome == "cancelled"
        assert repr(lt).endswith("stopped work=0>")

    @pytest.mark.parametrize("turns", range(3))
    async def test_cancellation_while_starting_leaves_no_thread(self, new_loop, turns):
        lt = LoopThread(loop_factory=new_loop)
        task = asyncio.create_task(lt.__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        else:
            await lt.astop()
        assert lt._thread.ident is None or not lt._thread.is_alive()

    def test_a_block_that_fails_cancels_the_work(self, new_loop):
        parked = Parked()
        with pytest.raises(KeyError):
            with LoopThread(loop_factory=new_loop) as lt:
                future = lt.submit(parked.run())
                parked.begun.wait(LONG)
                raise KeyError
        assert parked.outcome == "cancelled"
        assert future.cancelled()


class TestWork:
    @with_lt
    def test_submit_gives_a_concurrent_future(self, lt):
        future = lt.submit(value_of(5))
        assert isinstance(future, concurrent.futures.Future)
        assert future.result(LONG) == 5
        assert future.exception() is None

    @with_lt
    def test_futures_work_with_wait_and_as_completed(self, lt):
        futures = [lt.submit(value_of(n)) for n in range(5)]
        completed = concurrent.futures.as_completed(futures, LONG)
        assert {future.result() for future in completed} == set(range(5))
        assert concurrent.futures.wait(futures).not_done == set()

    @with_lt
    def test_submit_from_many_threads_starts_in_order_of_each(self, lt):
        trace = []

        async def work(thread, n):
            trace.append((thread, n))

        def submit(thread):
            for n in range(50):
                futures.append(lt.submit(work(thread, n)))

        futures = []
        threads = [threading.Thread(target=submit, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        concurrent.futures.wait(futures, LONG)
        for thread in range(4):
            assert [n for t, n in trace if t == thread] == list(range(50))

    @with_lt
    def test_the_task_has_the_name_and_a_copy_of_the_context(self, lt):
        var = contextvars.ContextVar("var", default="unset")

        async def work():
            before = var.get()
            await asyncio.sleep(0)  # an eager task gets its name late
            var.set("inner")
            return before, asyncio.current_task().get_name()

        var.set("outer")
        assert lt.submit(work(), name="job").result(LONG) == ("outer", "job")
        assert var.get() == "outer"
        assert lt.call(var.get) == "outer"

    @with_lt
    def test_run_returns_the_result(self, lt):
        assert lt.run(value_of(1)) == 1
        assert lt.run(value_of(2), 5) == 2
        assert lt.run(value_of(3), timeout=5.5) == 3

    @with_lt
    def test_run_raises_what_the_coroutine_raised(self, lt):
        error = KeyError("x")
        with pytest.raises(KeyError) as info:
            lt.run(fail_with(error))
        assert info.value is error

    @with_lt
    def test_run_raises_the_timeout_error_of_the_coroutine_as_it_is(self, lt):
        error = TimeoutError("its own")
        with pytest.raises(TimeoutError) as info:
            lt.run(fail_with(error), timeout=LONG)
        assert info.value is error

    @with_lt
    def test_run_cancels_the_coroutine_when_the_time_is_up(self, lt):
        parked = Parked()
        with pytest.raises(TimeoutError, match=r"within 0\.001 seconds"):
            lt.run(parked.run(), timeout=0.001)
        # In so short a time it may not have begun.
        assert parked.outcome == ("cancelled" if parked.begun.is_set() else None)
        assert lt.run(value_of(1)) == 1

    @with_lt
    def test_run_with_a_timeout_of_zero(self, lt):
        # Either it was quick enough, or it was cancelled.
        try:
            assert lt.run(value_of(1), timeout=0) == 1
        except TimeoutError:
            pass

    @with_lt
    def test_run_does_not_wait_for_ever_for_what_does_not_end(self, lt, caplog, monkeypatch):
        monkeypatch.setattr("aiotools.thread._CANCEL_GRACE", 0.01)
        begun, release = threading.Event(), threading.Event()

        async def stand_still():
            begun.set()
            release.wait(LONG)

        blocker = lt.submit(stand_still())
        assert begun.wait(LONG)
        with pytest.raises(TimeoutError):
            lt.run(asyncio.sleep(0), timeout=0.001)  # its cancellation has to wait, too
        release.set()
        blocker.result(LONG)
        [record] = caplog.records
        assert "goes on after it was cancelled" in record.getMessage()

    @with_lt
    def test_an_error_while_being_cancelled_goes_to_the_handler_of_the_loop(self, lt, loop_errors):
        begun = threading.Event()

        async def work():
            try:
                begun.set()
                await asyncio.Event().wait()
            finally:
                raise ValueError("clean-up")

        with pytest.raises(TimeoutError):
            lt.run(work(), timeout=0.001)
        lt.stop()
        if begun.is_set():
            loop_errors.take_one(ValueError, "failed afterwards")

    @with_lt
    def test_run_raises_cancelled_error_if_the_coroutine_is_cancelled(self, lt):
        async def work():
            asyncio.current_task().cancel()
            await asyncio.sleep(0)

        with pytest.raises(concurrent.futures.CancelledError):
            lt.run(work())

    @with_lt
    def test_cancelling_the_future_cancels_the_coroutine(self, lt):
        parked = Parked()
        future = lt.submit(parked.run())
        parked.begun.wait(LONG)
        assert future.cancel()
        assert future.cancelled()
        parked.ended.wait(LONG)
        assert parked.outcome == "cancelled"

    @with_lt
    def test_a_future_cancelled_at_once_may_keep_the_coroutine_from_starting(self, lt):
        ran = []

        async def work():
            ran.append(1)

        def block_and_cancel():
            # The loop stands in here, so the coroutine cannot have started.
            future = lt.submit(work())
            assert future.cancel()
            return future

        future = lt.call(block_and_cancel)
        lt.run(value_of(0))
        assert future.cancelled()
        assert ran == []

    @with_lt
    def test_call_runs_a_function_in_the_thread_of_the_loop(self, lt):
        def fn(a, *, b):
            return asyncio.get_running_loop(), a + b

        assert lt.call(fn, 1, b=2) == (lt.loop, 3)

    @with_lt
    def test_call_raises_what_the_function_raised(self, lt):
        with pytest.raises(ZeroDivisionError):
            lt.call(lambda: 1 / 0)
        with pytest.raises(SystemExit):
            lt.call(sys.exit, 3)
        assert lt.is_running()

    @with_lt
    def test_call_refuses_what_it_cannot_call(self, lt):
        with pytest.raises(TypeError, match="'int'"):
            lt.call(1)
        with pytest.raises(TypeError, match="run\\(\\)"):
            lt.call(value_of, 1)

    @with_lt
    def test_refuses_what_is_no_coroutine(self, lt):
        with pytest.raises(TypeError, match="submit\\(\\) needs a coroutine, not 'int'"):
            lt.submit(1)
        with pytest.raises(TypeError, match="run\\(\\) needs a coroutine, not 'function'"):
            lt.run(value_of)

    @pytest.mark.parametrize("timeout", [float("inf"), 1e300])
    @with_lt
    def test_a_timeout_longer_than_any_thread_can_wait_is_no_limit(self, lt, timeout):
        assert lt.run(value_of(1), timeout=timeout) == 1
        future = lt.submit(value_of(2))
        lt.stop(timeout=timeout)
        assert future.result(0) == 2

    @with_lt
    def test_refuses_a_timeout_that_is_no_number(self, lt):
        with pytest.raises(TypeError, match="timeout must be None or a number of seconds, not 'str'"):
            lt.run(value_of(1), timeout="1")
        with pytest.raises(TypeError, match="timeout must be None or a number of seconds, not 'str'"):
            lt.stop(timeout="1")

    @pytest.mark.parametrize("timeout", [-1, float("nan")])
    @with_lt
    def test_refuses_a_timeout_that_is_no_time(self, lt, timeout):
        with pytest.raises(ValueError, match="timeout"):
            lt.run(value_of(1), timeout=timeout)
        with pytest.raises(ValueError, match="timeout"):
            lt.stop(timeout=timeout)
        assert lt.is_running()

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
    @with_lt
    def test_work_that_raises_a_base_error_does_not_end_the_loop(self, lt, error, caplog):
        with pytest.raises(type(error)) as info:
            lt.run(fail_with(error))
        assert info.value is error
        assert lt.run(value_of(1)) == 1
        assert not caplog.records

    @with_lt
    def test_a_base_error_of_a_callback_is_logged_and_the_loop_goes_on(self, lt, caplog):
        lt.loop.call_soon_threadsafe(sys.exit, 3)
        assert lt.run(value_of(1)) == 1
        [record] = caplog.records
        assert record.exc_info[0] is SystemExit

    @with_lt
    def test_a_task_factory_that_refuses_fails_the_future(self, lt):
        def factory(loop, coro, **kwargs):
            raise ZeroDivisionError

        lt.call(lt.loop.set_task_factory, factory)
        with pytest.raises(ZeroDivisionError):
            lt.run(value_of(1))
        lt.call(lt.loop.set_task_factory, None)


class TestErrorsNobodyPickedUp:
    @with_lt
    def test_are_logged_when_the_future_goes_away(self, lt, caplog):
        error = KeyError("lost")
        lt.submit(fail_with(error))
        lt.run(value_of(0))
        lt.run(value_of(0))
        lt.stop()
        gc.collect()
        [record] = caplog.records
        assert record.name == "aiotools.thread"
        assert record.levelno == logging.ERROR
        assert record.exc_info[1] is error

    @pytest.mark.parametrize("how", ["result", "exception", "wrap_future", "cancelled"])
    @with_lt
    def test_those_that_were_picked_up_are_not(self, lt, caplog, how):
        future = lt.submit(fail_with(KeyError("seen")))
        concurrent.futures.wait([future], LONG)
        if how == "result":
            with pytest.raises(KeyError):
                future.result()
        elif how == "exception":
            assert isinstance(future.exception(), KeyError)
        elif how == "wrap_future":
            with LoopThread() as other:

                async def wait(future):
                    with pytest.raises(KeyError):
                        await asyncio.wrap_future(future)

                other.run(wait(future))
        else:
            future = lt.submit(Parked().run())
            future.cancel()
            with pytest.raises(KeyError):
                lt.run(fail_with(KeyError()))
            caplog.clear()
        del future
        gc.collect()
        if how != "cancelled":
            assert not caplog.records

    @with_lt
    def test_waiting_in_vain_does_not_count_as_picking_up(self, lt, caplog):
        parked = Parked()

        async def work():
            await parked.run()
            raise KeyError("lost")

        future = lt.submit(work())
        parked.begun.wait(LONG)
        with pytest.raises(TimeoutError):
            future.result(0)
        with pytest.raises(TimeoutError):
            future.exception(0)
        parked.let_go()
        concurrent.futures.wait([future], LONG)
        del future
        lt.stop()
        gc.collect()
        [record] = caplog.records
        assert record.exc_info[0] is KeyError

    @pytest.mark.loop_kinds(
        "default",
        "uvloop",
        "debug",
        reason="asyncio's frames make a cycle around eager tasks that fail",
    )
    @with_lt
    def test_a_picked_up_error_leaves_no_cycle(self, lt):
        gc.collect()
        gc.disable()
        try:

            class Error(Exception):
                gone = []

                def __del__(self):
                    self.gone.append(1)

            async def work():
                raise Error

            try:
                lt.run(work())
            except Error:
                pass
            lt.run(value_of(0))
            assert Error.gone == [1]
        finally:
            gc.enable()


class TestStop:
    @with_lt
    def test_waits_for_the_work(self, lt):
        parked = Parked()
        future = lt.submit(parked.run())
        parked.begun.wait(LONG)
        stopper = threading.Thread(target=lt.stop)
        stopper.start()
        while lt.is_running():
            pass
        with pytest.raises(RuntimeError, match="does not accept work"):
            lt.submit(value_of(1))
        with pytest.raises(RuntimeError, match="does not accept work"):
            lt.run(value_of(1))
        with pytest.raises(RuntimeError, match="does not accept work"):
            lt.call(int)
        assert stopper.is_alive()
        parked.let_go()
        stopper.join(LONG)
        assert future.result(0) == "value"

    @with_lt
    def test_work_accepted_before_is_done(self, lt):
        futures = [lt.submit(value_of(n)) for n in range(100)]
        lt.stop()
        assert [future.result(0) for future in futures] == list(range(100))

    @with_lt
    def test_without_draining_the_work_is_cancelled_and_awaited(self, lt):
        parked = Parked()
        future = lt.submit(parked.run())
        parked.begun.wait(LONG)
        lt.stop(drain=False)
        assert future.cancelled()
        assert parked.outcome == "cancelled"

    @with_lt
    def test_at_the_deadline_the_rest_is_cancelled(self, lt):
        first, second = Parked(), Parked()
        futures = [lt.submit(first.run()), lt.submit(second.run())]
        second.begun.wait(LONG)
        first.let_go()
        first.ended.wait(LONG)
        lt.stop(timeout=0.05)
        assert futures[0].result(0) == "value"
        assert futures[1].cancelled()
        assert second.outcome == "cancelled"

    @with_lt
    def test_a_second_stop_shortens_the_wait_of_the_first(self, lt):
        parked = Parked()
        lt.submit(parked.run())
        parked.begun.wait(LONG)
        stopper = threading.Thread(target=lt.stop)
        stopper.start()
        lt.stop(drain=False)
        stopper.join(LONG)
        assert parked.outcome == "cancelled"

    @with_lt
    def test_tasks_that_were_not_submitted_are_cancelled_not_waited_for(self, lt):
        parked = Parked()

        async def work():
            kept.append(asyncio.create_task(parked.run()))

        kept = []
        lt.run(work())
        parked.begun.wait(LONG)
        lt.stop()
        assert parked.outcome == "cancelled"
        kept.clear()

    @with_lt
    def test_async_generators_are_shut_down(self, lt):
        trace = []

        async def numbers():
            try:
                yield 1
                yield 2
            finally:
                await asyncio.sleep(0)
                trace.append("closed")

        async def work():
            kept.append(numbers())
            return await anext(kept[0])

        kept = []
        assert lt.run(work()) == 1
        lt.stop()
        assert trace == ["closed"]

    @with_lt
    def test_the_executor_is_shut_down(self, lt):
        async def work():
            return await asyncio.get_running_loop().run_in_executor(None, threading.current_thread)

        thread = lt.run(work())
        lt.stop()
        assert not thread.is_alive()

    @with_lt
    def test_stopping_the_loop_from_inside_ends_the_thread(self, lt):
        parked = Parked()
        future = lt.submit(parked.run())
        parked.begun.wait(LONG)
        lt.loop.call_soon_threadsafe(lt.loop.stop)
        lt._thread.join(LONG)
        assert future.cancelled()
        with pytest.raises(RuntimeError, match="does not accept work"):
            lt.submit(value_of(1))

    def test_a_loop_that_breaks_is_logged_and_nobody_waits_for_ever(self, new_loop, caplog):
        class Broken(Exception):
            pass

        def factory():
            loop = asyncio.new_event_loop()
            run_forever = loop.run_forever

            def breaking():
                run_forever()
                loop.run_forever = run_forever
                raise Broken

            loop.run_forever = breaking
            return loop

        lt = LoopThread(loop_factory=factory).start()
        parked = Parked()
        future = lt.submit(parked.run())
        parked.begun.wait(LONG)
        lt.loop.call_soon_threadsafe(lt.loop.stop)
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(LONG)
        lt.stop()
        [record] = caplog.records
        assert record.exc_info[0] is Broken

    def test_stop_while_it_starts_makes_start_fail(self):
        in_factory, go_on = threading.Event(), threading.Event()
        errors = []

        def factory():
            in_factory.set()
            go_on.wait(LONG)
            return asyncio.new_event_loop()

        lt = LoopThread(loop_factory=factory)

        def start():
            try:
                lt.start()
            except BaseException as exc:
                errors.append(exc)

        starter = threading.Thread(target=start)
        starter.start()
        in_factory.wait(LONG)
        stopper = threading.Thread(target=lt.stop)
        stopper.start()
        while not lt._stopping:
            pass
        assert "stopping" in repr(lt)
        go_on.set()
        starter.join(LONG)
        stopper.join(LONG)
        [error] = errors
        assert type(error) is RuntimeError
        assert "stopped while it started" in str(error)


class TestOwnThread:
    @with_lt
    def test_what_would_wait_for_itself_is_refused_at_once(self, lt):
        async def work():
            with pytest.raises(RuntimeError, match="for ever"):
                lt.run(value_of(1))
            with pytest.raises(RuntimeError, match="for ever"):
                lt.call(int)
            with pytest.raises(RuntimeError, match="for ever"):
                lt.stop()
            with pytest.raises(RuntimeError, match="for ever"):
                await lt.astop()
            with pytest.raises(RuntimeError, match="only once"):
                lt.start()
            future = lt.submit(value_of(7))
            with pytest.raises(RuntimeError, match="for ever"):
                future.result()
            with pytest.raises(RuntimeError, match="for ever"):
                future.exception(5)
            value = await asyncio.wrap_future(future)
            return value, future.result()

        assert lt.run(work()) == (7, 7)

    @with_lt
    def test_another_loop_thread_may_be_waited_for(self, lt):
        with LoopThread() as other:
            assert lt.call(lambda: other.run(value_of(1))) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
class TestFork:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_forked_child_refuses_to_use_it_and_does_not_hang(self, new_loop):
        with LoopThread(loop_factory=new_loop) as lt:
            parked = Parked()
            future = lt.submit(parked.run())
            parked.begun.wait(LONG)
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    assert not lt.is_running()
                    for use in (
                        lambda: lt.submit(value_of(1)),
                        lambda: lt.run(value_of(1)),
                        lambda: lt.call(int),
                        lambda: future.result(),
                    ):
                        try:
                            use()
                        except RuntimeError as exc:
                            assert "parent process" in str(exc)
                        else:
                            raise AssertionError
                    lt.stop()
                    with LoopThread() as fresh:
                        assert fresh.run(value_of(1)) == 1
                    status = 0
                finally:
                    os._exit(status)
            _, status = os.waitpid(pid, 0)
            parked.let_go()
        assert os.waitstatus_to_exitcode(status) == 0
        assert future.result(0) == "value"


PROGRAM = """
    import asyncio, sys, threading
    from aiotools.thread import LoopThread

    factory = None
    if sys.argv[1] == "uvloop":
        import uvloop
        factory = uvloop.new_event_loop

    begun = threading.Event()

    async def work():
        await asyncio.get_running_loop().run_in_executor(None, int)
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            if sys.argv[2] != "daemon":
                print("cleaned up", flush=True)

    lt = LoopThread(loop_factory=factory, daemon=sys.argv[2] == "daemon").start()
    future = lt.submit(work())
    begun.wait()
"""


# A threading without its private hook. concurrent.futures uses it too, and is imported before.
WITHOUT_HOOK = """
    import concurrent.futures.thread, threading
    del threading._register_atexit
"""


class TestInterpreterExit:
    @pytest.mark.loop_kinds("default", "uvloop", reason="each case is an interpreter of its own")
    @pytest.mark.parametrize(
        ("kind", "ending", "status"),
        [
            ("plain", "", 0),
            ("daemon", "", 0),
            ("plain", "sys.exit(3)", 3),
            ("plain", "1/0", 1),
        ],
    )
    @pytest.mark.parametrize("before", ["", WITHOUT_HOOK], ids=["hook", "no-hook"])
    def test_with_a_running_loop_neither_hangs_nor_crashes(self, loop_kind, before, kind, ending, status):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(PROGRAM) + ending, loop_kind, kind],
            capture_output=True,
            text=True,
            timeout=LONG,
        )
        assert done.returncode == status, done
        if kind != "daemon":
            assert done.stdout == "cleaned up\n"
        if not ending:
            assert done.stderr == ""

    @pytest.mark.loop_kinds("default", reason="each case is an interpreter of its own")
    def test_without_the_hook_of_threading_daemon_says_what_was_asked(self, loop_kind):
        program = """
            from aiotools.thread import LoopThread

            for daemon in (False, True):
                with LoopThread(daemon=daemon) as lt:
                    assert lt.daemon is daemon
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(WITHOUT_HOOK) + textwrap.dedent(program)],
            capture_output=True,
            text=True,
            timeout=LONG,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
