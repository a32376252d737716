"""Every CUDA text compiles for every architecture, within its registers and without spilling; needs no GPU."""

from functools import cache

import cudaemu
import numpy as np
import pytest
from cudaemu import needed, nvrtc
from cudaemu.machines import on_cpu

import ttr_np
from cuda_kernels.cupy_raw import _tiles, softmax_attention
from ttr_np.backends import has_operator
from ttr_np.memories import MLP
from ttr_np.notation import OPERATORS, STATES, CacheState, draw

pytestmark = needed(nvrtc.missing())

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# PTX comes from two compilers: from 10.0 on NVVM is another one, which writes other code.
CAPABILITIES = [pytest.param((n, 0), id=f"numba-cuda {n}.0") for n in (9, 10)]
RESERVED = {"sm_80": 0, "sm_90a": 1024, "sm_100": 1024}  # bytes of each block's shared memory, for the system
# Operators of several launches, in double precision, whatever the data; see below.
SQUARES = ("recursive_least_squares", "mesa", "kernel_ridge", "test_time_training")
TEXTS = [operator for operator in OPERATORS if has_operator("cupy", operator) and operator not in SQUARES]
SIZES = {"k": 128, "v": 128, "d": 128, "n": 16, "w": 4}  # what layers have

# Registers of a thread, per architecture: with 128 threads in a block, 128 registers leave room for 4 blocks. The
# newest compiler loads all rows of a column ahead on sm_100, which has nothing else to do with them.
BUDGET = {
    "linear_attention": {"float": (96, 104, 192), "double": (128, 128, 255)},
    "delta_rule": {"float": (104, 104, 192), "double": (128, 128, 255)},
    "dplr": {"float": (128, 128, 255), "double": (128, 168, 255)},
    # Tokens are fetched ahead into registers: there are few threads, and they wait for memory.
    "selective_scan": {"float": (128, 128, 160), "double": (192, 192, 224)},
    "diagonal_scan": {"float": (104, 96, 112), "double": (144, 144, 152)},
    "short_convolution": {"float": (88, 88, 96), "double": (104, 104, 112)},
    # Two queries with gates: pairs of a cache are fetched ahead into registers, as above, for three blocks or two.
    "softmax_attention": {"float": (168, 160, 168), "double": (168, 168, 184)},
    "local_polynomial": {"float": (96, 96, 96), "double": (96, 96, 96)},  # a line by itself
}
# sin and cos keep the digits of a large angle on the stack, and a division of double precision is a call on sm_100.
STACK = {("diagonal_scan", "float"): 32, ("diagonal_scan", "double"): 40}

# Memories that keep their pairs have several kernels: a call of each, and its registers. Two or three blocks of tiles
# share a multiprocessor, whose shared memory has no room for more, so loads under way may have registers. On tensor
# cores a warp holds the answers of as many queries as it can, so that each key and value it loads serves more products.
TILES = {"t": 100, "k": 128, "v": 128}
GAUSSIAN = {"kernel": "gaussian", "bandwidth": 1.0}
KEPT = {
    "one query": ("softmax_attention", "bfloat16", TILES | {"t": 1}, {}, (128, 128, 128)),
    "eight queries": ("softmax_attention", "bfloat16", TILES | {"t": 8}, {}, (232, 240, 255)),
    "one query, any kernel": ("local_polynomial", "bfloat16", TILES | {"t": 1}, {"degree": 0}, (152, 160, 160)),
    "tiles": ("softmax_attention", "float", TILES, {}, (248, 255, 184)),
    "tiles in double precision": ("softmax_attention", "double", TILES, {}, (255, 255, 208)),
    "tiles with gates": ("softmax_attention", "float", TILES, {"log_decay": -0.1}, (224, 248, 255)),
    "tensor cores": ("softmax_attention", "bfloat16", TILES, {}, (255, 255, 255)),
    "tensor cores with gates": ("softmax_attention", "bfloat16", TILES, {"log_decay": -0.1}, (255, 255, 255)),
    "tensor cores, wide": ("softmax_attention", "float16", TILES | {"k": 256, "v": 256}, {}, (255, 255, 255)),
    "tensor cores, few queries": ("softmax_attention", "bfloat16", TILES | {"t": 64}, {}, (232, 232, 240)),
    "tensor cores, small heads": ("softmax_attention", "float16", TILES | {"k": 64, "v": 64}, {}, (248, 248, 255)),
    "any kernel": ("local_polynomial", "bfloat16", TILES, {"degree": 0, "log_decay": -0.1}, (248, 240, 240)),
    "lines": ("local_polynomial", "bfloat16", TILES | {"k": 64, "v": 64}, GAUSSIAN, (240, 240, 240)),
    "lines in floats": ("local_polynomial", "bfloat16", TILES | {"k": 64, "v": 64}, {}, (255, 255, 255)),
    "lines left over": ("local_polynomial", "bfloat16", TILES | {"k": 64, "v": 64}, {}, (240, 240, 240)),
    "lines of many channels": ("local_polynomial", "float", TILES, {"log_decay": -0.1}, (255, 255, 255)),
    "fits": ("local_polynomial", "float", TILES | {"k": 8}, {"degree": 2, "log_decay": -0.1}, (128, 112, 112)),
}

