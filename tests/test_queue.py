"""Queue, LifoQueue, PriorityQueue: what each side does, who is served when, what is left when something gives up."""

import asyncio
import collections.abc
import copy
import gc
import inspect
import pickle
import queue as stdlib_queue
import signal
import sys
import threading
import time

import pytest

import aiotools
from aiotools import LifoQueue, PriorityQueue, Queue, QueueShutDown
from queue_helpers import CLASSES, Thread, turns, until_blocked, waiting


class TestTheNames:
    def test_the_exceptions_are_those_of_the_standard_library(self):
        assert aiotools.SyncQueueEmpty is stdlib_queue.Empty
        assert aiotools.SyncQueueFull is stdlib_queue.Full
        assert aiotools.AsyncQueueEmpty is asyncio.QueueEmpty
        assert aiotools.AsyncQueueFull is asyncio.QueueFull
        assert issubclass(QueueShutDown, aiotools.SyncQueueShutDown)
        assert issubclass(QueueShutDown, aiotools.AsyncQueueShutDown)
        if sys.version_info >= (3, 13):
            assert aiotools.SyncQueueShutDown is stdlib_queue.ShutDown
            assert aiotools.AsyncQueueShutDown is asyncio.QueueShutDown

    def test_both_sides_have_what_their_twin_has(self):
        queue = Queue()
        for ours, theirs in ((queue.async_q, asyncio.Queue), (queue.sync_q, stdlib_queue.Queue)):
            names = [name for name, value in vars(theirs).items() if not name.startswith("_") and callable(value)]
            assert [name for name in names if not hasattr(ours, name)] == []

    def test_the_sides_stay_the_same_objects(self):
        queue = Queue()
        assert queue.sync_q is queue.sync_q and queue.async_q is queue.async_q

    @pytest.mark.parametrize("cls", [*CLASSES, aiotools.SyncQueue, aiotools.AsyncQueue])
    def test_the_classes_are_generic(self, cls):
        assert cls[int].__origin__ is cls and cls[int].__args__ == (int,)

    def test_a_subscripted_class_makes_queues(self):
        assert type(Queue[int](3)) is Queue

    def test_the_sides_cannot_be_made_by_hand(self):
        for cls in (aiotools.SyncQueue, aiotools.AsyncQueue):
            with pytest.raises(TypeError):
                cls()

    def test_a_queue_is_neither_copied_nor_pickled(self):
        queue = Queue()
        with pytest.raises(TypeError):
            copy.copy(queue)
        with pytest.raises(TypeError):
            pickle.dumps(queue)

    def test_statistics_can_be_pickled(self):
        statistics = Queue(3).statistics()
        assert pickle.loads(pickle.dumps(statistics)) == statistics

    @pytest.mark.parametrize("bad", ["1", 1.5, None])
    def test_a_bound_that_is_no_integer_is_a_type_error(self, bad):
        with pytest.raises(TypeError, match="maxsize must be an integer"):
            Queue(bad)

    def test_a_bound_that_is_too_large_is_an_overflow_error(self):
        with pytest.raises(OverflowError):
            Queue(1 << 80)

    @pytest.mark.parametrize("maxsize", [0, -1])
    def test_zero_or_less_is_no_bound(self, maxsize):
        queue = Queue(maxsize)
        assert queue.maxsize == maxsize
        queue.sync_q.put_many(range(1000))
        assert not queue.full() and queue.qsize() == 1000

    def test_a_queue_is_initialized_once(self):
        queue = Queue(3)
        with pytest.raises(RuntimeError, match="only once"):
            queue.__init__(4)
        assert queue.maxsize == 3

    def test_the_repr_tells_the_state(self):
        queue = Queue(3)
        queue.sync_q.put(1)
        for face, name in ((queue, "Queue"), (queue.sync_q, "SyncQueue"), (queue.async_q, "AsyncQueue")):
            assert repr(face).startswith(f"<{name} at 0x")
            assert repr(face).endswith(" maxsize=3 qsize=1 unfinished_tasks=1>")
        queue.shutdown()
        assert repr(queue).endswith(" shutdown>")


