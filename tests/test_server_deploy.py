"""examples/deploy/, as far as it runs here: nginx in front of two servers, the life that systemd and Kubernetes give a service."""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from process_helpers import PATIENCE
from test_server_serve import HERE, ROOT, Service, control
from test_server_systemd import Manager

from aiotools.cli import serve

DEPLOY = pathlib.Path(__file__).parent.parent / "examples" / "deploy"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not DEPLOY.exists(), reason="runs where the examples are"),
]


def loopback():
    """An address of this machine that is this process's alone, so that its ports stay free while nobody listens."""
    pid = os.getpid()
    return f"127.{64 + (pid >> 16) % 64}.{(pid >> 8) % 256}.{pid % 256}"


def parser():
    top = argparse.ArgumentParser()
    serve.add_parsers(top.add_subparsers(required=True))
    return top


class Nginx:
    """nginx with a configuration of its own, in the foreground."""

    def __init__(self, configuration, folder, address):
        self.log = folder / "error.log"
        path = folder / "nginx.conf"
        path.write_text(configuration)
        # Everything that it writes is in the folder, which is its owner's alone: as root its workers stay root.
        settings = f"daemon off; pid {folder}/nginx.pid; error_log {self.log} warn;"
        if os.geteuid() == 0:
            settings += " user root;"
        self.proc = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(path), "-e", str(self.log), "-g", settings])
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(address, timeout=PATIENCE).close()
                break
            assert self.proc.poll() is None and time.monotonic() < deadline, self.log.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.proc.terminate()
        try:
            assert self.proc.wait(PATIENCE) == 0
        finally:
            self.proc.kill()
            self.proc.wait()


class Clients:
    """Each sends requests without a pause, keeps its connection, and notes who answered; whatever is no 200 is a failure."""

    def __init__(self, address, count=8):
        self.address = address
        self.count = count
        self.answers = 0
        self.failures = []
        self.pids = collections.Counter()
        self._arrived = asyncio.Condition()

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._client(i % 4 == 0)) for i in range(self.count)]
        return self

    async def __aexit__(self, *exc):
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        assert all(task.cancelled() for task in self._tasks), self._tasks

    async def _client(self, slow):
        request = b"GET %s HTTP/1.1\r\nHost: service\r\n\r\n" % (b"/slow" if slow else b"/")
        reader = writer = None
        try:
            while True:
                if writer is None:
                    reader, writer = await asyncio.open_connection(*self.address)
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
                if b" 200 " not in head.partition(b"\r\n")[0]:
                    self.failures.append((head, body))
                else:
                    self.pids[int(body)] += 1
                self.answers += 1
                async with self._arrived:
                    self._arrived.notify_all()
                # nginx itself hangs up after a thousand requests, and says so.
                if b"connection: close" in head:
                    writer.close()
                    writer = None
        finally:
            if writer is not None:
                writer.close()

    async def answered_by(self, pids, count):
        """Wait for so many answers of these processes."""
        async with self._arrived, asyncio.timeout(PATIENCE):
            await self._arrived.wait_for(lambda: self.failures or sum(self.pids[pid] for pid in pids) >= count)

    async def more(self, count):
        wanted = self.answers + count
        async with self._arrived, asyncio.timeout(PATIENCE):
            await self._arrived.wait_for(lambda: self.failures or self.answers >= wanted)


def workers_of(path):
    return {worker["pid"] for worker in json.loads(control(path, "status").stdout)["workers"]}


