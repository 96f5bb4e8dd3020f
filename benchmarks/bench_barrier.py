"""Barrier beside asyncio.Barrier: CPU time per party and generation, 1,000 parties.

    python -m benchmarks.bench_barrier

Both run in one process, rounds interleaved, best of each. "in all" counts making and joining the tasks, for 20
generations; a bare sleep(0) round is what the loop takes by itself.
"""

import asyncio
import time

import aiotools

PARTIES = 1000
GENERATIONS = 20
ROUNDS = 15


async def meet(barrier):
    for _ in range(GENERATIONS):
        await barrier.wait()


async def turn():
    for _ in range(GENERATIONS):
        await asyncio.sleep(0)


async def measure(make):
    """(generations alone, in all) in ns per party and generation."""
    before = time.thread_time()
    tasks = [asyncio.create_task(coro) for coro in make()]
    await asyncio.sleep(0)
    began = time.thread_time()
    for task in tasks:
        await task
    end = time.thread_time()
    return [seconds / PARTIES / GENERATIONS * 1e9 for seconds in (end - began, end - before)]


def parties_of(kind):
    def make():
        barrier = kind(PARTIES)
        return [meet(barrier) for _ in range(PARTIES)]

    return make


async def main():
    cases = {
        "asyncio.Barrier": parties_of(asyncio.Barrier),
        "aiotools.Barrier": parties_of(aiotools.Barrier),
        "sleep(0)": lambda: [turn() for _ in range(PARTIES)],
    }
    best = {name: [float("inf")] * 2 for name in cases}
    for _ in range(ROUNDS):
        for name, make in cases.items():
            best[name] = [min(pair) for pair in zip(best[name], await measure(make), strict=True)]
    print(type(asyncio.get_running_loop()).__name__)
    ours = best["aiotools.Barrier"]
    for name, (alone, in_all) in best.items():
        factors = f"{alone / ours[0]:5.2f}x, in all {in_all / ours[1]:5.2f}x"
        print(f"  {name:18} {alone:6.0f} ns, in all {in_all:6.0f} ns   {factors}")


if __name__ == "__main__":
    asyncio.run(main())
    try:
        import uvloop
    except ImportError:
        print("uvloop is not installed")
    else:
        uvloop.run(main())
