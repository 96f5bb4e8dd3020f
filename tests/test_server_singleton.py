"""One of N: leases among the workers of a server."""

import asyncio
import os
import signal
import threading
import types

import pytest
import server_board_workers as workers
from process_helpers import START_METHODS, nothing_left_fixture  # noqa: F401
from server_play import Play, kill, script

import aiotools
from aiotools._aiotools import _word_swap
from aiotools.server import singleton
from aiotools.server.singleton import Leases, lease, owner_of, release_all

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(300)]


class Clock:
    def __init__(self):
        self.now = 1_000_000

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += int(seconds * 1000)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(singleton, "_now", clock)
    return clock


@pytest.fixture
def words():
    return memoryview(bytearray(4096)).cast("Q")


def worker():
    return types.SimpleNamespace(stopping=False)


@pytest.fixture
def two(words):
    return [Leases(words, owner_of(slot, 1), worker()) for slot in range(2)]


class TestWords:
    def test_a_swap_needs_the_expected_value(self, words):
        assert _word_swap(words, 3, 0, 2**64 - 1)
        assert not _word_swap(words, 3, 0, 1)
        assert words[3] == 2**64 - 1
        assert _word_swap(words, 3, 2**64 - 1, 7)
        assert words.tolist()[2:5] == [0, 7, 0]

    @pytest.mark.parametrize("index", [-1, 512])
    def test_a_word_beyond_the_end_is_refused(self, words, index):
        with pytest.raises(IndexError):
            _word_swap(words, index, 0, 1)

    @pytest.mark.threads
    def test_no_increment_of_several_threads_is_lost(self, words):
        def count():
            for _ in range(2000):
                while not _word_swap(words, 0, value := words[0], value + 1):
                    pass

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert words[0] == 8000


class TestLease:
    def test_only_one_has_it(self, two, clock):
        first, second = (leases.lease("x", 1.0) for leases in two)
        assert first.acquire()
        assert not second.acquire()
        assert first.held()
        assert not second.held()

    def test_the_holder_renews_it_for_ever(self, two, clock):
        first, second = (leases.lease("x", 1.0) for leases in two)
        for _ in range(100):
            assert first.acquire()
            clock.advance(0.5)
            assert not second.acquire()
            clock.advance(0.5)

    def test_one_that_runs_out_goes_to_the_next_who_asks(self, two, clock):
        first, second = (leases.lease("x", 1.0) for leases in two)
        assert first.acquire()
        clock.advance(1.05)
        assert not second.acquire()
        clock.advance(0.1)
        assert not first.held()
        assert second.acquire()
        assert not first.acquire()

    def test_jitter_makes_it_longer(self, two, clock):
        first, second = (leases.lease("x", 1.0, 0.5) for leases in two)
        assert first.acquire()
        clock.advance(1.5)
        assert not second.acquire()

    def test_one_that_is_given_back_goes_at_once(self, two, clock):
        first, second = (leases.lease("x", 1.0) for leases in two)
        assert first.acquire()
        second.release()
        assert first.held()
        first.release()
        assert second.acquire()

    def test_a_worker_that_was_told_to_stop_gives_it_back_and_gets_no_other(self, two, clock):
        first, second = (leases.lease("x", 1.0) for leases in two)
        assert first.acquire()
        two[0]._worker.stopping = True
        assert not first.acquire()
        assert second.acquire()
        clock.advance(10)
        assert not first.acquire()

    def test_those_of_the_dead_are_taken_away(self, two, clock, words):
        first, second = (leases.lease("x", 1.0) for leases in two)
        other = two[1].lease("y", 1.0)
        assert first.acquire()
        assert other.acquire()
        release_all(words, two[0]._owner)
        assert second.acquire()
        assert other.held()

    def test_names_are_apart(self, two, clock):
        first, second = two[0].lease("x", 1.0), two[1].lease("y", 1.0)
        assert first.acquire()
        assert second.acquire()

    def test_every_place_of_the_table_can_be_used_and_the_next_name_is_refused(self, two):
        for i in range(256):
            assert two[i % 2].lease(f"name {i}", 1.0).acquire()
        with pytest.raises(RuntimeError, match="256 names"):
            two[0].lease("one too many", 1.0)
        # The other one finds each of them again.
        assert not two[1].lease("name 0", 1.0).acquire()

    def test_a_name_is_used_once_per_worker(self, two):
        found = two[0].lease("x", 1.0)
        with pytest.raises(ValueError, match="'x' is in use"):
            two[0].lease("x", 1.0)
        found.close()
        two[0].lease("x", 1.0)

    def test_after_the_end_of_the_worker_nothing_is_held(self, two):
        first = two[0].lease("x", 1.0)
        assert first.acquire()
        two[0].close()
        assert not first.held()
        assert not first.acquire()
        first.release()
        assert two[1].lease("x", 1.0).acquire()
        with pytest.raises(RuntimeError, match="ended"):
            two[0].lease("y", 1.0)

    def test_a_slot_that_is_used_again_has_another_owner(self):
        owners = {owner_of(slot, use) for slot in range(1024) for use in (1, 2, 4094, 4095)}
        assert len(owners) == 4 * 1024
        assert 0 not in owners
        assert all(0 < owner < 2**22 for owner in owners)

    def test_outside_a_server_it_is_always_held(self):
        found = lease("x", 1.0)
        assert found.acquire()
        assert found.held()
        found.release()
        found.close()
        assert found.acquire()
        assert "held" in repr(found)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [((1, 1.0), TypeError), (("x", "1"), TypeError), (("x", 0), ValueError), (("x", float("inf")), ValueError)],
    )
    def test_bad_arguments_are_refused(self, arguments, error):
        with pytest.raises(error):
            lease(*arguments)


