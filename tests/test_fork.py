"""afork() and the child processes that it returns."""

import asyncio
import faulthandler
import functools
import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from process_helpers import (
    PATIENCE,
    START_METHODS,
    Wire,
    children_of,
    mp_context_fixture,  # noqa: F401
    nothing_left_fixture,  # noqa: F401
    wait_process_gone,
)

from aiotools import fork
from aiotools.fork import AbstractChildProcess, PidfdChildProcess, PosixChildProcess, afork

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(300)]


@pytest.fixture(params=["pidfd", "polling"])
def child_class(request, monkeypatch):
    if request.param == "pidfd":
        return PidfdChildProcess
    monkeypatch.setattr(fork, "_has_pidfd", False)
    monkeypatch.setattr(PosixChildProcess, "poll_interval", 0.002)
    return PosixChildProcess


# What runs in the children.


def return_value(value):
    return value


def raise_exception(exc):
    raise exc


def exit_by(fn, *args):
    faulthandler.disable()  # pytest's
    fn(*args)
    return 99


def sleep_forever():
    # In short naps: a signal that comes between the last look for signals and the system call ends no nap.
    while True:
        time.sleep(0.02)


def report_dispositions(wire):
    wire.send(
        (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            signal.set_wakeup_fd(-1),
            asyncio._get_running_loop(),
            threading.active_count(),
        )
    )
    return 0


def interruptible(wire):
    try:
        wire.send("up")
        sleep_forever()
    except KeyboardInterrupt:
        return 7


def print_unflushed(path, text):
    sys.stdout = open(path, "a", buffering=1000)  # noqa: SIM115
    sys.stderr = open(path, "a", buffering=1000)  # noqa: SIM115
    sys.stdout.write(text)
    sys.stderr.write(text)
    return 0


def with_closed_output():
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = open(writer, "w", buffering=1000)  # noqa: SIM115
    sys.stdout.write("xxx")
    return 5


def start_grandchild(wire):
    proc = multiprocessing.get_context("spawn").Process(target=wire.send, args=("grandchild",))
    proc.start()
    proc.join()
    wire.send(proc.exitcode)
    return 0


def leave_grandchild(wire):
    proc = multiprocessing.get_context("spawn").Process(target=hold, args=(wire,), daemon=True)
    proc.start()
    wire.send(proc.pid)
    return 0


def hold(wire):
    time.sleep(3600)


def put_in_queue(queue):
    queue.put("x" * 200_000)
    return 0


class DiesOnArrival:
    """Unpickled in the child, before any function of ours runs."""

    def __call__(self):
        return 0

    def __reduce__(self):
        return os._exit, (42,)


class HangsOnArrival:
    def __init__(self, wire):
        self.wire = wire

    def __call__(self):
        return 0

    def __reduce__(self):
        return hang_on_arrival, (self.wire,)


def hang_on_arrival(wire):
    wire.send(os.getpid())
    time.sleep(3600)


class TestExitCodes:
    @pytest.mark.parametrize(
        "value, code", [(0, 0), (1, 1), (255, 255), (256, 0), (259, 3), (-1, 255), (2**70 + 4, 4), (True, 1)]
    )
    @pytest.mark.loop_kinds("default", "uvloop", reason="the code is made in the child")
    async def test_an_int_is_the_exit_code_modulo_256(self, value, code):
        ctx = multiprocessing.get_context("forkserver")
        child = await afork(functools.partial(return_value, value), mp_context=ctx)
        assert await child.wait() == code

    @pytest.mark.parametrize("value", [None, "3", 3.0, object])
    @pytest.mark.loop_kinds("default", reason="the code is made in the child")
    async def test_a_result_that_is_no_int_gives_1(self, value, mp_context):
        child = await afork(functools.partial(return_value, value), mp_context=mp_context)
        assert await child.wait() == 1

    @pytest.mark.parametrize(
        "exc, code, printed",
        [
            (ValueError("the message"), 1, True),
            (KeyboardInterrupt(), 254, False),
            (SystemExit(), 241, False),
            (SystemExit(3), 241, False),
            (SystemExit("text"), 241, False),
            (GeneratorExit("the message"), 1, True),
            (asyncio.CancelledError("the message"), 1, True),
        ],
    )
    @pytest.mark.loop_kinds("default", reason="the code is made in the child")
    async def test_an_exception_has_its_code(self, exc, code, printed, mp_context, capfd):
        child = await afork(functools.partial(raise_exception, exc), mp_context=mp_context)
        assert await child.wait() == code
        if mp_context.get_start_method() != "forkserver":  # whose stderr is that of its own start
            err = capfd.readouterr().err
            assert ("the message" in err and "Traceback" in err) == printed

    async def test_death_by_signal_is_negative(self, mp_context, child_class):
        child = await afork(sleep_forever, mp_context=mp_context)
        assert type(child) is child_class
        child.send_signal(signal.SIGTERM)
        assert await child.wait() == -signal.SIGTERM

    @pytest.mark.loop_kinds("default", reason="the code is made by the kernel")
    async def test_a_core_dump_does_not_hide_the_signal(self, mp_context):
        child = await afork(functools.partial(exit_by, faulthandler._sigabrt), mp_context=mp_context)
        assert await child.wait() == -signal.SIGABRT

    async def test_os_exit_in_the_child_is_the_code(self, mp_context, child_class):
        child = await afork(functools.partial(exit_by, os._exit, 77), mp_context=mp_context)
        assert await child.wait() == 77


