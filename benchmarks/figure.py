"""The figure of a benchmark: everybody beside our fastest, errors, cost over lengths, the crossover.

One line per question. Colours tell packages apart, shapes the ways of one package; hollow is compiled by torch.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from ttr_np.cli.recall_plot import COLOURS
from ttr_np.cli.table import digits

from .questions import OURS

__all__ = ["figure", "save"]

PACKAGES = ("numpy", "numba", "torch", "fla", "padasip", "statsmodels", "scikit-learn", "stream", "numba-cuda", "cupy")
SHAPES = {"torch loop": "v", "torch scan": "^"}
MARKERS = "os^vDPX<>*"


def save(result: dict[str, Any], path: str) -> None:
    """Draw a result into a file."""
    figure(result).savefig(path, dpi=110)


def figure(result: dict[str, Any]) -> Figure:
    """Questions on the left, lengths on the right, whichever there are."""
    entries, lengths = result["questions"], bool(result["scaling"])
    height = max(9.0 if lengths else 3.5, 2.2 + 0.27 * len(entries))
    drawing = Figure(figsize=(21 if entries and lengths else 14, height), layout="constrained")
    names = [["times", "errors"]] * bool(entries)
    right = [["scaling"], ["crossover"]] if lengths else []
    rows = [[*(names[0] if names else []), *(each)] for each in right] or names
    widths = [5, 2] * bool(entries) + [4] * lengths
    panels = drawing.subplot_mosaic(rows, width_ratios=widths)
    draw_questions(panels, entries)
    draw_lengths(panels, result)
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    drawing.suptitle(heading(result), fontsize=13)
    return drawing


def heading(result: dict[str, Any]) -> str:
    """What it was measured on."""
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {result['threads']} in use"
    return f"ttr_np {machine['ttr_np']} at {result['commit']}, {result['date']}\n{where}"


def draw_questions(panels: dict[str, Axes], entries: list[dict[str, Any]]) -> None:
    """Times and errors, one line per question."""
    if not entries:
        return
    times, errors = panels["times"], panels["errors"]
    for height, entry in enumerate(entries):
        draw_entry(times, errors, height, entry)
    stripes(times, errors, entries)
    labels = [name_of(entry) for entry in entries]
    times.set_yticks(range(len(entries)), labels, fontsize=8)
    for axes in (times, errors):
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.grid(axis="x", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    finish_times(times)
    errors.set_yticks([])
    errors.set_xscale("log")
    errors.set_xlabel("largest error, over the largest answer")


def name_of(entry: dict[str, Any]) -> str:
    """Operator, variant, sizes that differ between questions."""
    shape = entry["shape"]
    name = ", ".join(part for part in (entry["operator"], entry["variant"]) if part)
    return f"{name}   D {shape['D']}  T {shape['T']}"


def draw_entry(times: Axes, errors: Axes, height: int, entry: dict[str, Any]) -> None:
    """Everybody's time over that of our fastest, and errors; our fastest in milliseconds beside the line."""
    mine = [found["seconds"]["median"] for found in entry["results"] if found["contender"] in OURS]
    unit = min(mine, default=1.0)
    for found in entry["results"]:
        look, spread = style(found["contender"]), found["seconds"]
        ends = [[(spread["median"] - spread["p20"]) / unit], [(spread["p80"] - spread["median"]) / unit]]
        times.errorbar(spread["median"] / unit, height, xerr=ends, elinewidth=1, **look)
        if found["error"] > 0:
            errors.plot(found["error"], height, **look)
    text = f"{digits(1e3 * unit)} ms"
    times.annotate(text, (1.0, height), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8)


def style(contender: str) -> dict[str, Any]:
    """Colour by package, shape by its way, hollow if compiled by torch."""
    package = next((i for i, name in enumerate(PACKAGES) if contender.startswith(name)), len(PACKAGES) - 1)
    shape = SHAPES.get(contender.split(" compiled")[0].removesuffix(" cuda"), "o")
    face = {"markerfacecolor": "white"} if "compiled" in contender else {}
    return {"color": COLOURS[package], "marker": shape, "markersize": 6, "linestyle": "none", "label": contender} | face


def stripes(times: Axes, errors: Axes, entries: list[dict[str, Any]]) -> None:
    """A pale band behind every second operator."""
    names = list(dict.fromkeys(entry["operator"] for entry in entries))
    for height, entry in enumerate(entries):
        if names.index(entry["operator"]) % 2 == 0:
            for axes in (times, errors):
                axes.axhspan(height - 0.5, height + 0.5, color="0.965", linewidth=0)


def finish_times(axes: Axes) -> None:
    """A log axis around 1, where our fastest is; a legend that names everybody once."""
    axes.set_xscale("log")
    axes.axvline(1, color="0.4", linewidth=1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.set_xlabel("time over that of our fastest (median, 20th to 80th percentile); on the right, our fastest")
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = sorted(handles, key=lambda name: (PACKAGES.index(package_of(name)), name))
    axes.legend(
        [handles[name] for name in order],
        order,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(len(order), 7),
        fontsize=8,
        frameon=False,
    )


def package_of(contender: str) -> str:
    """Whose it is."""
    return next((name for name in PACKAGES if contender.startswith(name)), PACKAGES[-1])


def draw_lengths(panels: dict[str, Axes], result: dict[str, Any]) -> None:
    """Cost per token and the crossover."""
    if not result["scaling"]:
        return
    draw_scaling(panels["scaling"], result["scaling"])
    draw_crossover(panels["crossover"], result["crossover"])
    for axes in (panels["scaling"], panels["crossover"]):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda y, _: digits(y, 1))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_xlabel("T")


def draw_scaling(axes: Axes, entries: list[dict[str, Any]]) -> None:
    """Cost per token over lengths, the dearest first in the legend as in the panel."""
    drawn = [entry for entry in entries if entry["rows"]]
    for i, entry in enumerate(sorted(drawn, key=lambda entry: -entry["rows"][-1]["ns_per_token_head"])):
        name = " ".join(part for part in (entry["operator"], entry["variant"]) if part)
        x, y = zip(*((row["T"], row["ns_per_token_head"]) for row in entry["rows"]), strict=True)
        look = {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)], "markersize": 5}
        axes.plot(x, y, label=f"{name} ({entry['backend']})", **look)
    axes.set_ylabel("ns per token of one head")
    axes.set_title(f"Cost of a token, D {entries[0]['D']}", fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def draw_crossover(axes: Axes, found: dict[str, Any]) -> None:
    """Times over lengths."""
    for name, colour in zip(
        dict.fromkeys(name for row in found["rows"] for name in row["seconds"]), COLOURS, strict=False
    ):
        mine = [row for row in found["rows"] if name in row["seconds"]]
        times = [row["seconds"][name] for row in mine]
        x = [row["T"] for row in mine]
        axes.plot(x, [1e3 * each["median"] for each in times], marker="o", color=colour, label=name, markersize=5)
        axes.fill_between(x, *([1e3 * each[end] for each in times] for end in ("p20", "p80")), color=colour, alpha=0.15)
    axes.set_ylabel("ms")
    axes.set_title(f"Linear against softmax attention, D {found['D']}", fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
