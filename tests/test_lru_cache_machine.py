"""Random histories of a cache and of a plain model of it: same results, same runs of the function, same counters."""

import asyncio
import collections
import math

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import aiotools
from conftest import make_loop

KEYS = st.integers(0, 4)
TIMES = st.sampled_from([None, 2, 5, math.inf])


class Run:
    """One run of the function, in the model: its number, who waits for it, and the entry it is for."""

    def __init__(self, number, key, background):
        self.number = number
        self.key = key
        self.background = background
        self.callers = []
        self.over = False


class Entry:
    def __init__(self):
        self.kind = "empty"
        self.value = None
        self.weight = 0
        self.fresh_until = self.gone_at = math.inf
        self.retry_at = -math.inf
        self.runs = []


class Model:
    """The cache as an ordered dict, least recently used first. Its clock is whatever the machine says."""

    def __init__(self, maxsize, max_weight, expire_after, stale, errors_for):
        self.entries = collections.OrderedDict()
        self.runs = []
        self.hits = self.misses = 0
        self.maxsize = maxsize
        self.max_weight = max_weight
        self.expire_after = math.inf if expire_after is None else expire_after
        self.stale = stale or 0
        self.errors_for = errors_for or 0
        self.now = 0
        self.reported = 0
        self.started = 0

    def expire(self):
        for key, entry in list(self.entries.items()):
            if entry.kind != "empty" and self.now >= entry.gone_at:
                if entry.runs:
                    entry.kind, entry.value, entry.weight = "empty", None, 0
                else:
                    self.drop(key)

    def drop(self, key):
        entry = self.entries.pop(key)
        for run in list(entry.runs):
            if run.background and not run.callers:
                self.end(run)

    def end(self, run):
        """It is cancelled, or done."""
        run.over = True
        self.runs.remove(run)
        entry = self.entries.get(run.key)
        if entry is not None and run in entry.runs:
            entry.runs.remove(run)
            if entry.kind == "empty" and not entry.runs:
                del self.entries[run.key]

    def is_for_its_entry(self, run):
        entry = self.entries.get(run.key)
        return entry is not None and run in entry.runs

    def launch(self, key, entry, background):
        run = Run(self.started, key, background)
        self.started += 1
        self.runs.append(run)
        entry.runs.append(run)
        self.entries.move_to_end(key)
        while self.maxsize is not None and len(self.entries) > self.maxsize:
            self.drop(next(iter(self.entries)))
        return run

    def call(self, key):
        """("value", value), ("error", error) or ("run", run)."""
        entry = self.entries.get(key)
        if entry is None or not (entry.kind != "empty" or entry.runs):
            self.misses += 1
            entry = self.entries[key] = Entry()
            return "run", self.launch(key, entry, False)
        self.hits += 1
        self.entries.move_to_end(key)
        if entry.kind == "empty":
            return "run", entry.runs[0]
        value = entry.value
        if entry.kind == "value" and self.now >= entry.fresh_until and not entry.runs and self.now >= entry.retry_at:
            self.launch(key, entry, True)
        return entry.kind, value

    def leave(self, run, caller):
        run.callers.remove(caller)
        if not run.callers and not (run.background and self.is_for_its_entry(run)):
            self.end(run)

    def keep(self, key, kind, value, weight, fresh_for, kept_for):
        entry = self.entries[key]
        if self.max_weight is not None:
            for other in list(self.entries):
                if sum(e.weight for e in self.entries.values()) - entry.weight + weight <= self.max_weight:
                    break
                if other != key and self.entries[other].weight:
                    self.drop(other)
        entry.kind, entry.value, entry.weight = kind, value, weight
        entry.fresh_until = self.now + fresh_for
        entry.gone_at = self.now + kept_for
        entry.retry_at = -math.inf

    def land(self, run, value, weight):
        if self.max_weight is None:
            weight = 0
        if self.is_for_its_entry(run):
            if self.max_weight is not None and weight > self.max_weight:
                entry = self.entries[run.key]
                entry.kind, entry.weight = "empty", 0
            else:
                self.keep(run.key, "value", value, weight, self.expire_after, self.expire_after + self.stale)
        self.end(run)

    def fail(self, run, error):
        if self.errors_for and self.is_for_its_entry(run):
            entry = self.entries[run.key]
            if entry.kind == "value":
                entry.retry_at = self.now + self.errors_for
            else:
                weight = 0 if self.max_weight is None else 1
                self.keep(run.key, "error", error, weight, self.errors_for, self.errors_for)
        if not run.callers:
            self.reported += 1
        self.end(run)


