"""What type checkers have to make of context managers. Nothing here runs; `make typecheck` reads it.

A line with an ignore is one that has to be refused: the ignore is an error itself where it is not needed.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from typing import assert_type

from aiotools import (
    AsyncContextGroup,
    AsyncContextManager,
    AsyncDeferFunc,
    DeferFunc,
    actxgroup,
    actxmgr,
    adefer,
    aiter,
    apartial,
    closing_async,
    defer,
    resetting,
)


@actxmgr
async def connection(host: str, port: int = 80, *, secure: bool = False) -> AsyncIterator[bytes]:
    yield host.encode()


@asynccontextmanager
async def by_contextlib(host: str, port: int = 80, *, secure: bool = False) -> AsyncIterator[bytes]:
    yield host.encode()


class Pool:
    @actxmgr
    async def member(self, name: str) -> AsyncIterator["Pool"]:
        yield self


class Closable:
    async def close(self) -> None: ...


async def managers(pool: Pool) -> None:
    async with connection("host", 443, secure=True) as value:
        assert_type(value, bytes)
    assert_type(connection("host"), AsyncContextManager[bytes])
    connection(80)  # type: ignore[arg-type]
    connection()  # type: ignore[call-arg]
    connection("host", safe=True)  # type: ignore[call-arg]

    async with pool.member("name") as member:
        assert_type(member, Pool)
    pool.member(name=1)  # type: ignore[arg-type]

    async with AsyncExitStack() as stack:
        assert_type(await stack.enter_async_context(connection("host")), bytes)
        assert_type(await stack.enter_async_context(closing_async(Closable())), Closable)

    # It takes the place of contextlib's.
    manager: AbstractAsyncContextManager[bytes] = connection("host")
    assert_type(await manager.__aenter__(), bytes)
    make: Callable[[str], AbstractAsyncContextManager[bytes]] = connection
    make = by_contextlib
    make("host")


@connection("host")
async def decorated(x: int) -> str:
    return str(x)


async def decorators() -> None:
    assert_type(await decorated(1), str)
    await decorated("1")  # type: ignore[arg-type]


async def groups() -> None:
    group = AsyncContextGroup([connection("a"), by_contextlib("b")], strict=True, limit=3, rollback_timeout=1.5)
    group.add(connection("c"), after=[group])
    async with group:
        assert_type(group.exit_states()[:0], list[object])  # type: ignore[assert-type]
    actxgroup({"a": connection("a")}).add(connection("b"), key="b", after="a")
    AsyncContextGroup([1])  # type: ignore[list-item]
    AsyncContextGroup(limit="1")  # type: ignore[arg-type]
    AsyncContextGroup(None, True)  # type: ignore[call-arg]


def small(variable: ContextVar[int]) -> None:
    with resetting(variable, 5):
        pass
    resetting(variable, "5")  # type: ignore[misc]
    closing_async(5)  # type: ignore[type-var]


@defer
def with_clean_up(defer: DeferFunc, x: int) -> str:
    defer(lambda: None)
    return str(x)


@adefer
async def with_async_clean_up(defer: AsyncDeferFunc, x: int) -> str:
    defer(Closable().close)
    defer(Closable().close())
    return str(x)


async def deferring() -> None:
    assert_type(with_clean_up(1), str)
    assert_type(await with_async_clean_up(1), str)
    with_clean_up("1")  # type: ignore[arg-type]


async def iterating(source: AsyncIterator[int], function: Callable[[], Awaitable[str]]) -> None:
    async for number in aiter(source):
        assert_type(number, int)
    async for text in aiter(function, None):
        assert_type(text, str)
    assert_type(apartial(int, "5")(), int)
