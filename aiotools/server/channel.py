"""The control channel between the parent and one child: small messages over a stream socket pair.

A message is a dict that JSON can carry, with its kind under ``"t"``; one line each.  Both sides use
the same class.  Sending never blocks and never raises because the other side is gone or slow: what
does not fit is kept and sent by the loop (:meth:`Channel.attach`), and a dead peer shows on the
reading side, as end of file.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

__all__ = ("Channel",)


class Channel:
    """One end of the control channel.

    :param sock: a connected stream socket, owned (and closed) by this object.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: Callable[[dict[str, Any]], object] | None = None
        self._on_eof: Callable[[], object] | None = None
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self.eof = False

    def attach(
        self,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[dict[str, Any]], object],
        on_eof: Callable[[], object] | None = None,
    ) -> None:
        """Have *loop* call *on_message* for each message, and *on_eof* once when the peer is gone."""
        self._loop = loop
        self._on_message = on_message
        self._on_eof = on_eof
        loop.add_reader(self._sock.fileno(), self.read)
        if self._outgoing:
            loop.add_writer(self._sock.fileno(), self._flush)

    def fileno(self) -> int:
        return self._sock.fileno()

    def detach(self) -> None:
        """Leave the loop; messages can still be sent."""
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed() and self._sock.fileno() >= 0:
            loop.remove_reader(self._sock.fileno())
            loop.remove_writer(self._sock.fileno())

    def close(self) -> None:
        self.detach()
        self._sock.close()

    def send(self, kind: str, /, **fields: Any) -> None:
        """Send the message *kind* with *fields*."""
        if self._sock.fileno() < 0:
            return
        self._outgoing += json.dumps({"t": kind, **fields}, default=str).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            try:
                sent = self._sock.send(self._outgoing)
            except (BlockingIOError, InterruptedError):
                if self._loop is not None:
                    self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError:
                self._outgoing.clear()
                break
            del self._outgoing[:sent]
        if self._loop is not None:
            self._loop.remove_writer(self._sock.fileno())

    def read(self) -> None:
        """Deliver what has arrived; also to be called when a child's end is known, before acting on it."""
        while not self.eof and self._sock.fileno() >= 0:
            try:
                data = self._sock.recv(65536)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self.eof = True
                if self._loop is not None:
                    self._loop.remove_reader(self._sock.fileno())
                if self._on_eof is not None:
                    self._on_eof()
                return
            self._incoming += data
            while (end := self._incoming.find(b"\n")) >= 0:
                line = bytes(self._incoming[:end])
                del self._incoming[: end + 1]
                if self._on_message is not None:
                    self._on_message(json.loads(line))
