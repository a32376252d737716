"""Feature maps and other small functions that a layer applies before its memory.

    phi(q) . phi(k) = kernel(q, k)

turns linear regression on features into nonlinear regression with that kernel. Every function acts on the last axis
and is pure: float dtype in = dtype out (integers become float64), 16-bit floats are computed in float32, and large
inputs saturate without warnings.

[1] Katharopoulos et al. (2020), Transformers are RNNs, arXiv:2006.16236
[2] Choromanski et al. (2021), Rethinking attention with Performers, arXiv:2009.14794
[3] Peng et al. (2021), Random feature attention, arXiv:2103.02143
[4] Qin et al. (2022), cosFormer, arXiv:2202.08791
[5] Schlag et al. (2021), Linear transformers are secretly fast weight programmers, arXiv:2102.11174
[6] Arora et al. (2024), Simple linear attention language models (Based), arXiv:2402.18668
[7] Aksenov et al. (2024), Linear transformers with learnable kernel functions (ReBased), arXiv:2402.10644
[8] Zhang et al. (2024), The hedgehog and the porcupine, arXiv:2402.04347
[9] Gelada et al. (2025), Scaling context requires rethinking attention, arXiv:2507.04239
[10] Su et al. (2021), RoFormer, arXiv:2104.09864
[11] Press et al. (2021), Train short, test long (ALiBi), arXiv:2108.12409
[12] Sun et al. (2023), Retentive network, arXiv:2307.08621
[13] Qin et al. (2024), Lightning attention-2, arXiv:2401.04658
[14] Kacham et al. (2023), PolySketchFormer, arXiv:2310.01655
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement
from math import comb, factorial
from typing import Any

import numpy as np

__all__ = [
    "alibi_slopes",
    "cosformer_features",
    "dpfp",
    "elu_plus_one",
    "favor_features",
    "gelu",
    "hedgehog_features",
    "layer_norm",
    "lightning_decays",
    "log_sigmoid",
    "normalize_l2",
    "orthogonal_gaussian",
    "polynomial_sketch",
    "random_fourier_features",
    "rebased_features",
    "relu",
    "retention_decays",
    "rms_norm",
    "rotary",
    "shift",
    "sigmoid",
    "silu",
    "softplus",
    "symmetric_power",
    "taylor_features",
]


def wide(x: Any) -> tuple[np.ndarray, np.dtype]:
    """x in a dtype fit for sums, and the dtype its caller expects back."""
    x = np.asarray(x)
    if x.dtype.kind in "iub":
        x = x.astype(np.float64)
    return x.astype(np.result_type(x.dtype, np.float32), copy=False), x.dtype


def narrow(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x in the caller's dtype; what a 16-bit float cannot hold becomes inf."""
    with np.errstate(over="ignore"):
        return x.astype(dtype, copy=False)


def relu(x: Any) -> np.ndarray:
    """Positive part, max(x, 0).

    Parameters
    ----------
    x : (...)

    Returns
    -------
    y : (...)

    Examples
    --------
    >>> from ttr_np.features import relu
    >>> relu([-1.0, 2.0])
    array([0., 2.])
    """
    x, dtype = wide(x)
    return narrow(np.maximum(x, 0), dtype)


def elu_plus_one(x: Any) -> np.ndarray:
    """Positive feature map of linear attention [1]: x + 1 above zero, exp(x) below.

    Parameters
    ----------
    x : (..., k)

    Returns
    -------
    phi : (..., k)

    Examples
    --------
    >>> from ttr_np.features import elu_plus_one
    >>> elu_plus_one([-1.0, 0.0, 2.0]).round(2)
    array([0.37, 1.  , 3.  ])
    """
    x, dtype = wide(x)
    return narrow(np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))), dtype)


def sigmoid(x: Any) -> np.ndarray:
    """1 / (1 + exp(-x)), with full relative precision at both ends.

    Parameters
    ----------
    x : (...)

    Returns
    -------
    y : (...)
        In [0, 1].

    Examples
    --------
    >>> from ttr_np.features import sigmoid
    >>> sigmoid([-100.0, 0.0])
    array([3.72007598e-44, 5.00000000e-01])
    """
    x, dtype = wide(x)
    small = np.exp(-np.abs(x))
    return narrow(np.where(x >= 0, x.dtype.type(1), small) / (1 + small), dtype)


