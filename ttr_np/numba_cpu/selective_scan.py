"""Selective scan (Mamba), compiled: token by token, many channels of the memory side by side.

    h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t^T,    o_t = h_t C_t + D u_t

Every entry decays at its own rate, so there is no product of matrices in it: a step is one exponential and two
multiplications for each entry. See ``ttr_np.solvers.selective_scan`` for the sources.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..calling import run
from ..notation import SelectiveScanState
from ..solvers.selective_scan import output
from ._cache import compiled
from ._compile import apart, inner
from ._lanes import ask_for
from ._panels import (
    add_scaled,
    copy,
    fill,
    gather,
    load_transposed,
    matrix,
    move,
    panel,
    real,
    row,
    scale,
    times,
)
from ._powers import LOG2E, exp2
from ._sequences import lay_out
from ._threads import share
from ._vectors import Vectors, per_vector

__all__ = ["selective_scan"]

CHANNELS = 64  # of a job: its memory and rates stay in the first cache
AHEAD = 4  # steps, the time in which a line of numbers arrives
EXPONENTIAL = 16  # multiplications in the time of one
U, DELTA, RATES, B, C, DIRECT, STATE, O = range(8)


def selective_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, *, D: Any = None, **common: Any) -> Any:
    """Selective scan; see ``ttr_np.selective_scan``."""
    arrays = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}
    return run(core, "selective_scan", arrays, **common)


def core(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None,
    *,
    state: SelectiveScanState,
) -> tuple[np.ndarray, SelectiveScanState]:
    """Lay out the sequences and share their blocks of channels among threads."""
    (h,) = state
    o = output(u, C, D, h)
    layout = lay_out(
        h.shape[:-2], o.shape[:-2], (u, 2), (delta, 2), (A, 2), (B, 2), (C, 2), (D, 1), (h, 2), (o, 2)
    )  # fmt: skip
    (t, v), n = u.shape[-2:], A.shape[-1]
    memories, groups = layout.places.shape[1:]
    blocks = -(-v // CHANNELS)
    room = [(n, CHANNELS), (n, CHANNELS), (5, CHANNELS)]
    cost = memories * t * v * n * (EXPONENTIAL + groups)
    share(kernel, memories * blocks, cost, (h.dtype, room), layout, (t, v, n), h.dtype.type(0))
    return o, state


class Lines(NamedTuple):
    """One step of the channels of a job."""

    u: Any
    delta: Any
    entered: Any  # delta u
    o: Any
    D: Any


@compiled
def kernel(table, places, steps, sizes, like, begin, stop):
    """Jobs begin to stop: one memory and one block of its channels each."""
    t, v, n = sizes
    h, rates, lines = panel(table, 0, like), panel(table, 1, like), panel(table, 2, like)
    line = Lines(row(lines, 0), row(lines, 1), row(lines, 2), row(lines, 3), row(lines, 4))
    blocks = (v + CHANNELS - 1) // CHANNELS
    for job in range(begin, stop):
        memory, low = job // blocks, job % blocks * CHANNELS
        channels = min(CHANNELS, v - low)
        state = matrix(places[STATE, memory, 0], n, 1, like)
        load_transposed(h, state, low, channels, n)
        A = matrix(places[RATES, memory, 0], steps[RATES, 0], steps[RATES, 1], like)
        load_transposed(rates, A, low, channels, n)
        for j in range(n):
            scale(row(rates, j), real(like, LOG2E), channels)
        for i in range(t):
            advance(h, rates, line, places, steps, memory, i, low, channels, n, like)
            for group in range(places.shape[2]):
                if group:
                    see(h, line, places, steps, memory, group, i, channels, n, like)
                answer(line, places, steps, memory, group, i, low, channels, like)
        for c in range(channels):
            for j in range(n):
                row(state, low + c)[j] = row(h, j)[c]


@inner
def at(places, steps, array, memory, group, i, low, like):
    """Pointer to one number of a step, and the stride from there."""
    step = steps[array, 1]
    return move(row(matrix(places[array, memory, group], steps[array, 0], step, like), i), low * step), step


@inner
def ask_line(x, step, ahead, channels, like):
    """Ask for the line of a later step: lines of many channels are so far apart that no machine foresees them."""
    for c in range(0, channels, per_vector(like)):
        ask_for(move(x, ahead + c * step))


@inner
def advance(h, rates, line, places, steps, memory, i, low, channels, n, like):
    """One step of the memory."""
    apart()
    u, u_step = at(places, steps, U, memory, 0, i, low, like)
    delta, delta_step = at(places, steps, DELTA, memory, 0, i, low, like)
    b, b_step = at(places, steps, B, memory, 0, i, 0, like)
    ask_line(u, u_step, AHEAD * steps[U, 0], channels, like)
    ask_line(delta, delta_step, AHEAD * steps[DELTA, 0], channels, like)
    gather(line.u, u, u_step, channels)
    gather(line.delta, delta, delta_step, channels)
    times(line.entered, line.delta, line.u, channels)
    c, c_step = at(places, steps, C, memory, 0, i, 0, like)
    step_all(h.data, rates.data, h.step, line.delta, line.entered, line.o, b, b_step, c, c_step, channels, n)


@intrinsic
def step_all(
    typingctx: Any, h: Any, rates: Any, step: Any, delta: Any, entered: Any, o: Any, b: Any, b_step: Any, c: Any,
    c_step: Any, channels: Any, n: Any,
) -> Any:  # fmt: skip
    """h = 2^(delta rate) h + entered b and o = c . h, whole vectors of channels; rates are in powers of two."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        h, rates, step, delta, entered, o, b, b_step, c, c_step, channels, n = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)

        def everywhere(base: Any, offset: Any) -> Any:
            return vectors.everywhere(builder.load(builder.gep(base, [offset])))

        (total,) = vectors.totals(1)
        with cgutils.for_range(builder, vectors.holding(channels), intp=word) as outer:
            first = vectors.start(outer.index)
            delta_v, entered_v = (vectors.load_from(x, first) for x in (delta, entered))
            builder.store(vectors.constant(0.0), total)
            with cgutils.for_range(builder, n, intp=word) as loop:
                at = builder.add(builder.mul(loop.index, step), first)
                power = builder.fmul(delta_v, vectors.load_from(rates, at))
                new = builder.fmul(exp2(vectors, power), vectors.load_from(h, at))
                new = vectors.multiply_add(entered_v, everywhere(b, builder.mul(loop.index, b_step)), new)
                vectors.store_to(new, h, at)
                vectors.accumulate(total, everywhere(c, builder.mul(loop.index, c_step)), new)
            vectors.store_to(builder.load(total), o, first)
        return context.get_dummy_value()

    word = types.intp
    return types.void(h, h, word, h, h, h, h, word, h, word, word, word), codegen


@inner
def see(h, line, places, steps, memory, group, i, channels, n, like):
    """What another reader than the first sees of the memory at one step."""
    apart()
    reader, step = at(places, steps, C, memory, group, i, 0, like)
    fill(line.o, like, channels)
    for j in range(n):
        add_scaled(line.o, reader[j * step], row(h, j), channels)


@inner
def answer(line, places, steps, memory, group, i, low, channels, like):
    """What was seen, and the direct path."""
    apart()
    o = move(row(matrix(places[O, memory, group], steps[O, 0], 1, like), i), low)
    ask_line(o, 1, AHEAD * steps[O, 0], channels, like)
    copy(o, line.o, channels)
    if places[DIRECT, memory, group]:
        direct = row(matrix(places[DIRECT, memory, group], 0, 1, like), 0)
        gather(line.D, move(direct, low * steps[DIRECT, 0]), steps[DIRECT, 0], channels)
        times(line.D, line.D, line.u, channels)
        add_scaled(o, real(like, 1), line.D, channels)
