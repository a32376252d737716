"""What a call on the GPU costs the host: few calls of the array library, one wait, and nothing found out twice."""

import threading
from functools import cache, partial
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import cudaemu
import numpy as np
import pytest
from cudaemu import needed, nvrtc
from cudaemu.machines import NumbaCuda, on_cpu

import ttr_np
from cuda_kernels import _calls, _plans
from cuda_kernels._sequences import BOTH, COLUMN, ROW, Sequences, place_of
from cuda_kernels.cupy_raw import _gates, _launch
from ttr_np.notation import OPERATORS, draw

pytestmark = needed(cudaemu.missing())

# Calls of the array library in the steady state: each takes microseconds.
STEADY = {
    "linear_attention": ["zeros_like", "empty", "launch"],
    "delta_rule": ["zeros_like", "empty", "launch"],
    "dplr": ["zeros_like", "empty", "launch"],
    "selective_scan": ["launch", "zeros_like", "empty", "launch"],  # the first looks at the gates
    "short_convolution": ["zeros_like", "empty", "launch"],
    "softmax_attention": [*["zeros_like"] * 4, "empty", "launch"],
}
GATED = {name: calls if calls[0] == "launch" else ["launch", *calls] for name, calls in STEADY.items()}
GATED["softmax_attention"] = ["ndim", "ndim", *GATED["softmax_attention"]]  # its options are checked against the gates
del GATED["short_convolution"]


def there(cupy, operator, seed=0, **options):
    """Arrays of an operator on the device; its gates are never narrow."""
    arrays = draw(operator, np.random.default_rng(seed), dtype=np.float32, **{"lead": (2,)} | options)
    return {name: cupy.array(x) for name, x in arrays.items()}


def steady(cupy, operator, **options):
    """What a call like an earlier one asks of the device."""
    door = getattr(ttr_np, operator)
    door(**there(cupy, operator, **options))
    arrays = there(cupy, operator, seed=1, **options)
    cupy.called.clear()
    cupy.counted.update(waits=0, arrays=0, sent=0)
    door(**arrays)
    return cupy.called, cupy.counted


@pytest.mark.parametrize("operator", STEADY)
def test_a_steady_call_makes_its_arrays_and_launches(cupy, operator):
    called, counted = steady(cupy, operator)
    assert called == STEADY[operator]
    assert counted["sent"] == 0 and counted["waits"] == (STEADY[operator][0] == "launch")


@pytest.mark.parametrize("operator", GATED)
def test_all_gates_are_looked_at_in_one_launch_and_waited_for_once(cupy, operator):
    optional = ("D",) if operator == "selective_scan" else ("log_decay",)
    called, counted = steady(cupy, operator, optional=optional, per_channel=False)
    assert called == GATED[operator]
    assert counted["sent"] == 0 and counted["waits"] == 1


def test_a_text_is_put_together_once(cupy):
    from cuda_kernels.cupy_raw import _launch, delta_rule

    arrays, known = there(cupy, "delta_rule"), type(delta_rule.KERNEL).put_together
    ttr_np.delta_rule(**arrays)
    _launch.machine.plans.clear()
    before = known.cache_info()
    ttr_np.delta_rule(**arrays)
    after = known.cache_info()
    assert after.misses == before.misses and after.hits > before.hits


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [7, 300])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("operator", STEADY)
def test_what_is_done_again_is_done_with_the_arrays_of_the_call(cupy, operator, gated, t):
    optional = ("log_decay",) if gated and "log_decay" in OPERATORS[operator].optional else ()
    keep = {} if operator == "softmax_attention" else {"output_final_state": True}
    first, other = (there(cupy, operator, i, optional=optional, per_channel=False, t=t, k=16) for i in (0, 1))
    door = partial(getattr(ttr_np, operator), **keep)
    door(**first)
    (plan,) = _launch.machine.plans.values()
    assert plan
    again = door(**other)
    _launch.machine.plans.clear()
    for found, wanted in zip(flat(again), flat(door(**other)), strict=True):
        np.testing.assert_array_equal(found, wanted)


def flat(results):
    """Answers and fields of the state."""
    o, state = results if isinstance(results, tuple) else (results, ())
    return [x.held for x in (o, *state) if x is not None]


