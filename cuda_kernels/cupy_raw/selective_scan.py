"""Selective scan on the GPU, token by token: one launch of ``selective_scan.cu``, or two over pieces of sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.notation import SelectiveScanState

from .._calls import split
from .._sequences import BOTH, COLUMN, Sequences
from . import _launch
from ._launch import Kernel, empty, even, launch, replayed, run, side_by_side
from ._tiles import cut

__all__ = ["selective_scan"]

KERNEL = Kernel("selective_scan")
SHARED = 8  # times the lanes that a channel's registers ask for, up to a warp: channels are few and exponentials many


def selective_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, *, D: Any = None, **common: Any) -> Any:
    """Selective scan; see ``ttr_np.selective_scan``."""
    return run(replayed(core), "selective_scan", {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}, **common)


@side_by_side()
def core(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, *, state: SelectiveScanState
) -> tuple[Any, SelectiveScanState]:
    """One launch over whole sequences, or two over pieces of them."""
    (h,), (tokens, columns) = state, u.shape[-2:]
    reading = (C.shape[:-2], () if D is None else D.shape[:-1])
    sequences = Sequences(h.shape[:-2], np.broadcast_shapes(h.shape[:-2], *reading))
    size = h.shape[-1]
    per_thread, parts = split("n", size, fields=min(SHARED, 1024 // max(size, 2)))
    whole, pieces, length = cut(sequences.memories, tokens, columns, parts, h.dtype)
    o = empty(sequences, (tokens, columns), u.dtype, u)
    arrays = {"u": (u, BOTH), "delta": (delta, BOTH), "A": (A, BOTH), "B": (B, BOTH)}
    asked = {"C": (C, BOTH), "D": (D, COLUMN), "h": (h, BOTH), "h_next": (h, BOTH), "o": (o, BOTH)}
    types = {"data": u.dtype, "real": h.dtype}
    constants = {"N": size, "ROWS": per_thread, "PARTS": parts, "EVEN": even(B, C), "STATES": 0}
    scalars = {"tokens": tokens, "columns": columns, "length": length, "stored": pieces - 1}
    scalars |= workspace(sequences.memories * (pieces - 1) * columns, size)
    if pieces > 1:
        nobody = {name: (None, own) for name, (_, own) in asked.items()}
        first, grid = constants | {"STATES": 1}, whole._replace(blocks=whole.blocks * (pieces - 1))
        launch(KERNEL, sequences, arrays | nobody, (), types, first, grid, pieces=pieces - 1, **scalars)
        asked["h_next"] = _launch.alike(h), BOTH  # pieces still read the old state
    grid = whole._replace(blocks=whole.blocks * pieces)
    launch(KERNEL, sequences, arrays | asked, ("h_next", "o"), types, constants, grid, pieces=pieces, **scalars)
    return o, SelectiveScanState(asked["h_next"][0])


def workspace(channels: int, size: int) -> dict[str, Any]:
    """Arrays for what the pieces but the last add to the state, and for their lengths."""
    names = {"sums": channels * size, "lengths": channels}
    return {name: _launch.machine.scratch(n) if n else None for name, n in names.items()}
