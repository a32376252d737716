"""Diagonal scan: every channel an exponential moving sum of its own, real or complex.

    h_t = exp(log_decay_t + i phase_t) h_{t-1} + x_t

The recurrence of LRU, HGRN, RG-LRU and S4D: weights that decay, and keys that are constant in time.

[1] Orvieto et al. (2023), Resurrecting recurrent neural networks for long sequences, arXiv:2303.06349
[2] De et al. (2024), Griffin, arXiv:2402.19427
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calling import run
from ..notation import DiagonalScanState
from ._chunks import kept

__all__ = ["chunked", "diagonal_scan", "recurrent"]

BLOCK = 64  # fixed, so that cuts on its multiples leave every bit as it is
WINDOW = 64 * BLOCK  # tokens whose decays are held at once


def diagonal_scan(x: Any, log_decay: Any, *, phase: Any = None, **common: Any) -> Any:
    """Diagonal scan; see ``ttr_np.diagonal_scan``."""
    return run(chunked, "diagonal_scan", {"x": x, "log_decay": log_decay, "phase": phase}, **common)


def factors(log_decay: np.ndarray, phase: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """What is left of the state after each step. A gate of -inf leaves nothing, whatever its phase."""
    size = np.exp(log_decay)
    return size if phase is None else size * (np.cos(phase) + dtype.type(1j) * np.sin(phase))


def recurrent(
    x: np.ndarray, log_decay: np.ndarray, phase: np.ndarray | None = None, *, state: DiagonalScanState
) -> tuple[np.ndarray, DiagonalScanState]:
    """The recurrence, token by token. Cost: O(t d)."""
    (h,) = state
    o = np.empty(h.shape[:-1] + x.shape[-2:], h.dtype)
    for t in range(x.shape[-2]):
        angle = None if phase is None else phase[..., t, :]
        h = kept(factors(log_decay[..., t, :], angle, h.dtype), h) + x[..., t, :]
        o[..., t, :] = h
    return o, DiagonalScanState(h)


def chunked(
    x: np.ndarray, log_decay: np.ndarray, phase: np.ndarray | None = None, *, state: DiagonalScanState
) -> tuple[np.ndarray, DiagonalScanState]:
    """Blocks of tokens side by side, each from zero, then the state carried across them. Cost: O(t d).

    In a window of w tokens Python walks w / c blocks and c tokens instead of w tokens. Decays are only
    multiplied, never divided.
    """
    h = begin = state.h
    o = np.empty(h.shape[:-1] + x.shape[-2:], h.dtype)
    whole = x.shape[-2] // BLOCK * BLOCK
    for low in range(0, whole, WINDOW):
        steps = (..., slice(low, min(low + WINDOW, whole)), slice(None))
        decay = factors(log_decay[steps], None if phase is None else phase[steps], h.dtype)
        h = scan_blocks(in_blocks(x[steps]), in_blocks(decay), in_blocks(o[steps]), h)
    rest = None if phase is None else phase[..., whole:, :]
    o[..., whole:, :], state = recurrent(x[..., whole:, :], log_decay[..., whole:, :], rest, state=DiagonalScanState(h))
    if not np.isfinite(np.sum(o)) and np.any(np.exp(log_decay) == 0):  # a product with zero does not forget a NaN
        slow, state = recurrent(x, log_decay, phase, state=DiagonalScanState(begin))
        o = np.where(np.isfinite(o), o, slow)
    return o, state


def in_blocks(x: np.ndarray) -> np.ndarray:
    """A view ``(..., blocks, c, d)`` of ``(..., t, d)``."""
    return x.reshape(x.shape[:-2] + (x.shape[-2] // BLOCK, BLOCK, x.shape[-1]))


def scan_blocks(x: np.ndarray, decay: np.ndarray, o: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Fill ``o (..., blocks, c, d)`` and return the state at the end; ``decay`` becomes its own running product.

    No product is written straight beside what it reads: NumPy 2.0.0 and 2.0.1 round complex ones differently there.
    """
    o[..., 0, :] = x[..., 0, :]
    for i in range(1, BLOCK):
        o[..., i, :] = decay[..., i, :] * o[..., i - 1, :]
        o[..., i, :] += x[..., i, :]
        decay[..., i, :] = decay[..., i, :] * decay[..., i - 1, :]
    for block in range(o.shape[-3]):
        o[..., block, :, :] += decay[..., block, :, :] * h[..., None, :]
        h = o[..., block, -1, :]
    return h.copy()
