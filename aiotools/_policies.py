"""How children are started and what happens when they fail: limits, time limits, retries, restarts.

Nothing here runs for a child that asks for none of it.
"""

from __future__ import annotations

import asyncio
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ("Gate", "Retry", "Statistics", "child", "start_task")


class Statistics(NamedTuple):
    """What became of a supervisor's children."""

    #: children that are running or waiting to be run again
    active: int
    #: children that have ended, however
    done: int
    #: those of them that ended with an exception
    failed: int
    #: attempts beyond the first of all children
    restarted: int


@dataclass(frozen=True)
class Retry:
    """When to run a failing child again, and when to give up.

    A child that was cancelled is not run again, whatever it does with the cancellation.

    Parameters:
        attempts: how many attempts in all; ``None`` is no limit.
        delay: seconds before the second attempt.
        factor: each further delay is so many times the one before.
        max_delay: seconds that no delay exceeds.
        jitter: the part of each delay that is left to chance, from 0 to 1.
        within: seconds; an attempt that ran longer counts as a first one again,
            so *attempts* limits the failures in a row. ``None`` never forgets.
        on: the exceptions that are failures; others end the child at once.
    """

    attempts: int | None = None
    delay: float = 0.1
    factor: float = 2.0
    max_delay: float = 30.0
    jitter: float = 0.1
    within: float | None = None
    on: type[Exception] | tuple[type[Exception], ...] = Exception

    def __post_init__(self) -> None:
        if self.attempts is not None:
            if not isinstance(self.attempts, int) or isinstance(self.attempts, bool):
                raise TypeError(f"attempts must be an int or None, not {type(self.attempts).__name__!r}")
            if self.attempts < 1:
                raise ValueError(f"attempts must be at least 1 or None, not {self.attempts!r}")
        if not self.delay >= 0 or not self.max_delay >= 0 or not self.factor > 0:
            raise ValueError("delay and max_delay must not be negative, and factor must be positive")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be between 0 and 1, not {self.jitter!r}")
        if self.within is not None and not self.within >= 0:
            raise ValueError(f"within must not be negative, not {self.within!r}")
        for kind in self.on if isinstance(self.on, tuple) else (self.on,):
            if not isinstance(kind, type) or not issubclass(kind, Exception):
                raise TypeError(f"on must be an exception class or a tuple of them, not {self.on!r}")

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        try:
            pause = min(self.delay * self.factor ** (failures - 1), self.max_delay)
        except OverflowError:
            pause = self.max_delay
        return pause * (1 - self.jitter * random.random())


def child(
    scope: Any,
    factory: Callable[[], Coroutine[Any, Any, Any]],
    /,
    *,
    timeout: float | None = None,
    retry: Retry | None = None,
    restart: Retry | None = None,
) -> Coroutine[Any, Any, Any]:
    """The coroutine of a child with policies: one task for all attempts.

    *retry* runs it until it succeeds, *restart* also after it succeeded; both give up
    with the last failure. An attempt that was cancelled is the last one, also when it
    fails in its clean-up or returns.
    """
    if asyncio.iscoroutine(factory):
        factory.close()
        raise TypeError(
            "with timeout=, retry= or restart= create_task() takes a callable that returns a new coroutine for each attempt"
        )
    if not callable(factory):
        raise TypeError(f"a callable that returns a coroutine was expected, not {type(factory).__name__!r}")
    for name, policy in (("retry", retry), ("restart", restart)):
        if policy is not None and not isinstance(policy, Retry):
            raise TypeError(f"{name} must be a Retry or None, not {type(policy).__name__!r}")
    if retry is not None and restart is not None:
        raise ValueError("retry and restart exclude each other: restart covers failures as well")
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout must not be negative, not {timeout!r}")
    return _attempts(factory, timeout, retry or restart, restart is not None, weakref.ref(scope))


# Before 3.13, an asyncio.TaskGroup that fails while its block is being left keeps a request of its own in the account.
_REQUESTS_ARE_COUNTED = sys.version_info >= (3, 13)


def _was_cancelled(task: asyncio.Task[Any], requests: int, exc: BaseException | None) -> bool:
    """Whether an attempt was asked to end, whatever it did with that."""
    if task.cancelling() <= requests:
        return False
    if _REQUESTS_ARE_COUNTED:
        return True
    while exc is not None and not isinstance(exc, asyncio.CancelledError):
        exc = exc.__context__
    if exc is not None:
        return True
    while task.cancelling() > requests:
        task.uncancel()
    return False