def read_unit(name):
    """The settings of a unit file, all values of each key."""
    found = {}
    for line in (DEPLOY / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="takes any address of 127.0.0.0/8")
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed (on Debian: apt-get install nginx)")
def test_two_servers_behind_nginx_are_rolled_one_after_the_other_without_a_failed_request(tmp_path):
    front, hosts = (loopback(), 8000), [(loopback(), 8001), (loopback(), 8002)]
    configuration = (DEPLOY / "nginx.conf").read_text()
    for number, (host, port) in enumerate(hosts, 1):
        example = f"host{number}.example:8080"
        assert example in configuration
        configuration = configuration.replace(example, f"{host}:{port}")
    assert "listen 80;" in configuration
    configuration = configuration.replace("listen 80;", f"listen {front[0]}:{front[1]};")

    def start(stack, number):
        (host, port), path = hosts[number], tmp_path / f"control{number}"
        service = Service("server_apps:patient", "-w", "2", "--bind", f"tcp://{host}:{port}", "--control", str(path))
        stack.enter_context(service)
        service.wait_line("ready: 2 workers")
        return service, workers_of(path)

    async def main(stack, services):
        async with Clients(front) as clients:
            for number in range(len(hosts)):
                # The other one is back in nginx's eyes.  A few answers do not tell: a connection that was begun while it was
                # away can reach it at the second try, and nginx goes on leaving it out.
                service, pids = services[number - 1]
                await clients.answered_by(pids, 100)
                service, pids = services[number]
                service.signal(signal.SIGTERM)
                status, log = await asyncio.to_thread(service.wait_exit)
                assert status == 0, log
                await clients.more(200)
                assert clients.failures == []
                services[number] = await asyncio.to_thread(start, stack, number)
            await clients.answered_by(services[-1][1], 100)
        assert clients.failures == []

    with contextlib.ExitStack() as stack:
        services = [start(stack, number) for number in range(len(hosts))]
        stack.enter_context(Nginx(configuration, tmp_path, front))
        asyncio.run(main(stack, services))


# What systemd does for a service between fork and exec: the sockets become descriptors 3 and up, LISTEN_PID names who gets them.
ACTIVATE = """
import os, sys
end = sys.argv.index("--")
high = [os.dup2(int(fd), 100 + i) for i, fd in enumerate(sys.argv[1:end])]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[end + 1], sys.argv[end + 1:])
"""


class TestSystemd:
    """The units, with the test in the place of systemd."""

    def test_the_service_lives_as_its_unit_says(self, tmp_path):
        unit, activation = read_unit("service.service"), read_unit("service.socket")
        [command] = unit["ExecStart"]
        program, *arguments = shlex.split(command)
        assert program.endswith("/bin/aiotools")
        assert arguments[:2] == ["serve", "package.module:worker"]
        arguments[1] = "server_apps:echo"
        assert arguments[arguments.index("--bind") + 1] == "systemd"
        assert unit["Type"] == ["notify-reload"]

        sockets = []
        with contextlib.ExitStack() as stack:
            for address in activation["ListenStream"]:
                if address.startswith("/"):
                    sock = socket.socket(socket.AF_UNIX)
                    sock.bind(str(tmp_path / "service.sock"))
                else:
                    sock = socket.socket()
                    sock.bind(("127.0.0.1", 0))
                sock.listen(int(activation["Backlog"][0]))
                sockets.append(stack.enter_context(sock))
            manager = stack.enter_context(Manager(str(tmp_path / "notify")))
            environ = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([HERE, ROOT, *[p for p in sys.path if p]]),
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "LISTEN_FDS": str(len(sockets)),
                "WATCHDOG_USEC": f"{int(unit['WatchdogSec'][0]) * 1_000_000}",
            }
            fds = [sock.fileno() for sock in sockets]
            with open(tmp_path / "log", "w+b") as log:
                serve_it = [sys.executable, "-m", "aiotools", *arguments]
                proc = subprocess.Popen(
                    [sys.executable, "-c", ACTIVATE, *map(str, fds), "--", *serve_it],
                    env=environ,
                    pass_fds=fds,
                    stderr=log,
                )
                try:
                    manager.wait_for(lambda m: "READY" in m)
                    assert manager.messages[0]["MAINPID"] == str(proc.pid)
                    for sock in sockets:
                        with socket.socket(sock.family) as client:
                            client.settimeout(PATIENCE)
                            client.connect(sock.getsockname())
                            client.sendall(b"hello\n")
                            assert client.makefile("rb").readline().endswith(b" hello\n")
                    # systemctl reload: SIGHUP, then RELOADING with a time not before it, then READY.
                    before, seen = time.monotonic_ns() // 1000, len(manager.messages)
                    proc.send_signal(signal.SIGHUP)
                    manager.wait_for(lambda m: "READY" in m and m in manager.messages[seen:])
                    [reloading] = [m for m in manager.messages if "RELOADING" in m]
                    assert int(reloading["MONOTONIC_USEC"]) >= before
                    # systemctl stop, KillMode=mixed: SIGTERM to the main process.
                    proc.terminate()
                    manager.wait_for(lambda m: "STOPPING" in m)
                    assert proc.wait(PATIENCE) == 0
                finally:
                    proc.kill()
                    proc.wait()
                    log.seek(0)
                    print(log.read().decode())
            assert set(manager.all("WATCHDOG")) == {"1"}

    def test_its_time_limits_fit_into_those_of_systemd(self):
        unit = read_unit("service.service")
        [command] = unit["ExecStart"]
        arguments = parser().parse_args(shlex.split(command)[1:])
        assert arguments.drain_timeout + arguments.cancel_timeout < int(unit["TimeoutStopSec"][0])
        assert arguments.start_timeout < int(unit["TimeoutStartSec"][0])
        assert arguments.hang_timeout < int(unit["WatchdogSec"][0])


