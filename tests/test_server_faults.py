"""The table of faults: what the user sees, what remains, how it ends.

docs/server-faults.rst says the same in words.  The first rows run on workers of each kind, the others on
processes.  What remains is looked at by the nothing_left fixture around each test.
"""

import contextlib
import os
import signal
import sys
import threading

import pytest
import server_workers as workers
from process_helpers import PATIENCE, START_METHODS, nothing_left_fixture, wait_process_gone  # noqa: F401
from server_play import RUNNERS, Play, kill, script

from aiotools.server import start_server

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(60)]

LOOPS = [name for name in ("default", "uvloop") if name in RUNNERS]
KINDS = [*START_METHODS, "thread"]


class Setup(Play):
    """A play with workers of one kind."""

    def __init__(self, kind, loop):
        self.kind = kind
        super().__init__(START_METHODS[0] if kind == "thread" else kind, loop)

    def start(self, worker, *given, **kwargs):
        if self.kind == "thread":
            kwargs.setdefault("worker_kind", "thread")
        return super().start(worker, *given, report=True, **kwargs)


@pytest.fixture(params=[(k, loop) for k in KINDS for loop in LOOPS], ids="-".join)
def any_kind(request, nothing_left):
    setup = Setup(*request.param)
    with setup.wire:
        yield setup


@pytest.fixture(params=[(k, loop) for k in START_METHODS for loop in LOOPS], ids="-".join)
def processes(request, nothing_left):
    setup = Setup(*request.param)
    with setup.wire:
        yield setup


@pytest.fixture
def quick(nothing_left):
    setup = Setup(START_METHODS[0], "default")
    with setup.wire:
        yield setup


class TestSignals:
    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_stop(self, any_kind, signum):
        any_kind.stop_after("enter", 2, signum)
        report = any_kind.start(workers.managed, num_workers=2, restart="on-failure")
        assert sorted(m[2] for m in any_kind.of("leave")) == [signum, signum]
        assert [w.code for w in report.workers] == [0, 0]
        assert any_kind.main_received is signum

    def test_stop_during_start(self, any_kind):
        any_kind.stop_after("enter", 1)
        report = any_kind.start(workers.managed, num_workers=2, restart="on-failure")
        assert any_kind.count("leave") == any_kind.count("enter")
        assert all(w.code == 0 for w in report.workers)

    def test_stop_during_reload(self, any_kind):
        left = script(
            any_kind,
            (lambda: any_kind.count("enter") == 2, lambda: kill(signal.SIGHUP)),
            (lambda: any_kind.count("enter") == 3, lambda: kill(signal.SIGTERM)),
        )
        report = any_kind.start(workers.managed, num_workers=2, restart="on-failure")
        assert left == []
        assert any_kind.count("leave") == any_kind.count("enter")
        assert all(w.code == 0 for w in report.workers)


class TestRaising:
    @pytest.mark.parametrize("where", ["start", "stop"])
    def test_on_start_or_exit(self, any_kind, where):
        if where == "stop":
            any_kind.stop_after("enter", 2, signal.SIGINT)
        report = any_kind.start(workers.fails, 1, where, ValueError("no luck"), num_workers=2)
        assert [w.code for w in report.workers] == [0, 1]
        assert "no luck" in report.workers[1].reason
        assert any_kind.main_received is signal.SIGINT

    def test_in_its_body(self, any_kind):
        report = any_kind.start(workers.body_fails, 1, num_workers=2)
        assert [w.code for w in report.workers] == [0, 1]
        assert "error during shutdown" in report.workers[1].reason
        assert any_kind.main_received is signal.SIGINT