# How tasks are started, and debug mode, make no difference to a child; one class runs on all kinds of loop.
two_loops = pytest.mark.loop_kinds("default", "uvloop", reason="the child does not know how tasks start")


@two_loops
class TestStart:
    async def test_the_child_has_its_dispositions_and_no_loop(self, mp_context):
        with Wire(mp_context) as wire:
            child = await afork(functools.partial(report_dispositions, wire.writer), mp_context=mp_context)
            assert await child.wait() == 0
            assert wire.recv() == (True, True, -1, None, 1)

    async def test_sigint_right_after_the_return_is_a_keyboard_interrupt(self, mp_context, child_class):
        child = await afork(sleep_forever, mp_context=mp_context)
        child.send_signal(signal.SIGINT)
        assert await child.wait() == 254

    async def test_handlers_of_the_parent_do_not_reach_into_the_child(self, mp_context):
        called = []
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, called.append, 1)
        loop.add_signal_handler(signal.SIGTERM, called.append, 1)
        try:
            with Wire(mp_context) as wire:
                child = await afork(functools.partial(interruptible, wire.writer), mp_context=mp_context)
                assert wire.recv() == "up"
                child.send_signal(signal.SIGINT)
                assert await child.wait() == 7
                other = await afork(sleep_forever, mp_context=mp_context)
                other.send_signal(signal.SIGTERM)
                assert await other.wait() == -signal.SIGTERM
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            loop.remove_signal_handler(signal.SIGTERM)
        await asyncio.sleep(0)
        assert called == []

    @pytest.mark.loop_kinds("default", reason="pickling happens before the loop is asked for anything")
    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    async def test_an_unpicklable_function_raises_in_the_parent(self, method):
        with pytest.raises(Exception, match=r"pickle|local object"):
            await afork(lambda: 0, mp_context=multiprocessing.get_context(method))

    @pytest.mark.skipif("fork" not in START_METHODS, reason="fork is not offered")
    async def test_under_fork_a_closure_will_do(self):
        child = await afork(lambda: 12, mp_context=multiprocessing.get_context("fork"))
        assert await child.wait() == 12

    @pytest.mark.loop_kinds("default", "uvloop", reason="the start is in the operating system")
    async def test_the_default_context_is_that_of_multiprocessing(self):
        child = await afork(functools.partial(return_value, 3))
        assert await child.wait() == 3

    async def test_many_start_at_once(self, mp_context, child_class):
        async def one(i):
            child = await afork(functools.partial(return_value, i), mp_context=mp_context)
            return await child.wait()

        async with asyncio.TaskGroup() as tg:
            tasks = [tg.create_task(one(i)) for i in range(6)]
        assert [t.result() for t in tasks] == list(range(6))

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    async def test_a_child_that_dies_before_it_is_up_raises_with_its_code(self, method, child_class):
        ctx = multiprocessing.get_context(method)
        with pytest.raises(ChildProcessError, match="exit code 42") as info:
            await afork(DiesOnArrival(), mp_context=ctx)
        assert info.value.exitcode == 42
        assert info.value.pid > 0

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    async def test_cancelled_while_starting_it_kills_the_child_first(self, method, child_class):
        ctx = multiprocessing.get_context(method)
        loop = asyncio.get_running_loop()
        with Wire(ctx) as wire:
            task = asyncio.create_task(afork(HangsOnArrival(wire.writer), mp_context=ctx))
            arrived = asyncio.Event()
            loop.add_reader(wire.reader.fileno(), arrived.set)
            await arrived.wait()
            loop.remove_reader(wire.reader.fileno())
            pid = wire.recv()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            wait_process_gone(pid, 0)
            assert wire.recv_eof() == []


