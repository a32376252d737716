"""The kernels of both GPU backends, executed on the CPU: the sentences of all operators, and those about kernels."""

import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import cudaemu
import numpy as np
import pytest
import test_operators as sentences
from cudaemu import needed
from cudaemu.machines import PACKAGES, on_cpu
from test_operators import Case

import ttr_np
from cuda_kernels.cupy_raw import _tiles
from ttr_np import memories
from ttr_np.backends import has_operator
from ttr_np.notation import OPERATORS, STATES, CacheState, draw

pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:overflow encountered")]
pytestmark += [pytest.mark.filterwarnings("ignore:solver '.*' stopped after")]

GPU = [backend for backend in PACKAGES if backend == "cupy" or not cudaemu.numba_cuda()]
OPTIONS = {"linear_attention": [{"scale": 0.3}, {"normalize": True}], "short_convolution": [{"activation": "silu"}]}
OPTIONS |= {name: [{"scale": 0.3}] for name in ("delta_rule", "dplr")}
OPTIONS |= {"softmax_attention": [{}, {"window": 3, "sinks": 1, "scale": 4.0}]}
OPTIONS |= {"local_polynomial": [{"ridge": 0.1}, {"degree": 0, "kernel": "epanechnikov", "bandwidth": 1.5}]}
SQUARES = ("recursive_least_squares", "mesa", "kernel_ridge", "test_time_training")  # more in test_cuda_squares.py
OPTIONS |= {name: sentences.OPTIONS[name] for name in SQUARES}
OPTIONS["mesa"] = [{"tolerance": 1e-13} | options if "solver" in options else options for options in OPTIONS["mesa"]]


def cases() -> list[Case]:
    """All operators that the GPU backends have: each option, with no optional array and with all of them.

    Numba compiles each option of exact least squares for seconds: here one with all arrays, the others in
    ``test_cuda_squares``.
    """
    found = []
    for backend in GPU:
        for operator in filter(partial(has_operator, backend), OPERATORS):
            every = OPERATORS[operator].optional
            given, slow = OPTIONS.get(operator, [{}]), backend == "numba-cuda" and operator in SQUARES
            for options in given[:1] if slow else given:
                for optional in {every: 0} if slow else {(): 0, every: 0}:
                    per_channel = "log_decay" in optional and operator in sentences.GATE_PER_CHANNEL
                    found.append(Case(operator, backend, optional, per_channel, options))
    return found


def marked(case: Case) -> Any:
    """Numba compiles a kernel of exact least squares for seconds; ``test_cuda_squares`` has a few of each."""
    slow = case.backend == "numba-cuda" and case.operator in SQUARES
    return pytest.param(case, marks=pytest.mark.slow, id=str(case)) if slow else pytest.param(case, id=str(case))


CASES = cases()
every_case = pytest.mark.parametrize("case", [marked(case) for case in CASES])
PAIRS = sorted({(c.backend, c.operator) for c in CASES if c.operator not in SQUARES})
of_operators = pytest.mark.parametrize("backend, operator", PAIRS)
of_far_operators = pytest.mark.parametrize("backend, operator", PAIRS + [("cupy", operator) for operator in SQUARES])


@pytest.fixture
def machine(request):
    """The backend of the case launches here, every load and store looked at."""
    case = request.node.callspec.params.get("case")
    with on_cpu(case.backend if case else request.node.callspec.params["backend"]) as here:
        yield here


@pytest.fixture(autouse=True)
def token_by_token(monkeypatch):
    """Recurrences, however long the sequence; test_cuda_chunks.py is about the other form."""
    monkeypatch.setattr(_tiles, "CHUNKED_FROM", 10**9)


def fast(case):
    """The same machine without a look at every access."""
    return on_cpu(case.backend, check=False)


def test_both_backends_have_the_recurrent_scans():
    wanted = set("linear_attention delta_rule dplr diagonal_scan selective_scan short_convolution".split())
    for backend in PACKAGES:
        assert {operator for operator in OPERATORS if has_operator(backend, operator)} >= wanted


