"""ShieldScope and shielded TaskScopes: they hold off what comes from outside, and only that."""

import asyncio
import sys

import pytest

import aiotools
from aiotools import ShieldScope, TaskGroup, TaskScope, cancel_and_wait, move_on_after

SYNC = [False, True]
UNCANCEL_CLEARS = sys.version_info >= (3, 13)


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def fail():
    raise ValueError("failed")


async def forever():
    await asyncio.get_running_loop().create_future()


class Both:
    """A shield in either form, as an async context manager."""

    def __init__(self, sync, **kwargs):
        self.sync = sync
        self.scope = ShieldScope(**kwargs)

    async def __aenter__(self):
        return self.scope.__enter__() if self.sync else await self.scope.__aenter__()

    async def __aexit__(self, *exc_info):
        return self.scope.__exit__(*exc_info) if self.sync else await self.scope.__aexit__(*exc_info)


def is_patched(task):
    return getattr(task.cancel, "__self__", None) is not task


async def start(coro):
    task = asyncio.create_task(coro)
    await turns()
    return task


@pytest.mark.parametrize("sync", SYNC)
class TestHolding:
    async def test_a_request_takes_effect_at_the_end_of_the_block(self, sync):
        seen = []
        release = asyncio.get_running_loop().create_future()

        async def work():
            async with Both(sync):
                await release
                seen.append(asyncio.current_task().cancelling())
            seen.append("never")

        task = await start(work())
        assert task.cancel("first") is True
        assert task.cancel("second") is True
        assert task.cancelling() == 2
        await turns()
        release.set_result(None)
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert seen == [2] and caught.value.args == ()
        assert task.cancelling() == 2 and task.cancelled()
        assert not is_patched(task)

    async def test_uncancel_takes_the_latest_request_back(self, sync):
        release = asyncio.get_running_loop().create_future()

        async def work():
            async with Both(sync):
                await release
                return asyncio.current_task().uncancel()

        task = await start(work())
        task.cancel()
        task.cancel()
        assert task.uncancel() == 1
        release.set_result(None)
        assert await task == 0 and task.cancelling() == 0

    async def test_uncancel_with_nothing_recorded_returns_0(self, sync):
        async with Both(sync):
            task = asyncio.current_task()
            assert task.uncancel() == 0 and task.cancelling() == 0
        assert not is_patched(task)

    async def test_a_task_that_cancels_itself_is_held_as_well(self, sync):
        task = asyncio.current_task()
        with pytest.raises(asyncio.CancelledError):
            async with Both(sync):
                assert task.cancel() is True
                await turns()
                assert task.cancelling() == 1
        assert task.uncancel() == 0
        if not sync or UNCANCEL_CLEARS:
            await turns()
        else:
            # 3.11 and 3.12 deliver it once more.
            with pytest.raises(asyncio.CancelledError):
                await turns()

    async def test_an_exception_of_the_body_wins_and_the_request_stays_pending(self, sync):
        async def work():
            with pytest.raises(ValueError):
                async with Both(sync):
                    asyncio.current_task().cancel("first")
                    asyncio.current_task().cancel("second")
                    raise ValueError
            assert asyncio.current_task().cancelling() == 2
            await forever()

        task = asyncio.create_task(work())
        with pytest.raises(asyncio.CancelledError, match="second"):
            await task

    async def test_an_inner_shield_hands_over_to_the_outer_one(self, sync):
        seen = []

        async def work():
            async with Both(sync):
                async with Both(sync):
                    await turns(5)
                    seen.append("inner")
                await turns(2)
                seen.append(asyncio.current_task().cancelling())
            seen.append("never")

        task = await start(work())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["inner", 1] and task.cancelling() == 1

    async def test_a_cancelled_error_raised_by_the_body_propagates(self, sync):
        with pytest.raises(asyncio.CancelledError, match="mine"):
            async with Both(sync):
                raise asyncio.CancelledError("mine")
        assert asyncio.current_task().cancelling() == 0
        await turns()

    async def test_its_own_timeout_interrupts_it(self, sync):
        with pytest.raises(TimeoutError):
            async with Both(sync, timeout=0.001):
                await forever()
        assert asyncio.current_task().cancelling() == 0
        await turns()

    async def test_in_clean_up_after_a_cancellation(self, sync):
        done = []

        async def work():
            try:
                await forever()
            finally:
                async with Both(sync):
                    await turns(5)
                    done.append("cleaned up")

        task = await start(work())
        await cancel_and_wait(task)
        assert done == ["cleaned up"]
        assert task.cancelled() and task.cancelling() == 1

    async def test_a_task_in_a_shield_is_cancelled_by_the_scope_it_belongs_to_when_it_leaves(self, sync):
        done = []

        async def child():
            async with Both(sync):
                await turns(5)
                done.append("shielded")
            done.append("never")

        async with TaskScope() as scope:
            task = scope.create_task(child())
            await turns(1)
            scope.abort()
        assert done == ["shielded"] and task.cancelled()


