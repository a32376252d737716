"""What both backends do between an operator's core and a launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from ._sequences import Sequences

__all__ = ["Arrays", "Grid", "Machine", "empty", "grid", "split", "there_and_back", "thin"]

THREADS = 128  # of a block
ROWS = 32  # numbers of a state column that one thread holds in registers; the others are those of neighbouring lanes
LONGEST = 512  # state column: what lanes of one warp hold, and what fits in shared memory

Arrays = Mapping[str, tuple[Any, tuple[int, ...]]]  # by name: an array or None, and which of row and column it has


class Machine(Protocol):
    """Where kernels run: a GPU, or in tests the CPU."""

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """A new array in the container of another."""

    def own(self, x: Any) -> Any:
        """An array on this machine: the same memory if it is here already."""

    def back(self, x: Any, into: Any) -> None:
        """Copy an array of this machine to where ``own`` took it from, unless it is the same memory."""


class Grid(NamedTuple):
    """How a launch is cut: so many blocks for each memory."""

    blocks: int  # per memory
    threads: int
    shared: int = 0  # bytes of a block, beside those that its text declares


def empty(machine: Machine, sequences: Sequences, own: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """An array for answers, which lie in memory as kernels walk them."""
    return sequences.restored(machine.empty(sequences.shape + (sequences.groups,) + own, dtype, like))


def split(axis: str, rows: int, fields: int = 1) -> tuple[int, int]:
    """Rows of a state column per thread that holds so many fields, and how many neighbouring lanes share the column.

    Raises
    ------
    ValueError
        If a column is longer than the lanes can hold.
    """
    if rows > LONGEST:
        raise ValueError(f"axis {axis!r} is {rows}; the GPU backends hold up to {LONGEST}")
    parts = 1
    while rows * fields > ROWS * parts:
        parts *= 2
    return max(-(-rows // parts), 1), parts


def grid(columns: int, parts: int) -> Grid:
    """Blocks and threads for so many columns, each shared by ``parts`` lanes."""
    threads = min(THREADS, max(-(-columns * parts // 32) * 32, 32))
    return Grid(max(-(-columns * parts // threads), 1), threads)


def thin(x: np.ndarray) -> np.ndarray:
    """An array with each of its numbers once: axes along which it is broadcast have size 1."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]


@contextmanager
def there_and_back(machine: Machine, views: Mapping[str, Any], written: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Arrays on the machine for the time of a launch; those named as written are brought back after it."""
    here = {name: None if x is None else machine.own(x) for name, x in views.items()}
    yield here
    for name in written:
        if views[name] is not None:
            machine.back(here[name], views[name])
