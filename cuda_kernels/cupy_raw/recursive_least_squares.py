"""Recursive least squares on the GPU: chunks on tensor cores, or the chain of covariances and then the solution.

In chunks P and the solution are carried together, by ``recursive_least_squares_chunks.cu``. Few tokens, keys of many
channels and data in double precision go another way: P does not depend on the values, so
``recursive_least_squares.cu`` walks over it alone, one block per memory, and leaves the gain of every token;
``innovations.cu`` follows with as many blocks as the values need. See ``ttr_np.solvers.recursive_least_squares`` for
the mathematics, the two caps, and the sources.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ttr_np.notation import RecursiveLeastSquaresState
from ttr_np.solvers.recursive_least_squares import FAINTEST, check_ridge, check_weights, limit, start

from .._calls import Grid, split
from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import few, refuse_covariance, together
from . import _launch
from . import _least_squares_chunks as _chunks
from ._launch import Kernel, empty, even, launch, run, side_by_side

__all__ = ["recursive_least_squares"]

CHAIN = Kernel("recursive_least_squares", "blocks.cuh", "factors.cuh", "caps.cuh")
CHUNKS = Kernel("recursive_least_squares_chunks", *_chunks.HEADERS, "covariance.cuh", "factors.cuh", "caps.cuh")
BEGIN = Kernel("least_squares_begin", *_chunks.HEADERS, "covariance.cuh")
TENSOR = Kernel("recursive_least_squares_tensor", "blocks.cuh", "caps.cuh", "mma_f64.cuh", "tensor.cuh")
SOLUTION = Kernel("innovations")
TENSOR_THREADS = 32 * (_chunks.WARPS + 2)
TENSOR_DECLARED = 3 << 10  # bytes of shared memory that the text declares itself
MANY = 1024  # tokens: of fewer, which cost little, some memories would lose more digits than the solver does
MOST = 256  # times the weight of a pair that P is before it: beyond, single precision has too few digits


def recursive_least_squares(
    q: Any, k: Any, v: Any, *, log_decay: Any = None, beta: Any = None, ridge: float = 1.0, **common: Any
) -> Any:
    """Recursive least squares; see ``ttr_np.recursive_least_squares``."""
    check_ridge(ridge)
    check_weights(q, log_decay, beta, common.get("mask"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    return run(core, "recursive_least_squares", arrays, start=partial(start, ridge), **common)


def core(
    q: Any, k: Any, v: Any, log_decay: Any, beta: Any, *, state: RecursiveLeastSquaresState
) -> tuple[Any, RecursiveLeastSquaresState]:
    """All tokens, in the form that is better for them."""
    lead = state.S.shape[:-2]
    sequences = Sequences(lead, np.broadcast_shapes(q.shape[:-2], lead))
    chosen = _chunks.plan(q, v, sequences, bytes_of, int(FAINTEST))
    pairs = _chunks.pairs_of(k, v, log_decay, beta)
    if chosen is None:
        return one_by_one(sequences, q, pairs, state)
    return in_chunks(chosen, sequences, q, pairs, state)


def bytes_of(keys: int) -> int:
    """Shared memory of a block in chunks, as the text lays it out."""
    return _chunks.square(keys) + 8 * keys * (_chunks.CHUNK + 2) + _chunks.PAIRS + 2 * _chunks.tokens_of(keys)


def in_chunks(
    chosen: _chunks.Plan, sequences: Sequences, q: Any, pairs: Any, state: RecursiveLeastSquaresState
) -> tuple[Any, RecursiveLeastSquaresState]:
    """The answers and the state, once it is known that P is a covariance."""
    o, after, bad = walk(chosen, sequences, q, pairs, state)
    refuse_covariance(bad, state.P)
    return o, after


@side_by_side()
def walk(
    chosen: _chunks.Plan, sequences: Sequences, q: Any, pairs: Any, state: RecursiveLeastSquaresState
) -> tuple[Any, RecursiveLeastSquaresState, Any]:
    """One launch, or two where the sequence is cut in pieces; also where P is no covariance."""
    (S, P), (tokens, rows), columns = state, q.shape[-2:], pairs["v"][0].shape[-1]
    types, sizes = {"data": q.dtype, "gate": S.dtype, "real": np.float64}, {"tokens": tokens, "columns": columns}
    sums = _chunks.sums_of(chosen, sequences, pairs, types, sizes | {"rows": rows})
    S_next, P_next = _launch.alike(S), _launch.alike(P)
    bad = np.zeros_like(P, shape=(*P.shape[:-2], 1), dtype=bool)
    o = empty(sequences, (tokens, columns), q.dtype, q)
    arrays = {"q": (q, BOTH)} | pairs | {"S": (S, BOTH), "P": (P, BOTH)}
    results = {"S_next": (S_next, BOTH), "P_next": (P_next, BOTH), "o": (o, BOTH)}
    scalars = sizes | {"length": chosen.length, "pieces": chosen.pieces, "sums": sums}
    grid, room = chosen.grid(chosen.pieces), chosen.keys * _chunks.VALUES  # of double precision, two for each block
    scalars |= {"rooms": _launch.machine.scratch(4 * room * grid.blocks * sequences.memories)}
    scalars |= {"limit": limit(S.dtype), "eps": float(np.finfo(S.dtype).eps)}
    constants = {"K": rows, "ROOM": room, "BEGUN": 4 + chosen.keys * (chosen.keys + _chunks.VALUES)} | chosen.constants
    constants["GROUPED"] = int(sequences.groups > 1)
    scalars |= in_single_precision(chosen, sequences, arrays, results, types, constants, scalars)
    arrays |= {"S_end": (S_next, BOTH), "P_end": (P_next, BOTH), "bad_next": (bad, COLUMN), "answers": (o, BOTH)}
    written = ("S_end", "P_end", "bad_next", "answers")  # not all are written, so they go there too
    launch(CHUNKS, sequences, arrays, written, types, constants, grid, **scalars)
    return o, RecursiveLeastSquaresState(S_next, P_next), bad


def in_single_precision(
    chosen: _chunks.Plan,
    sequences: Sequences,
    arrays: dict[str, Any],
    results: dict[str, Any],
    types: dict[str, Any],
    constants: dict[str, int],
    scalars: dict[str, Any],
) -> dict[str, Any]:
    """Two launches for data of bfloat16, of which blocks keep what they began with and what they leave to do."""
    shared = tensor_bytes(chosen.keys)
    narrow = types["data"].name == "bfloat16" and sequences.groups == 1 and scalars["tokens"] >= MANY
    if not narrow or shared + TENSOR_DECLARED > _launch.machine.device().shared:
        return {"begun": None, "doubts": None}
    blocks = chosen.pieces * chosen.column_blocks
    sizes = {"begun": constants["BEGUN"], "doubts": 1}  # of each block
    left = {name: _launch.machine.scratch(size * blocks * sequences.memories) for name, size in sizes.items()}
    before = {name: arrays[name] for name in ("S", "P")}
    constants, scalars = constants | {"MOST": MOST}, scalars | left
    grid = Grid(blocks, chosen.threads, _chunks.square(chosen.keys) + 32 * chosen.keys)
    launch(BEGIN, sequences, before, (), types, constants, grid, **scalars)
    own = {name: x for name, x in arrays.items() if name != "S"} | results
    grid = Grid(blocks, TENSOR_THREADS, shared)
    launch(TENSOR, sequences, own, tuple(results), types, constants, grid, **scalars)
    return left


def tensor_bytes(keys: int) -> int:
    """Shared memory of a block in single precision, as the text lays it out."""
    chunk, wide = _chunks.CHUNK, keys + 8
    place, pairs = 6 * chunk * wide, 8 * chunk * (chunk + 2)
    return 6 * keys * wide + place + 2 * max(place, pairs, 2 * chunk * (_chunks.VALUES + 8)) + 8 * chunk * wide + pairs


def one_by_one(
    sequences: Sequences, q: Any, pairs: Any, state: RecursiveLeastSquaresState
) -> tuple[Any, RecursiveLeastSquaresState]:
    """Two launches, with the state in double precision."""
    (tokens, rows), gate = q.shape[-2:], state.S.dtype
    k, v, log_decay, beta = (x for x, _ in pairs.values())
    S, P = (x.astype(np.float64) for x in state)
    gains = gains_of(k, log_decay, beta, P, gate)
    columns = v.shape[-1]
    o = empty(sequences, (tokens, columns), q.dtype, q)
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), "beta": (beta, ROW), "gains": (gains, BOTH)}
    arrays |= {"S": (S, BOTH), "o": (o, BOTH)}
    per_thread, parts = split("k", rows)
    constants = {"K": rows, "ROWS": per_thread, "PARTS": parts, "EVEN": even(q)}
    types = {"data": q.dtype, "gate": gate, "real": S.dtype}
    launch(SOLUTION, sequences, arrays, ("S", "o"), types, constants, tokens=tokens, columns=columns)
    return o, RecursiveLeastSquaresState(S.astype(gate), P.astype(gate))


def gains_of(k: Any, log_decay: Any, beta: Any, P: Any, gate: Any) -> Any:
    """The gains of all tokens; P becomes that of the last one. ``gate`` is the dtype of gates and of the caller's P."""
    lead, (tokens, rows) = P.shape[:-2], k.shape[-2:]
    sequences, original = Sequences(lead, lead), P.copy()
    gains, bad = empty(sequences, (tokens, rows), P.dtype, P), np.zeros_like(P, shape=(*lead, 1), dtype=bool)
    root, scratch = (empty(sequences, (rows, rows), P.dtype, P) for _ in range(2))
    arrays = {"k": (k, BOTH), "log_decay": (log_decay, ROW), "beta": (beta, ROW), "P": (P, BOTH), "root": (root, BOTH)}
    arrays |= {"scratch": (scratch, BOTH), "gains": (gains, BOTH), "bad": (bad, COLUMN)}
    constants = {"K": rows, "CHUNK": together(tokens, 3 * rows * P.itemsize)}
    types, written = {"data": k.dtype, "gate": gate, "real": P.dtype}, ("P", "gains", "bad")
    numbers = {"limit": limit(gate), "eps": float(np.finfo(gate).eps)}
    launch(CHAIN, sequences, arrays, written, types, constants, tokens=tokens, columns=few(rows), **numbers)
    refuse_covariance(bad, original.astype(gate))
    return gains
