"""Scopes, groups, gathering, racing and cancelling: an operation is one child, from its creation to its end."""

import asyncio
import functools
import sys
import tracemalloc

import aiotools
from benchmarks import common
from benchmarks.common import case

CHILDREN = 1000


async def trivial():
    pass


async def hop():
    await asyncio.sleep(0)


async def forever():
    await asyncio.get_running_loop().create_future()


def pypi():
    """PyPI's aiotools, or None where it is not installed."""
    return common.rival("aiotools", common.RIVALS)


def block(make, child, spawn="create_task"):
    """A side that has all its children in one block; make() gives its manager."""

    async def run(n):
        async with make() as owner:
            create = getattr(owner, spawn)
            if spawn == "start_soon":
                for _ in range(n):
                    create(child)
            else:
                for _ in range(n):
                    create(child())

    return run


def bare(child):
    """What any way must pay: tasks, awaited one after the other."""

    async def run(n):
        create = asyncio.get_running_loop().create_task
        for task in [create(child()) for _ in range(n)]:
            await task

    return run


def rival_blocks(sides, child):
    sides.add("asyncio.TaskGroup")(block(asyncio.TaskGroup, child))
    if (module := pypi()) is not None:
        sides.add("PyPI aiotools")(block(module.TaskScope, child))
    if (anyio := common.rival("anyio", common.RIVALS)) is not None:
        sides.add("anyio")(block(anyio.create_task_group, child, "start_soon"))
    sides.add("create_task + await")(bare(child))


@case(
    "scope_spawn_join",
    must={"asyncio.TaskGroup": (1.6, 1.4), "PyPI aiotools": (1.9, 1.9)},
    aim={"asyncio.TaskGroup": (1.8, 1.55), "PyPI aiotools": (2.2, 2.2), "create_task + await": 1},
    n=CHILDREN,
)
def spawn_join(sides, loop_kind):
    """Children that end in their first step."""
    sides.add("ours")(block(aiotools.TaskScope, trivial))
    rival_blocks(sides, trivial)


@case(
    "scope_one_hop",
    must={"asyncio.TaskGroup": (1.35, 1.25), "PyPI aiotools": (1.45, 1.45)},
    aim={"asyncio.TaskGroup": (1.45, 1.4), "PyPI aiotools": (1.6, 1.6)},
    n=CHILDREN,
)
def one_hop(sides, loop_kind):
    """Children that suspend once."""
    sides.add("ours")(block(aiotools.TaskScope, hop))
    rival_blocks(sides, hop)


if sys.version_info >= (3, 12):

    @case(
        "scope_eager_start",
        must={"asyncio.TaskGroup": (3.8, 2.6), "PyPI aiotools": (4.6, 3.5)},
        aim={"asyncio.TaskGroup": (4.6, 3.1), "PyPI aiotools": (5.6, 4.1)},
        n=CHILDREN,
    )
    def eager_start(sides, loop_kind):
        """Children that run at once, and to their end; the rivals start theirs in the next turn."""
        sides.add("ours")(block(functools.partial(aiotools.TaskScope, eager_start=True), trivial))
        rival_blocks(sides, trivial)


@case("scope_long_children", n=CHILDREN)
def long_children(sides, loop_kind):
    """Children that outlive the looks of the sweeps, and end together much later."""

    def waiting(make):
        async def run(n):
            event = asyncio.Event()

            async def child():
                await event.wait()

            async with make() as owner:
                for _ in range(n):
                    owner.create_task(child())
                for _ in range(6):
                    await asyncio.sleep(0)
                event.set()

        return run

    sides.add("ours")(waiting(aiotools.TaskScope))
    sides.add("asyncio.TaskGroup")(waiting(asyncio.TaskGroup))
    if (module := pypi()) is not None:
        sides.add("PyPI aiotools")(waiting(module.TaskScope))


@case(
    "task_group",
    must={"asyncio.TaskGroup": (1.25, 1.2)},
    aim={"asyncio.TaskGroup": (1.8, 1.55)},
    n=CHILDREN,
)
def task_group(sides, loop_kind):
    sides.add("ours")(block(aiotools.TaskGroup, trivial))
    sides.add("asyncio.TaskGroup")(block(asyncio.TaskGroup, trivial))
    if (module := pypi()) is not None:
        sides.add("PyPI aiotools")(block(module.TaskGroup, trivial))


def gathering(child):
    def build(sides, loop_kind):
        @sides.add("ours")
        async def ours(n):
            await aiotools.gather_safe([child() for _ in range(n)])

        @sides.add("asyncio.gather")
        async def twin(n):
            await asyncio.gather(*[child() for _ in range(n)], return_exceptions=True)

        if (module := pypi()) is not None:

            @sides.add("PyPI aiotools")
            async def rival(n):
                await module.gather_safe([child() for _ in range(n)])

    return build


