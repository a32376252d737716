"""One token of a linear memory, whose state S passes through registers as few times as it can.

    recall    o = sum_p x_p keep_p S_p
    learn     S_p = keep_p S_p + k_p e,    o = sum_p q_p S_p

S_p is row p. Some columns are taken at a time and their sums stay in registers; a column's numbers are those that it
would have alone. Where a share that is kept is 0 nothing is left, not even of a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._compile import apart, inner
from ._gates import exp
from ._panels import fill, real
from ._sequences import NO_GATES, PER_CHANNEL
from ._vectors import Vectors

__all__ = ["learn_rows", "recall_rows", "shares"]

WIDE_TILE = 4  # vectors of columns at a time: as many sums hide the latency of each
TILES = ((WIDE_TILE, None), (1, None), (1, 4), (1, 1))  # vectors, and numbers in each (None: a whole register)


@inner
def shares(into, gates, column, d, kind, like):
    """What is kept of each row at one step: e to its gate."""
    apart()
    if kind == PER_CHANNEL:
        for p in range(d):
            into[p] = exp(gates[p * column])
    else:
        fill(into, real(like, 1) if kind == NO_GATES else exp(gates[0]), d)


class Rows:
    """Some columns of S, and the numbers that belong to its rows."""

    def __init__(self, vectors: Vectors, S: Any, step: Any, first: Any, parts: int) -> None:
        self.vectors, self.step, self.parts = vectors, step, parts
        self.first = [vectors.builder.add(first, first.type(i * vectors.count)) for i in range(parts)]
        self.S = S

    def number(self, x: Any, column: Any, p: Any) -> Any:
        """Number p of some, everywhere."""
        builder = self.vectors.builder
        return self.vectors.everywhere(builder.load(builder.gep(x, [builder.mul(p, column)])))

    def kept(self, i: int, p: Any, keep: Any) -> Any:
        """Vector i of row p, what is kept of it."""
        builder, x = self.vectors.builder, self.vectors.load_from(self.S, self.place(i, p))
        if keep is None:
            return x
        zero = self.vectors.constant(0.0)
        return builder.select(builder.fcmp_ordered("==", keep, zero), zero, builder.fmul(keep, x))

    def place(self, i: int, p: Any) -> Any:
        """Where vector i of row p is."""
        builder = self.vectors.builder
        return builder.add(builder.mul(p, self.step), self.first[i])

    def give(self, totals: list[Any], o: Any) -> None:
        """Write sums."""
        for total, first in zip(totals, self.first, strict=True):
            self.vectors.store_to(self.vectors.builder.load(total), o, first)


def in_tiles(builder: Any, like: Any, S: Any, step: Any, columns: Any, body: Callable[[Rows], None]) -> None:
    """The body for all columns: many at a time, then fewer and fewer."""
    word, done = ir.IntType(64), ir.IntType(64)(0)
    for parts, count in TILES:
        vectors = Vectors(builder, like, count)
        width = word(parts * vectors.count)
        end = builder.sub(columns, builder.urem(columns, width))
        with cgutils.for_range_slice(builder, done, end, width, intp=word) as (first, _):
            body(Rows(vectors, S, step, first, parts))
        done = end


def gated_or_not(builder: Any, gated: Any, keeps: Any, walk: Callable[[Any], None]) -> None:
    """Two walks: one that looks at what is kept and one that keeps all."""
    with builder.if_else(builder.icmp_signed("!=", gated, gated.type(0))) as (some, every):
        with some:
            walk(keeps)
        with every:
            walk(None)


@intrinsic
def recall_rows(
    typingctx: Any, o: Any, S: Any, step: Any, keeps: Any, gated: Any, x: Any, column: Any, d: Any, columns: Any
) -> Any:
    """o = what the memory says to x, before it forgets and learns; ``gated`` is 0 where all is kept."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        o, S, step, keeps, gated, x, column, d, columns = args

        def recall(rows: Rows, keeps: Any) -> None:
            totals = rows.vectors.totals(rows.parts)
            with cgutils.for_range(builder, d, intp=ir.IntType(64)) as loop:
                keep = None if keeps is None else rows.number(keeps, ir.IntType(64)(1), loop.index)
                x_p = rows.number(x, column, loop.index)
                for i, total in enumerate(totals):
                    rows.vectors.accumulate(total, x_p, rows.kept(i, loop.index, keep))
            rows.give(totals, o)

        def walk(keeps: Any) -> None:
            in_tiles(builder, signature.args[0].dtype, S, step, columns, lambda rows: recall(rows, keeps))

        gated_or_not(builder, gated, keeps, walk)
        return context.get_dummy_value()

    word = types.intp
    return types.void(o, o, word, o, word, o, word, word, word), codegen


@intrinsic
def learn_rows(
    typingctx: Any, o: Any, S: Any, step: Any, keeps: Any, gated: Any, k: Any, k_column: Any, e: Any, q: Any,
    q_column: Any, d: Any, columns: Any,
) -> Any:  # fmt: skip
    """S after it forgot and learnt e at k, and o = what it then says to q; ``gated`` is 0 where all is kept."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        o, S, step, keeps, gated, k, k_column, e, q, q_column, d, columns = args

        def learn(rows: Rows, keeps: Any) -> None:
            vectors = rows.vectors
            totals, errors = vectors.totals(rows.parts), [vectors.load_from(e, first) for first in rows.first]
            with cgutils.for_range(builder, d, intp=ir.IntType(64)) as loop:
                keep = None if keeps is None else rows.number(keeps, ir.IntType(64)(1), loop.index)
                k_p, q_p = rows.number(k, k_column, loop.index), rows.number(q, q_column, loop.index)
                for i, (total, error) in enumerate(zip(totals, errors, strict=True)):
                    new = vectors.multiply_add(k_p, error, rows.kept(i, loop.index, keep))
                    vectors.store_to(new, S, rows.place(i, loop.index))
                    vectors.accumulate(total, q_p, new)
            rows.give(totals, o)

        def walk(keeps: Any) -> None:
            in_tiles(builder, signature.args[0].dtype, S, step, columns, lambda rows: learn(rows, keeps))

        gated_or_not(builder, gated, keeps, walk)
        return context.get_dummy_value()

    word = types.intp
    return types.void(o, o, word, o, word, o, word, o, o, word, word, word), codegen
