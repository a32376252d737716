"""Linear attention, compiled: chunks as matrix products, one memory (or some of its value columns) per job.

    o_i = since_i S^T q_i + sum_{j <= i} pairs_ij (q_i . k_j) v_j,    S = since_n S + sum_j pairs_nj k_j v_j^T

See ``ttr_np.solvers.linear_attention`` for the recurrence and the sources.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..calling import run
from ..notation import LinearAttentionState
from ..solvers._chunks import output_like
from ..solvers.linear_attention import start
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
from ._gates import step_decays, weigh
from ._panels import (
    ROWS,
    Matrix,
    add_scaled,
    add_transposed,
    answers,
    below,
    clean_until,
    copy,
    dot,
    fill,
    finite,
    gather,
    give,
    load,
    load_transposed,
    matrix,
    move,
    multiply,
    real,
    right,
    row,
    scale,
    scale_rows,
    store,
    times,
    transposed,
    triangle,
)
from ._rooms import panels_by_name
from ._sequences import NO_GATES, PER_CHANNEL, PER_STEP, column_blocks, lay_out
from ._soon import note, notebook, notes_shape, soon
from ._steps import learn_rows, recall_rows, shares
from ._threads import share

__all__ = ["linear_attention"]

CHUNK = 32  # whole blocks of 16, whole tiles of 4 and 6 or of 8 and 12 rows; longer ones take more products
MATRICES = 5  # that a chunk reads and writes rows of: keys, values, gates, queries, answers
Q, K, V, GATE, BONUS, STATE, Z, Z_NEXT, O = range(9)


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    bonus: Any = None,
    normalize: bool = False,
    scale: float = 1.0,
    **common: Any,
) -> Any:
    """Linear attention; see ``ttr_np.linear_attention``."""
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "bonus": bonus}
    options = {"normalize": bool(normalize), "scale": scale}
    return run(core, "linear_attention", arrays, options, start=partial(start, normalize), **common)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    bonus: np.ndarray | None,
    *,
    normalize: bool,
    scale: float,
    state: LinearAttentionState,
) -> tuple[np.ndarray, LinearAttentionState]:
    """Lay out the sequences and share them among threads."""
    S, z = state
    o, z_next = output_like(q, v, S), None if z is None else np.empty_like(z)
    if bonus is not None:
        q, k, bonus = (in_numbers(x) for x in (q, k, bonus))
    gates = NO_GATES if log_decay is None else PER_CHANNEL if log_decay.ndim == q.ndim else PER_STEP
    layout = lay_out(
        S.shape[:-2], o.shape[:-2], (q, 2), (k, 2), (v, 2), (log_decay, max(gates, 1)), (bonus, 1), (S, 2), (z, 1),
        (z_next, 1), (o, 2),
    )  # fmt: skip
    memories, groups = layout.places.shape[1:]
    (t, d), w = q.shape[-2:], v.shape[-1]
    blocks = column_blocks(memories, w)
    width, chunk = -(-w // blocks), max(1, min(CHUNK, t))
    sizes = Sizes(t, d, w, chunk, blocks, width, gates, bonus is not None, normalize)
    scratch, cost = (S.dtype, shapes(d, width, chunk, gates)), t * d * w * memories * (1 + groups)
    factor = S.dtype.type(1 if normalize else scale)
    share(kernel, memories * blocks, cost, scratch, layout, sizes, factor)
    return o, LinearAttentionState(S, z_next)


def in_numbers(x: np.ndarray) -> np.ndarray:
    """Rows whose numbers lie side by side: ``own`` is summed in another order where all are one in memory."""
    return x if x.strides[-1] else x.copy()


class Sizes(NamedTuple):
    """What the kernel must know besides the arrays."""

    t: int
    k: int
    v: int
    chunk: int
    blocks: int  # of value columns
    width: int  # columns of a block
    gates: int  # none, per step, per channel
    late: bool  # with a bonus: answers read the state before their own step
    normalize: bool


class Job(NamedTuple):
    """One memory and the block of columns that is worked on."""

    k: Any
    v: Any  # the block's columns only
    gates: Any
    start: int  # first column of the block
    columns: int
    memory: int


class Reader(NamedTuple):
    """One sequence of queries; its answers in the block's columns."""

    q: Any
    bonus: Any
    o: Any


