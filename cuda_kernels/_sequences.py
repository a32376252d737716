"""Where the sequences of many arrays lie in memory, so that kernels read any layout without a copy or a repeat.

Leading axes are walked as (memory, group): the sequences of queries that share one memory are its group. A kernel finds
a number by a table of sizes and strides, which is the same from call to call and so is sent to the device once.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

__all__ = ["BOTH", "COLUMN", "ROW", "Sequences"]

BOTH, ROW, COLUMN = (0, 1), (0,), (1,)  # which of (row, column) an array's own axes are


class Sequences:
    """The leading axes of one call.

    Parameters
    ----------
    memory
        Leading shape of the states; it broadcasts to ``lead``.
    lead
        Leading shape of the answers.
    """

    def __init__(self, memory: tuple[int, ...], lead: tuple[int, ...]) -> None:
        memory = (1,) * (len(lead) - len(memory)) + memory
        self.lead = lead
        self.sharing = [axis for axis in range(len(lead)) if memory[axis] == 1 and lead[axis] != 1]
        self.owning = [axis for axis in range(len(lead)) if axis not in self.sharing]
        self.shape = tuple(lead[axis] for axis in self.owning)
        self.memories = prod(self.shape)
        self.groups = prod(lead[axis] for axis in self.sharing)

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
        """The inverse of ``view``."""
        sharing = tuple(self.lead[axis] for axis in self.sharing)
        x = x.reshape(self.shape + sharing + x.shape[len(self.shape) + 1 :])
        back = np.argsort(self.owning + self.sharing)
        return x.transpose(*(int(axis) for axis in back), *range(len(self.lead), x.ndim))

    def table(self, *arrays: tuple[Any, tuple[int, ...]]) -> np.ndarray:
        """Sizes of the memory axes; then, for each array, strides of these, of the group, of a row and of a column.

        Strides count numbers. They are 0 along an axis that an array does not have, or has once for all.
        """
        axes = len(self.shape)
        table = np.zeros((1 + len(arrays), axes + 3), np.int64)
        table[0, :axes] = self.shape
        for line, (x, own) in zip(table[1:], arrays, strict=True):
            if x is not None:
                strides = [stride // x.itemsize * (size > 1) for stride, size in zip(x.strides, x.shape, strict=True)]
                line[: axes + 1] = strides[: axes + 1]
                line[[axes + 1 + axis for axis in own]] = strides[axes + 1 :]
        return table
