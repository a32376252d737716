"""Exact least squares and test-time training on both GPU backends, executed on the CPU: what is special about them."""

import re
import warnings
from functools import partial

import cudaemu
import numpy as np
import pytest
import test_operators as sentences
from cudaemu import needed
from cudaemu.machines import PACKAGES, on_cpu
from test_cuda_kernels import by_the_runner

import ttr_np
from ttr_np.backends import has_operator
from ttr_np.memories import MLP, Huber, Linear, LqRetention, PNorm
from ttr_np.notation import OPERATORS, draw

pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:solver '.*' stopped after")]

GPU = [backend for backend in PACKAGES if backend == "cupy" or not cudaemu.numba_cuda()]
on_gpu = pytest.mark.parametrize("backend", GPU)
SQUARES = ("recursive_least_squares", "mesa", "kernel_ridge", "test_time_training")
NETWORK = MLP(hidden=6, layer_norm=True, loss=Huber(0.5))
OPTIONS = {
    "recursive_least_squares": [{"ridge": 0.3}],
    "mesa": [{"ridge": 0.3}, {"solver": "cg", "tolerance": 1e-9}, {"solver": "chebyshev", "iterations": 9}],
    "kernel_ridge": [{"ridge": 0.2}, {"kernel": "exponential", "causal": False}, {"kernel": "polynomial"}],
    "test_time_training": [{"memory": Linear(bias=True, layer_norm=True, residual=True)}, {"memory": NETWORK}],
}
MORE_MEMORIES = [
    MLP(hidden=4, depth=3, activation="silu", loss=PNorm(3.0)),
    MLP(hidden=4, activation="tanh", loss=Huber(0.5, coordinatewise=True)),
    MLP(hidden=4, depth=1, bias=False),
    MLP(hidden=7, activation="relu", layer_norm=True, residual=True, scale=np.full(5, 1.5), offset=np.full(5, 0.1)),
]
EACH = [(operator, options) for operator in SQUARES for options in OPTIONS[operator]]
each = pytest.mark.parametrize("operator, options", EACH, ids=lambda x: str(x)[:30])


def inputs(operator, seed=0, optional=None, **options):
    """Random arguments with every optional array."""
    optional = OPERATORS[operator].optional if optional is None else optional
    sizes = {"v": 5} | options  # a residual wants values of the size of keys
    return draw(operator, np.random.default_rng(seed), optional=optional, per_channel=False, **sizes)


def run(operator, backend, arrays, check=True, **options):
    """Answers and state."""
    door = partial(getattr(ttr_np, operator), output_final_state=True, backend=backend)
    if backend == "numpy":
        return door(**arrays, **options)
    with on_cpu(backend, check=check):
        return door(**arrays, **options)


def test_both_backends_have_exact_least_squares_and_training():
    for backend in PACKAGES:
        assert all(has_operator(backend, operator) for operator in SQUARES)


# ---- kernels and solvers ---------------------------------------------------------------------------------------------


def fuzzed(operator, seed):
    """Sizes, groups, masks, boundaries and states of all kinds; keys of one size, for which kernels are built."""
    rng = np.random.default_rng(seed)
    t, v = int(rng.choice([1, 2, 3, 4, 5, 15, 16, 17, 23])), 5
    lead = [(), (2,), (2, 3), (1, 2)][rng.integers(4)]
    optional = tuple(name for name in OPERATORS[operator].optional if rng.integers(2))
    arrays = inputs(operator, seed, optional, t=t, v=v, lead=lead)
    common = {}
    if lead and rng.integers(2):  # keys shared by queries, or one array for all
        name = rng.choice(["k", "v", "q"])
        arrays[name] = arrays[name][..., :1, :, :] if len(lead) > 1 else arrays[name][0]
    if rng.integers(2):
        common["mask"] = rng.uniform(size=lead[-1:] + (t,)) < 0.6
    if rng.integers(2):
        common["cu_seqlens"] = np.sort(np.r_[0, rng.integers(0, t + 1, rng.integers(4)), t])
    if rng.integers(2):
        arrays = {name: np.asfortranarray(x) if x.ndim > 1 else x for name, x in arrays.items()}
    return arrays, common


