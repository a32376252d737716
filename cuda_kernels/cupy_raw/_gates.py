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
        machine.flags.append(flag)
        if found:
            check_gates(there)

    return wait


def begin(machine: Any, gates: Mapping[str, Any], flag: Flag) -> None:
    """The launch."""
    arguments, total = {"found": flag.there}, 0
    for i, name in enumerate([*gates, None, None][:MOST]):
        x, size = None if name is None else gates[name], 0
        if x is not None:
            size = dense(x.shape, x.strides, x.itemsize)
            if size is None:
                x = thin(x).copy()
                size = x.size
        low, high = LIMITS.get(name, (-inf, inf))
        arguments |= {f"gate_{i}": x if size else None, f"size_{i}": size, f"low_{i}": low, f"high_{i}": high}
        total = max(total, size)
    blocks = min(-(-total // THREADS), RESIDENT * machine.device().multiprocessors)
    types = {"real": NUMBERS[name_of(next(iter(gates.values())).dtype)]}
    if total:
        given = KERNEL.typed(arguments, types)
        machine.run(KERNEL.source(types, {}), KERNEL.name, blocks, THREADS, given)
    flag.launched.record()
