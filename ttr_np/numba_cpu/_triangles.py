"""Triangles of panels, for kernels: solved by forward substitution and inverted, FEW rows of the result in registers.

Every number is computed from those above it in its column, in their order: columns and rows that are left out change no
bit of the others. Columns up to the next whole tile are read and written, as in a product of panels.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._compile import apart, inner
from ._panels import FEW, PARTS, Tile, fill, real, row
from ._vectors import Vectors, ceil_div

__all__ = ["invert_lower", "solve_lower", "solve_unit_lower"]


class Rows(Tile):
    """Sums of what a few rows subtract before they are solved for themselves."""

    def solve(self, x: Any, x_step: Any, L: Any, L_step: Any, m: Any, shares: list[Any] | None) -> None:
        """Their x from what is left of it, with one over the diagonal of L; all is read before any is written."""
        builder, rows, factors = self.builder, self.rows_of(x, m, x_step), self.rows_of(L, m, L_step)
        solved: list[list[Any]] = []
        for i, (mine, line) in enumerate(zip(rows, factors, strict=True)):
            left = [builder.fsub(self.load(mine, j), builder.load(self.sums[i, j])) for j in range(PARTS)]
            for p, others in enumerate(solved):
                factor = builder.fneg(self.everywhere(builder.load(builder.gep(line, [ir.IntType(64)(p)]))))
                left = [self.multiply_add(factor, other, x) for other, x in zip(others, left, strict=True)]
            solved.append(left if shares is None else [builder.fmul(shares[i], x) for x in left])
        for mine, numbers in reversed(list(zip(rows, solved, strict=True))):
            for j, x in enumerate(numbers):
                self.store(x, mine, j)

    def shares_of(self, L: Any, L_step: Any, m: Any) -> list[Any]:
        """One over each number of the diagonal, everywhere."""
        builder, one, word = self.builder, ir.Constant(self.number, 1.0), ir.IntType(64)
        diagonal = [builder.load(builder.gep(x, [word(i)])) for i, x in enumerate(self.rows_of(L, m, L_step))]
        return [self.everywhere(builder.fdiv(one, x)) for x in diagonal]


def solve_of(x: Any, unit: bool, fresh: bool) -> Any:
    """m <= FEW rows of x, those from ``low`` on, by those above, for all their columns; L: its rows from ``low`` on.

    unit: ones are on the diagonal of L, whatever stands there. fresh: x is lower triangular, so terms are left out.
    """
    like, index = x.dtype, types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_step, L, L_step, low, m, columns = args
        word, own = ir.IntType(64), builder.gep(L, [low])
        shares = None if unit else Rows(builder, like, FEW).shares_of(own, L_step, m)
        size = PARTS * Vectors(builder, like).count
        with cgutils.for_range(builder, ceil_div(builder, columns, size), intp=word) as loop:
            tile, j = Rows(builder, like, FEW), builder.mul(loop.index, word(size))
            first, column = j if fresh else word(0), builder.gep(x, [j])
            above = builder.gep(column, [builder.mul(first, x_step)])
            tile.add_products(builder.gep(L, [first]), L_step, word(1), above, x_step, m, builder.sub(low, first))
            tile.solve(builder.gep(column, [builder.mul(low, x_step)]), x_step, own, L_step, m, shares)
        return context.get_dummy_value()

    return types.void(x, index, x, index, index, index, index), codegen


@intrinsic
def solve_rows(typingctx, x, x_step, L, L_step, low, m, columns):
    """A few rows of x = L^-1 x."""
    return solve_of(x, unit=False, fresh=False)


@intrinsic
def solve_unit_rows(typingctx, x, x_step, L, L_step, low, m, columns):
    """The same with ones on the diagonal of L."""
    return solve_of(x, unit=True, fresh=False)


@intrinsic
def invert_rows(typingctx, x, x_step, L, L_step, low, m, columns):
    """The same for a lower triangle x."""
    return solve_of(x, unit=False, fresh=True)


@inner
def solve_lower(L, x, m, n):
    """x = L^-1 x in place for a lower triangle; x a panel, ``(m, n)`` of it."""
    apart()
    for low in range(0, m, FEW):
        solve_rows(x.data, x.step, row(L, low), L.step, low, min(FEW, m - low), n)


@inner
def solve_unit_lower(L, x, m, n):
    """x = (I + strictly lower triangle of L)^-1 x in place; x a panel, ``(m, n)`` of it.

    Substitution has the error bound of the recurrence itself; powers or inverses of L lose digits when keys repeat.
    """
    apart()
    for low in range(0, m, FEW):
        solve_unit_rows(x.data, x.step, row(L, low), L.step, low, min(FEW, m - low), n)


@inner
def invert_lower(L, X, n, like):
    """X = L^-1 for a lower triangle; above the diagonal X is zero."""
    apart()
    for low in range(0, n, FEW):
        m = min(FEW, n - low)
        for i in range(low, low + m):
            fill(row(X, i), real(like, 0), n)
            row(X, i)[i] = real(like, 1)
        invert_rows(X.data, X.step, row(L, low), L.step, low, m, low + m)
