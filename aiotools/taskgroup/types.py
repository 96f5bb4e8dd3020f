"""The errors of task groups, and the type of their handlers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

__all__ = (
    "AsyncExceptionHandler",
    "MultiError",
    "TaskGroupError",
)


class AsyncExceptionHandler(Protocol):
    """A coroutine function that a :class:`~aiotools.PersistentTaskGroup` awaits for each failure."""

    async def __call__(self, exc_type: type[BaseException], exc: BaseException, tb: TracebackType | None, /) -> None:
        """Called with what :func:`sys.exc_info` gives; its own failure goes to the loop's exception handler."""


class MultiError(BaseExceptionGroup[BaseException]):
    """Several errors at once: ``MultiError(msg, errors)``.

    Derives from :exc:`BaseExceptionGroup` alone, so ``except Exception`` does not
    catch it; ``except*`` does.
    """

    __errors__: Sequence[BaseException]

    def __new__(cls, msg: str, errors: Sequence[BaseException]) -> MultiError:
        self = super().__new__(cls, msg, errors)
        self.__errors__ = errors
        return self

    def __init__(self, msg: str, errors: Sequence[BaseException]) -> None:
        super().__init__(msg, errors)

    def get_error_types(self) -> set[type[BaseException]]:
        """The types of the errors."""
        return {type(error) for error in self.__errors__}


class TaskGroupError(MultiError):
    """What a :class:`~aiotools.TaskGroup` fails with.

    When all errors are ordinary exceptions, what a group raises is an
    :exc:`ExceptionGroup` as well.
    """


class _OrdinaryTaskGroupError(TaskGroupError, ExceptionGroup[Exception]):
    """A TaskGroupError of ordinary exceptions."""

    __doc__ = TaskGroupError.__doc__

    def __reduce__(self) -> tuple[Any, ...]:
        # It has the name of the public class, which pickle would find instead.
        return _make_group_error, (self.message, self.__errors__), self.__dict__ or None


_OrdinaryTaskGroupError.__name__ = _OrdinaryTaskGroupError.__qualname__ = "TaskGroupError"


def _make_group_error(message: str, errors: Sequence[BaseException]) -> TaskGroupError:
    ordinary = all(isinstance(error, Exception) for error in errors)
    kind: Any = _OrdinaryTaskGroupError if ordinary else TaskGroupError
    return kind(message, tuple(errors))  # type: ignore[no-any-return]
