"""Every compiled operator gives the same bits, alone or in a batch, on one thread or two, to many callers at once."""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from test_operators import CASES

import ttr_np
from ttr_np.notation import ARRAYS, draw

COMPILED = [case for case in CASES if case.backend == "numba"]
pytestmark = pytest.mark.filterwarnings("ignore:solver '.*' stopped after")
every_case = pytest.mark.parametrize("case", COMPILED, ids=str)
SIZES = {"t": 70, "k": 16, "v": 17, "d": 130, "n": 8}


def drawn(case, dtype=np.float32, count=7, **sizes):
    """Enough work for two threads, from keys that least squares can tell apart."""
    return case.draw(lead=(count,), dtype=dtype, **SIZES | sizes)


def answers(case, arrays):
    """Answers and state, all arrays of them."""
    o, state = case(arrays, state=True)
    return [o, *(x for x in state if x is not None)]


def one(arrays, i):
    """The i-th sequence."""
    return {name: x[i] if ARRAYS[name].axes.startswith("t") else x for name, x in arrays.items()}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = numba.get_num_threads()
    numba.set_num_threads(min(request.param, numba.config.NUMBA_NUM_THREADS))
    yield request.param
    numba.set_num_threads(before)


@every_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_alone_and_in_a_batch(case, dtype, threads):
    arrays = drawn(case, dtype)
    batch = answers(case, arrays)
    for i in (0, 3, 6):
        for whole, alone in zip(batch, answers(case, one(arrays, i)), strict=True):
            np.testing.assert_array_equal(whole[i], alone)


@pytest.mark.parametrize("case", [case for case in COMPILED if "v" in case.signature.arrays], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("t", [1, 37])
def test_alone_and_in_a_batch_of_many_small_memories(case, dtype, t):
    arrays = drawn(case, dtype, 21, t=t, v=2, k=7)
    batch = answers(case, arrays)
    for i in (0, 9, 20):
        for whole, alone in zip(batch, answers(case, one(arrays, i)), strict=True):
            np.testing.assert_array_equal(whole[i], alone)


@pytest.mark.parametrize("k", [1, 8, 16, 18, 32, 36])
@pytest.mark.parametrize("given", [(), ("erase_key",), ("log_decay",), ("erase_key", "log_decay")], ids=str)
def test_filters_of_every_size_are_the_solver_alone_and_in_a_batch(given, k):
    rng, dtype = np.random.default_rng(k), np.float64
    rows = {name: rng.standard_normal((21, 37, k + 3), dtype) / np.sqrt(k) for name in ("q", "k", "erase_key")}
    arrays = {name: x[..., :k] for name, x in rows.items() if name in ("q", "k", *given)}
    arrays |= {"v": rng.standard_normal((21, 37, 2), dtype), "beta": rng.uniform(size=(21, 37))}
    if "log_decay" in given:
        with np.errstate(divide="ignore"):
            arrays["log_decay"] = np.log(rng.integers(0, 5, (21, 37)) / 4)
    o, (S,) = ttr_np.delta_rule(**arrays, output_final_state=True, backend="numba")
    for i in (0, 15, 20):
        own = {name: x[i] for name, x in arrays.items()}
        alone, (state,) = ttr_np.delta_rule(**own, output_final_state=True, backend="numba")
        np.testing.assert_array_equal(alone, o[i])
        np.testing.assert_array_equal(state, S[i])
        np.testing.assert_allclose(alone, ttr_np.delta_rule(**own, backend="numpy"), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(np.float32, 1e-5, 1e-5), (np.float64, 1e-9, 1e-11)])
@pytest.mark.parametrize("k", [3, 8, 16, 18])
@pytest.mark.parametrize("given", [(), ("beta",), ("log_decay",)], ids=str)
def test_least_squares_filters_of_every_size_are_the_solver_alone_and_in_a_batch(given, k, dtype, rtol, atol):
    rng = np.random.default_rng(k)
    arrays = {"k": rng.standard_normal((21, 1, 37, k)), "q": rng.standard_normal((21, 2, 37, k))}
    arrays |= {"v": rng.standard_normal((21, 1, 37, 2))}
    arrays |= {name: rng.uniform(size=(21, 1, 37)) * (1 if name == "beta" else -0.1) for name in given}
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    o, state = ttr_np.recursive_least_squares(**arrays, output_final_state=True, backend="numba")
    for i in (0, 15, 20):
        own = {name: x[i] for name, x in arrays.items()}
        alone, after = ttr_np.recursive_least_squares(**own, output_final_state=True, backend="numba")
        for x, y in zip((alone, *after), (o, *state), strict=True):
            np.testing.assert_array_equal(x, y[i])
        exact = ttr_np.recursive_least_squares(**{name: x.astype(float) for name, x in own.items()}, backend="numpy")
        np.testing.assert_allclose(alone, exact, rtol=rtol, atol=atol)


@every_case
def test_on_any_number_of_threads_again_and_again(case):
    arrays, before, found = drawn(case), numba.get_num_threads(), []
    for count in (1, 2, 2):
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
        found.append(answers(case, arrays))
    numba.set_num_threads(before)
    for first, *others in zip(*found, strict=True):
        for other in others:
            np.testing.assert_array_equal(other, first)


@every_case
def test_many_callers_at_once(case):
    arrays = drawn(case)
    wanted = answers(case, arrays)
    with ThreadPoolExecutor(4) as callers:
        for found in callers.map(lambda _: answers(case, arrays), range(8)):
            for x, y in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(x, y)


ROWS = {
    "one number for all channels": lambda x: np.broadcast_to(x[..., :1], x.shape),
    "reversed in time": lambda x: x[..., ::-1, :],
    "every other": lambda x: x[..., ::2, :],
}


WEIGHTS = {"delta_rule": {"beta": 0.1}, "recursive_least_squares": {}, "forgetting": {"log_decay": -0.1}}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("k, v", [(6, 3), (8, 4), (8, 1)])
def test_rows_of_many_small_memories_may_lie_anywhere(k, v, weights, rows, dtype):
    name = "recursive_least_squares" if weights == "forgetting" else weights
    x = draw(name, np.random.default_rng(0), lead=(33,), t=74, k=k, v=v, dtype=dtype)
    x = {key: ROWS[rows](a) for key, a in x.items() if key in "qkv"}
    x |= {key: np.full(x["q"].shape[:-1], number, dtype) for key, number in WEIGHTS[weights].items()}
    operator, plain = getattr(ttr_np, name), {key: a.copy() for key, a in x.items()}
    o = operator(**plain, backend="numba")
    np.testing.assert_array_equal(operator(**x, backend="numba"), o)
    if v == 1:  # a new axis, which leads nowhere
        np.testing.assert_array_equal(operator(**x | {"v": x["v"][..., 0][..., None]}, backend="numba"), o)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("t", [1, 37])
@pytest.mark.parametrize("name", ["q", "k", "bonus"])
def test_one_number_for_all_channels_is_as_good_as_many_that_are_equal(name, t, dtype):
    rng = np.random.default_rng(0)
    x = draw("linear_attention", rng, optional=("log_decay", "bonus"), lead=(2,), t=t, k=70, dtype=dtype)
    x[name] = np.broadcast_to(x[name][..., :1], x[name].shape)
    o, copied = (ttr_np.linear_attention(**y, backend="numba") for y in (x, x | {name: x[name].copy()}))
    np.testing.assert_array_equal(o, copied)
