"""Delta rule on the GPU, chunk by chunk on tensor cores: two launches, or pairs of them.

``delta_rule_prepare.cu`` makes of all chunks at once what does not depend on the memory, and leaves it in records;
``delta_rule_chunks.cu`` walks over them with the memory, or ``delta_rule_wgmma.cu`` where a GPU has products of whole
warpgroups. Long sequences are taken in parts, so that the records of a
part stay few; the memory goes from one part to the next in its state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ttr_np.notation import DeltaRuleState

from .. import _calls
from .._sequences import BOTH, ROW, Sequences
from . import _launch, _tiles
from ._launch import Kernel, empty, launch, side_by_side
from ._tiles import LONGEST, STATIC, SUM_TERMS, TERMS

__all__ = ["Tiles", "correct", "tiles"]

HEADERS = ("tensor.cuh", "delta_chunks.cuh")
PREPARE, KERNEL = Kernel("delta_rule_prepare", *HEADERS), Kernel("delta_rule_chunks", *HEADERS, "delta_tokens.cuh")
GATES = {"none": 0, "step": 1, "channel": 2}
WGMMA = Kernel("delta_rule_wgmma", *HEADERS, "delta_tokens.cuh", "wgmma.cuh", "carrier.cuh", architecture="sm_90a")
VALUES = 32  # value columns of a block that walks
WGMMA_CHUNK, WGMMA_KEYS = 64, (64, 128)  # tokens, and rows of the state
WGMMA_THREADS, EARLY = 128 + 256, 2  # those that bring, and those that compute; chunks under way
BEGIN, STATIC_OF_WGMMA = 1024, 2048  # bytes: its matrices begin at multiples of these; what it declares itself
RECORDS = 1 << 26  # numbers of single precision that the records of one part may have
LEAST = 8  # but so many chunks at least, which pay for two launches


class Tiles(NamedTuple):
    """What the texts are compiled for."""

    chunk: int  # tokens
    keys: int  # rows of the state, rounded up to whole matrices
    prepare: int = 0  # bytes that the first launch asks for
    walk: int = 0  # and the second


class Terms(NamedTuple):
    """Numbers of bfloat16 that make one number."""

    data: int
    keys: int  # with one gate per channel, keys and queries are computed
    sums: int  # of all that is computed
    direct: bool  # products take the data as they are


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
    for chunk in (64, 32, 16) if name != "float32" else (32, 16):
        sizes = Tiles(chunk, keys)
        found = Tiles(chunk, keys, bytes_to_prepare(sizes, name, gate, erase), bytes_to_walk(sizes, name, gate))
        if max(found.prepare, found.walk) + STATIC <= shared:
            return found
    return None


def terms_of(name: str, gate: str) -> Terms:
    """For data of a type."""
    keys = SUM_TERMS[name] if gate == "channel" else TERMS[name]
    return Terms(TERMS[name], keys, SUM_TERMS[name], TERMS[name] == 1 and gate != "channel")


def bytes_to_prepare(sizes: Tiles, name: str, gate: str, erase: bool) -> int:
    """Shared memory of a block of the first launch, as its text lays it out: rows of tiles are 8 numbers apart."""
    chunk, keys, terms = sizes.chunk, sizes.keys + 8, terms_of(name, gate)
    values = 128 if name != "float32" and not (erase and gate == "channel") else 64  # at once
    arriving = chunk * ((2 + erase) * keys + values + 8) * (4 if name == "float32" else 2)
    split = 0 if terms.direct else 2 * terms.keys * chunk * (2 + (erase or gate == "channel")) * keys
    squares = (1 + (gate == "step")) * chunk * (chunk + 8)
    channels = (gate == "channel") * (chunk * keys + (2 + 2 * chunk // 16) * sizes.keys)
    steps = (gate == "step") * (3 * chunk + 4)
    return arriving + split + 4 * (squares + channels + steps + chunk)


class Walk(NamedTuple):
    """The second launch: its text, threads of a block, and bytes that it asks for."""

    kernel: Kernel
    threads: int
    shared: int


def walk_of(chosen: Tiles, q: Any, gate: str, groups: int) -> Walk:
    """The choice for these tiles on this device."""
    sizes = chosen.chunk == WGMMA_CHUNK and chosen.keys in WGMMA_KEYS and groups == 1
    if sizes and np.dtype(q.dtype).name == "bfloat16" and _launch.machine.device().capability == "90":
        return Walk(WGMMA, WGMMA_THREADS, bytes_for_warpgroups(chosen.keys, gate))
    return Walk(KERNEL, 8 * chosen.chunk, chosen.walk)


def bytes_for_warpgroups(keys: int, gate: str) -> int:
    """Shared memory of a block that multiplies by warpgroups, as its text lays it out."""
    chunk, terms = WGMMA_CHUNK, terms_of("bfloat16", gate).keys
    early, late = 2 * (2 + terms) * chunk * keys + 4 * chunk * VALUES, 2 * (terms * chunk * keys + 2 * chunk * chunk)
    stages = EARLY * early + (1 if terms * keys > 128 else EARLY) * late
    return BEGIN + stages + 2 * 2 * VALUES * (keys + chunk * (1 + (gate == "step")))


def bytes_to_walk(sizes: Tiles, name: str, gate: str) -> int:
    """The same of the second launch."""
    chunk, keys, terms = sizes.chunk, sizes.keys + 8, terms_of(name, gate)
    tokens = chunk * keys * (terms.sums + 2 * terms.keys)
    errors = (1 + (gate == "step")) * chunk * (VALUES + 8)
    split = terms.sums * (chunk * (chunk + 8) + sizes.keys * (VALUES + 8) + errors)
    return 2 * (tokens + split) + 32 * chunk


def numbers_of_a_record(sizes: Tiles, terms: Terms, columns: int, groups: int) -> int:
    """What the first launch leaves of a chunk, in numbers of single precision: see ``delta_chunks.cuh``."""
    chunk, tokens = sizes.chunk, sizes.chunk * sizes.keys // 2
    keys = 0 if terms.direct else terms.keys * tokens
    of_group = keys + terms.sums * chunk * chunk // 2
    wide = -(-columns // VALUES) * VALUES
    return terms.sums * tokens + keys + 2 * chunk + sizes.keys + 4 + groups * of_group + chunk * wide


def gate_of(q: Any, log_decay: Any) -> str:
    """Which axes the gates have."""
    return "none" if log_decay is None else "step" if log_decay.ndim < q.ndim else "channel"


def choice(q: Any, v: Any, log_decay: Any, erase_key: Any) -> Tiles | None:
    """The tiles for these arrays on this device; None for the recurrence."""
    shared = _launch.machine.device().shared
    sizes = (q.shape[-2], q.shape[-1], v.shape[-1])
    return tiles(q.dtype, *sizes, gate_of(q, log_decay), erase_key is not None, shared)


@side_by_side()
def correct(
    chosen: Tiles, sequences: Sequences, arrays: dict[str, Any], S: Any, S_next: Any, scale: float
) -> tuple[Any, DeltaRuleState]:
    """All tokens; ``arrays`` are q, k, v, beta, log_decay and erase_key. The state S ends in S_next, which may be S."""
    q, v = arrays["q"], arrays["v"]
    gate, name = gate_of(q, arrays["log_decay"]), np.dtype(q.dtype).name
    tokens, terms = q.shape[-2], terms_of(name, gate)
    o = empty(sequences, (tokens, v.shape[-1]), q.dtype, q)
    owns = {"beta": ROW, "log_decay": BOTH if gate == "channel" else ROW}
    given = {key: (x, owns.get(key, BOTH)) for key, x in (arrays | {"S": None, "S_next": None, "o": o}).items()}
    constants = {"K": q.shape[-1], "KEYS": chosen.keys, "CHUNK": chosen.chunk, "GATE": GATES[gate]}
    constants |= {"ERASE": int(arrays["erase_key"] is not None), "DATA_TERMS": terms.data, "SUM_TERMS": terms.sums}
    constants["GROUPED"] = int(sequences.groups > 1)
    each = numbers_of_a_record(chosen, terms, v.shape[-1], sequences.groups) * sequences.memories
    part = part_of(tokens, chosen.chunk, each) if each else tokens
    records = _launch.machine.scratch(each * -(-part // chosen.chunk))
    walk = walk_of(chosen, q, gate, sequences.groups)
    for first in range(0, tokens, part):
        here = {key: (rows_of(x, own, first, part), own) for key, (x, own) in given.items()}
        here |= {"S": (S_next if first else S, BOTH), "S_next": (S_next, BOTH)}
        types = {"data": q.dtype, "real": S.dtype}
        scalars = {"tokens": min(part, tokens - first), "columns": v.shape[-1], "records": records, "scale": scale}
        launch_pair(chosen, walk, sequences, here, types, constants, scalars)
    return o, DeltaRuleState(S_next)


def part_of(tokens: int, chunk: int, each: int) -> int:
    """Tokens whose records are kept at a time, where one chunk of all memories takes so many numbers."""
    return min(max(RECORDS // each, LEAST) * chunk, tokens)


def rows_of(x: Any, own: tuple[int, ...], first: int, count: int) -> Any:
    """Some tokens of an array, the last axis or the one before it."""
    if x is None:
        return None
    return x[..., first : first + count] if own == ROW else x[..., first : first + count, :]


def launch_pair(
    chosen: Tiles,
    walk: Walk,
    sequences: Sequences,
    given: dict[str, Any],
    types: dict[str, Any],
    constants: dict[str, int],
    scalars: dict[str, Any],
) -> None:
    """What does not depend on the memory, of all chunks; then the walk over them."""
    threads = (128 if constants["GATE"] == GATES["channel"] else 64) * max(chosen.chunk // 16, 2)
    grid = _calls.Grid(-(-scalars["tokens"] // chosen.chunk), threads, chosen.prepare)
    only_read = given | {name: (None, BOTH) for name in ("S", "S_next", "o")}
    launch(PREPARE, sequences, only_read, (), types, constants, grid, **scalars)
    grid = _calls.Grid(-(-scalars["columns"] // VALUES), walk.threads, walk.shared)
    launch(walk.kernel, sequences, given, ("S_next", "o"), types, constants, grid, **scalars)
