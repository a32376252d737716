"""The third choice: how, and how far, the fit is carried.

``optimizer.fit(regressor, weights, problem, t)`` returns the memory that has seen the pairs 0 to t, from
scratch. Nothing is carried from one t to the next: this is the definition, not an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Corrected",
    "Exact",
    "GradientDescent",
    "Oja",
    "Omega",
    "Online",
    "Projection",
    "TestTimeTraining",
    "flow_step",
    "implicit_step",
    "normalized_step",
]

Problem = Mapping[str, Any]


@dataclass(frozen=True)
class GradientDescent:
    """Full-batch steps on all weighted pairs, from the start of the class (zero, for a linear memory).

    One step of size 1 from zero is linear attention: the Gram matrix of the keys taken as the identity.
    """

    steps: int = 1
    step_size: float = 1.0

    def fit(self, regressor: Any, weights: Any, problem: Problem, t: int) -> Any:
        gamma, M = weights(problem, t), regressor.parameters(problem)
        keys, values = problem["k"][: t + 1], problem["v"][: t + 1]
        for _ in range(self.steps):
            gradient = regressor.gradient(M, keys, values, gamma)
            if isinstance(M, tuple):
                M = tuple(x - self.step_size * g for x, g in zip(M, gradient, strict=True))
            else:
                M = M - self.step_size * gradient
        return M

    def __str__(self) -> str:
        return "one step" if self.steps == 1 else f"{self.steps} full-batch steps"


@dataclass(frozen=True)
class Exact:
    """The minimiser itself.

    Parameters
    ----------
    ridge
        Number, name in the problem, or function of (problem, weights, t). Zero gives the minimum-norm solution.
    decaying
        Whether the ridge decays with the data, as in recursive least squares.
    """

    ridge: float | str | Callable[..., Any] = 0.0
    decaying: bool = False

    def fit(self, regressor: Any, weights: Any, problem: Problem, t: int) -> Any:
        gamma = weights(problem, t)
        ridge = self.ridge
        if callable(ridge):
            ridge = ridge(problem, gamma, t)
        ridge = np.asarray(problem[ridge] if isinstance(ridge, str) else ridge, float)
        decay = np.exp(np.sum(problem["log_decay"][: t + 1])) if self.decaying else 1.0
        return regressor.exact(problem, t, gamma, ridge, decay)

    def __str__(self) -> str:
        return "exact" if self.ridge == 0.0 else "exact, decaying ridge" if self.decaying else "exact, ridge"


@dataclass(frozen=True)
class Corrected:
    """The minimiser itself, for values from which what the pairs before recall is taken off one by one (DeltaFormer).

    u_t = v_t - beta_t m(erase_key_t), with m fitted to the pairs (k_i, u_i), i < t
    """

    def fit(self, regressor: Any, weights: Any, problem: Problem, t: int) -> Any:
        values = problem["v"].copy()
        asked = {**problem, "q": problem["erase_key"][1:], "v": values}  # the pairs up to i are asked what i + 1 erases
        for i in range(t):
            known = regressor.read(regressor.exact(asked, i, weights(asked, i), 0.0, 1.0), asked, i)
            values[i + 1] -= problem["beta"][i + 1] * known
        asked = {**problem, "v": values}
        return regressor.exact(asked, t, weights(asked, t), 0.0, 1.0)

    def __str__(self) -> str:
        return "exact, on corrected values"


def constant_step(problem: Problem, i: int) -> Any:
    """The step size as it is given."""
    return problem["beta"][i]


def normalized_step(problem: Problem, i: int) -> Any:
    """beta / (eps + |k|^2): the same share of the error is corrected whatever the key's length (NLMS)."""
    return problem["beta"][i] / (problem["eps"] + problem["k"][i] @ problem["k"][i])


def implicit_step(problem: Problem, i: int) -> Any:
    """beta / (1 + beta |k|^2): the gradient taken where the step ends (Longhorn)."""
    return problem["beta"][i] / (1 + problem["beta"][i] * (problem["k"][i] @ problem["k"][i]))


def flow_step(problem: Problem, i: int) -> Any:
    """(1 - exp(-beta |k|^2)) / |k|^2: the gradient flow followed for a time beta (EFLA)."""
    square = problem["k"][i] @ problem["k"][i]
    return -np.expm1(-problem["beta"][i] * square) / square if square else problem["beta"][i]


