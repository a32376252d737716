"""Diagonal plus low rank, compiled: chunks as matrix products and one triangular solve, one memory per job.

    readings = (I - strictly lower (a . b))^-1 (strictly lower (a . k) v + a S)
    o = q S + lower (q . k) v + lower (q . b) readings,    S = S + k^T v + b^T readings

with every product decayed. See ``ttr_np.solvers.dplr`` for the recurrence and the sources.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..calling import run
from ..notation import DplrState
from ..solvers._chunks import output_like
from ._cache import compiled
from ._channels import BLOCK, Channels, carry_keys, channel_decays, channel_products, channel_shapes, meetings
from ._compile import apart, inner, spliced
from ._gates import exp, step_decays, weigh
from ._panels import (
    Matrix,
    add_scaled,
    below,
    clean_until,
    fill,
    full,
    gather,
    load,
    load_transposed,
    lower,
    matrix,
    move,
    multiply,
    real,
    row,
    scale,
    scale_rows,
    store,
    transposed,
    triangle,
)
from ._rooms import panels_by_name
from ._sequences import NO_GATES, PER_CHANNEL, PER_STEP, column_blocks, lay_out
from ._threads import share
from ._triangles import solve_unit_lower

__all__ = ["dplr"]

CHUNK = 32  # whole blocks of 16, whole tiles of 4 and 6 or of 8 and 12 rows; longer ones take more products
Q, K, V, A, B, GATE, STATE, O = range(8)


def dplr(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    *,
    log_decay: Any = None,
    scale: float = 1.0,
    **common: Any,
) -> Any:
    """Diagonal plus low rank; see ``ttr_np.dplr``."""
    arrays = {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay}
    return run(core, "dplr", arrays, {"scale": scale}, **common)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    log_decay: np.ndarray | None,
    *,
    scale: float,
    state: DplrState,
) -> tuple[np.ndarray, DplrState]:
    """Lay out the sequences and share them among threads."""
    (S,) = state
    o = output_like(q, v, S)
    gates = NO_GATES if log_decay is None else PER_CHANNEL if log_decay.ndim == q.ndim else PER_STEP
    layout = lay_out(
        S.shape[:-2], o.shape[:-2], (q, 2), (k, 2), (v, 2), (a, 2), (b, 2), (log_decay, max(gates, 1)), (S, 2), (o, 2)
    )
    memories, groups = layout.places.shape[1:]
    (t, d), w = q.shape[-2:], v.shape[-1]
    blocks = column_blocks(memories, w)
    width, chunk = -(-w // blocks), max(1, min(CHUNK, t))
    sizes = Sizes(t, d, w, chunk, blocks, width, gates)
    scratch, cost = (S.dtype, shapes(d, width, chunk, gates)), t * d * w * memories * (3 + groups)
    share(kernel, memories * blocks, cost, scratch, layout, sizes, S.dtype.type(scale))
    return o, DplrState(S)


class Sizes(NamedTuple):
    """What the kernel must know besides the arrays."""

    t: int
    k: int
    v: int
    chunk: int
    blocks: int  # of value columns
    width: int  # columns of a block
    gates: int  # none, per step, per channel


class Job(NamedTuple):
    """One memory and the block of columns that is worked on."""

    k: Any
    v: Any
    a: Any
    b: Any
    gates: Any
    start: int  # first column of the block
    columns: int
    memory: int


class Side(NamedTuple):
    """One kind of keys of a chunk: those of the pairs, or those that readings are written to."""

    keys: Matrix  # k x c, as often as they are met
    carried: Matrix  # c x k: decayed to the chunk's end
    rows: Matrix  # c x k


class Room(NamedTuple):
    """Panels of one thread, for chunks of c tokens."""

    S: Matrix  # k x v
    values: Matrix  # c x v
    readings: Matrix  # c x v
    past: Matrix  # c x k: left factors decayed to the chunk's start
    left: Matrix  # c x k
    scores: Matrix  # c x c
    answers: Matrix  # c x v
    pairs: Matrix  # c x c: decays
    since: Matrix  # 1 x (c + 1): decays
    stored: Side
    written: Side
    decays: Channels


panels_of = panels_by_name(Room)


def shapes(k: int, v: int, c: int, gates: int) -> list[tuple[int, int]]:
    """Shapes of the panels of ``Room``."""
    room = [(k, v), (c, v), (c, v), (c, k), (c, k), (c, c), (c, v), (c, c), (1, c + 1)]
    return room + 2 * [(k * meetings(c), c), (c, k), (c, k)] + channel_shapes(c, k if gates == PER_CHANNEL else 0)


@compiled
def kernel(table, places, steps, sizes, scale_, first, last):
    """Jobs first to last: one memory and one block of its value columns each."""
    room, unit = panels_of(table, scale_), 1
    for number in range(first, last):
        job = job_of(places, steps, sizes, number, scale_)
        state = matrix(places[STATE, job.memory, 0], sizes.v, unit, scale_)
        load(room.S, state, 0, sizes.k, job.start, job.columns)
        for low in range(0, sizes.t, sizes.chunk):
            high = min(low + sizes.chunk, sizes.t)
            run_chunk(places, steps, sizes, job, room, low, high, scale_)
        store(state, 0, sizes.k, job.start, job.columns, room.S)


@spliced
def job_of(places, steps, sizes, number, like):
    """What one job memorises."""
    memory, start = number // sizes.blocks, number % sizes.blocks * sizes.width
    return Job(
        matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], like),
        matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], like),
        matrix(places[A, memory, 0], steps[A, 0], steps[A, 1], like),
        matrix(places[B, memory, 0], steps[B, 0], steps[B, 1], like),
        matrix(places[GATE, memory, 0], steps[GATE, 0], steps[GATE, 1], like),
        start,
        min(sizes.width, sizes.v - start),
        memory,
    )


@spliced
def run_chunk(places, steps, sizes, job, room, low, high, scale_):
    """One chunk: as products up to the first bad number, which they would spread, and token by token from there."""
    clean = clean_tokens(sizes, job, low, high, scale_)
    n = clean - low if high - low > 1 else 0  # one token is cheaper as one
    if n:
        prepare(sizes, job, room, low, n, scale_)
        read(sizes, job, room, low, n, scale_)
        for group in range(places.shape[2]):
            q = matrix(places[Q, job.memory, group], steps[Q, 0], steps[Q, 1], scale_)
            answer(sizes, job, below(q, low), room, n, scale_)
            o = matrix(places[O, job.memory, group], sizes.v, 1, scale_)
            store(o, low, n, job.start, job.columns, room.answers)
        memorise(sizes, job, room, n, scale_)
    for i in range(low + n, high):
        memorise_token(sizes, job, room, i, scale_)
        for group in range(places.shape[2]):
            q = matrix(places[Q, job.memory, group], steps[Q, 0], steps[Q, 1], scale_)
            o = matrix(places[O, job.memory, group], sizes.v, 1, scale_)
            answer_token(sizes, job, below(q, i), move(row(o, i), job.start), room, scale_)


@inner
def clean_tokens(sizes, job, low, high, like):
    """The first token of the rows low to high whose numbers a product would spread to other tokens, or ``high``."""
    apart()
    high = min(clean_until(job.k, low, high, sizes.k, 0, like), clean_until(job.v, low, high, sizes.v, 0, like))
    high = min(high, clean_until(job.a, low, high, sizes.k, 0, like))
    high = min(high, clean_until(job.b, low, high, sizes.k, 0, like))
    if sizes.gates:
        high = min(high, clean_until(job.gates, low, high, sizes.k if sizes.gates == PER_CHANNEL else 1, 1, like))
    return high


@inner
def prepare(sizes, job, room, low, n, like):
    """Keys as rows and columns, values, decays."""
    apart()
    load(room.values, job.v, low, n, job.start, job.columns)
    if sizes.gates == PER_CHANNEL:
        channel_decays(job.gates, low, n, sizes.k, room.decays, like)
        load(room.stored.rows, job.k, low, n, 0, sizes.k)
        load(room.written.rows, job.b, low, n, 0, sizes.k)
        carry_keys(room.stored.keys, room.stored.carried, room.stored.rows, n, sizes.k, room.decays)
        carry_keys(room.written.keys, room.written.carried, room.written.rows, n, sizes.k, room.decays)
    else:
        load_transposed(room.stored.keys, job.k, low, n, sizes.k)
        load_transposed(room.written.keys, job.b, low, n, sizes.k)
        if sizes.gates:
            step_decays(job.gates, low, n, room.pairs, row(room.since, 0), like)


@inner
def products(sizes, x, side, room, n, late, like):
    """Scores of the rows of x with one kind of keys; ``past`` is x, decayed to the start if gates are per channel."""
    apart()
    if sizes.gates == PER_CHANNEL:
        load(room.left, x, 0, n, 0, sizes.k)
        channel_products(room.scores, room.past, side.keys, room.left, side.rows, n, sizes.k, room.decays, late, like)
    else:
        multiply(room.scores, x, side.keys, n, n, sizes.k, real(like, 1), real(like, 0), triangle)
        weigh(room.scores, room.pairs, n, sizes.gates, late, like)


@inner
def recall(sizes, job, into, x, room, n, late, like):
    """What the past says to the rows of x, after ``products`` of x."""
    apart()
    past = room.past if sizes.gates == PER_CHANNEL else x
    multiply(into, past, room.S, n, job.columns, sizes.k, real(like, 1), real(like, 0), full)
    if sizes.gates == PER_STEP:
        scale_rows(into, move(row(room.since, 0), 1 - late), n, job.columns)


@inner
def read(sizes, job, room, low, n, like):
    """Every token's reading of the state before its own step."""
    apart()
    a, one = below(job.a, low), real(like, 1)
    products(sizes, a, room.stored, room, n, 1, like)
    recall(sizes, job, room.readings, a, room, n, 1, like)
    multiply(room.readings, room.scores, room.values, n, job.columns, n, one, one, lower)
    products(sizes, a, room.written, room, n, 1, like)
    for i in range(n):
        scale(row(room.scores, i), real(like, -1), i)
    solve_unit_lower(room.scores, room.readings, n, job.columns)


