"""Times and errors of several contenders at several tasks, as bars and dots.

Importing this module imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .recall_plot import COLOURS
from .table import digits

__all__ = ["figure", "save"]

Rows = Sequence[dict[str, Any]]


def save(rows: Rows, path: str, title: str = "") -> None:
    """Draw rows into a file."""
    figure(rows, title).savefig(path, dpi=120)


def figure(rows: Rows, title: str = "") -> Figure:
    """Each row has a ``group`` (the task), a ``contender``, ``seconds`` with its spread, and an ``error``."""
    drawing = Figure(figsize=(13, max(3.0, 1.6 + 0.24 * len(rows))), layout="constrained")
    times, errors = drawing.subplots(1, 2, sharey=True, width_ratios=(5, 2))
    draw_times(times, rows)
    draw_errors(errors, rows)
    for axes in (times, errors):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    drawing.suptitle(title, fontsize=12)
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
    """Medians as bars with their milliseconds, the middle three fifths as lines."""
    heights = places(rows)
    for name, colour in colours(rows).items():
        mine = [(height, row["seconds"]) for height, row in zip(heights, rows, strict=True) if row["contender"] == name]
        draw_bars(axes, [height for height, _ in mine], [times for _, times in mine], colour, name)
    groups: dict[str, list[float]] = {}
    for height, row in zip(heights, rows, strict=True):
        groups.setdefault(row["group"], []).append(height)
    axes.set_yticks([sum(each) / len(each) for each in groups.values()], list(groups), fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("log")
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("ms, median and 20th to 80th percentile")
    if rows:
        axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)


def draw_bars(axes: Axes, heights: Sequence[float], times: Sequence[dict[str, float]], colour: str, name: str) -> None:
    """The bars of one contender."""
    median = [1e3 * each["median"] for each in times]
    around = [[1e3 * abs(each["median"] - each[end]) for each in times] for end in ("p20", "p80")]
    axes.barh(heights, median, xerr=around, color=colour, label=name, ecolor="0.3", height=0.85)
    for height, each, ms in zip(heights, times, median, strict=True):
        place = (1e3 * max(each["p80"], each["median"]), height)
        axes.annotate(digits(ms), place, (4, 0), textcoords="offset points", va="center", fontsize=8)


def draw_errors(axes: Axes, rows: Rows) -> None:
    """Errors against float64 as dots on whole decades; an exact answer has none."""
    colour, errors = colours(rows), [row["error"] for row in rows if row["error"] > 0]
    for height, row in zip(places(rows), rows, strict=True):
        if row["error"] > 0:
            axes.plot(row["error"], height, "o", color=colour[row["contender"]], markersize=5)
    axes.set_xscale("log")
    if errors:
        axes.set_xlim(min(errors) / 3, max(errors) * 3)
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("largest error, over the largest answer")
