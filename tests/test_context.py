"""actxmgr and AsyncContextManager beside contextlib's, and the small context managers."""

import asyncio
import collections.abc
import contextlib
import contextvars
import copy
import functools
import gc
import inspect
import pickle
import sys
import traceback
import types
import warnings
import weakref

import pytest

from aiotools import _aiotools
from aiotools.context import (
    AsyncContextManager,
    AsyncExitStack,
    aclosing,
    actxmgr,
    async_ctx_manager,
    closing_async,
    resetting,
)

BOTH = pytest.mark.parametrize("decorate", [actxmgr, contextlib.asynccontextmanager], ids=["ours", "contextlib"])


class Error(Exception):
    pass


# What a generator can do. Each gets a log, and whether to suspend at every turn.


async def turn(suspend):
    if suspend:
        await asyncio.sleep(0)


async def ends_normally(log, suspend):
    await turn(suspend)
    yield "value"
    await turn(suspend)
    log.append("after")


async def yields_none(log, suspend):
    yield
    log.append("after")


async def yields_a_tuple(log, suspend):
    yield (1, 2)


async def yields_an_exception(log, suspend):
    yield StopIteration(1)


async def does_not_yield(log, suspend):
    await turn(suspend)
    if log is None:
        yield


async def yields_twice(log, suspend):
    yield 1
    await turn(suspend)
    yield 2
    log.append("not reached")


async def yields_twice_and_cleans_up(log, suspend):
    yield 1
    try:
        await turn(suspend)
        yield 2
    finally:
        log.append(repr(sys.exc_info()[1]))
        await turn(suspend)


async def yields_twice_and_fails_to_close(log, suspend):
    yield 1
    try:
        yield 2
    finally:
        await turn(suspend)
        raise Error("close")


async def yields_twice_and_replaces_the_exit(log, suspend):
    yield 1
    try:
        yield 2
    except GeneratorExit:
        await turn(suspend)
        raise Error("close") from None


async def yields_when_closed(log, suspend):
    yield 1
    try:
        yield 2
    except GeneratorExit:
        yield 3


async def yields_in_finally(log, suspend):
    try:
        yield 1
    finally:
        await turn(suspend)
        yield 2


async def raises_before(log, suspend):
    await turn(suspend)
    raise Error("before")
    yield


async def raises_after(log, suspend):
    yield
    await turn(suspend)
    raise Error("after")


async def raises_a_stop_before(log, suspend):
    raise StopAsyncIteration("before")
    yield


async def raises_a_stop_after(log, suspend):
    yield
    await turn(suspend)
    raise StopIteration("after")


async def raises_an_exit_before(log, suspend):
    raise GeneratorExit
    yield


async def raises_an_exit_after(log, suspend):
    yield
    raise GeneratorExit


async def raises_an_interrupt_after(log, suspend):
    yield
    raise KeyboardInterrupt


async def raises_an_interrupt_before(log, suspend):
    await turn(suspend)
    raise KeyboardInterrupt
    yield


async def returns_before(log, suspend):
    await turn(suspend)
    return
    yield


async def raises_a_cancellation_after(log, suspend):
    yield
    await turn(suspend)
    raise asyncio.CancelledError("own")


async def swallows(log, suspend):
    try:
        yield 1
    except BaseException as exc:
        log.append(repr(exc))
        await turn(suspend)


async def returns_in_except(log, suspend):
    try:
        yield 1
    except Error:
        await turn(suspend)
        return


async def returns_in_finally(log, suspend):
    with warnings.catch_warnings():
        try:
            yield 1
        finally:
            await turn(suspend)
            for _ in (1,):
                log.append("finally")


async def swallows_and_yields(log, suspend):
    try:
        yield 1
    except BaseException:
        await turn(suspend)
    yield 2


async def swallows_and_yields_and_fails_to_close(log, suspend):
    try:
        yield 1
    except BaseException:
        pass
    try:
        yield 2
    finally:
        await turn(suspend)
        raise Error("close")


async def raises_it_again(log, suspend):
    try:
        yield 1
    except BaseException:
        await turn(suspend)
        raise


async def raises_it_again_by_name(log, suspend):
    try:
        yield 1
    except BaseException as exc:
        await turn(suspend)
        raise exc


async def raises_it_again_later(log, suspend):
    kept = None
    try:
        yield 1
    except BaseException as exc:
        kept = exc
    await turn(suspend)
    if kept is not None:
        raise kept


async def raises_another(log, suspend):
    try:
        yield 1
    except BaseException:
        await turn(suspend)
        raise Error("another")


async def raises_another_from_it(log, suspend):
    try:
        yield 1
    except BaseException as exc:
        raise Error("another") from exc


async def raises_another_from_none(log, suspend):
    try:
        yield 1
    except BaseException:
        raise Error("another") from None


async def raises_a_runtime_error_from_it(log, suspend):
    try:
        yield 1
    except BaseException as exc:
        raise RuntimeError("another") from exc


async def raises_a_stop_instead(log, suspend):
    try:
        yield 1
    except BaseException:
        raise StopAsyncIteration("instead")


async def raises_a_stop_iteration_instead(log, suspend):
    try:
        yield 1
    except BaseException:
        await turn(suspend)
        raise StopIteration("instead")


