"""Forecasts of a series: causal to the bit, frozen in gaps, scored right; bands that hold; files that are refused."""

from __future__ import annotations

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

import ttr_np
from ttr_np.cli import main
from ttr_np.cli.columns import read_column
from ttr_np.cli.layers import entries
from ttr_np.data import co2_weekly
from ttr_np.forecasting import RECENT, bands, carried, forecast, gains, lagged, pose, predict
from ttr_np.text_recall import BadInput

ASKED = [e["name"] for e in entries() if e["operator"] and e["data"] == ["q", "k", "v"] and "ttt" not in e["name"]]


def wave(t=90, seed=0, gaps=(20, 21, 50)):
    """A noisy season on a trend, with gaps."""
    rng = np.random.default_rng(seed)
    y = 0.05 * np.arange(t) + np.sin(2 * np.pi * np.arange(t) / 12) + 0.1 * rng.standard_normal(t)
    y[list(gaps)] = np.nan
    return y


def co2():
    return np.array(read_column(str(co2_weekly()), "co2", "date").values)


# Causality and gaps


@pytest.mark.parametrize("name", ASKED)
def test_changing_the_future_never_changes_the_forecasts_of_the_past(name):
    y, cut = wave(), 60
    other = y.copy()
    other[cut:] = 7.0 - other[cut:] ** 2
    old, new = (predict(name, problem := pose(x, lags=2), "numpy") for x in (y, other))
    upto = cut - problem.first + 1  # the forecast of step ``cut`` itself has not seen it either
    np.testing.assert_array_equal(old[:upto], new[:upto])
    assert old[upto] != new[upto]


def test_changing_the_future_never_changes_the_bands_of_the_past():
    y, cut = wave(), 60
    other = y.copy()
    other[cut:] += 3.0
    old, new = (forecast(x, layers=["delta_rule"], lags=2, season=12, backend="numpy") for x in (y, other))
    upto = cut - old["first"] + 1
    for kind in ("baselines", "layers"):
        named = {entry["name"]: entry["series"] for entry in new[kind]}
        for entry in old[kind]:
            for key, numbers in entry["series"].items():
                np.testing.assert_array_equal(numbers[:upto], named[entry["name"]][key][:upto])
                assert not np.array_equal(numbers[upto:], named[entry["name"]][key][upto:])


@pytest.mark.parametrize("name", ["retnet", "recursive_least_squares", "gated_deltanet", "forgetting_attention"])
def test_a_gap_freezes_the_memory(name):
    problem = pose(wave(), lags=2)
    kept = np.flatnonzero(problem.memorise)
    assert len(kept) < len(problem.memorise) - 5
    dense = problem._replace(**{x: getattr(problem, x)[kept] for x in ("k", "v", "memorise", "length", "last")})
    np.testing.assert_allclose(predict(name, problem, "numpy")[kept], predict(name, dense, "numpy"), rtol=1e-9)


def test_a_pair_is_memorised_only_if_all_of_it_was_measured():
    y = wave()
    problem = pose(y, lags=2)
    for i, memorised in enumerate(problem.memorise[:-1]):
        t = problem.first + i
        assert memorised == np.all(np.isfinite(y[t - 3 : t + 1]))
    assert not problem.memorise[-1] and len(problem.k) == len(y) - problem.first + 1


def test_a_missing_number_is_the_last_one_measured():
    np.testing.assert_array_equal(carried(np.array([2.0, np.nan, np.nan, 5.0, np.nan])), [2, 2, 2, 5, 5])


def test_keys_are_lagged_differences_of_length_one():
    y = wave(gaps=())
    problem = pose(y, lags=3, season=12)
    back = lagged(3, 12)
    np.testing.assert_array_equal(back, [2, 3, 4, 11, 12, 13])
    t = problem.first + 9
    row = problem.k[9] * problem.length[9]
    assert row[0] == pytest.approx(1.0)
    differences = y[t - back] - y[t - 1]
    at = np.arange(problem.first, problem.first + problem.start)
    scales = np.sqrt(np.mean((y[at[:, None] - back] - y[at - 1, None]) ** 2, axis=0))
    np.testing.assert_allclose(row[1:], differences / scales)
    np.testing.assert_allclose(problem.v[9, 0] * problem.length[9] * problem.scale, y[t] - y[t - 1])


