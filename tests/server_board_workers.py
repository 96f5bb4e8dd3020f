"""What runs in the children of the servers whose status board is tested."""

import asyncio
import ctypes
import os
import signal

from aiotools.server import current_worker, server_context


@server_context
async def counting(loop, index, args):
    me = current_worker()
    me.request_done(3 + index)
    me.counters["open"] = index
    args[0].send(("enter", index, os.getpid()))
    yield


@server_context
async def stops_turning(loop, index, args):
    """(wire, how): the first worker of index 0 hangs in its own way; a task of it has a name."""
    wire, how = args
    me = current_worker()
    task = asyncio.create_task(patient_friend(), name="the patient friend")
    wire.send(("enter", index, os.getpid()))
    if index == 0 and me.serial == 1:
        loop.call_later(0.02, hang, how)
    try:
        yield
    finally:
        task.cancel()


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
