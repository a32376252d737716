"""Recursive least squares, compiled: chunks as matrix products, one memory per job, its square root R carried.

A chunk of weighted keys K meets R in the reflections of ``_factors.reflect``: with A = K R and V, T, L from it,

    W^T = R V^T T,    R' = (R - W^T V) / sqrt(what is left),    E = L^-1 (V - K S),    O = Q S + tril(Q W^T) E,

and S' = S + W^T E. Nothing is subtracted from P. Few tokens, and those from a bad number on, take the recursion itself.
All this in float64: R shrinks by the root of a first key's energy over the ridge, and so would its digits.

Few outputs of small keys take Bierman's recursion, in float64 too: a small ridge makes what is not yet learnt larger
than all else by more than float32 can tell apart, and where the past is forgotten P grows, with what rounding lets leak
there. See ``ttr_np.solvers.recursive_least_squares`` for the mathematics, the two caps, and the sources.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..calling import run
from ..notation import RecursiveLeastSquaresState
from ..solvers._chunks import output_like
from ..solvers.recursive_least_squares import FAINTEST, LARGEST, SLACK, check_ridge, check_weights, factor, limit, start
from ._bierman import Pairs, learn_factors, learn_pairs, numbers_of, place_of
from ._cache import compiled
from ._compile import apart, inner
from ._factors import BLOCK, Reflections, cholesky, eps, no_future, orthogonalise, reflect, square
from ._gates import exponentials
from ._lanes import (
    CHAINS,
    NARROW,
    TOKENS,
    collect,
    collect_numbers,
    dot_lanes,
    foretell_side,
    give_answers,
    give_state,
    group_of,
    jobs_of,
    learn_side,
    padded,
    recall_lanes,
    scale_lanes,
    take_state,
    widths,
)
from ._panels import (
    Matrix,
    add_scaled,
    below,
    clean_until,
    copy,
    count_bad_of,
    dot,
    fill,
    finite,
    full,
    load,
    load_transposed,
    lower,
    matrix,
    move,
    multiply,
    panel,
    real,
    row,
    scale,
    store,
    triangle,
)
from ._rooms import panels_by_name
from ._sequences import lay_out
from ._threads import share
from ._triangles import invert_lower, solve_unit_lower
from ._vectors import plus

__all__ = ["recursive_least_squares"]

CHUNK = 32
PANELS = 22  # of a thread; then the vectors of small memories
FADED = 0.25  # what is left of P's inverse below which a segment ends: R is divided by its root, errors and all
SMALL = 32  # keys up to which the recursion of few outputs is faster than products of panels
FEW = 4  # tokens that do not fill a chunk's products
Q, K, V, GATE, BETA, STATE, COVARIANCE, O = range(8)  # noqa: E741


def recursive_least_squares(
    q: Any, k: Any, v: Any, *, log_decay: Any = None, beta: Any = None, ridge: float = 1.0, **common: Any
) -> Any:
    """Recursive least squares; see ``ttr_np.recursive_least_squares``."""
    check_ridge(ridge)
    check_weights(q, log_decay, beta, common.get("mask"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    return run(core, "recursive_least_squares", arrays, start=partial(start, ridge), **common)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    beta: np.ndarray | None,
    *,
    state: RecursiveLeastSquaresState,
) -> tuple[np.ndarray, RecursiveLeastSquaresState]:
    """Lay out the sequences and share them among threads."""
    S, P = state
    o = output_like(q, v, S)
    layout = lay_out(
        S.shape[:-2], o.shape[:-2], (q, 2), (k, 2), (v, 2), (log_decay, 1), (beta, 1), (S, 2), (P, 2), (o, 2)
    )
    memories, groups = layout.places.shape[1:]
    (t, d), w = q.shape[-2:], v.shape[-1]
    bad = np.zeros(memories, np.bool_)
    cost = memories * (t * d * (3 * d + 2 * w + groups * w) + d**3)
    rooms, few = shapes(min(CHUNK, max(t, 1)), d, w), w <= NARROW and d <= SMALL
    wide = np.dtype(np.float64)
    numbers = wide.type(limit(S.dtype)), S.dtype.type(0)  # like those that are computed with, and those of the arrays
    if few:
        lanes, tokens = widths(wide), min(max(1, TOKENS // max(groups, 1)), max(t, 1))
        scratch = (wide, [*rooms, (1, vectors(d, w, tokens, groups) * lanes)])
        share(narrow, jobs_of(memories, wide), cost, scratch, layout, (t, d, w, tokens), *numbers, bad)
    else:
        share(kernel, memories, cost, (wide, rooms), layout, (t, d, w), *numbers, bad)
    if bad.any():
        factor(P)  # says what is wrong with one: those are left as they were
        raise ValueError("initial_state field P must be positive definite")
    return o, state


class Scratch(NamedTuple):
    """Panels of one thread, for chunks of c tokens."""

    S: Matrix  # k x v
    R: Matrix  # k x k
    turned: Matrix  # k x k
    product: Matrix  # k x k
    keys: Matrix  # c x k: weighted
    values: Matrix  # c x v: weighted, then innovations
    queries: Matrix  # c x k
    vectors: Matrix  # c x k: keys times R, then reflections
    whitened: Matrix  # k x c: W^T
    read: Matrix  # k x c: R V^T
    scores: Matrix  # c x c
    answers: Matrix  # c x v
    gates: Matrix  # 1 x c
    energy: Matrix  # 1 x c
    left: Matrix  # 1 x c
    along: Matrix  # 1 x k
    information: Matrix  # 1 x 1: trace of P^-1, infinite once a cap has acted
    reflections: Reflections


def shapes(c: int, d: int, w: int) -> list[tuple[int, int]]:
    """Of the panels, in their order."""
    own = [(d, w), (d, d), (d, max(d, BLOCK)), (d, d), (c, d), (c, w), (c, d), (c, d), (d, c), (d, c), (c, c), (c, w)]
    rows = [(1, c), (1, c), (1, c), (1, d), (1, 1)]
    return own + rows + [(c, c), (c, c), (d, c), (c, c), (max(c, BLOCK), c)]


panels_of = panels_by_name(Scratch)


@compiled
def kernel(table, places, steps, sizes, limit, given, bad, first, last):
    """Jobs first to last: one memory each; the arrays hold numbers like ``given``."""
    t, d, w = sizes
    room = panels_of(table, limit)
    for memory in range(first, last):
        state, P = matrix(places[STATE, memory, 0], w, 1, given), matrix(places[COVARIANCE, memory, 0], d, 1, given)
        load(room.S, state, 0, d, 0, w)
        if not begin(P, room, d, limit):
            bad[memory] = True
            continue
        moved = False
        for low in range(0, t, CHUNK):
            n = min(low + CHUNK, t) - low
            moved |= load_pairs(places, steps, sizes, memory, low, n, room, limit, given)
            run_chunk(places, steps, sizes, memory, low, n, room, limit, given)
        store(state, 0, d, 0, w, room.S)
        if moved:
            hand_out(P, room, d, limit)


def vectors(d: int, w: int, tokens: int, groups: int) -> int:
    """Numbers of one sequence in ``Lines``."""
    deep = -(-d // CHAINS) * CHAINS
    return numbers_of(d) + (5 + w) * deep + 8 + tokens * ((1 + groups) * deep + (1 + groups) * w + 4)


class Lines(NamedTuple):
    """As many memories as a vector holds, P = U diag(D) U^T each, and numbers of a few tokens."""

    U: Any  # in tiles, see ``_bierman``
    S: Any  # w rows of d vectors
    D: Any
    gain: Any
    grow: Any
    shrink: Any
    numbers: Any  # see the names below
    k: Any
    v: Any
    beta: Any
    grown: Any  # by how much a decay makes P larger
    kept: Any  # share of the past that it keeps
    energy: Any  # |k|^2
    q: Any  # of each group of queries
    told: Any


# Vectors of Lines.numbers: bound of the mean eigenvalue of P, trace of P^-1, variance of an innovation, and a sum of
# energies and decays, 0 as long as nothing has moved P.
SIZE, INFORMATION, VARIANCE, MOVES = range(4)


@inner
def lines_of(room, d, w, tokens, groups, lanes, same):
    """Where they lie in scratch; queries that are the keys do not lie there twice."""
    deep, line = padded(d), tokens * lanes
    S = move(room, place_of(deep - 1, deep - 1) * lanes + lanes)
    D = move(S, w * deep * lanes)
    k = move(D, (4 * deep + 8) * lanes)
    v = move(k, deep * line)
    beta = move(v, w * line)
    q = move(beta, 4 * line)
    return Lines(
        room, S, D, move(D, deep * lanes), move(D, 2 * deep * lanes), move(D, 3 * deep * lanes),
        move(D, 4 * deep * lanes), k, v, beta, move(beta, line), move(beta, 2 * line), move(beta, 3 * line),
        k if same else q, move(q, groups * deep * line),
    )  # fmt: skip


@inner
def asks_keys(places, steps, here):
    """Whether the queries of some sequences are their keys, as they are learnt."""
    same = places.shape[2] == 1 and places[BETA, 0, 0] == 0
    for axis in range(2):
        same &= steps[Q, axis] == steps[K, axis]
    for memory in range(here.first, here.first + here.count):
        same &= places[Q, memory, 0] == places[K, memory, 0]
    return same


@compiled
def narrow(table, places, steps, sizes, limit, given, bad, first, last):
    """Jobs first to last: the recursion of as many small memories as a vector holds, by Bierman's factors of P.

    The arrays hold numbers like ``given``.
    """
    t, d, w, tokens = sizes
    room, groups = panels_of(table, limit), places.shape[2]
    whole = panel(table, PANELS, limit)
    for job in range(first, last):
        here = group_of(job, places.shape[1], limit)
        lanes = here.lanes
        same = asks_keys(places, steps, here)
        lines = lines_of(whole.data, d, w, tokens, groups, lanes, same)
        fill(whole.data, real(limit, 0), whole.step)
        take_state(lines.S, places, STATE, here, d, w, given)
        for lane in range(here.count):
            P = matrix(places[COVARIANCE, here.first + lane, 0], d, 1, given)
            bad[here.first + lane] = not begin(P, room, d, limit)
            take_factors(lines, P, lane, room, d, lanes, limit)
        for since in range(0, t, tokens):
            rows = min(tokens, t - since)
            take_tokens(lines, places, steps, sizes, here, since, rows, same, given)
            weigh_tokens(lines, places, rows, d, w, lanes, limit)
            learn_tokens(lines, places[GATE, 0, 0] != 0, rows, sizes, groups, room, lanes, limit)
            for group in range(groups):
                told = move(lines.told, group * tokens * w * lanes)
                give_answers(told, places, O, here, group, since, rows, w, real(limit, 1), given)
        give_state(lines.S, places, STATE, here, d, w, given)
        for lane in range(here.count):
            if lines.numbers[MOVES * lanes + lane] != 0 and not bad[here.first + lane]:
                root_of(lines, lane, room, d, lanes, limit)
                row(room.information, 0)[0] = lines.numbers[INFORMATION * lanes + lane]
                hand_out(matrix(places[COVARIANCE, here.first + lane, 0], d, 1, given), room, d, limit)


@inner
def take_factors(lines, P, lane, room, d, lanes, like):
    """U and D of one memory, and the mean eigenvalue that R has.

    They are computed in panels, the same for one lane as for several, because their sums must be.
    """
    apart()
    U, D = room.turned, row(room.along, 0)
    upper_factors(P, U, D, d)
    for j in range(d):
        lines.D[j * lanes + lane] = D[j]
        for i in range(j + 1):
            lines.U[place_of(i, j) * lanes + lane] = row(U, j)[i] if i < j else real(like, 1)
    lines.numbers[INFORMATION * lanes + lane] = row(room.information, 0)[0]
    lines.numbers[SIZE * lanes + lane] = spread(room.R, d)


@inner
def upper_factors(P, U, D, d):
    """P = U diag(D) U^T from the last column to the first; column j of U is row j here."""
    apart()
    if diagonal(P, d):
        for j in range(d):
            fill(row(U, j), real(P.data[0], 0), j)
            D[j] = row(P, j)[j]
        return
    for j in range(d - 1, -1, -1):
        for i in range(j, -1, -1):
            total = row(P, j)[i]
            for m in range(j + 1, d):
                total -= D[m] * row(U, m)[i] * row(U, m)[j]
            if i == j:
                D[j] = total
            else:
                row(U, j)[i] = total / D[j]


@inner
def root_of(lines, lane, room, d, lanes, like):
    """R = U sqrt(D) of one memory."""
    apart()
    for i in range(d):
        fill(row(room.R, i), real(like, 0), i)
    for j in range(d):
        length = math.sqrt(lines.D[j * lanes + lane])
        for i in range(j):
            row(room.R, i)[j] = lines.U[place_of(i, j) * lanes + lane] * length
        row(room.R, j)[j] = length


@inner
def take_tokens(lines, places, steps, sizes, here, since, rows, same, given):
    """Bring together what some tokens bring."""
    apart()
    t, d, w, tokens = sizes
    deep = padded(d)
    collect(lines.k, places, steps, K, here, 0, since, rows, d, deep, given)
    collect(lines.v, places, steps, V, here, 0, since, rows, w, w, given)
    if places[BETA, here.first, 0]:
        collect_numbers(lines.beta, places, steps, BETA, here, since, rows, given)
    if places[GATE, here.first, 0]:
        collect_numbers(lines.grown, places, steps, GATE, here, since, rows, given)
    for group in range(0 if same else places.shape[2]):
        q = move(lines.q, group * tokens * deep * here.lanes)
        collect(q, places, steps, Q, here, group, since, rows, d, deep, given)


@inner
def weigh_tokens(lines, places, rows, d, w, lanes, like):
    """Some tokens before they are learnt: pairs times the root of their weight, energies, decays, what moves P."""
    apart()
    deep, n, moves, still = padded(d), rows * lanes, move(lines.numbers, MOVES * lanes), False
    for lane in range(lanes):
        still |= moves[lane] == 0
    for i in range(rows):
        k, v = move(lines.k, i * deep * lanes), move(lines.v, i * w * lanes)
        if places[BETA, 0, 0]:
            weigh_pairs(k, v, move(lines.beta, i * lanes), deep, w, lanes, like)
        dot_lanes(move(lines.energy, i * lanes), k, k, deep, lanes)
    add_up(moves, lines.energy, rows if still else 0, lanes)
    if places[GATE, 0, 0]:
        for x in range(n):
            gate = max(lines.grown[x], real(like, FAINTEST))
            lines.kept[x], lines.grown[x] = gate, -gate
        add_up(moves, lines.grown, rows if still else 0, lanes)
        exponentials(lines.kept, n)
        exponentials(lines.grown, n)


@inner
def learn_tokens(lines, gated, rows, sizes, groups, room, lanes, limit):
    """Some tokens, one after the other: the past forgets, the pair is learnt, the queries are answered."""
    apart()
    d, information = sizes[1], move(lines.numbers, INFORMATION * lanes)
    if not gated and small_enough(lines, rows, lanes, limit):
        add_up(information, lines.energy, rows, lanes)
        learn_rows(lines, 0, rows, sizes, groups, lanes)
        return
    for i in range(rows):
        if gated:
            decay_lanes(lines, i, d, lanes)
        add_up(information, move(lines.energy, i * lanes), 1, lanes)
        cap_lanes(lines, i, room, d, lanes, limit)
        learn_rows(lines, i, 1, sizes, groups, lanes)


@inner
def learn_rows(lines, first, rows, sizes, groups, lanes):
    """Some pairs in a row, between which neither a decay nor a cap changes the memory."""
    apart()
    _, d, w, tokens = sizes
    if lanes == 1:
        learn_pairs(pairs_of(lines, first, d, w), rows, tokens, groups, w, d)
        return
    for i in range(first, first + rows):
        learn_lanes(lines, i, sizes, groups, lanes)


@inner
def add_up(totals, terms, rows, lanes):
    """Add a term of each of some tokens to a total of every memory, one after the other whatever the lanes."""
    for i in range(rows):
        for lane in range(lanes):
            totals[lane] = plus(totals[lane], terms[i * lanes + lane])


@inner
def pairs_of(lines, i, d, w):
    """One sequence from token i on."""
    deep = padded(d)
    return Pairs(
        lines.U, lines.D, lines.gain, lines.grow, lines.shrink, lines.S, move(lines.k, i * deep),
        move(lines.v, i * w), move(lines.q, i * deep), move(lines.told, i * w),
    )  # fmt: skip


@inner
def small_enough(lines, rows, lanes, limit):
    """Whether no cap can act while some tokens are learnt without decay: P only shrinks."""
    size = 0.0
    for lane in range(lanes):
        size = max(size, lines.numbers[SIZE * lanes + lane])
    bound = min(SLACK * limit / max(size, 1.0 / LARGEST), LARGEST)
    return limit / LARGEST <= bound and count_bad_of(lines.energy, rows * lanes, real(limit, bound)) == 0


@inner
def decay_lanes(lines, i, d, lanes):
    """P over the share of the past that is kept, its size and that of its inverse likewise."""
    grown, kept = move(lines.grown, i * lanes), move(lines.kept, i * lanes)
    scale_lanes(lines.D, grown, d, lanes)
    scale_lanes(move(lines.numbers, SIZE * lanes), grown, 1, lanes)
    scale_lanes(move(lines.numbers, INFORMATION * lanes), kept, 1, lanes)


@inner
def cap_lanes(lines, i, room, d, lanes, limit):
    """Every P made small enough for its pair: the cap is limit / energy, and never above LARGEST.

    Without decay P only shrinks, so its size is computed anew only where the last one, decayed, passes the cap.
    """
    late = False
    for lane in range(lanes):
        late |= passes(lines.numbers[SIZE * lanes + lane], lines.energy[i * lanes + lane], limit)
    for lane in range(lanes if late else 0):
        energy = lines.energy[i * lanes + lane]
        if passes(lines.numbers[SIZE * lanes + lane], energy, limit):
            cap_lane(lines, lane, energy, room, d, lanes, limit)


@inner
def passes(size, energy, limit):
    """Whether a P of this size may be too large for a key of this energy."""
    return size * max(energy, limit / LARGEST) > SLACK * limit


@inner
def weigh_pairs(k, v, beta, deep, w, lanes, like):
    """Keys and values times the root of their weight; a pair of weight zero is not even looked at."""
    apart()
    for lane in range(lanes):
        root = math.sqrt(beta[lane])
        for p in range(deep):
            k[p * lanes + lane] = real(like, root * k[p * lanes + lane] if root != 0 else 0.0)
        for j in range(w):
            v[j * lanes + lane] = real(like, root * v[j * lanes + lane] if root != 0 else 0.0)


@inner
def cap_lane(lines, lane, energy, room, d, lanes, limit):
    """Size of one P anew, and its eigenvalues cut if they are still too large for the next pair to be learnt."""
    apart()
    root_of(lines, lane, room, d, lanes, limit)
    row(room.gates, 0)[0], row(room.energy, 0)[0] = real(limit, 0), real(limit, energy)
    row(room.information, 0)[0] = lines.numbers[INFORMATION * lanes + lane]
    size = forget(room, 0, d, limit)
    if row(room.information, 0)[0] == math.inf and math.isfinite(size):
        load_transposed(room.turned, room.R, 0, d, d)
        multiply(room.product, room.R, room.turned, d, d, d, real(limit, 1), real(limit, 0), full)
        take_factors(lines, room.product, lane, room, d, lanes, limit)
    lines.numbers[SIZE * lanes + lane] = real(limit, size)


@inner
def learn_lanes(lines, i, sizes, groups, lanes):
    """One pair of all memories: Bierman's update of U and D, in which nothing is subtracted from a variance."""
    (_, d, w, tokens) = sizes
    deep, variance = padded(d), move(lines.numbers, VARIANCE * lanes)
    k, v = move(lines.k, i * deep * lanes), move(lines.v, i * w * lanes)
    for j in range(w):  # first, so that it need not wait for the factors
        foretell_side(move(v, j * lanes), k, move(lines.S, j * deep * lanes), deep)
    learn_factors(lines.U, lines.D, k, lines.gain, lines.grow, lines.shrink, variance, d)
    for j in range(w):
        learn_side(move(lines.S, j * deep * lanes), move(v, j * lanes), variance, lines.gain, deep)
    for group in range(groups):
        at = group * tokens + i
        recall_lanes(move(lines.told, at * w * lanes), lines.S, move(lines.q, at * deep * lanes), deep, w, lanes)


