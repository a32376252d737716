"""What both GPU backends do for kernel ridge regression around their launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ttr_np.notation import CacheState
from ttr_np.solvers._cache import join
from ttr_np.solvers.kernel_ridge import KERNELS

__all__ = ["NAMES", "Pairs", "lanes_for", "pairs_of", "refuse_singular", "spoil"]

NAMES = tuple(KERNELS)
MOST = 1024  # threads that answer the queries of one memory, each with a column of scratch


class Pairs(NamedTuple):
    """All pairs that queries can see, in double precision. A bad one is taken out; ``spoilt``: the answers it reaches.

    ``k (..., n, k)``, ``v (..., n, v)``, ``present (..., n)``, ``spoilt (..., n, v)``.
    """

    k: Any
    v: Any
    present: Any
    spoilt: Any


def pairs_of(state: CacheState, k: Any, v: Any, mask: Any) -> Pairs:
    """The pairs of the cache, then those of this call.

    A key that is no number spoils every later answer of its sequence, a value every later answer in its own channel.
    """
    keys, values = (join(old.astype(np.float64), new, 2) for old, new in ((state.k, k), (state.v, v)))
    stored = np.ones_like(k, shape=k.shape[-2:-1], dtype=bool) if mask is None else mask
    present = join(state.position >= 0, stored, 1)
    bad_key = present & ~np.isfinite(keys).all(axis=-1)
    spoilt = np.cumsum(present[..., None] & (bad_key[..., None] | ~np.isfinite(values)), axis=-2) > 0
    used = present & ~(np.cumsum(bad_key, axis=-1) > 0)
    kept = np.where(used[..., None] & ~spoilt, values, 0.0)
    return Pairs(np.where(used[..., None], keys, 0.0), kept, used, spoilt)


def lanes_for(queries: int) -> int:
    """Threads for the queries of one memory: whole warps."""
    return min(-(-queries // 32) * 32, MOST)


def refuse_singular(bad: Any) -> None:
    """A LinAlgError where no factor was found."""
    if np.any(bad):
        raise np.linalg.LinAlgError(
            "K + ridge I is singular: keys repeat, or the kernel cannot tell them apart; raise ridge"
        )


def spoil(o: Any, spoilt: Any, past: int, causal: bool) -> Any:
    """NaN in the answers that bad pairs reach."""
    reached = spoilt[..., past:, :] if causal else spoilt[..., -1:, :]
    return np.where(reached, o.dtype.type(np.nan), o) if np.any(reached) else o