async def raises_an_exit_instead(log, suspend):
    try:
        yield 1
    except BaseException:
        await turn(suspend)
        raise GeneratorExit("instead")


async def raises_an_interrupt_instead(log, suspend):
    try:
        yield 1
    except BaseException:
        await turn(suspend)
        raise KeyboardInterrupt("instead")


async def raises_its_context_instead(log, suspend):
    try:
        yield 1
    except BaseException as exc:
        await turn(suspend)
        raise (exc.__context__ or exc.__cause__ or exc)


async def catches_and_raises_in_finally(log, suspend):
    try:
        try:
            yield 1
        finally:
            await turn(suspend)
            raise Error("first")
    except Error as exc:
        log.append(repr(exc.__context__))
        raise KeyError("second") from exc


async def fails_in_finally(log, suspend):
    try:
        yield 1
    finally:
        await turn(suspend)
        raise Error("finally")


BEHAVIOURS = [
    obj
    for name, obj in list(globals().items())
    if inspect.isasyncgenfunction(obj) and list(inspect.signature(obj).parameters) == ["log", "suspend"]
]


# What a block can do.


async def nothing():
    pass


async def suspends():
    await asyncio.sleep(0)


def raiser(make):
    async def raises():
        raise make()

    raises.__name__ = f"raises {make()!r}"
    return raises


async def raises_with_cause():
    raise RuntimeError("body") from StopIteration("cause")


async def raises_in_a_handler():
    try:
        raise KeyError("first")
    except KeyError:
        raise Error("second")


class Unequal(Exception):
    def __eq__(self, other):
        return True

    __hash__ = None


BODIES = [
    nothing,
    suspends,
    *map(
        raiser,
        [
            lambda: Error("body"),
            lambda: RuntimeError("body"),
            lambda: StopIteration("body"),
            lambda: StopAsyncIteration("body"),
            lambda: GeneratorExit("body"),
            lambda: KeyboardInterrupt("body"),
            lambda: SystemExit(3),
            lambda: asyncio.CancelledError("body"),
            lambda: TimeoutError("body"),
            lambda: ExceptionGroup("body", [Error(1), KeyError(2)]),
            lambda: Unequal("body"),
        ],
    ),
    raises_with_cause,
    raises_in_a_handler,
]


def describe(exc, seen=()):
    """All that matters of an exception, apart from frames outside this file."""
    if exc is None:
        return None
    if id(exc) in seen:
        return "..."
    seen = (*seen, id(exc))
    frames = [
        (frame.name, frame.lineno) for frame in traceback.extract_tb(exc.__traceback__) if frame.filename == __file__
    ]
    return {
        "type": type(exc).__name__,
        "text": str(exc),
        "frames": frames,
        "cause": describe(exc.__cause__, seen),
        "context": describe(exc.__context__, seen),
        "suppressed": exc.__suppress_context__,
    }


async def outcome(decorate, behaviour, body, suspend):
    log = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            async with decorate(behaviour)(log, suspend) as value:
                log.append(repr(value))
                await body()
                log.append("body ended")
        except BaseException as exc:
            ended = describe(exc)
            exc = None
        else:
            ended = "normally"
        gc.collect(0)
    return ended, log, [str(warning.message) for warning in caught]


