"""Many small memories side by side: number i of every one of them in one vector register.

A memory of a few dozen numbers per output is too small for products of panels. Here a vector holds the same number of
several sequences, and the recursion of one sequence is that of all of them. A lane computes what it would compute
alone: who its neighbours are, and whether there are any, changes no bit of it. Few sequences are taken one by one, a
vector then holding CHAINS numbers of one: the same sums, side by side instead of one after the other.

    lanes     n vectors in a row: number i of sequence l stands at i * lanes + l, with lanes = 1 or ``widths``

Lanes may hold wider numbers than the arrays that they are taken from and given to, which hold numbers like ``given``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._compile import apart, inner
from ._panels import gather, matrix, move, row
from ._vectors import BYTES, Vectors, ask_line, per_vector

__all__ = [
    "CHAINS",
    "NARROW",
    "TOKENS",
    "add_lanes",
    "ask_for",
    "collect",
    "collect_numbers",
    "dot_lanes",
    "foretell_side",
    "forget_lanes",
    "give_answers",
    "give_state",
    "group_of",
    "in_fours",
    "jobs_of",
    "learn_side",
    "padded",
    "recall_lanes",
    "scale_lanes",
    "take_state",
    "widths",
]

CHAINS = 4  # sums side by side, each of which must wait for itself
TOKENS = 16  # whose numbers are brought together at a time
NARROW = 4  # outputs of a memory up to which its recursion is faster than products of panels


def widths(dtype: np.dtype) -> int:
    """Sequences in a vector."""
    return BYTES // dtype.itemsize


def jobs_of(memories: int, dtype: np.dtype) -> int:
    """Jobs of memories, see ``group_of``."""
    lanes = widths(dtype)
    rest = memories % lanes
    return memories // lanes + (1 if rest > lanes // 2 else rest)


class Group(NamedTuple):
    """Sequences of a job: the first, how many, and the lanes that they fill."""

    first: int
    count: int
    lanes: int


@inner
def group_of(job, memories, like):
    """The sequences of a job: as many as a vector holds, and the last few one by one."""
    lanes = per_vector(like)
    rest = memories % lanes
    whole = memories // lanes + (rest > lanes // 2)
    if job < whole:
        return Group(job * lanes, min(lanes, memories - job * lanes), lanes)
    return Group(whole * lanes + job - whole, 1, 1)


@inner
def padded(n):
    """Vectors of a row of n."""
    return (n + CHAINS - 1) // CHAINS * CHAINS


def in_fours(builder: Any, block: Any, i: int) -> Any:
    """Number CHAINS block + i."""
    word = ir.IntType(64)
    return builder.add(builder.mul(block, word(CHAINS)), word(i))


def sum_of(vectors: Vectors, x: Any, y: Any, n: Any) -> Any:
    """x . y for n vectors each, n a multiple of CHAINS: one sum waits for no other."""
    builder, word, totals = vectors.builder, ir.IntType(64), vectors.totals(CHAINS)
    with cgutils.for_range(builder, builder.udiv(n, word(CHAINS)), intp=word) as loop:
        for i, total in enumerate(totals):
            at = in_fours(builder, loop.index, i)
            vectors.accumulate(total, vectors.load(x, at), vectors.load(y, at))
    sums = [builder.load(total) for total in totals]
    while len(sums) > 1:
        sums = [vectors.add(one, other) for one, other in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def add_times(vectors: Vectors, y: Any, factor: Any, x: Any, n: Any) -> None:
    """y = y + factor x for n vectors and one of factors."""
    with cgutils.for_range(vectors.builder, n, intp=ir.IntType(64)) as loop:
        total = vectors.multiply_add(factor, vectors.load(x, loop.index), vectors.load(y, loop.index))
        vectors.store(total, y, loop.index)


def sum_alone(vectors: Vectors, x: Any, y: Any, n: Any) -> Any:
    """As ``sum_of`` for n numbers of one sequence: the chains are the numbers of a vector."""
    builder, word, (total,) = vectors.builder, ir.IntType(64), vectors.totals(1)
    with cgutils.for_range(builder, builder.udiv(n, word(CHAINS)), intp=word) as loop:
        vectors.accumulate(total, vectors.load(x, loop.index), vectors.load(y, loop.index))
    return builder.extract_element(vectors.sum_everywhere(builder.load(total)), ir.IntType(32)(0))


@intrinsic
def dot_side(typingctx: Any, into: Any, x: Any, y: Any, n: Any) -> Any:
    """into = x . y in every lane, for n vectors each, n a multiple of CHAINS."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, x, y, n = args
        vectors = Vectors(builder, signature.args[0].dtype)
        vectors.store(sum_of(vectors, x, y, n), into, 0)
        return context.get_dummy_value()

    return types.void(into, into, into, types.intp), codegen


