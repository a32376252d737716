"""Columns of a state in registers: what the kernels of linear memories do with them.

``parts`` neighbouring lanes share a column: lane ``part`` owns the rows part, part + parts, ... of it. Loops over its
rows have a constant length, so that the compiler unrolls them and no row needs an address.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ._launch import cuda

__all__ = ["Columns", "columns", "kept", "place"]


@cuda.jit(device=True)
def kept(decay, x):
    """What a decay leaves of a number; where it leaves nothing, not even a NaN is left."""
    return decay if decay == 0 else decay * x


@cuda.jit(device=True)
def place(inner, blocks, parts):
    """Which memory [outer, inner] and which column this thread works on, and which part of it."""
    memory, lane = cuda.blockIdx.x // blocks, cuda.threadIdx.x
    column = cuda.blockIdx.x % blocks * (cuda.blockDim.x // parts) + lane // parts
    return memory // inner, memory % inner, column, lane % parts


class Columns(NamedTuple):
    """Functions for kernels; ``own`` is the lane's rows, ``x`` an array over all rows."""

    load: Any  # own = the column of S, zero where there is none
    store: Any  # the column of S = own
    take: Any  # own = x
    give: Any  # x = own
    dot: Any  # the sum of own * x over all rows, for each lane of the column
    decay: Any  # own = kept(x, own)
    add: Any  # own += x * number


@cache
def columns(size: int, rows: int, parts: int, real: Any) -> Columns:
    """The functions for columns of so many rows."""
    return Columns(*transfers(size, rows, parts, real), *arithmetic(size, rows, parts, real))


def transfers(size: int, rows: int, parts: int, real: Any) -> tuple[Any, ...]:
    """Between registers and memory."""

    @cuda.jit(device=True)
    def load(own, S, part, column):
        for r in range(rows):
            row = part + r * parts
            own[r] = S[row, column] if row < size and column < S.shape[1] else real(0)

    @cuda.jit(device=True)
    def store(own, S, part, column):
        for r in range(rows):
            row = part + r * parts
            if row < size and column < S.shape[1]:
                S[row, column] = own[r]

    @cuda.jit(device=True)
    def take(own, x, part):
        for r in range(rows):
            row = part + r * parts
            own[r] = x[row] if row < size else real(0)

    @cuda.jit(device=True)
    def give(own, x, part):
        for r in range(rows):
            row = part + r * parts
            if row < size:
                x[row] = own[r]

    return load, store, take, give


def arithmetic(size: int, rows: int, parts: int, real: Any) -> tuple[Any, ...]:
    """In registers; only ``dot`` asks the other lanes of its column."""

    @cuda.jit(device=True)
    def dot(own, x, part):
        total = real(0)
        for r in range(rows):
            row = part + r * parts
            if row < size:
                total += own[r] * x[row]
        distance = 1
        while distance < parts:
            total += cuda.shfl_xor_sync(0xFFFFFFFF, total, distance)
            distance *= 2
        return total

    @cuda.jit(device=True)
    def decay(own, x, part):
        for r in range(rows):
            row = part + r * parts
            if row < size:
                own[r] = kept(x[row], own[r])

    @cuda.jit(device=True)
    def add(own, x, number, part):
        for r in range(rows):
            row = part + r * parts
            if row < size:
                own[r] += x[row] * number

    return dot, decay, add
