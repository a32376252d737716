"""Adaptive filters and smoothers of other packages as contenders, told to answer the same question as ours.

Their answers are a posteriori, x_t . w_t with the weights that have seen pair t, as ours are. They take one series at a
time, in float64; several series are a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from ttr_np.measure import Contender, Skipped

__all__ = ["affine_projection", "kernel_regression", "kernel_ridge", "nlms", "recursive_least_squares", "ridge_refits"]

Solve = Callable[[np.ndarray, np.ndarray], np.ndarray]


def peer(name: str, package: str, solve: Solve, x: np.ndarray, d: np.ndarray, detail: str) -> Contender | Skipped:
    """A function of one series, ``x (t, k)`` and ``d (t,)``, run over all of ``x (..., t, k)``."""
    if find_spec(package) is None:
        return Skipped(name, f"{package} is not installed")
    x, d = np.float64(x), np.float64(d)
    series = list(zip(x.reshape(-1, *x.shape[-2:]), d.reshape(-1, d.shape[-1]), strict=True))
    return Contender(name, lambda: np.stack([solve(*one) for one in series]).reshape((*d.shape, 1)), detail=detail)


def filtered(weights: np.ndarray, last: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Answers with the weights after each sample, from the weights before each and those at the end."""
    return np.einsum("tk,tk->t", np.vstack([weights[1:], last]), x)


def recursive_least_squares(x: np.ndarray, d: np.ndarray, ridge: float) -> list[Contender | Skipped]:
    """RLS without forgetting, which all of them have."""

    def padasip(x: np.ndarray, d: np.ndarray) -> np.ndarray:
        from padasip.filters import FilterRLS

        rls = FilterRLS(n=x.shape[1], mu=1.0, eps=ridge, w="zeros")
        _, _, weights = rls.run(d, x)
        return filtered(weights, rls.w, x)

    def statsmodels(x: np.ndarray, d: np.ndarray) -> np.ndarray:
        from statsmodels.regression.recursive_ls import RecursiveLS

        k = x.shape[1]
        model = RecursiveLS(
            d, x, initialization="known", initial_state=np.zeros(k), initial_state_cov=np.eye(k) / ridge
        )
        return np.einsum("kt,tk->t", model.ssm.filter().filtered_state, x)

    return [
        peer("padasip", "padasip", padasip, x, d, "FilterRLS.run"),
        peer("statsmodels", "statsmodels", statsmodels, x, d, "RecursiveLS, its compiled filter alone, no smoothing"),
    ]


def ridge_refits(x: np.ndarray, d: np.ndarray, ridge: float) -> list[Contender | Skipped]:
    """What one would do without a recursion: fit anew at every step."""

    def refits(x: np.ndarray, d: np.ndarray) -> np.ndarray:
        from sklearn.linear_model import Ridge

        model = Ridge(alpha=ridge, fit_intercept=False)
        return np.array([model.fit(x[: t + 1], d[: t + 1]).coef_ @ x[t] for t in range(len(x))])

    return [peer("scikit-learn", "sklearn", refits, x, d, "Ridge fitted at every step")]


def nlms(x: np.ndarray, d: np.ndarray, mu: float, eps: float) -> list[Contender | Skipped]:
    """Normalised LMS."""

    def padasip(x: np.ndarray, d: np.ndarray) -> np.ndarray:
        from padasip.filters import FilterNLMS

        lms = FilterNLMS(n=x.shape[1], mu=mu, eps=eps, w="zeros")
        _, _, weights = lms.run(d, x)
        return filtered(weights, lms.w, x)

    return [peer("padasip", "padasip", padasip, x, d, "FilterNLMS.run")]


def affine_projection(x: np.ndarray, d: np.ndarray, mu: float, ridge: float, order: int) -> list[Contender | Skipped]:
    """Affine projection."""

    def padasip(x: np.ndarray, d: np.ndarray) -> np.ndarray:
        from padasip.filters import FilterAP

        ap = FilterAP(n=x.shape[1], order=order, mu=mu, ifc=ridge, w="zeros")
        _, _, weights = ap.run(d, x)
        return filtered(weights, ap.w, x)

    return [peer("padasip", "padasip", padasip, x, d, "FilterAP.run")]


def kernel_ridge(x: np.ndarray, d: np.ndarray, bandwidth: float, ridge: float) -> list[Contender | Skipped]:
    """Kernel ridge regression with a Gaussian kernel, every point a query, no causality."""

    def sklearn(x: np.ndarray, d: np.ndarray) -> np.ndarray:
        from sklearn.kernel_ridge import KernelRidge

        return KernelRidge(alpha=ridge, kernel="rbf", gamma=0.5 / bandwidth**2).fit(x, d).predict(x)

    return [peer("scikit-learn", "sklearn", sklearn, x, d, "KernelRidge")]


def kernel_regression(x: np.ndarray, d: np.ndarray, bandwidth: float) -> list[Contender | Skipped]:
    """Local linear regression with a Gaussian kernel, every point a query, no causality."""

    def statsmodels(x: np.ndarray, d: np.ndarray) -> np.ndarray:
        from statsmodels.nonparametric.kernel_regression import KernelReg

        return KernelReg(d, x, "c" * x.shape[1], reg_type="ll", bw=[bandwidth] * x.shape[1]).fit(x)[0]

    return [peer("statsmodels", "statsmodels", statsmodels, x, d, "KernelReg, local linear")]
