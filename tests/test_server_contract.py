"""start_server() with its classic arguments."""

import asyncio
import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import pytest
import server_workers as workers
from process_helpers import (
    PATIENCE,
    START_METHODS,
    nothing_left_fixture,  # noqa: F401
)
from server_play import RUNNERS, SETUPS, Play, kill

from aiotools.server import (
    InterruptedBySignal,
    ServerReport,
    main_context,
    process_index,
    start_server,
)

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(300)]


@pytest.fixture(params=SETUPS, ids=lambda p: "-".join(p))
def play(request, nothing_left):
    play = Play(*request.param)
    with play.wire:
        yield play


@pytest.fixture(params=[(START_METHODS[0], r) for r in RUNNERS], ids=lambda p: "-".join(p))
def quick(request, nothing_left):
    """With the first start method only, for what does not depend on it."""
    play = Play(*request.param)
    with play.wire:
        yield play


class TestLife:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_workers_live_from_start_to_the_stop_signal(self, play, signum):
        play.stop_after("enter", 2, signum)
        assert play.start(workers.reporting, "given", num_workers=2, args=(1, "two")) is None
        assert sorted(m[0] for m in play.of("enter")) == [0, 1]
        for index, pidx, same_loop, args, pid in play.of("enter"):
            assert (pidx, same_loop, args) == (index, True, ("given", 1, "two"))
            assert pid != os.getpid()
        assert sorted(play.of("leave")) == [(0, signum), (1, signum)]
        assert all(type(received) is signal.Signals for _, received in play.of("leave"))
        assert play.main_received is signum
        assert play.children_at_exit == set()

    @pytest.mark.skipif("fork" not in START_METHODS, reason="signals hit the helper processes")
    def test_any_signal_can_be_the_stop_signal(self, quick):
        quick.stop_after("enter", 1, signal.SIGUSR1)
        quick.start(workers.reporting, stop_signals={signal.SIGUSR1})
        assert quick.of("leave") == [(0, signal.SIGUSR1)]
        assert quick.main_received is signal.SIGUSR1

    @pytest.mark.parametrize(
        "given, expected",
        [(None, ()), (5, (5,)), ((), ()), ((1, 2), (1, 2)), ([1, 2], ([1, 2],)), ("ab", ("ab",))],
    )
    def test_what_the_main_context_yields_comes_before_the_arguments(self, quick, given, expected):
        inner = quick.main()

        @main_context
        def main():
            with inner():
                yield given

        quick.stop_after("enter", 1)
        # The wire must come first for the worker, so it is put there by a partial of the worker.
        worker = functools.partial(put_wire_first, quick.wire.writer)
        quick.start(worker, main=main, args=("own",))
        assert quick.of("enter")[0][3] == (*expected, "own")

    def test_the_main_context_is_entered_in_the_loop_with_signals_blocked(self, quick):
        seen = []
        inner = quick.main()

        @main_context
        def main():
            seen.append(asyncio.get_running_loop())
            seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            with inner() as given:
                yield given

        quick.stop_after("enter", 1)
        quick.start(workers.reporting, main=main)
        assert seen[1] >= {signal.SIGINT, signal.SIGTERM}

    def test_without_workers_it_waits_for_a_signal(self, quick):
        inner = quick.main(wire=False)

        @main_context
        def main():
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
            with inner() as given:
                yield given

        quick.start(workers.reporting, num_workers=0, main=main)
        assert quick.said == []

    def test_without_a_main_context_it_works_too(self, quick):
        worker = functools.partial(stop_parent, os.getpid())
        assert start_server(worker, mp_context=quick.ctx, runner=quick.runner) is None

    def test_it_can_be_called_again(self, quick):
        for _ in range(2):
            quick.said.clear()
            quick.stop_after("enter", 1)
            quick.start(workers.reporting)
            assert quick.main_received is signal.SIGTERM

    def test_process_index_is_unset_in_the_main_process(self, quick):
        quick.stop_after("enter", 1)
        quick.start(workers.reporting)
        with pytest.raises(LookupError):
            process_index.get()
        assert process_index.name == "process_index"

    def test_the_hook_runs_in_each_child_before_the_loop(self, play):
        hook = functools.partial(workers.hook, play.wire.writer)
        play.stop_after("enter", 2)
        play.start(workers.reporting, num_workers=2, prestart_hook=hook)
        assert sorted(play.of("hook")) == [(i, i, None, True) for i in range(2)]
        for index in range(2):
            order = [m[0] for m in play.said if m[1] == index]
            assert order == ["hook", "enter", "leave"]

    def test_a_context_manager_that_is_no_generator_may_be_the_worker(self, quick):
        quick.stop_after("enter", 1)
        quick.start(workers.OwnContext)
        assert quick.of("leave") == [(0, (None, None, None))]

    def test_workers_are_started_in_order_and_extras_after_them(self, play):
        play.stop_after("extra", 1)
        play.start(workers.reporting, num_workers=2, extra_procs=[workers.extra_reporting], args=("x",))
        assert play.of("extra") == [(2, None, 2, ("x",))]

    def test_the_report_says_who_ran_and_why_they_ended(self, quick):
        quick.stop_after("enter", 2)
        report = quick.start(workers.reporting, num_workers=2, report=True)
        assert type(report) is ServerReport
        assert [(w.index, w.code, w.signal, w.reason) for w in report.workers] == [
            (0, 0, None, "stopped"),
            (1, 0, None, "stopped"),
        ]
        assert {w.pid for w in report.workers} == {m[4] for m in quick.of("enter")}
        for w in report.workers:
            assert w.started <= w.ready <= w.ended
        assert report.stop_signal is signal.SIGTERM


