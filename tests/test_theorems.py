"""Theorems between layers: no number here is pinned, every line is an identity of the field."""

import numpy as np
import pytest
from scipy.linalg import expm

import ttr_np
from ttr_np import features
from ttr_np.notation import draw

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def pairs():
    """Unit queries and keys, values, of one sequence."""
    rng = np.random.default_rng(0)
    q, k = (features.normalize_l2(rng.standard_normal((20, 4))) for _ in range(2))
    return q, k, rng.standard_normal((20, 3))


def equal(x, y, **tolerance):
    np.testing.assert_allclose(x, y, **(TIGHT | tolerance))


# ---- linear memories -------------------------------------------------------------------------------------------------


def test_linear_attention_is_exact_on_orthonormal_keys():
    k = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    v = np.random.default_rng(1).standard_normal((6, 2))
    _, state = ttr_np.linear_attention(k, k, v, output_final_state=True)
    equal(k @ state.S, v)


def test_zero_decay_is_no_decay(pairs):
    plain, gated = ttr_np.layers["linear_attention"](*pairs), ttr_np.layers["gla"](*pairs, log_decay=np.zeros((20, 4)))
    equal(plain, gated)


def test_one_gate_per_channel_that_agree_is_one_gate_per_step(pairs):
    gate = np.log(np.random.default_rng(1).uniform(0.5, 1, 20))
    per_channel = np.repeat(gate[:, None], 4, axis=1)
    equal(ttr_np.linear_attention(*pairs, log_decay=gate), ttr_np.linear_attention(*pairs, log_decay=per_channel))
    beta = np.full(20, 0.7)
    equal(ttr_np.delta_rule(*pairs, beta, log_decay=gate), ttr_np.delta_rule(*pairs, beta, log_decay=per_channel))


def test_normalised_linear_attention_is_a_mean(pairs):
    q, k, _ = pairs
    o = ttr_np.linear_attention(abs(q), abs(k), np.ones((20, 2)), normalize=True)
    equal(o, np.ones((20, 2)))


def test_delta_rule_is_a_dplr_memory():
    x = draw("delta_rule", np.random.default_rng(0), optional=("log_decay", "erase_key"), t=20)
    a = -np.exp(x["log_decay"]) * x["beta"][:, None] * x["erase_key"]
    v = x["beta"][:, None] * x["v"]
    as_dplr = ttr_np.dplr(x["q"], x["k"], v, a, x["k"], log_decay=x["log_decay"])
    equal(ttr_np.delta_rule(**x), as_dplr)


def test_gdn2_is_a_dplr_memory(pairs):
    q, k, v = pairs
    rng = np.random.default_rng(1)
    erase, write, decay = rng.uniform(size=(20, 4)), rng.uniform(size=(20, 3)), np.log(rng.uniform(0.5, 1, (20, 4)))
    layer = ttr_np.layers["gdn2"](q, k, v, log_decay=decay, erase=erase, write=write)
    equal(layer, ttr_np.dplr(q, k, write * v, -np.exp(decay) * erase * k, k, log_decay=decay))


def test_comba_is_a_dplr_memory(pairs):
    q, k, v = pairs
    rng = np.random.default_rng(1)
    beta, share, decay = rng.uniform(size=20), rng.uniform(size=20), np.log(rng.uniform(0.5, 1, 20))
    erased = share[:, None] * k
    layer = ttr_np.layers["comba"](q, k, v, beta=beta, erase=share, log_decay=decay, correction=0.3)
    a = -(np.exp(decay) * beta)[:, None] * erased
    equal(layer, ttr_np.dplr(q - 0.3 * erased, k, beta[:, None] * v, a, k, log_decay=decay))


def test_a_full_step_on_a_unit_key_replaces_the_old_value(pairs):
    _, k, v = pairs
    equal(ttr_np.delta_rule(k, k, v, np.ones(20)), v)


def test_a_double_step_reflects_and_keeps_the_norm():
    rng = np.random.default_rng(0)
    k, S = features.normalize_l2(rng.standard_normal((50, 4))), rng.standard_normal((4, 3))
    _, state = ttr_np.delta_rule(k, k, np.zeros((50, 3)), np.full(50, 2.0), initial_state=S, output_final_state=True)
    equal(np.linalg.norm(state.S), np.linalg.norm(S))


def test_no_step_leaves_every_bit_of_the_memory(pairs):
    S = np.random.default_rng(3).standard_normal((4, 3))
    _, state = ttr_np.delta_rule(*pairs, np.zeros(20), initial_state=S, output_final_state=True)
    assert np.array_equal(state.S, S)


