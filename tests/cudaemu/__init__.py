"""CUDA kernels executed on the CPU, so that every kernel of this project runs in tests without a GPU.

Two routes lead to the same runtime: ``source`` compiles the C++ text of a kernel with g++, ``ptx`` translates the PTX
that Numba made of a Python function. A thread of a block is a fiber; blocks run one after another.

    add = source(text, "add")                       # or ptx(text)
    add(grid, threads, (x, y, np.int32(n)), check=True)

Without ``check`` it sees deadlock, barriers and shuffles in divergent code, wild addresses and endless loops, and
shared memory begins as NaN. With it every load and store is looked at: bounds, memory that was never written, races
between threads and between blocks, misalignment, and (C++ only) overflow of integers and indices outside arrays.
``switched`` lets a launch leave out one barrier or wait of a text that is built once.

It knows what our kernels use: barriers of a block and of a warp, shuffles, static and dynamic shared memory, and what
``tensor.cuh`` writes as PTX: products and loads of a warp with the exact layout in registers, and asynchronous copies,
which land only when their thread waits and must not be looked at before. Sums of products are cut, not rounded, a
little worse than tensor cores are said to do it. Of Hopper it knows what ``wgmma.cuh`` writes: products of a warpgroup,
whose matrices it finds by the bits of their descriptors and whose registers nobody may touch before the wait; what must
be shown to products before they read it; barriers of some threads, and barriers with phases, where a clock for each
thread tells what it knows of the others. Copies that arrive at such a barrier land when nothing else goes on. It has no
atomics, and it is neither a clock nor a model of weak
memory. exp, sin and cos are those of the C library. In PTX all static shared arrays lie in one piece, and so does
dynamic shared memory, so that an overrun from one array into the next is not seen. It needs Linux on x86-64 and g++,
and runs one launch at a time in a process.
"""

import os
from importlib.util import find_spec

import pytest

from .build import ON_GPU, missing
from .launch import (
    ArithmeticFault,
    BarrierFault,
    BoundsFault,
    Fault,
    LaunchFault,
    RaceFault,
    TimeFault,
    UnsetFault,
    WarpFault,
    virtual,
)
from .ptx import ptx
from .source import source
from .switches import switched


def needed(reason: str) -> pytest.MarkDecorator:
    """Skip tests where something is missing; in continuous integration let them fail instead."""
    return pytest.mark.skipif(bool(reason) and not os.environ.get("CI"), reason=reason)


def numba_cuda() -> str:
    """Why Numba cannot make PTX here; empty where it can."""
    return "" if find_spec("numba_cuda") else "numba-cuda is not installed"


__all__ = [
    "ON_GPU",
    "ArithmeticFault",
    "BarrierFault",
    "BoundsFault",
    "Fault",
    "LaunchFault",
    "RaceFault",
    "TimeFault",
    "UnsetFault",
    "WarpFault",
    "missing",
    "needed",
    "numba_cuda",
    "ptx",
    "source",
    "switched",
    "virtual",
]
