"""``make load``: what clients see while a server is restarted, killed, hung and stopped.

Each row is done with ours and with each peer that is installed (uvicorn, gunicorn with its asgi worker
and with uvicorn-worker, granian, hypercorn), with two workers and the application of app.py, under a
load of fresh and keep-alive connections from a client in this process.  Everything is on 127.0.0.1, in
bounded time.

    python -m benchmarks.server [--servers aiotools,uvicorn] [--rows restarts,kill] [--rate 3000] [--rounds 1]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PATIENCE = 40.0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def command(name, port, workers=2):
    python = [sys.executable, "-m"]
    bind = f"127.0.0.1:{port}"
    quiet = {
        "aiotools": ["aiotools", "serve", "asgi:app:app", "-w", str(workers), "--bind", f"tcp://{bind}",
                     "--hang-timeout", "2", "--loop", "uvloop"],
        "uvicorn": ["uvicorn", "app:app", "--workers", str(workers), "--port", str(port), "--no-access-log",
                    "--loop", "uvloop"],
        "gunicorn-asgi": ["gunicorn", "app:app", "-k", "asgi", "-w", str(workers), "-b", bind],
        "gunicorn-uvicorn": ["gunicorn", "app:app", "-k", "uvicorn_worker.UvicornWorker", "-w", str(workers),
                             "-b", bind],
        "granian": ["granian", "--interface", "asgi", "--workers", str(workers), "--port", str(port), "app:app"],
        "hypercorn": ["hypercorn", "app:app", "-w", str(workers), "-b", bind],
    }  # fmt: skip
    return python + quiet[name]


MODULES = {
    "aiotools": "aiotools",
    "uvicorn": "uvicorn",
    "gunicorn-asgi": "gunicorn",
    "gunicorn-uvicorn": "uvicorn_worker",
    "granian": "granian",
    "hypercorn": "hypercorn",
}


def installed():
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is not None]


class Server:
    """One server of some kind, in a session of its own, with its log in a file."""

    def __init__(self, name, *, workers=2, broken=None):
        self.name = name
        self.port = free_port()
        self.log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, ROOT])}
        if broken:
            env["LOAD_BROKEN"] = broken
        self.proc = subprocess.Popen(
            command(name, self.port, workers),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=HERE,
            start_new_session=True,
        )
        self.seen = set()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        # The session is ours alone: whatever is left in it ends with the row.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.proc.pid, signal.SIGKILL)
        self.proc.wait()
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.log.close()

    def members(self):
        """Process ids of the session, zombies excluded."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as f:
                    fields = f.read().rpartition(")")[2].split()
                    if int(fields[3]) == self.proc.pid and fields[0] != "Z":
                        found.append(int(entry))
        return found

    def text(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    async def wait_up(self):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                self.seen.add(await get(self.port))
                return True
            if self.proc.poll() is not None:
                return False
            await asyncio.sleep(0.02)
        return False

    async def wait_new(self, old, count=2):
        """Wait until only workers that are not in *old* answer; seconds, or None."""
        start = time.monotonic()
        streak = 0
        while time.monotonic() - start < PATIENCE:
            try:
                pid = await get(self.port)
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.005)
                continue
            streak = 0 if pid in old else streak + 1
            if streak >= 10 * count:
                return time.monotonic() - start
            await asyncio.sleep(0.005)
        return None

    async def workers(self):
        """The pids that answer now; both, if both do within a while."""
        found = set()
        end = time.monotonic() + 3
        while len(found) < 2 and time.monotonic() < end:
            answers = await asyncio.gather(*[get(self.port) for _ in range(16)], return_exceptions=True)
            found.update(a for a in answers if isinstance(a, int))
        return found


async def get(port, path=b"/", timeout=5.0):
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path)
            return int(await read_answer(reader))
        finally:
            writer.close()


