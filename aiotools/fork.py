"""Child processes for asyncio programs, on top of :mod:`multiprocessing`.

:func:`afork` starts a function in a new process and returns once that process can be signalled safely.

Three descriptors connect a child with its parent:

- *ready*: a pipe on which the child writes one byte when its signal dispositions are in place.  The parent sees
  either the byte or the end of file of a child that died before.
- *guard*: a pipe of which the parent keeps the write end and never writes.  The kernel tells the child (``SIGIO``)
  when the last write end is closed, that is when the parent is gone in whatever way; the default action of that
  signal ends the child, without any thread in it and also under a fork server.  A parent-death signal cannot do this:
  it follows the thread that forked, and the fork server instead of the parent.
- the process itself: a pidfd where the system has them, else it is polled.

With the ``fork`` start method a child inherits a copy of every descriptor of its parent.  The parent's ends of these
pipes must not live on in its siblings (a sibling would keep the guard open), so they are closed in every forked
process.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.util
import os
import signal
import sys
import traceback
import weakref
from abc import ABCMeta, abstractmethod
from asyncio import get_running_loop
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeAlias

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = (
    "AbstractChildProcess",
    "PosixChildProcess",
    "PidfdChildProcess",
    "afork",
)

log = logging.getLogger(__name__)

if sys.platform != "win32":
    MPContext: TypeAlias = (
        multiprocessing.context.DefaultContext
        | multiprocessing.context.ForkContext
        | multiprocessing.context.ForkServerContext
        | multiprocessing.context.SpawnContext
    )
    MPProcess: TypeAlias = (
        multiprocessing.context.Process
        | multiprocessing.context.SpawnProcess
        | multiprocessing.context.ForkProcess
        | multiprocessing.context.ForkServerProcess
    )
else:
    MPContext: TypeAlias = multiprocessing.context.DefaultContext | multiprocessing.context.SpawnContext
    MPProcess: TypeAlias = multiprocessing.context.Process | multiprocessing.context.SpawnProcess


def _probe_pidfd() -> bool:
    if not hasattr(os, "pidfd_open") or not hasattr(signal, "pidfd_send_signal"):
        return False
    try:
        fd = os.pidfd_open(os.getpid(), 0)
        try:
            signal.pidfd_send_signal(fd, 0)  # sandboxes may allow the one and refuse the other
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


_has_pidfd = _probe_pidfd()

# Descriptors that belong to this process alone.  A fork copies the whole process, so this is a fact about the process
# and not about an interpreter or a loop; entries are weak and vanish with the objects that own the descriptors.
_parent_only: weakref.WeakSet[Any] = weakref.WeakSet()


def _close_quietly(end: Any) -> None:
    try:
        end.close()
    except OSError:
        pass


def _drop_parent_ends() -> None:
    for end in list(_parent_only):
        _close_quietly(end)
    _parent_only.clear()


def keep_from_children(end: Any) -> Any:
    """Have *end*, a weakly referenceable object with ``close()``, closed in every process forked from this one."""
    _parent_only.add(end)
    return end


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_parent_ends)


class ChildStartError(ChildProcessError):
    """A child process ended before it was up.

    :ivar pid: its process id.
    :ivar exitcode: its exit code, or minus the number of the signal that ended it.
    """

    def __init__(self, pid: int, exitcode: int) -> None:
        super().__init__(f"child process {pid} ended with exit code {exitcode} before it was ready")
        self.pid = pid
        self.exitcode = exitcode

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.pid, self.exitcode)


class AbstractChildProcess(metaclass=ABCMeta):
    """A child process as :func:`afork` returns it."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process id; it stays readable after the child's end."""
        raise NotImplementedError

    @abstractmethod
    def send_signal(self, signum: int) -> None:
        """Send the signal *signum* to the child.

        A child that is known to have ended gets nothing, and a warning is logged unless the signal is ``SIGKILL``.
        """
        raise NotImplementedError

    @abstractmethod
    async def wait(self) -> int:
        """Wait until the child has ended.

        Returns its exit code, or minus the signal's number if a signal ended it; the same value to every caller, at
        whatever time.  255, with a warning in the log, if something else in this process has collected the status.
        Cancelling a wait leaves the child alone.
        """
        raise NotImplementedError


