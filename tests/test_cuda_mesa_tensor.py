"""The Mesa layer in products of bfloat16, executed on the CPU: what floats are enough for, and what is left."""

import re
from contextlib import contextmanager
from pathlib import Path

import cudaemu
import numpy as np
import pytest
import test_operators as sentences
from cudaemu import needed
from cudaemu.machines import on_cpu
from test_cuda_kernels import by_the_runner
from test_cuda_least_squares import doubled
from test_cuda_squares import barriers, inputs, run

import ttr_np
from cuda_kernels.cupy_raw import _mesa_tensor

pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:solver '.*' stopped after")]

CG = {"solver": "cg", "tolerance": 4e-4}
LAUNCHED = ["mesa_tensor", "mesa_chunks", "mesa_recall"]


def pairs(t, seed=0, gates=0.1, k=16, v=5, **sizes):
    """Keys of unit length, gates that forget slowly, some pairs without weight; data in bfloat16."""
    half = pytest.importorskip("ml_dtypes").bfloat16
    arrays = inputs("mesa", seed, t=t, k=k, v=v, **{"lead": (1,)} | sizes)
    arrays["log_decay"] = (gates * arrays["log_decay"]).astype(np.float32)
    arrays["beta"][..., ::7] = 0
    arrays["beta"] = arrays["beta"].astype(np.float32)
    return arrays | {name: arrays[name].astype(half) for name in "qkv"}


def wide(arrays):
    """The same numbers in double precision."""
    return {name: x.astype(float) for name, x in arrays.items()}


@contextmanager
def watched(monkeypatch):
    """Lists the residuals of the first of the launches once all are made, -1 where it leaves a token to the second."""
    found, known = [], _mesa_tensor.solve

    def solve(*arguments):
        made = known(*arguments)
        found.append(made["residual"])
        return made

    with monkeypatch.context() as patch:
        patch.setattr(_mesa_tensor, "solve", solve)
        yield found


def is_as_good(arrays, check=True, **options):
    """By the ratio rule: answers and states against the solver's from the same data, in single precision."""
    double = {name: doubled(x) for name, x in options.items()}
    exact, end = run("mesa", "numpy", wide(arrays), **double | {"solver": "exact", "tolerance": None})
    plain, plain_end = run("mesa", "numpy", arrays, **options)
    o, state = run("mesa", "cupy", arrays, check=check, **options)
    for x, y, z in ((o, exact, plain), *zip(state, end, plain_end, strict=True)):
        floor = 2 * np.finfo(np.float32).eps * np.abs(y).max(initial=0)
        error, plain_error = (np.abs(np.asarray(n, float) - y).max(initial=0) for n in (x, z))
        assert x.dtype == z.dtype and error <= max(2 * plain_error, floor)
    return o, state


# ---- kernels and solver ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"k": 16, "v": 5}, {"k": 40, "v": 70, "lead": (2,)}, {"k": 3, "v": 3}], ids=str)
def test_chunks_are_as_good_as_the_solver(sizes, monkeypatch):
    for t, tolerance in ((64, 4e-4), (65, None), (130, 4e-4)):
        with watched(monkeypatch) as left:
            is_as_good(pairs(t, **sizes), check=(t, sizes["k"]) == (130, 40), **CG | {"tolerance": tolerance})
        assert np.all(left[0] >= 0) and left[0].max() <= (tolerance or 6.5e-6)


@pytest.mark.slow
def test_the_largest_keys():
    is_as_good(pairs(150, k=128, v=128), check=False, **CG)


def test_a_call_takes_the_kernels_that_its_tolerance_allows():
    arrays = pairs(64)
    for options, tensor in (({}, True), ({"tolerance": 1e-7}, False), ({"tolerance": 0.0, "iterations": 3}, False)):
        with on_cpu("cupy", check=False) as machine:
            ttr_np.mesa(**arrays, **CG | options, backend="cupy")
        assert (machine.launches == LAUNCHED) == tensor


