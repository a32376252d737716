"""Test-time training, compiled: the dual form over (parts of) mini-batches, one memory per job.

    z_t = kept_t (x_t M + b) + carried_t (x_t S + s) - sum_{j <= t} taken_tj (x_t . inputs_j + bias) deltas_j  per layer

with gradients inputs_j deltas_j^T taken at the mini-batch's start. See ``ttr_np.solvers.test_time_training`` for the
descent and the sources. Compiled are `Linear` and `MLP` with the losses and the retention of the library that keep a
gradient an outer product; any other object is Python, which compiled code cannot call.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..calling import run
from ..memories import LAYER_NORM_EPS
from ..notation import TestTimeTrainingState
from ..solvers._chunks import output_like
from ..solvers._memories import ACTIVATIONS, EACH, HUBER, POWER, loss_of, memory_refusal
from ..solvers.test_time_training import check_batch_size, start
from ._cache import compiled
from ._compile import apart, inner
from ._factors import no_future
from ._gates import exp
from ._panels import (
    Matrix,
    add_scaled,
    below,
    clean_until,
    copy,
    dot,
    fill,
    full,
    load,
    load_transposed,
    lower,
    matrix,
    move,
    multiply,
    panel,
    real,
    row,
    scale,
    scale_rows,
    store,
    triangle,
)
from ._sequences import lay_out
from ._threads import share

__all__ = ["test_time_training"]

CHUNK = 64
Q, K, V, STEP, MOMENTUM, DECAY, MASK, SCALE, OFFSET, STATE, ROLL, ANCHOR, O = range(13)  # noqa: E741
GELU, SILU, RELU = 1, 2, 3
VALUES, TAKEN, SCORES, TOKENS, X, Y, Z, ROLLED, NORM, LAYERS = range(
    10
)  # panels of a thread; then PER_LAYER of each layer
KEPT, CARRIED, PUSHING, END = range(4)  # rows of the panel TOKENS
M, S, A, TURNED, INPUTS, ACROSS, SUMS, DELTAS, BIASES = range(9)  # panels of a layer; rows of BIASES: M, S, A
PER_LAYER = 9


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
    """Why a call with these options cannot be compiled, or None."""
    return memory_refusal("numba", memory, k, v)


def core(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    step_size: np.ndarray,
    momentum: np.ndarray | None,
    weight_decay: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    memory: Any,
    batch_size: int,
    state: TestTimeTrainingState,
) -> tuple[np.ndarray, TestTimeTrainingState]:
    """Lay out the sequences and share them among threads."""
    parameters, roll, anchor, count = state
    o, (t, d) = output_like(q, v, parameters[..., None]), q.shape[-2:]
    lead = parameters.shape[:-1]
    fixed = [None if x is None else np.asarray(x, parameters.dtype) for x in (memory.scale, memory.offset)]
    if any(x is not None and np.broadcast_shapes(x.shape[:-1], lead) != lead for x in fixed):
        raise NotImplementedError("backend 'numba' has no 'test_time_training' whose layer norm differs among queries")
    seen = None if mask is None else mask.astype(parameters.dtype)
    layout = lay_out(
        lead, o.shape[:-2], (q, 2), (k, 2), (v, 2), (step_size, 1), (momentum, 1), (weight_decay, 1), (seen, 1),
        (fixed[0], 1), (fixed[1], 1), (parameters, 1), (roll, 1), (anchor, 1), (o, 2),
    )  # fmt: skip
    widths = np.array(memory.widths(d, v.shape[-1]), np.int64)
    kind, number = loss_of(memory.loss)
    options = (ACTIVATIONS.index(memory.activation), memory.bias, memory.layer_norm, memory.residual, kind)
    size = min(batch_size, CHUNK, max(t, 1))
    memories, groups = layout.places.shape[1:]
    cost = memories * t * parameters.shape[-1] * (4 + groups)
    share(
        kernel, memories, cost, (parameters.dtype, shapes(size, widths)), layout,
        (t, size, batch_size), widths, options, parameters.dtype.type(number), count.reshape(-1),
    )  # fmt: skip
    return o, state


def shapes(c: int, widths: np.ndarray) -> list[tuple[int, int]]:
    """Of the panels, in their order."""
    wide, out = int(widths.max()), int(widths[-1])
    panels = [(c, out), (c, c), (c, c), (4, c), (c, wide), (c, wide), (c, wide), (c, wide), (2, out)]
    for a, b in zip(widths[:-1].tolist(), widths[1:].tolist(), strict=True):
        panels += [(a, b)] * 3 + [(b, a), (c, a), (a, c), (c, b), (c, b), (3, b)]
    return panels


class Settings(NamedTuple):
    """What the kernel is told about the memory."""

    activation: int
    bias: bool
    layer_norm: bool
    residual: bool
    loss: int


@inner
def part(table, layer, which, like):
    """One panel of a layer."""
    return panel(table, LAYERS + PER_LAYER * layer + which, like)


@compiled
def kernel(table, places, steps, sizes, widths, options, number, counts, first, last):
    """Jobs first to last: one memory each."""
    t, size, batch_size = sizes
    settings = Settings(options[0], options[1], options[2], options[3], options[4])
    for memory in range(first, last):
        for which, place in ((M, STATE), (S, ROLL), (A, ANCHOR)):
            move_parameters(table, places[place, memory, 0], widths, which, settings.bias, True, number)
        turn_anchor(table, widths, number)
        for i in range(2):
            if places[SCALE + i, memory, 0]:
                fixed = matrix(places[SCALE + i, memory, 0], 0, steps[SCALE + i, 0], number)
                load(below(panel(table, NORM, number), i), fixed, 0, 1, 0, widths[-1])
        low = 0
        while low < t:
            seen, high = 0, low
            while high < t and high - low < size and counts[memory] + seen < batch_size:
                seen += is_seen(places, steps, memory, high, number)
                high += 1
            high, seen, alone = clean_part(places, steps, memory, widths, low, high, seen, number)
            run_part(table, places, steps, memory, widths, settings, low, high - low, alone, number)
            counts[memory] += seen
            if counts[memory] >= batch_size:
                counts[memory] = 0
                for layer in range(len(widths) - 1):
                    anchor, weight = part(table, layer, A, number), part(table, layer, M, number)
                    load(anchor, weight, 0, widths[layer], 0, widths[layer + 1])
                    biases = part(table, layer, BIASES, number)
                    copy(row(biases, A), row(biases, M), widths[layer + 1])
                turn_anchor(table, widths, number)
            low = high
        for which, place in ((M, STATE), (S, ROLL), (A, ANCHOR)):
            move_parameters(table, places[place, memory, 0], widths, which, settings.bias, False, number)


@inner
def is_seen(places, steps, memory, i, like):
    """1 if a token is memorised, else 0."""
    mask = places[MASK, memory, 0]
    return 1 if not mask or row(matrix(mask, steps[MASK, 0], 1, like), i)[0] != 0 else 0


@inner
def move_parameters(table, address, widths, which, bias, inwards, like):
    """A vector of parameters into its panels, or back; nothing without an address."""
    apart()
    place = 0
    for layer in range(len(widths) - 1 if address else 0):
        a, b = widths[layer], widths[layer + 1]
        vector, weight = matrix(address, b, 1, like), part(table, layer, which, like)
        vector = Matrix(move(vector.data, place), b, 1)
        biases = row(part(table, layer, BIASES, like), which)
        place += a * b
        if inwards:
            load(weight, vector, 0, a, 0, b)
        else:
            store(vector, 0, a, 0, b, weight)
        if bias:
            numbers = move(vector.data, a * b)
            place += b
            if inwards:
                copy(biases, numbers, b)
            else:
                copy(numbers, biases, b)


@inner
def turn_anchor(table, widths, like):
    """The weights at the mini-batch's start, turned for the way back."""
    apart()
    for layer in range(1, len(widths) - 1):
        load_transposed(
            part(table, layer, TURNED, like), part(table, layer, A, like), 0, widths[layer], widths[layer + 1]
        )


