"""Short convolution on the GPU, token by token.

    o_t = act(bias + sum_{s<W} weight_{W-1-s} x_{t-s})

See ``ttr_np.solvers.short_convolution`` for the sources.
"""

from __future__ import annotations

from functools import cache
from math import exp
from typing import Any

import numpy as np
from numba import from_dtype

from ttr_np.notation import ShortConvolutionState
from ttr_np.solvers.short_convolution import ACTIVATIONS, start

from .._sequences import BOTH, COLUMN, ROW, Sequences
from ._columns import place
from ._launch import cuda, empty, launch, replayed, run

__all__ = ["short_convolution"]


def short_convolution(x: Any, weight: Any, *, bias: Any = None, activation: str | None = None, **common: Any) -> Any:
    """Short convolution; see ``ttr_np.short_convolution``."""
    if activation not in ACTIVATIONS:
        allowed = " or ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be {allowed}, got {activation!r}")
    arrays = {"x": x, "weight": weight, "bias": bias}
    return run(replayed(core), "short_convolution", arrays, {"activation": activation}, start=start, **common)


def core(
    x: Any, weight: Any, bias: Any, mask: Any, *, activation: str | None, state: ShortConvolutionState
) -> tuple[Any, ShortConvolutionState]:
    """One launch."""
    (window,), (tokens, width) = state, x.shape[-2:]
    reading = () if bias is None else bias.shape[:-1]
    sequences = Sequences(window.shape[:-2], np.broadcast_shapes(window.shape[:-2], reading))
    o = empty(sequences, (tokens, width), x.dtype, x)
    mask = np.broadcast_to(np.True_, (tokens,)) if mask is None else mask
    arrays = {"x": (x, BOTH), "weight": (weight, BOTH), "bias": (bias, COLUMN), "mask": (mask, ROW)}
    arrays |= {"window": (window, BOTH), "o": (o, BOTH)}
    kernel = kernel_for(weight.shape[-2], from_dtype(x.dtype))
    launch(kernel, sequences, arrays, ("window", "o"), tokens, width, 1, int(activation == "silu"))
    return o, ShortConvolutionState(window)


@cache
def kernel_for(taps: int, real: Any) -> Any:
    """The kernel for so many taps: a thread owns one channel of one sequence."""

    def short_convolution(x, weight, bias, mask, window, o, silu, blocks):
        own = cuda.local.array(taps, real)
        seen = cuda.local.array(taps, real)
        b, h, column, _ = place(x.shape[1], blocks, 1)
        if column >= x.shape[4]:
            return
        for s in range(taps):
            own[s] = weight[b, h, 0, s, column]
            seen[s] = window[b, h, 0, s, column] if s < taps - 1 else real(0)
        for t in range(x.shape[3]):
            seen[taps - 1] = x[b, h, 0, t, column]
            total = real(0)
            for s in range(taps):
                total += own[s] * seen[s]
            for g in range(o.shape[2]):  # the offsets that share these inputs
                y = total + (bias[b, h, g, column] if bias.size else real(0))
                o[b, h, g, t, column] = y / (real(1) + exp(-y)) if silu else y
            if mask[b, h, 0, t]:
                for s in range(taps - 1):
                    seen[s] = seen[s + 1]
        for s in range(taps - 1):
            window[b, h, 0, s, column] = seen[s]

    return short_convolution
