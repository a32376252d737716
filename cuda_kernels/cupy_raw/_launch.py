"""From the text of a kernel to a launch: what lies where, what is compiled, what has been sent.

``machine`` is where kernels run. Tests put the CPU in its place; the operators do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ttr_np import calling
from ttr_np.recording import send_apart

from .. import _calls, _plans
from .._calls import keeping, side_by_side
from .._sequences import Sequences, place_of
from . import _gates
from ._text import NUMBERS, Kernel, name_of

__all__ = [
    "Device",
    "Kernel",
    "alike",
    "empty",
    "even",
    "keeping",
    "launch",
    "machine",
    "replayed",
    "run",
    "side_by_side",
]

NULL = np.uintp(0)


class Device(NamedTuple):
    """What a launcher must know of a GPU."""

    multiprocessors: int
    shared: int  # bytes that one block may have
    capability: str = ""  # compute capability, two digits


class Gpu:
    """The current device of CuPy, on its current stream."""

    def __init__(self) -> None:
        self.tables: dict[tuple[int, tuple[int, ...], bytes], Any] = {}
        self.flags: dict[int, list[_gates.Flag]] = {}  # of each device, those that nobody uses
        self.plans: dict[Any, Any] = {}
        self.ready: set[tuple[Any, ...]] = set()  # kernels that need not be compiled ahead any more

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """A new array in the container of another."""
        import cupy

        return np.empty(shape, dtype) if isinstance(like, np.ndarray) else cupy.empty(shape, dtype)

    def has(self, x: Any) -> bool:
        """Whether an array is on the device."""
        return not isinstance(x, np.ndarray)

    def scratch(self, size: int) -> Any:
        """Numbers of single precision for what one launch leaves to the next, on the device whatever the caller has."""
        import cupy

        return _calls.scratch(cupy.empty((size,), np.float32))

    def own(self, x: Any) -> Any:
        """An array on the device; what is broadcast goes there once."""
        import cupy

        return cupy.broadcast_to(cupy.asarray(_calls.thin(x)), x.shape)

    def room(self, x: Any) -> Any:
        """An array on the device for what comes back to x."""
        import cupy

        return cupy.empty(x.shape, x.dtype)

    def back(self, x: Any, into: Any) -> None:
        """Copy to the array of NumPy that it came from."""
        into[...] = x.get()

    def hold(self, x: Any) -> Any:
        """A copy that a stream keeps on the device."""
        import cupy

        return cupy.array(x)

    def address(self, x: Any) -> int | None:
        """Where an array of CuPy begins."""
        return x.data.ptr if calling.on_device(x) and x.size else None

    def like(self, held: Any, x: Any) -> Any:
        """A pointer says no more than where the memory begins."""
        return x

    def table(self, x: np.ndarray) -> Any:
        """A table, sent at its first use, for all streams and threads; never freed, because graphs may read it."""
        import cupy

        key = (cupy.cuda.Device().id, x.shape, x.tobytes())
        there = self.tables.get(key)
        return self.tables.setdefault(key, send_apart(x)) if there is None else there

    def flag(self) -> _gates.Flag:
        """One of the current device, to be handed back when it is down."""
        import cupy

        number = cupy.cuda.Device().id
        try:
            return self.flags.setdefault(number, []).pop()
        except IndexError:
            return _gates.new_flag(number)

    def place(self) -> int:
        """What plans depend on beside their arrays: the number of the device, where their tables are."""
        import cupy

        return cupy.cuda.Device().id

    def device(self) -> Device:
        """The current one."""
        import cupy

        return device(cupy.cuda.Device().id)

    def prepare(self, launches: list[_calls.Launch]) -> None:
        """Compile the kernels of several launches side by side: NVRTC does not hold the interpreter lock."""
        import cupy

        number = cupy.cuda.Device().id
        new = {(number, *what[:2], *(*more, "")[:2]) for _, what, _, more in launches} - self.ready
        if len(new) > 1:
            with ThreadPoolExecutor(len(new)) as threads:
                list(threads.map(compiled_there, new))
        self.ready |= new

    def run(
        self,
        source: str,
        name: str,
        blocks: int,
        threads: int,
        arguments: list[Any],
        shared: int = 0,
        architecture: str = "",
    ) -> None:
        """Launch; a null pointer is the number 0."""
        import cupy

        given = tuple([NULL if x is None else x for x in arguments])
        kernel = compiled(cupy.cuda.Device().id, source, name, shared, architecture)
        kernel((blocks,), (threads,), given, shared_mem=shared)


@cache
def device(number: int) -> Device:
    """One of the GPUs of CuPy."""
    import cupy

    one = cupy.cuda.Device(number)
    attributes = one.attributes
    sizes = attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"]
    return Device(*sizes, one.compute_capability)


@cache
def compiled(number: int, source: str, name: str, shared: int = 0, architecture: str = "") -> Any:
    """A kernel of CuPy on its current GPU, which has that number; its shared memory is asked for there.

    It need not be up to 48 KB in all, but a text may declare some itself, and then less than that is refused.

    CuPy keeps its machine code on disk. It names the GPU's own architecture, and does not know those whose instructions
    no later one has: such a name comes as an option more, which NVRTC prefers.
    """
    import cupy

    options = ("-std=c++17", f"-arch={architecture}") if architecture else ("-std=c++17",)
    kernel = cupy.RawModule(code=source, options=options).get_function(name)
    if shared:
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel


def compiled_there(key: tuple[Any, ...]) -> Any:
    """The same from a thread of its own, whose current GPU is the first of all."""
    import cupy

    with cupy.cuda.Device(key[0]):
        return compiled(*key)


machine: Any = Gpu()


def run(core: Callable[..., Any], *arguments: Any, **common: Any) -> Any:
    """Call an operator's core with everything a caller may ask of any operator; halves stay halves."""
    return calling.run(core, *arguments, halves=True, look=look, **common)