class TestOrder:
    @pytest.mark.parametrize(
        "cls, expected",
        [(Queue, lambda items: items), (LifoQueue, lambda items: items[::-1]), (PriorityQueue, sorted)],
    )
    async def test_items_come_out_in_the_order_of_the_class(self, cls, expected):
        items = [(i * 7919) % 1000 for i in range(300)]
        queue = cls()
        for i, item in enumerate(items):
            await queue.async_q.put(item) if i % 2 else queue.sync_q.put(item)
        assert queue.peek() == queue.async_q.peek() == queue.sync_q.peek() == expected(items)[0]
        found = [await queue.async_q.get() if i % 3 else queue.sync_q.get() for i in range(300)]
        assert found == expected(items)

    def test_equal_priorities_come_out_as_from_the_standard_library(self):
        class Item:
            def __init__(self, priority, name):
                self.priority = priority
                self.name = name

            def __lt__(self, other):
                return self.priority < other.priority

        ours, theirs = PriorityQueue().sync_q, stdlib_queue.PriorityQueue()
        for i in range(400):
            if (i * 7) % 5 < 3 or theirs.empty():
                item = Item((i * 31) % 7, i)
                ours.put(item)
                theirs.put(item)
            else:
                assert ours.get() is theirs.get()
        while not theirs.empty():
            assert ours.get() is theirs.get()

    async def test_getters_are_served_in_the_order_they_came(self):
        q = Queue().async_q
        served = []

        async def getter(name):
            served.append((name, await q.get()))

        tasks = [asyncio.create_task(getter(i)) for i in range(5)]
        await turns()
        for i in range(5):
            q.put_nowait(i)
        await asyncio.gather(*tasks)
        assert served == [(i, i) for i in range(5)]

    async def test_putters_are_served_in_the_order_they_came(self):
        q = Queue(1).async_q
        await q.put("first")
        tasks = [asyncio.create_task(q.put(i)) for i in range(5)]
        await turns()
        assert [await q.get() for _ in range(6)] == ["first", 0, 1, 2, 3, 4]
        await asyncio.gather(*tasks)

    async def test_threads_and_tasks_stand_in_one_line(self):
        queue = Queue()
        threads, tasks = [], []
        for i in range(3):
            threads.append(Thread(queue.sync_q.get))
            await waiting(queue, getters=2 * i + 1)
            tasks.append(asyncio.create_task(queue.async_q.get()))
            await waiting(queue, getters=2 * i + 2)
        for i in range(3):
            queue.sync_q.put(2 * i)
            assert await asyncio.to_thread(threads[i].result) == 2 * i
            queue.sync_q.put(2 * i + 1)
            assert await tasks[i] == 2 * i + 1

    async def test_a_suspending_get_queues_behind_one_that_was_woken(self):
        q = Queue().async_q
        first = asyncio.create_task(q.get())
        await turns()
        q.put_nowait(1)
        q.put_nowait(2)
        # The first has its ticket, but has not resumed yet.
        assert await q.get() == 2
        assert await first == 1

    async def test_a_suspending_put_queues_behind_one_that_was_woken(self):
        q = Queue(1).async_q
        q.put_nowait(0)
        first = asyncio.create_task(q.put(1))
        await turns()
        assert q.get_nowait() == 0
        second = asyncio.create_task(q.put(2))
        await first
        assert await q.get() == 1
        await second
        assert await q.get() == 2

    async def test_who_was_overtaken_keeps_its_place(self):
        q = Queue().async_q
        served = []

        async def getter(name):
            served.append((name, await q.get()))

        tasks = [asyncio.create_task(getter(i)) for i in range(4)]
        await turns()
        q.put_nowait("a")
        q.put_nowait("b")
        assert q.get_nowait() == "a" and q.get_nowait() == "b"
        await turns()
        assert served == [] and q.statistics().waiting_getters == 4
        for i in range(4):
            q.put_nowait(i)
        await asyncio.gather(*tasks)
        assert served == [(i, i) for i in range(4)]

    async def test_a_putter_that_was_overtaken_keeps_its_place(self):
        q = Queue(1).async_q
        q.put_nowait("a")
        tasks = [asyncio.create_task(q.put(i)) for i in range(3)]
        await turns()
        assert q.get_nowait() == "a"
        q.put_nowait("b")
        await turns()
        assert [await q.get() for _ in range(4)] == ["b", 0, 1, 2]
        await asyncio.gather(*tasks)


