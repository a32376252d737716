"""What physics allows on a GPU: the fewest bytes that must move, and the FLOP of chunks of 64 on tensor cores.

    floor = max(bytes / copy rate, FLOP / product rate)

Bytes and FLOP are per token of one head with k = v = D, of data in 16 bits with gates and states in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import NamedTuple

__all__ = ["KINDS", "Cost", "Rates", "Shape", "Work", "askable", "floor_seconds", "rates_of", "work"]

C = 64
CG, FEW_CG = 30, 8  # steps of conjugate gradients: those that others make for the Mesa layer, those of a good fit


class Cost(NamedTuple):
    """Of a token of one head of size d: FLOP where its sequence has t tokens, and bytes.

    ``step``: FLOP of a token that comes alone, over d^2; 0 for what has no state of fixed size to carry.
    ``most``: FLOP of a whole call beyond which nobody is asked.
    """

    flop: Callable[[int, int], float]
    bytes: Callable[[int], float]
    step: int = 0
    most: float = inf


def linear(d: int, t: int) -> float:
    """FLOP of linear attention."""
    return 4 * d * d + 4 * C * d


def delta(d: int, t: int) -> float:
    """FLOP of the delta rule."""
    return 6 * d * d + 10 * C * d + C * C


def by_channel(flop: Callable[[int, int], float]) -> Callable[[int, int], float]:
    """With a gate per channel."""
    return lambda d, t: flop(d, t) + 3 * d


KINDS = {
    "linear": Cost(linear, lambda d: 8 * d, 4),
    "scalar gate": Cost(linear, lambda d: 8 * d + 4, 4),
    "channel gate": Cost(by_channel(linear), lambda d: 10 * d, 4),
    "delta": Cost(delta, lambda d: 8 * d + 8, 6),
    "gated delta": Cost(delta, lambda d: 8 * d + 8, 6),
    "KDA": Cost(by_channel(delta), lambda d: 10 * d + 4, 6),
    "softmax": Cost(lambda d, t: 2 * t * d, lambda d: 8 * d),
    "softmax full": Cost(lambda d, t: 4 * t * d, lambda d: 8 * d),
    "softmax decode": Cost(lambda d, t: 4 * d, lambda d: 4 * d),  # one query: each of its t pairs is a token here
    "mesa": Cost(lambda d, t: CG * (2 * d * d + 4 * C * d) + 6 * d * d + 4 * C * d, lambda d: 8 * d + 8),
    "least squares": Cost(lambda d, t: 10 * d * d + 8 * C * d + C * C / 3, lambda d: 8 * d + 8),
    "local linear": Cost(lambda d, t: 2 * t * d * (1 + FEW_CG), lambda d: 8 * d, most=1e11),
}


class Shape(NamedTuple):
    """Sequences, tokens of each, heads, and the size of a head."""

    B: int
    T: int
    H: int
    D: int

    @property
    def token_heads(self) -> int:
        """Tokens, each counted once per head."""
        return self.B * self.T * self.H

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Work(NamedTuple):
    """Of a whole call."""

    bytes: float
    flop: float


class Rates(NamedTuple):
    """Of a machine: bytes copied and FLOP of 16-bit products, per second."""

    bytes: float
    flop: float


MACHINES = {"H200": Rates(4.3e12, 790e12)}  # what large copies and products reach there


def rates_of(device: str, measured: Rates) -> Rates:
    """The rates of a machine by its name; of one that is not listed, those measured."""
    return next((rates for name, rates in MACHINES.items() if name in device), measured)


def work(kind: str, shape: Shape) -> Work:
    """The least work of a call.

    Raises
    ------
    ValueError
        If the kind is none of ``KINDS``.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
    cost, (_, t, _, d) = KINDS[kind], shape
    if t == 1 and cost.step:  # the state is read and written
        return Work(8 * d * d * shape.token_heads, cost.step * d * d * shape.token_heads)
    return Work(cost.bytes(d) * shape.token_heads, cost.flop(d, t) * shape.token_heads)


def askable(kind: str, shape: Shape) -> bool:
    """Whether a kind makes sense at a shape: one token only where it can come alone, and no more work than is worth it.

    Raises
    ------
    ValueError
        If the kind is none of ``KINDS``.
    """
    return work(kind, shape).flop <= KINDS[kind].most and (shape.T > 1 or KINDS[kind].step > 0)


def floor_seconds(kind: str, shape: Shape, rates: Rates) -> float:
    """The shortest time of a call."""
    least = work(kind, shape)
    return max(least.bytes / rates.bytes, least.flop / rates.flop)
