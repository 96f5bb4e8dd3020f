"""Noticing that an event loop does not turn, and finding out why."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import io
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from types import TracebackType
from typing import IO, Any, Self

from ._aiotools import _Watchdog

__all__ = ("LoopStats", "LoopWatchdog")

log = logging.getLogger(__name__)

_ASK_HANG = 2
#: Frames of the loop's thread that tell where it is.
_WHERE_FRAMES = 3

#: The threads of these must have ended before the interpreter does. One function for all of them: without the GIL,
#: atexit.register() and unregister() are not to be called by several threads at once (CPython 3.13).
_running: set[_Watchdog] = set()


@atexit.register
def _stop_all_at_exit() -> None:
    for core in _running.copy():
        core.stop()


@dataclasses.dataclass(frozen=True)
class LoopStats:
    """What a :class:`LoopWatchdog` has seen.

    :ivar beats: how many beats there were.
    :ivar longest: the longest time by which one was late, in seconds: the loop did not turn for at least that long.
    :ivar longest_where: what the loop's thread was at then, innermost call last, or None (not known, or shorter than
        *slow*).
    :ivar longest_at: when that ended (:func:`time.time`), or None.
    :ivar stalls: how many beats were late by *slow* seconds or more.
    :ivar since_beat: seconds since the last beat.
    :ivar histogram: pairs of an upper bound in seconds and how many beats were late by less than it (and not less than
        the bound before); the last bound is infinite.
    """

    beats: int
    longest: float
    longest_where: str | None
    longest_at: float | None
    stalls: int
    since_beat: float
    histogram: tuple[tuple[float, int], ...]


class _StackSignal:
    """faulthandler's registration of one signal, which is the process's: the file of the watchdog started last counts."""

    def __init__(self) -> None:
        self._files: list[int] = []
        self._lock = threading.Lock()

    def add(self, signum: int, fd: int) -> bool:
        try:
            import faulthandler
        except ImportError:  # in a subinterpreter
            return False
        if not hasattr(faulthandler, "register"):  # Windows
            return False
        with self._lock:
            if not self._files and signal.getsignal(signum) is not signal.SIG_DFL:
                return False  # the program has a use for it
            faulthandler.register(signum, file=fd, all_threads=True)
            self._files.append(fd)
        return True

    def remove(self, signum: int, fd: int) -> None:
        import faulthandler

        with self._lock:
            self._files.remove(fd)
            if self._files:
                faulthandler.register(signum, file=self._files[-1], all_threads=True)
            else:
                faulthandler.unregister(signum)


#: As the registration belongs to the process, so does the account of it.
_stack_signal = _StackSignal()
_STACK_SIGNUM = int(getattr(signal, "SIGRTMAX", 0) or getattr(signal, "SIGUSR2", 0))


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be more than 0 seconds and finite, not {value!r}")
    return float(value)


def _write_all(fd: int, text: str) -> None:
    """Write *text* past all buffers and locks; a reader that does not keep up loses the rest."""
    data = text.encode(errors="backslashreplace")
    tries = 20
    while data and tries:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            tries -= 1
            time.sleep(0.01)
        except OSError:
            return


class LoopWatchdog:
    """Watches an event loop from a thread that needs no GIL: how long it does not turn, and where.

    ::

        async def main():
            with LoopWatchdog(hang_timeout=10) as watchdog:
                ...
                print(watchdog.stats())

    The loop beats every *interval* seconds, from a timer.  A beat that is late by *slow* seconds or more is a stall:
    it is logged (logger ``aiotools.watchdog``) when it is over, with what the loop's thread was at.  One that is late by
    *hang_timeout* is a hang: while it lasts the stacks of all threads and of all tasks of the loop are written to *file*.
    Finding these out takes the GIL.  When it cannot be had within a second because native code holds it, a line says so
    instead, and :mod:`faulthandler` writes the stacks of the threads, which needs none.

    Works on every loop (it uses ``call_later`` only), on free-threaded builds and in subinterpreters (there without
    faulthandler).  The time in which the loop is not running, or the whole process is stopped, does not count.

    :param interval: seconds between two beats.
    :param slow: seconds from which on a late beat is a stall.
    :param hang_timeout: seconds from which on it is a hang; ``None``: there are only stalls.
    :param file: where the evidence of a hang goes: a descriptor, or an object with ``fileno()``; default: the real
        standard error.  It must stay open until :meth:`stop`.
    :param signum: the signal that makes faulthandler write the stacks.  Default: the last real-time signal (``SIGUSR2``
        where there are none), if the program has no handler for it; 0: none.
    :raises TypeError, ValueError: at the call, for a parameter that cannot be.

    Belongs to the thread of its loop, but :meth:`stats` may be called in any.  The watchdog of Node.js (blocked-at) and
    BlockedThreadChecker of Vert.x have the same purpose.
    """

    def __init__(
        self,
        *,
        interval: float = 0.1,
        slow: float = 0.5,
        hang_timeout: float | None = None,
        file: int | IO[Any] | None = None,
        signum: int | None = None,
        _page: Any = None,
        _registered: bool = False,
    ) -> None:
        self._interval = _seconds("interval", interval)
        slow = _seconds("slow", slow)
        hang = 0.0 if hang_timeout is None else _seconds("hang_timeout", hang_timeout)
        self._hang_timeout = hang_timeout
        if file is None:
            fd = 2
        elif isinstance(file, int):
            fd = file
        else:
            fd = file.fileno()
        self._fd = fd
        self._signum = _STACK_SIGNUM if signum is None else int(signum)
        if self._signum and self._signum not in signal.valid_signals():
            raise ValueError(f"signum must be the number of a signal or 0, not {signum!r}")
        self._registered = _registered  # by somebody else
        self._page = _page
        self._slow = slow
        self._hang = hang
        self._core: Any = None
        self._added = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._thread = 0
        self._where: str | None = None
        self._hung = False
        self._longest = 0.0
        self._longest_where: str | None = None
        self._longest_at: float | None = None

    def __repr__(self) -> str:
        state = "running" if self._handle is not None else "stopped" if self._core is not None else "new"
        return f"<LoopWatchdog {state} interval={self._interval:g} hang_timeout={self._hang_timeout}>"

    def start(self) -> Self:
        """Start watching the running loop; returns self.

        :raises RuntimeError: no loop is running, or it was started before.
        """
        loop = asyncio.get_running_loop()
        if self._core is not None:
            raise RuntimeError("a LoopWatchdog can be started only once")
        report = weakref.WeakMethod(self._report)

        def call_report(what: int, age: float) -> bool:
            method = report()
            return method is not None and method(what, age)

        self._added = (
            self._hang > 0 and self._signum > 0 and not self._registered and _stack_signal.add(self._signum, self._fd)
        )
        signum = self._signum if self._added or self._registered else 0
        try:
            core = _Watchdog(call_report, self._interval, self._slow, self._hang, self._fd, signum, self._page)
            self._loop = loop
            self._thread = threading.get_ident()
            core.start()
        except BaseException:
            self._remove_signal()
            raise
        self._core = core
        _running.add(core)
        self._handle = loop.call_later(self._interval, self._beat)
        return self

    def stop(self) -> None:
        """Stop watching; what :meth:`stats` tells stays.  Does nothing the second time."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._core is not None:
            self._core.stop()
            _running.discard(self._core)
        self._remove_signal()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, typ: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stats(self) -> LoopStats:
        """What has been seen so far; callable in any thread, also after :meth:`stop`."""
        if self._core is None:
            return LoopStats(0, 0.0, None, None, 0, 0.0, ())
        beats, longest, stalls, age, counts = self._core.read()
        bounds = [*(0.001 * 2**i for i in range(len(counts) - 1)), math.inf]
        return LoopStats(
            beats,
            longest,
            self._longest_where,
            self._longest_at,
            stalls,
            age,
            tuple(zip(bounds, counts, strict=True)),
        )

    # In the loop

    def _beat(self) -> None:
        if self._handle is None or self._loop is None:
            return  # stopped in this very turn
        late = self._core.beat()
        if late is not None:
            self._stalled(late)
        self._handle = self._loop.call_later(self._interval, self._beat)

    def _stalled(self, late: float) -> None:
        where, self._where = self._where, None
        hung, self._hung = self._hung, False
        if late > self._longest:
            self._longest, self._longest_where, self._longest_at = late, where, time.time()
        log.warning(
            "The event loop did not turn for %.2f s%s%s",
            late,
            " (its stacks were written)" if hung else "",
            f"; it was at: {where}" if where else "",
        )

    # In the scribe's thread

    def _report(self, what: int, age: float) -> bool:
        """Find out what the loop is at; False if it is not running.  Nothing here waits for a lock of the program."""
        loop = self._loop
        if loop is None or not loop.is_running():
            return False
        frame = sys._current_frames().get(self._thread)
        if frame is not None:
            stack = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=_WHERE_FRAMES, lookup_lines=False)
            self._where = " < ".join(f"{f.name} ({f.filename}:{f.lineno})" for f in stack)
        del frame
        if what & _ASK_HANG:
            self._hung = True
            _write_all(self._fd, f"The event loop has not turned for {age:.1f} s.\n{self._threads()}{self._tasks()}")
        return True

    def _threads(self) -> str:
        names = {t.ident: t.name for t in list(threading._active.values())}  # type: ignore[attr-defined]
        own = threading.get_ident()
        parts = []
        for ident, frame in sys._current_frames().items():
            if ident != own:
                mark = ", the event loop's" if ident == self._thread else ""
                parts.append(f"Thread {names.get(ident, '?')} ({ident:#x}{mark}), most recent call last:\n")
                parts += traceback.format_stack(frame)
        return "".join(parts)

    def _tasks(self) -> str:
        tasks = sorted(asyncio.all_tasks(self._loop), key=lambda task: task.get_name())
        running = asyncio.current_task(self._loop)
        out = io.StringIO()
        out.write(f"{len(tasks)} tasks of the event loop:\n")
        for task in tasks:
            if task is running:
                out.write("Running now: ")
            try:
                task.print_stack(file=out)
            except Exception as exc:
                out.write(f"(no stack: {exc!r})\n")
        return out.getvalue()

    def _remove_signal(self) -> None:
        if self._added:
            self._added = False
            _stack_signal.remove(self._signum, self._fd)
