"""The runner of CUDA kernels catches what it is for, says where, and is silent about kernels that are right."""

import math

import cudaemu
import numpy as np
import pytest
from cudaemu import (
    ArithmeticFault,
    BarrierFault,
    BoundsFault,
    LaunchFault,
    RaceFault,
    TimeFault,
    UnsetFault,
    WarpFault,
    needed,
)

pytestmark = needed(cudaemu.missing())

SWAP = "__shared__ float s[64];\ns[t] = x[t];\n__syncthreads();\ny[t] = s[63 - t];"
LOOP = (
    "__shared__ float s[64];\nfloat total = 0;\nfor (int i = 0; i < 3; i++) {\n"
    "s[t] = x[t];\n__syncthreads();\ntotal += s[63 - t];\n__syncthreads();\n}\ny[t] = total;"
)
LANES = "__shared__ float s[64];\ns[t] = x[t];\n__syncwarp();\ny[t] = s[t ^ 5];"
FACTOR = 2.0
SHUFFLE = "y[t] = __shfl_xor_sync(0xffffffffu, x[t], 1);"

# Numbers of which others use a part: what the runner knows of a number it keeps once, as long as it is used as a whole.
WHOLE = "alignas(16) __shared__ float s[64];\nchar* bytes = (char*)s;\ns[t] = x[t];\n__syncthreads();\n"
FOUR = "struct alignas(16) four { float x, y, z, w; };\n"
PARTS = (
    "alignas(16) __shared__ float s[64];\nchar* bytes = (char*)s;\nfor (int i = 0; i < 4; i++)\n"
    "bytes[64 * i + t] = ((const char*)x)[64 * i + t];\n__syncthreads();\nfloat total = s[63 - t];\n"
    "__syncthreads();\ns[t] = total;\n__syncthreads();\n"
    "if (t < 32) {\nconst double both = ((const double*)s)[t];\n((double*)s)[t] = both;\n}\n__syncthreads();\n"
    "bytes[t] = bytes[t];\n__syncthreads();\ny[t] = s[t] + ((const four*)s)[t / 4].x;"
)

