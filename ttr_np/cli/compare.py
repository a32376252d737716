"""Error and time of every operator on every available backend, for your own shape.

Inputs are drawn at random. The error is the largest difference from the NumPy solver in float64, over its largest
answer; a backend that is wrong is told and not timed. Times are medians of rounds in which all backends take turns;
arrays of a GPU backend are on the GPU before the clock starts.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

import ttr_np

from ..backends import available_backends, has_operator
from ..measure import TOLERANCE, Case, Skipped, contest, machine, ours, prefix, reference
from ..notation import OPERATORS, draw
from ..text_recall import BadInput, beginnings, chosen_backends
from . import Refusal
from .recall import WIDTH, check_writable, plotter, progress_bar, split, write_json
from .table import aligned, digits

__all__ = ["compare", "declare", "report", "run", "timing_cells"]

HEADING = ("operator", "backend", "ms", "p20-p80", "error", "ns/token-head", "MB", "speed")
DECAYS = ("none", "step", "channel")


def declare(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("--shape", metavar="B,H,T,D", default="1,8,2048,64", help="batch, heads, tokens, size (default 1,8,2048,64)")
    add("--operators", metavar="NAMES", action="append", help="comma-separated; default: all")
    add("--backends", metavar="NAMES", action="append", help="comma-separated; default: all available")
    add("--dtype", choices=sorted(TOLERANCE), default="float32", help="of the inputs (default float32)")
    add("--decay", choices=DECAYS, default="step", help="gate where an operator takes one (default step)")
    add("--rounds", type=int, metavar="N", default=5, help="times each backend is asked (default 5)")
    add("--budget", type=float, metavar="S", default=10.0, help="seconds the float64 solver may take (default 10)")
    add("--seed", type=int, default=0, help="of the inputs (default 0)")
    add("--json", metavar="FILE", nargs="?", const="-", help="write the result as JSON; - or nothing: print it alone")
    add("--plot", metavar="FILE", help="draw it (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace) -> None:
    """Check everything that can be wrong, then measure, then print, write and draw."""
    if arguments.plot is not None:
        draw_into = plotter(arguments.plot, ".timing_plot")
    for path in (arguments.json, arguments.plot):
        if path not in (None, "-"):
            check_writable(path)
    try:
        backends = chosen_backends(split(arguments.backends))
    except BadInput as problem:
        raise Refusal(str(problem)) from None
    names, sizes = operators(split(arguments.operators)), shape(arguments.shape)
    for name, least in (("rounds", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise Refusal(f"{name} must be an integer of at least {least}, got {getattr(arguments, name)}")
    result = compare(names, backends, sizes, arguments)
    if arguments.json is not None:
        write_json(result, arguments.json)
    if arguments.json != "-":
        print(report(result))
    if arguments.plot is not None:
        draw_into(rows(result), arguments.plot)


def operators(names: Sequence[str] | None) -> list[str]:
    """The operators asked for, each once; all of them if none is named."""
    for name in names or ():
        if name not in OPERATORS:
            raise Refusal(f"unknown operator {name!r}; the operators are {', '.join(OPERATORS)}")
    return list(dict.fromkeys(names or OPERATORS))


def shape(text: str) -> dict[str, int]:
    """Four sizes of at least 1."""
    try:
        sizes = dict(zip("BHTD", map(int, text.split(",")), strict=True))
    except ValueError:
        raise Refusal(f"--shape needs four integers B,H,T,D, got {text!r}") from None
    for name, size in sizes.items():
        if size < 1:
            raise Refusal(f"--shape needs sizes of at least 1, {name} is {size}")
    return sizes


def drawn(operator: str, sizes: dict[str, int], arguments: argparse.Namespace) -> Case:
    """Random inputs of an operator."""
    signature, t, d = OPERATORS[operator], sizes["T"], sizes["D"]
    gated = "log_decay" in signature.optional and arguments.decay != "none"
    arrays = draw(
        operator,
        np.random.default_rng(arguments.seed),
        optional=("log_decay",) * gated,
        lead=(sizes["B"], sizes["H"]),
        per_channel=arguments.decay == "channel",
        dtype=arguments.dtype,
        **{"t": t, "k": d, "v": d, "d": d, "n": 16, "w": 4, "l": t.bit_length() + 1},
    )
    options = {"memory": ttr_np.Linear()} if operator == "test_time_training" else {}
    return Case(operator, f"log_decay per {arguments.decay}" if gated else "", arrays, options)


def too_slow(case: Case, t: int, budget: float) -> str:
    """Why the float64 solver would break the budget, judged from ever longer beginnings; empty if it would not."""
    for count in beginnings(t):
        start = perf_counter()
        reference(prefix(case, count))
        if (perf_counter() - start) * t / count > budget:
            return f"the float64 solver needs more than the {budget:g} s allowed (--budget)"
    return ""


def compare(
    names: Sequence[str], backends: Sequence[str], sizes: dict[str, int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Plain numbers, strings, lists and dicts: what ran, and why the rest did not."""
    show, entries = progress_bar() or (lambda *step: None), []
    for i, name in enumerate(names):
        show(i, len(names), name)
        entries.append(measured(name, backends, sizes, arguments))
    show(len(names), len(names), "")
    states = available_backends()
    return machine() | {
        "shape": sizes,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "backends": list(backends),
        "unavailable": {name: state for name, state in states.items() if state != "ok"},
        "operators": entries,
    }


