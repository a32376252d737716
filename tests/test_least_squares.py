"""The exact linear memories and their neighbours, against direct solves and against other people's software."""

import warnings
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import scipy.linalg

import ttr_np
from ttr_np.calling import run
from ttr_np.notation import draw
from ttr_np.solvers import mesa as mesa_solver
from ttr_np.solvers import recursive_least_squares as rls_solver

rls = partial(ttr_np.recursive_least_squares, backend="numpy")
mesa = partial(ttr_np.mesa, backend="numpy")
kernel_ridge = partial(ttr_np.kernel_ridge, backend="numpy")
kalman_filter = partial(ttr_np.kalman_filter, backend="numpy")
affine_projection = partial(ttr_np.affine_projection, backend="numpy")


def close(x, y, rtol=1e-12):
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(initial=0), 1e-300))


def rls_token_by_token(ridge=1.0, **arrays):
    common = {name: arrays.pop(name) for name in ("initial_state", "mask") if name in arrays}
    start = partial(rls_solver.start, ridge)
    return run(rls_solver.recurrent, "recursive_least_squares", arrays, start=start, output_final_state=True, **common)


def weights(t, log_decay, beta):
    """Weight of each pair at step t, and that of the ridge."""
    after = np.array([log_decay[i + 1 : t + 1].sum() for i in range(t + 1)])
    return np.exp(after) * beta[: t + 1], np.exp(log_decay[: t + 1].sum())


def fit(k, v, w, ridge):
    """Weighted ridge regression as one least-squares problem: no Gram matrix, no recursion."""
    rows = np.concatenate([np.sqrt(w)[:, None] * k, np.sqrt(ridge) * np.eye(k.shape[1])])
    right = np.concatenate([np.sqrt(w)[:, None] * v, np.zeros((k.shape[1], v.shape[1]))])
    return scipy.linalg.lstsq(rows, right)[0]


@pytest.mark.parametrize("t", [1, 2, 17, 64, 65, 130])
@pytest.mark.parametrize("optional", [(), ("log_decay",), ("beta",), ("log_decay", "beta")])
def test_recursive_least_squares_is_the_weighted_fit_of_every_prefix(t, optional):
    rng = np.random.default_rng(t)
    x = draw("recursive_least_squares", rng, optional=optional, per_channel=False, t=t)
    log_decay, beta = x.get("log_decay", np.zeros(t)), x.get("beta", np.ones(t))
    o, state = rls(**x, ridge=0.3, output_final_state=True)
    for i in range(t):
        w, left = weights(i, log_decay, beta)
        close(o[i], x["q"][i] @ fit(x["k"][: i + 1], x["v"][: i + 1], w, 0.3 * left), 1e-11)
    H = (x["k"] * w[:, None]).T @ x["k"] + 0.3 * left * np.eye(5)
    close(state.P @ H, np.eye(5), 1e-12)
    close(state.S, fit(x["k"], x["v"], w, 0.3 * left), 1e-12)


@pytest.mark.parametrize("cuts", [(0, 0, 1, 2, 64, 64, 65, 100), (50,), tuple(range(1, 130))])
def test_least_squares_cut_anywhere_is_one_pass(cuts):
    rng, optional = np.random.default_rng(0), ("log_decay", "beta")
    x = draw("recursive_least_squares", rng, optional=optional, per_channel=False, t=130)
    o, state = rls(**x, output_final_state=True)
    slow, after = rls_token_by_token(**x)
    close(slow, o)
    close(after.P, state.P)
    pieces, carried = [], None
    for low, high in zip((0, *cuts), (*cuts, 130), strict=True):
        piece = {name: y[low:high] for name, y in x.items()}
        answer, carried = rls(**piece, initial_state=carried, output_final_state=True)
        pieces.append(answer)
    close(np.concatenate(pieces), o)
    close(carried.S, state.S)
    close(carried.P, state.P)


@pytest.mark.parametrize("gate", [-0.7, -3.0, -30.0, -1e4, -1e30])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_a_strong_gate_costs_the_mild_ones_after_it_nothing(gate, form):
    x = draw("recursive_least_squares", np.random.default_rng(3), optional=("log_decay",), per_channel=False, t=120)
    x["log_decay"][37] = gate
    o = rls(**x) if form == "chunked" else rls_token_by_token(**x)[0]
    for i in (36, 50, 119):
        w, left = weights(i, np.maximum(x["log_decay"], -60), np.ones(120))
        expected = x["q"][i] @ fit(x["k"][: i + 1], x["v"][: i + 1], w, left)
        close(o[i], expected, 1e-8 if gate < -20 and i > 36 else 1e-11)  # below -20 the cap stands for the lost ridge


def test_gates_that_halve_the_past_at_every_step_are_exact():
    x = draw("recursive_least_squares", np.random.default_rng(3), optional=("log_decay",), per_channel=False, t=100)
    x["log_decay"][:] = np.log(0.5)
    close(rls(**x), rls_token_by_token(**x)[0], 1e-11)
    w, left = weights(99, x["log_decay"], np.ones(100))
    close(rls(**x)[99], x["q"][99] @ fit(x["k"], x["v"], w, left), 1e-9)