class TestTheAsyncSide:
    async def test_get_and_put_return_coroutines(self):
        q = Queue().async_q
        for awaitable in (q.get(), q.put(1), q.get_many(), q.put_many([1]), q.join(), Queue().aclose()):
            assert isinstance(awaitable, collections.abc.Coroutine) and asyncio.iscoroutine(awaitable)
            awaitable.close()

    async def test_nothing_happens_before_the_await(self):
        q = Queue().async_q
        put = q.put(1)
        assert q.empty()
        await put
        assert q.qsize() == 1

    async def test_an_awaitable_can_be_awaited_once(self):
        q = Queue().async_q
        put = q.put(1)
        await put
        with pytest.raises(RuntimeError, match=r"cannot reuse already awaited Queue\.put"):
            await put
        assert q.qsize() == 1

    def test_one_that_is_dropped_warns(self):
        q = Queue().async_q
        with pytest.warns(RuntimeWarning, match=r"coroutine 'Queue\.get' was never awaited"):
            q.get()
            gc.collect()

    async def test_they_go_through_asyncios_functions(self):
        q = Queue().async_q
        await asyncio.gather(q.put(1), q.put(2))
        assert await asyncio.wait_for(q.get(), 10) == 1
        task = asyncio.create_task(q.get(), name="getter")
        done, _ = await asyncio.wait([task])
        assert done == {task} and task.result() == 2
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(q.get(), 0.001)

    def test_nowait_methods_need_no_loop(self):
        q = Queue(1).async_q
        q.put_nowait(1)
        with pytest.raises(asyncio.QueueFull):
            q.put_nowait(2)
        assert q.get_nowait() == 1
        with pytest.raises(asyncio.QueueEmpty):
            q.get_nowait()
        with pytest.raises(asyncio.QueueEmpty):
            q.peek()

    def test_what_need_not_wait_needs_no_loop(self):
        q = Queue().async_q
        with pytest.raises(StopIteration):
            q.put(1).send(None)
        with pytest.raises(StopIteration) as info:
            q.get().send(None)
        assert info.value.value == 1
        with pytest.raises(RuntimeError, match="no running event loop"):
            q.get().send(None)
        assert q.statistics().waiting_getters == 0

    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="counts the turns of a task that starts lazily")
    async def test_a_waiter_is_woken_in_the_same_loop_iteration(self):
        loop = asyncio.get_running_loop()
        q = Queue().async_q
        task = asyncio.create_task(q.get())
        await turns()
        seen = []
        q.put_nowait(1)
        loop.call_soon(lambda: loop.call_soon(lambda: seen.append(task.done())))
        await turns(4)
        assert seen == [True]

    async def test_a_waiter_is_not_woken_inside_the_put(self):
        q = Queue().async_q
        task = asyncio.create_task(q.get())
        await turns()
        q.put_nowait(1)
        assert not task.done() and q.qsize() == 1
        assert await task == 1

    def test_a_put_without_a_running_loop_wakes_a_task_of_a_stopped_one(self, new_loop):
        loop = new_loop()
        q = Queue().async_q
        task = loop.create_task(q.get())
        loop.run_until_complete(turns())
        q.put_nowait(1)
        assert loop.run_until_complete(task) == 1

    async def test_iteration_ends_with_the_shutdown(self):
        queue = Queue()
        queue.sync_q.put_many(range(3))
        seen = []

        async def consume():
            async for item in queue:
                seen.append(item)

        task = asyncio.create_task(consume())
        await waiting(queue, getters=1)
        queue.sync_q.put(3)
        await turns()
        queue.shutdown()
        await task
        assert seen == [0, 1, 2, 3]
        assert [item async for item in queue.async_q] == []

    async def test_keywords_work(self):
        q = Queue(10).async_q
        await q.put(item=1)
        q.put_nowait(item=2)
        await q.put_many(items=[3, 4])
        q.put_many_nowait(items=[5])
        assert await q.get_many(max=2) == [1, 2]
        assert q.get_many_nowait(max=10) == [3, 4, 5]
        for call in (lambda: q.put(), lambda: q.put(1, 2), lambda: q.put(thing=1)):
            with pytest.raises(TypeError):
                call()

    async def test_a_task_that_waits_is_kept_alive_by_the_queue(self):
        q = Queue().async_q
        seen = []

        async def consume():
            seen.append(await q.get())

        asyncio.create_task(consume())
        await turns()
        gc.collect()
        q.put_nowait(1)
        await turns()
        assert seen == [1]

    async def test_one_driven_by_hand_without_waiting_says_so(self):
        q = Queue().async_q
        get = q.get()
        get.send(None)
        with pytest.raises(RuntimeError, match="resumed before"):
            get.send(None)
        assert q.statistics().waiting_getters == 0


