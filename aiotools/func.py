"""Helpers for functions: partial application, and a cache of the results of coroutine functions."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable, Coroutine
from functools import partial as apartial
from typing import Any, ParamSpec, TypeVar, overload

from ._aiotools import LruCache

__all__ = ("apartial", "lru_cache")


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _is_coroutine_function(function: object) -> bool:
    if inspect.iscoroutinefunction(function):
        return True
    # Before 3.12 the mark that such a callable object bears is known to asyncio only; from 3.14 on, asking it warns.
    return sys.version_info < (3, 12) and asyncio.iscoroutinefunction(function)


@overload
def lru_cache(
    maxsize: Callable[_P, Coroutine[Any, Any, _R]], typed: bool = False, *, expire_after: float | None = None
) -> LruCache[_P, _R]: ...
@overload
def lru_cache(
    maxsize: int | None = 128, typed: bool = False, *, expire_after: float | None = None
) -> Callable[[Callable[_P, Coroutine[Any, Any, _R]]], LruCache[_P, _R]]: ...
def lru_cache(maxsize: Any = 128, typed: bool = False, *, expire_after: float | None = None) -> Any:
    """Keep the results of a coroutine function: the asyncio twin of functools.lru_cache().

    Use it as ``@lru_cache``, ``@lru_cache()`` or ``@lru_cache(32, expire_after=5)``.

    maxsize: how many results are kept; beyond that the least recently used one goes. None: no limit; 0: none is kept.
    typed: arguments of different types have results of their own, 1 and 1.0 for instance.
    expire_after: seconds, on the clock of the loop, that a result stays valid once the call has completed. None: for ever.
    There is no timer: what is expired goes when the cache is used next.

    Calls with equal arguments that overlap share one task, and none of them suffers from the cancellation of another; when
    the last one is cancelled, so is the task. Only results are kept, no exceptions and no cancellations. A call whose
    result is there completes at once, with no task and no turn of the loop.

    Returns a callable with the attributes of the function and ``cache_info()``, ``cache_parameters()``, ``cache_clear()``,
    ``cache_invalidate(*args, **kwargs)``, ``cache_contains(*args, **kwargs)`` and ``await cache_close(wait=False)``. As a
    method it has one cache for all instances, with the instance as first part of the key.

    A cache belongs to the loop of its first call. Used from another loop it clears itself, and warns the first time. It is
    not for several threads at once.

    Raises RuntimeError for what is no coroutine function, NotImplementedError when the first argument is neither that nor
    a size, TypeError or ValueError for a wrong expire_after. Calls raise TypeError when an argument is not hashable and
    RuntimeError once the cache is closed.

    The behaviour is that of ``alru_cache`` of the package async-lru, where expire_after is called ttl.
    """
    if maxsize is None or isinstance(maxsize, int):
        # Wrong arguments are found where they were written, not when the decorator is applied.
        LruCache(_never_called, maxsize, typed, expire_after)
        return functools.partial(_wrap, maxsize=maxsize, typed=typed, expire_after=expire_after)
    if callable(maxsize) or isinstance(maxsize, functools.partialmethod):
        return _wrap(maxsize, maxsize=128, typed=typed, expire_after=expire_after)
    raise NotImplementedError(f"lru_cache() takes a size or a coroutine function, not {maxsize!r}")


async def _never_called() -> None:
    """Stands in for the function while the arguments are looked at."""


def _wrap(func: Any, *, maxsize: int | None, typed: bool, expire_after: float | None) -> Any:
    origin = func
    while isinstance(origin, (functools.partial, functools.partialmethod)):
        origin = origin.func
    if not _is_coroutine_function(origin):
        raise RuntimeError(f"lru_cache() needs a coroutine function, not {func!r}")
    if isinstance(func, functools.partialmethod):
        func = func.__get__(None, object)
    cache: Any = LruCache(func, maxsize, typed, expire_after)
    functools.update_wrapper(cache, func)
    if hasattr(inspect, "markcoroutinefunction"):
        inspect.markcoroutinefunction(cache)
    else:
        # Before 3.12 only asyncio could be told.
        cache._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    return cache
