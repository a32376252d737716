"""Softmax attention on the GPU: tiles of queries meet tiles of pairs in one pass, newest first.

    x = scale q . k + bias,    top' = max(top, x),    p = exp(x - top'),    weight' = weight exp(top - top') + sum p,
    o' = o exp(top - top') + p v,    at the end o / weight

See ``ttr_np.solvers.softmax_attention`` for the definition and the sources.
"""

from __future__ import annotations

from functools import cache
from math import exp, inf
from typing import Any

import numpy as np
from numba import float64, from_dtype

from ttr_np.notation import CacheState
from ttr_np.solvers._cache import append, check_options, empty_cache
from ttr_np.solvers.softmax_attention import scale_of

from .._attention import DOT, EXPONENTIAL, Pairs, pairs_of
from .._sequences import BOTH, ROW, Sequences
from ._launch import cuda, empty, launch, replayed, run
from ._pairs import (
    SLAB,
    TILE,
    aged,
    arrays_of,
    bias_of,
    grid,
    log_kernel,
    number,
    origin,
    over_row,
    place,
    product,
    sees,
    sight,
    tiles,
    top_of_row,
)  # fmt: skip

__all__ = ["softmax_attention"]

COLUMNS = 8  # of the values that one thread answers for


def softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    log_decay: Any = None,
    **common: Any,
) -> Any:
    """Softmax attention; see ``ttr_np.softmax_attention``."""
    check_options(q, log_decay, causal, window, sinks)
    options = {"scale": scale, "causal": bool(causal), "window": window, "sinks": sinks}
    options["keep"] = bool(common.get("output_final_state"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    return run(replayed(core), "softmax_attention", arrays, options, start=empty_cache, **common)


def core(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    mask: Any,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    sinks: int,
    keep: bool,
    state: CacheState,
) -> tuple[Any, CacheState]:
    """One launch; the cache grows only to be returned."""
    pairs = pairs_of(state, k, v, mask)
    o = average(q, pairs, log_decay, state, DOT, scale_of(scale, q), causal, window, sinks)
    return o, append(state, k, v, log_decay, mask, window, sinks) if keep else state


def average(
    q: Any, pairs: Pairs, gates: Any, state: CacheState, code: int, width: Any, causal: bool, window: Any, sinks: int
) -> Any:
    """Means of the values under a kernel of queries and keys, in the precision of its ``width``."""
    tokens, values = q.shape[-2], pairs.v.shape[-1]
    sequences = Sequences(state.k.shape[:-2], np.broadcast_shapes(q.shape[:-2], state.k.shape[:-2]))
    o = empty(sequences, (tokens, values), q.dtype, q)
    arrays = {"q": (q, BOTH), **arrays_of(pairs), "log_decay": (gates, ROW), "o": (o, BOTH)}
    columns = max(min(-(-values // TILE), COLUMNS), 1)
    cut, parts = grid(sequences, tokens, values, columns)
    numbers = (width, code, int(causal), window or 0, sinks, pairs.cached, parts)
    kernel = kernel_for(columns, from_dtype(width.dtype), code == DOT)
    launch(kernel, sequences, arrays, ("o",), tokens, values, 1, *numbers, grid=cut)
    return o


@cache
def kernel_for(columns: int, real: Any, plain: bool) -> Any:
    """The kernel: thread (row, lane) weighs a pair for a query, and answers for so many value columns of that query.

    ``plain``: for softmax attention alone; otherwise the kernel's code is an argument.
    """
    staged, mix = TILE * columns, mixing(columns, real)

    def softmax_attention(
        q, k, v, position, count, left, log_decay, o, width, kind, causal, window, sinks, cached, parts, blocks
    ):
        code = DOT if plain else kind
        queries = cuda.shared.array((TILE, SLAB), real)
        keys = cuda.shared.array((TILE, SLAB), real)
        values = cuda.shared.array((TILE, staged), real)
        weights = cuda.shared.array((TILE, TILE), real)
        answer = cuda.local.array(columns, float64)  # the sums of 4096 tokens need more than float
        b, h, first, part, row, lane = place(q.shape[1], blocks, parts)
        step, group = (first + row) // q.shape[2], (first + row) % q.shape[2]
        counts, gates = count[b, h, 0], log_decay[b, h, 0]
        newest, begin, front = tiles(counts, q.shape[2], q.shape[3], k.shape[3], first, causal, window, sinks, cached)
        last, oldest = sight(counts, step, q.shape[3], k.shape[3], causal, window, cached)
        top, weight, since = real(-inf), 0.0, 0.0
        for c in range(columns):
            answer[c] = 0.0
        for tile in range(newest, -1, -1):
            start = tile * TILE
            if start + TILE <= begin and start >= front:  # older than the window, and no sink
                since = aged(since, gates, start - cached, last - cached)
                continue
            x = scored(code, queries, keys, q[b, h, group], k[b, h, 0], step, start, real(0))
            seen = sees(position[b, h, 0], start + lane, last, oldest, sinks)
            bias = bias_of(since, gates, left[b, h, 0], start + lane, cached, start, last) if seen else -inf
            x = real(-inf) if bias == -inf else real(log_kernel(code, x, width)) + real(bias)
            since = aged(since, gates, start - cached, last - cached)
            higher = max(top, top_of_row(x))
            shift = higher if higher > -inf else real(0)
            p, kept = exp(x - shift), exp(top - shift)
            weight, top = kept * weight + over_row(p), higher
            weights[row, lane] = p if x != -inf else real(-1)  # less than none: not even a NaN comes through
            mix(answer, kept, weights, values, v[b, h, 0], start, part * staged)
        for c in range(columns):
            column = part * staged + c * TILE + lane
            if step < q.shape[3] and column < v.shape[4]:
                o[b, h, group, step, column] = answer[c] / weight if weight != 0 else answer[c]

    return softmax_attention


@cuda.jit(device=True)
def scored(code, queries, keys, q, k, step, start, x):
    """Dot product or squared distance of this thread's query and pair, by slabs of channels that all threads stage."""
    row, lane = cuda.threadIdx.x // TILE, cuda.threadIdx.x % TILE
    for low in range(0, max(q.shape[1], 1), SLAB):
        cuda.syncthreads()  # nobody is left at what is staged anew
        for c in range(low + lane, low + SLAB, TILE):
            here, there = c < q.shape[1] and step < q.shape[0], c < q.shape[1] and start + row < k.shape[0]
            queries[row, c - low] = q[step, c] if here else 0
            keys[row, c - low] = k[start + row, c] if there else 0
            if code == EXPONENTIAL and there:
                keys[row, c - low] -= origin(k[0, c])
        cuda.syncthreads()  # the channels of this slab are staged
        for c in range(SLAB):
            x += product(code, queries[row, c], keys[lane, c])
    return x


@cache
def mixing(columns: int, real: Any) -> Any:
    """Answers of so many columns, after one more tile."""

    @cuda.jit(device=True)
    def mix(answer, kept, weights, values, v, start, low):
        sums = cuda.local.array(columns, real)
        row, lane = cuda.threadIdx.x // TILE, cuda.threadIdx.x % TILE
        for c in range(columns):
            column = low + c * TILE + lane
            there = start + row < v.shape[0] and column < v.shape[1]
            values[row, c * TILE + lane] = number(v[start + row, column]) if there else real(0)
            sums[c] = real(0)
        cuda.syncthreads()  # the weights and values of this tile are staged
        for j in range(TILE):
            for c in range(columns):
                if not weights[row, j] < 0:
                    sums[c] += weights[row, j] * values[j, c * TILE + lane]
        for c in range(columns):
            answer[c] = kept * answer[c] + sums[c]

    return mix