def put_wire_first(wire, loop, index, args):
    return workers.reporting(loop, index, (wire, *args))


def stop_parent(pid, loop, index, args):
    loop.call_soon(os.kill, pid, signal.SIGTERM)
    return contextlib.nullcontext()


class TestStop:
    def test_a_signal_during_start_waits_for_the_yield(self, play):
        go_r, go_w = play.ctx.Pipe(duplex=False)
        with go_r, go_w:

            def react(message):
                if message[0] == "starting":
                    os.kill(os.getpid(), signal.SIGTERM)
                    # To the worker directly as well: it is in its start for sure.
                    for child in multiprocessing.active_children():
                        os.kill(child.pid, signal.SIGTERM)
                    go_w.send("go")

            play.react = react
            play.start(workers.slow_start, go_r)
        assert play.of("entered") == [(0,)]
        assert play.of("leave") == [(0, signal.SIGTERM)]

    def test_later_signals_are_ignored(self, play):
        go_r, go_w = play.ctx.Pipe(duplex=False)
        with go_r, go_w:

            def react(message):
                if message[0] == "enter":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif message[0] == "leaving":
                    for pid in (os.getpid(), *[c.pid for c in multiprocessing.active_children()]):
                        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                            os.kill(pid, signum)
                    go_w.send("go")

            play.react = react
            report = play.start(workers.slow_stop, go_r, report=True)
        assert play.of("left") == [(0, signal.SIGTERM)]
        assert play.main_received is signal.SIGTERM
        assert report.workers[0].code == 0

    def test_what_does_not_end_in_time_is_killed_with_a_warning(self, play, caplog):
        play.stop_after("enter", 2)
        report = play.start(workers.never_stops, num_workers=2, wait_timeout=0.2, report=True)
        assert [w.signal for w in report.workers] == [signal.SIGKILL] * 2
        assert any("kill" in r.getMessage().lower() for r in caplog.records)
        assert play.main_received is signal.SIGTERM

    def test_a_stop_during_the_start_of_the_server_is_not_lost(self, quick):
        inner = quick.main()

        @main_context
        def main():
            with inner() as given:
                os.kill(os.getpid(), signal.SIGTERM)  # blocked; no child exists yet
                yield given

        quick.start(workers.reporting, main=main, num_workers=2)
        assert sorted(quick.of("leave")) == [(0, signal.SIGTERM), (1, signal.SIGTERM)]

    def test_children_that_end_badly_are_reported_as_warnings(self, quick, caplog):
        quick.stop_after("enter", 1)
        quick.start(workers.fails, 0, "stop", ValueError("at the stop"))
        warnings = [r for r in caplog.records if r.name == "aiotools.server" and r.levelno == 30]
        assert any("status 1" in r.getMessage() for r in warnings)


