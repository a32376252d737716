"""Tensor cores of Hopper: the descriptors of their matrices, and softmax attention with them, executed on the CPU."""

import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cudaemu
import numpy as np
import pytest
from cudaemu import BoundsFault, RaceFault, UnsetFault, WarpFault, needed, nvrtc, switched
from cudaemu.machines import on_cpu
from test_cuda_attention import arguments, as_good, solved
from test_cuda_kernels import by_the_runner
from test_operators import HALVES, half, same_bits

import ttr_np
from cuda_kernels.cupy_raw import _launch, _text, softmax_attention

pytestmark = needed(cudaemu.missing())

HEADERS = [(Path(_text.FOLDER) / name).read_text() for name in (*_text.HEADERS, "tensor.cuh", "wgmma.cuh")]

# ---- descriptors -----------------------------------------------------------------------------------------------------

# A product of 64 x 16 times 16 x 64 of matrices that lie as the words of x: their descriptors are in d, from the first
# word on. d[2] is the number of one of WAYS.
PRODUCT = """
enum { COLUMNS, REGISTERS, ROWS, TOKENS };
extern "C" __global__ void kernel(const bfloat16* x, const bfloat16* a, const unsigned long long* d, float* y) {
    bfloat16* shared = reinterpret_cast<bfloat16*>(dynamic_shared());
    for (int i = threadIdx.x; i < WORDS; i += 128) shared[i] = x[i];
    show_to_products();
    __syncthreads();
    const Matrix first = shared_address(shared) >> 4;
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    float sum[32];
    unsigned left[4];
    for (int i = 0; i < 4; i++) {
        const bfloat16* at = a + (row + i % 2 * 8) * 16 + pair + i / 2 * 8;
        left[i] = at[0].bits | unsigned(at[1].bits) << 16;
    }
    for (int i = 0; i < 32; i++) sum[i] = 0;
    begin_products();
    if (d[2] == REGISTERS)
        wgmma_bf16<64>(sum, left, d[1] + first);
    else if (d[2] == COLUMNS)
        wgmma_bf16<64>(sum, d[0] + first, d[1] + first, 0);
    else if (d[2] == ROWS)
        wgmma_bf16_rows<64>(sum, d[0] + first, d[1] + first, 0);
    else
        wgmma_bf16_tokens<64>(sum, d[0] + first, d[1] + first, 0);
    close_products();
    finish_products<0>();
    done(sum);
    for (int i = 0; i < 32; i++) y[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + pair + i % 2] = sum[i];
}
"""
# What lies there: columns of the right matrix, or its rows, with the left one in registers, by rows, or by columns. And
# whether neighbours are numbers that a product adds up, of the left matrix and of the right one.
WAYS = {"columns": (True, True), "registers": (True, False), "rows": (True, False), "tokens": (False, False)}
MODES = {0: 1, 1: 8, 2: 4, 3: 2}  # code of a descriptor: pieces of 16 bytes that change places
T = 8  # numbers in 16 bytes