class Room(NamedTuple):
    """Panels of one thread, for chunks of c tokens."""

    S: Matrix  # k x v, and a tile of rows behind it
    z: Matrix  # 3 x k: now, at a chunk's start, as a column that is worked on once more goes through it
    keys: Matrix  # k x c, as often as they are met
    carried: Matrix  # c x k: keys decayed to the chunk's end
    values: Matrix  # c x v
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
    room = [(k + ROWS, v), (3, k), (k * meetings(c), c), (c, k), (c, v), (c, k), (c, k), (c, k), (k, c)]
    room += [(c, c), (c, v), (c, c), (1, c + 1)]
    return room + channel_shapes(c, k if gates == PER_CHANNEL else 0) + [notes_shape(c, MATRICES)]


@compiled
def kernel(table, places, steps, sizes, scale, first, last):
    """Jobs first to last: one memory and one block of its value columns each."""
    k, v, column = sizes.k, sizes.v, 1
    room = panels_of(table, scale)
    notebook(room.soon)
    for number in range(first, last):
        job = job_of(places, steps, sizes, number, scale)
        state = matrix(places[STATE, job.memory, 0], v, column, scale)
        if sizes.normalize:
            load(room.z, matrix(places[Z, job.memory, 0], k, column, scale), 0, 1, 0, k)
        if sizes.t == 1:
            run_tokens(places, steps, sizes, job, room, right(state, job.start), room.z, 0, 1, scale)
        else:
            load(room.S, state, 0, k, job.start, job.columns)
            for low in range(0, sizes.t, sizes.chunk):
                high = min(low + sizes.chunk, sizes.t)
                run_chunk(places, steps, sizes, job, room, state, low, high, scale)
            store(state, 0, k, job.start, job.columns, room.S)
        if sizes.normalize and job.start == 0:
            store(matrix(places[Z_NEXT, job.memory, 0], k, column, scale), 0, 1, 0, k, room.z)


@spliced
def job_of(places, steps, sizes, number, like):
    """What one job memorises."""
    memory, start = number // sizes.blocks, number % sizes.blocks * sizes.width
    return Job(
        matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], like),
        matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], like),
        matrix(places[GATE, memory, 0], steps[GATE, 0], steps[GATE, 1], like),
        start,
        min(sizes.width, sizes.v - start),
        memory,
    )


@inner
def reader_of(places, steps, sizes, memory, group, like):
    """One sequence of queries and its answers."""
    return Reader(
        matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like),
        matrix(places[BONUS, memory, group], 0, steps[BONUS, 0], like),
        matrix(places[O, memory, group], sizes.v, 1, like),
    )


@spliced
def run_chunk(places, steps, sizes, job, room, state, low, high, scale):
    """One chunk: as products up to the first bad number, which they would spread, and token by token from there."""
    clean = min(
        clean_until(job.k, low, high, sizes.k, False, scale), clean_until(job.v, low, high, sizes.v, False, scale)
    )
    if sizes.gates:
        channels = sizes.k if sizes.gates == PER_CHANNEL else 1
        clean = min(clean, clean_until(job.gates, low, high, channels, True, scale))
        if sizes.normalize and not finite(room.z, 1, sizes.k, scale):
            clean = low  # it is in the answers of all columns
    n = clean - low if high - low > 1 else 0  # one token is cheaper as one
    if n:
        prepare(sizes, job, room, low, n, scale)
        spoilt = forgets(room.since, room.decays, n, sizes.k, sizes.gates == PER_CHANNEL)
        spoilt = spoilt and clean_until(room.S, 0, sizes.k, job.columns, False, scale) < sizes.k
        if spoilt:
            keep_start(sizes, job, room, state)
        for group in range(places.shape[2]):
            reader = reader_of(places, steps, sizes, job.memory, group, scale)
            answer(sizes, job, reader, room, low, n, scale)
        memorise(sizes, job, room, n, scale)
        if spoilt:
            run_spoilt(places, steps, sizes, job, room, state, low, low + n, scale)
    run_tokens(places, steps, sizes, job, room, room.S, room.z, low + n, high, scale)


@inner
def keep_start(sizes, job, room, state):
    """Keep the memory of a chunk's start: its state where it will be given back."""
    apart()
    store(state, 0, sizes.k, job.start, job.columns, room.S)
    if sizes.normalize:
        copy(row(room.z, 1), row(room.z, 0), sizes.k)


