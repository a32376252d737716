"""Memories with a diagonal in their dynamics: diagonal plus low rank, scans, the short convolution, channel gates."""

from importlib import import_module
from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg import solve_triangular
from scipy.signal import lfilter

from ttr_np.notation import STATES, draw
from ttr_np.solvers import _chunks
from ttr_np.solvers.delta_rule import delta_rule
from ttr_np.solvers.diagonal_scan import diagonal_scan
from ttr_np.solvers.dplr import dplr
from ttr_np.solvers.linear_attention import linear_attention
from ttr_np.solvers.selective_scan import selective_scan
from ttr_np.solvers.short_convolution import short_convolution

OPTIONAL = {
    "dplr": ["", "log_decay"],
    "diagonal_scan": ["", "phase"],
    "selective_scan": ["", "D"],
    "short_convolution": ["", "bias"],
}
CASES = [(name, tuple(optional.split())) for name, options in OPTIONAL.items() for optional in options]
GATED = ["linear_attention", "delta_rule", "dplr"]


def operator(name):
    return getattr(import_module(f"ttr_np.solvers.{name}"), name)


def arguments(name, optional=(), seed=0, **options):
    """Arguments with a mask-like time axis in all arrays that have one."""
    return draw(name, np.random.default_rng(seed), optional=optional, **options)


def timed(arrays):
    """Names of the arrays that are cut along time."""
    return [name for name in arrays if name not in ("A", "D", "weight", "bias")]


def cut(arrays, low, high):
    """Steps low to high."""
    return {
        name: x if name not in timed(arrays) else x[..., low:high] if name == "mask" else x[..., low:high, :]
        for name, x in arrays.items()
    }


def close(x, y, rtol=1e-12):
    """Equal relative to the scale of what is expected."""
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape and x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(initial=0), 1e-300))


def by_recurrence(name, arrays, **options):
    """The operator with its token-by-token form as core."""
    module = import_module(f"ttr_np.solvers.{name}")
    keep, module.chunked = module.chunked, module.recurrent
    try:
        return operator(name)(**arrays, **options)
    finally:
        module.chunked = keep


