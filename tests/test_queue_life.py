"""What becomes of a queue: collected, forked, at the end of the interpreter."""

import asyncio
import gc
import os
import sysconfig
import weakref

import pytest

from aiotools import PriorityQueue, Queue
from queue_helpers import CLASSES, Thread, lanes, run_script, turns, until_blocked


class TestLife:
    @pytest.mark.parametrize("cls", CLASSES)
    def test_a_queue_that_nobody_has_any_more_goes_at_once_with_its_items(self, cls):
        class Item:
            def __lt__(self, other):
                return False

        gc.disable()
        try:
            queue, items = cls(), [Item() for _ in range(100)]
            queue.sync_q.put_many(items)
            refs = [weakref.ref(queue), *map(weakref.ref, items)]
            del queue, items
            assert [ref() for ref in refs] == [None] * 101
        finally:
            gc.enable()

    def test_a_side_keeps_the_items_without_the_queue(self):
        q = Queue().sync_q
        q.put(1)
        assert q.get() == 1
        q = lanes(Queue)().async_q
        gc.collect()
        q.put_nowait(1)
        assert q.get_nowait() == 1

    @pytest.mark.parametrize("cls", [*CLASSES, lanes(Queue)])
    def test_the_collector_frees_a_queue_that_holds_itself(self, cls):
        class Item(list):
            def __lt__(self, other):
                return True

        queue = cls()
        item = Item([queue])
        if cls in CLASSES:
            queue.sync_q.put(item)
        else:
            queue.normal.append(item)
        ref = weakref.ref(queue)
        del queue, item
        gc.collect()
        assert ref() is None

    @pytest.mark.loop_kinds("default", "eager", "debug", reason="uvloop holds what is scheduled in its own way")
    def test_the_collector_frees_a_queue_with_its_waiters(self, new_loop, loop_errors):
        loop = new_loop()

        async def wait(q):
            await q.get()

        async def main():
            queue = Queue()
            task = asyncio.create_task(wait(queue.async_q))
            await turns()
            return weakref.ref(queue), weakref.ref(task)

        refs = loop.run_until_complete(main())
        gc.collect()
        # What the handler is told holds the task; from 3.15 on also for its weak references.
        assert "destroyed but it is pending" in loop_errors.take_one()["message"]
        gc.collect()
        assert [ref() for ref in refs] == [None, None]
        loop.close()

    def handed_to_a_sleeping_loop(self, loop, queue):
        """Three tasks wait in a loop that does not run now; two of them were handed something."""

        async def get():
            return await queue.async_q.get()

        async def start():
            tasks = [asyncio.ensure_future(get()) for _ in range(3)]
            await turns()
            return tasks

        tasks = loop.run_until_complete(start())
        Thread(queue.sync_q.put_many, [1, 2]).result()
        assert queue.statistics().waiting_getters == 3
        return tasks

    def after_close(self, queue, tasks, loop_errors):
        # The third one was not told yet.
        queue.sync_q.put(3)
        assert queue.sync_q.get() == 3
        assert queue.statistics().waiting_getters == 0
        tasks.clear()
        gc.collect()
        # That asyncio tells of.
        assert all("destroyed but it is pending" in context["message"] for context in loop_errors.take())

    @pytest.mark.threads
    def test_what_was_handed_to_a_loop_that_is_closed_is_there_for_others(self, new_loop, loop_errors):
        """The wake-up was under way when the loop was closed; it used to stay so until the loop was collected."""
        loop, queue = new_loop(), Queue()
        tasks = self.handed_to_a_sleeping_loop(loop, queue)
        loop.close()
        assert [queue.sync_q.get(timeout=30) for _ in range(2)] == [1, 2]
        self.after_close(queue, tasks, loop_errors)

    @pytest.mark.threads
    @pytest.mark.skipif(
        sysconfig.get_config_var("Py_GIL_DISABLED"),
        reason="without the GIL a handle made by a thread that is blocked now may be freed only once it runs again",
    )
    def test_what_was_handed_to_a_loop_that_is_closed_goes_to_who_waits(self, new_loop, loop_errors):
        loop, queue = new_loop(), Queue()
        tasks = self.handed_to_a_sleeping_loop(loop, queue)
        survivor = Thread(queue.sync_q.get)
        until_blocked(queue, getters=4)
        loop.close()
        assert survivor.result() == 1
        assert queue.sync_q.get() == 2
        self.after_close(queue, tasks, loop_errors)

    def test_a_finalizer_of_a_dropped_item_may_use_the_queue(self):
        queue = Queue()
        done = []

        class Item:
            def __lt__(self, other):
                return True

            def __del__(self):
                queue.statistics()
                done.append(queue.qsize())

        queue.sync_q.put_many(Item() for _ in range(100))
        queue.shutdown(immediate=True)
        assert done == [0] * 100
        queue, done = PriorityQueue(), []
        queue.sync_q.put_many(Item() for _ in range(10))
        queue.shutdown(immediate=True)
        assert done == [0] * 10

    def test_a_finalizer_may_put_into_the_queue(self):
        queue = Queue()

        class Item:
            def __del__(self):
                queue.sync_q.put("last words")

        queue.sync_q.put(Item())
        queue.sync_q.get()
        assert queue.sync_q.get() == "last words"

    def test_both_kinds_of_queue_can_be_referred_to_weakly(self):
        queue = Queue()
        for face in (queue, queue.sync_q, queue.async_q):
            assert weakref.ref(face)() is face


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
class TestFork:
    def test_a_child_has_the_items_and_nobody_who_waits(self):
        done = run_script(
            """
            import asyncio, gc, os, threading, warnings
            warnings.simplefilter("ignore", DeprecationWarning)
            import aiotools

            full, empty = aiotools.Queue(2), aiotools.Queue()
            full.sync_q.put_many([1, 2])
            threads = [threading.Thread(target=full.sync_q.put, args=[3], daemon=True),
                       threading.Thread(target=empty.sync_q.get, daemon=True)]
            for thread in threads:
                thread.start()
            while full.statistics().waiting_putters + empty.statistics().waiting_getters < 2:
                os.sched_yield()

            async def main():
                task = asyncio.create_task(empty.async_q.get())
                await asyncio.sleep(0)
                pid = os.fork()
                if pid == 0:
                    try:
                        gc.collect()
                        for queue in (full, empty):
                            now = queue.statistics()
                            assert (now.waiting_getters, now.waiting_putters) == (0, 0), now
                        helpers = [threading.Thread(target=lambda: None) for _ in range(3)]
                        for helper in helpers:
                            helper.start()
                        assert full.sync_q.get() == 1 and full.sync_q.get() == 2 and full.sync_q.empty()
                        taker = threading.Thread(target=empty.sync_q.get)
                        taker.start()
                        empty.sync_q.put("x")
                        taker.join(20)
                        assert not taker.is_alive()
                        gc.collect()
                        os._exit(0)
                    except BaseException as exc:
                        print(repr(exc), flush=True)
                        os._exit(1)
                assert os.waitpid(pid, 0)[1] == 0
                # The parent goes on as if nothing had been.
                empty.sync_q.put_many(["a", "b"])
                assert await task in ("a", "b")
                full.sync_q.get_many()
                threads[0].join(20)
                threads[1].join(20)
                assert not any(thread.is_alive() for thread in threads)

            asyncio.run(main())
            """
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_a_queue_in_whose_hook_another_thread_was_refuses_clearly(self):
        done = run_script(
            """
            import os, threading, warnings
            warnings.simplefilter("ignore", DeprecationWarning)
            import aiotools

            inside, go_on = threading.Event(), threading.Event()

            class Slow(aiotools.Queue):
                def _put(self, item):
                    inside.set()
                    go_on.wait()
                    super()._put(item)

            queue = Slow()
            thread = threading.Thread(target=queue.sync_q.put, args=[1])
            thread.start()
            inside.wait()
            pid = os.fork()
            if pid == 0:
                ok = 0
                for call in (queue.sync_q.get, lambda: queue.sync_q.put(1), queue.shutdown, queue.peek):
                    try:
                        call()
                    except RuntimeError as exc:
                        ok += "when this process was forked" in str(exc)
                os._exit(0 if ok == 4 else 1)
            status = os.waitpid(pid, 0)[1]
            go_on.set()
            thread.join()
            assert status == 0, status
            assert queue.sync_q.get() == 1
            pid = os.fork()
            if pid == 0:
                inside.clear()
                queue.sync_q.put(2)
                os._exit(0 if queue.sync_q.get() == 2 else 1)
            assert os.waitpid(pid, 0)[1] == 0
            """
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_a_signal_handler_that_forks_while_its_thread_waits(self):
        done = run_script(
            """
            import os, signal, threading
            import aiotools

            queue = aiotools.Queue()
            pids = []

            def handler(number, frame):
                pids.append(os.fork())
                queue.sync_q.put("from the handler" if pids[0] else "in the child")

            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            item = queue.sync_q.get()
            if pids[0] == 0:
                os._exit(0 if item == "in the child" else 1)
            assert item == "from the handler"
            assert os.waitpid(pids[0], 0)[1] == 0
            """
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestInterpreterExit:
    @pytest.mark.parametrize("options", [[], ["-X", "dev"]])
    def test_blocked_daemon_threads_and_suspended_tasks_do_not_keep_it(self, options):
        done = run_script(
            """
            import asyncio, os, threading
            import aiotools

            queues = [aiotools.Queue(1), aiotools.PriorityQueue(1)]
            for queue in queues:
                queue.sync_q.put(1)
                threading.Thread(target=queue.sync_q.put, args=[1], daemon=True).start()
            empty = aiotools.Queue()
            threading.Thread(target=empty.sync_q.get, daemon=True).start()
            threading.Thread(target=lambda: empty.sync_q.get(timeout=1000), daemon=True).start()
            while empty.statistics().waiting_getters < 2:
                os.sched_yield()
            loop = asyncio.new_event_loop()
            get = empty.async_q.get()
            async def first_step():
                get.send(None)
            loop.run_until_complete(first_step())
            loop.close()
            """,
            *options,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_a_thread_that_is_no_daemon_can_be_told_at_exit(self):
        done = run_script(
            """
            import atexit, threading
            import aiotools

            queue = aiotools.Queue()
            threading._register_atexit(queue.shutdown)
            threading.Thread(target=lambda: print(list(queue.sync_q))).start()
            queue.sync_q.put(1)
            """
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "[1]\n", "")
