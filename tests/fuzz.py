"""Random use of everything in C: `python tests/fuzz.py SEED STEPS [KIND]`, a program that should just end.

Objects are made with good and bad arguments, and their methods called in any order with any others, also from inside
callbacks, comparisons and conversions; awaitables are driven by hand and by tasks that get cancelled. What it looks for is a
crash, a hang, and a SystemError, as the interpreter raises where C code broke its rules. The same SEED does the same again.
"""

import asyncio
import contextlib
import contextvars
import copy
import faulthandler
import functools
import gc
import pickle
import random
import sys
import warnings
import weakref

import aiotools
from aiotools import _aiotools as core

POOL = 80  # objects that are kept
DEPTH = 3  # of callbacks inside callbacks

# Would block the thread, end the program, or take the loop's clock and selector away from under it.
FORBIDDEN = {
    "SyncQueue": {"get", "put", "join", "get_many", "put_many", "__next__", "__iter__"},
    "_UnixSelectorEventLoop": {"*"},
    "Loop": {"*"},
    "_Clock": {"*"},
    # Of asyncio; its send() answers NULL without an exception once it is used up.
    "FutureIter": {"*"},
}

broken = []


def is_ours(obj):
    return any(cls.__module__.startswith("aiotools") for cls in type(obj).__mro__)


def look(exc):
    """A SystemError anywhere in what came along is what we are after."""
    seen = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        if isinstance(exc, SystemError) and exc not in broken:
            broken.append(exc)
        exc = exc.__cause__ or exc.__context__


