"""Mesa layer (MesaNet): the exact ridge regression of every step, its ridge constant in time.

    G_t = g_t G_{t-1} + beta_t k_t v_t^T,  H_t = g_t H_{t-1} + beta_t k_t k_t^T,  o_t = G_t^T (H_t + diag(ridge))^-1 q_t

with g = exp(log_decay). Three solvers of x_t = (H_t + diag(ridge))^-1 q_t:

- ``exact``. Without decay, the tokens of a chunk share one factorisation: X = Q P - tril(Q W^T) W with P = (H +
  diag(ridge))^-1 at its start and W its keys, whitened as in ``recursive_least_squares``. The difference cancels where
  the keys of the chunk say much more than what came before (a small ridge), so it is refined once, and a token whose
  residual is then still above rounding gets its own solve. With decay the data fade against a ridge that does not, and
  every token gets its own solve, a few tokens at a time. Either way the error is about eps times the condition of
  H_t + diag(ridge). Where eps times the condition reaches one, and where a memory has no ridge, the answer is that
  of minimum norm, G_t^T pinv(H_t + diag(ridge)) q_t (the norm that the ridge weighs, if none is zero), where
  eigenvalues below k eps times the largest count as zero.
- ``cg``: conjugate gradients from x = 0 for all tokens of a chunk at once; H_t is never formed, its products with p are
  linear attention with the keys as values,  H_t p_t = g_t H p_t + sum_i beta_i g_ti k_i (k_i . p_t).
- ``chebyshev``: the same products with fixed coefficients, from the bounds ridge <= eigenvalues <= ridge + |H_t|_F.

[1] von Oswald et al. (2025), MesaNet, arXiv:2506.05233
[2] Peng et al. (2025), Gated KalmaNet, arXiv:2511.21016 (Chebyshev; its ridge, tied to |H_t|_F, is another estimator)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..backends import frames_of_package
from ..calling import as_array, run
from ..notation import MesaState
from ._chunks import Gates, gates_of, in_chunks, kept, output_like, products
from .recursive_least_squares import check_per_step, refuse, weigh, whiten

__all__ = ["chunked", "mesa", "recurrent"]

AT_ONCE = 1 << 18  # numbers of H_t held at once by per-token solves


def mesa(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    beta: Any = None,
    ridge: Any = 1.0,
    solver: str = "exact",
    iterations: int | None = None,
    tolerance: float | None = None,
    **common: Any,
) -> Any:
    """Mesa layer; see ``ttr_np.mesa``.

    ``iterations`` is the most a solver may take (default: 2 k for ``cg``, as rounding delays the k of theory; what the
    bounds ask for, at most 1000, for ``chebyshev``); ``tolerance`` the residual |q - (H + ridge) x| / |q| at which a
    token is done (default: eps^(3/4), 1.8e-12 in float64, 6.4e-6 in float32; 0 for ``chebyshev`` with a number of
    iterations). A token that is not done at the limit keeps what it has, and a RuntimeWarning says so; with a tolerance
    of 0 the limit is what was asked for.
    """
    check_weights(q, log_decay, beta, common.get("mask"))
    check_options(k, ridge, solver, iterations, tolerance)
    check_start(common.get("initial_state"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    options = {"ridge": as_array("ridge", ridge), "solver": solver, "iterations": iterations, "tolerance": tolerance}
    return run(chunked, "mesa", arrays, options, **common)


def check_weights(q: Any, log_decay: Any, beta: Any, mask: Any) -> None:
    """Weights of a regression whose ridge does not decay: a step may forget everything.

    Raises
    ------
    ValueError
        For a decay per channel or NaN, or a pair weight that is negative or not finite.
    """
    check_per_step(q, log_decay)
    if log_decay is not None:
        log_decay = as_array("log_decay", log_decay)
        refuse("log_decay", ~np.isnan(log_decay), log_decay, mask, "must be <= 0 or -inf (log of what is kept)")
    if beta is not None:
        beta = as_array("beta", beta)
        refuse("beta", np.isfinite(beta) & (beta >= 0), beta, mask, "must be finite and >= 0 (the weight of a pair)")


def check_start(initial_state: Any) -> None:
    """What is surely no sum of k k^T is refused; eigenvalues, which would settle it, take longer than a token.

    Raises
    ------
    ValueError
        If H is not symmetric, has a negative number on its diagonal, or a larger one beside it than all on it.
    """
    H = initial_state[1] if isinstance(initial_state, tuple) and len(initial_state) == 2 else None
    if not isinstance(H, np.ndarray) or H.dtype.kind != "f" or H.ndim < 2 or H.shape[-1] != H.shape[-2] or not H.size:
        return
    own, turned, slack = np.diagonal(H, axis1=-2, axis2=-1), np.swapaxes(H, -1, -2), 1e-3  # far above any rounding
    with np.errstate(over="ignore", invalid="ignore"):
        most = own.max(axis=-1) * (1 + slack) + np.finfo(H.dtype).tiny  # squares of small keys are no numbers
        wide = (H.max(axis=(-2, -1)) > most) | (H.min(axis=(-2, -1)) < -most) | (own.min(axis=-1) < 0)
        apart = not (H == turned).all() and np.any(np.abs(H - turned) > slack * most[..., None, None])
    if apart or wide.any():
        raise ValueError("initial_state field H must be symmetric and have no negative eigenvalue: it sums beta k k^T")


def check_options(k: Any, ridge: Any, solver: str, iterations: Any, tolerance: Any) -> None:
    """What a solver can work with; a ValueError names the option and its value."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if np.ndim(ridge) and np.shape(ridge)[-1] != np.shape(k)[-1]:
        raise ValueError(f"axis 'k' is {np.shape(ridge)[-1]} in ridge but {np.shape(k)[-1]} in k")
    ridge = as_array("ridge", ridge)
    if ridge.dtype.kind == "c":
        raise TypeError(f"ridge is complex ({ridge.dtype}); mesa takes real numbers")
    refuse("ridge", np.isfinite(ridge) & (ridge >= 0), ridge, None, "must be finite and >= 0")
    if solver == "chebyshev":
        refuse("ridge", ridge > 0, ridge, None, "must be > 0 for solver 'chebyshev'")
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")


