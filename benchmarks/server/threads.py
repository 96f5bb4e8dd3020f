"""How thread workers scale: the same CPU work per request on one worker and on two.

    python -m benchmarks.server.threads

On a free-threaded build two workers do about twice the work of one; with a GIL, no more than one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from aiotools.server import main_context, server_context, start_server

SECONDS = 2.0


def work() -> int:
    total = 0
    for i in range(20_000):
        total += i * i
    return total


@server_context
async def worker(loop, index, args):
    done, deadline = args

    async def serve():
        while time.monotonic() < deadline:
            work()
            done[index] += 1
            await asyncio.sleep(0)

    task = loop.create_task(serve())
    yield
    await task


def measure(workers: int) -> tuple[float, float]:
    done = [0] * workers
    deadline = time.monotonic() + SECONDS

    @main_context
    def main():
        loop = asyncio.get_running_loop()
        loop.call_later(SECONDS, os.kill, os.getpid(), signal.SIGTERM)
        yield done, deadline

    cpu = time.process_time()
    start_server(worker, main, num_workers=workers, worker_kind="thread")
    return sum(done) / SECONDS, (time.process_time() - cpu) / SECONDS


def main() -> None:
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    one, cpu_one = max(measure(1) for _ in range(3))
    two, cpu_two = max(measure(2) for _ in range(3))
    print(
        f"GIL {'on' if gil else 'off'}: 1 worker {one:.0f}/s on {cpu_one:.2f} CPUs, "
        f"2 workers {two:.0f}/s on {cpu_two:.2f} CPUs, factor {two / one:.2f}"
    )


if __name__ == "__main__":
    main()
