"""Short convolution on the GPU, token by token: one launch of ``short_convolution.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.notation import ShortConvolutionState
from ttr_np.solvers.short_convolution import ACTIVATIONS, start

from .._sequences import BOTH, COLUMN, ROW, Sequences
from ._launch import Kernel, empty, launch, replayed, run

__all__ = ["short_convolution"]

KERNEL = Kernel("short_convolution")


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
    (window,), (tokens, columns) = state, x.shape[-2:]
    reading = () if bias is None else bias.shape[:-1]
    sequences = Sequences(window.shape[:-2], np.broadcast_shapes(window.shape[:-2], reading))
    o = empty(sequences, (tokens, columns), x.dtype, x)
    arrays = {"x": (x, BOTH), "weight": (weight, BOTH), "bias": (bias, COLUMN), "mask": (mask, ROW)}
    arrays |= {"window": (window, BOTH), "o": (o, BOTH)}
    types, constants = {"data": x.dtype, "real": window.dtype}, {"W": weight.shape[-2]}
    silu = int(activation == "silu")
    launch(KERNEL, sequences, arrays, ("window", "o"), types, constants, tokens=tokens, columns=columns, silu=silu)
    return o, ShortConvolutionState(window)
