"""The figure of ``ttr recall``: bars by layer, lines by distance, recall against speed.

Importing a module of figures imports matplotlib; nothing else in the package does.
"""

from __future__ import annotations

import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

__all__ = ["figure", "save"]

# Okabe and Ito's colours and two more, told apart by most eyes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#B8A900", "#7F7F7F", "#332288")
LINES = 6  # more would hide each other
BASELINE = {"last continuation seen": ":", "most frequent continuation seen": "--"}


def save(result: dict[str, Any], path: str) -> None:
    """Draw a result of ``text_recall`` into a file."""
    figure(result).savefig(path, dpi=150)


def figure(result: dict[str, Any]) -> Figure:
    """Draw a result of ``text_recall``: what each layer recalls, over which distances, at what speed."""
    kinds = dict.fromkeys(map(kind, result["layers"]))
    colours = dict(zip(kinds, COLOURS * (1 + len(kinds) // len(COLOURS)), strict=False))
    drawing = Figure(figsize=(12, max(6.5, 1.6 + 0.17 * len(result["layers"]))), layout="constrained")
    panels = drawing.subplot_mosaic([["bars", "lines"], ["bars", "speed"]])
    draw_bars(panels["bars"], result, colours)
    draw_lines(panels["lines"], result, colours)
    draw_speed(panels["speed"], result, colours)
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    text = result["text"]
    drawing.suptitle(
        f"Recall of the next token, without training\n{text['source']}: {text['used']} tokens, {text['words']} words, "
        f"embeddings of dimension {result['dimension']}"
    )
    return drawing


def kind(entry: dict[str, Any]) -> str:
    """What colours show: regressor and optimizer, without their details."""
    regressor = re.split(",| in | over ", entry["regressor"])[0]
    return f"{regressor}, {entry['optimizer'].split(',')[0]}"


def draw_bars(axes: Axes, result: dict[str, Any], colours: dict[str, str]) -> None:
    """One bar per layer, best on top; counting as vertical lines."""
    layers = result["layers"]
    places = range(len(layers))
    axes.barh(places, [100 * (e["recall"] or 0) for e in layers], color=[colours[kind(e)] for e in layers])
    axes.set_yticks(places, [entry["name"] for entry in layers], fontsize=8)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    for entry in result["baselines"]:
        axes.axvline(
            100 * (entry["recall"] or 0), color="black", linestyle=BASELINE[entry["name"]], label=entry["name"]
        )
    keys = [Patch(color=value, label=name) for name, value in colours.items()]
    axes.legend(handles=[*keys, *axes.get_legend_handles_labels()[0]], loc="lower right", fontsize=8, framealpha=1)
    axes.set_xlabel("recall, % of the tokens seen before")
    axes.tick_params(axis="y", length=0)


def draw_lines(axes: Axes, result: dict[str, Any], colours: dict[str, str]) -> None:
    """Recall by distance: the best of each colour, and counting."""
    best: dict[str, dict[str, Any]] = {}
    for entry in result["layers"]:
        best.setdefault(kind(entry), entry)
    for name, entry in list(best.items())[:LINES]:
        axes.plot(percentages(entry), color=colours[name], marker="o", markersize=4, label=entry["name"])
    for entry in result["baselines"]:
        axes.plot(percentages(entry), color="black", linestyle=BASELINE[entry["name"]], label=entry["name"])
    axes.set_xticks(range(len(result["distances"])), [entry["tokens"] for entry in result["distances"]])
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens since the current token was last seen")
    axes.set_ylabel("recall, %")
    axes.legend(title="best of each colour", fontsize=8, title_fontsize=8)


def percentages(entry: dict[str, Any]) -> list[float]:
    """Recall by distance; a bin without tokens leaves a gap."""
    return [float("nan") if share is None else 100 * share for share in entry["by_distance"]]


def draw_speed(axes: Axes, result: dict[str, Any], colours: dict[str, str]) -> None:
    """Recall against speed, one point per layer and backend."""
    names = list(dict.fromkeys(run["backend"] for entry in result["layers"] for run in entry["runs"]))
    for name, marker in zip(names, "os^Dv", strict=False):
        found = [(e, run) for e in result["layers"] for run in e["runs"] if run["backend"] == name]
        axes.scatter(
            [run["tokens_per_second"] for _, run in found],
            [100 * (e["recall"] or 0) for e, _ in found],
            c=[colours[kind(e)] for e, _ in found],
            marker=marker,
            alpha=0.8,
            linewidths=0,
            label=name,
        )
    axes.set_xscale("log")
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens per second")
    axes.set_ylabel("recall, %")
    if names:
        axes.legend(title="backend", fontsize=8, title_fontsize=8, loc="lower left")