class _MPChildProcess(AbstractChildProcess):
    """What both kinds share: the multiprocessing object, the guard, and the exit code, collected once."""

    def __init__(self, proc: MPProcess, pid: int) -> None:
        self._proc = proc
        self._pid = pid
        self._returncode: int | None = None
        self._guard: Any = None
        # Not a child of this process but of multiprocessing's fork server, which reports the exit code over the
        # sentinel.
        popen = getattr(proc, "_popen", None)
        self._foreign = getattr(popen, "method", None) == "forkserver"
        #: Whether the kernel wrote a core dump; None while running and where that is unknown.
        self.core_dumped: bool | None = None

    def __repr__(self) -> str:
        state = "running" if self._returncode is None else f"exit code {self._returncode}"
        return f"<{type(self).__name__} pid={self._pid} {state}>"

    @property
    def pid(self) -> int:
        return self._pid

    def _collect(self) -> int | None:
        """The exit code if the child has ended, else None.  Never blocks."""
        if self._returncode is not None:
            return self._returncode
        if not self._foreign and hasattr(os, "waitid"):
            try:
                info = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                # Somebody has waited for it.  If that was multiprocessing (it polls all its children whenever one is
                # started) the code is known, otherwise it is lost.
                return self._finish(self._proc.exitcode)
            if info is None:
                return None
            self.core_dumped = info.si_code == os.CLD_DUMPED
            return self._finish(self._proc.exitcode)
        code = self._proc.exitcode
        if code is None:
            return None
        self.core_dumped = getattr(getattr(self._proc, "_popen", None), "core_dumped", None)
        return self._finish(code)

    def _finish(self, code: int | None) -> int:
        if code is None:
            log.warning("child process %d exit status already read: it will report returncode 255", self._pid)
            code = 255
            popen = getattr(self._proc, "_popen", None)
            if popen is not None:
                # Otherwise multiprocessing would go on to believe in the child, and signal its process id at exit.
                popen.returncode = code
        self._returncode = code
        try:
            self._proc.close()
        except ValueError:
            pass
        if self._guard is not None:
            _close_quietly(self._guard)
            self._guard = None
        return code

    def _deliver(self, signum: int) -> None:
        os.kill(self._pid, signum)

    def send_signal(self, signum: int) -> None:
        if self._returncode is None:
            try:
                self._deliver(signum)
            except ProcessLookupError:
                pass
            else:
                if signum == getattr(signal, "SIGKILL", None):
                    log.warning("Force-killed hanging child: %d", self._pid)
                return
        if signum != getattr(signal, "SIGKILL", None):
            log.warning("%r.send_signal(%d): The process has already terminated.", self, signum)

    def tell(self, signum: int) -> None:
        """As :meth:`send_signal`, for a child that may well have ended by now: no warning."""
        if self._returncode is None:
            try:
                self._deliver(signum)
            except (ProcessLookupError, PermissionError):
                pass

    def _kill(self) -> None:
        """SIGKILL without the warning, for a child that never came up."""
        if self._returncode is None:
            try:
                self._deliver(getattr(signal, "SIGKILL", signal.SIGTERM))
            except (ProcessLookupError, PermissionError):
                pass


class PosixChildProcess(_MPChildProcess):
    """A child process that is polled for its end, for systems without pidfds.

    :param proc: the started multiprocessing process.
    :param pid: its process id.
    """

    #: Seconds between two polls in :meth:`wait`.
    poll_interval: ClassVar[float] = 0.05

    def _deliver(self, signum: int) -> None:
        if self._collect() is not None:
            raise ProcessLookupError
        os.kill(self._pid, signum)

    async def wait(self) -> int:
        while (code := self._collect()) is None:  # noqa: ASYNC110
            await asyncio.sleep(self.poll_interval)
        return code


