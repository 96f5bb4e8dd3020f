"""Dependent services that start in levels, and are stopped again in reverse when one of them fails.

Four services listen on loopback. The database and the queue depend on nothing, the cache on the
database, the gateway on the cache and the queue:

    level 0   database   queue
    level 1   cache
    level 2   gateway

Each connects to those it depends on while it starts, so it cannot start before them. What does not
depend on one another starts at the same time. The program starts them three times: all is well; the
gateway's port is taken; the start is cancelled half-way, when the cache has begun. It shows what happened when, and checks that
no connection and no listener is left each time; the exit status is 0 only if that is so.

    python examples/service_levels.py
"""

import asyncio
import contextlib
import sys
import time

from aiotools import AsyncContextGroup, actxmgr


class World:
    """What is open, and a line for all that happens."""

    def __init__(self):
        self.began = time.monotonic()
        self.listening = set()
        self.connections = 0
        self.ports = {}
        self.said = {}

    def say(self, text):
        print(f"    {(time.monotonic() - self.began) * 1000:6.1f} ms  {text}")
        self.event(text).set()

    def event(self, text):
        """An event that is set once that line was said."""
        return self.said.setdefault(text, asyncio.Event())


async def answer(reader, writer):
    """The protocol of all services: a line comes back."""
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    writer.close()


@actxmgr
async def client(world, name):
    """A connection to a service that has said hello."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ports[name])
    world.connections += 1
    try:
        writer.write(b"hello\n")
        assert await reader.readline() == b"hello\n"
        yield reader, writer
    finally:
        world.connections -= 1
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@actxmgr
async def service(world, name, needs=(), *, port=0, seconds=0.05):
    """A service that listens, once it is connected to all that it needs."""
    world.say(f"{name}: starting")
    try:
        async with AsyncContextGroup([client(world, need) for need in needs], strict=True):
            await asyncio.sleep(seconds)  # reading its files, say
            server = await asyncio.start_server(answer, "127.0.0.1", port)
            world.ports[name] = server.sockets[0].getsockname()[1]
            world.listening.add(name)
            world.say(f"{name}: listening")
            try:
                yield world.ports[name]
            finally:
                world.say(f"{name}: stopping")
                server.close()
                world.listening.discard(name)
                await server.wait_closed()
    finally:
        world.say(f"{name}: down")


def services(world, gateway_port=0):
    database = service(world, "database")
    queue = service(world, "queue", seconds=0.03)
    cache = service(world, "cache", ["database"])
    gateway = service(world, "gateway", ["cache", "queue"], port=gateway_port)
    group = AsyncContextGroup({"database": database, "queue": queue}, strict=True, rollback_timeout=5)
    group.add(cache, key="cache", after="database")
    group.add(gateway, key="gateway", after=["cache", "queue"])
    return group


async def all_is_well(world):
    async with services(world) as ports:
        world.say(f"all are up: {', '.join(f'{name} on {port}' for name, port in ports.items())}")
        async with client(world, "gateway"):
            world.say("a client of the gateway got its answer")
    return True


async def the_port_is_taken(world):
    taken = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    try:
        async with services(world, gateway_port=port):
            return False
    except ExceptionGroup as group:
        [error] = group.exceptions
        world.say(f"the start failed: {type(error).__name__}: {error.strerror}")
        return isinstance(error, OSError)
    finally:
        taken.close()
        await taken.wait_closed()


async def the_start_is_cancelled(world):
    async def start():
        async with services(world):
            raise AssertionError("it was cancelled before all were up")

    task = asyncio.create_task(start())
    # The database listens, the queue starts or listens, and the gateway has not begun.
    await world.event("cache: starting").wait()
    task.cancel()
    await asyncio.wait([task])
    world.say("the start was cancelled")
    return task.cancelled()


async def main():
    ok = True
    for scenario in (all_is_well, the_port_is_taken, the_start_is_cancelled):
        print(f"{scenario.__name__.replace('_', ' ')}:")
        world = World()
        ok = await scenario(world) and ok
        left = [*sorted(world.listening), *["a connection"] * world.connections]
        world.say(f"left behind: {', '.join(left) or 'nothing'}")
        ok = ok and not left
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
