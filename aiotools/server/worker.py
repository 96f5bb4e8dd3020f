"""The child's side of the server.

What runs here
    A :class:`WorkerSpec` travels to the child (inherited or pickled) and :func:`run_child` lives it,
    in the main thread of a process, in a thread, or in an interpreter.  For the user's code there is
    one :class:`Worker` per child, which :func:`current_worker` returns.

Life of a worker::

    boot     process_index set, plugins' boot(), prestart_hook(index); stop signals are blocked
    loop     the runner starts a loop; handlers for the stop signals; channel attached; plugins' start()
    enter    the worker function is called, signals are unblocked, its context is entered
    ready    "ready" is sent; current_worker() is fully usable; waits for the first stop
    drain    the context is left: its yield evaluates to the signal.  stopping is set.
    end      plugins' stop(), loop closed, plugins' exit(), exit code

A stop is a signal (processes) or the message ``stop`` (all kinds), whichever comes first; later ones
are ignored.  A stop that comes before *ready* is kept until then.

Messages to the parent (see channel.py)
    ``ready``                       the context is entered
    ``failed`` phase, error         entering or leaving the context raised; sent before the exit
    ``stopping`` signal             the wait is over, the context is being left
    ``recycle`` why                 asks for a successor (max_requests)
    ``status`` text                 Worker.set_status()
    others                          belong to plugins (ServerPlugin.on_message)
Messages from the parent
    ``stop`` signal, reason         leave; *reason* is readable as Worker.stop_reason
    ``cancel``                      the drain budget is over: log what still runs, and cancel it
    ``reload``                      run the on_reload hooks
    others                          belong to plugins (WorkerPlugin.on_message)

Orphans
    In a process SIGIO says that the parent is gone (see fork.py).  Until the loop runs, its default
    action ends the process; later it is a stop like any other with a short budget, after which a timer
    of the kernel ends the process, whatever holds the GIL (orphan.c).  In a thread the end of file on
    the channel says so.

Evidence
    Managed processes register :mod:`faulthandler` for :data:`DUMP_SIGNAL`, writing to a pipe that the
    parent reads, so the parent can get the stacks of all threads also while native code holds the GIL.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from typing import Any

try:
    from .._aiotools import _end_after_signal
except ImportError:  # Windows has no such signal
    pass

from .channel import Channel
from .contexts import is_server_context
from .plugins import WorkerPlugin
from .signals import MANAGEMENT_SIGNALS, default_stop_signal, name_of, signal_of

__all__ = ("InterruptedBySignal", "Worker", "WorkerSpec", "current_worker", "process_index")

# The package's logger: "aiotools.server" is the name that programs configure.
log = logging.getLogger(__package__)

process_index: ContextVar[int] = ContextVar("process_index")

_current: ContextVar[Worker] = ContextVar("aiotools_current_worker")

#: The signal on which a managed process writes the stacks of its threads.
DUMP_SIGNAL: int | None = getattr(signal, "SIGUSR2", None)

#: Turns of the loop after which an accepted connection has its transport and protocol for sure; three on
#: the default loop: the accept, the task that it starts, and connection_made.
ACCEPT_TURNS = 8

#: Seconds that an orphaned process may take to finish.
ORPHAN_GRACE = 0.6


class InterruptedBySignal(BaseException):
    """Raised in an extra process by the first stop signal other than SIGINT and SIGTERM.

    ``args[0]`` is the number of the signal.
    """


@dataclasses.dataclass
class WorkerSpec:
    """All that a child is started with; picklable if what the user gave is."""

    index: int
    generation: int
    kind: str  # "process", "thread", "interpreter"
    role: str  # "worker", "extra"
    target: Any  # the worker or extra function, or "package.module:name" of it
    args: Sequence[Any]
    stop_signals: tuple[int, ...]
    runner: Callable[[Any], Any]
    channel: socket.socket
    prestart_hook: Callable[[int], Any] | None = None
    run_to_completion: bool = False
    managed: bool = False
    sockets: Sequence[socket.socket] = ()
    dump: Any = None  # write end of the pipe for stacks
    max_requests: int | None = None
    serial: int = 1
    plugins: Sequence[WorkerPlugin] = ()


def parse_target(target: str) -> tuple[str, str]:
    """The two parts of an import string.

    :raises ValueError: it has no two parts.
    """
    module_name, _, path = target.partition(":")
    if not module_name or not path or not all(name.isidentifier() for name in path.split(".")):
        raise ValueError(f"an import string must read 'package.module:name', not {target!r}")
    return module_name, path


def import_afresh(target: str) -> Any:
    """As :func:`import_target`, with the code as it is on disk now, for workers that share this process.

    The whole top-level package is imported anew; what runs keeps the modules that it has.  If that
    fails, the modules are those of before.
    """
    top = parse_target(target)[0].partition(".")[0]
    if top == "__main__" or top in sys.builtin_module_names:
        return import_target(target)

    def mine() -> list[str]:
        return [name for name in sys.modules if name == top or name.startswith(top + ".")]

    saved = {name: sys.modules.pop(name) for name in mine()}
    importlib.invalidate_caches()
    try:
        return import_target(target)
    except BaseException:
        for name in mine():
            del sys.modules[name]
        sys.modules.update(saved)
        raise


def import_target(target: Any) -> Any:
    """The object that ``"package.module:name.of.it"`` names; anything but a str is returned as it is."""
    if not isinstance(target, str):
        return target
    module_name, path = parse_target(target)
    obj = importlib.import_module(module_name)
    for name in path.split("."):
        try:
            obj = getattr(obj, name)
        except AttributeError:
            raise ImportError(f"{target!r}: {obj!r} has no attribute {name!r}") from None
    return obj


def current_worker() -> Worker:
    """The worker that the calling code runs in.

    :raises LookupError: called outside a worker of :func:`start_server`.
    """
    try:
        return _current.get()
    except LookupError:
        raise LookupError("current_worker() outside a worker of start_server()") from None


class Worker:
    """A worker or extra process, as its own code sees it.  Belongs to the thread it runs in.

    :ivar index: its index, as in :data:`process_index`.
    :ivar generation: how many rolling restarts of the server came before it, counted from 1.
    :ivar serial: how many children of this index came before it, counted from 1.
    :ivar kind: ``"process"``, ``"thread"`` or ``"interpreter"``.
    :ivar role: ``"worker"`` or ``"extra"``.
    :ivar pid: its process id.
    :ivar sockets: the listening sockets that the parent opened for ``bind=``, in that order.
    :ivar counters: numbers or short texts by name that the status is to show; a few, they share 630 bytes.
    :ivar stop_signal: what ended the wait, or None.
    :ivar stop_reason: why, in the parent's words (``"stopped"``, ``"reloaded"``, ``"recycled: ..."``).
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self.index = spec.index
        self.generation = spec.generation
        self.serial = spec.serial
        self.kind = spec.kind
        self.role = spec.role
        self.pid = os.getpid()
        self.sockets: list[socket.socket] = list(spec.sockets)
        self.stop_signal: Any = None
        self.stop_reason: str | None = None
        self.requests = 0
        self.counters: dict[str, Any] = {}
        self._leases: Any = None
        self.ready = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.channel = Channel(spec.channel)
        self._stopped: asyncio.Future[Any] | None = None
        self._entered = False
        self._task: asyncio.Task[Any] | None = None
        self._reload_hooks: list[Callable[[], Any]] = []
        self._drain_hooks: list[Callable[[], Any]] = []
        self._hook_tasks: set[asyncio.Task[Any]] = set()
        self._recycling = False
        self.cancelled = False

    def __repr__(self) -> str:
        return f"<Worker {self.index} generation={self.generation} kind={self.kind} pid={self.pid}>"

    # For users

    @property
    def stopping(self) -> bool:
        """Whether the worker was told to stop."""
        return self.stop_signal is not None

    async def wait_stopping(self) -> Any:
        """Wait until the worker is told to stop; returns the signal."""
        if self._stopped is None:
            raise RuntimeError("this worker has no event loop")
        return await asyncio.shield(self._stopped)

    def on_reload(self, hook: Callable[[], Any]) -> Callable[[], Any]:
        """Have *hook* called at each reload without restart (SIGUSR1 to the parent).

        It may be a coroutine function.  A hook that fails is logged.  Returns *hook*, so that this can
        be used as a decorator.
        """
        self._reload_hooks.append(hook)
        return hook

    def on_drain(self, hook: Callable[[], Any]) -> Callable[[], Any]:
        """Have *hook* called, in the loop, as soon as the worker is told to stop, before its ``yield`` returns."""
        self._drain_hooks.append(hook)
        return hook

    async def stop_accepting(self) -> None:
        """Accept no more connections on :attr:`sockets`; those that were accepted become the server's.

        Done by itself when the worker is told to stop, before its ``yield`` returns: closing an asyncio
        server drops connections that it has accepted but not yet made a transport for.
        """
        if self.loop is None:
            return
        for sock in self.sockets:
            if sock.fileno() >= 0 and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    self.loop.remove_reader(sock.fileno())
        for _ in range(ACCEPT_TURNS):
            await asyncio.sleep(0)

    def request_done(self, n: int = 1) -> None:
        """Count *n* finished requests, for ``max_requests`` and the status."""
        self.requests += n
        limit = self._spec.max_requests
        if limit is not None and self.requests >= limit and not self._recycling:
            self.request_recycle(f"{self.requests} requests")

    def request_recycle(self, why: str = "asked for") -> None:
        """Ask the parent to replace this worker by a fresh one, without a gap."""
        if not self._recycling:
            self._recycling = True
            self.channel.send("recycle", why=why)

    def set_status(self, text: str) -> None:
        """A line for the server's status."""
        self.channel.send("status", text=str(text))

    # For run_child() and plugins

    def stop(self, signum: int, reason: str | None = None) -> None:
        """Leave the wait, with *signum* as the result of the ``yield``; only the first call counts."""
        if reason is not None and self.stop_reason is None:
            self.stop_reason = reason
        if self.stop_signal is not None:
            return
        self.stop_signal = signal_of(signum)
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(self.stop_signal)

    def _on_message(self, message: dict[str, Any]) -> None:
        kind = message.get("t")
        if kind == "stop":
            self.stop(message["signal"], message.get("reason"))
        elif kind == "cancel":
            self._cancel()
        elif kind == "reload":
            self._reload()
        else:
            for plugin in self._spec.plugins:
                _call_hook(plugin.on_message, self, message)

    def _reload(self) -> None:
        for hook in list(self._reload_hooks):
            result = _call_hook(hook)
            if inspect.isawaitable(result) and self.loop is not None:
                task = self.loop.create_task(_await_hook(hook, result))
                self._hook_tasks.add(task)
                task.add_done_callback(self._hook_tasks.discard)

    def _cancel(self) -> None:
        if self.cancelled or self.loop is None:
            return
        self.cancelled = True
        tasks = [t for t in asyncio.all_tasks(self.loop) if not t.done()]
        log.warning(
            "Worker %d: not finished within its drain budget; cancelling %d tasks:\n%s",
            self.index,
            len(tasks),
            "\n".join(format_task(t) for t in tasks),
        )
        for task in tasks:
            task.cancel("the drain budget of the worker is over")

    def _orphaned(self, signum: int, frame: Any) -> None:
        # Runs in the main thread between two bytecodes; the deadline that has been set by now needs neither.
        if self.loop is not None and not self.loop.is_closed():
            stop = functools.partial(self.stop, default_stop_signal(self._spec.stop_signals), "the parent is gone")
            self.loop.call_soon_threadsafe(stop)