class PidfdChildProcess(_MPChildProcess):
    """A child process watched through a pidfd, registered with the running loop until the child has ended.

    :param proc: the started multiprocessing process.
    :param pid: its process id.
    :param pidfd: a pidfd of it, owned (and closed) by this object.
    """

    def __init__(self, proc: MPProcess, pid: int, pidfd: int) -> None:
        super().__init__(proc, pid)
        self._pidfd = pidfd
        self._sentinel = proc.sentinel if self._foreign else -1
        self._waiters: set[asyncio.Future[int]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watching = -1
        self._watch()

    def _watch(self) -> None:
        self._loop = get_running_loop()
        self._watching = self._pidfd
        self._loop.add_reader(self._pidfd, self._on_exit)

    def _unwatch(self) -> None:
        loop, self._loop = self._loop, None
        fd, self._watching = self._watching, -1
        if loop is not None and fd >= 0 and not loop.is_closed():
            loop.remove_reader(fd)

    def _on_exit(self) -> None:
        code = self._collect()
        if code is not None:
            return
        if self._foreign and self._watching == self._pidfd and self._loop is not None:
            # Gone, but the fork server has not told its code yet.
            loop = self._loop
            self._unwatch()
            self._loop, self._watching = loop, self._sentinel
            loop.add_reader(self._sentinel, self._on_exit)

    def _collect(self) -> int | None:
        # For a fork server's child the sentinel alone would not do: it also ends with the fork server.
        if self._returncode is None and self._foreign and not multiprocessing.connection.wait([self._pidfd], 0):
            return None
        return super()._collect()

    def _finish(self, code: int | None) -> int:
        self._unwatch()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        code = super()._finish(code)
        waiters, self._waiters = self._waiters, set()
        for fut in waiters:
            loop = fut.get_loop()
            if not fut.done() and not loop.is_closed():
                fut.set_result(code)
        return code

    def _deliver(self, signum: int) -> None:
        signal.pidfd_send_signal(self._pidfd, signum)

    def __del__(self) -> None:
        fd = getattr(self, "_pidfd", -1)
        if fd >= 0:
            self._pidfd = -1
            os.close(fd)

    async def wait(self) -> int:
        if self._returncode is not None:
            return self._returncode
        loop = get_running_loop()
        if self._loop is not loop:
            # Started under a loop that has been closed since.
            if (code := self._collect()) is not None:
                return code
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError(f"{self!r} belongs to another running event loop")
            self._watch()
        fut: asyncio.Future[int] = loop.create_future()
        self._waiters.add(fut)
        try:
            return await fut
        finally:
            self._waiters.discard(fut)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError, OSError):
            pass  # closed, or nobody reads it any more


