"""Local polynomial regression, compiled: one fit around every query, in double precision.

    x_i = sqrt(p_i) (1, f(k_i - c)),    y_i = sqrt(p_i) (v_i - vbar),
    N = sum_i x_i x_i^T + ridge I,    N z = (1, f(q - c)),    o = vbar + sum_i (z . x_i) y_i

The moments N square the condition of the rows, so z is corrected once by what the rows themselves say of it. Where they
may leave a coefficient undetermined, or z is so large that the rounding of z . x_i would be seen, the rows are
reflected, block after block, into the triangle R with N = R^T R.

Weighing, means and rows are made query by query, so nothing but one line of weights grows with the past. See
``ttr_np.solvers.local_polynomial`` for the definition and the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from ..backends import function_refusal
from ..calling import run
from ..notation import CacheState
from ..solvers._cache import append, check_options, empty_cache, join
from ..solvers._chunks import NO_PAST, output_like
from ..solvers.local_polynomial import KERNELS, UNDETERMINED, Fit, check_fit, polynomial
from ._attention import pairs_of
from ._cache import compiled
from ._compile import apart, inner
from ._factors import BLOCK, cholesky, square
from ._gates import exponentials
from ._panels import (
    Matrix,
    add_scaled,
    copy,
    dot,
    fill,
    gather,
    load_transposed,
    matrix,
    move,
    multiply,
    pointer,
    row,
    triangle,
)
from ._rooms import panels_by_name
from ._rows import add_finite, add_offset, add_row, dot_offset, dot_rows, offset_row
from ._sequences import lay_out
from ._threads import share

__all__ = ["local_polynomial", "refusal"]

ROWS = 32  # that one set of reflections takes in
DEPTH = 64  # rows that one product adds to the moments
QUERIES = 8  # of a job
LEAST = 12  # coefficients whose moments take less time than reflections
FACTOR = 12  # p / 12 rows are reflected in the time that a factor of the moments takes
PIVOT = 1e-9  # share of a moment that must be new to those before it, far from UNDETERMINED squared
NAMES = ("exponential", *KERNELS)  # a kernel's code is its place: the compact ones are powers of 1 - u^2
Q, K, V, GATE, O, ORDER, LEFT, SINKS, FIRST, END = range(10)


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
    problem = refusal(kernel=kernel)
    if problem:
        raise NotImplementedError(problem)
    options = {"degree": degree, "kernel": kernel, "scale": scale, "bandwidth": bandwidth, "ridge": ridge}
    options |= {"causal": bool(causal), "window": window, "keep": bool(common.get("output_final_state"))}
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    return run(core, "local_polynomial", arrays, options, start=empty_cache, **common)


def refusal(*, kernel: Any = NAMES[0], **options: Any) -> str | None:
    """Why a call with these options cannot be compiled, or None."""
    return function_refusal("numba", kernel, NAMES)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    mask: np.ndarray | None,
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
) -> tuple[np.ndarray, CacheState]:
    """Lay out the sequences and share their queries among threads; copy the cache only to return it."""
    o = output_like(q, v, state.k)
    pairs = pairs_of(state, q.shape[-2], mask, causal, window)
    keys, values = (join(old, new, 2) if pairs.cached else new for old, new in ((state.k, k), (state.v, v)))
    keys, values = in_rows(keys), in_rows(values)
    layout = lay_out(
        state.k.shape[:-2], o.shape[:-2], (q, 2), (keys, 2), (values, 2), (log_decay, 1), (o, 2), (pairs.order, 1),
        (pairs.left, 1), (pairs.sinks, 1), (pairs.first, 1), (pairs.end, 1),
    )  # fmt: skip
    (t, d), w = q.shape[-2:], v.shape[-1]
    memories, groups = layout.places.shape[1:]
    bounds, parents, factors, scales = polynomial(d, degree)
    p, code = len(parents), NAMES.index(kernel)
    width = 1 / bandwidth if bandwidth is not None else max(d, 1) ** -0.5 if scale is None else float(scale)
    sizes = (t, d, w, pairs.cached, degree, code)
    room = [(2, pairs.cached + t), (p + w, max(ROWS, BLOCK)), (DEPTH, p), (p, p + w), (LINES, max(p, d, w))]
    cost = pairs.seen * memories * groups * (3 * (d + w) + (p * (p + 6) if degree else 0))
    jobs = memories * groups * -(-t // QUERIES)
    tables = (bounds, parents, factors, scales)
    arguments = (layout, tables, sizes, width, float(ridge), o.dtype.type(0))
    share(fit, jobs, cost, (np.dtype(np.float64), room), *arguments)
    return o, append(state, k, v, log_decay, mask, window) if keep else state


def in_rows(x: np.ndarray) -> np.ndarray:
    """Rows whose numbers lie side by side; what repeats is not copied more than once."""
    if x.strides[-1] == x.itemsize:
        return x
    own = x[tuple(slice(None if step else 1) for step in x.strides[:-1])]
    return np.broadcast_to(np.ascontiguousarray(own), x.shape)


class Room(NamedTuple):
    """Scratch of one thread."""

    weights: Matrix  # 2 x pairs: logits, then square roots of the weights; row of each pair
    block: Matrix  # (p + v) x rows: features and targets, a column of the fit in a row; or room of a factorisation
    rows: Matrix  # rows x p: x_i
    R: Matrix  # p x (p + v): the moments and their factor; or the triangle, and B
    lines: Matrix  # see below


# Rows of Room.lines.
QUERY, CENTRE, MEAN, SOLUTION, REST, ORIGIN, LINES = range(7)
room_of = panels_by_name(Room)


@compiled
def fit(table, places, steps, tables, sizes, width, ridge, like, begin, stop):
    """Jobs begin to stop: a few queries each, the longest pasts first."""
    t, d, w, degree = sizes[0], sizes[1], sizes[2], sizes[4]
    room = room_of(table, 0.0)
    blocks, groups = (t + QUERIES - 1) // QUERIES, places.shape[2]
    for job in range(begin, stop):
        low, sequence = (blocks - 1 - job % blocks) * QUERIES, job // blocks
        memory, group = sequence // groups, sequence % groups
        q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like)
        k = matrix(places[K, memory, 0], steps[K, 0], 1, like)
        v = matrix(places[V, memory, 0], steps[V, 0], 1, like)
        o = matrix(places[O, memory, group], steps[O, 0], 1, like)
        origin = row(room.lines, ORIGIN)
        for j in range(d):
            origin[j] = k.data[j] if math.isfinite(k.data[j]) else 0.0
        for i in range(low, min(low + QUERIES, t)):
            query, answer = row(room.lines, QUERY), row(o, i)
            for j in range(d):
                query[j] = row(q, i)[j * q.column]
            n = see(room, places, steps, k, memory, i, sizes, width, like)
            average(room, k, v, n, sizes)
            mean = row(room.lines, MEAN)
            for j in range(w):
                answer[j] = mean[j]
            if degree > 0 and n > 0 and not by_moments(room, k, v, n, tables, sizes, ridge, answer, like):
                by_reflections(room, k, v, n, tables, sizes, ridge, answer)


@inner
def see(room, places, steps, k, memory, i, sizes, width, like):
    """Logits of the pairs that one query sees, and their rows; how many have any weight. Newest first."""
    apart()
    d, cached, code = sizes[1], sizes[3], sizes[5]
    one = np.int64(1)
    order, past = pointer(places[ORDER, memory, 0], one), pointer(places[LEFT, memory, 0], 0.0)
    first, end = pointer(places[FIRST, memory, 0], one), pointer(places[END, memory, 0], one)
    gates, decays = matrix(places[GATE, memory, 0], steps[GATE, 0], 1, like), places[GATE, memory, 0] != 0
    logits, rows = row(room.weights, 0), row(room.weights, 1)
    left, n = 0.0, 0
    for slot in range(end[i] - 1, first[i] - 1, -1):
        source = order[slot]
        total = left if source >= cached else left + past[source]
        if not total < NO_PAST / 2:
            logit = log_kernel(room, k, source, d, code, width) + total
            if logit != -np.inf:
                logits[n], rows[n] = logit, source
                n += 1
        if decays and source >= cached:
            gate = np.float64(row(gates, source - cached)[0])
            left += NO_PAST if gate < NO_PAST else gate  # noqa: FURB136 - max could drop a NaN
    return n


@inner
def log_kernel(room, k, source, d, code, width):
    """Log of the kernel between the query and one key."""
    query, key, total = row(room.lines, QUERY), row(k, source), 0.0
    if code == 0:
        return width * dot_offset(query, key, row(room.lines, ORIGIN), d)
    for j in range(d):
        difference = key[j] - query[j]
        total += difference * difference
    if code == 1:
        return -total * (width * width) / 2
    u = math.sqrt(total) * width
    if not u <= 1:
        return np.nan if math.isnan(u * 0 if code == 5 else u) else -np.inf
    inside = (1 - u) * (1 + u)
    return 0.0 if code == 5 else (code - 1) * math.log(inside) if inside > 0 else -np.inf


@inner
def average(room, k, v, n, sizes):
    """Means of the values and of the keys (the centre of a line); logits become square roots of the weights."""
    apart()
    d, w, degree = sizes[1], sizes[2], sizes[4]
    logits, rows = row(room.weights, 0), row(room.weights, 1)
    mean, centre, query = row(room.lines, MEAN), row(room.lines, CENTRE), row(room.lines, QUERY)
    fill(mean, 0.0, w)
    fill(centre, 0.0, d)
    top, weight = -np.inf, 0.0
    for r in range(n):
        top = logits[r] if logits[r] > top else top  # noqa: FURB136 - never a NaN
    top = top if top > -np.inf else 0.0
    for r in range(n):
        logits[r] = (logits[r] - top) / 2
    exponentials(logits, n)
    for r in range(n):
        p = logits[r] * logits[r]
        weight += p
        add_finite(mean, p, row(v, int(rows[r])), w)
        if degree == 1:
            add_finite(centre, p, row(k, int(rows[r])), d)
    for j in range(w):
        mean[j] = mean[j] / weight if weight != 0 else mean[j]
    for j in range(d):
        centre[j] = query[j] if degree != 1 else centre[j] / weight if weight != 0 else centre[j]
    for r in range(n):
        logits[r] = logits[r] / math.sqrt(weight) if not weight <= 0 else logits[r]


@inner
def features(x, root, key, centre, tables, d):
    """x = root (1, f(key - c))."""
    _, parents, factors, scales = tables
    x[0] = root
    offset_row(move(x, 1), root, key, centre, d)
    for i in range(1 + d, len(parents)):
        x[i] = x[parents[i]] * (key[factors[i]] - centre[factors[i]])
    for i in range(1 + d, len(parents)):
        x[i] *= scales[i]


@inner
def rows_of(room, k, low, rows, tables, d):
    """Rows of the fit under the roots of their weights: those from ``low`` on."""
    apart()
    roots, sources, centre = row(room.weights, 0), row(room.weights, 1), row(room.lines, CENTRE)
    for r in range(rows):
        features(row(room.rows, r), roots[low + r], row(k, int(sources[low + r])), centre, tables, d)


@intrinsic
def unseen(typingctx: Any, like: Any) -> Any:
    """Square of the largest |z| |x| whose rounding in double precision is not seen in the dtype."""
    number = {32: 2.0**56, 64: 2.0**20}[like.bitwidth]
    return types.float64(like), lambda context, builder, signature, args: context.get_constant(types.float64, number)


@inner
def by_moments(room, k, v, n, tables, sizes, ridge, answer, like):
    """Add to the mean what the slopes say, from the moments; False if those say too little."""
    apart()
    d, w, p, trace = sizes[1], sizes[2], len(tables[1]), 0.0
    if p < LEAST or FACTOR * n < p or not (ridge > 0 or n >= p):
        return False
    moments(room, k, n, tables, d, ridge)
    gather(row(room.lines, REST), room.R.data, room.R.step + 1, p)
    for i in range(p):
        trace += row(room.lines, REST)[i]
    if not (cholesky(room.R, room.block, p, 1.0) and pivots(room, p)):
        return False
    solve_twice(room, k, n, tables, d, ridge)
    if not trace * square(row(room.lines, SOLUTION), p) < unseen(like):
        return False
    read(room, k, v, n, tables, d, w, answer)
    return True


@inner
def moments(room, k, n, tables, d, ridge):
    """N, its lower triangle at least."""
    apart()
    p = len(tables[1])
    for i in range(p):
        fill(row(room.R, i), 0.0, p)
        row(room.R, i)[i] = ridge if i else 0.0
    for low in range(0, n, DEPTH):
        rows = min(DEPTH, n - low)
        rows_of(room, k, low, rows, tables, d)
        multiply(room.R, Matrix(room.rows.data, 1, room.rows.step), room.rows, p, p, rows, 1.0, 1.0, triangle)


@inner
def pivots(room, p):
    """Whether each coefficient has something of its own; in REST is the diagonal of the moments."""
    for i in range(p):
        if not row(room.R, i)[i] ** 2 > PIVOT * row(room.lines, REST)[i]:
            return False
    return True


@inner
def solve_twice(room, k, n, tables, d, ridge):
    """z from the factor, and what it leaves of the right-hand side once more."""
    p, z, rest = len(tables[1]), row(room.lines, SOLUTION), row(room.lines, REST)
    features(z, 1.0, row(room.lines, QUERY), row(room.lines, CENTRE), tables, d)
    copy(rest, z, p)
    solve(room, z, p)
    leave(room, k, n, tables, d, ridge)
    solve(room, rest, p)
    add_scaled(z, 1.0, rest, p)


@inner
def solve(room, x, p):
    """x = N^-1 x from the factor."""
    apart()
    for i in range(p):
        x[i] = (x[i] - dot(row(room.R, i), x, i, 0.0)) / row(room.R, i)[i]
    for i in range(p - 1, -1, -1):
        x[i] /= row(room.R, i)[i]
        add_scaled(x, -x[i], row(room.R, i), i)


@inner
def leave(room, k, n, tables, d, ridge):
    """Take from the right-hand side what the solution explains of it: every row's share, and the ridge's."""
    apart()
    p, z, rest = len(tables[1]), row(room.lines, SOLUTION), row(room.lines, REST)
    add_scaled(move(rest, 1), -ridge, move(z, 1), p - 1)
    for low in range(0, n, DEPTH):
        rows = min(DEPTH, n - low)
        rows_of(room, k, low, rows, tables, d)
        for r in range(rows):
            x = row(room.rows, r)
            add_row(rest, -dot_rows(x, z, p), x, p)


@inner
def read(room, k, v, n, tables, d, w, answer):
    """The answer: every row's value in the share that the solution gives it."""
    apart()
    p, roots, sources = len(tables[1]), row(room.weights, 0), row(room.weights, 1)
    mean, z, total = row(room.lines, MEAN), row(room.lines, SOLUTION), row(room.lines, REST)
    fill(total, 0.0, w)
    for low in range(0, n, DEPTH):
        rows = min(DEPTH, n - low)
        rows_of(room, k, low, rows, tables, d)
        for r in range(rows):
            part = dot_rows(row(room.rows, r), z, p) * roots[low + r]
            add_offset(total, part, row(v, int(sources[low + r])), mean, w)
    for j in range(w):
        answer[j] = mean[j] + total[j]


