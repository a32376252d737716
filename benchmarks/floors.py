"""What physics allows on a GPU: the fewest bytes that must move, and the FLOP of chunks of 64 on tensor cores.

    floor = max(bytes / copy rate, FLOP / product rate)

Bytes and FLOP are per token of one head with k = v = D, of data in 16 bits with gates and states in float32.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["KINDS", "Rates", "Shape", "Work", "floor_seconds", "rates_of", "work"]

C = 64
KINDS = ("linear", "scalar gate", "channel gate", "delta", "gated delta", "KDA")


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
    d, delta, channels = shape.D, kind in KINDS[3:], kind in ("channel gate", "KDA")
    if shape.T == 1:  # one token: the state is read and written
        return Work(8 * d * d * shape.token_heads, (6 if delta else 4) * d * d * shape.token_heads)
    gates = {"linear": 0, "scalar gate": 4, "channel gate": 2 * d, "delta": 8, "gated delta": 8, "KDA": 2 * d + 4}
    flop = 6 * d * d + 10 * C * d + C * C if delta else 4 * d * d + 4 * C * d
    return Work((8 * d + gates[kind]) * shape.token_heads, (flop + 3 * d * channels) * shape.token_heads)


def floor_seconds(kind: str, shape: Shape, rates: Rates) -> float:
    """The shortest time of a call."""
    least = work(kind, shape)
    return max(least.bytes / rates.bytes, least.flop / rates.flop)
