"""ProcessBarrier: processes that wait for each other."""

import asyncio
import contextlib
import math
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time

import pytest

import aiotools
from aiotools import ProcessBarrier

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs pipes that a loop can watch")

METHODS = multiprocessing.get_all_start_methods() if sys.platform != "win32" else []


async def until_two_wait(barrier):
    while barrier.n_waiting < 2:
        await asyncio.sleep(0)


async def outcome(barrier, **kwargs):
    try:
        return await barrier.wait(**kwargs)
    except asyncio.BrokenBarrierError as exc:
        return "broken", type(exc.__cause__).__name__


def run_party(barrier, answers, rounds):
    async def main():
        for _ in range(rounds):
            answers.put((os.getpid(), await outcome(barrier)))

    asyncio.run(main())


def die_at_once(barrier):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_then_die(barrier, ready):
    async def main():
        asyncio.get_running_loop().call_later(0.1, ready.set)
        await barrier.wait()

    asyncio.run(main())


def die_with_the_lock(barrier):
    assert barrier._try_lock()
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def running(processes):
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join(30)
            assert process.exitcode is not None
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


@pytest.fixture
def barrier():
    barrier = ProcessBarrier(3)
    yield barrier
    barrier.close()


class TestInOneProcess:
    async def test_all_go_on_together_with_indices(self, barrier):
        assert (barrier.parties, barrier.n_waiting, barrier.broken) == (3, 0, False)
        tasks = [asyncio.create_task(outcome(barrier)) for _ in range(2)]
        await until_two_wait(barrier)
        assert "waiters:2/3" in repr(barrier)
        assert sorted([await outcome(barrier), *await asyncio.gather(*tasks)]) == [0, 1, 2]
        assert barrier.n_waiting == 0

    async def test_many_generations(self, barrier):
        seen = []

        async def party():
            for number in range(30):
                await barrier.wait()
                seen.append(number)

        await asyncio.gather(*(party() for _ in range(3)))
        assert seen == sorted(seen) and len(seen) == 90

    async def test_abort_and_reset(self, barrier):
        tasks = [asyncio.create_task(outcome(barrier)) for _ in range(2)]
        await until_two_wait(barrier)
        barrier.abort()
        assert barrier.broken and "broken" in repr(barrier)
        assert await asyncio.gather(*tasks) == [("broken", "NoneType")] * 2
        assert await outcome(barrier) == ("broken", "NoneType")
        barrier.reset()
        assert not barrier.broken
        tasks = [asyncio.create_task(outcome(barrier)) for _ in range(2)]
        await until_two_wait(barrier)
        barrier.reset()
        assert await asyncio.gather(*tasks) == [("broken", "NoneType")] * 2
        assert sorted(await asyncio.gather(*(outcome(barrier) for _ in range(3)))) == [0, 1, 2]

    async def test_who_is_cancelled_leaves(self, barrier):
        tasks = [asyncio.create_task(outcome(barrier)) for _ in range(2)]
        await until_two_wait(barrier)
        tasks[0].cancel()
        await asyncio.wait([tasks[0]])
        assert barrier.n_waiting == 1 and not barrier.broken
        tasks += [asyncio.create_task(outcome(barrier)) for _ in range(2)]
        assert sorted(await asyncio.gather(*tasks[1:])) == [0, 1, 2]

    async def test_a_timeout_breaks_it(self, barrier):
        answers = await asyncio.gather(outcome(barrier), outcome(barrier, timeout=0.05))
        assert answers == [("broken", "TimeoutError")] * 2
        assert await outcome(barrier) == ("broken", "TimeoutError")

    async def test_async_with(self):
        barrier = ProcessBarrier(1, timeout=5)
        for _ in range(3):
            async with barrier as index:
                assert index == 0
        barrier.close()
        barrier.close()
        with pytest.raises(RuntimeError, match="closed"):
            await barrier.wait()
        assert "closed" in repr(barrier)

    @pytest.mark.threads
    def test_threads_with_loops_of_their_own(self, barrier):
        answers = queue.SimpleQueue()
        threads = [threading.Thread(target=run_party, args=(barrier, answers, 20)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers.get()[1] for _ in range(60)) == [0] * 20 + [1] * 20 + [2] * 20

    def test_wrong_arguments(self):
        for bad, error in [(0, ValueError), ("1", TypeError), (1.5, TypeError)]:
            with pytest.raises(error, match="parties"):
                ProcessBarrier(bad)
        with pytest.raises(TypeError, match="timeout"):
            ProcessBarrier(1, timeout="1")
        with pytest.raises(ValueError, match="NaN"):
            ProcessBarrier(1, timeout=math.nan)

    def test_it_is_handed_down_only(self, barrier):
        with pytest.raises(RuntimeError, match="inheritance"):
            pickle.dumps(barrier)

    def test_it_leaves_no_descriptor(self):
        if not os.path.isdir("/proc/self/fd"):
            return
        before = os.listdir("/proc/self/fd")
        barrier = ProcessBarrier(2)
        asyncio.run(outcome(barrier, timeout=0.01))
        barrier.close()
        del barrier
        assert os.listdir("/proc/self/fd") == before

    def test_it_is_exported(self):
        assert aiotools.ProcessBarrier is ProcessBarrier


@pytest.mark.parametrize("method", METHODS)
class TestAcrossProcesses:
    def test_processes_meet(self, method, barrier):
        context = multiprocessing.get_context(method)
        answers = context.SimpleQueue()
        with running([context.Process(target=run_party, args=(barrier, answers, 5)) for _ in range(3)]):
            got = [answers.get() for _ in range(15)]
        assert sorted(index for _, index in got) == [0] * 5 + [1] * 5 + [2] * 5
        assert len({pid for pid, _ in got}) == 3

    def test_one_that_dies_before_it_came_breaks_it(self, method, barrier):
        context = multiprocessing.get_context(method)
        answers = context.SimpleQueue()
        processes = [context.Process(target=run_party, args=(barrier, answers, 1)) for _ in range(2)]
        with running(processes):
            while barrier.n_waiting < 2:
                time.sleep(0.01)
            victim = context.Process(target=die_at_once, args=(barrier,))
            victim.start()
            # Nobody joins it: a zombie is dead as well.
            os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT) if method != "forkserver" else victim.join()
            died = time.monotonic()
            got = [answers.get()[1] for _ in range(2)]
            assert time.monotonic() - died < 2
            victim.join()
        assert got == [("broken", "ChildProcessError")] * 2

    def test_one_that_dies_while_it_waits_breaks_it(self, method, barrier):
        context = multiprocessing.get_context(method)
        answers = context.SimpleQueue()
        ready = context.Event()
        victim = context.Process(target=wait_then_die, args=(barrier, ready))
        with running([victim, context.Process(target=run_party, args=(barrier, answers, 1))]):
            while barrier.n_waiting < 2:
                time.sleep(0.01)
            victim.kill()
            died = time.monotonic()
            assert answers.get()[1] == ("broken", "ChildProcessError")
            assert time.monotonic() - died < 2


def test_one_that_dies_with_the_lock_breaks_it_until_reset(barrier):
    context = multiprocessing.get_context("fork" if "fork" in METHODS else "spawn")
    with running([context.Process(target=die_with_the_lock, args=(barrier,))]):
        pass

    async def main():
        assert await outcome(barrier) == ("broken", "ChildProcessError")
        barrier.reset()
        assert sorted(await asyncio.gather(*(outcome(barrier) for _ in range(3)))) == [0, 1, 2]

    asyncio.run(main())
