"""The second choice: the class of functions that is fitted, and how one of them is read.

parameters(problem)                      where a descent starts
predict(parameters, x)                   the answer at x
gradient(parameters, keys, values, w)    of  1/2 sum_i w_i |v_i - m(k_i)|^2
exact(problem, t, w, ridge, decay)       the minimiser itself, for classes that have one
read(memory, problem, t)                 the answer to query t
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Any

import numpy as np

__all__ = [
    "RKHS",
    "ComplexLinear",
    "Constant",
    "Linear",
    "LocalPolynomial",
    "Network",
    "Prototypes",
    "Ratio",
    "Shrunk",
    "Slope",
]

Problem = Mapping[str, Any]
Map = Callable[[np.ndarray], np.ndarray]


def scalar(weights: np.ndarray) -> np.ndarray:
    """Weights of a fit that has one number per pair.

    Raises
    ------
    ValueError
        If the weights differ between entries: that is no least-squares problem in this class.
    """
    if weights.shape[1:] != (1, 1):
        raise ValueError(f"weights per entry have no exact solution, got shape {weights.shape}")
    return weights[:, 0, 0]


@dataclass(frozen=True)
class Linear:
    """m(x) = M^T phi(x): linear in the key, or in a feature map of it."""

    features: Map | None = None
    text: str = "linear"

    def map(self, x: np.ndarray) -> np.ndarray:
        """The features of keys or queries."""
        return x if self.features is None else self.features(x)

    def parameters(self, problem: Problem) -> np.ndarray:
        keys, values = self.map(problem["k"]), problem["v"]
        return np.zeros((keys.shape[-1], values.shape[-1]), np.result_type(keys, values))

    def predict(self, M: np.ndarray, x: np.ndarray) -> np.ndarray:
        return self.map(x) @ M

    def gradient(self, M: np.ndarray, keys: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        error = values - self.predict(M, keys)
        return -np.einsum("ivk,ik,iv->kv", np.broadcast_to(weights, weights.shape), self.map(keys), error)

    def exact(self, problem: Problem, t: int, weights: np.ndarray, ridge: np.ndarray, decay: float) -> np.ndarray:
        """Least squares on the rows sqrt(w_i) (k_i, v_i) and sqrt(ridge) (I, 0); minimum norm if too few."""
        root = np.sqrt(scalar(weights))[:, None]
        keys, values = self.map(problem["k"][: t + 1]), problem["v"][: t + 1]
        width = keys.shape[-1]
        prior = np.diag(np.sqrt(np.broadcast_to(ridge * decay, (width,))))
        rows = np.concatenate([root * keys, prior])
        targets = np.concatenate([root * values, np.zeros((width, values.shape[-1]))])
        return np.linalg.lstsq(rows, targets, rcond=1e-12)[0]

    def read(self, M: np.ndarray, problem: Problem, t: int) -> np.ndarray:
        return self.predict(M, problem["q"][t])

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ComplexLinear(Linear):
    """Linear in complex keys, each made of two neighbouring channels (an odd last one is real); real parts answer."""

    text: str = "linear, complex keys"

    def map(self, x: np.ndarray) -> np.ndarray:
        z = x[..., 0::2].astype(complex)
        z[..., : x.shape[-1] // 2] += 1j * x[..., 1::2]
        return z

    def predict(self, M: np.ndarray, x: np.ndarray) -> np.ndarray:
        return (self.map(x).conj() @ M).real

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Ratio(Linear):
    """Linear, its answers divided by max(|q . n|, 1), n the weighted sum of the keys (mLSTM's normaliser)."""

    text: str = "linear over max(|q.n|, 1)"

    def parameters(self, problem: Problem) -> np.ndarray:
        return np.zeros((problem["k"].shape[-1], problem["v"].shape[-1] + 1))

    def gradient(self, M: np.ndarray, keys: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return super().gradient(M, keys, np.concatenate([values, np.ones((len(values), 1))], axis=-1), weights)

    def read(self, M: np.ndarray, problem: Problem, t: int) -> np.ndarray:
        answer = self.predict(M, problem["q"][t])
        return answer[:-1] / max(abs(answer[-1]), 1.0)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class LocalPolynomial:
    """A polynomial in (k - q), fitted anew around every query; its value at the query is the answer.

    Degree 0 is a local constant: the weighted mean of the values. The ridge holds the slopes, never the constant, and
    is relative to the total weight.
    """

    degree: int = 0

    def exact(self, problem: Problem, t: int, weights: np.ndarray, ridge: np.ndarray, decay: float) -> np.ndarray:
        values = problem["v"][: t + 1]
        if self.degree == 0:
            w = weights[:, :, 0]
            total = w.sum(axis=0)
            return np.divide((w * values).sum(axis=0), total, out=np.zeros(values.shape[-1]), where=total != 0)
        w = scalar(weights)
        root = np.sqrt(w / w.sum())[:, None]
        X = self.monomials(problem["k"][: t + 1] - problem["q"][t])
        prior = np.sqrt(ridge * decay) * np.eye(X.shape[-1])[1:]
        targets = np.concatenate([root * values, np.zeros((len(prior), values.shape[-1]))])
        return np.linalg.lstsq(np.concatenate([root * X, prior]), targets, rcond=None)[0][0]

    def monomials(self, z: np.ndarray) -> np.ndarray:
        """1, z, z z^T / 2, ...: the terms of a Taylor polynomial."""
        columns = [np.ones(len(z))]
        for degree in range(1, self.degree + 1):
            for index in combinations_with_replacement(range(z.shape[-1]), degree):
                columns.append(np.prod(z[:, list(index)], axis=-1) * taylor_scale(index))
        return np.stack(columns, axis=-1)

    def read(self, answer: np.ndarray, problem: Problem, t: int) -> np.ndarray:
        return answer

    def __str__(self) -> str:
        return {0: "constant", 1: "local linear", 2: "local quadratic"}.get(self.degree, f"degree {self.degree}")


@dataclass(frozen=True)
class Constant:
    """One value for all keys, found by steps from zero."""

    def parameters(self, problem: Problem) -> np.ndarray:
        return np.zeros(problem["v"].shape[-1])

    def gradient(self, b: np.ndarray, keys: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return scalar(weights) @ (b - values)

    def read(self, b: np.ndarray, problem: Problem, t: int) -> np.ndarray:
        return b

    def __str__(self) -> str:
        return "constant"


@dataclass(frozen=True)
class Shrunk:
    """A local constant that a ridge draws to zero: where little is near, little is said."""

    def exact(self, problem: Problem, t: int, weights: np.ndarray, ridge: np.ndarray, decay: float) -> np.ndarray:
        w = scalar(weights)
        return w @ problem["v"][: t + 1] / (ridge * decay + w.sum())

    def read(self, answer: np.ndarray, problem: Problem, t: int) -> np.ndarray:
        return answer

    def __str__(self) -> str:
        return "constant"


def taylor_scale(index: tuple[int, ...]) -> float:
    """Scale of a monomial such that inner products of one degree are powers: sqrt(multiplicity) / degree!."""
    degree = len(index)
    repeats = prod(factorial(index.count(i)) for i in set(index))
    return float(np.sqrt(factorial(degree) / repeats) / factorial(degree))


@dataclass(frozen=True)
class RKHS:
    """m(x) = sum_i alpha_i kappa(k_i, x): all functions of a kernel's space.

    Parameters
    ----------
    kernel
        ``kernel(problem, x, i, y, j) -> (i, j)`` between vectors x of the steps i and y of the steps j.
    text
        How the table names it.
    """

    kernel: Callable[[Problem, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    text: str = "RKHS"

    def exact(self, problem: Problem, t: int, weights: np.ndarray, ridge: np.ndarray, decay: float) -> np.ndarray:
        """alpha = (K + ridge W^-1)^-1 V over the pairs that have weight."""
        w = scalar(weights)
        steps = np.flatnonzero(w > 0)
        keys = problem["k"][steps]
        K = self.kernel(problem, keys, steps, keys, steps)
        alpha = np.zeros((t + 1, problem["v"].shape[-1]))
        alpha[steps] = np.linalg.solve(K + np.diag(ridge * decay / w[steps]), problem["v"][steps])
        return alpha

    def read(self, alpha: np.ndarray, problem: Problem, t: int) -> np.ndarray:
        steps = np.arange(t + 1)
        query = problem["q"][t : t + 1]
        return (self.kernel(problem, query, np.array([t]), problem["k"][: t + 1], steps) @ alpha)[0]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Prototypes:
    """m slots of decayed (key, value) means, read by softmax over the slots (ABC, GSA)."""

    def parameters(self, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        slots = problem["write"].shape[-1]
        return np.zeros((slots, problem["k"].shape[-1])), np.zeros((slots, problem["v"].shape[-1]))

    def gradient(self, M: Any, keys: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Any:
        w = weights[:, 0, :]
        return tuple(-np.einsum("im,id->md", w, x - m) for x, m in ((keys, 0), (values, 0)))

    def read(self, M: Any, problem: Problem, t: int) -> np.ndarray:
        scores = M[0] @ problem["q"][t] * problem["scale"]
        share = np.exp(scores - scores.max())
        return share @ M[1] / share.sum()

    def __str__(self) -> str:
        return "constant, over prototypes"


@dataclass(frozen=True)
class Slope:
    """The local mean minus the local covariance of values and keys times a second query r (Parallax).

    With r = (Cov(k, k) + ridge)^-1 (mean(k) - q) this is the local linear fit.
    """

    def exact(self, problem: Problem, t: int, weights: np.ndarray, ridge: np.ndarray, decay: float) -> np.ndarray:
        p = scalar(weights) / weights.sum()
        keys, values = problem["k"][: t + 1], problem["v"][: t + 1]
        mean_k, mean_v = p @ keys, p @ values
        covariance = (values - mean_v).T @ (p[:, None] * (keys - mean_k))
        return mean_v - covariance @ problem["r"][t]

    def read(self, answer: np.ndarray, problem: Problem, t: int) -> np.ndarray:
        return answer

    def __str__(self) -> str:
        return "constant, corrected along r"


@dataclass(frozen=True)
class Network:
    """A memory trained by gradient descent, as ``ttr_np.memories`` builds it: its parameters are one vector."""

    memory: Callable[[Problem], Any]
    text: str = "MLP"

    def parameters(self, problem: Problem) -> np.ndarray:
        memory = self.memory(problem)
        return np.array(memory.parameters(problem["k"].shape[-1], problem["v"].shape[-1]), float)

    def read(self, M: np.ndarray, problem: Problem, t: int) -> np.ndarray:
        return self.memory(problem).predict(M, problem["q"][t : t + 1])[0]

    def __str__(self) -> str:
        return self.text
