"""Hang detection: each worker's loop says that it turns, the parent looks for those that do not.

The beat is a message over the control channel, so it says what matters: that the worker's loop runs
its callbacks.  It works on any loop and for every kind of worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from .plugins import ServerPlugin, WorkerPlugin

if TYPE_CHECKING:
    from .supervise import Child, Supervisor
    from .worker import Worker

__all__ = ("Heartbeat",)

log = logging.getLogger(__package__)


class _Beat(WorkerPlugin):
    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._handle: asyncio.TimerHandle | None = None

    def __getstate__(self) -> float:
        return self._interval

    def __setstate__(self, interval: float) -> None:
        self.__init__(interval)  # type: ignore[misc]

    async def start(self, worker: Worker) -> None:
        self._beat(worker)

    def _beat(self, worker: Worker) -> None:
        worker.channel.send("beat", requests=worker.requests)
        assert worker.loop is not None
        self._handle = worker.loop.call_later(self._interval, self._beat, worker)

    async def stop(self, worker: Worker) -> None:
        if self._handle is not None:
            self._handle.cancel()


class Heartbeat(ServerPlugin):
    """Kills, with its stacks in the log, a worker whose loop has not turned for *timeout* seconds.

    A worker is watched from its first beat, which comes when its loop runs, to its end; what blocks
    before there is a loop (an import) is the affair of ``start_timeout``.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._interval = min(1.0, timeout / 4)
        self._last: dict[Child, float] = {}
        self._sup: Supervisor | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._looked = 0.0

    def open(self, sup: Supervisor) -> None:
        self._sup = sup
        self._looked = time.monotonic()
        assert sup.loop is not None
        self._handle = sup.loop.call_later(self._interval, self._look)

    def child_plugin(self, child: Child) -> WorkerPlugin | None:
        # An extra without a loop has nothing that could beat; it is just never heard of.
        return _Beat(self._interval)

    def on_message(self, child: Child, message: dict[str, Any]) -> None:
        if message["t"] == "beat":
            self._last[child] = time.monotonic()
            child.record.requests = message["requests"]

    def child_event(self, child: Child, event: str) -> None:
        if event == "gone":
            self._last.pop(child, None)

    def describe(self, child: Child) -> dict[str, Any]:
        last = self._last.get(child)
        return {} if last is None else {"heartbeat": f"{time.monotonic() - last:.1f} s ago"}

    def _look(self) -> None:
        sup = self._sup
        assert sup is not None and sup.loop is not None
        now = time.monotonic()
        late, self._looked = now - self._looked - self._interval, now
        if late > self._interval:
            # It is this process that stood still (suspended, swapped out): the beats of that time
            # wait in the channels to be read.
            for child in self._last:
                self._last[child] = now
        for child, last in list(self._last.items()):
            if now - last > self._timeout:
                del self._last[child]
                log.error("%s hangs: its loop has not turned for %.1f s", child.label, now - last)
                task = sup.loop.create_task(
                    sup.kill_child(child, f"hung: no turn of its loop for {self._timeout:g} s", stacks=True)
                )
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        self._handle = sup.loop.call_later(self._interval, self._look)

    async def finish(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    def close(self, sup: Supervisor) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._last.clear()
