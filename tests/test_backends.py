"""The switch: the choice in force decides, nothing falls back in silence, and the arrays say where they live."""

import threading
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import ttr_np
from ttr_np import backends
from ttr_np.notation import OPERATORS, draw

UNKNOWN = "unknown backend 'torch'.*; the backends are numpy, numba, numba-cuda, cupy and auto"


@pytest.fixture
def every_backend_runs(monkeypatch):
    """A machine on which all backends have all operators."""
    monkeypatch.setattr(backends, "reason", lambda backend: "ok")
    monkeypatch.setattr(backends, "has_operator", lambda backend, operator: True)


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU, whose Numba has the delta rule and nothing else."""
    reasons = {"numpy": "ok", "numba": "ok", "numba-cuda": "no driver", "cupy": "cupy is not installed"}
    monkeypatch.setattr(backends, "reason", reasons.__getitem__)
    monkeypatch.setattr(backends, "has_operator", lambda backend, name: backend == "numpy" or name == "delta_rule")


class Foreign:
    """An array of another library: all it offers is DLPack."""

    def __init__(self, x, device=(1, 0)):
        self.x, self.device = x, device

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


class OnGpu:
    """An array of a library that knows only the CUDA array interface."""

    __cuda_array_interface__ = {"version": 3}


def delta_rule(**options):
    return ttr_np.delta_rule(**draw("delta_rule", np.random.default_rng(0)), **options)


def test_the_nearer_choice_wins(every_backend_runs, monkeypatch):
    chosen = lambda **k: ttr_np.resolve_backend("delta_rule", **k)  # noqa: E731
    assert chosen() == "numba"
    monkeypatch.setenv("TTR_BACKEND", "numpy")
    assert chosen() == "numpy"
    ttr_np.set_backend("cupy")
    assert chosen() == "cupy"
    with ttr_np.use_backend("numba-cuda"):
        assert chosen() == "numba-cuda"
        with ttr_np.use_backend("numba"):
            assert chosen() == "numba"
            assert chosen(backend="numpy") == "numpy"
        assert chosen() == "numba-cuda"
    assert chosen() == "cupy"
    ttr_np.set_backend(None)
    assert chosen() == "numpy"
    monkeypatch.setenv("TTR_BACKEND", "")
    assert chosen() == "numba"


def test_a_scope_ends_with_its_block_even_by_an_error(every_backend_runs):
    with pytest.raises(KeyError), ttr_np.use_backend("cupy"):
        raise KeyError
    assert ttr_np.resolve_backend("mesa") == "numba"


def test_a_scope_is_of_its_thread_and_the_process_choice_of_all(every_backend_runs):
    def look(found):
        found.append(ttr_np.resolve_backend("mesa"))

    ttr_np.set_backend("numba-cuda")
    found = []
    with ttr_np.use_backend("cupy"):
        thread = threading.Thread(target=look, args=(found,))
        thread.start()
        thread.join()
        look(found)
    assert found == ["numba-cuda", "cupy"]


@pytest.mark.parametrize(
    "choose",
    [
        lambda name: delta_rule(backend=name),
        lambda name: ttr_np.set_backend(name),
        lambda name: ttr_np.use_backend(name).__enter__(),
        lambda name: ttr_np.resolve_backend("mesa", backend=name),
        lambda name: delta_rule(backend=("numpy", name)),
    ],
)
def test_unknown_names_are_refused_at_once(choose):
    with pytest.raises(ValueError, match=UNKNOWN):
        choose("torch")


def test_an_unknown_name_in_the_environment_says_where_it_came_from(monkeypatch):
    monkeypatch.setenv("TTR_BACKEND", "torch")
    with pytest.raises(ValueError, match="in the environment variable TTR_BACKEND"):
        delta_rule()
    assert delta_rule(backend="numpy").shape == (7, 3)


@pytest.mark.parametrize(("choice", "error"), [((), ValueError), (3, TypeError), (True, TypeError)])
def test_what_is_no_choice_is_refused(choice, error):
    with pytest.raises(error, match="backend is"):
        delta_rule(backend=choice)


def test_unknown_operators_are_refused():
    with pytest.raises(ValueError, match="unknown operator 'attention'; the operators are linear_attention, "):
        ttr_np.resolve_backend("attention")


def test_a_named_backend_that_cannot_run_says_why(no_gpu):
    with pytest.raises(ttr_np.BackendUnavailable, match="backend 'cupy' is not available: cupy is not installed"):
        delta_rule(backend="cupy")
    with pytest.raises(ttr_np.BackendUnavailable, match="backend 'numba-cuda' is not available: no driver"):
        delta_rule(backend="numba-cuda")


def test_a_backend_without_the_operator_lists_what_it_has(no_gpu):
    with pytest.raises(NotImplementedError, match="backend 'numba' has no 'mesa'; it has delta_rule$"):
        ttr_np.resolve_backend("mesa", backend="numba")


def test_auto_takes_numba_where_it_has_the_operator(no_gpu):
    assert ttr_np.resolve_backend("delta_rule") == "numba"
    assert ttr_np.resolve_backend("mesa") == "numpy"


def test_auto_never_crosses_the_bus(every_backend_runs, monkeypatch):
    x, gpu = np.zeros((2, 2)), Foreign(np.zeros((2, 2)), device=(2, 0))
    assert ttr_np.resolve_backend("mesa", x) == "numba"
    assert ttr_np.resolve_backend("mesa", gpu) == "cupy"
    assert ttr_np.resolve_backend("mesa", OnGpu()) == "cupy"
    assert ttr_np.resolve_backend("mesa", Foreign(x, device=(3, 0))) == "numba"  # pinned memory of the host
    monkeypatch.setattr(backends, "has_operator", lambda backend, operator: backend != "cupy")
    assert ttr_np.resolve_backend("mesa", gpu) == "numba-cuda"


def test_arrays_on_a_gpu_without_a_backend_there(no_gpu):
    gpu = Foreign(np.zeros((2, 2)), device=(2, 1))
    words = "no backend runs 'mesa' on gpu 1: .*cupy is not installed.*no driver"
    with pytest.raises(ttr_np.BackendUnavailable, match=words):
        ttr_np.resolve_backend("mesa", gpu)
    with pytest.raises(ttr_np.BackendUnavailable, match="backend 'numpy' computes on the CPU, the arrays are on gpu 1"):
        ttr_np.resolve_backend("mesa", gpu, backend="numpy")


def test_a_gpu_backend_may_be_named_for_numpy_arrays(every_backend_runs):
    assert ttr_np.resolve_backend("mesa", np.zeros(2), backend="cupy") == "cupy"


def test_a_tuple_falls_back_with_one_warning_that_points_at_the_caller(no_gpu):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        o = ttr_np.mesa(**draw("mesa", np.random.default_rng(0)), backend=("cupy", "numba", "numpy"))
    assert o.shape == (7, 3)
    assert [w.category for w in caught] == [RuntimeWarning]
    words = str(caught[0].message)
    assert words.startswith("mesa runs on 'numpy': ") and "cupy is not installed" in words and "has no 'mesa'" in words
    assert caught[0].filename == __file__


def test_the_warning_points_at_the_caller_of_a_layer_and_of_the_question(no_gpu):
    q, k, v = np.random.default_rng(0).standard_normal((3, 4, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ttr_np.layers["softmax"](q, k, v, backend=("cupy", "numpy"))
        ttr_np.resolve_backend("mesa", backend=("cupy", "numpy"))
    assert [w.filename for w in caught] == [__file__] * 2


def test_a_tuple_whose_first_can_run_is_silent(no_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ttr_np.mesa(**draw("mesa", np.random.default_rng(0)), backend=("numpy", "cupy"))
        with ttr_np.use_backend(["numpy", "cupy"]):
            ttr_np.mesa(**draw("mesa", np.random.default_rng(0)))


def test_a_tuple_of_which_none_can_run_gives_all_reasons(no_gpu):
    with pytest.raises(ttr_np.BackendUnavailable, match="cupy is not installed; backend 'numba' has no 'mesa'"):
        ttr_np.mesa(**draw("mesa", np.random.default_rng(0)), backend=("cupy", "numba"))


def test_arrays_of_several_libraries_are_listed():
    x = draw("delta_rule", np.random.default_rng(0))
    with pytest.raises(TypeError, match=r"different libraries or devices: q is numpy on cpu, k is \w+ on cpu, v is"):
        ttr_np.delta_rule(**x | {"k": Foreign(x["k"])}, backend="numpy")
    with pytest.raises(TypeError, match="k is .* on gpu 0, v is .* on gpu 1"):
        ttr_np.linear_attention(x["q"].tolist(), Foreign(x["k"], (2, 0)), Foreign(x["v"], (2, 1)))


def test_arrays_of_another_library_are_taken_through_dlpack():
    x = draw("delta_rule", np.random.default_rng(0))
    foreign = {name: Foreign(a) for name, a in x.items()}
    o = ttr_np.delta_rule(**foreign, backend="numpy")
    assert type(o) is np.ndarray
    np.testing.assert_array_equal(o, ttr_np.delta_rule(**x, backend="numpy"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_masks_boundaries_and_states_are_taken_through_dlpack(operator):
    x = draw(operator, np.random.default_rng(0), t=6, per_channel=False)
    options = {"memory": ttr_np.Linear()} if operator == "test_time_training" else {}
    run = partial(getattr(ttr_np, operator), **options, output_final_state=True, backend="numpy")
    mask, bounds = np.array([True, False] * 3), np.array([0, 2, 6])
    _, begin = run(**x, cu_seqlens=bounds)
    o, end = run(**x, mask=mask, cu_seqlens=bounds, initial_state=begin)
    foreign = type(begin)(*(None if field is None else Foreign(field) for field in begin))
    arrays = {name: Foreign(array) for name, array in x.items()}
    o2, end2 = run(**arrays, mask=Foreign(mask), cu_seqlens=Foreign(bounds), initial_state=foreign)
    np.testing.assert_array_equal(o2, o)
    for a, b in zip(end, end2, strict=True):
        assert (a is None) == (b is None)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["delta_rule", "softmax", "rwkv6", "parallax"])
def test_layers_take_arrays_through_dlpack(name):
    rng = np.random.default_rng(0)
    layer, mask = ttr_np.layers[name], np.array([True, False, True, True])
    q, k, v = rng.standard_normal((3, 4, 5))
    gates = {gate: rng.uniform(0.1, 0.9, 4) for gate in layer.gates if gate == "beta"}
    o = layer(q, k, v, mask=mask, **gates, backend="numpy")
    foreign = {"mask": Foreign(mask)} | {gate: Foreign(x) for gate, x in gates.items()}
    np.testing.assert_array_equal(layer(*map(Foreign, (q, k, v)), **foreign, backend="numpy"), o)


def test_torch_tensors_are_taken_without_a_copy():
    torch = pytest.importorskip("torch")
    x = draw("delta_rule", np.random.default_rng(0))
    o = ttr_np.delta_rule(**{name: torch.from_numpy(a) for name, a in x.items()}, backend="numpy")
    np.testing.assert_array_equal(o, ttr_np.delta_rule(**x, backend="numpy"))


def test_masked_arrays_are_refused_with_the_cure():
    x = draw("delta_rule", np.random.default_rng(0))
    with pytest.raises(TypeError, match="k is a masked array: pass its data, and mask="):
        ttr_np.delta_rule(**x | {"k": np.ma.masked_array(x["k"])})


def test_every_backend_has_ok_or_a_reason():
    found = ttr_np.available_backends()
    assert list(found) == list(backends.BACKENDS) and found["numpy"] == "ok"
    assert all(isinstance(reason, str) and reason for reason in found.values())
    for name, reason in found.items():
        if reason != "ok":
            with pytest.raises(ttr_np.BackendUnavailable) as caught:
                delta_rule(backend=name)
            assert reason in str(caught.value)


@pytest.fixture
def fresh_reasons():
    backends.reason.cache_clear()
    yield
    backends.reason.cache_clear()


def test_reasons_name_what_is_missing(fresh_reasons, monkeypatch):
    monkeypatch.setattr(backends, "has_package", lambda backend: backend != "numba")
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == "cupy" else name)
    monkeypatch.setattr(backends, "import_module", lambda name: SimpleNamespace(reason=lambda: "no driver"))
    assert backends.reason("numba") == "not part of this version of ttr_np"
    assert backends.reason("cupy") == "cupy is not installed"
    assert backends.reason("numba-cuda") == "no driver"


def test_a_package_that_does_not_import_is_a_reason(fresh_reasons, monkeypatch):
    def broken(name):
        raise ImportError("Numba needs NumPy 2.3 or less")

    monkeypatch.setattr(backends, "has_package", lambda backend: True)
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    monkeypatch.setattr(backends, "import_module", broken)
    assert backends.reason("numba") == "numba does not import: Numba needs NumPy 2.3 or less"


def test_every_backend_has_modules_only_of_operators():
    for backend in backends.BACKENDS:
        assert set(backends.operators_of(backend)) <= set(OPERATORS)
    assert backends.operators_of("numpy") == list(OPERATORS)


def test_show_config_says_what_a_bug_report_needs(capsys):
    ttr_np.show_config()
    words = capsys.readouterr().out
    for word in (f"ttr_np {ttr_np.__version__}", "Python", f"numpy {np.__version__}", "device:", "threads:", "auto"):
        assert word in words
    for name in backends.BACKENDS:
        assert f"  {name}: " in words


@pytest.mark.parametrize(
    ("operator", "given"),
    [
        ("mesa", {"ridge": np.ones((3, 2))}),
        ("mesa", {"ridge": np.ones((1, 2))}),
        ("test_time_training", {"memory": ttr_np.Linear(layer_norm=True, scale=np.ones((3, 1)))}),
        ("linear_attention", {"dtype": np.longdouble}),
    ],
)
def test_auto_takes_the_solver_where_the_kernel_cannot_serve_the_call(operator, given):
    given = dict(given)
    dtype = given.pop("dtype", np.float64)
    arrays = draw(operator, np.random.default_rng(0), t=4, k=2, v=1, dtype=dtype)
    arrays["q"] = np.stack([arrays["q"]] * 3)
    door = getattr(ttr_np, operator)
    np.testing.assert_array_equal(door(**arrays, **given), door(**arrays, **given, backend="numpy"))
    with pytest.raises(NotImplementedError, match="backend 'numba'"):
        door(**arrays, **given, backend="numba")
    with pytest.warns(RuntimeWarning, match="runs on 'numpy'"):
        door(**arrays, **given, backend=("numba", "numpy"))


def test_the_gpus_are_told_with_their_driver(monkeypatch):
    answers = {0: "0, NVIDIA H200, 580.159.03\n1, NVIDIA L4, 580.159.03\n", 9: "No devices were found\n"}
    monkeypatch.setattr("shutil.which", lambda name: name)
    for code, said in answers.items():
        done = SimpleNamespace(returncode=code, stdout=said, stderr="")
        monkeypatch.setattr("subprocess.run", lambda *_, done=done, **__: done)
        first = "No devices were found" if code else "GPU 0: NVIDIA H200, driver 580.159.03"
        assert backends.devices()[0] == first and len(backends.devices()) == (1 if code else 2)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert backends.devices() == ["no GPU driver found"]
