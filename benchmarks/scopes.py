"""Scopes, groups, gathering, racing and cancelling, side by side with asyncio (and anyio, where it is installed).

    python -m benchmarks.scopes [--loop default|uvloop] [--rounds N]

Nanoseconds of CPU time per child, the best of all rounds, which are interleaved; the number in brackets says how many
times as fast as the first column it is.
"""

import argparse
import asyncio
import importlib.util
import time

import aiotools

N = 1000


async def trivial():
    pass


async def hop():
    await asyncio.sleep(0)


async def forever():
    await asyncio.get_running_loop().create_future()


async def asyncio_group(child):
    async with asyncio.TaskGroup() as group:
        for _ in range(N):
            group.create_task(child())


async def scope(child):
    async with aiotools.TaskScope() as group:
        for _ in range(N):
            group.create_task(child())


async def eager_scope(child):
    async with aiotools.TaskScope(eager_start=True) as group:
        for _ in range(N):
            group.create_task(child())


async def group(child):
    async with aiotools.TaskGroup() as tasks:
        for _ in range(N):
            tasks.create_task(child())


async def anyio_group(child):
    import anyio

    async with anyio.create_task_group() as tasks:
        for _ in range(N):
            tasks.start_soon(child)


async def asyncio_gather(child):
    await asyncio.gather(*[child() for _ in range(N)], return_exceptions=True)


async def gather_safe(child):
    await aiotools.gather_safe([child() for _ in range(N)])


async def asyncio_as_completed(child):
    for future in asyncio.as_completed([child() for _ in range(N)]):
        await future


async def as_completed_safe(child):
    async for task in aiotools.as_completed_safe([child() for _ in range(N)]):
        await task


async def asyncio_race(child):
    for _ in range(N // 2):
        tasks = [asyncio.ensure_future(child()), asyncio.ensure_future(forever())]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        done.pop().result()


async def race(child):
    for _ in range(N // 2):
        await aiotools.race([child(), forever()])


async def asyncio_cancel(child):
    tasks = [asyncio.ensure_future(forever()) for _ in range(N)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def cancel(child):
    tasks = [asyncio.ensure_future(forever()) for _ in range(N)]
    await asyncio.sleep(0)
    await aiotools.cancel_and_wait(tasks)


CASES = {
    "spawn + join, trivial": (
        trivial,
        {"asyncio.TaskGroup": asyncio_group, "TaskScope": scope, "TaskGroup": group, "eager scope": eager_scope},
    ),
    "spawn + join, one hop": (
        hop,
        {"asyncio.TaskGroup": asyncio_group, "TaskScope": scope, "TaskGroup": group, "eager scope": eager_scope},
    ),
    "gather": (hop, {"asyncio.gather": asyncio_gather, "gather_safe": gather_safe}),
    "as_completed": (hop, {"asyncio.as_completed": asyncio_as_completed, "as_completed_safe": as_completed_safe}),
    "race of 2": (hop, {"asyncio.wait by hand": asyncio_race, "race": race}),
    "cancel and wait": (forever, {"gather by hand": asyncio_cancel, "cancel_and_wait": cancel}),
}
if importlib.util.find_spec("anyio") is not None:
    for name in ("spawn + join, trivial", "spawn + join, one hop"):
        CASES[name][1]["anyio"] = anyio_group


async def measure(rounds):
    for name, (child, ways) in CASES.items():
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for way, function in ways.items():
                began = time.thread_time_ns()
                await function(child)
                best[way] = min(best[way], (time.thread_time_ns() - began) / N)
        first = next(iter(best.values()))
        print(f"{name:22} " + "   ".join(f"{way} {ns:.0f} ({first / ns:.2f}x)" for way, ns in best.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loop", choices=("default", "uvloop"), default="default")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.loop == "uvloop":
        import uvloop

        uvloop.run(measure(options.rounds))
    else:
        asyncio.run(measure(options.rounds))


if __name__ == "__main__":
    main()
