"""Conditioning: what correlated keys cost a memory that never inverts their covariance.

v = A k, entries of A from N(0, 1/d), keys from N(0, Sigma) with log-spaced eigenvalues, the largest kappa times the
smallest, and trace d. Each value is predicted from the pairs before it. After n pairs linear attention answers S^T k
with S = sum k_i v_i^T, so that with the second moment of the Wishart matrix sum k_i k_i^T

    E v . o = n tr Sigma^2,      E |o|^2 = n (n + 1) tr Sigma^3 + n tr Sigma^2 tr Sigma,      E |v|^2 = tr Sigma

and its least relative error under one scale for all n of a window of N tokens is
1 - (sum n tr Sigma^2)^2 / (N tr Sigma sum (n (n + 1) tr Sigma^3 + n tr Sigma^2 tr Sigma)): the factor (tr Sigma^2)^2 /
(tr Sigma tr Sigma^3) stays below one however many pairs come, unless Sigma is a multiple of I.

[1] Wang, Shi, Fox (2025), Test-time regression, arXiv:2501.12352
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .protocol import BadInput, at_least, best_scale, experiment, panel, predict, relative_error, row, trials, value_at

__all__ = ["conditioning", "linear_attention_error", "spectrum"]

KAPPAS = (1.0, 10.0, 100.0, 1000.0)
RIDGE = 1e-3
CLAIM = "Linear attention takes the keys' Gram matrix for the identity; online steps slow down, least squares does not."


def spectrum(d: int, kappa: float) -> np.ndarray:
    """Eigenvalues, log-spaced, the largest ``kappa`` times the smallest, with sum d.

    Examples
    --------
    >>> spectrum(2, 3.0)
    array([0.5, 1.5])
    """
    values = np.geomspace(1.0, kappa, d)
    return values * (d / values.sum())


def linear_attention_error(eigenvalues: np.ndarray, stored: np.ndarray) -> float:
    """Relative error of linear attention with the best scale for all numbers of stored pairs, in expectation.

    Parameters
    ----------
    eigenvalues : (d,)
        Of the covariance of the keys.
    stored : (N,)
        Pairs in memory at each prediction of the window.

    Examples
    --------
    >>> round(linear_attention_error(np.ones(16), np.array([1e9])), 6)
    0.0
    """
    one, two, three = (np.sum(eigenvalues**p) for p in (1, 2, 3))
    product = np.sum(stored * two)
    square = np.sum(stored * (stored + 1) * three + stored * two * one)
    return float(1 - product**2 / (square * len(stored) * one))


METHODS = {
    "scaled linear attention": ("linear_attention", {}),
    "NLMS, mu 1": ("nlms", {"beta": 1.0}),
    "NLMS, mu 0.5": ("nlms", {"beta": 0.5}),
    "RLS": ("recursive_least_squares", {"log_decay": 0.0, "ridge": RIDGE}),
}
ABOUT = {
    "scaled linear attention": "linear_attention times its best scale in hindsight",
    "NLMS, mu 1": "nlms, beta 1",
    "NLMS, mu 0.5": "nlms, beta 0.5",
    "RLS": f"recursive_least_squares, no forgetting, ridge {RIDGE:g}",
}


def errors(k: np.ndarray, v: np.ndarray, start: int, backend: Any) -> dict[str, np.ndarray]:
    """Relative squared error of every method from token ``start`` on, one number per repeat."""
    found = {}
    for name, (layer, gates) in METHODS.items():
        o, target = predict(layer, k, v, backend, **gates)[:, start - 1 :], v[:, start:]
        found[name] = relative_error(o * (best_scale(o, target) if layer == "linear_attention" else 1.0), target)
    return found


def conditioning(
    *,
    d: int = 16,
    length: int = 512,
    start: int = 256,
    kappas: Sequence[float] = KAPPAS,
    repeats: int = 20,
    seed: int = 0,
    backend: Any = None,
) -> dict[str, Any]:
    """Error of predicting a linear map, against the condition number of the keys' covariance.

    Parameters
    ----------
    d : int, default 16
        Size of keys and values.
    length : int, default 512
        Tokens.
    start : int, default 256
        First token that is scored.
    kappas : sequence of float
        Condition numbers, at least 1.
    repeats : int, default 20
        Independent draws of the map and the keys.
    seed : int, default 0
        Of the draws.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.

    Returns
    -------
    dict
        As ``ttr_np.experiments`` says. One panel: relative squared error against kappa.

    Raises
    ------
    BadInput
        A ``ValueError``: a setting out of range.

    Notes
    -----
    Cost: that of four layers on ``length`` tokens for each kappa; seconds.

    References
    ----------
    Wang, Shi, Fox (2025), arXiv:2501.12352; closed form in the module.

    Examples
    --------
    >>> from ttr_np.experiments import conditioning
    >>> result = conditioning(d=4, length=64, start=32, kappas=[10.0], repeats=2, backend="numpy")
    >>> result["panels"][0]["rows"][-1]["mean"][0] < 1e-6
    True
    """
    rng = trials(seed, repeats)
    at_least("start", start, 1), at_least("length", length, start + 1)
    if min(kappas) < 1:
        raise BadInput(f"kappas must be at least 1, got {min(kappas):g}")

    def work() -> tuple[list[dict[str, Any]], str]:
        found = []
        for kappa in kappas:
            k = rng.standard_normal((repeats, length, d)) * np.sqrt(spectrum(d, kappa))
            A = rng.standard_normal((repeats, d, d)) / np.sqrt(d)
            found.append(errors(k, k @ A, start, backend))
        stored = np.arange(start, length)  # token t is predicted from t pairs, counting from zero
        theory = [linear_attention_error(spectrum(d, kappa), stored) for kappa in kappas]
        rows = [
            row(name, about, [x[name] for x in found], theory if name == "scaled linear attention" else None)
            for name, about in ABOUT.items()
        ]
        one = panel("kappa", kappas, f"relative squared error, tokens {start} to {length - 1}", rows, log="xy")
        return [one], finding(one)

    settings = {"d": d, "length": length, "start": start, "kappas": list(kappas), "repeats": repeats, "seed": seed}
    return experiment("conditioning", CLAIM, settings, work)


def finding(found: dict[str, Any]) -> str:
    """What the numbers say, from the mildest condition number to the worst."""
    low, high = min(found["places"]), max(found["places"])
    texts = [
        f"{value_at(found, entry['name'], low):.2g} to {value_at(found, entry['name'], high):.2g} for {entry['name']}"
        for entry in found["rows"]
    ]
    return f"From condition number {low:g} to {high:g} the relative error goes from {'; '.join(texts)}."