@intrinsic
def foretell_side(typingctx: Any, error: Any, x: Any, y: Any, n: Any) -> Any:
    """error = error - x . y in every lane, for n vectors each, n a multiple of CHAINS."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        error, x, y, n = args
        vectors = Vectors(builder, signature.args[0].dtype)
        vectors.store(builder.fsub(vectors.load(error, 0), sum_of(vectors, x, y, n)), error, 0)
        return context.get_dummy_value()

    return types.void(error, error, error, types.intp), codegen


@intrinsic
def learn_side(typingctx: Any, y: Any, error: Any, variance: Any, x: Any, n: Any) -> Any:
    """y = y + error / variance x in every lane, for n vectors."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, error, variance, x, n = args
        vectors = Vectors(builder, signature.args[0].dtype)
        add_times(vectors, y, builder.fdiv(vectors.load(error, 0), vectors.load(variance, 0)), x, n)
        return context.get_dummy_value()

    return types.void(y, y, y, y, types.intp), codegen


@intrinsic
def dot_alone(typingctx: Any, x: Any, y: Any, n: Any) -> Any:
    """x . y for one sequence: the sums of ``dot_side``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return sum_alone(Vectors(builder, signature.args[0].dtype, CHAINS), *args)

    return x.dtype(x, x, types.intp), codegen


@inner
def dot_lanes(into, x, y, n, lanes):
    """into = x . y of every sequence, n numbers each."""
    if lanes == 1:
        into[0] = dot_alone(x, y, n)
    else:
        dot_side(into, x, y, n)


@intrinsic
def add_lanes(typingctx: Any, y: Any, factor: Any, x: Any, n: Any) -> Any:
    """y = y + factor x in every lane, for n vectors and one factor per lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, factor, x, n = args
        vectors = Vectors(builder, signature.args[0].dtype)
        add_times(vectors, y, vectors.load(factor, 0), x, n)
        return context.get_dummy_value()

    return types.void(y, y, y, types.intp), codegen


@intrinsic
def scale_side(typingctx: Any, y: Any, factor: Any, n: Any) -> Any:
    """y = factor y in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, factor, n = args
        vectors = Vectors(builder, signature.args[0].dtype)
        factor = vectors.load(factor, ir.IntType(64)(0))
        with cgutils.for_range(builder, n, intp=ir.IntType(64)) as loop:
            vectors.store(builder.fmul(factor, vectors.load(y, loop.index)), y, loop.index)
        return context.get_dummy_value()

    return types.void(y, y, types.intp), codegen


@inner
def scale_lanes(y, factor, n, lanes):
    """y = factor y of every sequence, n numbers each."""
    if lanes == 1:
        for i in range(n):
            y[i] *= factor[0]
    else:
        scale_side(y, factor, n)


@intrinsic
def ask_for(typingctx: Any, x: Any) -> Any:
    """Ask for the cache line of a number without waiting for it; any address will do."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ask_line(builder, args[0], 1)
        return context.get_dummy_value()

    return types.void(x), codegen


def starts_of(context: Any, builder: Any, array: Any, at: tuple[Any, ...], vectors: Vectors) -> list[Any]:
    """Where some numbers of each sequence of a vector begin; at: places, which, first sequence, group, offset."""
    places, which, first, group, offset = at
    there, kind, starts = context.make_array(array)(context, builder, places), vectors.number.as_pointer(), []
    for lane in range(vectors.count):
        index = [which, builder.add(first, first.type(lane)), group]
        start = builder.load(cgutils.get_item_pointer(context, builder, array, there, index))
        starts.append(builder.gep(builder.inttoptr(start, kind), [offset]))
    return starts


@intrinsic
def take_squares(typingctx: Any, into: Any, at: Any, steps: Any, rows: Any, squares: Any, given: Any) -> Any:
    """Some rows of every sequence of a vector, ``squares`` times as many numbers of each as a vector holds, as vectors.

    What will be taken next is asked for: so many streams at once no machine foresees.

    Parameters
    ----------
    into
        Where the vectors go.
    at
        Addresses, which of them, the first sequence and the group, and how many numbers stand before the first row.
    steps
        Numbers from one row to the next, vectors from one to the next, and numbers to what will be taken next.
    rows, squares
        How many.
    given
        A number like theirs.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, at, steps, rows, squares, _ = args
        vectors, array = Vectors(builder, signature.args[0].dtype), signature.args[1][0]
        theirs = Vectors(builder, given, vectors.count)
        fields = tuple(builder.extract_value(at, i) for i in range(5))
        starts = starts_of(context, builder, array, fields, theirs)
        step, deep, ahead = (builder.extract_value(steps, i) for i in range(3))
        with cgutils.for_range(builder, rows, intp=rows.type) as line, cgutils.for_range(builder, squares) as block:
            before = builder.add(builder.mul(line.index, step), vectors.start(block.index))
            columns = vectors.transpose([vectors.cast(theirs.load_from(start, before)) for start in starts])
            for start in starts:
                ask_line(builder, builder.gep(start, [builder.add(before, ahead)]), 1)
            first = builder.add(builder.mul(line.index, deep), vectors.start(block.index))
            for i, column in enumerate(columns):
                vectors.store(column, into, builder.add(first, rows.type(i)))
        return context.get_dummy_value()

    return types.void(into, at, steps, types.intp, types.intp, given), codegen


@intrinsic
def give_squares(typingctx: Any, told: Any, at: Any, scale: Any, squares: Any, given: Any) -> Any:
    """Vectors times a number as so many numbers in a row of each sequence: ``take_squares`` back."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        told, at, scale, squares, _ = args
        vectors, array = Vectors(builder, signature.args[0].dtype), signature.args[1][0]
        theirs = Vectors(builder, given, vectors.count)
        fields = tuple(builder.extract_value(at, i) for i in range(5))
        starts, factor = starts_of(context, builder, array, fields, theirs), vectors.everywhere(scale)
        with cgutils.for_range(builder, squares, intp=squares.type) as block:
            first = vectors.start(block.index)
            lines = [vectors.load(told, builder.add(first, first.type(i))) for i in range(vectors.count)]
            for start, line in zip(starts, vectors.transpose(lines), strict=True):
                theirs.store_to(theirs.cast(builder.fmul(factor, line)), start, first)
        return context.get_dummy_value()

    return types.void(told, at, scale, types.intp, given), codegen


