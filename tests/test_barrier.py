"""Barrier: tasks that wait for each other."""

import asyncio
import gc
import inspect
import math
import threading
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiotools
from aiotools import AsyncBarrier, Barrier, VirtualClock


async def turns(n=5):
    for _ in range(n):
        await asyncio.sleep(0)


async def outcome(awaitable):
    try:
        return await awaitable
    except asyncio.CancelledError:
        return "cancelled"
    except Exception as exc:
        return exc


async def party(barrier, **kwargs):
    return await outcome(barrier.wait(**kwargs))


def spawn(barrier, n=1, **kwargs):
    return [asyncio.create_task(party(barrier, **kwargs)) for _ in range(n)]


async def results(tasks):
    """A task that is cancelled before its first step has no say in it."""
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    return ["cancelled" if isinstance(answer, asyncio.CancelledError) else answer for answer in answers]


class TestAsAsyncioDoes:
    def test_async_barrier_is_the_same_class(self):
        assert AsyncBarrier is Barrier
        assert aiotools.barrier.Barrier is Barrier

    async def test_all_go_on_together_with_indices(self):
        barrier = Barrier(3)
        assert (barrier.parties, barrier.n_waiting, barrier.broken, barrier.generation) == (3, 0, False, 0)
        tasks = spawn(barrier, 2)
        await turns()
        assert barrier.n_waiting == 2 and not tasks[0].done()
        # The last one does not wait.
        assert await barrier.wait() == 2
        assert barrier.n_waiting == 0
        assert await asyncio.gather(*tasks) == [0, 1]
        assert barrier.generation == 1

    async def test_many_generations(self):
        barrier = Barrier(5)
        seen = []

        async def party(name):
            for number in range(20):
                index = await barrier.wait()
                seen.append((number, index))

        await asyncio.gather(*(party(n) for n in range(5)))
        assert barrier.generation == 20
        assert sorted(seen) == [(number, index) for number in range(20) for index in range(5)]
        # Nobody is a generation ahead.
        assert [number for number, _ in seen] == sorted(number for number, _ in seen)

    async def test_more_tasks_than_parties(self):
        barrier = Barrier(2)
        tasks = spawn(barrier, 7)
        await turns(20)
        assert sum(task.done() for task in tasks) == 6 and barrier.n_waiting == 1
        await barrier.wait()
        assert sorted(await asyncio.gather(*tasks)) == [0, 0, 0, 0, 1, 1, 1]

    async def test_one_party_never_waits(self):
        barrier = Barrier(1)
        for _ in range(3):
            assert await barrier.wait() == 0
        assert barrier.generation == 3

    async def test_async_with_waits_on_entry(self):
        barrier = Barrier(2)

        async def party():
            async with barrier as index:
                return index

        assert sorted(await asyncio.gather(party(), party())) == [0, 1]
        with pytest.raises(ZeroDivisionError):
            async with Barrier(1):
                raise ZeroDivisionError

    async def test_abort_breaks_it_for_those_inside_and_those_to_come(self):
        barrier = Barrier(3)
        tasks = spawn(barrier, 2)
        await turns()
        assert await barrier.abort() is None
        assert barrier.broken and barrier.n_waiting == 0
        for answer in await asyncio.gather(*tasks):
            assert type(answer) is asyncio.BrokenBarrierError and answer.__cause__ is None
        with pytest.raises(asyncio.BrokenBarrierError, match="aborted"):
            await barrier.wait()
        assert await barrier.reset() is None
        assert not barrier.broken
        assert sorted(await asyncio.gather(*spawn(barrier, 3))) == [0, 1, 2]

    async def test_reset_breaks_those_inside_only(self):
        barrier = Barrier(3)
        tasks = spawn(barrier, 2)
        await turns()
        await barrier.reset()
        assert not barrier.broken
        late = spawn(barrier, 3)
        for answer in await asyncio.gather(*tasks):
            assert type(answer) is asyncio.BrokenBarrierError
        assert sorted(await asyncio.gather(*late)) == [0, 1, 2]

    async def test_abort_and_reset_act_at_the_call(self):
        barrier = Barrier(2)
        barrier.abort()
        assert barrier.broken
        barrier.reset()
        assert not barrier.broken
        await asyncio.create_task(barrier.abort())
        assert barrier.broken

    async def test_repr_says_the_state(self):
        barrier = Barrier(2)
        assert "Barrier object at 0x" in repr(barrier) and "[filling, waiters:0/2]" in repr(barrier)
        tasks = spawn(barrier)
        await turns()
        assert "[filling, waiters:1/2]" in repr(barrier)
        last = asyncio.create_task(barrier.wait())
        tasks += [last]
        await asyncio.sleep(0)
        barrier.abort()
        assert "[broken]" in repr(barrier)
        await asyncio.gather(*tasks, return_exceptions=True)


