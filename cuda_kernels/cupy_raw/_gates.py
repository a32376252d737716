"""A look at all gates of a call that lie on the GPU, in one launch of ``gates.cu``.

It is not waited for before the verdict is asked for: until then the kernels that use the gates can be launched. A flag
in the memory of the host tells, so that the wait is for this launch and not for those after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import numpy as np

from ttr_np.calling import LIMITS, check_gates, on_device

from .._calls import thin
from ._text import NUMBERS, Kernel, name_of

__all__ = ["Flag", "look", "new_flag"]

KERNEL = Kernel("gates")
MOST = 3  # gates of one call
THREADS = 256
RESIDENT = 8  # blocks of a multiprocessor


class Flag(NamedTuple):
    """What a kernel can raise and the host can see."""

    device: int
    there: Any  # as the kernel sees it
    here: np.ndarray
    launched: Any  # an event


def new_flag(device: int) -> Flag:
    """A flag of the current device, in pinned memory, which both sides reach."""
    import cupy

    pinned = cupy.cuda.alloc_pinned_memory(4)
    here = np.frombuffer(pinned, np.int32, 1)
    here[0] = 0
    memory = cupy.cuda.UnownedMemory(pinned.ptr, 4, pinned, device)
    there = cupy.ndarray((1,), np.int32, cupy.cuda.MemoryPointer(memory, 0))
    return Flag(device, there, here, cupy.cuda.Event(disable_timing=True))


@lru_cache(maxsize=256)
def dense(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int | None:
    """How many numbers lie one after the other from where an array begins; None where there are gaps between them."""
    count = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride and stride != itemsize * count:
            return None
        count *= size if stride else min(size, 1)
    return count


def look(machine: Any, gates: Mapping[str, Any]) -> Callable[[], None]:
    """Look at gates on the GPU, and at those on the host at once.

    Parameters
    ----------
    machine
        Where kernels run.
    gates
        By name, of one dtype.

    Returns
    -------
    verdict : callable
        Raises a ValueError if a gate is outside its limits.
    """
    there = {name: x for name, x in gates.items() if on_device(x)}
    verdict = check_gates({name: thin(x) for name, x in gates.items() if name not in there})
    if not there:
        return verdict
    flag = machine.flag()
    begin(machine, there, flag)

    def wait() -> None:
        flag.launched.synchronize()
        found, flag.here[0] = flag.here[0], 0
        machine.flags[flag.device].append(flag)
        if found:
            check_gates(there)

    return wait


def begin(machine: Any, gates: Mapping[str, Any], flag: Flag) -> None:
    """The launch."""
    pieces = [in_one_piece(x) for x in gates.values()]
    dtype, sizes = pieces[0][0].dtype, tuple([size for _, size in pieces])
    blocks, text, bare = prepared(machine.device().multiprocessors, dtype, tuple(gates), sizes)
    arguments = [*[x if size else None for x, size in pieces], *bare, flag.there]
    if blocks:
        machine.run(text, KERNEL.name, blocks, THREADS, arguments)
    flag.launched.record()


def in_one_piece(x: Any) -> tuple[Any, int]:
    """A gate, or a copy, whose numbers lie one after the other; and how many there are."""
    size = dense(x.shape, x.strides, x.itemsize)
    if size is None:
        x = thin(x).copy()
        size = x.size
    return x, size


@lru_cache(maxsize=256)
def prepared(
    multiprocessors: int, dtype: np.dtype, names: tuple[str, ...], sizes: tuple[int, ...]
) -> tuple[int, str, list[Any]]:
    """Blocks, text and arguments of a launch; of the arguments those between the gates given and the flag."""
    types = {"real": NUMBERS[name_of(dtype)]}
    given = {"found": None} | {f"gate_{i}": None for i in range(MOST)}
    for i in range(MOST):
        given[f"size_{i}"] = sizes[i] if i < len(names) else 0
        given[f"low_{i}"], given[f"high_{i}"] = LIMITS[names[i]] if i < len(names) else (-inf, inf)
    blocks = min(-(-max(sizes) // THREADS), RESIDENT * multiprocessors)
    return blocks, KERNEL.source(types, {}), KERNEL.typed(given, types)[len(names) : -1]
