"""Test-time training on the GPU, token by token: one launch of ``test_time_training.cu``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ttr_np.notation import TestTimeTrainingState
from ttr_np.solvers._memories import ACTIVATIONS, loss_of, memory_refusal
from ttr_np.solvers.test_time_training import check_batch_size, start

from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import few
from .._training import fixed, hidden_layers
from ._launch import Kernel, empty, launch, run

__all__ = ["refusal", "test_time_training"]

KERNEL = Kernel("test_time_training", "blocks.cuh")


def test_time_training(
    q: Any,
    k: Any,
    v: Any,
    step_size: Any,
    *,
    memory: Any,
    batch_size: int = 16,
    momentum: Any = None,
    weight_decay: Any = None,
    **common: Any,
) -> Any:
    """Test-time training; see ``ttr_np.test_time_training``."""
    check_batch_size(batch_size)
    problem = refusal(memory=memory)
    if problem:
        raise NotImplementedError(problem)
    arrays = {"q": q, "k": k, "v": v, "step_size": step_size, "momentum": momentum, "weight_decay": weight_decay}
    options = {"memory": memory, "batch_size": batch_size}
    begin = partial(start, memory, momentum is not None)
    return run(core, "test_time_training", arrays, options, start=begin, **common)


test_time_training.__test__ = False  # type: ignore[attr-defined]  # its name begins like that of a test


def refusal(*, memory: Any, k: Any = None, v: Any = None, **options: Any) -> str | None:
    """Why a call with these options has no kernel, or None."""
    return memory_refusal("cupy", memory, k, v)


def core(
    q: Any,
    k: Any,
    v: Any,
    step_size: Any,
    momentum: Any,
    weight_decay: Any,
    mask: Any,
    *,
    memory: Any,
    batch_size: int,
    state: TestTimeTrainingState,
) -> tuple[Any, TestTimeTrainingState]:
    """One launch, with the parameters in double precision."""
    (tokens, rows), columns, gate = q.shape[-2:], v.shape[-1], state.parameters.dtype
    M, S, A = (None if x is None else x.astype(np.float64) for x in state[:3])
    sequences = Sequences(M.shape[:-1], np.broadcast_shapes(q.shape[:-2], M.shape[:-1]))
    o = empty(sequences, (tokens, columns), q.dtype, q)
    layers, hidden = hidden_layers(memory, rows)
    room = rows + 3 * (layers - 1) * hidden + 2 * columns
    vectors = empty(Sequences(M.shape[:-1], M.shape[:-1]), (room,), M.dtype, M)
    scale, offset = fixed(memory, M)
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), "step_size": (step_size, ROW)}
    arrays |= {"momentum": (momentum, ROW), "weight_decay": (weight_decay, ROW), "mask": (mask, ROW)}
    arrays |= {"scale": (scale, COLUMN), "offset": (offset, COLUMN), "parameters": (M, COLUMN), "roll": (S, COLUMN)}
    arrays |= {"anchor": (A, COLUMN), "count": (state.count, ()), "vectors": (vectors, COLUMN), "o": (o, BOTH)}
    loss, number = loss_of(memory.loss)
    constants = {"KEYS": rows, "VALUES": columns, "HIDDEN": hidden, "LAYERS": layers, "BIAS": int(memory.bias)}
    constants |= {"LAYER_NORM": int(memory.layer_norm), "RESIDUAL": int(memory.residual), "LOSS": loss}
    constants |= {"ACTIVATION": ACTIVATIONS.index(memory.activation)}
    types = {"data": q.dtype, "gate": gate, "real": M.dtype}
    written = ("parameters", "roll", "anchor", "count", "o")
    sizes = {"tokens": tokens, "columns": few(max(rows, columns))}
    launch(KERNEL, sequences, arrays, written, types, constants, **sizes, batch_size=batch_size, number=number)
    M, S, A = (None if x is None else x.astype(gate) for x in (M, S, A))
    return o, TestTimeTrainingState(M, S, A, state.count)
