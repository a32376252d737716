"""What one query makes of its past, 32 pairs at a time: a warp has the query, and each lane weighs a pair for it."""

from __future__ import annotations

from math import exp, inf, sqrt

from numba import float64, int64

from ttr_np.solvers._chunks import NO_PAST

from .._attention import EXPONENTIAL, WARP
from ._launch import cuda
from ._pairs import count_of, first_steps, log_kernel, number, origin, product, sees

__all__ = ["gather", "place", "root_of", "sight", "top_of", "weigh"]


@cuda.jit(device=True)
def place(inner, groups, blocks, parts):
    """Memory [outer, inner], step, sequence and part of the columns of this block; the longest pasts come first."""
    memory, block = cuda.blockIdx.x // blocks, blocks - 1 - cuda.blockIdx.x % blocks
    row = block // parts
    return memory // inner, memory % inner, row // groups, row % groups, block % parts


@cuda.jit(device=True)
def sight(count, tokens, step, cached, pairs, causal, window):
    """The newest and the oldest tile to look at; the newest pair that is seen, and the first place in the window."""
    last = cached + step if causal else pairs - 1
    if not window:
        return last // WARP, int64(0), last, int64(0)
    oldest = count_of(count, step) - window
    begin = first_steps(count, tokens, oldest)
    begin += cached if begin else 0  # all cached pairs are looked at: there are few where there is a window
    return last // WARP, begin // WARP, last, oldest


@cuda.jit(device=True)
def top_of(x):
    """The largest number of all lanes; NaN is none."""
    distance = 1
    while distance < WARP:
        other = cuda.shfl_xor_sync(0xFFFFFFFF, x, distance)
        x = other if other > x or x != x else x
        distance *= 2
    return x


@cuda.jit(device=True)
def age(gate, lane):
    """The sum of the gates of later lanes, and that of all: sums of neighbours, of pairs of them, and so on."""
    after, total, distance = 0.0, gate, 1
    while distance < WARP:
        other = cuda.shfl_xor_sync(0xFFFFFFFF, total, distance)
        after += 0.0 if lane & distance else other
        total += other
        distance *= 2
    return after, total


@cuda.jit(device=True)
def weigh(code, query, k, position, left, log_decay, pair, last, oldest, cached, since, width):
    """Logit of this lane's pair, and the sum of the gates that are newer than the next tile; call it in all lanes."""
    gate = 0.0
    if log_decay.size and cached <= pair and pair <= last and not since < NO_PAST / 2:
        gate = float64(log_decay[pair - cached])
        gate = NO_PAST if gate < NO_PAST else gate
    after, total = age(gate, cuda.threadIdx.x)
    bias = since + after
    if pair < cached:
        bias += float64(left[pair])
    if bias < NO_PAST / 2 or not sees(position, pair, last, oldest, 0):
        return -inf, since + total
    x = 0.0
    for c in range(k.shape[1]):
        x += product(code, query[c], float64(k[pair, c]) - (origin(k[0, c]) if code == EXPONENTIAL else 0.0))
    return log_kernel(code, x, width) + bias, since + total


@cuda.jit(device=True)
def gather(mean, offset, x, start, columns, low, weights, kept):
    """Add the weighted numbers of 32 pairs to a mean; lanes share columns. What is not seen has a weight below 0."""
    for c in range(cuda.threadIdx.x, columns, WARP):
        total = 0.0
        for j in range(WARP):
            if not weights[j] < 0 and low + c < x.shape[1]:
                total += weights[j] * float64(number(x[start + j, low + c]))
        mean[offset + c] = kept * mean[offset + c] + total


@cuda.jit(device=True)
def root_of(x, top, weight):
    """Square root of a pair's share of the weight."""
    if x == -inf:
        return 0.0
    root = exp((x - top) / 2)
    return root if weight <= 0 else root / sqrt(weight)
