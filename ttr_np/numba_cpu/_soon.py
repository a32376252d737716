"""Rows that come next, asked for from memory while something else is computed.

A kernel that reads a chunk and then computes with it waits for memory first and leaves it idle afterwards. So products
ask for a cache line every dozen cycles, in which one arrives. Nothing that is asked for changes a number, and addresses
that are nobody's do no harm: the rows behind the last are asked for, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._compile import apart, inner
from ._panels import move, row
from ._vectors import per_line

__all__ = ["Soon", "note", "notebook", "notes_shape", "soon"]


class Soon(NamedTuple):
    """What is asked for, see ``_panels.part``."""

    rows: Any  # their addresses
    count: Any  # at least 1: products do not ask whether there is one
    lines: Any  # of the longest row


def notes_shape(chunk: int, matrices: int) -> tuple[int, int]:
    """Shape of the panel that holds the addresses of a chunk's rows: numbers may have half the size of an address."""
    return 1, 2 * max(1, chunk * matrices)


@intrinsic
def address(typingctx: Any, place: Any) -> Any:
    """Address of a number."""
    return types.intp(place), lambda context, builder, signature, args: builder.ptrtoint(args[0], ir.IntType(64))


@inner
def notebook(rows):
    """A list of addresses, the first of them its own: what is asked for is then always an address."""
    rows[0] = address(rows)
    return rows


@inner
def note(rows, count, x, start, low, n):
    """Add n rows of a matrix, from column ``start`` on, to a list; how many it holds then. What is scattered is not."""
    apart()
    if x.column != 1:
        return count
    for i in range(n):
        rows[count + i] = address(move(row(x, low + i), start))
    return count + n


@inner
def soon(rows, count, columns, like):
    """What is asked for of a list of rows of some numbers."""
    line = per_line(like)
    return Soon(rows, max(count, 1), (columns + line - 1) // line)
