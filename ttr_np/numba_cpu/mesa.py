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
from typing import Any, NamedTuple

import numpy as np
from numba import types

from ..calling import run
from ..notation import MesaState
from ..solvers._chunks import output_like
from ..solvers.mesa import check_leading, check_options, check_weights, report, ridge_refusal, tolerance_for
from ._cache import compiled
from ._compile import apart, inner
from ._double import (
    BETA,
    GATE,
    GRAM,
    GRAM_BEFORE,
    RIDGE,
    STATE,
    STATE_BEFORE,
    K,
    O,
    Q,
    V,
    answer_lost,
    holds_zero,
)
from ._factors import BLOCK, Reflections, cholesky, eps, no_future, reflect, square
from ._gates import step_decays, weigh
from ._panels import (
    Matrix,
    add_scaled,
    below,
    clean_within,
    copy,
    dot,
    fill,
    finite,
    full,
    gather,
    load,
    load_transposed,
    lower,
    matrix,
    most,
    move,
    multiply,
    panel,
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

CHUNK = 32
MILD = math.log(0.98)  # mean log decay above which one factor serves a whole chunk
FAST = math.log(0.85)  # and above which it still serves more tokens than it costs factors
STEPS = 16  # of conjugate gradients before a token gets a factor of its own
CLEAR = 16.0  # times the query a solution is far from rounding: it multiplies the errors of an answer
LEAST = 1e-250  # square of a solution below which the square of its residual is lost
HALF = 0.5  # share of the chunk's start below which a token does without it
METHODS = ("exact", "cg", "chebyshev")
EXACT, CG, CHEBYSHEV = range(3)


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
    scratch = (G.dtype, shapes(min(CHUNK, t), d, w, groups))
    again = partial(answer_lost, layout, (t, d, w), G.dtype, lost)
    finish = partial(look_back, again, lost) if solver == "exact" else partial(warn_of_limit, solver, worst, tolerance)
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


class Scratch(NamedTuple):
    """Panels of one thread, for chunks of c tokens."""

    G: Matrix  # k x v
    H: Matrix  # k x k
    A: Matrix  # k x k: H + ridge, then its factor
    X: Matrix  # k x k: inverse of the factor
    R: Matrix  # k x k: X^T; or H of one token
    P: Matrix  # k x k
    keys: Matrix  # c x k: weighted
    across: Matrix  # k x c: the same
    values: Matrix  # c x v: weighted
    pairs: Matrix  # c x c: decays
    scores: Matrix  # c x c
    answers: Matrix  # c x v
    vectors: Matrix  # c x k
    read: Matrix  # k x c
    whitened: Matrix  # k x c: W^T
    W: Matrix  # c x k
    x: Matrix  # c x k
    r: Matrix  # c x k: residuals
    p: Matrix  # c x k: directions
    z: Matrix  # c x k: preconditioned residuals
    Ap: Matrix  # c x k
    ridge: Matrix  # 1 x k
    along: Matrix  # 3 x k: numbers of each channel, see the names below
    since: Matrix  # 1 x c + 1: what is left at i - 1 of the chunk's start
    tokens: Matrix  # 10 x c: numbers of each token, see the names below
    gates: Matrix  # 1 x c + 1: of the chunk, then the mean foretold
    lost: Matrix  # groups x c: 1 where double precision has to solve a token
    reflections: Reflections


ERROR, START, SLOPE, LARGEST, MOST, RHO, LEFT, SHARE, MISSING, WAY = range(10)  # rows of ``tokens``
VALUES, UNITS, SPREAD = range(3)  # rows of ``along``
TOGETHER, ALONE, LOST = range(3)  # ways to solve a token: by the common factor, by its own, in double precision


def shapes(c: int, d: int, w: int, groups: int) -> list[tuple[int, int]]:
    """Of the panels, in their order."""
    square, tokens = (d, d), (c, d)
    memory = [(d, w), square, square, (d, max(d, BLOCK)), square, square]
    chunk = [tokens, (d, c), (c, w), (c, c), (c, c), (c, w), tokens, (d, c), (d, c)]
    rows = [(1, d), (3, d), (1, c + 1), (10, c), (1, CHUNK + 1), (groups, c)]
    return memory + chunk + [tokens] * 6 + rows + [(c, c), (c, c), (d, c), (c, c), (max(c, BLOCK), c)]


@inner
def panels_of(table, like):
    """The panels of one thread."""
    return Scratch(
        panel(table, 0, like), panel(table, 1, like), panel(table, 2, like), panel(table, 3, like),
        panel(table, 4, like), panel(table, 5, like), panel(table, 6, like), panel(table, 7, like),
        panel(table, 8, like), panel(table, 9, like), panel(table, 10, like), panel(table, 11, like),
        panel(table, 12, like), panel(table, 13, like), panel(table, 14, like), panel(table, 15, like),
        panel(table, 16, like), panel(table, 17, like), panel(table, 18, like), panel(table, 19, like),
        panel(table, 20, like), panel(table, 21, like), panel(table, 22, like), panel(table, 23, like),
        panel(table, 24, like), panel(table, 25, like), panel(table, 26, like),
        Reflections(
            panel(table, 27, like), panel(table, 28, like), panel(table, 29, like), panel(table, 30, like),
            panel(table, 31, like),
        ),
    )  # fmt: skip


@compiled
def kernel(table, places, steps, sizes, tolerance, worst, lost, first, last):
    """Jobs first to last: one memory each."""
    t, d, w, method, iterations = sizes
    room = panels_of(table, tolerance)
    for memory in range(first, last):
        G, H = matrix(places[STATE, memory, 0], w, 1, tolerance), matrix(places[GRAM, memory, 0], d, 1, tolerance)
        load(room.G, G, 0, d, 0, w)
        load(room.H, H, 0, d, 0, d)
        load(room.ridge, matrix(places[RIDGE, memory, 0], 0, steps[RIDGE, 0], tolerance), 0, 1, 0, d)
        own = (t, d, w, method, iterations, holds_zero(row(room.ridge, 0), d))
        for low in range(0, t, CHUNK):
            n = min(low + CHUNK, t) - low
            clean = load_pairs(places, steps, own, memory, low, n, room, tolerance)
            if clean:
                run_pairs(places, steps, own, memory, low, clean, room, tolerance, worst, lost)
            for i in range(low + clean, low + n):  # products would spread a bad number: such tokens come one by one
                load_pairs(places, steps, own, memory, i, 1, room, tolerance)
                run_pairs(places, steps, own, memory, i, 1, room, tolerance, worst, lost)
        if any_of(lost[memory]):  # double precision begins where this call began
            store(matrix(places[STATE_BEFORE, memory, 0], w, 1, tolerance), 0, d, 0, w, G)
            store(matrix(places[GRAM_BEFORE, memory, 0], d, 1, tolerance), 0, d, 0, d, H)
        store(G, 0, d, 0, w, room.G)
        store(H, 0, d, 0, d, room.H)


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
        q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like)
        clean = min(clean, clean_within(below(q, low), 0, n, d, False, most(like)))
    return clean


