"""Products of tensor cores, their loads and copies: each function of ``tensor.cuh``, executed on the CPU."""

import re
from pathlib import Path

import cudaemu
import numpy as np
import pytest
from cudaemu import ArithmeticFault, BarrierFault, RaceFault, UnsetFault, WarpFault, needed, nvrtc

from cuda_kernels.cupy_raw import _text

pytestmark = needed(cudaemu.missing())

HEADERS = [(Path(_text.FOLDER) / name).read_text() for name in (*_text.HEADERS, "tensor.cuh")]
FORMATS = ("bfloat16", "float16", "float")
SIZE = (48, 40)  # of the tile that matrices are loaded from


def dtype_of(name):
    return {"float16": np.float16, "float": np.float32}.get(name) or pytest.importorskip("ml_dtypes").bfloat16


def text_of(body):
    """A kernel whose data are x and w, of a type each, and whose answers are y."""
    head = 'extern "C" __global__ void kernel(const X* x, const W* w, float* y) {\n'
    return "\n".join(["typedef float real;", *HEADERS, "{types}", f"{head}{body}\n}}\n"])


def run(body, x, w, y, formats, threads=32, shared=40_000, check=True, **options):
    """Launch one block."""
    types = "".join(f"typedef {name} {letter};" for name, letter in zip(formats, "XW", strict=True))
    kernel = cudaemu.source(text_of(body).replace("{types}", types), "kernel", check=check)
    kernel(1, threads, (x, w, y), dynamic_shared=shared, check=check, **options)
    return y


def draw(name, shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype_of(name))


FETCH = """
    unsigned char* at = dynamic_shared();
    const auto tile = tile_of<Tile<X, 48, 40>>(at);
    const auto other = tile_of<Tile<W, 48, 40>>(at);
    const Rows<const X> from = {x, 0, 40, 1};
    const Rows<const W> and_from = {w, 0, 40, 1};
    fetch(tile, from, 0, 0, 48, 40, true);
    fetch(other, and_from, 0, 0, 48, 40, true);
    close_copies();
    finish_copies<0>();
    __syncthreads();
"""
LOADS = ("", "_transposed")
PRODUCT = """
    {
        Left<LEFT> left;
        Right<RIGHT> right[2];
        load_leftA(left, tile, 16, 8AS);
        load_rightB(right, other, 16, 24AS);
        for (int n = 0; n < 2; n++) {
            Sum sum = {};
            multiply(sum, left, right[n]);
            each(sum, [&](int i, int j, float& value) { y[AT + i * 16 + 8 * n + j] = value; });
        }
    }
"""


def product(left, right, changed, at=0):
    """Text of a product of matrices that are loaded as they are, or as terms with a change."""
    text = PRODUCT.replace("A(", f"{left}(").replace("B(", f"{right}(").replace("AT", str(at))
    if changed:
        terms = text.replace("LEFT", "bfloat16, 3").replace("RIGHT", "bfloat16, 3")
        left_change, right_change = (f", [](int i, int j, float z) {{ return z * (i + {k} * j); }}" for k in (2, 3))
        return terms.replace("AS", left_change, 1).replace("AS", right_change, 1)
    return text.replace("LEFT", "X, 1").replace("RIGHT", "X, 1").replace("AS", "")


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_load_takes_the_matrix_that_its_comment_says(name, changed):
    if name == "float" and not changed:
        return
    ways = [(left, right) for left in LOADS for right in LOADS]
    text = FETCH + "".join(product(*way, changed, 256 * n) for n, way in enumerate(ways))
    x, w = draw(name, SIZE), draw(name, SIZE, 1)
    y = run(text, x, w, np.zeros((4, 16, 16), np.float32), (name, name))
    i, j = np.mgrid[:16, :16]
    for found, (left, right) in zip(y, ways, strict=True):
        a, b = x.astype(float)[16:32, 8:24], w.astype(float)[16:32, 24:40]
        a, b = a.T if left else a, b.T if right else b
        if changed:
            a, b = a * (i + 2 * j), b * (i + 3 * j)
        np.testing.assert_allclose(found, a @ b, atol=2e-6 * np.max(np.abs(a) @ np.abs(b)), rtol=0)


