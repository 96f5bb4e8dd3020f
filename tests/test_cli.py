"""What the command says about its arguments; what it does with them is in test_server_serve.py."""

import os
import re
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
    ("option", "value", "message"),
    [
        ("--bind", "tcp://127.0.0.1", "no port from 0 to 65535 in 'tcp://127.0.0.1'"),
        ("--bind", "tcp://127.0.0.1:65536", "no port from 0 to 65535 in 'tcp://127.0.0.1:65536'"),
        ("--bind", "unix:", "no path in 'unix:'"),
        ("--hang-timeout", "0", "hang_timeout must be more than 0 seconds, not 0.0"),
        ("--hang-timeout", "nan", "hang_timeout must be more than 0 seconds, not nan"),
        ("--start-timeout", "-1", "start_timeout must be more than 0 seconds, not -1.0"),
        ("--drain-timeout", "-1", "drain_timeout must be at least 0 seconds, not -1.0"),
        ("--cancel-timeout", "-1", "cancel_timeout must be at least 0 seconds, not -1.0"),
        ("--max-surge", "0", "max_surge must be at least 1, not 0"),
        ("--boot-failure-limit", "0", "boot_failure_limit must be at least 1, not 0"),
        ("--max-requests", "0", "max_requests must be at least 1, not 0"),
        ("--max-age", "0", "max_age must be more than 0 seconds, not 0.0"),
        ("--max-memory", "0", "max_memory must be at least 1, not 0"),
        ("--backlog", "0", "backlog must be at least 1, not 0"),
        ("--socket-mode", "1777", "socket_mode must be from 0 to 0o777, not 0o1777"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(option, value, message, capsys, monkeypatch):
    # Setting up the log would take away pytest's.
    monkeypatch.setattr(serve, "set_up_logging", lambda level: None)
    assert main([*SERVE, f"{option}={value}"]) == 2
    assert capsys.readouterr().err == f"aiotools serve: {message}\n"


@pytest.mark.skipif(os.name != "posix", reason="servers run on POSIX systems")
def test_a_file_that_is_no_pidfile_is_left_alone(tmp_path):
    path = tmp_path / "precious"
    path.write_text("not a number\n")
    done = run("svc:worker", "--pidfile", "precious", cwd=tmp_path)
    assert done.returncode == 1
    assert "the pidfile precious exists and holds no process id" in done.stderr.splitlines()[-1]
    assert path.read_text() == "not a number\n"
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.skipif(os.name != "posix", reason="servers run on POSIX systems")
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_without_restarts_a_failing_worker_is_status_3_too(how, tmp_path):
    (tmp_path / "svc.py").write_text(FAILING)
    done = run(f"svc:{how}", "--restart", "never", "-w", "2", cwd=tmp_path)
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert re.match(r"aiotools serve: worker \d has ended: ", last)
    assert {"raises": "OSError: the disk is away, exit code 1", "dies": "crashed, SIGKILL"}[how] in last


@pytest.mark.skipif(os.name != "posix", reason="servers run on POSIX systems")
def test_workers_that_all_end_well_are_status_0(tmp_path):
    (tmp_path / "svc.py").write_text(FAILING)
    done = run("svc:ends", "-w", "2", cwd=tmp_path)
    assert done.returncode == 0
    assert "All child processes have terminated" in done.stderr


FAILING = """
import os, signal
from aiotools.server import server_context

@server_context
async def raises(loop, index, args):
    raise OSError("the disk is away")
    yield

@server_context
async def dies(loop, index, args):
    os.kill(os.getpid(), signal.SIGKILL)
    yield

@server_context
async def ends(loop, index, args):
    loop.call_soon(os._exit, 0)
    yield
"""


@pytest.mark.skipif(os.name != "posix", reason="servers run on POSIX systems")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bind", "unix:nowhere/x"], "aiotools serve: cannot bind unix:nowhere/x: No such file or directory"),
        (
            ["--control", "nowhere/c"],
            "aiotools serve: cannot open the control socket nowhere/c: No such file or directory",
        ),
        (["--pidfile", "nowhere/p"], "aiotools serve: cannot write the pidfile nowhere/p: No such file or directory"),
        (["--pidfile", "."], "aiotools serve: cannot write the pidfile .: "),
        (["--bind", "fd://99"], "aiotools serve: cannot bind fd://99: Bad file descriptor"),
        (["--bind", "systemd"], "aiotools serve: bind='systemd': no sockets were passed to this process (LISTEN_FDS)"),
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