class TestBesideContextlib:
    @pytest.mark.parametrize("suspend", [False, True], ids=["straight", "suspending"])
    @pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda f: f.__name__)
    async def test_the_outcome_is_the_same(self, behaviour, suspend):
        for body in BODIES:
            ours = await outcome(actxmgr, behaviour, body, suspend)
            theirs = await outcome(contextlib.asynccontextmanager, behaviour, body, suspend)
            assert ours == theirs, body.__name__

    @pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda f: f.__name__)
    async def test_in_an_exit_stack_the_outcome_is_the_same(self, behaviour):
        def stacked(decorate):
            def decorator(function):
                @contextlib.asynccontextmanager
                async def both(log, suspend):
                    async with AsyncExitStack() as stack:
                        await stack.enter_async_context(decorate(raises_another)(log, suspend))
                        value = await stack.enter_async_context(decorate(function)(log, suspend))
                        await stack.enter_async_context(decorate(raises_it_again)(log, suspend))
                        yield value

                return both

            return decorator

        for body in BODIES:
            ours = await outcome(stacked(actxmgr), behaviour, body, False)
            theirs = await outcome(stacked(contextlib.asynccontextmanager), behaviour, body, False)
            assert ours == theirs, body.__name__

    @pytest.mark.parametrize("suspend", [False, True], ids=["straight", "suspending"])
    @pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda f: f.__name__)
    async def test_exit_called_by_hand_answers_the_same(self, behaviour, suspend):
        async def answers(decorate, typ, kind):
            log = []
            value = tb = None
            if kind == "raised":
                try:
                    raise typ("raised")
                except typ as exc:
                    value, tb = exc, exc.__traceback__
            elif kind == "made":
                value = typ("made")
            manager = decorate(behaviour)(log, suspend)
            try:
                await manager.__aenter__()
                answer = await manager.__aexit__(typ, value, tb)
            except BaseException as exc:
                answer = describe(exc)
            return answer, describe(value), log

        for typ, kind in [
            (None, ""),
            (Error, "none"),
            (Error, "made"),
            (Error, "raised"),
            (StopIteration, "none"),
            (StopAsyncIteration, "raised"),
        ]:
            ours = await answers(actxmgr, typ, kind)
            theirs = await answers(contextlib.asynccontextmanager, typ, kind)
            assert ours == theirs, (typ, kind)

    @BOTH
    async def test_the_traceback_of_what_passes_ends_in_the_block(self, decorate):
        manager = decorate(raises_it_again)([], True)
        try:
            async with manager:
                raise Error  # the last frame of the traceback
        except Error as exc:
            frames = traceback.extract_tb(exc.__traceback__)
        assert len(frames) == 1
        assert "the last frame" in frames[-1].line

    async def test_no_frame_of_the_library_is_in_a_traceback(self):
        try:
            async with actxmgr(raises_after)([], True):
                pass
        except Error as exc:
            names = [frame.name for frame in traceback.extract_tb(exc.__traceback__)]
        assert names == ["test_no_frame_of_the_library_is_in_a_traceback", "raises_after"]

    @BOTH
    async def test_entering_twice_is_an_error(self, decorate):
        manager = decorate(ends_normally)([], False)
        async with manager:
            with pytest.raises(AttributeError):
                async with manager:
                    pass
        with pytest.raises(AttributeError):
            await manager.__aenter__()

    @BOTH
    async def test_exit_without_enter_runs_the_generator_anyway(self, decorate):
        manager = decorate(yields_none)([], False)
        with pytest.raises(RuntimeError, match="generator didn't stop"):
            await manager.__aexit__(None, None, None)

    @BOTH
    async def test_a_function_that_makes_no_generator_fails_when_entered(self, decorate):
        manager = decorate(lambda: 5)()
        with pytest.raises(TypeError, match="'int' object is not an async iterator"):
            await manager.__aenter__()

    @BOTH
    async def test_arguments_that_do_not_fit_fail_at_the_call(self, decorate):
        with pytest.raises(TypeError, match="missing"):
            decorate(ends_normally)()

    @BOTH
    async def test_generators_that_are_not_genuine_work(self, decorate):
        class Generator(collections.abc.AsyncGenerator):
            def __init__(self, log):
                self.log = log
                self.turns = 0

            async def asend(self, value):
                await asyncio.sleep(0)
                self.turns += 1
                if self.turns > 1:
                    raise StopAsyncIteration
                return "value"

            async def athrow(self, typ, value=None, tb=None):
                await asyncio.sleep(0)
                self.log.append(typ if isinstance(typ, type) else type(typ))
                raise StopAsyncIteration

        log = []
        async with decorate(Generator)(log) as value:
            assert value == "value"
        async with decorate(Generator)(log):
            raise Error
        assert log == [Error]

    @BOTH
    async def test_a_generator_may_be_replaced(self, decorate):
        manager = decorate(ends_normally)([], False)
        await manager.gen.aclose()
        manager.gen = yields_a_tuple([], False)
        async with manager as value:
            assert value == (1, 2)

    @BOTH
    async def test_cancellation_reaches_the_generator(self, decorate):
        for where in ("enter", "body", "exit"):
            log = []
            reached = asyncio.Event()

            @decorate
            async def manager(where=where, log=log, reached=reached):
                try:
                    if where == "enter":
                        reached.set()
                        await asyncio.Event().wait()
                    yield
                    if where == "exit":
                        reached.set()
                        await asyncio.Event().wait()
                finally:
                    log.append(type(sys.exc_info()[1]))
                    await asyncio.sleep(0)

            async def use(where=where, reached=reached, manager=manager):
                async with manager():
                    if where == "body":
                        reached.set()
                        await asyncio.Event().wait()

            task = asyncio.create_task(use())
            await reached.wait()
            task.cancel("message")
            with pytest.raises(asyncio.CancelledError, match="message"):
                await task
            assert log == [asyncio.CancelledError]
            assert task.cancelled()

    async def test_a_generator_that_was_closed_in_the_block_ends_the_same(self):
        async def ended(decorate, fails, again):
            log = []

            @decorate
            async def manager():
                try:
                    yield
                except BaseException as exc:
                    log.append(repr(exc))
                    await asyncio.sleep(0)
                    raise

            made = manager()
            try:
                async with made:
                    await made.gen.aclose()
                    if again:
                        await made.gen.aclose()
                    if fails:
                        raise Error("body")
            except BaseException as exc:
                log.append(describe(exc))
            return log

        for fails in (False, True):
            for again in (False, True):
                theirs = await ended(contextlib.asynccontextmanager, fails, again)
                assert await ended(actxmgr, fails, again) == theirs

    async def test_a_generator_that_is_running_is_not_run_by_another(self):
        async def ended(decorate):
            log = []
            leaving, go_on = asyncio.Event(), asyncio.Event()

            @decorate
            async def manager():
                try:
                    yield
                finally:
                    leaving.set()
                    await go_on.wait()

            made = manager()

            async def use():
                async with made:
                    pass

            task = asyncio.create_task(use())
            await leaving.wait()
            for info in [(None, None, None), (Error, Error("other"), None)]:
                try:
                    await made.__aexit__(*info)
                except BaseException as exc:
                    log.append((type(exc), str(exc)))
            go_on.set()
            await task
            return log

        theirs = await ended(contextlib.asynccontextmanager)
        assert await ended(actxmgr) == theirs
        assert [kind for kind, _ in theirs] == [RuntimeError] * 2

    @BOTH
    async def test_the_loop_closes_a_generator_that_was_left_half_way(self, decorate, new_loop):
        log = []

        @decorate
        async def manager():
            try:
                yield
            finally:
                log.append("closed")

        async def leave():
            await manager().__aenter__()

        await leave()
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert log == ["closed"]

    @BOTH
    def test_shutdown_of_generators_finds_it(self, decorate, run):
        log = []
        kept = []

        @decorate
        async def manager():
            try:
                yield
            finally:
                await asyncio.sleep(0)
                log.append("closed")

        async def leave():
            kept.append(manager())
            await kept[0].__aenter__()

        run(leave())
        assert log == ["closed"]


