"""Random programs of scopes, groups, shields, timeouts and children, and what runs one and writes down what happened.

A program is a tree of tuples (``statements`` generates them; ``Program`` numbers its children and makes all its times
different, so that two things happen at the same time only if one is the cause of the other). ``Program.run`` executes
the body of a task on any *kernel*: the model, our types on asyncio, or asyncio's own types.
"""

import contextlib
from asyncio import CancelledError

from hypothesis import strategies as st

# A time is CLASS * (1..MAX_CLASS) + 2**n with an n of its own: sums of different times differ.
MAX_TIMES = 40
TIME_CLASS = 2.0**MAX_TIMES
MAX_CLASS = 9

#: Kinds of statements, as often as they should come.
PLAIN = ["sleep"] * 10 + ["fail", "return"]
REQUESTS = ["cancel self", "cancel parent", "cancel parent", "cancel child", "cancel child", "uncancel"]
OURS = ["abort", "cancel"]
COMMON = ["group"] * 3 + ["timeout"] * 2 + ["swallow", "catch", "catch", "finally"]
SHIELDS = ["scope"] * 3 + ["shield"] * 3 + ["move on"]


def statements(simple, kinds):
    """A strategy for the body of the root: a list of statements, nested.

    Decoded from bytes, as one draw per statement takes longer than running it; the bytes shrink well.
    """
    return st.binary(min_size=30, max_size=240).map(
        lambda data: decode(iter(data), ["sleep", *simple], kinds, 5, False)
    )


def decode(data, simple, kinds, depth, in_block):
    choices = simple
    if depth > 0:
        choices = simple + kinds * 2 + (["spawn"] * (len(simple) + len(kinds)) if in_block else [])
    body = []
    for _ in range(next(data, 0) % (4 if in_block else 5) + 1):
        kind = choices[next(data, 0) % len(choices)]
        part = PARTS[kind]
        numbers = part(next(data, 0)) if part is not None else ()
        inside = kind != "spawn" and (in_block or kind in BLOCKS)
        bodies = [decode(data, simple, kinds, depth - 1, inside) for _ in range(BODIES.get(kind, 0))]
        body.append((kind, *numbers, *bodies))
    return body


BLOCKS = ("group", "scope", "shield", "move on")
BODIES = {
    "spawn": 1,
    "swallow": 1,
    "catch": 1,
    "finally": 2,
    "group": 1,
    "timeout": 1,
    "scope": 1,
    "shield": 1,
    "move on": 1,
}


def _time(number):
    return number % MAX_CLASS + 1