@inner
def begin(P, room, d, like):
    """R = the Cholesky factor of P; False if P is not symmetric and positive definite. A NaN makes a memory of NaN."""
    apart()
    R, bad = room.R, not finite(P, d, d, like)
    for i in range(d):
        fill(row(R, i), real(like, 0), d)
        fill(row(R, i), real(like, math.nan), i + 1 if bad else 0)
    if bad:
        return True
    if diagonal(P, d):
        return begin_diagonal(P, room, d, like)
    if not load_symmetric(P, R, d, like) or not cholesky(R, room.turned, d, like):
        return False
    invert_lower(R, room.turned, d, like)
    total = 0.0
    for i in range(d):
        total += square(row(room.turned, i), i + 1)
        for j in range(i + 1, d):
            row(R, i)[j] = real(like, 0)
    row(room.information, 0)[0] = real(like, total)
    return True


@inner
def load_symmetric(P, R, d, like):
    """The lower triangle of P into R; False if P is not symmetric."""
    largest = gap = real(like, 0)
    for i in range(d):
        for j in range(i + 1):
            row(R, i)[j] = real(like, row(P, i)[j])
            largest = max(largest, abs(row(P, i)[j]))
            gap = max(gap, abs(row(P, i)[j] - row(P, j)[i]))
    return gap <= 1000 * eps(P.data[0]) * largest


