"""A crawler: a fan-out that feeds itself, never more than LIMIT fetches at once, over real connections.

A small web of pages on loopback links to itself. Some of its pages fail twice before they answer, some never answer. The
crawler reads pages as long as there are links that it has not seen: ``map_safe`` takes them from a queue, fetches LIMIT at
once, and gives each page as soon as it is there. A page that fails is tried again, one that says nothing is given up.

Then it crawls again, and is cancelled in the middle: what it was fetching ends at once, what it was storing does not, because
that is shielded. Nothing is half stored, and no connection stays open.

The same on the default loop and, if it is installed, on uvloop; the exit status is 0 only if all counts are right.

    python examples/crawl.py [--pages 1000]
"""

import argparse
import asyncio
import functools
import random
import sys
import time

import aiotools

LIMIT = 50
PATIENCE = 3.0  # seconds for each attempt at a page
RETRY = aiotools.Retry(attempts=4, delay=0.01, on=(ConnectionError, asyncio.IncompleteReadError))


# --- the web -------------------------------------------------------------------------------------------------------


class Web:
    """Pages 0 to count-1. A request is a line with the number of a page, the answer a line with those it links to."""

    def __init__(self, count):
        self.count = count
        self.moody = set(range(7, count, 40))  # fail twice
        self.silent = set(range(11, count, 200))  # never answer
        self.requests = dict.fromkeys(range(count), 0)
        self.open = 0  # connections

    def links(self, page):
        # A tree, so that every page can be reached, and some links across.
        tree = [child for child in (2 * page + 1, 2 * page + 2) if child < self.count]
        return tree + random.Random(page).sample(range(self.count), 4)

    async def serve(self, reader, writer):
        self.open += 1
        try:
            line = await reader.readline()
            if not line:
                return  # cancelled before it had asked
            page = int(line)
            self.requests[page] += 1
            if page in self.silent:
                await reader.read()  # until the other side has had enough
            elif page not in self.moody or self.requests[page] % 3 == 0:
                await aiotools.sleep(0.05)
                writer.write(" ".join(map(str, self.links(page))).encode() + b"\n")
                await writer.drain()
        finally:
            self.open -= 1
            writer.close()


# --- the crawler ---------------------------------------------------------------------------------------------------


class Crawler:
    def __init__(self, port):
        self.port = port
        self.bodies, self.index = {}, set()  # what is stored: always both or neither
        self.failed = {}
        self.running = self.most = 0  # fetches at once

    async def get(self, page):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"%d\n" % page)
            return await reader.readuntil(b"\n")
        finally:
            writer.close()

    async def fetch(self, page):
        """(page, links)"""
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return page, await self.fetch_and_store(page)
        finally:
            self.running -= 1

    async def fetch_and_store(self, page):
        # The scope ends when the page is there, or all attempts have failed.
        async with aiotools.TaskScope(exception_handler=None) as scope:
            task = scope.create_task(functools.partial(self.get, page), timeout=PATIENCE, retry=RETRY)
        if exc := task.exception():
            self.failed[page] = exc
            return []
        body = task.result()
        # A cancellation waits until both are there.
        async with aiotools.ShieldScope():
            self.bodies[page] = body
            await aiotools.sleep(0.001)  # a slow disk
            self.index.add(page)
        return [int(number) for number in body.split()]

    async def crawl(self):
        links = aiotools.Queue()
        seen, under_way = {0}, 1
        await links.async_q.put(0)
        async with aiotools.aclosing(
            aiotools.map_safe(self.fetch, links.async_q, limit=LIMIT, ordered=False),
        ) as pages:
            async for _, found in pages:
                new = set(found) - seen
                seen |= new
                await links.async_q.put_many(new)
                under_way += len(new) - 1
                if not under_way:
                    links.shutdown()  # nothing else says that it is over


# --- both of them --------------------------------------------------------------------------------------------------


async def crawl_twice(count):
    web = Web(count)
    server = await asyncio.start_server(web.serve, "127.0.0.1", 0, backlog=2 * LIMIT)
    port = server.sockets[0].getsockname()[1]

    crawler = Crawler(port)
    began = time.monotonic()
    await crawler.crawl()
    took = time.monotonic() - began

    half, enough = Crawler(port), asyncio.Event()

    async def watch():
        while len(half.bodies) < count // 2:
            await aiotools.sleep(0.001)
        enough.set()

    async with aiotools.TaskScope() as scope:
        task = scope.create_task(half.crawl())
        scope.create_task(watch())
        await enough.wait()
        unfinished = set(half.bodies) - half.index
        await aiotools.cancel_and_wait(task)

    async with aiotools.timeout(10):
        while web.open:  # the service sees the ends of its connections a little later
            await aiotools.sleep(0.001)
    server.close()
    await server.wait_closed()

    rows = {
        "pages stored": f"{len(crawler.index)} of {count}",
        "tried again": f"{len(web.moody)}",
        "given up": f"{len(crawler.failed)} of {len(web.silent)}",
        "fetches at once, at most": f"{crawler.most}",
        "time": f"{took:.2f} s",
        "cancelled after": f"{len(half.bodies)} pages",
        "  half stored then, and after": f"{len(unfinished)}, {len(set(half.bodies) ^ half.index)}",
    }
    checks = {
        "pages are missing": crawler.index == set(range(count)) - web.silent,
        "other pages than the silent ones were given up": set(crawler.failed) == web.silent
        and all(isinstance(exc, TimeoutError) for exc in crawler.failed.values()),
        "a page was fetched more often than needed": all(
            times <= 2 * (3 if page in web.moody else 1) for page, times in web.requests.items()
        ),
        "there were more fetches at once than allowed": max(crawler.most, half.most) <= LIMIT,
        "the second crawl was not cancelled in the middle": count // 2 <= len(half.bodies) < count - len(web.silent),
        "a page is half stored": set(half.bodies) == half.index,
    }
    return rows, [text for text, holds in checks.items() if not holds]


def loops():
    yield "default loop", None
    try:
        import uvloop
    except ImportError:
        print("uvloop is not installed: default loop only")
    else:
        yield "uvloop", uvloop.new_event_loop


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pages", type=int, default=1000)
    options = parser.parse_args()
    if options.pages < 500:
        parser.error("at least 500 pages, so that there is something to see")
    print(f"{options.pages} pages, {LIMIT} fetches at once")
    columns, failed = {}, False
    for name, factory in loops():
        with asyncio.Runner(loop_factory=factory) as runner:
            columns[name], complaints = runner.run(crawl_twice(options.pages))
        for complaint in complaints:
            print(f"{name}: WRONG: {complaint}")
        failed |= bool(complaints)
    print(f"{'':32}" + "".join(f"{name:>16}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"{row:32}" + "".join(f"{column[row]:>16}" for column in columns.values()))
    print("The counts are " + ("WRONG." if failed else "right."))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
