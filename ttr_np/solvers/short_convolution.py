"""Short causal convolution: every channel a weighted sum of its last w inputs.

    o_t = act(bias + sum_{s<w} weight_{w-1-s} x_{t-s})

It lets a key depend on the token before it: the pairs "previous token, this token" that a recurrent memory needs to
recall at all.

[1] Wang, Shi and Fox (2025), Test-time regression, arXiv:2501.12352 (section on keys and values)
[2] Poli et al. (2023), Hyena hierarchy, arXiv:2302.10866
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calling import run, zeros
from ..features import silu
from ..notation import ShortConvolutionState

__all__ = ["chunked", "recurrent", "short_convolution"]

ACTIVATIONS = {None: lambda x: x, "silu": silu}


def short_convolution(x: Any, weight: Any, *, bias: Any = None, activation: str | None = None, **common: Any) -> Any:
    """Short convolution; see ``ttr_np.short_convolution``."""
    if activation not in ACTIVATIONS:
        allowed = " or ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be {allowed}, got {activation!r}")
    arrays = {"x": x, "weight": weight, "bias": bias}
    return run(chunked, "short_convolution", arrays, {"activation": activation}, start=start, **common)


def start(operator: str, lead: tuple[int, ...], sizes: dict[str, int], dtype: Any) -> Any:
    """Zeros before the sequence; the current token is not part of the state."""
    if sizes["w"] < 1:
        raise ValueError("weight needs at least one tap, its axis 'w' is 0")
    return zeros(operator, lead, {**sizes, "w": sizes["w"] - 1}, dtype)


def output(x: np.ndarray, bias: np.ndarray | None, window: np.ndarray) -> np.ndarray:
    """The outputs before any input: the bias."""
    lead = np.broadcast_shapes(window.shape[:-2], () if bias is None else bias.shape[:-1])
    o = np.empty(lead + x.shape[-2:], window.dtype)
    o[...] = 0 if bias is None else bias[..., None, :]
    return o


def recurrent(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    activation: str | None = None,
    state: ShortConvolutionState,
) -> tuple[np.ndarray, ShortConvolutionState]:
    """Token by token: the window slides over the tokens that are memorised. Cost: O(t w d)."""
    (window,) = state
    o = output(x, bias, window)
    for t in range(x.shape[-2]):
        x_t = np.broadcast_to(x[..., t, None, :], window.shape[:-2] + (1,) + window.shape[-1:])
        seen = np.concatenate([window, x_t], axis=-2)
        o[..., t, :] += np.sum(weight * seen, axis=-2)
        window = seen[..., 1:, :] if mask is None else np.where(mask[..., t, None, None], seen[..., 1:, :], window)
    return ACTIVATIONS[activation](o), ShortConvolutionState(window)


def chunked(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    activation: str | None = None,
    state: ShortConvolutionState,
) -> tuple[np.ndarray, ShortConvolutionState]:
    """Tap by tap: one product of whole arrays for each. Cost: O(t w d)."""
    (window,) = state
    o = output(x, bias, window)
    slide = unmasked if mask is None else masked
    window = slide(o, x, weight, mask, window)
    return ACTIVATIONS[activation](o), ShortConvolutionState(window)


def unmasked(o: np.ndarray, x: np.ndarray, weight: np.ndarray, mask: None, window: np.ndarray) -> np.ndarray:
    """Add every tap to ``o``: tap s reads s tokens back, the first s tokens in the window. Return the new window."""
    t, past = x.shape[-2], window.shape[-2]
    for s in range(past, -1, -1):
        tap, inside = weight[..., past - s, None, :], min(s, t)
        o[..., :inside, :] += tap * window[..., past - s : past - s + inside, :]
        o[..., inside:, :] += tap * x[..., : t - inside, :]
    recent = x[..., max(t - past, 0) :, :]
    recent = np.broadcast_to(recent, window.shape[:-2] + recent.shape[-2:])
    return np.concatenate([window[..., min(t, past) :, :], recent], axis=-2)


def masked(o: np.ndarray, x: np.ndarray, weight: np.ndarray, mask: np.ndarray, window: np.ndarray) -> np.ndarray:
    """The same over memorised tokens: they are moved together, and each token looks back from its own rank."""
    past = window.shape[-2]
    lead = window.shape[:-2]
    mask = np.broadcast_to(mask, lead + mask.shape[-1:])
    order = np.argsort(~mask, axis=-1, kind="stable")
    together = np.take_along_axis(np.broadcast_to(x, lead + x.shape[-2:]), order[..., None], axis=-2)
    stream = np.concatenate([window, together], axis=-2)
    rank = np.cumsum(mask, axis=-1)
    before = rank - mask
    for s in range(past, 0, -1):
        back = np.take_along_axis(stream, (before + past - s)[..., None], axis=-2)
        o += weight[..., past - s, None, :] * back
    o += weight[..., past, None, :] * x  # zero where the token itself is masked
    end = (rank[..., -1:] if mask.shape[-1] else np.zeros(lead + (1,), int)) + np.arange(past)
    return np.take_along_axis(stream, end[..., None], axis=-2)
