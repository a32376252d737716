"""The compiled least-squares memories against their solvers."""

import warnings
from functools import partial
from importlib import import_module
from time import perf_counter

import numpy as np
import pytest

import ttr_np
from ttr_np.notation import draw
from ttr_np.numba_cpu.mesa import EXACT, serves
from ttr_np.solvers import recursive_least_squares as rls

CASES = {
    "rls": ("recursive_least_squares", (), {}),
    "rls weighted": ("recursive_least_squares", ("log_decay", "beta"), {"ridge": 0.3}),
    "mesa": ("mesa", ("beta",), {}),
    "mesa mild": ("mesa", ("mild", "beta"), {"ridge": 0.1}),
    "mesa decaying": ("mesa", ("log_decay", "beta"), {"ridge": 0.5}),
    "mesa singular": ("mesa", ("log_decay",), {"ridge": 0.0}),
    "mesa cg": ("mesa", ("beta",), {"solver": "cg"}),
    "mesa cg mild": ("mesa", ("mild",), {"solver": "cg", "ridge": 0.1}),
    "mesa cg decaying": ("mesa", ("log_decay",), {"solver": "cg"}),
    "mesa cg steps": ("mesa", ("log_decay", "beta"), {"solver": "cg", "iterations": 4, "tolerance": 0.0}),
    "mesa chebyshev": ("mesa", ("log_decay", "beta"), {"solver": "chebyshev"}),
    "kalman": ("kalman_filter", (), {}),
    "kalman drifting": ("kalman_filter", ("process_noise", "measurement_noise", "log_transition"), {"ridge": 0.3}),
    "gaussian": ("kernel_ridge", (), {"bandwidth": 0.7}),
    "linear": ("kernel_ridge", (), {"kernel": "linear", "ridge": 0.1}),
    "polynomial": ("kernel_ridge", (), {"kernel": "polynomial"}),
    "exponential": ("kernel_ridge", (), {"kernel": "exponential"}),
}
# What a solver may stop at is what two ways to it may differ by; so is what rounding does to a singular matrix.
LOOSE = {
    "mesa cg": 1e-10,
    "mesa cg mild": 1e-10,
    "mesa cg decaying": 1e-10,
    "mesa chebyshev": 1e-10,
    "mesa singular": 1e-8,
}
every_case = pytest.mark.parametrize("case", CASES)


def inputs(case, lead=(2, 3), dtype=np.float64, seed=0, **sizes):
    operator, optional, _ = CASES[case]
    rng = np.random.default_rng(seed)
    arrays = draw(operator, rng, optional=[o for o in optional if o != "mild"], lead=lead, per_channel=False, **sizes)
    if "mild" in optional:
        arrays["log_decay"] = rng.uniform(-0.02, 0, lead + arrays["q"].shape[-2:-1])
    return {name: x.astype(dtype) for name, x in arrays.items()}


def kernel(case, arrays, **options):
    operator, _, own = CASES[case]
    return getattr(import_module(f"ttr_np.numba_cpu.{operator}"), operator)(**arrays, **own | options)


def solver(case, arrays, form="recurrent", **options):
    """The NumPy solver in one of its forms."""
    operator, _, own = CASES[case]
    module = import_module(f"ttr_np.solvers.{operator}")
    if not hasattr(module, "chunked"):  # token by token in any case
        return getattr(module, operator)(**arrays, **own | options)
    form, module.chunked = module.chunked, getattr(module, form)
    try:
        return getattr(module, operator)(**arrays, **own | options)
    finally:
        module.chunked = form


CHUNKED = partial(solver, form="chunked")


def cut(arrays, low, high):
    return {name: x[..., low:high, :] if name in "qkv" else x[..., low:high] for name, x in arrays.items()}


def error(x, exact):
    return np.max(np.abs(x - exact), initial=0.0) / max(1.0, np.max(np.abs(exact), initial=0.0))


def close(case, x, exact):
    assert error(x, exact) < LOOSE.get(case, 1e-11)


@every_case
@pytest.mark.parametrize(
    "sizes", [{"t": 0}, {"t": 1}, {"t": 3, "k": 1, "v": 1}, {"t": 33}, {"t": 70, "k": 17, "v": 9}], ids=str
)
def test_the_kernel_is_the_recurrence(case, sizes):
    x = inputs(case, **sizes)
    (o, state), (exact, last) = (f(case, x, output_final_state=True) for f in (kernel, solver))
    assert o.shape == exact.shape and o.dtype == exact.dtype
    close(case, o, exact)
    for field, expected in zip(state, last, strict=True):
        assert field.shape == expected.shape and error(field, expected) < 1e-10


