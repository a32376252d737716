"""Delta rule, compiled: chunks as matrix products and one triangular solve, one memory (or some value columns) per job.

    errors = (I + strictly lower (beta p . k))^-1 beta (v - p S)
    o = q S + lower (q . k) errors,    S = S + k^T errors

with every product decayed. See ``ttr_np.solvers.delta_rule`` for the recurrence and the sources.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..calling import run
from ..notation import DeltaRuleState
from ..solvers._chunks import output_like
from ._cache import compiled
from ._channels import (
    BLOCK,
    Channels,
    carry_keys,
    channel_decays,
    channel_products,
    channel_shapes,
    forgets,
    meetings,
)
from ._compile import apart, inner, spliced
from ._filters import Series, Tokens, walk
from ._gates import split_exponentials, step_decays, weigh
from ._lanes import (
    CHAINS,
    NARROW,
    TOKENS,
    add_lanes,
    collect,
    collect_numbers,
    forget_lanes,
    give_answers,
    give_state,
    group_of,
    jobs_of,
    padded,
    recall_lanes,
    take_state,
    widths,
)
from ._panels import (
    Matrix,
    add_scaled,
    below,
    clean_until,
    fill,
    full,
    gather,
    give,
    load,
    load_transposed,
    matrix,
    move,
    multiply,
    panel,
    pointer,
    real,
    right,
    row,
    scale,
    scale_each,
    scale_rows,
    store,
    transposed,
    triangle,
)
from ._rooms import panels_by_name
from ._rows import untold_rows
from ._sequences import NO_GATES, PER_CHANNEL, PER_STEP, column_blocks, lay_out
from ._soon import note, notebook, notes_shape, soon
from ._steps import learn_rows, recall_rows, shares
from ._threads import share
from ._triangles import solve_unit_lower

__all__ = ["delta_rule"]

CHUNK = 32  # whole blocks of 16, whole tiles of 4 and 6 or of 8 and 12 rows; longer ones take more products
MATRICES = 6  # that a chunk reads and writes rows of: keys, values, erase keys, gates, queries, answers
Q, K, V, BETA, GATE, ERASE, STATE, O = range(8)


def delta_rule(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    *,
    log_decay: Any = None,
    erase_key: Any = None,
    scale: float = 1.0,
    **common: Any,
) -> Any:
    """Delta rule; see ``ttr_np.delta_rule``."""
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "erase_key": erase_key}
    return run(core, "delta_rule", arrays, {"scale": scale}, **common)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    beta: np.ndarray,
    log_decay: np.ndarray | None,
    erase_key: np.ndarray | None,
    *,
    scale: float,
    state: DeltaRuleState,
) -> tuple[np.ndarray, DeltaRuleState]:
    """Lay out the sequences and share them among threads."""
    (S,) = state
    o = output_like(q, v, S)
    gates = NO_GATES if log_decay is None else PER_CHANNEL if log_decay.ndim == q.ndim else PER_STEP
    layout = lay_out(
        S.shape[:-2], o.shape[:-2], (q, 2), (k, 2), (v, 2), (beta, 1), (log_decay, max(gates, 1)), (erase_key, 2),
        (S, 2), (o, 2),
    )  # fmt: skip
    memories, groups = layout.places.shape[1:]
    (t, d), w = q.shape[-2:], v.shape[-1]
    if w <= NARROW and gates != PER_CHANNEL:
        tokens, deep, lanes = max(1, TOKENS // max(groups, 1)), -(-d // CHAINS) * CHAINS, widths(S.dtype)
        few = Sizes(t, d, w, min(tokens, max(t, 1)), 1, w, gates, erase_key is not None)
        numbers = w * deep + few.chunk * ((2 + groups) * deep + (1 + groups) * w + 3)
        jobs, cost, scratch = jobs_of(memories, S.dtype), 3 * t * d * w * memories, (S.dtype, [(1, numbers * lanes)])
        share(narrow, jobs, cost, scratch, layout, few, S.dtype.type(scale))
        return o, DeltaRuleState(S)
    blocks = column_blocks(memories, w)
    width, chunk = -(-w // blocks), max(1, min(CHUNK, t))
    sizes = Sizes(t, d, w, chunk, blocks, width, gates, erase_key is not None)
    scratch, cost = (S.dtype, shapes(d, width, chunk, gates)), t * d * w * memories * (2 + groups)
    share(kernel, memories * blocks, cost, scratch, layout, sizes, S.dtype.type(scale))
    return o, DeltaRuleState(S)


class Sizes(NamedTuple):
    """What the kernel must know besides the arrays."""

    t: int
    k: int
    v: int
    chunk: int
    blocks: int  # of value columns
    width: int  # columns of a block
    gates: int  # none, per step, per channel
    erases: bool  # whether the key to be erased is another one


class Job(NamedTuple):
    """One memory and the block of columns that is worked on."""

    k: Any
    v: Any
    beta: Any
    gates: Any
    erase: Any
    start: int  # first column of the block
    columns: int
    memory: int


class Room(NamedTuple):
    """Panels of one thread, for chunks of c tokens."""

    S: Matrix  # k x v
    keys: Matrix  # k x c, as often as they are met
    carried: Matrix  # c x k: keys decayed to the chunk's end
    errors: Matrix  # c x v
    past: Matrix  # c x k: queries decayed to the chunk's start
    rows: Matrix  # c x k: keys
    queries: Matrix  # c x k
    asking: Matrix  # k x c: what of queries meets the past
    scores: Matrix  # c x c
    answers: Matrix  # c x v
    pairs: Matrix  # c x c: decays
    since: Matrix  # 1 x (c + 1): decays
    decays: Channels
    soon: int  # addresses of rows


panels_of = panels_by_name(Room)


def shapes(k: int, v: int, c: int, gates: int) -> list[tuple[int, int]]:
    """Shapes of the panels of ``Room``."""
    room = [(k, v), (k * meetings(c), c), (c, k), (c, v), (c, k), (c, k), (c, k), (k, c), (c, c), (c, v), (c, c)]
    room += [(1, c + 1)]
    return room + channel_shapes(c, k if gates == PER_CHANNEL else 0) + [notes_shape(c, MATRICES)]


@compiled
def kernel(table, places, steps, sizes, scale_, first, last):
    """Jobs first to last: one memory and one block of its value columns each."""
    room, unit = panels_of(table, scale_), 1
    notebook(room.soon)
    for number in range(first, last):
        job = job_of(places, steps, sizes, number, scale_)
        state = matrix(places[STATE, job.memory, 0], sizes.v, unit, scale_)
        if sizes.t == 1:
            run_tokens(places, steps, sizes, job, room, right(state, job.start), 0, 1, scale_)
        else:
            load(room.S, state, 0, sizes.k, job.start, job.columns)
            for low in range(0, sizes.t, sizes.chunk):
                high = min(low + sizes.chunk, sizes.t)
                run_chunk(places, steps, sizes, job, room, state, low, high, scale_)
            store(state, 0, sizes.k, job.start, job.columns, room.S)


class Lines(NamedTuple):
    """Numbers of a few tokens of as many sequences as a vector holds, and the answers to them."""

    S: Any  # v rows of k vectors
    k: Any
    erase: Any
    v: Any
    beta: Any
    gates: Any  # decays
    rests: Any  # of their rounding
    q: Any  # of each group of queries
    told: Any


@inner
def lines_of(room, sizes, groups, lanes):
    """Where they lie in scratch."""
    tokens = sizes.chunk * lanes
    k = move(room, sizes.v * padded(sizes.k) * lanes)
    erase = move(k, padded(sizes.k) * tokens)
    v = move(erase, padded(sizes.k) * tokens)
    beta = move(v, sizes.v * tokens)
    gates = move(beta, tokens)
    rests = move(gates, tokens)
    q = move(rests, tokens)
    return Lines(room, k, erase, v, beta, gates, rests, q, move(q, groups * padded(sizes.k) * tokens))


@compiled
def narrow(table, places, steps, sizes, scale_, first, last):
    """Jobs first to last: the recurrence of as many memories of few outputs as a vector holds."""
    groups, room = places.shape[2], panel(table, 0, scale_)
    for job in range(first, last):
        here = group_of(job, places.shape[1], scale_)
        lines = lines_of(room.data, sizes, groups, here.lanes)
        fill(room.data, real(scale_, 0), room.step)
        take_state(lines.S, places, STATE, here, sizes.k, sizes.v, scale_)
        if here.lanes == 1:
            follow_alone(lines, places, steps, sizes, here, scale_)
        else:
            follow_side(lines, places, steps, sizes, here, scale_)
        give_state(lines.S, places, STATE, here, sizes.k, sizes.v, scale_)


@inner
def follow_side(lines, places, steps, sizes, here, scale_):
    """All tokens of as many sequences as a vector holds."""
    for start in range(0, sizes.t, sizes.chunk):
        rows = min(sizes.chunk, sizes.t - start)
        take_tokens(lines, places, steps, sizes, here, start, rows, scale_)
        for i in range(rows):
            learn_lanes(lines, sizes, places.shape[2], i, here.lanes)
        give_told(lines, places, sizes, here, start, rows, scale_, scale_)


@inner
def give_told(lines, places, sizes, here, start, rows, scale_, like):
    """Write the answers of some tokens."""
    for group in range(places.shape[2]):
        told = move(lines.told, group * sizes.chunk * sizes.v * here.lanes)
        give_answers(told, places, O, here, group, start, rows, sizes.v, scale_, like)


@inner
def follow_alone(lines, places, steps, sizes, here, scale_):
    """All tokens of one sequence: rows that are whole vectors are read where they are, others are copied first."""
    groups, deep = places.shape[2], padded(sizes.k)
    there = reads_there(steps, sizes, groups)
    chunk = max(sizes.t, 1) if there else sizes.chunk
    for start in range(0, sizes.t, chunk):
        rows = min(chunk, sizes.t - start)
        if not there:
            take_tokens(lines, places, steps, sizes, here, start, rows, scale_)
        for j in range(sizes.v):
            x = tokens_there(places, steps, sizes, here.first, j, scale_) if there else tokens_here(lines, sizes, j)
            walk(move(lines.S, j * deep), x, scale_, rows, groups, sizes.k)
        if not there:
            give_told(lines, places, sizes, here, start, rows, real(scale_, 1), scale_)


@inner
def reads_there(steps, sizes, groups):
    """Whether the rows of keys and queries are whole vectors where they lie, and nothing else stands against it."""
    erase = ERASE if sizes.erases else K
    rows = steps[K, 1] == 1 and steps[Q, 1] == 1 and steps[erase, 1] == 1
    return rows and sizes.k == padded(sizes.k) and groups == 1 and sizes.gates == NO_GATES


@inner
def tokens_there(places, steps, sizes, memory, j, like):
    """Those of all tokens, where the arrays are."""
    erase = ERASE if sizes.erases else K
    return Tokens(
        Series(pointer(places[K, memory, 0], like), steps[K, 0], 0),
        Series(pointer(places[erase, memory, 0], like), steps[erase, 0], 0),
        Series(move(pointer(places[V, memory, 0], like), j * steps[V, 1]), steps[V, 0], 0),
        Series(pointer(places[BETA, memory, 0], like), steps[BETA, 0], 0),
        Series(pointer(places[GATE, memory, 0], like), 0, 0),
        Series(pointer(places[GATE, memory, 0], like), 0, 0),
        Series(pointer(places[Q, memory, 0], like), steps[Q, 0], 0),
        Series(move(pointer(places[O, memory, 0], like), j), sizes.v, 0),
    )


@inner
def tokens_here(lines, sizes, j):
    """Those that ``take_tokens`` brought together."""
    deep, w, unit = padded(sizes.k), sizes.v, 1
    k = Series(lines.k, deep, 0)
    return Tokens(
        k,
        Series(lines.erase, deep, 0) if sizes.erases else k,
        Series(move(lines.v, j), w, 0),
        Series(lines.beta, unit, 0),
        Series(lines.gates, unit if sizes.gates else 0, 0),
        Series(lines.rests, unit if sizes.gates else 0, 0),
        Series(lines.q, deep, sizes.chunk * deep),
        Series(move(lines.told, j), w, sizes.chunk * w),
    )


@inner
def take_tokens(lines, places, steps, sizes, here, start, rows, like):
    """Bring together what some tokens bring."""
    apart()
    deep = padded(sizes.k)
    collect(lines.k, places, steps, K, here, 0, start, rows, sizes.k, deep, like)
    collect(lines.v, places, steps, V, here, 0, start, rows, sizes.v, sizes.v, like)
    collect_numbers(lines.beta, places, steps, BETA, here, start, rows, like)
    if sizes.erases:
        collect(lines.erase, places, steps, ERASE, here, 0, start, rows, sizes.k, deep, like)
    if sizes.gates:
        collect_numbers(lines.gates, places, steps, GATE, here, start, rows, like)
        split_exponentials(lines.gates, lines.rests, rows * here.lanes)
    for group in range(places.shape[2]):
        q = move(lines.q, group * sizes.chunk * deep * here.lanes)
        collect(q, places, steps, Q, here, group, start, rows, sizes.k, deep, like)


@inner
def learn_lanes(lines, sizes, groups, i, lanes):
    """Token i of all sequences: one gradient step, then the answers."""
    deep, w = padded(sizes.k), sizes.v
    k, told = move(lines.k, i * deep * lanes), move(lines.told, i * w * lanes)
    erase = move(lines.erase, i * deep * lanes) if sizes.erases else k
    v, beta = move(lines.v, i * w * lanes), move(lines.beta, i * lanes)
    if sizes.gates:
        forget_lanes(lines.S, move(lines.gates, i * lanes), move(lines.rests, i * lanes), w * deep, lanes)
    recall_lanes(told, lines.S, erase, deep, w, lanes)
    for j in range(w):
        error = move(told, j * lanes)
        for lane in range(lanes):
            error[lane] = beta[lane] * (v[j * lanes + lane] - error[lane])
        add_lanes(move(lines.S, j * deep * lanes), error, k, deep)
    for group in range(groups):
        at = group * sizes.chunk + i
        q = move(lines.q, at * deep * lanes)
        recall_lanes(move(lines.told, at * w * lanes), lines.S, q, deep, w, lanes)


@spliced
def job_of(places, steps, sizes, number, like):
    """What one job memorises."""
    memory, start = number // sizes.blocks, number % sizes.blocks * sizes.width
    erase = ERASE if sizes.erases else K
    return Job(
        matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], like),
        matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], like),
        matrix(places[BETA, memory, 0], steps[BETA, 0], steps[BETA, 1], like),
        matrix(places[GATE, memory, 0], steps[GATE, 0], steps[GATE, 1], like),
        matrix(places[erase, memory, 0], steps[erase, 0], steps[erase, 1], like),
        start,
        min(sizes.width, sizes.v - start),
        memory,
    )


@spliced
def run_chunk(places, steps, sizes, job, room, state, low, high, scale_):
    """One chunk: as products up to the first bad number, which they would spread, and token by token from there."""
    clean = clean_tokens(sizes, job, low, high, scale_)
    n = clean - low if high - low > 1 else 0  # one token is cheaper as one
    if n:
        prepare(sizes, job, room, low, n, scale_)
        spoilt = forgets(room.since, room.decays, n, sizes.k, sizes.gates == PER_CHANNEL)
        spoilt = spoilt and clean_until(room.S, 0, sizes.k, job.columns, 0, scale_) < sizes.k
        if spoilt:
            store(state, 0, sizes.k, job.start, job.columns, room.S)
        learn(sizes, job, room, low, n, scale_)
        for group in range(places.shape[2]):
            q = matrix(places[Q, job.memory, group], steps[Q, 0], steps[Q, 1], scale_)
            o = matrix(places[O, job.memory, group], sizes.v, 1, scale_)
            past = score(sizes, below(q, low), room, n, scale_)
            load_transposed(room.asking, past, 0, n, sizes.k)
            give(
                o, low, job.start, room.answers, room.asking, room.S, move(row(room.since, 0), 1), room.scores,
                room.errors, n, job.columns, sizes.k, scale_, next_rows(sizes, job, room, q, o, low + n, n, scale_),
            )  # fmt: skip
        memorise(sizes, job, room, n, scale_)
        if spoilt:
            run_spoilt(places, steps, sizes, job, room, state, low, low + n, scale_)
    run_tokens(places, steps, sizes, job, room, room.S, low + n, high, scale_)


@inner
def next_rows(sizes, job, room, q, o, low, n, like):
    """What the next chunk reads and writes."""
    rows, whole = room.soon, 0
    count = note(rows, 0, job.k, whole, low, n)
    count = note(rows, count, job.v, job.start, low, n)
    if sizes.erases:
        count = note(rows, count, job.erase, whole, low, n)
    if sizes.gates == PER_CHANNEL:
        count = note(rows, count, job.gates, whole, low, n)
    count = note(rows, count, q, whole, low, n)
    count = note(rows, count, o, job.start, low, n)
    return soon(rows, count, max(sizes.k, job.columns), like)


@inner
def run_spoilt(places, steps, sizes, job, room, state, low, high, scale_):
    """Token by token, once more from a chunk's start, the columns that were bad there: a reset forgets even a NaN.

    Zero times it, in a product, is NaN. A column is worked on alone: it changes no bit of those beside it.
    """
    apart()
    for j in range(job.columns):
        one = Job(job.k, job.v, job.beta, job.gates, job.erase, job.start + j, 1, job.memory)
        alone = right(state, one.start)
        if clean_until(alone, 0, sizes.k, 1, 0, scale_) < sizes.k:
            run_tokens(places, steps, sizes, one, room, alone, low, high, scale_)
            for p in range(sizes.k):
                row(room.S, p)[j] = row(alone, p)[0]


@inner
def run_tokens(places, steps, sizes, job, room, S, low, high, scale_):
    """Token by token, S the memory."""
    apart()
    for i in range(low, high):
        step_token(places, steps, sizes, job, room, S, i, scale_)


@inner
def step_token(places, steps, sizes, job, room, S, i, scale_):
    """One step of the recurrence, and the answers: those to further queries once the first are given."""
    k, erase, error, keeps = row(job.k, i), row(job.erase, i), row(room.errors, 0), row(room.past, 0)
    shares(keeps, row(job.gates, i), job.gates.column, sizes.k, sizes.gates, scale_)
    told, columns, d = row(room.answers, 0), job.columns, sizes.k
    recall_rows(told, S.data, S.step, keeps, sizes.gates, erase, job.erase.column, d, columns)
    gather(error, move(row(job.v, i), job.start * job.v.column), job.v.column, columns)
    add_scaled(error, real(scale_, -1), told, columns)
    scale(error, row(job.beta, i)[0], columns)
    for group in range(places.shape[2]):
        q = matrix(places[Q, job.memory, group], steps[Q, 0], steps[Q, 1], scale_)
        o = move(row(matrix(places[O, job.memory, group], sizes.v, 1, scale_), i), job.start)
        if group:
            recall_rows(o, S.data, S.step, keeps, 0, row(q, i), q.column, d, columns)
        else:
            learn_rows(o, S.data, S.step, keeps, sizes.gates, k, job.k.column, error, row(q, i), q.column, d, columns)
        scale(o, scale_, columns)


@inner
def clean_tokens(sizes, job, low, high, like):
    """The first token of the rows low to high whose numbers a product would spread to other tokens, or ``high``."""
    apart()
    high = min(clean_until(job.k, low, high, sizes.k, 0, like), clean_until(job.v, low, high, sizes.v, 0, like))
    high = min(high, clean_until(job.beta, low, high, 1, 0, like))
    if sizes.erases:
        high = min(high, clean_until(job.erase, low, high, sizes.k, 0, like))
    if sizes.gates:
        high = min(high, clean_until(job.gates, low, high, sizes.k if sizes.gates == PER_CHANNEL else 1, 1, like))
    return high


@inner
def prepare(sizes, job, room, low, n, like):
    """Keys as rows and columns, values, decays."""
    apart()
    load(room.errors, job.v, low, n, job.start, job.columns)
    if sizes.gates == PER_CHANNEL:
        channel_decays(job.gates, low, n, sizes.k, room.decays, like)
        load(room.rows, job.k, low, n, 0, sizes.k)
        carry_keys(room.keys, room.carried, room.rows, n, sizes.k, room.decays)
    else:
        load_transposed(room.keys, job.k, low, n, sizes.k)
        if sizes.gates:
            step_decays(job.gates, low, n, room.pairs, row(room.since, 0), like)
            return
    fill(row(room.since, 0), real(like, 1), n + 1)


@inner
def score(sizes, x, room, n, like):
    """Scores of the rows of x with the chunk's keys; what of x meets the past."""
    apart()
    if sizes.gates == PER_CHANNEL:
        load(room.queries, x, 0, n, 0, sizes.k)
        channel_products(room.scores, room.past, room.keys, room.queries, room.rows, n, sizes.k, room.decays, 0, like)
        return Matrix(room.past.data, room.past.step, 1)
    multiply(room.scores, x, room.keys, n, n, sizes.k, real(like, 1), real(like, 0), triangle)
    weigh(room.scores, room.pairs, n, sizes.gates, 0, like)
    return Matrix(x.data, x.step, x.column)


