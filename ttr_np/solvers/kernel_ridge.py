"""Kernel ridge regression (Gaussian-process attention): the exact fit in the space of a kernel.

    o_t = kappa_t^T (K_t + ridge I)^-1 V_t,    K_t = kernel(k_i, k_j),  kappa_t = kernel(k_i, q_t),  i, j <= t

The Cholesky factor of a prefix is the leading block of the factor of the whole, and forward substitution never looks
ahead. So one factorisation L L^T = K + ridge I, by blocks of tokens, answers every prefix:

    o_t = (L_t^-1 kappa_t)^T (L_t^-1 V_t),    both factors the first t rows of L^-1 kappa_t and L^-1 V.

An exact nonparametric memory keeps every pair, and L has half a number for each two of them: memory O(n^2), cost
O(n^3 / 3 + n^2 (k + v)) for n pairs, and a continued sequence factorises its cache again. With the linear kernel the
answers are those of ridge regression (primal = dual).

With ``ridge=0`` the answers interpolate; keys that repeat (or that the kernel cannot tell apart within rounding) make
K singular, and then LinAlgError is raised.

[1] von Oswald et al. (2023), arXiv:2309.05858; Wang, Shi, Fox (2025), arXiv:2501.12352 (kernelised exact solution)
[2] Rasmussen, Williams (2006), Gaussian processes for machine learning, algorithm 2.1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..calling import run
from ..notation import CacheState
from ._cache import append, empty_cache
from ._chunks import unit_lower_inverse

__all__ = ["KERNELS", "chunked", "kernel_ridge", "recurrent"]

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def gaussian(x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    """exp(-|x - y|^2 / (2 bandwidth^2)), around the first key, so that an offset common to all costs no digits."""
    centre = x[..., :1, :]
    x, y = x - centre, y - centre
    squares = np.sum(x * x, axis=-1)[..., :, None] + np.sum(y * y, axis=-1)[..., None, :]
    return np.exp(np.minimum(x @ np.swapaxes(y, -1, -2) - squares / 2, 0) / bandwidth**2)


def exponential(x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    """exp(x . y / bandwidth^2): the kernel of softmax attention."""
    return np.exp(x @ np.swapaxes(y, -1, -2) / bandwidth**2)


def linear(x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    """x . y; the bandwidth is not used."""
    return x @ np.swapaxes(y, -1, -2)


def polynomial(x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    """(1 + x . y)^2; the bandwidth is not used."""
    return (1 + x @ np.swapaxes(y, -1, -2)) ** 2


KERNELS = {"gaussian": gaussian, "exponential": exponential, "linear": linear, "polynomial": polynomial}


def kernel_ridge(
    q: Any,
    k: Any,
    v: Any,
    *,
    kernel: str | Kernel = "gaussian",
    bandwidth: float = 1.0,
    ridge: float = 1.0,
    causal: bool = True,
    **common: Any,
) -> Any:
    """Kernel ridge regression; see ``ttr_np.kernel_ridge``."""
    check_options(kernel, ridge, bandwidth)
    function = kernel if callable(kernel) else partial(KERNELS[kernel], bandwidth=float(bandwidth))
    options = {"kernel": function, "ridge": float(ridge), "causal": causal}
    return run(chunked, "kernel_ridge", {"q": q, "k": k, "v": v}, options, start=empty_cache, **common)


def check_options(kernel: Any, ridge: Any, bandwidth: Any) -> None:
    """A ValueError that names an option and its value."""
    if not callable(kernel) and kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)} or a callable, got {kernel!r}")
    if np.ndim(ridge) or not 0 <= ridge < np.inf:
        raise ValueError(f"ridge must be a finite number >= 0, got {ridge}")
    if np.ndim(bandwidth) or not 0 < bandwidth < np.inf:
        raise ValueError(f"bandwidth must be a positive finite number, got {bandwidth}")


def recurrent(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: Any, **options: Any) -> tuple[np.ndarray, CacheState]:
    """The factor grown by one row per token. Cost: O(t n^2)."""
    return walk(1, q, k, v, *rest, **options)


def chunked(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: Any, **options: Any) -> tuple[np.ndarray, CacheState]:
    """The factor grown by blocks of tokens, each block answering its queries. Cost: O(n^3) in matrix products."""
    return walk(64, q, k, v, *rest, **options)


def walk(
    size: int,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    kernel: Kernel,
    ridge: float = 1.0,
    causal: bool = True,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Grow the factor ``size`` tokens at a time; answer on the way if causal, else at the end."""
    past, t = state.k.shape[-2], q.shape[-2]
    stored = np.broadcast_to(True if mask is None else mask, state.log_weight.shape[:-1] + (t,))
    present = np.concatenate([state.position >= 0, stored], axis=-1)
    keys = np.concatenate([state.k, np.broadcast_to(k, state.k.shape[:-2] + k.shape[-2:])], axis=-2)
    values = np.concatenate([state.v, np.broadcast_to(v, state.v.shape[:-2] + v.shape[-2:])], axis=-2)
    present, keys, values, spoilt = without_spoilt(present, keys, values)
    factor = Factor(keys, values, present, kernel, ridge)
    for low in range(0, past, size):
        factor.grow(min(low + size, past))
    lead = np.broadcast_shapes(q.shape[:-2], keys.shape[:-2])
    o = np.empty(lead + (t, v.shape[-1]), keys.dtype)
    for low in range(0, t, size):
        high = min(low + size, t)
        factor.grow(past + high)
        if causal:
            o[..., low:high, :] = factor.answer(q[..., low:high, :], past + low)
    for low in range(0, 0 if causal else t, size):
        high = min(low + size, t)
        o[..., low:high, :] = factor.answer(q[..., low:high, :], None)
    bad = spoilt[..., past:, :] if causal else spoilt[..., -1:, :]
    return np.where(bad, o.dtype.type(np.nan), o), append(state, k, v, None, mask)


