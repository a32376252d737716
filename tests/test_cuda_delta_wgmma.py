"""The chunked delta rule on the tensor cores of Hopper, executed on the CPU: see test_cuda_delta_chunks.py."""

import re
from functools import partial

import cudaemu
import numpy as np
import pytest
import test_cuda_chunks as chunks
import test_cuda_kernels as kernels
from cudaemu import BoundsFault, Fault, needed, nvrtc, switched
from test_cuda_chunks import distance, recalled
from test_cuda_delta_chunks import inputs as drawn
from test_cuda_linear_wgmma import bits, on_hopper, same_bits

import ttr_np
from cuda_kernels.cupy_raw import _delta_rule_chunks as hopper

pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")]
GATES = ["none", "step", "channel"]
corrected = partial(recalled, "delta_rule")


def inputs(gate, lead=(1,), k=128, v=40, **sizes):
    return drawn("bfloat16", gate, lead=lead, k=k, v=v, **sizes)


def answered(arrays, options, **machine):
    """Answers and state as the kernels leave them."""
    with on_hopper(**machine) as here:
        o, state = ttr_np.delta_rule(**arrays, **options, backend="cupy")
    assert set(here.launches) == {"delta_rule_prepare", "delta_rule_wgmma"}
    return o, state.S


# ---- what it promises ------------------------------------------------------------------------------------------------


# Borders of chunks; more chunks than places; values of two blocks, the second one in part; keys that fill no block.
@pytest.mark.parametrize(
    "gate, k, v, t", [("none", 128, 32, 64), ("none", 128, 40, 200), ("step", 128, 33, 191), ("step", 120, 8, 257),
                      ("step, erase", 128, 32, 130), ("none", 64, 64, 130), ("step", 50, 31, 193),
                      ("channel", 128, 33, 200), ("channel, erase", 63, 20, 131)],
)  # fmt: skip
def test_it_is_as_good_as_the_solver(gate, k, v, t):
    compare(*inputs(gate, k=k, v=v, t=t, seed=t))


def compare(arrays, options, floor=2**-16):
    """Errors, against double precision, of the kernel and of the solver."""
    exact, plain = corrected(arrays, options, dtype=np.float64), corrected(arrays, options)
    found = answered(arrays, options)
    assert distance(found[0].astype(np.float64), exact[0]) <= 2 * distance(plain[0], exact[0])
    floor *= np.max(np.abs(exact[1]))  # the state is made of what is computed in 16 bits, as in older texts
    assert distance(found[1], exact[1]) <= max(2 * distance(plain[1], exact[1]), floor)


@pytest.mark.parametrize("step", [0.0, 1.0, 2.0])
def test_one_key_again_and_again_is_solved_for(step):
    arrays, options = inputs("none", t=64)
    k = np.zeros((1, 64, 128))
    k[..., :4] = 0.5  # of unit length in every format
    compare(arrays | {"k": k.astype(arrays["k"].dtype), "beta": np.full((1, 64), step, np.float32)}, options, 2**-14)


@pytest.mark.parametrize(
    "gate, k, name, bad, reset",
    [("none", 128, "v", 100, None), ("step", 128, "v", 70, 120), ("step", 128, "k", 70, 132), ("step", 64, "q", 5, 4),
     ("none", 60, "k", 129, None), ("channel", 128, "v", 70, 130)],
)  # fmt: skip
def test_a_bad_number_reaches_what_it_must_and_no_bit_of_the_past(gate, k, name, bad, reset):
    arrays, _ = inputs(gate, k=k, t=135)
    options = {"output_final_state": True}
    if reset is not None:
        arrays["log_decay"][0, reset] = -np.inf
    clean = answered(arrays, options)
    spoilt = arrays | {name: arrays[name].copy()}
    spoilt[name][0, bad, 7] = np.inf if name == "k" else np.nan
    found = answered(spoilt, options)
    np.testing.assert_array_equal(bits(found[0][:, :bad]), bits(clean[0][:, :bad]))
    for x, y in zip(found, corrected(spoilt, options, dtype=np.float64), strict=True):
        finite = np.isfinite(y)
        np.testing.assert_array_equal(np.isfinite(x.astype(np.float64)), finite)
        scale = np.max(np.abs(y[finite]), initial=0)
        np.testing.assert_allclose(x.astype(np.float64)[finite], y[finite], atol=2**-7 * scale, rtol=0)


def test_one_sequence_has_the_same_bits_alone_and_among_many():
    arrays, _ = inputs("step", lead=(5,), t=150)
    options = {"output_final_state": True}
    among = answered(arrays, options)
    for i in (0, 4):
        alone = answered({n: x[i] for n, x in arrays.items()}, options)
        assert same_bits(alone, [x[i] for x in among])


