"""Cancel tasks and wait for their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ._aiotools import cancel_and_wait
from ._trace import CancelRequest, cancel_requests, trace_cancellation

__all__ = (
    "CancelRequest",
    "UnfinishedTasksError",
    "cancel_and_wait",
    "cancel_requests",
    "trace_cancellation",
)


class UnfinishedTasksError(TimeoutError):
    """Tasks went on after they were cancelled and given time.

    Raised by ``cancel_and_wait(..., timeout=...)`` and ``aclose(timeout=...)``; the
    message says of each task where it stands.
    """

    #: the tasks that were still running
    tasks: Sequence[asyncio.Task[Any]]

    def __init__(self, message: str, tasks: Sequence[asyncio.Task[Any]] = ()) -> None:
        super().__init__(message)
        self.tasks = tasks


def _where(task: asyncio.Task[Any]) -> str:
    """The places in Python code that a suspended task waits in, from its own coroutine to the innermost one."""
    coro: Any = task.get_coro()
    places = []
    while coro is not None:
        frame = getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None) or getattr(coro, "ag_frame", None)
        if frame is not None:
            places.append(f"{frame.f_code.co_qualname} at {frame.f_code.co_filename}:{frame.f_lineno}")
        coro = getattr(coro, "cr_await", None) or getattr(coro, "gi_yieldfrom", None) or getattr(coro, "ag_await", None)
    return " > ".join(places) or "not in Python code"


def _unfinished(tasks: Sequence[asyncio.Task[Any]], timeout: float) -> UnfinishedTasksError:
    lines = [f"{len(tasks)} task{'s' * (len(tasks) != 1)} did not end within {timeout:g} seconds of being cancelled:"]
    lines += [f"  {task.get_name()}: {_where(task)}" for task in tasks]
    return UnfinishedTasksError("\n".join(lines), tuple(tasks))
