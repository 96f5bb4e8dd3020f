"""Context managers: made of generators, entered in groups, and small ones for everyday use."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from typing import Any, ParamSpec, TypeVar, cast

from ._aiotools import AsyncContextManager, _quicken_helper, closing_async, resetting

__all__ = (
    "AsyncContextManager",
    "AsyncExitStack",
    "aclosing",
    "actxmgr",
    "async_ctx_manager",
    "closing_async",
    "resetting",
)

_T = TypeVar("_T")
_P = ParamSpec("_P")

# collections.abc-like checks see the methods anyway; this spares them the search.
AbstractAsyncContextManager.register(AsyncContextManager)


def async_ctx_manager(
    func: Callable[_P, AsyncGenerator[_T, Any] | AsyncIterator[_T]],
) -> Callable[_P, AsyncContextManager[_T]]:
    """Make a function that returns an asynchronous context manager of one that is a generator.

    ::

        @async_ctx_manager
        async def connection(address):
            conn = await connect(address)
            try:
                yield conn
            finally:
                await conn.close()

        async with connection(address) as conn:
            ...

    Parameters:
        func: an asynchronous generator function that yields exactly once.

    Returns:
        a function with the same parameters that returns an
        :class:`AsyncContextManager`.  That is also a decorator of coroutine functions,
        each call of which then runs in a manager of its own.

    The alias ``actxmgr`` is the usual name.  It does what
    :func:`contextlib.asynccontextmanager` does, and drives the generator from C.
    """
    cls = AsyncContextManager

    @functools.wraps(func)
    def helper(*args: Any, **kwds: Any) -> Any:
        return cls(func, args, kwds)

    return cast("Callable[_P, AsyncContextManager[_T]]", _quicken_helper(helper))


actxmgr = async_ctx_manager
