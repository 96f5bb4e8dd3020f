"""The parent's side of the server: one state machine per child, one slot per index.

Objects
    :class:`Supervisor`  the whole; runs in the parent's loop; runs no user code but the main context.
    :class:`Slot`        an index that is to be kept filled: ``current`` child, ``successor`` while one is
                         being replaced, failures in a row, pending restart.
    :class:`Child`       one process, thread or interpreter: its handle (kinds.py), its channel
                         (channel.py), its state, its record (report.py).

States of a child::

    STARTING -> READY -> DRAINING -> GONE

    STARTING  from before the start call; also while its context is being entered
    READY     its context is entered (message "ready")
    DRAINING  it was told to stop, or says that it stops ("stopping")
    GONE      its end is known and collected, its channel closed

    Every state may be followed by GONE; nothing ever goes back.  Child.reason says why a child that
    is not to be missed was told to stop; a child that goes without one died unasked.

Generations
    ``Supervisor.generation`` counts from 1 and is that of new children.  A rolling restart tries the
    next number; it becomes the server's when the last slot has moved, and is given up (the old
    children stay) when one of its children fails before READY.  Numbers are never used twice.
    Replacing slot i: successor STARTING -> READY, then it becomes ``current``, then the old one is
    told to drain, then its end is awaited.  So at most ``max_surge`` children more than usual exist.

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
    detection a plugin calls ``Supervisor.kill_child(child, reason, stacks=True)`` from its tick().

Everything here runs in the parent's loop; nothing blocks except the start of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import importlib.machinery
import logging
import os
import random
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from ..fork import ChildStartError, keep_from_children
from .channel import Channel
from .kinds import ABANDONED, InterpreterHandle, ThreadHandle, start_process
from .nurseries import Nurseries
from .options import ServerOptions
from .plugins import ServerPlugin, WorkerPlugin
from .report import ServerFailed, ServerReport, WorkerRecord
from .signals import MANAGEMENT_SIGNALS, default_stop_signal, name_of, signal_of
from .sockets import ListenSockets
from .worker import DUMP_SIGNAL, WorkerSpec, describe_error, import_afresh, import_target, run_child

__all__ = ("Child", "Slot", "State", "Supervisor")

log = logging.getLogger(__package__)

#: Seconds between two looks at the children (memory, plugins' ticks).
TICK = 1.0
#: Seconds at most for the workers to take what waits in the accept queues when the server stops.
ACCEPT_GRACE = 2.0
#: Seconds at most that a process gets to write its stacks before it is killed,
DUMP_GRACE = 2.0
#: and seconds without anything new after which they are whole.
DUMP_PAUSE = 0.1


class State(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


class Child:
    """One child of the server, from its start to after its end.

    :ivar index: index, role, kind, generation: as in :class:`WorkerSpec`.
    :ivar state: a :class:`State`.
    :ivar reason: why it was told to stop or killed; None as long as its end would be unasked for.
    :ivar failure: what its "failed" message said, or None.
    :ivar record: its :class:`WorkerRecord`.
    :ivar status: the line that it set with ``Worker.set_status()``.
    """

    def __init__(self, sup: Supervisor, slot: Slot, generation: int) -> None:
        self.sup = sup
        self.slot = slot
        self.index = slot.index
        self.role = slot.role
        self.kind = slot.kind
        self.generation = generation
        self.state = State.STARTING
        self.handle: Any = None
        self.channel: Channel | None = None
        self.reason: str | None = None
        self.failure: str | None = None
        self.status: str | None = None
        self.started = time.monotonic()
        self.ready_at: float | None = None
        self.exitcode: int | None = None
        self.record = WorkerRecord(self.index, self.role, self.kind, generation, started=time.time())
        self.stacks = bytearray()
        self._dump: Any = None
        self._timers: list[asyncio.TimerHandle] = []
        self._watch: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()  # READY or GONE
        self._gone = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Child {self.label} generation={self.generation} {self.state.value}>"

    @property
    def label(self) -> str:
        """``"worker 0 [1234]"``, for logs."""
        return f"{self.role} {self.index} [{self.pid if self.pid is not None else 'not started'}]"

    @property
    def pid(self) -> int | None:
        return self.record.pid

    @property
    def alive(self) -> bool:
        return self.handle is not None and self.state is not State.GONE

    async def wait_settled(self) -> bool:
        """Wait until it is ready (True) or gone (False)."""
        await self._settled.wait()
        return self.state is not State.GONE

    async def wait_gone(self) -> int:
        """Wait for its end; returns the exit code."""
        await self._gone.wait()
        assert self.exitcode is not None
        return self.exitcode

    async def stacks_settled(self) -> None:
        """Wait until it has written its stacks, or does not seem to."""
        end = time.monotonic() + DUMP_GRACE
        seen = -1
        while time.monotonic() < end and (not self.stacks or len(self.stacks) != seen):
            seen = len(self.stacks)
            await asyncio.sleep(DUMP_PAUSE)

    def send(self, message: str, /, **fields: Any) -> None:
        """Send a message over its channel (worker.py lists them)."""
        if self.channel is not None:
            self.channel.send(message, **fields)


class TargetError(RuntimeError):
    """The code of thread workers could not be imported."""


#: What _start_child() raises for a child that could not be had, as opposed to misuse.
START_ERRORS = (ChildStartError, TargetError)


class Slot:
    """An index that the server keeps filled."""

    def __init__(self, index: int, role: str, kind: str, target: Any) -> None:
        self.index = index
        self.role = role
        self.kind = kind
        self.target = target
        self.current: Child | None = None
        self.successor: Child | None = None
        self.wanted = True
        self.serial = 0  # of the last child
        self.failures = 0  # in a row
        self.restart: asyncio.Task[Any] | None = None
        self.replacing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Slot {self.role} {self.index} current={self.current} successor={self.successor}>"


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
            self.nurseries = Nurseries(mp_context, preload_for(worker, options), self.stop_signals)
        self.slots: dict[int, Slot] = {}
        self.children: list[Child] = []
        self.report = ServerReport()
        self.generation = 1
        self._last_generation = 1
        self.stop_signal: Any = None
        self.stop_reason: str | None = None
        self.failure: str | None = None
        self.abandoned: str | None = None  # why the last rolling restart was given up
        self.rolling = False
        self.started_at = time.monotonic()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._main_context: Any = None
        self._stop = asyncio.Event()
        self._stop_count = 0
        self._at_once = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._roll_task: asyncio.Task[Any] | None = None
        self._roll_again = False
        self._thread_targets: dict[int, Any] = {}
        self._gil_warned = False
        self._started = False  # all initial children have been
        self._up = False
        self._expected = num_workers + len(self.extras)

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
                self._hook(plugin.close, self)
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
        self._started = True
        assert self.loop is not None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.stop_signals)
        ticker = self._spawn(self._ticker())
        try:
            if self.run_to_completion:
                await self._wait_all_gone()
            else:
                self._check_anybody_left()
                await self._stop.wait()
        finally:
            ticker.cancel()
        signum = self.stop_signal
        if self.run_to_completion and signum is None:
            signum = self.stop_signal = default_stop_signal(self.stop_signals)
            self.stop_reason = "all children have run to completion"
        with contextlib.suppress(AttributeError):
            self._main_context.yield_return = signum
        self._event("stopping", signal=signum, reason=self.stop_reason)
        if self.sockets is not None:
            await self._turn_away()
        await self._stop_children(self._signal_for_children())
        self._event("stopped")

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
            await self._start_child(slot, self.generation)
        except START_ERRORS as exc:
            if set(self.stop_signals) & {int(s) for s in signal.sigpending()}:
                return  # the stop that is about to be noticed hit the child before it could mind
            if self.options.restart == "never":
                raise
            self._boot_failed(slot, str(exc))

    def _check_up(self) -> None:
        """Say once that all children are ready."""
        if self._up or self.stop_signal is not None or len(self.slots) < self._expected:
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
            self._event("ready")

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
                        self.recycle(child, f"{child.record.memory} bytes resident")
            for plugin in self.plugins:
                self._hook(plugin.tick, time.monotonic())
            if self.nurseries is not None:
                self.nurseries.collect()

    async def _wait_all_gone(self) -> None:
        while self.children:
            await asyncio.wait(
                [asyncio.ensure_future(c._gone.wait()) for c in self.children],
                return_when=asyncio.FIRST_COMPLETED,
            )

    def _check_anybody_left(self) -> None:
        """Without a living child and with none to come, there is nothing to wait for."""
        if (
            self.children
            or not self._started
            or not self.slots
            or self.stop_signal is not None
            or self.run_to_completion
            or any(s.restart is not None for s in self.slots.values())
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
                self._tell_stop(child, signum, "stopped")
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
            self._tell_stop(child, signum, "stopped")
        pending = list(self.children)
        if not pending:
            return
        if self.managed and self.wait_timeout is None:
            for child in pending:
                self._arm_budgets(child)
            timeout = None
        else:
            timeout = self.wait_timeout
        waits = [asyncio.ensure_future(c._gone.wait()) for c in pending]
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
                if child._watch is not None and child._watch.done():
                    child._watch = self.loop.create_task(self._watch_exit(child))
            signum = int(default_stop_signal(self.stop_signals))
            for child in list(self.children):
                self._tell_stop(child, signum, "the server leaves by an exception")
            await self._reap(self.wait_timeout if self.wait_timeout is not None else 5.0)
            for child in list(self.children):
                log.warning("%s has not ended in time; killing it", child.label)
                self._kill(child, "killed: not ended in time")
            await self._reap(5.0)

    async def _reap(self, timeout: float) -> None:
        waits = [asyncio.ensure_future(c._gone.wait()) for c in self.children]
        if waits:
            _, left = await asyncio.wait(waits, timeout=timeout)
            for w in left:
                w.cancel()

    def _tell_stop(self, child: Child, signum: int, reason: str) -> None:
        if child.reason is None:
            child.reason = reason
        if child.state is State.GONE:
            return
        if child.state is not State.STARTING:
            self._set_state(child, State.DRAINING)
        child.send("stop", signal=int(signum), reason=reason)
        if child.handle is not None:
            with contextlib.suppress(OSError):
                child.handle.tell(signum)  # the message may have reached it first

    def _arm_budgets(self, child: Child) -> None:
        """Drain, then cancel, then kill."""
        drain = self.options.drain_timeout
        if drain is None:
            return
        loop = self.loop
        assert loop is not None

        def cancel() -> None:
            log.warning("%s has not drained within %g s", child.label, drain)
            child.send("cancel")
            child._timers.append(loop.call_later(self.options.cancel_timeout, kill))

        def kill() -> None:
            log.warning("%s does not end; killing it", child.label)
            self._spawn(self.kill_child(child, "killed: did not end", stacks=True))

        child._timers.append(loop.call_later(drain, cancel))

    async def drain(self, child: Child, reason: str) -> None:
        """Tell one child to stop and wait for its end, within its budgets."""
        if child.state is State.GONE:
            return
        self._tell_stop(child, int(default_stop_signal(self.stop_signals)), reason)
        self._arm_budgets(child)
        await child.wait_gone()

    async def kill_child(self, child: Child, reason: str, *, stacks: bool = False) -> None:
        """Kill a child; with *stacks*, its threads' Python stacks are logged first."""
        if not child.alive:
            return
        if child.reason is None:
            child.reason = reason
        if stacks:
            await self.log_stacks(child)
        self._kill(child, reason)

    def _kill(self, child: Child, reason: str) -> None:
        if not child.alive:
            return
        child.record.reason = child.record.reason or reason
        if isinstance(child.handle, ThreadHandle):
            child.handle.kill()
        else:
            with contextlib.suppress(OSError):
                child.handle.send_signal(signal.SIGKILL)

    async def log_stacks(self, child: Child) -> None:
        """Log the Python stacks of all threads of a child."""
        if child.kind == "thread":
            text = child.handle.stack()
        elif child.kind == "interpreter":
            # Only its own watchdog sees them, and has written what it could.
            text = child.stacks.decode(errors="replace")
        elif child._dump is not None and DUMP_SIGNAL is not None:
            del child.stacks[:]
            with contextlib.suppress(OSError):
                child.handle.send_signal(DUMP_SIGNAL)
            await child.stacks_settled()
            text = child.stacks.decode(errors="replace")
        else:
            return
        log.error("stacks of %s:\n%s", child.label, text.rstrip() or "(none to be had)")

    # One child

    async def _start_child(self, slot: Slot, generation: int, *, successor: bool = False) -> Child:
        """Start a child in *slot*; it is up, but not ready, on return."""
        assert self.loop is not None
        child = Child(self, slot, generation)
        slot.serial += 1
        theirs: socket.socket | None
        ours, theirs = socket.socketpair()
        keep_from_children(ours)
        dump_r = dump_w = None
        try:
            if self.managed and child.kind != "thread" and DUMP_SIGNAL is not None:
                dump_r, dump_w = self.mp_context.Pipe(duplex=False)
                keep_from_children(dump_r)
            plugins: list[WorkerPlugin] = []
            for plugin in self.plugins:
                made = plugin.child_plugin(child)
                if made is not None:
                    plugins.append(made)
            sockets = self.sockets_for(child)
            target = self._target_for(slot, generation)
            spec = WorkerSpec(
                index=slot.index,
                generation=generation,
                kind=child.kind,
                role=slot.role,
                target=target,
                args=self.args,
                stop_signals=self.stop_signals,
                runner=self.runner,
                channel=theirs,
                prestart_hook=self.prestart_hook,
                run_to_completion=self.run_to_completion,
                managed=self.managed,
                sockets=sockets,
                dump=dump_w,
                serial=slot.serial,
                max_requests=self._jittered_int(self.options.max_requests),
                plugins=plugins,
            )
            child.channel = Channel(ours)
            child._dump = dump_r
            if successor:
                slot.successor = child
            else:
                slot.current = child
            # From here on it hears what all are told: messages wait in the channel until it listens.
            self.children.append(child)
            child.channel.attach(self.loop, lambda message: self._on_message(child, message))
            self._child_event(child, "starting")
            if child.kind == "process":
                if self.nurseries is not None:
                    child.handle = await self.nurseries.start(spec)
                else:
                    child.handle = await start_process(spec, self.mp_context)
            elif child.kind == "thread":
                spec.sockets = [s.dup() for s in sockets]
                child.handle = ThreadHandle(spec, lambda: run_child(spec))
                theirs = None
            else:
                spec.sockets = sockets
                child.handle = InterpreterHandle(spec)
                theirs = None
        except BaseException:
            if slot.successor is child:
                slot.successor = None
            if slot.current is child:
                slot.current = None
            if child.channel is not None:
                child.channel.close()
            ours.close()
            if dump_r is not None:
                dump_r.close()
            if child in self.children:
                self.children.remove(child)
            child.exitcode = 1
            child.state = State.GONE
            child._settled.set()
            child._gone.set()
            raise
        finally:
            if theirs is not None:
                theirs.close()
            if dump_w is not None:
                dump_w.close()
        child.record.pid = child.handle.pid
        self.report.add(child.record)
        if dump_r is not None:
            os.set_blocking(dump_r.fileno(), False)
            self.loop.add_reader(dump_r.fileno(), self._read_dump, child)
        if self.options.start_timeout is not None:
            child._timers.append(self.loop.call_later(self.options.start_timeout, self._start_timeout, child))
        # Not among self._tasks: it must see the end also while the server stops.
        child._watch = self.loop.create_task(self._watch_exit(child))
        if self.stop_signal is not None:
            # The stop came while it was being started.
            self._tell_stop(child, self._signal_for_children(), "stopped")
        return child

    def _target_for(self, slot: Slot, generation: int) -> Any:
        """What a child runs.  Threads share the modules of this process, so these are exchanged here."""
        if slot.kind != "thread" or not isinstance(slot.target, str):
            return slot.target
        if generation not in self._thread_targets:
            try:
                fn = import_target if generation == 1 else import_afresh
                self._thread_targets[generation] = fn(slot.target)
            except Exception as exc:
                log.exception("%s cannot be imported", slot.target)
                raise TargetError(describe_error(exc)) from exc
        return self._thread_targets[generation]

    def sockets_for(self, child: Child) -> list[socket.socket]:
        """The listening sockets for a new child."""
        if self.sockets is None or child.role != "worker":
            return []
        return self.sockets.for_index(child.index)

    def _read_dump(self, child: Child) -> None:
        assert self.loop is not None
        while True:
            try:
                data = os.read(child._dump.fileno(), 65536)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self.loop.remove_reader(child._dump.fileno())
                return
            child.stacks += data

    def _start_timeout(self, child: Child) -> None:
        if child.state is State.STARTING and child.alive:
            child.failure = f"not ready within {self.options.start_timeout:g} s"
            log.error("%s is %s", child.label, child.failure)
            self._spawn(self._kill_unready(child))

    async def _kill_unready(self, child: Child) -> None:
        await self.log_stacks(child)
        child.record.reason = f"failed: {child.failure}"
        self._kill(child, f"failed: {child.failure}")

    def _set_state(self, child: Child, state: State) -> None:
        order = list(State)
        if order.index(state) <= order.index(child.state):
            return
        child.state = state
        self._child_event(child, state.value)

    def _on_message(self, child: Child, message: dict[str, Any]) -> None:
        kind = message.get("t")
        if kind == "ready":
            if child.state is State.STARTING:
                child.ready_at = time.monotonic()
                child.record.ready = time.time()
                if child.reason is None:
                    self._set_state(child, State.READY)
                    self._arm_age(child)
                    self._check_gil(child)
                    self._check_up()
                else:
                    self._set_state(child, State.DRAINING)
            child._settled.set()
        elif kind == "failed":
            child.failure = f"error during {message['phase']}: {message['error']}"
            child.record.reason = f"failed: {child.failure}"
            if child.role == "worker" and self.options.restart == "never" and not self._replacing(child):
                self._worker_failed(child)
        elif kind == "stopping":
            self._set_state(child, State.DRAINING)
        elif kind == "recycle":
            self.recycle(child, message.get("why", ""))
        elif kind == "status":
            child.status = message.get("text")
        else:
            for plugin in self.plugins:
                self._hook(plugin.on_message, child, message)

    def _check_gil(self, child: Child) -> None:
        """On a free-threaded build, say once that thread workers do not run in parallel after all."""
        if child.kind != "thread" or self._gil_warned or not gil_came_back():
            return
        self._gil_warned = True
        log.warning(
            "the GIL is enabled, so thread workers do not run in parallel; one of these extension modules needs it: %s",
            ", ".join(foreign_extensions()) or "(unknown)",
        )

    def _replacing(self, child: Child) -> bool:
        return child.slot.successor is child or child.slot.current is not child

    async def _watch_exit(self, child: Child) -> None:
        code = await child.handle.wait()
        assert child.channel is not None
        child.channel.read()  # what it said last comes before what its end means
        if child._dump is not None:
            self._read_dump(child)
            assert self.loop is not None
            self.loop.remove_reader(child._dump.fileno())
            child._dump.close()
            child._dump = None
        child.channel.close()
        for timer in child._timers:
            timer.cancel()
        child._timers.clear()
        was_ready = child.ready_at is not None
        child.exitcode = code
        self.children.remove(child)
        record = child.record
        record.ended = time.time()
        record.core_dumped = child.handle.core_dumped
        if code != ABANDONED:
            record.set_exit(code)
        if record.reason is None:
            record.reason = child.reason or ("crashed" if code else "ended by itself")
        for plugin in self.plugins:
            facts = self._hook(plugin.describe, child)
            if facts:
                record.evidence.update(facts)
        self._log_exit(child)
        self._set_state(child, State.GONE)
        child._settled.set()
        child._gone.set()
        self._after_exit(child, was_ready)

    def _log_exit(self, child: Child) -> None:
        code, record = child.exitcode, child.record
        who = f"A child process [{child.pid}]" if child.kind == "process" else f"A {child.kind}"
        assert code is not None
        extra = ""
        if self.managed:
            extra = f" after {time.monotonic() - child.started:.1f} s, generation {child.generation}"
            if record.memory:
                extra += f", {record.memory / 2**20:.0f} MiB"
            for name, value in record.evidence.items():
                extra += f", {name}: {value}"
            extra += f" ({record.reason})"
        if code == ABANDONED:
            log.error("%s was given up%s", child.label, extra)
        elif code < 0:
            log.warning(
                "%s was terminated by %s%s",
                who,
                record.outcome,
                extra and f"; {child.label}{extra}",
            )
        elif code > 0:
            log.warning(
                "%s has exited with a non-zero status %d%s",
                who,
                code,
                extra and f"; {child.label}{extra}",
            )
        else:
            log.debug("%s has ended%s", child.label, extra)

    def _after_exit(self, child: Child, was_ready: bool) -> None:
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
            self._died_unasked(slot, child, was_ready)
        self._check_anybody_left()

    def _died_unasked(self, slot: Slot, child: Child, was_ready: bool) -> None:
        policy = self.options.restart
        if policy == "never" or (policy == "on-failure" and child.exitcode == 0):
            return
        if not was_ready:
            self._boot_failed(slot, child.failure or child.record.outcome)
            return
        assert child.ready_at is not None
        if time.monotonic() - child.ready_at >= self.options.min_uptime:
            slot.failures = 0
            self._schedule_restart(slot, 0.0)
        else:
            self._boot_failed(slot, f"{child.record.reason}, {child.record.outcome}")

    def _boot_failed(self, slot: Slot, why: str) -> None:
        slot.failures += 1
        limit = self.options.boot_failure_limit
        others = any(
            s is not slot and s.current is not None and s.current.state is State.READY for s in self.slots.values()
        )
        if slot.failures >= limit and not (self.abandoned is not None and others):
            self.give_up(f"{slot.role} {slot.index} has failed {slot.failures} times in a row; the last time: {why}")
            return
        delay = 0.0
        if slot.failures > 1:
            delay = min(self.options.backoff_max, self.options.backoff * 2 ** (slot.failures - 2))
            delay *= random.uniform(0.5, 1.0)
        log.warning(
            "%s %d will be restarted in %.2f s (failure %d of %d: %s)",
            slot.role,
            slot.index,
            delay,
            slot.failures,
            limit,
            why,
        )
        self._schedule_restart(slot, delay)

    def _schedule_restart(self, slot: Slot, delay: float) -> None:
        if self.stop_signal is not None or slot.restart is not None:
            return
        slot.restart = self._spawn(self._restart(slot, delay))

    async def _restart(self, slot: Slot, delay: float) -> None:
        failed = None
        try:
            if delay:
                await asyncio.sleep(delay)
            async with slot.replacing:
                if slot.current is None and slot.wanted and self.stop_signal is None:
                    try:
                        await self._start_child(slot, self.generation)
                    except START_ERRORS as exc:
                        failed = str(exc)
        finally:
            slot.restart = None
        if failed is not None:
            self._boot_failed(slot, failed)

    # Replacing

    async def replace(self, slot: Slot, generation: int, reason: str) -> str | None:
        """Start a successor in *slot* and, once it is ready, drain the present child.

        Returns None, or why the successor could not be had (the present child then stays).
        """
        async with slot.replacing:
            if slot.role == "extra" and slot.current is not None:
                # It may hold something that only one process can hold.
                await self.drain(slot.current, reason)
                slot.current = None
            try:
                child = await self._start_child(slot, generation, successor=True)
            except START_ERRORS as exc:
                return str(exc)
            try:
                ready = await child.wait_settled()
            except asyncio.CancelledError:
                # The server stops, or the restart is given up: _stop_children sees to the child.
                if self.stop_signal is None and child.alive:
                    child.reason = "abandoned"
                    self._kill(child, "abandoned")
                raise
            if not ready:
                return child.failure or child.record.outcome
            old, slot.current, slot.successor = slot.current, child, None
            slot.failures = 0
            if old is not None:
                await self.drain(old, reason)
            return None

    def recycle(self, child: Child, why: str) -> None:
        """Replace a worker that has reached a limit."""
        slot = child.slot
        if slot.current is not child or child.state is not State.READY or child.reason is not None:
            return
        if self.stop_signal is None and not slot.replacing.locked():
            self._spawn(self._recycle(child, f"recycled: {why}"))

    async def _recycle(self, child: Child, reason: str) -> None:
        log.info("%s is being %s", child.label, reason)
        failed = await self.replace(child.slot, self.generation, reason)
        if failed is not None:
            log.error("%s could not be replaced and goes on: %s", child.label, failed)

    def _arm_age(self, child: Child) -> None:
        age = self.options.max_age
        if age is not None and child.role == "worker":
            assert self.loop is not None
            age *= 1 - random.uniform(0, self.options.recycle_jitter)
            child._timers.append(self.loop.call_later(age, self.recycle, child, f"{age:.1f} s old"))

    def _jittered_int(self, limit: int | None) -> int | None:
        if limit is None:
            return None
        return max(1, round(limit * (1 - random.uniform(0, self.options.recycle_jitter))))

    # Verbs

    def command(self, verb: str) -> None:
        """``restart``, ``reload``, ``status``, ``more`` or ``less``."""
        log.debug("command: %s", verb)
        getattr(self, f"do_{verb}")()

    def do_restart(self) -> None:
        """Rolling restart; one that is asked for while another runs follows it, however often."""
        if self.stop_signal is not None:
            return
        if self._roll_task is not None:
            self._roll_again = True
            return
        self._roll_task = self._spawn(self._roll_loop())

    async def _roll_loop(self) -> None:
        try:
            while True:
                self._roll_again = False
                await self._roll()
                if not self._roll_again:
                    return
        finally:
            self._roll_task = None
            self.rolling = False

    async def _roll(self) -> None:
        self._last_generation += 1
        generation = self._last_generation
        self.rolling = True
        self._event("reloading", generation=generation)
        log.info("rolling restart: generation %d", generation)
        slots = [s for s in self.slots.values() if s.role == "worker" and s.wanted]
        failed = None
        if slots:
            # The first shows whether the new code starts at all.
            failed = await self._roll_slot(slots[0], generation)
            queue = slots[1:]
            running: set[asyncio.Task[str | None]] = set()
            try:
                while failed is None and (queue or running):
                    while queue and len(running) < self.options.max_surge:
                        running.add(self._spawn(self._roll_slot(queue.pop(0), generation)))
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    failed = next((r for t in done if (r := t.result()) is not None), None)
            finally:
                for task in running:
                    task.cancel()
                if running:
                    await asyncio.wait(running)
        if failed is None:
            for slot in [s for s in self.slots.values() if s.role == "extra"]:
                failed = await self._roll_slot(slot, generation)
                if failed is not None:
                    break
        if failed is not None:
            self.abandoned = f"generation {generation} was abandoned: {failed}"
            log.error("rolling restart: %s; the old workers go on", self.abandoned)
            if self.nurseries is not None:
                self.nurseries.keep_only(self.generation)
            self._event("abandoned", generation=generation, reason=failed)
        else:
            self.generation = generation
            self.abandoned = None
            # Nobody starts the code of earlier ones any more.
            self._thread_targets = {g: t for g, t in self._thread_targets.items() if g >= generation}
            if self.nurseries is not None:
                self.nurseries.keep_only(generation)
            log.info("rolling restart: generation %d serves", generation)
            self._event("reloaded", generation=generation)

    async def _roll_slot(self, slot: Slot, generation: int) -> str | None:
        if not slot.wanted:
            return None
        failed = await self.replace(slot, generation, "reloaded")
        if failed is not None and slot.role == "extra" and self.options.restart != "never":
            self._boot_failed(slot, failed)  # the old one is gone already
        return failed

    def do_reload(self) -> None:
        """Reload without restart: the workers run their on_reload hooks."""
        for child in self.children:
            child.send("reload")
        self._event("reload")

    def do_status(self) -> None:
        """Write the status to the log."""
        log.info("status: %s", self.status())

    def do_more(self) -> None:
        """One worker more."""
        if self.stop_signal is not None:
            return
        index = next(i for i in range(len(self.slots) + 1) if i not in self.slots)
        slot = self.slots[index] = Slot(index, "worker", self.options.worker_kind, self.worker)
        log.info("one worker more: %d", index)
        self._schedule_restart(slot, 0.0)

    def do_less(self) -> None:
        """One worker less, but never the last."""
        workers = [s for s in self.slots.values() if s.role == "worker" and s.wanted]
        if self.stop_signal is not None or len(workers) < 2:
            return
        slot = max(workers, key=lambda s: s.index)
        slot.wanted = False
        log.info("one worker less: %d", slot.index)
        self._spawn(self._remove(slot))

    async def _remove(self, slot: Slot) -> None:
        async with slot.replacing:
            if slot.restart is not None:
                slot.restart.cancel()
            if slot.current is not None:
                await self.drain(slot.current, "one worker less")
            self.slots.pop(slot.index, None)

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
                facts.update(self._hook(plugin.describe, child) or {})
            children.append(facts)
        if self.stop_signal is not None:
            state = "stopping"
        elif self.rolling:
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

    def _spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
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

    def _hook(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except Exception:
            log.exception("Error in %r", fn)
            return None

    def _child_event(self, child: Child, event: str) -> None:
        for plugin in self.plugins:
            self._hook(plugin.child_event, child, event)

    def _event(self, event: str, **facts: Any) -> None:
        for plugin in self.plugins:
            self._hook(plugin.server_event, event, **facts)


def gil_came_back() -> bool:
    """Whether this is a free-threaded build whose GIL is enabled."""
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED")) and sys._is_gil_enabled()  # type: ignore[attr-defined]


def foreign_extensions() -> list[str]:
    """Names of the loaded extension modules that do not belong to the standard library."""
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return sorted(
        name
        for name, module in list(sys.modules.items())
        if (getattr(module, "__file__", None) or "").endswith(suffixes)
        and name.partition(".")[0] not in sys.stdlib_module_names
    )


def preload_for(worker: Any, options: ServerOptions) -> list[str]:
    """What the fork servers of a server import: what was asked for, and what its kind of worker is known to need."""
    modules = list(options.preload)
    if options.loop_factory == "uvloop":
        modules.append("uvloop")
    modules += getattr(getattr(worker, "func", worker), "_aiotools_preload", ())
    return modules


def resident_memory(pid: int) -> int | None:
    """Resident memory of a process in bytes, where the system tells."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
