"""Small differences between Python versions and event loops, in one place."""

from __future__ import annotations

import asyncio
import warnings
from asyncio import all_tasks, get_running_loop
from typing import Any

__all__ = (
    "all_tasks",
    "current_task",
    "get_running_loop",
    "set_task_name",
)


def current_task() -> asyncio.Task[Any]:
    """Return the task that is running now; never ``None``.

    Unlike :func:`asyncio.current_task` this can be used without a check of the
    result.

    Raises:
        RuntimeError: the caller runs in a callback of the loop that belongs to no
            task, or there is no running event loop.
    """
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("this code runs in a callback of the event loop, not in a task")
    return task


def set_task_name(task: asyncio.Future[Any], name: str | None) -> None:
    """Name *task*, if it can be named.

    Parameters:
        task: a task, or what a third-party loop returns for one.
        name: the new name; ``None`` leaves the task as it is.

    A task without ``set_name`` is left unnamed, with a :exc:`DeprecationWarning`.
    """
    if name is None:
        return
    try:
        set_name = task.set_name  # type: ignore[attr-defined]
    except AttributeError:
        warnings.warn(
            f"{type(task).__name__!r} objects cannot be named: they have no set_name()",
            DeprecationWarning,
            stacklevel=2,
        )
    else:
        set_name(name)
