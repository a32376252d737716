"""Test-time training: the descent, its dual form, its memories, and the layers that it must contain."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import padasip
import pytest

from ttr_np.memories import MLP, EntropyRetention, Huber, L2Retention, Linear, LqRetention, PNorm
from ttr_np.notation import draw
from ttr_np.solvers import test_time_training as solver
from ttr_np.solvers.delta_rule import delta_rule
from ttr_np.solvers.linear_attention import linear_attention

train = solver.test_time_training
D = 4  # size of keys, and of values wherever there is a residual

RNG = np.random.default_rng(7)
SCALE, OFFSET = RNG.uniform(0.5, 1.5, D), RNG.standard_normal(D)
NORM = {"layer_norm": True, "residual": True}
MEMORIES = {
    "linear": Linear(),
    "linear bias": Linear(bias=True, initial=[(RNG.standard_normal((D, D)), RNG.standard_normal(D))]),
    "ttt-linear": Linear(bias=True, scale=SCALE, offset=OFFSET, seed=1, **NORM),
    "norm only": Linear(layer_norm=True, initial=[(RNG.standard_normal((D, D)), None)]),
    "residual only": MLP(3, residual=True, bias=False),
    "ttt-mlp": MLP(scale=SCALE, offset=OFFSET, **NORM),
    "silu": MLP(5, activation="silu"),
    "relu": MLP(5, depth=3, activation="relu"),
    "tanh": MLP(6, depth=4, activation="tanh", layer_norm=True),
    "one layer": MLP(depth=1),
    "huber": MLP(5, loss=Huber(0.3), **NORM),
    "huber by coordinate": Linear(loss=Huber(0.3, coordinatewise=True)),
    "cubic": Linear(bias=True, loss=PNorm(3.0)),
    "sign": Linear(loss=PNorm(1.0), initial=[(RNG.standard_normal((D, D)), None)]),
    "moneta": MLP(5, bias=False, loss=PNorm(3.0), retention=LqRetention(4.0)),
    "memora": Linear(bias=True, retention=EntropyRetention(2.0)),
    "memora mlp": MLP(5, retention=EntropyRetention(2.0, per_output=False), **NORM),
}
GATES = [(), ("momentum",), ("weight_decay",), ("momentum", "weight_decay")]


def arguments(t=23, lead=(2,), optional=(), seed=0, k=D, v=D):
    """Realistic inputs; values small enough for the cubic loss, whose descent diverges on large errors."""
    rng = np.random.default_rng(seed)
    x = draw("test_time_training", rng, t=t, lead=lead, optional=optional, k=k, v=v)
    return x | {"v": x["v"] / 2}


def random_mask(lead, t, seed=3):
    return np.random.default_rng(seed).uniform(size=(*lead, t)) < 0.7


def cut(x, low, high):
    """Steps low to high of every array."""
    return {n: a[..., low:high, :] if n in "qkv" else a[..., low:high] for n, a in x.items()}


def close(x, y, rtol=1e-12):
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(1.0, np.max(np.abs(y), initial=0)))


def close_states(x, y):
    for a, b in zip(x, y, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


def literal(x, memory, batch_size, mask=None):
    """The descent on one sequence, as the three lines of the paper say it; a masked token is not in the stream."""
    M = memory.parameters(x["k"].shape[-1], x["v"].shape[-1])
    S, anchor, count, o = np.zeros_like(M), M, 0, []
    for t in range(len(x["k"])):
        if mask is None or mask[t]:
            g = memory.gradient(anchor, x["k"][t : t + 1], x["v"][t : t + 1])[0]
            S = x["momentum"][t] * S - x["step_size"][t] * g if "momentum" in x else -x["step_size"][t] * g
            M = (1 - (x["weight_decay"][t] if "weight_decay" in x else 0)) * M + S
            count += 1
            anchor = M if count % batch_size == 0 else anchor
        o.append(memory.predict(M, x["q"][t : t + 1])[0])
    return np.array(o)


@pytest.mark.parametrize("name", [n for n, m in MEMORIES.items() if isinstance(m.retention, L2Retention)])
def test_gradient_is_the_slope_of_the_objective(name):
    memory, x = MEMORIES[name], arguments(t=6, lead=())
    at = np.random.default_rng(5).standard_normal(memory.parameters(D, D).shape) * 0.7
    steps = 1e-6 * np.eye(len(at))
    rise = memory.objective(at + steps, x["k"], x["v"]) - memory.objective(at - steps, x["k"], x["v"])
    np.testing.assert_allclose(memory.gradient(at, x["k"], x["v"]), rise.T / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["moneta", "memora", "memora mlp"])
def test_gradient_of_a_retention_is_taken_at_the_weights(name):
    memory, x = MEMORIES[name], arguments(t=6, lead=())
    A = np.random.default_rng(5).standard_normal((3, *memory.parameters(D, D).shape))
    weights = memory.pack([(memory.retention.link(W), b) for W, b in memory.unpack(A, D)])
    plain = replace(memory, retention=Linear().retention)
    np.testing.assert_array_equal(memory.gradient(A, x["k"], x["v"]), plain.gradient(weights, x["k"], x["v"]))
    np.testing.assert_array_equal(memory.predict(A, x["q"]), plain.predict(weights, x["q"]))


@pytest.mark.parametrize("name", MEMORIES)
def test_pack_undoes_unpack(name):
    memory = MEMORIES[name]
    parameters = np.random.default_rng(0).standard_normal((2, 3, *memory.parameters(D, D).shape))
    np.testing.assert_array_equal(memory.pack(memory.unpack(parameters, D)), parameters)


@pytest.mark.parametrize("optional", GATES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("name", MEMORIES)
def test_every_form_is_the_literal_descent(name, batch_size, masked, optional):
    memory, x = MEMORIES[name], arguments(optional=optional)
    mask = random_mask((2,), 23) if masked else None
    o = train(**x, memory=memory, batch_size=batch_size, mask=mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "chunked", solver.recurrent)
        slow = train(**x, memory=memory, batch_size=batch_size, mask=mask)
    for b in range(2):
        one = {n: a[b] for n, a in x.items()}
        expected = literal(one, memory, batch_size, None if mask is None else mask[b])
        close(slow[b], expected)
        close(o[b], expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "batch_size"), [("ttt-mlp", 4), ("linear bias", 5), ("memora", 4), ("linear", 70)])
def test_split_anywhere(name, batch_size, masked):
    t = 80 if batch_size == 70 else 13
    x = arguments(t=t, optional=GATES[3])
    x |= {"mask": random_mask((2,), t)} if masked else {}
    call = partial(train, memory=MEMORIES[name], batch_size=batch_size, output_final_state=True)
    o, state = call(**x)
    for at in range(0, t + 1, 1 if t < 20 else 9):
        first, middle = call(**cut(x, 0, at))
        last, end = call(**cut(x, at, t), initial_state=middle)
        close(np.concatenate([first, last], axis=-2), o)
        close_states(end, state)
    pieces, now = [], None
    for i in range(t):
        piece, now = call(**cut(x, i, i + 1), initial_state=now)
        pieces.append(piece)
    close(np.concatenate(pieces, axis=-2), o)
    close_states(now, state)


def test_masked_tokens_might_as_well_not_be_there():
    x, mask = arguments(lead=(), optional=GATES[3]), random_mask((), 23)
    x["momentum"][~mask] = x["weight_decay"][~mask] = x["k"][~mask] = np.nan
    call = partial(train, memory=MEMORIES["ttt-mlp"], batch_size=4, output_final_state=True)
    o, state = call(**x, mask=mask)
    kept, end = call(**{n: a[mask] for n, a in x.items()})
    close(o[mask], kept)
    close_states(state, end)
    assert np.isfinite(o).all()


def test_one_pair_at_a_time_is_the_delta_rule():
    x = arguments(v=3)
    o = train(**x, memory=Linear(), batch_size=1)
    close(o, delta_rule(x["q"], x["k"], x["v"], x["step_size"]))


def test_weight_decay_is_the_gated_delta_rule_at_the_decayed_error():
    # (1 - a) M + b (v - M k) k^T is s M + (b / s)(s v - s M k) k^T with s = 1 - a: arXiv:2412.06464 reads s M, not M.
    x = arguments(v=3, optional=("weight_decay",))
    o = train(**x, memory=Linear(), batch_size=1)
    s = 1 - x["weight_decay"]
    close(o, delta_rule(x["q"], x["k"], s[..., None] * x["v"], x["step_size"] / s, log_decay=np.log(s)))


def test_one_mini_batch_is_linear_attention():
    x = arguments(v=3, optional=("weight_decay",), t=150)
    o = train(**x, memory=Linear(), batch_size=1000)
    written = x["step_size"][..., None] * x["v"]
    close(o, linear_attention(x["q"], x["k"], written, log_decay=np.log1p(-x["weight_decay"])))


def test_one_layer_is_the_lms_filter():
    x = arguments(t=50, lead=(), v=1)
    lms = padasip.filters.FilterLMS(n=D, mu=0.3, w="zeros")
    lms.run(x["v"][:, 0], x["k"])
    _, state = train(x["q"], x["k"], x["v"], 0.3, memory=Linear(), batch_size=1, output_final_state=True)
    close(state.parameters, lms.w)


def test_momentum_follows_the_closed_form_of_titans():
    """Coefficients of one frozen-gradient chunk written with quotients of decays, as in arXiv:2501.00663."""
    c = 9
    x = arguments(t=c, lead=(), v=3, optional=GATES[3])
    rng = np.random.default_rng(2)
    M, S = rng.standard_normal((2, D, 3))
    begin = (M.ravel(), S.ravel(), M.ravel(), np.array(0))
    o, state = train(**x, memory=Linear(), batch_size=c, initial_state=begin, output_final_state=True)
    b, m = np.cumprod(1 - x["weight_decay"]), np.cumprod(x["momentum"])
    n = np.tril(m[:, None] / m) * x["step_size"]
    G, f = np.tril(b[:, None] / b) @ n, np.tril(b[:, None] / b) @ m
    g = np.einsum("tk,tv->tkv", x["k"], x["k"] @ M - x["v"])
    path = b[:, None, None] * M + f[:, None, None] * S - np.einsum("tj,jkv->tkv", G, g)
    close(o, np.einsum("tk,tkv->tv", x["q"], path), 1e-11)
    close(state.parameters, path[-1].ravel(), 1e-11)
    close(state.momentum, (m[-1] * S - np.einsum("j,jkv->kv", n[-1], g)).ravel(), 1e-11)


def test_ttt_linear_is_the_dual_form_of_its_paper():
    """One mini-batch as arXiv:2407.04620 writes it: target v - k, layer norm reversed, then a masked product."""
    x, memory = arguments(t=16, lead=()), MEMORIES["ttt-linear"]
    W, b = np.random.default_rng(1).standard_normal((D, D)), np.random.default_rng(2).standard_normal(D)
    o = train(**x, memory=replace(memory, initial=[(W, b)]), batch_size=16)
    z = x["k"] @ W + b
    std = np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    unit = (z - z.mean(-1, keepdims=True)) / std
    slope = SCALE * (SCALE * unit + OFFSET - (x["v"] - x["k"]))
    along = (slope * unit).sum(-1, keepdims=True)
    g = (D * slope - slope.sum(-1, keepdims=True) - unit * along) / (D * std)
    z = x["q"] @ W + b - np.tril(x["q"] @ x["k"].T + 1) @ (x["step_size"][:, None] * g)
    unit = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    close(o, x["q"] + SCALE * unit + OFFSET)


def test_memora_multiplies_and_keeps_its_total():
    x = arguments(t=12, lead=(), v=3, optional=("weight_decay",))
    o, state = train(**x, memory=Linear(retention=EntropyRetention(2.0)), batch_size=1, output_final_state=True)
    W = np.full((D, 3), 2.0 / D)
    for t in range(12):
        g = np.outer(x["k"][t], x["k"][t] @ W - x["v"][t])
        log_W = (1 - x["weight_decay"][t]) * np.log(W) - x["step_size"][t] * g
        W = 2.0 * np.exp(log_W) / np.exp(log_W).sum(0)
        close(o[t], x["q"][t] @ W)
    close(EntropyRetention(2.0).link(state.parameters.reshape(D, 3)), W)


def test_moneta_divides_by_a_power_of_its_norm():
    x = arguments(t=12, lead=(), v=3, optional=("weight_decay",))
    A = np.random.default_rng(0).standard_normal((D, 3))
    memory = Linear(loss=PNorm(3.0), retention=LqRetention(4.0), initial=[(A, None)])
    o = train(**x, memory=memory, batch_size=1)
    for t in range(12):
        e = x["k"][t] @ (A / (A**4).sum() ** 0.5) - x["v"][t]
        A = (1 - x["weight_decay"][t]) * A - x["step_size"][t] * np.outer(x["k"][t], 3 * np.sign(e) * e**2)
        close(o[t], x["q"][t] @ (A / (A**4).sum() ** 0.5))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_outlier_pulls_no_harder_than_delta(dtype):
    error = np.array([[3e30, -4e30]], dtype)
    np.testing.assert_allclose(Huber(2.0).gradient(error), [[1.2, -1.6]], rtol=1e-6)
    np.testing.assert_allclose(Huber(2.0, coordinatewise=True).gradient(error), [[2.0, -2.0]], rtol=1e-6)
    np.testing.assert_array_equal(Huber(2.0).gradient(dtype(0) * error), 0 * error)


@pytest.mark.parametrize("spoiled", [1e3, np.nan, np.inf])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "batch_size"), [("ttt-mlp", 4), ("linear bias", 16), ("moneta", 4), ("linear", 100)])
def test_the_future_changes_no_bit_of_the_past(name, batch_size, masked, spoiled):
    x = arguments(t=40, optional=GATES[3])
    x |= {"mask": random_mask((2,), 40)} if masked else {}
    call = partial(train, memory=MEMORIES[name], batch_size=batch_size)
    o = call(**x)
    for at in (1, 9, 22, 39):
        y = {n: a.copy() for n, a in x.items()}
        for n in ("q", "k", "v", "step_size"):
            y[n][0, at:] = spoiled
        if masked:
            y["mask"][0, at:] = ~y["mask"][0, at:]
        with np.errstate(all="ignore"):
            changed = call(**y)
        np.testing.assert_array_equal(changed[0, :at], o[0, :at])
        np.testing.assert_array_equal(changed[1], o[1])


def test_a_bad_token_reaches_what_reads_it_and_no_more():
    x = arguments(t=12, lead=(2, 3))
    x["v"][1, 2, 5, 0] = np.nan
    o = train(**x, memory=Linear(), batch_size=4)
    bad = np.zeros((2, 3, 12, D), bool)
    bad[1, 2, 5:, 0] = True
    np.testing.assert_array_equal(np.isnan(o), bad)


@pytest.mark.parametrize("name", ["linear", "ttt-mlp", "memora"])
def test_shares_of_zero_and_one_divide_nothing(name):
    x = arguments(t=40, optional=GATES[3])
    x["weight_decay"][..., [3, 21]] = 1
    x["weight_decay"][..., 4:9] = 1 - 1e-200
    x["momentum"][..., 5:9] = 1e-200
    x["momentum"][..., [10, 21]] = 0, 1
    o = train(**x, memory=MEMORIES[name], batch_size=16)
    close(o[1], literal({n: a[1] for n, a in x.items()}, MEMORIES[name], 16))
    forgot = train(**cut(x, 3, 4), memory=Linear(), batch_size=1)
    S = -x["step_size"][..., 3, None] * np.einsum("bk,bv->bkv", x["k"][:, 3], -x["v"][:, 3]).reshape(2, -1)
    close(forgot[:, 0], np.einsum("bk,bkv->bv", x["q"][:, 3], S.reshape(2, D, D)))


def test_no_momentum_is_momentum_zero_and_no_decay_is_decay_zero():
    x = arguments()
    call = partial(train, memory=MEMORIES["ttt-mlp"], batch_size=4)
    close(call(**x, momentum=0.0, weight_decay=0.0), call(**x))


def test_query_groups_share_one_memory():
    x = arguments(lead=(2, 1), optional=GATES[3], t=11)
    x["q"] = np.random.default_rng(1).standard_normal((2, 3, 11, D))
    for name in ("ttt-mlp", "memora"):
        o, state = train(**x, memory=MEMORIES[name], batch_size=4, output_final_state=True)
        assert state.parameters.shape[:-1] == state.count.shape == (2, 1)
        for g in range(3):
            close(o[:, g : g + 1], train(**x | {"q": x["q"][:, g : g + 1]}, memory=MEMORIES[name], batch_size=4))


def test_heads_may_start_from_layers_of_their_own():
    x, W = arguments(lead=(5, 3), t=6), np.random.default_rng(0).standard_normal((3, D, D))
    o = train(**x, memory=Linear(initial=[(W, None)]), batch_size=4)
    for h in range(3):
        one = {n: a[:, h] for n, a in x.items()}
        close(o[:, h], train(**one, memory=Linear(initial=[(W[h], None)]), batch_size=4))


@pytest.mark.parametrize("shape", [{"t": 0}, {"t": 1}, {"lead": (0, 2)}, {"k": 1, "v": 1}, {"lead": ()}])
@pytest.mark.parametrize("name", ["linear", "silu", "memora mlp"])
def test_small_shapes(name, shape):
    memory = replace(MEMORIES[name], residual=False, scale=None, offset=None)
    x = arguments(**{"t": 7, **shape}, optional=GATES[3])
    o, state = train(**x, memory=memory, batch_size=4, output_final_state=True)
    assert o.shape == x["v"].shape
    assert state.count.shape == x["v"].shape[:-2]
    close_states(train(**cut(x, 0, 0), memory=memory, initial_state=state, output_final_state=True)[1], state)


def test_packed_sequences_are_separate_calls():
    x, bounds = arguments(lead=(), optional=GATES[3]), [0, 5, 5, 6, 23]
    call = partial(train, memory=MEMORIES["ttt-mlp"], batch_size=4, output_final_state=True)
    o, state = call(**x, cu_seqlens=bounds)
    for i, (low, high) in enumerate(pairwise(bounds)):
        alone, end = call(**cut(x, low, high))
        np.testing.assert_array_equal(o[low:high], alone)
        close_states([a[i] for a in state], end)
    again, _ = call(**x, cu_seqlens=bounds, initial_state=state)
    close(again[6:], call(**cut(x, 6, 23), initial_state=tuple(a[3] for a in state))[0])


def test_the_initial_state_is_left_alone():
    x = arguments(optional=GATES[3])
    call = partial(train, memory=Linear(), batch_size=4, output_final_state=True)
    _, state = call(**cut(x, 0, 6))
    before = [a.copy() for a in state]
    call(**cut(x, 6, 23), initial_state=state)
    for a, b in zip(state, before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float16, 3e-3), (np.float32, 3e-6)])
def test_low_precision(dtype, rtol):
    x = {n: a.astype(dtype) for n, a in arguments(t=64, optional=GATES[3]).items()}
    o, state = train(**x, memory=MEMORIES["ttt-mlp"], output_final_state=True)
    exact = train(**{n: a.astype(np.float64) for n, a in x.items()}, memory=MEMORIES["ttt-mlp"])
    assert o.dtype == dtype
    assert state.parameters.dtype == np.float32
    close(o, exact, rtol)


def test_views_are_as_good_as_copies():
    x = arguments(lead=(2, 3), t=10)
    wide = {n: np.repeat(a, 2, axis=-2)[..., ::-2, :] if n in "qkv" else a[..., ::-1] for n, a in x.items()}
    copies = {n: np.ascontiguousarray(a) for n, a in wide.items()}
    shared = wide | {"k": np.broadcast_to(wide["k"][:, :1], wide["k"].shape)}
    call = partial(train, memory=MEMORIES["ttt-mlp"], batch_size=4)
    close(call(**wide), call(**copies))
    close(call(**shared), call(**{n: np.ascontiguousarray(a) for n, a in shared.items()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, it is 0"),
        ({"batch_size": 2.0}, "batch_size must be a positive integer, it is 2.0"),
        ({"momentum": np.full((2, 7), 1.5)}, r"momentum must lie in \[0, 1\] everywhere; it is 1.5 at \(0, 0\)"),
        ({"weight_decay": -0.5}, r"weight_decay must lie in \[0, 1\] everywhere; it is -0.5 at"),
        ({"step_size": -1.0}, "step_size must be >= 0 everywhere"),
        ({"memory": Linear(residual=True)}, "axis 'k' is 4 but axis 'v' is 3"),
        ({"memory": Linear(initial=[(np.eye(4), None)])}, r"initial weight 0 has shape \(4, 4\), needs \(..., 4, 3\)"),
        ({"memory": MLP(initial=[(np.zeros((4, 3)), None)])}, "initial has 1 layers, the memory has 2"),
        ({"memory": Linear(bias=True, initial=[(np.zeros((4, 3)), None)])}, "initial bias 0 is missing"),
        ({"memory": Linear(bias=True, initial=[(np.zeros((4, 3)), np.zeros(4))])}, r"initial bias 0 has shape \(4,\)"),
        ({"initial_state": (np.zeros(5), None, np.zeros(5), 0)}, r"parameters has shape \(5,\), needs \(..., 12\)"),
    ],
)
def test_bad_calls_say_what_is_wrong(change, message):
    x = arguments(t=7, v=3)
    with pytest.raises(ValueError, match=message):
        train(**{**x, "memory": Linear(), **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(0), "hidden must be >= 1, it is 0"),
        (lambda: MLP(depth=0), "depth must be >= 1, it is 0"),
        (lambda: MLP(activation="sine"), "activation 'sine' is unknown; there are gelu, silu, relu, tanh"),
        (lambda: Huber(0.0), "delta must be > 0, it is 0.0"),
        (lambda: PNorm(0.5), "p must be >= 1, it is 0.5"),
        (lambda: LqRetention(0.0), "q must be >= 1, it is 0.0"),
        (lambda: EntropyRetention(-1.0), "total must be > 0, it is -1.0"),
        (lambda: Linear().unpack(np.zeros(7), 2), "parameters has 7 numbers, which is no Linear for keys of size 2"),
    ],
)
def test_bad_memories_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_any_object_with_three_methods_is_a_memory():
    full, x = MEMORIES["linear bias"], arguments(optional=GATES[3])
    bare = SimpleNamespace(parameters=full.parameters, predict=full.predict, gradient=full.gradient)
    close(train(**x, memory=bare, batch_size=4), train(**x, memory=full, batch_size=4))