# What the forecasts are worth


def test_an_exact_memory_finds_the_recurrence_of_a_series():
    rng = np.random.default_rng(1)
    y = np.zeros(400)
    for t in range(2, 400):
        y[t] = 0.2 * y[t - 1] + 0.8 * y[t - 2] + rng.standard_normal()
    result = forecast(y, layers=["recursive_least_squares"], lags=2, backend="numpy")
    assert result["layers"][0]["rmse"] < 1.15  # the noise is 1; differences hold all there is to know
    assert result["layers"][0]["rmse"] < 0.75 * result["baselines"][0]["rmse"]


@pytest.mark.parametrize("name", ["delta_rule", "local_linear"])
def test_units_do_not_matter(name):
    y = wave()
    plain, scaled = (predict(name, pose(x, lags=3, season=12), "numpy") for x in (y, 1e3 * y - 5e4))
    np.testing.assert_allclose(1e3 * plain - 5e4, scaled, rtol=1e-9)


def test_the_gain_is_the_best_factor_for_the_answers_before():
    problem = pose(wave(), lags=2)
    o = np.random.default_rng(2).standard_normal(len(problem.last))
    found = gains(o, problem)
    for i in (0, 10, 40, len(o) - 1):
        past = [j for j in range(i) if problem.memorise[j] and problem.memorise[:j].sum() >= problem.k.shape[1]]
        expected = np.dot(o[past], problem.v[past, 0]) / np.dot(o[past], o[past]) if past else 1.0
        assert found[i] == pytest.approx(expected)