class TestTheSyncSide:
    def test_get_and_put_without_waiting(self):
        q = Queue(1).sync_q
        with pytest.raises(stdlib_queue.Empty):
            q.get(False)
        with pytest.raises(stdlib_queue.Empty):
            q.get_nowait()
        with pytest.raises(stdlib_queue.Empty):
            q.peek()
        q.put(1)
        for call in (lambda: q.put(2, False), lambda: q.put(2, block=False, timeout=-1), lambda: q.put_nowait(2)):
            with pytest.raises(stdlib_queue.Full):
                call()
        assert q.full() and q.get(True, 1) == 1 and q.empty()

    def test_a_timeout_ends_the_wait(self):
        q = Queue(1).sync_q
        begin = time.monotonic()
        with pytest.raises(stdlib_queue.Empty):
            q.get(timeout=0.02)
        q.put(1)
        with pytest.raises(stdlib_queue.Full):
            q.put(2, timeout=0.02)
        assert time.monotonic() - begin >= 0.04
        assert q.qsize() == 1
        statistics = q.statistics()
        assert (statistics.waiting_getters, statistics.waiting_putters) == (0, 0)

    def test_a_timeout_of_zero_does_not_wait(self):
        q = Queue(1).sync_q
        with pytest.raises(stdlib_queue.Empty):
            q.get(timeout=0)
        q.put(1, timeout=0)
        with pytest.raises(stdlib_queue.Full):
            q.put(1, timeout=0)

    @pytest.mark.parametrize(
        "timeout, error", [(-1, ValueError), (-0.5, ValueError), (float("nan"), ValueError), ("1", TypeError)]
    )
    def test_a_bad_timeout_is_refused_at_once(self, timeout, error):
        q = Queue().sync_q
        for call in (q.get, q.get_many, q.join, lambda timeout: q.put(1, timeout=timeout)):
            with pytest.raises(error, match="timeout"):
                call(timeout=timeout)
        assert q.qsize() == 0

    @pytest.mark.parametrize("timeout", [None, float("inf"), 1e300])
    def test_a_put_wakes_a_blocked_get(self, timeout):
        queue = Queue()
        thread = Thread(lambda: queue.sync_q.get(timeout=timeout))
        until_blocked(queue, getters=1)
        queue.sync_q.put(1)
        assert thread.result() == 1

    def test_a_get_wakes_a_blocked_put(self):
        queue = Queue(1)
        queue.sync_q.put(1)
        thread = Thread(queue.sync_q.put, 2)
        until_blocked(queue, putters=1)
        assert queue.sync_q.get() == 1
        thread.result()
        assert queue.sync_q.get() == 2

    def test_iteration_ends_with_the_shutdown(self):
        queue = Queue()
        queue.sync_q.put_many(range(3))
        thread = Thread(list, queue.sync_q)
        until_blocked(queue, getters=1)
        queue.sync_q.put(3)
        queue.shutdown()
        assert thread.result() == [0, 1, 2, 3]

    def test_join_waits_for_all_tasks(self):
        queue = Queue()
        q = queue.sync_q
        q.put_many([1, 2])
        thread = Thread(q.join)
        until_blocked(queue, joiners=1)
        q.get_many()
        q.task_done()
        with pytest.raises(TimeoutError, match="join"):
            q.join(timeout=0.001)
        q.task_done()
        thread.result()
        q.join()
        with pytest.raises(ValueError, match="called too many times"):
            q.task_done()

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a signal")
    @pytest.mark.parametrize("what", ["get", "put", "join"])
    def test_a_signal_handler_that_raises_interrupts_the_wait(self, what):
        class Interrupt(Exception):
            pass

        def handler(number, frame):
            raise Interrupt

        queue = Queue(1)
        if what != "get":
            queue.sync_q.put(1)
        wait = {"get": queue.sync_q.get, "put": lambda: queue.sync_q.put(2), "join": queue.sync_q.join}[what]
        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(Interrupt):
                wait()
        finally:
            signal.signal(signal.SIGALRM, before)
        now = queue.statistics()
        assert (now.waiting_getters, now.waiting_putters, now.waiting_joiners) == (0, 0, 0)

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a signal")
    def test_a_signal_handler_that_returns_does_not_end_the_wait(self):
        queue = Queue()
        before = signal.signal(signal.SIGALRM, lambda number, frame: queue.sync_q.put("from the handler"))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            assert queue.sync_q.get() == "from the handler"
        finally:
            signal.signal(signal.SIGALRM, before)


