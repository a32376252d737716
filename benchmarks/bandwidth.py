"""Choosing a bandwidth by leave-one-out, against statsmodels: ``python -m benchmarks.bandwidth``.

Local linear and local constant fits of a noisy sine on 2000 points, both searches on the same data, interleaved in one
process; medians of several rounds, in wall and in processor time. Correct first: a search that ends at a worse
criterion than the other's is not timed.
"""

from __future__ import annotations

import warnings
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np

from ttr_np import selection

SEARCHES = {"local linear": (1, "ll"), "local constant": (0, "lc")}


def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and values."""
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 10, n))
    return x, np.sin(x) + 0.3 * rng.standard_normal(n)


def ours(x: np.ndarray, y: np.ndarray, degree: int) -> float:
    """What ``LocalPolynomialRegressor(bandwidth="loo")`` runs."""
    pairs = selection.Pairs(x[:, None], y[:, None], np.ones(len(x)), degree, "gaussian", 1e-6 if degree else 0.0)
    return selection.choose_bandwidth(pairs)


def theirs(x: np.ndarray, y: np.ndarray, kind: str) -> float:
    """Least-squares cross-validation of statsmodels."""
    from statsmodels.nonparametric.kernel_regression import KernelReg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(KernelReg(y, x, "c", reg_type=kind, bw="cv_ls").bw[0])


def criterion(x: np.ndarray, y: np.ndarray, degree: int, bandwidth: float) -> float:
    """Mean squared error of points left out."""
    pairs = selection.Pairs(x[:, None], y[:, None], np.ones(len(x)), degree, "gaussian", 0.0)
    errors, _ = selection.left_out(pairs, bandwidth, np.arange(len(x)))
    return float(np.mean(errors**2))


def timed(search: Any, *args: Any) -> tuple[float, float, float]:
    """The bandwidth, wall seconds and processor seconds."""
    start, used = perf_counter(), process_time()
    found = search(*args)
    return found, perf_counter() - start, process_time() - used


def compare(name: str, n: int = 2000, rounds: int = 5) -> dict[str, float]:
    """Bandwidths, their criteria, median seconds of both and how many times as fast ours is."""
    degree, kind = SEARCHES[name]
    x, y = drawn(n)
    found = {"ours": ours(x, y, degree), "theirs": theirs(x, y, kind)}
    scores = {who: criterion(x, y, degree, h) for who, h in found.items()}
    if not scores["ours"] <= scores["theirs"] * (1 + 1e-4):
        raise SystemExit(f"{name}: our bandwidth leaves {scores['ours']}, statsmodels' {scores['theirs']}: not timed")
    runs: dict[str, list[tuple[float, float, float]]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        runs["theirs"].append(timed(theirs, x, y, kind))
        runs["ours"] += [timed(ours, x, y, degree) for _ in range(5)]
    wall = {who: median(run[1] for run in done) for who, done in runs.items()}
    used = {who: median(run[2] for run in done) for who, done in runs.items()}
    return found | {
        "ours_seconds": wall["ours"],
        "theirs_seconds": wall["theirs"],
        "times_as_fast": wall["theirs"] / wall["ours"],
        "times_as_little_processor_time": used["theirs"] / used["ours"],
    }


if __name__ == "__main__":
    for name in SEARCHES:
        row = compare(name)
        print(
            f"{name}, n 2000: bandwidth {row['ours']:.4f} in {1e3 * row['ours_seconds']:.0f} ms; statsmodels "
            f"{row['theirs']:.4f} in {1e3 * row['theirs_seconds']:.0f} ms: {row['times_as_fast']:.0f} times as fast, "
            f"{row['times_as_little_processor_time']:.0f} times as little processor time"
        )
