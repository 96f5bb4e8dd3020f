"""The sd_notify protocol, against a socket of the test's."""

import os
import re
import signal
import socket
import threading
import time

import pytest
import server_board_workers as board_workers
import server_workers as workers
from process_helpers import PATIENCE, START_METHODS, nothing_left_fixture  # noqa: F401
from server_play import Play, kill, script

from aiotools.server import start_server
from aiotools.server.systemd import SystemdNotifier, notify, watchdog_interval

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(300)]

FAST = "fork" if "fork" in START_METHODS else "forkserver"


class Manager:
    """A service manager: reads all messages in a thread."""

    def __init__(self, address):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self._read = []
        self._flushes = 0
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.arrived = threading.Condition()

    def read(self):
        while (data := self.sock.recv(65536)) != b"END":
            with self.arrived:
                self._read.append(dict(line.split("=", 1) for line in data.decode().splitlines()))
                self.arrived.notify_all()

    def wait_for(self, predicate):
        with self.arrived:
            assert self.arrived.wait_for(lambda: any(map(predicate, self._read)), PATIENCE), self._read

    @property
    def messages(self):
        """All that was sent before this call."""
        self._flushes += 1
        mark = {"FLUSH": str(self._flushes)}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(f"FLUSH={self._flushes}".encode(), self.sock.getsockname())
        self.wait_for(lambda m: m == mark)
        with self.arrived:
            return [m for m in self._read if "FLUSH" not in m]

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"END", self.sock.getsockname())
        self.thread.join()
        self.sock.close()

    def all(self, key):
        return [m[key] for m in self.messages if key in m]


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    address = str(tmp_path / "notify")
    name = address
    if request.param == "abstract":
        address, name = f"\0aiotools-test-{os.getpid()}", f"@aiotools-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with Manager(address) as manager:
        yield manager


@pytest.fixture
def quick(manager):
    play = Play(FAST, "default")
    with play.wire:
        yield play


