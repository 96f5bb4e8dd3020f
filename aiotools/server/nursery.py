"""A fork server of a managed server's own: workers start from a process that has imported what is not the user's.

A fresh interpreter spends most of its start on importing asyncio, this package and what serves HTTP.  Here that
happens once per generation, in a process that imports nothing of the program, starts no thread and runs no loop; each worker is
forked from it and imports the program's modules itself, as fresh as under ``spawn``.

How it differs from multiprocessing's fork server, whose classes it builds on
    - it preloads no ``__main__``, and there is one per generation, so that a rolling restart also sees libraries
      that were updated meanwhile;
    - children get the environment and umask that the parent has when they are started;
    - its only way to be reached is a socket pair: no file remains, however the parent ends;
    - signals that a terminal or a service manager sends to all processes leave it alone, and its children begin
      with the parent's mask;
    - it tells whether a child dumped core.

Protocol
    The parent sends one byte with the descriptors of a new child: the pipe with its orders, the pipe for its status, the resource
    tracker's, and those that it inherits.  The status pipe gives the process id, and at the end the exit code.
    The server says when it has imported, and what it could not import: one line of JSON, name -> reason.  It ends when the parent's end of the socket is closed (so also when the parent
    is gone) and its last child has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import io
import json
import multiprocessing.context
import multiprocessing.process
import os
import pickle
import selectors
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection, forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.popen_forkserver import Popen
from typing import Any

from ..fork import keep_from_children
from .worker import describe_error

__all__ = ("Nursery", "NurseryError", "NurseryContext")

#: Process id and 0, or exit code (minus a signal's number) and whether there is a core dump.
_STATUS = struct.Struct("=qq")
#: What SCM_RIGHTS takes at once.
_MAX_FDS = 250


class NurseryError(RuntimeError):
    """The fork server is gone."""


# The parent's side


class Nursery:
    """The fork server of one generation, as the parent has it.

    :param preload: names of modules to import, beside those of this package.
    :param block: signals that its children are to begin with blocked.
    """

    def __init__(self, preload: Iterable[str], block: Sequence[int]) -> None:
        self._sock: socket.socket | None = None
        self.pid: int | None = None
        modules = list(
            dict.fromkeys(["aiotools.server.worker", "aiotools.server.board", "aiotools.server.logs", *preload])
        )
        ours, theirs = socket.socketpair()
        try:
            command = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; "
            command += f"serve({theirs.fileno()}, {modules!r})"
            executable = os.fsdecode(spawn.get_executable())
            arguments = [executable, *util._args_from_interpreter_flags(), "-c", command]  # type: ignore[attr-defined]
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, block)
            try:
                self.pid = util.spawnv_passfds(os.fsencode(executable), arguments, [theirs.fileno()])
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._sock = keep_from_children(ours)

    def __repr__(self) -> str:
        return f"<Nursery pid={self.pid}>"

    async def wait_ready(self) -> dict[str, str]:
        """Wait until it has imported all.

        :returns: what it could not import, and why.
        :raises NurseryError: it ended before.
        """
        assert self._sock is not None
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        fd = self._sock.fileno()
        answer = b""
        loop.add_reader(fd, readable.set)
        try:
            while not answer.endswith(b"\n"):
                await readable.wait()
                readable.clear()
                try:
                    data = self._sock.recv(65536, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    raise NurseryError("the fork server ended while it was starting")
                answer += data
        finally:
            loop.remove_reader(fd)
        failed: dict[str, str] = json.loads(answer)
        return failed

    @property
    def alive(self) -> bool:
        """Whether it takes orders, as far as is known without waiting."""
        if self._sock is None:
            return False
        try:
            return self._sock.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def new_process(self, fds: Sequence[int]) -> tuple[int, int, int]:
        """Fork: the process id, the reading end of the status pipe, and the writing end of the pipe for its orders.

        :raises NurseryError: it is gone.
        """
        if len(fds) > _MAX_FDS:
            raise ValueError("too many file descriptors to pass")
        if self._sock is None:
            raise NurseryError("the fork server is closed")
        tracker: Any = resource_tracker.getfd()
        status_r, status_w = os.pipe()
        orders_r, orders_w = os.pipe()
        try:
            try:
                socket.send_fds(self._sock, [b"F"], [orders_r, status_w, tracker, *fds])
            finally:
                os.close(orders_r)
                os.close(status_w)
            status = _read_status(status_r)
            if status is None:
                raise NurseryError("the fork server is gone")
        except BaseException as exc:
            os.close(status_r)
            os.close(orders_w)
            if isinstance(exc, OSError):
                raise NurseryError("the fork server is gone") from exc
            raise
        return status[0], status_r, orders_w

    def retire(self) -> None:
        """Take no more orders; it ends when its last child has."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def collect(self) -> bool:
        """Whether it has ended; never blocks."""
        if self.pid is not None:
            try:
                pid, _ = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pid = self.pid  # somebody else has collected it
            if pid:
                self.pid = None
        return self.pid is None

    async def close(self, timeout: float = 5.0) -> None:
        """Retire it and wait for its end; what does not end is killed."""
        self.retire()
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while not self.collect():
            if loop.time() > end and self.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            await asyncio.sleep(0.002)


def _read_status(fd: int) -> tuple[int, int] | None:
    """The next status, or None at the end of the file."""
    data = b""
    while len(data) < _STATUS.size:
        more = os.read(fd, _STATUS.size - len(data))
        if not more:
            return None
        data += more
    found: tuple[int, int] = _STATUS.unpack(data)
    return found