def test_the_scores_are_those_of_the_forecasts():
    y = wave()
    result = forecast(y, layers=["delta_rule"], lags=2, season=12, level=0.8, backend="numpy")
    steps = [t for t in range(result["start"], len(y)) if np.isfinite(y[t])]
    assert result["scored"] == len(steps) and result["missing"] == 3
    simple = {entry["name"]: entry for entry in result["baselines"]}
    full = carried(y)
    for name, back in (("persistence", 1), ("seasonal naive", 12)):
        errors = [y[t] - full[t - back] for t in steps]
        assert simple[name]["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
        assert simple[name]["mae"] == pytest.approx(np.mean(np.abs(errors)))
        assert simple[name]["next"][0] == full[len(y) - back]
    (layer,) = result["layers"]
    middle, half = (layer["series"][key][np.array(steps) - result["first"]] for key in ("forecast", "half_width"))
    assert layer["rmse"] == pytest.approx(np.sqrt(np.mean((y[steps] - middle) ** 2)))
    assert layer["coverage"] == pytest.approx(np.mean(np.abs(y[steps] - middle) <= half))
    assert layer["next"] == [pytest.approx(layer["series"]["forecast"][-1] + x) for x in layer_band(layer)]


def layer_band(layer):
    half = layer["series"]["half_width"][-1]
    return 0.0, -half, half


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_a_band_is_a_quantile_of_the_residuals_before_it(level):
    residuals = np.random.default_rng(3).standard_normal(RECENT + 60)
    residuals[[5, 100]] = np.nan
    half = bands(residuals, level)
    for i in (0, 3, 40, RECENT + 50):
        past = np.abs(residuals[:i][np.isfinite(residuals[:i])])[-RECENT:]
        inside = [x for x in sorted(past) if np.sum(past <= x) >= (len(past) + 1) * level]
        assert half[i] == (inside[0] if inside else np.inf)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_bands_hold_what_they_promise(level):
    rng = np.random.default_rng(4)
    inside = []
    for _ in range(10):
        residuals = rng.standard_t(3, 1000)
        inside.append(np.abs(residuals)[200:] <= bands(residuals, level)[200:])
    assert abs(np.mean(inside) - level) < 0.015


def test_real_data_with_gaps_are_forecast_better_than_by_persistence():
    good = ["recursive_least_squares", "kalman", "mesanet", "delta_rule", "gated_deltanet"]
    result = forecast(co2(), layers=good, season=52, backend="numpy")
    assert result["missing"] == 59 and not result["not_run"]
    simple = {entry["name"]: entry["rmse"] for entry in result["baselines"]}
    errors = {entry["name"]: entry["rmse"] for entry in result["layers"]}
    assert max(errors.values()) < 0.95 * simple["persistence"] < simple["seasonal naive"]
    assert all(errors[name] < 0.8 * simple["persistence"] for name in good[:3])
    assert all(abs(entry["coverage"] - 0.9) < 0.02 for entry in result["layers"])


@pytest.mark.slow
def test_what_the_documentation_says_of_the_default_forecasts():
    result = forecast(co2(), season=52, backend="numpy")
    persistence = next(entry["rmse"] for entry in result["baselines"] if entry["name"] == "persistence")
    ratio = {entry["name"]: entry["rmse"] / persistence for entry in result["layers"]}
    exact = ("recursive_least_squares", "kalman", "local_linear")
    assert all(ratio[name] < 0.8 for name in exact)
    assert all(max(ratio[x] for x in exact) < ratio[name] < 1 for name in ("delta_rule", "gated_deltanet"))
    assert ratio["linear_attention"] > 1
    assert all(0.88 < entry["coverage"] < 0.92 for entry in result["layers"])


def test_a_constant_series_is_forecast_without_error():
    result = forecast(np.full(60, 3.0), layers=["kalman"], lags=2, backend="numpy")
    assert result["layers"][0]["rmse"] == 0.0 and result["layers"][0]["next"] == [3.0, 3.0, 3.0]


class Exploding:
    """A layer that diverges."""

    optimizer, data, operator = "online", ("q", "k", "v"), "delta_rule"

    def __call__(self, q, k, v, **common):
        return np.full(v.shape, np.inf)


def test_while_there_are_too_few_residuals_there_is_no_band():
    result = forecast(wave(), layers=["kalman"], lags=2, level=0.999, backend="numpy")
    middle, low, high = result["layers"][0]["next"]
    assert np.isfinite(middle) and low is high is None and result["layers"][0]["coverage"] == 1.0
    assert json.loads(json.dumps(result["layers"][0]["next"])) == [middle, None, None]


def test_a_layer_that_cannot_run_or_diverges_has_its_reason(monkeypatch):
    names = ["ttt_linear", "omeganet", "lru", "lattice", "delta_rule"]
    table = {name: ttr_np.layers[name] for name in names} | {"delta_rule": Exploding()}
    monkeypatch.setattr("ttr_np.forecasting.table", table)
    result = forecast(wave(), layers=names, lags=2, backend="numpy")
    reasons = {entry["name"]: entry["reason"] for entry in result["not_run"]}
    assert list(reasons) == names
    for name, word in zip(names, ("residual", "definition", "takes x", "not expressed", "diverged: "), strict=True):
        assert word in reasons[name]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([np.nan] * 80, {}, "none of 80 values is a number"),
        ([1.0, 2.0, 3.0], {}, "the series is too short: its length is 3"),
        ([1e200] * 80, {}, "smaller than 1e"),
        ([[1.0]], {}, "one axis, got 2"),
        (np.where(np.arange(80) % 2, 1.0, np.nan), {}, "too many gaps: none of the first 18 steps"),
        ([1.0, 2.0] * 5 + [np.nan] * 70, {"lags": 2}, "nothing to score: no number after"),
        (wave(), {"lags": 0}, "lags must be"),
        (wave(), {"season": 1}, "season must be"),
        (wave(), {"level": 1.0}, "level must lie"),
        (wave(), {"warmup": 1}, "warmup must be"),
        (wave(), {"layers": ["delta"]}, "unknown layer"),
    ],
)
def test_what_cannot_be_forecast_is_refused(values, options, message):
    with pytest.raises(BadInput, match=message):
        forecast(values, **options)


# The data that come with the package


def test_the_shipped_series_is_what_its_description_says():
    lines = co2_weekly().read_text().splitlines()
    assert lines[0] == "date,co2" and len(lines) == 2285
    assert lines[1].startswith("1958-03-29,") and lines[-1].startswith("2001-12-29,")
    assert sum(line.endswith(",") for line in lines) == 59 == int(np.isnan(co2()).sum())


# The command


