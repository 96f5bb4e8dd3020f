"""Hook points of the server, for what hangs on it without being part of its state machine.

The status board, the log queues, the service manager protocol and the like are plugins: the parent
side subclasses :class:`ServerPlugin`, the child side :class:`WorkerPlugin`.

Order in the parent::

    open(sup)                       before the main context, no child exists; stop signals blocked
      child_plugin(child) -> P?     just before each child is started; P travels to the child
      child_event(child, event)     "starting" "ready" "draining" "gone", each at most once and in order;
                                    "message" is on_message below
      on_message(child, message)    a message of a kind that the supervisor does not know
      describe(child) -> dict       facts for the exit evidence in the log, the report and the status
      server_event(event, **facts)  "ready" (all workers up), "reloading", "reloaded", "abandoned",
                                    "stopping", "stopped"
      tick(now)                     about once per second, in the loop
      finish()                      coroutine, in the loop, after all children are gone
    close(sup)                      after that; always called if open() was

Order in a child, P being the WorkerPlugin that came along (unpickled under spawn and forkserver)::

    boot(worker)                    main thread of the child, before prestart_hook and before any loop
      start(worker)                 coroutine, in the loop, before the worker's context is entered
        on_message(worker, message) a message from the parent of a kind that the worker does not know
      stop(worker)                  coroutine, in the loop, after the context was left, on all ways out
    exit(worker)                    after the loop is closed, on all ways out

A hook that raises is logged and the server goes on; ``open`` and ``boot`` alone may refuse the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .child import Child
    from .supervise import Supervisor
    from .worker import Worker

__all__ = ("ServerPlugin", "WorkerPlugin")


class WorkerPlugin:
    """The child's side; must be picklable unless the workers are forked."""

    def boot(self, worker: Worker) -> None:
        """In the main thread of the child, before any loop; may refuse the start by raising."""

    async def start(self, worker: Worker) -> None:
        """In the loop, before the worker's context is entered."""

    def on_message(self, worker: Worker, message: dict[str, Any]) -> None:
        """A message from the parent of a kind that the worker does not know."""

    async def stop(self, worker: Worker) -> None:
        """In the loop, after the context was left, on all ways out."""

    def exit(self, worker: Worker) -> None:
        """After the loop is closed, on all ways out."""


class ServerPlugin:
    """The parent's side."""

    def open(self, sup: Supervisor) -> None:
        """Before the main context, when no child exists; may refuse the start by raising."""

    def child_plugin(self, child: Child) -> WorkerPlugin | None:
        """Just before each child is started: what is to travel with it, or None."""
        return None

    def child_event(self, child: Child, event: str) -> None:
        """ "starting", "ready", "draining" or "gone": each at most once per child, in order."""

    def on_message(self, child: Child, message: dict[str, Any]) -> None:
        """A message from a child of a kind that the supervisor does not know."""

    def describe(self, child: Child) -> dict[str, Any]:
        """Facts about a child for the log, the report and the status."""
        return {}

    def server_event(self, event: str, **facts: Any) -> None:
        """ "ready", "reloading", "reloaded", "abandoned", "stopping" or "stopped", with its facts."""

    def tick(self, now: float) -> None:
        """About once per second, in the loop."""

    async def finish(self) -> None:
        """When all children are gone, with the loop still running: the last chance to await."""

    def close(self, sup: Supervisor) -> None:
        """After all children are gone; always called if open() was."""