class TestArguments:
    @pytest.mark.parametrize("bad, error", [(0, ValueError), (-1, ValueError), ("2", TypeError), (1.5, TypeError)])
    def test_parties(self, bad, error):
        with pytest.raises(error, match="parties"):
            Barrier(bad)

    def test_others(self):
        with pytest.raises(TypeError, match="parties"):
            Barrier()
        with pytest.raises(TypeError):
            Barrier(1, None)
        with pytest.raises(TypeError, match="unexpected"):
            Barrier(1, other=1)
        with pytest.raises(TypeError, match="action must be callable"):
            Barrier(1, action=1)
        with pytest.raises(TypeError, match="timeout"):
            Barrier(1, timeout="1")
        with pytest.raises(ValueError, match="NaN"):
            Barrier(1, timeout=math.nan)
        with pytest.raises(OverflowError):
            Barrier(2**70)

    def test_of_wait(self):
        barrier = Barrier(1)
        with pytest.raises(TypeError, match="timeout"):
            barrier.wait("1")
        with pytest.raises(ValueError, match="NaN"):
            barrier.wait(timeout=math.nan)
        with pytest.raises(TypeError):
            barrier.wait(1, 2)

    def test_signatures(self):
        assert str(inspect.signature(Barrier)) == "(parties, *, action=None, timeout=None)"
        assert str(inspect.signature(Barrier.wait)) == "(self, /, timeout=None)"

    def test_subclasses_attributes_and_weak_references(self):
        class Mine(Barrier):
            pass

        barrier = Mine(2, timeout=1)
        barrier.name = "mine"
        assert weakref.ref(barrier)() is barrier
        assert asyncio.run(outcome(Mine(1).wait())) == 0


class TestWaitObject:
    async def test_it_is_a_coroutine_to_others(self):
        barrier = Barrier(3)
        one = asyncio.create_task(barrier.wait())
        two = asyncio.ensure_future(asyncio.wait_for(barrier.wait(), 10))
        async with asyncio.TaskGroup() as group:
            three = group.create_task(barrier.wait())
        assert sorted([await one, await two, three.result()]) == [0, 1, 2]

    async def test_it_is_lazy_and_for_one_use(self):
        barrier = Barrier(2)
        wait = barrier.wait()
        await turns()
        assert barrier.n_waiting == 0
        task = asyncio.ensure_future(wait)
        await turns()
        assert barrier.n_waiting == 1
        await barrier.wait()
        await task
        with pytest.raises(RuntimeError, match=r"already awaited Barrier\.wait"):
            await wait

    def test_dropped_it_warns(self):
        with pytest.warns(RuntimeWarning, match=r"Barrier\.wait.* was never awaited"):
            Barrier(1).wait()
            gc.collect()

    async def test_closed_it_leaves(self):
        barrier = Barrier(2)
        wait = barrier.wait()
        wait.send(None)
        assert barrier.n_waiting == 1
        wait.close()
        assert barrier.n_waiting == 0
        unused = barrier.wait()
        unused.close()

    async def test_resumed_by_hand_it_says_so_and_leaves(self):
        barrier = Barrier(2)
        wait = barrier.wait()
        wait.send(None)
        with pytest.raises(RuntimeError, match="resumed before"):
            wait.send(None)
        assert barrier.n_waiting == 0

    def test_without_a_loop(self):
        wait = Barrier(1).wait()
        with pytest.raises(RuntimeError, match="no running event loop"):
            wait.send(None)


