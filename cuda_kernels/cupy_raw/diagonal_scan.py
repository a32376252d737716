"""Diagonal scan on the GPU, token by token: one launch of ``diagonal_scan.cu``."""

from __future__ import annotations

from typing import Any

from ttr_np.notation import DiagonalScanState

from .._sequences import BOTH, COLUMN, Sequences
from ._launch import Kernel, empty, launch, replayed, run

__all__ = ["diagonal_scan"]

KERNEL = Kernel("diagonal_scan")


def diagonal_scan(x: Any, log_decay: Any, *, phase: Any = None, **common: Any) -> Any:
    """Diagonal scan; see ``ttr_np.diagonal_scan``."""
    return run(replayed(core), "diagonal_scan", {"x": x, "log_decay": log_decay, "phase": phase}, **common)


def core(x: Any, log_decay: Any, phase: Any, *, state: DiagonalScanState) -> tuple[Any, DiagonalScanState]:
    """One launch."""
    (h,), (tokens, columns) = state, x.shape[-2:]
    sequences = Sequences(h.shape[:-1], h.shape[:-1])
    o = empty(sequences, (tokens, columns), x.dtype if phase is None else h.dtype, x)
    (x, x_imag), (h_re, h_imag), (o_re, o_imag) = parts(x), parts(h), parts(o)
    arrays = {"x": (x, BOTH), "x_imag": (x_imag, BOTH), "log_decay": (log_decay, BOTH), "phase": (phase, BOTH)}
    arrays |= {"h": (h_re, COLUMN), "h_imag": (h_imag, COLUMN), "o": (o_re, BOTH), "o_imag": (o_imag, BOTH)}
    types = {"data": x.dtype, "real": h_re.dtype, "answer": o_re.dtype}
    launch(KERNEL, sequences, arrays, ("h", "h_imag", "o", "o_imag"), types, {}, tokens=tokens, columns=columns)
    return o, DiagonalScanState(h)


def parts(x: Any) -> tuple[Any, Any]:
    """Real and imaginary part, as views."""
    return (x.real, x.imag) if x.dtype.kind == "c" else (x, None)
