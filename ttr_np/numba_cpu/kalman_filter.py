"""Kalman filter, compiled: token by token, one memory per job, half of its symmetric covariance carried.

With p = P k, a = k . p, s = r + a and any gain c, Joseph's sum of positive semidefinite terms is

    (I - c k^T) P (I - c k^T)^T + r c c^T = P - c p^T - p c^T + s c c^T = P - c p^T - e c^T,      e = (p - a c) - r c

and so symmetric though it does not look it: one of its triangles is enough. What makes it a sum is e, what rounding
has left in the gain c = p / s, and in e that r is added by itself: to a covariance far above the noise of the
measurement it would be lost in s. All this in float64: what is not yet learnt is larger than the noise by more than
float32 can tell apart. See ``ttr_np.solvers.kalman_filter`` for the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..calling import run
from ..notation import KalmanFilterState
from ..solvers._chunks import output_like
from ..solvers.kalman_filter import check_covariance, check_noise
from ..solvers.recursive_least_squares import check_ridge, check_symmetric, start
from ._cache import compiled
from ._compile import apart, inner
from ._lanes import CHAINS, in_fours, padded
from ._panels import (
    PARTS,
    Matrix,
    copy,
    count_bad_of,
    dot,
    fill,
    gather,
    load,
    matrix,
    most,
    panel,
    real,
    row,
    scale,
    store,
)
from ._sequences import lay_out
from ._threads import share
from ._vectors import BYTES, Vectors, ceil_div, per_vector

__all__ = ["kalman_filter"]

Q, K, V, DRIFT, NOISE, TRANSITION, STATE, COVARIANCE, O = range(9)  # noqa: E741
KEY, QUERY, READ, GAIN, REST = range(5)  # lines of keys: P k, the gain, and what rounding left in it
ERROR, TOLD = range(2)  # lines of values


def kalman_filter(
    q: Any,
    k: Any,
    v: Any,
    *,
    process_noise: Any = 0.0,
    measurement_noise: Any = 1.0,
    log_transition: Any = None,
    ridge: float = 1.0,
    **common: Any,
) -> Any:
    """Kalman filter; see ``ttr_np.kalman_filter``."""
    check_ridge(ridge)
    noise = check_noise(process_noise, measurement_noise, common.get("mask"))
    arrays = {"q": q, "k": k, "v": v, "log_transition": log_transition, **noise}
    return run(core, "kalman_filter", arrays, start=partial(start, ridge), **common)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    process_noise: np.ndarray | None = None,
    measurement_noise: np.ndarray | None = None,
    log_transition: np.ndarray | None = None,
    *,
    state: KalmanFilterState,
) -> tuple[np.ndarray, KalmanFilterState]:
    """Lay out the sequences and share them among threads."""
    S, P = state
    check_start(P)
    o = output_like(q, v, S)
    layout = lay_out(
        S.shape[:-2], o.shape[:-2], (q, 2), (k, 2), (v, 2), (process_noise, 1), (measurement_noise, 1),
        (log_transition, 1), (S, 2), (P, 2), (o, 2),
    )  # fmt: skip
    (t, d), w = q.shape[-2:], v.shape[-1]
    memories, groups = layout.places.shape[1:]
    wide = np.dtype(np.float64)
    deep = -(-d // (BYTES // wide.itemsize)) * (BYTES // wide.itemsize)  # whole squares of vectors
    room = [(deep, deep), (-(-d // CHAINS) * CHAINS, w), (5, deep), (2, w)]
    cost = memories * t * d * (2 * d + (2 + groups) * w)
    share(kernel, memories, cost, (wide, room), layout, (t, d, w), wide.type(0), S.dtype.type(0))
    return o, state


def check_start(P: np.ndarray) -> None:
    """As ``check_covariance``, whose eigenvalues take longer than hundreds of tokens: a factor is proof enough."""
    try:
        if np.isfinite(P).all():
            check_symmetric(P)
            np.linalg.cholesky(P)
            return
    except np.linalg.LinAlgError:  # perhaps only singular
        pass
    check_covariance(P)


class Filter(NamedTuple):
    """One memory and one step of it, in panels."""

    P: Matrix  # rows up to the diagonal; what stands right of it in its vector means nothing
    S: Matrix
    keys: Matrix
    values: Matrix


@compiled
def kernel(table, places, steps, sizes, like, given, begin, stop):
    """Jobs begin to stop: one memory each; the arrays hold numbers like ``given``."""
    t, d, w = sizes
    here = Filter(panel(table, 0, like), panel(table, 1, like), panel(table, 2, like), panel(table, 3, like))
    for memory in range(begin, stop if t else begin):
        state, P = matrix(places[STATE, memory, 0], w, 1, given), matrix(places[COVARIANCE, memory, 0], d, 1, given)
        load_halves(here.P, P, d, like)
        no_rows_behind(here.S, d, like)
        load(here.S, state, 0, d, 0, w)
        for i in range(t):
            drift(here, places, steps, memory, i, d, w, given)
            measure(here, places, steps, memory, i, d, w, given)
            for group in range(places.shape[2]):
                answer(here, places, steps, memory, group, i, d, w, given)
        store(state, 0, d, 0, w, here.S)
        give_halves(P, here.P, d)


@inner
def no_rows_behind(S, d, like):
    """Zeros in the rows that only fill up CHAINS of them."""
    for i in range(d, padded(d)):
        fill(row(S, i), real(like, 0), S.step)


@inner
def load_halves(into, P, d, like):
    """The lower triangle of the mean of a matrix and its transpose, zeros everywhere else."""
    apart()
    size = per_vector(like)
    for i in range((d + size - 1) // size * size):
        line = row(into, i)
        fill(line, real(like, 0), into.step)
        for j in range(i + 1 if i < d else 0):
            line[j] = (types.float64(row(P, i)[j]) + row(P, j)[i]) / 2


@inner
def give_halves(P, source, d):
    """The whole matrix of a lower triangle."""
    apart()
    for i in range(d):
        for j in range(i + 1):
            row(P, i)[j] = row(source, i)[j]
            row(P, j)[i] = row(source, i)[j]


@inner
def number(places, steps, array, memory, i, given):
    """Number of a step."""
    return types.float64(row(matrix(places[array, memory, 0], steps[array, 0], 1, given), i)[0])


@inner
def take(line, places, steps, array, memory, group, i, n, given):
    """Row of a step into a line; the zeros behind its n numbers stay."""
    x = matrix(places[array, memory, group], steps[array, 0], steps[array, 1], given)
    gather(line, row(x, i), x.column, n)


@inner
def drift(here, places, steps, memory, i, d, w, given):
    """S = A S and P = A^2 P + process_noise I."""
    apart()
    if places[TRANSITION, memory, 0]:
        A = math.exp(number(places, steps, TRANSITION, memory, i, given))
        for j in range(d if A != 1 else 0):
            scale(row(here.S, j), A, w)
            scale(row(here.P, j), A * A, j + 1)
    if places[DRIFT, memory, 0]:
        noise = number(places, steps, DRIFT, memory, i, given)
        for j in range(d if noise != 0 else 0):
            row(here.P, j)[j] += noise


@inner
def measure(here, places, steps, memory, i, d, w, given):
    """The gain of a step, and what it teaches."""
    apart()
    key, read, gain, rest = row(here.keys, KEY), row(here.keys, READ), row(here.keys, GAIN), row(here.keys, REST)
    error, told = row(here.values, ERROR), row(here.values, TOLD)
    take(key, places, steps, K, memory, 0, i, d, given)
    take(error, places, steps, V, memory, 0, i, w, given)
    r = number(places, steps, NOISE, memory, i, given) if places[NOISE, memory, 0] else 1.0
    times_symmetric(read, here.P.data, here.P.step, key, d)
    find_gain(gain, rest, read, dot(key, read, d, 0.0), r, d)
    recall(told, here.S.data, here.S.step, key, d, w)
    for j in range(w):
        error[j] -= told[j]
    subtract(here.P.data, here.P.step, read, gain, rest, d)


@inner
def answer(here, places, steps, memory, group, i, d, w, given):
    """What the memory says to a query, the first of which also meets what is learnt."""
    apart()
    query, told, S = row(here.keys, QUERY), row(here.values, TOLD), here.S
    take(query, places, steps, Q, memory, group, i, d, given)
    if group:
        recall(told, S.data, S.step, query, d, w)
    else:
        error = row(here.values, ERROR)
        learn(told, S.data, S.step, row(here.keys, GAIN), error, query, d, w)
        if d < padded(d) and count_bad_of(error, w, most(0.0)) > 0:  # no row behind the last one is to hold 0 inf
            no_rows_behind(S, d, 0.0)
            recall(told, S.data, S.step, query, d, w)
    copy(row(matrix(places[O, memory, group], w, 1, given), i), told, w)


@intrinsic
def times_symmetric(typingctx: Any, y: Any, P: Any, step: Any, x: Any, n: Any) -> Any:
    """y = P x from the lower triangle of P, square by square; vectors are padded, x with zeros."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, P, step, x, n = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        across, (down,) = vectors.totals(vectors.count), vectors.totals(1)
        with cgutils.for_range(builder, vectors.holding(n), intp=word) as block:
            first = vectors.start(block.index)
            places = [builder.add(first, word(i)) for i in range(vectors.count)]
            rows = [builder.gep(P, [builder.mul(place, step)]) for place in places]
            factors = [vectors.everywhere(builder.load(builder.gep(x, [place]))) for place in places]
            for total in across:
                builder.store(vectors.constant(0.0), total)

            def add(j: Any, there: Any, below: Any) -> None:
                """One square: its rows times x, and its columns, below the diagonal where it is cut by that."""
                column = vectors.load(x, j)
                for i, line in enumerate(rows):
                    numbers = vectors.load(line, j)
                    vectors.accumulate(across[i], there(i, numbers), column)
                    vectors.accumulate(down, factors[i], below(i, numbers))

            with cgutils.for_range(builder, block.index, intp=word) as loop:
                builder.store(vectors.load(y, loop.index), down)
                add(loop.index, lambda i, numbers: numbers, lambda i, numbers: numbers)
                vectors.store(builder.load(down), y, loop.index)
            builder.store(vectors.constant(0.0), down)
            add(block.index, lambda i, x: first_of(vectors, x, i + 1), lambda i, x: first_of(vectors, x, i))
            sums = vectors.sums_across([builder.load(total) for total in across])
            vectors.store(vectors.add(sums, builder.load(down)), y, block.index)
        return context.get_dummy_value()

    return types.void(y, y, types.intp, y, types.intp), codegen


