"""The same random programs on our queues and on those of the standard library: same results, in the same order."""

import asyncio
import collections
import queue as stdlib_queue
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

import aiotools
from conftest import make_loop

HAVE_SHUTDOWN = sys.version_info >= (3, 13)
PAIRS = {
    "fifo": (aiotools.Queue, asyncio.Queue, stdlib_queue.Queue),
    "lifo": (aiotools.LifoQueue, asyncio.LifoQueue, stdlib_queue.LifoQueue),
    "priority": (aiotools.PriorityQueue, asyncio.PriorityQueue, stdlib_queue.PriorityQueue),
}
NAMES = {
    "QueueEmpty": "Empty",
    "QueueFull": "Full",
    "QueueShutDown": "ShutDown",
}


def outcome(function, *args):
    try:
        return function(*args)
    except Exception as exc:
        name = type(exc).__name__
        return NAMES.get(name, name)


# --- without waiting: queue.Queue is the oracle of both sides ------------------------------------------------------

step = st.one_of(
    st.tuples(st.just("put_nowait"), st.integers(0, 9)),
    st.tuples(st.just("get_nowait")),
    st.tuples(st.just("task_done")),
    st.tuples(st.just("qsize")),
    st.tuples(st.just("empty")),
    st.tuples(st.just("full")),
    *([st.tuples(st.just("shutdown"), st.booleans())] if HAVE_SHUTDOWN else []),
)


@pytest.mark.parametrize("kind", list(PAIRS))
@hypothesis.given(maxsize=st.integers(-1, 4), program=st.lists(step, max_size=60), sides=st.lists(st.booleans()))
@hypothesis.settings(max_examples=150)
def test_programs_that_do_not_wait(kind, maxsize, program, sides):
    ours, _, oracle = PAIRS[kind]
    queue, theirs = ours(maxsize), oracle(maxsize)
    sides = [*sides, True]
    for i, (name, *args) in enumerate(program):
        side = queue.sync_q if sides[i % len(sides)] else queue.async_q
        assert outcome(getattr(side, name), *args) == outcome(getattr(theirs, name), *args), (i, name)
        assert queue.unfinished_tasks == theirs.unfinished_tasks


# --- bulk: a deque is the oracle -----------------------------------------------------------------------------------

bulk_step = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 150)),
    st.tuples(st.just("get"), st.integers(1, 150) | st.none()),
)


@pytest.mark.parametrize("kind", ["fifo", "lifo"])
@hypothesis.given(maxsize=st.sampled_from([0, 1, 5, 61, 62, 63, 124, 200]), program=st.lists(bulk_step, max_size=20))
def test_bulk_programs(kind, maxsize, program):
    q = PAIRS[kind][0](maxsize).async_q
    model = collections.deque()
    number = 0
    for name, n in program:
        if name == "put":
            items = range(number, number + n)
            number += n
            fits = n if maxsize <= 0 else min(n, maxsize - len(model))
            model.extend(items[:fits])
            if fits == n:
                q.put_many_nowait(items)
            else:
                with pytest.raises(asyncio.QueueFull) as info:
                    q.put_many_nowait(items)
                assert info.value.items_put == fits
        elif model:
            n = len(model) if n is None else min(n, len(model))
            pop = model.popleft if kind == "fifo" else model.pop
            assert q.get_many_nowait(n) == [pop() for _ in range(n)]
        else:
            with pytest.raises(asyncio.QueueEmpty):
                q.get_many_nowait(n)
        assert q.qsize() == len(model)


# --- with waiting, in one loop: asyncio.Queue is the oracle --------------------------------------------------------

wait_step = st.one_of(
    st.tuples(st.just("put")),
    st.tuples(st.just("get")),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("turn"), st.integers(1, 3)),
    st.tuples(st.just("join")),
    st.tuples(st.just("task_done")),
)


async def settle(turns=12):
    for _ in range(turns):
        await asyncio.sleep(0)


