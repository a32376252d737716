"""The CPU in place of a GPU: what the backends' launchers ask of a machine, with every launch on the runner."""

from __future__ import annotations

import hashlib
import marshal
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import distributions
from itertools import count
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from . import build
from .build import ON_GPU
from .launch import Kernel, root_of
from .ptx import flatten, ptx
from .source import source
from .switches import switched

PACKAGES = {"cupy": "cuda_kernels.cupy_raw", "numba-cuda": "cuda_kernels.numba_cuda"}
OURS = ("cuda_kernels", "ttr_np")


class OnCpu:
    """A machine whose memory is that of NumPy. ``options`` are those of a launch; ``launches`` lists what ran."""

    def __init__(self, **options: Any) -> None:
        self.options = {"check": True} | options
        self.launches: list[str] = []
        self.fresh: list[np.ndarray] = []
        self.plans: dict[Any, Any] = {}

    def place(self) -> Any:
        """What plans depend on beside their arrays."""
        return None

    def has(self, x: Any) -> bool:
        """Every array is here."""
        return True

    def own(self, x: Any) -> Any:
        """The array itself: its strides are the kernel's concern."""
        return x

    table = room = own

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> np.ndarray:
        """A new array of NaN, which the kernel must not read before it has written."""
        x = np.empty(shape, dtype)
        x.reshape(-1).view(np.uint8)[...] = 0xFF
        self.fresh.append(x)
        return x

    def scratch(self, size: int) -> np.ndarray:
        """Numbers that one launch leaves to the next."""
        from cuda_kernels import _calls

        return _calls.scratch(self.empty((size,), np.float32, None))

    def back(self, x: Any, into: Any) -> None:
        """It is the same memory."""
        assert x is into

    def hold(self, x: Any) -> Any:
        """A copy that a stream keeps."""
        return np.array(x)

    def address(self, x: Any) -> int | None:
        """Where an array begins."""
        return x.ctypes.data if isinstance(x, np.ndarray) and x.size else None

    def like(self, held: Any, x: Any) -> Any:
        """The memory of x in the shape and strides of another."""
        same = (x.shape, x.strides) == (held.shape, held.strides)
        return x if same else np.lib.stride_tricks.as_strided(x, held.shape, held.strides)

    def prepare(self, launches: Any) -> None:
        """Every text is compiled when it is first launched."""

    def start(self, kernel: Kernel, name: str, blocks: int, threads: int, arguments: list[Any], **more: Any) -> None:
        """Launch."""
        new = {id(root_of(x)) for x in self.fresh}
        taken = {i: id(root_of(x)) for i, x in enumerate(arguments) if isinstance(x, np.ndarray)}
        unset = [i for i, root in taken.items() if root in new]
        self.fresh = [x for x in self.fresh if id(root_of(x)) not in taken.values()]
        self.launches.append(name)
        kernel(blocks, threads, arguments, unset=unset, **self.options | more)


class Cupy(OnCpu):
    """For the texts of ``cupy_raw``."""

    multiprocessors, shared = 4, 227 * 1024  # of a small GPU with the memory of a large one
    capability = ""  # of none that has instructions of its own

    def device(self) -> Any:
        """What launchers ask of it."""
        from cuda_kernels.cupy_raw._launch import Device

        return Device(self.multiprocessors, self.shared, self.capability)

    def place(self) -> Any:
        """What plans depend on beside their arrays."""
        return self.multiprocessors, self.shared, self.capability

    def run(
        self,
        text: str,
        name: str,
        blocks: int,
        threads: int,
        arguments: list[Any],
        shared: int = 0,
        architecture: str = "",
    ) -> None:
        """Launch, whatever the architecture."""
        kernel = self.build(text, name, self.options["check"])
        self.start(kernel, name, blocks, threads, arguments, dynamic_shared=shared)

    build = staticmethod(cache(source))

    def switch(self, pattern: str) -> list[str]:
        """Calls that match may be left out from now on, by ``options["left_out"]``; lists what is built.

        They are numbered on from text to text.
        """
        texts: list[str] = []
        numbers = count()
        self.build = cache(lambda text, *rest: texts.append(text) or source(switched(text, pattern, numbers), *rest))
        return texts


