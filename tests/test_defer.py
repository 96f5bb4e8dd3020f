import asyncio
import functools
import inspect

import pytest

from aiotools.defer import adefer, defer


class TestDefer:
    def test_items_run_after_the_body_last_registered_first(self):
        trace = []

        @defer
        def func(defer, a, *, b):
            assert defer(lambda: trace.append("first")) is None
            defer(lambda: trace.append("second"))
            trace.append("body")
            return a + b

        assert func(1, b=2) == 3
        assert trace == ["body", "second", "first"]

    def test_items_run_when_the_body_fails(self):
        trace = []

        @defer
        def func(defer):
            defer(lambda: trace.append("item"))
            raise KeyError("body")

        with pytest.raises(KeyError, match="body") as info:
            func()
        assert trace == ["item"]
        assert info.value.__context__ is None

    def test_metadata_is_kept(self):
        @defer
        def func(defer, a: int) -> str:
            "The text."

        assert func.__name__ == "func"
        assert func.__doc__ == "The text."
        assert func.__wrapped__.__annotations__ == {"a": int, "return": str}
        assert not inspect.iscoroutinefunction(func)

    def test_an_item_registered_by_an_item_runs(self):
        trace = []

        @defer
        def func(defer):
            defer(lambda: trace.append("last"))
            defer(lambda: defer(lambda: trace.append("late")))

        func()
        assert trace == ["late", "last"]

    def test_an_item_may_be_registered_twice(self):
        trace = []

        @defer
        def func(defer):
            item = functools.partial(trace.append, 1)
            defer(item)
            defer(item)

        func()
        assert trace == [1, 1]

    def test_calls_do_not_share_items(self):
        trace = []

        @defer
        def func(defer, n):
            defer(lambda: trace.append(n))
            if n:
                func(n - 1)

        func(2)
        assert trace == [0, 1, 2]

    def test_a_single_failure_is_raised_as_it_is_and_the_others_run(self):
        trace = []
        error = ValueError("item")

        def fail():
            raise error

        @defer
        def func(defer):
            defer(lambda: trace.append("first"))
            defer(fail)
            defer(lambda: trace.append("third"))

        with pytest.raises(ValueError) as info:
            func()
        assert info.value is error
        assert error.__context__ is None
        assert trace == ["third", "first"]

    def test_a_single_failure_has_the_error_of_the_body_as_context(self):
        @defer
        def func(defer):
            defer(lambda: 1 / 0)
            raise KeyError("body")

        with pytest.raises(ZeroDivisionError) as info:
            func()
        assert isinstance(info.value.__context__, KeyError)

    def test_several_failures_are_raised_as_a_group_in_the_order_in_which_they_ran(self):
        def fail(exc):
            raise exc

        @defer
        def func(defer):
            defer(functools.partial(fail, ValueError(1)))
            defer(functools.partial(fail, KeyError(2)))
            raise OSError("body")

        with pytest.raises(ExceptionGroup) as info:
            func()
        assert [type(exc) for exc in info.value.exceptions] == [KeyError, ValueError]
        assert isinstance(info.value.__context__, OSError)
        assert all(isinstance(exc.__context__, OSError) for exc in info.value.exceptions)

    def test_a_base_exception_among_several_makes_a_base_group(self):
        def fail(exc):
            raise exc

        @defer
        def func(defer):
            defer(functools.partial(fail, KeyboardInterrupt()))
            defer(functools.partial(fail, ValueError(2)))

        with pytest.raises(BaseExceptionGroup) as info:
            func()
        assert not isinstance(info.value, ExceptionGroup)
        assert [type(exc) for exc in info.value.exceptions] == [ValueError, KeyboardInterrupt]

    def test_an_item_may_raise_the_error_of_the_body_again(self):
        error = KeyError("body")

        def again():
            raise error

        @defer
        def func(defer):
            defer(again)
            raise error

        with pytest.raises(KeyError) as info:
            func()
        assert info.value is error
        assert error.__context__ is None

    def test_refuses_a_coroutine_function_when_decorating(self):
        async def func(defer):
            pass

        with pytest.raises(AssertionError, match="adefer"):
            defer(func)

    def test_refuses_coroutines_and_their_functions_when_registering(self):
        async def item():
            pass

        class Item:
            async def __call__(self):
                pass

        @defer
        def func(defer):
            with pytest.raises(AssertionError, match="adefer"):
                defer(item)
            with pytest.raises(AssertionError, match="adefer"):
                defer(functools.partial(item))
            with pytest.raises(AssertionError, match="adefer"):
                defer(Item())
            coro = item()
            with pytest.raises(AssertionError, match="adefer"):
                defer(coro)
            coro.close()

        func()

    def test_refuses_what_is_not_callable_when_registering(self):
        @defer
        def func(defer):
            with pytest.raises(TypeError, match="'int' object"):
                defer(1)

        func()


