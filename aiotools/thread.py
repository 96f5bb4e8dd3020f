"""An event loop in a thread of its own, for programs that are not asynchronous themselves.

::

    with LoopThread(name="io") as io:
        page = io.run(fetch(url), timeout=10)
        future = io.submit(fetch(other))    # a concurrent.futures.Future
        ...
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import concurrent.futures
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

__all__ = ("LoopThread",)

_T = TypeVar("_T")
_P = ParamSpec("_P")

log = logging.getLogger(__name__)

# How long run() stays, after its timeout, for the coroutine that it cancelled to end.
_CANCEL_GRACE = 1.0


class _Thread(threading.Thread):
    """The thread of a LoopThread; tells it from others in threading.enumerate()."""

    def __init__(self, owner: LoopThread, name: str | None, daemon: bool) -> None:
        super().__init__(name=name, daemon=daemon or not _ends_before_joining)
        self.owner = owner
        self.asked_daemon = daemon

    def run(self) -> None:
        self.owner._run_loop()


def _stop_all_at_exit(*, join: bool = False) -> None:
    threads = [thread for thread in threading.enumerate() if isinstance(thread, _Thread)]
    for thread in threads:
        thread.owner._at_exit = True
        thread.owner._request_stop(drain=False)
    for thread in threads:
        if join and not thread.asked_daemon:
            thread.join()


def _hook_exit() -> bool:
    """See to it that loops are stopped at exit; whether that comes before threading joins their threads.

    threading joins all threads that are no daemons before atexit's functions run, so a loop that runs on would hang the
    interpreter's exit. It has a hook of its own, from which concurrent.futures stops its threads; the hook is private, so
    one day it may be gone. Then the threads are daemons, and atexit joins those that were not meant to be.
    """
    register = getattr(threading, "_register_atexit", None)
    if register is None:
        atexit.register(_stop_all_at_exit, join=True)
        return False
    try:
        register(_stop_all_at_exit)
    except RuntimeError:
        # It refuses at exit itself; then no thread can be started any more.
        pass
    return True


_ends_before_joining = _hook_exit()


class _Future(concurrent.futures.Future[_T]):
    """A future whose exception does not go unnoticed, and that its own loop cannot wait for."""

    def __init__(self, owner: LoopThread) -> None:
        super().__init__()
        self._owner = owner
        self._picked_up = False
        # Set when the work has really ended, which for a cancelled future is later than done().
        self._work_ended: threading.Event | None = None

    def result(self, timeout: float | None = None) -> _T:
        """As in concurrent.futures; RuntimeError where the loop would wait for itself."""
        try:
            return cast(_T, self._pick_up(super().result, timeout))
        finally:
            # Breaks the cycle through the traceback of what is raised; also below.
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As in concurrent.futures; RuntimeError as for result()."""
        try:
            return cast(BaseException | None, self._pick_up(super().exception, timeout))
        finally:
            del self

    def _get_snapshot(self) -> Any:
        # asyncio.wrap_future() reads the future through this where concurrent.futures has it.
        snapshot = super()._get_snapshot()  # type: ignore[misc]
        self._picked_up = self._picked_up or self.done()
        return snapshot

    def _pick_up(self, get: Callable[[float | None], Any], timeout: float | None) -> Any:
        try:
            if not self.done():
                self._owner._check_process()
                self._owner._refuse_in_own_thread("waiting for a future")
            value = get(timeout)
        except TimeoutError as exc:
            # The work's own, or that of waiting for it?
            if self.done() and not self.cancelled() and super().exception() is exc:
                self._picked_up = True
            raise
        except BaseException:
            self._picked_up = self.done()
            raise
        else:
            self._picked_up = True
            return value
        finally:
            del self, get

    def __del__(self) -> None:
        if not self._picked_up and self.done() and not self.cancelled():
            exc = super().exception()
            if exc is not None:
                log.error("nobody picked up the exception of work in %r", self._owner, exc_info=exc)


