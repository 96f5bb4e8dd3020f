"""Barriers: tasks, and processes, that wait for each other."""

from __future__ import annotations

import asyncio
import contextlib
import math
import mmap
import multiprocessing.util
import os
import select
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from multiprocessing import context, reduction
from types import TracebackType
from typing import Any, Final

from ._aiotools import Barrier

AsyncBarrier = Barrier

__all__ = ("AsyncBarrier", "Barrier", "ProcessBarrier")

# How often those who wait look whether all others live; how long the lock may be held until its holder counts as dead.
_WATCH: Final = 0.25
_LOCK_TIMEOUT: Final = 0.8
_RETRY: Final = 0.001

# The shared page: a head, a slot for each party, and the processes that were given the barrier.
_HEAD: Final = struct.Struct("=QQQQ")  # generation, why it is broken, its pid, parties
_SLOT: Final = struct.Struct("=QQ")  # pid (0: free), generation that it is in
_PEER: Final = struct.Struct("=Q")
_N_PEERS: Final = 1024

_FINE, _ABORTED, _RESET, _TIMED_OUT, _DIED, _LOCK_LOST = range(6)


class ProcessBarrier:
    """A barrier for *parties* processes or threads of one machine, awaited without blocking any event loop.

    Create it in the parent, hand it down as an argument of ``multiprocessing.Process`` (any start method; of
    threads too), and await it in each party, in its own loop::

        async def worker(barrier):
            await prepare()
            await barrier.wait()        # the workers start in step
            await serve()

    As :class:`Barrier` it can be used again and again; ``async with`` waits on entry. A process that was given the
    barrier and dies, whether it waits or was still to come, breaks it for those who wait within a second, unless enough
    others are left to make up the number. A process counts as given the barrier when it is started by
    ``multiprocessing`` with it, or waits in it; the one that made it only when it waits.

    *timeout* is how many seconds :meth:`wait` waits at most, None for ever; then the barrier is broken for all.

    Raises TypeError or ValueError for wrong arguments, RuntimeError where there is no ``loop.add_reader()`` (Windows).
    It keeps a page of memory in an unnamed file and nine descriptors; :meth:`close` or the collector frees them.
    """

    def __init__(self, parties: int, *, timeout: float | None = None) -> None:
        if not isinstance(parties, int):
            raise TypeError(f"parties must be an integer, not {type(parties).__name__!r}")
        if parties < 1:
            raise ValueError(f"parties must be > 0, not {parties}")
        if not hasattr(os, "set_blocking") or os.name == "nt":
            raise RuntimeError("ProcessBarrier needs pipes that an event loop can watch, which Windows has not")
        timeout = _checked_timeout(timeout)
        fds: list[int] = []
        try:
            with tempfile.TemporaryFile(prefix="aiotools-barrier-") as file:
                file.truncate(_HEAD.size + parties * _SLOT.size + _N_PEERS * _PEER.size)
                fds.append(os.dup(file.fileno()))
            # The lock: who has the byte has it. The gates of even and odd generations, and that of the broken barrier:
            # they are open when there is a byte in them, which nobody takes until all are through.
            for _ in range(4):
                fds.extend(os.pipe())
            for fd in fds[1:]:
                os.set_blocking(fd, False)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self._set_up(parties, timeout, fds)
        _HEAD.pack_into(self._page, 0, 0, _FINE, 0, parties)
        os.write(self._lock_w, b"x")

    def _set_up(self, parties: int, timeout: float, fds: list[int]) -> None:
        self._parties = parties
        self._timeout = timeout
        self._fds = fds
        self._page = mmap.mmap(fds[0], 0)
        self._lock_r, self._lock_w = fds[1:3]
        self._gates = ((fds[3], fds[4]), (fds[5], fds[6]))
        self._broken_r, self._broken_w = fds[7:9]
        # In a child that multiprocessing forked.
        multiprocessing.util.register_after_fork(self, ProcessBarrier._register)

    # -- handing down ------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        context.assert_spawning(self)
        self._check_open()
        return _rebuild, (self._parties, self._timeout, [reduction.DupFd(fd) for fd in self._fds])

    def _register(self) -> None:
        """This process is one of those whose death matters."""
        if not self._fds:
            return
        with self._locked(_LOCK_TIMEOUT):
            self._add_peer(os.getpid())

    def _add_peer(self, pid: int) -> None:
        free = None
        for place, peer in self._peers():
            if peer == pid:
                return
            if not peer and free is None:
                free = place
        if free is None:
            raise RuntimeError(f"a ProcessBarrier is for at most {_N_PEERS} processes")
        _PEER.pack_into(self._page, free, pid)

    def close(self) -> None:
        """Free the descriptors and the memory of this process. The others can go on. Idempotent."""
        fds, self._fds = self._fds, []
        if fds:
            self._page.close()
            for fd in fds:
                os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fds", None):
            self.close()

    def _check_open(self) -> None:
        if not self._fds:
            raise RuntimeError("the ProcessBarrier is closed")

    # -- the page ----------------------------------------------------------------------------------

    def _head(self) -> tuple[int, int, int]:
        generation, why, pid, _ = _HEAD.unpack_from(self._page, 0)
        return generation, why, pid

    def _set_head(self, generation: int, why: int, pid: int = 0) -> None:
        _HEAD.pack_into(self._page, 0, generation, why, pid, self._parties)

    def _slots(self) -> Iterator[tuple[int, int, int]]:
        """(index, pid, generation) of the slots that are taken."""
        for index in range(self._parties):
            pid, generation = _SLOT.unpack_from(self._page, _HEAD.size + index * _SLOT.size)
            if pid:
                yield index, pid, generation

    def _set_slot(self, index: int, pid: int, generation: int) -> None:
        _SLOT.pack_into(self._page, _HEAD.size + index * _SLOT.size, pid, generation)

    def _peers(self) -> Iterator[tuple[int, int]]:
        """(place, pid, 0 where there is none)"""
        start = _HEAD.size + self._parties * _SLOT.size
        for place in range(start, start + _N_PEERS * _PEER.size, _PEER.size):
            yield place, _PEER.unpack_from(self._page, place)[0]

    # -- the lock: held for some microseconds, never while anything is awaited ---------------------

    def _try_lock(self) -> bool:
        try:
            return bool(os.read(self._lock_r, 1))
        except BlockingIOError:
            return False

    def _unlock(self) -> None:
        os.write(self._lock_w, b"x")

    def _lock_is_lost(self) -> asyncio.BrokenBarrierError:
        """Its holder was killed in the middle. What it left in the page cannot be trusted."""
        self._set_head(self._head()[0], _LOCK_LOST)
        _open_gate(self._broken_w)
        return self._error(_LOCK_LOST, 0)

    @contextlib.contextmanager
    def _locked(self, patience: float) -> Iterator[None]:
        """For what is not in a loop, or is leaving."""
        end = time.monotonic() + patience
        while not self._try_lock():
            if time.monotonic() > end:
                raise self._lock_is_lost()
            time.sleep(0.0001)
        try:
            yield
        finally:
            self._unlock()

    @contextlib.asynccontextmanager
    async def _locked_async(self) -> AsyncIterator[None]:
        end = time.monotonic() + _LOCK_TIMEOUT
        while not self._try_lock():
            if time.monotonic() > end:
                raise self._lock_is_lost()
            await asyncio.sleep(_RETRY)
        try:
            yield
        finally:
            self._unlock()

    # -- waiting -----------------------------------------------------------------------------------

    async def wait(self, timeout: float | None = None) -> int:
        """Wait until all parties have arrived.

        Returns an index from 0 to parties - 1, another one for each party of this generation. *timeout* is in
        seconds, None for the barrier's default.

        Raises asyncio.BrokenBarrierError when the barrier is broken or becomes so: by :meth:`abort`, :meth:`reset`, a
        timeout of anybody (the cause is a TimeoutError) or the death of a process (the cause is a ChildProcessError).
        Cancelled, it leaves, and the others go on waiting.
        """
        limit = self._timeout if timeout is None else _checked_timeout(timeout)
        self._check_open()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        pid = os.getpid()
        index = generation = -1
        with contextlib.ExitStack() as stack:
            while index < 0:
                async with self._locked_async():
                    self._add_peer(pid)
                    index, generation, is_last = self._arrive(pid)
                    if is_last:
                        return index
                    if index >= 0:
                        stack.callback(self._leave, index, pid, generation)
                if index < 0:
                    # Some of the generation before are not out yet.
                    if loop.time() > deadline:
                        raise await self._time_out()
                    await asyncio.sleep(_RETRY)
                    await self._look_after_others()
            await self._wait_for_gate(index, pid, generation, deadline, loop)
        return index

    def _arrive(self, pid: int) -> tuple[int, int, bool]:
        """(index, generation, whether it is the last); index -1: not yet. Under the lock."""
        generation, why, dead = self._head()
        if why:
            raise self._error(why, dead)
        # Those of the generation before are on their way out, through the other gate.
        taken = {index: of for index, _, of in self._slots()}
        index = next((index for index in range(self._parties) if index not in taken), -1)
        if index < 0:
            return index, generation, False
        if sum(of == generation for of in taken.values()) + 1 < self._parties:
            self._set_slot(index, pid, generation)
            return index, generation, False
        # All slots are those of this generation, so nobody needs the gate of the one before any more.
        self._set_head(generation + 1, _FINE)
        _close_gate(self._gates[(generation + 1) % 2][0])
        _open_gate(self._gates[generation % 2][1])
        return index, generation, True

    def _leave(self, index: int, pid: int, generation: int) -> None:
        if not self._fds:
            return
        with contextlib.suppress(asyncio.BrokenBarrierError), self._locked(_LOCK_TIMEOUT):
            # A reset, and who came after it, may have taken the slot.
            if (index, pid, generation) in self._slots():
                self._set_slot(index, 0, 0)

    def _has_passed(self, index: int, pid: int, generation: int) -> bool:
        """Under the lock. Who was released stays so, whatever happens before it has noticed."""
        now, why, dead = self._head()
        if (index, pid, generation) not in self._slots():
            raise self._error(why or _RESET, dead)
        if now == generation and why:
            raise self._error(why, dead)
        return now != generation

    async def _wait_for_gate(
        self, index: int, pid: int, generation: int, deadline: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        opened = loop.create_future()

        def open_() -> None:
            if not opened.done():
                opened.set_result(None)

        with contextlib.ExitStack() as stack:
            for fd in (self._gates[generation % 2][0], self._broken_r):
                # A loop watches a descriptor once only, and there may be other parties in it.
                own = os.dup(fd)
                stack.callback(os.close, own)
                loop.add_reader(own, open_)
                stack.callback(loop.remove_reader, own)
            while True:
                await asyncio.wait([opened], timeout=max(0.0, min(_WATCH, deadline - loop.time())))
                async with self._locked_async():
                    if self._has_passed(index, pid, generation):
                        return
                if loop.time() >= deadline:
                    raise await self._time_out()
                await self._look_after_others()

    # -- breaking ----------------------------------------------------------------------------------

    def _break(self, why: int, pid: int = 0) -> None:
        """Under the lock."""
        generation, before, _ = self._head()
        if not before:
            self._set_head(generation, why, pid)
            _open_gate(self._broken_w)

    async def _time_out(self) -> asyncio.BrokenBarrierError:
        async with self._locked_async():
            self._break(_TIMED_OUT)
            _, why, pid = self._head()
        return self._error(why, pid)

    def _error(self, why: int, pid: int) -> asyncio.BrokenBarrierError:
        error = asyncio.BrokenBarrierError("Abort or reset of barrier" if why <= _RESET else "the barrier is broken")
        if why == _TIMED_OUT:
            error.__cause__ = TimeoutError("the barrier's timeout is over")
        elif why == _DIED:
            error.__cause__ = ChildProcessError(f"the process {pid} died that belongs to the barrier")
        elif why == _LOCK_LOST:
            error.__cause__ = ChildProcessError("a process that belongs to the barrier died while it changed it")
        return error

    async def _look_after_others(self) -> None:
        async with self._locked_async():
            generation, why, _ = self._head()
            if why:
                return
            alive = 0
            missed = 0
            dead = set()
            for place, pid in self._peers():
                if pid and _is_dead(pid):
                    dead.add(pid)
                    missed = pid
                    _PEER.pack_into(self._page, place, 0)
                elif pid:
                    alive += 1
            inside = False
            for index, pid, of in list(self._slots()):
                if pid in dead:
                    self._set_slot(index, 0, 0)
                    inside = inside or of == generation
            if inside or (missed and alive < self._parties):
                self._break(_DIED, missed)

    def abort(self) -> None:
        """Break the barrier: who waits, and who comes, in any process, gets asyncio.BrokenBarrierError."""
        self._check_open()
        with self._locked(_LOCK_TIMEOUT):
            self._break(_ABORTED)

    def reset(self) -> None:
        """Bring the barrier back to its first state; who waits gets asyncio.BrokenBarrierError."""
        self._check_open()
        if self._head()[1] == _LOCK_LOST:
            # Nobody has it any more.
            self._try_lock()
            self._unlock()
        with self._locked(_LOCK_TIMEOUT):
            generation = self._head()[0]
            for index, _, _ in list(self._slots()):
                self._set_slot(index, 0, 0)
            # Who waits wakes up, and finds its slot gone; who comes waits at the other gate.
            self._set_head(generation + 1, _FINE)
            _close_gate(self._broken_r)
            _close_gate(self._gates[(generation + 1) % 2][0])
            _open_gate(self._gates[generation % 2][1])

    @property
    def parties(self) -> int:
        """How many are waited for."""
        return self._parties

    @property
    def n_waiting(self) -> int:
        """How many are waiting now."""
        self._check_open()
        generation, why, _ = self._head()
        return 0 if why else sum(of == generation for _, _, of in self._slots())

    @property
    def broken(self) -> bool:
        """Whether the barrier is broken."""
        self._check_open()
        return bool(self._head()[1])

    async def __aenter__(self) -> int:
        return await self.wait()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def __repr__(self) -> str:
        if not self._fds:
            return f"<{type(self).__name__} closed>"
        state = "broken" if self.broken else f"waiters:{self.n_waiting}/{self._parties}"
        return f"<{type(self).__name__} [{state}]>"


def _rebuild(parties: int, timeout: float, fds: list[Any]) -> ProcessBarrier:
    barrier = ProcessBarrier.__new__(ProcessBarrier)
    barrier._set_up(parties, timeout, [fd.detach() for fd in fds])
    barrier._register()
    return barrier


def _checked_timeout(timeout: float | None) -> float:
    if timeout is None:
        return math.inf
    if not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__!r}")
    if math.isnan(timeout):
        raise ValueError("timeout must be a number of seconds, not NaN")
    return float(timeout)


def _open_gate(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.write(fd, b"x")


def _close_gate(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 4096):
            pass


def _is_dead(pid: int) -> bool:
    """Also of a zombie, which its parent has not asked about yet."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    if hasattr(os, "pidfd_open"):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(0))
        finally:
            os.close(fd)
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except (ChildProcessError, AttributeError):
        return False
