"""Where subcommands put what they found: the terminal, files of JSON, figures, a line of progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from . import Refusal

__all__ = ["WIDTH", "by_reason", "check_writable", "deliver", "plotter", "progress_bar"]

WIDTH = 120
FIGURES = (".png", ".svg", ".pdf")


def plotter(path: str, module: str) -> Callable[[dict[str, Any], str], None]:
    """The function that draws, found before the work so that a missing package costs no time."""
    if Path(path).suffix.lower() not in FIGURES:
        raise Refusal(f"--plot writes {', '.join(FIGURES)}; {path} is none of them")
    try:
        return import_module(module, __package__).save
    except ImportError:
        raise Refusal("--plot needs matplotlib: pip install 'ttr_np[plot]'") from None


def check_writable(*paths: str | None) -> None:
    """Refuse now what could not be written after the work; leaves no file behind. None and ``-`` are no files."""
    for path in paths:
        if path in (None, "-"):
            continue
        existed = Path(path).exists()
        try:
            Path(path).open("ab").close()
        except OSError as problem:
            raise Refusal(f"cannot write {path}: {problem.strerror}") from None
        if not existed:
            Path(path).unlink()


def deliver(result: dict[str, Any], text: str, path: str | None) -> None:
    """Write the result as JSON where ``--json`` says, and print the text unless that is standard output."""
    if path is not None:
        write_json(result, path)
    if path != "-":
        print(text)


def write_json(result: dict[str, Any], path: str) -> None:
    """The result to a file or to standard output."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    if path == "-":
        print(text)
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")


def progress_bar() -> Callable[[int, int, str], None] | None:
    """A line that rewrites itself on a terminal; None, so silence, anywhere else."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int, name: str) -> None:
        filled = 30 * done // total
        bar = f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {name}"
        print("\r\033[K" + (bar if done < total else ""), end="", file=sys.stderr, flush=True)

    return show


def by_reason(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names under the reason they share, from pairs of reason and name.

    Examples
    --------
    >>> by_reason([("too slow", "a"), ("no kernel", "b"), ("too slow", "c")])
    {'too slow': ['a', 'c'], 'no kernel': ['b']}
    """
    groups: dict[str, list[str]] = {}
    for reason, name in found:
        groups.setdefault(reason, []).append(name)
    return groups
