"""Mesa layer, compiled: chunks as matrix products, one memory per job.

    o_t = G_t^T x_t,    x_t = (H_t + diag(ridge))^-1 q_t

- ``exact``: one Cholesky factor per chunk, completed key by key by the reflections of ``_factors``, as
  X = Q P - tril(Q W^T) W. With decay that preconditions conjugate gradients as below, until their residual is rounding;
  products with a token's own matrix follow from those with the common factor, see ``conjugate_gradients``.
  Either is refined once. Tokens which it does not serve get factors of their own. Where the true residual is above
  rounding, the solution large or the matrix perhaps singular, double precision takes over: see ``_double``.
- ``cg`` with a tolerance: the same P and W precondition every token of the chunk, their ridge divided by a decay from
  the middle of the chunk: one step without decay, three to six where gates are mild. The decay is foretold from
  the gates before the chunk and its first one, and a token that has lost more than half of the chunk's start goes
  without: what is done for a token never depends on later ones. With ``tolerance=0`` the number of steps is what was
  asked for, and they are plain.
- ``chebyshev`` as in the solver.

See ``ttr_np.solvers.mesa`` for the recurrences and the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..calling import run
from ..notation import MesaState
from ..solvers._chunks import output_like
from ..solvers.mesa import (
    check_leading,
    check_options,
    check_start,
    check_weights,
    report,
    ridge_refusal,
    tolerance_for,
)
from ._cache import compiled
from ._compile import apart, inner
from ._double import BETA, GATE, GRAM, GRAM_BEFORE, RIDGE, STATE, STATE_BEFORE, K, O, Q, V, answer_lost, holds_zero
from ._factors import cholesky, eps, reflect, square
from ._gates import step_decays
from ._mesa import CG, CHUNK, EXACT, LEFT, LOST, METHODS, MISSING, SHARE, WAY, attend, panels_of, shapes
from ._mesa_exact import solve_exactly
from ._mesa_steps import solve_in_steps
from ._panels import (
    Matrix,
    below,
    clean_within,
    copy,
    fill,
    finite,
    full,
    load,
    load_transposed,
    matrix,
    most,
    move,
    multiply,
    real,
    row,
    scale,
    scale_rows,
    spread,
    store,
    triangle,
    upper,
)
from ._sequences import lay_out
from ._threads import share
from ._triangles import invert_lower

__all__ = ["mesa"]

MILD = math.log(0.98)  # mean log decay above which one factor serves a whole chunk
FAST = math.log(0.85)  # and above which it still serves more tokens than it costs factors
HALF = 0.5  # share of the chunk's start below which a token does without it


def mesa(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    beta: Any = None,
    ridge: Any = 1.0,
    solver: str = "exact",
    iterations: int | None = None,
    tolerance: float | None = None,
    **common: Any,
) -> Any:
    """Mesa layer; see ``ttr_np.mesa``."""
    check_weights(q, log_decay, beta, common.get("mask"))
    check_options(k, ridge, solver, iterations, tolerance)
    check_start(common.get("initial_state"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    options = {"ridge": np.asarray(ridge), "solver": solver, "iterations": iterations, "tolerance": tolerance}
    return run(core, "mesa", arrays, options, **common)


def refusal(**arguments: Any) -> str | None:
    """Why a call with these arguments cannot be compiled, or None."""
    return ridge_refusal("numba", **arguments)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    beta: np.ndarray | None,
    *,
    ridge: np.ndarray,
    solver: str,
    iterations: int | None,
    tolerance: float | None,
    state: MesaState,
) -> tuple[np.ndarray, MesaState]:
    """Lay out the sequences and share them among threads."""
    G, H = state
    o, (t, d), w = output_like(q, v, G), q.shape[-2:], v.shape[-1]
    check_leading(ridge, o.shape[:-2])
    ridge = np.broadcast_to(np.asarray(ridge, G.dtype), ridge.shape[:-1] + (d,))
    if np.broadcast_shapes(ridge.shape[:-1], H.shape[:-2]) != H.shape[:-2]:
        raise NotImplementedError("backend 'numba' has no 'mesa' whose ridge differs among queries of one memory")
    tolerance = tolerance_for(solver, iterations, tolerance, G.dtype)
    layout = lay_out(
        G.shape[:-2],
        o.shape[:-2],
        (q, 2),
        (k, 2),
        (v, 2),
        (log_decay, 1),
        (beta, 1),
        (ridge, 1),
        (G, 2),
        (H, 2),
        (o, 2),
        (np.empty_like(G), 2),
        (np.empty_like(H), 2),
    )
    memories, groups = layout.places.shape[1:]
    worst, lost = np.zeros((memories, 2)), np.zeros((memories, groups, t), np.bool_)
    cost = memories * t * d * (2 * d + w + groups * (8 * d + w))
    sizes = (t, d, w, METHODS.index(solver), iterations or 0)
    scratch = (G.dtype, shapes(min(CHUNK, t), d, w))
    again = partial(answer_lost, layout, (t, d, w), G.dtype, lost)
    finish = partial(look_back, again, lost) if solver == "exact" else partial(warn_of_limit, solver, worst, tolerance)
    kernel = exact if solver == "exact" else in_steps
    share(kernel, memories, cost, scratch, layout, sizes, G.dtype.type(tolerance), worst, lost, finish=finish)
    return o, state


def look_back(again: Callable[[], None], lost: np.ndarray) -> None:
    """Solve tokens once more if any are lost."""
    if lost.any():
        again()


def warn_of_limit(solver: str, worst: np.ndarray, tolerance: float) -> None:
    """Report the largest residuals and the limit that ``worst (memories, 2)`` holds, and begin them anew."""
    residual, most = worst.T.copy()
    worst[...] = 0
    report(solver, residual, most, tolerance)


@compiled
def exact(table, places, steps, sizes, tolerance, worst, lost, first, last):
    """Jobs first to last: one memory each, solved by factors."""
    room = panels_of(table, tolerance)
    for memory in range(first, last):
        own, low = begin_memory(places, steps, sizes, memory, room, tolerance), 0
        while low < sizes[0]:
            n, together = open_chunk(places, steps, own, memory, low, room, tolerance)
            for group in range(places.shape[2]):
                q = queries_of(places, steps, memory, group, low, tolerance)
                solve_exactly(q, n, sizes[1], room, together, places[GATE, memory, 0] != 0, tolerance)
                answer(places, own, memory, group, low, n, room, lost[memory, group], tolerance)
            close_chunk(own, n, room, tolerance)
            low += n
        end_memory(places, sizes, memory, room, lost[memory], tolerance)


@compiled
def in_steps(table, places, steps, sizes, tolerance, worst, lost, first, last):
    """The same, solved in steps; a kernel of its own, because each takes seconds to compile."""
    room = panels_of(table, tolerance)
    for memory in range(first, last):
        own, low = begin_memory(places, steps, sizes, memory, room, tolerance), 0
        while low < sizes[0]:
            n, together = open_chunk(places, steps, own, memory, low, room, tolerance)
            for group in range(places.shape[2]):
                q = queries_of(places, steps, memory, group, low, tolerance)
                solve_in_steps(q, own, n, room, together, worst[memory], tolerance)
                answer(places, own, memory, group, low, n, room, lost[memory, group], tolerance)
            close_chunk(own, n, room, tolerance)
            low += n
        end_memory(places, sizes, memory, room, lost[memory], tolerance)


@inner
def begin_memory(places, steps, sizes, memory, room, like):
    """What a memory is before the call; its sizes, and whether it has no ridge in some channel."""
    apart()
    t, d, w, method, iterations = sizes
    load(room.G, matrix(places[STATE, memory, 0], w, 1, like), 0, d, 0, w)
    load(room.H, matrix(places[GRAM, memory, 0], d, 1, like), 0, d, 0, d)
    load(room.ridge, matrix(places[RIDGE, memory, 0], 0, steps[RIDGE, 0], like), 0, 1, 0, d)
    return t, d, w, method, iterations, holds_zero(row(room.ridge, 0), d)


@inner
def end_memory(places, sizes, memory, room, lost, like):
    """What it is after the call; where tokens are lost, double precision begins where this call began."""
    apart()
    t, d, w, method, iterations = sizes
    G, H = matrix(places[STATE, memory, 0], w, 1, like), matrix(places[GRAM, memory, 0], d, 1, like)
    if any_of(lost):
        store(matrix(places[STATE_BEFORE, memory, 0], w, 1, like), 0, d, 0, w, G)
        store(matrix(places[GRAM_BEFORE, memory, 0], d, 1, like), 0, d, 0, d, H)
    store(G, 0, d, 0, w, room.G)
    store(H, 0, d, 0, d, room.H)


@inner
def queries_of(places, steps, memory, group, low, like):
    """One sequence of queries from a token on."""
    return below(matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like), low)


@inner
def open_chunk(places, steps, sizes, memory, low, room, like):
    """Load the next pairs: how many make a chunk, and for how many of these one factor serves.

    A chunk ends before a bad number, which products would spread: its token comes alone. It also ends before a reset
    (a gate whose decay is zero in the dtype) that forgets a bad number, because zero times that is bad.
    """
    apart()
    t, d, w, method, iterations, singular = sizes
    n = min(low - low % CHUNK + CHUNK, t) - low
    n = max(load_pairs(places, steps, sizes, memory, low, n, room, like), 1)
    reset = 0
    while reset < n and math.exp(row(room.gates, 0)[reset]) > 0:
        reset += 1
    if reset < n and not (finite(room.G, d, w, like) and finite(room.H, d, d, like)):
        n = reset if reset else n
        for p in range(0 if reset else d):
            fill(row(room.G, p), real(like, 0), w)
            fill(row(room.H, p), real(like, 0), d)
    step_decays(matrix_of(row(room.gates, 0)), 0, n, room.pairs, row(room.since, 0), like)
    load_transposed(room.across, room.keys, 0, n, d)
    return n, prepare(sizes, n, room, low, like)


@inner
def answer(places, sizes, memory, group, low, n, room, lost, like):
    """What the memory says to solved queries; ``lost``: those that double precision has to solve."""
    apart()
    t, d, w, method, iterations, singular = sizes
    attend(room.answers, room.x, room.G, room.values, n, w, d, room, like)
    store(below(matrix(places[O, memory, group], w, 1, like), low), 0, n, 0, w, room.answers)
    for i in range(n):
        lost[low + i] = method == EXACT and row(room.tokens, WAY)[i] == LOST


@inner
def close_chunk(sizes, n, room, like):
    """The chunk's pairs into the memory."""
    apart()
    t, d, w, method, iterations, singular = sizes
    one, left, last = real(like, 1), row(room.since, 0)[n], row(room.pairs, n - 1)
    scale_rows(room.values, last, n, w)
    multiply(room.G, room.across, room.values, d, w, n, one, left, full)
    scale_rows(room.keys, last, n, d)
    multiply(room.H, room.across, room.keys, d, d, n, one, left, triangle)
    mirror(room.H, d)


