"""A task group that fails with its first child, as asyncio's does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from .._aiotools import _current_taskgroup as current_taskgroup
from .._aiotools import _TaskGroupCore
from .common import next_name
from .types import TaskGroupError, _make_group_error

__all__ = (
    "TaskGroup",
    "current_taskgroup",
)


class TaskGroup(_TaskGroupCore, asyncio.TaskGroup):  # type: ignore[misc]
    """An :class:`asyncio.TaskGroup` with a name, a :data:`current_taskgroup`, and all that Python 3.15 has.

    Parameters:
        name: made a ``str``; by default ``tg-1``, ``tg-2``, ...

    When a child fails, its siblings and the body are cancelled, and the block raises a
    :exc:`TaskGroupError` of all failures, which is an :exc:`ExceptionGroup` too when
    all of them are ordinary exceptions. ``cancel()`` ends the block early without an
    error, on every supported Python.

    While the block is open, ``current_taskgroup`` is this group, in child tasks as well.

    Since aiotools 1.0.
    """

    def __init__(self, *, name: object = None) -> None:
        super().__init__()
        self._name = next_name() if name is None else str(name)

    def get_name(self) -> str:
        """The name."""
        return self._name

    def _make_error(self, errors: Sequence[BaseException]) -> TaskGroupError:
        return _make_group_error("unhandled errors in a TaskGroup", errors)
