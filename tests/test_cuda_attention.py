"""Memories that keep their pairs, on both GPU backends, executed on the CPU: tiles, tensor cores, pieces and fits."""

import re
import warnings
from functools import partial

import cudaemu
import numpy as np
import pytest
from cudaemu import needed
from cudaemu.machines import on_cpu
from test_cuda_kernels import BARRIERS, GPU, by_the_runner
from test_operators import HALVES, half, same_bits

import ttr_np
from ttr_np.backends import first_able
from ttr_np.notation import CacheState, draw
from ttr_np.solvers.local_polynomial import KERNELS

pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:overflow encountered")]

every_backend = pytest.mark.parametrize("backend", GPU)
SOFTMAX = [
    {},
    {"causal": False},
    {"scale": -0.7},
    {"window": 1},
    {"window": 30},
    {"window": 30, "sinks": 3},
    {"window": 70, "sinks": 75},
]
SIGHT = [{}, {"causal": False}, {"window": 5}]


def arguments(operator, rng, t, k=3, v=3, lead=(2,), dtype=np.float64, gated=False):
    arrays = draw(operator, rng, lead=lead, t=t, k=k, v=v, dtype=dtype)
    if gated:
        arrays["log_decay"] = -rng.exponential(0.1, lead + (t,)).astype(np.result_type(dtype, np.float32))
    return arrays


def run(operator, backend, arrays, check=False, **options):
    with on_cpu(backend, check=check):
        return getattr(ttr_np, operator)(**arrays, **options, backend=backend)


def solved(operator, arrays, **options):
    """In double precision, and in that of the data."""
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    exact = getattr(ttr_np, operator)(**wide, **options, backend="numpy")
    return exact, getattr(ttr_np, operator)(**arrays, **options, backend="numpy")


def as_good(found, exact, plain, floor=4.0):
    """No worse than twice the solver in the same precision, or a few units in the last place."""
    eps = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(found.dtype.name) or np.finfo(found.dtype).eps
    error, others = (np.max(np.abs(x.astype(np.float64) - exact), initial=0) for x in (found, plain))
    assert error <= max(2 * others, floor * eps * np.max(np.abs(exact), initial=0)), (error, others)


# ---- softmax attention -----------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("options", SOFTMAX, ids=str)
def test_every_border_of_a_tile(backend, options):
    rng = np.random.default_rng(0)
    for t in (1, 8, 9, 15, 16, 17, 63, 64, 65, 129):
        gated = t % 2 == 1 and options.get("causal", True)
        arrays = arguments("softmax_attention", rng, t, dtype=np.float32, gated=gated)
        as_good(run("softmax_attention", backend, arrays, **options), *solved("softmax_attention", arrays, **options))


@every_backend
def test_sinks_forget_by_gates_between_them_and_the_window(backend):
    arrays = arguments("softmax_attention", np.random.default_rng(0), 400, dtype=np.float32)
    arrays["log_decay"] = np.full((2, 400), -0.01, np.float32)  # so weak that sinks are not forgotten at once
    options = {"window": 1, "sinks": 60}
    as_good(run("softmax_attention", backend, arrays, **options), *solved("softmax_attention", arrays, **options))


def drawn_call(rng, dtypes):
    """Random arguments and options of softmax attention, cut in two by a carried state as often as not."""
    causal, groups, t = bool(rng.integers(4)), int(rng.choice([1, 1, 3])), int(rng.integers(1, 100))
    options = {"causal": causal, "window": int(rng.integers(1, 80)) if causal and rng.integers(2) else None}
    options["sinks"] = int(rng.choice([0, 0, 2, 70])) if options["window"] else 0
    options["scale"] = float(rng.choice([0.1, 1.0, 30.0])) if rng.integers(2) else None
    dtype = dtypes[rng.integers(len(dtypes))]
    k, gated = int(rng.choice([1, 3, 33, 40])), bool(causal and rng.integers(2))
    arrays = arguments("softmax_attention", rng, t, k=k, lead=(2, 1), dtype=dtype, gated=gated)
    arrays["q"] = rng.standard_normal((2, groups, t, k)).astype(dtype)
    mask = rng.random((2, 1, t)) < rng.choice([0.1, 0.7]) if rng.integers(2) else np.ones((2, 1, t), bool)
    return arrays, options, mask, int(rng.integers(0, t + 1)) if rng.integers(2) else 0


