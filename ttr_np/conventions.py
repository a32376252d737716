"""What scikit-learn asks of an estimator, without depending on it: parameters, checked tables, errors, a score."""

from __future__ import annotations

import sys
import warnings
from inspect import Parameter, signature
from typing import Any, TypeVar

import numpy as np

from .labels import as_table, column_names, labelled, labels_of

__all__ = ["Regressor", "is_number", "not_fitted", "with_intercept"]

Same = TypeVar("Same", bound="Regressor")


class NotFittedError(ValueError, AttributeError):
    """An estimator was asked before it was fitted."""


def not_fitted(estimator: Any) -> Exception:
    """The error for an estimator without a fit: scikit-learn's own, if that is in use, so that its tools know it."""
    words = f"This {type(estimator).__name__} instance is not fitted yet: call fit first"
    exceptions = sys.modules.get("sklearn.exceptions")
    return (NotFittedError if exceptions is None else exceptions.NotFittedError)(words)


class Regressor:
    """What all estimators share: parameters, fits, checks of X and y, labels, the score.

    Each adds ``predict`` and ``_learn(X, y, sample_weight, first)``, which learns rows: the first, or more of them.
    """

    missing = "raise"
    poor_score = False  # whether it may predict badly where others do well; only scikit-learn's checks ask

    @classmethod
    def _names(cls) -> list[str]:
        """Names of the parameters in the order of the constructor."""
        every = list(signature(cls.__init__).parameters.values())[1:]
        return [p.name for p in every if p.kind is not Parameter.VAR_KEYWORD]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name.

        Parameters
        ----------
        deep : bool, default True
            Changes nothing: no parameter is an estimator.

        Returns
        -------
        dict
        """
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self: Same, **params: Any) -> Same:
        """Set parameters by name.

        Parameters
        ----------
        **params
            New values.

        Returns
        -------
        Regressor
            Itself.

        Raises
        ------
        ValueError
            If there is no such parameter.
        """
        for name, x in params.items():
            if name not in self._names():
                known = ", ".join(self._names())
                raise ValueError(f"Invalid parameter {name!r} for {type(self).__name__}; it has {known}")
            setattr(self, name, x)
        return self

    def __repr__(self) -> str:
        defaults = {name: p.default for name, p in signature(type(self).__init__).parameters.items()}
        shown = [f"{name}={x!r}" for name, x in self.get_params().items() if x is not defaults.get(name)]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn, which alone calls this, wants to know."""
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True, multi_output=True),
            regressor_tags=RegressorTags(poor_score=self.poor_score),
            input_tags=InputTags(allow_nan=self.missing == "skip"),
        )

    def fit(self: Same, X: Any, y: Any, sample_weight: Any = None) -> Same:
        """Learn the rows of X and y; an earlier fit is forgotten.

        Parameters
        ----------
        X : (n, d)
            Keys.
        y : (n,) or (n, m)
            Values.
        sample_weight : (n,), optional
            Weights >= 0; zero leaves a row out.

        Returns
        -------
        Regressor
            Itself.

        Raises
        ------
        ValueError, TypeError
            If X, y, the weights or a parameter are not as they must be, or a memory diverges; the estimator is then not
            fitted.
        """
        self._learnt(X, y, sample_weight, first=True)
        return self

    def partial_fit(self: Same, X: Any, y: Any, sample_weight: Any = None) -> Same:
        """Learn more rows with what the first ones have chosen (a ridge, a bandwidth); the first call is a ``fit``.

        Parameters
        ----------
        X, y, sample_weight
            As for ``fit``.

        Returns
        -------
        Regressor
            Itself.

        Raises
        ------
        ValueError, TypeError
            As ``fit``; a call that raises changes nothing.
        """
        self._learnt(X, y, sample_weight, first=not self.__sklearn_is_fitted__())
        return self

    def _learnt(self, X: Any, y: Any, sample_weight: Any, first: bool) -> Any:
        """What the estimator's ``_learn`` returns; first rows are learnt as a whole or leave no fit."""
        if not first:
            return self._learn(X, y, sample_weight, first)
        forget_fit(self)
        try:
            return self._learn(X, y, sample_weight, first)
        except BaseException:
            forget_fit(self)
            raise

    def _asked(self, X: Any) -> np.ndarray:
        """Rows to answer, checked against the fit."""
        if not self.__sklearn_is_fitted__():
            raise not_fitted(self)
        return self._rows(X, first=False)

    def _rows(self, X: Any, first: bool) -> np.ndarray:
        """X as an array; the first one decides how many columns there are, and their names."""
        names = column_names(X)
        x = as_table("X", X, (2,))
        check_some(x, "X")
        if first:
            self.n_features_in_ = x.shape[1]
            self.__dict__.pop("feature_names_in_", None)
            if names is not None:
                self.feature_names_in_ = names
        elif x.shape[1] != self.n_features_in_:
            kind, known = type(self).__name__, self.n_features_in_
            raise ValueError(f"X has {x.shape[1]} features, but {kind} is expecting {known} features as input")
        else:
            check_names(self, names)
        check_finite("X", x, self.missing)
        return x

    def _targets(self, y: Any, n: int, first: bool) -> np.ndarray:
        """y as ``(n, m)``."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        values = as_table("y", y, (1, 2))
        check_finite("y", values, self.missing)
        if len(values) != n:
            raise ValueError(f"X and y have inconsistent numbers of samples: X has {n} rows, y has {len(values)}")
        if first:
            self._single, self._labels = values.ndim == 1, labels_of(y)
            self.n_outputs_ = 1 if values.ndim == 1 else values.shape[1]
        values = values.reshape(n, -1)
        if values.shape[1] != self.n_outputs_:
            raise ValueError(f"y has {values.shape[1]} outputs, but the fit has {self.n_outputs_}")
        return values

    def _pairs(self, X: Any, y: Any, sample_weight: Any, first: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, targets and weights of a fit; where something is missing the weight is zero."""
        if self.missing not in ("raise", "skip"):
            raise ValueError(f"missing is {self.missing!r}; it is 'raise' or 'skip'")
        x = self._rows(X, first)
        targets = self._targets(y, len(x), first)
        dtype = np.result_type(x, targets)
        weights = check_weights(sample_weight, len(x))
        whole = np.isfinite(x).all(axis=1) & np.isfinite(targets).all(axis=1)
        return x.astype(dtype, copy=False), targets.astype(dtype, copy=False), np.where(whole, weights, 0.0)

    def _answer(self, values: np.ndarray, X: Any) -> Any:
        """Answers ``(n, m)`` in the shape of the targets of the fit, with labels."""
        return labelled(values[:, 0] if self._single else values, X, self._labels)

    def _with_std(self, values: np.ndarray, std: np.ndarray, X: Any, return_std: bool) -> Any:
        """Answers, perhaps with their standard deviations."""
        return (self._answer(values, X), self._answer(std, X)) if return_std else self._answer(values, X)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of the variance that is predicted, R^2, the mean over outputs; rows that lack something are left out.

        Parameters
        ----------
        X : (n, d)
            Queries.
        y : (n,) or (n, m)
            What was to be predicted.
        sample_weight : (n,), optional
            Weights >= 0.

        Returns
        -------
        float
            1 for a perfect prediction, 0 for that of the mean; NaN for fewer than two rows.

        Raises
        ------
        ValueError
            If there are not as many targets as predictions.
        """
        predicted, y = as_table("predictions", self.predict(X), (1, 2)), as_table("y", y, (1, 2))
        if y.size != predicted.size or len(y) != len(predicted):
            raise ValueError(f"y has shape {y.shape}, the predictions have {predicted.shape}")
        return r_squared(y, predicted, check_weights(sample_weight, len(predicted)))


def is_number(x: Any) -> bool:
    """Whether a parameter is one real number."""
    x = np.asarray(x)
    return x.ndim == 0 and x.dtype.kind in "iuf"


def check_some(x: np.ndarray, name: str) -> None:
    """A ValueError for a table without rows or columns."""
    if 0 in x.shape:
        what = "sample(s)" if x.shape[0] == 0 else "feature(s)"
        raise ValueError(f"Found array with 0 {what} (shape={x.shape}) while a minimum of 1 is required: {name}")


def check_finite(name: str, x: np.ndarray, missing: str) -> None:
    """A ValueError that names the first number that is not finite; NaN is a missing value if those are skipped."""
    bad = np.isinf(x) if missing == "skip" else ~np.isfinite(x)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"Input {name} contains NaN or infinity: it is {x[place]} at {place}")


def check_names(estimator: Any, names: np.ndarray | None) -> None:
    """Columns are called as in the fit, in the same order."""
    known = getattr(estimator, "feature_names_in_", None)
    kind = type(estimator).__name__
    if known is None and names is not None:
        warnings.warn(f"X has feature names, but {kind} was fitted without feature names", UserWarning, stacklevel=4)
    elif known is not None and names is None:
        warnings.warn(
            f"X does not have valid feature names, but {kind} was fitted with feature names", UserWarning, stacklevel=4
        )
    elif known is not None and list(known) != list(names):
        raise ValueError(
            f"The feature names should match those that were passed during fit.\n{differing(list(known), list(names))}"
        )


def differing(known: list[str], given: list[str]) -> str:
    """Which names are new, which are missing."""
    unseen, missing = sorted(set(given) - set(known)), sorted(set(known) - set(given))
    lines = ["Feature names unseen at fit time:", *(f"- {x}" for x in unseen)] if unseen else []
    lines += ["Feature names seen at fit time, yet now missing:", *(f"- {x}" for x in missing)] if missing else []
    return "\n".join(lines or ["Feature names must be in the same order as they were in fit."]) + "\n"


def check_weights(sample_weight: Any, n: int) -> np.ndarray:
    """Weights of n rows: finite and >= 0, not all zero.

    Raises
    ------
    ValueError
        Naming the first that is not.
    """
    if sample_weight is None:
        return np.ones(n)
    w = np.asarray(as_table("sample_weight", sample_weight, (0, 1)), np.float64)
    w = np.full(n, w) if w.ndim == 0 else w
    if w.shape != (n,):
        raise ValueError(f"sample_weight has shape {w.shape}; it needs ({n},)")
    bad = ~(np.isfinite(w) & (w >= 0))
    if bad.any():
        raise ValueError(f"sample_weight must be finite and >= 0; it is {w[bad][0]} at {int(np.argmax(bad))}")
    if n and not w.any():
        raise ValueError("sample_weight is zero for all rows: no row counts")
    return w


def r_squared(y: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> float:
    """Weighted R^2, the mean over outputs."""
    y, predicted = y.reshape(len(y), -1), predicted.reshape(len(predicted), -1)
    seen = np.isfinite(y).all(axis=1) & np.isfinite(predicted).all(axis=1) & (weights > 0)
    if seen.sum() < 2:
        warnings.warn("R^2 is not defined for fewer than two rows", UserWarning, stacklevel=3)
        return float("nan")
    y, predicted, w = y[seen].astype(np.float64), predicted[seen], weights[seen, None]
    residual = np.sum(w * (y - predicted) ** 2, axis=0)
    total = np.sum(w * (y - np.average(y, axis=0, weights=w[:, 0])) ** 2, axis=0)
    perfect = np.where(residual == 0, 1.0, 0.0)
    return float(np.mean(np.where(total > 0, 1 - residual / np.where(total > 0, total, 1), perfect)))


def with_intercept(x: np.ndarray, fit_intercept: bool) -> np.ndarray:
    """Rows, perhaps with a one at the end."""
    return np.concatenate([x, np.ones_like(x[:, :1])], axis=1) if fit_intercept else x


def forget_fit(estimator: Any) -> None:
    """Remove what a fit left, so that the next one makes no mixture of two."""
    for name in [name for name in vars(estimator) if name.endswith("_")]:
        delattr(estimator, name)