# Four warps hold the moments of 128 channels in double precision; where the arrays are waits on the stack.
KEPT_STACK = {
    "tiles in double precision": (16, 16, 16),
    "lines of many channels": (48, 112, 16),
}


def text_of(operator, dtype, **options):
    """What a call would compile: the CPU takes the launch and does nothing."""
    texts = []
    if operator == "local_polynomial":
        options |= {"kernel": "triweight", "bandwidth": 1.0}  # the others are lines that share their keys, see KEPT
    every = {"optional": OPERATORS[operator].optional, "per_channel": STATES[operator] is not CacheState}
    arrays = draw(operator, np.random.default_rng(0), **every, t=2, dtype=dtype, **SIZES)
    with on_cpu("cupy") as machine:
        machine.run = lambda text, *rest: texts.append(text)
        getattr(ttr_np, operator)(**arrays, **options, backend="cupy")
    return texts[0]


MEMORY = {"memory": MLP(layer_norm=True, residual=True)}
LAUNCHED = [("recursive_least_squares", {}), ("kernel_ridge", {}), ("test_time_training", MEMORY)]
LAUNCHED += [("mesa", {"solver": solver}) for solver in ("exact", "cg", "chebyshev")]
# Registers of a thread and bytes of its stack, per architecture. Roots, divisions and exponentials of double precision
# are calls, for which some registers are put aside; nothing else is. A chunk of least squares holds the sums of eight
# tokens, and the newest compiler loads rows of a column ahead, as above.
SQUARE_BUDGET = {
    "recursive_least_squares": ((255, 255, 128), 0),
    "innovations": ((128, 128, 255), 0),
    "gram": ((128, 128, 192), 0),
    "recall": ((128, 128, 255), 0),
    "mesa_exact": ((64, 64, 64), 96),
    "mesa_cg": ((80, 80, 80), 64),
    "mesa_chebyshev": ((104, 104, 128), 96),
    "kernel_ridge": ((64, 64, 64), 0),
    "kernel_answers": ((80, 80, 80), 0),
    "test_time_training": ((104, 104, 104), 64),
}


def launched(backend, operator, options, data, keep, t=20):
    """What the launches of one call would compile."""
    found = {}
    arrays = draw(
        operator, np.random.default_rng(0), optional=OPERATORS[operator].optional, t=t, dtype=data, per_channel=False,
        **SIZES,
    )  # fmt: skip
    with on_cpu(backend) as machine:
        machine.run = lambda *launch: found.update([keep(*launch)])
        getattr(ttr_np, operator)(**arrays, **options, backend=backend)
    return found


