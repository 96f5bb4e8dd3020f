"""Clean-up that is written where the need for it arises, and run when the function ends.

The idea is the ``defer`` statement of Go::

    @aiotools.adefer
    async def copy(defer, source, target):
        reader = await open_reader(source)
        defer(reader.close)
        writer = await open_writer(target)
        defer(writer.close)
        ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

__all__ = (
    "AsyncDeferFunc",
    "AsyncDeferrable",
    "DeferFunc",
    "adefer",
    "defer",
)

_P = ParamSpec("_P")
_R = TypeVar("_R")

DeferFunc: TypeAlias = Callable[[Callable[[], Any]], None]
AsyncDeferrable: TypeAlias = Callable[[], Awaitable[Any]] | Callable[[], Any] | Coroutine[Any, Any, Any]
AsyncDeferFunc: TypeAlias = Callable[[AsyncDeferrable], None]


def _is_coroutine_function(item: object) -> bool:
    # inspect sees through partial objects; a callable object is what its __call__ is.
    return inspect.iscoroutinefunction(item) or inspect.iscoroutinefunction(
        getattr(type(item), "__call__", None)  # noqa: B004
    )


def _check_callable(item: object) -> None:
    if not callable(item):
        raise TypeError(f"cannot defer {type(item).__name__!r} object: it is not callable")


def _raise_collected(errors: list[BaseException]) -> None:
    """Raise what the deferred items raised; the caller's handler gives it its context."""
    try:
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise BaseExceptionGroup("several deferred items failed", errors)
    finally:
        # The traceback of what is raised refers to this frame.
        del errors


def _run_deferred(deferred: list[Callable[[], Any]]) -> None:
    errors: list[BaseException] = []
    while deferred:
        try:
            deferred.pop()()
        except BaseException as exc:
            errors.append(exc)
    _raise_collected(errors)


async def _run_deferred_async(deferred: list[AsyncDeferrable]) -> None:
    errors: list[BaseException] = []
    while deferred:
        item = deferred.pop()
        try:
            if inspect.iscoroutine(item):
                await item
            elif _is_coroutine_function(item):
                await item()  # type: ignore[operator]
            else:
                item()  # type: ignore[operator]
        except BaseException as exc:
            errors.append(exc)
        del item
    _raise_collected(errors)


def defer(
    func: Callable[Concatenate[DeferFunc, _P], _R],
) -> Callable[_P, _R]:
    """Decorate a function that registers its clean-up while it runs.

    *func* gets, as an additional first argument, a function that takes a callable
    without arguments and returns ``None``.  When *func* has returned or raised, the
    callables run, last registered first, each of them whatever the others do.  One
    registered by a callable that is running already is run as well.

    Raises:
        AssertionError: *func* is a coroutine function (see :func:`adefer`); at
            registration, if a coroutine function or a coroutine is deferred.
        TypeError: at registration, if something that is not callable is deferred.

    If one deferred callable fails, its exception leaves the decorated function; if
    several fail, an :exc:`ExceptionGroup` of theirs, in the order in which they ran
    (a :exc:`BaseExceptionGroup` if need be).  The exception of *func* itself, if there
    is one, becomes its context; it propagates when no callable fails.

    The idea is Go's ``defer`` statement.
    """
    assert not inspect.iscoroutinefunction(func), (
        "defer() is for ordinary functions; decorate a coroutine function with adefer()"
    )

    @functools.wraps(func)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        deferred: list[Callable[[], Any]] = []

        def register(item: Callable[[], Any]) -> None:
            assert not _is_coroutine_function(item), (
                "a coroutine function can be deferred in functions decorated with adefer() only"
            )
            assert not inspect.iscoroutine(item), (
                "a coroutine can be deferred in functions decorated with adefer() only"
            )
            _check_callable(item)
            deferred.append(item)

        try:
            result = func(register, *args, **kwargs)
        except BaseException:
            _run_deferred(deferred)
            raise
        _run_deferred(deferred)
        return result

    return wrapper


def adefer(
    func: Callable[Concatenate[AsyncDeferFunc, _P], Coroutine[Any, Any, _R]],
) -> Callable[_P, Coroutine[Any, Any, _R]]:
    """Decorate a coroutine function that registers its clean-up while it runs.

    As :func:`defer`, for a coroutine function.  What it registers may be

    - a coroutine function (also a :func:`functools.partial` of one, or an object whose
      ``__call__`` is one): called without arguments, and awaited;
    - a coroutine: awaited;
    - any other callable: called without arguments; its result is ignored, also when it
      could be awaited.

    Deferred items run in the caller's task, also when *func* was cancelled.  A further
    cancellation interrupts the item that is being awaited, counts as its failure, and
    does not keep the other items from running.

    Raises:
        AssertionError: *func* is not a coroutine function.
        TypeError: at registration, if something else than the above (a task or a
            future, for instance) is deferred.
    """
    assert inspect.iscoroutinefunction(func), (
        "adefer() is for coroutine functions; decorate an ordinary function with defer()"
    )

    @functools.wraps(func)
    async def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        deferred: list[AsyncDeferrable] = []

        def register(item: AsyncDeferrable) -> None:
            if not inspect.iscoroutine(item):
                _check_callable(item)
            deferred.append(item)

        try:
            result = await func(register, *args, **kwargs)
        except BaseException:
            await _run_deferred_async(deferred)
            raise
        await _run_deferred_async(deferred)
        return result

    return wrapper
