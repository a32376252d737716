"""Jobs shared among threads.

The kernels are compiled without the interpreter lock, so plain Python threads run them side by side: any number of
callers at once is safe, nothing is compiled twice for it, and a job does not know which thread does it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import get_num_threads

from ._cache import compiled
from ._panels import panels
from ._sequences import Layout

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Work", "keeping", "share", "within"]

PIECES = 4  # per thread: what one thread has not begun another can do
WORTH = 2e5  # multiplications; less than this is done before a second thread has woken up

Scratch = tuple[np.dtype, Sequence[tuple[int, int]]]
_kept: ContextVar[list[Work] | None] = ContextVar("ttr_np_kept", default=None)
_get_core = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = Lock()


def forget_pools() -> None:
    """A forked child has the pools' names but not their threads, and perhaps a lock that nobody will release."""
    global _lock
    _lock = Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_pools)


def pool(threads: int) -> ThreadPoolExecutor:
    """The helpers of the calling thread, kept for the next call."""
    from concurrent.futures import ThreadPoolExecutor  # which cannot be imported while the interpreter goes down

    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="ttr_np")
        return _pools[threads]


def start(function: Callable[..., None], *arguments: Any) -> Future[None] | None:
    """Let a helper call a function; None where the interpreter is going down and starts no thread any more."""
    try:
        return pool(get_num_threads()).submit(elsewhere, current_core(), function, *arguments)
    except RuntimeError:
        return None


def elsewhere(core: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call a function, not on the core of the thread that waits for it.

    Where threads of a BLAS spin for more work, no core looks idle: a helper wakes up on its caller's and shares it for
    milliseconds. A spinning thread gives way.
    """
    if core >= 0 and current_core() == core:
        allowed = os.sched_getaffinity(0)
        if len(allowed) > 1:
            os.sched_setaffinity(0, allowed - {core})
            os.sched_setaffinity(0, allowed)
    function(*arguments)


def current_core() -> int:
    """The core of this thread; -1 where the system does not say."""
    return -1 if _get_core is None else _get_core()


class Pieces:
    """Ranges of jobs, each handed out once."""

    def __init__(self, jobs: int, pieces: int) -> None:
        self.bounds: Iterator[tuple[int, int]] = iter(
            [(jobs * i // pieces, jobs * (i + 1) // pieces) for i in range(pieces)]
        )
        self.lock = Lock()

    def __iter__(self) -> Pieces:
        return self

    def __next__(self) -> tuple[int, int]:
        with self.lock:
            return next(self.bounds)


class Work(NamedTuple):
    """Jobs that make up a call; called, it does them, as often as one likes: they read and write where they did."""

    kernel: Callable[..., None]
    jobs: int
    cost: float
    scratch: Scratch
    layout: Layout  # also keeps alive what its addresses point to
    arguments: tuple[Any, ...]
    finish: Callable[[], None] | None

    def __call__(self) -> None:
        """Do all jobs, on Numba's number of threads."""
        threads = 1 if self.cost < WORTH else min(get_num_threads(), self.jobs)
        pieces = Pieces(self.jobs, min(self.jobs, PIECES * threads)) if threads > 1 else [(0, self.jobs)]
        helpers = [helper for _ in range(threads - 1) if (helper := start(self.do, pieces)) is not None]
        try:
            self.do(pieces)
        finally:
            for helper in helpers:
                helper.result()
        if self.finish is not None:
            self.finish()

    def again(self) -> Callable[[], None]:
        """The same for many calls: where one thread is enough, its scratch is kept from one to the next."""
        if min(get_num_threads(), self.jobs) > 1 and self.cost >= WORTH:
            return self
        room, table = panels(*self.scratch)
        kernel, arguments = self.kernel, (*self.layout[:2], *self.arguments, 0, self.jobs)

        def step(_room: np.ndarray = room) -> None:  # the argument keeps the memory
            kernel(table, *arguments)
            if self.finish is not None:
                self.finish()

        return step

    def do(self, pieces: Iterable[tuple[int, int]]) -> None:
        """Do pieces until none is left, in scratch of one's own."""
        _room, table = panels(*self.scratch)  # the name keeps the memory
        for first, last in pieces:
            self.kernel(table, *self.layout[:2], *self.arguments, first, last)


@compiled
def within(x, low, high):
    """Whether all numbers lie in a range; NaN does not."""
    for number in x:
        if not low <= number <= high:
            return False
    return True


@contextmanager
def keeping() -> Iterator[list[Work]]:
    """Inside, work is not done but kept, to be done over and over again."""
    kept: list[Work] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def share(
    kernel: Callable[..., None],
    jobs: int,
    cost: float,
    scratch: Scratch,
    layout: Layout,
    *arguments: Any,
    finish: Callable[[], None] | None = None,
) -> None:
    """Call ``kernel(panels, places, steps, *arguments, first, last)`` on ranges that make up all jobs.

    Parameters
    ----------
    kernel
        Compiled with ``nogil=True``; jobs must not depend on each other.
    jobs
        How many there are.
    cost
        Multiplications of all jobs together: few are not worth a second thread.
    scratch
        Dtype and shapes of the panels that a thread needs, see ``_panels.panels``.
    layout
        Where the arrays are.
    *arguments
        What else the kernel is told, the same for all jobs.
    finish
        What is to be done after them.
    """
    work, kept = Work(kernel, jobs, cost, scratch, layout, arguments, finish), _kept.get()
    work() if kept is None else kept.append(work)
