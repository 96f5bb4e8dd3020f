"""Leak hunting: does what is counted grow with each run of an operation?"""

import gc
import sys
import types

ROUNDS = 4
RETRIES = 2


def core_types():
    """The heap types of the core, exported or not."""
    core = sys.modules.get("aiotools._aiotools")
    if core is None:
        return []
    found = {value for value in vars(core).values() if isinstance(value, type)}
    found |= {
        value
        for value in gc.get_objects()
        if type(value) is type
        and value.__module__ in ("aiotools._aiotools", "aiotools")
        and value.__flags__ & (1 << 9)
        and not isinstance(vars(value).get("__init__"), types.FunctionType)
    }
    return sorted(found, key=lambda value: value.__qualname__)


def counters():
    """What can be counted on this interpreter: name -> function."""
    # Bound once: looking at the counts must not change them.
    counted = {}
    if hasattr(sys, "gettotalrefcount"):
        counted["references"] = sys.gettotalrefcount
    if sys.getallocatedblocks() > 0:
        counted["blocks"] = sys.getallocatedblocks
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        # Without the GIL the count of a type lies in parts at the threads.
        for type_ in core_types():
            counted[f"references to {type_.__qualname__}"] = lambda type_=type_: sys.getrefcount(type_)
    return counted


def hunt(run, count, counted, every=20):
    """Runs run(count) several times; returns {name: growth per round} for all that grows with the number of runs.

    Caches and free lists fill slowly and look like leaks at first. What is suspected is tried again with more runs: a
    leak of one object in so many runs stays one.
    """
    suspects = measure(run, count, counted, every)
    for _ in range(RETRIES):
        if not suspects:
            break
        count *= 2
        suspects = measure(run, count, {name: counted[name] for name in suspects}, every)
    return suspects


def measure(run, count, counted, every):
    growth = {name: [0] * ROUNDS for name in counted}
    functions = list(counted.items())
    before = [0] * len(functions)
    after = [0] * len(functions)
    # Two rounds to warm up: caches, free lists, specialised code.
    run(count)
    run(count)
    for number in range(ROUNDS):
        gc.collect()
        gc.collect()
        for place, (_, function) in enumerate(functions):
            before[place] = function()
        run(count)
        gc.collect()
        gc.collect()
        for place, (_, function) in enumerate(functions):
            after[place] = function()
        for place, (name, _) in enumerate(functions):
            growth[name][number] = after[place] - before[place]
    # A leak shows in every round, noise does not.
    threshold = max(3, count // every)
    return {name: deltas for name, deltas in growth.items() if min(deltas) >= threshold}