def softplus(x: Any) -> np.ndarray:
    """log(1 + exp(x)).

    Parameters
    ----------
    x : (...)

    Returns
    -------
    y : (...)
        Not below 0.

    Examples
    --------
    >>> from ttr_np.features import softplus
    >>> softplus([-1.0, 100.0]).round(2)
    array([  0.31, 100.  ])
    """
    x, dtype = wide(x)
    return narrow(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), dtype)


def log_sigmoid(x: Any) -> np.ndarray:
    """log of the sigmoid: a gate, ready to be a ``log_decay``.

    Parameters
    ----------
    x : (...)

    Returns
    -------
    y : (...)
        Not above 0.

    Examples
    --------
    >>> from ttr_np.features import log_sigmoid
    >>> log_sigmoid([-100.0, 0.0]).round(2)
    array([-100.  ,   -0.69])
    """
    x, dtype = wide(x)
    return narrow(np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))), dtype)


def silu(x: Any) -> np.ndarray:
    """x sigmoid(x), also called swish (Elfwing et al., arXiv:1702.03118).

    Parameters
    ----------
    x : (...)

    Returns
    -------
    y : (...)

    Examples
    --------
    >>> from ttr_np.features import silu
    >>> silu([-1.0, 2.0]).round(2)
    array([-0.27,  1.76])
    """
    x, dtype = wide(x)
    return narrow(x * sigmoid(x), dtype)


def gelu(x: Any) -> np.ndarray:
    """Gaussian error linear unit in its tanh form (Hendrycks and Gimpel, arXiv:1606.08415).

    x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), within 5e-4 of x times the normal distribution function.

    Parameters
    ----------
    x : (...)

    Returns
    -------
    y : (...)

    Examples
    --------
    >>> from ttr_np.features import gelu
    >>> gelu([-1.0, 2.0]).round(2)
    array([-0.16,  1.95])
    """
    x, dtype = wide(x)
    z = np.clip(x, -40, 40)  # beyond, the sigmoid is 0 or 1 to the last bit and x^3 could overflow
    return narrow(x * sigmoid(1.5957691216057308 * (z + 0.044715 * z**3)), dtype)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) over its sum along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def below_one(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x divided by its largest entry where that exceeds one, and the divisor: squares of the result cannot overflow."""
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True, initial=1), 1)
    return x / scale, scale


def normalize_l2(x: Any, eps: float = 1e-6) -> np.ndarray:
    """x / max(|x|, eps): unit length, and zero stays zero.

    Parameters
    ----------
    x : (..., k)
    eps : float, default 1e-6
        Shorter vectors are divided by this instead of their length.

    Returns
    -------
    y : (..., k)

    Examples
    --------
    >>> from ttr_np.features import normalize_l2
    >>> normalize_l2([[3.0, 4.0], [0.0, 0.0]])
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    x, dtype = wide(x)
    y, scale = below_one(x)
    length = np.sqrt(np.sum(y * y, axis=-1, keepdims=True))
    return narrow(y / np.maximum(length, eps / scale), dtype)


def rms_norm(x: Any, weight: Any = None, eps: float = 1e-6) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps), times ``weight`` (Zhang and Sennrich, arXiv:1910.07467).

    Parameters
    ----------
    x : (..., d)
    weight : (d,), optional
        Default: ones.
    eps : float, default 1e-6
        Keeps a zero vector at zero.

    Returns
    -------
    y : (..., d)

    Examples
    --------
    >>> from ttr_np.features import rms_norm
    >>> rms_norm([1.0, -1.0, 2.0, -2.0]).round(2)
    array([ 0.63, -0.63,  1.26, -1.26])
    """
    x, dtype = wide(x)
    y, scale = below_one(x)
    y = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + eps / scale / scale)
    return narrow(y if weight is None else y * np.asarray(weight), dtype)


def layer_norm(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-6) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps), times ``weight``, plus ``bias`` (Ba et al., arXiv:1607.06450).

    Parameters
    ----------
    x : (..., d)
    weight, bias : (d,), optional
        Default: ones and zeros.
    eps : float, default 1e-6
        Keeps a constant vector at zero.

    Returns
    -------
    y : (..., d)

    Examples
    --------
    >>> from ttr_np.features import layer_norm
    >>> layer_norm([1.0, 2.0, 3.0]).round(2)
    array([-1.22,  0.  ,  1.22])
    """
    x, dtype = wide(x)
    y = rms_norm(x - x.mean(axis=-1, keepdims=True), weight, eps)
    return narrow(y if bias is None else y + np.asarray(bias), dtype)


