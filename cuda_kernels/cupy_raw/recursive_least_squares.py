"""Recursive least squares on the GPU: the chain of covariances in chunks, then the solution token by token.

P does not depend on the values: ``recursive_least_squares.cu`` walks over it alone, one block per memory, and leaves
the gain of every token; ``innovations.cu`` follows with as many blocks as the values need. See
``ttr_np.solvers.recursive_least_squares`` for the mathematics, the two caps, and the sources.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ttr_np.notation import RecursiveLeastSquaresState
from ttr_np.solvers.recursive_least_squares import check_ridge, check_weights, limit, start

from .._calls import split
from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import few, refuse_covariance, together
from ._launch import Kernel, empty, even, launch, run

__all__ = ["recursive_least_squares"]

CHAIN = Kernel("recursive_least_squares", "blocks.cuh", "factors.cuh")
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
    """Two launches, with the state in double precision."""
    (tokens, rows), columns, gate = q.shape[-2:], v.shape[-1], state.S.dtype
    S, P = (x.astype(np.float64) for x in state)
    gains = gains_of(k, log_decay, beta, P, gate)
    sequences = Sequences(S.shape[:-2], np.broadcast_shapes(q.shape[:-2], S.shape[:-2]))
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
