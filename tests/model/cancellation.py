"""Tasks, scopes, groups, shields and timeouts said as plainly as possible: the oracle for what cancellation does.

The model has an event loop of its own, whose time is virtual. A request to cancel knows its *place*: the shields that
were open around the code that made it. Nothing here is patched and nothing is inferred from contexts or callers.

    loop = Loop(uncancel_clears=sys.version_info >= (3, 13))
    root = loop.create_task(coroutine)       # whose awaits are the model's own: loop.sleep(), Scope, Timeout
    loop.run()
"""

import heapq
import itertools
from asyncio import CancelledError
from collections import deque


class Loop:
    def __init__(self, *, uncancel_clears):
        self.uncancel_clears = uncancel_clears
        self.now = 0.0
        self.ready = deque()
        self.timers = []
        self.order = itertools.count()
        self.current = None

    def call_soon(self, function, *args):
        self.ready.append((function, args))

    def call_at(self, when, function, *args):
        timer = [when, next(self.order), function, args]
        heapq.heappush(self.timers, timer)
        return timer

    @staticmethod
    def drop(timer):
        timer[2:] = (lambda: None), ()

    def run(self):
        while self.ready or self.timers:
            while self.ready:
                function, args = self.ready.popleft()
                function(*args)
            if self.timers:
                self.now, _, function, args = heapq.heappop(self.timers)
                self.call_soon(function, *args)

    def create_task(self, coro):
        return Task(self, coro)

    async def sleep(self, seconds):
        future = Future(self)
        timer = self.call_at(self.now + seconds, future.finish)
        try:
            await future
        finally:
            self.drop(timer)


class Future:
    def __init__(self, loop):
        self.loop = loop
        self.done = self.cancelled = False
        self.callbacks = []

    def finish(self, *, cancelled=False):
        if self.done:
            return False
        self.done, self.cancelled = True, cancelled
        for callback in self.callbacks:
            self.loop.call_soon(callback)
        return True

    def __await__(self):
        if not self.done:
            yield self
        if self.cancelled:
            raise CancelledError


class Turn:
    """What a task waits for that only lets the loop turn."""

    def __await__(self):
        yield None


class Task:
    def __init__(self, loop, coro):
        self.loop = loop
        self.coro = coro
        self.outcome = None  # ("returned",), ("cancelled",) or ("failed", exception)
        self.requests = 0  # in effect; those that a shield keeps are elsewhere
        self.must_cancel = False  # one of them is delivered at the next suspension
        self.waiting_for = None
        self.blocks = []
        self.inherited = loop.current.place() if loop.current is not None else frozenset()
        self.callbacks = []
        loop.call_soon(self.step)

    def step(self):
        throw = self.must_cancel or (self.waiting_for is not None and self.waiting_for.cancelled)
        self.waiting_for, self.must_cancel = None, False
        self.loop.current = self
        try:
            waiting_for = self.coro.throw(CancelledError()) if throw else self.coro.send(None)
        except StopIteration:
            self.end("cancelled" if self.must_cancel else "returned")
        except CancelledError:
            self.end("cancelled")
        except BaseException as exc:
            self.end("failed", exc)
        else:
            if waiting_for is None:
                self.loop.call_soon(self.step)
                return
            self.waiting_for = waiting_for
            waiting_for.callbacks.append(self.step)
            if self.must_cancel and waiting_for.finish(cancelled=True):
                self.must_cancel = False
            self.count_kept()
        finally:
            self.loop.current = None

    def end(self, *outcome):
        self.outcome = outcome
        for callback in self.callbacks:
            self.loop.call_soon(callback, self)

    # --- requests -----------------------------------------------------------------------------------------------

    def place(self):
        """The shields around what the task runs now, those included that were around its creation."""
        return self.inherited | {block for block in self.blocks if block.shielded}

    def shield(self):
        return next((block for block in reversed(self.blocks) if block.shielded), None)

    def cancel(self, place=frozenset()):
        """A request made at that place: kept by the innermost shield, unless it comes from inside of it."""
        shield = self.shield()
        if shield is None or shield in place:
            return self.interrupt()
        if self.outcome is None:
            shield.kept.append(Request(place))
            if self.waiting_for is not None:
                self.count_kept()
        return self.outcome is None

    def count_kept(self):
        """A plain `with` can deliver what it kept once only if the task was suspended in the meantime."""
        if any(block.sync for block in self.blocks):
            for block in self.blocks:
                for request in block.kept:
                    request.silent = True

    def interrupt(self):
        if self.outcome is not None:
            return False
        self.requests += 1
        if self.waiting_for is None or not self.waiting_for.finish(cancelled=True):
            self.must_cancel = True
        return True

    def take_back(self):
        self.requests = max(0, self.requests - 1)
        if self.requests == 0 and self.must_cancel and self.loop.uncancel_clears:
            self.must_cancel = False
            for block in self.blocks:
                for request in block.kept:
                    request.silent = False

    def cancelling(self):
        """As seen from the task itself, in a shield: what the shield keeps, and what came from inside."""
        shield = self.shield()
        if shield is None:
            return self.requests
        return len(shield.kept) + max(0, self.requests - shield.at_entry)

    def uncancel(self):
        shield = self.shield()
        if shield is None:
            self.take_back()
            return self.requests
        inside = self.requests - shield.at_entry
        if inside > 0:
            self.take_back()
            return inside - 1
        if shield.kept:
            shield.kept.pop()
        return len(shield.kept)