def format_task(task: asyncio.Task[Any]) -> str:
    """Name and stack of *task*, as text."""
    out = io.StringIO()
    task.print_stack(file=out)
    return f"{task!r}\n{out.getvalue().rstrip()}"


def _call_hook(hook: Callable[..., Any], *args: Any) -> Any:
    try:
        return hook(*args)
    except Exception:
        log.exception("Error in %r", hook)
        return None


async def _await_hook(hook: Any, awaitable: Any) -> None:
    try:
        await awaitable
    except Exception:
        log.exception("Error in %r", hook)


def run_child(spec: WorkerSpec) -> int:
    """Live the life of a child; returns its exit code or raises what it failed with."""
    worker = Worker(spec)
    is_process = spec.kind == "process"
    token = process_index.set(spec.index)
    worker_token = _current.set(worker)
    booted: list[WorkerPlugin] = []
    import_for_tracebacks()
    try:
        if is_process and spec.managed:
            _prepare_managed(spec)
        for plugin in spec.plugins:
            booted.append(plugin)
            plugin.boot(worker)
        try:
            target = import_target(spec.target)
            if spec.prestart_hook is not None:
                spec.prestart_hook(spec.index)
        except Exception as exc:
            if spec.managed:
                worker.channel.send("failed", phase="import", error=describe_error(exc))
            raise
        if spec.role == "worker" or has_loop(target):
            spec.runner(_run_worker(worker, target))
        else:
            _run_extra(worker, target)
        return 0
    finally:
        for plugin in reversed(booted):
            _call_hook(plugin.exit, worker)
        worker.channel.close()
        _current.reset(worker_token)
        process_index.reset(token)


