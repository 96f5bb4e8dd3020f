"""A task group that outlives the failures of its children. Deprecated: use TaskScope."""

from __future__ import annotations

import asyncio
import itertools
import sys
import warnings
import weakref
from collections.abc import Coroutine
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, TypeVar

from .common import print_exception
from .types import AsyncExceptionHandler

__all__ = (
    "PersistentTaskGroup",
    "current_ptaskgroup",
)

T = TypeVar("T")

#: the innermost :class:`PersistentTaskGroup` whose block is open; no default
current_ptaskgroup: ContextVar[PersistentTaskGroup] = ContextVar("current_ptaskgroup")

_numbers = itertools.count()
_unfinished_groups: weakref.WeakSet[PersistentTaskGroup] = weakref.WeakSet()
_DEPRECATED = "Use aiotools.TaskScope instead."


class PersistentTaskGroup:
    """Runs children whose failures disturb nobody; deprecated in favour of :class:`~aiotools.TaskScope`.

    Parameters:
        name: made a ``str``; by default a running number.
        exception_handler: coroutine function ``(exc_type, exc, tb)``, awaited in the task of
            a child that failed; by default it prints the traceback to stderr.

    Use it as ``async with``, or keep it as an attribute and ``await`` its
    :meth:`shutdown`. It must be constructed inside a task (:exc:`RuntimeError`).
    Instantiating and subclassing it warn with :exc:`DeprecationWarning`.

    Children may be added while others are being cancelled: they run to their ends,
    and are awaited.

    Since aiotools 1.4; deprecated since 2.0.
    """

    #: where type checkers and other tools look
    __deprecated__ = _DEPRECATED

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        warnings.warn(_DEPRECATED, DeprecationWarning, stacklevel=2)

    def __init__(self, *, name: object = None, exception_handler: AsyncExceptionHandler | None = None) -> None:
        if type(self) is PersistentTaskGroup:
            # A subclass was warned about when it was made.
            warnings.warn(_DEPRECATED, DeprecationWarning, stacklevel=2)
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("PersistentTaskGroup() must be constructed within a task")
        self._parent_task: asyncio.Task[Any] | None = task
        self._name = str(next(_numbers)) if name is None else str(name)
        self._exception_handler: AsyncExceptionHandler = (
            print_exception if exception_handler is None else exception_handler
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unfinished_tasks = 0
        self._entered = False
        self._exiting = False
        self._exited = False
        self._aborting = False
        self._creating = False
        self._base_error: BaseException | None = None
        self._all_done: asyncio.Future[None] | None = None
        self._token: Token[PersistentTaskGroup] | None = None
        _unfinished_groups.add(self)

    @classmethod
    def all_ptaskgroups(cls) -> list[PersistentTaskGroup]:
        """The groups that are not finished yet."""
        return [group for group in _unfinished_groups if not group._exited]

    def get_name(self) -> str:
        """The name."""
        return self._name

    def __repr__(self) -> str:
        info = [f" name={self._name}"]
        if self._tasks:
            info.append(f"tasks={len(self._tasks)}")
        if self._unfinished_tasks:
            info.append(f"unfinished={self._unfinished_tasks}")
        if self._aborting:
            info.append("cancelling")
        elif self._entered:
            info.append("entered")
        return f"<{type(self).__name__}({' '.join(info)})>"

    def create_task(self, coro: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Future[T]:
        """Start a coroutine as a child; return a future of its result.

        Cancelling the future does not cancel the child. A future that nobody keeps
        gets neither result nor exception, and nothing is logged for it.

        Raises:
            RuntimeError: the block has ended.
        """
        if self._exiting and self._unfinished_tasks == 0:
            coro.close()
            raise RuntimeError(f"{type(self).__name__} {self!r} is finished")
        self._entered = True
        future: asyncio.Future[T] = self._loop.create_future()
        reference = weakref.ref(future)
        # Counted before the task exists: an eager one may end inside create_task().
        self._unfinished_tasks += 1
        creating, self._creating = self._creating, True
        try:
            task = self._loop.create_task(self._run(coro, reference), name=name)
        except BaseException:
            self._unfinished_tasks -= 1
            coro.close()
            raise
        finally:
            self._creating = creating
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._on_done(task, coro, reference))
        try:
            return future
        finally:
            # The traceback of an eager failure refers to this frame.
            del future, task

    async def _run(self, coro: Coroutine[Any, Any, T], reference: weakref.ref[asyncio.Future[T]]) -> None:
        try:
            result = await coro
        except asyncio.CancelledError:
            raise
        except BaseException as exc:
            self._settle(reference, None, exc)
            await self._handle()
            if isinstance(exc, (SystemExit, KeyboardInterrupt)):
                raise
        else:
            self._settle(reference, result, None)

    def _settle(self, reference: weakref.ref[asyncio.Future[T]], result: Any, exc: BaseException | None) -> None:
        """Complete the future, if somebody keeps it."""
        if self._creating:
            # An eager task ends inside create_task(): nobody had a chance to keep it yet.
            self._loop.call_soon(self._settle, reference, result, exc)
            return
        future = reference()
        if future is None or future.done():
            return
        if exc is None:
            future.set_result(result)
            return
        future.set_exception(exc)
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            # The loop raises it: not to be logged as well.
            future.exception()

    async def _handle(self) -> None:
        """Call the handler; the failure is being handled."""
        try:
            await self._exception_handler(*sys.exc_info())
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            # From the loop: it runs its handler in the task's context, which is entered here.
            self._loop.call_soon(
                self._loop.call_exception_handler,
                {
                    "message": f"the exception handler of {self!r} failed",
                    "exception": exc,
                    "task": asyncio.current_task(),
                },
            )

    def _on_done(
        self, task: asyncio.Task[Any], coro: Coroutine[Any, Any, T], reference: weakref.ref[asyncio.Future[T]]
    ) -> None:
        self._tasks.discard(task)
        self._unfinished_tasks -= 1
        if task.cancelled():
            # It may never have started.
            coro.close()
            if (future := reference()) is not None and not future.done():
                future.cancel()
        elif (exc := task.exception()) is not None and self._base_error is None:
            self._base_error = exc
            self._abort()
        if self._unfinished_tasks == 0 and self._all_done is not None and not self._all_done.done():
            self._all_done.set_result(None)

    def _abort(self) -> None:
        # Once is enough for each; those that came after an earlier time get theirs now.
        again, self._aborting = self._aborting, True
        for task in list(self._tasks):
            if not again or not task.cancelling():
                task.cancel()

    async def _join(self) -> asyncio.CancelledError | None:
        """Wait for the children; a cancellation meanwhile cancels them and is returned at the end."""
        cancelled = None
        while self._unfinished_tasks:
            if self._all_done is None or self._all_done.done():
                self._all_done = self._loop.create_future()
            try:
                await asyncio.shield(self._all_done)
            except asyncio.CancelledError as exc:
                cancelled = cancelled or exc
                if not self._aborting:
                    self._abort()
        return cancelled

    async def shutdown(self) -> None:
        """Cancel the children and wait until they are gone, with those that they add meanwhile.

        May be called from any task, repeatedly, and after the block ended. Called by a
        child, it waits for the others. The body of the block goes on.
        """
        self._abort()
        current = asyncio.current_task()
        while others := [task for task in self._tasks if task is not current]:
            await asyncio.wait(others)
        if not self._exiting and self._token is None:
            self._finish()

    def _finish(self) -> None:
        self._exited = True
        self._parent_task = None
        _unfinished_groups.discard(self)

    async def __aenter__(self) -> PersistentTaskGroup:
        """Open the block; the running task becomes the parent."""
        if self._token is not None or self._exiting:
            raise RuntimeError(f"{type(self).__name__} {self!r} has already been entered")
        # It may have been shut down before.
        self._exited = False
        _unfinished_groups.add(self)
        self._parent_task = asyncio.current_task()
        self._entered = True
        self._token = current_ptaskgroup.set(self)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool | None:
        """Wait for the children; an exception of the body cancels them first."""
        self._exiting = True
        try:
            if exc is not None and not self._aborting:
                self._abort()
            cancelled = await self._join()
            if self._base_error is not None and exc is None:
                raise self._base_error
            if cancelled is not None and (exc is None or isinstance(exc, Exception)):
                # A request to the parent is never lost; what the body failed with is its context.
                raise cancelled
            return None
        finally:
            token, self._token = self._token, None
            if token is not None:
                current_ptaskgroup.reset(token)
            self._finish()
            self._base_error = None
            exc = cancelled = None
