"""Affine projection: the smallest change of the memory that fits the last pairs.

With the last ``order`` pairs as rows of K (p x k) and V (p x v),

    S_t = S_{t-1} + beta_t K^T (K K^T + ridge I)^-1 (V - K S_{t-1}),    o_t = S_t^T q_t

With beta = 1 and ridge = 0 the new memory recalls those pairs exactly and is the nearest one to the old that does.
Order 1 is the normalised delta rule (NLMS). Where the keys depend on each other (repeated keys, or fewer than ``order``
pairs so far) and ridge = 0, the inverse is the pseudo-inverse: eigenvalues of K K^T below p eps times the largest count
as zero, and the change stays the smallest one that fits best. Every step needs the one before: no chunked form.

[1] Ozeki, Umeda (1984), An adaptive filtering algorithm using an orthogonal projection to an affine subspace
"""

from __future__ import annotations

from functools import partial
from operator import index
from typing import Any

import numpy as np

from ..calling import run
from ..notation import AffineProjectionState
from ._chunks import output_like

__all__ = ["affine_projection", "recurrent"]


def affine_projection(q: Any, k: Any, v: Any, beta: Any, *, order: int = 2, ridge: float = 0.0, **common: Any) -> Any:
    """Affine projection; see ``ttr_np.affine_projection``."""
    check_options(order, ridge)
    arrays = {"q": q, "k": k, "v": v, "beta": beta}
    return run(recurrent, "affine_projection", arrays, {"ridge": float(ridge)}, start=partial(start, order), **common)


def check_options(order: int, ridge: float) -> None:
    """At least one pair is fitted, and no ridge is negative."""
    if index(order) < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    if np.ndim(ridge) or not 0 <= ridge < np.inf:
        raise ValueError(f"ridge must be a finite number >= 0, got {ridge}")


def start(order: int, operator: str, lead: tuple[int, ...], sizes: dict[str, int], dtype: Any) -> AffineProjectionState:
    """An empty memory; pairs that are not there yet are zero, which no fit depends on."""
    return AffineProjectionState(
        np.zeros(lead + (sizes["k"], sizes["v"]), dtype),
        np.zeros(lead + (order - 1, sizes["k"]), dtype),
        np.zeros(lead + (order - 1, sizes["v"]), dtype),
    )


def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    ridge: float = 0.0,
    state: AffineProjectionState,
) -> tuple[np.ndarray, AffineProjectionState]:
    """The recurrence, token by token. Cost: O(t (p k v + p^2 k + p^3)) for order p."""
    S, K, V = state
    o = output_like(q, v, S)
    for t in range(q.shape[-2]):
        K_t, V_t = follow(K, k[..., t, :]), follow(V, v[..., t, :])
        step = beta[..., t, None, None] * solve(K_t @ np.swapaxes(K_t, -1, -2), ridge, V_t - K_t @ S)
        change = np.swapaxes(K_t, -1, -2) @ step
        stored = True if mask is None else mask[..., t, None, None]
        S = np.where(stored, S + change, S)
        K, V = np.where(stored, K_t[..., 1:, :], K), np.where(stored, V_t[..., 1:, :], V)
        o[..., t, :] = np.einsum("...kv,...k->...v", S, q[..., t, :])
    return o, AffineProjectionState(S, K, V)


def follow(past: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The rows of the past, then x."""
    return np.concatenate([past, np.broadcast_to(x, past.shape[:-2] + x.shape[-1:])[..., None, :]], axis=-2)


def solve(gram: np.ndarray, ridge: float, error: np.ndarray) -> np.ndarray:
    """(gram + ridge I)^-1 error; of minimum norm without a ridge. A NaN stays in its own sequence."""
    eye = np.eye(gram.shape[-1], dtype=gram.dtype)
    finite = np.isfinite(gram).all(axis=(-1, -2), keepdims=True)
    values, vectors = np.linalg.eigh(np.where(finite, gram, eye))
    least = gram.shape[-1] * np.finfo(gram.dtype).eps * values.max(axis=-1, keepdims=True)
    shifted = np.where(values > (least if ridge == 0 else -np.inf), values, 0) + gram.dtype.type(ridge)
    inverse = np.divide(1, shifted, out=np.zeros_like(shifted), where=shifted > 0)
    solved = vectors @ (inverse[..., None] * (np.swapaxes(vectors, -1, -2) @ error))
    return np.where(finite, solved, np.nan)
