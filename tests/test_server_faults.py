"""The table of faults: what the user sees, what remains, how it ends.

docs/server-faults.rst says the same in words.  The first rows run on workers of each kind, the others on
processes.  What remains is looked at by the nothing_left fixture around each test.
"""

import contextlib
import errno
import functools
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings

import pytest
import server_workers as workers
from process_helpers import (  # noqa: F401
    PATIENCE,
    START_METHODS,
    children_of,
    nothing_left_fixture,
    patient_evidence_fixture,
)
from server_play import RUNNERS, Play, UntilShown, kill, script

from aiotools.server import LogConfig, ServerFailed, start_server
from aiotools.server.nurseries import nursery_usable

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(300)]

#: Rolling restarts in a row; the promise is of 200.
RESTARTS = int(os.environ.get("AIOTOOLS_TEST_RESTARTS", "20"))
LOOPS = [name for name in ("default", "uvloop") if name in RUNNERS]
#: "nursery": the fork server of a managed server's own, which it has where no start method is asked for.
PROCESSES = [*START_METHODS, *(["nursery"] if nursery_usable() else [])]
KINDS = [*PROCESSES, "thread"]


class Setup(Play):
    """A play with workers of one kind."""

    def __init__(self, kind, loop):
        self.kind = kind
        super().__init__(kind if kind in START_METHODS else START_METHODS[0], loop)

    def start(self, worker, *given, **kwargs):
        if self.kind == "thread":
            kwargs.setdefault("worker_kind", "thread")
        if self.kind == "nursery":
            # Something of its own makes any server a managed one.
            kwargs = {"mp_context": None, "boot_failure_limit": 4, **kwargs}
        return super().start(worker, *given, report=True, **kwargs)


@pytest.fixture(params=[(k, loop) for k in KINDS for loop in LOOPS], ids="-".join)
def any_kind(request, nothing_left):
    setup = Setup(*request.param)
    with setup.wire:
        yield setup


@pytest.fixture(params=[(k, loop) for k in PROCESSES for loop in LOOPS], ids="-".join)
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

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_twice_stops_at_once(self, any_kind, signum, caplog):
        left = script(
            any_kind,
            (lambda: any_kind.count("enter") == 1, lambda: kill(signal.SIGTERM)),
            (lambda: any_kind.count("leaving") == 1, lambda: kill(signum)),
        )
        with gate(any_kind) as (go, _):
            report = any_kind.start(workers.slow_stop, go, drain_timeout=3600)
        assert left == []
        assert "stopping at once" in caplog.text
        assert any_kind.main_received is signal.SIGTERM
        if any_kind.kind == "thread":
            assert "given up" in caplog.text
        else:
            assert report.workers[0].signal is signal.SIGKILL


@contextlib.contextmanager
def gate(setup):
    """What children wait for, and a function that lets them go on.

    Threads cannot be killed, they are given up; they end after this block.
    """
    reader, writer = setup.ctx.Pipe(duplex=False)
    with reader, writer:
        threads = set(threading.enumerate())
        release = functools.partial(writer.send, "go")
        yield reader, release
        release()
        for thread in set(threading.enumerate()) - threads:
            thread.join(PATIENCE)


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

    def test_in_its_loop(self, any_kind, caplog):
        said = ["its loop has not turned", "in stand_still"]
        with gate(any_kind) as (go, release):
            until = UntilShown(caplog, lambda text: all(s in text for s in said), release)
            any_kind.start(workers.hangs, "loop", go, num_workers=2, hang_timeout=0.3, plugins=[until], **until.PATIENT)
        assert until.record.reason.startswith("hung")
        if any_kind.kind != "thread":
            assert until.record.signal is signal.SIGKILL

    def test_on_start(self, any_kind, caplog):
        def its_time_is_over(message):
            if message[0] != "standing":
                return
            [child] = [c for c in any_kind.sup.children if c.index == 0]
            if child.alive:
                child.start_timed_out()
            else:
                # It was quicker to say so than the parent to learn that it had started it.
                any_kind.sup.loop.call_later(0.01, its_time_is_over, message)

        any_kind.react = its_time_is_over
        with gate(any_kind) as (go, release):
            until = UntilShown(caplog, lambda text: "in stand_still" in text, release)
            any_kind.start(
                workers.hangs,
                "start",
                go,
                num_workers=2,
                start_timeout=3600,
                plugins=[any_kind.plugin, until],
                **until.PATIENT,
            )
        assert "not ready within" in until.record.reason

    def test_on_exit(self, any_kind, caplog, patient_evidence):
        left = script(
            any_kind,
            (lambda: any_kind.count("enter") == 1, lambda: kill(signal.SIGTERM)),
            (lambda: any_kind.count("standing") == 1, any_kind.end_drain),
        )
        with gate(any_kind) as (go, _):
            report = any_kind.start(
                workers.hangs, "stop", go, drain_timeout=3600, cancel_timeout=0.1, plugins=[any_kind.plugin]
            )
        assert left == []
        assert "in stand_still" in caplog.text
        ends = {w.index: w for w in report.workers}
        if any_kind.kind == "thread":
            assert "given up" in caplog.text
        else:
            assert ends[0].signal is signal.SIGKILL

    def test_deaf_to_all_requests(self, processes, caplog):
        processes.stop_after("enter", 1)
        report = processes.start(workers.ignores_signals, drain_timeout=0, cancel_timeout=0)
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

    def test_an_extra(self, any_kind):
        left = script(
            any_kind,
            (lambda: any_kind.count("extra") == 1, lambda: os.kill(any_kind.of("extra")[0][1], signal.SIGKILL)),
            (lambda: any_kind.count("extra") == 2, lambda: kill(signal.SIGTERM)),
        )
        any_kind.start(workers.managed, extra_procs=[workers.extra_with_pid], restart="on-failure")
        assert left == []


