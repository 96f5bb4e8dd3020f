"""AsyncContextGroup."""

import asyncio
import contextlib
import contextvars
import functools
import gc
import sys
import weakref

import pytest

from aiotools.context import AsyncContextGroup, actxgroup, actxmgr, closing_async, resetting

var = contextvars.ContextVar("var", default="unset")


class Error(Exception):
    pass


class Ledger:
    """What was entered and not left again."""

    def __init__(self):
        self.trace = []
        self.open = 0
        self.most = 0
        self.under_way = 0

    def __call__(self, name, **options):
        return Manager(self, name, **options)

    def names(self, verb):
        return [name for did, name in self.trace if did == verb]


class Manager:
    """Suspends as often as asked on either side, fails if asked, and keeps the books."""

    def __init__(self, ledger, name, *, turns=0, enter=None, exit=None, result=None, swallow=False, hang=None):
        self.ledger = ledger
        self.name = name
        self.turns = turns
        self.enter_error = enter
        self.exit_error = exit
        self.result = result
        self.swallow = swallow
        self.hang = hang
        self.exc_info = None
        self.tasks = []

    async def suspend(self):
        ledger = self.ledger
        ledger.under_way += 1
        ledger.most = max(ledger.most, ledger.under_way)
        try:
            for _ in range(self.turns):
                await asyncio.sleep(0)
        finally:
            ledger.under_way -= 1

    async def __aenter__(self):
        self.tasks.append(asyncio.current_task())
        self.ledger.trace.append(("begin", self.name))
        await self.suspend()
        if self.enter_error is not None:
            raise self.enter_error
        self.ledger.open += 1
        self.ledger.trace.append(("enter", self.name))
        return self.name

    async def __aexit__(self, *exc_info):
        self.tasks.append(asyncio.current_task())
        self.exc_info = exc_info
        # Once it has begun to be left, it is its own business to be left in the end.
        if ("enter", self.name) in self.ledger.trace:
            self.ledger.open -= 1
        self.ledger.trace.append(("exit", self.name))
        if self.hang is not None:
            try:
                await self.hang.wait()
            except asyncio.CancelledError:
                self.ledger.trace.append(("interrupted", self.name))
                raise
        try:
            await self.suspend()
        except asyncio.CancelledError:
            if not self.swallow:
                raise
        if self.exit_error is not None:
            raise self.exit_error
        return self.result


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture(params=[0, 1], ids=["straight", "suspending"])
def turns(request):
    return request.param


class TestDefaultMode:
    def test_names(self):
        assert actxgroup is AsyncContextGroup

    async def test_values_come_in_order_and_are_emptied(self, ledger, turns):
        group = AsyncContextGroup([ledger(n, turns=turns * (5 - n)) for n in range(5)])
        assert group.exit_states() == []
        async with group as values:
            assert values == [0, 1, 2, 3, 4]
            assert ledger.open == 5
            assert group.exit_states() == []
        assert values == []
        assert group.exit_states() == [None] * 5
        assert group.exit_states() is group.exit_states()
        assert ledger.open == 0

    async def test_takes_any_iterable_and_add(self, ledger):
        group = AsyncContextGroup(ledger(n) for n in range(2))
        assert group.add(ledger(2)) is None
        async with group as values:
            assert values == [0, 1, 2]
        empty = AsyncContextGroup()
        async with empty as values:
            assert values == []
        assert empty.exit_states() == []

    async def test_they_enter_and_leave_at_once(self, ledger):
        async with AsyncContextGroup([ledger(n, turns=20) for n in range(10)]):
            assert ledger.most == 10
            ledger.most = 0
        assert ledger.most == 10

    async def test_they_begin_in_order(self, ledger):
        managers = [ledger(n, turns=n % 3) for n in range(20)]
        async with AsyncContextGroup(managers):
            pass
        assert ledger.names("begin") == list(range(20))
        assert ledger.names("exit") == list(range(20))

    async def test_a_failure_to_enter_is_a_value_and_the_block_runs(self, ledger, turns):
        error = Error("enter")
        managers = [ledger(0), ledger(1, turns=turns, enter=error), ledger(2, turns=turns)]
        group = AsyncContextGroup(managers)
        async with group as values:
            assert values == [0, error, 2]
        assert group.exit_states() == [None, None, None]
        # Also the one that failed is left.
        assert sorted(ledger.names("exit")) == [0, 1, 2]

    async def test_a_cancellation_of_its_own_is_a_value(self, ledger, turns):
        error = asyncio.CancelledError("mine")
        async with AsyncContextGroup([ledger(0, turns=turns, enter=error), ledger(1)]) as values:
            assert values == [error, 1]

    async def test_what_exits_return_and_raise_is_kept_and_nothing_is_raised(self, ledger, turns):
        error = Error("exit")
        cancelled = asyncio.CancelledError("mine")
        group = AsyncContextGroup(
            [
                ledger(0, turns=turns, result=True),
                ledger(1, turns=turns, exit=error),
                ledger(2, result=False),
                ledger(3, exit=cancelled, turns=turns),
            ]
        )
        async with group:
            pass
        assert group.exit_states() == [True, error, False, cancelled]

    async def test_all_get_the_exception_of_the_block_and_none_suppresses_it(self, ledger, turns):
        managers = [ledger(n, turns=turns, result=True) for n in range(3)]
        error = Error("block")
        with pytest.raises(Error) as info:
            async with AsyncContextGroup(managers):
                raise error
        assert info.value is error
        assert error.__context__ is None
        for manager in managers:
            assert manager.exc_info[:2] == (Error, error)
            assert manager.exc_info[2] is not None

    async def test_works_with_managers_of_all_kinds(self):
        @actxmgr
        async def ours():
            yield "ours"

        @contextlib.asynccontextmanager
        async def theirs():
            await asyncio.sleep(0)
            yield "theirs"
            await asyncio.sleep(0)

        class Thing:
            async def close(self):
                await asyncio.sleep(0)

        thing = Thing()
        lock = asyncio.Lock()
        async with AsyncContextGroup(
            [ours(), theirs(), closing_async(thing), contextlib.nullcontext(5), lock]
        ) as values:
            assert values == ["ours", "theirs", thing, 5, None]
            assert lock.locked()
        assert not lock.locked()

    async def test_enter_may_return_any_awaitable(self):
        future = asyncio.get_running_loop().create_future()

        class Futures:
            def __aenter__(self):
                asyncio.get_running_loop().call_soon(future.set_result, "value")
                return future

            def __aexit__(self, *exc_info):
                return asyncio.sleep(0, "result")

        class Wrong:
            def __aenter__(self):
                return 5

            def __aexit__(self, *exc_info):
                raise Error

        group = AsyncContextGroup([Futures(), Wrong()])
        async with group as values:
            assert values[0] == "value"
            assert type(values[1]) is TypeError
            assert "can't be used in 'await' expression" in str(values[1])
        assert group.exit_states()[0] == "result"
        assert type(group.exit_states()[1]) is Error

    async def test_the_same_manager_may_be_in_it_twice(self, ledger):
        manager = ledger(0, turns=1)
        async with AsyncContextGroup([manager, manager]) as values:
            assert values == [0, 0]
            assert ledger.open == 2
        assert ledger.open == 0

    async def test_can_be_used_again(self, ledger):
        group = AsyncContextGroup([ledger(0, result=1), ledger(1, turns=1, result=2)])
        for _ in range(2):
            async with group as values:
                assert values == [0, 1]
                assert group.exit_states() == []
            assert group.exit_states() == [1, 2]

    async def test_is_not_entered_inside_itself(self, ledger):
        group = AsyncContextGroup([ledger(0)])
        async with group:
            with pytest.raises(RuntimeError, match="entered already"):
                await group.__aenter__()
            with pytest.raises(RuntimeError, match="while the group is entered"):
                group.add(ledger(1))
            assert repr(group) == "<AsyncContextGroup managers=1 entered>"
        assert repr(group) == "<AsyncContextGroup managers=1>"

    async def test_many_that_suspend_and_many_that_do_not(self, ledger):
        managers = [ledger(n, turns=n % 7 == 0) for n in range(1000)]
        group = AsyncContextGroup(managers)
        async with group as values:
            assert values == list(range(1000))
        assert ledger.open == 0
        assert group.exit_states() == [None] * 1000

    async def test_a_thousand_that_all_suspend(self, ledger):
        async with AsyncContextGroup([ledger(n, turns=20) for n in range(1000)]):
            assert ledger.most == 1000

    def test_outside_a_task_it_cannot_be_entered(self, ledger):
        step = AsyncContextGroup([ledger(0)]).__aenter__()
        with pytest.raises(RuntimeError, match="no running event loop"):
            step.send(None)