class TestWhatEnterAndExitReturn:
    @BOTH
    @pytest.mark.parametrize("name", ["__aenter__", "__aexit__"])
    def test_is_a_coroutine_to_those_who_look(self, decorate, name):
        manager = decorate(ends_normally)([], False)
        step = getattr(manager, name)(*[None] * 3 * (name == "__aexit__"))
        assert isinstance(step, collections.abc.Coroutine)
        assert inspect.isawaitable(step)
        assert asyncio.iscoroutine(step)
        step.close()

    @BOTH
    async def test_can_run_as_a_task(self, decorate):
        manager = decorate(ends_normally)([], True)
        assert await asyncio.create_task(manager.__aenter__()) == "value"
        assert await asyncio.gather(manager.__aexit__(None, None, None)) == [False]

    @BOTH
    def test_nothing_happens_before_it_is_awaited(self, decorate):
        log = []

        @decorate
        async def manager():
            log.append("entered")
            yield

        step = manager().__aenter__()
        assert log == []
        step.close()
        assert log == []

    @BOTH
    def test_warns_when_it_is_dropped_unawaited(self, decorate):
        manager = decorate(ends_normally)([], False)
        with pytest.warns(RuntimeWarning, match=r"coroutine '.*\.__aenter__' was never awaited"):
            manager.__aenter__()
        with pytest.warns(RuntimeWarning, match=r"coroutine '.*\.__aexit__' was never awaited"):
            manager.__aexit__(None, None, None)

    @BOTH
    async def test_can_be_awaited_once(self, decorate):
        manager = decorate(ends_normally)([], False)
        step = manager.__aenter__()
        await step
        with pytest.raises(RuntimeError, match="cannot reuse already awaited"):
            await step
        await manager.__aexit__(None, None, None)

    def drive(self, decorate):
        """A manager whose steps yield 1 to whoever drives them, once each."""

        @types.coroutine
        def pause():
            try:
                return (yield 1)
            except Error as exc:
                log.append(repr(exc))
                return "caught"

        @decorate
        async def manager():
            log.append(await pause())
            try:
                yield "value"
            finally:
                log.append(await pause())

        log = []
        return manager(), log

    @BOTH
    def test_passes_on_what_is_sent_and_thrown(self, decorate):
        manager, log = self.drive(decorate)
        step = manager.__aenter__()
        with pytest.raises(TypeError, match="just-started"):
            step.send(5)
        assert step.send(None) == 1
        with pytest.raises(StopIteration) as info:
            step.send("sent")
        assert info.value.value == "value"
        step = manager.__aexit__(None, None, None)
        assert step.send(None) == 1
        with pytest.raises(StopIteration) as info:
            step.throw(Error("thrown"))
        assert info.value.value is False
        assert log == ["sent", "Error('thrown')", "caught"]

    @BOTH
    def test_an_exception_thrown_in_before_the_start_is_raised(self, decorate):
        manager, log = self.drive(decorate)
        step = manager.__aenter__()
        with pytest.raises(Error):
            step.throw(Error())
        assert log == []
        assert step.close() is None

    @BOTH
    def test_close_ends_the_generator(self, decorate):
        manager, log = self.drive(decorate)
        with pytest.raises(StopIteration):
            step = manager.__aenter__()
            step.send(None)
            step.send(None)
        step = manager.__aexit__(None, None, None)
        step.send(None)
        assert step.close() is None
        with pytest.raises(RuntimeError, match="cannot reuse"):
            step.send(None)
        log.clear()
        # Whatever close() did about the generator, contextlib's does the same.
        step = manager.gen.aclose()
        try:
            step.send(None)
        except (StopIteration, RuntimeError) as exc:
            log.append(type(exc))
        step.close()

    @BOTH
    def test_is_not_re_entered(self, decorate):
        steps = []

        @decorate
        async def manager():
            with pytest.raises(ValueError, match="already executing"):
                steps[0].send(None)
            yield

        steps.append(manager().__aenter__())
        with pytest.raises(StopIteration):
            steps[0].send(None)

    def test_the_frame_of_the_generator_can_be_seen(self):
        manager, _ = self.drive(actxmgr)
        step = manager.__aenter__()
        step.send(None)
        assert step.cr_frame is manager.gen.ag_frame is not None
        assert step.cr_await is manager.gen.ag_await is not None
        assert step.__qualname__ == "AsyncContextManager.__aenter__"
        assert not step.cr_running
        with pytest.raises(StopIteration):
            step.send(None)
        assert step.cr_frame is None
        assert step.cr_await is None
        step = manager.__aexit__(None, None, None)
        step.send(None)
        assert step.cr_await is manager.gen.ag_await is not None
        with pytest.raises(StopIteration):
            step.send(None)

    @pytest.mark.skipif(sys.version_info < (3, 14), reason="the call graph came with 3.14")
    async def test_the_call_graph_goes_through_it(self):
        suspended = asyncio.Event()

        @actxmgr
        async def manager():
            suspended.set()
            await asyncio.Event().wait()
            yield

        async def use():
            async with manager():
                pass

        task = asyncio.create_task(use())
        await suspended.wait()
        graph = asyncio.capture_call_graph(task)
        names = [entry.frame.f_code.co_name for entry in graph.call_stack]
        assert names[-2:] == ["manager", "use"] or names[:3] == ["wait", "manager", "use"]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def test_exit_takes_three_arguments(self):
        manager = actxmgr(ends_normally)([], False)
        with pytest.raises(TypeError, match="exactly 3 arguments"):
            manager.__aexit__(None)