# ---- what holds for every operator on every backend ------------------------------------------------------------------

SENTENCES = [
    partial(sentences.test_any_cut_of_the_sequence_changes_nothing, t=9),
    partial(sentences.test_a_bad_number_reaches_neither_the_past_nor_other_sequences, bad=np.nan),
    partial(sentences.test_a_bad_number_reaches_neither_the_past_nor_other_sequences, bad=np.inf),
    sentences.test_a_masked_token_is_as_if_removed,
    partial(sentences.test_what_stands_under_the_mask_is_never_read, hidden=np.nan),
    sentences.test_a_masked_query_is_still_answered,
    partial(sentences.test_packed_sequences_are_separate_calls, started=True),
    sentences.test_no_packed_sequence_at_all,
    sentences.test_groups_of_queries_share_a_memory,
    sentences.test_leading_axes_broadcast,
    *(partial(sentences.test_the_layout_of_memory_does_not_matter, layout=name) for name in sentences.LAYOUTS),
    sentences.test_nothing_of_the_caller_is_written_to,
    sentences.test_no_time_at_all_leaves_the_state,
    sentences.test_dtype_in_is_dtype_out,
    *(partial(sentences.test_halves_are_computed_in_float32, name=name) for name in sentences.HALVES),
    partial(sentences.test_gates_are_never_rounded_to_the_data, name="bfloat16"),
    sentences.test_integers_are_numbers,
    sentences.test_lists_and_numbers_are_arrays,
]


def title(sentence):
    if isinstance(sentence, partial):
        return "-".join([sentence.func.__name__[5:], *map(str, sentence.keywords.values())])
    return sentence.__name__[5:]


def rounds_weights(case):
    """Whether data of 16 bits take the way over tensor cores; test_cuda_attention.py says how exact that is."""
    return (case.operator, case.backend) == ("softmax_attention", "cupy")


@every_case
@pytest.mark.parametrize("sentence", SENTENCES, ids=title)
def test_the_operators_keep_their_word(case, sentence):
    if rounds_weights(case) and ("float32" in title(sentence) or "rounded" in title(sentence)):
        return
    with fast(case):
        sentence(case)


@every_case
def test_the_future_changes_no_bit_of_the_past(case, machine):
    arrays, other = case.draw(t=30), case.draw(seed=1, t=30)
    changed = sentences.join(case, sentences.cut(case, arrays, slice(0, 11)), sentences.cut(case, other, slice(11, 30)))
    sentences.same_bits(case(changed)[..., :11, :], case(arrays)[..., :11, :])


@every_case
@pytest.mark.parametrize("gate", [-np.inf, -1e30, -1e4])
def test_a_full_reset_costs_the_gates_after_it_nothing(case, gate):
    if "log_decay" in case.draw(t=1):
        with fast(case):
            sentences.test_a_full_reset_costs_the_gates_after_it_nothing(case, gate)


@every_case
def test_a_full_reset_forgets_even_a_bad_number(case, machine):
    arrays = case.draw(t=9)
    if "log_decay" not in arrays or case.operator not in sentences.FORGETS:
        return
    if {"sinks", "bandwidth"} & set(case.options):
        return  # sinks count from the first token of all, and not every query looks at a kernel's whole width
    name = "x" if "x" in arrays else "v"
    arrays |= {name: arrays[name].copy(), "log_decay": arrays["log_decay"].copy()}
    arrays[name][:, 2] = np.nan
    arrays["log_decay"][:, 5] = -np.inf
    late = 1 if "bonus" in arrays else 0  # the bonus reads the state before its decay
    o, state = case(arrays, state=True)
    fresh = case(sentences.cut(case, arrays, slice(5, 9)))
    sentences.close(o[:, 5 + late :], fresh[:, late:])
    assert np.all(np.isnan(o[:, 2 + late : 5]))
    assert isinstance(state, CacheState) or all(np.all(np.isfinite(x)) for x in sentences.fields(state))


