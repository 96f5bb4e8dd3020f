"""Idiomatic helpers for asyncio, with a core written in C."""

from ._aiotools import checkpoint, sleep, sleep_until
from ._version import __version__
from .compat import all_tasks, current_task, get_running_loop, set_task_name
from .defer import AsyncDeferFunc, AsyncDeferrable, DeferFunc, adefer, defer
from .func import apartial
from .iter import aiter
from .thread import LoopThread
from .types import AsyncClosable, AwaitableLike, CoroutineLike

__all__ = (
    "__version__",
    # compat
    "all_tasks",
    "current_task",
    "get_running_loop",
    "set_task_name",
    # defer
    "AsyncDeferFunc",
    "AsyncDeferrable",
    "DeferFunc",
    "adefer",
    "defer",
    # func
    "apartial",
    # iter
    "aiter",
    # sleep
    "checkpoint",
    "sleep",
    "sleep_until",
    # thread
    "LoopThread",
    # types
    "AsyncClosable",
    "AwaitableLike",
    "CoroutineLike",
)
