"""actxmgr, AsyncContextGroup and resetting beside contextlib, AsyncExitStack, gather by hand, and PyPI's aiotools.

Nanoseconds of CPU time of the thread per manager (group cases) or per ``async with`` (the others), best of interleaved
rounds, and the ratio to ours. Times of a shared machine come and go; ratios of one run stand.

    python benchmarks/context.py [--loop default|uvloop|both] [--peer PYTHON] [--rounds 15]

--peer names an interpreter of the same version in which PyPI's aiotools 2.2 is installed; it runs the rows that only it
can, in rounds that alternate with ours.
"""

import argparse
import asyncio
import contextlib
import contextvars
import functools
import json
import os
import subprocess
import sys
import time

import aiotools

var = contextvars.ContextVar("var", default=0)


async def generator():
    yield 1


async def generator_that_suspends():
    await asyncio.sleep(0)
    yield 1
    await asyncio.sleep(0)


class Straight:
    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        return None


class Suspends:
    async def __aenter__(self):
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *exc_info):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def reset_by_hand(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def reset_by_hand_sync(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


async def enter_each(make, times):
    for _ in range(times):
        async with make():
            pass


async def enter_each_sync(make, times):
    for _ in range(times):
        with make():
            pass


async def by_group(group, managers, times):
    for _ in range(times):
        async with group(managers):
            pass


async def by_stack(managers, times):
    for _ in range(times):
        async with contextlib.AsyncExitStack() as stack:
            for manager in managers:
                await stack.enter_async_context(manager)


async def by_gather(managers, times):
    for _ in range(times):
        await asyncio.gather(*[manager.__aenter__() for manager in managers])
        await asyncio.gather(*[manager.__aexit__(None, None, None) for manager in managers])


def cases(peer):
    """{case: (operations per call, {who: coroutine function of the number of calls})}"""
    ours = "peer" if peer else "ours"
    table = {}

    def case(name, per_call, **rivals):
        # The peer runs its own rows only.
        table[name] = (per_call, {who: run for who, run in rivals.items() if (who == ours) or not peer})

    def pair(function):
        return {
            ours: functools.partial(enter_each, aiotools.actxmgr(function)),
            "contextlib": functools.partial(enter_each, contextlib.asynccontextmanager(function)),
        }

    case("actxmgr", 1, **pair(generator))
    case("actxmgr that suspends", 1, **pair(generator_that_suspends))
    case(
        "resetting, async with",
        1,
        **{
            ours: functools.partial(enter_each, lambda: aiotools.resetting(var, 1)),
            "contextlib": functools.partial(enter_each, lambda: reset_by_hand(var, 1)),
        },
    )
    case(
        "resetting, with",
        1,
        **{
            ours: functools.partial(enter_each_sync, lambda: aiotools.resetting(var, 1)),
            "contextlib": functools.partial(enter_each_sync, lambda: reset_by_hand_sync(var, 1)),
        },
    )
    for kind in (Straight, Suspends):
        for count in (3, 1000):
            managers = [kind() for _ in range(count)]
            how = "suspend" if kind is Suspends else "do not suspend"
            case(
                f"actxgroup of {count} that {how}",
                count,
                **{
                    ours: functools.partial(by_group, aiotools.AsyncContextGroup, managers),
                    "AsyncExitStack": functools.partial(by_stack, managers),
                    "gather by hand": functools.partial(by_gather, managers),
                },
            )
    return table


def run(loop, coro):
    if loop == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(coro)
    return asyncio.run(coro)


async def measure(function, per_call):
    """Nanoseconds per operation of about ten milliseconds of work."""
    times = max(1, 4000 // per_call)
    begun = time.thread_time_ns()
    await function(times)
    return (time.thread_time_ns() - begun) / times / per_call


async def one_round(table, best):
    for case, (per_call, rivals) in table.items():
        for who, function in rivals.items():
            took = await measure(function, per_call)
            row = best.setdefault(case, {})
            row[who] = min(row.get(who, took), took)


def ask_peer(python, loop):
    # Its own aiotools, not the tree's.
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    command = [python, __file__, "--loop", loop, "--as-peer"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def table_of(loop, rounds, peer):
    table = cases(False)
    best = {}
    for _ in range(rounds):
        run(loop, one_round(table, best))
        if peer:
            for case, row in ask_peer(peer, loop).items():
                best[case]["PyPI aiotools"] = min(best[case].get("PyPI aiotools", row["peer"]), row["peer"])
    return best


def show(loop, best):
    print(f"{loop} loop, Python {sys.version.split()[0]}, ns")
    for case, row in best.items():
        rivals = "   ".join(
            f"{who} {took:.0f} ({took / row['ours']:.2f}x)" for who, took in row.items() if who != "ours"
        )
        print(f"  {case:36} {row['ours']:8.0f}   {rivals}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loop", choices=["default", "uvloop", "both"], default="default")
    parser.add_argument("--peer", help="an interpreter with PyPI's aiotools")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_peer:
        best = {}
        table = cases(True)
        for _ in range(3):
            run(options.loop, one_round(table, best))
        print(json.dumps(best))
        return
    for loop in ["default", "uvloop"] if options.loop == "both" else [options.loop]:
        show(loop, table_of(loop, options.rounds, options.peer))


if __name__ == "__main__":
    main()
