"""Arrays and tables of other libraries, each tested with the real package: in without a copy, labels out again."""

from __future__ import annotations

import cudaemu
import numpy as np
import pytest
from cudaemu import needed

import ttr_np
from ttr_np.backends import available_backends

ESTIMATORS = [
    ttr_np.TestTimeRegressor("nlms"),
    ttr_np.RecursiveLeastSquaresRegressor(),
    ttr_np.LocalPolynomialRegressor(bandwidth=2.0),
    ttr_np.KernelSmoother(bandwidth=2.0),
]


@pytest.fixture(autouse=True)
def solvers():
    ttr_np.set_backend("numpy")


def drawn(dtype=np.float64):
    return [x.astype(dtype) for x in np.random.default_rng(0).standard_normal((3, 7, 4))]


def to_torch(x):
    return pytest.importorskip("torch", reason="torch is not installed: pip install torch").from_numpy(x.copy())


def to_jax(x):
    jax = pytest.importorskip("jax", reason="JAX is not installed: pip install jax")
    jax.config.update("jax_enable_x64", True)  # else float64 would silently become float32 on its way in
    return jax.numpy.asarray(x)


LIBRARIES = {"torch": to_torch, "jax": to_jax}


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_operators_layers_memories_and_estimators_take_arrays_of(name, dtype):
    q, k, v = drawn(dtype)
    q2, k2, v2 = (LIBRARIES[name](x) for x in (q, k, v))
    beta = np.full(7, 0.5)
    expected = ttr_np.delta_rule(q, k, v, beta)
    assert np.array_equal(ttr_np.delta_rule(q2, k2, v2, LIBRARIES[name](beta)), expected)
    layer = ttr_np.layers["gated_deltanet"]
    assert np.array_equal(layer(q2, k2, v2), layer(q, k, v))
    mask = np.arange(7) % 2 == 0
    memory = ttr_np.Memory("softmax").memorize(k2, v2, mask=LIBRARIES[name](mask))
    assert memory.device == "cpu"
    answers = memory.recall(q2)
    assert np.array_equal(answers, ttr_np.Memory("softmax").memorize(k, v, mask=mask).recall(q))
    assert type(answers) is np.ndarray and answers.dtype == dtype
    assert np.array_equal(ttr_np.equivalent_kernel("softmax", q2, k2), ttr_np.equivalent_kernel("softmax", q, k))
    for model in ESTIMATORS:
        assert np.array_equal(model.fit(k2, v2).predict(q2), model.fit(k, v).predict(q))


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_copy_is_made_on_the_way_in(name):
    from ttr_np.calling import as_array

    x = LIBRARIES[name](np.zeros((5, 3)))
    first, again = as_array("x", x), as_array("x", x)
    assert first.ctypes.data == again.ctypes.data
    if name == "torch":
        assert first.ctypes.data == x.data_ptr()


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_do_not_mix(name):
    q, k, v = drawn()
    with pytest.raises(TypeError, match=f"k is numpy on cpu, v is {name}"):
        ttr_np.Memory("gla").memorize(k, LIBRARIES[name](v))


def test_a_tensor_that_wants_gradients_is_refused_with_the_words_of_its_own_library():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    x = torch.ones((3, 2), requires_grad=True)
    with pytest.raises(TypeError, match="k cannot be shared with NumPy: .*detach"):
        ttr_np.Memory("gla").memorize(x, x)


def test_sixteen_bits_come_from_jax():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, k, v = (to_jax(x.astype(ml_dtypes.bfloat16)) for x in drawn())
    o = ttr_np.Memory("delta_rule").step(q, k, v)
    assert o.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(o, ttr_np.layers["delta_rule"](*(np.asarray(x) for x in (q, k, v))))


