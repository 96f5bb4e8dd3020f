"""Types and protocols shared by the package and useful in programs' annotations."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Coroutine, Generator
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

__all__ = (
    "AsyncClosable",
    "AwaitableLike",
    "CoroutineLike",
    "ExcInfo",
    "OptExcInfo",
)

_T_co = TypeVar("_T_co", covariant=True)


@runtime_checkable
class AsyncClosable(Protocol):
    """Anything with an asynchronous ``close()`` method.

    ``isinstance`` looks for a ``close`` attribute only; it cannot see whether calling
    it gives something to await.
    """

    async def close(self) -> Any:
        """Release what the object holds."""


if sys.version_info >= (3, 12):
    # typeshed of that time began to describe generator-based coroutines apart.
    AwaitableLike: TypeAlias = Awaitable[_T_co]
    CoroutineLike: TypeAlias = Coroutine[Any, Any, _T_co]
else:
    AwaitableLike: TypeAlias = Generator[Any, None, _T_co] | Awaitable[_T_co]
    CoroutineLike: TypeAlias = Generator[Any, None, _T_co] | Coroutine[Any, Any, _T_co]

ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType]
OptExcInfo: TypeAlias = ExcInfo | tuple[None, None, None]
