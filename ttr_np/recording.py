"""What a CUDA graph must find as it was, whenever it is launched, while CuPy records one.

A graph keeps addresses and owns no memory. So whatever memory is taken for it, even for a moment, is never given to
anybody else. And what comes from the host is sent at once, not as a part of the graph: every launch would send it again
from a place on the host that is somebody else's by then.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

__all__ = ["is_recording", "lasting", "send_apart", "sent"]

RECORDED: list[Any] = []  # memory of all graphs, as long as the process lives


def is_recording() -> bool:
    """Whether CuPy's current stream records: no number can be looked at then."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and cupy.cuda.get_current_stream().is_capturing()


def lasting() -> AbstractContextManager[Any]:
    """Inside, memory that CuPy gives to this thread for a graph is held for good. Only for where there is a GPU."""
    if not is_recording():
        return nullcontext()
    cuda = sys.modules["cupy"].cuda
    take = cuda.get_allocator()

    def hold(size: int) -> Any:
        memory = take(size)
        RECORDED.append(memory)
        return memory

    return cuda.using_allocator(hold)


def sent(x: np.ndarray, device: Any) -> Any:
    """An array of NumPy where an array of CuPy is."""
    return send_apart(x) if is_recording() else np.asarray(x, like=device)


def send_apart(x: np.ndarray) -> Any:
    """An array of NumPy on CuPy's current GPU, for every stream to read: it is there when this returns."""
    cupy = sys.modules["cupy"]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        there = cupy.asarray(x)
    stream.synchronize()
    return there