@pytest.mark.parametrize("name", sentences.HALVES)
def test_halves_are_rounded_to_nearest_with_ties_to_even(name):
    rng, dtype = np.random.default_rng(0), sentences.half(name)
    x, weight = rng.standard_normal((64, 128)).astype(dtype), rng.standard_normal((1, 128)).astype(dtype)
    with on_cpu("cupy", check=False):
        o = ttr_np.short_convolution(x, weight, backend="cupy")
    sentences.same_bits(o, (x.astype(np.float32) * weight.astype(np.float32)).astype(dtype))  # one product, exact


# ---- kernels and solvers ------------------------------------------------------------------------------------------

HURTING = {"k": (1, 3, 40, 59, 111, 130), "n": (1, 3, 16, 41), "w": (1, 2, 4, 7)}
FEW = {"k": (40, 130), "n": (16,), "w": (1,)}  # where a kernel takes a second to build
SOME = {"k": (1, 41)}  # where several do


def sizes_of(case):
    """What its kernel is compiled for, at the sizes that hurt; values and channels beyond one block and one warp."""
    if STATES[case.operator] is CacheState:  # compiled for no size, or tested at many in test_cuda_attention.py
        return [{"k": 1, "v": 1}, {"k": 59, "v": 130}] if case.operator == "softmax_attention" else [{}]
    axis = {"selective_scan": "n", "short_convolution": "w", "diagonal_scan": "d"}.get(case.operator, "k")
    if axis == "d":
        return [{"d": 1}, {"d": 130}]
    hurting = SOME if case.operator in SQUARES else HURTING if case.backend == "cupy" else FEW
    others = zip((1, 33, 5) * 2, (1, 130) * 3, strict=True)
    return [{axis: size, "v": v, "d": d} for size, (v, d) in zip(hurting[axis], others, strict=False)]


def solved(case, arrays, dtype, **common):
    """The solver in another precision."""
    wide = {name: x.astype(dtype) for name, x in arrays.items()}
    return case._replace(backend="numpy")(wide, state=True, **common)


def error(actual, exact):
    return max(np.max(np.abs(x - y), initial=0) for x, y in zip(actual, exact, strict=True) if x is not None)


@every_case
@pytest.mark.parametrize("t", [1, 2, 17])
def test_single_precision_is_as_good_as_the_solver(case, machine, t):
    for sizes in sizes_of(case):
        arrays = case.draw(lead=(2,), t=t, dtype=np.float32, **sizes)
        begin = solved(case, case.draw(seed=7, lead=(2,), t=3, **sizes), np.float32)[1]
        exact, end = solved(case, arrays, np.float64, initial_state=begin)
        plain, plain_end = solved(case, arrays, np.float32, initial_state=begin)
        o, after = case(arrays, state=True, initial_state=begin)
        floor = 4 * np.finfo(np.float32).eps
        for actual, wanted, others in (((o,), (exact,), (plain,)), (after, end, plain_end)):
            terms = (*wanted, *begin) if wanted is end else wanted  # an old state is a term of a new one
            scale = max(np.max(np.abs(x), initial=0) for x in terms if x is not None)
            assert error(actual, wanted) <= max(2 * error(others, wanted), floor * scale), sizes
        assert len(machine.launches) > 0


@every_case
def test_double_precision_is_that_of_the_solver(case, machine):
    arrays = case.draw(t=17, v=33)
    o, after = case(arrays, state=True)
    exact, end = solved(case, arrays, np.float64)
    sentences.close(o, exact)
    sentences.same_state(case, after, end)


@every_case
def test_one_sequence_has_the_same_bits_alone_and_among_64(case):
    arrays = case.draw(t=9, lead=(64,), dtype=np.float32)
    with fast(case):
        among = case(arrays)
        for i in (0, 63):
            alone = {n: x if sentences.time_axis(case, n, x) is None else x[i] for n, x in arrays.items()}
            sentences.same_bits(case(alone), among[i])


