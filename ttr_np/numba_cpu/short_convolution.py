"""Short causal convolution, compiled: every answer is written once, its inputs read from where they lie.

    o_t = act(bias + sum_{s<w} weight_{w-1-s} x_{t-s})

See ``ttr_np.solvers.short_convolution`` for the sources.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calling import run
from ..notation import ShortConvolutionState
from ..solvers.short_convolution import ACTIVATIONS, start
from ._cache import compiled
from ._compile import apart, inner
from ._gates import exp
from ._panels import fill, gather, matrix, move, panel, pointer, real, row
from ._sequences import lay_out
from ._threads import share

__all__ = ["short_convolution"]

TOKENS = 256  # of a job
CHANNELS = 512
X, WEIGHT, BIAS, WINDOW, ORDER, BEFORE, O = range(7)


def short_convolution(x: Any, weight: Any, *, bias: Any = None, activation: str | None = None, **common: Any) -> Any:
    """Short convolution; see ``ttr_np.short_convolution``."""
    if activation not in ACTIVATIONS:
        allowed = " or ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be {allowed}, got {activation!r}")
    arrays = {"x": x, "weight": weight, "bias": bias}
    return run(core, "short_convolution", arrays, {"activation": activation}, start=start, **common)


def core(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    activation: str | None,
    state: ShortConvolutionState,
) -> tuple[np.ndarray, ShortConvolutionState]:
    """Lay out the sequences and share blocks of their tokens and channels among threads."""
    (window,) = state
    lead = window.shape[:-2]
    o = np.empty(np.broadcast_shapes(lead, () if bias is None else bias.shape[:-1]) + x.shape[-2:], window.dtype)
    order = None if mask is None else np.argsort(~mask, axis=-1, kind="stable")
    before = None if mask is None else np.cumsum(mask, axis=-1) - mask
    layout = lay_out(
        lead, o.shape[:-2], (x, 2), (weight, 2), (bias, 1), (window, 2), (order, 1), (before, 1), (o, 2)
    )  # fmt: skip
    (t, d), taps = x.shape[-2:], weight.shape[-2]
    memories, groups = layout.places.shape[1:]
    cuts = (-(-t // TOKENS), -(-d // CHANNELS))
    sizes = (t, d, taps, activation == "silu", *cuts)
    room = (o.dtype, [(taps + 2, CHANNELS)])
    cost = memories * groups * t * d * taps
    jobs = memories * groups * cuts[0] * cuts[1]

    def finish() -> None:
        np.copyto(window, slide(window, x, mask, order))

    share(kernel, jobs, cost, room, layout, sizes, o.dtype.type(0), finish=finish)
    return o, state


def slide(window: np.ndarray, x: np.ndarray, mask: np.ndarray | None, order: np.ndarray | None) -> np.ndarray:
    """The last inputs that are memorised."""
    past, lead = window.shape[-2], window.shape[:-2]
    if mask is None:
        recent = x[..., max(x.shape[-2] - past, 0) :, :]
        recent = np.broadcast_to(recent, lead + recent.shape[-2:])
        return np.concatenate([window[..., min(x.shape[-2], past) :, :], recent], axis=-2)
    count = np.broadcast_to(mask, lead + mask.shape[-1:]).sum(axis=-1)[..., None] + np.arange(past)  # in the stream
    new = np.maximum(count - past, 0)
    if not x.shape[-2]:
        return window
    order = np.broadcast_to(order, lead + order.shape[-1:])
    rows = np.take_along_axis(order, np.minimum(new, x.shape[-2] - 1), axis=-1)[..., None]
    fresh = np.take_along_axis(np.broadcast_to(x, lead + x.shape[-2:]), rows, axis=-2)
    kept = np.take_along_axis(window, np.minimum(count, past - 1)[..., None], axis=-2) if past else window
    return np.where((count >= past)[..., None], fresh, kept)


@compiled
def kernel(table, places, steps, sizes, like, begin, stop):
    """Jobs begin to stop: some tokens and channels of one sequence each."""
    t, d, taps, silu, rows, columns = sizes
    lines = panel(table, 0, like)
    for job in range(begin, stop):
        low, first = job % rows * TOKENS, job // rows % columns * CHANNELS
        sequence = job // (rows * columns)
        memory, group = sequence // places.shape[2], sequence % places.shape[2]
        channels = min(CHANNELS, d - first)
        weight = matrix(places[WEIGHT, memory, 0], steps[WEIGHT, 0], steps[WEIGHT, 1], like)
        for s in range(taps):
            gather(row(lines, s), move(row(weight, s), first * weight.column), weight.column, channels)
        bias = row(lines, taps)
        fill(bias, like, channels)
        if places[BIAS, memory, group]:
            step = steps[BIAS, 0]
            gather(bias, move(row(matrix(places[BIAS, memory, group], 0, 1, like), 0), first * step), step, channels)
        for i in range(low, min(low + TOKENS, t)):
            convolve(lines, places, steps, memory, group, i, first, channels, taps, silu, like)


@inner
def convolve(lines, places, steps, memory, group, i, first, channels, taps, silu, like):
    """One token."""
    apart()
    o = move(row(matrix(places[O, memory, group], steps[O, 0], 1, like), i), first)
    gather(o, row(lines, taps), 1, channels)
    x = matrix(places[X, memory, 0], steps[X, 0], steps[X, 1], like)
    window = matrix(places[WINDOW, memory, 0], steps[WINDOW, 0], steps[WINDOW, 1], like)
    masked, one = places[ORDER, memory, 0] != 0, np.int64(1)
    before = pointer(places[BEFORE, memory, 0], one)[i * steps[BEFORE, 0]] if masked else i
    for s in range(taps - 1, -1, -1):
        place = before - s
        source = window if s and place < 0 else x
        if s == 0:
            place = i
        elif place < 0:
            place += taps - 1
        elif masked:
            place = pointer(places[ORDER, memory, 0], one)[place * steps[ORDER, 0]]
        numbers = move(row(source, place), first * source.column)
        add_tap(o, row(lines, taps - 1 - s), numbers, source.column, row(lines, taps + 1), channels)
    if silu:
        activate(o, channels, like)


@inner
def add_tap(o, weight, x, step, spare, channels):
    """o = o + weight x."""
    if step != 1:
        gather(spare, x, step, channels)
        x = spare
    multiply_add(o, weight, x, channels)


@inner
def multiply_add(o, weight, x, channels):
    """As ``add_tap``, for contiguous numbers."""
    apart()
    for c in range(channels):
        o[c] += weight[c] * x[c]


@inner
def activate(o, channels, like):
    """o sigmoid(o)."""
    apart()
    one = real(like, 1)
    for c in range(channels):
        o[c] = o[c] / (one + exp(-o[c]))