@pytest.mark.parametrize("t", [0, 1, 2, 15, 16, 17, 63, 64, 65, 129, 201])
@pytest.mark.parametrize("name, optional", CASES)
def test_blocks_equal_the_recurrence(name, optional, t):
    arrays = arguments(name, optional, lead=(2, 3), t=t)
    state = operator(name)(**arguments(name, optional, 1, lead=(2, 3), t=9), output_final_state=True)[1]
    o, end = operator(name)(**arrays, initial_state=state, output_final_state=True)
    slow, slow_end = by_recurrence(name, arrays, initial_state=state, output_final_state=True)
    close(o, slow)
    close(end[0], slow_end[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name, optional", CASES)
def test_any_cut_gives_the_whole(name, optional, masked):
    arrays = arguments(name, optional, lead=(2,), t=70)
    if masked:
        arrays["mask"] = np.random.default_rng(5).random((2, 70)) < 0.6
    whole, end = operator(name)(**arrays, output_final_state=True)
    for cuts in ([0, 0, 1, 2, 2, 40, 70], [0, 69, 70, 70], list(range(71))):
        state, pieces = None, []
        for low, high in pairwise(cuts):
            o, state = operator(name)(**cut(arrays, low, high), initial_state=state, output_final_state=True)
            pieces.append(o)
        close(np.concatenate(pieces, axis=-2), whole)
        close(state[0], end[0])


@pytest.mark.parametrize("name, optional", CASES)
def test_packed_sequences_are_separate_calls(name, optional):
    arrays = arguments(name, optional, lead=(2,), t=90)
    bounds = [0, 70, 70, 71, 90]
    o, state = operator(name)(**arrays, cu_seqlens=np.array(bounds), output_final_state=True)
    for i, (low, high) in enumerate(pairwise(bounds)):
        own, own_state = operator(name)(**cut(arrays, low, high), output_final_state=True)
        np.testing.assert_array_equal(o[..., low:high, :], own)
        axis = -1 - (own_state[0].ndim - 1)
        np.testing.assert_array_equal(np.take(state[0], i, axis=axis), own_state[0])


@pytest.mark.parametrize("name, optional", CASES)
def test_masked_tokens_are_as_if_removed(name, optional):
    arrays = arguments(name, optional, lead=(), t=150)
    mask = np.random.default_rng(3).random(150) < 0.5
    o, end = operator(name)(**arrays, mask=mask, output_final_state=True)
    kept = {key: x[mask] if key in timed(arrays) else x for key, x in arrays.items()}
    short, short_end = operator(name)(**kept, output_final_state=True)
    close(o[mask], short)
    close(end[0], short_end[0])
    slow = by_recurrence(name, arrays, mask=mask)
    close(o, slow)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name, optional", CASES)
def test_the_future_changes_no_bit_of_the_past(name, optional, masked):
    arrays = arguments(name, optional, t=130)
    mask = {"mask": np.random.default_rng(3).random(130) < 0.7} if masked else {}
    before = operator(name)(**arrays, **mask)
    for now in (1, 64, 100):
        for value in (-3.0, np.nan):
            later = {key: x.copy() for key, x in arrays.items()}
            for key in timed(arrays):
                later[key][now:] = value if key != "delta" else abs(value)
            np.testing.assert_array_equal(operator(name)(**later, **mask)[:now], before[:now])


@pytest.mark.parametrize("name, optional", CASES)
def test_nan_reaches_one_sequence_only(name, optional):
    arrays = arguments(name, optional, lead=(3,), t=70)
    before = operator(name)(**arrays)
    arrays["x" if "x" in arrays else "u" if "u" in arrays else "v"][1, 66] = np.nan
    after = operator(name)(**arrays)
    assert np.isnan(after[1, 66]).all()
    after[1, 66:] = before[1, 66:]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("name, optional", CASES)
def test_layout_does_not_matter(name, optional):
    arrays = arguments(name, optional, lead=(2,), t=67)
    views = {key: np.asfortranarray(x)[..., ::-1].copy()[..., ::-1] for key, x in arrays.items()}
    close(operator(name)(**views), operator(name)(**arrays))


@pytest.mark.parametrize("name, optional", CASES)
def test_leading_axes_broadcast(name, optional):
    arrays = arguments(name, optional, lead=(2, 1), t=66)
    wide = arguments(name, optional, 1, lead=(1, 3), t=66)
    for first in timed(arrays):
        mixed = {key: wide[key] if key == first else x for key, x in arrays.items()}
        lead = np.broadcast_shapes(*(x.shape[:2] for key, x in mixed.items() if key in timed(arrays)))
        full = {
            key: np.ascontiguousarray(np.broadcast_to(x, lead + x.shape[-2:])) if key in timed(arrays) else x
            for key, x in mixed.items()
        }
        close(operator(name)(**mixed), operator(name)(**full))


@pytest.mark.parametrize("name, optional", CASES)
def test_no_sequences_and_size_one(name, optional):
    assert operator(name)(**arguments(name, optional, lead=(0, 2), t=66)).shape[:2] == (0, 2)
    ones = arguments(name, optional, t=66, k=1, v=1, d=1, n=1, w=1)
    close(operator(name)(**ones), by_recurrence(name, ones))


@pytest.mark.parametrize("name, optional", CASES)
def test_half_precision_is_computed_in_float32(name, optional):
    arrays = arguments(name, optional, t=70, dtype=np.float16)
    o, state = operator(name)(**arrays, output_final_state=True)
    exact = operator(name)(**{key: x.astype(np.float32) for key, x in arrays.items()})
    phase = "phase" in optional
    assert o.dtype == (np.complex64 if phase else np.float16) and state[0].dtype == exact.dtype
    np.testing.assert_array_equal(o, exact.astype(o.dtype))


# Diagonal plus low rank


@pytest.mark.parametrize("gate", [None, "step", "channel"])
def test_dplr_is_its_definition(gate):
    x = arguments("dplr", ("log_decay",) if gate else (), t=80, per_channel=gate == "channel")
    S, expected = np.zeros((5, 3)), []
    for t in range(80):
        decay = np.diag(np.ones(5) if gate is None else np.exp(x["log_decay"][t]) * np.ones(5))
        S = (decay + np.outer(x["b"][t], x["a"][t])) @ S + np.outer(x["k"][t], x["v"][t])
        expected.append(0.5 * S.T @ x["q"][t])
    close(dplr(**x, scale=0.5), np.array(expected))


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("gate", [None, "step", "channel"])
def test_the_delta_rule_is_diagonal_plus_low_rank(gate, erase):
    optional = (("log_decay",) if gate else ()) + (("erase_key",) if erase else ())
    x = arguments("delta_rule", optional, t=100, lead=(2,), per_channel=gate == "channel")
    decay = np.exp(x.get("log_decay", np.zeros((2, 100))))
    decay = decay if gate == "channel" else decay[..., None]
    beta = x["beta"][..., None]
    a = -decay * beta * x.get("erase_key", x["k"])
    low_rank = dplr(x["q"], x["k"], beta * x["v"], a, x["k"], log_decay=x.get("log_decay"))
    close(delta_rule(**x), low_rank)


def test_without_a_reading_dplr_is_linear_attention():
    x = arguments("dplr", ("log_decay",), t=100)
    x["a"][...] = 0
    close(dplr(**x), linear_attention(x["q"], x["k"], x["v"], log_decay=x["log_decay"]))


# Gates per channel

STEEP = {
    "reset": [-np.inf],
    "closed": [-1e30],
    "steep, then mild": [-1e4, -0.01, -0.02, -0.01],
    "underflow": [-40.0],
    "mild": [-1e-4],
    "none": [0.0],
    "mixed": [-np.inf, -0.1, 0.0, -1e30, -40.0, -0.3, -1e4],
}


@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-12), (np.float32, 2e-6)])
@pytest.mark.parametrize("kind", STEEP)
@pytest.mark.parametrize("name", GATED)
def test_channel_gates_of_any_steepness_are_exact(name, kind, dtype, rtol):
    x = arguments(name, ("log_decay",), lead=(2,), t=150)
    rng = np.random.default_rng(7)
    x["log_decay"] = rng.choice(STEEP[kind], x["log_decay"].shape) * rng.uniform(0.9, 1.1, x["log_decay"].shape)
    x["log_decay"] = np.nan_to_num(x["log_decay"], nan=0.0, neginf=-np.inf)
    with np.errstate(invalid="raise", divide="raise"):
        o, end = operator(name)(**{key: a.astype(dtype) for key, a in x.items()}, output_final_state=True)
    exact, exact_end = by_recurrence(name, x, output_final_state=True)
    close(o.astype(float), exact, rtol)
    close(end[0].astype(float), exact_end[0], rtol)


