"""What tests of processes share: start methods, what must not be left behind, ways to wait without sleeping."""

import contextlib
import gc
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import warnings
from multiprocessing import forkserver, resource_tracker

import pytest

# Seconds until a wait for something that must happen is given up; a busy machine is slow, and never too slow.
PATIENCE = 120.0

START_METHODS = ["spawn", "forkserver"]
if sys.version_info < (3, 14):
    # The server refuses fork from 3.14 on.
    START_METHODS.insert(0, "fork")


# Test modules import the fixtures by their functions' names.


@pytest.fixture(params=START_METHODS, name="mp_context")
def mp_context_fixture(request):
    return multiprocessing.get_context(request.param)


def open_descriptors():
    """Descriptor -> what it is, without that of the listing itself."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children_of(pid="self"):
    """Process ids of the direct children, zombies included."""
    found = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as f:
            found.update(map(int, f.read().split()))
    return found


HANDLED = [
    getattr(signal, name)
    for name in [
        "SIGINT",
        "SIGTERM",
        "SIGHUP",
        "SIGUSR1",
        "SIGUSR2",
        "SIGTTIN",
        "SIGTTOU",
        "SIGCHLD",
        "SIGIO",
        "SIGPIPE",
    ]
]


def wakeup_fd():
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return fd


class Footprint:
    """What this process owns now."""

    def __init__(self):
        gc.collect()
        self.descriptors = open_descriptors()
        self.children = children_of()
        self.active = set(multiprocessing.active_children())
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.handlers = {s: signal.getsignal(s) for s in HANDLED}
        self.wakeup = wakeup_fd()
        self.threads = set(threading.enumerate())

    def differences(self, later):
        found = []
        for fd, what in later.descriptors.items():
            # An epoll or a timer of the listing's own time has its number reused; the kind is what counts.
            if fd not in self.descriptors:
                found.append(f"descriptor {fd}: {what}")
        for name in ("children", "active", "mask", "handlers", "wakeup", "threads"):
            before, after = getattr(self, name), getattr(later, name)
            if before != after:
                found.append(f"{name}: {before!r} -> {after!r}")
        return found


def start_mp_helpers():
    """What lives as long as this process is started before the count: multiprocessing's helpers, libuv's pipe.

    An earlier test may have killed a helper: that it is collected and started anew here is no news.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resource_tracker.ensure_running()
        forkserver.ensure_running()
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.new_event_loop().close()


@pytest.fixture(name="nothing_left")
def nothing_left_fixture():
    """Fails the test if the process owns more than before it, or other signal settings."""
    start_mp_helpers()
    # A shell starts its background jobs with SIGINT ignored.
    sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = Footprint()
    try:
        yield
    finally:
        later = Footprint()
        signal.signal(signal.SIGINT, sigint)
    # Exactly those that the test started are gone at once: nothing here waits.
    if left := before.differences(later):
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(name="patient_evidence")
def patient_evidence_fixture(monkeypatch):
    """A worker that is to be killed gets all the time it needs to show its stacks."""
    monkeypatch.setattr("aiotools.server.child.DUMP_GRACE", PATIENCE)
    monkeypatch.setattr("aiotools.server.child.DUMP_PAUSE", 0.2)


class Wire:
    """A pipe over which children tell the test what happens, and which tells the test that they are gone.

    Picklable for multiprocessing: under spawn the child gets the descriptor of its own.
    """

    def __init__(self, ctx):
        self.reader, self.writer = ctx.Pipe(duplex=False)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.reader.close()
        self.writer.close()

    def recv(self, timeout=PATIENCE):
        assert self.reader.poll(timeout), "no message came"
        return self.reader.recv()

    def drain(self):
        """All messages so far."""
        found = []
        while self.reader.poll(0):
            found.append(self.reader.recv())
        return found

    def recv_eof(self, timeout=PATIENCE):
        """All messages until every holder of the other end is gone."""
        self.writer.close()
        found = []
        deadline = time.monotonic() + timeout
        while True:
            assert self.reader.poll(max(0, deadline - time.monotonic())), "somebody still holds the pipe"
            try:
                found.append(self.reader.recv())
            except EOFError:
                return found


def wait_process_gone(pid, timeout=PATIENCE):
    """Wait until no process *pid* exists (a zombie counts as gone when another one must reap it)."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(timeout * 1000), f"process {pid} still runs"
    finally:
        os.close(fd)
