"""Test-time training: gradient descent on a memory while the sequence is read, with momentum and weight decay.

    g_t = gradient of l(k_t, v_t) at the parameters of the start of t's mini-batch,    l = 1/2 |v - m(k)|^2
    S_t = momentum_t S_{t-1} - step_size_t g_t
    M_t = (1 - weight_decay_t) M_{t-1} + S_t,    o_t = m(q_t) with parameters M_t

Only the gradients wait for the next mini-batch: the parameters move at every token, and every answer reads its own. A
masked token takes no place in a mini-batch. Titans [2] leaves out the factor 1/2: its step is half of the one here.

The chunked form never holds the parameters of single tokens. Inside a mini-batch M_t is linear in the gradients,

    M_t = kept_t M_0 + carried_t S_0 - sum_{j <= t} taken_tj g_j,

and the gradient of a layer is an outer product, so a layer answers by attention over the mini-batch: the dual form [1].

[1] Sun et al. (2024), Learning to (learn at test time), arXiv:2407.04620
[2] Behrouz et al. (2025), Titans, arXiv:2501.00663
[3] Behrouz et al. (2025), It's all connected (MIRAS), arXiv:2504.13173 (losses and retentions)
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..calling import run
from ..memories import Dense, L2Retention, Slope, Trainable, affine
from ..notation import TestTimeTrainingState
from ._chunks import in_chunks, output_like

__all__ = ["chunked", "recurrent", "test_time_training"]


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
    arrays = {"q": q, "k": k, "v": v, "step_size": step_size, "momentum": momentum, "weight_decay": weight_decay}
    options = {"memory": memory, "batch_size": batch_size}
    begin = partial(start, memory, momentum is not None)
    return run(chunked, "test_time_training", arrays, options, start=begin, **common)


test_time_training.__test__ = False  # type: ignore[attr-defined]  # its name begins like that of a test


def check_batch_size(batch_size: Any) -> None:
    """A mini-batch has one token or more.

    Raises
    ------
    ValueError
        If ``batch_size`` is not a positive integer.
    """
    if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, it is {batch_size!r}")


def start(
    memory: Any, has_momentum: bool, operator: str, lead: tuple[int, ...], sizes: dict[str, int], dtype: Any
) -> TestTimeTrainingState:
    """The memory before its first pair, at the start of a mini-batch."""
    first = memory.parameters(sizes["k"], sizes["v"])
    lead = np.broadcast_shapes(lead, first.shape[:-1])
    parameters = np.array(np.broadcast_to(first, lead + first.shape[-1:]), dtype, order="C")
    still = np.zeros_like(parameters) if has_momentum else None
    return TestTimeTrainingState(parameters, still, parameters.copy(), np.zeros(lead, np.int64))


def turn(state: TestTimeTrainingState, batch_size: int) -> TestTimeTrainingState:
    """Where a mini-batch is full, the next one begins at the parameters reached."""
    full = state.count == batch_size
    anchor = np.where(full[..., None], state.parameters, state.anchor)
    return state._replace(anchor=anchor, count=np.where(full, 0, state.count))


def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    step_size: np.ndarray,
    momentum: np.ndarray | None = None,
    weight_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    memory: Any,
    batch_size: int,
    state: TestTimeTrainingState,
) -> tuple[np.ndarray, TestTimeTrainingState]:
    """The descent, token by token. Cost: O(t p) for a memory of p parameters."""
    o = output_like(q, v, state.parameters[..., None])
    for t in range(q.shape[-2]):
        M, S, anchor, count = state
        step = -step_size[..., t, None] * memory.gradient(anchor, k[..., t : t + 1, :], v[..., t : t + 1, :])[..., 0, :]
        step = step if momentum is None else momentum[..., t, None] * S + step
        moved = M + step if weight_decay is None else (1 - weight_decay[..., t, None]) * M + step
        seen = np.True_ if mask is None else mask[..., t]
        M = np.where(seen[..., None], moved, M)
        S = None if momentum is None else np.where(seen[..., None], step, S)
        o[..., t, :] = memory.predict(M, q[..., t : t + 1, :])[..., 0, :]
        state = turn(TestTimeTrainingState(M, S, anchor, count + seen), batch_size)
    return o, state


def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    step_size: np.ndarray,
    momentum: np.ndarray | None = None,
    weight_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    memory: Any,
    batch_size: int,
    state: TestTimeTrainingState,
) -> tuple[np.ndarray, TestTimeTrainingState]:
    """Matrix products over (parts of) mini-batches of c tokens. Cost: O(t (p + c w)), w the widths of all layers."""
    gates = {"step_size": step_size, "momentum": momentum, "weight_decay": weight_decay, "mask": mask}
    options = {"memory": memory, "batch_size": batch_size}
    return in_chunks(
        partial(chunk, **options),
        partial(recurrent, **options),
        {"q": q, "k": k, "v": v, **gates},
        {"q": -2, "k": -2, "v": -2, **dict.fromkeys(gates, -1)},
        output_like(q, v, state.parameters[..., None]),
        state,
        min(batch_size, 64),
    )


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    step_size: np.ndarray,
    momentum: np.ndarray | None,
    weight_decay: np.ndarray | None,
    mask: np.ndarray | None,
    memory: Any,
    batch_size: int,
    state: TestTimeTrainingState,
) -> tuple[np.ndarray, TestTimeTrainingState]:
    """At most one mini-batch of tokens: those that belong to the current one, then, where it is full, to the next.

    Masks and earlier calls leave each sequence at a place of its own in its mini-batch, so the border falls at another
    token in each. A token that is not due does nothing, as if masked.
    """
    seen = np.ones(k.shape[-2], bool) if mask is None else mask
    current = state.count[..., None] + np.cumsum(seen, axis=-1) <= batch_size
    o, state = descend(q, k, v, momenta(step_size, momentum, weight_decay, seen & current), memory, state)
    state = turn(state, batch_size)
    if not np.all(current):
        later, state = descend(q, k, v, momenta(step_size, momentum, weight_decay, seen & ~current), memory, state)
        o = np.where(current[..., None], o, later)
    return o, state


class Momenta(NamedTuple):
    """Where the parameters are after each of c tokens: M_t = kept_t M_0 + carried_t S_0 - sum_j taken_tj g_j.

    ``taken (..., c, c)``, ``kept (..., c)``, ``carried (..., c)`` (None without momentum); at the end of the chunk the
    momentum is ``still`` S_0 - sum_j ``pushing``_j g_j. ``seen (...)``: how many tokens were memorised.
    """

    taken: np.ndarray
    kept: np.ndarray
    carried: np.ndarray | None
    pushing: np.ndarray | None
    still: np.ndarray | None
    seen: np.ndarray


def momenta(
    step_size: np.ndarray, momentum: np.ndarray | None, weight_decay: np.ndarray | None, seen: np.ndarray
) -> Momenta:
    """All shares inside one chunk, each a sum of products; tokens not ``seen (..., c)`` do nothing."""
    zero, one = step_size.dtype.type(0), step_size.dtype.type(1)
    weight = np.where(seen, step_size, zero)
    keep = np.ones_like(weight) if weight_decay is None else np.where(seen, one - weight_decay, one)
    kept, left = np.cumprod(keep, axis=-1), spans(keep)
    count = np.sum(seen, axis=-1)
    if momentum is None:
        return Momenta(left * weight[..., None, :], kept, None, None, None, count)
    again = np.where(seen, momentum, one)
    pushes, rolled = spans(again) * weight[..., None, :], np.cumprod(again, axis=-1)
    moves = left * seen[..., None, :]
    carried = (moves @ rolled[..., None])[..., 0]
    return Momenta(moves @ pushes, kept, carried, pushes[..., -1, :], rolled[..., -1], count)


def spans(share: np.ndarray) -> np.ndarray:
    """Product of the shares after j up to i, ``(..., c, c)``; zero above the diagonal. Nothing is divided.

    Parameters
    ----------
    share : (..., c)
    """
    after = np.where(np.tri(share.shape[-1], k=-1, dtype=bool), share[..., :, None], share.dtype.type(1))
    return np.tril(np.cumprod(after, axis=-2))


def descend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, shares: Momenta, memory: Any, state: TestTimeTrainingState
) -> tuple[np.ndarray, TestTimeTrainingState]:
    """Tokens of one mini-batch: the gradients of all, the answers of all, and where the last one leaves the memory."""
    if isinstance(memory, Trainable) and isinstance(memory.retention, L2Retention):
        return dual(q, k, v, shares, memory, state)
    g = memory.gradient(state.anchor, k, v)
    M = shares.kept[..., None] * state.parameters[..., None, :] - shares.taken @ g
    if shares.carried is not None:
        M = M + shares.carried[..., None] * state.momentum[..., None, :]
    o = memory.predict(M, q[..., None, :])[..., 0, :]
    S = state.momentum
    if S is not None:
        S = shares.still[..., None] * S - (shares.pushing[..., None, :] @ g)[..., 0, :]
    return o, TestTimeTrainingState(M[..., -1, :], S, state.anchor, state.count + shares.seen)


def dual(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, shares: Momenta, memory: Trainable, state: TestTimeTrainingState
) -> tuple[np.ndarray, TestTimeTrainingState]:
    """The same without the parameters, or even the gradients, of single tokens."""
    slopes = memory.backward(memory.unpack(state.anchor, k.shape[-1]), k, v)
    o = answer(q, slopes, shares, memory, state)
    M = shares.kept[..., -1, None] * state.parameters - total(slopes, shares.taken[..., -1, :], memory)
    count = state.count + shares.seen
    if state.momentum is None:
        return o, TestTimeTrainingState(M, None, state.anchor, count)
    M = M + shares.carried[..., -1, None] * state.momentum
    S = shares.still[..., None] * state.momentum - total(slopes, shares.pushing, memory)
    return o, TestTimeTrainingState(M, S, state.anchor, count)


def answer(
    q: np.ndarray, slopes: list[Slope], shares: Momenta, memory: Trainable, state: TestTimeTrainingState
) -> np.ndarray:
    """Answers layer by layer: x W_t = kept_t x W_0 + carried_t x S_0 - sum_j taken_tj (x . inputs_j) deltas_j."""
    layers = memory.unpack(state.parameters, q.shape[-1])
    rolling = layers if state.momentum is None else memory.unpack(state.momentum, q.shape[-1])
    x = z = q
    for i, (layer, roll, slope) in enumerate(zip(layers, rolling, slopes, strict=True)):
        x = memory.activate(z) if i else q
        products = x @ np.swapaxes(slope.inputs, -1, -2) + memory.bias
        z = shares.kept[..., None] * affine(layer, x) - (shares.taken * products) @ slope.deltas
        if shares.carried is not None:
            z = z + shares.carried[..., None] * affine(roll, x)
    return memory.finish(q, z)


def total(slopes: list[Slope], weights: np.ndarray, memory: Trainable) -> np.ndarray:
    """Weighted sum of the gradients of all tokens, ``(..., p)``; ``weights (..., c)``."""
    layers = []
    for inputs, deltas in slopes:
        weighted = weights[..., None] * deltas
        bias = np.sum(weighted, axis=-2) if memory.bias else None
        layers.append(Dense(np.swapaxes(inputs, -1, -2) @ weighted, bias))
    return memory.pack(layers)
