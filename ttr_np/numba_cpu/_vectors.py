"""Vectors of numbers in the code of kernels: a register of the machine each, for intrinsics that build their own loops.

Kernels are compiled with leave to contract and to reorder plain additions and products; what must be the same sum in
two places is written with ``add`` and ``multiply``, which are rounded where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "BYTES", "CACHE_LINE", "WIDE", "Held", "Vectors", "ask_line", "ceil_div", "per_line", "per_vector", "plus",
    "repeat", "row_of", "smaller",
]  # fmt: skip

WIDE = binding.get_host_cpu_features().get("avx512f", False)
BYTES = 64 if WIDE else 32  # of a register
CACHE_LINE = 64  # bytes


@intrinsic
def per_vector(typingctx: Any, like: Any) -> Any:
    """Numbers in a register."""
    return types.intp(like), lambda context, builder, signature, args: context.get_constant(
        types.intp, BYTES * 8 // like.bitwidth
    )


@intrinsic
def per_line(typingctx: Any, like: Any) -> Any:
    """Numbers in a cache line."""
    return types.intp(like), lambda context, builder, signature, args: context.get_constant(
        types.intp, CACHE_LINE * 8 // like.bitwidth
    )


@intrinsic
def plus(typingctx: Any, x: Any, y: Any) -> Any:
    """x + y, rounded here: sums of it have the order in which they are written."""
    return x(x, x), lambda context, builder, signature, args: builder.fadd(*args)


def ask_line(builder: Any, place: Any, cache: int) -> None:
    """Ask for a line of memory, to be read from the first or second cache, without waiting; any address will do."""
    word, line = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [line, word, word, word])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, data = word(0), word(1)
    builder.call(prefetch, [builder.bitcast(place, line), read, word(4 - cache), data])


def ceil_div(builder: Any, n: Any, size: int) -> Any:
    """How many pieces of a size hold n."""
    return builder.udiv(builder.add(n, n.type(size - 1)), n.type(size))


def smaller(builder: Any, x: Any, y: Any) -> Any:
    """The smaller of two whole numbers."""
    return builder.select(builder.icmp_signed("<", x, y), x, y)


def row_of(builder: Any, base: Any, i: Any, rows: Any, step: Any) -> Any:
    """Pointer to row i of some; rows that are not there repeat the last one."""
    there = smaller(builder, i, builder.sub(rows, ir.IntType(64)(1)))
    return builder.gep(base, [builder.mul(there, step)])


def repeat(builder: Any, low: Any, high: Any, body: Callable[[Any], None]) -> None:
    """The body for every number from low on; written out if the sizes are known when it is compiled."""
    if isinstance(high, int):
        for i in range(low.constant, high):
            body(ir.IntType(64)(i))
        return
    with cgutils.for_range_slice(builder, low, high, ir.IntType(64)(1), intp=ir.IntType(64)) as (i, _):
        body(i)


class Vectors:
    """Vectors of one dtype in the code that a builder writes; a whole register each, or ``count`` numbers."""

    def __init__(self, builder: Any, like: Any, count: int | None = None) -> None:
        self.builder, self.bits, self.count = builder, like.bitwidth, count or BYTES * 8 // like.bitwidth
        self.number = ir.FloatType() if like.bitwidth == 32 else ir.DoubleType()
        self.type = ir.VectorType(self.number, self.count)
        kind, name = ir.FunctionType(self.type, [self.type] * 3), f"llvm.fmuladd.v{self.count}f{self.bits}"
        self.fma = cgutils.get_or_insert_function(builder.module, kind, name)

    # ---- in memory

    def pointer(self, base: Any, offset: Any) -> Any:
        """To the vector that begins some numbers after another pointer."""
        return self.builder.bitcast(self.builder.gep(base, [offset]), self.type.as_pointer())

    def load_from(self, base: Any, offset: Any) -> Any:
        """The vector that begins there."""
        return self.builder.load(self.pointer(base, offset), align=self.bits // 8)

    def store_to(self, x: Any, base: Any, offset: Any) -> None:
        """Write the vector that begins there."""
        self.builder.store(x, self.pointer(base, offset), align=self.bits // 8)

    def start(self, index: Any) -> Any:
        """How many numbers stand before vector ``index`` of a row of them."""
        word = ir.IntType(64)
        return word(index * self.count) if isinstance(index, int) else self.builder.mul(index, word(self.count))

    def load(self, base: Any, index: Any) -> Any:
        """Vector ``index`` of a row of them."""
        return self.load_from(base, self.start(index))

    def store(self, x: Any, base: Any, index: Any) -> None:
        """Write vector ``index`` of a row of them."""
        self.store_to(x, base, self.start(index))

    def cast(self, x: Any) -> Any:
        """A vector of as many numbers of any dtype in this one."""
        if x.type == self.type:
            return x
        return self.builder.fpext(x, self.type) if self.bits == 64 else self.builder.fptrunc(x, self.type)

    # ---- of one number

    def constant(self, value: float) -> Any:
        """A number that is known, everywhere."""
        value = float(np.float32(value)) if self.bits == 32 else value
        return ir.Constant(self.type, [value] * self.count)

    def everywhere(self, x: Any) -> Any:
        """One number everywhere."""
        undefined, word = ir.Constant(self.type, ir.Undefined), ir.IntType(32)
        first = self.builder.insert_element(undefined, x, word(0))
        return self.shuffle(first, undefined, [0] * self.count)

    def before(self, n: Any) -> Any:
        """Which places of a vector come before place n."""
        word = ir.IntType(32)
        places = ir.VectorType(word, self.count)
        undefined = ir.Constant(places, ir.Undefined)
        first = self.builder.insert_element(undefined, self.builder.trunc(n, word), word(0))
        ends = self.shuffle(first, undefined, [0] * self.count)
        return self.builder.icmp_signed("<", ir.Constant(places, list(range(self.count))), ends)

    def holding(self, n: Any) -> Any:
        """How many vectors hold n numbers."""
        return ceil_div(self.builder, n, self.count)

    def totals(self, count: int, start: float = 0.0) -> list[Any]:
        """Sums, or products, in registers of their own."""
        totals = [cgutils.alloca_once(self.builder, self.type) for _ in range(count)]
        for total in totals:
            self.builder.store(self.constant(start), total)
        return totals

    # ---- arithmetic

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z."""
        return self.builder.call(self.fma, [x, y, z])

    def add(self, x: Any, y: Any) -> Any:
        """x + y, rounded here."""
        return self.multiply_add(x, self.constant(1.0), y)

    def multiply(self, x: Any, y: Any) -> Any:
        """x y, rounded here."""
        return self.multiply_add(x, y, self.constant(-0.0))

    def accumulate(self, total: Any, x: Any, y: Any) -> None:
        """Add x y to a sum."""
        self.builder.store(self.multiply_add(x, y, self.builder.load(total)), total)

    # ---- numbers that change places

    def shuffle(self, x: Any, y: Any, places: Sequence[int]) -> Any:
        """The numbers at some places of two vectors, those of the second counted on from those of the first."""
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))

    def interleave(self, x: Any, y: Any, size: int) -> tuple[Any, Any]:
        """Groups of ``size`` numbers of x and y in turn: the first of every two groups of each, then the second."""
        low = [e if not e & size else self.count + e - size for e in range(self.count)]
        high = [e + size if not e & size else self.count + e for e in range(self.count)]
        return self.shuffle(x, y, low), self.shuffle(x, y, high)

    def transpose(self, lines: list[Any]) -> list[Any]:
        """Vectors that are the rows of a square as its columns: numbers change places, then pairs, fours, and so on."""
        size = 1
        while size < self.count:
            mixed = dict.fromkeys(range(self.count))
            for i in (i for i in range(self.count) if not i & size):
                mixed[i], mixed[i + size] = self.interleave(lines[i], lines[i + size], size)
            lines, size = list(mixed.values()), 2 * size
        return lines

    def sum_everywhere(self, x: Any) -> Any:
        """The sum of a vector's numbers, in the place of each: neighbours first, then pairs, and so on."""
        size = 1
        while size < self.count:
            x, size = self.add(x, self.shuffle(x, x, [e ^ size for e in range(self.count)])), 2 * size
        return x

    def sums_across(self, lines: list[Any]) -> Any:
        """The sums of as many vectors as a vector has places, in one: neighbours first, then pairs, and so on."""
        size = 1
        while len(lines) > 1:
            mixed = [self.interleave(x, y, size) for x, y in zip(lines[::2], lines[1::2], strict=True)]
            lines, size = [self.add(low, high) for low, high in mixed], 2 * size
        return lines[0]


class Held:
    """Some vectors: in registers if their number is known when a kernel is compiled, else in memory all the time."""

    def __init__(self, vectors: Vectors, base: Any, count: Any) -> None:
        self.vectors, self.base, self.count, known = vectors, base, count, isinstance(count, int)
        self.registers = vectors.totals(count) if known else []

    def get(self, i: Any) -> Any:
        """Vector i."""
        return self.vectors.builder.load(self.registers[i.constant]) if self.registers else self.there(i)

    def there(self, i: Any) -> Any:
        """Vector i as it is in memory."""
        return self.vectors.load(self.base, i)

    def put(self, x: Any, i: Any) -> None:
        """Write vector i."""
        if self.registers:
            self.vectors.builder.store(x, self.registers[i.constant])
        else:
            self.vectors.store(x, self.base, i)

    def each(self, body: Callable[[Any], None]) -> None:
        """The body for every vector's number."""
        repeat(self.vectors.builder, ir.IntType(64)(0), self.count, body)

    def leave(self) -> None:
        """Write to memory what is in registers."""
        for i, x in enumerate(self.registers):
            self.vectors.store(self.vectors.builder.load(x), self.base, i)
