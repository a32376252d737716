"""What the kernels of exact least squares share: one block has all of one memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.calling import as_numpy
from ttr_np.solvers.recursive_least_squares import factor

from ._calls import THREADS

__all__ = ["few", "refuse_covariance", "together"]

MOST = 16  # tokens of a chunk: each is a number in registers
SHARED = 32 << 10  # bytes of a block for the rows of a chunk
FEWEST = 4  # tokens for which a chunk pays


def few(columns: int) -> int:
    """Columns for the grid of a kernel whose one block walks over all of them."""
    return min(columns, THREADS)


def together(tokens: int, bytes_each: int) -> int:
    """Tokens of a chunk whose rows fit in shared memory, a power of two; one by one where there are few."""
    fits = max(SHARED // max(bytes_each, 1), 1)
    return 1 if tokens < FEWEST else min(MOST, 1 << (fits.bit_length() - 1))


def refuse_covariance(bad: Any, P: Any) -> None:
    """A ValueError that says what is wrong with P, where kernels found that it is no covariance."""
    if np.any(bad):
        factor(as_numpy(P))
        raise ValueError("initial_state field P must be positive definite")
