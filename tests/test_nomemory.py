"""Each allocation of each operation fails once: the outcome is a MemoryError or a success, and nothing is left behind.

Operations are registered in tests/operations/ with `no_memory`.
"""

import gc
import sys
import sysconfig

import pytest

import operations
from conftest import Harness, available_loop_kinds, describe_context

_testcapi = pytest.importorskip("_testcapi", reason="this interpreter comes without its test modules")
if not hasattr(_testcapi, "set_nomemory"):
    pytest.skip("this interpreter has no _testcapi.set_nomemory", allow_module_level=True)
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    # Seen on 3.13t: a list comprehension in the main thread without memory, and later a crash in unrelated code.
    pytest.skip("without the GIL the interpreter itself does not survive failing allocations", allow_module_level=True)

_, REGISTERED = operations.load()

# An operation that allocates more often than this does too much for the purpose.
MOST = 5000
# The number of allocations differs a little from run to run (caches, free lists).
CLEAN_RUNS = 4


# More allocations than a run may need less than another one.
PROBES = [None] * 32


class Fail:
    """A context manager: in its block the allocation `at` fails, and only it or also all after it."""

    def __init__(self, at, all_after):
        self.at = at
        self.stop = 0 if all_after else at + 1
        self.entered = False
        self.hit = None

    def __enter__(self, set_nomemory=_testcapi.set_nomemory):
        self.entered = True
        set_nomemory(self.at, self.stop)

    def __exit__(self, type_, value, traceback, object_=object, remove=_testcapi.remove_mem_hooks):
        # Nothing may run Python code that matters before the hooks are gone. Did the failure happen in the block?
        # If not, it is still to come, at one of the next allocations.
        try:
            try:
                for _ in PROBES:
                    object_()
            finally:
                remove()
        except MemoryError:
            self.hit = self.stop == 0 and type_ is not None
        else:
            self.hit = True
        # Returns None: an exception goes on.


def attempt(function, kind, at, all_after):
    """One run. Returns the Fail and the complaints."""
    harness = Harness(kind)
    fail = Fail(at, all_after)
    complaints = []
    unraisable = []
    previous, sys.unraisablehook = sys.unraisablehook, lambda args: unraisable.append((args.exc_value, args.err_msg))
    try:
        try:
            if operations.Operation(function, (), (), False).is_async:
                harness.run(function(fail))
            else:
                function(fail)
        finally:
            _testcapi.remove_mem_hooks()
    except MemoryError:
        pass
    except Exception as exc:
        complaints.append(f"{exc!r} instead of MemoryError")
    else:
        if not fail.entered:
            complaints.append("the operation never entered its block")
    finally:
        gc.collect()
        complaints += [f"loop error: {describe_context(c)}" for c in harness.errors if not is_memory_error(c)]
        harness.errors.clear()
        complaints += harness.finish()
        sys.unraisablehook = previous
    complaints += [f"{message}: {exc!r}" for exc, message in unraisable if not isinstance(exc, MemoryError)]
    return fail, complaints


def is_memory_error(context):
    return isinstance(context.get("exception"), MemoryError)


def attempts(function, kind, all_after):
    """Runs with the failure ever later, until it comes after the operation."""
    clean = 0
    for at in range(1, MOST):
        fail, complaints = attempt(function, kind, at, all_after)
        assert not complaints, f"allocation {at} failed: {complaints}"
        clean = 0 if fail.hit else clean + 1
        if clean >= CLEAN_RUNS:
            return at
    raise AssertionError(f"no success after {MOST} allocations")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("all_after", [False, True], ids=["one", "all-after"])
@pytest.mark.parametrize(
    "function, kind",
    [
        pytest.param(operation.function, kind, id=f"{operation.id}-{kind}")
        for operation in REGISTERED
        for kind in available_loop_kinds()
        if kind in operation.kinds and (operation.is_async or kind == "default")
    ],
)
def test_an_allocation_that_fails_is_a_memory_error(function, kind, all_after):
    attempts(function, kind, all_after)


class TestTheAttempts:
    """The harness itself: it reaches every allocation, and sees what is wrong."""

    @pytest.mark.parametrize("all_after", [False, True])
    def test_every_allocation_fails_once(self, all_after):
        failed = 0

        def ten_objects(fail):
            nonlocal failed
            try:
                with fail:
                    [object(), object(), object(), object(), object()]
                    [object(), object(), object(), object(), object()]
            except MemoryError:
                failed += 1
                raise

        last = attempts(ten_objects, "default", all_after)
        assert failed >= 10
        assert last < 100

    def test_another_exception_is_a_complaint(self):
        def wrong(fail):
            try:
                with fail:
                    [object() for _ in range(3)]
            except MemoryError:
                raise ValueError("wrong") from None

        with pytest.raises(AssertionError, match="wrong"):
            attempts(wrong, "default", False)

    def test_what_is_left_behind_is_a_complaint(self):
        import asyncio

        async def leaves_a_task(fail):
            task = asyncio.create_task(asyncio.sleep(3600))
            with fail:
                [object() for _ in range(3)]
            task.cancel()
            await asyncio.wait([task])

        with pytest.raises(AssertionError, match="pending task"):
            attempts(leaves_a_task, "default", False)

    def test_a_block_that_is_never_entered_is_a_complaint(self):
        with pytest.raises(AssertionError, match="never entered"):
            attempts(lambda fail: None, "default", False)


def test_every_callable_of_the_core_has_an_operation():
    core = pytest.importorskip("aiotools._aiotools")
    public = {name for name, value in vars(core).items() if not name.startswith("_") and callable(value)}
    public = {
        name
        for name in public
        if not (isinstance(getattr(core, name), type) and issubclass(getattr(core, name), BaseException))
    }
    covered = {name for operation in REGISTERED for name in operation.covers}
    assert public <= covered, f"register no_memory operations in tests/operations/ for: {sorted(public - covered)}"
