"""Owners of child tasks that live as long as an object does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias, TypedDict

from ._aiotools import TaskContext
from ._aiotools import _LoopExceptionHandler as LoopExceptionHandler

__all__ = (
    "ErrorArg",
    "ErrorCallback",
    "TaskContext",
)


class ErrorArg(TypedDict):
    """What an exception handler is called with."""

    #: what happened, in words
    message: str
    #: the failure
    exception: BaseException
    #: the child that failed
    task: asyncio.Task[Any]


#: An exception handler: called synchronously in the loop for each child that fails.
ErrorCallback: TypeAlias = Callable[[ErrorArg], None]

# A member of an enumeration, so that type checkers can tell "not given" from None.
_ = LoopExceptionHandler
