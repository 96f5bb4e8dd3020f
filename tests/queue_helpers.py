"""What the tests of queues share."""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time

from aiotools import LifoQueue, PriorityQueue, Queue

CLASSES = [Queue, LifoQueue, PriorityQueue]


async def turns(n=3):
    for _ in range(n):
        await asyncio.sleep(0)


async def waiting(queue, getters=0, putters=0, joiners=0):
    """Until so many wait."""
    wanted = (getters, putters, joiners)
    for _ in range(100000):
        now = queue.statistics()
        if (now.waiting_getters, now.waiting_putters, now.waiting_joiners) == wanted:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{now}, not {wanted}")


def until_blocked(queue, getters=0, putters=0, joiners=0):
    """The same, from a thread."""
    deadline = time.monotonic() + 30
    while True:
        now = queue.statistics()
        if (now.waiting_getters, now.waiting_putters, now.waiting_joiners) == (getters, putters, joiners):
            return
        assert time.monotonic() < deadline, now
        os.sched_yield() if hasattr(os, "sched_yield") else time.sleep(0)


class Thread(threading.Thread):
    """A thread whose result, or exception, is that of join()."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self.work = function, args
        self.start()

    def run(self):
        function, args = self.work
        try:
            self.outcome = function(*args), None
        except BaseException as exc:
            self.outcome = None, exc

    def result(self, timeout=30):
        self.join(timeout)
        assert not self.is_alive(), "the thread is blocked"
        value, exc = self.outcome
        if exc is not None:
            raise exc
        return value


def lanes(base):
    class Lanes(base):
        """Two lanes: urgent items (negative ones) first; refuses what it is told to."""

        def _init(self, maxsize):
            self.bound = maxsize
            self.urgent, self.normal = [], []
            self.fail = None

        def _check(self, hook):
            if self.fail == hook:
                raise LookupError(hook)

        def _qsize(self):
            self._check("_qsize")
            return len(self.urgent) + len(self.normal)

        def _put(self, item):
            self._check("_put")
            (self.urgent if item < 0 else self.normal).append(item)

        def _get(self):
            self._check("_get")
            return (self.urgent or self.normal).pop(0)

        def _peek(self):
            self._check("_peek")
            return (self.urgent or self.normal)[0]

    return Lanes


def run_script(script, *options, timeout=60):
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=timeout
    )