class TestManager:
    def test_names_are_aliases(self):
        assert actxmgr is async_ctx_manager
        assert AsyncExitStack is contextlib.AsyncExitStack
        assert aclosing is contextlib.aclosing

    def test_the_decorated_name_is_a_function_with_the_metadata(self):
        @actxmgr
        async def manager(a: int, *, b: str = "x"):
            "The text."
            yield

        assert inspect.isfunction(manager)
        assert manager.__name__ == "manager"
        assert manager.__doc__ == "The text."
        assert manager.__module__ == __name__
        assert str(inspect.signature(manager)) == "(a: int, *, b: str = 'x')"
        assert inspect.isasyncgenfunction(manager.__wrapped__)

    def test_the_decorated_name_can_be_pickled(self):
        assert pickle.loads(pickle.dumps(module_level)) is module_level

    async def test_it_works_as_a_method(self):
        class Thing:
            def __init__(self, value):
                self.value = value

            @actxmgr
            async def plain(self, more):
                yield self.value + more

            @classmethod
            @actxmgr
            async def of_class(cls):
                yield cls

            @staticmethod
            @actxmgr
            async def static(value):
                yield value

        async with Thing(1).plain(2) as value:
            assert value == 3
        async with Thing(1).plain(more=3) as value:
            assert value == 4
        async with Thing.of_class() as value:
            assert value is Thing
        async with Thing.static(5) as value:
            assert value == 5

    @BOTH
    async def test_all_kinds_of_arguments_arrive(self, decorate):
        @decorate
        async def manager(a, /, b, *rest, c, **more):
            yield a, b, rest, c, more

        async with manager(1, 2, 3, c=4, self=5, func=6, args=7, kwds=8) as value:
            assert value == (1, 2, (3,), 4, {"self": 5, "func": 6, "args": 7, "kwds": 8})
        async with manager(*(1, 2), c=3) as value:
            assert value == (1, 2, (), 3, {})

    @BOTH
    async def test_attributes(self, decorate):
        manager = decorate(ends_normally)([], suspend=False)
        assert manager.func is ends_normally
        assert manager.args == ([],)
        assert manager.kwds == {"suspend": False}
        assert inspect.isasyncgen(manager.gen)
        async with manager:
            for name in ("func", "args", "kwds"):
                assert not hasattr(manager, name)
        assert decorate(lambda: None)().kwds == {}

    @BOTH
    def test_arguments_are_let_go_when_it_is_entered(self, decorate, run):
        class Argument:
            pass

        @decorate
        async def manager(argument):
            del argument
            yield

        async def main():
            argument = Argument()
            gone = weakref.ref(argument)
            entered = manager(argument)
            del argument
            async with entered:
                assert gone() is None

        run(main())

    @BOTH
    def test_instances_have_the_docstring_of_the_function(self, decorate):
        @decorate
        async def documented():
            "The text."
            yield

        @decorate
        async def undocumented():
            yield

        manager = documented()
        assert manager.__doc__ == "The text."
        manager.extra = 1
        assert manager.__doc__ == "The text."
        manager.__doc__ = "Other."
        assert manager.__doc__ == "Other."
        assert undocumented().__doc__ == type(undocumented()).__doc__

    def test_the_class_has_a_docstring_of_its_own(self):
        assert AsyncContextManager.__doc__.startswith("An asynchronous context manager")
        assert str(inspect.signature(AsyncContextManager)) == "(func, args, kwds)"

    @BOTH
    def test_instances_take_attributes_and_weak_references(self, decorate):
        manager = decorate(ends_normally)([], False)
        manager.extra = 1
        assert manager.extra == 1
        assert weakref.ref(manager)() is manager

    @BOTH
    async def test_a_copy_shares_the_generator_and_not_the_attributes(self, decorate):
        manager = decorate(ends_normally)([], False)
        manager.attribute = 5
        twin = copy.copy(manager)
        assert type(twin) is type(manager)
        assert twin.gen is manager.gen
        assert (twin.func, twin.args, twin.kwds) == (manager.func, manager.args, manager.kwds)
        twin.attribute = 6
        assert manager.attribute == 5
        async with manager as value:
            assert value == "value"
        # What was entered is the generator; its end is all that is left for the copy.
        assert twin.args == ([], False) or twin.args[0] == ["after"]
        with pytest.raises(RuntimeError, match="didn't yield"):
            await twin.__aenter__()

    @BOTH
    async def test_a_copy_of_one_that_was_entered_was_entered_too(self, decorate):
        manager = decorate(ends_normally)([], False)
        await manager.__aenter__()
        twin = copy.copy(manager)
        with pytest.raises(AttributeError):
            twin.args  # noqa: B018
        assert not await twin.__aexit__(None, None, None)

    @BOTH
    def test_managers_cannot_be_pickled_nor_copied_deeply(self, decorate):
        manager = decorate(ends_normally)([], False)
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot pickle"):
                make(manager)

    async def test_a_subclass_is_copied_as_what_it_is(self):
        class Mine(AsyncContextManager):
            pass

        class Sends(_aiotools.SendingContextManager):
            yield_return = 1

        for cls in (Mine, Sends):
            twin = copy.copy(cls(ends_normally, ([], False), {}))
            assert type(twin) is cls
            async with twin as value:
                assert value == "value"

    def test_is_a_virtual_subclass_of_the_abstract_one(self):
        manager = actxmgr(ends_normally)([], False)
        assert isinstance(manager, AsyncContextManager)
        assert isinstance(manager, contextlib.AbstractAsyncContextManager)
        assert issubclass(AsyncContextManager, contextlib.AbstractAsyncContextManager)

    def test_can_be_subscripted(self):
        assert AsyncContextManager[int].__origin__ is AsyncContextManager

    def test_can_be_made_by_hand(self, run):
        async def main():
            async with AsyncContextManager(ends_normally, ([], False), {}) as value:
                assert value == "value"
            async with AsyncContextManager(func=ends_normally, args=[[]], kwds={"suspend": True}) as value:
                assert value == "value"

        run(main())

    @pytest.mark.parametrize("args", [(), (1,), (1, 2), (1, 2, 3, 4)])
    def test_by_hand_it_needs_three_arguments(self, args):
        with pytest.raises(TypeError):
            AsyncContextManager(*args)

    def test_by_hand_it_refuses_bad_arguments(self):
        with pytest.raises(TypeError):
            AsyncContextManager(ends_normally, 5, {})
        with pytest.raises(TypeError):
            AsyncContextManager(ends_normally, ([], False), 5)
        with pytest.raises(TypeError):
            AsyncContextManager(5, (), {})

    async def test_one_that_was_never_initialized_says_so(self):
        manager = AsyncContextManager.__new__(AsyncContextManager)
        for name in ("gen", "func", "args", "kwds"):
            with pytest.raises(AttributeError, match=name):
                getattr(manager, name)
        with pytest.raises(AttributeError):
            await manager.__aenter__()
        with pytest.raises(AttributeError):
            await manager.__aexit__(None, None, None)
        with pytest.raises(AttributeError):
            manager._recreate_cm()

    async def test_can_be_subclassed(self):
        log = []

        class Logged(AsyncContextManager):
            def __init__(self, func, args, kwds):
                super().__init__(func, args, kwds)
                self.extra = "extra"

            async def __aenter__(self):
                log.append("enter")
                return await super().__aenter__()

            async def __aexit__(self, *exc_info):
                log.append("exit")
                return await super().__aexit__(*exc_info)

        manager = Logged(ends_normally, (log, True), {})
        assert manager.extra == "extra"
        async with manager as value:
            assert value == "value"
        assert log == ["enter", "exit", "after"]

    @BOTH
    async def test_decorates_coroutine_functions(self, decorate):
        log = []

        @decorate
        async def manager(name):
            log.append(f"enter {name}")
            yield
            log.append(f"exit {name}")

        @manager("x")
        async def func(n):
            "The text."
            log.append(n)
            if n:
                await func(n - 1)
            return n

        assert await func(1) == 1
        assert log == ["enter x", 1, "enter x", 0, "exit x", "exit x"]
        assert func.__doc__ == "The text."
        assert inspect.iscoroutinefunction(func)

    @BOTH
    async def test_the_decorator_passes_exceptions_to_the_manager(self, decorate):
        @decorate(swallows)([], True)
        async def func():
            raise Error

        assert await func() is None

    @BOTH
    async def test_one_that_was_entered_cannot_decorate(self, decorate):
        manager = decorate(ends_normally)([], False)
        async with manager:

            @manager
            async def func():
                pass

            with pytest.raises(AttributeError):
                await func()

    def test_as_a_decorator_it_takes_what_contextlib_takes(self):
        manager = actxmgr(ends_normally)([], False)
        with pytest.raises(TypeError):
            manager()
        with pytest.raises(TypeError):
            manager(nothing, nothing)

    @BOTH
    async def test_partials_and_callables_can_be_decorated(self, decorate):
        async with decorate(functools.partial(ends_normally, [], False))() as value:
            assert value == "value"

        class Callable:
            async def __call__(self):
                yield 5

        assert decorate(Callable())().__doc__

    def test_a_reference_cycle_is_collected(self, run):
        class Canary:
            pass

        gone = []

        async def main():
            @actxmgr
            async def manager():
                yield

            cm = manager()
            cm.canary = Canary()
            cm.me = cm
            cm.step = cm.__aenter__()
            weakref.finalize(cm.canary, gone.append, 1)
            with pytest.warns(RuntimeWarning, match="never awaited"):
                del cm
                gc.collect()

        run(main())
        assert gone == [1]

    def test_managers_made_without_the_helper_of_3_12(self, run):
        async def main():
            async with _aiotools._make_manager(ends_normally, ([], False), {}) as value:
                assert value == "value"

        run(main())
        for wrong in ((), (ends_normally, [], {}), (ends_normally, (), None)):
            with pytest.raises(TypeError):
                _aiotools._make_manager(*wrong)
        with pytest.raises(TypeError, match="missing"):
            _aiotools._make_manager(ends_normally, (), {})

    def test_the_helper_can_be_quickened_only_if_it_is_one(self):
        if sys.version_info < (3, 12):
            assert _aiotools._quicken_helper(len) is len
            return
        for wrong in (5, len, lambda: None):
            with pytest.raises(TypeError):
                _aiotools._quicken_helper(wrong)
        a = b = 1
        with pytest.raises(TypeError, match="AsyncContextManager"):
            _aiotools._quicken_helper(lambda: (a, b))
        for cell in (0, 1):
            helper = actxmgr(ends_normally)
            helper.__closure__[cell].cell_contents = 5
            with pytest.raises(TypeError):
                helper()
            del helper.__closure__[cell].cell_contents
            with pytest.raises(TypeError, match="was changed"):
                helper()


