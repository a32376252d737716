"""What all chunked forms share: the walk over chunks, sums of gates that never cancel, triangular inverses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..notation import OPERATORS, STATES

__all__ = [
    "Gates",
    "gates_of",
    "in_chunks",
    "kept",
    "lag",
    "output_like",
    "products",
    "segment_sums",
    "unit_lower_inverse",
]

NO_PAST = -1e30  # stands for log 0 where -inf * 0 would be NaN; exp of it is exactly 0


def time_slice(arrays: Mapping[str, Any], axes: Mapping[str, int], low: int, high: int) -> dict[str, Any]:
    """Steps low to high of every array; ``axes`` gives the place of its time axis, arrays without one pass through."""
    return {
        name: x if x is None or name not in axes else x[(..., slice(low, high)) + (slice(None),) * (-1 - axes[name])]
        for name, x in arrays.items()
    }


def output_like(q: np.ndarray, v: np.ndarray, S: np.ndarray) -> np.ndarray:
    """An array for the outputs: leading axes of queries and memory together, then (t, v)."""
    lead = np.broadcast_shapes(q.shape[:-2], S.shape[:-2])
    return np.empty(lead + (q.shape[-2], v.shape[-1]), S.dtype)


def in_chunks(
    step: Callable[..., tuple[Any, Any]],
    recurrent: Callable[..., tuple[Any, Any]],
    arrays: Mapping[str, Any],
    axes: Mapping[str, int],
    o: np.ndarray,
    state: Any,
    size: int,
) -> tuple[np.ndarray, Any]:
    """Fill ``o`` chunk by chunk, carrying the state.

    A matrix product multiplies the future by zero, and zero times NaN is NaN. So a chunk whose outputs are not finite
    is asked again, so that nothing bad reaches what it must not: see `repaired`. The same holds for tokens that are
    finite and overflow on the way.

    Parameters
    ----------
    step, recurrent
        Both ``f(**arrays, state=state) -> (o, state)`` on one chunk.
    arrays, axes
        Arguments by name, and the place of the time axis of those that have one.
    o
        The outputs, ``(..., t, v)``, written here.
    state
        At the start.
    size
        Tokens in a chunk.
    """
    for low in range(0, o.shape[-2], size):
        high = min(low + size, o.shape[-2])
        chunk = time_slice(arrays, axes, low, high)
        answer, after = step(**chunk, state=state)
        if not np.isfinite(np.sum(answer)):
            answer, after = repaired(step, recurrent, chunk, axes, answer, after, state)
        o[..., low:high, :] = answer
        state = after
    return o, state


OWN_AXES = {STATES[name]: {f: len(a.split()) for f, a in OPERATORS[name].state.items()} for name in OPERATORS}


def kept(decay: np.ndarray, S: np.ndarray) -> np.ndarray:
    """What a decay leaves of a state; where it leaves nothing, not even a NaN is left."""
    return np.where(decay == 0, S.dtype.type(0), decay * S)


def lost_columns(step: Any, chunk: Mapping[str, Any], axes: Mapping[str, int], state: Any) -> np.ndarray:
    """True for the columns of which the memory holds no numbers any more, ``(..., 1, v)``.

    Ones are asked at a token that changes nothing.
    """
    token = time_slice(chunk, axes, 0, 1)
    quiet = {name: x if x is None or name not in axes else np.zeros_like(x) for name, x in token.items()}
    answer, _ = step(**quiet | {"q": np.ones_like(token["q"])}, state=state)
    return ~np.isfinite(answer)


def repaired(
    step: Any, recurrent: Any, chunk: Mapping[str, Any], axes: Mapping[str, int], answer: Any, after: Any, state: Any
) -> tuple[np.ndarray, Any]:
    """One chunk with answers that are not finite: whatever the recurrence can answer is answered.

    The recurrence says from which token on a column of a sequence is lost that the chunk did not begin without; a full
    reset may bring one back. Before that token the chunk is asked again, with zeros from there on, which gives the bits
    of a run without it; from there on the recurrence answers.
    """
    missing = lost_columns(step, chunk, axes, state)
    resets = full_resets(chunk, axes) & missing.any(axis=-1)
    touched = ~(np.isfinite(answer) | missing).all(axis=(-2, -1)) | resets.any(axis=-1)
    if not np.any(touched):
        return answer, after
    slow, slow_after = recurrent(**chunk, state=type(state)(*(None if x is None else x.copy() for x in state)))
    lost = ~(np.isfinite(slow) | missing).all(axis=-1) | resets
    for name, axis in axes.items():  # a gate may spoil the state one step before an answer shows it
        lost = lost if chunk.get(name) is None else lost | bad_steps(name, chunk[name], axis)
    lost = np.logical_or.accumulate(lost, axis=-1)
    cleared = {name: clear(x, axes[name], lost) if name in axes and x is not None else x for name, x in chunk.items()}
    before, _ = step(**cleared, state=state)
    lost |= ~(np.isfinite(before) | missing).all(axis=-1)
    again = np.where(lost[..., None], slow, before)
    return np.where(touched[..., None, None], again, answer), choose(touched, slow_after, after)


def full_resets(chunk: Mapping[str, Any], axes: Mapping[str, int]) -> np.ndarray:
    """True at the steps whose gate leaves nothing of the past, in one channel at least, ``(..., t | 1)``."""
    if chunk.get("log_decay") is None:
        return np.zeros(1, bool)
    none = np.exp(chunk["log_decay"]) == 0
    return none if axes["log_decay"] == -1 else none.any(axis=-1)


def bad_steps(name: str, x: np.ndarray, axis: int) -> np.ndarray:
    """True at the steps that hold a number which is not finite, ``(..., t)``; -inf is a gate like any other."""
    bad = np.isnan(x) if name == "log_decay" else ~np.isfinite(x)
    return bad if axis == -1 else bad.any(axis=-1)


def clear(x: np.ndarray, axis: int, lost: np.ndarray) -> np.ndarray:
    """Zeros in the lost steps of one array; what several queries share loses the steps that any of them lost."""
    own = -1 - axis
    t = x.shape[axis]
    flags = np.stack([reduce_to(lost[..., i], x.shape[: x.ndim - own - 1]) for i in range(t)], axis=-1)
    return np.where(flags[(...,) + (None,) * own], x.dtype.type(0), x)


def choose(touched: np.ndarray, slow: Any, fast: Any) -> Any:
    """The state of the recurrence for sequences that it had to answer, that of the chunk for the others."""
    fields = []
    for name, x, y in zip(slow._fields, slow, fast, strict=True):
        own = OWN_AXES[type(slow)][name]
        flag = None if x is None else reduce_to(touched, x.shape[: x.ndim - own])
        fields.append(None if flag is None else np.where(flag.reshape(flag.shape + (1,) * own), x, y))
    return type(slow)(*fields)


def reduce_to(flag: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """Any query group that is touched marks the memory they share."""
    flag = flag.any(axis=tuple(range(max(flag.ndim - len(lead), 0))))
    for axis, size in enumerate(lead[len(lead) - flag.ndim :]):
        if size == 1 and flag.shape[axis] > 1:
            flag = flag.any(axis=axis, keepdims=True)
    return flag


def segment_sums(log_decay: np.ndarray) -> np.ndarray:
    """Sum of the gates after j up to i, for every i >= j; -inf above the diagonal.

    Only numbers of one sign are added, never subtracted: one gate of -1e4 (or -inf) costs the mild ones after it no
    digit. The sums of one sub-triangle are a product of two triangular matrices.

    Parameters
    ----------
    log_decay : (..., t)

    Returns
    -------
    sums : (..., t, t)
    """
    t = log_decay.shape[-1]
    lower = np.tri(t, dtype=log_decay.dtype)
    after = np.where(np.tri(t, k=-1, dtype=bool), np.maximum(log_decay, NO_PAST)[..., :, None], 0)
    return np.where(np.tri(t, dtype=bool), lower @ after, -np.inf)


class Gates(NamedTuple):
    """Decays inside one chunk of c tokens, as factors in [0, 1]; the channel axis has size 1 if there is one per step.

    ``pairs``: what is left at i of what was stored at j, ``(..., c, c)``, zero above the diagonal; with one gate per
    channel these would be c^2 k numbers, so there they are a product of two factors at every level of halves.
    ``since (..., c, 1 | k)``: what is left at i of the state at the chunk's start.
    ``to_end (..., c, 1 | k)``: what is left at the chunk's end of what was stored at j.
    """

    pairs: np.ndarray | tuple[Halves, ...]
    since: np.ndarray
    to_end: np.ndarray


class Halves(NamedTuple):
    """Decays from the first to the second half of every block of 2 h tokens, through the middle: ``(..., n, h, k)``.

    ``rows``: from the middle to a token of the second half; ``columns``: from a token of the first half to the middle.
    """

    rows: np.ndarray
    columns: np.ndarray


def gates_of(log_decay: np.ndarray, per_channel: bool) -> Gates:
    """All decays of one chunk, each the exponential of a sum of gates (never of a difference)."""
    if per_channel:
        return channel_gates(log_decay)
    pairs = np.exp(segment_sums(log_decay))
    since = np.exp(np.cumsum(np.maximum(log_decay, NO_PAST), axis=-1))
    return Gates(pairs, since[..., None], pairs[..., -1, :, None])


def channel_gates(log_decay: np.ndarray) -> Gates:
    """Decays of one chunk with one gate per channel.

    A pair of tokens meets in exactly one block of 2^n tokens with the one in the second half and the other in the
    first, and its decay is the product of the two ways to the middle, both in [0, 1]. The ways are products of gates,
    found by doubling: nothing is divided or subtracted, so neither gates of -inf nor steep ones cost a digit.

    Parameters
    ----------
    log_decay : (..., c, k)
    """
    c = log_decay.shape[-2]
    decay = np.exp(fill_blocks(log_decay))
    since, until = decay[..., :, None, :], np.ones_like(decay)[..., :, None, :]  # (..., blocks, h, k), h = 1
    levels = []
    while since.shape[-3] > 1:
        (first, second), (first_until, second_until) = pair_blocks(since), pair_blocks(until)
        levels.append(Halves(second, first_until))
        since = np.concatenate([first, second * first[..., -1:, :]], axis=-2)
        until = np.concatenate([first_until * second[..., -1:, :], second_until], axis=-2)
    since, until = since[..., 0, :c, :], until[..., 0, :c, :]
    # The state meets this factor at every chunk: the exponential of the sum rounds once where c factors round c times.
    since[..., -1, :] = np.exp(np.sum(log_decay, axis=-2))
    return Gates(tuple(levels), since, until)


def fill_blocks(x: np.ndarray) -> np.ndarray:
    """x with zeros after its last token, up to a power of two."""
    c = x.shape[-2]
    n = 1 << max(c - 1, 0).bit_length()
    return x if n == c else np.concatenate([x, np.zeros(x.shape[:-2] + (n - c, x.shape[-1]), x.dtype)], axis=-2)


def pair_blocks(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Even and odd blocks of ``(..., blocks, h, k)``."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def lag(gates: Gates) -> Gates:
    """The same decays one step earlier: for answers that read the state before their own step."""
    if isinstance(gates.pairs, tuple):
        pairs = tuple(Halves(one_later(rows, 1), columns) for rows, columns in gates.pairs)
    else:
        pairs = one_later(gates.pairs, 0)
    return Gates(pairs, one_later(gates.since, 1), gates.to_end)


def one_later(x: np.ndarray, first: float) -> np.ndarray:
    """Rows moved down by one, the first one a constant."""
    y = np.full_like(x, first)
    y[..., 1:, :] = x[..., :-1, :]
    return y


def products(x: np.ndarray, y: np.ndarray, pairs: Any, strict: bool = False) -> np.ndarray:
    """Decayed products x_i . y_j of one chunk for j <= i (j < i if strict), zero elsewhere.

    Parameters
    ----------
    x, y : (..., c, k)
    pairs
        Decays between the two tokens as in ``Gates``, or None for none.
    strict
        Leave out j = i.

    Returns
    -------
    scores : (..., c, c)
    """
    if isinstance(pairs, tuple):
        return channel_products(x, y, pairs, strict)
    scores = x @ np.swapaxes(y, -1, -2)
    scores = scores if pairs is None else scores * pairs
    return np.where(np.tri(x.shape[-2], k=-1 if strict else 0, dtype=bool), scores, x.dtype.type(0))


def channel_products(x: np.ndarray, y: np.ndarray, levels: tuple[Halves, ...], strict: bool) -> np.ndarray:
    """Products with one decay per channel: at every level the second halves meet the first ones in one product."""
    c = x.shape[-2]
    lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2], *(rows.shape[:-3] for rows, _ in levels))
    x, y = fill_blocks(x), fill_blocks(y)
    scores = np.zeros(lead + (x.shape[-2], x.shape[-2]), x.dtype)
    if not strict:
        np.einsum("...ii->...i", scores)[...] = np.einsum("...k,...k->...", x, y)
    for rows, columns in levels:
        n, h, k = rows.shape[-3:]
        later = x.reshape(x.shape[:-2] + (n, 2, h, k))[..., 1, :, :] * rows
        earlier = y.reshape(y.shape[:-2] + (n, 2, h, k))[..., 0, :, :] * columns
        blocks(scores, n)[..., h:, :h] = later @ np.swapaxes(earlier, -1, -2)
    return scores[..., :c, :c]


def blocks(x: np.ndarray, n: int) -> np.ndarray:
    """A view of the n square blocks on the diagonal, ``(..., n, size, size)``."""
    size = x.shape[-1] // n
    return np.einsum("...aiaj->...aij", x.reshape(x.shape[:-2] + (n, size, n, size)))


def unit_lower_inverse(L: np.ndarray) -> np.ndarray:
    """Inverse of I + strictly lower triangle of L, by block doubling: no powers of L are formed.

    Powers overflow or lose digits when keys repeat; here every block is inverted from the inverses of its halves,

        [A 0; C B]^-1 = [A^-1 0; -B^-1 C A^-1 B^-1].

    Parameters
    ----------
    L : (..., c, c)
        Only the strictly lower triangle is read.

    Returns
    -------
    X : (..., c, c)
    """
    c = L.shape[-1]
    n = 1 << max(c - 1, 0).bit_length()
    X = np.zeros(L.shape[:-2] + (n, n), L.dtype)
    if n > c:
        filled = X.copy()
        filled[..., :c, :c] = L
        L = filled
    X[..., range(n), range(n)] = 1
    size = 1
    while size < c:
        low, inverse = blocks(L, n // (2 * size))[..., size:, :size], blocks(X, n // (2 * size))
        left = low @ inverse[..., :size, :size]
        inverse[..., size:, :size] = -inverse[..., size:, size:] @ left
        size *= 2
    return X[..., :c, :c]
