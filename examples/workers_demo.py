"""The line service with two workers, restarted and shot at while 100 clients use it.

The parent owns the socket. In the middle of the run comes a rolling restart (SIGHUP), which no client may notice, and a
``kill -9`` of a worker, which costs only what that worker had in hand. A worker that drains marks its next answer on
each connection as the last one ("-" instead of "+"), so that no line is on its way to a connection that closes.

    python examples/workers_demo.py [--clients 100] [--loop asyncio|uvloop]
"""

import argparse
import asyncio
import os
import re
import signal
import sys
import time

import aiotools
from aiotools.server import current_worker

HERE = os.path.dirname(os.path.abspath(__file__))
THINK = 0.02  # seconds that a client thinks between two lines
LINES = 10  # per connection


# --- the service ---------------------------------------------------------------------------------------------------


@aiotools.server_context
async def worker(loop, index, args):
    me = current_worker()
    connections = set()

    async def serve(reader, writer):
        task = asyncio.current_task()
        connections.add(task)
        try:
            while line := await reader.readline():
                last = me.stopping
                writer.write(b"%s%d %s" % (b"-" if last else b"+", me.pid, line.upper()))
                await writer.drain()
                me.request_done()
                if last:
                    break
        finally:
            connections.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, sock=me.sockets[0])
    yield
    server.close()
    while connections:
        await asyncio.wait(connections)


# --- the clients ---------------------------------------------------------------------------------------------------


class Clients:
    def __init__(self, port):
        self.port = port
        self.answers = 0
        self.lost = 0
        self.pids = {}
        self.gap = 0.0
        self.latest = None
        self.going = True

    async def client(self):
        reader = writer = None
        lines = 0
        while self.going:
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(b"hello\n")
                answer = await reader.readline()
                if not answer:
                    raise ConnectionResetError
            except OSError:
                self.lost += 1
                writer = None
                continue
            now = time.monotonic()
            if self.latest is not None:
                self.gap = max(self.gap, now - self.latest)
            self.latest = now
            self.answers += 1
            self.pids.setdefault(int(answer[1:].split()[0]), now)
            lines += 1
            if answer.startswith(b"-") or lines % LINES == 0:
                writer.close()
                writer = None
            await asyncio.sleep(THINK)
        if writer is not None:
            writer.close()


async def main(arguments):
    command = [sys.executable, "-m", "aiotools", "serve", "workers_demo:worker", "-w", "2", "--bind"]
    command += ["tcp://127.0.0.1:0", "--app-dir", HERE, "--loop", arguments.loop]
    server = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    log = []

    async def wait_line(pattern):
        while line := (await server.stderr.readline()).decode():
            log.append(line)
            if match := re.search(pattern, line):
                return match
        raise RuntimeError("the server ended:\n" + "".join(log))

    port = int((await wait_line(r"ready: 2 workers, tcp://127\.0\.0\.1:(\d+)"))[1])
    clients = Clients(port)
    tasks = [asyncio.create_task(clients.client()) for _ in range(arguments.clients)]
    await asyncio.sleep(1)

    print("rolling restart ...", flush=True)
    before = set(clients.pids)
    started = time.monotonic()
    server.send_signal(signal.SIGHUP)
    await wait_line("generation 2 serves")
    lost_by_restart = clients.lost
    print(f"  new workers after {time.monotonic() - started:.2f} s, {lost_by_restart} lines lost,"
          f" longest time without an answer {clients.gap:.3f} s")  # fmt: skip

    await asyncio.sleep(0.5)
    victim = max(set(clients.pids) - before)
    print(f"kill -9 of worker {victim} ...", flush=True)
    os.kill(victim, signal.SIGKILL)
    what = (await wait_line(r"was terminated by (SIGKILL)"))[1]
    known = set(clients.pids)
    started = time.monotonic()
    while not set(clients.pids) - known and time.monotonic() - started < 20:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    replaced = bool(set(clients.pids) - known)
    lost_by_kill = clients.lost - lost_by_restart
    print(
        f"  {what} in the log, replacement answers after {time.monotonic() - started:.2f} s, {lost_by_kill} lines lost"
    )

    print("stop ...", flush=True)
    clients.going = False
    await asyncio.wait(tasks)
    server.terminate()
    while line := await server.stderr.readline():
        log.append(line.decode())
    status = await server.wait()
    print(f"  status {status}; {clients.answers} answers in all")
    good = status == 0 and lost_by_restart == 0 and lost_by_kill <= arguments.clients and replaced
    print("good" if good else "NOT GOOD\n" + "".join(log))
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--loop", choices=["auto", "asyncio", "uvloop"], default="auto")
    sys.exit(asyncio.run(main(parser.parse_args())))
