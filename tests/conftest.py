"""How the suite runs: loop kinds, and what every test must leave behind (nothing).

Every ``async def test_*`` runs once per loop kind: ``default``, ``uvloop`` (where it can be imported), ``eager`` (the
default loop with ``asyncio.eager_task_factory``, 3.12+) and ``debug`` (the default loop in debug mode). A test that
holds for some kinds only says so and why: ``@pytest.mark.loop_kinds("default", "debug", reason="...")``.

Sync tests get the same kinds by asking for ``new_loop`` (a factory of loops), ``run`` (runs a coroutine on a new loop)
or ``loop_kind`` (the name). ``loop_errors`` holds what reached the loops' exception handler; a test that provokes such
calls takes them out again.

A test fails if it leaves behind: a call to the loop's exception handler, a coroutine that was never awaited (also one
that only the garbage collector finds), a pending task, a live deadline or a ready waiter in our timer queue, a thread.

tests/README.rst has examples.
"""

import asyncio
import functools
import gc
import importlib.util
import inspect
import sys
import sysconfig
import threading

import hypothesis
import pytest

LOOP_KINDS = ("default", "uvloop", "eager", "debug")
HAVE_UVLOOP = importlib.util.find_spec("uvloop") is not None

# Files of tests that start processes, by how their names begin.
PROCESS_TESTS = ("test_fork", "test_server", "test_cli", "test_examples", "test_process_")

# How long a thread may need to end after its loop is closed. Nothing waits this long unless the test fails.
THREAD_GRACE = 5.0
# Survivors of this many tests are moved out of the collector's sight, so that collecting after each test stays cheap.
TESTS_PER_FREEZE = 100
# Without the GIL each collection looks at everything there is, frozen or not, and takes some ten milliseconds.
TESTS_PER_COLLECTION = 10 if sysconfig.get_config_var("Py_GIL_DISABLED") else 1

