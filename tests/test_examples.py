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


def test_services_start_in_levels_and_are_rolled_back_in_reverse():
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "service_levels.py"], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scenarios = {}
    said = []
    for line in done.stdout.splitlines():
        if line.startswith(" "):
            said.append(line.partition(" ms  ")[2])
        else:
            said = scenarios[line.rstrip(":")] = []
    assert list(scenarios) == ["all is well", "the port is taken", "the start is cancelled"]
    for name, lines in scenarios.items():
        place = lines.index
        assert place("database: listening") < place("cache: starting")
        assert place("cache: down") < place("database: stopping")
        assert lines[-1] == "left behind: nothing"
        if name == "the start is cancelled":
            assert "gateway: starting" not in lines
            continue
        # One level begins when all of the one before are up.
        assert max(place("database: starting"), place("queue: starting")) < place("database: listening")
        assert place("queue: listening") < place("cache: starting")
        assert place("cache: listening") < place("gateway: starting")
        assert place("gateway: down") < place("cache: stopping")
    assert "gateway: listening" in scenarios["all is well"]
    assert "gateway: listening" not in scenarios["the port is taken"]
    assert any(line.startswith("the start failed: OSError:") for line in scenarios["the port is taken"])