class _Popen(Popen):
    """A child of a nursery."""

    core_dumped: bool | None = None

    def _launch(self, process_obj: Any) -> None:
        # As multiprocessing does it, but for where the process comes from.
        preparation = spawn.get_preparation_data(process_obj._name)
        orders = io.BytesIO()
        multiprocessing.context.set_spawning_popen(self)
        try:
            reduction.dump(_surroundings(), orders)
            reduction.dump(preparation, orders)
            reduction.dump(process_obj, orders)
        finally:
            multiprocessing.context.set_spawning_popen(None)
        self.pid, self.sentinel, writer = process_obj._nursery.new_process(self._fds)  # type: ignore[attr-defined]
        # Another writing end stays open while this process lives: multiprocessing.parent_process() relies on it.
        parent = os.dup(writer)
        self.finalizer = util.Finalize(self, util.close_fds, (parent, self.sentinel))  # type: ignore[attr-defined]
        with contextlib.suppress(BrokenPipeError), open(writer, "wb") as f:  # it was killed: its status says so
            f.write(orders.getbuffer())

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            if not connection.wait([self.sentinel], 0 if flag == os.WNOHANG else None):
                return None
            try:
                status = _read_status(self.sentinel)
            except OSError:
                status = None
            # Nobody knows how it ended if the fork server was killed.
            self.returncode, core = (255, 0) if status is None else status
            self.core_dumped = None if status is None else bool(core)
        return self.returncode


class _Process(multiprocessing.process.BaseProcess):
    _start_method = "forkserver"
    _nursery: Nursery | None = None

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Popen(process_obj)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_nursery"}


class NurseryContext(multiprocessing.context.BaseContext):
    """A multiprocessing context whose processes come from a nursery."""

    _name = "spawn"  # what its children find is what they would find there

    def __init__(self, nursery: Nursery) -> None:
        self.nursery = nursery

    def get_start_method(self, allow_none: bool = False) -> str:
        return self._name

    def Process(self, *args: Any, **kwargs: Any) -> Any:
        process = _Process(*args, **kwargs)
        process._nursery = self.nursery
        return process


def _surroundings() -> dict[str, Any]:
    """What a child would inherit of this process if it were its own."""
    umask = os.umask(0)
    os.umask(umask)
    return {"environ": dict(os.environ), "umask": umask}


# The fork server's side

#: Signals that a terminal or a service manager sends to more than the one process that they are for.
_DEAF_TO = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU", "SIGTSTP", "SIGWINCH")


def serve(fd: int, preload: Sequence[str]) -> None:
    """The fork server's life."""
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    deaf_to = [getattr(signal, name) for name in _DEAF_TO if hasattr(signal, name)]
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in deaf_to}
    failed = {}
    for name in preload:
        try:
            importlib.import_module(name)
        except Exception as exc:
            failed[name] = describe_error(exc)
    traceback.format_exception_only(Exception())  # see import_for_tracebacks()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.flush()
    gc.collect()
    gc.freeze()
    wakeup_r, wakeup_w = os.pipe()
    for end in (wakeup_r, wakeup_w):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wakeup_w, warn_on_full_buffer=False)
    handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    children: dict[int, int] = {}  # process id -> status pipe
    with contextlib.suppress(OSError):
        sock.sendall(json.dumps(failed).encode() + b"\n")
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        selector.register(wakeup_r, selectors.EVENT_READ)

        def into_child() -> None:
            signal.set_wakeup_fd(-1)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            selector.close()
            for end in (wakeup_r, wakeup_w, *children.values()):
                os.close(end)
            sock.close()

        open_ = True
        while open_ or children:
            ready = {key.fd for key, _ in selector.select()}
            if wakeup_r in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wakeup_r, 65536)
                _reap(children)
            if open_ and sock.fileno() in ready:
                try:
                    _, fds, _, _ = socket.recv_fds(sock, 1, 3 + _MAX_FDS)
                except OSError:
                    fds = []
                if fds:
                    _fork(children, fds, into_child)
                else:
                    open_ = False
                    selector.unregister(sock)
    os._exit(0)


def _reap(children: dict[int, int]) -> None:
    while children:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return
        if found is None:
            return
        status = children.pop(found.si_pid, None)
        if status is not None:
            code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            with contextlib.suppress(OSError):  # the parent is gone
                os.write(status, _STATUS.pack(code, found.si_code == os.CLD_DUMPED))
            os.close(status)


def _fork(children: dict[int, int], fds: list[int], into_child: Callable[[], None]) -> None:
    orders, status, tracker, *inherited = fds
    pid = os.fork()
    if pid:
        children[pid] = status
        with contextlib.suppress(OSError):
            os.write(status, _STATUS.pack(pid, 0))
        for fd in (orders, tracker, *inherited):
            os.close(fd)
        return
    code = 1
    try:
        into_child()
        os.close(status)
        code = _live(orders, tracker, inherited)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        with contextlib.suppress(AttributeError, ValueError, OSError):
            sys.stderr.flush()
    finally:
        os._exit(code)


def _live(orders: int, tracker: int, inherited: list[int]) -> int:
    """A child: becomes the process that its orders describe, as multiprocessing does it."""
    resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]
    forkserver._forkserver._inherited_fds = inherited  # type: ignore[attr-defined]
    importlib.invalidate_caches()
    parent = os.dup(orders)
    current: Any = multiprocessing.process.current_process()
    with open(orders, "rb") as f:
        surroundings = pickle.load(f)
        os.environ.clear()
        os.environ.update(surroundings["environ"])
        os.umask(surroundings["umask"])
        current._inheriting = True
        try:
            spawn.prepare(pickle.load(f))
            process = pickle.load(f)
        finally:
            del current._inheriting
    return int(process._bootstrap(parent))
