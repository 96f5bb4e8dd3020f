"""Barrier."""

import asyncio

import aiotools
from operations import no_memory, operation


async def outcome(barrier, **kwargs):
    try:
        return await barrier.wait(**kwargs)
    except (asyncio.BrokenBarrierError, asyncio.CancelledError):
        return None


@operation("Barrier")
async def parties_that_meet():
    barrier = aiotools.Barrier(3, timeout=60)
    for _ in range(2):
        answers = await asyncio.gather(*(outcome(barrier) for _ in range(3)))
        assert sorted(answers) == [0, 1, 2]
    async with aiotools.Barrier(1):
        pass


@operation("Barrier")
async def a_barrier_that_breaks():
    for method in ("abort", "reset"):
        barrier = aiotools.Barrier(3, timeout=60)
        tasks = [asyncio.create_task(outcome(barrier)) for _ in range(2)]
        await aiotools.checkpoint()
        await getattr(barrier, method)()
        await asyncio.gather(*tasks)
    await outcome(aiotools.Barrier(2), timeout=0)


@operation("Barrier")
async def a_party_that_is_cancelled():
    barrier = aiotools.Barrier(2)
    task = asyncio.create_task(outcome(barrier))
    await aiotools.checkpoint()
    task.cancel()
    await asyncio.wait([task])
    assert barrier.n_waiting == 0


@operation("Barrier")
async def actions():
    async def fails():
        await aiotools.checkpoint()
        raise ValueError

    for action in (int, aiotools.checkpoint, fails):
        barrier = aiotools.Barrier(2, action=action)
        await asyncio.gather(outcome(barrier), outcome(barrier))
        barrier = aiotools.Barrier(2, action=action)
        task = asyncio.create_task(outcome(barrier))
        await aiotools.checkpoint()
        barrier.leave()
        await task


@operation("Barrier")
def wrong_arguments_of_barriers():
    for args, kwargs in [((), {}), ((0,), {}), (("1",), {}), ((1,), {"action": 1}), ((1,), {"timeout": "1"})]:
        try:
            aiotools.Barrier(*args, **kwargs)
        except (TypeError, ValueError):
            pass
    repr(aiotools.Barrier(1))
    aiotools.Barrier(1).wait().close()


@no_memory("Barrier", kinds=("default",))
async def waiting_in_a_barrier(fail):
    waits = [None, None]
    barrier = None
    try:
        with fail:
            barrier = aiotools.Barrier(3, timeout=60)
            waits[0] = barrier.wait()
            waits[0].send(None)
            waits[1] = barrier.wait(timeout=50)
            waits[1].send(None)
    finally:
        for wait in waits:
            if wait is not None:
                wait.close()
        if barrier is not None:
            assert barrier.n_waiting == 0


@no_memory("Barrier", kinds=("default",))
async def the_last_to_arrive(fail):
    barrier = aiotools.Barrier(2)
    first = barrier.wait()
    waiter = first.send(None)
    last = barrier.wait()
    waiter.add_done_callback(id, context=None)
    try:
        with fail:
            try:
                last.send(None)
            except StopIteration:
                pass
    finally:
        waiter.remove_done_callback(id)
        first.close()
        last.close()
        assert barrier.n_waiting == 0
    await aiotools.checkpoint()
