"""Affine projection, compiled: token by token, one memory per job, its columns as rows.

    S_t = S_{t-1} + beta_t K^T (K K^T + ridge I)^-1 (V - K S_{t-1}),    o_t = S_t^T q_t

with the last ``order`` pairs as the rows of K and V. Only the newest row of K K^T is new at each token. Its inverse is
F^T diag(weights) F: F is the inverse of a Cholesky factor where a bound on the smallest eigenvalue vouches for it, and
has eigenvectors as rows where it does not. See ``ttr_np.solvers.affine_projection`` for the source.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..calling import run
from ..notation import AffineProjectionState
from ..solvers._chunks import output_like
from ..solvers.affine_projection import check_options, start
from ._cache import compiled
from ._compile import apart, inner
from ._panels import below, count_bad_of, fill, gather, load, matrix, most, move, panel, real, row, store
from ._sequences import lay_out
from ._threads import share

__all__ = ["affine_projection"]

TOKENS = 32  # pairs that follow each other in scratch before the last ones move to its front
CLEARLY = 1024  # times the least eigenvalue that counts: then no rounding makes it count as zero
SMALL = 1 / 1024  # of a rounding: numbers beside a diagonal that turn no eigenvector
SWEEPS = 40  # of Jacobi rotations; they end after five or six, each squares what is left
Q, KEY, VALUE, BETA, SEEN, STATE, PAST_KEYS, PAST_VALUES, O = range(9)


def affine_projection(q: Any, k: Any, v: Any, beta: Any, *, order: int = 2, ridge: float = 0.0, **common: Any) -> Any:
    """Affine projection; see ``ttr_np.affine_projection``."""
    check_options(order, ridge)
    arrays = {"q": q, "k": k, "v": v, "beta": beta}
    return run(core, "affine_projection", arrays, {"ridge": float(ridge)}, start=partial(start, order), **common)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    mask: np.ndarray | None,
    *,
    ridge: float,
    state: AffineProjectionState,
) -> tuple[np.ndarray, AffineProjectionState]:
    """Lay out the sequences and share them among threads."""
    S, keys, values = state
    o, (t, d), w, p = output_like(q, v, S), q.shape[-2:], v.shape[-1], keys.shape[-2] + 1
    seen = None if mask is None else mask.astype(S.dtype)
    layout = lay_out(
        S.shape[:-2], o.shape[:-2], (q, 2), (k, 2), (v, 2), (beta, 1), (seen, 1), (S, 2), (keys, 2), (values, 2), (o, 2)
    )  # fmt: skip
    memories, groups = layout.places.shape[1:]
    rows = TOKENS + p - 1
    room = [(w, d), (rows, d), (rows, w), (rows, p), (p, p), (p, p), (6, max(p, d))]
    cost = memories * t * ((2 * p + groups) * d * w + p * d + p**3)
    number = S.dtype.type
    share(
        kernel, memories, cost, (S.dtype, room), layout, (t, d, w, p), number(ridge), number(np.finfo(S.dtype).eps)
    )  # fmt: skip
    return o, state


class Room(NamedTuple):
    """Scratch of one memory."""

    S: Any  # columns of the memory as rows
    keys: Any  # pairs, oldest first
    values: Any
    band: Any  # row i: products of key i with itself, the key before it, the one before that, and so on
    gram: Any  # of the pairs that are fitted, or its Cholesky factor
    F: Any
    weights: Any
    error: Any
    turned: Any
    change: Any
    query: Any
    sum: Any  # of rows


@inner
def room_of(table, like):
    """The panels by their names."""
    lines = panel(table, 6, like)
    return Room(
        panel(table, 0, like), panel(table, 1, like), panel(table, 2, like), panel(table, 3, like),
        panel(table, 4, like), panel(table, 5, like), row(lines, 0), row(lines, 1), row(lines, 2), row(lines, 3),
        row(lines, 4), row(lines, 5),
    )  # fmt: skip


@compiled
def kernel(table, places, steps, sizes, ridge, eps, begin, stop):
    """Jobs begin to stop: one memory each."""
    t, d, w, p = sizes
    room = room_of(table, ridge)
    for memory in range(begin, stop):
        take(room, places, memory, d, w, p, ridge)
        first = 0
        for i in range(t):
            if is_seen(places, steps, memory, i, ridge):
                if first == TOKENS:
                    move_to_front(room, first, d, w, p)
                    first = 0
                append(room, places, steps, memory, i, first + p - 1, d, w, p, ridge)
                weigh(room, first, p, ridge, eps)
                beta = row(matrix(places[BETA, memory, 0], steps[BETA, 0], 1, ridge), i)[0]
                for j in range(w):
                    learn(room, first, beta, j, d, p, ridge)
                first += 1
            for group in range(places.shape[2]):
                answer(room, places, steps, memory, group, i, d, w, ridge)
        give(room, places, memory, first, d, w, p, ridge)


@inner
def is_seen(places, steps, memory, i, like):
    """Whether a token is memorised."""
    mask = places[SEEN, memory, 0]
    return not mask or row(matrix(mask, steps[SEEN, 0], 1, like), i)[0] != 0


@inner
def take(room, places, memory, d, w, p, like):
    """A memory and the pairs it still needs into scratch."""
    apart()
    turn(room.S, matrix(places[STATE, memory, 0], w, 1, like), d, w)
    load(room.keys, matrix(places[PAST_KEYS, memory, 0], d, 1, like), 0, p - 1, 0, d)
    load(room.values, matrix(places[PAST_VALUES, memory, 0], w, 1, like), 0, p - 1, 0, w)
    for i in range(p - 1):
        meet(room, i, i + 1, d, like)


@inner
def turn(into, x, rows, columns):
    """The rows of x as columns."""
    apart()
    for i in range(rows):
        for j in range(columns):
            row(into, j)[i] = row(x, i)[j]


@inner
def give(room, places, memory, first, d, w, p, like):
    """What ``take`` took, as it is now."""
    apart()
    turn(matrix(places[STATE, memory, 0], w, 1, like), room.S, w, d)
    store(matrix(places[PAST_KEYS, memory, 0], d, 1, like), 0, p - 1, 0, d, below(room.keys, first))
    store(matrix(places[PAST_VALUES, memory, 0], w, 1, like), 0, p - 1, 0, w, below(room.values, first))


@inner
def move_to_front(room, first, d, w, p):
    """The pairs that are still needed to where there is room behind them."""
    apart()
    load(room.keys, room.keys, first, p - 1, 0, d)
    load(room.values, room.values, first, p - 1, 0, w)
    load(room.band, room.band, first, p - 1, 0, p)


@inner
def append(room, places, steps, memory, i, to, d, w, p, like):
    """The pair of one token, and its products with those before it."""
    apart()
    key = matrix(places[KEY, memory, 0], steps[KEY, 0], steps[KEY, 1], like)
    value = matrix(places[VALUE, memory, 0], steps[VALUE, 0], steps[VALUE, 1], like)
    gather(row(room.keys, to), row(key, i), key.column, d)
    gather(row(room.values, to), row(value, i), value.column, w)
    meet(room, to, p, d, like)


@inner
def meet(room, i, count, d, like):
    """The products of a key with itself and so many less one before it."""
    dots(row(room.band, i), row(room.keys, i), -room.keys.step, row(room.keys, i), count, d, like)


@inner
def dots(into, x, step, y, n, d, like):
    """The products of y with n rows, so many numbers apart."""
    apart()
    for i in range(n):
        x_i, total = move(x, i * step), real(like, 0)
        for m in range(d):
            total += x_i[m] * y[m]
        into[i] = total


@inner
def weigh(room, first, p, ridge, eps):
    """F and its weights for the pairs from the first on."""
    apart()
    if factorise(room, first, p, ridge, eps):
        fill(room.weights, real(ridge, 1), p)
    else:
        if spread(room.gram, room.band, first, p, ridge):
            diagonalise(room.gram, room.F, p, eps)
            invert(room.gram, room.weights, p, ridge, eps)
        else:
            fill(room.weights, real(ridge, np.nan), p)


@inner
def spread(gram, band, first, p, like):
    """K K^T in full, and whether all of it is finite."""
    bad = np.int32(0)
    for i in range(p):
        met = row(band, first + i)
        bad += count_bad_of(met, i + 1, most(like))
        for j in range(i + 1):
            row(gram, i)[j] = row(gram, j)[i] = met[i - j]
    return bad == 0


@inner
def factorise(room, first, p, ridge, eps):
    """F = L^-1 with L L^T = K K^T + ridge I, and whether no eigenvalue comes near those that count as zero.

    The smallest is at least 1 / |F|^2. Anything that is not finite fails.
    """
    apart()
    L, F, inverse, zero, one = room.gram, room.F, room.turned, real(ridge, 0), real(ridge, 1)
    trace, size = zero, zero
    for i in range(p):
        row_i, met = row(L, i), row(room.band, first + i)
        for j in range(i):
            row_i[j] = inverse[j] * (met[i - j] - product(row_i, row(L, j), j, ridge))
        trace += met[0] + ridge
        pivot = met[0] + ridge - product(row_i, row_i, i, ridge)
        if not pivot > zero:
            return False
        inverse[i] = one / math.sqrt(pivot)
        for j in range(p):
            total = one if i == j else zero
            for m in range(j, i):
                total -= row_i[m] * row(F, m)[j]
            row(F, i)[j] = inverse[i] * total
            size += row(F, i)[j] * row(F, i)[j]
    return size * trace * real(ridge, CLEARLY * p) * eps < one


@inner
def product(x, y, n, like):
    """x . y of a few numbers, in line."""
    total = real(like, 0)
    for j in range(n):
        total += x[j] * y[j]
    return total


@inner
def diagonalise(A, F, p, eps):
    """Eigenvalues of A on its diagonal, eigenvectors as rows of F: Jacobi's rotations, pair by pair."""
    apart()
    for i in range(p):
        fill(row(F, i), real(eps, 0), p)
        row(F, i)[i] = real(eps, 1)
    for _ in range(SWEEPS):
        turned, least = False, real(eps, SMALL) * eps * largest(A, p, eps)
        for i in range(1, p):
            for j in range(i):
                if abs(row(A, i)[j]) > least:
                    rotate(A, F, i, j, p, eps)
                    turned = True
        if not turned:
            break


