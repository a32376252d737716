"""Regression as scikit-learn does it, without depending on it: fit, partial_fit, predict, score, clone and search.

    TestTimeRegressor               any layer of the table as the memory of the rows
    RecursiveLeastSquaresRegressor  linear, exact, with forgetting; variances as rows stream in
    LocalPolynomialRegressor        LOESS of any degree in several dimensions; bandwidth by closed-form criteria
    KernelSmoother                  degree zero: Nadaraya-Watson, which is softmax attention

Rows of X are keys and queries, rows of y are values. All of them take several outputs, sample weights, pandas and
xarray objects (labels are kept), and any array that speaks DLPack from the CPU. ``equivalent_kernel`` shows what a
layer and a smoother have in common: the weight that each past value has in an answer.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from . import selection
from .calling import as_array
from .conventions import Regressor, is_number, not_fitted, with_intercept
from .layers import Layer, check_data, layers, own_memory
from .memories import L2Retention, Squared
from .memories import Linear as LinearMemory
from .memory import Memory
from .notation import CacheState
from .operators import local_polynomial, recursive_least_squares

__all__ = [
    "KernelSmoother",
    "LocalPolynomialRegressor",
    "RecursiveLeastSquaresRegressor",
    "TestTimeRegressor",
    "equivalent_kernel",
]


class TestTimeRegressor(Regressor):
    """Any layer of the table as a regressor: rows are memorised in their order, then asked.

    Parameters
    ----------
    layer : str or Layer, default "intention"
        A line of the table with queries, keys and values; the default is ridge regression.
    fit_intercept : bool, default True
        Append a one to every row.
    missing : {"raise", "skip"}, default "raise"
        What a NaN means: an error, or a missing value. Skipped rows are not memorised and nothing decays there; asked,
        they are answered by NaN.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.
    **gates
        Gates of the layer, by name, as numbers: ``beta=0.5``, ``log_decay=-0.01``, ``ridge=1e-3``. They are parameters
        like the others, for ``set_params`` and searches too.

    Attributes
    ----------
    memory_ : Memory
        What is memorised.
    sigma_ : (m,)
        Root mean square of the errors one step ahead: every row is predicted before it is memorised. The first d rows
        do not count; NaN if there are no others.
    n_features_in_, n_outputs_ : int
    feature_names_in_ : (d,)
        If the columns of X have names.

    Notes
    -----
    Cost: that of the layer for the rows, whose answers are the predictions that ``sigma_`` comes from. For layers
    fitted exactly by least squares ``sample_weight`` is the weight of a pair; it multiplies the step size of those that
    learn online; rows of weight zero are left out for all layers.

    Scale the columns of X: most layers look at lengths and angles of rows, and online steps diverge on long ones.

    References
    ----------
    Wang, Shi, Fox (2025), arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> X = np.random.default_rng(0).standard_normal((50, 3))
    >>> model = ttr_np.TestTimeRegressor("nlms", beta=0.5).fit(X, X @ [1.0, 0.0, -2.0] + 3.0)
    >>> model.predict([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).round(1)
    array([3., 4.])
    """

    __test__ = False  # pytest would collect a name that starts with Test

    def __init__(
        self,
        layer: str | Layer = "intention",
        *,
        fit_intercept: bool = True,
        missing: str = "raise",
        backend: Any = None,
        **gates: Any,
    ) -> None:
        self.layer = layer
        self.fit_intercept = fit_intercept
        self.missing = missing
        self.backend = backend
        self._gates = gates

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name, the gates that were given among them."""
        return super().get_params(deep) | self._gates

    def set_params(self, **params: Any) -> TestTimeRegressor:
        """Set parameters by name, gates of any layer among them.

        Raises
        ------
        ValueError
            If there is no such parameter, and no layer has such a gate.
        """
        gates = params.keys() & (GATE_NAMES | self._gates.keys())
        super().set_params(**{name: x for name, x in params.items() if name not in gates})
        self._gates = self._gates | {name: params[name] for name in gates}
        return self

    def prequential(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Predict every row from the rows before it, then memorise it: one step ahead through a series.

        Parameters
        ----------
        X : (n, d)
            Rows in the order of time.
        y : (n,) or (n, m)
            Their targets.
        sample_weight : (n,), optional
            Weights >= 0; a row of weight zero is predicted and not memorised.

        Returns
        -------
        (n,) or (n, m)
            Predictions, each made before its target was seen. The memory then knows all rows.
        """
        return self._answer(self._learnt(X, y, sample_weight, first=not self.__sklearn_is_fitted__()), X)

    def _learn(self, X: Any, y: Any, sample_weight: Any, first: bool) -> np.ndarray:
        """Predictions one step ahead, ``(n, m)``; the rows are memorised, all or none of them."""
        x, targets, w = self._pairs(X, y, sample_weight, first)
        layer = usable(self.layer)
        memory = Memory(layer, backend=self.backend, **self._gates) if first else self.memory_.copy()
        queries, seen = with_intercept(x, self.fit_intercept), w > 0
        k, v = (np.where(seen[:, None], part, 0) for part in (queries, targets))
        k, v, per_row = weighted(layer, k, v, w, self._gates)
        o = one_step_ahead(memory, queries, k, v, seen, per_row)
        whole = np.isfinite(queries).all(axis=1)
        if not np.isfinite(o[whole]).all():
            row = int(np.argmax(whole & ~np.isfinite(o).all(axis=1)))
            cure = "scale the columns of X, or take a smaller step (beta, step_size)"
            raise ValueError(f"layer {layer.name!r} diverged at row {row}: {cure}")
        self.memory_ = memory
        self._note(targets - o, w, first)
        return o

    def _note(self, errors: np.ndarray, w: np.ndarray, first: bool) -> None:
        """Keep the sums that ``sigma_`` is made of."""
        rows, squares, weight = (0, np.zeros(errors.shape[1]), 0.0) if first else self._errors
        late = (w > 0) & (rows + np.cumsum(w > 0) > self.n_features_in_)
        squares = squares + w[late] @ np.square(errors[late].astype(np.float64))
        self._errors = rows + int((w > 0).sum()), squares, weight + w[late].sum()
        self.sigma_ = np.sqrt(squares / self._errors[2]) if self._errors[2] else np.full(errors.shape[1], np.nan)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Ask the memory.

        Parameters
        ----------
        X : (n, d)
            Queries.
        return_std : bool, default False
            Return ``(prediction, std)``, std being ``sigma_``: how far off predictions one step ahead have been.

        Returns
        -------
        (n,) or (n, m), or two of them
            Answers, with the labels of X if it has some.
        """
        x = self._asked(X).astype(self.memory_._shape.dtype, copy=False)
        o = self.memory_.recall(with_intercept(x, self.fit_intercept))
        return self._with_std(o, np.broadcast_to(self.sigma_, o.shape), X, return_std)

    def leverage(self, X: Any) -> np.ndarray:
        """What each row of a fit contributes to its own fitted value: the diagonal of the smoother.

        Parameters
        ----------
        X : (n, d)
            The rows, in the order in which they were memorised.

        Returns
        -------
        (n,)

        Raises
        ------
        NotImplementedError
            If the layer's answers are not linear in the values.

        Notes
        -----
        Cost: that of the layer with values of n numbers.
        """
        keys = with_intercept(self._asked(X), self.fit_intercept)
        layer = linear_in_values(usable(self.layer))
        memory = Memory(layer, backend=self.backend, **self._gates).memorize(keys, np.eye(len(keys), dtype=keys.dtype))
        return np.diagonal(memory.recall(keys)).copy()

    def degrees_of_freedom(self, X: Any) -> float:
        """Effective number of parameters of the fit: the trace of the smoother, the sum of ``leverage(X)``.

        Parameters
        ----------
        X : (n, d)
            The rows, in the order in which they were memorised.

        Returns
        -------
        float

        Raises
        ------
        NotImplementedError
            If the layer's answers are not linear in the values.
        """
        return float(self.leverage(X).sum())


class RecursiveLeastSquaresRegressor(Regressor):
    """Linear least squares with exponential forgetting, updated row by row: exact, and with variances at any time.

        S = argmin sum_i forgetting^(n - i) w_i |y_i - S^T x_i|^2 + forgetting^n ridge |S|^2

    With an intercept x and y are measured from the means of the first rows, so that the ridge does not pull on them.

    Parameters
    ----------
    forgetting : float, default 1.0
        What is left of a row's weight after each later one, in (0, 1]; 1 forgets nothing.
    ridge : float or {"loo", "gcv", "aicc"}, default 1e-3
        Penalty of the coefficients, intercept included, > 0. By name: chosen by that criterion on the rows of ``fit``,
        or of the first ``partial_fit``, in closed form.
    fit_intercept : bool, default True
        Append a one to every row.
    missing : {"raise", "skip"}, default "raise"
        What a NaN means: an error, or a missing value. Skipped rows do not count and nothing is forgotten there.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.

    Attributes
    ----------
    coef_ : (d,) or (m, d)
    intercept_ : float or (m,)
    ridge_ : float
        The ridge in use.
    covariance_ : (p, p)
        Inverse of the weighted Gram matrix of the rows in use, the intercept last; times ``sigma_^2`` the covariance of
        the coefficients.
    sigma_ : (m,)
        Root of the weighted residual sum of squares over what is left of the number of rows, less ``dof_``; NaN if that
        is less than one row. A target of weight w has the variance ``sigma_^2 / w``.
    dof_ : float
        Effective degrees of freedom, the trace of the smoother.
    n_features_in_, n_outputs_ : int
    feature_names_in_ : (d,)
        If the columns of X have names.

    Notes
    -----
    Cost: O(n p (p + m)); what is kept does not grow. The residual sum of squares is updated by the product of the
    errors before and after each row, which never cancels.

    References
    ----------
    Plackett (1950); Kailath, Sayed, Hassibi (2000), Linear estimation, chapter 2.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> X = np.random.default_rng(0).standard_normal((200, 2))
    >>> model = ttr_np.RecursiveLeastSquaresRegressor(forgetting=0.99).fit(X[:100], X[:100, 0])
    >>> model.partial_fit(X[100:], -X[100:, 1]).coef_.round(1)
    array([ 0.3, -0.7])
    """

    def __init__(
        self,
        forgetting: float = 1.0,
        ridge: float | str = 1e-3,
        *,
        fit_intercept: bool = True,
        missing: str = "raise",
        backend: Any = None,
    ) -> None:
        self.forgetting = forgetting
        self.ridge = ridge
        self.fit_intercept = fit_intercept
        self.missing = missing
        self.backend = backend

    def _learn(self, X: Any, y: Any, sample_weight: Any, first: bool) -> None:
        """Run the recursion over the rows that count, and note what it means."""
        if not (is_number(self.forgetting) and 0 < self.forgetting <= 1):
            raise ValueError(f"forgetting must lie in (0, 1]; it is {self.forgetting}")
        x, targets, w = self._pairs(X, y, sample_weight, first)
        x, targets, w = x[w > 0], targets[w > 0], w[w > 0]
        if first and not len(x):
            raise ValueError("no row counts: each of these first rows lacks a number or has the weight zero")
        if first:
            self._origin = self._middle(x, targets, w)
        k, v = self._regressors(x), targets - self._origin[1]
        if first:
            self.ridge_ = self._chosen_ridge(k, v, w)
            self._state, self._sums = None, (0.0, np.zeros(v.shape[1]), 0.0)
        log_decay = np.log(self.forgetting)
        common = {"log_decay": log_decay, "ridge": self.ridge_, "backend": self.backend, "output_final_state": True}
        twice = [np.repeat(part, 2, axis=0) for part in (k, v, w)]  # each row is asked before and after it is stored
        store = np.arange(2 * len(k)) % 2 == 1
        q, v2, beta = twice
        o, self._state = recursive_least_squares(q, q, v2, beta=beta, mask=store, initial_state=self._state, **common)
        left = np.exp(log_decay * np.arange(len(k) - 1, -1, -1.0))
        products = ((v - o[::2]) * (v - o[1::2])).astype(np.float64)
        weight, cost, rows = self._sums
        share = np.exp(log_decay * len(k))
        self._sums = (share * weight + left.sum(), share * cost + (left * w) @ products, rows + len(k))
        self._report()

    def _middle(self, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where x and y are measured from: their means, zero without an intercept."""
        if not self.fit_intercept:
            return np.zeros_like(x[0]), np.zeros_like(y[0])
        return tuple(np.average(part, axis=0, weights=w).astype(part.dtype) for part in (x, y))

    def _regressors(self, x: np.ndarray) -> np.ndarray:
        """Rows from their origin, perhaps with a one at the end."""
        return with_intercept(x - self._origin[0].astype(x.dtype), self.fit_intercept)

    def _chosen_ridge(self, k: np.ndarray, v: np.ndarray, w: np.ndarray) -> float:
        """The ridge by its number or by its criterion."""
        if not isinstance(self.ridge, str):
            if not (is_number(self.ridge) and 0 < self.ridge < np.inf):
                raise ValueError(f"ridge must be a positive number or one of {CRITERIA}; it is {self.ridge}")
            return float(self.ridge)
        check_criterion("ridge", self.ridge)
        share = float(self.forgetting ** len(k))
        if share < 1e-9:
            raise ValueError(f"ridge={self.ridge!r}: forgetting leaves nothing of it in {len(k)} rows; give a number")
        left = np.exp(np.log(self.forgetting) * np.arange(len(k) - 1, -1, -1.0))
        return selection.choose_ridge(k, v, left * w, self.ridge, share)

    def _report(self) -> None:
        """What the state means for a user."""
        S, P = (np.asarray(part, np.float64) for part in self._state)
        d, (x, y) = self.n_features_in_, self._origin
        coef, intercept = S[:d].T, y + (S[d] if self.fit_intercept else 0) - x @ S[:d]
        self.coef_, self.intercept_ = (coef[0], float(intercept[0])) if self._single else (coef, intercept)
        self.covariance_ = P
        weight, cost, rows = self._sums
        ridge = self.ridge_ * self.forgetting**rows
        self.dof_ = float(len(P) - ridge * np.trace(P))
        residual, left = np.maximum(cost - ridge * np.sum(S * S, axis=0), 0), weight - self.dof_
        self.sigma_ = np.sqrt(residual / left) if left >= 1 else np.full(S.shape[1], np.nan)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict the targets of rows.

        Parameters
        ----------
        X : (n, d)
        return_std : bool, default False
            Return ``(prediction, std)``: the standard deviation of a new target, ``sigma_ sqrt(1 + x^T P x)``.

        Returns
        -------
        (n,) or (n, m), or two of them
            Predictions, with the labels of X if it has some.
        """
        x = self._regressors(self._asked(X))
        o = x @ np.asarray(self._state.S, x.dtype) + self._origin[1].astype(x.dtype)
        std = np.sqrt(1 + quadratic(x, self.covariance_))[:, None] * self.sigma_ if return_std else o
        return self._with_std(o, std, X, return_std)

    def leverage(self, X: Any) -> np.ndarray:
        """x^T P x: what a row of weight one, among those of the fit, contributes to its own fitted value.

        Parameters
        ----------
        X : (n, d)

        Returns
        -------
        (n,)
        """
        return quadratic(self._regressors(self._asked(X)), self.covariance_)


class LocalPolynomialRegressor(Regressor):
    """A polynomial fitted anew around every query, near rows weighing more: LOESS in several dimensions.

    Parameters
    ----------
    degree : int, default 1
        Of the polynomial.
    kernel : str or callable, default "gaussian"
        ``gaussian``, ``epanechnikov``, ``biweight``, ``triweight``, ``boxcar``, or a function of distance / bandwidth.
    bandwidth : float or {"loo", "gcv", "aicc"}, default "loo"
        Width of the kernel, in the units of X. By name: chosen by that criterion on the rows of ``fit``, or of the
        first ``partial_fit``, in closed form.
    ridge : float, default 1e-6
        On all coefficients but the constant, relative to the total weight.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``; of predictions.

    Attributes
    ----------
    bandwidth_ : float
        The bandwidth in use.
    dof_ : float
        Effective degrees of freedom, the trace of the smoother.
    sigma_ : (m,)
        Root of the weighted residual sum of squares over the number of rows less ``dof_``; NaN if that is less than
        one. A target of weight w has the variance ``sigma_^2 / w``.
    n_features_in_, n_outputs_ : int
    feature_names_in_ : (d,)
        If the columns of X have names.

    Notes
    -----
    All rows are kept. Cost of a query: O(n p (p + m)) with p coefficients; of ``dof_`` and ``sigma_``, when first asked
    for, n times that, and of the choice of a bandwidth some twelve times as much again, less where it is small. No
    n x n matrix is stored. Distances are Euclidean: give the columns of X one scale. A query out of reach of all rows
    gets the value of the nearest, with a warning.

    References
    ----------
    Cleveland (1979); Fan, Gijbels (1996), Local polynomial modelling and its applications.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> X = np.linspace(0, 1, 40)[:, None]
    >>> model = ttr_np.LocalPolynomialRegressor(bandwidth=0.1).fit(X, 2 * X[:, 0] + 1)
    >>> model.predict([[0.5], [1.0]]).round(3)
    array([2., 3.])
    """

    def __init__(
        self,
        degree: int = 1,
        kernel: Any = "gaussian",
        bandwidth: float | str = "loo",
        *,
        ridge: float = 1e-6,
        backend: Any = None,
    ) -> None:
        self.degree = degree
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.ridge = ridge
        self.backend = backend

    def _learn(self, X: Any, y: Any, sample_weight: Any, first: bool) -> None:
        """Keep rows; the first ones choose the bandwidth."""
        x, y, w = self._pairs(X, y, sample_weight, first)
        more = x[w > 0], y[w > 0], w[w > 0]
        self._kept = more if first else tuple(np.concatenate(pair) for pair in zip(self._kept, more, strict=True))
        self._noise = None
        if first:
            self.bandwidth_ = self._chosen_bandwidth()

    def _sorted(self) -> selection.Pairs:
        """The rows in the order in which they are smoothed."""
        x, y, w = (np.asarray(part, np.float64) for part in self._kept)
        order = np.argsort(x[:, 0], kind="stable")
        return selection.Pairs(x[order], y[order], w[order], self.degree, self.kernel, self.ridge)

    def _chosen_bandwidth(self) -> float:
        """The bandwidth by its number or by its criterion."""
        check_smoother(self.degree, self.kernel, self.ridge)
        if not isinstance(self.bandwidth, str):
            if not (is_number(self.bandwidth) and self.bandwidth > 0):
                raise ValueError(f"bandwidth must be a number > 0 or one of {CRITERIA}; it is {self.bandwidth}")
            return float(self.bandwidth)
        check_criterion("bandwidth", self.bandwidth)
        return selection.choose_bandwidth(self._sorted(), self.bandwidth)

    @property
    def dof_(self) -> float:
        """Effective degrees of freedom, the trace of the smoother."""
        return self._found()[0]

    @property
    def sigma_(self) -> np.ndarray:
        """Standard deviation of a target of weight one."""
        return self._found()[1]

    def _found(self) -> tuple[float, np.ndarray]:
        """Degrees of freedom and the noise, from the rows' own fits, when they are first asked for."""
        if not self.__sklearn_is_fitted__():
            raise not_fitted(self)
        if self._noise is None:
            pairs = self._sorted()
            errors, leverage = selection.left_out(pairs, self.bandwidth_, np.arange(len(pairs.x)))
            residual, dof = errors * (1 - leverage)[:, None], float(leverage.sum())
            left = len(pairs.x) - dof
            sigma = np.sqrt(pairs.w @ residual**2 / left) if left >= 1 else np.full(pairs.y.shape[1], np.nan)
            self._noise = dof, sigma
        return self._noise

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Fit a polynomial around every row of X and return its value there.

        Parameters
        ----------
        X : (n, d)
        return_std : bool, default False
            Return ``(prediction, std)``: the standard deviation of a new target, ``sigma_ sqrt(1 + |s|^2)``, s
            being the row of the smoother; NaN out of reach of all rows.

        Returns
        -------
        (n,) or (n, m), or two of them
            Predictions, with the labels of X if it has some.
        """
        q = self._asked(X)
        x, y, w = self._kept
        q = q.astype(x.dtype, copy=False)
        state = CacheState(x, y, np.log(w).astype(x.dtype), np.arange(len(x)))
        shape = {"degree": self.degree, "kernel": self.kernel, "bandwidth": self.bandwidth_, "ridge": self.ridge}
        blank, nothing = np.zeros_like(q), np.zeros((len(q), y.shape[1]), y.dtype)
        only_ask = np.zeros(len(q), bool)
        o = local_polynomial(q, blank, nothing, **shape, initial_state=state, mask=only_ask, backend=self.backend)
        o = self._reached(q, o)
        std = np.sqrt(1 + self._at(q)[1])[:, None] * self.sigma_ if return_std else o
        return self._with_std(o, std, X, return_std)

    def _reached(self, q: np.ndarray, o: np.ndarray) -> np.ndarray:
        """Answers, those of queries out of reach replaced by the value of the nearest row."""
        x, y, _ = self._kept
        if self.kernel == "gaussian":
            return o
        lost = ~np.isfinite(self._at(q)[0])
        if lost.any():
            words = f"{int(lost.sum())} of {len(q)} rows have no neighbour within the bandwidth {self.bandwidth_:.3g}"
            warnings.warn(f"{words}: they get the value of the nearest", RuntimeWarning, stacklevel=3)
            nearest = [int(np.argmin(np.sum(np.square(x - row), axis=1))) for row in q[lost]]
            o[lost] = y[nearest]
        return o

    def _at(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gain and spread of the fits at queries."""
        _, gain, spread = selection.fits_at(self._sorted(), self.bandwidth_, np.asarray(q, np.float64))
        return gain, spread

    def leverage(self, X: Any) -> np.ndarray:
        """What a row of weight one, among those of the fit, contributes to its own fitted value.

        Parameters
        ----------
        X : (n, d)

        Returns
        -------
        (n,)
        """
        return self._at(self._asked(X))[0] * selection.kernel_at_zero(self.kernel)


class KernelSmoother(LocalPolynomialRegressor):
    """The mean of the targets, near rows weighing more: Nadaraya-Watson, and softmax attention on keys of one length.

    Parameters
    ----------
    kernel : str or callable, default "gaussian"
        As for ``LocalPolynomialRegressor``, whose degree zero this is; attributes and notes there.
    bandwidth : float or {"loo", "gcv", "aicc"}, default "loo"
        Width of the kernel, or the criterion that chooses it.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``; of predictions.

    References
    ----------
    Nadaraya (1964), On estimating regression; Watson (1964), Smooth regression analysis.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> X = np.array([[0.0], [1.0], [5.0]])
    >>> ttr_np.KernelSmoother(bandwidth=0.5).fit(X, [1.0, 3.0, 9.0]).predict([[0.5], [6.0]]).round(3)
    array([2., 9.])
    """

    degree, ridge, poor_score = 0, 0.0, True  # a local mean has little to average in many dimensions

    def __init__(self, kernel: Any = "gaussian", bandwidth: float | str = "loo", *, backend: Any = None) -> None:
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.backend = backend


CRITERIA = ", ".join(repr(name) for name in selection.CRITERIA)
GATE_NAMES = frozenset(name for layer in layers.values() if layer.data == ("q", "k", "v") for name in layer.gates)


def check_criterion(name: str, criterion: str) -> None:
    """A ValueError for an unknown criterion."""
    if criterion not in selection.CRITERIA:
        raise ValueError(f"{name} is {criterion!r}; it is a number > 0 or one of {CRITERIA}")


def check_smoother(degree: Any, kernel: Any, ridge: Any) -> None:
    """Refuse what is no local polynomial fit.

    Raises
    ------
    ValueError
        Naming the parameter and its value.
    """
    if not isinstance(degree, (int, np.integer)) or isinstance(degree, bool) or degree < 0:
        raise ValueError(f"degree must be an integer >= 0; it is {degree!r}")
    if not callable(kernel) and kernel not in selection.KERNELS:
        raise ValueError(f"kernel is {kernel!r}; it is one of {', '.join(selection.KERNELS)}, or a function")
    if callable(kernel):
        weights = np.asarray(kernel(np.array([0.0, 0.5, 1.0, 2.0])))
        if weights.shape != (4,) or not np.all(weights >= 0):
            raise ValueError(f"kernel must return a weight >= 0 for each distance; for four it returned {weights}")
    if not (is_number(ridge) and 0 <= ridge < np.inf):
        raise ValueError(f"ridge must be a finite number >= 0; it is {ridge}")


def quadratic(x: np.ndarray, P: np.ndarray) -> np.ndarray:
    """x^T P x for every row."""
    return np.einsum("np,pr,nr->n", x, P, x, optimize=True)


def usable(layer: str | Layer) -> Layer:
    """A layer that memorises rows under rows.

    Raises
    ------
    ValueError
        If it has no queries, keys and values.
    """
    layer = layers[layer] if isinstance(layer, str) else layer
    if layer.data != ("q", "k", "v"):
        raise ValueError(f"layer {layer.name!r} takes {', '.join(layer.data)}; a regressor needs q, k and v")
    return layer


def one_step_ahead(
    memory: Memory, queries: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, gates: dict[str, np.ndarray]
) -> np.ndarray:
    """Answers to each query from the pairs before it; all pairs are memorised.

    Every row comes twice: asked without a pair of its own, then stored.
    """
    n = len(queries)
    asked = [np.stack([np.full_like(k, memory.layer.blank), k], axis=1), np.stack([np.zeros_like(v), v], axis=1)]
    k, v = (x.reshape(2 * n, -1) for x in asked)
    stored = np.stack([np.zeros_like(mask), mask], axis=1).reshape(2 * n)
    o = memory.step(np.repeat(queries, 2, axis=0), k, v, mask=stored, **{x: np.repeat(g, 2) for x, g in gates.items()})
    return o[::2]


def weighted(
    layer: Layer, k: np.ndarray, v: np.ndarray, w: np.ndarray, gates: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Pairs and gates that say how much each row weighs.

    Raises
    ------
    ValueError
        If weights differ and the layer knows none.
    """
    if np.all((w == 0) | (w == 1)):
        return k, v, {}
    if layer.operator in ("mesa", "recursive_least_squares") and layer.pose is None:
        root = np.sqrt(w)[:, None].astype(k.dtype)
        return root * k, root * v, {}
    for name in ("beta", "step_size"):
        if name in layer.gates and layer.gates[name].axes == "t":
            return k, v, {name: w * gates.get(name, layer.gates[name].default)}
    raise ValueError(f"sample_weight: layer {layer.name!r} has neither a weight nor a step size per pair")


def linear_in_values(layer: Layer) -> Layer:
    """The layer, with values of its own where keys are its values.

    Raises
    ------
    NotImplementedError
        If its answers are not linear in its values, or no value has one weight.
    """
    reason = ""
    if layer.optimizer is None:
        reason = layer.reason
    elif layer.operator == "test_time_training":
        memory = layer.regressor.memory({})
        plain = LinearMemory(bias=memory.bias)
        reason = "" if memory == plain and memory.retention == L2Retention() and memory.loss == Squared() else NONLINEAR
    elif layer.name in ("atlas", "gated_oja"):
        reason = NONLINEAR
    elif layer.name in ("s5", "rwkv4"):
        reason = "its channels have weights of their own"
    if reason:
        raise NotImplementedError(f"layer {layer.name!r} gives a past value no single weight: {reason}")
    return layer


NONLINEAR = "its answers are not linear in the values"


def equivalent_kernel(layer: str | Layer, q: Any, k: Any, *, backend: Any = None, **gates: Any) -> np.ndarray:
    """The weight that each past value has in each answer: attention maps and smoothers in one picture.

    Every layer that is linear in its values answers o = W v. For softmax attention W is the attention map, for a
    regression the rows of its smoother (hat) matrix, for linear attention the masked products of queries and keys.

    Parameters
    ----------
    layer : str or Layer
        A line of the table, by name or itself.
    q, k : (..., t, k)
        Queries and keys. A scan looks at neither; only their length counts.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.
    **gates
        The layer's gates.

    Returns
    -------
    W : (..., t, t)
        Row i holds the weights of the values in answer i; those of later values are zero.

    Raises
    ------
    NotImplementedError
        If the layer's answers are not linear in the values (networks, layer norms, sign steps), or if each channel of a
        value has weights of its own.
    TypeError, ValueError
        If queries and keys are no arrays of real numbers, or do not fit.

    Notes
    -----
    Cost: that of the layer on values of t numbers, each of which is one at one step.

    References
    ----------
    Wang, Shi, Fox (2025), arXiv:2501.12352; Hastie, Tibshirani (1990), Generalized additive models, chapter 2.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> ttr_np.equivalent_kernel("retnet", np.ones((3, 1)), np.ones((3, 1)), log_decay=np.log(0.5))
    array([[1.  , 0.  , 0.  ],
           [0.5 , 1.  , 0.  ],
           [0.25, 0.5 , 1.  ]])
    """
    layer = linear_in_values(layers[layer] if isinstance(layer, str) else layer)
    q, k = as_array("q", q), as_array("k", k)
    check_data(layer, {"q": q, "k": k})
    k = k.reshape((1,) * (q.ndim - k.ndim) + k.shape)
    v = np.eye(k.shape[-2], dtype=np.result_type(k, np.float32))
    if layer.data == ("x",):
        return layer(v, backend=backend, **gates)
    if layer.pose is own_memory:
        layer = replace(layer, data=("q", "k", "v"), pose=None)
    return layer(q, k, v, backend=backend, **gates)
