"""``make load``: what clients see while a server is restarted, killed, hung and stopped.

Each row is done with ours and with each peer that is installed (uvicorn, gunicorn with its asgi worker
and with uvicorn-worker, granian, hypercorn, PyPI's aiotools 2.2), with two workers and the application of
app.py, under a load of fresh and keep-alive connections from a client in this process; the row "cpu" has wrk
as its client.  Everything is on 127.0.0.1, in bounded time.

    python -m benchmarks.server [--servers aiotools,uvicorn] [--rows restarts,kill] [--rate 3000] [--rounds 1]
    python -m benchmarks.server --json FILE --rst docs/server-load-table.inc     a table of what earlier runs left in FILE

Behind each result of ours stands whether it reaches its goal; with ``--check`` the exit status says so too.
2.2 is looked for in a folder that pip makes (``make load`` does it):

    pip install --target .work/rivals aiotools==2.2.4 typing_extensions
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.metadata
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

RIVALS = None  # the folder with aiotools 2.2, set by the command line
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PATIENCE = 40.0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@dataclasses.dataclass
class Outcome:
    """What a row saw: for people, and whether it is what ours is to reach."""

    text: str
    good: bool


def command(name, port, workers=2, control=None):
    python = [sys.executable, "-m"]
    if name == "aiotools-2.2":
        return [sys.executable, os.path.join(HERE, "classic.py"), str(port), str(workers)]
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
    if name == "aiotools" and control:
        quiet[name] += ["--control", control]
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
    found = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is not None]
    if os.path.isdir(os.path.join(RIVALS, "aiotools")) and "uvicorn" in found:
        found.append("aiotools-2.2")
    return found


def versions(servers):
    """Server -> its release."""
    names = {"gunicorn-asgi": "gunicorn", "gunicorn-uvicorn": "uvicorn-worker"}
    found = {}
    for name in servers:
        if name == "aiotools-2.2":
            [dist] = importlib.metadata.distributions(name="aiotools", path=[RIVALS])
            found[name] = dist.version
        else:
            found[name] = importlib.metadata.version(names.get(name, name))
    return found


class Server:
    """One server of some kind, in a session of its own, with its log in a file."""

    def __init__(self, name, *, workers=2, broken=None, control=None):
        self.name = name
        self.port = free_port()
        self.log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, RIVALS if name == "aiotools-2.2" else ROOT])}
        if broken:
            env["LOAD_BROKEN"] = broken
        self.proc = subprocess.Popen(
            command(name, self.port, workers, control),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=HERE,
            start_new_session=True,
        )

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
        while time.monotonic() < end and self.proc.poll() is None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await get(self.port)
                return
            await asyncio.sleep(0.02)
        raise RuntimeError(f"{self.name} does not come up:\n{self.text()}")

    async def wait_new(self, old, count=2):
        """Wait until only workers that are not in *old* answer; seconds, or None (also if the parent has ended)."""
        start = time.monotonic()
        streak = 0
        while time.monotonic() - start < PATIENCE and self.proc.poll() is None:
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

    @property
    def serves(self):
        """Whether there was an answer in the last half second."""
        return self._last is not None and time.monotonic() - self._last < 0.5

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


# Rows.  The first line of the docstring names it, what follows is the goal of ours.


async def restarts(name, args):
    """5 rolling restarts under load

    0 failed, no gap of 0.05 s.
    """
    with Server(name) as server:
        await server.wait_up()
        async with Load(server.port, args.rate).running() as load:
            await asyncio.sleep(0.5)
            for number in range(5):
                old = await server.workers()
                server.proc.send_signal(signal.SIGHUP)
                if await server.wait_new(old) is None:
                    ended = server.proc.poll()
                    what = "no new workers" if ended is None else f"the server ended with {ended}"
                    return Outcome(f"{what} at restart {number + 1}; {load}", False)
        return Outcome(str(load), not load.failed and load.gap < 0.05)


async def kill(name, args):
    """kill -9 of a worker

    Only what it had in hand fails; the replacement answers within the import time + 0.1 s; the signal is in the log.
    """
    with Server(name) as server:
        await server.wait_up()
        old = await server.workers()
        async with Load(server.port, args.rate).running() as load:
            # Under the same load, since the replacement has to share the machine with it.
            took_import = await import_time()
            os.kill(min(old), signal.SIGKILL)
            start = time.monotonic()
            took = None
            while time.monotonic() - start < 10 and server.proc.poll() is None:
                if set(load.pids) - old:
                    took = time.monotonic() - start
                    break
                await asyncio.sleep(0.005)
        if server.proc.poll() is not None:
            return Outcome(f"the whole server ended with {server.proc.returncode}; {load}", False)
        named = "SIGKILL" in server.text()
        when = f"replacement after {took:.2f} s" if took else "no replacement"
        # At most one request per client was in the hands of that worker.
        good = took is not None and took < took_import + 0.1 and named and load.failed.total() <= load.clients
        return Outcome(
            f"{when} (imports take {took_import:.2f} s), signal {'' if named else 'not '}in the log; {load}", good
        )


async def import_time():
    """Seconds that a Python needs to start and import the application and what serves it, here and now; best of 3."""
    program = "import aiotools.server.worker, uvicorn, uvicorn.lifespan.on, uvicorn.protocols.http.httptools_impl, uvloop, app"
    best = None
    for _ in range(3):
        start = time.monotonic()
        proc = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, env={**os.environ, "PYTHONPATH": os.pathsep.join([HERE, ROOT])}
        )
        if await proc.wait():
            raise RuntimeError("the application cannot be imported")
        took = time.monotonic() - start
        best = took if best is None else min(best, took)
    return best


async def kill_parent(name, args):
    """kill -9 of the parent

    No orphan after 1 s, the port free.
    """
    with Server(name) as server:
        await server.wait_up()
        await server.workers()
        server.proc.kill()
        server.proc.wait()
        start = time.monotonic()
        while server.members() and time.monotonic() - start < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        left = len(server.members())
        if left:
            return Outcome(f"{left} orphans after 5 s", False)
        took = time.monotonic() - start
        with socket.create_server(("127.0.0.1", server.port)):
            return Outcome(f"all gone after {took:.2f} s, port free", took < 1)


async def hang(name, args):
    """a worker whose loop hangs (limit 2 s where there is one)

    Found within the limit + 1 s, stacks in the log, replaced; nothing fails but what it had in hand.
    """
    patience = args.hang_patience
    with Server(name) as server:
        await server.wait_up()
        old = await server.workers()
        async with Load(server.port, args.rate // 4).running() as load:
            await asyncio.sleep(0.5)
            task = asyncio.create_task(get(server.port, b"/hang", timeout=2 * patience))
            start = time.monotonic()
            took = None
            while time.monotonic() - start < patience and server.proc.poll() is None:
                if set(load.pids) - old:
                    took = time.monotonic() - start
                    break
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
        text = server.text()
        stacks = "app.py" in text and "in app" in text
        found = f"replaced after {took:.1f} s" if took else f"not found within {patience:g} s"
        # From the finding to the first answer of the replacement it is an ordinary start.
        hung = re.search(r"has not turned for (\d+(?:\.\d+)?) s", text)
        if hung:
            found = f"found after {float(hung[1]):.1f} s, {found}"
        good = bool(took and hung and float(hung[1]) < 3 and stacks and load.failed.total() <= load.clients)
        return Outcome(f"{found}, stacks {'' if stacks else 'not '}in the log; {load}", good)


async def broken_reload(name, args):
    """broken code at reload

    The old workers go on; the log and the status say so.
    """
    with tempfile.TemporaryDirectory() as folder:
        broken, control = os.path.join(folder, "broken"), os.path.join(folder, "control")
        with Server(name, broken=broken, control=control) as server:
            await server.wait_up()
            async with Load(server.port, args.rate // 4).running() as load:
                await asyncio.sleep(0.3)
                os.mkdir(broken)
                server.proc.send_signal(signal.SIGHUP)
                await asyncio.sleep(4)
            ended, serves = server.proc.poll(), load.serves
            state = "still serves" if serves else "serves no more"
            if ended is not None:
                state = f"ended with {ended}" + (", its orphans serve" if serves else "")
            if name == "aiotools":
                proc = await asyncio.create_subprocess_exec(
                    *[sys.executable, "-m", "aiotools", "control", control, "status"],
                    stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": ROOT},
                )
                status = (await proc.communicate())[0].decode()
                told = "abandoned" in status and "broken on purpose" in status
                state += f", the status {'says why' if told else 'does not say it'}"
                good = told and serves and not load.failed and "broken on purpose" in server.text()
            else:
                good = False
            return Outcome(f"{state}; {load}", good)


async def broken_start(name, args):
    """broken code at start

    Gives up after the limit with a status that is not 0; the reason is in the last line.
    """
    with tempfile.NamedTemporaryFile() as file, Server(name, broken=file.name) as server:
        end = time.monotonic() + 20
        while server.proc.poll() is None and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        status = server.proc.returncode
        if status is None:
            return Outcome("goes on for ever", False)
        lines = server.text().strip().splitlines()
        last = lines[-1] if lines else ""
        said = "broken on purpose" in last
        good = status > 0 and said
        return Outcome(f"status {status}, reason {'' if said else 'not '}in the last line", good)


async def stop(name, args):
    """SIGTERM with 64 requests of 200 ms in flight

    0 lost, 0 reset (refused at most), status 0, below 0.4 s.
    """
    with Server(name) as server:
        await server.wait_up()
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
        status = server.proc.poll()
        ended = "did not end within 10 s" if took is None else f"status {status} after {took:.2f} s"
        reset = later.total() - later["answered"] - later["refused"]
        good = outcomes == {"answered": 64} and not reset and status == 0 and took is not None and took < 0.4
        return Outcome(
            f"{64 - outcomes['answered']} lost, {reset} later connections reset ({later['refused']} refused, "
            f"{later['answered']} answered); {ended}",
            good,
        )


async def many(name, args):
    """30 restarts in a row, then a burst of 10 HUPs

    Nothing is left, a burst settles within two restarts.
    """
    with Server(name) as server:
        await server.wait_up()
        times = []
        before = len(server.members())
        for _ in range(30):
            old = await server.workers()
            server.proc.send_signal(signal.SIGHUP)
            took = await server.wait_new(old)
            if took is None:
                ended = server.proc.poll()
                what = "stuck" if ended is None else f"the server ended with {ended}"
                return Outcome(f"{what} after {len(times)} restarts", False)
            times.append(took)
        await asyncio.sleep(1)
        grown = len(server.members()) - before
        one = statistics.median(times)
        for _ in range(10):
            server.proc.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.02)
        start = time.monotonic()
        last, quiet = await server.workers(), time.monotonic()
        while time.monotonic() - quiet < max(1.5, 2 * one) and time.monotonic() - start < PATIENCE:
            await asyncio.sleep(0.05)
            if server.proc.poll() is not None:
                return Outcome(f"{one:.2f} s each; a burst ended the server with {server.proc.returncode}", False)
            now = await server.workers()
            if now != last:
                last, quiet = now, time.monotonic()
        settled = quiet - start
        # Looking for both workers takes its time too.
        good = grown == 0 and settled < 2 * max(times) + 0.5
        return Outcome(f"{one:.2f} s each, {grown} processes more, burst settled in {settled:.1f} s", good)


async def cpu(name, args):
    """CPU time per request, plain hello (wrk, 16 keep-alive connections, one worker; best of 5 alternating rounds)

    Within 5 % of uvicorn's own.
    """
    with Server(name, workers=1) as server:
        await server.wait_up()

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


def cpu_rounds(servers, args):
    """Yields (server, Outcome)."""
    if shutil.which("wrk") is None:
        print("  skipped: wrk is not installed (on Debian: apt-get install wrk)")
        return
    best = {}
    for _ in range(5):
        for name in servers:
            value = asyncio.run(cpu(name, args))
            best[name] = min(value, best.get(name, value))
    for name, value in best.items():
        text, good = f"{value:.1f} us", False
        if "uvicorn" in best:
            text += f" ({value / best['uvicorn']:.3f} of uvicorn's)"
            good = value <= 1.05 * best["uvicorn"]
        yield name, Outcome(text, good)


ROWS = {fn.__name__: fn for fn in (restarts, kill, kill_parent, hang, broken_reload, broken_start, stop, many, cpu)}


def headline(row):
    return ROWS[row].__doc__.partition("\n")[0]


def goal(row):
    return " ".join(ROWS[row].__doc__.partition("\n")[2].split())


def table(results):
    """The results as a reStructuredText table."""
    order = [*MODULES, "aiotools-2.2"]
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 25 15 60", "", "   * - row, and its goal"]
    lines += ["     - server", "     - what happened, round by round"]
    for row in ROWS:
        if row not in results["rows"]:
            continue
        found = results["rows"][row]
        for number, name in enumerate(sorted(found, key=order.index)):
            texts = [f"| {outcome['text']}" for outcome in found[name]]
            title = f"**{headline(row)}**: {goal(row)}" if number == 0 else ""
            lines += [f"   * - {title}".rstrip(), f"     - {name} {results['versions'][name]}"]
            lines += [("     - " if i == 0 else "       ") + text for i, text in enumerate(texts)]
    return "\n".join(lines) + "\n"


def main():
    global RIVALS
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__.splitlines()[0])
    parser.add_argument("--servers", default=None, help="names with commas; default: all that are installed")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    parser.add_argument("--rate", type=int, default=3000, help="requests per second")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=3, help="of each round of the row cpu")
    parser.add_argument("--hang-patience", type=float, default=35, help="seconds to wait for the end of a hang")
    parser.add_argument("--json", default=None, help="add the results to this file")
    parser.add_argument("--rst", default=None, help="write what is in the --json file as a table; runs nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 if ours misses a goal")
    parser.add_argument("--rivals", default=os.path.join(ROOT, ".work", "rivals"), help="folder with aiotools 2.2")
    args = parser.parse_args()
    RIVALS = os.path.abspath(args.rivals)
    if args.rst is not None:
        if args.json is None:
            parser.error("--rst needs --json, the file with the results")
        with open(args.json) as f, open(args.rst, "w") as table_file:
            table_file.write(table(json.load(f)))
        return 0
    known = installed()
    servers = known if args.servers is None else args.servers.split(",")
    rows = args.rows.split(",")
    for what, given, possible in (("server", servers, known), ("row", rows, list(ROWS))):
        for name in given:
            if name not in possible:
                parser.error(f"no {what} {name!r} here, only {', '.join(possible)}")
    if not hasattr(os, "killpg") or not os.path.isdir("/proc/self"):
        parser.error("runs on Linux")
    results = {"versions": versions(servers), "rows": {}}
    print(", ".join(f"{name} {version}" for name, version in results["versions"].items()), flush=True)
    missed = False

    def note(row, name, outcome):
        nonlocal missed
        mark = ""
        if name == "aiotools":
            mark = "  [goal reached]" if outcome.good else "  [GOAL MISSED]"
            missed |= not outcome.good
        results["rows"].setdefault(row, {}).setdefault(name, []).append(dataclasses.asdict(outcome))
        print(f"  {name:17} {outcome.text}{mark}", flush=True)

    for row in rows:
        print(f"\n{headline(row)}\n  goal: {goal(row)}", flush=True)
        if row == "cpu":
            for name, outcome in cpu_rounds(servers, args):
                note(row, name, outcome)
            continue
        for name in servers:
            for _ in range(args.rounds):
                note(row, name, asyncio.run(ROWS[row](name, args)))
    if args.json:
        with contextlib.suppress(FileNotFoundError), open(args.json) as f:
            earlier = json.load(f)
            for row, found in earlier["rows"].items():
                results["rows"][row] = {**found, **results["rows"].get(row, {})}
            results["versions"] = {**earlier["versions"], **results["versions"]}
        with open(args.json, "w") as f:
            json.dump(results, f, indent=2)
            f.write("\n")
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
