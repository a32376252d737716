"""Memories that keep their pairs: each against its definition, in one pass, in pieces, token by token."""

from __future__ import annotations

import tracemalloc
from functools import partial
from itertools import pairwise
from math import comb

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import softmax

from ttr_np.calling import run
from ttr_np.notation import OPERATORS, draw
from ttr_np.solvers import (
    delta_attention,
    linear_attention,
    local_polynomial,
    log_linear_attention,
    path_attention,
    softmax_attention,
    sparse_attention,
    stick_breaking_attention,
    wall_attention,
)
from ttr_np.solvers._cache import Block, empty_cache

MODULES = {
    "softmax_attention": softmax_attention,
    "local_polynomial": local_polynomial,
    "sparse_attention": sparse_attention,
    "path_attention": path_attention,
    "stick_breaking_attention": stick_breaking_attention,
    "wall_attention": wall_attention,
    "delta_attention": delta_attention,
    "log_linear_attention": log_linear_attention,
}
CASES = [
    ("softmax_attention", {}),
    ("softmax_attention", {"window": 1}),
    ("softmax_attention", {"window": 12, "sinks": 2}),
    ("local_polynomial", {"degree": 0}),
    ("local_polynomial", {"degree": 1}),
    ("local_polynomial", {"degree": 1, "window": 12}),
    ("local_polynomial", {"degree": 2, "kernel": "gaussian", "bandwidth": 1.0, "ridge": 1e-3}),
    ("local_polynomial", {"degree": 1, "kernel": "epanechnikov", "bandwidth": 1.2, "ridge": 1e-3}),
    ("local_polynomial", {"degree": 1, "kernel": "boxcar", "bandwidth": 1.2, "ridge": 1e-3}),
    ("sparse_attention", {"scale": 3.0}),
    ("sparse_attention", {"alpha": 1.5, "scale": 3.0, "window": 12}),
    ("sparse_attention", {"alpha": 1.7, "scale": 3.0}),
    ("path_attention", {}),
    ("stick_breaking_attention", {"scale": 3.0}),
    ("wall_attention", {}),
    ("delta_attention", {}),
    ("log_linear_attention", {}),
]


def label(x):
    """How a case is named in a report."""
    return x if isinstance(x, str) else " ".join(f"{name}={value}" for name, value in x.items())


named = partial(pytest.mark.parametrize, "name, options", CASES, ids=label)

PIECES = [0, 0, 1, 7, 7, 8, 20, 37]
T = PIECES[-1]
GAUSSIAN = {"kernel": "gaussian", "bandwidth": 1.0}
PER_STEP = ("log_decay", "beta")


def cut_blocks(monkeypatch):
    """Blocks far smaller than the calls of these tests."""
    for module in (softmax_attention, local_polynomial, sparse_attention, stick_breaking_attention):
        monkeypatch.setattr(module, "block_of", lambda *_: Block(4, 16))


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """The same call in one block and in many."""
    if request.param == "many blocks":
        cut_blocks(monkeypatch)


@pytest.fixture(params=["recurrent", "chunked", "many blocks"])
def form(request, monkeypatch):
    """Which of a module's two cores runs."""
    if request.param == "many blocks":
        cut_blocks(monkeypatch)
    return "recurrent" if request.param == "recurrent" else "chunked"


def call(core, name, arrays, options=None, **common):
    """A core as its operator calls it, defaults of the operator's options included."""
    start = log_linear_attention.start if name == "log_linear_attention" else empty_cache
    fit = {"degree": 1, "kernel": "exponential", "scale": None, "bandwidth": None, "ridge": 1e-6}
    needed = fit if name == "local_polynomial" else {}
    return run(core, name, arrays, needed | (options or {}), start=start, **common)


def problem(name, rng, lead=(), gated=True, **sizes):
    """Random arguments; keys and queries of all lengths, gates among which are full resets and steep ones."""
    gates = ("log_decay",) if gated and "log_decay" in OPERATORS[name].optional else ()
    x = draw(name, rng, optional=gates, lead=lead, per_channel=False, **({"t": T, "k": 2} | sizes))
    x["q"], x["k"] = rng.standard_normal((2,) + x["q"].shape)
    if "log_decay" in x and x["log_decay"].shape[-1] > 15:
        x["log_decay"][..., [5, 11, 13, 15]] = -np.inf, -1e4, -np.inf, -1e30
    return x


def piece(x, low, high):
    """Steps low to high of all arguments."""
    return {name: a[..., low:high] if name in PER_STEP else a[..., low:high, :] for name, a in x.items()}


def close(actual, expected, tolerance=1e-12):
    assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)))