class TestBootLoops:
    """What never comes up is tried so many times, later each time, and then the server gives up."""

    #: How it ends -> the outcome in the report, the reason in words.
    ENDS = {
        "raises": ("exit code 1", "error during initialization: RuntimeError: never comes up"),
        "is killed": ("SIGKILL", "SIGKILL"),
        "exits": ("exit code 7", "exit code 7"),
    }

    def test_it_gives_up_after_the_limit_with_the_reason_last(self, any_kind, caplog):
        # A thread that exits or is killed takes the server with it.
        for how in ["raises"] if any_kind.kind == "thread" else self.ENDS:
            caplog.clear()
            with pytest.raises(ServerFailed) as info:
                any_kind.start(workers.dies_on_start, how, restart="on-failure", boot_failure_limit=3, backoff=0.01)
            outcome, reason = self.ENDS[how]
            report = info.value.report
            assert report.failed
            assert [w.outcome for w in report.workers] == [outcome] * 3
            message = f"worker 0 has failed 3 times in a row; the last time: {reason}"
            assert str(info.value) == message
            told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
            assert told[-1] == f"giving up: {message}"
            assert [n for n in (1, 2) if any(f"(failure {n} of 3: {reason})" in line for line in told)] == [1, 2]
            assert any_kind.main_received is signal.SIGTERM

    def test_the_others_are_stopped_as_by_a_signal(self, any_kind):
        with pytest.raises(ServerFailed) as info:
            any_kind.start(
                workers.fails,
                1,
                "start",
                ValueError("no luck"),
                num_workers=2,
                restart="on-failure",
                boot_failure_limit=2,
                backoff=0.01,
            )
        first, *others = sorted(info.value.report.workers, key=lambda w: w.index)
        assert (first.code, first.reason) == (0, "stopped")
        assert [w.code for w in others] == [1, 1]


class TestReloads:
    #: What the new code does wrong -> what the parent says of it.
    BAD = {
        "this is no Python": "SyntaxError: invalid syntax (reloaded_program.py, line 13)",
        "raise ValueError('no good')": "ValueError: no good",
        "import there_is_no_such_module": "No module named 'there_is_no_such_module'",
        "del worker": "no attribute 'worker'",
        "worker = server_context(refuses)": "error during initialization: OSError: the disk is away",
        "os._exit(9)": "exit code 9",
        "os.kill(os.getpid(), signal.SIGKILL)": "SIGKILL",
    }

    def test_bad_code_is_abandoned_again_and_again_until_it_is_good(self, any_kind, tmp_path, monkeypatch, caplog):
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        program = tmp_path / "reloaded_program.py"
        bad = {
            line: said
            for line, said in self.BAD.items()
            if any_kind.kind != "thread" or not line.startswith("os.")  # these would end the server as well
        }
        lines = iter([*bad, ""])
        said, generations = [], []

        def next_code():
            program.write_text(RELOADED + next(lines))
            kill(signal.SIGHUP)

        def abandoned():
            status = any_kind.sup.status()
            said.append(status["abandoned"])
            generations.append((status["generation"], [w["generation"] for w in status["workers"]]))
            next_code()

        any_kind.on_event("ready", next_code)
        any_kind.on_event("abandoned", abandoned)
        any_kind.on_event("reloaded", lambda: kill(signal.SIGTERM))
        program.write_text(RELOADED)
        try:
            report = any_kind.start(
                "reloaded_program:worker", num_workers=2, restart="on-failure", plugins=[any_kind.plugin]
            )
        finally:
            sys.modules.pop("reloaded_program", None)
        assert len(said) == len(bad)
        for number, (reason, text) in enumerate(zip(bad.values(), said, strict=True), 2):
            assert text.startswith(f"generation {number} was abandoned: ")
            assert reason in text
        # All of that time the first generation has served.
        assert generations == [(1, [1, 1])] * len(bad)
        assert any_kind.sup.status()["abandoned"] is None
        assert any_kind.sup.generation == len(bad) + 2
        errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert sum("the old workers go on" in line for line in errors) == len(bad)
        ends = [(w.generation, w.code, w.reason) for w in report.workers if w.ready is not None]
        assert sorted(ends) == [(1, 0, "reloaded")] * 2 + [(len(bad) + 2, 0, "stopped")] * 2


