"""Memories that learn at test time: maps m from keys to values whose parameters are the state of a layer.

    x_1 = x,    z_l = x_l W_l + b_l,    x_{l+1} = activation(z_l),    f(x) = z_depth
    m(x) = f(x),   with layer norm: LN(f(x)),   with residual: x + f(x),   with both: x + LN(f(x))

One layer is `Linear`, more are `MLP`. A memory is a description: it holds no state. Its parameters travel as one flat
vector, so that every optimizer is a few lines on vectors, and `gradient` is written by hand, layer norm included.

Training on v a memory with a residual is training LN(f(k)) on v - k: the target of TTT needs no option of its own. The
scale and offset of the layer norm are learned with the network, not at test time, as in TTT.

What is minimised is the `loss`, and what stays of the past is the `retention`: training moves a vector A, and the
weights are W = link(A), the mirror map of the retention, with gradients taken at W.

[1] Sun et al. (2024), Learning to (learn at test time), arXiv:2407.04620 (TTT-Linear, TTT-MLP)
[2] Behrouz et al. (2025), Titans, arXiv:2501.00663
[3] Behrouz et al. (2025), It's all connected (MIRAS), arXiv:2504.13173 (Moneta, Yaad, Memora)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "MLP",
    "EntropyRetention",
    "Huber",
    "L2Retention",
    "Linear",
    "LqRetention",
    "PNorm",
    "Squared",
    "Trainable",
]

LAYER_NORM_EPS = 1e-6


def norm(x: np.ndarray, order: float, axes: tuple[int, ...]) -> np.ndarray:
    """Norm of a given order over some axes, which stay with size 1; powers neither overflow nor underflow."""
    largest = np.max(np.abs(x), axis=axes, keepdims=True, initial=0)
    unit = np.where(largest > 0, largest, x.dtype.type(1))
    return largest * np.sum(np.abs(x / unit) ** order, axis=axes, keepdims=True) ** (1 / order)


@dataclass(frozen=True)
class Squared:
    """l(e) = 1/2 |e|^2, e the error m(k) - v."""

    def value(self, error: np.ndarray) -> np.ndarray:
        """Loss of every token, ``(..., t)``."""
        return np.sum(error * error, axis=-1) / 2

    def gradient(self, error: np.ndarray) -> np.ndarray:
        """Slope in the error."""
        return error


@dataclass(frozen=True)
class Huber:
    """Squared up to an error of length ``delta``, linear beyond it: an outlier pulls no harder than ``delta`` (Yaad).

    With ``coordinatewise`` each coordinate of the error has its own length.
    """

    delta: float = 1.0
    coordinatewise: bool = False

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"delta must be > 0, it is {self.delta}")

    def length(self, error: np.ndarray) -> np.ndarray:
        """What is compared with delta."""
        return np.abs(error) if self.coordinatewise else norm(error, 2, (-1,))

    def value(self, error: np.ndarray) -> np.ndarray:
        """Loss of every token, ``(..., t)``."""
        length = self.length(error)
        near = np.minimum(length, self.delta)
        return np.sum(near * (length - near / 2), axis=-1)

    def gradient(self, error: np.ndarray) -> np.ndarray:
        """Slope in the error."""
        return error * (self.delta / np.maximum(self.length(error), self.delta))


@dataclass(frozen=True)
class PNorm:
    """l(e) = sum |e|^p: the sign LMS filter for p = 1, twice `Squared` for p = 2, Moneta for p = 3."""

    p: float = 3.0

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ValueError(f"p must be >= 1, it is {self.p}")

    def value(self, error: np.ndarray) -> np.ndarray:
        """Loss of every token, ``(..., t)``."""
        return np.sum(np.abs(error) ** self.p, axis=-1)

    def gradient(self, error: np.ndarray) -> np.ndarray:
        """Slope in the error; zero at zero."""
        return self.p * np.sign(error) * np.abs(error) ** (self.p - 1)


@dataclass(frozen=True)
class L2Retention:
    """W = A: plain gradient descent."""

    def link(self, A: np.ndarray) -> np.ndarray:
        """Weights of the vector that the descent moves."""
        return A


@dataclass(frozen=True)
class LqRetention:
    """W = A / |A|_q^(q - 2) over each matrix, 0 for A = 0: q = 4 in Moneta, the identity for q = 2."""

    q: float = 4.0

    def __post_init__(self) -> None:
        if not self.q >= 1:
            raise ValueError(f"q must be >= 1, it is {self.q}")

    def link(self, A: np.ndarray) -> np.ndarray:
        """Weights ``(..., in, out)``."""
        length = norm(A, self.q, (-2, -1))
        return A / np.where(length == 0, A.dtype.type(1), length) ** (self.q - 2)


@dataclass(frozen=True)
class EntropyRetention:
    """W = total softmax(A): positive weights of a fixed sum, A their log up to a constant (Memora).

    Retention is the Kullback-Leibler divergence, descent is multiplicative:
    W_t = total softmax((1 - weight_decay) log W_{t-1} - step gradient). The sum is that of the weights of each output,
    or of the whole matrix if not ``per_output``.
    """

    total: float = 1.0
    per_output: bool = True

    def __post_init__(self) -> None:
        if not self.total > 0:
            raise ValueError(f"total must be > 0, it is {self.total}")

    def link(self, A: np.ndarray) -> np.ndarray:
        """Weights ``(..., in, out)``."""
        axes = (-2,) if self.per_output else (-2, -1)
        weights = np.exp(A - np.max(A, axis=axes, keepdims=True, initial=-np.inf))
        return weights * (self.total / np.sum(weights, axis=axes, keepdims=True))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function, which overflows nowhere."""
    return (1 + np.tanh(x / 2)) / 2


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x) with the usual tanh in place of the normal distribution, as in TTT."""
    return x * sigmoid(2 * GELU * (x + 0.044715 * x**3))


def gelu_slope(x: np.ndarray) -> np.ndarray:
    """Derivative of `gelu`."""
    s = sigmoid(2 * GELU * (x + 0.044715 * x**3))
    return s + 2 * GELU * x * s * (1 - s) * (1 + 3 * 0.044715 * x**2)


def silu_slope(x: np.ndarray) -> np.ndarray:
    """Derivative of x sigmoid(x)."""
    s = sigmoid(x)
    return s + x * s * (1 - s)


GELU = float(np.sqrt(2 / np.pi))
ACTIVATIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "gelu": (gelu, gelu_slope),
    "silu": (lambda x: x * sigmoid(x), silu_slope),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(x.dtype)),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
}


class Dense(NamedTuple):
    """One layer: ``weight (..., in, out)`` and ``bias (..., out)`` or None."""

    weight: Any
    bias: Any = None


class Slope(NamedTuple):
    """The gradient of one layer at t tokens, as the factors of inputs_t deltas_t^T.

    ``inputs (..., t, in)``: what the layer was given; ``deltas (..., t, out)``: slope of the loss in what it summed.
    """

    inputs: np.ndarray
    deltas: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """What `Linear` and `MLP` share.

    Parameters
    ----------
    bias : bool, default False (True for `MLP`)
        Whether layers have biases. A ``retention`` acts on weights; biases are always plain.
    layer_norm : bool, default False
        Normalise the output: LN(f(x)) = scale (f(x) - mean) / std + offset.
    residual : bool, default False
        Add the key to the output; values then have the size of keys.
    scale, offset : (..., v), optional
        Of the layer norm; default 1 and 0. Fixed at test time.
    loss : Squared, Huber, PNorm or an object with their two methods, default Squared()
        What is minimised, a function of the error.
    retention : L2Retention, LqRetention, EntropyRetention or an object with their method, default L2Retention()
        What stays of the past.
    initial : sequence of (weight, bias), optional
        The layers at the start, as ``unpack`` returns them: arrays ``(..., in, out)`` and ``(..., out)`` or None.
    seed : int, default 0
        Of the random start where ``initial`` is not given.
    """

    bias: bool = False
    layer_norm: bool = False
    residual: bool = False
    scale: Any = field(default=None, compare=False)
    offset: Any = field(default=None, compare=False)
    loss: Any = Squared()
    retention: Any = L2Retention()
    initial: Sequence[tuple[Any, Any]] | None = field(default=None, compare=False)
    seed: int = 0
    activation = ""  # no field: one layer has none

    def hidden_widths(self, k: int) -> tuple[int, ...]:
        """Sizes between the keys and the values."""
        raise NotImplementedError

    def widths(self, k: int, v: int) -> tuple[int, ...]:
        """Sizes of keys, hidden layers and values."""
        return (k, *self.hidden_widths(k), v)

    def parameters(self, k: int, v: int) -> np.ndarray:
        """The vector ``(..., p)`` at the start, for keys and values of given sizes.

        Raises
        ------
        ValueError
            If a residual joins sizes that differ, or if ``initial`` does not fit the sizes.
        """
        if k < 1:
            raise ValueError(f"a memory needs keys of size 1 or more, axis 'k' is {k}")
        if self.residual and k != v:
            raise ValueError(f"residual adds keys to values: axis 'k' is {k} but axis 'v' is {v}")
        layers = self.start(k, v) if self.initial is None else self.given(k, v)
        return self.pack(layers)

    def start(self, k: int, v: int) -> list[Dense]:
        """Gaussian weights of variance 1 / in, biases zero; a single layer starts from zero."""
        rng = np.random.default_rng(self.seed)
        pairs = list(pairwise(self.widths(k, v)))
        spread = float(len(pairs) > 1)
        return [
            Dense(spread * rng.standard_normal((a, b)) / np.sqrt(a), np.zeros(b) if self.bias else None)
            for a, b in pairs
        ]

    def given(self, k: int, v: int) -> list[Dense]:
        """The caller's layers, their shapes checked."""
        layers = [Dense(*(None if x is None else np.asarray(x) for x in layer)) for layer in self.initial or ()]
        shapes = list(pairwise(self.widths(k, v)))
        if len(layers) != len(shapes):
            raise ValueError(f"initial has {len(layers)} layers, the memory has {len(shapes)}")
        for i, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
            if layer.weight.shape[-2:] != shape:
                needed = f"(..., {shape[0]}, {shape[1]})"
                raise ValueError(f"initial weight {i} has shape {layer.weight.shape}, needs {needed}")
            if (layer.bias is None) == self.bias:
                raise ValueError(f"initial bias {i} is {'missing' if self.bias else 'given, but bias is False'}")
            if layer.bias is not None and layer.bias.shape[-1:] != shape[1:]:
                raise ValueError(f"initial bias {i} has shape {layer.bias.shape}, needs (..., {shape[1]})")
        return layers

    def pack(self, layers: Sequence[tuple[Any, Any]]) -> np.ndarray:
        """All numbers of the layers as one vector ``(..., p)``: weight, bias, weight, bias, ..."""
        flat = []
        for weight, bias in layers:
            flat.append(weight.reshape(weight.shape[:-2] + (prod(weight.shape[-2:]),)))
            flat += [] if bias is None else [bias]
        lead = np.broadcast_shapes(*(x.shape[:-1] for x in flat))
        return np.concatenate([np.broadcast_to(x, lead + x.shape[-1:]) for x in flat], axis=-1)

    def unpack(self, parameters: np.ndarray, k: int) -> list[Dense]:
        """The layers of a vector, for keys of size k: views, before the link of the retention."""
        layers, low = [], 0
        for a, b in pairwise(self.widths(k, self.outputs(parameters.shape[-1], k))):
            weight = parameters[..., low : low + a * b].reshape(parameters.shape[:-1] + (a, b))
            low += a * b
            layers.append(Dense(weight, parameters[..., low : low + b] if self.bias else None))
            low += b if self.bias else 0
        return layers

    def outputs(self, p: int, k: int) -> int:
        """Size of the values of a memory with p parameters.

        Raises
        ------
        ValueError
            If no size fits.
        """
        inner = (k, *self.hidden_widths(k))
        fixed = sum((a + self.bias) * b for a, b in pairwise(inner))
        v, rest = divmod(p - fixed, inner[-1] + self.bias)
        if rest or v < 0:
            raise ValueError(f"parameters has {p} numbers, which is no {type(self).__name__} for keys of size {k}")
        return v

    def weights(self, parameters: np.ndarray, k: int) -> list[Dense]:
        """The layers as they are used: weights through the link of the retention."""
        return [Dense(self.retention.link(weight), bias) for weight, bias in self.unpack(parameters, k)]

    def predict(self, parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Answers m(x).

        Parameters
        ----------
        parameters : (..., p)
        x : (..., t, k)
            Keys; all t are asked of the same parameters.

        Returns
        -------
        y : (..., t, v)
        """
        _, sums = self.forward(self.weights(parameters, x.shape[-1]), x)
        return self.finish(x, sums[-1])

    def objective(self, parameters: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Loss of every pair, ``(..., t)``; arguments as in `gradient`."""
        return self.loss.value(self.predict(parameters, k) - v)

    def gradient(self, parameters: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Gradient of the loss of each pair by itself, in the weights that ``parameters`` stand for.

        Parameters
        ----------
        parameters : (..., p)
        k : (..., t, k)
        v : (..., t, v)

        Returns
        -------
        g : (..., t, p)
        """
        slopes = self.backward(self.weights(parameters, k.shape[-1]), k, v)
        pairs = [(x[..., :, None] * delta[..., None, :], delta if self.bias else None) for x, delta in slopes]
        return self.pack(pairs)

    def forward(self, layers: Sequence[Dense], x: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What every layer is given, and what it sums."""
        inputs, sums = [x], [affine(layers[0], x)]
        for layer in layers[1:]:
            inputs.append(self.activate(sums[-1]))
            sums.append(affine(layer, inputs[-1]))
        return inputs, sums

    def backward(self, layers: Sequence[Dense], k: np.ndarray, v: np.ndarray) -> list[Slope]:
        """The gradient of every layer, first layer first."""
        inputs, sums = self.forward(layers, k)
        delta = self.loss.gradient(self.finish(k, sums[-1]) - v)
        if self.layer_norm:
            delta = layer_norm_backward(sums[-1], delta * wide(self.scale, delta) if self.scale is not None else delta)
        slopes = [Slope(inputs[-1], delta)]
        for layer, x, z in zip(layers[:0:-1], inputs[-2::-1], sums[-2::-1], strict=True):
            delta = (delta @ np.swapaxes(layer.weight, -1, -2)) * ACTIVATIONS[self.activation][1](z)
            slopes.append(Slope(x, delta))
        return slopes[::-1]

    def activate(self, z: np.ndarray) -> np.ndarray:
        """What the next layer is given."""
        return ACTIVATIONS[self.activation][0](z)

    def finish(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Answers from the keys and the sums of the last layer: layer norm, then residual."""
        if self.layer_norm:
            z = normalised(z)[0]
            z = z if self.scale is None else z * wide(self.scale, z)
            z = z if self.offset is None else z + wide(self.offset, z)
        return x + z if self.residual else z


@dataclass(frozen=True, kw_only=True)
class Linear(Trainable):
    """A matrix: m(x) = x W, from W = 0; with ``bias``, ``layer_norm`` and ``residual`` the memory of TTT-Linear.

    Parameters
    ----------
    bias, layer_norm, residual, scale, offset, loss, retention, initial, seed
        By keyword: see ``ttr_np.memories.Trainable``.

    Examples
    --------
    >>> import ttr_np
    >>> ttr_np.Linear().parameters(k=2, v=3).shape
    (6,)
    """

    def hidden_widths(self, k: int) -> tuple[int, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class MLP(Trainable):
    """A network with ``depth`` layers: the memory of TTT-MLP, Titans and MIRAS.

    Parameters
    ----------
    hidden : int, optional
        Size of the hidden layers; default: four times that of the keys.
    depth : int, default 2
        Layers, the last one included; 1 has none hidden.
    activation : {"gelu", "silu", "relu", "tanh"}, default "gelu"
        Between the layers; gelu in its tanh form.
    bias, layer_norm, residual, scale, offset, loss, retention, initial, seed
        By keyword: see ``ttr_np.memories.Trainable``.

    Raises
    ------
    ValueError
        If a size is below 1, or the activation unknown.

    Examples
    --------
    >>> import ttr_np
    >>> ttr_np.MLP(8, bias=False).parameters(k=2, v=3).shape
    (40,)
    """

    hidden: int | None = None
    depth: int = 2
    activation: str = "gelu"
    bias: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden must be >= 1, it is {self.hidden}")
        if self.depth < 1:
            raise ValueError(f"depth must be >= 1, it is {self.depth}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; there are {', '.join(ACTIVATIONS)}")

    def hidden_widths(self, k: int) -> tuple[int, ...]:
        """``depth - 1`` times the same size."""
        return (4 * k if self.hidden is None else self.hidden,) * (self.depth - 1)


def affine(layer: Dense, x: np.ndarray) -> np.ndarray:
    """x W + b for tokens ``x (..., t, in)``."""
    z = x @ layer.weight
    return z if layer.bias is None else z + layer.bias[..., None, :]


def wide(x: Any, like: np.ndarray) -> np.ndarray:
    """A fixed array ``(..., v)`` beside tokens ``(..., t, v)``, in their dtype."""
    return np.asarray(x, like.dtype)[..., None, :]


def normalised(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with mean 0 and variance 1, and the standard deviations they had."""
    centred = z - np.mean(z, axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + LAYER_NORM_EPS)
    return centred / deviation, deviation


def layer_norm_backward(z: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Slope in z from the slope in the normalised z: its mean and its part along the normalised z change nothing."""
    unit, deviation = normalised(z)
    along = np.mean(slope * unit, axis=-1, keepdims=True)
    return (slope - np.mean(slope, axis=-1, keepdims=True) - unit * along) / deviation
