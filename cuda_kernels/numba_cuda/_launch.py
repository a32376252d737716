"""From a Python function to a launch: views of five axes, a signature, the arrays on the device.

Every array of a kernel is ``(outer, inner, group, own axes)``: the memory at ``[outer, inner]`` and, of those that only
read it, one per group. What is broadcast has stride 0; what was left out is empty. ``machine`` is where kernels run:
tests put the CPU in its place.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from math import prod
from typing import Any

import numpy as np
from numba import from_dtype, types

from ttr_np import calling

from .. import _calls, _plans
from .._calls import keeping
from .._sequences import Sequences
from ..cupy_raw._launch import look
from . import import_compiler

__all__ = ["cuda", "empty", "keeping", "launch", "machine", "per_channel", "replayed", "run"]

cuda = import_compiler()


class Gpu:
    """The current device of numba-cuda, on the current stream of CuPy where that is in use."""

    def __init__(self) -> None:
        self.plans: dict[Any, Any] = {}

    def stream(self) -> Any:
        """Where kernels and copies go: what records a graph, or orders work on CuPy's arrays, orders these."""
        cupy = sys.modules.get("cupy")
        pointer = 0 if cupy is None else cupy.cuda.get_current_stream().ptr
        return stream_at(pointer) if pointer else 0  # as a number: arrays of the default stream's object warn

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """A new array in the container of another."""
        return np.empty_like(like, shape=shape, dtype=dtype, order="C")

    def has(self, x: Any) -> bool:
        """Whether an array is on the device."""
        return not isinstance(x, np.ndarray)

    def place(self) -> int:
        """What plans depend on beside their arrays."""
        return cuda.get_current_device().id

    def own(self, x: Any) -> Any:
        """An array on the device; what is broadcast goes there once."""
        if not isinstance(x, np.ndarray):
            return lying(x, x.shape, x.strides)
        if not x.size:
            return nothing(x.shape, x.dtype)
        thin = np.ascontiguousarray(_calls.thin(x))
        there = cuda.to_device(thin, stream=self.stream())
        strides = tuple(0 if n != m else s for n, m, s in zip(x.shape, thin.shape, thin.strides, strict=True))
        return self.seen(there, x.shape, strides)

    def room(self, x: Any) -> Any:
        """An array on the device for what comes back to x."""
        if not isinstance(x, np.ndarray):
            return lying(x, x.shape, x.strides)
        return cuda.device_array(x.shape, x.dtype, stream=self.stream())

    def back(self, x: Any, into: Any) -> None:
        """Copy to the array of NumPy that it came from."""
        stream = self.stream()
        host = x.copy_to_host(stream=stream)
        (stream or cuda.default_stream()).synchronize()
        into[...] = host

    def hold(self, x: Any) -> Any:
        """A copy that a stream keeps on the device: Numba's own arrays cannot be sliced along every axis."""
        import cupy

        return cupy.array(x)

    def address(self, x: Any) -> int | None:
        """Where an array on the device begins."""
        return x.__cuda_array_interface__["data"][0] if hasattr(x, "__cuda_array_interface__") and x.size else None

    def like(self, held: Any, x: Any) -> Any:
        """The memory of x in the shape and strides of another."""
        return lying(x, held.shape, held.strides)

    def seen(self, x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """The memory of x in other shape and strides."""
        return cuda.cudadrv.devicearray.DeviceNDArray(shape, strides, x.dtype, gpu_data=x.gpu_data)

    def prepare(self, launches: list[_calls.Launch]) -> None:
        """Each compiles when it is first made, because Numba compiles one function at a time."""

    def run(self, function: Any, signature: Any, blocks: int, threads: int, arguments: list[Any]) -> None:
        """Launch."""
        configured(function, signature, blocks, threads, self.stream())(*arguments)


def lying(x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """The memory of an array of CuPy in some shape and strides; what fills it is on the same stream."""
    interface = {"shape": shape, "strides": strides, "typestr": x.dtype.str, "data": (x.data.ptr, False), "version": 3}
    return cuda.from_cuda_array_interface(interface, owner=x, sync=False)


@cache
def nothing(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array without numbers, in the place of one that was left out."""
    return cuda.to_device(np.empty(shape, dtype))


@lru_cache(maxsize=64)
def stream_at(pointer: int) -> Any:
    """A stream of CuPy."""
    return cuda.external_stream(pointer)


@cache
def compiled(function: Any, signature: Any) -> Any:
    """A function for the current device."""
    return cuda.jit(signature)(function)


@lru_cache(maxsize=1024)
def configured(function: Any, signature: Any, blocks: int, threads: int, stream: Any) -> Any:
    """A kernel with its grid. That a small call makes a small grid is no mistake that Numba should warn users of."""
    kernel = compiled(function, signature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kernel[blocks, threads, stream]


machine: Any = Gpu()


def run(core: Callable[..., Any], *arguments: Any, **common: Any) -> Any:
    """Call an operator's core with everything a caller may ask of any operator."""
    return calling.run(core, *arguments, look=look, **common)


def replayed(core: Callable[..., Any]) -> Callable[..., Any]:
    """A core that does nothing but launch, and so needs to find out how only once for all calls alike."""
    return _plans.replayed(current, core)


def current() -> Any:
    """Where kernels run now."""
    return machine


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
    signature = signature_of(tuple([(x.dtype, x.ndim) for x in views.values()]), tuple([x.dtype for x in numbers]))
    here = {name: machine.room(x) if name in _calls.ANSWERS else machine.own(x) for name, x in views.items()}
    for name, (x, _) in arrays.items():
        if x is None:
            _calls.fixed(here[name])
    what = (function, signature, sequences.memories * blocks, threads)
    _calls.begin(_calls.Launch(machine, what, [*here.values(), *numbers]))
    for name in written:
        if arrays[name][0] is not None and not machine.has(views[name]):
            machine.back(here[name], views[name])


@lru_cache(maxsize=1024)
def signature_of(arrays: tuple[tuple[Any, int], ...], numbers: tuple[Any, ...]) -> Any:
    """What a kernel is compiled for: dtype and number of axes of each array, and the dtype of each number."""
    array_types = [types.Array(from_dtype(dtype), ndim, "A") for dtype, ndim in arrays]
    return types.void(*array_types, *[from_dtype(dtype) for dtype in numbers])


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
