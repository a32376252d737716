"""How a layer's inputs become its operator's: feature maps, input gates, stabilisers, several steps per token.

A route is ``route(layer, run, p, state) -> (o, state)``. ``p`` is the layer's problem: inputs and gates under their
names; ``run(operator, state, **arguments) -> (o, state)`` calls an operator with the caller's mask, packing and
backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Carried"]

Run = Callable[..., tuple[Any, Any]]


class Carried(NamedTuple):
    """State of a layer that remembers something besides its operator's memory."""

    memory: Any = None
    carry: Any = None


def parts(state: Any) -> Any:
    """The two parts of a layer's state, None at the start.

    Raises
    ------
    TypeError
        If it is not such a pair.
    """
    if state is None:
        return None, None
    many = isinstance(state, (tuple, list))
    if not many or len(state) != 2:
        words = f"of type {type(state).__name__}" + (f" with {len(state)} parts" if many else "")
        raise TypeError(f"initial_state is {words}; it needs both parts that output_final_state=True gives")
    return state


def unchanged(x: Any) -> Any:
    """No feature map."""
    return x


def features_of(layer: Any) -> Callable[[Any], Any]:
    """The feature map of the regressor, or of the kernel that the weights are."""
    for choice in (layer.regressor, *getattr(layer.weights, "factors", (layer.weights,))):
        if getattr(choice, "features", None) is not None:
            return choice.features
    return unchanged


def frozen(p: dict[str, Any], x: Any, fill: float = 0.0) -> Any:
    """A per-token array with the masked tokens replaced."""
    if p.get("mask") is None:
        return x
    mask = p["mask"] if np.ndim(x) < np.ndim(p["k"]) else p["mask"][..., None]
    return np.where(mask, x, fill)


