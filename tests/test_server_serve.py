"""The command ``aiotools serve``, from outside: what a user sees, what remains, the exit status."""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time

import pytest
from process_helpers import PATIENCE, wait_process_gone

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.timeout(300)

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


class Service:
    """A running ``aiotools serve``; its log is read as it comes."""

    def __init__(self, *arguments, env=None, cwd=None, stdout=subprocess.DEVNULL):
        path = os.pathsep.join([HERE, ROOT, *[p for p in sys.path if p]])
        self.lines = []
        self.proc = subprocess.Popen(
            [sys.executable, "-m", "aiotools", "serve", *arguments],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        self._rest = b""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.proc.poll() is None:
            self.proc.kill()
        self.proc.stderr.close()
        self.proc.wait()

    def _read(self, timeout):
        ready, _, _ = select.select([self.proc.stderr], [], [], timeout)
        assert ready, "no news:\n" + "\n".join(self.lines)
        data = os.read(self.proc.stderr.fileno(), 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.lines += [line.decode() for line in lines]
        return bool(data)

    def wait_line(self, pattern, count=1):
        """The match of the count-th line that matches, read from the beginning of the log."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = [m for line in self.lines if (m := re.search(pattern, line))]
            if len(found) >= count:
                return found[count - 1]
            assert self._read(max(0, deadline - time.monotonic())), "ended:\n" + "\n".join(self.lines)

    def wait_exit(self):
        """(status, log) once nobody holds the log any more."""
        deadline = time.monotonic() + PATIENCE
        while self._read(max(0, deadline - time.monotonic())):
            pass
        return self.proc.wait(PATIENCE), "\n".join(self.lines)

    @property
    def port(self):
        return int(self.wait_line(r"ready: \d+ workers.* tcp://127\.0\.0\.1:(\d+)")[1])

    def signal(self, signum):
        self.proc.send_signal(signum)


def http(port, path="/", timeout=PATIENCE):
    """(status, body) of one request on a connection of its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def control(path, verb, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "aiotools", "control", str(path), verb],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
        timeout=PATIENCE,
        **kwargs,
    )


def assert_port_free(port):
    with socket.create_server(("127.0.0.1", port)):
        pass


APP = ("asgi:server_apps:app", "--bind", "tcp://127.0.0.1:0")
LOOPS = ["asyncio"] + (["uvloop"] if importlib.util.find_spec("uvloop") else [])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_the_signal_and_leaves_nothing(tmp_path, loop, signum):
    control_path, pidfile = tmp_path / "control", tmp_path / "pid"
    arguments = ["-w", "2", "--loop", loop, "--control", str(control_path), "--pidfile", str(pidfile)]
    with Service(*APP, *arguments) as service:
        port = service.port
        status, pid = http(port)
        assert status == 200 and int(pid) != service.proc.pid
        assert pidfile.read_text() == f"{service.proc.pid}\n"
        service.signal(signum)
        assert service.wait_exit()[0] == 0
        assert not control_path.exists() and not pidfile.exists()
        assert_port_free(port)


def test_any_server_context_can_be_served():
    with Service("server_apps:echo", "--bind", "tcp://127.0.0.1:0") as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
            sock.sendall(b"hello\n")
            assert sock.makefile("rb").readline().endswith(b" hello\n")
        service.signal(signal.SIGTERM)
        assert service.wait_exit()[0] == 0


@pytest.mark.parametrize("kind", ["thread"] + (["interpreter"] if sys.version_info >= (3, 14) else []))
def test_other_kinds_of_worker_serve_the_same(kind):
    target = APP if kind == "thread" else ("server_apps:echo", *APP[1:])
    with Service(*target, "-w", "2", "--kind", kind) as service:
        if kind == "thread":
            assert http(service.port) == (200, str(service.proc.pid))
        else:
            with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as sock:
                sock.sendall(b"hello\n")
                assert sock.makefile("rb").readline() == b"%d hello\n" % service.proc.pid
        service.signal(signal.SIGTERM)
        assert service.wait_exit()[0] == 0


class Load:
    """Fresh and keep-alive connections as fast as they are answered; counts what fails."""

    def __init__(self, port):
        self.port = port
        self.failed = []
        self.answered = 0
        self.pids = set()
        self.stop = False

    async def request(self, reader, writer, close):
        more = b"Connection: close\r\n" if close else b""
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(re.search(rb"content-length: (\d+)", head)[1])
        self.pids.add(int(await reader.readexactly(length)))
        self.answered += 1
        return b"connection: close" in head

    async def client(self, fresh):
        reader = writer = None
        while not self.stop:
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                if await self.request(reader, writer, fresh):
                    writer.close()
                    writer = None
            except (OSError, asyncio.IncompleteReadError) as exc:
                self.failed.append(repr(exc))
                writer = None
        if writer is not None:
            writer.close()

    async def until(self, condition):
        clients = [asyncio.create_task(self.client(fresh)) for fresh in (True, True, False, False)]
        try:
            await condition
        finally:
            self.stop = True
            await asyncio.wait(clients)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["process", "thread"])
