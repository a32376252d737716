"""Selective scan on the GPU, token by token: one launch of ``selective_scan.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.notation import SelectiveScanState

from .._calls import split
from .._sequences import BOTH, COLUMN, Sequences
from ._launch import Kernel, empty, even, launch, replayed, run

__all__ = ["selective_scan"]

KERNEL = Kernel("selective_scan")


def selective_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, *, D: Any = None, **common: Any) -> Any:
    """Selective scan; see ``ttr_np.selective_scan``."""
    return run(replayed(core), "selective_scan", {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}, **common)


def core(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, *, state: SelectiveScanState
) -> tuple[Any, SelectiveScanState]:
    """One launch."""
    (h,), (tokens, columns) = state, u.shape[-2:]
    reading = (C.shape[:-2], () if D is None else D.shape[:-1])
    sequences = Sequences(h.shape[:-2], np.broadcast_shapes(h.shape[:-2], *reading))
    o = empty(sequences, (tokens, columns), u.dtype, u)
    arrays = {"u": (u, BOTH), "delta": (delta, BOTH), "A": (A, BOTH), "B": (B, BOTH), "C": (C, BOTH), "D": (D, COLUMN)}
    arrays |= {"h": (h, BOTH), "o": (o, BOTH)}
    per_thread, parts = split("n", h.shape[-1])
    constants = {"N": h.shape[-1], "ROWS": per_thread, "PARTS": parts, "EVEN": even(B, C)}
    types = {"data": u.dtype, "real": h.dtype}
    launch(KERNEL, sequences, arrays, ("h", "o"), types, constants, tokens=tokens, columns=columns)
    return o, SelectiveScanState(h)
