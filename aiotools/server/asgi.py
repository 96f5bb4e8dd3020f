"""An ASGI application as a worker: uvicorn's own protocols inside our workers.

uvicorn serves; the sockets, the processes and the drain are ours.  Its own shutdown closes idle
keep-alive connections at once, also under a request that is on its way.  Here a draining worker

- stops taking connections (what waits in the shared accept queue is taken by the others),
- answers every request that still comes on a connection it has, saying ``Connection: close``,
- closes connections that stay idle for their keep-alive time, as always,
- and ends when the last one is gone, or the drain budget is over.

When the whole server stops (and is not just reloaded) nobody else would take a request that comes
later, so there connections that stay idle for :data:`IDLE_GRACE` are closed.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator
from typing import Any

from .contexts import AsyncServerContextManager
from .worker import current_worker, import_target

__all__ = ("asgi_worker",)

#: Seconds for which a keep-alive connection must be idle before it is closed when the server stops.
IDLE_GRACE = 0.1
#: Seconds between two looks at what is left while draining.
POLL = 0.01


def asgi_worker(app: Any, **config: Any) -> Any:
    """A worker for :func:`start_server` that serves *app* on the sockets of ``bind=``.

    :param app: the application, or an import string ``"package.module:app"``.
    :param config: further arguments for ``uvicorn.Config``.
    :raises ImportError: in the worker, if uvicorn is not installed (the extra ``asgi``).
    """
    return functools.partial(_make, app, config)


def _make(app: Any, config: dict[str, Any], loop: Any, index: int, args: Any) -> Any:
    return AsyncServerContextManager(_serve, (app, config), {})


#: What uvicorn imports when it is configured; a fork server has it already.
_make._aiotools_preload = (  # type: ignore[attr-defined]
    "uvicorn",
    "uvicorn.lifespan.on",
    "uvicorn.middleware.proxy_headers",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
)


async def _serve(app: Any, options: dict[str, Any]) -> AsyncGenerator[None, Any]:
    try:
        import uvicorn
    except ImportError as exc:
        raise ImportError("ASGI applications need uvicorn: install aiotools[asgi]") from exc

    me = current_worker()
    if not me.sockets:
        raise ValueError("an ASGI application needs an address: bind=")
    app = import_target(app)
    if not callable(app):
        raise TypeError(f"an ASGI application must be callable, not {app!r}")
    config = uvicorn.Config(app, **{"log_config": None, "access_log": False, **options})
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.on_tick(0)  # the default headers
    try:
        await server.startup(sockets=me.sockets)
    except SystemExit:
        raise RuntimeError("the application's lifespan startup failed") from None
    ticker = asyncio.get_running_loop().create_task(_tick(server, me))
    try:
        yield
        await _drain(server, config, me)
    finally:
        ticker.cancel()
        state = server.server_state
        for connection in list(state.connections):
            connection.shutdown()
        for task in list(state.tasks):
            task.cancel()
        if state.tasks:
            await asyncio.wait(list(state.tasks))
        await server.lifespan.shutdown()


async def _tick(server: Any, me: Any) -> None:
    counted = 0
    while True:
        await asyncio.sleep(1.0)
        await server.on_tick(0)
        total = server.server_state.total_requests
        if total != counted:
            me.request_done(total - counted)
            counted = total


async def _drain(server: Any, config: Any, me: Any) -> None:
    state = server.server_state
    for listener in server.servers:
        listener.close()  # accepting has ended before (Worker.stop_accepting)
    close = (b"connection", b"close")
    config.encoded_headers.append(close)
    state.default_headers = [*state.default_headers, close]
    for connection in list(state.connections):
        if not hasattr(connection, "cycle"):  # a WebSocket: "service restart"
            connection.shutdown()
    final = me.stop_reason != "reloaded" and not (me.stop_reason or "").startswith("recycled")
    idle: dict[Any, tuple[Any, float]] = {}
    while state.connections or state.tasks:
        if final:
            now = time.monotonic()
            for connection in list(state.connections):
                cycle = getattr(connection, "cycle", None)
                if cycle is not None and not cycle.response_complete:
                    idle.pop(connection, None)
                    continue
                seen = idle.get(connection)
                if seen is None or seen[0] is not cycle:
                    idle[connection] = (cycle, now)
                elif now - seen[1] >= IDLE_GRACE and hasattr(connection, "cycle"):
                    connection.shutdown()
        await asyncio.sleep(POLL)
