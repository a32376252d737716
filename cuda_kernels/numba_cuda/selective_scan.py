"""Selective scan on the GPU, token by token.

    h = exp(delta_t A) h + (delta_t u_t) B_t^T,    o_t = h C_t + D u_t

See ``ttr_np.solvers.selective_scan`` for the sources.
"""

from __future__ import annotations

from functools import cache
from math import exp
from typing import Any

import numpy as np
from numba import from_dtype

from ttr_np.notation import SelectiveScanState

from .._calls import split
from .._sequences import BOTH, COLUMN, Sequences
from ._columns import columns, place
from ._launch import cuda, empty, launch, replayed, run

__all__ = ["selective_scan"]


def selective_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, *, D: Any = None, **common: Any) -> Any:
    """Selective scan; see ``ttr_np.selective_scan``."""
    return run(replayed(core), "selective_scan", {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}, **common)


def core(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, *, state: SelectiveScanState
) -> tuple[Any, SelectiveScanState]:
    """One launch, over the transposes of h and A: a lane owns entries of one channel."""
    (h,), (tokens, width), size = state, u.shape[-2:], C.shape[-1]
    reading = (C.shape[:-2], () if D is None else D.shape[:-1])
    sequences = Sequences(h.shape[:-2], np.broadcast_shapes(h.shape[:-2], *reading))
    o = empty(sequences, (tokens, width), u.dtype, u)
    arrays = {"u": (u, BOTH), "delta": (delta, BOTH), "A": (A.swapaxes(-1, -2), BOTH), "B": (B, BOTH), "C": (C, BOTH)}
    arrays |= {"D": (D, COLUMN), "h": (h.swapaxes(-1, -2), BOTH), "o": (o, BOTH)}
    rows, parts = split("n", size, fields=2)
    launch(kernel_for(size, rows, parts, from_dtype(u.dtype)), sequences, arrays, ("h", "o"), tokens, width, parts)
    return o, SelectiveScanState(h)


@cache
def kernel_for(size: int, rows: int, parts: int, real: Any) -> Any:
    """The kernel for states of one size: a block has one memory and some of its channels."""
    load, store, _, _, dot, _, add = columns(size, rows, parts, real)

    @cuda.jit(device=True)
    def decay(own, rates, length):
        for r in range(rows):
            own[r] *= exp(length * rates[r])

    def selective_scan(u, delta, A, B, C, D, h, o, blocks):
        own = cuda.local.array(rows, real)
        rates = cuda.local.array(rows, real)
        b, i, column, part = place(h.shape[1], blocks, parts)
        load(own, h[b, i, 0], part, column)
        load(rates, A[b, i, 0], part, column)
        mine = column < u.shape[4]
        for t in range(u.shape[3]):
            length = delta[b, i, 0, t, column] if mine else real(0)
            value = u[b, i, 0, t, column] if mine else real(0)
            decay(own, rates, length)
            add(own, B[b, i, 0, t], length * value, part)
            for g in range(C.shape[2]):  # the queries that share this memory
                answer = dot(own, C[b, i, g, t], part)
                if mine and part == 0:
                    o[b, i, g, t, column] = answer + D[b, i, g, column] * value if D.size else answer
        store(own, h[b, i, 0], part, column)

    return selective_scan