def _orphaned(signum: int, frame: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm_guard(guard: Any) -> None:
    """Have this process ended by the kernel when the last write end of *guard* is closed."""
    if fcntl is None or not hasattr(signal, "SIGIO"):
        return
    fd = guard.fileno()
    # The default action of SIGIO is to end the process on Linux, to ignore it on BSD and macOS.
    signal.signal(signal.SIGIO, signal.SIG_DFL if sys.platform == "linux" else _orphaned)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    try:
        gone = os.read(fd, 1) == b""
    except BlockingIOError:
        gone = False
    if gone:  # before the line above was reached
        os.kill(os.getpid(), signal.SIGKILL)


def print_exception() -> None:
    """Print the current exception's traceback; nobody may read it any more."""
    try:
        traceback.print_exc()
    except (OSError, ValueError, AttributeError):
        pass


def _child_main(child_func: Callable[[], int], ready: Any, guard: Any, block: tuple[int, ...]) -> None:
    """The life of the child, from its first line of ours to ``os._exit()``."""
    code = 1
    try:
        try:
            if block:
                signal.pthread_sigmask(signal.SIG_BLOCK, block)
            # Garbage of a forked parent must not be finalized here: a loop among it would take descriptors out of the
            # epoll set that both processes share, and a finalizer would swallow a KeyboardInterrupt.
            gc.freeze()
            # What a forked process inherits of its parent's event loop: the mark that one is running, and a wake-up
            # descriptor that would send this process' signals to the parent.
            asyncio._set_running_loop(None)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # Daemonic for the parent, which ends it at its own exit; here that flag would forbid children.
            multiprocessing.current_process().daemon = False
            _arm_guard(guard)
            ready.send_bytes(b"\0")
            ready.close()
            result = child_func()
            code = result & 255 if isinstance(result, int) else 1
        except SystemExit:
            code = 241
        except KeyboardInterrupt:
            code = 254
        except BaseException:
            code = 1
            print_exception()
        try:
            # As multiprocessing does at the end of its processes: flush its queues, end daemonic children, join others.
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        except BaseException:
            print_exception()
    finally:
        _flush_output()
        os._exit(code)


def start_helpers(ctx: Any) -> None:
    """Start the helper processes of multiprocessing that *ctx* needs.

    To be called before signals are blocked: the resource tracker's start unblocks SIGINT and SIGTERM in the calling
    thread, and a fork server hands the mask that it was started with to all its children, of whomever.
    """
    method = ctx.get_start_method()
    if method in ("spawn", "forkserver") and sys.platform != "win32":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()
        if method == "forkserver":
            from multiprocessing import forkserver

            forkserver.ensure_running()


async def start_child(
    child_func: Callable[[], int],
    *,
    mp_context: Any = None,
    block: Iterable[int] = (),
    name: str | None = None,
) -> _MPChildProcess:
    """:func:`afork` with what the server needs on top.

    :param block: signals that are blocked in the child from its first moment until it unblocks them itself.
    :param name: name of the process, for debuggers and logs.
    """
    ctx = mp_context if mp_context is not None else multiprocessing.get_context()
    loop = get_running_loop()
    block = tuple(int(s) for s in block)
    start_helpers(ctx)
    ready_r, ready_w = ctx.Pipe(duplex=False)
    keep_from_children(ready_r)
    guard_r, guard_w = ctx.Pipe(duplex=False)
    keep_from_children(guard_w)
    proc: Any = None
    try:
        proc = ctx.Process(target=_child_main, args=(child_func, ready_w, guard_r, block), daemon=True, name=name)
        if block:
            # A process that is forked or spawned starts with the mask of this thread.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, block)
            try:
                proc.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        else:
            proc.start()
    except BaseException:
        ready_r.close()
        guard_w.close()
        raise
    finally:
        ready_w.close()
        guard_r.close()
    child: _MPChildProcess
    pid: int = proc.pid
    if _has_pidfd:
        try:
            pidfd = os.pidfd_open(pid, 0)
        except ProcessLookupError:
            child = PosixChildProcess(proc, pid)  # a fork server's child, gone and collected by it
        else:
            child = PidfdChildProcess(proc, pid, pidfd)
    else:
        child = PosixChildProcess(proc, pid)
    child._guard = guard_w
    try:
        try:
            up = await _wait_ready(loop, child, ready_r)
        finally:
            ready_r.close()
        if not up:
            raise ChildStartError(pid, await child.wait())
    except BaseException as exc:
        if not isinstance(exc, ChildStartError):
            # Cancelled, most likely: nobody will ever hold this child, so it must not stay.
            child._kill()
            await child.wait()
        raise
    return child


async def _wait_ready(loop: asyncio.AbstractEventLoop, child: _MPChildProcess, ready: Any) -> bool:
    """Wait for the byte on *ready* (True) or for the child's end (False)."""
    fut: asyncio.Future[None] = loop.create_future()

    def wake(*_: Any) -> None:
        if not fut.done():
            fut.set_result(None)

    loop.add_reader(ready.fileno(), wake)
    # The end of file alone would do, were it not for other threads that fork in the wrong moment and keep the pipe
    # open.
    ended = loop.create_task(child.wait())
    ended.add_done_callback(wake)
    try:
        await fut
    finally:
        loop.remove_reader(ready.fileno())
        if not ended.done():
            ended.cancel()
    try:
        return bool(ready.poll() and ready.recv_bytes() == b"\0")
    except (EOFError, OSError):
        return False


async def afork(child_func: Callable[[], int], *, mp_context: MPContext | None = None) -> AbstractChildProcess:
    """Run *child_func* in a new process and return when that process is up.

    The child has its ``SIGINT`` and ``SIGTERM`` dispositions reset by then (``KeyboardInterrupt`` and the default),
    so a signal sent right after the return finds it in a defined state.  It has no event loop.  It ends when this
    process ends, in whatever way, and may have children of its own.

    Its exit code is the int that *child_func* returns (modulo 256); 1 after an uncaught exception, whose traceback
    goes to stderr, or a result that is no int; 254 after ``KeyboardInterrupt``; 241 after ``SystemExit``.  Output is
    flushed, multiprocessing's own clean-up is done, and no ``atexit`` handler runs.

    :param child_func: called without arguments; must be picklable unless the start method is ``fork``.
    :param mp_context: the multiprocessing context; default: ``multiprocessing.get_context()``.
    :returns: the child, an :class:`AbstractChildProcess`.
    :raises ChildProcessError: the child ended before it was up; the exit code is in the message and its ``exitcode``.
    :raises NotImplementedError: on Windows.

    A call that is cancelled kills the child and waits for its end first.
    """
    if sys.platform == "win32":
        raise NotImplementedError("afork() does not run on Windows: it needs the signals of POSIX systems")
    return await start_child(child_func, mp_context=mp_context)
