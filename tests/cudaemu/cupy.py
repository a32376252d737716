"""A stand-in for CuPy, for tests of what its arrays go through: its memory is that of NumPy, its kernels run here.

Like CuPy's, its arrays are no NumPy arrays and never become any unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from .machines import Cupy


def inner(x: Any) -> Any:
    """Arrays of this module, in any nesting, as the NumPy arrays they hold."""
    if isinstance(x, ndarray):
        return x.held
    if isinstance(x, (list, tuple)):
        return type(x)(inner(each) for each in x)
    return x


def outer(x: Any) -> Any:
    """A NumPy array as one of this module."""
    return ndarray(x) if isinstance(x, (np.ndarray, np.generic)) else x


def wait() -> None:
    """For the device; a stream that records a graph is told to do nothing, and refuses."""
    if streams[-1].recording:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")
    counted["waits"] += 1


class ndarray(NDArrayOperatorsMixin):  # noqa: N801 - CuPy's name
    """An array on the device."""

    __module__ = "cupy"
    __cuda_array_interface__ = {"version": 3}
    METHODS = ("reshape", "transpose", "swapaxes", "astype", "copy", "any", "all", "max", "sum")

    def __init__(self, held: Any, dtype: Any = None, memory: Any = None) -> None:
        self.held = np.asarray(held) if memory is None else np.frombuffer(memory, dtype).reshape(held)
        if memory is None and self.held.base is None:
            allocators[-1](self.held.nbytes)

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            return SimpleNamespace(ptr=self.held.ctypes.data)
        if name == "device":
            return Device()
        if name in self.METHODS:
            called.append(name)
            counted["arrays"] += name in ("astype", "copy")
            return lambda *args, **options: outer(getattr(self.held, name)(*args, **options))
        if name in ("shape", "strides", "dtype", "ndim", "size", "itemsize", "nbytes", "flags", "real", "imag"):
            return outer(getattr(self.held, name))
        raise AttributeError(name)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        mixed = function is not np.asarray and any(isinstance(x, np.ndarray) and x.ndim for x in args)
        assert not mixed, "CuPy and NumPy do not mix"
        called.append(function.__name__)
        counted["arrays"] += function in (np.empty_like, np.zeros_like, np.where, np.concatenate, np.stack)
        if function is np.asarray and not isinstance(args[0], ndarray):
            return array(np.asarray(*args, **{name: x for name, x in options.items() if name != "like"}))
        if function in (np.empty_like, np.zeros_like, np.ones_like) and options.get("shape") == ():
            options = options | {"shape": None}  # CuPy asks whether a shape was given by its truth
        return outer(function(*inner(args), **{name: inner(x) for name, x in options.items()}))

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **options: Any) -> Any:
        assert not any(isinstance(x, np.ndarray) and x.ndim for x in args), "CuPy and NumPy do not mix"
        called.append(function.__name__)
        counted["arrays"] += 1
        return outer(getattr(function, method)(*inner(args), **options))

    def __getitem__(self, place: Any) -> Any:
        called.append("getitem")
        return outer(self.held[inner(place)])

    def __setitem__(self, place: Any, value: Any) -> None:
        assert not isinstance(value, np.ndarray), "CuPy and NumPy do not mix"
        self.held[place] = inner(value)

    def __len__(self) -> int:
        return len(self.held)

    def __bool__(self) -> bool:
        wait()
        return bool(self.held)

    def __str__(self) -> str:
        return str(self.held)

    def __int__(self) -> int:
        wait()
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)

    def get(self) -> np.ndarray:
        """A copy on the host."""
        wait()
        return self.held.copy()

    def set(self, x: np.ndarray) -> None:
        """Copy from the host."""
        assert x.dtype == self.dtype and x.shape == self.shape and x.flags.c_contiguous
        wait()
        self.held[...] = x


class RawModule:
    """Compiled texts."""

    machine = Cupy()

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        own = ("-arch=sm_90a",) if "wgmma.mma_async" in code else ()  # an architecture that the text needs
        assert options == ("-std=c++17", *own)
        self.code = code

    def get_function(self, name: str) -> Any:
        """A kernel: null pointers come as zeros."""

        def launch(grid: tuple[int], threads: tuple[int], arguments: tuple[Any, ...], *, shared_mem: int) -> None:
            assert shared_mem <= getattr(launch, "max_dynamic_shared_size_bytes", 0), "not asked for"
            assert not any(isinstance(x, np.ndarray) and x.ndim for x in arguments), "kernels take arrays on the device"
            given = [None if isinstance(x, np.uintp) and x == 0 else inner(x) for x in arguments]
            called.append("launch")
            self.machine.run(self.code, name, *grid, *threads, given, shared_mem)

        return launch


def array(x: Any) -> ndarray:
    """A copy on the device; a graph that recorded it would send again whatever is on the host by then."""
    assert not (isinstance(x, np.ndarray) and streams[-1].recording), "sent as a part of a graph"
    called.append("array")
    counted["arrays"] += 1
    counted["sent"] += x.nbytes if isinstance(x, np.ndarray) else 0
    return ndarray(np.array(inner(x), order="K"))


asarray = array


def from_dlpack(x: Any) -> ndarray:
    """The memory of an array of another library."""
    return ndarray(x.held)


def empty(shape: tuple[int, ...], dtype: Any) -> ndarray:
    """New memory that holds no numbers."""
    called.append("empty")
    counted["arrays"] += 1
    return ndarray(np.full(shape, np.nan, dtype))


def broadcast_to(x: ndarray, shape: tuple[int, ...]) -> ndarray:
    """A view."""
    called.append("broadcast_to")
    view = np.broadcast_to(x.held, shape)
    return ndarray(view if view.shape != x.shape else x.held)


class Pinned(bytearray):
    """Memory of the host that the device reaches."""

    ptr = 0


class Event:
    """What a stream has come to."""

    def __init__(self, *, disable_timing: bool) -> None:
        assert disable_timing

    def record(self) -> None:
        """All work is done when its call returns."""

    def synchronize(self) -> None:
        """Wait for it."""
        wait()


class Device:
    """The one device, current or not."""

    attributes = {"MultiProcessorCount": 4, "MaxSharedMemoryPerBlockOptin": 227 * 1024}
    compute_capability = "80"

    def __init__(self, number: int = 0) -> None:
        self.id = number

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing to go back to."""