@every_case
def test_a_sequence_may_be_cut_anywhere_masked_and_packed(case):
    x = inputs(case, t=70)
    mask = np.random.default_rng(1).uniform(size=(2, 3, 70)) < 0.7
    whole = kernel(case, x, mask=mask)
    close(case, whole, solver(case, x, mask=mask))
    state, pieces = None, []
    for low, high in ((0, 0), (0, 1), (1, 40), (40, 41), (41, 70)):
        piece, state = kernel(
            case, cut(x, low, high), mask=mask[..., low:high], initial_state=state, output_final_state=True
        )
        pieces.append(piece)
    close(case, np.concatenate(pieces, axis=-2), whole)
    packed = kernel(case, x, mask=mask, cu_seqlens=[0, 0, 33, 34, 70])
    for low, high in ((0, 33), (33, 34), (34, 70)):
        assert np.array_equal(packed[..., low:high, :], kernel(case, cut(x, low, high), mask=mask[..., low:high]))


@every_case
def test_layout_company_and_repetition_change_no_bit(case):
    x = inputs(case, t=70, k=6)
    o = kernel(case, x)
    assert np.array_equal(o, kernel(case, x))
    for i in np.ndindex(2, 3):
        assert np.array_equal(o[i], kernel(case, {name: a[i] for name, a in x.items()}))
    views = dict(x)
    for name in "qkv":
        views[name] = np.empty((70, 2 * x[name].shape[-1], 3, 2))[::-1, ::2].transpose(3, 2, 0, 1)
        views[name][...] = x[name]
    assert np.array_equal(o, kernel(case, views))
    grouped = {name: a[:, :, None] for name, a in x.items()}
    grouped["q"] = np.stack([x["q"], 2 * x["q"]], axis=2)
    assert np.array_equal(kernel(case, grouped)[:, :, 0], o)


@every_case
def test_the_future_and_bad_numbers_reach_only_what_they_must(case):
    x = inputs(case, t=70, k=6)
    clean = kernel(case, x)
    later = {
        name: np.concatenate([a[..., :40, :], -2 * a[..., 40:, :]], -2) if name in "qkv" else a.copy()
        for name, a in x.items()
    }
    for name in set(x) - set("qkv"):
        later[name][..., 40:] *= 0.5
    assert np.array_equal(kernel(case, later)[..., :40, :], clean[..., :40, :])
    for name in "qkv":
        bad = {**x, name: x[name].copy()}
        bad[name][1, 0, 40, 2] = np.nan
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            o, expected = kernel(case, bad), solver(case, bad, form="chunked")
        assert np.array_equal(o[..., :40, :], clean[..., :40, :])
        assert np.array_equal(np.isnan(o), np.isnan(expected))
        assert np.array_equal(o[0], clean[0])


@pytest.mark.parametrize("case", sorted(set(CASES) - {"mesa singular"}))
def test_single_precision_is_as_good_as_the_solvers(case):
    """The chunked solver of recursive least squares factorises in double precision: the recursion is its measure."""
    errors = []
    for seed in range(4):
        x, single = inputs(case, t=120, k=9, seed=seed), inputs(case, t=120, k=9, seed=seed, dtype=np.float32)
        exact = solver(case, x)
        errors.append([error(kernel(case, single), exact), error(solver(case, single), exact)])
        assert kernel(case, single).dtype == np.float32
    ours, theirs = np.median(errors, axis=0)
    assert ours < 2 * theirs + 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_factor_a_chunk_serves_all_tokens_of_mild_gates(dtype, monkeypatch):
    """Double precision would answer as well, a hundred times slower: a wrong step would show nowhere else."""
    left_over = []
    monkeypatch.setattr(import_module("ttr_np.numba_cpu.mesa"), "answer_lost", lambda *rest: left_over.append(rest[-1]))
    x = inputs("mesa mild", t=200, k=24, v=5, dtype=dtype)
    answers, exact = kernel("mesa mild", x), solver("mesa mild", inputs("mesa mild", t=200, k=24, v=5))
    assert not left_over and error(answers, exact) < 100 * np.finfo(dtype).eps


@pytest.mark.parametrize("ridge", [1e-4, 1e-6])
@pytest.mark.parametrize("d", [8, 16])
def test_keys_of_low_rank_cost_single_precision_no_more_than_the_solver(d, ridge):
    errors = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        q, v = rng.standard_normal((200, d)), rng.standard_normal((200, 1))
        k = rng.standard_normal((200, 2)) @ rng.standard_normal((2, d))
        single = [x.astype(np.float32) for x in (q, k, v)]
        exact = ttr_np.recursive_least_squares(*(x.astype(np.float64) for x in single), ridge=ridge, backend="numpy")
        answers = [ttr_np.recursive_least_squares(*single, ridge=ridge, backend=name) for name in ("numba", "numpy")]
        errors.append([error(answer, exact) for answer in answers])
    ours, theirs = np.max(errors, axis=0)
    assert ours <= 2 * max(theirs, np.finfo(np.float32).eps)


