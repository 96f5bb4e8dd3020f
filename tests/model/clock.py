"""A clock that a test moves by hand: the loop's time(), call_at() and call_later() are replaced on the instance."""

import asyncio
import contextlib
import heapq
import itertools


class Handle:
    def __init__(self, when, callback, args, context):
        self._when, self.callback, self.args, self.context = when, callback, args, context
        self.is_cancelled = False

    def when(self):
        return self._when

    def cancel(self):
        self.is_cancelled = True

    def cancelled(self):
        return self.is_cancelled


class HandClock:
    """Time stands still until the test moves it; what is due runs in order of its time, ties in order of setting."""

    def __init__(self, now=1000.0):
        self.now = now
        self.handles = []
        self.order = itertools.count()

    @contextlib.contextmanager
    def patch(self):
        self.loop = loop = asyncio.get_running_loop()
        loop.time = lambda: self.now
        loop.call_at = self.call_at
        loop.call_later = lambda delay, callback, *args, context=None: self.call_at(
            self.now + delay, callback, *args, context=context
        )
        try:
            yield self
        finally:
            del loop.time, loop.call_at, loop.call_later

    def call_at(self, when, callback, *args, context=None):
        handle = Handle(when, callback, args, context)
        heapq.heappush(self.handles, (when, next(self.order), handle))
        return handle

    async def settle(self, turns=8):
        """Lets the loop turn until nothing more can happen at this time."""
        quiet = 0
        while quiet < turns:
            quiet += 1
            due = []
            while self.handles and self.handles[0][0] <= self.now:
                due.append(heapq.heappop(self.handles)[2])
            for handle in due:
                if not handle.is_cancelled:
                    quiet = 0
                    self.loop.call_soon(handle.callback, *handle.args, context=handle.context)
            await asyncio.sleep(0)

    async def jump(self, seconds, turns=8):
        """As if the loop had been blocked for so long."""
        self.now += seconds
        await self.settle(turns)

    async def advance(self, seconds):
        """Stops at each deadline on the way."""
        end = self.now + seconds
        await self.settle()
        while self.handles and self.handles[0][0] <= end:
            self.now = max(self.now, self.handles[0][0])
            await self.settle()
        self.now = end
        await self.settle()
