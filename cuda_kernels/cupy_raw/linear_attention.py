"""Linear attention on the GPU: token by token in one launch of ``linear_attention.cu``, or chunk by chunk.

There are two texts for chunks: see ``_linear_attention_wgmma`` and ``_linear_attention_chunks``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ttr_np.notation import LinearAttentionState
from ttr_np.solvers.linear_attention import start

from .._calls import split
from .._sequences import BOTH, COLUMN, ROW, Sequences
from . import _linear_attention_chunks as chunks
from . import _linear_attention_wgmma as hopper
from ._launch import Kernel, alike, empty, even, itself, launch, replayed, run

__all__ = ["linear_attention"]

KERNEL = Kernel("linear_attention")


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    bonus: Any = None,
    normalize: bool = False,
    scale: float = 1.0,
    **common: Any,
) -> Any:
    """Linear attention; see ``ttr_np.linear_attention``."""
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "bonus": bonus}
    options = {"normalize": normalize, "scale": scale}
    common |= {"start": partial(start, normalize), "apart": replayed(APART)}
    return run(replayed(IN_PLACE), "linear_attention", arrays, options, **common)


def core(
    next_of: Callable[[Any], Any],
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    bonus: Any,
    *,
    normalize: bool,
    scale: float,
    state: LinearAttentionState,
) -> tuple[Any, LinearAttentionState]:
    """Long sequences in chunks, short ones and double precision in one launch of the recurrence.

    ``next_of`` gives the arrays for the state after all tokens; chunks always make new ones.
    """
    (S, z), (tokens, rows), columns = state, q.shape[-2:], v.shape[-1]
    sequences = Sequences(S.shape[:-2], np.broadcast_shapes(q.shape[:-2], S.shape[:-2]))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "bonus": bonus}
    wide = hopper.plan(q, v, arrays, sequences, normalize)
    if wide is not None:
        return hopper.attend(wide, sequences, arrays, state, scale)
    chosen = chunks.plan(q, v, log_decay, sequences)
    if chosen is not None:
        return chunks.attend(chosen, sequences, arrays, state, normalize, scale)
    o, S_next = empty(sequences, (tokens, columns), q.dtype, q), next_of(S)
    z_next = z if z is None or not tokens else alike(z)
    gate = ROW if log_decay is None or log_decay.ndim < q.ndim else BOTH
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), "log_decay": (log_decay, gate), "bonus": (bonus, COLUMN)}
    arrays |= {"S": (S, BOTH), "S_next": (S_next, BOTH), "z": (z, COLUMN), "z_next": (z_next, COLUMN), "o": (o, BOTH)}
    per_thread, parts = split("k", rows, fields=1 + normalize)
    constants = {"K": rows, "ROWS": per_thread, "PARTS": parts, "NORMALIZE": int(normalize), "EVEN": even(q)}
    types = {"data": q.dtype, "real": S.dtype}
    written = ("S_next", "z_next", "o")
    launch(KERNEL, sequences, arrays, written, types, constants, tokens=tokens, columns=columns, scale=scale)
    return o, LinearAttentionState(S_next, z_next)


IN_PLACE, APART = partial(core, itself), partial(core, alike)