async def read_answer(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = re.search(rb"content-length: (\d+)", head)
    return await reader.readexactly(int(length[1]))


class Load:
    """About *rate* requests per second, half of them on fresh connections."""

    def __init__(self, port, rate=3000, clients=24):
        self.port, self.clients = port, clients
        self.pause = clients / rate
        self.answered = 0
        self.failed = Counter()
        self.gap = 0.0
        self.pids = Counter()
        self._last = None
        self._stop = False

    def _done(self, pid):
        now = time.monotonic()
        if self._last is not None:
            self.gap = max(self.gap, now - self._last)
        self._last = now
        self.answered += 1
        self.pids[pid] += 1

    async def _client(self, fresh):
        reader = writer = None
        request = b"GET / HTTP/1.1\r\nHost: x\r\n" + (b"Connection: close\r\n" if fresh else b"") + b"\r\n"
        due = time.monotonic()
        while not self._stop:
            try:
                async with asyncio.timeout(10):
                    if writer is None:
                        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.write(request)
                    head = (await reader.readuntil(b"\r\n\r\n")).lower()
                    length = re.search(rb"content-length: (\d+)", head)
                    self._done(int(await reader.readexactly(int(length[1]))))
                if b"connection: close" in head:
                    writer.close()
                    writer = None
            except (OSError, asyncio.IncompleteReadError) as exc:
                self.failed[type(exc).__name__] += 1
                if writer is not None:
                    writer.close()
                writer = None
            due += self.pause
            delay = due - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            else:
                due = time.monotonic()
                await asyncio.sleep(0)
        if writer is not None:
            writer.close()

    @contextlib.asynccontextmanager
    async def running(self):
        tasks = [asyncio.create_task(self._client(i % 2 == 0)) for i in range(self.clients)]
        try:
            yield self
        finally:
            self._stop = True
            await asyncio.wait(tasks)

    def __str__(self):
        failed = sum(self.failed.values())
        what = f" ({', '.join(f'{n} {k}' for k, n in self.failed.items())})" if failed else ""
        return f"{self.answered} answered, {failed} failed{what}, longest gap {self.gap:.3f} s"


# Rows


async def restarts(name, args):
    """5 rolling restarts under load"""
    if name == "granian":
        return "SIGHUP: as configured, off by default"
    with Server(name) as server:
        assert await server.wait_up(), server.text()
        async with Load(server.port, args.rate).running() as load:
            await asyncio.sleep(0.5)
            for _ in range(5):
                old = await server.workers()
                server.proc.send_signal(signal.SIGHUP)
                if await server.wait_new(old) is None:
                    return f"no new workers; {load}"
        return str(load)


async def kill(name, args):
    """kill -9 of a worker"""
    with Server(name) as server:
        assert await server.wait_up(), server.text()
        old = await server.workers()
        async with Load(server.port, args.rate).running() as load:
            await asyncio.sleep(0.5)
            victim = next(iter(old))
            os.kill(victim, signal.SIGKILL)
            start = time.monotonic()
            took = None
            while time.monotonic() - start < 10 and server.proc.poll() is None:
                if set(load.pids) - old:
                    took = time.monotonic() - start
                    break
                await asyncio.sleep(0.005)
        if server.proc.poll() is not None:
            return f"the whole server ended with {server.proc.returncode}; {load}"
        named = "SIGKILL" in server.text()
        return f"replacement after {took and round(took, 2)} s, signal {'' if named else 'not '}in the log; {load}"


async def kill_parent(name, args):
    """kill -9 of the parent"""
    with Server(name) as server:
        assert await server.wait_up(), server.text()
        await server.workers()
        server.proc.kill()
        server.proc.wait()
        start = time.monotonic()
        while server.members() and time.monotonic() - start < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        left = len(server.members())
        if left:
            return f"{left} orphans after 5 s"
        took = time.monotonic() - start
        with socket.create_server(("127.0.0.1", server.port)):
            return f"all gone after {took:.2f} s, port free"


async def hang(name, args):
    """a worker whose loop hangs (limit 2 s where there is one)"""
    with Server(name) as server:
        assert await server.wait_up(), server.text()
        old = await server.workers()
        async with Load(server.port, args.rate // 4).running() as load:
            await asyncio.sleep(0.5)
            task = asyncio.create_task(get(server.port, b"/hang", timeout=60))
            start = time.monotonic()
            took = None
            while time.monotonic() - start < 12 and server.proc.poll() is None:
                if set(load.pids) - old:
                    took = time.monotonic() - start
                    break
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
        stacks = "app.py" in server.text() and "in app" in server.text()
        found = f"replaced after {took:.1f} s" if took else "not found within 12 s"
        return f"{found}, stacks {'' if stacks else 'not '}in the log; {load}"


async def broken_reload(name, args):
    """broken code at reload"""
    with tempfile.TemporaryDirectory() as folder:
        broken = os.path.join(folder, "broken")
        with Server(name, broken=broken) as server:
            assert await server.wait_up(), server.text()
            async with Load(server.port, args.rate // 4).running() as load:
                await asyncio.sleep(0.3)
                os.mkdir(broken)
                server.proc.send_signal(signal.SIGHUP)
                await asyncio.sleep(4)
            ended = server.proc.poll()
            state = "still serves" if ended is None else f"ended with {ended}"
            return f"{state}; {load}"


async def broken_start(name, args):
    """broken code at start"""
    with tempfile.NamedTemporaryFile() as file, Server(name, broken=file.name) as server:
        end = time.monotonic() + 15
        while server.proc.poll() is None and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if server.proc.returncode is None:
            return "goes on for ever"
        lines = server.text().strip().splitlines()
        return f"status {server.proc.returncode}, last line: {lines[-1][:100] if lines else ''!r}"


async def stop(name, args):
    """SIGTERM with 64 requests of 200 ms in flight"""
    with Server(name) as server:
        assert await server.wait_up(), server.text()
        await server.workers()
        outcomes, later = Counter(), Counter()

        async def one(path, counter):
            try:
                await get(server.port, path, timeout=5)
                counter["answered"] += 1
            except ConnectionRefusedError:
                counter["refused"] += 1
            except (OSError, asyncio.IncompleteReadError) as exc:
                counter[type(exc).__name__] += 1

        tasks = [asyncio.create_task(one(b"/slow", outcomes)) for _ in range(64)]
        await asyncio.sleep(0.1)
        start = time.monotonic()
        server.proc.send_signal(signal.SIGTERM)
        took = None
        while time.monotonic() - start < 0.6:
            tasks.append(asyncio.create_task(one(b"/", later)))
            await asyncio.sleep(0.005)
            if took is None and server.proc.poll() is not None:
                took = time.monotonic() - start
        await asyncio.wait(tasks)
        end = time.monotonic() + 10
        while took is None and time.monotonic() < end:
            await asyncio.sleep(0.01)
            if server.proc.poll() is not None:
                took = time.monotonic() - start
        ended = f"status {server.proc.poll()} after {took and round(took, 2)} s"
        return f"in flight {dict(outcomes)}, later {dict(later)}, {ended}"


async def many(name, args):
    """30 restarts in a row, then a burst of 10 HUPs"""
    if name == "granian":
        return "SIGHUP: as configured, off by default"
    with Server(name) as server:
        assert await server.wait_up(), server.text()
        times = []
        before = len(server.members())
        for _ in range(30):
            old = await server.workers()
            server.proc.send_signal(signal.SIGHUP)
            took = await server.wait_new(old)
            if took is None:
                return f"stuck after {len(times)} restarts"
            times.append(took)
        await asyncio.sleep(1)
        grown = len(server.members()) - before
        for _ in range(10):
            server.proc.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.02)
        start = time.monotonic()
        last, quiet = await server.workers(), time.monotonic()
        while time.monotonic() - quiet < 1.5 and time.monotonic() - start < PATIENCE:
            await asyncio.sleep(0.05)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                now = await server.workers()
                if now != last:
                    last, quiet = now, time.monotonic()
        return f"{statistics.median(times):.2f} s each, {grown} processes more, burst settled in {quiet - start:.1f} s"


async def cpu(name, args):
    """CPU of the workers per request, plain hello, wrk on 16 keep-alive connections"""
    if shutil.which("wrk") is None:
        return "needs wrk"
    with Server(name, workers=1) as server:
        assert await server.wait_up(), server.text()

        def used():
            total = 0
            for pid in server.members():
                with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as f:
                    fields = f.read().rpartition(")")[2].split()
                    total += int(fields[11]) + int(fields[12])
            return total / os.sysconf("SC_CLK_TCK")

        wrk = ["wrk", "-t1", "-c16", f"-d{args.seconds}s", f"http://127.0.0.1:{server.port}/"]
        before = used()
        proc = await asyncio.create_subprocess_exec(*wrk, stdout=subprocess.PIPE)
        out, _ = await proc.communicate()
        requests = int(re.search(rb"(\d+) requests in", out)[1])
        return (used() - before) / requests * 1e6


ROWS = {fn.__name__: fn for fn in (restarts, kill, kill_parent, hang, broken_reload, broken_start, stop, many)}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__.splitlines()[0])
    parser.add_argument("--servers", default=",".join(installed()))
    parser.add_argument("--rows", default=",".join([*ROWS, "cpu"]))
    parser.add_argument("--rate", type=int, default=3000, help="requests per second")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=3, help="of each round of the row cpu")
    parser.add_argument("--json", default=None, help="also write the results here")
    args = parser.parse_args()
    servers = args.servers.split(",")
    results = {}
    for row in args.rows.split(","):
        if row == "cpu":
            print(f"\n{cpu.__doc__}: best of 5 alternating rounds", flush=True)
            best = {}
            for _ in range(5):
                for name in servers:
                    value = asyncio.run(cpu(name, args))
                    if isinstance(value, float):
                        best[name] = min(value, best.get(name, value))
            for name, value in best.items():
                print(f"  {name:17} {value:.1f} us", flush=True)
            results[row] = best
            continue
        print(f"\n{ROWS[row].__doc__}", flush=True)
        results[row] = {}
        for name in servers:
            for _ in range(args.rounds):
                text = asyncio.run(ROWS[row](name, args))
                results[row].setdefault(name, []).append(text)
                print(f"  {name:17} {text}", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results, f, indent=2)


if __name__ == "__main__":
    main()