RELOADED = """
import os, signal
from aiotools.server import server_context

async def refuses(loop, index, args):
    raise OSError("the disk is away")
    yield

@server_context
async def worker(loop, index, args):
    yield

"""


class TestResources:
    def test_out_of_memory_is_a_failure_like_any_other(self, processes):
        left = script(processes, (lambda: processes.count("enter") == 2, lambda: kill(signal.SIGTERM)))
        report = processes.start(workers.eats_memory, restart="on-failure")
        assert left == []
        assert "MemoryError" in report.workers[0].reason
        assert report.workers[1].code == 0

    def test_out_of_descriptors_still_obeys(self, processes):
        left = script(processes, (lambda: processes.count("enter") == 1, lambda: kill(signal.SIGTERM)))
        report = processes.start(workers.leaks_descriptors, restart="on-failure", hang_timeout=60)
        assert left == []
        assert processes.of("enter")[0][1] == errno.EMFILE
        assert processes.of("leave") == [(0, signal.SIGTERM)]
        assert report.workers[0].code == 0

    @pytest.mark.timeout(300 + 10 * RESTARTS)
    @pytest.mark.parametrize("kind", [START_METHODS[0], "thread", *PROCESSES[len(START_METHODS) :]])
    @pytest.mark.parametrize("loop", LOOPS)
    def test_many_restarts_need_no_more_of_anything(self, kind, loop):
        """Descriptors, processes, threads and memory are compared on the way as well as around the test."""
        play = Setup(kind, loop)
        rounds = RESTARTS
        counts, memory = [], []

        def again():
            with open("/proc/self/statm") as f:
                memory.append(int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            children = children_of() - set(play.sup.nurseries.pids() if play.sup.nurseries else ())
            counts.append((len(os.listdir("/proc/self/fd")), len(children), threading.active_count()))
            kill(signal.SIGHUP if play.sup.generation < rounds else signal.SIGTERM)

        play.on_event("ready", again)
        play.on_event("reloaded", again)
        with play.wire:
            report = play.start(workers.managed, num_workers=2, restart="on-failure", plugins=[play.plugin])
        assert len(counts) == rounds
        assert set(counts[2:]) == {counts[2]}
        assert len(report.workers) == 2 * rounds
        # A history of 2 kB for each child is what may stay, and what pytest keeps of the log.
        assert memory[-1] - memory[len(memory) // 2] < 2**22
        assert all(w.code == 0 for w in report.workers)

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


class TestThreads:
    """Servers and children of a program that has threads."""

    @pytest.fixture(autouse=True)
    def other_thread(self, nothing_left):
        release = threading.Event()
        thread = threading.Thread(target=release.wait, name="the other thread")
        thread.start()
        yield
        release.set()
        thread.join()

    @pytest.mark.skipif("fork" not in START_METHODS or sys.version_info < (3, 12), reason="warns from 3.12 on")
    def test_fork_warns_and_works(self):
        setup = Setup("fork", "default")
        with setup.wire, pytest.warns(DeprecationWarning, match="multi-threaded"):
            setup.stop_after("enter", 1)
            report = setup.start(workers.managed)
        assert report.workers[0].code == 0

    def test_other_start_methods_have_nothing_to_warn_of(self, processes):
        """The suite makes warnings errors."""
        with warnings.catch_warnings():
            if processes.kind == "fork":
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            left = script(
                processes,
                (lambda: processes.count("enter") == 2, lambda: kill(signal.SIGHUP)),
                (lambda: processes.count("leave") == 2, lambda: kill(signal.SIGTERM)),
            )
            report = processes.start(workers.managed, num_workers=2, restart="on-failure")
        assert left == []
        assert [w.code for w in report.workers] == [0] * 4


class TestStarting:
    """What the caller of start_server() has done wrong."""

    @pytest.mark.parametrize("loop", LOOPS)
    @pytest.mark.parametrize("kind", [kind for kind in PROCESSES if kind != "fork"])
    def test_an_unpicklable_worker_raises_and_says_what_to_do(self, kind, loop, nothing_left):
        def local(loop, index, args):
            """Nobody can import this."""

        for restart in ("never", "on-failure"):
            setup = Setup(kind, loop)
            with setup.wire, pytest.raises((AttributeError, pickle.PicklingError), match=r"local object") as info:
                setup.start(local, restart=restart)
            assert "package.module:worker" in "".join(traceback.format_exception_only(info.value))
            # The main context was entered already, and has seen it.
            assert setup.main_error is info.value
            assert setup.said == []

    def test_an_unpicklable_argument_is_told_in_the_same_way(self, nothing_left):
        with pytest.raises(TypeError, match="pickle.*lock") as info:
            start_server(workers.managed, args=[threading.Lock()], restart="on-failure")
        assert "package.module:worker" in "".join(traceback.format_exception_only(info.value))


@pytest.fixture
def root():
    """The root logger, as it was afterwards."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield logger
    for handler in list(logger.handlers):
        if handler not in handlers:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()
    logger.setLevel(level)


class TestClocks:
    """The system's clock is for reports only."""

    def test_jumps_of_the_system_clock_change_nothing(self, any_kind, monkeypatch):
        # Forwards and backwards by years, at each look.
        times = itertools.cycle([2e9, 0.0, 5e9, 1e9])
        monkeypatch.setattr(time, "time", lambda: next(times))
        monkeypatch.setattr(time, "time_ns", lambda: int(next(times) * 1e9))
        left = script(
            any_kind,
            (lambda: any_kind.count("enter") == 2, lambda: kill(signal.SIGHUP)),
            (lambda: any_kind.count("leave") == 2, lambda: kill(signal.SIGTERM)),
        )
        report = any_kind.start(
            workers.clock_jumps,
            num_workers=2,
            restart="on-failure",
            hang_timeout=60,
            start_timeout=3600,
            drain_timeout=3600,
            max_age=3600,
            plugins=[any_kind.plugin],
        )
        assert left == []
        assert [(w.code, w.reason) for w in report.workers] == [(0, "reloaded")] * 2 + [(0, "stopped")] * 2
        assert 0 <= any_kind.sup.status()["uptime"] < 3600


class TestOutput:
    """Where the log or what is printed can go nowhere."""

    @pytest.mark.parametrize("config", [{"file": "/dev/full"}, {"per_process": "{tmp}/{{index}}"}])
    def test_a_full_disk_under_the_log_stops_nobody(self, any_kind, config, capsys, tmp_path, root):
        for name in ("main", "0", "1"):
            (tmp_path / name).symlink_to("/dev/full")
        config = {name: value.format(tmp=tmp_path) for name, value in config.items()}
        left = script(
            any_kind,
            (lambda: any_kind.count("enter") == 2, lambda: kill(signal.SIGHUP)),
            (lambda: any_kind.count("leave") == 2, lambda: kill(signal.SIGUSR1)),
            (lambda: any_kind.count("reloaded") == 2, lambda: kill(signal.SIGTERM)),
        )
        report = any_kind.start(
            workers.managed, num_workers=2, restart="on-failure", log_config=LogConfig(level="DEBUG", **config)
        )
        assert left == []
        assert [w.code for w in report.workers] == [0] * 4
        assert "No space left on device" in capsys.readouterr().err

    @pytest.mark.parametrize("loop", LOOPS)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("stream", ["stdout", "stderr"])
    def test_a_worker_that_prints_into_a_closed_pipe(self, kind, loop, stream, tmp_path):
        program = tmp_path / "prints.py"
        program.write_text(PRINTS)
        reader, writer = os.pipe()
        os.close(reader)
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, stream: writer}
        path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
        env = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, str(program), kind, loop, stream]
        with subprocess.Popen(command, env=env, start_new_session=True, **streams) as proc:
            os.close(writer)
            _, text = proc.communicate(timeout=PATIENCE)
        assert proc.returncode == 0
        if stream == "stdout":
            assert b"BrokenPipeError" in text


#: Nothing of the wait for signals here: each worker prints and ends, and so does the server.
PRINTS = """
import asyncio, multiprocessing, sys
from aiotools.server import server_context, start_server

@server_context
async def worker(loop, index, args):
    yield
    print("the end", file=getattr(sys, args[0]), flush=True)

if __name__ == "__main__":
    kind, loop, stream = sys.argv[1:]
    if kind == "thread":
        kwargs = {"worker_kind": "thread"}
    elif kind == "nursery":
        kwargs = {"boot_failure_limit": 4}
    else:
        kwargs = {"mp_context": multiprocessing.get_context(kind)}
    report = start_server(worker, num_workers=2, args=(stream,), run_to_completion=True, report=True,
        loop_factory={"default": "asyncio"}.get(loop, loop), **kwargs)
    assert [w.code for w in report.workers] == [1, 1], report
"""