@inner
def diagonal(P, d):
    """Whether a matrix is diagonal, as that of an empty memory is."""
    for i in range(d):
        others = -(row(P, i)[i] != 0)
        for j in range(d):
            others += row(P, i)[j] != 0
        if others != 0:
            return False
    return True


@inner
def begin_diagonal(P, room, d, like):
    """As ``begin``, without the work that a diagonal P spares."""
    total = 0.0
    for i in range(d):
        variance = row(P, i)[i]
        if not variance > 0:
            return False
        row(room.R, i)[i] = math.sqrt(variance)
        total += 1.0 / variance
    row(room.information, 0)[0] = real(like, total)
    return True


@inner
def load_pairs(places, steps, sizes, memory, low, n, room, like, given):
    """Gates, and keys and values times the root of their weight; True if any of it moves R.

    A pair of weight zero is not even looked at.
    """
    apart()
    t, d, w = sizes
    gates, beta = places[GATE, memory, 0], places[BETA, memory, 0]
    load(room.keys, matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], given), low, n, 0, d)
    load(room.values, matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], given), low, n, 0, w)
    information, moved = row(room.information, 0)[0], False
    for i in range(n):
        k, v = row(room.keys, i), row(room.values, i)
        if beta:
            weight = row(matrix(beta, steps[BETA, 0], 1, given), low + i)[0]
            if weight == 0:
                fill(k, real(like, 0), d)
                fill(v, real(like, 0), w)
            scale(k, math.sqrt(weight), d)
            scale(v, math.sqrt(weight), w)
        gate = row(matrix(gates, steps[GATE, 0], 1, given), low + i)[0] if gates else real(given, 0)
        energy = dot(k, k, d, like)
        row(room.gates, 0)[i], row(room.energy, 0)[i] = gate, energy
        information = information * math.exp(max(gate, real(like, FAINTEST))) + energy
        moved |= gate != 0 or energy != 0
    row(room.information, 0)[0] = information
    return moved