@inner
def answer(sizes, job, q, room, n, scale_):
    """Answers to one sequence of queries: what the past, the chunk's pairs and its readings say."""
    apart()
    products(sizes, q, room.stored, room, n, 0, scale_)
    recall(sizes, job, room.answers, q, room, n, 0, scale_)
    multiply(room.answers, room.scores, room.values, n, job.columns, n, scale_, scale_, lower)
    products(sizes, q, room.written, room, n, 0, scale_)
    multiply(room.answers, room.scores, room.readings, n, job.columns, n, scale_, real(scale_, 1), lower)


@inner
def memorise(sizes, job, room, n, like):
    """Add the chunk's pairs and readings to what is left of the past."""
    apart()
    pair_keys, read_keys, keep, one = room.stored.keys, room.written.keys, real(like, 1), real(like, 1)
    if sizes.gates == PER_CHANNEL:
        pair_keys, read_keys = transposed(room.stored.carried), transposed(room.written.carried)
        scale_rows(room.S, row(room.decays.start, (n + BLOCK - 1) // BLOCK), sizes.k, job.columns)
    elif sizes.gates:
        keep = row(room.since, 0)[n]
        scale_rows(room.values, row(room.pairs, n - 1), n, job.columns)
        scale_rows(room.readings, row(room.pairs, n - 1), n, job.columns)
    multiply(room.S, pair_keys, room.values, sizes.k, job.columns, n, one, keep, full)
    multiply(room.S, read_keys, room.readings, sizes.k, job.columns, n, one, one, full)


@inner
def memorise_token(sizes, job, room, i, like):
    """One step of the recurrence: the new state."""
    apart()
    v, reading = row(room.values, 0), row(room.readings, 0)
    gather(v, move(row(job.v, i), job.start * job.v.column), job.v.column, job.columns)
    fill(reading, real(like, 0), job.columns)
    for p in range(sizes.k):
        add_scaled(reading, row(job.a, i)[p * job.a.column], row(room.S, p), job.columns)
    for p in range(sizes.k):
        if sizes.gates:
            scale(row(room.S, p), exp(row(job.gates, i)[p * job.gates.column]), job.columns)
        add_scaled(row(room.S, p), row(job.b, i)[p * job.b.column], reading, job.columns)
        add_scaled(row(room.S, p), row(job.k, i)[p * job.k.column], v, job.columns)


@inner
def answer_token(sizes, job, q, o, room, scale_):
    """One step of the recurrence: the answer."""
    apart()
    fill(o, real(scale_, 0), job.columns)
    for p in range(sizes.k):
        add_scaled(o, q.data[p * q.column], row(room.S, p), job.columns)
    scale(o, scale_, job.columns)