class TestFailure:
    @pytest.mark.parametrize("where", ["start", "stop"])
    def test_a_failing_worker_interrupts_the_server(self, play, where):
        if where == "stop":
            play.stop_after("enter", 2, signal.SIGINT)
        report = play.start(workers.fails, 1, where, ValueError("no luck"), num_workers=2, report=True)
        assert (0, signal.SIGINT) in play.of("leave")
        assert play.main_received is signal.SIGINT
        assert [w.code for w in report.workers] == [0, 1]

    def test_the_only_worker_failing_interrupts_it_too(self, quick):
        quick.start(workers.fails, 0, "start", ValueError("no luck"))
        assert quick.main_received is signal.SIGINT

    def test_sigint_is_not_used_where_it_is_no_stop_signal(self, quick):
        quick.start(workers.fails, 1, "start", ValueError(), num_workers=2, stop_signals=(signal.SIGTERM,))
        assert quick.of("leave") == [(0, signal.SIGTERM)]
        assert quick.main_received is signal.SIGTERM

    @pytest.mark.skipif("fork" not in START_METHODS, reason="signals hit the helper processes")
    def test_without_any_usual_stop_signal_all_stop_as_well(self, quick):
        quick.start(workers.fails, 1, "start", ValueError(), num_workers=2, stop_signals=(signal.SIGUSR1,))
        assert quick.of("leave") == [(0, signal.SIGUSR1)]
        assert quick.main_received is signal.SIGTERM

    def test_child_interrupts_can_be_ignored(self, quick):
        def gone(index):
            if index == 1:
                kill(signal.SIGTERM)

        quick.on_gone = gone
        quick.start(
            workers.fails,
            1,
            "start",
            ValueError(),
            num_workers=2,
            ignore_child_interrupts=True,
            plugins=[quick.plugin],
        )
        assert quick.of("leave") == [(0, signal.SIGTERM)]
        assert quick.main_received is signal.SIGTERM

    @pytest.mark.parametrize("name", ["bad_worker", "never_yields", "yields_twice"])
    def test_misuse_of_the_generator_is_a_failure(self, quick, name):
        if name == "yields_twice":
            quick.stop_after("enter", 1)
        report = quick.start(getattr(workers, name), report=True)
        assert report.workers[0].code == 1
        if name == "yields_twice":
            assert quick.main_received is signal.SIGTERM
        else:
            assert quick.main_received is signal.SIGINT

    def test_all_workers_dead_ends_the_server(self, play, caplog):
        report = play.start(workers.dies, {0, 1}, num_workers=2, report=True)
        assert [w.signal for w in report.workers] == [signal.SIGKILL] * 2
        assert play.main_received is signal.SIGTERM
        assert "All child processes have terminated" in caplog.text

    def test_one_dead_worker_changes_nothing(self, quick):
        def gone(index):
            if index == 0:
                kill(signal.SIGTERM)

        quick.on_gone = gone
        quick.start(workers.dies, {0}, num_workers=2, plugins=[quick.plugin])
        assert quick.of("leave") == [(1, signal.SIGTERM)]

    def test_a_failing_hook_ends_the_child(self, quick, caplog):
        report = quick.start(workers.reporting, prestart_hook=workers.failing_hook, num_workers=2, report=True)
        assert [w.code for w in report.workers] == [1, 1]
        assert quick.main_received is signal.SIGTERM

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_an_unpicklable_worker_raises_here(self, method, nothing_left):
        with pytest.raises(Exception, match=r"pickle|local object"):
            start_server(lambda loop, index, args: None, mp_context=multiprocessing.get_context(method))

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_a_child_that_dies_before_it_is_up_raises_after_the_others_are_stopped(self, method):
        play = Play(method, "default")
        with play.wire:
            with pytest.raises(ChildProcessError, match="42"):
                play.start(
                    workers.reporting,
                    extra_procs=[functools.partial(workers.extra_reporting, workers.DiesOnArrival())],
                    num_workers=1,
                )
            assert isinstance(play.main_error, ChildProcessError)
            assert len(play.of("leave")) == len(play.of("enter"))


class TestMainContext:
    def test_an_error_on_enter_propagates_and_nothing_is_started(self, quick):
        @main_context
        def main():
            raise ValueError("at the start")
            yield

        with pytest.raises(ValueError, match="at the start"):
            start_server(workers.reporting, main, mp_context=quick.ctx, runner=quick.runner)

    def test_an_error_on_exit_propagates_after_all_children_are_gone(self, quick):
        inner = quick.main()

        @main_context
        def main():
            with inner() as given:
                yield given
            raise ValueError("at the end")

        quick.stop_after("enter", 1)
        with pytest.raises(ValueError, match="at the end"):
            quick.start(workers.reporting, main=main)
        assert len(quick.of("leave")) == 1

    def test_an_error_in_making_it_propagates(self, quick):
        def main():
            raise ValueError("not even made")

        with pytest.raises(ValueError, match="not even made"):
            start_server(workers.reporting, main, mp_context=quick.ctx, runner=quick.runner)


