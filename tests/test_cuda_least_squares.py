"""Exact least squares in chunks, executed on the CPU: the form of longer calls of cupy, in double precision."""

import re
from pathlib import Path

import cudaemu
import numpy as np
import pytest
import test_operators as sentences
from cudaemu import needed
from cudaemu.machines import on_cpu
from numpy.testing import assert_allclose
from test_cuda_kernels import by_the_runner
from test_cuda_squares import barriers, inputs, run

import ttr_np
from cuda_kernels.cupy_raw import _least_squares_chunks

pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:solver '.*' stopped after")]

SOLVERS = [
    ("recursive_least_squares", {"ridge": 0.3}),
    ("mesa", {"ridge": 0.3}),
    ("mesa", {"solver": "cg", "iterations": 6, "tolerance": 0.0}),
]
each = pytest.mark.parametrize("operator, options", SOLVERS, ids=["rls", "exact", "cg"])
CHUNK = {"recursive_least_squares": "recursive_least_squares_chunks", "mesa": "mesa_chunks"}


def pairs(operator, t, seed=0, gates=0.1, **sizes):
    """Keys of unit length, gates that forget slowly, some pairs without weight, in single precision."""
    arrays = inputs(operator, seed, t=t, **{"k": 16, "lead": (1,)} | sizes)
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    arrays["log_decay"] = gates * arrays["log_decay"]
    arrays["beta"][..., ::7] = 0
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def doubled(x):
    """The same numbers in double precision."""
    return x.astype(float) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def is_as_good(operator, arrays, check=True, **options):
    """By the ratio rule: answers and states against the solver's in single precision, which they need not repeat."""
    wide = {name: doubled(x) for name, x in (arrays | options).items()}
    exact, end = run(operator, "numpy", wide)
    plain, plain_end = run(operator, "numpy", arrays, **options)
    o, state = run(operator, "cupy", arrays, check=check, **options)
    for x, y, z in ((o, exact, plain), *zip(state, end, plain_end, strict=True)):
        floor = 2 * np.finfo(np.float32).eps * np.abs(y).max(initial=0)
        assert x.dtype == z.dtype and np.abs(x - y).max(initial=0) <= max(2 * np.abs(z - y).max(initial=0), floor)
    return o, state


@each
@pytest.mark.parametrize(
    "sizes", [{"k": 16, "v": 5}, {"k": 33, "v": 20, "lead": (2,)}, {"k": 3, "v": 140}, {"k": 72, "v": 8}], ids=str
)
def test_chunks_are_as_good_as_the_solver(operator, options, sizes):
    for t in (32, 33, 70):
        is_as_good(operator, pairs(operator, t, **sizes), check=t == 70, **options)


@pytest.mark.slow
@each
def test_the_largest_keys_in_chunks(operator, options):
    is_as_good(operator, pairs(operator, 64, k=128, v=128), check=False, **options)


@each
def test_calls_of_all_kinds(operator, options):
    rng = np.random.default_rng(3)
    for seed, lead in enumerate([(), (2,), (2, 3), (1, 2)] * 2):
        t = int(rng.choice([32, 47, 64, 81]))
        arrays, common = pairs(operator, t, seed, lead=lead), {}
        if lead:
            name = "kvq"[seed % 3]
            arrays[name] = arrays[name][..., :1, :, :] if len(lead) > 1 else arrays[name][0]
        if seed % 2:
            arrays = {name: np.asfortranarray(x) for name, x in arrays.items()}
        if seed % 3 == 0:
            common["mask"] = rng.uniform(size=(t,)) < 0.6
        if seed % 3 == 1:
            common["cu_seqlens"] = np.array([0, 33, 33, t]) if t > 33 else np.array([0, t])
        if seed % 4 < 2:
            arrays.pop("log_decay" if seed % 2 else "beta")
        if seed % 4 == 2:
            common["initial_state"] = run(operator, "numpy", arrays, **options)[1]
        is_as_good(operator, arrays, **common, **options)


