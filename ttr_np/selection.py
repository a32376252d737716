"""How smooth? Ridge and bandwidth by leave-one-out, GCV or AICc, in closed form: no refits.

For a linear smoother, fit = L y with leverages h_i = L_ii, the error at a row left out is e_i / (1 - h_i), so

    loo  = mean of (e_i / (1 - h_i))^2
    gcv  = mean of e_i^2 / (1 - tr L / n)^2                                                    [1]
    aicc = log(mean of e_i^2) + 1 + 2 (tr L + 1) / (n - tr L - 2)                               [2]

with weights in all means. A ridge costs O(n p) after one singular value decomposition. A bandwidth costs one kernel per
pair of rows and a product with a few columns of moments; rows are sorted, so that those out of the kernel's reach are
not even looked at, and no n x n matrix is stored.

[1] Golub, Heath, Wahba (1979), Generalized cross-validation
[2] Hurvich, Simonoff, Tsai (1998), Smoothing parameter selection in nonparametric regression
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .solvers.local_polynomial import KERNELS, features

__all__ = ["CRITERIA", "Pairs", "choose_bandwidth", "choose_ridge", "fits_at", "left_out"]

CRITERIA = ("loo", "gcv", "aicc")
REACH = 7.5  # bandwidths beyond which a Gaussian weight, 6e-13, counts as nothing
BLOCK = 128  # queries at once: their kernel rows stay in the processor's cache
COARSE, FINE = 14, 3  # steps of the search
THIN = 8  # of many rows only each eighth is looked at to rule bandwidths out
DOUBT = 2.5  # standard errors by which a bandwidth must be worse to be ruled out
GOLDEN = (3 - np.sqrt(5)) / 2


class Pairs(NamedTuple):
    """What is smoothed: ``x (n, d)`` sorted by its first column, ``y (n, m)``, weights ``w (n,)``, and how."""

    x: np.ndarray
    y: np.ndarray
    w: np.ndarray
    degree: int
    kernel: str | Callable[[np.ndarray], np.ndarray]
    ridge: float


class Design(NamedTuple):
    """A block of queries: kernel ``K (c, n)``, features ``phi (n, p)`` or ``(p, c, n)``, theirs ``place (c, p)``."""

    K: np.ndarray
    phi: np.ndarray
    place: np.ndarray


def score(criterion: str, errors: np.ndarray, leverage: np.ndarray, weights: np.ndarray) -> float:
    """One of the three criteria; infinite where it is not defined.

    Parameters
    ----------
    criterion : str
        ``loo``, ``gcv`` or ``aicc``.
    errors : (n, m)
        At rows that are left out.
    leverage, weights : (n,)
        Of the fit with all rows; the scale of weights is of no account.
    """
    if not np.all(np.isfinite(errors)):
        return np.inf
    share, n, trace = weights / weights.sum(), len(weights), float(leverage.sum())
    if criterion == "loo":
        return float(share @ np.sum(errors * errors, axis=1))
    mean = float(share @ np.sum(np.square(errors * (1 - leverage)[:, None]), axis=1))
    if n - trace <= (0 if criterion == "gcv" else 2):
        return np.inf
    if criterion == "gcv":
        return mean / (1 - trace / n) ** 2
    return float(np.log(max(mean, np.finfo(float).tiny)) + 1 + 2 * (trace + 1) / (n - trace - 2))


def search(criterion: Callable[[float], float], grid: np.ndarray, good: np.ndarray, what: str) -> float:
    """The best of the steps of a grid of logs that are not ruled out, then the best around it.

    Raises
    ------
    ValueError
        If the criterion is infinite at all of them.
    """
    known = {int(i): criterion(grid[i]) for i in good}
    best = min(known, key=known.__getitem__, default=0)
    if not np.isfinite(known.get(best, np.inf)):
        raise ValueError(f"no {what} can be chosen: the criterion is infinite for all; give a number")
    around = [i for i in (best - 1, best, best + 1) if 0 <= i < len(grid)]
    if len(around) < 3:
        return float(grid[best])
    return refine(criterion, [(grid[i], known[i] if i in known else criterion(grid[i])) for i in around])


def refine(f: Callable[[float], float], points: list[tuple[float, float]]) -> float:
    """The lowest point near the middle one of three, by parabolas; by the golden section where they are of no use."""
    best = points[1]
    for _ in range(FINE):
        (a, fa), (b, fb), (c, fc) = points
        left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
        use = np.isfinite([fa, fc]).all() and left != right
        x = b - ((b - a) * left - (b - c) * right) / (2 * (left - right)) if use else b
        room = 0.02 * (c - a)
        if not a + room < x < c - room or abs(x - b) < room / 4:
            x = b + GOLDEN * (c - b) if c - b > b - a else b - GOLDEN * (b - a)
        new = (x, f(x))
        best = min(best, new, key=lambda point: point[1])
        inside = sorted([*points, new])
        middle = inside.index(min(inside[1:-1], key=lambda point: point[1]))
        points = inside[middle - 1 : middle + 2]
    return float(best[0])


def choose_ridge(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, criterion: str = "loo", share: float = 1.0
) -> float:
    """The ridge of a linear least-squares fit.

    Parameters
    ----------
    x : (n, p)
        Regressors; an intercept is a column of ones, penalised like the others.
    y : (n, m)
    weights : (n,)
    criterion : str, default "loo"
        ``loo``, ``gcv`` or ``aicc``.
    share : float, default 1.0
        What forgetting has left of the ridge by now.

    Returns
    -------
    ridge : float

    Notes
    -----
    Cost: one singular value decomposition, O(n p^2), and O(n (p + m)) for each of some hundred ridges.
    """
    x, y, weights = x[weights > 0], y[weights > 0], weights[weights > 0]
    root = np.sqrt(weights)[:, None]
    U, s, _ = np.linalg.svd(root * x, full_matrices=False)
    squares, Uy, s2 = U * U, U.T @ (root * y), s * s

    def at(log_ridge: float) -> float:
        shrink = s2 / (s2 + share * np.exp(log_ridge))
        errors, leverage = (root * y - U @ (shrink[:, None] * Uy)) / root, squares @ shrink
        with np.errstate(divide="ignore", invalid="ignore"):
            return score(criterion, errors / (1 - leverage)[:, None], leverage, weights)

    scale = np.log(max(s2.max(initial=0), np.finfo(float).tiny) / share)
    grid = scale + np.log(10.0) * np.linspace(-14, 3, 69)
    return float(np.exp(search(at, grid, np.arange(len(grid)), "ridge")))


def choose_bandwidth(pairs: Pairs, criterion: str = "loo") -> float:
    """The bandwidth of a local polynomial fit; the metric is Euclidean, so columns want a common scale.

    Parameters
    ----------
    pairs : Pairs
        What is smoothed, and how.
    criterion : str, default "loo"
        ``loo``, ``gcv`` or ``aicc``.

    Returns
    -------
    bandwidth : float
        Of the best of a grid from the spacing of the rows to twice their extent, refined to a few percent.

    Notes
    -----
    Cost: some twelve times O(n^2 p (p + m)) with p coefficients, less where the kernel does not reach far.
    """
    n, d = pairs.x.shape
    extent = float(np.linalg.norm(np.ptp(pairs.x, axis=0)))
    if not extent > 0:
        raise ValueError(f"no bandwidth can be chosen: n_samples={n}, and all rows are the same; give a number")
    most = float(np.linalg.norm(np.ptp(np.percentile(pairs.x, [5, 95], axis=0), axis=0))) or extent
    grid = np.linspace(np.log(most) - np.log(n) / d, np.log(2 * extent), COARSE)

    rows = np.flatnonzero(pairs.w > 0)

    def at(log_bandwidth: float) -> float:
        return score(criterion, *left_out(pairs, float(np.exp(log_bandwidth)), rows), pairs.w[rows])

    good = not_ruled_out(pairs, grid, rows[::THIN]) if n > 1024 else np.arange(COARSE)
    return float(np.exp(search(at, grid, good, "bandwidth")))


def not_ruled_out(pairs: Pairs, grid: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The bandwidths that are not clearly worse than another in predicting a few rows, each left out of all."""
    losses = []
    for log_bandwidth in grid:
        errors, _ = left_out(pairs, float(np.exp(log_bandwidth)), rows)
        losses.append(pairs.w[rows] * np.sum(errors * errors, axis=1))
    worse = np.array(losses) - losses[int(np.argmin(np.mean(losses, axis=1)))]
    return np.flatnonzero(worse.mean(axis=1) <= DOUBT * worse.std(axis=1) / np.sqrt(len(rows)))