code_of = cache(nvrtc.machine_code)  # the solvers of mesa share two of their launches


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=pytest.mark.slow if a != "sm_90a" else ()) for a in ARCHITECTURES]
)
@pytest.mark.parametrize("operator, options", LAUNCHED, ids=lambda x: str(x)[:30])
def test_texts_of_least_squares_compile_within_their_budget(operator, options, architecture):
    data = formats()["bfloat16"]  # all between loads and stores is in double precision, whatever the data
    for name, text in launched("cupy", operator, options, data, lambda text, name, *_: (name, text)).items():
        found, (registers, stack) = nvrtc.needs(code_of(text, architecture)), SQUARE_BUDGET[name]
        assert found.registers <= registers[ARCHITECTURES.index(architecture)], name
        assert found.stack <= stack and found.shared <= 48 * 1024, name


# In chunks a thread has 64 numbers of the solution, all of them 16 x 128 numbers of 64 bits; what does not fit beside
# them is addresses. In single precision what does not fit are counters, and two of those numbers for a moment.
CHUNKED = [("recursive_least_squares", {}), ("mesa", {"solver": "exact"}), ("mesa", {"solver": "cg"})]
CHUNK_STACK = {
    "pair_sums": (40, 24, 40),
    "recursive_least_squares_chunks": (368, 328, 56),
    "mesa_chunks": (0, 0, 0),
    "recall_chunks": (24, 144, 0),
    "least_squares_begin": (0, 0, 0),
    "recursive_least_squares_tensor": (48, 40, 56),
}


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=pytest.mark.slow if a != "sm_90a" else ()) for a in ARCHITECTURES]
)
@pytest.mark.parametrize("operator, options", CHUNKED, ids=lambda x: str(x)[:30])
def test_chunks_of_least_squares_compile_within_their_budget(operator, options, architecture):
    within_their_budget(launched("cupy", operator, options, np.float32, text_and_room, t=1200), architecture)


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=pytest.mark.slow if a != "sm_90a" else ()) for a in ARCHITECTURES]
)
def test_least_squares_of_16_bits_compile_within_their_budget(architecture):
    texts = launched("cupy", "recursive_least_squares", {}, formats()["bfloat16"], text_and_room, t=1200)
    new = {name: texts[name] for name in ("least_squares_begin", "recursive_least_squares_tensor")}
    within_their_budget(new, architecture)


# Kilobytes of machine code for sm_90a. The first call waits until all is compiled, for a second or two per 100 of them,
# so what is done once is not laid out for registers, and rare ways are not there twice.
CODE = {
    "pair_sums": 62,
    "recursive_least_squares_chunks": 215,
    "mesa_chunks": 145,
    "recall_chunks": 108,
    "least_squares_begin": 57,
    "recursive_least_squares_tensor": 158,
    "mesa_sums": 48,
    "mesa_tensor": 138,
    "mesa_recall": 95,
    "local_lines_tensor": 126,
}


def text_and_room(text, name, *rest):
    """What a launch compiles, and the shared memory that it asks for."""
    return name, (text, rest[-1])


def within_their_budget(texts, architecture):
    """No more stack than is written down, and no more shared memory than there is."""
    for name, (text, asked) in texts.items():
        found = nvrtc.needs(code_of(text, architecture))
        assert found.stack <= CHUNK_STACK[name][ARCHITECTURES.index(architecture)], name
        assert architecture != "sm_90a" or found.code <= 1000 * CODE[name], name
        assert found.shared + asked <= 227 * 1024 + RESERVED[architecture], name


# In products of bfloat16 a thread has three vectors of 16 tokens in registers, 192 numbers, for two blocks that share a
# multiprocessor. What a chunk needs once waits on the stack, nothing of a step does.
TENSOR_STACK = {
    "mesa_sums": (0, 0, 0),
    "mesa_tensor": (32, 32, 8),
    "mesa_chunks": (0, 0, 0),  # of what is left
    "mesa_recall": (8, 8, 16),
}


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=pytest.mark.slow if a != "sm_90a" else ()) for a in ARCHITECTURES]
)
def test_mesa_in_products_of_bfloat16_compiles_within_its_budget(architecture):
    def keep(text, name, *rest):
        return name, (text, rest[-1])

    data, number = formats()["bfloat16"], ARCHITECTURES.index(architecture)
    texts = launched("cupy", "mesa", {"solver": "cg"}, data, keep, t=1200)
    assert set(texts) == set(TENSOR_STACK)
    for name, (text, asked) in texts.items():
        found = nvrtc.needs(code_of(text, architecture))
        assert found.stack <= TENSOR_STACK[name][number], name
        assert architecture != "sm_90a" or found.code <= 1000 * CODE[name], name
        together = 1 if name == "mesa_chunks" or architecture == "sm_80" else 2  # whose shared memory is smaller
        assert together * (found.shared - RESERVED[architecture] + asked + 1024) <= 228 * 1024, name