@inner
def run_chunk(places, steps, sizes, memory, low, n, room, limit, given):
    """One chunk: in segments up to the first bad number, which products would spread, and token by token from there."""
    apart()
    t, d, w = sizes
    groups = places.shape[2]
    clean = min(clean_until(room.keys, 0, n, d, False, limit), clean_until(room.values, 0, n, w, False, limit))
    for group in range(groups):
        q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], given)
        clean = min(clean, clean_until(below(q, low), 0, n, d, False, limit))
    clean = 0 if n < FEW else clean
    done = 0
    while done < clean:
        end = open_segment(room, done, clean, d, limit)
        segment(room, done, end, d, w, limit)
        for group in range(groups):
            q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], given)
            o = matrix(places[O, memory, group], w, 1, given)
            answer(below(q, low + done), below(o, low + done), end - done, room, done, d, w, limit)
        close_segment(room, done, end, d, w, limit)
        done = end
    for i in range(clean, n):
        forget(room, i, d, limit)
        step(room, i, d, w, limit)
        for group in range(groups):
            q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], given)
            o = matrix(places[O, memory, group], w, 1, given)
            answer_token(below(q, low + i), row(o, low + i), room, d, w, limit)


@inner
def spread(R, d):
    """Mean eigenvalue of R R^T."""
    total = 0.0
    for i in range(d):
        total += square(row(R, i), d)
    return total / max(d, 1)


