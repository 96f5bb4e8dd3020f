"""What runs in the children of the servers under test.  Imports little: every child imports it."""

import asyncio
import collections
import importlib
import itertools
import json
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
    while not go.poll():
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
    while not go.poll():
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
        while True:
            await asyncio.sleep(0.01)


def hold_the_gil():
    """For ever, in native code that no signal interrupts."""
    collections.deque(itertools.repeat(None), maxlen=0)


@server_context
async def holds_the_gil(loop, index, args):
    args[0].send(("enter", index))
    loop.call_soon(hold_the_gil)
    yield


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


@server_context
async def bad_worker(loop, index, args):
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


def extra_holding(loop, index, args):
    args[0].send(("extra", index))
    hold_the_gil()


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


# Managed servers


@server_context
async def managed(loop, index, args):
    """Tells its generation and process id, too; obeys orders that the test sends over nothing."""
    wire = args[0]
    me = current_worker()
    me.on_reload(lambda: wire.send(("reloaded", index, me.generation)))
    wire.send(("enter", index, me.generation, os.getpid(), me.kind))
    received = yield
    wire.send(("leave", index, me.generation, received, me.stop_reason))


class SignalledOnArrival:
    """A worker that sends its process a signal when it is unpickled there."""

    def __init__(self, signum):
        self.signum = signum

    def __call__(self, loop, index, args):
        raise AssertionError("not unpickled")

    def __reduce__(self):
        return managed_after_signal, (self.signum,)


def managed_after_signal(signum):
    os.kill(os.getpid(), signum)
    return managed


@server_context
async def counting(loop, index, args):
    """Reports so many finished requests."""
    wire, n = args
    me = current_worker()
    wire.send(("enter", index, me.generation, os.getpid()))
    if len(wire_seen) == 0 and n:
        loop.call_soon(me.request_done, n)
    received = yield
    wire.send(("leave", index, me.generation, received, me.stop_reason))


wire_seen = []


@server_context
async def asks_for_a_successor(loop, index, args):
    current_worker().request_recycle("at once")
    yield
    args[0].send(("leave", index))


@server_context
async def stuck_in_drain(loop, index, args):
    """(wire, whether it also ignores cancellation)"""
    wire, stubborn = args
    wire.send(("enter", index))
    yield
    wire.send(("leaving", index))
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            wire.send(("cancelled", index))
            if not stubborn:
                raise


@server_context
async def stuck_in_start(loop, index, args):
    wire = args[0]
    wire.send(("starting", index))
    await asyncio.Event().wait()
    yield


def spin():
    while True:
        pass


@server_context
async def hangs_in_stop(loop, index, args):
    """Blocks its loop when it is told to stop."""
    wire = args[0]
    wire.send(("enter", index))
    yield
    wire.send(("leaving", index))
    time.sleep(3600)


@server_context
async def crashes_at_once(loop, index, args):
    args[0].send(("enter", index))
    raise RuntimeError("always broken")
    yield


@server_context
async def dies_on_start(loop, index, args):
    wire, how = args
    wire.send(("enter", index))
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exits":
        os._exit(7)
    raise RuntimeError("never comes up")
    yield


@server_context
async def echo(loop, index, args):
    """Answers each line on the first socket with its index, generation and process id."""
    wire = args[0]
    me = current_worker()

    async def serve(reader, writer):
        try:
            while line := await reader.readline():
                writer.write(b"%d %d %d " % (index, me.generation, os.getpid()) + line)
                await writer.drain()
                me.request_done()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, sock=me.sockets[0])
    wire.send(("enter", index, me.generation, [s.getsockname() for s in me.sockets]))
    yield
    server.close()
    wire.send(("leave", index, me.generation))


def interpreter_id():
    try:
        from concurrent import interpreters
    except ImportError:
        return None
    return interpreters.get_current().id


@server_context
async def fd_reporting(loop, index, args):
    """Like managed, over the number of a descriptor."""

    def send(*message):
        os.write(args[0], json.dumps(message).encode() + b"\n")

    me = current_worker()
    send("enter", index, me.generation, me.kind, process_index.get(), interpreter_id())
    received = yield
    send("leave", index, me.generation, received)