@pytest.mark.parametrize("operator, options", LAUNCHED[:1] + LAUNCHED[3:], ids=lambda x: str(x)[:30])
def test_the_largest_keys_of_least_squares_fit(operator, options):
    arrays = draw(operator, np.random.default_rng(0), t=20, k=512, v=1)
    with on_cpu("cupy") as machine:
        texts = []
        machine.run = lambda text, *rest: texts.append(text)
        getattr(ttr_np, operator)(**arrays, **options, backend="cupy")
    for text in texts:
        assert nvrtc.needs(code_of(text, "sm_80")).shared <= 48 * 1024


@pytest.mark.slow
@needed(cudaemu.numba_cuda())
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("operator, options", LAUNCHED, ids=lambda x: str(x)[:30])
def test_functions_of_least_squares_compile(operator, options, capability):
    from cudaemu import machines

    def keep(function, signature, *_):
        return function.__name__, machines.ptx_of(function, signature, capability)

    for name, text in launched("numba-cuda", operator, options, np.float32, keep).items():
        assert ".local" not in text, name


def formats():
    """Of data; the state is never narrower than float."""
    half = pytest.importorskip("ml_dtypes").bfloat16
    return {"bfloat16": half, "float16": np.float16, "float": np.float32, "double": np.float64}


def test_every_text_has_a_budget():
    assert set(BUDGET) == set(TEXTS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("data", ["bfloat16", "float", "double"])
@pytest.mark.parametrize("operator", TEXTS)
def test_a_text_compiles_within_its_budget(operator, data, architecture):
    real = "double" if data == "double" else "float"
    found = nvrtc.needs(nvrtc.machine_code(text_of(operator, formats()[data]), architecture))
    assert found.registers <= BUDGET[operator][real][ARCHITECTURES.index(architecture)]
    assert found.stack <= STACK.get((operator, real), 0)
    assert found.shared <= 48 * 1024


# Chunks have the state of 16 columns per warp in registers. With data of 16 bits two blocks of 256 threads share a
# multiprocessor, so a thread has 128; a few numbers that a part of the loop does not need wait on the stack, more on
# sm_100, where the compiler loads further ahead. By data, gate and whether it is the first of two launches: registers,
# and bytes of the stack.
CHUNKS = {
    ("bfloat16", "none", False): ((128, 8), (128, 0), (128, 24)),
    ("bfloat16", "none", True): ((96, 0), (96, 0), (128, 0)),
    ("bfloat16", "step", False): ((128, 0), (128, 0), (128, 24)),
    ("bfloat16", "step", True): ((120, 0), (120, 0), (128, 0)),
    ("bfloat16", "channel", False): ((128, 16), (128, 16), (128, 72)),
    ("bfloat16", "channel", True): ((112, 0), (112, 0), (128, 8)),
    ("float", "channel", False): ((184, 0), (192, 0), (255, 0)),
}


def chunk_texts(data, gate):
    """The texts of both launches of a call."""
    sizes = {"t": 4096, "k": 128, "v": 128}
    per_channel = gate == "channel"
    optional = () if gate == "none" else ("log_decay",)
    arrays = draw("linear_attention", np.random.default_rng(0), optional=optional, per_channel=per_channel, **sizes)
    arrays = {name: x.astype(np.float32 if name == "log_decay" else formats()[data]) for name, x in arrays.items()}
    texts = []
    with on_cpu("cupy") as machine:
        machine.run = lambda text, *rest: texts.append(text)
        ttr_np.linear_attention(**arrays, backend="cupy")
    return texts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("data, gate, first", CHUNKS)
def test_chunks_compile_within_their_budget(data, gate, first, architecture):
    text = chunk_texts(data, gate)[0 if first else 1]
    found = nvrtc.needs(nvrtc.machine_code(text, architecture))
    registers, stack = CHUNKS[data, gate, first][ARCHITECTURES.index(architecture)]
    assert found.registers <= registers and found.stack <= stack
    assert found.shared - RESERVED[architecture] <= _tiles.STATIC


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if name == "sm_90a" else pytest.mark.slow) for name in ARCHITECTURES]
)
@pytest.mark.parametrize("name", KEPT)
def test_each_way_of_a_memory_that_keeps_its_pairs(name, architecture):
    operator, data, sizes, options, registers = KEPT[name]
    arrays = draw(operator, np.random.default_rng(0), dtype=formats()[data], **sizes)
    texts, number = [], ARCHITECTURES.index(architecture)
    with on_cpu("cupy") as machine:
        machine.run = lambda text, name, blocks, threads, arguments, shared: texts.append((text, shared))
        getattr(ttr_np, operator)(**arrays, **options, backend="cupy")
    text, asked = texts[-1 if name == "lines left over" else 0]
    found = nvrtc.needs(nvrtc.machine_code(text, architecture))
    assert name != "lines in floats" or architecture != "sm_90a" or found.code <= 1000 * CODE["local_lines_tensor"]
    assert found.registers <= registers[number]
    assert found.stack <= KEPT_STACK.get(name, (0, 0, 0))[number]
    declared = softmax_attention.STATIC if name.startswith("tensor cores") else 48 * 1024
    assert found.shared - RESERVED[architecture] <= min(declared, 227 * 1024 - asked)


