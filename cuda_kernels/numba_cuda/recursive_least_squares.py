"""Recursive least squares on the GPU, token by token: the chain of covariances, then the solution.

    a = R^T k_t,  s = g_t + |a|^2,    gain_t = R a / s,    R = (R - R a a^T / (s + sqrt(g_t s))) / sqrt(g_t)
    S = S + gain_t (v_t - S^T k_t)^T,    o_t = S^T q_t

R R^T = P, which nothing is subtracted from. S and R are in double precision whatever the data: they are rounded at
every token, and nothing forgets what is lost there. P does not depend on the values: one block per memory walks over
it and leaves the gains; then S is that of a delta rule. See ``ttr_np.solvers.recursive_least_squares`` for the caps
and the sources.
"""

from __future__ import annotations

from functools import partial
from math import exp, inf, nan, sqrt
from typing import Any

import numpy as np
from numba import float64

from ttr_np.notation import RecursiveLeastSquaresState
from ttr_np.solvers.recursive_least_squares import FAINTEST, LARGEST, SLACK, check_ridge, check_weights, limit, start

from .._calls import LONGEST, split
from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import few, refuse_covariance
from ._factors import cholesky, orthogonalise, over_block, over_warp, trace_of_inverse, transpose
from ._launch import cuda, empty, launch, run
from .delta_rule import kernel_for

__all__ = ["recursive_least_squares"]