def orthogonal_gaussian(features: int, size: int, seed: Any = 0) -> np.ndarray:
    """Random directions, Gaussian each, orthogonal in blocks of ``size`` [2].

    Orthogonal rows spread more evenly than independent ones; their lengths are drawn as those of Gaussian vectors.

    Parameters
    ----------
    features, size : int
        Number of rows and columns.
    seed : int or numpy.random.Generator, default 0
        Of the draw.

    Returns
    -------
    W : (features, size)

    Examples
    --------
    >>> import numpy as np
    >>> from ttr_np.features import orthogonal_gaussian
    >>> W = orthogonal_gaussian(2, 2)
    >>> bool(np.isclose(W[0] @ W[1], 0))
    True
    """
    rng = np.random.default_rng(seed)
    blocks = -(-features // max(size, 1))
    q, r = np.linalg.qr(rng.standard_normal((blocks, size, size)))
    q *= np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1)[:, None, :]  # without it q is not uniform
    lengths = np.sqrt(rng.chisquare(size, (features, 1)))
    return lengths * np.swapaxes(q, -1, -2).reshape(-1, size)[:features]


def favor_features(x: Any, W: Any = None, *, features: int = 256, seed: Any = 0, rescale: bool = False) -> np.ndarray:
    """Positive random features of the softmax kernel, FAVOR+ [2]: E[phi(q) . phi(k)] = exp(q . k / sqrt(d)).

        phi(x) = exp(W z - |z|^2 / 2) / sqrt(m),    z = x / d^(1/4)

    Parameters
    ----------
    x : (..., d)
    W : (m, d), optional
        Random directions, the same for queries and keys; default: ``orthogonal_gaussian(features, d, seed)``.
    features, seed : int, default 256 and 0
        For the default. A Generator moves on at every call: draw ``W`` once if queries and keys are mapped apart.
    rescale : bool, default False
        Divide each row by its largest entry, so that long vectors do not underflow. Right for the queries of a
        normalised layer, where a factor per query cancels.

    Returns
    -------
    phi : (..., m)

    Examples
    --------
    >>> import numpy as np
    >>> from ttr_np.features import favor_features
    >>> q = k = np.array([1.0, 0.0])
    >>> phi = favor_features([q, k], features=4096)
    >>> float((phi[0] @ phi[1]).round(1)), float(np.exp(q @ k / np.sqrt(2)).round(1))
    (2.0, 2.0)
    """
    x, dtype = wide(x)
    d = x.shape[-1]
    W = np.asarray(orthogonal_gaussian(features, d, seed) if W is None else W, x.dtype)
    z = x / x.dtype.type(d**0.25)
    exponent = z @ W.T - 0.5 * np.sum(z * z, axis=-1, keepdims=True)
    if rescale:
        exponent = exponent - exponent.max(axis=-1, keepdims=True)
    return narrow(np.exp(exponent) / x.dtype.type(len(W) ** 0.5), dtype)


def random_fourier_features(x: Any, W: Any = None, *, features: int = 256, seed: Any = 0) -> np.ndarray:
    """Random features of the Gaussian kernel, as in RFA [3]: E[phi(q) . phi(k)] = exp(-|q - k|^2 / 2).

        phi(x) = [sin(W x), cos(W x)] / sqrt(m)

    Parameters
    ----------
    x : (..., d)
        Divide by the bandwidth first for another width.
    W : (m, d), optional
        Random directions, the same for queries and keys; default: ``orthogonal_gaussian(features, d, seed)``.
    features, seed : int, default 256 and 0
        For the default.

    Returns
    -------
    phi : (..., 2 m)

    Examples
    --------
    >>> import numpy as np
    >>> from ttr_np.features import random_fourier_features
    >>> phi = random_fourier_features([[0.0, 0.0], [1.0, 0.0]], features=4096)
    >>> float((phi[0] @ phi[1]).round(1)), float(np.exp(-0.5).round(1))
    (0.6, 0.6)
    """
    x, dtype = wide(x)
    W = np.asarray(orthogonal_gaussian(features, x.shape[-1], seed) if W is None else W, x.dtype)
    angle = x @ W.T
    return narrow(np.concatenate([np.sin(angle), np.cos(angle)], axis=-1) / x.dtype.type(len(W) ** 0.5), dtype)


