"""A stand-in for CuPy, for tests of what its arrays go through: its memory is that of NumPy, its kernels run here.

Like CuPy's, its arrays are no NumPy arrays and never become any unasked.
"""

from __future__ import annotations

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


class ndarray(NDArrayOperatorsMixin):  # noqa: N801 - CuPy's name
    """An array on the device."""

    __cuda_array_interface__ = {"version": 3}
    METHODS = ("reshape", "transpose", "swapaxes", "astype", "copy", "any", "all", "max", "sum")

    def __init__(self, held: Any) -> None:
        self.held = np.asarray(held)

    def __getattr__(self, name: str) -> Any:
        if name in self.METHODS:
            return lambda *args, **options: outer(getattr(self.held, name)(*args, **options))
        if name in ("shape", "strides", "dtype", "ndim", "size", "itemsize", "flags", "real", "imag"):
            return outer(getattr(self.held, name))
        raise AttributeError(name)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        return outer(function(*inner(args), **{name: inner(x) for name, x in options.items()}))

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **options: Any) -> Any:
        assert not any(isinstance(x, np.ndarray) and x.ndim for x in args), "CuPy and NumPy do not mix"
        return outer(getattr(function, method)(*inner(args), **options))

    def __getitem__(self, place: Any) -> Any:
        return outer(self.held[inner(place)])

    def __setitem__(self, place: Any, value: Any) -> None:
        self.held[place] = inner(value)

    def __len__(self) -> int:
        return len(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __str__(self) -> str:
        return str(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def get(self) -> np.ndarray:
        """A copy on the host."""
        return self.held.copy()


class RawModule:
    """Compiled texts."""

    machine = Cupy()

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        assert options == ("-std=c++17",)
        self.code = code

    def get_function(self, name: str) -> Any:
        """A kernel: null pointers come as zeros."""

        def launch(grid: tuple[int], threads: tuple[int], arguments: tuple[Any, ...]) -> None:
            given = [None if isinstance(x, np.uintp) and x == 0 else inner(x) for x in arguments]
            self.machine.run(self.code, name, *grid, *threads, given)

        return launch


def asarray(x: Any) -> ndarray:
    """A copy on the device, as from the host."""
    return ndarray(np.array(x, order="K"))


def broadcast_to(x: ndarray, shape: tuple[int, ...]) -> ndarray:
    """A view."""
    view = np.broadcast_to(x.held, shape)
    return ndarray(view if view.shape != x.shape else x.held)


cuda = SimpleNamespace(Device=lambda: SimpleNamespace(id=0))
