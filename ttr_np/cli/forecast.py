"""One-step-ahead forecasts of a series of yours, by layers of the table as adaptive memories over lagged values.

Strictly causal: each step is forecast from the steps before it. Missing numbers freeze the memory. Without a file, the
weekly CO2 of Mauna Loa with its 59 gaps.
"""

from __future__ import annotations

import argparse
import csv
import io
import textwrap
from pathlib import Path
from typing import Any

import ttr_np

from ..data import co2_weekly
from ..text_recall import BadInput, chosen_backends
from . import Refusal
from .columns import Column, read_column, read_table
from .inputs import split
from .outputs import WIDTH, check_writable, deliver, plotter, progress_bar
from .table import aligned, digits

__all__ = ["csv_text", "declare", "report", "run"]

ABOUT = ("weights", "regressor", "optimizer")


def declare(parser: argparse.ArgumentParser) -> None:
    """The options; those that are left out are the defaults of ``ttr_np.forecasting.forecast``."""
    add = parser.add_argument
    add("file", metavar="FILE", nargs="?", help="CSV with a heading, - for standard input; default: weekly CO2")
    add("--column", metavar="NAME", help="the column to forecast")
    add("--time", metavar="NAME", help="a column of increasing numbers or ISO dates; default: rows are counted")
    add("--layers", metavar="NAMES", action="append", help="comma-separated, see ttr layers; or all; default: some")
    add("--lags", type=int, metavar="P", default=8, help="lagged differences the memory sees (default 8)")
    add("--season", type=int, metavar="M", help="steps after which the series repeats: as many lags around it; CO2: 52")
    add("--warmup", type=int, metavar="N", help="steps that are learnt from and not scored; default: a tenth")
    add("--level", type=float, metavar="P", default=0.9, help="share that a prediction band should hold (default 0.9)")
    add("--backend", metavar="NAME", help="default: TTR_BACKEND, else the fastest that can run here")
    add("--csv", metavar="FILE", help="write every forecast and its band as CSV")
    add("--json", metavar="FILE", nargs="?", const="-", help="write the scores as JSON; - or nothing: print them alone")
    add("--plot", metavar="FILE", help="draw it: the last forecasts with their bands, errors (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace) -> None:
    """Check everything that can be wrong, then forecast, then print, write and draw."""
    if arguments.plot is not None:
        draw = plotter(arguments.plot, ".forecast_plot")
    if arguments.csv == "-":
        raise Refusal("--csv needs the name of a file")
    column = series(arguments)
    check_writable(arguments.json, arguments.csv, arguments.plot)
    result = forecasts(arguments, column)
    if arguments.csv is not None:
        Path(arguments.csv).write_text(csv_text(result, column), encoding="utf-8")
    deliver(without_series(result), report(result), arguments.json)
    if arguments.plot is not None:
        draw(result, column, arguments.plot)


def series(arguments: argparse.Namespace) -> Column:
    """The column asked for; without a file that of the package, and its season."""
    if arguments.file is None:
        if arguments.column not in (None, "co2") or arguments.time not in (None, "date"):
            raise Refusal("--column and --time belong to a FILE; without one the series is the weekly CO2")
        arguments.season = 52 if arguments.season is None else arguments.season
        return read_column(str(co2_weekly()), "co2", "date")
    if arguments.column is None:
        raise Refusal(f"--column is needed; the columns are {', '.join(read_table(arguments.file).header)}")
    return read_column(arguments.file, arguments.column, arguments.time)


def forecasts(arguments: argparse.Namespace, column: Column) -> dict[str, Any]:
    """The result of ``forecast`` with what it is about."""
    from ..forecasting import DEFAULT_LAYERS, forecast

    names = split(arguments.layers) or DEFAULT_LAYERS
    try:
        chosen_backends([arguments.backend] if arguments.backend else None)
        result = forecast(
            column.values,
            layers=list(ttr_np.layers) if list(names) == ["all"] else names,
            lags=arguments.lags,
            season=arguments.season,
            warmup=arguments.warmup,
            level=arguments.level,
            backend=arguments.backend,
            progress=progress_bar(),
        )
    except BadInput as problem:
        raise Refusal(str(problem)) from None
    if not result["layers"]:
        reasons = "; ".join(f"{entry['name']}: {entry['reason']}" for entry in result["not_run"])
        raise Refusal(f"no layer can run: {reasons}")
    source = arguments.file or "weekly CO2 at Mauna Loa, ppm"
    return {"source": source, "column": arguments.column or "co2", "remark": column.remark} | result


def without_series(result: dict[str, Any]) -> dict[str, Any]:
    """The scores without every single forecast, which ``--csv`` writes."""
    short = {"baselines": [], "layers": []}
    for key, entries in short.items():
        entries += [{name: x for name, x in entry.items() if name != "series"} for entry in result[key]]
    return result | short


def csv_text(result: dict[str, Any], column: Column) -> str:
    """One line per step from the first that has a forecast to the step to come, whose time is empty."""
    skipped = len(column.values) - result["steps"] + result["first"]
    entries = result["baselines"] + result["layers"]
    names = [entry["name"].replace(" ", "_") for entry in entries]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["time", "value", *(f"{name}{part}" for name in names for part in ("", "_low", "_high"))])
    times, values = [*column.labels[skipped:], ""], [*column.values[skipped:], float("nan")]
    for i, (time, value) in enumerate(zip(times, values, strict=True)):
        cells = [cell for entry in entries for cell in banded(entry["series"], i)]
        writer.writerow([time, "" if value != value else value, *cells])
    return out.getvalue()