async def run_program(q, program):
    """What each operation of the program led to; between the steps all tasks run until they wait."""
    tasks, trace = [], []
    number = 0
    for name, *args in program:
        if name == "put":
            tasks.append(asyncio.create_task(q.put(number)))
            number += 1
        elif name in ("get", "join"):
            tasks.append(asyncio.create_task(getattr(q, name)()))
        elif name == "cancel" and args[0] < len(tasks):
            tasks[args[0]].cancel()
        elif name == "task_done":
            trace.append(outcome(q.task_done))
        await settle()
        trace.append((q.qsize(), q.empty(), q.full(), [describe(task) for task in tasks]))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    trace.append(q.qsize())
    return trace


def describe(task):
    if not task.done():
        return "pending"
    return "cancelled" if task.cancelled() else outcome(task.result)


@pytest.mark.parametrize("kind", list(PAIRS))
@hypothesis.given(maxsize=st.integers(0, 3), program=st.lists(wait_step, max_size=25))
@hypothesis.settings(max_examples=60)
def test_programs_that_wait(kind, maxsize, program):
    ours, oracle, _ = PAIRS[kind]
    traces = []
    for make in (lambda: ours(maxsize).async_q, lambda: oracle(maxsize)):
        with asyncio.Runner(loop_factory=lambda: make_loop("default")) as runner:

            async def main(make=make):
                return await run_program(make(), program)

            traces.append(runner.run(main()))
    assert traces[0] == traces[1]


# --- with waiting and hurry: the rules hold, whatever the moment ---------------------------------------------------

hurry_step = st.one_of(
    st.tuples(st.just("put")),
    st.tuples(st.just("get")),
    st.tuples(st.just("put_nowait")),
    st.tuples(st.just("get_nowait")),
    st.tuples(st.just("get_many"), st.integers(1, 4)),
    st.tuples(st.just("put_many"), st.integers(0, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("turn")),
)


@pytest.mark.parametrize("kind", list(PAIRS))
@hypothesis.given(maxsize=st.integers(0, 3), program=st.lists(hurry_step, max_size=40))
@hypothesis.settings(max_examples=100)
async def test_nothing_is_lost_or_doubled_at_any_moment(kind, maxsize, program):
    queue = PAIRS[kind][0](maxsize)
    q = queue.async_q
    number = 0
    tasks, puts, got = [], [], []

    def take(value):
        got.extend(value if isinstance(value, list) else [value])

    for name, *args in program:
        if name in ("put", "put_many"):
            n = args[0] if args else 1
            items = list(range(number, number + n))
            number += n
            awaitable = q.put(items[0]) if name == "put" else q.put_many(items)
            puts.append((awaitable, items))
            tasks.append(asyncio.create_task(awaitable))
        elif name in ("get", "get_many"):
            task = asyncio.create_task(getattr(q, name)(*args))
            task.add_done_callback(lambda task: None if task.cancelled() else take(task.result()))
            tasks.append(task)
        elif name == "put_nowait":
            try:
                q.put_nowait(number)
            except asyncio.QueueFull:
                assert 0 < maxsize == q.qsize()
            else:
                got_back = number
                number += 1
                puts.append((None, [got_back]))
        elif name == "get_nowait":
            try:
                take(q.get_nowait())
            except asyncio.QueueEmpty:
                assert q.qsize() == 0
        elif name == "cancel" and args[0] < len(tasks):
            tasks[args[0]].cancel()
        elif name == "turn":
            await asyncio.sleep(0)
        assert maxsize <= 0 or q.qsize() <= maxsize
    # Each operation may need two turns of its own.
    await settle(2 * len(tasks) + 12)
    now = queue.statistics()
    # No lost wake-up: nobody waits for what is there.
    assert now.waiting_getters == 0 or now.qsize == 0
    assert now.waiting_putters == 0 or now.qsize == maxsize
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settle()
    now = queue.statistics()
    assert (now.waiting_getters, now.waiting_putters) == (0, 0)
    if not q.empty():
        take(q.get_many_nowait())
    put = [item for awaitable, items in puts for item in (items if awaitable is None else items[: awaitable.items_put])]
    assert sorted(got) == sorted(put)
    assert (queue.statistics().items_put, queue.statistics().items_got) == (len(put), len(got))