@dataclass(frozen=True)
class Online:
    """Gradient descent on a linear memory, pair after pair.

        M' = decay M,    M = M' + step * write (v - read^T M)^T        (several times, if asked)

    Parameters
    ----------
    step
        ``step(problem, i)``: the step size, adaptive if it looks at the pair.
    decay
        Name of the log weight decay, or None.
    read, write, value
        ``f(problem, i)``: the key whose recall is corrected, the direction of the correction (a preconditioned key),
        and the target; default: the key, the key, the value.
    undecayed
        Whether the recall is read before the decay.
    stored
        Key under which the value is stored; default: the direction of the correction.
    steps
        Updates per token: a number, or a name in the problem. Pairs then follow each other in k and v.
    text
        How the table names it.
    """

    step: Callable[[Problem, int], Any] = constant_step
    decay: str | None = None
    read: Callable[[Problem, int], np.ndarray] = lambda problem, i: problem["k"][i]
    write: Callable[[Problem, int], np.ndarray] = lambda problem, i: problem["k"][i]
    value: Callable[[Problem, int], np.ndarray] = lambda problem, i: problem["v"][i]
    undecayed: bool = False
    stored: Callable[[Problem, int], np.ndarray] | None = None
    steps: int | str = 1
    text: str = "online"

    def fit(self, regressor: Any, weights: Any, problem: Problem, t: int) -> Any:
        steps = problem[self.steps] if isinstance(self.steps, str) else self.steps
        M = regressor.parameters(problem)
        for token in range(t + 1):
            old = M
            if self.decay is not None:
                M = np.exp(np.atleast_1d(problem[self.decay][token]))[:, None] * M
            for i in range(steps * token, steps * (token + 1)):
                recalled = regressor.map(self.read(problem, i)) @ (old if self.undecayed else M)
                write = regressor.map(self.write(problem, i))
                store = write if self.stored is None else regressor.map(self.stored(problem, i))
                change = np.outer(store, self.value(problem, i)) - np.outer(write, recalled)
                M = M + self.step(problem, i) * change
        return M

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Oja:
    """Gradient descent from values back to keys, pair after pair; the memory is read the other way (Oja's rule).

    M' = M decay per value channel,    M = M' + beta (k - M' v) v^T
    """

    def fit(self, regressor: Any, weights: Any, problem: Problem, t: int) -> Any:
        M = regressor.parameters(problem)
        for i in range(t + 1):
            M = M * np.exp(problem["log_decay"][i])
            error = problem["k"][i] - M @ problem["v"][i]
            M = M + problem["beta"][i] * np.outer(error, problem["v"][i])
        return M

    def __str__(self) -> str:
        return "online, from values to keys"


@dataclass(frozen=True)
class Projection:
    """The smallest change that corrects a share of the errors on the newest pairs (affine projection)."""

    order: str = "order"

    def fit(self, regressor: Any, weights: Any, problem: Problem, t: int) -> Any:
        M = regressor.parameters(problem)
        for i in range(t + 1):
            newest = slice(max(0, i + 1 - problem[self.order]), i + 1)
            K, error = problem["k"][newest], problem["v"][newest] - problem["k"][newest] @ M
            M = M + problem["beta"][i] * K.T @ np.linalg.solve(K @ K.T + problem["ridge"] * np.eye(len(K)), error)
        return M

    def __str__(self) -> str:
        return "online, projection on the newest pairs"


@dataclass(frozen=True)
class Omega:
    """Gradient steps on the newest pairs together, with momentum; the step perhaps made orthogonal (Atlas).

    S = momentum S + sum of gradients over the window,    M = decay M - step * (S or its orthogonal factor)
    """

    orthogonal: bool = False

    def fit(self, regressor: Any, weights: Any, problem: Problem, t: int) -> Any:
        M = regressor.parameters(problem)
        S = np.zeros_like(M)
        for i in range(t + 1):
            newest = slice(max(0, i + 1 - problem["window"]), i + 1)
            keys, values = problem["k"][newest], problem["v"][newest]
            S = problem["momentum"][i] * S + regressor.gradient(M, keys, values, np.ones((len(keys), 1, 1)))
            step = newton_schulz(S) if self.orthogonal else S
            M = np.exp(problem["log_decay"][i]) * M - problem["beta"][i] * step
        return M

    def __str__(self) -> str:
        return "online, windowed loss" + (", momentum made orthogonal" if self.orthogonal else "")


def newton_schulz(S: np.ndarray, steps: int = 5) -> np.ndarray:
    """Push all singular values of a matrix towards 1 with the quintic iteration that Atlas takes over from Muon."""
    norm = np.linalg.norm(S)
    X = S / norm if norm else S
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X - 4.775 * (A @ X) + 2.0315 * (A @ (A @ X))
    return X


@dataclass(frozen=True)
class TestTimeTraining:
    """Mini-batch gradient descent on any memory: gradients are taken where the mini-batch began.

    S = momentum S - step grad(anchor),    M = (1 - weight_decay) M + S
    """

    __test__ = False  # pytest would collect a name that starts with Test
    text: str = "mini-batches"

    def fit(self, regressor: Any, weights: Any, problem: Problem, t: int) -> Any:
        memory, M = regressor.memory(problem), regressor.parameters(problem)
        momentum, anchor = np.zeros_like(M), M
        share, shrink = problem.get("momentum", np.zeros(t + 1)), problem.get("weight_decay", np.zeros(t + 1))
        for i in range(t + 1):
            if i % problem["batch_size"] == 0:
                anchor = M
            gradient = memory.gradient(anchor, problem["k"][i : i + 1], problem["v"][i : i + 1])
            momentum = share[i] * momentum - problem["step_size"][i] * np.reshape(gradient, M.shape)
            M = (1 - shrink[i]) * M + momentum
        return M

    def __str__(self) -> str:
        return self.text