class CacheMachine(RuleBasedStateMachine):
    """Callers are tasks; each run of the function waits for a future of its own, which a rule completes."""

    @initialize(
        maxsize=st.sampled_from([None, 0, 1, 3]),
        max_weight=st.sampled_from([None, 1, 6]),
        expire_after=TIMES,
        stale=TIMES,
        errors_for=TIMES,
        shared=st.booleans(),
    )
    def start(self, maxsize, max_weight, expire_after, stale, errors_for, shared):
        self.loop = make_loop("default")
        self.loop.time = lambda: self.model.now
        self.reported = []
        self.loop.set_exception_handler(lambda loop, context: self.reported.append(context))
        if expire_after in (None, math.inf):
            stale = None
        self.model = Model(maxsize, max_weight, expire_after, stale, errors_for)
        self.gates = []
        self.weights = {}
        self.callers = []
        more = {} if max_weight is None else {"weight": self.weights.__getitem__, "max_weight": max_weight}

        @aiotools.lru_cache(
            maxsize,
            expire_after=expire_after,
            stale_while_refresh=stale,
            cache_errors_for=errors_for,
            shared=shared,
            **more,
        )
        async def get(key):
            self.gates.append(self.loop.create_future())
            return await self.gates[-1]

        self.get = get

    def turns(self):
        async def turns():
            for _ in range(6):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def ask(self, method, *args):
        """In the loop, whose clock counts there."""

        async def ask():
            return method(*args)

        return self.loop.run_until_complete(ask())

    @rule(key=KEYS)
    def call(self, key):
        task = self.loop.create_task(self.get(key))
        kind, what = self.model.call(key)
        self.turns()
        if kind == "run":
            assert not task.done()
            what.callers.append(task)
            self.callers.append((task, what))
        elif kind == "value":
            assert task.result() == what
        else:
            assert task.exception().args == what.args

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def cancel_a_caller(self, data):
        task, run = self.callers.pop(data.draw(st.integers(0, len(self.callers) - 1)))
        task.cancel()
        self.model.leave(run, task)
        self.turns()
        assert task.cancelled()

    def finish(self, data):
        run = data.draw(st.sampled_from(self.model.runs))
        waiting = [task for task, of in self.callers if of is run]
        self.callers = [(task, of) for task, of in self.callers if of is not run]
        return run, self.gates[run.number], waiting

    @precondition(lambda self: self.model.runs)
    @rule(data=st.data(), weight=st.integers(0, 7))
    def land(self, data, weight):
        run, gate, waiting = self.finish(data)
        value = (run.key, run.number)
        self.weights[value] = weight
        gate.set_result(value)
        self.model.land(run, value, weight)
        self.turns()
        assert [task.result() for task in waiting] == [value] * len(waiting)

    @precondition(lambda self: self.model.runs)
    @rule(data=st.data())
    def fail(self, data):
        run, gate, waiting = self.finish(data)
        error = ValueError(run.number)
        gate.set_exception(error)
        self.model.fail(run, error)
        self.turns()
        assert all(task.exception() is error for task in waiting)

    @rule(seconds=st.sampled_from([1, 2, 5]))
    def time_passes(self, seconds):
        self.model.now += seconds
        self.model.expire()

    @rule(key=KEYS)
    def invalidate(self, key):
        assert self.ask(self.get.cache_invalidate, key) == (key in self.model.entries)
        if key in self.model.entries:
            self.model.drop(key)
        self.turns()

    @rule(parity=st.integers(0, 1))
    def invalidate_where(self, parity):
        unwanted = [key for key in self.model.entries if key % 2 == parity]
        assert self.ask(self.get.cache_invalidate_where, lambda key: key % 2 == parity) == len(unwanted)
        for key in unwanted:
            self.model.drop(key)
        self.turns()

    @rule()
    def clear(self):
        self.ask(self.get.cache_clear)
        for key in list(self.model.entries):
            self.model.drop(key)
        self.model.hits = self.model.misses = 0
        self.turns()

    @invariant()
    def agree(self):
        if not hasattr(self, "model"):
            return
        model = self.model
        assert self.ask(self.get.cache_info) == (model.hits, model.misses, model.maxsize, len(model.entries))
        assert [key for key in range(5) if self.ask(self.get.cache_contains, key)] == sorted(model.entries)
        parameters = self.ask(self.get.cache_parameters)
        assert parameters["tasks"] == len(model.runs)
        if model.max_weight is not None:
            assert parameters["weight"] == sum(entry.weight for entry in model.entries.values()) <= model.max_weight
        assert len(self.gates) == model.started
        assert len(self.reported) == model.reported
        assert all(isinstance(context["exception"], ValueError) for context in self.reported)

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        for task, _ in self.callers:
            task.cancel()
        self.loop.run_until_complete(self.get.cache_close())
        self.turns()
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = hypothesis.settings(max_examples=60, stateful_step_count=40, deadline=None)