def same_state(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert_allclose(x, y, rtol=1e-11, atol=1e-12)


# The definition, one query at a time ------------------------------------------------------------------------------


def neighbours(t, mask, window, sinks):
    """Pairs that the query of step t sees: memorised so far, the newest and the first ones."""
    steps = [i for i in range(t + 1) if mask[i]]
    return [i for n, i in enumerate(steps) if window is None or n >= len(steps) - window or n < sinks]


def left(x, mask, i, t):
    """Sum of the gates after i up to t; -1e30 is as good as -inf."""
    total = sum(x["log_decay"][s] for s in range(i + 1, t + 1) if mask[s]) if "log_decay" in x else 0.0
    return total if total > -1e29 else -np.inf


def define(name, x, options, mask=None):
    """Every answer by its formula."""
    mask = np.ones(len(x["q"]), bool) if mask is None else mask
    o = np.zeros((len(x["q"]), x["v"].shape[-1]))
    for t in range(len(o)):
        steps = neighbours(t, mask, options.get("window"), options.get("sinks", 0))
        if steps:
            rest = {n: a for n, a in options.items() if n not in ("window", "sinks")}
            o[t] = DEFINITIONS[name](x, t, steps, mask, **rest)
    return o


def softmax_definition(x, t, steps, mask, scale=None):
    scale = x["q"].shape[-1] ** -0.5 if scale is None else scale
    return softmax([scale * x["q"][t] @ x["k"][i] + left(x, mask, i, t) for i in steps]) @ x["v"][steps]


def monomials(z, degree):
    """1, z, z z^T / 2, ...: all products of coordinates, each as often as it occurs; least norm shares them equally."""
    columns, power = [np.ones((len(z), 1))], np.ones((len(z), 1))
    for d in range(1, degree + 1):
        power = np.einsum("np,nk->npk", power, z).reshape(len(z), -1) / d
        columns.append(power)
    return np.concatenate(columns, axis=1)


def polynomial_definition(x, t, steps, mask, degree=1, kernel="exponential", scale=None, bandwidth=None, ridge=1e-6):
    z = x["k"][steps] - x["q"][t]
    u = np.linalg.norm(z, axis=1) / (bandwidth or 1)
    kernels = {
        "exponential": np.exp(x["k"][steps] @ x["q"][t] * (z.shape[1] ** -0.5 if scale is None else scale)),
        "gaussian": np.exp(-(u**2) / 2),
        "epanechnikov": np.maximum(1 - u**2, 0),
        "biweight": np.maximum(1 - u**2, 0) ** 2,
        "triweight": np.maximum(1 - u**2, 0) ** 3,
        "boxcar": (u <= 1) * 1.0,
    }
    with np.errstate(divide="ignore"):  # a steep gate underflows where it is not relative to the largest weight
        logs = np.log(kernels[kernel]) + [left(x, mask, i, t) for i in steps]
    if logs.max() == -np.inf:
        return 0.0
    weights = np.exp(logs - logs.max())
    root = np.sqrt(weights / weights.sum())[:, None]
    X = monomials(z, degree)
    prior = np.sqrt(ridge) * np.eye(X.shape[1])[1:]
    targets = np.concatenate([root * x["v"][steps], np.zeros((len(prior), x["v"].shape[1]))])
    return np.linalg.lstsq(np.concatenate([root * X, prior]), targets, rcond=None)[0][0]


def sparse_definition(x, t, steps, mask, alpha=2.0, scale=None):
    z = (alpha - 1) * scale * x["k"][steps] @ x["q"][t]
    low, high = z.max() - 1, z.max()
    for _ in range(100):
        tau = (low + high) / 2
        p = np.maximum(z - tau, 0) ** (1 / (alpha - 1))
        low, high = (tau, high) if p.sum() > 1 else (low, tau)
    return p / p.sum() @ x["v"][steps]


def path_definition(x, t, steps, mask):
    logits = []
    for i in steps:
        k = x["k"][i]
        for s in range(i + 1, t + 1):
            k = k - mask[s] * x["beta"][s] * x["w"][s] * (x["w"][s] @ k)
        logits.append(x["q"][t] @ k * len(k) ** -0.5)
    return softmax(logits) @ x["v"][steps]


def stick_breaking_definition(x, t, steps, mask, scale=None):
    total, left = np.zeros(x["v"].shape[1]), 1.0
    for i in reversed([i for i in steps if i < t]):
        share = 1 / (1 + np.exp(-scale * x["q"][t] @ x["k"][i]))
        total, left = total + left * share * x["v"][i], left * (1 - share)
    return total


def wall_definition(x, t, steps, mask):
    fading = [np.exp(left(x, mask, i, t)) for i in steps]
    logits = [x["q"][t] @ (f * x["k"][i]) * x["k"].shape[-1] ** -0.5 for f, i in zip(fading, steps, strict=True)]
    return softmax(logits) @ x["v"][steps]


def delta_definition(x, t, steps, mask):
    erase, scale = x.get("erase_key", x["k"]), x["k"].shape[-1] ** -0.5
    u = x["v"][steps]
    for n, i in enumerate(steps[1:], start=1):
        u[n] -= x["beta"][i] * softmax(scale * x["k"][steps[:n]] @ erase[i]) @ u[:n]
    return softmax(scale * x["k"][steps] @ x["q"][t]) @ u


def level(t, i):
    """0 for the pair itself; else the lowest set bits leave t one by one until i is in the bucket that leaves."""
    end, low = t, 0
    while end > i:
        low = end & -end
        end -= low
    return low.bit_length()


def log_linear_definition(x, t, steps, mask):
    last, total = x["levels"].shape[-1] - 1, 0.0
    for n, i in enumerate(steps):
        weight = x["levels"][t, min(level(len(steps) - 1, n), last)]
        total = total + weight * np.exp(left(x, mask, i, t)) * (x["q"][t] @ x["k"][i]) * x["v"][i]
    return total


DEFINITIONS = {
    "softmax_attention": softmax_definition,
    "local_polynomial": polynomial_definition,
    "sparse_attention": sparse_definition,
    "path_attention": path_definition,
    "stick_breaking_attention": stick_breaking_definition,
    "wall_attention": wall_definition,
    "delta_attention": delta_definition,
    "log_linear_attention": log_linear_definition,
}


@named()
@pytest.mark.parametrize("some_masked", [False, True])
def test_answers_are_the_definition(name, options, some_masked, form):
    rng = np.random.default_rng(1)
    x = problem(name, rng)
    mask = rng.uniform(size=T) < 0.6 if some_masked else None
    close(call(getattr(MODULES[name], form), name, x, options, mask=mask), define(name, x, options, mask), 1e-11)


@named()
@pytest.mark.parametrize("some_masked", [False, True])
def test_pieces_give_one_pass(name, options, some_masked, form):
    rng = np.random.default_rng(2)
    x = problem(name, rng, lead=(2, 3))
    mask = rng.uniform(size=(2, 3, T)) < 0.6 if some_masked else None
    core, state, answers = getattr(MODULES[name], form), None, []
    o, end = call(MODULES[name].recurrent, name, x, options, mask=mask, output_final_state=True)
    for low, high in pairwise(PIECES):
        common = {"mask": None if mask is None else mask[..., low:high], "initial_state": state}
        answer, state = call(core, name, piece(x, low, high), options, output_final_state=True, **common)
        answers.append(answer)
    close(np.concatenate(answers, axis=-2), o)
    same_state(state, end)


@named()
def test_packed_sequences_are_separate_calls(name, options, form):
    x, bounds = problem(name, np.random.default_rng(3), lead=(2,)), np.array([0, 1, 1, 20, T])
    core = getattr(MODULES[name], form)
    o, state = call(core, name, x, options, cu_seqlens=bounds, output_final_state=True)
    for low, high in pairwise(bounds):
        assert_array_equal(o[..., low:high, :], call(core, name, piece(x, low, high), options))
    more = call(core, name, x, options, cu_seqlens=bounds, initial_state=state)
    for low, high in pairwise(bounds):
        _, own = call(core, name, piece(x, low, high), options, output_final_state=True)
        close(more[..., low:high, :], call(core, name, piece(x, low, high), options, initial_state=own))


@named()
def test_the_future_changes_no_bit_of_the_past(name, options, form):
    rng = np.random.default_rng(4)
    x, other = problem(name, rng, lead=(2,)), problem(name, rng, lead=(2,))
    core = getattr(MODULES[name], form)
    o = call(core, name, x, options)
    for t in (1, 6, 17, 30):
        past, future = piece(x, 0, t), piece(other, t, T)
        mixed = {n: np.concatenate([past[n], future[n]], axis=-1 if n in PER_STEP else -2) for n in x}
        assert_array_equal(call(core, name, mixed, options)[..., :t, :], o[..., :t, :])


@named()
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_reaches_only_what_sees_it(name, options, form, bad):
    rng = np.random.default_rng(5)
    x = problem(name, rng, lead=(2,))
    core, t = getattr(MODULES[name], form), 17
    clean = call(core, name, x, options)
    for array in set(x) - {"log_decay"}:
        hurt = {n: a.copy() for n, a in x.items()}
        hurt[array][1, t] = bad
        o = call(core, name, hurt, options)
        assert_array_equal(o[0], clean[0])
        assert_array_equal(o[1, :t], clean[1, :t])
        seen = t + 1 if name == "stick_breaking_attention" and array != "q" else t  # its own pair is out of sight
        after = t + 1 if array in OPERATORS[name].reads else t + options["window"] if "window" in options else T
        if name in ("path_attention", "log_linear_attention", "wall_attention", "delta_attention"):
            close(o[1, after:], clean[1, after:])  # the rest of a chunk with a bad query is answered step by step
        else:
            assert_array_equal(o[1, after:], clean[1, after:])
        if np.isnan(bad) and "kernel" not in options and (name != "sparse_attention" or array != "v"):
            assert np.isnan(o[1, seen]).all()


@pytest.mark.parametrize("name", ["softmax_attention", "local_polynomial"])
@pytest.mark.parametrize("gate", [-np.inf, -1e30])
def test_a_full_reset_hides_even_a_nan(name, form, gate):
    x = problem(name, np.random.default_rng(6))
    x["k"][3], x["v"][4], x["log_decay"][20] = np.nan, np.nan, gate
    core = getattr(MODULES[name], form)
    close(call(core, name, x)[20:], call(core, name, piece(x, 20, T)))


@named()
def test_no_tokens_no_sequences_and_nothing_memorised(name, options, form):
    rng, core = np.random.default_rng(7), getattr(MODULES[name], form)
    o, state = call(core, name, problem(name, rng, t=0), options, output_final_state=True)
    assert o.shape == (0, 3)
    assert call(core, name, problem(name, rng, lead=(0, 2)), options).shape == (0, 2, T, 3)
    x = problem(name, rng, k=1, v=1)
    assert_array_equal(call(core, name, x, options, mask=np.zeros(T, bool)), np.zeros((T, 1)))


@named()
def test_queries_of_a_group_share_one_memory(name, options, form):
    rng, core = np.random.default_rng(8), getattr(MODULES[name], form)
    x = problem(name, rng, lead=(2, 1))
    q = rng.standard_normal((2, 4, T, 2))
    o, state = call(core, name, x | {"q": q}, options, output_final_state=True)
    for g in range(4):
        close(o[:, g], call(core, name, x | {"q": q[:, g : g + 1]}, options)[:, 0])
    assert all(field.shape[:2] == (2, 1) for field in state)


@named()
def test_strides_do_not_matter(name, options):
    x = problem(name, np.random.default_rng(9), lead=(2,))
    core = MODULES[name].chunked
    reversed_views = {n: np.ascontiguousarray(a[..., ::-1])[..., ::-1] for n, a in x.items()}
    close(call(core, name, reversed_views, options), call(core, name, x, options), 1e-14)


@named()
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_low_precision_is_no_worse_than_its_input(name, options, dtype):
    x = problem(name, np.random.default_rng(10))
    x = {n: a.astype(a.dtype if n == "log_decay" else dtype) for n, a in x.items()}
    o = call(MODULES[name].chunked, name, x, options)
    exact = call(MODULES[name].chunked, name, {n: a.astype(np.float64) for n, a in x.items()}, options)
    assert o.dtype == dtype
    close(o.astype(float), exact, 1e-5 if dtype == np.float32 else 2e-3)


@pytest.mark.parametrize("name", ["softmax_attention", "local_polynomial", "sparse_attention"])
def test_without_causality_every_query_sees_state_and_call(name, form):
    rng, core = np.random.default_rng(11), getattr(MODULES[name], form)
    x, mask = problem(name, rng, gated=False), rng.uniform(size=T) < 0.6
    options = {"scale": 3.0} if name == "sparse_attention" else {}
    last = [define(name, x | {"q": np.tile(x["q"][t], (T, 1))}, options, mask)[-1] for t in range(T)]
    close(call(core, name, x, options | {"causal": False}, mask=mask), np.array(last), 1e-11)
    _, state = call(core, name, piece(x, 0, 20), options, mask=mask[:20], output_final_state=True)
    rest = call(core, name, piece(x, 20, T), options | {"causal": False}, mask=mask[20:], initial_state=state)
    close(rest, np.array(last)[20:], 1e-11)


# Caches that grow --------------------------------------------------------------------------------------------------


def step(name, x, t, state, options):
    """The core's answer to token t after a state, and the next state."""
    return call(MODULES[name].chunked, name, piece(x, t, t + 1), options, initial_state=state, output_final_state=True)


@pytest.mark.parametrize("name, options", [case for case in CASES if case[0] != "log_linear_attention"], ids=label)
def test_states_that_grow_from_one_stay_what_they_are(name, options):
    """Two continuations of every state: each is that of a copy of it, and no state ever moves."""
    rng = np.random.default_rng(3)
    x, other = problem(name, rng), problem(name, rng)
    _, state = call(MODULES[name].chunked, name, piece(x, 0, 9), options, output_final_state=True)
    kept = []
    for t in range(9, 20):
        copied = type(state)(*(field.copy() for field in state))
        for given in (other, x):
            o, after = step(name, given, t, state, options)
            wanted, end = step(name, given, t, copied, options)
            assert_array_equal(o, wanted)
            kept.append((after, end))
        state = after
    for pair in kept:
        for one, two in zip(*pair, strict=True):
            assert_array_equal(one, two)


@pytest.mark.parametrize("options", [{}, {"window": 8}], ids=str)
def test_a_pair_that_joins_a_long_cache_costs_that_pair(options):
    x, name = problem("softmax_attention", np.random.default_rng(3)), "softmax_attention"
    _, first = call(softmax_attention.chunked, name, piece(x, 0, 12), options, output_final_state=True)
    _, begun = step(name, x, 12, first, options)
    assert not np.shares_memory(first.k, begun.k)  # arrays that were the caller's remain his own
    _, grown = step(name, x, 13, begun, options)
    assert np.shares_memory(begun.k, grown.k) and np.shares_memory(begun.v, grown.v)
    _, aside = step(name, x, 14, begun, options)
    assert not np.shares_memory(begun.k, aside.k)  # its slot is taken
    with pytest.raises(ValueError, match="read-only"):
        grown.k[...] = 0
    _, copied = step(name, x, 14, type(grown)(grown.k.copy(), *grown[1:]), options)
    assert not np.shares_memory(grown.v, copied.v)


# Softmax attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_huge_logits_are_exact(logit, blocks):
    q, k, v = np.full((T, 1), 1.0), np.full((T, 1), logit), np.arange(T, dtype=float)[:, None]
    o = softmax_attention.softmax_attention(q, k, v, scale=1.0)
    close(o, np.cumsum(v, axis=0) / np.arange(1, T + 1)[:, None])
    k[3] = 2 * abs(logit)
    assert_array_equal(softmax_attention.softmax_attention(q, k, v, scale=1.0)[3:], np.full((T - 3, 1), 3.0))


def test_state_holds_only_what_later_queries_see():
    x = problem("softmax_attention", np.random.default_rng(12), lead=(2,))
    mask = np.ones((2, T), bool)
    mask[1, 2:35] = False
    _, state = softmax_attention.softmax_attention(**x, window=5, sinks=2, mask=mask, output_final_state=True)
    assert_array_equal(state.position, [[0, 1, 32, 33, 34, 35, 36], [-1, -1, -1, 0, 1, 2, 3]])
    assert_array_equal(state.k[0], x["k"][0, [0, 1, 32, 33, 34, 35, 36]])
    assert np.all(state.log_weight[1, :3] == -np.inf) and np.all(state.log_weight[:, -1] == 0)


def test_sinks_stay_in_sight_beside_the_window(form):
    rng, options = np.random.default_rng(37), {"window": 5, "sinks": 3}
    x, core = problem("softmax_attention", rng, gated=False), getattr(softmax_attention, form)
    mild = x | {"log_decay": -rng.uniform(0, 0.1, T)}
    for given in (x, mild):
        for mask in (None, rng.uniform(size=T) < 0.7):
            o = call(core, "softmax_attention", given, options, mask=mask)
            close(o, define("softmax_attention", given, options, mask))
            state, answers = None, []
            for low, high in pairwise(PIECES):
                common = {"mask": None if mask is None else mask[low:high], "initial_state": state}
                part = piece(given, low, high)
                answer, state = call(core, "softmax_attention", part, options, output_final_state=True, **common)
                answers.append(answer)
            close(np.concatenate(answers), o)


def test_unit_keys_make_softmax_gaussian():
    x = problem("softmax_attention", np.random.default_rng(13), gated=False, k=4)
    x["q"], x["k"] = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (x["q"], x["k"]))
    gaussian = local_polynomial.local_polynomial(**x, degree=0, kernel="gaussian", bandwidth=0.2**0.5)
    close(softmax_attention.softmax_attention(**x, scale=5.0), gaussian)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"window": 0}, "window must be at least 1"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"causal": False, "window": 3}, "window=3"),
        ({"causal": False, "log_decay": -0.1}, "log_decay ages the past"),
        ({"log_decay": np.zeros((T, 2))}, "one per step"),
        ({"log_decay": np.full(T, 0.1)}, "log_decay must be <= 0"),
    ],
)
def test_softmax_attention_refuses(options, word):
    x = problem("softmax_attention", np.random.default_rng(14), gated=False)
    with pytest.raises(ValueError, match=word):
        softmax_attention.softmax_attention(**x, **options)


