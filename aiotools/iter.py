"""The asynchronous twin of the builtin :func:`iter`."""

from __future__ import annotations

import builtins
import enum
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, overload

__all__ = ("aiter",)

_T = TypeVar("_T")


class _Missing(enum.Enum):
    TOKEN = enum.auto()


@overload
def aiter(source: AsyncIterable[_T], /) -> AsyncIterator[_T]: ...


@overload
def aiter(func: Callable[[], Awaitable[_T]], sentinel: Any, /) -> AsyncIterator[_T]: ...


def aiter(source: Any, sentinel: Any = _Missing.TOKEN, /) -> AsyncIterator[Any]:
    """Return an asynchronous iterator.

    ``aiter(source)`` is the builtin :func:`aiter`.  ``aiter(func, sentinel)`` awaits
    ``func()`` for each item and stops, without yielding it, at the first item equal to
    *sentinel*, as the two-argument form of the builtin :func:`iter` does.

    Parameters:
        source: an asynchronous iterable; or, with a *sentinel*, a callable without
            arguments whose result is awaited.
        sentinel: the value that ends the iteration; ``None`` is as good as any other.

    Raises:
        TypeError: *source* is no asynchronous iterable, or not callable when there is
            a *sentinel*.
    """
    if sentinel is _Missing.TOKEN:
        return builtins.aiter(source)
    if not callable(source):
        raise TypeError(f"aiter() with a sentinel needs a callable, not {type(source).__name__!r}")
    return _until(source, sentinel)


async def _until(func: Callable[[], Awaitable[_T]], sentinel: Any) -> AsyncIterator[_T]:
    while True:
        item = await func()
        if item == sentinel:
            return
        yield item
