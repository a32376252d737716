"""Everything that needs a GPU, in one command and in ten minutes: ``python -m benchmarks.gpu``.

First the tests of the GPU backends on the device itself, then our backends against flash-linear-attention's Triton
kernels and torch: all in one process, in rounds, in an order shuffled each round, every call eager and as a CUDA graph,
each checked against the float64 solver before it is timed. Every part has its share of the time and is written as it is
found, so that nothing is lost when the time is over. Without a GPU it says why and ends with code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ttr_np.backends import ON_GPU, available_backends, devices
from ttr_np.cli import Refusal
from ttr_np.cli.outputs import check_writable
from ttr_np.cli.table import aligned, digits
from ttr_np.measure import Contender, Skipped, first_line, machine, relative_error, spread

from .floors import KINDS, Rates, Shape, askable, floor_seconds, rates_of, work
from .run import commit, keep
from .torch_peers import no_gradients

__all__ = ["FIRST", "SHAPES", "Clock", "answered", "main", "questions_of", "table_of"]

# Files in this order: what only a GPU shows, then the most telling of what was executed on the CPU.
TESTED = (
    "device", "streams", "wgmma", "linear_wgmma", "delta_wgmma", "least_squares", "chunks", "delta_chunks", "squares",
    "attention", "fuzz", "kernels",
)  # fmt: skip
TESTS = tuple(f"tests/test_cuda_{name}.py" for name in TESTED)
TESTS_SHARE = 0.35  # of the time
LEAST = 1e-3  # seconds of a sample: shorter calls are made several times
ROUNDS, RESERVE = 50, 5.0  # samples of each contender at most; seconds that are left for the end
QUESTION_SHARE = 3.0  # seconds for the rounds of one question, in equal shares of its contenders
TOLERANCE = 3e-2  # of the largest answer, for data of 8 bits of precision
COLUMNS = ("contender", "ms", "p20-p80", "x floor", "ns/token-head", "TB/s", "TFLOP/s", "error", "first s", "how")

# B x T x H x D: long and short sequences, heads of 64, many heads and few, then one token.
SHAPES = tuple(
    Shape(*sizes)
    for sizes in (
        (1, 32768, 32, 128), (1, 2048, 32, 128), (1, 1, 32, 128), (1, 2048, 16, 64), (1, 8192, 32, 128),
        (8, 2048, 32, 64), (1, 2048, 16, 128), (4, 4096, 32, 128), (1, 65536, 32, 128), (8, 8192, 32, 128),
        (4, 8192, 32, 128), (8, 1024, 32, 128), (1, 32768, 8, 128), (1, 8192, 64, 128), (1, 2048, 8, 128),
        (8, 1, 32, 128), (32, 1, 32, 128), (128, 1, 32, 128), (1, 1, 32, 64), (1, 32768, 32, 64),
    )
)  # fmt: skip
SOFTMAX = ("softmax", "softmax full", "softmax decode")
SLOW = ("mesa", "least squares", "local linear")
# Asked before every kind at every shape: what is short early, what may take long late.
FIRST = (
    (Shape(1, 32768, 32, 128), [kind for kind in KINDS if kind not in SOFTMAX + SLOW]),
    (Shape(1, 2048, 32, 128), KINDS),
    (Shape(1, 1, 32, 128), KINDS),
    (Shape(1, 8192, 32, 128), SOFTMAX),
    (Shape(1, 16384, 32, 128), SOFTMAX),
    (Shape(1, 2048, 16, 64), SLOW),
    (Shape(1, 32768, 32, 128), SLOW),
)


class Clock:
    """What is left of the time."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.end = now, now() + seconds

    def left(self) -> float:
        """Seconds, never below zero."""
        return max(0.0, self.end - self.now())


def missing() -> str:
    """Why nothing can be measured here; empty where it can."""
    states = available_backends()
    if states["cupy"] != "ok":  # its arrays hold everybody's data
        return "; ".join(f"{name}: {states[name]}" for name in ON_GPU)
    return "" if find_spec("torch") is not None else "torch is not installed"


