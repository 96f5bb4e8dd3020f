"""The examples of barriers, queues and caches do what they say."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("barrier", ["3", "4"], "worker 0 has had enough"),
        ("thread_pipeline", ["500"], "500"),
        ("result_cache", [], "forgotten"),
    ],
)
def test_the_example_ends_well(name, args, says):
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *args],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert says in done.stdout
