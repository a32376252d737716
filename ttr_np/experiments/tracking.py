"""Tracking: a gated NLMS filter against the Kalman filter on a map that drifts, with its steady state in closed form.

x_t from N(0, I_d), y_t = w_t . x_t + sigma e_t, and w_{t+1} = a w_t + sqrt(q / d) z_t with a = sqrt(1 - q), so that
E |w|^2 stays 1. Gated NLMS keeps u_{t+1} = g (u_t + b x_t (y_t - u_t . x_t) / |x_t|^2): the delta rule with a gate g
and step size b / |x|^2. Its error D = w - u follows

    D_{t+1} = (a - g) w_t + g (I - b P_t) D_t - g b sigma e_t x_t / |x_t|^2 + sqrt(q / d) z_t,     P = x x^T / |x|^2.

With E P = I / d, E 1/|x|^2 = 1 / (d - 2), c = E w . D and m = E |D|^2 the steady state is

    c = (a (a - g) + q) / (1 - a g (1 - b / d))
    m = ((a - g)^2 + 2 g (a - g)(1 - b / d) c + g^2 b^2 sigma^2 / (d - 2) + q) / (1 - g^2 (1 - (2 b - b^2) / d))

and the risk of a prediction E (y - u . x)^2 = m + sigma^2. The Kalman filter knows a, q and sigma: it is the best there
is.

[1] Nagumo, Noda (1967); Kalman (1960); Wang, Shi, Fox (2025), Test-time regression, arXiv:2501.12352
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..layers import layers
from ..operators import kalman_filter
from .protocol import BadInput, at_least, experiment, panel, row, trials, value_at

__all__ = ["best_filter", "drifting", "steady_risk", "tracking"]

DRIFTS = (1e-4, 1e-3, 1e-2, 1e-1)
STEPS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
CLAIM = "A first-order memory with the right gate and step follows a drifting map, second order follows it closer."


def steady_risk(d: int, q: Any, sigma: float, gate: Any, step: Any) -> Any:
    """Risk of gated NLMS in its steady state: E (y - u . x)^2.

    Parameters
    ----------
    d : int
        Size of the keys, above 2.
    q : float
        Drift per step, in [0, 1).
    sigma : float
        Standard deviation of the noise.
    gate, step : float or array
        Gate g in (0, 1] and step size b in (0, 2); they broadcast.

    Examples
    --------
    >>> float(steady_risk(16, 0.0, 1.0, 1.0, 1e-9).round(6))
    1.0
    """
    a, g, b = np.sqrt(1 - q), np.asarray(gate, float), np.asarray(step, float)
    c = (a * (a - g) + q) / (1 - a * g * (1 - b / d))
    moved = (a - g) ** 2 + 2 * g * (a - g) * (1 - b / d) * c + g**2 * b**2 * sigma**2 / (d - 2) + q
    return moved / (1 - g**2 * (1 - (2 * b - b**2) / d)) + sigma**2


def best_filter(d: int, q: float, sigma: float, gated: bool = True) -> tuple[float, float]:
    """Gate and step size of the least steady risk, on a fine grid.

    Examples
    --------
    >>> gate, step = best_filter(16, 0.01, 0.3)
    >>> gate < 1, 0 < step < 1
    (True, True)
    """
    gates = 1 - np.geomspace(1e-6, 0.5, 400)[:, None] if gated else np.ones((1, 1))
    steps = np.geomspace(1e-3, 1.5, 800)
    i, j = np.unravel_index(np.argmin(risk := steady_risk(d, q, sigma, gates, steps)), risk.shape)
    return float(gates[i, 0]), float(steps[j])


def drifting(
    rng: np.random.Generator, lead: int, length: int, d: int, q: float, sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of ``lead`` series whose map drifts.

    Examples
    --------
    >>> x, y = drifting(np.random.default_rng(0), 2, 5, 3, 0.1, 0.3)
    >>> x.shape, y.shape
    ((2, 5, 3), (2, 5, 1))
    """
    x, noise = rng.standard_normal((lead, length, d)), sigma * rng.standard_normal((lead, length))
    w, y = rng.standard_normal((lead, d)) / np.sqrt(d), np.empty((lead, length, 1))
    for t in range(length):
        y[:, t, 0] = np.sum(w * x[:, t], axis=-1) + noise[:, t]
        w = np.sqrt(1 - q) * w + np.sqrt(q / d) * rng.standard_normal((lead, d))
    return x, y