def in_two(operator, backend, arrays, options, mask, at):
    """All steps, with a carried state at one of them."""
    outputs, state = [], None
    for here in [slice(0, at), slice(at, None)] if at else [slice(0, None)]:
        cut = {name: x[..., here] if name == "log_decay" else x[..., here, :] for name, x in arrays.items()}
        o, state = getattr(ttr_np, operator)(
            **cut, **options, mask=mask[..., here], initial_state=state, output_final_state=True, backend=backend
        )
        outputs.append(o)
    return np.concatenate(outputs, axis=-2)


@every_backend
@pytest.mark.parametrize("seed", range(10))
def test_softmax_attention_of_anything(backend, seed):
    rng = np.random.default_rng(seed)
    for _ in range(15):
        arrays, options, mask, at = drawn_call(rng, [np.float32, np.float64])
        with on_cpu(backend, check=False):
            found = in_two("softmax_attention", backend, arrays, options, mask, at)
        wide = {name: x.astype(np.float64) for name, x in arrays.items()}
        exact, plain = (in_two("softmax_attention", "numpy", x, options, mask, at) for x in (wide, arrays))
        as_good(found, exact, plain, floor=8 * max(options["scale"] or 1, 1))  # a logit of 30 has 5 digits less


def last_of_many(dtype, t=4096):
    """The last few queries of a long past: arguments, and the state before them."""
    rng = np.random.default_rng(0)
    arrays = arguments("softmax_attention", rng, t, k=16, v=5, lead=(1, 1), dtype=dtype, gated=True)
    arrays["v"] += dtype(3)
    before, after = ({n: x[..., s] if x.ndim == 3 else x[..., s, :] for n, x in arrays.items()} for s in CUT(t))
    state = ttr_np.softmax_attention(**before, output_final_state=True, backend="numpy")[1]
    return after, state


def CUT(t):
    return slice(0, t - 6), slice(t - 6, t)


@every_backend
@pytest.mark.parametrize("groups", [1, 5])
def test_float_keeps_its_digits_after_4096_tokens(backend, groups):
    arrays, state = last_of_many(np.float32)
    arrays["q"] = np.repeat(arrays["q"], groups, axis=1)
    exact, plain = solved("softmax_attention", arrays, initial_state=state)
    as_good(run("softmax_attention", backend, arrays, initial_state=state), exact, plain, floor=1)


