"""Linear attention, with or without decay: one gradient step from zero on all (decayed) pairs at once.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t,    a_t = exp(log_decay_t)

With ``normalize`` the answer is divided by q_t . z_t, where z_t = a_t z_{t-1} + k_t: a smoother with kernel q . k.
With ``bonus`` u the answer reads S_{t-1} + (u * k_t) v_t^T: the current pair has a weight of its own.

[1] Katharopoulos et al. (2020), Transformers are RNNs, arXiv:2006.16236
[2] Yang et al. (2023), Gated linear attention transformers with hardware-efficient training, arXiv:2312.06635
[3] Peng et al. (2024), Eagle and Finch, arXiv:2404.05892 (bonus)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..calling import run, zeros
from ..notation import LinearAttentionState
from ._chunks import gates_of, in_chunks, kept, lag, output_like, products

__all__ = ["chunked", "linear_attention", "recurrent"]


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    bonus: Any = None,
    normalize: bool = False,
    scale: float = 1.0,
    **common: Any,
) -> Any:
    """Linear attention; see ``ttr_np.linear_attention``."""
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "bonus": bonus}
    options = {"normalize": normalize, "scale": scale}
    return run(chunked, "linear_attention", arrays, options, start=partial(start, normalize), **common)


def start(normalize: bool, operator: str, lead: tuple[int, ...], sizes: dict[str, int], dtype: Any) -> Any:
    """An empty memory; its normaliser exists only if the answers are normalised."""
    empty = zeros(operator, lead, sizes, dtype)
    return empty if normalize else empty._replace(z=None)


def divide(o: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Answers over their total weight; an empty memory answers zero."""
    return np.divide(o, weight[..., None], out=np.zeros_like(o), where=weight[..., None] != 0)


def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    bonus: np.ndarray | None = None,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    state: LinearAttentionState,
) -> tuple[np.ndarray, LinearAttentionState]:
    """The recurrence, token by token. Cost: O(t k v)."""
    S, z = state
    o = output_like(q, v, S)
    for t in range(q.shape[-2]):
        q_t, k_t, v_t = q[..., t, :], k[..., t, :], v[..., t, :]
        decay = 1.0 if log_decay is None else np.exp(gate(log_decay, q.ndim)[..., t, :])
        pair = k_t[..., :, None] * v_t[..., None, :]
        past = S if log_decay is None else kept(decay[..., :, None], S)
        past_z = z if log_decay is None or z is None else kept(decay, z)
        read = S + bonus[..., :, None] * pair if bonus is not None else past + pair
        o_t = np.einsum("...k,...kv->...v", q_t, read)
        if normalize:
            read_z = z + bonus * k_t if bonus is not None else past_z + k_t
            o_t = divide(o_t, np.sum(q_t * read_z, axis=-1))
            z = past_z + k_t
        o[..., t, :] = o_t if normalize else scale * o_t
        S = past + pair
    return o, LinearAttentionState(S, z)


def gate(log_decay: np.ndarray, ndim: int) -> np.ndarray:
    """Gates with a channel axis: one number per step holds for all channels."""
    return log_decay if log_decay.ndim == ndim else log_decay[..., None]


def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    bonus: np.ndarray | None = None,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    state: LinearAttentionState,
) -> tuple[np.ndarray, LinearAttentionState]:
    """Matrix products over chunks of tokens. Cost: O(t (k v + c (k + v))) with chunks of c tokens."""
    options = {"bonus": bonus, "normalize": normalize, "scale": scale}
    per_channel = log_decay is not None and log_decay.ndim == q.ndim
    return in_chunks(
        partial(chunk, **options),
        partial(recurrent, **options),
        {"q": q, "k": k, "v": v, "log_decay": log_decay},
        {"q": -2, "k": -2, "v": -2, "log_decay": -2 if per_channel else -1},
        output_like(q, v, state.S),
        state,
        64,
    )


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    bonus: np.ndarray | None,
    normalize: bool,
    scale: float,
    state: LinearAttentionState,
) -> tuple[np.ndarray, LinearAttentionState]:
    """One chunk: what its pairs say to each other, and what the past says to them."""
    S, z = state
    gates = None if log_decay is None else gates_of(log_decay, log_decay.ndim == q.ndim)
    read = gates if bonus is None or gates is None else lag(gates)
    scores = products(q, k, None if read is None else read.pairs, strict=bonus is not None)
    q_past, k_end = (q, k) if gates is None else (q * read.since, k * gates.to_end)
    o = scores @ v + q_past @ S
    if bonus is not None:
        own = np.einsum("...k,...k,...k->...", q, bonus[..., None, :], k)
        o += own[..., None] * v
    if normalize:
        weight = scores.sum(axis=-1) + np.einsum("...ck,...k->...c", q_past, z)
        o = divide(o, weight if bonus is None else weight + own)
    else:
        o *= scale
    keep = 1.0 if gates is None else gates.since[..., -1, :]
    S = (S if gates is None else keep[..., None] * S) + np.swapaxes(k_end, -1, -2) @ v
    return o, LinearAttentionState(S, keep * z + k_end.sum(axis=-2) if normalize else None)
