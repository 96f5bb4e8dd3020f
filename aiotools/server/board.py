"""The status board: one page of memory that the parent and all workers map, with a slot for each child.

It says how each child is without asking it, so also when it hangs.  A slot has three parts, each with one writer::

    words     the heartbeat of the child's loop, written by its :class:`~aiotools.LoopWatchdog` (watchdog.c):
              time of the last beat, beats, longest delay, stalls, hanging since, evidence; then its requests and its
              process id
    parent    what the parent knows: pid, index, role, kind, generation, state, start, resident memory
    worker    what the worker says of itself: its counters

In front of the slots there is the table of leases (singleton.py).

Words are 8 bytes, aligned, and never torn.  The other two are records with a sequence lock (page.c): a reader gets them whole
or, if their writer died in the middle, not at all.

The memory belongs to no file (or to one that has no name); its descriptor goes to the children, by inheritance or with what they
are started with.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from .._aiotools import _record_read, _record_write
from ..watchdog import LoopWatchdog
from .plugins import ServerPlugin, WorkerPlugin
from .singleton import Leases, owner_of, release_all

if TYPE_CHECKING:
    from .child import Child
    from .supervise import Supervisor
    from .worker import Worker

__all__ = ("Board", "BoardWatchdog", "SlotStatus", "StatusBoard")

_SLOT = 1024
_WORDS = slice(0, 64)
_PARENT = slice(64, 384)
_WORKER = slice(384, 1024)
#: Bytes of the table of leases.
_LEASES = 4096
#: How many children may exist at a time; what is never touched takes no memory.
CAPACITY = 1024

# Indices of words; the first six as in watchdog.c.
BEAT, BEATS, LONGEST, STALLS, HANG, EVIDENCE, REQUESTS, PID = range(8)
EVIDENCE_NONE, EVIDENCE_WHOLE, EVIDENCE_NATIVE = range(3)


@dataclasses.dataclass(frozen=True)
class SlotStatus:
    """A child, as its slot shows it.

    :ivar pid: index, role, kind, generation, state: as in :class:`WorkerRecord`; None if not known (yet).
    :ivar started: when it was started (:func:`time.time`).
    :ivar memory: its resident memory in bytes when last looked at, or None.
    :ivar heartbeat: seconds since its loop last turned, or None if it has none (yet).
    :ivar longest_stall: the longest time in seconds that its loop was late.
    :ivar stalls: how often it was late by half a second or more.
    :ivar hanging: whether it is beyond ``hang_timeout`` now.
    :ivar requests: how many requests it has counted.
    :ivar counters: what the worker put into :attr:`Worker.counters`.
    """

    pid: int | None = None
    index: int | None = None
    role: str | None = None
    kind: str | None = None
    generation: int | None = None
    state: str | None = None
    started: float | None = None
    memory: int | None = None
    heartbeat: float | None = None
    longest_stall: float = 0.0
    stalls: int = 0
    hanging: bool = False
    requests: int = 0
    counters: dict[str, Any] = dataclasses.field(default_factory=dict)


def _unnamed_file(size: int) -> int:
    """A descriptor of memory that all who have it can map."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("aiotools-board", os.MFD_CLOEXEC)
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Slot:
    """One slot of a mapped board."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.words = view[_WORDS].cast("Q")
        self._parent = view[_PARENT]
        self._worker = view[_WORKER]

    def clear(self) -> None:
        """As new; by the parent, when nobody writes to it."""
        self._view[:] = bytes(len(self._view))

    def write_parent(self, **facts: Any) -> None:
        _record_write(self._parent, json.dumps(facts).encode())

    def write_worker(self, facts: dict[str, Any]) -> None:
        """:raises ValueError: they do not fit."""
        _record_write(self._worker, json.dumps(facts).encode())

    def read(self) -> SlotStatus:
        """What it shows now."""
        parent, worker = ({} if not raw else _decode(raw) for raw in map(_record_read, (self._parent, self._worker)))
        words = self.words.tolist()
        beat = words[BEAT]
        parent["pid"] = words[PID] or parent.get("pid")
        return SlotStatus(
            **parent,
            heartbeat=max(0.0, time.monotonic() - beat * 1e-9) if beat else None,
            longest_stall=words[LONGEST] * 1e-9,
            stalls=words[STALLS],
            hanging=bool(words[HANG]),
            requests=words[REQUESTS],
            counters=worker,
        )

    def release(self) -> None:
        for view in (self.words, self._parent, self._worker, self._view):
            view.release()


def _decode(raw: bytes) -> dict[str, Any]:
    text = raw.rstrip(b"\0")
    facts: dict[str, Any] = json.loads(text) if text else {}
    return facts


class Board:
    """The mapped page.

    :param fd: descriptor of a board's memory, which stays the caller's; default: new memory.
    """

    def __init__(self, fd: int | None = None) -> None:
        # Whoever made the memory decided on its size.
        size = _LEASES + CAPACITY * _SLOT if fd is None else os.fstat(fd).st_size
        own = _unnamed_file(size) if fd is None else None
        memory = own if fd is None else fd
        assert memory is not None
        try:
            self._map: Any = mmap.mmap(memory, size)
        except BaseException:
            if own is not None:
                os.close(own)
            raise
        # A connection travels with multiprocessing, under every start method.
        self.connection = Connection(own, writable=False) if own is not None else None
        self._view: Any = memoryview(self._map)
        self.leases: Any = self._view[:_LEASES].cast("Q")

    def slot(self, number: int) -> Slot:
        """Slot *number*; to be released before the board is closed."""
        capacity = (len(self._map) - _LEASES) // _SLOT
        if not 0 <= number < capacity:
            raise IndexError(f"no slot {number}: there are {capacity}")
        start = _LEASES + number * _SLOT
        return Slot(self._view[start : start + _SLOT])

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        try:
            self.leases.release()
            self._view.release()
            self._map.close()
        except BufferError:
            pass  # a slot is still in use; the mapping goes with it
        self._map = self._view = self.leases = None


class _BeatingWatchdog(LoopWatchdog):
    """Also shows what the worker counts."""

    def __init__(self, worker: Worker, slot: Slot, **arguments: Any) -> None:
        super().__init__(_page=slot.words, **arguments)
        self._worker = worker
        self._slot: Slot | None = slot
        self._shown: Any = None

    def _beat(self) -> None:
        super()._beat()
        self.show()

    def show(self) -> None:
        slot = self._slot
        if slot is None:
            return
        slot.words[REQUESTS] = self._worker.requests
        counters = self._worker.counters
        if counters != self._shown:
            self._shown = dict(counters)
            try:
                slot.write_worker(self._shown)
            except (ValueError, TypeError):
                slot.write_worker({"error": "the counters do not fit"})

    def stop(self) -> None:
        super().stop()
        self.show()
        self._slot = None


class BoardWatchdog(WorkerPlugin):
    """The child's side: writes the heartbeat of its loop, and watches it.

    :param place: the board's connection, a descriptor in this process, or the :class:`Board` itself.
    :param number: of the child's slot.
    :param owner: what the child's leases are marked with.
    :param watch: whether its loop is watched.
    """

    def __init__(
        self, place: Any, number: int, owner: int, watch: bool, interval: float, hang_timeout: float | None
    ) -> None:
        self._place = place
        self._number = number
        self._owner = owner
        self._watch = watch
        self._interval = interval
        self._hang_timeout = hang_timeout
        self._board: Board | None = None
        self._slot: Slot | None = None
        self.watchdog: _BeatingWatchdog | None = None

    def __getstate__(self) -> Any:
        return self._place, self._number, self._owner, self._watch, self._interval, self._hang_timeout

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def boot(self, worker: Worker) -> None:
        if isinstance(self._place, Board):
            board = self._place
        elif isinstance(self._place, int):
            board = self._board = Board(self._place)
            os.close(self._place)
        else:
            board = self._board = Board(self._place.fileno())
            self._place.close()
        self._slot = board.slot(self._number)
        self._slot.words[PID] = worker.pid
        worker._leases = Leases(board.leases, self._owner, worker)

    async def start(self, worker: Worker) -> None:
        if not self._watch:
            return
        dump = worker._spec.dump
        hang = self._hang_timeout
        if hang is None:
            evidence = {}
        elif dump is not None and worker.kind == "interpreter":
            evidence = {"file": dump.fileno(), "signum": 0}  # signals are the main interpreter's
        elif dump is not None:
            from .worker import DUMP_SIGNAL

            # faulthandler is registered for that signal already, with this file.
            evidence = {"file": dump.fileno(), "signum": DUMP_SIGNAL or 0, "_registered": bool(DUMP_SIGNAL)}
        else:
            evidence = {"file": -1, "signum": 0}  # the parent asks for it (describe_hang)
        assert self._slot is not None
        self.watchdog = _BeatingWatchdog(
            worker,
            self._slot,
            interval=self._interval,
            slow=0.5 if hang is None else min(0.5, hang / 2),
            hang_timeout=hang,
            **evidence,
        )
        self.watchdog.start()

    async def stop(self, worker: Worker) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()

    def exit(self, worker: Worker) -> None:
        if worker._leases is not None:
            worker._leases.close()
            worker._leases = None
        if self.watchdog is not None:
            self.watchdog.stop()
            self.watchdog = None
        if self._slot is not None:
            slot, self._slot = self._slot, None
            try:
                slot.release()
            except BufferError:
                pass
        if self._board is not None:
            self._board.close()

    def describe_hang(self) -> str:
        """The stacks of the tasks, for a worker in a thread; called by the parent."""
        watchdog = self.watchdog
        return watchdog._tasks() if watchdog is not None else ""


class StatusBoard(ServerPlugin):
    """The parent's side: gives each child a slot, writes what the parent knows, and reads.

    :param watch: whether the loops are watched; without it only leases are to be had.
    :param interval: seconds between two heartbeats.
    :param hang_timeout: see :class:`ServerOptions`; what is done about it is heartbeat.py's affair.
    """

    def __init__(self, watch: bool = True, interval: float = 0.25, hang_timeout: float | None = None) -> None:
        self.watch = watch
        self.interval = interval
        self.hang_timeout = hang_timeout
        self._board: Board | None = None
        self._free: list[int] = []
        self._slots: dict[Child, tuple[int, Slot, BoardWatchdog]] = {}
        self._uses = 0

    def open(self, sup: Supervisor) -> None:
        self._board = Board()
        self._free = list(range(CAPACITY - 1, -1, -1))

    def child_plugin(self, child: Child) -> WorkerPlugin | None:
        if not self._free:
            return None
        assert self._board is not None and self._board.connection is not None
        number = self._free.pop()
        slot = self._board.slot(number)
        slot.clear()
        place: Any = self._board.connection
        if child.kind == "thread":
            place = self._board
        elif child.kind == "interpreter":
            place = os.dup(place.fileno())
        self._uses += 1
        owner = owner_of(number, self._uses)
        plugin = BoardWatchdog(place, number, owner, self.watch, self.interval, self.hang_timeout)
        self._slots[child] = number, slot, plugin
        return plugin

    def child_event(self, child: Child, event: str) -> None:
        if child not in self._slots:
            return
        if event == "gone":
            self._forget(child)
        else:
            self._write(child)

    def _write(self, child: Child) -> None:
        self._slots[child][1].write_parent(
            pid=child.pid,
            index=child.index,
            role=child.role,
            kind=child.kind,
            generation=child.generation,
            state=child.state.value,
            started=round(child.record.started, 3),
            memory=child.record.memory,
        )

    def _forget(self, child: Child) -> None:
        number, slot, plugin = self._slots.pop(child)
        if self._board is not None:
            # Whoever looks next has them: nobody waits for a lease of the dead to run out.
            release_all(self._board.leases, plugin._owner)
        try:
            slot.release()
        except BufferError:
            pass
        if child.kind != "thread" or (child.exitcode is not None and child.exitcode >= 0):
            # A thread that was given up may go on writing.
            self._free.append(number)

    def tick(self, now: float) -> None:
        for child in list(self._slots):
            if child.state.value == "gone":  # its start failed
                self._forget(child)
            else:
                self._write(child)
                child.record.requests = self._slots[child][1].words[REQUESTS]

    def describe(self, child: Child) -> dict[str, Any]:
        status = self.status(child)
        if status is None or status.heartbeat is None:
            return {}
        child.record.requests = status.requests
        facts: dict[str, Any] = {"heartbeat": f"{status.heartbeat:.1f} s ago"}
        if status.stalls:
            facts["stalls"] = status.stalls
            facts["longest stall"] = f"{status.longest_stall:.2f} s"
        facts.update(status.counters)
        return facts

    def status(self, child: Child) -> SlotStatus | None:
        """What the slot of *child* shows, or None if it has none."""
        found = self._slots.get(child)
        return None if found is None else found[1].read()

    def words(self, child: Child) -> Any:
        """The words of its slot, or None."""
        found = self._slots.get(child)
        return None if found is None else found[1].words

    def plugin(self, child: Child) -> BoardWatchdog | None:
        found = self._slots.get(child)
        return None if found is None else found[2]

    def late(self, seconds: float) -> list[Child]:
        """The children whose loops have not turned for so long."""
        now = time.monotonic_ns()
        limit = int(seconds * 1e9)
        return [c for c, (_, slot, _) in self._slots.items() if (b := slot.words[BEAT]) and now - b > limit]

    def beating(self) -> list[Child]:
        """The children that have a loop, as far as known."""
        return [c for c, (_, slot, _) in self._slots.items() if slot.words[BEAT]]

    def close(self, sup: Supervisor) -> None:
        for child in list(self._slots):
            self._forget(child)
        if self._board is not None:
            self._board.close()
            self._board = None
