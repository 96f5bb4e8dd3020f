"""Idiomatic helpers for asyncio, with a core written in C."""

from ._aiotools import checkpoint, sleep, sleep_until
from ._version import __version__
from .barrier import AsyncBarrier, Barrier, ProcessBarrier
from .cancel import CancelRequest, UnfinishedTasksError, cancel_and_wait, cancel_requests, trace_cancellation
from .compat import all_tasks, current_task, get_running_loop, set_task_name
from .context import (
    AsyncContextGroup,
    AsyncContextManager,
    AsyncExitStack,
    aclosing,
    actxgroup,
    actxmgr,
    async_ctx_manager,
    closing_async,
    resetting,
)
from .defer import AsyncDeferFunc, AsyncDeferrable, DeferFunc, adefer, defer
from .fork import AbstractChildProcess, PidfdChildProcess, PosixChildProcess, afork
from .func import apartial, lru_cache
from .iter import aiter
from .queue import (
    AsyncQueue,
    AsyncQueueEmpty,
    AsyncQueueFull,
    AsyncQueueShutDown,
    LifoQueue,
    PriorityQueue,
    Queue,
    QueueShutDown,
    QueueStatistics,
    SyncQueue,
    SyncQueueEmpty,
    SyncQueueFull,
    SyncQueueShutDown,
)
from .server import (
    AsyncServerContextManager,
    InterruptedBySignal,
    ServerMainContextManager,
    main,
    main_context,
    process_index,
    server_context,
    start_server,
)
from .supervisor import Retry, Statistics, Supervisor
from .taskcontext import ErrorArg, ErrorCallback, TaskContext
from .taskgroup import (
    MultiError,
    PersistentTaskGroup,
    TaskGroup,
    TaskGroupError,
    current_ptaskgroup,
    current_taskgroup,
)
from .taskscope import ShieldScope, TaskScope, move_on_after
from .thread import LoopThread
from .timeouts import Timeout, timeout, timeout_at
from .timer import Timer, TimerDelayPolicy, VirtualClock, create_timer
from .types import AsyncClosable, AwaitableLike, CoroutineLike
from .utils import as_completed_safe, gather_safe, map_safe, race
from .watchdog import LoopStats, LoopWatchdog

__all__ = (
    "__version__",
    # barrier
    "AsyncBarrier",
    "Barrier",
    "ProcessBarrier",
    # cancel
    "CancelRequest",
    "UnfinishedTasksError",
    "cancel_and_wait",
    "cancel_requests",
    "trace_cancellation",
    # compat
    "all_tasks",
    "current_task",
    "get_running_loop",
    "set_task_name",
    # context
    "AsyncContextGroup",
    "AsyncContextManager",
    "AsyncExitStack",
    "aclosing",
    "actxgroup",
    "actxmgr",
    "async_ctx_manager",
    "closing_async",
    "resetting",
    # defer
    "AsyncDeferFunc",
    "AsyncDeferrable",
    "DeferFunc",
    "adefer",
    "defer",
    # fork
    "AbstractChildProcess",
    "PidfdChildProcess",
    "PosixChildProcess",
    "afork",
    # func
    "apartial",
    "lru_cache",
    # iter
    "aiter",
    # server
    "AsyncServerContextManager",
    "InterruptedBySignal",
    "ServerMainContextManager",
    "main",
    "main_context",
    "process_index",
    "server_context",
    "start_server",
    # queue
    "AsyncQueue",
    "AsyncQueueEmpty",
    "AsyncQueueFull",
    "AsyncQueueShutDown",
    "LifoQueue",
    "PriorityQueue",
    "Queue",
    "QueueShutDown",
    "QueueStatistics",
    "SyncQueue",
    "SyncQueueEmpty",
    "SyncQueueFull",
    "SyncQueueShutDown",
    # sleep
    "checkpoint",
    "sleep",
    "sleep_until",
    # supervisor
    "Retry",
    "Statistics",
    "Supervisor",
    # taskcontext
    "ErrorArg",
    "ErrorCallback",
    "TaskContext",
    # taskgroup
    "MultiError",
    "PersistentTaskGroup",
    "TaskGroup",
    "TaskGroupError",
    "current_ptaskgroup",
    "current_taskgroup",
    # taskscope
    "ShieldScope",
    "TaskScope",
    "move_on_after",
    # thread
    "LoopThread",
    # timeouts
    "Timeout",
    "timeout",
    "timeout_at",
    # timer
    "Timer",
    "TimerDelayPolicy",
    "VirtualClock",
    "create_timer",
    # types
    "AsyncClosable",
    "AwaitableLike",
    "CoroutineLike",
    # utils
    "as_completed_safe",
    "gather_safe",
    "map_safe",
    "race",
    # watchdog
    "LoopStats",
    "LoopWatchdog",
)
