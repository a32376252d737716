"""A launch on NumPy arrays, and the faults it may end with."""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PAGE = 4096
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
GLOBAL = 2
LARGE = 64 << 20  # bytes: beyond it an array is neither copied nor followed byte by byte, as in runtime.cpp


class Fault(RuntimeError):
    """What a kernel did wrong, and where."""


class BarrierFault(Fault):
    """A barrier or shuffle that some threads never reach."""


class RaceFault(Fault):
    """Two threads use one address, one of them writes, and nothing orders them."""


class WarpFault(Fault):
    """A shuffle whose lanes do not agree."""


class BoundsFault(Fault):
    """A load or store outside the arrays."""


class UnsetFault(Fault):
    """A load of what was never stored."""


class ArithmeticFault(Fault):
    """Integer overflow, division by zero, a misaligned address, an index outside a static array."""


class LaunchFault(Fault):
    """A grid, a block or arguments that no device takes."""


class TimeFault(Fault):
    """It does not end."""


FAULTS = dict(
    enumerate(
        (BarrierFault, RaceFault, WarpFault, BoundsFault, UnsetFault, ArithmeticFault, LaunchFault, TimeFault), start=1
    )
)


class Options(ctypes.Structure):
    """As in runtime.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("first_block", "last_block", "seed")] + [
        (name, ctypes.c_int32) for name in ("dynamic_shared", "order", "check", "flush", "seconds", "left_out")
    ]


class Region(ctypes.Structure):
    """As in runtime.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("begin", "end")] + [
        (name, ctypes.c_int32) for name in ("kind", "read_only", "unset", "unused")
    ]


def virtual(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros of any size: a kernel that is run at the far end of them shows whether its offsets are wide enough."""
    bytes_ = int(np.prod(np.array(shape, object))) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, bytes_, flags=flags), dtype).reshape(shape)


def root_of(x: np.ndarray) -> np.ndarray:
    """The array that owns the memory."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


class Arena:
    """Copies of the arguments' memory, each far from the others, so that no overrun meets another array."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[int, int, int, np.ndarray, np.ndarray]] = {}

    def address(self, x: np.ndarray) -> int:
        """Where the copy of an array begins."""
        root = root_of(x)
        low, high = np.lib.array_utils.byte_bounds(root)
        if high - low > LARGE:
            return x.ctypes.data
        if id(root) not in self.copies:
            room = np.full(high - low + 2 * PAGE + 256, 0xA5, np.uint8)
            start = (room.ctypes.data + PAGE + 255) // 256 * 256 + low % 256  # aligned as the original
            ctypes.memmove(start, low, high - low)
            self.copies[id(root)] = (low, start, high - low, room, root)
        return self.copies[id(root)][1] + x.ctypes.data - low

    def bring_back(self) -> None:
        """Write what the kernel wrote to where the caller looks for it."""
        for low, start, size, _, root in self.copies.values():
            if root.flags.writeable:
                ctypes.memmove(low, start, size)


class Kernel:
    """One kernel of a library.

    ``kernel(grid, threads, arguments)``: arrays and NumPy scalars, which have the types of the parameters already;
    None is a null pointer.
    """

    def __init__(self, library: Path, flush: bool = True, shared: int = 0) -> None:
        self.library, self.flush, self.shared = library, flush, shared
        self.launch = ctypes.CDLL(str(library)).runner_launch

    def __call__(
        self,
        grid: Sequence[int] | int,
        threads: Sequence[int] | int,
        arguments: Sequence[Any],
        *,
        check: bool = True,
        order: str = "forward",
        seed: int = 0,
        blocks: tuple[int, int] = (0, 0),
        unset: Collection[int] = (),
        dynamic_shared: int = 0,
        seconds: int = 60,
        left_out: int = -1,
    ) -> None:
        """Run it. ``blocks`` is the range that runs, ``unset`` lists the arguments that hold nothing yet.

        ``left_out`` is the number of a call behind a switch, see ``switches``.
        """
        arena = Arena()
        regions, values = self.pack(arguments, arena if check else None, unset)
        shared = dynamic_shared + self.shared
        options = Options(*blocks, seed, shared, ORDERS[order], check, self.flush, seconds, left_out)
        message = ctypes.create_string_buffer(1000)
        code = self.launch(
            (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values)),
            three(grid), three(threads), ctypes.byref(options), (Region * len(regions))(*regions), len(regions),
            message, len(message),
        )  # fmt: skip
        if code:
            raise FAULTS[code](self.with_line(message.value.decode()))
        arena.bring_back()

    def pack(self, arguments: Sequence[Any], arena: Arena | None, unset: Collection[int]) -> tuple[list, list]:
        """The memory a kernel may touch, and the arguments as they are handed over."""
        regions, values = [], []
        for i, x in enumerate(arguments):
            if isinstance(x, np.ndarray):
                address = arena.address(x) if arena else x.ctypes.data
                low, high = np.lib.array_utils.byte_bounds(x) if x.size else (x.ctypes.data, x.ctypes.data)
                begin = address + low - x.ctypes.data
                regions.append(Region(begin, begin + high - low, GLOBAL, not x.flags.writeable, i in unset))
                x = np.uint64(address)
            values.append(np.array(np.uint64(0) if x is None else x))
        return regions, values

    def with_line(self, message: str) -> str:
        """A message with the line of the kernel in place of an address."""
        found = re.search(r" \{at (0x[0-9a-f]+)\}", message)
        if not found:
            return message
        asked = ["addr2line", "-e", str(self.library), found[1]]
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        return message.replace(found[0], f" at line {told.split(':')[-1].split()[0]}" if ":" in told else "")


def three(sizes: Sequence[int] | int) -> Any:
    """Sizes of a grid or block."""
    sizes = (sizes,) if isinstance(sizes, (int, np.integer)) else tuple(sizes)
    return (ctypes.c_uint * 3)(*(sizes + (1, 1))[:3])
