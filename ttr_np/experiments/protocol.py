"""How an experiment asks a layer, and how it writes down what it found.

Two questions are asked of a memory. *Re-reading*: all pairs are stored, then each query is answered from all of them.
*Prediction*: the value of each token is predicted from the pairs strictly before it, m_{t-1}(k_t).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from ..layers import layers
from ..memory import Memory
from ..text_recall import BadInput, at_least, machine

__all__ = [
    "ask_all",
    "best_scale",
    "experiment",
    "panel",
    "predict",
    "relative_error",
    "row",
    "trials",
    "value_at",
]

ROOM = 1 << 24  # numbers of keys, or of their features, that one call may hold


def ask_all(name: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, backend: Any = None, **gates: Any) -> np.ndarray:
    """Store all pairs, then answer every query from all of them.

    Parameters
    ----------
    name
        Of a layer in the table.
    q : (n, queries, k)
    k : (n, t, k)
    v : (n, t, v)
        One memory for each of n.
    **gates
        Of the layer.
    """
    size = k.shape[-1] ** 2 if name == "symmetric_power" else k.shape[-1]
    step = max(1, ROOM // (max(k.shape[-2], q.shape[-2]) * size))
    pieces = [slice(i, i + step) for i in range(0, len(k), step)]
    return np.concatenate([Memory(name, backend=backend, **gates).memorize(k[i], v[i]).recall(q[i]) for i in pieces])


def predict(name: str, k: np.ndarray, v: np.ndarray, backend: Any = None, **gates: Any) -> np.ndarray:
    """Predict v_1, v_2, ... each from the pairs before it: the memory after pair t - 1 is asked with key t."""
    return layers[name](k[..., 1:, :], k[..., :-1, :], v[..., :-1, :], backend=backend, **gates)


def best_scale(o: np.ndarray, v: np.ndarray) -> float:
    """The number c that makes c o closest to v, over everything."""
    square = float(np.sum(o * o))
    return float(np.sum(o * v)) / square if square else 0.0


def relative_error(o: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared error over the mean squared length of the values of all repeats, one number per repeat."""
    return np.mean((v - o) ** 2, axis=(-2, -1)) / np.mean(v**2)


def row(name: str, about: str, runs: Sequence[np.ndarray], theory: Sequence[float] | None = None) -> dict[str, Any]:
    """One method: mean and standard error over repeats at each place of the axis.

    Parameters
    ----------
    name
        Of the method.
    about
        The layer and the gates it ran with.
    runs
        At each place, one number per repeat.
    theory
        At each place, what mathematics says the mean is.
    """
    errors = [float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else None for x in runs]
    exact = None if theory is None else [float(x) for x in theory]
    return {"name": name, "about": about, "mean": [float(np.mean(x)) for x in runs], "error": errors, "theory": exact}


def panel(
    axis: str, places: Sequence[float], measure: str, rows: list[dict[str, Any]], log: str = ""
) -> dict[str, Any]:
    """One table and one picture: methods as rows, ``places`` along ``axis``; ``log`` names the axes drawn as logs."""
    return {"axis": axis, "places": list(places), "measure": measure, "log": log, "rows": rows}


def value_at(found: Mapping[str, Any], name: str, place: float, key: str = "mean") -> float:
    """One number of a panel."""
    (method,) = (entry for entry in found["rows"] if entry["name"] == name)
    return method[key][found["places"].index(place)]


def trials(seed: int, repeats: int, least: int = 1) -> np.random.Generator:
    """The source of all random numbers of an experiment, after a look at its settings."""
    at_least("repeats", repeats, least)
    return np.random.default_rng(at_least("seed", seed, 0))


def experiment(
    name: str,
    claim: str,
    settings: Mapping[str, Any],
    work: Callable[[], tuple[list[dict[str, Any]], str]],
) -> dict[str, Any]:
    """Run the work and write down what it was, what it found, and how long it took."""
    begin = perf_counter()
    with np.errstate(over="ignore", invalid="ignore"):  # a memory that diverges is a result; it is told below
        panels, finding = work()
    numbers = [x for found in panels for entry in found["rows"] for x in entry["mean"]]
    if not np.all(np.isfinite(numbers)):
        raise BadInput(f"{name}: a memory diverged with these settings")
    about = {"experiment": name, "claim": claim, "settings": dict(settings), "panels": panels, "finding": finding}
    return machine() | about | {"seconds": perf_counter() - begin}
