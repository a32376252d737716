"""One column of a CSV file as numbers, another as times; whatever is wrong with the file is said in one line."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import datetime, timezone
from math import isfinite
from statistics import median
from typing import Any, NamedTuple

from . import Refusal
from .inputs import read as text_of

__all__ = ["Column", "read_column", "read_table"]

MISSING = {"", "na", "n/a", "nan", "null", "none"}
DELIMITERS = ",;\t"


class Column(NamedTuple):
    """Numbers (NaN where missing), the label of each row, and what a reader should know about the times."""

    values: list[float]
    labels: list[str]
    remark: str


class Table(NamedTuple):
    """A CSV file: its name, its columns, its rows and the line that each row ends on."""

    path: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def cells(self, name: str, option: str) -> list[str]:
        """A column by name."""
        count = self.header.count(name)
        if count != 1:
            found = "appears twice" if count else f"is not there; the columns are {', '.join(self.header)}"
            raise Refusal(f"{self.path}: the column {name!r} of {option} {found}")
        i = self.header.index(name)
        return [row[i].strip() for row in self.rows]


def read_column(path: str, name: str, time: str | None = None) -> Column:
    """A column of a CSV file with a heading; empty cells and NA, NaN, null, none are missing numbers.

    Parameters
    ----------
    path
        A UTF-8 file, ``-`` for standard input; separated by comma, semicolon or tabulator.
    name
        The column of numbers.
    time
        A column of numbers or ISO dates, strictly increasing; default: rows are counted.

    Raises
    ------
    Refusal
        If the file cannot be read, a column is missing or all empty, a cell is no number, or times do not increase.
    """
    table = read_table(path)
    values = [number(cell, table, i, name) for i, cell in enumerate(table.cells(name, "--column"))]
    if not any(map(isfinite, values)):
        raise Refusal(f"{path}: the column {name!r} has no number in {len(values)} rows")
    if time is None:
        return Column(values, [str(i) for i in range(1, len(values) + 1)], "")
    labels = table.cells(time, "--time")
    return Column(values, labels, check_times(moments(labels, table, time), labels, table))


def read_table(path: str) -> Table:
    """Heading and rows, all of the same width; empty lines are left out."""
    text = text_of(path)
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=first.count))
    try:
        found = [(row, reader.line_num) for row in reader if row]
    except csv.Error as problem:
        raise Refusal(f"{path} line {reader.line_num}: {problem}") from None
    if len(found) < 2:
        raise Refusal(f"{path} has {len(found)} line{'s' * (len(found) != 1)}; a heading and rows are needed")
    (header, _), *rows = found
    for row, line in rows:
        if len(row) != len(header):
            raise Refusal(f"{path} line {line}: {len(row)} cells, but the heading has {len(header)}")
    return Table(path, [cell.strip() for cell in header], [row for row, _ in rows], [line for _, line in rows])


def number(cell: str, table: Table, i: int, name: str) -> float:
    """A cell as a number, NaN if it is missing."""
    if cell.lower() in MISSING:
        return float("nan")
    try:
        value = float(cell)
    except ValueError:
        value = float("inf")
    if not isfinite(value) or "_" in cell:  # Python reads 1_000, other programs do not
        raise Refusal(f"{table.path} line {table.lines[i]}: {cell!r} in the column {name!r} is not a number")
    return value


def moments(labels: Sequence[str], table: Table, name: str) -> list[Any]:
    """Times that can be compared: all numbers, or all ISO dates."""
    for read in (as_number, as_date):
        try:
            return [read(label) for label in labels]
        except ValueError:
            wrong = next((i for i, label in enumerate(labels) if not is_time(read, label)), 0)
    raise Refusal(
        f"{table.path} line {table.lines[wrong]}: {labels[wrong]!r} in the column {name!r} is neither a number nor an "
        "ISO date, or the others are not of its kind"
    )


def as_number(label: str) -> float:
    """A finite number."""
    value = float(label)
    if not isfinite(value):
        raise ValueError(label)
    return value


def as_date(label: str) -> float:
    """Seconds since 1970 of an ISO date; without an offset it counts as UTC."""
    date = datetime.fromisoformat(label.replace("Z", "+00:00"))
    return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()


def is_time(read: Any, label: str) -> bool:
    """Whether a label can be read."""
    try:
        read(label)
    except ValueError:
        return False
    return True


def check_times(times: Sequence[float], labels: Sequence[str], table: Table) -> str:
    """Refuse times that do not increase; remark on steps that are much longer than the others."""
    steps = [late - early for early, late in zip(times[:-1], times[1:], strict=True)]
    for i, step in enumerate(steps, start=1):
        if step <= 0:
            what = "repeats" if step == 0 else "comes before"
            place = f"{table.path} line {table.lines[i]}"
            raise Refusal(f"{place}: the time {labels[i]} {what} {labels[i - 1]} of line {table.lines[i - 1]}")
    long = sum(step > 1.9 * median(steps) for step in steps)
    return f"{long} steps are longer than 1.9 times the median step: a row is one step, however long" if long else ""
