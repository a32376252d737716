"""Feature maps against the kernels they promise, and everything against large, zero and 16-bit inputs."""

import warnings
from math import comb

import numpy as np
import pytest
from scipy.special import expit, log_expit
from scipy.stats import norm

from ttr_np import features as f

POINTWISE = ["elu_plus_one", "gelu", "log_sigmoid", "relu", "sigmoid", "silu", "softplus"]
MAPS = {name: getattr(f, name) for name in POINTWISE} | {
    "cosformer_features": lambda x: f.cosformer_features(x, np.arange(len(x)), len(x)),
    "dpfp": lambda x: f.dpfp(x, 2),
    "favor_features": f.favor_features,
    "favor_features, rescaled": lambda x: f.favor_features(x, rescale=True),
    "hedgehog_features": f.hedgehog_features,
    "layer_norm": f.layer_norm,
    "normalize_l2": f.normalize_l2,
    "polynomial_sketch": f.polynomial_sketch,
    "random_fourier_features": f.random_fourier_features,
    "rebased_features": f.rebased_features,
    "rms_norm": f.rms_norm,
    "rotary": lambda x: f.rotary(x, np.arange(len(x))),
    "shift": f.shift,
    "symmetric_power": f.symmetric_power,
    "taylor_features": f.taylor_features,
}


def pairs(t=6, d=4, seed=0):
    """Queries and keys."""
    return np.random.default_rng(seed).standard_normal((2, t, d))


def kernel(phi, q, k):
    """All products of features."""
    return phi(q) @ phi(k).T


# Kernel identities


