"""Timers: tasks that start other tasks at fixed times; and virtual time."""

import asyncio
import contextvars
import enum
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from ._aiotools import Timer, TimerStats, _create_timer
from ._clock import VirtualClock

__all__ = (
    "Timer",
    "TimerDelayPolicy",
    "TimerStats",
    "VirtualClock",
    "create_timer",
)


class TimerDelayPolicy(enum.Enum):
    """What a timer does with a tick that still runs when the next one is due."""

    DEFAULT = 0
    """Leave it alone: ticks may pile up."""
    CANCEL = 1
    """Cancel it and wait for its end before the next one starts."""


def create_timer(
    cb: Callable[[float], Coroutine[Any, Any, object]],
    interval: float,
    delay_policy: TimerDelayPolicy = TimerDelayPolicy.DEFAULT,
    loop: asyncio.AbstractEventLoop | None = None,
    *,
    first: float = 0.0,
    jitter: float | Callable[[], float] | None = None,
    limit: int | None = None,
    overlap: Literal["allow", "skip", "cancel", "queue"] | int | None = None,
    missed: Literal["late", "skip", "catch-up"] | None = None,
    grace: float | None = None,
    tick_timeout: float | None = None,
    eager: bool = False,
    on_error: Literal["report", "stop", "backoff"] | Callable[[Timer, BaseException], object] = "report",
    backoff_cap: float | None = None,
    name: str | None = None,
    context: contextvars.Context | None = None,
    singleton: str | None = None,
) -> Timer:
    """Call ``cb(interval)`` every *interval* seconds and run the coroutine that it returns as a task, a tick.

    Returns a :class:`Timer`, which is an :class:`asyncio.Task`: cancel it to stop the timer. Then, and whenever it ends,
    the ticks that still run are cancelled and awaited first. It needs a running loop.

    The phase is fixed: tick *k* is due at *start* + *first* + *k* * *interval* on the loop's clock, where *start* is when the
    timer task first runs, at the next iteration of the loop. No tick starts before it is due.

    *cb* is called in the timer's context, with the timer as the current task. If it raises or returns no coroutine, the timer
    ends with that exception.

    :param cb: called with *interval*; returns a coroutine.
    :param interval: seconds. 0 or less: one tick per iteration of the loop; such a timer has no phase, so nothing of
        *jitter*, *missed*, *grace* and ``on_error="backoff"`` goes with it. What is shorter than a nanosecond counts as 0.
    :param delay_policy: ``CANCEL`` is the older way to say ``overlap="cancel"``.
    :param loop: ignored; older programs pass it.
    :param first: delay of the first tick, in seconds.
    :param jitter: a tick comes up to so many seconds late, at random, shorter than *interval*; or a callable without
        arguments that returns the seconds for the next tick. The phase is not changed by it.
    :param limit: after so many ticks were started and have ended, the timer completes with ``None``.
    :param overlap: what to do when a tick is due while others run. ``"allow"`` (the default): start it. ``"skip"``: leave
        it out. An integer *n*: leave it out if *n* are running. ``"queue"``: start it when the running one has ended; at
        most one waits. ``"cancel"``: cancel the running one, await its end, then start the new one.
    :param missed: what to do when the loop was too busy to start ticks in time. ``"late"`` (the default): start one late tick for
        all that were missed. ``"catch-up"``: start all of them, one per iteration of the loop. ``"skip"``: as ``"late"``,
        with a *grace* of half an interval. The phase is kept.
    :param grace: a tick that would start more than so many seconds late is left out; by default none is.
    :param tick_timeout: a tick that runs longer, in seconds, is cancelled and has failed, with :exc:`TimeoutError`.
    :param eager: start each tick at once, in the iteration of the loop in which it is due; one that ends without suspending
        costs no task switch. Needs Python 3.12 and a loop and task factory that can do it; else ticks start as usual.
    :param on_error: what to do with a tick that fails. ``"report"``: hand it to the loop's exception handler. ``"stop"``: end the
        timer with the exception. ``"backoff"``: report it and leave out ticks: after *n* failures in a row the next tick
        is ``2 ** n`` intervals after the last one. A callable: it is called with the timer and the exception; what it raises
        ends the timer.
    :param backoff_cap: the longest time between ticks with ``on_error="backoff"``, in seconds; 60, or *interval* if that is longer.
    :param name: of the timer task.
    :param context: of the timer task; a copy of the current one by default. Each tick has a copy of it.
    :param singleton: a name: of all workers of a server that have a timer with this name, with the same *interval*, one at a time
        starts ticks. Another takes over within one interval when it dies, is recycled or hangs (:mod:`aiotools.server.singleton`).
        Ticks that are left to another worker count for *limit*.
    :raises TypeError, ValueError: for an argument that is wrong, or does not go with another one; the message names it.
    :raises RuntimeError: without a running loop.

    From aiotools 2.2; what comes after *loop* is new in 3.0.
    """
    if delay_policy is not TimerDelayPolicy.DEFAULT:
        if delay_policy is not TimerDelayPolicy.CANCEL:
            raise TypeError(f"delay_policy must be a TimerDelayPolicy, not {type(delay_policy).__name__!r}")
        if overlap is not None and overlap != "cancel":
            raise ValueError(f"overlap={overlap!r} contradicts delay_policy={delay_policy}")
        overlap = "cancel"
    if inspect.iscoroutinefunction(on_error):
        raise TypeError("on_error must be an ordinary callable, not a coroutine function")
    if inspect.iscoroutinefunction(jitter):
        raise TypeError("jitter must be a number of seconds or an ordinary callable, not a coroutine function")
    lease = None
    if singleton is not None:
        from .server.singleton import lease as new_lease

        if not callable(cb):
            raise TypeError(f"cb must be callable, not {type(cb).__name__!r}")
        lease = new_lease(
            singleton, interval, jitter if isinstance(jitter, (int, float)) else interval if jitter else 0.0
        )
        cb = _elected(cb, lease)
    try:
        timer = _create_timer(
            cb,
            interval,
            first,
            jitter,
            limit,
            overlap,
            missed,
            grace,
            tick_timeout,
            eager,
            on_error,
            backoff_cap,
            name,
            context,
        )
    except BaseException:
        if lease is not None:
            lease.close()
        raise
    if lease is not None:
        timer.add_done_callback(lambda _: lease.close())
    return timer


async def _left_to_another_worker() -> None:
    pass


def _elected(cb: Callable[[float], Coroutine[Any, Any, object]], lease: Any) -> Any:
    def tick(interval: float) -> Coroutine[Any, Any, object]:
        return cb(interval) if lease.acquire() else _left_to_another_worker()

    return tick
