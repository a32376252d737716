"""Linear attention on the tensor cores of Hopper, executed on the CPU: see test_cuda_chunks.py for the older text."""

import re
from contextlib import contextmanager
from functools import cache

import cudaemu
import numpy as np
import pytest
import test_cuda_chunks as chunks
import test_cuda_kernels as kernels
from cudaemu import BoundsFault, Fault, needed, nvrtc, source, switched
from cudaemu.build import ON_GPU
from cudaemu.machines import Cupy, on_cpu
from test_cuda_chunks import attend, distance

import ttr_np
from cuda_kernels.cupy_raw import _linear_attention_wgmma as hopper

LONG = 64 * 7 + 2  # tokens: the fewest chunks that are cut in pieces
CUT = 32 * 7 + 2  # and with one gate per channel
pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")]


@contextmanager
def on_hopper(multiprocessors=1, **options):
    """A GPU of compute capability 9.0; with one multiprocessor no sequence is cut in pieces."""
    with on_cpu("cupy", **options) as machine:
        if ON_GPU and machine.device().capability != "90":
            pytest.skip("another GPU")
        machine.capability, machine.multiprocessors = "90", multiprocessors
        yield machine


def inputs(gate, lead=(1,), k=128, v=128, **sizes):
    return chunks.inputs("bfloat16", gate, lead=lead, k=k, v=v, **sizes)


def bits(x):
    return x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def answered(arrays, options, **machine):
    """Answers and state as the kernel leaves them."""
    with on_hopper(**machine) as here:
        o, state = ttr_np.linear_attention(**arrays, **options, backend="cupy")
    per_channel = "log_decay" in arrays and arrays["log_decay"].ndim == arrays["q"].ndim
    assert set(here.launches) == {"linear_attention_channels" if per_channel else "linear_attention_wgmma"}
    return o, state.S


def same_bits(found, wanted):
    return all(np.array_equal(bits(x), bits(y)) for x, y in zip(found, wanted, strict=True))


# ---- what it promises ------------------------------------------------------------------------------------------------


# Borders of chunks and of pieces; values of two blocks, the second one in part; keys and values that fill no block.
@pytest.mark.parametrize(
    "gate, k, v, t, multiprocessors",
    [("none", 128, 128, 128, 1), ("none", 128, 128, LONG, 3), ("step", 128, 136, 191, 1),
     ("step", 128, 128, LONG + 1, 3), ("step", 100, 72, 129, 1),
     ("none", 64, 64, LONG, 3), ("step", 64, 40, LONG + 1, 3), ("step", 50, 100, 191, 1), ("none", 33, 128, LONG, 2),
     ("channel", 128, 128, CUT, 3), ("channel", 128, 136, 159, 1), ("channel", 65, 72, 129, 1)],
)  # fmt: skip
def test_it_is_as_good_as_the_solver(gate, k, v, t, multiprocessors):
    arrays, options = inputs(gate, k=k, v=v, t=t, seed=t)
    compare(arrays, options, multiprocessors=multiprocessors)


def compare(arrays, options, **machine):
    """Errors, against double precision, of the kernel and of the solver."""
    exact, plain = attend(arrays, options, dtype=np.float64), attend(arrays, options)
    found = answered(arrays, options, **machine)
    assert distance(found[0].astype(np.float64), exact[0]) <= 2 * distance(plain[0], exact[0])
    floor = 2**-16 * np.max(np.abs(exact[1]))  # the state is made of what is computed in 16 bits, as in older texts
    assert distance(found[1], exact[1]) <= max(2 * distance(plain[1], exact[1]), floor)


@pytest.mark.parametrize("gate", ["none", "step", "channel"])
def test_answers_are_as_good_where_they_are_small_beside_what_they_are_made_of(gate):
    arrays, options = inputs(gate, t=130)
    rng, q, k, S = np.random.default_rng(0), arrays["q"], arrays["k"], options["initial_state"]
    q[..., 1::2] = -q[..., ::2]  # the rest of channels that are nearly alike: the state in one bfloat16 has none
    for x, across in ((k, (..., slice(None, None, 2))), (S, (..., slice(None, None, 2), slice(None)))):
        near = x[across] * (1 + rng.standard_normal(x[across].shape) / 16)
        x[(*across[:1], slice(1, None, 2), *across[2:])] = near.astype(x.dtype)
    if gate == "channel":
        arrays["log_decay"][..., 1::2] = arrays["log_decay"][..., ::2]  # they stay nearly alike
    compare(arrays, options)


def test_gates_of_channels_may_forget_anything_at_any_token():
    arrays, options = inputs("channel", t=CUT)
    rng, gates = np.random.default_rng(0), arrays["log_decay"]
    gates[..., ::3] *= 300
    gates[..., 1::3] = 0
    half = gates[..., ::2]  # of the channels: the others carry what an earlier piece leaves
    half[rng.random(half.shape) < 0.05] = -np.inf
    half[:, 77] = -1e30
    compare(arrays, options, multiprocessors=3)