def left_out(pairs: Pairs, bandwidth: float, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors at rows that are left out of the fit, ``(c, m)``, and leverages in the fit with all rows, ``(c,)``.

    A row without neighbours is its own fit, with leverage one; left out, it is predicted by the mean of all rows.
    """
    errors, leverages, mean = [], [], np.average(pairs.y, axis=0, weights=pairs.w)
    for place, near, own in blocks(pairs, bandwidth, pairs.x[rows]):
        design = designed(near, bandwidth, pairs.x[rows[place]])
        design.K[np.arange(len(design.K)), rows[place] - own] = 0
        value, gain, _ = solved(design, near, bandwidth)
        alone, own_weight = np.isnan(gain), pairs.w[rows[place]] * kernel_at_zero(pairs.kernel) * gain
        errors.append(pairs.y[rows[place]] - np.where(alone[:, None], mean, value))
        leverages.append(np.where(alone, 1.0, own_weight / (1 + own_weight)))
    return np.concatenate(errors), np.concatenate(leverages)


def fits_at(pairs: Pairs, bandwidth: float, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fits at any queries.

    Returns
    -------
    value : (c, m)
        NaN where a query has no neighbours.
    gain : (c,)
        e^T A^-1 e: the leverage that a new pair at the query would have, over its weight.
    spread : (c,)
        Squared length of the row of the smoother: the variance of the fit over that of a value.
    """
    order = np.argsort(queries[:, 0], kind="stable")
    parts = []
    for place, near, _ in blocks(pairs, bandwidth, queries[order]):
        design = designed(near, bandwidth, queries[order][place])
        value, gain, L = solved(design, near, bandwidth)
        squares = moments(design._replace(K=design.K * design.K), near._replace(y=near.y[:, :0]))
        parts.append((value, gain, np.einsum("cp,cpq,cq->c", L, squares, L)))
    back = np.argsort(order, kind="stable")
    value, gain, spread = (np.concatenate(x)[back] for x in zip(*parts, strict=True))
    return value, gain, spread


def kernel_at_zero(kernel: Any) -> float:
    """The weight of a pair at the query itself."""
    return float(KERNELS.get(kernel, kernel)(np.zeros(1))[0])


def reach(kernel: Any) -> float:
    """Bandwidths beyond which weights are zero, or next to it."""
    return np.inf if callable(kernel) else REACH if kernel == "gaussian" else 1.0 + 1e-9


def blocks(pairs: Pairs, bandwidth: float, queries: np.ndarray) -> Iterator[tuple[slice, Pairs, int]]:
    """Sorted queries, block after block, each with the pairs within reach and the number of the first of them."""
    far, first = reach(pairs.kernel) * bandwidth, pairs.x[:, 0]
    for low in range(0, len(queries), BLOCK):
        high = min(low + BLOCK, len(queries))
        begin = int(np.searchsorted(first, queries[low, 0] - far))
        end = int(np.searchsorted(first, queries[high - 1, 0] + far, side="right"))
        near = pairs._replace(x=pairs.x[begin:end], y=pairs.y[begin:end], w=pairs.w[begin:end])
        yield slice(low, high), near, begin


def designed(pairs: Pairs, bandwidth: float, queries: np.ndarray) -> Design:
    """Kernel and features of a block of queries.

    Up to degree one the features are those around the middle of the block, the same for all of its queries, so that
    moments are one product of matrices; from degree two on each query has its own.
    """
    centre, unit = queries.mean(axis=0), unit_of(pairs, bandwidth)
    a, b = (queries - centre) / unit, (pairs.x - centre) / unit
    K = kernel_weights(pairs.kernel, a * (unit / bandwidth), b * (unit / bandwidth))
    if pairs.degree <= 1:
        return Design(K, features(b, pairs.degree), features(a, pairs.degree))
    phi = features(b[None] - a[:, None], pairs.degree)
    return Design(K, np.ascontiguousarray(np.moveaxis(phi, -1, 0)), np.eye(1, phi.shape[-1]).repeat(len(a), axis=0))


def unit_of(pairs: Pairs, bandwidth: float) -> float:
    """The length that coordinates are measured in: the bandwidth, or the extent of the pairs if that is shorter."""
    extent = float(np.ptp(pairs.x, axis=0).max(initial=0)) if len(pairs.x) else 0.0
    return min(bandwidth, extent) if extent > 0 else bandwidth


def kernel_weights(kernel: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kernel between c queries and n rows, ``(c, n)``; squared distances by one product of matrices.

    Raises
    ------
    ValueError
        If a function given as kernel returns anything but weights.
    """
    ones = np.ones_like
    left = np.concatenate([a, ones(a[:, :1]), -0.5 * np.sum(a * a, axis=1, keepdims=True)], axis=1)
    right = np.concatenate([b, -0.5 * np.sum(b * b, axis=1, keepdims=True), ones(b[:, :1])], axis=1)
    exponents = left @ right.T  # minus half the squared distances
    if kernel == "gaussian":
        return np.exp(exponents, out=exponents)
    K = np.asarray(KERNELS.get(kernel, kernel)(np.sqrt(np.maximum(-2 * exponents, 0))))
    if K.shape != exponents.shape or np.any(K < 0):
        raise ValueError(f"kernel must return a weight >= 0 for each distance; got {K.min(initial=0)}, {K.shape}")
    return K


def moments(design: Design, pairs: Pairs) -> np.ndarray:
    """Sums of K w phi (phi, y)^T over the pairs, for each query: ``(c, p, p + m)``."""
    K, phi, place = design
    if phi.ndim == 2:
        table = (pairs.w[:, None] * phi)[:, :, None] * np.concatenate([phi, pairs.y], axis=1)[:, None, :]
        return np.tensordot(K, table, 1)
    p = place.shape[-1]
    M = np.empty((len(K), p, p + pairs.y.shape[1]))
    for i in range(p):
        column = K * pairs.w * phi[i]
        for j in range(i + 1):
            M[:, i, j] = M[:, j, i] = np.einsum("cn,cn->c", column, phi[j])
        M[:, i, p:] = column @ pairs.y
    return M


def penalty(pairs: Pairs, bandwidth: float) -> np.ndarray:
    """Ridge of each coefficient relative to the total weight, for features in the unit of the design."""
    d, ridges, unit = pairs.x.shape[1], [0.0], unit_of(pairs, bandwidth)
    for degree in range(1, pairs.degree + 1):
        count = features(np.zeros((1, d)), degree).shape[-1] - len(ridges)
        ridges += [max(pairs.ridge * unit ** (-2 * degree), 1e-12)] * count
    return np.array(ridges)


def solved(design: Design, pairs: Pairs, bandwidth: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, gain and A^-1 e of each query's fit; NaN where a query has no neighbours."""
    place, p = design.place, design.place.shape[-1]
    M = moments(design, pairs)
    total = M[:, :1, :1]
    A = M[..., :p] + total * np.diag(penalty(pairs, bandwidth))
    good = (total > 0) & np.isfinite(A).all(axis=(1, 2), keepdims=True)
    L = np.linalg.solve(np.where(good, A, np.eye(p)), place[..., None])[..., 0]
    L = np.where(good[:, 0], L, np.nan)
    return np.einsum("cp,cpm->cm", L, M[..., p:]), np.einsum("cp,cp->c", L, place), L