class TestCancellation:
    async def test_who_is_cancelled_leaves_and_the_others_wait(self):
        barrier = Barrier(3)
        tasks = spawn(barrier, 2)
        await turns()
        tasks[0].cancel()
        assert await tasks[0] == "cancelled"
        assert barrier.n_waiting == 1 and not barrier.broken
        tasks = [tasks[1], *spawn(barrier, 2)]
        assert await asyncio.gather(*tasks) == [0, 1, 2]

    async def test_indices_are_unique_after_cancellations(self):
        barrier = Barrier(5)
        for _ in range(10):
            tasks = spawn(barrier, 4)
            await turns()
            for task in tasks[::2]:
                task.cancel()
            await turns()
            tasks = tasks[1::2] + spawn(barrier, 3)
            assert sorted(await asyncio.gather(*tasks)) == [0, 1, 2, 3, 4]

    async def test_after_the_release_it_is_out_and_the_generation_complete(self):
        barrier = Barrier(3)
        tasks = spawn(barrier, 2)
        await turns()
        assert await barrier.wait() == 2
        tasks[0].cancel()
        assert await asyncio.gather(*tasks) == ["cancelled", 1]
        assert not barrier.broken and barrier.generation == 1
        assert sorted(await asyncio.gather(*spawn(barrier, 3))) == [0, 1, 2]

    async def test_a_timeout_around_it_only_leaves(self):
        with VirtualClock().patch_loop():
            barrier = Barrier(2)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5):
                    await barrier.wait()
            assert not barrier.broken and barrier.n_waiting == 0

    async def test_the_message_goes_through(self):
        task = asyncio.create_task(Barrier(2).wait())
        await turns()
        task.cancel("why")
        with pytest.raises(asyncio.CancelledError, match="why"):
            await task

    @pytest.mark.parametrize("with_action", [False, True])
    @pytest.mark.parametrize("victim", range(6))
    async def test_everywhere(self, victim, with_action):
        """At each turn of the loop each task once: nobody is lost, counts go back to zero."""

        async def action():
            await turns(2)

        for turn in range(12):
            barrier = Barrier(3, action=action if with_action else None)
            tasks = spawn(barrier, 6)
            await turns(turn)
            tasks[victim].cancel()
            await turns(30)
            if barrier.broken:
                assert with_action
                barrier.reset()
                await turns()
            for task in [task for task in tasks if not task.done()]:
                task.cancel()
            await results(tasks)
            assert barrier.n_waiting == 0
            assert sorted(await asyncio.gather(*spawn(barrier, 3))) == [0, 1, 2]