@pytest.mark.parametrize("form", [lambda **x: rls(**x, output_final_state=True), rls_token_by_token])
def test_a_pair_of_weight_zero_is_not_looked_at(form):
    x = draw("recursive_least_squares", np.random.default_rng(1), optional=("beta",), t=70)
    x["beta"][[3, 20, 69]] = 0
    other = {name: y.copy() for name, y in x.items()}
    other["k"][[3, 20, 69]] = 1e200
    other["v"][[3, 20, 69]] = np.nan
    (o, state), (changed, after) = form(**x), form(**other)
    np.testing.assert_array_equal(o, changed)
    np.testing.assert_array_equal(state.P, after.P)
    x["beta"][:] = 0
    np.testing.assert_array_equal(form(**x, initial_state=state)[1].S, state.S)
    np.testing.assert_array_equal(form(**x, initial_state=state)[1].P, state.P)


def excited(rng, t, dtype):
    """Keys in three of six directions, turned at random; noisy linear values."""
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    inside = rng.standard_normal((t, 3))
    k = inside @ turn[:3]
    v = k @ rng.standard_normal((6, 2)) + 0.1 * rng.standard_normal((t, 2))
    return turn, inside, k.astype(dtype), v.astype(dtype)


@pytest.mark.parametrize("form", [lambda **x: rls(**x, output_final_state=True), rls_token_by_token])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_wind_up_leaves_the_excited_directions_alone(form, dtype):
    t = 20_000 if form is not rls_token_by_token else 3_000
    turn, inside, k, v = excited(np.random.default_rng(5), t, dtype)
    log_decay = np.full(t, np.log(0.9))
    o, state = form(q=k, k=k, v=v, log_decay=log_decay)
    expected, small = rls(inside, inside, v.astype(float), log_decay=log_decay, output_final_state=True)
    close(o, expected, {"float64": 1e-9, "float32": 2e-5}[dtype])
    close(turn[:3] @ state.P @ turn[:3].T, small.P, {"float64": 1e-5, "float32": 5e-2}[dtype])
    np.testing.assert_array_equal(state.P, state.P.T)
    values = np.linalg.eigvalsh(state.P)
    assert values[0] > 0
    assert values[-1] <= 1.01 * rls_solver.limit(dtype) * values[0]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_burst_after_silence_is_learned_at_once(dtype):
    rng = np.random.default_rng(6)
    _, _, k, v = excited(rng, 500, dtype)
    gates, nothing = np.full(20_000, np.log(0.9)), np.zeros((20_000, 6), dtype)
    _, state = rls(k, k, v, log_decay=gates[:500], output_final_state=True)
    _, state = rls(nothing, nothing, nothing[:, :2], log_decay=gates, initial_state=state, output_final_state=True)
    assert np.all(np.isfinite(state.P)) and np.linalg.eigvalsh(state.P)[0] > 0
    M = rng.standard_normal((6, 2))
    burst = rng.standard_normal((40, 6)).astype(dtype)
    x = {"q": burst, "k": burst, "v": (burst @ M).astype(dtype), "log_decay": gates[:40], "initial_state": state}
    o, after = rls(**x, output_final_state=True)
    slow, _ = rls_token_by_token(**x)
    close(o, burst @ M, {"float64": 1e-9, "float32": 1e-3}[dtype])
    close(after.S, M, {"float64": 1e-9, "float32": 1e-4}[dtype])
    close(slow, o, {"float64": 1e-9, "float32": 1e-4}[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_strong_gates_in_silence_leave_a_finite_memory(dtype):
    x = draw("recursive_least_squares", np.random.default_rng(6), optional=("log_decay",), per_channel=False, t=200)
    x = {name: y.astype(dtype) for name, y in x.items()}
    x["log_decay"][5:150] = -40
    x["k"][5:150] = 0
    o, state = rls(**x, output_final_state=True)
    slow, after = rls_token_by_token(**x)
    close(o, slow, {"float64": 1e-8, "float32": 1e-3}[dtype])
    close(state.P, after.P, {"float64": 1e-8, "float32": 1e-3}[dtype])
    assert np.linalg.eigvalsh(state.P)[0] > 0


@pytest.mark.slow
def test_a_million_steps_keep_p_symmetric_and_positive_definite():
    rng = np.random.default_rng(7)
    k = rng.standard_normal((1_000_000, 4))
    v = k @ rng.standard_normal((4, 2)) + rng.standard_normal((1_000_000, 2))
    _, state = rls(k, k, v, output_final_state=True)
    H = k.T @ k + np.eye(4)
    np.testing.assert_array_equal(state.P, state.P.T)
    assert np.linalg.eigvalsh(state.P)[0] > 0
    close(state.P @ H, np.eye(4), 1e-11)
    close(state.S, np.linalg.solve(H, k.T @ v), 1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("ridge", 10.0 ** np.arange(-12, 13, 4))
def test_any_ridge_is_exact_for_its_condition(ridge, dtype):
    x = draw("recursive_least_squares", np.random.default_rng(2), t=50, dtype=dtype)
    o = rls(**x, ridge=ridge)
    start = ttr_np.notation.RecursiveLeastSquaresState(np.zeros((5, 3)), np.eye(5) / ridge)
    close(rls(**x, initial_state=start), o, 1e-6)
    k, v = x["k"].astype(float), x["v"].astype(float)
    eps = np.finfo(dtype).eps
    for i in (0, 3, 10, 49):
        rows = np.concatenate([k[: i + 1], np.sqrt(ridge) * np.eye(5)])
        H = k[: i + 1].T @ k[: i + 1] + ridge * np.eye(5)
        S = fit(k[: i + 1], v[: i + 1], np.ones(i + 1), ridge)
        if ridge >= 1:  # then the Gram matrix is the better conditioned way
            S = np.linalg.solve(H, k[: i + 1].T @ v[: i + 1])
        # the root of the Gram matrix is carried: errors grow like its condition; plus what the cap may add
        capped = min(100 / rls_solver.limit(dtype), 1e4 * eps / ridge)
        close(o[i], x["q"][i] @ S, 50 * eps * np.linalg.cond(rows) + capped)


def test_float32_after_many_tokens_is_as_good_as_float32():
    rng, optional = np.random.default_rng(2), ("log_decay",)
    x = draw("recursive_least_squares", rng, optional=optional, per_channel=False, t=8192, k=32)
    x["log_decay"] /= 100
    o = rls(**x)
    found = rls(**{name: y.astype(np.float32) for name, y in x.items()})
    assert found.dtype == np.float32
    close(found, o, 1e-5)


def bad_weights():
    x = draw("recursive_least_squares", np.random.default_rng(0), optional=("log_decay", "beta"), per_channel=False)
    for name, number in [("log_decay", np.nan), ("log_decay", -np.inf), ("beta", -0.1), ("beta", np.nan)]:
        spoilt = x[name].copy()
        spoilt[4] = number
        yield x | {name: spoilt}, rf"{name} must .*{number} at \(4,\)"
    yield x | {"log_decay": -np.ones((7, 5))}, "log_decay must have one number per step"
    yield x | {"log_decay": 0.1}, "log_decay must be <= 0"
    for ridge in (0, -1, np.nan, np.inf):
        yield x | {"ridge": ridge}, f"ridge must be a (positive )?finite number, got {ridge}"
    P = np.eye(5)
    P[0, 1] = 0.5
    for bad, words in [(P, "P must be symmetric"), (np.diag([1, 1, 1, 1, -1]), "P must be positive definite")]:
        yield x | {"initial_state": (np.zeros((5, 3)), bad)}, words


@pytest.mark.parametrize(("arguments", "words"), list(bad_weights()))
def test_what_is_no_regression_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        rls(**arguments)


def test_recursive_least_squares_is_padasip_s():
    padasip = pytest.importorskip("padasip")

    x = draw("recursive_least_squares", np.random.default_rng(8), t=90, v=1)
    theirs = padasip.filters.FilterRLS(5, mu=0.97, eps=0.2, w="zeros")
    theirs.run(x["v"][:, 0], x["k"])
    _, state = rls(**x, log_decay=np.full(90, np.log(0.97)), ridge=0.2, output_final_state=True)
    close(state.S[:, 0], theirs.w, 1e-11)
    close(state.P, theirs.R, 1e-11)


def test_recursive_least_squares_ends_in_ordinary_least_squares():
    statsmodels = pytest.importorskip("statsmodels.api")
    x = draw("recursive_least_squares", np.random.default_rng(9), t=80, v=1)
    o = rls(**x, ridge=1e-10)
    _, state = rls(**x, ridge=1e-10, output_final_state=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about their own dependencies
        ols = statsmodels.OLS(x["v"], x["k"]).fit()
        recursive = statsmodels.RecursiveLS(x["v"], x["k"]).fit().recursive_coefficients.filtered
    close(state.S[:, 0], ols.params, 1e-9)
    close(o[20:, 0], np.sum(x["q"] * recursive.T, axis=1)[20:], 1e-8)


def test_square_root_covariance_and_gram_forms_agree():
    """The QR of all rows, the normal equations and the recursion: three routes to one fit."""
    x = draw("recursive_least_squares", np.random.default_rng(4), t=60)
    _, state = rls(**x, output_final_state=True)
    R = np.linalg.qr(np.concatenate([x["k"], np.eye(5)]), mode="r")
    close(state.P, np.linalg.inv(R.T @ R))
    close(state.S, np.linalg.solve(np.eye(5) + x["k"].T @ x["k"], x["k"].T @ x["v"]))


MESA = [("exact", 1e-12), ("cg", 1e-10), ("chebyshev", 1e-10)]


def mesa_definition(q, k, v, ridge, log_decay=None, beta=None):
    t = len(k)
    log_decay, beta = np.zeros(t) if log_decay is None else log_decay, np.ones(t) if beta is None else beta
    o = np.empty((t, v.shape[1]))
    for i in range(t):
        w, _ = weights(i, log_decay, beta)
        H = (k[: i + 1] * w[:, None]).T @ k[: i + 1] + np.diag(np.broadcast_to(ridge, k.shape[1]))
        o[i] = q[i] @ np.linalg.pinv(H, hermitian=True) @ ((k[: i + 1] * w[:, None]).T @ v[: i + 1])
    return o


@pytest.mark.parametrize(("solver", "rtol"), MESA)
@pytest.mark.parametrize("ridge", [0.7, np.array([0.2, 0.5, 1.0, 2.0, 3.0])], ids=["number", "per channel"])
@pytest.mark.parametrize("optional", [(), ("log_decay",), ("beta",), ("log_decay", "beta")])
@pytest.mark.parametrize("t", [1, 17, 130])
def test_mesa_is_ridge_regression_with_a_constant_ridge(solver, rtol, ridge, optional, t):
    x = draw("mesa", np.random.default_rng(t), optional=optional, per_channel=False, t=t)
    o, state = mesa(**x, ridge=ridge, solver=solver, output_final_state=True)
    close(o, mesa_definition(**x, ridge=ridge), rtol)
    options = {"ridge": np.asarray(ridge), "solver": solver}
    slow, after = run(mesa_solver.recurrent, "mesa", x, options, output_final_state=True)
    close(slow, o, rtol)
    close(after.H, state.H)


RIDGES = [*10.0 ** np.arange(-12, 13, 4), 1e-6, np.array([1e-6, 1e6, 1e-3, 1e3, 1.0])]


def mesa_token_by_token(ridge=1.0, **arrays):
    return run(mesa_solver.recurrent, "mesa", arrays, {"ridge": np.asarray(ridge)})


@pytest.mark.parametrize("form", [mesa, mesa_token_by_token])
@pytest.mark.parametrize("optional", [(), ("log_decay",)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("ridge", RIDGES, ids=lambda ridge: "per channel" if np.ndim(ridge) else f"{ridge:.0e}")
@pytest.mark.parametrize("size", [1, 1e3])
def test_any_ridge_of_mesa_is_exact_for_its_condition(form, optional, dtype, ridge, size):
    x = draw("mesa", np.random.default_rng(2), optional=optional, per_channel=False, t=150, dtype=dtype)
    x["k"] *= size
    o = form(**x, ridge=ridge)
    eps, x = np.finfo(dtype).eps, {name: y.astype(float) for name, y in x.items()}
    for i in (0, 3, 10, 49, 63, 70, 149):
        w, _ = weights(i, x.get("log_decay", np.zeros(150)), np.ones(150))
        A = (x["k"][: i + 1] * w[:, None]).T @ x["k"][: i + 1] + np.diag(np.broadcast_to(ridge, 5))
        S = fit_extended(x["k"][: i + 1], x["v"][: i + 1], w, ridge)
        share = min(1.5, 50 * eps * np.linalg.cond(A))  # beyond that, the minimum norm: wrong, but bounded
        assert np.linalg.norm(o[i] - x["q"][i] @ S) <= share * np.linalg.norm(x["q"][i]) * np.linalg.norm(S)


def fit_extended(k, v, w, ridge):
    """The normal equations, eliminated in extended precision: positive definite, so that no pivots are needed."""
    rows = np.sqrt(w.astype(np.longdouble))[:, None] * k.astype(np.longdouble)
    A = rows.T @ rows + np.diag(np.broadcast_to(np.asarray(ridge, np.longdouble), k.shape[1]))
    b = rows.T @ (np.sqrt(w.astype(np.longdouble))[:, None] * v)
    for i in range(len(A)):
        b[i], A[i] = b[i] / A[i, i], A[i] / A[i, i]
        for j in set(range(len(A))) - {i}:
            b[j], A[j] = b[j] - A[j, i] * b[i], A[j] - A[j, i] * A[i]
    return b.astype(float)


@pytest.mark.parametrize("ridge", [1e-12, 1e-6, 1e-3])
def test_a_small_ridge_in_float32_gives_the_fit(ridge):
    rng = np.random.default_rng(0)
    k = rng.standard_normal((300, 8)).astype("float32")
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((300, 3)).astype("float32")
    o, gates = mesa(k, k, v, ridge=ridge), np.zeros(300, "float32")
    expected = mesa_definition(*(x.astype(float) for x in (k, k, v)), ridge)
    close(o[20:], expected[20:], 2e-6)
    close(o, expected, 1e-3 if ridge < 1e-3 else 2e-4)
    close(o[20:], mesa(k, k, v, log_decay=gates, ridge=ridge)[20:], 2e-6)
    close(o[20:], mesa_token_by_token(q=k, k=k, v=v, ridge=ridge)[20:], 2e-6)


@pytest.mark.parametrize("gates", [None, 0.0])
@pytest.mark.parametrize("form", [mesa, mesa_token_by_token])
def test_a_ridge_below_rounding_asks_for_the_minimum_norm(form, gates):
    k = np.ones((4, 2), "float32")
    o = form(q=np.eye(2, dtype="float32")[[0, 1, 0, 1]], k=k, v=k, log_decay=gates, ridge=1e-12)
    close(o, np.full((4, 2), 0.5), 1e-6)


@pytest.mark.parametrize("ridge", [1e-12, 1e-6, np.array([1e-6, 1e-9, 1e-3, 1e3, 1.0])], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_tokens_solved_alone_know_no_future(ridge, dtype):
    x = draw("mesa", np.random.default_rng(2), lead=(2, 1), t=131, dtype=dtype)
    x["q"] = np.concatenate([x["q"], -x["q"]], axis=1)  # two queries share a memory
    o = mesa(**x, ridge=ridge)
    for at in (1, 4, 40, 64, 100):
        changed = {name: y.copy() for name, y in x.items()}
        for y in changed.values():
            y[..., at:, :] *= 1e3
        np.testing.assert_array_equal(mesa(**changed, ridge=ridge)[..., :at, :], o[..., :at, :])


@pytest.mark.parametrize("optional", [(), ("log_decay",)])
@pytest.mark.parametrize("form", [mesa, mesa_token_by_token])
def test_a_ridge_of_zero_in_one_memory_leaves_others_their_bits(form, optional):
    x = draw("mesa", np.random.default_rng(0), optional=optional, lead=(4,), per_channel=False, t=70, dtype="float32")
    ridge = np.repeat([[0.0], [1e-9], [0.5], [0.0]], 5, axis=1)
    ridge[3, 1:] = 1.0
    together = form(**x, ridge=ridge)
    for i in range(4):
        np.testing.assert_array_equal(together[i], form(**{name: y[i] for name, y in x.items()}, ridge=ridge[i]))


@pytest.mark.parametrize(("name", "bad"), [("beta", np.nan), ("beta", -0.5), ("beta", np.inf), ("log_decay", np.nan)])
@pytest.mark.parametrize("solver", ["exact", "cg", "chebyshev"])
def test_mesa_refuses_what_is_no_weight(name, bad, solver):
    x = draw("mesa", np.random.default_rng(0), optional=("log_decay", "beta"), per_channel=False)
    x[name][4] = bad
    with pytest.raises(ValueError, match=rf"^{name} must .*{bad} at \(4,\)"):
        mesa(**x, solver=solver)
    assert np.all(np.isfinite(mesa(**x, solver=solver, mask=np.arange(7) != 4)))


def test_mesa_may_forget_everything():
    x = draw("mesa", np.random.default_rng(0), optional=("log_decay",), per_channel=False)
    x["log_decay"][4] = -np.inf
    close(mesa(**x)[4:], mesa(**{name: y[4:] for name, y in x.items()}))


@pytest.mark.parametrize("optional", [(), ("log_decay", "beta")])
def test_mesa_without_ridge_is_the_fit_of_minimum_norm(optional):
    x = draw("mesa", np.random.default_rng(1), optional=optional, per_channel=False, t=12)
    x["k"][5:8] = x["k"][4]
    x["q"][7] = 0
    o = mesa(**x, ridge=0)
    close(o, mesa_definition(**x, ridge=0), 1e-9)
    for i in (0, 3, 4):
        w, _ = weights(i, x.get("log_decay", np.zeros(12)), x.get("beta", np.ones(12)))
        rows = np.sqrt(w)[:, None]
        S = scipy.linalg.lstsq(rows * x["k"][: i + 1], rows * x["v"][: i + 1])[0]
        close(o[i], x["q"][i] @ S, 1e-9)
    assert np.all(mesa(x["q"], 0 * x["k"], x["v"], ridge=0) == 0)


@pytest.mark.parametrize("solver", ["cg", "chebyshev"])
@pytest.mark.parametrize("optional", [(), ("log_decay",)])
def test_a_solver_at_its_limit_says_so(solver, optional):
    x = draw("mesa", np.random.default_rng(1), optional=optional, per_channel=False, t=70, k=16)
    tolerance = {"tolerance": 1e-9}
    with pytest.warns(RuntimeWarning, match=rf"'{solver}' stopped after 2 iterations at .* residual of \d\.\de-0\d"):
        o = mesa(**x, solver=solver, iterations=2, **tolerance)
    assert np.all(np.isfinite(o))
    assert np.all(np.isfinite(mesa(**x, solver=solver, iterations=2, tolerance=0)))
    close(mesa(**x, solver=solver, **tolerance), mesa(**x), 1e-7)


def test_one_token_s_iterations_are_its_own():
    """A token that needs many steps changes no bit of an easy one before it."""
    x = draw("mesa", np.random.default_rng(1), t=40, k=16)
    hard = {name: y.copy() for name, y in x.items()}
    hard["k"][30:] *= 30
    for solver in ("cg", "chebyshev"):
        np.testing.assert_array_equal(mesa(**hard, solver=solver)[:30], mesa(**x, solver=solver)[:30])


def test_a_zero_query_asks_nothing():
    x = draw("mesa", np.random.default_rng(1), t=10)
    for solver, _ in MESA:
        assert np.all(mesa(0 * x["q"], x["k"], x["v"], solver=solver) == 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "lu"}, "solver must be one of exact, cg, chebyshev, got 'lu'"),
        ({"ridge": -1.0}, "ridge must be finite and >= 0"),
        ({"ridge": np.ones(4)}, "axis 'k' is 4 in ridge but 5 in k"),
        ({"ridge": 0.0, "solver": "chebyshev"}, "ridge must be > 0 for solver 'chebyshev'"),
        ({"iterations": 0, "solver": "cg"}, "iterations must be at least 1"),
        ({"tolerance": -1.0, "solver": "cg"}, "tolerance must be >= 0"),
        ({"beta": -np.ones(7)}, "beta must be finite and >= 0"),
        ({"log_decay": -np.ones((7, 5))}, "log_decay must have one number per step"),
    ],
)
def test_mesa_refuses_what_it_cannot_solve(options, words):
    with pytest.raises(ValueError, match=words):
        mesa(**draw("mesa", np.random.default_rng(0)), **options)


def test_mesa_is_scikit_learn_s_ridge():
    Ridge = pytest.importorskip("sklearn.linear_model").Ridge
    x = draw("mesa", np.random.default_rng(3), optional=("beta",), t=40)
    theirs = Ridge(alpha=0.6, fit_intercept=False, solver="cholesky")
    expected = theirs.fit(x["k"], x["v"], sample_weight=x["beta"]).predict(x["q"][-1:])[0]
    close(mesa(**x, ridge=0.6)[-1], expected, 1e-12)
    close(rls(**x, ridge=0.6)[-1], expected, 1e-12)


def test_without_decay_both_ridges_are_the_same():
    x = draw("mesa", np.random.default_rng(3), optional=("beta",), t=100)
    close(mesa(**x, ridge=0.4), rls(**x, ridge=0.4))


def test_primal_is_dual():
    x = draw("kernel_ridge", np.random.default_rng(3), t=100)
    close(kernel_ridge(**x, kernel="linear", ridge=0.4), mesa(**x, ridge=0.4))


KERNELS = {
    "gaussian": lambda x, y: np.exp(-np.sum((x[:, None] - y) ** 2, axis=-1) / (2 * 0.8**2)),
    "exponential": lambda x, y: np.exp(np.sum(x[:, None] * y, axis=-1) / 0.8**2),
    "linear": lambda x, y: np.sum(x[:, None] * y, axis=-1),
    "polynomial": lambda x, y: (1 + np.sum(x[:, None] * y, axis=-1)) ** 2,
}


def kernel_ridge_definition(q, k, v, kernel, ridge, causal=True):
    o = np.empty((len(q), v.shape[1]))
    for t in range(len(q)):
        n = t + 1 if causal else len(k)
        K = kernel(k[:n], k[:n]) + ridge * np.eye(n)
        o[t] = (kernel(k[:n], q[t : t + 1]).T @ np.linalg.solve(K, v[:n]))[0]
    return o


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("t", [1, 17, 64, 130])
def test_kernel_ridge_is_its_definition(kernel, causal, t):
    x = draw("kernel_ridge", np.random.default_rng(t), t=t)
    expected = kernel_ridge_definition(**x, kernel=KERNELS[kernel], ridge=0.3, causal=causal)
    close(kernel_ridge(**x, kernel=kernel, bandwidth=0.8, ridge=0.3, causal=causal), expected, 1e-12)


@pytest.mark.parametrize("cuts", [(0, 1, 3, 64, 64, 70), tuple(range(1, 90))])
def test_kernel_ridge_cut_anywhere_is_one_pass(cuts):
    x = draw("kernel_ridge", np.random.default_rng(0), t=90)
    mask = np.random.default_rng(1).uniform(size=90) < 0.7
    kept = {name: y[mask] for name, y in x.items()}
    o = kernel_ridge(**x, mask=mask)
    close(o[mask], kernel_ridge(**kept))
    pieces, state = [], None
    for low, high in zip((0, *cuts), (*cuts, 90), strict=True):
        piece = {name: y[low:high] for name, y in x.items()}
        answer, state = kernel_ridge(**piece, mask=mask[low:high], initial_state=state, output_final_state=True)
        pieces.append(answer)
    close(np.concatenate(pieces), o)
    np.testing.assert_array_equal(state.k, kept["k"])
    np.testing.assert_array_equal(state.position, np.arange(mask.sum()))
    every = kernel_ridge_definition(x["q"], kept["k"], kept["v"], KERNELS["gaussian"], 1.0, causal=False)
    close(kernel_ridge(**x, mask=mask, causal=False, bandwidth=0.8), every)


def test_kernel_ridge_is_scikit_learn_s():
    KernelRidge = pytest.importorskip("sklearn.kernel_ridge").KernelRidge
    process = pytest.importorskip("sklearn.gaussian_process")
    x = draw("kernel_ridge", np.random.default_rng(2), t=60)
    o = kernel_ridge(**x, bandwidth=0.8, ridge=0.3)
    theirs = KernelRidge(alpha=0.3, kernel="rbf", gamma=1 / (2 * 0.8**2)).fit(x["k"], x["v"])
    close(o[-1], theirs.predict(x["q"][-1:])[0], 1e-11)
    mean = process.GaussianProcessRegressor(process.kernels.RBF(0.8), alpha=0.3, optimizer=None).fit(x["k"], x["v"])
    close(o[-1], mean.predict(x["q"][-1:])[0], 1e-11)
    theirs = KernelRidge(alpha=0.3, kernel="polynomial", degree=2, gamma=1, coef0=1).fit(x["k"], x["v"])
    close(kernel_ridge(**x, kernel="polynomial", ridge=0.3)[-1], theirs.predict(x["q"][-1:])[0], 1e-11)


def test_a_kernel_may_be_any_function_of_two_sets_of_points():
    x = draw("kernel_ridge", np.random.default_rng(2), t=70, lead=(2, 1))
    mine = kernel_ridge(**x, kernel=lambda x, y: x @ np.swapaxes(y, -1, -2))
    np.testing.assert_array_equal(mine, kernel_ridge(**x, kernel="linear"))


def test_interpolation_needs_different_keys():
    x = draw("kernel_ridge", np.random.default_rng(2), t=12)
    close(kernel_ridge(x["k"], x["k"], x["v"], ridge=0), x["v"], 1e-9)
    x["k"][7] = x["k"][3]
    with pytest.raises(np.linalg.LinAlgError):
        kernel_ridge(**x, ridge=0)


def test_an_offset_of_all_keys_is_not_seen_by_the_gaussian_kernel():
    x = draw("kernel_ridge", np.random.default_rng(2), t=70)
    o = kernel_ridge(**x)
    close(kernel_ridge(x["q"] + 1024, x["k"] + 1024, x["v"]), o, 1e-11)


def test_a_bad_value_stays_in_its_channel():
    x = draw("kernel_ridge", np.random.default_rng(2), t=80)
    o = kernel_ridge(**x)
    x["v"][20, 1] = np.nan
    bad = kernel_ridge(**x)
    np.testing.assert_array_equal(bad[:, [0, 2]], o[:, [0, 2]])
    np.testing.assert_array_equal(np.isnan(bad[:, 1]), np.arange(80) >= 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": "cubic"}, "kernel must be one of .*, got 'cubic'"),
        ({"ridge": -1.0}, "ridge must be a finite number >= 0, got -1.0"),
        ({"bandwidth": 0.0}, "bandwidth must be a positive finite number, got 0.0"),
    ],
)
def test_kernel_ridge_refuses_options_without_meaning(options, words):
    with pytest.raises(ValueError, match=words):
        kernel_ridge(**draw("kernel_ridge", np.random.default_rng(0)), **options)


def kalman_definition(q, k, v, process_noise, measurement_noise, log_transition):
    """Every value vector stacked as one state of the textbook filter, in the information form."""
    S, P, o = np.zeros((k.shape[1], v.shape[1])), 2.0 * np.eye(k.shape[1]), []
    for t in range(len(k)):
        A = np.exp(log_transition[t])
        S, P = A * S, A**2 * P + process_noise[t] * np.eye(k.shape[1])
        information = np.linalg.inv(P) + np.outer(k[t], k[t]) / measurement_noise[t]
        S = np.linalg.solve(information, np.linalg.inv(P) @ S + np.outer(k[t], v[t]) / measurement_noise[t])
        P = np.linalg.inv(information)
        o.append(q[t] @ S)
    return np.array(o), P


def test_kalman_filter_is_the_textbook_s():
    optional = ("process_noise", "measurement_noise", "log_transition")
    x = draw("kalman_filter", np.random.default_rng(1), optional=optional, t=60)
    o, state = kalman_filter(**x, ridge=0.5, output_final_state=True)
    expected, P = kalman_definition(**x)
    close(o, expected, 1e-11)
    close(state.P, P, 1e-11)
    np.testing.assert_array_equal(state.P, state.P.T)


def test_without_drift_the_kalman_filter_is_recursive_least_squares():
    x = draw("kalman_filter", np.random.default_rng(1), optional=("measurement_noise",), t=60)
    noise = x.pop("measurement_noise")
    o, state = kalman_filter(**x, measurement_noise=noise, ridge=0.5, output_final_state=True)
    expected, after = rls(**x, beta=1 / noise, ridge=0.5, output_final_state=True)
    close(o, expected)
    close(state.P, after.P)


def test_forgetting_is_process_noise_in_proportion_to_the_covariance():
    """Qn = (1/g - 1) P: by hand for any size of key, as an argument where P is one number."""
    x = draw("kalman_filter", np.random.default_rng(1), t=30)
    o, final = rls(**x, log_decay=np.full(30, np.log(0.9)), output_final_state=True)
    _, state = kalman_filter(**{name: y[:0] for name, y in x.items()}, output_final_state=True)
    for t in range(30):
        state = state._replace(P=state.P + (1 / 0.9 - 1) * state.P)
        piece = {name: y[t : t + 1] for name, y in x.items()}
        answer, state = kalman_filter(**piece, initial_state=state, output_final_state=True)
        close(answer[0], o[t])
    close(state.P, final.P)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"process_noise": -0.1}, "process_noise must be >= 0"),
        ({"measurement_noise": np.zeros(7)}, "measurement_noise must be > 0"),
        ({"ridge": 0.0}, "ridge must be a positive"),
        ({"initial_state": (np.zeros((5, 3)), -np.eye(5))}, "P must have no negative eigenvalue"),
    ],
)
def test_kalman_filter_refuses_what_is_no_variance(options, words):
    with pytest.raises(ValueError, match=words):
        kalman_filter(**draw("kalman_filter", np.random.default_rng(0)), **options)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_affine_projection_is_its_definition(order, ridge):
    x = draw("affine_projection", np.random.default_rng(1), t=40)
    o, state = affine_projection(**x, order=order, ridge=ridge, output_final_state=True)
    S = np.zeros((5, 3))
    for t in range(40):
        K, V = x["k"][max(0, t - order + 1) : t + 1], x["v"][max(0, t - order + 1) : t + 1]
        S = S + x["beta"][t] * K.T @ np.linalg.solve(K @ K.T + ridge * np.eye(len(K)), V - K @ S)
        close(o[t], x["q"][t] @ S, 1e-11)
    np.testing.assert_array_equal(state.k, x["k"][40 - order + 1 :])


