"""Factorisations for kernels, in scratch: Cholesky, inverse of a triangle, singular values by rotations, reflections.

Every row of a result is computed from earlier rows only, so rows that are left out change no bit of the others.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._compile import apart, inner
from ._panels import (
    LINE,
    Matrix,
    below,
    dot,
    fill,
    full,
    lanes,
    load_transposed,
    move,
    multiply,
    real,
    right,
    row,
    scale,
)
from ._triangles import invert_lower, solve_lower
from ._vectors import Vectors

__all__ = [
    "BLOCK", "Reflections", "cholesky", "eps", "no_future", "orthogonalise", "reflect", "square",
]  # fmt: skip

BLOCK = LINE // 4  # rows taken one by one before a product passes them on; whole tiles in every dtype


@intrinsic
def eps(typingctx, like):
    """Distance from 1 to the next number."""
    exponent = {32: -23, 64: -52}[like.bitwidth]
    return like(like), lambda context, builder, signature, args: context.get_constant(like, 2.0**exponent)


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
def tiled(columns, like):
    """Columns up to the next whole tile."""
    return (columns + lanes(like) - 1) // lanes(like) * lanes(like)


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
        size, rest, own = min(BLOCK, n - low), max(n - low - BLOCK, 0), right(below(A, low), low)
        if low:
            load_transposed(across, A, low, size, low)
            multiply(own, below(A, low), across, n - low, size, low, real(like, -1), real(like, 1), full)
        load_transposed(across, own, 0, size, size)
        if not factorise_upper(across, size, like):
            return False
        load_transposed(own, across, 0, size, size)
        columns = Matrix(across.data, tiled(rest, like), 1)  # fits: no more than n, as a block is no less than a tile
        load_transposed(columns, own, size, rest, size)
        solve_lower(own, columns, size, rest)
        load_transposed(below(own, size), columns, 0, size, rest)
    return True


@intrinsic
def subtract_row(typingctx, U, step, j, n):
    """From every row of U below row j, that row times the number that it has in their place: n columns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        U, step, j, n = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        mine, after = builder.gep(U, [builder.mul(j, step)]), builder.add(j, word(1))
        first, last = builder.udiv(j, word(vectors.count)), vectors.holding(n)
        with cgutils.for_range_slice(builder, first, last, word(1), intp=word) as (v, _):
            x, end = vectors.load(mine, v), vectors.start(builder.add(v, word(1)))
            end = builder.select(builder.icmp_signed("<", end, n), end, n)
            with cgutils.for_range_slice(builder, after, end, word(1), intp=word) as (i, _):
                factor = builder.fneg(vectors.everywhere(builder.load(builder.gep(mine, [i]))))
                line = builder.gep(U, [builder.mul(i, step)])
                vectors.store(vectors.multiply_add(factor, x, vectors.load(line, v)), line, v)
        return context.get_dummy_value()

    return types.void(U, types.intp, types.intp, types.intp), codegen


@inner
def factorise_upper(U, n, like):
    """A = U^T U in place, upper triangles only, row by row; False if a pivot is not positive."""
    apart()
    for j in range(n):
        mine = row(U, j)
        if not mine[j] > 0:
            return False
        root = math.sqrt(mine[j])
        scale(move(mine, j), real(like, 1) / root, n - j)
        mine[j] = root
        subtract_row(U.data, U.step, j, n)
    return True


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
    """Householder's triangle for [diag(sqrt left)  A] = -[L  0] Q with n rows, L lower triangular, as matrix products.

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
    for i in range(n):  # sums run over whole vectors
        fill(move(row(A, i), d), zero, tiled(d, like) - d)
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


@intrinsic
def reflect_rows(typingctx, a, share, rows, step, n, columns, into, into_step):
    """n rows x, each without its share of a, x - share (a . x) a; ``into``: these factors.

    Their columns are whole vectors: zeros behind the last.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, share, rows, step, n, columns, into, into_step = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        share, count = vectors.everywhere(share), vectors.holding(columns)
        with cgutils.for_range(builder, n, intp=word) as loop:
            x, (total,) = builder.gep(rows, [builder.mul(loop.index, step)]), vectors.totals(1)
            with cgutils.for_range(builder, count, intp=word) as j:
                vectors.accumulate(total, vectors.load(a, j.index), vectors.load(x, j.index))
            factor = builder.fmul(share, vectors.sum_everywhere(builder.load(total)))
            place = builder.gep(into, [builder.mul(loop.index, into_step)])
            builder.store(builder.extract_element(factor, ir.IntType(32)(0)), place)
            factor = builder.fneg(factor)
            with cgutils.for_range(builder, count, intp=word) as j:
                left = vectors.multiply_add(factor, vectors.load(a, j.index), vectors.load(x, j.index))
                vectors.store(left, x, j.index)
        return context.get_dummy_value()

    return types.void(a, a.dtype, a, *[types.intp] * 3, a, types.intp), codegen


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
        others, column = below(A, j + 1), move(row(into.L, j + 1), j)
        reflect_rows(a, share, others.data, A.step, high - j - 1, d, column, into.L.step)


@inner
def couple(A, low, high, d, into, like):
    """The block of T on its diagonal: the inverse of a triangle of products, one over T's own diagonal on its own."""
    apart()
    size, turned, own = high - low, right(into.across, low), right(below(into.T, low), low)
    multiply(into.part, below(A, low), turned, size, size, d, real(like, 1), real(like, 0), full)
    for j in range(size):
        row(into.part, j)[j] = real(like, 1) / row(own, j)[j]
    invert_lower(into.part, into.products, size, like)
    load_transposed(own, into.products, 0, size, size)
