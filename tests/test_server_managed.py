"""What start_server() can do beyond its classic arguments."""

import asyncio
import collections
import contextlib
import functools
import itertools
import json
import logging
import multiprocessing
import os
import signal
import socket
import stat
import sys
import threading

import pytest
import server_workers as workers
from process_helpers import (  # noqa: F401
    PATIENCE,
    START_METHODS,
    nothing_left_fixture,
    patient_evidence_fixture,
    wait_process_gone,
)
from server_play import RUNNERS, Play, kill, script

from aiotools.server import ServerFailed, ServerOptions, control, kinds, main_context, start_server
from aiotools.server.nurseries import nursery_usable

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(300)]

FAST = "fork" if "fork" in START_METHODS else "forkserver"


LOOPS = [name for name in ("default", "uvloop") if name in RUNNERS]
LOOP_NAMES = ["asyncio", *LOOPS[1:]]


@pytest.fixture(params=[(m, r) for m in START_METHODS for r in LOOPS], ids="-".join)
def play(request, nothing_left):
    play = Play(*request.param)
    with play.wire:
        yield play


@pytest.fixture
def quick(nothing_left):
    play = Play(FAST, "default")
    with play.wire:
        yield play


class TestRollingRestart:
    def test_each_worker_is_ready_before_its_predecessor_is_told_to_stop(self, play):
        left = script(
            play,
            (lambda: play.count("enter") == 2, lambda: kill(signal.SIGHUP)),
            (lambda: play.count("leave") == 2, lambda: kill(signal.SIGTERM)),
        )
        report = play.start(workers.managed, num_workers=2, restart="on-failure", report=True)
        assert left == []
        assert sorted(m[:2] for m in play.of("enter")) == [(0, 1), (0, 2), (1, 1), (1, 2)]
        order = [m[:3] for m in play.said]
        for index in range(2):
            assert order.index(("enter", index, 2)) < order.index(("leave", index, 1))
        # One at a time: the second is not started before the first has moved.
        assert order.index(("leave", 0, 1)) < order.index(("enter", 1, 2))
        reasons = {(w.index, w.generation): w.reason for w in report.workers}
        assert reasons == {(0, 1): "reloaded", (1, 1): "reloaded", (0, 2): "stopped", (1, 2): "stopped"}
        assert [w.code for w in report.workers] == [0] * 4
        assert [m[3] for m in play.of("leave") if m[1] == 1] == ["reloaded"] * 2

    def test_a_burst_of_requests_coalesces(self, quick):
        def burst():
            for _ in range(10):
                quick.sup_command("restart")

        left = script(
            quick,
            (lambda: quick.count("enter") == 1, burst),
            (lambda: quick.count("enter") == 2, burst),
            (lambda: quick.count("leave") == 2, lambda: kill(signal.SIGTERM)),
        )
        quick.start(workers.managed, restart="on-failure", plugins=[quick.plugin])
        assert left == []
        assert [m[1] for m in quick.of("enter")] == [1, 2, 3]

    def test_max_surge_lets_several_move_at_a_time(self, quick):
        left = script(
            quick,
            (lambda: quick.count("enter") == 4, lambda: kill(signal.SIGHUP)),
            (lambda: quick.count("leave") == 4, lambda: kill(signal.SIGTERM)),
        )
        quick.start(workers.managed, num_workers=4, max_surge=3, restart="on-failure")
        assert left == []
        assert sorted(m[:2] for m in quick.of("enter")) == sorted((i, g) for i in range(4) for g in (1, 2))

    def test_extras_are_restarted_after_the_workers(self, quick):
        left = script(
            quick,
            (lambda: quick.count("enter") == 1 and quick.count("extra") == 1, lambda: kill(signal.SIGHUP)),
            (lambda: quick.count("extra") == 2, lambda: kill(signal.SIGTERM)),
        )
        report = quick.start(workers.managed, extra_procs=[workers.extra_reporting], restart="on-failure", report=True)
        assert left == []
        assert [(w.role, w.generation) for w in report.workers] == [
            ("worker", 1),
            ("extra", 1),
            ("worker", 2),
            ("extra", 2),
        ]

    def test_a_stop_during_a_rolling_restart_ends_all(self, play):
        left = script(
            play,
            (lambda: play.count("enter") == 2, lambda: kill(signal.SIGHUP)),
            (lambda: play.count("enter") == 3, lambda: kill(signal.SIGTERM)),
        )
        report = play.start(workers.managed, num_workers=2, restart="on-failure", report=True)
        assert left == []
        assert all(w.ended is not None for w in report.workers)


APP = """
import os
from aiotools.server import server_context, current_worker

VERSION = {version!r}
{extra}

@server_context
async def worker(loop, index, args):
    args[0].send(("enter", index, VERSION, current_worker().generation))
    yield
    args[0].send(("leave", index, VERSION, current_worker().generation))
"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    """A module whose code can be exchanged; children find it, too."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    path = tmp_path / "exchangeable.py"

    def write(version, extra=""):
        path.write_text(APP.format(version=version, extra=extra))

    write("one")
    yield write
    sys.modules.pop("exchangeable", None)


