"""Linear attention on the tensor cores of Hopper: ``linear_attention_wgmma.cu``, in one launch or two.

For bfloat16 on GPUs of compute capability 9.0, with at most one gate per step, without a bonus or a normaliser, for
keys of 65 to 128 channels and more than 64 value columns. ``_linear_attention_chunks`` has all else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ttr_np.notation import LinearAttentionState

from .. import _calls
from .._sequences import BOTH, ROW, Sequences
from . import _launch
from ._launch import Kernel, empty, launch
from ._tiles import pieces

__all__ = ["Plan", "attend", "plan"]

KERNEL = Kernel("linear_attention_wgmma", "tensor.cuh", "wgmma.cuh", "carrier.cuh", architecture="sm_90a")
CHUNK = 64  # tokens
SIZE = 128  # channels of keys, and value columns of a block
STAGES, FIRST_STAGES = 3, 5  # chunks under way, where queries are brought too and where they are not
LONG = 128  # tokens: below, a block has too few chunks to bring one while it works on another
PRODUCERS, CONSUMERS = 128, 256  # threads
BEGIN = 1024  # bytes: matrices begin at multiples of these
STATIC = 1024  # bytes of shared memory that the text declares itself


class Plan(NamedTuple):
    """How a call is cut."""

    gated: bool
    column_blocks: int
    pieces: int
    length: int  # tokens of a piece


def plan(q: Any, v: Any, arrays: dict[str, Any], sequences: Sequences, normalize: bool) -> Plan | None:
    """The choice for these arrays; None where the text is not for them."""
    gate, device = arrays["log_decay"], _launch.machine.device()
    if device.capability != "90" or q.dtype.name != "bfloat16" or normalize or arrays["bonus"] is not None:
        return None
    sizes = q.shape[-1], min(v.shape[-1], SIZE)
    if q.shape[-2] < LONG or not all(SIZE // 2 < size <= SIZE for size in sizes):
        return None
    if gate is not None and gate.ndim == q.ndim:
        return None
    column_blocks = -(-v.shape[-1] // SIZE)
    blocks = sequences.memories * sequences.groups * column_blocks
    return Plan(gate is not None, column_blocks, *pieces(q.shape[-2], CHUNK, blocks, device.multiprocessors))


def shared(gated: bool, first: bool) -> int:
    """Bytes of shared memory that a launch asks for, as the text lays it out."""
    tile, scores, answers = 2 * CHUNK * SIZE, 4 * 2 * CHUNK * CHUNK, 2 * CHUNK * SIZE
    decays = 4 * (5 * CHUNK + 2 * CHUNK + 16 * (CHUNK + 8)) + 16
    if first:
        return BEGIN + FIRST_STAGES * (2 * tile + gated * decays)
    return BEGIN + STAGES * (3 * tile + gated * decays) + scores + answers


def attend(
    chosen: Plan, sequences: Sequences, arrays: dict[str, Any], state: LinearAttentionState, scale: float
) -> tuple[Any, LinearAttentionState]:
    """All tokens: ``arrays`` are q, k, v and log_decay."""
    q, v, S = arrays["q"], arrays["v"], state.S
    if S.strides[-2:] != (S.shape[-1] * S.itemsize, S.itemsize):
        S = S.copy()  # the text takes rows one after the other
    given = {name: (arrays[name], BOTH) for name in ("q", "k", "v")} | {"log_decay": (arrays["log_decay"], ROW)}
    given |= {"S": (S, BOTH), "S_next": (None, BOTH), "o": (None, BOTH)}
    stored, threads = chosen.pieces - 1, PRODUCERS + CONSUMERS
    constants = {"K": q.shape[-1], "KEYS": SIZE, "VALUES": SIZE, "GATE": int(chosen.gated)}
    scalars = workspace(chosen, sequences.memories * stored)
    scalars |= {"tokens": q.shape[-2], "columns": v.shape[-1], "length": chosen.length, "scale": scale}
    types = {"data": q.dtype, "real": S.dtype}
    if stored:
        grid = _calls.Grid(stored * chosen.column_blocks, threads, shared(chosen.gated, first=True))
        only_k_v = given | {"q": (None, BOTH), "S": (None, BOTH)}
        first = constants | {"STATES": 1, "STAGES": FIRST_STAGES}
        launch(KERNEL, sequences, only_k_v, (), types, first, grid, pieces=stored, stored=stored, groups=1, **scalars)
    S_next, o = _launch.alike(S), empty(sequences, (q.shape[-2], v.shape[-1]), q.dtype, q)
    given |= {"S_next": (S_next, BOTH), "o": (o, BOTH)}
    blocks = chosen.pieces * chosen.column_blocks * sequences.groups
    grid = _calls.Grid(blocks, threads, shared(chosen.gated, first=False))
    second = constants | {"STATES": 0, "STAGES": STAGES}
    written, pieces_ = ("S_next", "o"), {"pieces": chosen.pieces, "stored": stored}
    launch(KERNEL, sequences, given, written, types, second, grid, **pieces_, **scalars)
    return o, LinearAttentionState(S_next, None)


def workspace(chosen: Plan, stored: int) -> dict[str, Any]:
    """Arrays for what the pieces but the last add to the state, and for their decays."""
    sizes = {"sums": stored * chosen.column_blocks * SIZE * SIZE, "piece_decays": stored * SIZE * chosen.gated}
    return {name: _launch.machine.scratch(size) if size else None for name, size in sizes.items()}
