"""The ``ttr`` command: one module per subcommand, each with ``declare(parser)`` and ``run(arguments)``.

Exit codes: 0 done, 2 it cannot be done (one line says why), 130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import ttr_np

from ..backends import from_environment

__all__ = ["Refusal", "main"]

COMMANDS = {
    "recall": "recall of a real text by every layer, without training",
    "compare": "error and time of every operator on every backend, for your shape",
    "forecast": "one-step-ahead forecasts of a series of yours by layers as adaptive memories",
    "experiment": "what the paper claims, in numbers: capacity, conditioning, drift, mqar, tracking",
    "layers": "the table of layers: weights, regressor, optimizer",
    "config": "versions, backends, threads and devices",
}
DESCRIPTION = "Test-time regression: every sequence layer as weights, a regressor and an optimizer."


class Refusal(Exception):
    """What the user asked for cannot be done; the message is one line."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise Refusal(f"{message} (see {self.prog} --help)")


def parser() -> Parser:
    """All subcommands, each declared by its own module."""
    top = Parser("ttr", description=DESCRIPTION, epilog="ttr COMMAND --help explains a command.")
    top.add_argument("--version", action="version", version=f"ttr_np {ttr_np.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = import_module(f"{__name__}.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__.split("\n\n")[0])
        module.declare(command)
        command.set_defaults(run=module.run)
    return top


def dispatch(argv: Sequence[str] | None) -> int:
    """Run one subcommand and hand its output over, so that a closed pipe shows here and not at exit."""
    try:
        arguments = parser().parse_args(argv)
        check_environment()
        arguments.run(arguments)
        code = 0
    except SystemExit as done:
        code = int(done.code or 0)
    sys.stdout.flush()
    return code


def check_environment() -> None:
    """Refuse a backend in ``TTR_BACKEND`` that does not exist, whichever the subcommand."""
    try:
        from_environment()
    except ValueError as problem:
        raise Refusal(str(problem)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after ``ttr``; default: those of the process.
    """
    open_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the letter must not end the table
    try:
        return dispatch(argv)
    except Refusal as problem:
        print(f"ttr: {problem}", file=sys.stderr)
        return 2
    except MemoryError as problem:
        print(f"ttr: not enough memory: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nttr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        drop_output()
        return 141
    except OSError as problem:  # a full disk
        drop_output()
        print(f"ttr: {problem}", file=sys.stderr)
        return 2


def open_streams() -> None:
    """Replace what a daemon has closed by the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def drop_output() -> None:
    """Drop what standard output cannot take, so that it raises no second time at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
