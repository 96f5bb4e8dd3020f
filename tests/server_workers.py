"""What runs in the children of the servers under test.  Imports little: every child imports it."""

import asyncio
import os
import signal
import threading
import time

from aiotools.server import (
    current_worker,
    process_index,
    server_context,
)


def run_eager(coro):
    with asyncio.Runner() as runner:
        runner.get_loop().set_task_factory(asyncio.eager_task_factory)
        return runner.run(coro)


def run_debug(coro):
    return asyncio.run(coro, debug=True)


def run_and_leave_handlers(coro):
    """A careless runner: its handlers stay, and it blocks a signal for good."""
    try:
        return asyncio.run(coro)
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGWINCH):
            signal.signal(signum, print)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})


@server_context
async def reporting(loop, index, args):
    """Tells of each step: (what, index, ...)."""
    wire = args[0]
    wire.send(
        (
            "enter",
            index,
            process_index.get(),
            loop is asyncio.get_running_loop(),
            args[1:],
            os.getpid(),
        )
    )
    received = yield
    wire.send(("leave", index, received))


@server_context
async def slow_start(loop, index, args):
    wire, go = args
    wire.send(("starting", index))
    while not go.poll():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    wire.send(("entered", index))
    received = yield
    wire.send(("leave", index, received))


@server_context
async def slow_stop(loop, index, args):
    wire, go = args
    wire.send(("enter", index))
    received = yield
    wire.send(("leaving", index, received))
    while not go.poll():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    wire.send(("left", index, received))


@server_context
async def never_stops(loop, index, args):
    wire = args[0]
    wire.send(("enter", index))
    try:
        yield
    finally:
        wire.send(("leaving", index))
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@server_context
async def fails(loop, index, args):
    """(wire, index of the one that fails, where, exception)."""
    wire, which, where, exc = args
    wire.send(("enter", index))
    if index == which and where == "start":
        raise exc
    received = yield
    wire.send(("leave", index, received))
    if index == which and where == "stop":
        raise exc


@server_context
async def dies(loop, index, args):
    """(wire, indices of those that end at once)."""
    wire, which = args
    wire.send(("enter", index, os.getpid()))
    if index in which:
        os.kill(os.getpid(), signal.SIGKILL)
    received = yield
    wire.send(("leave", index, received))


async def not_a_generator(loop, index, args):
    pass


@server_context
async def never_yields(loop, index, args):
    args[0].send(("enter", index))
    return
    yield


@server_context
async def yields_twice(loop, index, args):
    args[0].send(("enter", index))
    yield
    yield


bad_worker = server_context(not_a_generator)


class OwnContext:
    """A context manager of the user's own, without yield_return and refusing attributes."""

    __slots__ = ("index", "wire")

    def __init__(self, loop, index, args):
        self.wire = args[0]
        self.index = index

    async def __aenter__(self):
        self.wire.send(("enter", self.index))

    async def __aexit__(self, *exc):
        self.wire.send(("leave", self.index, exc))


def hook(wire, index):
    wire.send(
        (
            "hook",
            index,
            process_index.get(),
            asyncio._get_running_loop(),
            threading.current_thread() is threading.main_thread(),
        )
    )


def failing_hook(index):
    raise ValueError("the hook failed")


# Extra processes


def extra_reporting(loop, index, args):
    """Ends by the exception that the stop signal becomes."""
    wire = args[0]
    wire.send(("extra", index, loop, process_index.get(), args[1:]))
    nap()


def extra_catching(loop, index, args):
    wire = args[0]
    try:
        wire.send(("extra", index))
        nap()
    except BaseException as exc:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        wire.send(("caught", index, type(exc), exc.args))


def extra_returning(loop, index, args):
    args[0].send(("extra", index))


def extra_failing(loop, index, args):
    args[0].send(("extra", index))
    raise ValueError("the extra failed")


def nap():
    # Short naps: a signal just before the system call would not end a long one.
    while True:
        time.sleep(0.02)


async def coroutine_extra(loop, index, args):
    wire = args[0]
    wire.send(("extra", index, loop is asyncio.get_running_loop()))
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        wire.send(("cancelled", index, int(current_worker().stop_signal)))
        raise


class DiesOnArrival:
    def __reduce__(self):
        return os._exit, (42,)
