"""Recursive least squares on the GPU, token by token: the chain of covariances, then the solution.

    a = R^T k_t,  s = g_t + |a|^2,    gain_t = R a / s,    R = (R - R a a^T / (s + sqrt(g_t s))) / sqrt(g_t)
    S = S + gain_t (v_t - S^T k_t)^T,    o_t = S^T q_t

R R^T = P, which nothing is subtracted from. P does not depend on the values: one block per memory walks it and leaves
the gains; then S is that of a delta rule. See ``ttr_np.solvers.recursive_least_squares`` for the caps and the sources.
"""

from __future__ import annotations

from functools import cache, partial
from math import exp, inf, nan, sqrt
from typing import Any

import numpy as np
from numba import float64, from_dtype

from ttr_np.notation import RecursiveLeastSquaresState
from ttr_np.solvers.recursive_least_squares import FAINTEST, LARGEST, SLACK, check_ridge, check_weights, limit, start

from .._calls import LONGEST, split
from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import few, refuse_covariance
from . import delta_rule
from ._factors import cholesky, orthogonalise, over_block, over_warp, trace_of_inverse, transpose
from ._launch import cuda, empty, launch, run

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
    """Two launches; a pair of weight zero is not even looked at."""
    S, P = state
    if beta is not None:
        k, v = (np.where(beta[..., None] == 0, x.dtype.type(0), x) for x in (k, v))
    gains = gains_of(k, log_decay, beta, P)
    one = np.broadcast_to(np.ones_like(P, shape=()), k.shape[-2:-1])
    o, (S,) = delta_rule.core(q, gains, v, one, None, k, scale=1.0, state=delta_rule.DeltaRuleState(S))
    return o, RecursiveLeastSquaresState(S, P)


def gains_of(k: Any, log_decay: Any, beta: Any, P: Any) -> Any:
    """The gains of all tokens; P becomes that of the last one."""
    lead, (tokens, size) = P.shape[:-2], k.shape[-2:]
    split("k", size)  # refuses what the second launch could not hold
    sequences, original = Sequences(lead, lead), P.copy()
    gains, bad = empty(sequences, (tokens, size), P.dtype, P), np.zeros_like(P, shape=(*lead, 1), dtype=bool)
    root, scratch = (empty(sequences, (size, size), P.dtype, P) for _ in range(2))
    arrays = {"k": (k, BOTH), "log_decay": (log_decay, ROW), "beta": (beta, ROW), "P": (P, BOTH), "root": (root, BOTH)}
    arrays |= {"scratch": (scratch, BOTH), "gains": (gains, BOTH), "bad": (bad, COLUMN)}
    number = np.float64(limit(P.dtype))
    written = ("P", "root", "scratch", "gains", "bad")
    launch(chain_for(from_dtype(P.dtype)), sequences, arrays, written, tokens, few(size), 1, number)
    refuse_covariance(bad, original)
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
def cap(R, X, small, largest, ratio, values, parts):
    """Orthogonal columns for R, no eigenvalue of R R^T above ``largest`` or ``ratio`` times the smallest."""
    transpose(R, X)
    orthogonalise(X, small, parts)
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
    """P = R R^T, exactly symmetric, and its norm. Sums of many small numbers and a large one: in double precision."""
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


@cache
def chain_for(real: Any) -> Any:
    """The kernel: a block has one memory."""
    eps = 2.0 ** (-23 if real.bitwidth == 32 else -52)

    @cuda.jit(device=True)
    def load(R, P, sizes, gaps):
        """The lower triangle of P into R; False if P is not symmetric up to rounding."""
        size, gap = real(0), real(0)
        for j in range(cuda.threadIdx.x, P.shape[0], cuda.blockDim.x):
            for i in range(P.shape[0]):
                R[i, j] = P[i, j] if j <= i else real(0)
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
            total = real(0)
            for p in range(R.shape[0]):
                total += R[p, j] * key[p]
            a[j] = total
            length += total * total
        s = real(decay + over_block(length, parts))  # and all of a is there
        for p in range(cuda.threadIdx.x, R.shape[0], cuda.blockDim.x):
            total = real(0)
            for j in range(R.shape[0]):
                total += R[p, j] * a[j]
            gain[p] = root * total / s
            shift[p] = total / (s + sqrt(decay * s))
        cuda.syncthreads()  # the shift is there, and nobody reads R along its rows any more
        for j in range(cuda.threadIdx.x, R.shape[0], cuda.blockDim.x):
            for p in range(R.shape[0]):
                R[p, j] = (R[p, j] - shift[p] * a[j]) / sqrt(decay)

    def recursive_least_squares(k, log_decay, beta, P, root, scratch, gains, bad, limit, blocks):
        key = cuda.shared.array(LONGEST, real)
        a = cuda.shared.array(LONGEST, real)
        shift = cuda.shared.array(LONGEST, real)
        values = cuda.shared.array(LONGEST, float64)
        parts = cuda.shared.array(32, float64)
        b, h = cuda.blockIdx.x // k.shape[1], cuda.blockIdx.x % k.shape[1]
        R, X, size = root[b, h, 0], scratch[b, h, 0], k.shape[4]
        whole, even = finite(P[b, h, 0], parts), load(R, P[b, h, 0], a, shift)
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
            weight = sqrt(beta[b, h, 0, t]) if beta.size else real(1)
            decay = exp(max(log_decay[b, h, 0, t], real(FAINTEST))) if log_decay.size else real(1)
            length = float64(0)
            for j in range(cuda.threadIdx.x, size, cuda.blockDim.x):
                key[j] = weight * k[b, h, 0, t, j]
                length += key[j] * key[j]
            energy = over_block(length, parts)  # and all of the key is there
            most = min(LARGEST, limit / max(energy, limit / LARGEST)) * decay
            if mean > SLACK * most:
                mean = spread(R, parts)
                if SLACK * most < mean < inf:
                    cap(R, X, 4 * eps, most, inf, values, parts)
                    mean, information = spread(R, parts), inf
            learn(R, key, a, shift, gains[b, h, 0, t], decay, weight, parts)
            information = information * decay + energy
            mean /= decay
            moved = moved or decay != 1 or energy != 0
        if moved and not 2 * store(P[b, h, 0], R, X, parts) * information < limit:
            cap(R, X, 4 * eps, inf, limit, values, parts)
            store(P[b, h, 0], R, X, parts)

    return recursive_least_squares
