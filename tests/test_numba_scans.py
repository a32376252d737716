"""Compiled scans and the short convolution equal their solvers."""

from importlib import import_module

import numpy as np
import pytest

from ttr_np.notation import draw

CASES = [
    ("diagonal_scan", (), {}),
    ("diagonal_scan", ("phase",), {}),
    ("selective_scan", (), {}),
    ("selective_scan", ("D",), {}),
    ("short_convolution", (), {}),
    ("short_convolution", ("bias",), {"activation": "silu"}),
]


def solver(name):
    return getattr(import_module(f"ttr_np.solvers.{name}"), name)


def compiled(name):
    return getattr(import_module(f"ttr_np.numba_cpu.{name}"), name)


def by_recurrence(name, **arguments):
    """The solver with its token-by-token form as core."""
    module = import_module(f"ttr_np.solvers.{name}")
    keep, module.chunked = module.chunked, module.recurrent
    try:
        return solver(name)(**arguments)
    finally:
        module.chunked = keep


def timed(arrays):
    """Names of the arrays that are cut along time."""
    return [name for name in arrays if name not in ("A", "D", "weight", "bias")]


def inputs(name, optional, seed=0, lead=(2, 3), t=40, dtype=np.float64, v=70, d=9, n=5):
    return draw(name, np.random.default_rng(seed), optional=optional, lead=lead, t=t, v=v, d=d, n=n, dtype=dtype)


def start(name, optional, **sizes):
    """A state that is not zero."""
    return compiled(name)(**inputs(name, optional, 7, t=5, **sizes), output_final_state=True)[1]


def close(x, y, rtol=1e-12):
    """Equal relative to the scale of what is expected."""
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape and x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(initial=0), 1e-300))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("v, d, n", [(1, 1, 1), (64, 256, 16), (65, 257, 3), (3, 520, 2)])
@pytest.mark.parametrize("t", [0, 1, 2, 3, 4, 130])
@pytest.mark.parametrize("name, optional, options", CASES)
def test_the_kernel_equals_the_recurrence(name, optional, options, t, v, d, n, masked):
    arrays = inputs(name, optional, t=t, v=v, d=d, n=n)
    if masked:
        arrays["mask"] = np.random.default_rng(1).random((3, t)) < 0.6
    before = {key: x.copy() for key, x in arrays.items()}
    common = options | {"initial_state": start(name, optional, v=v, d=d, n=n), "output_final_state": True}
    (o, state), (slow, slow_state) = compiled(name)(**arrays, **common), by_recurrence(name, **arrays, **common)
    close(o, slow)
    close(state[0], slow_state[0])
    for key, x in before.items():
        np.testing.assert_array_equal(arrays[key], x)


@pytest.mark.parametrize("name, optional, options", CASES)
def test_cut_anywhere(name, optional, options):
    arrays = inputs(name, optional, t=300)
    whole, end = compiled(name)(**arrays, **options, output_final_state=True)
    pieces, state = [], None
    for low, high in [(0, 0), (0, 1), (1, 3), (3, 258), (258, 258), (258, 300)]:
        cut = {key: x[..., low:high, :] if key in timed(arrays) else x for key, x in arrays.items()}
        o, state = compiled(name)(**cut, **options, initial_state=state, output_final_state=True)
        pieces.append(o)
    close(np.concatenate(pieces, axis=-2), whole)
    close(state[0], end[0])


@pytest.mark.parametrize("name, optional, options", CASES)
def test_single_precision_is_as_good_as_the_solver(name, optional, options):
    arrays = inputs(name, optional, t=300, dtype=np.float32)
    exact = solver(name)(**{key: x.astype(np.float64) for key, x in arrays.items()}, **options)
    plain = np.abs(solver(name)(**arrays, **options) - exact).max()
    o = compiled(name)(**arrays, **options)
    assert o.dtype == (np.complex64 if "phase" in optional else np.float32)
    assert np.abs(o - exact).max() <= 2 * plain


@pytest.mark.parametrize("name, optional, options", CASES)
def test_any_strides(name, optional, options):
    arrays = inputs(name, optional, t=30)
    expected = compiled(name)(**arrays, **options)

    def mix(x):
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, 2)), 2, 1)

    for change in (
        lambda x: mix(x) if x.ndim == 4 else x,
        lambda x: x[..., ::-1].copy()[..., ::-1],
        lambda x: x[::-1].copy()[::-1],
        lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
        lambda x: np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2) if x.ndim > 1 else x,
    ):
        changed = {key: change(x) for key, x in arrays.items()}
        np.testing.assert_array_equal(compiled(name)(**changed, **options), expected)