# name: (body of a kernel with t its thread, the faults it may end with, how it is launched otherwise)
FAULTS = {
    "no barrier": (SWAP.replace("__syncthreads();", ""), (RaceFault, UnsetFault), {}),
    "no barrier before the next round": (LOOP.replace("__syncthreads();\n}", "}"), RaceFault, {}),
    "a shuffle is no barrier": (SWAP.replace("__syncthreads();", SHUFFLE), (RaceFault, UnsetFault), {}),
    "two barriers in two branches": (
        "if (t < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}\ny[t] = 1;", BarrierFault, {},
    ),
    "a barrier for half of the block": ("if (t < 32) __syncthreads();\ny[t] = 1;", BarrierFault, {}),
    "a return before the barrier": ("if (t > 50) return;\n__syncthreads();\ny[t] = 1;", BarrierFault, {}),
    "a shuffle in a branch": (f"if (t & 1) {SHUFFLE}\ny[t] = 1;", (BarrierFault, WarpFault), {}),
    "a mask without the caller": ("y[t] = __shfl_xor_sync(0xffffu, x[t], 1);", WarpFault, {}),
    "a lane that does not exist": ("y[t] = __shfl_xor_sync(0xffffffffu, x[t], 16);", WarpFault, {"threads": 16}),
    "a lane that takes no part": ("if (t < 16) y[t] = __shfl_xor_sync(0xffffu, x[t], 16);", WarpFault, {}),
    "no barrier of the warp": (LANES.replace("__syncwarp();", ""), (RaceFault, UnsetFault), {}),
    "a barrier of each warp between two": (SWAP.replace("__syncthreads", "__syncwarp"), (RaceFault, UnsetFault), {}),
    "no barrier of the warp before the next round": (
        f"for (int i = 0; i < 2; i++) {{\n{LANES}\n}}", RaceFault, {},
    ),
    "a barrier of the warp in a branch": ("if (t & 1) __syncwarp();\ny[t] = 1;", (BarrierFault, WarpFault), {}),
    "a read behind the end": ("y[t] = x[t + 1];", BoundsFault, {}),
    "a read before the beginning": ("y[t] = x[t - 1];", BoundsFault, {}),
    "a read whose value is not used": ("const float late = x[t + 1];\ny[t] = t < 63 ? late : 0;", BoundsFault, {}),
    "a write behind the end": ("y[t + 1] = 1;", BoundsFault, {}),
    "a write to what is only read": ("const_cast<float*>(x)[t] = 1;", BoundsFault, {}),
    "an index outside a shared array": ("__shared__ float s[8][8];\ns[0][t] = 1;\ny[t] = 1;", ArithmeticFault, {}),
    "an index outside a local array": ("float s[4];\ns[t] = 1;\ny[t] = s[t];", ArithmeticFault, {}),
    "shared memory that was not written": (SWAP.replace("s[t]", "if (t) s[t]"), UnsetFault, {}),
    "an output read before it is written": ("y[t] += x[t];", UnsetFault, {"unset": (0,)}),
    "two threads write one number": ("y[t / 2] = 1;", RaceFault, {}),
    "two blocks write one number": ("y[t] = 1;", RaceFault, {"blocks": 2}),
    "a block reads what another wrote": ("if (t == blockIdx.x) y[t] = y[1 - t];", RaceFault, {"blocks": 2}),
    "a byte of a number that another writes": (f"{WHOLE}s[t] = 1;\ny[t] = bytes[4 * (t ^ 1) + 2];", RaceFault, {}),
    "a byte into a number that another reads": (
        f"{WHOLE}if (t & 1) y[t] = s[t];\nelse bytes[4 * t + 7] = 1;\nif (!(t & 1)) y[t] = 1;", RaceFault, {},
    ),
    "two numbers of which another reads the second": (
        f"{WHOLE}if (t & 1) y[t] = s[t];\nelse ((double*)s)[t / 2] = y[t] = 1;", RaceFault, {},
    ),
    "four numbers of which another writes the last": (
        f"{FOUR}{WHOLE}if (t < 16) ((four*)y)[t] = ((const four*)s)[t];\nelse if (t < 32) s[4 * t - 61] = 1;",
        RaceFault, {},
    ),
    "four numbers of which others read one each": (
        f"{FOUR}{WHOLE}for (int i = 0; i < 2; i++) {{\n__syncthreads();\n"
        "if (t < 16) ((four*)s)[t] = {1, 2, 3, 4};\n}\ny[t] = t % 4 ? s[t] : 1;", RaceFault, {},
    ),
    "a number of which half was written": (
        "__shared__ float s[64];\n((short*)s)[2 * t] = 1;\ny[t] = s[t];", UnsetFault, {},
    ),
    "four numbers of which one was not written": (
        f"{FOUR}alignas(16) __shared__ float s[64];\nif (t != 30) s[t] = 1;\n__syncthreads();\n"
        "if (t < 16) ((four*)y)[t] = ((const four*)s)[t];", UnsetFault, {},
    ),
    "a product of 32 bits": ("const int at = n * 1000000;\ny[t] = at;", ArithmeticFault, {"n": 5000}),
    "a division by zero": ("y[t] = 5 / (n - 64);", ArithmeticFault, {}),
    "a misaligned vector": (
        "struct alignas(16) four { float x, y, z, w; };\ny[t] = ((const four*)(x + 1))->x;", ArithmeticFault, {},
    ),
    "an endless loop": ("volatile int more = 1;\nwhile (more) {\n}\ny[t] = 1;", TimeFault, {"seconds": 1}),
    "a stack that overflows": ("volatile float s[100000];\ns[n] = 1;\ns[0] = 1;\ny[t] = s[n];", BoundsFault, {}),
    "no block": ("y[t] = 1;", LaunchFault, {"blocks": 0}),
    "too many threads": ("y[t] = 1;", LaunchFault, {"threads": 1025}),
}  # fmt: skip


def kernel(body, check=True):
    text = 'extern "C" __global__ void kernel(float* y, const float* x, int n) {\nconst int t = threadIdx.x;\n'
    return cudaemu.source(f"{text}{body}\n}}\n", "kernel", check=check)


def launch(body, check=True, blocks=1, threads=64, n=64, **options):
    y, x = np.zeros(64, np.float32), np.arange(64, dtype=np.float32)
    x.flags.writeable = False
    kernel(body, check)(blocks, threads, (y, x, np.int32(n)), check=check, **options)
    return y


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name):
    body, fault, options = FAULTS[name]
    with pytest.raises(fault):
        launch(body, **options)