@inner
def largest_before(energy, limit):
    """The cap on P before a pair of this energy."""
    return min(LARGEST, limit / max(energy, limit / LARGEST))


@inner
def forget(room, i, d, limit):
    """One decay of R, which then is not larger than the next pair can learn from; the mean eigenvalue of P."""
    apart()
    gate = row(room.gates, 0)[i]
    if gate != 0:
        scale_all(room.R, math.exp(-max(gate, real(limit, FAINTEST)) / 2), d, limit)
    size, largest = spread(room.R, d), largest_before(row(room.energy, 0)[i], limit)
    if math.isfinite(size) and size > SLACK * largest:
        load_transposed(room.turned, room.R, 0, d, d)
        orthogonalise(room.turned, d, d, row(room.along, 0), limit)
        cut(room, d, math.sqrt(largest), limit)
        row(room.information, 0)[0] = real(limit, math.inf)
        size = spread(room.R, d)
    return size


@inner
def scale_all(R, factor, d, like):
    """R times a number."""
    for i in range(d):
        scale(row(R, i), real(like, factor), d)


@inner
def cut(room, d, longest, like):
    """R from its orthogonal columns, none longer than a number."""
    for i in range(d):
        length = row(room.along, 0)[i]
        if length > longest:
            scale(row(room.turned, i), real(like, longest / length), d)
    load_transposed(room.R, room.turned, 0, d, d)