@actxmgr
async def module_level():
    yield


class TestSendingContextManager:
    def make(self, function, *args):
        class Sending(_aiotools.SendingContextManager):
            yield_return = "class"

        return Sending(function, args, {})

    async def test_a_clean_exit_sends_the_attribute(self):
        got = []

        async def function(suspend):
            got.append((yield "value"))
            await turn(suspend)

        for suspend in (False, True):
            manager = self.make(function, suspend)
            async with manager as value:
                assert value == "value"
            manager = self.make(function, suspend)
            async with manager:
                manager.yield_return = "instance"
        assert got == ["class", "instance"] * 2

    async def test_the_rest_is_as_usual(self):
        for behaviour in BEHAVIOURS:
            for body in BODIES:
                theirs = await outcome(contextlib.asynccontextmanager, behaviour, body, True)
                ours = await outcome(lambda f: functools.partial(self.make, f), behaviour, body, True)
                assert ours == theirs, (behaviour.__name__, body.__name__)

    async def test_the_parts_stay(self):
        manager = self.make(yields_none, [], False)
        async with manager:
            assert manager.func is yields_none
            assert manager.args == ([], False)
            assert manager.kwargs == manager.kwds == {}

    async def test_without_the_attribute_it_fails_at_exit(self):
        manager = _aiotools.SendingContextManager(yields_none, ([], False), {})
        await manager.__aenter__()
        with pytest.raises(AttributeError, match="yield_return"):
            await manager.__aexit__(None, None, None)
        await manager.gen.aclose()