@every_case
def test_the_order_of_threads_changes_no_bit(case):
    sizes = {} if case.operator == "local_polynomial" else {"k": 40, "n": 40, "v": 70, "d": 70}
    arrays = case.draw(t=9, dtype=np.float32, **sizes)
    found = []
    for options in ({}, {"order": "reverse"}, {"order": "random", "seed": 1}, {"order": "random", "seed": 2}):
        with on_cpu(case.backend, **options):
            found.append(case(arrays, state=True))
    for o, state in found[1:]:
        sentences.same_bits(o, found[0][0])
        sentences.same_state(case, state, found[0][1], sentences.same_bits)


# Where one thing is known for all tokens before the next begins.
LAUNCHES = {(backend, operator): 2 for backend in PACKAGES for operator in SQUARES[:3]} | {("cupy", "mesa"): 3}


@every_case
def test_nothing_is_launched_for_nothing(case, machine):
    case(case.draw(t=0))
    case(case.draw(t=3, lead=(0,)))
    assert machine.launches == []
    case(case.draw(t=3))
    assert len(machine.launches) == LAUNCHES.get((case.backend, case.operator), 1)


# ---- barriers --------------------------------------------------------------------------------------------------------

by_the_runner = pytest.mark.skipif(cudaemu.ON_GPU, reason="a GPU does not tell what it was not asked")

BARRIERS = {"cupy": r"__syncthreads\(\);", "numba-cuda": r"bar\.sync\s+0;"}


@by_the_runner
@of_operators
def test_each_barrier_is_needed(backend, operator, machine):
    if STATES[operator] is CacheState:
        return  # see test_cuda_attention.py
    arrays = draw(operator, np.random.default_rng(0), t=5, k=40, v=70, dtype=np.float32)
    run = partial(getattr(ttr_np, operator), **arrays, backend=backend)
    texts = machine.switch(BARRIERS[backend])
    run()
    barriers = len(re.findall(BARRIERS[backend], texts[0]))
    assert bool(barriers) == (operator in sentences.GATE_PER_CHANNEL)
    for machine.options["left_out"] in range(barriers):
        with pytest.raises((cudaemu.RaceFault, cudaemu.UnsetFault)):
            run()


# ---- offsets of more than 32 bits ------------------------------------------------------------------------------------


@of_far_operators
def test_many_sequences(backend, operator):
    last, options = 65_600, OPTIONS[operator][0] if operator in SQUARES else {}
    small = {"t": 1} if STATES[operator] is CacheState else {"t": 2, "k": 1, "v": 1, "d": 1, "n": 1, "w": 2}
    arrays = draw(operator, np.random.default_rng(0), lead=(last,), dtype=np.float32, **small)
    with on_cpu(backend, check=False, blocks=(last - 3, last)):
        o = getattr(ttr_np, operator)(**arrays, **options, backend=backend)
    tail = {n: x[-3:] if x.ndim and len(x) == last else x for n, x in arrays.items()}
    wanted = getattr(ttr_np, operator)(**tail, **options, backend="numpy")
    np.testing.assert_allclose(o[-3:], wanted, rtol=1e-6, atol=1e-7)


FAR = 2**31 + 8  # numbers


def far_apart(x, axis):
    """The same array with a stride of more than 2^31 numbers along one axis."""
    moved = np.moveaxis(x, axis, 0)
    room = cudaemu.virtual((len(moved), FAR), x.dtype)
    view = room[:, : moved[0].size].reshape(moved.shape)
    view[...] = moved
    return np.moveaxis(view, 0, axis)


@of_far_operators
@pytest.mark.parametrize("axis", ["memory", "time"])
def test_strides_of_more_than_32_bits(backend, operator, axis, machine):
    case = Case(operator, backend, (), False, OPTIONS[operator][0] if operator in SQUARES else {})
    arrays = case.draw(t=3, lead=(2,), dtype=np.float32)
    wanted = case(arrays)
    for name, x in arrays.items():
        place = sentences.time_axis(case, name, x)
        if place is not None:
            found = case(arrays | {name: far_apart(x, x.ndim + place if axis == "time" else 0)})
            sentences.same_bits(found, wanted)