def test_longhorn_is_stationary_for_its_implicit_loss(pairs):
    """(M - M_old) + beta k (M^T k - v)^T = 0 at the new memory."""
    _, k, v = pairs
    M, new = np.zeros((4, 3)), None
    for t in range(20):
        _, new = ttr_np.layers["longhorn"](
            k[t:][:1], k[t:][:1], v[t:][:1], beta=2.5, initial_state=M, output_final_state=True
        )
        equal(new.S - M + 2.5 * np.outer(k[t], k[t] @ new.S - v[t]), np.zeros((4, 3)))
        M = new.S


def test_longhorn_is_nlms_with_the_inverse_step_as_eps(pairs):
    longhorn = ttr_np.layers["longhorn"](*pairs, beta=2.5)
    equal(longhorn, ttr_np.layers["nlms"](*pairs, beta=1.0, eps=1 / 2.5))


def test_efla_is_the_matrix_exponential():
    """The gradient flow dM/ds = -k (M^T k - v)^T followed for a time beta, as one block exponential."""
    rng = np.random.default_rng(0)
    k, v, M = rng.standard_normal(4), rng.standard_normal(3), rng.standard_normal((4, 3))
    flow = np.block([[-np.outer(k, k), np.outer(k, v)], [np.zeros((3, 7))]])
    whole = expm(0.8 * flow)
    _, state = ttr_np.layers["efla"]([k], [k], [v], beta=0.8, initial_state=M, output_final_state=True)
    equal(state.S, whole[:4, :4] @ M + whole[:4, 4:])


def test_several_steps_on_one_pair_are_one_longer_step(pairs):
    """On a unit key, (1 - b)^2 of the error is left after two steps of b."""
    twice = ttr_np.layers["deltaproduct"](*pairs, beta=0.4)
    equal(twice, ttr_np.delta_rule(*pairs, np.full(20, 1 - 0.6**2)))


def test_log_linear_attention_with_equal_levels_is_linear_attention(pairs):
    equal(ttr_np.layers["log_linear_attention"](*pairs, levels=np.ones((20, 6))), ttr_np.linear_attention(*pairs))


# ---- stabilisers -----------------------------------------------------------------------------------------------------


def test_mlstm_stabiliser_changes_nothing_and_survives(pairs):
    rng = np.random.default_rng(1)
    gates = {"log_decay": np.log(rng.uniform(0.5, 1, 20)), "log_input": rng.uniform(-3, 3, 20)}
    layer = ttr_np.layers["mlstm"]
    equal(layer(*pairs, **gates), ttr_np.recall(layer, *pairs, **gates))
    assert np.all(np.isfinite(layer(*pairs, log_decay=-0.1, log_input=1e4 * rng.standard_normal(20))))


def test_rwkv4_stabiliser_changes_nothing_and_survives(pairs):
    q, k, _ = pairs
    v = np.random.default_rng(1).standard_normal((20, 4))
    layer = ttr_np.layers["rwkv4"]
    equal(layer(q, 3 * k, v), ttr_np.recall(layer, q, 3 * k, v))
    assert np.all(np.isfinite(layer(q, 1e4 * k, v)))


# ---- exact least squares ---------------------------------------------------------------------------------------------


def test_recursive_least_squares_is_weighted_ridge_with_a_ridge_that_decays(pairs):
    q, k, v = pairs
    rng = np.random.default_rng(1)
    decay, beta = np.log(rng.uniform(0.8, 1, 20)), rng.uniform(0.1, 2, 20)
    o = ttr_np.recursive_least_squares(q, k, v, log_decay=decay, beta=beta, ridge=0.3)
    for t in range(20):
        w = beta[: t + 1] * np.exp([decay[i + 1 : t + 1].sum() for i in range(t + 1)])
        H = k[: t + 1].T @ (w[:, None] * k[: t + 1]) + 0.3 * np.exp(decay[: t + 1].sum()) * np.eye(4)
        equal(o[t], q[t] @ np.linalg.solve(H, k[: t + 1].T @ (w[:, None] * v[: t + 1])), rtol=1e-9)


def test_ridge_is_kernel_ridge_with_a_linear_kernel(pairs):
    equal(ttr_np.mesa(*pairs, ridge=0.5), ttr_np.kernel_ridge(*pairs, kernel="linear", ridge=0.5))


