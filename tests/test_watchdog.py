"""LoopWatchdog: what it measures, and what it writes while a loop hangs."""

import asyncio
import ctypes
import functools
import gc
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest

import aiotools
from aiotools import LoopWatchdog
from aiotools.watchdog import _STACK_SIGNUM

POSIX = os.name == "posix"
HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
QUICK = {"interval": 0.01, "slow": 0.03, "hang_timeout": 0.1}


@pytest.fixture
def pipe():
    r, w = os.pipe()
    yield r, w
    os.close(r)
    os.close(w)


def read_until(fd, *ends):
    """Blocks the calling thread until all *ends* have come."""
    text = ""
    while not all(end in text for end in ends):
        assert select.select([fd], [], [], 30)[0], text
        text += os.read(fd, 65536).decode()
    return text


def spin_until_readable(fd):
    while not select.select([fd], [], [], 0)[0]:
        pass


def thread_count():
    return len(os.listdir("/proc/self/task"))


async def wait_for_a_beat(watchdog):
    before = watchdog.stats().beats
    while watchdog.stats().beats == before:
        await aiotools.sleep(0.001)


async def a_friend(event):
    await event.wait()


class TestMeasuring:
    async def test_a_loop_that_turns_is_never_late(self):
        with LoopWatchdog(interval=0.001, slow=20) as watchdog:
            for _ in range(3):
                await wait_for_a_beat(watchdog)
            stats = watchdog.stats()
        assert stats.beats >= 3
        assert stats.stalls == 0
        assert stats.longest < 20
        assert stats.longest_where is None

    async def test_every_beat_is_in_the_histogram(self):
        with LoopWatchdog(interval=0.001, slow=20) as watchdog:
            await wait_for_a_beat(watchdog)
            await wait_for_a_beat(watchdog)
        stats = watchdog.stats()
        assert sum(count for _, count in stats.histogram) == stats.beats
        bounds = [bound for bound, _ in stats.histogram]
        assert bounds == sorted(bounds)
        assert bounds[-1] == float("inf")

    async def test_a_stall_is_counted_and_logged_with_its_place(self, caplog, pipe):
        with LoopWatchdog(**QUICK, file=pipe[1]) as watchdog, caplog.at_level(logging.WARNING):
            await wait_for_a_beat(watchdog)
            spin_until_readable(pipe[0])
            await wait_for_a_beat(watchdog)
            stats = watchdog.stats()
        assert stats.stalls >= 1
        assert stats.longest >= 0.1
        assert "spin_until_readable" in stats.longest_where
        assert stats.longest_at is not None
        [record] = [r for r in caplog.records if "its stacks were written" in r.getMessage()]
        assert "did not turn for" in record.getMessage()
        assert "spin_until_readable" in record.getMessage()
        assert sum(count for bound, count in stats.histogram if bound > 0.1) >= 1

    async def test_stats_remain_after_the_end(self):
        with LoopWatchdog(interval=0.001) as watchdog:
            await wait_for_a_beat(watchdog)
        assert watchdog.stats().beats >= 1
        assert "stopped" in repr(watchdog)

    async def test_stats_before_the_start_are_empty(self):
        watchdog = LoopWatchdog()
        assert watchdog.stats() == aiotools.LoopStats(0, 0.0, None, None, 0, 0.0, ())
        assert "new" in repr(watchdog)