def cosformer_features(x: Any, position: Any, length: float) -> np.ndarray:
    """cosFormer [4]: phi(q_i) . phi(k_j) = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 length)).

    Parameters
    ----------
    x : (..., t, d)
    position : (..., t)
        In [0, length], where the cosine cannot be negative.
    length : float
        At least that of the sequence.

    Returns
    -------
    phi : (..., t, 2 d)

    Raises
    ------
    ValueError
        If a position lies outside.

    Examples
    --------
    >>> import numpy as np
    >>> from ttr_np.features import cosformer_features
    >>> phi = cosformer_features([[1.0], [1.0], [1.0]], np.arange(3), length=2)
    >>> (phi @ phi[0]).round(2)
    array([1.  , 0.71, 0.  ])
    """
    x, dtype = wide(x)
    position = np.asarray(position, np.float64)
    if np.any(outside := (position < 0) | (position > length)):
        raise ValueError(f"position must lie in [0, length = {length}]; it is {position[outside][0]}")
    angle = (np.pi / 2 * position / length)[..., None]
    turn = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    return narrow(np.concatenate([np.maximum(x, 0) * part for part in turn], axis=-1), dtype)


def dpfp(x: Any, nu: int = 1) -> np.ndarray:
    """Deterministic parameter-free projection [5]: products of neighbours in r = relu([x, -x]).

        phi(x) = [r_j r_(j + i mod 2 d)],    i = 1 .. nu,  j = 1 .. 2 d

    The source then divides by the sum of the features.

    Parameters
    ----------
    x : (..., d)
    nu : int, default 1
        Number of neighbours.

    Returns
    -------
    phi : (..., 2 d nu)

    Examples
    --------
    >>> from ttr_np.features import dpfp
    >>> dpfp([2.0, 3.0])
    array([6., 0., 0., 0.])
    """
    x, dtype = wide(x)
    r = np.maximum(np.concatenate([x, -x], axis=-1), 0)
    return narrow(np.concatenate([r * np.roll(r, -i, axis=-1) for i in range(1, nu + 1)], axis=-1), dtype)


@lru_cache(maxsize=32)
def root_multiplicities(size: int, power: int) -> np.ndarray:
    """The root of how often each monomial of one degree occurs in the power."""
    chosen = list(combinations_with_replacement(range(size), power))
    factors = np.array(chosen, int).reshape(len(chosen), power)
    repeats = np.ones(len(factors))
    run = np.ones(len(factors))
    for j in range(1, power):
        run = np.where(factors[:, j] == factors[:, j - 1], run + 1, 1)
        repeats *= run
    return np.sqrt(factorial(power) / repeats)


def symmetric_power(x: Any, power: int = 2) -> np.ndarray:
    """Symmetric power [9]: phi(q) . phi(k) = (q . k)^power.

    The monomials of one degree, each once, weighted by the root of its multinomial coefficient.

    Parameters
    ----------
    x : (..., d)
    power : int, default 2
        Not negative.

    Returns
    -------
    phi : (..., n)
        n = C(d + power - 1, power).

    Raises
    ------
    ValueError
        If ``power`` is negative.

    Examples
    --------
    >>> from ttr_np.features import symmetric_power
    >>> phi = symmetric_power([[1.0, 2.0], [3.0, 1.0]])
    >>> float((phi[0] @ phi[1]).round(9))
    25.0
    """
    if power < 0:
        raise ValueError(f"power must not be negative, got {power}")
    x, dtype = wide(x)
    size, phi = x.shape[-1], np.ones(x.shape[:-1] + (1,), x.dtype)
    for d in range(1, power + 1):
        # Those that begin with channel i: it times the last of the degree before, which have no channel before it.
        lower = [phi[..., phi.shape[-1] - comb(size - i + d - 2, d - 1) :] for i in range(size)]
        phi = np.concatenate([phi[..., :0], *(x[..., i : i + 1] * y for i, y in enumerate(lower))], axis=-1)
    return narrow(phi * root_multiplicities(size, power).astype(x.dtype), dtype)


