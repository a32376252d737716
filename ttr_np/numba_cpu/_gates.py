"""Decays of one chunk for kernels.

Each is the exponential of a sum of gates, never of a difference: one gate of -1e4 must not cost the mild ones after it
a digit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ._compile import apart, inner
from ._panels import ROWS, fill, lanes, move, real, row, times

__all__ = ["exp", "exponentials", "split_exponentials", "step_decays", "weigh"]

NO_PAST = -1e30  # stands for log 0: sums of it stay numbers, and its exponential is 0

TAYLOR = tuple(1.0 / math.factorial(n) for n in range(13, -1, -1))  # highest power first
TAYLOR32 = tuple(np.float32(x) for x in TAYLOR[6:])
LOG2E = 1.0 / math.log(2.0)


def exp(x: Any) -> Any:
    """e^x without a branch or a call, so that loops over it use the whole width of the machine; two roundings.

    x = n ln 2 + r: 2^n is written into the exponent of a number, e^r is its Taylor series. ln 2 is subtracted in two
    parts, the first of so few digits that n times it is exact.
    """
    raise NotImplementedError("for compiled code only")


def exp32(x):
    low, high = np.float32(-87.0), np.float32(88.0)
    y = low if x < low else (min(x, high))
    n = np.floor(y * np.float32(LOG2E) + np.float32(0.5))
    r = (y - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    series = TAYLOR32[0]
    for term in TAYLOR32[1:]:
        series = series * r + term
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if x < low else (np.float32(np.inf) if x > high else series * power)


def exp64(x):
    y = -708.0 if x < -708.0 else (min(x, 709.0))
    n = np.floor(y * LOG2E + 0.5)
    r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    series = TAYLOR[0]
    for term in TAYLOR[1:]:
        series = series * r + term
    power = np.int64((np.int64(n) + 1023) << 52).view(np.float64)
    return 0.0 if x < -708.0 else (np.inf if x > 709.0 else series * power)


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


@inner
def added(y, x, number, n):
    """y = x + number."""
    apart()
    for j in range(n):
        y[j] = x[j] + number


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
    total = real(like, 0)
    since[0] = total
    for i in range(n):
        gate = max(row(gates, low + i)[0], real(like, NO_PAST))
        total += gate
        since[i + 1] = total
        added(row(pairs, i), row(pairs, i - 1), gate, i)
        row(pairs, i)[i] = real(like, 0)
    size = lanes(like)  # of whole vectors; what stands behind the last number is never read
    for i in range(n):
        exponentials(row(pairs, i), (i + size) // size * size)
    exponentials(since, (n + size) // size * size)


@inner
def weigh(scores, pairs, n, gated, late, like):
    """Multiply scores by the decays between their tokens, with zeros above the diagonal as far as products read.

    With ``late`` an answer reads the state before its own step: the diagonal is left out, decays end one step earlier.
    """
    apart()
    for i in range(n):
        line, end = row(scores, i), i + 1 - late
        if gated:
            times(line, line, row(pairs, end - 1), end)
        fill(move(line, end), real(like, 0), min(i + ROWS, n) - end)
