"""Kernel ridge regression, compiled: one growing Cholesky factor per memory, by blocks of tokens.

    X = L^-1 K(past, block),    D D^T = K(block, block) + ridge I - X^T X,    o = (L^-1 kappa)^T Y,    Y = L^-1 V

See ``ttr_np.solvers.kernel_ridge`` for the mathematics and the sources.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends import function_refusal
from ..calling import run
from ..notation import CacheState
from ..solvers._cache import append, empty_cache
from ..solvers.kernel_ridge import KERNELS, check_options, without_spoilt
from ._cache import compiled
from ._compile import apart, inner
from ._factors import BLOCK, cholesky
from ._gates import exp
from ._panels import (
    Matrix,
    add_scaled,
    below,
    copy,
    dot,
    fill,
    full,
    load,
    load_transposed,
    matrix,
    move,
    multiply,
    panel,
    real,
    row,
    store,
    triangle,
)
from ._sequences import lay_out
from ._threads import share
from ._triangles import solve_lower

__all__ = ["kernel_ridge"]

CHUNK = 64
Q, K, V, PRESENT, O = range(5)  # noqa: E741
NAMES = tuple(KERNELS)
GAUSSIAN, EXPONENTIAL, LINEAR, POLYNOMIAL = (
    NAMES.index(name) for name in ("gaussian", "exponential", "linear", "polynomial")
)
FACTOR, KEYS, Y_, X_, TURNED, GRAM, ACROSS, ANSWERS, SQUARES, THERE, ROOM, FIRST = range(12)  # panels of a thread


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
    """Why a call with these options cannot be compiled, or None."""
    return function_refusal("numba", kernel, NAMES)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None,
    *,
    kernel: str,
    bandwidth: float,
    ridge: float,
    causal: bool,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Join the cache and the new pairs, lay them out and share the memories among threads."""
    past, t, lead = state.k.shape[-2], q.shape[-2], state.position.shape[:-1]
    stored = np.broadcast_to(True if mask is None else mask, lead + (t,))
    keys = np.concatenate([state.k, np.broadcast_to(k, lead + k.shape[-2:])], axis=-2)
    values = np.concatenate([state.v, np.broadcast_to(v, lead + v.shape[-2:])], axis=-2)
    present = np.concatenate([state.position >= 0, stored], axis=-1)
    present, keys, values, spoilt = without_spoilt(present, keys, values)
    o = np.empty(np.broadcast_shapes(q.shape[:-2], lead) + (t, v.shape[-1]), keys.dtype)
    there = present.astype(keys.dtype)
    layout = lay_out(lead, o.shape[:-2], (q, 2), (keys, 2), (values, 2), (there, 1), (o, 2))
    memories, groups = layout.places.shape[1:]
    n, (d, w) = past + t, (keys.shape[-1], values.shape[-1])
    bad = np.zeros(memories, np.bool_)
    size = max(CHUNK, BLOCK)
    shapes = [(n, n), (n, d), (n, w), (n, size), (d, size), (size, size), (size, size), (size, w)]
    shapes += [(1, n), (1, n), (1, size), (1, d)]
    cost = memories * n * n * (n / 6 + groups * n / 2 + d)
    numbers = (keys.dtype.type(ridge), keys.dtype.type(1 / bandwidth**2))
    sizes = (past, t, d, w, NAMES.index(kernel), causal)
    if groups:  # else nobody asks
        share(run_memories, memories, cost, (keys.dtype, shapes), layout, sizes, numbers, bad)
    if bad.any():
        raise np.linalg.LinAlgError(
            "K + ridge I is singular: keys repeat, or the kernel cannot tell them apart; raise ridge"
        )
    spoilt = spoilt[..., past:, :] if causal else spoilt[..., -1:, :]
    return np.where(spoilt, o.dtype.type(np.nan), o), append(state, k, v, None, mask)


@compiled
def run_memories(table, places, steps, sizes, numbers, bad, first, last):
    """Jobs first to last: one memory each."""
    past, t, d, w, kind, causal = sizes
    ridge, like = numbers
    keys, Y = panel(table, KEYS, like), panel(table, Y_, like)
    n = past + t
    for memory in range(first, last):
        load(keys, matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], like), 0, n, 0, d)
        load(Y, matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], like), 0, n, 0, w)
        load(panel(table, THERE, like), matrix(places[PRESENT, memory, 0], 0, steps[PRESENT, 0], like), 0, 1, 0, n)
        centre(table, n, d, kind, like)
        low = 0
        while low < n and not bad[memory]:
            high = min(low + CHUNK, past if low < past else n)
            bad[memory] = not grow(table, low, high, d, w, kind, ridge, like)
            if causal and low >= past and not bad[memory]:
                answer_all(table, places, steps, memory, low - past, high - low, high, sizes, like)
            low = high
        for start in range(0, 0 if causal or bad[memory] else t, CHUNK):
            answer_all(table, places, steps, memory, start, min(CHUNK, t - start), n, sizes, like)