def test_a_fault_says_where():
    with pytest.raises(BoundsFault, match=r"read outside global memory, byte 256 at line 4 \[block \(0, 0, 0\), "):
        launch("y[t] = 1;\ny[t] = x[t + 1];")
    with pytest.raises(BarrierFault, match=r"divergent barrier: 32 at a barrier \(line 4\), 32 at .*\(line 6\)"):
        launch(FAULTS["two barriers in two branches"][0])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_kernels_that_are_right_pass_in_every_order(check, order):
    x = np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(launch(SWAP, check, order=order), x[::-1])
    np.testing.assert_array_equal(launch(LOOP, check, order=order), 3 * x[::-1])
    np.testing.assert_array_equal(launch(SHUFFLE, check, order=order), x.astype(int) ^ 1)
    np.testing.assert_array_equal(launch(LANES, check, order=order), x.astype(int) ^ 5)
    np.testing.assert_array_equal(launch(f"{LANES}\n__syncwarp();\ns[t] = 1;", check, order=order), x.astype(int) ^ 5)
    up = "y[t] = __shfl_up_sync(0xffffffffu, x[t], 4) + __shfl_sync(0xffffffffu, x[t], 3);"
    fours = f"{FOUR}{WHOLE}if (t < 16) ((four*)s)[t] = ((const four*)s)[t];\n__syncthreads();\n"
    found = launch(f"{fours}if (t % 4 == 0) s[t] = 5;\ny[t] = s[t];", check, order=order)
    np.testing.assert_array_equal(found, np.where(x % 4, x, 5))
    twice = launch(f"{FOUR}{PARTS}", check, order=order)
    np.testing.assert_array_equal(twice, x[::-1] + np.repeat(x[::-1][::4], 4))
    lanes = np.arange(64) % 32
    np.testing.assert_array_equal(launch(up, check, order=order), x - 4 * (lanes >= 4) + x - lanes + 3)


def test_without_checks_the_order_of_threads_shows_a_missing_barrier():
    body = SWAP.replace("__syncthreads();", "")
    forward, reverse = (launch(body, False, order=order) for order in ("forward", "reverse"))
    assert np.isnan(forward).any() and np.isnan(reverse).any() and not np.array_equal(forward, reverse, equal_nan=True)


def test_a_fault_does_not_harm_the_next_launch():
    with pytest.raises(RaceFault):
        launch(FAULTS["two threads write one number"][0])
    np.testing.assert_array_equal(launch(SWAP), np.arange(64)[::-1])


@pytest.mark.parametrize("flush", [True, False])
def test_denormal_numbers_are_zero_where_the_compiler_is_told_so(flush):
    text = 'extern "C" __global__ void kernel(float* y, const float* x) { y[0] = x[0] * 0.5f; }'
    y, x = np.ones(1, np.float32), np.array([1.2e-38], np.float32)
    cudaemu.source(text, "kernel", flush=flush)(1, 1, (y, x))
    assert (y[0] == 0) == flush


@pytest.mark.parametrize("type_", ["int", "long long"])
def test_offsets_of_32_bits_are_caught_in_arrays_that_do_not_exist(type_):
    text = f"""extern "C" __global__ void kernel(float* y) {{
        const {type_} at = ({type_})blockIdx.x * 64 + threadIdx.x;
        y[at] = 1;
    }}"""
    y = cudaemu.virtual((40_000_000, 64), np.float32)  # 10 GB, of which a page is touched
    run = cudaemu.source(text, "kernel")
    last = (len(y) - 1, len(y))
    if type_ == "int":
        with pytest.raises(ArithmeticFault, match="integer overflow in a product"):
            run(len(y), 64, (y,), blocks=last)
    else:
        run(len(y), 64, (y,), blocks=last)
        assert y[-1].all() and not y[-2].any()


# ---- the route of Numba: the same sentences about PTX ----------------------------------------------------------------


@pytest.fixture
def cuda():
    from numba import cuda

    return cuda


by_numba = needed(cudaemu.numba_cuda())


def numba_launch(function, blocks=1, threads=64, x=None, **options):
    from cudaemu.machines import ptx_of
    from cudaemu.ptx import flatten
    from numba import float32, void

    y, x = np.zeros(64, np.float32), np.arange(64, dtype=np.float32) if x is None else x
    run = cudaemu.ptx(ptx_of(function, void(float32[::1], float32[::1])))
    run(blocks, threads, flatten((y, x)), **options)
    return y


