"""Mesa layer on the GPU: the Gram matrices of pieces, the solutions of all pieces at once, then what they recall.

    H_t = g_t H_{t-1} + beta_t k_t k_t^T,    x_t = (H_t + diag(ridge))^-1 q_t,    o_t = G_t^T x_t

``gram.cu`` walks over the keys and leaves H at the start of each piece of tokens; the kernel of the solver has a block
per piece; ``recall.cu`` walks over keys and values. All sums are in double precision. Memory beside arrays and states:
two matrices of the size of H per piece, three for ``cg``. See ``ttr_np.solvers.mesa`` for the solvers and the sources.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.notation import MesaState
from ttr_np.solvers.mesa import check_leading, check_options, check_weights, ridge_refusal, tolerance_for

from .._calls import THREADS, split
from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import warn_of_limit
from ._launch import Kernel, empty, even, launch, run

__all__ = ["mesa", "refusal"]

PIECE = 64
GRAM, RECALL = Kernel("gram", "grams.cuh"), Kernel("recall", "grams.cuh")
SOLVERS = {
    "exact": Kernel("mesa_exact", "blocks.cuh", "factors.cuh", "grams.cuh"),
    "cg": Kernel("mesa_cg", "blocks.cuh", "factors.cuh", "grams.cuh"),
    "chebyshev": Kernel("mesa_chebyshev", "blocks.cuh", "grams.cuh"),
}


def mesa(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    beta: Any = None,
    ridge: Any = 1.0,
    solver: str = "exact",
    iterations: int | None = None,
    tolerance: float | None = None,
    **common: Any,
) -> Any:
    """Mesa layer; see ``ttr_np.mesa``."""
    check_weights(q, log_decay, beta, common.get("mask"))
    check_options(k, ridge, solver, iterations, tolerance)
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    options = {"ridge": ridge, "solver": solver, "iterations": iterations, "tolerance": tolerance}
    return run(core, "mesa", arrays, options, **common)


def refusal(**arguments: Any) -> str | None:
    """Why a call with these arguments has no kernel, or None."""
    return ridge_refusal("cupy", **arguments)


def core(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    beta: Any,
    *,
    ridge: Any,
    solver: str,
    iterations: int | None,
    tolerance: float | None,
    state: MesaState,
) -> tuple[Any, MesaState]:
    """Three launches, with the state in double precision."""
    (tokens, rows), columns, gate = q.shape[-2:], v.shape[-1], state.G.dtype
    G, H = (x.astype(np.float64) for x in state)
    sequences = Sequences(G.shape[:-2], np.broadcast_shapes(q.shape[:-2], G.shape[:-2]))
    check_leading(np.asarray(ridge, like=G), sequences.lead)
    types = {"data": q.dtype, "gate": gate, "real": G.dtype}
    pairs = {"k": (k, BOTH), "log_decay": (log_decay, ROW), "beta": (beta, ROW)}
    per_thread, parts = split("k", rows)
    sizes = {"K": rows, "ROWS": per_thread, "PARTS": parts, "PIECE": PIECE}

    memories = Sequences(G.shape[:-2], G.shape[:-2])
    starts = empty(memories, (-(-tokens // PIECE) * rows, rows), G.dtype, G)
    arrays = pairs | {"H": (H, BOTH), "starts": (starts, BOTH)}
    launch(GRAM, memories, arrays, ("H", "starts"), types, sizes, tokens=tokens, columns=rows)

    ridge = np.broadcast_to(np.asarray(ridge, np.float64, like=G), np.shape(ridge)[:-1] + (rows,))
    limits = {"iterations": iterations, "tolerance": tolerance_for(solver, iterations, tolerance, gate)}
    x = solve(solver, sequences, q, pairs, ridge, starts, types, gate, **limits)

    o = empty(sequences, (tokens, columns), q.dtype, q)
    arrays = {"x": (x, BOTH), "k": (k, BOTH), "v": (v, BOTH)} | pairs | {"G": (G, BOTH), "o": (o, BOTH)}
    sizes["EVEN"] = even(x)
    launch(RECALL, sequences, arrays, ("G", "o"), types, sizes, tokens=tokens, columns=columns)
    return o, MesaState(G.astype(gate), H.astype(gate))


def solve(
    solver: str,
    sequences: Sequences,
    q: Any,
    pairs: Any,
    ridge: Any,
    starts: Any,
    types: Any,
    gate: Any,
    iterations: int | None,
    tolerance: float,
) -> Any:
    """The solutions of all tokens; a warning where a limit ended them."""
    (tokens, rows), memories = q.shape[-2:], Sequences(starts.shape[:-2], starts.shape[:-2])
    pieces = -(-tokens // PIECE)
    x = empty(sequences, (tokens, rows), starts.dtype, starts)
    factors = empty(memories, (2 * pieces * rows, rows), starts.dtype, starts)
    worst = np.zeros_like(starts, shape=(*memories.lead, pieces, 2))
    arrays = {"q": (q, BOTH)} | pairs | {"ridge": (ridge, COLUMN), "starts": (starts, BOTH)}
    arrays |= {} if solver == "chebyshev" else {"factors": (factors, BOTH)}
    arrays |= {"x": (x, BOTH)} | ({} if solver == "exact" else {"worst": (worst, BOTH)})
    most = (iterations or 2 * rows) if solver == "cg" else (iterations or 0)
    numbers = {"iterations": most, "tolerance": tolerance, "eps": float(np.finfo(gate).eps)}
    sizes = {"K": rows, "PIECE": PIECE} | ({"PRECONDITION": int(tolerance > 0)} if solver == "cg" else {})
    written = ("x",) if solver == "exact" else ("x", "worst")
    launch(
        SOLVERS[solver], sequences, arrays, written, types, sizes, tokens=tokens, columns=pieces * THREADS, **numbers
    )
    warn_of_limit(solver, worst, tolerance)
    return x
