"""Linear attention on the GPU, chunk by chunk on tensor cores: ``linear_attention_chunks.cu``.

One launch, or two where the sequence is cut in pieces because there are fewer memories than multiprocessors: then the
first makes what each piece adds to the state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ttr_np.notation import LinearAttentionState

from .. import _calls
from .._sequences import BOTH, COLUMN, ROW, Sequences
from . import _launch
from ._launch import Kernel, empty, launch, side_by_side
from ._tiles import Tiles, pieces, tiles

__all__ = ["Plan", "attend", "plan"]

KERNEL = Kernel("linear_attention_chunks", "tensor.cuh")
GATES = {"none": 0, "step": 1, "channel": 2}


class Plan(NamedTuple):
    """How a call is cut."""

    gate: str
    sizes: Tiles
    column_blocks: int
    pieces: int
    length: int  # tokens of a piece


def plan(q: Any, v: Any, log_decay: Any, sequences: Sequences) -> Plan | None:
    """The choice for these arrays; None where the recurrence is the better form."""
    gate = "none" if log_decay is None else "step" if log_decay.ndim < q.ndim else "channel"
    device = _launch.machine.device()
    tokens, columns = q.shape[-2], v.shape[-1]
    sizes = tiles(q.dtype, tokens, q.shape[-1], columns, gate, device.shared)
    if sizes is None:
        return None
    column_blocks = -(-columns // sizes.values)
    blocks = sequences.memories * sequences.groups * column_blocks
    at_once = device.multiprocessors * sizes.together
    return Plan(gate, sizes, column_blocks, *pieces(tokens, sizes.chunk, blocks, at_once))


@side_by_side()
def attend(
    chosen: Plan,
    sequences: Sequences,
    arrays: dict[str, Any],
    state: LinearAttentionState,
    normalize: bool,
    scale: float,
) -> tuple[Any, LinearAttentionState]:
    """All tokens: ``arrays`` are q, k, v, log_decay and bonus."""
    q, v, (S, z) = arrays["q"], arrays["v"], state
    if S.strides[-2:] != (S.shape[-1] * S.itemsize, S.itemsize):
        S = S.copy()  # the text takes rows one after the other
    owns = {"q": BOTH, "k": BOTH, "v": BOTH, "log_decay": BOTH if chosen.gate == "channel" else ROW, "bonus": COLUMN}
    given = {name: (arrays[name], own) for name, own in owns.items()}
    given |= {"S": (S, BOTH), "S_next": (None, BOTH), "z": (z, COLUMN), "z_next": (None, COLUMN), "o": (None, BOTH)}
    constants = constants_of(chosen, q.shape[-1], arrays["bonus"] is not None, normalize)
    scalars = workspace(chosen, sequences, normalize)
    scalars |= {"tokens": q.shape[-2], "columns": v.shape[-1], "length": chosen.length, "scale": scale}
    types = {"data": q.dtype, "real": S.dtype}
    stored = chosen.pieces - 1
    grid = _calls.Grid(stored * chosen.column_blocks, chosen.sizes.threads, chosen.sizes.shared)
    if stored:
        only_k_v = given | {name: (None, given[name][1]) for name in ("q", "bonus", "S", "z")}
        first = constants | {"STATES": 1}
        launch(KERNEL, sequences, only_k_v, (), types, first, grid, pieces=stored, stored=stored, groups=1, **scalars)
    S_next, z_next = _launch.alike(S), None if z is None else _launch.alike(z)
    o = empty(sequences, (q.shape[-2], v.shape[-1]), q.dtype, q)
    given |= {"S_next": (S_next, BOTH), "z_next": (z_next, COLUMN), "o": (o, BOTH)}
    grid = grid._replace(blocks=chosen.pieces * chosen.column_blocks * sequences.groups)
    written = ("S_next", "z_next", "o")
    launch(KERNEL, sequences, given, written, types, constants, grid, pieces=chosen.pieces, stored=stored, **scalars)
    return o, LinearAttentionState(S_next, z_next)


def constants_of(chosen: Plan, rows: int, bonus: bool, normalize: bool) -> dict[str, int]:
    """What the text is compiled for."""
    sizes = chosen.sizes
    return {
        "K": rows,
        "KEYS": sizes.keys,
        "VALUES": sizes.values,
        "CHUNK": sizes.chunk,
        "GATE": GATES[chosen.gate],
        "BONUS": int(bonus),
        "NORMALIZE": int(normalize),
        "DIRECT": int(sizes.direct),
        "DATA_TERMS": sizes.data_terms,
        "KEY_TERMS": sizes.key_terms,
        "SUM_TERMS": sizes.sum_terms,
        "TOGETHER": sizes.together,
        "STATES": 0,
    }


def workspace(chosen: Plan, sequences: Sequences, normalize: bool) -> dict[str, Any]:
    """Arrays for what the pieces but the last add to the state, and for their decays."""
    stored = sequences.memories * (chosen.pieces - 1)
    names = {"sums": chosen.column_blocks * chosen.sizes.values * chosen.sizes.keys}
    names |= {"piece_decays": chosen.sizes.keys * (chosen.gate != "none"), "z_sums": chosen.sizes.keys * normalize}
    return {
        name: _launch.machine.scratch(stored * each) if stored * each else None
        for name, each in names.items()
    }
