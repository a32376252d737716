"""Small matrix products for kernels: panels of a few dozen rows that stay in the caches.

A BLAS starts threads of its own, packs its operands anew at every call and knows no triangles. Here every number of a
product is one running sum in the order of its terms, whatever the sizes, so rows, columns and later tokens that are left
out change no bit of the others.

    panel     a matrix in scratch, ``(rows, width)``: rows are padded to whole tiles, an odd number of cache lines apart
    matrix    a view of memory of any strides, by its address
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

__all__ = ["FAST", "full", "lower", "matrix", "multiply", "panel", "solve_unit_lower", "triangle"]

FAST = {"contract", "reassoc"}  # never the finite-math flags: NaN and infinity have their meaning

# One tile of a product is held in registers: ROWS x LINE bytes of sums, which hide the latency of multiply-add.
WIDE = binding.get_host_cpu_features().get("avx512f", False)
ROWS, LINE = (12, 128) if WIDE else (6, 64)

full, lower, triangle = 0, 1, 2  # see multiply


@intrinsic
def matrix(typingctx: Any, address: Any, rows: Any, columns: Any, row_step: Any, column_step: Any, like: Any) -> Any:
    """A ``(rows, columns)`` array over the memory at an address, with strides in numbers; ``like`` is of its dtype."""
    view = types.Array(like, 2, "A")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(view)(context, builder)
        size = context.get_constant(types.intp, like.bitwidth // 8)
        arrayobj.populate_array(
            array,
            data=builder.inttoptr(args[0], context.get_data_type(like).as_pointer()),
            shape=args[1:3],
            strides=[builder.mul(step, size) for step in args[3:5]],
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return view(types.intp, types.intp, types.intp, types.intp, types.intp, like), codegen


@intrinsic
def at(typingctx: Any, array: Any, offset: Any) -> Any:
    """Pointer to the number ``offset`` after the first one of an array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), codegen


@intrinsic
def tile(typingctx: Any, c: Any, c_step: Any, a: Any, a_row: Any, a_column: Any, b: Any, b_step: Any, m: Any, depth: Any, alpha: Any, beta: Any) -> Any:  # fmt: skip # noqa: E501
    """c = alpha a b + beta c for one tile: ROWS rows (those from m on repeat the last one) of LINE bytes."""
    real = c.dtype
    number = ir.FloatType() if real.bitwidth == 32 else ir.DoubleType()
    lanes = 256 // real.bitwidth if not WIDE else 512 // real.bitwidth
    vectors = LINE * 8 // real.bitwidth // lanes
    vector, word, align = ir.VectorType(number, lanes), ir.IntType(64), real.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, c_step, a, a_row, a_column, b, b_step, m, depth, alpha, beta = args
        function = ir.FunctionType(vector, [vector] * 3)
        name = f"llvm.fmuladd.v{lanes}f{real.bitwidth}"
        multiply_add = cgutils.get_or_insert_function(builder.module, function, name)
        parts = [(i, j) for i in range(ROWS) for j in range(vectors)]

        def spread(x: Any) -> Any:
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.IntType(32)(0))
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), everywhere)

        def row(base: Any, i: int, step: Any) -> Any:
            last = builder.sub(m, word(1))
            i = builder.select(builder.icmp_signed("<", word(i), last), word(i), last)
            return builder.gep(base, [builder.mul(i, step)])

        def part(base: Any, j: int) -> Any:
            return builder.bitcast(builder.gep(base, [word(j * lanes)]), vector.as_pointer())

        zero = ir.Constant(vector, [0.0] * lanes)
        sums = {ij: cgutils.alloca_once_value(builder, zero) for ij in parts}
        a_rows, c_rows = ([row(base, i, step) for i in range(ROWS)] for base, step in ((a, a_row), (c, c_step)))
        with cgutils.for_range(builder, depth, intp=word) as loop:
            b_row = builder.gep(b, [builder.mul(loop.index, b_step)])
            loaded = [builder.load(part(b_row, j), align=align) for j in range(vectors)]
            for i, a_i in enumerate(a_rows):
                factor = spread(builder.load(builder.gep(a_i, [builder.mul(loop.index, a_column)])))
                for j in range(vectors):
                    total = builder.call(multiply_add, [factor, loaded[j], builder.load(sums[i, j])])
                    builder.store(total, sums[i, j])
        afresh = builder.fcmp_ordered("==", beta, ir.Constant(number, 0.0))
        alpha, beta = spread(alpha), spread(beta)
        results = []
        for i, j in parts:  # all is read before any is written: repeated rows then write the same
            old = builder.fmul(beta, builder.load(part(c_rows[i], j), align=align))
            old = builder.select(afresh, zero, old)
            results.append(builder.call(multiply_add, [alpha, builder.load(sums[i, j]), old]))
        for (i, j), result in zip(parts, results, strict=True):
            builder.store(result, part(c_rows[i], j), align=align)
        return context.get_dummy_value()

    return types.void(c, types.intp, a, types.intp, types.intp, b, types.intp, types.intp, types.intp, real, real), codegen


