"""What follows when a child has died unasked: its slot is filled again, later each time, or the server gives up."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING

from .child import Child, Slot, State
from .launch import START_ERRORS

if TYPE_CHECKING:
    from .supervise import Supervisor

__all__ = ("Restarts",)

log = logging.getLogger(__package__)


class Restarts:
    """Fills the slots of children that were not to end."""

    def __init__(self, sup: Supervisor) -> None:
        self._sup = sup

    def died_unasked(self, child: Child) -> None:
        """Start another one, if the policy says so."""
        slot, options = child.slot, self._sup.options
        if options.restart == "never" or (options.restart == "on-failure" and child.exitcode == 0):
            return
        if child.ready_at is None:
            self.failed(slot, child.failure or child.record.outcome)
        elif time.monotonic() - child.ready_at >= options.min_uptime:
            slot.failures = 0
            self.schedule(slot, 0.0)
        else:
            self.failed(slot, f"{child.record.reason}, {child.record.outcome}")

    def failed(self, slot: Slot, why: str) -> None:
        """A start has failed, or has not lasted: try again with back-off, or give up."""
        sup, options = self._sup, self._sup.options
        slot.failures += 1
        limit = options.boot_failure_limit
        others = any(
            s is not slot and s.current is not None and s.current.state is State.READY for s in sup.slots.values()
        )
        # After a restart that was given up the old code runs, and what is on disk does not start.
        if slot.failures >= limit and not (sup.abandoned is not None and others):
            sup.give_up(f"{slot.role} {slot.index} has failed {slot.failures} times in a row; the last time: {why}")
            return
        delay = 0.0
        if slot.failures > 1:
            delay = min(options.backoff_max, options.backoff * 2 ** (slot.failures - 2))
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
        self.schedule(slot, delay)

    def schedule(self, slot: Slot, delay: float) -> None:
        """Start a child in *slot* in *delay* seconds."""
        if self._sup.stop_signal is None and slot.restart is None:
            slot.restart = self._sup.spawn(self._restart(slot, delay))

    async def _restart(self, slot: Slot, delay: float) -> None:
        sup = self._sup
        failed = None
        try:
            if delay:
                await asyncio.sleep(delay)
            async with slot.replacing:
                slot.restart = None  # the end of the child that is started now asks for the next
                if slot.current is None and slot.wanted and sup.stop_signal is None:
                    try:
                        await sup.start_child(slot, sup.generation)
                    except START_ERRORS as exc:
                        failed = str(exc)
        finally:
            if slot.restart is asyncio.current_task():
                slot.restart = None
        if failed is not None:
            self.failed(slot, failed)
        sup.check_anybody_left()
