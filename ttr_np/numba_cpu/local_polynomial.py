"""Local polynomial regression, compiled: one fit around every query, by reflections, in double precision.

    [R B] is the triangle of the rows sqrt(p_i) [1 f(k_i - c) | v_i - vbar], block after block, under sqrt(ridge) I,
    o = vbar + B^T R^-T (1, f(q - c))

Weighing, means and rows are made query by query, so nothing but one line of weights grows with the past. See
``ttr_np.solvers.local_polynomial`` for the definition and the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..backends import function_refusal
from ..calling import run
from ..notation import CacheState
from ..solvers._cache import append, check_options, empty_cache, join
from ..solvers._chunks import NO_PAST, output_like
from ..solvers.local_polynomial import KERNELS, UNDETERMINED, Fit, check_fit, polynomial
from ._attention import pairs_of
from ._cache import compiled
from ._compile import apart, inner
from ._gates import exponentials
from ._panels import Matrix, add_scaled, dot, fill, matrix, move, panel, pointer, row
from ._sequences import lay_out
from ._threads import share

__all__ = ["local_polynomial", "refusal"]

ROWS = 32  # that one set of reflections takes in
QUERIES = 8  # of a job
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
    room = [(2, pairs.cached + t), (p + w, ROWS), (p, p + w), (6, max(p, d, w))]
    cost = pairs.seen * memories * groups * (3 * (d + w) + (2 * p * (p + 2 * w) if degree else 0))
    jobs = memories * groups * -(-t // QUERIES)
    tables = (bounds, parents, factors, scales)
    arguments = (layout, tables, sizes, width, float(ridge), o.dtype.type(0))
    share(fit, jobs, cost, (np.dtype(np.float64), room), *arguments)
    return o, append(state, k, v, log_decay, mask, window) if keep else state


class Room(NamedTuple):
    """Scratch of one thread."""

    weights: Matrix  # 2 x pairs: logits, then square roots of the weights; row of each pair
    block: Matrix  # (p + v) x rows: features and targets, a column of the fit in a row
    R: Matrix  # p x (p + v): the triangle, and B
    lines: Matrix  # see below


# Rows of Room.lines.
QUERY, CENTRE, MEAN, PRODUCT, READ, ORIGIN = range(6)


@compiled
def fit(table, places, steps, tables, sizes, width, ridge, like, begin, stop):
    """Jobs begin to stop: a few queries each, the longest pasts first."""
    t, d, w, degree = sizes[0], sizes[1], sizes[2], sizes[4]
    real = 0.0
    room = Room(panel(table, 0, real), panel(table, 1, real), panel(table, 2, real), panel(table, 3, real))
    blocks, groups = (t + QUERIES - 1) // QUERIES, places.shape[2]
    for job in range(begin, stop):
        low, sequence = (blocks - 1 - job % blocks) * QUERIES, job // blocks
        memory, group = sequence // groups, sequence % groups
        q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like)
        k = matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], like)
        v = matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], like)
        o = matrix(places[O, memory, group], steps[O, 0], 1, like)
        origin = row(room.lines, ORIGIN)
        for j in range(d):
            origin[j] = k.data[j * k.column] if math.isfinite(k.data[j * k.column]) else 0.0
        for i in range(low, min(low + QUERIES, t)):
            query, answer = row(room.lines, QUERY), row(o, i)
            for j in range(d):
                query[j] = row(q, i)[j * q.column]
            n = see(room, places, steps, k, memory, i, sizes, width, like)
            average(room, k, v, n, sizes)
            mean = row(room.lines, MEAN)
            for j in range(w):
                answer[j] = mean[j]
            if degree > 0 and n > 0:
                correct(room, k, v, n, tables, sizes, ridge, answer)


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
    apart()
    query, key, origin = row(room.lines, QUERY), row(k, source), row(room.lines, ORIGIN)
    total = 0.0
    if code == 0:
        for j in range(d):
            total += width * query[j] * (key[j * k.column] - origin[j])
        return total
    for j in range(d):
        difference = key[j * k.column] - query[j]
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
        add(mean, p, v, int(rows[r]), w)
        if degree == 1:
            add(centre, p, k, int(rows[r]), d)
    for j in range(w):
        mean[j] = mean[j] / weight if weight != 0 else mean[j]
    for j in range(d):
        centre[j] = query[j] if degree != 1 else centre[j] / weight if weight != 0 else centre[j]
    for r in range(n):
        logits[r] = logits[r] / math.sqrt(weight) if not weight <= 0 else logits[r]


@inner
def add(mean, p, x, source, n):
    """mean = mean + p x, where what is not finite is no number."""
    numbers = row(x, source)
    for j in range(n):
        number = np.float64(numbers[j * x.column])
        mean[j] += p * number if math.isfinite(number) else np.nan


@inner
def correct(room, k, v, n, tables, sizes, ridge, answer):
    """Add to the mean what the slopes say."""
    apart()
    bounds, parents, factors, scales = tables
    w = sizes[2]
    p = len(parents)
    for i in range(p):
        fill(row(room.R, i), 0.0, p + w)
        row(room.R, i)[i] = math.sqrt(ridge) if i else 0.0
    neighbours = 0
    for low in range(0, n, ROWS):
        rows = min(ROWS, n - low)
        neighbours += take_rows(room, k, v, low, rows, tables, w)
        reflect(room, rows, p, p + w)
    read, product = row(room.lines, READ), row(room.lines, PRODUCT)
    query, centre, mean = row(room.lines, QUERY), row(room.lines, CENTRE), row(room.lines, MEAN)
    for i in range(p):
        product[i] = product[parents[i]] * (query[factors[i]] - centre[factors[i]]) if i else 1.0
        read[i] = product[i] * scales[i]
    use = determined(room, bounds, neighbours, ridge)
    for i in range(p):
        R = row(room.R, i)
        read[i] = read[i] / R[i] if i < use else 0.0
        add_scaled(move(read, i + 1), -read[i], move(R, i + 1), p - i - 1)
        add_scaled(mean, read[i], move(R, p), w)
    for j in range(w):
        answer[j] = mean[j]


@inner
def take_rows(room, k, v, low, rows, tables, w):
    """Rows of the fit under the roots of their weights; how many are not zero."""
    apart()
    _, parents, factors, scales = tables
    roots, sources = row(room.weights, 0), row(room.weights, 1)
    product, centre, mean = row(room.lines, PRODUCT), row(room.lines, CENTRE), row(room.lines, MEAN)
    p, count = len(parents), 0
    for r in range(rows):
        root = roots[low + r]
        key, value = row(k, int(sources[low + r])), row(v, int(sources[low + r]))
        product[0] = 1.0
        row(room.block, 0)[r] = root
        for i in range(1, p):
            z = key[factors[i] * k.column] - centre[factors[i]]
            product[i] = product[parents[i]] * z
            row(room.block, i)[r] = root * (scales[i] * product[i])
        for j in range(w):
            row(room.block, p + j)[r] = root * (value[j * v.column] - mean[j])
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