# Local polynomials ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", ["exponential", *local_polynomial.KERNELS])
def test_every_kernel_and_degree_is_weighted_least_squares(kernel, degree, blocks):
    x = problem("local_polynomial", np.random.default_rng(15))
    options = {"degree": degree, "kernel": kernel, "ridge": 1e-4, "bandwidth": None if kernel == "exponential" else 1.3}
    close(local_polynomial.local_polynomial(**x, **options), define("local_polynomial", x, options), 1e-11)


@pytest.mark.filterwarnings("ignore:After 0.17:FutureWarning")  # of the peer's own random numbers, unused here
@pytest.mark.parametrize("kind, degree", [("lc", 0), ("ll", 1)])
def test_gaussian_fit_is_that_of_statsmodels(kind, degree):
    kernel_regression = pytest.importorskip("statsmodels.nonparametric.kernel_regression")
    rng = np.random.default_rng(16)
    k, q = rng.standard_normal((60, 2)), rng.standard_normal((60, 2))
    v = np.sin(k[:, :1]) + k[:, 1:] ** 2
    peer = kernel_regression.KernelReg(v[:, 0], k, var_type="cc", reg_type=kind, bw=[0.7, 0.7])
    o = local_polynomial.local_polynomial(
        q, k, v, degree=degree, kernel="gaussian", bandwidth=0.7, ridge=0.0, causal=False
    )
    assert_allclose(o[:, 0], peer.fit(q)[0], rtol=1e-9)