def calls():
    """Numba compiles each kernel for seconds: exact least squares and ridges always, others with the slow tests."""
    for backend in GPU:
        for operator, options in EACH:
            usual = options is OPTIONS[operator][0] and operator != "test_time_training"
            slow = backend == "numba-cuda" and not usual
            yield pytest.param(operator, options, backend, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("operator, options, backend", list(calls()), ids=lambda x: str(x)[:30])
def test_any_call_is_that_of_the_solver(operator, options, backend):
    for seed in range(30):
        arrays, common = fuzzed(operator, seed)
        batch = {"batch_size": 1 + seed % 5} if operator == "test_time_training" else {}
        wanted, end = run(operator, "numpy", arrays, **options, **batch, **common)
        o, state = run(operator, backend, arrays, check=seed % 4 == 0, **options, **batch, **common)
        sentences.close(o, wanted, 1e-8 if "solver" in options else 1e-10)
        case = sentences.Case(operator, backend, (), False, options)
        sentences.same_state(case, state, end, lambda x, y: sentences.close(x, y, 1e-9))


@pytest.mark.parametrize("memory", MORE_MEMORIES, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("backend", [b if b == "cupy" else pytest.param(b, marks=pytest.mark.slow) for b in GPU])
def test_every_kind_of_memory_learns(memory, backend):
    for batch_size in (1, 3, 100):
        arrays = inputs("test_time_training", t=17, lead=(2,))
        wanted, end = run("test_time_training", "numpy", arrays, memory=memory, batch_size=batch_size)
        o, state = run("test_time_training", backend, arrays, memory=memory, batch_size=batch_size)
        sentences.close(o, wanted, 1e-11)
        for x, y in zip(state, end, strict=True):
            sentences.close(x, y, 1e-11)


LONG = {"kernel_ridge": 256}  # its factor holds the squares of so many tokens; the runner takes minutes for 4096


@pytest.mark.slow
@each
@on_gpu
def test_long_sequences_in_single_precision_are_as_good_as_the_solvers(operator, options, backend):
    arrays = inputs(operator, t=LONG.get(operator, 4096), k=8, v=8, dtype=np.float32)
    exact, end = run(operator, "numpy", {name: x.astype(float) for name, x in arrays.items()}, **options)
    plain, plain_end = run(operator, "numpy", arrays, **options)
    o, state = run(operator, backend, arrays, check=False, **options)
    for x, y, z in ((o, exact, plain), *zip(state, end, plain_end, strict=True)):
        floor = 2 * np.finfo(np.float32).eps * np.abs(y).max(initial=0)
        assert np.abs(x - y).max(initial=0) <= max(2 * np.abs(z - y).max(initial=0), floor)


@pytest.mark.slow
@each
@pytest.mark.parametrize("k", [3, 59, 130])
def test_sizes_that_hurt(operator, options, k):
    arrays = inputs(operator, t=18, k=k, v=k, lead=(2,))
    wanted, end = run(operator, "numpy", arrays, **options)
    o, state = run(operator, "cupy", arrays, **options)
    sentences.close(o, wanted, 1e-8 if "solver" in options else 1e-10)
    case = sentences.Case(operator, "cupy", (), False, options)
    sentences.same_state(case, state, end, partial(sentences.close, tol=1e-9))


# ---- recursive least squares -----------------------------------------------------------------------------------------


@on_gpu
def test_directions_without_keys_do_not_wind_up(backend):
    t = 400
    arrays = inputs("recursive_least_squares", t=t, k=4, v=2, optional=())
    arrays["k"][10:350] *= [1, 1, 0, 0]  # forgotten for hundreds of steps, then excited again
    arrays["q"] = arrays["k"]
    arrays["log_decay"] = np.full(t, np.log(0.5))
    wanted, end = run("recursive_least_squares", "numpy", arrays)
    o, (S, P) = run("recursive_least_squares", backend, arrays, check=False)
    assert np.all(np.isfinite(o)) and np.all(np.linalg.eigvalsh(P) > 0) and np.array_equal(P, P.T)
    sentences.close(o, wanted, 1e-6)
    _, middle = run("recursive_least_squares", backend, {n: x[:350] for n, x in arrays.items()}, check=False)
    values = np.linalg.eigvalsh(middle.P)
    assert values[-1] <= 1.01 * np.finfo(float).eps ** (-2 / 3) * values[0]


@on_gpu
@pytest.mark.parametrize("gate, tolerance", [(-1.5, 2e-12), (-1e4, 1e-6)])
def test_steep_gates_forget_what_the_solver_forgets(gate, tolerance, backend):
    arrays = inputs("recursive_least_squares", t=64, k=4)
    arrays["q"] = arrays["k"]
    arrays["log_decay"][slice(5, 60) if gate > -60 else 20] = gate
    wanted, (_, end) = run("recursive_least_squares", "numpy", arrays)
    o, (_, P) = run("recursive_least_squares", backend, arrays, check=False)
    sentences.close(o, wanted, tolerance)
    sentences.close(P, end, tolerance)


@on_gpu
def test_a_covariance_is_checked(backend):
    arrays = inputs("recursive_least_squares", lead=(2,), k=3, v=5)
    S = np.zeros((2, 3, 5))
    skew, negative, whole = np.eye(3), np.diag([1.0, -1.0, 1.0]), np.stack([np.eye(3), np.full((3, 3), np.nan)])
    skew[0, 1] = 0.5
    for P, words in ((skew, "must be symmetric"), (negative, "must be positive definite")):
        with pytest.raises(ValueError, match=f"initial_state field P {words}"):
            run("recursive_least_squares", backend, arrays, initial_state=(S, np.stack([np.eye(3), P])))
    o, (_, P) = run("recursive_least_squares", backend, arrays, initial_state=(S, whole))
    assert np.all(np.isfinite(o[0])) and np.all(np.isnan(o[1])) and np.all(np.isnan(P[1]))
    sentences.same_bits(o[0], run("recursive_least_squares", backend, {n: x[0] for n, x in arrays.items()})[0])


@on_gpu
def test_a_pair_without_weight_is_not_looked_at(backend):
    for operator in ("recursive_least_squares", "mesa"):
        arrays = inputs(operator, t=6, k=3, optional=("beta",))
        arrays["beta"][2] = 0
        o, state = run(operator, backend, arrays)
        spoilt = arrays | {name: arrays[name].copy() for name in "kv"}
        spoilt["k"][2], spoilt["v"][2] = np.nan, np.inf
        found, after = run(operator, backend, spoilt)
        sentences.same_bits(found, o)
        for x, y in zip(after, state, strict=True):
            sentences.same_bits(x, y)


# ---- mesa ------------------------------------------------------------------------------------------------------------


def steps(backend, gate, tolerance=1e-6, t=40):
    """How many steps of conjugate gradients all tokens need."""
    arrays = inputs("mesa", t=t, k=12, optional=())
    arrays["log_decay"] = np.full(t, gate)
    for limit in range(1, 40):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run("mesa", backend, arrays, False, solver="cg", ridge=0.1, iterations=limit, tolerance=tolerance)
        if not told:
            return limit
    return np.inf


def test_the_factor_of_one_token_serves_those_that_follow():
    assert steps("cupy", 0.0) == 1
    assert steps("cupy", np.log(0.998)) <= 4
    assert steps("cupy", np.log(0.98)) <= 8
    assert steps("cupy", np.log(0.5)) <= 12
    assert steps("numpy", np.log(0.98)) > 8


@on_gpu
def test_a_limit_on_the_steps_is_reported(backend):
    arrays = inputs("mesa", t=9, k=12, optional=("log_decay",))
    for solver in ("cg", "chebyshev") if backend == "cupy" else ("chebyshev",):
        words = f"solver '{solver}' stopped after 2 iterations at a relative residual of .*, above the tolerance 1"
        with pytest.warns(RuntimeWarning, match=words) as warned:
            o, _ = run("mesa", backend, arrays, solver=solver, ridge=1e-3, iterations=2, tolerance=1e-12)
        assert warned[0].filename == __file__  # the caller, not the backend
        assert np.all(np.isfinite(o))


@on_gpu
@pytest.mark.parametrize("t", [9, 40])
@pytest.mark.parametrize("solver", ["exact", "cg", "chebyshev"])
def test_a_decay_that_is_zero_in_single_precision_forgets_even_a_nan(solver, t, backend):
    arrays = {name: x.astype(np.float32) for name, x in inputs("mesa", t=t, lead=(1,)).items()}
    for gate, forgets in ((-100, False), (-200, True)):
        arrays["log_decay"][..., 6] = gate
        arrays["k"][..., 2, 1] = np.nan
        with np.errstate(invalid="ignore"):
            wanted, end = run("mesa", "numpy", arrays, solver=solver)
        o, state = run("mesa", backend, arrays, check=False, solver=solver)
        assert np.isfinite(wanted[..., 6:, :]).all() == forgets
        for x, y in ((o, wanted), *zip(state, end, strict=True)):
            assert np.array_equal(np.isfinite(x), np.isfinite(y))
            sentences.close(np.nan_to_num(x), np.nan_to_num(y), 1e-3)


@on_gpu
@pytest.mark.parametrize("ridge", [1.0, 0.0])
@pytest.mark.parametrize("factor", [1e120, 1e-120])
def test_numbers_whose_fourth_power_overflows_are_numbers_like_others(factor, ridge, backend):
    arrays = inputs("mesa", t=9, lead=(1,))
    arrays["k"] *= factor
    wanted, _ = run("mesa", "numpy", arrays, ridge=ridge)
    o, _ = run("mesa", backend, arrays, ridge=ridge)
    sentences.close(o / np.abs(wanted).max(), wanted / np.abs(wanted).max(), 1e-8)


def test_a_ridge_lost_in_rounding_says_which_solution():
    for ridge in (0.0, 1e-200, np.array([0.0, 1e-3, 1.0, 1.0, 1e-3])):
        for units in (np.ones(5), np.array([1e-5, 1e-3, 1.0, 1e3, 1e5])):
            arrays = inputs("mesa", t=7, lead=(2,), optional=())
            arrays["k"][:, 3] = arrays["k"][:, 2]
            arrays["k"] *= units
            arrays["q"] *= units
            if np.ndim(ridge) == 0 < ridge or units[0] == 1:  # else it is rounding that says what counts as zero
                wanted, _ = run("mesa", "numpy", arrays, ridge=ridge * units**2)
                o, _ = run("mesa", "cupy", arrays, ridge=ridge * units**2)
                sentences.close(o, wanted, 1e-6)


def test_channels_of_any_size_are_told_apart_without_a_ridge_to_speak_of():
    arrays, units = inputs("mesa", t=9, optional=()), np.array([1e-5, 1e-3, 1.0, 1e3, 1e5])
    wanted, _ = run("mesa", "numpy", arrays, ridge=1e-9)
    o, _ = run("mesa", "cupy", arrays | {"k": units * arrays["k"], "q": units * arrays["q"]}, ridge=1e-20)
    sentences.close(o[6:], wanted[6:], 1e-6)  # as many pairs as channels, and more


# ---- what is refused -------------------------------------------------------------------------------------------------


class Own:
    """A memory of somebody's own."""

    parameters = None


@on_gpu
def test_what_has_no_kernel_is_said(backend):
    pairs, asked = inputs("mesa", t=3, lead=(1,), optional=()), np.ones((4, 3, 5))
    training, ridge = inputs("test_time_training", t=3), inputs("kernel_ridge", t=3)
    refused = [
        ("mesa", pairs | {"q": asked}, {"ridge": np.ones((4, 5))}, "'mesa' whose ridge differs among queries"),
        ("test_time_training", training, {"memory": Linear(retention=LqRetention())}, "LqRetention: it has L2"),
        ("test_time_training", training, {"memory": Own()}, "memory Own: it has Linear, MLP"),
        ("kernel_ridge", ridge, {"kernel": lambda x, y: x @ y.T}, "function given as kernel: it has gaussian"),
    ]
    for operator, arrays, options, words in refused:
        with pytest.raises(NotImplementedError, match=f"backend '{backend}' .*{words}"):
            run(operator, backend, arrays, **options)


@on_gpu
def test_keys_that_repeat_need_a_ridge(backend):
    arrays = inputs("kernel_ridge", t=4)
    arrays["k"][2] = arrays["k"][1]
    with pytest.raises(np.linalg.LinAlgError, match="keys repeat"):
        run("kernel_ridge", backend, arrays, ridge=0.0)
    once = {"ridge": 0.0, "mask": np.array([True, True, False, True])}
    sentences.close(run("kernel_ridge", backend, arrays, **once)[0], run("kernel_ridge", "numpy", arrays, **once)[0])


# ---- barriers --------------------------------------------------------------------------------------------------------

BARRIER = r"__syncthreads\(\);"


class Switched:
    """A kernel that may leave out one barrier, and why each of its barriers is there."""

    def __init__(self, text, name, check=True):
        self.kernel = cudaemu.source(cudaemu.switched(text, BARRIER), name, check)
        self.reasons = re.findall(rf"{BARRIER}  // (.*)", text)
        assert len(self.reasons) == len(re.findall(BARRIER, text))
        self.left_out = -1

    def __call__(self, *launch, **options):
        self.kernel(*launch, **options, left_out=self.left_out)


def uneven():
    """A covariance that calls for a cap before the first pair and at the end, and tokens enough for several chunks."""
    arrays = inputs("recursive_least_squares", t=40, k=40)
    turned = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 40)))[0]
    P = (turned * np.r_[1e14, 1e4, np.full(38, 10.0)]) @ turned.T
    return arrays, {"initial_state": (np.zeros((40, 5)), (P + P.T) / 2)}


