"""Supervisor, and what happens to children that fail: retries, restarts, time limits, statistics."""

import asyncio
import contextvars

import pytest

import aiotools
from aiotools import Retry, Supervisor, TaskScope

QUICK = Retry(delay=0, jitter=0)


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


class Flaky:
    """Fails so many times, then returns the number of the attempt."""

    def __init__(self, failures, exc=ValueError):
        self.failures = failures
        self.exc = exc
        self.attempts = 0

    async def __call__(self):
        self.attempts += 1
        if self.attempts <= self.failures:
            raise self.exc(self.attempts)
        return self.attempts


class TestSupervisor:
    async def test_failures_are_dropped_and_siblings_go_on(self):
        async with Supervisor() as supervisor:
            supervisor.create_task(Flaky(1)())
            good = supervisor.create_task(Flaky(0)())
        assert good.result() == 1 and isinstance(supervisor, TaskScope)

    async def test_the_context_may_be_positional(self):
        var = contextvars.ContextVar("var")
        context = contextvars.copy_context()
        context.run(var.set, 1)
        seen = []

        async def child():
            seen.append(var.get())

        async with Supervisor(context) as supervisor:
            supervisor.create_task(child())
        assert seen == [1]

    async def test_statistics(self):
        async with Supervisor() as supervisor:
            supervisor.create_task(Flaky(2), retry=QUICK)
            supervisor.create_task(Flaky(1)())
            waiting = supervisor.create_task(asyncio.sleep(60))
            await turns(10)
            assert supervisor.statistics() == (1, 2, 1, 2)
            waiting.cancel()
        assert supervisor.statistics() == (0, 3, 1, 2)


class TestRetry:
    async def test_a_child_is_run_until_it_succeeds_as_one_task(self):
        flaky = Flaky(3)
        async with TaskScope() as scope:
            task = scope.create_task(flaky, retry=QUICK, name="flaky")
            assert await task == 4
        assert task.get_name() == "flaky"

    async def test_it_gives_up_with_the_last_failure(self):
        seen = []
        async with TaskScope(exception_handler=seen.append) as scope:
            scope.create_task(Flaky(5), retry=Retry(attempts=3, delay=0))
        assert seen[0]["exception"].args == (3,)

    async def test_other_exceptions_end_it_at_once(self):
        flaky = Flaky(5, KeyError)
        async with TaskScope(exception_handler=None) as scope:
            scope.create_task(flaky, retry=Retry(delay=0, on=ValueError))
        assert flaky.attempts == 1

    async def test_a_cancellation_ends_it(self):
        async with TaskScope() as scope:
            task = scope.create_task(Flaky(10**9), retry=QUICK)
            await turns()
            scope.abort()
        assert task.cancelled()

    @pytest.mark.parametrize("end", ["task", "scope"])
    async def test_an_attempt_that_fails_in_its_clean_up_when_cancelled_is_the_last_one(self, end):
        attempts = []

        async def child():
            attempts.append(1)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                raise ValueError

        async with TaskScope(exception_handler=None) as scope:
            task = scope.create_task(child, retry=QUICK)
            await turns()
            task.cancel() if end == "task" else scope.abort()
        assert len(attempts) == 1 and isinstance(task.exception(), ValueError)

    async def test_a_failing_task_group_in_an_attempt_is_a_failure_as_any_other(self):
        """Before 3.13 asyncio's leaves a request in the task's account."""
        flaky = Flaky(3)

        async def later():
            # One that fails while it starts eagerly leaves the task cancelled on 3.12, with asyncio alone as well.
            await asyncio.sleep(0)
            await flaky()

        async def child():
            async with asyncio.TaskGroup() as group:
                group.create_task(later())
            return asyncio.current_task().cancelling()

        async with TaskScope() as scope:
            task = scope.create_task(child, retry=QUICK)
        assert task.result() == 0 and flaky.attempts == 4

    async def test_delays_grow_to_their_maximum(self):
        policy = Retry(delay=1, factor=2, max_delay=5, jitter=0)
        assert [policy.pause(failures) for failures in (1, 2, 3, 4, 10_000)] == [1, 2, 4, 5, 5]
        assert 0.5 <= Retry(delay=1, jitter=0.5).pause(1) <= 1


class TestRestart:
    async def test_a_child_is_run_again_also_when_it_returned(self):
        flaky = Flaky(0)
        async with Supervisor() as supervisor:
            task = supervisor.create_task(flaky, restart=QUICK)
            await turns(20)
            assert flaky.attempts > 2 and not task.done()
            supervisor.abort()

    async def test_an_attempt_that_returns_when_cancelled_is_the_last_one(self):
        attempts = []

        async def child():
            attempts.append(1)
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                return "stopped"

        async with Supervisor() as supervisor:
            task = supervisor.create_task(child, restart=QUICK)
            await turns()
            supervisor.abort()
        assert len(attempts) == 1 and task.result() == "stopped"

    async def test_it_gives_up_after_so_many_failures_in_a_row(self):
        flaky = Flaky(100)
        async with Supervisor() as supervisor:
            task = supervisor.create_task(flaky, restart=Retry(attempts=4, delay=0))
        assert flaky.attempts == 4 and task.exception().args == (4,)


class TestTimeLimit:
    async def test_each_attempt_has_its_time(self):
        attempts = []

        async def slow():
            attempts.append(1)
            if len(attempts) < 3:
                await asyncio.sleep(60)
            return "in time"

        async with TaskScope() as scope:
            assert await scope.create_task(slow, timeout=0.001, retry=QUICK) == "in time"

    async def test_alone_it_fails_the_child(self):
        async with TaskScope(exception_handler=None) as scope:
            task = scope.create_task(lambda: asyncio.sleep(60), timeout=0.001)
        assert isinstance(task.exception(), TimeoutError)


class TestMistakes:
    async def test_a_coroutine_cannot_run_twice(self):
        async with TaskScope() as scope:
            with pytest.raises(TypeError, match="callable"):
                scope.create_task(turns(), retry=QUICK)
            with pytest.raises(TypeError, match="callable"):
                scope.create_task(3, restart=QUICK)

    async def test_policies_are_checked_at_the_call(self):
        async with TaskScope() as scope:
            with pytest.raises(TypeError, match="Retry"):
                scope.create_task(turns, retry=3)
            with pytest.raises(ValueError, match="exclude"):
                scope.create_task(turns, retry=QUICK, restart=QUICK)
            with pytest.raises(ValueError, match="timeout"):
                scope.create_task(turns, timeout=-1)

    @pytest.mark.parametrize(
        "bad",
        [{"attempts": 0}, {"delay": -1}, {"factor": 0}, {"jitter": 2}, {"max_delay": -1}, {"within": -1}],
    )
    def test_what_is_no_policy(self, bad):
        with pytest.raises(ValueError):
            aiotools.Retry(**bad)

    @pytest.mark.parametrize(
        "bad", [{"attempts": "3"}, {"attempts": True}, {"on": 3}, {"on": (ValueError, BaseException)}]
    )
    def test_what_is_no_policy_by_its_type(self, bad):
        with pytest.raises(TypeError, match=next(iter(bad))):
            aiotools.Retry(**bad)