class TestExtras:
    @pytest.mark.parametrize(
        "signum, caught",
        [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)],
    )
    def test_the_stop_signal_becomes_an_exception(self, play, signum, caught):
        play.stop_after("extra", 1, signum)
        report = play.start(workers.reporting, num_workers=0, extra_procs=[workers.extra_catching], report=True)
        [(index, kind, _args)] = play.of("caught")
        assert (index, kind) == (0, caught)
        assert report.workers[0].code == 0

    @pytest.mark.skipif("fork" not in START_METHODS, reason="signals hit the helper processes")
    def test_any_other_stop_signal_becomes_interrupted_by_signal(self, quick):
        quick.stop_after("extra", 1, signal.SIGUSR1)
        quick.start(
            workers.reporting,
            num_workers=0,
            extra_procs=[workers.extra_catching],
            stop_signals={signal.SIGUSR1, signal.SIGTERM, signal.SIGINT},
        )
        assert quick.of("caught") == [(0, InterruptedBySignal, (signal.SIGUSR1,))]

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_the_exception_may_leave_the_function(self, play, signum):
        play.stop_after("extra", 1, signum)
        report = play.start(workers.reporting, num_workers=0, extra_procs=[workers.extra_reporting], report=True)
        assert report.workers[0].code == 0

    def test_an_error_of_the_extra_is_status_1(self, quick):
        report = quick.start(workers.reporting, num_workers=0, extra_procs=[workers.extra_failing], report=True)
        assert report.workers[0].code == 1

    def test_a_coroutine_function_gets_a_loop_and_is_cancelled_at_the_stop(self, play):
        play.stop_after("extra", 1)
        report = play.start(workers.reporting, num_workers=0, extra_procs=[workers.coroutine_extra], report=True)
        assert play.of("extra") == [(0, True)]
        assert play.of("cancelled") == [(0, signal.SIGTERM)]
        assert report.workers[0].code == 0

    def test_a_server_context_can_be_an_extra(self, play):
        play.stop_after("enter", 2)
        play.start(workers.reporting, extra_procs=[workers.reporting])
        assert sorted(play.of("leave")) == [(0, signal.SIGTERM), (1, signal.SIGTERM)]


class TestRunToCompletion:
    @pytest.mark.parametrize(
        "stop_signals, expected",
        [
            ((signal.SIGINT, signal.SIGTERM), signal.SIGTERM),
            ((signal.SIGUSR1, signal.SIGINT), signal.SIGINT),
        ],
    )
    def test_nobody_waits_for_a_signal(self, play, stop_signals, expected):
        play.start(
            workers.reporting,
            num_workers=2,
            extra_procs=[workers.extra_returning],
            run_to_completion=True,
            stop_signals=stop_signals,
        )
        assert sorted(play.of("leave")) == [(0, expected), (1, expected)]
        assert play.of("extra") == [(2,)]
        assert play.main_received is expected

    def test_a_failing_worker_does_not_interrupt_the_others(self, quick):
        report = quick.start(
            workers.fails, 0, "start", ValueError(), num_workers=2, run_to_completion=True, report=True
        )
        assert [w.code for w in report.workers] == [1, 0]
        assert quick.main_received is signal.SIGTERM

    def test_a_stop_signal_reaches_the_children_that_still_run(self, quick):
        quick.stop_after("extra", 1, signal.SIGINT)
        quick.start(
            workers.reporting,
            num_workers=0,
            extra_procs=[workers.extra_reporting],
            run_to_completion=True,
        )
        assert quick.main_received is signal.SIGINT


