"""Rows of numbers, for kernels: whole vectors, each row read once.

Rows of panels have zeros behind their last number; of an array, nothing behind it is read: ``sweep``.

A loop of Numba asks first whether its rows overlap and ends number by number, which takes longer than rows of 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._vectors import Vectors

__all__ = [
    "add_finite", "add_offset", "add_row", "descend_rows", "dot_offset", "dot_rows", "follow_rows", "offset_row",
    "turn_rows", "untold_rows",
]  # fmt: skip


def summed(builder: Any, like: Any, n: Any, term: Callable[[Vectors, Any], tuple[Any, Any]]) -> Any:
    """Sum over the vectors of n numbers of the product of two that ``term`` gives of each."""
    vectors = Vectors(builder, like)
    (total,) = vectors.totals(1)
    with cgutils.for_range(builder, vectors.holding(n), intp=ir.IntType(64)) as loop:
        vectors.accumulate(total, *term(vectors, loop.index))
    return builder.extract_element(vectors.sum_everywhere(builder.load(total)), ir.IntType(32)(0))


@intrinsic
def dot_rows(typingctx, x, y, n):
    """x . y."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, y, n = args
        return summed(builder, signature.return_type, n, lambda row, j: (row.load(x, j), row.load(y, j)))

    return x.dtype(x, y, types.intp), codegen


@intrinsic
def follow_rows(typingctx, p, z, share, n):
    """p = z + share p."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        p, z, share, n = args
        row = Vectors(builder, signature.args[2])
        with cgutils.for_range(builder, row.holding(n), intp=ir.IntType(64)) as loop:
            j = loop.index
            row.store(row.multiply_add(row.everywhere(share), row.load(p, j), row.load(z, j)), p, j)
        return context.get_dummy_value()

    return types.void(p, z, share, types.intp), codegen


@intrinsic
def turn_rows(typingctx, p, Ap, r, z, ridge, missing, share, n):
    """p = z + share p and Ap = r + missing ridge z + share Ap; p . Ap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        p, Ap, r, z, ridge, missing, share, n = args

        def turned(row: Vectors, j: Any) -> tuple[Any, Any]:
            new, kept = row.load(z, j), row.everywhere(share)
            lacking = builder.fmul(row.everywhere(missing), row.load(ridge, j))
            product = row.multiply_add(kept, row.load(Ap, j), row.multiply_add(lacking, new, row.load(r, j)))
            direction = row.multiply_add(kept, row.load(p, j), new)
            row.store(direction, p, j)
            row.store(product, Ap, j)
            return direction, product

        return summed(builder, signature.return_type, n, turned)

    return missing(p, Ap, r, z, ridge, missing, share, types.intp), codegen


@intrinsic
def descend_rows(typingctx, x, r, p, Ap, length, n):
    """x = x + length p and r = r - length Ap; r . r."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, r, p, Ap, length, n = args

        def descended(row: Vectors, j: Any) -> tuple[Any, Any]:
            far = row.everywhere(length)
            left = row.multiply_add(builder.fneg(far), row.load(Ap, j), row.load(r, j))
            row.store(row.multiply_add(far, row.load(p, j), row.load(x, j)), x, j)
            row.store(left, r, j)
            return left, left

        return summed(builder, signature.return_type, n, descended)

    return length(x, r, p, Ap, length, types.intp), codegen


@intrinsic
def untold_rows(typingctx, errors, step, told, told_step, since, beta, beta_step, n, columns):
    """errors_i = beta_i (errors_i - since_i told_i) for n rows."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        errors, step, told, told_step, since, beta, beta_step, n, columns = args
        row, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        with cgutils.for_range(builder, n, intp=word) as i:
            error, other = (builder.gep(x, [builder.mul(i.index, s)]) for x, s in ((errors, step), (told, told_step)))
            left = builder.fneg(row.everywhere(builder.load(builder.gep(since, [i.index]))))
            share = row.everywhere(builder.load(builder.gep(beta, [builder.mul(i.index, beta_step)])))
            with cgutils.for_range(builder, row.holding(columns), intp=word) as j:
                new = row.multiply_add(left, row.load(other, j.index), row.load(error, j.index))
                row.store(builder.fmul(share, new), error, j.index)
        return context.get_dummy_value()

    place = types.intp
    return types.void(errors, place, errors, place, errors, errors, place, place, place), codegen