class TestFreshCode:
    @pytest.mark.parametrize("kind", ["process", "thread"])
    def test_a_restart_imports_the_worker_anew(self, quick, app, kind):
        quick.ctx = multiprocessing.get_context("spawn")

        def change():
            app("two")
            kill(signal.SIGHUP)

        left = script(
            quick,
            (lambda: quick.count("enter") == 1, change),
            (lambda: quick.count("leave") == 1, lambda: kill(signal.SIGTERM)),
        )
        quick.start("exchangeable:worker", worker_kind=kind, restart="on-failure")
        assert left == []
        assert quick.of("enter") == [(0, "one", 1), (0, "two", 2)]

    @pytest.mark.parametrize(
        "broken", ["raise ValueError('no good')", "this is no Python", "import does_not_exist", "os._exit(9)"]
    )
    def test_broken_code_leaves_the_old_workers_in_place(self, quick, app, broken, caplog):
        quick.ctx = multiprocessing.get_context("spawn")

        def change():
            app("two", broken)
            kill(signal.SIGHUP)

        def repair():
            quick.status = quick.sup.status()
            app("three")
            kill(signal.SIGHUP)

        quick.on_event("abandoned", repair)
        left = script(
            quick,
            (lambda: quick.count("enter") == 2, change),
            (lambda: quick.count("leave") == 2, lambda: kill(signal.SIGTERM)),
        )
        report = quick.start(
            "exchangeable:worker", num_workers=2, restart="on-failure", plugins=[quick.plugin], report=True
        )
        assert left == []
        assert sorted(quick.of("enter")) == [(0, "one", 1), (0, "three", 3), (1, "one", 1), (1, "three", 3)]
        assert "generation 2 was abandoned" in quick.status["abandoned"]
        assert [w["generation"] for w in quick.status["workers"]] == [1, 1]
        assert any(r.levelno == logging.ERROR and "abandoned" in r.getMessage() for r in caplog.records)
        assert not report.failed

    def test_an_import_string_that_names_nothing_is_a_clear_failure(self, quick, app):
        quick.ctx = multiprocessing.get_context("spawn")
        with pytest.raises(ServerFailed, match="no attribute 'nothing'") as info:
            quick.start("exchangeable:nothing", restart="on-failure", boot_failure_limit=1)
        assert info.value.report.failed

    @pytest.mark.parametrize("bad", ["nocolon", ":name", "module:", ""])
    def test_a_malformed_import_string_is_refused_at_the_call(self, bad):
        with pytest.raises(ValueError, match=r"package\.module:name"):
            start_server(bad)


class TestOptions:
    def test_they_can_be_given_as_one_object(self, quick):
        left = script(
            quick,
            (lambda: quick.count("enter") == 1, lambda: os.kill(quick.of("enter")[0][2], signal.SIGKILL)),
            (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGTERM)),
        )
        options = ServerOptions(restart="on-failure", report=True)
        report = quick.start(workers.managed, options=options)
        assert left == []
        assert len(report.workers) == 2

    def test_not_both_ways_at_once(self):
        with pytest.raises(TypeError, match=r"options= and restart"):
            start_server(workers.managed, options=ServerOptions(), restart="always")

    def test_only_what_was_asked_for_makes_a_server_managed(self):
        assert not ServerOptions().managed
        assert not ServerOptions(report=True, loop_factory="asyncio").managed
        assert ServerOptions(restart="always").managed
        assert ServerOptions(bind=["tcp://127.0.0.1:0"]).managed

    @pytest.mark.parametrize("choice", [*LOOP_NAMES, asyncio.new_event_loop])
    def test_the_loop_factory_makes_the_workers_loops(self, quick, choice):
        script(quick, (lambda: quick.count("loop") == 2, lambda: kill(signal.SIGTERM)))
        quick.start(workers.tells_its_loop, extra_procs=[workers.tells_its_loop], loop_factory=choice)
        expected = "uvloop" if choice == "uvloop" else "asyncio.unix_events"
        assert sorted(quick.of("loop")) == [(0, expected), (1, expected)]


