"""What the README shows works as it stands there."""

import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

README = pathlib.Path(__file__).parent.parent / "README.rst"


@pytest.mark.skipif(not README.exists(), reason="runs where the README is")
def test_the_first_program_runs():
    [program] = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README.read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "['READY?', 'SURE?']" in lines
    assert lines.count("beat") >= 3
