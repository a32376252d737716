"""Every array of the library once: its name, its axes, its meaning and its range.

Axes are written in NumPy's gufunc spelling, last axes first in mind: ``q : (..., t, k)`` is a query of size ``k`` at
every step ``t`` of any number of sequences. Leading axes are free and broadcast, so grouped queries are broadcasting.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["ARRAYS", "OPERATORS", "STATES", "axes_of", "check", "draw"]


class Array(NamedTuple):
    """One name of the notation."""

    axes: str
    meaning: str


ARRAYS: dict[str, Array] = {
    "q": Array("t k", "query: what the memory is asked"),
    "k": Array("t k", "key: where a value is stored"),
    "v": Array("t v", "value: what is stored"),
    "beta": Array("t", "step size, or the weight of a pair in a least-squares fit; >= 0"),
    "log_decay": Array("t|t k", "log of the share of the past that is kept, <= 0; per step, or per step and channel"),
    "bonus": Array("k", "weight of the current pair in each key channel, read before it is stored"),
    "erase_key": Array("t k", "key whose recalled value is erased; default: the key itself"),
    "a": Array("t k", "direction read from the old state before it is decayed"),
    "b": Array("t k", "direction along which that reading is written back"),
    "x": Array("t d", "input of a channelwise scan or convolution"),
    "phase": Array("t d", "angle by which the state turns at each step, radians"),
    "u": Array("t v", "input of a selective scan"),
    "delta": Array("t v", "step length of a selective scan, >= 0"),
    "A": Array("v n", "rates of a selective scan, <= 0"),
    "B": Array("t n", "input map of a selective scan: its key"),
    "C": Array("t n", "output map of a selective scan: its query"),
    "D": Array("v", "direct path from input to output"),
    "step_size": Array("t", "step size of test-time training, >= 0"),
    "momentum": Array("t", "share of the last step that is repeated, in [0, 1]"),
    "weight_decay": Array("t", "share of the parameters that is forgotten at a step, in [0, 1]"),
    "weight": Array("w d", "taps of a causal convolution, the last one for the current token"),
    "bias": Array("d", "offset added to every output"),
    "w": Array("t k", "direction of the reflection that a step applies to all keys before it; of unit length"),
    "levels": Array("t l", "weight of each dyadic bucket of the past, the newest first"),
    "process_noise": Array("t", "variance by which every number of a memory drifts in a step, >= 0"),
    "measurement_noise": Array("t", "variance of the noise on a value, > 0"),
    "log_transition": Array("t", "log of the factor by which a memory is expected to shrink (or grow) in a step"),
    "mask": Array("t", "True where the token is memorised"),
}

# Numbers whose rounding would change the dynamics: they never decide the output's dtype and are never rounded to it.
OWN_AXES = {name: tuple(array.axes.split()) for name, array in ARRAYS.items()}
GATES = frozenset(
    {"beta", "log_decay", "phase", "delta", "A", "D", "step_size", "momentum", "weight_decay", "bonus", "bias"}
    | {"process_noise", "measurement_noise", "log_transition"}
)


class LinearAttentionState(NamedTuple):
    """``S (..., k, v)``, and the normaliser ``z (..., k)`` (None unless ``normalize``)."""

    S: Any
    z: Any = None


class DeltaRuleState(NamedTuple):
    """``S (..., k, v)``."""

    S: Any


class DplrState(NamedTuple):
    """``S (..., k, v)``."""

    S: Any


class DiagonalScanState(NamedTuple):
    """``h (..., d)``, complex if the scan has a phase."""

    h: Any


class SelectiveScanState(NamedTuple):
    """``h (..., v, n)``."""

    h: Any


class RecursiveLeastSquaresState(NamedTuple):
    """Solution ``S (..., k, v)`` and inverse Gram matrix ``P (..., k, k)``."""

    S: Any
    P: Any


class KalmanFilterState(NamedTuple):
    """Mean ``S (..., k, v)`` and covariance ``P (..., k, k)`` of each of its columns."""

    S: Any
    P: Any


class AffineProjectionState(NamedTuple):
    """``S (..., k, v)`` and the last order - 1 pairs, oldest first: ``k (..., p, k)``, ``v (..., p, v)``."""

    S: Any
    k: Any
    v: Any


class MesaState(NamedTuple):
    """``G (..., k, v)``, decayed sum of ``k v^T``, and ``H (..., k, k)``, decayed sum of ``k k^T``."""

    G: Any
    H: Any


class CacheState(NamedTuple):
    """The pairs a nonparametric memory still needs, oldest first.

    ``k (..., n, k)``, ``v (..., n, v)``, ``log_weight (..., n)``: the log of each pair's share of weight left by the
    decays since (-inf where a slot is empty), ``position (..., n)``: how many pairs were memorised before it (-1 where
    a slot is empty). A cache that grew from another shares memory with it: take its arrays as values, and copy what you
    would change (NumPy's are read-only then).
    """

    k: Any
    v: Any
    log_weight: Any
    position: Any


class TestTimeTrainingState(NamedTuple):
    """The trained memory, its arrays packed in one vector of ``p`` numbers (``memory.unpack`` names them again).

    ``parameters (..., p)``, ``momentum (..., p)`` (None without momentum), ``anchor (..., p)``: the parameters at the
    start of the mini-batch, where its gradients are taken, ``count (...)``: tokens memorised in that mini-batch.
    """

    __test__ = False  # pytest would collect a name that starts with Test

    parameters: Any
    momentum: Any
    anchor: Any
    count: Any


class LogLinearAttentionState(NamedTuple):
    """``S (..., l, k, v)``, one sum per bucket of the past, and ``count (...)``: pairs memorised so far."""

    S: Any
    count: Any


class ShortConvolutionState(NamedTuple):
    """The last ``w - 1`` inputs, ``x (..., w - 1, d)``, oldest first."""

    x: Any


class Signature(NamedTuple):
    """What an operator takes and keeps: everything that is common to all backends follows from this line.

    ``frozen`` lists the arrays that a masked token sets to zero (so that nothing is stored and nothing decays);
    ``reads`` those that only question the memory and so do not shape its state; ``state`` the axes of each field.
    """

    arrays: tuple[str, ...]
    optional: tuple[str, ...]
    frozen: tuple[str, ...]
    reads: tuple[str, ...]
    state: dict[str, str]
    sees_mask: bool = False


_kv = ("k", "v", "log_decay")
_cache = {"k": "n k", "v": "n v", "log_weight": "n", "position": "n"}
OPERATORS: dict[str, Signature] = {
    "linear_attention": Signature(("q", "k", "v"), ("log_decay", "bonus"), _kv, ("q", "bonus"), {"S": "k v", "z": "k"}),
    "delta_rule": Signature(
        ("q", "k", "v", "beta"), ("log_decay", "erase_key"), (*_kv, "beta", "erase_key"), ("q",), {"S": "k v"}
    ),
    "dplr": Signature(("q", "k", "v", "a", "b"), ("log_decay",), (*_kv, "a", "b"), ("q",), {"S": "k v"}),
    "diagonal_scan": Signature(("x", "log_decay"), ("phase",), ("x", "log_decay", "phase"), (), {"h": "d"}),
    "selective_scan": Signature(("u", "delta", "A", "B", "C"), ("D",), ("u", "delta", "B"), ("C", "D"), {"h": "v n"}),
    "recursive_least_squares": Signature(
        ("q", "k", "v"), ("log_decay", "beta"), (*_kv, "beta"), ("q",), {"S": "k v", "P": "k k"}
    ),
    "kalman_filter": Signature(
        ("q", "k", "v"),
        ("process_noise", "measurement_noise", "log_transition"),
        ("k", "v", "process_noise", "measurement_noise", "log_transition"),
        ("q",),
        {"S": "k v", "P": "k k"},
    ),
    "affine_projection": Signature(
        ("q", "k", "v", "beta"),
        (),
        ("k", "v", "beta"),
        ("q",),
        {"S": "k v", "k": "p k", "v": "p v"},
        sees_mask=True,
    ),
    "mesa": Signature(("q", "k", "v"), ("log_decay", "beta"), (*_kv, "beta"), ("q",), {"G": "k v", "H": "k k"}),
    "softmax_attention": Signature(("q", "k", "v"), ("log_decay",), _kv, ("q",), _cache, sees_mask=True),
    "local_polynomial": Signature(("q", "k", "v"), ("log_decay",), _kv, ("q",), _cache, sees_mask=True),
    "sparse_attention": Signature(("q", "k", "v"), (), ("k", "v"), ("q",), _cache, sees_mask=True),
    "path_attention": Signature(
        ("q", "k", "v", "beta", "w"), (), ("k", "v", "beta", "w"), ("q",), _cache, sees_mask=True
    ),
    "stick_breaking_attention": Signature(("q", "k", "v"), (), ("k", "v"), ("q",), _cache, sees_mask=True),
    "wall_attention": Signature(("q", "k", "v"), ("log_decay",), _kv, ("q",), _cache, sees_mask=True),
    "delta_attention": Signature(
        ("q", "k", "v", "beta"), ("erase_key",), ("k", "v", "beta", "erase_key"), ("q",), _cache, sees_mask=True
    ),
    "log_linear_attention": Signature(
        ("q", "k", "v", "levels"), ("log_decay",), _kv, ("q", "levels"), {"S": "l k v", "count": ""}, sees_mask=True
    ),
    "kernel_ridge": Signature(("q", "k", "v"), (), ("k", "v"), ("q",), _cache, sees_mask=True),
    "test_time_training": Signature(
        ("q", "k", "v", "step_size"),
        ("momentum", "weight_decay"),
        ("k", "v", "step_size", "momentum", "weight_decay"),
        ("q",),
        {"parameters": "p", "momentum": "p", "anchor": "p", "count": ""},
        sees_mask=True,
    ),
    "short_convolution": Signature(("x", "weight"), ("bias",), ("x",), ("bias",), {"x": "w d"}, sees_mask=True),
}

STATES: dict[str, type] = {
    "linear_attention": LinearAttentionState,
    "delta_rule": DeltaRuleState,
    "dplr": DplrState,
    "diagonal_scan": DiagonalScanState,
    "selective_scan": SelectiveScanState,
    "recursive_least_squares": RecursiveLeastSquaresState,
    "kalman_filter": KalmanFilterState,
    "affine_projection": AffineProjectionState,
    "mesa": MesaState,
    "softmax_attention": CacheState,
    "local_polynomial": CacheState,
    "sparse_attention": CacheState,
    "path_attention": CacheState,
    "stick_breaking_attention": CacheState,
    "wall_attention": CacheState,
    "delta_attention": CacheState,
    "log_linear_attention": LogLinearAttentionState,
    "kernel_ridge": CacheState,
    "test_time_training": TestTimeTrainingState,
    "short_convolution": ShortConvolutionState,
}


def axes_of(name: str, array: Any, arrays: dict[str, Any]) -> tuple[str, ...]:
    """Axes of one named array; ``log_decay`` has two spellings, told apart by its number of axes.

    Raises
    ------
    ValueError
        If ``log_decay`` has neither as many axes as the queries nor one fewer.
    """
    if name != "log_decay":
        return OWN_AXES[name]
    if "x" in arrays:
        return ("t", "d")
    ndim = np.ndim(arrays["q"])
    spelling = {0: ("t",), ndim - 1: ("t",), ndim: ("t", "k")}.get(np.ndim(array))
    if spelling is None:
        raise ValueError(
            f"log_decay has {np.ndim(array)} axes; q has {ndim}, so log_decay needs {ndim - 1} (one number per step) "
            f"or {ndim} (one per step and key channel)"
        )
    return spelling


def check(**arrays: Any) -> dict[str, int]:
    """Sizes of the axes that named arrays share.

    Parameters
    ----------
    **arrays
        Arrays under their names in the notation; None is skipped. A number stands for the same value at every step.

    Returns
    -------
    dict
        Size of every axis.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, if one has too few axes, or if leading axes do not broadcast.

    Examples
    --------
    >>> check(q=np.zeros((4, 2)), k=np.zeros((4, 2)), v=np.zeros((4, 3)))
    {'t': 4, 'k': 2, 'v': 3}
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    leading: dict[str, tuple[int, ...]] = {}
    for name, array in arrays.items():
        shape = np.shape(array)
        if array is None or shape == () and name in GATES:
            continue
        axes = axes_of(name, array, arrays)
        if len(shape) < len(axes):
            raise ValueError(f"{name} needs axes (..., {', '.join(axes)}), got shape {shape}")
        leading[name] = shape[: len(shape) - len(axes)]
        for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"axis {axis!r} is {size} in {name} but {sizes[axis]} in {owner[axis]}")
            owner.setdefault(axis, name)
    broadcast_leading(leading)
    return sizes