class TestRestart:
    @pytest.mark.parametrize("policy", ["on-failure", "always"])
    def test_a_killed_worker_is_replaced(self, play, policy, caplog):
        left = script(
            play,
            (lambda: play.count("enter") == 2, lambda: os.kill(play.of("enter")[0][2], signal.SIGKILL)),
            (lambda: play.count("enter") == 3, lambda: kill(signal.SIGTERM)),
        )
        report = play.start(workers.managed, num_workers=2, restart=policy, report=True)
        assert left == []
        assert sorted(str(w.signal or w.code) for w in report.workers) == ["0", "0", "9"]
        assert "SIGKILL" in caplog.text
        assert play.main_received is signal.SIGTERM

    def test_one_that_ends_by_itself_comes_back_only_with_always(self, quick):
        left = script(
            quick,
            (lambda: quick.count("enter") == 1, lambda: os.kill(quick.of("enter")[0][2], signal.SIGTERM)),
            (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGTERM)),
        )
        quick.start(workers.managed, restart="always")
        assert left == []

    def test_with_on_failure_it_stays_away(self, quick, caplog):
        script(
            quick,
            (lambda: quick.count("enter") == 1, lambda: os.kill(quick.of("enter")[0][2], signal.SIGTERM)),
        )
        quick.start(workers.managed, restart="on-failure")
        assert quick.count("enter") == 1
        assert "All child processes have terminated" in caplog.text

    @pytest.mark.parametrize("kind", ["process", "thread"])
    def test_a_boot_loop_ends_the_server_with_a_failure(self, quick, kind):
        with pytest.raises(ServerFailed, match=r"failed 3 times in a row.*always broken") as info:
            quick.start(
                workers.crashes_at_once,
                worker_kind=kind,
                restart="on-failure",
                boot_failure_limit=3,
                backoff=0.01,
            )
        report = info.value.report
        assert report.failed
        assert [w.code for w in report.workers] == [1] * 3
        assert quick.main_received is signal.SIGTERM

    def test_a_worker_that_is_not_ready_in_time_is_a_boot_failure_with_stacks(self, quick, caplog):
        with pytest.raises(ServerFailed, match=r"not ready within 0\.2 s"):
            quick.start(workers.stuck_in_start, restart="on-failure", boot_failure_limit=1, start_timeout=0.2)
        assert "stacks of worker 0" in caplog.text

    def test_all_killed_at_once_come_back(self, quick):
        def kill_all():
            for message in quick.of("enter"):
                os.kill(message[2], signal.SIGKILL)

        left = script(
            quick,
            (lambda: quick.count("enter") == 3, kill_all),
            (lambda: quick.count("enter") == 6, lambda: kill(signal.SIGTERM)),
        )
        quick.start(workers.managed, num_workers=3, restart="on-failure")
        assert left == []


class TestStop:
    def stop_and_end_drain(self, play):
        """What is left to do: nothing, once the server was stopped, and its worker was cancelled while it drained."""
        return script(
            play,
            (lambda: play.count("enter") == 1, lambda: kill(signal.SIGTERM)),
            (lambda: play.count("leaving") == 1, play.end_drain),
        )

    @pytest.mark.parametrize("kind", ["process", "thread"])
    def test_what_does_not_drain_is_cancelled(self, play, capfd, kind):
        left = self.stop_and_end_drain(play)
        report = play.start(
            workers.stuck_in_drain,
            False,
            worker_kind=kind,
            drain_timeout=3600,
            cancel_timeout=3600,
            report=True,
            plugins=[play.plugin],
        )
        assert left == []
        assert play.of("cancelled") == [(0,)]
        assert report.workers[0].signal is None

    def test_what_ignores_the_cancellation_is_killed(self, play, caplog):
        left = self.stop_and_end_drain(play)
        report = play.start(
            workers.stuck_in_drain, True, drain_timeout=3600, cancel_timeout=0.1, report=True, plugins=[play.plugin]
        )
        assert left == []
        assert report.workers[0].signal is signal.SIGKILL
        assert "stacks of worker 0" in caplog.text

    def test_a_blocked_loop_is_killed_and_its_stack_logged(self, play, caplog, patient_evidence):
        left = self.stop_and_end_drain(play)
        report = play.start(
            workers.hangs_in_stop, drain_timeout=3600, cancel_timeout=0.1, report=True, plugins=[play.plugin]
        )
        assert left == []
        assert report.workers[0].signal is signal.SIGKILL
        assert "in hangs_in_stop" in caplog.text

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_stops_at_once(self, quick, signum):
        left = script(
            quick,
            (lambda: quick.count("enter") == 1, lambda: kill(signal.SIGTERM)),
            (lambda: quick.count("leaving") == 1, lambda: kill(signum)),
        )
        report = quick.start(workers.stuck_in_drain, True, drain_timeout=3600, report=True)
        assert left == []
        assert report.workers[0].signal is signal.SIGKILL
        assert quick.main_received is signal.SIGTERM

    def test_signals_to_the_whole_group_do_not_harm_the_workers(self, quick):
        def to_all():
            for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU):
                os.kill(quick.of("enter")[0][2], signum)
            quick.sup_command("reload")

        left = script(
            quick,
            (lambda: quick.count("enter") == 1, to_all),
            (lambda: quick.count("reloaded") == 1, lambda: kill(signal.SIGTERM)),
        )
        report = quick.start(workers.managed, restart="always", plugins=[quick.plugin], report=True)
        assert left == []
        assert [w.code for w in report.workers] == [0]


