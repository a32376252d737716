"""Two memories made one: what the pairs of the second leave of a memory before them, and what they add to it.

    state(first, then second) = transition(second) state(first) + state(second)

Every memory that is linear in its state merges like this. For decaying sums the transition is the product of the
decays, for the delta rule and its kin the matrix A_t ... A_1 with A_i = decay (I - beta k p^T): the same recurrence
run on the identity with values of zero. Least squares merges as its Gram matrix and moments, which are decaying sums.

A memory that has memorised nothing has no transitions yet; else it has one for each operator that its layer calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import operators, routes
from .calling import moved
from .notation import STATES, RecursiveLeastSquaresState, axes_of

__all__ = ["TRANSITIONS", "GramDecay", "LogDecay", "Product", "advance", "compose", "merge", "why_not"]

NO_PAST = -1e30  # a log decay from here on leaves nothing

OF_PAIRS = "it keeps its pairs themselves: memorize the pairs of the other"
REASONS = {
    "softmax_attention": OF_PAIRS,
    "local_polynomial": OF_PAIRS,
    "sparse_attention": OF_PAIRS,
    "kernel_ridge": OF_PAIRS,
    "stick_breaking_attention": OF_PAIRS,
    "wall_attention": "its keys fade with every step after them",
    "delta_attention": "it stores values without what it knew before",
    "path_attention": "its keys are moved by every step after them",
    "kalman_filter": "mean and covariance do not tell how a drifting memory answers to another start",
    "affine_projection": "its first steps look at the pairs before them",
    "log_linear_attention": "its buckets are counted from the first pair",
    "test_time_training": "its gradients depend on the parameters that training starts from",
}


class LogDecay(NamedTuple):
    """Log of the factor on the state before: ``(..., k)``, ``(..., 1)``, in a scan ``(..., d)`` or ``(..., v, n)``."""

    log: Any


class GramDecay(NamedTuple):
    """Log of the factor on the Gram matrix before, ``(..., 1)``, and the ``ridge`` that every memory starts from."""

    log: Any
    ridge: Any


class Product(NamedTuple):
    """The transition matrix ``(..., k, k)``, which multiplies the state before from the left."""

    matrix: Any


def why_not(layer: Any) -> str:
    """Why memories of a layer do not merge; empty if they do."""
    if layer.operator is None:
        return "it has no state"
    if layer.carries:
        return "its state is relative to what it has seen: a position, an angle or a largest weight"
    if layer.route is routes.preconditioned:
        return "it writes keys through the second moment of all keys before"
    if layer.route is routes.oja:
        return "it writes what it did not yet know of the pairs before"
    return REASONS.get(layer.operator, "")


def advance(
    layer: Any, before: list[Any], data: tuple[Any, ...], mask: Any, gates: dict[str, Any], backend: Any
) -> list[Any]:
    """The transitions after some more tokens.

    The layer's route is walked once more with operators that only note what they are asked. Their answers are zeros: a
    route whose later arguments depend on earlier answers must be in ``why_not``.
    """
    p = layer.problem(*data, **gates) | {"cu_seqlens": None}
    p["mask"] = None if mask is None else moved(p, mask)
    after: list[Any] = []

    def note(operator: str, state: Any, **arguments: Any) -> tuple[Any, None]:
        common = {"mask": p["mask"], "backend": backend} | arguments
        after.append(TRANSITIONS[operator](before[len(after)] if before else None, common))
        return moved(p, np.zeros(shape_of_answers(common))), None

    layer.route(layer, note, p, None)
    return after


def shape_of_answers(arguments: dict[str, Any]) -> tuple[int, ...]:
    """Leading axes of all data, then those of the values."""
    data = [arguments[name] for name in ("q", "k", "v", "x", "u", "B", "C") if name in arguments]
    values = next(arguments[name] for name in ("v", "x", "u") if name in arguments)
    return np.broadcast_shapes(*(x.shape[:-2] for x in data)) + values.shape[-2:]


def summed(x: np.ndarray, axis: int, mask: Any) -> np.ndarray:
    """Sum over time of log decays, perhaps with phases; masked tokens are left out."""
    if mask is not None:
        x = np.where(mask if axis == -1 else mask[..., None], x, 0)
    turned = 1j * np.sum(x.imag, axis=axis) if np.iscomplexobj(x) else 0
    return np.sum(np.maximum(x.real, NO_PAST), axis=axis, dtype=np.float64) + turned


def decay_of_sum(before: LogDecay | None, arguments: dict[str, Any]) -> LogDecay:
    """Decays per step or per key channel."""
    log_decay, total = arguments.get("log_decay"), moved(arguments, np.zeros(1)) if before is None else before.log
    if log_decay is None:
        return LogDecay(total)
    if axes_of("log_decay", log_decay, arguments) == ("t", "k"):
        return LogDecay(total + summed(log_decay, -2, arguments["mask"]))
    return LogDecay(total + summed(log_decay, -1, arguments["mask"])[..., None])


def decay_of_scan(before: LogDecay | None, arguments: dict[str, Any]) -> LogDecay:
    """Decays, and perhaps angles, of every channel."""
    rate = arguments["log_decay"]
    rate = rate if arguments.get("phase") is None else rate + 1j * arguments["phase"]
    return LogDecay((0 if before is None else before.log) + summed(rate, -2, arguments["mask"]))


def decay_of_selective_scan(before: LogDecay | None, arguments: dict[str, Any]) -> LogDecay:
    """Decays of every entry."""
    elapsed = -summed(-arguments["delta"], -2, arguments["mask"])
    return LogDecay((0 if before is None else before.log) + elapsed[..., :, None] * arguments["A"])


def decay_of_gram(before: GramDecay | None, arguments: dict[str, Any]) -> GramDecay:
    """Decays of the Gram matrix."""
    total = decay_of_sum(None if before is None else LogDecay(before.log), arguments)
    return GramDecay(total.log, np.float64(arguments.get("ridge", 1.0)))


def product(operator: str, before: Product | None, arguments: dict[str, Any]) -> Product:
    """The operator's recurrence on the identity."""
    k = arguments["k"]
    one = np.eye(k.shape[-1], dtype=np.result_type(k.dtype, np.float32))
    start = moved(arguments, one) if before is None else before.matrix
    given = arguments | {"q": np.zeros_like(k), "v": np.zeros_like(k)}
    _, state = getattr(operators, operator)(**given, initial_state=(start,), output_final_state=True)
    return Product(state.S)


