"""One of five experiments without training: a table, and what it shows in one sentence.

capacity: what d x d numbers hold. conditioning: correlated keys. drift: a map that changes. mqar: associative recall.
tracking: first order against the Kalman filter.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from ..text_recall import BadInput, chosen_backends
from . import Refusal
from .outputs import WIDTH, check_writable, deliver, plotter
from .table import aligned

__all__ = ["NAMES", "declare", "number", "report", "run", "table"]

NAMES = ("capacity", "conditioning", "drift", "mqar", "tracking")


def declare(parser: argparse.ArgumentParser) -> None:
    """The options; those that are left out are the experiment's defaults."""
    add = parser.add_argument
    add("name", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    add("--repeats", type=int, metavar="N", help="independent draws; default: the experiment's")
    add("--seed", type=int, default=0, help="of the draws (default 0)")
    add("--backend", metavar="NAME", help="default: TTR_BACKEND, else the fastest that can run here")
    add("--json", metavar="FILE", nargs="?", const="-", help="write the result as JSON; - or nothing: print it alone")
    add("--plot", metavar="FILE", help="draw it, closed forms dashed (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace) -> None:
    """Check everything that can be wrong, then run, then print, write and draw."""
    if arguments.plot is not None:
        draw = plotter(arguments.plot, ".experiment_plot")
    check_writable(arguments.json, arguments.plot)
    result = measured(arguments)
    deliver(result, report(result), arguments.json)
    if arguments.plot is not None:
        draw(result, arguments.plot)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The experiment's dict."""
    from .. import experiments

    given = {"seed": arguments.seed, "backend": arguments.backend}
    given |= {"repeats": arguments.repeats} if arguments.repeats is not None else {}
    try:
        chosen_backends([arguments.backend] if arguments.backend else None)
        return getattr(experiments, arguments.name)(**given)
    except (BadInput, NotImplementedError) as problem:
        raise Refusal(str(problem)) from None


def report(result: dict[str, Any]) -> str:
    """The result for a reader: the claim, the settings, a table per panel, the sentence."""
    settings = ", ".join(f"{name} {words(value)}" for name, value in result["settings"].items())
    lines = [f"{result['experiment']}: {result['claim']}", settings]
    head = [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
    tables = [part for found in result["panels"] for part in ("", table(found))]
    foot = [f"{result['finding']}", f"{result['seconds']:.1f} s"]
    return "\n".join([*head, *tables, "", *(part for line in foot for part in textwrap.wrap(line, WIDTH))])


def words(value: Any) -> str:
    """A setting as it was given."""
    return " ".join(map(words, value)) if isinstance(value, list) else f"{value:g}"


def table(found: dict[str, Any]) -> str:
    """A panel: one line per method, its closed form below it; then what each family chose from its grid."""
    heading = [f"by {found['axis']}", *map(number, found["places"])]
    lines = [heading]
    for entry in found["rows"]:
        lines.append([entry["name"], *map(number, entry["mean"])])
        if entry["theory"] is not None:
            lines.append(["  closed form", *map(number, entry["theory"])])
    rows = [entry for entry in found["rows"] if "chosen" in entry]
    chosen = [f"{entry['name']}: {'; '.join(map(point, entry['chosen']))}" for entry in rows]
    best = ["best of the grid:", *(f"  {line}" for line in chosen)] if chosen else []
    return "\n".join([found["measure"], aligned(lines, right=range(1, len(heading)), whole=[0]), *best])


def point(chosen: dict[str, float]) -> str:
    """A point of a grid."""
    return " ".join(f"{name} {value:g}" for name, value in chosen.items())


def number(x: float) -> str:
    """Three digits; numbers below one in a thousand with an exponent."""
    return f"{x:.3g}" if x == 0 or abs(x) >= 1e-3 else f"{x:.0e}"