class TestVerbs:
    def test_sigusr1_runs_the_reload_hooks(self, play):
        left = script(
            play,
            (lambda: play.count("enter") == 2, lambda: kill(signal.SIGUSR1)),
            (lambda: play.count("reloaded") == 2, lambda: kill(signal.SIGTERM)),
        )
        report = play.start(workers.managed, num_workers=2, restart="on-failure", report=True)
        assert left == []
        assert len(report.workers) == 2

    def test_ttin_and_ttou_change_the_number_of_workers(self, quick):
        left = script(
            quick,
            (lambda: quick.count("enter") == 1, lambda: kill(signal.SIGTTIN)),
            (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGTTOU)),
            (lambda: quick.count("leave") == 1, lambda: kill(signal.SIGTTOU)),
            (lambda: True, lambda: kill(signal.SIGTERM)),
        )
        report = quick.start(workers.managed, restart="on-failure", report=True)
        assert left == []
        assert [(w.index, w.reason) for w in report.workers] == [(0, "stopped"), (1, "one worker less")]

    def test_sigusr2_writes_the_status_to_the_log(self, quick, caplog):
        caplog.set_level(logging.INFO, "aiotools.server")
        script(
            quick,
            (lambda: quick.count("enter") == 1, lambda: kill(signal.SIGUSR2)),
            (lambda: True, lambda: kill(signal.SIGTERM)),
        )
        quick.start(workers.managed, restart="on-failure")
        assert "status: " in caplog.text

    def test_the_control_socket_takes_the_same_verbs(self, quick, tmp_path, caplog):
        path = tmp_path / "control"
        answers = {}

        def talk():
            try:
                mode = stat.S_IMODE(os.stat(path).st_mode)
                answers["mode"] = mode
                answers["status"] = control.status(path)
                answers["more"] = control.more(path)
                answers["restart"] = control.restart(path)
                answers["reload"] = control.reload(path)
                answers["less"] = control.less(path)
                with pytest.raises(control.ControlError, match="unknown verb"):
                    control.command(path, "explode")
            except BaseException as exc:
                answers["error"] = exc
            finally:
                control.stop(path)

        # Forks happen while the thread runs, which Python 3.12 and later warn about.
        quick.ctx = multiprocessing.get_context("spawn")
        thread = threading.Thread(target=blocked(talk))
        script(quick, (lambda: quick.count("enter") == 1, thread.start))
        quick.start(workers.managed, restart="on-failure", control_socket=path)
        thread.join()
        assert "error" not in answers, answers
        assert answers["mode"] == 0o600
        assert answers["status"]["workers"][0]["index"] == 0
        assert answers["restart"]["generation"] == 2
        assert not path.exists()

    def test_a_pidfile_names_the_parent_while_it_runs(self, quick, tmp_path):
        path = tmp_path / "pid"
        seen = []

        def look():
            seen.append(path.read_text())
            kill(signal.SIGTERM)

        script(quick, (lambda: quick.count("enter") == 1, look))
        quick.start(workers.managed, pidfile=path)
        assert seen == [f"{os.getpid()}\n"]
        assert not path.exists()

    def test_a_pidfile_of_a_running_process_is_respected(self, quick, tmp_path):
        path = tmp_path / "pid"
        path.write_text("1\n")
        with pytest.raises(RuntimeError, match="process 1"):
            quick.start(workers.managed, pidfile=path)
        assert path.read_text() == "1\n"


def blocked(fn):
    """A thread that takes none of the process' signals."""

    def run():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        fn()

    return run


class TestRecycling:
    def test_by_number_of_requests(self, quick):
        left = script(
            quick,
            (lambda: quick.count("leave") == 1, lambda: kill(signal.SIGTERM)),
        )
        report = quick.start(workers.counting, 5, max_requests=5, recycle_jitter=0, restart="on-failure", report=True)
        assert left == []
        assert report.workers[0].reason == "recycled: 5 requests"
        order = [m[0] for m in quick.said]
        assert order[:3] == ["enter", "enter", "leave"]

    def test_one_that_asks_in_its_start_and_one_that_asks_while_its_predecessor_drains_are_heard(self, quick):
        """Each worker asks at once, and each asks once."""
        left = script(quick, (lambda: quick.count("leave") == 3, lambda: kill(signal.SIGTERM)))
        report = quick.start(workers.asks_for_a_successor, restart="on-failure", report=True)
        assert left == []
        assert [w.reason for w in report.workers][:3] == ["recycled: at once"] * 3

    def test_by_age(self, quick):
        left = script(quick, (lambda: quick.count("leave") == 1, lambda: kill(signal.SIGTERM)))
        report = quick.start(workers.managed, max_age=0.2, restart="on-failure", report=True)
        assert left == []
        assert report.workers[0].reason.startswith("recycled: 0.")

    def test_by_memory(self, quick, monkeypatch):
        monkeypatch.setattr("aiotools.server.supervise.TICK", 0.05)
        left = script(quick, (lambda: quick.count("leave") == 1, lambda: kill(signal.SIGTERM)))
        report = quick.start(workers.managed, max_memory=1, restart="on-failure", report=True)
        assert left == []
        assert report.workers[0].reason.endswith("bytes resident")
        assert report.workers[0].memory > 1


