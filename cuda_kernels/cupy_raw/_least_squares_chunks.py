"""Exact least squares on the GPU, chunk by chunk on tensor cores in double precision.

A block walks over one memory with up to 128 value columns. Where that leaves multiprocessors idle the sequence is cut
in pieces: ``pair_sums.cu`` makes what the pairs of each piece add to the Gram matrix and to the solution, and a piece
begins with the solution of all pairs before it. Memory beside arrays and states: those sums, and a matrix per block. A
piece of ``recursive_least_squares`` before which some directions have faded walks over all tokens from the first on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._calls import Grid
from .._sequences import BOTH, ROW, Sequences
from . import _launch
from ._launch import Kernel, launch

__all__ = ["CHUNK", "HEADERS", "PAIRS", "VALUES", "WARPS", "Plan", "pairs_of", "plan", "square", "sums_of", "tokens_of"]

CHUNK, WARPS = 32, 8  # tokens, warps of a block
VALUES, THREADS = 16 * WARPS, 32 * WARPS
WIDEST = 128  # keys: P of more does not fit in shared memory
LEAST = 8 * CHUNK  # tokens of a piece: a piece begins with a matrix inverted
DECLARED = 12 << 10  # bytes of shared memory that a text may declare itself
HEADERS = ("blocks.cuh", "mma_f64.cuh", "doubles.cuh", "least_squares.cuh")
SUMS = Kernel("pair_sums", *HEADERS)


class Plan(NamedTuple):
    """How a call is cut."""

    keys: int  # rows of P, rounded up to whole matrices
    column_blocks: int
    pieces: int
    length: int  # tokens of a piece
    shared: int  # bytes that a launch asks for
    faintest: int  # log decay from which on no less is left

    @property
    def constants(self) -> dict[str, int]:
        """What texts are compiled for."""
        return {"KEYS": self.keys, "CHUNK": CHUNK, "FAINTEST": self.faintest}

    @property
    def threads(self) -> int:
        """Of a block."""
        return THREADS

    def grid(self, pieces: int) -> Grid:
        """Blocks of a memory, for so many pieces."""
        return Grid(pieces * self.column_blocks, THREADS, self.shared)


def plan(q: Any, v: Any, sequences: Sequences, bytes_of: Callable[[int], int], faintest: int) -> Plan | None:
    """The choice for these arrays; None where one token after the other is the better form.

    Parameters
    ----------
    q, v
        Queries and values; data in double precision have no chunked form.
    sequences
        Of the call.
    bytes_of
        Shared memory that a text asks for, by the rows of P.
    faintest
        A log decay below it counts as this one.
    """
    (tokens, rows), columns = q.shape[-2:], v.shape[-1]
    if np.dtype(q.dtype) == np.float64 or tokens < CHUNK or not 0 < rows <= WIDEST or columns < 1:
        return None
    keys, column_blocks, device = -(-rows // 16) * 16, -(-columns // VALUES), _launch.machine.device()
    shared = bytes_of(keys)
    if shared + DECLARED > device.shared:
        return None
    blocks = sequences.memories * column_blocks  # of which a multiprocessor has one
    cut = max(min(device.multiprocessors // max(blocks, 1), tokens // LEAST), 1)
    length = -(-tokens // (cut * CHUNK)) * CHUNK
    return Plan(keys, column_blocks, -(-tokens // length), length, shared, faintest)


def square(keys: int) -> int:
    """Bytes of a matrix of keys x keys, whose rows lie 8 numbers apart."""
    return 8 * keys * (keys + 8)


def tokens_of(columns: int) -> int:
    """Bytes of a chunk of rows as they are."""
    return 4 * CHUNK * (columns + 8)


PAIRS = 8 * CHUNK * (CHUNK + 8)  # bytes of a matrix of tokens x tokens


def sums_of(
    chosen: Plan, sequences: Sequences, pairs: dict[str, Any], types: dict[str, Any], sizes: dict[str, int]
) -> Any:
    """What the pairs of each piece but the last add; None where there is one piece.

    Parameters
    ----------
    chosen, sequences
        How the call is cut, and its memories.
    pairs
        k, v, log_decay and beta, each with its own axes.
    types, sizes
        Of the text, and its scalars.
    """
    stored = chosen.pieces - 1
    if not stored:
        return None
    blocks = chosen.keys // 16
    each = 128 * blocks * (blocks + 1) + chosen.keys * VALUES + 2
    grid = chosen.grid(stored)._replace(shared=tokens_of(chosen.keys) + tokens_of(VALUES))
    sums = _launch.machine.scratch(2 * each * grid.blocks * sequences.memories)
    constants = {"K": sizes["rows"]} | chosen.constants
    numbers = {"tokens": sizes["tokens"], "columns": sizes["columns"], "length": chosen.length, "stored": stored}
    launch(SUMS, sequences, pairs, (), types, constants, grid, sums=sums, **numbers)
    return sums


def pairs_of(k: Any, v: Any, log_decay: Any, beta: Any) -> dict[str, Any]:
    """The arrays of pairs, with the axes of each."""
    return {"k": (k, BOTH), "v": (v, BOTH), "log_decay": (log_decay, ROW), "beta": (beta, ROW)}
