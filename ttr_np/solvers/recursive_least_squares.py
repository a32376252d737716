"""Recursive least squares: the exact linear memory, carried from pair to pair (the Mesa layer of 2023).

    S_t = argmin_S  sum_i w_i(t) |v_i - S^T k_i|^2 + ridge w_0(t) |S|^2,    o_t = S_t^T q_t

where w_i(t) = beta_i exp(sum of log_decay over (i, t]), so the ridge decays with the data (``mesa`` keeps it constant).
With H_t = g_t H_{t-1} + beta_t k_t k_t^T, H_0 = ridge I, and P_t = H_t^-1 = R_t R_t^T the recursion is

    R' = R_{t-1} / sqrt(g_t),  a = sqrt(beta_t) R'^T k_t,  s = 1 + |a|^2
    S_t = S_{t-1} + sqrt(beta_t) (R' a / s) (v_t - S_{t-1}^T k_t)^T,    R_t = R' - R' a a^T / (s + sqrt(s))        [2]

P is never subtracted from: the memory carries its square root R, so P is symmetric and positive definite by
construction. For c tokens at once, with G_i = (decay of the chunk up to i), rows A = sqrt(beta) K R and one QR
factorisation (an orthogonal matrix times the left, [3]),

    [diag(sqrt G)  0  ]      [L^T  W  ]
    [A^T           R^T]  ->  [0    R'^T],      E = L^-1 sqrt(beta) (V - K S),     O = Q S + tril(Q W^T) E,

that is linear attention with whitened keys W and innovations E; then S' = S + W^T E and P' = R' R'^T / G_c.

**Wind-up.** A direction that no key excites is forgotten without being learned: its P grows like 1/g^t. Two caps keep
R^-1 meaningful, with ``limit = eps^(-2/3)`` (3.7e10 in float64, 4e4 in float32):

- before a pair is stored, if the mean eigenvalue of P exceeds 16 limit / (beta |k|^2), every eigenvalue above
  limit / (beta |k|^2) is set to that number (without keys: above 1e28 to 1e28);
- at the end of a call, where P is handed out as a matrix, eigenvalues above ``limit`` times the smallest one are set to
  that number.

A cap gives a direction at least 1 / limit of the information of the pair being stored, around the present solution: S
does not move, excited directions (eigenvectors of P below the cap) are not touched, and a new pair in a capped
direction is still stored to one part in ``limit``. Without forgetting nothing is capped unless 1 / ridge itself is that
large. How the sequence is cut into calls and chunks decides when a cap acts: answers then agree to about 1e-9 (float64)
or 1e-4 (float32) instead of rounding.
A single step forgets at most down to exp(-60) of the past.

[1] von Oswald et al. (2023), Uncovering mesa-optimization algorithms in transformers, arXiv:2309.05858
[2] Potter (1963); Bierman (1977), Factorization methods for discrete sequential estimation
[3] Kailath, Sayed, Hassibi (2000), Linear estimation, chapter 12
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..calling import as_array, run, zeros
from ..notation import RecursiveLeastSquaresState
from ._chunks import in_chunks, output_like, products, unit_lower_inverse

__all__ = ["chunked", "limit", "recursive_least_squares", "recurrent"]

LARGEST = 1e28  # of an eigenvalue of P when no key gives a scale; its square root times exp(30) fits in float32
FAINTEST = -60.0  # of a log decay: what is left, 1e-26, is below rounding
SLACK = 16.0  # how far P may pass its cap before it is cut back, so that the cut is rare


def recursive_least_squares(
    q: Any, k: Any, v: Any, *, log_decay: Any = None, beta: Any = None, ridge: float = 1.0, **common: Any
) -> Any:
    """Recursive least squares; see ``ttr_np.recursive_least_squares``."""
    check_ridge(ridge)
    check_weights(q, log_decay, beta, common.get("mask"))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    return run(chunked, "recursive_least_squares", arrays, start=partial(start, ridge), **common)


def check_ridge(ridge: Any) -> None:
    """A ridge is one positive number."""
    if np.ndim(ridge) or not 0 < ridge < np.inf:
        raise ValueError(f"ridge must be a positive finite number, got {ridge}")


def check_weights(q: Any, log_decay: Any, beta: Any, mask: Any) -> None:
    """Weights of a regression: one decay per step, positive; pair weights finite, not negative.

    Raises
    ------
    ValueError
        For a decay per channel, a forgetting factor that is 0 or NaN, a pair weight that is negative or not finite.
    """
    check_per_step(q, log_decay)
    if log_decay is not None:
        log_decay = as_array("log_decay", log_decay)
        refuse("log_decay", log_decay > -np.inf, log_decay, mask, "must be finite (a forgetting factor above 0)")
    if beta is not None:
        beta = as_array("beta", beta)
        refuse("beta", np.isfinite(beta) & (beta >= 0), beta, mask, "must be finite and >= 0 (the weight of a pair)")


def check_per_step(q: Any, log_decay: Any) -> None:
    """A ValueError for gates per channel."""
    if np.ndim(log_decay) and np.ndim(log_decay) == np.ndim(q):
        raise ValueError(
            "log_decay must have one number per step (..., t): with one per channel no pair has a single weight, so "
            "the memory would not solve a weighted regression"
        )


def refuse(name: str, good: np.ndarray, x: np.ndarray, mask: Any, rule: str) -> None:
    """A ValueError that names the first number that breaks a rule; what stands under the mask is not looked at."""
    if np.all(good):
        return
    bad = ~good if mask is None else np.logical_and(~good, mask)
    if np.any(bad):
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name} {rule}; it is {np.broadcast_to(x, np.shape(bad))[place]} at {place}")


def start(ridge: float, operator: str, lead: tuple[int, ...], sizes: dict[str, int], dtype: Any) -> Any:
    """An empty memory: solution zero, P the inverse of the ridge."""
    empty = zeros(operator, lead, sizes, dtype)
    empty.P[..., range(sizes["k"]), range(sizes["k"])] = 1 / ridge
    return empty


def limit(dtype: Any) -> float:
    """Largest ratio between two eigenvalues of P that a float type can carry."""
    return float(np.finfo(dtype).eps) ** (-2 / 3)


def factor(P: np.ndarray) -> np.ndarray:
    """Lower triangular R with P = R R^T; a NaN stays in its own sequence.

    Raises
    ------
    ValueError
        If P is not symmetric or not positive definite.
    """
    finite = np.isfinite(P).all(axis=(-1, -2), keepdims=True)
    safe = np.where(finite, P, np.eye(P.shape[-1], dtype=P.dtype))
    check_symmetric(safe)
    try:
        return np.where(finite, np.linalg.cholesky(safe), np.nan)
    except np.linalg.LinAlgError:
        smallest = np.linalg.eigvalsh(safe).min()
        raise ValueError(
            f"initial_state field P must be positive definite in {P.dtype}; its smallest eigenvalue is {smallest}"
        ) from None


def check_symmetric(P: np.ndarray) -> None:
    """A covariance is symmetric, up to rounding."""
    size = np.abs(P).max(axis=(-1, -2), keepdims=True, initial=0)
    gap = np.abs(P - np.swapaxes(P, -1, -2))
    if np.any(gap > 1e3 * np.finfo(P.dtype).eps * size):
        raise ValueError(f"initial_state field P must be symmetric; P and its transpose differ by {gap.max()}")


def cap(R: np.ndarray, above: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """R with the eigenvalues of R R^T cut to ``largest (...)``, in the sequences where ``above (...)``."""
    if not np.any(above):
        return R
    R = R.copy()
    directions, roots, _ = np.linalg.svd(R[above])
    R[above] = directions * np.minimum(roots, np.sqrt(largest[above])[..., None])[..., None, :]
    return R


def forget(R: np.ndarray, log_decay: np.ndarray | float, energy: np.ndarray) -> np.ndarray:
    """R after one decay, not larger than a pair of weight ``energy = beta |k|^2`` can learn from."""
    R = R / np.exp(np.maximum(log_decay, R.dtype.type(FAINTEST)) / 2)[..., None, None]
    largest = largest_before(R.dtype, energy)
    size = spread(R)
    return cap(R, np.isfinite(size) & (size > SLACK * largest), largest.astype(R.dtype))


def largest_before(dtype: Any, energy: np.ndarray) -> np.ndarray:
    """The cap on P before pairs of these energies."""
    return np.minimum(LARGEST, limit(dtype) / np.maximum(energy.astype(np.float64), limit(dtype) / LARGEST))


def spread(R: np.ndarray) -> np.ndarray:
    """Mean eigenvalue of R R^T, in double precision so that it cannot overflow."""
    return np.einsum("...ij,...ij->...", R, R, dtype=np.float64) / max(R.shape[-1], 1)


def covariance(R: np.ndarray, start: np.ndarray, P: np.ndarray) -> np.ndarray:
    """R R^T, exactly symmetric, its condition limited so that it is positive definite; P where R did not move."""
    finite = np.isfinite(R).all(axis=(-1, -2))
    roots = np.linalg.svd(np.where(finite[..., None, None], R, 1), compute_uv=False)
    largest = limit(R.dtype) * np.square(roots.min(axis=-1, initial=np.inf))
    root = cap(R, finite & (np.square(roots.max(axis=-1, initial=0)) > largest), largest)
    product = np.tril(root @ np.swapaxes(root, -1, -2))
    product = product + np.swapaxes(np.tril(product, -1), -1, -2)
    return np.where(np.all(R == start, axis=(-1, -2), keepdims=True), P, product)


def weigh(x: np.ndarray, beta: np.ndarray | None) -> np.ndarray:
    """Keys or values times the root of their weight; a pair of weight zero is not even looked at."""
    return x if beta is None else np.where(beta[..., None] == 0, x.dtype.type(0), np.sqrt(beta)[..., None] * x)


def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    *,
    state: RecursiveLeastSquaresState,
) -> tuple[np.ndarray, RecursiveLeastSquaresState]:
    """The recursion, token by token, on the square root of P. Cost: O(t (k^2 + k v))."""
    S, P = state
    start = factor(P)
    o, (S, R) = steps(q, k, v, log_decay, beta, state=RecursiveLeastSquaresState(S, start))
    return o, RecursiveLeastSquaresState(S, covariance(R, start, P))


def steps(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    beta: np.ndarray | None,
    state: RecursiveLeastSquaresState,
) -> tuple[np.ndarray, RecursiveLeastSquaresState]:
    """The recursion between states that hold R in the place of P."""
    S, R = state
    o = output_like(q, v, S)
    k, v = weigh(k, beta), weigh(v, beta)
    for t in range(q.shape[-2]):
        k_t, v_t = k[..., t, :], v[..., t, :]
        gate = np.zeros((), R.dtype) if log_decay is None else log_decay[..., t]
        R = forget(R, gate, np.broadcast_to(np.sum(k_t * k_t, axis=-1), R.shape[:-2]))
        a = np.einsum("...ij,...i->...j", R, k_t)
        s = 1 + np.sum(a * a, axis=-1, keepdims=True)
        Ra = np.einsum("...ij,...j->...i", R, a)
        error = v_t - np.einsum("...kv,...k->...v", S, k_t)
        S = S + (Ra / s)[..., :, None] * error[..., None, :]
        R = R - Ra[..., :, None] * (a / (s + np.sqrt(s)))[..., None, :]
        o[..., t, :] = np.einsum("...kv,...k->...v", S, q[..., t, :])
    return o, RecursiveLeastSquaresState(S, R)


def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    *,
    state: RecursiveLeastSquaresState,
) -> tuple[np.ndarray, RecursiveLeastSquaresState]:
    """Matrix products and one QR factorisation per chunk of c tokens. Cost: O(t (k v + c (k + v) + (c + k)^3 / c))."""
    S, P = state
    start = factor(P)
    o, (S, R) = in_chunks(
        chunk,
        steps,
        {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta},
        {"q": -2, "k": -2, "v": -2, "log_decay": -1, "beta": -1},
        output_like(q, v, S),
        RecursiveLeastSquaresState(S, start),
        64,
    )
    return o, RecursiveLeastSquaresState(S, covariance(R, start, P))


def chunk(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None,
    beta: np.ndarray | None,
    state: RecursiveLeastSquaresState,
) -> tuple[np.ndarray, RecursiveLeastSquaresState]:
    """One chunk, in one segment unless a decay or a cap has to act in between.

    Every segment is computed in the shape of the whole chunk, its other tokens set to zero: where it ends depends on
    what comes later, so its shape must not.
    """
    S, R = state
    k, v = weigh(k, beta), weigh(v, beta)
    lead, c = R.shape[:-2], q.shape[-2]
    energy = np.broadcast_to(np.sum(k * k, axis=-1), lead + (c,))
    gates = np.broadcast_to(R.dtype.type(0) if log_decay is None else log_decay, lead + (c,))
    done, o = np.zeros(lead + (1,), int), None
    while o is None or np.any(done < c):
        first = np.arange(c) == done
        R = forget(R, np.sum(gates, where=first, axis=-1), np.sum(energy, where=first, axis=-1))
        left = np.exp(np.cumsum(np.where(np.arange(c) > done, gates, 0), axis=-1))
        end = segment_end(R, left, energy, done)
        here = (np.arange(c) >= done) & (np.arange(c) < end)
        answer, S, R = segment(q, np.where(here[..., None], k, 0), np.where(here[..., None], v, 0), left, here, S, R)
        o = answer if o is None else np.where(here[..., None], answer, o)
        done = end
    return o, RecursiveLeastSquaresState(S, R)


def segment_end(R: np.ndarray, left: np.ndarray, energy: np.ndarray, done: np.ndarray) -> np.ndarray:
    """First token after ``done`` before which P must be decayed and capped anew, ``(..., 1)``; c if there is none."""
    room = SLACK * largest_before(R.dtype, energy) * left
    crossed = (np.arange(left.shape[-1]) > done) & (room < spread(R)[..., None])
    return np.where(crossed.any(axis=-1), crossed.argmax(axis=-1), left.shape[-1])[..., None]


def segment(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, left: np.ndarray, here: np.ndarray, S: np.ndarray, R: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear attention on whitened keys and innovations.

    ``left (..., c)`` is what is left at each token of the information at the start; only tokens ``here`` count.
    """
    left = np.where(here, left, left.dtype.type(1))
    L, W, R = whiten(k, R, left)
    scale = np.diagonal(L, axis1=-2, axis2=-1)
    E = unit_lower_inverse(L / scale[..., None, :]) @ (v - k @ S)
    E = E / scale[..., None]
    o = q @ S + products(q, W, None) @ E
    return o, S + np.swapaxes(W, -1, -2) @ E, R / np.sqrt(left.min(axis=-1))[..., None, None]


def whiten(k: np.ndarray, R: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One QR factorisation: L, W and the next R of the array in the module's docstring.

    Parameters
    ----------
    k : (..., c, k)
        Weighted keys.
    R : (..., k, k)
        Square root of P at the start.
    left : (..., c)
        What each key leaves of the information at the start.

    Returns
    -------
    L : (..., c, c)
        Lower triangular, L L^T = diag(left) + K P K^T; signs of its diagonal are free.
    W : (..., c, k)
        Whitened keys, P_i = (P - sum of W_j W_j^T up to i) / left_i.
    R : (..., k, k)
        Square root of P - W^T W.
    """
    c, n = k.shape[-2:]
    array = np.zeros(np.broadcast_shapes(k.shape[:-2], R.shape[:-2]) + (c + n, c + n), R.dtype)
    array[..., range(c), range(c)] = np.sqrt(left)
    array[..., c:, :c] = np.swapaxes(k @ R, -1, -2)
    array[..., c:, c:] = np.swapaxes(R, -1, -2)
    array = np.linalg.qr(array, mode="r")
    return np.swapaxes(array[..., :c, :c], -1, -2), array[..., :c, c:], np.swapaxes(array[..., c:, c:], -1, -2)
