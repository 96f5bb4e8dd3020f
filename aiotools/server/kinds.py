"""How a child of each kind is started, told and awaited: one interface for three kinds.

A handle has ``pid``, ``wait()`` (exit code, or minus a signal's number), ``send_signal()``, ``tell()`` (the
same without complaint) and ``kill()``.  A process is an :mod:`aiotools.fork` child.  A thread has no signals and cannot be killed:
its handle ignores the first (the channel says the same) and gives it up on the second.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from ..fork import print_exception, start_child
from .worker import WorkerSpec, blocked_at_start, run_child

__all__ = ("InterpreterHandle", "ThreadHandle", "start_process", "start_thread")

log = logging.getLogger(__package__)

#: What wait() returns for a thread that had to be given up; no exit code or signal has this number.
ABANDONED = -1000


async def start_process(spec: WorkerSpec, mp_context: Any) -> Any:
    """Start a process with *mp_context*; it is up (but not ready) on return."""
    name = f"{spec.role}-{spec.index}"
    try:
        return await start_child(
            functools.partial(run_child, spec),
            mp_context=mp_context,
            block=blocked_at_start(spec.stop_signals, spec.managed),
            name=name,
        )
    except (pickle.PicklingError, AttributeError, TypeError) as exc:
        # The latter two are what pickle says of local objects and of those that have no way to be pickled.
        if "pickle" in str(exc) or "local object" in str(exc):
            exc.add_note(
                f"The {spec.role}, its arguments and all else that it is given must be picklable for a process that is "
                "not forked from this one: define functions at the top of a module, or name the "
                f"{spec.role} as 'package.module:{spec.role}'."
            )
        raise


class ThreadHandle:
    """A worker in a thread of this process, with a loop of its own."""

    def __init__(self, spec: WorkerSpec, body: Callable[[], int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._body = body
        self.core_dumped = None
        # A thread that hangs must not keep the interpreter from ending.
        self.thread = threading.Thread(
            # In an empty context: what the main context has set is not the worker's.
            target=functools.partial(contextvars.Context().run, self._run),
            name=f"{spec.role}-{spec.index}",
            daemon=True,
        )
        self.thread.start()

    @property
    def pid(self) -> int:
        return os.getpid()

    def _run(self) -> None:
        code = 1
        try:
            code = int(self._body()) & 0xFF
        except SystemExit:
            code = 241
        except KeyboardInterrupt:
            code = 254
        except BaseException:
            print_exception()
        try:
            self._loop.call_soon_threadsafe(self._set, code)
        except RuntimeError:
            pass  # given up, and the parent's loop is closed

    def _set(self, code: int) -> None:
        if not self._exited.done():
            if code != ABANDONED:
                self.thread.join()
            self._exited.set_result(code)

    async def wait(self) -> int:
        return await asyncio.shield(self._exited)

    def send_signal(self, signum: int) -> None:
        pass

    tell = send_signal

    def kill(self) -> None:
        """Give the thread up: it goes on, but nobody waits for it."""
        if not self._exited.done():
            log.error("Thread %s does not end and cannot be killed; it is given up", self.thread.name)
            self._set(ABANDONED)

    def stack(self) -> str:
        """The Python stack of the thread, as text."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        if frame is None:
            return ""
        return "".join(traceback.format_stack(frame))


def start_thread(spec: WorkerSpec) -> ThreadHandle:
    return ThreadHandle(spec, functools.partial(run_child, spec))


class InterpreterHandle(ThreadHandle):
    """A worker in an interpreter of its own (3.14+), which has its own GIL."""

    def __init__(self, spec: WorkerSpec) -> None:
        try:
            from concurrent import interpreters  # type: ignore[attr-defined]
        except ImportError:
            raise NotImplementedError("worker_kind='interpreter' needs Python 3.14") from None
        import dataclasses

        # A socket cannot be pickled for another interpreter, but its descriptor is good in the whole
        # process; the channel's end changes hands.
        fds = [os.dup(s.fileno()) for s in spec.sockets]
        channel = spec.channel.detach()
        dump = -1 if spec.dump is None else os.dup(spec.dump.fileno())
        if dump >= 0:
            os.set_blocking(dump, False)  # nobody may read it any more
        try:
            # The channel and the sockets travel beside it.
            bare = dataclasses.replace(spec, channel=None, sockets=(), dump=None)  # type: ignore[arg-type]
            payload = pickle.dumps(bare)
        except BaseException:
            for fd in (channel, *fds, *([dump] if dump >= 0 else [])):
                os.close(fd)
            raise
        interp = interpreters.create()

        def body() -> int:
            try:
                interp.exec(f"import sys; sys.path[:] = {sys.path!r}")
                return int(interp.call(_interpreter_main, payload, channel, fds, dump))
            finally:
                interp.close()

        super().__init__(spec, body)


def _interpreter_main(payload: bytes, channel: int, fds: list[int], dump: int) -> int:
    import socket

    spec = pickle.loads(payload)
    spec.channel = socket.socket(fileno=channel)
    spec.sockets = [socket.socket(fileno=fd) for fd in fds]
    if dump >= 0:
        spec.dump = open(dump, "wb", buffering=0)  # noqa: SIM115
    try:
        return run_child(spec)
    except BaseException:
        print_exception()
        return 1
    finally:
        if dump >= 0:
            spec.dump.close()