class TestAcrossThreads:
    async def test_a_thread_wakes_a_task_and_a_task_wakes_a_thread(self):
        queue = Queue(1)
        thread = Thread(lambda: [queue.sync_q.put(i) for i in range(100)])
        assert [await queue.async_q.get() for _ in range(100)] == list(range(100))
        thread.result()
        thread = Thread(lambda: [queue.sync_q.get() for _ in range(100)])
        for i in range(100):
            await queue.async_q.put(i)
        assert await asyncio.to_thread(thread.result) == list(range(100))

    async def test_a_burst_from_a_thread_costs_one_thread_safe_call(self):
        queue = Queue()
        loop = asyncio.get_running_loop()
        calls = []
        original = loop.call_soon_threadsafe

        def counting(callback, *args, **kwargs):
            if type(callback).__name__ == "PostCall":
                calls.append(callback)
            return original(callback, *args, **kwargs)

        loop.call_soon_threadsafe = counting
        try:
            tasks = [asyncio.create_task(queue.async_q.get()) for _ in range(10)]
            await waiting(queue, getters=10)
            # The loop cannot turn while it waits for the thread.
            Thread(lambda: [queue.sync_q.put(i) for i in range(10)]).result()
            assert await asyncio.gather(*tasks) == list(range(10))
        finally:
            del loop.call_soon_threadsafe
        assert len(calls) == 1

    def test_many_loops_share_one_queue(self, new_loop):
        queue = Queue(3)

        def consumer():
            async def consume():
                return [item async for item in queue]

            with asyncio.Runner(loop_factory=new_loop) as runner:
                return runner.run(consume())

        def producer(start):
            async def produce():
                for i in range(start, start + 50):
                    await queue.async_q.put(i)

            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(produce())

        consumers = [Thread(consumer) for _ in range(2)]
        producers = [Thread(producer, start) for start in (0, 100)]
        for thread in producers:
            thread.result()
        queue.shutdown()
        found = [thread.result() for thread in consumers]
        assert sorted(found[0] + found[1]) == [*range(50), *range(100, 150)]
        for items in found:
            for of_one in ([i for i in items if i < 100], [i for i in items if i >= 100]):
                assert of_one == sorted(of_one)

    def test_a_ticket_of_a_closed_loop_goes_to_the_next(self, new_loop, recwarn):
        queue = Queue()
        loops = [new_loop() for _ in range(2)]
        gets = [queue.async_q.get() for _ in range(200)]
        for i, get in enumerate(gets):

            async def first_step(get=get):
                get.send(None)

            loops[i % 2].run_until_complete(first_step())
        for loop in loops:
            loop.close()
        thread = Thread(queue.sync_q.get)
        until_blocked(queue, getters=201)
        queue.sync_q.put("for the living")
        assert thread.result() == "for the living"
        for get in gets:
            get.close()
        assert queue.statistics().waiting_getters == 0


