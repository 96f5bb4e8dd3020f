"""The fork server of a managed server's own: as fresh as spawn, and sooner there."""

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import spawn

import pytest
import server_workers as workers
from process_helpers import PATIENCE, nothing_left_fixture, wait_process_gone  # noqa: F401
from server_play import RUNNERS, Play, kill, script

from aiotools.server import ServerOptions, start_server
from aiotools.server.nurseries import nursery_usable

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.timeout(300),
    pytest.mark.skipif(not nursery_usable(), reason="forking is not safe here"),
]


class NurseryPlay(Play):
    def start(self, worker, *given, **kwargs):
        kwargs = {"restart": "on-failure", "report": True, "plugins": [self.plugin], **kwargs}
        return super().start(worker, *given, mp_context=None, **kwargs)

    def nursery(self):
        [pid] = self.sup.nurseries.pids()
        return pid


@pytest.fixture(params=[name for name in ("default", "uvloop") if name in RUNNERS])
def play(request, nothing_left):
    play = NurseryPlay("spawn", request.param)
    with play.wire:
        yield play


class TestWhereProcessesComeFrom:
    def test_workers_and_extras_are_its_children(self, play):
        parents = []
        left = script(
            play,
            (lambda: play.count("where") == 3, lambda: parents.append(play.nursery()) or kill(signal.SIGTERM)),
        )
        report = play.start(workers.tells_where, num_workers=2, extra_procs=[workers.extra_where])
        assert left == []
        assert {m[1] for m in play.of("where")} == set(parents)
        assert parents[0] != os.getpid()
        assert [w.code for w in report.workers] == [0, 0, 0]

    def test_nothing_of_the_program_is_there_before_the_worker_imports_it(self, play):
        script(play, (lambda: play.count("where") == 1, lambda: kill(signal.SIGTERM)))
        play.start(workers.tells_where)
        [(_, _, pid, imported_by, mask)] = play.of("where")
        assert imported_by == pid
        assert mask == set()

    def test_a_start_method_that_was_asked_for_is_used(self, play):
        script(play, (lambda: play.count("where") == 1, lambda: kill(signal.SIGTERM)))
        Play.start(play, workers.tells_where, mp_context=multiprocessing.get_context("spawn"), restart="on-failure")
        assert play.of("where")[0][1] == os.getpid()

    def test_a_classic_server_has_none(self, play):
        script(play, (lambda: play.count("enter") == 1, lambda: kill(signal.SIGTERM)))
        Play.start(play, workers.managed, mp_context=None, plugins=[play.plugin])
        assert play.sup.nurseries is None

    def test_environment_and_umask_are_those_of_now(self, play, monkeypatch):
        def kill_it():
            os.kill(play.of("surroundings")[-1][0], signal.SIGKILL)

        def change():
            monkeypatch.setenv("AIOTOOLS_TEST_NURSERY", "changed")
            saved.append(os.umask(0o027))
            kill_it()

        def change_back():
            monkeypatch.delenv("AIOTOOLS_TEST_NURSERY")
            kill_it()

        saved = []
        left = script(
            play,
            (lambda: play.count("surroundings") == 1, change),
            (lambda: play.count("surroundings") == 2, change_back),
            (lambda: play.count("surroundings") == 3, lambda: kill(signal.SIGTERM)),
        )
        try:
            play.start(workers.tells_surroundings, "AIOTOOLS_TEST_NURSERY", min_uptime=0)
        finally:
            if saved:
                os.umask(saved[0])
        assert left == []
        assert [m[1:] for m in play.of("surroundings")] == [(None, saved[0]), ("changed", 0o027), (None, 0o027)]