@inner
def by_reflections(room, k, v, n, tables, sizes, ridge, answer):
    """Add to the mean what the slopes say, from the rows."""
    apart()
    d, w, p = sizes[1], sizes[2], len(tables[1])
    for i in range(p):
        fill(row(room.R, i), 0.0, p + w)
        row(room.R, i)[i] = math.sqrt(ridge) if i else 0.0
    neighbours = 0
    for low in range(0, n, ROWS):
        rows = min(ROWS, n - low)
        neighbours += take_rows(room, k, v, low, rows, tables, d, w)
        reflect(room, rows, p, p + w)
    x, mean, use = row(room.lines, SOLUTION), row(room.lines, MEAN), determined(room, tables[0], neighbours, ridge)
    features(x, 1.0, row(room.lines, QUERY), row(room.lines, CENTRE), tables, d)
    for i in range(p):
        R = row(room.R, i)
        x[i] = x[i] / R[i] if i < use else 0.0
        add_scaled(move(x, i + 1), -x[i], move(R, i + 1), p - i - 1)
        add_scaled(mean, x[i], move(R, p), w)
    for j in range(w):
        answer[j] = mean[j]


@inner
def take_rows(room, k, v, low, rows, tables, d, w):
    """Rows of the fit and their targets, as columns; how many are not zero."""
    apart()
    roots, sources, mean, p = row(room.weights, 0), row(room.weights, 1), row(room.lines, MEAN), len(tables[1])
    rows_of(room, k, low, rows, tables, d)
    load_transposed(room.block, room.rows, 0, rows, p)
    count = 0
    for r in range(rows):
        root, value = roots[low + r], row(v, int(sources[low + r]))
        for j in range(w):
            row(room.block, p + j)[r] = root * (value[j] - mean[j])
        count += root != 0
    return count