def questions_of(
    shapes: Sequence[Shape], kinds: Sequence[str], first: Sequence[tuple[Shape, Collection[str]]] = ()
) -> list[tuple[str, Shape]]:
    """Those of ``first``, then every kind at every shape, shape after shape; each once, and only where it can be."""
    rows = [*first, *((shape, kinds) for shape in shapes)]
    pairs = dict.fromkeys((kind, shape) for shape, some in rows for kind in kinds if kind in some)
    return [pair for pair in pairs if askable(*pair)]


# ---- the tests -------------------------------------------------------------------------------------------------------


def tested(seconds: float, command: Sequence[str] = ()) -> dict[str, Any]:
    """The tests of the GPU backends on the device, as far as they come."""
    if find_spec("pytest") is None and not command:
        return {"reason": "pytest is not installed"}
    side_by_side = ["-n", "auto"] if find_spec("xdist") is not None else []
    without = ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # the second warns of processes side by side
    command = command or [sys.executable, "-m", "pytest", "-q", *without, *side_by_side, *TESTS]
    top, environment = Path(__file__).parent.parent, os.environ | {"TTR_TESTS_ON": "gpu", "PYTHONUNBUFFERED": "1"}
    start, over = time.monotonic(), False
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=top, env=environment
    ) as run:
        try:
            said, _ = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            over = True
            run.kill()
            said, _ = run.communicate()
    marks = "".join(re.findall(r"^([.FEsx]+)(?:\s+\[.*)?$", said, re.MULTILINE))
    counts = {name: marks.count(mark) for name, mark in (("passed", "."), ("failed", "F"), ("errors", "E"))}
    told = dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) (.*)$", said, re.MULTILINE))  # at once, and why at the end
    failures = [name for name in told if not any(other.startswith(f"{name} - ") for other in told)]
    found = counts | {"skipped": marks.count("s"), "seconds": time.monotonic() - start, "finished": not over}
    found["code"] = run.returncode
    return found | {"failures": failures, "end": said[-4000:] if failures or run.returncode else ""}


def tests_line(found: dict[str, Any]) -> str:
    """The tests in a line, and what failed."""
    if "reason" in found:
        return f"tests on the device: skipped: {found['reason']}"
    counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "errors", "skipped"))
    end = f"; pytest ended with code {found['code']}" if found["code"] else ""
    end = end if found["finished"] else "; cut off when their time was over"
    return "\n".join([f"tests on the device: {counts} in {found['seconds']:.0f} s{end}", *found["failures"]])


def all_right(found: dict[str, Any]) -> bool:
    """Whether no test failed, as far as they came, and whatever ran them ended well."""
    return not (found.get("failed") or found.get("errors") or found.get("finished") and found["code"])


# ---- the times -------------------------------------------------------------------------------------------------------


def trial(contender: Contender, exact: np.ndarray, beginning: Callable[..., Any], now: Callable[[], float]) -> Any:
    """First call: seconds and error, or why the contender is not timed."""
    start = now()
    try:
        error = relative_error(beginning(contender.call(), exact), exact)
    except Exception as problem:  # a peer may fail in any way; the others still run
        return {"contender": contender.name, "reason": f"{type(problem).__name__}: {first_line(problem)}"}
    if not error <= TOLERANCE:
        return {"contender": contender.name, "reason": f"wrong: error {error:.1e}, allowed {TOLERANCE:.0e}"}
    found = {"contender": contender.name, "detail": contender.detail, "error": error}
    return found | {"first_call_seconds": now() - start}


def rounds_of(
    contenders: Sequence[Contender], seconds_of: Callable[..., float], clock: Clock, rng: np.random.Generator
) -> dict[str, list[float]]:
    """Samples of everybody, in rounds. Who has used up an equal share of the time sits the later rounds out.

    One whose single call takes longer than that has this call as its only sample.
    """
    share = clock.left() / max(len(contenders), 1)
    warm = {c.name: seconds_of(c.call, 1) for c in contenders}
    calls = {name: max(1, int(LEAST / max(each, 1e-7))) for name, each in warm.items()}
    times: dict[str, list[float]] = {name: [each] if each > share else [] for name, each in warm.items()}
    for _ in range(ROUNDS):
        for j in rng.permutation(len(contenders)):
            contender = contenders[j]
            samples, repeats = times[contender.name], calls[contender.name]
            if not samples or sum(samples) * repeats < share:
                samples.append(seconds_of(contender.call, repeats))
    return times