class TestArguments:
    def test_another_thread_is_refused(self):
        errors = []

        def call():
            try:
                start_server(workers.reporting)
            except RuntimeError as exc:
                errors.append(exc)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert len(errors) == 1 and "main thread" in str(errors[0])

    async def test_a_running_loop_is_refused(self):
        with pytest.raises(RuntimeError, match="event loop is running"):
            start_server(workers.reporting)

    def test_no_stop_signal_is_refused(self):
        with pytest.raises(AssertionError):
            start_server(workers.reporting, stop_signals=())

    @pytest.mark.skipif(sys.version_info < (3, 14), reason="fork is offered")
    def test_fork_is_refused(self):
        with pytest.raises(NotImplementedError, match="fork"):
            start_server(workers.reporting, mp_context=multiprocessing.get_context("fork"))

    @pytest.mark.parametrize(
        "kwargs, error, text",
        [
            ({"num_workers": -1}, ValueError, "num_workers"),
            ({"num_workers": 1.5}, TypeError, "num_workers"),
            ({"worker_kind": "fibre"}, ValueError, "worker_kind"),
            ({"restart": "sometimes"}, ValueError, "restart"),
            ({"drain_timeout": -1}, ValueError, "drain_timeout"),
            ({"drain_timeout": "1"}, TypeError, "drain_timeout"),
            ({"start_timeout": 0}, ValueError, "start_timeout"),
            ({"max_age": float("nan")}, ValueError, "max_age"),
            ({"max_surge": 0}, ValueError, "max_surge"),
            ({"max_requests": 1.0}, TypeError, "max_requests"),
            ({"loop_factory": "twisted"}, ValueError, "loop_factory"),
            ({"recycle_jitter": 1}, ValueError, "recycle_jitter"),
        ],
    )
    def test_a_bad_option_is_refused_at_the_call(self, kwargs, error, text):
        with pytest.raises(error, match=text):
            start_server(workers.reporting, **kwargs)


class TestNothingStays:
    """The fixture compares descriptors, children, threads, mask and handlers around every test."""

    def test_the_callers_handlers_and_mask_come_back(self, quick):
        def handler(signum, frame):
            raise AssertionError("called")

        saved = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
        try:
            quick.stop_after("enter", 1, signal.SIGINT)
            quick.start(workers.reporting)
            assert signal.getsignal(signal.SIGINT) is handler
            assert signal.getsignal(signal.SIGTERM) is handler
            now = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            assert {signal.SIGUSR2, signal.SIGTERM} <= now
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for s, h in saved.items():
                signal.signal(s, h)

    def test_a_runner_that_leaves_handlers_behind_does_no_harm(self, nothing_left):
        play = Play(START_METHODS[0], "default")
        with play.wire:
            play.stop_after("enter", 1)
            play.start(workers.reporting, runner=workers.run_and_leave_handlers)
            assert play.main_received is signal.SIGTERM
        gc.collect()
        assert signal.getsignal(signal.SIGWINCH) == signal.SIG_DFL

    def test_many_servers_in_a_row_need_no_more_of_anything(self, nothing_left):
        for _ in range(5):
            play = Play(START_METHODS[0], "default")
            with play.wire:
                play.stop_after("enter", 3)
                play.start(workers.reporting, num_workers=3)


ORPHANS = """
import asyncio, multiprocessing, os, signal, sys, time
sys.path[:0] = sys.argv[2].split(os.pathsep)
import server_workers as workers
from aiotools.server import start_server, main_context
import socket

@main_context
def main():
    yield multiprocessing.connection.Connection(os.dup(1), readable=False)

if __name__ == "__main__":
    import multiprocessing.connection
    start_server(getattr(workers, sys.argv[3]), main, num_workers=2,
        extra_procs=[getattr(workers, sys.argv[4])],
        mp_context=multiprocessing.get_context(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "worker, extra",
    [("reporting", "extra_reporting"), ("never_stops", "extra_reporting"), ("holds_the_gil", "extra_holding")],
)
@pytest.mark.parametrize("method", START_METHODS)
def test_nothing_outlives_a_killed_parent(method, worker, extra, tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    reader, writer = multiprocessing.Pipe(duplex=False)
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), *[p for p in sys.path if p]])
    with subprocess.Popen(
        [sys.executable, script, method, path, worker, extra],
        stdout=writer.fileno(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as parent:
        writer.close()
        for _ in range(3):
            assert reader.poll(PATIENCE)
            reader.recv()
        parent.kill()
        # The end of file: no process holds the other end any more.
        while True:
            assert reader.poll(PATIENCE), "an orphan holds the pipe"
            try:
                reader.recv()
            except EOFError:
                break
    reader.close()
