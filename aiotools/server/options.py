"""What :func:`start_server` can be asked for beyond its classic arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from .plugins import ServerPlugin

__all__ = ("ServerOptions",)

KINDS = ("process", "thread", "interpreter")
RESTARTS = ("never", "on-failure", "always")


def _seconds(name: str, value: Any, *, optional: bool = True, zero: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if math.isnan(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be {'at least' if zero else 'more than'} 0 seconds, not {value!r}")


def _count(name: str, value: Any, least: int, *, optional: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of a managed server.  With none of them set a server behaves in the classic way.

    :param worker_kind: ``"process"``, ``"thread"`` (a loop in a thread of its own) or
        ``"interpreter"`` (3.14+).
    :param loop_factory: ``"asyncio"``, ``"uvloop"`` or a function that makes a loop, for workers and
        for extra processes that have one; instead of the runner.
    :param bind: sockets that the parent opens and all workers share: ``"tcp://host:port"``,
        ``"unix:path"``, ``"fd://number"``, or ``"systemd"`` for those that the service manager passed.
    :param backlog: length of the accept queue of these sockets.
    :param reuse_port: one TCP socket per worker (``SO_REUSEPORT``) instead of a shared one.
    :param socket_mode: permissions of Unix sockets.
    :param restart: which workers are replaced when they end unasked.
    :param backoff: seconds before the second restart in a row; doubled each time, with jitter.
    :param backoff_max: longest such delay in seconds.
    :param boot_failure_limit: failures in a row of one worker after which the server gives up.
    :param min_uptime: seconds after which a ready worker's end does not count as one of these.
    :param start_timeout: seconds that a worker may take to become ready.
    :param max_surge: how many workers more than usual may run during a rolling restart.
    :param drain_timeout: seconds that a worker may take to finish what it has in hand when it is
        stopped; after that its tasks are cancelled.  ``None``: for ever.
    :param cancel_timeout: seconds from there to the kill.
    :param max_age: seconds after which a worker is recycled.
    :param max_requests: number of requests (:meth:`Worker.request_done`) after which it is.
    :param max_memory: resident memory in bytes beyond which it is.
    :param recycle_jitter: fraction by which these limits vary from worker to worker.
    :param hang_timeout: seconds without a turn of its loop after which a worker is killed and replaced.
    :param preload: names of modules that each generation imports once, for all its processes: large libraries, say.
        They may start no thread and open nothing.  Works where the server has a fork server of its own (Linux,
        without *mp_context*); what the program imports itself is imported anew by each worker.
    :param control_socket: path of a Unix socket that takes commands.
    :param pidfile: path of a file that holds the parent's process id while the server runs.
    :param log_config: how records of all processes reach the parent's handlers (see ``logs.py``).
    :param report: return a :class:`ServerReport`.
    :param plugins: further :class:`ServerPlugin` objects.
    """

    worker_kind: str = "process"
    loop_factory: Any = None
    bind: Sequence[Any] = ()
    backlog: int = 2048
    reuse_port: bool = False
    socket_mode: int | None = None
    restart: str = "never"
    backoff: float = 0.1
    backoff_max: float = 10.0
    boot_failure_limit: int = 5
    min_uptime: float = 5.0
    start_timeout: float | None = None
    max_surge: int = 1
    drain_timeout: float | None = None
    cancel_timeout: float = 5.0
    max_age: float | None = None
    max_requests: int | None = None
    max_memory: int | None = None
    recycle_jitter: float = 0.1
    hang_timeout: float | None = None
    preload: Sequence[str] = ()
    control_socket: Any = None
    pidfile: Any = None
    log_config: Any = None
    report: bool = False
    plugins: Sequence[ServerPlugin] = ()

    def __post_init__(self) -> None:
        if self.worker_kind not in KINDS:
            raise ValueError(f"worker_kind must be one of {', '.join(KINDS)}, not {self.worker_kind!r}")
        if self.restart not in RESTARTS:
            raise ValueError(f"restart must be one of {', '.join(RESTARTS)}, not {self.restart!r}")
        if isinstance(self.bind, str):
            object.__setattr__(self, "bind", (self.bind,))
        if isinstance(self.preload, str) or not all(isinstance(name, str) for name in self.preload):
            raise TypeError(f"preload must be a sequence of names of modules, not {self.preload!r}")
        for name in ("backoff", "backoff_max", "min_uptime", "cancel_timeout"):
            _seconds(name, getattr(self, name), optional=False)
        for name in ("drain_timeout",):
            _seconds(name, getattr(self, name))
        for name in ("start_timeout", "max_age", "hang_timeout"):
            _seconds(name, getattr(self, name), zero=False)
        for name in ("max_requests", "max_memory"):
            _count(name, getattr(self, name), 1)
        for name in ("max_surge", "boot_failure_limit", "backlog"):
            _count(name, getattr(self, name), 1, optional=False)
        _count("socket_mode", self.socket_mode, 0)
        if self.socket_mode is not None and self.socket_mode > 0o777:
            raise ValueError(f"socket_mode must be from 0 to 0o777, not {self.socket_mode:#o}")
        if not 0 <= self.recycle_jitter < 1:
            raise ValueError(f"recycle_jitter must be in [0, 1), not {self.recycle_jitter!r}")
        if self.loop_factory is not None and not (
            callable(self.loop_factory) or self.loop_factory in ("asyncio", "uvloop")
        ):
            raise ValueError(f"loop_factory must be 'asyncio', 'uvloop' or callable, not {self.loop_factory!r}")

    @property
    def managed(self) -> bool:
        """Whether anything beyond the classic behaviour was asked for.

        The parent of a managed server acts on SIGHUP, SIGUSR1, SIGUSR2, SIGTTIN and SIGTTOU, and
        on a second stop signal.
        """
        return any(
            getattr(self, field.name) != field.default
            for field in dataclasses.fields(self)
            if field.name not in ("report", "loop_factory", "plugins")
        )


def loop_runner(loop_factory: Any) -> Callable[[Any], Any]:
    """A picklable runner for ``loop_factory=``."""
    import functools

    return functools.partial(_run_on, loop_factory)


def _run_on(loop_factory: Any, coro: Any) -> Any:
    import asyncio

    if loop_factory == "uvloop":
        try:
            import uvloop
        except ImportError:
            coro.close()
            raise
        factory = uvloop.new_event_loop
    elif loop_factory == "asyncio":
        factory = None
    else:
        factory = loop_factory
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(coro)