class TestGivingUp:
    async def test_a_cancelled_getter_has_taken_nothing(self):
        q = Queue().async_q
        first, second = asyncio.create_task(q.get()), asyncio.create_task(q.get())
        await turns()
        first.cancel()
        await asyncio.wait([first])
        q.put_nowait(1)
        assert await second == 1 and q.empty()

    async def test_one_cancelled_between_its_wake_up_and_its_resumption_wakes_the_next(self):
        q = Queue().async_q
        first, second = asyncio.create_task(q.get()), asyncio.create_task(q.get())
        await turns()
        q.put_nowait(1)
        first.cancel()
        assert await second == 1
        assert first.cancelled() and q.empty()

    async def test_a_putter_cancelled_after_its_wake_up_gives_its_room_to_the_next(self):
        q = Queue(1).async_q
        q.put_nowait(0)
        first, second = asyncio.create_task(q.put(1)), asyncio.create_task(q.put(2))
        await turns()
        assert q.get_nowait() == 0
        first.cancel()
        await second
        assert await q.get() == 2 and q.empty() and first.cancelled()

    async def test_a_ticket_given_up_goes_to_a_thread(self):
        queue = Queue()
        task = asyncio.create_task(queue.async_q.get())
        await waiting(queue, getters=1)
        thread = Thread(queue.sync_q.get)
        await waiting(queue, getters=2)
        queue.sync_q.put(1)
        task.cancel()
        await asyncio.wait([task])
        assert await asyncio.to_thread(thread.result) == 1

    async def test_the_message_of_the_cancellation_is_kept(self):
        task = asyncio.create_task(Queue().async_q.get())
        await turns()
        task.cancel("why")
        with pytest.raises(asyncio.CancelledError, match="why"):
            await task

    async def test_a_put_many_that_is_cancelled_says_how_far_it_got(self):
        q = Queue(2).async_q
        put = q.put_many(range(5))
        task = asyncio.create_task(put)
        await turns()
        assert await q.get() == 0
        await turns()
        task.cancel()
        await asyncio.wait([task])
        assert put.items_put == 3
        assert q.get_many_nowait() == [1, 2]

    async def test_a_scenario_with_a_cancellation_at_each_suspension(self):
        """Everything goes through, whichever get or put is cancelled, and whenever."""
        for victim in range(8):
            for moment in range(6):
                queue = Queue(2)
                q = queue.async_q
                got, put = [], []

                async def getter(q=q, got=got):
                    got.append(await q.get())

                async def putter(i, q=q, put=put):
                    await q.put(i)
                    put.append(i)

                tasks = []
                for i in range(4):
                    tasks += [asyncio.create_task(putter(i)), asyncio.create_task(putter(10 + i))]
                    if i % 2:
                        tasks += [asyncio.create_task(getter()), asyncio.create_task(getter())]
                for _ in range(moment):
                    await asyncio.sleep(0)
                tasks[victim].cancel()
                await turns(6)
                while not q.empty() or queue.statistics().waiting_putters:
                    got.append(await q.get())
                    await turns(2)
                while queue.statistics().waiting_getters:
                    await putter(99)
                    await turns(2)
                await asyncio.gather(*tasks, return_exceptions=True)
                assert sorted(got) == sorted(put), (victim, moment)
                now = queue.statistics()
                assert (now.waiting_getters, now.waiting_putters, now.qsize) == (0, 0, 0)

    async def test_a_close_of_the_awaitable_leaves_the_line(self):
        q = Queue().async_q
        get = q.get()
        get.send(None)
        assert q.statistics().waiting_getters == 1
        get.close()
        assert q.statistics().waiting_getters == 0