class TestTasksAndContexts:
    async def test_each_runs_in_a_task_that_is_not_the_callers(self, ledger):
        managers = [ledger(n, turns=n % 2) for n in range(6)]
        async with AsyncContextGroup(managers):
            pass
        tasks = {task for manager in managers for task in manager.tasks}
        assert asyncio.current_task() not in tasks
        assert all(task.done() for task in tasks)

    async def test_those_that_suspend_have_tasks_of_their_own(self, ledger):
        managers = [ledger(n, turns=2) for n in range(5)]
        async with AsyncContextGroup(managers):
            assert len({manager.tasks[0] for manager in managers}) == 5

    async def test_those_that_do_not_suspend_share_one(self, ledger):
        managers = [ledger(n) for n in range(100)]
        async with AsyncContextGroup(managers):
            assert len({manager.tasks[0] for manager in managers}) == 1

    async def test_a_task_serves_one_manager_for_as_long_as_that_suspends(self, ledger):
        seen = {}

        class Same(Manager):
            async def suspend(self):
                before = asyncio.current_task()
                await super().suspend()
                assert asyncio.current_task() is before
                if self.turns:
                    assert seen.setdefault(before, self.name) == self.name

        managers = [Same(ledger, n, turns=n % 3) for n in range(12)]
        async with AsyncContextGroup(managers, limit=4) as values:
            assert values == list(range(12))

    async def test_each_has_a_copy_of_the_callers_context(self):
        seen = []

        class Setter:
            def __init__(self, n):
                self.n = n

            async def __aenter__(self):
                seen.append(var.get())
                var.set(self.n)
                if self.n % 2:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                assert var.get() == self.n

            async def __aexit__(self, *exc_info):
                seen.append(var.get())
                var.set(self.n)
                await asyncio.sleep(0)
                assert var.get() == self.n

        token = var.set("callers")
        group = AsyncContextGroup([Setter(n) for n in range(6)])
        async with group:
            assert var.get() == "callers"
        assert group.exit_states() == [None] * 6
        assert seen == ["callers"] * 12
        var.reset(token)

    async def test_a_variable_set_in_a_copy_cannot_be_reset_from_another(self):
        group = AsyncContextGroup([resetting(var, "inner")])
        async with group as values:
            assert values == [None]
            assert var.get() == "unset"
        assert type(group.exit_states()[0]) is ValueError

    @pytest.mark.skipif(sys.version_info < (3, 14), reason="the call graph came with 3.14")
    async def test_the_call_graph_shows_the_manager_and_the_caller(self):
        graphs = []

        class Looks:
            async def __aenter__(self):
                graphs.append(asyncio.capture_call_graph())
                await asyncio.sleep(0)
                graphs.append(asyncio.capture_call_graph())

            async def __aexit__(self, *exc_info):
                pass

        async with AsyncContextGroup([Looks(), Looks()]):
            pass
        assert len(graphs) == 4
        for graph in graphs:
            names = [entry.frame.f_code.co_name for entry in graph.call_stack]
            assert "__aenter__" in names
            [awaited_by] = graph.awaited_by
            assert awaited_by.future is asyncio.current_task()

    async def test_the_stack_of_a_manager_that_hangs_can_be_seen(self):
        class Hangs:
            async def __aenter__(self):
                await asyncio.Event().wait()

            async def __aexit__(self, *exc_info):
                pass

        async def use():
            async with AsyncContextGroup([Hangs()]):
                pass

        before = asyncio.all_tasks()
        task = asyncio.create_task(use())
        for _ in range(3):
            await asyncio.sleep(0)
        [worker] = asyncio.all_tasks() - before - {task}
        assert [frame.f_code.co_name for frame in worker.get_stack()] == ["__aenter__"]
        assert "AsyncContextGroup" in repr(worker)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


