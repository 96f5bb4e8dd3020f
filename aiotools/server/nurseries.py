"""The fork servers of a server's generations: which of its children comes from where."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..fork import ChildStartError

if TYPE_CHECKING:
    from .nursery import Nursery, NurseryContext
    from .worker import WorkerSpec

__all__ = ("Nurseries", "nursery_usable")

log = logging.getLogger(__package__)


def nursery_usable() -> bool:
    """Whether fork servers of our own are to be used here: where forking a process that has no threads is safe."""
    return sys.platform == "linux" and hasattr(socket, "send_fds")


class Nurseries:
    """One fork server per generation, started when its first child is.

    :param fallback: the multiprocessing context for when there is none.
    :param preload: modules that they import.
    :param asked: those among them that the user has asked for.
    :param block: signals that their children begin with blocked.
    """

    def __init__(self, fallback: Any, preload: Sequence[str], asked: Sequence[str], block: Sequence[int]) -> None:
        self._fallback = fallback
        self._preload = preload
        self._asked = frozenset(asked)
        self._block = block
        self._contexts: dict[int, NurseryContext] = {}
        self._retired: list[Nursery] = []
        self._lock = asyncio.Lock()

    async def start(self, spec: WorkerSpec) -> Any:
        """Start the process that *spec* describes; see :func:`aiotools.server.kinds.start_process`."""
        from .kinds import start_process
        from .nursery import NurseryError

        for _ in range(2):
            context = await self._context(spec.generation)
            if context is None:
                break
            try:
                return await start_process(spec, context)
            except NurseryError:
                pass  # it was killed; the next one is started
            except ChildStartError:
                # With it dies what it has forked but not yet sent on its way.
                if context.nursery.alive:
                    raise
        return await start_process(spec, self._fallback)

    async def _context(self, generation: int) -> NurseryContext | None:
        from .nursery import Nursery, NurseryContext, NurseryError

        async with self._lock:
            context = self._contexts.get(generation)
            if context is not None and context.nursery.alive:
                return context
            if context is not None:
                log.warning("the fork server of generation %d is gone; starting another", generation)
                self._retire(generation)
            try:
                nursery = Nursery(self._preload, self._block)
                try:
                    failed = await nursery.wait_ready()
                except BaseException:
                    self._retired.append(nursery)
                    nursery.retire()
                    raise
            except (OSError, NurseryError) as exc:
                log.warning("no fork server for generation %d (%s); its processes are spawned", generation, exc)
                return None
            for name, reason in failed.items():
                # What is wrong with the others the worker that needs them says better.
                if name in self._asked:
                    log.warning("cannot preload %s: %s", name, reason)
            context = self._contexts[generation] = NurseryContext(nursery)
            return context

    def _retire(self, generation: int) -> None:
        context = self._contexts.pop(generation, None)
        if context is not None:
            context.nursery.retire()
            self._retired.append(context.nursery)

    def keep_only(self, generation: int) -> None:
        """No child of another generation is started any more."""
        for other in [g for g in self._contexts if g != generation]:
            self._retire(other)
        self.collect()

    def collect(self) -> None:
        """Collect those that have ended."""
        self._retired = [nursery for nursery in self._retired if not nursery.collect()]

    def pids(self) -> list[int]:
        """The process ids of all that run, as far as known."""
        every = [*(c.nursery for c in self._contexts.values()), *self._retired]
        return [nursery.pid for nursery in every if nursery.pid is not None]

    async def close(self) -> None:
        """All children are gone; wait for the end of the fork servers."""
        for generation in list(self._contexts):
            self._retire(generation)
        await asyncio.gather(*(nursery.close() for nursery in self._retired))
        self._retired.clear()
