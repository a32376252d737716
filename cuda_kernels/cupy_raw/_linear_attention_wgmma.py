"""Linear attention on the tensor cores of Hopper: ``linear_attention_wgmma.cu``, in one launch or two.

For bfloat16 on GPUs of compute capability 9.0, with at most one gate per step, without a bonus or a normaliser, for
keys of 33 to 64 channels and more than 32 value columns, or 65 to 128 and more than 64. ``_linear_attention_chunks``
has all else.
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
LARGE, SMALL = 128, 64  # channels of keys, or value columns of a block
STAGES = {LARGE: (3, 5), SMALL: (2, 4)}  # chunks under way, by keys: with queries, and without
LONG = 128  # tokens: below, a block has too few chunks to bring one while it works on another
PRODUCERS = 128  # threads; two more for each value column of a block
BEGIN = 1024  # bytes: matrices begin at multiples of these
STATIC = 1024  # bytes of shared memory that the text declares itself


class Plan(NamedTuple):
    """How a call is cut."""

    gated: bool
    keys: int  # rows of the state, rounded up
    values: int  # columns of it that a block has
    column_blocks: int
    pieces: int
    length: int  # tokens of a piece


def plan(q: Any, v: Any, arrays: dict[str, Any], sequences: Sequences, normalize: bool) -> Plan | None:
    """The choice for these arrays; None where the text is not for them."""
    gate, device = arrays["log_decay"], _launch.machine.device()
    if device.capability != "90" or q.dtype.name != "bfloat16" or normalize or arrays["bonus"] is not None:
        return None
    (tokens, rows), columns = q.shape[-2:], v.shape[-1]
    keys, values = (LARGE if size > SMALL else SMALL for size in (rows, columns))
    if tokens < LONG or not SMALL // 2 < rows <= LARGE or columns <= keys // 2:
        return None
    if gate is not None and gate.ndim == q.ndim:
        return None
    column_blocks = -(-columns // values)
    blocks = sequences.memories * sequences.groups * column_blocks
    together = 2 if keys == values == SMALL else 1  # blocks that share a multiprocessor
    cut = pieces(tokens, CHUNK, blocks, together * device.multiprocessors)
    return Plan(gate is not None, keys, values, column_blocks, *cut)


def shared(chosen: Plan, first: bool) -> int:
    """Bytes of shared memory that a launch asks for, as the text lays it out."""
    keys, values = 2 * CHUNK * chosen.keys, 2 * CHUNK * chosen.values
    decays = 4 * (5 * CHUNK + 2 * CHUNK + 16 * (CHUNK + 8)) + 16
    stages = STAGES[chosen.keys][first]
    if first:
        return BEGIN + stages * (keys + values + chosen.gated * decays)
    scores = chosen.values // 64 * 2 * 2 * CHUNK * CHUNK
    return BEGIN + stages * (2 * keys + values + chosen.gated * decays) + scores + values


def attend(
    chosen: Plan, sequences: Sequences, arrays: dict[str, Any], state: LinearAttentionState, scale: float
) -> tuple[Any, LinearAttentionState]:
    """All tokens: ``arrays`` are q, k, v and log_decay."""
    q, v, S = arrays["q"], arrays["v"], state.S
    if S.strides[-2:] != (S.shape[-1] * S.itemsize, S.itemsize):
        S = S.copy()  # the text takes rows one after the other
    given = {name: (arrays[name], BOTH) for name in ("q", "k", "v")} | {"log_decay": (arrays["log_decay"], ROW)}
    given |= {"S": (S, BOTH), "S_next": (None, BOTH), "o": (None, BOTH)}
    stored, threads = chosen.pieces - 1, PRODUCERS + 2 * chosen.values
    constants = {"K": q.shape[-1], "KEYS": chosen.keys, "VALUES": chosen.values, "GATE": int(chosen.gated)}
    scalars = workspace(chosen, sequences.memories * stored)
    scalars |= {"tokens": q.shape[-2], "columns": v.shape[-1], "length": chosen.length, "scale": scale}
    types = {"data": q.dtype, "real": S.dtype}
    if stored:
        grid = _calls.Grid(stored * chosen.column_blocks, threads, shared(chosen, first=True))
        only_k_v = given | {"q": (None, BOTH), "S": (None, BOTH)}
        first = constants | {"STATES": 1, "STAGES": STAGES[chosen.keys][1]}
        launch(KERNEL, sequences, only_k_v, (), types, first, grid, pieces=stored, stored=stored, groups=1, **scalars)
    S_next, o = _launch.alike(S), empty(sequences, (q.shape[-2], v.shape[-1]), q.dtype, q)
    given |= {"S_next": (S_next, BOTH), "o": (o, BOTH)}
    blocks = chosen.pieces * chosen.column_blocks * sequences.groups
    grid = _calls.Grid(blocks, threads, shared(chosen, first=False))
    second = constants | {"STATES": 0, "STAGES": STAGES[chosen.keys][0]}
    written, pieces_ = ("S_next", "o"), {"pieces": chosen.pieces, "stored": stored}
    launch(KERNEL, sequences, given, written, types, second, grid, **pieces_, **scalars)
    return o, LinearAttentionState(S_next, None)


def workspace(chosen: Plan, stored: int) -> dict[str, Any]:
    """Arrays for what the pieces but the last add to the state, and for their decays."""
    sizes = {"sums": stored * chosen.column_blocks * chosen.keys * chosen.values}
    sizes |= {"piece_decays": stored * chosen.keys * chosen.gated}
    return {name: _launch.machine.scratch(size) if size else None for name, size in sizes.items()}
