"""Delta attention (DeltaFormer): softmax attention to values that say only what the memory did not know before.

    u_t = v_t - beta_t m_{t-1}(p_t),    o_t = m_t(q_t),    m_t(x) = sum_{i <= t} softmax_i(scale x . k_i) u_i

This is the delta rule for a memory that keeps its pairs: what is recalled under the key p_t (by default k_t) is taken
off the value before it is stored. The values of c tokens at once solve (I + diag(beta) A) U = V - diag(beta) (recalled
from the pairs before them), with A the strictly lower triangle of their weights.

[1] Zhong et al. (2025), Understanding Transformer from the perspective of associative memory, arXiv:2505.19488
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..calling import run
from ..notation import CacheState
from ._cache import answers, append, attend, cache_in_chunks, cached, empty_cache, own_pairs
from ._chunks import output_like, products, unit_lower_inverse
from .softmax_attention import average, scale_of

__all__ = ["chunked", "delta_attention", "recurrent"]


def delta_attention(
    q: Any, k: Any, v: Any, beta: Any, *, erase_key: Any = None, scale: float | None = None, **common: Any
) -> Any:
    """Delta attention; see ``ttr_np.delta_attention``."""
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "erase_key": erase_key}
    return run(chunked, "delta_attention", arrays, {"scale": scale}, start=empty_cache, **common)


@np.errstate(invalid="ignore")
def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    erase_key: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Token by token: recall, correct, store, answer. Cost: O(t^2 (k + v))."""
    o, factor = output_like(q, v, state.k), scale_of(scale, q)
    erase_key = k if erase_key is None else erase_key
    for t in range(q.shape[-2]):
        now = (..., slice(t, t + 1))
        known = average(factor * erase_key[..., t, :], state)[..., None, :]
        u = v[..., t : t + 1, :] - beta[now][..., None] * known
        state = append(state, k[..., t : t + 1, :], u, None, None if mask is None else mask[now])
        o[..., t, :] = average(factor * q[..., t, :], state)
    return o, state


@np.errstate(invalid="ignore")
def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    erase_key: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Chunks of c tokens: their values are corrected together, then asked. Cost: O(t^2 (k + v))."""
    return cache_in_chunks(
        partial(chunk, scale=scale),
        partial(recurrent, scale=scale),
        {"q": q, "k": k, "v": v, "beta": beta, "erase_key": erase_key, "mask": mask},
        {"q": -2, "k": -2, "v": -2, "beta": -1, "erase_key": -2, "mask": -1},
        state,
        64,
    )


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    erase_key: np.ndarray | None,
    mask: np.ndarray | None,
    scale: float | None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """One chunk: corrected values first, then answers."""
    factor = scale_of(scale, q)
    u = corrected(factor * (k if erase_key is None else erase_key), k, v, beta, mask, state)
    q = factor * q
    o = answers(q, own_pairs(products(q, k, None), mask), u, state)
    return o, append(state, k, u, None, mask)


def corrected(
    p: np.ndarray, k: np.ndarray, v: np.ndarray, beta: np.ndarray, mask: np.ndarray | None, state: CacheState
) -> np.ndarray:
    """Values of a chunk without what the pairs before each of them recall under its key p."""
    own = own_pairs(products(p, k, None), mask, newest=-1)
    shape = np.broadcast_shapes(p.shape[:-2], state.v.shape[:-2]) + v.shape[-2:]
    past = attend(cached(p, state), shape, state.v.dtype)
    top = np.maximum(past.top, own.max(axis=-1, initial=-np.inf))
    top = np.where(top == -np.inf, top.dtype.type(0), top)
    weights, rest = np.exp(own - top[..., None]), past.weight * np.exp(past.top - top)
    total = rest + weights.sum(axis=-1)
    share = np.divide(
        beta, total, out=np.zeros(np.broadcast_shapes(beta.shape, total.shape), total.dtype), where=total != 0
    )
    T = unit_lower_inverse(share[..., None] * weights)
    return T @ (v - (share * rest)[..., None] * past.value)
