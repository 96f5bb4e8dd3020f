"""Who cancelled me: opt-in records of each cancel request."""

from __future__ import annotations

import asyncio
import functools
import sys
import time
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any

__all__ = ("CancelRequest", "cancel_requests", "trace_cancellation")


@dataclass(frozen=True)
class CancelRequest:
    """One call of a task's ``cancel()``."""

    #: the message of the call, or None
    message: Any
    #: the name of the task that made the call; None in a callback of the loop or without a loop
    task_name: str | None
    #: where the call stands in the program
    filename: str
    lineno: int
    function: str
    #: time.time() of the call
    when: float

    def __str__(self) -> str:
        who = f"task {self.task_name!r}" if self.task_name is not None else "a callback"
        return f"cancelled by {who} in {self.function} at {self.filename}:{self.lineno}"


class _Message(str):
    """A cancellation's message that knows all requests made to the task so far."""

    __slots__ = ("requests",)
    requests: list[CancelRequest]


def cancel_requests(source: asyncio.CancelledError | asyncio.Task[Any], /) -> list[CancelRequest]:
    """The cancel requests that were recorded for a task, oldest first.

    Parameters:
        source: a task, or the :exc:`~asyncio.CancelledError` that it got.

    Returns an empty list when nothing was traced.
    """
    if isinstance(source, asyncio.CancelledError):
        for arg in source.args:
            if isinstance(arg, _Message):
                return list(arg.requests)
    return list(getattr(source, "_aiotools_cancel_requests", ()))


def _note(requests: list[CancelRequest], msg: Any) -> Any:
    """Records a request that the code that calls this module makes. Returns the message that stands for it."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    try:
        current = asyncio.current_task()
    except RuntimeError:
        current = None
    code = frame.f_code
    requests.append(
        CancelRequest(
            None if msg is None else str(msg),
            None if current is None else current.get_name(),
            code.co_filename,
            frame.f_lineno,
            code.co_qualname,
            time.time(),
        )
    )
    if msg is not None and not isinstance(msg, str):
        return msg
    message = _Message(requests[-1] if msg is None else f"{msg} ({requests[-1]})")
    message.requests = requests
    return message


def _tell(exc: asyncio.CancelledError, requests: list[CancelRequest]) -> None:
    """What a shield raises has no message: let a note say who it was."""
    exc._aiotools_cancel_requests = requests  # type: ignore[attr-defined]
    for request in requests[-1:]:
        exc.add_note(str(request) if request.message is None else f"{request.message} ({request})")


def _beneath(task: asyncio.Task[Any]) -> Any:
    """What stands behind a shield that the task is in, or None."""
    patch = getattr(task.cancel, "__self__", None)
    return patch if hasattr(type(patch), "_beneath") else None


class trace_cancellation:
    """While the block runs, record for each cancel request of the tasks created in it who made it.

    ``with aiotools.trace_cancellation():`` in a running loop. Each request keeps its
    message, the requesting task, file, line, function and time; :func:`cancel_requests`
    reads them from a task or from the :exc:`~asyncio.CancelledError` that it got, whose
    message names the latest one, so that a task that dies cancelled shows it.

    It wraps the loop's task factory, so it covers tasks that are created in the loop
    after entry; those that exist already are not traced. When the block is left, the
    factory and the tasks are as they were. A request that a shield holds off is noted
    when it is made. A task that is started eagerly is traced from its first suspension
    on.

    Raises:
        RuntimeError: no loop is running, or its task factory cannot be set.

    It costs nothing when it is not used.
    """

    __slots__ = ("_before", "_factory", "_is_over", "_loop", "_tasks")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._before: Any = None
        self._factory: Any = None
        self._is_over = False
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    def __enter__(self) -> trace_cancellation:
        if self._loop is not None:
            raise RuntimeError("trace_cancellation() has already been entered")
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()
        factory = functools.partial(self._make_task, before)
        try:
            loop.set_task_factory(factory)
        except NotImplementedError:
            raise RuntimeError(
                f"no task of this loop can be traced: {type(loop).__name__!r} objects take no task factory"
            ) from None
        self._loop, self._before, self._factory = loop, before, factory
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        loop = self._loop
        assert loop is not None
        if loop.get_task_factory() is self._factory:
            loop.set_task_factory(self._before)
        for task in self._tasks:
            patch = _beneath(task)
            cancel: Any = task.cancel if patch is None else patch._beneath
            if getattr(cancel, "_aiotools_trace", None) is not self:
                continue
            if patch is not None:
                patch._beneath = cancel._aiotools_before
            elif cancel._aiotools_before is None:
                del task.cancel
            else:
                task.cancel = cancel._aiotools_before  # type: ignore[method-assign]
        self._tasks.clear()
        self._is_over = True

    def _make_task(self, before: Any, loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> Any:
        task = asyncio.Task(coro, loop=loop, **kwargs) if before is None else before(loop, coro, **kwargs)
        if self._is_over:
            # Somebody wrapped our factory and keeps it.
            return task
        requests: list[CancelRequest] = []
        try:
            task._aiotools_cancel_requests = requests  # type: ignore[union-attr]
        except AttributeError:
            # A task of a foreign type that takes no attributes.
            return task
        # Started eagerly, it may be in a shield already: then we go beneath it.
        patch = _beneath(task)
        earlier: Any = task.cancel if patch is None else patch._beneath
        if getattr(earlier, "__self__", None) is task:
            # Its type's own method, which comes back when ours is deleted.
            earlier = None
        reference = weakref.ref(task)
        method = type(task).cancel

        def cancel(msg: Any = None) -> bool:
            target = reference()
            if target is None:
                return False
            if not (isinstance(msg, _Message) and msg.requests is requests):
                msg = _note(requests, msg)
            return method(target, msg) if earlier is None else earlier(msg)

        cancel._aiotools_note = lambda msg: _note(requests, msg)  # type: ignore[attr-defined]
        cancel._aiotools_trace = self  # type: ignore[attr-defined]
        cancel._aiotools_before = earlier  # type: ignore[attr-defined]
        if patch is None:
            task.cancel = cancel  # type: ignore[method-assign]
        else:
            patch._beneath = cancel
        self._tasks.add(task)
        return task