# ---- from arrays to arguments ----------------------------------------------------------------------------------------


def test_a_state_column_beyond_what_lanes_hold_is_refused():
    arrays = draw("delta_rule", np.random.default_rng(0), t=2, k=513)
    for backend in GPU:
        with on_cpu(backend), pytest.raises(ValueError, match="axis 'k' is 513; the GPU backends hold up to 512"):
            ttr_np.delta_rule(**arrays, backend=backend)


def test_arguments_are_cast_to_what_the_text_declares():
    kernel = import_module("cuda_kernels.cupy_raw.delta_rule").KERNEL
    types = {"data": "bfloat16", "real": "float"}
    assert [p.name for p in kernel.parameters()][:3] == ["q", "k", "v"]
    given = {p.name: None if p.pointer else 3 for p in kernel.parameters()}
    cast = dict(zip(given, kernel.typed(given, types), strict=True))
    assert cast["q"] is None and cast["scale"].dtype == np.float32 and cast["tokens"].dtype == np.int32
    with pytest.raises(TypeError, match="delta_rule: beta points to float32, the array holds float64"):
        kernel.typed(given | {"beta": np.zeros(3)}, types)
    with pytest.raises(OverflowError):
        kernel.typed(given | {"tokens": 2**31}, types)


def test_texts_need_no_header():
    texts = sorted(Path(import_module("cuda_kernels.cupy_raw").__file__).parent.glob("*.cu*"))
    assert len(texts) >= 8
    for path in texts:
        assert not re.search(r"^\s*#\s*include", path.read_text(), re.MULTILINE), path.name


@pytest.mark.parametrize("backend", GPU)
def test_without_a_driver_the_reason_is_told(backend):
    if ttr_np.available_backends()[backend] == "ok":
        pytest.skip("there is a GPU")
    words = f"backend '{backend}' is not available: .*(driver|installed|GPU)"
    with pytest.raises(ttr_np.BackendUnavailable, match=words):
        ttr_np.delta_rule([[1.0]], [[1.0]], [[1.0]], [1.0], backend=backend)


@needed(cudaemu.numba_cuda())
def test_numba_cuda_compiles_without_what_newer_numpy_lacks():
    lines = ["import warnings; warnings.simplefilter('error')", "import numpy as np", "vars(np).pop('row_stack', None)"]
    lines += ["from cuda_kernels.numba_cuda import _launch", "from numba.cuda import cudaimpl"]
    lines += ["assert 'row_stack' not in vars(np)"]
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@needed(cudaemu.numba_cuda())
def test_the_simulator_is_no_gpu(monkeypatch):
    from numba import config

    monkeypatch.setattr(config, "ENABLE_CUDASIM", True)
    assert "simulator" in import_module("cuda_kernels.numba_cuda").reason()


# ---- what CuPy's arrays go through -----------------------------------------------------------------------------------


on_cupy = pytest.mark.parametrize("case", [c for c in CASES if c.backend == "cupy"], ids=str)


@on_cupy
def test_numpy_arrays_make_the_round_trip(case, cupy):
    for name in ("heads last", "stride 0", "reversed"):
        arrays = {key: sentences.LAYOUTS[name](x) for key, x in case.draw(t=7).items()}
        o, state = case(arrays, state=True)
        wanted, end = case._replace(backend="numpy")(arrays, state=True)
        assert isinstance(o, np.ndarray)
        sentences.close(o, wanted)
        sentences.same_state(case, state, end)


