"""What runs in the children of the servers whose logs are tested."""

import logging
import os
import signal
import threading

from aiotools.server import server_context


@server_context
async def logging_worker(loop, index, args):
    """(wire, lines, how it ends): logs numbered lines from two threads, tells, and ends."""
    wire, lines, how = args

    def burst(name):
        log = logging.getLogger(name)
        for i in range(lines):
            log.info("line %d of %d %s", i, index, "x" * (i % 7 * 2000))

    threads = [threading.Thread(target=burst, args=(f"test.{n}",)) for n in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wire.send(("logged", index, os.getpid()))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    yield
    logging.getLogger("test.end").warning("the last words of %d", index)


@server_context
async def facts(loop, index, args):
    log = logging.getLogger("test.facts")
    log.debug("not to be seen")
    log.info("with %s", {"a": object()}, extra={"user": "me", "data": [1, {"k": "v"}], "odd": object()})
    try:
        raise ValueError("the reason")
    except ValueError:
        log.exception("it failed")
    log.warning("where", stack_info=True)
    log.info("lone surrogate \udc80 and two\nlines")
    args[0].send(("logged", index, os.getpid()))
    yield


def extra(loop, index, args):
    logging.getLogger("test.extra").warning("from the extra")
    args[0].send(("logged", index, os.getpid()))


@server_context
async def forking(loop, index, args):
    """Its child, forked past everything, logs at the same time."""
    pid = os.fork()
    log = logging.getLogger("test.forked" if pid == 0 else "test.forker")
    for i in range(200):
        log.info("line %d %s", i, "y" * 9000)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    args[0].send(("logged", index, os.getpid()))
    yield


@server_context
async def on_demand(loop, index, args):
    """Logs a line whenever the test says so."""
    wire, go = args
    log = logging.getLogger("test.demand")
    log.info("first from %d", index)
    wire.send(("logged", index))

    def more():
        log.info(go.recv())
        wire.send(("logged", index))

    loop.add_reader(go.fileno(), more)
    yield
    loop.remove_reader(go.fileno())


@server_context
async def quiet(loop, index, args):
    logging.getLogger("test.interpreter").warning("from the interpreter")
    yield