def without_spoilt(
    present: np.ndarray, keys: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that are not finite are taken out; ``spoilt (..., n, v)`` says which answers they reach.

    A bad key spoils every later answer of its sequence, a bad value every later answer in its own channel.
    """
    bad_key = present & ~np.isfinite(keys).all(axis=-1)
    bad_value = present[..., None] & ~np.isfinite(values)
    spoilt = np.logical_or.accumulate(bad_value | bad_key[..., None], axis=-2)
    used = present & ~np.logical_or.accumulate(bad_key, axis=-1)
    return used, np.where(used[..., None], keys, 0), np.where(used[..., None] & ~spoilt, values, 0), spoilt


class Factor:
    """The growing factor L of K + ridge I, the inverses of its diagonal blocks, and Y = L^-1 V.

    A slot without a pair is a key that no other key knows: its row of K is zero, its diagonal one.
    """

    def __init__(self, k: np.ndarray, v: np.ndarray, present: np.ndarray, kernel: Kernel, ridge: float) -> None:
        n = k.shape[-2]
        self.k, self.v, self.present, self.kernel, self.ridge = k, v, present, kernel, ridge
        self.L = np.zeros(k.shape[:-2] + (n, n), k.dtype)
        self.Y = np.zeros(v.shape, v.dtype)
        self.bounds = [0]
        self.inverses: list[np.ndarray] = []

    def grow(self, high: int) -> None:
        """Take the pairs up to ``high`` into the factor."""
        low = self.bounds[-1]
        k, present = self.k[..., low:high, :], self.present[..., low:high]
        rows = self.solve(self.against(k) * present[..., None, :], low)
        self.L[..., low:high, :low] = np.swapaxes(rows, -1, -2)
        both = present[..., :, None] & present[..., None, :]
        gram = np.where(both, self.kernel(k, k), 0)
        gram[..., range(high - low), range(high - low)] += np.where(present, k.dtype.type(self.ridge), 1)
        L = np.linalg.cholesky(gram - np.swapaxes(rows, -1, -2) @ rows)
        scale = np.diagonal(L, axis1=-2, axis2=-1)
        self.L[..., low:high, low:high] = L
        self.inverses.append(unit_lower_inverse(L / scale[..., None, :]) / scale[..., :, None])
        self.Y[..., low:high, :] = self.inverses[-1] @ (
            self.v[..., low:high, :] - np.swapaxes(rows, -1, -2) @ self.Y[..., :low, :]
        )
        self.bounds.append(high)

    def against(self, x: np.ndarray) -> np.ndarray:
        """Kernel of the pairs taken in so far with other points, ``(..., n, points)``."""
        n = self.bounds[-1]
        if n == 0:
            return np.zeros(np.broadcast_shapes(self.k.shape[:-2], x.shape[:-2]) + (0, x.shape[-2]), self.k.dtype)
        return np.where(self.present[..., :n, None], self.kernel(self.k[..., :n, :], x), 0)

    def solve(self, right: np.ndarray, n: int) -> np.ndarray:
        """L^-1 times a right side of ``n`` rows, block by block."""
        x = np.empty(np.broadcast_shapes(self.L.shape[:-2], right.shape[:-2]) + right.shape[-2:], self.L.dtype)
        for low, high, inverse in zip(self.bounds, self.bounds[1:], self.inverses, strict=False):
            x[..., low:high, :] = inverse @ (right[..., low:high, :] - self.L[..., low:high, :low] @ x[..., :low, :])
        return x

    def answer(self, q: np.ndarray, first: int | None) -> np.ndarray:
        """Answers to queries, the first of which sees the pairs up to ``first``, the next one more; None: all pairs."""
        n = self.bounds[-1]
        read = np.swapaxes(self.solve(self.against(q), n), -1, -2)
        if first is not None:
            read = np.where(np.arange(n) <= first + np.arange(q.shape[-2])[:, None], read, 0)
        return read @ self.Y[..., :n, :]