def test_rolling_restarts_under_load_fail_no_request(loop, kind):
    with Service(*APP, "-w", "2", "--loop", loop, "--kind", kind) as service:
        load = Load(service.port)

        async def restarts():
            for n in range(1, 4):
                service.signal(signal.SIGHUP)
                await asyncio.to_thread(service.wait_line, f"rolling restart: generation {n + 1} serves")

        asyncio.run(load.until(restarts()))
        assert load.failed == []
        assert load.answered > 0
        assert len(load.pids) >= (3 if kind == "process" else 1)
        service.signal(signal.SIGTERM)
        assert service.wait_exit()[0] == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stop_loses_and_resets_no_request(loop):
    with Service(*APP, "-w", "2", "--loop", loop) as service:
        port = service.port
        outcomes = []

        async def one(path):
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
                outcomes.append((await reader.readuntil(b"\r\n\r\n")).split()[1])
                writer.close()
            except ConnectionRefusedError:
                outcomes.append("refused")
            except (OSError, asyncio.IncompleteReadError) as exc:
                outcomes.append(repr(exc))

        async def main():
            tasks = [asyncio.create_task(one(b"/slow")) for _ in range(64)]
            # All are connected once a request on a later connection has been answered.
            await asyncio.gather(*[one(b"/") for _ in range(8)])
            service.signal(signal.SIGTERM)
            for _ in range(100):
                tasks.append(asyncio.create_task(one(b"/")))
                await asyncio.sleep(0.001)
            await asyncio.wait(tasks)

        asyncio.run(main())
        assert service.wait_exit()[0] == 0
        assert set(outcomes) <= {b"200", "refused"}
        assert outcomes.count(b"200") >= 64


@pytest.mark.parametrize("loop", LOOPS)
def test_a_killed_worker_is_named_and_replaced(loop):
    with Service(*APP, "-w", "2", "--loop", loop) as service:
        port = service.port
        victim = int(http(port)[1])
        os.kill(victim, signal.SIGKILL)
        service.wait_line(rf"\[{victim}\] was terminated by SIGKILL")
        service.wait_line(r"Application startup complete", 3)
        assert all(int(http(port)[1]) != victim for _ in range(4))
        service.signal(signal.SIGTERM)
        assert service.wait_exit()[0] == 0