class _Job:
    """What was submitted and waits for the loop to start it."""

    __slots__ = ("future", "name", "work")

    def __init__(self, work: Any, future: _Future[Any], name: str | None) -> None:
        self.work = work  # a coroutine, or a callable without arguments
        self.future = future
        self.name = name

    def drop(self) -> None:
        """End it without having started it."""
        if asyncio.iscoroutine(self.work):
            self.work.close()
        self.future.cancel()
        self.future.set_running_or_notify_cancel()
        if self.future._work_ended is not None:
            self.future._work_ended.set()


def _new_signal() -> concurrent.futures.Future[None]:
    """A future that is only waited for: whoever waits cannot cancel it."""
    signal: concurrent.futures.Future[None] = concurrent.futures.Future()
    signal.set_running_or_notify_cancel()
    return signal


def _check_timeout(timeout: float | None) -> float | None:
    """What is to be waited for: None for what is longer than a thread can wait, infinity for instance."""
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be None or a number of seconds, not {type(timeout).__name__!r}")
    # The negation is there for NaN.
    if not timeout >= 0:
        raise ValueError(f"timeout must be None or a number of seconds >= 0, not {timeout!r}")
    return timeout if timeout <= threading.TIMEOUT_MAX else None


class LoopThread:
    """An event loop in a thread of its own.

    Parameters:
        name: the name of the thread; by default one that threading makes.
        loop_factory: a callable without arguments that returns a new event loop
            (``uvloop.new_event_loop``, for instance); :func:`asyncio.new_event_loop` by
            default.  It is called in the new thread.
        daemon: whether the interpreter may exit without waiting for the thread.

    Start it with :meth:`start`, a ``with`` block, or, from another event loop and without
    blocking that one, an ``async with`` block.  The end of the block is a :meth:`stop` that
    waits for the work, or, if the block raised, one that cancels it.  Each object can be
    started once.

    All methods may be called from any thread.  Where the loop's own thread would wait for
    itself they raise :exc:`RuntimeError` at once instead; this includes ``result()`` and
    ``exception()`` of a future that :meth:`submit` returned and that is not done.

    No error gets lost.  What a coroutine raises is raised again by :meth:`run` or by the
    future's ``result()``; when such a future goes away and nobody has asked for its exception,
    the exception is logged (logger ``aiotools.thread``).  What a coroutine raises after it was
    cancelled through its future goes to the loop's exception handler.  Work that raises
    :exc:`SystemExit` or :exc:`KeyboardInterrupt` does not end the loop.

    When the interpreter exits, the work of a loop that still runs is cancelled, and its
    clean-up awaited; with *daemon* it is asked to stop, and not waited for.  In a child
    process made by :func:`os.fork` the thread does not exist: all methods that need it
    raise :exc:`RuntimeError`, and stopping does nothing.

    The idea is the event loop thread that programs mixing threads and asyncio write by hand
    around :func:`asyncio.run_coroutine_threadsafe`.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        daemon: bool = False,
    ) -> None:
        if loop_factory is not None and not callable(loop_factory):
            raise TypeError(f"loop_factory must be callable, not {type(loop_factory).__name__!r}")
        self._loop_factory = loop_factory
        self._thread = _Thread(self, name, daemon)
        self._pid: int | None = None
        # Guards the fields down to _jobs. Nothing of the user's runs while it is held.
        self._lock = threading.Lock()
        self._launched = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepting = False
        self._stopping = False
        self._at_exit = False
        self._jobs: collections.deque[_Job] = collections.deque()
        # These belong to the thread of the loop.
        self._work: dict[asyncio.Task[Any], _Future[Any]] = {}
        self._draining = False
        self._delivered: BaseException | None = None
        self._running = _new_signal()
        self._ended = _new_signal()

    def __repr__(self) -> str:
        if not self._launched:
            state = "created"
        elif self._ended.done():
            state = "stopped"
        elif self._stopping:
            state = "stopping"
        elif self._accepting:
            state = "running"
        else:
            state = "starting"
        work = len(self._work) + len(self._jobs)
        return f"<{type(self).__name__} {self.name!r} {state} work={work}>"

    # -- What there is to know about it --

    @property
    def name(self) -> str:
        """The name of the thread."""
        return self._thread.name

    @property
    def daemon(self) -> bool:
        """Whether the interpreter may exit without waiting for the thread."""
        return self._thread.asked_daemon

    @property
    def ident(self) -> int | None:
        """The thread's :func:`threading.get_ident`; ``None`` before the start."""
        return self._thread.ident

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop.

        Raises:
            RuntimeError: it does not run (not yet, or no longer).
        """
        loop = self._loop
        if loop is None:
            raise RuntimeError(f"{self!r} has no running loop")
        return loop

    def is_running(self) -> bool:
        """Whether the loop runs and accepts work."""
        return self._accepting and not self._is_forked()

    # -- Starting --

    def start(self) -> Self:
        """Start the thread; return when the loop runs.

        Returns:
            the object itself.

        Raises:
            RuntimeError: it was started before, or it was stopped while it started.
            BaseException: what *loop_factory* raised.
        """
        self._launch()
        try:
            self._running.result()
        except BaseException:
            # The loop could not be made, or the wait was interrupted.
            self._request_stop(drain=False)
            self._thread.join()
            raise
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop(drain=exc_type is None)

    async def __aenter__(self) -> Self:
        self._launch()
        try:
            await asyncio.wrap_future(self._running)
        except BaseException:
            await self.astop(drain=False)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.astop(drain=exc_type is None)

    def _launch(self) -> None:
        self._check_process()
        with self._lock:
            if self._launched:
                raise RuntimeError(f"{self!r} can be started only once")
            self._launched = True
            self._pid = os.getpid()
        try:
            self._thread.start()
        except BaseException:
            self._launched = False
            raise

    # -- Work --

    def submit(
        self,
        coro: Coroutine[Any, Any, _T],
        *,
        name: str | None = None,
    ) -> concurrent.futures.Future[_T]:
        """Run a coroutine in the loop, as a task, with a copy of the caller's context.

        Parameters:
            coro: the coroutine.
            name: the name of the task.

        Returns:
            a :class:`concurrent.futures.Future` with its result or exception.  Cancelling
            the future cancels the coroutine.

        Raises:
            TypeError: *coro* is not a coroutine.
            RuntimeError: the loop does not run, or is being stopped; *coro* is closed then.
        """
        if not asyncio.iscoroutine(coro):
            raise TypeError(f"submit() needs a coroutine, not {type(coro).__name__!r}")
        future: _Future[_T] = _Future(self)
        self._enqueue(_Job(coro, future, name))
        return future

    def run(self, coro: Coroutine[Any, Any, _T], timeout: float | None = None) -> _T:
        """Run a coroutine in the loop, and wait for its result.

        Parameters:
            coro: the coroutine.
            timeout: how many seconds to wait at most; ``None``: without limit.

        Returns:
            what the coroutine returns.

        Raises:
            TimeoutError: the time was up.  The coroutine was cancelled, and has ended, if
                it could do so within another second.
            TypeError: *coro* is not a coroutine.
            RuntimeError: the loop does not run, or is being stopped, or this is its own
                thread; *coro* is closed then.
            BaseException: what the coroutine raised.

        When waiting is interrupted (:exc:`KeyboardInterrupt`) the coroutine is cancelled too.
        """
        if not asyncio.iscoroutine(coro):
            raise TypeError(f"run() needs a coroutine, not {type(coro).__name__!r}")
        try:
            timeout = _check_timeout(timeout)
            self._refuse_in_own_thread("run()")
        except BaseException:
            coro.close()
            raise
        future: _Future[_T] = _Future(self)
        future._work_ended = threading.Event()
        self._enqueue(_Job(coro, future, None))
        try:
            return future.result(timeout)
        except BaseException as exc:
            if future.cancel():
                # Either the work was cancelled, or it is now; then only its end is to come.
                if not future._work_ended.wait(_CANCEL_GRACE):
                    log.warning("%r: a coroutine goes on after it was cancelled by a timeout of run()", self)
                if type(exc) is TimeoutError:
                    raise TimeoutError(f"the coroutine did not end within {timeout} seconds") from None
            elif type(exc) is TimeoutError and not future._picked_up:
                # It ended at the last moment.
                return future.result()
            raise
        finally:
            # Breaks the cycle through the traceback of what is raised.
            del future

    def call(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function in the thread of the loop, and wait for its result.

        Parameters:
            fn: an ordinary function.  It must be quick: the loop stands still meanwhile.
            args, kwargs: its arguments.

        Returns:
            what the function returns.

        Raises:
            TypeError: *fn* is not callable, or is a coroutine function (see :meth:`run`).
            RuntimeError: the loop does not run, or is being stopped, or this is its own thread.
            BaseException: what the function raised.
        """
        if not callable(fn):
            raise TypeError(f"call() needs a callable, not {type(fn).__name__!r}")
        if inspect.iscoroutinefunction(fn):
            raise TypeError("call() is for ordinary functions; give the coroutine to run()")
        self._refuse_in_own_thread("call()")
        future: _Future[_T] = _Future(self)
        self._enqueue(_Job(functools.partial(fn, *args, **kwargs), future, None))
        try:
            return future.result()
        finally:
            # If the wait was interrupted.
            future.cancel()
            del future

    def _enqueue(self, job: _Job) -> None:
        try:
            self._check_process()
            with self._lock:
                if not self._accepting:
                    raise RuntimeError(f"{self!r} does not accept work")
                assert self._loop is not None
                # Under the lock: jobs start in the order of the queue, and before a later stop.
                self._jobs.append(job)
                try:
                    self._loop.call_soon_threadsafe(self._start_next_job)
                except BaseException:
                    self._jobs.pop()
                    raise
        except BaseException:
            if asyncio.iscoroutine(job.work):
                job.work.close()
            raise

    def _start_next_job(self) -> None:
        job = self._jobs.popleft()
        try:
            if self._loop is None or job.future.cancelled():
                job.drop()
            elif asyncio.iscoroutine(job.work):
                self._start_task(self._loop, job)
            elif job.future.set_running_or_notify_cancel():
                try:
                    result = job.work()
                except BaseException as exc:
                    job.future.set_exception(exc)
                else:
                    job.future.set_result(result)
        finally:
            # The traceback of an eager task's exception refers to this frame.
            del job

    def _start_task(self, loop: asyncio.AbstractEventLoop, job: _Job) -> None:
        try:
            task = loop.create_task(job.work, name=job.name)
        except BaseException as exc:
            # A task factory may refuse.
            job.work.close()
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(exc)
            if job.future._work_ended is not None:
                job.future._work_ended.set()
        else:
            self._work[task] = job.future
            job.future.add_done_callback(functools.partial(self._future_done, task))
            task.add_done_callback(self._task_done)
            del task
        finally:
            del job

    def _future_done(self, task: asyncio.Task[Any], future: concurrent.futures.Future[Any]) -> None:
        """Called in any thread."""
        if future.cancelled() and not task.done():
            loop = self._loop
            try:
                if loop is not None:
                    loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:
                pass  # the loop was closed just now, which cancelled the task as well

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        future = self._work.pop(task)
        exc = None
        if task.cancelled():
            future.cancel()
            future.set_running_or_notify_cancel()
        elif future.set_running_or_notify_cancel():
            exc = task.exception()
            if exc is not None:
                if isinstance(exc, (SystemExit, KeyboardInterrupt)):
                    self._delivered = exc
                    task.get_loop().call_soon(self._forget_delivered)
                future.set_exception(exc)
            else:
                future.set_result(task.result())
        elif (exc := task.exception()) is not None:
            task.get_loop().call_exception_handler(
                {
                    "message": "work that was cancelled failed afterwards",
                    "exception": exc,
                    "task": task,
                }
            )
        if future._work_ended is not None:
            future._work_ended.set()
        if self._draining and not self._work:
            task.get_loop().stop()

    def _forget_delivered(self) -> None:
        self._delivered = None

    # -- Stopping --

    def stop(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Stop accepting work, end the loop, and join the thread.

        Parameters:
            drain: wait for the work that was accepted.  If false, cancel it at once.
            timeout: how many seconds to wait for it, before the rest of it is cancelled;
                ``None``: without limit.

        Then all tasks of the loop are cancelled and awaited, its asynchronous generators and
        its default executor shut down, the loop closed, and the thread joined.  Stopping what
        does not run does nothing.  A second call, from another thread, can shorten the wait of
        the first, not lengthen it.

        Raises:
            RuntimeError: this is the thread of the loop.
            ValueError: *timeout* is negative.
        """
        timeout = _check_timeout(timeout)
        self._refuse_in_own_thread("stop()")
        if self._request_stop(drain=drain, timeout=timeout):
            self._thread.join()

    async def astop(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """As :meth:`stop`, from another event loop, which goes on running meanwhile.

        If the caller is cancelled, the work is cancelled at once; the caller's
        :exc:`~asyncio.CancelledError` is raised when the thread has ended.
        """
        timeout = _check_timeout(timeout)
        self._refuse_in_own_thread("astop()")
        if not self._request_stop(drain=drain, timeout=timeout):
            return
        cancelled: BaseException | None = None
        while not self._ended.done():
            try:
                await asyncio.wrap_future(self._ended)
            except asyncio.CancelledError as exc:
                cancelled = exc
                self._request_stop(drain=False)
        self._thread.join()
        if cancelled is not None:
            try:
                raise cancelled
            finally:
                del cancelled

    def _request_stop(self, *, drain: bool, timeout: float | None = None) -> bool:
        """Say that it has to stop; whether there is a thread to join."""
        if self._is_forked():
            # The lock may have been held when the process was forked.
            return False
        with self._lock:
            if not self._launched:
                return False
            self._stopping = True
            self._accepting = False
            if self._loop is not None:
                try:
                    self._loop.call_soon_threadsafe(self._begin_stop, drain, timeout)
                except RuntimeError:
                    pass  # it is closed
        return True

    def _begin_stop(self, drain: bool, timeout: float | None) -> None:
        loop = asyncio.get_running_loop()
        if not drain or not self._work:
            loop.stop()
            return
        self._draining = True
        if timeout is not None:
            loop.call_later(timeout, loop.stop)

    # -- The thread --

    def _run_loop(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._loop_factory) as runner:
                loop = runner.get_loop()
                # Not before all is well: then start() returns.
                loop.call_soon(self._announce, loop)
                try:
                    self._run_until_stopped(loop)
                finally:
                    with self._lock:
                        self._accepting = False
                        self._stopping = True
        except BaseException as exc:
            if not self._running.done():
                self._running.set_exception(exc)
            elif self._at_exit and "can't create new thread" in str(exc):
                # Python 3.12 cannot start the thread that asyncio shuts the executor down with.
                # The interpreter joins the executor's threads then.
                pass
            else:
                log.exception("%r: the loop failed", self)
        finally:
            with self._lock:
                self._accepting = False
                self._stopping = True
                self._loop = None
            while self._jobs:
                self._jobs.popleft().drop()
            # Only a loop that failed leaves any.
            for future in self._work.values():
                future.cancel()
                future.set_running_or_notify_cancel()
                if future._work_ended is not None:
                    future._work_ended.set()
            self._work.clear()
            self._ended.set_result(None)

    def _announce(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if not self._stopping:
                self._loop = loop
                self._accepting = True
        if self._accepting:
            self._running.set_result(None)
        else:
            self._running.set_exception(RuntimeError(f"{self!r} was stopped while it started"))
            loop.stop()

    def _run_until_stopped(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as exc:
                # A task's goes to the task and out of the loop, before the task's callbacks
                # (asyncio) or after them (uvloop).
                if exc is not self._delivered and not any(
                    task.done() and not task.cancelled() and task.exception() is exc for task in self._work
                ):
                    log.exception("%r: the loop goes on", self)
            else:
                return

    # -- Checks --

    def _is_forked(self) -> bool:
        return self._pid is not None and self._pid != os.getpid()

    def _check_process(self) -> None:
        if self._is_forked():
            raise RuntimeError(f"{self!r} belongs to the parent process: a thread does not survive os.fork()")

    def _refuse_in_own_thread(self, what: str) -> None:
        if threading.get_ident() == self._thread.ident and not self._ended.done():
            raise RuntimeError(f"{what} in the thread of {self!r} would wait for itself for ever")