class TestMapping:
    async def test_a_mapping_gives_a_mapping(self, ledger, turns):
        group = AsyncContextGroup({"a": ledger(1, turns=turns), "b": ledger(2, result=5)})
        group.add(ledger(3), key="c")
        async with group as values:
            assert values == {"a": 1, "b": 2, "c": 3}
        assert values == {}
        assert group.exit_states() == [None, 5, None]

    async def test_failures_are_values_there_too(self, ledger):
        error = Error()
        async with AsyncContextGroup({"a": ledger(1, enter=error), "b": ledger(2)}) as values:
            assert values == {"a": error, "b": 2}

    def test_keys_are_for_mappings_only_and_unique(self, ledger):
        with pytest.raises(TypeError, match="needs a key"):
            AsyncContextGroup({}).add(ledger(1))
        with pytest.raises(TypeError, match="only groups made of a mapping"):
            AsyncContextGroup().add(ledger(1), key="a")
        with pytest.raises(ValueError, match="'a' is in use"):
            AsyncContextGroup({"a": ledger(1)}).add(ledger(2), key="a")


class TestOrder:
    async def test_limit_bounds_those_under_way(self, ledger):
        group = AsyncContextGroup([ledger(n, turns=2) for n in range(10)], limit=3)
        async with group as values:
            assert values == list(range(10))
            assert ledger.most == 3
            ledger.most = 0
        assert ledger.most == 3
        assert ledger.open == 0

    async def test_a_limit_of_one_is_one_after_the_other(self, ledger):
        async with AsyncContextGroup([ledger(n, turns=1) for n in range(3)], limit=1):
            assert [name for _, name in ledger.trace] == [0, 0, 1, 1, 2, 2]

    async def test_sequential_exit_leaves_the_last_first(self, ledger, turns):
        managers = [ledger(n, turns=turns) for n in range(4)]
        async with AsyncContextGroup(managers, sequential_exit=True):
            ledger.most = 0
        assert ledger.names("exit") == [3, 2, 1, 0]
        assert ledger.most == 1
        assert all(manager.tasks[1] is not asyncio.current_task() for manager in managers)

    async def test_sequential_exit_goes_on_after_a_failure(self, ledger):
        error = Error()
        group = AsyncContextGroup([ledger(0, result=1), ledger(1, exit=error)], sequential_exit=True)
        async with group:
            pass
        assert group.exit_states() == [1, error]

    async def test_after_makes_levels(self, ledger, turns):
        group = AsyncContextGroup()
        db, queue = ledger("db", turns=turns), ledger("queue", turns=2 * turns)
        cache, api = ledger("cache", turns=turns), ledger("api")
        group.add(db)
        group.add(cache, after=db)
        group.add(queue)
        group.add(api, after=[cache, queue])
        async with group as values:
            assert values == ["db", "cache", "queue", "api"]
            assert ledger.names("begin") == ["db", "queue", "cache", "api"]
            order = ledger.names("enter")
            assert order.index("db") < order.index("cache") < order.index("api")
        assert ledger.names("exit") == ["api", "cache", "db", "queue"]

    async def test_managers_of_one_level_enter_at_once(self, ledger):
        group = AsyncContextGroup()
        base = ledger("base", turns=1)
        group.add(base)
        for n in range(5):
            group.add(ledger(n, turns=20), after=base)
        async with group:
            assert ledger.most == 5

    async def test_after_takes_keys_of_a_mapping(self, ledger):
        group = AsyncContextGroup({"db": ledger("db", turns=2)})
        group.add(ledger("cache"), key="cache", after="db")
        group.add(ledger("api"), key="api", after={"db", "cache"})
        async with group as values:
            assert values == {"db": "db", "cache": "cache", "api": "api"}
            assert ledger.names("enter") == ["db", "cache", "api"]

    async def test_what_depends_on_a_failure_is_not_entered(self, ledger, turns):
        error = Error()
        group = AsyncContextGroup()
        db = ledger("db", enter=error, turns=turns)
        cache = ledger("cache")
        group.add(db)
        group.add(cache, after=db)
        group.add(ledger("api"), after=cache)
        group.add(ledger("other"))
        async with group as values:
            assert values[0] is error
            assert type(values[1]) is type(values[2]) is RuntimeError
            assert values[1].__cause__ is error
            assert values[2].__cause__ is values[1]
            assert values[3] == "other"
        assert sorted(ledger.names("exit")) == ["db", "other"]
        assert group.exit_states() == [None] * 4

    def test_after_has_to_be_in_the_group(self, ledger):
        group = AsyncContextGroup([ledger(0)])
        with pytest.raises(ValueError, match="not in the group"):
            group.add(ledger(1), after=ledger(2))
        with pytest.raises(ValueError, match="not in the group"):
            group.add(ledger(1), after="x")
        assert "managers=1" in repr(group)

    async def test_after_an_empty_list_is_level_zero(self, ledger):
        group = AsyncContextGroup()
        group.add(ledger(0), after=[])
        async with group as values:
            assert values == [0]


