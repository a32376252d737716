"""Times and errors of several contenders at several tasks, as bars and dots.

Importing this module imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plot import COLOURS

__all__ = ["draw_errors", "draw_times", "figure", "save"]

Rows = Sequence[dict[str, Any]]


def save(rows: Rows, path: str) -> None:
    """Draw rows into a file."""
    figure(rows).savefig(path, dpi=120)


def figure(rows: Rows) -> Figure:
    """Each row has a ``group`` (the task), a ``contender``, ``seconds`` with its spread, and an ``error``."""
    drawing = Figure(figsize=(13, max(3.0, 1.4 + 0.17 * len(rows))), layout="constrained")
    times, errors = drawing.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    draw_times(times, rows)
    draw_errors(errors, rows)
    return drawing


def places(rows: Rows) -> list[float]:
    """Heights of the rows, with a gap between tasks."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    return [i + 0.8 * groups.index(row["group"]) for i, row in enumerate(rows)]


def colours(rows: Rows) -> dict[str, str]:
    """One colour per contender, the same everywhere."""
    names = dict.fromkeys(row["contender"] for row in rows)
    return dict(zip(names, COLOURS * (1 + len(names) // len(COLOURS)), strict=False))


def draw_times(axes: Axes, rows: Rows) -> None:
    """Medians as bars, the middle three fifths as lines."""
    colour, heights = colours(rows), places(rows)
    for name in colour:
        mine = [(height, row["seconds"]) for height, row in zip(heights, rows, strict=True) if row["contender"] == name]
        median = [1e3 * s["median"] for _, s in mine]
        around = [[1e3 * (s["median"] - s["p20"]) for _, s in mine], [1e3 * (s["p80"] - s["median"]) for _, s in mine]]
        axes.barh([height for height, _ in mine], median, xerr=around, color=colour[name], label=name, ecolor="0.3")
    firsts = {row["group"]: height for height, row in reversed(list(zip(heights, rows, strict=True)))}
    axes.set_yticks(list(firsts.values()), list(firsts), fontsize=7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("ms, median and 20th to 80th percentile")
    axes.spines[["top", "right"]].set_visible(False)
    if colour:
        axes.legend(fontsize=7)


def draw_errors(axes: Axes, rows: Rows) -> None:
    """Errors against float64 as dots; an exact answer has none."""
    colour = colours(rows)
    for height, row in zip(places(rows), rows, strict=True):
        if row["error"] > 0:
            axes.plot(row["error"], height, "o", color=colour[row["contender"]], markersize=4)
    axes.set_xscale("log")
    axes.set_xlabel("error against float64")
    axes.spines[["top", "right"]].set_visible(False)
