"""The examples do what they say; `make demo` runs those that need several seconds."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="runs where the examples are")

DEMO = {"crawl", "line_service", "workers_demo"}


@pytest.mark.parametrize("name", sorted({path.stem for path in EXAMPLES.glob("*.py")} - DEMO))
def test_the_example_ends_well(name):
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