def _flag_and_time(number):
    return number % 2 == 1, _time(number // 2)


def _flag_and_maybe(number):
    return number % 2 == 1, _time(number // 8) if number // 2 % 4 == 3 else None


#: What a statement of each kind is made of besides bodies, from one byte.
PARTS = {
    "sleep": lambda number: (_time(number // 2), number % 2 == 1),
    "fail": None,
    "return": None,
    "cancel self": None,
    "cancel parent": None,
    "cancel child": lambda number: (number % 3,),
    "uncancel": None,
    "abort": lambda number: (number % 3,),
    "cancel": lambda number: (number % 3,),
    "spawn": lambda number: (number % 3, _time(number // 4)),
    "swallow": lambda number: (number % 2 == 1,),
    "catch": None,
    "finally": None,
    "group": lambda number: (number % 2 == 1,),
    "timeout": _flag_and_time,
    "scope": _flag_and_maybe,
    "shield": _flag_and_maybe,
    "move on": _flag_and_time,
}


class Program:
    """A tree with its requests from outside: (time, number of the child, 0 for the root)."""

    def __init__(self, tree, outside):
        self.times = self.children = 0
        self.body = [self.number(statement) for statement in tree]
        self.outside = [(self.time(when), target) for when, target in outside]

    def __repr__(self):
        return f"Program({self.body!r}, {self.outside!r})"

    def time(self, size):
        if size is None:
            return None
        self.times += 1
        return TIME_CLASS * size + 2.0 ** (self.times - 1)

    def number(self, statement):
        kind, *rest = statement
        if kind == "sleep":
            return (kind, self.time(rest[0]), rest[1])
        if kind == "spawn":
            self.children += 1
            number = self.children
            return (kind, number, rest[0], self.time(rest[1]), [self.number(inner) for inner in rest[2]])
        if kind in ("timeout", "scope", "shield", "move on"):
            rest[1] = self.time(rest[1])
        return (kind, *([self.number(inner) for inner in part] if isinstance(part, list) else part for part in rest))

    @property
    def fits(self):
        return self.times <= MAX_TIMES


class Boom(ValueError):
    pass


def describe(exc):
    if isinstance(exc, BaseExceptionGroup):
        return ("group", sorted(map(repr, map(describe, exc.exceptions))))
    if exc is None:
        return None
    return "CancelledError" if isinstance(exc, CancelledError) else type(exc).__name__


class Run:
    """One execution of a program: ``log[number]`` is what that task did, with the times."""

    def __init__(self, kernel, program):
        self.kernel = kernel
        self.program = program
        self.tasks = {}
        self.log = {}

    def start(self):
        self.tasks[0] = self.kernel.create_task(self.task(0, None, 0, self.program.body))
        for when, target in self.program.outside:
            self.kernel.call_at(when, self.cancel_from_outside, target)

    def cancel_from_outside(self, target):
        if target in self.tasks:
            self.kernel.cancel(self.tasks[target])

    def outcomes(self):
        return {number: self.kernel.outcome(task) for number, task in self.tasks.items()}

    async def task(self, number, parent, first, body):
        # Nothing is written down before the first sleep is over: a child that is cancelled before it has started does
        # the same then as one that starts at once.
        await self.kernel.sleep(first + TIME_CLASS / 2, False)
        await Frame(self, number, parent).run(body)


class Frame:
    def __init__(self, run, number, parent):
        self.owner = run
        self.kernel = run.kernel
        self.number = number
        self.parent = parent
        self.lines = run.log.setdefault(number, [])
        self.blocks = []  # (kind, what takes children or can be cancelled, or None)
        self.spawned = []

    def write(self, *line):
        self.lines.append((self.kernel.now(), *line, self.kernel.cancelling()))

    async def run(self, body):
        for kind, *rest in body:
            if kind == "return":
                return True
            if await getattr(self, kind.replace(" ", "_").replace("finally", "finally_"))(*rest):
                return True
        return False

    async def sleep(self, seconds, foreign):
        await self.kernel.sleep(seconds, foreign)
        self.write("slept")

    async def fail(self):
        raise Boom

    async def cancel_self(self):
        self.kernel.cancel(self.kernel.current_task())
        self.write("cancelled self")

    async def cancel_parent(self):
        if self.parent is not None:
            self.kernel.cancel(self.parent)
            self.write("cancelled parent")

    async def cancel_child(self, index):
        if self.spawned:
            self.kernel.cancel(self.spawned[-1 - index % len(self.spawned)])
            self.write("cancelled child")

    async def uncancel(self):
        self.write("uncancelled", self.kernel.uncancel())

    async def abort(self, up):
        targets = [block for kind, block in self.blocks if kind in ("scope", "async shield", "move on")]
        if targets:
            targets[-1 - up % len(targets)].abort()
            self.write("aborted")

    async def cancel(self, up):
        targets = [block for kind, block in self.blocks if kind in ("scope", "async shield", "move on", "group")]
        if targets:
            targets[-1 - up % len(targets)].cancel()
            self.write("cancelled")

    async def spawn(self, number, up, first, body):
        targets, behind_shield = [], False
        for kind, block in reversed(self.blocks):
            # A failing child of asyncio's groups cancels the host from the context that it was started in: a shield in
            # between does not hold that off.
            if block is not None and not (kind == "foreign group" and behind_shield):
                targets.append(block)
            behind_shield = behind_shield or kind.endswith("shield")
        if not targets:
            return
        child = self.owner.task(number, self.kernel.current_task(), first, body)
        try:
            task = targets[up % len(targets)].create_task(child)
        except RuntimeError:
            self.write("refused")
            return
        self.owner.tasks[number] = task
        self.spawned.append(task)

    async def swallow(self, uncancel, body):
        try:
            return await self.run(body)
        except CancelledError:
            self.write("swallowed")
            if uncancel:
                self.write("uncancelled", self.kernel.uncancel())

    async def catch(self, body):
        try:
            return await self.run(body)
        except Exception as exc:
            self.write("caught", describe(exc))

    async def finally_(self, body, clean_up):
        try:
            return await self.run(body)
        finally:
            await self.run(clean_up)

    async def within(self, kind, manager, body):
        returned = False
        try:
            async with manager as block:
                self.blocks.append((kind, block))
                try:
                    returned = await self.run(body)
                finally:
                    self.blocks.pop()
        except (Exception, CancelledError) as exc:
            self.write("left", kind, describe(exc))
            raise
        self.write("left", kind, None)
        return returned

    def group(self, foreign, body):
        return self.within("foreign group" if foreign else "group", self.kernel.group(foreign), body)

    async def timeout(self, foreign, delay, body):
        manager = self.kernel.timeout(foreign, delay)
        return await self.within("timeout", NoTarget(manager), body)

    def scope(self, shielded, timeout, body):
        return self.within("async shield" if shielded else "scope", self.kernel.scope(shielded, timeout), body)

    def shield(self, is_sync, timeout, body):
        if is_sync:
            return self.within("sync shield", NoTarget(self.kernel.sync_shield(timeout)), body)
        return self.within("async shield", self.kernel.scope(True, timeout), body)

    def move_on(self, shielded, timeout, body):
        return self.within(
            "async shield" if shielded else "move on", self.kernel.move_on_after(timeout, shielded), body
        )


class NoTarget(contextlib.AbstractAsyncContextManager):
    """A block without children: its manager's value is nobody's business."""

    def __init__(self, manager):
        self.manager = manager

    async def __aenter__(self):
        if hasattr(self.manager, "__enter__"):
            self.manager.__enter__()
        else:
            await self.manager.__aenter__()

    async def __aexit__(self, *exc_info):
        if hasattr(self.manager, "__enter__"):
            return self.manager.__exit__(*exc_info)
        return await self.manager.__aexit__(*exc_info)