@inner
def reflect(room, rows, p, columns):
    """Triangle of the old triangle and a block of rows, by one reflection for each column; the block is used up."""
    apart()
    for i in range(p):
        R, x = row(room.R, i), row(room.block, i)
        below = dot(x, x, rows, 0.0)
        if below == 0:
            continue
        size = math.sqrt(R[i] * R[i] + below)
        size = -size if R[i] > 0 else size
        head = R[i] - size
        factor = -1 / (size * head)  # 2 / |(head, x)|^2
        R[i] = size
        for j in range(i + 1, columns):
            y = row(room.block, j)
            share_of = factor * (head * R[j] + dot(x, y, rows, 0.0))
            R[j] -= share_of * head
            add_scaled(y, -share_of, x, rows)


@inner
def determined(room, bounds, neighbours, ridge):
    """How many coefficients to use: all those of the highest degree that the rows determine."""
    apart()
    new, use = True, 0
    for degree in range(len(bounds)):
        for j in range(use, bounds[degree]):
            square = 0.0
            for i in range(j + 1):
                square += row(room.R, i)[j] ** 2
            new = new and not abs(row(room.R, j)[j]) <= UNDETERMINED * math.sqrt(square)
        if not (new and (ridge > 0 or neighbours >= bounds[degree])):
            break
        use = bounds[degree]
    return use