var = contextvars.ContextVar("var")


class TestResetting:
    def test_sets_for_the_time_of_the_block(self):
        var.set("outer")
        with resetting(var, "inner") as value:
            assert value is None
            assert var.get() == "inner"
        assert var.get() == "outer"

    async def test_works_as_an_async_context_manager(self):
        token = var.set("outer")
        async with resetting(var, "inner") as value:
            assert value is None
            await asyncio.sleep(0)
            assert var.get() == "inner"
        assert var.get() == "outer"
        var.reset(token)

    def test_what_was_unset_is_unset_again(self):
        fresh = contextvars.ContextVar("fresh")
        with resetting(fresh, 1):
            assert fresh.get() == 1
        with pytest.raises(LookupError):
            fresh.get()

    async def test_resets_and_suppresses_nothing_when_the_block_fails(self):
        fresh = contextvars.ContextVar("fresh")
        with pytest.raises(Error):
            with resetting(fresh, 1):
                raise Error
        with pytest.raises(Error):
            async with resetting(fresh, 1):
                raise Error
        assert fresh.get(None) is None

    def test_can_be_used_again_but_not_inside_itself(self):
        fresh = contextvars.ContextVar("fresh")
        manager = resetting(fresh, 1)
        for _ in range(2):
            with manager:
                assert fresh.get() == 1
                with pytest.raises(RuntimeError, match="cannot be nested in itself"):
                    manager.__enter__()
                assert fresh.get() == 1
            assert fresh.get(None) is None

    async def test_leaving_what_was_not_entered_is_an_error(self):
        with pytest.raises(RuntimeError, match="not entered"):
            resetting(var, 1).__exit__(None, None, None)
        with pytest.raises(RuntimeError, match="not entered"):
            await resetting(var, 1).__aexit__(None, None, None)

    def test_in_another_context_it_cannot_be_left(self):
        fresh = contextvars.ContextVar("fresh")
        manager = resetting(fresh, 1)
        context = contextvars.copy_context()
        context.run(manager.__enter__)
        with pytest.raises(ValueError, match="different Context"):
            manager.__exit__(None, None, None)
        assert context[fresh] == 1
        context.run(manager.__exit__, None, None, None)
        assert fresh not in context

    async def test_nothing_happens_before_it_is_awaited(self):
        fresh = contextvars.ContextVar("fresh")
        manager = resetting(fresh, 1)
        enter = manager.__aenter__()
        assert fresh.get(None) is None
        await enter
        leave = manager.__aexit__(None, None, None)
        assert fresh.get() == 1
        await leave
        assert fresh.get(None) is None
        with pytest.warns(RuntimeWarning, match=r"'resetting\.__aenter__' was never awaited"):
            manager.__aenter__()

    @pytest.mark.parametrize("args", [(), (1,), (var,), (1, 2), (var, 1, 2)])
    def test_refuses_wrong_arguments(self, args):
        with pytest.raises(TypeError):
            resetting(*args)

    def test_keywords_and_attributes(self):
        manager = resetting(ctxvar=var, value=1)
        assert manager.ctxvar is var
        assert manager.value == 1
        assert resetting[int].__origin__ is resetting
        assert str(inspect.signature(resetting)) == "(ctxvar, value)"
        with pytest.raises(RuntimeError, match="already"):
            manager.__init__(var, 2)

    def test_one_that_was_never_initialized_says_so(self):
        manager = resetting.__new__(resetting)
        with pytest.raises(RuntimeError, match="not initialized"):
            manager.__enter__()

    def test_can_be_subclassed(self):
        class Mine(resetting):
            def __init__(self, value):
                super().__init__(var, value)
                self.extra = 1

        with Mine(5):
            assert var.get() == 5

    async def test_is_a_context_manager_of_both_kinds(self):
        assert isinstance(resetting(var, 1), contextlib.AbstractContextManager)
        assert isinstance(resetting(var, 1), contextlib.AbstractAsyncContextManager)
        with contextlib.ExitStack() as stack:
            stack.enter_context(resetting(var, "stack"))
            assert var.get() == "stack"
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(resetting(var, "stack"))
            assert var.get() == "stack"


