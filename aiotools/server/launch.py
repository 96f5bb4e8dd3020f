"""How a child comes to be: what it gets, and from where it is started."""

from __future__ import annotations

import asyncio
import importlib.machinery
import logging
import random
import socket
import sys
from typing import TYPE_CHECKING, Any

from ..fork import ChildStartError, keep_from_children
from .channel import Channel
from .child import Child, Slot
from .kinds import InterpreterHandle, ThreadHandle, start_process
from .options import ServerOptions
from .worker import DUMP_SIGNAL, WorkerSpec, describe_error, import_afresh, import_target, run_child

if TYPE_CHECKING:
    from .supervise import Supervisor

__all__ = ("START_ERRORS", "Launcher", "StartAborted", "preload_for")

log = logging.getLogger(__package__)


class TargetError(RuntimeError):
    """The code of thread workers could not be imported."""


class StartAborted(RuntimeError):
    """A child was killed while it was being started."""


#: What Supervisor.start_child() raises for a child that could not be had, as opposed to misuse.
START_ERRORS = (ChildStartError, TargetError, StartAborted)


class Launcher:
    """Starts the children of a server."""

    def __init__(self, sup: Supervisor) -> None:
        self._sup = sup
        self._thread_targets: dict[int, Any] = {}
        self._gil_warned = False

    def begin(self, slot: Slot, generation: int, *, successor: bool = False) -> Child:
        """Begin to start a child in *slot*; the task ``start`` of what is returned says when it is up, or why it is not."""
        sup = self._sup
        assert sup.loop is not None
        child = Child(sup, slot, generation)
        slot.serial += 1
        ours, theirs = socket.socketpair()
        child.channel = Channel(keep_from_children(ours))
        dump_w = None
        try:
            if sup.managed and child.kind != "thread" and DUMP_SIGNAL is not None:
                child.dump, dump_w = sup.mp_context.Pipe(duplex=False)
                keep_from_children(child.dump)
            spec = self._spec_for(child, theirs, dump_w)
            if successor:
                slot.successor = child
            else:
                slot.current = child
            # From here on it is told what all are told: messages wait in the channel until it listens.
            sup.children.append(child)
            sup.report.add(child.record)
            sup.child_event(child, "starting")
        except BaseException:
            theirs.close()
            if dump_w is not None:
                dump_w.close()
            self._not_started(child)
            raise
        # Not among the tasks that a stop cancels: it is told to stop when it is up.
        child.start = sup.loop.create_task(self._start(child, spec))
        child.start.add_done_callback(lambda task: self._done(child, spec, task))
        return child

    async def _start(self, child: Child, spec: WorkerSpec) -> None:
        sup = self._sup
        if child.kind == "process":
            if sup.nurseries is not None:
                child.handle = await sup.nurseries.start(spec)
            else:
                child.handle = await start_process(spec, sup.mp_context)
        elif child.kind == "thread":
            spec.sockets = [s.dup() for s in spec.sockets]
            child.handle = ThreadHandle(spec, lambda: run_child(spec))
        else:
            child.handle = InterpreterHandle(spec)
        _close_theirs(child, spec)
        child.record.pid = child.handle.pid
        if child.dump is not None:
            child.watch_stacks()
        if sup.options.start_timeout is not None:
            child.call_later(sup.options.start_timeout, child.start_timed_out)
        # Not before: whoever hears what it says finds the process that says it.
        sup.child_started(child)

    def _done(self, child: Child, spec: WorkerSpec, task: asyncio.Task[None]) -> None:
        if child.handle is None:  # it failed, or was cancelled, perhaps before its first step
            _close_theirs(child, spec)
            self._not_started(child)
        if not task.cancelled():
            task.exception()  # who asked for the child may be gone

    def _not_started(self, child: Child) -> None:
        slot = child.slot
        if slot.successor is child:
            slot.successor = None
        if slot.current is child:
            slot.current = None
        if child in self._sup.children:
            self._sup.children.remove(child)
            self._sup.report.discard(child.record)
        child.never_started()

    def _spec_for(self, child: Child, channel: socket.socket, dump: Any) -> WorkerSpec:
        sup = self._sup
        # The plugins are asked first: they learn of the child even if what it runs cannot be imported.
        made = [plugin.child_plugin(child) for plugin in sup.plugins]
        return WorkerSpec(
            index=child.index,
            generation=child.generation,
            kind=child.kind,
            role=child.role,
            target=self._target_for(child.slot, child.generation),
            args=sup.args,
            stop_signals=sup.stop_signals,
            runner=sup.runner,
            channel=channel,
            prestart_hook=sup.prestart_hook,
            run_to_completion=sup.run_to_completion,
            managed=sup.managed,
            sockets=self._sockets_for(child),
            dump=dump,
            serial=child.slot.serial,
            max_requests=self._max_requests(),
            plugins=[plugin for plugin in made if plugin is not None],
        )

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

    def _sockets_for(self, child: Child) -> list[socket.socket]:
        sockets = self._sup.sockets
        if sockets is None or child.role != "worker":
            return []
        return sockets.for_index(child.index)

    def _max_requests(self) -> int | None:
        options = self._sup.options
        if options.max_requests is None:
            return None
        return max(1, round(options.max_requests * (1 - random.uniform(0, options.recycle_jitter))))

    def keep_only(self, generation: int) -> None:
        """No child of another generation is started any more."""
        self._thread_targets = {g: t for g, t in self._thread_targets.items() if g == generation}
        if self._sup.nurseries is not None:
            self._sup.nurseries.keep_only(generation)

    def check_gil(self, child: Child) -> None:
        """On a free-threaded build, say once that thread workers do not run in parallel after all."""
        if child.kind != "thread" or self._gil_warned or not gil_came_back():
            return
        self._gil_warned = True
        log.warning(
            "the GIL is enabled, so thread workers do not run in parallel; one of these extension modules needs it: %s",
            ", ".join(foreign_extensions()) or "(unknown)",
        )


def _close_theirs(child: Child, spec: WorkerSpec) -> None:
    """Close what the child has a copy of."""
    if child.handle is None or child.kind != "thread":
        spec.channel.close()
    if spec.dump is not None:
        spec.dump.close()


def gil_came_back() -> bool:
    """Whether this is a free-threaded build whose GIL is enabled."""
    # Not from sysconfig, which reads a file when it is asked: a thread worker may have taken all descriptors.
    return "t" in sys.abiflags and sys._is_gil_enabled()  # type: ignore[attr-defined]


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
