"""Drift: a map that changes from segment to segment, and the families of memories that can follow it.

A sequence is cut into segments. Each has a centre m, uniform on the sphere, and a map A of its own, entries from
N(0, 1); its keys are (m + 0.7 z / sqrt d) brought to length one, z from N(0, I), and its values A k. Each value is
predicted from the pairs before it. Globally the map is not linear, so a linear memory has to forget; within a segment
it is, so a local constant is biased where a local line is not.

[1] Wang, Shi, Fox (2025), Test-time regression, arXiv:2501.12352
[2] Zuo et al. (2025), Local linear attention, arXiv:2510.01450
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from ..features import normalize_l2
from .protocol import at_least, best_scale, experiment, panel, predict, relative_error, row, trials, value_at

__all__ = ["drift", "segments"]

SEGMENTS = (32, 64, 128, 512)
SPREAD = 0.7
CLAIM = "The shorter the segments, the more a linear memory has to forget; a local line beats a local constant."

# The grid of each family: every combination of these numbers. Decay is per token.
FAMILIES: dict[str, tuple[str, dict[str, tuple[float, ...]]]] = {
    "gated linear attention": ("lightning", {"decay": (0.7, 0.8, 0.9, 0.95, 0.98, 1.0)}),
    "delta rule": ("delta_rule", {"beta": (0.25, 0.5, 0.75, 1.0, 1.25)}),
    "mesa": ("mesanet", {"decay": (0.7, 0.8, 0.9, 0.95, 0.98, 1.0), "ridge": (0.001, 0.01, 0.1, 1.0)}),
    "softmax": ("softmax", {"scale": (1.0, 4.0, 8.0, 16.0, 32.0, 64.0)}),
    "local linear": ("local_linear", {"scale": (1.0, 4.0, 8.0, 16.0, 32.0, 64.0), "ridge": (0.001, 0.01, 0.1)}),
}


def segments(rng: np.random.Generator, lead: int, length: int, size: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of ``lead`` sequences whose map changes every ``size`` tokens.

    Examples
    --------
    >>> k, v = segments(np.random.default_rng(0), 2, 8, 4, 3)
    >>> k.shape, v.shape
    ((2, 8, 3), (2, 8, 3))
    """
    count = -(-length // size)
    centre = normalize_l2(rng.standard_normal((lead, count, 1, d)))
    k = normalize_l2(centre + SPREAD * rng.standard_normal((lead, count, size, d)) / np.sqrt(d))
    v = k @ rng.standard_normal((lead, count, d, d))
    return tuple(x.reshape(lead, count * size, d)[:, :length] for x in (k, v))


def best_of(family: str, k: np.ndarray, v: np.ndarray, start: int, backend: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Errors of the best point of a family's grid, one number per repeat, and the point."""
    layer, grid = FAMILIES[family]
    tries = []
    for point in product(*grid.values()):
        chosen = dict(zip(grid, point, strict=True))
        gates = {"log_decay" if x == "decay" else x: np.log(y) if x == "decay" else y for x, y in chosen.items()}
        o, target = predict(layer, k, v, backend, **gates)[:, start - 1 :], v[:, start:]
        o = o * best_scale(o, target) if layer == "lightning" else o
        tries.append((relative_error(o, target), chosen))
    return min(tries, key=lambda found: np.mean(found[0]))


def drift(
    *,
    d: int = 16,
    length: int = 512,
    start: int = 8,
    sizes: Sequence[int] = SEGMENTS,
    repeats: int = 3,
    seed: int = 0,
    backend: Any = None,
) -> dict[str, Any]:
    """Error of predicting a map that changes, against the length of its segments; best of a small grid per family.

    Parameters
    ----------
    d : int, default 16
        Size of keys and values.
    length : int, default 512
        Tokens.
    start : int, default 8
        First token that is scored.
    sizes : sequence of int
        Tokens per segment.
    repeats : int, default 3
        Independent sequences.
    seed : int, default 0
        Of the draws.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.

    Returns
    -------
    dict
        As ``ttr_np.experiments`` says. One panel: squared error over the mean squared length of the values, against the
        segment length. Each row has ``chosen``, the point of the grid at each place.

    Raises
    ------
    BadInput
        A ``ValueError``: a setting out of range.

    Notes
    -----
    The best point is chosen in hindsight, on the scored tokens, for every family alike; gated linear attention also
    gets the best scale of its answers. Cost: that of 59 calls of a layer for each length; about ten seconds.

    References
    ----------
    Wang, Shi, Fox (2025), arXiv:2501.12352; Zuo et al. (2025), arXiv:2510.01450.

    Examples
    --------
    >>> from ttr_np.experiments import drift
    >>> result = drift(d=4, length=32, sizes=[16], repeats=1, backend="numpy")
    >>> [entry["name"] for entry in result["panels"][0]["rows"]][-1]
    'local linear'
    """
    rng = trials(seed, repeats)
    at_least("start", start, 1), at_least("length", length, start + 1)
    for size in sizes:
        at_least("sizes", size, 1)

    def work() -> tuple[list[dict[str, Any]], str]:
        found = []
        for size in sizes:
            k, v = segments(rng, repeats, length, size, d)
            found.append({family: best_of(family, k, v, start, backend) for family in FAMILIES})
        rows = [
            row(family, f"{layer}, best of {grid_text(grid)}", [x[family][0] for x in found])
            | {"chosen": [x[family][1] for x in found]}
            for family, (layer, grid) in FAMILIES.items()
        ]
        one = panel("segment length", sizes, f"squared error over mean |v|^2, tokens {start} on", rows, log="xy")
        return [one], finding(one)

    settings = {"d": d, "length": length, "start": start, "sizes": list(sizes), "repeats": repeats, "seed": seed}
    return experiment("drift", CLAIM, settings, work)


def grid_text(grid: dict[str, tuple[float, ...]]) -> str:
    """A grid in words."""
    return "; ".join(f"{name} {', '.join(f'{x:g}' for x in values)}" for name, values in grid.items())


def finding(found: dict[str, Any]) -> str:
    """What the numbers say: the best family at every segment length, and the next."""
    texts = []
    for place in found["places"]:
        ranked = sorted((value_at(found, entry["name"], place), entry["name"]) for entry in found["rows"])
        (best, first), (second, runner_up), *_ = ranked
        texts.append(f"{first} at {place} ({best:.2g}; then {runner_up} {second:.2g})")
    return f"Lowest error by segment length: {', '.join(texts)}."
