"""Children are asyncio tasks to everybody who looks: names, contexts, coroutines, stacks, call graphs, debuggers.

Each is asked of a child that has a done callback of its own and of one whose end is looked for (children.c), in scopes and
groups, with asyncio.TaskGroup beside them where it answers the same.
"""

import asyncio
import contextvars
import gc
import inspect
import io
import os
import subprocess
import sys
import textwrap
import traceback
import weakref

import pytest

from aiotools import Supervisor, TaskContext, TaskGroup, TaskScope, as_completed_safe, gather_safe

# More than get a done callback of their own.
MANY = 12


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def wait_for(event):
    await event.wait()


async def fail_deep():
    await asyncio.sleep(0)
    raise LookupError("deep")


async def fail():
    await fail_deep()


@pytest.fixture(
    params=[TaskScope, TaskGroup, Supervisor, asyncio.TaskGroup],
    ids=lambda owner: f"{owner.__module__}.{owner.__name__}",
)
def Owner(request):
    return request.param


class TestWhatATaskTells:
    async def test_it_is_a_task_of_asyncio_with_the_coroutine_itself(self, Owner):
        event = asyncio.Event()
        coros = [wait_for(event) for _ in range(MANY)]
        async with Owner() as owner:
            tasks = [owner.create_task(coro) for coro in coros]
            for _ in range(6):
                assert all(type(task) is asyncio.Task for task in tasks)
                assert [task.get_coro() for task in tasks] == coros
                assert all(task in asyncio.all_tasks() for task in tasks)
                await turns(1)
            event.set()
        assert all(task.get_coro() is coro for task, coro in zip(tasks, coros, strict=True))

    async def test_names(self, Owner):
        async with Owner() as owner:
            given = [owner.create_task(turns(1), name=f"child {number}") for number in range(MANY)]
            default = [owner.create_task(turns(1)) for _ in range(MANY)]
            twin = asyncio.create_task(turns(1))
        assert [task.get_name() for task in given] == [f"child {number}" for number in range(MANY)]
        names = {task.get_name() for task in default}
        if twin.get_name() == "None":
            # asyncio.eager_task_factory of 3.13.0.
            assert names == {"None"}
        else:
            assert len(names) == MANY and all(name.startswith("Task-") for name in names)

    async def test_contexts(self, Owner):
        var = contextvars.ContextVar("var", default=0)
        seen = []

        async def child():
            seen.append(var.get())
            var.set(var.get() + 1)
            await turns(1)

        shared = contextvars.copy_context()
        var.set(5)
        async with Owner() as owner:
            for _ in range(MANY):
                owner.create_task(child())
        # A copy each of the context of who calls create_task().
        assert seen == [5] * MANY and var.get() == 5
        seen.clear()
        async with Owner() as owner:
            tasks = [owner.create_task(child(), context=shared) for _ in range(MANY)]
        assert seen == list(range(MANY)) and shared[var] == MANY
        if sys.version_info >= (3, 12):
            assert all(task.get_context() is shared for task in tasks)

    async def test_stack_and_repr_of_one_that_is_suspended_are_those_of_its_coroutine(self, Owner):
        event = asyncio.Event()
        async with Owner() as owner:
            tasks = [owner.create_task(wait_for(event), name="somebody") for _ in range(MANY)]
            for _ in range(6):
                await turns(1)
                for task in tasks:
                    assert [frame.f_code.co_name for frame in task.get_stack()] == ["wait_for"]
                    text = io.StringIO()
                    task.print_stack(file=text)
                    assert "await event.wait()" in text.getvalue()
                    assert "name='somebody' coro=<wait_for() running at" in repr(task)
                    assert os.path.basename(__file__) in repr(task)
            event.set()

    async def test_the_traceback_of_a_failure_shows_the_child_and_nothing_else(self):
        async with TaskScope(exception_handler=None) as scope:
            tasks = [scope.create_task(fail()) for _ in range(MANY)]
        for task in tasks:
            frames = traceback.extract_tb(task.exception().__traceback__)
            assert [frame.name for frame in frames] == ["fail", "fail_deep"]
            assert [frame.f_code.co_name for frame in task.get_stack()] == ["fail", "fail_deep"]

    async def test_the_tracebacks_in_a_group_do(self):
        with pytest.raises(ExceptionGroup) as caught:
            async with TaskGroup() as group:
                for _ in range(MANY):
                    group.create_task(fail())
        for error in caught.value.exceptions:
            assert [frame.name for frame in traceback.extract_tb(error.__traceback__)] == ["fail", "fail_deep"]

    async def test_the_current_task_is_the_child(self, Owner):
        found = []

        async def child():
            found.append(asyncio.current_task())
            await turns(1)

        async with Owner() as owner:
            tasks = [owner.create_task(child()) for _ in range(MANY)]
        assert found == tasks

    async def test_an_own_done_callback_is_called_once_with_the_task_and_can_be_removed(self, Owner):
        called = []
        async with Owner() as owner:
            tasks = [owner.create_task(turns(3)) for _ in range(MANY)]
            for task in tasks:
                task.add_done_callback(called.append)
            assert all(task.remove_done_callback(called.append) == (not task.done()) for task in tasks[::2])
        assert [task for task in tasks if task in called] == tasks[1::2]

    async def test_a_child_can_be_awaited_waited_for_and_gathered_by_others(self, Owner):
        async def child(number):
            await turns(number % 4)
            return number

        async with Owner() as owner:
            tasks = [owner.create_task(child(number)) for number in range(MANY)]
            assert await tasks[-1] == MANY - 1
            assert await asyncio.gather(*tasks) == list(range(MANY))
            done, pending = await asyncio.wait(tasks)
            assert done == set(tasks) and not pending


