"""Over lengths: from where a linear memory beats softmax attention, and whether its cost per token stays the same.

The plainest work there is stands beside the costs, a sum of two arrays: long arrays leave the caches, and a machine
takes its time to hand out new memory. An operator whose tokens cost little grows with that, however it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ttr_np import Linear
from ttr_np.backends import available_backends, has_operator
from ttr_np.measure import TOLERANCE, Case, Contender, gated, ours, prefix, reference, sample, spread

from .questions import VARIANTS, Setting, arrays_of, channels
from .torch_peers import torch_peers

__all__ = ["LINEAR", "crossover", "scaling", "sums"]

LINEAR: dict[str, Sequence[str]] = {
    "linear_attention": tuple(VARIANTS),
    "delta_rule": tuple(VARIANTS),
    "dplr": ("channel",),
    "selective_scan": ("",),
    "diagonal_scan": ("",),
    "short_convolution": ("",),
    "recursive_least_squares": ("scalar",),
    "kalman_filter": ("",),
    "affine_projection": ("",),
    "mesa": ("scalar",),
    "test_time_training": ("",),
}
STEADY = 4096  # tokens from which the cost per token must not grow
CHECKED = 1024  # tokens on which the answers are checked: the float64 solver would take minutes for all


def best_backend(operator: str) -> str:
    """The compiled CPU backend where it has the operator."""
    compiled = available_backends()["numba"] == "ok" and has_operator("numba", operator)
    return "numba" if compiled else "numpy"


def case_of(operator: str, variant: str, t: int, setting: Setting) -> Case:
    """Inputs at the first width."""
    d = setting.widths[0]
    if operator == "selective_scan":
        return Case(operator, variant, channels(setting, t, d))
    options = {"memory": Linear()} if operator == "test_time_training" else {}
    return Case(operator, variant, arrays_of(operator, setting, variant, t=t, k=d, v=d, d=d), options)


def crossover(
    setting: Setting, lengths: Sequence[int], rounds: int, rng: np.random.Generator, budget: float
) -> dict[str, Any]:
    """Linear attention, our softmax attention and torch's over lengths; from where the first is faster than each."""
    found = []
    for t in lengths:
        linear, softmax = (case_of(name, "", t, setting) for name in ("linear_attention", "softmax_attention"))
        mine = [ours(case, best_backend(case.operator))._replace(name=case.operator) for case in (linear, softmax)]
        peers = [c for c in torch_peers(softmax, "softmax_attention", False) if isinstance(c, Contender)]
        right = gated(mine[:1], reference(linear), TOLERANCE["float32"])[0]
        right += gated([mine[1], *peers], reference(softmax), TOLERANCE["float32"])[0]
        times = sample(right, rounds, rng, budget)
        found.append({"T": t, "seconds": {name: spread(each) for name, each in times.items()}})
    others = {name for row in found for name in row["seconds"]} - {"linear_attention"}
    return {"D": setting.widths[0], "rows": found, "from": {name: faster_from(found, name) for name in sorted(others)}}


def faster_from(rows: Sequence[dict[str, Any]], other: str) -> int | None:
    """The shortest length from which linear attention is faster at every length measured; None if at none."""
    first = None
    for row in reversed(rows):
        times = row["seconds"]
        if not times.keys() >= {"linear_attention", other}:
            break
        if times["linear_attention"]["median"] >= times[other]["median"]:
            break
        first = row["T"]
    return first


def scaling(
    operator: str,
    variant: str,
    setting: Setting,
    lengths: Sequence[int],
    rounds: int,
    rng: np.random.Generator,
    budget: float,
) -> dict[str, Any]:
    """Cost per token of one head over lengths: beginnings of one long sequence, interleaved."""
    case, backend = case_of(operator, variant, max(lengths), setting), best_backend(operator)
    first = prefix(case, min(CHECKED, *lengths))
    about = {"operator": operator, "variant": variant, "backend": backend, "D": setting.widths[0]}
    right, _, skipped = gated([ours(first, backend)], reference(first), TOLERANCE["float32"])
    if not right:
        return about | {"reason": skipped[0]["reason"], "rows": [], "growth": None}
    contenders = [ours(prefix(case, t), backend)._replace(name=str(t)) for t in lengths]
    return about | costs(contenders, setting.heads, rounds, rng, budget)


def sums(
    setting: Setting, lengths: Sequence[int], rounds: int, rng: np.random.Generator, budget: float
) -> dict[str, Any]:
    """The same of one sum: as much is read as by a scan, and as much new memory is written as by every operator."""
    d = setting.widths[0]
    x, y = rng.standard_normal((2, setting.heads, max(lengths), d), np.float32)
    contenders = [Contender(str(t), partial(np.add, x[:, :t], y[:, :t])) for t in lengths]
    about = {"operator": "sum of two arrays", "variant": "", "backend": "numpy", "D": d}
    return about | costs(contenders, setting.heads, rounds, rng, budget)


def costs(
    contenders: Sequence[Contender], heads: int, rounds: int, rng: np.random.Generator, budget: float
) -> dict[str, Any]:
    """Times per token of one head and their growth, of contenders named by their lengths."""
    rows = [{"T": int(t), "seconds": spread(each)} for t, each in sample(contenders, rounds, rng, budget).items()]
    for row in rows:
        row["ns_per_token_head"] = 1e9 * row["seconds"]["median"] / (row["T"] * heads)
    return {"rows": rows, "growth": growth(rows)}


def growth(rows: Sequence[dict[str, Any]]) -> float | None:
    """By how much the dearest long sequence is dearer per token than the cheapest; None if fewer than two are long."""
    costs = [row["ns_per_token_head"] for row in rows if row["T"] >= STEADY]
    return max(costs) / min(costs) - 1 if len(costs) > 1 else None
