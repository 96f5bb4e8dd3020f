"""Workers that start in step and work in rounds; one of them gives up half-way.

    python examples/barrier.py [workers] [rounds]

Every round begins when all workers have prepared for it. The last one to arrive runs the action, which adds up what
the round before has brought. A second part does the first step, the start, across processes.
"""

import asyncio
import multiprocessing
import random
import sys
import time

import aiotools


async def rounds(workers: int, n: int) -> None:
    results: list[int] = []

    def sum_up() -> None:
        print(f"round {barrier.generation}: {len(results)} results, sum {sum(results)}, {barrier.parties} workers")
        results.clear()

    barrier = aiotools.Barrier(workers, action=sum_up, timeout=10)

    async def work(name: int) -> None:
        for number in range(n):
            await aiotools.sleep(random.random() / 50)  # prepare
            await barrier.wait()
            results.append(number)
            if name == 0 and number == n // 2:
                print("worker 0 has had enough")
                barrier.leave()
                return

    await asyncio.gather(*(work(name) for name in range(workers)))


def process(barrier: aiotools.ProcessBarrier, name: int, began: float) -> None:
    async def main() -> None:
        await asyncio.sleep(name * 0.1)  # some need longer to prepare
        index = await barrier.wait()
        print(f"process {name}: came as number {index}, goes on at {time.time() - began:.2f} s", flush=True)

    asyncio.run(main())


def processes(n: int) -> None:
    barrier = aiotools.ProcessBarrier(n, timeout=30)
    began = time.time()
    children = [multiprocessing.Process(target=process, args=(barrier, name, began)) for name in range(n)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    barrier.close()


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]] + [5, 6][len(sys.argv) - 1 :]
    asyncio.run(rounds(*numbers))
    processes(3)