def test_affine_projection_recalls_its_window():
    x = draw("affine_projection", np.random.default_rng(1), t=40)
    _, state = affine_projection(x["q"], x["k"], x["v"], 1.0, order=3, output_final_state=True)
    close(x["k"][-3:] @ state.S, x["v"][-3:])
    close(state.k, x["k"][-2:])


def test_repeated_keys_get_the_fit_of_minimum_norm():
    x = draw("affine_projection", np.random.default_rng(1), t=6)
    x["k"][:], x["v"][:] = x["k"][0], np.arange(6)[:, None]
    o = affine_projection(x["k"], x["k"], x["v"], 1.0, order=2)
    close(o[1:], (x["v"][1:] + x["v"][:-1]) / 2)


def test_affine_projection_of_order_one_is_padasip_s_nlms():
    padasip = pytest.importorskip("padasip")
    x = draw("affine_projection", np.random.default_rng(8), t=90, v=1)
    theirs = padasip.filters.FilterNLMS(5, mu=0.7, eps=0.2, w="zeros")
    theirs.run(x["v"][:, 0], x["k"])
    _, state = affine_projection(x["q"], x["k"], x["v"], 0.7, order=1, ridge=0.2, output_final_state=True)
    close(state.S[:, 0], theirs.w)
    theirs = padasip.filters.FilterLMS(5, mu=0.1, w="zeros")
    theirs.run(x["v"][:, 0], x["k"])
    _, state = ttr_np.delta_rule(x["q"], x["k"], x["v"], 0.1, backend="numpy", output_final_state=True)
    close(state.S[:, 0], theirs.w)


