"""The application that the load rows serve; its import takes 0.3 s, as real ones do."""

import asyncio
import os
import time

time.sleep(0.3)  # what a real application spends on its imports

BROKEN = os.environ.get("LOAD_BROKEN")
if BROKEN and os.path.exists(BROKEN):
    raise RuntimeError("broken on purpose")


async def app(scope, receive, send):
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
        while True:
            time.sleep(0.05)  # noqa: ASYNC251
    pid = b"%d" % os.getpid()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(pid))]})
    await send({"type": "http.response.body", "body": pid})