@pytest.mark.parametrize("more", [{"mask": np.arange(290)[None] % 7 != 3}, {"cu_seqlens": np.array([0, 130, 290])}])
def test_gates_of_channels_know_masks_and_packed_sequences(more):
    arrays, options = inputs("channel", t=290)
    compare(arrays, options | more | ({"initial_state": None} if "cu_seqlens" in more else {}))


def test_gates_of_channels_know_sequences_that_are_cut_anywhere():
    arrays, options = inputs("channel", t=290)
    exact, plain, state = attend(arrays, options, dtype=np.float64), attend(arrays, options), options["initial_state"]
    found = []
    for part in (slice(0, 149), slice(149, 290)):
        o, state = answered({n: x[:, part] for n, x in arrays.items()}, options | {"initial_state": state})
        found.append(o)
    assert distance(np.concatenate(found, axis=1).astype(np.float64), exact[0]) <= 2 * distance(plain[0], exact[0])
    assert distance(state, exact[1]) <= 2**-16 * np.max(np.abs(exact[1]))


@pytest.mark.parametrize("gate", ["step", "channel"])
def test_queries_in_groups_share_a_memory(gate):
    arrays, options = inputs(gate, lead=(2,), t=130)
    options = {"output_final_state": True}
    grouped = {n: x[:, None] for n, x in arrays.items()}
    grouped["q"] = np.stack([arrays["q"], arrays["q"][::-1]], axis=1)
    found = answered(grouped, options)
    for group, q in enumerate((arrays["q"], arrays["q"][::-1])):
        alone = answered(arrays | {"q": q}, options)
        np.testing.assert_array_equal(bits(found[0][:, group]), bits(alone[0]))
        np.testing.assert_array_equal(found[1][:, 0], alone[1])


@pytest.mark.parametrize(
    "gate, size, name, bad, reset, multiprocessors",
    [("none", 128, "v", 100, None, 3), ("step", 128, "v", 110, 120, 3), ("step", 128, "k", 70, 200, 1),
     ("step", 128, "q", 5, 4, 1), ("none", 64, "v", 100, None, 1), ("step", 64, "v", 110, 120, 2),
     ("channel", 128, "v", 90, 100, 3), ("channel", 128, "k", 70, 200, 1), ("channel", 128, "q", 5, 4, 1)],
)  # fmt: skip
def test_a_bad_number_reaches_what_it_must_and_no_bit_of_the_past(gate, size, name, bad, reset, multiprocessors):
    cut = CUT if gate == "channel" else LONG
    arrays, _ = inputs(gate, k=size, v=size, t=cut if multiprocessors > 1 else 210)
    options = {"output_final_state": True}
    if reset is not None:
        arrays["log_decay"][0, reset] = -np.inf
    clean = answered(arrays, options, multiprocessors=multiprocessors)
    spoilt = arrays | {name: arrays[name].copy()}
    spoilt[name][0, bad, 7:40] = np.inf if name == "k" else np.nan
    found = answered(spoilt, options, multiprocessors=multiprocessors)
    np.testing.assert_array_equal(bits(found[0][:, :bad]), bits(clean[0][:, :bad]))
    for x, y in zip(found, attend(spoilt, options, dtype=np.float64), strict=True):
        finite = np.isfinite(y)
        np.testing.assert_array_equal(np.isfinite(x.astype(np.float64)), finite)
        scale = np.max(np.abs(y[finite]), initial=0)
        np.testing.assert_allclose(x.astype(np.float64)[finite], y[finite], atol=2**-8 * scale, rtol=0)


@pytest.mark.parametrize("gate", ["step", "channel"])
def test_one_sequence_has_the_same_bits_alone_and_among_many(gate):
    arrays, _ = inputs(gate, lead=(5,), t=150)
    options = {"output_final_state": True}
    among = answered(arrays, options)
    for i in (0, 4):
        alone = answered({n: x[i] for n, x in arrays.items()}, options)
        assert same_bits(alone, [x[i] for x in among])


@pytest.mark.parametrize("gate, size", [("none", 128), ("step", 128), ("step", 64), ("channel", 128)])
def test_the_order_of_threads_changes_no_bit(gate, size):
    arrays, options = inputs(gate, k=size, v=size, t=CUT if gate == "channel" else LONG)
    orders = {"order": "forward"}, {"order": "reverse"}, {"order": "random", "seed": 1}
    found = [answered(arrays, options, multiprocessors=3, **order) for order in orders]
    assert same_bits(found[1], found[0]) and same_bits(found[2], found[0])


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["step", "channel"])
def test_rows_that_no_vector_can_read_and_rows_far_apart_give_the_same_bits(gate):
    arrays, options = inputs(gate, lead=(2,), t=130)
    wanted = answered(arrays, options)
    assert same_bits(answered(chunks.off_by_one(arrays), options), wanted)
    after_time = {n: np.moveaxis(np.moveaxis(x, 0, 1).copy(), 1, 0) for n, x in arrays.items()}
    assert same_bits(answered(after_time, options), wanted)