@inner
def collect(into, places, steps, which, here, group, low, rows, n, deep, given):
    """Some rows of n numbers of an array of each sequence, each row as n of ``deep`` vectors.

    The other vectors, and lanes without a sequence, are left as they are.
    """
    apart()
    lanes, done, step = here.lanes, 0, steps[which, 0]
    column = 1 if n == 1 else steps[which, 1]
    if lanes == 1:
        alone = matrix(places[which, here.first, group], step, column, given)
        load_rows(into, alone, low, rows, n, deep)
        return
    ahead = rows * step
    if step == n == deep and column == 1:  # one long row
        low, rows, n, step = low * n, 1, rows * n, 1
    if here.count == lanes and column == 1:
        done = n // lanes * lanes
        at = places, which, here.first, group, low * step
        take_squares(into, at, (step, deep, ahead), rows, n // lanes, given)
    for lane in range(here.count if done < n else 0):
        x = matrix(places[which, here.first + lane, group], step, column, given)
        for i in range(rows):
            source, target = row(x, low + i), move(into, i * deep * lanes + lane)
            for p in range(done, n):
                target[p * lanes] = source[p * x.column]


@inner
def load_rows(into, x, low, rows, n, deep):
    """Rows of one sequence, one after the other."""
    for i in range(rows):
        gather(move(into, i * deep), row(x, low + i), x.column, n)


@inner
def collect_numbers(into, places, steps, which, here, low, rows, given):
    """Some numbers of an array of one number per token of each sequence, a vector for each token."""
    apart()
    for lane in range(here.count):
        x = matrix(places[which, here.first + lane, 0], steps[which, 0], 1, given)
        for i in range(rows):
            into[i * here.lanes + lane] = row(x, low + i)[0]


@intrinsic
def decay_side(typingctx: Any, S: Any, decays: Any, rests: Any, n: Any) -> Any:
    """S = (decay + rest) S in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        S, decays, rests, n = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        decay, rest = vectors.load(decays, word(0)), vectors.load(rests, word(0))
        with cgutils.for_range(builder, n, intp=word) as loop:
            old = vectors.load(S, loop.index)
            vectors.store(vectors.multiply_add(decay, old, vectors.multiply(rest, old)), S, loop.index)
        return context.get_dummy_value()

    return types.void(S, S, S, types.intp), codegen


@inner
def forget_lanes(S, decays, rests, n, lanes):
    """Decay n vectors, each lane by its own; a full reset forgets even a NaN."""
    apart()
    for lane in range(lanes):
        for i in range(n if decays[lane] == 0 else 0):
            S[i * lanes + lane] = decays[lane]
    decay_side(S, decays, rests, n)


@inner
def take_state(S, places, which, here, d, w, given):
    """States (d, w) of the sequences into w rows of d vectors, see ``collect``."""
    apart()
    for lane in range(here.count):
        state = matrix(places[which, here.first + lane, 0], w, 1, given)
        for p in range(d):
            for j in range(w):
                S[(j * padded(d) + p) * here.lanes + lane] = row(state, p)[j]


@inner
def give_state(S, places, which, here, d, w, given):
    """The same back."""
    apart()
    for lane in range(here.count):
        state = matrix(places[which, here.first + lane, 0], w, 1, given)
        for p in range(d):
            for j in range(w):
                row(state, p)[j] = S[(j * padded(d) + p) * here.lanes + lane]


@inner
def recall_lanes(into, S, q, deep, w, lanes):
    """What the memories say to one query each: w numbers of every sequence."""
    for j in range(w):
        dot_lanes(move(into, j * lanes), q, move(S, j * deep * lanes), deep, lanes)


@inner
def give_answers(told, places, which, here, group, low, rows, w, scale, given):
    """Write the answers of some tokens, which lie in one row of each sequence."""
    apart()
    n, done = rows * w, 0
    if here.count == per_vector(scale):
        done = n // here.count * here.count
        give_squares(told, (places, which, here.first, group, low * w), scale, n // here.count, given)
    for lane in range(here.count if done < n else 0):
        o = row(matrix(places[which, here.first + lane, group], w, 1, given), low)
        for i in range(done, n):
            o[i] = scale * told[i * here.lanes + lane]