@pytest.mark.parametrize("power", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("d", [1, 3, 5])
def test_symmetric_power_is_the_power_of_the_product(power, d):
    q, k = pairs(d=d)
    assert f.symmetric_power(q, power).shape == (6, comb(d + power - 1, power))
    np.testing.assert_allclose(kernel(lambda x: f.symmetric_power(x, power), q, k), (q @ k.T) ** power, atol=1e-12)


@pytest.mark.parametrize("d", [1, 4])
def test_taylor_features_are_the_series_of_exp(d):
    q, k = pairs(d=d)
    s = q @ k.T / np.sqrt(d)
    assert f.taylor_features(q).shape == (6, 1 + d + d * (d + 1) // 2)
    np.testing.assert_allclose(kernel(f.taylor_features, q, k), 1 + s + s**2 / 2, rtol=1e-12)


def test_rebased_features_are_the_squared_product_of_normalised_vectors():
    q, k = pairs()
    weight, bias = np.random.default_rng(1).standard_normal((2, 4))

    def normal(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight + bias

    expected = (normal(q) @ normal(k).T) ** 2 / 4
    np.testing.assert_allclose(kernel(lambda x: f.rebased_features(x, weight, bias), q, k), expected, atol=1e-12)


def test_cosformer_features_weigh_by_the_cosine_of_the_lag():
    q, k = pairs()
    i = np.arange(6)
    lag = np.cos(np.pi / 2 * (i[:, None] - i) / 8)
    expected = np.maximum(q, 0) @ np.maximum(k, 0).T * lag
    np.testing.assert_allclose(kernel(lambda x: f.cosformer_features(x, i, 8), q, k), expected, atol=1e-12)
    with pytest.raises(ValueError, match=r"position must lie in \[0, length = 4\]; it is 5"):
        f.cosformer_features(q, i, 4)


def test_dpfp_is_the_products_of_neighbours():
    x = pairs()[0]
    r = np.maximum(np.concatenate([x, -x], axis=-1), 0)
    expected = [[row[j] * row[(j + i) % 8] for i in (1, 2, 3) for j in range(8)] for row in r]
    np.testing.assert_array_equal(f.dpfp(x, 3), expected)


def test_hedgehog_features_are_two_softmaxes_of_a_map():
    x = pairs()[0]
    W = np.random.default_rng(1).standard_normal((3, 4))
    e = [np.exp(sign * x @ W.T) for sign in (1, -1)]
    expected = np.concatenate([part / part.sum(-1, keepdims=True) for part in e], axis=-1)
    np.testing.assert_allclose(f.hedgehog_features(x, W), expected, rtol=1e-12)
    np.testing.assert_allclose(f.hedgehog_features(x), f.hedgehog_features(x, np.eye(4)), rtol=1e-12)


RANDOM = {
    "favor_features": lambda q, k: np.exp(q @ k.T / 2),
    "random_fourier_features": lambda q, k: np.exp(-np.sum((q[:, None] - k) ** 2, axis=-1) / 2),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_features_converge_to_their_kernel(name):
    q, k = 0.5 * pairs()
    errors = []
    for features in (100, 10_000):
        runs = [kernel(lambda x: getattr(f, name)(x, features=features, seed=s), q, k) for s in range(8)]  # noqa: B023
        errors.append(np.sqrt(np.mean((np.array(runs) - RANDOM[name](q, k)) ** 2)))
    assert errors[1] < 0.02 and 5 < errors[0] / errors[1] < 20  # the root of 100


def test_a_polynomial_sketch_converges_to_the_power_and_is_never_negative():
    q, k = pairs()
    errors = []
    for features in (32, 512):
        runs = [kernel(lambda x: f.polynomial_sketch(x, features=features, seed=s), q, k) for s in range(8)]  # noqa: B023
        assert np.min(runs) >= 0
        errors.append(np.sqrt(np.mean((np.array(runs) - (q @ k.T) ** 4) ** 2)))
    assert 3 < errors[0] / errors[1] < 8  # the root of 16, and more as few features err far
    np.testing.assert_allclose(kernel(lambda x: f.polynomial_sketch(x, 2), q, k), (q @ k.T) ** 2, rtol=1e-12)
    assert f.polynomial_sketch(q, 8, features=5).shape == (6, 15)
    for power in (0, 3, -2):
        with pytest.raises(ValueError, match=f"power must be 2, 4, 8, ..., got {power}"):
            f.polynomial_sketch(q, power)


@pytest.mark.parametrize("name", RANDOM)
def test_random_features_are_seeded(name):
    x = pairs()[0]
    phi = getattr(f, name)
    np.testing.assert_array_equal(phi(x, seed=3), phi(x, seed=np.random.default_rng(3)))
    np.testing.assert_array_equal(phi(x, seed=3), phi(x, f.orthogonal_gaussian(256, 4, 3)))
    assert np.any(phi(x, seed=3) != phi(x, seed=4))


def test_rescaled_favor_features_differ_by_a_factor_per_row():
    x = pairs()[0]
    ratio = f.favor_features(x, rescale=True) / f.favor_features(x)
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones(256), rtol=1e-12)
    assert np.all(f.favor_features(1e4 * x, rescale=True).max(axis=-1) == 1 / 16)


def test_random_directions_are_gaussian_and_orthogonal_in_blocks():
    W = f.orthogonal_gaussian(10, 4, 0)
    for block in (W[:4], W[4:8], W[8:]):
        products = block @ block.T
        np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-12)
    many = f.orthogonal_gaussian(40_000, 4, 1)
    np.testing.assert_allclose(many.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(np.cov(many.T), np.eye(4), atol=0.03)
    np.testing.assert_allclose((many**4).mean(axis=0), 3, atol=0.15)


# Pointwise functions and norms


def test_pointwise_functions_are_their_formulas():
    x = np.linspace(-30, 30, 301)
    np.testing.assert_allclose(f.sigmoid(x), expit(x), rtol=1e-14)
    np.testing.assert_allclose(f.log_sigmoid(x), log_expit(x), rtol=1e-14)
    np.testing.assert_allclose(f.softplus(x), np.logaddexp(0, x), rtol=1e-14)
    np.testing.assert_allclose(f.silu(x), x * expit(x), rtol=1e-14)
    np.testing.assert_allclose(f.elu_plus_one(x), np.where(x > 0, x + 1, np.exp(x)), rtol=1e-14)
    np.testing.assert_array_equal(f.relu(x), x * (x > 0))
    np.testing.assert_allclose(f.gelu(x), x * norm.cdf(x), atol=5e-4)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    np.testing.assert_allclose(f.gelu(x), x / 2 * (1 + np.tanh(inner)), atol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_normalised_vectors_have_unit_length(dtype, scale):
    x = (pairs()[0] * scale).astype(dtype)
    length = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(f.normalize_l2(x), x / np.maximum(length, 1e-6), rtol=1e-6)
    np.testing.assert_allclose(f.rms_norm(x), x / np.sqrt(length**2 / 4 + 1e-6), rtol=1e-6)


def test_a_length_below_eps_counts_as_eps():
    x = pairs()[0]
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(f.normalize_l2(x, eps=2.0), x / np.maximum(length, 2), rtol=1e-12)


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_functions_take_all_of_float32(name):
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(MAPS[name](np.array([-3e38, 3e38], np.float32))).all()


def test_layer_norm_removes_mean_and_scale():
    x = 3 * pairs()[0] + 5
    weight, bias = np.random.default_rng(1).standard_normal((2, 4))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(f.layer_norm(x), expected, rtol=1e-12)
    np.testing.assert_allclose(f.layer_norm(x, weight, bias), expected * weight + bias, rtol=1e-12)
    np.testing.assert_allclose(f.rms_norm(x, weight), f.rms_norm(x) * weight, rtol=1e-12)


# Positions


def test_rotary_products_depend_on_the_lag_only():
    q, k = pairs()
    near = f.rotary(q, np.arange(6)) @ f.rotary(k, np.arange(6)).T
    far = f.rotary(q, np.arange(6) + 1000) @ f.rotary(k, np.arange(6) + 1000).T
    np.testing.assert_allclose(near, far, atol=1e-11)
    np.testing.assert_array_equal(f.rotary(q, np.zeros(6)), q)


def test_rotary_turns_each_pair_by_its_angle():
    x = pairs()[0]
    z = x.view(np.complex128) * np.exp(1j * np.arange(6)[:, None] * np.array([1, 100.0**-0.5]))
    np.testing.assert_allclose(f.rotary(x, np.arange(6), base=100.0), z.view(np.float64), atol=1e-14)
    with pytest.raises(ValueError, match="even last axis to be turned in pairs, it has 3"):
        f.rotary(x[:, :3], np.arange(6))


def test_rotary_keeps_its_angle_at_far_positions_in_float32():
    x = pairs()[0].astype(np.float32)
    near = f.rotary(x.astype(np.float64), np.arange(6) + 1_000_001)
    np.testing.assert_allclose(f.rotary(x, np.arange(6) + 1_000_001), near, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 2, 6, 9])
def test_shift_moves_tokens_later(steps):
    x = pairs()[0]
    np.testing.assert_array_equal(f.shift(x, steps), np.concatenate([np.zeros((steps, 4)), x])[:6])
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        f.shift(x, -1)


def test_fixed_decays_are_those_of_their_papers():
    np.testing.assert_allclose(f.alibi_slopes(8), 0.5 ** np.arange(1, 9), rtol=1e-15)
    np.testing.assert_allclose(np.exp(f.retention_decays(3)), [31 / 32, 63 / 64, 127 / 128], rtol=1e-15)
    np.testing.assert_allclose(f.lightning_decays(4), [0, -2, -4, -6], rtol=1e-15)
    np.testing.assert_allclose(f.lightning_decays(4, 3, 6), [0, -1, -2, -3], rtol=1e-15)
    for decays in (f.alibi_slopes, f.retention_decays, f.lightning_decays):
        assert decays(0).shape == (0,)


# All of them


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, -1e4])
@pytest.mark.parametrize("name", MAPS)
def test_large_and_zero_inputs_are_finite_without_warnings(name, scale, dtype):
    x = (scale * np.random.default_rng(0).uniform(-1, 1, (5, 8))).astype(dtype)
    x[0] = scale
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise", divide="raise"):
        warnings.simplefilter("error")
        y = MAPS[name](x)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("name", ["normalize_l2", "rms_norm", "layer_norm", "relu", "silu", "gelu", "symmetric_power"])
def test_zero_stays_zero(name):
    assert not MAPS[name](np.zeros((2, 8))).any()


@pytest.mark.parametrize("name", MAPS)
def test_dtype_in_is_dtype_out(name):
    x = np.random.default_rng(0).standard_normal((5, 8))
    for dtype in (np.float16, np.float32, np.float64):
        y = MAPS[name](x.astype(dtype))
        assert y.dtype == dtype
        tolerance = {np.float16: 4e-3, np.float32: 2e-5, np.float64: 0}[dtype]
        np.testing.assert_allclose(y, MAPS[name](x.astype(dtype).astype(np.float64)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MAPS)
def test_leading_axes_are_free_and_may_be_empty(name):
    x = np.random.default_rng(0).standard_normal((5, 8))
    if name not in ("shift", "rotary", "cosformer_features"):
        assert MAPS[name](x[:0]).shape == (0,) + MAPS[name](x).shape[1:]
        np.testing.assert_allclose(MAPS[name](x[None, :, None])[0, :, 0], MAPS[name](x), rtol=1e-12, atol=1e-300)
    assert MAPS[name](x).shape[0] == 5


def test_16_bit_overflow_is_inf_without_a_warning():
    with np.errstate(over="raise"):
        assert np.isinf(f.symmetric_power(np.full(2, 1e3, np.float16))).all()


def test_every_public_function_is_tested_here():
    helpers = {"alibi_slopes", "lightning_decays", "orthogonal_gaussian", "retention_decays"}
    assert {name.split(",")[0] for name in MAPS} | helpers == set(f.__all__)
