"""Where the sequences of many arrays lie in memory, so that kernels read any layout without a copy or a repeat.

Leading axes are walked as (memory, group): the sequences of queries that share one memory are its group. A kernel finds
a number by a table of sizes and strides, which is the same from call to call and so is sent to the device once.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BOTH", "COLUMN", "ROW", "Place", "Sequences", "place_of"]

BOTH, ROW, COLUMN = (0, 1), (0,), (1,)  # which of (row, column) an array's own axes are


class Place(NamedTuple):
    """How an array lies in memory, wherever it begins."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    own: tuple[int, ...]


def place_of(x: Any, own: tuple[int, ...]) -> Place | None:
    """How an array lies; one that was left out lies nowhere."""
    return None if x is None else Place(x.shape, x.strides, x.itemsize, own)


class Sequences:
    """The leading axes of one call; there is one object for all calls with the same axes.

    Parameters
    ----------
    memory
        Leading shape of the states.
    *reading
        Leading shapes of what reads them; together all broadcast to the leading shape of the answers.
    """

    @staticmethod
    @lru_cache(maxsize=256)
    def __new__(cls, memory: tuple[int, ...], *reading: tuple[int, ...]) -> Sequences:
        """Looked up, or worked out."""
        self, lead = super().__new__(cls), np.broadcast_shapes(memory, *reading)
        memory = (1,) * (len(lead) - len(memory)) + memory
        self.lead = lead
        self.sharing = [axis for axis in range(len(lead)) if memory[axis] == 1 and lead[axis] != 1]
        self.owning = [axis for axis in range(len(lead)) if axis not in self.sharing]
        self.shape = tuple(lead[axis] for axis in self.owning)
        self.memories = prod(self.shape)
        self.groups = prod(lead[axis] for axis in self.sharing)
        self.in_order = self.owning + self.sharing == list(range(len(lead)))
        return self

    def view(self, x: Any, own: tuple[int, ...]) -> Any:
        """An array as (memory axes, group, own axes); a copy only where the axes of a group do not lie evenly."""
        outer = x.ndim - len(own)
        x = x.reshape((1,) * (len(self.lead) - outer) + x.shape)
        x = x.transpose(*self.owning, *self.sharing, *range(len(self.lead), x.ndim))
        before, after = len(self.owning), len(self.lead)
        sharing, wanted = x.shape[before:after], tuple(self.lead[axis] for axis in self.sharing)
        if sharing != wanted and any(size != 1 for size in sharing):
            sharing, x = wanted, np.broadcast_to(x, x.shape[:before] + wanted + x.shape[after:])
        return x.reshape(x.shape[:before] + (prod(sharing),) + x.shape[after:])

    def restored(self, x: Any) -> Any:
        """The inverse of ``view``; axes along which an array is the same may have size 1."""
        before = len(self.shape)
        sharing = tuple(self.lead[axis] if x.shape[before] != 1 else 1 for axis in self.sharing)
        x = x.reshape(x.shape[:before] + sharing + x.shape[before + 1 :])
        back = np.argsort(self.owning + self.sharing)
        return x.transpose(*(int(axis) for axis in back), *range(len(self.lead), x.ndim))

    def level(self, x: Any, own: tuple[int, ...]) -> Any:
        """An array as it is where the axes of its groups lie evenly, else a copy of which that is true."""
        if x is None or self.strides(place_of(x, own)) is not None:
            return x
        return self.restored(self.view(x, own))

    @lru_cache(maxsize=4096)  # noqa: B019 - sequences are looked up too
    def strides(self, place: Place) -> tuple[int, ...] | None:
        """Strides of the memory axes, of the group, of a row and of a column; None where those of a group are uneven.

        Strides count numbers. They are 0 along an axis that an array does not have, or has once for all.
        """
        outer, spare = len(place.shape) - len(place.own), len(self.lead) - len(place.shape) + len(place.own)
        steps = [step // place.itemsize * (size > 1) for step, size in zip(place.strides, place.shape, strict=True)]
        lead = [0] * spare + steps[:outer]
        group, within = 0, 1  # the stride of the last axis of a group, and how many numbers of a group that makes
        for axis in reversed(self.sharing):
            if within == 1:
                group = lead[axis]
            elif lead[axis] != group * within:
                return None
            within *= self.lead[axis]
        line = [*(lead[axis] for axis in self.owning), group, 0, 0]
        for axis, step in zip(place.own, steps[outer:], strict=True):
            line[axis - 2] = step
        return tuple(line)

    @lru_cache(maxsize=1024)  # noqa: B019
    def table(self, *places: Place | None) -> np.ndarray | None:
        """Sizes of the memory axes; then the strides of each array. None where one of them is uneven."""
        width = len(self.shape) + 3
        lines = [(0,) * width if place is None else self.strides(place) for place in places]
        if None in lines:
            return None
        table = np.array([self.shape + (0,) * 3, *lines], np.int64)
        table.flags.writeable = False
        return table