class TestAdefer:
    async def test_items_of_all_kinds_run_last_registered_first(self):
        trace = []

        async def item(n):
            await asyncio.sleep(0)
            trace.append(n)

        async def plain():
            await asyncio.sleep(0)
            trace.append("plain")

        class Item:
            async def __call__(self):
                await asyncio.sleep(0)
                trace.append("object")

        @adefer
        async def func(defer, a, *, b):
            assert defer(lambda: trace.append("sync")) is None
            defer(plain)
            defer(functools.partial(item, "partial"))
            defer(item("coroutine"))
            defer(Item())
            trace.append("body")
            return a + b

        assert await func(1, b=2) == 3
        assert trace == ["body", "object", "coroutine", "partial", "plain", "sync"]

    def test_metadata_is_kept(self):
        @adefer
        async def func(defer, a: int) -> str:
            "The text."

        assert func.__name__ == "func"
        assert func.__doc__ == "The text."
        assert inspect.iscoroutinefunction(func)

    async def test_items_run_in_the_task_of_the_caller(self):
        seen = []

        async def item():
            seen.append(asyncio.current_task())

        @adefer
        async def func(defer):
            defer(item)

        await func()
        assert seen == [asyncio.current_task()]

    async def test_items_run_when_the_body_is_cancelled(self):
        trace = []
        started = asyncio.Event()

        async def item():
            await asyncio.sleep(0)
            trace.append("item")

        @adefer
        async def func(defer):
            defer(item)
            started.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(func())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert trace == ["item"]

    async def test_a_cancelled_item_does_not_keep_the_others_from_running(self):
        trace = []
        started = asyncio.Event()

        async def first():
            await asyncio.sleep(0)
            trace.append("first")

        async def second():
            started.set()
            await asyncio.Event().wait()

        @adefer
        async def func(defer):
            defer(first)
            defer(second)

        task = asyncio.create_task(func())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert trace == ["first"]
        assert task.cancelled()

    async def test_failures_are_collected_with_the_error_of_the_body_as_context(self):
        trace = []

        async def fail(exc):
            await asyncio.sleep(0)
            raise exc

        def fail_sync():
            raise IndexError

        @adefer
        async def func(defer):
            defer(fail(ValueError(1)))
            defer(lambda: trace.append("between"))
            defer(functools.partial(fail, KeyError(2)))
            defer(fail_sync)
            raise OSError("body")

        with pytest.raises(ExceptionGroup) as info:
            await func()
        assert [type(exc) for exc in info.value.exceptions] == [IndexError, KeyError, ValueError]
        assert isinstance(info.value.__context__, OSError)
        assert trace == ["between"]

    async def test_a_single_failure_is_raised_as_it_is(self):
        error = ValueError("item")

        async def fail():
            raise error

        @adefer
        async def func(defer):
            defer(fail)
            raise KeyError("body")

        with pytest.raises(ValueError) as info:
            await func()
        assert info.value is error
        assert isinstance(error.__context__, KeyError)

    async def test_the_coroutine_that_a_plain_callable_returns_is_ignored(self):
        coros = []

        async def item():
            raise AssertionError("it must not run")

        def make():
            coros.append(item())
            return coros[0]

        @adefer
        async def func(defer):
            defer(lambda: make())

        await func()
        coros[0].close()

    def test_refuses_an_ordinary_function_when_decorating(self):
        with pytest.raises(AssertionError, match="defer\\(\\)"):
            adefer(lambda defer: None)

    async def test_refuses_tasks_and_futures_when_registering(self):
        future = asyncio.get_running_loop().create_future()

        @adefer
        async def func(defer):
            with pytest.raises(TypeError, match="not callable"):
                defer(asyncio.current_task())
            with pytest.raises(TypeError, match="not callable"):
                defer(future)
            with pytest.raises(TypeError, match="not callable"):
                defer(None)

        await func()
