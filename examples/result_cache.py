"""A page of prices from a slow and moody service, served from a cache.

    python examples/result_cache.py

The times are those of a production cache, minutes and hours, but the clock is a virtual one: nothing is waited for. What
the program prints is also what it checks; the exit status is 0 only if all is as it says.
"""

import asyncio
import sys

import aiotools


class Service:
    """Answers after a second; now and then it is down."""

    def __init__(self) -> None:
        self.calls = 0
        self.down = False

    async def price(self, article: str) -> str:
        self.calls += 1
        await asyncio.sleep(1)
        if self.down:
            raise ConnectionError("the service is down")
        return f"{article}: {self.calls} crowns"


service = Service()


@aiotools.lru_cache(
    None,
    key=str.lower,
    # A minute is fresh enough; jitter keeps what was fetched together from expiring together.
    expire_after=60,
    jitter=6,
    # For ten more minutes the old price is better than none, and nobody waits for the new one.
    stale_while_refresh=600,
    # A service that is down is not asked again at once.
    cache_errors_for=5,
    # As many as fit into a kilobyte.
    weight=len,
    max_weight=1024,
)
async def price(article: str) -> str:
    return await service.price(article)


class Timer:
    def __enter__(self) -> "Timer":
        self.began = asyncio.get_running_loop().time()
        self.calls = service.calls
        return self

    def __exit__(self, *args: object) -> None:
        self.took = asyncio.get_running_loop().time() - self.began
        self.calls = service.calls - self.calls


def check(what: str, timer: Timer, seconds: float, calls: int) -> None:
    print(f"{what}: {timer.took:.0f} s, the service is called {timer.calls} times")
    if (round(timer.took, 3), timer.calls) != (seconds, calls):
        sys.exit(f"expected {seconds} s and {calls} calls")


async def visits() -> None:
    with Timer() as timer:
        await asyncio.gather(*(price("Apple") for _ in range(1000)))
    check("1,000 visitors at once, nothing cached", timer, 1, 1)

    with Timer() as timer:
        await asyncio.gather(*(price("apple") for _ in range(1000)))
    check("1,000 more", timer, 0, 0)

    await asyncio.sleep(70)
    with Timer() as timer:
        old = await price("apple")
        await asyncio.sleep(2)  # the refresh takes one, and no visitor waits for it
        new = await price("apple")
    check(f"a visitor after a minute gets {old!r}, the next one {new!r}", timer, 2, 1)

    service.down = True
    with Timer() as timer:
        for _ in range(100):
            try:
                await price("pear")
            except ConnectionError:
                pass
    check("100 visitors one after another while the service is down", timer, 1, 1)

    service.down = False
    await asyncio.sleep(5)
    with Timer() as timer:
        print(await price("pear"))
    check("five seconds later", timer, 1, 1)

    for number in range(200):
        await price(f"article {number}")
    print(f"weight of all: {price.cache_parameters()['weight']} of 1024")
    gone = price.cache_invalidate_where(lambda article: article.endswith("7"))
    print(f"forgotten, as their prices changed: {gone}")
    print(price.cache_info())
    await price.cache_close()


async def main() -> None:
    with aiotools.VirtualClock().patch_loop():
        await visits()


if __name__ == "__main__":
    asyncio.run(main())
