"""What all memories that keep their pairs share: the cache, and what a block of queries sees of it.

A pair j is weighed at step i by its kernel and by what the gates have left of it, exp(sum of log_decay over (j, i]).
Those sums only ever add numbers of one sign, so no gate, however strong, costs the mild ones after it a digit.

The cache itself (``positions``, ``append``, ``join``) asks of arrays only what CuPy's can do as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import index
from typing import Any, NamedTuple

import numpy as np

from ..calling import recording
from ..notation import CacheState
from ._chunks import NO_PAST, in_chunks, output_like
from ._room import grown

__all__ = [
    "Past",
    "View",
    "answers",
    "append",
    "attend",
    "block_of",
    "cache_in_chunks",
    "cached",
    "check_options",
    "empty_cache",
    "masked",
    "mix",
    "own_pairs",
    "past_of",
]

PAIRS = 1024  # cached keys that a chunk of queries meets at a time


def check_options(q: Any, log_decay: Any, causal: bool, window: int | None, sinks: int = 0) -> None:
    """Refuse options that have no meaning together; everything is decided before any work.

    Raises
    ------
    ValueError
        If window < 1, sinks < 0, log_decay has a channel axis, or a window or decays come without an order in time.
    """
    if window is not None and index(window) < 1:
        raise ValueError(f"window must be at least 1, the current key; it is {window}")
    if index(sinks) < 0:
        raise ValueError(f"sinks must be at least 0; it is {sinks}")
    if log_decay is not None and np.ndim(log_decay) >= max(np.ndim(q), 1):
        raise ValueError(f"log_decay has {np.ndim(log_decay)} axes, q {np.ndim(q)}: it needs (..., t), one per step")
    if not causal and window is not None:
        raise ValueError(f"window={window} counts back in time: it needs causal=True")
    if not causal and log_decay is not None:
        raise ValueError("log_decay ages the past: it needs causal=True")


def empty_cache(operator: str, lead: tuple[int, ...], sizes: dict[str, int], dtype: Any) -> CacheState:
    """A cache without slots; positions are integers, so that they never round."""
    return CacheState(
        np.zeros(lead + (0, sizes["k"]), dtype),
        np.zeros(lead + (0, sizes["v"]), dtype),
        np.zeros(lead + (0,), dtype),
        np.zeros(lead + (0,), np.int64),
    )


def forget(log_weight: np.ndarray) -> np.ndarray:
    """A gate of -1e30 or less is a full reset: what it leaves is exactly nothing."""
    return np.where(log_weight < NO_PAST / 2, -np.inf, log_weight)


def sums(log_decay: np.ndarray, axis: int = -1) -> np.ndarray:
    """Running sums of gates, in float64; -inf counts as -1e30, so that a sum can be told from a NaN."""
    return np.cumsum(np.maximum(log_decay, NO_PAST), axis=axis, dtype=np.float64)


def left_at_end(log_decay: np.ndarray) -> np.ndarray:
    """Log of what is left of each pair at the last step: the sum of the gates after it."""
    after = np.concatenate([log_decay[..., 1:], np.zeros_like(log_decay[..., :1])], axis=-1)
    return sums(after[..., ::-1])[..., ::-1]


def segments(log_decay: np.ndarray) -> np.ndarray:
    """Sum of the gates after j up to i, ``(..., i, j)``; a NaN stays in the rows from its own on."""
    after = np.where(np.tri(log_decay.shape[-1], k=-1, dtype=bool), log_decay[..., :, None], 0)
    return sums(after, axis=-2)


def memorised_before(state: CacheState) -> Any:
    """How many pairs were memorised so far, ``(..., 1)``; 0 for a cache without slots."""
    return state.position.max(axis=-1, keepdims=True) + 1 if state.position.shape[-1] else 0


def positions(state: CacheState, t: int, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Position of each new pair (-1 if masked), and the number memorised up to and with each step; ``(..., t)``."""
    before = memorised_before(state)
    if mask is None:
        steps = np.arange(t, like=state.position)
        return before + steps, before + steps + 1
    counts = before + np.cumsum(mask, axis=-1)
    return np.where(mask, counts - 1, -1), counts


