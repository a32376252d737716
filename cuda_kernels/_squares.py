"""What the kernels of exact least squares share: one block has all of one memory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ttr_np.calling import as_numpy
from ttr_np.solvers.recursive_least_squares import factor

from ._calls import THREADS

__all__ = ["few", "refuse_covariance", "ridge_refusal", "together", "tolerance_for", "warn_of_limit"]

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


def ridge_refusal(backend: str, *, ridge: Any = 1.0, k: Any = None, v: Any = None, **options: Any) -> str | None:
    """Why a backend has no mesa with these arguments, or None."""
    own = np.shape(ridge)[:-1]
    if not own or k is None:
        return None
    try:
        lead = np.broadcast_shapes(np.shape(k)[:-2], np.shape(v)[:-2])
        fits = np.broadcast_shapes(own, lead) == lead
    except ValueError:
        return None  # the operator says what does not fit
    return None if fits else f"backend {backend!r} has no 'mesa' whose ridge differs among queries of one memory"


def tolerance_for(solver: str, iterations: int | None, tolerance: float | None, dtype: Any) -> float:
    """The relative residual at which a token is done, as in the solver."""
    if tolerance is not None:
        return float(tolerance)
    return 0.0 if solver == "chebyshev" and iterations is not None else float(np.finfo(dtype).eps) ** 0.75


def warn_of_limit(solver: str, worst: Any, tolerance: float) -> None:
    """A warning when a token is not done; with a tolerance of zero the caller asked for a number of steps.

    Parameters
    ----------
    solver, tolerance
        As in ``ttr_np.mesa``.
    worst : (..., 2)
        Largest relative residual, and the limit on steps.
    """
    if not tolerance or not np.any(worst[..., 0] > tolerance):
        return
    residual, most = np.max(as_numpy(worst).reshape(-1, 2), axis=0)
    warnings.warn(
        f"solver {solver!r} stopped after {int(most)} iterations at a relative residual of {residual:.1e}, above the "
        f"tolerance {tolerance:.1e}: raise iterations, ridge or tolerance",
        RuntimeWarning,
        stacklevel=2,
    )
