"""The five experiments: their closed forms, how they ask a memory, and that what they say holds in the numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ttr_np import experiments
from ttr_np.cli import main
from ttr_np.cli.experiment import NAMES, number, report
from ttr_np.experiments import capacity, conditioning, tracking
from ttr_np.experiments.capacity import delta_rule_error
from ttr_np.experiments.conditioning import linear_attention_error, spectrum
from ttr_np.experiments.drift import segments
from ttr_np.experiments.protocol import ask_all, best_scale, predict, value_at
from ttr_np.experiments.tracking import best_filter, drifting, gated_nlms, kalman, steady_risk
from ttr_np.features import normalize_l2
from ttr_np.text_recall import BadInput

SMALL = {
    "capacity": {"d": 8, "loads": [0.5, 2.0], "repeats": 3},
    "conditioning": {"d": 4, "length": 40, "start": 20, "kappas": [1.0, 10.0], "repeats": 3},
    "drift": {"d": 4, "length": 48, "sizes": [16, 48], "repeats": 2},
    "mqar": {"d": 16, "vocabulary": 128, "pairs": [4, 8], "shared": [0.0, 1.0], "repeats": 2},
    "tracking": {"d": 4, "steps": [0.5], "drifts": [0.01, 0.1], "length": 200, "repeats": 2},
}


def means(found, name):
    (entry,) = (entry for entry in found["rows"] if entry["name"] == name)
    return np.array(entry["mean"])


# How a memory is asked


def test_asking_all_pairs_is_what_the_mathematics_says():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 7, 5)), rng.standard_normal((2, 7, 4))
    kt = np.swapaxes(k, 1, 2)
    weights = np.exp(0.7 * q @ kt)
    answers = {
        ("linear_attention", ()): q @ kt @ v,
        ("softmax", (("scale", 0.7),)): weights / weights.sum(-1, keepdims=True) @ v,
        ("intention", (("ridge", 0.3),)): q @ np.linalg.solve(kt @ k + 0.3 * np.eye(5), kt @ v),
        ("symmetric_power", ()): (q @ kt) ** 2 / np.sum((q @ kt) ** 2, -1, keepdims=True) @ v,
    }
    for (name, gates), expected in answers.items():
        np.testing.assert_allclose(ask_all(name, q, k, v, "numpy", **dict(gates)), expected, rtol=1e-9, atol=1e-11)


def test_a_call_in_pieces_answers_like_one_call(monkeypatch):
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((5, 6, 3)), rng.standard_normal((5, 6, 2))
    whole = ask_all("linear_attention", k, k, v, "numpy")
    monkeypatch.setattr("ttr_np.experiments.protocol.ROOM", 40)
    np.testing.assert_array_equal(ask_all("linear_attention", k, k, v, "numpy"), whole)


def test_a_prediction_sees_nothing_of_its_own_value_or_later():
    rng = np.random.default_rng(2)
    k, v = rng.standard_normal((1, 9, 3)), rng.standard_normal((1, 9, 2))
    before = predict("delta_rule", k, v, "numpy", beta=0.3)
    changed = v.copy()
    changed[:, 4:] += 1.0
    after = predict("delta_rule", k, changed, "numpy", beta=0.3)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])  # predictions of tokens 1 to 4
    assert np.all(before[:, 4] != after[:, 4])


def test_the_best_scale_leaves_an_error_orthogonal_to_the_answers():
    rng = np.random.default_rng(3)
    o, v = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4, 3))
    assert abs(np.sum((v - best_scale(o, v) * o) * o)) < 1e-12
    assert best_scale(np.zeros(3), np.ones(3)) == 0.0


# Closed forms


def check_theory(found, most=4.0):
    """Every mean within so many standard errors of its closed form."""
    seen = 0
    for entry in found["rows"]:
        if entry["theory"] is not None:
            error = np.maximum(entry["error"], 1e-6)  # least squares has none where it is exact
            np.testing.assert_array_less(np.abs(np.subtract(entry["mean"], entry["theory"])) / error, most)
            seen += 1
    assert seen


def test_capacity_is_what_the_closed_forms_say():
    (found,) = capacity(d=8, loads=[0.5, 1.0, 3.0], repeats=600, backend="numpy")["panels"]
    check_theory(found)
    assert found["places"] == [0.5, 1.0, 3.0]


def test_the_delta_rules_error_is_that_of_a_plain_loop():
    rng, d, t, runs = np.random.default_rng(4), 3, 5, 40000
    k, v = normalize_l2(rng.standard_normal((runs, t, d))), rng.standard_normal((runs, t))
    S = np.zeros((runs, d))
    for i in range(t):
        S += k[:, i] * (v[:, i] - np.sum(k[:, i] * S, -1))[:, None]
    errors = np.mean((v - np.einsum("ntd,nd->nt", k, S)) ** 2, axis=-1)
    assert abs(errors.mean() - delta_rule_error(d, t)) < 4 * errors.std() / np.sqrt(runs)
    assert delta_rule_error(d, 1) == 0.0


def test_least_squares_of_the_capacity_experiment_is_that_of_numpy():
    rng = np.random.default_rng(5)
    k, v = normalize_l2(rng.standard_normal((1, 12, 6))), rng.standard_normal((1, 12, 2))
    o = ask_all("recursive_least_squares", k, k, v, "numpy", log_decay=0.0, ridge=1e-9)
    np.testing.assert_allclose(o[0], k[0] @ np.linalg.lstsq(k[0], v[0], rcond=None)[0], atol=1e-7)


def test_conditioning_is_what_the_closed_form_says():
    (found,) = conditioning(d=6, length=64, start=32, kappas=[1.0, 30.0], repeats=600, backend="numpy")["panels"]
    check_theory(found)


@pytest.mark.parametrize("kappa", [1.0, 7.0, 1000.0])
def test_the_spectrum_has_its_condition_number_and_trace(kappa):
    values = spectrum(16, kappa)
    np.testing.assert_allclose([values.sum(), values[-1] / values[0]], [16.0, kappa])
    np.testing.assert_allclose(np.diff(np.log(values)), np.log(kappa) / 15, atol=1e-12)


def test_endless_pairs_do_not_mend_correlated_keys():
    values = spectrum(16, 100.0)
    limit = 1 - np.sum(values**2) ** 2 / (np.sum(values) * np.sum(values**3))
    assert limit > 0.2
    assert linear_attention_error(values, np.array([1e12])) == pytest.approx(limit)


def test_tracking_is_what_the_closed_form_says():
    settings = {"d": 6, "sigma": 0.5, "drift": 0.02, "steps": [0.3, 1.0], "drifts": [0.005, 0.2]}
    result = tracking(**settings, length=1500, repeats=60, backend="numpy")
    for found in result["panels"]:
        check_theory(found)
        assert np.all(means(found, "Kalman filter") < means(found, "gated NLMS"))


@pytest.mark.parametrize(("gate", "step"), [(1.0, 0.5), (0.97, 0.8)])
def test_the_steady_state_is_that_of_a_plain_loop(gate, step):
    rng, d, q, sigma, runs = np.random.default_rng(6), 5, 0.03, 0.4, 4000
    w, u, risks = rng.standard_normal((runs, d)) / np.sqrt(d), np.zeros((runs, d)), []
    for t in range(400):
        x = rng.standard_normal((runs, d))
        error = np.sum((w - u) * x, -1) + sigma * rng.standard_normal(runs)
        risks += [error**2] if t >= 300 else []
        u = gate * (u + step * x * (error / np.sum(x * x, -1))[:, None])
        w = np.sqrt(1 - q) * w + np.sqrt(q / d) * rng.standard_normal((runs, d))
    per_run = np.mean(risks, axis=0)
    assert abs(per_run.mean() - steady_risk(d, q, sigma, gate, step)) < 4 * per_run.std() / np.sqrt(runs)


def plain_gated_nlms(x, y, gate, step):
    """Squared errors of one series, as the module states the filter."""
    u, errors = np.zeros(x.shape[-1]), []
    for x_t, y_t in zip(x, y, strict=True):
        errors.append(y_t - u @ x_t)
        u = gate * (u + step * x_t * errors[-1] / (x_t @ x_t))
    return np.square(errors)


def plain_kalman(x, y, q, sigma):
    """Squared errors of one series, from the textbook."""
    d = x.shape[-1]
    u, P, errors = np.zeros(d), np.eye(d) / d, []
    for x_t, y_t in zip(x, y, strict=True):
        u, P = np.sqrt(1 - q) * u, (1 - q) * P + q / d * np.eye(d)
        errors.append(y_t - u @ x_t)
        gain = P @ x_t / (x_t @ P @ x_t + sigma**2)
        u, P = u + gain * errors[-1], P - np.outer(gain, x_t @ P)
    return np.square(errors)


def test_the_filters_are_those_of_the_textbooks():
    x, y = drifting(np.random.default_rng(8), 2, 30, 4, 0.3, 0.2)
    for i in range(2):
        series, half = (x[i], y[i, :, 0]), slice(15, None)
        found = [gated_nlms(x, y, 0.7, 0.9, "numpy")[i], kalman(x, y, 0.3, 0.2, "numpy")[i]]
        expected = [plain_gated_nlms(*series, 0.7, 0.9)[half].mean(), plain_kalman(*series, 0.3, 0.2)[half].mean()]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_best_filter_is_best_around_it():
    gate, step = best_filter(16, 0.01, 0.3)
    least = steady_risk(16, 0.01, 0.3, gate, step)
    for other in ((gate * 0.995, step), (min(1.0, gate * 1.005), step), (gate, step * 0.9), (gate, step * 1.1)):
        assert steady_risk(16, 0.01, 0.3, *other) > least
    assert best_filter(16, 0.01, 0.3, gated=False)[0] == 1.0


# Inputs


def test_a_segment_has_one_map_and_keys_around_one_centre():
    k, v = segments(np.random.default_rng(7), 2, 60, 20, 3)
    np.testing.assert_allclose(np.linalg.norm(k, axis=-1), 1.0)
    maps = [np.linalg.lstsq(k[0, i : i + 20], v[0, i : i + 20], rcond=None)[0] for i in (0, 20, 40)]
    for i, A in enumerate(maps):
        np.testing.assert_allclose(k[0, 20 * i : 20 * i + 20] @ A, v[0, 20 * i : 20 * i + 20], atol=1e-10)
    assert np.abs(maps[0] - maps[1]).max() > 0.1


# What comes back


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_plain_and_the_same_for_the_same_seed(name):
    run = getattr(experiments, name)
    first, again, other = (run(**SMALL[name], seed=seed, backend="numpy") for seed in (0, 0, 1))
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert first["panels"] == again["panels"] and first["panels"] != other["panels"]
    assert first["finding"].endswith(".") and "\n" not in first["finding"] and first["finding"].count(". ") == 0
    for found in first["panels"]:
        for entry in found["rows"]:
            assert len(entry["mean"]) == len(entry["error"]) == len(found["places"])


@pytest.mark.parametrize("name", NAMES)
def test_the_report_shows_every_number_and_the_sentence(name):
    result = getattr(experiments, name)(**SMALL[name], backend="numpy")
    text = report(result)
    for found in result["panels"]:
        assert found["measure"] in text
        for entry in found["rows"]:
            line = " ".join([entry["name"], *map(number, entry["mean"])]).split()
            assert any(row.split() == line for row in text.splitlines())
            if entry["theory"] is not None:
                exact = " ".join(["closed form", *map(number, entry["theory"])]).split()
                assert any(row.split() == exact for row in text.splitlines())
    assert " ".join(result["finding"].split()) in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("capacity", {"repeats": 0}),
        ("capacity", {"seed": -1}),
        ("conditioning", {"kappas": [0.5]}),
        ("conditioning", {"length": 20}),
        ("drift", {"sizes": [0]}),
        ("mqar", {"vocabulary": 60}),
        ("tracking", {"d": 2}),
        ("tracking", {"steps": [2.0]}),
        ("tracking", {"drifts": [1.0]}),
    ],
)
def test_a_setting_out_of_range_is_refused(name, settings):
    with pytest.raises(BadInput, match=next(iter(settings)).rstrip("s")[:4]):
        getattr(experiments, name)(**SMALL[name] | settings)


# The command


def test_the_command_knows_every_experiment():
    assert list(NAMES) == sorted(experiments.__all__)


def test_the_command_writes_what_the_function_returns(capsys, tmp_path):
    figure = tmp_path / "tracking.png"
    assert main([*"experiment conditioning --repeats 2 --backend numpy --json --plot".split(), str(figure)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["panels"] == conditioning(repeats=2, backend="numpy")["panels"]
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", ["nothing", "", "capacity --repeats 0", "drift --backend tpu", "mqar --plot x"])
def test_the_command_refuses_in_one_line(arguments, capsys):
    assert main(["experiment", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("ttr: ") and printed.err.count("\n") == 1


# What the experiments show, with their own settings


@pytest.mark.slow
def test_capacity_shows_what_it_claims(results):
    (found,) = results["capacity"]["panels"]
    assert found["places"] == [0.25, 0.5, 1.0, 2.0, 4.0]
    for entry in found["rows"]:
        if entry["theory"] is not None:
            np.testing.assert_allclose(entry["mean"], entry["theory"], atol=1e-6, rtol=0.08)
    plain, scaled, online, exact, softmax = (np.array(entry["mean"]) for entry in found["rows"])
    names = ["linear attention", "scaled linear attention", "delta rule", "least squares", "softmax"]
    assert [entry["name"] for entry in found["rows"]] == names
    assert np.all(scaled < plain) and np.all(scaled < 1) and np.all(softmax < 1e-6)
    assert np.all(exact < scaled) and np.all(exact < online)
    assert np.all(exact[:3] < 1e-6) and scaled[2] > 0.45
    assert np.all(online[:2] < scaled[:2]) and np.all(online[2:] > scaled[2:])


@pytest.mark.slow
def test_conditioning_shows_what_it_claims(results):
    (found,) = results["conditioning"]["panels"]
    linear, fast, slow, exact = (
        means(found, name) for name in ("scaled linear attention", "NLMS, mu 1", "NLMS, mu 0.5", "RLS")
    )
    assert np.all(linear[1:] > 0.2) and linear[0] < 0.1
    assert np.all(np.diff(fast) > 0) and np.all(np.diff(slow) > 0) and np.all(fast < slow)
    assert fast[-1] > 1e5 * fast[0] and slow[-1] > 1e4 * slow[0] and fast[-1] < 0.01
    assert np.all(exact < 1e-8)


@pytest.mark.slow
def test_drift_shows_what_it_claims(results):
    (found,) = results["drift"]["panels"]
    (mesa,) = (entry for entry in found["rows"] if entry["name"] == "mesa")
    decays = [chosen["decay"] for chosen in mesa["chosen"]]
    assert decays == sorted(decays) and decays[0] < decays[-1] == 1.0
    assert np.all(means(found, "local linear") < means(found, "softmax"))
    assert np.all(means(found, "mesa") < means(found, "delta rule"))
    assert np.all(means(found, "mesa") < means(found, "gated linear attention"))
    winners = [min(found["rows"], key=lambda entry: entry["mean"][i])["name"] for i in range(4)]
    for place, winner in zip(found["places"], winners, strict=True):
        assert f"{winner} at {place} ({value_at(found, winner, place):.2g}" in results["drift"]["finding"]
        assert winner in ("mesa", "local linear")


@pytest.mark.slow
def test_mqar_shows_what_it_claims(results):
    by_pairs, by_share = results["mqar"]["panels"]
    for name in ("softmax, gain sqrt d", "squared dot product"):
        assert np.all(means(by_pairs, name) > 0.999)
    linear, online, exact = (means(by_pairs, name) for name in ("linear attention", "delta rule, beta 1", "ridge 0.25"))
    assert np.all(exact >= linear) and np.all(linear >= online)
    assert np.all(exact[2:] > linear[2:]) and np.all(linear[2:] > online[2:])
    assert np.all(means(by_pairs, "softmax, scale 1/sqrt d") < 0.1)
    assert by_share["places"][-1] == 2.0
    assert means(by_share, "linear attention")[-1] < 0.1 and means(by_share, "squared dot product")[-1] < 0.1
    assert means(by_share, "delta rule, beta 1")[-1] < 0.1 and means(by_share, "delta rule, beta 0.5")[-1] < 0.1
    for name in ("ridge 0.01", "ridge 0.25", "ridge 1", "softmax, gain sqrt d"):
        assert means(by_share, name)[-1] > 0.95


@pytest.mark.slow
def test_tracking_shows_what_it_claims(results):
    by_step, by_drift = results["tracking"]["panels"]
    for found in (by_step, by_drift):
        check_theory(found)
        kalman, gated, plain = (means(found, name) for name in ("Kalman filter", "gated NLMS", "NLMS"))
        assert np.all(kalman < gated) and np.all(gated < plain * 1.0001)
    assert np.all(means(by_drift, "gated NLMS") < 1.1 * means(by_drift, "Kalman filter"))
    assert means(by_drift, "NLMS")[-1] > 1.2 * means(by_drift, "gated NLMS")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_takes_less_than_a_minute(results, name):
    assert results[name]["processor seconds"] < 60  # of one core: other work on the machine does not count
