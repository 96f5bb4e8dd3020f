"""The command ``aiotools``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import serve

__all__ = ("main",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    from .. import __version__

    parser = argparse.ArgumentParser(prog="aiotools", description="Tools for asyncio services.")
    parser.add_argument("--version", action="version", version=f"aiotools {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve.add_parsers(commands)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