@two_loops
class TestWait:
    async def test_every_waiter_gets_the_code(self, mp_context, child_class):
        with Wire(mp_context) as wire:
            child = await afork(functools.partial(interruptible, wire.writer), mp_context=mp_context)
            waiters = [asyncio.create_task(child.wait()) for _ in range(5)]
            assert wire.recv() == "up"
            child.send_signal(signal.SIGINT)
            assert await asyncio.gather(*waiters) == [7] * 5
            assert await child.wait() == 7

    async def test_a_child_that_is_long_gone_has_its_code(self, mp_context, child_class):
        child = await afork(functools.partial(return_value, 9), mp_context=mp_context)
        wait_process_gone(child.pid)
        assert await child.wait() == 9
        assert await child.wait() == 9

    async def test_a_cancelled_wait_leaves_child_and_other_waiters_alone(self, mp_context, child_class):
        child = await afork(sleep_forever, mp_context=mp_context)
        first, second = (asyncio.create_task(child.wait()) for _ in range(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        child.send_signal(signal.SIGTERM)
        assert await second == -signal.SIGTERM

    @pytest.mark.parametrize("method", [m for m in START_METHODS if m != "forkserver"])
    async def test_a_status_that_something_else_collected_is_255_with_a_warning(self, method, child_class, caplog):
        child = await afork(sleep_forever, mp_context=multiprocessing.get_context(method))
        child.send_signal(signal.SIGTERM)
        os.waitpid(child.pid, 0)
        assert await child.wait() == 255
        assert await child.wait() == 255
        assert "255" in caplog.text

    @pytest.mark.parametrize("method", [m for m in START_METHODS if m != "forkserver"])
    async def test_a_status_that_multiprocessing_collected_is_not_lost(self, method, child_class):
        child = await afork(functools.partial(return_value, 3), mp_context=multiprocessing.get_context(method))
        wait_process_gone(child.pid)
        multiprocessing.active_children()  # polls, and so reaps
        assert await child.wait() == 3

    async def test_without_a_wait_the_child_is_collected_all_the_same(self):
        child = await afork(functools.partial(return_value, 3), mp_context=multiprocessing.get_context("spawn"))
        wait_process_gone(child.pid)
        while child._pidfd >= 0:
            await asyncio.sleep(0)
        assert child.pid not in children_of()

    def test_a_child_can_be_awaited_from_a_later_loop(self, new_loop, child_class):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            child = runner.run(afork(sleep_forever, mp_context=multiprocessing.get_context("spawn")))

        async def end():
            child.send_signal(signal.SIGTERM)
            return await child.wait()

        with asyncio.Runner(loop_factory=new_loop) as runner:
            assert runner.run(end()) == -signal.SIGTERM

    def test_two_running_loops_cannot_share_a_child(self, new_loop):
        refused = []

        async def main():
            child = await afork(sleep_forever, mp_context=multiprocessing.get_context("spawn"))

            async def elsewhere():
                with pytest.raises(RuntimeError, match="another running event loop"):
                    await child.wait()
                refused.append(True)

            thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
            thread.start()
            thread.join()
            child.send_signal(signal.SIGTERM)
            await child.wait()

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())
        assert refused


class TestSendSignal:
    async def test_to_a_finished_child_it_only_warns(self, mp_context, child_class, caplog):
        child = await afork(functools.partial(return_value, 0), mp_context=mp_context)
        await child.wait()
        child.send_signal(signal.SIGTERM)
        assert "already terminated" in caplog.text

    async def test_sigkill_to_a_finished_child_does_not_warn(self, mp_context, child_class, caplog):
        child = await afork(functools.partial(return_value, 0), mp_context=mp_context)
        await child.wait()
        child.send_signal(signal.SIGKILL)
        assert caplog.records == []

    async def test_sigkill_to_a_live_child_warns_that_it_was_forced(self, mp_context, child_class, caplog):
        child = await afork(sleep_forever, mp_context=mp_context)
        child.send_signal(signal.SIGKILL)
        assert await child.wait() == -signal.SIGKILL
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert "killed" in caplog.text

    async def test_a_bad_signal_number_is_refused(self, child_class):
        child = await afork(sleep_forever, mp_context=multiprocessing.get_context("spawn"))
        with pytest.raises((OSError, ValueError)):
            child.send_signal(9999)
        child.send_signal(signal.SIGTERM)
        await child.wait()


class TestChildsEnd:
    @pytest.mark.loop_kinds("default", reason="this happens in the child")
    async def test_output_is_flushed(self, mp_context, tmp_path):
        path = tmp_path / "out"
        fn = functools.partial(print_unflushed, str(path), "unflushed")
        child = await afork(fn, mp_context=mp_context)
        assert await child.wait() == 0
        assert path.read_text() == "unflushed" * 2

    @pytest.mark.loop_kinds("default", reason="this happens in the child")
    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    async def test_output_that_nobody_takes_does_not_change_the_code(self, method):
        child = await afork(with_closed_output, mp_context=multiprocessing.get_context(method))
        assert await child.wait() == 5

    @pytest.mark.loop_kinds("default", reason="this happens in the child")
    async def test_a_child_may_have_multiprocessing_children(self, mp_context):
        with Wire(mp_context) as wire:
            child = await afork(functools.partial(start_grandchild, wire.writer), mp_context=mp_context)
            assert await child.wait() == 0
            assert wire.recv() == "grandchild"
            assert wire.recv() == 0

    @pytest.mark.loop_kinds("default", reason="this happens in the child")
    async def test_daemonic_grandchildren_end_with_the_child(self, mp_context):
        with Wire(mp_context) as wire:
            child = await afork(functools.partial(leave_grandchild, wire.writer), mp_context=mp_context)
            assert await child.wait() == 0
            wait_process_gone(wire.recv())

    @pytest.mark.loop_kinds("default", reason="this happens in the child")
    async def test_what_was_put_in_a_multiprocessing_queue_arrives(self, mp_context):
        queue = mp_context.Queue()
        child = await afork(functools.partial(put_in_queue, queue), mp_context=mp_context)
        assert len(queue.get(timeout=PATIENCE)) == 200_000
        assert await child.wait() == 0
        queue.close()
        queue.join_thread()
        del queue
        gc.collect()


PARENT = """
import asyncio, functools, multiprocessing, os, signal, sys, time
from aiotools.fork import afork

def child(fd, ignore):
    if ignore:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
    time.sleep(3600)

async def main():
    ctx = multiprocessing.get_context(sys.argv[1])
    children = [
        await afork(functools.partial(child, 1, sys.argv[2] == "ignore"), mp_context=ctx) for _ in range(3)
    ]
    print(*[c.pid for c in children], flush=True)
    await asyncio.sleep(3600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("method", START_METHODS)
@pytest.mark.parametrize(
    "signum, ignore",
    [
        (signal.SIGKILL, "ignore"),
        (signal.SIGTERM, "ignore"),
        # An orderly exit: multiprocessing's own clean-up sends SIGTERM and waits.
        (signal.SIGINT, "die"),
    ],
)
def test_children_end_with_their_parent_in_whatever_way_it_dies(method, signum, ignore, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, script, method, ignore], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    ) as parent:
        pids = [int(p) for p in parent.stdout.readline().split()]
        assert len(pids) == 3
        parent.send_signal(signum)
        for pid in pids:
            wait_process_gone(pid)
        parent.stdout.read()  # the end of file: nobody holds the pipe any more
        assert parent.wait(PATIENCE) != 0


def test_the_abstract_class_cannot_be_made():
    with pytest.raises(TypeError):
        AbstractChildProcess()