class NumbaCuda(OnCpu):
    """For the functions of ``numba_cuda``."""

    def run(self, function: Any, signature: Any, blocks: int, threads: int, arguments: list[Any]) -> None:
        """Launch."""
        kernel = self.build(ptx_of(function, signature))
        self.start(kernel, function.__name__, blocks, threads, flatten(arguments))

    build = staticmethod(cache(ptx))

    def switch(self, pattern: str) -> list[str]:
        """Lists what is built; all barriers, and nothing else, may be left out."""
        texts: list[str] = []
        self.build = cache(lambda text: texts.append(text) or ptx(text))
        return texts


class OnGpu:
    """The GPU itself; ``launches`` lists what ran. A test may make it smaller for the launchers of ``cupy_raw``."""

    multiprocessors: int | None = None
    shared: int | None = None
    capability: str | None = None

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.launches: list[str] = []
        self.plans: dict[Any, Any] = {}

    def place(self) -> Any:
        """What plans depend on beside their arrays."""
        return self.machine.place(), self.multiprocessors, self.shared, self.capability

    def device(self) -> Any:
        """What launchers ask of it."""
        wanted = {"multiprocessors": self.multiprocessors, "shared": self.shared, "capability": self.capability}
        return self.machine.device()._replace(**{name: x for name, x in wanted.items() if x is not None})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.machine, name)

    def run(self, kernel: Any, *rest: Any) -> None:
        """Launch; a text is followed by its name, a function has one."""
        self.launches.append(rest[0] if isinstance(kernel, str) else kernel.__name__)
        self.machine.run(kernel, *rest)


@cache
def ptx_of(function: Any, signature: Any, capability: tuple[int, int] = (9, 0)) -> str:
    """What Numba makes of a function: seconds each, so it is made once for all test processes."""
    made = build.folder() / f"{build.digest(toolchain(), fingerprint(function), str(signature), str(capability))}.ptx"
    if not made.exists():
        own = made.with_suffix(f".{os.getpid()}")
        own.write_text(compiled(function, signature, capability))
        own.replace(made)
    return made.read_text()


def compiled(function: Any, signature: Any, capability: tuple[int, int]) -> str:
    """Numba's compiler; it asks no driver when it is told the device."""
    from numba import cuda
    from numba.cuda import dispatcher

    device = SimpleNamespace(compute_capability=capability)
    with patch.object(dispatcher, "get_current_device", lambda: device):
        return cuda.compile_ptx(function, signature, cc=capability, lineinfo=True)[0]


@cache
def toolchain() -> str:
    """All that takes part in making PTX: Python, packages, and our own text."""
    packages = sorted(f"{d.name} {d.version}" for d in distributions() if re.match("numba|llvmlite|nvidia", d.name))
    paths = [path for name in OURS for path in sorted((build.HERE.parents[1] / name).rglob("*.py"))]
    texts = b"".join(path.read_bytes() for path in paths)
    return " ".join([sys.version, *packages, hashlib.sha256(texts).hexdigest()])


def fingerprint(x: Any) -> str:
    """What tells one function from another: its code, its options, and the numbers, types and functions it names."""
    function = getattr(x, "py_func", x)  # of what is compiled for a device
    if not isinstance(function, FunctionType):
        return repr(x)
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    named |= {name: cell.cell_contents for name, cell in cells}
    said = marshal.dumps(function.__code__, 2), function.__defaults__, getattr(x, "targetoptions", None)  # 2: no links
    return repr((said, {name: fingerprint(y) for name, y in named.items()}))


@contextmanager
def on_cpu(backend: str, **options: Any) -> Iterator[Any]:
    """Let a GPU backend launch its kernels here; with ``TTR_TESTS_ON=gpu`` on its device, whatever the options."""
    from ttr_np import backends

    if ON_GPU:
        launcher = import_module(f"{PACKAGES[backend]}._launch")
        with patch.object(launcher, "machine", OnGpu(launcher.machine)):
            yield launcher.machine
        return

    known = backends.reason
    launcher = import_module(f"{PACKAGES[backend]}._launch")
    machine = {"cupy": Cupy, "numba-cuda": NumbaCuda}[backend](**options)
    with patch.object(backends, "reason", lambda name: "ok" if name == backend else known(name)):
        with patch.object(launcher, "machine", machine):
            yield machine