class TestStrict:
    async def test_without_failures_it_is_as_usual(self, ledger, turns):
        group = AsyncContextGroup([ledger(n, turns=turns, result=n) for n in range(3)], strict=True)
        async with group as values:
            assert values == [0, 1, 2]
        assert group.exit_states() == [0, 1, 2]

    async def test_a_failure_to_enter_rolls_back_and_is_raised_as_a_group(self, ledger, turns):
        error = Error("enter")
        managers = [ledger(0, turns=turns), ledger(1, turns=2 * turns, enter=error), ledger(2)]
        group = AsyncContextGroup(managers, strict=True)
        with pytest.raises(ExceptionGroup, match="failed to enter") as info:
            async with group:
                raise AssertionError("it must not run")
        assert info.value.exceptions == (error,)
        assert ledger.open == 0
        assert 1 not in ledger.names("exit")
        assert managers[0].exc_info[0] is ExceptionGroup
        assert "entered" not in repr(group)

    async def test_the_first_failure_cancels_those_that_are_entering(self, ledger):
        error = Error()
        managers = [ledger(0, turns=100), ledger(1, turns=1, enter=error), ledger(2, turns=100)]
        with pytest.raises(ExceptionGroup) as info:
            async with AsyncContextGroup(managers, strict=True):
                pass
        assert info.value.exceptions == (error,)
        assert ledger.names("enter") == ledger.names("exit") == []

    async def test_the_first_failure_keeps_the_others_from_beginning(self, ledger):
        managers = [ledger(0, enter=Error()), *[ledger(n) for n in range(1, 5)]]
        with pytest.raises(ExceptionGroup):
            async with AsyncContextGroup(managers, strict=True):
                pass
        assert ledger.names("begin") == [0]

    async def test_all_failures_are_in_the_group(self, ledger):
        class Spiteful(Manager):
            async def suspend(self):
                try:
                    await super().suspend()
                except asyncio.CancelledError:
                    raise KeyError(self.name) from None

        first, leave = Error("first"), Error("leave")
        with pytest.raises(ExceptionGroup, match="and to leave again") as info:
            async with AsyncContextGroup(
                [
                    ledger(0, exit=leave),
                    Spiteful(ledger, 1, turns=100),
                    ledger(2, turns=2, enter=first),
                ],
                strict=True,
            ):
                pass
        assert [type(exc) for exc in info.value.exceptions] == [KeyError, Error, Error]
        assert set(info.value.exceptions) >= {first, leave}

    async def test_one_that_enters_in_spite_of_being_cancelled_is_left(self, ledger):
        class Stubborn(Manager):
            async def suspend(self):
                with contextlib.suppress(asyncio.CancelledError):
                    await super().suspend()

        with pytest.raises(ExceptionGroup):
            async with AsyncContextGroup(
                [Stubborn(ledger, 0, turns=100), ledger(1, turns=1, enter=Error())], strict=True
            ):
                pass
        assert ledger.names("enter") == ledger.names("exit") == [0]

    async def test_one_that_cancels_itself_is_a_failure(self, ledger):
        error = asyncio.CancelledError("mine")
        with pytest.raises(BaseExceptionGroup) as info:
            async with AsyncContextGroup([ledger(0, enter=error)], strict=True):
                pass
        assert info.value.exceptions == (error,)

    async def test_failures_to_leave_are_raised_as_a_group(self, ledger, turns):
        errors = [Error(0), Error(1)]
        group = AsyncContextGroup(
            [
                ledger(0, turns=turns, exit=errors[0]),
                ledger(1, exit=errors[1]),
                ledger(2, turns=turns, result=True),
            ],
            strict=True,
        )
        with pytest.raises(ExceptionGroup, match="failed to leave") as info:
            async with group:
                pass
        assert list(info.value.exceptions) == errors
        assert info.value.__context__ is None
        assert group.exit_states() == [*errors, True]

    async def test_one_that_is_cancelled_by_itself_when_it_leaves_has_failed(self, ledger, turns):
        error = asyncio.CancelledError("its own")
        with pytest.raises(BaseExceptionGroup, match="failed to leave") as info:
            async with AsyncContextGroup([ledger(0), ledger(1, turns=turns, exit=error)], strict=True):
                pass
        assert info.value.exceptions == (error,) and asyncio.current_task().cancelling() == 0

    async def test_failures_to_leave_have_the_error_of_the_block_as_context(self, ledger):
        block = KeyError("block")
        with pytest.raises(ExceptionGroup) as info:
            async with AsyncContextGroup([ledger(0, exit=Error())], strict=True):
                raise block
        assert info.value.__context__ is block

    async def test_failures_to_leave_do_not_replace_a_cancellation_of_the_block(self, ledger):
        block, error = asyncio.CancelledError(), Error()
        with pytest.raises(asyncio.CancelledError) as info:
            async with AsyncContextGroup([ledger(0, exit=error)], strict=True):
                raise block
        assert info.value is block
        assert block.__context__.exceptions == (error,)

    async def test_raising_the_error_of_the_block_again_is_no_failure(self, ledger):
        block = KeyError("block")
        with pytest.raises(KeyError) as info:
            async with AsyncContextGroup([ledger(0, exit=block), ledger(1)], strict=True):
                raise block
        assert info.value is block

    async def test_levels_after_a_failure_are_not_entered(self, ledger):
        db = ledger("db", turns=1)
        group = AsyncContextGroup([db, ledger("queue", enter=Error(), turns=1)], strict=True)
        group.add(ledger("cache"), after=db)
        with pytest.raises(ExceptionGroup):
            async with group:
                pass
        assert "cache" not in ledger.names("begin")
        assert ledger.open == 0

    async def test_rolling_back_follows_the_levels(self, ledger):
        a = ledger("a", turns=1)
        b = ledger("b", turns=1)
        group = AsyncContextGroup([a], strict=True)
        group.add(b, after=a)
        group.add(ledger("c", enter=Error()), after=b)
        with pytest.raises(ExceptionGroup):
            async with group:
                pass
        assert ledger.names("exit") == ["b", "a"]

    async def test_rolling_back_ends_at_its_timeout(self, ledger):
        never = asyncio.Event()
        with pytest.raises(ExceptionGroup) as info:
            async with AsyncContextGroup(
                [ledger(0, hang=never), ledger(1, turns=2), ledger(2, turns=2, enter=Error())],
                strict=True,
                rollback_timeout=0.01,
            ):
                pass
        assert ledger.names("interrupted") == [0]
        assert [type(exc) for exc in info.value.exceptions] == [Error, TimeoutError]
        assert str(info.value.exceptions[1]) == "context manager 0 (Manager) did not leave within 0.01 seconds"
        assert isinstance(info.value.exceptions[1].__cause__, asyncio.CancelledError)

    async def test_a_timeout_also_bounds_what_is_left_one_by_one(self, ledger):
        never = asyncio.Event()
        managers = [ledger(n, hang=never) for n in range(3)]
        with pytest.raises(ExceptionGroup) as info:
            async with AsyncContextGroup(
                {**dict(zip("abc", managers, strict=True)), "d": ledger(3, enter=Error())},
                strict=True,
                sequential_exit=True,
                rollback_timeout=0.01,
            ):
                pass
        assert ledger.names("interrupted") == [2, 1, 0]
        assert [str(exc).split(" did")[0] for exc in info.value.exceptions[1:]] == [
            f"context manager {key!r} (Manager)" for key in "abc"
        ]

    async def test_cancellation_does_not_interrupt_rolling_back(self, ledger):
        release, rolling = asyncio.Event(), asyncio.Event()

        class Slow(Manager):
            async def __aexit__(self, *exc_info):
                rolling.set()
                return await super().__aexit__(*exc_info)

        error = Error()

        async def use():
            async with AsyncContextGroup([Slow(ledger, 0, hang=release), ledger(1, turns=1, enter=error)], strict=True):
                pass

        task = asyncio.create_task(use())
        await rolling.wait()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        release.set()
        with pytest.raises(asyncio.CancelledError) as info:
            await task
        assert ledger.names("interrupted") == []
        context = info.value.__context__
        while not isinstance(context, ExceptionGroup):
            context = context.__context__
        assert context.exceptions == (error,)


