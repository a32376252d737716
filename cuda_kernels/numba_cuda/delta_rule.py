"""Delta rule on the GPU, token by token.

    S' = diag(a_t) S,    S = S' + beta_t k_t (v_t - S'^T p_t)^T,    o_t = S^T q_t

See ``ttr_np.solvers.delta_rule`` for the sources.
"""

from __future__ import annotations

from functools import cache
from math import exp
from typing import Any

import numpy as np
from numba import from_dtype

from ttr_np.notation import DeltaRuleState

from .._calls import split
from .._sequences import BOTH, ROW, Sequences
from ._columns import columns, place
from ._launch import cuda, empty, launch, per_channel, replayed, run

__all__ = ["delta_rule"]


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
    return run(replayed(core), "delta_rule", arrays, {"scale": scale}, **common)


def core(
    q: Any, k: Any, v: Any, beta: Any, log_decay: Any, erase_key: Any, *, scale: float, state: DeltaRuleState
) -> tuple[Any, DeltaRuleState]:
    """One launch."""
    (S,), (tokens, size), width = state, q.shape[-2:], v.shape[-1]
    sequences = Sequences(S.shape[:-2], np.broadcast_shapes(q.shape[:-2], S.shape[:-2]))
    o = empty(sequences, (tokens, width), q.dtype, q)
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), "beta": (beta, ROW)}
    erase_key = k if erase_key is None else erase_key
    arrays |= {"log_decay": (per_channel(log_decay, q), BOTH), "erase_key": (erase_key, BOTH)}
    arrays |= {"S": (S, BOTH), "o": (o, BOTH)}
    rows, parts = split("k", size)
    kernel = kernel_for(size, rows, parts, from_dtype(q.dtype))
    launch(kernel, sequences, arrays, ("S", "o"), tokens, width, parts, q.dtype.type(scale))
    return o, DeltaRuleState(S)


@cache
def kernel_for(size: int, rows: int, parts: int, real: Any) -> Any:
    """The kernel for keys of one size: a block has one memory and some of its value columns."""
    load, store, _, _, dot, decay, add = columns(size, rows, parts, real)

    def delta_rule(q, k, v, beta, log_decay, erase_key, S, o, scale, blocks):
        keys = cuda.shared.array((2, size), real)
        erased = cuda.shared.array((2, size), real)
        decays = cuda.shared.array((2, size), real)
        own = cuda.local.array(rows, real)
        b, h, column, part = place(S.shape[1], blocks, parts)
        load(own, S[b, h, 0], part, column)
        for t in range(q.shape[3]):
            for row in range(cuda.threadIdx.x, size, cuda.blockDim.x):
                keys[t % 2, row] = k[b, h, 0, t, row]
                erased[t % 2, row] = erase_key[b, h, 0, t, row]
                decays[t % 2, row] = exp(log_decay[b, h, 0, t, row]) if log_decay.size else real(1)
            cuda.syncthreads()  # token t is staged; t + 2 takes its place, when everyone is past t + 1
            decay(own, decays[t % 2], part)
            recalled = dot(own, erased[t % 2], part)
            error = beta[b, h, 0, t] * (v[b, h, 0, t, column] - recalled) if column < v.shape[4] else real(0)
            add(own, keys[t % 2], error, part)
            for g in range(q.shape[2]):  # the queries that share this memory
                answer = dot(own, q[b, h, g, t], part)
                if column < v.shape[4] and part == 0:
                    o[b, h, g, t, column] = scale * answer
        store(own, S[b, h, 0], part, column)

    return delta_rule
