"""The figure of a benchmark: times and errors per question, cost over lengths, the crossover."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttr_np.cli.plot import COLOURS
from ttr_np.cli.timing_plot import draw_errors, draw_times

from .report import name_of

__all__ = ["figure", "save"]


def save(result: dict[str, Any], path: str) -> None:
    """Draw a result into a file."""
    figure(result).savefig(path, dpi=100)


def figure(result: dict[str, Any]) -> Figure:
    """Questions on the left and in the middle, lengths on the right."""
    rows = [found | {"group": name_of(entry)} for entry in result["questions"] for found in entry["results"]]
    drawing = Figure(figsize=(20, max(8, 1.4 + 0.17 * len(rows))), layout="constrained")
    panels = drawing.subplot_mosaic(
        [["times", "errors", "scaling"], ["times", "errors", "crossover"]], width_ratios=(3, 1.5, 2)
    )
    panels["errors"].sharey(panels["times"])
    draw_times(panels["times"], rows)
    draw_errors(panels["errors"], rows)
    panels["errors"].tick_params(labelleft=False)
    draw_scaling(panels["scaling"], result["scaling"])
    draw_crossover(panels["crossover"], result["crossover"])
    machine = result["machine"]
    drawing.suptitle(f"{machine['processor']}, {result['threads']} threads, {result['date']}, {result['commit']}")
    return drawing


def draw_scaling(axes: Axes, entries: list[dict[str, Any]]) -> None:
    """Cost per token over lengths."""
    for entry, colour in zip(entries, COLOURS * 3, strict=False):
        name = " ".join(part for part in (entry["operator"], entry["variant"]) if part)
        axes.loglog(
            [row["T"] for row in entry["rows"]],
            [row["ns_per_token_head"] for row in entry["rows"]],
            marker="o",
            color=colour,
            label=f"{name} ({entry['backend']})",
        )
    axes.set_xlabel("T")
    axes.set_ylabel("ns per token of one head")
    if entries:
        axes.legend(fontsize=7)


def draw_crossover(axes: Axes, found: dict[str, Any] | None) -> None:
    """Times over lengths."""
    rows = found["rows"] if found else []
    for name, colour in zip(dict.fromkeys(name for row in rows for name in row["seconds"]), COLOURS, strict=False):
        mine = [row for row in rows if name in row["seconds"]]
        times = [1e3 * row["seconds"][name]["median"] for row in mine]
        axes.loglog([row["T"] for row in mine], times, marker="o", color=colour, label=name)
    axes.set_xlabel("T")
    axes.set_ylabel("ms")
    if rows:
        axes.legend(fontsize=8)