def _is_ending(scope: Any) -> bool:
    return scope is None or scope._aborting


async def _attempts(factory: Any, timeout: Any, policy: Any, again: bool, scope: Any) -> Any:
    loop = asyncio.get_running_loop()
    task: Any = asyncio.current_task()
    failures = 0
    while True:
        began = loop.time()
        requests = task.cancelling()
        try:
            if timeout is None:
                result = await factory()
            else:
                async with asyncio.timeout(timeout):
                    result = await factory()
            if not again or _was_cancelled(task, requests, None) or _is_ending(scope()):
                return result
            failures = 0
            pause = policy.delay
        except Exception as exc:
            if policy is None or not isinstance(exc, policy.on):
                raise
            if _was_cancelled(task, requests, exc) or _is_ending(scope()):
                raise
            if policy.within is not None and loop.time() - began > policy.within:
                failures = 0
            failures += 1
            if policy.attempts is not None and failures >= policy.attempts:
                raise
            pause = policy.pause(failures)
            del exc
        if hasattr(owner := scope(), "_restarted"):
            owner._restarted += 1
        del owner
        await asyncio.sleep(pause)


class Gate:
    """Lets so many children of a scope run at once, in the order in which they were created."""

    __slots__ = ("_free", "_held", "_waiting")

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise TypeError(f"limit must be an int or None, not {type(limit).__name__!r}")
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit!r}")
        self._free = limit
        #: a coroutine that start_task() has got a place for already
        self._held: Coroutine[Any, Any, Any] | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __call__(self, coro: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        if not asyncio.iscoroutine(coro):
            raise TypeError(f"a coroutine was expected, not {type(coro).__name__!r}")
        if coro is self._held:
            self._held = None
            return coro
        return gated(self, coro, self.claim())

    def claim(self) -> asyncio.Future[None] | None:
        """A place, or one's turn to get one: a future to pass to wait_for_turn()."""
        if self._free > 0:
            self._free -= 1
            return None
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        return turn

    def give_up(self, turn: asyncio.Future[None] | None) -> None:
        """Give back what claim() gave, whatever became of it."""
        if turn is None or (turn.done() and not turn.cancelled()):
            self.release()
        else:
            turn.cancel()

    def release(self) -> None:
        """Give a place back: to who waits longest, else to nobody."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


def gated(gate: Gate, coro: Coroutine[Any, Any, Any], turn: asyncio.Future[None] | None) -> Coroutine[Any, Any, Any]:
    """A coroutine that runs *coro* when it is its turn, and closes it if that never comes.

    It is a real one, so that debuggers and ``python -m asyncio ps`` see through it, and it
    stands at its first suspension already, so that nothing can end it unseen: no
    cancellation or close() before the first step of its task.
    """
    run: Any = _gated(gate, coro, turn)
    run.__name__ = getattr(coro, "__name__", type(coro).__name__)
    run.__qualname__ = getattr(coro, "__qualname__", run.__name__)
    run.send(None)
    return run  # type: ignore[no-any-return]


async def _gated(gate: Gate, coro: Coroutine[Any, Any, Any], turn: asyncio.Future[None] | None) -> Any:
    try:
        await _begin()
        if turn is not None:
            await turn
        return await coro
    finally:
        gate.give_up(turn)
        coro.close()


@types.coroutine
def _begin() -> Generator[None, None, None]:
    yield


async def start_task(scope: Any, coro: Coroutine[Any, Any, Any], /, **kwargs: Any) -> asyncio.Task[Any]:
    """``await scope.start_task(coro)``: waits for room, then starts the child, which has its place already."""
    # A scope without a limit has none.
    gate = getattr(scope, "_gate", None)
    if gate is None or not asyncio.iscoroutine(coro):
        return scope.create_task(coro, **kwargs)  # type: ignore[no-any-return]
    turn = gate.claim()
    try:
        if turn is not None:
            await turn
    except BaseException:
        gate.give_up(turn)
        coro.close()
        raise
    # Refused, it is closed, which gives the place back.
    gate._held = run = gated(gate, coro, None)
    try:
        return scope.create_task(run, **kwargs)  # type: ignore[no-any-return]
    finally:
        gate._held = None
        del run