def test_another_layout_another_option_and_another_state_are_other_calls(cupy):
    arrays = there(cupy, "linear_attention")
    turned = {name: cupy.ndarray(np.moveaxis(np.moveaxis(x.held, 0, 1).copy(), 1, 0)) for name, x in arrays.items()}
    call = ttr_np.linear_attention
    wanted = call(**arrays).held
    np.testing.assert_array_equal(call(**turned).held, wanted)
    np.testing.assert_array_equal(call(**arrays, scale=2.0).held, 2 * wanted)
    S = np.random.default_rng(2).standard_normal((2, 5, 3)).astype(np.float32)
    o = call(**arrays, initial_state=cupy.array(S)).held
    np.testing.assert_allclose(o, wanted + arrays["q"].held @ S, rtol=1e-4, atol=1e-5)
    call(**arrays, initial_state=cupy.array(2 * S))
    assert len(_launch.machine.plans) == 4  # the core that spares an initial state takes it as an array like any other
    np.testing.assert_array_equal(call(**arrays).held, wanted)


@pytest.mark.parametrize("operator", ["linear_attention", "delta_rule"])
def test_an_initial_state_is_read_where_it_lies_and_left_as_it_is(cupy, operator):
    arrays, S = there(cupy, operator), np.random.default_rng(2).standard_normal((2, 5, 3)).astype(np.float32)
    given, door = cupy.array(S), partial(getattr(ttr_np, operator), output_final_state=True)
    wanted = door(**{name: x.held for name, x in arrays.items()}, initial_state=S, backend="numpy")
    for _ in range(2):
        o, state = door(**arrays, initial_state=given)
        np.testing.assert_array_equal(given.held, S)
        np.testing.assert_allclose(o.held, wanted[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.S.held, wanted[1].S, rtol=1e-4, atol=1e-5)
    _, same = door(**{name: x[:, :0] for name, x in arrays.items()}, initial_state=given)
    assert same.S is not given
    np.testing.assert_array_equal(same.S.held, S)


def test_arrays_that_cannot_be_told_apart_make_no_plan(cupy):
    arrays, other = there(cupy, "delta_rule"), there(cupy, "delta_rule", 1)
    ttr_np.delta_rule(**arrays | {"k": arrays["q"]})
    assert not _launch.machine.plans
    wanted = ttr_np.delta_rule(**{name: x.held for name, x in other.items()}, backend="numpy")
    for _ in range(2):
        np.testing.assert_allclose(ttr_np.delta_rule(**other).held, wanted, rtol=1e-5, atol=1e-6)
    one = arrays | {"k": arrays["q"]}
    wanted = ttr_np.delta_rule(**{name: x.held for name, x in one.items()}, backend="numpy")
    np.testing.assert_allclose(ttr_np.delta_rule(**one).held, wanted, rtol=1e-5, atol=1e-6)


def test_a_core_that_computes_other_arrays_is_called_every_time(cupy, monkeypatch):
    from cuda_kernels.cupy_raw import _launch, linear_attention

    monkeypatch.setattr(linear_attention, "alike", lambda x: x.copy())
    for seed in range(3):
        arrays = {name: cupy.ndarray(abs(x.held)) for name, x in there(cupy, "linear_attention", seed).items()}
        wanted = ttr_np.linear_attention(**{n: x.held for n, x in arrays.items()}, normalize=True, backend="numpy")
        found = ttr_np.linear_attention(**arrays, normalize=True)
        np.testing.assert_allclose(found.held, wanted, rtol=1e-5, atol=1e-6)
    assert list(_launch.machine.plans.values()) == [()]


def test_plans_are_bounded(cupy, monkeypatch):
    monkeypatch.setattr(_plans, "MOST", 3)
    for t in (1, 2, 3, 4, 5, 1):
        ttr_np.delta_rule(**there(cupy, "delta_rule", t=t))
        assert len(_launch.machine.plans) <= 3


def test_options_that_cannot_be_looked_up_are_no_error(cupy):
    arrays = there(cupy, "linear_attention")
    wanted = ttr_np.linear_attention(**arrays, scale=2.0).held
    for _ in range(2):
        np.testing.assert_array_equal(ttr_np.linear_attention(**arrays, scale=np.array(2.0)).held, wanted)


# ---- gates -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "as they come": lambda x: x,
    "heads last": lambda x: np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0),
    "with gaps": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "repeated": lambda x: np.broadcast_to(x[:1], x.shape),
}
BAD = {
    "log_decay": ("linear_attention", 0.5, "log_decay must be <= 0 everywhere; it is 0.5 at"),
    "A": ("selective_scan", 0.5, "A must be <= 0 everywhere; it is 0.5 at"),
    "delta": ("selective_scan", -0.5, "delta must be >= 0 everywhere; it is -0.5 at"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gate_on_the_device_is_refused_wherever_it_is_wrong(cupy, name, layout, dtype):
    operator, bad, words = BAD[name]
    optional = ("log_decay",) if name == "log_decay" else ()
    arrays = draw(operator, np.random.default_rng(0), lead=(2,), t=9, optional=optional, dtype=dtype)
    door, shape = getattr(ttr_np, operator), arrays[name].shape
    for place in product(*({0, n - 1} for n in shape)):
        if layout == "repeated" and place[0]:
            continue
        wrong = arrays[name].copy()
        wrong[(place[0], *place[1:-1], (place[-1] + 1) % shape[-1])] = np.nan  # does not hide it
        wrong[place] = bad
        given = {key: cupy.ndarray(x) for key, x in arrays.items()} | {name: cupy.ndarray(LAYOUTS[layout](wrong))}
        with pytest.raises(ValueError, match=words + rf" \({', '.join(map(str, place))}"):
            door(**given)
        cupy.counted.update(waits=0)
        door(**given | {name: cupy.ndarray(LAYOUTS[layout](arrays[name]))})
        assert cupy.counted["waits"] == 1  # a flag that was raised is down again


def test_shares_must_lie_between_0_and_1(cupy):
    optional = ("momentum", "weight_decay")
    arrays = there(cupy, "test_time_training", optional=optional)
    call = partial(ttr_np.test_time_training, memory=ttr_np.Linear())
    for name in optional:
        for bad in (-0.5, 1.5):
            wrong = arrays[name].held.copy()
            wrong[1, 3] = bad
            with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\] everywhere; it is {bad} at \(1, 3\)"):
                call(**arrays | {name: cupy.ndarray(wrong)})
    wrong = cupy.ndarray(-arrays["step_size"].held)
    with pytest.raises(ValueError, match=r"step_size must be >= 0 everywhere; it is -[0-9.]+ at \(0, 0\)"):
        call(**arrays | {"step_size": wrong})


def test_resets_and_bad_numbers_are_no_wrong_gates(cupy):
    arrays = there(cupy, "linear_attention", optional=("log_decay",), per_channel=False)
    arrays["log_decay"].held[0, 1:3] = -np.inf, np.nan
    assert np.isnan(ttr_np.linear_attention(**arrays).held).any()


def test_a_number_as_gate_is_looked_at_on_the_host(cupy):
    arrays = there(cupy, "linear_attention")
    with pytest.raises(ValueError, match=r"log_decay must be <= 0 everywhere; it is 0.5 at \(0, 0\)"):
        ttr_np.linear_attention(**arrays, log_decay=0.5)
    cupy.counted.update(waits=0)
    ttr_np.linear_attention(**arrays, log_decay=-0.5)
    assert cupy.counted["waits"] == 0


def test_a_wrong_gate_is_told_before_what_is_found_later(cupy):
    arrays = there(cupy, "linear_attention", optional=("log_decay",), per_channel=False)
    arrays["log_decay"].held[1, 2] = 1
    with pytest.raises(ValueError, match="log_decay must be <= 0"):
        ttr_np.linear_attention(**arrays, initial_state=cupy.array(np.zeros((7, 7))))


@needed(nvrtc.missing())
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("real", ["float", "double"])
def test_the_look_at_gates_leaves_room_for_all_threads_of_a_multiprocessor(real, architecture):
    found = nvrtc.needs(nvrtc.machine_code(_gates.KERNEL.source({"real": real}, {}), architecture))
    assert found.registers <= 32 and found.stack == 0


# ---- where sequences lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [BOTH, ROW, COLUMN, ()])
@pytest.mark.parametrize("memory", [(), (2, 3, 4), (1, 3, 4), (2, 1, 4), (2, 3, 1), (1, 3, 1), (1, 1, 1), (4,)])
def test_strides_are_those_of_the_view_that_a_kernel_would_walk(memory, own):
    sequences, rng = Sequences(memory, (2, 3, 4)), np.random.default_rng(0)
    for size in product((1, 2), (1, 3), (1, 4)):
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            whole = rng.standard_normal([size[axis] for axis in order] + [5, 6][: len(own)])
            x = np.transpose(whole, [*np.argsort(order), *range(3, whole.ndim)])
            view = sequences.view(x, own)
            line = sequences.strides(place_of(x, own))
            if line is None:
                assert not np.shares_memory(view, x)
                x = sequences.level(x, own)
                line = sequences.strides(place_of(x, own))
                view = sequences.view(x, own)
            assert np.shares_memory(view, x)
            for place in product(*map(range, sequences.shape), range(sequences.groups)):
                at = tuple(i if n > 1 else 0 for i, n in zip(place, view.shape, strict=False))
                begin = sum(i * step for i, step in zip(place, line, strict=False))
                assert begin * x.itemsize == view[(*at, ...)].ctypes.data - x.ctypes.data


def test_a_stream_whose_groups_lie_unevenly_answers_each_of_its_tokens():
    shapes = {"q": (2, 3, 4, 5), "k": (3, 1, 5), "v": (3, 1, 2)}
    for backend in ("cupy", "numba-cuda"):
        rng = np.random.default_rng(0)
        with on_cpu(backend):
            mine, plain = (ttr_np.Stream("linear_attention", **shapes, backend=name) for name in (backend, "numpy"))
            for _ in range(3):
                token = [rng.standard_normal(shape) for shape in shapes.values()]
                np.testing.assert_allclose(mine(*token), plain(*token), rtol=1e-12, atol=1e-14)


# ---- the first call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["linear_attention", "delta_rule", "recursive_least_squares", "mesa"])
def test_texts_of_a_call_are_compiled_side_by_side(cupy, monkeypatch, operator):
    begun, known, together = [], _launch.compiled, threading.Event()

    def compiled(*key):
        begun.append(key)
        if len(begun) > 1:
            together.set()
        assert together.wait(timeout=60), "another should be compiled, too, before this one is done"
        return known(*key)

    monkeypatch.setattr(cupy.RawModule.machine, "run", lambda *_: None)
    monkeypatch.setattr(_launch, "compiled", cache(compiled))
    arrays = there(cupy, operator, t=2048, k=16, v=16)
    getattr(ttr_np, operator)(**arrays)


def test_launches_wait_for_each_other_and_for_nobody_else():
    made = []
    machine = SimpleNamespace(
        run=lambda name, *_: made.append(name), prepare=lambda launches: made.append(f"{len(launches)} are ready")
    )
    first, second = (_calls.Launch(machine, (name,), []) for name in ("first", "second"))
    with _calls.side_by_side():
        _calls.begin(first)
        _calls.begin(second)
        assert not made
    assert made == ["2 are ready", "first", "second"]
    _calls.begin(first)
    assert made[3:] == ["first"]


def test_launches_that_wait_within_others_keep_their_order():
    made = []
    machine = SimpleNamespace(run=lambda name, *_: made.append(name), prepare=lambda launches: None)
    with _calls.side_by_side():
        _calls.begin(_calls.Launch(machine, ("first",), []))
        with _calls.side_by_side():
            _calls.begin(_calls.Launch(machine, ("second",), []))
        _calls.begin(_calls.Launch(machine, ("third",), []))
    assert made == ["first", "second", "third"]


def test_answers_are_brought_back_after_all_launches(cupy):
    arrays = draw("linear_attention", np.random.default_rng(0), dtype=np.float32, lead=(2,), t=300, k=16)
    wanted = ttr_np.linear_attention(**arrays, backend="numpy")
    cupy.called.clear()
    found = ttr_np.linear_attention(**arrays, backend="cupy")
    assert cupy.called.count("launch") == 2
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


# ---- numba-cuda ------------------------------------------------------------------------------------------------------


class Away(NumbaCuda):
    """A machine that is not where NumPy's arrays are."""

    def __init__(self):
        super().__init__()
        self.brought = 0

    def has(self, x):
        return False

    def own(self, x):
        return np.array(x)

    def room(self, x):
        return self.empty(x.shape, x.dtype, x)

    def back(self, x, into):
        self.brought += 1
        into[...] = x


def test_only_what_is_there_is_brought_back(monkeypatch):
    machine, arrays = Away(), draw("linear_attention", np.random.default_rng(0))
    wanted = ttr_np.linear_attention(**arrays, backend="numpy")
    with on_cpu("numba-cuda"):
        monkeypatch.setattr(import_module("cuda_kernels.numba_cuda._launch"), "machine", machine)
        np.testing.assert_allclose(ttr_np.linear_attention(**arrays, backend="numba-cuda"), wanted, rtol=1e-12)
    assert machine.brought == 2  # the answers and the state, and no normaliser


def test_a_copy_is_read_when_it_has_arrived(monkeypatch):
    launcher = import_module("cuda_kernels.numba_cuda._launch")
    host, into = np.zeros(3), np.zeros(3)

    class Late:
        def synchronize(self):
            host[...] = 1

        def copy_to_host(self, stream):
            return host

    monkeypatch.setattr(launcher.Gpu, "stream", lambda self: Late())
    launcher.Gpu().back(Late(), into)
    np.testing.assert_array_equal(into, 1)
