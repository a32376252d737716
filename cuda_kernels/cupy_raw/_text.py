"""The text of a kernel: constants filled in, arguments cast to what it declares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["NUMBERS", "Kernel", "name_of"]

FOLDER = Path(__file__).parent
HEADERS = ("numbers.cuh", "sequences.cuh")
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


class Kernel:
    """The kernel of one ``.cu`` file of this folder, named like it.

    Parameters
    ----------
    name
        Of the file and of the kernel.
    *headers
        Beyond those that all kernels share.
    architecture
        The only one that it is for, such as ``sm_90a``, whose own instructions it has; empty for any.
    """

    def __init__(self, name: str, *headers: str, architecture: str = "") -> None:
        self.name = name
        self.headers = headers
        self.architecture = architecture

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
        return self.put_together(self.text(), tuple(types.items()), tuple(constants.items()))

    @cache  # noqa: B019 - one text for each kernel that is compiled, always the same object, which knows its hash
    def put_together(
        self, text: str, types: tuple[tuple[str, str], ...], constants: tuple[tuple[str, int], ...]
    ) -> str:
        """The text of ``source``."""
        lines = [f"typedef {kind} {name};" for name, kind in types if kind not in ("float16", "bfloat16")]
        lines += [f"#define {name} {value}" for name, value in constants]
        halves = [f"typedef {kind} {name};" for name, kind in types if kind in ("float16", "bfloat16")]
        numbers, sequences = map(text_of, HEADERS)
        own = map(text_of, self.headers)
        return "\n".join([*lines, numbers, *halves, sequences, *own, f'#line 1 "{self.name}.cu"', text])

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
