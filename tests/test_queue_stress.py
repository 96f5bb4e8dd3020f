"""Queues under stress: threads and loops together, giving up at random moments.

AIOTOOLS_STRESS_ITEMS says how many items each case moves: a few thousand by default, a million in the nightly run.
"""

import asyncio
import os
import queue as stdlib_queue
import random
import threading

import pytest

import aiotools
from conftest import make_loop
from queue_helpers import CLASSES, Thread, lanes

ITEMS = int(os.environ.get("AIOTOOLS_STRESS_ITEMS", "4000"))
THREADS = 4  # that put, and as many that get
LOOPS = 2  # that put, and as many that get
PRODUCERS = THREADS + LOOPS

pytestmark = [pytest.mark.threads, pytest.mark.timeout(60 + ITEMS // 500)]


class Stress:
    """Items are (producer, number). Each consumer keeps what it got, in its order."""

    def __init__(self, queue, seed):
        self.queue = queue
        self.seed = seed
        self.each = ITEMS // PRODUCERS
        self.got = []

    def new_consumer(self):
        got = []
        self.got.append(got)
        return got

    def thread_producer(self, producer):
        rand = random.Random(f"{self.seed} {producer}")
        q = self.queue.sync_q
        number = 0
        while number < self.each:
            way = rand.randrange(6)
            try:
                if way == 0:
                    q.put((producer, number), timeout=rand.random() * 0.001)
                    number += 1
                elif way == 1:
                    q.put_nowait((producer, number))
                    number += 1
                elif way == 2:
                    many = [(producer, i) for i in range(number, min(number + rand.randrange(20), self.each))]
                    q.put_many(many, timeout=rand.random() * 0.002)
                    number += len(many)
                else:
                    q.put((producer, number))
                    number += 1
            except stdlib_queue.Full as exc:
                number += getattr(exc, "items_put", 0)

    def thread_consumer(self):
        rand = random.Random(f"{self.seed} consumer {len(self.got)}")
        got = self.new_consumer()
        q = self.queue.sync_q
        while True:
            way = rand.randrange(6)
            try:
                if way == 0:
                    got.append(q.get(timeout=rand.random() * 0.001))
                elif way == 1:
                    got.append(q.get_nowait())
                elif way == 2:
                    got += q.get_many(rand.randrange(1, 20), timeout=rand.random() * 0.002)
                else:
                    got.append(q.get())
            except stdlib_queue.Empty:
                pass
            except aiotools.QueueShutDown:
                return

    async def cancelled_at_random(self, rand, awaitable):
        """Awaits it in a task of its own, which is cancelled after some turns. Returns (completed, result)."""
        task = asyncio.ensure_future(awaitable)
        for _ in range(rand.randrange(4)):
            if task.done():
                break
            await asyncio.sleep(0)
        task.cancel()
        try:
            return True, await task
        except asyncio.CancelledError:
            return False, None

    async def task_producer(self, producer):
        rand = random.Random(f"{self.seed} {producer}")
        q = self.queue.async_q
        number = 0
        while number < self.each:
            way = rand.randrange(6)
            if way == 0:
                completed, _ = await self.cancelled_at_random(rand, q.put((producer, number)))
                number += completed
            elif way == 1:
                many = [(producer, i) for i in range(number, min(number + rand.randrange(20), self.each))]
                put = q.put_many(many)
                await self.cancelled_at_random(rand, put)
                number += put.items_put
            elif way == 2:
                put = q.put((producer, number))
                try:
                    async with asyncio.timeout(rand.random() * 0.001):
                        await put
                except TimeoutError:
                    pass
                number += put.items_put
            else:
                await q.put((producer, number))
                number += 1

    async def task_consumer(self):
        rand = random.Random(f"{self.seed} consumer {len(self.got)}")
        got = self.new_consumer()
        q = self.queue.async_q
        while True:
            way = rand.randrange(6)
            try:
                if way == 0:
                    completed, item = await self.cancelled_at_random(rand, q.get())
                    if completed:
                        got.append(item)
                elif way == 1:
                    completed, items = await self.cancelled_at_random(rand, q.get_many(rand.randrange(1, 20)))
                    got += items or []
                elif way == 2:
                    item = None
                    try:
                        async with asyncio.timeout(rand.random() * 0.001):
                            item = await q.get()
                    except TimeoutError:
                        # It may have come together with the item.
                        pass
                    if item is not None:
                        got.append(item)
                else:
                    got.append(await q.get())
            except aiotools.QueueShutDown:
                return

    def run_loop(self, kind, function, *args):
        with asyncio.Runner(loop_factory=lambda: make_loop(kind)) as runner:
            runner.run(function(*args))

    def run(self, kind):
        consumers = [Thread(self.thread_consumer) for _ in range(THREADS)]
        consumers += [Thread(self.run_loop, kind, self.task_consumer) for _ in range(LOOPS)]
        producers = [Thread(self.thread_producer, i) for i in range(THREADS)]
        producers += [Thread(self.run_loop, kind, self.task_producer, THREADS + i) for i in range(LOOPS)]
        for thread in producers:
            thread.result(None)
        self.queue.shutdown()
        for thread in consumers:
            thread.result(None)

    def check(self, in_order):
        everything = sorted(item for got in self.got for item in got)
        assert everything == [(producer, i) for producer in range(PRODUCERS) for i in range(self.each)]
        if in_order:
            for got in self.got:
                for producer in range(PRODUCERS):
                    of_one = [i for p, i in got if p == producer]
                    assert of_one == sorted(of_one)
        now = self.queue.statistics()
        assert (now.waiting_getters, now.waiting_putters, now.qsize) == (0, 0, 0)
        assert now.items_put == now.items_got == len(everything)


@pytest.mark.parametrize("maxsize", [1, 10, 0])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_nothing_is_lost_or_doubled(cls, maxsize, loop_kind):
    stress = Stress(cls(maxsize), f"{cls.__name__} {maxsize}")
    stress.run(loop_kind)
    stress.check(in_order=cls is aiotools.Queue)


def test_the_same_with_hooks(loop_kind):
    class Hooked(lanes(aiotools.Queue)):
        def _put(self, item):
            self.normal.append(item)

    stress = Stress(Hooked(5), "hooks")
    stress.run(loop_kind)
    stress.check(in_order=True)


def test_shutdowns_at_any_moment_leave_nobody_waiting(loop_kind):
    """Each round: getters and putters in threads and tasks, and a shutdown in the middle."""
    for number in range(max(20, ITEMS // 200)):
        rand = random.Random(number)
        queue = aiotools.Queue(rand.randrange(1, 4))
        put, got = [0], [0]
        lock = threading.Lock()

        def count(counter, n=1, lock=lock):
            with lock:
                counter[0] += n

        def thread_puts(q=queue.sync_q, put=put, count=count):
            try:
                while True:
                    q.put(1)
                    count(put)
            except aiotools.QueueShutDown:
                pass

        def thread_gets(q=queue.sync_q, got=got, count=count):
            for _ in q:
                count(got)

        async def tasks_get(queue=queue, got=got, count=count):
            async def gets():
                async for _ in queue:
                    count(got)

            await asyncio.gather(gets(), gets())

        threads = [Thread(thread_puts), Thread(thread_puts), Thread(thread_gets)]
        threads.append(Thread(Stress.run_loop, None, loop_kind, tasks_get))
        while queue.statistics().items_got < rand.randrange(200):
            os.sched_yield() if hasattr(os, "sched_yield") else None
        queue.shutdown(immediate=rand.random() < 0.5)
        for thread in threads:
            thread.result()
        assert queue.statistics().items_put == put[0]
        assert queue.statistics().items_got == got[0]


def test_loops_that_close_while_they_are_woken(loop_kind):
    """Tickets of tasks that are cancelled with their loop go to who is left."""
    for number in range(max(10, ITEMS // 400)):
        queue = aiotools.Queue()
        total = 200

        def short_lived(queue=queue, number=number):
            rand = random.Random(number)
            got = []

            async def gets():
                got.append(await queue.async_q.get())

            async def main():
                tasks = [asyncio.create_task(gets()) for _ in range(5)]
                for _ in range(rand.randrange(10)):
                    await asyncio.sleep(0)
                del tasks

            for _ in range(10):
                Stress.run_loop(None, loop_kind, main)
            return got

        dying = [Thread(short_lived) for _ in range(2)]
        survivor = Thread(list, queue.sync_q)
        for i in range(total):
            queue.sync_q.put(i)
        found = [item for thread in dying for item in thread.result()]
        queue.shutdown()
        found += survivor.result()
        assert sorted(found) == list(range(total))
