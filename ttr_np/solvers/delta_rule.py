"""Delta rule (DeltaNet): online gradient descent on a linear memory, one step per pair.

    S' = diag(a_t) S_{t-1},    S_t = S' + beta_t k_t (v_t - S'^T p_t)^T,    o_t = S_t^T q_t,    a_t = exp(log_decay_t)

with p = k unless another key is to be erased. The decay is the weight decay of the descent: one number per step gives
Gated DeltaNet, one per channel KDA.

[1] Yang et al. (2024), Parallelizing linear transformers with the delta rule, arXiv:2406.06484
[2] Yang et al. (2024), Gated delta networks, arXiv:2412.06464
[3] Kimi team (2025), Kimi Linear, arXiv:2510.26692
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..calling import run
from ..notation import DeltaRuleState
from ._chunks import gates_of, in_chunks, kept, output_like, products, unit_lower_inverse

__all__ = ["chunked", "delta_rule", "recurrent"]


def delta_rule(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    *,
    log_decay: Any = None,
    erase_key: Any = None,
    scale: float = 1.0,
    **common: Any,
) -> Any:
    """Delta rule; see ``ttr_np.delta_rule``."""
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "erase_key": erase_key}
    return run(chunked, "delta_rule", arrays, {"scale": scale}, **common)


def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    log_decay: np.ndarray | None = None,
    erase_key: np.ndarray | None = None,
    *,
    scale: float = 1.0,
    state: DeltaRuleState,
) -> tuple[np.ndarray, DeltaRuleState]:
    """The recurrence, token by token. Cost: O(t k v)."""
    (S,) = state
    o = output_like(q, v, S)
    erase = k if erase_key is None else erase_key
    for t in range(q.shape[-2]):
        k_t, v_t, p_t = k[..., t, :], v[..., t, :], erase[..., t, :]
        if log_decay is not None:
            decay = np.exp(log_decay[..., t, :, None] if log_decay.ndim == q.ndim else log_decay[..., t, None, None])
            S = kept(decay, S)
        error = v_t - np.einsum("...kv,...k->...v", S, p_t)
        S = S + (beta[..., t, None] * k_t)[..., :, None] * error[..., None, :]
        o[..., t, :] = scale * np.einsum("...kv,...k->...v", S, q[..., t, :])
    return o, DeltaRuleState(S)


def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    log_decay: np.ndarray | None = None,
    erase_key: np.ndarray | None = None,
    *,
    scale: float = 1.0,
    state: DeltaRuleState,
) -> tuple[np.ndarray, DeltaRuleState]:
    """Matrix products over chunks of c tokens. Cost: O(t (k v + c (k + v) + c^2))."""
    per_channel = log_decay is not None and log_decay.ndim == q.ndim
    return in_chunks(
        partial(chunk, scale=scale),
        partial(recurrent, scale=scale),
        {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "erase_key": erase_key},
        {"q": -2, "k": -2, "v": -2, "beta": -1, "log_decay": -2 if per_channel else -1, "erase_key": -2},
        output_like(q, v, state.S),
        state,
        64,
    )


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    log_decay: np.ndarray | None,
    erase_key: np.ndarray | None,
    scale: float,
    state: DeltaRuleState,
) -> tuple[np.ndarray, DeltaRuleState]:
    """One chunk: first every token's prediction error (a triangular solve), then linear attention on the errors."""
    (S,) = state
    erase = k if erase_key is None else erase_key
    gates = None if log_decay is None else gates_of(log_decay, log_decay.ndim == q.ndim)
    pairs = None if gates is None else gates.pairs
    past = (lambda x: x) if gates is None else (lambda x: x * gates.since)
    inverse = unit_lower_inverse(beta[..., None] * products(erase, k, pairs, strict=True))
    error = inverse @ (beta[..., None] * (v - past(erase) @ S))
    o = scale * (past(q) @ S + products(q, k, pairs) @ error)
    k_end = k if gates is None else k * gates.to_end
    old = S if gates is None else gates.since[..., -1, :, None] * S
    return o, DeltaRuleState(old + np.swapaxes(k_end, -1, -2) @ error)