@inner
def matrix_of(line):
    """A row as a matrix of one column."""
    return Matrix(line, 1, 1)


@inner
def run_pairs(places, steps, sizes, memory, low, n, room, like, worst, lost):
    """Pairs that are loaded, in one chunk; in two where a reset forgets a bad number, because zero times it is bad.

    A reset is a gate whose decay is zero in the dtype.
    """
    apart()
    t, d, w, method, iterations, singular = sizes
    reset = 0
    while reset < n and math.exp(row(room.gates, 0)[reset]) > 0:
        reset += 1
    if reset == n or (finite(room.G, d, w, like) and finite(room.H, d, d, like)):
        run_chunk(places, steps, sizes, memory, low, n, room, like, worst, lost)
        return
    if reset:
        run_chunk(places, steps, sizes, memory, low, reset, room, like, worst, lost)
    for p in range(d):
        fill(row(room.G, p), real(like, 0), w)
        fill(row(room.H, p), real(like, 0), d)
    load_pairs(places, steps, sizes, memory, low + reset, n - reset, room, like)
    run_chunk(places, steps, sizes, memory, low + reset, n - reset, room, like, worst, lost)


@inner
def run_chunk(places, steps, sizes, memory, low, n, room, like, worst, lost):
    """One chunk of n tokens; in ``lost`` those are marked that double precision has to solve."""
    apart()
    t, d, w, method, iterations, singular = sizes
    one, gated = real(like, 1), places[GATE, memory, 0] != 0
    step_decays(matrix_of(row(room.gates, 0)), 0, n, room.pairs, row(room.since, 0), like)
    load_transposed(room.across, room.keys, 0, n, d)
    together = prepare(sizes, n, room, low, like)
    for group in range(places.shape[2]):
        q = below(matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like), low)
        solve(q, sizes, n, room, together, gated, worst, memory, row(room.lost, group), like)
        attend(room.answers, room.x, room.G, room.values, n, w, d, room, like)
        store(below(matrix(places[O, memory, group], w, 1, like), low), 0, n, 0, w, room.answers)
        for i in range(n):
            lost[memory, group, low + i] = row(room.lost, group)[i] != 0
    memorise(n, room, w, d, like)
    scale_rows(room.keys, row(room.pairs, n - 1), n, d)
    multiply(room.H, room.across, room.keys, d, d, n, one, row(room.since, 0)[n], triangle)
    mirror(room.H, d)


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
def memorise(n, room, w, d, like):
    """The chunk's pairs into G."""
    apart()
    scale_rows(room.values, row(room.pairs, n - 1), n, w)
    multiply(room.G, room.across, room.values, d, w, n, real(like, 1), row(room.since, 0)[n], full)


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
        if not largest < math.inf:
            return False
        if cholesky(room.A, room.X, d, like):
            break
        lift = max(2 * lift, eps(like) * largest)
    invert_lower(room.A, room.X, d, like)
    load_transposed(room.R, room.X, 0, d, d)
    multiply(room.P, room.R, room.X, d, d, d, real(like, 1), real(like, 0), upper | triangle)
    mirror(room.P, d)
    return True