class TestServer:
    def test_ready_comes_when_all_workers_are_and_stopping_when_they_are_told(self, quick, manager):
        quick.on_event("ready", lambda: kill(signal.SIGTERM))
        quick.start(workers.managed, num_workers=2, restart="on-failure", plugins=[quick.plugin])
        kinds = [k for m in manager.messages for k in ("MAINPID", "READY", "STOPPING") if k in m]
        assert kinds == ["MAINPID", "READY", "STOPPING"]
        assert manager.all("MAINPID") == [str(os.getpid())]
        [ready] = [m for m in manager.messages if "READY" in m]
        assert ready["STATUS"] == "running: 2 of 2 workers ready, generation 1"
        assert manager.messages[0]["STATUS"].startswith("starting: 0 of 2 workers ready")
        [stopping] = [m for m in manager.messages if "STOPPING" in m]
        assert stopping["STATUS"] == "stopping: 2 of 2 workers ready, generation 1; stopped"

    def test_a_reload_says_when_it_began_and_ready_when_it_is_over(self, quick, manager):
        left = script(quick, (lambda: quick.count("leave") == 1, lambda: None))
        before = time.monotonic_ns() // 1000
        quick.on_event("ready", lambda: kill(signal.SIGHUP))
        quick.on_event("reloaded", lambda: kill(signal.SIGTERM))
        quick.start(workers.managed, restart="on-failure", plugins=[quick.plugin])
        assert left == []
        kinds = [k for m in manager.messages for k in ("READY", "RELOADING", "STOPPING") if k in m]
        assert kinds == ["READY", "RELOADING", "READY", "STOPPING"]
        [reloading] = [m for m in manager.messages if "RELOADING" in m]
        # systemd compares this with the time at which it sent the signal.
        assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        last = [m for m in manager.messages if "READY" in m][-1]
        assert last["STATUS"] == "running: 1 of 1 workers ready, generation 2"

    def test_an_abandoned_reload_ends_with_ready_and_says_why(self, quick, manager, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(tmp_path))
        module = tmp_path / "systemd_exchangeable.py"
        module.write_text(
            "from aiotools.server import server_context\n@server_context\nasync def worker(loop, index, args):\n    yield\n"
        )

        def spoil():
            module.write_text("raise RuntimeError('spoiled\\nin two lines')\n")
            kill(signal.SIGHUP)

        quick.on_event("ready", spoil)
        quick.on_event("abandoned", lambda: kill(signal.SIGTERM))
        start_server(
            "systemd_exchangeable:worker", quick.main(wire=False), restart="on-failure", plugins=[quick.plugin]
        )
        kinds = [k for m in manager.messages for k in ("READY", "RELOADING", "STOPPING") if k in m]
        assert kinds == ["READY", "RELOADING", "READY", "STOPPING"]
        last = [m for m in manager.messages if "READY" in m][-1]
        assert re.search("generation 2 was abandoned: .*spoiled in two lines", last["STATUS"])

    def test_the_watchdog_is_fed_in_time(self, quick, manager, monkeypatch):
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))

        def when_fed():
            if len(manager.all("WATCHDOG")) >= 3:
                kill(signal.SIGTERM)
            else:
                quick.sup.loop.call_later(0.01, when_fed)

        quick.on_event("ready", when_fed)
        quick.start(workers.managed, restart="on-failure", plugins=[quick.plugin])
        assert set(manager.all("WATCHDOG")) == {"1"}

    def test_the_watchdog_is_not_fed_while_no_worker_turns(self, quick, manager, monkeypatch):
        monkeypatch.setenv("WATCHDOG_USEC", "1000000")
        found = []

        def when_late():
            [notifier] = [p for p in quick.sup.plugins if isinstance(p, SystemdNotifier)]
            if notifier.alive():
                quick.sup.loop.call_later(0.01, when_late)
                return
            # It is not asked again before this many messages: whether it says anything more shows now.
            fed = len(manager.all("WATCHDOG"))
            quick.sup.loop.call_later(1, after, fed)

        def after(fed):
            found.append(len(manager.all("WATCHDOG")) - fed)
            kill(signal.SIGTERM)
            quick.sup.loop.call_later(0.1, kill, signal.SIGTERM)

        quick.on_event("ready", when_late)
        reader, writer = quick.ctx.Pipe(duplex=False)
        with reader, writer:
            quick.start(
                board_workers.stops_turning, "system call", reader, restart="on-failure", plugins=[quick.plugin]
            )
        assert found == [0]

    def test_a_classic_server_says_nothing(self, quick, manager):
        quick.stop_after("enter", 1)
        quick.start(workers.reporting)
        assert manager.messages == []

    def test_a_manager_that_is_gone_changes_nothing(self, quick, manager, monkeypatch):
        monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
        quick.stop_after("enter", 1)
        quick.start(workers.managed, restart="on-failure")


class TestNotify:
    def test_all_lines_are_one_message(self, manager):
        assert notify("READY=1", "STATUS=all is well")
        manager.wait_for(lambda m: m == {"READY": "1", "STATUS": "all is well"})

    @pytest.mark.parametrize("line", ["READY", "STATUS=two\nlines"])
    def test_a_line_that_is_none_is_refused(self, line):
        with pytest.raises(ValueError, match="assignment"):
            notify(line)

    @pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "relative"])
    def test_without_a_manager_nothing_is_sent(self, address):
        assert not notify("READY=1", environ={} if address is None else {"NOTIFY_SOCKET": address})

    def test_a_full_queue_is_waited_for_only_if_asked(self, tmp_path, monkeypatch):
        monkeypatch.setattr("aiotools.server.systemd.PATIENCE", 0.01)
        address = str(tmp_path / "full")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(address)
            environ = {"NOTIFY_SOCKET": address}
            while notify("STATUS=x", environ=environ, wait=False):
                pass
            assert not notify("STATUS=x", environ=environ)

    def test_the_watchdog_interval(self):
        assert watchdog_interval({}) is None
        assert watchdog_interval({"WATCHDOG_USEC": "3000000"}) == 3.0
        assert watchdog_interval({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}) == 3.0
        assert watchdog_interval({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}) is None
        for bad in ("", "0", "-1", "soon"):
            assert watchdog_interval({"WATCHDOG_USEC": bad}) is None