@inner
def clean_part(places, steps, memory, widths, low, high, seen, like):
    """Up to the first token with a bad number, which products would spread; such a token alone if it comes first.

    A token that is left over before a bad one is no token alone: what comes later must not choose how it is computed.
    """
    apart()
    clean, alone = high, high - low == 1
    for which in range(3):
        columns = widths[-1] if which == V else widths[0]
        for group in range(places.shape[2] if which == Q else 1):
            x = matrix(places[which, memory, group], steps[which, 0], steps[which, 1], like)
            clean = min(clean, clean_until(x, low, high, columns, False, like))
    for which in range(STEP, MASK):
        if places[which, memory, 0]:
            x = matrix(places[which, memory, 0], steps[which, 0], 1, like)
            clean = min(clean, clean_until(x, low, high, 1, False, like))
    if clean < high:
        high, seen, alone = max(clean, low + 1), 0, alone or clean == low
        for i in range(low, high):
            seen += is_seen(places, steps, memory, i, like)
    return high, seen, alone


@inner
def run_part(table, places, steps, memory, widths, settings, low, n, alone, like):
    """Tokens of one mini-batch: the gradients of all, the answers of all, and where the last one leaves the memory."""
    apart()
    layers = len(widths) - 1
    keys = matrix(places[K, memory, 0], steps[K, 0], steps[K, 1], like)
    load(part(table, 0, INPUTS, like), keys, low, n, 0, widths[0])
    values = matrix(places[V, memory, 0], steps[V, 0], steps[V, 1], like)
    load(panel(table, VALUES, like), values, low, n, 0, widths[-1])
    shares(table, places, steps, memory, low, n, like)
    forward(table, widths, settings, n, like)
    backward(table, places, memory, widths, settings, n, like)
    rolling = places[ROLL, memory, 0] != 0
    for layer in range(layers if alone else 0):
        learn(table, rolling, widths, layer, settings.bias, n, like)
    if alone:  # it reads the parameters themselves
        row(panel(table, TOKENS, like), KEPT)[0] = real(like, 1)
    for group in range(places.shape[2]):
        q = matrix(places[Q, memory, group], steps[Q, 0], steps[Q, 1], like)
        load(panel(table, X, like), q, low, n, 0, widths[0])
        answer(table, places, memory, widths, settings, n, alone, like)
        store(matrix(places[O, memory, group], widths[-1], 1, like), low, n, 0, widths[-1], panel(table, Z, like))
    for layer in range(0 if alone else layers):
        learn(table, rolling, widths, layer, settings.bias, n, like)


