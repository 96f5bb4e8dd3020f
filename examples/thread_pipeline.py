"""A pipeline through threads and an event loop: what blocks runs in threads, what waits for many runs in the loop.

    python examples/thread_pipeline.py [number of documents]

A thread reads documents from "disk", an event loop looks each of them up at a "service" (a hundred at a time), threads
compress what came back, and the loop collects the results. Two queues connect them; both have a bound, so that a stage
which is too fast waits for the next one. Each stage ends by shutting its queue down: nothing else says that it is over.
"""

import asyncio
import hashlib
import sys
import threading
import time
import zlib

import aiotools


def read_documents(out: aiotools.SyncQueue[tuple[int, bytes]], count: int) -> None:
    """In a thread: the sync side has the methods of queue.Queue."""
    for number in range(count):
        text = f"document {number} ".encode() * 50
        out.put((number, text))
    out.shutdown()


async def look_up(number: int, text: bytes) -> bytes:
    await aiotools.sleep(0.001)
    return hashlib.sha256(text).digest() + text


async def enrich(documents: aiotools.Queue[tuple[int, bytes]], out: aiotools.Queue[tuple[int, bytes]]) -> None:
    """One of many tasks: iteration ends when the queue is shut down and empty."""
    async for number, text in documents:
        await out.async_q.put((number, await look_up(number, text)))


def compress(enriched: aiotools.SyncQueue[tuple[int, bytes]], out: aiotools.SyncQueue[tuple[int, int]]) -> None:
    """In several threads; get_many() saves locking where items are small."""
    while True:
        try:
            batch = enriched.get_many(16)
        except aiotools.QueueShutDown:
            return
        out.put_many((number, len(zlib.compress(data))) for number, data in batch)


async def main(count: int) -> None:
    documents = aiotools.Queue[tuple[int, bytes]](200)
    enriched = aiotools.Queue[tuple[int, bytes]](200)
    results = aiotools.Queue[tuple[int, int]]()
    begin = time.perf_counter()
    reader = threading.Thread(target=read_documents, args=[documents.sync_q, count])
    workers = [threading.Thread(target=compress, args=[enriched.sync_q, results.sync_q]) for _ in range(2)]
    for thread in [reader, *workers]:
        thread.start()
    await asyncio.gather(*(enrich(documents, enriched) for _ in range(100)))
    enriched.shutdown()
    sizes = {}
    while len(sizes) < count:
        sizes.update(await results.async_q.get_many())
    for thread in [reader, *workers]:
        thread.join()
    seconds = time.perf_counter() - begin
    assert sorted(sizes) == list(range(count))
    print(f"{count} documents in {seconds:.2f} s, {sum(sizes.values())} bytes")
    for name, queue in (("documents", documents), ("enriched", enriched), ("results", results)):
        now = queue.statistics()
        print(f"  {name}: {now.items_put} put, {now.items_got} got, at most {now.peak_qsize} at once")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000))