@pytest.fixture(params=[(m, r) for m in START_METHODS for r in ("default", "uvloop")], ids="-".join)
def play(request, nothing_left):
    play = Play(*request.param)
    with play.wire:
        yield play


class TestServer:
    @pytest.mark.parametrize("how", ["kill", "recycle", "system call"])
    def test_another_worker_takes_over(self, play, how):
        """The holder dies, is recycled, or hangs (and is not killed for it in time)."""
        left = script(
            play,
            (lambda: any(m[0] == "held" and m[1] == 0 for m in play.said), lambda: None),
            (lambda: len({m[2] for m in play.said if m[0] == "held"}) == 2, lambda: kill(signal.SIGTERM)),
        )
        play.start(workers.electing, how, num_workers=2, restart="always", drain_timeout=0.1, cancel_timeout=0.1)
        assert left == []
        assert play.main_received is signal.SIGTERM

    def test_a_classic_server_has_leases_too(self, play):
        def react(message):
            if message[0] == "held" and play.count("held") == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        play.react = react
        play.start(workers.electing, None, num_workers=2)
        # When they are told to stop, one may hear it earlier and give way.
        assert len(set(play.of("held")[:5])) == 1

    def test_threads_elect_one_as_well(self):
        play = Play(START_METHODS[0], "default")
        with play.wire:
            play.stop_after("held", 5)
            play.start(workers.electing, None, num_workers=2, worker_kind="thread")
        assert len(set(play.of("held")[:5])) == 1

    def test_a_timer_ticks_in_one_worker_and_in_another_when_that_dies(self, play):
        def react(message):
            if message[0] == "tick" and play.count("enter") >= 2:
                if not killed:
                    # On a slow machine others may have ticked before: a holder that is late loses it.
                    killed.append(message[2])
                    os.kill(message[2], signal.SIGKILL)
                elif message[2] != killed[0]:
                    os.kill(os.getpid(), signal.SIGTERM)

        killed = []
        play.react = react
        play.start(workers.singleton_timer, num_workers=2, ignore_child_interrupts=True)
        assert killed
        assert len({m[1] for m in play.of("tick")}) >= 2


async def test_outside_a_server_a_singleton_timer_ticks_as_any_other():
    done = asyncio.Event()

    async def tick(interval):
        done.set()

    timer = aiotools.create_timer(tick, 0.001, singleton="alone")
    await done.wait()
    await aiotools.cancel_and_wait(timer)


async def test_a_singleton_timer_needs_an_interval():
    with pytest.raises(ValueError, match="interval"):
        aiotools.create_timer(print, 0, singleton="x")
