"""Idiomatic helpers for asyncio, with a core written in C."""

from ._version import __version__

__all__ = ("__version__",)