@inner
def attend(into, x, S, right, n, columns, d, room, like):
    """Every token's x times its own state: S at the chunk's start, and the keys before it with their ``right``."""
    apart()
    one, zero = real(like, 1), real(like, 0)
    multiply(into, x, S, n, columns, d, one, zero, full)
    scale_rows(into, move(row(room.since, 0), 1), n, columns)
    multiply(room.scores, x, room.across, n, n, d, one, zero, triangle)
    weigh(room.scores, room.pairs, n, True, False, like)
    multiply(into, room.scores, right, n, columns, n, one, one, lower)


@inner
def precondition(into, r, n, together, d, room, like):
    """The common factor's solutions: (r P - tril(r W^T) W) / left; beyond ``together`` tokens r itself."""
    apart()
    one, zero = real(like, 1), real(like, 0)
    m = min(n, together)
    multiply(into, r, room.P, m, d, d, one, zero, full)
    multiply(room.scores, r, room.whitened, m, m, d, one, zero, triangle)
    no_future(room.scores, m, like)
    multiply(into, room.scores, room.W, m, d, m, -one, one, lower)
    for i in range(m):
        scale(row(into, i), one / row(room.tokens, LEFT)[i], d)
    for i in range(m, n):
        copy(row(into, i), row(r, i), d)


