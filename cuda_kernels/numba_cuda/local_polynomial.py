"""Local polynomial regression on the GPU, in double precision: a warp fits a polynomial around one query.

    o = vbar + B^T R^-T (1, f(q - c))

[R B] is the triangle of the rows sqrt(p_i) [1 f(k_i - c) | v_i - vbar], made by reflections, 32 rows at a time, under
sqrt(ridge) I. Lines with more coefficients than shared memory holds are solved by conjugate gradients, whose products
with the covariance pass over the keys, so that it is never formed:

    o = vbar + Cvk x,    (Ckk + ridge I) x = q - kbar

See ``ttr_np.solvers.local_polynomial`` for the definition and the sources. Degree 0 is softmax attention, with any
kernel in place of the exponential one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import exp, inf, sqrt
from typing import Any

import numpy as np
from numba import float64, int64

from ttr_np.notation import CacheState
from ttr_np.solvers._cache import append, check_options, empty_cache
from ttr_np.solvers.local_polynomial import UNDETERMINED, Fit, check_fit, polynomial

from .._attention import NAMES, TOLERANCE, WARP, Pairs, pairs_of, refusal_of, report, room_of, width_of
from .._calls import Grid, placed
from .._sequences import BOTH, ROW, Sequences
from ._factors import over_warp
from ._launch import cuda, empty, launch, run
from ._neighbours import gather, place, root_of, sight, top_of, weigh
from ._pairs import arrays_of
from .softmax_attention import average

__all__ = ["local_polynomial", "refusal"]

COLUMNS = 128  # of the values that share one line
STEPS = 8  # of conjugate gradients, times channels: in exact arithmetic one each would do


def local_polynomial(
    q: Any,
    k: Any,
    v: Any,
    *,
    degree: int = 1,
    kernel: str | Callable[[np.ndarray], np.ndarray] = "exponential",
    scale: float | None = None,
    bandwidth: float | None = None,
    ridge: float = 1e-6,
    causal: bool = True,
    window: int | None = None,
    log_decay: Any = None,
    **common: Any,
) -> Any:
    """Local polynomial regression; see ``ttr_np.local_polynomial``."""
    check_options(q, log_decay, causal, window)
    check_fit(Fit(degree, kernel, scale, bandwidth, ridge))
    problem = refusal(q=q, kernel=kernel, degree=degree, ridge=ridge)
    if problem:
        raise NotImplementedError(problem)
    options = {"degree": degree, "kernel": kernel, "scale": scale, "bandwidth": bandwidth, "ridge": ridge}
    options |= {"causal": bool(causal), "window": window, "keep": bool(common.get("output_final_state"))}
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    return run(core, "local_polynomial", arrays, options, start=empty_cache, **common)


def refusal(
    *, q: Any = None, kernel: Any = NAMES[0], degree: int = 1, ridge: float = 1e-6, **options: Any
) -> str | None:
    """Why a call with these options cannot be served, or None."""
    return refusal_of("numba-cuda", kernel, degree, ridge, np.shape(q)[-1] if np.ndim(q) else 0)


def core(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    mask: Any,
    *,
    degree: int,
    kernel: str,
    scale: float | None,
    bandwidth: float | None,
    ridge: float,
    causal: bool,
    window: int | None,
    keep: bool,
    state: CacheState,
) -> tuple[Any, CacheState]:
    """One launch; the cache grows only to be returned."""
    pairs, code = pairs_of(state, k, v, mask), NAMES.index(kernel)
    width = width_of(scale, bandwidth, q.shape[-1])
    if degree == 0:
        o = average(q, pairs, log_decay, state, code, width, causal, window, 0)
    else:
        o = fitted(q, pairs, log_decay, state, code, width, degree, float(ridge), (int(causal), window or 0))
    return o, append(state, k, v, log_decay, mask, window) if keep else state


def fitted(
    q: Any, pairs: Pairs, log_decay: Any, state: CacheState, code: int, width: Any, degree: int, ridge: float, see: Any
) -> Any:
    """Fits around all queries, one block of 32 threads for each query and some of its value columns."""
    (tokens, size), values = q.shape[-2:], pairs.v.shape[-1]
    sequences = Sequences(state.k.shape[:-2], np.broadcast_shapes(q.shape[:-2], state.k.shape[:-2]))
    o = empty(sequences, (tokens, values), q.dtype, q)
    room = room_of(size, degree, values)
    columns = max(min(values, COLUMNS), 1) if room is None else max(room, 1)
    parts = max(-(-values // columns), 1)
    grid = Grid(tokens * sequences.groups * parts, WARP)
    arrays = {"q": (q, BOTH), **arrays_of(pairs), "log_decay": (log_decay, ROW), "o": (o, BOTH)}
    numbers = (width, code, np.float64(ridge), *see, pairs.cached, parts)
    if room is None:
        residual = empty(sequences, (tokens,), np.float64, q)
        arrays["residual"], steps = (residual, ROW), STEPS * size
        kernel, numbers = line(size, columns), (*numbers, steps)
        launch(kernel, sequences, arrays, ("o", "residual"), tokens, values, 1, *numbers, grid=grid)
        report(residual, steps)
        return o
    tables = dict(zip(("bounds", "parents", "factors", "scales"), polynomial(size, degree), strict=True))
    arrays |= {name: (placed(x, x.dtype, q), ROW) for name, x in tables.items()}
    kernel = fit(size, len(tables["parents"]), columns, degree)
    launch(kernel, sequences, arrays, ("o",), tokens, values, 1, *numbers, grid=grid)
    return o


@cache
def averages(size: int, columns: int) -> Any:
    """Highest logit, weight, and means of some value columns and, behind them, of the keys."""

    @cuda.jit(device=True)
    def average(
        code, query, mean, weights, k, v, position, left, log_decay, newest, lowest, last, oldest, cached, width, low
    ):
        lane = cuda.threadIdx.x
        for c in range(lane, columns + size, WARP):
            mean[c] = 0.0
        top, weight, since = -inf, 0.0, 0.0
        for tile in range(newest, lowest - 1, -1):
            pair = tile * WARP + lane
            x, since = weigh(code, query, k, position, left, log_decay, pair, last, oldest, cached, since, width)
            higher = max(top, top_of(x))
            shift = higher if higher > -inf else 0.0
            p, kept = exp(x - shift), exp(top - shift)
            weight, top = kept * weight + over_warp(p), higher
            weights[lane] = p if x != -inf else -1.0  # less than none: not even a NaN comes through
            cuda.syncthreads()  # the weights of this tile are staged
            gather(mean, 0, v, tile * WARP, columns, low, weights, kept)
            gather(mean, columns, k, tile * WARP, size, 0, weights, kept)
            cuda.syncthreads()  # nobody is left at the weights
        for c in range(lane, columns + size, WARP):
            mean[c] = mean[c] / weight if weight != 0 else mean[c]
        cuda.syncthreads()  # the means are there
        return top if top > -inf else 0.0, weight

    return average


@cache
def fit(size: int, p: int, columns: int, degree: int) -> Any:
    """The kernel for polynomials of so many coefficients and so many value columns."""
    average, width_of_rows, both = averages(size, columns), p + columns, columns + size

    def local_polynomial(
        q, k, v, position, count, left, log_decay, o, bounds, parents, factors, scales, width, code, ridge, causal,
        window, cached, parts, blocks,
    ):  # fmt: skip
        query = cuda.shared.array(size, float64)
        mean = cuda.shared.array(both, float64)
        weights = cuda.shared.array(WARP, float64)
        rows = cuda.shared.array((WARP, width_of_rows), float64)
        R = cuda.shared.array((p, width_of_rows), float64)
        read = cuda.shared.array(p, float64)
        new = cuda.shared.array(p, int64)
        b, h, step, group, part = place(q.shape[1], q.shape[2], blocks, parts)
        low, keys, values, places, past = part * columns, k[b, h, 0], v[b, h, 0], position[b, h, 0], left[b, h, 0]
        tables = (parents[0, 0, 0], factors[0, 0, 0], scales[0, 0, 0])
        newest, lowest, last, oldest = sight(count[b, h, 0], q.shape[3], step, cached, k.shape[3], causal, window)
        begin(query, q[b, h, group, step], R, ridge)
        top, weight = average(
            code, query, mean, weights, keys, values, places, past, log_decay[b, h, 0], newest, lowest, last, oldest,
            cached, width, low,
        )  # fmt: skip
        centre = mean[columns:] if degree == 1 else query  # that of higher monomials and their ridge
        since = 0.0
        for tile in range(newest, lowest - 1, -1):
            pair = tile * WARP + cuda.threadIdx.x
            x, since = weigh(
                code, query, keys, places, past, log_decay[b, h, 0], pair, last, oldest, cached, since, width
            )
            root = root_of(x, top, weight)
            stage(rows, root, x != -inf, keys, values, pair, centre, mean, tables, p, low)
            cuda.syncthreads()  # the rows of this tile are staged
            reflect(R, rows, p, width_of_rows)
        use = determined(R, new, bounds[0, 0, 0])
        answer(mean, read, R, use, query, centre, tables, columns)
        for c in range(cuda.threadIdx.x, columns, WARP):
            if low + c < v.shape[4]:
                o[b, h, group, step, low + c] = mean[c]

    return local_polynomial


@cuda.jit(device=True)
def begin(query, q, R, ridge):
    """The query, and the triangle of the ridge alone."""
    load(query, q)
    for i in range(cuda.threadIdx.x, R.size, WARP):
        row, column = i // R.shape[1], i % R.shape[1]
        R[row, column] = sqrt(ridge) if row == column and row else 0.0
    cuda.syncthreads()  # the query and the triangle are there


@cuda.jit(device=True)
def stage(rows, root, seen, keys, values, pair, centre, mean, tables, p, low):
    """A row of the fit: monomials, and what the values differ from their mean, times the root of the weight."""
    lane = cuda.threadIdx.x
    parents, factors, scales = tables
    rows[lane, 0] = 1.0
    for i in range(1, p):
        c = factors[i]
        rows[lane, i] = rows[lane, parents[i]] * (float64(keys[pair, c]) - centre[c] if seen else 0.0)
    for i in range(p):
        rows[lane, i] *= root * scales[i]
    for c in range(rows.shape[1] - p):
        there = seen and low + c < values.shape[1]
        rows[lane, p + c] = root * (float64(values[pair, low + c]) - mean[c]) if there else 0.0


@cuda.jit(device=True)
def answer(mean, read, R, use, query, centre, tables, columns):
    """Add to the mean what the coefficients say at the query: B^T R^-T (1, f(query - centre)), entry by entry."""
    lane, p = cuda.threadIdx.x, R.shape[0]
    parents, factors, scales = tables
    if lane == 0:
        read[0] = 1.0
        for i in range(1, p):
            read[i] = read[parents[i]] * (query[factors[i]] - centre[factors[i]])
        for i in range(p):
            read[i] *= scales[i]
    for i in range(use):
        cuda.syncthreads()  # entry i of what is read is final
        share = read[i] / R[i, i]
        for j in range(i + 1 + lane, use, WARP):
            read[j] -= share * R[i, j]
        for c in range(lane, columns, WARP):
            mean[c] += share * R[i, p + c]


@cuda.jit(device=True)
def reflect(R, rows, p, columns):
    """Triangle of the old triangle and 32 rows, by one reflection for each column; the rows are used up."""
    lane = cuda.threadIdx.x
    for i in range(p):
        x, diagonal = rows[lane, i], R[i, i]
        below = over_warp(x * x)
        size = sqrt(diagonal * diagonal + below)
        size = -size if diagonal > 0 else size
        head = diagonal - size
        factor = 0.0 if below == 0 else -1 / (size * head)  # 2 / |(head, x)|^2
        for j in range(i + 1 + lane, columns, WARP):
            share = head * R[i, j]
            for r in range(WARP):
                share += rows[r, i] * rows[r, j]
            share *= factor
            R[i, j] -= share * head
            for r in range(WARP):
                rows[r, j] -= share * rows[r, i]
        cuda.syncthreads()  # column i is used up, the next one is final
        if lane == 0 and not below == 0:
            R[i, i] = size


@cuda.jit(device=True)
def determined(R, new, bounds):
    """How many coefficients to use: all those of the highest degree that the rows determine."""
    cuda.syncthreads()  # the triangle is final
    for j in range(cuda.threadIdx.x, R.shape[0], WARP):
        square = 0.0
        for i in range(j + 1):
            square += R[i, j] * R[i, j]
        new[j] = not abs(R[j, j]) <= UNDETERMINED * sqrt(square)
    cuda.syncthreads()  # all columns are judged
    use = int64(0)
    for degree in range(bounds.shape[0]):
        for j in range(use, bounds[degree]):
            if not new[j]:
                return use
        use = int64(bounds[degree])
    return use


@cache
def line(size: int, columns: int) -> Any:
    """The kernel for lines of many channels: lanes share pairs, then channels."""
    average, both = averages(size, columns), columns + size

    def local_polynomial(
        q, k, v, position, count, left, gates, o, misfit, width, code, ridge, causal, window, cached, parts, steps, cut
    ):
        query = cuda.shared.array(size, float64)
        mean = cuda.shared.array(both, float64)
        weights = cuda.shared.array(WARP, float64)
        vectors = cuda.shared.array((4, size), float64)
        gained = cuda.shared.array(columns, float64)
        b, h, step, group, part = place(q.shape[1], q.shape[2], cut, parts)
        lane, low, centre = cuda.threadIdx.x, part * columns, mean[columns:]
        keys, values, places, past = k[b, h, 0], v[b, h, 0], position[b, h, 0], left[b, h, 0]
        newest, lowest, last, oldest = sight(count[b, h, 0], q.shape[3], step, cached, k.shape[3], causal, window)
        load(query, q[b, h, group, step])
        gate = gates[b, h, 0]
        cuda.syncthreads()  # the query is there
        top, weight = average(
            code, query, mean, weights, keys, values, places, past, gate, newest, lowest, last, oldest, cached,
            width, low,
        )  # fmt: skip
        first = square = set_out(vectors, query, centre)
        for turn in range(steps + 1):  # the last one multiplies values by x
            done = turn == steps or not square > TOLERANCE * TOLERANCE * first
            prepare(vectors, gained, ridge)
            since = 0.0
            for tile in range(newest, lowest - 1, -1):
                pair = tile * WARP + lane
                x, since = weigh(code, query, keys, places, past, gate, pair, last, oldest, cached, since, width)
                weights[lane] = along(vectors[X if done else U], keys, pair, centre, root_of(x, top, weight))
                cuda.syncthreads()  # the weights of this tile are staged
                if done:
                    spread(gained, values, tile * WARP, low, weights, mean)
                else:
                    spread(vectors[Y], keys, tile * WARP, 0, weights, centre)
                cuda.syncthreads()  # nobody is left at the weights
            if done:
                break
            square = descend(vectors, square)
        give(o[b, h, group, step], mean, gained, low)
        if lane == 0 and part == 0:
            misfit[b, h, group, step] = sqrt(square / first) if first > 0 else 0.0

    return local_polynomial


@cuda.jit(device=True)
def load(query, q):
    """A query; lanes share the channels."""
    for c in range(cuda.threadIdx.x, query.shape[0], WARP):
        query[c] = q[c]


@cuda.jit(device=True)
def give(o, mean, gained, low):
    """An answer; lanes share the columns."""
    for c in range(cuda.threadIdx.x, gained.shape[0], WARP):
        if low + c < o.shape[0]:
            o[low + c] = mean[c] + gained[c]


X, RESIDUAL, U, Y = range(4)  # vectors of conjugate gradients: solution, residual, direction, and that times the matrix


@cuda.jit(device=True)
def set_out(vectors, query, centre):
    """The start of conjugate gradients; r . r. Every lane keeps to its own channels."""
    for c in range(cuda.threadIdx.x, query.shape[0], WARP):
        vectors[X, c], vectors[RESIDUAL, c] = 0.0, query[c] - centre[c]
        vectors[U, c] = vectors[RESIDUAL, c]
    return squared(vectors[RESIDUAL])


@cuda.jit(device=True)
def prepare(vectors, gained, ridge):
    """Before the pairs pass: y = ridge u, and nothing gained."""
    for c in range(cuda.threadIdx.x, vectors.shape[1], WARP):
        vectors[Y, c] = ridge * vectors[U, c]
    for c in range(cuda.threadIdx.x, gained.shape[0], WARP):
        gained[c] = 0.0
    cuda.syncthreads()  # the vectors are there


@cuda.jit(device=True)
def along(vector, keys, pair, centre, root):
    """How far a pair's key lies along a vector, measured from the centre, times the pair's share of the weight."""
    total = 0.0
    if root != 0:
        for c in range(vector.shape[0]):
            total += vector[c] * (float64(keys[pair, c]) - centre[c])
    return root * root * total


@cuda.jit(device=True)
def squared(x):
    """x . x; lanes share the channels."""
    total = 0.0
    for c in range(cuda.threadIdx.x, x.shape[0], WARP):
        total += x[c] * x[c]
    return over_warp(total)


@cuda.jit(device=True)
def spread(y, x, start, low, weights, mean):
    """Add the weighted numbers of 32 pairs, measured from their mean; lanes share the columns."""
    for c in range(cuda.threadIdx.x, y.shape[0], WARP):
        total = 0.0
        for j in range(WARP):
            if weights[j] != 0 and low + c < x.shape[1]:
                total += weights[j] * (float64(x[start + j, low + c]) - mean[c])
        y[c] += total


@cuda.jit(device=True)
def descend(vectors, square):
    """One step of conjugate gradients; the new r . r. Every lane keeps to its own channels."""
    curvature = 0.0
    for c in range(cuda.threadIdx.x, vectors.shape[1], WARP):
        curvature += vectors[U, c] * vectors[Y, c]
    length = square / over_warp(curvature)
    for c in range(cuda.threadIdx.x, vectors.shape[1], WARP):
        vectors[X, c] += length * vectors[U, c]
        vectors[RESIDUAL, c] -= length * vectors[Y, c]
    after = squared(vectors[RESIDUAL])
    for c in range(cuda.threadIdx.x, vectors.shape[1], WARP):
        vectors[U, c] = vectors[RESIDUAL, c] + after / square * vectors[U, c]
    return after