@inner
def load_pairs(places, steps, sizes, memory, low, n, room, like):
    """Gates, and keys and values times the root of their weight; how many tokens come before the first bad one."""
    apart()
    t, d, w, method, iterations, singular = sizes
    gates, beta, zero = places[GATE, memory, 0], places[BETA, memory, 0], real(like, 0)
    load(room.keys, matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], like), low, n, 0, d)
    load(room.values, matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], like), low, n, 0, w)
    line = row(room.gates, 0)
    for i in range(n):
        line[i] = row(matrix(gates, steps[GATE, 0], 1, like), low + i)[0] if gates else zero
        if beta:
            weight = row(matrix(beta, steps[BETA, 0], 1, like), low + i)[0]
            if weight == 0:
                fill(row(room.keys, i), zero, d)
                fill(row(room.values, i), zero, w)
            scale(row(room.keys, i), math.sqrt(weight), d)
            scale(row(room.values, i), math.sqrt(weight), w)
    clean = clean_within(room.keys, 0, n, d, False, most(like))
    clean = min(clean, clean_within(room.values, 0, n, w, False, most(like)))
    clean = min(clean, clean_within(matrix_of(line), 0, n, 1, True, most(like)))
    for group in range(places.shape[2]):
        q = queries_of(places, steps, memory, group, low, like)
        clean = min(clean, clean_within(q, 0, n, d, False, most(like)))
    return clean