@pytest.mark.parametrize("ridge", [1.0, 1e-3])
@pytest.mark.parametrize(("d", "w"), [(16, 1), (16, 9), (40, 2)])
def test_a_first_pair_that_says_more_than_the_ridge_costs_no_digits(d, w, ridge):
    rng = np.random.default_rng(d + w)
    shapes = {"q": (200, d), "k": (200, d), "v": (200, w)}
    x = {name: (rng.standard_normal(shape) / np.sqrt(d)).astype(np.float32) for name, shape in shapes.items()}
    exact, ours, solvers = (
        ttr_np.recursive_least_squares(
            **{name: a.astype(dtype) for name, a in x.items()}, ridge=ridge, backend=backend, output_final_state=True
        )
        for dtype, backend in ((np.float64, "numpy"), (np.float32, "numba"), (np.float32, "numpy"))
    )
    for one, other, right in ((ours[0], solvers[0], exact[0]), (ours[1].P, solvers[1].P, exact[1].P)):
        assert error(one, right) <= 2 * max(error(other, right), np.finfo(np.float32).eps)


def poorly_excited(lead, directions, outputs=2, t=63, size=16):
    """Single precision that forgets: keys in few directions, none of them an axis; one is that of equal channels."""
    rng = np.random.default_rng(directions)
    axes = np.ones((1, size)) if directions == 1 else rng.standard_normal((directions, size)) / np.sqrt(size)
    k = rng.standard_normal((*lead, t, directions)) @ axes
    v = k @ rng.standard_normal((size, outputs)) + 0.1 * rng.standard_normal((*lead, t, outputs))
    x = {"q": k, "k": k, "v": v, "log_decay": np.full((*lead, t), -0.16)}
    return {name: a.astype(np.float32) for name, a in x.items()}


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("lead", [(), (8,), (19,), (21,)], ids=str)  # alone, whole vectors, and with what they leave
def test_forgetting_where_nothing_is_learnt_costs_single_precision_no_digits(lead, directions):
    x = poorly_excited(lead, directions)
    exact = solver("rls", {name: a.astype(float) for name, a in x.items()}, ridge=0.1)
    ours, theirs = (f("rls", x, ridge=0.1) for f in (kernel, CHUNKED))
    assert error(ours, exact) <= 2 * error(theirs, exact) + 4 * np.finfo(np.float32).eps
    for i in np.ndindex(lead):
        assert np.array_equal(ours[i], kernel("rls", {name: a[i] for name, a in x.items()}, ridge=0.1))