class Request:
    """One that a shield keeps."""

    def __init__(self, place):
        self.place = place
        self.silent = False


class Block:
    """What scopes and groups share: children, a place in the task's stack, requests of their own."""

    def __init__(self, loop, *, shielded=False, sync=False):
        self.loop = loop
        self.shielded = shielded
        self.sync = sync
        self.task = None
        self.children = []
        self.joiner = None
        self.kept = []  # requests, by a shield
        self.own = 0  # requests that we made to our task
        self.aborting = self.in_body = self.over = self.cancel_called = False

    async def __aenter__(self):
        self.task = self.loop.current
        self.at_entry = self.task.requests
        self.task.blocks.append(self)
        self.place = self.task.place()
        self.in_body = True
        return self

    def create_task(self, coro):
        if self.aborting or self.over or not (self.in_body or self.children):
            coro.close()
            raise RuntimeError
        child = self.loop.create_task(coro)
        self.children.append(child)
        child.callbacks.append(self.child_ended)
        return child

    def child_ended(self, child):
        self.children.remove(child)
        if child.outcome[0] == "failed":
            self.child_failed(child.outcome[1])
        if not self.children and self.joiner is not None:
            self.joiner.finish()

    def child_failed(self, exc):
        pass

    def abort(self):
        if not self.aborting:
            self.aborting = True
            for child in list(self.children):
                child.cancel(self.place)

    def interrupt_body(self):
        if self.in_body and self.own == 0 and self.task.cancel(self.place):
            self.own += 1

    def cancel(self):
        if self.over or not (self.in_body or self.children):
            return
        self.abort()
        if not self.cancel_called:
            self.cancel_called = True
            self.interrupt_body()

    async def wait(self, exc):
        """Until no child is left; the cancellation that came meanwhile, if any."""
        came = None
        while self.children:
            self.joiner = Future(self.loop)
            try:
                await self.joiner
            except CancelledError as error:
                came = came or error
                self.abort()
        if self.task.must_cancel and self.must_flush(exc):
            try:
                await Turn()
            except CancelledError as error:
                came = came or error
        return came

    async def __aexit__(self, exc_type, exc, tb):
        self.in_body = False
        if exc is not None:
            self.abort()
        came = await self.wait(exc)
        had_own = self.own > 0
        for _ in range(self.own):
            if self.task.requests > self.at_entry:
                self.task.take_back()
        outside = self.task.requests > self.at_entry
        self.over = True
        self.task.blocks.remove(self)
        return await self.end(exc, came, had_own, outside)


