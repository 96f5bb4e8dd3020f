"""The two kinds of context manager that a server is made of, and their decorators.

Both are generators wrapped as context managers whose ``yield`` gives the stop signal.  The asynchronous
one is the core's, which :class:`aiotools.AsyncContextManager` shares; the other one is contextlib's but
for its clean exit.
"""

from __future__ import annotations

import functools
import inspect
import signal
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import _GeneratorContextManager
from typing import Any, Generic, TypeVar

from .._aiotools import SendingContextManager

__all__ = (
    "AsyncServerContextManager",
    "ServerMainContextManager",
    "is_server_context",
    "main_context",
    "server_context",
)

TYield = TypeVar("TYield")


class AsyncServerContextManager(SendingContextManager[TYield]):
    """What a worker is: an async context manager made from an async generator function.

    Like the one of :func:`contextlib.asynccontextmanager`, except that after a body without
    exception the generator's ``yield`` evaluates to :attr:`yield_return`, and that *func*, *args* and
    *kwargs* can be read at any time.

    :param func: the async generator function.
    :param args: positional arguments to call it with.
    :param kwargs: keyword arguments to call it with.
    :raises RuntimeError: *func* is no async generator function.
    """

    #: Result of the generator's ``yield`` on a clean exit.
    yield_return: Any = signal.SIGTERM

    def __init__(
        self,
        func: Callable[..., AsyncGenerator[TYield, signal.Signals]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        if not inspect.isasyncgenfunction(func):
            raise RuntimeError(f"a server context must be an async generator function, not {func!r}")
        super().__init__(func, args, kwargs)


class ServerMainContextManager(_GeneratorContextManager, Generic[TYield]):  # type: ignore[type-arg]
    """What surrounds the workers in the parent: a context manager made from a generator function.

    After a body without exception the generator's ``yield`` evaluates to :attr:`yield_return`.
    Usable as a decorator, too.

    :param func: the generator function.
    :param args: positional arguments to call it with.
    :param kwargs: keyword arguments to call it with.
    :raises RuntimeError: *func* is no generator function.
    """

    #: Result of the generator's ``yield`` on a clean exit.
    yield_return: Any = signal.SIGTERM

    def __init__(
        self,
        func: Callable[..., Generator[TYield, signal.Signals, None]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        if not inspect.isgeneratorfunction(func):
            raise RuntimeError(f"a main context must be a generator function, not {func!r}")
        super().__init__(func, args, kwargs)  # type: ignore[arg-type]
        self.kwargs = kwargs

    def _recreate_cm(self) -> ServerMainContextManager[TYield]:
        return type(self)(self.func, self.args, self.kwargs)  # type: ignore[arg-type]

    def __enter__(self) -> TYield:
        try:
            return next(self.gen)  # type: ignore[no-any-return]
        except StopIteration:
            raise RuntimeError("generator didn't yield") from None

    def __exit__(self, typ: Any, value: Any, tb: Any) -> bool | None:
        if typ is not None:
            return super().__exit__(typ, value, tb)
        try:
            self.gen.send(self.yield_return)
        except StopIteration:
            return False
        try:
            raise RuntimeError("generator didn't stop")
        finally:
            self.gen.close()


_MARK = "__aiotools_server_context__"


def is_server_context(obj: Any) -> bool:
    """Whether *obj* is a function decorated with :func:`server_context`."""
    while isinstance(obj, functools.partial):
        obj = obj.func
    return getattr(obj, _MARK, False) is True


def server_context(
    func: Callable[..., AsyncGenerator[TYield, signal.Signals]],
) -> Callable[..., AsyncServerContextManager[TYield]]:
    """Make a worker from an async generator function; also spelled ``@aiotools.server``.

    The function takes ``(loop, pidx, args)``: the running loop of the worker, its index, and the
    arguments for workers.  What comes before its only ``yield`` starts the worker, what comes after
    stops it; the ``yield`` evaluates to the signal that ended the wait.

    :returns: a function that makes an :class:`AsyncServerContextManager`, with the metadata of
        *func*.
    :raises RuntimeError: when called, if *func* is no async generator function.
    """

    @functools.wraps(func)
    def helper(*args: Any, **kwargs: Any) -> AsyncServerContextManager[TYield]:
        return AsyncServerContextManager(func, args, kwargs)

    setattr(helper, _MARK, True)
    return helper


def main_context(
    func: Callable[..., Generator[TYield, signal.Signals, None]],
) -> Callable[..., ServerMainContextManager[TYield]]:
    """Make a main context from a generator function; also spelled ``@aiotools.main``.

    The function takes no arguments.  What it yields (nothing, one value, or a tuple) is put before
    the workers' arguments; its ``yield`` evaluates to the signal that stopped the server, after all
    children are gone.

    :returns: a function that makes a :class:`ServerMainContextManager`, with the metadata of
        *func*.
    :raises RuntimeError: when called, if *func* is no generator function.
    """

    @functools.wraps(func)
    def helper(*args: Any, **kwargs: Any) -> ServerMainContextManager[TYield]:
        return ServerMainContextManager(func, args, kwargs)

    return helper