def measured(
    name: str, backends: Sequence[str], sizes: dict[str, int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One operator on every backend."""
    case = drawn(name, sizes, arguments)
    about = {"operator": name, "variant": case.variant}
    with np.errstate(all="ignore"):
        try:
            reason = too_slow(case, sizes["T"], arguments.budget)
            exact = None if reason else reference(case)
        except (ValueError, NotImplementedError, np.linalg.LinAlgError) as problem:
            reason = str(problem)
        if reason:
            return about | {"results": [], "skipped": [{"contender": "reference", "reason": reason}]}
        contenders = [
            ours(case, backend) if has_operator(backend, name) else Skipped(backend, "has no such operator")
            for backend in backends
        ]
        rng = np.random.default_rng(arguments.seed)
        tolerance = TOLERANCE[arguments.dtype]
        found = contest(contenders, exact, tolerance=tolerance, rounds=arguments.rounds, rng=rng)
        return about | {key: found[key] for key in ("results", "skipped")}


def timing_cells(entry: dict[str, Any], token_heads: int) -> list[str]:
    """Median, spread, error, time per token of one head, and peak memory of one result."""
    times, peak = entry["seconds"], entry["peak_bytes"]
    ms = [digits(1e3 * times[name]) for name in ("median", "p20", "p80")]
    per_token = digits(1e9 * times["median"] / token_heads)
    memory = "-" if peak is None else f"{peak / 2**20:.1f}"
    error = f"{entry['error']:.1e}" if entry["error"] else "0"
    return [ms[0], f"{ms[1]}-{ms[2]}", error, per_token, memory]


def report(result: dict[str, Any]) -> str:
    """The result for a reader: what was asked, the table, what did not run."""
    sizes = result["shape"]
    head = f"B {sizes['B']} H {sizes['H']} T {sizes['T']} D {sizes['D']}, {result['dtype']}, {result['rounds']} rounds"
    lines = [cells for entry in result["operators"] for cells in cells_of(entry, sizes)]
    table = aligned([HEADING, *lines], right=range(2, len(HEADING)), whole=[0, 1], width=WIDTH)
    foot = [
        "error: largest difference from the NumPy solver in float64, over its largest answer",
        "MB: memory one call needs; speed: times as fast as the backend numpy",
        *(f"not available: {name}: {reason}" for name, reason in result["unavailable"].items()),
        *not_run(result),
    ]
    wrapped = (part for line in foot for part in textwrap.wrap(line, WIDTH, subsequent_indent="  "))
    return "\n".join([head, "", table, "", *wrapped])


def cells_of(entry: dict[str, Any], sizes: dict[str, int]) -> list[list[str]]:
    """Lines of one operator."""
    tokens = sizes["B"] * sizes["H"] * sizes["T"]
    plain = {found["contender"]: found["seconds"]["median"] for found in entry["results"]}.get("numpy")
    return [
        [
            entry["operator"],
            found["contender"],
            *timing_cells(found, tokens),
            digits(plain / found["seconds"]["median"], 2) if plain else "-",
        ]
        for found in entry["results"]
    ]


def not_run(result: dict[str, Any]) -> list[str]:
    """What did not run, by reason."""
    reasons: dict[str, list[str]] = {}
    for entry in result["operators"]:
        for found in entry["skipped"]:
            reasons.setdefault(f"{found['contender']}: {found['reason']}", []).append(entry["operator"])
    return [f"not run: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What is drawn: one row per operator and backend."""
    return [found | {"group": entry["operator"]} for entry in result["operators"] for found in entry["results"]]
