"""Context managers: actxmgr, actxgroup, resetting and closing beside contextlib, gather by hand and PyPI's aiotools.

Nanoseconds per ``async with``; in the cases of groups, per manager. AsyncExitStack enters and leaves one manager after
the other: beside groups whose managers do not suspend it shows what being concurrent costs, beside those that do it
stands for the same work without tasks, which takes as many turns of the loop as there are managers.
"""

import asyncio
import contextlib
import contextvars
import sys

import aiotools
from benchmarks import common
from benchmarks.common import case

var = contextvars.ContextVar("var", default=0)

# Tasks that start eagerly came with 3.12.
SUSPENDING = {"PyPI aiotools": (1.3, 1.2) if sys.version_info >= (3, 12) else (1, 1)}


async def generator():
    yield 1


async def generator_that_suspends():
    await asyncio.sleep(0)
    yield 1
    await asyncio.sleep(0)


async def generator_that_suppresses():
    with contextlib.suppress(ValueError):
        yield 1


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


class Closable:
    async def close(self):
        pass

    aclose = close


@contextlib.asynccontextmanager
async def resetting_by_hand(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def resetting_by_hand_sync(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def makers(name, beside):
    """{who: what makes the managers}: ours and PyPI's of that name, and what it stands beside."""
    found = {"ours": getattr(aiotools, name), **beside}
    if (pypi := common.rival("aiotools", common.RIVALS)) is not None:
        found["PyPI aiotools"] = getattr(pypi, name)
    return found


def entering(make, *args):
    async def run(n):
        for _ in range(n):
            async with make(*args):
                pass

    return run


def add_entering(sides, name, beside, *args):
    for who, make in makers(name, beside).items():
        sides.add(who)(entering(make, *args))


def add_decorated(sides, function):
    for who, decorate in makers("actxmgr", {"contextlib": contextlib.asynccontextmanager}).items():
        sides.add(who)(entering(decorate(function)))


@case("actxmgr", must={"contextlib": (1.7, 1.7)}, aim={"contextlib": (1.9, 1.9)})
def actxmgr(sides, loop_kind):
    add_decorated(sides, generator)


@case("actxmgr_that_suspends", must={"contextlib": (1, 1)})
def actxmgr_that_suspends(sides, loop_kind):
    add_decorated(sides, generator_that_suspends)


@case("actxmgr_that_suppresses", must={"contextlib": (1.2, 1.2)})
def actxmgr_that_suppresses(sides, loop_kind):
    def failing(make):
        async def run(n):
            error = ValueError()
            for _ in range(n):
                async with make():
                    raise error

        return run

    for who, decorate in makers("actxmgr", {"contextlib": contextlib.asynccontextmanager}).items():
        sides.add(who)(failing(decorate(generator_that_suppresses)))


@case("actxmgr_in_an_exit_stack", must={"contextlib": (1.2, 1.2)})
def actxmgr_in_an_exit_stack(sides, loop_kind):
    """Three of them; "nested" is what no stack could be faster than: three `async with` of ours."""

    def stacking(make):
        async def run(n):
            for _ in range(n):
                async with contextlib.AsyncExitStack() as stack:
                    for _ in range(3):
                        await stack.enter_async_context(make())

        return run

    for who, decorate in makers("actxmgr", {"contextlib": contextlib.asynccontextmanager}).items():
        sides.add(who)(stacking(decorate(generator)))
    make = aiotools.actxmgr(generator)

    @sides.add("nested")
    async def nested(n):
        for _ in range(n):
            async with make(), make(), make():
                pass


@case("resetting", must={"contextlib": (3, 3)})
def resetting(sides, loop_kind):
    add_entering(sides, "resetting", {"contextlib": resetting_by_hand}, var, 1)


@case("resetting_sync", must={"contextlib": (3, 3)})
def resetting_sync(sides, loop_kind):
    def entering_sync(make):
        async def run(n):
            for _ in range(n):
                with make(var, 1):
                    pass

        return run

    for who, make in makers("resetting", {"contextlib": resetting_by_hand_sync}).items():
        sides.add(who)(entering_sync(make))


@case("closing_async", must={"contextlib": (1, 1)})
def closing_async(sides, loop_kind):
    """contextlib.aclosing does the same with a method of another name."""
    add_entering(sides, "closing_async", {"contextlib": contextlib.aclosing}, Closable())


def grouping(group, managers, n_managers):
    async def run(n):
        for _ in range(max(1, n // n_managers)):
            async with group(managers):
                pass

    return run


def add_groups(sides, kind, n_managers):
    managers = [kind() for _ in range(n_managers)]
    for who, group in makers("AsyncContextGroup", {}).items():
        sides.add(who)(grouping(group, managers, n_managers))

    @sides.add("gather by hand")
    async def gather(n):
        for _ in range(max(1, n // n_managers)):
            await asyncio.gather(*[manager.__aenter__() for manager in managers])
            await asyncio.gather(*[manager.__aexit__(None, None, None) for manager in managers])

    @sides.add("AsyncExitStack")
    async def stack(n):
        for _ in range(max(1, n // n_managers)):
            async with contextlib.AsyncExitStack() as stack:
                for manager in managers:
                    await stack.enter_async_context(manager)


@case("actxgroup_of_3", must={"PyPI aiotools": (1.5, 1.5)}, n=3000)
def actxgroup_of_3(sides, loop_kind):
    add_groups(sides, Straight, 3)


@case("actxgroup_of_1000", must={"PyPI aiotools": (5, 5)}, aim={"PyPI aiotools": (10, 10)}, n=3000)
def actxgroup_of_1000(sides, loop_kind):
    add_groups(sides, Straight, 1000)


@case("actxgroup_of_3_that_suspend", must=SUSPENDING, n=3000)
def actxgroup_of_3_that_suspend(sides, loop_kind):
    add_groups(sides, Suspends, 3)


@case("actxgroup_of_1000_that_suspend", must=SUSPENDING, n=3000)
def actxgroup_of_1000_that_suspend(sides, loop_kind):
    add_groups(sides, Suspends, 1000)


@case("actxgroup_of_3_actxmgr", must=SUSPENDING, n=3000)
def actxgroup_of_3_actxmgr(sides, loop_kind):
    """Each side with its own actxmgr, of a generator that suspends on both sides."""
    groups = makers("AsyncContextGroup", {})
    for who, decorate in makers("actxmgr", {}).items():
        make = decorate(generator_that_suspends)

        def run(group=groups[who], make=make):
            async def run(n):
                for _ in range(n // 3):
                    async with group([make(), make(), make()]):
                        pass

            return run

        sides.add(who)(run())
