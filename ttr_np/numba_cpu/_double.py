"""Tokens of the mesa layer whose ridge is nearly lost beside their keys, each solved alone, in double precision.

    H_t = g_t H_{t-1} + beta_t k_t k_t^T,    o_t = G_t^T (H_t + diag(ridge))^-1 q_t

The rounding of H_t in single precision can be larger than the ridge. So G_t and H_t are summed here once more, from the
start of the call to the last token that needs them, by a kernel of its own: where none does, it is not even compiled. A
Cholesky factor, in units in
which the matrix has a unit diagonal, gives the solution. One so large that rounding may be a part of it comes from
eigenvectors, without those whose eigenvalue is lost in rounding. What was given in single precision, the state at the
start of the call, has the rounding of single precision until it is forgotten.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from ._cache import compiled
from ._compile import apart, inner
from ._factors import BLOCK, cholesky, eps, orthogonalise, square
from ._panels import (
    Matrix,
    add_scaled,
    clean_within,
    copy,
    dot,
    fill,
    gather,
    load,
    matrix,
    most,
    pointer,
    row,
    scale,
    times,
)
from ._sequences import Layout
from ._threads import share
from ._triangles import invert_lower
from ._vectors import per_vector

__all__ = [
    "BETA", "GATE", "GRAM", "GRAM_BEFORE", "K", "O", "Q", "RIDGE", "STATE", "STATE_BEFORE", "V",
    "answer_lost", "holds_zero",
]  # fmt: skip

Q, K, V, GATE, BETA, RIDGE, STATE, GRAM, O, STATE_BEFORE, GRAM_BEFORE = range(11)  # noqa: E741  # arrays of a layout
KEY, VALUE, WEIGHT, LEFT, DIAGONAL, UNITS, ASKED, KNOWN, FOUND, SOLUTION, VALUES, ANSWER = range(12)  # rows of ``rows``


class Double(NamedTuple):
    """Panels in double precision, whatever the dtype."""

    G: Matrix  # k x v
    H: Matrix  # k x k
    A: Matrix  # k x k: a factor
    U: Matrix  # k x k: eigenvectors
    rows: Matrix  # see the names above; LEFT is what is left of the diagonal of H at the start of the call


def double_shapes(d: int, w: int, itemsize: int) -> list[tuple[int, int]]:
    """Of the panels, in numbers of the dtype."""
    shapes = [(d, w), (d, d), (d, d), (d, max(d, BLOCK)), (ANSWER + 1, max(d, w))]
    return [(rows, columns * 8 // itemsize) for rows, columns in shapes]


@inner
def doubles(table, like):
    """The panels of one thread."""
    return Double(
        double_panel(table, 0, like), double_panel(table, 1, like), double_panel(table, 2, like),
        double_panel(table, 3, like), double_panel(table, 4, like),
    )  # fmt: skip


@inner
def double_panel(table, i, like):
    """One of the panels of a table whose steps count numbers of the dtype."""
    return Matrix(pointer(table[i, 0], 1.0), table[i, 1] * per_vector(1.0) // per_vector(like), 1)


@intrinsic
def margin(typingctx: Any, like: Any) -> Any:
    """What a solution may be multiplied by to be lost: rounding in double precision, in units of that in the dtype."""
    number = {32: 2.0**-27, 64: 0.0}[like.bitwidth]
    return types.float64(like), lambda context, builder, signature, args: context.get_constant(types.float64, number)


@inner
def holds_zero(x, n):
    """Whether one of n numbers is zero."""
    for i in range(n):
        if x[i] == 0:
            return True
    return False


def answer_lost(layout: Layout, sizes: tuple[int, int, int], dtype: np.dtype, lost: np.ndarray) -> None:
    """Answer the tokens that are marked in ``lost (memories, groups, t)``, and take the marks away.

    The layout has, beside the arrays of the call, what its memories were before it, where they have lost tokens.
    """
    t, d, w = sizes
    memories, scratch = lost.shape[0], (dtype, double_shapes(d, w, dtype.itemsize))
    share(kernel, memories, memories * t * d * (2 * d + w), scratch, layout, (d, w), lost, dtype.type(0))
    lost[...] = 0


@compiled
def kernel(table, places, steps, sizes, lost, like, first, last):
    """Jobs first to last: one memory each, up to its last lost token."""
    d, w = sizes
    room, groups = doubles(table, like), places.shape[2]
    for memory in range(first, last):
        end = lost.shape[2]
        while end > 0 and not marked(lost, memory, groups, end - 1):
            end -= 1
        if end > 0:
            begin(places, steps, memory, d, w, room, like)
        for i in range(end):
            learn(places, steps, memory, i, d, w, room, like)
            if marked(lost, memory, groups, i):
                answer(places, steps, memory, i, d, w, lost, room, like)


@inner
def marked(lost, memory, groups, i):
    """Whether token i is marked in any group."""
    for group in range(groups):
        if lost[memory, group, i]:
            return True
    return False


@inner
def begin(places, steps, memory, d, w, room, like):
    """G and H as they are given to the call."""
    apart()
    load(room.G, matrix(places[STATE_BEFORE, memory, 0], w, 1, like), 0, d, 0, w)
    load(room.H, matrix(places[GRAM_BEFORE, memory, 0], d, 1, like), 0, d, 0, d)
    ridge = matrix(places[RIDGE, memory, 0], 0, steps[RIDGE, 0], like)
    gather(row(room.rows, WEIGHT), ridge.data, ridge.column, d)
    gather(row(room.rows, LEFT), room.H.data, room.H.step + 1, d)


@inner
def learn(places, steps, memory, t, d, w, room, like):
    """One pair into G and H; a decay that is zero in the dtype forgets even what is no number."""
    apart()
    key, value, start = row(room.rows, KEY), row(room.rows, VALUE), row(room.rows, LEFT)
    left, root = weights(places, steps, memory, t, like)
    load(Matrix(key, 0, 1), matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], like), t, 1, 0, d)
    load(Matrix(value, 0, 1), matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], like), t, 1, 0, w)
    keep(key, root, d)
    keep(value, root, w)
    keep(start, left, d)
    for p in range(d):
        keep(row(room.G, p), left, w)
        keep(row(room.H, p), left, d)
        add_scaled(row(room.G, p), key[p], value, w)
        add_scaled(row(room.H, p), key[p], key, d)


@inner
def weights(places, steps, memory, t, like):
    """What a token leaves of the past, and the root of its pair's weight."""
    left = root = 1.0
    if places[GATE, memory, 0]:
        gate = row(matrix(places[GATE, memory, 0], steps[GATE, 0], 1, like), t)[0]
        left = math.exp(types.float64(gate)) if math.exp(gate) > 0 else 0.0
    if places[BETA, memory, 0]:
        root = math.sqrt(types.float64(row(matrix(places[BETA, memory, 0], steps[BETA, 0], 1, like), t)[0]))
    return left, root