class TestHangs:
    async def test_the_stacks_of_all_threads_and_tasks_are_written_while_python_code_hangs(self, pipe):
        done = asyncio.Event()
        task = asyncio.create_task(a_friend(done), name="the friend")
        await asyncio.sleep(0)
        release = threading.Event()
        helper = threading.Thread(target=release.wait, name="the helper")
        helper.start()
        try:
            with LoopWatchdog(**QUICK, file=pipe[1]):
                spin_until_readable(pipe[0])
                text = read_until(pipe[0], "the friend", "in a_friend")
        finally:
            release.set()
            helper.join()
            done.set()
            await task
        assert "has not turned for 0.1" in text or "has not turned for" in text
        assert "spin_until_readable" in text
        assert "Thread the helper" in text
        assert "Running now" in text
        assert "GIL" not in text

    async def test_a_blocking_system_call_is_a_hang_too(self, pipe):
        with LoopWatchdog(**QUICK, file=pipe[1]):
            text = read_until(pipe[0], "tasks of the event loop")
        assert "in read_until" in text

    @pytest.mark.skipif(not POSIX, reason="faulthandler.register() is there on POSIX only")
    @pytest.mark.loop_kinds("default", "uvloop", reason="takes a second")
    async def test_native_code_that_holds_the_gil_is_named_and_the_threads_written(self, pipe):
        with LoopWatchdog(**QUICK, file=pipe[1]):
            buffer = ctypes.create_string_buffer(65536)
            # Unlike CDLL, PyDLL keeps the GIL. poll: the first text comes before faulthandler's.
            n = ctypes.PyDLL(None).read(pipe[0], buffer, len(buffer))
            text = buffer.raw[:n].decode()
            wanted = "test_native_code" if HAS_GIL else "event loop has not turned"
            if wanted not in text:
                text += read_until(pipe[0], wanted)
        if HAS_GIL:
            assert "native code holds the GIL" in text
            assert "most recent call first" in text  # faulthandler's way
        else:
            assert "event loop has not turned" in text

    @pytest.mark.skipif(not POSIX or not HAS_GIL, reason="of native code that holds the GIL, on POSIX")
    @pytest.mark.loop_kinds("default", reason="takes a second")
    async def test_the_evidence_does_not_interrupt_the_call_that_hangs(self):
        reader, writer = socket.socketpair()
        with reader, writer, LoopWatchdog(**QUICK, file=writer.fileno()):
            buffer = ctypes.create_string_buffer(400)
            # A signal would end it with less: with the line that comes before the stacks.
            n = ctypes.PyDLL(None).recv(reader.fileno(), buffer, len(buffer), socket.MSG_WAITALL)
            reader.close()  # the rest may not fit; nobody waits for it
        assert n == len(buffer), buffer.raw[:n]
        assert b"most recent call first" in buffer.raw

    async def test_a_hang_is_written_once(self, pipe):
        with LoopWatchdog(**QUICK, file=pipe[1]) as watchdog:
            text = read_until(pipe[0], "tasks of the event loop")
            age = watchdog.stats().since_beat
            while watchdog.stats().since_beat < age + 0.3:
                pass
        assert text.count("has not turned") == 1
        assert not select.select([pipe[0]], [], [], 0)[0]

    async def test_the_second_hang_is_written_as_well(self, pipe):
        with LoopWatchdog(**QUICK, file=pipe[1]) as watchdog:
            for _ in range(2):
                read_until(pipe[0], "tasks of the event loop", "Running now")
                spare = select.select([pipe[0]], [], [], 0)[0]
                if spare:
                    os.read(pipe[0], 65536)
                await wait_for_a_beat(watchdog)

    async def test_nothing_is_written_without_a_hang_timeout(self, pipe, caplog):
        with LoopWatchdog(interval=0.01, slow=0.02, file=pipe[1]) as watchdog:
            while watchdog.stats().since_beat < 0.2:
                pass
            await wait_for_a_beat(watchdog)
        assert not select.select([pipe[0]], [], [], 0)[0]
        assert watchdog.stats().stalls >= 1


class TestLoopThatIsNotRunning:
    def test_the_time_between_two_runs_is_no_hang(self, new_loop, pipe, caplog):
        loop = new_loop()

        async def begin():
            return LoopWatchdog(**QUICK, file=pipe[1]).start()

        watchdog = loop.run_until_complete(begin())
        while watchdog.stats().since_beat < 0.4:
            pass
        loop.run_until_complete(wait_for_a_beat(watchdog))
        watchdog.stop()
        assert not select.select([pipe[0]], [], [], 0)[0]
        assert watchdog.stats().stalls == 0

    def test_a_loop_that_was_closed_is_no_hang(self, new_loop, pipe):
        loop = new_loop()

        async def begin():
            return LoopWatchdog(**QUICK, file=pipe[1]).start()

        watchdog = loop.run_until_complete(begin())
        loop.close()
        while watchdog.stats().since_beat < 0.4:
            pass
        watchdog.stop()
        assert not select.select([pipe[0]], [], [], 0)[0]

    def test_it_needs_a_running_loop(self):
        with pytest.raises(RuntimeError, match="no running event loop"):
            LoopWatchdog().start()