class Fuzz:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.pool = []
        self.tasks = []
        self.depth = 0
        self.variable = contextvars.ContextVar("variable", default=None)
        self.steps = 0
        self.last = ""

    # ---- values ----

    def choice(self, things):
        return things[int(self.random.random() * len(things))]

    def evil(self):
        fuzz = self

        class Evil:
            """Does something else whenever it is asked for anything."""

            def strike(self, *args, **kwargs):
                fuzz.reenter()
                if fuzz.random.random() < 0.2:
                    raise fuzz.choice([ValueError, TypeError, RuntimeError, AttributeError, StopIteration])("evil")
                return fuzz.value()

            __call__ = __iter__ = __next__ = __enter__ = __exit__ = __len__ = __await__ = close = strike

            def __lt__(self, other):
                self.strike()
                return fuzz.random.random() < 0.5

            def __eq__(self, other):
                self.strike()
                return fuzz.random.random() < 0.5

            def __hash__(self):
                self.strike()
                return int(fuzz.random.random() * 4)

            def __bool__(self):
                self.strike()
                return fuzz.random.random() < 0.5

            def __index__(self):
                self.strike()
                return fuzz.choice([-1, 0, 1, 2, 2**70])

            def __float__(self):
                self.strike()
                return fuzz.choice([0.0, 0.001, -1.0, float("inf"), float("nan")])

            def __del__(self):
                fuzz.reenter()

        return Evil()

    async def coroutine(self):
        result = self.value()
        for _ in range(int(self.random.random() * 3)):
            await self.choice([asyncio.sleep, aiotools.sleep])(0)
            self.reenter()
        if self.random.random() < 0.2:
            raise ValueError("coroutine")
        return result

    async def generator(self, *args):
        await aiotools.checkpoint()
        yield self.value()
        self.reenter()

    def future(self):
        future = asyncio.get_running_loop().create_future()
        if self.random.random() < 0.5:
            future.set_result(1)
        return future

    def task(self):
        return self.start(self.coroutine())

    def value(self):
        if self.pool and self.random.random() < 0.4:
            found = self.choice(self.pool)
            if not isinstance(found, core.SyncQueue):
                return found
        return self.choice(
            [
                lambda: None,
                lambda: self.choice([True, False, 0, 1, 2, -1, 3, 2**63, 2**200, -(2**70)]),
                lambda: self.choice([0.0, 1e-9, 0.001, -1.5, float("inf"), -float("inf"), float("nan"), 1e300]),
                lambda: self.choice(["", "x", "name", b"", b"12345678", (), (1, 2), {}, {"a": 1}, [], [1, 2]]),
                lambda: self.choice([object, int, ValueError, asyncio.CancelledError, aiotools.Queue, len, print]),
                lambda: self.choice([ValueError("v"), StopIteration(1), GeneratorExit(), asyncio.CancelledError("c")]),
                lambda: self.choice([self.coroutine, self.generator, self.reenter, self.value]),
                self.evil,
                self.coroutine,
                self.future,
                self.task,
                lambda: self.variable,
                contextvars.copy_context,
                object,
                lambda: bytearray(64),
            ]
        )()

    def arguments(self):
        args = [self.value() for _ in range(self.choice([0, 0, 1, 1, 1, 2, 3]))]
        names = ["timeout", "limit", "context", "shield", "max", "msg", "name", "item", "block", "immediate"]
        kwargs = {self.choice(names): self.value() for _ in range(self.choice([0, 0, 0, 0, 1]))}
        return args, kwargs

    # ---- objects ----

    def make(self):
        small = self.choice([None, 0, 0.001, 0.002, -1, 1000])
        with_cache = functools.partial(aiotools.lru_cache, self.choice([None, 0, 1, 2]))
        return self.choice(
            [
                lambda: aiotools.sleep(small or 0, self.value()),
                lambda: aiotools.sleep_until(small or 0),
                aiotools.checkpoint,
                lambda: aiotools.timeout(small),
                lambda: aiotools.timeout_at(small),
                lambda: aiotools.Barrier(
                    self.choice([1, 2, 3]), action=self.choice([None, self.evil()]), timeout=small
                ),
                lambda: self.choice([aiotools.Queue, aiotools.LifoQueue, aiotools.PriorityQueue])(
                    self.choice([0, 1, 2])
                ),
                lambda: aiotools.Queue(1).async_q,
                lambda: aiotools.PriorityQueue().sync_q,
                lambda: self.choice(CLASSES)(*self.arguments()[0]),
                lambda: (lambda cls: cls.__new__(cls))(self.choice(CLASSES)),
                lambda: aiotools.closing_async(self.value()),
                lambda: aiotools.resetting(self.variable, self.value()),
                lambda: aiotools.actxmgr(self.generator)(self.value()),
                lambda: aiotools.TaskScope(timeout=small, limit=self.choice([None, 1])),
                lambda: aiotools.ShieldScope(small),
                lambda: aiotools.TaskContext(),
                lambda: aiotools.TaskGroup(),
                lambda: aiotools.PersistentTaskGroup(),
                lambda: aiotools.Supervisor(),
                lambda: aiotools.create_timer(self.evil(), self.choice([0, 0.001, 1])),
                lambda: aiotools.create_timer(self.tick, self.choice([0, 0.001, 1])),
                lambda: with_cache(expire_after=self.choice([None, 0.001]))(self.cached),
                lambda: with_cache(
                    expire_after=self.choice([0, 0.001]),
                    jitter=0.001,
                    stale_while_refresh=self.choice([None, 0.001, 1]),
                    cache_errors_for=self.choice([None, 0.001]),
                    key=self.choice([None, self.evil()]),
                    weight=self.choice([len, self.evil()]),
                    max_weight=3,
                    shared=self.choice([False, True]),
                )(self.cached),
                lambda: with_cache()(self.cached)(self.value()),
                lambda: aiotools.gather_safe([self.coroutine(), self.coroutine()]),
                lambda: aiotools.as_completed_safe([self.coroutine(), self.coroutine()]),
                lambda: aiotools.race([self.coroutine(), self.coroutine()]),
                lambda: aiotools.cancel_and_wait([self.task(), self.task()]),
                lambda: aiotools.actxgroup([aiotools.actxmgr(self.generator)(1), self.value()]),
                lambda: self.choice(FUNCTIONS)(*self.arguments()[0]),
            ]
        )()

    async def cached(self, *args, **kwargs):
        return await self.coroutine()

    async def tick(self, *args):
        await self.coroutine()

    def note(self, obj, name, *args):
        self.last = f"{type(obj).__name__}.{name}({', '.join(type(arg).__name__ for arg in args)})"

    def keep(self, obj):
        if obj is None or isinstance(obj, (int, float, str, bytes, type)):
            return
        if len(self.pool) < POOL:
            self.pool.append(obj)
        else:
            self.pool[int(self.random.random() * POOL)] = obj

    # ---- actions ----

    def start(self, awaitable):
        async def drive():
            try:
                return await awaitable
            except (Exception, asyncio.CancelledError, GeneratorExit) as exc:
                look(exc)
                raise

        task = asyncio.get_running_loop().create_task(drive())
        self.tasks.append(task)
        return task

    def call(self):
        obj = self.choice(self.pool)
        forbidden = FORBIDDEN.get(type(obj).__name__, ())
        names = [name for name in dir(obj) if name not in forbidden and name not in ("_loop", "get_loop", "__class__")]
        if "*" in forbidden or not names or isinstance(obj, asyncio.AbstractEventLoop):
            return
        name = self.choice(names)
        kind = self.random.random()
        if kind < 0.08:
            # asyncio goes on using its futures; and del frame.f_trace_opcodes crashes 3.13.
            if is_ours(obj) and not isinstance(obj, asyncio.Future):
                setattr(obj, name, self.value()) if kind < 0.05 else delattr(obj, name)
        else:
            method = getattr(obj, name)
            if callable(method) and not isinstance(method, type):
                args, kwargs = self.arguments()
                self.note(obj, name, *args, *kwargs)
                self.keep(method(*args, **kwargs))
            else:
                self.keep(method)

    def drive(self):
        awaitables = [
            obj
            for obj in self.pool
            if (hasattr(type(obj), "send") or hasattr(type(obj), "__await__")) and type(obj).__name__ != "FutureIter"
        ]
        if not awaitables:
            return
        obj = self.choice(awaitables)
        kind = self.random.random()
        if kind < 0.3:
            self.start(obj)
        elif kind < 0.6:
            value = None if kind < 0.5 else self.value()
            self.note(obj, "send", value)
            self.keep(obj.send(value))
        elif kind < 0.7:
            obj.throw(
                self.choice([ValueError, ValueError("thrown"), asyncio.CancelledError(), GeneratorExit, StopIteration])
            )
        elif kind < 0.8:
            obj.close()
        elif kind < 0.9:
            next(obj)
        else:
            self.keep(obj.__await__())

    def manage(self):
        """Enters or leaves a context manager, in a task of its own or by hand."""
        managers = [obj for obj in self.pool if hasattr(type(obj), "__aenter__")]
        if not managers:
            return
        manager = self.choice(managers)

        async def block():
            async with manager as value:
                self.keep(value)
                await self.coroutine()
                if self.random.random() < 0.3:
                    await aiotools.sleep(0.001)

        if self.random.random() < 0.7:
            self.start(block())
        elif self.random.random() < 0.5:
            self.keep(manager.__aenter__())
        else:
            self.keep(manager.__aexit__(None, None, None))

    def copy(self):
        obj = self.choice(self.pool)
        if is_ours(obj):
            self.choice([copy.copy, copy.deepcopy, pickle.dumps, repr, str, hash, bool, weakref.ref, gc.get_referents])(
                obj
            )

    def cancel(self):
        if self.tasks:
            self.choice(self.tasks).cancel()

    def drop(self):
        if self.pool:
            del self.pool[int(self.random.random() * len(self.pool))]

    def tie(self):
        """A cycle through the collector."""
        obj = self.choice(self.pool)
        with contextlib.suppress(AttributeError, TypeError):
            obj.me = [obj, self.evil()]

    def collect(self):
        if self.random.random() < 0.1:
            gc.collect(self.choice([0, 1, 2]))

    def act(self):
        action = self.choice(
            [self.make] * 5 + [self.call] * 8 + [self.drive] * 6 + [self.manage] * 3
            + [self.copy, self.cancel, self.drop, self.tie, self.collect]
        )  # fmt: skip
        if not self.pool:
            action = self.make
        try:
            made = action()
            self.keep(made)
        except (Exception, asyncio.CancelledError, GeneratorExit) as exc:
            if isinstance(exc, SystemError):
                exc.add_note(f"after {self.last}")
            look(exc)

    def reenter(self, *args, **kwargs):
        if self.depth >= DEPTH or self.random.random() < 0.7:
            return
        self.depth += 1
        try:
            self.act()
        finally:
            self.depth -= 1

    async def main(self, steps):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: look(context.get("exception")))
        while self.steps < steps:
            self.steps += 1
            self.act()
            if self.steps % 3 == 0:
                try:
                    await self.choice([asyncio.sleep, aiotools.sleep])(self.choice([0, 0, 0, 0.001]))
                except BaseException as exc:  # some timeout or scope took this for its own task
                    look(exc)
                    task = asyncio.current_task()
                    while hasattr(task, "uncancel") and task.cancelling():
                        task.uncancel()
            if self.steps % 20 == 0:
                self.tasks = [task for task in self.tasks if not task.done()]
        self.steps = steps * 2
        self.depth = DEPTH