def check_leading(ridge: np.ndarray, lead: tuple[int, ...]) -> None:
    """A ValueError unless the leading axes of a ridge broadcast to those of the sequences."""
    own = ridge.shape[:-1]
    if len(own) > len(lead) or any(n not in (1, m) for n, m in zip(own[::-1], lead[::-1], strict=False)):
        raise ValueError(f"ridge has leading axes {own}, which do not broadcast to {lead}, those of the sequences")


def ridge_refusal(backend: str, *, ridge: Any = 1.0, k: Any = None, v: Any = None, **options: Any) -> str | None:
    """Why a backend whose queries share the solutions of their memory cannot take these arguments, or None."""
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
    """The relative residual at which a token is done, see ``mesa``."""
    if tolerance is not None:
        return float(tolerance)
    return 0.0 if solver == "chebyshev" and iterations is not None else float(np.finfo(dtype).eps) ** 0.75


def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    *,
    ridge: Any = 1.0,
    solver: str = "exact",
    iterations: int | None = None,
    tolerance: float | None = None,
    state: MesaState,
) -> tuple[np.ndarray, MesaState]:
    """The recurrence, token by token, with one solve each. Cost: O(t (k^3 + k v))."""
    G, H = state
    o = output_like(q, v, G)
    k_w, v_w = weigh(k, beta), weigh(v, beta)
    ridge = np.asarray(ridge, G.dtype)
    for t in range(q.shape[-2]):
        decay = 1 if log_decay is None else np.exp(log_decay[..., t, None, None])
        G = kept(decay, G) + k_w[..., t, :, None] * v_w[..., t, None, :]
        H = kept(decay, H) + k_w[..., t, :, None] * k_w[..., t, None, :]
        q_t = q[..., t : t + 1, :]
        if solver == "exact":
            x = solve(H[..., None, :, :], ridge[..., None, :] if ridge.ndim else ridge, q_t)
        else:
            norm = partial(np.linalg.norm, H[..., None, :, :], axis=(-2, -1))
            q_t = spread_over(q_t, H)
            x = iterate(solver, lambda p, H=H: p @ H, norm, ridge, q_t, iterations, tolerance)
        o[..., t : t + 1, :] = x @ G
    return o, MesaState(G, H)