@pytest.fixture
def series(tmp_path):
    """A small file with a season, gaps and ISO dates."""
    path = tmp_path / "series.csv"
    days = np.datetime64("2020-01-01") + np.arange(90)
    rows = [f"{day},{'' if np.isnan(x) else x},a" for day, x in zip(days, wave(), strict=True)]
    path.write_text("\n".join(["day,level,note", *rows]) + "\n")
    return path


OPTIONS = ["--column", "level", "--time", "day", "--lags", "2", "--backend", "numpy", "--layers", "delta_rule,kalman"]


def test_the_command_prints_writes_and_draws_the_same_forecasts(series, tmp_path, capsys):
    out = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "png")}
    files = ["--csv", str(out["csv"]), "--json", str(out["json"]), "--plot", str(out["png"])]
    assert main(["forecast", str(series), *OPTIONS, "--season", "12", *files]) == 0
    text = capsys.readouterr().out
    expected = forecast(wave(), layers=["delta_rule", "kalman"], lags=2, season=12, backend="numpy")
    saved = json.loads(out["json"].read_text())
    rows = list(csv.DictReader(io.StringIO(out["csv"].read_text())))
    assert len(rows) == 90 - expected["first"] + 1 and rows[0]["time"] == f"2020-01-{expected['first'] + 1}"
    assert rows[-1]["time"] == rows[-1]["value"] == "" and sum(row["value"] == "" for row in rows) == 4
    for entry, kept in zip(expected["layers"], saved["layers"], strict=True):
        assert {key: kept[key] for key in ("name", "rmse", "coverage", "next")} == {
            key: entry[key] for key in ("name", "rmse", "coverage", "next")
        }
        assert f"{entry['rmse']:.3g}" in next(line for line in text.splitlines() if line.startswith(entry["name"]))
        column = [float(row[entry["name"]]) for row in rows]
        np.testing.assert_array_equal(column, entry["series"]["forecast"])
        low, high = (float(rows[-1][entry["name"] + part]) for part in ("_low", "_high"))
        assert [low, high] == entry["next"][1:]
    assert "* persistence" in text and "* seasonal naive" in text
    assert max(map(len, text.splitlines())) <= 120
    assert out["png"].read_bytes().startswith(b"\x89PNG")


def test_without_a_season_there_is_no_seasonal_comparison(series, capsys):
    assert main(["forecast", str(series), *OPTIONS]) == 0
    text = capsys.readouterr().out
    assert "seasonal naive" not in text and "no season: --season M" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [("", "lags 1 to 3;"), ("--season 12", "lags 1 to 3 and 11 to 13;"), ("--season 4", "lags 1 to 5;")],
)
def test_the_lags_are_told(series, capsys, options, words):
    assert main(["forecast", str(series), *OPTIONS, *options.split()]) == 0
    assert words in capsys.readouterr().out


def test_without_a_band_its_cells_are_empty(series, tmp_path, capsys):
    out = tmp_path / "out.csv"
    assert main(["forecast", str(series), *OPTIONS, "--level", "0.999", "--csv", str(out)]) == 0
    last = list(csv.DictReader(io.StringIO(out.read_text())))[-1]
    assert last["kalman"] and last["kalman_low"] == last["kalman_high"] == ""
    assert all(line.endswith(" -") for line in capsys.readouterr().out.splitlines() if line.startswith("kalman"))