class TestSameTask:
    async def test_enters_and_leaves_in_the_callers_task_and_context(self, ledger):
        managers = [ledger(n, turns=1) for n in range(3)]
        group = AsyncContextGroup(managers, same_task=True)
        group.add(resetting(var, "inner"))
        async with group as values:
            assert values == [0, 1, 2, None]
            assert var.get() == "inner"
        assert var.get() == "unset"
        assert {task for manager in managers for task in manager.tasks} == {asyncio.current_task()}
        assert ledger.names("begin") == [0, 1, 2]
        assert ledger.names("exit") == [2, 1, 0]
        assert group.exit_states() == [None] * 4

    async def test_managers_bound_to_a_task_work(self):
        async with AsyncContextGroup([asyncio.timeout(60), asyncio.TaskGroup()], same_task=True, strict=True) as (
            timeout,
            tasks,
        ):
            assert await tasks.create_task(asyncio.sleep(0, 5)) == 5
        assert not timeout.expired()

    async def test_failures_are_values_by_default(self, ledger):
        error, leave = Error(), Error()
        group = AsyncContextGroup([ledger(0, enter=error), ledger(1, exit=leave), ledger(2, turns=1)], same_task=True)
        async with group as values:
            assert values == [error, 1, 2]
        assert group.exit_states() == [None, leave, None]

    async def test_strict_rolls_back(self, ledger):
        error, leave = Error("enter"), Error("leave")
        with pytest.raises(ExceptionGroup) as info:
            async with AsyncContextGroup(
                [ledger(0, exit=leave), ledger(1), ledger(2, enter=error), ledger(3)],
                same_task=True,
                strict=True,
            ):
                pass
        assert info.value.exceptions == (error, leave)
        assert ledger.names("exit") == [1, 0]

    async def test_a_cancellation_goes_to_the_caller(self, ledger):
        with pytest.raises(asyncio.CancelledError):
            async with AsyncContextGroup([ledger(0), ledger(1, enter=asyncio.CancelledError())], same_task=True):
                pass
        assert ledger.open == 0

    async def test_dependencies_hold(self, ledger):
        group = AsyncContextGroup(same_task=True)
        db = ledger("db", enter=Error())
        group.add(db)
        group.add(ledger("cache"), after=db)
        async with group as values:
            assert type(values[1]) is RuntimeError
        assert ledger.names("exit") == ["db"]

    async def test_rolling_back_ends_at_its_timeout(self, ledger):
        never = asyncio.Event()
        with pytest.raises(ExceptionGroup) as info:
            async with AsyncContextGroup(
                [ledger(0, hang=never), ledger(1, hang=never), ledger(2, enter=Error())],
                same_task=True,
                strict=True,
                rollback_timeout=0.01,
            ):
                pass
        assert ledger.names("interrupted") == [1, 0]
        assert [type(exc) for exc in info.value.exceptions] == [Error, TimeoutError, TimeoutError]
        assert asyncio.current_task().cancelling() == 0


