"""What both backends do between an operator's core and a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from ttr_np.calling import on_device
from ttr_np.recording import sent

from ._sequences import Sequences

__all__ = [
    "Arrays",
    "Grid",
    "Launch",
    "Machine",
    "alike",
    "begin",
    "empty",
    "fixed",
    "grid",
    "keeping",
    "placed",
    "scratch",
    "side_by_side",
    "split",
    "start",
    "there_and_back",
    "thin",
    "watching",
]

THREADS = 128  # of a block
ROWS = 32  # numbers of a state column that one thread holds in registers; the others are those of neighbouring lanes
LONGEST = 512  # state column: what lanes of one warp hold, and what fits in shared memory

# Arrays that kernels write and never read.
ANSWERS = frozenset({"o", "o_imag", "S_next", "P_next", "G_next", "H_next", "z_next", "h_next", "h_next_imag"})

Arrays = Mapping[str, tuple[Any, tuple[int, ...]]]  # by name: an array or None, and which of row and column it has


class Machine(Protocol):
    """Where kernels run: a GPU, or in tests the CPU."""

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """A new array in the container of another."""

    def has(self, x: Any) -> bool:
        """Whether kernels can take an array as it is."""

    def own(self, x: Any) -> Any:
        """An array on this machine: the same memory if it is here already."""

    def room(self, x: Any) -> Any:
        """An array on this machine for what comes back to x: its memory if it is here, else new."""

    def back(self, x: Any, into: Any) -> None:
        """Copy an array of this machine to where ``own`` took it from, unless it is the same memory."""

    def hold(self, x: Any) -> Any:
        """An array that a stream keeps on this machine, in a container that slices; a copy of x."""

    def address(self, x: Any) -> int | None:
        """Where an argument's memory begins; None if it is no array or empty."""

    def like(self, held: Any, x: Any) -> Any:
        """An argument in another's place: the memory of x, seen as the other is seen."""

    def run(self, *launch: Any) -> None:
        """Make a launch."""

    def prepare(self, launches: list[Launch]) -> None:
        """Get ready for launches that are about to be made."""


class Grid(NamedTuple):
    """How a launch is cut: so many blocks for each memory."""

    blocks: int  # per memory
    threads: int
    shared: int = 0  # bytes of a block, beside those that its text declares


class Launch(NamedTuple):
    """A launch whose arguments are packed; it is made as often as one likes, on the same memory or on other."""

    machine: Machine
    what: tuple[Any, ...]  # kernel, blocks and threads, as the machine takes them
    arguments: list[Any]
    more: tuple[Any, ...] = ()  # what the machine takes after the arguments

    def __call__(self, others: Mapping[int, Any] | None = None) -> None:
        """Launch, with other arrays in the places of some arguments."""
        arguments = list(self.arguments)
        for place, x in (others or {}).items():
            arguments[place] = self.machine.like(arguments[place], x)
        self.machine.run(*self.what, arguments, *self.more)

    def places(self, x: Any) -> list[int]:
        """Arguments that begin where an array begins."""
        wanted = self.machine.address(x)
        return [i for i, y in enumerate(self.arguments) if wanted is not None and self.machine.address(y) == wanted]


_kept: ContextVar[list[Launch] | None] = ContextVar("ttr_np_launches", default=None)


@contextmanager
def keeping() -> Iterator[list[Launch]]:
    """Inside, launches are not made but kept, to be made over and over again."""
    kept: list[Launch] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


class Watch(NamedTuple):
    """What somebody who watches has seen."""

    made: list[tuple[Any, Callable[..., Any]]]  # arrays, and what makes others like them
    fixed: list[Any]  # arguments that are the same for all calls alike
    launches: list[Launch]


_watch: ContextVar[Watch | None] = ContextVar("ttr_np_watch", default=None)


@contextmanager
def watching() -> Iterator[Watch]:
    """Inside, what is made and launched is also noted."""
    watch = Watch([], [], [])
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


