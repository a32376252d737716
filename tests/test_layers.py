"""The table: every line is the layer its three choices say it is."""

import warnings

import numpy as np
import pytest

import ttr_np
from ttr_np import backends, features

NAMES = [name for name, layer in ttr_np.layers.items() if layer.operator is not None]
BY_DEFINITION = [
    name for name, layer in ttr_np.layers.items() if layer.operator is None and layer.optimizer is not None
]
IMPOSSIBLE = [name for name, layer in ttr_np.layers.items() if layer.optimizer is None]


def inputs(layer, rng, t, k=4, v=4):
    """One sequence of a layer's inputs: unit keys, values of any length."""
    sizes = {"q": k, "k": k, "v": v, "x": v}
    data = {name: rng.standard_normal((t, sizes[name])) for name in layer.data}
    return [features.normalize_l2(x) if name in ("q", "k") else x for name, x in data.items()]


SIZES = {"k": 4, "v": 4, "d": 4, "l": 6, "n": 16, "m": 7, "p": 2}


def random_gates(layer, rng, data):
    """Every gate with axes away from its default, in its range, varying in time."""
    sizes = SIZES | {"t": len(data[0]), "s": len(data[0])}
    return {
        name: draw_gate(name, rng, tuple(sizes[axis] for axis in gate.axes.split()))
        for name, gate in layer.gates.items()
        if gate.axes and name != "landmarks"
    }


def draw_gate(name, rng, shape):
    if name in ("log_decay",):
        return np.log(rng.uniform(0.6, 1.0, shape))
    if name == "A":
        return -rng.uniform(0.1, 2.0, shape)
    if name in ("nu", "theta", "log_input", "skip", "bonus", "phase", "r"):
        return rng.uniform(-1.0, 1.0, shape)
    if name == "w":
        return features.normalize_l2(rng.standard_normal(shape))
    return rng.uniform(0.05, 0.95, shape)


@pytest.mark.parametrize("t", [1, 2, 17])
@pytest.mark.parametrize("gates", ["default", "random"])
@pytest.mark.parametrize("name", NAMES)
def test_operator_is_the_layer_the_table_says(name, gates, t):
    layer, rng = ttr_np.layers[name], np.random.default_rng(0)
    data = inputs(layer, rng, t)
    given = {} if gates == "default" else random_gates(layer, rng, data)
    expected = ttr_np.recall(layer, *data, **given)
    np.testing.assert_allclose(layer(*data, **given, backend="numpy"), expected, rtol=1e-9, atol=1e-11)


def pieces(layer, data, given, cuts, **common):
    """The layer called piece by piece, its state carried."""
    outputs, state = [], None
    for low, high in zip(cuts[:-1], cuts[1:], strict=True):
        part = {name: cut_gate(layer, name, x, low, high, len(data[0])) for name, x in given.items()}
        masks = {name: x[low:high] for name, x in common.items()}
        o, state = layer(
            *(x[low:high] for x in data), **part, **masks, initial_state=state, output_final_state=True, backend="numpy"
        )
        outputs.append(o)
    return np.concatenate(outputs)


def cut_gate(layer, name, x, low, high, t):
    axes = layer.gates[name].axes.split()
    return x[low:high] if axes[:1] in (["t"], ["s"]) and np.ndim(x) else x


