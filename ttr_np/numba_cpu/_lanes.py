"""Many small memories side by side: number i of every one of them in one vector register.

A memory of a few dozen numbers per output is too small for products of panels. Here a vector holds the same number of
LANES sequences, and the recursion of one sequence is that of all of them. A lane computes what it would compute alone:
who its neighbours are, and whether there are any, changes no bit of it.

    lanes     n vectors in a row: number i of sequence l stands at i * width + l
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._compile import apart, inner
from ._gates import exp
from ._panels import matrix, move, real, row

__all__ = [
    "CHAINS",
    "NARROW",
    "TOKENS",
    "add_lanes",
    "collect",
    "collect_numbers",
    "dot_lanes",
    "forget_lanes",
    "give_answers",
    "give_state",
    "padded",
    "recall_lanes",
    "learn_column",
    "scale_lanes",
    "take_state",
    "width",
    "widths",
]

BYTES = 32  # of a vector
CHAINS = 4  # sums side by side, each of which must wait for itself
TOKENS = 16  # whose numbers are brought together at a time
NARROW = 4  # outputs of a memory up to which its recursion is faster than products of panels


def widths(dtype: np.dtype) -> int:
    """Sequences in a vector."""
    return BYTES // dtype.itemsize


def vector_of(number: Any) -> tuple[Any, int]:
    """The vector type of a dtype, and the bytes of one number."""
    kind = ir.FloatType() if number.bitwidth == 32 else ir.DoubleType()
    return ir.VectorType(kind, BYTES * 8 // number.bitwidth), number.bitwidth // 8


@inner
def padded(n):
    """Vectors of a row of n."""
    return (n + CHAINS - 1) // CHAINS * CHAINS


@intrinsic
def width(typingctx: Any, like: Any) -> Any:
    """Sequences in a vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, BYTES * 8 // like.bitwidth)

    return types.intp(like), codegen


class Vectors:
    """Vectors in memory, for the functions below."""

    def __init__(self, builder: Any, number: Any) -> None:
        self.builder, (self.vector, self.align) = builder, vector_of(number)
        name = f"llvm.fmuladd.v{self.vector.count}f{number.bitwidth}"
        self.fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(self.vector, [self.vector] * 3), name)

    def place(self, base: Any, index: Any) -> Any:
        """Pointer to a vector."""
        offset = self.builder.mul(index, ir.IntType(64)(self.vector.count))
        return self.builder.bitcast(self.builder.gep(base, [offset]), self.vector.as_pointer())

    def load(self, base: Any, index: Any) -> Any:
        """One vector."""
        return self.builder.load(self.place(base, index), align=self.align)

    def store(self, x: Any, base: Any, index: Any) -> None:
        """Write one vector."""
        self.builder.store(x, self.place(base, index), align=self.align)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z."""
        return self.builder.call(self.fma, [x, y, z])


def sum_of(vectors: Vectors, start: Any, x: Any, y: Any, n: Any) -> Any:
    """start + x . y for n vectors each, n a multiple of CHAINS: one sum waits for no other."""
    builder, word = vectors.builder, ir.IntType(64)
    zero = ir.Constant(vectors.vector, [0.0] * vectors.vector.count)
    totals = [cgutils.alloca_once_value(builder, start if not i else zero) for i in range(CHAINS)]
    for i, total in enumerate(totals):  # once more, because the one before is done where the function begins
        builder.store(start if not i else zero, total)
    with cgutils.for_range(builder, builder.udiv(n, word(CHAINS)), intp=word) as loop:
        for i, total in enumerate(totals):
            at = builder.add(builder.mul(loop.index, word(CHAINS)), word(i))
            builder.store(vectors.multiply_add(vectors.load(x, at), vectors.load(y, at), builder.load(total)), total)
    sums = [builder.load(total) for total in totals]
    while len(sums) > 1:
        sums = [builder.fadd(one, other) for one, other in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


@intrinsic
def dot_lanes(typingctx: Any, into: Any, start: Any, x: Any, y: Any, n: Any) -> Any:
    """into = start + x . y in every lane, for n vectors each, n a multiple of CHAINS."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, start, x, y, n = args
        vectors, zero = Vectors(builder, signature.args[0].dtype), ir.IntType(64)(0)
        vectors.store(sum_of(vectors, vectors.load(start, zero), x, y, n), into, zero)
        return context.get_dummy_value()

    return types.void(into, into, into, into, types.intp), codegen


