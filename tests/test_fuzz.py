"""Random programs (fuzz.py), each in a process of its own: none may crash, hang, or get a SystemError.

AIOTOOLS_FUZZ=300 runs for that many seconds more, with new seeds; a failure names the seed, and
`python tests/fuzz.py SEED STEPS KIND` does the same again.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import available_loop_kinds

PROGRAM = Path(__file__).with_name("fuzz.py")
SECONDS = float(os.environ.get("AIOTOOLS_FUZZ") or 0)


def run(seed, steps, kind):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(seed), str(steps), kind], capture_output=True, timeout=330, check=False
    )
    text = done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"fuzz.py {seed} {steps} {kind} ended with {done.returncode}:\n{text[-20_000:]}"


@pytest.mark.timeout(360)
@pytest.mark.parametrize("kind", available_loop_kinds())
@pytest.mark.parametrize("seed", [1, 2])
def test_random_programs_just_end(seed, kind):
    run(seed, 1000, kind)


@pytest.mark.skipif(not SECONDS, reason="AIOTOOLS_FUZZ is not set: seconds to run random programs")
@pytest.mark.timeout(0)
def test_more_random_programs_just_end():
    kinds = available_loop_kinds()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        seed = random.SystemRandom().randrange(10, 2**31)
        run(seed, 5000, kinds[seed % len(kinds)])
