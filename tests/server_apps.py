"""Applications that the tests of the command serve.  Nothing here imports the tests."""

import asyncio
import ctypes
import os
import sys
import time

from aiotools.server import current_worker, server_context


async def respond(send, text):
    body = text.encode()
    headers = [(b"content-length", b"%d" % len(body)), (b"x-pid", b"%d" % os.getpid())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def app(scope, receive, send):
    """Answers with the process id; /slow takes a while, /hang and /hold never end."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    path = scope["path"]
    if path == "/slow":
        await asyncio.sleep(0.2)
    elif path == "/hang":
        hang_in_python()
    elif path == "/hold":
        hang_with_the_gil()
    elif path == "/exit":
        os._exit(7)
    await respond(send, f"{os.getpid()}")


def hang_in_python():
    while True:
        time.sleep(0.01)


def hang_with_the_gil():
    # Unlike CDLL, PyDLL keeps the GIL.
    ctypes.PyDLL(None).sleep(1000)


async def broken_lifespan(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "the database is away"})


@server_context
async def echo(loop, index, args):
    me = current_worker()

    async def serve(reader, writer):
        try:
            while line := await reader.readline():
                writer.write(b"%d " % os.getpid() + line)
                await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, sock=me.sockets[0])
    yield
    server.close()


@server_context
async def broken(loop, index, args):
    raise RuntimeError("cannot start like this")
    yield


@server_context
async def leaks_descriptors(loop, index, args):
    """Takes all descriptors that it may have, once it is ready."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    kept = []

    def take():
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))

    loop.call_soon(take)
    yield


@server_context
async def prints(loop, index, args):
    """Prints, whether anybody listens or not."""
    yield
    print("the end", file=sys.stdout, flush=True)
