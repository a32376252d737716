"""Test-time training on the GPU, token by token: gradient descent on a memory while the sequence is read.

    S = momentum_t S - step_size_t g_t,    M = (1 - weight_decay_t) M + S,    o_t = m(q_t) with parameters M

with gradients g_t at the start of each mini-batch, where the parameters are kept as ``anchor``. One block per memory:
threads take turns at the columns of a layer, and a warp at a row on the way back. Parameters are in double precision
whatever the data: they are rounded at every token. See ``ttr_np.solvers.test_time_training`` for the sources.
"""

from __future__ import annotations

from functools import cache, partial
from math import copysign, exp, sqrt, tanh
from typing import Any, NamedTuple

import numpy as np
from numba import float64

from ttr_np.memories import LAYER_NORM_EPS
from ttr_np.notation import TestTimeTrainingState
from ttr_np.solvers._memories import EACH, HUBER, POWER, loss_of, memory_refusal
from ttr_np.solvers.test_time_training import check_batch_size, start

from .._sequences import BOTH, COLUMN, ROW, Sequences
from .._squares import few
from .._training import fixed, hidden_layers
from ._factors import over_block, over_warp
from ._launch import cuda, empty, launch, run

__all__ = ["refusal", "test_time_training"]

ROOT, CUBE = sqrt(2 / np.pi), 0.044715  # of gelu


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
    return memory_refusal("numba-cuda", memory, k, v)


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
    o = empty(sequences, (tokens, columns), gate, q)
    layers, hidden = hidden_layers(memory, rows)
    room = rows + 3 * (layers - 1) * hidden + 2 * columns
    vectors = empty(Sequences(M.shape[:-1], M.shape[:-1]), (room,), M.dtype, M)
    scale, offset = fixed(memory, M)
    mask = np.broadcast_to(np.ones_like(M, shape=(1,), dtype=bool), (tokens,)) if mask is None else mask
    arrays = {"q": (q, BOTH), "k": (k, BOTH), "v": (v, BOTH), "step_size": (step_size, ROW)}
    arrays |= {"momentum": (momentum, ROW), "weight_decay": (weight_decay, ROW), "mask": (mask, ROW)}
    arrays |= {"scale": (scale, COLUMN), "offset": (offset, COLUMN), "parameters": (M, COLUMN), "roll": (S, COLUMN)}
    arrays |= {"anchor": (A, COLUMN), "count": (state.count, ()), "vectors": (vectors, COLUMN), "o": (o, BOTH)}
    loss, number = loss_of(memory.loss)
    kind = Kind(layers, hidden, memory.activation, bool(memory.bias), memory.layer_norm, memory.residual, loss)
    written = ("parameters", "roll", "anchor", "count", "vectors", "o")
    numbers = (int(batch_size), np.float64(number))
    launch(kernel_for(kind), sequences, arrays, written, tokens, few(max(rows, columns)), 1, *numbers)
    M, S, A = (None if x is None else x.astype(gate) for x in (M, S, A))
    return o, TestTimeTrainingState(M, S, A, state.count)


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    layers: int
    hidden: int
    activation: str
    bias: bool
    layer_norm: bool
    residual: bool
    loss: int


@cuda.jit(device=True)
def sigmoid(x):
    """Logistic function."""
    return 1 / (1 + exp(-x))


@cache
def activation_for(name: str) -> tuple[Any, Any]:
    """An activation and its slope."""

    @cuda.jit(device=True)
    def activated(x):
        if name == "gelu":
            return x * sigmoid(2 * ROOT * (x + CUBE * x * x * x))
        if name == "silu":
            return x * sigmoid(x)
        if name == "relu":
            return float64(0) if x <= 0 else x
        return tanh(x)

    @cuda.jit(device=True)
    def slope(x):
        if name == "relu":
            return float64(1) if x > 0 else x * 0
        if name == "tanh":
            return 1 - tanh(x) * tanh(x)
        s = sigmoid(2 * ROOT * (x + CUBE * x * x * x) if name == "gelu" else x)
        inner = 2 * ROOT * (1 + 3 * CUBE * x * x) if name == "gelu" else float64(1)
        return s + x * s * (1 - s) * inner

    return activated, slope