class TestThreads:
    """The same worker functions in threads of this process."""

    @pytest.mark.parametrize("loop_factory", LOOP_NAMES)
    def test_workers_live_from_start_to_the_stop_signal(self, quick, loop_factory):
        script(quick, (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGTERM)))
        report = quick.start(
            workers.managed, num_workers=2, worker_kind="thread", loop_factory=loop_factory, report=True
        )
        assert sorted(m[0] for m in quick.of("enter")) == [0, 1]
        assert {m[2] for m in quick.of("enter")} == {os.getpid()}
        assert sorted(m[:3] for m in quick.of("leave")) == [(0, 1, signal.SIGTERM), (1, 1, signal.SIGTERM)]
        assert [w.code for w in report.workers] == [0, 0]

    def test_rolling_restart(self, quick):
        left = script(
            quick,
            (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGHUP)),
            (lambda: quick.count("leave") == 2, lambda: kill(signal.SIGTERM)),
        )
        quick.start(workers.managed, num_workers=2, worker_kind="thread", restart="on-failure")
        assert left == []
        assert sorted(m[:2] for m in quick.of("enter")) == [(0, 1), (0, 2), (1, 1), (1, 2)]

    @pytest.mark.parametrize("where", ["start", "stop"])
    def test_a_failing_worker_interrupts_the_server(self, quick, where):
        if where == "stop":
            script(quick, (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGINT)))
        report = quick.start(
            workers.fails, 1, where, ValueError("no luck"), num_workers=2, worker_kind="thread", report=True
        )
        assert (0, signal.SIGINT) in quick.of("leave")
        assert [w.code for w in report.workers] == [0, 1]

    def test_on_a_free_threaded_build_it_says_when_the_gil_came_back(self, quick, monkeypatch, caplog):
        monkeypatch.setattr("aiotools.server.launch.gil_came_back", lambda: True)
        script(quick, (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGHUP)),
               (lambda: quick.count("leave") == 2, lambda: kill(signal.SIGTERM)))  # fmt: skip
        quick.start(workers.managed, num_workers=2, worker_kind="thread")
        assert caplog.text.count("the GIL is enabled") == 1
        assert "aiotools._aiotools" in caplog.text

    def test_an_extra_stays_a_process(self, quick):
        script(quick, (lambda: quick.count("extra") == 1, lambda: kill(signal.SIGTERM)))
        quick.ctx = multiprocessing.get_context("spawn")
        report = quick.start(workers.managed, extra_procs=[workers.extra_reporting], worker_kind="thread", report=True)
        assert [w.kind for w in report.workers] == ["thread", "process"]