def import_for_tracebacks() -> None:
    """Have what formats tracebacks imported before the descriptors can run out: 3.15 imports it at its first use."""
    describe_error(Exception())


def has_loop(target: Any) -> bool:
    """Whether an extra process with this function runs an event loop."""
    return inspect.iscoroutinefunction(target) or is_server_context(target)


def describe_error(exc: BaseException) -> str:
    """The exception as in the last line of its traceback, in one line however many it takes there."""
    if isinstance(exc, SyntaxError):
        text = f"{type(exc).__name__}: {exc}"  # with file and line, without the source
    else:
        text = "".join(traceback.format_exception_only(exc))
    text = " ".join(text.split())
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def blocked_at_start(stop_signals: Collection[int], managed: bool) -> tuple[int, ...]:
    """Signals that a process begins with blocked: until it minds them, their default action would end it."""
    return tuple({*stop_signals, *(MANAGEMENT_SIGNALS.values() if managed else ())})


def _prepare_managed(spec: WorkerSpec) -> None:
    # A signal sent to the whole process group (a terminal's, a service manager's) is for the parent.
    others = {signum for signum in MANAGEMENT_SIGNALS.values() if signum not in spec.stop_signals}
    dump = spec.dump is not None and DUMP_SIGNAL in others
    for signum in others:
        if not (dump and signum == DUMP_SIGNAL):
            signal.signal(signum, signal.SIG_IGN)
    if dump:
        import faulthandler  # not here for subinterpreters

        assert DUMP_SIGNAL is not None
        os.set_blocking(spec.dump.fileno(), False)  # nobody may read it any more
        faulthandler.register(DUMP_SIGNAL, file=spec.dump.fileno(), all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, others)  # one that has come meanwhile is answered now