def covariances(x, weights):
    """Means and covariances of the keys and values under weights (t,)."""
    p = weights / weights.sum()
    k_mean, v_mean = p @ x["k"], p @ x["v"]
    z, e = x["k"] - k_mean, x["v"] - v_mean
    return p, k_mean, v_mean, (p[:, None] * z).T @ z, (p[:, None] * e).T @ z


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_local_linear_is_its_covariance_form_and_its_interpolation_form(ridge):
    x = problem("local_polynomial", np.random.default_rng(17), gated=False, k=3)
    q = x["q"][-1]
    p, k_mean, v_mean, C, D = covariances(x, np.exp(x["k"] @ q * 3**-0.5))
    W = np.linalg.solve(C + ridge * np.eye(3), D.T).T
    o = local_polynomial.local_polynomial(**x, ridge=ridge)[-1]
    close(o, v_mean + W @ (q - k_mean))
    close(o, p @ (x["v"] - x["k"] @ W.T) + W @ q)


def test_infinite_ridge_is_softmax_and_constant_weights_are_affine_ridge_regression():
    x = problem("local_polynomial", np.random.default_rng(18), gated=False, k=3)
    stiff = local_polynomial.local_polynomial(**x, ridge=1e15)
    close(stiff, softmax_attention.softmax_attention(**x))
    _, k_mean, v_mean, C, D = covariances(x, np.ones(T))
    affine = v_mean + (x["q"] - k_mean) @ np.linalg.solve(C + 0.1 * np.eye(3), D.T)
    close(local_polynomial.local_polynomial(**x, scale=0.0, ridge=0.1, causal=False), affine)
    wide = {"kernel": "gaussian", "bandwidth": np.inf}
    close(local_polynomial.local_polynomial(**x, **wide, ridge=0.1, causal=False), affine)