def test_calls_of_all_kinds():
    rng = np.random.default_rng(3)
    for seed, lead in enumerate([(), (2,), (2, 3), (1, 2)] * 2):
        t = int(rng.choice([64, 79, 128, 140]))
        arrays, common = pairs(t, seed, lead=lead), {}
        if lead:
            name = "kvq"[seed % 3] if len(lead) > 1 else "kv"[seed % 2]
            arrays[name] = arrays[name][..., :1, :, :] if len(lead) > 1 else arrays[name][0]
        if seed % 2:
            arrays = {name: np.asfortranarray(x) for name, x in arrays.items()}
        if seed % 3 == 0:
            common["mask"] = rng.uniform(size=(t,)) < 0.6
        if seed % 3 == 1:
            common["cu_seqlens"] = np.array([0, 1, 1, t])
        if seed % 4 < 2:
            arrays.pop("log_decay" if seed % 2 else "beta")
        if seed % 4 == 2:
            common["initial_state"] = run("mesa", "numpy", arrays)[1]
        is_as_good(arrays, check=seed % 2 == 0, **common, **CG)


def test_pieces_begin_where_the_last_ones_end():
    arrays = pairs(1600, v=70, gates=1e-3)
    for more in ({}, {"initial_state": run("mesa", "numpy", pairs(50, 1, v=70))[1]}):
        with on_cpu("cupy", check=False) as machine:
            ttr_np.mesa(**arrays, **CG, **more, backend="cupy")
        assert machine.launches == ["mesa_sums", *LAUNCHED]
        is_as_good(arrays, check=bool(more), **CG, **more)


@pytest.mark.parametrize("gate", [-np.inf, -1e4, -100.0])
def test_a_reset_costs_the_gates_after_it_nothing(gate):
    arrays = pairs(710)
    arrays["log_decay"][0, 641:680] = gate  # nearly as much as there can be before the last tokens of a chunk
    arrays["v"][0, 600:680] *= 100
    is_as_good(arrays, check=False, ridge=1e-3, **CG | {"tolerance": None})


def test_a_sequence_may_be_split_anywhere():
    arrays, state, parts = pairs(200), None, []
    o, end = run("mesa", "cupy", arrays, check=False, **CG)
    for low, high in ((0, 64), (64, 131), (131, 132), (132, 200)):
        part = {name: x[..., low:high, :] if name in "qkv" else x[..., low:high] for name, x in arrays.items()}
        answer, state = run("mesa", "cupy", part, check=False, initial_state=state, **CG)
        parts.append(answer)
    sentences.close(np.concatenate(parts, axis=-2).astype(float), o.astype(float), 1e-2)
    for x, y in zip(state, end, strict=True):
        sentences.close(x, y, 1e-6)


# ---- what single precision is not enough for -------------------------------------------------------------------------


def test_what_floats_cannot_solve_is_left_to_double_precision(monkeypatch):
    arrays = pairs(130, gates=0.01)
    arrays["k"] *= 8
    with watched(monkeypatch) as left:
        is_as_good(arrays, check=False, ridge=1e-3, **CG | {"tolerance": 2e-6})
    assert np.any(left[0] < 0)
    with watched(monkeypatch) as left:
        is_as_good(arrays, ridge=0.0, **CG)
    assert np.any(left[0] < 0)


def test_squares_that_are_no_floats_are_left_to_double_precision(monkeypatch):
    arrays = pairs(70)
    arrays["q"][0, 3] *= 1e-25
    arrays["q"][0, 4] *= 1e25
    arrays["q"][0, 5] = 0
    with watched(monkeypatch) as left:
        o, _ = run("mesa", "cupy", arrays, **CG)
    assert np.flatnonzero(left[0][0] < 0).tolist() == [3, 4] and left[0][0, 5] == 0
    wanted, _ = run("mesa", "numpy", wide(arrays))
    for token in (3, 4, 5):
        np.testing.assert_allclose(o[0, token].astype(float), wanted[0, token], rtol=0.01, atol=0)


def test_a_limit_on_the_steps_is_reported():
    arrays, options = pairs(70), CG | {"ridge": 1e-3, "iterations": 2, "tolerance": 1e-4}
    words = "solver 'cg' stopped after 2 iterations at a relative residual of .*, above the tolerance 1"
    with pytest.warns(RuntimeWarning, match=words):
        o, _ = run("mesa", "cupy", arrays, **options)
    wanted, _ = run("mesa", "numpy", wide(arrays), **options)
    sentences.close(o.astype(float), wanted, 1e-2)