@pytest.mark.skipif(sys.version_info < (3, 14), reason="concurrent.interpreters comes with 3.14")
class TestInterpreters:
    """The same in interpreters of their own.  They share descriptors with this process, but no objects."""

    def start(self, quick, worker, **kwargs):
        reader, writer = os.pipe()
        os.set_blocking(reader, False)

        def on_readable():
            for line in os.read(reader, 65536).decode().splitlines():
                quick.said.append(tuple(json.loads(line)))
                quick.react(quick.said[-1])

        @main_context
        def main():
            loop = asyncio.get_running_loop()
            loop.add_reader(reader, on_readable)
            quick.main_received = yield writer
            loop.remove_reader(reader)
            with contextlib.suppress(BlockingIOError):
                on_readable()

        try:
            return start_server(worker, main, worker_kind="interpreter", report=True, **kwargs)
        finally:
            os.close(reader)
            os.close(writer)

    def test_workers_live_from_start_to_the_stop_signal(self, quick):
        script(quick, (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGTERM)))
        report = self.start(quick, "server_workers:fd_reporting", num_workers=2)
        entered = sorted(quick.of("enter"))
        assert [(index, gen, kind) for index, gen, kind, _, _ in entered] == [
            (0, 1, "interpreter"),
            (1, 1, "interpreter"),
        ]
        assert len({interp for *_, interp in entered} - {0}) == 2
        assert sorted(quick.of("leave")) == [(0, 1, signal.SIGTERM), (1, 1, signal.SIGTERM)]
        assert [w.code for w in report.workers] == [0, 0]

    def test_rolling_restart_imports_the_code_anew(self, quick, app, tmp_path):
        source = """
import json, os
from aiotools.server import server_context, current_worker
VERSION = %r
@server_context
async def worker(loop, index, args):
    os.write(args[0], json.dumps(["enter", index, VERSION]).encode() + b"\\n")
    yield
    os.write(args[0], json.dumps(["leave", index, VERSION]).encode() + b"\\n")
"""
        path = tmp_path / "exchangeable.py"
        path.write_text(source % "one")

        def change():
            path.write_text(source % "twenty-two")
            kill(signal.SIGHUP)

        left = script(
            quick,
            (lambda: quick.count("enter") == 1, change),
            (lambda: quick.count("leave") == 1, lambda: kill(signal.SIGTERM)),
        )
        self.start(quick, "exchangeable:worker", restart="on-failure")
        assert left == []
        assert quick.of("enter") == [(0, "one"), (0, "twenty-two")]

    def test_a_failing_worker_is_a_boot_failure(self, quick):
        with pytest.raises(ServerFailed, match="no attribute"):
            self.start(quick, "server_workers:missing", restart="on-failure", boot_failure_limit=2, backoff=0.01)

    def test_uvloop_is_refused_at_the_start(self, quick):
        with pytest.raises(RuntimeError, match="uvloop"):
            self.start(quick, "server_workers:fd_reporting", loop_factory="uvloop")

    def test_a_socket_is_served(self, quick):
        answers = []

        def talk():
            answers.append(ask(tuple(quick.of("enter")[0][3])))
            kill(signal.SIGTERM)

        thread = threading.Thread(target=blocked(talk))
        script(quick, (lambda: quick.count("enter") == 1, thread.start))
        self.start(quick, "server_workers:fd_echo", bind="tcp://127.0.0.1:0")
        thread.join()
        assert answers[0][3] == b"hello"


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="they are there")
def test_interpreters_are_refused_before_3_14():
    with pytest.raises(NotImplementedError, match=r"3\.14"):
        start_server(workers.managed, worker_kind="interpreter")


def ask(address, family=socket.AF_INET):
    with socket.socket(family) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(address)
        sock.sendall(b"hello\n")
        return sock.makefile("rb").readline().split()


