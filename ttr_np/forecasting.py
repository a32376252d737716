"""One-step-ahead forecasts of a series by a layer as an adaptive memory over lagged values, strictly causal.

    k_t = (1, (y_{t-l} - y_{t-1}) / s_l for the lags l),    v_t = (y_t - y_{t-1}) / s
    forecast_t = y_{t-1} + s g_t m_{t-1}(k_t)

The memory after pair t - 1 is asked with key t: it has seen nothing of y_t. Keys and values are divided by the length
of the key and the answer is multiplied by it, so that every layer meets keys of length one; a linear relation stays
what it was, its pairs weighed as the normalised LMS filter weighs them. The factor g_t that would have made the answers
so far closest to what came lends a scale to layers that have none. A pair with a missing number is not memorised and
the memory stands still; in keys, and as the value to start from, a missing number is the last one measured.

[1] Wang, Shi, Fox (2025), Test-time regression, arXiv:2501.12352
[2] Vovk, Gammerman, Shafer (2005), Algorithmic learning in a random world (the bands)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .layers import layers as table
from .text_recall import BadInput, Progress, at_least, chosen_layers, machine

__all__ = ["DEFAULT_LAYERS", "Problem", "bands", "forecast", "pose", "predict"]

DEFAULT_LAYERS = (
    "linear_attention",
    "retnet",
    "delta_rule",
    "gated_deltanet",
    "titans_linear",
    "recursive_least_squares",
    "kalman",
    "qknorm",
    "forgetting_attention",
    "local_linear",
    "gaussian_process",
)
RECENT = 250  # residuals that a band looks back on
LARGEST = 1e150  # of a value; squares of larger ones overflow


class Problem(NamedTuple):
    """A series as a regression problem: row i is about step ``first + i``; the last row is the step to come.

    Keys and values have been divided by ``length``; ``memorise`` tells which pairs are complete; ``last`` is the value
    to start from; ``start`` the first row that is scored.
    """

    k: np.ndarray
    v: np.ndarray
    memorise: np.ndarray
    length: np.ndarray
    last: np.ndarray
    scale: float
    first: int
    start: int


def carried(y: np.ndarray) -> np.ndarray:
    """The series, a missing number replaced by the last one measured.

    Examples
    --------
    >>> carried(np.array([1.0, np.nan, 3.0]))
    array([1., 1., 3.])
    """
    measured = np.where(np.isfinite(y), np.arange(len(y)), 0)
    return y[np.maximum.accumulate(measured)]


def lagged(lags: int, season: int | None) -> np.ndarray:
    """The lags of a key beside the first: 2 to ``lags + 1``, and as many around a season.

    Examples
    --------
    >>> lagged(2, None), lagged(2, 12)
    (array([2, 3]), array([ 2,  3, 11, 12, 13]))
    """
    near = np.arange(2, lags + 2)
    around = np.arange(season - lags // 2, season + lags // 2 + 1) if season else near
    return np.union1d(near, around[around > 1])


def pose(y: np.ndarray, lags: int = 8, season: int | None = None, warmup: int | None = None) -> Problem:
    """Keys and values of the forecasts of a series, one row more than it has steps to learn from.

    Parameters
    ----------
    y : (t,)
        The series, NaN where it was not measured; its first number was.
    lags, season, warmup : int, optional
        As for ``forecast``. Scales come from the warm-up alone.

    Returns
    -------
    Problem

    Raises
    ------
    BadInput
        If the series is too short or has too many gaps.
    """
    back = lagged(lags, season)
    first, size = int(back.max()), 1 + len(back)
    warmup = max((len(y) - first) // 10, 2 * size) if warmup is None else at_least("warmup", warmup, 2)
    if len(y) < first + warmup + 1:
        words = "lags, season and warm-up together need"
        raise BadInput(f"the series is too short: its length is {len(y)}, {words} at least {first + warmup + 1}")
    y, full = np.append(y, np.nan), np.append(carried(y), np.nan)
    at = np.arange(first, len(y))
    sources = at[:, None] - back
    last, known = full[at - 1], np.isfinite(y)
    x, change = full[sources] - last[:, None], y[at] - last
    memorise = known[at] & known[at - 1] & known[sources].all(axis=-1)
    learnt = memorise[:warmup]
    if not learnt.any():
        raise BadInput(f"too many gaps: none of the first {warmup} steps was measured with all of its lags")
    if not np.any(known[at][warmup:]):
        raise BadInput(f"nothing to score: no number after the first {first + warmup} steps")
    scale = spread(change[:warmup][learnt])
    k = np.column_stack([np.ones(len(at)), x / spread(x[:warmup][learnt])])
    length = np.linalg.norm(k, axis=-1, keepdims=True)
    v = np.where(memorise, change / scale, 0.0)[:, None] / length
    return Problem(k / length, v, memorise, length[:, 0], last, float(scale), first, warmup)


def spread(x: np.ndarray) -> np.ndarray:
    """Root mean square along the first axis; 1 where that is nothing to divide by."""
    size = np.sqrt(np.mean(x**2, axis=0))
    return np.where(size > 0, size, 1.0)


def predict(name: str, problem: Problem, backend: Any = None) -> np.ndarray:
    """Forecasts of a layer of the table, one per row of the problem.

    Parameters
    ----------
    name : str
        Of the layer; its gates are the table's defaults.
    problem : Problem
        From ``pose``.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.

    Returns
    -------
    (n,) array
        The first row, asked of an empty memory, is the last value.
    """
    k, v = problem.k, problem.v
    with np.errstate(all="ignore"):  # a layer that diverges is told by name afterwards
        o = table[name](k[1:], k[:-1], v[:-1], mask=problem.memorise[:-1], backend=backend)
        o = np.concatenate([[0.0], o[:, 0]])
        return problem.last + problem.scale * problem.length * gains(o, problem) * o


def gains(o: np.ndarray, problem: Problem) -> np.ndarray:
    """At each row the factor that makes the answers before it closest to their values; 1 until there are enough."""
    pairs = np.cumsum(problem.memorise) - problem.memorise
    enough = pairs >= problem.k.shape[-1]
    counts = problem.memorise & enough
    products = np.cumsum(np.where(counts, o * problem.v[:, 0], 0.0))
    squares = np.cumsum(np.where(counts, o * o, 0.0))
    return np.append(1.0, np.divide(products, squares, out=np.ones_like(o), where=squares > 0)[:-1])


def bands(residuals: np.ndarray, level: float) -> np.ndarray:
    """Half widths of prediction bands, each from the residuals before it.

    Parameters
    ----------
    residuals : (n,)
        Measured minus forecast, NaN where nothing was measured.
    level : float
        Share of values that a band should hold, in (0, 1).

    Returns
    -------
    (n,) array
        At each row the ceil((m + 1) level)-th smallest of the m newest absolute residuals before it, at most 250: a
        value exchangeable with them is inside with at least that probability. Infinite while m is too small.
    """
    past: list[float] = []
    half = np.empty(len(residuals))
    for i, size in enumerate(np.abs(residuals)):
        recent = sorted(past[-RECENT:])
        rank = int(np.ceil((len(recent) + 1) * level - 1e-9))
        half[i] = recent[rank - 1] if rank <= len(recent) else np.inf
        if np.isfinite(size):
            past.append(float(size))
    return half


def scored(y: np.ndarray, forecasts: np.ndarray, problem: Problem, level: float) -> dict[str, Any]:
    """Errors, band and next value of one forecaster; ``series`` holds every step of it from the first row on."""
    now = np.append(y, np.nan)[problem.first :]
    half = bands(now - forecasts, level)
    inside = np.isfinite(now) & (np.arange(len(now)) >= problem.start)
    errors = (now - forecasts)[inside] / problem.scale
    covered = np.abs(errors) <= half[inside] / problem.scale
    edges = np.array([-half[-1], half[-1]])
    return {
        "rmse": float(problem.scale * np.sqrt(np.mean(errors**2))),
        "mae": float(problem.scale * np.mean(np.abs(errors))),
        "coverage": float(np.mean(covered)),
        "next": [float(forecasts[-1]), *(float(x) if np.isfinite(x) else None for x in forecasts[-1] + edges)],
        "series": {"forecast": forecasts, "half_width": half},
    }


def baselines(y: np.ndarray, problem: Problem, season: int | None) -> dict[str, np.ndarray]:
    """Forecasts that need no memory: the last value, and that of a season ago."""
    found = {"persistence": problem.last}
    if season:
        found["seasonal naive"] = carried(y)[problem.first - season : len(y) + 1 - season]
    return found


def measured(name: str, y: np.ndarray, problem: Problem, level: float, backend: Any) -> dict[str, Any]:
    """One layer of the result, or the reason why it is not in it."""
    layer = table[name]
    if layer.optimizer is None:
        return {"name": name, "reason": "not expressed yet; `ttr layers` says why"}
    if tuple(layer.data) != ("q", "k", "v"):
        return {"name": name, "reason": f"takes {', '.join(layer.data)}, not queries, keys and values"}
    if layer.operator is None:
        return {"name": name, "reason": f"runs by its definition only: {layer.reason}"}
    try:
        forecasts = predict(name, problem, backend)
    except (ValueError, NotImplementedError, np.linalg.LinAlgError) as problem_found:
        return {"name": name, "reason": " ".join(str(problem_found).split())}
    lost = int(np.sum(~np.isfinite(forecasts)))
    if lost:
        return {"name": name, "reason": f"diverged: {lost} of {len(forecasts)} forecasts are not finite"}
    about = {key: str(getattr(layer, key)) for key in ("weights", "regressor", "optimizer")}
    return {"name": name} | about | scored(y, forecasts, problem, level)


def forecast(
    values: Any,
    *,
    layers: Sequence[str] = DEFAULT_LAYERS,
    lags: int = 8,
    season: int | None = None,
    warmup: int | None = None,
    level: float = 0.9,
    backend: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Forecast every step of a series from the steps before it, by layers as adaptive memories, and score them.

    Weights, regressor and optimizer are those of each layer, the gates the table's defaults; nothing is trained.

    Parameters
    ----------
    values : (t,)
        The series in equal steps, NaN where it was not measured.
    layers : sequence of str
        Names in ``ttr_np.layers``.
    lags : int, default 8
        Lagged differences in a key; with a season there are ``lags + 1`` more around it.
    season : int, optional
        Steps after which the series repeats, at least 2.
    warmup : int, optional
        Steps after the longest lag that are learnt from and not scored; default: a tenth, at least twice the size of a
        key.
    level : float, default 0.9
        Share of values that the prediction bands should hold, in (0, 1).
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.
    progress : callable, optional
        Called as ``progress(done, total, name)`` before each layer and once at the end.

    Returns
    -------
    dict
        ``layers`` and ``baselines`` (persistence; with a season, the value of a season ago), each best first, each with
        ``rmse``, ``mae``, ``coverage`` of the bands, ``next`` (forecast, low and high of the step to come; the latter
        None while there is no band) and ``series``: ``forecast`` and ``half_width`` of every step from ``first`` on,
        the step to come included. ``not_run`` gives reasons.

    Raises
    ------
    BadInput
        A ``ValueError``: an unknown layer, an option out of range, a series too short, all missing or too large.

    Notes
    -----
    Changing the series from step t on changes no bit of the forecasts and bands up to step t (t after the warm-up,
    which sets the scales). The bands are those of split conformal prediction over the newest residuals. Cost: that of
    each layer on t tokens.

    References
    ----------
    Wang, Shi, Fox (2025), arXiv:2501.12352; Vovk, Gammerman, Shafer (2005).

    Examples
    --------
    >>> import numpy as np
    >>> from ttr_np.forecasting import forecast
    >>> wave = np.sin(np.arange(200) / 3)
    >>> result = forecast(wave, layers=["recursive_least_squares"], backend="numpy")
    >>> result["layers"][0]["rmse"] < 0.1 * result["baselines"][0]["rmse"]
    True
    """
    y, names = checked(values, lags, season, level), chosen_layers(layers)
    problem = pose(y, lags, season, warmup)
    entries = []
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names), name)
        entries.append(measured(name, y, problem, level, backend))
    if progress:
        progress(len(names), len(names), "")
    simple = baselines(y, problem, season)
    return machine() | {
        "steps": len(y),
        "missing": int(np.sum(~np.isfinite(y))),
        "memorised": int(problem.memorise.sum()),
        "scored": int(np.sum(np.isfinite(y[problem.first + problem.start :]))),
        "first": problem.first,
        "start": problem.first + problem.start,
        "lags": lags,
        "season": season,
        "level": level,
        "baselines": ranked([{"name": name} | scored(y, x, problem, level) for name, x in simple.items()]),
        "layers": ranked([entry for entry in entries if "reason" not in entry]),
        "not_run": [entry for entry in entries if "reason" in entry],
    }


def ranked(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Least error first."""
    return sorted(entries, key=lambda entry: entry["rmse"])


def checked(values: Any, lags: int, season: int | None, level: float) -> np.ndarray:
    """The series from its first measured number on, and a look at the options."""
    y = np.asarray(values, float)
    if y.ndim != 1:
        raise BadInput(f"values must have one axis, got {y.ndim}")
    if not np.any(np.isfinite(y)):
        raise BadInput(f"none of {len(y)} values is a number")
    if np.any(np.isinf(y)) or np.nanmax(np.abs(y)) > LARGEST:
        raise BadInput(f"values must be smaller than {LARGEST:g}")
    at_least("lags", lags, 1)
    if season is not None:
        at_least("season", season, 2)
    if not 0 < level < 1:
        raise BadInput(f"level must lie between 0 and 1, both excluded, got {level:g}")
    return y[np.argmax(np.isfinite(y)) :]
