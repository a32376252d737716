"""The Mesa layer by conjugate gradients in products of bfloat16, where single precision is enough.

``mesa_tensor.cu`` solves, for data of bfloat16, tolerances that single precision can reach; what it cannot vouch for
it leaves to ``mesa_chunks.cu``. ``mesa_recall.cu`` is linear attention at the solutions. Where that leaves
multiprocessors idle the sequence is cut in pieces, which begin with what ``mesa_sums.cu`` has left of those before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._calls import Grid
from .._sequences import BOTH, COLUMN, ROW, Sequences
from . import _launch
from ._launch import Kernel, empty, launch

__all__ = ["Plan", "plan", "recall", "solve", "sums_of"]

CHUNK, WARPS, PANEL = 64, 4, 64  # tokens; warps of a block; columns of a state
THREADS = 32 * WARPS
WIDEST = 128  # keys
LEAST = 8 * CHUNK  # tokens of a piece
TIGHTEST = 2.0**-20  # tolerance: three terms have an error of 2^-22 of |H| |x|
DECLARED = 4 << 10  # bytes of shared memory that a text declares itself
TOGETHER = {"mesa_tensor": 2, "mesa_recall": 2}  # blocks of a multiprocessor
HEADERS = ("tensor.cuh", "mesa_tensor.cuh")
SUMS, SOLVE, RECALL = (Kernel(name, *HEADERS) for name in ("mesa_sums", "mesa_tensor", "mesa_recall"))


class Plan(NamedTuple):
    """How a call is cut."""

    keys: int  # rounded up to whole matrices
    value_panels: int
    pieces: int
    length: int  # tokens of a piece

    @property
    def panels(self) -> int:
        """Of both states."""
        return -(-self.keys // PANEL) + self.value_panels

    def sizes(self, tokens: int, columns: int) -> dict[str, int]:
        """Scalars of every launch."""
        return {"tokens": tokens, "columns": columns, "length": self.length, "panels": self.panels}

    def constants(self, rows: int, **more: int) -> dict[str, int]:
        """What texts are compiled for."""
        return {"K": rows, "KEYS": self.keys, "CHUNK": CHUNK, "PANEL": PANEL} | more


def plan(q: Any, v: Any, sequences: Sequences, solver: str, tolerance: float) -> Plan | None:
    """The choice for these arrays; None where they call for double precision.

    Parameters
    ----------
    q, v
        Queries and values.
    sequences
        Of the call.
    solver, tolerance
        As in ``ttr_np.mesa``.
    """
    (tokens, rows), columns, device = q.shape[-2:], v.shape[-1], _launch.machine.device()
    if solver != "cg" or q.dtype.name != "bfloat16" or not tolerance >= TIGHTEST:
        return None
    keys = -(-rows // 16) * 16
    if tokens < CHUNK or not 0 < rows <= WIDEST or columns < 1 or room_to_solve(keys) + DECLARED > device.shared:
        return None
    blocks = TOGETHER["mesa_tensor"] * device.multiprocessors
    cut = max(min(blocks // max(sequences.memories, 1), tokens // LEAST), 1)
    length = -(-tokens // (cut * CHUNK)) * CHUNK
    return Plan(keys, -(-columns // PANEL), -(-tokens // length), length)


def tokens_of(columns: int) -> int:
    """Bytes of a chunk of rows."""
    return 2 * CHUNK * (columns + 8)


def room_to_solve(keys: int) -> int:
    """Shared memory of a block, as ``mesa_tensor.cu`` lays it out: H in three terms, keys, solutions, ridge."""
    blocks = keys // 16
    return 3 * 512 * (blocks * (blocks + 1) // 2) + tokens_of(keys) + 4 * CHUNK * keys + 4 * keys


def sums_of(chosen: Plan, sequences: Sequences, pairs: dict[str, Any], types: Any, rows: int) -> Any:
    """What the pairs of each piece but the last add to both states; None where there is one piece."""
    stored = chosen.pieces - 1
    if not stored:
        return None
    blocks, (tokens, columns) = stored * chosen.panels, pairs["v"][0].shape[-2:]
    sums = _launch.machine.scratch((chosen.keys * PANEL + 16) * blocks * sequences.memories)
    grid = Grid(blocks, THREADS, tokens_of(chosen.keys) + tokens_of(PANEL))
    launch(SUMS, sequences, pairs, (), types, chosen.constants(rows), grid, sums=sums, **chosen.sizes(tokens, columns))
    return sums


def solve(
    chosen: Plan,
    sequences: Sequences,
    q: Any,
    pairs: dict[str, Any],
    ridge: Any,
    H: Any,
    sums: Any,
    types: Any,
    iterations: int,
    tolerance: float,
) -> dict[str, Any]:
    """Solutions, their residuals (-1 where there is none yet), H at the start of each piece and at the end."""
    tokens, rows = q.shape[-2:]
    memories, single = Sequences(H.shape[:-2], H.shape[:-2]), np.dtype(np.float32)
    made = {"H_next": _launch.alike(H), "starts": empty(memories, (chosen.pieces * rows, rows), single, H)}
    made |= {"x": empty(sequences, (tokens, rows), single, H), "residual": empty(sequences, (tokens,), single, H)}
    arrays = {"q": (q, BOTH)} | {name: x for name, x in pairs.items() if name != "v"}
    arrays |= {"ridge": (ridge, COLUMN), "H": (H, BOTH)}
    arrays |= {name: (x, ROW if name == "residual" else BOTH) for name, x in made.items()}
    grid = Grid(chosen.pieces, THREADS, room_to_solve(chosen.keys))
    constants = chosen.constants(rows, TOGETHER=TOGETHER["mesa_tensor"])
    numbers = chosen.sizes(tokens, rows) | {"pieces": chosen.pieces, "iterations": iterations}
    numbers |= {"tolerance": tolerance, "sums": sums}
    launch(SOLVE, sequences, arrays, tuple(made), types, constants, grid, **numbers)
    return made


def recall(
    chosen: Plan, sequences: Sequences, x: Any, pairs: dict[str, Any], G: Any, sums: Any, types: Any
) -> tuple[Any, Any]:
    """Answers, and G at the end."""
    (tokens, rows), columns = x.shape[-2:], pairs["v"][0].shape[-1]
    G_next, o = _launch.alike(G), empty(sequences, (tokens, columns), types["data"], x)
    arrays = {"x": (x, BOTH)} | pairs | {"G": (G, BOTH), "G_next": (G_next, BOTH), "o": (o, BOTH)}
    shared = 3 * 512 * (chosen.keys // 16) * (PANEL // 16) + tokens_of(chosen.keys) + tokens_of(PANEL)
    grid = Grid(chosen.pieces * chosen.value_panels, THREADS, shared)
    constants = chosen.constants(rows, TOGETHER=TOGETHER["mesa_recall"])
    numbers = chosen.sizes(tokens, columns) | {"pieces": chosen.pieces, "sums": sums}
    launch(RECALL, sequences, arrays, ("G_next", "o"), types, constants, grid, **numbers)
    return o, G_next