def sweep(builder: Any, like: Any, n: Any, body: Callable[[Vectors, Any], None]) -> None:
    """The body for all whole vectors among n numbers, then for each of the others."""
    whole, one, word = Vectors(builder, like), Vectors(builder, like, 1), ir.IntType(64)
    count = builder.udiv(n, word(whole.count))
    with cgutils.for_range(builder, count, intp=word) as loop:
        body(whole, loop.index)
    with cgutils.for_range_slice(builder, whole.start(count), n, word(1), intp=word) as (i, _):
        body(one, i)


@intrinsic
def add_row(typingctx, y, factor, x, n):
    """y = y + factor x."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, factor, x, n = args
        row = Vectors(builder, signature.args[1])
        with cgutils.for_range(builder, row.holding(n), intp=ir.IntType(64)) as loop:
            j = loop.index
            row.store(row.multiply_add(row.everywhere(factor), row.load(x, j), row.load(y, j)), y, j)
        return context.get_dummy_value()

    return types.void(y, factor, y, types.intp), codegen


def swept(y: Any, factor: Any, numbers: Any, others: Sequence[Any], term: Callable[..., Any]) -> Any:
    """y = what ``term`` makes of a factor, the numbers of an array, those of other rows, and y."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, factor, numbers, *others, n = args

        def body(row: Vectors, j: Any) -> None:
            x = row.cast(Vectors(builder, signature.args[2].dtype, row.count).load(numbers, j))
            known = [row.load(other, j) for other in (*others, y)]
            row.store(term(row, row.everywhere(factor), x, *known), y, j)

        sweep(builder, signature.args[1], n, body)
        return context.get_dummy_value()

    return types.void(y, factor, numbers, *others, types.intp), codegen


@intrinsic
def offset_row(typingctx, x, factor, numbers, centre, n):
    """x = factor (numbers - centre)."""

    def term(row: Vectors, factor: Any, x: Any, centre: Any, old: Any) -> Any:
        return row.builder.fmul(factor, row.builder.fsub(x, centre))

    return swept(x, factor, numbers, [centre], term)


@intrinsic
def add_offset(typingctx, y, factor, numbers, centre, n):
    """y = y + factor (numbers - centre)."""

    def term(row: Vectors, factor: Any, x: Any, centre: Any, old: Any) -> Any:
        return row.multiply_add(factor, row.builder.fsub(x, centre), old)

    return swept(y, factor, numbers, [centre], term)


@intrinsic
def add_finite(typingctx, y, factor, numbers, n):
    """y = y + factor numbers, where one that is not finite is none."""

    def term(row: Vectors, factor: Any, x: Any, old: Any) -> Any:
        nothing = row.builder.fsub(x, x)  # zero, or none
        known = row.builder.fcmp_ordered("ord", nothing, nothing)
        return row.multiply_add(factor, row.builder.select(known, x, row.constant(math.nan)), old)

    return swept(y, factor, numbers, [], term)


@intrinsic
def dot_offset(typingctx, x, numbers, centre, n):
    """x . (numbers - centre)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, numbers, centre, n = args
        like, number = signature.return_type, ir.IntType(32)
        totals = {1: Vectors(builder, like, 1).totals(1)[0]}
        whole = Vectors(builder, like)
        totals[whole.count] = whole.totals(1)[0]

        def body(row: Vectors, j: Any) -> None:
            y = row.cast(Vectors(builder, signature.args[1].dtype, row.count).load(numbers, j))
            offset = builder.fsub(y, row.load(centre, j))
            row.accumulate(totals[row.count], row.load(x, j), offset)

        sweep(builder, like, n, body)
        most, rest = whole.sum_everywhere(builder.load(totals[whole.count])), builder.load(totals[1])
        return builder.fadd(builder.extract_element(most, number(0)), builder.extract_element(rest, number(0)))

    return x.dtype(x, numbers, x, types.intp), codegen
