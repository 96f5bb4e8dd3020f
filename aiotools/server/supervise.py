"""The parent's side of the server: the children it has, what they say, and when it ends.

Objects
    :class:`Supervisor`  the whole; runs in the parent's loop; runs no user code but the main context.
    :class:`Slot`        an index that is to be kept filled: ``current`` child, ``successor`` while one is
                         being replaced, failures in a row, pending restart (child.py).
    :class:`Child`       one process, thread or interpreter: its handle (kinds.py), its channel
                         (channel.py), its state, its record (report.py), its stacks (child.py).
    Launcher             what a new child gets, and from where it comes (launch.py, nurseries.py).
    Restarts             what follows when a child dies unasked (restarts.py).
    Rolling              replacing children that are well (rolling.py).

Generations
    ``Supervisor.generation`` counts from 1 and is that of new children.  A rolling restart tries the
    next number, see rolling.py.

Classic and managed
    With the classic arguments alone (options.managed false) the same machine runs with no restart,
    no readiness deadline and no budgets: a failed worker stops the server as SIGINT would, a dead
    one is not replaced.  A managed server also obeys the verbs: restart, reload, status, more, less.

Stopping
    ``request_stop(signal, why)`` is the one way to end the server; the first call decides.  All
    children get the signal (and the message "stop"); budgets: wait_timeout, or drain_timeout then
    cancel_timeout, then SIGKILL.  A second stop signal kills at once when managed.

Orphans
    The parent holds the write ends of the guard pipes of its processes (fork.py) and its ends of the
    channels; both vanish with it.

Hook points
    plugins.py.  The board, logs and service manager hang there; nothing below knows them.  For hang
    detection a plugin calls ``Supervisor.kill_child(child, reason, stacks=True)``.

Everything here runs in the parent's loop; nothing blocks except the start of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from .child import Child, Slot, State
from .launch import START_ERRORS, Launcher, StartAborted, preload_for
from .nurseries import Nurseries
from .options import ServerOptions
from .plugins import ServerPlugin
from .report import ServerFailed, ServerReport
from .restarts import Restarts
from .rolling import Rolling
from .signals import MANAGEMENT_SIGNALS, default_stop_signal, name_of, signal_of
from .sockets import ListenSockets
from .worker import blocked_at_start

__all__ = ("Child", "Slot", "State", "Supervisor")

log = logging.getLogger(__package__)

#: Seconds between two looks at the children (memory, plugins' ticks).
TICK = 1.0
#: Seconds at most for the workers to take what waits in the accept queues when the server stops.
ACCEPT_GRACE = 2.0


class Supervisor:
    """Runs the children of one :func:`start_server` call.

    :ivar options: the :class:`ServerOptions`.
    :ivar slots: index -> :class:`Slot`.
    :ivar children: all children that are not gone, in order of their start.
    :ivar generation: of the code that the server runs.
    :ivar sockets: the listening sockets of ``bind=``, or None.
    :ivar stop_signal: what stops the server, or None; *stop_reason* says why in words.
    """

    def __init__(
        self,
        worker: Any,
        extras: Sequence[Any],
        *,
        num_workers: int,
        args: Sequence[Any],
        stop_signals: Iterable[int],
        wait_timeout: float | None,
        mp_context: Any,
        prestart_hook: Callable[[int], Any] | None,
        ignore_child_interrupts: bool,
        run_to_completion: bool,
        runner: Callable[[Any], Any],
        options: ServerOptions,
        sockets: ListenSockets | None = None,
        with_nursery: bool = False,
    ) -> None:
        self.worker = worker
        self.extras = list(extras)
        self.num_workers = num_workers
        self.args = tuple(args)
        self.stop_signals = tuple(int(s) for s in stop_signals)
        self.wait_timeout = wait_timeout
        self.mp_context = mp_context
        self.prestart_hook = prestart_hook
        self.ignore_child_interrupts = ignore_child_interrupts
        self.run_to_completion = run_to_completion
        self.runner = runner
        self.options = options
        self.managed = options.managed
        self.plugins: list[ServerPlugin] = list(options.plugins)
        self.sockets = sockets
        self.nurseries: Nurseries | None = None
        if with_nursery:
            block = blocked_at_start(self.stop_signals, self.managed)
            self.nurseries = Nurseries(mp_context, preload_for(worker, options), options.preload, block)
        self.slots: dict[int, Slot] = {}
        self.children: list[Child] = []
        self.report = ServerReport()
        self.generation = 1
        self.stop_signal: Any = None
        self.stop_reason: str | None = None
        self.failure: str | None = None
        self.abandoned: str | None = None  # why the last rolling restart was given up
        self.started_at = time.monotonic()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._main_context: Any = None
        self._stop = asyncio.Event()
        self._stop_count = 0
        self._at_once = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.started = asyncio.Event()  # all initial children have been
        self._up = False
        self.launcher = Launcher(self)
        self.restarts = Restarts(self)
        self.rolling = Rolling(self)

    # Life

    async def run(self, main_context: Any) -> None:
        """The whole life of the server, inside the parent's loop."""
        self.loop = asyncio.get_running_loop()
        self._main_context = main_context
        for signum in self.stop_signals:
            self.loop.add_signal_handler(signum, self._on_stop_signal, signum)
        if self.managed:
            for verb, signum in MANAGEMENT_SIGNALS.items():
                if signum not in self.stop_signals:
                    self.loop.add_signal_handler(signum, self.command, verb)
        opened: list[ServerPlugin] = []
        try:
            for plugin in self.plugins:
                opened.append(plugin)
                plugin.open(self)
            with main_context as given:
                if given is None:
                    given = ()
                elif not isinstance(given, tuple):
                    given = (given,)
                self.args = (*given, *self.args)
                try:
                    await self._run_children()
                finally:
                    await self._end_all()
                    if self.nurseries is not None:
                        await self.nurseries.close()
                self.report.stop_signal = self.stop_signal
                self.report.reason = self.stop_reason
        finally:
            for plugin in reversed(opened):
                try:
                    await plugin.finish()
                except Exception:
                    log.exception("Error in %r", plugin)
            for plugin in reversed(opened):
                self.hook(plugin.close, self)
        if self.failure is not None:
            self.report.failed = True
            raise ServerFailed(self.failure, self.report)

    async def _run_children(self) -> None:
        for index in range(self.num_workers):
            self.slots[index] = Slot(index, "worker", self.options.worker_kind, self.worker)
        for index, extra in enumerate(self.extras, self.num_workers):
            self.slots[index] = Slot(index, "extra", "process", extra)
        for slot in list(self.slots.values()):
            await self._start_initial(slot)
            if self.stop_signal is not None and self.managed:
                break
        self.started.set()
        assert self.loop is not None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.stop_signals)
        self.check_up()  # without workers nobody else says it
        ticker = self.spawn(self._ticker())
        try:
            if self.run_to_completion:
                await self._wait_all_gone()
            else:
                self.check_anybody_left()
                await self._stop.wait()
        finally:
            ticker.cancel()
        signum = self.stop_signal
        if self.run_to_completion and signum is None:
            signum = self.stop_signal = default_stop_signal(self.stop_signals)
            self.stop_reason = "all children have run to completion"
        with contextlib.suppress(AttributeError):
            self._main_context.yield_return = signum
        self.event("stopping", signal=signum, reason=self.stop_reason)
        if self.sockets is not None:
            await self._turn_away()
        await self._stop_children(self._signal_for_children())
        self.event("stopped")

    async def _turn_away(self) -> None:
        """Have new connections refused, and those that wait to be accepted taken by the workers.

        A listening socket that is closed resets the connections in its accept queue: to the clients
        these are established already.
        """
        assert self.sockets is not None
        self.sockets.refuse_new()
        end = time.monotonic() + ACCEPT_GRACE
        empty = 0
        while time.monotonic() < end and empty < 2 and any(c.state is State.READY for c in self.children):
            # A handshake that is half done takes one more round trip.
            await asyncio.sleep(0.005)
            empty = 0 if self.sockets.pending() else empty + 1

    def _signal_for_children(self) -> int:
        # A worker understands its stop signals only.
        signum = self.stop_signal
        if signum not in self.stop_signals:
            return int(default_stop_signal(self.stop_signals))
        return int(signum)

    async def _start_initial(self, slot: Slot) -> None:
        try:
            async with slot.replacing:
                if slot.wanted:  # the verbs are heard already
                    await self.start_child(slot, self.generation)
        except START_ERRORS as exc:
            if set(self.stop_signals) & {int(s) for s in signal.sigpending()}:
                return  # the stop that is about to be noticed hit the child before it could mind
            if self.options.restart == "never":
                raise
            self.restarts.failed(slot, str(exc))

    def check_up(self) -> None:
        """Say once that all children are ready."""
        if self._up or self.stop_signal is not None:
            return
        if all(s.current and s.current.state is State.READY for s in self.slots.values()):
            self._up = True
            where = self.sockets.addresses() if self.sockets is not None else []
            log.log(
                logging.INFO if self.managed else logging.DEBUG,
                "ready: %d workers%s",
                sum(s.role == "worker" for s in self.slots.values()),
                "".join(f", {address}" for address in where),
            )
            self.event("ready")

    async def _ticker(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            for child in list(self.children):
                if child.kind == "process" and child.pid is not None:
                    child.record.memory = resident_memory(child.pid) or child.record.memory
                    limit = self.options.max_memory
                    if (
                        limit is not None
                        and child.role == "worker"
                        and child.state is State.READY
                        and (child.record.memory or 0) > limit
                    ):
                        self.rolling.recycle(child, f"{child.record.memory} bytes resident")
            for plugin in self.plugins:
                self.hook(plugin.tick, time.monotonic())
            if self.nurseries is not None:
                self.nurseries.collect()

    async def _wait_all_gone(self) -> None:
        while self.children:
            await asyncio.wait(
                [asyncio.ensure_future(c.wait_gone()) for c in self.children],
                return_when=asyncio.FIRST_COMPLETED,
            )

    def check_anybody_left(self) -> None:
        """Without a living child and with none to come, there is nothing to wait for."""
        if (
            self.children
            or not self.started.is_set()
            or not self.slots
            or self.stop_signal is not None
            or self.run_to_completion
            or any(s.restart is not None or s.replacing.locked() for s in self.slots.values())
        ):
            return
        log.warning("All child processes have terminated; shutting down the main program.")
        self.request_stop(default_stop_signal(self.stop_signals), "all children are gone")

    # Stopping

    def _on_stop_signal(self, signum: int) -> None:
        self._stop_count += 1
        if self._stop_count > 1:
            if self.managed and not self._at_once.is_set():
                log.warning("%s again: stopping at once", name_of(signum))
                self._at_once.set()
            return
        if self.run_to_completion:
            # Nobody waits for it here, but the children may.
            self.stop_signal, self.stop_reason = signal_of(signum), "stopped"
            for child in list(self.children):
                child.tell_stop(signum, "stopped")
            return
        self.request_stop(signum, "stopped")

    def request_stop(self, signum: int, why: str) -> None:
        """End the server as if *signum* had come; the first call decides."""
        if self.stop_signal is None:
            self.stop_signal = signal_of(signum)
            self.stop_reason = why
            log.debug("stopping: %s (%s)", why, name_of(int(signum)))
        self._stop.set()

    def give_up(self, why: str) -> None:
        """End the server with a failure."""
        if self.failure is None and self.stop_signal is None:
            self.failure = why
            log.error("giving up: %s", why)
            self.request_stop(default_stop_signal(self.stop_signals), why)

    def _worker_failed(self, child: Child) -> None:
        """The classic consequence of a worker that failed: as if SIGINT had come."""
        if self.ignore_child_interrupts or self.run_to_completion:
            return
        log.debug("Child %d has interrupted the main program.", child.index)
        # SIGTERM is what the main context's yield gives unless told otherwise.
        signum = signal.SIGINT if signal.SIGINT in self.stop_signals else signal.SIGTERM
        self.request_stop(signum, f"{child.label} failed: {child.failure}")

    async def _stop_children(self, signum: int) -> None:
        for task in list(self._tasks):
            task.cancel()
        for child in list(self.children):
            child.tell_stop(signum, "stopped")
        pending = list(self.children)
        if not pending:
            return
        if self.managed and self.wait_timeout is None:
            for child in pending:
                child.arm_budgets()
            timeout = None
        else:
            timeout = self.wait_timeout
        waits = [asyncio.ensure_future(c.wait_gone()) for c in pending]
        hurry = asyncio.ensure_future(self._at_once.wait())
        everyone = asyncio.ensure_future(asyncio.wait(waits))
        try:
            await asyncio.wait([everyone, hurry], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurry.cancel()
            everyone.cancel()
            for w in waits:
                w.cancel()
        for child in list(self.children):
            log.warning("%s has not ended in time; killing it", child.label)
            await self.kill_child(child, "killed: not ended in time", stacks=self.managed)
        await self._reap(5.0)

    async def _end_all(self) -> None:
        """Whatever way the server leaves: no task, no process and no channel stays."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self.children:
            # Whoever cancels all tasks of the loop cancels the watches, too.
            await asyncio.sleep(0)
            assert self.loop is not None
            for child in self.children:
                if child.watch is not None and child.watch.done():
                    child.watch = self.loop.create_task(self._watch_exit(child))
            signum = int(default_stop_signal(self.stop_signals))
            for child in list(self.children):
                child.tell_stop(signum, "the server leaves by an exception")
            await self._reap(self.wait_timeout if self.wait_timeout is not None else 5.0)
            for child in list(self.children):
                log.warning("%s has not ended in time; killing it", child.label)
                child.kill("killed: not ended in time")
            await self._reap(5.0)

    async def _reap(self, timeout: float) -> None:
        waits = [asyncio.ensure_future(c.wait_gone()) for c in self.children]
        if waits:
            _, left = await asyncio.wait(waits, timeout=timeout)
            for w in left:
                w.cancel()

    async def drain(self, child: Child, reason: str) -> None:
        """Tell one child to stop and wait for its end, within its budgets."""
        if child.state is State.GONE:
            return
        child.tell_stop(int(default_stop_signal(self.stop_signals)), reason)
        child.arm_budgets()
        await child.wait_gone()

    async def kill_child(self, child: Child, reason: str, *, stacks: bool = False) -> None:
        """Kill a child; with *stacks*, its threads' Python stacks are logged first."""
        if child.state is State.GONE:
            return
        if child.reason is None:
            child.reason = reason
        if stacks and child.alive:
            await child.log_stacks()
        child.kill(reason)

    # Its children

    async def start_child(self, slot: Slot, generation: int, *, successor: bool = False) -> Child:
        """Start a child in *slot*; it is up, but not ready, on return.

        Who is cancelled here leaves a child behind that goes on starting, for it may run the user's code
        already: it is told to stop as all others are, or killed where nobody is.

        :raises ChildStartError, TargetError, StartAborted: it could not be had (:data:`START_ERRORS`).
        """
        child = self.launcher.begin(slot, generation, successor=successor)
        assert child.start is not None
        try:
            await asyncio.wait([child.start])
        except asyncio.CancelledError:
            if self.stop_signal is None:
                child.reason = "abandoned"
                child.kill("abandoned")
            raise
        if child.start.cancelled():
            raise StartAborted(f"{child.record.reason} while it was being started")
        child.start.result()
        return child

    def child_started(self, child: Child) -> None:
        """It has a handle; it is heard, and its end is awaited, from now on."""
        assert self.loop is not None and child.channel is not None
        child.channel.attach(self.loop, lambda message: self.on_message(child, message))
        # Not among self._tasks: it must see the end also while the server stops.
        child.watch = self.loop.create_task(self._watch_exit(child))
        if self.stop_signal is not None:
            # The stop came while it was being started.
            child.tell_stop(self._signal_for_children(), "stopped")
        elif child.reason is not None:
            # As above; it has the message, but who runs no loop knows signals only.
            child.tell_stop(int(default_stop_signal(self.stop_signals)), child.reason)

    def on_message(self, child: Child, message: dict[str, Any]) -> None:
        """What a child says; worker.py lists the messages."""
        kind = message.get("t")
        if kind == "ready":
            if child.state is State.STARTING:
                child.ready_at = time.monotonic()
                child.record.ready = time.time()
                if child.reason is None:
                    child.advance(State.READY)
                    self.rolling.arm_age(child)
                    self.launcher.check_gil(child)
                    self.check_up()
                else:
                    child.advance(State.DRAINING)
            child.settle()
        elif kind == "failed":
            child.failure = f"error during {message['phase']}: {message['error']}"
            child.record.reason = f"failed: {child.failure}"
            if child.role == "worker" and self.options.restart == "never" and child.slot.current is child:
                self._worker_failed(child)
        elif kind == "stopping":
            child.advance(State.DRAINING)
        elif kind == "recycle":
            self.rolling.recycle(child, message.get("why", ""))
        elif kind == "status":
            child.status = message.get("text")
        else:
            for plugin in self.plugins:
                self.hook(plugin.on_message, child, message)

    async def _watch_exit(self, child: Child) -> None:
        code = await child.handle.wait()
        child.collect(code)
        self.children.remove(child)
        for plugin in self.plugins:
            child.record.evidence.update(self.hook(plugin.describe, child) or {})
        child.log_exit()
        child.gone()
        self._after_exit(child)

    def _after_exit(self, child: Child) -> None:
        slot = child.slot
        if slot.successor is child:
            slot.successor = None
            return  # whoever started it is waiting for it
        if slot.current is not child:
            return  # already replaced
        slot.current = None
        if self.stop_signal is not None or self.run_to_completion:
            return
        if not slot.wanted:
            self.slots.pop(slot.index, None)
        elif child.reason is None or child.reason.startswith("hung"):
            self.restarts.died_unasked(child)
        self.check_anybody_left()

    # Verbs

    def command(self, verb: str) -> None:
        """``restart``, ``reload``, ``status``, ``more`` or ``less``."""
        log.debug("command: %s", verb)
        getattr(self, f"do_{verb}")()

    def do_restart(self) -> None:
        """Rolling restart; one that is asked for while another runs follows it, however often."""
        if self.stop_signal is None:
            self.rolling.restart()

    def do_reload(self) -> None:
        """Reload without restart: the workers run their on_reload hooks."""
        for child in self.children:
            child.send("reload")
        self.event("reload")

    def do_status(self) -> None:
        """Write the status to the log."""
        log.info("status: %s", self.status())

    def do_more(self) -> None:
        """One worker more."""
        if self.stop_signal is None:
            self.rolling.more()

    def do_less(self) -> None:
        """One worker less, but never the last."""
        if self.stop_signal is None:
            self.rolling.less()

    def status(self) -> dict[str, Any]:
        """What the server is doing, as plain data."""
        children = []
        for child in self.children:
            facts = {
                "index": child.index,
                "role": child.role,
                "kind": child.kind,
                "pid": child.pid,
                "generation": child.generation,
                "state": child.state.value,
                "age": round(time.monotonic() - child.started, 3),
                "memory": child.record.memory,
                "status": child.status,
            }
            for plugin in self.plugins:
                facts.update(self.hook(plugin.describe, child) or {})
            children.append(facts)
        if self.stop_signal is not None:
            state = "stopping"
        elif self.rolling.active:
            state = "reloading"
        else:
            state = "running" if self._up else "starting"
        return {
            "pid": os.getpid(),
            "state": state,
            "generation": self.generation,
            "abandoned": self.abandoned,
            "uptime": round(time.monotonic() - self.started_at, 3),
            "workers": children,
        }

    # Small things

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that ends with the server at the latest; an error in it ends the server."""
        assert self.loop is not None
        task = self.loop.create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("Error in the supervisor", exc_info=exc)
            self.give_up(f"internal error: {exc!r}")

    def hook(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a hook of a plugin; if it raises, that is logged and the answer is None."""
        try:
            return fn(*args, **kwargs)
        except Exception:
            log.exception("Error in %r", fn)
            return None

    def child_event(self, child: Child, event: str) -> None:
        """Tell the plugins what has become of a child."""
        for plugin in self.plugins:
            self.hook(plugin.child_event, child, event)

    def event(self, event: str, **facts: Any) -> None:
        """Tell the plugins what has become of the server."""
        for plugin in self.plugins:
            self.hook(plugin.server_event, event, **facts)


def resident_memory(pid: int) -> int | None:
    """Resident memory of a process in bytes, where the system tells."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