@inner
def solve(q, sizes, n, room, together, gated, worst, memory, lost, like):
    """The solutions x of one sequence of queries; ``lost``: 1 for tokens that are left to double precision."""
    apart()
    t, d, w, method, iterations, singular = sizes
    fill(lost, real(like, 0), n)
    load(room.r, q, 0, n, 0, d)
    if method != EXACT:
        iterate(sizes, n, room, together, worst, memory, like)
        return
    if together and gated:
        conjugate_gradients(together, d, room, real(like, 4 * eps(like)))
        load(room.r, q, 0, n, 0, d)
    elif together:
        precondition(room.x, room.r, together, together, d, room, like)
    if together:
        refine(together, d, room, like)
        remain(together, d, room, like)
    settle(n, together, d, room, like)
    ways = row(room.tokens, WAY)
    solve_each(until(ways, n, ALONE), d, room, like)
    for i in range(until(ways, n, LOST)):
        if ways[i] == LOST:
            lost[i] = real(like, 1)
            fill(row(room.x, i), real(like, 0), d)


@inner
def conjugate_gradients(n, d, room, tolerance):
    """Solutions of n tokens, from zero, by conjugate gradients that multiply no matrix but the common factor's.

    That one says z = P r of the residuals r. A token's own matrix is the inverse of P and what that lacks of the ridge,
    so its product with z is r + (1 - left / reference) ridge z; products with directions follow as directions do.
    """
    apart()
    tokens, zero = room.tokens, real(tolerance, 0)
    for i in range(n):
        for x in (room.x, room.p, room.Ap):
            fill(row(x, i), zero, d)
        row(tokens, START)[i] = row(tokens, ERROR)[i] = dot(row(room.r, i), row(room.r, i), d, tolerance)
        row(tokens, SLOPE)[i], row(tokens, MOST)[i] = zero, real(tolerance, STEPS)
    for step in range(STEPS):
        open_tokens = still_open(n, step, tokens, tolerance)
        if open_tokens == 0:
            break
        precondition(room.z, room.r, open_tokens, n, d, room, tolerance)
        for i in range(open_tokens):
            if is_open(i, step, tokens, tolerance):
                conjugate_step(i, d, room, tolerance)


@inner
def conjugate_step(i, d, room, like):
    """One step of a token: the next direction and its product, and as far as it goes."""
    apart()
    x, r, p, Ap, z = row(room.x, i), row(room.r, i), row(room.p, i), row(room.Ap, i), row(room.z, i)
    tokens, ridge = room.tokens, row(room.ridge, 0)
    slope, missing = dot(r, z, d, like), row(tokens, MISSING)[i]
    share = ratio(slope, row(tokens, SLOPE)[i])
    curvature = error = real(like, 0)
    for c in range(d):
        p[c] = z[c] + share * p[c]
        Ap[c] = r[c] + missing * ridge[c] * z[c] + share * Ap[c]
        curvature += p[c] * Ap[c]
    length = ratio(slope, curvature)
    for c in range(d):
        x[c] += length * p[c]
        r[c] -= length * Ap[c]
        error += r[c] * r[c]
    row(tokens, SLOPE)[i], row(tokens, ERROR)[i] = slope, error


@inner
def refine(n, d, room, like):
    """One step of refinement by the common factor, which without decay is every token's own.

    The difference in ``precondition`` cancels where the chunk says much more than what came before it, and conjugate
    gradients end with the rounding of all their steps.
    """
    apart()
    remain(n, d, room, like)
    precondition(room.p, room.z, n, n, d, room, like)
    for i in range(n):
        add_scaled(row(room.x, i), real(like, 1), row(room.p, i), d)


@inner
def settle(n, together, d, room, like):
    """Which way each of n tokens has to be solved; the first ones may be, to rounding, by the common factor."""
    apart()
    diagonal, units, ridge = row(room.along, VALUES), row(room.along, UNITS), row(room.ridge, 0)
    gather(diagonal, room.H.data, room.H.step + 1, d)
    gather(row(room.along, SPREAD), room.P.data, room.P.step + 1, d)
    for i in range(n):
        k, decay = row(room.keys, i), row(room.pairs, i)[i - 1] if i else row(room.since, 0)[1]
        for p in range(d):
            diagonal[p] = decay * diagonal[p] + k[p] * k[p]
            units[p] = math.sqrt(diagonal[p] + ridge[p])
        row(room.tokens, WAY)[i] = real(like, way_of(i, together, units, diagonal, d, room, like))


