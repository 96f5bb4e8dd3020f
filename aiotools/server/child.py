"""One child as the parent sees it, from its start to after its end, and the slot that it fills.

States of a child::

    STARTING -> READY -> DRAINING -> GONE

    STARTING  from before the start call; also while its context is being entered
    READY     its context is entered (message "ready")
    DRAINING  it was told to stop, or says that it stops ("stopping")
    GONE      its end is known and collected, its channel closed

    Every state may be followed by GONE; nothing ever goes back.  Child.reason says why a child that
    is not to be missed was told to stop; a child that goes without one died unasked.

What follows from a child's end for the server is not known here (supervise.py, restarts.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .channel import Channel
from .kinds import ABANDONED, ThreadHandle
from .report import WorkerRecord
from .worker import DUMP_SIGNAL

if TYPE_CHECKING:
    from .supervise import Supervisor

__all__ = ("Child", "Slot", "State")

log = logging.getLogger(__package__)

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
    """One child of the server.

    :ivar index: index, role, kind, generation: as in :class:`WorkerSpec`.
    :ivar state: a :class:`State`.
    :ivar handle: the process, thread or interpreter (kinds.py); None until it is up.
    :ivar channel: the parent's end of its channel.
    :ivar reason: why it was told to stop or killed; None as long as its end would be unasked for.
    :ivar failure: what its "failed" message said, or None.
    :ivar record: its :class:`WorkerRecord`.
    :ivar status: the line that it set with ``Worker.set_status()``.
    :ivar dump: the reading end of the pipe that it writes its stacks to, or None.
    :ivar stacks: what has been read of them.
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
        self.recycling = False  # is to be replaced because it has reached a limit
        self.failure: str | None = None
        self.status: str | None = None
        self.started = time.monotonic()
        self.ready_at: float | None = None
        self.exitcode: int | None = None
        self.record = WorkerRecord(self.index, self.role, self.kind, generation, started=time.time())
        self.dump: Any = None
        self.stacks = bytearray()
        self.start: asyncio.Task[None] | None = None  # ends when there is a handle
        self.watch: asyncio.Task[None] | None = None  # waits for its end
        self._timers: list[asyncio.TimerHandle] = []
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

    def send(self, message: str, /, **fields: Any) -> None:
        """Send a message over its channel (worker.py lists them)."""
        if self.channel is not None:
            self.channel.send(message, **fields)

    def call_later(self, delay: float, fn: Callable[..., object], *args: Any) -> None:
        """Call *fn* in *delay* seconds, if it is not gone by then."""
        assert self.sup.loop is not None
        self._timers.append(self.sup.loop.call_later(delay, fn, *args))

    # States

    def advance(self, state: State) -> None:
        """Note that it has reached *state*, unless it is further."""
        order = list(State)
        if order.index(state) <= order.index(self.state):
            return
        self.state = state
        self.sup.child_event(self, state.value)

    def settle(self) -> None:
        """It is known whether its start has worked."""
        self._settled.set()

    async def wait_settled(self) -> bool:
        """Wait until it is ready (True) or gone (False)."""
        await self._settled.wait()
        return self.state is not State.GONE

    async def wait_gone(self) -> int:
        """Wait for its end; returns the exit code."""
        await self._gone.wait()
        assert self.exitcode is not None
        return self.exitcode

    def start_timed_out(self) -> None:
        """``start_timeout`` is over: unless it is ready, it is killed."""
        if self.state is not State.STARTING or not self.alive:
            return
        self.failure = f"not ready within {self.sup.options.start_timeout:g} s"
        log.error("%s is %s", self.label, self.failure)
        self.sup.spawn(self._kill_unready())

    async def _kill_unready(self) -> None:
        await self.log_stacks()
        self.record.reason = f"failed: {self.failure}"
        self.kill(f"failed: {self.failure}")

    # Its end

    def tell_stop(self, signum: int, reason: str) -> None:
        """Tell it to stop, with *signum* and the message "stop"."""
        if self.reason is None:
            self.reason = reason
        if self.state is State.GONE:
            return
        if self.state is not State.STARTING:
            self.advance(State.DRAINING)
        self.send("stop", signal=int(signum), reason=reason)
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.handle.tell(signum)  # the message may have reached it first

    def arm_budgets(self) -> None:
        """It was told to stop: drain, then cancel, then kill."""
        drain = self.sup.options.drain_timeout
        if drain is None:
            return

        def cancel() -> None:
            log.warning("%s has not drained within %g s", self.label, drain)
            self.send("cancel")
            self.call_later(self.sup.options.cancel_timeout, kill)

        def kill() -> None:
            log.warning("%s does not end; killing it", self.label)
            self.sup.spawn(self.sup.kill_child(self, "killed: did not end", stacks=True))

        self.call_later(drain, cancel)

    def kill(self, reason: str) -> None:
        """Kill it; a thread is given up."""
        if self.state is State.GONE:
            return
        self.record.reason = self.record.reason or reason
        if self.handle is None:
            # Only who starts it holds it, and kills it when cancelled.
            if self.start is not None:
                self.start.cancel()
        elif isinstance(self.handle, ThreadHandle):
            self.handle.kill()
        else:
            with contextlib.suppress(OSError):
                self.handle.send_signal(signal.SIGKILL)

    def collect(self, code: int) -> None:
        """Its handle says that it has ended: read what it said last, close all, complete the record."""
        assert self.channel is not None
        self.channel.read()  # what it said last comes before what its end means
        if self.dump is not None:
            self.read_stacks()
            assert self.sup.loop is not None
            self.sup.loop.remove_reader(self.dump.fileno())
            self.dump.close()
            self.dump = None
        self.channel.close()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self.exitcode = code
        record = self.record
        record.ended = time.time()
        record.core_dumped = self.handle.core_dumped
        if code != ABANDONED:
            record.set_exit(code)
        if record.reason is None:
            record.reason = self.reason or ("crashed" if code else "ended by itself")

    def never_started(self) -> None:
        """The attempt to start it has failed."""
        if self.channel is not None:
            self.channel.close()
        if self.dump is not None:
            self.dump.close()
            self.dump = None
        self.exitcode = 1
        self.state = State.GONE
        self._settled.set()
        self._gone.set()

    def gone(self) -> None:
        """Its end is known to all that is asked before anybody acts on it."""
        self.advance(State.GONE)
        self._settled.set()
        self._gone.set()

    def log_exit(self) -> None:
        """Say how it has ended."""
        code, record = self.exitcode, self.record
        who = f"A child process [{self.pid}]" if self.kind == "process" else f"A {self.kind}"
        assert code is not None
        extra = ""
        if self.sup.managed:
            extra = f" after {time.monotonic() - self.started:.1f} s, generation {self.generation}"
            if record.memory:
                extra += f", {record.memory / 2**20:.0f} MiB"
            for name, value in record.evidence.items():
                extra += f", {name}: {value}"
            extra += f" ({record.reason})"
        more = extra and f"; {self.label}{extra}"
        if code == ABANDONED:
            log.error("%s was given up%s", self.label, extra)
        elif code < 0:
            log.warning("%s was terminated by %s%s", who, record.outcome, more)
        elif code > 0:
            log.warning("%s has exited with a non-zero status %d%s", who, code, more)
        else:
            log.debug("%s has ended%s", self.label, extra)

    # Its stacks

    def watch_stacks(self) -> None:
        """Collect what it writes to its pipe from now on."""
        assert self.sup.loop is not None
        os.set_blocking(self.dump.fileno(), False)
        self.sup.loop.add_reader(self.dump.fileno(), self.read_stacks)

    def read_stacks(self) -> None:
        while True:
            try:
                data = os.read(self.dump.fileno(), 65536)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                assert self.sup.loop is not None
                self.sup.loop.remove_reader(self.dump.fileno())
                return
            self.stacks += data

    async def stacks_settled(self) -> None:
        """Wait until it has written its stacks, or does not seem to."""
        end = time.monotonic() + DUMP_GRACE
        seen = -1
        while time.monotonic() < end and (not self.stacks or len(self.stacks) != seen):
            seen = len(self.stacks)
            await asyncio.sleep(DUMP_PAUSE)

    async def log_stacks(self) -> None:
        """Log the Python stacks of all its threads."""
        if self.kind == "thread":
            text = self.handle.stack()
        elif self.kind == "interpreter":
            # Only its own watchdog sees them, and has written what it could.
            text = self.stacks.decode(errors="replace")
        elif self.dump is not None and DUMP_SIGNAL is not None:
            del self.stacks[:]
            with contextlib.suppress(OSError):
                self.handle.send_signal(DUMP_SIGNAL)
            await self.stacks_settled()
            text = self.stacks.decode(errors="replace")
        else:
            return
        log.error("stacks of %s:\n%s", self.label, text.rstrip() or "(none to be had)")


class Slot:
    """An index that the server keeps filled.

    :ivar current: the child that fills it.
    :ivar successor: the child that is to replace it and is not ready yet.
    :ivar wanted: False when the index is to be given up.
    :ivar serial: of its last child.
    :ivar failures: how many starts in a row have failed.
    :ivar restart: the task that will start the next child, or None.
    :ivar replacing: held by who starts or exchanges its child.
    """

    def __init__(self, index: int, role: str, kind: str, target: Any) -> None:
        self.index = index
        self.role = role
        self.kind = kind
        self.target = target
        self.current: Child | None = None
        self.successor: Child | None = None
        self.wanted = True
        self.serial = 0
        self.failures = 0
        self.restart: asyncio.Task[Any] | None = None
        self.replacing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Slot {self.role} {self.index} current={self.current} successor={self.successor}>"
