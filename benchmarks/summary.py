"""What a result says, computed from it: how many times faster than each peer, what share of the machine, from where on.

Nothing is asserted on these numbers. A goal stands beside the number that it is a goal for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .questions import OURS

__all__ = ["GOALS", "summary"]

EVERY = "every variant"
GOALS: dict[tuple[str, str], dict[str, float]] = {  # times as fast as the best of a peer's ways, or a share in percent
    ("linear_attention", ""): {"torch": 2.0, "of GEMM": 70.0},
    ("linear_attention", "scalar"): {"torch": 2.0, "of GEMM": 70.0},
    ("linear_attention", "channel"): {"torch": 3.0, "of GEMM": 50.0},
    ("delta_rule", ""): {"torch": 3.0, "of GEMM": 50.0},
    ("delta_rule", "scalar"): {"torch": 3.0, "of GEMM": 50.0},
    ("delta_rule", "channel"): {"torch": 3.0, "of GEMM": 50.0},
    ("dplr", EVERY): {"of GEMM": 50.0},
    ("softmax_attention", "causal"): {"torch SDPA": 1.0},
    ("softmax_attention", "full"): {"torch SDPA": 0.9},
    ("mesa", EVERY): {"torch 30 CG": 5.0},
    ("selective_scan", EVERY): {"torch loop": 10.0, "torch scan": 2.0},
    ("recursive_least_squares", "1 series"): {"padasip": 100.0, "statsmodels": 20.0},
    ("recursive_least_squares", "256 series"): {"padasip": 1000.0},
    ("recursive_least_squares", "256 series, float32"): {"padasip": 1000.0},
    ("delta_rule", "NLMS, 1 series"): {"padasip": 100.0},
}


def goals_of(entry: dict[str, Any]) -> dict[str, float]:
    """What is aimed at for a question."""
    kind, variant = entry["operator"], entry["variant"]
    return GOALS.get((kind, variant), GOALS.get((kind, EVERY), {}))


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Claims: ``about, ours, seconds, what, reached, unit, goal, sure``.

    ``sure`` says whether the middle three fifths of the two times are apart; None where that means nothing.
    """
    claims = [claim for entry in result["questions"] for claim in of_question(entry)]
    return [*claims, *crossings(result["crossover"]), *growths(result["scaling"])]


def of_question(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The share of the machine's matrix products, then our fastest against each peer and each yardstick."""
    mine = best([found for found in entry["results"] if found["contender"] in OURS])
    if mine is None:
        return
    about = {"about": title(entry), "ours": mine["contender"], "seconds": mine["seconds"]["median"]}
    if mine["gemm_share"] is not None:
        yield about | claim("of GEMM", 100 * mine["gemm_share"], " %", goals_of(entry).get("of GEMM"))
    for name, peer in peers(entry).items():
        ratio = peer["seconds"]["median"] / mine["seconds"]["median"]
        goal, sure = goals_of(entry).get(name), apart(mine["seconds"], peer["seconds"])
        yield about | claim(peer["contender"], ratio, "x", goal, sure)
    for name, seconds in entry["yardsticks"].items():
        yield about | claim(f"the time of an {name}", mine["seconds"]["median"] / seconds["median"], "x")


def claim(what: str, reached: float | None, unit: str, goal: float | None = None, sure: bool | None = None) -> Any:
    """A number and what it is of."""
    return {"what": what, "reached": reached, "unit": unit, "goal": goal, "sure": sure}


def named(entry: dict[str, Any]) -> str:
    """Operator and variant."""
    return " ".join(part for part in (entry["operator"], entry["variant"]) if part)


def title(entry: dict[str, Any]) -> str:
    """Operator, variant, width and length."""
    return f"{named(entry)}, D {entry['shape']['D']} T {entry['shape']['T']}"


def best(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of some results."""
    return min(found, key=lambda one: one["seconds"]["median"], default=None)


def peers(entry: dict[str, Any]) -> dict[str, Any]:
    """The fastest of each peer's ways: eager and compiled are one peer."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in entry["results"]:
        if found["contender"] not in OURS:
            groups.setdefault(found["contender"].removesuffix(" compiled"), []).append(found)
    return {name: best(group) for name, group in groups.items()}


def apart(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether the middle three fifths of two do not overlap."""
    return one["p80"] < other["p20"] or other["p80"] < one["p20"]


def crossings(found: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """From where linear attention beats softmax attention."""
    for name, t in (found["from"] if found else {}).items():
        about = {"about": f"linear_attention, D {found['D']}, beats softmax", "ours": "", "seconds": None}
        yield about | claim(f"tokens on: {name}", t, "")


def growths(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The largest growth of the cost of a token from the shortest long sequence on."""
    grown = [entry for entry in entries if entry["growth"] is not None]
    for entry in sorted(grown, key=lambda entry: -entry["growth"])[:3]:
        about = {"about": "cost of a token, largest growth from T 4096 on", "ours": "", "seconds": None}
        yield about | claim(f"{named(entry)}", 100 * entry["growth"], " %")