TRANSITIONS: dict[str, Callable[..., Any]] = {
    "linear_attention": decay_of_sum,
    "mesa": decay_of_sum,
    "diagonal_scan": decay_of_scan,
    "selective_scan": decay_of_selective_scan,
    "recursive_least_squares": decay_of_gram,
    "delta_rule": partial(product, "delta_rule"),
    "dplr": partial(product, "dplr"),
}


def compose(first: list[Any], second: list[Any]) -> list[Any]:
    """The transitions of the pairs of the first memory and then those of the second."""
    return [one_after_other(a, b) for a, b in zip(first, second, strict=True)] if first and second else first or second


def one_after_other(a: Any, b: Any) -> Any:
    """Matrices multiply, logs add, the ridge is that of the first."""
    if isinstance(a, Product):
        return Product(b.matrix @ a.matrix)
    return a._replace(log=a.log + b.log)


def merge(first: Any, second: Any, transitions: list[Any]) -> Any:
    """The state after the pairs of the first memory and then those of the second, whose transitions are given."""
    if hasattr(first, "_fields"):
        return merge_one(first, second, transitions[0])
    return tuple(merge_one(a, b, T) for a, b, T in zip(first, second, transitions, strict=True))


def merge_one(a: Any, b: Any, transition: Any) -> Any:
    """States of one operator."""
    if isinstance(transition, GramDecay):
        return merge_least_squares(a, b, transition)
    if isinstance(transition, Product):
        return type(a)(transition.matrix.astype(a.S.dtype, copy=False) @ a.S + b.S)
    factor = np.exp(transition.log)
    if isinstance(a, (STATES["diagonal_scan"], STATES["selective_scan"])):
        return type(a)((factor * a.h + b.h).astype(b.h.dtype))
    wide = [factor if name == "z" else factor[..., None] for name in a._fields]
    fields = zip(wide, a, b, strict=True)
    return type(a)(*(None if y is None else (f * x + y).astype(y.dtype) for f, x, y in fields))


def merge_least_squares(a: Any, b: Any, transition: GramDecay) -> RecursiveLeastSquaresState:
    """The sum of the Gram matrices, without the ridge that the second started from, and of the moments."""
    keep = np.exp(transition.log)[..., None]
    gram_a, gram_b = np.linalg.inv(a.P), np.linalg.inv(b.P)
    start = transition.ridge * moved({"P": a.P}, np.eye(a.P.shape[-1]))
    gram = keep * gram_a + (gram_b - keep * start)
    gram = (gram + np.swapaxes(gram, -1, -2)) / 2
    S = np.linalg.solve(gram, keep * (gram_a @ a.S) + gram_b @ b.S)
    P = np.linalg.inv(gram)
    return RecursiveLeastSquaresState(S.astype(a.S.dtype), ((P + np.swapaxes(P, -1, -2)) / 2).astype(a.P.dtype))
