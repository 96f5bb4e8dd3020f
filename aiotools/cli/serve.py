"""``aiotools serve``: run a service with production defaults; ``aiotools control``: talk to it.

Exit status of ``serve``: 0 after a stop, 2 for a bad command line, 3 if the server gave up or ended because of a
worker's failure, 1 if it could not start (an address in use, ...); the reason is in the last line on stderr.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import signal
import sys
from typing import Any

__all__ = ("add_parsers", "run_control", "run_serve")


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _seconds(text: str) -> float | None:
    """Seconds, or "none" for no limit."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number of seconds, or none for no limit, not {text!r}") from None


def _size(text: str) -> int:
    """A number of bytes, also as 512M or 2G."""
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].upper() in _UNITS else (text, "")
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"a number of bytes such as 512M or 2G, not {text!r}") from None


def _mode(text: str) -> int:
    try:
        return int(text, 8)
    except ValueError:
        raise argparse.ArgumentTypeError(f"octal digits such as 660, not {text!r}") from None


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


def add_parsers(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="run a service with several workers",
        description="Run a service with several workers, restarted when they fail and replaced on SIGHUP "
        "without losing a request.",
        formatter_class=_Formatter,
    )
    add = serve.add_argument
    add("target", help="package.module:worker, or asgi:package.module:app")
    add("-w", "--workers", type=int, default=1, metavar="N", help="number of workers")
    add("--bind", action="append", default=[], metavar="ADDRESS",
        help="tcp://host:port, unix:path, fd://number or systemd; may be repeated")  # fmt: skip
    add("--loop", choices=["auto", "asyncio", "uvloop"], default="auto", help="event loop; auto: uvloop if there")
    add("--kind", choices=["process", "thread", "interpreter"], default="process", help="kind of worker")
    add("--restart", choices=["never", "on-failure", "always"], default="on-failure", help="restart policy")
    add("--hang-timeout", type=_seconds, default=30.0, metavar="S", help="kill a worker whose loop stands that long")
    add("--start-timeout", type=_seconds, default=60.0, metavar="S", help="time for a worker to become ready")
    add("--drain-timeout", type=_seconds, default=30.0, metavar="S", help="time for a worker to finish its work")
    add("--cancel-timeout", type=float, default=5.0, metavar="S", help="time for cancelled work to end")
    add("--max-surge", type=int, default=1, metavar="N", help="extra workers during a rolling restart")
    add("--boot-failure-limit", type=int, default=5, metavar="N", help="failures in a row before giving up")
    add("--max-requests", type=int, default=None, metavar="N", help="replace a worker after so many requests")
    add("--max-age", type=float, default=None, metavar="S", help="replace a worker after so many seconds")
    add("--max-memory", type=_size, default=None, metavar="SIZE", help="replace a worker that is larger (512M, 2G)")
    add("--preload", action="append", default=[], metavar="MODULE",
        help="a large library to import once for all workers (Linux); may be repeated")  # fmt: skip
    add("--backlog", type=int, default=2048, metavar="N", help="length of the accept queue")
    add("--reuse-port", action="store_true", help="one TCP socket per worker")
    add("--socket-mode", type=_mode, default=None, metavar="OCTAL", help="permissions of Unix sockets")
    add("--pidfile", default=None, metavar="PATH", help="file that holds the process id")
    add("--control", default=None, metavar="PATH", help="control socket, for 'aiotools control'")
    add("--app-dir", default=".", metavar="DIR", help="directory to import from")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="what is logged")
    serve.set_defaults(run=run_serve)

    control = commands.add_parser("control", help="talk to a running service", description="Talk to a running service.")
    control.add_argument("socket", help="its control socket")
    control.add_argument(
        "verb",
        choices=["restart", "reload", "status", "more", "less", "stop", "ready", "live"],
        help="restart: rolling, returns when it is over; reload: log files and on_reload hooks; status: as JSON; more, less: "
        "one worker; ready, live: exit with 1 if it is not (for probes)",
    )
    control.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="time for the answer")
    control.set_defaults(run=run_control)


def set_up_logging(level: str, index: int | None = None) -> None:
    """Log to stderr; in each child, too."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s", force=True
    )


def _loop(choice: str, kind: str) -> str:
    if choice != "auto":
        return choice
    if kind == "interpreter":
        return "asyncio"
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return "asyncio"
    return "uvloop"


def run_serve(arguments: argparse.Namespace) -> int:
    from ..server import ServerFailed, start_server
    from ..server.worker import parse_target

    set_up_logging(arguments.log_level)
    directory = os.path.abspath(arguments.app_dir)
    if not os.path.isdir(directory):
        print(f"aiotools serve: --app-dir: no directory {arguments.app_dir!r}", file=sys.stderr)
        return 2
    if directory not in sys.path:
        sys.path.insert(0, directory)
    target: Any = arguments.target
    try:
        if target.startswith("asgi:"):
            from ..server.asgi import asgi_worker

            parse_target(target.removeprefix("asgi:"))
            if not arguments.bind:
                raise ValueError("an ASGI application needs an address: --bind tcp://127.0.0.1:8000")
            target = asgi_worker(target.removeprefix("asgi:"))
        else:
            parse_target(target)
        report = start_server(
            target,
            num_workers=arguments.workers,
            prestart_hook=functools.partial(set_up_logging, arguments.log_level)
            if arguments.kind == "process"
            else None,
            stop_signals=(signal.SIGINT, signal.SIGTERM),
            worker_kind=arguments.kind,
            loop_factory=_loop(arguments.loop, arguments.kind),
            bind=arguments.bind,
            backlog=arguments.backlog,
            reuse_port=arguments.reuse_port,
            socket_mode=arguments.socket_mode,
            restart=arguments.restart,
            boot_failure_limit=arguments.boot_failure_limit,
            start_timeout=arguments.start_timeout,
            hang_timeout=arguments.hang_timeout,
            drain_timeout=arguments.drain_timeout,
            cancel_timeout=arguments.cancel_timeout,
            max_surge=arguments.max_surge,
            max_requests=arguments.max_requests,
            max_age=arguments.max_age,
            max_memory=arguments.max_memory,
            preload=arguments.preload,
            pidfile=arguments.pidfile,
            control_socket=arguments.control,
            report=True,
        )
    except ServerFailed as exc:
        print(f"aiotools serve: {exc}", file=sys.stderr)
        return 3
    except (ValueError, TypeError, NotImplementedError) as exc:
        print(f"aiotools serve: {exc}", file=sys.stderr)
        return 2
    except OSError as exc:
        what = exc.strerror if exc.strerror and exc.filename is None else exc
        print(f"aiotools serve: {what}", file=sys.stderr)
        return 1
    except RuntimeError as exc:
        print(f"aiotools serve: {exc}", file=sys.stderr)
        return 1
    assert report is not None
    if report.reason != "stopped" and (bad := [w for w in report.workers if w.code or w.signal]):
        # With --restart never: nobody has asked it to end.
        last = bad[-1]
        print(f"aiotools serve: worker {last.index} has ended: {last.reason}, {last.outcome}", file=sys.stderr)
        return 3
    return 0


def run_control(arguments: argparse.Namespace) -> int:
    from ..server.control import ControlError, command

    fields = {"wait": True} if arguments.verb == "restart" else {}
    try:
        answer = command(arguments.socket, arguments.verb, timeout=arguments.timeout, **fields)
    except ControlError as exc:
        print(f"aiotools control: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"aiotools control: {arguments.socket}: {exc.strerror or exc}", file=sys.stderr)
        return 1
    if answer:
        print(json.dumps(answer, indent=2))
    return 0
