"""Products of one chunk whose pairs decay with one gate per channel, for kernels.

A decay per pair and channel would be c^2 k numbers. So a chunk is cut into blocks of 16 tokens, and a block into fours:
a pair of one four meets through the steps between, one by one; any other meets at the start of the later four, or of
the later block, to which the earlier key has been carried from one to the next. Every factor is a product of gates, in
[0, 1]: nothing is divided or subtracted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._compile import apart, inner
from ._gates import exponentials
from ._lanes import in_fours
from ._panels import (
    ROWS,
    Matrix,
    add_scaled,
    below,
    copy,
    fill,
    full,
    load,
    load_transposed,
    move,
    multiply,
    real,
    row,
    times_rows,
)
from ._powers import exponential
from ._vectors import WIDE, Vectors, ceil_div, row_of

__all__ = [
    "Channels",
    "carry_keys",
    "channel_decays",
    "channel_products",
    "channel_shapes",
    "forgets",
    "meetings",
]

BLOCK = 16
FOUR = 4  # rows whose pairs meet step by step
FAR = 4 if WIDE else 2  # earlier keys that meet four rows at once, as many as sums fit the registers
KEPT = FOUR + 1 + BLOCK


class Channels(NamedTuple):
    """Decays of a chunk of c tokens, and room for the products."""

    step: Matrix  # c x k: of each step
    since: Matrix  # c x k: from the start of its block over a token's own step
    until: Matrix  # c x k: from a token to the end of its block
    block: Matrix  # blocks x k: over a block
    start: Matrix  # (blocks + 1) x k: from the chunk's start to a block's start; the last one over the chunk
    rows: Matrix  # BLOCK x k: left factors at the start of their block
    total: Matrix  # 1 x k: log decays since the chunk's start
    met: Matrix  # BLOCK x BLOCK, its rows one behind the other: products of one block
    room: Matrix  # KEPT x k, see ``Block``


def meetings(c: int) -> int:
    """Blocks of a chunk of c tokens at whose start earlier keys of the chunk are met, at least 1."""
    return max(1, -(-c // BLOCK) - 1)


def channel_shapes(c: int, k: int) -> list[tuple[int, int]]:
    """Shapes of the panels of ``Channels``."""
    blocks = -(-c // BLOCK)
    return [(c, k), (c, k), (c, k), (blocks, k), (blocks + 1, k), (BLOCK, k), (1, k), (BLOCK, BLOCK), (KEPT, k)]


@inner
def channel_decays(gates, low, n, k, decays, like):
    """Fill in the decays of the rows low to low + n of log decays."""
    apart()
    total = row(decays.total, 0)
    fill(total, real(like, 0), k)
    for first in range(0, n, BLOCK):
        rows, block, steps = min(BLOCK, n - first), first // BLOCK, below(decays.step, first)
        over, start = row(decays.block, block), row(decays.start, block)
        copy(start, total, k)
        exponentials(start, k)
        load(steps, gates, low + first, rows, 0, k)
        run_up_and_down(steps.data, row(decays.since, first), row(decays.until, first), over, steps.step, rows, k)
        add_scaled(total, real(like, 1), over, k)
        exponentials(over, k)
    start = row(decays.start, (n + BLOCK - 1) // BLOCK)
    copy(start, total, k)
    exponentials(start, k)


@inner
def forgets(since, decays, n, k, per_channel):
    """Whether nothing may be left at the end of a chunk of n tokens of something that was there at its start."""
    apart()
    keeps, rows = (row(decays.start, (n + BLOCK - 1) // BLOCK), k) if per_channel else (move(row(since, 0), n), 1)
    nothing = np.int32(0)
    for p in range(rows):
        nothing += np.int32(keeps[p] == 0)
    return nothing > 0


@intrinsic
def run_up_and_down(typingctx, steps, since, until, over, step, rows, k):
    """Decays of steps in place of their logs; their products up to each row, its own with them, and of those behind it.

    The rows are ``step`` apart, and zeros come behind their k numbers. ``over``: the sum of the logs.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        steps, since, until, over, step, rows, k = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        with cgutils.for_range(builder, vectors.holding(k), intp=word) as loop:
            here = vectors.before(builder.sub(k, vectors.start(loop.index)))
            (logs,), (up, down) = vectors.totals(1), vectors.totals(2, 1.0)
            with cgutils.for_range(builder, rows, intp=word) as i:
                there = builder.mul(i.index, step)
                log = vectors.load(builder.gep(steps, [there]), loop.index)
                builder.store(builder.fadd(builder.load(logs), log), logs)
                decay = builder.select(here, exponential(vectors, log), vectors.constant(0.0))
                vectors.store(decay, builder.gep(steps, [there]), loop.index)
                builder.store(vectors.multiply(builder.load(up), decay), up)
                vectors.store(builder.load(up), builder.gep(since, [there]), loop.index)
            vectors.store(builder.load(logs), over, loop.index)
            with cgutils.for_range(builder, rows, intp=word) as i:
                back = builder.mul(builder.sub(builder.sub(rows, word(1)), i.index), step)
                vectors.store(builder.load(down), builder.gep(until, [back]), loop.index)
                decay = vectors.load(builder.gep(steps, [back]), loop.index)
                builder.store(vectors.multiply(builder.load(down), decay), down)
        return context.get_dummy_value()

    return types.void(steps, steps, steps, steps, *[types.intp] * 3), codegen


