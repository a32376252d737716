"""Delta rule on the GPU, chunk by chunk on tensor cores: one launch of ``delta_rule_chunks.cu``.

Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ttr_np.notation import DeltaRuleState

from .. import _calls
from .._sequences import BOTH, ROW, Sequences
from . import _launch, _tiles
from ._launch import Kernel, empty, launch
from ._tiles import LONGEST, STATIC, SUM_TERMS, TERMS

__all__ = ["Tiles", "correct", "tiles"]

KERNEL = Kernel("delta_rule_chunks", "tensor.cuh")
GATES = {"none": 0, "step": 1, "channel": 2}
WIDEST = 64  # value columns of one block, 16 per warp: more blocks repeat the scores, but there are more of them


class Tiles(NamedTuple):
    """What the text is compiled for."""

    chunk: int  # tokens
    keys: int  # rows of the state, rounded up to whole matrices
    values: int  # columns of the state per block
    stages: int  # places where tokens arrive
    shared: int = 0  # bytes that a launch asks for


def tiles(dtype: Any, tokens: int, rows: int, columns: int, gate: str, erase: bool, shared: int) -> Tiles | None:
    """The choice for one call, fixed per operator, size and device; None where the recurrence is the better form.

    Parameters
    ----------
    dtype
        Of the data; float64 has no chunked form.
    tokens, rows, columns
        Sizes of the axes t, k and v.
    gate
        ``none``, ``step`` or ``channel``: which axes ``log_decay`` has.
    erase
        Whether there are erasing keys.
    shared
        Bytes of shared memory that a block may have on this device.
    """
    name = np.dtype(dtype).name
    if name not in TERMS or tokens < _tiles.CHUNKED_FROM or not 0 < rows <= LONGEST or columns < 1:
        return None
    keys = -(-rows // 16) * 16
    values = min(16 << max((columns - 1).bit_length() - 4, 0), WIDEST)
    longest = 64 if name == "bfloat16" and gate != "channel" and keys <= 128 and values == WIDEST else 32
    longest = min(longest, 2 * values)  # a thread inverts one column
    smaller = ((longest, 2, values), (longest, 1, values), (16, 1, values), (16, 1, min(values, 32)))
    for chunk, stages, columns_of_a_block in smaller:
        found = Tiles(chunk, keys, columns_of_a_block, stages)
        found = found._replace(shared=bytes_of(found, name, gate, erase))
        if found.shared + STATIC <= shared:
            return found
    return None


def bytes_of(sizes: Tiles, name: str, gate: str, erase: bool) -> int:
    """Shared memory that a block is launched with, as the text lays it out: rows of tiles are 8 numbers apart."""
    chunk, keys, values = sizes.chunk, sizes.keys + 8, sizes.values + 8
    arriving = sizes.stages * chunk * ((2 + erase) * keys + values) * (4 if name == "float32" else 2)
    split = 2 * SUM_TERMS[name] * sizes.values * (keys + chunk + 8)
    squares = (2 + (gate == "step")) * chunk * (chunk + 8) * 4
    channels = (gate == "channel") * 3 * chunk * keys * 4
    numbers = 4 * chunk + (chunk // 16 + 1) * sizes.keys + sizes.values // 16
    return arriving + split + squares + channels + 4 * numbers


def gate_of(q: Any, log_decay: Any) -> str:
    """Which axes the gates have."""
    return "none" if log_decay is None else "step" if log_decay.ndim < q.ndim else "channel"


def choice(q: Any, v: Any, log_decay: Any, erase_key: Any) -> Tiles | None:
    """The tiles for these arrays on this device; None for the recurrence."""
    shared = _launch.machine.device().shared
    sizes = (q.shape[-2], q.shape[-1], v.shape[-1])
    return tiles(q.dtype, *sizes, gate_of(q, log_decay), erase_key is not None, shared)


def correct(
    chosen: Tiles, sequences: Sequences, arrays: dict[str, Any], state: DeltaRuleState, scale: float
) -> tuple[Any, DeltaRuleState]:
    """All tokens; ``arrays`` are q, k, v, beta, log_decay and erase_key."""
    q, v, (S,) = arrays["q"], arrays["v"], state
    gate, name = gate_of(q, arrays["log_decay"]), np.dtype(q.dtype).name
    o = empty(sequences, (q.shape[-2], v.shape[-1]), q.dtype, q)
    owns = {"beta": ROW, "log_decay": BOTH if gate == "channel" else ROW}
    given = {key: (x, owns.get(key, BOTH)) for key, x in (arrays | {"S": S, "o": o}).items()}
    constants = {"K": q.shape[-1], "KEYS": chosen.keys, "VALUES": chosen.values, "CHUNK": chosen.chunk}
    constants |= {"STAGES": chosen.stages, "GATE": GATES[gate], "ERASE": int(arrays["erase_key"] is not None)}
    constants |= {"DATA_TERMS": TERMS[name], "SUM_TERMS": SUM_TERMS[name]}
    grid = _calls.Grid(-(-v.shape[-1] // chosen.values), 2 * chosen.values, chosen.shared)
    scalars = {"tokens": q.shape[-2], "columns": v.shape[-1], "scale": scale}
    launch(KERNEL, sequences, given, ("S", "o"), {"data": q.dtype, "real": S.dtype}, constants, grid, **scalars)
    return o, DeltaRuleState(S)
