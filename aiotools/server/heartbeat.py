"""Hang detection: the parent looks at the board for loops that do not turn, and replaces their workers.

The worker's own watchdog notices first, and writes what it finds out (the stacks of all threads and tasks, or that
native code holds the GIL) to the pipe that the parent reads; then it marks its slot of the board.  The parent logs that and kills.
A worker that does not even do this (it is stopped, or its memory is gone) is asked for its stacks and killed a little later.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from .board import BEAT, EVIDENCE, EVIDENCE_NONE, HANG, StatusBoard
from .plugins import ServerPlugin

if TYPE_CHECKING:
    from .child import Child
    from .supervise import Supervisor

__all__ = ("Heartbeat", "beat_interval")

log = logging.getLogger(__package__)

#: Seconds beyond the timeout after which a worker whose own watchdog has noticed nothing is killed without evidence.
OWN_EVIDENCE = 1.5
#: The same for one whose watchdog is at it: a second to wait for the GIL, three to write (watchdog.c), and some more.
EVIDENCE_UNDER_WAY = 8.0


def beat_interval(hang_timeout: float | None) -> float:
    """Seconds between two heartbeats."""
    return 0.25 if hang_timeout is None else min(0.25, hang_timeout / 8)


class Heartbeat(ServerPlugin):
    """Kills, with its stacks in the log, a worker whose loop has not turned for *timeout* seconds.

    A worker is watched from its first beat, which comes when its loop runs, to its end; what blocks
    before there is a loop (an import) is the affair of ``start_timeout``.  So is, where that is given,
    what blocks before the worker is ready: a start may be slow in a way that later work must not be.
    """

    def __init__(self, timeout: float, board: StatusBoard) -> None:
        self._timeout = timeout
        self._board = board
        self._interval = min(0.1, beat_interval(timeout))
        self._sup: Supervisor | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._hung: set[Child] = set()
        self._looked = 0.0
        self._not_before = 0.0

    def open(self, sup: Supervisor) -> None:
        self._sup = sup
        self._looked = time.monotonic()
        assert sup.loop is not None
        self._handle = sup.loop.call_later(self._interval, self._look)

    def child_event(self, child: Child, event: str) -> None:
        if event == "gone":
            self._hung.discard(child)

    def _look(self) -> None:
        sup = self._sup
        assert sup is not None and sup.loop is not None
        now = time.monotonic()
        if now - self._looked > self._interval + OWN_EVIDENCE / 2:
            # It is this process that stood still (suspended, swapped out), and maybe the others with it.
            self._not_before = now + self._timeout + OWN_EVIDENCE
        self._looked = now
        for child in list(sup.children):
            words = self._board.words(child)
            if words is None or child in self._hung or not child.alive or not words[BEAT]:
                continue
            if child.ready_at is None and sup.options.start_timeout is not None:
                continue
            age = now - words[BEAT] * 1e-9
            own = bool(words[HANG]) and words[EVIDENCE] != EVIDENCE_NONE
            patience = EVIDENCE_UNDER_WAY if words[HANG] else OWN_EVIDENCE
            if own or (age > self._timeout + patience and now > self._not_before):
                self._hung.add(child)
                log.error("%s hangs: its loop has not turned for %.1f s", child.label, age)
                task = sup.loop.create_task(self._end(sup, child, own))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        self._handle = sup.loop.call_later(self._interval, self._look)

    async def _end(self, sup: Supervisor, child: Child, own: bool) -> None:
        if own and child.dump is not None:
            await self._log_own_evidence(child)
        elif child.kind == "thread" and (plugin := self._board.plugin(child)) is not None:
            log.error("tasks of %s:\n%s", child.label, plugin.describe_hang().rstrip())
            own = False
        else:
            own = False
        await sup.kill_child(child, f"hung: no turn of its loop for {self._timeout:g} s", stacks=not own)

    async def _log_own_evidence(self, child: Child) -> None:
        """What it has written; native code may hold up the end of it."""
        await child.stacks_settled()
        text = child.stacks.decode(errors="replace").rstrip()
        log.error("stacks of %s:\n%s", child.label, text or "(none to be had)")

    async def finish(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    def close(self, sup: Supervisor) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._hung.clear()
