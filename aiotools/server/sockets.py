"""Listening sockets that the parent opens once and all workers share.

They outlive every worker: a connection that waits in the accept queue of one that is being replaced
is taken by another.  Opening happens before anything is started, so that what is wrong with an address
shows at the call, with the address in the message.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import stat
import struct
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ("ListenSockets", "parse_bind", "systemd_sockets")

_HAS_UNIX = hasattr(socket, "AF_UNIX")


def parse_bind(spec: str) -> tuple[str, Any]:
    """``("tcp", (host, port))``, ``("unix", path)``, ``("fd", number)`` or ``("systemd", None)``.

    :raises ValueError: *spec* is none of the forms of ``bind=``.
    """
    forms = "tcp://host:port, unix:path, fd://number or systemd"
    if not isinstance(spec, str):
        raise TypeError(f"an address to bind must be a str or a socket, not {spec!r}")
    if spec == "systemd":
        return "systemd", None
    scheme, sep, rest = spec.partition(":")
    if scheme == "unix" and sep:
        path = rest.removeprefix("//") if rest.startswith("///") else rest
        if not path:
            raise ValueError(f"no path in {spec!r}")
        return "unix", "\0" + path[1:] if path.startswith("@") else path
    if scheme == "fd" and rest.startswith("//"):
        number = rest[2:]
        if not (number.isascii() and number.isdigit()):
            raise ValueError(f"no descriptor number in {spec!r}")
        return "fd", int(number)
    if scheme == "tcp" and rest.startswith("//"):
        host, colon, port = rest[2:].rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"an IPv6 address must be in brackets: {spec!r}")
        if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"no port from 0 to 65535 in {spec!r}")
        return "tcp", (host, int(port))
    raise ValueError(f"{spec!r} is no address to bind; it must read {forms}")


def systemd_sockets() -> list[socket.socket]:
    """The sockets that a service manager passed to this process (LISTEN_FDS), at most once.

    The variables are removed, so that no child believes that they are meant for it.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = []
    for fd in range(3, 3 + int(count)):
        os.set_inheritable(fd, False)
        found.append(socket.socket(fileno=fd))
    return found


def _described(exc: OSError, spec: str) -> OSError:
    """*exc* again, saying for which address."""
    new = type(exc)(exc.errno, f"cannot bind {spec}: {exc.strerror}")
    new.__cause__ = exc
    return new


