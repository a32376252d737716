"""Local polynomial regression: a polynomial fitted anew around every query; its value at the query is the answer.

    o_t = b,    (b, W) = argmin  sum_i p_ti |v_i - b - W^T f(k_i - q_t)|^2 + ridge |W|^2,    p_ti = w_ti / sum_j w_tj

w_ti is a kernel of query and key times what the gates have left of pair i; f(z) holds the monomials of z of degree 1
to ``degree``, scaled so that f(x) . f(z) = sum_d (x . z)^d / d!^2: the coefficients are derivatives, and the ridge,
relative to the total weight, knows no preferred axes. Degree 0 is softmax attention (exponential kernel) or
Nadaraya-Watson, degree 1 local linear attention:

    o = vbar + Cvk (Ckk + ridge I)^-1 (q - kbar)    (means and covariances under p)

Where the ridge is large enough that squaring the condition costs nothing it is solved from the moments of the centred
rows sqrt(p_i) (1, f_i); elsewhere by QR of these rows, block after block, under sqrt(ridge) I. All sums are float64.

A ridge > 0 determines the fit of any number of neighbours. Where the rows leave a coefficient undetermined (ridge 0 and
fewer neighbours than coefficients, or collinear keys) the answer is that of the next lower degree; without neighbours
it is zero.

[1] Fan, Gijbels (1996), Local polynomial modelling and its applications; Cleveland (1979), LOESS
[2] Zuo et al. (2025), Local linear attention, arXiv:2510.01450
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import combinations_with_replacement
from math import comb, factorial, prod
from operator import index
from typing import Any, NamedTuple

import numpy as np

from ..calling import run
from ..notation import CacheState
from ._cache import Mean, View, append, attend, block_of, check_options, empty_cache, masked, past_of
from ._chunks import output_like

__all__ = ["KERNELS", "chunked", "local_polynomial", "polynomial", "recurrent"]

UNDETERMINED = 1e-11  # share of a column that must be new to the columns before it: below, it is rounding

WELL_POSED = 1e-3  # ridge over the largest moment: from here on moments lose at most three digits of sixteen
SEEN = 0.5  # least first moment, the sum of the weights: it is 1 for queries that see pairs, else 0

KERNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gaussian": lambda u: np.exp(-u * u / 2),
    "epanechnikov": lambda u: np.maximum((1 - u) * (1 + u), 0),
    "biweight": lambda u: np.maximum((1 - u) * (1 + u), 0) ** 2,
    "triweight": lambda u: np.maximum((1 - u) * (1 + u), 0) ** 3,
    "boxcar": lambda u: np.where(u <= 1, 1.0, 0.0 * u),
}


class Fit(NamedTuple):
    """What is fitted, and under which weights."""

    degree: int
    kernel: str | Callable[[np.ndarray], np.ndarray]
    scale: float | None
    bandwidth: float | None
    ridge: float
    origin: Any = 0.0  # of the exponential kernel's keys: any will do, one among them saves digits


def local_polynomial(
    q: Any,
    k: Any,
    v: Any,
    *,
    degree: int = 1,
    kernel: str | Callable[[np.ndarray], np.ndarray] = "exponential",
    scale: float | None = None,
    bandwidth: float | None = None,
    ridge: float = 1e-6,
    causal: bool = True,
    window: int | None = None,
    log_decay: Any = None,
    **common: Any,
) -> Any:
    """Local polynomial regression; see ``ttr_np.local_polynomial``."""
    check_options(q, log_decay, causal, window)
    check_fit(Fit(degree, kernel, scale, bandwidth, ridge))
    options = {"degree": degree, "kernel": kernel, "scale": scale, "bandwidth": bandwidth, "ridge": ridge}
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    options |= {"causal": causal, "window": window}
    return run(chunked, "local_polynomial", arrays, options, start=empty_cache, **common)


def check_fit(fit: Fit) -> None:
    """Refuse a kernel without its width, and numbers out of range.

    Raises
    ------
    ValueError
        Naming the option and its value.
    """
    if index(fit.degree) < 0:
        raise ValueError(f"degree must be at least 0; it is {fit.degree}")
    if not fit.ridge >= 0:
        raise ValueError(f"ridge must be >= 0; it is {fit.ridge}")
    if not callable(fit.kernel) and fit.kernel not in ("exponential", *KERNELS):
        raise ValueError(f"kernel is {fit.kernel!r}; it is one of exponential, {', '.join(KERNELS)}, or a function")
    if fit.kernel == "exponential" and fit.bandwidth is not None:
        raise ValueError(f"bandwidth={fit.bandwidth} is for kernels of a distance: the exponential one takes scale")
    if fit.kernel != "exponential" and fit.scale is not None:
        raise ValueError(f"scale={fit.scale} is for the exponential kernel: kernel {fit.kernel!r} takes bandwidth")
    if fit.kernel != "exponential" and (fit.bandwidth is None or not fit.bandwidth > 0):
        raise ValueError(f"kernel {fit.kernel!r} needs a bandwidth > 0; it is {fit.bandwidth}")


@np.errstate(invalid="ignore", divide="ignore")
def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    state: CacheState,
    **fit: Any,
) -> tuple[np.ndarray, CacheState]:
    """Token by token: the cache grows by a pair, and one fit weighs every pair in it. Cost: O(t^2 p^2), p monomials."""
    o = output_like(q, v, state.k)
    if not causal:
        state = append(state, k, v, log_decay, mask)
    for t in range(q.shape[-2]):
        if causal:
            now = (..., slice(t, t + 1))
            gate, memorise = (None if x is None else x[now] for x in (log_decay, mask))
            state = append(state, k[..., t : t + 1, :], v[..., t : t + 1, :], gate, memorise, window)
        left = state.log_weight[..., None, :]
        view, part = View(state.k, state.v, left, left != -np.inf), o[..., t : t + 1, :]
        this = Fit(**fit, origin=first(state.k))
        part[...] = answer(this, q[..., t : t + 1, :], lambda view=view: [view], part.shape)
    return o, state


def first(k: np.ndarray) -> np.ndarray:
    """The oldest key, ``(..., 1, k)``: it is in the past of all queries. Zero where it is not a number."""
    return np.where(np.isfinite(k[..., :1, :]), k[..., :1, :], 0).astype(np.float64).sum(axis=-2, keepdims=True)


@np.errstate(invalid="ignore", divide="ignore")
def chunked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    state: CacheState,
    **fit: Any,
) -> tuple[np.ndarray, CacheState]:
    """Blocks of queries, each passing its blocks of keys twice: for the means, then for the fit around them."""
    o = output_like(q, v, state.k)
    lead, keys, values = o.shape[:-2], q.shape[-1], v.shape[-1]
    columns = comb(keys + fit["degree"], keys) + keys + values
    block = block_of(lead, columns, 128, window)
    this = Fit(**fit, origin=first(state.k if state.k.shape[-2] else k))
    past = past_of(state, k, v, log_decay, mask, block.pairs, causal, window)
    for low in range(0, q.shape[-2], block.queries):
        high = min(low + block.queries, q.shape[-2])
        part = o[..., low:high, :]
        look = partial(past.views, low, high)
        part[...] = answer(this, q[..., low:high, :], look, part.shape)
    return o, append(state, k, v, log_decay, mask, window)


def answer(fit: Fit, q: np.ndarray, look: Callable[[], Iterable[View]], shape: tuple[int, ...]) -> np.ndarray:
    """The fits of a block of queries, ``(..., c, v)``; ``look()`` walks once over the pairs that they see.

    Parameters
    ----------
    q : (..., c, k)
    shape
        Of the answers.
    """
    q = q.astype(np.float64)
    means = attend(scored(fit, q, look()), shape[:-1] + (shape[-1] + q.shape[-1],), np.dtype(np.float64))
    mean = means.value[..., : shape[-1]]
    if fit.degree == 0 or not q.shape[-1]:
        return mean
    # Around the mean key a line is centred; monomials of higher degree (and their ridge) are those around the query.
    centre = means.value[..., shape[-1] :] if fit.degree == 1 else np.broadcast_to(q, shape[:-1] + q.shape[-1:])
    place = features(q - centre, fit.degree)
    rows = partial(weighted_rows, fit, q, means, mean, centre)
    posed, o = by_moments(fit.ridge, place, rows(look()), mean)
    if np.all(posed):
        return o
    R, B = triangle(fit.ridge, rows(look()), o.shape, place.shape[-1])
    weights = np.where(determined(R, fit.degree, q.shape[-1]), read_at(R, place), 0)
    return np.where(posed[..., None], o, mean + np.einsum("...p,...pv->...v", weights, B))


def scored(fit: Fit, q: np.ndarray, views: Iterable[View]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits of the weights, and what is averaged under them: values, then keys."""
    for view in views:
        yield masked(log_kernel(fit, q, view.k), view), np.concatenate(together(view.v, view.k), axis=-1)


