"""Kernel ridge regression on the GPU: one factor per memory, then all queries at once.

    L L^T = K + ridge I,    Y = L^-1 V,    x = L_t^-1 kappa_t,    o_t = Y_t^T x

One block per memory makes the factor; then a thread has one query after another, and no thread waits for another. All
sums are in double precision. See ``ttr_np.solvers.kernel_ridge`` for the mathematics and the sources.
"""

from __future__ import annotations

from functools import cache
from math import exp
from typing import Any

import numpy as np
from numba import float64

from ttr_np.backends import function_refusal
from ttr_np.notation import CacheState
from ttr_np.solvers._cache import append, empty_cache
from ttr_np.solvers.kernel_ridge import check_options

from .._ridge import NAMES, lanes_for, pairs_of, refuse_singular, spoil
from .._sequences import BOTH, COLUMN, Sequences
from .._squares import few
from ._factors import cholesky, over_block
from ._launch import cuda, empty, launch, run

__all__ = ["kernel_ridge", "refusal"]

EPS = 2.0**-50  # share of a diagonal that is but rounding


def kernel_ridge(
    q: Any,
    k: Any,
    v: Any,
    *,
    kernel: Any = "gaussian",
    bandwidth: float = 1.0,
    ridge: float = 1.0,
    causal: bool = True,
    **common: Any,
) -> Any:
    """Kernel ridge regression; see ``ttr_np.kernel_ridge``."""
    problem = refusal(kernel=kernel)
    if problem:
        raise NotImplementedError(problem)
    check_options(kernel, ridge, bandwidth)
    options = {"kernel": kernel, "bandwidth": float(bandwidth), "ridge": float(ridge), "causal": bool(causal)}
    return run(core, "kernel_ridge", {"q": q, "k": k, "v": v}, options, start=empty_cache, **common)


def refusal(*, kernel: Any = NAMES[0], **options: Any) -> str | None:
    """Why a call with these options has no kernel, or None."""
    return function_refusal("numba-cuda", kernel, NAMES)


def core(
    q: Any, k: Any, v: Any, mask: Any, *, kernel: str, bandwidth: float, ridge: float, causal: bool, state: CacheState
) -> tuple[Any, CacheState]:
    """Two launches."""
    tokens, columns, lead = q.shape[-2], v.shape[-1], state.position.shape[:-1]
    past, pairs = state.k.shape[-2], pairs_of(state, k, v, mask)
    n, memories, Y = past + tokens, Sequences(lead, lead), pairs.v.copy()
    factor = empty(memories, (n, n), Y.dtype, Y)
    bad = np.zeros_like(Y, shape=(*lead, 1), dtype=bool)
    kept = {"k": (pairs.k, BOTH), "factor": (factor, BOTH), "Y": (Y, BOTH)}
    arrays = {"k": kept["k"], "present": (pairs.present, COLUMN)} | kept | {"bad": (bad, COLUMN)}
    written = ("factor", "Y", "bad")
    numbers = (np.float64(ridge), np.float64(1 / bandwidth**2))
    launch(factor_for(kernel), memories, arrays, written, tokens, few(max(n, columns)), 1, *numbers)
    refuse_singular(bad)

    sequences = Sequences(lead, np.broadcast_shapes(q.shape[:-2], lead))
    lanes = lanes_for(tokens * sequences.groups)
    scratch = empty(memories, (n, -(-lanes // 128) * 128), Y.dtype, Y)
    o = empty(sequences, (tokens, columns), q.dtype, q)
    arrays = {"q": (q, BOTH)} | kept | {"scratch": (scratch, BOTH), "o": (o, BOTH)}
    launch(answers_for(kernel), sequences, arrays, ("scratch", "o"), tokens, lanes, 1, past, int(causal), numbers[1])
    return spoil(o, pairs.spoilt, past, causal), append(state, k, v, None, mask)


@cache
def similar_for(name: str) -> Any:
    """One kernel function; ``width`` is 1 / bandwidth^2."""

    @cuda.jit(device=True)
    def similar(key, point, width):
        total = float64(0)
        for p in range(key.shape[0]):
            gap = point[p] - key[p]
            total += gap * gap if name == "gaussian" else point[p] * key[p]
        if name == "gaussian":
            return exp(-total / 2 * width)
        if name == "exponential":
            return exp(total * width)
        return (1 + total) * (1 + total) if name == "polynomial" else total

    return similar


@cache
def factor_for(name: str) -> Any:
    """The kernel that makes the factor: one block per memory."""
    similar = similar_for(name)

    def factorise(k, present, factor, values, bad, ridge, width, blocks):
        parts = cuda.shared.array(32, float64)
        b, h = cuda.blockIdx.x // k.shape[1], cuda.blockIdx.x % k.shape[1]
        L, Y, here = factor[b, h, 0], values[b, h, 0], present[b, h, 0]
        for i in range(L.shape[0]):
            for j in range(cuda.threadIdx.x, i + 1, cuda.blockDim.x):
                both = here[i] and here[j]
                alike = similar(k[b, h, 0, i], k[b, h, 0, j], width) if both else float64(0)
                if i == j:
                    alike += ridge if both else float64(1)
                L[i, j] = alike
        lost = 0 if cholesky(L) else 1
        for j in range(cuda.threadIdx.x, 0 if lost else L.shape[0], cuda.blockDim.x):  # a pivot that is but rounding
            whole = similar(k[b, h, 0, j], k[b, h, 0, j], width) + ridge if here[j] else float64(1)
            if L[j, j] * L[j, j] <= EPS * whole:
                lost = 1
        if over_block(lost, parts) > 0:
            if cuda.threadIdx.x == 0:
                bad[b, h, 0, 0] = True
            return
        for j in range(cuda.threadIdx.x, Y.shape[1], cuda.blockDim.x):  # a thread substitutes in a column of its own
            for i in range(L.shape[0]):
                y = Y[i, j]
                for m in range(i):
                    y -= L[i, m] * Y[m, j]
                Y[i, j] = y / L[i, i]

    return factorise


@cache
def answers_for(name: str) -> Any:
    """The kernel that answers queries: a thread has one after another."""
    similar = similar_for(name)

    def answer(q, k, factor, values, scratch, o, past, causal, width, blocks):
        memory, groups = cuda.blockIdx.x // blocks, q.shape[2]
        b, h, lanes = memory // q.shape[1], memory % q.shape[1], blocks * cuda.blockDim.x
        lane = cuda.blockIdx.x % blocks * cuda.blockDim.x + cuda.threadIdx.x
        L, Y, x = factor[b, h, 0], values[b, h, 0], scratch[b, h, 0, :, lane]
        for job in range(lane, q.shape[3] * groups, lanes):
            t, g = job // groups, job % groups
            seen = past + t + 1 if causal else L.shape[0]
            for i in range(seen):
                total = similar(k[b, h, 0, i], q[b, h, g, t], width)  # without a pair, its value is zero
                for m in range(i):
                    total -= L[i, m] * x[m]
                x[i] = total / L[i, i]
            for j in range(Y.shape[1]):
                total = float64(0)
                for i in range(seen):
                    total += x[i] * Y[i, j]
                o[b, h, g, t, j] = total

    return answer