def recursive_least_squares(
    q: Any, k: Any, v: Any, *, log_decay: Any = None, beta: Any = None, ridge: float = 1.0, **common: Any
) -> Any:
    """Recursive least squares; see ``ttr_np.recursive_least_squares``."""
    check_ridge(ridge)
    check_weights(q, log_decay, beta, common.get("mask"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    return run(core, "recursive_least_squares", arrays, start=partial(start, ridge), **common)


def core(
    q: Any, k: Any, v: Any, log_decay: Any, beta: Any, *, state: RecursiveLeastSquaresState
) -> tuple[Any, RecursiveLeastSquaresState]:
    """Two launches, with the state in double precision; a pair of weight zero is not even looked at."""
    (tokens, size), width, dtype = q.shape[-2:], v.shape[-1], state.S.dtype
    S, P = (x.astype(np.float64) for x in state)
    if beta is not None:
        k, v = (np.where(beta[..., None] == 0, x.dtype.type(0), x) for x in (k, v))
    gains = gains_of(k, log_decay, beta, P, dtype)
    sequences = Sequences(S.shape[:-2], np.broadcast_shapes(q.shape[:-2], S.shape[:-2]))
    o = empty(sequences, (tokens, width), dtype, q)
    one = np.broadcast_to(np.ones_like(S, shape=(1,)), (tokens,))
    arrays = {"q": (q, BOTH), "k": (gains, BOTH), "v": (v, BOTH), "beta": (one, ROW), "log_decay": (None, BOTH)}
    arrays |= {"erase_key": (k, BOTH), "S": (S, BOTH), "o": (o, BOTH)}
    rows, parts = split("k", size)
    solution = kernel_for(size, rows, parts, float64)
    launch(solution, sequences, arrays, ("S", "o"), tokens, width, parts, np.float64(1))
    return o, RecursiveLeastSquaresState(S.astype(dtype), P.astype(dtype))


def gains_of(k: Any, log_decay: Any, beta: Any, P: Any, dtype: Any) -> Any:
    """The gains of all tokens; P becomes that of the last one. ``dtype`` is that of the caller's P."""
    lead, (tokens, size) = P.shape[:-2], k.shape[-2:]
    split("k", size)  # refuses what the second launch could not hold
    sequences, original = Sequences(lead, lead), P.copy()
    gains, bad = empty(sequences, (tokens, size), P.dtype, P), np.zeros_like(P, shape=(*lead, 1), dtype=bool)
    root, scratch = (empty(sequences, (size, size), P.dtype, P) for _ in range(2))
    arrays = {"k": (k, BOTH), "log_decay": (log_decay, ROW), "beta": (beta, ROW), "P": (P, BOTH), "root": (root, BOTH)}
    arrays |= {"scratch": (scratch, BOTH), "gains": (gains, BOTH), "bad": (bad, COLUMN)}
    numbers, written = (np.float64(limit(dtype)), np.float64(np.finfo(dtype).eps)), tuple(arrays)[3:]
    launch(chain, sequences, arrays, written, tokens, few(size), 1, *numbers)
    refuse_covariance(bad, original.astype(dtype))
    return gains


@cuda.jit(device=True)
def spread(R, parts):
    """Mean eigenvalue of R R^T."""
    total = float64(0)
    for i in range(R.shape[0]):
        for j in range(cuda.threadIdx.x, R.shape[0], cuda.blockDim.x):
            total += float64(R[i, j]) * R[i, j]
    return over_block(total, parts) / R.shape[0]


@cuda.jit(device=True)
def finite(P, parts):
    """Whether it holds no bad number."""
    total = float64(0)
    for i in range(P.shape[0]):
        for j in range(cuda.threadIdx.x, P.shape[0], cuda.blockDim.x):
            total += P[i, j] - P[i, j]
    return over_block(total, parts) == 0


@cuda.jit(device=True)
def cap(R, X, largest, ratio, values, parts):
    """Orthogonal columns for R, no eigenvalue of R R^T above ``largest`` or ``ratio`` times the smallest."""
    transpose(R, X)
    orthogonalise(X, 2.0**-50, parts)
    for i in range(cuda.threadIdx.x // 32, X.shape[0], cuda.blockDim.x // 32):
        value = float64(0)
        for j in range(cuda.threadIdx.x % 32, X.shape[0], 32):
            value += float64(X[i, j]) * X[i, j]
        value = over_warp(value)
        if cuda.threadIdx.x % 32 == 0:
            values[i] = value
    cuda.syncthreads()  # the smallest is among them
    smallest = values[0]
    for i in range(1, X.shape[0]):
        smallest = min(smallest, values[i])
    largest = min(largest, ratio * smallest)
    for i in range(X.shape[0]):
        if values[i] > largest:
            for j in range(cuda.threadIdx.x, X.shape[0], cuda.blockDim.x):
                X[i, j] *= sqrt(largest / values[i])
    transpose(X, R)


@cuda.jit(device=True)
def store(P, R, X, parts):
    """P = R R^T, exactly symmetric, and its norm."""
    norm = float64(0)
    transpose(R, X)
    for j in range(cuda.threadIdx.x, R.shape[0], cuda.blockDim.x):
        for i in range(j + 1):
            total = float64(0)
            for m in range(R.shape[0]):
                total += float64(X[m, i]) * X[m, j]
            P[i, j] = P[j, i] = total
            norm += total * total * (2 if i < j else 1)
    return sqrt(over_block(norm, parts))


@cuda.jit(device=True)
def load(R, P, eps, sizes, gaps):
    """The lower triangle of P into R; False if P is not symmetric up to rounding."""
    size, gap = float64(0), float64(0)
    for j in range(cuda.threadIdx.x, P.shape[0], cuda.blockDim.x):
        for i in range(P.shape[0]):
            R[i, j] = P[i, j] if j <= i else float64(0)
            size = max(size, abs(P[i, j]))
            gap = max(gap, abs(P[i, j] - P[j, i]))
    sizes[cuda.threadIdx.x], gaps[cuda.threadIdx.x] = size, gap
    cuda.syncthreads()  # the largest is among them
    for i in range(cuda.blockDim.x):
        size, gap = max(size, sizes[i]), max(gap, gaps[i])
    return gap <= 1000 * eps * size


@cuda.jit(device=True)
def learn(R, key, a, shift, gain, decay, root, parts):
    """One pair, and one decay before it."""
    length = float64(0)
    for j in range(cuda.threadIdx.x, R.shape[0], cuda.blockDim.x):
        total = float64(0)
        for p in range(R.shape[0]):
            total += R[p, j] * key[p]
        a[j] = total
        length += total * total
    s = decay + over_block(length, parts)  # and all of a is there
    for p in range(cuda.threadIdx.x, R.shape[0], cuda.blockDim.x):
        total = float64(0)
        for j in range(R.shape[0]):
            total += R[p, j] * a[j]
        gain[p] = root * total / s
        shift[p] = total / (s + sqrt(decay * s))
    cuda.syncthreads()  # the shift is there, and nobody reads R along its rows any more
    for j in range(cuda.threadIdx.x, R.shape[0], cuda.blockDim.x):
        for p in range(R.shape[0]):
            R[p, j] = (R[p, j] - shift[p] * a[j]) / sqrt(decay)


def chain(k, log_decay, beta, P, root, scratch, gains, bad, limit, eps, blocks):
    """The kernel: a block has one memory."""
    key = cuda.shared.array(LONGEST, float64)
    a = cuda.shared.array(LONGEST, float64)
    shift = cuda.shared.array(LONGEST, float64)
    values = cuda.shared.array(LONGEST, float64)
    parts = cuda.shared.array(32, float64)
    b, h = cuda.blockIdx.x // k.shape[1], cuda.blockIdx.x % k.shape[1]
    R, X, size = root[b, h, 0], scratch[b, h, 0], k.shape[4]
    whole, even = finite(P[b, h, 0], parts), load(R, P[b, h, 0], eps, a, shift)
    if whole and not (even and cholesky(R)):
        if cuda.threadIdx.x == 0:
            bad[b, h, 0, 0] = True
        return
    information, moved = inf, not whole
    if whole:
        information = trace_of_inverse(R, X, parts)
    else:  # a bad number spoils the whole memory
        for i in range(size):
            for j in range(cuda.threadIdx.x, size, cuda.blockDim.x):
                R[i, j] = nan
    mean = spread(R, parts)  # or a bound of it: without decay P shrinks
    for t in range(k.shape[3]):
        weight = sqrt(float64(beta[b, h, 0, t])) if beta.size else float64(1)
        decay = exp(max(float64(log_decay[b, h, 0, t]), FAINTEST)) if log_decay.size else float64(1)
        length = float64(0)
        for j in range(cuda.threadIdx.x, size, cuda.blockDim.x):
            key[j] = weight * k[b, h, 0, t, j]
            length += key[j] * key[j]
        energy = over_block(length, parts)  # and all of the key is there
        most = min(LARGEST, limit / max(energy, limit / LARGEST)) * decay
        if mean > SLACK * most:
            mean = spread(R, parts)
            if SLACK * most < mean < inf:
                cap(R, X, most, inf, values, parts)
                mean, information = spread(R, parts), inf
        learn(R, key, a, shift, gains[b, h, 0, t], decay, weight, parts)
        information = information * decay + energy
        mean /= decay
        moved = moved or decay != 1 or energy != 0
    if moved and not 2 * store(P[b, h, 0], R, X, parts) * information < limit:
        cap(R, X, inf, limit, values, parts)
        store(P[b, h, 0], R, X, parts)