def together(v: np.ndarray, k: np.ndarray) -> list[np.ndarray]:
    """Values and keys of a block in float64, with the same leading axes."""
    lead = np.broadcast_shapes(v.shape[:-1], k.shape[:-1])
    return [np.broadcast_to(x, lead + x.shape[-1:]).astype(np.float64) for x in (v, k)]


def log_kernel(fit: Fit, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Log of the kernel between c queries and n keys, ``(..., c, n)``.

    Raises
    ------
    ValueError
        If a function given as kernel returns a negative weight.
    """
    k = k.astype(np.float64)
    if fit.kernel == "exponential":
        scale = max(q.shape[-1], 1) ** -0.5 if fit.scale is None else fit.scale
        return (scale * q) @ np.swapaxes(k - fit.origin, -1, -2)
    apart = differences(k, q)
    distance = np.sqrt(np.einsum("...k,...k->...", apart, apart)) / fit.bandwidth
    if fit.kernel == "gaussian":
        return -distance * distance / 2
    weight = KERNELS.get(fit.kernel, fit.kernel)(distance)
    if np.any(weight < 0):
        raise ValueError(f"kernel returned the weight {np.nanmin(weight)}; weights are >= 0")
    return np.log(weight)


def differences(k: np.ndarray, q: np.ndarray) -> np.ndarray:
    """k_j - q_i, ``(..., i, j, k)``: an offset common to both costs no digit."""
    return k[..., None, :, :] - q[..., :, None, :]


@cache
def monomials(keys: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of all monomials of one degree, ``(p, degree)``, and their scales sqrt(multiplicity) / degree!."""
    factors = np.array(list(combinations_with_replacement(range(keys), degree)), np.intp).reshape(-1, degree)
    repeats = [prod(factorial(list(row).count(i)) for i in set(row)) for row in factors]
    return factors, np.sqrt(factorial(degree) / np.array(repeats, float)) / factorial(degree)


def polynomial(keys: int, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each monomial as an earlier one times one channel.

    Returns
    -------
    bounds
        Where each degree ends.
    parents, factors, scales
        Of each monomial: ``f = scale * product``, ``product = product[parent] * z[factor]``; the first one is 1.
    """
    bounds, parents, factors, scales, place = [1], [0], [0], [1.0], {(): 0}
    for power in range(1, degree + 1):
        rows, sizes = monomials(keys, power)
        for monomial, size in zip(map(tuple, rows.tolist()), sizes, strict=True):
            place[monomial] = len(parents)
            parents.append(place[monomial[:-1]])
            factors.append(monomial[-1])
            scales.append(size)
        bounds.append(comb(keys + power, power))
    return np.array(bounds), np.array(parents), np.array(factors), np.array(scales)


def features(z: np.ndarray, degree: int) -> np.ndarray:
    """(1, f(z)): scaled monomials of z, the low degrees first."""
    columns = [np.ones_like(z[..., :1]), z][: degree + 1]
    for d in range(2, degree + 1):
        factors, scales = monomials(z.shape[-1], d)
        column = z.take(factors[:, 0], axis=-1) * scales
        for place in range(1, d):
            column *= z.take(factors[:, place], axis=-1)
        columns.append(column)
    return np.concatenate(columns, axis=-1)


def weighted_rows(
    fit: Fit, q: np.ndarray, means: Mean, mean: np.ndarray, centre: np.ndarray, views: Iterable[View]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows ``(..., c, n, p)`` and targets ``(..., c, n, v)`` of each query's fit, times the root of their weight."""
    for view in views:
        logits = masked(log_kernel(fit, q, view.k), view) - np.where(means.top == -np.inf, 0, means.top)[..., None]
        root = np.exp(logits / 2) / np.sqrt(np.where(means.weight > 0, means.weight, 1))[..., None]
        rows = features(differences(view.k.astype(np.float64), centre), fit.degree)
        targets = differences(view.v.astype(np.float64), mean)
        for x in (rows, targets):
            x *= root[..., None]
            np.copyto(x, 0, where=(logits == -np.inf)[..., None])
        yield rows, targets


def by_moments(
    ridge: float, place: np.ndarray, rows: Iterable[tuple[np.ndarray, np.ndarray]], mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Answers from the moments of the rows, and which of them are as good as those of QR: where the ridge is large.

    The moments are products of matrices, many times faster than QR, but their condition is that of the rows squared.
    """
    if ridge <= WELL_POSED * SEEN:  # no moments are needed to say that their largest is too large
        return np.zeros(mean.shape[:-1], bool), mean
    p = place.shape[-1]
    N = np.zeros(mean.shape[:-1] + (p, p))
    N[..., range(1, p), range(1, p)] = ridge
    M = np.zeros(mean.shape[:-1] + (p, mean.shape[-1]))
    for X, Y in rows:
        N += np.swapaxes(X, -1, -2) @ X
        M += np.swapaxes(X, -1, -2) @ Y
    posed = (ridge >= WELL_POSED * np.einsum("...ii->...i", N).max(axis=-1)) & (N[..., 0, 0] > SEEN)
    N = np.where(posed[..., None, None], N, np.eye(p))
    weights = np.linalg.solve(N, np.broadcast_to(place, mean.shape[:-1] + (p,))[..., None])
    return posed, mean + np.einsum("...p,...pv->...v", weights[..., 0], M)


def triangle(
    ridge: float, rows: Iterable[tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...], p: int
) -> tuple[np.ndarray, np.ndarray]:
    """R and B of each query's fit: its normal equations are R^T R W = R^T B, but they are never formed.

    QR of the rows so far and a block of new ones gives the next R; the first rows are those of the ridge.
    """
    R = np.zeros(shape[:-1] + (p, p))
    R[..., range(1, p), range(1, p)] = np.sqrt(ridge)
    B = np.zeros(shape[:-1] + (p, shape[-1]))
    for X, Y in rows:
        Q, R = np.linalg.qr(np.concatenate([R, X], axis=-2))
        B = np.swapaxes(Q, -1, -2) @ np.concatenate([B, Y], axis=-2)
    return R, B


def read_at(R: np.ndarray, e: np.ndarray) -> np.ndarray:
    """R^-T e by forward substitution: its first entries are those of every lower degree as well."""
    w = np.zeros(R.shape[:-1])
    for i in range(R.shape[-1]):
        known = np.einsum("...j,...j->...", R[..., :i, i], w[..., :i])
        w[..., i] = (e[..., i] - known) / R[..., i, i]
    return w


def determined(R: np.ndarray, degree: int, keys: int) -> np.ndarray:
    """Which coefficients to use, ``(..., p)``: all those of the highest degree that the rows determine."""
    diagonal = np.abs(np.einsum("...ii->...i", R))
    new = ~(diagonal <= UNDETERMINED * np.sqrt(np.einsum("...ij,...ij->...j", R, R)))  # a NaN stays visible
    use = np.zeros(R.shape[:-1], bool)
    low = 0
    for d in range(degree + 1):
        high = comb(keys + d, d)
        use[..., low:high] = np.all(new[..., :high], axis=-1, keepdims=True)
        low = high
    return use