def answered(
    question: Any,
    rates: Rates,
    seconds_of: Callable[..., float],
    beginning: Callable[..., Any],
    clock: Clock,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """One question put to everybody: an entry of the result."""
    kind, shape = question.kind, question.shape
    skipped = [{"contender": c.name, "reason": c.reason} for c in question.contenders if isinstance(c, Skipped)]
    able = [c for c in question.contenders if isinstance(c, Contender)]
    trials = {c.name: trial(c, question.exact, beginning, clock.now) for c in able}
    right = [c for c in able if "reason" not in trials[c.name]]
    skipped += [found for found in trials.values() if "reason" in found]
    own = Clock(min(QUESTION_SHARE, clock.left()), clock.now)
    times = rounds_of(right, seconds_of, own, rng)
    least, floor = work(kind, shape), floor_seconds(kind, shape, rates)
    entry = {"kind": kind, "shape": shape._asdict(), "floor_seconds": floor, "skipped": skipped, "results": []}
    for name, samples in times.items():
        median = spread(samples)["median"]
        entry["results"].append(
            trials[name]
            | {"seconds": spread(samples), "over_floor": median / floor}
            | {"ns_per_token_head": 1e9 * median / shape.token_heads}
            | {"bytes_per_second": least.bytes / median, "flop_per_second": least.flop / median}
        )
    return entry


def table_of(entry: dict[str, Any], told: set[str]) -> str:
    """One question: who answered how fast, beside the floor."""
    shape = Shape(**entry["shape"])
    rows = [cells_of(found) for found in sorted(entry["results"], key=lambda found: found["seconds"]["median"])]
    right = range(1, len(COLUMNS) - 1)
    table = aligned([COLUMNS, *rows], right=right, whole=[0]) if rows else "nobody"
    notes = [f"skipped: {found['contender']}: {found['reason']}" for found in entry["skipped"]]
    notes = [note for note in notes if note not in told]
    told.update(notes)
    floor = f"floor {digits(1e3 * entry['floor_seconds'])} ms"
    return "\n".join([f"\n{entry['kind']}: {shape}; {floor}", table, *(f"  {note}" for note in notes)])


def cells_of(found: dict[str, Any]) -> list[str]:
    """One contender's cells."""
    low, middle, high = (digits(1e3 * found["seconds"][name]) for name in ("p20", "median", "p80"))
    rates = [digits(found[f"{name}_per_second"] / 1e12) for name in ("bytes", "flop")]
    cells = [found["contender"], middle, f"{low}-{high}", digits(found["over_floor"], 2)]
    cells += [digits(found["ns_per_token_head"]), *rates, f"{found['error']:.1e}"]
    return [*cells, f"{found['first_call_seconds']:.2f}", found["detail"]]


def timed(result: dict[str, Any], arguments: argparse.Namespace, clock: Clock) -> None:
    """All questions for which there is time, each written when it is answered."""
    from . import gpu_peers

    rng, told = np.random.default_rng(arguments.seed), set()
    result["measured_rates"] = gpu_peers.measured_rates()._asdict()
    rates = rates_of(result["device"], Rates(**result["measured_rates"]))
    result["rates"] = rates._asdict()
    for kind, shape in questions_of(arguments.shapes or SHAPES, arguments.kinds, () if arguments.shapes else FIRST):
        if clock.left() < RESERVE:
            result["unasked"].append(f"{kind}: {shape}")
            continue
        try:
            question = gpu_peers.question(kind, shape, arguments.seed)
            entry = answered(question, rates, gpu_peers.seconds_of, gpu_peers.beginning, clock, rng)
        except Exception as problem:  # out of memory, say: the other questions are still asked
            nobody = {"contender": "everybody", "reason": f"{type(problem).__name__}: {first_line(problem)}"}
            floor = floor_seconds(kind, shape, rates)
            about = {"kind": kind, "shape": shape._asdict(), "floor_seconds": floor}
            entry = about | {"results": [], "skipped": [nobody]}
        result["questions"].append(entry)
        keep(result, arguments.json)
        print(table_of(entry, told), flush=True)


# ---- the command -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    add = top.add_argument
    add("--seconds", type=float, default=570.0, help="for everything; default 570")
    add("--json", metavar="FILE", default="gpu.json", help="the result, written as it is found; default gpu.json")
    add("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=f"among {', '.join(KINDS)}")
    add("--shapes", type=shapes_of, metavar="BxTxHxD,...", help="default: long, short, one token, then many others")
    add("--seed", type=int, default=0, help="of the inputs; default 0")
    add("--no-tests", action="store_true", help="only the times")
    add("--only-times", action="store_true", help=argparse.SUPPRESS)  # the process that is timed, ended from outside
    return top


def shapes_of(text: str) -> tuple[Shape, ...]:
    """Shapes as they are printed."""
    return tuple(Shape(*map(int, part.split("x"))) for part in text.split(","))


def chosen(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked before any work."""
    top = parser()
    arguments = top.parse_args(argv)
    unknown = sorted(set(arguments.kinds) - set(KINDS))
    if unknown:
        top.error(f"unknown kind {unknown[0]!r}; choose among {', '.join(KINDS)}")
    if not 0 < arguments.seconds < float("inf"):
        top.error("--seconds must be a positive number")
    try:
        check_writable(arguments.json)
    except Refusal as problem:
        top.error(str(problem))
    return arguments


def times_apart(arguments: argparse.Namespace, argv: Sequence[str], clock: Clock) -> None:
    """The times in a process of their own: a kernel that never ends is ended with it, and what was found is kept."""
    path = str(Path(arguments.json).resolve())
    command = [sys.executable, "-m", "benchmarks.gpu", *argv, "--only-times", "--json", path]
    if not ends([*command, "--seconds", f"{max(clock.left() - RESERVE, 1.0):.1f}"], clock.left()):
        print(f"the times were cut off: their process did not end in time; {path} has what was found")


def ends(command: Sequence[str], seconds: float) -> bool:
    """Whether a command ends in its time; if not, it is ended."""
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as run:
        try:
            run.wait(seconds)
        except subprocess.TimeoutExpired:
            run.kill()
            return False
    return True


def begun(arguments: argparse.Namespace) -> dict[str, Any]:
    """A result of which nothing is known yet but what it runs on."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "machine": machine(),
        "device": "; ".join(devices()),
        "seed": arguments.seed,
        "tests": {"reason": "left out by --no-tests"},
        "questions": [],
        "unasked": [],
    }


def heading(result: dict[str, Any]) -> str:
    """What it runs on, and what the columns mean."""
    packages = ", ".join(f"{name} {version}" for name, version in result["machine"]["packages"].items())
    return "\n".join(
        [
            f"{result['device']}; commit {result['commit']}, Python {result['machine']['python']}, {packages}",
            "error: largest difference from the NumPy solver in float64 at the beginning, over the largest answer",
            "x floor: time over the larger of bytes / copy rate and FLOP / product rate; small inputs stay in caches",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run everything; 2 if there is no GPU or the options were wrong, 1 if the tests went wrong, else 0."""
    arguments = chosen(argv)
    reason = missing()
    if reason:
        print(f"no GPU to measure on: {reason}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # peers warn of their own futures
    clock = Clock(arguments.seconds)
    if arguments.only_times:
        result = json.loads(Path(arguments.json).read_text(encoding="utf-8"))
        with no_gradients():
            timed(result, arguments, clock)
        keep(result, arguments.json)
        return 0
    result = begun(arguments)
    print(heading(result), flush=True)
    if not arguments.no_tests:
        result["tests"] = tested(TESTS_SHARE * clock.left())
        print(tests_line(result["tests"]), flush=True)
    keep(result, arguments.json)
    times_apart(arguments, sys.argv[1:] if argv is None else argv, clock)
    unasked = json.loads(Path(arguments.json).read_text(encoding="utf-8"))["unasked"]
    print(*(f"no time was left for {name}" for name in unasked), sep="\n")
    return int(not all_right(result["tests"]))


if __name__ == "__main__":
    sys.exit(main())
