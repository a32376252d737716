"""Selective scan (Mamba): every entry of the memory decays at a rate of its own.

    h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t^T,    o_t = h_t C_t + D u_t

The step length delta says how far a token moves the state; B is its key, C the query.

[1] Gu and Dao (2023), Mamba: linear-time sequence modeling with selective state spaces, arXiv:2312.00752
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calling import run
from ..notation import SelectiveScanState

__all__ = ["chunked", "recurrent", "selective_scan"]

BLOCK = 16  # tokens whose decays are held at once


def selective_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, *, D: Any = None, **common: Any) -> Any:
    """Selective scan; see ``ttr_np.selective_scan``."""
    arrays = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}
    return run(chunked, "selective_scan", arrays, **common)


def output(u: np.ndarray, C: np.ndarray, D: np.ndarray | None, h: np.ndarray) -> np.ndarray:
    """An array for the outputs: leading axes of the state and of all that reads it."""
    direct = () if D is None else D.shape[:-1]
    return np.empty(np.broadcast_shapes(h.shape[:-2], C.shape[:-2], direct) + u.shape[-2:], h.dtype)


def recurrent(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    *,
    state: SelectiveScanState,
) -> tuple[np.ndarray, SelectiveScanState]:
    """The recurrence, token by token. Cost: O(t v n)."""
    (h,) = state
    o = output(u, C, D, h)
    for t in range(u.shape[-2]):
        u_t, delta_t = u[..., t, :], delta[..., t, :]
        h = np.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B[..., t, None, :]
        o[..., t, :] = np.einsum("...vn,...n->...v", h, C[..., t, :])
        if D is not None:
            o[..., t, :] += D * u_t
    return o, SelectiveScanState(h)


def chunked(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    *,
    state: SelectiveScanState,
) -> tuple[np.ndarray, SelectiveScanState]:
    """Decays, inputs and answers of a block of tokens at once; only the state goes token by token. Cost: O(t v n)."""
    (h,) = state
    o = output(u, C, D, h)
    rates = np.broadcast_shapes(delta.shape[:-2], A.shape[:-2])
    decays, states = (np.empty(lead + (BLOCK,) + h.shape[-2:], h.dtype) for lead in (rates, h.shape[:-2]))
    for low in range(0, u.shape[-2], BLOCK):
        step = slice(low, low + BLOCK)
        length = delta[..., step, :]
        c = length.shape[-2]
        decay, entered = decays[..., :c, :, :], states[..., :c, :, :]
        np.exp(np.multiply(length[..., None], A[..., None, :, :], out=decay), out=decay)
        np.multiply((length * u[..., step, :])[..., None], B[..., step, None, :], out=entered)
        for t in range(c):
            entered[..., t, :, :] += decay[..., t, :, :] * h
            h = entered[..., t, :, :]
        h = h.copy()  # the buffer is written again
        o[..., step, :] = (entered @ C[..., step, :, None])[..., 0]
    if D is not None:
        o += D[..., None, :] * u
    return o, SelectiveScanState(h)
