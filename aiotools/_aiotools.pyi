import contextvars
import enum
from asyncio import AbstractEventLoop, Task
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping
from contextvars import ContextVar
from types import EllipsisType, TracebackType
from typing import Any, Generic, ParamSpec, Protocol, Self, TypeVar, final, overload

from ._policies import Gate, Retry
from .taskcontext import ErrorArg

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)
_P = ParamSpec("_P")
_R = TypeVar("_R", bound=Coroutine[Any, Any, Any])
_F = TypeVar("_F", bound=Callable[..., Any])

class _AsyncClosable(Protocol):
    async def close(self) -> Any: ...

_Closable = TypeVar("_Closable", bound=_AsyncClosable)

# sleep.c
@overload
def sleep(delay: float) -> Coroutine[Any, Any, None]: ...
@overload
def sleep(delay: float, result: _T) -> Coroutine[Any, Any, _T]: ...
@overload
def sleep_until(when: float) -> Coroutine[Any, Any, None]: ...
@overload
def sleep_until(when: float, result: _T) -> Coroutine[Any, Any, _T]: ...
def checkpoint() -> Coroutine[Any, Any, None]: ...

# ctxmgr.c
class AsyncContextManager(Generic[_T_co]):
    gen: AsyncGenerator[_T_co, Any]
    @property
    def func(self) -> Callable[..., AsyncGenerator[_T_co, Any] | AsyncIterator[_T_co]]: ...
    @property
    def args(self) -> tuple[Any, ...]: ...
    @property
    def kwds(self) -> dict[str, Any]: ...
    def __init__(
        self,
        func: Callable[..., AsyncGenerator[_T_co, Any] | AsyncIterator[_T_co]],
        args: Iterable[Any],
        kwds: Mapping[str, Any],
    ) -> None: ...
    def __call__(self, func: Callable[_P, _R], /) -> Callable[_P, _R]: ...
    def __aenter__(self) -> Coroutine[Any, Any, _T_co]: ...
    def __aexit__(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> Coroutine[Any, Any, bool | None]: ...
    def _recreate_cm(self, /) -> Self: ...

class SendingContextManager(AsyncContextManager[_T_co]):
    @property
    def kwargs(self) -> dict[str, Any]: ...

def _quicken_helper(helper: _F, /) -> _F: ...

# resetting.c
class resetting(Generic[_T]):
    @property
    def ctxvar(self) -> ContextVar[_T]: ...
    @property
    def value(self) -> _T: ...
    def __init__(self, ctxvar: ContextVar[_T], value: _T) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def __aenter__(self) -> Coroutine[Any, Any, None]: ...
    def __aexit__(self, *exc_info: object) -> Coroutine[Any, Any, None]: ...

# closing.c
class closing_async(Generic[_Closable]):
    thing: _Closable
    def __init__(self, thing: _Closable) -> None: ...
    def __aenter__(self) -> Coroutine[Any, Any, _Closable]: ...
    def __aexit__(self, *exc_info: object) -> Coroutine[Any, Any, None]: ...

# clock.c
class _Clock:
    def __init__(self) -> None: ...
    vtime: float
    _driver: _ClockDriver | None

@final
class _ClockDriver:
    stack: Any
    holds: int
    def __new__(
        cls,
        loop: AbstractEventLoop,
        select: Callable[..., Any] | None,
        ready: Any,
        registered: Any,
        own_registered: int,
        quiet_needed: int,
        /,
    ) -> Self: ...
    def time(self, /) -> float: ...
    def call_at(self, when: float, callback: Callable[..., object], /, *args: Any, context: Any = None) -> Any: ...
    def call_later(self, delay: float, callback: Callable[..., object], /, *args: Any, context: Any = None) -> Any: ...
    def call_soon(self, callback: Callable[..., object], /, *args: Any, context: Any = None) -> Any: ...
    def call_soon_threadsafe(self, callback: Callable[..., object], /, *args: Any, context: Any = None) -> Any: ...
    def select(self, timeout: float | None = None, /) -> list[Any]: ...
    def enter(
        self,
        clock: _Clock,
        delta: float,
        manual: bool,
        hold_for_executor: bool,
        io: int,
        on_stuck: Callable[[], bool] | None,
        /,
    ) -> None: ...
    def leave(self, delta: float, is_closed: bool, /) -> list[tuple[Any, float]]: ...
    def adopt(self, handle: Any, when: float, /) -> None: ...
    def advance(self, seconds: float, future: Any, /) -> None: ...
    def hold(self, /) -> None: ...
    def release(self, /) -> None: ...
# cancel.c
def cancel_and_wait(
    tasks: Task[Any] | Collection[Task[Any]], /, msg: str | None = None, *, timeout: float | None = None
) -> Coroutine[Any, Any, None]: ...

# scope.c
class _LoopExceptionHandler(enum.Enum):
    TOKEN = 1

_current_taskgroup: contextvars.ContextVar[Any]

class TaskContext:
    _aborting: bool
    _entered: bool
    _exiting: bool
    _expired: bool
    _gate: Gate
    _tasks: set[Task[Any]]
    def __init__(
        self,
        *,
        exception_handler: Callable[[ErrorArg], None] | _LoopExceptionHandler | EllipsisType | None = ...,
        context: contextvars.Context | None = None,
    ) -> None: ...
    @overload
    def create_task(
        self,
        /,
        coro: Coroutine[Any, Any, _T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        eager_start: bool | None = None,
        **kwargs: Any,
    ) -> Task[_T]: ...
    @overload
    def create_task(
        self,
        /,
        coro: Callable[[], Coroutine[Any, Any, _T]],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        eager_start: bool | None = None,
        timeout: float | None = None,
        retry: Retry | None = None,
        restart: Retry | None = None,
        **kwargs: Any,
    ) -> Task[_T]: ...
    def aclose(self, /, *, timeout: float | None = None) -> Coroutine[Any, Any, None]: ...

class TaskScope(TaskContext):
    def __init__(
        self,
        *,
        shield: bool = False,
        timeout: float | None = None,
        exception_handler: Callable[[ErrorArg], None] | _LoopExceptionHandler | EllipsisType | None = ...,
        context: contextvars.Context | None = None,
        limit: int | None = None,
        eager_start: bool = False,
    ) -> None: ...
    def start_task(
        self,
        /,
        coro: Coroutine[Any, Any, _T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **kwargs: Any,
    ) -> Coroutine[Any, Any, Task[_T]]: ...
    def abort(self, /, msg: Any = None) -> None: ...
    def cancel(self, /, msg: Any = None) -> None: ...
    def __aenter__(self) -> Coroutine[Any, Any, Self]: ...
    def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None, /
    ) -> Coroutine[Any, Any, bool]: ...

class ShieldScope(TaskScope):
    def __init__(self, timeout: float | None = None) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None, /
    ) -> bool: ...

class _TaskGroupCore:
    _aborting: bool
    _entered: bool
    _exiting: bool
    _expired: bool
    _gate: Gate
    _tasks: set[Task[Any]]
    def create_task(
        self,
        /,
        coro: Coroutine[Any, Any, _T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **kwargs: Any,
    ) -> Task[_T]: ...
    def cancel(self, /, msg: Any = None) -> None: ...
    def __aenter__(self) -> Coroutine[Any, Any, Self]: ...
    def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None, /
    ) -> Coroutine[Any, Any, bool]: ...

# module.c
def _loop_counts(loop: AbstractEventLoop, /) -> tuple[int, int]: ...

# page.c
def _record_read(record: Any, /) -> bytes | None: ...
def _record_write(record: Any, data: Any, /) -> None: ...

# watchdog.c
class _Watchdog:
    def __new__(
        cls,
        report: Callable[[int, float], object],
        interval: float,
        slow: float,
        hang: float,
        fd: int,
        signum: int,
        page: Any,
        /,
    ) -> Self: ...
    def start(self, /) -> None: ...
    def beat(self, /) -> float | None: ...
    def stop(self, /) -> None: ...
    def read(self, /) -> tuple[int, float, int, float, tuple[int, ...]]: ...
