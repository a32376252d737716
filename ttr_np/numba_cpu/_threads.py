"""Jobs shared among threads.

The kernels are compiled without the interpreter lock, so plain Python threads run them side by side: any number of
callers at once is safe, nothing is compiled twice for it, and a job does not know which thread does it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
from numba import get_num_threads

from ._panels import panels

__all__ = ["share"]

PIECES = 4  # per thread: what one thread has not begun another can do
WORTH = 2e5  # multiplications; less than this is done before a second thread has woken up

Scratch = tuple[np.dtype, Sequence[tuple[int, int]]]
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a child has the pools' names but not their threads


def pool(threads: int) -> ThreadPoolExecutor:
    """The helpers of the calling thread, kept for the next call."""
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="ttr_np")
        return _pools[threads]


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


def work(kernel: Callable[..., None], scratch: Scratch, arguments: tuple[Any, ...], pieces: Iterable[Any]) -> None:
    """Do pieces until none is left, in scratch of one's own."""
    _room, table = panels(*scratch)  # the name keeps the memory
    for first, last in pieces:
        kernel(table, *arguments, first, last)


def share(kernel: Callable[..., None], jobs: int, cost: float, scratch: Scratch, *arguments: Any) -> None:
    """Call ``kernel(panels, *arguments, first, last)`` on ranges that make up all jobs, on Numba's number of threads.

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
    *arguments
        Of the kernel, the same for all jobs.
    """
    threads = 1 if cost < WORTH else min(get_num_threads(), jobs)
    if threads <= 1:
        work(kernel, scratch, arguments, [(0, jobs)])
        return
    pieces = Pieces(jobs, min(jobs, PIECES * threads))
    helpers = [pool(get_num_threads()).submit(work, kernel, scratch, arguments, pieces) for _ in range(threads - 1)]
    try:
        work(kernel, scratch, arguments, pieces)
    finally:
        for helper in helpers:
            helper.result()
