"""The context managers that servers are made of: the rules of contextlib's, and a signal at the yield."""

import asyncio
import contextlib
import inspect
import signal

import pytest
from test_context import BEHAVIOURS, BODIES, outcome

import aiotools
from aiotools import _aiotools
from aiotools.server import AsyncServerContextManager, ServerMainContextManager, main_context, server_context


class Error(Exception):
    pass


class TestServerContext:
    async def test_a_clean_exit_gives_the_signal_to_the_generator(self):
        got = []

        @server_context
        async def worker(loop, pidx, args):
            got.append((loop, pidx, args))
            got.append((yield "value"))
            await asyncio.sleep(0)
            got.append("end")

        loop = asyncio.get_running_loop()
        async with worker(loop, 3, ("a",)) as value:
            assert value == "value"
            assert got == [(loop, 3, ("a",))]
        assert got[1:] == [signal.SIGTERM, "end"]

        manager = worker(loop, 3, ())
        async with manager:
            manager.yield_return = signal.SIGINT
        assert got[-2:] == [signal.SIGINT, "end"]
        assert AsyncServerContextManager.yield_return is signal.SIGTERM

    @pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda f: f.__name__)
    async def test_the_rest_is_as_with_contextlib(self, behaviour):
        for body in BODIES:
            theirs = await outcome(contextlib.asynccontextmanager, behaviour, body, True)
            assert await outcome(server_context, behaviour, body, True) == theirs, body.__name__

    async def test_the_parts_can_be_read_at_any_time(self):
        async def worker(loop, pidx, args, *, option):
            "The docstring."
            yield

        manager = server_context(worker)(1, 2, (3,), option=4)
        for _ in range(2):
            assert manager.func is worker
            assert manager.args == (1, 2, (3,))
            assert manager.kwargs == {"option": 4}
            assert manager.__doc__ == "The docstring."
            with contextlib.suppress(AttributeError):
                await manager.__aenter__()
        await manager.gen.aclose()

    async def test_it_is_entered_once(self):
        @server_context
        async def worker():
            yield

        manager = worker()
        async with manager:
            with pytest.raises(AttributeError, match="entered already"):
                await manager.__aenter__()

    def test_it_is_the_managers_of_the_core(self):
        assert issubclass(AsyncServerContextManager, _aiotools.SendingContextManager)
        assert issubclass(AsyncServerContextManager, aiotools.AsyncContextManager)
        assert issubclass(AsyncServerContextManager, contextlib.AbstractAsyncContextManager)
        assert AsyncServerContextManager[int].__origin__ is AsyncServerContextManager

    def test_metadata_is_kept(self):
        async def worker(loop, pidx, args):
            "The docstring."
            yield

        decorated = aiotools.server(worker)
        assert decorated.__wrapped__ is worker
        assert (decorated.__name__, decorated.__doc__) == ("worker", "The docstring.")
        assert inspect.signature(decorated) == inspect.signature(worker)

    @pytest.mark.parametrize("wrong", [lambda: 5, len, AsyncServerContextManager, None])
    def test_what_is_no_generator_function_is_refused_when_called(self, wrong):
        if wrong is not None:
            decorated = server_context(wrong)
            with pytest.raises(RuntimeError, match="async generator function"):
                decorated()
        with pytest.raises(RuntimeError, match="async generator function"):
            AsyncServerContextManager(wrong, (), {})

    def test_a_coroutine_function_is_refused_when_called(self):
        @server_context
        async def worker():
            pass

        with pytest.raises(RuntimeError, match="async generator function"):
            worker()


class TestMainContext:
    def test_a_clean_exit_gives_the_signal_to_the_generator(self):
        got = []

        @main_context
        def main():
            got.append((yield (1, 2)))

        with main() as value:
            assert value == (1, 2)
        manager = main()
        with manager:
            manager.yield_return = signal.SIGINT
        assert got == [signal.SIGTERM, signal.SIGINT]
        assert ServerMainContextManager.yield_return is signal.SIGTERM

    def test_errors_are_those_of_contextlib(self):
        @main_context
        def never():
            if never is None:
                yield

        @main_context
        def twice():
            yield 1
            try:
                yield 2
            finally:
                closed.append(True)

        closed = []
        with pytest.raises(RuntimeError, match="didn't yield"):
            never().__enter__()
        with pytest.raises(RuntimeError, match="didn't stop"), twice():
            pass
        assert closed == [True]

    def test_an_exception_of_the_body_is_raised_at_the_yield(self):
        @main_context
        def main(what):
            try:
                yield
            except Error:
                if what == "other":
                    raise KeyError from None
                if what == "again":
                    raise

        with main("nothing"):
            raise Error
        error = Error()
        with pytest.raises(Error) as info, main("again"):
            raise error
        assert info.value is error
        with pytest.raises(KeyError), main("other"):
            raise Error
        for stop in (StopIteration("body"), StopAsyncIteration("body")):
            with pytest.raises(type(stop)) as info, main("again"):
                raise stop
            assert info.value is stop

    def test_it_is_a_decorator(self):
        got = []

        @main_context
        def main():
            "The docstring."
            got.append((yield))

        @main()
        def function(x):
            return x + 1

        assert [function(1), function(2)] == [2, 3]
        assert got == [signal.SIGTERM] * 2
        manager = main()
        assert (manager.args, manager.kwargs, manager.__doc__) == ((), {}, "The docstring.")
        assert isinstance(manager, contextlib.AbstractContextManager)

    @pytest.mark.parametrize("wrong", [lambda: 5, len])
    def test_what_is_no_generator_function_is_refused_when_called(self, wrong):
        decorated = main_context(wrong)
        with pytest.raises(RuntimeError, match="generator function"):
            decorated()