GATHER = {"must": {"asyncio.gather": (1.25, 1.2)}, "aim": {"asyncio.gather": (1.8, 1.55)}, "n": CHILDREN}
case("gather_safe", **GATHER)(gathering(trivial))
case("gather_safe_one_hop", **GATHER)(gathering(hop))


def completing(child):
    def build(sides, loop_kind):
        @sides.add("ours")
        async def ours(n):
            async for task in aiotools.as_completed_safe([child() for _ in range(n)]):
                await task

        @sides.add("asyncio.as_completed")
        async def twin(n):
            for future in asyncio.as_completed([child() for _ in range(n)]):
                await future

        if (module := pypi()) is not None:

            @sides.add("PyPI aiotools")
            async def rival(n):
                async for task in module.as_completed_safe([child() for _ in range(n)]):
                    await task

    return build


case(
    "as_completed_safe",
    must={"asyncio.as_completed": (1.25, 1.2)},
    aim={"asyncio.as_completed": (1.8, 1.55)},
    n=CHILDREN,
)(completing(trivial))
# Each end has a done callback, which gives the order.
case("as_completed_safe_one_hop", aim={"asyncio.as_completed": (1.25, 1.2)}, n=CHILDREN)(completing(hop))


@case("race_of_2", must={"asyncio.wait by hand": (1.5, 1.5)}, aim={"asyncio.wait by hand": 2}, n=200)
def race(sides, loop_kind):
    """An operation is a race: one of two wins, the other is cancelled and awaited."""

    @sides.add("ours")
    async def ours(n):
        for _ in range(n):
            await aiotools.race([hop(), forever()])

    @sides.add("asyncio.wait by hand")
    async def twin(n):
        for _ in range(n):
            tasks = [asyncio.ensure_future(hop()), asyncio.ensure_future(forever())]
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            done.pop().result()

    if (module := pypi()) is not None:

        @sides.add("PyPI aiotools")
        async def rival(n):
            for _ in range(n):
                await module.race([hop(), forever()])


@case(
    "cancel_1000_and_wait",
    must={"gather by hand": (1.15, 1.15), "PyPI aiotools": (1.8, 1.8)},
    aim={"gather by hand": (1.2, 1.2), "PyPI aiotools": (1.9, 1.9)},
    n=CHILDREN,
)
def cancel(sides, loop_kind):
    """The tasks are started, too."""

    def side(name, end, suspend=forever):
        async def run(n):
            tasks = [asyncio.ensure_future(suspend()) for _ in range(n)]
            await asyncio.sleep(0)
            await end(tasks)

        sides.add(name)(run)

    async def by_hand(tasks):
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    side("ours", aiotools.cancel_and_wait)
    side("gather by hand", by_hand)
    side("ours, in our own sleep", aiotools.cancel_and_wait, functools.partial(aiotools.sleep, 60))
    if (module := pypi()) is not None:
        side("PyPI aiotools", module.cancel_and_wait)


@case("scope_child_memory", must={"64 bytes": 1}, aim={"asyncio.TaskGroup": 1}, unit="bytes")
def child_memory(sides, loop_kind):
    """What one more suspended child occupies beyond a bare task that somebody refers to."""

    async def measured(make, n):
        event = asyncio.Event()
        tracemalloc.start()
        try:
            async with make() as owner:
                for _ in range(n):
                    owner.create_task(event.wait())
                for _ in range(6):
                    await asyncio.sleep(0)
                occupied = tracemalloc.get_traced_memory()[0]
                event.set()
        finally:
            tracemalloc.stop()
        return occupied

    class Bare:
        """Tasks in a list that was there before."""

        tasks = [None] * 3 * CHILDREN
        made = 0

        async def __aenter__(self):
            return self

        async def __aexit__(self, *exc_info):
            for number in range(self.made):
                await self.tasks[number]
                self.tasks[number] = None

        def create_task(self, coro):
            self.tasks[self.made] = asyncio.get_running_loop().create_task(coro)
            self.made += 1

    async def per_child(make):
        fewer = await measured(make, CHILDREN)
        return (await measured(make, 3 * CHILDREN) - fewer) / (2 * CHILDREN)

    def side(name, make):
        async def run(n):
            return await per_child(make) - await per_child(Bare)

        sides.add(name)(run)

    side("ours", aiotools.TaskScope)
    side("asyncio.TaskGroup", asyncio.TaskGroup)
    if (module := pypi()) is not None:
        side("PyPI aiotools", module.TaskScope)

    @sides.add("64 bytes")
    async def limit(n):
        return 64