def test_recursive_least_squares_without_forgetting_is_mesa(pairs):
    equal(ttr_np.recursive_least_squares(*pairs, ridge=0.5), ttr_np.mesa(*pairs, ridge=0.5))


def test_a_kalman_filter_without_drift_is_recursive_least_squares(pairs):
    kalman = ttr_np.layers["kalman"](*pairs, process_noise=0.0, measurement_noise=1.0, ridge=0.7)
    equal(kalman, ttr_np.recursive_least_squares(*pairs, ridge=0.7))


def test_the_last_estimate_of_least_squares_is_ordinary_least_squares(pairs):
    q, k, v = pairs
    equal(ttr_np.layers["least_squares"](*pairs)[-1], q[-1] @ np.linalg.lstsq(k, v, rcond=None)[0], rtol=1e-9)


def test_affine_projection_interpolates_the_newest_pairs(pairs):
    _, k, v = pairs
    _, state = ttr_np.affine_projection(k, k, v, np.ones(20), order=3, ridge=0.0, output_final_state=True)
    equal(k[-3:] @ state.S, v[-3:], rtol=1e-8)


def test_affine_projection_of_order_one_is_nlms(pairs):
    one = ttr_np.affine_projection(*pairs, np.full(20, 0.6), order=1, ridge=0.01)
    equal(one, ttr_np.layers["nlms"](*pairs, beta=0.6, eps=0.01))