class TestTimeout:
    async def test_it_breaks_the_barrier_for_all(self):
        clock = VirtualClock()
        with clock.patch_loop():
            barrier = Barrier(3)
            patient = spawn(barrier)
            answers = await asyncio.gather(*spawn(barrier, timeout=5), *patient)
            assert clock.vtime == 5 and barrier.broken
            for answer in answers:
                assert type(answer) is asyncio.BrokenBarrierError
                assert type(answer.__cause__) is TimeoutError
            with pytest.raises(asyncio.BrokenBarrierError) as info:
                await barrier.wait()
            assert type(info.value.__cause__) is TimeoutError
            barrier.reset()
            barrier.abort()
            with pytest.raises(asyncio.BrokenBarrierError) as info:
                await barrier.wait()
            assert info.value.__cause__ is None

    async def test_there_is_a_default(self):
        clock = VirtualClock()
        with clock.patch_loop():
            barrier = Barrier(2, timeout=7)
            with pytest.raises(asyncio.BrokenBarrierError):
                await barrier.wait()
            assert clock.vtime == 7
            barrier.reset()
            with pytest.raises(asyncio.BrokenBarrierError):
                await barrier.wait(timeout=1)
            assert clock.vtime == 8
            barrier.reset()
            with pytest.raises(asyncio.BrokenBarrierError):
                await barrier.__aenter__()
            assert clock.vtime == 15

    async def test_infinity_is_none(self):
        with VirtualClock().patch_loop():
            barrier = Barrier(2, timeout=3)
            task = asyncio.create_task(barrier.wait(math.inf))
            await asyncio.sleep(100)
            assert not barrier.broken
            await barrier.wait()
            await task

    async def test_one_that_is_met_leaves_nothing(self):
        clock = VirtualClock()
        with clock.patch_loop():
            barrier = Barrier(2, timeout=50)
            for _ in range(5):
                assert sorted(await asyncio.gather(*spawn(barrier, 2))) == [0, 1]
            await asyncio.sleep(1000)
            assert not barrier.broken

    @pytest.mark.parametrize("timeout", [0, -1])
    async def test_no_time_at_all_is_one_turn(self, timeout):
        barrier = Barrier(2)
        tasks = spawn(barrier, 2, timeout=timeout)
        assert sorted(await asyncio.gather(*tasks)) == [0, 1]
        with pytest.raises(asyncio.BrokenBarrierError):
            await barrier.wait(timeout=timeout)

    async def test_it_counts_while_an_action_keeps_it_out(self):
        clock = VirtualClock()
        with clock.patch_loop():
            barrier = Barrier(1, action=lambda: asyncio.sleep(100))
            actor = asyncio.create_task(outcome(barrier.wait()))
            await turns()
            with pytest.raises(asyncio.BrokenBarrierError):
                await barrier.wait(timeout=10)
            assert clock.vtime == 10
            assert type(await actor) is asyncio.BrokenBarrierError


