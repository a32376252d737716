"""Products of one chunk whose pairs decay with one gate per channel, for kernels.

A decay per pair and channel would be c^2 k numbers. So a chunk is cut into blocks of 16 tokens: a pair of one block
meets through the steps between, one by one; a pair of two blocks meets at the start of the later block, to which the
earlier key has been carried from block to block. Every factor is a product of gates, in [0, 1]: nothing is divided or
subtracted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._compile import apart, inner
from ._gates import NO_PAST, exp, exponentials
from ._panels import (
    ROWS,
    Matrix,
    add_scaled,
    below,
    copy,
    fill,
    full,
    gather,
    load_transposed,
    move,
    multiply,
    panel,
    real,
    row,
    times_rows,
)
from ._vectors import Vectors, row_of

__all__ = [
    "Channels",
    "carry_keys",
    "channel_decays",
    "channel_products",
    "channel_shapes",
    "channels_of",
    "forgets",
    "meetings",
]

BLOCK = 16


class Channels(NamedTuple):
    """Decays of a chunk of c tokens, and room for the products."""

    step: Any  # c x k: of each step
    since: Any  # c x k: from the start of its block over a token's own step
    until: Any  # c x k: from a token to the end of its block
    block: Any  # blocks x k: over a block
    start: Any  # (blocks + 1) x k: from the chunk's start to a block's start; the last one over the chunk
    rows: Any  # BLOCK x k: left factors at the start of their block
    total: Any  # 1 x k: log decays since the chunk's start
    met: Any  # BLOCK x BLOCK: products of one block, keys by rows


def meetings(c: int) -> int:
    """Blocks of a chunk of c tokens at whose start earlier keys of the chunk are met, at least 1."""
    return max(1, -(-c // BLOCK) - 1)


def channel_shapes(c: int, k: int) -> list[tuple[int, int]]:
    """Shapes of the panels of ``Channels``."""
    blocks = -(-c // BLOCK)
    return [(c, k), (c, k), (c, k), (blocks, k), (blocks + 1, k), (BLOCK, k), (1, k), (BLOCK, BLOCK)]


@inner
def channels_of(table, i, like):
    """The panels of ``Channels``, from the i-th of a table on."""
    return Channels(
        panel(table, i, like), panel(table, i + 1, like), panel(table, i + 2, like), panel(table, i + 3, like),
        panel(table, i + 4, like), panel(table, i + 5, like), panel(table, i + 6, like), panel(table, i + 7, like),
    )  # fmt: skip


@inner
def channel_decays(gates, low, n, k, decays, like):
    """Fill in the decays of the rows low to low + n of log decays."""
    apart()
    one, zero, total = real(like, 1), real(like, 0), row(decays.total, 0)
    fill(total, zero, k)
    for first in range(0, n, BLOCK):
        last, block = min(first + BLOCK, n), first // BLOCK
        over, start, before = row(decays.block, block), row(decays.start, block), row(decays.until, last - 1)
        copy(start, total, k)
        exponentials(start, k)
        fill(over, zero, k)
        fill(before, one, k)
        for i in range(first, last):
            step, gate = row(decays.step, i), row(gates, low + i)
            if gates.column != 1:
                gather(step, gate, gates.column, k)
                gate = step
            decay_row(step, row(decays.since, i), before, over, gate, k)
            before = row(decays.since, i)
        add_scaled(total, one, over, k)
        exponentials(over, k)
        until = upwards(decays.until, last - 1)
        times_rows(below(until, 1), until, upwards(decays.step, last - 1), last - 1 - first, k)
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


@inner
def decay_row(step, since, before, over, gate, n):
    """Decays of one step, those since the start of its block, and its log decays added to those of the block."""
    apart()
    for j in range(n):
        log = max(gate[j], real(gate[j], NO_PAST))
        over[j] += log
        decay = exp(log)
        step[j] = decay
        since[j] = before[j] * decay


@inner
def upwards(x, i):
    """The rows of a panel from one on, backwards."""
    return Matrix(row(x, i), -x.step, x.column)


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
    m, met, steps = last - first - late, decays.met, below(decays.step, first)
    if m > 0:
        asking, known = below(x, first + late), below(keys, first)
        meet(met.data, met.step, asking.data, asking.step, known.data, known.step, steps.data, steps.step, m, k)
    for i in range(first, last):
        line, end = row(scores, i), i + 1 - late
        for j in range(first, end):
            line[j] = row(met, j - first)[i - late - first]
        fill(move(line, end), real(like, 0), min(i + ROWS, n) - end)


class Block(Vectors):
    """Rows of a block in code: left factors, keys, decays; those from m on repeat the last one."""

    def __init__(self, builder: Any, like: Any, m: Any, *rows: tuple[Any, Any]) -> None:
        super().__init__(builder, like)
        places = [[row_of(builder, base, i, m, step) for i in range(BLOCK)] for base, step in rows]
        self.x, self.keys, self.steps = places

    def products(self, j: int, vectors: Any) -> list[Any]:
        """Sums, place by place, of key j decayed up to each row times that row; zero before it."""
        totals = self.totals(BLOCK)
        with cgutils.for_range(self.builder, vectors, intp=ir.IntType(64)) as loop:
            way = self.load(self.keys[j], loop.index)
            for i in range(j, BLOCK):
                way = self.builder.fmul(way, self.load(self.steps[i], loop.index)) if i > j else way
                self.accumulate(totals[i], way, self.load(self.x[i], loop.index))
        return [self.builder.load(total) for total in totals]


@intrinsic
def meet(typingctx, met, met_step, x, x_step, keys, keys_step, steps, steps_step, m, k):
    """met[j, i] = x_i . (key j times the decays of the steps after j up to i), for j <= i < m <= BLOCK."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        met, met_step, x, x_step, keys, keys_step, steps, steps_step, m, k = args
        block = Block(builder, signature.args[0].dtype, m, (x, x_step), (keys, keys_step), (steps, steps_step))
        word, count = ir.IntType(64), block.count
        vectors = builder.udiv(builder.add(k, word(count - 1)), word(count))
        for j in range(BLOCK):
            sums, line = block.products(j, vectors), builder.gep(met, [builder.mul(word(j), met_step)])
            for i in range(j // count * count, BLOCK, count):
                block.store_to(block.sums_across(sums[i : i + count]), line, word(i))
        return context.get_dummy_value()

    word = types.intp
    return types.void(met, word, met, word, met, word, met, word, word, word), codegen