def test_mesa_gradients_are_those_of_the_paper(pairs):
    """dv_s = sum over t >= s of z_ts e_t (x_t . k_s), with x_t = (H_t + ridge)^-1 q_t, against finite differences."""
    q, k, v = pairs
    e = np.random.default_rng(2).standard_normal(v.shape)
    decay = np.log(np.random.default_rng(3).uniform(0.8, 1, 20))
    z = np.array([[np.exp(decay[s + 1 : t + 1].sum()) * (s <= t) for s in range(20)] for t in range(20)])
    H = np.einsum("ts,si,sj->tij", z, k, k) + 0.5 * np.eye(4)
    G = np.einsum("ts,si,sv->tiv", z, k, v)
    x = np.linalg.solve(H, q[..., None])[..., 0]
    y = np.linalg.solve(H, np.einsum("tiv,tv->ti", G, e)[..., None])[..., 0]
    dv = np.einsum("ts,tv,ti,si->sv", z, e, x, k)
    score = x @ k.T * z
    dk = np.einsum("ts,ti,tv,sv->si", z, x, e, v) - score.T @ y - (y @ k.T * z).T @ x

    def loss(k, v, q):
        return np.sum(e * ttr_np.mesa(q, k, v, log_decay=decay, ridge=0.5))

    direction, step = np.random.default_rng(4), 1e-6
    for name, gradient in {"v": dv, "k": dk, "q": y}.items():
        arrays = {"k": k, "v": v, "q": q}
        d = direction.standard_normal(gradient.shape)
        up, down = (loss(**(arrays | {name: arrays[name] + s * step * d})) for s in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(np.sum(gradient * d), rel=1e-7)


# ---- nonparametric ---------------------------------------------------------------------------------------------------


def test_qknorm_softmax_is_gaussian_regression(pairs):
    """On unit vectors exp(g q.k) is exp(-g |q - k|^2 / 2) up to a factor."""
    gain = 6.0
    softmax = ttr_np.layers["qknorm"](*pairs, scale=gain)
    equal(softmax, ttr_np.layers["gaussian_attention"](*pairs, bandwidth=gain**-0.5))


def test_epanechnikov_is_a_shifted_relu(pairs):
    """1 - |q - k|^2 / h^2 = 2 / h^2 (q.k - (1 - h^2 / 2)) on unit vectors."""
    q, k, v = pairs
    h = 1.2
    weight = np.tril(np.maximum(q @ k.T - (1 - h**2 / 2), 0))
    total = weight.sum(axis=1, keepdims=True)
    expected = np.divide(weight @ v, total, out=np.zeros_like(v), where=total > 0)
    equal(ttr_np.layers["epanechnikov"](*pairs, bandwidth=h), expected, rtol=1e-9)


def test_attention_over_equal_logits_is_the_running_mean(pairs):
    q, k, v = pairs
    expected = np.cumsum(v, axis=0) / np.arange(1, 21)[:, None]
    equal(ttr_np.softmax_attention(np.zeros_like(q), k, v), expected)


def test_alibi_is_a_forgetting_gate_that_never_changes(pairs):
    slope = -0.3
    alibi = ttr_np.layers["alibi"](*pairs, log_decay=slope, scale=2.0)
    age = np.arange(20)[:, None] - np.arange(20)[None, :]
    logits = np.where(age >= 0, 2.0 * pairs[0] @ pairs[1].T + slope * age, -np.inf)
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    equal(alibi, share / share.sum(axis=1, keepdims=True) @ pairs[2])


def local_moments(q, k, v, w):
    p = w / w.sum()
    mean_k, mean_v = p @ k, p @ v
    return p, mean_k, mean_v, (p[:, None] * (k - mean_k)).T @ (k - mean_k), (p[:, None] * (v - mean_v)).T @ (k - mean_k)


def test_local_linear_attention_is_its_covariance_and_its_interpolation_form(pairs):
    q, k, v = pairs
    o = ttr_np.local_polynomial(q, k, v, degree=1, scale=3.0, ridge=0.01)
    for t in range(20):
        w = np.exp(3.0 * k[: t + 1] @ q[t])
        p, mean_k, mean_v, C_kk, C_vk = local_moments(q[t], k[: t + 1], v[: t + 1], w)
        W = np.linalg.solve(C_kk + 0.01 * np.eye(4), C_vk.T).T
        equal(o[t], mean_v + W @ (q[t] - mean_k), rtol=1e-8, atol=1e-10)
        equal(o[t], p @ (v[: t + 1] - k[: t + 1] @ W.T) + W @ q[t], rtol=1e-8, atol=1e-10)


def test_local_linear_attention_is_parallax_with_the_right_second_query(pairs):
    q, k, v = pairs
    r = np.empty_like(q)
    for t in range(20):
        _, mean_k, _, C_kk, _ = local_moments(q[t], k[: t + 1], v[: t + 1], np.exp(3.0 * k[: t + 1] @ q[t]))
        r[t] = np.linalg.solve(C_kk + 0.01 * np.eye(4), mean_k - q[t])
    parallax = ttr_np.layers["parallax"](q, k, v, scale=3.0, r=r)
    equal(parallax, ttr_np.local_polynomial(q, k, v, degree=1, scale=3.0, ridge=0.01), rtol=1e-8, atol=1e-10)


def test_a_stiff_local_polynomial_is_softmax(pairs):
    stiff = ttr_np.local_polynomial(*pairs, degree=1, scale=3.0, ridge=1e12)
    equal(stiff, ttr_np.softmax_attention(*pairs, scale=3.0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("degree", [1, 2])
def test_local_polynomials_reproduce_polynomials(degree):
    rng = np.random.default_rng(0)
    k, q = rng.standard_normal((60, 2)), rng.standard_normal((60, 2)) * 0.1
    v = 3 + k @ rng.standard_normal((2, 3))
    v = v + (k[:, :1] * k[:, 1:] if degree == 2 else 0)
    o = ttr_np.local_polynomial(q, k, v, degree=degree, kernel="gaussian", bandwidth=1.0, ridge=1e-12, causal=False)
    coefficients = np.linalg.lstsq(np.column_stack([np.ones(60), k, k[:, :1] * k[:, 1:]]), v, rcond=None)[0]
    truth = np.column_stack([np.ones(60), q, q[:, :1] * q[:, 1:]]) @ coefficients
    equal(o, truth, rtol=1e-6, atol=1e-7)


def test_symmetric_power_features_are_the_power_of_the_inner_product(pairs):
    q, k, _ = pairs
    for power in (2, 3, 4):
        phi = features.symmetric_power(q, power) @ features.symmetric_power(k, power).T
        equal(phi, (q @ k.T) ** power)


# ---- what the paper says about capacity ------------------------------------------------------------------------------


def test_recall_error_follows_the_closed_forms():
    """Unit keys on the sphere, values N(0, I): (t - 1) / d for linear attention, 1 - d / t for least squares."""
    d, repeats = 32, 40
    rng = np.random.default_rng(0)
    for t in (16, 64, 128):
        k = features.normalize_l2(rng.standard_normal((repeats, t, d)))
        v = rng.standard_normal((repeats, t, 8))
        _, linear = ttr_np.linear_attention(k, k, v, output_final_state=True)
        assert np.mean((k @ linear.S - v) ** 2) == pytest.approx((t - 1) / d, rel=0.06)
        S = np.linalg.pinv(k) @ v
        assert np.mean((k @ S - v) ** 2) == pytest.approx(max(0, 1 - d / t), abs=0.02)
