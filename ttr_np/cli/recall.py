"""Recall of a real text by every layer, without training.

Words and punctuation marks get random embeddings of length one. A memory stores, token by token, what followed what,
and is asked at each token it has seen before what comes next. Compared with counting: the last and the most frequent
continuation seen.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from ..text_recall import BadInput, text_recall
from . import Refusal
from .inputs import read, split
from .outputs import WIDTH, by_reason, check_writable, deliver, plotter, progress_bar
from .table import aligned

__all__ = ["declare", "report", "run"]


def declare(parser: argparse.ArgumentParser) -> None:
    """The options; those that are left out are the defaults of ``text_recall``."""
    add = parser.add_argument
    add("--text", metavar="FILE", help="any UTF-8 text, - for standard input; default: standard-library source")
    add("--layers", metavar="NAMES", action="append", help="comma-separated names, see ttr layers; default: all")
    add("--dimension", type=int, metavar="D", default=64, help="size of the embeddings (default 64)")
    add("--length", type=int, metavar="T", default=2048, help="tokens read from the text (default 2048)")
    add("--seed", type=int, default=0, help="of the embeddings (default 0)")
    text = "comma-separated, or auto; default: TTR_BACKEND, else all available"
    add("--backend", metavar="NAMES", action="append", help=text)
    add("--budget", type=float, metavar="S", default=15.0, help="seconds an unnamed layer may take (default 15)")
    add("--json", metavar="FILE", nargs="?", const="-", help="write the result as JSON; - or nothing: print it alone")
    add("--plot", metavar="FILE", help="draw it: bars by layer, lines by distance (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace) -> None:
    """Check everything that can be wrong, then measure, then print, write and draw."""
    text = None if arguments.text is None else read(arguments.text)
    if arguments.plot is not None:
        draw = plotter(arguments.plot, ".recall_plot")
    check_writable(arguments.json, arguments.plot)
    try:
        result = text_recall(
            text,
            layers=split(arguments.layers),
            dimension=arguments.dimension,
            length=arguments.length,
            seed=arguments.seed,
            backends=split(arguments.backend),
            budget=arguments.budget,
            progress=progress_bar(),
        )
    except BadInput as problem:
        raise Refusal(str(problem)) from None
    if not result["layers"]:
        raise Refusal(f"no layer can run: {reasons(result)}")
    result["text"]["source"] = arguments.text or "standard-library source"
    deliver(result, report(result), arguments.json)
    if arguments.plot is not None:
        draw(result, arguments.plot)


def percent(share: float | None, digits: int = 0) -> str:
    """A share as a percentage without its sign."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def thousands(number: float) -> str:
    """A speed in three digits or so."""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{suffix}" if number < 100 * unit else f"{number / unit:.0f}{suffix}"
    return f"{number:.3g}"


def report(result: dict[str, Any]) -> str:
    """The result for a reader: what was asked, the table, what did not run."""
    text = result["text"]
    length = f"first {text['used']} of {text['tokens']}" if text["used"] < text["tokens"] else f"{text['used']}"
    head = [
        f"Recall (%) of the next token at the {text['scored']} tokens that were seen before, by tokens since last seen",
        f"{text['source']}: {length} tokens, {text['words']} words; embeddings of dimension {result['dimension']}, "
        f"seed {result['seed']}, {result['dtype']}",
    ]
    foot = ["", "* counting, not a memory: the last, and the most frequent, continuation seen so far", *speeds(result)]
    head = [part for line in head for part in textwrap.wrap(line, WIDTH)]
    return "\n".join([*head, "", table(result), *foot, *remarks(result)])


def speeds(result: dict[str, Any]) -> list[str]:
    """What the columns of the backends mean, and all the time it took."""
    names = ", ".join(backends_of(result)) or "none"
    return [f"tokens per second on each backend ({names}); all together {result['seconds']:.1f} s"]


def backends_of(result: dict[str, Any]) -> list[str]:
    """The backends that ran anything, in order."""
    return list(dict.fromkeys(run["backend"] for entry in result["layers"] for run in entry["runs"]))


def table(result: dict[str, Any]) -> str:
    """Layers and baselines, best first."""
    backends = backends_of(result)
    one = all(len(entry["runs"]) == 1 for entry in result["layers"])  # else seconds, which speeds imply, would not fit
    distances = [entry["tokens"] for entry in result["distances"]]
    heading = ["layer", "weights", "regressor", "optimizer", "recall", *distances, *["seconds"] * one, *backends]
    rows = sorted(result["layers"] + result["baselines"], key=lambda entry: -(entry["recall"] or 0.0))
    lines = [cells(entry, backends, one) for entry in rows]
    return aligned([heading, *lines], right=range(4, len(heading)), whole=[0], width=WIDTH)


def cells(entry: dict[str, Any], backends: list[str], one: bool) -> list[str]:
    """One line of the table."""
    runs = {run["backend"]: run for run in entry.get("runs", [])}
    is_layer = bool(runs)
    name = entry["name"] if is_layer else "* " + entry["name"].removesuffix(" continuation seen")
    about = [entry[key] if is_layer else "" for key in ("weights", "regressor", "optimizer")]
    shares = [percent(entry["recall"], 1), *map(percent, entry["by_distance"])]
    seconds = [f"{entry['runs'][0]['seconds']:.3f}" if is_layer else ""] * one
    speed = [thousands(runs[backend]["tokens_per_second"]) if backend in runs else "" for backend in backends]
    return [name, *about, *shares, *seconds, *speed]


def reasons(result: dict[str, Any]) -> str:
    """Why nothing ran, in one line: each reason with one of the layers it holds for."""
    groups = by_reason((entry["reason"], entry["name"]) for entry in result["not_run"])
    others = {1: "", 2: " and 1 other"}
    return "; ".join(
        f"{names[0]}{others.get(len(names), f' and {len(names) - 1} others')}: {' '.join(reason.split())}"
        for reason, names in groups.items()
    )


def remarks(result: dict[str, Any]) -> list[str]:
    """Layers that gave no answer at some tokens, and layers that did not run, by reason."""
    lines = []
    silent = [f"{entry['name']} {entry['unanswered']}" for entry in result["layers"] if entry["unanswered"]]
    if silent:
        lines.append(f"tokens without an answer (output zero or not finite): {', '.join(silent)}")
    groups = by_reason((entry["reason"], entry["name"]) for entry in result["not_run"])
    lines += [f"not run: {', '.join(names)}: {reason}" for reason, names in groups.items()]
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