@pytest.mark.parametrize("normalize", [False, True])
def test_channel_gates_serve_the_bonus(normalize):
    x = arguments("linear_attention", ("log_decay", "bonus"), lead=(2,), t=150)
    x = {key: np.abs(a) if key != "log_decay" else a for key, a in x.items()}
    slow = by_recurrence("linear_attention", x, normalize=normalize)
    close(linear_attention(**x, normalize=normalize), slow)


@pytest.mark.parametrize("c", [1, 2, 3, 5, 8, 31, 64])
def test_chunk_decays_are_the_products_of_gates(c):
    rng = np.random.default_rng(c)
    log_decay = -rng.exponential(size=(2, c, 3))
    x, y = rng.standard_normal((2, 2, c, 3))
    gates = _chunks.gates_of(log_decay, True)
    sums = _chunks.segment_sums(np.swapaxes(log_decay, -1, -2))
    pairs = np.exp(sums)  # (2, k, c, c)
    close(_chunks.products(x, y, gates.pairs), np.einsum("bik,bkij,bjk->bij", x, pairs, y))
    strict = np.einsum("bik,bkij,bjk->bij", x, pairs, y) * np.tri(c, k=-1)
    close(_chunks.products(x, y, gates.pairs, strict=True), strict)
    close(gates.since, np.exp(np.cumsum(log_decay, axis=-2)))
    close(gates.to_end, np.swapaxes(pairs[..., -1, :], -1, -2))
    late = np.zeros_like(pairs)
    late[..., 1:, :] = pairs[..., :-1, :]
    close(_chunks.products(x, y, _chunks.lag(gates).pairs, strict=True), np.einsum("bik,bkij,bjk->bij", x, late, y))


def test_long_float32_memories_forget_at_the_right_rate():
    t, gate = 20000, np.float32(-1e-4)
    q = k = v = np.ones((t, 1), np.float32)
    o = linear_attention(q, k, v, log_decay=np.full((t, 1), gate))
    exact = np.expm1(float(gate) * t) / np.expm1(float(gate))
    assert abs(o[-1, 0] / exact - 1) < 3e-5  # 3e-4 if each step's decay were rounded