def test_few_queries_of_a_long_past_take_two_launches():
    arrays, state = last_of_many(np.float64, t=1500)
    with on_cpu("cupy") as machine:
        o, after = ttr_np.softmax_attention(**arrays, initial_state=state, output_final_state=True, backend="cupy")
        assert machine.launches == ["softmax_decode", "softmax_merge"]
    wanted, end = ttr_np.softmax_attention(**arrays, initial_state=state, output_final_state=True, backend="numpy")
    np.testing.assert_allclose(o, wanted, rtol=1e-13)
    for x, y in zip(after, end, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 40}, {"window": 300, "sinks": 9}], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_few_queries_read_a_cache_where_it_lies(dtype, options):
    """Every number of queries, caches of any length, rows of 16 bytes and others, pieces that see nothing."""
    rng, real = np.random.default_rng(0), np.result_type(np.float32, dtype)
    for rows, cached, tokens, k, v in ((2, 1, 1, 8, 64), (3, 600, 3, 12, 130), (8, 33, 2, 5, 4)):
        gated = tokens > 1 and options.get("causal", True)
        arrays = arguments("softmax_attention", rng, tokens, k=k, v=v, lead=(2, 1), dtype=np.dtype(dtype), gated=gated)
        arrays["q"] = rng.standard_normal((2, rows // tokens, tokens, k)).astype(dtype)
        wide = draw("softmax_attention", rng, lead=(2, 1), t=2 * cached, k=k, v=v, dtype=real)
        left, place = -rng.exponential(1.0, (2, 1, cached)), np.arange(cached) - np.array([[[0]], [[cached // 2]]])
        place = np.maximum(place, -1)
        state = CacheState(wide["k"][..., ::2, :], wide["v"][..., :cached, :], left.astype(real), place)
        common = options | {"initial_state": state, "mask": rng.random((2, 1, tokens)) < 0.7}
        found = run("softmax_attention", "cupy", arrays, check=True, **common)
        as_good(found, *solved("softmax_attention", arrays, **common))


@every_backend
def test_logits_far_apart_and_first_tiles_unseen(backend):
    arrays = arguments("softmax_attention", np.random.default_rng(0), 100)
    arrays["k"] = arrays["k"] * 1e4
    mask = np.broadcast_to(np.arange(100) < 3, (2, 100))
    for options in ({}, {"mask": mask}, {"mask": ~mask}, {"mask": mask & ~mask}):
        exact = ttr_np.softmax_attention(**arrays, **options, backend="numpy")
        np.testing.assert_allclose(run("softmax_attention", backend, arrays, **options), exact, rtol=1e-9, atol=1e-12)
    assert not np.any(run("softmax_attention", backend, arrays, mask=mask & ~mask))


# ---- on tensor cores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("seed", range(6))
def test_halves_on_tensor_cores_are_as_good_as_the_solver(name, seed):
    rng = np.random.default_rng(seed)
    for _ in range(8):
        arrays, options, mask, _ = drawn_call(rng, [half(name)])
        common = options | {"mask": mask} if seed % 2 else options
        with on_cpu("cupy", check=False) as machine:
            found = ttr_np.softmax_attention(**arrays, **common, backend="cupy")
        rows = arrays["q"].shape[1] * arrays["q"].shape[2]
        assert machine.launches == ["softmax_tensor" if rows > 8 else "softmax_decode"]
        as_good(found, *solved("softmax_attention", arrays, **common), floor=2)


@pytest.mark.parametrize("options", [*SOFTMAX, {"scale": 0.0}, {"causal": False, "scale": -3e-39}], ids=str)
def test_every_border_of_a_tile_on_tensor_cores(options):
    rng = np.random.default_rng(0)
    for t in (9, 31, 32, 33, 64, 65, 127, 128, 129, 200):
        gated = t % 2 == 1 and options.get("causal", True)
        arrays = arguments("softmax_attention", rng, t, k=16, v=16, dtype=np.float16, gated=gated)
        found = run("softmax_attention", "cupy", arrays, **options)
        as_good(found, *solved("softmax_attention", arrays, **options), floor=2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"window": 30, "sinks": 3}], ids=str)
def test_what_comes_later_changes_no_bit_on_tensor_cores(options, gated):
    arrays = arguments("softmax_attention", np.random.default_rng(0), 300, k=16, v=16, dtype=np.float16, gated=gated)
    arrays["q"][..., 0], arrays["k"][..., 0] = 1000, 1000
    arrays["q"][:, 110:, 0] = 60000  # logits so far from zero that their thread rounds them, and theirs alone
    long = run("softmax_attention", "cupy", arrays, **options)
    for t in (9, 50, 64, 101, 130, 256):
        short = {name: x[:, :t] for name, x in arrays.items()}
        same_bits(run("softmax_attention", "cupy", short, **options), long[:, :t])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scale", [1e3, -1e6, 1e9, 1e12])
def test_logits_far_apart_on_tensor_cores(scale, gated):
    arrays = arguments("softmax_attention", np.random.default_rng(0), 150, k=16, v=16, dtype=np.float16, gated=gated)
    found = run("softmax_attention", "cupy", arrays, scale=scale)
    as_good(found, *solved("softmax_attention", arrays, scale=scale), floor=2)


@pytest.mark.parametrize("sizes", [(128, 150), (256, 16), (7, 1)], ids=str)
def test_heads_of_any_size_on_tensor_cores(sizes):
    k, v = sizes
    arrays = arguments("softmax_attention", np.random.default_rng(0), 70, k=k, v=v, dtype=np.float16)
    found = run("softmax_attention", "cupy", arrays, check=True)
    as_good(found, *solved("softmax_attention", arrays), floor=2)
    strided = {name: np.repeat(x, 2, axis=-1)[..., ::2] for name, x in arrays.items()}  # no copies of 16 bytes
    same_bits(run("softmax_attention", "cupy", strided, check=True), found)


@pytest.mark.parametrize("k, v, shared", [(900, 3, 227), (560, 128, 159)])  # the second but for what the text declares
def test_tiles_that_do_not_fit_go_without_tensor_cores(k, v, shared):
    arrays = arguments("softmax_attention", np.random.default_rng(0), 20, k=k, v=v, dtype=np.float16)
    with on_cpu("cupy", check=False) as machine:
        machine.shared = shared * 1024
        found = ttr_np.softmax_attention(**arrays, backend="cupy")
    assert machine.launches == ["softmax_attention"]
    as_good(found, *solved("softmax_attention", arrays))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_bad_number_reaches_what_it_must_on_tensor_cores(name, bad):
    arrays = arguments("softmax_attention", np.random.default_rng(0), 150, k=5, dtype=np.float16)
    spoilt = arrays | {name: arrays[name].copy()}
    spoilt[name][0, 70, 1] = bad
    with np.errstate(invalid="ignore"):
        clean, found = (run("softmax_attention", "cupy", x) for x in (arrays, spoilt))
        wanted = ttr_np.softmax_attention(**spoilt, backend="numpy")
    same_bits(found[:, :70], clean[:, :70])
    same_bits(found[1], clean[1])
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


@pytest.mark.parametrize("gate", [-np.inf, -1e30, -1e4])
def test_a_reset_on_tensor_cores_forgets_and_costs_the_gates_after_it_nothing(gate):
    arrays = arguments("softmax_attention", np.random.default_rng(0), 200, k=5, dtype=np.float16, gated=True)
    arrays["log_decay"][:, [20, 100]] = gate
    if gate < -1e29:
        arrays["v"][:, [3, 90]] = np.nan
    found, wanted = run("softmax_attention", "cupy", arrays), ttr_np.softmax_attention(**arrays, backend="numpy")
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    fresh = {name: x[:, 100:] for name, x in arrays.items()}
    as_good(found[:, 100:], *solved("softmax_attention", fresh), floor=2)


@pytest.mark.parametrize("memories", [7, 16, 17, 35])  # as many as start together, and more
def test_bits_on_tensor_cores_depend_on_no_neighbour_and_no_order(memories):
    sizes = {"k": 20, "v": 140 if memories == 17 else 20, "lead": (memories,)}
    arrays = arguments("softmax_attention", np.random.default_rng(0), 130, **sizes, dtype=np.float16)
    among = run("softmax_attention", "cupy", arrays)
    for i in {0, 6, memories // 2, memories - 1}:
        same_bits(run("softmax_attention", "cupy", {name: x[i] for name, x in arrays.items()}), among[i])
    for options in ({"order": "reverse"}, {"order": "random", "seed": 1}):
        with on_cpu("cupy", **options):
            same_bits(ttr_np.softmax_attention(**arrays, backend="cupy"), among)


# ---- local polynomials -----------------------------------------------------------------------------------------------

FITS = [(kernel, degree) for degree in range(3) for kernel in ("exponential", *KERNELS)]


SLOW = {("numba-cuda", 2)}  # five seconds to compile


@pytest.mark.parametrize(
    "backend, kernel, degree",
    [pytest.param(b, *fit, marks=pytest.mark.slow if (b, fit[1]) in SLOW else []) for b in GPU for fit in FITS],
)
def test_every_kernel_and_degree(backend, kernel, degree):
    rng = np.random.default_rng(0)
    shape = {} if kernel == "exponential" else {"bandwidth": 1.5}
    for t, ridge in ((1, 1e-6), (7, 0.0), (40, 0.1)):
        options = {"kernel": kernel, "degree": degree, "ridge": ridge, **shape, **SIGHT[t % 3]}
        arrays = arguments("local_polynomial", rng, t, gated=options.get("causal", True))
        if t == 40:
            options["mask"] = rng.random((2, t)) < 0.7
        found = run("local_polynomial", backend, arrays, **options)
        exact = ttr_np.local_polynomial(**arrays, **options, backend="numpy")
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-9 * max(1, np.max(np.abs(exact))))


@pytest.mark.parametrize("seed", range(8))
def test_local_polynomials_of_anything(seed):
    rng = np.random.default_rng(seed)
    for _ in range(8):
        arrays, sight, mask, at = drawn_call(rng, [np.float32])
        arrays = {n: x[..., :50] if n == "log_decay" else x[..., :50, :3] for n, x in arrays.items()}
        if arrays["k"].shape[-1] < 3:
            continue
        options = {"degree": int(rng.integers(3)), "ridge": float(rng.choice([0.01, 1.0]))}
        options |= {"causal": sight["causal"], "window": sight["window"]}
        mask, at = mask[..., :50], min(at, arrays["k"].shape[-2] - 1)
        with on_cpu("cupy", check=False):
            found = in_two("local_polynomial", "cupy", arrays, options, mask, at)
        wide = {name: x.astype(np.float64) for name, x in arrays.items()}
        exact, plain = (in_two("local_polynomial", "numpy", x, options, mask, at) for x in (wide, arrays))
        as_good(found, exact, plain, floor=2)


@every_backend
def test_too_few_or_collinear_neighbours_are_fitted_with_a_lower_degree(backend):
    arrays = arguments("local_polynomial", np.random.default_rng(0), 20)
    mean = ttr_np.local_polynomial(**arrays, degree=0, backend="numpy")
    for degree in (1, 2):
        found = run("local_polynomial", backend, arrays, degree=degree, ridge=0.0)
        np.testing.assert_allclose(found[:, :3], mean[:, :3], rtol=1e-12)  # four neighbours make a plane
        same = ttr_np.local_polynomial(**arrays, degree=degree, ridge=0.0, backend="numpy")
        np.testing.assert_allclose(found, same, rtol=0, atol=1e-6 * np.max(np.abs(same)))
    arrays["k"] = np.arange(20.0)[:, None] * np.array([1.0, 2.0, 3.0]) / 20 + np.zeros((2, 1, 1))
    found = run("local_polynomial", backend, arrays, degree=1, ridge=0.0)
    np.testing.assert_allclose(found, ttr_np.local_polynomial(**arrays, degree=0, backend="numpy"), rtol=1e-9)


@every_backend
def test_lines_of_many_channels(backend):
    rng = np.random.default_rng(0)
    for ridge, offset in ((1e-6, 0.0), (0.1, 100.0)):
        arrays = arguments("local_polynomial", rng, 40, k=60, v=5, dtype=np.float32, gated=True)
        arrays["k"] += np.float32(offset)
        options = {"ridge": ridge, "kernel": "gaussian", "bandwidth": 8.0}
        mask = rng.random((2, 40)) < 0.8
        found = run("local_polynomial", backend, arrays, check=ridge == 0.1, mask=mask, **options)
        as_good(found, *solved("local_polynomial", arrays, mask=mask, **options), floor=2)


LINES = [
    ({"k": 60, "v": 5, "dtype": np.float64}, {}, 40),
    ({"k": 64, "v": 70, "dtype": np.float16}, {"causal": False, "ridge": 1e-3}, 70),
    ({"k": 60, "v": 3, "gated": True}, {"kernel": "gaussian", "bandwidth": 3.0, "ridge": 0.1}, 90),
    ({"k": 66, "v": 1, "dtype": np.float32, "gated": True}, {"window": 20, "ridge": 1e-3}, 50),
    ({"k": 128, "v": 3, "dtype": np.float32}, {"scale": 1.0}, 24),
]


@pytest.mark.parametrize("sizes, options, t", LINES, ids=lambda x: str(x)[:30])
def test_lines_around_many_queries_share_tiles_of_keys(sizes, options, t):
    """Groups, masks, a carried state, several slabs of values, rows of a block that see little and that see much."""
    rng = np.random.default_rng(0)
    arrays = arguments("local_polynomial", rng, t, lead=(2, 1), **sizes)
    arrays["q"] = (rng.standard_normal((2, 2, t, sizes["k"])) / 3).astype(arrays["k"].dtype)
    mask, at = rng.random((2, 1, t)) < 0.8, t // 3 if options.get("causal", True) else 0
    with on_cpu("cupy") as machine:
        found = in_two("local_polynomial", "cupy", arrays, options, mask, at)
    assert set(machine.launches) == {"local_lines"}
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    exact, plain = (in_two("local_polynomial", "numpy", x, options, mask, at) for x in (wide, arrays))
    as_good(found, exact, plain, floor=1e6 if found.dtype == np.float64 else 1)  # ridge over moments: 1e-6


def test_lines_keep_their_digits_where_weights_look_at_few_of_many_keys():
    """Moments around a place that is not the mean would lose them, and steps of conjugate gradients not end."""
    arrays = arguments("local_polynomial", np.random.default_rng(0), 70, k=60, v=5, lead=(1,), dtype=np.float32)
    arrays["k"] += np.float32(30)
    found = run("local_polynomial", "cupy", arrays, scale=3.0, ridge=1e-6)
    as_good(found, *solved("local_polynomial", arrays, scale=3.0, ridge=1e-6), floor=1)


IN_FLOATS = [  # most of these queries see more pairs than keys have channels, or the ridge is large
    ({"k": 60, "v": 70}, {"ridge": 0.3}, 100),
    ({"k": 64, "v": 5}, {"causal": False, "ridge": 1e-2, "scale": -0.05}, 170),
    ({"k": 60, "v": 3, "lead": (1, 1)}, {"window": 40, "ridge": 1.0}, 90),
]


def marked(monkeypatch):
    """What the first launch of lines leaves undone, call by call."""
    from cuda_kernels.cupy_raw import local_polynomial as module

    found, launch = [], module.lines_in_floats

    def keep(*call):
        found.append(launch(*call))
        return found[-1]

    monkeypatch.setattr(module, "lines_in_floats", keep)
    return found


@pytest.mark.parametrize("sizes, options, t", IN_FLOATS, ids=lambda x: str(x)[:30])
def test_lines_are_as_good_where_single_precision_is_enough(monkeypatch, sizes, options, t):
    rng, left = np.random.default_rng(0), marked(monkeypatch)
    arrays = arguments("local_polynomial", rng, t, dtype=half("bfloat16"), **{"lead": (1,)} | sizes)
    options = options | {"mask": rng.random((1, 1, t)) < 0.8} if "window" in options else options
    if "window" in options:
        arrays["q"] = (rng.standard_normal((1, 2, t, sizes["k"])) / 3).astype(arrays["k"].dtype)
    with on_cpu("cupy") as machine:
        found = ttr_np.local_polynomial(**arrays, **options, backend="cupy")
    assert machine.launches == ["local_lines_tensor", "local_lines"] and np.mean(left[0]) < 0.5
    as_good(found, *solved("local_polynomial", arrays, **options), floor=1)


def test_lines_that_single_precision_is_not_enough_for_are_left_to_double(monkeypatch):
    """Few pairs, pairs beside a plane, keys with a common offset, logits far apart: all under a small ridge."""
    rng, left = np.random.default_rng(0), marked(monkeypatch)
    arrays = arguments("local_polynomial", rng, 72, k=64, v=3, lead=(4,), dtype=half("bfloat16"))
    arrays["k"][1, :, 5] *= half("bfloat16").type(1e-3)
    arrays["k"][2] += half("bfloat16").type(100)
    arrays["q"][3] *= half("bfloat16").type(2000)
    found = run("local_polynomial", "cupy", arrays, ridge=1e-5)
    assert np.all(left[0])
    as_good(found, *solved("local_polynomial", arrays, ridge=1e-5), floor=1)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_number_in_lines_of_single_precision_reaches_what_it_must(monkeypatch, name):
    left = marked(monkeypatch)
    arrays = arguments("local_polynomial", np.random.default_rng(0), 70, k=60, v=5, dtype=half("bfloat16"))
    spoilt = arrays | {name: arrays[name].copy()}
    spoilt[name][0, 40, 1] = np.nan
    clean, found = (run("local_polynomial", "cupy", x, ridge=1.0) for x in (arrays, spoilt))
    assert not np.any(left[0]) and np.any(left[1][0])
    same_bits(found[:, :40], clean[:, :40])
    same_bits(found[1], clean[1])
    wanted = ttr_np.local_polynomial(**spoilt, ridge=1.0, backend="numpy")
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_number_in_lines_reaches_what_it_must(name, bad):
    arrays = arguments("local_polynomial", np.random.default_rng(0), 50, k=60, v=5)
    spoilt = arrays | {name: arrays[name].copy()}
    spoilt[name][0, 20, 1] = bad
    clean, found = (run("local_polynomial", "cupy", x, ridge=0.1) for x in (arrays, spoilt))
    same_bits(found[:, :20], clean[:, :20])
    same_bits(found[1], clean[1])
    wanted = ttr_np.local_polynomial(**spoilt, ridge=0.1, backend="numpy")
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


def test_fits_of_arrays_on_the_device_stay_there(cupy):
    for k, degree in ((60, 1), (3, 2), (3, 0)):
        arrays = arguments("local_polynomial", np.random.default_rng(0), 40, k=k, v=5)
        there = {name: cupy.ndarray(x) for name, x in arrays.items()}
        found = ttr_np.local_polynomial(**there, degree=degree)
        assert isinstance(found, cupy.ndarray)
        same_bits(found.get(), ttr_np.local_polynomial(**arrays, degree=degree, backend="cupy"))


@every_backend
def test_conjugate_gradients_that_stop_early_say_so(backend, monkeypatch):
    from importlib import import_module

    module = import_module(f"cuda_kernels.{'cupy_raw' if backend == 'cupy' else 'numba_cuda'}.local_polynomial")
    arrays = arguments("local_polynomial", np.random.default_rng(0), 40, k=60, v=5, dtype=np.float32)
    kernel = {"kernel": "biweight", "bandwidth": 30.0}
    monkeypatch.setattr(module, "STEPS", 0)
    with pytest.warns(RuntimeWarning, match=r"stopped after 0 steps at a relative residual of 1\.0e\+00") as warned:
        found = run("local_polynomial", backend, arrays, **kernel)
    assert warned[0].filename == __file__  # the caller, not the backend
    wanted = ttr_np.local_polynomial(**arrays, **kernel, degree=0, backend="numpy")
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@every_backend
def test_what_a_backend_cannot_fit_is_refused(backend):
    q = np.zeros((2, 60))
    for options, words in (
        ({"kernel": np.cos, "bandwidth": 1.0}, "cannot compile the function given as kernel: it has exponential"),
        ({"degree": 2}, "has no room for the 1891 coefficients of degree 2 in 60 channels"),
        ({"ridge": 0.0}, "fits lines in 60 channels from their covariance, which needs ridge > 0"),
    ):
        with on_cpu(backend), pytest.raises(NotImplementedError, match=f"backend '{backend}' {words}"):
            ttr_np.local_polynomial(q, q, q, **options, backend=backend)
        with on_cpu(backend), pytest.warns(RuntimeWarning, match=words):
            assert first_able("local_polynomial", (backend, "numpy"), "cpu", {"q": q, **options}) == "numpy"
    with on_cpu(backend):
        assert first_able("local_polynomial", (backend, "numpy"), "cpu", {"q": q, "ridge": 1e-6}) == backend


@every_backend
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_number_in_a_fit_reaches_what_it_must(backend):
    for name in ("q", "k", "v"):
        arrays = arguments("local_polynomial", np.random.default_rng(0), 40)
        spoilt = arrays | {name: arrays[name].copy()}
        spoilt[name][0, 20, 1] = np.nan
        clean, found = (run("local_polynomial", backend, x, ridge=0.1) for x in (arrays, spoilt))
        same_bits(found[:, :20], clean[:, :20])
        same_bits(found[1], clean[1])
        wanted = ttr_np.local_polynomial(**spoilt, ridge=0.1, backend="numpy")
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


# ---- barriers --------------------------------------------------------------------------------------------------------

HALF = {"dtype": np.float16, "lead": (), "gated": True}
CACHE = CacheState(np.ones((600, 3)), np.ones((600, 3)), np.zeros(600), np.arange(600))
CALLS = {
    "tiles": ("softmax_attention", {"t": 70, "k": 40, "v": 70, "dtype": np.float32, "gated": True}, {}),
    "tensor cores": ("softmax_attention", HALF | {"t": 200, "k": 24, "v": 16}, {}),
    "tensor cores, whole tiles": ("softmax_attention", HALF | {"t": 200, "k": 32, "v": 16}, {}),
    "few queries": ("softmax_attention", {"t": 3, "lead": ()}, {"initial_state": CACHE}),
    "fit": ("local_polynomial", {"t": 40, "lead": ()}, {"degree": 2}),
    "line": ("local_polynomial", {"t": 40, "k": 60, "lead": ()}, {"kernel": "triweight", "bandwidth": 20.0}),
    "lines": ("local_polynomial", {"t": 60, "k": 60, "lead": (), "gated": True}, {}),
    "lines in floats": ("local_polynomial", {"t": 70, "k": 64, "lead": ()}, {"ridge": 0.1}),
}
# A lane that goes astray may leave an array, and one that does not hear what others vote for, the way of the others.
FAULTS = (cudaemu.RaceFault, cudaemu.UnsetFault, cudaemu.BoundsFault, cudaemu.BarrierFault)
PLACES = {
    "cupy": rf"{BARRIERS['cupy']}|__syncthreads_or(?=\()|finish_copies<\d>\(\);|close_copies\(\);",
    "numba-cuda": BARRIERS["numba-cuda"],
}


def barriers():
    for backend in GPU:
        for name in CALLS:
            if backend == "cupy" or not name.startswith(("tensor cores", "few queries", "lines")):
                slow = backend == "numba-cuda" and name != "tiles"  # seconds for each of many texts
                yield pytest.param(backend, name, marks=pytest.mark.slow if slow else [], id=f"{name}-{backend}")


@by_the_runner
@pytest.mark.parametrize("backend, name", list(barriers()))
def test_each_barrier_and_each_wait_is_needed(backend, name):
    operator, sizes, options = CALLS[name]
    sizes = sizes | {"dtype": half("bfloat16")} if name == "lines in floats" else sizes
    arrays = arguments(operator, np.random.default_rng(0), **sizes)
    if name.startswith("tensor cores"):
        arrays["v"][100, 1] = np.nan  # or there would be nothing to clean behind one of the barriers
    if name == "lines in floats":
        arrays["v"][66, 1] = np.nan  # or the first launch would leave nothing to the second
    with on_cpu(backend) as machine:
        call = partial(getattr(ttr_np, operator), **arrays, **options, backend=backend)
        texts = machine.switch(PLACES[backend])
        call()
        places = [(text, place) for text in texts for place in re.finditer(PLACES[backend], text)]
        own = [i for i, (text, place) in enumerate(places) if place.start() > beginning(text)]
        assert len(own) >= 3
        for machine.options["left_out"] in own:
            text, place = places[machine.options["left_out"]]
            with warnings.catch_warnings(), pytest.raises(FAULTS):
                warnings.simplefilter("ignore")
                call()
                pytest.fail(f"nobody misses {place[0]}{text[place.end() : place.end() + 60]}")


def beginning(text):
    """Where the headers of other kernels end; -1 in a text without headers."""
    return text.find("struct Pairs")
