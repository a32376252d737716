"""Plain tables: aligned columns that fit a width."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import floor, log10

__all__ = ["aligned", "digits"]

LEAST = 8  # a shortened column still says something


def aligned(
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    whole: Collection[int] = (),
    width: int | None = None,
) -> str:
    """Rows of text as lines, the first one the heading.

    Parameters
    ----------
    rows
        Cells; every row as long as the first.
    right
        Columns of numbers, set flush right and never shortened.
    whole
        Columns of text that are never shortened.
    width
        Other columns are shortened, the widest first, until a line has at most this many characters.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [i for i in range(len(widths)) if i not in right and i not in whole]
    while text and width is not None and sum(widths) + len(widths) - 1 > width:
        widest = max(text, key=widths.__getitem__)
        if widths[widest] <= LEAST:
            break
        widths[widest] -= 1
    lines = [line(row, widths, right) for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def line(row: Sequence[str], widths: Sequence[int], right: Collection[int]) -> str:
    """One row, each cell in its width."""
    cells = [
        cell.rjust(width) if i in right else shortened(cell, width).ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return " ".join(cells).rstrip()


def shortened(cell: str, width: int) -> str:
    """A cell cut to a width, with a mark where it was cut."""
    return cell if len(cell) <= width else cell[: width - 1] + "…"


def digits(x: float, count: int = 3) -> str:
    """A number to so many digits, never with an exponent; digits before the point are never dropped."""
    before = floor(log10(abs(x))) + 1 if x else 1
    return f"{x:.{max(0, count - before)}f}"
