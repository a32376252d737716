"""From a Python function to a launch: views of five axes, a signature, the arrays on the device.

Every array of a kernel is ``(outer, inner, group, own axes)``: the memory at ``[outer, inner]`` and, of those that only
read it, one per group. What is broadcast has stride 0; what was left out is empty. ``machine`` is where kernels run:
tests put the CPU in its place.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import numba_cuda  # noqa: F401 - without it, numba.cuda below would be Numba's own target
import numpy as np
from numba import cuda, from_dtype, types

from ttr_np import calling

from .. import _calls
from .._calls import keeping
from .._sequences import Sequences

__all__ = ["cuda", "empty", "keeping", "launch", "machine", "per_channel", "run"]


class Gpu:
    """The current device of numba-cuda, on the current stream of CuPy where that is in use."""

    def stream(self) -> Any:
        """Where kernels and copies go: what records a graph, or orders work on CuPy's arrays, orders these."""
        cupy = sys.modules.get("cupy")
        pointer = 0 if cupy is None else cupy.cuda.get_current_stream().ptr
        return cuda.external_stream(pointer) if pointer else cuda.default_stream()

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """A new array in the container of another."""
        return np.empty_like(like, shape=shape, dtype=dtype)

    def own(self, x: Any) -> Any:
        """An array on the device; what is broadcast goes there once."""
        if not isinstance(x, np.ndarray):
            return cuda.as_cuda_array(x, sync=False)  # what fills it is on the same stream
        thin = np.ascontiguousarray(_calls.thin(x))
        there = cuda.to_device(thin, stream=self.stream())
        strides = tuple(0 if n != m else s for n, m, s in zip(x.shape, thin.shape, thin.strides, strict=True))
        return self.seen(there, x.shape, strides)

    def room(self, x: Any) -> Any:
        """An array on the device for what comes back to x."""
        if not isinstance(x, np.ndarray):
            return cuda.as_cuda_array(x, sync=False)
        return cuda.device_array(x.shape, x.dtype, stream=self.stream())

    def back(self, x: Any, into: Any) -> None:
        """Copy to the array of NumPy that it came from."""
        if isinstance(into, np.ndarray):
            into[...] = x.copy_to_host(stream=self.stream())
            self.stream().synchronize()

    def hold(self, x: Any) -> Any:
        """A copy that a stream keeps on the device: Numba's own arrays cannot be sliced along every axis."""
        import cupy

        return cupy.array(x)

    def address(self, x: Any) -> int | None:
        """Where an array on the device begins."""
        return x.__cuda_array_interface__["data"][0] if hasattr(x, "__cuda_array_interface__") and x.size else None

    def like(self, held: Any, x: Any) -> Any:
        """The memory of x in the shape and strides of another."""
        return self.seen(cuda.as_cuda_array(x, sync=False), held.shape, held.strides)

    def seen(self, x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """The memory of x in other shape and strides."""
        return cuda.cudadrv.devicearray.DeviceNDArray(shape, strides, x.dtype, gpu_data=x.gpu_data)

    def run(self, function: Any, signature: Any, blocks: int, threads: int, arguments: list[Any]) -> None:
        """Launch."""
        configured(function, signature, blocks, threads, self.stream())(*arguments)


@cache
def compiled(function: Any, signature: Any) -> Any:
    """A function for the current device."""
    return cuda.jit(signature)(function)


def configured(function: Any, signature: Any, blocks: int, threads: int, stream: Any) -> Any:
    """A kernel with its grid. That a small call makes a small grid is no mistake that Numba should warn users of."""
    kernel = compiled(function, signature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kernel[blocks, threads, stream]


machine: Any = Gpu()


def run(core: Callable[..., Any], *arguments: Any, **common: Any) -> Any:
    """Call an operator's core with everything a caller may ask of any operator."""
    return calling.run(core, *arguments, **common)


def empty(sequences: Sequences, own: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """An array for answers in the container of another."""
    return _calls.empty(machine, sequences, own, dtype, like)


def launch(
    function: Callable[..., None],
    sequences: Sequences,
    arrays: _calls.Arrays,
    written: tuple[str, ...],
    tokens: int,
    columns: int,
    parts: int,
    *scalars: Any,
    grid: _calls.Grid | None = None,
) -> None:
    """Run a kernel over all sequences.

    Parameters
    ----------
    function
        The kernel; its parameters are the arrays, the scalars, and the number of blocks per memory.
    sequences
        Over what.
    arrays
        In the order of the parameters; what was left out takes the dtype of the first.
    written
        Names of those that the kernel writes.
    tokens, columns, parts
        Sizes, and lanes that share a column.
    *scalars
        Whole numbers, or numbers of a dtype of NumPy.
    grid
        How it is cut; without one, ``parts`` threads take a column.
    """
    if not tokens * sequences.memories * sequences.groups:
        return
    blocks, threads, _ = grid or _calls.grid(columns, parts)
    dtype = next(iter(arrays.values()))[0].dtype
    views = {name: paired(sequences, x, own, dtype, name in written) for name, (x, own) in arrays.items()}
    numbers = [*(np.int64(x) if isinstance(x, int) else x for x in scalars), np.int64(blocks)]
    array_types = [types.Array(from_dtype(x.dtype), x.ndim, "A") for x in views.values()]
    signature = types.void(*array_types, *(from_dtype(x.dtype) for x in numbers))
    with _calls.there_and_back(machine, views, written) as here:
        what = (function, signature, sequences.memories * blocks, threads)
        _calls.begin(_calls.Launch(machine, what, [*here.values(), *numbers]))


def per_channel(log_decay: Any, q: Any) -> Any:
    """Gates with a channel axis; one per step holds for all channels."""
    if log_decay is None or log_decay.ndim == q.ndim:
        return log_decay
    return np.broadcast_to(log_decay[..., None], log_decay.shape + q.shape[-1:])


def paired(sequences: Sequences, x: Any, own: tuple[int, ...], dtype: Any, written: bool) -> Any:
    """An array as (outer, inner, group, own axes); a copy only where its outer axes do not lie evenly."""
    if x is None:
        return np.empty((0,) * (3 + len(own)), dtype)
    x = sequences.view(x, own)
    axes = len(sequences.shape)
    if not written:
        x = np.broadcast_to(x, sequences.shape + (sequences.groups,) + x.shape[axes + 1 :])
    outer, inner = prod(sequences.shape[:-1]), sequences.shape[-1] if axes else 1
    return x.reshape((outer, inner) + x.shape[axes:])
