"""From the text of a kernel to a launch: constants filled in, arguments cast to what the text declares.

``machine`` is where kernels run. Tests put the CPU in its place; the operators do not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttr_np import calling

from .. import _calls
from .._calls import keeping
from .._sequences import Sequences, place_of

__all__ = ["Device", "Kernel", "empty", "even", "keeping", "launch", "machine", "run"]

FOLDER = Path(__file__).parent
HEADERS = ("numbers.cuh", "sequences.cuh")
NULL = np.uintp(0)
NUMBERS = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}
DTYPES = {"int": "int32", "long long": "int64", "bool": "bool"} | {ours: name for name, ours in NUMBERS.items()}


@cache
def name_of(dtype: Any) -> str:
    """NumPy makes the name of a dtype anew whenever it is asked."""
    return np.dtype(dtype).name


@cache
def text_of(name: str) -> str:
    """A file of this folder."""
    return (FOLDER / name).read_text()


class Parameter(NamedTuple):
    """One parameter of a kernel: its type without ``const``, and whether it points to numbers of that type."""

    name: str
    type: str
    pointer: bool


class Device(NamedTuple):
    """What a launcher must know of a GPU."""

    multiprocessors: int
    shared: int  # bytes that one block may have


class Kernel:
    """The kernel of one ``.cu`` file of this folder, named like it; ``headers`` beyond those that all kernels share."""

    def __init__(self, name: str, *headers: str) -> None:
        self.name = name
        self.headers = headers

    def text(self) -> str:
        """What the file says."""
        return text_of(f"{self.name}.cu")

    @cache  # noqa: B019 - kernels live as long as the module
    def parameters(self) -> tuple[Parameter, ...]:
        """What it declares."""
        listed = re.search(rf"\n{self.name}\((.*?)\)", self.text(), flags=re.DOTALL)[1]
        found = re.findall(r"(?:const )?([\w ]+?)(\*?) (\w+)(?:,\s*|$)", listed)
        return tuple(Parameter(name, kind, bool(star)) for kind, star, name in found)

    def source(self, types: Mapping[str, str], constants: Mapping[str, int]) -> str:
        """The text for NVRTC: types and constants, what all kernels share, then the file."""
        return self.put_together(tuple(types.items()), tuple(constants.items()))

    @cache  # noqa: B019 - one text for each kernel that is compiled, always the same object, which knows its hash
    def put_together(self, types: tuple[tuple[str, str], ...], constants: tuple[tuple[str, int], ...]) -> str:
        """The text of ``source``."""
        lines = [f"typedef {kind} {name};" for name, kind in types if kind not in ("float16", "bfloat16")]
        lines += [f"#define {name} {value}" for name, value in constants]
        halves = [f"typedef {kind} {name};" for name, kind in types if kind in ("float16", "bfloat16")]
        numbers, sequences = map(text_of, HEADERS)
        own = map(text_of, self.headers)
        return "\n".join([*lines, numbers, *halves, sequences, *own, f'#line 1 "{self.name}.cu"', self.text()])

    def typed(self, arguments: Mapping[str, Any], types: Mapping[str, str]) -> list[Any]:
        """Arguments in their order, each of the type that its parameter declares.

        Raises
        ------
        TypeError
            If an array holds numbers of another type: a pointer cannot be cast.
        """
        wanted = self.formats(tuple(types.items()))
        given = [arguments[name] for name, _, _ in wanted]
        return [
            number(x) if number else self.pointer(name, dtype, x)
            for x, (name, dtype, number) in zip(given, wanted, strict=True)
        ]

    @cache  # noqa: B019
    def formats(self, types: tuple[tuple[str, str], ...]) -> list[tuple[str, str, Any]]:
        """Of each parameter its name, its dtype, and what makes such a number; None for pointers."""
        declared = dict(types)
        dtypes = [(p, DTYPES[declared.get(p.type, p.type)]) for p in self.parameters()]
        return [(p.name, dtype, None if p.pointer else np.dtype(dtype).type) for p, dtype in dtypes]

    def pointer(self, name: str, dtype: str, x: Any) -> Any:
        """An array whose numbers are what a parameter points to."""
        if x is not None and name_of(x.dtype) != dtype:
            raise TypeError(f"{self.name}: {name} points to {dtype}, the array holds {x.dtype}")
        return x


class Gpu:
    """The current device of CuPy, on its current stream."""

    def __init__(self) -> None:
        self.tables: dict[tuple[int, tuple[int, ...], bytes], Any] = {}

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

        return cupy.empty((size,), np.float32)

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
        return x.data.ptr if hasattr(x, "__cuda_array_interface__") and x.size else None

    def like(self, held: Any, x: Any) -> Any:
        """A pointer says no more than where the memory begins."""
        return x

    def table(self, x: np.ndarray) -> Any:
        """A table, sent at its first use."""
        import cupy

        key = (cupy.cuda.Device().id, x.shape, x.tobytes())
        if key not in self.tables:
            self.tables[key] = cupy.asarray(x)
        return self.tables[key]

    def device(self) -> Device:
        """The current one."""
        import cupy

        return device(cupy.cuda.Device().id)

    def run(self, source: str, name: str, blocks: int, threads: int, arguments: list[Any], shared: int = 0) -> None:
        """Launch; a null pointer is the number 0."""
        import cupy

        given = tuple([NULL if x is None else x for x in arguments])
        kernel = compiled(cupy.cuda.Device().id, source, name, shared)
        kernel((blocks,), (threads,), given, shared_mem=shared)


@cache
def device(number: int) -> Device:
    """One of the GPUs of CuPy."""
    import cupy

    attributes = cupy.cuda.Device(number).attributes
    return Device(attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"])


@cache
def compiled(number: int, source: str, name: str, shared: int = 0) -> Any:
    """A kernel of CuPy on its current GPU, which has that number; beyond 48 KB shared memory must be asked for there.

    CuPy keeps its machine code on disk.
    """
    import cupy

    kernel = cupy.RawModule(code=source, options=("-std=c++17",)).get_function(name)
    if shared > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel


machine: Any = Gpu()


def run(core: Callable[..., Any], *arguments: Any, **common: Any) -> Any:
    """Call an operator's core with everything a caller may ask of any operator; halves stay halves."""
    return calling.run(core, *arguments, halves=True, **common)


def empty(sequences: Sequences, own: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """An array for answers in the container of another."""
    return _calls.empty(machine, sequences, own, dtype, like)


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
        arguments = kernel.typed(here | {"table": machine.table(table)} | sizes | scalars, names)
        what = (kernel.source(names, constants), kernel.name, sequences.memories * blocks, threads)
        _calls.begin(_calls.Launch(machine, what, arguments, (shared,)))


def table_of(sequences: Sequences, here: Mapping[str, Any], arrays: _calls.Arrays) -> np.ndarray | None:
    """Where a kernel finds its numbers; None where an array must be copied first."""
    return sequences.table(*[place_of(x, arrays[name][1]) for name, x in here.items()])
