"""Kernel ridge regression on the GPU: one factor per memory, then all queries at once.

The factor is that of ``kernel_ridge.cu``, one block per memory; ``kernel_answers.cu`` answers. All sums are in double
precision. See ``ttr_np.solvers.kernel_ridge`` for the mathematics and the sources.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.backends import function_refusal
from ttr_np.notation import CacheState
from ttr_np.solvers._cache import append, empty_cache
from ttr_np.solvers.kernel_ridge import check_options

from .._ridge import NAMES, lanes_for, pairs_of, refuse_singular, spoil
from .._sequences import BOTH, COLUMN, Sequences
from .._squares import few
from ._launch import Kernel, empty, even, launch, run

__all__ = ["kernel_ridge", "refusal"]

FACTOR = Kernel("kernel_ridge", "blocks.cuh", "factors.cuh", "ridge.cuh")
ANSWERS = Kernel("kernel_answers", "ridge.cuh")


def kernel_ridge(
    q: Any,
    k: Any,
    v: Any,
    *,
    kernel: Any = "gaussian",
    bandwidth: float = 1.0,
    ridge: float = 1.0,
    causal: bool = True,
    **common: Any,
) -> Any:
    """Kernel ridge regression; see ``ttr_np.kernel_ridge``."""
    problem = refusal(kernel=kernel)
    if problem:
        raise NotImplementedError(problem)
    check_options(kernel, ridge, bandwidth)
    options = {"kernel": kernel, "bandwidth": float(bandwidth), "ridge": float(ridge), "causal": bool(causal)}
    return run(core, "kernel_ridge", {"q": q, "k": k, "v": v}, options, start=empty_cache, **common)


def refusal(*, kernel: Any = NAMES[0], **options: Any) -> str | None:
    """Why a call with these options has no kernel, or None."""
    return function_refusal("cupy", kernel, NAMES)


def core(
    q: Any, k: Any, v: Any, mask: Any, *, kernel: str, bandwidth: float, ridge: float, causal: bool, state: CacheState
) -> tuple[Any, CacheState]:
    """Two launches."""
    (tokens, rows), columns, lead = q.shape[-2:], v.shape[-1], state.position.shape[:-1]
    past, pairs = state.k.shape[-2], pairs_of(state, k, v, mask)
    n, memories, Y = past + tokens, Sequences(lead, lead), pairs.v.copy()
    factor = empty(memories, (n, n), Y.dtype, Y)
    bad = np.zeros_like(Y, shape=(*lead, 1), dtype=bool)
    types = {"data": q.dtype, "gate": state.k.dtype, "real": Y.dtype}
    constants = {"K": rows, "KIND": NAMES.index(kernel), "CAUSAL": int(causal), "EVEN": even(q)}
    kept = {"k": (pairs.k, BOTH), "factor": (factor, BOTH), "Y": (Y, BOTH)}
    sizes = {"tokens": tokens, "pairs": n, "width_of_values": columns, "width": 1 / bandwidth**2}
    written, numbers = ("factor", "Y", "bad"), {"columns": few(max(n, columns)), "ridge": ridge}
    arrays = {"k": kept["k"], "present": (pairs.present, COLUMN)} | kept | {"bad": (bad, COLUMN)}
    launch(FACTOR, memories, arrays, written, types, constants, **sizes, **numbers)
    refuse_singular(bad)

    sequences = Sequences(lead, np.broadcast_shapes(q.shape[:-2], lead))
    lanes = lanes_for(tokens * sequences.groups)
    scratch = empty(memories, (n, -(-lanes // 128) * 128), Y.dtype, Y)
    o = empty(sequences, (tokens, columns), q.dtype, q)
    arrays = {"q": (q, BOTH)} | kept | {"scratch": (scratch, BOTH), "o": (o, BOTH)}
    launch(ANSWERS, sequences, arrays, ("o",), types, constants, **sizes, columns=lanes, past=past)
    return spoil(o, pairs.spoilt, past, causal), append(state, k, v, None, mask)
