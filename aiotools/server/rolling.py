"""Children replaced by others while the server serves: rolling restarts, recycling, one worker more or less.

Replacing the child of a slot: a successor STARTING -> READY, then it becomes ``current``, then the old
one is told to drain, then its end is awaited.  So at most ``max_surge`` children more than usual exist.

A rolling restart tries the next generation's number; it becomes the server's when the last slot has
moved, and is given up (the old children stay) when one of its children fails before READY.  Numbers
are never used twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING

from .child import Child, Slot
from .launch import START_ERRORS

if TYPE_CHECKING:
    from .supervise import Supervisor

__all__ = ("Rolling",)

log = logging.getLogger(__package__)


class Rolling:
    """Replaces the children of a server.

    :ivar active: whether a rolling restart is under way.
    :ivar again: whether another one was asked for meanwhile.
    """

    def __init__(self, sup: Supervisor) -> None:
        self._sup = sup
        self._last_generation = sup.generation
        self._task: asyncio.Task[None] | None = None
        self.active = False
        self.again = False

    # One child

    async def replace(self, slot: Slot, generation: int, reason: str, *, only: Child | None = None) -> str | None:
        """Start a successor in *slot* and, once it is ready, drain the present child.

        With *only*, do nothing if that is not the present child any more, or has been told to stop.
        Returns None, or why the successor could not be had (the present child then stays).
        """
        sup = self._sup
        async with slot.replacing:
            if only is not None:
                if slot.current is not only or only.reason is not None:
                    return None
                log.info("%s is being %s", only.label, reason)
            if slot.role == "extra" and slot.current is not None:
                # It may hold something that only one process can hold.
                await sup.drain(slot.current, reason)
                slot.current = None
            try:
                child = await sup.start_child(slot, generation, successor=True)
            except START_ERRORS as exc:
                return str(exc)
            try:
                ready = await child.wait_settled()
            except asyncio.CancelledError:
                # The server stops (it sees to the child), or the restart is given up.
                if sup.stop_signal is None and child.alive:
                    child.reason = "abandoned"
                    child.kill("abandoned")
                raise
            if not ready:
                return child.failure or child.record.outcome
            old, slot.current, slot.successor = slot.current, child, None
            slot.failures = 0
            if old is not None:
                await sup.drain(old, reason)
            return None

    def recycle(self, child: Child, why: str) -> None:
        """Replace a worker that has reached a limit."""
        if child.recycling or child.reason is not None or self._sup.stop_signal is not None:
            return
        child.recycling = True
        self._sup.spawn(self._recycle(child, f"recycled: {why}"))

    async def _recycle(self, child: Child, reason: str) -> None:
        # It asks once, perhaps before it is ready, or while the one before it drains.
        if not await child.wait_settled():
            return
        failed = await self.replace(child.slot, self._sup.generation, reason, only=child)
        child.recycling = False
        if failed is not None:
            log.error("%s could not be replaced and goes on: %s", child.label, failed)
        self._sup.check_anybody_left()

    def arm_age(self, child: Child) -> None:
        """Recycle a worker that has just become ready when it has reached its age."""
        options = self._sup.options
        if options.max_age is not None and child.role == "worker":
            age = options.max_age * (1 - random.uniform(0, options.recycle_jitter))
            child.call_later(age, self.recycle, child, f"{age:.1f} s old")

    # All children

    def restart(self) -> None:
        """Rolling restart; one that is asked for while another runs follows it, however often."""
        if self._task is not None:
            self.again = True
        else:
            self._task = self._sup.spawn(self._restart())

    async def _restart(self) -> None:
        try:
            # What has not been started yet has nothing to be replaced.
            await self._sup.started.wait()
            while True:
                self.again = False
                await self._roll()
                if not self.again:
                    return
        finally:
            self._task = None
            self.active = False

    async def _roll(self) -> None:
        sup = self._sup
        self._last_generation += 1
        generation = self._last_generation
        self.active = True
        sup.event("reloading", generation=generation)
        log.info("rolling restart: generation %d", generation)
        failed = await self._roll_workers(generation)
        if failed is None:
            for slot in [s for s in sup.slots.values() if s.role == "extra"]:
                failed = await self._roll_slot(slot, generation)
                if failed is not None:
                    break
        if failed is not None:
            sup.abandoned = f"generation {generation} was abandoned: {failed}"
            log.error("rolling restart: %s; the old workers go on", sup.abandoned)
        else:
            sup.generation = generation
            sup.abandoned = None
        sup.launcher.keep_only(sup.generation)
        if failed is not None:
            sup.event("abandoned", generation=generation, reason=failed)
        else:
            log.info("rolling restart: generation %d serves", generation)
            sup.event("reloaded", generation=generation)

    async def _roll_workers(self, generation: int) -> str | None:
        """Move all workers, ``max_surge`` at a time; why that failed, or None."""
        sup = self._sup
        queue = [s for s in sup.slots.values() if s.role == "worker" and s.wanted]
        if not queue:
            return None
        # The first shows whether the new code starts at all.
        failed = await self._roll_slot(queue.pop(0), generation)
        running: set[asyncio.Task[str | None]] = set()
        try:
            while failed is None and (queue or running):
                while queue and len(running) < sup.options.max_surge:
                    running.add(sup.spawn(self._roll_slot(queue.pop(0), generation)))
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                failed = next((r for t in done if (r := t.result()) is not None), None)
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
        return failed

    async def _roll_slot(self, slot: Slot, generation: int) -> str | None:
        if not slot.wanted:
            return None
        failed = await self.replace(slot, generation, "reloaded")
        if failed is not None and slot.role == "extra" and self._sup.options.restart != "never":
            self._sup.restarts.failed(slot, failed)  # the old one is gone already
        self._sup.check_anybody_left()
        return failed

    # How many

    def more(self) -> None:
        """One worker more."""
        sup = self._sup
        index = next(i for i in range(len(sup.slots) + 1) if i not in sup.slots)
        slot = sup.slots[index] = Slot(index, "worker", sup.options.worker_kind, sup.worker)
        log.info("one worker more: %d", index)
        sup.restarts.schedule(slot, 0.0)

    def less(self) -> None:
        """One worker less, but never the last."""
        sup = self._sup
        workers = [s for s in sup.slots.values() if s.role == "worker" and s.wanted]
        if len(workers) < 2:
            return
        slot = max(workers, key=lambda s: s.index)
        slot.wanted = False
        log.info("one worker less: %d", slot.index)
        sup.spawn(self._remove(slot))

    async def _remove(self, slot: Slot) -> None:
        async with slot.replacing:
            if slot.restart is not None:
                slot.restart.cancel()
            if slot.current is not None:
                await self._sup.drain(slot.current, "one worker less")
            self._sup.slots.pop(slot.index, None)
        self._sup.check_up()