def banded(series: dict[str, Any], i: int) -> list[Any]:
    """A forecast, low and high; the band empty where it is unbounded."""
    middle, half = float(series["forecast"][i]), float(series["half_width"][i])
    return [middle, *((middle - half, middle + half) if half < float("inf") else ("", ""))]


def report(result: dict[str, Any]) -> str:
    """The result for a reader: what was forecast, the table, what did not run."""
    head = [
        f"One-step-ahead forecasts of {result['column']}, {result['source']}: {result['steps']} steps, "
        f"{result['missing']} missing; {result['memorised']} pairs memorised, {result['scored']} steps scored",
        f"lags {lags(result)}; gates are the table's defaults",
    ]
    foot = [
        "/ pers., / seas.: RMSE over that of the last value, of the value a season ago; band: share of the values "
        f"inside the {100 * result['level']:g} % prediction bands; next: the step to come, +- half its band",
        "* needs no memory",
        *filter(None, ["" if result["season"] else "no season: --season M compares with the value M steps ago"]),
        *filter(None, [result["remark"]]),
        *(f"not run: {entry['name']}: {entry['reason']}" for entry in result["not_run"]),
    ]
    head, foot = ([part for line in lines for part in textwrap.wrap(line, WIDTH)] for lines in (head, foot))
    return "\n".join([*head, "", table(result), "", *foot])


def lags(result: dict[str, Any]) -> str:
    """The lags of a key in words."""
    near, half = result["lags"] + 1, result["lags"] // 2
    if not result["season"]:
        return f"1 to {near}"
    low, high = result["season"] - half, result["season"] + half
    return f"1 to {near} and {low} to {high}" if low > near + 1 else f"1 to {max(near, high)}"


def table(result: dict[str, Any]) -> str:
    """Layers and baselines, least error first."""
    heading = ["layer", *ABOUT, "RMSE", "MAE", "/ pers.", *["/ seas."] * bool(result["season"]), "band", "next", "+-"]
    plain = [entry | dict.fromkeys(ABOUT, "") | {"name": f"* {entry['name']}"} for entry in result["baselines"]]
    rows = sorted(result["layers"] + plain, key=lambda entry: entry["rmse"])
    against = [entry["rmse"] for name in ("persistence", "seasonal naive") for entry in named(result, name)]
    lines = [cells(entry, against) for entry in rows]
    return aligned([heading, *lines], right=range(4, len(heading)), whole=[0], width=WIDTH)


def named(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The baseline of a name, if there is one."""
    return [entry for entry in result["baselines"] if entry["name"] == name]


def cells(entry: dict[str, Any], against: list[float]) -> list[str]:
    """One line of the table."""
    ratios = [digits(entry["rmse"] / rmse) if rmse else "-" for rmse in against]
    middle, low, high = entry["next"]
    step = [f"{middle:.5g}", "-" if low is None else f"{(high - low) / 2:.2g}"]
    errors = [f"{entry[key]:.3g}" for key in ("rmse", "mae")]
    return [entry["name"], *(entry[key] for key in ABOUT), *errors, *ratios, f"{100 * entry['coverage']:.1f}", *step]