@inner
def matrix_of(line):
    """A row as a matrix of one column."""
    return Matrix(line, 1, 1)


@inner
def any_of(marks):
    """Whether any of them is set."""
    for group in range(marks.shape[0]):
        for i in range(marks.shape[1]):
            if marks[group, i]:
                return True
    return False


@inner
def mirror(x, d):
    """A symmetric matrix from its lower triangle."""
    apart()
    for i in range(d):
        spread(move(x.data, i), x.step, row(x, i), 1, i)


@inner
def prepare(sizes, n, room, low, like):
    """What the queries of a chunk share; for how many of its tokens one factor serves."""
    apart()
    t, d, w, method, iterations, singular = sizes
    gates = row(room.gates, 0)
    before = gates[CHUNK] if low else gates[0]
    mean = (before * (CHUNK - 1) + gates[0]) / CHUNK  # of the gates so far; never of those to come
    total = gates[0]
    for i in range(1, n):
        total += gates[i]
    gates[CHUNK] = total / n
    together = 0
    if not singular and serves(t, method, mean, like):
        while together < n and row(room.since, 0)[together + 1] >= HALF:
            together += 1
        together = factorise(together, real(like, math.exp(mean * CHUNK / 2)), d, room, like)
    return together


@inner
def serves(t, method, mean, like):
    """Whether a common factor is worth its price: that of a few tokens' own, or of some steps of all tokens."""
    if method == EXACT:
        return mean >= FAST and (t > 1 or mean == 0)  # with decay, the own one of a single token costs less
    return method == CG and like > 0 and mean >= MILD


