"""Capacity: how many pairs a linear memory of d x d numbers holds, by how far the fit is carried.

Unit keys uniform on the sphere of R^d, values N(0, I); t pairs are stored, then each is read again. With c = k_i . k_j,
E c^2 = 1/d, the mean squared error of a value coordinate is

    linear attention         sum over j != i of E c^2                   = (t - 1) / d
    and with a scale s       (1 - s)^2 + s^2 (t - 1) / d, least at s = d / (d + t - 1):  (t - 1) / (d + t - 1)
    least squares            1 - (rank of the keys) / t                 = max(0, 1 - d / t)
    delta rule, one pass     a linear recursion of three moments        (``delta_rule_error``)

[1] Wang, Shi, Fox (2025), Test-time regression, arXiv:2501.12352
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..features import normalize_l2
from .protocol import ask_all, experiment, panel, row, trials, value_at

__all__ = ["capacity", "delta_rule_error"]

LOADS = (0.25, 0.5, 1.0, 2.0, 4.0)
GAIN = 20.0
RIDGE = 1e-9  # near enough to 0, where each token needs a solve of its own
CLAIM = "A memory of fixed size holds as much as its optimizer fits: one gradient step loses what least squares keeps."


def delta_rule_error(d: int, t: int) -> float:
    """Error of the delta rule with beta 1 when t random pairs are read again after one pass, exactly in expectation.

    Read with the stored unit key u, the column S of the memory changes by the later pair (k, w) to
    u . S + (u . k)(w - k . S). With r = v - u . S and E k k^T = I / d, E (u . k)^2 (k . S)^2 = (|S|^2 + 2 (u . S)^2) /
    (d (d + 2)), the moments a = E r^2, c = E (u . S)^2 and s = E |S|^2 obey a linear recursion.

    Parameters
    ----------
    d : int
        Size of the keys.
    t : int
        Pairs stored.

    Returns
    -------
    float
        Mean squared error per value coordinate, the values having variance 1.

    Examples
    --------
    >>> delta_rule_error(64, 1), round(delta_rule_error(64, 64), 2)
    (0.0, 0.6)
    """
    a = c = s = 0.0  # a and c are sums over the pairs stored so far: the recursion is linear
    for stored in range(t):
        spread = (stored * s + 2 * c) / (d * (d + 2)) + stored / d
        a, c = a + (stored - a - c) / d + spread, c - 2 * c / d + spread
        s = (1 - 1 / d) * s + 1
        c += 1.0  # the new pair is read without error: r = 0, u . S = v
    return a / t


def closed_forms(d: int, t: int) -> dict[str, float]:
    """What each method's error is in expectation."""
    return {
        "linear attention": (t - 1) / d,
        "scaled linear attention": (t - 1) / (d + t - 1),
        "delta rule": delta_rule_error(d, t),
        "least squares": max(0.0, 1 - d / t),
    }


def errors(k: np.ndarray, v: np.ndarray, backend: Any) -> dict[str, np.ndarray]:
    """Mean squared error of every method on the same pairs, one number per repeat."""
    t, d = k.shape[-2:]
    linear = ask_all("linear_attention", k, k, v, backend)
    answers = {
        "linear attention": linear,
        "scaled linear attention": linear * (d / (d + t - 1)),
        "delta rule": ask_all("delta_rule", k, k, v, backend, beta=1.0),
        "least squares": ask_all("recursive_least_squares", k, k, v, backend, log_decay=0.0, ridge=RIDGE),
        "softmax": ask_all("softmax", k, k, v, backend, scale=GAIN),
    }
    return {name: np.mean((v - o) ** 2, axis=(-2, -1)) for name, o in answers.items()}


ABOUT = {
    "linear attention": "linear_attention",
    "scaled linear attention": "linear_attention times d / (d + t - 1)",
    "delta rule": "delta_rule, beta 1, one pass",
    "least squares": f"recursive_least_squares, no forgetting, ridge {RIDGE:g}",
    "softmax": f"softmax, scale {GAIN:g}",
}


def capacity(
    *, d: int = 64, loads: Sequence[float] = LOADS, repeats: int = 20, seed: int = 0, backend: Any = None
) -> dict[str, Any]:
    """Error of reading stored pairs again, against the number of pairs per dimension, with the closed forms.

    Parameters
    ----------
    d : int, default 64
        Size of keys and values.
    loads : sequence of float
        Pairs stored, over d.
    repeats : int, default 20
        Independent draws of keys and values.
    seed : int, default 0
        Of the draws.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.

    Returns
    -------
    dict
        As ``ttr_np.experiments`` says. One panel: mean squared error per value coordinate against t / d.

    Raises
    ------
    BadInput
        A ``ValueError``: a setting out of range.

    Notes
    -----
    Cost: that of five layers on 2 t d tokens; some seconds.

    References
    ----------
    Wang, Shi, Fox (2025), arXiv:2501.12352; closed forms in the module.

    Examples
    --------
    >>> from ttr_np.experiments import capacity
    >>> result = capacity(d=8, loads=[1.0], repeats=2, backend="numpy")
    >>> result["panels"][0]["rows"][0]["theory"]
    [0.875]
    """
    rng = trials(seed, repeats)
    sizes = [max(1, round(load * d)) for load in loads]

    def work() -> tuple[list[dict[str, Any]], str]:
        found = []
        for t in sizes:
            k, v = normalize_l2(rng.standard_normal((repeats, t, d))), rng.standard_normal((repeats, t, d))
            found.append(errors(k, v, backend))
        theory = [closed_forms(d, t) for t in sizes]
        rows = [
            row(name, about, [x[name] for x in found], [x[name] for x in theory] if name in theory[0] else None)
            for name, about in ABOUT.items()
        ]
        one = panel("t/d", [t / d for t in sizes], "mean squared error per value coordinate", rows, log="x")
        return [one], finding(one)

    settings = {"d": d, "loads": list(loads), "repeats": repeats, "seed": seed}
    return experiment("capacity", CLAIM, settings, work)


def finding(found: dict[str, Any]) -> str:
    """What the numbers say, at the load nearest to one pair per dimension."""
    place = min(found["places"], key=lambda x: abs(x - 1))
    error = {entry["name"]: value_at(found, entry["name"], place) for entry in found["rows"]}
    return (
        f"At t = {place:g} d linear attention loses {error['linear attention']:.2f} of the variance of "
        f"what it reads again, {error['scaled linear attention']:.2f} with its best scale, the delta rule "
        f"{error['delta rule']:.2f}, least squares {error['least squares']:.2f}, softmax {error['softmax']:.2f}."
    )
