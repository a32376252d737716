"""Log-linear attention: linear attention whose past is kept in buckets of dyadic age, each with its own weight.

    o_t = sum_l levels_tl S_t^(l)^T q_t,    S_t^(l) = sum over bucket l at step t of (decays over (i, t]) k_i v_i^T

The buckets are those of a Fenwick tree: the pair itself is bucket 0, and pair i lies in bucket bit_length(t XOR i), so
that at most one bucket of each size 1, 2, 4, ... covers the past. A step merges all buckets up to the lowest set bit of
t into one: T steps need bit_length(T - 1) + 1 buckets, and T log T work. With fewer ``levels`` the last bucket keeps
all that is older. Equal levels give linear attention.

[1] Guo et al. (2025), Log-linear attention, arXiv:2506.04761
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calling import run, zeros
from ..notation import LogLinearAttentionState
from ._chunks import gates_of, in_chunks, output_like, products

__all__ = ["chunked", "log_linear_attention", "recurrent"]


def log_linear_attention(q: Any, k: Any, v: Any, levels: Any, *, log_decay: Any = None, **common: Any) -> Any:
    """Log-linear attention; see ``ttr_np.log_linear_attention``."""
    if np.ndim(levels) == 0 or np.shape(levels)[-1] == 0:
        raise ValueError(f"levels needs axes (..., t, l) with l at least 1, got shape {np.shape(levels)}")
    arrays = {"q": q, "k": k, "v": v, "levels": levels, "log_decay": log_decay}
    return run(chunked, "log_linear_attention", arrays, start=start, **common)


def start(operator: str, lead: tuple[int, ...], sizes: dict[str, int], dtype: Any) -> LogLinearAttentionState:
    """Empty buckets; the count is an integer, so that it never rounds."""
    return zeros(operator, lead, sizes, dtype)._replace(count=np.zeros(lead, np.int64))


def bucket(t: np.ndarray, i: np.ndarray, last: int) -> np.ndarray:
    """Bucket of pair i at step t >= i: the number of bits up to the highest in which they differ."""
    return np.minimum(np.frexp((t ^ i).astype(np.float64))[1], last)


def counts_after(count: np.ndarray, t: int, mask: np.ndarray | None) -> np.ndarray:
    """Pairs memorised up to and with each step, ``(..., t)``."""
    return count[..., None] + (np.arange(1, t + 1) if mask is None else np.cumsum(mask, axis=-1))


def moves(count: np.ndarray, now: np.ndarray, levels: int) -> np.ndarray:
    """Where each bucket has gone to: its number at the steps ``now`` of what it was after ``count`` pairs.

    Parameters
    ----------
    count : (...)
    now : (..., t)
        Pairs memorised by then.

    Returns
    -------
    moved : (..., t, l)
        A bucket that was empty stays so, wherever it is said to have gone.
    """
    level = np.arange(levels)
    then = np.maximum(count - 1, 0)[..., None]
    oldest = (then >> level) << level  # a pair of each bucket
    moved = bucket(np.maximum(now - 1, 0)[..., :, None], oldest[..., None, :], levels - 1)
    return np.where(level == levels - 1, level, moved)


def merge(S: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Buckets ``(..., l, k, v)`` added up in their new places ``(..., l)``."""
    places = moved[..., None, :] == np.arange(S.shape[-3])[:, None]
    return np.einsum("...ml,...lkv->...mkv", places.astype(S.dtype), S)


@np.errstate(invalid="ignore")
def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    levels: np.ndarray,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    state: LogLinearAttentionState,
) -> tuple[np.ndarray, LogLinearAttentionState]:
    """The recurrence, token by token: merge, decay, put the new pair in bucket 0. Cost: O(t l k v)."""
    S, count = state
    o = output_like(q, v, S[..., 0, :, :])
    for t in range(q.shape[-2]):
        k_t, v_t, q_t = k[..., t, :], v[..., t, :], q[..., t, :]
        now = counts_after(count, 1, None if mask is None else mask[..., t : t + 1])
        S = merge(S, moves(count, now, S.shape[-3])[..., 0, :])
        if log_decay is not None:
            decay = np.exp(log_decay if log_decay.ndim == q.ndim else log_decay[..., None])
            S = decay[..., t, None, :, None] * S
        S[..., 0, :, :] += k_t[..., :, None] * v_t[..., None, :]
        o[..., t, :] = np.einsum("...l,...k,...lkv->...v", levels[..., t, :], q_t, S)
        count = now[..., 0]
    return o, LogLinearAttentionState(S, count)


@np.errstate(invalid="ignore")
def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    levels: np.ndarray,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    state: LogLinearAttentionState,
) -> tuple[np.ndarray, LogLinearAttentionState]:
    """Matrix products over chunks of c tokens. Cost: O(t (l k v + c (k + v)))."""
    per_channel = log_decay is not None and log_decay.ndim == q.ndim
    return in_chunks(
        chunk,
        recurrent,
        {"q": q, "k": k, "v": v, "levels": levels, "log_decay": log_decay, "mask": mask},
        {"q": -2, "k": -2, "v": -2, "levels": -2, "log_decay": -2 if per_channel else -1, "mask": -1},
        output_like(q, v, state.S[..., 0, :, :]),
        state,
        16 if per_channel else 64,
    )


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    levels: np.ndarray,
    log_decay: np.ndarray | None,
    mask: np.ndarray | None,
    state: LogLinearAttentionState,
) -> tuple[np.ndarray, LogLinearAttentionState]:
    """One chunk: a pair's weight is that of its bucket, and old buckets only ever move as a whole."""
    S, count = state
    buckets, c = S.shape[-3], q.shape[-2]
    now = counts_after(count, c, mask)
    gates = None if log_decay is None else gates_of(log_decay, log_decay.ndim == q.ndim)
    step = np.maximum(now - 1, 0)
    scores = products(q, k, None if gates is None else gates.pairs)
    o = (scores * weight_of(levels, bucket(step[..., :, None], step[..., None, :], buckets - 1))) @ v
    past = q if gates is None else q * gates.since
    moved = weight_of(levels, moves(count, now, buckets))
    for level in range(buckets):
        o = o + moved[..., level, None] * (past @ S[..., level, :, :])
    k_end = k if gates is None else k * gates.to_end
    S = merge(S, moves(count, now[..., -1:], buckets)[..., 0, :])
    S = S if gates is None else gates.since[..., -1, None, :, None] * S
    own = bucket(step[..., -1:], step, buckets - 1)
    for level in range(buckets):
        S[..., level, :, :] += np.swapaxes(np.where((own == level)[..., None], k_end, 0), -1, -2) @ v
    return o, LogLinearAttentionState(S, now[..., -1])


def weight_of(levels: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The level of each bucket, ``(..., t, n)``."""
    lead = np.broadcast_shapes(levels.shape[:-1], buckets.shape[:-1])
    levels, buckets = (np.broadcast_to(x, lead + x.shape[-1:]) for x in (levels, buckets))
    return np.take_along_axis(levels, buckets, axis=-1)
