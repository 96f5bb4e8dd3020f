"""Helpers for functions: partial application, and a cache of the results of coroutine functions."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable, Coroutine, Hashable
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
    maxsize: Callable[_P, Coroutine[Any, Any, _R]],
    typed: bool = False,
    *,
    expire_after: float | None = None,
    jitter: float | None = None,
    stale_while_refresh: float | None = None,
    cache_errors_for: float | None = None,
    key: Callable[_P, Hashable] | None = None,
    weight: Callable[[_R], int] | None = None,
    max_weight: int | None = None,
    shared: bool = False,
) -> LruCache[_P, _R]: ...
@overload
def lru_cache(
    maxsize: int | None = 128,
    typed: bool = False,
    *,
    expire_after: float | None = None,
    jitter: float | None = None,
    stale_while_refresh: float | None = None,
    cache_errors_for: float | None = None,
    key: Callable[..., Hashable] | None = None,
    weight: Callable[[Any], int] | None = None,
    max_weight: int | None = None,
    shared: bool = False,
) -> Callable[[Callable[_P, Coroutine[Any, Any, _R]]], LruCache[_P, _R]]: ...
def lru_cache(
    maxsize: Any = 128,
    typed: bool = False,
    *,
    expire_after: float | None = None,
    jitter: float | None = None,
    stale_while_refresh: float | None = None,
    cache_errors_for: float | None = None,
    key: Callable[..., Hashable] | None = None,
    weight: Callable[[Any], int] | None = None,
    max_weight: int | None = None,
    shared: bool = False,
) -> Any:
    """Keep the results of a coroutine function: the asyncio twin of functools.lru_cache().

    Use it as ``@lru_cache``, ``@lru_cache()`` or ``@lru_cache(32, expire_after=5)``.

    maxsize: how many results are kept; beyond that the least recently used one goes. None: no limit; 0: none is kept.
    typed: arguments of different types have results of their own, 1 and 1.0 for instance.
    expire_after: seconds, on the clock of the loop, that a result stays valid once the call has completed. None: for ever.
    There is no timer: what is expired goes when the cache is used next.
    jitter: seconds; each result stays valid for a random part of it longer, so that those made together do not expire together.
    stale_while_refresh: seconds after its expiry that a result is still given out, at once, while a task in the background makes
    a new one: one at a time for each key. When that fails, the error goes to the exception handler of the loop, unless a
    caller waits for it, and the old result stays as long as it may; the next call tries again. The cache owns the task: it is
    cancelled by cache_close() and when the key is invalidated or evicted; cancelled with its loop, it leaves the old result alone.
    cache_errors_for: seconds that an Exception (no CancelledError) is kept and raised again, with its traceback, as results
    are kept. After a refresh that failed no other is tried for as long.
    key: called with the arguments of each call (for a method, self first); what it returns is the key, instead of all arguments.
    weight: called with each result; returns what it weighs, an int that is not negative. What it raises, the callers get.
    An error that is kept weighs 1.
    max_weight: what all results may weigh together; beyond that the least recently used go. A heavier one is not kept.
    shared: the cache is for any number of loops and threads at once. They share the results; calls that overlap share a task
    with those of the same loop only. Time is that of the loop that asks. An error that was kept is raised as a copy.

    Calls with equal arguments that overlap share one task, and none of them suffers from the cancellation of another; when
    the last one is cancelled, so is the task, and if that fails nevertheless, the exception handler of the loop is told.
    Only results are kept, no exceptions (but see cache_errors_for) and no cancellations. A call whose result is there
    completes at once, with no task and no turn of the loop.

    Returns a callable with the attributes of the function and ``cache_info()``, ``cache_parameters()``, ``cache_clear()``,
    ``cache_invalidate(*args, **kwargs)``, ``cache_invalidate_where(predicate)``, ``cache_contains(*args, **kwargs)`` and
    ``await cache_close(wait=False)``. As a method it has one cache for all instances, with the instance, which it keeps
    alive, as first part of the key.

    Unless shared, a cache belongs to the loop of its first call. Used from another loop it clears itself, and warns the first
    time; it is not for several threads at once.

    Raises RuntimeError for what is no coroutine function, NotImplementedError when the first argument is neither that nor
    a size, TypeError or ValueError, which name it, for any other argument that is wrong: a negative time, jitter or
    stale_while_refresh without expire_after, weight without max_weight or the reverse, typed together with key. Calls
    raise TypeError when an argument or key is not hashable and RuntimeError once the cache is closed.

    The behaviour is that of ``alru_cache`` of the package async-lru, where expire_after is called ttl and jitter comes from;
    to serve what is stale while it is made anew is HTTP's stale-while-revalidate (RFC 5861).
    """
    options: dict[str, Any] = {
        "typed": typed,
        "expire_after": expire_after,
        "jitter": jitter,
        "stale_while_refresh": stale_while_refresh,
        "cache_errors_for": cache_errors_for,
        "key": key,
        "weight": weight,
        "max_weight": max_weight,
        "shared": shared,
    }
    for name in ("key", "weight"):
        if inspect.iscoroutinefunction(options[name]):
            raise TypeError(f"{name} must be an ordinary function, not a coroutine function")
    if maxsize is None or isinstance(maxsize, int):
        # Wrong arguments are found where they were written, not when the decorator is applied.
        LruCache(_never_called, maxsize, **options)
        return functools.partial(_wrap, maxsize=maxsize, options=options)
    if callable(maxsize) or isinstance(maxsize, functools.partialmethod):
        return _wrap(maxsize, maxsize=128, options=options)
    raise NotImplementedError(f"lru_cache() takes a size or a coroutine function, not {maxsize!r}")


async def _never_called() -> None:
    """Stands in for the function while the arguments are looked at."""


def _wrap(func: Any, *, maxsize: int | None, options: dict[str, Any]) -> Any:
    origin = func
    while isinstance(origin, (functools.partial, functools.partialmethod)):
        origin = origin.func
    if not _is_coroutine_function(origin):
        raise RuntimeError(f"lru_cache() needs a coroutine function, not {func!r}")
    if isinstance(func, functools.partialmethod):
        func = func.__get__(None, object)
    cache: Any = LruCache(func, maxsize, **options)
    functools.update_wrapper(cache, func)
    if hasattr(inspect, "markcoroutinefunction"):
        inspect.markcoroutinefunction(cache)
    else:
        # Before 3.12 only asyncio could be told.
        cache._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    return cache
