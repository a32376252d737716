"""A real series with gaps, end to end: weekly CO2 through a scaler, a search and the layers, against persistence."""

from __future__ import annotations

import numpy as np
import pytest

import ttr_np
from ttr_np.data import co2_weekly

pytest.importorskip("sklearn")

from sklearn.model_selection import GridSearchCV, TimeSeriesSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

LAGS = (1, 2, 3, 52)  # weeks
GOOD = {
    "intention": {},
    "recursive_least_squares": {},
    "mesanet": {},
    "nlms": {"beta": 0.05},
    "delta_rule": {"beta": 0.01},
    "softmax": {"scale": 1.0},
    "local_linear": {"scale": 0.3},
}


@pytest.fixture(autouse=True)
def solvers():
    ttr_np.set_backend("numpy")


@pytest.fixture(scope="module")
def weeks():
    """Changes of CO2 from week to week, and those 1, 2, 3 and 52 weeks before; gaps are NaN."""
    table = co2_weekly().read_text(encoding="utf-8").split()[1:]
    co2 = np.array([float(row.split(",")[1] or "nan") for row in table])
    assert len(co2) == 2284 and np.isnan(co2).sum() == 59
    change = np.diff(co2)
    X = np.stack([change[52 - lag : len(change) - lag] for lag in LAGS], axis=1)
    y = change[52:]
    assert np.isnan(X).any() and np.isnan(y).any()
    return X, y, int(0.8 * len(y))


def rmse(errors):
    return float(np.sqrt(np.nanmean(np.square(errors))))


@pytest.mark.parametrize("layer", GOOD)
def test_a_forecast_beats_persistence(layer, weeks):
    X, y, cut = weeks
    whole = np.isfinite(X).all(axis=1)
    persistence = rmse(y[cut:][whole[cut:]])  # the change that persistence predicts is zero
    model = make_pipeline(StandardScaler(), ttr_np.TestTimeRegressor(layer, missing="skip", **GOOD[layer]))
    model.fit(X[:cut], y[:cut])
    frozen = model.predict(X[cut:])
    assert np.array_equal(np.isfinite(frozen), whole[cut:])
    assert rmse(frozen - y[cut:]) < 0.97 * persistence
    scaler, memory = model[0], model[1]
    adapting = memory.prequential(scaler.transform(X[cut:]), y[cut:])
    assert rmse(adapting - y[cut:]) < 0.99 * persistence
    _, std = model.predict(X[cut:], return_std=True)
    inside = np.abs(frozen - y[cut:]) < 2 * std
    assert 0.92 < inside[np.isfinite(frozen) & np.isfinite(y[cut:])].mean() < 0.99


def test_a_search_over_layers_and_gates_finds_a_good_one(weeks):
    X, y, cut = weeks
    pipeline = make_pipeline(StandardScaler(), ttr_np.TestTimeRegressor(missing="skip"))
    name = "testtimeregressor__"
    grid = [
        {f"{name}layer": ["intention"], f"{name}ridge": [0.1, 100.0]},
        {f"{name}layer": ["recursive_least_squares"], f"{name}log_decay": [np.log(0.9), np.log(0.999)]},
        {f"{name}layer": ["nlms"], f"{name}beta": [0.05, 1.0]},
        {f"{name}layer": ["linear_attention"]},
    ]
    search = GridSearchCV(pipeline, grid, cv=TimeSeriesSplit(3), error_score="raise").fit(X[:cut], y[:cut])
    scores = dict(zip(map(str, search.cv_results_["params"]), search.cv_results_["mean_test_score"], strict=True))
    assert np.isfinite(list(scores.values())).all() and len(scores) == 7
    best = search.best_params_
    assert best[f"{name}layer"] != "linear_attention" and best.get(f"{name}beta") != 1.0
    whole = np.isfinite(X[cut:]).all(axis=1)
    assert rmse(search.predict(X[cut:]) - y[cut:]) < 0.97 * rmse(y[cut:][whole])
    assert search.score(X[cut:], y[cut:]) > 0.05


def test_a_season_and_a_trend_are_smoothed_with_their_uncertainty(weeks):
    _, y, _ = weeks
    seen = np.flatnonzero(np.isfinite(y))
    weeks_of_year = (seen % 52.18)[:, None] / 52.18
    model = ttr_np.LocalPolynomialRegressor().fit(weeks_of_year, y[seen])
    assert 0.02 < model.bandwidth_ < 0.2 and 5 < model.dof_ < 40
    mean, std = model.predict(np.array([[0.1], [0.5], [0.9]]), return_std=True)
    assert (std > model.sigma_).all() and np.abs(mean).max() < 0.6
    assert model.score(weeks_of_year, y[seen]) > 0.2