def first_of(vectors: Vectors, x: Any, n: int) -> Any:
    """The first n numbers of a vector, then zeros."""
    return vectors.shuffle(x, vectors.constant(0.0), [e if e < n else vectors.count + e for e in range(vectors.count)])


@intrinsic
def find_gain(typingctx: Any, gain: Any, rest: Any, read: Any, a: Any, r: Any, n: Any) -> Any:
    """c = p / (r + a), zero where nothing is measured, and e = (p - a c) - r c, in this order.

    An infinite a is no number: a pair with no gain would be passed over in silence.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gain, rest, read, a, r, n = args
        vectors = Vectors(builder, signature.args[0].dtype)
        s = builder.fadd(builder.fadd(r, a), builder.fsub(a, a))
        none = builder.fcmp_ordered("==", s, ir.Constant(s.type, 0.0))
        s, minus_a, minus_r = (vectors.everywhere(x) for x in (s, builder.fneg(a), builder.fneg(r)))
        with cgutils.for_range(builder, vectors.holding(n), intp=ir.IntType(64)) as loop:
            p = vectors.load(read, loop.index)
            c = builder.select(none, vectors.constant(0.0), builder.fdiv(p, s))
            vectors.store(c, gain, loop.index)
            left = vectors.multiply_add(minus_a, c, p)
            vectors.store(vectors.multiply_add(minus_r, c, left), rest, loop.index)
        return context.get_dummy_value()

    return types.void(gain, gain, gain, a, a, types.intp), codegen


@intrinsic
def subtract(typingctx: Any, P: Any, step: Any, read: Any, gain: Any, rest: Any, n: Any) -> Any:
    """P = P - c p^T - e c^T up to the diagonal, CHAINS rows at a time."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        P, step, read, gain, rest, n = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        with cgutils.for_range(builder, ceil_div(builder, n, CHAINS), intp=word) as block:
            lines = []
            for i in range(CHAINS):
                at = in_fours(builder, block.index, i)
                factors = (builder.fneg(builder.load(builder.gep(x, [at]))) for x in (gain, rest))
                lines.append((builder.gep(P, [builder.mul(at, step)]), *map(vectors.everywhere, factors)))
            end = vectors.holding(builder.mul(builder.add(block.index, word(1)), word(CHAINS)))
            with cgutils.for_range(builder, end, intp=word) as loop:
                p, c = vectors.load(read, loop.index), vectors.load(gain, loop.index)
                for line, gained, left in lines:
                    new = vectors.multiply_add(gained, p, vectors.load(line, loop.index))
                    vectors.store(vectors.multiply_add(left, c, new), line, loop.index)
        return context.get_dummy_value()

    return types.void(P, types.intp, P, P, P, types.intp), codegen