class TestBaseErrors:
    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("where", ["enter", "exit"])
    def test_they_are_raised_and_nothing_stays_entered(self, new_loop, ledger, turns, kind, strict, where):
        loop = new_loop()
        error = kind("base")
        group = AsyncContextGroup(
            [ledger(0), ledger(1, turns=turns, **{where: error}), ledger(2, turns=2 * turns)],
            strict=strict,
        )

        async def use():
            async with group:
                pass

        task = loop.create_task(use())
        # asyncio has the loop stop with it, each time; the group goes on when the loop does.
        for _ in range(5):
            with pytest.raises(kind):
                loop.run_until_complete(task)
            if task.done():
                break
        assert task.exception() is error
        assert ledger.open == 0

    async def test_in_the_same_task_too(self, ledger):
        error = KeyboardInterrupt()
        with contextlib.suppress(KeyboardInterrupt):
            async with AsyncContextGroup([ledger(0), ledger(1, enter=error)], same_task=True):
                raise AssertionError
        assert ledger.open == 0
        with contextlib.suppress(KeyboardInterrupt):
            async with AsyncContextGroup([ledger(0), ledger(1, exit=error)], same_task=True):
                pass
        assert ledger.open == 0


CONFIGURATIONS = {
    "default": {},
    "strict": {"strict": True},
    "limit": {"limit": 2},
    "strict limit": {"limit": 2, "strict": True},
    "sequential": {"sequential_exit": True},
    "same task": {"same_task": True},
    "strict same task": {"same_task": True, "strict": True},
    "levels": {},
    "strict levels": {"strict": True},
    "rollback timeout": {"rollback_timeout": 60},
}
SIDES = {
    "plain": [{}, {}, {}, {}],
    "mixed": [{"turns": 0}, {"turns": 3}, {"turns": 1}, {"turns": 0}],
    "failing to enter": [{}, {"enter": Error}, {"turns": 3}, {}],
    "failing to leave": [{}, {"exit": Error}, {"turns": 3, "exit": Error}, {}],
    "failing on both": [{}, {"enter": Error, "exit": Error}, {"exit": Error}, {}],
    "swallowing": [{"swallow": True}, {}, {"swallow": True, "turns": 3}, {}],
}


def scenario(configuration, sides):
    ledger = Ledger()
    managers = []
    for n, options in enumerate(SIDES[sides]):
        options = {"turns": 2, **options}
        for side in ("enter", "exit"):
            if side in options:
                options[side] = options[side]()
        managers.append(ledger(n, **options))
    group = AsyncContextGroup(**CONFIGURATIONS[configuration])
    for n, manager in enumerate(managers):
        group.add(manager, after=managers[n - 2] if "levels" in configuration and n > 1 else None)

    async def use():
        async with group:
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    return ledger, use