@inner
def way_of(i, together, units, diagonal, d, room, like):
    """The way to solve token i, whose matrix has this diagonal."""
    x, z, q = row(room.x, i), row(room.z, i), row(room.r, i)
    safe = is_safe(diagonal, row(room.ridge, 0), d, like)
    if i >= together:
        return ALONE if safe else LOST
    safe = safe or is_regular(units, row(room.along, SPREAD), row(room.tokens, SHARE)[i], d, like)
    return TOGETHER if safe and is_clear(x, q, units, d) and is_solved(x, z, q, units, d, like) else LOST


@inner
def until(ways, n, way):
    """Until which of n tokens some are solved in a way."""
    while n > 0 and ways[n - 1] != way:
        n -= 1
    return n


@inner
def remain(n, d, room, like):
    """What is left to solve, z = r - (H_t + ridge) x, each token with its own matrix."""
    apart()
    apply(room.Ap, room.x, n, d, room, like)
    for i in range(n):
        copy(row(room.z, i), row(room.r, i), d)
        add_scaled(row(room.z, i), -real(like, 1), row(room.Ap, i), d)


@inner
def is_solved(x, z, q, units, d, like):
    """Whether a residual z is rounding.

    In the units in which the matrix has a unit diagonal, and a norm of sqrt(d) at least. The inverse P is formed here,
    which costs digits that the solver's root of it keeps: what counts as rounding is a quarter of what counts there.
    Squares of small numbers may be lost, but a query of zeros, as padding is, has the solution zero.
    """
    apart()
    size = rest = 0.0  # squares in double precision, which numbers of single precision never leave
    given = np.int32(0)
    for p in range(d):
        unit = types.float64(units[p])
        a, b = x[p] * unit, z[p] / unit
        size += a * a
        rest += b * b
        given += np.int32(q[p] != 0)
    if given == 0:
        return size == 0
    return LEAST <= size < math.inf and rest <= 4 * d * eps(like) * eps(like) * size


@inner
def is_clear(x, q, units, d):
    """Whether a solution is not so much larger than its query that errors of an answer show it, in the same units."""
    apart()
    size = asked = 0.0
    for p in range(d):
        unit = types.float64(units[p])
        a, b = x[p] * unit, q[p] / unit
        size += a * a
        asked += b * b
    return not size > CLEAR * CLEAR * asked


@inner
def is_regular(units, spread, share, d, like):
    """Whether the common factor says that no eigenvalue can be lost in rounding.

    A token's own matrix holds a ``share`` of the common one, whose inverse has the diagonal ``spread``. So in units in
    which the former has a unit diagonal, and no eigenvalue above d, none is below the share over the inverse's trace.
    """
    apart()
    trace = 0.0
    for p in range(d):
        unit = types.float64(units[p])
        trace += unit * unit * spread[p]
    return d * d * eps(like) * trace < share


@inner
def solve_each(n, d, room, like):
    """The solutions of those of the first n tokens that get a factor of their own, if that is enough."""
    apart()
    units, ways = row(room.along, UNITS), row(room.tokens, WAY)
    if n == 0:
        return
    load(room.R, room.H, 0, d, 0, d)
    for i in range(n):
        k, decay = row(room.keys, i), row(room.pairs, i)[i - 1] if i else row(room.since, 0)[1]
        for p in range(d):
            scale(row(room.R, p), decay, d)
            add_scaled(row(room.R, p), k[p], k, d)
        if ways[i] != ALONE:
            continue
        if not finite(room.R, d, d, like):
            fill(row(room.x, i), real(like, math.nan), d)
            continue
        solve_one(row(room.r, i), row(room.x, i), d, room, like)
        for p in range(d):
            units[p] = math.sqrt(row(room.R, p)[p] + row(room.ridge, 0)[p])
        if not is_clear(row(room.x, i), row(room.r, i), units, d):
            ways[i] = real(like, LOST)