@pytest.mark.parametrize("sync", SYNC)
class TestDeliveredOnce:
    """F-21. A plain `with` cannot suspend when it is left; the request is counted while the body waits for something."""

    @pytest.fixture(params=["future", "task", "gather", "queue"])
    def wait(self, request):
        """What the body waits for when the requests come; woken by release()."""

        async def wait(release):
            match request.param:
                case "future":
                    await release
                case "task":
                    await asyncio.create_task(asyncio.wait([release]))
                case "gather":
                    await asyncio.gather(release)
                case "queue":
                    queue = aiotools.Queue()
                    release.add_done_callback(lambda _: queue.async_q.put_nowait(None))
                    await queue.async_q.get()

        return wait

    async def start(self, sync, wait, ending, requests=1):
        """A task that waits in a shield, gets requests there, and then goes on with ending()."""
        release = asyncio.get_running_loop().create_future()

        async def work():
            try:
                async with Both(sync):
                    await wait(release)
            except asyncio.CancelledError as exc:
                assert exc.args == ()
                return await ending()
            raise AssertionError("nothing was raised")

        task = await start(work())
        for _ in range(requests):
            task.cancel("held")
        assert task.cancelling() == requests
        await turns()
        if not release.done():
            release.set_result(None)
        return task

    async def test_code_that_catches_it_and_uncancels_goes_on(self, sync, wait):
        async def ending():
            assert asyncio.current_task().uncancel() == 0
            await turns()
            await asyncio.sleep(0.001)
            return "went on"

        task = await self.start(sync, wait, ending)
        assert await task == "went on"

    async def test_code_that_only_catches_it_goes_on_too(self, sync, wait):
        async def ending():
            await turns()
            await asyncio.sleep(0.001)
            return asyncio.current_task().cancelling()

        task = await self.start(sync, wait, ending, requests=2)
        assert await task == 2

    async def test_clean_up_after_it_is_not_interrupted(self, sync, wait):
        async def ending():
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(0.001))
            return "cleaned up"

        task = await self.start(sync, wait, ending)
        assert await task == "cleaned up"

    async def test_a_task_that_cancels_itself_and_waits_then(self, sync, wait):
        release = asyncio.get_running_loop().create_future()

        async def work():
            task = asyncio.current_task()
            try:
                async with Both(sync):
                    task.cancel()
                    await turns(2)
                    await wait(release)
            except asyncio.CancelledError:
                await asyncio.sleep(0.001)
            return task.cancelling()

        task = await start(work())
        await turns()
        release.set_result(None)
        assert await task == 1

    async def test_what_is_taken_back_in_the_shield_is_not_delivered(self, sync, wait):
        release = asyncio.get_running_loop().create_future()

        async def work():
            async with Both(sync):
                await wait(release)
            await asyncio.sleep(0.001)
            return asyncio.current_task().cancelling()

        task = await start(work())
        task.cancel()
        task.cancel()
        assert (task.uncancel(), task.cancelling(), task.uncancel(), task.cancelling()) == (1, 1, 0, 0)
        release.set_result(None)
        assert await task == 0

    async def test_through_several_shields(self, sync, wait):
        release = asyncio.get_running_loop().create_future()
        seen = []

        async def work():
            try:
                async with Both(not sync):
                    async with Both(sync):
                        async with Both(not sync):
                            await wait(release)
                        seen.append(asyncio.current_task().cancelling())
                        await turns()
                    seen.append(asyncio.current_task().cancelling())
                    await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                await asyncio.sleep(0.001)
            return asyncio.current_task().cancelling()

        task = await start(work())
        task.cancel()
        release.set_result(None)
        assert await task == 1 and seen == [1, 1]

    async def test_an_exception_of_the_body_wins_and_the_request_is_pending(self, sync, wait):
        release = asyncio.get_running_loop().create_future()

        async def work():
            with pytest.raises(ZeroDivisionError):
                async with Both(sync):
                    await wait(release)
                    raise ZeroDivisionError
            assert asyncio.current_task().cancelling() == 1
            with pytest.raises(asyncio.CancelledError):
                await forever()
            await asyncio.sleep(0.001)
            return asyncio.current_task().cancelling()

        task = await start(work())
        task.cancel()
        release.set_result(None)
        assert await task == 1

    async def test_what_is_waited_for_can_be_cancelled_afterwards(self, sync):
        """It is told to stay while the request is counted, and no longer."""
        release = asyncio.get_running_loop().create_future()

        async def work():
            async with Both(sync):
                await release

        task = await start(work())
        task.cancel()
        assert "cancel" not in getattr(release, "__dict__", {}) and not release.cancelled()
        assert release.cancel() and release.cancelled()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_a_timeout_around_a_shield_ends_in_a_timeout_error(self, sync):
        done = []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                async with Both(sync):
                    await asyncio.sleep(0.005)
                    done.append("shielded")
        assert done == ["shielded"] and asyncio.current_task().cancelling() == 0
        await turns()
        await asyncio.sleep(0)


