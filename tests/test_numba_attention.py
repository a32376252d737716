"""Compiled memories that keep their pairs equal their solvers: softmax attention and local polynomials."""

from importlib import import_module
from itertools import pairwise

import numpy as np
import pytest
from numba import get_num_threads, set_num_threads

import ttr_np
from ttr_np import backends
from ttr_np.notation import CacheState, draw
from ttr_np.numba_cpu import local_polynomial
from ttr_np.solvers.local_polynomial import KERNELS

SOFTMAX = [
    {},
    {"causal": False},
    {"scale": -0.7},
    {"window": 1},
    {"window": 30},
    {"window": 30, "sinks": 3},
    {"window": 120, "sinks": 130},
    {"gated": True},
    {"gated": True, "window": 50, "sinks": 2},
]
POLYNOMIAL = [
    {"degree": 0},
    {"degree": 0, "kernel": "gaussian", "bandwidth": 0.5},
    {},
    {"scale": 2.0, "ridge": 0.1, "window": 7},
    {"causal": False, "degree": 2, "ridge": 0.0, "kernel": "gaussian", "bandwidth": 1.0},
    {"degree": 2, "gated": True},
    {"degree": 3, "ridge": 1e-3, "kernel": "gaussian", "bandwidth": 2.0},
    *({"kernel": kernel, "bandwidth": 1.2, "degree": i % 3} for i, kernel in enumerate(KERNELS)),
    *({"kernel": kernel, "bandwidth": 0.9, "gated": True, "ridge": 0.0} for kernel in KERNELS),
]
CASES = [("softmax_attention", case) for case in SOFTMAX] + [("local_polynomial", case) for case in POLYNOMIAL]
FEW = [("softmax_attention", case) for case in SOFTMAX[-3:]]
FEW += [("local_polynomial", case) for case in (POLYNOMIAL[3], POLYNOMIAL[5], POLYNOMIAL[-1])]


def solver(name):
    return getattr(import_module(f"ttr_np.solvers.{name}"), name)


def compiled(name):
    return getattr(import_module(f"ttr_np.numba_cpu.{name}"), name)


def by_recurrence(name, *arguments, **options):
    """The solver with its token-by-token form as core."""
    module = import_module(f"ttr_np.solvers.{name}")
    keep, module.chunked = module.chunked, module.recurrent
    try:
        return solver(name)(*arguments, **options)
    finally:
        module.chunked = keep


def inputs(case, seed=0, lead=(2,), group=(), t=20, k=3, v=2, dtype=np.float64):
    """Arguments of a call: arrays, and options with a gate and all."""
    rng = np.random.default_rng(seed)
    options = dict(case)
    arrays = draw("softmax_attention", rng, lead=lead, t=t, k=k, v=v, dtype=dtype)
    arrays["q"] = (2 * rng.standard_normal(lead[: len(lead) - len(group)] + group + (t, k))).astype(dtype)
    if options.pop("gated", False):
        arrays["log_decay"] = -rng.exponential(0.1, lead + (t,)).astype(dtype)
    return arrays, options


def close(x, y, rtol=1e-10):
    """Equal relative to the scale of what is expected."""
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape and x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(initial=0), 1e-300))