def risks(o: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean squared error over the second half of every series, where the filters have settled."""
    half = y.shape[-2] // 2
    return np.mean((y[:, half:] - o[:, half - 1 :]) ** 2, axis=(-2, -1))


def gated_nlms(x: np.ndarray, y: np.ndarray, gate: float, step: float, backend: Any) -> np.ndarray:
    """Risk of gated NLMS, as the table's gated delta rule with step sizes b / |x|^2."""
    beta = step / np.sum(x * x, axis=-1)
    o = layers["gated_deltanet"](
        x[:, 1:], x[:, :-1], y[:, :-1], beta=beta[:, :-1], log_decay=np.log(gate), backend=backend
    )
    return risks(gate * o, y)  # the gate also closes a little before the next prediction


def kalman(x: np.ndarray, y: np.ndarray, q: float, sigma: float, backend: Any) -> np.ndarray:
    """Risk of the Kalman filter that knows how the map drifts."""
    d, a = x.shape[-1], np.sqrt(1 - q)
    model = {"process_noise": q / d, "measurement_noise": sigma**2, "ridge": float(d)}
    gates = {"log_transition": np.full(x.shape[:-2] + (x.shape[-2] - 1,), np.log(a))}
    return risks(a * kalman_filter(x[:, 1:], x[:, :-1], y[:, :-1], **model, **gates, backend=backend), y)


def by_step(rng: np.random.Generator, s: dict[str, Any], backend: Any) -> dict[str, Any]:
    """The risk of NLMS and gated NLMS at every step size, beside the Kalman filter's."""
    d, q, sigma = s["d"], s["drift"], s["sigma"]
    x, y = drifting(rng, s["repeats"], s["length"], d, q, sigma)
    gates = {"NLMS": 1.0, "gated NLMS": best_filter(d, q, sigma)[0]}
    rows = [
        row(
            name,
            f"gated_deltanet, beta b / |x|^2, gate {gate:.4g}",
            [gated_nlms(x, y, gate, b, backend) for b in s["steps"]],
            [steady_risk(d, q, sigma, gate, b) for b in s["steps"]],
        )
        for name, gate in gates.items()
    ]
    best = [kalman(x, y, q, sigma, backend)] * len(s["steps"])
    rows.append(row("Kalman filter", "kalman_filter, the true model", best))
    return panel("step size b", s["steps"], f"risk E (y - prediction)^2, drift q = {q:g}", rows)


def by_drift(rng: np.random.Generator, s: dict[str, Any], backend: Any) -> dict[str, Any]:
    """The risk of each filter with the gate and step that the closed form says are best, against the drift."""
    d, sigma = s["d"], s["sigma"]
    runs: dict[str, list[np.ndarray]] = {"NLMS": [], "gated NLMS": [], "Kalman filter": []}
    theory: dict[str, list[float]] = {"NLMS": [], "gated NLMS": []}
    for q in s["drifts"]:
        x, y = drifting(rng, s["repeats"], s["length"], d, q, sigma)
        for name in theory:
            gate, step = best_filter(d, q, sigma, gated=name == "gated NLMS")
            runs[name].append(gated_nlms(x, y, gate, step, backend))
            theory[name].append(float(steady_risk(d, q, sigma, gate, step)))
        runs["Kalman filter"].append(kalman(x, y, q, sigma, backend))
    about = {"NLMS": "gate 1, best b", "gated NLMS": "best gate and b", "Kalman filter": "the true model"}
    rows = [row(name, about[name], found, theory.get(name)) for name, found in runs.items()]
    return panel("drift q", s["drifts"], "risk E (y - prediction)^2 at the best gate and step size", rows, log="xy")


def tracking(
    *,
    d: int = 16,
    sigma: float = 0.3,
    drift: float = 1e-2,
    steps: Sequence[float] = STEPS,
    drifts: Sequence[float] = DRIFTS,
    length: int = 4000,
    repeats: int = 20,
    seed: int = 0,
    backend: Any = None,
) -> dict[str, Any]:
    """Risk of NLMS, gated NLMS and the Kalman filter on a drifting map, with the closed form of the first two.

    Parameters
    ----------
    d : int, default 16
        Size of the keys, above 2.
    sigma : float, default 0.3
        Standard deviation of the noise; the map itself has length one on average.
    drift : float, default 0.01
        Drift q per step of the first panel.
    steps : sequence of float
        Step sizes b of the first panel, in (0, 2).
    drifts : sequence of float
        Drifts q of the second panel, in (0, 1).
    length : int, default 4000
        Steps of a series; the second half is scored.
    repeats : int, default 20
        Independent series.
    seed : int, default 0
        Of the draws.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.

    Returns
    -------
    dict
        As ``ttr_np.experiments`` says. Two panels: risk against the step size, and against the drift.

    Raises
    ------
    BadInput
        A ``ValueError``: a setting out of range.

    Notes
    -----
    Cost: a pass of a filter over ``length`` steps for every number; seconds.

    References
    ----------
    Nagumo, Noda (1967); Kalman (1960); Wang, Shi, Fox (2025), arXiv:2501.12352; closed form in the module.

    Examples
    --------
    >>> from ttr_np.experiments import tracking
    >>> result = tracking(d=4, steps=[0.5], drifts=[0.01], length=200, repeats=2, backend="numpy")
    >>> [entry["name"] for entry in result["panels"][1]["rows"]]
    ['NLMS', 'gated NLMS', 'Kalman filter']
    """
    rng = trials(seed, repeats)
    at_least("d", d, 3), at_least("length", length, 4)
    check_open("sigma", [sigma], np.inf), check_open("steps", steps, 2), check_open("drifts", [drift, *drifts], 1)
    settings = {"d": d, "sigma": sigma, "drift": drift, "steps": list(steps), "drifts": list(drifts)}
    settings |= {"length": length, "repeats": repeats, "seed": seed}

    def work() -> tuple[list[dict[str, Any]], str]:
        panels = [by_step(rng, settings, backend), by_drift(rng, settings, backend)]
        return panels, finding(panels[1], sigma)

    return experiment("tracking", CLAIM, settings, work)


def check_open(name: str, values: Sequence[float], high: float) -> None:
    """Refuse numbers outside the open interval from 0 to ``high``."""
    for x in values:
        if not 0 < x < high:
            raise BadInput(f"{name} must lie between 0 and {high:g}, both excluded, got {x:g}")


def finding(found: dict[str, Any], sigma: float) -> str:
    """What the numbers say: each filter's risk above the noise, at the least and the largest drift."""
    texts = []
    for q in (min(found["places"]), max(found["places"])):
        above = [f"{value_at(found, entry['name'], q) - sigma**2:.3g} ({entry['name']})" for entry in found["rows"]]
        texts.append(f"{', '.join(above)} at drift {q:g}")
    return f"The risk above the noise is {'; '.join(texts)}."
