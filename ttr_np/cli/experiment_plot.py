"""The figure of ``ttr experiment``: one panel per table, one line per method, closed forms dashed.

Importing this module imports matplotlib.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .recall_plot import COLOURS

__all__ = ["figure", "save"]

MARKERS = "osD^vP*Xph"


def save(result: dict[str, Any], path: str) -> None:
    """Draw a result of an experiment into a file."""
    figure(result).savefig(path, dpi=100)


def figure(result: dict[str, Any]) -> Figure:
    """Draw a result: mean and standard error of every method, and the closed form where there is one."""
    panels = result["panels"]
    drawing = Figure(figsize=(1.2 + 5.6 * len(panels), 4.4), layout="constrained")
    for axes, found in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, found)
    return drawing


def draw(axes: Axes, found: dict[str, Any]) -> None:
    """One panel."""
    places = found["places"]
    for entry, colour, marker in zip(found["rows"], COLOURS, MARKERS, strict=False):
        error = [0.0 if x is None else x for x in entry["error"]]
        style = {"color": colour, "marker": marker, "markersize": 5, "label": entry["name"]}
        line = "none" if entry["theory"] is not None else "-"
        axes.errorbar(places, entry["mean"], error, linestyle=line, linewidth=1.4, capsize=2, **style)
        if entry["theory"] is not None:
            axes.plot(places, entry["theory"], color=colour, linestyle="--", linewidth=1.4)
    if any(entry["theory"] is not None for entry in found["rows"]):
        axes.plot([], [], color="black", linestyle="--", label="closed form")
    scale(axes, found)
    axes.set_xlabel(found["axis"])
    axes.set_ylabel(found["measure"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, framealpha=0.8)


def scale(axes: Axes, found: dict[str, Any]) -> None:
    """Logarithmic axes where the panel asks for them, with a tick at every place."""
    if "x" in found["log"]:
        axes.set_xscale("log")
    if "y" in found["log"]:
        axes.set_yscale("log")
    axes.set_xticks(found["places"], [f"{x:g}" for x in found["places"]])
    axes.set_xticks([], minor=True)