class TestAction:
    async def test_it_runs_once_per_generation_before_the_others_go_on(self):
        calls = []
        barrier = Barrier(3, action=lambda: calls.append((barrier.generation, barrier.n_waiting)))

        async def party():
            for number in range(3):
                await barrier.wait()
                assert len(calls) > number

        await asyncio.gather(party(), party(), party())
        assert calls == [(0, 0), (1, 0), (2, 0)]

    async def test_an_async_one_is_awaited_by_the_last(self):
        tasks = []

        async def action():
            tasks.append(asyncio.current_task())
            await aiotools.sleep(0.001)
            await turns()
            assert barrier.generation or not first.done()

        barrier = Barrier(2, action=action)
        first = asyncio.create_task(barrier.wait())
        await turns()
        late = asyncio.create_task(barrier.wait())
        await turns()
        # Who comes meanwhile belongs to the next generation.
        next_one = asyncio.create_task(barrier.wait())
        assert await late == 1
        assert await first == 0
        assert tasks == [late] and not next_one.done()
        assert sorted([await barrier.wait(), await next_one]) == [0, 1]

    @pytest.mark.parametrize("kind", ["sync", "async", "async late"])
    async def test_its_failure_breaks_the_barrier_for_all(self, kind):
        error = ValueError("no")

        async def fail():
            if kind == "async late":
                await turns(2)
            raise error

        def fail_at_once():
            raise error

        barrier = Barrier(3, action=fail_at_once if kind == "sync" else fail)
        answers = await asyncio.gather(*spawn(barrier, 3))
        for answer in answers:
            assert type(answer) is asyncio.BrokenBarrierError and answer.__cause__ is error
        assert barrier.broken and barrier.generation == 0
        with pytest.raises(asyncio.BrokenBarrierError) as info:
            await barrier.wait()
        assert info.value.__cause__ is error
        error.__traceback__ = None

    async def test_its_cancellation_breaks_it_too(self):
        barrier = Barrier(2, action=lambda: asyncio.sleep(1000))
        first = spawn(barrier)[0]
        await turns()
        last = asyncio.create_task(barrier.wait())
        await turns()
        last.cancel("why")
        with pytest.raises(asyncio.CancelledError, match="why"):
            await last
        answer = await first
        assert type(answer) is asyncio.BrokenBarrierError
        assert type(answer.__cause__) is asyncio.CancelledError

    async def test_one_that_swallows_a_cancellation_goes_on(self):
        async def action():
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                await turns()

        barrier = Barrier(2, action=action)
        first = spawn(barrier)[0]
        await turns()
        last = asyncio.create_task(barrier.wait())
        await turns()
        last.cancel()
        assert await first == 0 and await last == 1

    async def test_abort_and_reset_meanwhile(self):
        for method in ("abort", "reset"):
            done = []

            async def action(done=done):
                await turns(5)
                done.append(1)

            barrier = Barrier(2, action=action)
            tasks = spawn(barrier, 2)
            await turns(2)
            getattr(barrier, method)()
            for answer in await asyncio.gather(*tasks):
                assert type(answer) is asyncio.BrokenBarrierError
            assert done == [1] and barrier.generation == 0
            assert barrier.broken is (method == "abort")
            await barrier.reset()
            assert sorted(await asyncio.gather(*spawn(barrier, 2))) == [0, 1]

    async def test_one_that_uses_the_barrier(self):
        """Hostile: it resets, aborts, and adds parties from inside."""
        for hostile in ("abort", "reset", "add_party", "leave"):
            barrier = Barrier(2, action=lambda: getattr(barrier, hostile)())  # noqa: B023
            answers = await asyncio.gather(*spawn(barrier, 2))
            if hostile in ("abort", "reset"):
                assert [type(answer) for answer in answers] == [asyncio.BrokenBarrierError] * 2
            else:
                assert answers == [0, 1]
                assert barrier.parties == (3 if hostile == "add_party" else 1)

    async def test_one_that_waits_in_its_own_barrier_is_blocked_until_cancelled(self):
        barrier = Barrier(1, action=lambda: barrier.wait())
        task = asyncio.create_task(barrier.wait())
        await turns()
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert barrier.broken

    async def test_what_cannot_be_awaited_is_ignored(self):
        for value in (1, None, "text", [], object()):
            assert await Barrier(1, action=lambda value=value: value).wait() == 0

    async def test_one_whose_awaitable_is_wrong(self):
        class Bad:
            def __await__(self):
                return 1

        with pytest.raises(asyncio.BrokenBarrierError) as info:
            await Barrier(1, action=Bad).wait()
        assert type(info.value.__cause__) is TypeError

    def test_what_ends_the_program_goes_through(self, new_loop):
        def stop():
            raise KeyboardInterrupt

        loop = new_loop()
        barrier = Barrier(2, action=stop)

        async def main():
            first = asyncio.create_task(outcome(barrier.wait()))
            await turns()
            with pytest.raises(KeyboardInterrupt):
                await barrier.wait()
            answer = await first
            assert type(answer.__cause__) is KeyboardInterrupt

        loop.run_until_complete(main())

    async def test_closing_the_wait_closes_the_action(self):
        closed = []

        async def action():
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                closed.append(1)

        barrier = Barrier(1, action=action)
        wait = barrier.wait()
        wait.send(None)
        wait.close()
        assert closed == [1] and barrier.broken