@inner
def run_spoilt(places, steps, sizes, job, room, state, low, high, scale):
    """Token by token, once more from a chunk's start, the columns that were bad there: a reset forgets even a NaN.

    Zero times it, in a product, is NaN. A column is worked on alone: it changes no bit of those beside it.
    """
    apart()
    z = below(room.z, 2)
    for j in range(job.columns):
        one = Job(job.k, job.v, job.gates, job.start + j, 1, job.memory)
        alone = right(state, one.start)
        if clean_until(alone, 0, sizes.k, 1, False, scale) < sizes.k:
            copy(z.data, row(room.z, 1), sizes.k if sizes.normalize else 0)
            run_tokens(places, steps, sizes, one, room, alone, z, low, high, scale)
            for p in range(sizes.k):
                row(room.S, p)[j] = row(alone, p)[0]


@inner
def run_tokens(places, steps, sizes, job, room, S, z, low, high, scale):
    """Token by token, S and z the memory."""
    apart()
    for i in range(low, high):
        gather(row(room.values, 0), move(row(job.v, i), job.start * job.v.column), job.v.column, job.columns)
        shares(row(room.past, 0), row(job.gates, i), job.gates.column, sizes.k, sizes.gates, scale)
        if sizes.late:
            for group in range(places.shape[2]):
                reader = reader_of(places, steps, sizes, job.memory, group, scale)
                answer_early(sizes, job, reader, room, S, z, i, scale)
        reader = reader_of(places, steps, sizes, job.memory, 0, scale)
        memorise_token(sizes, job, reader, room, S, z, i)
        for group in range(0 if sizes.late else places.shape[2]):
            reader = reader_of(places, steps, sizes, job.memory, group, scale)
            answer_token(sizes, reader, job, room, S, z, group, i, scale)


@inner
def prepare(sizes, job, room, low, n, like):
    """What all queries of a chunk share: its keys as columns, its values, its decays."""
    apart()
    load(room.values, job.v, low, n, job.start, job.columns)
    load(room.rows, job.k, low, n, 0, sizes.k)
    if sizes.gates == PER_CHANNEL:
        channel_decays(job.gates, low, n, sizes.k, room.decays, like)
        carry_keys(room.keys, room.carried, room.rows, n, sizes.k, room.decays)
    else:
        load_transposed(room.keys, room.rows, 0, n, sizes.k)
        if sizes.gates:
            step_decays(job.gates, low, n, room.pairs, row(room.since, 0), like)
            return
    fill(row(room.since, 0), real(like, 1), n + 1)


@inner
def answer(sizes, job, reader, room, low, n, scale):
    """Answers to one sequence of queries: what the past says, and what the chunk's pairs say."""
    apart()
    k, columns, one, zero = sizes.k, job.columns, real(scale, 1), real(scale, 0)
    q, past = below(reader.q, low), room.past
    if sizes.gates == PER_CHANNEL:
        load(room.queries, q, 0, n, 0, k)
        channel_products(room.scores, past, room.keys, room.queries, room.rows, n, k, room.decays, sizes.late, scale)
    else:
        multiply(room.scores, q, room.keys, n, n, k, one, zero, triangle)
        weigh(room.scores, room.pairs, n, sizes.gates, sizes.late, scale)
        past = q
    load_transposed(room.asking, past, 0, n, k)
    if sizes.late:
        for i in range(n):
            row(room.scores, i)[i] = own(q, below(job.k, low), reader.bonus, i, k, scale)
    since, ahead = move(row(room.since, 0), 1 - sizes.late), next_rows(sizes, job, reader, room, low + n, n, scale)
    if sizes.normalize:
        answers(room.answers, room.asking, room.S, since, room.scores, room.values, n, columns, k, scale, ahead)
        divide(sizes, q, room, n, columns, scale)
        store(reader.o, low, n, job.start, columns, room.answers)
    else:
        give(
            reader.o, low, job.start, room.answers, room.asking, room.S, since, room.scores, room.values, n, columns, k,
            scale, ahead,
        )  # fmt: skip


@inner
def next_rows(sizes, job, reader, room, low, n, like):
    """What the next chunk reads and writes."""
    rows, whole = room.soon, 0
    count = note(rows, 0, job.k, whole, low, n)
    count = note(rows, count, job.v, job.start, low, n)
    if sizes.gates == PER_CHANNEL:
        count = note(rows, count, job.gates, whole, low, n)
    count = note(rows, count, reader.q, whole, low, n)
    count = note(rows, count, reader.o, job.start, low, n)
    return soon(rows, count, max(sizes.k, job.columns), like)


@inner
def own(q, keys, bonus, i, k, like):
    """What a token says to itself: q . (bonus k)."""
    total, q_i, k_i = real(like, 0), row(q, i), row(keys, i)
    for p in range(k):
        total += q_i[p * q.column] * bonus.data[p * bonus.column] * k_i[p * keys.column]
    return total