@inner
def factorise(n, reference, d, room, like):
    """P = (H + ridge / reference)^-1 and the whitened keys of n tokens; how many tokens they serve.

    None if H holds a bad number; none from the first on whose key says more than can be told from what came before.
    """
    apart()
    one, zero = real(like, 1), real(like, 0)
    if n == 0 or not invert(room.H, one / reference, d, room, like):
        return 0
    multiply(room.vectors, room.keys, room.R, n, d, d, one, zero, full)
    n = comparable_until(room.vectors, n, d, like)
    left = row(room.tokens, LEFT)
    copy(left, move(row(room.since, 0), 1), n)
    for i in range(n):
        row(room.tokens, SHARE)[i] = min(left[i], reference)
        row(room.tokens, MISSING)[i] = one - left[i] / reference
    reflect(room.vectors, left, n, d, room.reflections, like)
    multiply(room.read, room.R, room.reflections.across, d, n, d, one, zero, upper)
    multiply(room.whitened, room.read, room.reflections.T, d, n, n, one, zero, full)
    load_transposed(room.W, room.whitened, 0, d, n)
    return n


@inner
def comparable_until(vectors, n, d, like):
    """The first row so long that an infinity might come of it, which products would spread to earlier tokens, or n."""
    apart()
    for i in range(n):
        if not square(row(vectors, i), d) * eps(like) * eps(like) < 1:
            return i
    return n


@inner
def invert(H, factor, d, room, like):
    """P = (H + factor ridge)^-1 = X^T X; False if H holds a bad number.

    A matrix whose small eigenvalues have drowned in rounding is lifted by as much as that rounding.
    """
    apart()
    if not finite(H, d, d, like):
        return False
    lift, largest = real(like, 0), real(like, 0)
    while True:
        for i in range(d):
            copy(row(room.A, i), row(H, i), d)
            row(room.A, i)[i] += factor * row(room.ridge, 0)[i] + lift
            largest = max(largest, row(room.A, i)[i])
        if not 0 < largest < math.inf:  # no Gram matrix, whatever is added
            return False
        if cholesky(room.A, room.X, d, like):
            break
        lift = max(2 * lift, eps(like) * largest)
    invert_lower(room.A, room.X, d, like)
    load_transposed(room.R, room.X, 0, d, d)
    multiply(room.P, room.R, room.X, d, d, d, real(like, 1), real(like, 0), upper | triangle)
    mirror(room.P, d)
    return True