@intrinsic
def add_lanes(typingctx: Any, y: Any, factor: Any, x: Any, n: Any) -> Any:
    """y = y + factor x in every lane, for n vectors and one factor per lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, factor, x, n = args
        vectors = Vectors(builder, signature.args[0].dtype)
        factor = vectors.load(factor, ir.IntType(64)(0))
        with cgutils.for_range(builder, n, intp=ir.IntType(64)) as loop:
            total = vectors.multiply_add(factor, vectors.load(x, loop.index), vectors.load(y, loop.index))
            vectors.store(total, y, loop.index)
        return context.get_dummy_value()

    return types.void(y, y, y, types.intp), codegen


@intrinsic
def scale_lanes(typingctx: Any, y: Any, factor: Any, n: Any) -> Any:
    """y = factor y in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, factor, n = args
        vectors = Vectors(builder, signature.args[0].dtype)
        factor = vectors.load(factor, ir.IntType(64)(0))
        with cgutils.for_range(builder, n, intp=ir.IntType(64)) as loop:
            vectors.store(builder.fmul(factor, vectors.load(y, loop.index)), y, loop.index)
        return context.get_dummy_value()

    return types.void(y, y, types.intp), codegen


@intrinsic
def learn_column(typingctx: Any, column: Any, D: Any, k: Any, gain: Any, before: Any, j: Any, deep: Any) -> Any:
    """Column j of Bierman's update of U diag(D) U^T by keys k, in every lane.

    ``gain``: U diag(D) U^T k up to this column, zeros behind; ``before``: 1 + k^T U diag(D) U^T k likewise; both are
    carried on. ``deep``: j, up to a multiple of CHAINS.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        column, D, k, gain, before, j, deep = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        f = sum_of(vectors, vectors.load(k, j), column, k, deep)
        d, old = vectors.load(D, j), vectors.load(before, word(0))
        grow = builder.fmul(d, f)
        after = vectors.multiply_add(f, grow, old)
        shrink = builder.fdiv(builder.fneg(f), old)
        vectors.store(builder.fmul(d, builder.fdiv(old, after)), D, j)
        with cgutils.for_range(builder, builder.udiv(deep, word(CHAINS)), intp=word) as loop:
            places = [builder.add(builder.mul(loop.index, word(CHAINS)), word(i)) for i in range(CHAINS)]
            old_u = [vectors.load(column, at) for at in places]
            old_b = [vectors.load(gain, at) for at in places]
            for at, u, b in zip(places, old_u, old_b, strict=True):
                vectors.store(vectors.multiply_add(shrink, b, u), column, at)
                vectors.store(vectors.multiply_add(grow, u, b), gain, at)
        vectors.store(grow, gain, j)
        vectors.store(after, before, word(0))
        return context.get_dummy_value()

    return types.void(column, column, column, column, column, types.intp, types.intp), codegen


@inner
def collect(into, places, steps, which, first, count, group, low, rows, n, deep, like):
    """Some rows of n numbers of an array of each sequence, each row as n of ``deep`` vectors.

    The other vectors, and lanes without a sequence, are left as they are.
    """
    apart()
    lanes = width(like)
    for lane in range(count):
        x = matrix(places[which, first + lane, group], steps[which, 0], steps[which, 1], like)
        for i in range(rows):
            source, target = row(x, low + i), move(into, i * deep * lanes + lane)
            for p in range(n):
                target[p * lanes] = source[p * x.column]


@inner
def collect_numbers(into, places, steps, which, first, count, low, rows, like):
    """Some numbers of an array of one number per token of each sequence, a vector for each token."""
    apart()
    for lane in range(count):
        x = matrix(places[which, first + lane, 0], steps[which, 0], 1, like)
        for i in range(rows):
            into[i * width(like) + lane] = row(x, low + i)[0]


@inner
def forget_lanes(S, gates, n, like):
    """Decay n vectors by e^gate, the gates of one step, one per lane; a full reset forgets even a NaN."""
    apart()
    for lane in range(width(like)):
        gates[lane] = exp(gates[lane])
        for i in range(n if gates[lane] == 0 else 0):
            S[i * width(like) + lane] = gates[lane]
    scale_lanes(S, gates, n)


@inner
def take_state(S, places, which, first, count, d, w, like):
    """States (d, w) of the sequences into w rows of d vectors, see ``collect``."""
    apart()
    for lane in range(count):
        state = matrix(places[which, first + lane, 0], w, 1, like)
        for p in range(d):
            for j in range(w):
                S[(j * padded(d) + p) * width(like) + lane] = row(state, p)[j]


@inner
def give_state(S, places, which, first, count, d, w, like):
    """The same back."""
    apart()
    for lane in range(count):
        state = matrix(places[which, first + lane, 0], w, 1, like)
        for p in range(d):
            for j in range(w):
                row(state, p)[j] = S[(j * padded(d) + p) * width(like) + lane]


@inner
def recall_lanes(into, S, q, deep, w, like):
    """What the memories say to one query each: w vectors."""
    lanes = width(like)
    for j in range(w):
        told = move(into, j * lanes)
        for lane in range(lanes):
            told[lane] = real(like, 0)
        dot_lanes(told, told, q, move(S, j * deep * lanes), deep)


@inner
def give_answers(told, places, which, first, count, group, low, rows, w, scale, like):
    """Write the answers of some tokens."""
    apart()
    for lane in range(count):
        o = matrix(places[which, first + lane, group], w, 1, like)
        for i in range(rows):
            for j in range(w):
                row(o, low + i)[j] = scale * told[(i * w + j) * width(like) + lane]