@inner
def largest(A, p, like):
    """The largest number of a diagonal."""
    found = row(A, 0)[0]
    for i in range(1, p):
        found = max(found, row(A, i)[i])
    return found


@inner
def rotate(A, F, i, j, p, like):
    """Turn rows and columns i and j so that A_ij becomes 0, and rows i and j of F with them."""
    apart()
    one, beside = real(like, 1), row(A, i)[j]
    slope = (row(A, j)[j] - row(A, i)[i]) / (beside + beside)
    tangent = one / (abs(slope) + math.sqrt(one + slope * slope))
    if slope < 0:
        tangent = -tangent
    cosine = one / math.sqrt(one + tangent * tangent)
    sine = tangent * cosine
    row(A, i)[i] -= tangent * beside
    row(A, j)[j] += tangent * beside
    row(A, i)[j] = row(A, j)[i] = real(like, 0)
    for m in range(p):
        if m not in (i, j):
            x, y = row(A, m)[i], row(A, m)[j]
            row(A, m)[i] = row(A, i)[m] = cosine * x - sine * y
            row(A, m)[j] = row(A, j)[m] = sine * x + cosine * y
        x, y = row(F, i)[m], row(F, j)[m]
        row(F, i)[m], row(F, j)[m] = cosine * x - sine * y, sine * x + cosine * y