@inner
def open_segment(room, done, clean, d, limit):
    """First token after ``done`` before which P must be decayed and capped anew; ``left`` at those before."""
    apart()
    size, total, left = forget(room, done, d, limit), 0.0, row(room.left, 0)
    left[done] = real(limit, 1)
    for i in range(done + 1, clean):
        total += row(room.gates, 0)[i]
        now = math.exp(total)
        if SLACK * largest_before(row(room.energy, 0)[i], limit) * now < size or now < FADED:
            return i
        left[i] = real(limit, now)
    return clean


@inner
def segment(room, done, end, d, w, like):
    """Whitened keys W^T and innovations E of the tokens from ``done`` to ``end``."""
    apart()
    n, keys, errors, one, zero = (
        end - done,
        below(room.keys, done),
        below(room.values, done),
        real(like, 1),
        real(like, 0),
    )
    L = room.reflections.L
    multiply(room.vectors, keys, room.R, n, d, d, one, zero, full)
    reflect(room.vectors, move(row(room.left, 0), done), n, d, room.reflections, like)
    multiply(room.read, room.R, room.reflections.across, d, n, d, one, zero, full)
    multiply(room.whitened, room.read, room.reflections.T, d, n, n, one, zero, full)
    multiply(errors, keys, room.S, n, w, d, -one, one, full)
    for i in range(n):
        share = one / row(L, i)[i]
        scale(row(errors, i), share, w)
        scale(row(L, i), share, i)
    solve_unit_lower(L, errors, n, w)