@each
def test_data_of_16_bits_give_the_answers_of_the_solver(operator, options):
    half = pytest.importorskip("ml_dtypes").bfloat16
    arrays = pairs(operator, 70)
    arrays |= {name: arrays[name].astype(half) for name in "qkv"}
    wanted, end = run(operator, "numpy", arrays, **options)
    o, state = run(operator, "cupy", arrays, **options)
    assert o.dtype == half
    sentences.close(o.astype(float), wanted.astype(float), 2e-2)
    for x, y in zip(state, end, strict=True):
        sentences.close(x, y, 1e-5)


def test_what_is_not_symmetric_does_not_grow():
    """No pair teaches anything of it, and decays let it grow: by a cap, or in the covariance that is given."""
    rng, t = np.random.default_rng(0), 900
    k = rng.standard_normal((t, 3)) @ rng.standard_normal((3, 16)) + 0.03 * rng.standard_normal((t, 16))
    arrays = {"q": rng.standard_normal((t, 16)), "k": k / np.linalg.norm(k, axis=-1, keepdims=True)}
    arrays |= {"v": rng.standard_normal((t, 2)), "log_decay": -0.2 * np.abs(rng.standard_normal(t))}
    arrays |= {"beta": rng.uniform(size=t)}
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    state = run("recursive_least_squares", "numpy", arrays)[1]
    state.P[0, 1] += 1e-6 * state.P.max()
    for options in ({"ridge": 1e-5}, {"initial_state": state}):
        end = run("recursive_least_squares", "numpy", arrays, **options)[1]
        o, after = run("recursive_least_squares", "cupy", arrays, check=False, **options)
        assert_allclose(after.S, end.S, rtol=0, atol=1e-4 * np.abs(end.S).max())
        assert np.isfinite(o).all() and np.isfinite(after.P).all()


@each
def test_a_small_ridge_costs_no_digits(operator, options):
    for ridge in (1e-3, 1e-4, 1e-6):
        arrays = pairs(operator, 200)
        arrays.pop("log_decay")
        is_as_good(operator, arrays, check=False, **options | {"ridge": ridge})


# ---- pieces of a sequence --------------------------------------------------------------------------------------------


@each
def test_pieces_begin_where_the_last_ones_end(operator, options):
    arrays = pairs(operator, 1100)
    part = {name: x[..., :50, :] if name in "qkv" else x[..., :50] for name, x in arrays.items()}
    for more in ({}, {"initial_state": run(operator, "numpy", part)[1]}):
        with on_cpu("cupy") as machine:
            getattr(ttr_np, operator)(**arrays, **options, **more, backend="cupy")
        assert machine.launches[:2] == ["pair_sums", CHUNK[operator]]
        is_as_good(operator, arrays, **options, **more)


def test_a_piece_whose_beginning_has_faded_walks_over_what_came_before(monkeypatch):
    monkeypatch.setattr(_least_squares_chunks, "LEAST", 32)  # tokens of a piece
    arrays = pairs("recursive_least_squares", 127, k=6, v=3)
    arrays["k"][:, 10:, 3:] = 0  # nothing more of these channels
    arrays["log_decay"][...] = -3
    found = []
    for multiprocessors in (4, 1):
        with on_cpu("cupy") as machine:
            machine.multiprocessors = multiprocessors
            found.append(ttr_np.recursive_least_squares(**arrays, output_final_state=True, backend="cupy"))
        assert ("pair_sums" in machine.launches) == (multiprocessors > 1)
    (o, (S, P)), (whole, (S_whole, P_whole)) = found
    assert np.isfinite(whole).all()
    for x, y in ((o, whole), (S, S_whole), (P, P_whole)):
        sentences.same_bits(x, y)


def test_what_learns_nothing_moves_nothing():
    arrays = pairs("recursive_least_squares", 1100)
    arrays.pop("log_decay")
    arrays["beta"][...] = 0
    turned = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0]
    P = ((turned * np.linspace(1, 3, 16)) @ turned.T).astype(np.float32)
    P = (P + P.T) / 2
    S = np.random.default_rng(2).standard_normal((1, 16, arrays["v"].shape[-1])).astype(np.float32)
    _, (S_next, P_next) = run("recursive_least_squares", "cupy", arrays, initial_state=(S, P[None]))
    sentences.same_bits(P_next[0], P)
    sentences.same_bits(S_next, S)


# ---- what must not change a bit --------------------------------------------------------------------------------------


