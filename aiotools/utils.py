"""Run many coroutines as children, and take what they return."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
)
from typing import Any, TypeAlias, TypeVar, overload

from ._aiotools import _Crew

__all__ = (
    "as_completed_safe",
    "gather_safe",
    "map_safe",
    "race",
)

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Coro: TypeAlias = Coroutine[Any, Any, T]
Coros: TypeAlias = Iterable[Coro[T]] | AsyncIterable[Coro[T]]


def _check_limit(limit: int | None) -> None:
    if limit is not None:
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise TypeError(f"limit must be an int or None, not {type(limit).__name__!r}")
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit!r}")


# The modes of a crew; without one it collects tasks.
_KEEP_RESULTS = 1
_RACE = 2
_RACE_FOR_SUCCESS = 3


def _iterator(coros: Any) -> Any:
    try:
        return iter(coros)
    except TypeError:
        raise TypeError(
            f"an iterable or async iterable of coroutines was expected, not {type(coros).__name__!r}"
        ) from None


async def _give_up(crew: Any, iterator: Any) -> None:
    """Not all could be started: end those that were."""
    try:
        await crew.close()
    finally:
        _close_rest(iterator)


def _close_rest(iterator: Any) -> None:
    """Coroutines that were handed over and never started are closed without a warning; a generator is closed itself."""
    if (close := getattr(iterator, "close", None)) is not None:
        close()
    elif type(iterator).__name__.endswith("iterator") and type(iterator).__module__ == "builtins":
        for coro in iterator:
            if asyncio.iscoroutine(coro):
                coro.close()


class _Feed:
    """Starts coroutines of a source in a crew, as many as there is room for."""

    __slots__ = ("_async", "_context", "_crew", "_exhausted", "_index", "_limit", "_pull", "_source", "_started")

    def __init__(self, crew: Any, source: Any, limit: int | None, context: contextvars.Context | None) -> None:
        self._crew = crew
        self._limit = limit
        self._context = context
        self._exhausted = False
        self._started = 0
        #: the task that waits for an async source, which is a member of the crew, too
        self._pull: asyncio.Task[Any] | None = None
        #: the place of each member's coroutine in the source, where members and coroutines differ
        self._index: dict[int, int] = {}
        self._async = hasattr(type(source), "__aiter__")
        try:
            self._source = source.__aiter__() if self._async else iter(source)
        except TypeError:
            raise TypeError(
                f"an iterable or async iterable of coroutines was expected, not {type(source).__name__!r}"
            ) from None

    def fill(self, more: int | None = None) -> None:
        """Start what there is room for; *more* bounds it further."""
        crew = self._crew
        if self._exhausted:
            return
        if self._async:
            if self._pull is None and self._has_room(more):
                self._pull = crew.spawn(self._next(self._source))
            return
        if self._limit is None and more is None:
            crew.spawn_all(self._source, self._context)
            self._exhausted = True
            return
        while self._has_room(more):
            try:
                coro = next(self._source)
            except StopIteration:
                self._exhausted = True
                return
            crew.spawn(coro, self._context)
            self._started += 1
            if more is not None:
                more -= 1

    def _has_room(self, more: int | None) -> bool:
        # Members that ended already and were not taken count: eager ones would let an endless source run away.
        taken = len(self._crew) + self._crew.pending
        return (self._limit is None or taken < self._limit) and (more is None or more > 0)

    @staticmethod
    async def _next(source: Any) -> tuple[Any, ...]:
        try:
            return (await source.__anext__(),)
        except StopAsyncIteration:
            return ()

    def take(self) -> list[tuple[int, asyncio.Task[Any]]]:
        """The members that have ended: (place in the source, task)."""
        finished: list[tuple[int, asyncio.Task[Any]]] = self._crew.take()
        if not self._async:
            return finished
        members = []
        for index, task in finished:
            if task is not self._pull:
                members.append((self._index.pop(index), task))
                continue
            self._pull = None
            pulled = task.result()
            if not pulled:
                self._exhausted = True
                continue
            # The pull took one number, the child takes the next one.
            self._index[self._spawned()] = self._started
            self._started += 1
            self._crew.spawn(pulled[0], self._context)
        return members

    def _spawned(self) -> int:
        return self._crew.spawned  # type: ignore[no-any-return]

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to start or to take."""
        return self._exhausted and not len(self._crew)

    async def close(self) -> None:
        """Cancel what is left, and wait for it."""
        try:
            await self._crew.close()
        finally:
            pull, self._pull = self._pull, None
            if pull is not None and pull.done() and not pull.cancelled() and pull.exception() is None:
                # It was handed over while we left.
                for coro in pull.result():
                    coro.close()
            if not self._exhausted:
                self._exhausted = True
                if self._async:
                    if (aclose := getattr(self._source, "aclose", None)) is not None:
                        await aclose()
                else:
                    _close_rest(self._source)


