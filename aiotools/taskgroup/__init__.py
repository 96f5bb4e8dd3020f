"""Task groups: one that fails with its first child, and one that outlives its failures."""

from __future__ import annotations

from .base import TaskGroup, current_taskgroup
from .persistent import PersistentTaskGroup, current_ptaskgroup
from .types import AsyncExceptionHandler, MultiError, TaskGroupError

__all__ = (
    "AsyncExceptionHandler",
    "MultiError",
    "PersistentTaskGroup",
    "TaskGroup",
    "TaskGroupError",
    "current_ptaskgroup",
    "current_taskgroup",
)
