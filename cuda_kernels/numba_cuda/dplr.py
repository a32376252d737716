"""Diagonal plus low rank on the GPU, token by token.

    S = diag(d_t) S + b_t (S^T a_t)^T + k_t v_t^T,    o_t = S^T q_t,    d_t = exp(log_decay_t)

See ``ttr_np.solvers.dplr`` for the sources.
"""

from __future__ import annotations

from functools import cache
from math import exp
from typing import Any

import numpy as np
from numba import from_dtype

from ttr_np.notation import DplrState

from .._calls import split
from .._sequences import BOTH, Sequences
from ._columns import columns, place
from ._launch import cuda, empty, launch, per_channel, replayed, run

__all__ = ["dplr"]


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
    (S,), (tokens, size), width = state, q.shape[-2:], v.shape[-1]
    sequences = Sequences(S.shape[:-2], np.broadcast_shapes(q.shape[:-2], S.shape[:-2]))
    o = empty(sequences, (tokens, width), q.dtype, q)
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), "a": (a, BOTH), "b": (b, BOTH)}
    arrays |= {"log_decay": (per_channel(log_decay, q), BOTH), "S": (S, BOTH), "o": (o, BOTH)}
    rows, parts = split("k", size)
    kernel = kernel_for(size, rows, parts, from_dtype(q.dtype))
    launch(kernel, sequences, arrays, ("S", "o"), tokens, width, parts, q.dtype.type(scale))
    return o, DplrState(S)


@cache
def kernel_for(size: int, rows: int, parts: int, real: Any) -> Any:
    """The kernel for keys of one size: a block has one memory and some of its value columns."""
    load, store, _, _, dot, decay, add = columns(size, rows, parts, real)

    def dplr(q, k, v, a, b, log_decay, S, o, scale, blocks):
        keys = cuda.shared.array((2, size), real)
        reads = cuda.shared.array((2, size), real)
        writes = cuda.shared.array((2, size), real)
        decays = cuda.shared.array((2, size), real)
        own = cuda.local.array(rows, real)
        i, h, column, part = place(S.shape[1], blocks, parts)
        load(own, S[i, h, 0], part, column)
        for t in range(q.shape[3]):
            for row in range(cuda.threadIdx.x, size, cuda.blockDim.x):
                keys[t % 2, row] = k[i, h, 0, t, row]
                reads[t % 2, row] = a[i, h, 0, t, row]
                writes[t % 2, row] = b[i, h, 0, t, row]
                decays[t % 2, row] = exp(log_decay[i, h, 0, t, row]) if log_decay.size else real(1)
            cuda.syncthreads()  # token t is staged; t + 2 takes its place, when everyone is past t + 1
            reading = dot(own, reads[t % 2], part)  # of the state before its decay
            decay(own, decays[t % 2], part)
            add(own, writes[t % 2], reading, part)
            add(own, keys[t % 2], v[i, h, 0, t, column] if column < v.shape[4] else real(0), part)
            for g in range(q.shape[2]):  # the queries that share this memory
                answer = dot(own, q[i, h, g, t], part)
                if column < v.shape[4] and part == 0:
                    o[i, h, g, t, column] = scale * answer
        store(own, S[i, h, 0], part, column)

    return dplr