class TestDeliveredOnceByAsync:
    async def test_a_request_that_comes_while_the_shield_waits_for_children(self):
        done = []

        async def child():
            await turns(6)
            done.append("child")

        async def work():
            async with ShieldScope() as scope:
                scope.create_task(child())

        task = await start(work())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["child"] and task.cancelling() == 1


@pytest.mark.parametrize("sync", SYNC)
class TestInsideWorks:
    """What is opened inside a shield keeps its power there, also while a request is held (F-12)."""

    @pytest.fixture(params=[0, 1], ids=["nothing held", "one held"])
    def held(self, request):
        return request.param

    async def within(self, sync, held, work):
        """Runs work() in a shield that holds so many requests; they come out at the end."""
        finished = []

        async def shielded():
            async with Both(sync):
                await turns(3)
                task = asyncio.current_task()
                assert task.cancelling() == held
                await work()
                assert task.cancelling() == held
                await turns(2)
                finished.append(True)

        task = asyncio.create_task(shielded())
        await turns(1)
        for _ in range(held):
            task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            assert held
        else:
            task.result()
            assert not held
        assert finished == [True] and task.cancelling() == held and not is_patched(task)

    async def test_asyncio_timeout(self, sync, held):
        async def work():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await forever()

        await self.within(sync, held, work)

    async def test_nested_asyncio_timeouts(self, sync, held):
        async def work():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001) as outer:
                    async with asyncio.timeout(0.001) as inner:
                        await forever()
            assert outer.expired() or inner.expired()

        await self.within(sync, held, work)

    async def test_wait_for(self, sync, held):
        async def work():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(forever(), 0.001)

        await self.within(sync, held, work)

    async def test_asyncio_task_group(self, sync, held):
        async def work():
            with pytest.raises(ExceptionGroup) as caught:
                async with asyncio.TaskGroup() as group:
                    group.create_task(fail())
                    await forever()
            assert caught.group_contains(ValueError)

        await self.within(sync, held, work)

    async def test_our_task_group(self, sync, held):
        async def work():
            with pytest.raises(ExceptionGroup):
                async with TaskGroup() as group:
                    group.create_task(fail())
                    await forever()
            async with TaskGroup() as group:
                group.cancel()
                await forever()

        await self.within(sync, held, work)

    async def test_scope_timeouts_and_move_on_after(self, sync, held):
        async def work():
            with pytest.raises(TimeoutError):
                async with TaskScope(timeout=0.001):
                    await forever()
            async with move_on_after(0.001):
                await forever()
            async with TaskScope() as scope:
                scope.cancel()
                await forever()

        await self.within(sync, held, work)

    async def test_a_task_started_inside_may_cancel_its_creator(self, sync, held):
        async def work():
            host = asyncio.current_task()

            async def child():
                host.cancel("from inside")

            with pytest.raises(asyncio.CancelledError, match="from inside"):
                task = asyncio.create_task(child())
                await forever()
            await task
            host.uncancel()

        await self.within(sync, held, work)

    async def test_a_timeout_that_was_entered_outside_does_not_reach_inside(self, sync, held):
        async def work():
            with pytest.raises((TimeoutError, asyncio.CancelledError)):
                async with asyncio.timeout(0.001):
                    async with Both(sync):
                        await asyncio.sleep(0.004)
                        done.append(True)

        done = []
        if not sync or UNCANCEL_CLEARS:
            await self.within(sync, held, work)
            assert done == [True]