def close_states(x, y):
    for one, other in zip(x, y, strict=True):
        np.testing.assert_array_equal(one == -np.inf, other == -np.inf)
        close(np.where(one == -np.inf, 0, one), np.where(other == -np.inf, 0, other), 1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("t", [0, 1, 2, 21])
@pytest.mark.parametrize("name, case", CASES)
def test_the_kernel_equals_the_recurrence(name, case, t, masked):
    arrays, options = inputs(case, t=t)
    if masked:
        options["mask"] = np.random.default_rng(1).random((2, t)) < 0.6
    before = {key: x.copy() for key, x in arrays.items()}
    o, state = compiled(name)(**arrays, **options, output_final_state=True)
    slow, slow_state = by_recurrence(name, **arrays, **options, output_final_state=True)
    close(o, slow)
    close_states(state, slow_state)
    for key, x in before.items():
        np.testing.assert_array_equal(arrays[key], x)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("t", [47, 48, 96, 97, 192, 193, 385])
@pytest.mark.parametrize("case", SOFTMAX)
def test_every_border_of_a_block(case, t, masked):
    arrays, options = inputs(case, lead=(2,), t=t)
    if masked:
        options["mask"] = np.random.default_rng(1).random((2, t)) < 0.6
    close(compiled("softmax_attention")(**arrays, **options), solver("softmax_attention")(**arrays, **options), 1e-12)


@pytest.mark.parametrize("cuts", [(0, 400), (0, 130, 400)], ids=str)
@pytest.mark.parametrize("window", [1, 10, 48])
def test_sinks_forget_by_gates_between_them_and_the_window(window, cuts):
    x, options = inputs({"window": window, "sinks": 60}, t=400, k=5, v=3)
    x["log_decay"] = np.full(x["k"].shape[:-1], -0.01)
    expected, pieces, state = solver("softmax_attention")(**x, **options), [], None
    for low, high in pairwise(cuts):
        own = {name: a[:, low:high] for name, a in x.items()}
        o, state = compiled("softmax_attention")(**own, **options, initial_state=state, output_final_state=True)
        pieces.append(o)
    close(np.concatenate(pieces, axis=1), expected)


@pytest.mark.parametrize("bad", [None, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("case", [{}, {"causal": False}, {"window": 90}, {"scale": -20.0}])
def test_one_token_meets_cached_pairs_where_they_lie(case, name, bad):
    """As the solver, to the digits and the last NaN; and what a query sees depends on no other in its group."""
    arrays, options = inputs(case, lead=(2, 1), group=(3,), t=201, k=5, v=3)
    before, token = ({n: x[..., s, :] for n, x in arrays.items()} for s in (slice(0, 200), slice(200, 201)))
    _, state = solver("softmax_attention")(**before, **options, output_final_state=True)
    if bad is not None:
        {"q": token["q"], "k": state.k, "v": state.v}[name][0, 0, 0 if name == "q" else 150 - 200, 1] = bad
    token["q"], options = np.ascontiguousarray(token["q"]), options | {"initial_state": state}
    found, wanted = (door("softmax_attention")(**token, **options) for door in (compiled, solver))
    np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-12)
    alone = compiled("softmax_attention")(**token | {"q": token["q"][:, 1:2]}, **options)
    np.testing.assert_array_equal(alone, found[:, 1:2])


@pytest.mark.parametrize("k, v", [(1, 1), (1, 7), (17, 1), (64, 64), (130, 33)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_heads_of_any_size(k, v, dtype):
    arrays, _ = inputs({"gated": True}, t=200, k=k, v=v, dtype=dtype)
    exact = solver("softmax_attention")(**{name: x.astype(np.float64) for name, x in arrays.items()})
    plain = np.abs(solver("softmax_attention")(**arrays) - exact).max()
    error = np.abs(compiled("softmax_attention")(**arrays) - exact).max()
    # A single channel is summed by NumPy in pairs, here pair by pair: a few units in the last place of answers near 1.
    assert error <= 2 * max(plain, 4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name, case", FEW)
def test_cut_anywhere(name, case, masked):
    arrays, options = inputs(case, t=150 if name == "softmax_attention" else 17)
    t = arrays["q"].shape[-2]
    mask = np.random.default_rng(1).random((2, t)) < 0.6 if masked else np.ones((2, t), bool)
    whole, end = compiled(name)(**arrays, **options, mask=mask, output_final_state=True)
    pieces, state = [], None
    for low, high in [(0, 0), (0, 1), (1, 9), (9, 9), (9, t - 1), (t - 1, t)]:
        cut = {key: x[..., low:high] if key == "log_decay" else x[..., low:high, :] for key, x in arrays.items()}
        o, state = compiled(name)(
            **cut, **options, mask=mask[:, low:high], initial_state=state, output_final_state=True
        )
        pieces.append(o)
    close(np.concatenate(pieces, axis=-2), whole)
    close_states(state, end)


@pytest.mark.parametrize("name, case", FEW)
def test_empty_slots_of_a_cache_are_not_seen(name, case):
    arrays, options = inputs(case, t=9)
    rng = np.random.default_rng(3)
    n = 8
    position = np.array([[-1, -1, 0, 1, 2, 5, 6, 7], [-1, 0, 1, 2, 3, 4, 5, 6]])
    left = np.where(position < 0, -np.inf, -rng.random((2, n)))
    state = CacheState(rng.standard_normal((2, n, 3)), rng.standard_normal((2, n, 2)), left, position)
    options["initial_state"] = state
    close(compiled(name)(**arrays, **options), solver(name)(**arrays, **options))


@pytest.mark.parametrize("t", [1, 3, 70])
@pytest.mark.parametrize("name, case", FEW)
def test_grouped_queries_share_their_memory(name, case, t):
    arrays, options = inputs(case, lead=(2, 1), group=(5,), t=t)
    o, state = compiled(name)(**arrays, **options, output_final_state=True)
    close(o, solver(name)(**arrays, **options))
    assert state.k.shape[:2] == (2, 1)


@pytest.mark.parametrize("name, case", FEW)
def test_any_strides(name, case):
    arrays, options = inputs(case, lead=(3, 4), t=30)
    expected = compiled(name)(**arrays, **options)
    mixed = {key: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, 2)), 2, 1) for key, x in arrays.items()}
    backwards = {key: x[::-1, ..., ::-1].copy()[::-1, ..., ::-1] for key, x in arrays.items()}
    spread = {key: np.repeat(x, 2, axis=-1)[..., ::2] for key, x in arrays.items()}
    for changed in (mixed, backwards, spread):
        np.testing.assert_array_equal(compiled(name)(**changed, **options), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("array", ["q", "k", "v", "log_decay"])
@pytest.mark.parametrize("name, case", [*FEW, CASES[0], CASES[3], ("local_polynomial", POLYNOMIAL[0])])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_number_reaches_what_it_must_and_no_more(name, case, array, bad):
    arrays, options = inputs(case, t=120 if name == "softmax_attention" else 13)
    if array not in arrays or (array == "log_decay" and bad == np.inf):
        pytest.skip("no such argument")
    arrays[array][(0, 6) if array == "log_decay" else (0, 6, 1)] = bad
    o, slow = compiled(name)(**arrays, **options), by_recurrence(name, **arrays, **options)
    np.testing.assert_array_equal(np.isnan(o), np.isnan(slow))
    close(np.nan_to_num(o), np.nan_to_num(slow), 1e-9)


@pytest.mark.parametrize("name, case", FEW)
def test_the_future_changes_no_bit_of_the_past(name, case):
    arrays, options = inputs(case, t=230)
    changed, _ = inputs(case, seed=9, t=230)
    n = 101
    for key, x in arrays.items():
        changed[key][:, :n] = x[:, :n]
        changed[key][1, n + 3] = -np.inf if key == "log_decay" else np.nan
    o, other = compiled(name)(**arrays, **options), compiled(name)(**changed, **options)
    np.testing.assert_array_equal(o[:, :n], other[:, :n])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name, case", FEW)
def test_a_sequence_alone_has_the_bits_of_one_in_a_batch(name, case, masked):
    arrays, options = inputs(case, lead=(5, 3), t=110, dtype=np.float32)
    mask = np.random.default_rng(1).random((5, 3, 110)) < (0.6 if masked else 2)
    batch = compiled(name)(**arrays, **options, mask=mask)
    threads = get_num_threads()
    set_num_threads(1)
    try:
        alone = compiled(name)(**{key: x[3, 1] for key, x in arrays.items()}, **options, mask=mask[3, 1])
        np.testing.assert_array_equal(compiled(name)(**arrays, **options, mask=mask), batch)
    finally:
        set_num_threads(threads)
    np.testing.assert_array_equal(alone, batch[3, 1])


@pytest.mark.parametrize("name, case", FEW)
def test_packed_sequences(name, case):
    arrays, options = inputs(case, t=40)
    options |= {"cu_seqlens": [0, 0, 7, 8, 40], "output_final_state": True}
    (o, state), (slow, slow_state) = compiled(name)(**arrays, **options), solver(name)(**arrays, **options)
    close(o, slow)
    close_states(state, slow_state)


@pytest.mark.parametrize("name", ["softmax_attention", "local_polynomial"])
def test_no_sequences_and_no_channels(name):
    for lead, k, v in [((0,), 3, 2), ((2, 0), 3, 2), ((2,), 3, 0), ((2,), 0 if name == "softmax_attention" else 1, 2)]:
        arrays, _ = inputs({}, lead=lead, t=5, k=k, v=v)
        close(compiled(name)(**arrays), solver(name)(**arrays))


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("ridge", [1e-12, 1e-9, 1e-6, 1e-3])
def test_a_line_from_moments_is_as_good_as_from_rows(ridge, scale):
    """Tokens with fewer neighbours than coefficients, and with more; the condition of the rows is one over the root."""
    x, _ = inputs({}, t=150, k=17, v=5)
    options = {"ridge": ridge, "scale": scale}
    close(compiled("local_polynomial")(**x, **options), solver("local_polynomial")(**x, **options), 1e-14 / ridge**0.5)
    single = {name: a.astype(np.float32) for name, a in x.items()}
    expected = solver("local_polynomial")(**single, **options)
    close(compiled("local_polynomial")(**single, **options), expected, np.finfo(np.float32).eps)


@pytest.mark.parametrize("ridge", [1e-11, 1e-9])
def test_a_line_along_channels_that_hardly_differ_keeps_single_precision(ridge):
    """Fewer neighbours than coefficients, and a steep slope: rounded moments alone would cost two digits."""
    rng, single = np.random.default_rng(0), np.float32
    q, k, slope = rng.standard_normal((40, 20)), rng.standard_normal((40, 20)), rng.standard_normal(40)
    q[:, 1], k[:, 1] = q[:, 0] + 2e-4 * slope[::-1], k[:, 0] + 2e-4 * slope
    x = {"q": q.astype(single), "k": k.astype(single), "v": np.stack([slope, slope + k[:, 2]], 1).astype(single)}
    options = {"ridge": ridge, "scale": 0.3}
    expected = solver("local_polynomial")(**x, **options)
    close(compiled("local_polynomial")(**x, **options), expected, np.finfo(single).eps)


def test_keys_in_columns_are_copied_once_however_often_they_repeat():
    x, _ = inputs({}, lead=(), t=30, k=13, v=4)
    columns = {name: np.asfortranarray(a) for name, a in x.items()}
    repeated = {name: np.broadcast_to(a, (1000, *a.shape)) for name, a in columns.items()}
    assert local_polynomial.in_rows(x["k"]) is x["k"]
    assert local_polynomial.in_rows(repeated["k"]).strides == (0, *x["k"].strides)
    np.testing.assert_array_equal(compiled("local_polynomial")(**columns), compiled("local_polynomial")(**x))
    np.testing.assert_array_equal(local_polynomial.in_rows(repeated["v"])[7], x["v"])


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_keys_that_leave_a_coefficient_undetermined_give_a_lower_degree(degree, rank):
    x, _ = inputs({}, t=90, k=12, v=2)
    base, rng = x["k"][..., :rank], np.random.default_rng(5)
    x["k"] = base @ rng.integers(-2, 3, (rank, 12)).astype(float)
    x["q"] = x["k"] * 0.5
    mean = solver("local_polynomial")(**x, degree=0)
    close(compiled("local_polynomial")(**x, degree=degree, ridge=0.0), mean)


@pytest.mark.parametrize("gate", [-1e4, -np.inf])
def test_a_strong_gate_costs_mild_ones_no_digit(gate):
    arrays, _ = inputs({"gated": True}, t=300)
    arrays["log_decay"][:, [20, 150, 250]] = gate
    close(compiled("softmax_attention")(**arrays), by_recurrence("softmax_attention", **arrays), 1e-12)


@pytest.mark.parametrize("reset", [10, 100, 200])
def test_a_full_reset_forgets_even_what_is_no_number(reset):
    arrays, _ = inputs({"gated": True}, t=300)
    arrays["k"][0, 6] = np.nan
    arrays["log_decay"][:, reset] = -np.inf
    o = compiled("softmax_attention")(**arrays)
    np.testing.assert_array_equal(np.isnan(o[0, :, 0]), (np.arange(300) >= 6) & (np.arange(300) < reset))


def test_one_decay_for_all_steps():
    arrays, _ = inputs({}, t=60)
    arrays["log_decay"] = -0.3
    close(compiled("softmax_attention")(**arrays), solver("softmax_attention")(**arrays), 1e-12)


def test_logits_far_apart_and_far_from_zero():
    arrays, _ = inputs({}, t=150)
    arrays["k"] *= 1000
    arrays["q"] += 5
    close(compiled("softmax_attention")(**arrays), solver("softmax_attention")(**arrays), 1e-10)


def test_a_function_as_kernel_is_left_to_numpy():
    arrays, _ = inputs({}, t=5)
    options = {"kernel": lambda u: np.exp(-u), "bandwidth": 1.0}
    with pytest.raises(NotImplementedError, match="cannot compile the function given as kernel"):
        ttr_np.local_polynomial(**arrays, **options, backend="numba")
    with pytest.raises(NotImplementedError, match="cannot compile the function given as kernel"):
        compiled("local_polynomial")(**arrays, **options)
    np.testing.assert_array_equal(
        ttr_np.local_polynomial(**arrays, **options), ttr_np.local_polynomial(**arrays, **options, backend="numpy")
    )
    with pytest.warns(RuntimeWarning, match="cannot compile"):
        ttr_np.local_polynomial(**arrays, **options, backend=("numba", "numpy"))


def test_auto_is_numba_where_it_can_compile():
    assert backends.resolve("local_polynomial", "auto", "cpu", {"kernel": "gaussian"}) == "numba"
    assert backends.resolve("softmax_attention", "auto", "cpu", {}) == "numba"
