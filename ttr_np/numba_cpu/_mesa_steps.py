"""The Mesa layer solved in steps, all tokens of a chunk at once: conjugate gradients, or Chebyshev's iteration.

See ``mesa`` for the mathematics.
"""

from __future__ import annotations

import math

from ._compile import apart, inner
from ._factors import eps
from ._mesa import (
    CG,
    CHEBYSHEV,
    ERROR,
    LARGEST,
    MOST,
    RHO,
    SLOPE,
    START,
    apply,
    attend,
    end_in_zeros,
    is_open,
    precondition,
    ratio,
    still_open,
)
from ._panels import add_scaled, copy, dot, fill, load, real, row, scale
from ._rows import descend_rows, dot_rows, follow_rows

__all__ = ["solve_in_steps"]


@inner
def solve_in_steps(q, sizes, n, room, together, worst, like):
    """Solutions x of n queries from zero, all at once; a token that is done is not touched again."""
    apart()
    t, d, w, method, iterations, singular = sizes
    load(room.r, q, 0, n, 0, d)
    for rows in (room.x, room.r, room.p):
        end_in_zeros(rows, n, d, like)
    tokens, limit = room.tokens, 0
    if method == CHEBYSHEV:
        bound(sizes, n, room, like)
    for i in range(n):
        fill(row(room.x, i), real(like, 0), d)
        row(tokens, START)[i] = row(tokens, ERROR)[i] = dot(row(room.r, i), row(room.r, i), d, like)
        most = iterations if iterations else (2 * d if method == CG else int(row(tokens, MOST)[i]))
        row(tokens, MOST)[i] = real(like, most)
        limit = max(limit, most)
    begin(method, n, d, room, together, like)
    for step in range(limit):
        open_tokens = still_open(n, step, tokens, like)
        if open_tokens == 0:
            break
        if method == CG and step:
            turn(open_tokens, together, d, room, like)
        apply(room.Ap, room.p, open_tokens, d, room, like)
        end_in_zeros(room.Ap, open_tokens, d, like)
        for i in range(open_tokens):
            if is_open(i, step, tokens, like):
                if method == CG:
                    advance(i, d, room, like)
                else:
                    descend(i, d, room, like)
    finish(n, d, room, worst, like)


@inner
def begin(method, n, d, room, together, like):
    """The first directions."""
    apart()
    tokens = room.tokens
    if method == CG:
        precondition(room.z, room.r, n, together, d, room, like)
    for i in range(n):
        if method == CG:
            copy(row(room.p, i), row(room.z, i), d)
            row(tokens, SLOPE)[i] = dot(row(room.r, i), row(room.z, i), d, like)
        else:
            middle, half = middle_of(i, d, room, like)
            copy(row(room.p, i), row(room.r, i), d)
            scale(row(room.p, i), real(like, 1) / middle, d)
            row(tokens, RHO)[i] = half / middle


@inner
def advance(i, d, room, like):
    """One step of conjugate gradients: as far as the direction goes."""
    x, r, p, Ap, tokens = row(room.x, i), row(room.r, i), row(room.p, i), row(room.Ap, i), room.tokens
    length = ratio(row(tokens, SLOPE)[i], dot_rows(p, Ap, d))
    row(tokens, ERROR)[i] = descend_rows(x, r, p, Ap, real(like, length), d)


@inner
def turn(open_tokens, together, d, room, like):
    """New directions, conjugate to those before."""
    apart()
    tokens = room.tokens
    precondition(room.z, room.r, open_tokens, together, d, room, like)
    end_in_zeros(room.z, open_tokens, d, like)
    for i in range(open_tokens):
        z = row(room.z, i)
        slope = dot_rows(row(room.r, i), z, d)
        share = ratio(slope, row(tokens, SLOPE)[i])
        follow_rows(row(room.p, i), z, real(like, share), d)
        row(tokens, SLOPE)[i] = slope


@inner
def bound(sizes, n, room, like):
    """|H_t|_F of every token from its recurrence, |g H + k k^T|^2 = g^2 |H|^2 + 2 k^T (g H + k k^T) k - |k|^4."""
    apart()
    t, d, w, method, iterations, singular = sizes
    tokens, start, least, largest = room.tokens, real(like, 0), real(like, math.inf), real(like, 0)
    attend(room.Ap, room.keys, room.H, room.keys, n, d, d, room, like)
    for p in range(d):
        start += dot(row(room.H, p), row(room.H, p), d, like)
        least, largest = min(least, row(room.ridge, 0)[p]), max(largest, row(room.ridge, 0)[p])
    for i in range(n):
        k = row(room.keys, i)
        energy = dot(k, k, d, like)
        row(tokens, SLOPE)[i] = 2 * dot(k, row(room.Ap, i), d, like) - energy * energy
        since = row(room.since, 0)[i + 1]
        total = since * since * start
        for j in range(i + 1):
            total += row(room.pairs, i)[j] * row(room.pairs, i)[j] * row(tokens, SLOPE)[j]
        bound = math.sqrt(total) + largest
        row(tokens, LARGEST)[i] = bound
        steps = math.sqrt((bound if math.isfinite(bound) else least) / least) / 2 * math.log(2 / max(like, eps(like)))
        row(tokens, MOST)[i] = real(like, min(math.ceil(steps) + 1.0, 1000.0))


@inner
def middle_of(i, d, room, like):
    """Middle and half length of the interval that holds the eigenvalues of a token's matrix."""
    least, largest = real(like, math.inf), row(room.tokens, LARGEST)[i]
    for p in range(d):
        least = min(least, row(room.ridge, 0)[p])
    middle = (largest + least) / 2
    return middle, max((largest - least) / 2, eps(like) * middle)


@inner
def descend(i, d, room, like):
    """One step of the Chebyshev iteration."""
    apart()
    p, r, tokens = row(room.p, i), row(room.r, i), room.tokens
    middle, half = middle_of(i, d, room, like)
    add_scaled(row(room.x, i), real(like, 1), p, d)
    add_scaled(r, -real(like, 1), row(room.Ap, i), d)
    before = row(tokens, RHO)[i]
    rho = real(like, 1) / (2 * middle / half - before)
    row(tokens, RHO)[i] = rho
    scale(p, rho * before, d)
    add_scaled(p, 2 * rho / half, r, d)
    row(tokens, ERROR)[i] = dot(r, r, d, like)


@inner
def finish(n, d, room, worst, like):
    """Relative residuals; a token whose own is no number has no solution."""
    apart()
    for i in range(n):
        residual = math.sqrt(ratio(row(room.tokens, ERROR)[i], row(room.tokens, START)[i]))
        if not math.isfinite(residual):
            fill(row(room.x, i), real(like, math.nan), d)
        if residual > worst[0]:
            worst[0] = residual
        worst[1] = max(worst[1], row(room.tokens, MOST)[i])
