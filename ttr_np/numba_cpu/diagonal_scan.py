"""Diagonal scan, compiled: token by token, many channels side by side, real or complex.

    h_t = exp(log_decay_t + i phase_t) h_{t-1} + x_t

See ``ttr_np.solvers.diagonal_scan`` for the sources.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from ..calling import run
from ..notation import DiagonalScanState
from ._gates import exp
from ._panels import FAST, apart, copy, gather, inner, matrix, move, panel, row
from ._sequences import lay_out
from ._threads import share

__all__ = ["diagonal_scan"]

CHANNELS = 128  # of a job
EXPONENTIAL, ANGLE = 16, 64  # multiplications in the time of one
X, GATE, PHASE, STATE, O = range(5)  # noqa: E741


def diagonal_scan(x: Any, log_decay: Any, *, phase: Any = None, **common: Any) -> Any:
    """Diagonal scan; see ``ttr_np.diagonal_scan``."""
    return run(core, "diagonal_scan", {"x": x, "log_decay": log_decay, "phase": phase}, **common)


def core(
    x: np.ndarray, log_decay: np.ndarray, phase: np.ndarray | None, *, state: DiagonalScanState
) -> tuple[np.ndarray, DiagonalScanState]:
    """Lay out the sequences and share their blocks of channels among threads."""
    (h,) = state
    o = np.empty(h.shape[:-1] + x.shape[-2:], h.dtype)
    layout = lay_out(h.shape[:-1], h.shape[:-1], (x, 2), (log_decay, 2), (phase, 2), (h, 1), (o, 2))
    real = np.finfo(h.dtype).dtype
    t, d = x.shape[-2:]
    memories, blocks = layout.places.shape[1], -(-d // CHANNELS)
    sizes = (t, d, x.dtype.kind == "c", phase is not None)
    cost = memories * t * d * (EXPONENTIAL + (0 if phase is None else ANGLE))
    room = (real, [(6, CHANNELS)])
    share(kernel, memories * blocks, cost, room, layout.places, layout.steps, sizes, real.type(0))
    return o, state


@njit(cache=True, nogil=True, fastmath=FAST)
def kernel(table, places, steps, sizes, like, begin, stop):
    """Jobs begin to stop: one sequence and one block of its channels each."""
    d, turns = sizes[1], sizes[3]
    lines = panel(table, 0, like)
    blocks = (d + CHANNELS - 1) // CHANNELS
    for job in range(begin, stop):
        low, memory = job % blocks * CHANNELS, job // blocks
        channels = min(CHANNELS, d - low)
        if turns:
            scan_complex(lines, places, steps, sizes, memory, low, channels, like)
        else:
            scan_real(lines, places, steps, sizes[0], memory, low, channels, like)


@inner
def place(places, steps, array, memory, i, low, like):
    """Pointer to a channel of a real array at one step."""
    return move(row(matrix(places[array, memory, 0], steps[array, 0], 1, like), i), low * steps[array, 1])


@inner
def scan_real(lines, places, steps, t, memory, low, channels, like):
    """One block of channels of one sequence."""
    apart()
    h, x, gate = row(lines, 0), row(lines, 1), row(lines, 2)
    state = move(row(matrix(places[STATE, memory, 0], 0, 1, like), 0), low)
    copy(h, state, channels)
    for i in range(t):
        gather(x, place(places, steps, X, memory, i, low, like), steps[X, 1], channels)
        gather(gate, place(places, steps, GATE, memory, i, low, like), steps[GATE, 1], channels)
        decay_and_enter(h, gate, x, channels)
        copy(place(places, steps, O, memory, i, low, like), h, channels)
    copy(state, h, channels)


@inner
def decay_and_enter(h, gate, x, channels):
    """h = exp(gate) h + x."""
    apart()
    for c in range(channels):
        h[c] = exp(gate[c]) * h[c] + x[c]


@inner
def scan_complex(lines, places, steps, sizes, memory, low, channels, like):
    """The same with a phase: complex numbers are pairs of real ones in memory."""
    apart()
    t, paired = sizes[0], sizes[2]
    unit = 2 if paired else 1
    h, imaginary, gate, phase, x, y = row(lines, 0), row(lines, 1), row(lines, 2), row(lines, 3), row(lines, 4), row(lines, 5)
    state = move(row(matrix(places[STATE, memory, 0], 0, 1, like), 0), 2 * low)
    gather(h, state, 2, channels)
    gather(imaginary, move(state, 1), 2, channels)
    for c in range(channels):
        y[c] = like
    for i in range(t):
        gather(gate, place(places, steps, GATE, memory, i, low, like), steps[GATE, 1], channels)
        gather(phase, place(places, steps, PHASE, memory, i, low, like), steps[PHASE, 1], channels)
        source = move(row(matrix(places[X, memory, 0], unit * steps[X, 0], 1, like), i), unit * low * steps[X, 1])
        gather(x, source, unit * steps[X, 1], channels)
        if paired:
            gather(y, move(source, 1), unit * steps[X, 1], channels)
        o = move(row(matrix(places[O, memory, 0], 2 * steps[O, 0], 1, like), i), 2 * low)
        turn_and_enter(h, imaginary, gate, phase, x, y, channels)
        spread(o, h, channels)
        spread(move(o, 1), imaginary, channels)
    spread(state, h, channels)
    spread(move(state, 1), imaginary, channels)


@inner
def turn_and_enter(h, imaginary, gate, phase, x, y, channels):
    """h = exp(gate + i phase) h + x + i y."""
    apart()
    for c in range(channels):
        size = exp(gate[c])
        real, turned = size * math.cos(phase[c]), size * math.sin(phase[c])
        was = h[c]
        h[c] = (real * was - turned * imaginary[c]) + x[c]
        imaginary[c] = (real * imaginary[c] + turned * was) + y[c]


@inner
def spread(y, x, n):
    """Every second number of y."""
    apart()
    for c in range(n):
        y[2 * c] = x[c]
