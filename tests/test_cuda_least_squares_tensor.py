"""Exact least squares of bfloat16 in single precision, executed on the CPU; and what is left to double precision."""

import re
from functools import partial
from pathlib import Path

import cudaemu
import numpy as np
import pytest
import test_operators as sentences
from cudaemu import needed
from cudaemu.machines import on_cpu
from test_cuda_kernels import by_the_runner
from test_cuda_least_squares import pairs as floats
from test_cuda_squares import barriers

import ttr_np
from cuda_kernels.cupy_raw import _least_squares_chunks

bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
pytestmark = needed(cudaemu.missing())

rls = partial(ttr_np.recursive_least_squares, output_final_state=True)
EPS = np.finfo(np.float32).eps
IN_DOUBLES = "recursive_least_squares_chunks"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer tokens than a call would take this way: the runner is slow."""
    monkeypatch.setattr("cuda_kernels.cupy_raw.recursive_least_squares.MANY", 32)


def pairs(t, seed=0, **sizes):
    """Keys of unit length, gates that forget slowly, some pairs without weight; data of bfloat16."""
    arrays = floats("recursive_least_squares", t, seed, **{"k": 20, "v": 4} | sizes)
    return arrays | {name: arrays[name].astype(bfloat16) for name in "qkv"}


def on_tensor_cores(arrays, check=False, multiprocessors=4, **options):
    """Answers and state, and what was left to double precision: nothing, a cap or a memory, of each block."""
    with on_cpu("cupy", check=check) as machine:
        scratch, made, machine.multiprocessors = machine.scratch, [], multiprocessors
        machine.scratch = lambda size: made.append(scratch(size)) or made[-1]
        result = rls(**arrays, **options, backend="cupy")
        assert machine.launches[-2:] == ["recursive_least_squares_tensor", IN_DOUBLES]
    return *result, np.array(made[-1])


def is_as_good(arrays, **options):
    """By the ratio rule, in single precision; returns what was left to double precision."""
    exact = rls(**{name: x.astype(float) for name, x in arrays.items()}, backend="numpy", **solved(options))
    plain = rls(**arrays, backend="numpy", **solved(options))
    o, state, left = on_tensor_cores(arrays, **options)
    for x, y, z in ((o, exact[0], plain[0]), *zip(state, exact[1], plain[1], strict=True)):
        assert x.dtype == z.dtype
        error, theirs = (np.abs(a.astype(float) - y).max(initial=0) for a in (x, z))
        assert error <= 2 * max(theirs, EPS * np.abs(y).max(initial=0))
    return left


def solved(options):
    """What the solver is asked too."""
    return {name: x for name, x in options.items() if name not in ("check", "multiprocessors")}


SIZES = [{"v": 5}, {"k": 3, "v": 140, "lead": (2,)}]
SLOW = [{"k": 16, "v": 16}, {"k": 33, "v": 20}, {"k": 72, "v": 8}, {"k": 128, "v": 128}]


@pytest.mark.parametrize("sizes", [*SIZES, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)], ids=str)
def test_single_precision_is_as_good_as_the_solver(sizes):
    for t in (32, 33, 70):
        assert not is_as_good(pairs(t, **sizes), check="k" not in sizes).any()


@pytest.mark.parametrize("gates", [0.0, 0.05])
def test_many_tokens_cost_no_digits(gates):
    arrays = pairs(1500, gates=gates)
    arrays["beta"][...] = 1
    assert not is_as_good(arrays).any()


def test_keys_that_are_all_alike_cost_no_digits():
    for seed, alike in enumerate([lambda k: k[:, :1], lambda k: k[:, np.arange(k.shape[1]) % 3]]):
        arrays = pairs(300, seed)
        arrays["k"] = np.ascontiguousarray(np.broadcast_to(alike(arrays["k"]), arrays["k"].shape))
        arrays.pop("log_decay")
        for ridge in (1.0, 0.05):
            assert is_as_good(arrays, ridge=ridge).max() < 2


def test_calls_of_all_kinds():
    rng = np.random.default_rng(3)
    for seed, lead in enumerate([(), (2,), (2, 3)] * 2):
        t = int(rng.choice([32, 47, 64, 81]))
        arrays, common = pairs(t, seed, lead=lead), {}
        if lead:
            name = "kv"[seed % 2]
            arrays[name] = arrays[name][..., :1, :, :] if len(lead) > 1 else arrays[name][0]
        if seed % 2:
            arrays = {name: np.asfortranarray(x) for name, x in arrays.items()}
        if seed % 3 == 0:
            common["mask"] = rng.uniform(size=(t,)) < 0.6
        if seed % 4 < 2:
            arrays.pop("log_decay" if seed % 2 else "beta")
        if seed % 4 == 2:
            common["initial_state"] = rls(**arrays, backend="numpy")[1]
        plain, end = rls(**arrays, backend="numpy", **common)
        o, state, left = on_tensor_cores(arrays, **common)
        assert not left.any()
        sentences.close(o.astype(float), plain.astype(float), 2e-2)
        for x, y in zip(state, end, strict=True):
            sentences.close(x, y, 1e-5)


def test_pieces_begin_where_the_last_ones_end():
    arrays = pairs(1100)
    part = {name: x[..., :50, :] if name in "qkv" else x[..., :50] for name, x in arrays.items()}
    for more in ({}, {"initial_state": rls(**part, backend="numpy")[1]}):
        left = on_tensor_cores(arrays, **more)[-1]
        assert left.size == 4 and not left.any()
        plain, end = rls(**arrays, backend="numpy", **more)
        o, state, _ = on_tensor_cores(arrays, **more)
        sentences.close(o.astype(float), plain.astype(float), 2e-2)
        for x, y in zip(state, end, strict=True):
            sentences.close(x, y, 1e-5)


def test_few_tokens_are_taken_in_double_precision(monkeypatch):
    monkeypatch.undo()
    with on_cpu("cupy", check=False) as machine:
        rls(**pairs(70), backend="cupy")
    assert machine.launches == [IN_DOUBLES]


# ---- what is left to double precision --------------------------------------------------------------------------------


def in_doubles(arrays, monkeypatch, **options):
    """What the other kernel says, alone."""
    with monkeypatch.context() as patch, on_cpu("cupy", check=False) as machine:
        patch.setattr("cuda_kernels.cupy_raw.recursive_least_squares.tensor_bytes", lambda keys: 1 << 30)
        result = rls(**arrays, **options, backend="cupy")
        assert "recursive_least_squares_tensor" not in machine.launches
    return result


def small_ridge(arrays):
    return {"ridge": 2e-3}


def bad_key(arrays):
    arrays["k"][1, 40, 2] = np.inf
    arrays["beta"][1, 40] = 1


def bad_value(arrays):
    arrays["v"][1, 68, 2] = np.nan  # in the last chunk: no later one sees what becomes of it
    arrays["beta"][1, 68] = 1


def strong_gates(arrays):
    arrays["log_decay"][1] = -2


def bad_covariance(arrays):
    state = rls(**arrays, backend="numpy")[1]
    state.P[1, 0, 0] = np.nan
    return {"initial_state": state}


@pytest.mark.parametrize("change", [small_ridge, bad_key, bad_value, strong_gates, bad_covariance])
def test_what_has_too_few_digits_is_solved_in_double_precision(change, monkeypatch):
    """That memory alone, and to the same bits as without the first try."""
    arrays = pairs(70, lead=(3,))
    options = change(arrays) or {}
    with np.errstate(invalid="ignore"):
        o, state, left = on_tensor_cores(arrays, **options)
        wanted, end = in_doubles(arrays, monkeypatch, **options)
    mine = slice(None) if change is small_ridge else slice(1, 2)
    assert (left[mine] == 2).all() and np.sum(left == 2) == len(left[mine])
    for x, y in ((o, wanted), *zip(state, end, strict=True)):
        sentences.same_bits(x[mine].astype(float), y[mine].astype(float))


def test_a_covariance_that_needs_a_cap_at_the_end_gets_it(monkeypatch):
    arrays = pairs(300)
    arrays["k"][..., 14:] = 0  # which is forgotten, while no key says anything new of it
    arrays["log_decay"][...] = -0.03
    options = {"ridge": 0.1}
    o, state, left = on_tensor_cores(arrays, **options)
    assert list(left) == [1]
    wanted, end = in_doubles(arrays, monkeypatch, **options)
    values = np.linalg.eigvalsh(state.P[0].astype(float))
    assert values[0] > 0 and 0.9 <= values[-1] / values[0] * EPS ** (2 / 3) <= 1.01
    sentences.close(o.astype(float), wanted.astype(float), 2e-2)
    for x, y in zip(state, end, strict=True):
        sentences.close(x, y, 1e-4)


def test_a_key_without_weight_is_not_looked_at():
    arrays = pairs(70)
    wanted, end, _ = on_tensor_cores(arrays)
    arrays["k"][..., 7, 1] = np.nan
    arrays["v"][..., 14, 1] = np.inf
    o, state, left = on_tensor_cores(arrays)
    assert not left.any()
    for x, y in ((o, wanted), *zip(state, end, strict=True)):
        sentences.same_bits(x, y)


def test_a_bad_query_spoils_its_own_answer():
    arrays = pairs(70)
    wanted, end, _ = on_tensor_cores(arrays)
    arrays["q"][..., 40, 1] = np.nan
    o, state, left = on_tensor_cores(arrays)
    assert not left.any() and np.isnan(o[:, 40].astype(float)).all()
    others = np.arange(70) != 40
    for x, y in ((o[:, others], wanted[:, others]), *zip(state, end, strict=True)):
        sentences.same_bits(x, y)


# ---- what must not change a bit --------------------------------------------------------------------------------------


def test_what_learns_nothing_moves_nothing():
    arrays = pairs(1100)
    arrays.pop("log_decay")
    arrays["beta"][...] = 0
    S, P = rls(**pairs(50), backend="numpy")[1]
    _, state, left = on_tensor_cores(arrays, initial_state=(S, P))
    assert not left.any()
    sentences.same_bits(state.P, P)
    sentences.same_bits(state.S, S)


def test_one_sequence_has_the_same_bits_alone_and_among_many():
    arrays = pairs(70, lead=(5,))
    o, state, _ = on_tensor_cores(arrays)
    alone, end, _ = on_tensor_cores({name: x[3:4] for name, x in arrays.items()})
    for x, y in ((o, alone), *zip(state, end, strict=True)):
        sentences.same_bits(x[3:4], y)


def test_the_order_of_threads_changes_no_bit():
    arrays, results = pairs(70), []
    for order in ("forward", "reverse", "random"):
        with on_cpu("cupy", check=False, order=order):
            results.append(rls(**arrays, backend="cupy")[0])
    for o in results[1:]:
        sentences.same_bits(o, results[0])


def test_a_cut_anywhere_carries_the_state_on():
    arrays = pairs(100)
    whole, end, _ = on_tensor_cores(arrays)
    for cut in (32, 41, 64):
        first = {name: x[:, :cut] for name, x in arrays.items()}
        rest = {name: x[:, cut:] for name, x in arrays.items()}
        o, middle, _ = on_tensor_cores(first)
        later, state, _ = on_tensor_cores(rest, initial_state=middle)
        sentences.close(np.concatenate([o, later], axis=1).astype(float), whole.astype(float), 2e-2)
        for x, y in zip(state, end, strict=True):
            sentences.close(x, y, 1e-5)


# ---- barriers --------------------------------------------------------------------------------------------------------

TEXTS = Path(_least_squares_chunks.__file__).parent
OWN = ("least_squares_begin.cu", "recursive_least_squares_tensor.cu", "covariance.cuh")


@pytest.mark.slow
@by_the_runner
def test_each_barrier_is_needed(monkeypatch):
    """In one kernel at least."""
    monkeypatch.setattr(_least_squares_chunks, "LEAST", 32)  # tokens of a piece
    own = set(re.findall(r"__syncthreads\(\);  // (.*)", "".join((TEXTS / name).read_text() for name in OWN)))
    needed_somewhere = barriers([("recursive_least_squares", pairs(160, k=40, v=40), {})], own)
    assert own <= set(needed_somewhere)
    assert [reason for reason in own if not needed_somewhere[reason]] == []