class TestUnderALimit:
    """The child's coroutine is inside one that waits for its turn."""

    async def test_it_is_a_coroutine_with_the_name_of_the_child_that_awaits_it(self):
        event = asyncio.Event()
        coros = [wait_for(event) for _ in range(4)]
        async with TaskScope(limit=2) as scope:
            tasks = [scope.create_task(coro) for coro in coros]
            await turns(2)
            assert all(inspect.iscoroutine(task.get_coro()) for task in tasks)
            assert all(task.get_coro().__qualname__ == "wait_for" for task in tasks)
            assert [task.get_coro().cr_await for task in tasks[:2]] == coros[:2]
            assert [inspect.getcoroutinestate(coro) for coro in coros] == ["CORO_SUSPENDED"] * 2 + ["CORO_CREATED"] * 2
            assert "wait_for()" in repr(tasks[0])
            event.set()

    async def test_the_traceback_of_a_failure_ends_in_the_child(self):
        async with TaskScope(limit=1, exception_handler=None) as scope:
            task = scope.create_task(fail())
        names = [frame.name for frame in traceback.extract_tb(task.exception().__traceback__)]
        assert names[-2:] == ["fail", "fail_deep"]

    @pytest.mark.parametrize("started", [False, True])
    async def test_one_that_is_cancelled_gives_its_place_to_the_next(self, started):
        ran = []

        async def child(number):
            ran.append(number)
            await turns(3)

        async with TaskScope(limit=1) as scope:
            tasks = [scope.create_task(child(number)) for number in range(4)]
            if started:
                await turns(1)
            tasks[0].cancel()
            tasks[2].cancel()
        assert ran in ([1, 3], [0, 1, 3])
        assert [task.cancelled() for task in tasks] == [True, False, True, False]


