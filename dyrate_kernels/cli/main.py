"""``dyrate``: one parser, one file a command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from dyrate_kernels import __version__

# a file each, in the order of the help
COMMANDS = ("generate", "caption", "compare", "demo", "train", "calibrate", "eval", "bench", "doctor", "info")
_SHORT = "dyrate: error: "


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="dyrate", description="Drop visual tokens while a vision-language model generates.")
    parser.add_argument("--version", action="version", version=f"dyrate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"dyrate_kernels.cli.{name}").add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (0 well, 1 failed, 2 wrong usage)."""
    if hasattr(sys.stdout, "reconfigure"):  # a file's name that is no UTF-8 must not end a run that is done
        sys.stdout.reconfigure(errors="backslashreplace")
    given = build_parser().parse_args(arguments)
    if given.debug:
        return given.run(given)
    try:
        return given.run(given)
    except KeyboardInterrupt:
        print(f"{_SHORT}interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `dyrate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # a user's mistake is a line, not a traceback; --debug shows it all
        print(f"{_SHORT}{error or type(error).__name__}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
