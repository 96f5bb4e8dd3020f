"""What the command says about its arguments; what it does with them is in test_server_serve.py."""

import os
import subprocess
import sys

import pytest

from aiotools import __version__
from aiotools.cli import main, serve

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SERVE = ["serve", "package.module:worker"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["srve"], "invalid choice: 'srve'"),
        (["serve"], "the following arguments are required: target"),
        ([*SERVE, "-w", "two"], "argument -w/--workers: invalid int value: 'two'"),
        ([*SERVE, "--hang-timeout", "soon"], "--hang-timeout: a number of seconds, or none for no limit, not 'soon'"),
        ([*SERVE, "--max-memory", "5X"], "--max-memory: a number of bytes such as 512M or 2G, not '5X'"),
        ([*SERVE, "--max-memory", "infG"], "--max-memory: a number of bytes such as 512M or 2G, not 'infG'"),
        ([*SERVE, "--max-memory", ""], "--max-memory: a number of bytes such as 512M or 2G, not ''"),
        ([*SERVE, "--socket-mode", "9"], "--socket-mode: octal digits such as 660, not '9'"),
        ([*SERVE, "--loop", "uvlop"], "invalid choice: 'uvlop'"),
        (["control", "path", "stauts"], "invalid choice: 'stauts'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_it_must_be(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_sizes_have_units():
    assert [serve._size(text) for text in ("4096", "1k", "1.5K", "512M", "2G")] == [
        4096,
        2**10,
        1536,
        512 * 2**20,
        2 * 2**30,
    ]


def test_no_limit_is_spelled_none():
    assert serve._seconds("none") is None
    assert serve._seconds("1.5") == 1.5


def test_the_help_shows_defaults_where_there_are_any(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "time for a worker to finish its work (default: 30.0)" in text
    assert "None" not in text and "False" not in text


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"aiotools {__version__}\n"


def run(*arguments, cwd):
    path = os.pathsep.join([ROOT, *[p for p in sys.path if p]])
    return subprocess.run(
        [sys.executable, "-m", "aiotools", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.skipif(os.name != "posix", reason="servers run on POSIX systems")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["svc"], "an import string must read 'package.module:name', not 'svc'"),
        (["svc:worker", "--bind", "127.0.0.1:80"], "it must read tcp://host:port, unix:path, fd://number or systemd"),
        (["svc:worker", "-w", "-1"], "num_workers must be at least 0, not -1"),
        (["svc:worker", "--app-dir", "nowhere"], "--app-dir: no directory 'nowhere'"),
        (["asgi:svc:app"], "an ASGI application needs an address: --bind tcp://127.0.0.1:8000"),
        (["asgi:svc"], "an import string must read 'package.module:name', not 'svc'"),
    ],
)
def test_what_cannot_be_served_ends_at_once_with_status_2_and_one_line(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("aiotools serve: ") and message in line


@pytest.mark.skipif(os.name != "posix", reason="servers run on POSIX systems")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bind", "unix:nowhere/x"], "aiotools serve: cannot bind unix:nowhere/x: No such file or directory"),
        (
            ["--control", "nowhere/c"],
            "aiotools serve: cannot open the control socket nowhere/c: No such file or directory",
        ),
        (["--pidfile", "nowhere/p"], "nowhere/p"),
    ],
)
def test_what_cannot_be_opened_ends_at_once_with_status_1_and_its_name(arguments, message, tmp_path):
    done = run("svc:worker", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.skipif(os.name != "posix", reason="servers run on POSIX systems")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "coroutine",
            "must return an asynchronous context manager, not 'coroutine': is @aiotools.server_context missing?",
        ),
        ("number", "must be callable (a function under @aiotools.server_context), not 3"),
        ("nothing", "has no attribute 'nothing'"),
    ],
)
def test_what_is_no_worker_says_so_in_the_last_line(name, message, tmp_path):
    (tmp_path / "svc.py").write_text("async def coroutine(loop, index, args): pass\nnumber = 3\n")
    done = run(f"svc:{name}", "--boot-failure-limit", "1", cwd=tmp_path)
    assert done.returncode == 3
    assert message in done.stderr.splitlines()[-1]
    assert "never awaited" not in done.stderr
