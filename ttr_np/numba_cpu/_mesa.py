"""What all ways to solve a chunk of the Mesa layer share: its panels, and products with the tokens' own matrices.

See ``mesa`` for the ways.
"""

from __future__ import annotations

from typing import NamedTuple

from ._compile import apart, inner
from ._factors import BLOCK, Reflections, no_future, tiled
from ._gates import weigh
from ._panels import Matrix, copy, fill, full, lower, move, multiply, real, row, scale, scale_rows, triangle
from ._rooms import panels_by_name

__all__ = [
    "ALONE", "CG", "CHEBYSHEV", "CHUNK", "ERROR", "EXACT", "INVERSE", "LARGEST", "LEFT", "LOST", "METHODS", "MISSING",
    "MOST", "RHO", "SHARE", "SLOPE", "SPREAD", "START", "TOGETHER", "UNITS", "VALUES", "WAY", "Scratch", "apply",
    "attend", "end_in_zeros", "is_open", "panels_of", "precondition", "ratio", "shapes", "still_open",
]  # fmt: skip

METHODS = ("exact", "cg", "chebyshev")
EXACT, CG, CHEBYSHEV = range(3)
CHUNK = 32
ERROR, START, SLOPE, LARGEST, MOST, RHO, LEFT, SHARE, MISSING, WAY = range(10)  # rows of ``tokens``
VALUES, UNITS, INVERSE, SPREAD = range(4)  # rows of ``along``; INVERSE: one over the units
TOGETHER, ALONE, LOST = range(3)  # ways to solve a token: by the common factor, by its own, in double precision


class Scratch(NamedTuple):
    """Panels of one thread, for chunks of c tokens."""

    G: Matrix  # k x v
    H: Matrix  # k x k
    A: Matrix  # k x k: H + ridge, then its factor
    X: Matrix  # k x k: inverse of the factor
    R: Matrix  # k x k: X^T; or H of one token
    P: Matrix  # k x k
    keys: Matrix  # c x k: weighted
    across: Matrix  # k x c: the same
    values: Matrix  # c x v: weighted
    pairs: Matrix  # c x c: decays
    scores: Matrix  # c x c
    answers: Matrix  # c x v
    vectors: Matrix  # c x k
    read: Matrix  # k x c
    whitened: Matrix  # k x c: W^T
    W: Matrix  # c x k
    x: Matrix  # c x k
    r: Matrix  # c x k: residuals
    p: Matrix  # c x k: directions
    z: Matrix  # c x k: preconditioned residuals
    Ap: Matrix  # c x k
    ridge: Matrix  # 1 x k
    along: Matrix  # 4 x k: numbers of each channel, see the names below
    since: Matrix  # 1 x c + 1: what is left at i - 1 of the chunk's start
    tokens: Matrix  # 10 x c: numbers of each token, see the names below
    gates: Matrix  # 1 x c + 1: of the chunk, then the mean foretold
    reflections: Reflections


def shapes(c: int, d: int, w: int) -> list[tuple[int, int]]:
    """Of the panels, in their order."""
    square, tokens = (d, d), (c, d)
    memory = [(d, w), square, square, (d, max(d, BLOCK)), square, square]
    chunk = [tokens, (d, c), (c, w), (c, c), (c, c), (c, w), tokens, (d, c), (d, c)]
    rows = [(1, d), (4, d), (1, c + 1), (10, c), (1, CHUNK + 1)]
    return memory + chunk + [tokens] * 6 + rows + [(c, c), (c, c), (d, c), (c, c), (max(c, BLOCK), c)]


panels_of = panels_by_name(Scratch)


@inner
def attend(into, x, S, right, n, columns, d, room, like):
    """Every token's x times its own state: S at the chunk's start, and the keys before it with their ``right``."""
    apart()
    one, zero = real(like, 1), real(like, 0)
    multiply(into, x, S, n, columns, d, one, zero, full)
    scale_rows(into, move(row(room.since, 0), 1), n, columns)
    multiply(room.scores, x, room.across, n, n, d, one, zero, triangle)
    weigh(room.scores, room.pairs, n, True, False, like)
    multiply(into, room.scores, right, n, columns, n, one, one, lower)


@inner
def apply(into, x, n, d, room, like):
    """Every token's matrix H_t + ridge times its x."""
    apart()
    attend(into, x, room.H, room.keys, n, d, d, room, like)
    ridge = row(room.ridge, 0)
    for i in range(n):
        y, z = row(into, i), row(x, i)
        for p in range(d):
            y[p] += ridge[p] * z[p]


@inner
def precondition(into, r, n, together, d, room, like):
    """The common factor's solutions: (r P - tril(r W^T) W) / left; beyond ``together`` tokens r itself."""
    apart()
    one, zero = real(like, 1), real(like, 0)
    m = min(n, together)
    multiply(into, r, room.P, m, d, d, one, zero, full)
    multiply(room.scores, r, room.whitened, m, m, d, one, zero, triangle)
    no_future(room.scores, m, like)
    multiply(into, room.scores, room.W, m, d, m, -one, one, lower)
    for i in range(m):
        scale(row(into, i), one / row(room.tokens, LEFT)[i], d)
    for i in range(m, n):
        copy(row(into, i), row(r, i), d)


@inner
def end_in_zeros(x, n, d, like):
    """Zeros behind the d numbers of n rows, as sums of whole vectors want them."""
    for i in range(n):
        fill(move(row(x, i), d), real(like, 0), tiled(d, like) - d)


@inner
def still_open(n, step, tokens, like):
    """Until which of n tokens some are open."""
    while n > 0 and not is_open(n - 1, step, tokens, like):
        n -= 1
    return n


@inner
def is_open(i, step, tokens, like):
    """Whether a token's residual is still above the tolerance, and steps are left."""
    return row(tokens, ERROR)[i] > like * like * row(tokens, START)[i] and step < row(tokens, MOST)[i]


@inner
def ratio(x, y):
    """x / y, and 0 where y is not positive; a NaN stays."""
    return x * 0 if y <= 0 else x / y
