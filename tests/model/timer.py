"""What a timer does, said as plainly as possible: the oracle for create_timer()'s policy.

The model has no loop. The test tells it what happens (time passes, a tick ends) and compares the ticks that it starts.
"""

import math


class TimerModel:
    def __init__(
        self, now, interval, *, first=0.0, limit=None, overlap="allow", missed="late", grace=None, backoff=None
    ):
        self.now = now
        self.interval = interval
        self.limit = limit
        self.overlap = overlap
        self.missed = missed
        if grace is None:
            grace = interval / 2 if missed == "skip" else math.inf
        self.grace = grace
        self.backoff = backoff
        self.base = now + first
        self.k = 0
        self.last_k = -1
        self.paused = False
        self.over = False
        self.blocked = False
        self.queued = None
        self.triggers = 0
        self.fails = 0
        self.running = []  # ids of ticks
        self.stubborn = set()
        self.started = []  # (time, due) of each tick, by id
        self.skipped = 0
        self.run()

    # --- what happens -------------------------------------------------------------------------------------------

    def jump(self, seconds):
        self.now += seconds
        self.run()

    def end(self, tick, failed=False):
        if tick not in self.running:
            return
        self.running.remove(tick)
        if failed:
            self.fails += 1
            if self.backoff is not None and not self.over:
                delay = min(self.interval * 2**self.fails, self.backoff)
                k = self.last_k + math.ceil(delay / self.interval - 1e-9)
                if k > self.k:
                    self.skipped += k - self.k
                    self.k = k
        else:
            self.fails = 0
        self.after_end()
        self.run()

    def be_stubborn(self, tick):
        self.stubborn.add(tick)

    def pause(self):
        self.paused = True
        if self.queued is not None:
            self.queued = None
            self.skipped += 1

    def resume(self):
        if self.paused:
            self.paused = False
            while self.due(self.k) < self.now:
                self.k += 1
            self.run()

    def trigger(self):
        self.triggers += 1
        self.run()

    def reschedule(self, interval):
        self.interval = interval
        self.base = self.now + interval
        self.k = 0
        self.last_k = -1
        self.fails = 0
        self.run()

    # --- what the timer does ------------------------------------------------------------------------------------

    def due(self, k):
        return self.base + k * self.interval

    @property
    def next_due(self):
        return None if self.paused or self.over else self.due(self.k)

    def run(self):
        """All that is to be done now."""
        while (
            not self.over and not self.blocked and (self.triggers or (not self.paused and self.due(self.k) <= self.now))
        ):
            if self.triggers:
                if not self.make_room():
                    return
                self.triggers -= 1
                self.tick(self.now)
            else:
                self.tick_due()

    def tick_due(self):
        due = []
        k = self.k
        while self.due(k) <= self.now:
            due.append(k)
            k += 1
        in_time = [k for k in due if self.now - self.due(k) <= self.grace]
        if not in_time:
            self.skipped += len(due)
            self.k = due[-1] + 1
            return
        if not self.make_room():
            return
        self.skipped += len(due) - len(in_time)
        if self.missed == "catch-up":
            self.k = in_time[0] + 1
        else:
            self.skipped += len(in_time) - 1
            self.k = due[-1] + 1
        self.last_k = self.k - 1
        self.tick(self.due(in_time[0]))

    def make_room(self):
        if self.overlap != "cancel" or not self.running:
            return True
        self.running = [tick for tick in self.running if tick in self.stubborn]
        self.blocked = bool(self.running)
        return not self.blocked

    def tick(self, due):
        if self.overlap == "queue" and self.running:
            if self.queued is None:
                self.queued = due
            else:
                self.skipped += 1
            return
        most = {"skip": 1}.get(self.overlap, self.overlap)
        if isinstance(most, int) and len(self.running) >= most:
            self.skipped += 1
            return
        self.start(due)

    def start(self, due):
        self.running.append(len(self.started))
        self.started.append((self.now, due))
        if self.limit is not None and len(self.started) >= self.limit:
            self.over = True
            self.queued = None
            self.triggers = 0

    def after_end(self):
        if self.running or self.over:
            return
        self.blocked = False
        if self.queued is not None:
            due, self.queued = self.queued, None
            self.start(due)