def direct(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Inputs through the feature map, gates under their own names."""
    phi = features_of(layer)
    gates = {name: p[name] for name in layer.gates}
    return run(layer.operator, state, q=phi(p["q"]), k=phi(p["k"]), v=p["v"], **gates, **layer.options)


def input_gated(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """The weight of a pair is stored in its key."""
    phi, weight = features_of(layer), p["input_gate"][..., None]
    k = phi(p["k"]) * np.asarray(weight, p["k"].dtype)
    return run(layer.operator, state, q=phi(p["q"]), k=k, v=p["v"], log_decay=p["log_decay"], **layer.options)


def stepped(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Mamba-2: the step length is both decay and input gate."""
    delta = np.asarray(p["delta"])
    v = p["v"] * np.asarray(delta[..., None], p["v"].dtype)
    return run(layer.operator, state, q=p["q"], k=p["k"], v=v, log_decay=-delta * p["rate"])


def selective(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Mamba-1: values are the input, keys and queries its maps in and out."""
    return run(layer.operator, state, u=p["v"], delta=p["delta"], A=p["A"], B=p["k"], C=p["q"])


def running_maximum(log_decay: Any, log_input: Any, start: Any) -> Any:
    """m_t = max(log_decay_t + m_{t-1}, log_input_t): the log of the largest weight so far."""
    m = np.empty(np.broadcast_shapes(np.shape(log_decay), np.shape(log_input)))
    for t in range(m.shape[-1]):
        start = np.maximum(log_decay[..., t] + start, log_input[..., t])
        m[..., t] = start
    return m


def stabilized(log_decay: Any, log_input: Any, before: Any) -> tuple[Any, Any, Any]:
    """Decays and inputs relative to the largest weight so far, both at most 1, and that weight's log."""
    m = running_maximum(log_decay, log_input, before)
    finite = np.where(m == -np.inf, 0.0, m)  # nothing yet; a NaN stays one
    last = np.concatenate([np.asarray(before)[..., None] + np.zeros(m.shape[:-1] + (1,)), m[..., :-1]], axis=-1)
    decay = np.where(last == -np.inf, 0.0, np.minimum(log_decay + np.where(last == -np.inf, 0.0, last) - finite, 0.0))
    return decay, np.exp(log_input - finite), m


def mlstm(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Exponential input gates, kept finite by the running maximum; the last value column is the normaliser."""
    memory, before = parts(state)
    before = np.full(np.shape(p["log_input"])[:-1], -np.inf) if before is None else before
    decay, weight, m = stabilized(frozen(p, p["log_decay"]), frozen(p, p["log_input"], -np.inf), before)
    v = np.concatenate([p["v"], np.ones_like(p["v"][..., :1])], axis=-1)
    k = p["k"] * np.asarray(weight[..., None], p["k"].dtype)
    o, memory = run(layer.operator, memory, q=p["q"], k=k, v=v, log_decay=decay)
    with np.errstate(over="ignore"):  # beside an infinite floor an answer is zero
        floor = np.exp(-np.where(np.isfinite(m), m, 0.0))[..., None]
    answer = o[..., :-1] / np.maximum(np.abs(o[..., -1:]), floor).astype(o.dtype)
    return answer, Carried(memory, m[..., -1] if m.shape[-1] else before)


def rwkv4(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Numerator and denominator of a weighted mean per channel, both relative to the largest weight so far."""
    (*_, keys), (*_, values) = p["k"].shape, p["v"].shape
    if values not in (keys, 1):  # one value serves all channels
        raise ValueError(f"rwkv4 weighs each channel by itself: axis 'k' is {keys} but axis 'v' is {values}")
    memory, before = parts(state)
    k, v = frozen(p, p["k"], -np.inf), frozen(p, p["v"])
    channels_first = np.swapaxes(k, -1, -2)
    before = np.full(channels_first.shape[:-1], -np.inf) if before is None else before
    log_decay = np.swapaxes(frozen(p, p["log_decay"] + np.zeros_like(k)), -1, -2)
    decay, weight, m = (np.swapaxes(x, -1, -2) for x in stabilized(log_decay, channels_first, before))
    weight = weight.astype(v.dtype)
    x = np.concatenate([weight * v, weight], axis=-1)
    h, after = run("diagonal_scan", memory, x=x, log_decay=np.concatenate([decay, decay], axis=-1))
    first = np.zeros_like(h[..., :1, :]) if memory is None else np.asarray(memory.h)[..., None, :].astype(h.dtype)
    past = np.concatenate([first, h[..., :-1, :]], axis=-2)
    last = np.concatenate([before[..., None, :], m[..., :-1, :]], axis=-2)
    own = k + p["bonus"]
    top = np.maximum(last, own)
    top = np.where(top == -np.inf, 0.0, top)
    old, new = np.exp(last - top), np.exp(own - top)
    a, b = np.split(past, 2, axis=-1)
    total = old * b + new
    answer = np.divide(old * a + new * v, total, out=np.zeros_like(total), where=total != 0)  # no pair: zero
    return answer.astype(v.dtype), Carried(after, m[..., -1, :] if m.shape[-2] else before)


def rotating(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """A complex decay as two real halves: the angle turned so far goes into queries and keys."""
    memory, before = parts(state)
    angle = np.cumsum(frozen(p, p["phase"]), axis=-2) + (0.0 if before is None else before[..., None, :])
    turns = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1).astype(p["q"].dtype)
    q, k = (np.concatenate([x, x], axis=-1) * turns for x in (p["q"], p["k"]))
    log_decay = np.concatenate([p["log_decay"], p["log_decay"]], axis=-1)
    o, memory = run(layer.operator, memory, q=q, k=k, v=p["v"], log_decay=log_decay)
    return o, Carried(memory, angle[..., -1, :] if angle.shape[-2] else before)


def rotated(x: Any, angle: Any) -> Any:
    """Neighbouring channels turned in their plane, an odd last one in a plane with one more that is zero."""
    if x.shape[-1] % 2:
        x = np.concatenate([x, np.zeros_like(x[..., :1])], axis=-1)
    cos, sin = (f(angle).astype(x.dtype) for f in (np.cos, np.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape((*turned.shape[:-2], x.shape[-1]))


def shifted(p: dict[str, Any], x: Any, first: Any) -> tuple[Any, Any]:
    """What each token's last memorised predecessor held, and what the last of all holds; at the start the first."""
    mask = p.get("mask")
    if mask is not None:
        mask = np.broadcast_to(mask, np.broadcast_shapes(mask.shape, x.shape[:-1]))
        x = np.broadcast_to(x, (*mask.shape, x.shape[-1]))
        x = np.take_along_axis(x, np.argsort(~mask, axis=-1, kind="stable")[..., None], axis=-2)  # memorised ones first
    start = np.zeros_like(x, shape=(*x.shape[:-2], 1, x.shape[-1])) + (0 if first is None else first[..., None, :])
    held = np.concatenate([start.astype(x.dtype), x], axis=-2)
    if mask is None:
        return held[..., :-1, :], held[..., -1, :]
    before, seen = np.cumsum(mask, axis=-1) - mask, np.sum(mask, axis=-1, keepdims=True)
    before, last = (np.take_along_axis(held, i[..., None], axis=-2) for i in (before, seen))
    return before, last[..., 0, :]


def in_turn(first: Any, second: Any, axis: int) -> Any:
    """Two pairs, or numbers, per token in a row."""
    first, second = np.broadcast_arrays(first, second)
    both = np.stack([first, second], axis=axis)
    return both.reshape((*first.shape[:axis], 2 * first.shape[axis], *first.shape[first.ndim + axis + 1 :]))


def trapezoid(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Mamba-3: a token adds what its step is worth to the pair before, then decays, then writes its own."""
    memory, carry = parts(state)
    angle, last_k, last_v = (None, None, None) if carry is None else carry
    phase = frozen(p, p["phase"])
    start = np.zeros_like(phase, shape=phase.shape[:-2] + (1, phase.shape[-1]))
    angle = np.cumsum(np.concatenate([start if angle is None else angle[..., None, :], phase], axis=-2), axis=-2)
    q, k = (rotated(x, angle[..., 1:, :]) for x in (p["q"], p["k"]))
    before_k, last_k = shifted(p, k, last_k)
    before_v, last_v = shifted(p, p["v"], last_v)
    old, new = ((x * p["delta"])[..., None].astype(k.dtype) for x in (1 - p["mix"], p["mix"]))
    o, memory = run(
        layer.operator,
        memory,
        q=np.repeat(q, 2, axis=-2),
        k=in_turn(before_k * old, k * new, -2),
        v=in_turn(before_v, p["v"], -2),
        log_decay=in_turn(np.zeros_like(p["log_decay"]), p["log_decay"], -1),
        mask=None if p.get("mask") is None else np.repeat(p["mask"], 2, axis=-1),
    )
    return o[..., 1::2, :], Carried(memory, (angle[..., -1, :], last_k, last_v))


def cosine_positions(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """cosFormer: the cosine of a distance is a sum of products of positions."""
    from .features import cosformer_features

    memory, before = parts(state)
    seen = np.ones(p["k"].shape[:-1]) if p.get("mask") is None else p["mask"] + np.zeros(p["k"].shape[:-1])
    before = np.zeros(seen.shape[:-1]) if before is None else before
    position = before[..., None] + np.cumsum(seen, axis=-1) - seen
    q, k = (cosformer_features(x, position, p["length"]) for x in (p["q"], p["k"]))
    o, memory = run(layer.operator, memory, q=q, k=k, v=p["v"], normalize=True)
    return o, Carried(memory, before + seen.sum(axis=-1))


def slots(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """GSA: one pass over the keys of every slot, a softmax over slots, one pass over their values."""
    first, second = parts(state)
    write = np.asarray(p["write"], p["k"].dtype)
    over_slots = {"mask": None if p.get("mask") is None else p["mask"][..., None, :]}
    over_keys = {}
    if "log_decay" in p:
        over_slots["log_decay"], over_keys["log_decay"] = np.swapaxes(p["log_decay"], -1, -2), p["log_decay"]
    q, k = p["q"][..., None, :, :], p["k"][..., None, :, :]
    o, first = run(layer.operator, first, q=q, k=k, v=np.swapaxes(write, -1, -2)[..., None], **over_slots)
    scores = p["scale"] * np.swapaxes(o[..., 0], -1, -2)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    o, second = run(layer.operator, second, q=share, k=write, v=p["v"], **over_keys)
    return o, (first, second)


def several_steps(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """DeltaProduct: the delta rule on a sequence ``steps`` times as long, read at every token's last step."""
    n = p["steps"]
    q = np.repeat(p["q"], n, axis=-2)
    log_decay = np.repeat(p["log_decay"], n, axis=-1)
    log_decay = np.where(np.arange(log_decay.shape[-1]) % n == 0, log_decay, 0.0)
    longer = {
        "mask": None if p.get("mask") is None else np.repeat(p["mask"], n, axis=-1),
        "cu_seqlens": None if p.get("cu_seqlens") is None else np.asarray(p["cu_seqlens"]) * n,
    }
    o, state = run(layer.operator, state, q=q, k=p["k"], v=p["v"], beta=p["beta"], log_decay=log_decay, **longer)
    return o[..., n - 1 :: n, :], state


def erased(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """The delta rule with steps, erased keys and values of the optimizer's own."""
    names = {name: p[name] for name in ("log_decay", "erase_key") if name in p}
    return run(layer.operator, state, q=p["q"], k=p["k"], v=p["v"], beta=p["beta"], **names)


def adaptive(step: Callable[[dict[str, Any]], Any]) -> Callable[..., tuple[Any, Any]]:
    """The delta rule with a step size that looks at the pair."""

    def route(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
        return run(layer.operator, state, q=p["q"], k=p["k"], v=p["v"], beta=step(p))

    return route


def square(k: Any) -> Any:
    """Squared length of every key, in at least float32."""
    return np.sum(np.square(k, dtype=np.result_type(k.dtype, np.float32)), axis=-1)


def normalized(p: dict[str, Any]) -> Any:
    """NLMS: beta / (eps + |k|^2)."""
    return p["beta"] / (p["eps"] + square(p["k"]))


def implicit(p: dict[str, Any]) -> Any:
    """Longhorn: beta / (1 + beta |k|^2)."""
    return p["beta"] / (1 + p["beta"] * square(p["k"]))


def flow(p: dict[str, Any]) -> Any:
    """EFLA: (1 - exp(-beta |k|^2)) / |k|^2, beta for a zero key."""
    length = square(p["k"])
    return np.where(length > 0, -np.expm1(-p["beta"] * length) / np.where(length > 0, length, 1), p["beta"])


def in_context_rate(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """RWKV-7: the removal key is read from the undecayed state."""
    return run(
        layer.operator,
        state,
        q=p["q"],
        k=p["stored_key"],
        v=p["v"],
        a=-p["removal_key"],
        b=p["rate"] * p["removal_key"],
        log_decay=p["log_decay"],
    )


def preconditioned(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Keys are written through the inverse of their own running second moment, and erased as they are."""
    first, second = parts(state)
    beta = np.asarray(p["beta"])[..., None]
    squares = (beta * np.square(p["k"])).astype(p["k"].dtype)
    per_channel = p["log_decay"] if np.ndim(p["log_decay"]) == np.ndim(p["k"]) else p["log_decay"][..., None]
    moment, first = run("diagonal_scan", first, x=squares, log_decay=per_channel + np.zeros(squares.shape))
    written = (p["k"] * precondition(moment)).astype(p["k"].dtype)
    o, second = run(
        layer.operator,
        second,
        q=p["q"],
        k=written,
        v=p["v"],
        beta=p["beta"],
        log_decay=p["log_decay"],
        erase_key=p["k"],
    )
    return o, (first, second)


def precondition(moment: Any, base: float = 1.5, centre: float = -0.2, eps: float = 1e-6) -> Any:
    """base^-s with s = r / (1 + |r|), r = log(moment + eps) - centre: between 1/base and base."""
    r = np.log(moment + eps) - centre
    return base ** (-r / (1 + np.abs(r)))


def scan(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """A channelwise scan of the values."""
    phase = {"phase": p["phase"]} if "phase" in p else {}
    shape = p["v"].shape
    log_decay = p["log_decay"] + np.zeros(shape)
    phase = {name: x + np.zeros(shape) for name, x in phase.items()}
    return run(layer.operator, state, x=p["v"], log_decay=log_decay, **phase)


def real_scan(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """The real part of a scan with a phase."""
    o, state = scan(layer, run, p, state)
    return o.real, state


def diagonal_system(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """S4D: every channel drives its own diagonal system; the readout sums over its modes."""
    rates, drive = p["modes"], p["drive"]
    x = p["v"][..., :, None] * np.ones(len(rates))
    channels = p["v"].shape[-1]
    x = x.reshape(x.shape[:-2] + (channels * len(rates),))
    log_decay, phase = (np.tile(part, channels) + np.zeros(x.shape) for part in (rates.real, rates.imag))
    h, state = run(layer.operator, state, x=x, log_decay=log_decay, phase=phase)
    h = h.reshape(h.shape[:-1] + (channels, len(rates)))
    return (2 * (h @ (drive * p["readout"])).real).astype(p["v"].dtype), state


def parallax(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """o = mean(v) - Cov(v, k) r: three softmax means, taken together by giving the values more columns."""
    k, v = p["k"], p["v"]
    outer = (v[..., :, None] * k[..., None, :]).reshape(v.shape[:-1] + (v.shape[-1] * k.shape[-1],))
    o, state = run(layer.operator, state, q=p["q"], k=k, v=np.concatenate([v, k, outer], axis=-1), scale=p["scale"])
    mean_v, mean_k, mean_vk = np.split(o, [v.shape[-1], v.shape[-1] + k.shape[-1]], axis=-1)
    mean_vk = mean_vk.reshape(mean_vk.shape[:-1] + (v.shape[-1], k.shape[-1]))
    r = np.asarray(p["r"], o.dtype)
    slope = np.einsum("...vk,...k->...v", mean_vk, r) - mean_v * np.sum(mean_k * r, axis=-1, keepdims=True)
    return mean_v - slope, state


def oja(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Gated Oja rule: the delta rule from values to keys finds what is written, decaying sums are asked the other way.

    Every token comes twice: once to read what the decayed memory knows of its value, once to correct it.
    """
    first, second = parts(state)
    mask, bounds, gate = p.get("mask"), p.get("cu_seqlens"), p["log_decay"]
    known, first = run(
        layer.operator,
        first,
        **{name: np.repeat(x, 2, axis=-2) for name, x in {"q": p["v"], "k": p["v"], "v": p["k"]}.items()},
        beta=in_turn(np.zeros_like(p["beta"]), p["beta"], -1),
        log_decay=in_turn(gate, np.zeros_like(gate), -2),
        mask=None if mask is None else np.repeat(mask, 2, axis=-1),
        cu_seqlens=None if bounds is None else np.asarray(bounds) * 2,
    )
    written = (p["k"] - known[..., ::2, :]) * p["beta"][..., None].astype(p["k"].dtype)
    o, second = run(
        "linear_attention",
        second,
        q=p["q"][..., None, :, :],
        k=written[..., None, :, :],
        v=np.swapaxes(p["v"], -1, -2)[..., None],
        log_decay=np.swapaxes(gate, -1, -2),
        mask=None if mask is None else mask[..., None, :],
    )
    return np.swapaxes(o[..., 0], -1, -2), (first, second)


def shrunk(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """A weighted sum over one more than the sum of the weights: the last value column is that sum."""
    phi = features_of(layer)
    v = np.concatenate([p["v"], np.ones_like(p["v"][..., :1])], axis=-1)
    o, state = run(layer.operator, state, q=phi(p["q"]), k=phi(p["k"]), v=v)
    return o[..., :-1] / (1 + o[..., -1:]), state


def trained(layer: Any, run: Run, p: dict[str, Any], state: Any) -> tuple[Any, Any]:
    """Test-time training of the layer's memory."""
    names = {name: p[name] for name in ("momentum", "weight_decay") if name in p}
    return run(
        layer.operator,
        state,
        q=p["q"],
        k=p["k"],
        v=p["v"],
        step_size=p["step_size"],
        memory=layer.regressor.memory(p),
        batch_size=p["batch_size"],
        **names,
    )