class TestKubernetes:
    """The manifest; read with regular expressions, for nothing that the suite needs reads YAML."""

    text = (DEPLOY / "kubernetes.yaml").read_text() if DEPLOY.exists() else ""

    def commands(self):
        """Key -> the flow sequence of a command, as a list of strings."""
        found = {}
        pattern = (
            r"(?:(startupProbe|readinessProbe|livenessProbe|preStop):\s+(?:exec: \{|\{exec: \{))?command: \[([^]]*)\]"
        )
        for key, items in re.findall(pattern, self.text):
            found[key or "command"] = [item.strip().strip('"') for item in items.split(",")]
        return found

    def test_its_commands_are_understood_and_fit_into_the_grace_period(self):
        commands = self.commands()
        assert set(commands) == {"command", "preStop", "startupProbe", "readinessProbe", "livenessProbe"}
        assert commands["command"][0] == "aiotools"
        arguments = parser().parse_args(commands["command"][1:])
        for probe, verb in [("startupProbe", "ready"), ("readinessProbe", "ready"), ("livenessProbe", "live")]:
            assert commands[probe][0] == "aiotools"
            asked = parser().parse_args(commands[probe][1:])
            assert (asked.socket, asked.verb) == (arguments.control, verb)
        grace = int(re.search(r"terminationGracePeriodSeconds: (\d+)", self.text)[1])
        program, pause = commands["preStop"]
        assert program == "sleep"
        assert int(pause) + arguments.drain_timeout + arguments.cancel_timeout < grace
        assert arguments.bind == [f"tcp://0.0.0.0:{re.search(r'containerPort: ([0-9]+)', self.text)[1]}"]

    def test_a_service_is_live_from_its_start_to_its_end_and_ready_while_it_serves(self, tmp_path):
        """The worker starts, and drains, for as long as a file is there."""
        path = tmp_path / "control"
        starting, draining = tmp_path / "starting", tmp_path / "draining"
        starting.touch()
        draining.touch()
        env = {"DEPLOY_STARTING": str(starting), "DEPLOY_DRAINING": str(draining)}
        with Service("server_apps:waits_for_files", "--control", str(path), env=env) as service:
            service.wait_line("worker 0: starting")
            result = control(path, "ready")
            assert result.returncode == 1
            assert "ready: starting, 0 of 1 workers are ready" in result.stderr
            assert control(path, "live").returncode == 0
            starting.unlink()
            service.wait_line("ready: 1 worker")
            result = control(path, "ready")
            assert result.returncode == 0
            assert json.loads(result.stdout) == {"state": "running", "ready": 1, "workers": 1}
            service.signal(signal.SIGTERM)
            service.wait_line("worker 0: draining")
            result = control(path, "ready")
            assert result.returncode == 1 and "stopping" in result.stderr
            assert control(path, "live").returncode == 0
            draining.unlink()
            assert service.wait_exit()[0] == 0
            assert control(path, "live").returncode == 1
