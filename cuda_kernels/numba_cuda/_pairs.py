"""Pairs of keys and values as kernels look at them: which of them a query sees, and what the gates have left of each.

A block has ``TILE`` rows (queries, see ``cuda_kernels._attention``) and takes in as many pairs at a time; thread
(row, lane) weighs one pair for one row. Gates are added up newest first and in double precision: numbers of one sign,
so that no gate, however strong, costs the mild ones after it a digit.
"""

from __future__ import annotations

from math import inf, log, sqrt

import numpy as np
from numba import float64, int64

from ttr_np.solvers._chunks import NO_PAST

from .._attention import EXPONENTIAL, NAMES, Pairs
from .._calls import Arrays, Grid
from .._sequences import Sequences
from ._launch import cuda

__all__ = ["SLAB", "TILE", "aged", "arrays_of", "bias_of", "count_of", "first_steps", "grid", "log_kernel", "number"]
__all__ += ["origin", "over_row", "place", "product", "sees", "sight", "tiles", "top_of_row"]

GAUSSIAN, BOXCAR = NAMES.index("gaussian"), NAMES.index("boxcar")
TILE = 16
SLAB = 32  # channels of keys and queries that are staged at a time


def arrays_of(pairs: Pairs) -> Arrays:
    """For a launch. Places that are not given are an empty array of integers, so that a kernel compiles once."""
    none = np.empty_like(pairs.k, shape=(0,), dtype=np.int64)
    return {name: (none if x is None and name != "left" else x, own) for name, (x, own) in pairs.arrays.items()}


def grid(sequences: Sequences, tokens: int, width: int, columns: int) -> tuple[Grid, int]:
    """Blocks for all rows of a memory and for value columns, ``columns`` per thread; and how many share the rows."""
    rows, parts = -(-tokens * sequences.groups // TILE), max(-(-width // (TILE * columns)), 1)
    return Grid(rows * parts, TILE * TILE), parts


@cuda.jit(device=True)
def place(inner, blocks, parts):
    """The memory of this block, its first row and part of the columns, and its thread; the longest pasts come first."""
    memory, block = cuda.blockIdx.x // blocks, cuda.blockIdx.x % blocks
    first = (blocks - 1 - block) // parts * TILE
    return memory // inner, memory % inner, first, block % parts, cuda.threadIdx.x // TILE, cuda.threadIdx.x % TILE


@cuda.jit(device=True)
def count_of(count, step):
    """Pairs memorised up to and with a step."""
    return int64(count[step]) if count.size else int64(step + 1)


@cuda.jit(device=True)
def first_steps(count, tokens, number):
    """How many of the first steps have memorised no more than a number of pairs."""
    low, high = int64(0), int64(tokens)
    while low < high:
        middle = (low + high) // 2
        if count_of(count, middle) > number:
            high = middle
        else:
            low = middle + 1
    return low


@cuda.jit(device=True)
def tiles(count, groups, tokens, pairs, first, causal, window, sinks, cached):
    """The newest tile of a block, the first pair in its rows' windows, and the pair behind the sinks."""
    last = cached + min((first + TILE - 1) // groups, tokens - 1) if causal else pairs - 1
    begin = first_steps(count, tokens, count_of(count, first // groups) - window) if window else int64(0)
    begin += cached if begin else 0  # all cached pairs are looked at: there are few where there is a window
    return last // TILE, begin, cached + first_steps(count, tokens, sinks) if sinks else int64(0)


@cuda.jit(device=True)
def sight(count, step, tokens, pairs, causal, window, cached):
    """The newest pair that a query sees, -1 for none, and the first place in its window."""
    if step >= tokens:
        return int64(-1), int64(0)
    return cached + step if causal else pairs - 1, count_of(count, step) - window if window else int64(0)


@cuda.jit(device=True)
def sees(position, pair, last, oldest, sinks):
    """Whether a query that comes after pair ``last`` sees a pair: one in its window, from ``oldest`` on, or a sink."""
    if pair > last:
        return False
    where = int64(position[pair]) if position.size else int64(pair)
    return where >= 0 and (where >= oldest or where < sinks)


@cuda.jit(device=True)
def gates_between(log_decay, low, high):
    """Sum of the gates of steps from low to below high."""
    total = float64(0)
    for step in range(max(low, 0), high):
        gate = float64(log_decay[step])
        total += NO_PAST if gate < NO_PAST else gate
    return total


@cuda.jit(device=True)
def aged(since, log_decay, start, last):
    """The sum of a row's gates with those of one more tile, which starts at a step; after a full reset it stays."""
    if log_decay.size == 0 or since < NO_PAST / 2:
        return since
    return since + gates_between(log_decay, start, min(start + TILE, last + 1))


@cuda.jit(device=True)
def bias_of(since, log_decay, left, pair, cached, start, last):
    """What joins the logit of a pair: the gates after it, in its tile and since; minus infinity if nothing is left."""
    total = since
    if log_decay.size and since >= NO_PAST / 2:
        total += gates_between(log_decay, pair + 1 - cached, min(start + TILE, last + 1) - cached)
    if pair < cached:
        total += float64(left[pair])
    return -inf if total < NO_PAST / 2 else total


@cuda.jit(device=True)
def number(x):
    """A number, or NaN where it is not finite."""
    return x if x - x == 0 else x - x


@cuda.jit(device=True)
def origin(key):
    """What a channel of keys is measured from: the oldest, in the past of all queries. Zero if it is no number."""
    return float64(key) if key - key == 0 else 0.0


@cuda.jit(device=True)
def product(code, q, k):
    """A channel's part of a dot product, or of a squared distance."""
    if code <= EXPONENTIAL:
        return q * k
    return (q - k) * (q - k)


@cuda.jit(device=True)
def log_kernel(code, x, width):
    """Log of a kernel, of a dot product or a squared distance; ``width`` is the scale, or 1 / bandwidth."""
    if code <= EXPONENTIAL:
        return width * x
    if code == GAUSSIAN:
        return -x * (width * width) / 2
    u = sqrt(x) * width
    if not u <= 1:
        return u - u if code == BOXCAR and u - u != 0 or u != u else -inf
    inside = (1 - u) * (1 + u)
    if code == BOXCAR:
        return 0 * inside
    return (code - 1) * log(inside) if inside > 0 else -inf


@cuda.jit(device=True)
def over_row(x):
    """The sum over the lanes of a row."""
    distance = 1
    while distance < TILE:
        x += cuda.shfl_xor_sync(0xFFFFFFFF, x, distance)
        distance *= 2
    return x


@cuda.jit(device=True)
def top_of_row(x):
    """The largest number of the lanes of a row; NaN is none."""
    distance = 1
    while distance < TILE:
        other = cuda.shfl_xor_sync(0xFFFFFFFF, x, distance)
        x = other if other > x or x != x else x
        distance *= 2
    return x
