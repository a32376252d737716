"""What both backends do for memories that keep their pairs: where the pairs are, and how a launch over them is cut.

Queries that share a memory also share the tiles of its pairs: the rows of a launch are all steps of all their sequences,
step by step, so that row r is step r // groups of sequence r % groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ttr_np.notation import CacheState
from ttr_np.solvers._cache import join, positions
from ttr_np.solvers.local_polynomial import KERNELS

from ._calls import Arrays
from ._sequences import BOTH, ROW

__all__ = ["DOT", "EXPONENTIAL", "NAMES", "Pairs", "pairs_of"]

NAMES = ("exponential", *KERNELS)  # a kernel's code is its place: from 2 on powers of 1 - u^2, the last one to the 0
EXPONENTIAL = 0
DOT = -1  # code of softmax attention: exponential as well, of the keys as they are


class Pairs(NamedTuple):
    """Everything the queries of one call can see.

    ``k, v``: cached pairs, then new ones; ``cached``: how many are cached; ``position``: of each pair, -1 where nothing
    is memorised; ``count``: pairs memorised up to and with each step; ``left``: log of what was left of cached pairs.
    Without a cache and a mask pair i is the one of step i, and the last three are None.
    """

    k: Any
    v: Any
    cached: int
    position: Any
    count: Any
    left: Any

    @property
    def arrays(self) -> Arrays:
        """For a launch."""
        own = {"k": BOTH, "v": BOTH, "position": ROW, "count": ROW, "left": ROW}
        return {name: (getattr(self, name), axes) for name, axes in own.items()}


def pairs_of(state: CacheState, k: Any, v: Any, mask: Any) -> Pairs:
    """The pairs of one call. Keys and values are copied only where they must be joined to cached ones."""
    cached = state.k.shape[-2]
    if not cached and mask is None:
        return Pairs(k, v, 0, None, None, None)
    position, count = positions(state, k.shape[-2], mask)
    if not cached:
        return Pairs(k, v, 0, position, count, None)
    joined = join(state.k, k, 2), join(state.v, v, 2)
    return Pairs(*joined, cached, join(state.position, position, 1), count, state.log_weight)