def all_gates(layer, rng, data):
    """Random gates, and the length where the default is that of the piece."""
    return random_gates(layer, rng, data) | ({"length": len(data[0])} if "length" in layer.gates else {})


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_may_be_split_anywhere(name):
    layer, rng = ttr_np.layers[name], np.random.default_rng(1)
    data = inputs(layer, rng, 17)
    given = all_gates(layer, rng, data)
    whole = layer(*data, **given, backend="numpy")
    for cuts in ([0, 1, 17], [0, 8, 8, 9, 17], [0, 16, 17]):
        np.testing.assert_allclose(pieces(layer, data, given, cuts), whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_token_is_not_memorised(name):
    layer, rng = ttr_np.layers[name], np.random.default_rng(2)
    data = inputs(layer, rng, 17)
    given = all_gates(layer, rng, data)
    mask = np.ones(17, bool)
    mask[[0, 3, 4, 11]] = False
    kept = [x[mask] for x in data]
    short = {name: x[mask] if layer.gates[name].axes.split()[:1] in (["t"], ["s"]) else x for name, x in given.items()}
    masked = layer(*data, **given, mask=mask, backend="numpy")
    np.testing.assert_allclose(masked[mask], layer(*kept, **short, backend="numpy"), rtol=1e-9, atol=1e-11)
    assert np.all(np.isfinite(masked))


# Inputs, by number, that a query meets beside the memory.
OWN_VALUE = {"mamba1": "02", "mamba2": "02", "mamba3": "02", "comba": "01"}


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_tells_of_a_masked_pair(name):
    layer, rng = ttr_np.layers[name], np.random.default_rng(2)
    data = inputs(layer, rng, 9)
    given = all_gates(layer, rng, data)
    mask = np.ones(9, bool)
    mask[[0, 3, 4, 8]] = False
    told = OWN_VALUE.get(name, "0")
    others = [x if str(i) in told else x + 5.0 * ~mask[:, None] for i, x in enumerate(data)]
    answer = layer(*data, **given, mask=mask, backend="numpy")
    np.testing.assert_allclose(layer(*others, **given, mask=mask, backend="numpy"), answer, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", BY_DEFINITION)
def test_a_definition_takes_many_sequences_and_numpy_alone(name):
    layer, rng = ttr_np.layers[name], np.random.default_rng(3)
    data = [np.stack([x, y]) for x, y in zip(*(inputs(layer, rng, 5) for _ in range(2)), strict=True)]
    data[1] = data[1][:1]  # keys of both
    gates = {"log_decay": np.array([[-0.1], [-0.2]])} if "log_decay" in layer.gates else {}
    for i, o in enumerate(layer(*data, **gates)):
        alone = [x[min(i, len(x) - 1)] for x in data]
        own = {gate: x[i] for gate, x in gates.items()}
        np.testing.assert_allclose(o, layer(*alone, **own), rtol=1e-12, atol=1e-13)
    assert layer(*[x[:0] for x in data]).shape == (0, *data[2].shape[1:])
    with pytest.raises(NotImplementedError, match="runs by its definition, on backend 'numpy'; backend is 'numba'"):
        layer(*data, backend="numba")
    with pytest.raises(ValueError, match="nonsense"):
        layer(*data, backend="nonsense")
    with pytest.warns(RuntimeWarning, match="runs by its definition"):
        layer(*data, backend=("numba", "numpy"))


def test_weights_too_small_for_their_log_are_no_warning():
    x = np.eye(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(ttr_np.layers["mlstm"](x, x, x, log_input=np.full(3, -800.0)), 0 * x)


@pytest.mark.parametrize("name", NAMES)
def test_many_sequences_are_each_by_itself(name):
    layer, rng = ttr_np.layers[name], np.random.default_rng(3)
    singles = [inputs(layer, rng, 9) for _ in range(6)]
    batch = [np.stack(x).reshape((2, 3) + x[0].shape) for x in zip(*singles, strict=True)]
    together = layer(*batch, backend="numpy").reshape((6, 9, -1))
    for i, data in enumerate(singles):
        np.testing.assert_allclose(together[i], layer(*data, backend="numpy"), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_layer_keeps_the_dtype(name, dtype):
    layer = ttr_np.layers[name]
    data = inputs(layer, np.random.default_rng(4), 9)
    o = layer(*(x.astype(dtype) for x in data), backend="numpy")
    assert o.dtype == dtype
    scale = np.abs(layer(*data, backend="numpy")).max()
    loose = 2e-2 if dtype == np.float16 else 1e-4
    np.testing.assert_allclose(o, layer(*data, backend="numpy"), rtol=loose, atol=loose * scale)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_are_separate_calls(name):
    layer, rng = ttr_np.layers[name], np.random.default_rng(5)
    data = inputs(layer, rng, 17)
    given = all_gates(layer, rng, data)
    packed = layer(*data, **given, cu_seqlens=[0, 5, 5, 6, 17], backend="numpy")
    for low, high in ((0, 5), (5, 6), (6, 17)):
        alone = pieces(layer, data, given, [low, high])
        np.testing.assert_allclose(packed[low:high], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", BY_DEFINITION)
def test_a_layer_without_an_operator_runs_by_its_definition(name):
    layer = ttr_np.layers[name]
    data = inputs(layer, np.random.default_rng(6), 9)
    assert np.array_equal(layer(*data), ttr_np.recall(layer, *data))
    with pytest.raises(NotImplementedError, match="definition"):
        layer(*data, output_final_state=True)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_layer_that_cannot_run_says_why(name):
    layer = ttr_np.layers[name]
    assert layer.reason
    with pytest.raises(NotImplementedError, match=layer.reason[:20].replace("(", r"\(")):
        layer(np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2)))


def test_the_table_is_as_long_as_promised():
    assert len(NAMES) >= 80
    for layer in ttr_np.layers.values():
        assert layer.paper
        assert (layer.operator is None) == bool(layer.reason)


def test_an_unknown_layer_gets_a_suggestion():
    with pytest.raises(KeyError, match="did you mean 'gated_deltanet'"):
        ttr_np.layers["gated_deltant"]


def test_an_unknown_gate_is_named():
    with pytest.raises(TypeError, match="has no gate 'decay'; it has log_decay"):
        ttr_np.layers["gla"](np.eye(2), np.eye(2), np.eye(2), decay=1.0)


def test_a_missing_input_is_named():
    with pytest.raises(TypeError, match="lru takes x: 1 inputs, got 3"):
        ttr_np.layers["lru"](np.eye(2), np.eye(2), np.eye(2))


@pytest.mark.parametrize("name", NAMES + BY_DEFINITION)
def test_an_input_that_is_no_table_of_real_numbers_or_does_not_fit_the_others_is_named(name):
    layer = ttr_np.layers[name]
    first, *others = inputs(layer, np.random.default_rng(0), 6)
    wrong = [(first[0], ValueError, "needs axes"), (first > 0, TypeError, "has dtype bool")]
    wrong += [("text", TypeError, "has dtype"), (None, TypeError, "has dtype object")]
    if others:
        wrong += [(1j * first, TypeError, "is complex")]
    for x, error, words in wrong:
        with pytest.raises(error, match=f"{layer.data[0]} {words}"):
            layer(x, *others)
    if others:
        with pytest.raises(ValueError, match="axis 'k' is 4 in k but 3 in q"):
            layer(first[:, :3], *others)
        with pytest.raises(ValueError, match=f"axis 't' is 5 in {layer.data[-1]} but 6 in .|12 in q"):
            layer(first, *others[:-1], others[-1][:5])


def test_keys_per_channel_are_as_many_as_values():
    k, v = np.ones((2, 4)), np.ones((2, 3))
    with pytest.raises(ValueError, match="rwkv4 weighs each channel by itself: axis 'k' is 4 but axis 'v' is 3"):
        ttr_np.layers["rwkv4"](k, k, v)


def test_a_triple_of_ones_own_runs_by_its_definition():
    from ttr_np.layers import Layer
    from ttr_np.optimizers import Exact
    from ttr_np.regressors import Linear
    from ttr_np.weights import Decaying, Window

    layer = Layer(
        "mine", Decaying() * Window(3), Linear(), Exact(0.1), None, "here", {"log_decay": ttr_np.Gate(-0.1, "")}
    )
    q, k, v = inputs(layer, np.random.default_rng(0), 9)
    o = layer(q, k, v)
    w = np.exp(-0.1 * np.array([2, 1, 0]))[:, None]
    expected = q[8] @ np.linalg.solve(k[6:9].T @ (w * k[6:9]) + 0.1 * np.eye(4), k[6:9].T @ (w * v[6:9]))
    np.testing.assert_allclose(o[8], expected, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_full_batch_steps_approach_least_squares(steps):
    """k steps of gradient descent are a truncated Neumann series of the inverse Gram matrix."""
    from ttr_np.layers import Layer
    from ttr_np.optimizers import GradientDescent
    from ttr_np.regressors import Linear
    from ttr_np.weights import Uniform

    layer = Layer("gd", Uniform(), Linear(), GradientDescent(steps, 0.1), None, "here")
    q, k, v = inputs(layer, np.random.default_rng(0), 9)
    gram = k.T @ k
    series = sum(np.linalg.matrix_power(np.eye(4) - 0.1 * gram, j) for j in range(steps))
    np.testing.assert_allclose(layer(q, k, v)[-1], q[-1] @ (0.1 * series @ k.T @ v), rtol=1e-9)


def test_no_layer_needs_a_backend_that_is_missing():
    for name in NAMES:
        assert backends.has_operator("numpy", ttr_np.layers[name].operator), name


@pytest.mark.parametrize("name", NAMES)
def test_default_gates_do_not_look_at_the_length(name):
    layer, rng = ttr_np.layers[name], np.random.default_rng(7)
    data = inputs(layer, rng, 17)
    short = layer(*(x[:9] for x in data), backend="numpy")
    np.testing.assert_allclose(layer(*data, backend="numpy")[:9], short, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(
        pieces(layer, data, {}, [0, 10, 17]), layer(*data, backend="numpy"), rtol=1e-9, atol=1e-11
    )


def test_layers_compute_16_bit_data_in_32():
    x = np.full((256, 64), 12, np.float16)
    o = ttr_np.layers["mlstm"](x, x, np.ones_like(x))
    np.testing.assert_allclose(o, np.ones((256, 64)), rtol=1e-2)
    q = 300 * np.eye(4, dtype=np.float16)
    assert np.all(np.isfinite(ttr_np.layers["symmetric_power"](q, q, np.eye(4, dtype=np.float16))))


def test_gates_per_head_and_per_channel_broadcast():
    rng = np.random.default_rng(8)
    q, k, v = rng.standard_normal((3, 2, 5, 7, 4))
    slopes = features.retention_decays(5)[:, None]
    o = ttr_np.layers["retnet"](q, k, v, log_decay=slopes)
    one = ttr_np.layers["retnet"](q[1, 2], k[1, 2], v[1, 2], log_decay=float(slopes[2, 0]))
    np.testing.assert_allclose(o[1, 2], one, rtol=1e-12)
    rates = rng.uniform(0.1, 1, (5, 1))
    o = ttr_np.layers["mamba2"](q, k, v, rate=rates)
    np.testing.assert_allclose(
        o[0, 3], ttr_np.layers["mamba2"](q[0, 3], k[0, 3], v[0, 3], rate=float(rates[3, 0])), rtol=1e-12
    )
    square = rng.standard_normal((3, 4, 4))
    fixed = -rng.uniform(0, 1, 4)
    per_channel = ttr_np.layers["rwkv5"](*square, log_decay=fixed)
    np.testing.assert_allclose(
        per_channel, ttr_np.layers["rwkv5"](*square, log_decay=np.tile(fixed, (4, 1))), rtol=1e-12
    )
    with pytest.raises(ValueError, match=r"log_decay has shape \(6,\), which does not broadcast to \(..., t k\)"):
        ttr_np.layers["gla"](*square, log_decay=np.zeros(6))


def test_deltaproduct_takes_its_pairs_in_one_long_row():
    rng = np.random.default_rng(9)
    q, k, v = (
        features.normalize_l2(rng.standard_normal((6, 4))),
        rng.standard_normal((12, 4)),
        rng.standard_normal((12, 3)),
    )
    layer, gates = ttr_np.layers["deltaproduct"], {"beta": 0.3, "log_decay": -0.1}
    o = layer(q, k, v, **gates)
    np.testing.assert_allclose(o, ttr_np.recall(layer, q, k, v, **gates), rtol=1e-10)
    np.testing.assert_allclose(o, layer(q, k, v, beta=np.full(6, 0.3), log_decay=np.full(6, -0.1)), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if ttr_np.layers[name].carries])
def test_no_packed_sequence_at_all_and_a_wrong_number_of_states(name):
    layer, empty = ttr_np.layers[name], np.zeros((0, 4))
    o, states = layer(empty, empty, empty, cu_seqlens=[0], output_final_state=True)
    assert o.shape == (0, 4)
    assert states == []
    data = inputs(layer, np.random.default_rng(0), 5)
    with pytest.raises(ValueError, match="a state for each of 2 sequences, got 1"):
        layer(*data, cu_seqlens=[0, 2, 5], initial_state=[None])


ARRAYS_TOO = {"ridge", "process_noise", "measurement_noise"}  # options of which operators take arrays


def wrong(name, default, axes):
    """What a gate or an option cannot be."""
    yield from ("a", object(), {}, np.full((3, 5, 7, 11), 0.1))
    if name != "readout":
        yield 1j
    if axes:
        yield np.zeros((6, 4), bool)
    if axes and axes not in ("t m", "t l"):  # any number of slots and levels
        yield np.full(13, -0.1)
    if not axes and name not in ARRAYS_TOO:
        yield from (np.nan, True, [0.1, 0.2])
    if type(default) is int:
        yield 1.5


@pytest.mark.parametrize("name", [name for name in NAMES + BY_DEFINITION if ttr_np.layers[name].gates])
def test_a_gate_or_option_that_is_no_number_or_does_not_fit_is_named(name):
    layer = ttr_np.layers[name]
    data = inputs(layer, np.random.default_rng(0), 6)
    for gate, (default, _, axes) in layer.gates.items():
        for x in wrong(gate, default, axes):
            with pytest.raises((TypeError, ValueError), match=rf"^(axis '\w' is \d+ in )?.*\b{gate}\b"):
                layer(*data, **{gate: x})


@pytest.mark.parametrize(
    ("name", "gate", "x", "words"),
    [
        ("mamba1", "skip", np.ones((2, 4)), r"skip has shape \(2, 4\), which does not broadcast to \(..., 1 v\)"),
        ("lru", "nu", np.ones(5), r"nu has shape \(5,\), which does not broadcast to \(..., 1 d\) = \(1, 4\)"),
        ("s4d", "readout", np.ones(3), r"readout has shape \(3,\), needs \(n\) = \(16,\)"),
        ("soft", "landmarks", np.ones((7, 5)), r"landmarks has shape \(7, 5\), needs \(m k\) = \(7, 4\)"),
        ("soft", "landmarks", np.full((7, 4), np.nan), "landmarks must be finite; they hold nan"),
        ("soft", "bandwidth", 0.0, "bandwidth must be positive, got 0.0"),
        ("hgrn2", "lower_bound", [0.1, 0.2, 0.3], r"lower_bound has shape \(3,\), which does not broadcast"),
        ("hgrn2", "lower_bound", 1.5, r"lower_bound must lie in \[0, 1\]; it is 1.5"),
        ("deltaproduct", "steps", 0, "steps must be at least 1; it is 0"),
        ("mamba2", "delta", -1.0, r"delta must be >= 0 everywhere; it is -1.0 at \(0,\)"),
        ("mamba3", "rate", -1.0, r"rate must be >= 0 everywhere; it is -1.0 at \(0,\)"),
        ("gla", "log_decay", np.zeros((2, 2, 6, 4)), "log_decay has 4 axes; beside q, k, v it has at most 2"),
        ("omeganet", "beta", np.ones((2, 6)), "beta has 2 axes; beside q, k, v it has at most 1"),
    ],
)
def test_what_is_wrong_with_a_gate_or_option_is_said(name, gate, x, words):
    layer = ttr_np.layers[name]
    with pytest.raises(ValueError, match=words):
        layer(*inputs(layer, np.random.default_rng(0), 6), **{gate: x})


@pytest.mark.parametrize("name", [name for name in NAMES + BY_DEFINITION if "k" in ttr_np.layers[name].data])
def test_keys_without_channels_are_refused(name):
    layer = ttr_np.layers[name]
    data = [
        x[:, :0] if size in ("q", "k") else x
        for size, x in zip(layer.data, inputs(layer, np.random.default_rng(0), 6), strict=True)
    ]
    with pytest.raises(ValueError, match=rf"^axis 'k' is 0 in q; {name} needs keys of size 1 or more"):
        layer(*data)


def test_a_decay_that_is_not_a_number_is_not_lost():
    layer, decay = ttr_np.layers["mlstm"], np.full(6, -0.1)
    decay[3] = np.nan
    o = layer(*inputs(layer, np.random.default_rng(0), 6), log_decay=decay, backend="numpy")
    np.testing.assert_array_equal(np.isnan(o).all(axis=1), np.arange(6) >= 3)
    assert np.isfinite(o[:3]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_or_boundaries_that_do_not_fit_are_named(name):
    layer = ttr_np.layers[name]
    data = inputs(layer, np.random.default_rng(0), 6)
    for mask in ("abc", np.ones(6)):
        with pytest.raises(TypeError, match="^mask has dtype"):
            layer(*data, mask=mask)
    for bad in ({}, {"cu_seqlens": [0, 2, 6]}):
        with pytest.raises(ValueError, match="^axis 't' is 7 in mask but 6 in [qx]"):
            layer(*data, mask=np.ones(7, bool), **bad)
    with pytest.raises(ValueError, match="^cu_seqlens must be a 1-d array of integers"):
        layer(*data, cu_seqlens="ab")
    with pytest.raises(ValueError, match="^cu_seqlens must run from 0 to t = 6, it runs from 0 to 5"):
        layer(*data, cu_seqlens=[0, 5])


def test_a_gate_that_is_longer_than_packed_sequences_is_refused():
    layer = ttr_np.layers["mlstm"]
    data = inputs(layer, np.random.default_rng(0), 6)
    with pytest.raises(ValueError, match=r"^log_decay has shape \(7,\)"):
        layer(*data, log_decay=np.full(7, -0.1), cu_seqlens=[0, 2, 6])


@pytest.mark.parametrize(
    "name", ["mlstm", "rwkv4", "gateloop", "mamba3", "cosformer", "gsa", "preconditioned_kda", "gated_oja"]
)
def test_a_state_that_is_no_pair_is_named(name):
    layer = ttr_np.layers[name]
    data = inputs(layer, np.random.default_rng(0), 6)
    for state, words in (
        (3, "of type int"),
        (np.zeros((4, 4)), "of type ndarray"),
        ((1, 2, 3), "of type tuple with 3 parts"),
    ):
        with pytest.raises(TypeError, match=f"^initial_state is {words}; it needs both parts"):
            layer(*data, initial_state=state)


@pytest.mark.parametrize("name", BY_DEFINITION)
def test_a_definition_answers_in_the_dtype_of_its_data(name):
    layer = ttr_np.layers[name]
    data = inputs(layer, np.random.default_rng(0), 6)
    o = layer(*(x.astype(np.float32) for x in data))
    assert o.dtype == np.float32
    np.testing.assert_allclose(o, layer(*data), rtol=1e-3, atol=1e-4)