@inner
def at_step(places, steps, memory, which, i, otherwise, like):
    """A number of one token, or what it is if the array was left out."""
    address = places[which, memory, 0]
    return row(matrix(address, steps[which, 0], 1, like), i)[0] if address else otherwise


@inner
def shares(table, places, steps, memory, low, n, like):
    """Where the parameters are after each token: M_t = kept_t M_0 + carried_t S_0 - sum_j taken_tj g_j, row by row.

    A token that is not seen does nothing. ``PUSHING`` and ``END``: the same for the momentum at the last token.
    """
    apart()
    one, zero = real(like, 1), real(like, 0)
    tokens, rolling = panel(table, TOKENS, like), places[ROLL, memory, 0] != 0
    pushing, kept, carried, rolled = row(tokens, PUSHING), one, zero, one
    for i in range(n):
        taken = row(panel(table, TAKEN, like), i)
        fill(taken, zero, n)
        pushing[i] = zero
        if i:
            copy(taken, row(panel(table, TAKEN, like), i - 1), i)
        if is_seen(places, steps, memory, low + i, like):
            keep = one - at_step(places, steps, memory, DECAY, low + i, zero, like)
            again = at_step(places, steps, memory, MOMENTUM, low + i, zero, like)
            scale(pushing, again, i)
            pushing[i] = at_step(places, steps, memory, STEP, low + i, zero, like)
            kept, rolled = kept * keep, rolled * again
            carried = keep * carried + rolled
            scale(taken, keep, i)
            add_scaled(taken, one, pushing, i + 1)
        row(tokens, KEPT)[i], row(tokens, CARRIED)[i] = kept, carried if rolling else zero
    row(tokens, END)[0] = rolled


@inner
def forward(table, widths, settings, n, like):
    """What every layer is given and what it sums, at the mini-batch's start."""
    apart()
    for layer in range(len(widths) - 1):
        a, b = widths[layer], widths[layer + 1]
        inputs, sums = part(table, layer, INPUTS, like), part(table, layer, SUMS, like)
        if layer:
            activate(inputs, part(table, layer - 1, SUMS, like), settings.activation, n, a, like)
        load_transposed(part(table, layer, ACROSS, like), inputs, 0, n, a)
        affine(
            sums,
            inputs,
            part(table, layer, A, like),
            row(part(table, layer, BIASES, like), A),
            settings.bias,
            n,
            a,
            b,
            like,
        )


@inner
def affine(z, x, weight, bias, biased, n, a, b, like):
    """z = x W + b."""
    apart()
    multiply(z, x, weight, n, b, a, real(like, 1), real(like, 0), full)
    for i in range(n if biased else 0):
        add_scaled(row(z, i), real(like, 1), bias, b)


@inner
def sigmoid(x, like):
    """Logistic function."""
    return real(like, 1) / (real(like, 1) + exp(-x))


@inner
def inside(x, like):
    """What gelu passes to the logistic function."""
    return real(like, 2 * math.sqrt(2 / math.pi)) * (x + real(like, 0.044715) * x * x * x)


