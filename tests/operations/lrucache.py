"""lru_cache."""

import asyncio

import aiotools
from operations import no_memory, operation


@operation("lru_cache", "LruCache")
async def hits_and_misses():
    @aiotools.lru_cache(2, expire_after=60)
    async def double(x, *, extra=None):
        await aiotools.checkpoint()
        return [x, x]

    for x in (1, 1, 2, 3, 1):
        assert await double(x) == [x, x]
    await double(1, extra=object())
    double.cache_info()
    double.cache_parameters()
    double.cache_contains(1)
    double.cache_invalidate(1)
    double.cache_clear()
    double(5).close()


@operation("lru_cache", "LruCache")
async def calls_that_share_a_flight():
    @aiotools.lru_cache
    async def fails(x):
        await aiotools.checkpoint()
        raise ValueError

    for error in await asyncio.gather(*(fails(1) for _ in range(3)), return_exceptions=True):
        assert isinstance(error, ValueError)


@operation("lru_cache", "LruCache")
async def calls_that_are_cancelled():
    @aiotools.lru_cache
    async def sleeps(x):
        await aiotools.sleep(60)

    tasks = [asyncio.create_task(sleeps(1)) for _ in range(2)]
    await aiotools.checkpoint()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    task = asyncio.create_task(sleeps(2))
    await aiotools.checkpoint()
    await sleeps.cache_close()
    await asyncio.wait([task])


@operation("lru_cache", "LruCache")
async def cached_methods():
    class Thing:
        @aiotools.lru_cache
        async def method(self, x):
            return self, x

    thing = Thing()
    await thing.method(1)
    bound = thing.method
    assert await bound(1) == (thing, 1)
    bound.cache_invalidate(1)


@operation("lru_cache", "LruCache")
def wrong_arguments_of_caches():
    for args, kwargs in [
        (("1",), {}),
        ((1.5,), {}),
        ((len,), {}),
        ((1,), {"expire_after": "1"}),
        ((), {"expire_after": -1}),
    ]:
        try:
            aiotools.lru_cache(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            pass


@no_memory("lru_cache", "LruCache", kinds=("default",))
async def a_hit(fail):
    @aiotools.lru_cache
    async def double(x):
        return [x, x]

    await double(1)
    with fail:
        await double(1)


@no_memory("lru_cache", "LruCache", kinds=("default",))
async def joining_a_flight(fail):
    @aiotools.lru_cache
    async def sleeps(x):
        await aiotools.checkpoint()

    first = asyncio.create_task(sleeps(1))
    await aiotools.checkpoint()
    call = None
    try:
        with fail:
            call = sleeps(1)
            call.send(None)
    finally:
        if call is not None:
            call.close()
        await first
