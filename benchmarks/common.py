"""What the benchmarks share: cases, sides, and how they are measured.

A case compares sides that do the same work. All sides run in one process, round after round, so that a slow phase of
the machine hits them alike; what counts is the best round of each, in CPU time of the thread (waiting for the machine or
in select() is no work). Compare within a row only.

    from benchmarks.common import case

    @case("timeout_empty", must={"asyncio": (6.5, 6.5)}, aim={"asyncio": (8, 8)})
    def timeout_empty(sides, loop_kind):
        @sides.add("ours")
        async def ours(n):
            for _ in range(n):
                async with aiotools.timeout(60):
                    pass

A side is a coroutine function that does its work n times. One that prepares something is an async generator function: it
gets ready, yields, does the work n times, yields, cleans up.

The goals, `must` and `aim`, are factors over a side, for the default loop and for uvloop; a goal below 1 is a limit: ours
may take at most 1/goal times what that side takes.
"""

import asyncio
import gc
import importlib
import inspect
import pathlib
import sys
import time
from dataclasses import dataclass, field

TREE = pathlib.Path(__file__).parent.parent
CASES = []
LOOP_KINDS = ("default", "uvloop")

# Where the rivals are; set by the command line.
RIVALS = TREE / ".work" / "rivals"


@dataclass
class Case:
    name: str
    build: object
    must: dict
    aim: dict
    unit: str
    n: int | None
    rounds: int


@dataclass
class Sides:
    functions: dict = field(default_factory=dict)

    def add(self, name):
        def register(function):
            self.functions[name] = function
            return function

        return register


def case(name, *, must=None, aim=None, unit="ns", n=None, rounds=1000):
    """Registers a case. unit "bytes": the sides return what one operation occupies, and are run once per loop.

    n: how often the work is done per round, where the measured default would not do. rounds: at most so many.
    """

    def register(build):
        CASES.append(Case(name, build, must or {}, aim or {}, unit, n, rounds))
        return build

    return register


def new_loop(kind):
    if kind == "uvloop":
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


def available_loop_kinds():
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return ["default"]
    return list(LOOP_KINDS)


def rival(name, rivals):
    """A rival's module, or None where it is not installed: from the folder of `--rivals`, else from the environment.

    PyPI's aiotools has our name; it is imported from that folder beside us.
    """
    hidden = {}
    if name == "aiotools":
        if not (rivals / "aiotools").is_dir():
            return None
        hidden = {key: sys.modules.pop(key) for key in list(sys.modules) if key.partition(".")[0] == "aiotools"}
    sys.path.insert(0, str(rivals))
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    finally:
        sys.path.remove(str(rivals))
        if name == "aiotools":
            for key in [key for key in sys.modules if key.partition(".")[0] == "aiotools"]:
                del sys.modules[key]
            sys.modules.update(hidden)


class Side:
    """One side of a case with a loop of its own, so that what one leaves behind does not slow the others."""

    def __init__(self, function, kind):
        self.function = function
        self.loop = new_loop(kind)
        self.best = float("inf")

    def run(self, n):
        """One round: nanoseconds per operation, or what the side returned."""
        return self.loop.run_until_complete(self._run(n))

    async def _run(self, n):
        if not inspect.isasyncgenfunction(self.function):
            began = time.thread_time_ns()
            result = await self.function(n)
            took = time.thread_time_ns() - began
            return took / n if result is None else result
        steps = self.function(n)
        await steps.__anext__()
        began = time.thread_time_ns()
        await steps.__anext__()
        took = time.thread_time_ns() - began
        async for _ in steps:
            raise AssertionError(f"{self.function.__name__} yields twice")
        return took / n

    def close(self):
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


# A round takes about so long.
ROUND_NS = 4_000_000


def measure(case, kind, rounds):
    """{side: best}."""
    sides = Sides()
    case.build(sides, kind)
    running = {name: Side(function, kind) for name, function in sides.functions.items()}
    try:
        if case.unit == "bytes":
            return {name: side.run(1) for name, side in running.items()}
        counts = {}
        for name, side in running.items():
            side.run(10)
            counts[name] = case.n or max(10, min(100_000, round(ROUND_NS / max(side.run(100), 1))))
        gc.collect()
        gc.freeze()
        for _ in range(min(rounds, case.rounds)):
            for name, side in running.items():
                side.best = min(side.best, side.run(counts[name]))
        return {name: side.best for name, side in running.items()}
    finally:
        gc.unfreeze()
        for side in running.values():
            side.close()


def verdict(goals, rival, factor, kind):
    """Is the goal against this side reached? None where there is no goal."""
    if rival not in goals:
        return None
    goal = goals[rival]
    goal = goal[LOOP_KINDS.index(kind)] if isinstance(goal, tuple) else goal
    return goal, factor >= goal


def report(case, kind, best):
    """Prints a row; returns whether what must be reached is reached."""
    unit = "ns" if case.unit == "ns" else "B "
    ours = best["ours"]
    print(f"{case.name:<28} {kind:<8} ours {ours:9.0f} {unit}")
    fine = True
    for name, value in best.items():
        if name == "ours":
            continue
        factor = value / ours
        text = f"{'':<28} {'':<8} {name:<28} {value:9.0f} {unit} {factor:6.2f}x"
        for word, goals in (("must", case.must), ("aim", case.aim)):
            judged = verdict(goals, name, factor, kind)
            if judged is not None:
                goal, reached = judged
                text += f"  {word} {goal:.3g}x {'ok' if reached else 'MISSED'}"
                fine &= reached or word == "aim"
        print(text)
    sys.stdout.flush()
    return fine