def test_degree_zero_is_softmax_attention(blocks):
    x = problem("local_polynomial", np.random.default_rng(19), lead=(2,))
    close(local_polynomial.local_polynomial(**x, degree=0), softmax_attention.softmax_attention(**x))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_polynomials_are_reproduced(degree):
    rng = np.random.default_rng(20)
    k, q, c = rng.standard_normal((T, 2)), rng.standard_normal((T, 2)), rng.standard_normal((comb(2 + degree, 2), 3))
    powers = [(i, n - i) for n in range(degree + 1) for i in range(n + 1)]

    def values(x):
        return np.stack([x[:, 0] ** i * x[:, 1] ** j for i, j in powers], axis=1) @ c

    enough = comb(2 + degree, 2)
    for options in ({}, {"kernel": "gaussian", "bandwidth": 2.0}):
        o = local_polynomial.local_polynomial(q, k, values(k), degree=degree, ridge=0.0, **options)
        close(o[enough + 6 :], values(q)[enough + 6 :], 1e-8)


def test_too_few_neighbours_fall_back_to_the_lower_degree(form):
    x = problem("local_polynomial", np.random.default_rng(21), gated=False)
    core = getattr(local_polynomial, form)
    fits = [call(core, "local_polynomial", x, {"degree": d, "ridge": 0.0}) for d in range(3)]
    assert_allclose(fits[1][:2], fits[0][:2], rtol=1e-13)  # 2 pairs, 3 coefficients
    assert_allclose(fits[2][:2], fits[0][:2], rtol=1e-13)
    linear = define("local_polynomial", x, {"degree": 1, "ridge": 0.0})
    assert_allclose(fits[2][3:5], linear[3:5], rtol=1e-9)  # 4 and 5 pairs, 6 coefficients
    same = x | {"k": np.ones_like(x["k"])}
    means = np.cumsum(x["v"], axis=0) / np.arange(1, T + 1)[:, None]
    close(call(core, "local_polynomial", same, {"degree": 2, "ridge": 0.0}), means)


