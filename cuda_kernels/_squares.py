"""What the kernels of exact least squares share: one block has all of one memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.calling import as_numpy
from ttr_np.solvers.mesa import report
from ttr_np.solvers.recursive_least_squares import factor

from ._calls import THREADS

__all__ = ["few", "refuse_covariance", "together", "warn_of_limit"]

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


def warn_of_limit(solver: str, worst: Any, tolerance: float) -> None:
    """A warning when a token is not done; with a tolerance of zero the caller asked for a number of steps.

    Parameters
    ----------
    solver, tolerance
        As in ``ttr_np.mesa``.
    worst : (..., 2)
        Largest relative residual, and the limit on steps.
    """
    if tolerance and np.any(worst[..., 0] > tolerance):
        worst = as_numpy(worst)
        report(solver, worst[..., 0], worst[..., 1], tolerance)
