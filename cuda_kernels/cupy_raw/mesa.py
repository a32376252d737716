"""Mesa layer on the GPU: the solutions of all tokens, then what they recall.

    H_t = g_t H_{t-1} + beta_t k_t k_t^T,    x_t = (H_t + diag(ridge))^-1 q_t,    o_t = G_t^T x_t

In chunks, on tensor cores in double precision: ``mesa_chunks.cu`` takes the conjugate gradients of all tokens of a
chunk together, to 1e-11 of the right side where the solver is ``exact``; unless the caller limits the steps, a chunk
that needs too many is solved token by token. ``recall_chunks.cu`` is linear attention at the solutions. Few tokens,
Chebyshev steps, keys of many channels and data in double precision go another way: ``gram.cu`` walks over the keys and
leaves H at the start of each piece of tokens; the kernel of the solver has a block per piece; ``recall.cu`` walks over
keys and values. Memory beside arrays and states: two matrices of the size of H per piece, three for ``cg``. All sums
are in double precision, but for ``cg`` on 64 tokens of bfloat16 or more, up to a tolerance that floats can vouch for:
these go through products of bfloat16, see ``_mesa_tensor``, and what is left of them goes on in chunks. See
``ttr_np.solvers.mesa`` for the solvers and the sources.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.notation import MesaState
from ttr_np.solvers.mesa import check_leading, check_options, check_start, check_weights, ridge_refusal, tolerance_for

from .. import _calls
from .._calls import THREADS, placed, split
from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import warn_of_limit
from . import _launch
from . import _least_squares_chunks as _chunks
from . import _mesa_tensor as _tensor
from ._launch import Kernel, empty, even, launch, run, side_by_side

__all__ = ["mesa", "refusal"]

PIECE = 64
GRAM, RECALL = Kernel("gram", "grams.cuh"), Kernel("recall", "grams.cuh")
NOTHING = -104  # log of a decay that is zero in single precision, that of gates in chunks
STEPS, DONE = 4, 1e-11  # of an exact solution in chunks: steps per channel at most, residual
CHUNKS = Kernel("mesa_chunks", *_chunks.HEADERS, "factors.cuh", "grams.cuh", "mesa_exact.cuh")
RECALL_CHUNKS = Kernel("recall_chunks", *_chunks.HEADERS)
SOLVERS = {
    "exact": Kernel("mesa_exact", "blocks.cuh", "factors.cuh", "grams.cuh", "mesa_exact.cuh"),
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
    check_start(common.get("initial_state"))
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
    """All tokens, in the form that is better for them."""
    lead, gate = state.G.shape[:-2], state.G.dtype
    sequences = Sequences(lead, np.broadcast_shapes(q.shape[:-2], lead))
    ridge = placed(ridge, np.float64, state.G)
    check_leading(ridge, sequences.lead)
    ridge = np.broadcast_to(ridge, ridge.shape[:-1] + q.shape[-1:])
    limits = {"iterations": iterations, "tolerance": tolerance_for(solver, iterations, tolerance, gate)}
    chosen = None if solver == "chebyshev" else _chunks.plan(q, v, sequences, bytes_of, NOTHING)
    if chosen is not None:
        pairs, cut = _chunks.pairs_of(k, v, log_decay, beta), _tensor.plan(q, v, sequences, solver, limits["tolerance"])
        if cut is not None:
            o, after, worst = in_floats(cut, chosen, sequences, q, pairs, ridge, state, **limits)
        else:
            o, after, worst = in_chunks(chosen, sequences, q, pairs, ridge, state, solver, **limits)
        if not falls_back(solver, iterations, limits["tolerance"]):
            warn_of_limit(solver, worst, limits["tolerance"])
        return o, after
    return in_pieces(sequences, q, k, v, log_decay, beta, ridge, state, solver, **limits)


def bytes_of(keys: int) -> int:
    """Shared memory of a block in chunks, as the text lays it out."""
    vectors = 8 * (_chunks.CHUNK * (keys + 8) + keys // 16 * _chunks.CHUNK + keys)
    return _chunks.square(keys) + vectors + 2 * _chunks.PAIRS + _chunks.tokens_of(keys)


def falls_back(solver: str, iterations: int | None, tolerance: float) -> bool:
    """Whether a chunk that needs too many steps is solved token by token."""
    return solver == "exact" or (iterations is None and tolerance > 0)


@side_by_side()
def in_floats(
    cut: _tensor.Plan,
    chosen: _chunks.Plan,
    sequences: Sequences,
    q: Any,
    pairs: Any,
    ridge: Any,
    state: MesaState,
    iterations: int | None,
    tolerance: float,
) -> tuple[Any, MesaState, Any]:
    """Three launches, or four where the sequence is cut; the second finds solutions that the first has left.

    Also the largest residuals of the second, and its limit on steps.
    """
    (G, H), rows = state, q.shape[-1]
    types = {"data": q.dtype, "gate": G.dtype, "real": np.dtype(np.float32)}
    sums = _tensor.sums_of(cut, sequences, pairs, types, rows)
    most = iterations or 2 * rows
    made = _tensor.solve(cut, sequences, q, pairs, ridge, H, sums, types, most, tolerance)
    rest = chosen._replace(pieces=cut.pieces, length=cut.length)
    worst = solve_in_chunks(rest, sequences, q, pairs, ridge, H, made, "cg", iterations, tolerance)
    o, G_next = _tensor.recall(cut, sequences, made["x"], pairs, G, sums, types)
    return o, MesaState(G_next, made["H_next"]), worst


@side_by_side()
def in_chunks(
    chosen: _chunks.Plan,
    sequences: Sequences,
    q: Any,
    pairs: Any,
    ridge: Any,
    state: MesaState,
    solver: str,
    iterations: int | None,
    tolerance: float,
) -> tuple[Any, MesaState, Any]:
    """Two launches, or three where the sequence is cut in pieces; the largest residuals and their limit too."""
    (G, H), (tokens, rows), columns = state, q.shape[-2:], pairs["v"][0].shape[-1]
    types, sizes = {"data": q.dtype, "gate": G.dtype, "real": np.float64}, {"tokens": tokens, "columns": columns}
    sizes |= {"length": chosen.length, "pieces": chosen.pieces}
    sizes["sums"] = _chunks.sums_of(chosen, sequences, pairs, types, sizes | {"rows": rows})
    made = {"H_next": _launch.alike(H), "x": empty(sequences, (tokens, rows), types["real"], G)}
    sums = sizes["sums"]
    worst = solve_in_chunks(chosen, sequences, q, pairs, ridge, H, made, solver, iterations, tolerance, sums)

    o, G_next = empty(sequences, (tokens, columns), q.dtype, q), _launch.alike(G)
    arrays = {"x": (made["x"], BOTH)} | pairs | {"G": (G, BOTH), "G_next": (G_next, BOTH), "o": (o, BOTH)}
    shared = _chunks.PAIRS + 3 * _chunks.tokens_of(chosen.keys) + _chunks.tokens_of(_chunks.VALUES)
    grid = chosen.grid(chosen.pieces)._replace(shared=shared)
    launch(RECALL_CHUNKS, sequences, arrays, ("G_next", "o"), types, {"K": rows} | chosen.constants, grid, **sizes)
    return o, MesaState(G_next, made["H_next"]), worst


def solve_in_chunks(
    chosen: _chunks.Plan,
    sequences: Sequences,
    q: Any,
    pairs: Any,
    ridge: Any,
    H: Any,
    made: dict[str, Any],
    solver: str,
    iterations: int | None,
    tolerance: float,
    sums: Any = None,
) -> Any:
    """Solutions to ``made``: all of them, or those that ``mesa_tensor.cu`` has left, of which it then holds more.

    The largest residual of each piece comes back, and the limit on steps.
    """
    tokens, rows, exact, blocks = *q.shape[-2:], solver == "exact", chosen.pieces * sequences.memories
    rest, fallback = "starts" in made, falls_back(solver, iterations, tolerance)
    worst = np.zeros_like(H, shape=(*H.shape[:-2], chosen.pieces, 2), dtype=np.float64)
    arrays = {"q": (q, BOTH)} | pairs | {"ridge": (ridge, COLUMN), "H": (H, BOTH)}
    arrays |= {"H_next": (None if rest else made["H_next"], BOTH), "worst_of_all": (worst, BOTH)}
    arrays |= {"x": (made["x"], BOTH), "starts": (made.get("starts"), BOTH), "residual": (made.get("residual"), ROW)}
    numbers = {"tokens": tokens, "columns": rows, "length": chosen.length, "pieces": chosen.pieces, "sums": sums}
    numbers |= {"column_blocks": chosen.column_blocks, "iterations": iterations or (STEPS if exact else 2) * rows}
    numbers |= {"tolerance": DONE if exact else tolerance, "eps": float(np.finfo(H.dtype).eps)}
    numbers["rooms"] = _launch.machine.scratch(4 * rows * rows * blocks) if fallback else None
    types = {"data": q.dtype, "gate": H.dtype, "real": np.float64, "answer": made["x"].dtype}
    constants = {"K": rows} | chosen.constants | {"EXACT": int(exact), "FALLBACK": int(fallback)}
    constants["REST"] = int(rest)
    grid, written = _calls.Grid(chosen.pieces, chosen.threads, chosen.shared), ("worst_of_all", "x")
    written += () if rest else ("H_next",)
    launch(CHUNKS, sequences, arrays, written, types, constants, grid, **numbers)
    return worst


def in_pieces(
    sequences: Sequences,
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    beta: Any,
    ridge: Any,
    state: MesaState,
    solver: str,
    iterations: int | None,
    tolerance: float,
) -> tuple[Any, MesaState]:
    """Three launches, with the state in double precision."""
    (tokens, rows), columns, gate = q.shape[-2:], v.shape[-1], state.G.dtype
    G, H = (x.astype(np.float64) for x in state)
    types = {"data": q.dtype, "gate": gate, "real": G.dtype}
    pairs = {"k": (k, BOTH), "log_decay": (log_decay, ROW), "beta": (beta, ROW)}
    per_thread, parts = split("k", rows)
    sizes = {"K": rows, "ROWS": per_thread, "PARTS": parts, "PIECE": PIECE}

    memories = Sequences(G.shape[:-2], G.shape[:-2])
    starts = empty(memories, (-(-tokens // PIECE) * rows, rows), G.dtype, G)
    arrays = pairs | {"H": (H, BOTH), "starts": (starts, BOTH)}
    launch(GRAM, memories, arrays, ("H", "starts"), types, sizes, tokens=tokens, columns=rows)

    x = solve(solver, sequences, q, pairs, ridge, starts, types, gate, iterations, tolerance)

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
