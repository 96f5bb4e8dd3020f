"""Hooks of subclasses, and priorities: what can run Python code while a queue changes."""

import asyncio
import sys
import threading

import pytest

from aiotools import PriorityQueue, Queue
from queue_helpers import CLASSES, Thread, lanes, turns, waiting


class TestHooks:
    async def test_a_subclass_may_hold_the_items(self):
        queue = lanes(Queue)(4)
        assert queue.bound == queue.maxsize == 4
        await queue.async_q.put_many([1, -1, 2, -2])
        assert queue.full() and queue.qsize() == 4 and queue.peek() == -1
        putter = asyncio.create_task(queue.async_q.put(3))
        await waiting(queue, putters=1)
        assert await queue.async_q.get_many() == [-1, -2, 1, 2]
        await putter
        assert queue.sync_q.get() == 3 and queue.empty()
        getter = asyncio.create_task(queue.async_q.get())
        await waiting(queue, getters=1)
        queue.sync_q.put(7)
        assert await getter == 7
        queue.sync_q.put_many([1, 2])
        queue.shutdown(immediate=True)
        assert queue.qsize() == 0 and queue.urgent == queue.normal == []
        assert queue.unfinished_tasks == 6

    async def test_it_works_between_threads(self):
        queue = lanes(Queue)(2)
        thread = Thread(lambda: queue.sync_q.put_many(range(200)))
        assert [await queue.async_q.get() for _ in range(200)] == list(range(200))
        thread.result()

    def test_a_subclass_may_override_one_and_call_super(self):
        class NoDoubles(Queue):
            def _init(self, maxsize):
                super()._init(maxsize)
                self.seen = set()

            def _put(self, item):
                if item not in self.seen:
                    self.seen.add(item)
                    super()._put(item)

        q = NoDoubles().sync_q
        q.put_many([1, 1, 2, 1, 3])
        assert q.qsize() == 3 and q.peek() == 1
        assert q.get_many() == [1, 2, 3]

        class Loud(PriorityQueue):
            def _get(self):
                return ("got", super()._get())

            def _peek(self):
                return ("peeked", super()._peek())

            def _qsize(self):
                return super()._qsize()

        q = Loud().sync_q
        q.put_many([3, 1, 2])
        assert q.peek() == ("peeked", 1)
        assert q.get_many() == [("got", 1), ("got", 2), ("got", 3)]

    async def test_an_item_that_a_hook_drops_wakes_nobody_for_good(self):
        class Picky(Queue):
            def _put(self, item):
                if item:
                    super()._put(item)

        queue = Picky()
        getter = asyncio.create_task(queue.async_q.get())
        await waiting(queue, getters=1)
        queue.sync_q.put(0)
        await turns()
        assert not getter.done()
        queue.sync_q.put(1)
        assert await getter == 1

    def test_a_subclass_without_hooks_is_as_fast_as_the_class(self):
        class Plain(Queue):
            colour = "red"

        queue = Plain(1)
        queue.extra = 1
        queue.sync_q.put(1)
        assert queue.sync_q.get() == 1
        with pytest.raises(RuntimeError, match="hook of a subclass"):
            queue._put(1)

    @pytest.mark.parametrize("call", [lambda q: q._init(1), Queue._qsize, lambda q: q._put(1), Queue._get])
    def test_hooks_are_not_for_others(self, call):
        for cls in CLASSES:
            with pytest.raises(RuntimeError, match="hook of a subclass"):
                call(cls())

    @pytest.mark.parametrize("hook", ["_qsize", "_put"])
    async def test_a_put_hook_that_raises_leaves_all_unchanged(self, hook):
        queue = lanes(Queue)(3)
        queue.sync_q.put(1)
        before = queue.statistics()
        queue.fail = hook
        with pytest.raises(LookupError, match=hook):
            await queue.async_q.put(2)
        with pytest.raises(LookupError):
            queue.sync_q.put(2)
        with pytest.raises(LookupError):
            queue.async_q.put_nowait(2)
        with pytest.raises(LookupError) as info:
            queue.sync_q.put_many([2])
        assert info.value.items_put == 0
        queue.fail = None
        assert queue.statistics() == before

    @pytest.mark.parametrize("hook", ["_qsize", "_get", "_peek"])
    async def test_a_get_hook_that_raises_leaves_all_unchanged(self, hook):
        queue = lanes(Queue)(3)
        queue.sync_q.put(1)
        before = queue.statistics()
        queue.fail = hook
        if hook == "_peek":
            calls = [queue.peek]
        else:
            calls = [queue.sync_q.get, queue.async_q.get_nowait, queue.sync_q.get_many]
            with pytest.raises(LookupError):
                await queue.async_q.get()
        for call in calls:
            with pytest.raises(LookupError, match=hook):
                call()
        queue.fail = None
        assert queue.statistics() == before

    async def test_a_getter_whose_hook_raises_wakes_the_next(self):
        class OnceOnly(lanes(Queue)):
            def _check(self, hook):
                if self.fail == hook:
                    self.fail = None
                    raise LookupError(hook)

        queue = OnceOnly()
        getters = [asyncio.create_task(queue.async_q.get()) for _ in range(2)]
        await waiting(queue, getters=2)
        queue.sync_q.put(1)
        queue.fail = "_get"
        with pytest.raises(LookupError):
            await getters[0]
        assert await getters[1] == 1

    def test_a_shutdown_whose_hook_raises_is_one_all_the_same(self):
        queue = lanes(Queue)()
        queue.sync_q.put_many([1, 2])
        queue.fail = "_get"
        with pytest.raises(LookupError):
            queue.shutdown(immediate=True)
        assert queue.closed
        queue.fail = None
        queue.shutdown(immediate=True)
        assert queue.qsize() == 0 and queue.unfinished_tasks == 0

    def test_a_get_many_hands_over_what_it_has_when_a_hook_raises(self, monkeypatch):
        class Once(Queue):
            def _get(self):
                item = super()._get()
                if item == 2:
                    super()._put(item)
                    raise LookupError
                return item

        told = []
        monkeypatch.setattr(sys, "unraisablehook", lambda args: told.append(args.exc_value))
        q = Once().sync_q
        q.put_many([1, 2])
        assert q.get_many() == [1]
        assert len(told) == 1 and isinstance(told[0], LookupError)
        with pytest.raises(LookupError):
            q.get()

    def test_an_init_hook_that_raises(self):
        class Broken(Queue):
            def _init(self, maxsize):
                raise LookupError("no")

        with pytest.raises(LookupError, match="no"):
            Broken()

    @pytest.mark.parametrize("size, error", [(-1, ValueError), ("1", TypeError), (1 << 70, OverflowError)])
    def test_a_size_that_makes_no_sense(self, size, error):
        class Strange(Queue):
            def _qsize(self):
                return size

        for call in (Strange().sync_q.qsize, Strange().sync_q.get, lambda: Strange().sync_q.put(1)):
            with pytest.raises(error):
                call()

    def test_peek_needs_a_hook_of_its_own(self):
        class Own(Queue):
            def _get(self):
                return super()._get()

        queue = Own()
        with pytest.raises(asyncio.QueueEmpty):
            queue.peek()
        queue.sync_q.put(1)
        with pytest.raises(NotImplementedError, match="_peek"):
            queue.peek()

    @pytest.mark.parametrize("method", ["put", "get", "qsize", "shutdown", "peek", "put_many", "get_many"])
    def test_using_the_queue_from_its_own_hook_is_an_error(self, method):
        class Reentrant(Queue):
            def _put(self, item):
                args = {"put": [item], "put_many": [[item]], "get": [False], "get_many": [1, False]}.get(method, [])
                getattr(self.sync_q, method)(*args)
                super()._put(item)

            def _qsize(self):
                return super()._qsize()

        queue = Reentrant()
        with pytest.raises(RuntimeError, match="own hooks"):
            queue.sync_q.put(1)
        assert queue.qsize() == 0 and queue.unfinished_tasks == 0

    def test_a_thread_waits_for_the_hook_of_another(self):
        inside, go_on = threading.Event(), threading.Event()

        class Slow(Queue):
            def _put(self, item):
                inside.set()
                assert go_on.wait(30)
                super()._put(item)

        queue = Slow()
        putter = Thread(queue.sync_q.put, 1)
        assert inside.wait(30)
        getter = Thread(queue.sync_q.get)
        assert queue.statistics().items_put == 0  # needs the short lock only
        go_on.set()
        putter.result()
        assert getter.result() == 1