def polynomial_sketch(x: Any, power: int = 4, *, features: int = 32, seed: Any = 0) -> np.ndarray:
    """Random features of the polynomial kernel that are never negative together [14]: phi(q) . phi(k) ~ (q . k)^power.

    Two sketches of half a degree, each through a Gaussian matrix of its own, multiply to a sketch of the degree. That
    of half the power is then squared: phi(q) . phi(k) = (s(q) . s(k))^2 >= 0, with E[s(q) . s(k)] = (q . k)^(power/2).

    Parameters
    ----------
    x : (..., d)
    power : int, default 4
        2, 4, 8, ...
    features : int, default 32
        Size m of the sketch before it is squared.
    seed : int, default 0
        Of the Gaussian matrices, the same for queries and keys.

    Returns
    -------
    phi : (..., n)
        n = m (m + 1) / 2; with power 2, which needs no sketch, n = d (d + 1) / 2.

    Raises
    ------
    ValueError
        If ``power`` is none of 2, 4, 8, ...

    Examples
    --------
    >>> from ttr_np.features import polynomial_sketch
    >>> phi = polynomial_sketch([[1.0, 0.5], [-1.0, 1.0]], features=4)
    >>> phi.shape, bool(phi[0] @ phi[1] >= 0)
    ((2, 10), True)
    """
    if power < 2 or power & (power - 1):
        raise ValueError(f"power must be 2, 4, 8, ..., got {power}")
    x, dtype = wide(x)
    return narrow(symmetric_power(half_sketch(x, power // 2, features, np.random.default_rng(seed))), dtype)


def half_sketch(x: np.ndarray, power: int, features: int, rng: np.random.Generator) -> np.ndarray:
    """Features whose products are (x . y)^power in the mean, perhaps negative."""
    if power == 1:
        return x
    one, two = (half_sketch(x, power // 2, features, rng) for _ in range(2))
    G = rng.standard_normal((2, one.shape[-1], features)).astype(x.dtype)
    return (one @ G[0]) * (two @ G[1]) / x.dtype.type(features**0.5)


def taylor_features(x: Any) -> np.ndarray:
    """Second-order Taylor map of Based [6]: phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d).

    Parameters
    ----------
    x : (..., d)

    Returns
    -------
    phi : (..., 1 + d + d (d + 1) / 2)
        Each product of two entries once, not twice.

    Examples
    --------
    >>> from ttr_np.features import taylor_features
    >>> phi = taylor_features([[2.0], [3.0]])
    >>> float((phi[0] @ phi[1]).round(9))
    25.0
    """
    x, dtype = wide(x)
    d = x.shape[-1]
    one = np.ones(x.shape[:-1] + (1,), x.dtype)
    square = symmetric_power(x, 2) / x.dtype.type((2 * d) ** 0.5)
    return narrow(np.concatenate([one, x / x.dtype.type(d**0.25), square], axis=-1), dtype)


def rebased_features(x: Any, weight: Any = None, bias: Any = None) -> np.ndarray:
    """Quadratic map of ReBased [7]: phi(q) . phi(k) = (y_q . y_k)^2 / d with y the layer-normalised x.

    Parameters
    ----------
    x : (..., d)
    weight, bias : (d,), optional
        Of the layer norm.

    Returns
    -------
    phi : (..., d (d + 1) / 2)

    Examples
    --------
    >>> from ttr_np.features import rebased_features
    >>> phi = rebased_features([[1.0, 3.0], [5.0, 2.0]])
    >>> float((phi[0] @ phi[1]).round(3))
    2.0
    """
    x, dtype = wide(x)
    return narrow(symmetric_power(layer_norm(x, weight, bias), 2) / x.dtype.type(x.shape[-1] ** 0.5), dtype)


def hedgehog_features(x: Any, W: Any = None) -> np.ndarray:
    """Hedgehog [8]: phi(x) = [softmax(W x), softmax(-W x)].

    Parameters
    ----------
    x : (..., d)
    W : (..., m, d), optional
        Learned map; default: the identity.

    Returns
    -------
    phi : (..., 2 m)
        Positive; each half sums to one.

    Examples
    --------
    >>> from ttr_np.features import hedgehog_features
    >>> hedgehog_features([0.0, 100.0])
    array([3.72007598e-44, 1.00000000e+00, 1.00000000e+00, 3.72007598e-44])
    """
    x, dtype = wide(x)
    y = x if W is None else x @ np.swapaxes(np.asarray(W, x.dtype), -1, -2)
    return narrow(np.concatenate([softmax(y), softmax(-y)], axis=-1), dtype)


def rotary(x: Any, position: Any, base: float = 10000.0) -> np.ndarray:
    """Rotary embedding [10]: entries 2 j and 2 j + 1 turn by position / base^(2 j / d).

    Products of queries and keys then depend on the difference of their positions only.

    Parameters
    ----------
    x : (..., t, d)
        d even.
    position : (..., t)
        Any numbers; only their differences count.
    base : float, default 10000.0
        Of the geometric row of wavelengths.

    Returns
    -------
    y : (..., t, d)

    Raises
    ------
    ValueError
        If d is odd.

    Examples
    --------
    >>> import numpy as np
    >>> from ttr_np.features import rotary
    >>> x = np.ones((3, 2))
    >>> y = rotary(x, np.arange(3))
    >>> bool(np.isclose(y[0] @ y[1], y[1] @ y[2]))
    True
    """
    x, dtype = wide(x)
    d = x.shape[-1]
    if d % 2:
        raise ValueError(f"x needs an even last axis to be turned in pairs, it has {d}")
    # Angles in float64: at position 1e6 a float32 angle is wrong by 0.06.
    angle = np.asarray(position, np.float64)[..., None] * base ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return narrow(turned.reshape(turned.shape[:-2] + (d,)), dtype)


def shift(x: Any, steps: int = 1) -> np.ndarray:
    """Move tokens later: y_t = x_(t - steps), zeros first.

    Keys shifted by one store each token under the one before it: a memory of bigrams (Wang et al., arXiv:2501.12352).

    Parameters
    ----------
    x : (..., t, d)
    steps : int, default 1
        Not negative.

    Returns
    -------
    y : (..., t, d)

    Raises
    ------
    ValueError
        If ``steps`` is negative: the future would leak into the past.

    Examples
    --------
    >>> from ttr_np.features import shift
    >>> shift([[1.0], [2.0], [3.0]])
    array([[0.],
           [1.],
           [2.]])
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}: the future would leak into the past")
    x = np.asarray(x)
    y = np.zeros_like(x, subok=False)
    y[..., steps:, :] = x[..., : max(x.shape[-2] - steps, 0), :]
    return y


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of ALiBi [11], 2^(-8 h / heads) for h = 1 .. heads; ``log_decay = -slope`` at every step.

    Parameters
    ----------
    heads : int
        The source has this row for powers of two; here it holds for any number.

    Returns
    -------
    slopes : (heads,)

    Examples
    --------
    >>> from ttr_np.features import alibi_slopes
    >>> alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    """
    return 2.0 ** (-8 * np.arange(1, heads + 1) / max(heads, 1))


def retention_decays(heads: int) -> np.ndarray:
    """Log decays of RetNet [12], log(1 - 2^(-5 - h)) for h = 0 .. heads - 1.

    Parameters
    ----------
    heads : int
        How many.

    Returns
    -------
    log_decay : (heads,)
        One number per head, the same at every step.

    Examples
    --------
    >>> from ttr_np.features import retention_decays
    >>> retention_decays(3).round(4)
    array([-0.0317, -0.0157, -0.0078])
    """
    return np.log1p(-(2.0 ** (-5 - np.arange(heads))))


def lightning_decays(heads: int, layer: int = 0, layers: int = 1) -> np.ndarray:
    """Log decays of Lightning attention [13], -(8 h / heads)(1 - layer / layers) for h = 0 .. heads - 1.

    Parameters
    ----------
    heads : int
        How many.
    layer, layers : int, default 0 and 1
        Which layer of how many; later layers forget less. Head 0 never forgets.

    Returns
    -------
    log_decay : (heads,)
        One number per head, the same at every step.

    Examples
    --------
    >>> from ttr_np.features import lightning_decays
    >>> lightning_decays(4, layer=1, layers=2)
    array([ 0., -1., -2., -3.])
    """
    return -8.0 * np.arange(heads) / max(heads, 1) * (1 - layer / layers) + 0.0
