"""The application of app.py in workers of PyPI's aiotools 2.2, the way its users did it: a socket per worker, uvicorn's protocol.

PYTHONPATH=FOLDER python classic.py PORT WORKERS
"""

import socket
import sys

import uvicorn

import aiotools


@aiotools.server_context
async def worker(loop, index, args):
    sock = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=2048, reuse_port=True)
    config = uvicorn.Config("app:app", log_config=None, access_log=False)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.on_tick(0)
    await server.startup(sockets=[sock])
    yield
    await server.shutdown(sockets=[sock])


if __name__ == "__main__":
    import uvloop

    aiotools.start_server(worker, num_workers=int(sys.argv[2]), wait_timeout=30, runner=uvloop.run)
