"""Diagonal plus low rank on the GPU, token by token: one launch of ``dplr.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.notation import DplrState

from .._calls import split
from .._sequences import BOTH, ROW, Sequences
from ._launch import Kernel, empty, even, launch, replayed, run

__all__ = ["dplr"]

KERNEL = Kernel("dplr")


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
    return run(replayed(core), "dplr", arrays, {"scale": scale}, **common)


def core(
    q: Any, k: Any, v: Any, a: Any, b: Any, log_decay: Any, *, scale: float, state: DplrState
) -> tuple[Any, DplrState]:
    """One launch."""
    (S,), (tokens, rows), columns = state, q.shape[-2:], v.shape[-1]
    sequences = Sequences(S.shape[:-2], np.broadcast_shapes(q.shape[:-2], S.shape[:-2]))
    o = empty(sequences, (tokens, columns), q.dtype, q)
    gate = ROW if log_decay is None or log_decay.ndim < q.ndim else BOTH
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), "a": (a, BOTH), "b": (b, BOTH)}
    arrays |= {"log_decay": (log_decay, gate), "S": (S, BOTH), "o": (o, BOTH)}
    per_thread, parts = split("k", rows)
    constants = {"K": rows, "ROWS": per_thread, "PARTS": parts, "EVEN": even(q)}
    types = {"data": q.dtype, "real": S.dtype}
    launch(KERNEL, sequences, arrays, ("S", "o"), types, constants, tokens=tokens, columns=columns, scale=scale)
    return o, DplrState(S)