@pytest.mark.parametrize("c", [1, 2, 3, 7, 33, 64])
def test_the_blocked_inverse_is_a_triangular_solve(c):
    L = np.random.default_rng(c).standard_normal((2, c, c))
    expected = [solve_triangular(x, np.eye(c), lower=True, unit_diagonal=True) for x in L]
    np.testing.assert_allclose(_chunks.unit_lower_inverse(L), expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


# Diagonal scan


@pytest.mark.parametrize("angle", [None, 0.7])
def test_a_constant_gate_is_a_filter_of_first_order(angle):
    x = np.random.default_rng(0).standard_normal((200, 3))
    pole = np.exp(-0.05 + 1j * (angle or 0))
    phase = None if angle is None else np.full_like(x, angle)
    expected = lfilter([1], [1, -pole], x, axis=0)
    o = diagonal_scan(x, np.full_like(x, -0.05), phase=phase)
    close(o, expected if angle else expected.real)


@pytest.mark.parametrize("t", [10, 200])
def test_a_phase_gives_complex_numbers_and_takes_them(t):
    x = arguments("diagonal_scan", ("phase",), t=t, dtype=np.float32)
    o, state = diagonal_scan(**x, output_final_state=True)
    assert o.dtype == state.h.dtype == np.complex64
    turned, _ = diagonal_scan(1j * x["x"], x["log_decay"], phase=x["phase"], output_final_state=True)
    assert turned.dtype == np.complex64
    np.testing.assert_allclose(turned, 1j * o, rtol=1e-5, atol=1e-5)
    again = diagonal_scan(**x, initial_state=state)
    gone = np.exp(np.cumsum(x["log_decay"].astype(float) + 1j * x["phase"], axis=0))
    np.testing.assert_allclose(again, o + gone * state.h, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="complex"):
        diagonal_scan(1j * x["x"], x["log_decay"])
    with pytest.raises(TypeError, match="initial_state field h is complex"):
        diagonal_scan(x["x"], x["log_decay"], initial_state=state)


@pytest.mark.parametrize("gate", [-np.inf, -1e30, -1e4])
def test_a_closed_gate_forgets_everything_whatever_the_phase(gate):
    x = arguments("diagonal_scan", ("phase",), t=200)
    x["log_decay"][[30, 130]] = gate
    o = diagonal_scan(**x)
    assert np.isfinite(o).all()
    close(o[130:], diagonal_scan(**{key: a[130:] for key, a in x.items()}))


def test_windows_of_blocks_join():
    x = arguments("diagonal_scan", ("phase",), lead=(2,), t=2 * 4096 + 100, d=2)
    close(diagonal_scan(**x), by_recurrence("diagonal_scan", x))


def test_one_number_is_a_gate_for_all_steps():
    x = np.random.default_rng(0).standard_normal((100, 3))
    close(diagonal_scan(x, -0.5), diagonal_scan(x, np.full_like(x, -0.5)))


# Selective scan


def test_selective_scan_is_its_definition():
    x = arguments("selective_scan", ("D",), t=40)
    h, expected = np.zeros((3, 4)), []
    for t in range(40):
        h = np.exp(x["delta"][t][:, None] * x["A"]) * h + np.outer(x["delta"][t] * x["u"][t], x["B"][t])
        expected.append(h @ x["C"][t] + x["D"] * x["u"][t])
    close(selective_scan(**x), np.array(expected))


def test_one_rate_for_all_entries_is_gated_linear_attention():
    x = arguments("selective_scan", t=90)
    x["delta"][...] = x["delta"][:, :1]
    x["A"][...] = -0.7
    o = linear_attention(x["C"], x["B"], x["delta"] * x["u"], log_decay=-0.7 * x["delta"][:, 0])
    close(selective_scan(**x), o)


def test_a_masked_token_has_no_direct_path():
    x = arguments("selective_scan", ("D",), t=5)
    mask = np.array([True, False, True, True, False])
    silent = {**x, "u": np.where(mask[:, None], x["u"], 0), "delta": np.where(mask[:, None], x["delta"], 0)}
    close(selective_scan(**x, mask=mask), selective_scan(**silent))


# Short convolution


@pytest.mark.parametrize("t", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("w", [1, 2, 4])
def test_short_convolution_is_a_convolution(w, t):
    x = arguments("short_convolution", ("bias",), t=t, w=w)
    expected = np.zeros((t, 4))
    for channel in range(4 if t else 0):
        taps = x["weight"][::-1, channel]
        expected[:, channel] = x["bias"][channel] + np.convolve(x["x"][:, channel], taps)[:t]
    o, state = short_convolution(**x, output_final_state=True)
    close(o, expected)
    assert state.x.shape == (w - 1, 4)
    np.testing.assert_array_equal(state.x, np.concatenate([np.zeros((w, 4)), x["x"]])[t + 1 :])


def test_silu_follows_the_bias():
    x = arguments("short_convolution", ("bias",), t=20)
    y = short_convolution(**x)
    close(short_convolution(**x, activation="silu"), y / (1 + np.exp(-y)))
    with pytest.raises(ValueError, match="None or 'silu', got 'relu'"):
        short_convolution(**x, activation="relu")


def test_the_window_slides_over_memorised_tokens_of_each_sequence():
    rng = np.random.default_rng(0)
    x = arguments("short_convolution", lead=(3,), t=40)
    mask = rng.random((3, 40)) < 0.5
    o = short_convolution(**x, mask=mask)
    for row in range(3):
        for t in range(40):
            past = x["x"][row, :t][mask[row, :t]]
            own = x["x"][row, t] * mask[row, t]
            window = np.concatenate([np.zeros((3, 4)), past, own[None]])[-4:]
            np.testing.assert_allclose(o[row, t], np.sum(window * x["weight"], axis=0), rtol=1e-12, atol=1e-14)


def test_a_convolution_needs_a_tap():
    with pytest.raises(ValueError, match="axis 'w' is 0"):
        short_convolution(np.ones((3, 2)), np.ones((0, 2)))


@pytest.mark.parametrize("name", ["dplr", "diagonal_scan", "selective_scan"])
def test_growth_is_refused(name):
    x = arguments(name, ("log_decay",) if name == "dplr" else ())
    gate = "A" if name == "selective_scan" else "log_decay"
    x[gate][0, 0] = 0.5
    with pytest.raises(ValueError, match=f"{gate} must be <= 0"):
        operator(name)(**x)


def test_states_are_the_named_ones():
    for name, optional in CASES:
        state = operator(name)(**arguments(name, optional), output_final_state=True)[1]
        assert type(state) is STATES[name]


@pytest.mark.parametrize("name", ["linear_attention", "delta_rule", "dplr"])
def test_tokens_that_overflow_leave_the_past_its_bits(name):
    """A product of the future with zero is not zero where the future overflows."""
    rng = np.random.default_rng(0)
    x = draw(name, rng, t=20)
    huge = {key: value.copy() for key, value in x.items()}
    for key in ("k", "v"):
        huge[key][12] *= 1e200
    clean = getattr(import_module(f"ttr_np.solvers.{name}"), name)(**x)
    with np.errstate(all="ignore"):
        o = getattr(import_module(f"ttr_np.solvers.{name}"), name)(**huge)
    assert np.array_equal(o[:12], clean[:12])
    assert not np.any(np.isfinite(o[12]))


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("name", ["linear_attention", "delta_rule", "diagonal_scan"])
def test_a_full_reset_forgets_even_a_nan(name, form, monkeypatch):
    rng = np.random.default_rng(0)
    x = draw(name, rng, t=80, optional=("log_decay",) if name != "diagonal_scan" else ())
    bad = {key: value.copy() for key, value in x.items()}
    bad["x" if name == "diagonal_scan" else "v"][5, 1] = np.nan
    module = import_module(f"ttr_np.solvers.{name}")
    monkeypatch.setattr(module, "chunked", getattr(module, form))
    still = getattr(module, name)(**bad)
    x["log_decay"][70] = bad["log_decay"][70] = -np.inf
    clean, o = getattr(module, name)(**x), getattr(module, name)(**bad)
    assert np.all(np.isnan(o[5:70, 1]))
    np.testing.assert_allclose(o[70:], clean[70:], rtol=1e-12, atol=1e-14)
    assert np.array_equal(o[:5], clean[:5])
    np.testing.assert_array_equal(o[:70], still[:70])
