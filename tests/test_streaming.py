"""One token per call is the operator itself, to the bit, and forgives no wrong token."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
from test_operators import CASES, every_case

import ttr_np
from ttr_np.calling import as_numpy
from ttr_np.notation import ARRAYS
from ttr_np.streaming import time_axis

pytestmark = pytest.mark.filterwarnings("ignore:solver '.*' stopped after")
NUMBA = [case for case in CASES if case.backend == "numba"]
COMPILED = pytest.mark.skipif(not NUMBA, reason="Numba is not here")


def streamed(case, lead=(2,), t=6, dtype=np.float64, **given):
    """A stream of a case, its tokens in time, and its arrays."""
    arrays = case.draw(lead=lead, t=t, dtype=dtype)
    tokens = {name: x for name, x in arrays.items() if ARRAYS[name].axes.startswith("t")}
    fixed = {name: x for name, x in arrays.items() if name not in tokens}
    one_less = {name: x[..., 0] for name, x in tokens.items()}  # as many axes as a token has
    moved = {name: np.moveaxis(x, time_axis(name, one_less[name], one_less), 0) for name, x in tokens.items()}
    shapes = {name: x.shape[1:] for name, x in moved.items()}
    stream = ttr_np.Stream(case.operator, dtype=dtype, backend=case.backend, **shapes, **fixed, **case.options, **given)
    return stream, moved, arrays


def axes_of(tokens):
    """Where the axis t of each array stands, seen from its end; here it is the first."""
    first = {name: x[0] for name, x in tokens.items()}
    return {name: time_axis(name, x, first) for name, x in first.items()}


def fields(state):
    """On the host, wherever the stream keeps them."""
    return [as_numpy(x) for x in state if x is not None]


@every_case
def test_a_stream_is_the_operator_token_by_token_to_the_bit(case):
    stream, tokens, arrays = streamed(case)
    axes = axes_of(tokens)
    state = None
    for i in range(6):
        one = {name: np.expand_dims(x[i], axes[name]) for name, x in tokens.items()}
        o, state = case(arrays | one, state=True, initial_state=state)
        np.testing.assert_array_equal(stream(**{name: x[i] for name, x in tokens.items()}), o[..., 0, :])
        for found, wanted in zip(fields(stream.state), fields(state), strict=True):
            np.testing.assert_array_equal(found, wanted)


@every_case
def test_a_stream_goes_on_from_a_state_and_leaves_it_alone(case):
    stream, tokens, arrays = streamed(case)
    for i in range(3):
        stream(*(x[i] for x in tokens.values()))
    middle = stream.state
    kept = [x.copy() for x in fields(middle)]
    later, *_ = streamed(case, initial_state=middle)
    for i in range(3, 6):
        token = [x[i] for x in tokens.values()]
        np.testing.assert_array_equal(later(*token), stream(*token))
    for found, wanted in zip(fields(middle), kept, strict=True):
        np.testing.assert_array_equal(found, wanted)


@every_case
def test_a_step_writes_where_it_is_told(case):
    (stream, tokens, _), (other, *_) = streamed(case), streamed(case)
    token = [x[0] for x in tokens.values()]
    wanted = other(*token)
    out = np.full_like(wanted, np.nan)
    assert stream(*token, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    again = stream(*token)
    assert not np.shares_memory(again, stream(*token))
    with pytest.raises(ValueError, match="out has shape"):
        stream(*token, out=np.empty(wanted.shape + (1,)))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        stream(*token, out=out)


@COMPILED
@pytest.mark.parametrize("case", NUMBA, ids=str)
def test_a_wrong_token_raises_and_changes_nothing(case):
    stream, tokens, _ = streamed(case)
    token = {name: x[0] for name, x in tokens.items()}
    stream(**token)
    before = [x.copy() for x in fields(stream.state)]
    name, x = next(iter(token.items()))
    for wrong, error in (
        (token | {name: x[..., None]}, ValueError),
        (token | {name: x.astype(complex)}, TypeError),
        (token | {name: x.astype(np.longdouble)}, TypeError),
        ({key: y for key, y in token.items() if key != name}, TypeError),
        (token | {"nothing": x}, TypeError),
    ):
        with pytest.raises(error, match=name):
            stream(**wrong)
    with pytest.raises(TypeError, match="a token of this stream is"):
        stream(*token.values(), x)
    for found, wanted in zip(fields(stream.state), before, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_an_unusual_gate_is_what_the_operator_makes_of_it(backend):
    step = ttr_np.Stream("delta_rule", q=(2,), k=(2,), v=(1,), beta=(), log_decay=(), backend=backend)
    step([1, 0], [1, 0], [2], 1, 0)
    assert step([1, 0], [1, 0], [0], -0.5, 0) == 3  # legal, though no gradient step
    assert step([1, 0], [0, 1], [5], 1, -np.inf) == 0 and step.state.S[1, 0] == 5
    with pytest.raises(ValueError, match="log_decay must be <= 0"):
        step([1, 0], [0, 1], [5], 1, 0.5)
    assert step.state.S[1, 0] == 5
    weights = ttr_np.Stream("recursive_least_squares", q=(2,), k=(2,), v=(1,), beta=(), backend=backend)
    with pytest.raises(ValueError, match="beta must be finite and >= 0"):
        weights([1, 0], [1, 0], [2], -1)
    with pytest.raises(ValueError, match="beta must be finite and >= 0"):
        weights([1, 0], [1, 0], [2], np.nan)


@COMPILED
@pytest.mark.parametrize("case", NUMBA, ids=str)
def test_no_step_takes_memory_that_stays(case):
    if any(axes.startswith("n") for axes in case.signature.state.values()):
        return  # its pairs are its memory
    stream, tokens, _ = streamed(case)
    token = [x[0] for x in tokens.values()]
    out = stream(*token)
    for _ in range(3):
        stream(*token, out=out)
    tracemalloc.start()
    traced = []
    for steps in (50, 500, 500, 500):
        for _ in range(steps):
            stream(*token, out=out)
        traced.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    # A few numbers that Python keeps, and not one array per step. Numba's calls leave traces of memory that is free
    # again, until they come to the same places; what stays would be there every time.
    assert min(np.diff(traced)) < 500 * 32


@COMPILED
def test_many_series_side_by_side_are_each_alone_on_one_thread_or_two():
    import numba

    rng = np.random.default_rng(0)
    x, d = rng.standard_normal((5, 3000, 16)), rng.standard_normal((5, 3000, 1))
    shapes = {"q": (16,), "k": (16,), "v": (1,)}
    alone = ttr_np.Stream("recursive_least_squares", **shapes)
    for threads in (1, 2):
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        many = ttr_np.Stream(
            "recursive_least_squares", **{name: (3000, *shape) for name, shape in shapes.items()}, backend="numba"
        )
        found = [many(x[i], x[i], d[i])[7] for i in range(5)]
        alone = ttr_np.Stream("recursive_least_squares", **shapes, backend="numba")
        np.testing.assert_array_equal(found, [alone(x[i, 7], x[i, 7], d[i, 7]) for i in range(5)])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_answers_have_the_dtype_of_the_stream_and_the_state_is_never_below_single(dtype):
    step = ttr_np.Stream("linear_attention", q=(3, 2), k=(3, 2), v=(3, 4), dtype=dtype)
    o = step(np.ones((3, 2), dtype), np.ones((3, 2), dtype), np.ones((3, 4), dtype))
    assert o.dtype == dtype and o.shape == (3, 4)
    assert step.state.S.dtype == np.result_type(dtype, np.float32)


def test_grouped_queries_share_one_memory():
    step = ttr_np.Stream("linear_attention", q=(3, 2), k=(1, 2), v=(1, 4))
    q, k, v = np.arange(6.0).reshape(3, 2), np.ones((1, 2)), np.ones((1, 4))
    assert step(q, k, v).shape == (3, 4) and step.state.S.shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"operator": "nothing"}, ValueError, "unknown operator 'nothing'"),
        ({"operator": "kda"}, ValueError, "'kda' is a layer; a stream runs operators: its own is 'delta_rule', and"),
        ({"operator": "hla"}, ValueError, "'hla' is a layer; a stream runs operators$"),
        ({"operator": ttr_np.layers["kda"]}, TypeError, "operator is Layer.*; a stream needs the name of an operator"),
        ({"q": (2,), "k": (3,), "v": (1,), "beta": ()}, ValueError, "axis 'k' is 3 in k but 2 in q"),
        ({"q": (2,), "k": (2,), "v": (1,)}, TypeError, "beta is missing"),
        ({"k": (2,), "v": (1,), "beta": (), "log_decay": ()}, TypeError, "q is missing"),
        ({"q": (2,), "k": (2,), "v": (1,), "beta": 1}, TypeError, "beta is 1; a stream needs the shape"),
        ({"q": (True,), "k": (2,), "v": (1,), "beta": ()}, TypeError, "q is"),
        ({"q": (2,), "k": (2,), "v": (1,), "beta": (), "mask": ()}, TypeError, "takes no mask"),
        ({"q": (2,), "k": (2,), "v": (1,), "beta": (), "dtype": bool}, TypeError, "dtype is bool"),
        ({"q": (2,), "k": (2,), "v": (1,), "beta": (), "dtype": ">f8"}, TypeError, "dtype is >f8"),
        ({"q": 2.5, "k": (2,), "v": (1,), "beta": ()}, TypeError, "q is 2.5"),
        ({"q": (-1,), "k": (2,), "v": (1,), "beta": ()}, TypeError, "q is"),
        ({"q": (2,), "k": (2,), "v": (1,), "beta": (), "scales": 2}, TypeError, "scales"),
        ({"q": (2,), "k": (2,), "v": (1,), "beta": (), "backend": "none"}, ValueError, "unknown backend 'none'"),
        ({"q": (2,), "k": (2,), "v": (1,), "beta": (), "initial_state": np.ones((3, 1))}, ValueError, "field S"),
    ],
)
def test_what_no_stream_can_be_made_of_is_refused_at_once(given, error, words):
    with pytest.raises(error, match=words):
        ttr_np.Stream(**({"operator": "delta_rule"} | given))


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_copies_and_pickles_are_streams_of_their_own(backend):
    step = ttr_np.Stream("delta_rule", q=(2,), k=(2,), v=(1,), beta=(), scale=2.0, backend=backend)
    step([1, 0], [1, 0], [3], 0.5)
    for other in (copy.copy(step), copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert other([1, 0], [1, 0], [9], 1.0) == 18 and other.state.S[0, 0] == 9
        assert step.state.S[0, 0] == 1.5
    assert step([1, 0], [1, 0], [4], 1.0) == 8


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_arrays_that_do_not_change_are_the_streams_own(backend):
    weight = np.ones((2, 3))
    step = ttr_np.Stream("short_convolution", x=(3,), weight=weight, backend=backend)
    assert repr(step) == f"Stream('short_convolution', x=(3,), float64, backend='{backend}')"
    weight[:] = 7.0
    assert np.array_equal(step(np.ones(3)), np.ones(3))


def test_the_backend_is_chosen_once():
    with ttr_np.use_backend("numpy"):
        step = ttr_np.Stream("kernel_ridge", q=(2,), k=(2,), v=(1,))
    with ttr_np.use_backend("numba"):
        assert copy.copy(step)._backend == "numba" and step._backend == "numpy"
    with pytest.warns(RuntimeWarning, match="runs on 'numpy'") as said:
        step = ttr_np.Stream("kernel_ridge", q=(2,), k=(2,), v=(1,), backend=("numba-cuda", "numpy"))
        step([1, 0], [1, 0], [1])
    assert len(said) == 1


def test_an_output_that_cannot_take_the_answer_leaves_the_memory_as_it_was():
    step = ttr_np.Stream("linear_attention", q=(1,), k=(1,), v=(1,))
    with pytest.raises(TypeError, match="out has dtype int64; the answer has float64"):
        step([1], [1], [1], out=np.zeros(1, np.int64))
    with pytest.raises(TypeError, match="out is a list; it needs an array"):
        step([1], [1], [1], out=[0.0])
    with pytest.raises(TypeError, match="got 3 arrays and log_decay"):
        step([1], [1], [1], log_decay=-1.0)
    with pytest.raises(TypeError, match="q has dtype int64"):
        ttr_np.Stream("linear_attention", q=(1,), k=(1,), v=(1,), dtype="float32")(np.ones(1, int), [1], [1])
    assert step.state.S == 0


def test_integers_make_a_stream_of_double_precision_and_gates_any_precision():
    step = ttr_np.Stream("delta_rule", q=(1,), k=(1,), v=(1,), beta=(), dtype=int)
    assert step(np.ones(1, int), [1], [3], 0.5) == 1.5
    step = ttr_np.Stream("delta_rule", q=(1,), k=(1,), v=(1,), beta=(), dtype="float32")
    assert step(*np.ones((3, 1), "float32"), np.float64(0.5)) == np.float32(0.5)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_arrays_that_no_step_could_move_or_fill_are_refused(backend):
    S = np.zeros((4, 3), order="F")
    error, words = (ValueError, "must be in C order") if backend == "numba" else (NotImplementedError, "moves no state")
    with pytest.raises(error, match=words):
        ttr_np.Stream("delta_rule", q=(4,), k=(4,), v=(3,), beta=(), state=S, backend=backend)
    stream = ttr_np.Stream("delta_rule", q=(4,), k=(4,), v=(3,), beta=(), backend=backend)
    out = np.broadcast_to(np.zeros(1), (3,))
    out.flags.writeable = True
    with pytest.raises(ValueError, match=r"out has strides \(0,\): several numbers of the answer would have one place"):
        stream(np.ones(4), np.ones(4), np.ones(3), 0.5, out=out)
