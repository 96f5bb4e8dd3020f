"""Queues: within a loop, between threads and loops, in bursts; against asyncio, janus and culsans.

    python -m benchmarks.bench_queue [--loop default|uvloop|both] [--rounds N] [--only TEXT] [--items N]

janus and culsans take part where they are installed. All variants of a case run in one process, their rounds
interleaved, and the best round counts. Within one loop the time is CPU time of the thread, across threads wall time.
"""

import argparse
import asyncio
import importlib.util
import platform
import sys
import threading
import time

import aiotools

try:
    import uvloop
except ImportError:
    uvloop = None

RIVALS = [name for name in ("janus", "culsans") if importlib.util.find_spec(name) is not None]


def queue_classes():
    """name -> a function that makes (object to close, async side, sync side); asyncio's has no sync side."""

    def ours(maxsize):
        queue = aiotools.Queue(maxsize)
        return queue, queue.async_q, queue.sync_q

    def stdlib(maxsize):
        return None, asyncio.Queue(maxsize), None

    made = {"aiotools": ours, "asyncio": stdlib}
    for name in RIVALS:
        module = __import__(name)

        def other(maxsize, module=module):
            queue = module.Queue(maxsize)
            return queue, queue.async_q, queue.sync_q

        made[name] = other
    return made


async def close(queue):
    if queue is not None and hasattr(queue, "aclose"):
        await queue.aclose()


# --- cases: each returns seconds for `items` items -----------------------------------------------------------------


async def stream(make, items, maxsize=100):
    """One producer, one consumer, one loop."""
    owner, q, _ = make(maxsize)

    async def produce():
        for i in range(items):
            await q.put(i)

    async def consume():
        for _ in range(items):
            await q.get()

    begin = time.thread_time()
    await asyncio.gather(produce(), consume())
    spent = time.thread_time() - begin
    await close(owner)
    return spent


async def ping_pong(make, items, pairs=100):
    """`pairs` producers and consumers, each pair with a queue of one place."""
    queues = [make(1) for _ in range(pairs)]
    each = items // pairs

    async def produce(q):
        for i in range(each):
            await q.put(i)

    async def consume(q):
        for _ in range(each):
            await q.get()

    begin = time.thread_time()
    await asyncio.gather(*(task for _, q, _ in queues for task in (produce(q), consume(q))))
    spent = time.thread_time() - begin
    for owner, _, _ in queues:
        await close(owner)
    return spent


async def one_pair(make, items):
    return await ping_pong(make, items, 1)


async def thread_to_loop(make, items, maxsize=100):
    owner, q, sync_q = make(maxsize)

    def produce():
        for i in range(items):
            sync_q.put(i)

    begin = time.perf_counter()
    thread = threading.Thread(target=produce)
    thread.start()
    for _ in range(items):
        await q.get()
    spent = time.perf_counter() - begin
    thread.join()
    await close(owner)
    return spent


async def loop_to_thread(make, items, maxsize=100):
    owner, q, sync_q = make(maxsize)
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def consume():
        for _ in range(items):
            sync_q.get()
        loop.call_soon_threadsafe(done.set)

    begin = time.perf_counter()
    thread = threading.Thread(target=consume)
    thread.start()
    for i in range(items):
        await q.put(i)
    await done.wait()
    spent = time.perf_counter() - begin
    thread.join()
    await close(owner)
    return spent


async def loop_to_loop(make, items, maxsize=100):
    """Only for queues that more than one loop may use."""
    owner, q, _ = make(maxsize)
    kind = type(asyncio.get_running_loop())

    def consumer_thread():
        async def consume():
            for _ in range(items):
                await q.get()

        with asyncio.Runner(loop_factory=kind if kind.__module__.startswith("uvloop") else None) as runner:
            runner.run(consume())

    begin = time.perf_counter()
    thread = threading.Thread(target=consumer_thread)
    thread.start()
    for i in range(items):
        await q.put(i)
    await asyncio.to_thread(thread.join)
    spent = time.perf_counter() - begin
    await close(owner)
    return spent


async def bursts(make, items, size=1000):
    """A thread puts bursts; between them the queue runs empty."""
    owner, q, sync_q = make(0)
    emptied = threading.Semaphore(1)

    def produce():
        for start in range(0, items, size):
            emptied.acquire()
            for i in range(start, start + size):
                sync_q.put(i)

    begin = time.perf_counter()
    thread = threading.Thread(target=produce)
    thread.start()
    for i in range(1, items + 1):
        await q.get()
        if i % size == 0:
            emptied.release()
    spent = time.perf_counter() - begin
    thread.join()
    await close(owner)
    return spent


async def bulk(make, items, size=1000):
    """put_many and get_many within one loop; who has none of these puts and gets one by one."""
    owner, q, _ = make(0)
    many = hasattr(q, "put_many")
    batch = list(range(size))
    begin = time.thread_time()
    for _ in range(0, items, size):
        if many:
            await q.put_many(batch)
            await q.get_many(size)
        else:
            for i in batch:
                await q.put(i)
            for _ in batch:
                await q.get()
    spent = time.thread_time() - begin
    await close(owner)
    return spent


ALL = ("aiotools", "asyncio", "janus", "culsans")
CROSSING = ("aiotools", "janus", "culsans")
CASES = {
    # name: (function, share of --items, who takes part)
    "queue(100) within a loop": (stream, 1.0, ALL),
    "queue(1) ping-pong, 1 pair": (one_pair, 0.2, ALL),
    "queue(1) ping-pong, 100 pairs": (ping_pong, 0.5, ("aiotools", "asyncio", "culsans")),
    "bulk of 1000 within a loop": (bulk, 1.0, ALL),
    "thread to loop, queue(100)": (thread_to_loop, 1.0, CROSSING),
    "loop to thread, queue(100)": (loop_to_thread, 1.0, CROSSING),
    "loop to loop, queue(100)": (loop_to_loop, 0.5, ("aiotools", "culsans")),
    "bursts of 1000, thread to loop": (bursts, 1.0, CROSSING),
}


def measure(case, loop_name, items, rounds):
    function, share, names = CASES[case]
    makers = {name: make for name, make in queue_classes().items() if name in names}
    count = max(1000, int(items * share) // 1000 * 1000)
    best = dict.fromkeys(makers, float("inf"))
    factory = uvloop.new_event_loop if loop_name == "uvloop" else asyncio.new_event_loop
    for _ in range(rounds):
        for name, make in makers.items():
            with asyncio.Runner(loop_factory=factory) as runner:
                best[name] = min(best[name], runner.run(function(make, count)) / count)
    return {name: seconds * 1e9 for name, seconds in best.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loop", choices=["default", "uvloop", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--items", type=int, default=20000)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    loops = ["default", "uvloop"] if given.loop == "both" else [given.loop]
    if uvloop is None:
        loops = [name for name in loops if name != "uvloop"]
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"{platform.python_implementation()} {platform.python_version()}{'' if gil else ', no GIL'}; ns per item")
    for case in CASES:
        if given.only not in case:
            continue
        for loop_name in loops:
            found = measure(case, loop_name, given.items, given.rounds)
            ours = found.pop("aiotools")
            others = ", ".join(f"{name} {ns:.0f} ({ns / ours:.1f}x)" for name, ns in found.items())
            print(f"{case:32} {loop_name:8} aiotools {ours:6.0f}   {others}", flush=True)


if __name__ == "__main__":
    main()