def append(
    state: CacheState,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    mask: np.ndarray | None,
    window: int | None = None,
    sinks: int = 0,
) -> CacheState:
    """The cache after the pairs of some steps: old pairs age, unmasked ones join, those out of the window leave."""
    position, _ = positions(state, k.shape[-2], mask)
    aged, fresh = state.log_weight, np.zeros_like(position, dtype=np.float64)
    if log_decay is not None:
        total = np.maximum(log_decay, NO_PAST).sum(axis=-1, keepdims=True, dtype=np.float64)
        aged, fresh = forget(aged + total), forget(left_at_end(log_decay))
    state = state._replace(log_weight=aged.astype(state.log_weight.dtype))
    new = CacheState(k, v, np.where(position < 0, -np.inf, fresh), position)
    found = grown(state, new, window) if mask is None and not sinks else None
    if found is not None:
        return found
    joined = CacheState(*[join(old, more, own) for old, more, own in zip(state, new, (2, 2, 1, 1), strict=True)])
    if mask is None and window is None and recording({"k": k}):  # nothing leaves, and nobody may look
        return joined
    return trim(joined, window, sinks)


def join(old: np.ndarray, new: np.ndarray, own: int) -> np.ndarray:
    """New entries behind old ones, in the old ones' leading shape and dtype, one after the other in memory."""
    lead, n = old.shape[: old.ndim - own], old.shape[old.ndim - own]
    shape = lead + (n + new.shape[new.ndim - own],) + old.shape[old.ndim - own + 1 :]
    joined = np.empty_like(old, shape=shape, order="C")
    tail = (slice(None),) * (own - 1)
    joined[(..., slice(None, n)) + tail] = old
    joined[(..., slice(n, None)) + tail] = new
    return joined


def trim(state: CacheState, window: int | None, sinks: int) -> CacheState:
    """Only the pairs that a later query can see, oldest first, empty slots (if sequences differ) in front."""
    keep = state.position >= 0
    if window is not None:
        keep = keep & ((state.position >= memorised_before(state) - window) | (state.position < sinks))
    if keep.all():
        return state
    n = int(keep.sum(axis=-1).max()) if keep.size else 0
    order = np.argsort(keep, axis=-1, kind="stable")[..., keep.shape[-1] - n :]
    kept = np.take_along_axis(keep, order, axis=-1)

    def pick(x: np.ndarray, blank: float) -> np.ndarray:
        wide = x.ndim > order.ndim
        taken = np.take_along_axis(x, order[..., None] if wide else order, axis=order.ndim - 1)
        return np.where(kept[..., None] if wide else kept, taken, x.dtype.type(blank))

    return CacheState(pick(state.k, 0), pick(state.v, 0), pick(state.log_weight, -np.inf), pick(state.position, -1))


class Run(NamedTuple):
    """Consecutive pairs, as views of the arrays they came in.

    ``low``: step of the first pair, negative if all are cached. ``position (..., n)``: -1 where nothing is stored.
    ``newest``: the largest of them. ``sink``: whether the run holds one. ``left (..., n)``: log of what is left of each
    at the run's end. ``total (..., 1)``: sum of the run's gates. Both are None where nothing decays.
    """

    low: int
    k: np.ndarray
    v: np.ndarray
    position: np.ndarray
    newest: int
    sink: bool
    left: np.ndarray | None
    total: np.ndarray | None


class View(NamedTuple):
    """What a block of queries sees of a run: ``bias`` joins the logits, ``seen`` (None: all) says which count."""

    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None
    seen: np.ndarray | None


