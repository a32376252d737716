"""Diagonal scan on the GPU, token by token.

    h = exp(log_decay_t + i phase_t) h + x_t

See ``ttr_np.solvers.diagonal_scan`` for the sources.
"""

from __future__ import annotations

from math import cos, exp, sin
from typing import Any

from ttr_np.notation import DiagonalScanState

from .._sequences import BOTH, COLUMN, Sequences
from ._columns import kept, place
from ._launch import empty, launch, replayed, run

__all__ = ["diagonal_scan"]


def diagonal_scan(x: Any, log_decay: Any, *, phase: Any = None, **common: Any) -> Any:
    """Diagonal scan; see ``ttr_np.diagonal_scan``."""
    return run(replayed(core), "diagonal_scan", {"x": x, "log_decay": log_decay, "phase": phase}, **common)


def core(x: Any, log_decay: Any, phase: Any, *, state: DiagonalScanState) -> tuple[Any, DiagonalScanState]:
    """One launch; real and imaginary parts are arrays of their own."""
    (h,), (tokens, width) = state, x.shape[-2:]
    sequences = Sequences(h.shape[:-1], h.shape[:-1])
    o = empty(sequences, (tokens, width), h.dtype, x)
    (x, x_imag), (h_real, h_imag), (o_real, o_imag) = parts(x), parts(h), parts(o)
    arrays = {"x": (x, BOTH), "x_imag": (x_imag, BOTH), "log_decay": (log_decay, BOTH), "phase": (phase, BOTH)}
    arrays |= {"h": (h_real, COLUMN), "h_imag": (h_imag, COLUMN), "o": (o_real, BOTH), "o_imag": (o_imag, BOTH)}
    launch(kernel, sequences, arrays, ("h", "h_imag", "o", "o_imag"), tokens, width, 1)
    return o, DiagonalScanState(h)


def parts(x: Any) -> tuple[Any, Any]:
    """Real and imaginary part, as views."""
    return (x.real, x.imag) if x.dtype.kind == "c" else (x, None)


def kernel(x, x_imag, log_decay, phase, h, h_imag, o, o_imag, blocks):
    """A thread owns one channel of one sequence."""
    b, i, column, _ = place(h.shape[1], blocks, 1)
    if column >= x.shape[4]:
        return
    now = h[b, i, 0, column]
    now_imag = h_imag[b, i, 0, column] if phase.size else now * 0
    for t in range(x.shape[3]):
        size = exp(log_decay[b, i, 0, t, column])
        if phase.size:
            c, s = size * cos(phase[b, i, 0, t, column]), size * sin(phase[b, i, 0, t, column])
            before = now
            now = c * before - s * now_imag if size != 0 else size
            now_imag = c * now_imag + s * before if size != 0 else size
            if x_imag.size:
                now_imag += x_imag[b, i, 0, t, column]
            o_imag[b, i, 0, t, column] = now_imag
        else:
            now = kept(size, now)
        now += x[b, i, 0, t, column]
        o[b, i, 0, t, column] = now
    h[b, i, 0, column] = now
    if phase.size:
        h_imag[b, i, 0, column] = now_imag
