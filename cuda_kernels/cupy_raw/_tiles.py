"""How much of a sequence a block of threads takes at once: fixed per operator, head size and device, never tuned."""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

import numpy as np

from .. import _calls
from . import _launch

__all__ = ["STATIC", "Tiles", "cut", "pieces", "tiles"]

STEP, TOGETHER = 64, 4  # of a scan: tokens that a piece has a multiple of; blocks that a multiprocessor should have
CHUNKED_FROM = 32  # tokens: below, one token after the other is faster
WORTH_A_LAUNCH = 8  # chunks: sequences of fewer are never cut in pieces
LONGEST = 256  # state column that fits in the registers of a warp, 16 at a time
WIDEST = 128  # value columns of one block, 16 per warp
TERMS = {"bfloat16": 1, "float16": 2, "float32": 3}  # numbers of bfloat16 that hold one of these without a loss
SUM_TERMS = {"bfloat16": 2, "float16": 2, "float32": 3}  # and what is computed from them, to 16 or 24 bits
STATIC = 512  # bytes of shared memory for what a text of chunks declares itself
CHUNK = 32  # tokens, if they fit: with more, answers and state would leave no registers for a second block
REGISTERS = 65536  # of a multiprocessor
MOST = 8  # blocks together: more than enough warps
RESERVED = 1024  # bytes of each block's shared memory, for the system


class Tiles(NamedTuple):
    """What the text of a chunked kernel is compiled for."""

    chunk: int  # tokens
    keys: int  # rows of the state, rounded up to whole matrices
    values: int  # columns of the state per block
    direct: bool  # whether products read the data where they arrive
    data_terms: int
    key_terms: int
    sum_terms: int
    shared: int  # bytes that a launch asks for
    together: int  # blocks that share a multiprocessor

    @property
    def threads(self) -> int:
        """Of a block: a warp has 16 columns."""
        return 2 * self.values


def tiles(dtype: Any, tokens: int, rows: int, columns: int, gate: str, shared: int) -> Tiles | None:
    """The choice for one call; None where tokens are better taken one after the other, or no block has the room.

    Parameters
    ----------
    dtype
        Of the data; float64 has no chunked form.
    tokens, rows, columns
        Sizes of the axes t, k and v.
    gate
        ``none``, ``step`` or ``channel``: which axes ``log_decay`` has.
    shared
        Bytes of shared memory that a block may have on this device.
    """
    name = np.dtype(dtype).name
    if name not in TERMS or tokens < CHUNKED_FROM or not 0 < rows <= LONGEST or columns < 1:
        return None
    keys = -(-rows // 16) * 16
    values = min(16 << (max(columns - 1, 1).bit_length() - 4 if columns > 16 else 0), WIDEST)
    direct = name == "bfloat16"
    chunk = CHUNK if keys <= 128 else 16  # a state of more rows leaves few registers for answers
    key_terms = SUM_TERMS[name] if gate == "channel" else TERMS[name]
    while values >= 16:
        found = Tiles(chunk, keys, values, direct, TERMS[name], key_terms, SUM_TERMS[name], 0, 1)
        found = found._replace(shared=bytes_of(found, np.dtype(dtype).itemsize, gate))
        if found.shared + STATIC <= shared:
            return found._replace(together=together(found, shared))
        chunk, values = (chunk // 2, values) if chunk > 16 else (chunk, values // 2)
    return None


def together(sizes: Tiles, shared: int) -> int:
    """Blocks that share a multiprocessor, by what they need of its registers and of its shared memory."""
    registers = 128 if sizes.sum_terms == 2 and sizes.keys <= 128 else 255  # of a thread
    by_memory = (shared + RESERVED) // (sizes.shared + STATIC + RESERVED)
    return min(REGISTERS // (registers * sizes.threads), by_memory, MOST)


def bytes_of(sizes: Tiles, itemsize: int, gate: str) -> int:
    """Shared memory that a block is launched with, as the text lays it out: rows of tiles are 8 numbers apart."""
    chunk, keys, values, stages = sizes.chunk, sizes.keys + 8, sizes.values + 8, 1 + sizes.direct
    direct_keys = sizes.direct and gate != "channel"
    arriving = chunk * (2 * keys * (1 + direct_keys) + values * stages) * itemsize
    arriving += {"none": 0, "step": 4 * (chunk + 8) * stages, "channel": 4 * chunk * keys}[gate]
    split = 4 * chunk * keys * sizes.key_terms * (not direct_keys)
    split += 2 * chunk * values * sizes.data_terms * (not sizes.direct)
    scores = 2 * sizes.sum_terms * chunk * (chunk + 8)
    octets, sharers = chunk // 8, min(sizes.keys, sizes.values) // 16
    numbers = 2 * chunk + 3 * sizes.keys
    numbers += {"none": 0, "step": 20 * chunk + 128, "channel": 32 * sharers * octets * (octets + 1)}[gate]
    return arriving + split + scores + 4 * numbers


def pieces(tokens: int, chunk: int, blocks: int, multiprocessors: int) -> tuple[int, int]:
    """Number of pieces of a sequence and tokens in each, so that all multiprocessors work.

    A piece begins with a walk over the pieces before it, so there are at most as many as each has chunks; and a second
    launch takes as long as a few chunks.
    """
    chunks = -(-tokens // chunk)
    wanted = max(min(multiprocessors // max(blocks, 1), isqrt(chunks)), 1) if chunks >= WORTH_A_LAUNCH else 1
    length = -(-chunks // wanted) * chunk
    return -(-tokens // length), length


def cut(memories: int, tokens: int, columns: int, parts: int, dtype: Any) -> tuple[_calls.Grid, int, int]:
    """How a scan is cut: a launch over whole sequences; number and length of pieces, so that nobody is idle."""
    whole = _calls.grid(columns, parts)
    if dtype != np.float32 or not tokens:  # what pieces leave to each other is of single precision
        return whole, 1, tokens
    wanted = TOGETHER * _launch.machine.device().multiprocessors
    return whole, *pieces(tokens, STEP, memories * whole.blocks, wanted)
