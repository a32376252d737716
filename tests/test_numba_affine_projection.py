"""The compiled affine projection is the solver's, also where keys depend on each other."""

from functools import partial

import numba
import numpy as np
import pytest

import ttr_np
from ttr_np.notation import draw

ORDERS = (1, 2, 3, 8)
kernel = partial(ttr_np.affine_projection, backend="numba", output_final_state=True)
solver = partial(ttr_np.affine_projection, backend="numpy", output_final_state=True)
every_order = pytest.mark.parametrize("order", ORDERS)
every_ridge = pytest.mark.parametrize("ridge", [0.0, 0.3])


def inputs(lead=(3,), seed=0, t=70, k=16, v=3, dtype=np.float64):
    """More tokens than the scratch of a memory holds pairs, and a step that is stable."""
    rng = np.random.default_rng(seed)
    arrays = draw("affine_projection", rng, lead=lead, t=t, k=k, v=v, dtype=dtype)
    return arrays | {"beta": rng.uniform(0.2, 1, lead + (t,)).astype(dtype)}


def fields(result):
    o, state = result
    return [o, *state]


def same(result, wanted, tol=1e-12):
    """Equal relative to the largest number of each array, bad where bad."""
    for x, y in zip(fields(result), fields(wanted), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        scale = np.abs(y).max(initial=1e-300, where=np.isfinite(y))
        x, y = (np.where(np.isfinite(z), z, 0) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=tol * scale)


def same_bits(result, wanted):
    for x, y in zip(fields(result), fields(wanted), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("t", "k", "v"), [(0, 16, 3), (1, 16, 3), (2, 9, 1), (70, 16, 1), (70, 40, 9), (33, 130, 2)])
@every_ridge
@every_order
def test_it_is_the_solver(order, ridge, t, k, v, masked):
    x, options = inputs(t=t, k=k, v=v), {"order": order, "ridge": ridge}
    if masked:
        options["mask"] = np.random.default_rng(1).uniform(size=(3, t)) < 0.6
    begin = solver(**inputs(seed=7, t=12, k=k, v=v), order=order, ridge=ridge)[1]
    before = {name: y.copy() for name, y in (x | begin._asdict()).items()}
    given = {"q": x["q"], "k": x["k"], "v": x["v"], "beta": x["beta"], **options}
    same(kernel(**given), solver(**given))
    same(kernel(**given, initial_state=begin), solver(**given, initial_state=begin))
    for name, y in before.items():
        np.testing.assert_array_equal(({**x, **begin._asdict()})[name], y)


def dependent(kind, seed=5):
    """Arguments whose keys depend on each other, exactly; or not, as in most sequences."""
    x, rng = inputs(lead=(), t=80, seed=seed), np.random.default_rng(seed)
    if kind == "repeated":
        x["k"] = x["k"][rng.integers(0, 3, 80)]
    elif kind == "zero":
        x["k"] = np.where(rng.uniform(size=(80, 1)) < 0.5, 0, x["k"])
    elif kind == "all zero":
        x["k"] = np.zeros_like(x["k"])
    elif kind == "few channels":
        x["k"], x["q"] = (np.where(np.arange(16) < 2, y, 0) for y in (x["k"], x["q"]))
    elif kind == "multiples":
        x["k"] = x["k"][rng.integers(0, 3, 80)] * 2.0 ** rng.integers(-3, 4, (80, 1))
    elif kind == "of unlike size":
        x["k"] = x["k"] * 10.0 ** rng.choice([-9, 0], (80, 1))
    elif kind == "tiny":
        x["k"] = x["k"][rng.integers(0, 3, 80)] * 1e-90
    return x


KINDS = ["repeated", "zero", "all zero", "few channels", "multiples", "of unlike size"]


@pytest.mark.parametrize("kind", [*KINDS, "tiny"])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@every_order
def test_dependent_keys_get_the_fit_of_minimum_norm(order, ridge, kind):
    x = dependent(kind)
    same(kernel(**x, order=order, ridge=ridge), solver(**x, order=order, ridge=ridge), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_that_changes_least(kind):
    """Against the pseudo-inverse, token by token."""
    x, order, S = dependent(kind), 4, np.zeros((16, 3))
    o, state = kernel(**x, order=order)
    for t in range(80):
        K, V = x["k"][max(0, t - order + 1) : t + 1], x["v"][max(0, t - order + 1) : t + 1]
        change = K.T @ np.linalg.pinv(K @ K.T, rcond=order * np.finfo(float).eps, hermitian=True) @ (V - K @ S)
        S = S + x["beta"][t] * change
        np.testing.assert_allclose(o[t], x["q"][t] @ S, rtol=0, atol=1e-10 * max(1, np.abs(S).max()))
    np.testing.assert_array_equal(state.k, x["k"][-3:])


@pytest.mark.parametrize("kind", ["regular", *KINDS])
@every_ridge
def test_single_precision_is_as_good_as_the_solver(ridge, kind):
    """In the mean of many sequences: keys that are nearly parallel make any error large by chance."""
    single = [{name: x.astype(np.float32) for name, x in dependent(kind, seed).items()} for seed in range(40)]
    single = {name: np.stack([x[name] for x in single]) for name in single[0]}
    exact = solver(**{name: x.astype(np.float64) for name, x in single.items()}, ridge=ridge)[0]

    def error(o):
        assert o.dtype == np.float32
        least = 1e-7 * np.abs(exact).max(axis=(1, 2)) + 1e-30
        return np.log(np.maximum(np.abs(o - exact).max(axis=(1, 2)), least)).mean()

    assert error(kernel(**single, ridge=ridge)[0]) <= error(solver(**single, ridge=ridge)[0]) + np.log(2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "beta"])
@every_ridge
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_number_reaches_what_it_must_and_no_more(name, ridge, bad):
    x, clean = inputs(), kernel(**inputs(), order=3, ridge=ridge)
    x[name][(1, 41, 2)[: x[name].ndim]] = bad
    o, state = kernel(**x, order=3, ridge=ridge)
    same((o, state), solver(**x, order=3, ridge=ridge))
    for i in (0, 2):
        np.testing.assert_array_equal(o[i], clean[0][i])
    np.testing.assert_array_equal(o[1, :41], clean[0][1, :41])
    assert not np.isfinite(o[1, 41]).all()


@every_ridge
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_key_whose_square_is_infinite_spoils_its_own_memory(ridge):
    x, clean = inputs(), kernel(**inputs(), order=3, ridge=ridge)
    x["k"][1, 0] = 1e200  # nothing is known yet: its error is finite
    o, state = kernel(**x, order=3, ridge=ridge)
    same((o, state), solver(**x, order=3, ridge=ridge))
    assert np.isnan(o[1]).all() and np.array_equal(o[::2], clean[0][::2])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_masked_bad_number_is_none():
    x, mask = inputs(), np.random.default_rng(1).uniform(size=70) < 0.6
    wanted = kernel(**x, order=3, mask=mask)
    for name in ("k", "v", "beta"):
        x[name][:, ~mask] = np.nan
    same_bits(kernel(**x, order=3, mask=mask), wanted)


@every_ridge
@every_order
def test_cut_anywhere_every_bit_is_the_same(order, ridge):
    x, mask = inputs(t=120), np.random.default_rng(1).uniform(size=120) < 0.8
    whole, end = kernel(**x, order=order, ridge=ridge, mask=mask)
    pieces, state = [], None
    for low, high in [(0, 0), (0, 1), (1, 3), (3, 90), (90, 90), (90, 120)]:
        cut = {name: y[:, low:high] for name, y in x.items()}
        o, state = kernel(**cut, order=order, ridge=ridge, mask=mask[low:high], initial_state=state)
        pieces.append(o)
    same_bits((np.concatenate(pieces, axis=-2), state), (whole, end))


@every_order
def test_groups_of_queries_and_broadcast_axes(order):
    x = inputs(lead=(4, 1))
    x["q"] = np.random.default_rng(2).standard_normal((4, 3, 70, 16))
    x["v"] = np.random.default_rng(3).standard_normal((2, 1, 1, 70, 3))
    x["beta"] = x["beta"][0, 0]
    result = kernel(**x, order=order, ridge=0.1)
    assert result[0].shape == (2, 4, 3, 70, 3) and result[1].S.shape == (2, 4, 1, 16, 3)
    same(result, solver(**x, order=order, ridge=0.1))


def test_any_strides():
    x = inputs(lead=(2, 3))
    wanted = kernel(**x, order=3)
    for change in (
        lambda y: y[..., ::-1].copy()[..., ::-1],
        lambda y: y[::-1].copy()[::-1],
        lambda y: np.repeat(y, 2, axis=-1)[..., ::2],
        lambda y: np.ascontiguousarray(y.T).T,
    ):
        same_bits(kernel(**{name: change(y) for name, y in x.items()}, order=3), wanted)
    x["k"] = np.broadcast_to(x["k"][..., :1], x["k"].shape)
    same(kernel(**x, order=3), solver(**x, order=3), 1e-11)


@every_order
def test_packed_sequences(order):
    x = inputs(lead=(2,))
    options = {"order": order, "ridge": 0.1, "cu_seqlens": [0, 0, 7, 8, 70]}
    same(kernel(**x, **options), solver(**x, **options))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_ridge
def test_alone_in_a_batch_and_on_any_number_of_threads(dtype, ridge):
    x, before, found = inputs(lead=(300,), dtype=dtype), numba.get_num_threads(), []
    for count in (1, 2, 2):
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
        found.append(kernel(**x, order=3, ridge=ridge))
    numba.set_num_threads(before)
    for other in found[1:]:
        same_bits(other, found[0])
    for i in (0, 150, 299):
        alone = kernel(**{name: y[i] for name, y in x.items()}, order=3, ridge=ridge)
        same_bits(alone, (found[0][0][i], [y[i] for y in found[0][1]]))


@pytest.mark.parametrize(
    ("options", "words"), [({"order": 0}, "order must be at least 1"), ({"ridge": -1}, "ridge must be a finite number")]
)
def test_options_without_meaning_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        kernel(**inputs(), **options)
