"""What a server tells the service manager: systemd's ``sd_notify`` protocol, without libsystemd.

A server that runs under ``Type=notify`` or ``Type=notify-reload`` says by itself when it is ready, reloads and stops, what
it is doing, and, with ``WatchdogSec=``, that it is alive.  It is alive as long as the loop of the parent turns and not all of its
workers stand still: single workers that hang are replaced by the server itself (``hang_timeout``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .plugins import ServerPlugin

if TYPE_CHECKING:
    from .board import StatusBoard
    from .child import Child
    from .supervise import Supervisor

__all__ = ("SystemdNotifier", "notify", "watchdog_interval")

log = logging.getLogger(__package__)

#: Seconds to wait for room in the manager's queue, which holds ten messages or so.
PATIENCE = 1.0


def notify(*lines: str, environ: Mapping[str, str] | None = None, wait: bool = True) -> bool:
    """Send *lines* (``"READY=1"``, ``"STATUS=..."``) to the service manager, in one message.

    :param environ: where ``NOTIFY_SOCKET`` is looked up; default: ``os.environ``.
    :param wait: wait for a moment if its queue is full; otherwise the message is dropped then.
    :returns: whether there is a service manager that got it.  Nothing is raised when it is gone or does not listen: the
        service is not to suffer from it.
    :raises ValueError: a line with a line feed in it.
    """
    for line in lines:
        if "\n" in line or "=" not in line:
            raise ValueError(f"one assignment per line, not {line!r}")
    address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False  # none, or an address family that we cannot have (vsock)
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE if wait else 0.0)
            sock.sendto("\n".join(lines).encode(errors="backslashreplace"), address)
    except OSError as exc:
        log.debug("The service manager cannot be told %s: %s", lines, exc)
        return False
    return True


def watchdog_interval(environ: Mapping[str, str] | None = None, pid: int | None = None) -> float | None:
    """Seconds within which the service manager wants to hear ``WATCHDOG=1``, or None if it does not watch this process."""
    environ = os.environ if environ is None else environ
    try:
        usec = int(environ.get("WATCHDOG_USEC", ""))
        watched = environ.get("WATCHDOG_PID")
        if usec <= 0 or (watched is not None and int(watched) != (os.getpid() if pid is None else pid)):
            return None
    except ValueError:
        return None
    return usec * 1e-6


class SystemdNotifier(ServerPlugin):
    """Tells the service manager how the server is.

    :param board: where the workers' heartbeats are, for ``WATCHDOG=1``.
    :param environ: where ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC`` are; default: ``os.environ``.
    """

    def __init__(self, board: StatusBoard | None = None, environ: Mapping[str, str] | None = None) -> None:
        self._board = board
        # As it was at the start: a service may clear it later.
        self._environ = dict(os.environ if environ is None else environ)
        self._watchdog = watchdog_interval(self._environ)
        self._sup: Supervisor | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._said: str | None = None
        self._state = "starting"
        self._note = ""

    @property
    def wanted(self) -> bool:
        """Whether there is a service manager to be told."""
        return bool(self._environ.get("NOTIFY_SOCKET"))

    def _tell(self, *lines: str, wait: bool = True) -> None:
        notify(*lines, environ=self._environ, wait=wait)

    def open(self, sup: Supervisor) -> None:
        self._sup = sup
        self._tell(f"MAINPID={os.getpid()}", self._status_line())
        if self._watchdog is not None:
            self._feed()

    def _status_line(self) -> str:
        sup = self._sup
        assert sup is not None
        ready = sum(c.state.value == "ready" and c.role == "worker" for c in sup.children)
        wanted = sum(s.role == "worker" for s in sup.slots.values()) or sup.num_workers
        text = f"{self._state}: {ready} of {wanted} workers ready, generation {sup.generation}"
        if self._note:
            text += f"; {self._note}"
        return "STATUS=" + " ".join(text.split())

    def _show(self) -> None:
        line = self._status_line()
        if line != self._said:
            self._said = line
            self._tell(line, wait=False)

    def child_event(self, child: Child, event: str) -> None:
        if self._state != "stopped":
            self._show()

    def tick(self, now: float) -> None:
        self._show()

    def server_event(self, event: str, **facts: Any) -> None:
        if event == "ready":
            self._state = "running"
            self._tell("READY=1", self._status_line())
        elif event == "reloading":
            self._state = "reloading"
            self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", self._status_line())
        elif event in ("reloaded", "abandoned"):
            # READY ends the reload for systemd, whatever became of it; STATUS says what.
            self._state = "running"
            self._note = (
                f"generation {facts['generation']} was abandoned: {facts['reason']}" if event == "abandoned" else ""
            )
            self._tell("READY=1", self._status_line())
        elif event == "stopping":
            self._state = "stopping"
            self._note = str(facts.get("reason") or "")
            self._tell("STOPPING=1", self._status_line())
        elif event == "stopped":
            self._state = "stopped"

    def alive(self) -> bool:
        """Whether a loop turns: that of the parent does, if this is called; are all the workers' standing still?"""
        if self._board is None or self._watchdog is None:
            return True
        late = set(self._board.late(self._watchdog))
        beating = [c for c in self._board.beating() if c.role == "worker"]
        return not beating or any(c not in late for c in beating)

    def _feed(self) -> None:
        assert self._sup is not None and self._sup.loop is not None and self._watchdog is not None
        if self.alive():
            self._tell("WATCHDOG=1")
        self._handle = self._sup.loop.call_later(self._watchdog / 3, self._feed)

    def close(self, sup: Supervisor) -> None:
        if self._handle is not None:
            self._handle.cancel()