@inner
def everywhere(x, i):
    """A panel all of whose rows are one row of another."""
    return Matrix(row(x, i), 0, x.column)


@inner
def carry_keys(met, carried, keys, n, k, decays):
    """Carry the keys of a chunk from block to block, as all its queries will meet them.

    Parameters
    ----------
    met : (meetings k, n)
        Written: k rows for each block but the first, the keys before it, decayed to its start, as columns.
    carried : (n, k)
        Written: the keys decayed to the chunk's end, what is added to the state.
    keys : (n, k)
        A panel.
    """
    apart()
    for first in range(0, n, BLOCK):
        block = first // BLOCK
        if first:
            load_transposed(below(met, (block - 1) * k), carried, 0, first, k)
        times_rows(carried, carried, everywhere(decays.block, block), first, k)
        here = below(carried, first)
        times_rows(here, below(keys, first), below(decays.until, first), min(BLOCK, n - first), k)


@inner
def channel_products(scores, past, met, x, keys, n, k, decays, late, like):
    """Decayed products x_i . k_j for j <= i (j < i if late), zeros above as far as products read.

    Parameters
    ----------
    scores : (n, n)
        Written.
    past : (n, k)
        Written: x decayed to the chunk's start, what meets the state.
    met
        The keys as of ``carry_keys``.
    x, keys : (n, k)
        Panels.
    late
        Whether x reads the state before its own step.
    """
    apart()
    for first in range(0, n, BLOCK):
        m, block = min(BLOCK, n - first), first // BLOCK
        if late:
            copy(row(decays.rows, 0), row(x, first), k)
        times_rows(below(decays.rows, late), below(x, first + late), below(decays.since, first), m - late, k)
        times_rows(below(past, first), decays.rows, everywhere(decays.start, block), m, k)
        if first:
            earlier = below(met, (block - 1) * k)
            multiply(below(scores, first), decays.rows, earlier, m, first, k, real(like, 1), real(like, 0), full)
        multiply_block(scores, x, keys, first, first + m, n, k, decays, late, like)


@inner
def multiply_block(scores, x, keys, first, last, n, k, decays, late, like):
    """Products of the pairs of one block: each key decays step by step and meets the left factors on its way."""
    apart()
    m, met, room, steps = last - first - late, row(decays.met, 0), row(decays.room, 0), below(decays.step, first)
    if late:
        fill(move(row(scores, first), first), real(like, 0), min(ROWS, n - first))
    if m > 0:
        asking, known = below(x, first + late), below(keys, first)
        meet(met, asking.data, known.data, steps.data, steps.step, room, m, k)  # panels of one width have one step
        write_block(move(row(scores, first + late), first), scores.step, met, m, n - first)