@inner
def keep(x, share, n):
    """x = share x, and zero where the share is, whatever x was."""
    if share == 0:
        fill(x, 0.0, n)
    elif share != 1:
        scale(x, share, n)


@inner
def answer(places, steps, memory, t, d, w, lost, room, like):
    """The answers of one token in the groups in which it is marked; see ``Double``."""
    apart()
    rows = room.rows
    gather(row(rows, DIAGONAL), room.H.data, room.H.step + 1, d)
    sound = clean_within(room.H, 0, d, d, False, types.float64(most(like))) == d
    factored = sound and factorise(d, room, like)
    for group in range(places.shape[2]):
        if not lost[memory, group, t]:
            continue
        q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like)
        o, x = matrix(places[O, memory, group], w, 1, like), row(rows, SOLUTION)
        load(Matrix(row(rows, ASKED), 0, 1), q, t, 1, 0, d)
        if not sound:
            fill(x, math.nan, d)
        elif not (factored and solve_factored(d, room, like)):
            solve_least(d, room, like)
        fill(row(rows, ANSWER), 0.0, w)
        for p in range(d):
            add_scaled(row(rows, ANSWER), x[p], row(room.G, p), w)
        copy(row(o, t), row(rows, ANSWER), w)


@inner
def rounding(d, room, like):
    """How much of the diagonal may be rounding: single precision's in what is left of the start of the call."""
    rows, share = room.rows, 0.0
    for p in range(d):
        if row(rows, LEFT)[p] != 0:
            share = max(share, row(rows, LEFT)[p] / (row(rows, DIAGONAL)[p] + row(rows, WEIGHT)[p]))
    return eps(1.0) + share * eps(like)


@inner
def unit_diagonal(d, room):
    """Units of the channels in which H + ridge has a unit diagonal."""
    rows = room.rows
    for p in range(d):
        row(rows, UNITS)[p] = 1 / math.sqrt(row(rows, DIAGONAL)[p] + row(rows, WEIGHT)[p])


@inner
def in_units(A, factor, d, room):
    """A = factor (H + ridge) in units of the channels."""
    apart()
    rows, units = room.rows, row(room.rows, UNITS)
    for i in range(d):
        copy(row(A, i), row(room.H, i), d)
        row(A, i)[i] += row(rows, WEIGHT)[i]
        times(row(A, i), row(A, i), units, d)
        scale(row(A, i), units[i] * factor, d)