@each
def test_one_sequence_has_the_same_bits_alone_and_among_many(operator, options):
    arrays = pairs(operator, 70, lead=(5,))
    o, state = run(operator, "cupy", arrays, check=False, **options)
    alone, end = run(operator, "cupy", {name: x[3:4] for name, x in arrays.items()}, check=False, **options)
    sentences.same_bits(o[3:4], alone)
    for x, y in zip(state, end, strict=True):
        sentences.same_bits(x[3:4], y)


@each
def test_the_order_of_threads_changes_no_bit(operator, options):
    arrays, results = pairs(operator, 40), []
    for order in ("forward", "reverse", "random"):
        with on_cpu("cupy", check=False, order=order):
            results.append(getattr(ttr_np, operator)(**arrays, **options, backend="cupy"))
    for o in results[1:]:
        sentences.same_bits(o, results[0])


# ---- numbers that are not finite -------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    "t, place, reset", [(70, 0, 70), (70, 31, 40), (70, 50, 51), (1100, 700, 1100), (1100, 70, 400), (1100, 700, 800)]
)
@pytest.mark.parametrize("name", ["k", "v", "q"])
def test_a_bad_number_spoils_what_the_solver_spoils(operator, options, name, t, place, reset):
    arrays = pairs(operator, t, v=4)
    arrays["beta"][..., place] = 0.5
    arrays["log_decay"][..., reset:][..., :1] = -np.inf if operator == "mesa" else -1e4
    arrays[name][0, place, 1] = np.nan if place % 2 else np.inf
    with np.errstate(invalid="ignore", over="ignore"):
        wanted, end = run(operator, "numpy", arrays, **options)
    o, state = run(operator, "cupy", arrays, check=False, **options)
    for x, y in ((o, wanted), *zip(state, end, strict=True)):
        good = np.isfinite(y)
        assert np.array_equal(np.isfinite(x), good)
        sentences.close(x[good], y[good], 1e-4)


# ---- wind-up ---------------------------------------------------------------------------------------------------------


def test_directions_without_keys_do_not_wind_up():
    arrays = pairs("recursive_least_squares", 400, k=4, v=2)
    arrays["k"][:, 10:350] *= np.array([1, 1, 0, 0], np.float32)  # forgotten for hundreds of steps, then excited again
    arrays["log_decay"][...] = np.log(0.5)
    arrays["q"] = arrays["k"]
    wanted, _ = run("recursive_least_squares", "numpy", arrays)
    o, (_, P) = run("recursive_least_squares", "cupy", arrays, check=False)
    assert np.all(np.isfinite(o)) and np.all(np.linalg.eigvalsh(P.astype(float)) > 0)
    sentences.same_bits(P, np.swapaxes(P, -1, -2))
    sentences.close(o, wanted, 1e-3)
    part = {n: x[:, :350] for n, x in arrays.items()}
    values = np.linalg.eigvalsh(run("recursive_least_squares", "cupy", part, check=False)[1].P[0].astype(float))
    assert values[-1] <= 1.01 * np.finfo(np.float32).eps ** (-2 / 3) * values[0]


def test_a_covariance_is_checked():
    arrays = pairs("recursive_least_squares", 40, k=3, v=5, lead=(2,))
    S, even = np.zeros((2, 3, 5), np.float32), np.eye(3, dtype=np.float32)
    skew, negative = even.copy(), np.diag(np.array([1, -1, 1], np.float32))
    skew[0, 1] = 0.5
    for P, words in ((skew, "must be symmetric"), (negative, "must be positive definite")):
        with pytest.raises(ValueError, match=f"initial_state field P {words}"):
            run("recursive_least_squares", "cupy", arrays, initial_state=(S, np.stack([even, P])))
    whole = np.stack([even, np.full((3, 3), np.nan, np.float32)])
    o, (_, P) = run("recursive_least_squares", "cupy", arrays, initial_state=(S, whole))
    assert np.all(np.isfinite(o[0])) and np.all(np.isnan(o[1])) and np.all(np.isnan(P[1]))


# ---- mesa ------------------------------------------------------------------------------------------------------------