def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    *,
    ridge: Any = 1.0,
    solver: str = "exact",
    iterations: int | None = None,
    tolerance: float | None = None,
    state: MesaState,
) -> tuple[np.ndarray, MesaState]:
    """Chunks of c tokens: a common factorisation, k passes of linear attention, or a solve per token (see above)."""
    ridge = np.asarray(ridge, state.G.dtype)
    o = output_like(q, v, state.G)
    check_leading(ridge, o.shape[:-2])
    options = {"ridge": ridge, "solver": solver, "iterations": iterations, "tolerance": tolerance}
    return in_chunks(
        partial(chunk, **options),
        partial(recurrent, **options),
        {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta},
        {"q": -2, "k": -2, "v": -2, "log_decay": -1, "beta": -1},
        o,
        state,
        64,
    )


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    beta: np.ndarray | None,
    ridge: np.ndarray,
    solver: str,
    iterations: int | None,
    tolerance: float | None,
    state: MesaState,
) -> tuple[np.ndarray, MesaState]:
    """One chunk: the solutions x of its tokens, then linear attention with x as the queries."""
    G, H = state
    k, v = weigh(k, beta), weigh(v, beta)
    gates = None if log_decay is None else gates_of(log_decay, False)
    if solver != "exact":
        norm = partial(frobenius, k, gates, H)
        x = iterate(solver, lambda p: attend(p, k, k, gates, H), norm, ridge, spread_over(q, H), iterations, tolerance)
    elif log_decay is None and np.any(binds(ridge)):
        # What overflows, and memories without a ridge, are solved by themselves.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            x = solve_together(q, k, H, ridge)
    else:
        x = solve_each(q, k, log_decay, H, ridge)
    o = attend(x, k, v, gates, G)
    k_end = np.swapaxes(k if gates is None else k * gates.to_end, -1, -2)
    keep = 1 if gates is None else gates.since[..., -1, :, None]
    return o, MesaState(keep * G + k_end @ v, keep * H + k_end @ k)


def attend(x: np.ndarray, k: np.ndarray, v: np.ndarray, gates: Gates | None, S: np.ndarray) -> np.ndarray:
    """Linear attention of one chunk: every token's x times its own state."""
    if gates is None:
        return x @ S + products(x, k, None) @ v
    return (x * gates.since) @ S + products(x, k, gates.pairs) @ v


def binds(ridge: np.ndarray) -> np.ndarray:
    """Whether a ridge is nowhere zero, memory by memory."""
    return np.all(ridge > 0, axis=-1) if ridge.ndim else ridge > 0


