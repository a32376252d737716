"""What both backends do for memories that keep their pairs: where the pairs are, and how a launch over them is cut.

Queries that share a memory also share the tiles of its pairs: the rows of a launch are all steps of all their
sequences, step by step, so that row r is step r // groups of sequence r % groups.
"""

from __future__ import annotations

import warnings
from math import comb
from typing import Any, NamedTuple

import numpy as np

from ttr_np.backends import frames_of_package, function_refusal
from ttr_np.notation import CacheState
from ttr_np.solvers._cache import join, positions
from ttr_np.solvers.local_polynomial import KERNELS

from ._calls import Arrays
from ._sequences import BOTH, ROW

__all__ = ["DOT", "EXPONENTIAL", "NAMES", "Pairs", "pairs_of", "refusal_of", "report", "room_of", "width_of"]

NAMES = ("exponential", *KERNELS)  # a kernel's code is its place: from 2 on powers of 1 - u^2, the last one to the 0
EXPONENTIAL = 0
DOT = -1  # code of softmax attention: exponential as well, of the keys as they are


class Pairs(NamedTuple):
    """Everything the queries of one call can see.

    ``k, v``: cached pairs, then new ones; ``cached``: how many are cached; ``position``: of each pair, -1 where nothing
    is memorised; ``count``: pairs memorised up to and with each step; ``left``: log of what was left of cached pairs.
    Without a cache and a mask pair i is the one of step i, and the last three are None.
    """

    k: Any
    v: Any
    cached: int
    position: Any
    count: Any
    left: Any

    @property
    def arrays(self) -> Arrays:
        """For a launch."""
        own = {"k": BOTH, "v": BOTH, "position": ROW, "count": ROW, "left": ROW}
        return {name: (getattr(self, name), axes) for name, axes in own.items()}


def pairs_of(state: CacheState, k: Any, v: Any, mask: Any) -> Pairs:
    """The pairs of one call. Keys and values are copied only where they must be joined to cached ones."""
    cached = state.k.shape[-2]
    if not cached and mask is None:
        return Pairs(k, v, 0, None, None, None)
    position, count = positions(state, k.shape[-2], mask)
    if not cached:
        return Pairs(k, v, 0, position, count, None)
    joined = join(state.k, k, 2), join(state.v, v, 2)
    return Pairs(*joined, cached, join(state.position, position, 1), count, state.log_weight)


WARP = 32  # queries of a warp, and pairs that it takes in at a time
BYTES = 46 * 1024  # of shared memory that one fit may have
WIDEST = 64  # value columns that share one fit
TOLERANCE = 1e-12  # of conjugate gradients: residual over what it was before the first step


def coefficients(keys: int, degree: int) -> int:
    """Monomials up to a degree."""
    return comb(keys + degree, keys)


def room_of(keys: int, degree: int, values: int) -> int | None:
    """Value columns that fit in shared memory beside the triangle of one fit; None where not even eight do."""
    p, columns = coefficients(keys, degree), min(values, WIDEST)
    while columns > 1 and fit_bytes(p, keys, columns) > BYTES:
        columns = -(-columns // 2)
    return columns if fit_bytes(p, keys, min(columns, 8)) <= BYTES else None


def fit_bytes(p: int, keys: int, columns: int) -> int:
    """Shared memory of one fit: its triangle, 32 rows, and what else a query needs."""
    return 8 * ((WARP + p) * (p + columns) + 2 * keys + 2 * p + columns + WARP)


def refusal_of(backend: str, kernel: Any, degree: int, ridge: float, keys: int) -> str | None:
    """Why a backend cannot make a fit, or None."""
    p, problem = coefficients(keys, degree), function_refusal(backend, kernel, NAMES)
    if problem or degree < 1 or fit_bytes(p, keys, 8) <= BYTES:
        return problem
    if degree > 1:
        return f"backend {backend!r} has no room for the {p} coefficients of degree {degree} in {keys} channels"
    if not ridge > 0:
        return f"backend {backend!r} fits lines in {keys} channels from their covariance, which needs ridge > 0"
    return None


def width_of(scale: float | None, bandwidth: float | None, keys: int) -> np.float64:
    """What kernels multiply dot products or distances by."""
    if bandwidth is not None:
        return np.float64(1 / bandwidth)
    return np.float64(max(keys, 1) ** -0.5 if scale is None else scale)


def report(residual: Any, steps: int) -> None:
    """Warn where conjugate gradients have stopped too early; this waits for the device."""
    worst = float(residual.max()) if residual.size else 0.0
    if worst > TOLERANCE:
        words = f"conjugate gradients stopped after {steps} steps at a relative residual of {worst:.1e}"
        warnings.warn(f"local_polynomial: {words}", RuntimeWarning, stacklevel=frames_of_package())