class TestEndsWithoutABeginning:
    """The ways in which a coroutine is handed over and never runs: each time it is closed, and nothing warns."""

    async def test_a_child_cancelled_before_its_first_step(self, Owner, loop_kind):
        coros = [turns(1) for _ in range(MANY)]
        async with Owner() as owner:
            tasks = [owner.create_task(coro) for coro in coros]
            for task in tasks:
                task.cancel()
        assert all(coro.cr_frame is None for coro in coros)
        assert all(task.done() for task in tasks) and not owner._tasks
        if loop_kind != "eager":
            assert all(task.cancelled() for task in tasks)

    async def test_a_child_whose_coroutine_was_closed_before(self):
        """asyncio's error, as with asyncio's own tasks."""
        told = []
        coros = [turns(1) for _ in range(MANY)]
        for coro in coros:
            coro.close()
        async with TaskScope(exception_handler=lambda context: told.append(context["exception"])) as scope:
            for coro in coros:
                scope.create_task(coro)
        assert [str(error) for error in told] == ["cannot reuse already awaited coroutine"] * MANY

    async def test_a_child_that_waits_for_its_turn(self):
        coros = [turns(1) for _ in range(MANY)]
        async with TaskScope(limit=1) as scope:
            tasks = [scope.create_task(coro) for coro in coros]
            scope.abort()
        assert all(coro.cr_frame is None for coro in coros)
        assert all(task.done() for task in tasks)

    def test_a_child_of_a_loop_that_is_closed(self, new_loop):
        loop = new_loop()
        context = loop.run_until_complete(self.make_context())
        loop.close()
        coro = turns(1)
        with pytest.raises((RuntimeError, AssertionError)):
            context.create_task(coro)
        assert coro.cr_frame is None

    async def make_context(self):
        return TaskContext()

    async def test_a_child_that_create_task_of_the_loop_refuses(self, monkeypatch):
        loop = asyncio.get_running_loop()

        def refuse(coro, **kwargs):
            raise LookupError("no more")

        async with TaskScope() as scope:
            try:
                loop.create_task = refuse
            except AttributeError:
                return
            coro = turns(1)
            try:
                with pytest.raises(LookupError, match="no more"):
                    scope.create_task(coro)
            finally:
                del loop.create_task
            assert coro.cr_frame is None and not scope._tasks

    async def test_a_coroutine_that_ignores_being_closed(self, Owner):
        """It goes on as long as it likes, and the block waits; refused, it is said what Python says."""
        ended = []

        async def stubborn(number):
            for _ in range(5):
                try:
                    await turns(1)
                except (asyncio.CancelledError, GeneratorExit):
                    pass
            ended.append(number)

        async with Owner() as owner:
            tasks = [owner.create_task(stubborn(number)) for number in range(MANY)]
            await turns(1)
            for task in tasks:
                task.cancel()
            await turns(1)
            for task in tasks:
                task.cancel()
        assert sorted(ended) == list(range(MANY))

    async def test_a_coroutine_that_ignores_being_closed_when_it_is_refused(self, monkeypatch):
        unraisable = []
        monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append((args.exc_type, str(args.exc_value))))

        class Stubborn:
            def send(self, value):
                raise AssertionError("it is not to run")

            def throw(self, *exc_info):
                raise AssertionError("it is not to run")

            def close(self):
                raise RuntimeError("coroutine ignored GeneratorExit")

            def __await__(self):
                return self

        async with TaskScope() as scope:
            scope.abort()
            with pytest.raises(RuntimeError, match="shutting down"):
                scope.create_task(Stubborn())
        assert unraisable == [(RuntimeError, "coroutine ignored GeneratorExit")]


class TestWhenTheHostGoesOn:
    async def test_a_handler_sees_a_task_that_is_done(self):
        seen = []

        def handler(context):
            task = context["task"]
            seen.append((task.done(), task.exception() is context["exception"]))

        async with TaskScope(exception_handler=handler) as scope:
            for _ in range(MANY):
                scope.create_task(fail())
        assert seen == [(True, True)] * MANY

    async def test_the_host_goes_on_after_the_callbacks_of_the_last_child(self, Owner):
        order = []
        async with Owner() as owner:
            for _ in range(MANY):
                task = owner.create_task(turns(2))
                task.add_done_callback(lambda task: order.append("callback"))
                task.add_done_callback(lambda task: order.append("callback"))
        order.append("host")
        assert order == ["callback"] * (2 * MANY) + ["host"]

    async def test_gathering_goes_on_after_the_callbacks_too(self):
        order = []

        async def child():
            asyncio.current_task().add_done_callback(lambda task: order.append("callback"))
            await turns(2)

        await gather_safe(child() for _ in range(MANY))
        order.append("host")
        assert order == ["callback"] * MANY + ["host"]


class TestReferences:
    async def test_an_owner_that_was_closed_keeps_nothing_alive(self):
        class Mark:
            pass

        async def child(mark):
            await asyncio.Event().wait()

        context = TaskContext(exception_handler=None)
        mark = Mark()
        reference = weakref.ref(mark)
        for _ in range(MANY):
            context.create_task(child(mark))
        del mark
        await context.aclose()
        del context
        await turns(2)
        gc.collect()
        assert reference() is None