def diagonal(ridge: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A ridge as a matrix."""
    return ridge[..., None] * np.eye(like.shape[-1], dtype=like.dtype)


def solve_together(q: np.ndarray, k: np.ndarray, H: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """All solutions of a chunk without decay: one factorisation at its start, completed key by key.

    Channels are scaled so that the first matrix has a unit diagonal: ridges of any sizes are welcome.
    """
    scale = unit_diagonal(H + diagonal(ridge, H))
    q_s, k_s, H_s = q * scale[..., None, :], k * scale[..., None, :], H * scale[..., None] * scale[..., None, :]
    ridge_s = (ridge * scale**2)[..., None, :]
    R = inverse_root(H_s + diagonal(ridge_s[..., 0, :], H))
    _, W, _ = whiten(k_s, R, np.ones((), R.dtype))

    def answer(r: np.ndarray) -> np.ndarray:
        return (r @ R) @ np.swapaxes(R, -1, -2) - products(r, W, None) @ W

    def residual(x: np.ndarray) -> np.ndarray:
        return q_s - attend(x, k_s, k_s, None, H_s) - ridge_s * x

    x = answer(q_s)
    x = x + answer(residual(x))
    # in the units in which the matrix of this very token has a unit diagonal, and a norm of sqrt(k) at least
    root = np.sqrt(np.einsum("...ii->...i", H_s)[..., None, :] + np.cumsum(k_s * k_s, axis=-2) + ridge_s)
    eps, n, size = np.finfo(R.dtype).eps, q.shape[-1], largest(x * root)
    good = largest(residual(x) / root) <= 8 * eps * np.sqrt(n) * size
    good &= n * n * eps * size <= largest(q_s / root)  # else this matrix may be singular to rounding
    good &= binds(ridge)[..., None]
    x = x * scale[..., None, :]
    return x if np.all(good) else solve_each(q, k, None, H, ridge, ~good, x)


def largest(x: np.ndarray) -> np.ndarray:
    """Largest entry of each vector, as a norm that does not overflow."""
    return np.abs(x).max(axis=-1, initial=0)


def unit_diagonal(A: np.ndarray) -> np.ndarray:
    """The scale of each channel with which a matrix has a diagonal of ones."""
    return 1 / np.sqrt(np.einsum("...ii->...i", A))


def inverse_root(A: np.ndarray) -> np.ndarray:
    """R with R R^T = A^-1, for A with no eigenvalue below rounding; NaN where A is not finite."""
    finite = np.isfinite(A).all(axis=(-1, -2), keepdims=True)
    values, vectors = np.linalg.eigh(np.where(finite, A, np.eye(A.shape[-1], dtype=A.dtype)))
    least = np.finfo(A.dtype).eps * values.max(axis=-1, keepdims=True, initial=0)
    return np.where(finite, vectors / np.sqrt(np.maximum(values, least))[..., None, :], np.nan)


def solve_each(
    q: np.ndarray,
    k: np.ndarray,
    log_decay: np.ndarray | None,
    H: np.ndarray,
    ridge: np.ndarray,
    wanted: np.ndarray | None = None,
    x: np.ndarray | None = None,
) -> np.ndarray:
    """The solution of every token by itself, a few tokens' H_t in memory at a time.

    Only tokens that are ``wanted (..., c)`` are written to ``x``; None: all of them, to a new array.
    """
    c, n = q.shape[-2:]
    q, row = spread_over(q, H), ridge[..., None, :] if ridge.ndim else ridge
    x = np.empty(q.shape, H.dtype) if x is None else x
    size = max(1, AT_ONCE // max(H.size, 1))
    for low in range(0, c, size):
        tokens = range(low, min(low + size, c))
        here = (..., slice(low, low + size), slice(None))
        grams = np.empty(H.shape[:-2] + (len(tokens), n, n), H.dtype)
        for i, t in enumerate(tokens):
            left = H if log_decay is None else kept(np.exp(log_decay[..., t, None, None]), H)
            grams[..., i, :, :] = H = left + k[..., t, :, None] * k[..., t, None, :]
        if wanted is None:
            x[here] = solve(grams, row, q[here])
        else:
            chosen = wanted[here[:-1]]
            every = np.broadcast_to(grams, q[here].shape + (n,))
            x[here][chosen] = solve(every[chosen], np.broadcast_to(row, q[here].shape)[chosen], q[here][chosen])
    return x


def solve(H: np.ndarray, ridge: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Solutions for tokens with a matrix each; of minimum norm where a ridge is zero or lost in rounding.

    Parameters
    ----------
    H : (..., k, k)
    ridge : () or (..., k)
    q : (..., k)

    Returns
    -------
    x : (..., k)
    """
    A = H + diagonal(ridge, H)
    n, eps = A.shape[-1], np.finfo(A.dtype).eps
    with np.errstate(invalid="ignore"):  # 0 / 0
        share = np.min(ridge / np.einsum("...ii->...i", A), axis=-1, initial=np.inf)
    safe = share >= n * n * eps  # with a unit diagonal, no eigenvalue is below the share of the ridge
    if np.all(safe):
        return np.linalg.solve(A, q[..., None])[..., 0]
    lead = np.broadcast_shapes(q.shape[:-1], safe.shape)
    A, safe, bound = np.broadcast_to(A, lead + (n, n)), np.broadcast_to(safe, lead), binds(ridge)
    q, ridge, bound = np.broadcast_to(q, lead + (n,)), np.broadcast_to(ridge, lead + (n,)), np.broadcast_to(bound, lead)
    x, unsafe = np.empty(q.shape, A.dtype), bound & ~safe
    x[safe] = np.linalg.solve(A[safe], q[safe][..., None])[..., 0]
    x[unsafe] = solve_unsafe(A[unsafe], ridge[unsafe], q[unsafe])
    x[~bound], _ = solve_spectral(A[~bound], q[~bound])
    return x


def solve_unsafe(A: np.ndarray, ridge: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Solutions where a matrix ``(n, k, k)`` may be singular to rounding, and then the limit of small ridges.

    That limit is of minimum norm, each channel weighed by its ridge.
    """
    x, lost = solve_scaled(A, q, unit_diagonal(A))
    if np.any(lost):
        ridge = ridge[lost]
        x[lost], _ = solve_scaled(A[lost], q[lost], np.sqrt(ridge.max(axis=-1, keepdims=True) / ridge))
    return x


def solve_scaled(A: np.ndarray, q: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`solve_spectral` in other units of the channels."""
    x, cut = solve_spectral(A * scale[..., None] * scale[..., None, :], q * scale)
    return x * scale, cut


def solve_spectral(A: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """pinv(A) q, and whether an eigenvalue counted as zero; NaN where A is not finite."""
    finite = np.isfinite(A).all(axis=(-1, -2), keepdims=True)
    values, vectors = np.linalg.eigh(np.where(finite, A, np.eye(A.shape[-1], dtype=A.dtype)))
    least = A.shape[-1] * np.finfo(A.dtype).eps * values.max(axis=-1, keepdims=True, initial=0)
    inverse = np.divide(1, values, out=np.zeros_like(values), where=values > least)
    read = inverse * np.einsum("...kn,...k->...n", vectors, q)
    x = np.where(finite[..., 0], np.einsum("...kn,...n->...k", vectors, read), np.nan)
    return x, np.any(values <= least, axis=-1)


def spread_over(q: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Queries with the leading axes of the memory."""
    return np.broadcast_to(q, np.broadcast_shapes(q.shape[:-2], H.shape[:-2]) + q.shape[-2:])


def frobenius(k: np.ndarray, gates: Gates | None, H: np.ndarray) -> np.ndarray:
    """Norm |H_t|_F of every token of a chunk, ``(..., c)``, from its recurrence.

    |g H + k k^T|^2 = g^2 |H|^2 + 2 k^T (g H + k k^T) k - |k|^4.
    """
    energy = np.sum(k * k, axis=-1)
    added = 2 * np.sum(k * attend(k, k, k, gates, H), axis=-1) - energy**2
    start = np.sum(H * H, axis=(-2, -1))[..., None]
    if gates is None:
        return np.sqrt(start + np.cumsum(added, axis=-1))
    kept = gates.since[..., 0] ** 2 * start
    return np.sqrt(kept + np.sum(gates.pairs**2 * added[..., None, :], axis=-1))


def iterate(
    solver: str,
    product: Callable[[np.ndarray], np.ndarray],
    norm: Callable[[], np.ndarray],
    ridge: np.ndarray,
    q: np.ndarray,
    iterations: int | None,
    tolerance: float | None,
) -> np.ndarray:
    """Solutions of all tokens at once; a token that is done is not touched again, whatever the others need.

    Parameters
    ----------
    solver
        ``cg`` or ``chebyshev``.
    product
        H_t times a vector per token.
    norm
        Gives |H_t|_F, ``(..., c)``.
    ridge, q
        As in ``mesa``.
    iterations, tolerance
        Limits, or None for the defaults.
    """
    eps, tolerance = float(np.finfo(q.dtype).eps), tolerance_for(solver, iterations, tolerance, q.dtype)
    row = ridge[..., None, :] if ridge.ndim else ridge
    if solver == "cg":
        most = np.array(2 * q.shape[-1] if iterations is None else iterations)
        x, residual = conjugate_gradients(lambda p: product(p) + row * p, q, most, tolerance)
    else:
        least, largest = row.min(axis=-1) if ridge.ndim else row, norm() + (row.max(axis=-1) if ridge.ndim else row)
        needed = np.sqrt(np.where(np.isfinite(largest), largest, least) / least) / 2 * np.log(2 / max(tolerance, eps))
        most = np.minimum(np.ceil(needed) + 1, 1000) if iterations is None else np.array(iterations)
        x, residual = chebyshev(lambda p: product(p) + row * p, q, least, largest, most, tolerance)
    report(solver, residual, most, tolerance)
    return np.where(np.isfinite(residual)[..., None], x, np.nan)


def report(solver: str, residual: np.ndarray, most: np.ndarray, tolerance: float) -> None:
    """A warning when a token is not done; with a tolerance of zero the caller asked for a number of steps."""
    if tolerance > 0 and np.any(residual > tolerance):
        warnings.warn(
            f"solver {solver!r} stopped after {int(most.max())} iterations at a relative residual of "
            f"{np.nanmax(residual):.1e}, above the tolerance {tolerance:.1e}: raise iterations, ridge or tolerance",
            RuntimeWarning,
            stacklevel=frames_of_package(),
        )


def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / y, and 0 where y is not positive; a NaN stays."""
    return np.divide(x, y, out=np.zeros_like(x), where=~(y <= 0))


def conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray], q: np.ndarray, most: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Conjugate gradients from zero, and the relative residual of every token."""
    x, r, p = np.zeros_like(q), q, q
    start = error = np.sum(q * q, axis=-1)
    for i in range(int(most.max(initial=0))):
        todo = (error > tolerance**2 * start) & (i < most)
        if not np.any(todo):
            break
        Ap = product(p)
        step = np.where(todo, ratio(error, np.sum(p * Ap, axis=-1)), 0)[..., None]
        x, r = x + step * p, r - step * Ap
        new = np.where(todo, np.sum(r * r, axis=-1), error)
        p = np.where(todo[..., None], r + ratio(new, error)[..., None] * p, p)
        error = new
    return x, np.sqrt(ratio(error, start))


def chebyshev(
    product: Callable[[np.ndarray], np.ndarray],
    q: np.ndarray,
    least: np.ndarray,
    largest: np.ndarray,
    most: np.ndarray,
    tolerance: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev iteration on eigenvalues in [least, largest], and the relative residual of every token."""
    middle = ((largest + least) / 2)[..., None]
    half = np.maximum(((largest - least) / 2)[..., None], np.finfo(q.dtype).eps * middle)
    x, r, d, rho = np.zeros_like(q), q, q / middle, half / middle
    start = error = np.sum(q * q, axis=-1)
    for i in range(int(most.max(initial=0))):
        todo = (error > tolerance**2 * start) & (i < most)
        if not np.any(todo):
            break
        now = todo[..., None]
        x, r = np.where(now, x + d, x), np.where(now, r - product(d), r)
        rho, before = 1 / (2 * middle / half - rho), rho
        d = rho * before * d + 2 * rho / half * r
        error = np.sum(r * r, axis=-1)
    return x, np.sqrt(ratio(error, start))


SOLVERS = ("exact", "cg", "chebyshev")