# ---- what must not change a bit --------------------------------------------------------------------------------------


def test_bits_depend_on_no_neighbour_and_no_order():
    arrays = pairs(140, lead=(5,))
    o, state = run("mesa", "cupy", arrays, check=False, **CG)
    alone, end = run("mesa", "cupy", {name: x[3:4] for name, x in arrays.items()}, check=False, **CG)
    sentences.same_bits(o[3:4], alone)
    for x, y in zip(state, end, strict=True):
        sentences.same_bits(x[3:4], y)
    for order in ("reverse", "random"):
        with on_cpu("cupy", check=False, order=order):
            sentences.same_bits(ttr_np.mesa(**arrays, **CG, backend="cupy"), o)


def test_what_comes_later_changes_no_bit():
    arrays, options = pairs(100), CG | {"ridge": 0.01}
    o, _ = run("mesa", "cupy", arrays, check=False, **options)
    for t in (5, 40, 90):
        later = {name: x.copy() for name, x in arrays.items()}
        for name in "qkv":
            later[name][:, t:] *= 3
        later["log_decay"][:, t + 1 :] = -0.5
        changed, _ = run("mesa", "cupy", later, check=False, **options)
        sentences.same_bits(changed[:, :t], o[:, :t])


@pytest.mark.parametrize("t, place, reset", [(130, 0, 130), (130, 31, 40), (130, 70, 71), (1100, 700, 800)])
@pytest.mark.parametrize("name", ["k", "v", "q"])
def test_a_bad_number_spoils_what_the_solver_spoils(name, t, place, reset):
    arrays = pairs(t, v=4)
    arrays["beta"][..., place] = 0.5
    arrays["log_decay"][..., reset:][..., :1] = -np.inf
    arrays[name][0, place, 1] = np.nan if place % 2 else np.inf
    with np.errstate(invalid="ignore", over="ignore"):
        wanted, end = run("mesa", "numpy", arrays, **CG)
    o, state = run("mesa", "cupy", arrays, check=t == 130, **CG)
    for x, y, tolerance in ((o, wanted, 2e-2), *((x, y, 1e-5) for x, y in zip(state, end, strict=True))):
        x, y = x.astype(float), y.astype(float)
        good = np.isfinite(y)
        assert np.array_equal(np.isfinite(x), good)
        sentences.close(x[good], y[good], tolerance)


def test_a_pair_without_weight_is_not_looked_at():
    arrays = pairs(100)
    o, _ = run("mesa", "cupy", arrays, check=False, **CG)
    for name in "kv":
        arrays[name][0, ::7] = np.nan
    changed, _ = run("mesa", "cupy", arrays, check=False, **CG)
    sentences.same_bits(changed, o)


# ---- barriers --------------------------------------------------------------------------------------------------------


def spoilt():
    """A bad number and a reset in the middle of a chunk, queries that share a memory, one of them left."""
    arrays = pairs(300, k=24, v=8)
    arrays["v"][0, 90, 1] = arrays["k"][0, 100, 1] = np.nan
    arrays["q"] = np.concatenate([arrays["q"], arrays["q"][..., ::-1, :]])
    arrays["log_decay"][0, [120, 280]] = -np.inf
    return arrays


TEXTS = Path(_mesa_tensor.__file__).parent
OWN = ("mesa_tensor.cuh", "mesa_tensor.cu", "mesa_sums.cu", "mesa_recall.cu")


@pytest.mark.slow
@by_the_runner
def test_each_barrier_is_needed(monkeypatch):
    """In one kernel at least."""
    monkeypatch.setattr(_mesa_tensor, "LEAST", 64)  # tokens of a piece
    own = set(re.findall(r"__syncthreads\(\);  // (.*)", "".join((TEXTS / name).read_text() for name in OWN)))
    needed_somewhere = barriers([("mesa", spoilt(), CG)], own)
    assert own <= set(needed_somewhere)
    assert [reason for reason in own if not needed_somewhere[reason]] == []