def test_an_empty_neighbourhood_answers_zero():
    x = problem("local_polynomial", np.random.default_rng(22), gated=False)
    x["q"] += 100.0
    for kernel in ("epanechnikov", "biweight", "triweight", "boxcar"):
        assert_array_equal(local_polynomial.local_polynomial(**x, kernel=kernel, bandwidth=1.0), np.zeros((T, 3)))


@pytest.mark.parametrize("options", [{}, GAUSSIAN, GAUSSIAN | {"degree": 2}], ids=label)
def test_common_offsets_cost_no_digits(options, blocks):
    rng = np.random.default_rng(23)
    q, k, v = (np.round(rng.standard_normal((T, n)) * 1024) / 1024 for n in (2, 2, 3))  # exact with the offset
    o = local_polynomial.local_polynomial(q, k, v, ridge=1e-3, **options)
    moved = local_polynomial.local_polynomial(q, k, v + 2.0**30, ridge=1e-3, **options)
    close(moved - 2.0**30, o, 1e-6)  # the answer's own rounding is 2^-23
    if options:
        moved = local_polynomial.local_polynomial(q + 2.0**20, k + 2.0**20, v, ridge=1e-3, **options)
    else:  # q . k knows no common origin of queries and keys: only its weights do not change
        o = local_polynomial.local_polynomial(q / 3, k, v, degree=0)
        moved = local_polynomial.local_polynomial(q / 3, k + 2.0**30, v, degree=0)
    close(moved, o, 1e-9)


def test_a_line_is_extrapolated_to_all_digits(blocks):
    rng = np.random.default_rng(38)
    k, slope = rng.standard_normal((T, 2)), rng.standard_normal((2, 3))
    q = 1e8 * rng.standard_normal((T, 2))
    o = local_polynomial.local_polynomial(q, k, k @ slope + 1.0, scale=0.0, ridge=0.0)
    close(o[5:], (q @ slope + 1.0)[5:], 1e-12)


