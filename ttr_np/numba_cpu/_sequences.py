"""Where the sequences of many arrays lie in memory, so that kernels read any layout without a copy or a repeat.

Leading axes are walked as (memory, group): the sequences of queries that share one memory are its group. An array that
broadcasts has the same address in several places.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads

from ._cache import compiled

__all__ = ["NO_GATES", "PER_CHANNEL", "PER_STEP", "Layout", "column_blocks", "lay_out"]

NO_GATES, PER_STEP, PER_CHANNEL = 0, 1, 2  # kinds of log decays; also their number of own axes


class Layout(NamedTuple):
    """Arguments of a kernel.

    ``places (arrays, memories, groups)``: byte address of the first number of every sequence, 0 for an array that was
    left out. ``steps (arrays, 2)``: strides of its own (last one or two) axes, in numbers.
    """

    places: np.ndarray
    steps: np.ndarray
    keep: list[Any]  # the arrays themselves: addresses do not keep memory alive


@compiled
def walk(rows: np.ndarray, shape: np.ndarray, places: np.ndarray) -> None:
    """Fill ``places (arrays, sequences)`` with address + index . strides, the last axis fastest; see ``row_of``."""
    index = np.zeros_like(shape)
    for sequence in range(places.shape[1]):
        for array in range(places.shape[0]):
            places[array, sequence] = rows[array, 2]
            for axis in range(len(shape)):
                places[array, sequence] += index[axis] * rows[array, 3 + axis]
        for axis in range(len(shape) - 1, -1, -1):
            index[axis] += 1
            if index[axis] < shape[axis]:
                break
            index[axis] = 0


def whole(x: np.ndarray) -> np.ndarray:
    """x itself if its strides count whole numbers, else a copy (a field of records, say)."""
    size = x.itemsize
    for stride in x.strides:
        if stride % size:
            return x.copy()
    return x if x.flags.aligned else x.copy()


def row_of(x: np.ndarray | None, own: int, order: Sequence[int]) -> list[int]:
    """Two steps of an array's own axes in numbers, its address, and its leading axes' strides in bytes."""
    if x is None:
        return [0] * (3 + len(order))
    size, inner, strides = x.itemsize, x.ndim - own, [0] * len(order)
    steps = [stride // size for stride in x.strides[inner:]] + [0] * (2 - own)
    outer = len(order) - inner
    for to, axis in enumerate(order):
        if axis >= outer and x.shape[axis - outer] > 1:
            strides[to] = x.strides[axis - outer]
    return [*steps, x.__array_interface__["data"][0], *strides]


def lay_out(memory: tuple[int, ...], lead: tuple[int, ...], *arrays: tuple[np.ndarray | None, int]) -> Layout:
    """The layout of arrays whose leading axes broadcast to ``lead``.

    Parameters
    ----------
    memory
        Leading shape of the states; it broadcasts to ``lead``.
    lead
        Leading shape of the answers.
    *arrays
        Pairs of an array (or None) and its number of own axes, 1 or 2.
    """
    memory = (1,) * (len(lead) - len(memory)) + memory
    order = sorted(range(len(lead)), key=lambda axis: memory[axis] == 1 and lead[axis] != 1)
    keep = [None if x is None else whole(x) for x, _ in arrays]
    rows = np.array([row_of(x, own, order) for x, (_, own) in zip(keep, arrays, strict=True)], np.int64)
    memories = prod(memory)
    places = np.empty((len(arrays), prod(lead)), np.int64)
    walk(rows, np.array([lead[axis] for axis in order], np.int64), places)
    groups = places.shape[1] // memories if memories else 0
    return Layout(places.reshape(len(arrays), memories, groups), rows[:, :2].copy(), keep)


def column_blocks(memories: int, columns: int) -> int:
    """Into how many blocks of value columns a memory is cut, so that few memories still give every thread work.

    The columns of a linear memory do not know of each other; what they share is done again for every block.
    """
    return max(1, min(-(-4 * get_num_threads() // max(memories, 1)), columns // 32)) if get_num_threads() > 1 else 1