@inner
def is_safe(diagonal, ridge, d, like):
    """Whether no eigenvalue can be lost in rounding: with a unit diagonal, none is below the share of the ridge."""
    apart()
    share, lost = real(like, d * d) * eps(like), np.int32(0)
    for p in range(d):
        lost += np.int32(not ridge[p] >= share * (diagonal[p] + ridge[p]) or ridge[p] == 0)
    return lost == 0


@inner
def solve_one(q, x, d, room, like):
    """x = (R + ridge)^-1 q by Cholesky."""
    apart()
    lift, largest = real(like, 0), real(like, 0)
    while True:
        for i in range(d):
            copy(row(room.A, i), row(room.R, i), i + 1)
            row(room.A, i)[i] += row(room.ridge, 0)[i] + lift
            largest = max(largest, row(room.A, i)[i])
        if cholesky(room.A, room.X, d, like) or not largest < math.inf:
            break
        lift = max(2 * lift, eps(like) * largest)
    for i in range(d):
        x[i] = (q[i] - dot(row(room.A, i), x, i, like)) / row(room.A, i)[i]
    for i in range(d - 1, -1, -1):
        x[i] /= row(room.A, i)[i]
        add_scaled(x, -x[i], row(room.A, i), i)


@inner
def apply(into, x, n, d, room, like):
    """Every token's matrix H_t + ridge times its x."""
    apart()
    attend(into, x, room.H, room.keys, n, d, d, room, like)
    ridge = row(room.ridge, 0)
    for i in range(n):
        y, z = row(into, i), row(x, i)
        for p in range(d):
            y[p] += ridge[p] * z[p]


@inner
def iterate(sizes, n, room, together, worst, memory, like):
    """Solutions from zero for all tokens at once; a token that is done is not touched again."""
    apart()
    t, d, w, method, iterations, singular = sizes
    tokens, limit = room.tokens, 0
    if method == CHEBYSHEV:
        bound(sizes, n, room, like)
    for i in range(n):
        fill(row(room.x, i), real(like, 0), d)
        row(tokens, START)[i] = row(tokens, ERROR)[i] = dot(row(room.r, i), row(room.r, i), d, like)
        most = iterations if iterations else (2 * d if method == CG else int(row(tokens, MOST)[i]))
        row(tokens, MOST)[i] = real(like, most)
        limit = max(limit, most)
    begin(method, n, d, room, together, like)
    for step in range(limit):
        open_tokens = still_open(n, step, tokens, like)
        if open_tokens == 0:
            break
        if method == CG and step:
            turn(open_tokens, together, d, room, like)
        apply(room.Ap, room.p, open_tokens, d, room, like)
        for i in range(open_tokens):
            if is_open(i, step, tokens, like):
                if method == CG:
                    advance(i, d, room, like)
                else:
                    descend(i, d, room, like)
    finish(n, d, room, worst, memory, like)


@inner
def still_open(n, step, tokens, like):
    """Until which of n tokens some are open."""
    while n > 0 and not is_open(n - 1, step, tokens, like):
        n -= 1
    return n


@inner
def is_open(i, step, tokens, like):
    """Whether a token's residual is still above the tolerance, and steps are left."""
    return row(tokens, ERROR)[i] > like * like * row(tokens, START)[i] and step < row(tokens, MOST)[i]


@inner
def begin(method, n, d, room, together, like):
    """The first directions."""
    apart()
    tokens = room.tokens
    if method == CG:
        precondition(room.z, room.r, n, together, d, room, like)
    for i in range(n):
        if method == CG:
            copy(row(room.p, i), row(room.z, i), d)
            row(tokens, SLOPE)[i] = dot(row(room.r, i), row(room.z, i), d, like)
        else:
            middle, half = middle_of(i, d, room, like)
            copy(row(room.p, i), row(room.r, i), d)
            scale(row(room.p, i), real(like, 1) / middle, d)
            row(tokens, RHO)[i] = half / middle


@inner
def ratio(x, y):
    """x / y, and 0 where y is not positive; a NaN stays."""
    return x * 0 if y <= 0 else x / y


