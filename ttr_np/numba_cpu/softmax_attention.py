"""Softmax attention, compiled: blocks of queries meet blocks of pairs in one pass, newest first.

    x = K q scale + bias,    top' = max(top, x),    p = exp(x - top'),    weight' = weight exp(top - top') + sum p,
    o' = o exp(top - top') + p V,    at the end o / weight

Logits stand pairs by queries, so a maximum or a sum over pairs is a row of many queries at once. See
``ttr_np.solvers.softmax_attention`` for the definition and the sources.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..calling import run
from ..notation import CacheState
from ..solvers._cache import append, check_options, empty_cache
from ..solvers._chunks import NO_PAST, output_like
from ..solvers.softmax_attention import scale_of
from ._attention import pairs_of, weigh, width
from ._cache import compiled
from ._compile import apart, inner
from ._gates import exp
from ._panels import (
    LINE,
    ROWS,
    Matrix,
    add_scaled,
    add_transposed,
    below,
    dot,
    fill,
    lanes,
    load,
    load_transposed,
    matrix,
    move,
    multiply_transposed,
    pointer,
    real,
    row,
    scale,
)
from ._powers import LOG2E
from ._rooms import panels_by_name
from ._sequences import lay_out
from ._soon import note, notebook, notes_shape, soon
from ._threads import share

__all__ = ["softmax_attention"]

PAIRS = 96  # in a block: keys and values stay in the second cache while all queries of a block pass
STRIP = math.lcm(ROWS, LINE // 4)  # queries whose logits stay in the first cache, whole tiles either way
QUERIES = 192  # in a block, a multiple of STRIP
Q, K, V, PAST_K, PAST_V, GATE, O, ORDER, LEFT, SINKS, FIRST, END = range(12)


def softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    log_decay: Any = None,
    **common: Any,
) -> Any:
    """Softmax attention; see ``ttr_np.softmax_attention``."""
    check_options(q, log_decay, causal, window, sinks)
    options = {"scale": scale, "causal": bool(causal), "window": window, "sinks": sinks}
    options["keep"] = bool(common.get("output_final_state"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    return run(core, "softmax_attention", arrays, options, start=empty_cache, **common)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    sinks: int,
    keep: bool,
    state: CacheState,
) -> tuple[np.ndarray, CacheState]:
    """Lay out the sequences and share their blocks of queries among threads; the cache grows only to be returned."""
    o = output_like(q, v, state.k)
    pairs = pairs_of(state, q.shape[-2], mask, causal, window, sinks)
    layout = lay_out(
        state.k.shape[:-2], o.shape[:-2], (q, 2), (k, 2), (v, 2), (state.k, 2), (state.v, 2), (log_decay, 1), (o, 2),
        (pairs.order, 1), (pairs.left, 1), (pairs.sinks, 1), (pairs.first, 1), (pairs.end, 1),
    )  # fmt: skip
    (t, d), w = q.shape[-2:], v.shape[-1]
    memories, groups = layout.places.shape[1:]
    tokens = min(max(t, 1), QUERIES)
    together = max(min(groups, QUERIES // tokens), 1)  # short sequences of one group share a block
    gated = log_decay is not None or bool(np.any(pairs.left != 0))
    sizes = (t, d, w, pairs.cached, tokens, together, gated)
    jobs = memories * -(-groups // together) * -(-t // tokens)
    room = [(d, QUERIES), (d, PAIRS), (PAIRS, w), (PAIRS, w), (PAIRS, STRIP), (QUERIES, w)]
    room += [(6, QUERIES), (1, PAIRS), (2, QUERIES), (1, d), notes_shape(PAIRS, 2)]
    factor = float(scale_of(scale, q.astype(np.float64))) * LOG2E
    cost = pairs.seen * memories * groups * (d + w)
    share(kernel, jobs, cost, (o.dtype, room), layout, sizes, factor, o.dtype.type(0))
    return o, append(state, k, v, log_decay, mask, window, sinks) if keep else state


class Room(NamedTuple):
    """Scratch of one thread, for a block of r queries and one of n pairs."""

    queries: Matrix  # k x r
    keys: Matrix  # k x n
    values: Matrix  # n x v
    bad: Matrix  # n x v: 1 where a value is not finite
    logits: Matrix  # n x strip
    answers: Matrix  # r x v
    lines: Matrix  # 6 x r, see below
    left: Matrix  # 1 x n: what is left of older pairs at the first query
    decay: float  # r numbers: sum of the gates after the pair at hand
    query: Matrix  # 1 x k: of one token
    notes: int  # addresses of the keys and values that come next


panels_of = panels_by_name(Room)


# Rows of Room.lines. Highest logit so far, in powers of two; weight so far; what is left of earlier weights and
# answers; what is left of older pairs; the first pair of the block that is seen, and the one after the last.
TOP, WEIGHT, SHRINK, SINCE, LOW, HIGH = range(6)


class Block(NamedTuple):
    """A block of queries, steps low to high of some sequences, and the slots of their memory."""

    low: int
    high: int
    queries: int
    order: Any  # pointer to the row of each slot
    first: Any  # pointers to the slots seen from each step, see Pairs
    end: Any
    sinks: int
    own: int  # first slot that is memorised at step low or later
    gates: Matrix
    decays: bool  # whether there are gates
    past: Any  # pointer to what was left of cached pairs


@compiled
def kernel(table, places, steps, sizes, factor, like, begin, stop):
    """Jobs begin to stop: one block of queries each, the longest pasts first."""
    t, d, w, cached, tokens, together, gated = sizes
    room = panels_of(table, like)
    notebook(room.notes)
    blocks, parts = (t + tokens - 1) // tokens, (places.shape[2] + together - 1) // together
    for job in range(begin, stop):
        low = (blocks - 1 - job % blocks) * tokens
        part, memory = job // blocks % parts * together, job // (blocks * parts)
        block = block_of(places, steps, sizes, memory, part, low, like)
        take_queries(room, block, places, steps, sizes, memory, part, factor, like)
        k = matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], like)
        v = matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], like)
        past_k = matrix(places[PAST_K, memory, 0], steps[PAST_K, 0], steps[PAST_K, 1], like)
        past_v = matrix(places[PAST_V, memory, 0], steps[PAST_V, 0], steps[PAST_V, 1], like)
        slots, oldest, left = block.end[block.high - 1], block.first[low], 0.0
        alone = t == 1 and not ages(block, cached)
        for start in range((slots - 1) // PAIRS * PAIRS, -1, -PAIRS):
            rows = min(PAIRS, slots - start)
            if gated:
                left = age(room, block, start, rows, cached, left)
            if alone and start >= oldest and meet_one_by_one(room, block, past_k, past_v, start, rows, sizes, like):
                continue
            if start + rows > oldest or start < block.sinks:
                take_pairs(room, block, past_k, past_v, k, v, cached, start, rows, d, w)
                bad = mark(room, rows, w, like)
                count = note_pairs(room.notes, block, past_k, past_v, k, v, cached, start - PAIRS)
                coming = soon(room.notes, count, max(d, w), like)
                for c in range(0, block.queries, STRIP):
                    meet(room, block, coming, start, rows, c, min(STRIP, block.queries - c), sizes, bad, like)
        give_answers(room, block, places, steps, sizes, memory, part, like)


@inner
def block_of(places, steps, sizes, memory, part, low, like):
    """The queries of one job."""
    apart()
    t, cached, tokens, together = sizes[0], sizes[3], sizes[4], sizes[5]
    high = min(low + tokens, t)
    one = np.int64(1)
    order, end = pointer(places[ORDER, memory, 0], one), pointer(places[END, memory, 0], one)
    own = end[low - 1] if low > 0 else 0
    while low == 0 and own < end[t - 1] and order[own] < cached:
        own += 1
    return Block(
        low, high, (min(part + together, places.shape[2]) - part) * (high - low), order,
        pointer(places[FIRST, memory, 0], one), end, pointer(places[SINKS, memory, 0], one)[0], own,
        matrix(places[GATE, memory, 0], steps[GATE, 0], 1, like), places[GATE, memory, 0] != 0,
        pointer(places[LEFT, memory, 0], 0.0),
    )  # fmt: skip


@inner
def take_queries(room, block, places, steps, sizes, memory, part, factor, like):
    """Queries of one block as columns, sequence by sequence, in powers of two; nothing is seen yet."""
    apart()
    d, w, n, span = sizes[1], sizes[2], block.queries, block.high - block.low
    for c in range(0, n, span):
        q = matrix(places[Q, memory, part + c // span], steps[Q, 0], steps[Q, 1], like)
        load_transposed(Matrix(move(room.queries.data, c), room.queries.step, 1), q, block.low, span, d)
    for j in range(d):
        query = row(room.queries, j)
        for c in range(n):
            query[c] = real(like, query[c] * factor)
    fill(row(room.lines, TOP), real(like, -np.inf), n)
    fill(row(room.lines, WEIGHT), like, n)
    fill(room.decay, 0.0, n)
    for c in range(n):
        fill(row(room.answers, c), like, w)


@inner
def gate_of(block, slot, cached):
    """Gate of one slot; 0 where there is none."""
    token = block.order[slot] - cached
    gate = np.float64(row(block.gates, token)[0]) if block.decays and token >= 0 else 0.0
    return NO_PAST if gate < NO_PAST else gate  # noqa: FURB136 - max could drop a NaN


@inner
def age(room, block, start, rows, cached, left):
    """What the gates have left of the older pairs of a block at the first query; newest first."""
    apart()
    line = row(room.left, 0)
    for r in range(min(rows, block.own - start) - 1, -1, -1):
        source = block.order[start + r]
        total = left if source >= cached else left + block.past[source]
        line[r] = -np.inf if total < NO_PAST / 2 else total * LOG2E
        left += gate_of(block, start + r, cached)
    return left


@inner
def take_pairs(room, block, past_k, past_v, k, v, cached, start, rows, d, w):
    """Keys of some slots as columns, values as rows; as many at a time as lie side by side."""
    apart()
    order, r = block.order, 0
    while r < rows:
        first, count = order[start + r], 1
        while r + count < rows and order[start + r + count] == first + count != cached:
            count += 1
        keys, values = Matrix(move(room.keys.data, r), room.keys.step, 1), below(room.values, r)
        if first < cached:
            load_transposed(keys, past_k, first, count, d)
            load(values, past_v, first, count, 0, w)
        else:
            load_transposed(keys, k, first - cached, count, d)
            load(values, v, first - cached, count, 0, w)
        r += count


@inner
def note_pairs(notes, block, past_k, past_v, k, v, cached, start):
    """Where the keys and values of some slots lie, as if side by side: other rows than those do no harm."""
    if start < 0:
        return 0
    first = block.order[start]
    if first < cached:
        return note(notes, note(notes, 0, past_k, 0, first, PAIRS), past_v, 0, first, PAIRS)
    return note(notes, note(notes, 0, k, 0, first - cached, PAIRS), v, 0, first - cached, PAIRS)


@inner
def mark(room, rows, w, like):
    """Whether a value is not finite. Those are marked, and zero in products."""
    apart()
    total, values = like, room.values.data
    for j in range(rows * room.values.step):  # behind the columns of a row are zeros: one sum, not one for each row
        total += values[j] * like
    if total == 0:
        return False
    for r in range(rows):
        values, bad = row(room.values, r), row(room.bad, r)
        for j in range(w):
            bad[j] = not math.isfinite(values[j])
            values[j] = like if bad[j] != 0 else values[j]
    return True


@inner
def ages(block, cached):
    """Whether anything has decayed, or will, in the memory of a block."""
    apart()
    faint = 0
    for j in range(cached):
        faint += block.past[j] != 0
    return block.decays or faint > 0


@inner
def meet_one_by_one(room, block, k, v, start, rows, sizes, like):
    """The queries of one token look at cached pairs that all of them see, where these lie: False if they cannot.

    A product of a few rows with many is bound by memory, and tiles would copy what they then multiply by zeros.
    """
    d, w, cached = sizes[1], sizes[2], sizes[3]
    first, last = block.order[start], block.order[start + rows - 1]
    if last - first != rows - 1 or last >= cached or k.column != 1 or v.column != 1:
        return False
    keys, values = below(k, first), below(v, first)
    if not all_finite(values, rows, w, like):
        return False
    for c in range(block.queries):
        look(room, keys, values, rows, c, d, w, like)
    return True


@inner
def all_finite(x, rows, columns, like):
    """Whether all numbers of some rows are finite."""
    apart()
    total = like
    for r in range(rows):
        numbers = row(x, r)
        for j in range(columns):
            total += numbers[j] * like
    return total == 0


@inner
def look(room, keys, values, rows, c, d, w, like):
    """One query, pair by pair."""
    apart()
    query, line, answer = row(room.query, 0), room.logits.data, row(room.answers, c)
    tops, weights = row(room.lines, TOP), row(room.lines, WEIGHT)
    for j in range(d):
        query[j] = row(room.queries, j)[c]
    for r in range(rows):
        line[r] = dot(row(keys, r), query, d, like)
    top = tops[c]
    for r in range(rows):
        top = line[r] if line[r] > top else top  # noqa: FURB136 - never a NaN
    shift, total = top if top > -np.inf else like, like
    kept = exp((tops[c] - shift) * real(like, 1 / LOG2E))
    for r in range(rows):
        line[r] = exp((line[r] - shift) * real(like, 1 / LOG2E))
        total += line[r]
    tops[c], weights[c] = top, weights[c] * kept + total
    scale(answer, kept, w)
    for r in range(rows):
        add_scaled(answer, line[r], row(values, r), w)


@inner
def meet(room, block, coming, start, rows, low, columns, sizes, bad, like):
    """One strip of queries looks at one block of pairs, and asks for its share of the next one."""
    d, w, cached, gated = sizes[1], sizes[2], sizes[3], sizes[6]
    rows, all_seen = sight(room, block, start, rows, low, columns, gated)
    if rows == 0:
        return
    queries = Matrix(move(room.queries.data, low), room.queries.step, 1)
    size, column = lanes(like), PAIRS // ROWS  # queries of a tile, and tiles of all pairs with those
    tile, tiles = low // size * column, (block.queries + size - 1) // size * column
    multiply_transposed(room.logits, room.keys, queries, rows, columns, d, coming, tile, tiles, like)
    if gated:
        decay(room, block, start, rows, low, columns, cached)
    if not all_seen:
        hide(room, rows, low, columns, block.sinks - start, like)
    if bad:
        spoil(room, rows, low, columns, w)
    for c in range(low, low + columns, width(like)):
        top, weight, left = row(room.lines, TOP), row(room.lines, WEIGHT), row(room.lines, SHRINK)
        weigh(move(room.logits.data, c - low), room.logits.step, rows, move(top, c), move(weight, c), move(left, c))
    kept = move(row(room.lines, SHRINK), low)
    add_transposed(below(room.answers, low), kept, room.logits, room.values, columns, w, rows, like)


@inner
def sight(room, block, start, rows, low, columns, gated):
    """Which pairs of a block each query of a strip sees; how many rows to look at, and whether all see them all."""
    apart()
    old = start + rows <= block.own or not gated
    if old and start + rows <= block.end[block.low] and block.first[block.high - 1] <= start:
        return rows, True
    first, end = row(room.lines, LOW), row(room.lines, HIGH)
    span = block.high - block.low
    deepest, shallowest, oldest, newest = 0, rows, rows, 0
    for c in range(low, low + columns):
        i = block.low + c % span
        one, other = min(max(block.first[i] - start, 0), rows), min(max(block.end[i] - start, 0), rows)
        first[c], end[c] = one, other
        deepest, shallowest = max(deepest, other), min(shallowest, other)
        oldest, newest = min(oldest, one), max(newest, one)
    if oldest == rows and start >= block.sinks and (old or block.sinks == 0):  # sinks forget by gates that nobody sees
        deepest = 0
    return deepest, shallowest >= deepest and newest == 0


@inner
def decay(room, block, start, rows, low, columns, cached):
    """Add to the logits what the gates have left of each pair; nothing left is minus infinity, whatever the logit.

    Newest pair first: its gate then joins the sums of the queries that came at its time or later.
    """
    apart()
    total, end = move(room.decay, low), move(row(room.lines, HIGH), low)
    since, left = move(row(room.lines, SINCE), low), row(room.left, 0)
    older = max(min(rows, block.own - start), 0)
    for r in range(rows - 1, older - 1, -1):
        logits, gate = row(room.logits, r), gate_of(block, start + r, cached)
        for c in range(columns):
            logits[c] = -np.inf if total[c] < NO_PAST / 2 else logits[c] + total[c] * LOG2E
            total[c] += gate if end[c] > r else 0.0
    for c in range(columns):
        since[c] = -np.inf if total[c] < NO_PAST / 2 else total[c] * LOG2E
    for r in range(older):
        logits = row(room.logits, r)
        for c in range(columns):
            bias = since[c] + left[r]
            logits[c] = bias if bias == -np.inf else logits[c] + bias


@inner
def hide(room, rows, low, columns, sinks, like):
    """Minus infinity, whatever (even NaN) stands there, where a query must not look."""
    apart()
    first, end = move(row(room.lines, LOW), low), move(row(room.lines, HIGH), low)
    for r in range(rows):
        logits, place, sink = row(room.logits, r), real(like, r), r < sinks
        for c in range(columns):
            hidden = (place >= end[c]) | ((place < first[c]) & (not sink))
            logits[c] = real(like, -np.inf) if hidden else logits[c]


@inner
def spoil(room, rows, low, columns, w):
    """A value that is not finite turns to NaN those queries that see it, and no others."""
    apart()
    for r in range(rows):
        bad, logits = row(room.bad, r), row(room.logits, r)
        for j in range(w):
            if bad[j] != 0:
                for c in range(columns):
                    if logits[c] != -np.inf:
                        row(room.answers, low + c)[j] = np.nan


@inner
def give_answers(room, block, places, steps, sizes, memory, part, like):
    """Means of one block of queries; zero where nothing is seen."""
    apart()
    w, span = sizes[2], block.high - block.low
    weight = row(room.lines, WEIGHT)
    for c in range(block.queries):
        o = row(matrix(places[O, memory, part + c // span], steps[O, 0], 1, like), block.low + c % span)
        answer = row(room.answers, c)
        for j in range(w):
            o[j] = answer[j] / weight[c] if weight[c] != 0 else answer[j]
