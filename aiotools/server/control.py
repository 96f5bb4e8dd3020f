"""The control socket of a managed server, and the functions that talk to it.

A Unix socket that only its owner may use.  One JSON object per line in both directions: a command is
``{"verb": "restart", "wait": true}``, the answer ``{"ok": true, ...}`` or ``{"ok": false, "error": "..."}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any

from ..fork import keep_from_children
from .plugins import ServerPlugin
from .sockets import open_unix_socket

if TYPE_CHECKING:
    from .supervise import Supervisor

__all__ = (
    "ControlError",
    "ControlSocket",
    "PidFile",
    "command",
    "less",
    "live",
    "more",
    "ready",
    "reload",
    "restart",
    "status",
    "stop",
)

VERBS = ("restart", "reload", "status", "more", "less", "stop", "ready", "live")
#: Seconds after which a loop that does not turn counts as standing still, in a server without ``hang_timeout``.
STANDSTILL = 30.0


class ControlError(RuntimeError):
    """The server refused a command, or could not carry it out."""


def command(path: str | os.PathLike[str], verb: str, *, timeout: float | None = 60.0, **fields: Any) -> dict[str, Any]:
    """Send a command to the server whose control socket is at *path*; returns its answer.

    :param verb: ``"restart"``, ``"reload"``, ``"status"``, ``"more"``, ``"less"``, ``"stop"``, ``"ready"`` or ``"live"``.
    :param timeout: seconds to wait for the answer; None: for ever.
    :param fields: further fields of the command; ``wait=True`` lets ``restart`` answer when it is done.
    :raises ControlError: the server says no, or the restart was abandoned.
    :raises OSError: no server is there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(os.fspath(path))
        sock.sendall(json.dumps({"verb": verb, **fields}).encode() + b"\n")
        with sock.makefile("rb") as answers:
            line = answers.readline()
    if not line:
        raise ControlError(f"{verb}: the server closed the connection without an answer")
    answer: dict[str, Any] = json.loads(line)
    if not answer.pop("ok", False):
        raise ControlError(f"{verb}: {answer.get('error', 'refused')}")
    return answer


def restart(path: str | os.PathLike[str], *, wait: bool = True, timeout: float | None = 60.0) -> dict[str, Any]:
    """Rolling restart; with *wait*, returns when the new generation serves.

    :raises ControlError: the new generation was abandoned, and why.
    """
    return command(path, "restart", wait=wait, timeout=timeout)


