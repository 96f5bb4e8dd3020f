"""Death of multiprocessing's own helper processes.

Apart from the other faults: new helpers are started then, which stay with this process.
"""

import os
import signal
from multiprocessing import forkserver, resource_tracker

import pytest
import server_workers as workers
from process_helpers import START_METHODS, start_mp_helpers, wait_process_gone
from server_play import RUNNERS, Play, kill, script

from aiotools.server.nurseries import nursery_usable

pytestmark = pytest.mark.timeout(300)

LOOPS = [name for name in ("default", "uvloop") if name in RUNNERS]


@pytest.fixture(autouse=True)
def sigint():
    """A shell starts its background jobs with SIGINT ignored."""
    start_mp_helpers()
    saved = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, saved)
    start_mp_helpers()


@pytest.mark.parametrize("loop", LOOPS)
def test_the_fork_server_is_killed_its_children_live_and_a_new_one_serves(loop):
    setup = Play("forkserver", loop)

    def kill_it():
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        wait_process_gone(forkserver._forkserver._forkserver_pid)
        kill(signal.SIGHUP)

    with setup.wire:
        left = script(
            setup,
            (lambda: setup.count("enter") == 2, kill_it),
            (lambda: setup.count("leave") == 2, lambda: kill(signal.SIGTERM)),
        )
        report = setup.start(workers.managed, num_workers=2, restart="on-failure", report=True)
    assert left == []
    # The old ones drained; only their exit codes are gone with the fork server.
    assert [w.code for w in report.workers if w.generation == 1] == [255, 255]
    assert [w.code for w in report.workers if w.generation == 2] == [0, 0]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("method", [*START_METHODS, *(["nursery"] if nursery_usable() else [])])
@pytest.mark.filterwarnings("ignore:resource_tracker")
def test_a_killed_resource_tracker_is_not_missed(method, loop):
    setup = Play(method if method in START_METHODS else "spawn", loop)

    def kill_it():
        victim = resource_tracker._resource_tracker._pid
        os.kill(victim, signal.SIGKILL)
        wait_process_gone(victim)
        kill(signal.SIGHUP)

    with setup.wire:
        left = script(
            setup,
            (lambda: setup.count("enter") == 1, kill_it),
            (lambda: setup.count("leave") == 1, lambda: kill(signal.SIGTERM)),
        )
        kwargs = {"mp_context": None} if method == "nursery" else {}
        report = setup.start(workers.managed, restart="on-failure", report=True, **kwargs)
    assert left == []
    assert [w.code for w in report.workers] == [0, 0]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("method", [m for m in START_METHODS if m != "forkserver"])
def test_a_fork_server_that_is_of_no_use_is_not_missed(method, loop):
    """Somebody else in the program has started it."""
    setup = Play(method, loop)

    def kill_it():
        victim = forkserver._forkserver._forkserver_pid
        os.kill(victim, signal.SIGKILL)
        wait_process_gone(victim)
        kill(signal.SIGHUP)

    with setup.wire:
        left = script(
            setup,
            (lambda: setup.count("enter") == 1, kill_it),
            (lambda: setup.count("leave") == 1, lambda: kill(signal.SIGTERM)),
        )
        report = setup.start(workers.managed, restart="on-failure", report=True)
    assert left == []
    assert [w.code for w in report.workers] == [0, 0]