class ListenSockets:
    """The sockets of one server.

    :param specs: addresses as for ``bind=``, or listening sockets (which stay the caller's).
    :param backlog: length of the accept queues.
    :param reuse_port: one TCP socket per worker; see :meth:`for_index`.
    :param mode: permissions of Unix sockets, or None for those of the umask.
    """

    def __init__(
        self,
        specs: Iterable[Any],
        *,
        backlog: int = 2048,
        reuse_port: bool = False,
        mode: int | None = None,
    ) -> None:
        self._backlog = backlog
        self._mode = mode
        self._reuse_port = reuse_port
        self._shared: list[socket.socket] = []
        # With reuse_port: for each socket of the list above its siblings, by index of the worker.
        self._own: dict[int, list[socket.socket]] = {}
        self._opened: list[socket.socket] = []  # TCP, and nobody else's
        self._paths: list[tuple[str, int, int]] = []
        if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
            raise ValueError("reuse_port: this system has no SO_REUSEPORT")
        parsed = [(s, ("socket", s) if isinstance(s, socket.socket) else parse_bind(s)) for s in specs]
        offered = systemd_sockets() if parsed else []
        if not offered and any(kind == "systemd" for _, (kind, _) in parsed):
            raise RuntimeError("bind='systemd': no sockets were passed to this process (LISTEN_FDS)")
        try:
            for spec, (kind, where) in parsed:
                try:
                    self._open(spec, kind, where, offered)
                except socket.gaierror as exc:
                    raise OSError(f"cannot bind {spec}: {exc.strerror}") from exc
                except OSError as exc:
                    raise _described(exc, spec) from exc
            for sock in self._shared:
                sock.setblocking(False)
        except BaseException:
            self.close()
            raise
        finally:
            for sock in offered:
                if sock not in self._shared:
                    sock.close()

    def _open(self, spec: Any, kind: str, where: Any, offered: list[socket.socket]) -> None:
        if kind == "socket":
            self._shared.append(where.dup())
        elif kind == "fd":
            # The number stays the caller's.
            sock = socket.socket(fileno=os.dup(where))
            self._shared.append(sock)
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                sock.listen(self._backlog)
        elif kind == "systemd":
            self._shared.extend(s for s in offered if s not in self._shared)
        elif kind == "unix":
            self._open_unix(where, offered)
        else:
            host, port = where
            self._open_tcp(host, port, offered)

    def _open_tcp(self, host: str, port: int, offered: list[socket.socket]) -> None:
        infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, proto, _, address in dict.fromkeys(infos):
            ready = next((s for s in offered if s.family == family and s.getsockname() == address), None)
            if ready is not None:
                self._shared.append(ready)
                continue
            self._shared.append(self._tcp_socket(family, proto, address))

    def _tcp_socket(self, family: int, proto: int, address: Any) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM, proto)
        try:
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(self._backlog)
        except BaseException:
            sock.close()
            raise
        self._opened.append(sock)
        return sock

    def _open_unix(self, path: str, offered: list[socket.socket]) -> None:
        if not _HAS_UNIX:
            raise ValueError("this system has no Unix sockets")
        ready = next((s for s in offered if s.family == socket.AF_UNIX and s.getsockname() == path), None)
        if ready is not None:
            self._shared.append(ready)
            return
        sock = open_unix_socket(path, self._mode)
        self._shared.append(sock)
        sock.listen(self._backlog)
        if not path.startswith("\0"):
            found = os.stat(path)
            self._paths.append((path, found.st_dev, found.st_ino))

    def for_index(self, index: int) -> list[socket.socket]:
        """The sockets for the worker with this index."""
        if not self._reuse_port:
            return list(self._shared)
        if index not in self._own:
            own = []
            taken = {id(s) for socks in self._own.values() for s in socks}
            for sock in self._shared:
                if sock.family not in (socket.AF_INET, socket.AF_INET6) or id(sock) not in taken:
                    own.append(sock)
                else:
                    own.append(self._tcp_socket(sock.family, sock.proto, sock.getsockname()))
                    own[-1].setblocking(False)
            self._own[index] = own
        return self._own[index]

    def addresses(self) -> list[str]:
        """Where they listen, as for ``bind=``."""
        found = []
        for sock in self._shared:
            name = sock.getsockname()
            if not isinstance(name, tuple):
                found.append(f"unix:{name.decode() if isinstance(name, bytes) else name}".replace("\0", "@"))
            elif sock.family == socket.AF_INET6:
                found.append(f"tcp://[{name[0]}]:{name[1]}")
            else:
                found.append(f"tcp://{name[0]}:{name[1]}")
        return found

    def refuse_new(self) -> None:
        """Let no new connection into the accept queues, where the system can do that.

        On Linux a packet filter drops the first packet of a TCP handshake: the client tries again
        after a while, finds the socket closed, and is refused.  The files of Unix sockets go.  Sockets
        that somebody else holds as well are left alone: their queues outlive us.
        """
        for sock in self._opened:
            if sys.platform == "linux" and sock.fileno() >= 0:
                with contextlib.suppress(OSError):
                    _drop_syn(sock)
        self._unlink()

    def pending(self) -> bool:
        """Whether a connection waits to be accepted."""
        poll = select.poll()
        for sock in self._all():
            poll.register(sock.fileno(), select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))

    def _all(self) -> list[socket.socket]:
        every = [*self._shared, *(s for own in self._own.values() for s in own)]
        return list({id(s): s for s in every}.values())

    def close(self) -> None:
        """Close all, and remove the files of the Unix sockets that are still ours."""
        for sock in self._all():
            sock.close()
        self._shared.clear()
        self._own.clear()
        self._unlink()

    def _unlink(self) -> None:
        for path, dev, ino in self._paths:
            try:
                found = os.stat(path)
                if (found.st_dev, found.st_ino) == (dev, ino):
                    os.unlink(path)
            except OSError:
                pass
        self._paths.clear()


def _drop_syn(sock: socket.socket) -> None:
    """Attach a classic packet filter that drops TCP segments with the SYN flag."""
    code = [
        (0x30, 0, 0, 13),  # load byte 13 of the TCP header: the flags
        (0x45, 0, 1, 0x02),  # SYN set?
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0x40000),  # keep
    ]
    program = array.array("B", b"".join(struct.pack("HBBI", *line) for line in code))
    # struct sock_fprog: the length, and where the instructions are
    option = struct.pack("HP", len(code), program.buffer_info()[0])
    sock.setsockopt(socket.SOL_SOCKET, 26, option)  # SO_ATTACH_FILTER


def open_unix_socket(path: str, mode: int | None) -> socket.socket:
    """A bound Unix socket.  A file left by a dead server is replaced; nothing else is touched.

    :raises OSError: ``EADDRINUSE`` if somebody listens there, ``EEXIST`` if it is no socket.
    """
    if not path.startswith("\0"):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            pass
        else:
            if not stat.S_ISSOCK(found.st_mode):
                raise OSError(errno.EEXIST, "the file exists and is no socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                try:
                    probe.connect(path)
                except (ConnectionRefusedError, FileNotFoundError):
                    pass
                except BlockingIOError:  # its accept queue is full
                    raise OSError(errno.EADDRINUSE, "another process listens there") from None
                else:
                    raise OSError(errno.EADDRINUSE, "another process listens there")
            os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Between bind and chmod the wrong ones could get in, so the right permissions are there from the first.
    old = os.umask(0o777 & ~mode) if mode is not None else None
    try:
        sock.bind(path)
    except BaseException:
        sock.close()
        raise
    finally:
        if old is not None:
            os.umask(old)
    return sock
