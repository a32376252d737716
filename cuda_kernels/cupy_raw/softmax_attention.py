"""Softmax attention on the GPU: one launch, of one of four texts; few queries of a long past are two launches.

``softmax_decode.cu`` is for few queries: it reads a carried state where it lies. ``softmax_wgmma.cu`` is for data of 16
bits on GPUs of compute capability 9.0 (Hopper): heads of more than 32 and up to 128 channels, causal or full, without a
window, a mask, gates, packed sequences or a scale that is not above zero; see ``on_hopper``. ``softmax_tensor.cu`` is
for all other data of 16 bits, ``softmax_attention.cu`` for what is wider, and for carried states.
"""

from __future__ import annotations

from math import log
from typing import Any, NamedTuple

import numpy as np

from ttr_np.notation import CacheState
from ttr_np.solvers._cache import append, check_options, empty_cache, positions

from .._attention import DOT, Pairs, pairs_of, width_of
from .._calls import THREADS, Grid
from .._sequences import BOTH, ROW, Sequences
from . import _launch
from ._launch import Kernel, empty, launch, replayed, run, side_by_side

__all__ = ["softmax_attention"]

KERNEL = Kernel("softmax_attention", "pairs.cuh")
DECODE = Kernel("softmax_decode", "pairs.cuh")
MERGE = Kernel("softmax_merge", "pairs.cuh")
TENSOR = Kernel("softmax_tensor", "pairs.cuh", "tensor.cuh")
HOPPER = Kernel("softmax_wgmma", "pairs.cuh", "tensor.cuh", "wgmma.cuh", architecture="sm_90a")
LANES = 16  # of a row
SLAB = 16  # channels of keys and queries staged at a time
COLUMNS = 4  # of the values that a thread answers for at a time
FEW = 8  # queries that are told from many
PIECE = 256  # pairs of a piece of the past, or more where these would be more
MOST = 128  # pieces
ROOM = 40 * 1024  # bytes of shared memory for what few queries declare
WIDEST = 128  # value columns of a block on tensor cores
STATIC = 5120  # bytes of shared memory for what the texts for tensor cores declare themselves
LONG = 128  # queries: a block has as many
BEGIN = 1024  # bytes: matrices of the tensor cores of Hopper begin at multiples of these


def softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    log_decay: Any = None,
    **common: Any,
) -> Any:
    """Softmax attention; see ``ttr_np.softmax_attention``."""
    check_options(q, log_decay, causal, window, sinks)
    options = {"scale": scale, "causal": bool(causal), "window": window, "sinks": sinks}
    options["keep"] = bool(common.get("output_final_state"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    return run(core, "softmax_attention", arrays, options, start=empty_cache, **common)


class Tiles(NamedTuple):
    """How one call is cut: constants of the kernel, the blocks of a memory, and what these share."""

    constants: dict[str, int]
    parts: int  # blocks with the same queries, of different value columns
    cuts: int  # blocks with the same queries, of different pieces of the past
    grid: Grid


def tiles(rows: int, width: int, real: np.dtype) -> Tiles:
    """The cut depends on the sizes of one memory only, so that no answer depends on what else is in its batch."""
    square = 64 if real == np.float32 else 32  # what shared memory holds
    columns = min(max(-(-width // LANES), 1), COLUMNS)
    slabs = 1 if width <= columns * LANES else 2
    parts = max(-(-width // (columns * LANES * slabs)), 1)
    constants = {"ROWS": square, "PAIRS": square, "LANES": LANES, "SLAB": SLAB, "C": columns, "SLABS": slabs}
    return Tiles(constants, parts, 1, Grid(-(-rows // square) * parts, THREADS))


def few_tiles(rows: int, pairs: int, channels: int, width: int, real: np.dtype) -> Tiles | None:
    """The same for few queries; None where shared memory has no room for one."""
    single = real == np.float32
    slabs, tall = 2 if single and width > 4 * LANES else 1, 1
    wide, columns = -(-max(channels, 1) // 4) * 4, 4 * LANES * slabs
    if few_bytes(1, wide, columns, real) > ROOM:
        return None
    most = min(rows, FEW if single else FEW // 2)  # as registers allow
    while tall < most and few_bytes(2 * tall, wide, columns, real) <= ROOM:
        tall *= 2
    parts, cuts = max(-(-width // columns), 1), min(max(-(-pairs // PIECE), 1), MOST)
    constants = {"ROWS": tall, "CHANNELS": wide, "LANES": LANES, "SLABS": slabs}
    constants |= {"TOGETHER": 4, "BLOCKS": 5 - tall} if single and tall <= 2 else {"TOGETHER": 2, "BLOCKS": 2}
    return Tiles(constants, parts, cuts, Grid(-(-rows // tall) * parts * cuts, THREADS))


def few_bytes(rows: int, channels: int, columns: int, real: np.dtype) -> int:
    """Shared memory of a block of few queries: these, where keys are measured from, and the means of four warps."""
    return ((rows + 1) * channels + 4 * rows * columns) * real.itemsize


def core(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    mask: Any,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    sinks: int,
    keep: bool,
    state: CacheState,
) -> tuple[Any, CacheState]:
    """One launch over all pairs, or two over pieces of them; the cache grows only to be returned."""
    # A cache that grows has another length at every call: nothing of one is done again in the next.
    ask = answers if keep and state.k.shape[-2] else replayed(answers)
    options = {"scale": scale, "causal": causal, "window": window, "sinks": sinks}
    o, _ = ask(q=q, k=k, v=v, log_decay=log_decay, mask=mask, **options, state=state)
    return o, append(state, k, v, log_decay, mask, window, sinks) if keep else state


def answers(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    mask: Any,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    sinks: int,
    state: CacheState,
) -> tuple[Any, CacheState]:
    """The answers, and the state as it was."""
    options = {"causal": causal, "window": window or 0, "sinks": sinks}
    width = width_of(scale, None, q.shape[-1])
    sequences = Sequences(state.k.shape[:-2], np.broadcast_shapes(q.shape[:-2], state.k.shape[:-2]))
    if sequences.groups * q.shape[-2] <= FEW:
        return average(q, k, v, log_decay, mask, state, DOT, state.k.dtype, width, options), state
    pairs = pairs_of(state, k, v, mask)
    if not on_tensor_cores(q.dtype, pairs):
        return tiled(q, pairs, log_decay, state, DOT, state.k.dtype, width, options), state
    plain = log_decay is None and pairs.position is None and not window
    if plain and on_hopper(q, pairs, sequences, width):
        return hopper(q, pairs, sequences, width, causal), state
    return tensor(q, pairs, log_decay, sequences, width, options), state


def average(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    mask: Any,
    state: CacheState,
    code: int,
    real: Any,
    width: float,
    options: dict[str, int],
) -> Any:
    """Means of the values under a kernel of queries and keys, with sums of dtype ``real``."""
    sequences = Sequences(state.k.shape[:-2], np.broadcast_shapes(q.shape[:-2], state.k.shape[:-2]))
    rows, cached = sequences.groups * q.shape[-2], state.k.shape[-2]
    cut = few_tiles(rows, cached, q.shape[-1], v.shape[-1], np.dtype(real)) if rows <= FEW else None
    if cut is None:
        return tiled(q, pairs_of(state, k, v, mask), log_decay, state, code, real, width, options)
    return decoded(q, k, v, log_decay, mask, state, code, real, width, options, cut)


def tiled(
    q: Any, pairs: Pairs, log_decay: Any, state: CacheState, code: int, real: Any, width: float, options: dict[str, int]
) -> Any:
    """The same for many queries, in tiles that meet tiles of pairs."""
    (tokens, channels), values = q.shape[-2:], pairs.v.shape[-1]
    sequences = Sequences(state.k.shape[:-2], np.broadcast_shapes(q.shape[:-2], state.k.shape[:-2]))
    cut = tiles(sequences.groups * tokens, values, real)
    o = empty(sequences, (tokens, values), q.dtype, q)
    arrays = {"q": (q, BOTH), **pairs.arrays, "log_decay": (log_decay, ROW), "o": (o, BOTH)}
    constants = cut.constants | {"GATED": int(log_decay is not None or pairs.cached > 0), "PLAIN": int(code == DOT)}
    sizes = {"tokens": tokens, "columns": values, "channels": channels, "pairs": pairs.k.shape[-2]}
    sizes |= {"cached": pairs.cached, "parts": cut.parts, "kind": code, "width": width}
    types = {"data": q.dtype, "stored": pairs.k.dtype, "logs": state.k.dtype, "real": real}
    launch(KERNEL, sequences, arrays, ("o",), types, constants, cut.grid, **sizes, **options)
    return o


@side_by_side()
def decoded(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    mask: Any,
    state: CacheState,
    code: int,
    real: Any,
    width: float,
    options: dict[str, int],
    cut: Tiles,
) -> Any:
    """The same for few queries: cached pairs are read where they are, in pieces that a second launch joins."""
    (tokens, channels), values, cached = q.shape[-2:], v.shape[-1], state.k.shape[-2]
    sequences = Sequences(state.k.shape[:-2], np.broadcast_shapes(q.shape[:-2], state.k.shape[:-2]))
    position, count = positions(state, tokens, mask) if options["window"] else (among(mask), None)
    o = empty(sequences, (tokens, values), q.dtype, q)
    pieces = empty(sequences, (cut.cuts * tokens, values + 2), real, q) if cut.cuts > 1 else None
    past = {"past_k": (state.k, BOTH), "past_v": (state.v, BOTH), "placed": (state.position, ROW)}
    past = {name: x if cached else (None, x[1]) for name, x in (past | {"left": (state.log_weight, ROW)}).items()}
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), **past, "position": (position, ROW)}
    arrays |= {"count": (count, ROW), "log_decay": (log_decay, ROW), "o": (o, BOTH), "pieces": (pieces, BOTH)}
    sizes = {"tokens": tokens, "columns": values, "channels": channels, "cached": cached}
    sizes |= {"parts": cut.parts, "cuts": cut.cuts, "kind": code, "width": width}
    types = {"data": q.dtype, "stored": state.k.dtype, "logs": state.k.dtype, "real": real}
    written, constants = "o" if pieces is None else "pieces", cut.constants | {"PLAIN": int(code == DOT)}
    launch(DECODE, sequences, arrays, (written,), types, constants, cut.grid, **sizes, **options)
    if pieces is not None:
        merged, blocks = {"pieces": (pieces, BOTH), "o": (o, BOTH)}, sequences.groups * tokens * -(-values // 32)
        launch(MERGE, sequences, merged, ("o",), types, {"LANES": 32}, Grid(blocks, THREADS), **sizes)
    return o


def among(mask: Any) -> Any:
    """A place for each new pair where only those below zero matter: they are not memorised."""
    return None if mask is None else np.where(mask, 0, -1)


class Block(NamedTuple):
    """Constants of the kernel for tensor cores: queries and pairs that meet; channels and value columns, by 16."""

    ROWS: int
    PAIRS: int
    KD: int
    VD: int

    @property
    def shared(self) -> int:
        """Bytes that it is launched with: for its queries, and for pairs twice."""
        return 2 * (self.ROWS * (self.KD + 8) + 2 * self.PAIRS * (self.KD + self.VD + 16))


def block(rows: int, channels: int, values: int) -> Block | None:
    """The largest that fits, None where none does; it depends on one memory only, as above."""
    wide, columns = (max(-(-size // 16), 1) * 16 for size in (channels, min(values, WIDEST)))
    pairs = 64 if max(wide, columns) <= 64 else 32  # as many logits as there are registers for
    found = (Block(tall, pairs, wide, columns) for tall in (128, 64) if tall == 64 or rows > 64)
    room = _launch.machine.device().shared - STATIC
    return next((cut for cut in found if cut.shared <= room), None)


def on_tensor_cores(dtype: np.dtype, pairs: Pairs) -> bool:
    """Whether they take the data: numbers of 16 bits whose tiles fit. A cache holds float32, which they would round."""
    fits = dtype.itemsize == 2 and pairs.k.dtype == dtype
    return fits and block(1, pairs.k.shape[-1], pairs.v.shape[-1]) is not None


def tensor(q: Any, pairs: Pairs, log_decay: Any, sequences: Sequences, scale: float, options: dict[str, int]) -> Any:
    """Means on tensor cores."""
    (tokens, channels), values = q.shape[-2:], pairs.v.shape[-1]
    o = empty(sequences, (tokens, values), q.dtype, q)
    rows = sequences.groups * tokens
    cut = block(rows, channels, values)
    parts = max(-(-values // cut.VD), 1)
    grid = Grid(-(-rows // cut.ROWS) * parts, THREADS, cut.shared)
    given = {name: x for name, x in pairs.arrays.items() if name != "left"}
    sizes = {"tokens": tokens, "columns": values, "channels": channels, "pairs": pairs.k.shape[-2], "parts": parts}
    types = {"data": q.dtype, "stored": q.dtype, "logs": np.float32, "real": np.float32}
    constants = cut._asdict() | {"LANES": 4, "GATED": int(log_decay is not None)}
    arrays = {"q": (q, BOTH), **given, "log_decay": (log_decay, ROW), "o": (o, BOTH)}
    launch(TENSOR, sequences, arrays, ("o",), types, constants, grid, **sizes, width=scale / log(2), **options)
    return o


class HopperBlock(NamedTuple):
    """Constants of the kernel for Hopper: warpgroups of 64 queries, pairs of a tile, tiles that it holds; columns."""

    CONSUMERS: int
    PAIRS: int
    STAGES: int
    KD: int
    VD: int

    @property
    def shared(self) -> int:
        """Bytes that it is launched with."""
        rows = 64 * self.CONSUMERS * max(self.KD, self.VD) + self.STAGES * self.PAIRS * (self.KD + self.VD)
        return 2 * rows + BEGIN


def hopper_block(channels: int, values: int) -> HopperBlock:
    """What registers have room for: answers and logits of 64 queries by a warpgroup."""
    wide, columns = (-(-size // 64) * 64 for size in (channels, values))
    consumers = 3 if max(wide, columns) == 64 else 2
    return HopperBlock(consumers, 128, 2, wide, columns)


def on_hopper(q: Any, pairs: Pairs, sequences: Sequences, scale: float) -> bool:
    """Whether the tensor cores of Hopper take the data: they are fast where rows lie in pieces of 16 bytes."""
    sizes = q.shape[-1], pairs.v.shape[-1]
    if _launch.machine.device().capability != "90" or not all(32 < size <= 128 and size % 8 == 0 for size in sizes):
        return False
    even = all(x.strides[-1] == 2 and all(step % 16 == 0 for step in x.strides[:-1]) for x in (q, pairs.k, pairs.v))
    return even and sequences.groups * q.shape[-2] >= LONG and scale > np.finfo(np.float32).tiny


def hopper(q: Any, pairs: Pairs, sequences: Sequences, scale: float, causal: bool) -> Any:
    """Means on the tensor cores of Hopper."""
    (tokens, channels), values = q.shape[-2:], pairs.v.shape[-1]
    o = empty(sequences, (tokens, values), q.dtype, q)
    cut = hopper_block(channels, values)
    blocks = -(-sequences.groups * tokens // (64 * cut.CONSUMERS))
    grid = Grid(blocks, THREADS * (1 + cut.CONSUMERS), cut.shared)
    arrays = {"q": (q, BOTH), "k": (pairs.k, BOTH), "v": (pairs.v, BOTH), "o": (o, BOTH)}
    sizes = {"tokens": tokens, "columns": values, "channels": channels, "pairs": pairs.k.shape[-2], "causal": causal}
    types = {"data": q.dtype, "stored": q.dtype, "logs": np.float32, "real": np.float32}
    constants = cut._asdict() | {"LANES": 4}
    launch(HOPPER, sequences, arrays, ("o",), types, constants, grid, **sizes, width=scale / log(2))
    return o
