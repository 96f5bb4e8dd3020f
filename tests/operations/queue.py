"""Queue, LifoQueue, PriorityQueue and their two sides."""

import asyncio
import queue as stdlib_queue

import aiotools
from operations import no_memory, operation

NAMES = ("Queue", "SyncQueue", "AsyncQueue")


class Hooked(aiotools.Queue):
    def _init(self, maxsize):
        self.held = []

    def _qsize(self):
        return len(self.held)

    def _put(self, item):
        if item == "refuse":
            raise ValueError(item)
        self.held.append(item)

    def _get(self):
        return self.held.pop(0)


@operation(*NAMES, "LifoQueue", "PriorityQueue", "QueueStatistics")
async def items_that_go_through():
    for cls in (aiotools.Queue, aiotools.LifoQueue, aiotools.PriorityQueue):
        queue = cls(4)
        q, s = queue.async_q, queue.sync_q
        await q.put(1)
        s.put(2)
        q.put_nowait(3)
        queue.peek(), q.peek(), s.peek()
        queue.statistics(), repr(queue)
        assert len({await q.get(), s.get(), q.get_nowait()}) == 3
        for _ in range(3):
            q.task_done()
        await q.join()
        s.join()


@operation(*NAMES)
async def bulk():
    queue = aiotools.Queue()
    await queue.async_q.put_many(range(200))
    queue.sync_q.put_many(range(100))
    assert len(await queue.async_q.get_many(150)) == 150
    assert len(queue.sync_q.get_many()) == 150


@operation(*NAMES)
async def a_getter_and_a_putter_that_wait():
    q = aiotools.Queue(1).async_q
    getter = asyncio.create_task(q.get())
    await aiotools.checkpoint()
    await q.put(1)
    assert await getter == 1
    await q.put(2)
    putter = asyncio.create_task(q.put(3))
    await aiotools.checkpoint()
    assert await q.get() == 2
    await putter


@operation(*NAMES)
async def waiters_that_are_cancelled():
    q = aiotools.Queue(1).async_q
    tasks = [asyncio.create_task(q.get()), asyncio.create_task(q.get())]
    await aiotools.checkpoint()
    q.put_nowait(1)
    tasks[0].cancel()
    await asyncio.wait(tasks)
    q.put_nowait(1)
    tasks = [asyncio.create_task(q.put(2)), asyncio.create_task(q.join())]
    await aiotools.checkpoint()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@operation(*NAMES, "QueueShutDown")
async def a_shutdown_with_waiters():
    queue = aiotools.Queue(1)
    q = queue.async_q
    getters = [asyncio.create_task(q.get()) for _ in range(2)]
    await aiotools.checkpoint()
    queue.shutdown()
    await asyncio.wait(getters)
    assert all(isinstance(task.exception(), aiotools.QueueShutDown) for task in getters)
    async for _ in queue:
        raise AssertionError
    await queue.aclose()
    await queue.wait_closed()


@operation(*NAMES)
def what_blocks_and_times_out():
    q = aiotools.Queue(1).sync_q
    try:
        q.get(timeout=0.0001)
    except stdlib_queue.Empty:
        pass
    q.put([])
    try:
        q.put_many([[], []], timeout=0.0001)
    except stdlib_queue.Full as exc:
        assert exc.items_put == 0
    try:
        q.join(timeout=0.0001)
    except TimeoutError:
        pass


@operation(*NAMES)
def bad_calls():
    for call in (
        lambda: aiotools.Queue("1"),
        lambda: aiotools.Queue().async_q.get_many(0),
        lambda: aiotools.Queue().async_q.put_many(1),
        lambda: aiotools.Queue().sync_q.get(timeout=-1),
        lambda: aiotools.Queue().sync_q.get_many("x"),
        lambda: aiotools.Queue().task_done(),
        lambda: aiotools.Queue().peek(),
        lambda: aiotools.Queue()._get(),
        lambda: aiotools.Queue().__init__(),
    ):
        try:
            call()
        except (TypeError, ValueError, RuntimeError, asyncio.QueueEmpty):
            pass


@operation("Queue", "PriorityQueue")
def hooks_that_raise():
    for queue, bad in ((Hooked(), "refuse"), (aiotools.PriorityQueue(), "not a number")):
        queue.sync_q.put(1)
        try:
            queue.sync_q.put_many([2, bad])
        except (ValueError, TypeError) as exc:
            assert exc.items_put == 1
        assert queue.sync_q.get_many() == [1, 2]


@operation("Queue")
def a_queue_in_a_cycle():
    for cls in (aiotools.Queue, aiotools.LifoQueue, aiotools.PriorityQueue, Hooked):
        queue = cls()
        queue.sync_q.put(queue)


@operation("Queue", "AsyncQueue")
def awaitables_that_are_closed():
    q = aiotools.Queue().async_q
    for awaitable in (q.get(), q.put([]), q.get_many(), q.put_many([[]]), q.join()):
        awaitable.close()


@no_memory("Queue", "LifoQueue", "PriorityQueue", "SyncQueue", kinds=("default",))
def making_and_filling_queues(fail):
    held = [None] * 3
    items = list(range(100))
    with fail:
        held[0] = aiotools.Queue()
        held[1] = aiotools.LifoQueue(200)
        held[2] = aiotools.PriorityQueue()
        held[0].sync_q.put_many(items)
        held[0].sync_q.get_many()
        held[1].sync_q.put(1)
        held[2].sync_q.put(1)
        held[2].sync_q.put(0)
        held[2].sync_q.get()


@no_memory("Queue", "SyncQueue", "QueueStatistics", "QueueShutDown", kinds=("default",))
def a_put_that_fails_leaves_the_queue_as_it_was(fail):
    queue = aiotools.Queue()
    queue.sync_q.put_many(range(62))
    try:
        with fail:
            queue.sync_q.put(62)
            queue.statistics()
            queue.shutdown()
    finally:
        n = queue.statistics().items_put
        assert n in (62, 63)
        assert queue.sync_q.get_many() == list(range(n))


@no_memory("AsyncQueue", kinds=("default",))
async def waiting_and_being_woken(fail):
    q = aiotools.Queue().async_q
    awaitable = None
    try:
        with fail:
            awaitable = q.get()
            waiter = awaitable.send(None)
            q.put_nowait(1)
            waiter.done()
    finally:
        if awaitable is not None:
            awaitable.close()
        assert q.statistics().waiting_getters == 0