@kernels.by_the_runner
@pytest.mark.parametrize("gate, size", [("step", 128), ("step", 64), ("channel", 128)])
@pytest.mark.parametrize("short", [True, False])
def test_the_bytes_asked_for_are_those_the_text_uses(short, gate, size, monkeypatch):
    chunks = 2 * 6 * 32 if gate == "channel" else 2 * 5 * 64
    arrays, options = inputs(gate, k=size, v=size, t=chunks)  # both launches have a chunk in every place
    known, less = hopper.shared, hopper.BEGIN + 16  # the runner's shared memory begins where matrices may
    monkeypatch.setattr(hopper, "shared", lambda chosen, first: known(chosen, first) - less * (first is short))
    with pytest.raises(BoundsFault):
        answered(arrays, options, multiprocessors=2)


def test_other_calls_are_for_the_older_texts():
    arrays, options = inputs("step", t=130)
    channel, _ = inputs("channel", t=130, k=64)
    short = {n: x[:, :100] for n, x in arrays.items()}
    small, _ = inputs("step", t=130, k=32)
    narrow, _ = inputs("step", t=130, v=64)
    single = {n: x.astype(np.float32) for n, x in arrays.items()}
    others = [(given, False) for given in (channel, short, small, narrow, single)]
    for given, normalize in [*others, (arrays, True)]:
        q, v = given["q"], given["v"]
        with on_hopper():
            plan = hopper.plan(q, v, given | {"bonus": None}, None, normalize)
        assert plan is None
    with on_hopper() as machine:
        machine.capability = "100"
        assert hopper.plan(arrays["q"], arrays["v"], arrays | {"bonus": None}, None, False) is None


# ---- barriers and waits ----------------------------------------------------------------------------------------------


# What orders threads, copies and products. On the runner nothing shares registers with what a product has.
PLACES = (
    r"^ +(?:__sync\w+\(\);|warpgroup_barrier\(.*?\);|wait\((?:barriers|ring).*?\);|show_to_products\(\);"
    r"|(?:close|finish)_copies(?:<\d>)?\(\);|finish_products<\d>\(\);(?!  // (?:sums that|terms of)))"
)


def switch_in(text):
    """Switches in what both texts share and in the text itself, but not in headers for more than these."""
    begin = text.index("// What both texts of linear attention on Hopper share")
    return text[:begin] + switched(text[begin:], PLACES)


@pytest.mark.slow
@kernels.by_the_runner
@pytest.mark.parametrize("gate", ["step", "channel"])
def test_each_barrier_and_each_wait_is_needed(gate, monkeypatch):
    tokens, multiprocessors = (32 * 12, 2) if gate == "channel" else (LONG, 3)  # more chunks than places for them
    arrays, _ = inputs(gate, t=tokens)
    arrays["v"][0, 100, 0] = np.nan
    arrays |= chunks.off_by_one({"k": arrays["k"]})  # which no vector can read, unlike queries
    monkeypatch.setattr(Cupy, "build", staticmethod(cache(lambda text, *rest: source(switch_in(text), *rest))))
    whole, options = texts(gate)[0], {"output_final_state": True}
    whole = whole[whole.index("// What both texts") :]
    places, survivors = list(re.finditer(PLACES, whole, re.M)), []
    assert len(places) > 12
    for number, place in enumerate(places):
        try:
            for order in ("forward", "reverse"):
                answered(arrays, options, multiprocessors=multiprocessors, order=order, left_out=number)
            survivors.append(whole[place.start() - 200 : place.end() + 60])
        except Fault:
            pass
    assert survivors == []


# ---- machine code ----------------------------------------------------------------------------------------------------

# By gate and size, for both launches: bytes of the stack.
STACK = {("none", 128): (0, 0), ("step", 128): (0, 8), ("none", 64): (0, 0), ("step", 64): (0, 0)}
STACK |= {("channel", 128): (0, 0)}
# Of 384 threads, of two blocks of 256, or of 512, before warpgroups trade them.
REGISTERS = {("none", 128): 168, ("step", 128): 168, ("none", 64): 128, ("step", 64): 128, ("channel", 128): 128}


def texts(gate, size=128):
    """Of both launches of a call."""
    found = []
    with on_hopper(multiprocessors=3) as machine:
        machine.run = lambda text, *rest: found.append(text)
        arrays, _ = inputs(gate, k=size, v=size, t=LONG)
        ttr_np.linear_attention(**arrays, backend="cupy")
    return found


@needed(nvrtc.missing())
@pytest.mark.parametrize("gate, size", STACK)
def test_it_compiles_within_its_registers_and_its_products_run_beside_other_work(gate, size):
    for text, stack in zip(texts(gate, size), STACK[gate, size], strict=True):
        code, words = nvrtc.machine_code_and_words(text, "sm_90a")
        found = nvrtc.needs(code)
        assert not words.strip("\0")  # the compiler says so where it must wait for products that the text does not
        assert found.registers <= REGISTERS[gate, size]
        assert found.stack <= stack
        assert found.shared - 1024 <= hopper.STATIC  # what the system keeps


@needed(nvrtc.missing())
def test_a_product_that_is_not_waited_for_is_seen():
    text = texts("none")[0]
    waited = text.replace("finish_products<0>();\n        for (int part", "for (int part")
    assert waited != text and "wgmma" in nvrtc.machine_code_and_words(waited, "sm_90a")[1]