def reload(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reload without restart: log files are reopened, ``on_reload`` hooks run."""
    return command(path, "reload")


def status(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the server and its workers are doing."""
    return command(path, "status")


def more(path: str | os.PathLike[str]) -> dict[str, Any]:
    """One worker more."""
    return command(path, "more")


def less(path: str | os.PathLike[str]) -> dict[str, Any]:
    """One worker less."""
    return command(path, "less")


def stop(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Stop the server; returns when it has begun to."""
    return command(path, "stop")


def ready(path: str | os.PathLike[str], *, timeout: float | None = 60.0) -> dict[str, Any]:
    """Whether the server takes requests: it has been up, is not stopping, and a worker is ready whose loop turns.

    Meant for readiness and startup probes.

    :returns: ``{"state": ..., "ready": number of such workers, "workers": number of all}``.
    :raises ControlError: it is not ready, and why.
    """
    return command(path, "ready", timeout=timeout)


def live(path: str | os.PathLike[str], *, timeout: float | None = 60.0) -> dict[str, Any]:
    """Whether the server is worth keeping: the parent answers, and not all of its workers stand still.

    Meant for liveness probes.  True while the server starts, reloads and drains; single workers that hang it replaces itself.

    :returns: as :func:`ready`.
    :raises ControlError: no loop of any worker turns.
    """
    return command(path, "live", timeout=timeout)


class ControlSocket(ServerPlugin):
    """Serves the control socket in the parent's loop."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._sock: socket.socket | None = None
        self._ino: tuple[int, int] | None = None
        self._sup: Supervisor | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._rolls: set[asyncio.Future[dict[str, Any]]] = set()

    def open(self, sup: Supervisor) -> None:
        self._sup = sup
        try:
            self._sock = open_unix_socket(self.path, 0o600)
        except OSError as exc:
            raise OSError(exc.errno, f"cannot open the control socket {self.path}: {exc.strerror}") from exc
        found = os.stat(self.path)
        self._ino = (found.st_dev, found.st_ino)
        keep_from_children(self._sock)
        self._sock.listen(16)
        self._sock.setblocking(False)
        assert sup.loop is not None
        sup.loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._sock is not None and self._sup is not None and self._sup.loop is not None
        with contextlib.suppress(OSError):
            conn, _ = self._sock.accept()
            task = self._sup.loop.create_task(self._serve(conn))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, conn: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=conn)
        try:
            while line := await reader.readline():
                try:
                    message = json.loads(line)
                    answer = await self._obey(message.pop("verb", None), message)
                except (ValueError, AttributeError) as exc:
                    answer = {"ok": False, "error": f"not understood: {exc}"}
                writer.write(json.dumps(answer, default=str).encode() + b"\n")
                await writer.drain()
        except OSError:
            pass  # the other side is gone
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _obey(self, verb: Any, fields: dict[str, Any]) -> dict[str, Any]:
        sup = self._sup
        assert sup is not None and sup.loop is not None
        if verb not in VERBS:
            return {"ok": False, "error": f"unknown verb {verb!r}; there are {', '.join(VERBS)}"}
        if verb == "status":
            return {"ok": True, **sup.status()}
        if verb in ("ready", "live"):
            return self._health(verb)
        if sup.stop_signal is not None:
            return {"ok": False, "error": "the server is stopping"}
        if verb == "stop":
            from .signals import default_stop_signal

            # After the answer.
            sup.loop.call_soon(sup.request_stop, default_stop_signal(sup.stop_signals), "stopped")
            return {"ok": True}
        if verb == "restart" and fields.get("wait"):
            done: asyncio.Future[dict[str, Any]] = sup.loop.create_future()
            self._rolls.add(done)
            try:
                sup.command(verb)
                return await done
            finally:
                self._rolls.discard(done)
        sup.command(verb)
        return {"ok": True}

    def _health(self, verb: str) -> dict[str, Any]:
        """The answer to a probe, from the status board: nobody is asked who may hang."""
        from .board import StatusBoard

        sup = self._sup
        assert sup is not None
        state = sup.status()["state"]
        workers = [c for c in sup.children if c.role == "worker"]
        late: set[Any] = set()
        turning = True
        for plugin in sup.plugins:
            if isinstance(plugin, StatusBoard):
                late.update(plugin.late(plugin.hang_timeout or STANDSTILL))
                beating = [c for c in plugin.beating() if c.role == "worker"]
                turning = not beating or any(c not in late for c in beating)
        count = sum(c.state.value == "ready" and c not in late for c in workers)
        facts = {"state": state, "ready": count, "workers": len(workers)}
        # Without workers there is nothing to wait for.
        serves = state in ("running", "reloading") and (count > 0 or not sup.num_workers)
        if turning if verb == "live" else serves:
            return {"ok": True, **facts}
        return {"ok": False, "error": f"{state}, {count} of {len(workers)} workers are ready and turn"}

    def server_event(self, event: str, **facts: Any) -> None:
        if event in ("reloaded", "abandoned", "stopping"):
            sup = self._sup
            if sup is not None and event != "stopping" and sup.rolling.again:
                return  # those that asked meanwhile want the next one
            answer: dict[str, Any]
            if event == "reloaded":
                answer = {"ok": True, "generation": facts["generation"]}
            else:
                answer = {"ok": False, "error": str(facts.get("reason") or event)}
            for done in self._rolls:
                if not done.done():
                    done.set_result(answer)

    async def finish(self) -> None:
        """Let the answers out that are on their way, for a moment."""
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=0.2)
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending)

    def close(self, sup: Supervisor) -> None:
        if self._sock is None:
            return
        assert sup.loop is not None
        sup.loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._sock = None
        with contextlib.suppress(OSError):
            found = os.stat(self.path)
            if (found.st_dev, found.st_ino) == self._ino:
                os.unlink(self.path)


class PidFile(ServerPlugin):
    """Holds the parent's process id while the server runs."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._written = False

    def open(self, sup: Supervisor) -> None:
        try:
            other = self._read()
        except ValueError:
            raise RuntimeError(f"the pidfile {self.path} exists and holds no process id; it is left alone") from None
        if other is not None and other != os.getpid() and _exists(other):
            raise RuntimeError(f"the pidfile {self.path} names process {other}, which is running")
        temporary = f"{self.path}.{os.getpid()}"
        try:
            try:
                with open(temporary, "w") as f:
                    f.write(f"{os.getpid()}\n")
                os.replace(temporary, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as exc:
            raise OSError(exc.errno, f"cannot write the pidfile {self.path}: {exc.strerror}") from None
        self._written = True

    def _read(self) -> int | None:
        """The process id in it; None if there is none.

        :raises ValueError: it holds something else.
        """
        try:
            with open(self.path, "rb") as f:
                text = f.read(100).strip()
        except OSError:
            return None
        if not text:
            return None
        if not text.isdigit():
            raise ValueError(text)
        return int(text)

    def close(self, sup: Supervisor) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._written and self._read() == os.getpid():
                os.unlink(self.path)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
