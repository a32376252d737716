"""Products of one chunk whose pairs decay with one gate per channel, for kernels.

A decay per pair and channel would be c^2 k numbers. So a chunk is cut into blocks of 16 tokens: a pair of one block
meets through the steps between, one by one; a pair of two blocks meets at the start of the later block, to which the
earlier key has been carried from block to block. Every factor is a product of gates, in [0, 1]: nothing is divided or
subtracted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ._compile import apart, inner
from ._gates import NO_PAST, exponentials
from ._panels import (
    ROWS,
    add_scaled,
    below,
    copy,
    dot,
    fill,
    full,
    load,
    load_transposed,
    move,
    multiply,
    panel,
    real,
    row,
    times,
)

__all__ = ["Channels", "carry_keys", "channel_decays", "channel_products", "channel_shapes", "channels_of", "meetings"]

BLOCK = 16


class Channels(NamedTuple):
    """Decays of a chunk of c tokens, and room for the products."""

    step: Any  # c x k: of each step
    since: Any  # c x k: from the start of its block over a token's own step
    until: Any  # c x k: from a token to the end of its block
    block: Any  # blocks x k: over a block
    start: Any  # (blocks + 1) x k: from the chunk's start to a block's start; the last one over the chunk
    rows: Any  # BLOCK x k: left factors at the start of their block
    way: Any  # 1 x k: a key on its way


def meetings(c: int) -> int:
    """Blocks of a chunk of c tokens at whose start earlier keys of the chunk are met, at least 1."""
    return max(1, -(-c // BLOCK) - 1)


def channel_shapes(c: int, k: int) -> list[tuple[int, int]]:
    """Shapes of the panels of ``Channels``."""
    blocks = -(-c // BLOCK)
    return [(c, k), (c, k), (c, k), (blocks, k), (blocks + 1, k), (BLOCK, k), (1, k)]


@inner
def channels_of(table, i, like):
    """The panels of ``Channels``, from the i-th of a table on."""
    return Channels(
        panel(table, i, like), panel(table, i + 1, like), panel(table, i + 2, like), panel(table, i + 3, like),
        panel(table, i + 4, like), panel(table, i + 5, like), panel(table, i + 6, like),
    )  # fmt: skip


@inner
def channel_decays(gates, low, n, k, decays, like):
    """Fill in the decays of the rows low to low + n of log decays."""
    apart()
    load(decays.step, gates, low, n, 0, k)
    one, zero, total = real(like, 1), real(like, 0), row(decays.way, 0)
    fill(total, zero, k)
    for first in range(0, n, BLOCK):
        last, block = min(first + BLOCK, n), first // BLOCK
        over, start = row(decays.block, block), row(decays.start, block)
        copy(start, total, k)
        exponentials(start, k)
        fill(over, zero, k)
        for i in range(first, last):
            at_least(row(decays.step, i), real(like, NO_PAST), k)
            add_scaled(over, one, row(decays.step, i), k)
            exponentials(row(decays.step, i), k)
        add_scaled(total, one, over, k)
        exponentials(over, k)
        copy(row(decays.since, first), row(decays.step, first), k)
        for i in range(first + 1, last):
            times(row(decays.since, i), row(decays.since, i - 1), row(decays.step, i), k)
        fill(row(decays.until, last - 1), one, k)
        for i in range(last - 2, first - 1, -1):
            times(row(decays.until, i), row(decays.until, i + 1), row(decays.step, i + 1), k)
    start = row(decays.start, (n + BLOCK - 1) // BLOCK)
    copy(start, total, k)
    exponentials(start, k)


@inner
def at_least(y, least, n):
    """y = max(y, least)."""
    apart()
    for j in range(n):
        y[j] = max(y[j], least)


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
        for j in range(first):
            times(row(carried, j), row(carried, j), row(decays.block, block), k)
        for j in range(first, min(first + BLOCK, n)):
            times(row(carried, j), row(keys, j), row(decays.until, j), k)


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
        for i in range(first, first + m):
            if late and i == first:
                copy(row(decays.rows, 0), row(x, i), k)
            else:
                times(row(decays.rows, i - first), row(x, i), row(decays.since, i - late), k)
            times(row(past, i), row(decays.rows, i - first), row(decays.start, block), k)
        if first:
            earlier = below(met, (block - 1) * k)
            multiply(below(scores, first), decays.rows, earlier, m, first, k, real(like, 1), real(like, 0), full)
        multiply_block(scores, x, keys, first, first + m, n, k, decays, late, like)


@inner
def multiply_block(scores, x, keys, first, last, n, k, decays, late, like):
    """Products of the pairs of one block: each key decays step by step and meets the left factors on its way."""
    apart()
    way = row(decays.way, 0)
    for j in range(first, last):
        copy(way, row(keys, j), k)
        if j + late < last:
            row(scores, j + late)[j] = dot(way, row(x, j + late), k, like)
        for i in range(j + late + 1, last):
            row(scores, i)[j] = decay_and_dot(way, row(decays.step, i - late), row(x, i), k, like)
    for i in range(first, last):
        end = i + 1 - late
        fill(move(row(scores, i), end), real(like, 0), min(i + ROWS, n) - end)


@inner
def decay_and_dot(y, decay, x, n, like):
    """y = decay y, and the new y . x."""
    apart()
    total = real(like, 0)
    for j in range(n):
        moved = y[j] * decay[j]
        y[j] = moved
        total += moved * x[j]
    return total