class TestHanging:
    """Evidence first, then the kill, then the successor."""

    @contextlib.contextmanager
    def gate(self, setup):
        """Threads cannot be killed, they are given up; they end after this block."""
        reader, writer = setup.ctx.Pipe(duplex=False)
        with reader, writer:
            threads = set(threading.enumerate())
            yield reader
            writer.send("go")
            for thread in set(threading.enumerate()) - threads:
                thread.join(PATIENCE)

    def test_in_its_loop(self, any_kind, caplog):
        left = script(any_kind, (lambda: any_kind.count("enter") == 3, lambda: kill(signal.SIGTERM)))
        with self.gate(any_kind) as go:
            report = any_kind.start(workers.hangs, "loop", go, num_workers=2, hang_timeout=0.3, restart="on-failure")
        assert left == []
        hung = next(w for w in report.workers if w.reason.startswith("hung"))
        assert hung.index == 0
        if any_kind.kind != "thread":
            assert hung.signal is signal.SIGKILL
        assert "its loop has not turned" in caplog.text
        assert "in stand_still" in caplog.text

    def test_on_start(self, any_kind, caplog):
        left = script(any_kind, (lambda: any_kind.count("enter") == 3, lambda: kill(signal.SIGTERM)))
        with self.gate(any_kind) as go:
            report = any_kind.start(workers.hangs, "start", go, num_workers=2, start_timeout=1, restart="on-failure")
        assert left == []
        assert any("not ready within" in (w.reason or "") for w in report.workers)
        assert "in stand_still" in caplog.text

    def test_on_exit(self, any_kind, caplog):
        any_kind.stop_after("enter", 2)
        with self.gate(any_kind) as go:
            report = any_kind.start(workers.hangs, "stop", go, num_workers=2, drain_timeout=0.1, cancel_timeout=0.1)
        assert "in stand_still" in caplog.text
        ends = {w.index: w for w in report.workers}
        if any_kind.kind == "thread":
            assert "given up" in caplog.text
        else:
            assert ends[0].signal is signal.SIGKILL
        assert ends[1].code == 0

    def test_deaf_to_all_requests(self, processes, caplog):
        processes.stop_after("enter", 1)
        report = processes.start(workers.ignores_signals, drain_timeout=0.1, cancel_timeout=0.1)
        assert report.workers[0].signal is signal.SIGKILL
        assert "does not end; killing it" in caplog.text


class TestKilled:
    def test_a_worker(self, processes, caplog):
        left = script(
            processes,
            (lambda: processes.count("enter") == 2, lambda: os.kill(processes.of("enter")[1][2], signal.SIGKILL)),
            (lambda: processes.count("enter") == 3, lambda: kill(signal.SIGTERM)),
        )
        report = processes.start(workers.managed, num_workers=2, restart="on-failure")
        assert left == []
        assert sum(w.signal is signal.SIGKILL for w in report.workers) == 1
        assert "SIGKILL" in caplog.text

    def test_all_workers(self, processes):
        def kill_all():
            for message in processes.of("enter"):
                os.kill(message[2], signal.SIGKILL)

        left = script(
            processes,
            (lambda: processes.count("enter") == 2, kill_all),
            (lambda: processes.count("enter") == 4, lambda: kill(signal.SIGTERM)),
        )
        processes.start(workers.managed, num_workers=2, restart="on-failure")
        assert left == []

    def test_an_extra(self, processes):
        left = script(
            processes,
            (lambda: processes.count("extra") == 1, lambda: os.kill(processes.of("extra")[0][1], signal.SIGKILL)),
            (lambda: processes.count("extra") == 2, lambda: kill(signal.SIGTERM)),
        )
        processes.start(workers.managed, extra_procs=[workers.extra_with_pid], restart="on-failure")
        assert left == []


class TestResources:
    def test_out_of_memory_is_a_failure_like_any_other(self, quick):
        left = script(quick, (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGTERM)))
        report = quick.start(workers.eats_memory, restart="on-failure")
        assert left == []
        assert "MemoryError" in report.workers[0].reason
        assert report.workers[1].code == 0

    def test_many_restarts_need_no_more_of_anything(self, quick):
        """Descriptors and processes are compared in the middle as well as around the test."""
        rounds = 30
        counts = []

        def again():
            counts.append((len(os.listdir("/proc/self/fd")), len(quick.sup.children)))
            if quick.sup.generation < rounds:
                kill(signal.SIGHUP)
            else:
                kill(signal.SIGTERM)

        quick.on_event("ready", again)
        quick.on_event("reloaded", again)
        quick.start(workers.managed, num_workers=2, restart="on-failure", plugins=[quick.plugin])
        assert len(counts) == rounds
        assert set(counts[2:]) == {counts[2]}

    def test_a_privileged_port_is_a_clear_error(self):
        # With the rights of root any port is free.  Without them the standard library may be out of reach.
        "host".encode("idna")
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match="cannot bind tcp:"):
                start_server(workers.echo, bind="tcp://127.0.0.1:81")
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.skipif("fork" not in START_METHODS or sys.version_info < (3, 12), reason="warns from 3.12 on")
def test_fork_in_a_program_with_threads_warns_and_works(nothing_left):
    setup = Setup("fork", "default")
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        with setup.wire, pytest.warns(DeprecationWarning, match="multi-threaded"):
            setup.stop_after("enter", 1)
            report = setup.start(workers.managed)
        assert report.workers[0].code == 0
    finally:
        release.set()
        thread.join()