@cache
def forward_for(kind: Kind) -> Any:
    """The way forward through a memory."""
    layers, hidden, bias, extra = kind.layers, kind.hidden, kind.bias, int(kind.bias)
    activated, _ = activation_for(kind.activation)

    @cuda.jit(device=True)
    def forward(parameters, x, sums, keys, values):
        """What every layer is given and sums, from the inputs of the first; inputs and sums lie layer after layer."""
        first, given = 0, 0
        for layer in range(layers):
            rows, columns = keys if layer == 0 else hidden, values if layer == layers - 1 else hidden
            cuda.syncthreads()  # what this layer is given is there
            for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
                total = parameters[first + rows * columns + j] if bias else float64(0)
                for i in range(rows):
                    total += x[given + i] * parameters[first + i * columns + j]
                sums[layer * hidden + j] = total
                if layer < layers - 1:
                    x[given + rows + j] = activated(total)
            first, given = first + (rows + extra) * columns, given + rows

    return forward


@cache
def finish_for(kind: Kind) -> Any:
    """From the sums of the last layer to answers, and first their mean and deviation."""
    layer_norm, residual = kind.layer_norm, kind.residual

    @cuda.jit(device=True)
    def normal(z, parts):
        """Mean and standard deviation over the values."""
        if not layer_norm:
            return float64(0), float64(1)
        total = float64(0)
        for j in range(cuda.threadIdx.x, z.shape[0], cuda.blockDim.x):
            total += z[j]
        mean, total = over_block(total, parts) / z.shape[0], float64(0)
        for j in range(cuda.threadIdx.x, z.shape[0], cuda.blockDim.x):
            total += (z[j] - mean) * (z[j] - mean)
        return mean, sqrt(over_block(total, parts) / z.shape[0] + LAYER_NORM_EPS)

    @cuda.jit(device=True)
    def answered(z, mean, deviation, scale, offset, key, j):
        """One value from the sums of the last layer: layer norm, then residual."""
        y = z[j]
        if layer_norm:
            y = (y - mean) / deviation
            if scale.size:
                y *= scale[j]
            if offset.size:
                y += offset[j]
        return y + key[j] if residual else y

    return normal, answered


@cache
def last_slope_for(kind: Kind) -> Any:
    """The way back through the loss and the layer norm."""
    layer_norm, loss = kind.layer_norm, kind.loss

    @cuda.jit(device=True)
    def last_slope(z, error, mean, deviation, scale, number, parts):
        """Slope of the loss in what the last layer sums, in the place of the error."""
        length, total = float64(1), float64(0)
        if loss == HUBER:
            for j in range(cuda.threadIdx.x, z.shape[0], cuda.blockDim.x):
                total += error[j] * error[j]
            length = max(sqrt(over_block(total, parts)), number)
        along, total = float64(0), float64(0)
        for j in range(cuda.threadIdx.x, z.shape[0], cuda.blockDim.x):
            e = error[j]
            if loss == HUBER:
                e *= number / length
            elif loss == EACH:
                e *= number / max(abs(e), number)
            elif loss == POWER:
                e = float64(0) if e == 0 else copysign(number * abs(e) ** (number - 1), e)
            if layer_norm and scale.size:
                e *= scale[j]
            error[j] = e
            total += e
            along += e * (z[j] - mean) / deviation
        if layer_norm:  # its mean and its part along the normalised sums change nothing
            total, along = over_block(total, parts) / z.shape[0], over_block(along, parts) / z.shape[0]
            for j in range(cuda.threadIdx.x, z.shape[0], cuda.blockDim.x):
                error[j] = (error[j] - total - (z[j] - mean) / deviation * along) / deviation

    return last_slope


