"""What both kinds of groups share."""

from __future__ import annotations

import itertools
import traceback
from types import TracebackType

__all__ = ()

# Names are unique in a process: the one counter there is.
_names = itertools.count(1)


def next_name() -> str:
    """tg-1, tg-2, ..."""
    return f"tg-{next(_names)}"


async def print_exception(exc_type: type[BaseException], exc: BaseException, tb: TracebackType | None) -> None:
    """The default handler of persistent groups: the traceback, to stderr."""
    traceback.print_exception(exc_type, exc, tb)
