"""Factorisations for kernels, in scratch: Cholesky, inverse of a triangle, singular values by rotations, reflections.

Every row of a result is computed from earlier rows only, so rows that are left out change no bit of the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from numba import types
from numba.extending import intrinsic

from ._compile import apart, inner
from ._panels import (
    LINE,
    ROWS,
    Matrix,
    add_scaled,
    below,
    dot,
    fill,
    full,
    load_transposed,
    move,
    multiply,
    real,
    row,
    scale,
)

__all__ = [
    "BLOCK", "Reflections", "cholesky", "eps", "invert_lower", "no_future", "orthogonalise", "reflect", "right",
    "solve_lower", "square",
]  # fmt: skip

BLOCK = LINE // 4  # rows taken one by one before a product passes them on; whole tiles in every dtype


@intrinsic
def eps(typingctx, like):
    """Distance from 1 to the next number."""
    exponent = {32: -23, 64: -52}[like.bitwidth]
    return like(like), lambda context, builder, signature, args: context.get_constant(like, 2.0**exponent)


@inner
def right(x, j):
    """The columns of a panel from j on, j a multiple of BLOCK."""
    return Matrix(move(x.data, j), x.step, x.column)


@inner
def square(x, n):
    """|x|^2 in double precision, which no number of single precision overflows."""
    total = 0.0
    for i in range(n):
        total += types.float64(x[i]) * types.float64(x[i])
    return total


@inner
def no_future(scores, n, like):
    """Zeros above the diagonal of a panel."""
    apart()
    for i in range(n):
        fill(move(row(scores, i), i + 1), real(like, 0), n - i - 1)


@inner
def cholesky(A, across, n, like):
    """A = L L^T in place, its lower triangle only; False if a pivot is not positive.

    Parameters
    ----------
    A
        Panel ``(n, n)``.
    across
        Panel ``(n, BLOCK)``, overwritten.
    n
        Rows of both.
    """
    apart()
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        if low:
            load_transposed(across, A, low, high - low, low)
            rest = right(below(A, low), low)
            multiply(rest, below(A, low), across, n - low, high - low, low, real(like, -1), real(like, 1), full)
        if not factorise_block(A, low, high, like):
            return False
        if high < n:
            solve_right(A, Matrix(across.data, n - high, 1), low, high, n, like)
    return True


@inner
def factorise_block(A, low, high, like):
    """The factor's block on the diagonal, row by row; False if a pivot is not positive."""
    apart()
    for i in range(low, high):
        mine = move(row(A, i), low)
        for j in range(i - low):
            theirs = move(row(A, low + j), low)
            mine[j] = (mine[j] - dot(mine, theirs, j, like)) / theirs[j]
        pivot = mine[i - low] - dot(mine, mine, i - low, like)
        if not pivot > 0:
            return False
        mine[i - low] = math.sqrt(pivot)
    return True


@inner
def solve_right(A, across, low, high, n, like):
    """The factor's rows below a block of its diagonal, by forward substitution of all at once, as columns."""
    apart()
    size, rest = high - low, n - high
    load_transposed(across, right(A, low), high, rest, size)
    for j in range(size):
        for i in range(j):
            add_scaled(row(across, j), -row(A, low + j)[low + i], row(across, i), rest)
        scale(row(across, j), real(like, 1) / row(A, low + j)[low + j], rest)
    load_transposed(right(below(A, high), low), across, 0, size, rest)


@inner
def solve_lower(L, x, m, n, like):
    """x = L^-1 x in place for a lower triangle, by forward substitution; x a panel, ``(m, n)`` of it."""
    apart()
    for low in range(0, m, 2 * ROWS):
        high = min(low + 2 * ROWS, m)
        multiply(below(x, low), below(L, low), x, high - low, n, low, real(like, -1), real(like, 1), full)
        for i in range(low, high):
            for j in range(low, i):
                add_scaled(row(x, i), -row(L, i)[j], row(x, j), n)
            scale(row(x, i), real(like, 1) / row(L, i)[i], n)


@inner
def invert_lower(L, X, n, like):
    """X = L^-1 for a lower triangle, by forward substitution; above the diagonal X is zero."""
    apart()
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        multiply(below(X, low), below(L, low), X, high - low, low, low, real(like, -1), real(like, 0), full)
        for i in range(low, high):
            x = row(X, i)
            fill(move(x, low), real(like, 0), n - low)
            x[i] = real(like, 1)
            for j in range(low, i):
                add_scaled(x, -row(L, i)[j], row(X, j), j + 1)
            scale(x, real(like, 1) / row(L, i)[i], i + 1)


