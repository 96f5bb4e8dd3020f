"""Servers: one event loop per worker, in processes, threads or interpreters, under one parent.

This module is also a decorator: ``@aiotools.server`` is :func:`server_context`.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from .api import start_server
from .asgi import asgi_worker
from .contexts import (
    AsyncServerContextManager,
    ServerMainContextManager,
    main_context,
    server_context,
)
from .logs import LogConfig
from .options import ServerOptions
from .plugins import ServerPlugin, WorkerPlugin
from .report import ServerFailed, ServerReport, WorkerRecord
from .worker import InterruptedBySignal, Worker, current_worker, process_index

__all__ = (
    "AsyncServerContextManager",
    "InterruptedBySignal",
    "LogConfig",
    "ServerFailed",
    "ServerMainContextManager",
    "ServerOptions",
    "ServerPlugin",
    "ServerReport",
    "Worker",
    "WorkerPlugin",
    "WorkerRecord",
    "asgi_worker",
    "current_worker",
    "main",
    "main_context",
    "process_index",
    "server_context",
    "start_server",
)

main = main_context


class _ServerModule(types.ModuleType):
    """A module that is a decorator as well."""

    def __call__(self, func: Any) -> Any:
        return server_context(func)


sys.modules[__name__].__class__ = _ServerModule