class TestCancelEverywhere:
    @pytest.mark.parametrize("times", [1, 3])
    @pytest.mark.parametrize("sides", SIDES)
    @pytest.mark.parametrize("configuration", CONFIGURATIONS)
    async def test_nothing_stays_entered(self, configuration, sides, times):
        before = asyncio.all_tasks()
        for turn in range(200):
            ledger, use = scenario(configuration, sides)
            task = asyncio.create_task(use())
            for _ in range(turn):
                await asyncio.sleep(0)
            was_done = task.done()
            cancelled = False
            for _ in range(times):
                cancelled = task.cancel() or cancelled
                await asyncio.sleep(0)
            try:
                await task
            except (asyncio.CancelledError, ExceptionGroup) as exc:
                outcome = exc
            else:
                outcome = None
            assert ledger.open == 0, (turn, ledger.trace)
            assert sorted(set(ledger.names("enter"))) == sorted(set(ledger.names("enter")) & set(ledger.names("exit")))
            # The children are gone as well, and the request was not lost.
            assert not {task for task in asyncio.all_tasks() - before if not task.done()}
            if was_done:
                break
            # A manager may swallow it only where it is awaited by the caller itself.
            if not (sides == "swallowing" and "same task" in configuration):
                assert cancelled
                assert isinstance(outcome, asyncio.CancelledError), (turn, outcome)
                assert task.cancelled()
        else:
            raise AssertionError("the scenario never ended")
        assert turn > 4

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("n", [1, 2, 3, 7])
    async def test_nothing_stays_entered_of_n_managers(self, n, strict):
        for turn in range(200):
            ledger = Ledger()
            managers = [ledger(i, turns=2) for i in range(n)]

            async def use(managers=managers):
                async with AsyncContextGroup(managers, strict=strict):
                    await asyncio.sleep(0)

            task = asyncio.create_task(use())
            for _ in range(turn):
                await asyncio.sleep(0)
            was_done = task.done()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() != was_done
            assert ledger.open == 0, (turn, ledger.trace)
            if was_done:
                break
        else:
            raise AssertionError("the scenario never ended")
        assert turn > 4

    @pytest.mark.parametrize(
        "configuration", ["default", "strict", "limit", "sequential", "same task", "strict levels"]
    )
    async def test_managers_that_hang_when_they_are_left_do_not_keep_it(self, configuration):
        never = asyncio.Event()
        for turn in range(20):
            ledger = Ledger()
            managers = [ledger(n, turns=n % 2, hang=never) for n in range(4)]
            group = AsyncContextGroup(**CONFIGURATIONS[configuration], rollback_timeout=0)
            for n, manager in enumerate(managers):
                group.add(manager, after=managers[n - 2] if "levels" in configuration and n > 1 else None)

            async def use(group=group):
                async with group:
                    pass

            task = asyncio.create_task(use())
            for _ in range(turn):
                await asyncio.sleep(0)
            while not task.done():
                # One request ends what is being left right now. Those that are left one by one take one each.
                task.cancel()
                for _ in range(10):
                    await asyncio.sleep(0)
            assert task.cancelled()
            assert ledger.open == 0, (turn, ledger.trace)
            assert sorted(ledger.names("enter")) == sorted(ledger.names("exit"))

    @pytest.mark.parametrize("strict", [False, True])
    async def test_managers_that_share_their_state_give_back_what_they_took(self, strict):
        """The same semaphore is in the group several times, more often than it has places."""
        for count in (2, 3):
            for turn in range(20):
                semaphore = asyncio.Semaphore(2)

                async def use(semaphore=semaphore, count=count):
                    async with AsyncContextGroup([semaphore] * count, strict=strict):
                        await asyncio.sleep(0)

                task = asyncio.create_task(use())
                for _ in range(turn):
                    await asyncio.sleep(0)
                was_done = task.done()
                assert not was_done or count == 2
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() != was_done
                # Both places are there again.
                await semaphore.acquire()
                assert not semaphore.locked()
                await semaphore.acquire()
                assert semaphore.locked()

    async def test_the_message_is_passed_on(self, ledger):
        seen = []

        class Looks(Manager):
            async def suspend(self):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError as exc:
                    seen.append(exc.args)
                    raise

        async def use():
            async with AsyncContextGroup([Looks(ledger, 0), Looks(ledger, 1)]):
                pass

        task = asyncio.create_task(use())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel("message")
        with pytest.raises(asyncio.CancelledError, match="message"):
            await task
        assert seen == [("message",)] * 2

    async def test_a_timeout_around_it_works(self, ledger):
        never = asyncio.Event()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                async with AsyncContextGroup([ledger(0), ledger(1, hang=never)]):
                    pass
        assert ledger.open == 0
        assert ledger.names("interrupted") == [1]
        assert asyncio.current_task().cancelling() == 0

    async def test_all_tasks_cancelled_at_once_leave_nothing_entered(self):
        """What asyncio.run() does at its end, at every turn."""
        me = asyncio.current_task()
        for configuration in CONFIGURATIONS:
            for turn in range(100):
                ledger, use = scenario(configuration, "mixed")
                task = asyncio.create_task(use())
                for _ in range(turn):
                    await asyncio.sleep(0)
                was_done = task.done()
                for other in asyncio.all_tasks():
                    if other is not me:
                        other.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.exception()
                assert ledger.open == 0, (configuration, turn, ledger.trace)
                if was_done:
                    break
            else:
                raise AssertionError("the scenario never ended")

    async def test_a_single_child_that_is_cancelled_is_a_failure_of_its_manager(self, ledger):
        started = asyncio.Event()

        class Hangs(Manager):
            async def suspend(self):
                started.set()
                await asyncio.Event().wait()

        manager = Hangs(ledger, 0)

        async def cancel():
            await started.wait()
            manager.tasks[0].cancel()

        task = asyncio.create_task(cancel())
        group = AsyncContextGroup([manager, ledger(1)])
        async with group as values:
            assert type(values[0]) is asyncio.CancelledError
            assert values[1] == 1
            manager.tasks.clear()
            manager.suspend = lambda: asyncio.sleep(0)
        await task