class Group(Block):
    """The first failure ends it.

    asyncio's, as of 3.13, takes each request for one that came in the block, also those from before.
    """

    def __init__(self, loop, *, foreign=False):
        super().__init__(loop)
        self.foreign = foreign
        self.errors = []

    def child_failed(self, exc):
        self.errors.append(exc)
        if not self.aborting:
            self.abort()
            self.interrupt_body()

    def must_flush(self, exc):
        return self.own > 0 and not self.foreign

    async def end(self, exc, came, had_own, outside):
        if exc is not None and not isinstance(exc, CancelledError):
            self.errors.append(exc)
        if self.foreign:
            outside = self.task.requests > 0
        if self.errors:
            if outside:
                self.task.must_cancel = True
            raise ExceptionGroup("", self.errors) from None
        if had_own and not outside:
            return True
        if came is not None:
            raise came
        return False


class Scope(Block):
    """Failures of children are reported at most; it may be a shield, and have a timeout."""

    def __init__(self, loop, *, shielded=False, sync=False, timeout=None, move_on=False, report=None):
        super().__init__(loop, shielded=shielded, sync=sync)
        self.timeout = timeout
        self.move_on = move_on
        self.report = report
        self.expired = False
        self.timer = None

    async def __aenter__(self):
        await super().__aenter__()
        if self.timeout is not None:
            self.timer = self.loop.call_at(self.loop.now + self.timeout, self.fire)
        return self

    def child_failed(self, exc):
        if self.report is not None:
            self.report(exc)

    def fire(self):
        self.expired = True
        self.abort()
        if self.in_body and self.task.interrupt():
            self.own += 1

    def must_flush(self, exc):
        return self.own > 0 or (exc is None and self.task.requests > self.at_entry)

    def hand_over(self):
        """What was kept goes to the shield around, or takes effect: these are counted, and returned."""
        delivered = []
        for request in self.kept:
            shield = self.task.shield()
            if shield is None or shield in request.place:
                self.task.requests += 1
                delivered.append(request)
            else:
                shield.kept.append(request)
        return delivered

    async def end(self, exc, came, had_own, outside):
        if self.timer is not None:
            self.loop.drop(self.timer)
        in_shield = self.task.shield() is not None
        delivered = self.hand_over()
        try:
            swallow = self.choose_end(exc, came, had_own, outside, in_shield, bool(delivered))
        except CancelledError:
            await self.deliver(delivered)
            raise
        except TimeoutError:
            self.task.must_cancel = self.task.must_cancel or outside or bool(delivered)
            if self.move_on:
                return True
            raise
        if isinstance(exc, CancelledError):
            await self.deliver(delivered)
        elif delivered:
            self.task.must_cancel = True
        return swallow

    async def deliver(self, delivered):
        """The block ends with a cancellation; this is what was delivered."""
        if all(request.silent for request in delivered):
            return
        self.task.must_cancel = True
        if not self.sync:
            try:
                await Turn()
            except CancelledError:
                pass

    def choose_end(self, exc, came, had_own, outside, in_shield, delivered):
        cancelled = isinstance(exc, CancelledError)
        if self.expired:
            raise TimeoutError
        if came is not None and (outside or not had_own):
            if outside or delivered or not in_shield:
                raise came
            return exc is None or cancelled
        if exc is None and (outside or delivered):
            raise CancelledError
        return cancelled and not outside and not delivered and (had_own or in_shield)


class Timeout:
    """Ours; asyncio's also takes a request for delivered that is pending at entry."""

    def __init__(self, loop, delay, *, foreign=False):
        self.loop = loop
        self.delay = delay
        self.foreign = foreign
        self.fired = False

    async def __aenter__(self):
        self.task = self.loop.current
        self.place = self.task.place()
        self.before = self.task.requests - (self.task.must_cancel and not self.foreign)
        self.timer = self.loop.call_at(self.loop.now + self.delay, self.fire)
        return self

    def fire(self):
        self.fired = self.task.cancel(self.place)

    async def __aexit__(self, exc_type, exc, tb):
        self.loop.drop(self.timer)
        if not self.fired:
            return
        self.task.take_back()
        if self.task.requests <= self.before and isinstance(exc, CancelledError):
            raise TimeoutError from exc
