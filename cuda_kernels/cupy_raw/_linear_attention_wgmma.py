"""Linear attention on the tensor cores of Hopper, in one launch or two.

``linear_attention_wgmma.cu`` is for bfloat16 on GPUs of compute capability 9.0, with at most one gate per step, without
a bonus or a normaliser, for keys of 33 to 64 channels and more than 32 value columns, or 65 to 128 and more than 64;
``linear_attention_channels.cu`` for the larger of these with one gate per channel. ``_linear_attention_chunks`` has all
else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ttr_np.notation import LinearAttentionState

from .. import _calls
from .._sequences import BOTH, ROW, Sequences
from . import _launch
from ._launch import Kernel, empty, launch, side_by_side
from ._tiles import pieces

__all__ = ["Plan", "attend", "plan"]

HEADERS = ("tensor.cuh", "wgmma.cuh", "carrier.cuh", "linear_walk.cuh")
KERNEL = Kernel("linear_attention_wgmma", *HEADERS, architecture="sm_90a")
CHANNELS = Kernel("linear_attention_channels", *HEADERS, architecture="sm_90a")
LARGE, SMALL = 128, 64  # channels of keys, or value columns of a block
STAGES = {LARGE: (3, 5), SMALL: (2, 4)}  # chunks under way, by keys: with queries, and without
STAGES_OF_CHANNELS = (4, 6)
LONG = 128  # tokens: below, a block has too few chunks to bring one while it works on another
BEGIN = 1024  # bytes: matrices begin at multiples of these
STATIC = 1024  # bytes of shared memory that the text declares itself


class Plan(NamedTuple):
    """How a call is cut."""

    gate: str  # none, step or channel
    keys: int  # rows of the state, rounded up
    values: int  # columns of it that a block has
    chunk: int  # tokens
    column_blocks: int
    pieces: int
    length: int  # tokens of a piece

    @property
    def kernel(self) -> Kernel:
        """The text."""
        return CHANNELS if self.gate == "channel" else KERNEL

    @property
    def producers(self) -> int:
        """Threads that bring chunks or decay them; two more multiply for each value column of a block."""
        return 256 if self.gate == "channel" else 128

    def stages(self, first: bool) -> int:
        """Chunks under way."""
        return (STAGES_OF_CHANNELS if self.gate == "channel" else STAGES[self.keys])[first]


def plan(q: Any, v: Any, arrays: dict[str, Any], sequences: Sequences, normalize: bool) -> Plan | None:
    """The choice for these arrays; None where the texts are not for them."""
    gates, device = arrays["log_decay"], _launch.machine.device()
    if device.capability != "90" or q.dtype.name != "bfloat16" or normalize or arrays["bonus"] is not None:
        return None
    (tokens, rows), columns = q.shape[-2:], v.shape[-1]
    keys, values = (LARGE if size > SMALL else SMALL for size in (rows, columns))
    if tokens < LONG or not SMALL // 2 < rows <= LARGE or columns <= keys // 2:
        return None
    gate = "none" if gates is None else "step" if gates.ndim < q.ndim else "channel"
    if gate == "channel" and keys == SMALL:
        return None
    column_blocks, chunk = -(-columns // values), 32 if gate == "channel" else 64
    blocks = sequences.memories * sequences.groups * column_blocks
    together = 2 if keys == values == SMALL else 1  # blocks that share a multiprocessor
    cut = pieces(tokens, chunk, blocks, together * device.multiprocessors)
    return Plan(gate, keys, values, chunk, column_blocks, *cut)


def shared(chosen: Plan, first: bool) -> int:
    """Bytes of shared memory that a launch asks for, as the text lays it out."""
    rows, tokens, stages = 2 * chosen.keys, chosen.chunk, chosen.stages(first)
    stage = tokens * (rows * (1 if first else 2) + 2 * chosen.values)
    if chosen.gate == "channel":
        decays, scores = 4 * chosen.keys, 4 * tokens * tokens
        stage += tokens * 2 * rows + decays
        rest = 2 * tokens * chosen.values + tokens // 8 * decays
        return BEGIN + stages * stage + rest + (0 if first else stages * scores + 4 * tokens * rows)
    stage += (4 * (5 * tokens + 2 * tokens + 16 * (tokens + 8)) + 16) * (chosen.gate == "step")
    scores = chosen.values // 64 * 2 * 2 * tokens * tokens
    return BEGIN + stages * stage + (0 if first else scores + 2 * tokens * chosen.values)


@side_by_side()
def attend(
    chosen: Plan, sequences: Sequences, arrays: dict[str, Any], state: LinearAttentionState, scale: float
) -> tuple[Any, LinearAttentionState]:
    """All tokens: ``arrays`` are q, k, v and log_decay."""
    q, v, S = arrays["q"], arrays["v"], state.S
    if S.strides[-2:] != (S.shape[-1] * S.itemsize, S.itemsize):
        S = S.copy()  # the texts take rows one after the other
    owns = {"q": BOTH, "k": BOTH, "v": BOTH, "log_decay": BOTH if chosen.gate == "channel" else ROW}
    given = {name: (arrays[name], own) for name, own in owns.items()}
    given |= {"S": (S, BOTH), "S_next": (None, BOTH), "o": (None, BOTH)}
    stored, threads = chosen.pieces - 1, chosen.producers + 2 * chosen.values
    scalars = workspace(chosen, sequences.memories * stored)
    scalars |= {"tokens": q.shape[-2], "columns": v.shape[-1], "length": chosen.length, "scale": scale}
    types = {"data": q.dtype, "real": S.dtype}
    if stored:
        grid = _calls.Grid(stored * chosen.column_blocks, threads, shared(chosen, first=True))
        only_k_v = given | {"q": (None, BOTH), "S": (None, BOTH)}
        first, sizes = constants(chosen, q.shape[-1], first=True), {"pieces": stored, "stored": stored, "groups": 1}
        launch(chosen.kernel, sequences, only_k_v, (), types, first, grid, **sizes, **scalars)
    S_next, o = _launch.alike(S), empty(sequences, (q.shape[-2], v.shape[-1]), q.dtype, q)
    given |= {"S_next": (S_next, BOTH), "o": (o, BOTH)}
    blocks = chosen.pieces * chosen.column_blocks * sequences.groups
    grid = _calls.Grid(blocks, threads, shared(chosen, first=False))
    second, written = constants(chosen, q.shape[-1], first=False), ("S_next", "o")
    sizes = {"pieces": chosen.pieces, "stored": stored}
    launch(chosen.kernel, sequences, given, written, types, second, grid, **sizes, **scalars)
    return o, LinearAttentionState(S_next, None)


def constants(chosen: Plan, rows: int, first: bool) -> dict[str, int]:
    """What the text of a launch is compiled for."""
    sizes = {"K": rows, "KEYS": chosen.keys, "VALUES": chosen.values, "CHUNK": chosen.chunk}
    sizes |= {"GATE": int(chosen.gate != "none")} if chosen.gate != "channel" else {}
    return sizes | {"PRODUCERS": chosen.producers, "STATES": int(first), "STAGES": chosen.stages(first)}


def workspace(chosen: Plan, stored: int) -> dict[str, Any]:
    """Arrays for what the pieces but the last add to the state, and for their decays."""
    sizes = {"sums": stored * chosen.column_blocks * chosen.keys * chosen.values}
    sizes |= {"piece_decays": stored * chosen.keys * (chosen.gate != "none")}
    return {name: _launch.machine.scratch(size) if size else None for name, size in sizes.items()}
