"""Context managers: made of generators, entered in groups, and small ones for everyday use."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from types import TracebackType
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

from ._aiotools import (
    AsyncContextManager,
    _abort_run,
    _make_manager,
    _quicken_helper,
    _run_each,
    closing_async,
    resetting,
)
from .utils import _check_limit

__all__ = (
    "AsyncContextGroup",
    "AsyncContextManager",
    "AsyncExitStack",
    "aclosing",
    "actxgroup",
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

    if sys.version_info >= (3, 12):
        return cast("Callable[_P, AsyncContextManager[_T]]", _quicken_helper(helper))

    @functools.wraps(func)
    def old_helper(*args: Any, **kwds: Any) -> Any:
        return _make_manager(func, args, kwds)

    return cast("Callable[_P, AsyncContextManager[_T]]", old_helper)


actxmgr = async_ctx_manager


_ExcInfo: TypeAlias = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]

# How a manager was entered or left; the first three come from _run_each().
_NOT_RUN, _RETURNED, _RAISED, _SKIPPED = range(4)


def _is_base_error(exc: BaseException | None) -> bool:
    return isinstance(exc, (SystemExit, KeyboardInterrupt))


class AsyncContextGroup:
    """A group of asynchronous context managers, entered and left at once.

    ::

        async with AsyncContextGroup([connect(a), connect(b)]) as connections:
            ...

        group = AsyncContextGroup({"db": db, "http": http}, strict=True)
        group.add(cache, key="cache", after=db)
        async with group as services:
            services["cache"].get(...)

    Parameters:
        context_managers: an iterable of asynchronous context managers; or a mapping, which
            gives the block a mapping of values with the same keys.
        strict: raise when one of them fails, instead of reporting it; see below.
        limit: how many may be entering, or leaving, at a time; ``None``: all.
        sequential_exit: leave them one after the other, last added first.
        same_task: enter and leave them in the caller's task and context, one after the other, in
            the order of :meth:`add` and back, as :class:`contextlib.AsyncExitStack` does; for managers
            that must be left by the task that entered them.
        rollback_timeout: how many seconds the managers that were entered have to leave again
            when entering the group fails or is cancelled, before that is cancelled, which counts as
            a failure to leave, a :exc:`TimeoutError`; ``None``: no limit.

    The block gets a list of the values of all ``__aenter__``, in the order of the managers (or
    a dict).  At its end the list is emptied, and all managers get the exception of the block, if
    there is one, whatever the others do with it; a true result of ``__aexit__`` does not suppress
    it.

    By default failures are reported, not raised.  A manager that fails to enter has its exception
    in the place of its value, and the block runs; what ``__aexit__`` returns or raises is found in
    :meth:`exit_states`, and managers that failed to enter are left as well.

    With *strict*, the first manager that fails to enter keeps the block from running: the others
    are cancelled, those that were entered are left, and an :exc:`ExceptionGroup` of all failures is
    raised.  Failures at the end of the block are raised as a group as well.  Only managers that
    were entered are left.  A :exc:`~asyncio.CancelledError` or a base error is never replaced by a
    group, which becomes its context then.

    In both modes nothing remains entered when the caller is cancelled while it enters: what was
    entered is left, which another cancellation does not interrupt (with *same_task* it does),
    and then the :exc:`~asyncio.CancelledError` is raised.  Cancelled while it leaves, the request
    is passed on to the managers that are leaving, all of them are left nevertheless, and the
    :exc:`~asyncio.CancelledError` is raised at the end.  :exc:`SystemExit` and
    :exc:`KeyboardInterrupt` of a manager are always raised.

    Tasks and contexts: unless *same_task* is given, each ``__aenter__`` and each ``__aexit__`` runs
    in a task other than the caller's, with a copy of the caller's context of its own.  One that
    suspends has this task for itself from then on; those that do not suspend share a
    task with one another and with the next one that does.  Managers begin in order.  The tasks are
    made by ``loop.create_task()`` where that was replaced or a task factory is set.  Elsewhere, from
    Python 3.12 on, they start eagerly: managers may begin before the caller suspends, and if none
    of them suspends, the caller does not either.  From 3.14 on the call graph shows the tasks as
    awaited by the caller.

    Raises:
        TypeError: a member is no asynchronous context manager, or *limit* no int, or *rollback_timeout*
            no number.
        ValueError: *limit* is less than 1, or *rollback_timeout* negative.
        RuntimeError: when entered while it is entered already.

    The alias is ``actxgroup``.  A group may be used again after the block, if its managers may.
    """

    def __init__(
        self,
        context_managers: Iterable[AbstractAsyncContextManager[Any, Any]]
        | Mapping[Any, AbstractAsyncContextManager[Any, Any]]
        | None = None,
        *,
        strict: bool = False,
        limit: int | None = None,
        sequential_exit: bool = False,
        same_task: bool = False,
        rollback_timeout: float | None = None,
    ) -> None:
        _check_limit(limit)
        if rollback_timeout is not None:
            if not isinstance(rollback_timeout, (int, float)):
                raise TypeError(
                    f"rollback_timeout must be a number of seconds or None, not {type(rollback_timeout).__name__!r}"
                )
            # The negation is there for NaN.
            if not rollback_timeout >= 0:
                raise ValueError(f"rollback_timeout must be None or >= 0, not {rollback_timeout!r}")
        self._strict = strict
        self._limit = sys.maxsize if limit is None else limit
        self._sequential_exit = sequential_exit
        self._same_task = same_task
        self._rollback_timeout = rollback_timeout
        self._keys: list[Any] | None = None
        self._managers: list[Any]
        if isinstance(context_managers, Mapping):
            self._keys = list(context_managers.keys())
            self._managers = list(context_managers.values())
        else:
            self._managers = [] if context_managers is None else list(context_managers)
        # The places of those that each manager has to be entered after, and its level.
        self._after: dict[int, tuple[int, ...]] = {}
        self._levels: dict[int, int] = {}
        self._entered = False
        self._values: list[Any] = []
        self._mapping: dict[Any, Any] | None = None
        self._statuses = bytearray()
        self._exit_states: list[Any] = []
        self._check(self._managers)

    def __repr__(self) -> str:
        state = " entered" if self._entered else ""
        return f"<{type(self).__name__} managers={len(self._managers)}{state}>"

    @staticmethod
    def _check(managers: Sequence[Any]) -> None:
        # There are fewer types than managers.
        for cls in set(map(type, managers)):
            if not (hasattr(cls, "__aenter__") and hasattr(cls, "__aexit__")):
                raise TypeError(f"{cls.__name__!r} object does not support the asynchronous context manager protocol")

    def add(
        self,
        cm: AbstractAsyncContextManager[Any, Any],
        *,
        after: Any = None,
        key: Hashable = None,
    ) -> None:
        """Add a manager to the group.

        Parameters:
            cm: an asynchronous context manager.
            after: a manager of the group that has to be entered before this one, and left after it,
                or a list, tuple or set of them; in a group made of a mapping also their keys.
                Managers that depend on one another form levels, which are entered in turn
                and left in reverse; those of one level at once.  If one that this depends on
                fails to enter, this one is not entered: its value is a :exc:`RuntimeError` then.
            key: in a group made of a mapping, the key of its value.

        Raises:
            TypeError: *cm* is no asynchronous context manager, or *key* is missing, or not
                possible.
            ValueError: what *after* names is not in the group, or *key* is in use.
            RuntimeError: the group is entered.
        """
        if self._entered:
            raise RuntimeError("a context manager cannot be added while the group is entered")
        self._check([cm])
        if self._keys is None:
            if key is not None:
                raise TypeError("only groups made of a mapping have keys")
        elif key is None:
            raise TypeError("a group made of a mapping needs a key for each manager")
        elif key in self._keys:
            raise ValueError(f"the key {key!r} is in use")
        if after is not None:
            names = after if isinstance(after, (list, tuple, set, frozenset)) else [after]
            places = tuple(self._place(name) for name in names)
            place = len(self._managers)
            self._after[place] = places
            self._levels[place] = 1 + max((self._levels.get(p, 0) for p in places), default=-1)
        self._managers.append(cm)
        if self._keys is not None:
            self._keys.append(key)

    def _place(self, name: Any) -> int:
        for place, manager in enumerate(self._managers):
            if manager is name:
                return place
        if self._keys is not None and name in self._keys:
            return self._keys.index(name)
        raise ValueError(f"{name!r} is not in the group")

    def exit_states(self) -> list[Any]:
        """What the managers' ``__aexit__`` returned or raised, in their order; empty before.

        Always the same list object.  ``None`` stands for managers that were not left because they
        were never entered.
        """
        return self._exit_states

    # -- Entering --

    async def __aenter__(self) -> Any:
        if self._entered:
            raise RuntimeError("the group is entered already")
        self._entered = True
        count = len(self._managers)
        self._exit_states.clear()
        self._values = [None] * count
        self._statuses = bytearray(count)
        try:
            if self._same_task:
                await self._enter_in_this_task()
            elif self._levels:
                await self._enter_by_level()
            else:
                await _run_each(
                    self._managers, "__aenter__", (), self._values, self._statuses,
                    self._limit, False, False, self._strict,
                )  # fmt: skip
                self._raise_failures_if_strict()
        except GeneratorExit:
            # Closed in the middle: nothing can be awaited any more.
            self._entered = False
            raise
        except BaseException as exc:
            try:
                await self._roll_back(exc)
            finally:
                self._entered = False
                self._values.clear()
            raise
        if self._keys is not None:
            self._mapping = dict(zip(self._keys, self._values, strict=True))
            return self._mapping
        return self._values

    def _places_by_level(self) -> list[list[int]]:
        by_level: dict[int, list[int]] = {}
        for place in range(len(self._managers)):
            by_level.setdefault(self._levels.get(place, 0), []).append(place)
        return [by_level[level] for level in sorted(by_level)]

    def _skip(self, place: int) -> bool:
        """Whether a manager cannot be entered because of one that it depends on."""
        for dependency in self._after.get(place, ()):
            if self._statuses[dependency] != _RETURNED:
                error = RuntimeError("not entered: a context manager that this one depends on was not entered")
                error.__cause__ = self._values[dependency]
                self._values[place] = error
                self._statuses[place] = _SKIPPED
                return True
        return False

    async def _enter_by_level(self) -> None:
        for level in self._places_by_level():
            places = [place for place in level if not self._skip(place)]
            values, statuses = [None] * len(places), bytearray(len(places))
            try:
                await _run_each(
                    [self._managers[place] for place in places], "__aenter__", (), values, statuses,
                    self._limit, False, False, self._strict,
                )  # fmt: skip
            finally:
                for place, value, status in zip(places, values, statuses, strict=True):
                    self._values[place] = value
                    self._statuses[place] = status
            self._raise_failures_if_strict()

    async def _enter_in_this_task(self) -> None:
        for place, manager in enumerate(self._managers):
            if self._skip(place):
                continue
            try:
                self._values[place] = await manager.__aenter__()
            except (asyncio.CancelledError, GeneratorExit, SystemExit, KeyboardInterrupt):
                raise
            except BaseException as exc:
                self._values[place] = exc
                self._statuses[place] = _RAISED
                self._raise_failures_if_strict()
            else:
                self._statuses[place] = _RETURNED

    def _enter_failures(self) -> BaseExceptionGroup[BaseException] | None:
        if not self._strict or _RAISED not in self._statuses:
            return None
        failed = [value for value, status in zip(self._values, self._statuses, strict=True) if status == _RAISED]
        # The first one had the others cancelled.
        failures = [exc for exc in failed if not isinstance(exc, asyncio.CancelledError)]
        return BaseExceptionGroup("context managers of the group failed to enter", failures or failed)

    def _raise_failures_if_strict(self) -> None:
        failures = self._enter_failures()
        if failures is not None:
            raise failures

    async def _roll_back(self, exc: BaseException) -> None:
        """Leave what was entered; raises if there is something else to raise than *exc*."""
        places = [place for place, status in enumerate(self._statuses) if status == _RETURNED]
        info = (type(exc), exc, exc.__traceback__)
        raised, stop, is_late = await self._leave(places, info, rollback=True)
        failures = self._failures(raised, exc, stop, is_late) if self._strict else []
        group: BaseExceptionGroup[BaseException] | None = None
        try:
            if isinstance(exc, BaseExceptionGroup) and failures:
                group = BaseExceptionGroup(
                    "context managers of the group failed to enter, and to leave again",
                    [*exc.exceptions, *failures],
                )
            elif failures:
                group = BaseExceptionGroup("context managers of the group failed to leave", failures)
            elif not isinstance(exc, BaseExceptionGroup):
                group = self._enter_failures()
            if stop is not None and type(stop) is not type(exc):
                stop.__context__ = group if group is not None else exc
                raise stop
            if isinstance(exc, BaseExceptionGroup):
                if group is not None:
                    raise group from None
            elif group is not None:
                # A cancellation or a base error says that the block does not run. This is why else.
                exc.__context__ = group
        finally:
            del exc, info, stop, failures, group

    # -- Leaving --

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._values.clear()
        if self._mapping is not None:
            self._mapping.clear()
            self._mapping = None
        to_leave = (_RETURNED,) if self._strict else (_RETURNED, _RAISED)
        places = [place for place, status in enumerate(self._statuses) if status in to_leave]
        try:
            info = (exc_type, exc, traceback)
            if self._same_task or self._sequential_exit or self._levels:
                raised, stop, _ = await self._leave(places, info, rollback=False)
            else:
                self._exit_states[:] = [None] * len(self._managers)
                raised = []
                stop = await self._leave_batch(places, info, raised, False, None)
        finally:
            self._entered = False
        failures = self._failures(raised, exc, stop) if self._strict else []
        group = BaseExceptionGroup("context managers of the group failed to leave", failures) if failures else None
        try:
            if stop is not None:
                if group is not None:
                    stop.__context__ = group
                raise stop
            if group is not None and (exc is None or isinstance(exc, Exception)):
                raise group
            if group is not None and exc is not None:
                # A cancellation or a base error must not be replaced.
                exc.__context__ = group
        finally:
            # Tracebacks refer to this frame.
            del exc, traceback, info, stop, failures, group
        return False

    def _failures(
        self, raised: list[int], exc: BaseException | None, stop: BaseException | None, is_late: bool = False
    ) -> list[BaseException]:
        failures: list[BaseException] = []
        for place in sorted(raised):
            state = self._exit_states[place]
            if state is exc:
                # One that raises the block's exception again has passed it on.
                continue
            if isinstance(state, asyncio.CancelledError):
                if is_late:
                    late = TimeoutError(f"{self._name(place)} did not leave within {self._rollback_timeout:g} seconds")
                    late.__cause__ = state
                    failures.append(late)
                    continue
                if stop is not None or isinstance(exc, asyncio.CancelledError):
                    # The caller's cancellation was passed on to it.
                    continue
            failures.append(state)
        return failures

    def _name(self, place: int) -> str:
        name = place if self._keys is None else self._keys[place]
        return f"context manager {name!r} ({type(self._managers[place]).__qualname__})"

    async def _leave(
        self, places: list[int], info: _ExcInfo, *, rollback: bool
    ) -> tuple[list[int], BaseException | None, bool]:
        """Leave these managers, whatever happens.

        Returns the places of those that raised; what has to be raised now: a cancellation of the
        caller, or a base error; and whether the time for rolling back was not enough.
        """
        self._exit_states[:] = [None] * len(self._managers)
        if self._same_task or self._sequential_exit:
            batches = [[place] for place in reversed(places)]
        elif self._levels:
            left = set(places)
            batches = [[place for place in level if place in left] for level in reversed(self._places_by_level())]
        else:
            batches = [places]
        timer = abort = None
        if rollback and self._rollback_timeout is not None:
            abort = _Abort()
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._rollback_timeout, abort.now)
        raised: list[int] = []
        stop: BaseException | None = None
        try:
            for batch in batches:
                leave = self._leave_in_this_task if self._same_task else self._leave_batch
                error = await leave(batch, info, raised, rollback, abort)
                # A base error is more than a cancellation, and the first one counts.
                if stop is None or (_is_base_error(error) and not _is_base_error(stop)):
                    stop = error
        finally:
            if timer is not None:
                timer.cancel()
        return raised, stop, abort is not None and abort.is_due

    async def _leave_batch(
        self,
        places: list[int],
        info: _ExcInfo,
        raised: list[int],
        rollback: bool,
        abort: _Abort | None,
    ) -> BaseException | None:
        stop: BaseException | None = None
        in_this_task = False
        while places:
            everybody = len(places) == len(self._managers)
            managers = self._managers if everybody else [self._managers[place] for place in places]
            states: list[Any] = [None] * len(places)
            statuses = bytearray(len(places))
            run = _run_each(managers, "__aexit__", info, states, statuses, self._limit, True, rollback, False)
            try:
                if abort is not None:
                    abort.watch(run)
                await run
            except (asyncio.CancelledError, SystemExit, KeyboardInterrupt) as exc:
                stop = exc
            except Exception as exc:
                # No task could be made.
                stop = exc
                in_this_task = True
            finally:
                if everybody:
                    self._exit_states[:] = states
                else:
                    for place, state in zip(places, states, strict=True):
                        self._exit_states[place] = state
                if _RAISED in statuses:
                    raised += [place for place, status in zip(places, statuses, strict=True) if status == _RAISED]
            if _NOT_RUN not in statuses:
                break
            # A task that somebody cancels before it has begun leaves some undone.
            places = [place for place, status in zip(places, statuses, strict=True) if status == _NOT_RUN]
            if in_this_task:
                for place in places:
                    await self._leave_in_this_task([place], info, raised, rollback, abort)
                break
        return stop

    async def _leave_in_this_task(
        self,
        places: list[int],
        info: _ExcInfo,
        raised: list[int],
        rollback: bool,
        abort: _Abort | None,
    ) -> BaseException | None:
        [place] = places
        try:
            if abort is not None:
                abort.watch(asyncio.current_task())
            self._exit_states[place] = await self._managers[place].__aexit__(*info)
        except GeneratorExit:
            raise
        except BaseException as exc:
            self._exit_states[place] = exc
            raised.append(place)
            if abort is not None and isinstance(exc, asyncio.CancelledError) and abort.take_back():
                return None
            if isinstance(exc, (asyncio.CancelledError, SystemExit, KeyboardInterrupt)):
                return exc
        finally:
            if abort is not None:
                abort.watch(None)
        return None


class _Abort:
    """Cancels what is going on when the time for rolling back is up, and what goes on after that."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.is_due = False
        self.requests = 0
        self.requests_before = task.cancelling()
        self.watched: Any = None

    def watch(self, what: Any) -> None:
        self.watched = what
        if self.is_due:
            self.cancel()

    def now(self) -> None:
        self.is_due = True
        self.cancel()

    def cancel(self) -> None:
        if isinstance(self.watched, asyncio.Future):
            self.requests += 1
            self.watched.cancel()
        elif self.watched is not None:
            _abort_run(self.watched)

    def take_back(self) -> bool:
        """Whether the CancelledError in hand is of this, and of nobody else."""
        if not self.requests:
            return False
        task = asyncio.current_task()
        assert task is not None
        while self.requests:
            self.requests -= 1
            remaining = task.uncancel()
        return remaining <= self.requests_before


actxgroup = AsyncContextGroup
