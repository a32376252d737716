"""Delta rule on the GPU, token by token: one launch of ``delta_rule.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.notation import DeltaRuleState

from .._calls import split
from .._sequences import BOTH, ROW, Sequences
from ._launch import Kernel, empty, even, launch, run

__all__ = ["delta_rule"]

KERNEL = Kernel("delta_rule")


def delta_rule(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    *,
    log_decay: Any = None,
    erase_key: Any = None,
    scale: float = 1.0,
    **common: Any,
) -> Any:
    """Delta rule; see ``ttr_np.delta_rule``."""
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "erase_key": erase_key}
    return run(core, "delta_rule", arrays, {"scale": scale}, **common)


def core(
    q: Any, k: Any, v: Any, beta: Any, log_decay: Any, erase_key: Any, *, scale: float, state: DeltaRuleState
) -> tuple[Any, DeltaRuleState]:
    """One launch."""
    (S,), (tokens, rows), columns = state, q.shape[-2:], v.shape[-1]
    sequences = Sequences(S.shape[:-2], np.broadcast_shapes(q.shape[:-2], S.shape[:-2]))
    o = empty(sequences, (tokens, columns), q.dtype, q)
    gate = ROW if log_decay is None or log_decay.ndim < q.ndim else BOTH
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), "beta": (beta, ROW), "log_decay": (log_decay, gate)}
    arrays |= {"erase_key": (erase_key, BOTH), "S": (S, BOTH), "o": (o, BOTH)}
    per_thread, parts = split("k", rows)
    constants = {"K": rows, "ROWS": per_thread, "PARTS": parts, "EVEN": even(q)}
    types = {"data": q.dtype, "real": S.dtype}
    launch(KERNEL, sequences, arrays, ("S", "o"), types, constants, tokens=tokens, columns=columns, scale=scale)
    return o, DeltaRuleState(S)