# The fixtures here give factories, so they serve all examples of a property; the machines are shared, so no deadline.
hypothesis.settings.register_profile(
    "aiotools",
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("aiotools")


def available_loop_kinds():
    kinds = ["default"]
    if HAVE_UVLOOP:
        kinds.append("uvloop")
    if hasattr(asyncio, "eager_task_factory"):
        kinds.append("eager")
    kinds.append("debug")
    return kinds


def make_loop(kind):
    """A new event loop of that kind."""
    if kind == "uvloop":
        import uvloop

        loop = uvloop.new_event_loop()
        loop.set_debug(False)
        return loop
    loop = asyncio.new_event_loop()
    loop.set_debug(kind == "debug")
    if kind == "eager":
        loop.set_task_factory(asyncio.eager_task_factory)
    return loop


class LoopErrors(list):
    """The contexts that reached the exception handler. What a test expects, it takes out."""

    def take(self):
        """All contexts so far; they count as looked at."""
        taken = list(self)
        self.clear()
        return taken

    def take_one(self, exception=None, match=None):
        """The only context so far; its exception's type and its message can be checked on the way."""
        assert len(self) == 1, f"one call to the exception handler expected, not {len(self)}: {list(self)}"
        [context] = self.take()
        if exception is not None:
            assert isinstance(context.get("exception"), exception), context
        if match is not None:
            assert match in context["message"], context
        return context


def counts_of_loop(loop):
    """(live deadlines, ready waiters) of the loop's timer queue."""
    core = sys.modules.get("aiotools._aiotools")
    count = getattr(core, "_loop_counts", None)
    return count(loop) if count is not None else (0, 0)


def describe_context(context):
    text = context.get("message", "")
    if (exc := context.get("exception")) is not None:
        text += f" ({exc!r})"
    return text


class Harness:
    """The loops of one test, and what the test leaves behind."""

    def __init__(self, kind):
        self.kind = kind
        self.errors = LoopErrors()
        self.loops = []
        self.threads = threading.enumerate() if threading.active_count() > 1 else [threading.current_thread()]
        self.complaints = []

    def new_loop(self):
        loop = make_loop(self.kind)
        loop.set_exception_handler(lambda loop, context: self.errors.append(context))
        self.loops.append(loop)
        return loop

    def run(self, coro):
        with asyncio.Runner(loop_factory=self.new_loop, debug=True if self.kind == "debug" else None) as runner:
            loop = runner.get_loop()
            try:
                return runner.run(coro)
            finally:
                self.look_at_loop(loop)

    def look_at_loop(self, loop):
        """Before the loop is closed: that would cancel what is pending."""
        if loop.is_closed():
            return
        pending = [task for task in asyncio.all_tasks(loop) if not task.done()]
        if pending:
            self.complaints += [f"pending task: {task!r}" for task in pending]
            return
        deadlines, ready = counts_of_loop(loop)
        if ready and not loop.is_running():
            # The wake-up of a waiter whose task was cancelled meanwhile takes one more turn.
            loop.call_soon(loop.stop)
            loop.run_forever()
            deadlines, ready = counts_of_loop(loop)
        if deadlines:
            self.complaints.append(f"live deadlines in the timer queue: {deadlines}")
        if ready:
            self.complaints.append(f"ready waiters: {ready}")

    def close_loops(self):
        for loop in self.loops:
            if loop.is_closed():
                continue
            self.look_at_loop(loop)
            if not loop.is_running():
                asyncio.Runner(loop_factory=lambda loop=loop: loop).__enter__().close()
        self.loops.clear()

    def finish(self):
        """Looks at all that is left and cleans up; returns the complaints."""
        self.close_loops()
        if threading.active_count() > len(self.threads):
            strays = [thread for thread in threading.enumerate() if thread not in self.threads]
            for thread in strays:
                thread.join(THREAD_GRACE)
            self.complaints += [f"stray thread: {thread!r}" for thread in strays if thread.is_alive()]
        self.complaints += [f"unhandled loop error: {describe_context(context)}" for context in self.errors]
        return self.complaints


harness_key = pytest.StashKey[Harness]()
tests_since_freeze = 0


def harness_of(item):
    harness = item.stash.get(harness_key, None)
    if harness is None:
        callspec = getattr(item, "callspec", None)
        kind = callspec.params.get("loop_kind", "default") if callspec is not None else "default"
        harness = item.stash[harness_key] = Harness(kind)
    return harness


def is_async_hypothesis_test(function):
    inner = getattr(getattr(function, "hypothesis", None), "inner_test", None)
    return inner is not None and inspect.iscoroutinefunction(inner)


def pytest_addoption(parser):
    parser.addoption(
        "--loops",
        help=f"run on these loop kinds only, comma-separated (of {', '.join(LOOP_KINDS)}); one that is named "
        "must be available; 'asyncio' is all but uvloop",
    )
    parser.addoption(
        "--tests-per-collection",
        type=int,
        default=TESTS_PER_COLLECTION,
        help="the garbage collector runs after so many tests (default here: %(default)s)",
    )
    parser.addoption(
        "--no-processes",
        action="store_true",
        help="leave out the tests that start processes: servers, forks, commands (most of the suite's time)",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "loop_kinds(*kinds, reason): the test holds on these loop kinds only, for this reason"
    )
    config.addinivalue_line("markers", "threads: several threads run our code at once; make test-tsan runs these")
    kinds = available_loop_kinds()
    if (asked := config.getoption("--loops")) is not None:
        asyncio_kinds = [kind for kind in kinds if kind != "uvloop"]
        asked = [name.strip() for name in asked.split(",")]
        asked = [kind for name in asked for kind in (asyncio_kinds if name == "asyncio" else [name])]
        if missing := [name for name in asked if name not in kinds]:
            raise pytest.UsageError(f"--loops: not here: {', '.join(missing)} (there are: {', '.join(kinds)})")
        kinds = [name for name in kinds if name in asked]
    config.loop_kinds = kinds


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--no-processes") and collection_path.name.startswith(PROCESS_TESTS):
        return True
    return None


def pytest_report_header(config):
    line = f"loop kinds: {', '.join(config.loop_kinds)}"
    if not HAVE_UVLOOP:
        line += " (uvloop is not installed: those cases do not run)"
    return line


def pytest_generate_tests(metafunc):
    names = metafunc.fixturenames
    is_async = inspect.iscoroutinefunction(metafunc.function) or is_async_hypothesis_test(metafunc.function)
    if is_async and "loop_kind" not in names:
        names.append("loop_kind")
    marker = metafunc.definition.get_closest_marker("loop_kinds")
    if "loop_kind" not in names:
        if marker is not None:
            raise pytest.UsageError(f"{metafunc.definition.nodeid}: loop_kinds on a test that runs on no loop")
        return
    kinds = metafunc.config.loop_kinds
    if marker is not None:
        if not marker.kwargs.get("reason") or not marker.args or not set(marker.args) <= set(LOOP_KINDS):
            raise pytest.UsageError(f"{metafunc.definition.nodeid}: loop_kinds takes known kinds and a reason")
        kinds = [kind for kind in kinds if kind in marker.args]
    metafunc.parametrize("loop_kind", kinds)


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    global tests_since_freeze
    harness = harness_of(pyfuncitem)
    function = pyfuncitem.obj
    hypothesis = function.hypothesis if is_async_hypothesis_test(function) else None
    inner = hypothesis.inner_test if hypothesis is not None else function

    def call(*args, **kwargs):
        harness.run(inner(*args, **kwargs))

    if hypothesis is not None:
        hypothesis.inner_test = functools.wraps(inner)(call)
    elif inspect.iscoroutinefunction(function):
        pyfuncitem.obj = call
    try:
        result = yield
    finally:
        if hypothesis is not None:
            hypothesis.inner_test = inner
        else:
            pyfuncitem.obj = function
        # A test that failed is cleaned up after, and keeps its own error.
        tests_since_freeze += 1
        if tests_since_freeze % pyfuncitem.config.getoption("--tests-per-collection") == 0:
            # Runs the finalizers now, so that what they report belongs to this test.
            harness.close_loops()
            gc.collect()
        complaints = harness.finish()
    if tests_since_freeze >= TESTS_PER_FREEZE:
        tests_since_freeze = 0
        gc.freeze()
    if complaints:
        pytest.fail("the test left behind:\n  " + "\n  ".join(complaints), pytrace=False)
    return result


@pytest.fixture
def loop_kind(request):
    """The name of the loop kind that this run of the test is for."""
    return request.param


@pytest.fixture
def new_loop(request, loop_kind):
    """A factory of event loops of this kind; they are looked at and closed when the test is over."""
    return harness_of(request.node).new_loop


@pytest.fixture
def run(request, loop_kind):
    """``run(coro)``: runs a coroutine on a new loop of this kind and returns its result."""
    return harness_of(request.node).run


@pytest.fixture
def loop_errors(request):
    """What reached the exception handler of the test's loops: a LoopErrors. What is left in it fails the test."""
    return harness_of(request.node).errors