class TestParties:
    async def test_add_party(self):
        barrier = Barrier(2)
        tasks = spawn(barrier)
        await turns()
        assert barrier.add_party() == 3 == barrier.parties
        tasks += spawn(barrier)
        await turns()
        assert barrier.n_waiting == 2
        await barrier.wait()
        assert await asyncio.gather(*tasks) == [0, 1]

    async def test_leave_lets_the_others_go_on(self):
        barrier = Barrier(3)
        tasks = spawn(barrier, 2)
        await turns()
        assert barrier.leave() == 2
        assert await asyncio.gather(*tasks) == [0, 1]
        assert (barrier.parties, barrier.generation) == (2, 1)
        assert sorted(await asyncio.gather(*spawn(barrier, 2))) == [0, 1]

    @pytest.mark.parametrize("is_async", [False, True])
    async def test_the_action_is_then_run_by_who_came_last(self, is_async):
        actors = []

        def action():
            actors.append(asyncio.current_task())
            return turns() if is_async else None

        barrier = Barrier(4, action=action)
        tasks = spawn(barrier, 3)
        await turns()
        barrier.leave()
        assert barrier.n_waiting == 0
        assert await asyncio.gather(*tasks) == [0, 1, 2]
        assert actors == [tasks[2]] and barrier.generation == 1

    async def test_if_that_one_is_cancelled_another_runs_it(self):
        actors = []
        barrier = Barrier(3, action=lambda: actors.append(asyncio.current_task()))
        tasks = spawn(barrier, 2)
        await turns()
        barrier.leave()
        tasks[1].cancel()
        assert await asyncio.gather(*tasks) == [0, "cancelled"]
        assert actors == [tasks[0]] and not barrier.broken
        # And if it was the only one, the barrier is as before.
        barrier = Barrier(2, action=lambda: actors.append("never"))
        tasks = spawn(barrier)
        await turns()
        barrier.leave()
        tasks[0].cancel()
        assert await tasks[0] == "cancelled"
        assert (barrier.parties, barrier.generation, len(actors)) == (1, 0, 1)
        barrier.add_party()
        assert sorted(await asyncio.gather(*spawn(barrier, 2))) == [0, 1]

    async def test_all_may_leave(self):
        barrier = Barrier(2)
        assert barrier.leave() == 1
        assert barrier.leave() == 0
        with pytest.raises(RuntimeError, match="all parties have left"):
            barrier.leave()
        with pytest.raises(RuntimeError, match="all parties have left"):
            await barrier.wait()
        barrier.add_party()
        assert await barrier.wait() == 0

    async def test_parties_come_and_go(self):
        barrier = Barrier(1)
        rounds = []

        async def party(n):
            for _ in range(n):
                await barrier.wait()
            rounds.append(n)
            barrier.leave()

        tasks = []
        for n in range(1, 10):
            barrier.add_party()
            tasks.append(asyncio.create_task(party(n)))
        barrier.leave()
        await asyncio.gather(*tasks)
        assert rounds == list(range(1, 10)) and barrier.parties == 0 and barrier.generation == 9


class TestLoopsAndThreads:
    def test_it_may_serve_one_loop_after_the_other(self, new_loop):
        barrier = Barrier(2)

        async def meet():
            return await asyncio.gather(barrier.wait(), barrier.wait())

        for _ in range(3):
            loop = new_loop()
            assert loop.run_until_complete(meet()) == [0, 1]

    @pytest.mark.threads
    async def test_two_loops_at_once_are_refused(self):
        barrier = Barrier(3)
        tasks = spawn(barrier)
        await turns()
        answer = await asyncio.to_thread(asyncio.run, outcome(barrier.wait()))
        assert type(answer) is RuntimeError and "different event loop" in str(answer)
        tasks += spawn(barrier, 2)
        assert sorted(await asyncio.gather(*tasks)) == [0, 1, 2]

    @pytest.mark.threads
    @pytest.mark.loop_kinds("debug", reason="misuse is an error in debug mode")
    async def test_use_from_another_thread_is_an_error_in_debug_mode(self):
        barrier = Barrier(2)
        task = spawn(barrier)[0]
        await turns()
        errors = []

        def misuse():
            for name in ("abort", "reset", "add_party", "leave"):
                try:
                    getattr(barrier, name)()
                except RuntimeError as exc:
                    errors.append(str(exc))

        thread = threading.Thread(target=misuse)
        thread.start()
        thread.join()
        assert len(errors) == 4 and all("thread" in text for text in errors)
        assert (barrier.parties, barrier.n_waiting, barrier.broken) == (2, 1, False)
        await barrier.wait()
        assert await task == 0

    async def test_a_barrier_keeps_the_tasks_that_wait_in_it(self):
        barrier = Barrier(2)
        seen = []

        async def party():
            seen.append(await barrier.wait())

        ref = weakref.ref(asyncio.create_task(party()))
        await turns()
        gc.collect()
        assert ref() is not None
        await barrier.wait()
        await turns()
        assert seen == [0]

    def test_a_loop_closed_with_tasks_inside_leaves_nothing(self):
        barrier = Barrier(2)
        loop = asyncio.new_event_loop()
        wait = barrier.wait(timeout=100)
        loop.call_soon(wait.send, None)
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()
        assert barrier.n_waiting == 1
        wait.close()
        assert barrier.n_waiting == 0

    def test_a_cycle_with_waiters_is_collected(self):
        loop = asyncio.new_event_loop()

        async def main():
            barrier = Barrier(2, action=lambda: barrier)
            wait = barrier.wait(timeout=100)
            wait.send(None)
            barrier.kept = wait
            return weakref.ref(barrier)

        ref = loop.run_until_complete(main())
        loop.close()
        del loop
        gc.collect()
        assert ref() is None

    async def test_a_release_that_cannot_wake_changes_nothing(self, monkeypatch):
        barrier = Barrier(2)
        task = spawn(barrier)[0]
        await turns()
        loop = asyncio.get_running_loop()
        real = loop.call_soon

        def broken(*args, **kwargs):
            raise ZeroDivisionError

        wait = barrier.wait()
        loop.call_soon = broken
        try:
            with pytest.raises(ZeroDivisionError):
                wait.send(None)
        finally:
            loop.call_soon = real
            vars(loop).pop("call_soon", None)
        assert (barrier.n_waiting, barrier.generation) == (1, 0)
        assert await barrier.wait() == 1
        assert await task == 0