@inner
def factorise(d, room, like):
    """A Cholesky factor of the matrix with a unit diagonal; False if there is none or it may lack an eigenvalue.

    Rounding may leave a positive pivot of a singular matrix. A query in its range then has a solution that is not
    large, and yet holds any multiple of what the matrix maps to zero.
    """
    apart()
    unit_diagonal(d, room)
    in_units(room.A, 1.0, d, room)
    return cholesky(room.A, room.U, d, 1.0) and keeps_eigenvalues(d, room, like)


@inner
def keeps_eigenvalues(d, room, like):
    """Whether none is lost in rounding: none is below the least share of the ridge, or one over the inverse's trace."""
    rows, share, lost, trace = room.rows, 1.0, d * rounding(d, room, like), 0.0
    for p in range(d):
        share = min(share, row(rows, WEIGHT)[p] / (row(rows, DIAGONAL)[p] + row(rows, WEIGHT)[p]))
    if share > lost:
        return True
    invert_lower(room.A, room.U, d, 1.0)
    for i in range(d):
        trace += square(row(room.U, i), i + 1)
    return not trace * lost > 1


@inner
def solve_factored(d, room, like):
    """The solution from a factor; False if it is so large that rounding may be a part of it."""
    apart()
    rows, x, units, known = room.rows, row(room.rows, SOLUTION), row(room.rows, UNITS), row(room.rows, KNOWN)
    unit_diagonal(d, room)
    times(known, row(rows, ASKED), units, d)
    for i in range(d):
        x[i] = (known[i] - dot(row(room.A, i), x, i, 1.0)) / row(room.A, i)[i]
    for i in range(d - 1, -1, -1):
        x[i] /= row(room.A, i)[i]
        add_scaled(x, -x[i], row(room.A, i), i)
    lost = d * (d * rounding(d, room, like) + margin(like))
    solved = not lost * lost * square(x, d) > square(known, d)
    times(x, x, units, d)
    return solved


@inner
def solve_least(d, room, like):
    """The solution where an eigenvalue may be lost in rounding, and then the limit of small ridges.

    That limit is of minimum norm, each channel weighed by its ridge, or not weighed if a ridge is zero.
    """
    apart()
    ridge, units, largest = row(room.rows, WEIGHT), row(room.rows, UNITS), 0.0
    if holds_zero(ridge, d):
        fill(units, 1.0, d)
        solve_spectral(d, room, like)
        return
    unit_diagonal(d, room)
    if not solve_spectral(d, room, like):
        for p in range(d):
            largest = max(largest, ridge[p])
        for p in range(d):
            units[p] = math.sqrt(largest / ridge[p])
        solve_spectral(d, room, like)


@inner
def solve_spectral(d, room, like):
    """The solution of minimum norm in the units, refined once; False if an eigenvalue counted as zero.

    Rotated until they are orthogonal, the rows of H + ridge are eigenvectors, their lengths the eigenvalues. A power of
    two times the matrix is near one: a square of what is left out of it overflows nothing.
    """
    apart()
    rows, x, values, known = room.rows, row(room.rows, SOLUTION), row(room.rows, VALUES), row(room.rows, KNOWN)
    units, largest, regular = row(room.rows, UNITS), 0.0, True
    for i in range(d):
        largest = max(largest, (row(rows, DIAGONAL)[i] + row(rows, WEIGHT)[i]) * units[i] * units[i])
    factor = math.ldexp(1.0, -max(math.frexp(largest)[1], -1000))
    in_units(room.U, factor, d, room)
    orthogonalise(room.U, d, d, values, 1.0)
    for i in range(d):
        largest = values[i] if i == 0 else max(largest, values[i])
    cut = (d * rounding(d, room, like) + margin(like)) * largest
    for i in range(d):
        if values[i] > cut:
            scale(row(room.U, i), 1 / values[i], d)
        else:
            values[i], regular = 0.0, False
    copy(x, row(rows, ASKED), d)
    scale(x, 0.0, d)  # a NaN stays
    for _ in range(2):
        for i in range(d):
            rest = row(rows, ASKED)[i] - dot(row(room.H, i), x, d, 1.0) - row(rows, WEIGHT)[i] * x[i]
            known[i] = factor * units[i] * rest
        along_eigenvectors(d, room)
    return regular


@inner
def along_eigenvectors(d, room):
    """x += what a pseudoinverse makes of some known numbers, in the units."""
    apart()
    rows, values, found = room.rows, row(room.rows, VALUES), row(room.rows, FOUND)
    fill(found, 0.0, d)
    for i in range(d):
        if values[i] > 0:
            add_scaled(found, dot(row(room.U, i), row(rows, KNOWN), d, 1.0) / values[i], row(room.U, i), d)
    times(found, found, row(rows, UNITS), d)
    add_scaled(row(rows, SOLUTION), 1.0, found, d)
