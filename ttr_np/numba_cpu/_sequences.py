"""Where the sequences of many arrays lie in memory, so that kernels read any layout without a copy or a repeat.

Leading axes are walked as (memory, group): the sequences of queries that share one memory are its group. An array that
broadcasts has the same address in several places.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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
    """Fill ``places (arrays, sequences)`` with address + index . strides, the last axis fastest; see ``Kind.row``."""
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


class Kind(NamedTuple):
    """What a layout must know of an array besides its address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int  # of a number
    own: int  # axes, the last ones

    def row(self, order: Sequence[int]) -> list[int]:
        """Two steps of its own axes in numbers, 0 for its address, and its leading axes' strides in bytes."""
        inner, strides = len(self.shape) - self.own, [0] * len(order)
        steps = [stride // self.size for stride in self.strides[inner:]] + [0] * (2 - self.own)
        outer = len(order) - inner
        for to, axis in enumerate(order):
            if axis >= outer and self.shape[axis - outer] > 1:
                strides[to] = self.strides[axis - outer]
        return [*steps, 0, *strides]


class Form(NamedTuple):
    """A layout without its addresses, the same for all calls with such arrays."""

    rows: np.ndarray  # see ``Kind.row``
    steps: np.ndarray
    axes: np.ndarray  # sizes of the leading axes as they are walked
    shape: tuple[int, int, int]  # of the places


@lru_cache(maxsize=1000)
def form_of(memory: tuple[int, ...], lead: tuple[int, ...], kinds: tuple[Kind | None, ...]) -> Form:
    """The form of arrays whose leading axes broadcast to ``lead``; see ``lay_out``."""
    memory = (1,) * (len(lead) - len(memory)) + memory
    order = sorted(range(len(lead)), key=lambda axis: memory[axis] == 1 and lead[axis] != 1)
    rows = np.array([[0] * (3 + len(order)) if kind is None else kind.row(order) for kind in kinds], np.int64)
    memories = prod(memory)
    groups = prod(lead) // memories if memories else 0
    axes = np.array([lead[axis] for axis in order], np.int64)
    return Form(rows, rows[:, :2].copy(), axes, (len(kinds), memories, groups))


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
    keep = [None if x is None else whole(x) for x, _ in arrays]
    kinds = [
        None if x is None else Kind(x.shape, x.strides, x.itemsize, own)
        for x, (_, own) in zip(keep, arrays, strict=True)
    ]
    form = form_of(memory, lead, tuple(kinds))
    rows, places = form.rows.copy(), np.empty(form.shape, np.int64)
    rows[:, 2] = [0 if x is None else x.__array_interface__["data"][0] for x in keep]
    walk(rows, form.axes, places.reshape(len(rows), -1))
    return Layout(places, form.steps, keep)


def column_blocks(memories: int, columns: int) -> int:
    """Into how many blocks of value columns a memory is cut, so that few memories still give every thread work.

    The columns of a linear memory do not know of each other; what they share is done again for every block.
    """
    return max(1, min(-(-4 * get_num_threads() // max(memories, 1)), columns // 32)) if get_num_threads() > 1 else 1