# --- beside asyncio.Barrier ----------------------------------------------------------------------------------------

OPERATIONS = st.one_of(
    st.tuples(st.just("wait"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 10)),
    st.tuples(st.just("abort"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("settle"), st.just(0)),
)


class Side:
    """One barrier and the tasks that use it."""

    def __init__(self, barrier):
        self.barrier = barrier
        self.tasks = []

    async def apply(self, operation, number):
        match operation:
            case "wait":
                self.tasks += spawn(self.barrier, number)
            case "cancel":
                if number < len(self.tasks):
                    self.tasks[number].cancel()
            case "abort":
                await self.barrier.abort()
            case "reset":
                await self.barrier.reset()
        # Both come to rest: a turn more or less is nobody's business.
        await turns(40)

    def state(self, indices):
        results = []
        for task in self.tasks:
            value = task.result() if task.done() else "waiting"
            if isinstance(value, Exception):
                value = type(value).__name__
            results.append(value if indices or not isinstance(value, int) else "passed")
        return results, self.barrier.n_waiting, self.barrier.broken, self.barrier.parties


@settings(max_examples=60)
@given(parties=st.integers(1, 4), operations=st.lists(OPERATIONS, max_size=12))
async def test_it_does_what_asyncio_barrier_does(parties, operations):
    ours, theirs = Side(Barrier(parties)), Side(asyncio.Barrier(parties))
    # asyncio's indices are not unique after a cancellation.
    indices = not any(name == "cancel" for name, _ in operations)
    for operation in operations:
        await ours.apply(*operation)
        await theirs.apply(*operation)
        assert ours.state(indices) == theirs.state(indices)
    for side in (ours, theirs):
        for task in side.tasks:
            task.cancel()
        await results(side.tasks)
        assert side.barrier.n_waiting == 0


@settings(max_examples=60)
@given(parties=st.integers(1, 3), operations=st.lists(OPERATIONS, max_size=10))
async def test_in_a_hurry_too(parties, operations):
    """Without coming to rest in between; only what is certain is compared: who is out at the end, and how."""
    barrier = Barrier(parties)
    tasks = []
    for name, number in operations:
        match name:
            case "wait":
                tasks += spawn(barrier, number)
            case "cancel" if number < len(tasks):
                tasks[number].cancel()
            case "abort":
                barrier.abort()
            case "reset":
                barrier.reset()
            case "settle":
                await turns(2)
    await turns(40)
    assert sum(not task.done() for task in tasks) == barrier.n_waiting < barrier.parties
    barrier.reset()
    answers = await results(tasks)
    assert all(answer == "cancelled" or type(answer) in (int, asyncio.BrokenBarrierError) for answer in answers), (
        answers
    )
    assert sorted(await asyncio.gather(*spawn(barrier, parties))) == list(range(parties))