@pytest.mark.skipif(sys.version_info < (3, 14), reason="the call graph is new in 3.14")
class TestCallGraphs:
    async def graphs_of_children(self, spawn):
        event = asyncio.Event()
        tasks = []

        async def inner():
            tasks.append(asyncio.current_task())
            await event.wait()

        async def child():
            await inner()

        async def look():
            await turns(6)
            graphs = [asyncio.capture_call_graph(task) for task in tasks]
            event.set()
            return graphs

        looking = asyncio.create_task(look())
        await spawn(child)
        return await looking

    @pytest.mark.parametrize("way", [TaskScope, TaskGroup, gather_safe, as_completed_safe])
    async def test_a_child_shows_its_stack_and_the_task_that_waits_for_it(self, way):
        async def spawn(child):
            if way is gather_safe:
                await gather_safe(child() for _ in range(MANY))
            elif way is as_completed_safe:
                async for task in as_completed_safe(child() for _ in range(MANY)):
                    await task
            else:
                async with way() as owner:
                    for _ in range(MANY):
                        owner.create_task(child())

        graphs = await self.graphs_of_children(spawn)
        assert len(graphs) == MANY
        for graph in graphs:
            assert [entry.frame.f_code.co_name for entry in graph.call_stack] == ["wait", "inner", "child"]
            assert [waiter.future for waiter in graph.awaited_by] == [asyncio.current_task()]

    async def test_a_child_under_a_limit_shows_its_stack_too(self):
        async def spawn(child):
            async with TaskScope(limit=MANY) as owner:
                for _ in range(MANY):
                    owner.create_task(child())

        for graph in await self.graphs_of_children(spawn):
            names = [entry.frame.f_code.co_name for entry in graph.call_stack]
            assert names[:3] == ["wait", "inner", "child"]
            assert [waiter.future for waiter in graph.awaited_by] == [asyncio.current_task()]

    async def test_nobody_waits_for_a_child_that_has_ended(self):
        async with TaskScope() as scope:
            tasks = [scope.create_task(turns(1)) for _ in range(MANY)]
            await turns(8)
            assert not any(asyncio.capture_call_graph(task).awaited_by for task in tasks)


@pytest.mark.skipif(sys.version_info < (3, 14), reason="python -m asyncio ps and pstree are new in 3.14")
class TestAsyncioTools:
    # The tool is the parent of what it looks at: a process may always look into its children.
    TOOL = textwrap.dedent("""
        import runpy, subprocess, sys
        process = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert process.stdout.readline().strip() == b"ready"
            sys.argv = ["asyncio", sys.argv[1], str(process.pid)]
            runpy.run_module("asyncio", run_name="__main__")
        finally:
            process.stdin.close()
            process.wait()
    """)
    PROGRAM = textwrap.dedent("""
        import asyncio, sys, aiotools

        async def fetch(event):
            await event.wait()

        async def crawl(event):
            await fetch(event)

        async def main():
            event = asyncio.Event()
            async with aiotools.TaskScope(limit={limit}) as scope:
                for number in range({many}):
                    scope.create_task(crawl(event), name=f"crawler {{number}}")
                await asyncio.to_thread(print, "ready", flush=True)
                await asyncio.to_thread(sys.stdin.read)
                event.set()

        asyncio.run(main())
    """)

    @pytest.mark.parametrize("limit", [None, MANY], ids=["plain", "limited"])
    @pytest.mark.parametrize("command", ["ps", "pstree"])
    def test_they_show_names_stacks_and_who_waits(self, command, limit):
        program = self.PROGRAM.format(many=MANY, limit=limit)
        result = subprocess.run(
            [sys.executable, "-c", self.TOOL, command, program], capture_output=True, text=True, timeout=50
        )
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        for number in range(MANY):
            assert any(f"crawler {number}" in line for line in lines), result.stdout
        if command == "ps":
            # One line a task: its stack, and who waits for it.
            assert sum("fetch -> crawl" in line and "main" in line for line in lines) == MANY, result.stdout
        else:
            # Below their host, in whose stack they are.
            main = next(number for number, line in enumerate(lines) if "main" in line)
            assert all(number > main for number, line in enumerate(lines) if "crawler" in line), result.stdout
