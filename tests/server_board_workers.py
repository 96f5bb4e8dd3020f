"""What runs in the children of the servers whose status board is tested."""

import asyncio
import ctypes
import os
import select
import signal

import aiotools
from aiotools.server import current_worker, server_context, singleton


@server_context
async def counting(loop, index, args):
    me = current_worker()
    me.request_done(3 + index)
    me.counters["open"] = index
    args[0].send(("enter", index, os.getpid()))
    yield


@server_context
async def stops_turning(loop, index, args):
    """(wire, how, go): workers of index 0 hang in their own way until *go* is readable; a task of theirs has a name."""
    wire, how, go = args
    task = asyncio.create_task(patient_friend(), name="the patient friend")
    wire.send(("enter", index, os.getpid()))
    if index == 0 and not go.poll():
        loop.call_later(0.02, hang, how)
    try:
        yield
    finally:
        task.cancel()


@server_context
async def hangs_until(loop, index, args):
    """(path): hangs in Python code until that file is there."""
    task = asyncio.create_task(patient_friend(), name="the patient friend")
    if not os.path.exists(args[0]):
        loop.call_later(0.02, wait_for_file, args[0])
    yield
    task.cancel()


def wait_for_file(path):
    while not os.path.exists(path):
        pass


@server_context
async def holds_the_gil_until(loop, index, args):
    """(descriptor): is in native code that holds the GIL of its interpreter until that can be read."""
    if not select.select([args[0]], [], [], 0)[0]:
        loop.call_soon(read_with_the_gil, args[0])
    yield


def read_with_the_gil(fd):
    # PyDLL keeps the GIL.
    ctypes.PyDLL(None).read(fd, ctypes.create_string_buffer(1), 1)


async def patient_friend():
    await asyncio.Event().wait()


def hang(how):
    if how == "python":
        while True:
            pass
    elif how == "system call":
        signal.pause()
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "native":
        # PyDLL keeps the GIL.
        ctypes.PyDLL(None).pause()
        hang(how)


@server_context
async def quiet_counting(loop, index, args):
    me = current_worker()
    me.request_done(3 + index)
    me.counters["open"] = index
    yield


@server_context
async def electing(loop, index, args):
    """(wire, how): tells each time that it holds the lease; worker of generation 1 that has it first ends in its own way."""
    wire, how = args
    me = current_worker()
    lease = singleton.lease("the one", 0.05 if how is not None else 30)
    wire.send(("enter", index, os.getpid()))

    async def tick():
        while True:
            if lease.acquire():
                wire.send(("held", index, os.getpid()))
                if me.generation == me.serial == 1 and index == 0 and how is not None:
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    elif how == "recycle":
                        me.request_recycle("the test says so")
                    else:
                        hang(how)
            await asyncio.sleep(0.05)

    # The first worker shall have it first, wherever there are two.
    if index == 1 and how is not None:
        while not any(lease._leases._words[i] for i in range(1, 512, 2)):
            await asyncio.sleep(0.001)
    task = loop.create_task(tick())
    yield
    task.cancel()


@server_context
async def singleton_timer(loop, index, args):
    wire = args[0]

    async def tick(interval):
        wire.send(("tick", index, os.getpid()))

    timer = aiotools.create_timer(tick, 0.05, singleton="the timer")
    wire.send(("enter", index, os.getpid()))
    yield
    timer.cancel()