def place(i, k, pieces, columns_inside, leading, stride):
    """Where number k of row i lies, in words: the canonical layouts of the PTX manual, swizzled."""
    if columns_inside and pieces > 1:
        at = i % 8 * pieces * T + i // 8 * stride + k % T + k // T * T
    elif columns_inside:
        at = i % 8 * T + i // 8 * stride + k % T + k // T * leading
    elif pieces > 1:
        at = i % T + i // T % pieces * T + i // (pieces * T) * leading + k % 8 * pieces * T + k // 8 * stride
    else:
        at = i % T + i // T * stride + k % 8 * T + k // 8 * leading
    return at ^ (at // 64 % pieces * T)


def descriptor(start, leading, stride, mode):
    """Of a matrix that begins at a word, with offsets in words."""
    return 2 * start >> 4 | (2 * leading >> 4) << 16 | (2 * stride >> 4) << 32 | mode << 62


def multiplied(mode, left, right, way, offset=0, **options):
    """The product of matrices that are laid out here, from an offset inside their rows on."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    pieces, words = MODES[mode], 16384
    x, begin = np.full(words, np.nan, bfloat16), (0, 8192)
    group = 8 * T * pieces  # words of eight rows
    strides = {True: (64 * T, group) if pieces == 1 else (0, group)}  # by whether columns are inside
    strides[False] = (512, group) if pieces == 1 else (2 * group, group)
    for at, matrix, columns_inside in zip(begin, (left, right), WAYS[way], strict=True):
        for i, k in np.ndindex(*matrix.shape):
            x[at + place(i, k + offset * columns_inside, pieces, columns_inside, *strides[columns_inside])] = matrix[
                i, k
            ]
    codes = [
        descriptor(at + offset * inside, *strides[inside], mode)
        for at, inside in zip(begin, WAYS[way], strict=True)
    ]
    d, y = np.array([*codes, list(WAYS).index(way)], np.uint64), np.zeros((64, 64), np.float32)
    text = "\n".join(["typedef float real;", *HEADERS, PRODUCT.replace("WORDS", str(words))])
    kernel = cudaemu.source(text, "kernel")
    kernel(1, 128, (x, np.ascontiguousarray(left), d, y), dynamic_shared=2 * words, **options)
    return y


def matrices():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    return np.random.default_rng(0).standard_normal((2, 64, 16)).astype(bfloat16)


@by_the_runner
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
def test_a_descriptor_finds_every_number_of_every_layout(mode, way):
    left, right = matrices()
    found = multiplied(mode, left, right, way)
    np.testing.assert_allclose(found, left.astype(float) @ right.astype(float).T, atol=1e-4)


@by_the_runner
@pytest.mark.parametrize("offset", [16, 32, 48])
def test_a_part_of_a_swizzled_row_begins_where_it_would_without(offset):
    left, right = matrices()
    found = multiplied(1, left, right, "columns", offset)
    np.testing.assert_allclose(found, left.astype(float) @ right.astype(float).T, atol=1e-4)


BROKEN = {
    "no fence before": ("begin_products();", "", RaceFault),
    "no wait": ("finish_products<0>();", "", RaceFault),
    "no group": ("close_products();", "", RaceFault),
    "not shown": ("show_to_products();", "", RaceFault),
    "no barrier": ("__syncthreads();", "", RaceFault),
    "a look before the wait": ("finish_products<0>();", "y[0] = sum[0]; finish_products<0>();", RaceFault),
    "a change before the wait": ("finish_products<0>();", "sum[3] *= 2; finish_products<0>();", RaceFault),
    "a changed left matrix": ("finish_products<0>();", "left[2] = 0; finish_products<0>();", RaceFault),
    "an overwritten matrix": ("close_products();", "close_products(); shared[8192 + threadIdx.x] = {};", RaceFault),
    "a matrix outside": ("d[1] + first", "d[1] + first + 1900", (BoundsFault, UnsetFault)),
    "lanes that differ": ("d[1] + first", "d[1] + first + threadIdx.x % 2", WarpFault),
}


@by_the_runner
@pytest.mark.parametrize("name", BROKEN)
def test_a_product_without_its_fences_and_waits_is_seen(name, monkeypatch):
    old, new, fault = BROKEN[name]
    assert old in PRODUCT
    monkeypatch.setitem(globals(), "PRODUCT", PRODUCT.replace(old, new))
    with pytest.raises(fault):
        multiplied(1, *matrices(), "registers")


# ---- softmax attention -----------------------------------------------------------------------------------------------


@contextmanager
def hopper(**options):
    """The machine as one of compute capability 9.0; on a GPU, where it is one."""
    with on_cpu("cupy", **options) as machine:
        if cudaemu.ON_GPU and machine.device().capability != "90":
            pytest.skip("for compute capability 9.0")
        machine.capability = "90"
        yield machine


def run(arrays, check=False, **options):
    with hopper(check=check) as machine:
        found = ttr_np.softmax_attention(**arrays, **options, backend="cupy")
    assert machine.launches == ["softmax_wgmma"]
    return found


drawn = partial(arguments, "softmax_attention", np.random.default_rng(0))


@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (64, 128), (128, 64), (80, 40)], ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_halves_are_as_good_as_the_solver(name, sizes):
    k, v = sizes
    for t in (128, 193, 390):
        arrays = drawn(t, k=k, v=v, lead=(), dtype=half(name))
        for causal in (True, False):
            as_good(run(arrays, causal=causal), *solved("softmax_attention", arrays, causal=causal), floor=2)


@pytest.mark.parametrize("groups, causal", [(3, True), (2, False)])
def test_queries_that_share_a_memory(groups, causal):
    arrays = drawn(150, k=64, v=64, lead=(2, 1), dtype=np.float16)
    arrays["q"] = np.random.default_rng(1).standard_normal((2, groups, 150, 64)).astype(np.float16)
    as_good(run(arrays, causal=causal), *solved("softmax_attention", arrays, causal=causal), floor=2)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e9, 1e12])
def test_logits_far_apart(scale):
    arrays = drawn(200, k=64, v=64, dtype=np.float16)
    as_good(run(arrays, scale=scale), *solved("softmax_attention", arrays, scale=scale), floor=2)


def test_what_comes_later_changes_no_bit():
    arrays = drawn(400, k=64, v=64, lead=(), dtype=np.float16)
    arrays["q"][:, 0], arrays["k"][:, 0] = 1000, 1000
    arrays["q"][110:, 0] = 60000  # logits so far from zero that their thread rounds them, and theirs alone
    long = run(arrays)
    for t in (128, 191, 256, 390):
        same_bits(run({name: x[:t] for name, x in arrays.items()}), long[:t])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_bad_number_reaches_what_it_must(name, bad):
    arrays = drawn(270, k=64, v=64, dtype=np.float16)
    spoilt = arrays | {name: arrays[name].copy()}
    spoilt[name][0, 170, 1] = bad
    with np.errstate(invalid="ignore"):
        clean, found = run(arrays), run(spoilt)
        wanted = ttr_np.softmax_attention(**spoilt, backend="numpy")
    same_bits(found[:, :170], clean[:, :170])
    same_bits(found[1], clean[1])
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


def between(arrays):
    """The same numbers where no row begins at a multiple of 16 bytes."""
    return {name: np.pad(x, ((0, 0), (1, 7)))[:, 1:-7] for name, x in arrays.items()}


def test_bits_depend_on_no_neighbour_no_layout_and_no_order():
    arrays = drawn(200, k=64, v=64, lead=(17,), dtype=np.float16)
    among = run(arrays)
    for i in (0, 8, 16):
        alone = {name: x[i] for name, x in arrays.items()}
        same_bits(run(alone), among[i])
        same_bits(run(between(alone)), among[i])
    moved = {name: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, 1)), 1, 0) for name, x in arrays.items()}
    same_bits(run(moved), among)
    few = {name: x[:2] for name, x in arrays.items()}
    for options in ({"order": "reverse"}, {"order": "random", "seed": 1}):
        with hopper(**options):
            same_bits(ttr_np.softmax_attention(**few, backend="cupy"), among[:2])


OTHERS = {
    "another GPU": ({}, {}, "80"),
    "a window": ({}, {"window": 50}, "90"),
    "a mask": ({}, {"mask": np.arange(150) > 3}, "90"),
    "gates": ({"gated": True}, {}, "90"),
    "small heads": ({"k": 32}, {}, "90"),
    "wide heads": ({"v": 136}, {}, "90"),
    "rows of no pieces": ({"k": 65}, {}, "90"),
    "few queries": ({"t": 127}, {}, "90"),
    "a scale below zero": ({}, {"scale": -1.0}, "90"),
}


@by_the_runner
@pytest.mark.parametrize("name", OTHERS)
def test_all_else_goes_to_the_text_for_any_gpu(name):
    sizes, options, capability = OTHERS[name]
    arrays = drawn(**{"t": 150, "k": 64, "v": 64, "lead": (), "dtype": np.float16} | sizes)
    with on_cpu("cupy") as machine:
        machine.capability, machine.build = capability, lambda *_: lambda *_, **__: None
        ttr_np.softmax_attention(**arrays, **options, backend="cupy")
    assert machine.launches == ["softmax_tensor"]


def test_arrays_on_the_device_stay_there_and_the_architecture_is_asked_for(cupy, monkeypatch):
    monkeypatch.setattr(cupy.Device, "compute_capability", "90")
    monkeypatch.setattr(_launch, "device", _launch.device.__wrapped__)
    arrays = drawn(130, k=64, v=64, lead=(), dtype=np.float16)
    cupy.called.clear()
    found = ttr_np.softmax_attention(**{name: cupy.ndarray(x) for name, x in arrays.items()})
    assert isinstance(found, cupy.ndarray) and cupy.called.count("launch") == 1
    same_bits(found.get(), run(arrays))


# ---- fences, waits and barriers --------------------------------------------------------------------------------------

PLACES = r"__sync(?:threads|warp)\(\);|(?:show_to|begin|close|finish)_(?:products|copies)(?:<\d>)?\(\);"
PLACES += r"|(?<!void )\b(?:self\.)?(?:wait|arrive|arrive_with_copies|free|warpgroup_barrier)\([^;{]*\);"
FAULTS = (cudaemu.RaceFault, cudaemu.UnsetFault, cudaemu.BarrierFault)


def places():
    return list(re.finditer(PLACES, softmax_attention.HOPPER.text()))


@by_the_runner
@pytest.mark.parametrize("number", range(len(places())))
def test_each_fence_each_wait_and_each_barrier_is_needed(number, monkeypatch):
    place, text = places()[number], softmax_attention.HOPPER.text()
    monkeypatch.setattr(softmax_attention.HOPPER, "text", lambda: switched(text, PLACES))
    arrays = drawn(520, k=64, v=64, lead=(), dtype=np.float16)
    arrays["v"][518, 3] = np.nan
    with hopper(left_out=number), pytest.raises(FAULTS):
        ttr_np.softmax_attention(**arrays, backend="cupy")
        ttr_np.softmax_attention(**between(arrays), backend="cupy")  # rows that no copies take
        pytest.fail(f"nobody misses {place[0]}")


# ---- machine code ----------------------------------------------------------------------------------------------------

SIZES = [(64, 64), (128, 128), (64, 128), (128, 64)]


@needed(nvrtc.missing())
@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_text_compiles_without_spilling_and_keeps_its_products_asynchronous(sizes, name):
    arrays, texts = drawn(200, k=sizes[0], v=sizes[1], lead=(), dtype=half(name)), []
    with on_cpu("cupy") as machine:
        machine.capability, machine.run = "90", lambda text, *rest: texts.append(text)
        ttr_np.softmax_attention(**arrays, backend="cupy")
    code, words = nvrtc.machine_code_and_words(texts[0], "sm_90a")
    found = nvrtc.needs(code)
    consumers = softmax_attention.hopper_block(*sizes).CONSUMERS
    assert found.registers <= (168 if consumers == 2 else 128)  # of a multiprocessor's 65536, before some leave theirs
    assert found.stack == 0 and found.shared - 1024 <= softmax_attention.STATIC
    assert "wgmma" not in words and "setmaxnreg" not in words, words  # what it says when it waits after each product