def test_all_layers_can_be_asked(series, capsys):
    assert main(["forecast", str(series), *OPTIONS[:-2], "--layers", "all", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["layers"]) + len(result["not_run"]) == len(ttr_np.layers)
    assert {entry["name"] for entry in result["layers"]} >= set(ASKED) - {"moneta"}


def test_the_default_series_needs_no_arguments(capsys):
    assert main(["forecast", "--layers", "delta_rule", "--backend", "numpy", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["missing"], result["season"]) == (2284, 59, 52)


def test_other_separators_marks_and_standard_input(series, capsys, monkeypatch):
    assert main(["forecast", str(series), *OPTIONS, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    text = "\ufeff" + series.read_text().replace(",", ";").replace(";;", ";NaN;")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    assert main(["forecast", "-", *OPTIONS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected | {"source": "-"}


def test_long_steps_are_remarked_on(series, capsys):
    lines = series.read_text().splitlines()
    series.write_text("\n".join(lines[:70] + lines[75:]))
    assert main(["forecast", str(series), *OPTIONS]) == 0
    assert "1 steps are longer than 1.9 times the median step" in capsys.readouterr().out


REFUSED = {
    "no such file": (None, ["--column", "y"], "cannot read"),
    "empty": ("", ["--column", "y"], "is empty"),
    "heading only": ("t,y\n", ["--column", "y"], "has 1 line;"),
    "no column named": ("t,y\n1,2\n", [], "--column is needed; the columns are t, y"),
    "no such column": ("t,y\n1,2\n", ["--column", "z"], "is not there; the columns are t, y"),
    "column twice": ("y,y\n1,2\n", ["--column", "y"], "appears twice"),
    "no such time": ("t,y\n1,2\n", ["--column", "y", "--time", "when"], "of --time is not there"),
    "all missing": ("t,y\n1,\n2,NA\n3,nan\n", ["--column", "y"], "has no number in 3 rows"),
    "text": ("t,y\n1,2\n2,high\n", ["--column", "y"], "line 3: 'high' in the column 'y' is not a number"),
    "decimal comma": ("t;y\n1;2,5\n", ["--column", "y"], "line 2: '2,5'"),
    "underscore": ("t,y\n1,1_000\n", ["--column", "y"], "line 2: '1_000' in the column 'y' is not a number"),
    "csv to standard output": ("t,y\n1,2\n", ["--column", "y", "--csv", "-"], "--csv needs the name of a file"),
    "infinite": ("t,y\n1,inf\n", ["--column", "y"], "'inf' in the column 'y' is not a number"),
    "ragged": ("t,y\n1,2\n2\n", ["--column", "y"], "line 3: 1 cells, but the heading has 2"),
    "unsorted numbers": ("t,y\n1,2\n3,4\n2,5\n", ["--column", "y", "--time", "t"], "line 4: the time 2 comes before 3"),
    "repeated": ("t,y\n1,2\n\n1,4\n", ["--column", "y", "--time", "t"], "line 4: the time 1 repeats 1 of line 2"),
    "unsorted dates": (
        "t,y\n2020-02-01,2\n2020-01-31,4\n",
        ["--column", "y", "--time", "t"],
        "line 3: the time 2020-01-31 comes before 2020-02-01 of line 2",
    ),
    "no time": ("t,y\n1/2/2020,2\n", ["--column", "y", "--time", "t"], "line 2: '1/2/2020' in the column 't'"),
    "mixed times": ("t,y\n1,2\n2020-01-31,4\n", ["--column", "y", "--time", "t"], "or the others are not of its kind"),
    "too short": ("t,y\n1,2\n2,4\n", ["--column", "y"], "the series is too short: its length is 2"),
    "not UTF-8": (b"t,y\n1,\xff\n", ["--column", "y"], "is not UTF-8: byte 0xff at offset 6"),
    "not UTF-8 after a mark": (b"\xef\xbb\xbft,y\n1,\xff\n", ["--column", "y"], "is not UTF-8: byte 0xff at offset 9"),
    "unknown layer": ("t,y\n" + "1,2\n" * 90, ["--column", "y", "--layers", "delta"], "unknown layer 'delta'"),
    "no layer left": ("t,y\n" + "1,2\n" * 90, ["--column", "y", "--layers", "lru"], "no layer can run: lru: takes x"),
    "unknown backend": ("t,y\n" + "1,2\n" * 90, ["--column", "y", "--backend", "tpu"], "unknown backend 'tpu'"),
    "no figure": ("t,y\n1,2\n", ["--column", "y", "--plot", "x.txt"], "--plot writes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_gets_one_clear_line(case, tmp_path, capsys):
    content, options, message = REFUSED[case]
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["forecast", str(path), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("ttr: ") and printed.err.count("\n") == 1
    assert message in printed.err


def test_options_of_a_file_without_a_file_are_refused(capsys):
    assert main(["forecast", "--column", "temperature"]) == 2
    assert "belong to a FILE" in capsys.readouterr().err
