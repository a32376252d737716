"""Every figure and every quoted table of the documentation: ``python docs/figures.py [FOLDER]``.

Writes ``figures/*.png`` and ``results/*.txt`` below the folder, by default below this one.
"""

from __future__ import annotations

import argparse
import doctest
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ttr_np import experiments
from ttr_np.cli import experiment, experiment_plot, forecast, forecast_plot, parser
from ttr_np.cli.recall_plot import COLOURS

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Draw and write everything."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", nargs="?", type=Path, default=HERE, help="default: the folder of this file")
    folder = options.parse_args(argv).folder
    for name in ("figures", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in experiment.NAMES:
        result = getattr(experiments, name)()
        experiment_plot.save(result, str(folder / "figures" / f"{name}.png"))
        untimed = experiment.report(result).rsplit("\n", 1)[0]
        (folder / "results" / f"{name}.txt").write_text(untimed + "\n", encoding="utf-8")
    write_forecast(folder)
    page = tutorial()
    for name, draw in (("tutorial_fits", draw_fits), ("tutorial_weights", draw_weights)):
        draw(page).savefig(folder / "figures" / f"{name}.png", dpi=100)


def write_forecast(folder: Path) -> None:
    """What ``ttr forecast`` prints and draws."""
    arguments = parser().parse_args(["forecast"])
    column = forecast.series(arguments)
    result = forecast.forecasts(arguments, column)
    (folder / "results" / "forecast.txt").write_text(forecast.report(result) + "\n", encoding="utf-8")
    forecast_plot.save(result, column, str(folder / "figures" / "forecast.png"))


def tutorial() -> dict[str, Any]:
    """All names of the tutorial after its last snippet."""
    text = (HERE / "tutorial.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()):
        for example in doctest.DocTestParser().get_examples(text, "tutorial.md"):
            exec(compile(example.source, "tutorial.md", "exec"), names)
    return names


def draw_fits(page: dict[str, Any]) -> Figure:
    """The memory of every step of the tutorial as a function of the angle."""
    drawing = Figure(figsize=(10.5, 5.6), layout="constrained")
    panels = drawing.subplots(2, 3, sharex=True, sharey=True)
    for axes, (name, o) in zip(panels.flat, page["steps"].items(), strict=True):
        axes.plot(page["angle"], page["v"], ".", color=COLOURS[8], markersize=4, label="stored pairs")
        axes.plot(page["grid"], page["truth"](page["grid"]), color="black", linewidth=1, linestyle=":", label="truth")
        axes.plot(page["grid"], o[:, 0], color=COLOURS[0], linewidth=2, label="memory")
        axes.set_title(f"{name}: error {page['error'](o):g}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(fontsize=8)
    drawing.supxlabel("angle of the key", fontsize=10)
    drawing.supylabel("value", fontsize=10)
    return drawing


def draw_weights(page: dict[str, Any]) -> Figure:
    """The weight of every stored value in the answer to the query at the left end."""
    drawing = Figure(figsize=(10.5, 5.6), layout="constrained")
    order = np.argsort(page["angle"])
    panels = drawing.subplots(2, 3, sharex=True)
    for axes, (name, rows) in zip(panels.flat, page["weights"].items(), strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.vlines(page["angle"][order], 0, rows[page["i"]][order], color=COLOURS[1], linewidth=1.5)
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.supxlabel(f"angle of the stored key; the query is at {page['grid'][page['i']]:g}", fontsize=10)
    drawing.supylabel("weight of the stored value", fontsize=10)
    return drawing


if __name__ == "__main__":
    main()