@by_numba
def test_a_kernel_of_numba_runs(cuda):
    from numba import float32

    def swap(y, x):
        s = cuda.shared.array(64, float32)
        t = cuda.threadIdx.x
        s[t] = x[t]
        cuda.syncthreads()
        y[t] = s[63 - t] + cuda.shfl_xor_sync(0xFFFFFFFF, x[t], 1)

    x = np.arange(64)
    for order in ("forward", "reverse", "random"):
        np.testing.assert_array_equal(numba_launch(swap, order=order), x[::-1] + (x ^ 1))


@by_numba
def test_a_function_is_compiled_once_for_all_processes_and_none_is_taken_for_another(cuda, monkeypatch):
    from cudaemu import machines
    from numba import float32, void

    def times(number):
        @cuda.jit(device=True)
        def grown(x):
            return x * number

        def kernel(y, x):
            y[cuda.threadIdx.x] = grown(x[cuda.threadIdx.x])

        return kernel

    signature = void(float32[::1], float32[::1])
    first = {number: machines.ptx_of(times(number), signature) for number in (3, 5)}
    assert first[3] != first[5]
    assert ".target sm_100" in machines.ptx_of(times(3), signature, (10, 0))
    monkeypatch.setattr(machines, "compiled", None)
    assert {number: machines.ptx_of(times(number), signature) for number in (3, 5)} == first
    with pytest.raises(TypeError):
        machines.ptx_of(times(7), signature)


@by_numba
def test_functions_differ_by_options_of_what_they_call_and_by_what_is_global(cuda, monkeypatch):
    from cudaemu.machines import fingerprint

    def reciprocal(x):
        return FACTOR / x

    def calling(**options):
        called = cuda.jit(device=True, **options)(reciprocal)
        return fingerprint(lambda y, x: called(x[0]))

    exact, fast = calling(), calling(fastmath=True)
    assert exact == calling() != fast
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert calling() != exact


@by_numba
def test_faults_of_kernels_of_numba_are_caught_with_their_line(cuda):
    from numba import float32

    def no_barrier(y, x):
        s = cuda.shared.array(64, float32)
        s[cuda.threadIdx.x] = x[cuda.threadIdx.x]
        y[cuda.threadIdx.x] = s[63 - cuda.threadIdx.x]

    def too_far(y, x):
        y[cuda.grid(1)] = x[cuda.grid(1)]

    def colliding(y, x):
        y[cuda.threadIdx.x // 2] = x[cuda.threadIdx.x]

    def divergent(y, x):
        if cuda.threadIdx.x < 40:
            cuda.syncthreads()
        y[cuda.threadIdx.x] = x[cuda.threadIdx.x]

    line = no_barrier.__code__.co_firstlineno
    with pytest.raises((RaceFault, UnsetFault), match=f"at line {line + 3} "):
        numba_launch(no_barrier)
    with pytest.raises(BoundsFault, match="read outside global memory"):
        numba_launch(too_far, blocks=2)
    with pytest.raises(RaceFault, match="write-write race in global memory"):
        numba_launch(colliding)
    with pytest.raises(RaceFault, match="between|race"):
        numba_launch(colliding, blocks=2)
    with pytest.raises(BarrierFault, match="divergent barrier"):
        numba_launch(divergent)


@by_numba
def test_the_functions_of_numba_are_those_of_the_c_library(cuda):
    def functions(y, x):
        i = cuda.threadIdx.x
        a = x[i] - 20
        y[i] = math.exp(a) + math.cos(a) * math.sin(100000 * a) + math.sqrt(x[i]) + abs(a) + min(a, 3) + a // 3

    x = np.arange(64, dtype=np.float64)
    a = x - 20
    wanted = np.exp(a) + np.cos(a) * np.sin(100000 * a) + np.sqrt(x) + abs(a) + np.minimum(a, 3) + a // 3
    np.testing.assert_allclose(numba_launch(functions), wanted, rtol=3e-7, atol=2e-6)


@by_numba
def test_what_the_translation_does_not_know_is_refused_by_name(cuda):
    def atomic(y, x):
        cuda.atomic.add(y, 0, x[cuda.threadIdx.x])

    with pytest.raises(NotImplementedError, match="no PTX instruction (atom|red)"):
        numba_launch(atomic)


@by_numba
def test_exponentials_of_numba_end_at_zero_and_at_infinity(cuda):
    def exponentials(y, x):
        y[cuda.threadIdx.x] = math.exp(x[cuda.threadIdx.x])

    x = np.array([-np.inf, -1e30, -1e3, -104, -90, -1, 0, 1, 80, 100, np.inf, np.nan] + [0] * 52, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_allclose(numba_launch(exponentials, x=x), np.exp(x), rtol=1e-6)
