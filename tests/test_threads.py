"""Many loops in as many threads at once: what belongs to one loop is not disturbed by another.

Under ThreadSanitizer (`make test-tsan`) this is where races show.
"""

import asyncio
import threading

import pytest

import operations
from conftest import available_loop_kinds, make_loop

REGISTERED, _ = operations.load()
THREADS = 4
RUNS = 25

pytestmark = pytest.mark.threads


def in_threads(function):
    """Runs it in several threads, all let loose at the same moment; raises what any of them raised."""
    barrier = threading.Barrier(THREADS)
    errors = []

    def run():
        try:
            barrier.wait(30)
            function()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize(
    "operation, kind",
    [
        pytest.param(operation, kind, id=f"{operation.id}-{kind if operation.is_async else 'sync'}")
        for operation in REGISTERED
        for kind in (("default", "uvloop") if operation.is_async else ("default",))
        if operation.threads and kind in available_loop_kinds() and kind in operation.kinds
    ],
)
def test_an_operation_runs_on_many_loops_at_once(operation, kind):
    def run():
        if not operation.is_async:
            for _ in range(RUNS):
                operation.function()
            return

        async def main():
            for _ in range(RUNS):
                await operation.function()

        with asyncio.Runner(loop_factory=lambda: make_loop(kind)) as runner:
            runner.run(main())

    in_threads(run)


def test_all_operations_run_beside_each_other():
    """Different types at the same time share the module's state."""

    def run():
        async def main():
            for operation in REGISTERED:
                if not operation.threads or "default" not in operation.kinds:
                    continue
                if operation.is_async:
                    await operation.function()
                else:
                    operation.function()

        for _ in range(3):
            with asyncio.Runner(loop_factory=lambda: make_loop("default")) as runner:
                runner.run(main())

    in_threads(run)


def test_an_error_in_a_thread_is_seen():
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda: 1 / 0)