class TestPriorities:
    def test_a_comparison_that_raises_leaves_the_queue_as_it_was(self):
        class Item:
            def __init__(self, value):
                self.value = value

            def __lt__(self, other):
                if Item.fail:
                    Item.fail -= 1
                    if not Item.fail:
                        raise LookupError("compared")
                return self.value < other.value

        for compared in range(1, 8):
            Item.fail = 0
            q = PriorityQueue().sync_q
            for value in (5, 3, 8, 1, 9, 2, 7, 6, 4, 0):
                q.put(Item(value))
            Item.fail = compared
            raised = 0
            for call in (lambda q=q: q.put(Item(-1)), q.get):
                try:
                    call()
                except LookupError:
                    raised += 1
            Item.fail = 0
            assert raised == 1
            values = [q.get().value for _ in range(q.qsize())]
            assert values == sorted(values)
            assert set(values) | {-1, 0} == {-1, *range(10)}

    def test_using_the_queue_from_a_comparison_is_an_error(self):
        queue = PriorityQueue()

        class Item:
            def __lt__(self, other):
                queue.sync_q.get_nowait()

        queue.sync_q.put(Item())
        with pytest.raises(RuntimeError, match="own hooks"):
            queue.sync_q.put(Item())
        assert queue.qsize() == 1

    def test_items_that_cannot_be_compared(self):
        q = PriorityQueue().sync_q
        q.put(1)
        with pytest.raises(TypeError, match="not supported"):
            q.put("a")
        assert q.get_many() == [1] and q.unfinished_tasks == 1
