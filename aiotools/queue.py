"""Queues between any number of threads and event loops.

::

    queue = Queue[bytes](maxsize=100)

    def reader(q: SyncQueue[bytes]) -> None:        # in a thread
        for line in sys.stdin.buffer:
            q.put(line)
        q.shutdown()

    async def main() -> None:                       # in an event loop
        async for line in queue:
            ...

    threading.Thread(target=reader, args=[queue.sync_q]).start()

The names are those of janus, and so is what they do; ``async_q`` is also a faster :class:`asyncio.Queue`.
"""

from __future__ import annotations

import asyncio
import queue
import sys

from ._aiotools import AsyncQueue, LifoQueue, PriorityQueue, Queue, QueueShutDown, QueueStatistics, SyncQueue

__all__ = (
    "AsyncQueue",
    "AsyncQueueEmpty",
    "AsyncQueueFull",
    "AsyncQueueShutDown",
    "LifoQueue",
    "PriorityQueue",
    "Queue",
    "QueueShutDown",
    "QueueStatistics",
    "SyncQueue",
    "SyncQueueEmpty",
    "SyncQueueFull",
    "SyncQueueShutDown",
)

SyncQueueEmpty = queue.Empty
SyncQueueFull = queue.Full
AsyncQueueEmpty = asyncio.QueueEmpty
AsyncQueueFull = asyncio.QueueFull

# Either is what both sides raise: a QueueShutDown is all of these.
if sys.version_info >= (3, 13):
    SyncQueueShutDown = queue.ShutDown
    AsyncQueueShutDown = asyncio.QueueShutDown
else:
    SyncQueueShutDown = AsyncQueueShutDown = QueueShutDown