class TestBulk:
    async def test_put_many_and_get_many(self):
        q = Queue().async_q
        await q.put_many(i for i in range(200))
        assert await q.get_many(3) == [0, 1, 2]
        assert await q.get_many() == list(range(3, 200))
        await q.put_many([])
        assert q.empty() and q.unfinished_tasks == 200

    async def test_get_many_waits_for_the_first_only(self):
        q = Queue().async_q
        task = asyncio.create_task(q.get_many(5))
        await turns()
        q.put_many_nowait([1, 2])
        assert await task == [1, 2]

    async def test_get_many_leaves_what_was_promised_to_others(self):
        q = Queue().async_q
        first, second = asyncio.create_task(q.get_many()), asyncio.create_task(q.get())
        await turns()
        q.put_many_nowait([1, 2, 3])
        assert await first == [1, 2] and await second == 3

    async def test_a_put_many_that_waits_stands_in_line_like_others(self):
        q = Queue(2).async_q
        bulk = asyncio.create_task(q.put_many(range(6)))
        await turns()
        singles = [asyncio.create_task(q.put(str(i))) for i in range(2)]
        await turns()
        found = [await q.get() for _ in range(8)]
        await asyncio.gather(bulk, *singles)
        assert [item for item in found if type(item) is int] == list(range(6))
        assert [item for item in found if type(item) is str] == ["0", "1"]
        assert found[:3] == [0, 1, 2]

    def test_the_sync_side(self):
        queue = Queue(10)
        q = queue.sync_q
        with pytest.raises(stdlib_queue.Full) as info:
            q.put_many(range(12), timeout=0.001)
        assert info.value.items_put == 10
        with pytest.raises(stdlib_queue.Full) as info:
            q.put_many([1], block=False)
        assert info.value.items_put == 0
        assert q.get_many(4, block=False) == [0, 1, 2, 3]
        assert q.get_many(timeout=1) == [4, 5, 6, 7, 8, 9]
        with pytest.raises(stdlib_queue.Empty):
            q.get_many(block=False)
        with pytest.raises(stdlib_queue.Empty):
            q.get_many(timeout=0.001)
        thread = Thread(lambda: q.put_many(range(25)))
        found = []
        while len(found) < 25:
            found += q.get_many(timeout=30)
        thread.result()
        assert found == list(range(25))

    async def test_without_waiting_on_the_async_side(self):
        q = Queue(2).async_q
        with pytest.raises(asyncio.QueueFull) as info:
            q.put_many_nowait([1, 2, 3])
        assert info.value.items_put == 2
        assert q.get_many_nowait(1) == [1]
        assert q.get_many_nowait() == [2]
        with pytest.raises(asyncio.QueueEmpty):
            q.get_many_nowait()

    async def test_a_shutdown_in_the_middle_says_how_many_were_put(self):
        queue = Queue(2)
        task = asyncio.create_task(queue.async_q.put_many(range(5)))
        await waiting(queue, putters=1)
        queue.shutdown()
        with pytest.raises(QueueShutDown) as info:
            await task
        assert info.value.items_put == 2

    @pytest.mark.parametrize("max, error", [(0, ValueError), (-3, ValueError), ("1", TypeError), (1.0, TypeError)])
    def test_a_bad_maximum_is_refused_at_the_call(self, max, error):
        q = Queue()
        for call in (q.async_q.get_many, q.async_q.get_many_nowait, q.sync_q.get_many):
            with pytest.raises(error, match="max must be"):
                call(max)

    def test_items_that_cannot_be_iterated_are_refused_at_the_call(self):
        q = Queue()
        for call in (q.async_q.put_many, q.async_q.put_many_nowait, q.sync_q.put_many):
            with pytest.raises(TypeError, match="not iterable"):
                call(1)

    async def test_priorities_in_bulk(self):
        q = PriorityQueue().async_q
        await q.put_many([3, 1, 2])
        assert await q.get_many(2) == [1, 2]
        q = LifoQueue().async_q
        await q.put_many(range(100))
        assert await q.get_many() == list(range(99, -1, -1))


@pytest.mark.parametrize("cls", CLASSES)
class TestShutdown:
    async def test_what_is_in_it_can_still_be_got(self, cls):
        queue = cls()
        queue.sync_q.put_many([1, 1])
        queue.shutdown()
        assert queue.closed and queue.sync_q.closed and queue.async_q.closed
        for put in (queue.async_q.put_nowait, queue.sync_q.put, queue.sync_q.put_nowait):
            with pytest.raises(QueueShutDown):
                put(1)
        with pytest.raises(QueueShutDown):
            await queue.async_q.put(1)
        assert queue.sync_q.get() == 1 and await queue.async_q.get() == 1
        for get in (queue.async_q.get_nowait, queue.sync_q.get, queue.sync_q.get_nowait, queue.sync_q.get_many):
            with pytest.raises(QueueShutDown):
                get()
        with pytest.raises(QueueShutDown):
            await queue.async_q.get()
        queue.shutdown()

    async def test_at_once_it_drops_the_items(self, cls):
        queue = cls()
        queue.sync_q.put_many([1, 1, 1])
        queue.sync_q.get()
        joiner = asyncio.create_task(queue.async_q.join())
        await turns()
        queue.shutdown(immediate=True)
        assert queue.qsize() == 0 and queue.unfinished_tasks == 1
        with pytest.raises(QueueShutDown):
            queue.sync_q.get(timeout=10)
        queue.sync_q.task_done()
        await joiner

    async def test_all_who_wait_go_on(self, cls):
        queue = cls(1)
        getters = [asyncio.create_task(queue.async_q.get()) for _ in range(3)]
        await waiting(queue, getters=3)
        thread = Thread(queue.sync_q.get)
        await waiting(queue, getters=4)
        queue.sync_q.shutdown()
        for task in getters:
            with pytest.raises(QueueShutDown):
                await task
        with pytest.raises(stdlib_queue.ShutDown if sys.version_info >= (3, 13) else QueueShutDown):
            await asyncio.to_thread(thread.result)

    async def test_putters_who_wait_go_on(self, cls):
        queue = cls(1)
        queue.sync_q.put(1)
        putter = asyncio.create_task(queue.async_q.put(2))
        await waiting(queue, putters=1)
        thread = Thread(queue.sync_q.put, 3)
        await waiting(queue, putters=2)
        queue.async_q.shutdown()
        with pytest.raises(asyncio.QueueShutDown if sys.version_info >= (3, 13) else QueueShutDown):
            await putter
        with pytest.raises(QueueShutDown):
            await asyncio.to_thread(thread.result)
        assert queue.qsize() == 1

    async def test_one_who_waits_behind_a_ticket_is_not_forgotten(self, cls):
        queue = cls()
        q = queue.async_q
        first = asyncio.create_task(q.get())
        await waiting(queue, getters=1)
        q.put_nowait(1)
        second = asyncio.create_task(q.get())
        queue.shutdown()
        assert await first == 1
        with pytest.raises(QueueShutDown):
            await second

    async def test_close_and_its_relatives(self, cls):
        queue = cls()
        with pytest.raises(RuntimeError, match="non-closed"):
            await queue.wait_closed()
        queue.sync_q.put(1)
        lazy = queue.aclose()
        assert not queue.closed
        await lazy
        assert queue.closed and queue.qsize() == 0 and queue.unfinished_tasks == 0
        await queue.wait_closed()
        queue.close()
        await queue.aclose()

    async def test_nothing_needs_to_be_closed(self, cls):
        queue = cls()
        queue.sync_q.put(1)
        assert threading.active_count() == 1
        del queue


