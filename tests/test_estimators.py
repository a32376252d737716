"""Estimators: scikit-learn's own checks, the closed forms against refits, uncertainty against simulation."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_layers import BY_DEFINITION, IMPOSSIBLE, NAMES, inputs

import ttr_np
from ttr_np import selection
from ttr_np.estimators import linear_in_values

ROOT = Path(__file__).parents[1]
TestTime, RLS = ttr_np.TestTimeRegressor, ttr_np.RecursiveLeastSquaresRegressor
Local, Smoother = ttr_np.LocalPolynomialRegressor, ttr_np.KernelSmoother


@pytest.fixture(autouse=True)
def solvers():
    """What is tested is the estimators; compiling kernels would take longer than all of it."""
    ttr_np.set_backend("numpy")


def drawn(n=60, d=3, m=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, X @ rng.standard_normal((d, m)) + 0.5 + 0.3 * rng.standard_normal((n, m))


# ---- scikit-learn ----------------------------------------------------------------------------------------------------

ONE_BY_ONE = "with a weight the whole row is left out, rows that are repeated are left out one by one"
COUNTED = "the criterion counts rows: the scale of weights is of no account, so they are no repetitions"
STEPS = "here a weight is a longer step, which is not the step taken twice"
NO_WEIGHT = "sample_weight is an error for a layer without a weight or a step size per pair"
WEIGHTS = (
    "check_sample_weights_list",
    "check_sample_weights_not_overwritten",
    "check_sample_weight_equivalence_on_dense_data",
)
CHECKED = [
    (TestTime(), {}),
    (TestTime("recursive_least_squares", log_decay=0.0), {}),
    (TestTime("nlms", beta=0.5), {"check_sample_weight_equivalence_on_dense_data": STEPS}),
    (TestTime("softmax"), dict.fromkeys(WEIGHTS, NO_WEIGHT)),
    (TestTime(missing="skip"), {"check_supervised_y_no_nan": "a NaN is a missing value if those are skipped"}),
    (RLS(), {}),
    (RLS(ridge="gcv"), {"check_sample_weight_equivalence_on_dense_data": COUNTED}),
    (Local(), {"check_sample_weight_equivalence_on_dense_data": ONE_BY_ONE}),
    (Local(bandwidth=1.0), {}),
    (Smoother(), {"check_sample_weight_equivalence_on_dense_data": ONE_BY_ONE}),
    (Smoother("epanechnikov", 1.0), {}),
]


@pytest.mark.parametrize(("estimator", "expected"), CHECKED, ids=lambda x: repr(x) if not isinstance(x, dict) else "")
def test_scikit_learn_checks_pass_but_for_those_with_a_reason(estimator, expected):
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = checks.check_estimator(estimator, expected_failed_checks=expected, on_fail=None, on_skip=None)
    status = {result["check_name"]: result["status"] for result in results}
    assert {name for name, x in status.items() if x == "failed"} == set()
    assert {name for name, x in status.items() if x == "xfail"} <= set(expected)
    skipped = {name for name, x in status.items() if x == "skipped"}
    assert skipped <= {"check_array_api_input"}, "these need SCIPY_ARRAY_API, and say so"
    assert list(status.values()).count("passed") > 45


def test_pipelines_searches_and_cross_validation_work():
    pytest.importorskip("sklearn")
    from sklearn.base import clone, is_regressor
    from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    X, y = drawn(120)
    for model in (TestTime("nlms", beta=0.1), RLS(), Local(), Smoother(bandwidth=2.0)):
        assert is_regressor(model) and repr(clone(model)) == repr(model)
        assert cross_val_score(make_pipeline(StandardScaler(), model), X, y, cv=3).mean() > 0.3
        assert cross_val_predict(model, X, y, cv=3).shape == y.shape
    grid = {"testtimeregressor__layer": ["nlms", "lms"], "testtimeregressor__beta": [0.01, 0.3]}
    search = GridSearchCV(make_pipeline(StandardScaler(), TestTime()), grid, cv=3).fit(X, y)
    assert search.best_params_["testtimeregressor__layer"] in ("nlms", "lms") and search.best_score_ > 0.5


def test_the_estimators_need_no_scikit_learn():
    code = (
        "import sys; sys.modules['sklearn'] = None\nimport ttr_np, numpy as np\nX = np.eye(3)\n"
        "for kind in (ttr_np.TestTimeRegressor, ttr_np.RecursiveLeastSquaresRegressor, ttr_np.KernelSmoother):\n"
        "    model = kind(backend='numpy')\n"
        "    try: model.predict(X)\n    except (ValueError, AttributeError) as problem: print(type(problem).__name__)\n"
        "    model.fit(X, X[0]).predict(X), model.score(X, X[0]), model.set_params(**model.get_params())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["NotFittedError"] * 3, done.stderr


# ---- what each of them computes --------------------------------------------------------------------------------------


def test_the_default_memory_is_ridge_regression_and_weights_are_repetitions():
    X, y = drawn()
    A = np.c_[X, np.ones(60)]
    S = np.linalg.solve(A.T @ A + 0.1 * np.eye(4), A.T @ y)
    np.testing.assert_allclose(TestTime().fit(X, y).predict(X), A @ S, rtol=1e-9)
    w = np.random.default_rng(1).integers(0, 4, 60)
    for model in (TestTime(), RLS(), Local(bandwidth=1.0), Smoother(bandwidth=1.0)):
        repeated = model.fit(np.repeat(X, w, axis=0), np.repeat(y, w, axis=0)).predict(X)
        np.testing.assert_allclose(model.fit(X, y, w).predict(X), repeated, rtol=1e-7)


def test_prequential_predictions_know_only_the_past():
    X, y = drawn()
    for layer in ("intention", "gated_deltanet", "softmax", "rwkv6", "titans"):
        model = TestTime(layer)
        ahead = model.prequential(X, y)
        for i in (1, 7, 59):
            np.testing.assert_allclose(ahead[i], TestTime(layer).fit(X[:i], y[:i]).predict(X[i : i + 1])[0], rtol=1e-8)
        late = np.arange(60) >= 3
        np.testing.assert_allclose(model.sigma_, np.sqrt(np.mean((y - ahead)[late] ** 2, axis=0)))
        parts = TestTime(layer).fit(X[:20], y[:20])
        np.testing.assert_allclose(parts.prequential(X[20:], y[20:]), ahead[20:], rtol=1e-8)
        np.testing.assert_allclose(parts.predict(X), model.predict(X), rtol=1e-8)
        np.testing.assert_allclose(parts.sigma_, model.sigma_)


def test_missing_rows_are_skipped_where_that_is_asked_for():
    X, y = drawn()
    gappy_X, gappy_y = X.copy(), y.copy()
    gappy_X[5, 1] = gappy_y[[0, 30], 0] = np.nan
    whole = np.setdiff1d(np.arange(60), [0, 5, 30])
    for model in (TestTime("gated_deltanet", beta=0.1, missing="skip"), RLS(0.95, missing="skip")):
        skipping = model.fit(gappy_X, gappy_y).predict(X)
        np.testing.assert_allclose(skipping, model.fit(X[whole], y[whole]).predict(X), rtol=1e-8)
        answers = model.predict(gappy_X)
        assert np.isnan(answers[5]).all() and np.isfinite(np.delete(answers, 5, axis=0)).all()
        assert np.isclose(model.score(gappy_X, gappy_y), model.score(X[whole], y[whole]))
    with pytest.raises(ValueError, match=r"Input X contains NaN or infinity: it is nan at \(5, 1\)"):
        TestTime().fit(gappy_X, y)
    with pytest.raises(ValueError, match="missing is 'drop'"):
        TestTime(missing="drop").fit(X, y)
    with pytest.raises(ValueError, match="no row counts"):
        TestTime().fit(X, y, np.zeros(60))


def test_recursive_least_squares_is_the_weighted_fit_with_its_variances():
    X, y = drawn()
    w, gamma, ridge = np.random.default_rng(1).uniform(0.1, 2, 60), 0.97 ** np.arange(59, -1, -1.0), 0.5
    model = RLS(0.97, ridge)
    for low, high in ((0, 1), (1, 20), (20, 60)):
        model.partial_fit(X[low:high], y[low:high], w[low:high])
    A = np.c_[X - X[0], np.ones(60)]
    first, y = y[0], y - y[0]
    P = np.linalg.inv(A.T @ ((w * gamma)[:, None] * A) + 0.97**60 * ridge * np.eye(4))
    S = P @ A.T @ ((w * gamma)[:, None] * y)
    np.testing.assert_allclose(model.coef_, S[:3].T, rtol=1e-9)
    np.testing.assert_allclose(model.intercept_, first + S[3] - X[0] @ S[:3], rtol=1e-9)
    np.testing.assert_allclose(model.covariance_, P, rtol=1e-9)
    hat = A @ P @ A.T * (w * gamma)
    np.testing.assert_allclose(model.dof_, np.trace(hat), rtol=1e-9)
    np.testing.assert_allclose(model.leverage(X) * w * gamma, np.diag(hat), rtol=1e-9)
    sigma = np.sqrt((w * gamma) @ (y - A @ S) ** 2 / (gamma.sum() - np.trace(hat)))
    np.testing.assert_allclose(model.sigma_, sigma, rtol=1e-9)
    mean, std = model.predict(X, return_std=True)
    np.testing.assert_allclose(mean, first + A @ S, rtol=1e-9)
    np.testing.assert_allclose(std, sigma * np.sqrt(1 + np.diag(A @ P @ A.T))[:, None], rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_offsets_and_the_scale_of_weights_do_not_matter(scale):
    X, y = drawn()
    for model in (RLS(), RLS(ridge="loo"), Local(bandwidth=1.5), Local(bandwidth="aicc"), Smoother(bandwidth=1.5)):
        mean, std = model.fit(X, y).predict(X, return_std=True)
        there, same_std = model.fit(X + 1e5, y - 1e7).predict(X + 1e5, return_std=True)
        np.testing.assert_allclose(there + 1e7, mean, atol=1e-5)
        np.testing.assert_allclose(same_std, std, rtol=1e-4)
    for model in (RLS(ridge="gcv"), Local(bandwidth="gcv"), Smoother()):
        mean, std = model.fit(X, y).predict(X, return_std=True)
        of_fit, of_noise = std**2 - model.sigma_**2, model.sigma_**2
        scaled, narrow = model.fit(X, y, np.full(60, scale)).predict(X, return_std=True)
        np.testing.assert_allclose(scaled, mean, rtol=0.01, atol=1e-3)
        np.testing.assert_allclose(narrow, np.sqrt(of_fit + scale * of_noise), rtol=0.01)


def test_one_row_far_away_does_not_decide_the_bandwidth():
    X, y = drawn()
    alone = Local().fit(X, y).bandwidth_
    assert abs(Local().fit(np.r_[X, [[500.0, 0.0, 0.0]]], np.r_[y, y[:1]]).bandwidth_ / alone - 1) < 0.5


def test_a_linear_fit_has_the_standard_errors_of_statsmodels():
    api = pytest.importorskip("statsmodels.api")
    X, y = drawn()
    model, ols = RLS(ridge=1e-10).fit(X, y[:, 0]), api.OLS(y[:, 0], np.c_[X, np.ones(60)]).fit()
    np.testing.assert_allclose(np.r_[model.coef_, model.intercept_], ols.params, rtol=1e-8)
    np.testing.assert_allclose(model.sigma_**2, ols.scale, rtol=1e-8)
    np.testing.assert_allclose(model.leverage(X), ols.get_influence().hat_matrix_diag, rtol=1e-7)
    predicted = ols.get_prediction(np.c_[X, np.ones(60)]).summary_frame()
    width = (predicted.obs_ci_upper - predicted.obs_ci_lower) / 2
    std = model.predict(X, return_std=True)[1]
    np.testing.assert_allclose(std / std[0], width / width[0], rtol=1e-7)


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", "triweight"])
def test_errors_left_out_are_those_of_refits(degree, kernel):
    X, y = drawn(40, 2)
    w = np.random.default_rng(2).uniform(0.2, 2.0, 40)
    order = np.argsort(X[:, 0])
    X, y, w = X[order], y[order], w[order]
    pairs = selection.Pairs(X, y, w, degree, kernel, 1e-6)
    errors, leverage = selection.left_out(pairs, 3.0, np.arange(40))
    model = Local(degree, kernel, 3.0)
    for i in (0, 11, 39):
        rest = np.arange(40) != i
        refit = model.fit(X[rest], y[rest], w[rest]).predict(X[i : i + 1])[0]
        np.testing.assert_allclose(errors[i], y[i] - refit, rtol=1e-6, atol=1e-9)
    with_all = y - model.fit(X, y, w).predict(X)
    np.testing.assert_allclose(errors * (1 - leverage)[:, None], with_all, rtol=1e-3, atol=1e-6)
    value, gain, spread = selection.fits_at(pairs, 3.0, X[::-1])
    np.testing.assert_allclose(value[::-1], model.predict(X), rtol=1e-6, atol=1e-8)
    rows = np.stack([Local(degree, kernel, 3.0).fit(X, one, w).predict(X) for one in np.eye(40)], axis=1)
    np.testing.assert_allclose(np.diag(rows), leverage, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(model.leverage(X) * w, np.diag(rows), rtol=1e-6)
    np.testing.assert_allclose(spread[::-1], np.sum(rows**2 / w, axis=1), rtol=1e-6)
    assert np.isclose(model.dof_, leverage.sum()) and gain.shape == (40,)
    residual = y - model.predict(X)
    np.testing.assert_allclose(model.sigma_, np.sqrt(w @ residual**2 / (40 - leverage.sum())), rtol=1e-5)
    _, std = model.predict(X, return_std=True)
    np.testing.assert_allclose(std, model.sigma_ * np.sqrt(1 + spread[::-1])[:, None], rtol=1e-9)


@pytest.mark.parametrize("criterion", selection.CRITERIA)
def test_a_ridge_is_the_best_of_its_criterion(criterion):
    rng = np.random.default_rng(3)
    X = rng.standard_normal((40, 20))
    y = X @ rng.standard_normal((20, 2)) + 4 * rng.standard_normal((40, 2))
    w = rng.uniform(0.5, 2.0, 40)
    chosen = selection.choose_ridge(X, y, w, criterion)

    def by_hand(ridge):
        hat = X @ np.linalg.solve(X.T @ (w[:, None] * X) + ridge * np.eye(20), X.T * w)
        e, h, n, share = y - hat @ y, np.diag(hat), 40, w / w.sum()
        if criterion == "loo":
            return share @ np.sum((e / (1 - h)[:, None]) ** 2, axis=1)
        mean = share @ np.sum(e * e, axis=1)
        if criterion == "gcv":
            return mean / (1 - h.sum() / n) ** 2
        return np.log(mean) + 1 + 2 * (h.sum() + 1) / (n - h.sum() - 2)

    grid = chosen * np.geomspace(1e-4, 1e4, 401)
    assert by_hand(chosen) <= min(by_hand(ridge) for ridge in grid) * (1 + 1e-5)
    model = RLS(ridge=criterion, fit_intercept=False).fit(X, y, w)
    assert np.isclose(model.ridge_, chosen) and model.partial_fit(X, y).ridge_ == model.ridge_
    forgetful = RLS(0.9, ridge=criterion, fit_intercept=False).fit(X, y)
    left = 0.9 ** np.arange(39, -1, -1.0)
    assert np.isclose(forgetful.ridge_ * 0.9**40, selection.choose_ridge(X, y, left, criterion))


@pytest.mark.parametrize("criterion", selection.CRITERIA)
@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", lambda u: np.exp(-u)])
def test_a_bandwidth_is_the_best_of_its_criterion(criterion, kernel):
    rng = np.random.default_rng(4)
    X = np.sort(rng.uniform(0, 10, 300))[:, None]
    y = np.sin(X) + 0.3 * rng.standard_normal((300, 1))
    pairs = selection.Pairs(X, y, np.ones(300), 1, kernel, 1e-6)
    chosen = Local(1, kernel, criterion).fit(X, y).bandwidth_

    def value(bandwidth):
        return selection.score(criterion, *selection.left_out(pairs, bandwidth, np.arange(300)), pairs.w)

    best = min((value(h), h) for h in np.geomspace(0.05, 20, 300))
    assert value(chosen) <= best[0] + 1e-3 * abs(best[0])


def test_the_bandwidth_is_that_of_statsmodels():
    regression = pytest.importorskip("statsmodels.nonparametric.kernel_regression")
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 10, 200)
    y = np.sin(x) + 0.3 * rng.standard_normal(200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, reg_type in ((Local, "ll"), (Smoother, "lc")):
            theirs = regression.KernelReg(y, x, "c", reg_type=reg_type, bw="cv_ls").bw[0]
            assert abs(kind().fit(x[:, None], y).bandwidth_ / theirs - 1) < 0.03
            fit = regression.KernelReg(y, x, "c", reg_type=reg_type, bw=[0.3]).fit(x[:9])[0]
            np.testing.assert_allclose(kind(bandwidth=0.3).fit(x[:, None], y).predict(x[:9, None]), fit, rtol=1e-3)


def test_bandwidths_reach_their_limits():
    X, y = drawn(50, 1)
    near = Local(bandwidth=1e-6).fit(X, y)
    np.testing.assert_allclose(near.predict(X), y, atol=1e-9)
    assert near.dof_ > 49 and np.isnan(near.sigma_).any() | (near.sigma_ < 1e-6).all()
    line = np.c_[X, np.ones(50)] @ np.linalg.lstsq(np.c_[X, np.ones(50)], y, rcond=None)[0]
    far = Local(bandwidth=1e6, ridge=0.0).fit(X, y)
    np.testing.assert_allclose(far.predict(X), line, rtol=1e-6)
    assert abs(far.dof_ - 2) < 1e-3
    with pytest.warns(RuntimeWarning, match="1 of 2 rows have no neighbour within the bandwidth 0.5"):
        lost = Local(kernel="biweight", bandwidth=0.5).fit(X, y).predict([[0.0], [99.0]])
    np.testing.assert_array_equal(lost[1], y[np.argmax(X)])


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_where_all_queries_are_out_of_reach_they_get_the_value_of_the_nearest(degree):
    X, y = drawn(50, 1)
    model = Local(degree, kernel="epanechnikov", bandwidth=0.5).fit(X, y)
    with pytest.warns(RuntimeWarning, match="1 of 1 rows have no neighbour"):
        mean, std = model.predict([[99.0]], return_std=True)
    np.testing.assert_array_equal(mean[0], y[np.argmax(X)])
    assert np.isnan(std).all() and np.isnan(model.leverage([[99.0]]))


def test_prediction_bands_cover_what_they_should():
    rng = np.random.default_rng(5)
    X = rng.uniform(0, 10, (2000, 1))
    y = np.sin(X[:, 0]) + 0.3 * rng.standard_normal(2000)
    basis = np.c_[np.sin(X), np.cos(X)]
    for model, Z in ((Local(), X), (Smoother(), X), (RLS(), basis), (TestTime("recursive_least_squares"), basis)):
        mean, std = model.fit(Z[:1000], y[:1000]).predict(Z[1000:], return_std=True)
        covered = np.mean(np.abs(y[1000:] - mean) < 1.96 * std)
        assert 0.93 < covered < 0.97, model
        assert np.abs(np.median(std) - 0.3) < 0.03


def test_bad_parameters_and_data_are_named():
    X, y = drawn()
    wrong = [
        (RLS(forgetting=0.0), r"forgetting must lie in \(0, 1\]; it is 0.0"),
        (RLS(forgetting=1.1), "it is 1.1"),
        (RLS(forgetting=np.nan), "it is nan"),
        (RLS(forgetting="slow"), "it is slow"),
        (RLS(ridge=0.0), "ridge must be a positive number"),
        (RLS(ridge=None), "it is None"),
        (RLS(ridge="cv"), "ridge is 'cv'"),
        (Local(degree=1.5), "degree must be an integer >= 0; it is 1.5"),
        (Local(kernel="flat"), "kernel is 'flat'"),
        (Local(kernel=lambda u: -u, bandwidth=1.0), "kernel must return a weight >= 0 for each distance"),
        (Local(kernel=lambda u: 1.0, bandwidth=1.0), "for four it returned 1.0"),
        (Local(bandwidth=-1.0), "bandwidth must be a number > 0"),
        (Local(bandwidth="cv"), "bandwidth is 'cv'"),
        (Local(bandwidth=None), "bandwidth must be a number > 0 .* it is None"),
        (Local(ridge=-1.0), "ridge must be a finite number >= 0"),
        (Local(ridge="none"), "ridge must be a finite number >= 0; it is none"),
        (TestTime("hopfield"), "takes q, k; a regressor needs q, k and v"),
        (TestTime("lms", beta=2.0), "layer 'lms' diverged at row"),
    ]
    for model, message in wrong:
        with pytest.raises(ValueError, match=message), np.errstate(all="ignore"):
            model.fit(np.tile(3 * X, (20, 1)), np.tile(y, (20, 1)))
    with pytest.raises(TypeError, match="nlms has no gate 'betta'; it has beta, eps"):
        TestTime("nlms", betta=1.0).fit(X, y)
    with pytest.raises(KeyError, match="unknown layer 'nlm'"):
        TestTime("nlm").fit(X, y)
    with pytest.raises(ValueError, match="Invalid parameter 'betta' for TestTimeRegressor"):
        TestTime().set_params(betta=1.0)
    for weights, message in ((-np.ones(60), "it is -1.0 at 0"), (np.ones(3), r"shape \(3,\); it needs \(60,\)")):
        with pytest.raises(ValueError, match=message):
            RLS().fit(X, y, weights)
    with pytest.raises(ValueError, match="y has 1 outputs, but the fit has 2"):
        RLS().fit(X, y).partial_fit(X, y[:, 0])
    for few in (y[:, 0], y[:-1]):
        with pytest.raises(ValueError, match=r"y has shape \(.*\), the predictions have \(60, 2\)"):
            RLS().fit(X, y).score(X, few)
    with pytest.raises(ValueError, match="n_samples=60, and all rows are the same"):
        Local().fit(np.ones((60, 2)), y)


def test_a_partial_fit_that_fails_changes_nothing():
    X, y = drawn()
    for model in (TestTime("nlms"), RLS(), Local(bandwidth=1.0)):
        before = model.fit(X, y).predict(X)
        for bad in (np.where(X > 1, np.nan, X), X[:, :2]):
            with pytest.raises(ValueError):
                model.partial_fit(bad, y)
        assert np.array_equal(model.predict(X), before)
    model = TestTime("lms", beta=0.1).fit(X, y)
    before = model.predict(X)
    with pytest.raises(ValueError, match="diverged"), np.errstate(all="ignore"):
        model.partial_fit(np.tile(30 * X, (20, 1)), np.tile(y, (20, 1)))
    assert np.array_equal(model.predict(X), before)


@pytest.mark.parametrize("model", [TestTime("nlms"), RLS(missing="skip"), Local(), Smoother()], ids=repr)
def test_first_rows_that_fail_leave_no_fit(model):
    X, y = drawn()
    bad = np.where(X > 1, np.inf, X)
    for learn in (model.fit, model.partial_fit, getattr(model, "prequential", model.fit)):
        with pytest.raises(ValueError, match="Input X contains NaN or infinity"):
            learn(bad, y)
        with pytest.raises(ValueError, match="not fitted yet"):
            model.predict(X)
    after = model.partial_fit(X, y).predict(X)
    assert np.array_equal(after, model.fit(X, y).predict(X))
    with pytest.raises(ValueError, match="Input X contains NaN or infinity"):
        model.fit(bad, y)
    with pytest.raises(ValueError, match="not fitted yet"):
        model.score(X, y)


def test_rows_to_start_from_must_count():
    X, y = drawn()
    lost = np.where(np.arange(60)[:, None] < 3, np.nan, X)
    model = RLS(missing="skip")
    with pytest.raises(ValueError, match="no row counts: each of these first rows lacks a number"):
        model.partial_fit(lost[:2], y[:2])
    model.partial_fit(lost, y).partial_fit(lost[:2], y[:2])
    np.testing.assert_allclose(model.coef_, RLS().fit(X[3:], y[3:]).coef_, rtol=1e-12)


# ---- equivalent kernels ----------------------------------------------------------------------------------------------


def has_weights(name):
    try:
        return bool(linear_in_values(ttr_np.layers[name]))
    except NotImplementedError:
        return False


WEIGHTED = [name for name in NAMES + BY_DEFINITION if has_weights(name)]


@pytest.mark.parametrize("name", WEIGHTED)
def test_answers_are_weights_times_values(name):
    layer = ttr_np.layers[name]
    data = inputs(layer, np.random.default_rng(6), 12)
    q, k, v = data if layer.data == ("q", "k", "v") else (data[0], data[-1], data[-1])
    W = ttr_np.equivalent_kernel(name, q, k)
    assert W.shape == (12, 12)
    np.testing.assert_allclose(W @ v, layer(*data), rtol=1e-8, atol=1e-10)
    assert not np.triu(W, 1).any(), "weights of the future"


def test_a_layer_without_such_weights_says_why():
    told = set(NAMES + BY_DEFINITION + IMPOSSIBLE) - set(WEIGHTED)
    assert {"ttt_mlp", "titans", "sign_lms", "atlas", "s5", "rwkv4", "lattice"} < told and len(told) < 26
    for name in told:
        with pytest.raises(NotImplementedError, match=f"layer '{name}' gives a past value no single weight: .+"):
            ttr_np.equivalent_kernel(name, np.eye(3), np.eye(3))


@pytest.mark.parametrize("name", ["retnet", "lru"])
def test_queries_and_keys_of_an_equivalent_kernel_are_looked_at(name):
    with pytest.raises(ValueError, match="q needs axes"):
        ttr_np.equivalent_kernel(name, np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="axis 't' is 2 in k but 3 in q"):
        ttr_np.equivalent_kernel(name, np.eye(3), np.eye(3)[:2])


def test_attention_maps_and_smoothers_are_rows_of_weights():
    rng = np.random.default_rng(7)
    q, k = rng.standard_normal((2, 9, 4))
    scores = np.where(np.tri(9, dtype=bool), q @ k.T / 2, -np.inf)
    softmax = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ttr_np.equivalent_kernel("softmax", q, k), softmax, rtol=1e-12)
    ridge = ttr_np.equivalent_kernel("intention", q, k, ridge=0.3)[-1]
    np.testing.assert_allclose(ridge, q[-1] @ np.linalg.solve(k.T @ k + 0.3 * np.eye(4), k.T), rtol=1e-10)
    both = ttr_np.equivalent_kernel("gla", np.stack([q, k]), k)
    np.testing.assert_allclose(both[1], ttr_np.equivalent_kernel("gla", k, k), rtol=1e-12)
    X, y = drawn()
    model = TestTime().fit(X, y)
    A = np.c_[X, np.ones(60)]
    hat = A @ np.linalg.solve(A.T @ A + 0.1 * np.eye(4), A.T)
    np.testing.assert_allclose(model.leverage(X), np.diag(hat), rtol=1e-9)
    np.testing.assert_allclose(model.degrees_of_freedom(X), np.trace(hat), rtol=1e-9)