class TestNesting:
    async def test_an_unshielded_scope_inside_completes_normally(self):
        done = []

        async def child():
            await turns(6)
            done.append("child")

        async def work():
            async with ShieldScope():
                async with TaskScope() as scope:
                    scope.create_task(child())
                    await turns(4)
                    done.append("body")
                async with asyncio.TaskGroup() as group:
                    group.create_task(child())
            done.append("never")

        task = await start(work())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["body", "child", "child"]

    async def test_an_unshielded_scope_around_is_cancelled_when_the_shield_is_left(self):
        done = []

        async def sibling():
            try:
                await forever()
            finally:
                done.append("sibling")

        async def work():
            async with TaskScope() as scope:
                scope.create_task(sibling())
                async with ShieldScope():
                    await turns(5)
                    done.append("shielded")
                done.append("never")

        task = await start(work())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["shielded", "sibling"]

    async def test_a_cancelled_error_raised_in_an_inner_scope_ends_that_scope_only(self):
        done = []
        async with ShieldScope():
            async with TaskScope() as scope:
                child = scope.create_task(forever())
                raise asyncio.CancelledError
            done.append("after")
        assert done == ["after"] and child.cancelled()

    async def test_children_of_a_shielded_scope_are_not_touched(self):
        done = []

        async def child():
            await turns(8)
            done.append("child")

        async def work():
            async with TaskScope(shield=True) as scope:
                scope.create_task(child())
                await turns(5)

        task = await start(work())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["child"]

    async def test_a_child_starts_without_the_shields_of_its_host(self):
        async with TaskScope(shield=True) as scope:
            task = scope.create_task(forever())
            await turns()
            await cancel_and_wait(task)
        assert task.cancelled()

    async def test_along_a_chain_of_tasks_each_level_has_its_shield(self):
        done = []

        async def inner():
            async with ShieldScope():
                await turns(6)
                done.append("inner")
            done.append("never")

        async def outer():
            await asyncio.create_task(inner())
            done.append("never")

        task = await start(outer())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["inner"]

    async def test_many_shields_one_after_another_leave_nothing(self):
        task = asyncio.current_task()
        for _ in range(100):
            with ShieldScope():
                async with ShieldScope():
                    pass
        assert not is_patched(task)