def test_a_function_can_be_the_kernel():
    x = problem("local_polynomial", np.random.default_rng(24))
    tricube = local_polynomial.local_polynomial(**x, kernel=lambda u: np.maximum(1 - u * u, 0) ** 3, bandwidth=1.5)
    close(tricube, local_polynomial.local_polynomial(**x, kernel="triweight", bandwidth=1.5))
    with pytest.raises(ValueError, match="weights are >= 0"):
        local_polynomial.local_polynomial(**x, kernel=lambda u: -u, bandwidth=1.0)


def test_a_narrow_kernel_recalls_the_nearest_value():
    x = problem("local_polynomial", np.random.default_rng(25), gated=False)
    o = local_polynomial.local_polynomial(**x, degree=0, kernel="gaussian", bandwidth=1e-6, causal=False)
    nearest = np.argmin(np.linalg.norm(x["q"][:, None] - x["k"], axis=-1), axis=1)
    close(o, x["v"][nearest])


@pytest.mark.parametrize(
    "options, word",
    [
        ({"degree": -1}, "degree must be at least 0"),
        ({"ridge": -1.0}, "ridge must be >= 0"),
        ({"kernel": "gauss"}, "kernel is 'gauss'"),
        ({"kernel": "gaussian"}, "needs a bandwidth > 0"),
        ({"kernel": "boxcar", "bandwidth": 0.0}, "needs a bandwidth > 0"),
        ({"bandwidth": 1.0}, "takes scale"),
        ({"kernel": "gaussian", "bandwidth": 1.0, "scale": 1.0}, "takes bandwidth"),
    ],
)
def test_local_polynomial_refuses(options, word):
    x = problem("local_polynomial", np.random.default_rng(26), gated=False)
    with pytest.raises(ValueError, match=word):
        local_polynomial.local_polynomial(**x, **options)


# Sparse, PaTH and log-linear attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.25, 3.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_entmax_lies_on_the_simplex_and_satisfies_its_conditions(alpha, spread):
    """Where p > 0, (alpha - 1) s - p^(alpha - 1) is one number tau; where p = 0, (alpha - 1) s <= tau."""
    s = spread * np.random.default_rng(27).standard_normal((50, 30))
    s[:, -1] = s[:, 0]
    p = sparse_attention.entmax(s, alpha)
    close(p.sum(axis=-1), 1.0)
    tau = (alpha - 1) * s - p ** (alpha - 1)
    highest, lowest = (f(np.where(p > 0, tau, g), axis=-1) for f, g in ((np.max, -np.inf), (np.min, np.inf)))
    close(highest - lowest, 0.0, 1e-11 * max(spread, 1))
    assert np.all(np.where(p == 0, (alpha - 1) * s, -np.inf) <= highest[:, None] + 1e-11 * max(spread, 1))


def test_sparsemax_of_unit_keys_is_epanechnikov_with_an_adaptive_bandwidth():
    x = problem("sparse_attention", np.random.default_rng(28), k=3)
    x["q"], x["k"] = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (x["q"], x["k"]))
    p = sparse_attention.entmax(4.0 * x["k"] @ x["q"][-1], 2.0)
    tau = (4.0 * x["k"] @ x["q"][-1] - p)[p > 0][0] / 4.0
    bandwidth = np.sqrt(2 - 2 * tau)
    smoother = local_polynomial.local_polynomial(**x, degree=0, kernel="epanechnikov", bandwidth=bandwidth)
    close(sparse_attention.sparse_attention(**x, scale=4.0)[-1], smoother[-1])


def test_epanechnikov_is_a_shifted_relu_of_the_product_of_unit_keys():
    x = problem("local_polynomial", np.random.default_rng(29), gated=False, k=3)
    x["q"], x["k"] = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (x["q"], x["k"]))
    weights = np.tril(np.maximum(x["q"] @ x["k"].T - (1 - 0.9**2 / 2), 0))
    total = weights.sum(axis=-1, keepdims=True)
    expected = np.divide(weights @ x["v"], total, out=np.zeros((T, 3)), where=total > 0)
    close(local_polynomial.local_polynomial(**x, degree=0, kernel="epanechnikov", bandwidth=0.9), expected)


def test_alpha_near_one_is_softmax_attention():
    x = problem("sparse_attention", np.random.default_rng(30))
    close(sparse_attention.sparse_attention(**x, alpha=1 + 1e-6), softmax_attention.softmax_attention(**x), 1e-4)


@pytest.mark.parametrize("alpha", [1.0, 0.5, np.inf, np.nan])
def test_sparse_attention_refuses(alpha):
    with pytest.raises(ValueError, match="alpha must be above 1"):
        sparse_attention.sparse_attention(**problem("sparse_attention", np.random.default_rng(31)), alpha=alpha)


def test_path_attention_without_steps_is_softmax_attention():
    x = problem("path_attention", np.random.default_rng(32))
    o = path_attention.path_attention(**x | {"beta": np.zeros(T)})
    close(o, softmax_attention.softmax_attention(x["q"], x["k"], x["v"]))