@intrinsic
def recall(typingctx: Any, o: Any, S: Any, step: Any, x: Any, n: Any, columns: Any) -> Any:
    """o = S^T x, whole tiles of columns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        o, S, step, x, n, columns = args
        vectors = Vectors(builder, signature.args[0].dtype)
        with tiles(vectors, columns) as start:
            o, S = builder.gep(o, [start]), builder.gep(S, [start])
            sum_rows(vectors, o, S, step, x, n, lambda line, at, j: vectors.load(line, j))
        return context.get_dummy_value()

    return types.void(o, o, types.intp, o, types.intp, types.intp), codegen


def sum_rows(vectors: Vectors, o: Any, S: Any, step: Any, x: Any, n: Any, load: Callable[[Any, Any, int], Any]) -> None:
    """One tile of o = S^T x, CHAINS rows at a time; what is loaded of row ``at`` says a function."""
    builder, totals = vectors.builder, [vectors.totals(PARTS) for _ in range(CHAINS)]
    for total in sum(totals, []):
        builder.store(vectors.constant(0.0), total)
    with cgutils.for_range(builder, ceil_div(builder, n, CHAINS), intp=ir.IntType(64)) as block:
        for i, sums in enumerate(totals):
            at = in_fours(builder, block.index, i)
            line = builder.gep(S, [builder.mul(at, step)])
            factor = vectors.everywhere(builder.load(builder.gep(x, [at])))
            for j, total in enumerate(sums):
                vectors.accumulate(total, factor, load(line, at, j))
    for j in range(PARTS):
        one, two, three, four = (builder.load(sums[j]) for sums in totals)
        vectors.store(vectors.add(vectors.add(one, two), vectors.add(three, four)), o, j)


@intrinsic
def learn(typingctx: Any, o: Any, S: Any, step: Any, gain: Any, error: Any, x: Any, n: Any, columns: Any) -> Any:
    """S = S + c error^T and then o = S^T x, in the sums of ``recall``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        o, S, step, gain, error, x, n, columns = args
        vectors = Vectors(builder, signature.args[0].dtype)
        with tiles(vectors, columns) as start:
            errors = [vectors.load(builder.gep(error, [start]), j) for j in range(PARTS)]

            def change(line: Any, at: Any, j: int) -> Any:
                factor = vectors.everywhere(builder.load(builder.gep(gain, [at])))
                new = vectors.multiply_add(factor, errors[j], vectors.load(line, j))
                vectors.store(new, line, j)
                return new

            sum_rows(vectors, builder.gep(o, [start]), builder.gep(S, [start]), step, x, n, change)
        return context.get_dummy_value()

    return types.void(o, o, types.intp, o, o, o, types.intp, types.intp), codegen


@contextmanager
def tiles(vectors: Vectors, columns: Any) -> Iterator[Any]:
    """Where each tile of PARTS vectors of some columns starts."""
    builder, word, width = vectors.builder, ir.IntType(64), PARTS * vectors.count
    with cgutils.for_range(builder, ceil_div(builder, columns, width), intp=word) as loop:
        yield builder.mul(loop.index, word(width))