def test_sixteen_bits_come_from_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensors = [torch.from_numpy(x).bfloat16() for x in drawn()]
    q, k, v = (x.float().numpy().astype(ml_dtypes.bfloat16) for x in tensors)
    o, state = ttr_np.linear_attention(*tensors, output_final_state=True)
    assert o.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(o, ttr_np.linear_attention(q, k, v))
    np.testing.assert_array_equal(ttr_np.layers["gla"](*tensors), ttr_np.layers["gla"](q, k, v))
    row = {name: x.shape[1:] for name, x in (("q", q), ("k", k), ("v", v))}
    step = ttr_np.Stream("linear_attention", dtype=ml_dtypes.bfloat16, **row)
    np.testing.assert_array_equal(step(*(x[0] for x in tensors)), ttr_np.linear_attention(q, k, v)[0])
    start = torch.from_numpy(state.S).bfloat16()
    assert ttr_np.linear_attention(*tensors, initial_state=start).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_that_cannot_be_shared_is_named(dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    x = torch.ones((3, 2), dtype=getattr(torch, dtype))
    with pytest.raises(TypeError, match="v cannot be shared with NumPy: .*detach"):
        ttr_np.linear_attention(x, x, x.clone().requires_grad_())


def test_arrays_of_cupy_stay_on_their_gpu(tmp_path):
    state = available_backends()["cupy"]
    if state != "ok":
        pytest.skip(f"CuPy needs a GPU: {state}")
    import cupy

    q, k, v = drawn(np.float32)
    ttr_np.set_backend("auto")
    memory = ttr_np.Memory("gated_deltanet").memorize(cupy.asarray(k), cupy.asarray(v))
    assert memory.device.startswith("gpu")
    answers = memory.recall(cupy.asarray(q))
    assert isinstance(answers, cupy.ndarray)
    expected = ttr_np.Memory("gated_deltanet", backend="numpy").memorize(k, v).recall(q)
    np.testing.assert_allclose(answers.get(), expected, rtol=1e-4, atol=1e-5)
    memory.save(tmp_path / "m.npz")
    loaded = ttr_np.Memory.load(tmp_path / "m.npz", backend="numpy")
    assert loaded.device == "cpu"
    np.testing.assert_allclose(loaded.recall(q), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="this memory is on cpu, the arrays are on gpu 0"):
        loaded.recall(cupy.asarray(q))
    moved = loaded.to("gpu").recall(cupy.asarray(q))
    np.testing.assert_allclose(moved.get(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="estimators compute on the CPU"):
        ESTIMATORS[1].fit(cupy.asarray(k), cupy.asarray(v))


@needed(cudaemu.missing())
@pytest.mark.parametrize("name", ["linear_attention", "gated_deltanet", "kda", "mesanet", "recursive_least_squares"])
def test_a_memory_on_a_gpu_is_that_of_the_cpu(name, cupy, tmp_path):
    q, k, v = drawn(np.float32)
    mask = np.arange(7) % 3 > 0
    ttr_np.set_backend(None)
    memory = ttr_np.Memory(name, mergeable=True).memorize(cupy.asarray(k), cupy.asarray(v), mask=mask)
    plain = ttr_np.Memory(name, backend="numpy", mergeable=True).memorize(k, v, mask=mask)
    answers, expected = memory.recall(cupy.asarray(q)), plain.recall(q)
    assert isinstance(answers, cupy.ndarray) and memory.device.startswith("gpu")
    np.testing.assert_allclose(answers.get(), expected, rtol=1e-4, atol=1e-5)
    twice = plain.merge(plain).recall(q)
    np.testing.assert_allclose(memory.merge(memory).recall(cupy.asarray(q)).get(), twice, rtol=1e-4, atol=1e-5)
    memory.save(tmp_path / "m.npz")
    loaded = ttr_np.Memory.load(tmp_path / "m.npz", backend="numpy")
    assert loaded.device == "cpu"
    np.testing.assert_allclose(loaded.recall(q), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="this memory is on cpu, the arrays are on gpu"):
        loaded.recall(cupy.asarray(q))
    moved = ttr_np.Memory.load(tmp_path / "m.npz").to("gpu").recall(cupy.asarray(q))
    np.testing.assert_allclose(moved.get(), expected, rtol=1e-4, atol=1e-5)


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ESTIMATORS, ids=repr)
def test_pandas_labels_are_kept(model):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    _, k, v = drawn()
    days = pandas.date_range("2001-12-01", periods=7, name="day")
    X = pandas.DataFrame(k, index=days, columns=list("abcd"))
    Y = pandas.DataFrame(v[:, :2], index=days, columns=["co2", "ch4"])
    table, std = model.fit(X, Y).predict(X[:3], return_std=True)
    plain = model.fit(k, v[:, :2]).predict(k[:3])
    model.fit(X, Y)
    pandas.testing.assert_frame_equal(table, pandas.DataFrame(plain, index=days[:3], columns=Y.columns))
    assert list(std.columns) == ["co2", "ch4"] and std.index.equals(days[:3])
    assert list(model.feature_names_in_) == list("abcd") and 0 < model.score(X, Y) <= 1
    series = model.fit(X, Y["co2"]).predict(X)
    assert series.name == "co2" and series.index.equals(days)
    np.testing.assert_allclose(series, model.fit(k, v[:, 0]).predict(k), rtol=1e-12)
    model.fit(X, Y["co2"])
    with pytest.raises(ValueError, match="(?s)should match those that were passed during fit.*same order"):
        model.predict(X[list("bacd")])
    with pytest.raises(ValueError, match="(?s)unseen at fit time:\n- e\n.*now missing:\n- d"):
        model.predict(X.rename(columns={"d": "e"}))
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        assert isinstance(model.predict(k), np.ndarray)


@pytest.mark.parametrize("model", ESTIMATORS, ids=repr)
def test_xarray_labels_are_kept(model):
    xarray = pytest.importorskip("xarray", reason="xarray is not installed: pip install xarray")
    _, k, v = drawn()
    years = {"year": np.arange(1995, 2002), "season": ("year", list("abcdefg"))}
    X = xarray.DataArray(k, dims=("year", "lag"), coords=years | {"lag": [f"lag {i}" for i in range(4)]})
    Y = xarray.DataArray(v[:, :2], dims=("year", "gas"), coords=years | {"gas": ["co2", "ch4"]}, name="ppm")
    table, std = model.fit(X, Y).predict(X[:3], return_std=True)
    assert table.dims == std.dims == ("year", "gas") and table.name == "ppm"
    assert list(table.gas.values) == ["co2", "ch4"] and list(table.year.values) == [1995, 1996, 1997]
    assert list(table.season.values) == list("abc") and "lag" not in table.coords
    np.testing.assert_allclose(table, model.fit(k, v[:, :2]).predict(k[:3]), rtol=1e-12)
    series = model.fit(X, Y.sel(gas="ch4")).predict(X)
    assert series.dims == ("year",) and series.name == "ppm"
    bare = model.fit(xarray.DataArray(k), xarray.DataArray(v)).predict(xarray.DataArray(k))
    assert bare.dims == ("dim_0", "dim_1") and bare.shape == (7, 4)


def test_a_table_may_hold_integers_missing_values_and_no_text():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    X = pandas.DataFrame({"a": [1, 2, 3, 4, 5, 7], "b": pandas.array([1, None, 3, 5, 5, 6], dtype="Int64")})
    y = pandas.Series([1.0, 2.0, 3.0, 4.0, 5.0, np.nan], name="y")
    model = ttr_np.RecursiveLeastSquaresRegressor(missing="skip").fit(X, y)
    answers = model.predict(X)
    assert np.isnan(answers[1]) and np.isfinite(answers.drop(1)).all() and model.dof_ > 2
    with pytest.raises(ValueError, match=r"Input X contains NaN or infinity: it is nan at \(1, 1\)"):
        ttr_np.RecursiveLeastSquaresRegressor().fit(X, y)
    with pytest.raises((ValueError, TypeError), match="X needs numbers: could not convert string to float"):
        model.fit(pandas.DataFrame({"a": ["x", "y"]}), [1.0, 2.0])
    with pytest.raises(TypeError, match="X needs numbers: the dtype of column 'a' is datetime64"):
        model.fit(pandas.DataFrame({"a": pandas.date_range("2026", periods=2)}), [1.0, 2.0])
    with pytest.raises(TypeError, match="all input features have string names"):
        model.fit(pandas.DataFrame({"a": [1.0, 2.0], 3: [1.0, 5.0]}), [1.0, 2.0])
    wide = pandas.DataFrame(np.eye(3))
    assert not hasattr(model.fit(wide, [1.0, 2.0, 3.0]), "feature_names_in_")


@pytest.mark.parametrize("model", ESTIMATORS, ids=str)
def test_dates_beside_numbers_are_refused_by_name(model):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    polars = pytest.importorskip("polars", reason="polars is not installed: pip install polars")
    days, numbers = pandas.date_range("2020", periods=5), np.arange(5.0)
    for times in (days, days.tz_localize("UTC"), days - days[0]):
        with pytest.raises(TypeError, match="X needs numbers: the dtype of column 'when' is "):
            model.fit(pandas.DataFrame({"a": numbers, "when": times}), numbers)
    with pytest.raises(TypeError, match="X needs numbers: the dtype of column 'when' is Date"):
        model.fit(polars.DataFrame({"a": numbers, "when": [x.to_pydatetime() for x in days]}), numbers)


def test_columns_of_polars_are_known_by_name():
    polars = pytest.importorskip("polars", reason="polars is not installed: pip install polars")
    x, y = np.random.default_rng(0).standard_normal((2, 20, 3))
    table = polars.DataFrame(x, schema=["a", "b", "c"])
    model = ttr_np.RecursiveLeastSquaresRegressor().fit(table, polars.Series("y", y[:, 0]))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    plain = ttr_np.RecursiveLeastSquaresRegressor().fit(x, y[:, 0])
    np.testing.assert_allclose(model.predict(table), plain.predict(x), rtol=1e-12)
    with pytest.raises(ValueError, match="must be in the same order"):
        model.predict(table.select("b", "a", "c"))


def test_a_dataset_is_told_from_its_variables():
    xarray = pytest.importorskip("xarray", reason="xarray is not installed: pip install xarray")
    data = xarray.Dataset({"a": ("t", np.arange(5.0)), "b": ("t", np.ones(5))})
    with pytest.raises(TypeError, match=r"X is a Dataset of xarray: pass one of its variables, or X.to_dataarray"):
        ttr_np.RecursiveLeastSquaresRegressor().fit(data, np.arange(5.0))
    with pytest.raises(TypeError, match="y is a Dataset"):
        ttr_np.RecursiveLeastSquaresRegressor().fit(np.ones((5, 2)), data)


def test_rows_that_leave_less_than_one_degree_of_freedom_tell_no_noise():
    x = np.random.default_rng(0).standard_normal((4, 3))
    for n in (1, 4):
        _, std = ttr_np.RecursiveLeastSquaresRegressor().fit(x[:n], x[:n, 0]).predict(x, return_std=True)
        assert np.isnan(std).all()