@inner
def advance(i, d, room, like):
    """One step of conjugate gradients: as far as the direction goes."""
    p, Ap, tokens = row(room.p, i), row(room.Ap, i), room.tokens
    length = ratio(row(tokens, SLOPE)[i], dot(p, Ap, d, like))
    add_scaled(row(room.x, i), length, p, d)
    add_scaled(row(room.r, i), -length, Ap, d)
    row(tokens, ERROR)[i] = dot(row(room.r, i), row(room.r, i), d, like)


@inner
def turn(open_tokens, together, d, room, like):
    """New directions, conjugate to those before."""
    apart()
    tokens = room.tokens
    precondition(room.z, room.r, open_tokens, together, d, room, like)
    for i in range(open_tokens):
        r, z = row(room.r, i), row(room.z, i)
        slope = dot(r, z, d, like)
        share = ratio(slope, row(tokens, SLOPE)[i])
        scale(row(room.p, i), share, d)
        add_scaled(row(room.p, i), real(like, 1), z, d)
        row(tokens, SLOPE)[i] = slope


@inner
def bound(sizes, n, room, like):
    """|H_t|_F of every token from its recurrence, |g H + k k^T|^2 = g^2 |H|^2 + 2 k^T (g H + k k^T) k - |k|^4."""
    apart()
    t, d, w, method, iterations, singular = sizes
    tokens, start, least, largest = room.tokens, real(like, 0), real(like, math.inf), real(like, 0)
    attend(room.Ap, room.keys, room.H, room.keys, n, d, d, room, like)
    for p in range(d):
        start += dot(row(room.H, p), row(room.H, p), d, like)
        least, largest = min(least, row(room.ridge, 0)[p]), max(largest, row(room.ridge, 0)[p])
    for i in range(n):
        k = row(room.keys, i)
        energy = dot(k, k, d, like)
        row(tokens, SLOPE)[i] = 2 * dot(k, row(room.Ap, i), d, like) - energy * energy
        since = row(room.since, 0)[i + 1]
        total = since * since * start
        for j in range(i + 1):
            total += row(room.pairs, i)[j] * row(room.pairs, i)[j] * row(tokens, SLOPE)[j]
        bound = math.sqrt(total) + largest
        row(tokens, LARGEST)[i] = bound
        steps = math.sqrt((bound if math.isfinite(bound) else least) / least) / 2 * math.log(2 / max(like, eps(like)))
        row(tokens, MOST)[i] = real(like, min(math.ceil(steps) + 1.0, 1000.0))


@inner
def middle_of(i, d, room, like):
    """Middle and half length of the interval that holds the eigenvalues of a token's matrix."""
    least, largest = real(like, math.inf), row(room.tokens, LARGEST)[i]
    for p in range(d):
        least = min(least, row(room.ridge, 0)[p])
    middle = (largest + least) / 2
    return middle, max((largest - least) / 2, eps(like) * middle)


@inner
def descend(i, d, room, like):
    """One step of the Chebyshev iteration."""
    apart()
    p, r, tokens = row(room.p, i), row(room.r, i), room.tokens
    middle, half = middle_of(i, d, room, like)
    add_scaled(row(room.x, i), real(like, 1), p, d)
    add_scaled(r, -real(like, 1), row(room.Ap, i), d)
    before = row(tokens, RHO)[i]
    rho = real(like, 1) / (2 * middle / half - before)
    row(tokens, RHO)[i] = rho
    scale(p, rho * before, d)
    add_scaled(p, 2 * rho / half, r, d)
    row(tokens, ERROR)[i] = dot(r, r, d, like)


@inner
def finish(n, d, room, worst, memory, like):
    """Relative residuals; a token whose own is no number has no solution."""
    apart()
    for i in range(n):
        residual = math.sqrt(ratio(row(room.tokens, ERROR)[i], row(room.tokens, START)[i]))
        if not math.isfinite(residual):
            fill(row(room.x, i), real(like, math.nan), d)
        if residual > worst[memory, 0]:
            worst[memory, 0] = residual
        worst[memory, 1] = max(worst[memory, 1], row(room.tokens, MOST)[i])
