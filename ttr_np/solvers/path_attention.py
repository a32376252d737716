"""PaTH attention: softmax attention whose keys are reflected, or shrunk along a direction, by every later step.

    logit_ti = scale q_t . (H_t H_{t-1} ... H_{i+1}) k_i,    H_s = I - beta_s w_s w_s^T

The product is a position encoding made of data: 0 < beta < 2 shrinks, beta = 2 with |w| = 1 reflects. A step therefore
multiplies all cached keys by its H; c steps at once are the product I - W^T T W of the delta rule, with
T = (I + strictly lower triangle of diag(beta) W W^T)^-1 diag(beta).

[1] Yang et al. (2025), PaTH attention, arXiv:2505.16381
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..calling import run
from ..notation import CacheState
from ._cache import answers, append, cache_in_chunks, empty_cache, own_pairs
from ._chunks import output_like, products, unit_lower_inverse
from .softmax_attention import average, scale_of

__all__ = ["chunked", "path_attention", "recurrent"]


def path_attention(q: Any, k: Any, v: Any, beta: Any, w: Any, *, scale: float | None = None, **common: Any) -> Any:
    """PaTH attention; see ``ttr_np.path_attention``."""
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "w": w}
    return run(chunked, "path_attention", arrays, {"scale": scale}, start=empty_cache, **common)


@np.errstate(invalid="ignore")
def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    w: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Token by token: H_t moves every cached key, then the cache grows by a pair. Cost: O(t^2 (k + v))."""
    o = output_like(q, v, state.k)
    for t in range(q.shape[-2]):
        now = (..., slice(t, t + 1))
        w_t = w[..., t, :]
        along = beta[now] * np.einsum("...nk,...k->...n", state.k, w_t)
        state = state._replace(k=state.k - along[..., None] * w_t[..., None, :])
        memorise = None if mask is None else mask[now]
        state = append(state, k[..., t : t + 1, :], v[..., t : t + 1, :], None, memorise)
        o[..., t, :] = average(scale_of(scale, q) * q[..., t, :], state)
    return o, state


@np.errstate(invalid="ignore")
def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    w: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Chunks of c queries against all cached keys, which the chunk's product then moves. Cost: O(t^2 (k + v))."""
    return cache_in_chunks(
        partial(chunk, scale=scale),
        partial(recurrent, scale=scale),
        {"q": q, "k": k, "v": v, "beta": beta, "w": w, "mask": mask},
        {"q": -2, "k": -2, "v": -2, "beta": -1, "w": -2, "mask": -1},
        state,
        64,
    )


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    w: np.ndarray,
    mask: np.ndarray | None,
    scale: float | None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """One chunk: queries move back to its start for the cached keys, own keys forward to the queries and its end."""
    T = unit_lower_inverse(beta[..., None] * products(w, w, None, strict=True)) * beta[..., None, :]
    along = products(w, k, None, strict=True)  # (..., s, j): what step s finds of a key j before it
    removed = T @ along
    q = scale_of(scale, q) * q
    reads = products(q, w, None)
    own = own_pairs(products(q, k, None) - reads @ removed, mask)
    o = answers(q - reads @ T @ w, own, v, state)
    state = state._replace(k=state.k - (state.k @ np.swapaxes(w, -1, -2)) @ np.swapaxes(T, -1, -2) @ w)
    return o, append(state, k - np.swapaxes(removed, -1, -2) @ w, v, None, mask)
