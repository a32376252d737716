"""`Memory`: any layer as an object, in pieces, on disk, merged; what goes wrong changes nothing."""

from __future__ import annotations

import copy
import doctest
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_layers import BY_DEFINITION, IMPOSSIBLE, NAMES, all_gates, cut_gate, inputs

import ttr_np
from ttr_np.memory import arrays_in
from ttr_np.merging import why_not

Memory = ttr_np.Memory
CUTS = [(0, 1), (1, 1), (1, 9), (9, 17)]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
OWN_TOKEN = {
    "cosformer": "a query by itself stands one position later",
    "rwkv4": "its answer adds a bonus for the pair of its own token",
    "rwkv5": "its answer adds a bonus for the pair of its own token",
    "rwkv6": "its answer adds a bonus for the pair of its own token",
    "stick_breaking": "its answer leaves out the pair of its own token",
    "comba": "its query gives up a share of the key of its own token",
}


@pytest.fixture(autouse=True)
def solvers(request):
    """What is tested is the object; compiling kernels would take longer than all of it."""
    ttr_np.set_backend(None if request.node.get_closest_marker("slow") else "numpy")


def pairs_of(layer, data):
    return [x for name, x in zip(layer.data, data, strict=True) if name != "q"]


def queries_of(layer, data):
    return [x for name, x in zip(layer.data, data, strict=True) if name in "qx"]


def rows(data, low, high):
    return [x[..., low:high, :] for x in data]


def drawn(name, seed=0, t=17):
    layer = ttr_np.layers[name]
    return layer, inputs(layer, np.random.default_rng(seed), t)


