"""The table: every line is the layer its three choices say it is."""

import numpy as np
import pytest

import ttr_np
from ttr_np import backends, features

NAMES = [name for name, layer in ttr_np.layers.items() if layer.operator is not None]
BY_DEFINITION = [name for name, layer in ttr_np.layers.items() if layer.operator is None and layer.optimizer is not None]
IMPOSSIBLE = [name for name, layer in ttr_np.layers.items() if layer.optimizer is None]


def inputs(layer, rng, t, k=4, v=4):
    """One sequence of a layer's inputs: unit keys, values of any length."""
    sizes = {"q": k, "k": k, "v": v, "x": v}
    data = {name: rng.standard_normal((t, sizes[name])) for name in layer.data}
    return [features.normalize_l2(x) if name in ("q", "k") else x for name, x in data.items()]


def random_gates(layer, rng, data):
    """Every gate of a layer away from its default, in its range, all of them varying in time."""
    p = layer.problem(*data)
    drawn = {}
    for name, gate in layer.gates.items():
        x = getattr(p.get(name), "shape", ())
        if not gate.axes or name in ("position", "landmarks"):
            continue
        shape = layer.problem(*data)[name].shape if x else ()
        drawn[name] = draw_gate(name, rng, shape)
    return drawn


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
