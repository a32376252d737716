"""Delta rule on the GPU: token by token in one launch of ``delta_rule.cu``, or chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ttr_np.notation import DeltaRuleState

from .._calls import split
from .._sequences import BOTH, ROW, Sequences
from . import _delta_rule_chunks as chunks
from ._launch import Kernel, alike, empty, even, itself, launch, replayed, run

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
    return run(replayed(IN_PLACE), "delta_rule", arrays, {"scale": scale}, apart=replayed(APART), **common)


def core(
    next_of: Callable[[Any], Any],
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    log_decay: Any,
    erase_key: Any,
    *,
    scale: float,
    state: DeltaRuleState,
) -> tuple[Any, DeltaRuleState]:
    """Long sequences in chunks, short ones and double precision in one launch of the recurrence.

    ``next_of`` gives the array for the state after all tokens.
    """
    (S,), (tokens, rows), columns = state, q.shape[-2:], v.shape[-1]
    sequences = Sequences(S.shape[:-2], np.broadcast_shapes(q.shape[:-2], S.shape[:-2]))
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "erase_key": erase_key}
    chosen = chunks.choice(q, v, log_decay, erase_key)
    if chosen is not None:
        return chunks.correct(chosen, sequences, arrays, S, next_of(S), scale)
    o, S_next = empty(sequences, (tokens, columns), q.dtype, q), next_of(S)
    gate = ROW if log_decay is None or log_decay.ndim < q.ndim else BOTH
    owns = {"beta": ROW, "log_decay": gate}
    given = {name: (x, owns.get(name, BOTH)) for name, x in (arrays | {"S": S, "S_next": S_next, "o": o}).items()}
    per_thread, parts = split("k", rows)
    constants = {"K": rows, "ROWS": per_thread, "PARTS": parts, "EVEN": even(q)}
    types = {"data": q.dtype, "real": S.dtype}
    launch(KERNEL, sequences, given, ("S_next", "o"), types, constants, tokens=tokens, columns=columns, scale=scale)
    return o, DeltaRuleState(S_next)


IN_PLACE, APART = partial(core, itself), partial(core, alike)