def broadcast_leading(leading: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Common leading shape; a ValueError names the two arrays that do not broadcast."""
    common: tuple[int, ...] = ()
    for name, shape in leading.items():
        if shape == common:
            continue
        try:
            common = np.broadcast_shapes(common, shape)
        except ValueError:
            before = ", ".join(list(leading)[: list(leading).index(name)])
            raise ValueError(f"leading axes {shape} of {name} do not broadcast with {common} of {before}") from None
    return common


def _unit(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(shape)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _log_sigmoid(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return -np.logaddexp(0.0, -rng.standard_normal(shape) - 2.0)


# How a realistic input looks: unit keys, gates that keep most of the past, step sizes in (0, 1).
_DRAW = {
    "k": _unit,
    "q": _unit,
    "erase_key": _unit,
    "w": _unit,
    "levels": lambda rng, shape: rng.uniform(0.1, 1.0, shape),
    "a": lambda rng, shape: -0.5 * _unit(rng, shape),
    "b": lambda rng, shape: _unit(rng, shape),
    "beta": lambda rng, shape: rng.uniform(0.05, 0.95, shape),
    "step_size": lambda rng, shape: rng.uniform(0.01, 0.1, shape),
    "momentum": lambda rng, shape: rng.uniform(0.1, 0.9, shape),
    "weight_decay": lambda rng, shape: rng.uniform(0.0, 0.1, shape),
    "log_decay": _log_sigmoid,
    "log_transition": _log_sigmoid,
    "process_noise": lambda rng, shape: rng.uniform(0.0, 0.1, shape),
    "measurement_noise": lambda rng, shape: rng.uniform(0.1, 1.0, shape),
    "phase": lambda rng, shape: rng.uniform(-np.pi, np.pi, shape),
    "delta": lambda rng, shape: rng.uniform(0.01, 0.5, shape),
    "A": lambda rng, shape: -rng.uniform(0.1, 4.0, shape),
    "mask": lambda rng, shape: rng.uniform(size=shape) < 0.7,
}


def draw(
    operator: str,
    rng: np.random.Generator,
    *,
    optional: tuple[str, ...] = (),
    lead: tuple[int, ...] = (),
    per_channel: bool = True,
    dtype: Any = np.float64,
    **sizes: int,
) -> dict[str, np.ndarray]:
    """Realistic random arguments of an operator, for tests and benchmarks.

    Parameters
    ----------
    operator
        A name in ``OPERATORS``.
    rng
        The source of chance.
    optional
        Optional arrays to draw besides the required ones.
    lead
        Leading shape of every array with a time axis.
    per_channel
        Whether ``log_decay`` has one number per key channel or one per step.
    dtype
        Of every array drawn.
    **sizes
        Size of each axis; unnamed ones are t 7, k 5, v 3, d 4, n 4, w 4, l 6.

    Returns
    -------
    dict
        Arrays under their names.

    Examples
    --------
    >>> sorted(draw("delta_rule", np.random.default_rng(0), t=3))
    ['beta', 'k', 'q', 'v']
    """
    sizes = {"t": 7, "k": 5, "v": 3, "d": 4, "n": 4, "w": 4, "l": 6} | sizes
    drawn = {}
    for name in OPERATORS[operator].arrays + tuple(optional):
        axes = ARRAYS[name].axes.split("|")[-1 if per_channel else 0].split()
        if name == "log_decay" and operator == "diagonal_scan":
            axes = ["t", "d"]
        shape = (lead if "t" in axes else ()) + tuple(sizes[axis] for axis in axes)
        sample = _DRAW.get(name, lambda rng, shape: rng.standard_normal(shape))
        drawn[name] = np.asarray(sample(rng, shape)).astype(dtype)
    return drawn
