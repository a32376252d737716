"""Stick-breaking attention: from the newest pair to the oldest, each takes its share of what the later ones left.

    o_t = sum_{i < t} w_ti v_i,    w_ti = b_ti product_{i < j < t} (1 - b_tj),    b_ti = sigmoid(scale q_t . k_i)

The shares need no softmax and no position encoding: of two keys alike the newer takes more. What remains of the stick
weighs nothing, so the weights sum to at most 1: one full-batch step of a constant from zero. A query never sees the
pair of its own token. Products are sums of log(1 - b), all of one sign, and log b has its own formula: nothing cancels.

[1] Tan et al. (2024), Scaling stick-breaking attention, arXiv:2410.17980
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calling import run
from ..notation import CacheState
from ._cache import append, block_of, empty_cache, masked, mix, past_of
from ._chunks import output_like
from .softmax_attention import scale_of

__all__ = ["broken", "chunked", "recurrent", "stick_breaking_attention"]


def stick_breaking_attention(q: Any, k: Any, v: Any, *, scale: float | None = None, **common: Any) -> Any:
    """Stick-breaking attention; see ``ttr_np.stick_breaking_attention``."""
    arrays = {"q": q, "k": k, "v": v}
    return run(chunked, "stick_breaking_attention", arrays, {"scale": scale}, start=empty_cache, **common)


def broken(logits: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of pairs, oldest first, and the log of what they leave of the stick.

    Parameters
    ----------
    logits : (..., n)
        Of each pair's share; -inf takes nothing.
    left : (...)
        Log of what later pairs left.
    """
    small = np.log1p(np.exp(-np.abs(logits)))
    stick = np.empty((*logits.shape[:-1], logits.shape[-1] + 1))
    stick[..., :-1], stick[..., -1] = np.minimum(-logits, 0) - small, left  # log(1 - b)
    newest_first = stick[..., ::-1]
    np.cumsum(newest_first, axis=-1, out=newest_first)
    return np.exp(np.minimum(logits, 0) - small + stick[..., 1:].astype(logits.dtype)), stick[..., 0]


@np.errstate(invalid="ignore")
def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Token by token: the cache is asked before it grows by a pair. Cost: O(t^2 (k + v))."""
    o = output_like(q, v, state.k)
    for t in range(q.shape[-2]):
        logits = np.einsum("...k,...nk->...n", scale_of(scale, q) * q[..., t, :], state.k)
        logits = np.where(state.position < 0, -np.inf, logits)
        weights, _ = broken(logits, np.zeros(logits.shape[:-1]))
        o[..., t, :] = mix(weights[..., None, :], state.v, logits[..., None, :])[..., 0, :]
        memorise = None if mask is None else mask[..., t : t + 1]
        state = append(state, k[..., t : t + 1, :], v[..., t : t + 1, :], None, memorise)
    return o, state


@np.errstate(invalid="ignore")
def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Blocks of queries against blocks of keys, newest first, in one pass. Cost: O(t^2 (k + v))."""
    o = output_like(q, v, state.k)
    block = block_of(o.shape[:-2], 2, 256, None)
    past = past_of(state, k, v, None, mask, block.pairs, strict=True)
    for low in range(0, q.shape[-2], block.queries):
        high = min(low + block.queries, q.shape[-2])
        query, part = scale_of(scale, q) * q[..., low:high, :], o[..., low:high, :]
        part[...], left = 0, np.zeros(part.shape[:-1])
        for x in past.views(low, high):
            logits = masked(query @ np.swapaxes(x.k, -1, -2), x)
            weights, left = broken(logits, left)
            part += mix(weights, x.v, logits)
    return o, append(state, k, v, None, mask)
