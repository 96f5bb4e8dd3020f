"""What Windows lacks is not needed: the package imports there, and all but child processes and servers work."""

import os
import subprocess
import sys

import pytest

import aiotools

# Runs in a process of its own: takes away what Windows does not have, and then uses the package.
WITHOUT_POSIX = """
import asyncio, concurrent.futures, contextlib, logging.config, logging.handlers, multiprocessing.connection, os, random
import select, selectors, signal, socket, subprocess, sys, tempfile, threading

LACKS = {
    os: "fork forkpty register_at_fork pidfd_open memfd_create waitid P_PID WNOHANG WEXITED WNOWAIT geteuid getuid getgid "
    "killpg setsid getpgid O_NONBLOCK O_ASYNC eventfd sysconf posix_spawn sched_yield fchmod chown mkfifo getloadavg",
    signal: "SIGHUP SIGKILL SIGUSR1 SIGUSR2 SIGCHLD SIGIO SIGPIPE SIGTTIN SIGTTOU SIGALRM SIGQUIT SIGTSTP SIGRTMIN SIGRTMAX "
    "pthread_sigmask pthread_kill SIG_BLOCK SIG_UNBLOCK SIG_SETMASK sigwait setitimer siginterrupt",
    select: "poll epoll PIPE_BUF kqueue",
    socket: "AF_UNIX SO_REUSEPORT SCM_RIGHTS CMSG_LEN CMSG_SPACE send_fds recv_fds",
}
for module in "fcntl resource pwd grp termios tty pty posix _posixshmem uvloop syslog".split():
    sys.modules[module] = None
for module, names in LACKS.items():
    for name in names.split():
        if name == "AF_UNIX":
            unix = module.AF_UNIX
        with contextlib.suppress(AttributeError):
            delattr(module, name)
sys.platform, os.name = "win32", "nt"

import importlib, pkgutil
import aiotools

# The program of a fork server, which nothing starts there.
ELSEWHERE = {"aiotools.server.nursery"}
for info in pkgutil.walk_packages(aiotools.__path__, "aiotools."):
    if not info.name.endswith("__main__") and info.name not in ELSEWHERE:
        importlib.import_module(info.name)
for name in aiotools.__all__:
    getattr(aiotools, name)

# The default loop of this system cannot do without; nothing of ours asks for it.
socket.AF_UNIX = unix


async def main():
    async with aiotools.timeout(60):
        await aiotools.sleep(0)
        await aiotools.checkpoint()
        assert await aiotools.gather_safe([one(), one()]) == [1, 1]
        assert await aiotools.race([one()]) == (1, [])
        async with aiotools.TaskScope() as scope:
            task = scope.create_task(one())
        assert task.result() == 1
        async with aiotools.ShieldScope(), aiotools.TaskGroup() as group:
            group.create_task(one())
        async with aiotools.AsyncContextGroup([manager(), manager()]) as values:
            assert values == [2, 2]
        ticks = []
        timer = aiotools.create_timer(lambda interval: tick(ticks), 0.001, limit=3)
        await timer
        assert len(ticks) == 3
        barrier = aiotools.Barrier(2)
        assert sorted(await asyncio.gather(barrier.wait(), barrier.wait())) == [0, 1]
        assert await cached(3) == await cached(3) == 4
        queue = aiotools.Queue()
        thread = threading.Thread(target=fill, args=(queue.sync_q,))
        thread.start()
        assert [item async for item in queue.async_q] == [0, 1, 2]
        thread.join()
        with aiotools.LoopWatchdog(hang_timeout=60) as watchdog:
            await aiotools.sleep(0)
            watchdog.stats()
        with aiotools.trace_cancellation():
            task = asyncio.create_task(aiotools.sleep(3600))
            await aiotools.cancel_and_wait(task)
    with aiotools.VirtualClock().patch_loop():
        await aiotools.sleep(3600)
    try:
        await aiotools.afork(int)
    except NotImplementedError as exc:
        assert "Windows" in str(exc)
    else:
        raise AssertionError("afork")


async def one():
    await aiotools.sleep(0)
    return 1


async def tick(ticks):
    ticks.append(1)


@aiotools.actxmgr
async def manager():
    yield 2


@aiotools.lru_cache
async def cached(x):
    return x + 1


def fill(queue):
    for number in range(3):
        queue.put(number)
    queue.shutdown()


with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
    runner.run(main())
# Named: asyncio imports the loop of the platform that it believes to be on only when it is asked for.
with aiotools.LoopThread(loop_factory=asyncio.SelectorEventLoop) as thread:
    assert thread.run(one(), timeout=60) == 1
try:
    aiotools.start_server("package.module:worker")
except NotImplementedError as exc:
    assert "Windows" in str(exc)
else:
    raise AssertionError("start_server")
print("all is well")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there it is so")
def test_the_package_works_without_what_windows_lacks():
    path = os.path.dirname(os.path.dirname(aiotools.__file__))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, *[p for p in sys.path if p]])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all is well\n"
    assert done.stderr == ""
