"""Decays of one chunk for kernels.

Each is the exponential of a sum of gates, never of a difference: one gate of -1e4 must not cost the mild ones after it
a digit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ._compile import apart, inner
from ._panels import ROWS, lanes, move, real, row
from ._powers import LN2, LOG2E, RANGE, TAYLOR, exponential
from ._vectors import Vectors, smaller

__all__ = ["exp", "exponentials", "split_exponentials", "step_decays", "weigh"]

(LEAST64, MOST64), (HIGH64, LOW64), TAYLOR64 = RANGE[64], LN2[64], TAYLOR[64]
(LEAST32, MOST32), (HIGH32, LOW32), TAYLOR32 = (tuple(map(np.float32, x[32])) for x in (RANGE, LN2, TAYLOR))


def exp(x: Any) -> Any:
    """e^x without a branch or a call, so that loops over it use the whole width of the machine; two roundings.

    x = n ln 2 + r: 2^n is written into the exponent of a number, e^r is its Taylor series. ln 2 is subtracted in two
    parts, the first of so few digits that n times it is exact.
    """
    raise NotImplementedError("for compiled code only")


def exp32(x):
    y = LEAST32 if x < LEAST32 else (min(x, MOST32))
    n = np.floor(y * np.float32(LOG2E) + np.float32(0.5))
    r = (y - n * HIGH32) - n * LOW32
    series = TAYLOR32[0]
    for term in TAYLOR32[1:]:
        series = series * r + term
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if x < LEAST32 else (np.float32(np.inf) if x > MOST32 else series * power)


def exp64(x):
    y = LEAST64 if x < LEAST64 else (min(x, MOST64))
    n = np.floor(y * LOG2E + 0.5)
    r = (y - n * HIGH64) - n * LOW64
    series = TAYLOR64[0]
    for term in TAYLOR64[1:]:
        series = series * r + term
    power = np.int64((np.int64(n) + 1023) << 52).view(np.float64)
    return 0.0 if x < LEAST64 else (np.inf if x > MOST64 else series * power)


overload(exp)(lambda x: exp32 if x == types.float32 else exp64)


@inner
def exponentials(x, n):
    """x = e^x."""
    apart()
    for j in range(n):
        x[j] = exp(x[j])


@inner
def split_exponentials(x, rests, n):
    """x = e^x, and what its rounding left out: a slow decay rounded is another one, thousands of tokens later."""
    apart()
    for j in range(n):
        exact = exp(np.float64(x[j]))
        x[j] = real(x[j], exact)
        rests[j] = real(x[j], exact - x[j])


@intrinsic
def pair_decays(typingctx, pairs, step, gates, n):
    """Row i, column j < i: e to the sum of the gates from j + 1 to i; from column i to the end of its vector, ones."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs, step, gates, n = args
        row, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        with cgutils.for_range(builder, row.holding(n), intp=word) as block:
            (total,), first = row.totals(1), row.start(block.index)
            with cgutils.for_range_slice(builder, first, n, word(1), intp=word) as (i, _):
                gate = row.everywhere(builder.load(builder.gep(gates, [i])))
                past, here = builder.fadd(builder.load(total), gate), row.before(builder.sub(i, first))
                past = builder.select(here, past, row.constant(0.0))
                builder.store(past, total)
                row.store(exponential(row, past), builder.gep(pairs, [builder.mul(i, step)]), block.index)
        return context.get_dummy_value()

    return types.void(pairs, types.intp, pairs, types.intp), codegen


def weigh_of(scores: Any, gated: bool) -> Any:
    """Rows of scores with zeros from their ends on, as far as products read; with gates times the row of decays."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, step, pairs, pairs_step, n, late = args
        row, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        with cgutils.for_range(builder, n, intp=word) as loop:
            end = builder.sub(builder.add(loop.index, word(1)), late)
            line = builder.gep(scores, [builder.mul(loop.index, step)])
            first = builder.icmp_signed("<", loop.index, late)  # it keeps no score
            place = builder.select(first, word(0), builder.sub(loop.index, late))
            decays = builder.gep(pairs, [builder.mul(place, pairs_step)])
            read = row.holding(smaller(builder, builder.add(loop.index, word(ROWS)), n))
            with cgutils.for_range(builder, read, intp=word) as v:
                x, here = row.load(line, v.index), row.before(builder.sub(end, row.start(v.index)))
                x = builder.fmul(x, row.load(decays, v.index)) if gated else x
                row.store(builder.select(here, x, row.constant(0.0)), line, v.index)
        return context.get_dummy_value()

    return types.void(scores, types.intp, scores, types.intp, types.intp, types.intp), codegen


@intrinsic
def weigh_gated(typingctx, scores, step, pairs, pairs_step, n, late):
    """Scores times decays."""
    return weigh_of(scores, True)


@intrinsic
def weigh_plain(typingctx, scores, step, pairs, pairs_step, n, late):
    """Scores without gates."""
    return weigh_of(scores, False)


@inner
def step_decays(gates, low, n, pairs, since, like):
    """Decays of n tokens with one gate per step.

    Parameters
    ----------
    gates
        Log decays; those of the rows low to low + n are taken.
    pairs
        Panel: what is left at i of what was stored at j <= i. Its last row leads to the chunk's end.
    since
        Row: what is left of the chunk's start at i - 1, and so 1 at i = 0; the n-th leads to the chunk's end.
    """
    apart()
    total, size = real(like, 0), lanes(like)
    for i in range(n):
        since[i + 1] = row(gates, low + i)[0]
    pair_decays(pairs.data, pairs.step, move(since, 1), n)
    since[0] = total
    for i in range(n):
        total += since[i + 1]
        since[i + 1] = total
    exponentials(since, (n + size) // size * size)  # whole vectors: what stands behind the last number is never read


@inner
def weigh(scores, pairs, n, gated, late, like):
    """Multiply scores by the decays between their tokens, with zeros above the diagonal as far as products read.

    With ``late`` an answer reads the state before its own step: the diagonal is left out, decays end one step earlier.
    """
    apart()
    if gated:
        weigh_gated(scores.data, scores.step, pairs.data, pairs.step, n, late)
    else:
        weigh_plain(scores.data, scores.step, pairs.data, pairs.step, n, late)
