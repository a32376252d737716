"""The compiled chunk kernels: products, decays, threads, and what test_operators is too small to see."""

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import NamedTuple

import numba
import numpy as np
import pytest

import ttr_np
from ttr_np.notation import draw
from ttr_np.numba_cpu import _compile, _gates, _panels, _rooms, _soon, _triangles

OPERATORS = ("linear_attention", "delta_rule", "dplr")
GATES = {"plain": None, "per step": False, "per channel": True}
every_operator = pytest.mark.parametrize("operator", OPERATORS)
every_gate = pytest.mark.parametrize("gate", GATES)


def solver(operator, arrays, form="chunked", **options):
    """The NumPy solver in one of its forms."""
    module = import_module(f"ttr_np.solvers.{operator}")
    form, module.chunked = module.chunked, getattr(module, form)
    try:
        return getattr(module, operator)(**arrays, **options)
    finally:
        module.chunked = form


def kernel(operator, arrays, **options):
    return getattr(import_module(f"ttr_np.numba_cpu.{operator}"), operator)(**arrays, **options)


def inputs(operator, gate, lead=(2,), dtype=np.float64, seed=0, **sizes):
    optional = () if GATES[gate] is None else ("log_decay",)
    rng, per_channel = np.random.default_rng(seed), bool(GATES[gate])
    return draw(operator, rng, optional=optional, lead=lead, per_channel=per_channel, dtype=dtype, **sizes)


def error(x, exact):
    return np.max(np.abs(x - exact), initial=0.0) / max(1.0, np.max(np.abs(exact), initial=0.0))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = numba.get_num_threads()
    numba.set_num_threads(min(request.param, numba.config.NUMBA_NUM_THREADS))
    yield
    numba.set_num_threads(before)


@numba.njit
def product(table, m, n, depth, alpha, beta, shape):
    c, a, b = _panels.panel(table, 0, alpha), _panels.panel(table, 1, alpha), _panels.panel(table, 2, alpha)
    _panels.multiply(c, a, b, m, n, depth, alpha, beta, shape)


@numba.njit
def solve(table, m, n, like):
    _triangles.solve_unit_lower(_panels.panel(table, 1, like), _panels.panel(table, 0, like), m, n)


@numba.njit
def asked(place, count, lines, tile, tiles):
    rows, number, start = _panels.part(_soon.Soon(_panels.pointer(place, place), count, lines), tile, tiles)
    return [(rows[i], start) for i in range(number)]


def scratch(*matrices):
    """Panels that hold copies of matrices, with NaN around them; the views into them, and the table for kernels."""
    room, table = _panels.panels(matrices[0].dtype, [x.shape for x in matrices])
    room[:] = np.nan
    start = room.__array_interface__["data"][0]
    views = []
    for x, (address, step) in zip(matrices, table, strict=True):
        offset = (address - start) // x.itemsize
        view = np.lib.stride_tricks.as_strided(room[offset:], x.shape, (step * x.itemsize, x.itemsize))
        view[...] = x
        views.append(view)
    return views, table, room


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("m", "n", "depth"), [(1, 1, 1), (6, 16, 3), (7, 17, 0), (13, 130, 5), (64, 64, 64), (5, 33, 97)]
)
def test_a_product_of_panels_is_the_product(dtype, m, n, depth):
    rng = np.random.default_rng(m)
    a, b, c = (rng.standard_normal(shape).astype(dtype) for shape in ((m, depth), (depth, n), (m, n)))
    tolerance = 20 * np.finfo(dtype).eps * max(depth, 1)
    for alpha, beta in ((1, 1), (-2, 0), (0.5, 3)):
        old = np.full_like(c, np.nan) if beta == 0 else c
        (view, *_), table, _room = scratch(old, a, b)
        product(table, m, n, depth, dtype(alpha), dtype(beta), _panels.full)
        np.testing.assert_allclose(view, alpha * a @ b + (beta * c if beta else 0), rtol=0, atol=tolerance)


class Pair(NamedTuple):
    first: _panels.Matrix
    second: _panels.Matrix


class Named(NamedTuple):
    alone: _panels.Matrix
    pair: Pair
    whole: int
    double: float
    last: _panels.Matrix


named = _rooms.panels_by_name(Named)


@numba.njit
def number_by_name(table, like):
    room = named(table, like)
    pair = room.pair
    panels = room.alone.data[0], pair.first.data[1], _panels.row(pair.second, 1)[0]
    return panels, room.whole[0], room.double[1], room.last.column


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_panels_have_their_names_in_their_order(dtype):
    alone, first, second, last = (np.full((2, 3), value, dtype) for value in range(4))
    first[0, 1], second[1, 0] = 7, 8
    whole, double = np.array([[9, 9]]).view(dtype), np.array([[1, 1e-300]]).view(dtype)
    _views, table, _room = scratch(alone, first, second, whole, double, last)
    assert number_by_name(table, dtype(0)) == ((0, 7, 8), 9, 1e-300, 1)


