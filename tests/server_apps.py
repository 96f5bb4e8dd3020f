"""Applications that the tests of the command serve.  Nothing here imports the tests."""

import asyncio
import ctypes
import os
import socket
import sys
import time

from aiotools.server import asgi_worker, current_worker, server_context


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


HERE = "is no application"

# Closes no connection on its own while the server is up.
patient = asgi_worker("server_apps:app", timeout_keep_alive=3600)


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

    servers = []
    for sock in me.sockets:
        start = asyncio.start_unix_server if sock.family == socket.AF_UNIX else asyncio.start_server
        servers.append(await start(serve, sock=sock))
    yield
    for server in servers:
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
    for fd in kept:
        os.close(fd)


@server_context
async def wants_too_much_memory(loop, index, args):
    bytearray(sys.maxsize // 2)
    yield


@server_context
async def prints(loop, index, args):
    """Prints, whether anybody listens or not."""
    yield
    print("the end", file=sys.stdout, flush=True)


@server_context
async def waits_for_files(loop, index, args):
    """Says that it starts, and that it drains, and does so for as long as the files exist."""

    async def gone(name, what):
        print(f"worker {index}: {what}", file=sys.stderr, flush=True)
        while os.path.exists(os.environ[name]):
            await asyncio.sleep(0.01)

    await gone("DEPLOY_STARTING", "starting")
    yield
    await gone("DEPLOY_DRAINING", "draining")
