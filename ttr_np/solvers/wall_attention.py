"""Wall attention: softmax attention whose keys fade channel by channel.

    logit_ti = scale sum_c q_tc exp(sum of log_decay_c over (i, t]) k_ic

Forgetting attention subtracts from the logit as a whole; here a logit whose channels have faded is near zero, and its
pair weighs as much as any that says nothing. A step therefore multiplies all cached keys by its decay, and no factor is
ever above 1.

[1] flash-linear-attention, wall_attn (Averbuch, Pai; Tilde Research)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..calling import run
from ..notation import CacheState
from ._cache import answers, append, cache_in_chunks, empty_cache, own_pairs
from ._chunks import gates_of, kept, output_like, products
from .softmax_attention import average, scale_of

__all__ = ["chunked", "recurrent", "wall_attention"]


def wall_attention(q: Any, k: Any, v: Any, *, log_decay: Any = None, scale: float | None = None, **common: Any) -> Any:
    """Wall attention; see ``ttr_np.wall_attention``."""
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    return run(chunked, "wall_attention", arrays, {"scale": scale}, start=empty_cache, **common)


@np.errstate(invalid="ignore")
def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Token by token: every cached key fades, then the cache grows by a pair. Cost: O(t^2 (k + v))."""
    o = output_like(q, v, state.k)
    gates = log_decay if log_decay is None or log_decay.ndim == q.ndim else log_decay[..., None]
    for t in range(q.shape[-2]):
        now = (..., slice(t, t + 1), slice(None))
        if gates is not None:
            state = state._replace(k=kept(np.exp(gates[now]).astype(state.k.dtype), state.k))
        state = append(state, k[now], v[now], None, None if mask is None else mask[..., t : t + 1])
        o[..., t, :] = average(scale_of(scale, q) * q[..., t, :], state)
    return o, state


@np.errstate(invalid="ignore")
def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Chunks of c queries against all cached keys, which then fade by the chunk's decay. Cost: O(t^2 (k + v))."""
    per_channel = log_decay is not None and log_decay.ndim == q.ndim
    return cache_in_chunks(
        partial(chunk, scale=scale),
        partial(recurrent, scale=scale),
        {"q": q, "k": k, "v": v, "log_decay": log_decay, "mask": mask},
        {"q": -2, "k": -2, "v": -2, "log_decay": -2 if per_channel else -1, "mask": -1},
        state,
        16 if per_channel else 64,
    )


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    mask: np.ndarray | None,
    scale: float | None,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """One chunk: queries fade back to its start for the cached keys, keys fade to its end."""
    gates = None if log_decay is None else gates_of(log_decay, log_decay.ndim == q.ndim)
    q = scale_of(scale, q) * q
    own = own_pairs(products(q, k, None if gates is None else gates.pairs), mask)
    o = answers(q if gates is None else q * gates.since, own, v, state)
    if gates is not None:
        state, k = state._replace(k=kept(gates.since[..., -1:, :], state.k)), kept(gates.to_end, k)
    return o, append(state, k, v, None, mask)