async def as_completed_safe(
    coros: Coros[T],
    *,
    context: contextvars.Context | None = None,
    limit: int | None = None,
) -> AsyncGenerator[asyncio.Task[T], None]:
    """Yield the tasks of coroutines in the order in which they end; await each one for its result.

    Parameters:
        coros: an iterable or async iterable of coroutines.
        context: the :class:`contextvars.Context` of all children; by default a copy each.
        limit: how many run at once; then coroutines are taken from *coros* only when
            there is room, so it may be endless.

    Children start at the first iteration. Leaving the loop early cancels the rest and
    waits for them, if the generator is closed: wrap it in :func:`aclosing`.

    Raises:
        TypeError: *coros* holds something that is no coroutine.

    Since aiotools 1.6; *limit* and async iterables since 3.0.
    """
    _check_limit(limit)
    feed = _Feed(crew := _Crew(), coros, limit, context)
    try:
        feed.fill()
        while True:
            for _, task in feed.take():
                yield task
            feed.fill()
            if feed.is_over:
                for _, task in feed.take():
                    yield task
                return
            await crew.wait()
    finally:
        await feed.close()


@overload
async def gather_safe(
    coros: Mapping[K, Coro[T]], *, context: contextvars.Context | None = None, limit: int | None = None
) -> dict[K, T | BaseException]: ...
@overload
async def gather_safe(
    coros: Coros[T], *, context: contextvars.Context | None = None, limit: int | None = None
) -> list[T | BaseException]: ...
async def gather_safe(
    coros: Any,
    *,
    context: contextvars.Context | None = None,
    limit: int | None = None,
) -> Any:
    """Run coroutines and return their results in input order, exceptions in the places of results.

    Parameters:
        coros: an iterable or async iterable of coroutines, or a mapping whose values are.
        context: the :class:`contextvars.Context` of all children; by default a copy each.
        limit: how many run at once; then coroutines are taken from *coros* only when
            there is room.

    Returns a list, or for a mapping a dict with the same keys. A child that was
    cancelled counts with its :exc:`~asyncio.CancelledError`.

    When the caller is cancelled, all children are, and their ends are awaited.

    Raises:
        TypeError: *coros* holds something that is no coroutine; the others are cancelled.

    Since aiotools 2.0; mappings, async iterables and *limit* since 3.0.
    """
    _check_limit(limit)
    if isinstance(coros, Mapping):
        keys = list(coros)
        results = await gather_safe(list(coros.values()), context=context, limit=limit)
        return dict(zip(keys, results, strict=True))
    if limit is None and not hasattr(type(coros), "__aiter__"):
        iterator = _iterator(coros)
        crew = _Crew(_KEEP_RESULTS)
        try:
            crew.spawn_all(iterator, context)
        except BaseException:
            await _give_up(crew, iterator)
            raise
        return await crew.results()
    found: dict[int, Any] = {}
    feed = _Feed(crew := _Crew(), coros, limit, context)
    try:
        while True:
            for index, task in feed.take():
                found[index] = _outcome(task)
            feed.fill()
            if feed.is_over:
                for index, task in feed.take():
                    found[index] = _outcome(task)
                return [found[index] for index in range(len(found))]
            await crew.wait()
    finally:
        for _, task in crew.take():
            # Cancelled meanwhile: no partial result is available, and none is reported.
            task.cancelled() or task.exception()
        await feed.close()


