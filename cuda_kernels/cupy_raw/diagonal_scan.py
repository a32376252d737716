"""Diagonal scan on the GPU, token by token: one launch of ``diagonal_scan.cu``, or two over pieces of sequences."""

from __future__ import annotations

from typing import Any

from ttr_np.notation import DiagonalScanState

from .._sequences import BOTH, COLUMN, Sequences
from . import _launch
from ._launch import Kernel, empty, launch, replayed, run, side_by_side
from ._tiles import cut

__all__ = ["diagonal_scan"]

KERNEL = Kernel("diagonal_scan")


def diagonal_scan(x: Any, log_decay: Any, *, phase: Any = None, **common: Any) -> Any:
    """Diagonal scan; see ``ttr_np.diagonal_scan``."""
    return run(replayed(core), "diagonal_scan", {"x": x, "log_decay": log_decay, "phase": phase}, **common)


@side_by_side()
def core(x: Any, log_decay: Any, phase: Any, *, state: DiagonalScanState) -> tuple[Any, DiagonalScanState]:
    """One launch over whole sequences, or two over pieces of them."""
    (h,), (tokens, columns) = state, x.shape[-2:]
    sequences = Sequences(h.shape[:-1], h.shape[:-1])
    o = empty(sequences, (tokens, columns), x.dtype if phase is None else h.dtype, x)
    (x, x_imag), (h_re, h_imag), (o_re, o_imag) = parts(x), parts(h), parts(o)
    whole, pieces, length = cut(sequences.memories, tokens, columns, 1, h_re.dtype)
    arrays = {"x": (x, BOTH), "x_imag": (x_imag, BOTH), "log_decay": (log_decay, BOTH), "phase": (phase, BOTH)}
    arrays |= {"h": (h_re, COLUMN), "h_imag": (h_imag, COLUMN), "o": (o_re, BOTH), "o_imag": (o_imag, BOTH)}
    types = {"data": x.dtype, "real": h_re.dtype, "answer": o_re.dtype}
    stored, after = pieces - 1, h
    scalars = {"tokens": tokens, "columns": columns, "length": length, "stored": stored, "sums": None}
    if stored:
        scalars["sums"] = _launch.machine.scratch(4 * stored * sequences.memories * columns)
        nobody = {"h_next": (None, COLUMN), "h_next_imag": (None, COLUMN)}
        first = whole._replace(blocks=whole.blocks * stored)
        launch(KERNEL, sequences, arrays | nobody, (), types, {"STATES": 1}, first, pieces=stored, **scalars)
        after = _launch.alike(h)  # pieces still read the old state
    next_re, next_imag = parts(after)
    arrays |= {"h_next": (next_re, COLUMN), "h_next_imag": (next_imag, COLUMN)}
    written = ("h_next", "h_next_imag", "o", "o_imag")
    grid = whole._replace(blocks=whole.blocks * pieces)
    launch(KERNEL, sequences, arrays, written, types, {"STATES": 0}, grid, pieces=pieces, **scalars)
    return o, DiagonalScanState(after)


def parts(x: Any) -> tuple[Any, Any]:
    """Real and imaginary part, as views."""
    return (x.real, x.imag) if x.dtype.kind == "c" else (x, None)