@pytest.mark.parametrize(
    "name, neutral", [("wall_attention", {"log_decay": None}), ("delta_attention", {"beta": np.zeros(T)})]
)
def test_a_memory_that_neither_fades_nor_corrects_is_softmax_attention(name, neutral):
    x = problem(name, np.random.default_rng(37)) | neutral
    o = getattr(MODULES[name], name)(**x)
    close(o, softmax_attention.softmax_attention(x["q"], x["k"], x["v"]))


def test_keys_fade_by_channel_and_a_channel_that_is_reset_says_nothing(form):
    x = problem("wall_attention", np.random.default_rng(38), lead=(2,), gated=False)
    gates = -np.random.default_rng(39).uniform(0, 5, (2, T, 2))
    gates[:, 20, 1] = -np.inf
    o = call(getattr(wall_attention, form), "wall_attention", x | {"log_decay": gates})
    for t in (0, 19, 36):
        since = [np.exp(gates[0, i + 1 : t + 1].sum(axis=0)) for i in range(t + 1)]
        weights = softmax((since * x["k"][0, : t + 1]) @ x["q"][0, t] * 2**-0.5)
        close(o[0, t], weights @ x["v"][0, : t + 1])
    same = call(wall_attention.chunked, "wall_attention", x | {"log_decay": np.repeat(gates[..., :1], 2, axis=-1)})
    close(call(getattr(wall_attention, form), "wall_attention", x | {"log_decay": gates[..., 0]}), same)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_channel_that_is_reset_says_nothing_of_a_bad_key(bad, form):
    x = problem("wall_attention", np.random.default_rng(42), gated=False)
    gates = np.zeros((T, 2))
    gates[20, 1] = -np.inf
    good = call(getattr(wall_attention, form), "wall_attention", x | {"log_decay": gates})
    x["k"][5, 1] = bad
    o = call(getattr(wall_attention, form), "wall_attention", x | {"log_decay": gates})
    assert not np.isfinite(o[5:20]).all()  # minus infinity is a logit like any other
    close(o[20:], good[20:])


def test_values_are_corrected_under_keys_of_their_own(form):
    x = problem("delta_attention", np.random.default_rng(40))
    x["erase_key"] = np.random.default_rng(41).standard_normal((T, 2))
    close(call(getattr(delta_attention, form), "delta_attention", x), define("delta_attention", x, {}), 1e-11)


@pytest.mark.parametrize("logit", [40.0, 1e4])
def test_huge_shares_of_a_stick_lose_nothing(logit, form):
    """A share of 1 leaves exp(-logit) to the older ones, a share of exp(-logit) is still that."""
    k, v = np.array([[-1.0], [1.0], [-1.0], [0.0]]), np.diag([1.0, 1.0, 1.0, 0.0])
    x = {"q": np.ones((4, 1)), "k": k, "v": v}
    o = call(getattr(stick_breaking_attention, form), "stick_breaking_attention", x, {"scale": logit})[3]
    assert_allclose(o, [np.exp(-2 * logit), 1 - 2 * np.exp(-logit), np.exp(-logit), 0], rtol=1e-12)


def test_equal_levels_are_linear_attention():
    x = problem("log_linear_attention", np.random.default_rng(33), lead=(2,), t=150)
    x["levels"][...] = 1.0
    o = log_linear_attention.log_linear_attention(**x)
    del x["levels"]
    close(o, linear_attention.linear_attention(**x))


def test_log_linear_attention_takes_gates_per_channel(form):
    x = problem("log_linear_attention", np.random.default_rng(34), t=100, gated=False)
    x["levels"][...] = 1.0
    x["log_decay"] = -np.random.default_rng(35).uniform(0, 0.3, (100, 2))
    o = call(getattr(log_linear_attention, form), "log_linear_attention", x)
    del x["levels"]
    close(o, linear_attention.linear_attention(**x))


def test_buckets_are_those_of_a_fenwick_tree():
    assert [int(log_linear_attention.bucket(np.int64(6), np.int64(i), 9)) for i in range(7)] == [3, 3, 3, 3, 2, 2, 0]
    for t in range(70):
        for i in range(t + 1):
            assert log_linear_attention.bucket(np.int64(t), np.int64(i), 99) == level(t, i)


# Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("softmax_attention", {}),
        ("softmax_attention", {"window": 100, "sinks": 4}),
        ("local_polynomial", {"degree": 0, "window": 100}),
        ("local_polynomial", {"degree": 1, "window": 100}),
        ("sparse_attention", {"window": 100}),
        ("log_linear_attention", {}),
    ],
)
def test_memory_grows_with_the_sequence_not_its_square(name, options):
    x = draw(name, np.random.default_rng(36), t=32768, k=4, v=4, l=18, dtype=np.float32)
    given = sum(a.nbytes for a in x.values())
    tracemalloc.start()
    o = call(MODULES[name].chunked, name, x, options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.isfinite(o).all()
    assert peak < 10 * given + 100e6  # a t x t matrix of float32 has 4e9 bytes