@inner
def answer(q, o, n, room, done, d, w, like):
    """Answers of a segment to one sequence of queries."""
    apart()
    one, zero = real(like, 1), real(like, 0)
    load(room.queries, q, 0, n, 0, d)
    multiply(room.scores, room.queries, room.whitened, n, n, d, one, zero, triangle)
    no_future(room.scores, n, like)
    multiply(room.answers, room.queries, room.S, n, w, d, one, zero, full)
    multiply(room.answers, room.scores, below(room.values, done), n, w, n, one, one, lower)
    store(o, 0, n, 0, w, room.answers)


@inner
def close_segment(room, done, end, d, w, like):
    """The memory after a segment."""
    apart()
    n, left, one = end - done, row(room.left, 0)[end - 1], real(like, 1)
    multiply(room.S, room.whitened, below(room.values, done), d, w, n, one, one, full)
    multiply(room.R, room.whitened, room.vectors, d, d, n, -one, one, full)
    if left != 1:
        scale_all(room.R, one / math.sqrt(left), d, like)


@inner
def step(room, i, d, w, like):
    """One pair by the recursion."""
    apart()
    along, k, error, one = row(room.along, 0), row(room.keys, i), row(room.values, i), real(like, 1)
    fill(along, real(like, 0), d)
    for p in range(d):
        add_scaled(along, k[p], row(room.R, p), d)
        add_scaled(error, -k[p], row(room.S, p), w)
    s = one + dot(along, along, d, like)
    shrink = one / (s + math.sqrt(s))
    for p in range(d):
        gain = dot(row(room.R, p), along, d, like)
        add_scaled(row(room.R, p), -gain * shrink, along, d)
        add_scaled(row(room.S, p), gain / s, error, w)


