"""What the leak, memory and thread tests run: each type registers its operations in a module of this package.

    from operations import no_memory, operation

    @operation("timeout", "Timeout")            # the public names that it exercises
    async def a_timeout_that_does_not_fire():
        async with aiotools.timeout(60):
            pass

    @no_memory("timeout")
    async def entering_a_timeout(fail):
        manager = aiotools.timeout(60)
        with fail:                              # allocations fail in here
            await manager.__aenter__()
        await manager.__aexit__(None, None, None)

tests/README.rst says what holds for each.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

OPERATIONS = []
NO_MEMORY = []


@dataclass(frozen=True)
class Operation:
    function: Callable
    covers: tuple
    kinds: tuple
    threads: bool

    @property
    def is_async(self):
        return inspect.iscoroutinefunction(self.function)

    @property
    def id(self):
        return f"{self.function.__module__.rpartition('.')[2]}-{self.function.__name__}"


def operation(*covers, kinds=("default", "uvloop", "eager", "debug"), threads=True):
    """Registers a function (async: run on a loop) that leaves nothing behind, however often it is run.

    threads=False: it must not run in several threads at once, each with a loop of its own.
    """

    def register(function):
        OPERATIONS.append(Operation(function, covers, tuple(kinds), threads))
        return function

    return register


def no_memory(*covers, kinds=("default", "uvloop")):
    """Registers a function that gets a context manager ``fail``; allocations fail while its block runs.

    The block must either do its work or raise MemoryError, and afterwards the function (which need not catch it)
    leaves nothing behind.
    """

    def register(function):
        NO_MEMORY.append(Operation(function, covers, tuple(kinds), False))
        return function

    return register


def load():
    """Imports all modules of this package, so that they register."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return OPERATIONS, NO_MEMORY