_waiting: ContextVar[list[Launch] | None] = ContextVar("ttr_np_waiting", default=None)


@contextmanager
def side_by_side() -> Iterator[None]:
    """Inside, launches wait for the end, so that their kernels can be compiled side by side.

    As a decorator it is for what launches, makes new arrays, and does not touch what the launches leave in them. Within
    another, launches wait for the end of the outer one: they keep their order.
    """
    if _waiting.get() is not None:
        yield
        return
    token = _waiting.set([])
    try:
        yield
        make_waiting()
    finally:
        _waiting.reset(token)


def make_waiting() -> None:
    """Make the launches that wait."""
    waiting = _waiting.get()
    if not waiting:
        return
    if len(waiting) > 1:
        waiting[0].machine.prepare(waiting)
    for launch in waiting:
        launch()
    waiting.clear()


def begin(launch: Launch) -> None:
    """Make a launch, let it wait, or keep it."""
    kept, watch, waiting = _kept.get(), _watch.get(), _waiting.get()
    if kept is not None:
        kept.append(launch)
    elif waiting is not None:
        waiting.append(launch)
    else:
        launch()
    if watch is not None:
        watch.launches.append(launch)


def start(machine: Machine, what: tuple[Any, ...], arguments: list[Any], more: tuple[Any, ...]) -> None:
    """Make a launch, which is an object only if somebody keeps or watches it."""
    if _kept.get() is None and _watch.get() is None:
        machine.run(*what, arguments, *more)
    else:
        begin(Launch(machine, what, arguments, more))


def fixed(x: Any) -> Any:
    """An argument that is the same for all calls alike, which is noted."""
    watch = _watch.get()
    if watch is not None:
        watch.fixed.append(x)
    return x


def noted(x: Any, maker: Callable[[Machine, Any], Any]) -> Any:
    """A new array, which is noted; the maker makes others like it, in the container of another array."""
    watch = _watch.get()
    if watch is not None:
        watch.made.append((x, maker))
    return x


def empty(machine: Machine, sequences: Sequences, own: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """An array for answers, which lie in memory as kernels walk them."""
    maker = partial(answers, sequences, own, dtype)
    return noted(maker(machine, like), maker)


def answers(sequences: Sequences, own: tuple[int, ...], dtype: Any, machine: Machine, like: Any) -> Any:
    """What ``empty`` makes."""
    if sequences.in_order:
        return machine.empty(sequences.lead + own, dtype, like)
    return sequences.restored(machine.empty(sequences.shape + (sequences.groups,) + own, dtype, like))


def alike(machine: Machine, x: Any) -> Any:
    """A new array of the shape and dtype of another, in C order."""
    shape, dtype = x.shape, x.dtype
    return noted(machine.empty(shape, dtype, x), lambda machine, like: machine.empty(shape, dtype, like))


def scratch(x: Any) -> Any:
    """A new array that one launch leaves to the next, which is noted."""
    size = x.size
    return noted(x, lambda machine, _: machine.scratch(size))


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


def placed(x: Any, dtype: Any, like: Any) -> Any:
    """A number or an array, in some dtype, where another array is."""
    if isinstance(like, np.ndarray) or on_device(x):
        return np.asarray(x, dtype, like=like)
    return sent(np.asarray(x, dtype), like)


def thin(x: np.ndarray) -> np.ndarray:
    """An array with each of its numbers once: axes along which it is broadcast have size 1."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]


@contextmanager
def there_and_back(
    machine: Machine, sequences: Sequences, arrays: Arrays, written: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Arrays on the machine for the time of a launch; those named as written are brought back after it."""
    away = {
        name: sequences.view(x, own) for name, (x, own) in arrays.items() if x is not None and not machine.has(x)
    }
    sent = {name: machine.room(x) if name in ANSWERS else machine.own(x) for name, x in away.items()}
    yield {name: sequences.restored(sent[name]) if name in sent else x for name, (x, _) in arrays.items()}
    for name in written:
        if name in sent:
            make_waiting()
            machine.back(sent[name], away[name])