@pytest.mark.parametrize("gate", GATES)
def test_the_order_of_threads_changes_no_bit(gate):
    arrays, options = inputs(gate, t=200)
    orders = {"order": "forward"}, {"order": "reverse"}, {"order": "random", "seed": 1}
    found = [answered(arrays, options, **order) for order in orders]
    assert same_bits(found[1], found[0]) and same_bits(found[2], found[0])


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_rows_that_no_vector_can_read_and_rows_far_apart_give_the_same_bits():
    arrays, options = inputs("step", lead=(2,), t=130)
    wanted = answered(arrays, options)
    assert same_bits(answered(chunks.off_by_one(arrays), options), wanted)
    after_time = {n: np.moveaxis(np.moveaxis(x, 0, 1).copy(), 1, 0) for n, x in arrays.items()}
    assert same_bits(answered(after_time, options), wanted)


@kernels.by_the_runner
@pytest.mark.parametrize("gate, k", [("none", 128), ("step", 64), ("channel", 128)])
def test_the_bytes_asked_for_are_those_the_text_uses(gate, k, monkeypatch):
    arrays, options = inputs(gate, k=k, t=130)
    known, less = hopper.bytes_for_warpgroups, hopper.BEGIN + 16  # the runner's shared memory begins where matrices may
    monkeypatch.setattr(hopper, "bytes_for_warpgroups", lambda *sizes: known(*sizes) - less)
    with pytest.raises(BoundsFault):
        answered(arrays, options)


def test_other_calls_are_for_the_older_text():
    arrays, _ = inputs("step", t=130)
    grouped = {n: x[:, None] for n, x in arrays.items()} | {"q": np.stack([arrays["q"]] * 2, axis=1)}
    small, _ = inputs("step", t=130, k=100)
    halves = {n: x.astype(np.float16) if x.dtype.itemsize == 2 else x for n, x in arrays.items()}
    for given, capability in ((grouped, "90"), (small, "90"), (halves, "90"), (arrays, "100")):
        with on_hopper(check=False) as machine:
            machine.capability = capability
            ttr_np.delta_rule(**given, backend="cupy")
        assert machine.launches == ["delta_rule_prepare", "delta_rule_chunks"]


# ---- barriers and waits ----------------------------------------------------------------------------------------------

# What orders threads, copies and products; one wait is there only to be fast.
PLACES = (
    r"^ +(?:__sync\w+\(\);|both_warpgroups\(\);|wait\(barriers.*?\);(?!  // not beside)|show_to_products\(\);"
    r"|(?:close|finish)_copies(?:<\d>)?\(\);|finish_products<\w+>\(\);)"
)


@pytest.mark.slow
@kernels.by_the_runner
def test_each_barrier_and_each_wait_is_needed(monkeypatch):
    whole = hopper.WGMMA.text()
    places, survivors = list(re.finditer(PLACES, whole, re.M)), []
    assert len(places) > 20
    monkeypatch.setattr(hopper.WGMMA, "text", lambda: switched(whole, PLACES))
    arrays, _ = inputs("step", t=64 * 4 + 2, v=32)
    arrays["v"][0, 100, 0] = np.nan
    arrays["log_decay"][0, 120] = -np.inf
    arrays |= chunks.off_by_one({"q": arrays["q"]})  # which no vector can read, unlike keys
    answered(arrays, {"output_final_state": True})  # with all of them nothing is wrong
    for number, place in enumerate(places):
        try:
            for order in ("forward", "reverse"):
                answered(arrays, {"output_final_state": True}, order=order, left_out=number)
            survivors.append(whole[place.start() - 200 : place.end() + 60])
        except Fault:
            pass
    assert survivors == []


# ---- machine code ----------------------------------------------------------------------------------------------------


@needed(nvrtc.missing())
@pytest.mark.parametrize("gate, k", [("none", 128), ("step", 64), ("channel", 128)])
def test_it_compiles_within_its_registers_and_its_products_run_beside_other_work(gate, k):
    texts, (arrays, _) = [], inputs(gate, k=k, t=130)
    with on_hopper() as machine:
        machine.run = lambda text, *rest: texts.append(text)
        ttr_np.delta_rule(**arrays, backend="cupy")
    code, words = nvrtc.machine_code_and_words(texts[-1], "sm_90a")
    found = nvrtc.needs(code)
    assert "wgmma" not in words and "warpgroup" not in words  # the compiler says so where it must wait for each product
    assert found.registers <= 168 and found.stack == 0  # 384 threads
    assert found.shared - 1024 <= hopper.STATIC_OF_WGMMA  # what the system keeps