class Block(Vectors):
    """A block in code, FOUR rows after FOUR: left factors, keys and decays, rows from m on repeating the last one.

    Few loops of many terms: written out for every key, they would be read from memory more slowly than they run.
    Vector v of what is kept stands in ``room``, KEPT vectors for each: left factors and the decay over them, see LEFT
    and OVER, and from PAST on the keys of the block, decayed as far as it has come.
    """

    LEFT, OVER, PAST = 0, FOUR, FOUR + 1

    def __init__(self, builder: Any, like: Any, room: Any, met: Any, k: Any) -> None:
        super().__init__(builder, like)
        self.room, self.met = room, met
        self.vectors = self.holding(k)

    def each(self) -> Any:
        """A loop over the vectors of a row."""
        return cgutils.for_range(self.builder, self.vectors, intp=ir.IntType(64))

    def place(self, v: Any, i: Any) -> Any:
        """Of number i of what is kept for vector v."""
        word = ir.IntType(64)
        return self.builder.add(self.builder.mul(v, word(KEPT)), word(i) if isinstance(i, int) else i)

    def near(self, x: list[Any], keys: list[Any], steps: list[Any], first: Any) -> list[Any]:
        """Sums, place by place, of four keys decayed step by step up to each of four rows times that row."""
        totals = {(i, j): self.totals(1)[0] for i in range(FOUR) for j in range(i + 1)}
        with self.each() as loop:
            ways, since, v = [], self.constant(1.0), loop.index
            for i in range(FOUR):
                left, step = self.load(x[i], v), self.load(steps[i], v)
                ways = [self.multiply(way, step) for way in ways] + [self.load(keys[i], v)]
                for j, way in enumerate(ways):
                    self.accumulate(totals[i, j], way, left)
                since = self.multiply(since, step)
                self.store(self.multiply(since, left), self.room, self.place(v, self.LEFT + i))
            self.store(since, self.room, self.place(v, self.OVER))
            for j, way in enumerate(ways):
                self.store(way, self.room, self.place(v, in_fours(self.builder, first, self.PAST + j)))
        zero = self.constant(0.0)
        return [self.builder.load(totals[i, j]) if j <= i else zero for i in range(FOUR) for j in range(FOUR)]

    def far(self, first: Any) -> list[Any]:
        """The same of some earlier keys, from ``first`` on, at the start of the four rows; they go to the end."""
        totals = [self.totals(FAR) for _ in range(FOUR)]
        with self.each() as loop:
            v = loop.index
            places = [self.place(v, self.builder.add(first, ir.IntType(64)(self.PAST + j))) for j in range(FAR)]
            keys = [self.load(self.room, place) for place in places]
            for i, line in enumerate(totals):
                left = self.load(self.room, self.place(v, self.LEFT + i))
                for total, key in zip(line, keys, strict=True):
                    self.accumulate(total, key, left)
            over = self.load(self.room, self.place(v, self.OVER))
            for place, key in zip(places, keys, strict=True):
                self.store(self.multiply(key, over), self.room, place)
        return [self.builder.load(total) for line in totals for total in line]

    def give(self, sums: list[Any], row: Any, column: Any) -> None:
        """Write the numbers that are sums of vectors: four rows of them, from a row and a column on."""
        builder, word, wide = self.builder, ir.IntType(64), len(sums) // FOUR
        kind = ir.VectorType(self.number, wide).as_pointer()
        for start in range(0, len(sums), self.count):
            numbers = self.sums_across(sums[start : start + self.count])
            for i in range(0, self.count, wide):
                line = builder.add(row, word((start + i) // wide))
                place = builder.gep(self.met, [builder.add(builder.mul(line, word(BLOCK)), column)])
                part = self.shuffle(numbers, numbers, list(range(i, i + wide)))
                builder.store(part, builder.bitcast(place, kind), align=self.bits // 8)


@intrinsic
def meet(typingctx, met, x, keys, steps, step, room, m, k):
    """met[i, j] = x_i . (key j times the decays of the steps after j up to i), for j <= i < m; above it zeros.

    Pairs of the same four rows meet step by step, others at the start of the four of the later one. The rows of x,
    keys and steps are ``step`` apart, those of met BLOCK; for ``room`` see ``Block``.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        met, *bases, step, room, m, k = args
        block, word = Block(builder, signature.args[0].dtype, room, met, k), ir.IntType(64)
        with cgutils.for_range(builder, ceil_div(builder, m, FOUR), intp=word) as loop:
            at = [in_fours(builder, loop.index, i) for i in range(FOUR)]
            rows = [[row_of(builder, base, i, m, step) for i in at] for base in bases]
            block.give(block.near(*rows, loop.index), at[0], at[0])
            with cgutils.for_range_slice(builder, word(0), at[0], word(FAR), intp=word) as (first, _):
                block.give(block.far(first), at[0], first)
        return context.get_dummy_value()

    return types.void(met, met, met, met, types.intp, met, types.intp, types.intp), codegen


@intrinsic
def write_block(typingctx, scores, step, met, rows, columns):
    """Some rows of ``met`` into scores, behind them zeros: as many columns as scores have, up to two blocks of them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, step, met, rows, columns = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        wanted = vectors.holding(columns)
        with cgutils.for_range(builder, rows, intp=word) as i:
            line, source = (builder.gep(x, [builder.mul(i.index, n)]) for x, n in ((scores, step), (met, word(BLOCK))))
            for j in range(2 * BLOCK // vectors.count):
                with builder.if_then(builder.icmp_signed("<", word(j), wanted)):
                    there = j < BLOCK // vectors.count
                    vectors.store(vectors.load(source, j) if there else vectors.constant(0.0), line, j)
        return context.get_dummy_value()

    return types.void(scores, types.intp, scores, types.intp, types.intp), codegen