@cache
def backward_for(kind: Kind) -> Any:
    """The way back through the layers."""
    layers, hidden, extra = kind.layers, kind.hidden, int(kind.bias)
    _, slope = activation_for(kind.activation)

    @cuda.jit(device=True)
    def backward(parameters, sums, slopes, keys, values):
        """Slopes of all layers before the last, from the last to the first."""
        for layer in range(layers - 1, 0, -1):
            columns = values if layer == layers - 1 else hidden
            first = (keys + extra) * hidden + (layer - 1) * (hidden + extra) * hidden
            cuda.syncthreads()  # the slopes of this layer are there
            for i in range(cuda.threadIdx.x // 32, hidden, cuda.blockDim.x // 32):
                total = float64(0)
                for j in range(cuda.threadIdx.x % 32, columns, 32):
                    total += parameters[first + i * columns + j] * slopes[layer * hidden + j]
                total = over_warp(total)
                if cuda.threadIdx.x % 32 == 0:
                    slopes[(layer - 1) * hidden + i] = total * slope(sums[(layer - 1) * hidden + i])

    return backward


@cache
def descend_for(kind: Kind) -> Any:
    """The step of all parameters."""
    layers, hidden, extra = kind.layers, kind.hidden, int(kind.bias)

    @cuda.jit(device=True)
    def descend(M, S, A, x, slopes, keys, values, size, again, keep, full):
        """One step; a thread has the same columns every time. A full mini-batch leaves its end as the next start."""
        first, given = 0, 0
        for layer in range(layers):
            rows, columns = keys if layer == 0 else hidden, values if layer == layers - 1 else hidden
            for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
                for i in range(rows + extra):
                    at = first + i * columns + j
                    pushed = -size * slopes[layer * hidden + j] * (x[given + i] if i < rows else float64(1))
                    if S.size:
                        pushed += again * S[at]
                        S[at] = pushed
                    M[at] = keep * M[at] + pushed
                    if full:
                        A[at] = M[at]
            first, given = first + (rows + extra) * columns, given + rows

    return descend


@cache
def kernel_for(kind: Kind) -> Any:
    """The kernel for memories of one kind: a block has one memory."""
    inner, (normal, answered) = (kind.layers - 1) * kind.hidden, finish_for(kind)
    forward, last_slope = forward_for(kind), last_slope_for(kind)
    backward, descend = backward_for(kind), descend_for(kind)

    def test_time_training(
        q, k, v, step_size, momentum, weight_decay, mask, scale, offset, parameters, roll, anchor, count, vectors, o,
        batch_size, number, blocks,
    ):  # fmt: skip
        parts = cuda.shared.array(32, float64)
        b, h, keys, values = cuda.blockIdx.x // k.shape[1], cuda.blockIdx.x % k.shape[1], k.shape[4], v.shape[4]
        M, S, A = parameters[b, h, 0], roll[b, h, 0], anchor[b, h, 0]
        x, sums = vectors[b, h, 0, : keys + inner], vectors[b, h, 0, keys + inner : keys + 2 * inner + values]
        slopes = vectors[b, h, 0, keys + 2 * inner + values :]
        z, error, batch = sums[inner:], slopes[inner:], count[b, h, 0]
        for t in range(k.shape[3]):
            cuda.syncthreads()  # nobody is left at the token before
            if mask[b, h, 0, t]:
                for i in range(cuda.threadIdx.x, keys, cuda.blockDim.x):
                    x[i] = k[b, h, 0, t, i]
                forward(A, x, sums, keys, values)
                mean, deviation = normal(z, parts)
                for j in range(cuda.threadIdx.x, values, cuda.blockDim.x):
                    error[j] = answered(z, mean, deviation, scale[b, h, 0], offset[b, h, 0], x, j) - v[b, h, 0, t, j]
                last_slope(z, error, mean, deviation, scale[b, h, 0], number, parts)
                backward(A, sums, slopes, keys, values)
                cuda.syncthreads()  # all slopes are there
                batch += 1
                again = float64(momentum[b, h, 0, t]) if momentum.size else float64(0)
                keep = 1 - (float64(weight_decay[b, h, 0, t]) if weight_decay.size else float64(0))
                size, full = float64(step_size[b, h, 0, t]), batch == batch_size
                descend(M, S, A, x, slopes, keys, values, size, again, keep, full)
                batch = 0 if full else batch
            for g in range(q.shape[2]):  # the queries that share this memory
                cuda.syncthreads()  # nobody reads the vectors of the token, or of the query before
                for i in range(cuda.threadIdx.x, keys, cuda.blockDim.x):
                    x[i] = q[b, h, g, t, i]
                forward(M, x, sums, keys, values)
                mean, deviation = normal(z, parts)
                for j in range(cuda.threadIdx.x, values, cuda.blockDim.x):
                    o[b, h, g, t, j] = answered(z, mean, deviation, scale[b, h, 0], offset[b, h, 0], x, j)
        if cuda.threadIdx.x == 0:
            count[b, h, 0] = batch

    return test_time_training
