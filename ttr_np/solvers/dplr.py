"""Diagonal plus low rank: a linear memory that reads itself along one direction and writes the reading along another.

    S_t = diag(d_t) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T,    o_t = S_t^T q_t,    d_t = exp(log_decay_t)

Many layers are instances: the delta rule has a = -d beta p, b = k and values beta v; RWKV-7 has a = -k', b = alpha k'.

[1] Peng et al. (2025), RWKV-7 "Goose", arXiv:2503.14456
[2] Yang et al. (2024), Parallelizing linear transformers with the delta rule, arXiv:2406.06484
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..calling import run
from ..notation import DplrState
from ._chunks import gates_of, in_chunks, lag, output_like, products, unit_lower_inverse

__all__ = ["chunked", "dplr", "recurrent"]


def dplr(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    *,
    log_decay: Any = None,
    scale: float = 1.0,
    **common: Any,
) -> Any:
    """Diagonal plus low rank; see ``ttr_np.dplr``."""
    arrays = {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay}
    return run(chunked, "dplr", arrays, {"scale": scale}, **common)


def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    log_decay: np.ndarray | None = None,
    *,
    scale: float = 1.0,
    state: DplrState,
) -> tuple[np.ndarray, DplrState]:
    """The recurrence, token by token. Cost: O(t k v)."""
    (S,) = state
    o = output_like(q, v, S)
    for t in range(q.shape[-2]):
        reading = np.einsum("...kv,...k->...v", S, a[..., t, :])
        if log_decay is not None:
            decay = np.exp(log_decay[..., t, :, None] if log_decay.ndim == q.ndim else log_decay[..., t, None, None])
            S = decay * S
        S = S + b[..., t, :, None] * reading[..., None, :] + k[..., t, :, None] * v[..., t, None, :]
        o[..., t, :] = scale * np.einsum("...kv,...k->...v", S, q[..., t, :])
    return o, DplrState(S)


def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    log_decay: np.ndarray | None = None,
    *,
    scale: float = 1.0,
    state: DplrState,
) -> tuple[np.ndarray, DplrState]:
    """Matrix products over chunks of c tokens. Cost: O(t (k v + c (k + v) + c^2))."""
    per_channel = log_decay is not None and log_decay.ndim == q.ndim
    return in_chunks(
        partial(chunk, scale=scale),
        partial(recurrent, scale=scale),
        {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay},
        {"q": -2, "k": -2, "v": -2, "a": -2, "b": -2, "log_decay": -2 if per_channel else -1},
        output_like(q, v, state.S),
        state,
        64,
    )


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    log_decay: np.ndarray | None,
    scale: float,
    state: DplrState,
) -> tuple[np.ndarray, DplrState]:
    """One chunk: first every token's reading (a triangular solve), then linear attention on values and readings."""
    (S,) = state
    gates = None if log_decay is None else gates_of(log_decay, log_decay.ndim == q.ndim)
    before = None if gates is None else lag(gates)  # a reads the state before its own step
    now, earlier = (None, None) if gates is None else (gates.pairs, before.pairs)
    a_past, q_past = (a, q) if gates is None else (a * before.since, q * gates.since)
    k_end, b_end = (k, b) if gates is None else (k * gates.to_end, b * gates.to_end)
    inverse = unit_lower_inverse(-products(a, b, earlier, strict=True))
    reading = inverse @ (products(a, k, earlier, strict=True) @ v + a_past @ S)
    o = scale * (q_past @ S + products(q, k, now) @ v + products(q, b, now) @ reading)
    kept = S if gates is None else gates.since[..., -1, :, None] * S
    return o, DplrState(kept + np.swapaxes(k_end, -1, -2) @ v + np.swapaxes(b_end, -1, -2) @ reading)
