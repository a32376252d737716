"""The Mesa layer solved exactly: by a factor that tokens of a chunk share, by factors of their own, or marked as lost.

See ``mesa`` for the mathematics.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from ._compile import apart, inner
from ._factors import cholesky, eps, tiled
from ._mesa import (
    ALONE,
    ERROR,
    INVERSE,
    LOST,
    MISSING,
    MOST,
    SHARE,
    SLOPE,
    SPREAD,
    START,
    TOGETHER,
    UNITS,
    VALUES,
    WAY,
    apply,
    end_in_zeros,
    is_open,
    precondition,
    ratio,
    still_open,
)
from ._panels import add_scaled, copy, dot, fill, finite, gather, load, real, row, scale
from ._rows import descend_rows, dot_rows, turn_rows

__all__ = ["solve_exactly"]

STEPS = 16  # of conjugate gradients before a token gets a factor of its own
CLEAR = 16.0  # times the query a solution is far from rounding: it multiplies the errors of an answer
LEAST = 1e-250  # square of a solution below which the square of its residual is lost


@inner
def solve_exactly(q, n, d, room, together, gated, like):
    """The solutions x of n queries, of which the first ones may share a factor; zero for those that are lost."""
    apart()
    load(room.r, q, 0, n, 0, d)
    if together and gated:
        conjugate_gradients(together, d, room, real(like, 4 * eps(like)))
        load(room.r, q, 0, n, 0, d)
    elif together:
        precondition(room.x, room.r, together, together, d, room, like)
    if together:
        refine(together, d, room, like)
        remain(together, d, room, like)
    settle(n, together, d, room, like)
    ways = row(room.tokens, WAY)
    solve_each(until(ways, n, ALONE), d, room, like)
    for i in range(until(ways, n, LOST)):
        if ways[i] == LOST:
            fill(row(room.x, i), real(like, 0), d)


@inner
def conjugate_gradients(n, d, room, tolerance):
    """Solutions of n tokens, from zero, by conjugate gradients that multiply no matrix but the common factor's.

    That one says z = P r of the residuals r. A token's own matrix is the inverse of P and what that lacks of the ridge,
    so its product with z is r + (1 - left / reference) ridge z; products with directions follow as directions do.
    """
    apart()
    tokens, zero = room.tokens, real(tolerance, 0)
    end_in_zeros(room.r, n, d, tolerance)
    for i in range(n):
        for x in (room.x, room.p, room.Ap):
            fill(row(x, i), zero, tiled(d, zero))
        row(tokens, START)[i] = row(tokens, ERROR)[i] = dot(row(room.r, i), row(room.r, i), d, tolerance)
        row(tokens, SLOPE)[i], row(tokens, MOST)[i] = zero, real(tolerance, STEPS)
    for step in range(STEPS):
        open_tokens = still_open(n, step, tokens, tolerance)
        if open_tokens == 0:
            break
        precondition(room.z, room.r, open_tokens, n, d, room, tolerance)
        end_in_zeros(room.z, open_tokens, d, tolerance)
        for i in range(open_tokens):
            if is_open(i, step, tokens, tolerance):
                conjugate_step(i, d, room, tolerance)


@inner
def conjugate_step(i, d, room, like):
    """One step of a token: the next direction and its product, and as far as it goes."""
    x, r, p, Ap, z = row(room.x, i), row(room.r, i), row(room.p, i), row(room.Ap, i), row(room.z, i)
    tokens = room.tokens
    slope = dot_rows(r, z, d)
    share = real(like, ratio(slope, row(tokens, SLOPE)[i]))
    curvature = turn_rows(p, Ap, r, z, row(room.ridge, 0), row(tokens, MISSING)[i], share, d)
    row(tokens, SLOPE)[i] = slope
    row(tokens, ERROR)[i] = descend_rows(x, r, p, Ap, real(like, ratio(slope, curvature)), d)


@inner
def refine(n, d, room, like):
    """One step of refinement by the common factor, which without decay is every token's own.

    The difference in ``precondition`` cancels where the chunk says much more than what came before it, and conjugate
    gradients end with the rounding of all their steps.
    """
    apart()
    remain(n, d, room, like)
    precondition(room.p, room.z, n, n, d, room, like)
    for i in range(n):
        add_scaled(row(room.x, i), real(like, 1), row(room.p, i), d)


@inner
def settle(n, together, d, room, like):
    """Which way each of n tokens has to be solved; the first ones may be, to rounding, by the common factor."""
    apart()
    diagonal, units, ridge = row(room.along, VALUES), row(room.along, UNITS), row(room.ridge, 0)
    inverse = row(room.along, INVERSE)
    gather(diagonal, room.H.data, room.H.step + 1, d)
    gather(row(room.along, SPREAD), room.P.data, room.P.step + 1, d)
    for i in range(n):
        k, decay = row(room.keys, i), row(room.pairs, i)[i - 1] if i else row(room.since, 0)[1]
        for p in range(d):
            diagonal[p] = decay * diagonal[p] + k[p] * k[p]
            units[p] = math.sqrt(diagonal[p] + ridge[p])
            inverse[p] = real(like, 1) / units[p]
        row(room.tokens, WAY)[i] = real(like, way_of(i, together, units, diagonal, d, room, like))


@inner
def way_of(i, together, units, diagonal, d, room, like):
    """The way to solve token i, whose matrix has this diagonal."""
    x, z, q, inverse = row(room.x, i), row(room.z, i), row(room.r, i), row(room.along, INVERSE)
    safe = is_safe(diagonal, row(room.ridge, 0), d, like)
    if i >= together:
        return ALONE if safe else LOST
    safe = safe or is_regular(units, row(room.along, SPREAD), row(room.tokens, SHARE)[i], d, like)
    clear = safe and is_clear(x, q, units, inverse, d)
    return TOGETHER if clear and is_solved(x, z, q, units, inverse, d, like) else LOST


@inner
def until(ways, n, way):
    """Until which of n tokens some are solved in a way."""
    while n > 0 and ways[n - 1] != way:
        n -= 1
    return n


@inner
def remain(n, d, room, like):
    """What is left to solve, z = r - (H_t + ridge) x, each token with its own matrix."""
    apart()
    apply(room.Ap, room.x, n, d, room, like)
    for i in range(n):
        copy(row(room.z, i), row(room.r, i), d)
        add_scaled(row(room.z, i), -real(like, 1), row(room.Ap, i), d)


@inner
def is_solved(x, z, q, units, inverse, d, like):
    """Whether a residual z is rounding.

    In the units in which the matrix has a unit diagonal, and a norm of sqrt(d) at least. The inverse P is formed here,
    which costs digits that the solver's root of it keeps: what counts as rounding is a quarter of what counts there.
    Squares of small numbers may be lost, but a query of zeros, as padding is, has the solution zero.
    """
    apart()
    size = rest = 0.0  # squares in double precision, which numbers of single precision never leave
    given = np.int32(0)
    for p in range(d):
        a, b = x[p] * types.float64(units[p]), z[p] * types.float64(inverse[p])
        size += a * a
        rest += b * b
        given += np.int32(q[p] != 0)
    if given == 0:
        return size == 0
    return LEAST <= size < math.inf and rest <= 4 * d * eps(like) * eps(like) * size


@inner
def is_clear(x, q, units, inverse, d):
    """Whether a solution is not so much larger than its query that errors of an answer show it, in the same units."""
    apart()
    size = asked = 0.0
    for p in range(d):
        a, b = x[p] * types.float64(units[p]), q[p] * types.float64(inverse[p])
        size += a * a
        asked += b * b
    return not size > CLEAR * CLEAR * asked


@inner
def is_regular(units, spread, share, d, like):
    """Whether the common factor says that no eigenvalue can be lost in rounding.

    A token's own matrix holds a ``share`` of the common one, whose inverse has the diagonal ``spread``. So in units in
    which the former has a unit diagonal, and no eigenvalue above d, none is below the share over the inverse's trace.
    """
    apart()
    trace = 0.0
    for p in range(d):
        unit = types.float64(units[p])
        trace += unit * unit * spread[p]
    return d * d * eps(like) * trace < share


@inner
def solve_each(n, d, room, like):
    """The solutions of those of the first n tokens that get a factor of their own, if that is enough."""
    apart()
    units, inverse, ways = row(room.along, UNITS), row(room.along, INVERSE), row(room.tokens, WAY)
    if n == 0:
        return
    load(room.R, room.H, 0, d, 0, d)
    for i in range(n):
        k, decay = row(room.keys, i), row(room.pairs, i)[i - 1] if i else row(room.since, 0)[1]
        for p in range(d):
            scale(row(room.R, p), decay, d)
            add_scaled(row(room.R, p), k[p], k, d)
        if ways[i] != ALONE:
            continue
        if not finite(room.R, d, d, like):
            fill(row(room.x, i), real(like, math.nan), d)
            continue
        solve_one(row(room.r, i), row(room.x, i), d, room, like)
        for p in range(d):
            units[p] = math.sqrt(row(room.R, p)[p] + row(room.ridge, 0)[p])
            inverse[p] = real(like, 1) / units[p]
        if not is_clear(row(room.x, i), row(room.r, i), units, inverse, d):
            ways[i] = real(like, LOST)


@inner
def is_safe(diagonal, ridge, d, like):
    """Whether no eigenvalue can be lost in rounding: with a unit diagonal, none is below the share of the ridge."""
    apart()
    share, lost = real(like, d * d) * eps(like), np.int32(0)
    for p in range(d):
        lost += np.int32(not ridge[p] >= share * (diagonal[p] + ridge[p]) or ridge[p] == 0)
    return lost == 0


@inner
def solve_one(q, x, d, room, like):
    """x = (R + ridge)^-1 q by Cholesky."""
    apart()
    lift, largest = real(like, 0), real(like, 0)
    while True:
        for i in range(d):
            copy(row(room.A, i), row(room.R, i), i + 1)
            row(room.A, i)[i] += row(room.ridge, 0)[i] + lift
            largest = max(largest, row(room.A, i)[i])
        if cholesky(room.A, room.X, d, like) or not 0 < largest < math.inf:
            break
        lift = max(2 * lift, eps(like) * largest)
    for i in range(d):
        x[i] = (q[i] - dot(row(room.A, i), x, i, like)) / row(room.A, i)[i]
    for i in range(d - 1, -1, -1):
        x[i] /= row(room.A, i)[i]
        add_scaled(x, -x[i], row(room.A, i), i)