@inner
def activate(y, z, activation, n, columns, like):
    """What the next layer is given."""
    apart()
    for i in range(n):
        to, x = row(y, i), row(z, i)
        if activation == GELU:
            for j in range(columns):
                to[j] = x[j] * sigmoid(inside(x[j], like), like)
        elif activation == SILU:
            for j in range(columns):
                to[j] = x[j] * sigmoid(x[j], like)
        elif activation == RELU:
            for j in range(columns):
                to[j] = real(like, 0) if x[j] <= 0 else x[j]
        else:
            for j in range(columns):
                to[j] = math.tanh(x[j])


@inner
def slope(delta, z, activation, n, columns, like):
    """Multiply by the derivative of the activation."""
    apart()
    one = real(like, 1)
    for i in range(n):
        to, x = row(delta, i), row(z, i)
        if activation == GELU:
            for j in range(columns):
                s, inner_slope = sigmoid(inside(x[j], like), like), one + real(like, 3 * 0.044715) * x[j] * x[j]
                to[j] *= s + real(like, 2 * math.sqrt(2 / math.pi)) * x[j] * s * (one - s) * inner_slope
        elif activation == SILU:
            for j in range(columns):
                s = sigmoid(x[j], like)
                to[j] *= s + x[j] * s * (one - s)
        elif activation == RELU:
            for j in range(columns):
                to[j] *= one if x[j] > 0 else x[j] * real(like, 0)
        else:
            for j in range(columns):
                s = math.tanh(x[j])
                to[j] *= one - s * s


@inner
def backward(table, places, memory, widths, settings, n, like):
    """The slopes of every layer's sums."""
    apart()
    layers = len(widths) - 1
    b = widths[layers]
    deltas, sums = part(table, layers - 1, DELTAS, like), part(table, layers - 1, SUMS, like)
    load(deltas, sums, 0, n, 0, b)
    finish(table, places, memory, deltas, part(table, 0, INPUTS, like), settings, n, b, like)
    for i in range(n):
        delta = row(deltas, i)
        add_scaled(delta, -real(like, 1), row(panel(table, VALUES, like), i), b)
        loss_slope(delta, settings.loss, b, like)
        if settings.layer_norm:
            norm_slope(table, places, memory, delta, row(sums, i), b, like)
    for layer in range(layers - 1, 0, -1):
        a, b = widths[layer], widths[layer + 1]
        before = part(table, layer - 1, DELTAS, like)
        turned = part(table, layer, TURNED, like)
        multiply(before, part(table, layer, DELTAS, like), turned, n, a, b, real(like, 1), real(like, 0), full)
        slope(before, part(table, layer - 1, SUMS, like), settings.activation, n, a, like)


@inner
def loss_slope(e, loss, n, number):
    """Slope of the loss in the error, in place; ``number`` is the parameter of the loss."""
    apart()
    if loss == HUBER:
        largest, total = real(number, 0), real(number, 0)
        for j in range(n):
            largest = max(largest, abs(e[j]))
        if largest > 0:
            for j in range(n):
                total += (e[j] / largest) * (e[j] / largest)
        scale(e, number / max(largest * math.sqrt(total), number), n)
    elif loss == EACH:
        for j in range(n):
            e[j] *= number / max(abs(e[j]), number)
    elif loss == POWER:
        for j in range(n):
            e[j] = e[j] * 0 if e[j] == 0 else math.copysign(number * abs(e[j]) ** (number - real(number, 1)), e[j])


@inner
def normalise(z, n, like):
    """Mean 0 and variance 1, in place; the standard deviation that it had."""
    mean, total = real(like, 0), real(like, 0)
    for j in range(n):
        mean += z[j]
    mean /= n
    for j in range(n):
        z[j] -= real(like, mean)
        total += z[j] * z[j]
    deviation = real(like, math.sqrt(total / n + LAYER_NORM_EPS))
    for j in range(n):
        z[j] /= deviation
    return deviation


@inner
def norm_slope(table, places, memory, delta, z, n, like):
    """Slope in z from the slope in its layer norm: its mean and its part along the normalised z change nothing."""
    apart()
    if places[SCALE, memory, 0]:
        fixed = row(panel(table, NORM, like), 0)
        for j in range(n):
            delta[j] *= fixed[j]
    unit = row(panel(table, Y, like), 0)
    copy(unit, z, n)
    deviation, mean = normalise(unit, n, like), real(like, 0)
    for j in range(n):
        mean += delta[j]
    mean, along = real(like, mean / n), real(like, dot(delta, unit, n, like) / n)
    for j in range(n):
        delta[j] = (delta[j] - mean - unit[j] * along) / deviation


