"""A program that is not asynchronous itself, and talks to many servers at once all the same.

Threads of a pool (the workers of a web framework, say) fetch lines from slow servers through one ``LoopThread``: each
call looks like an ordinary one, with a timeout of its own, and all connections are served by one event loop in one
thread. The servers run in a second loop thread. The exit status is 0 only if all answers are right.

    python examples/loop_thread.py
"""

import asyncio
import concurrent.futures
import sys
import time

from aiotools import LoopThread

CALLS = 200
DELAY = 0.05


async def serve(reader, writer):
    line = await reader.readline()
    if line == b"never\n":
        await reader.read()  # until the client hangs up
    else:
        await asyncio.sleep(DELAY)
        writer.write(line.upper())
    writer.close()


async def fetch(port, line):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(line)
        return await reader.readline()
    finally:
        writer.close()


def main():
    with LoopThread(name="servers") as servers, LoopThread(name="clients") as clients:
        server = servers.run(asyncio.start_server(serve, "127.0.0.1", 0, backlog=CALLS))
        port = server.sockets[0].getsockname()[1]

        def call(number):
            line = f"line {number}\n".encode()
            return clients.run(fetch(port, line), timeout=30) == line.upper()

        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            right = sum(pool.map(call, range(CALLS)))
        took = time.monotonic() - began
        print(f"{right} of {CALLS} answers are right; {took:.2f} s instead of {CALLS * DELAY:.0f} s one by one")

        try:
            clients.run(fetch(port, b"never\n"), timeout=0.1)
        except TimeoutError as exc:
            print(f"a server that never answers: {exc}")
            timed_out = True
        else:
            timed_out = False

        future = clients.submit(fetch(port, b"later\n"))
        print(f"a future to come back to: {future.result(30)}")
        servers.call(server.close)
        servers.stop(drain=False)
    print("both loops are closed")
    return 0 if right == CALLS and timed_out else 1


if __name__ == "__main__":
    sys.exit(main())
