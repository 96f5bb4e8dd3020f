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
        ((), {"jitter": 1}),
        ((), {"weight": len}),
        ((), {"key": 1}),
        ((), {"max_weight": "1", "weight": len}),
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


@operation("lru_cache", "LruCache")
async def results_that_expire_and_are_refreshed():
    @aiotools.lru_cache(4, expire_after=0, stale_while_refresh=60, jitter=0.001)
    async def get(x):
        await aiotools.checkpoint()
        return [x]

    for _ in range(2):
        for x in range(6):
            assert await get(x) == [x]
    await get.cache_close(wait=True)


@operation("lru_cache", "LruCache")
async def refreshes_that_fail_or_are_cancelled():
    refreshing, fail = [], asyncio.Event()

    @aiotools.lru_cache(expire_after=0, stale_while_refresh=60, cache_errors_for=60)
    async def get(x):
        if refreshing:
            await fail.wait()
            raise ValueError(x)
        return [x]

    loop = asyncio.get_running_loop()
    for x in (1, 2):
        await get(x)
    refreshing.append(True)
    for x in (1, 2):
        assert await get(x) == [x]
    get.cache_invalidate(2)
    await aiotools.checkpoint()
    handler = loop.get_exception_handler()
    reported = []
    loop.set_exception_handler(lambda loop, context: reported.append(context["exception"]))
    fail.set()
    await get.cache_close(wait=True)
    loop.set_exception_handler(handler)
    assert [str(error) for error in reported] == ["1"]
    reported.clear()


@operation("lru_cache", "LruCache")
async def errors_that_are_kept():
    @aiotools.lru_cache(cache_errors_for=60, shared=True, weight=len, max_weight=2)
    async def get(x):
        raise ValueError(x)

    for x in (1, 1, 2, 3, 3):
        try:
            await get(x)
        except ValueError as error:
            assert error.args == (x,)
        else:
            raise AssertionError


@operation("lru_cache", "LruCache")
async def weights_keys_and_predicates():
    @aiotools.lru_cache(None, key=lambda x, *, y=0: (x, y), weight=len, max_weight=20, shared=True)
    async def text(x, *, y=0):
        return "x" * x

    for x in (1, 5, 9, 7, 30, 5):
        assert len(await text(x, y=x)) == x
    assert text.cache_invalidate_where(lambda key: key == (5, 5)) == 1
    try:
        text.cache_invalidate_where(lambda key: 1 // 0)
    except ZeroDivisionError:
        pass

    @aiotools.lru_cache(typed=True)
    async def plain(*args, **kwargs):
        return args

    await plain(1, [1].__len__, z=1)
    await plain()
    assert plain.cache_invalidate_where(lambda *args, **kwargs: kwargs) == 1
    text.cache_parameters()


@operation("lru_cache", "LruCache")
async def a_failure_after_all_have_left():
    @aiotools.lru_cache
    async def stubborn():
        try:
            await aiotools.sleep(60)
        except asyncio.CancelledError:
            raise ValueError from None

    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    reported = []
    loop.set_exception_handler(lambda loop, context: reported.append(context["message"]))
    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await stubborn.cache_close(wait=True)
    loop.set_exception_handler(handler)
    assert len(reported) == 1


@no_memory("lru_cache", "LruCache", kinds=("default",))
async def serving_what_is_stale(fail):
    @aiotools.lru_cache(expire_after=0, stale_while_refresh=60)
    async def get():
        await aiotools.checkpoint()
        return 1

    await get()
    # Making a task without memory is asyncio's affair: the refresh is under way.
    await get()
    try:
        with fail:
            assert await get() == 1
    finally:
        await get.cache_close(wait=True)


class DoneTask:
    """What an eager task without a loop of its own is: done as soon as it is made."""

    def __init__(self, coro):
        coro.close()

    def done(self):
        return True

    def exception(self):
        return None

    def result(self):
        return "result"


@no_memory("lru_cache", "LruCache", kinds=("default",))
async def keeping_a_result(fail):
    @aiotools.lru_cache(expire_after=60, jitter=1, weight=len, max_weight=10)
    async def get():
        pass

    loop = asyncio.get_running_loop()
    loop.create_task = DoneTask
    call = get()
    try:
        with fail:
            assert await call == "result"
    finally:
        del loop.create_task
        call.close()
        get.cache_clear()


@no_memory("lru_cache", "LruCache", kinds=("default",))
async def forgetting_where(fail):
    @aiotools.lru_cache(typed=True)
    async def get(x, *, y):
        return 1

    await get(1, y=2)
    with fail:
        get.cache_invalidate_where(lambda x, *, y: x)