@on_cupy
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_arrays_on_the_device_stay_there(case, cupy, dtype):
    arrays = case.draw(t=9, dtype=dtype)
    there = {name: cupy.ndarray(x) for name, x in arrays.items()}
    mask = np.arange(9) % 3 > 0
    with on_cpu("cupy"):
        wanted, end = case(arrays, state=True, mask=mask, cu_seqlens=[0, 4, 9])
        again, last = case(arrays, state=True, initial_state=type(end)(*(x if x is None else x[:, 0] for x in end)))
    auto = case._replace(backend="auto")
    o, state = auto(there, state=True, mask=cupy.ndarray(mask), cu_seqlens=cupy.ndarray(np.array([0, 4, 9])))
    begin = type(state)(*(x if x is None else x[:, 0] for x in state))
    o2, state2 = auto(there, state=True, initial_state=begin)
    for found, expected in ((o, wanted), (o2, again), *zip(state, end, strict=True), *zip(state2, last, strict=True)):
        assert (found is None) == (expected is None)
        if found is not None:
            assert isinstance(found, cupy.ndarray)
            sentences.same_bits(found.get(), expected)


@pytest.mark.parametrize("per_channel", [False, True])
def test_so_do_those_that_are_taken_in_chunks(cupy, monkeypatch, per_channel):
    monkeypatch.setattr(_tiles, "CHUNKED_FROM", 1)
    case = Case("linear_attention", "cupy", ("log_decay",), per_channel, {})
    test_arrays_on_the_device_stay_there(case, cupy, np.float16)


class Foreign:
    """An array on the GPU in another library."""

    def __init__(self, held):
        self.held = held

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **_):
        raise BufferError("this is not memory of the host")


def test_arrays_of_other_libraries_on_the_device_are_taken_as_those_of_cupy(cupy):
    arrays = draw("delta_rule", np.random.default_rng(0), lead=(2,))
    S = np.random.default_rng(1).standard_normal((2, 5, 3))
    wanted = ttr_np.delta_rule(**arrays, initial_state=S, backend="numpy")
    o = ttr_np.delta_rule(**{name: Foreign(x) for name, x in arrays.items()}, initial_state=Foreign(S))
    assert isinstance(o, cupy.ndarray)
    sentences.close(o.get(), wanted)
    with pytest.raises(TypeError, match="initial_state is on the GPU, the arrays are on the CPU"):
        ttr_np.delta_rule(**arrays, initial_state=Foreign(S))


def test_no_empty_memory_is_sent(cupy):
    for operator, sent in (("delta_rule", 0), ("recursive_least_squares", 5 * 5 * 8)):  # of one memory, among three
        there = {name: cupy.array(x) for name, x in draw(operator, np.random.default_rng(0), lead=(3,)).items()}
        getattr(ttr_np, operator)(**there)
        cupy.counted.update(sent=0)
        getattr(ttr_np, operator)(**there)
        assert cupy.counted["sent"] == sent


def test_a_table_is_sent_once(cupy):
    from cuda_kernels.cupy_raw import _launch

    arrays = draw("delta_rule", np.random.default_rng(0), lead=(2,))
    for _ in range(3):
        ttr_np.delta_rule(**arrays, backend="cupy")
    assert len(_launch.machine.tables) == 1


def test_a_text_is_compiled_once_for_each_device(cupy, monkeypatch):
    from cuda_kernels.cupy_raw import _launch

    arrays, known = draw("delta_rule", np.random.default_rng(0)), cupy.cuda.Device
    for number, kernels in ((0, 1), (0, 1), (1, 2)):
        monkeypatch.setattr(cupy.cuda, "Device", lambda *_, number=number: known(number))
        ttr_np.delta_rule(**arrays, backend="cupy")
        assert _launch.compiled.cache_info().currsize == kernels


def test_bad_numbers_on_the_device_are_named(cupy):
    arrays = draw("delta_rule", np.random.default_rng(0), optional=("log_decay",), per_channel=False)
    arrays["log_decay"][2] = 0.5
    with pytest.raises(ValueError, match=r"log_decay must be <= 0 everywhere; it is 0.5 at \(2,\)"):
        ttr_np.delta_rule(**{name: cupy.ndarray(x) for name, x in arrays.items()}, backend="cupy")


# ---- sequences in pieces ---------------------------------------------------------------------------------------------