def same(a, b):
    """Whether two states are the same to the bit."""
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(arrays_in(a), arrays_in(b), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_any_length_are_one_pass(name):
    layer, data = drawn(name)
    memory, written = Memory(name), Memory(name)
    o = np.concatenate([memory.step(*rows(data, *cut)) for cut in CUTS])
    np.testing.assert_allclose(o, layer(*data), **CLOSE)
    for cut in CUTS:
        written.memorize(*rows(pairs_of(layer, data), *cut))
    asked = queries_of(layer, data)
    np.testing.assert_allclose(written.recall(*asked), memory.recall(*asked), **CLOSE)
    assert (name in OWN_TOKEN) != np.allclose(memory.recall(*asked)[-1], o[-1], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_recall_changes_nothing_and_the_memory_is_its_own(name):
    layer, data = drawn(name)
    given = [x.copy() for x in data]
    memory = Memory(name)
    memory.step(*given)
    before, answers = memory.state, memory.recall(*queries_of(layer, data))
    for x in given:
        x[...] = 7.0  # the caller's arrays are his to overwrite
    memory.recall(*queries_of(layer, given))
    assert same(memory.state, before)
    assert np.array_equal(memory.recall(*queries_of(layer, data)), answers)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_value_freezes_the_memory(name):
    layer, data = drawn(name)
    mask = np.ones(17, bool)
    mask[[2, 3, 11]] = False
    gappy = [np.where(mask[:, None] | (x_name == "q"), x, np.nan) for x_name, x in zip(layer.data, data, strict=True)]
    memory, short = Memory(name), Memory(name)
    memory.memorize(*pairs_of(layer, gappy), mask=mask)
    short.memorize(*(x[mask] for x in pairs_of(layer, data)))
    asked = queries_of(layer, data)
    np.testing.assert_allclose(memory.recall(*asked), short.recall(*asked), **CLOSE)


@pytest.mark.parametrize("name", [name for name in NAMES if not why_not(ttr_np.layers[name])])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_memories_merge_in_order_and_in_any_grouping(name, lead):
    layer, rng = ttr_np.layers[name], np.random.default_rng(1)
    draws = [inputs(layer, rng, 24) for _ in range(int(np.prod(lead)))]
    data = [np.stack(x).reshape((*lead, 24, 4)) for x in zip(*draws, strict=True)]
    gates, mask = all_gates(layer, rng, draws[0]), rng.uniform(size=(*lead, 24)) < 0.7
    parts = []
    for low, high in [(0, 0), (0, 9), (9, 10), (10, 24)]:
        parts.append(Memory(name, mergeable=True))
        for a, b in [(low, (low + high) // 2), ((low + high) // 2, high)]:
            own = {gate: cut_gate(layer, gate, x, a, b, 24) for gate, x in gates.items()}
            parts[-1].memorize(*rows(pairs_of(layer, data), a, b), mask=mask[..., a:b], **own)
    whole = Memory(name).memorize(*pairs_of(layer, data), mask=mask, **gates)
    a, b, c, d = parts
    expected = whole.recall(*queries_of(layer, data), **gates)
    for merged in (a.merge(b).merge(c).merge(d), a.merge(b.merge(c.merge(d)))):
        np.testing.assert_allclose(merged.recall(*queries_of(layer, data), **gates), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if why_not(ttr_np.layers[name])])
def test_memories_that_do_not_merge_say_why(name):
    layer, data = drawn(name, t=2)
    memory = Memory(name).memorize(*pairs_of(layer, data))
    with pytest.raises(NotImplementedError, match="do not merge: (it|its|mean)"):
        memory.merge(memory)
    with pytest.raises(NotImplementedError, match="do not merge"):
        Memory(name, mergeable=True)


def test_pieces_of_a_sequence_run_on_workers_of_dask():
    dask = pytest.importorskip("dask", reason="dask is not installed: pip install 'dask[array]'")
    page = (Path(__file__).parents[1] / "docs" / "workers.md").read_text(encoding="utf-8")
    names = {"dask": dask}
    for example in doctest.DocTestParser().get_examples(page):
        exec(example.source, names)
    exec(re.search(r"```text\n(.*?)```", page, re.DOTALL)[1], names)
    o, after = names["in_pieces"](names["dask_map"], names["qs"], names["ks"], names["vs"])
    np.testing.assert_array_equal(o, names["o"])
    np.testing.assert_array_equal(after.state.S, names["after"].state.S)


def test_what_cannot_be_merged_is_told():
    layer, data = drawn("delta_rule")
    memory = Memory("delta_rule", mergeable=True).memorize(*pairs_of(layer, data))
    with pytest.raises(ValueError, match="make it with mergeable=True"):
        memory.merge(Memory("delta_rule").memorize(*pairs_of(layer, data)))
    with pytest.raises(ValueError, match="is no memory of delta_rule"):
        memory.merge(Memory("gla", mergeable=True))
    with pytest.raises(ValueError, match="different shapes"):
        memory.merge(Memory("delta_rule", mergeable=True).memorize(np.eye(3), np.eye(3)))
    plain = Memory("delta_rule").memorize(*pairs_of(layer, data)).merge(memory)
    with pytest.raises(ValueError, match="make it with mergeable=True"):
        memory.merge(plain)
    empty = Memory("delta_rule", mergeable=True)
    assert same(memory.merge(empty).state, memory.state) and same(empty.merge(memory).state, memory.state)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_the_memory_back_to_the_bit(name, tmp_path):
    layer, data = drawn(name)
    memory = Memory(name)
    memory.step(*rows(data, 0, 9))
    memory.save(tmp_path / "memory.npz")
    loaded = Memory.load(tmp_path / "memory.npz")
    assert same(loaded.state, memory.state) and type(loaded.state) is type(memory.state)
    assert np.array_equal(loaded.step(*rows(data, 9, 17)), memory.step(*rows(data, 9, 17)))
    assert os.listdir(tmp_path) == ["memory.npz"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gates_transitions_and_dtypes_are_in_the_file(dtype, tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    layer, data = drawn("kda")
    q, k, v = (x.astype(dtype) for x in data)
    slow = np.log([0.5, 0.9, 0.99, 1.0])
    memory = Memory("kda", beta=0.3, log_decay=slow, mergeable=True).memorize(k, v)
    memory.save(tmp_path / "m")
    loaded = Memory.load(tmp_path / "m")
    assert repr(loaded) == repr(memory) and loaded.recall(q).dtype == dtype
    assert np.array_equal(loaded.merge(loaded).recall(q), memory.merge(memory).recall(q))
    empty = Memory("gla", log_decay=-np.inf)
    empty.save(tmp_path / "m")
    assert Memory.load(tmp_path / "m").gates == {"log_decay": -np.inf}
    assert repr(Memory.load(tmp_path / "m")) == "Memory('gla', empty)"


def test_a_truncated_file_is_told_wherever_it_ends(tmp_path):
    layer, data = drawn("gsa")
    memory, path = Memory("gsa").memorize(*pairs_of(layer, data)), tmp_path / "m.npz"
    memory.save(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no file of a memory, or it is damaged"):
            Memory.load(path)
    place = whole.index(b"\x93NUMPY") + 200
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match="damaged: Bad CRC"):
        Memory.load(path)


def rewrite(source, target, change):
    """A file of a memory whose header was changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "header.json":
                header = json.loads(content)
                change(header)
                content = json.dumps(header)
            new.writestr(name, content)


def set_in(*path_and_value):
    def change(header):
        *path, last, value = path_and_value
        for key in path:
            header = header[key]
        header[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("version", 2), "has version 2 of the format, this ttr_np reads 1"),
        (set_in("format", "other"), "has another format"),
        (set_in("content", "layer", "nonsense"), "unknown layer 'nonsense'"),
        (set_in("content", "layer", "gated_kalmanet"), "has no state"),
        (set_in("content", "layer", "mesanet"), "initial_state"),
        (set_in("content", "state", "type", "Popen"), "'Popen'"),
        (set_in("content", "state", None), "its state is missing"),
        (set_in("content", "shape", "sizes", {"k": 3, "v": 4}), "needs"),
        (set_in("content", "gates", {"nonsense": {"array": 0}}), "no gate 'nonsense'"),
        (set_in("content", {}), "fits this ttr_np"),
    ],
)
def test_a_file_that_says_something_else_is_told(change, message, tmp_path):
    layer, data = drawn("delta_rule")
    Memory("delta_rule").memorize(*pairs_of(layer, data)).save(tmp_path / "m.npz")
    rewrite(tmp_path / "m.npz", tmp_path / "other.npz", change)
    with pytest.raises(ValueError, match=message):
        Memory.load(tmp_path / "other.npz")


def test_a_foreign_file_is_told(tmp_path):
    path = tmp_path / "foreign"
    for content in (b"", b"text", b"\x80\x04N."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no file of a memory"):
            Memory.load(path)
    np.savez(tmp_path / "arrays.npz", S=np.eye(2))
    with pytest.raises(ValueError, match=r"no header.json in it"):
        Memory.load(tmp_path / "arrays.npz")
    with pytest.raises(FileNotFoundError):
        Memory.load(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        Memory.load(tmp_path)


def test_what_a_file_cannot_hold_is_told_and_the_old_file_stays(tmp_path):
    layer = ttr_np.layers["delta_rule"]
    mine = ttr_np.Layer("mine", layer.weights, layer.regressor, layer.optimizer, "delta_rule", "here", layer.gates)
    Memory("delta_rule").save(tmp_path / "m")
    old = (tmp_path / "m").read_bytes()
    with pytest.raises(TypeError, match="'mine' is no line of the table"):
        Memory(mine).save(tmp_path / "m")
    with pytest.raises(TypeError, match="object array"):
        Memory("delta_rule", beta=lambda p: 1.0).save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == old and os.listdir(tmp_path) == ["m"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    memory = Memory("delta_rule").memorize(np.eye(2), np.eye(2))
    memory.save(tmp_path / "m")
    old = (tmp_path / "m").read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="No space left"):
        memory.memorize(np.eye(2), np.eye(2)).save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == old and os.listdir(tmp_path) == ["m"]


KILLED = """
import os, signal, sys, numpy as np, ttr_np
from ttr_np import memory_file
where, path = sys.argv[1:]
memory = ttr_np.Memory("delta_rule", backend="numpy").memorize(np.eye(4), 2 * np.eye(4))
die = lambda *x, **y: os.kill(os.getpid(), signal.SIGKILL)
module, name = {
    "before an array": (np.lib.format, "write_array"),
    "before the disk": (os, "fsync"),
    "before the move": (os, "replace"),
    "after the move": (memory_file, "flush_folder"),
}[where]
setattr(module, name, die)
memory.save(path)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill that cannot be caught")
@pytest.mark.parametrize("where", ["before an array", "before the disk", "before the move", "after the move"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_old_file_whole(where, tmp_path):
    path = tmp_path / "m.npz"
    Memory("delta_rule").memorize(np.eye(4), np.eye(4)).save(path)
    done = subprocess.run([sys.executable, "-c", KILLED, where, str(path)], check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    expected = 2 if where == "after the move" else 1
    answers = Memory.load(path).recall(np.eye(4))
    assert np.array_equal(answers.round(12), np.round(expected * 0.9 * np.eye(4), 12))


STREAM = """
import sys, time, numpy as np, ttr_np
path, name = sys.argv[1:]
k, v = np.load(path + ".npy")
memory = ttr_np.Memory(name, backend="numpy")
for low in range(0, len(k), 5):
    memory.memorize(k[low : low + 5], v[low : low + 5])
    memory.save(path)
    print(low + 5, flush=True)
    time.sleep(0.01)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill that cannot be caught")
@pytest.mark.parametrize("name", ["gated_deltanet", "recursive_least_squares"])
def test_save_kill_load_continue_gives_the_same_numbers(name, tmp_path):
    k, v = pair = np.random.default_rng(0).standard_normal((2, 1000, 4)) / 2
    path = tmp_path / "m.npz"
    np.save(f"{path}.npy", pair)
    command = [sys.executable, "-c", STREAM, str(path), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as child:
        for _ in range(8):
            told = int(child.stdout.readline())
        child.kill()
        told = int(([told, *child.stdout.read().split()])[-1])
    memory, alone = Memory.load(path), Memory(name)
    for low in range(0, 1000, 5):
        alone.memorize(k[low : low + 5], v[low : low + 5])
        if low + 5 in (told, told + 5) and same(alone.state, memory.state):
            done = low + 5
    for low in range(done, 1000, 5):
        memory.memorize(k[low : low + 5], v[low : low + 5])
    assert same(memory.state, alone.state)


LONG = 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated_deltanet", "recursive_least_squares"])
def test_a_million_tokens_in_pieces_are_one_pass_and_memory_stays_flat(name):
    rng = np.random.default_rng(0)
    k, v = ttr_np.features.normalize_l2(rng.standard_normal((2, LONG, 4), dtype=np.float32).astype(np.float64))
    memory, low, sizes = Memory(name), 0, []
    while low < LONG:
        high = min(low + int(rng.integers(0, 20_000)), LONG)
        memory.step(k[low:high], k[low:high], v[low:high])
        low = high
        sizes.append((low, resident()))
    _, whole = ttr_np.layers[name](k, k, v, output_final_state=True)
    for x, expected in zip(arrays_in(memory.state), arrays_in(whole), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    early = max(size for low, size in sizes if low < LONG / 4)
    assert max(size for _, size in sizes) - early < 8, "megabytes"


def resident():
    """Megabytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_a_call_that_fails_leaves_the_memory_as_it_was():
    layer, data = drawn("gated_deltanet")
    memory = Memory("gated_deltanet", mergeable=True).memorize(*data[1:])
    before, q = memory.state, data[0]
    wrong = [
        ((np.ones((3, 5)), np.ones((3, 4))), {}, ValueError, "k has rows of 5 numbers; this memory holds 4"),
        ((np.ones((3, 4)), np.ones((3, 3))), {}, ValueError, "v has rows of 3"),
        ((np.ones((3, 4)), np.ones((2, 4))), {}, ValueError, "axis 't' is"),
        ((np.ones((2, 3, 4)), np.ones((3, 4))), {}, ValueError, r"leading axes \(2,\); this memory holds \(\)"),
        ((np.ones((3, 4), np.longdouble),) * 2, {}, TypeError, "this memory is float64: convert it with astype"),
        ((np.ones(4), np.ones(4)), {}, ValueError, "k needs axes"),
        ((np.ones((3, 4)),), {}, TypeError, "takes k, v here: 2 arrays, got 1"),
        ((np.ones((3, 4)),) * 2, {"mask": [0, 1, 1]}, TypeError, "mask has dtype int64"),
        ((np.ones((3, 4)),) * 2, {"mask": np.ones((2, 3), bool)}, ValueError, "leading axes"),
        ((np.ones((3, 4)),) * 2, {"log_decay": 1.0}, ValueError, "log_decay must be <= 0"),
        ((np.ones((3, 4)),) * 2, {"log_decay": np.zeros((5, 3))}, ValueError, "leading axes"),
        ((np.ones((3, 4)),) * 2, {"decay": 1.0}, TypeError, "no gate 'decay'"),
        ((np.ones((3, 4)),) * 2, {"backend": "numpy"}, TypeError, "no gate 'backend'"),
        ((np.ma.ones((3, 4)),) * 2, {}, TypeError, "k is a masked array"),
    ]
    for pairs, more, kind, message in wrong:
        with pytest.raises(kind, match=message):
            memory.memorize(*pairs, **more)
    with pytest.raises(ValueError, match="q has rows of 3"):
        memory.recall(q[:, :3])
    assert same(memory.state, before)
    twice = Memory(layer).memorize(*(np.tile(x, (2, 1)) for x in data[1:]))
    np.testing.assert_allclose(memory.memorize(*data[1:]).recall(q), twice.recall(q), **CLOSE)


def test_a_memory_keeps_its_precision():
    layer, (q, k, v) = drawn("delta_rule")
    low, high = (Memory(layer).memorize(k.astype(dtype), v) for dtype in (np.float32, np.float64))
    assert low.state.S.dtype == np.float64
    few = (k[:3].astype(np.float32), v[:3].astype(np.float32))
    assert low.memorize(*few).state.S.dtype == np.float64 and low.recall(q.astype(np.float32)).dtype == np.float64
    high.memorize(*(x.astype(np.float64) for x in few))
    np.testing.assert_allclose(low.state.S, high.state.S, rtol=1e-5, atol=1e-6)
    single = Memory(layer).memorize(*few)
    with pytest.raises(TypeError, match="k has dtype float64; this memory is float32"):
        single.memorize(k, v)
    lists = single.copy().memorize(few[0].tolist(), few[1].tolist())  # numbers of no dtype take that of the memory
    assert same(lists.state, single.copy().memorize(*few).state)


def test_many_series_run_side_by_side_and_queries_may_be_grouped():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 5, 6, 4)) / 2
    for name in ("kda", "softmax", "mlstm", "gsa"):
        together = Memory(name).memorize(k, v)
        for i in range(5):
            alone = Memory(name).memorize(k[i], v[i])
            np.testing.assert_allclose(together.recall(q)[i], alone.recall(q[i]), **CLOSE)
        np.testing.assert_allclose(together.recall(q[:1]), together.recall(np.broadcast_to(q[:1], q.shape)), **CLOSE)
        np.testing.assert_allclose(together.recall(np.stack([q, k]))[1], together.recall(k), **CLOSE)
        np.testing.assert_allclose(alone.recall(q)[2], alone.recall(q[2]), **CLOSE)


def test_an_empty_memory_does_not_answer_until_it_knows_the_sizes():
    memory = Memory("softmax")
    assert repr(memory) == "Memory('softmax', empty)" and memory.state is None and memory.nbytes == 0
    with pytest.raises(ValueError, match="has seen nothing yet"):
        memory.recall(np.eye(3))
    memory.memorize(np.zeros((0, 3)), np.zeros((0, 2)))
    assert np.array_equal(memory.recall(np.eye(3)), np.zeros((3, 2)))


def test_a_query_has_no_pair_of_its_own():
    k, v, q = np.random.default_rng(0).standard_normal((3, 1, 4))
    one = Memory("rwkv4").memorize(k, v)  # a mean of one value, whatever its weight; the query opens channels
    np.testing.assert_allclose(one.recall(q), ttr_np.features.sigmoid(q) * v, rtol=1e-12)
    assert np.array_equal(Memory("rwkv4").memorize(k[:0], v[:0]).recall(q), np.zeros((1, 4)))


def test_copies_go_their_own_ways():
    layer, data = drawn("mesanet")
    memory = Memory("mesanet", ridge=0.5).memorize(*data[1:])
    for twin in (memory.copy(), copy.copy(memory), copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert same(twin.state, memory.state) and twin.gates == {"ridge": 0.5}
        twin.memorize(*data[1:])
        assert not same(twin.state, memory.state)
    assert repr(memory.reset()) == "Memory('mesanet', empty)"
    memory.memorize(np.eye(2), np.eye(2))


def test_a_memory_has_gates_of_its_own_and_looks_at_its_arguments_at_once():
    log_decay = np.full(4, -0.1)
    memory, k = Memory("gla", log_decay=log_decay), np.eye(4)
    before = memory.memorize(k, k).copy().memorize(k, k).recall(k)
    log_decay[:] = -5.0
    assert np.array_equal(memory.memorize(k, k).recall(k), before)
    with pytest.raises(ValueError, match="unknown backend 'none'"):
        Memory("gla", backend="none")
    with pytest.raises(TypeError, match="gla has no gate 'cu_seqlens'; it has log_decay"):
        Memory("gla").memorize(k, k, cu_seqlens=[0, 2, 4])


@pytest.mark.parametrize("name", BY_DEFINITION + IMPOSSIBLE)
def test_a_layer_without_a_state_says_why(name):
    with pytest.raises(NotImplementedError, match="has no state to keep: .+"):
        Memory(name)


def test_a_memory_moves_between_devices():
    memory = Memory("gla").memorize(np.eye(2), np.eye(2))
    assert memory.device == "cpu" and np.array_equal(memory.to("cpu").recall(np.eye(2)), memory.recall(np.eye(2)))
    for wrong in ("tpu", "gpu x", "cuda"):
        with pytest.raises(ValueError, match=f"device is '{wrong}'"):
            memory.to(wrong)
    if ttr_np.available_backends()["cupy"] == "cupy is not installed":
        with pytest.raises(ImportError):
            memory.to("gpu")