class TestPreload:
    @pytest.fixture
    def library(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        path = tmp_path / "nursery_library.py"

        def write(version):
            path.write_text(f"import os\nversion = {version!r}\npid = os.getpid()\n")

        write("one")
        return write

    def test_a_library_is_imported_once_per_generation(self, play, library):
        nurseries = []

        def change():
            nurseries.append(play.nursery())
            library("twenty-two")
            kill(signal.SIGHUP)

        left = script(
            play,
            (lambda: play.count("library") == 2, change),
            (lambda: play.count("library") == 4, lambda: None),
        )
        play.on_event("reloaded", lambda: kill(signal.SIGTERM))
        play.start(workers.tells_library, "nursery_library", num_workers=2, preload=["nursery_library"])
        assert left == []
        first, second = play.of("library")[:2], play.of("library")[2:]
        assert {m[:2] for m in first} == {("one", nurseries[0])}
        assert {m[0] for m in second} == {"twenty-two"}
        assert len({m[1] for m in second}) == 1
        assert second[0][1] not in (nurseries[0], *[m[2] for m in second])

    def test_without_it_each_worker_imports_its_own(self, play, library):
        script(play, (lambda: play.count("library") == 2, lambda: kill(signal.SIGTERM)))
        play.start(workers.tells_library, "nursery_library", num_workers=2)
        assert [m[1] == m[2] for m in play.of("library")] == [True, True]

    def test_what_cannot_be_imported_is_told_and_left_to_the_worker_that_needs_it(self, play, caplog, monkeypatch):
        # Something of its kind of worker's is that worker's affair alone.
        monkeypatch.setattr(workers.managed, "_aiotools_preload", ("nor_this_one",), raising=False)
        script(play, (lambda: play.count("enter") == 1, lambda: kill(signal.SIGTERM)))
        play.start(workers.managed, preload=["no_such_module_anywhere"])
        assert play.count("leave") == 1
        expected = (
            "cannot preload no_such_module_anywhere: ModuleNotFoundError: No module named 'no_such_module_anywhere'"
        )
        assert expected in caplog.text
        assert "nor_this_one" not in caplog.text

    @pytest.mark.parametrize("bad", ["name", [1]])
    def test_it_takes_names(self, bad):
        with pytest.raises(TypeError, match="preload"):
            ServerOptions(preload=bad)


class TestFaults:
    def test_it_is_killed_its_children_live_and_another_one_serves(self, play, caplog):
        killed = []

        def kill_it():
            killed.append(play.nursery())
            os.kill(killed[0], signal.SIGKILL)
            wait_process_gone(killed[0])
            os.kill(play.of("enter")[0][2], signal.SIGKILL)

        left = script(
            play,
            (lambda: play.count("enter") == 2, kill_it),
            (lambda: play.count("enter") == 3, lambda: kill(signal.SIGTERM)),
        )
        report = play.start(workers.managed, num_workers=2)
        assert left == []
        assert play.count("leave") == 2
        # Of those that it had, nobody knows the exit codes.
        assert [w.code for w in report.workers] == [255, 255, 0]
        assert "is gone; starting another" in caplog.text

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU"])
    def test_signals_to_the_whole_group_leave_it_alone(self, name):
        play = NurseryPlay("spawn", "default")

        def signal_it():
            before.append(play.nursery())
            os.kill(before[0], getattr(signal, name))
            os.kill(play.of("enter")[0][2], signal.SIGKILL)

        before = []
        with play.wire:
            left = script(
                play,
                (lambda: play.count("enter") == 1, signal_it),
                (lambda: play.count("enter") == 2, lambda: before.append(play.nursery()) or kill(signal.SIGTERM)),
            )
            report = play.start(workers.managed)
        assert left == []
        assert before[0] == before[1]
        assert [w.signal for w in report.workers] == [signal.SIGKILL, None]

    def test_where_it_cannot_start_processes_are_spawned(self, play, monkeypatch, caplog):
        # Processes that are spawned ask for the executable as well: only the first answer is a bad one.
        good = spawn.get_executable()
        answers = iter([b"/bin/false"])
        monkeypatch.setattr(spawn, "get_executable", lambda: next(answers, good))
        script(play, (lambda: play.count("where") == 1, lambda: kill(signal.SIGTERM)))
        play.start(workers.tells_where)
        assert play.of("where")[0][1] == os.getpid()
        assert "no fork server for generation 1" in caplog.text

    def test_an_unpicklable_worker_raises_here(self):
        with pytest.raises(Exception, match=r"pickle|local object"):
            start_server(lambda loop, index, args: None, restart="on-failure")

    def test_a_core_dump_or_its_absence_is_known(self, play):
        left = script(
            play,
            (lambda: play.count("enter") == 1, lambda: os.kill(play.of("enter")[0][2], signal.SIGKILL)),
            (lambda: play.count("enter") == 2, lambda: kill(signal.SIGTERM)),
        )
        report = play.start(workers.managed)
        assert left == []
        assert [w.core_dumped for w in report.workers] == [False, False]

    def test_it_does_not_outlive_a_killed_parent(self, tmp_path):
        program = tmp_path / "parent.py"
        program.write_text(PARENT)
        path = os.pathsep.join([os.path.dirname(__file__), *[p for p in sys.path if p]])
        with subprocess.Popen(
            [sys.executable, program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, text=True
        ) as parent:
            pids = [int(pid) for _ in range(2) for pid in parent.stdout.readline().split()]
            assert len(pids) == 4
            parent.kill()
            for pid in pids:
                wait_process_gone(pid)
            assert parent.stdout.read() == ""
            parent.wait(PATIENCE)


PARENT = """
import os
from aiotools.server import server_context, start_server

@server_context
async def worker(loop, index, args):
    # Not for the reader of a later line to be cut in two.
    os.write(1, f"{os.getpid()} {os.getppid()}\\n".encode())
    yield

if __name__ == "__main__":
    start_server(worker, num_workers=2, restart="on-failure")
"""
