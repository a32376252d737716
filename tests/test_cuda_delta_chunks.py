"""The chunked delta rule of the ``cupy`` backend, executed on the CPU: what it promises, what only chunks can break."""

import re
from functools import partial
from time import process_time

import cudaemu
import numpy as np
import pytest
import test_cuda_kernels as kernels
from cudaemu import BoundsFault, Fault, needed, nvrtc, switched
from cudaemu.machines import on_cpu
from test_cuda_chunks import (
    FORMATS,
    SENTENCES,
    Chunked,
    distance,
    drawn,
    dtype_of,
    from_one_token,  # noqa: F401 - a fixture of every test
    off_by_one,
    recalled,
)

from cuda_kernels.cupy_raw import _delta_rule_chunks as chunks
from cuda_kernels.cupy_raw import _tiles

pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:overflow encountered")]

CASES = [
    Chunked("delta_rule", "cupy", (), False, {"scale": 0.3}),
    Chunked("delta_rule", "cupy", ("log_decay",), False, {"scale": 0.3}),
    Chunked("delta_rule", "cupy", ("log_decay",), True, {"scale": 0.3}),
    Chunked("delta_rule", "cupy", ("log_decay", "erase_key"), True, {"scale": 0.3}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


# ---- what holds for every operator -----------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("sentence", SENTENCES, ids=kernels.title)
def test_chunks_keep_the_word_of_the_operators(case, sentence):
    if "reset" in kernels.title(sentence) and "log_decay" not in case.optional:
        return
    with on_cpu("cupy", check=False) as machine:
        sentence(case)
    assert "delta_rule" not in machine.launches


@every_case
def test_a_full_reset_forgets_even_a_bad_number(case):
    with on_cpu("cupy", check=False) as machine:
        kernels.test_a_full_reset_forgets_even_a_bad_number(case, machine)


# ---- chunks and the solver -------------------------------------------------------------------------------------------

VARIANTS = {
    "none": ((), False),
    "step": (("log_decay",), False),
    "channel": (("log_decay",), True),
    "step, erase": (("log_decay", "erase_key"), False),
    "channel, erase": (("log_decay", "erase_key"), True),
}
# k and v, and tokens around the borders of blocks and chunks
HURTING = [
    ("bfloat16", "none", 59, 33, (63, 65)),
    ("bfloat16", "step", 1, 1, (15, 17, 31, 33)),
    ("bfloat16", "step, erase", 128, 70, (131,)),
    ("bfloat16", "channel", 40, 17, (16, 31, 33)),
    ("bfloat16", "channel, erase", 33, 40, (150,)),
    ("float16", "channel, erase", 3, 40, (32, 67)),
    ("float32", "step", 130, 3, (1, 64, 65)),
    ("float32", "channel", 111, 33, (33,)),
    ("float32", "none", 256, 80, (17,)),
]


inputs, corrected = partial(drawn, "delta_rule", VARIANTS), partial(recalled, "delta_rule")


def as_good_as_the_solver(name, arrays, options, floor=2**-16):
    exact, plain = corrected(arrays, options, dtype=np.float64), corrected(arrays, options)
    with on_cpu("cupy") as machine:
        found = corrected(arrays, options, "cupy")
    assert machine.launches == ["delta_rule_prepare", "delta_rule_chunks"]
    eps = np.finfo(np.float32).eps
    scale = [np.max(np.abs(x)) for x in exact]
    assert distance(found[0], exact[0]) <= max(2 * distance(plain[0], exact[0]), 4 * eps * scale[0])
    # The state of 16-bit data is made of what is computed in 16 bits of the fraction: see _tiles.SUM_TERMS.
    floor = 4 * eps if name == "float32" else floor
    assert distance(found[1], exact[1]) <= max(2 * distance(plain[1], exact[1]), floor * scale[1])


@pytest.mark.parametrize("name, variant, k, v, lengths", HURTING)
def test_chunks_are_as_good_as_the_solver(name, variant, k, v, lengths):
    for t in lengths:
        as_good_as_the_solver(name, *inputs(name, variant, seed=t, t=t, k=k, v=v))


@pytest.mark.parametrize("step", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_one_key_again_and_again_is_solved_for(name, step):
    arrays, options = inputs(name, "none", lead=(1,), t=64, k=16, v=33)
    k = np.zeros((1, 64, 16))
    k[..., :4] = 0.5  # of unit length in every format
    arrays |= {"k": k.astype(dtype_of(name)), "beta": np.full((1, 64), step, np.float32)}
    as_good_as_the_solver(name, arrays, options, floor=2**-14)  # 64 reflections on one another
    if step == 0:
        with on_cpu("cupy", check=False):
            np.testing.assert_array_equal(corrected(arrays, options, "cupy")[1], options["initial_state"])


@pytest.mark.parametrize("name, variant", [("bfloat16", "step"), ("float32", "channel")])
def test_the_order_of_threads_changes_no_bit(name, variant):
    arrays, options = inputs(name, variant, lead=(1,), t=70, k=16, v=33)
    found = []
    for order in ({}, {"order": "reverse"}, {"order": "random", "seed": 1}):
        with on_cpu("cupy", check=False, **order):
            found.append(corrected(arrays, options, "cupy"))
    for others in found[1:]:
        for x, y in zip(others, found[0], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name, variant", [("bfloat16", "step"), ("float32", "channel")])
def test_one_sequence_has_the_same_bits_alone_and_among_64(name, variant):
    arrays, _ = inputs(name, variant, lead=(64,), t=40)
    with on_cpu("cupy", check=False):
        among = corrected(arrays, {"output_final_state": True}, "cupy")
        for i in (0, 63):
            alone = corrected({n: x[i] for n, x in arrays.items()}, {"output_final_state": True}, "cupy")
            for x, y in zip(alone, among, strict=True):
                np.testing.assert_array_equal(x, y[i])


def test_a_cut_at_the_border_of_a_chunk_changes_no_bit():
    arrays, options = inputs("bfloat16", "step", t=150, k=16, v=33)
    with on_cpu("cupy", check=False):
        o, state = corrected(arrays, options, "cupy")
        first, middle = corrected({n: x[:, :64] for n, x in arrays.items()}, options, "cupy")
        options["initial_state"] = middle.astype(np.float32)
        second, end = corrected({n: x[:, 64:] for n, x in arrays.items()}, options, "cupy")
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), o)
    np.testing.assert_array_equal(end, state)


@pytest.mark.parametrize("variant", ["step", "channel, erase"])
@pytest.mark.parametrize("where", [0, 20, 63, 64, 69])
def test_a_bad_number_anywhere_in_a_chunk_changes_no_bit_before_it(where, variant):
    arrays, options = inputs("bfloat16", variant, t=70, k=16, v=33)
    for name in {"q", "k", "v", "erase_key"} & arrays.keys():
        spoilt = arrays | {name: arrays[name].copy()}
        spoilt[name][0, where, 0] = np.nan
        with on_cpu("cupy", check=False):
            clean, found = (corrected(given, options, "cupy") for given in (arrays, spoilt))
        np.testing.assert_array_equal(found[0][:, :where], clean[0][:, :where])
        np.testing.assert_array_equal(np.isnan(found[0]), np.isnan(corrected(spoilt, options)[0]))
        np.testing.assert_array_equal(found[0][1], clean[0][1])


def test_an_error_that_overflows_changes_no_bit_before_it():
    arrays, options = inputs("bfloat16", "step", t=70, k=16, v=33)
    options["initial_state"] = np.full((2, 16, 33), 1e36, np.float32)
    spoilt = arrays | {"k": arrays["k"].copy()}
    spoilt["k"][0, 20] = 1e3
    with on_cpu("cupy", check=False):
        clean, found = (corrected(given, options, "cupy") for given in (arrays, spoilt))
    np.testing.assert_array_equal(found[0][:, :20], clean[0][:, :20])
    assert np.all(np.isfinite(clean[0])) and not np.any(np.isfinite(found[0][0, 20:]))
    np.testing.assert_array_equal(found[0][1], clean[0][1])


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, variant", [("bfloat16", "step"), ("float32", "channel")])
def test_rows_that_no_vector_can_read_give_the_same_bits(name, variant):
    arrays, options = inputs(name, variant, lead=(1,), t=40, k=16, v=16)
    with on_cpu("cupy"):
        moved, wanted = (corrected(given, options, "cupy") for given in (off_by_one(arrays), arrays))
        for x, y in zip(moved, wanted, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("axis", ["memory", "time"])
def test_strides_of_more_than_32_bits(axis):
    arrays, options = inputs("bfloat16", "step", t=3)
    with on_cpu("cupy"):
        wanted = corrected(arrays, options, "cupy")
        for n, x in arrays.items():
            far = kernels.far_apart(x, 1 if axis == "time" else 0)
            for y, z in zip(corrected(arrays | {n: far}, options, "cupy"), wanted, strict=True):
                np.testing.assert_array_equal(y, z)


@pytest.mark.parametrize("shared", [99, 163, 227], ids="{} KB".format)
def test_what_is_chosen_fits_on_the_device(shared):
    for name in FORMATS:
        for gate in ("none", "step", "channel"):
            for erase in (False, True):
                for k in (1, 16, 64, 128, 129, 192, 256):
                    for v in (1, 16, 17, 64, 128, 500):
                        found = chunks.tiles(dtype_of(name), 64, k, v, gate, erase, shared * 1024)
                        if found is None:
                            assert k > 128, "heads of usual size have chunks on every device"
                            continue
                        assert max(found.prepare, found.walk) + _tiles.STATIC <= shared * 1024
                        assert found.keys >= k
    assert chunks.tiles(np.float64, 64, 16, 16, "none", False, 10**6) is None
    assert chunks.tiles(np.float32, 64, 257, 16, "none", False, 10**6) is None


# Too few of each; what a block walks with ends with 16 bytes between rows.
BYTES = {"bytes_to_prepare": 16, "bytes_to_walk": 32, "numbers_of_a_record": 4}


@kernels.by_the_runner
@pytest.mark.parametrize("counted", BYTES)
@pytest.mark.parametrize("name, variant", [("bfloat16", "none"), ("bfloat16", "step, erase"), ("float32", "channel")])
def test_the_bytes_asked_for_are_those_the_texts_use(name, variant, counted, monkeypatch):
    arrays, options = inputs(name, variant, lead=(1,), t=40, k=16, v=16)
    known = getattr(chunks, counted)
    monkeypatch.setattr(chunks, counted, lambda *sizes: known(*sizes) - BYTES[counted])
    with on_cpu("cupy"), pytest.raises(BoundsFault):
        corrected(arrays, options, "cupy")


@pytest.mark.parametrize("name, variant", [("bfloat16", "step"), ("float32", "channel")])
def test_parts_change_no_bit(name, variant, monkeypatch):
    arrays, options = inputs(name, variant, t=150, k=16, v=33)
    found = []
    for least in (100, 1, 2):
        monkeypatch.setattr(chunks, "RECORDS", 0)
        monkeypatch.setattr(chunks, "LEAST", least)
        with on_cpu("cupy") as machine:
            found.append(corrected(arrays, options, "cupy"))
        many = 1 if least == 100 else -(-150 // (least * (64 if name == "bfloat16" else 32)))
        assert len(machine.launches) == 2 * many
    for others in found[1:]:
        for x, y in zip(others, found[0], strict=True):
            np.testing.assert_array_equal(x, y)


# ---- machine code ----------------------------------------------------------------------------------------------------

ARCHITECTURES = {"sm_80": 163, "sm_90a": 227, "sm_100": 227}  # with the shared memory of a block, in KB
SECONDS = 10.0  # of one core that does other work too: without, each takes one or two


@needed(nvrtc.missing())
@kernels.by_the_runner
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name, variant", [("bfloat16", "step"), ("bfloat16", "channel"), ("float32", "step, erase")])
def test_a_text_compiles_soon_and_without_spilling(name, variant, architecture):
    arrays, options = inputs(name, variant, lead=(), t=64, k=128, v=128)
    texts = []
    with on_cpu("cupy") as machine:
        machine.shared = ARCHITECTURES[architecture] * 1024
        machine.run = lambda text, *rest: texts.append(text)
        corrected(arrays, options, "cupy")
    reserved = 0 if architecture == "sm_80" else 1024  # of each block, for the system
    assert len(texts) == 2
    for text in texts:
        start = process_time()
        found = nvrtc.needs(nvrtc.machine_code(text, architecture))
        assert process_time() - start < SECONDS
        assert found.stack == 0 and found.shared - reserved <= _tiles.STATIC


# ---- barriers and waits ----------------------------------------------------------------------------------------------

SYNCHRONISED = r"__syncthreads\(\);|__syncwarp\(\);|finish_copies<0>\(\);"


def calls():
    """What shows together that every one is needed: both kinds of gates, groups, many values, and bad numbers."""
    yield inputs("bfloat16", "none", lead=(1,), t=70, k=16, v=33)
    for name, variant, v in (("bfloat16", "step, erase", 136), ("bfloat16", "channel", 33)):
        arrays, options = inputs(name, variant, lead=(1, 1), t=70, k=16, v=v)
        arrays["q"] = np.repeat(arrays["q"], 2, axis=1)
        spoilt = arrays | {"v": arrays["v"].copy()}
        spoilt["v"][..., 5, 0] = np.nan
        yield from ((arrays, options), (spoilt, options))


def places():
    """Every one: its text, its number in it, and where it is."""
    for kernel in (chunks.PREPARE, chunks.KERNEL):
        for number, place in enumerate(re.finditer(SYNCHRONISED, kernel.text())):
            line = kernel.text()[: place.start()].count("\n") + 1
            yield pytest.param(kernel, number, place, id=f"{kernel.name} {line}")


@pytest.mark.slow
@kernels.by_the_runner
@pytest.mark.parametrize("kernel, number, place", list(places()))
def test_each_barrier_and_wait_is_needed(kernel, number, place, monkeypatch):
    whole = kernel.text()
    monkeypatch.setattr(kernel, "text", lambda: switched(whole, SYNCHRONISED))
    for arrays, options in calls():
        for order in ("forward", "reverse"):
            try:
                with on_cpu("cupy", order=order, left_out=number):
                    corrected(arrays, options, "cupy")
            except Fault:
                return
    pytest.fail(f"nothing happens without {whole[place.start() : whole.index(chr(10), place.start())]}")