@pytest.mark.parametrize("terms, bound", [((1, 1), 2**-8), ((2, 2), 2**-15), ((3, 3), 2**-22), ((3, 2), 2**-15)])
def test_so_many_terms_keep_so_many_bits(terms, bound):
    text = product("", "", True).replace("bfloat16, 3> left", f"bfloat16, {terms[0]}> left")
    text = re.sub(r"z \* \(i \+ \d \* j\)", "z", text.replace("bfloat16, 3> right", f"bfloat16, {terms[1]}> right"))
    x, w = draw("float", SIZE), draw("float", SIZE, 1)
    y = run(FETCH + text, x, w, np.zeros((16, 16), np.float32), ("float", "float"))
    a, b = x.astype(float)[16:32, 8:24], w.astype(float)[16:32, 24:40]
    error = np.max(np.abs(y - a @ b) / (np.abs(a) @ np.abs(b)))
    assert bound / 500 < error < bound


@pytest.mark.parametrize("terms, bound", [((1, 1), 2**-8), ((2, 2), 2**-15), ((2, 1), 2**-8)])
def test_so_many_terms_keep_their_bits_in_the_sums_of_tensor_cores(terms, bound):
    text = product("", "", True).replace("multiply(", "multiply_onto(")
    text = text.replace("bfloat16, 3> left", f"bfloat16, {terms[0]}> left")
    text = re.sub(r"z \* \(i \+ \d \* j\)", "z", text.replace("bfloat16, 3> right", f"bfloat16, {terms[1]}> right"))
    text = text.replace("Sum sum = {};", "Sum sum = {{64, 64, 64, 64}};")
    x, w = draw("float", SIZE), draw("float", SIZE, 1)
    y = run(FETCH + text, x, w, np.zeros((16, 16), np.float32), ("float", "float"))
    a, b = x.astype(float)[16:32, 8:24], w.astype(float)[16:32, 24:40]
    error = np.max(np.abs(y - 64 - a @ b) / (np.abs(a) @ np.abs(b)))
    assert bound / 500 < error < bound


def test_data_of_16_bits_times_three_terms_are_as_good_as_float():
    text = product("", "", True).replace("bfloat16, 3> right", "bfloat16, 1> right")
    text = re.sub(r", \[\]\(int i, int j, float z\) { return z \* \(i \+ 3 \* j\); }", "", text)
    x, w = draw("float", SIZE), draw("bfloat16", SIZE, 1)
    y = run(FETCH + text, x, w, np.zeros((16, 16), np.float32), ("float", "bfloat16"))
    i, j = np.mgrid[:16, :16]
    a, b = x.astype(float)[16:32, 8:24] * (i + 2 * j), w.astype(float)[16:32, 24:40]
    assert np.max(np.abs(y - a @ b) / (np.abs(a) @ np.abs(b))) < 2**-22


def test_a_sum_is_the_left_or_the_right_of_the_next_product():
    chained = """
    Left<bfloat16, 3> left;
    Right<bfloat16, 3> right[2];
    Sum sum[2] = {}, first[2] = {}, second[2] = {};
    load_left(left, tile, 0, 0, AsItIs());
    load_right(right, other, 0, 0, AsItIs());
    for (int n = 0; n < 2; n++) multiply(sum[n], left, right[n]);
    Left<bfloat16, 3> as_left;
    left_of(as_left, sum[0], sum[1]);
    for (int n = 0; n < 2; n++) {
        Right<bfloat16, 3> as_right;
        right_of(as_right, sum[0], sum[1], n);
        multiply(first[n], as_left, right[n]);
        multiply(second[n], left, as_right);
        each(first[n], [&](int i, int j, float& value) { y[i * 16 + 8 * n + j] = value; });
        each(second[n], [&](int i, int j, float& value) { y[256 + i * 16 + 8 * n + j] = value; });
    }
    """
    x, w = draw("float", SIZE), draw("float", SIZE, 1)
    y = run(FETCH + chained, x, w, np.zeros((2, 16, 16), np.float32), ("float", "float"))
    a, b = x.astype(float)[:16, :16], w.astype(float)[:16, :16]
    np.testing.assert_allclose(y, [(a @ b) @ b, a @ (a @ b).T], atol=1e-4)


