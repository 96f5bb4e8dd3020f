"""A TCP line service under load: timeouts on every connection, timers for every pool, 1,000 clients.

The service answers each line in capitals. It hangs up on a client that sends no line for IDLE seconds, which takes one
``aiotools.timeout`` per line read. Its connections belong to pools; each pool has a heartbeat timer and a statistics
timer.

Three kinds of clients drive it over real connections: most send a line, wait for the answer, think, and send the
next; the slow ones dawdle in the middle of each line, yet keep within the limit; the silent ones send one line and then
nothing, until the service hangs up on them. So the right number of timeouts is known beforehand.

The same program runs on the default loop and, if it is installed, on uvloop. At the end a table puts them side by
side; the exit status is 0 only if all counts are right.

    python examples/line_service.py [--clients 1000] [--seconds 10]
"""

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass, field

import aiotools

IDLE = 4.0  # seconds without a line after which the service hangs up
DAWDLE = 1.0  # how long slow clients stop in the middle of a line
THINK = 0.3  # how long clients think between two lines, on average
HEARTBEAT = 0.1
STATISTICS = 1.0
POOLS = 4


# --- the service ---------------------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Some of the connections, with their counts and their timers."""

    name: str
    connections: int = 0
    requests: int = 0
    timeouts: int = 0
    errors: int = 0
    beats: int = 0
    beats_due: int = 0
    beats_skipped: int = 0  # due while the loop was busy until after the next one was due
    latest_beat: float = 0.0  # seconds behind the time it was due
    reports: int = 0
    reports_due: int = 0
    rate: float = 0.0  # requests per second, in the last report
    timers: list = field(default_factory=list)

    def start(self):
        self.started = asyncio.get_running_loop().time()
        self.reported = self.requests
        self.timers = [
            aiotools.create_timer(self.heartbeat, HEARTBEAT),
            aiotools.create_timer(self.report, STATISTICS),
        ]

    async def stop(self):
        beat, report = self.timers
        # The first one is due at once, at the start.
        self.beats_due = round((beat.next_due - self.started) / HEARTBEAT)
        self.beats_skipped = beat.stats().skipped
        self.latest_beat = beat.stats().late_max
        self.reports_due = round((report.next_due - self.started) / STATISTICS) - report.stats().skipped
        await aiotools.cancel_and_wait(self.timers)

    async def heartbeat(self, interval):
        self.beats += 1

    async def report(self, interval):
        self.rate = (self.requests - self.reported) / interval
        self.reported = self.requests
        self.reports += 1


class LineService:
    def __init__(self):
        self.pools = [Pool(f"pool {number}") for number in range(1, POOLS + 1)]

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, backlog=4096)
        self.address = self.server.sockets[0].getsockname()
        for pool in self.pools:
            pool.start()
        return self

    async def __aexit__(self, *exc_info):
        for pool in self.pools:
            await pool.stop()
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        pool = min(self.pools, key=lambda pool: pool.connections)
        pool.connections += 1
        try:
            while True:
                async with aiotools.timeout(IDLE):
                    line = await reader.readline()
                if not line:
                    break
                writer.write(line.upper())
                await writer.drain()
                pool.requests += 1
        except TimeoutError:
            pool.timeouts += 1
            writer.write(b"IDLE FOR TOO LONG\n")
        except Exception:
            pool.errors += 1
            raise
        finally:
            pool.connections -= 1
            writer.close()

    def total(self, name):
        return sum(getattr(pool, name) for pool in self.pools)


# --- the clients ---------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What the clients saw."""

    seconds: float
    times: list = field(default_factory=list)  # seconds per request
    hung_up: dict = field(default_factory=lambda: {"lively": 0, "slow": 0, "silent": 0})
    wrong: list = field(default_factory=list)

    def __post_init__(self):
        self.deadline = time.monotonic() + self.seconds

    async def client(self, kind, number, address):
        try:
            reader, writer = await asyncio.open_connection(*address)
            try:
                await self.talk(kind, number, reader, writer)
            finally:
                writer.close()
                await writer.wait_closed()
        except Exception as exc:
            self.wrong.append(f"{kind} client {number}: {exc!r}")

    async def talk(self, kind, number, reader, writer):
        chance = random.Random(number)
        await asyncio.sleep(chance.uniform(0, THINK))
        lines = 0
        while time.monotonic() < self.deadline:
            lines += 1
            line = f"client {number} says {lines}\n".encode()
            if kind == "slow":
                writer.write(line[:5])
                await asyncio.sleep(DAWDLE)
                line = line[5:]
            began = time.monotonic()
            writer.write(line)
            async with aiotools.timeout(30):
                answer = await reader.readline()
            if answer == b"IDLE FOR TOO LONG\n":
                self.hung_up[kind] += 1
                return
            if answer != f"CLIENT {number} SAYS {lines}\n".encode():
                self.wrong.append(f"{kind} client {number} got {answer!r}")
                return
            self.times.append(time.monotonic() - began)
            if kind == "silent":
                # Now not a word; the service speaks first.
                async with aiotools.timeout(30):
                    answer = await reader.readline()
                self.hung_up[kind] += answer == b"IDLE FOR TOO LONG\n"
                return
            await asyncio.sleep(chance.uniform(0, 2 * THINK))

    def percentile(self, percent):
        return sorted(self.times)[int(len(self.times) * percent / 100)] if self.times else float("nan")


