"""``start_server()``."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from ..fork import MPContext, start_helpers
from .board import StatusBoard
from .control import ControlSocket, PidFile
from .heartbeat import Heartbeat, beat_interval
from .logs import LogServer
from .nurseries import nursery_usable
from .options import ServerOptions, loop_runner
from .plugins import ServerPlugin
from .report import ServerReport
from .signals import SavedSignals
from .sockets import ListenSockets
from .supervise import Supervisor
from .systemd import SystemdNotifier
from .worker import parse_target

__all__ = ("start_server",)


def start_server(
    worker_actxmgr: Any,
    main_ctxmgr: Callable[[], Any] | None = None,
    extra_procs: Collection[Any] = (),
    stop_signals: Collection[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
    num_workers: int = 1,
    args: Sequence[Any] = (),
    *,
    wait_timeout: float | None = None,
    mp_context: MPContext | None = None,
    prestart_hook: Callable[[int], Any] | None = None,
    ignore_child_interrupts: bool = False,
    run_to_completion: bool = False,
    runner: Callable[[Coroutine[Any, Any, None]], Any] = asyncio.run,
    options: ServerOptions | None = None,
    worker_kind: str = "process",
    loop_factory: Any = None,
    bind: Sequence[Any] = (),
    backlog: int = 2048,
    reuse_port: bool = False,
    socket_mode: int | None = None,
    restart: str = "never",
    backoff: float = 0.1,
    backoff_max: float = 10.0,
    boot_failure_limit: int = 5,
    min_uptime: float = 5.0,
    start_timeout: float | None = None,
    max_surge: int = 1,
    drain_timeout: float | None = None,
    cancel_timeout: float = 5.0,
    max_age: float | None = None,
    max_requests: int | None = None,
    max_memory: int | None = None,
    recycle_jitter: float = 0.1,
    hang_timeout: float | None = None,
    preload: Sequence[str] = (),
    control_socket: Any = None,
    pidfile: Any = None,
    log_config: Any = None,
    report: bool = False,
    plugins: Sequence[ServerPlugin] = (),
) -> ServerReport | None:
    """Run a server of several worker processes, each with an event loop, until a stop signal.

    Blocks until all children have ended.  The main program runs in a loop of its own: it enters the
    main context, starts the workers and the extra processes in this order, waits for a stop signal
    and passes it on to all of them; the main context is left when all children are gone.

    The classic arguments:

    :param worker_actxmgr: the worker, decorated with :func:`server_context`, or an import string
        ``"package.module:worker"``; called with ``(loop, index, args)`` in each worker.
    :param main_ctxmgr: the main context, decorated with :func:`main_context`.
    :param extra_procs: functions that are called with ``(None, index, args)`` in processes of their own.
        Coroutine functions and server contexts get a loop as first argument.
    :param stop_signals: the signals that stop the server.
    :param num_workers: how many workers.
    :param args: arguments for the workers, after those that the main context yields.
    :param wait_timeout: seconds after the stop signal at which remaining children are killed.
    :param mp_context: the multiprocessing context; default: the default one.  A managed server needs freshly imported
        code for a rolling restart: its default is ``spawn``, or what has the same effect in less time, a fork server
        of its own that imports nothing of the program (Linux).
    :param prestart_hook: called with the index in each child before it has a loop.
    :param ignore_child_interrupts: a failing worker does not stop the server.
    :param run_to_completion: do not wait for a signal; workers leave at once, extras run to their end.
    :param runner: runs the coroutines of the main program and of the workers, like ``asyncio.run``.

    All others are documented at :class:`ServerOptions`, which can be given instead, as *options*.

    :returns: None, or a :class:`ServerReport` if *report* is true.
    :raises RuntimeError: not in the main thread, or a loop is running in it.
    :raises AssertionError: no stop signal.
    :raises NotImplementedError: start method ``fork`` on Python 3.14 or later; any server on Windows.
    :raises ChildProcessError: a child ended before it was up (and is not to be restarted).
    :raises ServerFailed: the server gave up restarting a worker.
    """
    if sys.platform == "win32":
        raise NotImplementedError("start_server() does not run on Windows: it needs the signals of POSIX systems")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("start_server() must be called in the main thread")
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("start_server() cannot be called while an event loop is running")
    assert stop_signals, "at least one stop signal is needed"
    given = {
        name: value
        for name, value in locals().items()
        if name in ServerOptions.__dataclass_fields__ and value != ServerOptions.__dataclass_fields__[name].default
    }
    if options is None:
        options = ServerOptions(**given)
    elif given:
        raise TypeError(f"both options= and {', '.join(given)} given")
    if sys.version_info >= (3, 14) and mp_context is not None and mp_context.get_start_method() == "fork":
        raise NotImplementedError("start method 'fork' is not supported on Python 3.14 and later")
    if isinstance(num_workers, bool) or not isinstance(num_workers, int):
        raise TypeError(f"num_workers must be an int, not {num_workers!r}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, not {num_workers!r}")
    if options.worker_kind == "interpreter":
        if sys.version_info < (3, 14):
            raise NotImplementedError("worker_kind='interpreter' needs Python 3.14")
        if options.loop_factory == "uvloop" or getattr(runner, "__module__", "") == "uvloop":
            raise RuntimeError("uvloop does not run in subinterpreters; use the default loop there")
    for target in (worker_actxmgr, *extra_procs):
        if isinstance(target, str):
            parse_target(target)
    with_nursery = mp_context is None and options.managed and nursery_usable()
    if mp_context is None:
        mp_context = multiprocessing.get_context("spawn" if options.managed else None)
    if options.loop_factory is not None:
        runner = loop_runner(options.loop_factory)
    logs = LogServer(options.log_config) if options.log_config is not None else None
    main_context = main_ctxmgr() if main_ctxmgr is not None else contextlib.nullcontext()
    sup = None
    with contextlib.ExitStack() as stack:
        if extra_procs or (num_workers and options.worker_kind == "process"):
            start_helpers(mp_context)
        # What is opened here is open before any child exists, and closed after the last one.
        saved = SavedSignals(stop_signals)
        stack.callback(saved.restore)
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
        sockets = None
        if options.bind:
            sockets = ListenSockets(
                options.bind,
                backlog=options.backlog,
                reuse_port=options.reuse_port,
                mode=options.socket_mode,
            )
            stack.callback(sockets.close)
        sup = Supervisor(
            worker_actxmgr,
            list(extra_procs),
            num_workers=num_workers,
            args=args,
            stop_signals=stop_signals,
            wait_timeout=wait_timeout,
            mp_context=mp_context,
            prestart_hook=prestart_hook,
            ignore_child_interrupts=ignore_child_interrupts,
            run_to_completion=run_to_completion,
            runner=runner,
            options=options,
            sockets=sockets,
            with_nursery=with_nursery,
        )
        if logs is not None:
            sup.plugins.insert(0, logs)  # what the others log at their start and end is to be seen
        if options.control_socket is not None:
            sup.plugins.append(ControlSocket(options.control_socket))
        board = StatusBoard(options.managed, beat_interval(options.hang_timeout), options.hang_timeout)
        sup.plugins.append(board)
        if options.managed:
            notifier = SystemdNotifier(board)
            if notifier.wanted:
                sup.plugins.append(notifier)
            if options.hang_timeout is not None:
                sup.plugins.append(Heartbeat(options.hang_timeout, board))
        if options.pidfile is not None:
            sup.plugins.append(PidFile(options.pidfile))
        runner(sup.run(main_context))
    return sup.report if options.report else None