@pytest.mark.parametrize("tiles", [1, 2, 6, 7, 24, 96])
@pytest.mark.parametrize("lines", [1, 4, 5, 8])
@pytest.mark.parametrize("count", [1, 3, 96, 128])
def test_tiles_ask_for_every_line_of_the_next_rows_in_turn(count, lines, tiles):
    addresses = np.arange(count)
    found = [pair for tile in range(tiles) for pair in asked(addresses.ctypes.data, count, lines, tile, tiles)]
    wanted = {(row, 64 * line) for row in range(count) for line in range(min(lines, tiles))}
    assert set(found) == wanted
    if lines <= tiles:
        assert len(found) <= 2 * len(wanted) + tiles  # what is left when all is asked for is the last line once more


@pytest.mark.parametrize("m", [1, 5, 6, 7, 12, 31, 64])
def test_triangles_leave_out_only_what_is_zero_or_unwanted(m):
    rng = np.random.default_rng(m)
    a, b = np.tril(rng.standard_normal((m, m))), rng.standard_normal((m, 9))
    (view, *_), table, _room = scratch(np.zeros((m, 9)), a, b)
    product(table, m, 9, m, 1.0, 0.0, _panels.lower)
    np.testing.assert_allclose(view, a @ b, rtol=0, atol=1e-13)
    x, y = rng.standard_normal((2, m, m))
    (view, *_), table, _room = scratch(np.zeros((m, m)), x, y)
    product(table, m, m, m, 1.0, 0.0, _panels.triangle)
    np.testing.assert_allclose(np.tril(view), np.tril(x @ y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [1, 7, 8, 9, 40])
def test_substitution_solves_and_reads_only_below_the_diagonal(m):
    rng = np.random.default_rng(m)
    L, x = np.tril(rng.standard_normal((m, m)), -1) / 4, rng.standard_normal((m, 11))
    (view, *_), table, _room = scratch(x, L + np.triu(np.full((m, m), np.nan)))
    solve(table, m, 11, 1.0)
    np.testing.assert_allclose(view, np.linalg.solve(np.eye(m) + L, x), rtol=1e-11, atol=1e-11)


@numba.njit(**_compile.OPTIONS)
def exponentials(x):
    return np.array([_gates.exp(number) for number in x])


@pytest.mark.parametrize(("dtype", "least"), [(np.float32, -87), (np.float64, -708)])
def test_the_exponential_is_right_to_two_roundings(dtype, least):
    x = np.concatenate([np.linspace(least, 80, 9999), -np.logspace(-30, 0, 99), [0.0]]).astype(dtype)
    np.testing.assert_allclose(exponentials(x), np.exp(x.astype(np.longdouble)), rtol=2 * np.finfo(dtype).eps)
    assert exponentials(np.array([-np.inf, -1e30, -800], dtype)).tolist() == [0, 0, 0]
    assert exponentials(np.array([np.inf, 800], dtype)).tolist() == [np.inf, np.inf]
    assert np.isnan(exponentials(np.array([np.nan], dtype)))


@every_operator
@every_gate
@pytest.mark.parametrize(
    ("t", "k", "v"), [(1, 1, 1), (2, 7, 1), (63, 3, 17), (65, 16, 33), (129, 40, 111), (70, 1, 64)]
)
def test_kernel_is_the_recurrence(operator, gate, t, k, v, threads):
    arrays = inputs(operator, gate, t=t, k=k, v=v)
    start = kernel(operator, inputs(operator, gate, t=5, k=k, v=v, seed=1), output_final_state=True)[1]
    options = {"initial_state": start, "output_final_state": True, "scale": 0.7}
    (o, state), (wanted, after) = kernel(operator, arrays, **options), solver(operator, arrays, "recurrent", **options)
    assert error(o, wanted) < 1e-12 and error(state.S, after.S) < 1e-12


@every_operator
@every_gate
def test_single_precision_is_as_good_as_the_solver(operator, gate):
    arrays = inputs(operator, gate, lead=(3,), dtype=np.float32, t=1000, k=32, v=24)
    exact = solver(operator, {name: x.astype(np.float64) for name, x in arrays.items()}, "recurrent")
    assert error(kernel(operator, arrays), exact) <= 2 * error(solver(operator, arrays), exact)


@every_operator
@every_gate
def test_constant_slow_decay_does_not_drift(operator, gate):
    if GATES[gate] is None:
        return
    arrays = inputs(operator, gate, lead=(), dtype=np.float32, t=4096, k=8, v=8)
    arrays["log_decay"] = np.full_like(arrays["log_decay"], -1e-4)
    exact = solver(operator, {name: x.astype(np.float64) for name, x in arrays.items()})
    assert error(kernel(operator, arrays), exact) <= 2 * error(solver(operator, arrays), exact)


@pytest.mark.parametrize("memories", [1, 21])
def test_slow_decay_of_memories_of_few_outputs_does_not_drift(memories):
    arrays = inputs("delta_rule", "per step", lead=(memories,), dtype=np.float32, t=4096, k=8, v=1)
    arrays |= {"beta": arrays["beta"] / 100, "log_decay": np.full_like(arrays["log_decay"], -1e-4)}
    start = np.ones((memories, 8, 1), np.float32)
    exact = solver("delta_rule", {name: x.astype(np.float64) for name, x in arrays.items()}, initial_state=start)
    found, plain = (f("delta_rule", arrays, initial_state=start) for f in (kernel, solver))
    assert error(found, exact) <= 4 * error(plain, exact)


@every_operator
@every_gate
@pytest.mark.parametrize("steep", [-np.inf, -1e30, -1e4])
def test_a_steep_gate_costs_its_neighbours_nothing(operator, gate, steep):
    if GATES[gate] is None:
        return
    arrays = inputs(operator, gate, t=100, k=8, v=8)
    for at in (0, 15, 16, 37, 63, 64, 99):
        arrays["log_decay"][:, at] = steep
    wanted, after = solver(operator, arrays, "recurrent", output_final_state=True)
    o, state = kernel(operator, arrays, output_final_state=True)
    assert error(o, wanted) < 1e-13 and error(state.S, after.S) < 1e-13


@every_operator
@every_gate
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_alone_and_in_a_batch_give_the_same_bits(operator, gate, dtype):
    arrays = inputs(operator, gate, lead=(17,), dtype=dtype, t=150, k=20, v=130)
    o, state = kernel(operator, arrays, output_final_state=True)
    for threads in (1, 2):
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        for i in (0, 16):
            alone, after = kernel(operator, {name: x[i] for name, x in arrays.items()}, output_final_state=True)
            np.testing.assert_array_equal(alone, o[i])
            np.testing.assert_array_equal(after.S, state.S[i])


@every_operator
@every_gate
@pytest.mark.parametrize("at", [0, 1, 37, 63, 64, 99])
def test_a_bad_number_changes_no_bit_before_it(operator, gate, at):
    arrays = inputs(operator, gate, t=100, k=20, v=70)
    o = kernel(operator, arrays)
    for name in arrays:
        spoilt = arrays | {name: arrays[name].copy()}
        spoilt[name][(1, at) + (3,) * (arrays[name].ndim - 2)] = np.nan
        found, wanted = kernel(operator, spoilt), solver(operator, spoilt, "recurrent")
        np.testing.assert_array_equal(found[0], o[0])
        np.testing.assert_array_equal(found[1, :at], o[1, :at])
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


@every_operator
@every_gate
def test_grouped_queries_read_one_memory(operator, gate):
    arrays = inputs(operator, gate, lead=(2, 3), t=70, k=8, v=40)
    arrays = {name: x if name == "q" else x[:, :1] for name, x in arrays.items()}
    o, state = kernel(operator, arrays, output_final_state=True)
    assert state.S.shape[:2] == (2, 1)
    for group in range(3):
        one = arrays | {"q": arrays["q"][:, group : group + 1]}
        np.testing.assert_array_equal(kernel(operator, one)[:, 0], o[:, group])


@every_operator
def test_fields_of_records_are_read_right(operator):
    arrays = inputs(operator, "per step", t=70, k=8, v=8)
    packed = {}
    for name, x in arrays.items():
        records = np.zeros(x.shape, np.dtype([("flag", "i1"), ("x", "f8")]))
        records["x"] = x
        packed[name] = records["x"]
    np.testing.assert_array_equal(kernel(operator, packed), kernel(operator, arrays))


@every_operator
def test_many_callers_at_once_get_the_same_bits(operator):
    arrays = inputs(operator, "per step", lead=(4,), t=200, k=32, v=32)
    o = kernel(operator, arrays)
    with ThreadPoolExecutor(4) as callers:
        for found in callers.map(lambda _: kernel(operator, arrays), range(16)):
            np.testing.assert_array_equal(found, o)


def state_of(operator, arrays, options):
    """A memory that holds something already; the second of the three holds NaN."""
    held = [x for x in solver(operator, arrays, output_final_state=True, **options)[1] if x is not None]
    for field in held if "log_decay" in arrays else ():
        field[1] = np.nan
    return tuple(held)


@every_gate
@pytest.mark.parametrize(
    ("operator", "options"),
    [("delta_rule", {}), ("linear_attention", {}), ("linear_attention", {"normalize": True}),
     ("linear_attention", {"bonus": np.linspace(0, 1, 7)})],
)  # fmt: skip
def test_one_token_of_columns_in_tiles_of_every_width(operator, options, gate):
    arrays = inputs(operator, gate, lead=(3, 1), t=1, k=7, v=87)
    arrays["q"] = np.random.default_rng(1).uniform(size=(3, 2, 1, 7))
    options = options | {"initial_state": state_of(operator, arrays, options)}
    if "log_decay" in arrays:
        arrays["log_decay"][1] = -np.inf  # forgets the NaN too
    (o, state), (wanted, after) = (f(operator, arrays, output_final_state=True, **options) for f in (kernel, solver))
    assert "bonus" in options or np.isfinite(o).all()
    for x, y in zip((o, *state), (wanted, *after), strict=True):
        np.testing.assert_allclose(*((0.0, 0.0) if x is y is None else (x, y)), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("gate", ["per step", "per channel"])
@pytest.mark.parametrize(
    ("operator", "options"),
    [("delta_rule", {}), ("linear_attention", {}), ("linear_attention", {"normalize": True}),
     ("linear_attention", {"bonus": np.linspace(0, 1, 7)})],
)  # fmt: skip
@pytest.mark.parametrize("reset", [33, 64])
def test_a_full_reset_forgets_what_was_bad_in_an_earlier_chunk(operator, options, gate, reset, threads):
    arrays = inputs(operator, gate, lead=(3,), t=100, k=7, v=70)
    arrays["log_decay"][:, reset] = -np.inf
    start = [x for x in solver(operator, arrays, output_final_state=True, **options)[1] if x is not None]
    clean = kernel(operator, arrays, initial_state=tuple(start), **options)
    arrays["v"][0, 5, 2] = start[0][1, 3, 33] = np.nan
    for field in start:
        field[2] = np.nan
    options = options | {"initial_state": tuple(start), "output_final_state": True}
    (o, state), (wanted, after) = kernel(operator, arrays, **options), solver(operator, arrays, "recurrent", **options)
    for x, y in zip((o, *state), (wanted, *after), strict=True):
        np.testing.assert_allclose(*((0.0, 0.0) if x is y is None else (x, y)), rtol=1e-12, atol=1e-13)
    assert np.isnan(o[:, reset - 1]).any(axis=-1).all() and np.isfinite(o[:, reset + 1 :]).all()
    np.testing.assert_array_equal(np.delete(o[1], 33, axis=-1), np.delete(clean[1], 33, axis=-1))


@pytest.mark.filterwarnings("ignore:mesa")  # the layer says that a residual is no number
@pytest.mark.parametrize("method", ["exact", "cg"])
@pytest.mark.parametrize("size", [5, 20])
def test_a_query_whose_square_overflows_spoils_no_later_one(method, size):
    """Rows of scratch end behind the last number, where a NaN of one chunk would wait for the next."""
    arrays = inputs("mesa", "per step", t=100, k=size, v=size, dtype=np.float32)
    before = kernel("mesa", arrays, solver=method)
    arrays["q"][:, 10] *= np.float32(1e30)
    after = kernel("mesa", arrays, solver=method)
    np.testing.assert_array_equal(np.delete(after, 10, axis=-2), np.delete(before, 10, axis=-2))


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("solver", ["exact", "cg", "chebyshev"])
def test_a_full_reset_of_the_mesa_layer_forgets_even_a_nan(solver, backend):
    rng, t = np.random.default_rng(0), 110
    arrays = {name: rng.standard_normal((2, t, n)) for name, n in (("q", 6), ("k", 6), ("v", 4))}
    arrays["log_decay"] = -0.1 * np.abs(rng.standard_normal((2, t)))
    arrays["log_decay"][:, [40, 64, 100]] = -np.inf
    wanted, end = ttr_np.mesa(**arrays, solver=solver, output_final_state=True, backend="numpy")
    lost = tuple(np.full((2, 6, n), np.nan) for n in (4, 6))
    for name, place, state in (("k", 10, None), ("v", 70, None), ("v", 0, lost)):
        bad = arrays | {name: arrays[name].copy()}
        bad[name][0, place, 1] = np.nan
        options = {"solver": solver, "initial_state": state, "backend": backend}
        found, after = ttr_np.mesa(**bad, **options, output_final_state=True)
        low = 100 if place == 70 else 40
        np.testing.assert_allclose(found[:, low:], wanted[:, low:], rtol=0, atol=1e-8)
        for x, y in zip(after, end, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