@dataclass(frozen=True)
class Past:
    """Everything that the queries of one call can see, in runs of ``size`` pairs, the first few of them cached."""

    runs: list[Run]
    cached: int
    size: int
    counts: np.ndarray
    log_decay: np.ndarray | None
    causal: bool
    window: int | None
    sinks: int
    strict: bool

    def views(self, low: int, high: int) -> Iterator[View]:
        """Runs as the queries from low to high see them, newest first; the queries must lie inside one run."""
        start = low - low % self.size
        since = None if self.log_decay is None else sums(self.log_decay[..., start:high])[..., low - start :]
        newest = self.counts[..., low].min(initial=np.iinfo(np.int64).max)
        oldest = None if self.window is None else newest - self.window
        runs = self.runs[: self.cached + low // self.size + 1] if self.causal else self.runs
        for run in reversed(runs):
            own = self.causal and run.low == start
            if since is not None and not own and np.all(since < NO_PAST / 2):
                return  # a full reset: nothing older is left
            if oldest is None or run.newest >= oldest or run.sink:
                yield self.view(run, low, high, since, own)
            if since is not None and run.total is not None and not own:
                since = since + run.total

    def view(self, run: Run, low: int, high: int, since: np.ndarray | None, own: bool) -> View:
        """One run as the queries from low to high see it; of their own run they see no step after high."""
        n = high - run.low if own else run.k.shape[-2]
        run = run._replace(k=run.k[..., :n, :], v=run.v[..., :n, :], position=run.position[..., :n])
        if own:
            gates = self.log_decay
            bias = None if gates is None else segments(gates[..., run.low : high])[..., low - run.low :, :]
        else:
            parts = [x for x in (None if since is None else since[..., :, None], spread(run.left)) if x is not None]
            bias = sum(parts) if parts else None
        bias = None if bias is None else forget(bias).astype(run.k.dtype)
        return View(run.k, run.v, bias, self.seen(run, low, high, own, bias))

    def seen(self, run: Run, low: int, high: int, own: bool, bias: np.ndarray | None) -> np.ndarray | None:
        """Which pairs of a run each query may weigh, ``(..., queries, n)``; None for all."""
        rules = []
        if own:
            rules.append(np.tri(high - low, run.k.shape[-2], k=low - run.low - self.strict, dtype=bool))
        if np.any(run.position < 0):
            rules.append(spread(run.position >= 0))
        if self.window is not None:
            oldest = self.counts[..., low:high] - self.window
            if np.any(run.position.min(axis=-1) < oldest.max(axis=-1)):
                rules.append((spread(run.position) >= oldest[..., :, None]) | spread(run.position < self.sinks))
        if bias is not None and np.any(bias == -np.inf):
            rules.append(bias != -np.inf)
        return reduce(np.logical_and, rules) if rules else None


def spread(x: np.ndarray | None) -> np.ndarray | None:
    """A number per pair, the same for every query."""
    return None if x is None else x[..., None, :]


def past_of(
    state: CacheState,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    mask: np.ndarray | None,
    size: int,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    strict: bool = False,
) -> Past:
    """The cached pairs and those of this call, in runs of ``size``; no query sees its own pair if ``strict``."""
    position, counts = positions(state, k.shape[-2], mask)
    left = state.log_weight
    old = runs_of(state.k, state.v, state.position, left if np.any(left != 0) else None, None, size, sinks)
    new = runs_of(k, v, position, None, log_decay, size, sinks)
    old = [run._replace(low=run.low - state.k.shape[-2]) for run in old]
    return Past(old + new, len(old), size, counts, log_decay, causal, window, sinks, strict)


def runs_of(
    k: np.ndarray,
    v: np.ndarray,
    position: np.ndarray,
    left: np.ndarray | None,
    log_decay: np.ndarray | None,
    size: int,
    sinks: int,
) -> list[Run]:
    """Runs of consecutive pairs; what is left of each is known, or follows from the gates."""
    runs = []
    for low in range(0, k.shape[-2], size):
        here = slice(low, min(low + size, k.shape[-2]))
        place = position[..., here]
        gates = None if log_decay is None else log_decay[..., here]
        runs.append(
            Run(
                low,
                k[..., here, :],
                v[..., here, :],
                place,
                int(place.max(initial=-1)),
                bool(np.any((place >= 0) & (place < sinks))),
                left_at_end(gates) if gates is not None else None if left is None else left[..., here],
                None if gates is None else sums(gates)[..., -1:],
            )
        )
    return runs


class Block(NamedTuple):
    """How many queries meet how many pairs at a time; the queries of a block never cross the border of a run."""

    queries: int
    pairs: int


def block_of(lead: tuple[int, ...], per_pair: int, pairs: int, window: int | None, budget: int = 1 << 21) -> Block:
    """As many queries as keep the workspace below a fixed number of numbers; powers of two, so that blocks nest."""
    if window is not None:
        pairs = min(pairs, max(32, 1 << window.bit_length()))
    queries = pairs
    while queries > 1 and queries * pairs * per_pair * int(np.prod(lead)) > budget:
        queries //= 2
    return Block(queries, pairs)


def masked(logits: np.ndarray, view: View) -> np.ndarray:
    """Logits with the decays of a view; -inf where a query must not look, whatever (even NaN) stands there."""
    logits = logits if view.bias is None else logits + view.bias
    return logits if view.seen is None else np.where(view.seen, logits, logits.dtype.type(-np.inf))


def mix(weights: np.ndarray, v: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """weights @ v, where a value that is not finite turns to NaN those queries that see it, and no others."""
    bad = ~np.isfinite(v)
    if not bad.any():
        return weights @ v
    reached = (logits != -np.inf).astype(weights.dtype) @ bad.astype(weights.dtype)
    return np.where(reached > 0, np.nan, weights @ np.where(bad, v.dtype.type(0), v))


class Mean(NamedTuple):
    """Weighted mean ``value (..., c, v)``; its weights are exp(logits - ``top``) / ``weight``, both ``(..., c)``."""

    value: np.ndarray
    top: np.ndarray
    weight: np.ndarray


def attend(scored: Iterable[tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...], dtype: Any) -> Mean:
    """Softmax mean over blocks of (logits, values) in one pass: running maximum, weight and sum. Without keys: 0."""
    top = np.full(shape[:-1], -np.inf, dtype)
    weight, value = np.zeros(shape[:-1], dtype), np.zeros(shape, dtype)
    for logits, v in scored:
        higher = np.maximum(top, logits.max(axis=-1, initial=-np.inf))
        shift = np.where(higher == -np.inf, dtype.type(0), higher)
        p, kept = np.exp(logits - shift[..., None]), np.exp(top - shift)
        weight = kept * weight + p.sum(axis=-1)
        value = kept[..., None] * value + mix(p, v, logits)
        top = higher
    return Mean(np.divide(value, weight[..., None], out=value, where=weight[..., None] != 0), top, weight)


def cached(q: np.ndarray, state: CacheState) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits and values of the cached pairs, in blocks."""
    for low in range(0, state.k.shape[-2], PAIRS):
        here = slice(low, low + PAIRS)
        logits = q @ np.swapaxes(state.k[..., here, :], -1, -2)
        yield np.where((state.position[..., here] < 0)[..., None, :], -np.inf, logits), state.v[..., here, :]


def own_pairs(logits: np.ndarray, mask: np.ndarray | None, newest: int = 0) -> np.ndarray:
    """Logits of a chunk's own pairs, -inf after the newest that a query sees: 0 is its own, -1 that before."""
    seen = np.tri(logits.shape[-1], k=newest, dtype=bool)
    return np.where(seen if mask is None else seen & mask[..., None, :], logits, -np.inf)


def answers(q: np.ndarray, own: np.ndarray, v: np.ndarray, state: CacheState) -> np.ndarray:
    """Softmax mean of a chunk's own values, by their logits, and of the cached ones, as queries find them."""
    shape = np.broadcast_shapes(q.shape[:-2], state.k.shape[:-2]) + (q.shape[-2], v.shape[-1])
    return attend(chain([(own, v)], cached(q, state)), shape, state.v.dtype).value


def cache_in_chunks(
    step: Any,
    recurrent: Any,
    arrays: Mapping[str, Any],
    axes: Mapping[str, int],
    state: CacheState,
    size: int,
) -> tuple[np.ndarray, CacheState]:
    """A cache whose pairs change as it grows, chunk by chunk: see ``_chunks.in_chunks``."""
    q, k, v = (arrays[name] for name in "qkv")
    if not q.shape[-2]:
        state = append(state, k, v, None, arrays["mask"])  # the caller's arrays are never returned
    return in_chunks(step, recurrent, arrays, axes, output_like(q, v, state.k), state, size)
