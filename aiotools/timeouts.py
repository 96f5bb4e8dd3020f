"""Timeouts: those of asyncio, understanding exception groups and several times faster.

::

    async with timeout(10):
        await work()        # TimeoutError leaves the block after ten seconds
"""

from ._aiotools import Timeout, timeout, timeout_at

__all__ = ("Timeout", "timeout", "timeout_at")