async def _run_worker(worker: Worker, target: Any) -> None:
    spec = worker._spec
    loop = asyncio.get_running_loop()
    worker.loop = loop
    worker._task = asyncio.current_task()
    worker._stopped = loop.create_future()
    if worker.stop_signal is not None:
        worker._stopped.set_result(worker.stop_signal)
    is_process = spec.kind == "process"
    if is_process:
        for signum in spec.stop_signals:
            loop.add_signal_handler(signum, worker.stop, signum)
        if hasattr(signal, "SIGIO") and signal.SIGIO not in spec.stop_signals:
            _mind_the_parent(worker._orphaned)

    def parent_gone() -> None:
        if not is_process:
            worker.stop(default_stop_signal(spec.stop_signals), "the parent is gone")

    worker.channel.attach(loop, worker._on_message, parent_gone)
    started: list[WorkerPlugin] = []
    try:
        for plugin in spec.plugins:
            started.append(plugin)
            await _await_hook(plugin.start, plugin.start(worker))
        try:
            if is_server_context(target) or spec.role == "worker":
                await _live_context(worker, target, is_process)
            else:
                await _live_coroutine(worker, target, is_process)
        except Exception as exc:
            phase = "shutdown" if worker._entered else "initialization"
            log.exception("Worker %d: Error during context manager %s", spec.index, phase)
            worker.channel.send("failed", phase=phase, error=describe_error(exc))
            raise
    finally:
        for plugin in reversed(started):
            await _await_hook(plugin.stop, plugin.stop(worker))
        worker.channel.detach()
        if is_process:
            # The loop takes its handlers along when it is closed; a late signal would then kill.
            signal.pthread_sigmask(signal.SIG_BLOCK, spec.stop_signals)