class TestLife:
    @pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
    async def test_no_thread_is_left(self):
        before = thread_count()
        for _ in range(10):
            with LoopWatchdog():
                assert thread_count() > before
        # A thread that has said its last word is still there for a moment.
        while thread_count() > before:
            await asyncio.sleep(0)

    async def test_it_starts_once(self):
        watchdog = LoopWatchdog()
        with watchdog:
            with pytest.raises(RuntimeError, match="only once"):
                watchdog.start()
        with pytest.raises(RuntimeError, match="only once"):
            watchdog.start()
        watchdog.stop()

    async def test_one_that_was_never_started_can_be_stopped(self):
        LoopWatchdog().stop()

    async def test_it_is_freed(self):
        watchdog = LoopWatchdog()
        with watchdog:
            pass
        ref = weakref.ref(watchdog)
        del watchdog
        gc.collect()
        await asyncio.sleep(0)
        assert ref() is None

    @pytest.mark.skipif(not POSIX, reason="signals")
    async def test_the_signal_is_given_back(self, pipe):
        import faulthandler

        with LoopWatchdog(hang_timeout=60, file=pipe[1]):
            with LoopWatchdog(hang_timeout=60, file=pipe[1]):
                pass
            os.kill(os.getpid(), _STACK_SIGNUM)
            assert "test_the_signal" in read_until(pipe[0], "test_the_signal")
        assert faulthandler.unregister(_STACK_SIGNUM) is False

    @pytest.mark.skipif(not POSIX, reason="signals")
    async def test_a_signal_that_the_program_handles_is_left_alone(self, pipe):
        got = []
        before = signal.signal(signal.SIGUSR2, lambda *args: got.append(args))
        try:
            with LoopWatchdog(hang_timeout=60, file=pipe[1], signum=signal.SIGUSR2):
                os.kill(os.getpid(), signal.SIGUSR2)
                while not got:
                    await asyncio.sleep(0)
        finally:
            signal.signal(signal.SIGUSR2, before)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    async def test_a_forked_child_can_stop_its_copy(self, pipe):
        with LoopWatchdog(**QUICK, file=pipe[1]) as watchdog:
            await wait_for_a_beat(watchdog)
            pid = os.fork()
            if pid == 0:
                try:
                    watchdog._core.beat()
                    watchdog.stop()
                    os._exit(17)
                finally:
                    os._exit(1)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 17
            await wait_for_a_beat(watchdog)

    @pytest.mark.parametrize("how", ["running", "hanging", "closed"])
    def test_the_interpreter_ends_with_a_watchdog_that_was_never_stopped(self, how):
        code = f"""
            import asyncio, os, sys, time
            from aiotools import LoopWatchdog
            r, w = os.pipe()
            async def main():
                global watchdog
                watchdog = LoopWatchdog(interval=0.01, slow=0.02, hang_timeout=0.05, file=w).start()
                await asyncio.sleep(0.05)
                if {how!r} == "hanging":
                    os.read(r, 10)
                    sys.exit(3)
            if {how!r} == "closed":
                asyncio.run(main())
            else:
                loop = asyncio.new_event_loop()
                loop.run_until_complete(main())
            sys.exit(3)
        """
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)], capture_output=True, timeout=50
        )
        assert done.returncode == 3, done.stderr.decode()

    async def test_a_report_may_stop_the_watchdog_from_inside(self, pipe):
        from aiotools._aiotools import _Watchdog

        called = []

        def report(what, age):
            called.append(what)
            core.stop()
            os.write(pipe[1], b"stopped")

        core = _Watchdog(report, 0.01, 0.01, 0, -1, 0, None)
        core.start()
        read_until(pipe[0], "stopped")
        core.stop()
        assert called == [1]

    async def test_an_error_in_the_report_is_shown_and_survived(self, pipe, monkeypatch):
        from aiotools._aiotools import _Watchdog

        shown = []
        monkeypatch.setattr(sys, "unraisablehook", lambda info: (shown.append(info.exc_value), os.write(pipe[1], b".")))

        def report(what, age):
            raise ValueError("no report")

        core = _Watchdog(report, 0.01, 0.01, 0, -1, 0, None)
        core.start()
        read_until(pipe[0], ".")
        core.stop()
        assert [str(e) for e in shown] == ["no report"]
        shown.clear()

    @pytest.mark.threads
    def test_several_loops_have_one_each(self, pipe):
        failures = []

        def one():
            try:
                asyncio.run(self.use())
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    async def use(self):
        for _ in range(5):
            with LoopWatchdog(interval=0.001, slow=0.001, hang_timeout=60) as watchdog:
                await wait_for_a_beat(watchdog)
                watchdog.stats()


class TestParameters:
    @pytest.mark.parametrize("name", ["interval", "slow", "hang_timeout"])
    def test_times_must_be_positive_numbers(self, name):
        for bad in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=name):
                LoopWatchdog(**{name: bad})
        with pytest.raises(TypeError, match=name):
            LoopWatchdog(**{name: "1"})

    def test_the_signal_must_exist(self):
        with pytest.raises(ValueError, match="signum"):
            LoopWatchdog(signum=100000)

    def test_a_file_needs_a_descriptor(self):
        with pytest.raises(AttributeError):
            LoopWatchdog(file=object())

    def test_the_page_must_be_large_enough(self):
        from aiotools._aiotools import _Watchdog

        make = functools.partial(_Watchdog, print, 1, 1, 0, -1, 0)
        with pytest.raises(ValueError, match="at least 48 bytes"):
            make(bytearray(47))
        with pytest.raises(BufferError):
            make(bytes(48))
        make(bytearray(48))