def in_pieces(operator, arrays, options, multiprocessors, check=True):
    """Answers and state, and how many launches it took."""
    with on_cpu("cupy", check=check) as machine:
        machine.multiprocessors = multiprocessors
        o, state = getattr(ttr_np, operator)(**arrays, **options, output_final_state=True, backend="cupy")
    return (o, *state), len(machine.launches)


IN_PIECES = [("selective_scan", ("D",)), ("diagonal_scan", ()), ("diagonal_scan", ("phase",))]


@pytest.mark.parametrize("operator, optional", IN_PIECES)
def test_a_scan_in_pieces_is_as_good_as_the_solver(operator, optional):
    rng = np.random.default_rng(0)
    for t in (512, 1100):
        arrays = draw(operator, rng, optional=optional, lead=(2,), t=t, d=5, n=16, dtype=np.float32)
        _, begin = getattr(ttr_np, operator)(
            **{n: x[:, :9] if x.ndim == 3 else x for n, x in arrays.items()}, output_final_state=True, backend="numpy"
        )
        solver = partial(getattr(ttr_np, operator), output_final_state=True, initial_state=begin, backend="numpy")
        exact, plain = solver(**{n: x.astype(np.float64) for n, x in arrays.items()}), solver(**arrays)
        for multiprocessors, launches in ((0, 1), (1, 2), (100, 2)):
            found, made = in_pieces(operator, arrays, {"initial_state": begin}, multiprocessors)
            assert made == launches
            for x, wanted, other in zip(found, (exact[0], *exact[1]), (plain[0], *plain[1]), strict=True):
                floor = 4 * np.finfo(np.float32).eps * np.max(np.abs(wanted))
                assert np.max(np.abs(x - wanted)) <= max(2 * np.max(np.abs(other - wanted)), floor)


@pytest.mark.parametrize("operator, optional", IN_PIECES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_goes_on_into_later_pieces_and_nowhere_else(operator, optional, bad):
    arrays = draw(operator, np.random.default_rng(0), optional=optional, lead=(2,), t=600, d=5, n=4, dtype=np.float32)
    clean, _ = in_pieces(operator, arrays, {}, 100)
    name = "x" if "x" in arrays else "u"
    arrays[name] = arrays[name].copy()
    arrays[name][0, 300, 2] = bad
    for multiprocessors in (0, 100):
        found, _ = in_pieces(operator, arrays, {}, multiprocessors)
        assert not np.any(np.isfinite(found[0][0, 300:, 2])) and not np.any(np.isfinite(found[1][0, 2]))
        if multiprocessors:
            np.testing.assert_array_equal(found[0][0, :300], clean[0][0, :300])
            np.testing.assert_array_equal(found[0][1], clean[0][1])


def test_a_reset_in_a_piece_forgets_the_pieces_before_it():
    arrays = draw("diagonal_scan", np.random.default_rng(0), lead=(2,), t=600, d=5, dtype=np.float32)
    arrays["log_decay"][:, 400, 1] = -np.inf
    spoilt = arrays | {"x": arrays["x"].copy()}
    spoilt["x"][:, 200, 1] = np.nan
    (clean, _), (found, _) = (in_pieces("diagonal_scan", given, {}, 100)[0] for given in (arrays, spoilt))
    assert np.all(np.isnan(found[:, 200:400, 1]))
    np.testing.assert_array_equal(found[:, 400:], clean[:, 400:])


def test_double_precision_takes_whole_sequences():
    arrays = draw("selective_scan", np.random.default_rng(0), lead=(1,), t=600, d=3)
    assert in_pieces("selective_scan", arrays, {}, 100)[1] == 1


def test_an_empty_memory_of_one_number_is_one_number(cupy):
    arrays = draw("test_time_training", np.random.default_rng(0), lead=(), t=5, dtype=np.float32)
    options = {"memory": memories.Linear(), "output_final_state": True}
    wanted, end = ttr_np.test_time_training(**arrays, **options, backend="cupy")
    o, state = ttr_np.test_time_training(**{name: cupy.array(x) for name, x in arrays.items()}, **options)
    sentences.same_bits(o.get(), wanted)
    assert state.count.shape == end.count.shape == ()