@inner
def learn(sizes, job, room, low, n, like):
    """Turn the chunk's values into errors: what was not yet known when their token came, times its step."""
    apart()
    past, since = score(sizes, below(job.erase, low), room, n, like), move(row(room.since, 0), 1)
    multiply(room.answers, past, room.S, n, job.columns, sizes.k, real(like, 1), real(like, 0), full)
    errors, told, scores, beta, step = room.errors, room.answers, room.scores, row(job.beta, low), job.beta.step
    untold_rows(errors.data, errors.step, told.data, told.step, since, beta, step, n, job.columns)
    scale_each(scores.data, scores.step, beta, step, n, n)
    solve_unit_lower(room.scores, room.errors, n, job.columns)


@inner
def memorise(sizes, job, room, n, like):
    """Add the chunk's errors to what is left of the past."""
    apart()
    keys, keep = room.keys, real(like, 1)
    if sizes.gates == PER_CHANNEL:
        keys = transposed(room.carried)
        scale_rows(room.S, row(room.decays.start, (n + BLOCK - 1) // BLOCK), sizes.k, job.columns)
    elif sizes.gates:
        keep = row(room.since, 0)[n]
        scale_rows(room.errors, row(room.pairs, n - 1), n, job.columns)
    multiply(room.S, keys, room.errors, sizes.k, job.columns, n, real(like, 1), keep, full)