@inner
def orthogonalise(X, n, d, roots, like):
    """Rotate the n rows of X until they are orthogonal; ``roots``: their lengths, the singular values of X.

    One-sided Jacobi rotations, pair by pair: small singular values are as accurate as large ones.
    """
    apart()
    for _ in range(30):
        still = True
        for p in range(n):
            for q in range(p + 1, n):
                if rotate(row(X, p), row(X, q), d, 4 * eps(like), like):
                    still = False
        if still:
            break
    for p in range(n):
        roots[p] = math.sqrt(square(row(X, p), d))


@inner
def rotate(x, y, n, small, like):
    """Make two rows orthogonal; False if they are, or if they hold a bad number."""
    apart()
    a, b, c = square(x, n), square(y, n), 0.0
    for i in range(n):
        c += types.float64(x[i]) * types.float64(y[i])
    if not abs(c) > small * math.sqrt(a) * math.sqrt(b):
        return False
    slope = (b - a) / (2 * c)
    tangent = math.copysign(1.0, slope) / (abs(slope) + math.sqrt(1 + slope * slope))
    cosine = 1 / math.sqrt(1 + tangent * tangent)
    first, second = real(like, cosine), real(like, cosine * tangent)
    for i in range(n):
        x[i], y[i] = first * x[i] - second * y[i], second * x[i] + first * y[i]
    return True


class Reflections(NamedTuple):
    """The orthogonal matrix I - Y T Y^T that takes c rows of n numbers into a square root; see ``reflect``."""

    L: Matrix  # c x c
    T: Matrix  # c x c, upper triangular, zeros below
    across: Matrix  # n x c: the vectors as columns
    products: Matrix  # c x c
    part: Matrix  # c x c


@inner
def reflect(A, left, n, d, into, like):
    """Householder's triangle for [diag(sqrt left)  A] = [L  0] Q with n rows, L lower triangular, as matrix products.

    Row j is reflected onto its first part: the vector is (e_j, v_j), v_j = a_j / (sqrt left_j + L_jj), and all together
    are I - [I; V^T] T [I; V^T]^T. Nothing is squared: L is as good as from the recursion, row by row.

    Parameters
    ----------
    A
        Panel of n rows of d numbers, replaced by the rows of V.
    left
        Row of n positive numbers.
    into
        Receives L (its diagonal positive), T and V^T.
    """
    apart()
    L, T, one, zero = into.L, into.T, real(like, 1), real(like, 0)
    for low in range(0, n, BLOCK):
        high = min(low + BLOCK, n)
        size, rest, turned = high - low, n - high, right(into.across, low)
        reflect_block(A, left, low, high, d, into, like)
        load_transposed(turned, A, low, size, d)
        couple(A, low, high, d, into, like)
        if low:
            multiply(into.products, A, turned, low, size, d, one, zero, full)
            multiply(into.part, into.products, right(below(T, low), low), low, size, size, one, zero, full)
            multiply(right(T, low), T, into.part, low, size, low, -one, zero, full)
        if rest:
            Z = right(below(L, high), low)
            multiply(into.products, below(A, high), turned, rest, size, d, one, zero, full)
            multiply(Z, into.products, right(below(T, low), low), rest, size, size, one, zero, full)
            multiply(below(A, high), Z, below(A, low), rest, d, size, -one, one, full)


@inner
def reflect_block(A, left, low, high, d, into, like):
    """The reflections of a few rows, one by one."""
    apart()
    for j in range(low, high):
        a, root = row(A, j), math.sqrt(left[j])
        length = math.sqrt(left[j] + dot(a, a, d, like))
        share = (root + length) / length
        row(into.L, j)[j], row(into.T, j)[j] = length, share
        scale(a, real(like, 1) / (root + length), d)
        for i in range(j + 1, high):
            factor = share * dot(a, row(A, i), d, like)
            row(into.L, i)[j] = factor
            add_scaled(row(A, i), -factor, a, d)


@inner
def couple(A, low, high, d, into, like):
    """The block of T on its diagonal."""
    apart()
    size, turned = high - low, right(into.across, low)
    multiply(into.part, below(A, low), turned, size, size, d, real(like, 1), real(like, 0), full)
    for j in range(size):
        line = row(into.part, j)
        fill(move(row(into.T, low + j), low), real(like, 0), j)
        for i in range(j):
            mine, total = move(row(into.T, low + i), low), real(like, 0)
            for m in range(i, j):
                total += mine[m] * line[m]
            mine[j] = -row(into.T, low + j)[low + j] * total