def _outcome(task: asyncio.Task[Any]) -> Any:
    try:
        return task.result()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as exc:
        return exc


async def race(
    coros: Coros[T],
    *,
    continue_on_error: bool = False,
    context: contextvars.Context | None = None,
    limit: int | None = None,
) -> tuple[T, Sequence[Exception]]:
    """Run coroutines until the first one ends; cancel the rest and wait for them.

    Parameters:
        coros: an iterable or async iterable of coroutines.
        continue_on_error: failures don't decide; they are collected until the first success.
        context: the :class:`contextvars.Context` of all children; by default a copy each.
        limit: how many run at once; the next one starts when one has failed.

    Returns ``(result, errors)``, errors in the order in which they came.

    Raises:
        ValueError: there is no coroutine.
        ExceptionGroup: with *continue_on_error*, when all have failed.

    Without it, the exception of the first one is raised. A child that cancels itself
    ends the race with its :exc:`~asyncio.CancelledError`.

    Since aiotools 2.0; async iterables and *limit* since 3.0.
    """
    _check_limit(limit)
    if limit is None and not hasattr(type(coros), "__aiter__"):
        # All run from the start.
        iterator = _iterator(coros)
        crew = _Crew(_RACE_FOR_SUCCESS if continue_on_error else _RACE)
        try:
            crew.spawn_all(iterator, context)
        except BaseException:
            await _give_up(crew, iterator)
            raise
        if not crew.spawned:
            raise ValueError("race() needs at least one coroutine")
        outcome: Any = await crew.outcome()
        if type(outcome) is list:
            try:
                raise ExceptionGroup("All coroutines have failed in race()", outcome)
            finally:
                del outcome
        return outcome  # type: ignore[no-any-return]
    errors: list[Exception] = []
    feed = _Feed(crew := _Crew(), coros, limit, context)
    try:
        feed.fill()
        while True:
            for _, task in feed.take():
                if not task.cancelled() and continue_on_error and isinstance(exc := task.exception(), Exception):
                    errors.append(exc)
                    del exc
                    continue
                return task.result(), errors
            feed.fill()
            if feed.is_over:
                if crew.pending:
                    continue
                break
            await crew.wait()
        if not errors:
            raise ValueError("race() needs at least one coroutine")
        raise ExceptionGroup("All coroutines have failed in race()", errors)
    finally:
        try:
            await feed.close()
        finally:
            errors = []


async def map_safe(
    func: Callable[[Any], Awaitable[T]],
    items: Iterable[Any] | AsyncIterable[Any],
    *,
    limit: int,
    ordered: bool = True,
    context: contextvars.Context | None = None,
) -> AsyncGenerator[T, None]:
    """Yield ``await func(item)`` for each item, so many at once.

    Parameters:
        func: returns a coroutine for an item.
        items: an iterable or async iterable, which may be endless: it is read only as
            far as there is room.
        limit: how many run at once.
        ordered: yield in the order of the items; at most as many finished results as
            *limit* then wait for one that is slow. Otherwise in the order of ending.
        context: the :class:`contextvars.Context` of all children; by default a copy each.

    The first failure is raised, after the rest was cancelled and awaited. To leave the
    loop early, wrap the generator in :func:`aclosing`.

    Since aiotools 3.0.
    """
    if limit is None:
        raise TypeError("limit must be an int, not None")
    _check_limit(limit)
    source = _calls_async(func, items) if hasattr(type(items), "__aiter__") else _calls(func, items)
    feed = _Feed(crew := _Crew(), source, limit, context)
    waiting: dict[int, T] = {}
    head = 0
    try:
        while True:
            for index, task in feed.take():
                if ordered:
                    waiting[index] = task.result()
                else:
                    yield task.result()
            while head in waiting:
                yield waiting.pop(head)
                head += 1
            feed.fill(limit - len(waiting) if ordered else None)
            if feed.is_over and not crew.pending:
                return
            if not crew.pending:
                await crew.wait()
    finally:
        await feed.close()


def _calls(func: Any, items: Any) -> Any:
    for item in items:
        yield func(item)


async def _calls_async(func: Any, items: Any) -> Any:
    async for item in items:
        yield func(item)
