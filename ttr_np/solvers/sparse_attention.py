"""Sparse attention: softmax's exponential replaced by a power that is cut off, so that far keys weigh exactly nothing.

    o_t = sum_i p_ti v_i,    p_ti = max((alpha - 1) s_ti - tau_t, 0)^(1 / (alpha - 1)),    s_ti = scale q_t . k_i

with the threshold tau_t at which the weights sum to 1: alpha-entmax, the point of the simplex next to the scores under
Tsallis' entropy. alpha = 2 is sparsemax, alpha -> 1 softmax. For unit keys and queries 1 - q . k is half a squared
distance, so alpha = 1 + 1/n is Nadaraya-Watson with the kernel (1 - u^2)^n (n = 1: Epanechnikov) and a bandwidth that
adapts to the data.

[1] Martins, Astudillo (2016), From softmax to sparsemax, arXiv:1602.02068
[2] Peters, Niculae, Martins (2019), Sparse sequence-to-sequence models, arXiv:1905.05702
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calling import run
from ..notation import CacheState
from ._cache import append, block_of, check_options, empty_cache, masked, mix, past_of
from ._chunks import output_like
from .softmax_attention import scale_of

__all__ = ["chunked", "entmax", "recurrent", "sparse_attention"]


def sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    alpha: float = 2.0,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    **common: Any,
) -> Any:
    """Attention with alpha-entmax weights, alpha > 1; see ``ttr_np.sparse_attention``."""
    check_options(q, None, causal, window)
    if not 1 < alpha < np.inf:
        raise ValueError(f"alpha must be above 1 and finite (softmax_attention is its limit 1); it is {alpha}")
    options = {"alpha": alpha, "scale": scale, "causal": causal, "window": window}
    return run(chunked, "sparse_attention", {"q": q, "k": k, "v": v}, options, start=empty_cache, **common)


def entmax(scores: np.ndarray, alpha: float) -> np.ndarray:
    """Weights of alpha-entmax along the last axis; a score of -inf gets none, a row of them all zeros.

    The threshold is found by sorting for alpha 2 and 1.5, else by bisection, down to neighbouring floats.
    """
    if scores.shape[-1] == 0:
        return scores
    z = ((alpha - 1) * scores).astype(np.float64)
    top = z.max(axis=-1, keepdims=True)
    z = np.maximum(z - np.where(top == -np.inf, 0, top), -1)  # weights are 0 from 1 below the top on
    find = {2.0: sparsemax_threshold, 1.5: entmax15_threshold}.get(float(alpha))
    tau = bisect(z, alpha) if find is None else find(-np.sort(-z, axis=-1))
    p = np.where(scores == -np.inf, 0, np.maximum(z - tau, 0) ** (1 / (alpha - 1)))
    total = p.sum(axis=-1, keepdims=True)
    return np.divide(p, total, out=np.zeros_like(p), where=total != 0).astype(scores.dtype)


def sparsemax_threshold(z: np.ndarray) -> np.ndarray:
    """The support of a row sorted downwards is the longest head whose excess over its last entry is below 1."""
    ranks = np.arange(1, z.shape[-1] + 1)
    heads = np.cumsum(z, axis=-1)
    return last_of(heads - 1, ranks, 1 + ranks * z > heads) / support(1 + ranks * z > heads)


def entmax15_threshold(z: np.ndarray) -> np.ndarray:
    """Each head would have the threshold tau = mean - sqrt(1 / n - variance); the longest above its own holds."""
    ranks = np.arange(1, z.shape[-1] + 1)
    mean = np.cumsum(z, axis=-1) / ranks
    # Welford's sums of squares: the variance of a head is never a difference of large numbers.
    before = np.concatenate([z[..., :1], mean[..., :-1]], axis=-1)
    spread = np.cumsum((z - before) * (z - mean), axis=-1)
    tau = mean - np.sqrt(np.maximum(1 - spread, 0) / ranks)
    return last_of(tau, ranks, (tau <= z) & (spread <= 1))


def support(inside: np.ndarray) -> np.ndarray:
    """Length of the head in which a condition holds, at least 1."""
    return np.maximum(inside.sum(axis=-1, keepdims=True), 1)


def last_of(x: np.ndarray, ranks: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Entry at the end of the head in which a condition holds."""
    return np.take_along_axis(x, support(inside) - 1, axis=-1)


def bisect(z: np.ndarray, alpha: float) -> np.ndarray:
    """The weights sum to at least 1 at tau = -1, where the top alone weighs 1, and to 0 at tau = 0."""
    low, high = np.full(z.shape[:-1] + (1,), -1.0), np.zeros(z.shape[:-1] + (1,))
    for _ in range(60):
        middle = (low + high) / 2
        enough = np.sum(np.maximum(z - middle, 0) ** (1 / (alpha - 1)), axis=-1, keepdims=True) >= 1
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    return low


@np.errstate(invalid="ignore")
def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    alpha: float = 2.0,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Token by token: the cache grows by a pair, and entmax weighs it. Cost: O(t^2 (k + v + log t))."""
    o = output_like(q, v, state.k)
    if not causal:
        state = append(state, k, v, None, mask)
    for t in range(q.shape[-2]):
        if causal:
            memorise = None if mask is None else mask[..., t : t + 1]
            state = append(state, k[..., t : t + 1, :], v[..., t : t + 1, :], None, memorise, window)
        scores = np.einsum("...k,...nk->...n", scale_of(scale, q) * q[..., t, :], state.k)
        scores = np.where(state.position < 0, -np.inf, scores)[..., None, :]
        o[..., t, :] = weigh(entmax(scores, alpha), state.v)[..., 0, :]
    return o, state


def weigh(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Sum of weighted values, ``(..., c, v)``: one of weight zero is out of sight, even a NaN."""
    return mix(p, v, np.where(p == 0, -np.inf, p))


@np.errstate(invalid="ignore")
def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    alpha: float = 2.0,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Blocks of queries: scores against blocks of keys, one threshold per row, then the values block by block.

    Rows are as long as the past, and a block holds so few of them that the workspace stays fixed, or one row.
    """
    o = output_like(q, v, state.k)
    t, n = q.shape[-2], state.k.shape[-2]
    seen = max(n + t if window is None else min(n + t, window), 256)
    block = block_of(o.shape[:-2], -(-seen // 256), 256, window)
    past = past_of(state, k, v, None, mask, block.pairs, causal, window)
    for low in range(0, t, block.queries):
        high = min(low + block.queries, t)
        query, part = scale_of(scale, q) * q[..., low:high, :], o[..., low:high, :]
        part[...] = 0
        views = list(past.views(low, high))
        scores = [masked(query @ np.swapaxes(x.k, -1, -2), x) for x in views]
        for p, x in zip(weights_of(scores, alpha), views, strict=True):
            part += weigh(p, x.v)
    return o, append(state, k, v, None, mask, window)


def weights_of(scores: list[np.ndarray], alpha: float) -> list[np.ndarray]:
    """Entmax of rows that come in pieces, in the same pieces."""
    if not scores:
        return []
    lead = np.broadcast_shapes(*(s.shape[:-1] for s in scores))
    rows = np.concatenate([np.broadcast_to(s, lead + s.shape[-1:]) for s in scores], axis=-1)
    return np.split(entmax(rows, alpha), np.cumsum([s.shape[-1] for s in scores])[:-1], axis=-1)
