"""Everybody against everybody, honestly: ``python -m benchmarks.run [operator ...]``.

Answers are checked against the float64 solver before anything is timed. All contenders run in one process, in rounds,
in an order shuffled each round. Peak memory is physical memory, as the kernel counts it, that one call needs above what
the process held before. Peers that are not installed are skipped with a reason.

Torch is given the fastest of its forms and chunk sizes, found on the same inputs. The machine's rate of matrix products
is measured in the same rounds: on a machine with other work it falls as they do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ttr_np import measure
from ttr_np.cli import Refusal
from ttr_np.cli.outputs import check_writable, plotter
from ttr_np.measure import contest, gemm_rate, machine, products, reference, using

from . import report
from .lengths import LINEAR, crossover, scaling, sums
from .questions import OURS, QUESTIONS, Question, Setting
from .summary import summary
from .torch_peers import no_gradients

__all__ = ["answered", "main", "measured"]


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    add = top.add_argument
    add("operators", nargs="*", metavar="operator", help=f"among {', '.join(QUESTIONS)}, lengths; default: all")
    add("--quick", action="store_true", help="T 512, D 64, three rounds, lengths to 8192, nothing compiled by torch")
    add("--lengths", type=integers, metavar="T,...", help="default 2048,8192")
    add("--widths", type=integers, metavar="D,...", help="default 64,128")
    add("--heads", type=int, default=8, help="default 8")
    add("--rounds", type=int, help="times each contender is asked; default 7")
    add("--budget", type=float, default=20.0, help="seconds a contender may take in a question; default 20")
    add("--threads", type=int, default=os.cpu_count(), help="of Numba, torch and BLAS; default: all cores")
    add("--seed", type=int, default=0, help="of the inputs; default 0")
    add("--no-compile", action="store_true", help="leave torch.compile out: it takes longer than all the rest")
    add("--json", metavar="FILE", help="keep the result; written after every question")
    add("--plot", metavar="FILE", help="draw it (.png, .svg or .pdf)")
    return top


def integers(text: str) -> list[int]:
    """Numbers of at least 1, separated by commas."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return sorted(set(numbers))


def chosen(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked before any work."""
    top = parser()
    arguments = top.parse_args(argv)
    unknown = sorted(set(arguments.operators) - {*QUESTIONS, "lengths"})
    if unknown:
        top.error(f"unknown operator {unknown[0]!r}; choose among {', '.join(QUESTIONS)}, lengths")
    for name, least in (("heads", 1), ("rounds", 1), ("threads", 1), ("seed", 0)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            top.error(f"--{name} must be at least {least}")
    if not 0 <= arguments.budget < float("inf"):
        top.error("--budget must be a number of seconds")
    try:
        check_files(arguments)
    except Refusal as problem:
        top.error(str(problem))
    quick = arguments.quick
    arguments.operators = arguments.operators or [*QUESTIONS, "lengths"]
    arguments.lengths = arguments.lengths or ([512] if quick else [2048, 8192])
    arguments.widths = arguments.widths or ([64] if quick else [64, 128])
    arguments.rounds = arguments.rounds or (3 if quick else 7)
    return arguments


def check_files(arguments: argparse.Namespace) -> None:
    """Refuse now what could not be written or drawn after the work."""
    if arguments.plot is not None:
        plotter(arguments.plot, "benchmarks.figure")
    for path in (arguments.json, arguments.plot):
        if path is not None:
            check_writable(path)


def commit() -> str:
    """The commit that is measured, marked if files differ from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def answered(question: Question, rounds: int, rng: np.random.Generator, budget: float = float("inf")) -> dict[str, Any]:
    """One question put to everybody: an entry of the result; matrix products are timed in the same rounds."""
    case, tokens = question.case, question.shape["B"] * question.shape["H"] * question.shape["T"]
    found = contest(
        question.contenders,
        reference(case),
        tolerance=question.tolerance,
        rounds=rounds,
        rng=rng,
        budget=budget,
        yardsticks=[products(), *question.yardsticks],
    )
    rate = 2 * measure.GEMM**3 / found["yardsticks"].pop("matrix product")["median"]
    own = min((r["seconds"]["median"] for r in found["results"] if r["contender"] in OURS), default=None)
    for entry in found["results"]:
        median = entry["seconds"]["median"]
        entry["ns_per_token_head"] = 1e9 * median / tokens
        entry["gemm_share"] = None if question.flop is None else question.flop * tokens / median / rate
        entry["over_ours"] = None if own is None else median / own
    about = {"operator": case.operator, "variant": case.variant, "shape": question.shape}
    dtype = str(next(iter(case.arrays.values())).dtype)
    return about | {"dtype": dtype, "flop_per_token_head": question.flop, "gemm_flop_per_second": rate} | found


def measured(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """All that was asked for, printed as it is found."""
    rng = np.random.default_rng(arguments.seed)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "command": arguments.command,
        "machine": machine(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
        "gemm_flop_per_second": {str(n): gemm_rate(n) for n in sorted({1, arguments.threads})},
        "questions": [],
        "crossover": None,
        "scaling": [],
        "summary": [],
    }
    print(report.heading(result), flush=True)
    told: set[str] = set()
    for name in (name for name in arguments.operators if name != "lengths"):
        for question in QUESTIONS[name](setting):
            entry = answered(question, arguments.rounds, rng, arguments.budget)
            result["questions"].append(entry)
            print(report.entry_table(entry, told), flush=True)
            keep(result, arguments.json)
    if "lengths" in arguments.operators:
        over_lengths(result, arguments, setting, rng)
    result["machine"]["load_at_the_end"] = machine()["load"]
    result["summary"] = summary(result)
    print(report.summary_table(result), flush=True)
    return result


def keep(result: dict[str, Any], path: str | None) -> None:
    """What has been found so far, so that a run that is ended early is not lost."""
    if path is not None:
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


def over_lengths(
    result: dict[str, Any], arguments: argparse.Namespace, setting: Setting, rng: np.random.Generator
) -> None:
    """The crossover and the cost over lengths."""
    longest, rounds = (8192 if arguments.quick else 65536), arguments.rounds
    short = [2**n for n in range(6, 14) if 2**n <= longest // 4]
    result["crossover"] = crossover(setting, short, rounds, rng, arguments.budget)
    print(report.crossover_table(result["crossover"]), flush=True)
    lengths = [2**n for n in range(10, 17) if 2**n <= longest]
    print(report.scaling_heading(lengths), flush=True)
    ways = [partial(scaling, name, variant) for name, variants in LINEAR.items() for variant in variants]
    for way in [*ways, sums]:
        entry = way(setting, lengths, rounds, rng, arguments.budget)
        result["scaling"].append(entry)
        print(report.scaling_line(entry, lengths), flush=True)
        keep(result, arguments.json)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit code is 0 unless the options were wrong."""
    arguments = chosen(argv)
    arguments.command = list(sys.argv[1:] if argv is None else argv)
    warnings.simplefilter("ignore")  # peers warn of their own futures
    setting = Setting(
        lengths=arguments.lengths,
        widths=arguments.widths,
        heads=arguments.heads,
        seed=arguments.seed,
        compiled=not (arguments.no_compile or arguments.quick),
    )
    for package in ("scipy.linalg", "torch"):  # one that is imported later would not be told its threads
        if find_spec(package) is not None:
            import_module(package)
    with using(arguments.threads), no_gradients():
        result = measured(arguments, setting)
    keep(result, arguments.json)
    if arguments.plot is not None:
        plotter(arguments.plot, "benchmarks.figure")(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