CLASSES = [
    made
    for made in vars(core).values()
    if isinstance(made, type)
    and made.__module__.startswith("aiotools")
    and made.__name__ not in ("_Watchdog", "_Clock", "_ClockDriver", "Clock", "ClockDriver")
    and "Exception" not in made.__name__
]
FUNCTIONS = [
    made
    for name, made in vars(core).items()
    if callable(made) and not isinstance(made, type) and name not in ("_loop_counts",)
]


def subclasses():
    """With a __dict__, weak references, and methods that do not do what they should."""
    for cls in list(CLASSES):
        with contextlib.suppress(TypeError):
            CLASSES.append(type(f"Sub{cls.__name__}", (cls,), {}))


def main(seed, steps, kind="default"):
    faulthandler.enable()
    faulthandler.dump_traceback_later(300, exit=True)
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda unraisable: look(unraisable.exc_value)
    sys.setrecursionlimit(400)
    fuzz = Fuzz(seed)

    def factory():
        if kind == "uvloop":
            import uvloop

            return uvloop.new_event_loop()
        loop = asyncio.new_event_loop()
        if kind == "eager":
            loop.set_task_factory(asyncio.eager_task_factory)
        loop.set_debug(kind == "debug")
        return loop

    loop = factory()
    asyncio.set_event_loop(loop)
    task = loop.create_task(fuzz.main(steps))
    while not task.done():
        try:
            loop.run_until_complete(asyncio.wait([task]))
        except BaseException as exc:
            look(exc)
    if not task.cancelled():
        look(task.exception())
    # Half of the programs close their loop, the others just let go of it.
    if seed % 2:
        for _ in range(100):
            pending = [task for task in asyncio.all_tasks(loop) if not task.done()]
            for task in pending:
                with contextlib.suppress(
                    Exception
                ):  # in debug mode call_soon() looks at the callbacks that it is given
                    task.cancel()
            loop.call_soon(loop.stop)
            loop.run_forever()
        loop.close()
    fuzz.pool.clear()
    fuzz.tasks.clear()
    asyncio.set_event_loop(None)
    del task, loop
    gc.collect()
    for exc in broken:
        sys.excepthook(type(exc), exc, exc.__traceback__)
    faulthandler.cancel_dump_traceback_later()
    return bool(broken)


subclasses()

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
