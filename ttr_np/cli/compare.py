"""Error and time of every operator on every available backend, for your own shape.

Inputs are drawn at random. The error is the largest difference from the NumPy solver in float64, over its largest
answer; a backend that is wrong is told and not timed. Times are medians of rounds in which all backends take turns;
arrays of a GPU backend are on the GPU before the clock starts.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from math import inf
from time import perf_counter
from typing import Any

import numpy as np

import ttr_np

from ..backends import available_backends, has_operator
from ..measure import (
    TOLERANCE,
    Case,
    Skipped,
    busy,
    contest,
    machine,
    ours,
    prefix,
    reference,
    softened,
    using,
)
from ..notation import OPERATORS, draw
from ..text_recall import BadInput, breaks, chosen_backends
from . import Refusal
from .inputs import split
from .outputs import WIDTH, by_reason, check_writable, deliver, plotter, progress_bar
from .table import aligned, digits

__all__ = ["compare", "declare", "report", "run", "timing_cells"]

HEADING = ("operator", "backend", "ms", "p20-p80", "error", "ns/token-head", "MB", "speed")
SHARE = 10  # a call on the beginning of a sequence may take so little of the budget
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
    add(
        "--budget",
        type=float,
        metavar="S",
        default=10.0,
        help="seconds the float64 solver, and each backend in all rounds, may take (default 10)",
    )
    add("--threads", type=int, metavar="N", help="of the backends on the CPU; default: all they have")
    add("--seed", type=int, default=0, help="of the inputs (default 0)")
    add("--json", metavar="FILE", nargs="?", const="-", help="write the result as JSON; - or nothing: print it alone")
    add("--plot", metavar="FILE", help="draw it (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace) -> None:
    """Check everything that can be wrong, then measure, then print, write and draw."""
    if arguments.plot is not None:
        draw_into = plotter(arguments.plot, ".timing_plot")
    check_writable(arguments.json, arguments.plot)
    try:
        backends = chosen_backends(split(arguments.backends))
    except BadInput as problem:
        raise Refusal(str(problem)) from None
    names, sizes = operators(split(arguments.operators)), shape(arguments.shape)
    for name, least in (("rounds", 1), ("threads", 1), ("seed", 0)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            raise Refusal(f"{name} must be an integer of at least {least}, got {getattr(arguments, name)}")
    if not 0 <= arguments.budget < inf:
        raise Refusal(f"budget must be a number of seconds, got {arguments.budget:g}")
    with using(arguments.threads) if arguments.threads else nullcontext():
        result = compare(names, backends, sizes, arguments)
    deliver(result, report(result), arguments.json)
    if arguments.plot is not None:
        draw_into(rows(result), arguments.plot, headline(result))


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
    return Case(operator, f"log_decay per {arguments.decay}" if gated else "", softened(arrays), options)


def affordable(case: Case, t: int, budget: float) -> int:
    """``t``, or the longest beginning that the float64 solver can afford where it cannot afford all; 0 if none."""
    ran: dict[int, float] = {}

    def clock(count: int) -> float:
        start = perf_counter()
        reference(prefix(case, count))
        ran[count] = perf_counter() - start
        return ran[count]

    clock(1)  # what is imported at the first call is not counted
    if not breaks(budget, t, clock):
        return t
    return max((count for count, seconds in ran.items() if seconds <= budget / SHARE), default=0)


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
        "threads": arguments.threads,
        "budget": arguments.budget,
        "backends": list(backends),
        "unavailable": {name: state for name, state in states.items() if state != "ok"},
        "operators": entries,
    }


def measured(
    name: str, backends: Sequence[str], sizes: dict[str, int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One operator on every backend."""
    case = drawn(name, sizes, arguments)
    about = {"operator": name, "variant": case.variant, "T": sizes["T"]}
    with np.errstate(all="ignore"):
        try:
            about["T"] = affordable(case, sizes["T"], arguments.budget)
            case = prefix(case, about["T"])
            exact = reference(case) if about["T"] else None
        except (ValueError, NotImplementedError, np.linalg.LinAlgError) as problem:
            return about | {"results": [], "skipped": [{"contender": "reference", "reason": str(problem)}]}
        if exact is None:
            reason = f"the float64 solver needs more than the {arguments.budget:g} s allowed (--budget)"
            return about | {"results": [], "skipped": [{"contender": "reference", "reason": reason}]}
        contenders = [
            ours(case, backend) if has_operator(backend, name) else Skipped(backend, "has no such operator")
            for backend in backends
        ]
        found = contest(
            contenders,
            exact,
            tolerance=TOLERANCE[arguments.dtype],
            rounds=arguments.rounds,
            rng=np.random.default_rng(arguments.seed),
            budget=arguments.budget,
        )
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
    lines = [cells for entry in result["operators"] for cells in cells_of(entry, sizes)]
    table = aligned([HEADING, *lines], right=range(2, len(HEADING)), whole=[0, 1], width=WIDTH)
    foot = [
        "error: largest difference from the NumPy solver in float64, over its largest answer",
        "MB: memory one call needs; speed: times as fast as the backend numpy",
        *filter(None, [busy(result)]),
        *(f"not available: {name}: {reason}" for name, reason in result["unavailable"].items()),
        *shortened(result),
        *not_run(result),
    ]
    wrapped = (part for line in foot for part in textwrap.wrap(line, WIDTH, subsequent_indent="  "))
    return "\n".join([headline(result), "", table, "", *wrapped])


def headline(result: dict[str, Any]) -> str:
    """What was asked, and of which machine."""
    sizes = " ".join(f"{name} {size}" for name, size in result["shape"].items())
    return f"{sizes}, {result['dtype']}, {result['rounds']} rounds; {result['processor']}, {result['cores']} cores"


def cells_of(entry: dict[str, Any], sizes: dict[str, int]) -> list[list[str]]:
    """Lines of one operator."""
    tokens = sizes["B"] * sizes["H"] * entry["T"]
    plain = {found["contender"]: found["seconds"]["median"] for found in entry["results"]}.get("numpy")
    return [
        [
            title(entry, sizes["T"]),
            found["contender"],
            *timing_cells(found, tokens),
            digits(plain / found["seconds"]["median"], 2) if plain else "-",
        ]
        for found in entry["results"]
    ]


def title(entry: dict[str, Any], t: int) -> str:
    """An operator, with its length where it is not that of all."""
    return entry["operator"] if entry["T"] == t else f"{entry['operator']}, T {entry['T']}"


def shortened(result: dict[str, Any]) -> list[str]:
    """Why some operators saw the beginning only."""
    short = [entry["operator"] for entry in result["operators"] if 0 < entry["T"] < result["shape"]["T"]]
    why = f"the float64 solver would take more than the {result['budget']:g} s allowed for all (--budget)"
    return [f"on a beginning: {', '.join(short)}: {why}"] if short else []


def not_run(result: dict[str, Any]) -> list[str]:
    """What did not run, by reason."""
    skipped = [(found, entry["operator"]) for entry in result["operators"] for found in entry["skipped"]]
    groups = by_reason((f"{found['contender']}: {found['reason']}", name) for found, name in skipped)
    return [f"not run: {', '.join(names)}: {reason}" for reason, names in groups.items()]


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What is drawn: one row per operator and backend."""
    t = result["shape"]["T"]
    return [found | {"group": title(entry, t)} for entry in result["operators"] for found in entry["results"]]