@inner
def invert(A, weights, p, ridge, eps):
    """One over each eigenvalue and the ridge, 0 for those that count as zero."""
    apart()
    zero = real(ridge, 0)
    least = real(ridge, p) * eps * largest(A, p, ridge)
    for i in range(p):
        value = row(A, i)[i]
        shifted = ridge + (value if ridge > zero or value > least else zero)
        weights[i] = real(ridge, 1) / shifted if shifted > zero else zero


@inner
def learn(room, first, beta, j, d, p, like):
    """One column of the memory after a step to the fit of its pairs."""
    apart()
    S, error, turned, change = row(room.S, j), room.error, room.turned, room.change
    dots(error, row(room.keys, first), room.keys.step, S, p, d, like)
    for i in range(p):
        error[i] = row(room.values, first + i)[j] - error[i]
        change[i] = real(like, 0)
    for i in range(p):
        turned[i] = room.weights[i] * product(row(room.F, i), error, p, like)
        for m in range(p):
            change[m] += row(room.F, i)[m] * turned[i]
    for i in range(p):
        change[i] *= beta
    add_rows(S, change, row(room.keys, first), room.keys.step, room.sum, p, d)


@inner
def add_rows(y, factors, x, step, total, n, d):
    """y = y + the sum of n rows, which may cancel each other, each times its factor."""
    apart()
    for m in range(d):
        total[m] = factors[0] * x[m]
    for i in range(1, n):
        x_i, factor = move(x, i * step), factors[i]
        for m in range(d):
            total[m] += factor * x_i[m]
    for m in range(d):
        y[m] += total[m]


@inner
def answer(room, places, steps, memory, group, i, d, w, like):
    """What the memory says to one query."""
    apart()
    q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like)
    o, query = row(matrix(places[O, memory, group], steps[O, 0], 1, like), i), row(q, i)
    if q.column != 1:
        gather(room.query, query, q.column, d)
        query = room.query
    dots(o, row(room.S, 0), room.S.step, query, w, d, like)