class TestOddities:
    @pytest.mark.parametrize("wrong", [5, object(), contextlib.suppress(Error)])
    def test_refuses_what_is_no_manager(self, wrong):
        with pytest.raises(TypeError, match="asynchronous context manager protocol"):
            AsyncContextGroup([wrong])
        with pytest.raises(TypeError, match="asynchronous context manager protocol"):
            AsyncContextGroup().add(wrong)

    @pytest.mark.parametrize(
        "options",
        [{"limit": 0}, {"limit": -1}, {"rollback_timeout": -1}, {"rollback_timeout": float("nan")}],
    )
    def test_refuses_numbers_that_make_no_sense(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            AsyncContextGroup(**options)

    @pytest.mark.parametrize("options", [{"limit": "2"}, {"limit": 1.5}, {"limit": True}, {"rollback_timeout": "1"}])
    def test_refuses_what_is_no_number(self, options):
        with pytest.raises(TypeError, match=next(iter(options))):
            AsyncContextGroup(**options)

    @pytest.mark.loop_kinds("default", "uvloop", "debug", reason="its factory stands in for the eager one")
    @pytest.mark.parametrize("at", range(10))
    async def test_a_task_factory_that_refuses_leaves_nothing_entered(self, ledger, at):
        loop = asyncio.get_running_loop()
        made = 0

        def factory(loop, coro, **kwargs):
            nonlocal made
            made += 1
            if made == at + 1:
                raise Error("factory")
            return asyncio.Task(coro, loop=loop, **kwargs)

        loop.set_task_factory(factory)
        try:
            with pytest.raises(Error, match="factory"):
                async with AsyncContextGroup([ledger(n, turns=1) for n in range(5)]):
                    pass
        finally:
            loop.set_task_factory(None)
        assert ledger.open == 0

    async def test_tasks_are_made_by_the_loop_if_its_method_was_replaced(self, ledger, monkeypatch):
        made = []
        loop = asyncio.get_running_loop()
        create_task = loop.create_task

        def create(coro, **options):
            made.append(create_task(coro, **options))
            return made[-1]

        monkeypatch.setattr(loop, "create_task", create)
        managers = [ledger(n, turns=1) for n in range(3)]
        async with AsyncContextGroup(managers):
            pass
        assert {task for manager in managers for task in manager.tasks} == set(made)

    async def test_tasks_are_made_by_a_task_factory(self, ledger):
        made = []
        loop = asyncio.get_running_loop()
        factory = loop.get_task_factory()

        def create(loop, coro, **options):
            make = asyncio.Task if factory is None else functools.partial(factory, loop)
            made.append(make(coro, **options))
            return made[-1]

        managers = [ledger(n, turns=1) for n in range(3)]
        loop.set_task_factory(create)
        try:
            async with AsyncContextGroup(managers):
                pass
        finally:
            loop.set_task_factory(factory)
        assert {task for manager in managers for task in manager.tasks} == set(made)

    @pytest.mark.parametrize("end", ["returns", "cancelled"])
    async def test_a_task_factory_may_wrap_the_coroutine(self, ledger, end):
        """The task ends later than what runs in it."""
        loop = asyncio.get_running_loop()
        factory = loop.get_task_factory()
        log = []

        async def wrap(coro):
            try:
                return await coro
            finally:
                await asyncio.sleep(0)
                log.append("task over")

        def create(loop, coro, **options):
            return asyncio.Task(wrap(coro), **{"loop": loop, **options})

        never = asyncio.Event()
        managers = [ledger(n, turns=1, hang=never if end == "cancelled" else None) for n in range(3)]

        async def use():
            async with AsyncContextGroup(managers):
                pass

        task = asyncio.ensure_future(use())
        loop.set_task_factory(create)
        try:
            for _ in range(10):
                await asyncio.sleep(0)
            if end == "cancelled":
                task.cancel()
            await asyncio.wait([task])
        finally:
            loop.set_task_factory(factory)
        assert task.cancelled() == (end == "cancelled")
        assert ledger.open == 0
        while asyncio.all_tasks() != {asyncio.current_task()}:
            await asyncio.sleep(0)
        assert set(log) == {"task over"}

    async def test_a_task_may_be_cancelled_before_it_begins(self, ledger):
        """Where tasks do not start eagerly: what asyncio.run() does at its end, to a group that has just begun."""
        loop = asyncio.get_running_loop()
        factory = loop.get_task_factory()
        made = []

        def create(loop, coro, **options):
            made.append(asyncio.Task(coro, **{"loop": loop, **options}))
            return made[-1]

        async def use():
            async with AsyncContextGroup([ledger(0), ledger(1, turns=1)]) as values:
                outcome.extend(values)

        outcome = []
        step = use()
        loop.set_task_factory(create)
        try:
            task = asyncio.ensure_future(step)
            while len(made) < 2:
                await asyncio.sleep(0)
            made[1].cancel()
            await asyncio.wait([task])
        finally:
            loop.set_task_factory(factory)
        assert made[1].cancelled()
        assert ledger.open == 0

    async def test_a_group_may_be_entered_by_a_manager_of_a_group(self, ledger):
        inner = AsyncContextGroup([ledger(n, turns=n) for n in range(3)])
        async with AsyncContextGroup([inner, ledger(3)]) as values:
            assert values == [[0, 1, 2], 3]
        assert ledger.open == 0

    async def test_managers_may_cancel_the_caller(self, ledger):
        class Cancels(Manager):
            async def suspend(self):
                task.cancel()

        async def use():
            async with AsyncContextGroup([ledger(0), Cancels(ledger, 1), ledger(2, turns=2)]):
                await asyncio.Event().wait()

        # Known before it runs, also when it starts eagerly.
        task = asyncio.Task(use(), loop=asyncio.get_running_loop())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ledger.open == 0

    async def test_a_cancellation_just_before_they_begin_to_leave_is_passed_on(self, ledger):
        never = asyncio.Event()

        async def use():
            async with AsyncContextGroup([ledger(n, hang=never) for n in range(5)], limit=2):
                # It comes with the first suspension, which is in the exit.
                asyncio.current_task().cancel("message")

        task = asyncio.create_task(use())
        with pytest.raises(asyncio.CancelledError, match="message"):
            await task
        assert sorted(ledger.names("interrupted")) == list(range(5))

    async def test_values_are_let_go(self, ledger):
        class Value:
            pass

        @actxmgr
        async def manager():
            yield Value()

        async with AsyncContextGroup([manager()]) as values:
            gone = weakref.ref(values[0])
        gc.collect()
        assert gone() is None

    async def test_errors_leave_no_cycles(self, ledger):
        class Canary(Exception):
            gone = []

            def __del__(self):
                self.gone.append(1)

        @actxmgr
        async def manager():
            raise Canary
            yield

        gc.collect()
        gc.disable()
        try:
            async with AsyncContextGroup([manager()]) as values:
                assert type(values[0]) is Canary
            assert Canary.gone == [1]
        finally:
            gc.enable()

    def test_a_loop_that_is_closed_half_way_leaves_nothing_behind(self, new_loop, ledger):
        loop = new_loop()
        never = asyncio.Event()

        class Hangs(Manager):
            async def suspend(self):
                await never.wait()

        async def use():
            async with AsyncContextGroup([Hangs(ledger, 0), ledger(1)]):
                pass

        task = loop.create_task(use())
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
        assert ledger.open == 0
