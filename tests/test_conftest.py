"""The suite's own plugin: a test that leaves something behind fails, on every loop kind."""

import asyncio
import pathlib
import sys

import pytest

CONFTEST = pathlib.Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
KINDS = 2 + (sys.version_info >= (3, 12))


@pytest.fixture
def outcomes(pytester):
    """Runs the source of a test file under the plugin; uvloop is left out, so counts are the same everywhere."""
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nfilterwarnings = error\n")

    def run(source, *args):
        pytester.makepyfile("import asyncio, gc, threading, warnings\nimport pytest\n" + source)
        kinds = "default,eager,debug" if KINDS == 3 else "default,debug"
        return pytester.runpytest_inprocess(
            f"--loops={kinds}", "--tests-per-collection=1", "-p", "no:cacheprovider", *args
        )

    return run


def check(result, text, **expected):
    result.assert_outcomes(**expected)
    result.stdout.fnmatch_lines([f"*{text}*"])


def test_a_clean_async_test_runs_once_per_kind(outcomes):
    result = outcomes(
        """
async def test_it(loop_kind):
    loop = asyncio.get_running_loop()
    assert loop.get_debug() == (loop_kind == "debug")
    assert (loop.get_task_factory() is not None) == (loop_kind == "eager")
"""
    )
    result.assert_outcomes(passed=KINDS)


def test_a_failing_async_test_fails_with_its_own_error(outcomes):
    result = outcomes(
        """
async def test_it():
    asyncio.create_task(asyncio.sleep(3600))
    assert 1 == 2, "its own error"
"""
    )
    check(result, "its own error", failed=KINDS)


def test_fixtures_and_parameters_reach_an_async_test(outcomes):
    result = outcomes(
        """
@pytest.fixture
def five():
    return 5

@pytest.mark.parametrize("n", [5])
async def test_it(five, n, tmp_path):
    assert five == n and tmp_path.exists()

class TestIt:
    async def test_method(self, five):
        assert five == 5
"""
    )
    result.assert_outcomes(passed=2 * KINDS)


def test_a_pending_task_fails_the_test(outcomes):
    result = outcomes("async def test_it():\n    global t\n    t = asyncio.create_task(asyncio.sleep(3600))\n")
    check(result, "pending task: <Task pending*", failed=KINDS)


def test_an_unhandled_loop_error_fails_the_test(outcomes):
    result = outcomes(
        """
async def test_it():
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)
"""
    )
    check(result, "unhandled loop error: *ZeroDivisionError*", failed=KINDS)


def test_a_task_exception_that_only_the_collector_finds_fails_the_test(outcomes):
    result = outcomes(
        """
async def fail():
    raise ValueError("lost")

async def test_it():
    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cycle = [task]
    cycle.append(cycle)
"""
    )
    check(result, "unhandled loop error: *lost*", failed=KINDS)


def test_a_loop_error_that_was_taken_is_fine(outcomes):
    result = outcomes(
        """
async def test_it(loop_errors):
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)
    loop_errors.take_one(ZeroDivisionError, match="Exception in callback")
"""
    )
    result.assert_outcomes(passed=KINDS)


def test_a_loop_error_that_was_only_collected_fails_the_test(outcomes):
    result = outcomes(
        """
async def test_it(loop_errors):
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)
"""
    )
    check(result, "unhandled loop error: *", failed=KINDS)


@pytest.mark.parametrize(
    "drop",
    ["nothing()", "cycle = [nothing()]; cycle.append(cycle); del cycle"],
    ids=["at-once", "by-the-collector"],
)
def test_an_unawaited_coroutine_fails_the_test(outcomes, drop):
    result = outcomes(
        f"""
async def nothing():
    pass

async def test_it():
    {drop}

def test_in_a_sync_test():
    {drop}
"""
    )
    check(result, "coroutine 'nothing' was never awaited", failed=KINDS + 1)


def test_a_stray_thread_fails_the_test(outcomes, monkeypatch):
    result = outcomes(
        """
import conftest
conftest.THREAD_GRACE = 0.01
stop = threading.Event()

async def test_it():
    global t
    t = threading.Thread(target=stop.wait, name="left-over")
    t.start()

def test_end():
    stop.set()
    t.join()
""",
        "--loops=default",
    )
    check(result, "stray thread: *left-over*", failed=1, passed=1)


def test_executor_threads_end_with_their_loop(outcomes):
    result = outcomes("async def test_it():\n    assert await asyncio.to_thread(lambda: 1) == 1\n")
    result.assert_outcomes(passed=KINDS)


@pytest.mark.parametrize("counts", [(3, 0), (0, 3)], ids=["deadlines", "waiters"])
def test_a_live_timer_queue_fails_the_test(outcomes, monkeypatch, counts):
    import aiotools._aiotools as core

    monkeypatch.setattr(core, "_loop_counts", lambda loop: counts, raising=False)
    result = outcomes("async def test_it():\n    pass\n")
    text = "live deadlines in the timer queue: 3" if counts[0] else "ready waiters: 3"
    check(result, text, failed=KINDS)


def test_new_loop_and_run_serve_sync_tests(outcomes):
    result = outcomes(
        """
def test_run(run, loop_kind):
    async def main():
        return asyncio.get_running_loop().get_debug()
    assert run(main()) == (loop_kind == "debug")

def test_new_loop(new_loop):
    one, other = new_loop(), new_loop()
    assert one is not other
    one.run_until_complete(asyncio.sleep(0))
    other.close()
"""
    )
    result.assert_outcomes(passed=2 * KINDS)


def test_a_task_left_on_a_new_loop_fails_the_test(outcomes):
    result = outcomes(
        """
def test_it(new_loop):
    loop = new_loop()
    loop.create_task(asyncio.sleep(3600))
    loop.run_until_complete(asyncio.sleep(0))
"""
    )
    check(result, "pending task: *", failed=KINDS)


def test_the_marker_restricts_the_kinds(outcomes):
    result = outcomes(
        """
@pytest.mark.loop_kinds("debug", reason="only there")
async def test_it(loop_kind):
    assert loop_kind == "debug"
"""
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize("arguments", ['"debug"', 'reason="why"', '"fast", reason="why"'])
def test_the_marker_wants_known_kinds_and_a_reason(outcomes, arguments):
    result = outcomes(f"@pytest.mark.loop_kinds({arguments})\nasync def test_it():\n    pass\n")
    assert result.ret == pytest.ExitCode.INTERRUPTED or result.ret == pytest.ExitCode.USAGE_ERROR
    assert "takes known kinds and a reason" in "\n".join(result.outlines + result.errlines)


def test_a_hypothesis_test_may_be_async(outcomes):
    pytest.importorskip("hypothesis")
    result = outcomes(
        """
from hypothesis import given, settings, strategies as st
seen = []

@settings(max_examples=5, database=None)
@given(n=st.integers())
async def test_it(n, loop_kind):
    seen.append(asyncio.get_running_loop())
    await asyncio.sleep(0)

def test_each_example_had_a_loop_of_its_own():
    assert len(seen) > 5 and all(loop.is_closed() for loop in seen)
"""
    )
    result.assert_outcomes(passed=KINDS + 1)


async def test_this_suite_runs_on_the_kind_that_it_says(loop_kind):
    loop = asyncio.get_running_loop()
    assert (type(loop).__module__ == "uvloop") == (loop_kind == "uvloop")
    assert loop.get_debug() == (loop_kind == "debug")
    if loop_kind == "eager":
        assert loop.get_task_factory() is asyncio.eager_task_factory