@intrinsic
def move(typingctx: Any, pointer: Any, offset: Any) -> Any:
    """Pointer to the number ``offset`` after another."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic
def lanes(typingctx: Any, like: Any) -> Any:
    """Numbers in a row of a tile."""
    return types.intp(like), lambda context, builder, signature, args: context.get_constant(
        types.intp, LINE * 8 // like.bitwidth
    )


@njit(cache=True, nogil=True)
def walk_tiles(c, c_step, a, a_row, a_column, b, b_step, m, n, depth, alpha, beta, shape):
    """c = alpha a b + beta c on pointers; see ``multiply``."""
    size = lanes(alpha)
    for j in range(0, n, size):
        for i in range(j // ROWS * ROWS if shape == triangle else 0, m, ROWS):
            deep = min(i + ROWS, depth) if shape == lower else depth
            c_ij, a_i, b_j = move(c, i * c_step + j), move(a, i * a_row), move(b, j)
            tile(c_ij, c_step, a_i, a_row, a_column, b_j, b_step, min(ROWS, m - i), deep, alpha, beta)


@njit(cache=True, nogil=True)
def panel(rows, columns, like):
    """Scratch of zeros in the dtype of ``like``: rows hold whole tiles, an odd number of cache lines apart.

    Rows an even number of lines apart would fight for the same few places of a cache.
    """
    size = lanes(like)
    line = size * 64 // LINE
    width = (columns + size - 1) // size * size
    return np.zeros((rows, width + (width // line + 1) % 2 * line), type(like))


@njit(cache=True, nogil=True)
def multiply(c, a, b, m, n, depth, alpha, beta, shape):
    """c = alpha a b + beta c, for the first (m, n) numbers of c and the first ``depth`` terms.

    Parameters
    ----------
    c, b
        Panels, or views of whole rows of panels: columns up to the next whole tile are written and read.
    a
        Any matrix.
    alpha, beta
        Factors; with beta = 0 what stood in c is not read.
    shape
        ``full``; ``lower``: a is lower triangular (zero above its diagonal), so later terms are left out; ``triangle``:
        only the lower triangle of c is wanted (above it tiles are left as they are, or filled with more).
    """
    size = c.itemsize
    walk_tiles(
        at(c, 0), c.strides[0] // size, at(a, 0), a.strides[0] // size, a.strides[1] // size, at(b, 0),
        b.strides[0] // size, m, n, depth, c.dtype.type(alpha), c.dtype.type(beta), shape,
    )  # fmt: skip


@njit(cache=True, nogil=True, fastmath=FAST)
def solve_unit_lower(L, x, m, n):
    """x = (I + strictly lower triangle of L)^-1 x in place, by forward substitution; x a panel, ``(m, n)`` of it.

    Substitution has the error bound of the recurrence itself; powers or inverses of L lose digits when keys repeat.
    """
    block = 8
    for low in range(0, m, block):
        high = min(low + block, m)
        multiply(x[low:], L[low:], x, high - low, n, low, -1.0, 1.0, full)
        for i in range(low + 1, high):
            for j in range(low, i):
                factor = L[i, j]
                for column in range(n):
                    x[i, column] -= factor * x[j, column]