@inner
def finish(table, places, memory, z, x, settings, n, columns, like):
    """Answers from the sums of the last layer, in place: layer norm, then residual."""
    apart()
    for i in range(n if settings.layer_norm else 0):
        line = row(z, i)
        normalise(line, columns, like)
        if places[SCALE, memory, 0]:
            fixed = row(panel(table, NORM, like), 0)
            for j in range(columns):
                line[j] *= fixed[j]
        if places[OFFSET, memory, 0]:
            add_scaled(line, real(like, 1), row(panel(table, NORM, like), 1), columns)
    for i in range(n if settings.residual else 0):
        add_scaled(row(z, i), real(like, 1), row(x, i), columns)


@inner
def answer(table, places, memory, widths, settings, n, alone, like):
    """Answers to the queries in the panel X, layer by layer, into the panel Z."""
    apart()
    one, zero, scores = real(like, 1), real(like, 0), panel(table, SCORES, like)
    x, y, z, tokens = panel(table, X, like), panel(table, Y, like), panel(table, Z, like), panel(table, TOKENS, like)
    layers = len(widths) - 1
    for layer in range(layers):
        a, b = widths[layer], widths[layer + 1]
        given = y if layer else x
        if layer:
            activate(y, z, settings.activation, n, a, like)
        if not alone:
            multiply(scores, given, part(table, layer, ACROSS, like), n, n, a, one, zero, triangle)
            no_future(scores, n, like)
            weigh_scores(scores, panel(table, TAKEN, like), settings.bias, n, like)
        biases = part(table, layer, BIASES, like)
        affine(z, given, part(table, layer, M, like), row(biases, M), settings.bias, n, a, b, like)
        scale_rows(z, row(tokens, KEPT), n, b)
        if not alone and places[ROLL, memory, 0]:
            rolled = panel(table, ROLLED, like)
            load(rolled, given, 0, n, 0, a)
            scale_rows(rolled, row(tokens, CARRIED), n, a)
            multiply(z, rolled, part(table, layer, S, like), n, b, a, one, one, full)
            for i in range(n if settings.bias else 0):
                add_scaled(row(z, i), row(tokens, CARRIED)[i], row(biases, S), b)
        if not alone:
            multiply(z, scores, part(table, layer, DELTAS, like), n, b, n, -one, one, lower)
    finish(table, places, memory, z, x, settings, n, widths[layers], like)


@inner
def weigh_scores(scores, taken, biased, n, like):
    """taken_tj (x_t . inputs_j + bias)."""
    apart()
    for i in range(n):
        line, shares = row(scores, i), row(taken, i)
        if biased:
            for j in range(i + 1):
                line[j] += real(like, 1)
        for j in range(i + 1):
            line[j] *= shares[j]


@inner
def learn(table, rolling, widths, layer, biased, n, like):
    """One layer after the tokens of a part."""
    apart()
    a, b, one, tokens = widths[layer], widths[layer + 1], real(like, 1), panel(table, TOKENS, like)
    weight, roll, biases = part(table, layer, M, like), part(table, layer, S, like), part(table, layer, BIASES, like)
    kept, carried, weighted = row(tokens, KEPT)[n - 1], row(tokens, CARRIED)[n - 1], panel(table, Z, like)
    weigh_slopes(weighted, table, layer, row(panel(table, TAKEN, like), n - 1), n, b, like)
    multiply(weight, part(table, layer, ACROSS, like), weighted, a, b, n, -one, kept, full)
    settle(row(biases, M), weighted, kept, biased, n, b, like)
    if rolling:
        for p in range(a):
            add_scaled(row(weight, p), carried, row(roll, p), b)
        if biased:
            add_scaled(row(biases, M), carried, row(biases, S), b)
        end = row(tokens, END)[0]
        weigh_slopes(weighted, table, layer, row(tokens, PUSHING), n, b, like)
        multiply(roll, part(table, layer, ACROSS, like), weighted, a, b, n, -one, end, full)
        settle(row(biases, S), weighted, end, biased, n, b, like)


@inner
def weigh_slopes(into, table, layer, weights, n, columns, like):
    """The slopes of a layer times a weight per token."""
    apart()
    load(into, part(table, layer, DELTAS, like), 0, n, 0, columns)
    scale_rows(into, weights, n, columns)


@inner
def settle(bias, slopes, kept, biased, n, columns, like):
    """A bias after the tokens of a part."""
    if biased:
        scale(bias, kept, columns)
        for i in range(n):
            add_scaled(bias, -real(like, 1), row(slopes, i), columns)
