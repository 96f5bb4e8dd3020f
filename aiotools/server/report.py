"""What remains of a server after its end: who ran, from when to when, and why they ended."""

from __future__ import annotations

import dataclasses
import signal as _signal
from typing import Any

from .signals import name_of

__all__ = ("ServerFailed", "ServerReport", "WorkerRecord")


#: So many children's histories are kept; a server that recycles its workers for years must not grow.
MAX_RECORDS = 10_000


@dataclasses.dataclass
class WorkerRecord:
    """The history of one child.

    :ivar index: its index, as in :data:`process_index`.
    :ivar role: ``"worker"`` or ``"extra"``.
    :ivar kind: ``"process"``, ``"thread"`` or ``"interpreter"``.
    :ivar generation: generation of code that it ran, counted from 1.
    :ivar pid: its process id.
    :ivar started: when it was started (:func:`time.time`).
    :ivar ready: when it became ready, or None.
    :ivar ended: when its end was noticed, or None while it runs.
    :ivar code: its exit code; None while it runs and after death by a signal.
    :ivar signal: the signal that ended it, or None.
    :ivar core_dumped: whether the kernel wrote a core dump; None where that is unknown.
    :ivar memory: resident memory in bytes when last looked at, or None.
    :ivar requests: requests that it counted, as far as the parent knows, or None.
    :ivar reason: why it ended (``"stopped"``, ``"reloaded"``, ``"recycled: ..."``, ``"failed: ..."``,
        ``"crashed"``, ``"hung"``, ...).
    :ivar evidence: further facts from plugins.
    """

    index: int
    role: str
    kind: str
    generation: int
    pid: int | None = None
    started: float = 0.0
    ready: float | None = None
    ended: float | None = None
    code: int | None = None
    signal: Any = None
    core_dumped: bool | None = None
    memory: int | None = None
    requests: int | None = None
    reason: str | None = None
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """``"exit code 1"``, ``"SIGSEGV (core dumped)"``, ``"running"``, ``"given up"`` (a thread that hangs)."""
        if self.signal is not None:
            return name_of(int(self.signal)) + (" (core dumped)" if self.core_dumped else "")
        if self.code is not None:
            return f"exit code {self.code}"
        return "running" if self.ended is None else "given up"

    def set_exit(self, exitcode: int) -> None:
        """Notes how the process ended, from its exit code: negative for a signal."""
        if exitcode < 0:
            try:
                self.signal = _signal.Signals(-exitcode)
            except ValueError:
                self.signal = -exitcode
        else:
            self.code = exitcode


@dataclasses.dataclass
class ServerReport:
    """What ``start_server(..., report=True)`` returns.

    :ivar workers: one record per child that was started, in order of their start; of a server that starts
        very many, the last :data:`MAX_RECORDS` and those that still run.
    :ivar dropped: how many records are left out of *workers* for that.
    :ivar stop_signal: what stopped the server.
    :ivar reason: why, in words.
    :ivar failed: whether the server gave up.
    """

    workers: list[WorkerRecord] = dataclasses.field(default_factory=list)
    stop_signal: Any = None
    reason: str | None = None
    failed: bool = False
    dropped: int = 0

    def add(self, record: WorkerRecord) -> None:
        """Add *record*, in place of an old one if there are very many."""
        self.workers.append(record)
        if len(self.workers) > MAX_RECORDS:
            oldest = next((i for i, r in enumerate(self.workers) if r.ended is not None), None)
            if oldest is not None:
                del self.workers[oldest]
                self.dropped += 1

    def discard(self, record: WorkerRecord) -> None:
        """Take *record* out again: its child has never been."""
        self.workers = [r for r in self.workers if r is not record]


class ServerFailed(RuntimeError):
    """The server gave up: a worker could not be kept running.

    :ivar report: the :class:`ServerReport`.
    """

    def __init__(self, message: str, report: ServerReport) -> None:
        super().__init__(message)
        self.report = report