def look(gates: Mapping[str, Any]) -> Callable[[], None]:
    """Look at gates where they are; see ``ttr_np.calling.run``."""
    return _gates.look(machine, gates)


def empty(sequences: Sequences, own: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """An array for answers in the container of another."""
    return _calls.empty(machine, sequences, own, dtype, like)


def alike(x: Any) -> Any:
    """A new array of the shape, dtype and container of another, in C order."""
    return _calls.alike(machine, x)


def itself(x: Any) -> Any:
    """An array in the place of a new one ``alike``: what a kernel leaves goes where it began."""
    return x


def replayed(core: Callable[..., Any]) -> Callable[..., Any]:
    """A core that does nothing but what this module offers, and so needs to do it only once for all calls alike."""
    return _plans.replayed(current, core)


def current() -> Any:
    """Where kernels run now."""
    return machine


def even(*arrays: Any) -> int:
    """1 where the numbers of every row are neighbours."""
    return int(all(x.strides[-1] == x.itemsize or x.shape[-1] == 1 for x in arrays))


def launch(
    kernel: Kernel,
    sequences: Sequences,
    arrays: _calls.Arrays,
    written: tuple[str, ...],
    types: Mapping[str, Any],
    constants: Mapping[str, int],
    grid: _calls.Grid | None = None,
    **scalars: Any,
) -> None:
    """Run a kernel over all sequences.

    Parameters
    ----------
    kernel, sequences
        What, and over what.
    arrays
        By name of the kernel's parameters, in the order of the table.
    written
        Names of those that the kernel writes.
    types
        What the text calls ``data``, ``real`` and so on: a dtype each.
    constants
        Sizes that are fixed when it is compiled.
    grid
        How it is cut; without one, ``PARTS`` threads take a column.
    **scalars
        ``tokens``, ``columns``, and what else the kernel declares.
    """
    if not scalars["tokens"] * sequences.memories * sequences.groups:
        return
    names = {name: NUMBERS[name_of(dtype)] for name, dtype in types.items()}
    blocks, threads, shared = grid or _calls.grid(scalars["columns"], constants.get("PARTS", 1))
    sizes = {"axes": len(sequences.shape), "groups": sequences.groups, "blocks": blocks}
    with _calls.there_and_back(machine, sequences, arrays, written) as here:
        table = table_of(sequences, here, arrays)
        if table is None:
            here = {name: sequences.level(x, arrays[name][1]) for name, x in here.items()}
            table = table_of(sequences, here, arrays)
        arguments = kernel.typed(here | {"table": _calls.fixed(machine.table(table))} | sizes | scalars, names)
        what = (kernel.source(names, constants), kernel.name, sequences.memories * blocks, threads)
        more = (shared, kernel.architecture) if kernel.architecture else (shared,)
        _calls.begin(_calls.Launch(machine, what, arguments, more))


def table_of(sequences: Sequences, here: Mapping[str, Any], arrays: _calls.Arrays) -> np.ndarray | None:
    """Where a kernel finds its numbers; None where an array must be copied first."""
    return sequences.table(*[place_of(x, arrays[name][1]) for name, x in here.items()])
