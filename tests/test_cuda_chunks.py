"""The chunked kernels of the ``cupy`` backend, executed on the CPU: what they promise, what only chunks can break."""

import re
from functools import partial

import cudaemu
import numpy as np
import pytest
import test_cuda_kernels as kernels
import test_operators as sentences
from cudaemu import BoundsFault, RaceFault, UnsetFault, needed, switched
from cudaemu.machines import on_cpu
from test_operators import Case

import ttr_np
from cuda_kernels.cupy_raw import _tiles
from ttr_np import notation
from ttr_np.notation import draw

pytestmark = [needed(cudaemu.missing()), pytest.mark.filterwarnings("ignore:overflow encountered")]


class Chunked(Case):
    """A case in single precision: the double one has no chunks."""

    __slots__ = ()

    def draw(self, seed=0, lead=(2,), dtype=np.float32, **sizes):
        return super().draw(seed, lead, dtype, **sizes)


CASES = [
    Chunked("linear_attention", "cupy", (), False, {"scale": 0.3}),
    Chunked("linear_attention", "cupy", ("log_decay",), False, {"scale": 0.3}),
    Chunked("linear_attention", "cupy", ("log_decay",), True, {"scale": 0.3}),
    Chunked("linear_attention", "cupy", ("log_decay", "bonus"), True, {"scale": 0.3}),
    Chunked("linear_attention", "cupy", ("log_decay", "bonus"), False, {"normalize": True}),
    Chunked("linear_attention", "cupy", ("log_decay",), True, {"normalize": True}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def from_one_token(monkeypatch):
    """Chunks for sequences of any length, and the rounding of single precision."""
    monkeypatch.setattr(_tiles, "CHUNKED_FROM", 1)
    monkeypatch.setattr(sentences, "tolerance", lambda case: 3e-6)
    close = sentences.close
    monkeypatch.setattr(sentences, "close", lambda actual, wanted, tol=3e-6: close(actual, wanted, tol))


# ---- what holds for every operator -----------------------------------------------------------------------------------

OF_DTYPES = ("dtype", "halves", "rounded", "integers", "lists")  # about double precision, or the bits of float32
SENTENCES = [
    *(s for s in kernels.SENTENCES if not any(word in kernels.title(s) for word in OF_DTYPES)),
    sentences.test_the_future_changes_no_bit_of_the_past,
    *(partial(sentences.test_a_full_reset_costs_the_gates_after_it_nothing, gate=g) for g in (-np.inf, -1e30, -1e4)),
]


@every_case
@pytest.mark.parametrize("sentence", SENTENCES, ids=kernels.title)
def test_chunks_keep_the_word_of_the_operators(case, sentence):
    if "reset" in kernels.title(sentence) and "log_decay" not in case.optional:
        return
    with on_cpu("cupy", check=False) as machine:
        sentence(case)
    assert "linear_attention" not in machine.launches


@every_case
def test_a_full_reset_forgets_even_a_bad_number(case):
    if "log_decay" in case.optional:
        with on_cpu("cupy", check=False) as machine:
            kernels.test_a_full_reset_forgets_even_a_bad_number(case, machine)


# ---- chunks and solvers ----------------------------------------------------------------------------------------------

GATES = {"none": ((), False), "step": (("log_decay",), False), "channel": (("log_decay",), True)}
FORMATS = ("bfloat16", "float16", "float32")
# k and v, and tokens around the borders of blocks and chunks
HURTING = [
    ("bfloat16", "none", 59, 33, (1, 63, 65)),
    ("bfloat16", "step", 1, 1, (15, 17, 131)),
    ("bfloat16", "step", 128, 130, (70,)),
    ("bfloat16", "channel", 40, 17, (16, 31, 33, 97)),
    ("bfloat16", "channel", 256, 130, (40,)),  # channels for each warp twice
    ("float16", "channel", 16, 130, (33,)),  # and for one warp of eight
    ("float16", "none", 16, 5, (2, 33)),
    ("float16", "step", 111, 1, (32, 65)),
    ("float16", "channel", 3, 40, (64, 67)),
    ("float32", "none", 130, 3, (17, 33)),
    ("float32", "step", 40, 80, (1, 64, 65)),
    ("float32", "channel", 59, 33, (31, 97)),
    ("float32", "channel", 256, 16, (18,)),
]


def dtype_of(name):
    return np.dtype(name) if name == "float32" else sentences.half(name)


def drawn(operator, variants, name, variant, seed=0, lead=(2,), **sizes):
    """Data of a type, gates of single precision, and a state to begin with."""
    optional, per_channel = variants[variant]
    rng = np.random.default_rng(seed)
    arrays = draw(operator, rng, optional=optional, per_channel=per_channel, lead=lead, **sizes)
    arrays = {n: x.astype(np.float32 if n in notation.GATES else dtype_of(name)) for n, x in arrays.items()}
    state = rng.standard_normal((*lead, sizes.get("k", 5), sizes.get("v", 3))).astype(np.float32)
    return arrays, {"initial_state": state, "output_final_state": True, "scale": 0.5}


def recalled(operator, arrays, options, backend="numpy", dtype=None):
    """Answers and state, in double precision."""
    given = {n: x if dtype is None else x.astype(dtype) for n, x in arrays.items()}
    o, state = getattr(ttr_np, operator)(**given, **options, backend=backend)
    return o.astype(np.float64), state.S.astype(np.float64)


def off_by_one(arrays):
    """The same numbers, one place beyond where a vector may begin."""
    moved = {}
    for n, x in arrays.items():
        moved[n] = np.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
        moved[n][...] = x
    return moved


inputs, attend = partial(drawn, "linear_attention", GATES), partial(recalled, "linear_attention")


def distance(x, exact):
    return np.max(np.abs(x - exact))


@pytest.mark.parametrize("name, gate, k, v, lengths", HURTING)
def test_chunks_are_as_good_as_the_solver(name, gate, k, v, lengths):
    for t in lengths:
        arrays, options = inputs(name, gate, seed=t, t=t, k=k, v=v)
        exact, plain = attend(arrays, options, dtype=np.float64), attend(arrays, options)
        with on_cpu("cupy") as machine:
            found = attend(arrays, options, "cupy")
        assert machine.launches == ["linear_attention_chunks"]
        eps = np.finfo(np.float32).eps
        scale = [np.max(np.abs(x)) for x in exact]
        assert distance(found[0], exact[0]) <= max(2 * distance(plain[0], exact[0]), 4 * eps * scale[0])
        # The state of 16-bit data is made of what is computed in 16 bits of the fraction: see _tiles.SUM_TERMS.
        floor = 4 * eps if name == "float32" else 2**-16
        assert distance(found[1], exact[1]) <= max(2 * distance(plain[1], exact[1]), floor * scale[1])


@pytest.mark.parametrize("gate", ["none", "channel"])
def test_many_pieces_are_one_sequence(gate, monkeypatch):
    monkeypatch.setattr(_tiles, "MOST", 1)  # block on a multiprocessor
    arrays, options = inputs("float32", gate, lead=(1,), t=32 * 12 + 5, k=16, v=3)
    whole = attend(arrays, options, dtype=np.float64)
    for multiprocessors, launches in ((1, 1), (2, 2), (100, 2)):
        with on_cpu("cupy") as machine:
            machine.multiprocessors = multiprocessors
            found = attend(arrays, options, "cupy")
        assert len(machine.launches) == launches
        for x, y in zip(found, whole, strict=True):
            assert distance(x, y) <= 3e-6 * np.max(np.abs(y))


@pytest.mark.parametrize("gate, normalize", [("step", False), ("channel", True)])
def test_what_an_early_piece_spoils_a_gate_may_forget(gate, normalize):
    arrays, _ = inputs("float32", gate, lead=(1,), t=300, k=16, v=3)
    arrays = {n: np.abs(x) if n in "qk" else x for n, x in arrays.items()}
    for name, bad_gate in (("v", 60), ("v", 200), ("k", 60)):
        spoilt = {n: x.copy() for n, x in arrays.items()}
        spoilt[name][0, 40, 0] = np.nan
        spoilt["log_decay"][0, bad_gate] = -np.inf
        options = {"output_final_state": True, "normalize": normalize}
        exact = attend(spoilt, options, dtype=np.float64)
        with on_cpu("cupy", check=False) as machine:
            machine.multiprocessors = 3
            found = attend(spoilt, options, "cupy")
        assert len(machine.launches) == 2
        for x, y in zip(found, exact, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5 * np.nanmax(np.abs(y)), rtol=0)


@pytest.mark.parametrize("name, gate", [("bfloat16", "step"), ("float32", "channel")])
def test_the_order_of_threads_changes_no_bit(name, gate):
    arrays, options = inputs(name, gate, lead=(1,), t=513 if name == "bfloat16" else 257, k=40, v=17)
    found = []
    for order in ({}, {"order": "reverse"}, {"order": "random", "seed": 1}):
        with on_cpu("cupy", check=False, **order) as machine:
            machine.multiprocessors = 8
            found.append(attend(arrays, options, "cupy"))
        assert len(machine.launches) == 2
    for others in found[1:]:
        for x, y in zip(others, found[0], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name, gate", [("bfloat16", "step"), ("float32", "channel")])
def test_one_sequence_has_the_same_bits_alone_and_among_64(name, gate):
    arrays, _ = inputs(name, gate, lead=(64,), t=70)
    with on_cpu("cupy", check=False) as machine:
        machine.multiprocessors = 1  # pieces are for sequences that are alone
        among = attend(arrays, {"output_final_state": True}, "cupy")
        for i in (0, 63):
            alone = attend({n: x[i] for n, x in arrays.items()}, {"output_final_state": True}, "cupy")
            for x, y in zip(alone, among, strict=True):
                np.testing.assert_array_equal(x, y[i])


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_at_the_border_of_a_chunk_changes_no_bit(name):
    arrays, options = inputs(name, "step", t=150, k=16, v=3)
    with on_cpu("cupy", check=False):
        o, state = attend(arrays, options, "cupy")
        first, middle = attend({n: x[:, :64] for n, x in arrays.items()}, options, "cupy")
        options["initial_state"] = middle.astype(np.float32)
        second, end = attend({n: x[:, 64:] for n, x in arrays.items()}, options, "cupy")
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), o)
    np.testing.assert_array_equal(end, state)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gate", ["step", "channel"])
def test_rows_that_no_vector_can_read_give_the_same_bits(name, gate):
    arrays, options = inputs(name, gate, lead=(1,), t=40, k=16, v=16)
    with on_cpu("cupy"):
        for x, y in zip(attend(off_by_one(arrays), options, "cupy"), attend(arrays, options, "cupy"), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("axis", ["memory", "time"])
def test_strides_of_more_than_32_bits(axis):
    arrays, options = inputs("float32", "step", t=3)
    with on_cpu("cupy"):
        wanted = attend(arrays, options, "cupy")
        for n, x in arrays.items():
            far = kernels.far_apart(x, 1 if axis == "time" else 0)
            for y, z in zip(attend(arrays | {n: far}, options, "cupy"), wanted, strict=True):
                np.testing.assert_array_equal(y, z)


@pytest.mark.parametrize("shared", [99, 163, 227], ids="{} KB".format)
def test_what_is_chosen_fits_on_the_device(shared):
    for name in FORMATS:
        for gate in GATES:
            for k in (1, 16, 64, 128, 129, 192, 256):
                for v in (1, 16, 17, 64, 128, 500):
                    found = _tiles.tiles(dtype_of(name), 64, k, v, gate, shared * 1024)
                    case = (name, gate, k, v)
                    if found is None:
                        assert shared == 99 and case[:3] == ("float32", "channel", 256)
                        continue
                    assert found.shared + _tiles.STATIC <= shared * 1024, case
                    assert found.keys >= k and found.threads <= 256, case
                    shares = found.together * (found.shared + _tiles.STATIC + _tiles.RESERVED)
                    assert found.together >= 1 and shares <= shared * 1024 + _tiles.RESERVED, case
                    if shared == 227 and (name, k, v) == ("bfloat16", 128, 128):
                        assert found.together == 2, case  # one block alone leaves half of the time to nobody
    assert _tiles.tiles(np.float64, 64, 16, 16, "none", 10**6) is None
    assert _tiles.tiles(np.float32, 64, 257, 16, "none", 10**6) is None


@kernels.by_the_runner
@pytest.mark.parametrize("name, gate", [("bfloat16", "channel"), ("float32", "channel")])
def test_the_bytes_asked_for_are_those_the_text_uses(name, gate, monkeypatch):
    arrays, options = inputs(name, gate, lead=(1,), t=40, k=16, v=16)
    known = _tiles.bytes_of
    monkeypatch.setattr(_tiles, "bytes_of", lambda *sizes: known(*sizes) - 16)
    with on_cpu("cupy"), pytest.raises(BoundsFault):
        attend(arrays, options, "cupy")


def test_pieces_are_whole_chunks_and_no_more_than_pay():
    assert _tiles.pieces(32768, 64, 32, 132) == (4, 8192)
    assert _tiles.pieces(32768, 64, 256, 132) == (1, 32768)
    assert _tiles.pieces(1, 64, 1, 132) == (1, 64)
    for tokens in (65, 1000, 4097):
        count, length = _tiles.pieces(tokens, 64, 1, 132)
        assert length % 64 == 0 and (count - 1) * length < tokens <= count * length and count <= -(-length // 64) + 1


# ---- barriers and waits ----------------------------------------------------------------------------------------------

PLACES = r"__syncthreads\(\);|finish_copies<0>\(\);"
WAYS = [  # each with barriers of its own: terms with everything there is, and data as they come; both in pieces
    ("float32", "channel", True),
    ("bfloat16", "step", False),
]


def spoilt_call(name, gate, everything, monkeypatch):
    """A call that goes every way through the text: pieces, several chunks, and a token that is no number."""
    monkeypatch.setattr(_tiles, "CHUNK", 16 if name == "bfloat16" else 32)
    arrays, options = inputs(name, gate, lead=(1,), t=128 + 3, k=16, v=17)
    options = {"normalize": everything}
    if everything:
        arrays["bonus"] = np.ones(16, np.float32)
    arrays["v"][0, 70, 0] = np.nan
    return partial(ttr_np.linear_attention, **arrays, **options, output_final_state=True, backend="cupy")


@pytest.mark.slow
@kernels.by_the_runner
def test_each_barrier_and_each_wait_is_needed(monkeypatch):
    from cuda_kernels.cupy_raw import _linear_attention_chunks as chunks

    whole = chunks.KERNEL.text()
    places = [place.span() for place in re.finditer(PLACES, whole)]
    assert len(places) > 10
    monkeypatch.setattr(chunks.KERNEL, "text", lambda: switched(whole, PLACES))
    survivors = set(range(len(places)))
    for way in WAYS:
        call = spoilt_call(*way, monkeypatch)
        for number in sorted(survivors):
            with on_cpu("cupy", left_out=number) as machine:
                machine.multiprocessors = 3
                try:
                    call()
                except (RaceFault, UnsetFault):
                    survivors.remove(number)
    assert [whole[low - 200 : high + 60] for low, high in map(places.__getitem__, survivors)] == []