class Stream:
    """A queue of work; ``recording`` says whether it records a graph."""

    ptr, recording = 0, False

    def __init__(self, *, non_blocking: bool = False) -> None:
        self.non_blocking = non_blocking

    def __enter__(self) -> Stream:
        streams.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        streams.pop()

    def is_capturing(self) -> bool:
        """Whether nothing may be waited for."""
        return self.recording

    def synchronize(self) -> None:
        """Wait for all its work."""
        assert not self.recording


class Memory:
    """What CuPy's pool gives out."""

    def __init__(self, size: int) -> None:
        self.size = size
        taken.append(self)


@contextmanager
def using_allocator(allocator: Callable[[int], Any]) -> Iterator[None]:
    """Inside, memory comes from elsewhere."""
    allocators.append(allocator)
    try:
        yield
    finally:
        allocators.pop()


counted = {"waits": 0, "arrays": 0, "sent": 0}  # what no CUDA graph records: waiting, new memory, bytes from the host
called: list[str] = []  # everything that takes the library's time, in order
current = Stream()
streams = [current]
taken: list[Memory] = []
allocators: list[Callable[[int], Any]] = [Memory]
cuda = SimpleNamespace(
    Device=Device,
    Event=Event,
    MemoryPointer=lambda memory, offset: memory,
    UnownedMemory=lambda pointer, size, owner, device: owner,
    Stream=Stream,
    alloc_pinned_memory=Pinned,
    get_allocator=lambda: allocators[-1],
    get_current_stream=lambda: streams[-1],
    using_allocator=using_allocator,
)
