"""create_timer, Timer."""

import asyncio
import contextlib

import aiotools
from operations import no_memory, operation


async def tick(interval):
    pass


async def slow(interval):
    await aiotools.sleep(60)


async def failing(interval):
    raise ValueError


async def stop(timer):
    timer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await timer


@operation("Timer", "TimerStats")
async def a_timer_that_completes():
    timer = aiotools.create_timer(tick, 1e-6, limit=3)
    await timer
    assert timer.stats().ticks == 3


@operation("Timer")
async def an_eager_timer():
    await aiotools.create_timer(tick, 1e-6, limit=3, eager=True)


@operation("Timer")
async def a_timer_in_every_turn():
    await aiotools.create_timer(tick, 0, limit=3)


@operation("Timer")
async def a_timer_that_is_cancelled_with_running_ticks():
    timer = aiotools.create_timer(slow, 1e-6, overlap=2, tick_timeout=60)
    while timer.stats().running < 2:
        await aiotools.checkpoint()
    await stop(timer)


@operation("Timer")
async def a_timer_that_cancels_its_ticks():
    timer = aiotools.create_timer(slow, 0, aiotools.TimerDelayPolicy.CANCEL)
    while timer.stats().ticks < 3:
        await aiotools.checkpoint()
    await stop(timer)


@operation("Timer")
async def a_timer_that_never_starts():
    await stop(aiotools.create_timer(tick, 1))


@operation("Timer")
async def timers_that_fail():
    def bad(interval):
        raise LookupError

    for cb, options, error in (
        (bad, {}, LookupError),
        (lambda interval: 5, {}, TypeError),
        (failing, {"on_error": "stop"}, ValueError),
        (failing, {"on_error": "stop", "eager": True}, ValueError),
        (tick, {"jitter": lambda: -1}, ValueError),
    ):
        try:
            await aiotools.create_timer(cb, 1, **options)
        except error:
            pass


@operation("Timer")
async def errors_that_are_handled():
    seen = []
    timer = aiotools.create_timer(failing, 1e-6, limit=2, on_error=lambda timer, exc: seen.append(timer))
    await timer
    assert seen == [timer, timer]


@operation("Timer")
async def bad_arguments():
    for options in (
        {"first": -1},
        {"limit": 0},
        {"overlap": "x"},
        {"missed": 5},
        {"jitter": 5},
        {"on_error": 5},
        {"context": 5},
        {"backoff_cap": 5},
    ):
        try:
            aiotools.create_timer(tick, 1, **options)
        except (TypeError, ValueError):
            pass


@operation("Timer")
async def all_that_changes_a_timer():
    timer = aiotools.create_timer(tick, 60, first=60, jitter=1, name="t")
    timer.trigger()
    await aiotools.checkpoint()
    timer.pause()
    timer.resume()
    timer.reschedule(30)
    timer.next_due  # noqa: B018
    timer.trigger()
    await aiotools.checkpoint()
    await aiotools.checkpoint()
    await stop(timer)


@operation("Timer")
async def a_timer_whose_coroutine_is_closed():
    timer = aiotools.create_timer(slow, 60)
    await aiotools.checkpoint()
    await aiotools.checkpoint()
    timer.get_coro().close()
    with contextlib.suppress(RuntimeError):
        await stop(timer)
    await aiotools.checkpoint()


# Making one is asyncio's business: a Task that finds no memory when it schedules its first step says that it was destroyed
# while pending, whoever makes it.
@no_memory("Timer", "TimerStats", kinds=("default",))
async def changing_a_timer(fail):
    timer = aiotools.create_timer(tick, 60, first=60)
    await aiotools.checkpoint()
    try:
        with fail:
            timer.pause()
            timer.resume()
            timer.reschedule(30)
            timer.trigger()
            timer.stats()
            timer.next_due  # noqa: B018
    finally:
        await stop(timer)
