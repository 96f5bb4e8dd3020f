"""Nothing grows with the number of operations: references (debug builds), blocks of memory, references to our types.

`make test-refleaks PYTHON=<a debug build>` hunts references as well. Operations are registered in tests/operations/.
"""

import asyncio
import sys

import pytest

import operations
from conftest import available_loop_kinds, make_loop
from leaks import counters, hunt

REGISTERED, _ = operations.load()

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def counted():
    found = counters()
    if not found:
        pytest.skip("this interpreter counts nothing (PYTHONMALLOC=malloc, no debug build)")
    return found


def cases(*kinds):
    available = available_loop_kinds()
    return [
        pytest.param(operation, kind, id=f"{operation.id}-{kind if operation.is_async else 'sync'}")
        for operation in REGISTERED
        for kind in (kinds if operation.is_async else kinds[:1])
        if kind in available and kind in operation.kinds
    ]


def counted_on(kind, counted):
    """uvloop's wheels are not built for a debug interpreter: what they add and drop is missing in its total."""
    return {name: count for name, count in counted.items() if kind != "uvloop" or name != "references"}


def runner(operation, loop):
    if not operation.is_async:

        def run(count):
            for _ in range(count):
                operation.function()

        return run

    async def run_in_loop(count):
        for _ in range(count):
            await operation.function()

    def run(count):
        loop.run_until_complete(run_in_loop(count))

    return run


@pytest.mark.parametrize("operation, kind", cases("default", "uvloop", "eager", "debug"))
def test_an_operation_leaks_nothing(operation, kind, counted):
    loop = make_loop(kind)
    try:
        leaked = hunt(runner(operation, loop), 60, counted_on(kind, counted))
    finally:
        loop.close()
    assert not leaked, f"grows with the number of runs: {leaked}"


@pytest.mark.parametrize("operation, kind", [case for case in cases("default", "uvloop") if case.values[0].is_async])
def test_an_operation_on_a_loop_of_its_own_leaks_nothing(operation, kind, counted):
    def run(count):
        for _ in range(count):
            with asyncio.Runner(loop_factory=lambda: make_loop(kind)) as runner:
                runner.run(operation.function())

    # asyncio itself needs some hundred loops before its own counts stand still.
    leaked = hunt(run, 20, counted_on(kind, counted), every=2)
    assert not leaked, f"grows with the number of loops: {leaked}"


def test_every_public_name_of_the_core_has_an_operation():
    core = pytest.importorskip("aiotools._aiotools")
    public = {name for name in vars(core) if not name.startswith("_")}
    covered = {name for operation in REGISTERED for name in operation.covers}
    assert public <= covered, f"register operations in tests/operations/ for: {sorted(public - covered)}"


class TestTheHunt:
    """The hunt itself finds what leaks, and only that."""

    def test_a_clean_operation_passes(self, counted):
        assert hunt(lambda count: [object() for _ in range(count)] and None, 60, counted) == {}

    @pytest.mark.skipif(not sys.getallocatedblocks(), reason="the allocator in use does not count its blocks")
    def test_an_object_kept_by_each_run_is_found(self, counted):
        kept = []
        leaked = hunt(lambda count: kept.extend(object() for _ in range(count)), 60, counted)
        assert leaked
        assert all(min(deltas) >= 60 for deltas in leaked.values())

    @pytest.mark.skipif(not sys.getallocatedblocks(), reason="the allocator in use does not count its blocks")
    def test_an_object_kept_by_every_tenth_run_is_found(self, counted):
        kept = []
        assert hunt(lambda count: kept.extend(object() for _ in range(count // 10)), 60, counted)

    def test_one_object_kept_by_one_round_is_noise(self, counted):
        kept = []
        rounds = iter(range(100))
        assert hunt(lambda count: kept.append([object()] * 100) if next(rounds) == 3 else None, 60, counted) == {}