@pytest.mark.parametrize("directions", [1, 3])
def test_a_stream_that_forgets_in_single_precision_rounds_no_more_than_the_solver(directions):
    """Every token hands P on in single precision."""
    x = poorly_excited((19,), directions)
    exact = solver("rls", {name: a.astype(float) for name, a in x.items()}, ridge=0.1)
    own = {name: a.shape[:1] + a.shape[2:] for name, a in x.items()}
    found = []
    for backend in ("numba", "numpy"):
        step = ttr_np.Stream("recursive_least_squares", **own, ridge=0.1, dtype=np.float32, backend=backend)
        o = [step(**{name: a[:, t] for name, a in x.items()}).copy() for t in range(63)]
        found.append(per_sequence(np.stack(o, axis=1), exact))
    assert found[0] <= 2 * found[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gate", [-0.1, -3.0, -70.0])
def test_recursive_least_squares_survives_wind_up(dtype, gate):
    """Directions that no key excites are forgotten for thousands of steps; then all are excited again."""
    rng = np.random.default_rng(0)
    k = np.zeros((3000, 20), dtype)
    k[:, 0] = rng.standard_normal(3000)
    k[-60:] = rng.standard_normal((60, 20))
    v = k @ rng.standard_normal((20, 2)).astype(dtype)
    arrays = {"q": k, "k": k, "v": v, "log_decay": np.full(3000, gate, dtype)}
    o, (S, P) = kernel("rls", arrays, output_final_state=True)
    assert np.isfinite(o).all() and np.isfinite(S).all()
    assert np.array_equal(P, P.T)
    assert np.linalg.eigvalsh(P.astype(float)).min() > 0
    assert error(o, solver("rls", {n: a.astype(float) for n, a in arrays.items()})) < (
        2e-3 if dtype == np.float32 else 1e-6
    )


def test_recursive_least_squares_refuses_what_the_solver_refuses():
    x = inputs("rls", lead=(), t=5, k=3)
    for P, words in ((np.diag([1.0, 1.0, -1.0]), "positive definite"), (np.eye(3) + np.eye(3, k=1), "symmetric")):
        with pytest.raises(ValueError, match=words):
            kernel("rls", x, initial_state=(np.zeros((3, 3)), P))
    with pytest.raises(ValueError, match="forgetting factor"):
        kernel("rls", {**x, "log_decay": np.full(5, -np.inf)})


@pytest.mark.parametrize("case", ["rls", "kalman", "kalman drifting"])
def test_nothing_memorised_leaves_the_state_bit_for_bit(case):
    x = inputs(case, t=40, k=20)
    _, state = kernel(case, x, output_final_state=True)
    _, same = kernel(case, x, initial_state=state, mask=np.zeros((2, 3, 40), bool), output_final_state=True)
    assert all(np.array_equal(a, b) for a, b in zip(state, same, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("given", [(), ("log_decay",)], ids=str)
def test_a_memory_that_learns_nothing_keeps_its_covariance_beside_others_that_do(given, dtype):
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal((21, 40, size)).astype(dtype) for name, size in (("q", 9), ("k", 9), ("v", 2))}
    x |= {name: np.full((21, 40), -0.1, dtype) for name in given}
    _, state = kernel("rls", x, output_final_state=True)
    mask = np.arange(40) > 20 * (np.arange(21) % 3)[:, None]  # of every three the last one learns nothing
    _, after = kernel("rls", x, initial_state=state, mask=mask, output_final_state=True)
    for i in range(21):
        same = np.array_equal(after.P[i], state.P[i])
        assert same == (i % 3 == 2)


def drifting(rng, axes, drift, noise, count=16, t=4096, size=12):
    """Values that a filter in single precision follows for long, from random keys or from one axis at a time."""
    k = np.eye(size)[rng.integers(0, size, (count, t))] if axes else rng.standard_normal((count, t, size))
    v = k @ rng.standard_normal((count, size, 3)) + np.sqrt(noise) * rng.standard_normal((count, t, 3))
    x = {"q": rng.standard_normal(k.shape), "k": k, "v": v}
    x |= {"process_noise": np.full(t, drift), "measurement_noise": np.full(t, noise)}
    return {name: a.astype(np.float32) for name, a in x.items()}


@pytest.mark.parametrize(
    ("axes", "ridge", "drift", "noise"),
    [
        (False, 1.0, 0.0, 1.0),
        (False, 1.0, 1e-4, 0.1),
        (False, 1.0, 1e-12, 1e-6),
        (True, 1.0, 1e-12, 1e-6),
        (True, 1e-8, 1e-12, 1.0),  # a variance beside which that of the measurement is lost in rounding
    ],
)
def test_a_long_filter_is_as_good_as_the_solver_and_keeps_its_covariance(axes, ridge, drift, noise):
    x, found = drifting(np.random.default_rng(0), axes, drift, noise), []
    options = {"ridge": ridge, "output_final_state": True}
    exact, state = solver("kalman", {name: a.astype(float) for name, a in x.items()}, **options)
    least = np.linalg.eigvalsh(state.P)[:, 0]
    for o, (S, P) in (f("kalman", x, **options) for f in (kernel, solver)):
        pairs = ((o, exact), (S, state.S), (P, state.P))
        found.append([np.sqrt(np.mean(np.square(a - b)) / np.mean(np.square(b))) for a, b in pairs])
        assert np.array_equal(P, np.swapaxes(P, -1, -2))
        assert np.all(np.linalg.eigvalsh(P.astype(float))[:, 0] > 0.9 * least)
    assert np.all(np.array(found[0]) <= 2 * np.array(found[1]))


def test_a_kalman_filter_refuses_the_covariances_that_the_solver_refuses():
    x = inputs("kalman", lead=(2,), t=5, k=3)
    several, lean = np.stack([np.diag([1.0, 0.0, 2.0]), np.diag([1.0, 1.0, -1.0])]), np.eye(3) + np.eye(3, k=1)
    for P, words in ((several, "no negative eigenvalue; it has -1.0"), (lean, "P must be symmetric")):
        for f in (kernel, solver):
            with pytest.raises(ValueError, match=words):
                f("kalman", x, initial_state=(np.zeros((3, 3)), P))
    singular = {"initial_state": (np.ones((3, 3)), several[0]), "output_final_state": True}
    (o, state), (exact, last) = (f("kalman", x, **singular) for f in (kernel, solver))
    for field, expected in zip((o, *state), (exact, *last), strict=True):
        close("kalman", field, expected)


@pytest.mark.parametrize("name", ["process_noise", "measurement_noise"])
def test_a_kalman_filter_refuses_what_is_no_variance(name):
    x = inputs("kalman drifting", t=5)
    x[name][1, 0, 2] = -1
    for f in (kernel, solver):
        with pytest.raises(ValueError, match=name + r" must be .*; it is -1.0 at \(1, 0, 2\)"):
            f("kalman drifting", x)
        f("kalman drifting", x, mask=np.arange(5) != 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_noise_and_a_covariance_that_are_no_numbers_stay_in_their_own_sequence(bad):
    x = inputs("kalman drifting", t=20)
    start, common = kernel("kalman drifting", x, output_final_state=True)[1], {"output_final_state": True}
    clean = kernel("kalman drifting", x, initial_state=start)
    for name in ("process_noise", "measurement_noise", "log_transition", "P"):
        given, state = {key: a.copy() for key, a in x.items()}, type(start)(*(a.copy() for a in start))
        (given | {"P": state.P})[name][1, 0, 2] = bad
        with np.errstate(all="ignore"):
            found = [f("kalman drifting", given, initial_state=state, **common) for f in (kernel, solver)]
        for one, other in zip((found[0][0], *found[0][1]), (found[1][0], *found[1][1]), strict=True):
            assert np.array_equal(np.isnan(one), np.isnan(other)), name
        other = np.delete(found[0][0].reshape(6, 20, -1), 3, axis=0)
        assert np.array_equal(other, np.delete(clean.reshape(6, 20, -1), 3, axis=0))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 9])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_infinite_value_or_memory_is_no_less_a_number_for_any_size_of_key(d):
    """What fills up the rows of a memory is no part of it: zero there times infinity is not one of its terms."""
    x = inputs("kalman drifting", t=6, k=d)
    x["v"][1, 0, 2, 1] = np.inf
    x |= {name: np.abs(x[name]) for name in "qk"}  # the gain has one sign: infinite, and not NaN
    start = (np.full((2, 3, d, 3), -np.inf), np.eye(d))
    for state in (None, start):
        with np.errstate(all="ignore"):
            found = [f("kalman drifting", x, initial_state=state, output_final_state=True) for f in (kernel, solver)]
        for one, other in zip((found[0][0], *found[0][1]), (found[1][0], *found[1][1]), strict=True):
            np.testing.assert_array_equal(np.where(np.isfinite(one), 0, one), np.where(np.isfinite(other), 0, other))


@pytest.mark.parametrize(("dtype", "huge"), [(np.float64, 1e155), (np.float64, 1e308)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_key_whose_square_is_infinite_is_not_passed_over_in_silence(dtype, huge):
    x = inputs("kalman drifting", dtype=dtype, t=20)
    clean = kernel("kalman drifting", x)
    x["k"][1, 0, 4, 2] = huge
    for f in (kernel, solver):
        o, state = f("kalman drifting", x, output_final_state=True)
        assert np.isnan(o[1, 0, 4:]).all() and np.isnan(state.S[1, 0]).all() and np.isnan(state.P[1, 0]).all()
        assert np.isfinite(o[1, 0, :4]).all() and np.isfinite(np.delete(o.reshape(6, 20, -1), 3, axis=0)).all()
    assert np.array_equal(kernel("kalman drifting", x)[0], clean[0])


def test_a_key_whose_square_single_precision_cannot_hold_is_a_key_like_others():
    x = inputs("kalman drifting", dtype=np.float32, t=20)
    x["k"][1, 0, 4, 2] = 1e20
    wanted = solver("kalman drifting", {name: a.astype(float) for name, a in x.items()})
    for f in (kernel, solver):
        np.testing.assert_allclose(f("kalman drifting", x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [(), ("process_noise",), ("measurement_noise",), ("log_transition",)], ids=str)
def test_a_kalman_filter_without_some_of_its_arrays_and_with_one_for_many_sequences(names):
    x, every = inputs("kalman", lead=(2, 3, 1), t=40, k=9), inputs("kalman drifting", lead=(3, 1), t=40)
    x |= {name: every[name] for name in names} | {"q": np.random.default_rng(5).standard_normal((2, 3, 4, 40, 9))}
    left_out = dict.fromkeys({"process_noise", "measurement_noise"} - {*names})
    (o, state), (exact, last) = (f("kalman", x, **left_out, output_final_state=True) for f in (kernel, solver))
    for field, expected in zip((o, *state), (exact, *last), strict=True):
        assert field.shape == expected.shape
        close("kalman", field, expected)


def growing(size, factor, count=16, t=96, rate=0.0):
    """Keys and values, the keys larger by a factor from token 32 on; decays if they have a rate."""
    rng = np.random.default_rng(size)
    k, v = rng.standard_normal((count, t, size)), rng.standard_normal((count, t, 3))
    k[:, 32:] *= factor
    return {"q": k, "k": k, "v": v} | ({"log_decay": -rng.uniform(0, rate, (count, t))} if rate else {})


def per_sequence(o, exact):
    """Largest error of every sequence over its largest answer, their geometric mean."""
    found = np.abs(o - exact).max(axis=(-1, -2)) / np.maximum(1, np.abs(exact).max(axis=(-1, -2)))
    return np.exp(np.mean(np.log(found + 1e-300)))


@pytest.mark.parametrize("factor", [1, 1000])
@pytest.mark.parametrize("size", [1, 4, 16, 64])
@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-3, 1e-4, 1e-6])
def test_mesa_survives_chunks_that_say_more_than_all_before(ridge, size, factor):
    """The common factor of a chunk cancels there; each token must be as good as with a factor of its own."""
    survives(growing(size, factor, 4 if size == 64 else 16), ridge)


@pytest.mark.parametrize("factor", [1, 100])
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("ridge", [1.0, 1e-3])
@pytest.mark.parametrize("rate", [0.02, 0.15])
def test_mesa_with_decay_survives_them_too(rate, ridge, size, factor):
    """The common factor is none of the tokens' own there; conjugate gradients have to make up for that."""
    survives(growing(size, factor, rate=rate), ridge)


def test_mesa_with_decay_survives_one_key_repeated():
    """The residual of a solution says little where the ridge is nearly lost beside the key's weight."""
    x = growing(16, 1, count=8, rate=0.02)
    x["k"] = np.repeat(x["k"][:, :1], 96, axis=1)
    x["q"] = x["k"] + 0.01 * x["q"]
    survives(x, 1e-4)


@pytest.mark.parametrize(("size", "ridge", "off"), [(5, 1e-5, 0.0), (64, 5e-3, 1e-3)])
def test_mesa_survives_keys_near_one_direction(size, ridge, off):
    """Queries off that direction have solutions far larger than themselves, which multiply every error."""
    errors = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        q, k, v = (rng.standard_normal((80, n)) for n in (size, size, 4))
        k = k[:, :1] * rng.standard_normal(size) + off * k
        x = {name: a.astype(np.float32) for name, a in (("q", q), ("k", k), ("v", v))}
        exact = solver("mesa", {name: a.astype(float) for name, a in x.items()}, ridge=ridge)
        errors.append([np.linalg.norm(f("mesa", x, ridge=ridge) - exact) for f in (kernel, CHUNKED)])
    ours, theirs = np.median(errors, axis=0)
    assert ours < 2 * theirs


def unit_keys(t, rate, lead=(2,), size=64):
    """Random keys of unit length and values in single precision, with decays."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((*lead, t, size)).astype(np.float32) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return {"q": q, "k": k, "v": v, "log_decay": (-rate * rng.random((*lead, t))).astype(np.float32)}


@pytest.mark.parametrize("ridge", [1e-3, 1e-5, 1e-7, 0.0])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.3])
def test_a_small_ridge_costs_no_digits_in_single_precision(ridge, rate):
    """What was summed in single precision is wrong by more than the ridge, and so is what is solved in it."""
    x = unit_keys(96, rate, size=33)
    exact = solver("mesa", {name: a.astype(float) for name, a in x.items()}, ridge=ridge)
    found = kernel("mesa", x, ridge=ridge)
    assert np.linalg.norm(found - exact) < 3e-6 * np.linalg.norm(exact)


def test_a_small_ridge_costs_little_time():
    x = unit_keys(512, 0.02)
    times = [min(timed(x, ridge=ridge) for _ in range(4)) for ridge in (1.0, 1e-5)]
    assert times[1] < 12 * times[0]


def test_a_state_given_in_single_precision_is_trusted_no_further():
    """Its sums were rounded at every token: what is rounding alone in them must not be divided by a ridge."""
    x, o, state = unit_keys(60, 0.02, size=33), [], None
    exact = solver("mesa", {name: a.astype(float) for name, a in x.items()}, ridge=1e-9)
    for t in range(60):
        piece, state = kernel("mesa", cut(x, t, t + 1), ridge=1e-9, initial_state=state, output_final_state=True)
        o.append(piece)
    error = np.linalg.norm(np.concatenate(o, axis=-2) - exact, axis=(0, 2)) / np.linalg.norm(exact, axis=(0, 2))
    assert np.all(error[:30] < 1e-4)


@pytest.mark.parametrize("ridge", [1.0, 0.0])
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("factor", [1e120, 1e-120])
def test_numbers_whose_fourth_power_overflows_are_numbers_like_others(factor, rate, ridge):
    x = growing(6, 1, count=2, t=40, rate=rate)
    x["k"] = x["k"] * factor
    exact = solver("mesa", x, form="chunked", ridge=ridge)
    assert np.abs(kernel("mesa", x, ridge=ridge) - exact).max() < 1e-9 * np.abs(exact).max()


def test_the_steps_of_conjugate_gradients_leave_no_more_rounding_than_a_factor():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        q, k, v = (rng.standard_normal((2, 96, 128)).astype(np.float32) for _ in range(3))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        x = {"q": q, "k": k, "v": v, "log_decay": -0.1 * rng.random((2, 96)).astype(np.float32)}
        exact = kernel("mesa", {name: a.astype(float) for name, a in x.items()})
        ours, theirs = (np.abs(f("mesa", x) - exact).max() for f in (kernel, CHUNKED))
        assert ours < 2 * theirs


def survives(arrays, ridge):
    """In single precision the kernel is as good as the solver."""
    single = {name: x.astype(np.float32) for name, x in arrays.items()}
    exact = solver("mesa", {name: x.astype(float) for name, x in single.items()}, ridge=ridge)
    ours, theirs = (per_sequence(f("mesa", single, ridge=ridge), exact) for f in (kernel, CHUNKED))
    assert ours < 2 * theirs


@pytest.mark.parametrize("factor", [1, 1000])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_mesa_in_double_precision_is_near_the_condition(size, factor):
    x = growing(size, factor)
    exact = solver("mesa", x, ridge=1e-9)
    assert per_sequence(kernel("mesa", x, ridge=1e-9), exact) < 1e-11


def test_mesa_recalls_what_a_small_ridge_lets_it():
    k = np.random.default_rng(0).standard_normal((31, 4))
    for dtype, ridge, bound in ((np.float32, 1e-6, 1e-5), (np.float64, 1e-12, 1e-11)):
        x = {"q": k.astype(dtype), "k": k.astype(dtype), "v": k[:, :1].astype(dtype)}
        assert np.abs(kernel("mesa", x, ridge=ridge) - x["v"])[4:].max() < bound


@pytest.mark.parametrize("rate", [0.0, 0.02])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tokens_solved_alone_know_neither_future_nor_company_nor_cuts(dtype, rate):
    """Chunks in which some tokens keep the common solution and others do not; a later key may overflow."""
    x = {name: a.astype(dtype) for name, a in growing(6, 1000, count=5, rate=rate).items()}
    x["k"] = x["k"] * np.where(np.arange(96) == 50, dtype(3e4), dtype(1))[:, None]
    whole = kernel("mesa", x, ridge=1e-4)
    for i in range(5):
        assert np.array_equal(whole[i], kernel("mesa", {name: a[i] for name, a in x.items()}, ridge=1e-4))
    for cutoff in (1, 31, 33, 45, 51, 70):
        later = {name: a.copy() for name, a in x.items()}
        later["k"][:, cutoff:] = np.sqrt(np.finfo(dtype).max) / 1e3
        if rate:
            later["log_decay"][:, cutoff:] *= 3
        with np.errstate(all="ignore"):
            assert np.array_equal(kernel("mesa", later, ridge=1e-4)[:, :cutoff], whole[:, :cutoff])
    x = {name: a.astype(dtype) for name, a in growing(6, 30, count=2, rate=rate).items()}
    whole, state, pieces = kernel("mesa", x, ridge=1e-2), None, []
    for t in range(96):
        piece, state = kernel("mesa", cut(x, t, t + 1), ridge=1e-2, initial_state=state, output_final_state=True)
        pieces.append(piece)
    assert error(np.concatenate(pieces, axis=-2), whole) < (1e-3 if dtype == np.float32 else 1e-11)


@pytest.mark.parametrize("case", ["mesa", "mesa mild", "mesa decaying", "mesa cg"])
def test_the_only_token_before_a_bad_one_keeps_its_bits(case):
    for bad in (1, 33):
        arrays = inputs(case, lead=(8,), dtype=np.float32, t=40, k=34, v=32)
        whole = kernel(case, arrays)
        arrays["v"][:, bad] = np.nan
        assert np.array_equal(kernel(case, arrays)[:, :bad], whole[:, :bad])


def test_a_single_token_gets_the_factor_that_costs_less():
    common = partial(serves.py_func, method=EXACT, like=1e-7)
    assert not common(1, mean=-0.01)
    assert common(1, mean=0.0) and common(2, mean=-0.01)


def test_queries_of_zeros_cost_no_factor_of_their_own():
    x = {name: a.astype(np.float32) for name, a in growing(64, 1, count=2, t=256).items()}
    padded = x | {"q": np.zeros_like(x["q"])}
    assert not kernel("mesa", padded).any()
    seconds = [[clock() for _ in range(5)] for clock in (partial(timed, padded), partial(timed, x))]
    assert min(seconds[0]) < 3 * min(seconds[1])


def timed(arrays, **options):
    begin = perf_counter()
    kernel("mesa", arrays, **options)
    return perf_counter() - begin


def test_a_ridge_lost_in_rounding_still_says_which_solution():
    """Fewer pairs than channels: the answer is the limit of small ridges, each channel weighed by its own."""
    x = growing(6, 1, count=3, t=4)
    ridge = np.array([1e-20, 4e-20, 1e-20, 2e-20, 1e-20, 9e-20])
    assert error(kernel("mesa", x, ridge=ridge), solver("mesa", x, ridge=ridge)) < 1e-11


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("log_decay", np.nan, "log_decay must be <= 0 or -inf .*; it is nan at"),
        ("beta", np.nan, "beta must be finite and >= 0 .*; it is nan at"),
        ("beta", np.inf, "beta must be finite and >= 0 .*; it is inf at"),
        ("beta", -1.0, "beta must be finite and >= 0 .*; it is -1.0 at"),
    ],
)
def test_mesa_refuses_the_weights_that_the_solver_refuses(name, number, words):
    x = inputs("mesa decaying", t=5)
    x[name][1, 0, 2] = number
    for f in (kernel, CHUNKED):
        with pytest.raises(ValueError, match=words + r" \(1, 0, 2\)"):
            f("mesa decaying", x)
        f("mesa decaying", x, mask=np.arange(5) != 2)


@pytest.mark.parametrize("lead", [(5,), (7, 2, 3), (6, 1, 1), (2, 2)])
def test_a_ridge_that_fits_no_sequence_is_named(lead):
    x = inputs("mesa", t=5)
    for f in (kernel, CHUNKED):
        with pytest.raises(ValueError, match="ridge has leading axes"):
            f("mesa", x, ridge=np.ones(lead + x["k"].shape[-1:]))


def test_a_limit_on_the_steps_is_reported():
    with pytest.warns(RuntimeWarning, match="stopped after 2 iterations"):
        kernel("mesa cg decaying", inputs("mesa cg decaying", t=40, k=9), iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel("mesa cg steps", inputs("mesa cg steps", t=40, k=9))


def test_what_cannot_be_compiled_or_solved_is_said():
    x = inputs("gaussian", lead=(), t=5)
    with pytest.raises(NotImplementedError, match="cannot compile"):
        kernel("gaussian", x, kernel=rls.spread)
    x["k"][1] = x["k"][0]
    with pytest.raises(np.linalg.LinAlgError):
        kernel("linear", x, ridge=0.0)


def recursive_least_squares(**given):
    return ttr_np.recursive_least_squares(**given, backend="numba")


@pytest.mark.parametrize("width", [2, 9])
def test_a_covariance_may_be_large_and_is_no_bad_number(width):
    """P starts at 1 / ridge, beyond what a product of two data may be."""
    k = np.random.default_rng(0).standard_normal((30, 3)).astype(np.float32)
    v = k @ np.ones((3, width), np.float32)
    o, state = recursive_least_squares(q=k, k=k, v=v, ridge=1e-16, output_final_state=True)
    assert np.abs(o - v)[5:].max() < 1e-4
    again, _ = recursive_least_squares(q=k, k=k, v=v, initial_state=state, output_final_state=True)
    assert np.abs(again - v).max() < 1e-4


def test_a_ridge_of_zero_in_one_memory_leaves_others_their_bits():
    x = inputs("mesa", lead=(3,), t=40, dtype=np.float32)
    ridge = np.repeat([[0.0], [0.5], [0.01]], x["k"].shape[-1], axis=1)
    together = kernel("mesa", x, ridge=ridge)
    for i in range(3):
        assert np.array_equal(together[i], kernel("mesa", {name: a[i] for name, a in x.items()}, ridge=ridge[i]))


def test_a_query_that_is_no_number_has_no_answer_even_where_nothing_is_known():
    x = inputs("mesa singular", lead=(), t=5)
    x["k"][:3], x["q"][[1, 4], 2] = 0, np.nan
    assert np.array_equal(np.isnan(kernel("mesa singular", x)).all(axis=-1), [False, True, False, False, True])


@pytest.mark.parametrize("gate", [-np.inf, -1e30, -1e4])
def test_mesa_forgets_even_a_nan_where_nothing_is_left_of_it(gate):
    x = inputs("mesa decaying", lead=(), t=70)
    x["log_decay"][40] = gate
    clean = kernel("mesa decaying", x)
    x["v"][5, 1] = np.nan
    o = kernel("mesa decaying", x)
    assert np.isnan(o[5:40, 1]).all()
    np.testing.assert_allclose(o[40:], clean[40:], rtol=1e-12, atol=1e-14)
