"""The compiled test-time training against its solver, over memories, losses, momentum and mini-batches."""

from dataclasses import dataclass

import numpy as np
import pytest

from ttr_np.backends import resolve_backend
from ttr_np.memories import MLP, EntropyRetention, Huber, Linear, PNorm
from ttr_np.notation import draw
from ttr_np.numba_cpu.test_time_training import test_time_training as kernel
from ttr_np.solvers import test_time_training as module

both = ("momentum", "weight_decay")
scale = np.random.default_rng(0).uniform(0.5, 1.5, (2, 4))
CASES = {
    "linear": (Linear(), (), 16),
    "TTT-Linear": (Linear(bias=True, layer_norm=True, residual=True, scale=scale[0], offset=scale[1]), (), 16),
    "linear, all": (Linear(bias=True), both, 7),
    "MLP": (MLP(layer_norm=True, residual=True), ("weight_decay",), 16),
    "Titans": (MLP(9, 3, "silu"), both, 5),
    "token by token": (MLP(activation="relu", bias=False), both, 1),
    "one long batch": (MLP(activation="tanh", loss=Huber(0.5)), ("momentum",), 1000),
    "each error by itself": (Linear(loss=Huber(0.3, coordinatewise=True)), ("momentum",), 4),
    "cubes": (Linear(loss=PNorm(3.0)), (), 8),
}
every_case = pytest.mark.parametrize("case", CASES)


def inputs(case, lead=(2, 3), dtype=np.float64, **sizes):
    rng = np.random.default_rng(0)
    x = draw(
        "test_time_training", rng, optional=CASES[case][1], lead=lead, dtype=dtype, **{"t": 70, "k": 4, "v": 4} | sizes
    )
    x["step_size"] = x["step_size"] * dtype(0.3)
    return x


def options(case):
    return {"memory": CASES[case][0], "batch_size": CASES[case][2]}


def solver(case, arrays, **more):
    form, module.chunked = module.chunked, module.recurrent
    try:
        return module.test_time_training(**arrays, **options(case), **more)
    finally:
        module.chunked = form


def run(case, arrays, **more):
    return kernel(**arrays, **options(case), **more)


def cut(arrays, low, high):
    return {name: x[..., low:high, :] if name in "qkv" else x[..., low:high] for name, x in arrays.items()}


def same(states, others):
    for x, y in zip(states, others, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@every_case
@pytest.mark.parametrize("t", [0, 1, 2, 17, 70, 150])
def test_the_kernel_is_the_descent(case, t):
    x = inputs(case, t=t)
    mask = np.random.default_rng(1).uniform(size=(2, 3, t)) < 0.7
    for more in ({}, {"mask": mask}):
        (o, state), (exact, last) = (f(case, x, output_final_state=True, **more) for f in (run, solver))
        np.testing.assert_allclose(o, exact, rtol=1e-10, atol=1e-12)
        same(state, last)


@every_case
def test_a_sequence_may_be_cut_anywhere_and_packed(case):
    x = inputs(case)
    whole, last = run(case, x, output_final_state=True)
    state, pieces = None, []
    for low, high in ((0, 0), (0, 1), (1, 40), (40, 41), (41, 70)):
        piece, state = run(case, cut(x, low, high), initial_state=state, output_final_state=True)
        pieces.append(piece)
    np.testing.assert_allclose(np.concatenate(pieces, axis=-2), whole, rtol=1e-10, atol=1e-12)
    same(state, last)
    packed = run(case, x, cu_seqlens=[0, 0, 33, 34, 70])
    for low, high in ((0, 33), (33, 34), (34, 70)):
        assert np.array_equal(packed[..., low:high, :], run(case, cut(x, low, high)))


@every_case
def test_layout_company_and_repetition_change_no_bit(case):
    x = inputs(case)
    o = run(case, x)
    assert np.array_equal(o, run(case, x))
    for i in np.ndindex(2, 3):
        assert np.array_equal(o[i], run(case, {name: a[i] for name, a in x.items()}))
    views = dict(x)
    for name in "qkv":
        views[name] = np.empty((70, 8, 3, 2))[::-1, ::2].transpose(3, 2, 0, 1)
        views[name][...] = x[name]
    assert np.array_equal(o, run(case, views))
    grouped = {name: a[:, :, None] for name, a in x.items()}
    grouped["q"] = np.stack([x["q"], 2 * x["q"]], axis=2)
    assert np.array_equal(run(case, grouped)[:, :, 0], o)


@every_case
def test_the_future_and_bad_numbers_reach_only_what_they_must(case):
    x = inputs(case)
    clean = run(case, x)
    for name in x:
        later, bad = ({**x, name: x[name].copy()} for _ in range(2))
        later[name][(..., slice(40, None), slice(None)) if name in "qkv" else (..., slice(40, None))] *= 0.5
        assert np.array_equal(run(case, later)[..., :40, :], clean[..., :40, :])
        bad[name][(1, 0, 40, 2) if name in "qkv" else (1, 0, 40)] = np.nan
        with np.errstate(all="ignore"):
            o, expected = run(case, bad), solver(case, bad)
        assert np.array_equal(o[..., :40, :], clean[..., :40, :])
        assert np.array_equal(o[0], clean[0])
        assert np.array_equal(np.isnan(o), np.isnan(expected))


@every_case
def test_single_precision_is_as_good_as_the_solvers(case):
    x, single = inputs(case), inputs(case, dtype=np.float32)
    exact = solver(case, x)
    size = max(1.0, np.abs(exact).max())
    assert run(case, single).dtype == np.float32
    ours, theirs = (np.abs(f(case, single) - exact).max() / size for f in (run, solver))
    assert ours < 2 * theirs + 1e-6


def test_memories_of_several_starts_and_other_sizes():
    rng = np.random.default_rng(0)
    memory = Linear(initial=[(rng.standard_normal((3, 1, 5, 2)), None)])
    x = draw("test_time_training", rng, lead=(4,), t=20, k=5, v=2)
    expected = module.test_time_training(**x, memory=memory, batch_size=8)
    np.testing.assert_allclose(kernel(**x, memory=memory, batch_size=8), expected, rtol=1e-12, atol=1e-13)


@dataclass(frozen=True)
class Mine:
    def value(self, error):
        return error.sum(-1)

    def gradient(self, error):
        return np.ones_like(error)


def test_what_cannot_be_compiled_is_said_and_auto_takes_the_solver():
    x = draw("test_time_training", np.random.default_rng(0), t=5)
    for memory, name in (
        (Linear(loss=Mine()), "loss Mine"),
        (Linear(retention=EntropyRetention()), "retention Entropy"),
    ):
        with pytest.raises(NotImplementedError, match=f"cannot compile the {name}"):
            kernel(**x, memory=memory)
        import ttr_np

        expected = module.test_time_training(**x, memory=memory)
        assert np.array_equal(ttr_np.test_time_training(**x, memory=memory), expected)
    assert resolve_backend("test_time_training") == "numba"