class Closable:
    def __init__(self, error=None):
        self.closed = 0
        self.error = error

    async def close(self):
        await asyncio.sleep(0)
        self.closed += 1
        if self.error is not None:
            raise self.error
        return True


class TestClosingAsync:
    async def test_closes_the_thing_at_the_end(self):
        thing = Closable()
        manager = closing_async(thing)
        assert manager.thing is thing
        async with manager as value:
            assert value is thing
            assert not thing.closed
        assert thing.closed == 1

    async def test_closes_when_the_block_fails_and_suppresses_nothing(self):
        thing = Closable()
        with pytest.raises(Error):
            async with closing_async(thing):
                raise Error
        assert thing.closed == 1

    async def test_the_error_of_close_is_raised(self):
        error = KeyError("close")
        with pytest.raises(KeyError) as info:
            async with closing_async(Closable(error)):
                raise Error
        assert info.value is error
        assert isinstance(error.__context__, Error)

    async def test_cancellation_reaches_close(self):
        begun = asyncio.Event()

        class Slow:
            async def close(self):
                begun.set()
                await asyncio.Event().wait()

        async def use():
            async with closing_async(Slow()):
                pass

        task = asyncio.create_task(use())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_what_cannot_be_closed_fails_at_the_end(self):
        with pytest.raises(AttributeError, match="close"):
            async with closing_async(object()):
                pass

    async def test_a_close_that_is_not_async_fails_at_the_end(self):
        class Plain:
            def close(self):
                return 5

        with pytest.raises(TypeError, match="int can't be used in 'await' expression"):
            async with closing_async(Plain()):
                pass

    async def test_close_may_return_any_awaitable(self):
        class Awaitable:
            def __init__(self, result):
                self.result = result

            def __await__(self):
                return self.result

        class Thing:
            def __init__(self, closing):
                self.close = lambda: closing

        @types.coroutine
        def generator():
            yield
            return 1

        future = asyncio.get_running_loop().create_future()
        future.set_result(1)
        for closing in (future, Awaitable(iter([])), generator(), asyncio.sleep(0)):
            async with closing_async(Thing(closing)):
                pass
        for wrong, text in (
            (Awaitable(5), "non-iterator"),
            (Awaitable(generator()), "returned a coroutine"),
        ):
            with pytest.raises(TypeError, match=text):
                async with closing_async(Thing(wrong)):
                    pass

    async def test_close_may_not_return_a_coroutine_that_is_being_awaited(self):
        class Thing:
            def close(self):
                return coro

        coro = asyncio.Event().wait()
        task = asyncio.create_task(coro)
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="awaited already"):
            async with closing_async(Thing()):
                pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_nothing_is_closed_before_exit_is_awaited(self):
        thing = Closable()
        leave = closing_async(thing).__aexit__(None, None, None)
        leave.close()
        assert thing.closed == 0
        with pytest.warns(RuntimeWarning, match=r"'closing_async\.__aexit__' was never awaited"):
            closing_async(thing).__aexit__(None, None, None)

    async def test_the_thing_may_be_replaced_and_closed_again(self):
        manager = closing_async(None)
        manager.thing = thing = Closable()
        async with manager:
            pass
        async with manager:
            pass
        assert thing.closed == 2
        del manager.thing
        with pytest.raises(AttributeError):
            await manager.__aenter__()
        with pytest.raises(AttributeError):
            await manager.__aexit__(None, None, None)

    @pytest.mark.parametrize("args", [(), (1, 2)])
    def test_takes_one_argument(self, args):
        with pytest.raises(TypeError):
            closing_async(*args)

    def test_signature_and_subscription(self):
        assert str(inspect.signature(closing_async)) == "(thing)"
        assert closing_async[int].__origin__ is closing_async
        assert closing_async(thing=5).thing == 5