@inner
def answer_token(q, o, room, d, w, like):
    """One answer by the recursion."""
    apart()
    total = row(room.answers, 0)
    fill(total, real(like, 0), w)
    for p in range(d):
        add_scaled(total, row(q, 0)[p * q.column], row(room.S, p), w)
    copy(o, total, w)


@inner
def hand_out(P, room, d, limit):
    """P = R R^T, exactly symmetric, eigenvalues above ``limit`` times the smallest cut to that number.

    The trace of P times that of its inverse is above the ratio of its eigenvalues: if it is small they are not needed.
    """
    apart()
    if not 2 * spread(room.R, d) * d * row(room.information, 0)[0] < limit:
        load_transposed(room.turned, room.R, 0, d, d)
        orthogonalise(room.turned, d, d, row(room.along, 0), limit)
        shortest = math.inf
        for i in range(d):
            shortest = min(shortest, row(room.along, 0)[i])
        cut(room, d, math.sqrt(limit) * shortest, limit)
    load_transposed(room.turned, room.R, 0, d, d)
    multiply(room.product, room.R, room.turned, d, d, d, real(limit, 1), real(limit, 0), triangle)
    for i in range(d):
        for j in range(i + 1):
            row(P, i)[j] = row(P, j)[i] = row(room.product, i)[j]