class TestSockets:
    @pytest.mark.parametrize("kind", ["process", "thread"])
    @pytest.mark.parametrize("reuse_port", [False, True])
    def test_tcp_is_served_by_the_workers(self, quick, kind, reuse_port):
        quick.ctx = multiprocessing.get_context("spawn")
        answers = []

        def talk():
            address = tuple(quick.of("enter")[0][2][0])
            answers.extend(ask(address) for _ in range(4))
            kill(signal.SIGTERM)

        thread = threading.Thread(target=blocked(talk))
        script(quick, (lambda: quick.count("enter") == 2, thread.start))
        quick.start(workers.echo, num_workers=2, bind=["tcp://127.0.0.1:0"], worker_kind=kind, reuse_port=reuse_port)
        thread.join()
        assert [a[3] for a in answers] == [b"hello"] * 4

    def test_a_unix_socket_has_its_mode_and_goes_with_the_server(self, quick, tmp_path):
        quick.ctx = multiprocessing.get_context("spawn")
        path = str(tmp_path / "sock")
        seen = []

        def talk():
            seen.append(stat.S_IMODE(os.stat(path).st_mode))
            seen.append(ask(path, socket.AF_UNIX)[3])
            kill(signal.SIGTERM)

        thread = threading.Thread(target=blocked(talk))
        script(quick, (lambda: quick.count("enter") == 1, thread.start))
        quick.start(workers.echo, bind=f"unix:{path}", socket_mode=0o640)
        thread.join()
        assert seen == [0o640, b"hello"]
        assert not os.path.exists(path)

    def test_a_stale_socket_file_is_replaced(self, quick, tmp_path):
        path = str(tmp_path / "sock")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        script(quick, (lambda: quick.count("enter") == 1, lambda: kill(signal.SIGTERM)))
        quick.start(workers.echo, bind=[f"unix:{path}"])
        assert quick.count("leave") == 1

    def test_a_socket_somebody_listens_on_is_left_alone(self, tmp_path):
        path = str(tmp_path / "sock")
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
            other.listen()
            with pytest.raises(OSError, match="another process listens there"):
                start_server(workers.echo, bind=[f"unix:{path}"])
        assert os.path.exists(path)

    def test_a_file_that_is_no_socket_is_left_alone(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("precious")
        with pytest.raises(OSError, match="no socket"):
            start_server(workers.echo, bind=[f"unix:{path}"])
        assert path.read_text() == "precious"

    def test_a_port_in_use_is_a_clear_error(self):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(OSError, match=f"cannot bind tcp://127.0.0.1:{port}"):
                start_server(workers.echo, bind=[f"tcp://127.0.0.1:{port}"])

    @pytest.mark.parametrize("spec", ["tcp://192.0.2.1:0", "tcp://no.such.host.invalid:0"])
    def test_a_bad_address_is_a_clear_error(self, spec):
        with pytest.raises(OSError, match="cannot bind " + spec):
            start_server(workers.echo, bind=[spec])

    @pytest.mark.parametrize(
        "spec",
        [
            "",
            "tcp://",
            "tcp://host",
            "tcp://host:port",
            "tcp://::1:80",
            "tcp://h:99999",
            "unix:",
            "fd://x",
            "http://a:1",
        ],
    )
    def test_a_malformed_address_is_refused_at_the_call(self, spec):
        with pytest.raises(ValueError):
            start_server(workers.echo, bind=[spec])

    def test_a_descriptor_number_stays_the_callers(self, quick):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            script(quick, (lambda: quick.count("enter") == 1, lambda: kill(signal.SIGTERM)))
            quick.start(workers.echo, bind=[f"fd://{sock.fileno()}"])
            assert quick.of("enter")[0][2] == [sock.getsockname()]
            assert sock.fileno() >= 0

    def test_sockets_of_the_service_manager_are_taken(self, quick, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            # They begin at descriptor 3, which belongs to pytest here.
            kept = os.dup(3)
            os.dup2(sock.fileno(), 3)
            try:
                monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
                monkeypatch.setenv("LISTEN_FDS", "1")
                script(quick, (lambda: quick.count("enter") == 1, lambda: kill(signal.SIGTERM)))
                quick.start(workers.echo, bind=["systemd"])
                assert quick.of("enter")[0][2] == [sock.getsockname()]
                assert "LISTEN_FDS" not in os.environ
            finally:
                os.dup2(kept, 3)
                os.close(kept)

    def test_without_any_from_the_service_manager_it_says_so(self, monkeypatch):
        monkeypatch.delenv("LISTEN_FDS", raising=False)
        with pytest.raises(RuntimeError, match="LISTEN_FDS"):
            start_server(workers.echo, bind=["systemd"])


class TestPlugins:
    def test_events_come_in_order(self, quick):
        quick.on_event("ready", lambda: kill(signal.SIGTERM))
        quick.start(workers.managed, plugins=[quick.plugin])
        assert quick.events == [
            "open",
            "starting 0",
            "ready 0",
            "ready",
            "stopping",
            "draining 0",
            "gone 0",
            "stopped",
            "finish",
            "close",
        ]


class TestSlowStart:
    """The parent learns late that a child is up: meanwhile that runs, speaks, is told to stop, or dies."""

    @pytest.fixture
    def starts(self, monkeypatch):
        """One list per start: the gate that holds up its end in the parent, where there is one."""
        gates = collections.defaultdict(list)
        count = itertools.count()

        async def start_late(spec, mp_context):
            number = next(count)
            handle = await kinds.start_process(spec, mp_context)
            try:
                for gate in gates[number]:
                    await gate.wait()
            except BaseException:
                handle.send_signal(signal.SIGKILL)
                await handle.wait()
                raise
            return handle

        monkeypatch.setattr("aiotools.server.launch.start_process", start_late)
        return gates

    def test_a_stop_waits_for_it(self, play, starts):
        up = asyncio.Event()
        starts[1].append(up)

        def stop():
            kill(signal.SIGTERM)
            # When the server tells its children to stop, this one has no process yet.
            play.sup.loop.call_later(0.05, up.set)

        left = script(
            play,
            (lambda: play.count("enter") == 1, lambda: kill(signal.SIGHUP)),
            (lambda: play.count("enter") == 2, stop),
        )
        report = play.start(workers.managed, restart="on-failure", report=True, plugins=[play.plugin])
        assert left == []
        assert play.count("leave") == 2
        assert [(w.code, w.reason) for w in report.workers] == [(0, "stopped")] * 2

    def test_an_extra_without_a_loop_hears_the_signal_afterwards(self, quick, starts):
        up = asyncio.Event()
        starts[2].append(up)

        def stop():
            kill(signal.SIGTERM)
            quick.sup.loop.call_later(0.05, up.set)

        left = script(
            quick,
            (lambda: quick.count("extra") == 1, lambda: os.kill(quick.of("extra")[0][1], signal.SIGKILL)),
            (lambda: quick.count("extra") == 2, stop),
        )
        report = quick.start(
            workers.managed,
            extra_procs=[workers.extra_with_pid],
            restart="on-failure",
            report=True,
            plugins=[quick.plugin],
        )
        assert left == []
        assert report.workers[-1].code == 0

    def test_who_dies_meanwhile_has_been_ready(self, quick, starts):
        up = asyncio.Event()
        starts[1].append(up)

        def kill_it():
            [pid] = [m[2] for m in quick.of("enter") if m[0] == 1]
            os.kill(pid, signal.SIGKILL)
            wait_process_gone(pid)
            up.set()

        left = script(
            quick,
            (lambda: quick.count("enter") == 2, kill_it),
            (lambda: quick.count("enter") == 3, lambda: kill(signal.SIGTERM)),
        )
        report = quick.start(workers.managed, num_workers=2, restart="on-failure", report=True)
        assert left == []
        assert sorted(str(w.signal or w.code) for w in report.workers) == ["0", "0", "9"]

    def test_each_that_dies_meanwhile_is_replaced(self, quick, starts):
        gates = [asyncio.Event() for _ in range(3)]
        for number, gate in enumerate(gates):
            starts[number].append(gate)

        def kill_it(number):
            pid = quick.of("enter")[number][2]
            os.kill(pid, signal.SIGKILL)
            wait_process_gone(pid)
            gates[number].set()

        left = script(
            quick,
            *[(lambda n=n: quick.count("enter") == n + 1, functools.partial(kill_it, n)) for n in range(3)],
            (lambda: quick.count("enter") == 4, lambda: kill(signal.SIGTERM)),
        )
        report = quick.start(workers.managed, restart="on-failure", report=True, backoff=0.01)
        assert left == []
        assert [w.signal or w.code for w in report.workers] == [signal.SIGKILL] * 3 + [0]

    def test_it_is_ready_for_the_server_when_there_is_a_process(self, quick, starts):
        up = asyncio.Event()
        starts[0].append(up)
        seen = []

        def look():
            [worker] = quick.sup.status()["workers"]
            seen.append((worker["state"], worker["pid"]))
            if up.is_set():
                kill(signal.SIGTERM)
            up.set()

        quick.on_event("ready", look)
        script(quick, (lambda: quick.count("enter") == 1, look))
        quick.start(workers.managed, plugins=[quick.plugin])
        assert seen == [("starting", None), ("ready", quick.of("enter")[0][2])]

    def test_a_kill_reaches_it(self, quick, starts):
        """And the next one is started."""
        starts[1].append(asyncio.Event())

        def kill_it():
            [child] = quick.sup.children
            quick.sup.spawn(quick.sup.kill_child(child, "killed by the test", stacks=True))

        left = script(
            quick,
            (lambda: quick.count("enter") == 1, lambda: os.kill(quick.of("enter")[0][2], signal.SIGKILL)),
            (lambda: quick.count("enter") == 2, kill_it),
            (lambda: quick.count("enter") == 3, lambda: kill(signal.SIGTERM)),
        )
        report = quick.start(workers.managed, restart="on-failure", report=True, plugins=[quick.plugin])
        assert left == []
        assert [w.signal or w.code for w in report.workers] == [signal.SIGKILL, 0]
        assert quick.count("leave") == 1

    @pytest.mark.parametrize("again", [False, True])
    def test_a_stop_at_once_does_not_wait_for_it(self, quick, starts, again):
        starts[1].append(asyncio.Event())
        left = script(
            quick,
            (lambda: quick.count("enter") == 1, lambda: kill(signal.SIGHUP)),
            (lambda: quick.count("enter") == 2, lambda: kill(signal.SIGTERM)),
        )
        if again:
            quick.on_event("stopping", lambda: kill(signal.SIGINT))
        budgets = {"drain_timeout": 3600} if again else {"drain_timeout": 0, "cancel_timeout": 0}
        report = quick.start(workers.managed, restart="on-failure", report=True, plugins=[quick.plugin], **budgets)
        assert left == []
        assert [w.generation for w in report.workers] == [1]

    def test_verbs_wait_for_the_first_children(self, quick, starts):
        """A rolling restart replaces those; one that is not wanted any more is not started."""
        up = asyncio.Event()
        starts[0].append(up)

        def ask():
            kill(signal.SIGHUP)
            kill(signal.SIGTTOU)
            quick.sup.loop.call_later(0.05, up.set)

        left = script(
            quick,
            (lambda: quick.count("enter") == 1, ask),
            (lambda: quick.count("leave") == 1, lambda: kill(signal.SIGTERM)),
        )
        quick.on_event("ready", lambda: quick.events.append("all ready"))
        report = quick.start(workers.managed, num_workers=2, restart="on-failure", report=True, plugins=[quick.plugin])
        assert left == []
        assert [(w.index, w.generation, w.reason) for w in report.workers] == [(0, 1, "reloaded"), (0, 2, "stopped")]
        assert "all ready" in quick.events

    @pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU"])
    @pytest.mark.parametrize("method", ["spawn", "nursery"])
    def test_a_signal_to_the_whole_group_does_not_harm_it(self, name, method):
        if method == "nursery" and not nursery_usable():
            pytest.skip("forking is not safe here")
        play = Play("spawn", "default")
        with play.wire:
            play.stop_after("enter", 1)
            report = play.start(
                workers.SignalledOnArrival(getattr(signal, name)),
                mp_context=None if method == "nursery" else play.ctx,
                boot_failure_limit=1,
                report=True,
            )
        assert [(w.code, w.reason) for w in report.workers] == [(0, "stopped")]
