"""lru_cache: a hit, with and without expiry, and a miss."""

import functools
import itertools

import aiotools
from benchmarks import common
from benchmarks.common import case


def caches(**options):
    """What makes a cached function, by name."""
    found = {"ours": functools.partial(aiotools.lru_cache, **options)}
    ttl = options.get("expire_after")
    if (async_lru := common.rival("async_lru", common.RIVALS)) is not None:
        found["async-lru"] = functools.partial(async_lru.alru_cache, ttl=ttl)
    if ttl is None and (asyncstdlib := common.rival("asyncstdlib", common.RIVALS)) is not None:
        found["asyncstdlib"] = asyncstdlib.lru_cache
    if (pypi := common.rival("aiotools", common.RIVALS)) is not None:
        found["PyPI aiotools"] = functools.partial(pypi.lru_cache, **options)
    return found


async def plain(x):
    return x


def fresh(make):
    """One cache per loop: each has a side of its own, but rounds come again."""
    made = []

    async def run(n):
        if not made:
            made.append(make())
        cached = made[0]
        await cached(1)
        yield
        for _ in range(n):
            await cached(1)
        yield

    return run


def sides_for(sides, **options):
    def build(decorate):
        def make():
            @decorate()
            async def cached(x):
                return x

            return cached

        return make

    for name, decorate in caches(**options).items():
        sides.add(name)(fresh(build(decorate)))


RIVALS = {"async-lru": 5.5, "asyncstdlib": 4, "PyPI aiotools": 5.5}


@case(
    "lru_hit", must={**RIVALS, "bare coroutine": 1 / 1.2}, aim={"async-lru": 6.5, "asyncstdlib": 5, "bare coroutine": 1}
)
def lru_hit(sides, loop_kind):
    """A call whose result is there."""
    sides_for(sides)

    @sides.add("bare coroutine")
    async def bare(n):
        for _ in range(n):
            await plain(1)


@case("lru_hit_expiry")
def lru_hit_expiry(sides, loop_kind):
    """The same, with a result that expires."""
    sides_for(sides, expire_after=3600)


@case("lru_miss")
def lru_miss(sides, loop_kind):
    """A call whose result is not there, in a full cache."""
    for name, decorate in caches().items():
        made = []

        async def run(n, decorate=decorate, made=made):
            if not made:
                made.append((decorate()(plain), itertools.count()))
            cached, numbers = made[0]
            for _ in range(n):
                await cached(next(numbers))

        sides.add(name)(run)
