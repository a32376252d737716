"""One token per call on the GPU backends: one launch, on the caller's memory, and nothing that CUDA graphs forbid."""

from functools import partial

import cudaemu
import numpy as np
import pytest
import test_streaming as sentences
from cudaemu import needed
from cudaemu.machines import on_cpu
from test_cuda_kernels import CASES as EVERY

import ttr_np
from ttr_np.notation import GATES, draw
from ttr_np.streaming import LAUNCHED

pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:solver '.*' stopped after")]

CASES = [case for case in EVERY if case.operator in LAUNCHED]  # others take the operator's own way
every_case = pytest.mark.parametrize("case", CASES, ids=str)
SENTENCES = [
    sentences.test_a_stream_is_the_operator_token_by_token_to_the_bit,
    sentences.test_a_stream_goes_on_from_a_state_and_leaves_it_alone,
    sentences.test_a_step_writes_where_it_is_told,
    sentences.test_a_wrong_token_raises_and_changes_nothing,
]
BACKENDS = sorted({case.backend for case in CASES})
on_cupy = pytest.mark.parametrize("case", [case for case in CASES if case.backend == "cupy"], ids=str)


@every_case
@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence.__name__[5:])
def test_streams_on_the_gpu_keep_their_word(case, sentence):
    with on_cpu(case.backend, check=False):
        sentence(case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_gates_and_copies(backend):
    with on_cpu(backend):
        step = ttr_np.Stream("delta_rule", q=(2,), k=(2,), v=(1,), beta=(), log_decay=(), backend=backend)
        step([1, 0], [1, 0], [2], 1, 0)
        assert step([1, 0], [1, 0], [0], -0.5, 0) == 3
        with pytest.raises(ValueError, match="log_decay must be <= 0"):
            step([1, 0], [0, 1], [5], 1, 0.5)
        assert step([1, 0], [0, 1], [5], 1, -np.inf) == 0 and step.state.S[1, 0] == 5
        sentences.test_copies_and_pickles_are_streams_of_their_own(backend)


@every_case
def test_a_step_is_one_launch_and_moves_the_callers_state(case):
    with on_cpu(case.backend) as machine:
        stream, tokens, arrays = sentences.streamed(case, dtype=np.float32)
        state = stream.state
        mine, *_ = sentences.streamed(case, dtype=np.float32, state=state)
        for i in range(3):
            token = [x[i] for x in tokens.values()]
            machine.launches.clear()
            wanted = stream(*token)
            assert len(machine.launches) == 1
            np.testing.assert_array_equal(mine(*token), wanted)
            for found, field in zip(*map(sentences.fields, (state, stream.state)), strict=True):
                np.testing.assert_array_equal(found, field)


@pytest.mark.parametrize("backend", ["numba"] if cudaemu.ON_GPU else ["numba", *BACKENDS])
def test_a_state_that_cannot_be_moved_in_place_is_refused(backend):
    make = partial(ttr_np.Stream, "delta_rule", q=(2,), k=(2,), v=(1,), beta=(), backend=backend)
    with on_cpu(backend) if backend in BACKENDS else on_cpu("cupy"):
        with pytest.raises(ValueError, match=r"field S is float32 of shape \(2, 1\); .* must be float64 of \(2, 1\)"):
            make(state=np.zeros((2, 1), np.float32))
        fixed = np.zeros((2, 1))
        fixed.flags.writeable = False
        with pytest.raises(ValueError, match="field S is read-only"):
            make(state=fixed)
        S = np.zeros((2, 1))
        make(state=S)([1, 0], [1, 0], [3], 1.0)
        assert S[0, 0] == 3
    with pytest.raises(NotImplementedError, match="backend 'numpy' moves no state of delta_rule in place"):
        ttr_np.Stream("delta_rule", q=(2,), k=(2,), v=(1,), beta=(), backend="numpy", state=np.zeros((2, 1)))


# ---- arrays on the device --------------------------------------------------------------------------------------------


def there(cupy, case, dtype=np.float32):
    """Two streams of a case, its tokens in time on the host, and the same on the device; gates are never narrow."""
    stream, tokens, _ = sentences.streamed(case, dtype=dtype)
    other, *_ = sentences.streamed(case, dtype=dtype)
    tokens = {name: x.astype(np.float32) if name in GATES else x for name, x in tokens.items()}
    host = [{name: np.ascontiguousarray(x[i]) for name, x in tokens.items()} for i in range(3)]
    return stream, other, host, [{name: cupy.array(x) for name, x in token.items()} for token in host]


@on_cupy
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_step_on_the_device_waits_for_nothing_and_takes_no_memory(case, cupy, dtype):
    stream, other, host, device = there(cupy, case, dtype)
    wanted = [other(**token) for token in host]
    out = cupy.array(np.full_like(wanted[0], np.nan))
    for i in range(3):
        cupy.counted.update(waits=0, arrays=0, sent=0)
        assert stream(**device[i], out=out) is out
        assert cupy.counted == {"waits": 0, "arrays": 0, "sent": 0}
        np.testing.assert_array_equal(out.get(), wanted[i])
    for found, field in zip(stream.state, other.state, strict=True):
        assert (found is None) == (field is None)
        assert found is None or isinstance(found, cupy.ndarray) and np.array_equal(found.held, field.held)


@on_cupy
def test_a_token_that_lies_otherwise_is_copied(case, cupy):
    stream, other, host, device = there(cupy, case)
    for token, there_ in zip(host, device, strict=True):
        strided = {name: cupy.ndarray(np.repeat(x.held[..., None], 2, -1)[..., 0]) for name, x in there_.items()}
        np.testing.assert_array_equal(stream(**strided).get(), other(**token))


def test_a_number_is_a_token_too(cupy):
    step = ttr_np.Stream("delta_rule", q=(2,), k=(2,), v=(1,), beta=(), log_decay=(), backend="cupy")
    assert step([1, 0], [1, 0], [2], 1, 0) == 2 and step([1, 0], [1, 0], [0], 0.5, 0) == 1


def test_a_memory_on_the_gpu_takes_the_other_arrays_there(cupy):
    A, h = -np.ones((3, 4)), cupy.array(np.ones((3, 4)))
    step = ttr_np.Stream("selective_scan", u=(3,), delta=(3,), B=(4,), C=(4,), A=A, initial_state=h)
    assert step._backend == "cupy" and isinstance(step.state.h, cupy.ndarray)
    with pytest.raises(ValueError, match="field h is an array of numpy; this stream keeps its memory in cupy's"):
        ttr_np.Stream("selective_scan", u=(3,), delta=(3,), B=(4,), C=(4,), A=A, state=np.ones((3, 4)), backend="cupy")


def test_an_answer_may_take_the_place_of_its_query(cupy):
    make = partial(ttr_np.Stream, "linear_attention", q=(4,), k=(4,), v=(4,), dtype=np.float32, backend="cupy")
    plain, place = make(), make()
    q, k, v = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    both = cupy.array(q)
    place(both, cupy.array(k), cupy.array(v), out=both)
    np.testing.assert_array_equal(both.get(), plain(q, k, v))


def test_what_is_on_the_gpu_stays_there(cupy):
    make = partial(ttr_np.Stream, "linear_attention", q=(2,), k=(2,), v=(1,), dtype=np.float32)
    S = cupy.array(np.zeros((2, 1), np.float32))
    stream = make(initial_state=S)
    assert stream._backend == "cupy" and isinstance(stream([1, 0], [1, 0], [2]), np.ndarray)
    assert isinstance(stream.state.S, cupy.ndarray) and float(S.held[0, 0]) == 0
    q = cupy.array(np.ones(2, np.float32))
    with pytest.raises(TypeError, match="the token is on the GPU, this stream keeps its arrays on the CPU"):
        make(backend="numba")(q, q, q[:1])


# ---- while a graph is recorded ---------------------------------------------------------------------------------------


def test_no_gate_is_looked_at_while_a_graph_is_recorded(cupy, monkeypatch):
    arrays = draw("delta_rule", np.random.default_rng(0), optional=("log_decay",), per_channel=False, dtype=np.float32)
    there = {name: cupy.ndarray(x) for name, x in arrays.items()}
    wanted = ttr_np.delta_rule(**there)
    cupy.counted.update(waits=0)
    ttr_np.delta_rule(**there)
    assert cupy.counted["waits"] > 0
    monkeypatch.setattr(cupy.current, "recording", True)
    cupy.counted.update(waits=0, sent=0)
    np.testing.assert_array_equal(ttr_np.delta_rule(**there).held, wanted.held)  # from zeros that are made there
    assert (cupy.counted["waits"], cupy.counted["sent"]) == (0, 0)


@pytest.mark.parametrize("operator", ["linear_attention", "delta_rule"])
def test_long_sequences_make_the_round_trip_too(cupy, operator):
    arrays = draw(operator, np.random.default_rng(0), lead=(1,), t=600, k=16, v=5, dtype=np.float32)
    wanted = getattr(ttr_np, operator)(**arrays, backend="numpy")
    found = getattr(ttr_np, operator)(**arrays, backend="cupy")
    there = getattr(ttr_np, operator)(**{name: cupy.array(x) for name, x in arrays.items()})
    assert isinstance(found, np.ndarray) and isinstance(there, cupy.ndarray)
    for o in (found, there.get()):
        np.testing.assert_allclose(o, wanted, atol=1e-5 * np.max(np.abs(wanted)), rtol=0)


def test_no_answer_is_sent_to_the_device(cupy):
    arrays = draw("linear_attention", np.random.default_rng(0), t=50, dtype=np.float32)
    ttr_np.linear_attention(**arrays, backend="cupy")
    cupy.counted.update(sent=0)
    o, state = ttr_np.linear_attention(**arrays, backend="cupy", output_final_state=True)
    assert cupy.counted["sent"] == sum(x.nbytes for x in [*arrays.values(), state.S])


MLP = ttr_np.MLP(4, scale=np.ones(5), offset=np.zeros(5))
STATES = [
    ("linear_attention", {"normalize": True}),
    ("delta_rule", {}),
    ("selective_scan", {}),
    ("test_time_training", {"memory": MLP}),
    ("mesa", {"solver": "cg", "iterations": 4, "tolerance": 0.0}),
    ("mesa", {"solver": "cg", "iterations": 4, "tolerance": 0.0, "ridge": np.ones(16)}),
]
CACHES = [
    ("softmax_attention", {}),
    ("local_polynomial", {"degree": 0}),
    ("local_polynomial", {"degree": 2, "kernel": "gaussian", "bandwidth": 3.0}),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("operator", "options"), STATES + CACHES)
def test_what_a_recorded_graph_works_with_is_never_freed_nor_sent(cupy, monkeypatch, operator, options, masked):
    from ttr_np import recording

    t, k = 600 if operator in ("linear_attention", "delta_rule", "selective_scan") else 20, 16
    k = 4 if operator == "local_polynomial" else k
    arrays = draw(operator, np.random.default_rng(0), lead=(1,), t=t, d=3, n=4, k=k, v=5, dtype=np.float32)
    there = {name: cupy.array(x) for name, x in arrays.items()}
    options = options | ({"mask": np.arange(t) % 3 > 0} if masked else {})
    monkeypatch.setattr(recording, "RECORDED", [])
    call = partial(getattr(ttr_np, operator), **there, **options)
    if (operator, options) in STATES:  # given on the host
        _, state = call(output_final_state=True)
        call = partial(call, initial_state=type(state)(*[None if x is None else x.get() for x in state]))
    wanted = call()
    assert recording.RECORDED == []
    monkeypatch.setattr(cupy.current, "recording", True)
    cupy.taken.clear()
    o = call()
    assert cupy.taken and all(memory in recording.RECORDED for memory in cupy.taken)
    np.testing.assert_array_equal(o.held, wanted.held)


def test_a_layer_holds_what_it_makes_for_a_recorded_graph(cupy, monkeypatch):
    from ttr_np import recording

    x = cupy.array(np.random.default_rng(0).standard_normal((20, 4), np.float32))
    layer = ttr_np.layers["gated_deltanet"]
    wanted = layer(x, x, x)
    monkeypatch.setattr(recording, "RECORDED", [])
    monkeypatch.setattr(cupy.current, "recording", True)
    cupy.taken.clear()
    np.testing.assert_array_equal(layer(x, x, x).held, wanted.held)
    assert cupy.taken and all(memory in recording.RECORDED for memory in cupy.taken)


def test_every_launch_of_a_graph_begins_with_the_state_that_was_given(cupy, monkeypatch):
    """It is sent once; the kernel may overwrite only a copy, which the graph makes anew."""
    arrays = draw("dplr", np.random.default_rng(0), lead=(1,), t=3, k=16, v=5, dtype=np.float32)
    there = {name: cupy.array(x) for name, x in arrays.items()}
    _, state = ttr_np.dplr(**there, output_final_state=True)
    monkeypatch.setattr(cupy.current, "recording", True)
    cupy.called.clear()
    ttr_np.dplr(**there, initial_state=state.S.held.copy())
    assert "copy" in cupy.called[: cupy.called.index("launch")]


def test_a_table_is_sent_apart_from_all_streams(cupy, monkeypatch):
    """A later call on another stream, or one that was not recorded, reads it too."""
    monkeypatch.setattr(cupy.current, "recording", True)
    arrays = draw("linear_attention", np.random.default_rng(0), t=7, k=3, v=2, dtype=np.float32)
    there = {name: cupy.ndarray(x) for name, x in arrays.items()}
    ttr_np.linear_attention(**there)  # asserts that nothing is sent as a part of the graph


def test_a_cache_on_the_device_is_read_and_grows_where_it_lies(cupy, monkeypatch):
    """No wait and no copy of its pairs for a query; a recorded graph never writes slots that others may have."""
    arrays = draw("softmax_attention", np.random.default_rng(0), lead=(2,), t=600, k=16, v=5, dtype=np.float32)
    attend = partial(ttr_np.softmax_attention, output_final_state=True)
    before, token, last = ({name: cupy.array(x[:, s]) for name, x in arrays.items()} for s in CUTS)
    _, first = attend(**before)
    _, state = attend(**token, initial_state=first)
    ttr_np.softmax_attention(**last, initial_state=state)  # sends a table
    cupy.counted.update(waits=0, arrays=0, sent=0)
    ttr_np.softmax_attention(**last, initial_state=state)
    assert cupy.counted == {"waits": 0, "arrays": 2, "sent": 0}  # answers, and those of pieces
    o, grown = attend(**last, initial_state=state)
    assert cupy.counted["waits"] == 0 and np.shares_memory(state.k.held, grown.k.held)
    monkeypatch.setattr(cupy.current, "recording", True)
    _, apart = attend(**last, initial_state=grown)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        attend(**last, initial_state=grown, window=3)
    assert not np.shares_memory(grown.k.held, apart.k.held)
    wanted = ttr_np.softmax_attention(**arrays, backend="numpy")
    np.testing.assert_allclose(o.held, wanted[:, -1:], rtol=1e-5)


CUTS = slice(0, 598), slice(598, 599), slice(599, 600)