class TestSync:
    async def test_the_target_is_none_and_there_are_no_children(self):
        shield = ShieldScope()
        with shield as target:
            assert target is None
            with pytest.raises(RuntimeError, match="plain `with`"):
                shield.create_task(turns())
            with pytest.raises(RuntimeError, match="plain `with`"):
                shield.cancel()

    async def test_it_is_left_as_it_was_entered(self):
        shield = ShieldScope()
        with shield:
            with pytest.raises(RuntimeError):
                await shield.__aexit__(None, None, None)

    async def test_out_of_order(self):
        outer, inner = ShieldScope(), ShieldScope()
        outer.__enter__()
        inner.__enter__()
        with pytest.raises(RuntimeError, match="entered inside it"):
            outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)
        outer.__exit__(None, None, None)
        assert not is_patched(asyncio.current_task())

    async def test_a_shield_whose_task_is_cancelled_past_it_leaves_no_patch(self):
        async def work():
            with ShieldScope():
                await forever()

        task = await start(work())
        assert is_patched(task)
        # Past the shield, as nothing else would end it.
        type(task).cancel(task)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not is_patched(task)


class TestLimits:
    """What a shield cannot know; docs/cancellation.rst says so."""

    @pytest.mark.parametrize("sync", SYNC)
    async def test_a_child_that_an_outer_group_of_ours_got_inside_is_held_off(self, sync):
        done = []
        with pytest.raises(ExceptionGroup):
            async with TaskGroup() as group:
                async with Both(sync):
                    group.create_task(fail())
                    await turns(4)
                    done.append("shielded")
                await forever()
        assert done == ["shielded"] and asyncio.current_task().cancelling() == 0

    @pytest.mark.parametrize("sync", SYNC)
    async def test_a_child_that_an_outer_group_of_asyncio_got_inside_interrupts_when_it_fails(self, sync):
        done = []
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                async with Both(sync):
                    group.create_task(fail())
                    await turns(4)
                    done.append("shielded")
        assert done == [] and not is_patched(asyncio.current_task())

    @pytest.mark.parametrize("sync", SYNC)
    async def test_a_child_that_it_got_outside_is_held_off(self, sync):
        done = []

        async def child():
            await turns(2)
            await fail()

        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
                async with Both(sync):
                    await asyncio.sleep(0.001)
                    done.append("shielded")
                await forever()
        assert done == ["shielded"]


class TestForeignTasks:
    @pytest.mark.loop_kinds("default", reason="the kind of task is what is tried")
    async def test_a_task_that_takes_no_attributes_is_refused_with_a_clear_error(self):
        class Slim:
            """A task whose class has slots only."""

            __slots__ = ("count",)

            def cancelling(self):
                return 0

        loop = asyncio.get_running_loop()
        me = asyncio.current_task()
        scope, plain = ShieldScope(), TaskScope()
        slim = Slim()
        asyncio.tasks._leave_task(loop, me)
        asyncio.tasks._enter_task(loop, slim)
        try:
            with pytest.raises(RuntimeError, match="'Slim' objects take no attributes"):
                scope.__enter__()
            with pytest.raises(StopIteration):
                plain.__aenter__().send(None)
            with pytest.raises(StopIteration):
                plain.__aexit__(None, None, None).send(None)
        finally:
            asyncio.tasks._leave_task(loop, slim)
            asyncio.tasks._enter_task(loop, me)

    async def test_methods_that_were_replaced_before_come_back(self):
        calls = []
        task = asyncio.current_task()
        original = task.cancel
        mine = lambda msg=None: calls.append(msg) or original(msg)
        task.cancel = mine
        try:
            with pytest.raises(asyncio.CancelledError):
                async with ShieldScope():
                    task.cancel("held")
                    assert calls == []
            assert calls == ["held"] and task.cancel is mine
            task.uncancel()
        finally:
            del task.cancel

    async def test_what_others_put_on_top_stays_and_works(self):
        task = asyncio.current_task()
        try:
            with ShieldScope():
                ours = task.cancelling
                task.cancelling = lambda: ours()
            assert task.cancelling() == 0
        finally:
            del task.cancelling

    async def test_the_methods_keep_their_signatures(self):
        task = asyncio.current_task()
        with ShieldScope():
            with pytest.raises(TypeError):
                task.cancel(1, 2)
            with pytest.raises(TypeError):
                task.cancel(message=1)
            task.cancel(msg="x")
            assert task.uncancel() == 0
