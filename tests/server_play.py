"""A server in the test's own process, whose main context reacts to what the children say."""

import asyncio
import contextlib
import multiprocessing
import os
import signal

import server_workers as workers
from process_helpers import START_METHODS, Wire

from aiotools.server import ServerPlugin, main_context, start_server

RUNNERS = {"default": asyncio.run, "debug": workers.run_debug, "eager": workers.run_eager}
with contextlib.suppress(ImportError):
    import uvloop

    RUNNERS["uvloop"] = uvloop.run
if not hasattr(asyncio, "eager_task_factory"):
    del RUNNERS["eager"]

# Not the full product: a child is expensive under spawn.
SETUPS = [(m, r) for m in START_METHODS for r in RUNNERS if r in ("default", "uvloop")]
SETUPS += [(START_METHODS[0], r) for r in RUNNERS if r in ("debug", "eager")]

multiprocessing.set_forkserver_preload(["server_workers"])


class Play:
    """Runs a server in this process, whose main context reacts to what the children say."""

    def __init__(self, method, runner):
        self.ctx = multiprocessing.get_context(method)
        self.method = method
        self.runner = RUNNERS[runner]
        self.wire = Wire(self.ctx)
        self.said = []
        self.main_received = None
        self.main_error = None
        self.react = lambda message: None
        self.children_at_exit = None
        self.events = []
        self.actions = []
        self.sup = None
        self.on_gone = lambda index: None
        self.plugin = Recorder(self)

    def on_event(self, event, action):
        """Do *action* at each *event* of the server."""
        self.actions.append((event, action))

    def sup_command(self, verb):
        self.sup.command(verb)

    def end_drain(self):
        """The time for work of all children that drain is over: at this point of what they do, and not at one of the clock."""
        object.__setattr__(self.sup.options, "drain_timeout", 0.0)
        for child in self.sup.children:
            child.arm_budgets()

    def on_message(self):
        while self.wire.reader.poll(0):
            message = self.wire.reader.recv()
            self.said.append(message)
            self.react(message)

    def count(self, what):
        return sum(1 for m in self.said if m[0] == what)

    def of(self, what):
        return [m[1:] for m in self.said if m[0] == what]

    def stop_after(self, what, n, signum=signal.SIGTERM):
        """Send *signum* to the server when *what* was said by *n* children."""

        def react(message):
            if message[0] == what and self.count(what) == n:
                os.kill(os.getpid(), signum)

        self.react = react

    def main(self, *given, wire=True):
        play = self

        @main_context
        def context():
            loop = asyncio.get_running_loop()
            loop.add_reader(play.wire.reader.fileno(), play.on_message)
            try:
                play.main_received = yield (*([play.wire.writer] if wire else []), *given)
            except BaseException as exc:
                play.main_error = exc
                raise
            finally:
                play.children_at_exit = {p for p in multiprocessing.active_children() if p.is_alive()}
                loop.remove_reader(play.wire.reader.fileno())
                play.on_message()

        return context

    def start(self, worker, *given, main=None, **kwargs):
        kwargs.setdefault("mp_context", self.ctx)
        kwargs.setdefault("runner", self.runner)
        try:
            return start_server(worker, main or self.main(*given), **kwargs)
        finally:
            self.said += self.wire.drain()


class Recorder(ServerPlugin):
    """Records the supervisor's events, and gives the test its supervisor."""

    def __init__(self, play):
        self.play = play

    def open(self, sup):
        self.play.sup = sup
        self.play.events.append("open")

    def child_event(self, child, event):
        self.play.events.append(f"{event} {child.index}")
        if event == "gone":
            self.play.on_gone(child.index)

    def server_event(self, event, **facts):
        self.play.events.append(event)
        for wanted, action in self.play.actions:
            if wanted == event:
                action()

    async def finish(self):
        self.play.events.append("finish")

    def close(self, sup):
        self.play.events.append("close")


class UntilShown(ServerPlugin):
    """Has children of index 0 hang one after the other until the log says of one what it should, then stops the server.

    A starved process may be judged before it comes to what it is to hang in, or be too slow to say where it is.

    :param caplog: pytest's.
    :param shown: whether what was logged from the start of a child to its end is what is to be logged.
    :param release: called once; the children that start afterwards hang no more.
    """

    #: For the server: who is killed in its first seconds has failed, and more than one may have to be.
    PATIENT = {"restart": "on-failure", "boot_failure_limit": 50, "backoff": 0.01}

    def __init__(self, caplog, shown, release):
        self.caplog = caplog
        self.shown = shown
        self.release = release
        self.seen = 0
        self.record = None  # of the child of which all was said

    def child_event(self, child, event):
        if child.index != 0:
            return
        if event == "gone" and self.record is None:
            text = self.caplog.text
            if self.shown(text[self.seen :]):
                self.record = child.record
                self.release()
            self.seen = len(text)
        elif event == "ready" and self.record is not None:
            kill(signal.SIGTERM)


def kill(signum):
    os.kill(os.getpid(), signum)


def script(play, *steps):
    """React to messages: each step is (predicate on the messages so far, action), in this order."""
    left = list(steps)

    def react(message):
        while left and left[0][0]():
            left.pop(0)[1]()

    play.react = react
    return left