@pytest.mark.parametrize("operator", TEXTS)
def test_float16_and_the_normaliser_compile(operator):
    options = {"normalize": True} if operator == "linear_attention" else {}
    found = nvrtc.needs(nvrtc.machine_code(text_of(operator, np.float16, **options), "sm_90a"))
    assert found.stack <= STACK.get((operator, "float"), 0)


def test_the_largest_state_fits():
    arrays = draw("dplr", np.random.default_rng(0), optional=("log_decay",), t=2, k=512, v=1)
    texts = []
    with on_cpu("cupy") as machine:
        machine.run = lambda text, *rest: texts.append(text)
        ttr_np.dplr(**arrays, backend="cupy")
    found = nvrtc.needs(nvrtc.machine_code(texts[0], "sm_80"))
    assert found.shared == 5 * 2 * 512 * 8 and found.stack == 0


def test_what_does_not_fit_in_registers_is_seen():
    text = """extern "C" __global__ void kernel(float* x, const int* at) {
        float many[200];
        for (int i = 0; i < 200; i++) many[i] = x[i * at[i]];
        for (int i = 0; i < 200; i++) x[i] = many[at[i]];
    }"""
    assert nvrtc.needs(nvrtc.machine_code(text, "sm_90a")).stack >= 800


def test_a_text_that_does_not_compile_says_where():
    with pytest.raises(RuntimeError, match=r"kernel.cu\(1\): error"):
        nvrtc.machine_code('extern "C" __global__ void kernel() { x = 1; }', "sm_90a")


@needed(cudaemu.numba_cuda())
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_functions_of_numba_compile_with_their_state_in_registers(capability):
    from cudaemu import machines

    for operator in TEXTS:
        if STATES[operator] is CacheState and capability != (9, 0):
            continue  # seconds each
        arrays = draw(operator, np.random.default_rng(0), t=2, dtype=np.float32, **SIZES)
        with on_cpu("numba-cuda") as machine:
            texts = []
            machine.run = lambda function, signature, *rest, texts=texts: texts.append(
                machines.ptx_of(function, signature, capability)
            )
            getattr(ttr_np, operator)(**arrays, backend="numba-cuda")
        assert f".target sm_{capability[0]}{capability[1]}" in texts[0]
        if operator != "diagonal_scan":  # the digits of a large angle, as above
            assert ".local" not in texts[0], operator
