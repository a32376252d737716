"""Every name once, and everything else follows from it: axes, sizes, states, random inputs."""

import numpy as np
import pytest

from ttr_np.notation import ARRAYS, GATES, OPERATORS, STATES, axes_of, check, draw


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_names_only_what_the_notation_has(operator):
    signature = OPERATORS[operator]
    names = signature.arrays + signature.optional
    assert len(set(names)) == len(names) and set(names) <= set(ARRAYS)
    assert set(signature.frozen) <= set(names)
    assert set(signature.reads) <= set(names)
    assert not set(signature.frozen) & set(signature.reads)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_state_has_the_fields_and_axes_the_table_says(operator):
    assert STATES[operator]._fields == tuple(OPERATORS[operator].state)
    assert set(STATES) == set(OPERATORS)


def test_gates_and_decays_have_a_meaning():
    assert set(GATES) <= set(ARRAYS)
    assert all(array.meaning and array.axes for array in ARRAYS.values())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_is_drawn_passes_the_check(operator, per_channel):
    signature = OPERATORS[operator]
    drawn = draw(
        operator,
        np.random.default_rng(0),
        optional=signature.optional,
        lead=(2, 3),
        per_channel=per_channel,
        dtype=np.float32,
        t=9,
    )
    assert list(drawn) == [*signature.arrays, *signature.optional]
    assert all(x.dtype == np.float32 and np.all(np.isfinite(x)) for x in drawn.values())
    assert check(**drawn)["t"] == 9


def test_drawing_twice_gives_the_same():
    first, second = (draw("delta_rule", np.random.default_rng(4)) for _ in range(2))
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name])


def test_ranges_hold_in_what_is_drawn():
    rng = np.random.default_rng(0)
    for operator, signature in OPERATORS.items():
        x = draw(operator, rng, optional=signature.optional, t=200)
        for name in {"log_decay", "A"} & set(x):
            assert np.all(x[name] <= 0)
        for name in {"beta", "delta", "step_size", "momentum", "weight_decay"} & set(x):
            assert np.all(x[name] >= 0)
        for name in {"q", "k", "erase_key"} & set(x):
            np.testing.assert_allclose(np.linalg.norm(x[name], axis=-1), 1)


def test_sizes_are_those_of_the_arrays():
    assert check(q=np.zeros((2, 4, 5)), k=np.zeros((4, 5)), v=np.zeros((4, 3)), beta=None) == {"t": 4, "k": 5, "v": 3}
    assert check(q=np.zeros((4, 5)), log_decay=-1.0) == {"t": 4, "k": 5}


def test_the_error_says_which_arrays_disagree():
    with pytest.raises(ValueError, match="^axis 'k' is 4 in k but 5 in q$"):
        check(q=np.zeros((2, 5)), k=np.zeros((2, 4)))
    with pytest.raises(ValueError, match="^axis 't' is 3 in mask but 2 in q$"):
        check(q=np.zeros((2, 5)), mask=np.zeros(3, bool))
    with pytest.raises(ValueError, match=r"^k needs axes \(..., t, k\), got shape \(5,\)$"):
        check(q=np.zeros((2, 5)), k=np.zeros(5))
    with pytest.raises(ValueError, match=r"^leading axes \(3,\) of v do not broadcast with \(2,\) of q, k$"):
        check(q=np.zeros((2, 4, 5)), k=np.zeros((4, 5)), v=np.zeros((3, 4, 1)))


def test_a_decay_is_per_step_or_per_channel_by_its_axes():
    arrays = {"q": np.zeros((2, 4, 5))}
    assert axes_of("log_decay", np.zeros((2, 4)), arrays) == ("t",)
    assert axes_of("log_decay", np.zeros((2, 4, 5)), arrays) == ("t", "k")
    assert axes_of("log_decay", -1.0, arrays) == ("t",)
    assert axes_of("log_decay", np.zeros((4, 3)), {"x": np.zeros((4, 3))}) == ("t", "d")
    with pytest.raises(ValueError, match="log_decay has 1 axes; q has 3, so log_decay needs 2 .* or 3 "):
        axes_of("log_decay", np.zeros(4), arrays)