def _mind_the_parent(handler: Callable[[int, Any], None]) -> None:
    """Have *handler* called when the parent is gone, and this process ended soon after."""
    signal.signal(signal.SIGIO, handler)
    _end_after_signal(signal.SIGIO, ORPHAN_GRACE)


def _unblock(worker: Worker) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, worker._spec.stop_signals)


async def _live_context(worker: Worker, target: Any, is_process: bool) -> None:
    spec = worker._spec
    if not callable(target):
        raise TypeError(f"a worker must be callable (a function under @aiotools.server_context), not {target!r}")
    context = target(worker.loop, spec.index, spec.args)
    if not hasattr(type(context), "__aenter__"):
        if inspect.iscoroutine(context):
            context.close()
        raise TypeError(
            f"a worker must return an asynchronous context manager, not {type(context).__name__!r}: "
            "is @aiotools.server_context missing?"
        )
    if is_process:
        _unblock(worker)
    async with context:
        worker._entered = worker.ready = True
        worker.channel.send("ready")
        if spec.run_to_completion:
            result = default_stop_signal(spec.stop_signals)
        else:
            assert worker._stopped is not None
            result = await worker._stopped
            worker.channel.send("stopping", signal=int(result))
            await worker.stop_accepting()
            for hook in worker._drain_hooks:
                result_of_hook = _call_hook(hook)
                if inspect.isawaitable(result_of_hook):
                    await _await_hook(hook, result_of_hook)
        # A user's own context manager may refuse attributes; it then has no use for the signal.
        with contextlib.suppress(AttributeError):
            context.yield_return = result


async def _live_coroutine(worker: Worker, target: Any, is_process: bool) -> None:
    """An extra process given as a coroutine function: cancelled on the first stop signal."""
    spec = worker._spec
    assert worker.loop is not None and worker._stopped is not None
    task = worker.loop.create_task(target(worker.loop, spec.index, spec.args))
    worker._entered = worker.ready = True
    worker.channel.send("ready")
    if is_process:
        _unblock(worker)
    stopped = worker._stopped
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
    finally:
        asked = stopped.done() and not task.done()
        if not task.done():
            task.cancel()
        await asyncio.wait([task])
    if task.cancelled() and asked:
        return
    task.result()


def _run_extra(worker: Worker, target: Any) -> None:
    spec = worker._spec
    if spec.kind != "process":
        raise RuntimeError("an extra without an event loop runs as a process only")

    def interrupt(signum: int, frame: Any) -> None:
        for later in spec.stop_signals:
            signal.signal(later, signal.SIG_IGN)
        worker.stop(signum)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        if signum == signal.SIGTERM:
            raise SystemExit(0)
        raise InterruptedBySignal(signum)

    def orphaned(signum: int, frame: Any) -> None:
        worker._orphaned(signum, frame)
        if worker.stop_signal is None:
            interrupt(default_stop_signal(spec.stop_signals), frame)

    try:
        try:
            for signum in spec.stop_signals:
                signal.signal(signum, interrupt)
            if hasattr(signal, "SIGIO") and signal.SIGIO not in spec.stop_signals:
                _mind_the_parent(orphaned)
            worker.ready = True
            worker.channel.send("ready")
            _unblock(worker)
            target(None, spec.index, spec.args)
        finally:
            # A signal may still come in here, but none after it.
            for signum in spec.stop_signals:
                signal.signal(signum, signal.SIG_IGN)
    except (SystemExit, KeyboardInterrupt, InterruptedBySignal):
        if worker.stop_signal is None:
            raise  # its own, not one of ours
        log.warning("extra_proc[%d] did not handle %s.", spec.index, name_of(int(worker.stop_signal)))