@server_context
async def fd_echo(loop, index, args):
    def send(*message):
        os.write(args[0], json.dumps(message).encode() + b"\n")

    me = current_worker()

    async def serve(reader, writer):
        line = await reader.readline()
        writer.write(b"%d %d %d " % (index, me.generation, os.getpid()) + line)
        writer.close()

    server = await asyncio.start_server(serve, sock=me.sockets[0])
    send("enter", index, me.generation, me.kind, me.sockets[0].getsockname())
    yield
    server.close()


# Faults


@server_context
async def clock_jumps(loop, index, args):
    """The system's clock of this process jumps at each look."""
    wire = args[0]
    me = current_worker()
    if me.kind == "process":
        time.time = itertools.cycle([2e9, 0.0, 5e9, 1e9]).__next__
    wire.send(("enter", index, me.generation))
    yield
    wire.send(("leave", index, me.generation))


@server_context
async def hangs(loop, index, args):
    """(wire, where, go): the loops of index 0 stand until *go* is readable."""
    wire, where, go = args
    wire.send(("enter", index, os.getpid()))
    if where == "start" and index == 0:
        stand_still(go, wire)
    if where == "loop" and index == 0:
        loop.call_later(0.05, stand_still, go, wire)
    yield
    wire.send(("leave", index))
    if where == "stop" and index == 0:
        stand_still(go, wire)


def stand_still(go, wire):
    if not go.poll():
        wire.send(("standing",))
    while not go.poll(0.01):
        pass


@server_context
async def ignores_signals(loop, index, args):
    wire = args[0]
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(signum)
        signal.signal(signum, signal.SIG_IGN)
    # And deaf to the parent's messages, too.
    loop.remove_reader(current_worker().channel.fileno())
    wire.send(("enter", index, os.getpid()))
    yield


@server_context
async def body_fails(loop, index, args):
    """What runs beside the wait fails."""
    wire, which = args
    async with asyncio.TaskGroup() as group:
        if index == which:
            group.create_task(fail_soon())
        wire.send(("enter", index))
        yield
        wire.send(("leave", index))


async def fail_soon():
    await asyncio.sleep(0.01)
    raise ValueError("in the body")


@server_context
async def eats_memory(loop, index, args):
    import resource

    wire = args[0]
    me = current_worker()
    wire.send(("enter", index, me.serial))
    if me.serial == 1:
        with open("/proc/self/statm") as f:
            used = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
        eaten = []
        while True:
            eaten.append(bytearray(2**22))
    yield


@server_context
async def leaks_descriptors(loop, index, args):
    """Takes all descriptors that it may have, once it is ready."""
    import resource

    wire = args[0]
    limit = len(os.listdir("/proc/self/fd")) + 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    kept = []
    try:
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as exc:
        wire.send(("enter", index, exc.errno))
    received = yield
    wire.send(("leave", index, received))


def extra_with_pid(loop, index, args):
    args[0].send(("extra", index, os.getpid()))
    nap()


@server_context
async def tells_its_loop(loop, index, args):
    args[0].send(("loop", index, type(loop).__module__))
    yield


# Fork servers

IMPORTED_BY = os.getpid()


@server_context
async def tells_where(loop, index, args):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    args[0].send(("where", index, os.getppid(), os.getpid(), IMPORTED_BY, mask))
    yield


def extra_where(loop, index, args):
    args[0].send(("where", index, os.getppid(), None, None, None))
    nap()


@server_context
async def tells_surroundings(loop, index, args):
    wire, name = args
    umask = os.umask(0)
    os.umask(umask)
    wire.send(("surroundings", os.getpid(), os.environ.get(name), umask))
    yield


@server_context
async def tells_library(loop, index, args):
    wire, name = args
    library = importlib.import_module(name)
    wire.send(("library", library.version, library.pid, os.getpid()))
    yield
