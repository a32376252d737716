"""Mesa layer on the GPU, token by token: the solutions of all tokens, then what they recall.

    H_t = g_t H_{t-1} + beta_t k_t k_t^T,    x_t = (H_t + diag(ridge))^-1 q_t,    o_t = G_t^T x_t

All sums are in double precision. See ``_mesa`` for the solvers and ``ttr_np.solvers.mesa`` for the sources.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float64

from ttr_np.notation import MesaState
from ttr_np.solvers.mesa import check_leading, check_options, check_start, check_weights, ridge_refusal, tolerance_for

from .._calls import placed, split
from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import few, warn_of_limit
from ._launch import empty, launch, per_channel, run
from ._mesa import SOLVERS
from .linear_attention import kernel_for

__all__ = ["mesa", "refusal"]

PLANES = (0, 1, 2)  # a stack of matrices has three axes of its own


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
    check_start(common.get("initial_state"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    options = {"ridge": ridge, "solver": solver, "iterations": iterations, "tolerance": tolerance}
    return run(core, "mesa", arrays, options, **common)


def refusal(**arguments: Any) -> str | None:
    """Why a call with these arguments has no kernel, or None."""
    return ridge_refusal("numba-cuda", **arguments)


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
    """Two launches, with the state in double precision; a pair of weight zero is not even looked at."""
    (tokens, size), width, dtype = q.shape[-2:], v.shape[-1], state.G.dtype
    rows, parts = split("k", size)
    G, H = (x.astype(np.float64) for x in state)
    sequences = Sequences(G.shape[:-2], np.broadcast_shapes(q.shape[:-2], G.shape[:-2]))
    ridge = placed(ridge, np.float64, G)
    check_leading(ridge, sequences.lead)
    ridge = np.broadcast_to(ridge, ridge.shape[:-1] + (size,))
    x = solve(sequences, q, k, log_decay, beta, ridge, H, solver, iterations, tolerance, dtype)
    if beta is not None:
        weight = beta[..., None]
        k, v = (np.where(weight == 0, x.dtype.type(0), x) for x in (k, v))
        v = weight.astype(np.float64) * v
    o = empty(sequences, (tokens, width), dtype, q)
    arrays = {"q": (x, BOTH), "k": (k, BOTH), "v": (v, BOTH), "log_decay": (per_channel(log_decay, q), BOTH)}
    arrays |= {"bonus": (None, COLUMN), "S": (G, BOTH), "z": (None, COLUMN), "z_next": (None, COLUMN), "o": (o, BOTH)}
    recall = kernel_for(size, rows, parts, float64, False)
    launch(recall, sequences, arrays, ("S", "z_next", "o"), tokens, width, parts, np.float64(1))
    return o, MesaState(G.astype(dtype), H.astype(dtype))


def solve(
    sequences: Sequences,
    q: Any,
    k: Any,
    log_decay: Any,
    beta: Any,
    ridge: Any,
    H: Any,
    solver: str,
    iterations: int | None,
    tolerance: float | None,
    dtype: Any,
) -> Any:
    """The solutions of all tokens; H becomes that of the last one. A warning where a limit ended them."""
    (tokens, size), lead = q.shape[-2:], H.shape[:-2]
    x = empty(sequences, (tokens, size), H.dtype, H)
    factors = empty(Sequences(lead, lead), (2, size, size), H.dtype, H)
    worst = np.zeros_like(H, shape=(*lead, 2))
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "log_decay": (log_decay, ROW), "beta": (beta, ROW)}
    arrays |= {"ridge": (ridge, COLUMN), "H": (H, BOTH), "factors": (factors, PLANES), "worst": (worst, COLUMN)}
    arrays |= {"x": (x, BOTH)}
    most = (iterations or 2 * size) if solver == "cg" else (iterations or 0)
    tolerance = tolerance_for(solver, iterations, tolerance, dtype)
    numbers = (most, np.float64(tolerance), np.float64(np.finfo(dtype).eps))
    written = ("H", "factors", "worst", "x")
    launch(SOLVERS[solver], sequences, arrays, written, tokens, few(size), 1, *numbers)
    warn_of_limit(solver, worst, tolerance)
    return x