class TestJoin:
    async def test_both_sides_wait_for_all_tasks(self):
        queue = Queue()
        await queue.async_q.join()
        queue.sync_q.put_many([1, 2])
        assert queue.unfinished_tasks == queue.sync_q.unfinished_tasks == queue.async_q.unfinished_tasks == 2
        joiners = [asyncio.create_task(queue.async_q.join()) for _ in range(2)]
        thread = Thread(queue.sync_q.join)
        await waiting(queue, joiners=3)
        await queue.async_q.get_many()
        queue.task_done()
        await turns()
        assert not joiners[0].done()
        queue.async_q.task_done()
        await asyncio.gather(*joiners)
        await asyncio.to_thread(thread.result)

    async def test_a_cancelled_join_leaves(self):
        queue = Queue()
        queue.sync_q.put(1)
        task = asyncio.create_task(queue.async_q.join())
        await waiting(queue, joiners=1)
        task.cancel()
        await asyncio.wait([task])
        await waiting(queue)


class TestStatistics:
    async def test_the_numbers(self):
        queue = Queue(3)
        queue.sync_q.put_many([1, 2, 3])
        putter = asyncio.create_task(queue.async_q.put(4))
        joiner = asyncio.create_task(queue.async_q.join())
        await waiting(queue, putters=1, joiners=1)
        assert queue.statistics() == queue.sync_q.statistics() == queue.async_q.statistics()
        assert queue.statistics()._asdict() == {
            "maxsize": 3,
            "qsize": 3,
            "peak_qsize": 3,
            "unfinished_tasks": 3,
            "waiting_getters": 0,
            "waiting_putters": 1,
            "waiting_joiners": 1,
            "items_put": 3,
            "items_got": 0,
            "is_shutdown": False,
        }
        assert await queue.async_q.get_many() == [1, 2, 3]
        await putter
        for _ in range(4):
            queue.task_done()
        await joiner
        queue.shutdown()
        now = queue.statistics()
        assert (now.qsize, now.peak_qsize, now.items_put, now.items_got, now.is_shutdown) == (1, 3, 4, 3, True)


def test_the_signatures_are_those_of_the_twins():
    assert str(inspect.signature(aiotools.SyncQueue.get)) == "(self, /, block=True, timeout=None)"
    assert str(inspect.signature(aiotools.SyncQueue.put)) == "(self, /, item, block=True, timeout=None)"
    assert str(inspect.signature(aiotools.AsyncQueue.put)) == "(self, /, item)"
    assert str(inspect.signature(Queue)) == "(maxsize=0)"
