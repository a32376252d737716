"""The figure of ``ttr forecast``: the newest steps with the best forecast and its band, and the errors of all.

Importing this module imports matplotlib.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .columns import Column
from .recall_plot import COLOURS

__all__ = ["figure", "save"]

NEWEST = 160  # steps; more would hide the band


def save(result: dict[str, Any], column: Column, path: str) -> None:
    """Draw a result of ``forecast`` into a file."""
    figure(result, column).savefig(path, dpi=100)


def figure(result: dict[str, Any], column: Column) -> Figure:
    """Draw a result of ``forecast``: the newest steps on the left, errors over persistence's on the right."""
    drawing = Figure(figsize=(12, max(4.4, 1.6 + 0.18 * len(result["layers"]))), layout="constrained")
    left, right = drawing.subplots(1, 2, width_ratios=[2, 1])
    draw_series(left, result, column)
    draw_errors(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    drawing.suptitle(f"One-step-ahead forecasts of {result['column']}, {result['source']}")
    return drawing


def draw_series(axes: Axes, result: dict[str, Any], column: Column) -> None:
    """The newest steps, their forecasts by the best layer, the band, and the step to come."""
    best = result["layers"][0]
    count = min(NEWEST, len(best["series"]["forecast"]))
    middle, half = (best["series"][key][-count:] for key in ("forecast", "half_width"))
    half = np.where(np.isfinite(half), half, np.nan)
    steps, labels = np.arange(count), [*column.labels[len(column.labels) - count + 1 :], "next"]
    level = f"{100 * result['level']:g} % band"
    axes.fill_between(steps, middle - half, middle + half, color=COLOURS[5], alpha=0.4, linewidth=0, label=level)
    axes.plot(steps, middle, color=COLOURS[0], linewidth=1.4, label=f"forecast, {best['name']}")
    measured = column.values[len(column.values) - count + 1 :]
    axes.plot(steps[:-1], measured, ".", color="black", markersize=4, label="measured")
    places = np.linspace(0, count - 1, 6).astype(int)
    axes.set_xticks(places, [labels[i] for i in places])
    axes.set_ylabel(result["column"])
    axes.legend(fontsize=8, loc="upper left")


def draw_errors(axes: Axes, result: dict[str, Any]) -> None:
    """One bar per forecaster, least error on top; persistence as a line."""
    entries = sorted(result["layers"] + result["baselines"], key=lambda entry: entry["rmse"])
    places = range(len(entries))
    colours = [COLOURS[0] if "optimizer" in entry else COLOURS[8] for entry in entries]
    axes.barh(places, [entry["rmse"] for entry in entries], color=colours)
    axes.set_yticks(places, [entry["name"] for entry in entries], fontsize=8)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    (persistence,) = (entry["rmse"] for entry in result["baselines"] if entry["name"] == "persistence")
    axes.axvline(persistence, color="black", linestyle="--", linewidth=1, label="persistence")
    axes.set_xlabel("root mean squared error")
    axes.tick_params(axis="y", length=0)
    axes.legend(fontsize=8, loc="center right")
