"""The first choice: how much each pair counts at each step.

``weights(problem, t)`` gives gamma_i(t) for the pairs i <= t, shape ``(t + 1, 1 | v, 1 | k)``: one number per pair, or
one per pair and entry of a linear memory (a gate per channel is a weight per entry). Weights multiply: ``decaying *
window``. A problem is a dict of arrays of one sequence under their names in the notation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Convolution",
    "CosinePosition",
    "Decaying",
    "DotProduct",
    "Fading",
    "Kernel",
    "Levels",
    "Product",
    "Rotating",
    "Selective",
    "Sparse",
    "StickBreaking",
    "Transported",
    "Trapezoid",
    "Turning",
    "Uniform",
    "Weighted",
    "Weights",
    "Window",
    "WithBonus",
    "sums_after",
]

Problem = Mapping[str, Any]


def sums_after(gate: np.ndarray, t: int) -> np.ndarray:
    """Sum of a gate over the steps after i up to t, for every i <= t; no difference is formed."""
    return np.stack([gate[i + 1 : t + 1].sum(axis=0) for i in range(t + 1)])


def per_entry(x: np.ndarray, axis: str) -> np.ndarray:
    """Weights with all three axes; a channel axis, if there is one, is that of the keys or of the values."""
    if x.ndim == 1:
        return x[:, None, None]
    return x[:, None, :] if axis == "k" else x[:, :, None]


class Weights:
    """What all weights share: they multiply."""

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        raise NotImplementedError

    def __mul__(self, other: Weights) -> Product:
        return Product((self, other))


@dataclass(frozen=True)
class Product(Weights):
    """The product of several weights."""

    factors: tuple[Weights, ...]

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        product = self.factors[0](problem, t)
        for factor in self.factors[1:]:
            product = product * factor(problem, t)
        return product

    def __str__(self) -> str:
        return " x ".join(map(str, self.factors))


@dataclass(frozen=True)
class Uniform(Weights):
    """Every pair counts one."""

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        return np.ones((t + 1, 1, 1))

    def __str__(self) -> str:
        return "uniform"


@dataclass(frozen=True)
class Decaying(Weights):
    """Geometric in time: the product of the decays since the pair was stored.

    Parameters
    ----------
    gate
        Name of the log decay; one number per step, or one per step and channel.
    axis
        Whose channels they are: ``k`` or ``v``.
    """

    gate: str = "log_decay"
    axis: str = "k"

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        return per_entry(np.exp(sums_after(problem[self.gate], t)), self.axis)

    def __str__(self) -> str:
        return "decaying" if self.axis == "k" else "decaying per value channel"


@dataclass(frozen=True)
class WithBonus(Weights):
    """Decays up to the step before; the current pair has a weight of its own in each channel (RWKV).

    Parameters
    ----------
    function
        From the bonus to that weight.
    axis
        Whose channels they are: ``k`` or ``v``.
    """

    function: Callable[[np.ndarray], np.ndarray] = lambda x: x
    axis: str = "k"

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        own = self.function(problem["bonus"])[None]
        gate = problem["log_decay"] if problem["log_decay"].ndim == 2 else problem["log_decay"][:, None]
        past = np.exp(sums_after(gate, t - 1)) if t else np.zeros((0, 1))
        return per_entry(np.concatenate([np.broadcast_to(past, (t, own.shape[-1])), own]), self.axis)

    def __str__(self) -> str:
        return "decaying, bonus for the newest"


@dataclass(frozen=True)
class Weighted(Weights):
    """Each pair has a weight of its own: an input gate.

    Parameters
    ----------
    gate
        Name of the gate.
    function
        From the gate to the weight; default: the gate itself.
    axis
        Whose channels a gate with channels has.
    text
        How the table names it.
    """

    gate: str
    function: Callable[[np.ndarray], np.ndarray] = lambda x: x
    axis: str = "v"
    text: str = "input gate"

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        return per_entry(self.function(problem[self.gate][: t + 1]), self.axis)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Window(Weights):
    """The newest pairs count one, and so do the very first ones; all others nothing."""

    size: int | str = "window"
    sinks: int | str = 0

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        size, sinks = (problem[x] if isinstance(x, str) else x for x in (self.size, self.sinks))
        i = np.arange(t + 1)
        return ((i > t - size) | (i < sinks)).astype(float)[:, None, None]

    def __str__(self) -> str:
        return "window with sinks" if self.sinks else "window"


@dataclass(frozen=True)
class Kernel(Weights):
    """A kernel of query and key: near keys count more.

    Parameters
    ----------
    function
        ``function(q, keys, problem) -> (t + 1,)``.
    text
        How the table names it.
    """

    function: Callable[[np.ndarray, np.ndarray, Problem], np.ndarray]
    text: str

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        return self.function(problem["q"][t], problem["k"][: t + 1], problem)[:, None, None]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class DotProduct(Weights):
    """The inner product of feature maps of query and key; a kernel if the map says so."""

    features: Callable[[np.ndarray], np.ndarray] = lambda x: x
    text: str = "kernel q.k"

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        return (self.features(problem["k"][: t + 1]) @ self.features(problem["q"][t]))[:, None, None]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class CosinePosition(Weights):
    """The cosine of the distance in time, a quarter turn at ``length`` (cosFormer)."""

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        age = t - np.arange(t + 1)
        return np.cos(np.pi / 2 * age / problem["length"])[:, None, None]

    def __str__(self) -> str:
        return "cosine of distance"


@dataclass(frozen=True)
class Rotating(Weights):
    """The cosine of the angle turned since, per channel: the real part of a complex decay."""

    axis: str = "k"

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        return per_entry(np.cos(sums_after(problem["phase"], t)), self.axis)

    def __str__(self) -> str:
        return "rotating"


@dataclass(frozen=True)
class Turning(Weights):
    """The angle turned back since, exp(-i angle), per complex key channel (Mamba-3)."""

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        return per_entry(np.exp(-1j * sums_after(problem["phase"], t)), "k")

    def __str__(self) -> str:
        return "rotating"


@dataclass(frozen=True)
class Trapezoid(Weights):
    """A pair counts a share of its own step length, and the rest of the next one as soon as that is known (Mamba-3).

    Equal shares are the trapezoidal rule; all of the own step is Mamba-2.
    """

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        delta, mix = problem["delta"][: t + 1], problem["mix"][: t + 1]
        return per_entry(mix * delta + np.append(((1 - mix) * delta)[1:], 0.0), "k")

    def __str__(self) -> str:
        return "trapezoid"


@dataclass(frozen=True)
class Convolution(Weights):
    """Fixed weights of age and value channel: a long convolution.

    Parameters
    ----------
    kernel
        ``kernel(problem, ages) -> (ages, v)``.
    """

    kernel: Callable[[Problem, np.ndarray], np.ndarray]

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        return self.kernel(problem, np.arange(t, -1, -1))[:, :, None]

    def __str__(self) -> str:
        return "fixed, by age and channel"


@dataclass(frozen=True)
class Selective(Weights):
    """One decay per entry of the memory, exp(delta_v A_vn), and the step length as input gate (Mamba-1)."""

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        elapsed = sums_after(problem["delta"], t)[:, :, None]
        return problem["delta"][: t + 1, :, None] * np.exp(elapsed * problem["A"])

    def __str__(self) -> str:
        return "decaying per entry x input gate"


@dataclass(frozen=True)
class Levels(Weights):
    """Piecewise constant in dyadic age: one weight per Fenwick bucket, chosen at every step (log-linear attention)."""

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        weights = problem["levels"][t]
        return weights[[min(self.level(t, i), len(weights) - 1) for i in range(t + 1)]][:, None, None]

    @staticmethod
    def level(t: int, i: int) -> int:
        """0 for the pair itself; else peel lowest set bits off t until the bucket holds i."""
        if i == t:
            return 0
        end = t
        while True:
            low = end & -end
            if i >= end - low:
                return low.bit_length()
            end -= low

    def __str__(self) -> str:
        return "by dyadic age"


@dataclass(frozen=True)
class Sparse(Weights):
    """Entmax of the scores: exact zeros for far keys, a bandwidth that adapts to the data."""

    alpha: float

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        scores = (self.alpha - 1) * problem["scale"] * (problem["k"][: t + 1] @ problem["q"][t])
        low, high = scores.max() - 1.0, scores.max()
        for _ in range(200):
            middle = (low + high) / 2
            mass = np.sum(np.maximum(scores - middle, 0) ** (1 / (self.alpha - 1)))
            low, high = (middle, high) if mass >= 1 else (low, middle)
        return (np.maximum(scores - (low + high) / 2, 0) ** (1 / (self.alpha - 1)))[:, None, None]

    def __str__(self) -> str:
        return f"kernel: entmax {self.alpha:g}"


@dataclass(frozen=True)
class StickBreaking(Weights):
    """From the newest pair to the oldest, each takes its share of what is left; a query's own pair takes none."""

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        share = 1 / (1 + np.exp(-problem["scale"] * (problem["k"][:t] @ problem["q"][t])))
        left = np.append(np.cumprod(1 - share[::-1])[::-1], 1.0)[1:]
        return np.append(share * left, 0.0)[:, None, None]

    def __str__(self) -> str:
        return "kernel sigmoid(q.k), stick-breaking"


@dataclass(frozen=True)
class Fading(Weights):
    """exp(scale q . k) with every channel of the key decayed since it was stored (wall attention)."""

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        keys = np.exp(sums_after(problem["log_decay"], t)) * problem["k"][: t + 1]
        return exponential_of(problem["scale"] * (keys @ problem["q"][t]))

    def __str__(self) -> str:
        return "kernel exp(q.Dk)"


def exponential_of(scores: np.ndarray) -> np.ndarray:
    """exp of the scores of all pairs, up to a factor that they share."""
    return np.exp(scores - scores.max())[:, None, None]


@dataclass(frozen=True)
class Transported(Weights):
    """exp(scale q . k) with the key carried from its step to the query's by Householder factors (PaTH)."""

    def __call__(self, problem: Problem, t: int) -> np.ndarray:
        scores = []
        for i in range(t + 1):
            key = problem["k"][i]
            for s in range(i + 1, t + 1):
                w = problem["w"][s]
                key = key - problem["beta"][s] * w * (w @ key)
            scores.append(problem["scale"] * (problem["q"][t] @ key))
        return exponential_of(np.array(scores))

    def __str__(self) -> str:
        return "kernel exp(q.Pk)"
