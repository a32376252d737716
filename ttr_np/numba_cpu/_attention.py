"""What kernels over cached pairs share: which pairs a query sees, and their weights.

Pairs are counted in slots: those that are memorised, oldest first, the cached ones in front. What a query sees of them
is then two ranges, whatever masks, caches and windows there are: the first few (the sinks), and those from ``first`` to
``end``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..notation import CacheState
from ..solvers._cache import join, positions
from ._cache import compiled
from ._compile import inner
from ._powers import exp2
from ._vectors import WIDE, Vectors, per_vector

__all__ = ["Pairs", "pairs_of", "weigh", "width"]

GROUP = 3 if WIDE else 2  # vectors of queries weighed side by side: with more, 16 registers spill constants


@intrinsic
def weigh(typingctx: Any, logits: Any, step: Any, rows: Any, top: Any, weight: Any, left: Any) -> Any:
    """Logits to weights 2^(logits - top), in place, for a strip of ``width`` queries.

    Parameters
    ----------
    logits, step, rows
        Pairs by queries, and the numbers from one pair to the next.
    top
        Highest logit so far; raised.
    weight
        Sum of the weights so far; brought to the new top and added to.
    left
        Written: what is left of weights under the old top.
    """
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        logits, step, rows, top, weight, left = args
        vectors, word, group = Vectors(builder, signature.args[0].dtype), ir.IntType(64), range(GROUP)
        fetch, give, constant = vectors.load, vectors.store, vectors.constant
        old = [fetch(top, j) for j in group]
        tops = [cgutils.alloca_once_value(builder, x) for x in old]
        with cgutils.for_range(builder, rows, intp=word) as loop:
            line = builder.gep(logits, [builder.mul(loop.index, step)])
            for j in group:
                x, highest = fetch(line, j), builder.load(tops[j])
                builder.store(builder.select(builder.fcmp_ordered(">", x, highest), x, highest), tops[j])
        shifts, earlier, sums = [], [], []
        for j in group:
            new = builder.load(tops[j])
            some = builder.fcmp_ordered(">", new, constant(-math.inf))
            shifts.append(builder.select(some, new, constant(0.0)))
            kept = exp2(vectors, builder.fsub(old[j], shifts[j]))
            earlier.append(builder.fmul(kept, fetch(weight, j)))
            sums.append(cgutils.alloca_once_value(builder, constant(0.0)))
            give(new, top, j)
            give(kept, left, j)
        with cgutils.for_range(builder, rows, intp=word) as loop:
            line = builder.gep(logits, [builder.mul(loop.index, step)])
            for j in group:
                p = exp2(vectors, builder.fsub(fetch(line, j), shifts[j]))
                give(p, line, j)
                builder.store(builder.fadd(builder.load(sums[j]), p), sums[j])
        for j in group:
            give(builder.fadd(earlier[j], builder.load(sums[j])), weight, j)
        return context.get_dummy_value()

    return types.void(logits, types.intp, types.intp, top, weight, left), codegen


@inner
def width(like):
    """Queries that ``weigh`` takes at a time."""
    return GROUP * per_vector(like)


class Pairs(NamedTuple):
    """Everything the queries of one call can see, for ``lay_out``: leading axes broadcast to those of the memory.

    ``cached``: how many are cached; ``order (..., n)``: rows of those and of the new ones behind them, slot by slot;
    ``left (..., cached)``: log of what was left of the cached ones; ``sinks (..., 1)``: how many slots are sinks;
    ``first, end (..., t)``: the slots that each query sees besides those.
    """

    cached: int
    order: np.ndarray
    left: np.ndarray
    sinks: np.ndarray
    first: np.ndarray
    end: np.ndarray

    @property
    def seen(self) -> int:
        """Pairs that the queries of one memory see, about."""
        memories = self.end.size // max(self.end.shape[-1], 1)
        return int(np.sum(self.end - self.first)) // max(memories, 1)


def pairs_of(
    state: CacheState, t: int, mask: np.ndarray | None, causal: bool, window: int | None, sinks: int = 0
) -> Pairs:
    """The pairs of one call of t steps; keys and values stay where they are."""
    cached = state.k.shape[-2]
    position, _ = positions(state, t, mask)
    position = join(state.position, position, 1) if cached else np.ascontiguousarray(position)
    few, first, end = (np.zeros(position.shape[:-1] + (n,), np.int64) for n in (1, t, t))
    pairs = Pairs(cached, np.zeros_like(position, order="C"), state.log_weight.astype(np.float64), few, first, end)
    memories = math.prod(position.shape[:-1])
    flat = [x.reshape(memories, x.shape[-1]) for x in (position, pairs.order, few, first, end)]
    count_slots(*flat, cached, causal, -1 if window is None else window, sinks)
    return pairs


@compiled
def count_slots(position, order, few, first, end, cached, causal, window, sinks):
    """Fill ``order``, ``few``, ``first`` and ``end``; positions count the pairs ever memorised, -1 is no pair."""
    for m in range(len(position)):
        before, slots, oldest = 0, 0, 0
        for j in range(position.shape[1]):
            if position[m, j] >= 0:
                order[m, slots] = j
                few[m, 0] += position[m, j] < sinks
                slots += 1
                before = max(before, position[m, j] + 1)
            if j >= cached:
                while window >= 0 and oldest < slots and position[m, order[m, oldest]] < before - window:
                    oldest += 1
                first[m, j - cached], end[m, j - cached] = oldest, slots
        if not causal:
            end[m, :] = slots