@inner
def centre(table, n, d, kind, like):
    """For a kernel of distances, keys around the first one, so that an offset common to all costs no digits."""
    apart()
    keys = panel(table, KEYS, like)
    first = row(panel(table, FIRST, like), 0)
    fill(first, real(like, 0), d)
    if kind == GAUSSIAN and n:
        copy(first, row(keys, 0), d)
    for i in range(n):
        add_scaled(row(keys, i), real(like, -1), first, d)
        row(panel(table, SQUARES, like), 0)[i] = dot(row(keys, i), row(keys, i), d, like)


@inner
def against(table, x, n, count, d, kind, like):
    """Kernel of the first n pairs with ``count`` points, the columns of the panel TURNED, into the panel X."""
    apart()
    turned, squares, there = (
        panel(table, TURNED, like),
        row(panel(table, SQUARES, like), 0),
        row(panel(table, THERE, like), 0),
    )
    room, zero = row(panel(table, ROOM, like), 0), real(like, 0)
    multiply(x, panel(table, KEYS, like), turned, n, count, d, real(like, 1), zero, full)
    fill(room, zero, count)
    for p in range(d):
        line = row(turned, p)
        for j in range(count):
            room[j] += line[j] * line[j]
    for i in range(n):
        line = row(x, i)
        if there[i] == 0:
            fill(line, zero, count)
        elif kind == GAUSSIAN:
            for j in range(count):
                near = line[j] - (squares[i] + room[j]) / 2
                line[j] = exp((zero if near > 0 else near) * like)
        elif kind == EXPONENTIAL:
            for j in range(count):
                line[j] = exp(line[j] * like)
        elif kind == POLYNOMIAL:
            for j in range(count):
                line[j] = (real(like, 1) + line[j]) * (real(like, 1) + line[j])


@inner
def grow(table, low, high, d, w, kind, ridge, like):
    """Take the pairs from low to high into the factor; False if the matrix is singular."""
    apart()
    n, one, there = high - low, real(like, 1), row(panel(table, THERE, like), 0)
    L, X, gram, Y = panel(table, FACTOR, like), panel(table, X_, like), panel(table, GRAM, like), panel(table, Y_, like)
    load_transposed(panel(table, TURNED, like), panel(table, KEYS, like), low, n, d)
    against(table, X, high, n, d, kind, like)
    for i in range(n):
        line = row(gram, i)
        for j in range(n):
            line[j] = row(X, low + i)[j] if there[low + j] != 0 else real(like, 0)
        line[i] += ridge if there[low + i] != 0 else one
    for i in range(low):
        line = row(X, i)
        for j in range(n):
            line[j] = line[j] if there[low + j] != 0 else real(like, 0)
    solve_lower(L, X, low, n)
    multiply(gram, Matrix(X.data, 1, X.step), X, n, n, low, -one, one, triangle)
    if not cholesky(gram, panel(table, ACROSS, like), n, like):
        return False
    target = below(L, low)
    load_transposed(target, X, 0, low, n)
    for i in range(n):
        copy(move(row(target, i), low), row(gram, i), i + 1)
    multiply(below(Y, low), target, Y, n, w, low, -one, one, full)
    solve_lower(gram, below(Y, low), n, w)
    return True


@inner
def answer_all(table, places, steps, memory, start, count, n, sizes, like):
    """Answers to ``count`` queries of every group from n pairs; if causal each sees the pairs up to its own."""
    apart()
    past, t, d, w, kind, causal = sizes
    X, turned, answers = panel(table, X_, like), panel(table, TURNED, like), panel(table, ANSWERS, like)
    first = row(panel(table, FIRST, like), 0)
    for group in range(places.shape[2]):
        q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like)
        load_transposed(turned, q, start, count, d)
        for p in range(d):
            for j in range(count):
                row(turned, p)[j] -= first[p]
        against(table, X, n, count, d, kind, like)
        solve_lower(panel(table, FACTOR, like), X, n, count)
        for j in range(count if causal else 0):
            for i in range(past + start + j + 1, n):
                row(X, i)[j] = real(like, 0)
        multiply(
            answers, Matrix(X.data, 1, X.step), panel(table, Y_, like), count, w, n, real(like, 1), real(like, 0), full
        )
        store(matrix(places[O, memory, group], w, 1, like), start, count, 0, w, answers)