def test_what_conjugate_gradients_cannot_solve_is_solved_token_by_token():
    arrays = pairs("mesa", 40, k=6, v=3)
    arrays["k"][..., 5] = arrays["k"][..., 4]
    arrays["q"][..., 5] = arrays["q"][..., 4]
    for ridge in (0.0, 1e-30):
        wanted, _ = run("mesa", "numpy", {name: doubled(x) for name, x in arrays.items()}, ridge=ridge)
        o, _ = run("mesa", "cupy", arrays, ridge=ridge)
        sentences.close(o[:, 8:], wanted[:, 8:], 1e-4)  # before, too few pairs: rounding says what counts as zero


def test_nothing_is_left_after_a_full_reset():
    arrays = pairs("mesa", 40)
    arrays["log_decay"][0, 20] = -np.inf
    arrays["v"][0, :20] *= 1e30
    wanted, _ = run("mesa", "numpy", arrays)
    o, _ = run("mesa", "cupy", arrays)
    sentences.close(o[:, 20:], wanted[:, 20:], 1e-5)


def test_a_limit_on_the_steps_is_reported():
    arrays = pairs("mesa", 40)
    words = "solver 'cg' stopped after 2 iterations at a relative residual of .*, above the tolerance 1"
    with pytest.warns(RuntimeWarning, match=words):
        o, _ = run("mesa", "cupy", arrays, solver="cg", ridge=1e-3, iterations=2, tolerance=1e-6)
    wanted, _ = run("mesa", "numpy", arrays, solver="cg", ridge=1e-3, iterations=2, tolerance=1e-6)
    sentences.close(o, wanted, 1e-5)


def test_a_strong_decay_does_not_forget_a_nan(monkeypatch):
    monkeypatch.setattr(_least_squares_chunks, "LEAST", 32)  # tokens of a piece
    arrays = pairs("mesa", 128, v=4)
    arrays["log_decay"][...] = -50  # nothing is left of 32 tokens
    arrays["k"][0, 10, 1] = np.nan
    o, state = run("mesa", "cupy", arrays, check=False)
    assert np.isnan(o[:, 10:]).all() and np.isnan(state.H[0, 1]).all()


# ---- barriers --------------------------------------------------------------------------------------------------------


def uneven():
    """A covariance that calls for a cap before the first pair and at the end."""
    arrays = pairs("recursive_least_squares", 70, k=40, v=24)
    turned = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 40)))[0]
    P = ((turned * np.r_[1e9, 1e6, np.full(38, 1e4)]) @ turned.T).astype(np.float32)[None]
    return arrays, {"initial_state": (np.zeros((1, 40, 24), np.float32), (P + np.swapaxes(P, -1, -2)) / 2)}


def spoilt(operator):
    """A bad number in the middle of a chunk, queries that share a memory."""
    arrays = pairs(operator, 50, k=40, v=24)
    arrays["v"][0, 40, 1] = np.nan
    arrays["q"] = np.concatenate([arrays["q"], arrays["q"][..., ::-1, :]])
    return arrays, {}


SCENES = [
    ("recursive_least_squares", *uneven()),
    ("recursive_least_squares", *spoilt("recursive_least_squares")),
    ("recursive_least_squares", pairs("recursive_least_squares", 96, k=40, v=40), {}),
    ("mesa", *spoilt("mesa")),
    ("mesa", pairs("mesa", 96, k=40, v=40), {"solver": "cg", "iterations": 2, "tolerance": 0.0}),
    ("mesa", pairs("mesa", 32, k=16, v=8), {"ridge": 0.0}),
]


# The other headers are those of test_cuda_squares.
TEXTS = Path(_least_squares_chunks.__file__).parent
OWN = ("least_squares.cuh", "pair_sums.cu", "recursive_least_squares_chunks.cu", "mesa_chunks.cu", "recall_chunks.cu")


@pytest.mark.slow
@by_the_runner
def test_each_barrier_is_needed(monkeypatch):
    """In one kernel at least."""
    monkeypatch.setattr(_least_squares_chunks, "LEAST", 32)  # tokens of a piece
    own = set(re.findall(r"__syncthreads\(\);  // (.*)", "".join((TEXTS / name).read_text() for name in OWN)))
    needed_somewhere = barriers(SCENES, own)
    assert own <= set(needed_somewhere)
    assert [reason for reason in own if not needed_somewhere[reason]] == []
