"""Random trees of scopes, groups, shields, timeouts and children with cancellations at any moment: ours against a model.

The trees are the same on each run; with ``AIOTOOLS_TREE_EXAMPLES`` there are as many new ones per test and loop kind.
"""

import asyncio
import os
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
from model import cancellation as model
from model.trees import COMMON, OURS, PLAIN, REQUESTS, SHIELDS, Program, Run, describe, statements

import aiotools

EXAMPLES = os.environ.get("AIOTOOLS_TREE_EXAMPLES")
trees = settings(max_examples=int(EXAMPLES or 40), derandomize=EXAMPLES is None)
UNCANCEL_CLEARS = sys.version_info >= (3, 13)
# Until 3.12 the groups of asyncio forget requests, and leave their own behind: what uses them there is no oracle.
ASYNCIO_GROUPS = ["group", "group"] if sys.version_info >= (3, 13) else []

outside = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), max_size=4)


class ModelKernel:
    def __init__(self, everything_foreign):
        self.everything_foreign = everything_foreign
        self.loop = model.Loop(uncancel_clears=UNCANCEL_CLEARS)
        self.create_task = self.loop.create_task
        self.call_at = self.loop.call_at
        self.reported = []

    def now(self):
        return self.loop.now

    def report(self, exc):
        self.reported.append((self.now(), describe(exc)))

    def current_task(self):
        return self.loop.current

    def cancelling(self):
        return self.loop.current.cancelling()

    def uncancel(self):
        return self.loop.current.uncancel()

    def cancel(self, task):
        current = self.loop.current
        if current is task:
            # A task that cancels itself counts as one from outside.
            task.cancel()
        else:
            task.cancel(frozenset() if current is None else current.place())

    def sleep(self, seconds, foreign):
        return self.loop.sleep(seconds)

    def group(self, foreign):
        return model.Group(self.loop, foreign=self.everything_foreign or (foreign and bool(ASYNCIO_GROUPS)))

    def timeout(self, foreign, delay):
        return model.Timeout(self.loop, delay, foreign=foreign or self.everything_foreign)

    def scope(self, shielded, timeout):
        return model.Scope(self.loop, shielded=shielded, timeout=timeout)

    def sync_shield(self, timeout):
        return model.Scope(self.loop, shielded=True, sync=True, timeout=timeout)

    def move_on_after(self, timeout, shielded):
        return model.Scope(self.loop, shielded=shielded, timeout=timeout, move_on=True, report=self.report)

    def outcome(self, task):
        outcome, *exc = task.outcome
        return (outcome, *map(describe, exc), task.requests)


class AsyncioKernel:
    """asyncio's own types; the model's kinds of block that it has no twin of are not used with it."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.create_task = self.loop.create_task
        self.call_at = self.loop.call_at
        self.now = self.loop.time
        self.reported = []
        self.loop.set_exception_handler(self.report)

    def report(self, loop, context):
        assert "task" in context and "failed; it is a child of" in context["message"], context
        self.reported.append((self.now(), describe(context["exception"])))

    current_task = staticmethod(asyncio.current_task)

    def cancelling(self):
        return asyncio.current_task().cancelling()

    def uncancel(self):
        return asyncio.current_task().uncancel()

    def cancel(self, task):
        task.cancel()

    def sleep(self, seconds, foreign):
        return asyncio.sleep(seconds)

    def group(self, foreign):
        return asyncio.TaskGroup()

    def timeout(self, foreign, delay):
        return asyncio.timeout(delay)

    def outcome(self, task):
        assert task.done()
        if task.cancelled():
            return ("cancelled", task.cancelling())
        if task.exception() is not None:
            return ("failed", describe(task.exception()), task.cancelling())
        return ("returned", task.cancelling())


class OurKernel(AsyncioKernel):
    def sleep(self, seconds, foreign):
        return asyncio.sleep(seconds) if foreign else aiotools.sleep(seconds)

    def group(self, foreign):
        return asyncio.TaskGroup() if foreign and ASYNCIO_GROUPS else aiotools.TaskGroup()

    def timeout(self, foreign, delay):
        return asyncio.timeout(delay) if foreign else aiotools.timeout(delay)

    def scope(self, shielded, timeout):
        return aiotools.TaskScope(shield=shielded, timeout=timeout, exception_handler=None)

    def sync_shield(self, timeout):
        return aiotools.ShieldScope(timeout)

    def move_on_after(self, timeout, shielded):
        return aiotools.move_on_after(timeout, shielded)


def run_on_model(program, everything_foreign=False):
    run = Run(ModelKernel(everything_foreign), program)
    run.start()
    run.kernel.loop.run()
    return run.log, run.outcomes(), run.kernel.reported


async def run_on_loop(kernel_class, program):
    before = asyncio.all_tasks()
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    try:
        with aiotools.VirtualClock().patch_loop():
            run = Run(kernel_class(), program)
            run.start()
            await asyncio.wait([run.tasks[0]])
    finally:
        loop.set_exception_handler(handler)
    assert asyncio.all_tasks() == before, "tasks go on after the root"
    for task in run.tasks.values():
        assert getattr(task.cancel, "__self__", None) is task, "a task is left patched"
    return run.log, run.outcomes(), run.kernel.reported


def compare(program, first, second):
    (log, outcomes, reported), (other_log, other_outcomes, other_reported) = first, second
    numbers = sorted(log.keys() | other_log.keys())
    for number in numbers:
        assert log.get(number, []) == other_log.get(number, []), f"task {number} of {program}"
    assert outcomes == other_outcomes, program
    assert reported == other_reported


def programs(simple, kinds):
    return st.builds(Program, statements(simple, kinds), outside).filter(lambda program: program.fits)


@given(programs(PLAIN + OURS, COMMON + SHIELDS))
@trees
async def test_our_types_do_what_the_model_says(program):
    compare(program, await run_on_loop(OurKernel, program), run_on_model(program))


@given(programs(PLAIN + OURS + REQUESTS, COMMON + SHIELDS))
@trees
async def test_our_types_do_what_the_model_says_of_requests_that_tasks_make_and_take_back(program):
    compare(program, await run_on_loop(OurKernel, program), run_on_model(program))


@given(programs(PLAIN, ["timeout", "swallow", "catch", "finally", *ASYNCIO_GROUPS]))
@trees
async def test_the_model_agrees_with_asyncio(program):
    compare(program, await run_on_loop(AsyncioKernel, program), run_on_model(program, everything_foreign=True))


@given(programs(PLAIN, ["timeout", "catch", *ASYNCIO_GROUPS]))
@trees
async def test_our_groups_and_timeouts_do_what_those_of_asyncio_do(program):
    """In programs that let a cancellation go: asyncio's groups take one that was swallowed before for a new one."""
    compare(program, await run_on_loop(OurKernel, program), await run_on_loop(AsyncioKernel, program))