def test_infinities_and_nan_pass_through_a_product():
    x, w = np.ones(SIZE, dtype_of("bfloat16")), np.ones(SIZE, dtype_of("bfloat16"))
    x[16, 8], x[17, 8], x[18, 8] = np.inf, np.nan, 3e38
    y = run(FETCH + product("", "", False), x, w, np.zeros((16, 16), np.float32), ("bfloat16", "bfloat16"))
    assert np.all(np.isposinf(y[0])) and np.all(np.isnan(y[1])) and np.all(np.isfinite(y[2:]))


COPY = """
    unsigned char* at = dynamic_shared();
    const auto tile = tile_of<Tile<X, 16, 24>>(at);
    const int offset = int(w[0]), stride = int(w[1]), rows = int(w[2]), columns = int(w[3]);
    const Rows<const X> from = {x + offset, 0, stride, 1};
    fetch(tile, from, 2, 8, rows, columns, in_vectors(from));
    close_copies();
    finish_copies<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * 24; i += blockDim.x) y[i] = widened(tile.at(i / 24, i % 24));
"""


@pytest.mark.parametrize("known", [None, 48, 64, 96], ids="{} threads".format)
@pytest.mark.parametrize("name", FORMATS)
def test_a_piece_of_an_array_comes_with_zeros_around_it(name, known):
    body = COPY.replace("fetch(", f"fetch<{known}>(") if known else COPY
    room = draw(name, 1000)
    aligned = room[(-room.ctypes.data % 16) // room.itemsize :]
    for offset, stride in ((0, 40), (1, 40), (0, 37)):
        for rows, columns in ((16, 24), (9, 13), (1, 1), (0, 0)):
            x = aligned[: offset + 20 * stride]
            sizes = np.array([offset, stride, rows, columns], np.float32)
            y = np.full((16, 24), np.nan, np.float32)
            run(body, x, sizes, y, (name, "float"), threads=known or 64, shared=16 * 32 * room.itemsize)
            wanted = np.zeros((16, 24))
            wanted[:rows, :columns] = x[offset:].reshape(20, stride)[2 : 2 + rows, 8 : 8 + columns]
            np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("columns, stride", [(16, 16), (13, 16), (16, 19)])
def test_a_tile_goes_back_to_where_rows_lie(columns, stride):
    body = f"""
    unsigned char* at = dynamic_shared();
    const auto tile = tile_of<Tile<float, 16, 16>>(at);
    Sum sum[2];
    for (int n = 0; n < 2; n++) {{
        each(sum[n], [&](int i, int j, float& value) {{ value = x[i * 16 + 8 * n + j]; }});
        store(sum[n], tile, 0, 8 * n);
    }}
    __syncthreads();
    write_back(tile, Rows<float>{{y, 0, {stride}, 1}}, 1, 0, 11, {columns});
    """
    x, y = draw("float", (16, 16)), np.zeros((16, stride), np.float32)
    run(body, x, x, y, ("float", "float"))
    wanted = np.zeros_like(y)
    wanted[1:12, :columns] = x[:11, :columns]
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("rows", [16, 11, 3, 0, -5])
@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_a_warp_go_to_where_rows_lie(name, rows):
    body = f"""
    Sum sum[2];
    for (int n = 0; n < 2; n++)
        each(sum[n], [&](int i, int j, float& value) {{ value = widened(x[i * 16 + 8 * n + j]); }});
    store_columns(sum, Rows<X>{{reinterpret_cast<X*>(y), 0, 40, 1}}, 2, 16, {rows});
    """
    x, y = draw(name, (16, 16)), np.zeros((20, 40), dtype_of(name))
    run(body, x, x, y.view(np.float32), (name, name))
    wanted = np.zeros_like(y)
    wanted[2 : 2 + max(rows, 0), 16:32] = x[: max(rows, 0)]
    np.testing.assert_array_equal(y.astype(float), wanted.astype(float))


@pytest.mark.parametrize("name", FORMATS)
def test_neighbours_are_read_and_written_together(name):
    body = """
    unsigned char* at = dynamic_shared();
    const auto split = split_of<terms_of<X>, 16, 8>(at);
    const auto tile = tile_of<Tile<X, 16, 8>>(at);
    for (int i = threadIdx.x; i < 128; i += 32) tile.at(i / 8, i % 8) = x[i];
    __syncthreads();
    Sum sum;
    each_pair(sum, [&](int i, int j, float& low, float& high) {
        read_two(tile, i, j, low, high);
        split.set_two(i, j, low, -high);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < 128; i += 32) y[i] = split.at(i / 8, i % 8);
    """
    x = draw(name, (16, 8))
    y = run(body, x, x, np.zeros((16, 8), np.float32), (name, name))
    kept = {"bfloat16": 0, "float16": 2**-8, "float": 2**-24}[name]  # one bfloat16 is narrower than a float16
    np.testing.assert_allclose(y, x.astype(np.float32) * np.tile([1, -1], 4), rtol=kept, atol=0)


# ---- what the runner sees --------------------------------------------------------------------------------------------

TWO_STAGES = """
    unsigned char* at = dynamic_shared();
    const Tile<X, 8, 8> stages[2] = {tile_of<Tile<X, 8, 8>>(at), tile_of<Tile<X, 8, 8>>(at)};
    const Rows<const X> from = {x, 0, 8, 1};
    fetch(stages[0], from, 0, 0, 8, 8, true);
    close_copies();
    float total = 0;
    for (int t = 0; t < 3; t++) {
        if (t < 2) fetch(stages[(t + 1) % 2], from, 8 * (t + 1), 0, 8, 8, true);
        close_copies();
        finish_copies<1>();
        __syncthreads();
        total += widened(stages[t % 2].at(threadIdx.x % 8, 7 - threadIdx.x / 8));
        __syncthreads();
    }
    finish_copies<0>();
    y[threadIdx.x] = total;
"""
two_stages = {"formats": ("float", "float"), "threads": 64}


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("check", [True, False])
def test_copies_of_two_stages_arrive_in_every_order(order, check):
    x = draw("float", (24, 8))
    y = run(TWO_STAGES, x, x, np.zeros(64, np.float32), order=order, check=check, **two_stages)
    wanted = ((x[:8] + x[8:16]) + x[16:])[:, ::-1].T.ravel()
    np.testing.assert_array_equal(y, wanted)


BROKEN = {
    "no wait": ("finish_copies<1>();", ""),
    "a wait for older copies": ("finish_copies<1>();", "finish_copies<2>();"),
    "no barrier after the wait": ("__syncthreads();\n        total", "total"),
    "no barrier before the next copy": ("__syncthreads();\n    }", "}"),
    "a copy to where others read": ("(t + 1) % 2", "t % 2"),
    "an end without a wait": ("finish_copies<0>();", "", 3),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_wait_and_each_barrier_is_needed(name):
    old, new, *tokens = BROKEN[name]
    body = TWO_STAGES.replace("t < 2", f"t < {tokens[0] if tokens else 2}")
    assert old in body
    x = draw("float", (32, 8))
    with pytest.raises((RaceFault, UnsetFault)):
        run(body.replace(old, new), x, x, np.zeros(64, np.float32), **two_stages)


def test_without_checks_a_missing_wait_shows_as_nan():
    x = draw("float", (24, 8))
    body = TWO_STAGES.replace("finish_copies<1>();", "")
    assert np.isnan(run(body, x, x, np.zeros(64, np.float32), check=False, **two_stages)).any()


def test_what_a_warp_does_together_no_lane_does_alone():
    body = FETCH + product("", "", False).replace("multiply(", "if (threadIdx.x % 2) multiply(")
    x = draw("bfloat16", SIZE)
    with pytest.raises((WarpFault, BarrierFault)):
        run(body, x, x, np.zeros((16, 16), np.float32), ("bfloat16", "bfloat16"))


def test_rows_between_16_bytes_are_refused():
    x = draw("bfloat16", SIZE)
    for old, new in (("16, 8)", "16, 7)"), ("from, 0, 0", "from, 0, 1")):
        body = FETCH + product("", "", False)
        assert old in body
        with pytest.raises(ArithmeticFault):
            run(body.replace(old, new), x, x, np.zeros((16, 16), np.float32), ("bfloat16", "bfloat16"))


@needed(nvrtc.missing())
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_header_compiles_for_every_architecture(name, architecture):
    types = "".join(f"typedef {name} {letter};" for letter in "XW")
    text = text_of(FETCH + product("", "_transposed", name == "float")).replace("{types}", types)
    found = nvrtc.needs(nvrtc.machine_code(text, architecture))
    assert found.stack == 0 and found.registers <= 96
