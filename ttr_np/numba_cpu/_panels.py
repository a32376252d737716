"""Small matrix products for kernels: panels of a few dozen rows that stay in the caches.

A BLAS starts threads of its own, packs its operands anew at every call and knows no triangles. Here every number of a
product is one running sum in the order of its terms, whatever the sizes, so rows, columns and later tokens that are
left out change no bit of the others.

    matrix    any memory: a pointer and the strides of rows and columns, in numbers
    panel     a matrix in scratch: whole tiles side by side, rows an odd number of cache lines apart

Kernels hold pointers, not arrays: an array is seven numbers and a reference count at every call, which took most of the
time to compile. ``like`` is a number of the dtype that is computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._compile import apart, inner
from ._vectors import BYTES, CACHE_LINE, WIDE, Vectors, ask_line, ceil_div, per_vector, repeat, row_of

__all__ = [
    "ROWS", "Matrix", "add_scaled", "add_transposed", "answers", "below", "clean_until", "clean_within", "copy",
    "count_bad_of", "dot", "fill", "finite", "full", "gather", "give", "lanes", "load", "load_transposed", "lower",
    "matrix", "most", "move", "multiply", "multiply_transposed", "panel", "panels", "pointer", "real", "right",
    "row", "scale", "scale_each", "scale_rows", "store", "times", "times_rows", "transposed", "triangle", "upper",
]  # fmt: skip

# One tile of a product is held in registers: ROWS x LINE bytes of sums, which hide the latency of multiply-add. Tiles
# of FEW rows end a product where whole ones would be half empty: 64 rows are 4 x 12 + 2 x 8.
PARTS = 2  # vectors of a row
ROWS, FEW, LINE = *((12, 8) if WIDE else (6, 4)), PARTS * BYTES
ASKED, EVERY = (2, 1) if WIDE else (1, 2)  # lines that a tile asks for in so many steps: one every dozen cycles

full, lower, triangle, upper = 0, 1, 2, 4  # see multiply; upper | triangle is both


class Matrix(NamedTuple):
    """Pointer to the first number, and how many numbers further the next row and the next column are."""

    data: Any
    step: int
    column: int


def panels(dtype: np.dtype, shapes: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Scratch of one thread, zeros, and a table of its panels: ``(panels, 2)``, address and row step of each.

    Rows an even number of cache lines apart would fight for the same few places of a cache.
    """
    numbers, places = plan(dtype, tuple(shapes))
    room, table = np.zeros(numbers, dtype), places.copy()
    start = room.__array_interface__["data"][0]
    table[:, 0] += start + -start % CACHE_LINE
    return room, table


