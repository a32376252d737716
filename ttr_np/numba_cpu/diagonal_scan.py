"""Diagonal scan, compiled: token by token, many channels side by side, real or complex.

    h_t = exp(log_decay_t + i phase_t) h_{t-1} + x_t

See ``ttr_np.solvers.diagonal_scan`` for the sources.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import overload

from ..calling import run
from ..notation import DiagonalScanState
from ._cache import compiled
from ._compile import apart, inner
from ._gates import exp
from ._panels import copy, gather, matrix, move, panel, row
from ._sequences import lay_out
from ._threads import share

__all__ = ["diagonal_scan"]

CHANNELS = 256  # of a job
EXPONENTIAL, ANGLE = 16, 32  # multiplications in the time of one
FAR = 1e6  # angles beyond it are left to the library: their multiple of pi / 2 has too many digits
HALF_PI = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21)  # few digits in each part
SINE, COSINE = (tuple((-1) ** n / math.factorial(2 * n + odd) for n in range(9, -1, -1)) for odd in (1, 0))
X, GATE, PHASE, STATE, O = range(5)


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
    room = (real, [(8, CHANNELS)])
    share(kernel, memories * blocks, cost, room, layout, sizes, real.type(0))
    return o, state


@compiled
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
        keep = exp(gate[c])
        h[c] = keep * known(keep, h[c]) + x[c]


@inner
def scan_complex(lines, places, steps, sizes, memory, low, channels, like):
    """The same with a phase: complex numbers are pairs of real ones in memory."""
    apart()
    t, paired = sizes[0], sizes[2]
    unit = 2 if paired else 1
    h, imaginary, gate, phase = row(lines, 0), row(lines, 1), row(lines, 2), row(lines, 3)
    x, y, cosine, sine = row(lines, 4), row(lines, 5), row(lines, 6), row(lines, 7)
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
        turn_and_enter(h, imaginary, gate, phase, x, y, cosine, sine, channels)
        spread(o, h, channels)
        spread(move(o, 1), imaginary, channels)
    spread(state, h, channels)
    spread(move(state, 1), imaginary, channels)


@inner
def turn_and_enter(h, imaginary, gate, phase, x, y, cosine, sine, channels):
    """h = exp(gate + i phase) h + x + i y."""
    apart()
    angles(phase, cosine, sine, channels)
    for c in range(channels):
        size = exp(gate[c])
        real, turned = size * cosine[c], size * sine[c]
        was, side = known(size, h[c]), known(size, imaginary[c])
        h[c] = (real * was - turned * side) + x[c]
        imaginary[c] = (real * side + turned * was) + y[c]


@inner
def known(keep, past):
    """What was known before a decay: where that is zero, nothing, because zero times NaN is NaN."""
    return past if keep != 0 else keep


@inner
def angles(phase, cosine, sine, channels):
    """Cosines and sines of the angles of one step."""
    far = 0.0
    for c in range(channels):
        far = max(far, abs(phase[c]))
    if far > FAR:
        for c in range(channels):
            cosine[c], sine[c] = math.cos(phase[c]), math.sin(phase[c])
    else:
        for c in range(channels):
            cosine[c], sine[c] = turn(phase[c])


def turn(angle: Any) -> Any:
    """Cosine and sine of a moderate angle without a branch or a call, so that loops use the whole width of the machine.

    angle = k pi / 2 + r: pi / 2 is subtracted in parts of which k times the first ones is exact, then Taylor's series.
    """
    raise NotImplementedError("for compiled code only")


def turn_real(angle):
    x = np.float64(angle)
    k = np.floor(x / (math.pi / 2) + 0.5)
    r = ((x - k * HALF_PI[0]) - k * HALF_PI[1]) - k * HALF_PI[2]
    square, sine, cosine = r * r, SINE[0], COSINE[0]
    for one, other in zip(SINE[1:], COSINE[1:]):  # noqa: B905 (Numba knows no strict)
        sine, cosine = sine * square + one, cosine * square + other
    sine *= r
    quarter = k - 4 * np.floor(k / 4)
    even = quarter == 0 or quarter == 2
    up = 1.0 if quarter < 2 else -1.0
    ahead = 1.0 if (quarter == 0 or quarter == 3) else -1.0
    return ahead * (cosine if even else sine), up * (sine if even else cosine)


# No sums may be reordered: the parts of pi / 2 would become one.
overload(turn, jit_options={"fastmath": {"contract"}})(lambda angle: turn_real)


@inner
def spread(y, x, n):
    """Every second number of y."""
    apart()
    for c in range(n):
        y[2 * c] = x[c]