def kinds_of_clients(count):
    """A twentieth is silent, a twentieth slow, the others are lively; mixed."""
    few = max(1, count // 20)
    kinds = ["silent"] * few + ["slow"] * few
    kinds += ["lively"] * (count - len(kinds))
    random.Random(count).shuffle(kinds)
    return kinds


async def show_progress(name, service, ends):
    """One line, again and again."""
    while (left := ends - time.monotonic()) > 0:
        text = (
            f"{name:>12}: {service.total('connections'):5} connections  {service.total('requests'):7} requests"
            f"  {service.total('rate'):6.0f}/s  {service.total('timeouts'):4} timeouts"
            f"  {service.total('beats'):5} heartbeats  {left:4.1f} s left"
        )
        print(f"\r{text}" if sys.stdout.isatty() else text, end="" if sys.stdout.isatty() else "\n", flush=True)
        await asyncio.sleep(0.2 if sys.stdout.isatty() else 2.0)
    if sys.stdout.isatty():
        print("\r" + " " * 110 + "\r", end="")


async def drive(name, count, seconds):
    """Runs the service and its clients; returns (rows for the table, complaints)."""
    kinds = kinds_of_clients(count)
    async with LineService() as service:
        load = Load(seconds)
        progress = asyncio.create_task(show_progress(name, service, load.deadline))
        await asyncio.gather(*(load.client(kind, number, service.address) for number, kind in enumerate(kinds)))
        await progress
    return summary(service, load, kinds)


def summary(service, load, kinds):
    silent = kinds.count("silent")
    rows = {
        "requests served": f"{service.total('requests')}",
        "timeouts fired": f"{service.total('timeouts')} of {silent}",
        "  on others than the silent": f"{load.hung_up['lively'] + load.hung_up['slow']}",
        "heartbeats due": f"{service.total('beats_due')}",
        "heartbeats run": f"{service.total('beats')}",
        "  skipped, too late": f"{service.total('beats_skipped')}",
        "latest heartbeat": f"{max(pool.latest_beat for pool in service.pools) * 1e3:.1f} ms",
        "time per request, p50": f"{load.percentile(50) * 1e3:.2f} ms",
        "time per request, p99": f"{load.percentile(99) * 1e3:.2f} ms",
    }
    checks = {
        "a client got no answer, or a wrong one": not load.wrong,
        "the service failed on a connection": service.total("errors") == 0,
        "answers and requests differ": len(load.times) == service.total("requests"),
        "there were few requests": service.total("requests") >= len(kinds),
        "not just the silent clients timed out": service.total("timeouts") == silent
        and load.hung_up == {"lively": 0, "slow": 0, "silent": silent},
        # The last one is due, and may not have had its first step yet.
        "heartbeats are missing, or too many": all(
            0 <= pool.beats_due - pool.beats - pool.beats_skipped <= 1 for pool in service.pools
        ),
        "there were few heartbeats": service.total("beats_due") >= POOLS * load.seconds / HEARTBEAT * 0.9,
        "reports are missing, or too many": all(0 <= pool.reports_due - pool.reports <= 1 for pool in service.pools),
    }
    complaints = [text for text, holds in checks.items() if not holds] + load.wrong[:5]
    return rows, complaints


# --- both loops ----------------------------------------------------------------------------------------------------


def loops():
    yield "default loop", None
    try:
        import uvloop
    except ImportError:
        print("uvloop is not installed: default loop only")
    else:
        yield "uvloop", uvloop.new_event_loop


def allow_descriptors(count):
    """Each connection has two ends here."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 200
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < 2 * count + 200:
        sys.exit(f"{count} clients need {2 * count + 200} file descriptors, {hard} are allowed (ulimit -n)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    if options.clients < 20 or options.seconds < 2 * IDLE:
        parser.error(f"at least 20 clients and {2 * IDLE:g} seconds, so that there is something to see")
    allow_descriptors(options.clients)

    print(f"{options.clients} clients, {options.seconds:g} seconds on each loop, idle limit {IDLE:g} s")
    columns, failed = {}, False
    for name, factory in loops():
        with asyncio.Runner(loop_factory=factory) as runner:
            columns[name], complaints = runner.run(drive(name, options.clients, options.seconds))
        for complaint in complaints:
            print(f"{name}: WRONG: {complaint}")
        failed |= bool(complaints)

    print()
    print(f"{'':28}" + "".join(f"{name:>16}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"{row:28}" + "".join(f"{column[row]:>16}" for column in columns.values()))
    print("\nThe counts are " + ("WRONG." if failed else "right."))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
