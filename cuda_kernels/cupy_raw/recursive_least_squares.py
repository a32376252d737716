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

from .._calls import split
from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import few, refuse_covariance, together
from . import _launch
from . import _least_squares_chunks as _chunks
from ._launch import Kernel, empty, even, launch, run

__all__ = ["recursive_least_squares"]

CHAIN = Kernel("recursive_least_squares", "blocks.cuh", "factors.cuh", "caps.cuh")
CHUNKS = Kernel("recursive_least_squares_chunks", *_chunks.HEADERS, "factors.cuh", "caps.cuh")
SOLUTION = Kernel("innovations")


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
    """One launch, or two where the sequence is cut in pieces."""
    (S, P), (tokens, rows), columns = state, q.shape[-2:], pairs["v"][0].shape[-1]
    types, sizes = {"data": q.dtype, "gate": S.dtype, "real": np.float64}, {"tokens": tokens, "columns": columns}
    sums = _chunks.sums_of(chosen, sequences, pairs, types, sizes | {"rows": rows})
    S_next, P_next = _launch.alike(S), _launch.alike(P)
    bad = np.zeros_like(P, shape=(*P.shape[:-2], 1), dtype=bool)
    o = empty(sequences, (tokens, columns), q.dtype, q)
    arrays = {"q": (q, BOTH)} | pairs | {"S": (S, BOTH), "P": (P, BOTH), "S_next": (S_next, BOTH)}
    arrays |= {"P_next": (P_next, BOTH), "bad_next": (bad, COLUMN), "o": (o, BOTH)}
    scalars = sizes | {"length": chosen.length, "pieces": chosen.pieces, "sums": sums}
    grid, room = chosen.grid(chosen.pieces), chosen.keys * _chunks.VALUES  # of double precision, for each block
    scalars |= {"rooms": _launch.machine.scratch(2 * room * grid.blocks * sequences.memories)}
    scalars |= {"limit": limit(S.dtype), "eps": float(np.finfo(S.dtype).eps)}
    written, constants = ("S_next", "P_next", "bad_next", "o"), {"K": rows, "ROOM": room} | chosen.constants
    constants["GROUPED"] = int(sequences.groups > 1)
    launch(CHUNKS, sequences, arrays, written, types, constants, grid, **scalars)
    refuse_covariance(bad, P)
    return o, RecursiveLeastSquaresState(S_next, P_next)


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