@pytest.mark.parametrize("name, optional, options", CASES)
def test_broadcast_axes(name, optional, options):
    arrays = inputs(name, optional, lead=(3, 1), t=20)
    first = {"diagonal_scan": "log_decay", "selective_scan": "C", "short_convolution": "weight"}[name]
    rng = np.random.default_rng(3)
    arrays[first] = -rng.random((4,) + arrays[first].shape[-2:])
    if optional in (("bias",), ("D",)):
        arrays[optional[0]] = rng.standard_normal((5, 1, 1) + arrays[optional[0]].shape[-1:])
    (o, state), (slow, slow_state) = (f(name)(**arrays, **options, output_final_state=True) for f in (compiled, solver))
    close(o, slow)
    close(state[0], slow_state[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name, optional, options", CASES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_number_reaches_what_it_must_and_no_more(name, optional, options, bad):
    for key in inputs(name, optional):
        arrays = inputs(name, optional)
        if bad == np.inf and key in ("log_decay", "A"):
            continue
        arrays[key][(0, 1, 11, 2) if key in timed(arrays) else (0,) * arrays[key].ndim] = bad
        o, slow = compiled(name)(**arrays, **options), by_recurrence(name, **arrays, **options)
        np.testing.assert_array_equal(np.isfinite(o), np.isfinite(slow), err_msg=key)
        close(np.where(np.isfinite(o), o, 0), np.where(np.isfinite(slow), slow, 0))


@pytest.mark.parametrize("optional", [(), ("phase",)])
def test_a_full_reset_of_a_diagonal_scan_forgets_even_a_nan(optional):
    arrays = inputs("diagonal_scan", optional)
    arrays["x"][0, 1, 11, 2] = np.nan
    arrays["log_decay"][0, 1, 20, 2] = -np.inf
    o, slow = compiled("diagonal_scan")(**arrays), by_recurrence("diagonal_scan", **arrays)
    np.testing.assert_array_equal(np.isnan(o[0, 1, :, 2]), (np.arange(40) >= 11) & (np.arange(40) < 20))
    np.testing.assert_allclose(o, slow, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name, optional, options", CASES)
def test_the_future_changes_no_bit_of_the_past(name, optional, options):
    arrays, other = inputs(name, optional, t=90), inputs(name, optional, 5, t=90)
    for key, x in arrays.items():
        if key in timed(arrays):
            other[key][..., :41, :] = x[..., :41, :]
        else:
            other[key] = x
    np.testing.assert_array_equal(
        compiled(name)(**arrays, **options)[..., :41, :], compiled(name)(**other, **options)[..., :41, :]
    )


@pytest.mark.parametrize("name, optional, options", CASES)
def test_a_sequence_alone_has_the_bits_of_one_in_a_batch(name, optional, options):
    arrays = inputs(name, optional, lead=(5, 3), t=60, dtype=np.float32)
    alone = {key: x[3, 1] if key in timed(arrays) else x for key, x in arrays.items()}
    np.testing.assert_array_equal(compiled(name)(**alone, **options), compiled(name)(**arrays, **options)[3, 1])


@pytest.mark.parametrize("name, optional, options", CASES)
def test_packed_sequences(name, optional, options):
    arrays = inputs(name, optional, t=40)
    options = options | {"cu_seqlens": [0, 0, 7, 8, 40], "output_final_state": True}
    (o, state), (slow, slow_state) = compiled(name)(**arrays, **options), solver(name)(**arrays, **options)
    close(o, slow)
    close(state[0], slow_state[0])


@pytest.mark.parametrize("name, optional, options", CASES)
def test_no_sequences(name, optional, options):
    arrays = inputs(name, optional, lead=(2, 0))
    close(compiled(name)(**arrays, **options), solver(name)(**arrays, **options))


def test_extreme_gates_and_angles():
    arrays = inputs("diagonal_scan", ("phase",))
    arrays["log_decay"][0, 0, :9, 0] = [0, -1e-300, -1e-10, -1, -87.5, -104, -700, -746, -np.inf]
    angles = [0, 0.785, 0.786, np.pi / 2, np.pi, 3.5 * np.pi, 999999.9, 1e7, -1e300]
    arrays["phase"][0, 0, :9] = np.array(angles)[:, None]
    arrays["phase"] *= np.array([1, -1])[:, None, None, None]
    close(compiled("diagonal_scan")(**arrays), by_recurrence("diagonal_scan", **arrays))


def test_a_complex_input():
    arrays = inputs("diagonal_scan", ("phase",))
    arrays["x"] = arrays["x"] + 1j * np.random.default_rng(2).standard_normal(arrays["x"].shape)
    arrays["x"] = arrays["x"][..., ::-1, :]
    close(compiled("diagonal_scan")(**arrays), by_recurrence("diagonal_scan", **arrays))


def test_steep_rates():
    arrays = inputs("selective_scan", ("D",))
    arrays["delta"][..., 3, :] = 1e4
    arrays["delta"][..., 9, :] = 0
    arrays["A"][2] = -1e-12
    close(compiled("selective_scan")(**arrays), by_recurrence("selective_scan", **arrays))