@pytest.mark.parametrize("path, where", [("/hang", "in hang_in_python"), ("/hold", "in hang_with_the_gil")])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_hanging_worker_is_found_shown_and_replaced(loop, path, where):
    with Service(*APP, "-w", "2", "--loop", loop, "--hang-timeout", "2") as service:
        port = service.port
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
            service.wait_line("hangs: its loop has not turned")
            service.wait_line(where)
            service.wait_line(r"was terminated by SIGKILL.*hung")
        service.wait_line(r"Application startup complete", 3)
        assert http(port)[0] == 200
        service.signal(signal.SIGTERM)
        assert service.wait_exit()[0] == 0


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("hanging", [False, True])
def test_a_killed_parent_leaves_no_orphan_and_a_free_port(tmp_path, loop, hanging):
    with Service(*APP, "-w", "2", "--loop", loop) as service:
        port = service.port
        pids = {int(http(port)[1]) for _ in range(10)}
        with contextlib.ExitStack() as stack:
            if hanging:
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                sock.sendall(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n")
            service.signal(signal.SIGKILL)
            for pid in pids:
                wait_process_gone(pid)
        service.wait_exit()
        assert_port_free(port)


class TestFailures:
    def test_a_boot_loop_gives_up_with_the_reason_in_the_last_line(self):
        with Service("server_apps:broken", "--boot-failure-limit", "3") as service:
            status, text = service.wait_exit()
        assert status == 3
        last = text.splitlines()[-1]
        assert "failed 3 times in a row" in last and "cannot start like this" in last

    def test_a_module_that_is_not_there_gives_up_with_the_reason(self):
        with Service("no_such_module:worker", "--boot-failure-limit", "1") as service:
            status, text = service.wait_exit()
        assert status == 3
        assert "No module named 'no_such_module'" in text.splitlines()[-1]

    def test_a_failing_lifespan_gives_up(self):
        arguments = ["--bind", "tcp://127.0.0.1:0", "--boot-failure-limit", "1"]
        with Service("asgi:server_apps:broken_lifespan", *arguments) as service:
            status, text = service.wait_exit()
        assert status == 3
        assert "the database is away" in text
        assert "lifespan startup failed" in text.splitlines()[-1]

    def test_an_application_that_cannot_be_called_gives_up(self):
        arguments = ["--bind", "tcp://127.0.0.1:0", "--boot-failure-limit", "1"]
        with Service("asgi:server_apps:HERE", *arguments) as service:
            status, text = service.wait_exit()
        assert status == 3
        assert "an ASGI application must be callable, not" in text.splitlines()[-1]

    def test_a_port_in_use_is_status_1(self):
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
            with Service("server_apps:echo", "--bind", address) as service:
                status, text = service.wait_exit()
        assert status == 1
        assert f"cannot bind {address}" in text.splitlines()[-1]

    @pytest.mark.parametrize("arguments", [["nonsense"], ["a:b", "--bind", "http://x"], ["a:b", "-w", "-1"], []])
    def test_a_bad_command_line_is_status_2(self, arguments):
        with Service(*arguments) as service:
            status, text = service.wait_exit()
        assert status == 2
        assert text.splitlines()[-1].startswith("aiotools serve: ")

    def test_broken_code_at_reload_leaves_the_old_workers_and_shows_in_the_status(self, tmp_path):
        module = tmp_path / "changing.py"
        module.write_text("from server_apps import app\n")
        path = tmp_path / "control"
        env = {"PYTHONDONTWRITEBYTECODE": "1"}
        arguments = ["--bind", "tcp://127.0.0.1:0", "--app-dir", str(tmp_path), "--control", str(path)]
        with Service("asgi:changing:app", *arguments, env=env) as service:
            port = service.port
            before = http(port)[1]
            module.write_text("this is no Python\n")
            result = control(path, "restart")
            assert result.returncode == 1
            assert "SyntaxError" in result.stderr
            assert http(port)[1] == before
            status = json.loads(control(path, "status").stdout)
            assert "generation 2 was abandoned" in status["abandoned"]
            assert status["generation"] == 1
            module.write_text("from server_apps import app\n")
            assert json.loads(control(path, "restart").stdout) == {"generation": 3}
            assert http(port)[1] != before
            assert json.loads(control(path, "status").stdout)["abandoned"] is None
            assert control(path, "stop").returncode == 0
            assert service.wait_exit()[0] == 0

    def test_a_worker_whose_output_is_closed_ends_with_a_status(self):
        reader, writer = os.pipe()
        os.close(reader)
        with Service("server_apps:prints", stdout=writer) as service:
            os.close(writer)
            service.wait_line("ready: 1 workers")
            service.signal(signal.SIGTERM)
            status, text = service.wait_exit()
        assert status == 0
        assert "BrokenPipeError" in text

    @pytest.mark.parametrize("loop", LOOPS)
    @pytest.mark.parametrize("kind", ["process", "thread"])
    def test_a_worker_out_of_descriptors_still_obeys(self, kind, loop):
        """A thread takes all that the server has."""
        arguments = ["--kind", kind, "--loop", loop, "--hang-timeout", "60"]
        with Service("server_apps:leaks_descriptors", *arguments) as service:
            service.wait_line("Too many open files")
            service.wait_line("ready: 1 workers")
            service.signal(signal.SIGTERM)
            assert service.wait_exit()[0] == 0

    @pytest.mark.parametrize("kind", ["process", "thread"])
    def test_a_worker_out_of_memory_gives_up_with_the_reason(self, kind):
        with Service("server_apps:wants_too_much_memory", "--kind", kind, "--boot-failure-limit", "2") as service:
            status, text = service.wait_exit()
        assert status == 3
        assert (
            "failed 2 times in a row; the last time: error during initialization: MemoryError" in text.splitlines()[-1]
        )

    def test_without_workers_it_says_that_it_is_ready(self):
        with Service("server_apps:echo", "-w", "0") as service:
            service.wait_line("ready: 0 workers")
            service.signal(signal.SIGTERM)
            assert service.wait_exit()[0] == 0

    def test_control_without_a_server_is_status_1(self, tmp_path):
        result = control(tmp_path / "nothing", "status")
        assert result.returncode == 1
        assert "No such file" in result.stderr