@lru_cache(1000)
def plan(dtype: np.dtype, shapes: tuple[tuple[int, int], ...]) -> tuple[int, np.ndarray]:
    """How many numbers of scratch, and the table of its panels, as if it started at address 0."""
    line, tile_width = CACHE_LINE // dtype.itemsize, LINE // dtype.itemsize
    steps = [-(-columns // tile_width) * tile_width for _, columns in shapes]
    steps = [step + line * (step // line % 2 == 0) for step in steps]
    ends = np.cumsum([0] + [rows * step for (rows, _), step in zip(shapes, steps, strict=True)])
    return int(ends[-1]) + line, np.column_stack([ends[:-1] * dtype.itemsize, steps])


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """Pointer to a number at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_data_type(like).as_pointer())

    return types.CPointer(like)(types.intp, like), codegen


@intrinsic
def move(typingctx: Any, start: Any, offset: Any) -> Any:
    """Pointer to the number ``offset`` after another."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return start(start, types.intp), codegen


@intrinsic
def real(typingctx: Any, like: Any, x: Any) -> Any:
    """A number in the dtype of another: Numba would compute float32 times a Python number in float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[1], x, like)

    return like(like, x), codegen


@inner
def matrix(address, step, column, like):
    """The matrix at an address."""
    return Matrix(pointer(address, like), step, column)


@inner
def panel(table, i, like):
    """One of the panels of a table."""
    return Matrix(pointer(table[i, 0], like), table[i, 1], 1)


@inner
def row(x, i):
    """Pointer to the first number of a row."""
    return move(x.data, i * x.step)


@inner
def below(x, i):
    """The rows of a matrix from i on."""
    return Matrix(move(x.data, i * x.step), x.step, x.column)


@inner
def right(x, j):
    """The columns of a matrix from j on; of a panel that a product fills, j a multiple of whole tiles."""
    return Matrix(move(x.data, j * x.column), x.step, x.column)


@inner
def transposed(x):
    """A panel's rows as columns."""
    return Matrix(x.data, x.column, x.step)


@inner
def copy(y, x, n):
    """y = x."""
    apart()
    for j in range(n):
        y[j] = x[j]


@inner
def gather(y, x, step, n):
    """y = x, whose numbers are a step apart."""
    if step == 1:
        copy(y, x, n)
    else:
        gather_apart(y, x, step, n)


@inner
def gather_apart(y, x, step, n):
    """As ``gather``, number by number."""
    apart()
    for j in range(n):
        y[j] = x[j * step]


@inner
def fill(y, x, n):
    """y = one number everywhere."""
    apart()
    for j in range(n):
        y[j] = x


@inner
def scale(y, factor, n):
    """y = factor y."""
    apart()
    for j in range(n):
        y[j] *= factor


@inner
def times(y, x, z, n):
    """y = x z, number by number."""
    apart()
    for j in range(n):
        y[j] = x[j] * z[j]


@intrinsic
def rows_times(typingctx, y, y_step, x, x_step, z, z_step, n, columns):
    """y_i = x_i z_i for n rows of whole vectors; with a step of 0 one row stands for all."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        *rows, n, columns = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        count = vectors.holding(columns)
        with cgutils.for_range(builder, n, intp=word) as i:
            y, x, z = (builder.gep(rows[j], [builder.mul(i.index, rows[j + 1])]) for j in (0, 2, 4))
            with cgutils.for_range(builder, count, intp=word) as j:
                vectors.store(builder.fmul(vectors.load(x, j.index), vectors.load(z, j.index)), y, j.index)
        return context.get_dummy_value()

    return types.void(y, types.intp, y, types.intp, y, types.intp, types.intp, types.intp), codegen


@inner
def times_rows(y, x, z, n, columns):
    """y = x z for the first rows of panels, one after the other."""
    apart()
    rows_times(y.data, y.step, x.data, x.step, z.data, z.step, n, columns)


@inner
def add_scaled(y, factor, x, n):
    """y = y + factor x."""
    apart()
    for j in range(n):
        y[j] += factor * x[j]


@inner
def dot(x, y, n, like):
    """x . y."""
    apart()
    total = real(like, 0)
    for j in range(n):
        total += x[j] * y[j]
    return total


@intrinsic
def huge(typingctx: Any, like: Any) -> Any:
    """A number whose square is finite, with room for sums of such squares."""
    number = {32: 1e15, 64: 1e150}[like.bitwidth]
    return like(like), lambda context, builder, signature, args: context.get_constant(like, number)


@intrinsic
def most(typingctx: Any, like: Any) -> Any:
    """The largest finite number."""
    number = float(np.finfo({32: np.float32, 64: np.float64}[like.bitwidth]).max)
    return like(like), lambda context, builder, signature, args: context.get_constant(like, number)


@inner
def count_bad(x, step, n, bound):
    """How many numbers are beyond a bound or none."""
    return count_bad_of(x, n, bound) if step == 1 else count_bad_apart(x, step, n, bound)


@inner
def count_bad_of(x, n, bound):
    """As ``count_bad``, for numbers in a row."""
    apart()
    bad = np.int32(0)
    for j in range(n):
        bad += np.int32(not abs(x[j]) <= bound)
    return bad


@inner
def count_bad_apart(x, step, n, bound):
    """As ``count_bad``, for numbers a step apart."""
    apart()
    bad = np.int32(0)
    for j in range(n):
        bad += np.int32(not abs(x[j * step]) <= bound)
    return bad


class Tile(Vectors):
    """Sums of some rows of LINE bytes in registers; rows from m on repeat the last one, or are written before it."""

    def __init__(self, builder: Any, like: Any, rows: int) -> None:
        super().__init__(builder, like)
        self.rows = rows
        zero = self.constant(0.0)
        self.sums = {(i, j): cgutils.alloca_once_value(builder, zero) for i in range(rows) for j in range(PARTS)}

    def rows_of(self, base: Any, m: Any, step: Any) -> list[Any]:
        """Pointers to the first numbers of the rows."""
        return [row_of(self.builder, base, ir.IntType(64)(i), m, step) for i in range(self.rows)]

    def add_products(
        self, a: Any, a_step: Any, a_column: Any, b: Any, b_step: Any, m: Any, depth: Any, soon: Any = None
    ) -> None:
        """Add the products of some rows of a with b, and ask for what is read soon."""
        builder, word = self.builder, ir.IntType(64)
        a_rows, since = self.rows_of(a, m, a_step), word(0)

        def add(step: Any) -> None:
            b_row = builder.gep(b, [builder.mul(step, b_step)])
            loaded = [self.load(b_row, j) for j in range(PARTS)]
            for i, a_i in enumerate(a_rows):
                factor = self.everywhere(builder.load(builder.gep(a_i, [builder.mul(step, a_column)])))
                for j, b_j in enumerate(loaded):
                    self.accumulate(self.sums[i, j], factor, b_j)

        if soon is not None:
            turns, wanted = builder.udiv(depth, word(EVERY)), ceil_div(builder, soon[1], ASKED)
            turns = builder.select(builder.icmp_signed("<", wanted, turns), wanted, turns)
            with cgutils.for_range(builder, turns, intp=word) as loop:
                self.ask(*soon, loop.index)
                for i in range(EVERY):
                    add(builder.add(builder.mul(loop.index, word(EVERY)), word(i)))
            since = builder.mul(turns, word(EVERY))
        repeat(builder, since, depth, add)

    def ask(self, rows: Any, count: Any, start: Any, turn: Any) -> None:
        """Ask for the lines ``start`` bytes behind the next of some addresses, the last if there are no more."""
        builder, word = self.builder, ir.IntType(64)
        last = builder.sub(count, word(1))
        for i in range(ASKED):
            index = builder.add(builder.mul(turn, word(ASKED)), word(i))
            if ASKED > 1:
                index = builder.select(builder.icmp_signed("<", index, last), index, last)
            place = builder.add(builder.load(builder.gep(rows, [index])), start)
            ask_line(builder, builder.inttoptr(place, self.type.as_pointer()), 2)  # the first is full of panels

    def scale_rows(self, factors: Any, m: Any) -> None:
        """Multiply every row by a factor of its own."""
        factors = [self.everywhere(self.builder.load(x)) for x in self.rows_of(factors, m, ir.IntType(64)(1))]
        for (i, _), total in self.sums.items():
            self.builder.store(self.builder.fmul(factors[i], self.builder.load(total)), total)

    def add_scaled(self, c: Any, c_step: Any, m: Any, factors: Any) -> None:
        """Add the rows of c, each times a factor of its own."""
        rows, factors = self.rows_of(c, m, c_step), self.rows_of(factors, m, ir.IntType(64)(1))
        factors = [self.everywhere(self.builder.load(x)) for x in factors]
        for (i, j), total in self.sums.items():
            self.accumulate(total, factors[i], self.load(rows[i], j))

    def give(self, c: Any, c_step: Any, m: Any, alpha: Any) -> None:
        """c = alpha times the sums."""
        rows, alpha = self.rows_of(c, m, c_step), self.everywhere(alpha)
        for (i, j), total in reversed(self.sums.items()):
            self.store(self.builder.fmul(alpha, self.builder.load(total)), rows[i], j)

    def give_onto(self, c: Any, c_step: Any, m: Any, alpha: Any, beta: Any) -> None:
        """c = alpha times the sums + beta c; all is read before any is written: repeated rows then write the same."""
        rows, alpha, beta = self.rows_of(c, m, c_step), self.everywhere(alpha), self.everywhere(beta)
        old = {(i, j): self.load(rows[i], j) for i, j in self.sums}
        for (i, j), total in reversed(self.sums.items()):
            scaled = self.builder.fmul(alpha, self.builder.load(total))
            self.store(self.multiply_add(beta, old[i, j], scaled), rows[i], j)


def tile_of(rows: int, c: Any, a: Any, b: Any) -> Any:
    """c = alpha a b + beta c for one tile."""
    like, index = c.dtype, types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, c_step, a, a_step, a_column, b, b_step, m, depth, alpha, beta = args
        sums = Tile(builder, like, rows)
        sums.add_products(a, a_step, a_column, b, b_step, m, depth)
        nothing = ir.Constant(sums.number, 0.0)
        with builder.if_else(builder.fcmp_ordered("==", beta, nothing)) as (afresh, onto):
            with afresh:
                sums.give(c, c_step, m, alpha)
            with onto:
                sums.give_onto(c, c_step, m, alpha, beta)
        return context.get_dummy_value()

    return types.void(c, index, a, index, index, b, index, index, index, like, like), codegen


def transposed_tile_of(rows: int, c: Any, onto: bool) -> Any:
    """c = a^T b, or c = diag(kept) c + a^T b, for one whole tile.

    Numbers of a that are needed together lie side by side: one address for all rows, where a tile of any matrix has one
    for each, and too few registers for them.
    """
    like, index = c.dtype, types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, c_step, a, a_step, b, b_step, depth, *kept = args
        one, m, sums = ir.IntType(64)(1), ir.IntType(64)(rows), Tile(builder, like, rows)
        sums.add_products(a, one, a_step, b, b_step, m, depth)
        if onto:
            sums.add_scaled(c, c_step, m, kept[0])
        sums.give(c, c_step, m, ir.Constant(sums.number, 1.0))
        return context.get_dummy_value()

    return types.void(c, index, c, index, c, index, index, *[c] * onto), codegen


def answer_tile_of(rows: int, o: Any) -> Any:
    """o = scale (diag(since) q S + scores v) for one tile."""
    like, index = o.dtype, types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        o, o_step, q, q_step, S, S_step, depth, since, scores, scores_step, v, v_step, m, n, scale = args[:-3]
        one, sums = ir.IntType(64)(1), Tile(builder, like, rows)
        sums.add_products(q, one, q_step, S, S_step, ir.IntType(64)(rows), depth, args[-3:])
        sums.scale_rows(since, m)
        sums.give(o, o_step, m, scale)
        own = Tile(builder, like, rows)  # sums of their own: added to those of the past, terms would lose digits
        own.add_products(scores, scores_step, one, v, v_step, m, n)
        own.give_onto(o, o_step, m, scale, ir.Constant(own.number, 1.0))
        return context.get_dummy_value()

    kinds = [o, index, o, index, o, index, index, o, o, index, o, index, index, index, like]
    kinds += [types.CPointer(types.intp), index, index]
    return types.void(*kinds), codegen


@intrinsic
def tile(typingctx, c, c_step, a, a_row, a_column, b, b_step, m, depth, alpha, beta):
    """A tile of ROWS rows."""
    return tile_of(ROWS, c, a, b)


@intrinsic
def last_tile(typingctx, c, c_step, a, a_row, a_column, b, b_step, m, depth, alpha, beta):
    """A tile of FEW rows."""
    return tile_of(FEW, c, a, b)


@intrinsic
def transposed_tile(typingctx, c, c_step, a, a_step, b, b_step, depth):
    """A tile of ROWS rows of a^T b."""
    return transposed_tile_of(ROWS, c, False)


@intrinsic
def transposed_tile_onto(typingctx, c, c_step, a, a_step, b, b_step, depth, kept):
    """A tile of ROWS rows, a^T b added to what is kept."""
    return transposed_tile_of(ROWS, c, True)


@intrinsic
def last_transposed_tile_onto(typingctx, c, c_step, a, a_step, b, b_step, depth, kept):
    """A tile of FEW rows, a^T b added to what is kept."""
    return transposed_tile_of(FEW, c, True)


@intrinsic
def answer_tile(
    typingctx, o, o_step, q, q_step, S, S_step, k, since, scores, scores_step, v, v_step, m, n, scale, rows,
    count, line
):
    """A tile of ROWS answers."""
    return answer_tile_of(ROWS, o)


@intrinsic
def last_answer_tile(
    typingctx, o, o_step, q, q_step, S, S_step, k, since, scores, scores_step, v, v_step, m, n, scale, rows,
    count, line
):
    """A tile of FEW answers."""
    return answer_tile_of(FEW, o)


@inner
def lanes(like):
    """Numbers in a row of a tile."""
    return PARTS * per_vector(like)


@inner
def multiply(c, a, b, m, n, depth, alpha, beta, shape):
    """c = alpha a b + beta c, for the first (m, n) numbers of c and the first ``depth`` terms.

    Parameters
    ----------
    c, b
        Panels: columns up to the next whole tile are written and read.
    a
        Any matrix.
    alpha, beta
        Factors in the dtype; with beta = 0 what stood in c is not read.
    shape
        ``full``; ``lower``: a is lower triangular (zero above its diagonal), so later terms are left out; ``triangle``:
        only the lower triangle of c is wanted (above it tiles are left as they are, or filled with more); ``upper``:
        a is upper triangular, so earlier terms are left out.
    """
    apart()
    size = lanes(alpha)
    for j in range(0, n, size):
        i = j if shape & triangle else 0
        while i < m:
            left = m - i
            few = left <= FEW or ROWS < left <= 2 * FEW
            rows = FEW if few else ROWS
            first = i if shape & upper else 0
            deep = min(i + rows, depth) if shape & lower else depth - first
            c_ij, a_i = move(c.data, i * c.step + j), move(row(a, i), first * a.column)
            b_j = move(row(b, first), j)
            if few:
                last_tile(c_ij, c.step, a_i, a.step, a.column, b_j, b.step, min(rows, left), deep, alpha, beta)
            else:
                tile(c_ij, c.step, a_i, a.step, a.column, b_j, b.step, min(rows, left), deep, alpha, beta)
            i += rows


@intrinsic
def ask_for_line(typingctx: Any, address: Any) -> Any:
    """Ask for the line at an address, see ``Tile.ask``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ask_line(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), 2)
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@inner
def ask(soon, first, last):
    """Ask for all lines of some rows, as far as there are rows."""
    for i in range(first, min(last, soon.count)):
        for line in range(soon.lines):
            ask_for_line(soon.rows[i] + CACHE_LINE * line)


@inner
def multiply_transposed(c, a, b, m, n, depth, soon, tile, tiles, like):
    """c = a^T b for panels: (m, n) numbers of c, rows and columns up to whole tiles too, and ``depth`` terms.

    The rows of ``soon``, see ``answers``, are asked for by so many tiles, of which those of this product are numbered
    from ``tile`` on.
    """
    apart()
    rows = (soon.count + tiles - 1) // tiles
    for j in range(0, n, lanes(like)):
        for i in range(0, m, ROWS):
            ask(soon, rows * tile, rows * (tile + 1))
            c_ij = move(c.data, i * c.step + j)
            transposed_tile(c_ij, c.step, move(a.data, i), a.step, move(b.data, j), b.step, depth)
            tile += 1


@inner
def add_transposed(c, kept, a, b, m, n, depth, like):
    """c = diag(kept) c + a^T b, as ``multiply_transposed``; ``kept`` is a row of factors."""
    apart()
    for j in range(0, n, lanes(like)):
        i = 0
        while i < m:
            few = m - i <= FEW or ROWS < m - i <= 2 * FEW
            c_ij, a_i, b_j, kept_i = move(c.data, i * c.step + j), move(a.data, i), move(b.data, j), move(kept, i)
            if few:
                last_transposed_tile_onto(c_ij, c.step, a_i, a.step, b_j, b.step, depth, kept_i)
            else:
                transposed_tile_onto(c_ij, c.step, a_i, a.step, b_j, b.step, depth, kept_i)
            i += FEW if few else ROWS


@inner
def part(soon, tile, tiles):
    """What one of so many tiles asks for: the first row, how many, and the byte from which a line is wanted."""
    sharers = max(tiles // soon.lines, 1)  # of a line of all rows
    size = (soon.count + sharers - 1) // sharers
    first, line = min(tile % sharers * size, soon.count - 1), min(tile // sharers, soon.lines - 1)
    return move(soon.rows, first), min(size, soon.count - first), CACHE_LINE * line


@inner
def answers(o, q, S, since, scores, v, n, columns, k, scale, soon):
    """o_i = scale since_i q_i S + scale sum_{j <= i} scores_ij v_j, for n rows of some columns.

    Parameters
    ----------
    o
        Rows whose columns up to the next whole tile are written: a panel, or the answers themselves if tiles fit.
    q
        A panel of columns, ``(k, n)``.
    S, scores, v
        Panels, ``(k, columns)``, ``(n, n)`` and ``(n, columns)``; above the diagonal of scores are zeros.
    since
        A row of factors.
    soon
        ``Soon``: the lines of these rows are asked for, by each tile some.
    """
    apart()
    size, number = lanes(scale), 0
    tiles = (columns + size - 1) // size * ((n + ROWS - 1) // ROWS)
    for j in range(0, columns, size):
        i = 0
        while i < n:
            left = n - i
            few = left <= FEW or ROWS < left <= 2 * FEW
            rows = FEW if few else ROWS
            m, deep = min(rows, left), min(i + rows, n)
            o_ij, S_j, v_j = move(o.data, i * o.step + j), move(S.data, j), move(v.data, j)
            q_i, since_i, scores_i = move(q.data, i), move(since, i), row(scores, i)
            asked, count, line = part(soon, number, tiles)
            if few:
                last_answer_tile(
                    o_ij, o.step, q_i, q.step, S_j, S.step, k, since_i, scores_i, scores.step, v_j, v.step,
                    m, deep, scale, asked, count, line,
                )  # fmt: skip
            else:
                answer_tile(
                    o_ij, o.step, q_i, q.step, S_j, S.step, k, since_i, scores_i, scores.step, v_j, v.step,
                    m, deep, scale, asked, count, line,
                )  # fmt: skip
            i, number = i + rows, number + 1


@inner
def give(o, low, start, panel, q, S, since, scores, v, n, columns, k, scale, soon):
    """``answers`` into rows and columns of a matrix from some on; a panel helps where whole tiles do not fit."""
    if columns % lanes(scale) == 0:
        here = Matrix(move(row(o, low), start), o.step, 1)
        answers(here, q, S, since, scores, v, n, columns, k, scale, soon)
    else:
        answers(panel, q, S, since, scores, v, n, columns, k, scale, soon)
        store(o, low, n, start, columns, panel)


@intrinsic
def copy_rows(typingctx: Any, y: Any, y_step: Any, x: Any, x_step: Any, n: Any, columns: Any) -> Any:
    """y = x for n rows of whole vectors."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y, y_step, x, x_step, n, columns = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        given, count = Vectors(builder, signature.args[2].dtype, vectors.count), vectors.holding(columns)
        with cgutils.for_range(builder, n, intp=word) as i:
            target, source = (builder.gep(z, [builder.mul(i.index, step)]) for z, step in ((y, y_step), (x, x_step)))
            with cgutils.for_range(builder, count, intp=word) as j:
                vectors.store(vectors.cast(given.load(source, j.index)), target, j.index)
        return context.get_dummy_value()

    return types.void(y, types.intp, x, types.intp, types.intp, types.intp), codegen


@inner
def load(into, x, low, n, start, columns):
    """Rows low to low + n of a matrix, columns from ``start`` on, into a panel."""
    apart()
    if x.column == 1 and columns % per_vector(into.data[0]) == 0:
        copy_rows(into.data, into.step, move(row(x, low), start), x.step, n, columns)
        return
    for i in range(n):
        gather(row(into, i), move(row(x, low + i), start * x.column), x.column, columns)


@intrinsic
def transpose_squares(typingctx: Any, into: Any, step: Any, source: Any, source_step: Any, squares: Any) -> Any:
    """``per_vector`` rows of so many squares side by side, as columns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, step, source, source_step, squares = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        with cgutils.for_range(builder, squares, intp=word) as loop:
            first = vectors.start(loop.index)
            start, target = builder.gep(source, [first]), builder.gep(into, [builder.mul(first, step)])
            rows = [vectors.load_from(start, builder.mul(word(i), source_step)) for i in range(vectors.count)]
            for i, column in enumerate(vectors.transpose(rows)):
                vectors.store_to(column, target, builder.mul(word(i), step))
        return context.get_dummy_value()

    return types.void(into, types.intp, into, types.intp, types.intp), codegen


@inner
def load_transposed(into, x, low, n, columns):
    """Rows low to low + n of a matrix as the columns of a panel."""
    apart()
    size = per_vector(x.data[0])
    done = columns // size * size if x.column == 1 else 0
    for start in range(0, n, size):
        source, rows = row(x, low + start), min(size, n - start)
        if rows == size:
            transpose_squares(move(into.data, start), into.step, source, x.step, done // size)
        since = done if rows == size else 0
        for i in range(rows if since < columns else 0):
            target = move(into.data, since * into.step + start + i)
            spread(target, into.step, move(source, i * x.step + since * x.column), x.column, columns - since)


@inner
def spread(target, target_step, source, column, columns):
    """One row as a column."""
    apart()
    for j in range(columns):
        target[j * target_step] = source[j * column]


@inner
def store(x, low, n, start, columns, source):
    """The first rows of a panel into rows low to low + n of a matrix of unit column stride, from ``start`` on."""
    apart()
    if columns % per_vector(x.data[0]) == 0:
        copy_rows(move(row(x, low), start), x.step, source.data, source.step, n, columns)
        return
    for i in range(n):
        copy(move(row(x, low + i), start), row(source, i), columns)


@intrinsic
def scale_each(typingctx: Any, x: Any, step: Any, factors: Any, factor_step: Any, n: Any, columns: Any) -> Any:
    """n rows of whole vectors, each times a factor of its own."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, step, factors, factor_step, n, columns = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        count = vectors.holding(columns)
        with cgutils.for_range(builder, n, intp=word) as i:
            line = builder.gep(x, [builder.mul(i.index, step)])
            factor = vectors.everywhere(builder.load(builder.gep(factors, [builder.mul(i.index, factor_step)])))
            with cgutils.for_range(builder, count, intp=word) as j:
                vectors.store(builder.fmul(factor, vectors.load(line, j.index)), line, j.index)
        return context.get_dummy_value()

    return types.void(x, types.intp, x, types.intp, types.intp, types.intp), codegen


@inner
def scale_rows(x, factors, n, columns):
    """Multiply the first rows of a panel by one factor each."""
    apart()
    scale_each(x.data, x.step, factors, 1, n, columns)


@inner
def clean_until(x, low, high, columns, gates, like):
    """The first of the rows low to high that holds a bad number, or ``high``: a product would spread it to other rows.

    Bad is what is not finite, or so large that a product may not be; but any gate below zero is a gate like others.
    """
    return clean_within(x, low, high, columns, gates, huge(like))


@inner
def clean_within(x, low, high, columns, gates, bound):
    """The same with a bound of one's own."""
    apart()
    bad = np.int32(0)
    if x.column == 1 and x.step == columns:
        bad += count_bad_of(row(x, low), (high - low) * columns, bound)
    else:
        for i in range(low, high):
            bad += count_bad(row(x, i), x.column, columns, bound)
    return high if bad == 0 else first_bad(x, low, high, columns, gates, bound)


@inner
def finite(x, rows, columns, like):
    """Whether all numbers of a matrix are finite, however large."""
    return clean_within(x, 0, rows, columns, False, most(like)) == rows


@inner
def first_bad(x, low, high, columns, gates, bound):
    """As ``clean_until``, number by number."""
    apart()
    for i in range(low, high):
        for j in range(columns):
            number = row(x, i)[j * x.column]
            if not abs(number) <= bound and not (gates and number < 0):
                return i
    return high