@pytest.mark.parametrize(
    ("options", "words"), [({"order": 0}, "order must be at least 1"), ({"ridge": -1}, "ridge must be a finite number")]
)
def test_affine_projection_refuses_options_without_meaning(options, words):
    with pytest.raises(ValueError, match=words):
        affine_projection(**draw("affine_projection", np.random.default_rng(0)), **options)


@pytest.mark.parametrize("operator", ["kalman_filter", "affine_projection"])
def test_what_steps_one_by_one_may_be_cut_anywhere(operator):
    x = draw(operator, np.random.default_rng(0), t=40)
    mask = np.random.default_rng(1).uniform(size=40) < 0.7
    door = partial(getattr(ttr_np, operator), backend="numpy", output_final_state=True)
    o, final = door(**x, mask=mask)
    state, pieces = None, []
    for t in range(40):
        answer, state = door(**{name: y[t : t + 1] for name, y in x.items()}, mask=mask[t : t + 1], initial_state=state)
        pieces.append(answer)
    np.testing.assert_array_equal(np.concatenate(pieces), o)
    np.testing.assert_array_equal(state.S, final.S)
    close(o[mask], door(**{name: y[mask] for name, y in x.items()})[0])


def test_every_module_says_what_it_offers():
    for name in ("recursive_least_squares", "mesa", "kernel_ridge", "kalman_filter", "affine_projection"):
        module = import_module(f"ttr_np.solvers.{name}")
        assert callable(getattr(module, name)) and callable(module.recurrent)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("ridge", [1e-8, 1e-2])
def test_a_kalman_filter_that_knows_nothing_yet_keeps_the_digits_of_single_precision(backend, ridge):
    """Its covariance is a difference: in single precision it was lost beside what is not learnt yet."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((30, 5)).astype(np.float32), rng.standard_normal((30, 2)).astype(np.float32)
    wanted = ttr_np.recursive_least_squares(*(x.astype(float) for x in (k, k, v)), ridge=ridge)
    found, state = ttr_np.kalman_filter(k, k, v, ridge=ridge, backend=backend, output_final_state=True)
    assert found.dtype == state.S.dtype == state.P.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