@inner
def divide(sizes, q, room, n, columns, like):
    """Answers over their total weight; an empty memory answers zero."""
    apart()
    z, since = row(room.z, 0), move(row(room.since, 0), 1 - sizes.late)
    for i in range(n):
        asking = row(room.past, i)
        if sizes.gates != PER_CHANNEL:
            gather(asking, row(q, i), q.column, sizes.k)
        past = dot(asking, z, sizes.k, like)
        if sizes.gates == PER_STEP:
            past *= since[i]
        divide_row(row(room.answers, i), past + total(row(room.scores, i), i + 1, like), columns, like)


@inner
def total(x, n, like):
    """Sum of a row."""
    apart()
    total = real(like, 0)
    for j in range(n):
        total += x[j]
    return total


@inner
def divide_row(y, weight, n, like):
    """y over a weight; zero if the weight is."""
    apart()
    for j in range(n):
        y[j] = y[j] / weight if weight != 0 else real(like, 0)


@inner
def memorise(sizes, job, room, n, like):
    """Add the chunk's pairs to what is left of the past."""
    apart()
    z, k, keys, columns = row(room.z, 0), sizes.k, room.rows, room.keys
    keeps = row(room.carried, 0)  # of panels that only gates per channel fill
    if sizes.gates == PER_CHANNEL:
        keys, columns, keeps = room.carried, transposed(room.carried), row(room.decays.start, (n + BLOCK - 1) // BLOCK)
    else:
        fill(keeps, row(room.since, 0)[n], k)
    if sizes.gates == PER_STEP:
        scale_rows(room.values, row(room.pairs, n - 1), n, job.columns)
    if sizes.gates:
        times(z, z, keeps, k)
    if sizes.normalize:
        left = row(room.pairs, n - 1)
        if sizes.gates != PER_STEP:
            fill(left, real(like, 1), n)
        for p in range(k):
            z[p] += along(row(columns, p), columns.column, left, n, like)
    add_transposed(room.S, keeps, keys, room.values, k, job.columns, n, like)


@inner
def along(x, step, y, n, like):
    """x . y for numbers of x that are a step apart."""
    apart()
    total = real(like, 0)
    for j in range(n):
        total += x[j * step] * y[j]
    return total


@inner
def memorise_token(sizes, job, reader, room, S, z, i):
    """One step of the recurrence: the new state, and what it says to a first reader."""
    weights, keeps, k = row(z, 0), row(room.past, 0), row(job.k, i)
    learn_rows(
        row(room.answers, 0), S.data, S.step, keeps, sizes.gates, k, job.k.column, row(room.values, 0),
        row(reader.q, i), reader.q.column, sizes.k, job.columns,
    )  # fmt: skip
    for p in range(sizes.k if sizes.normalize else 0):
        weights[p] = kept(keeps[p], weights[p]) + k[p * job.k.column]


@inner
def kept(keep, x):
    """What is kept of a number: where that is nothing, not even of a NaN."""
    return keep * x if keep != 0 else keep


@inner
def answer_token(sizes, reader, job, room, S, z, group, i, scale_):
    """One step of the recurrence: the answer of the new state; that to a first reader is there."""
    o, q = move(row(reader.o, i), job.start), row(reader.q, i)
    if group:
        recall_rows(o, S.data, S.step, row(room.past, 0), 0, q, reader.q.column, sizes.k, job.columns)
    else:
        copy(o, row(room.answers, 0), job.columns)
    weigh_token(sizes, reader, room, z, o, i, real(scale_, 0), job.columns, scale_)


@inner
def answer_early(sizes, job, reader, room, S, z, i, scale_):
    """One step of the recurrence: the answer of the old state and the token's own bonus."""
    o, q = move(row(reader.o, i), job.start), row(reader.q, i)
    recall_rows(o, S.data, S.step, row(room.past, 0), 0, q, reader.q.column, sizes.k, job.columns)
    mine = own(reader.q, job.k, reader.bonus, i, sizes.k, scale_)
    add_scaled(o, mine, row(room.values, 0), job.columns)
    weigh_token(sizes, reader, room, z, o, i, mine, job.columns, scale_)


@inner
def weigh_token(sizes, reader, room, z, o, i, mine, columns, scale_):
    """An answer times its scale, or over its total weight: ``mine`` and what the memory adds."""
    if sizes.normalize:
        asking = row(room.queries, 0)
        gather(asking, row(reader.q, i), reader.q.column, sizes.k)
        divide_row(o, mine + dot(asking, row(z, 0), sizes.k, scale_), columns, scale_)
    else:
        scale(o, scale_, columns)
