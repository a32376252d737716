"""Softmax attention: a local constant fit to the values, weighted by the likeness of query and key.

    o_t = sum_{i <= t} w_ti v_i / sum_{i <= t} w_ti,    w_ti = exp(scale q_t . k_i + sum of log_decay over (i, t])

It minimises sum_i w_ti |v_i - b|^2 over constants b: the Nadaraya-Watson estimate. Unit keys and queries make w the
Gaussian kernel of their distance. A window keeps the newest keys in sight, besides the first few (the sinks).

[1] Vaswani et al. (2017), Attention is all you need, arXiv:1706.03762
[2] Milakov, Gimelshein (2018), Online normalizer calculation for softmax, arXiv:1805.02867 (one pass over the keys)
[3] Lin et al. (2025), Forgetting transformer, arXiv:2503.02130; Press et al. (2021), ALiBi, arXiv:2108.12409
[4] Xiao et al. (2023), Efficient streaming language models with attention sinks, arXiv:2309.17453
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calling import run
from ..notation import CacheState
from ._cache import append, attend, block_of, check_options, empty_cache, masked, mix, past_of
from ._chunks import output_like

__all__ = ["chunked", "recurrent", "softmax_attention"]


def softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    log_decay: Any = None,
    **common: Any,
) -> Any:
    """Softmax attention; see ``ttr_np.softmax_attention``."""
    check_options(q, log_decay, causal, window, sinks)
    options = {"scale": scale, "causal": causal, "window": window, "sinks": sinks}
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    return run(chunked, "softmax_attention", arrays, options, start=empty_cache, **common)


def scale_of(scale: float | None, q: np.ndarray) -> Any:
    """Factor of the logits in the dtype of the queries; by default 1 / sqrt(k)."""
    return q.dtype.type(max(q.shape[-1], 1) ** -0.5 if scale is None else scale)


@np.errstate(invalid="ignore")
def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Token by token: the cache grows by a pair, and each pair in it is weighed. Cost: O(t^2 (k + v))."""
    o = output_like(q, v, state.k)
    if not causal:
        state = append(state, k, v, log_decay, mask)
    for t in range(q.shape[-2]):
        if causal:
            now = (..., slice(t, t + 1))
            gate, memorise = (None if x is None else x[now] for x in (log_decay, mask))
            state = append(state, k[..., t : t + 1, :], v[..., t : t + 1, :], gate, memorise, window, sinks)
        o[..., t, :] = average(scale_of(scale, q) * q[..., t, :], state)
    return o, state


def average(q: np.ndarray, state: CacheState) -> np.ndarray:
    """Mean of the cached values, weighted by exp(q . k) and by what is left of each."""
    left = state.log_weight
    logits = np.where(left == -np.inf, left, np.einsum("...k,...nk->...n", q, state.k) + left)
    top = logits.max(axis=-1, initial=-np.inf, keepdims=True)
    weights = np.exp(logits - np.where(top == -np.inf, top.dtype.type(0), top))
    total = mix(weights[..., None, :], state.v, logits[..., None, :])[..., 0, :]
    weight = weights.sum(axis=-1, keepdims=True)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight != 0)


@np.errstate(invalid="ignore")
def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Blocks of queries times blocks of keys, in one pass. Cost: O(t min(t, window) (k + v)); memory O(t (k + v))."""
    o = output_like(q, v, state.k)
    block = block_of(o.shape[:-2], 1, 256, window)
    past = past_of(state, k, v, log_decay, mask, block.pairs, causal, window, sinks)
    for low in range(0, q.shape[-2], block.queries):
        high = min(low + block.queries, q.shape[-2])
        query, part = scale_of(scale, q) * q[..., low:high, :], o[..., low:high, :]
        scored = ((masked(query @ np.swapaxes(x.k, -1, -2), x), x.v) for x in past.views(low, high))
        part[...] = attend(scored, part.shape, o.dtype).value
    return o, append(state, k, v, log_decay, mask, window, sinks)