WIDE = {"memory": MLP(hidden=40, layer_norm=True, loss=Huber(0.5)), "batch_size": 2}
SCENES = [
    ("recursive_least_squares", *uneven()),
    ("mesa", inputs("mesa", t=3, k=40), {}),
    ("mesa", inputs("mesa", t=2, k=33), {"ridge": 0.0}),
    ("mesa", inputs("mesa", t=10, k=40), {"solver": "cg", "ridge": 0.1}),
    ("mesa", inputs("mesa", t=3, k=40), {"solver": "chebyshev"}),
    ("kernel_ridge", inputs("kernel_ridge", t=40), {}),
    ("test_time_training", inputs("test_time_training", t=3, k=40, v=40), WIDE),
    ("test_time_training", inputs("test_time_training", t=3, k=40, v=40), {"memory": Linear()}),
]


@pytest.mark.slow
@by_the_runner
def test_each_barrier_is_needed():
    """In one kernel at least: what blocks share is not needed by all."""
    needed_somewhere = barriers(SCENES)
    assert len(needed_somewhere) > 30
    assert [reason for reason, caught in needed_somewhere.items() if not caught] == []


def barriers(scenes, wanted=None):
    """Of each reason for a barrier, or of those wanted, whether a scene goes wrong without one."""
    needed_somewhere = {}
    for operator, arrays, options in scenes:
        with on_cpu("cupy") as machine:
            built = {}
            machine.build = partial(switched, built)
            play = partial(getattr(ttr_np, operator), **arrays, **options, backend="cupy")
            play()
            for kernel in list(built.values()):
                for number, reason in enumerate(kernel.reasons):
                    kernel.left_out = number
                    if not needed_somewhere.get(reason) and (wanted is None or reason in wanted):
                        needed_somewhere[reason] = faults(play)
                kernel.left_out = -1
    return needed_somewhere


def switched(built, *key):
    """A kernel, built once."""
    if key not in built:
        built[key] = Switched(*key)
    return built[key]


def faults(play):
    """Whether a call reads or writes what others have not left."""
    try:
        play()
    except (cudaemu.RaceFault, cudaemu.UnsetFault):
        return True
    return False
