"""Linear attention on the GPU, token by token.

    S = diag(a_t) S + k_t v_t^T,    o_t = S^T q_t,    a_t = exp(log_decay_t)

See ``ttr_np.solvers.linear_attention`` for the sources.
"""

from __future__ import annotations

from functools import cache, partial
from math import exp
from typing import Any

import numpy as np
from numba import from_dtype

from ttr_np.notation import LinearAttentionState
from ttr_np.solvers.linear_attention import start

from .._calls import split
from .._sequences import BOTH, COLUMN, Sequences
from ._columns import columns, place
from ._launch import cuda, empty, launch, per_channel, replayed, run

__all__ = ["linear_attention"]


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    bonus: Any = None,
    normalize: bool = False,
    scale: float = 1.0,
    **common: Any,
) -> Any:
    """Linear attention; see ``ttr_np.linear_attention``."""
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "bonus": bonus}
    options = {"normalize": normalize, "scale": scale}
    return run(replayed(core), "linear_attention", arrays, options, start=partial(start, normalize), **common)


def core(
    q: Any, k: Any, v: Any, log_decay: Any, bonus: Any, *, normalize: bool, scale: float, state: LinearAttentionState
) -> tuple[Any, LinearAttentionState]:
    """One launch."""
    (S, z), (tokens, size), width = state, q.shape[-2:], v.shape[-1]
    sequences = Sequences(S.shape[:-2], np.broadcast_shapes(q.shape[:-2], S.shape[:-2]))
    o = empty(sequences, (tokens, width), q.dtype, q)
    z_next = None if z is None else z.copy()
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), "log_decay": (per_channel(log_decay, q), BOTH)}
    arrays |= {"bonus": (bonus, COLUMN), "S": (S, BOTH), "z": (z, COLUMN), "z_next": (z_next, COLUMN), "o": (o, BOTH)}
    rows, parts = split("k", size, fields=1 + normalize)
    kernel = kernel_for(size, rows, parts, from_dtype(q.dtype), normalize)
    launch(kernel, sequences, arrays, ("S", "z_next", "o"), tokens, width, parts, q.dtype.type(scale))
    return o, LinearAttentionState(S, z_next)


@cache
def kernel_for(size: int, rows: int, parts: int, real: Any, normalize: bool) -> Any:
    """The kernel for keys of one size: a block has one memory and some of its value columns, and each column z too."""
    load, store, take, give, dot, decay, add = columns(size, rows, parts, real)

    @cuda.jit(device=True)
    def memorise(own, own_z, decays, keys, value, part):
        decay(own, decays, part)
        add(own, keys, value, part)
        if normalize:
            decay(own_z, decays, part)
            add(own_z, keys, real(1), part)

    def linear_attention(q, k, v, log_decay, bonus, S, z, z_next, o, scale, blocks):
        keys = cuda.shared.array((2, size), real)
        decays = cuda.shared.array((2, size), real)
        own = cuda.local.array(rows, real)
        own_z = cuda.local.array(rows, real)
        b, h, column, part = place(S.shape[1], blocks, parts)
        load(own, S[b, h, 0], part, column)
        if normalize:
            take(own_z, z[b, h, 0], part)
        for t in range(q.shape[3]):
            for row in range(cuda.threadIdx.x, size, cuda.blockDim.x):
                keys[t % 2, row] = k[b, h, 0, t, row]
                decays[t % 2, row] = exp(log_decay[b, h, 0, t, row]) if log_decay.size else real(1)
            cuda.syncthreads()  # token t is staged; t + 2 takes its place, when everyone is past t + 1
            value = v[b, h, 0, t, column] if column < v.shape[4] else real(0)
            if not bonus.size:
                memorise(own, own_z, decays[t % 2], keys[t % 2], value, part)
            for g in range(q.shape[2]):  # the queries that share this memory
                pair = pair_of(q[b, h, g, t], bonus[b, h, g], keys[t % 2]) if bonus.size else real(0)
                answer = dot(own, q[b, h, g, t], part) + pair * value
                weight = dot(own_z, q[b, h, g, t], part) + pair if normalize else real(1)
                if column < v.shape[4] and part == 0:
                    o[b, h, g, t, column] = weighed(answer, weight) if normalize else scale * answer
            if bonus.size:  # then the answer reads the memory before this token
                memorise(own, own_z, decays[t % 2], keys[t % 2], value, part)
        store(own, S[b, h, 0], part, column)
        if normalize and column == 0:
            give(own_z, z_next[b, h, 0], part)

    return linear_attention


@cuda.jit(device=True)
def pair_of(q, bonus, k):
    """What a token says to itself: q . (bonus k)."""
    total = q[0] * bonus[0] * k[0]
    for row in range(1, k.shape[0]):
        total += q[row] * bonus[row] * k[row]
    return total


@cuda.jit(device=True)
def weighed(answer, weight):
    """An answer over its weight; an empty memory answers zero."""
    return answer / weight if weight != 0 else weight
