"""The one command for a GPU, as far as it can be tested without one: floors, shapes, time, tables, who is skipped."""

import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ttr_np
from ttr_np.measure import Contender, Skipped, reference, relative_error

pytest.importorskip("benchmarks", reason="the benchmarks are not installed with the package")
from benchmarks import floors, gpu  # noqa: E402
from benchmarks.floors import KINDS, Rates, Shape, floor_seconds, rates_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported")
H200 = floors.MACHINES["H200"]
# Microseconds worked out by hand from bytes and FLOP, at shapes where copies rule and where products would.
BY_HAND = {
    ("linear", (1, 2048, 16, 64)): 3.9,
    ("linear", (1, 32768, 32, 128)): 250,
    ("scalar gate", (8, 2048, 32, 64)): 62.9,
    ("channel gate", (1, 32768, 32, 128)): 312,
    ("delta", (1, 2048, 16, 128)): 7.9,
    ("gated delta", (1, 32768, 32, 128)): 252,
    ("KDA", (8, 8192, 32, 128)): 626,
    ("gated delta", (1, 1, 32, 128)): 0.98,
    ("KDA", (128, 1, 32, 128)): 125,
    ("softmax", (1, 8192, 32, 128)): 696,
    ("softmax", (1, 65536, 32, 128)): 44500,
    ("softmax full", (1, 8192, 32, 128)): 1392,
    ("softmax decode", (1, 8192, 32, 128)): 31.2,
    ("mesa", (1, 2048, 16, 128)): 87,
    ("least squares", (1, 2048, 16, 64)): 4.0,
    ("least squares", (1, 32768, 32, 128)): 306,
    ("local linear", (1, 2048, 16, 64)): 98,
}


@pytest.mark.parametrize(("kind", "sizes"), BY_HAND)
def test_floors_are_those_worked_out_by_hand(kind, sizes):
    assert 1e6 * floor_seconds(kind, Shape(*sizes), H200) == pytest.approx(BY_HAND[kind, sizes], rel=0.01)


def test_slow_products_make_the_floor():
    shape = Shape(1, 2048, 16, 128)
    assert floor_seconds("delta", shape, Rates(1e30, 1e12)) == (6 * 128**2 + 10 * 64 * 128 + 64**2) * 2048 * 16 / 1e12
    with pytest.raises(ValueError, match="unknown kind 'mamba'; the kinds are linear"):
        floor_seconds("mamba", shape, H200)


def test_a_machine_that_is_not_listed_is_measured():
    measured = Rates(1.0, 2.0)
    assert rates_of("GPU 0: NVIDIA H200 (UUID)", measured) == H200 and rates_of("NVIDIA L4", measured) is measured


def test_the_shapes_are_those_of_the_question():
    sizes = {tuple(shape) for shape in gpu.SHAPES}
    assert len(sizes) == len(gpu.SHAPES)
    assert {(b, 1, 32, 128) for b in (1, 8, 32, 128)} <= sizes and (1, 32768, 32, 128) in sizes
    assert [str(shape) for shape in gpu.shapes_of("1x2x3x4,8x1x2x64")] == ["1x2x3x4", "8x1x2x64"]


def test_every_question_is_asked_once_where_it_makes_sense_and_the_short_ones_early():
    order = gpu.questions_of(gpu.SHAPES, KINDS, gpu.FIRST)
    assert len(set(order)) == len(order) and set(gpu.questions_of(gpu.SHAPES, KINDS)) < set(order)
    assert {kind for kind, _ in order} == set(KINDS)
    streams = {kind for kind, shape in order if shape.T == 1}
    assert streams == set(KINDS) - {*gpu.SOFTMAX, *gpu.SLOW}  # the others keep their pairs, or do more than launch
    early = [str(shape) for _, shape in order[:25]]
    assert early.count("1x2048x32x128") == 11 and early.count("1x1x32x128") == 6
    assert max(order.index(("softmax", Shape(1, t, 32, 128))) for t in (2048, 8192, 16384)) < 31
    local = [shape for kind, shape in order if kind == "local linear"]
    assert local[0] == Shape(1, 2048, 16, 64) and max(shape.token_heads for shape in local) <= 32768
    assert order.index(("local linear", local[0])) < 35


def test_chosen_shapes_and_kinds_are_asked_in_their_order():
    shapes = gpu.shapes_of("1x64x2x64,1x1x2x64")
    asked = gpu.questions_of(shapes, ["softmax", "delta"])
    assert asked == [("softmax", shapes[0]), ("delta", shapes[0]), ("delta", shapes[1])]
    assert gpu.questions_of(shapes, ["delta"], [(shapes[1], ["softmax", "delta"])])[0] == ("delta", shapes[1])


# ---- without a GPU ---------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_why(capsys, tmp_path):
    if ttr_np.available_backends()["cupy"] == "ok":
        pytest.skip("there is a GPU")
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 2
    assert "no GPU to measure on: cupy: cupy " in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


WRONG = [["--kinds", "mamba"], ["--seconds", "0"], ["--json", "/no/such/folder/x"], ["--shapes", "1x"]]


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(SystemExit) as ended:
        gpu.main(wrong)
    assert ended.value.code == 2


# ---- the times, on a clock of our own --------------------------------------------------------------------------------


class Time:
    """A clock that moves when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds, o):
        def call():
            self.now += seconds
            if isinstance(o, Exception):
                raise o
            return o

        return call

    def seconds_of(self, call, calls):
        start = self.now
        for _ in range(calls):
            call()
        return (self.now - start) / calls


EXACT = np.ones((1, 2, 4, 3))
SHAPE = Shape(1, 1000, 2, 64)


def asked(time, *contenders):
    return SimpleNamespace(kind="delta", shape=SHAPE, contenders=contenders, exact=EXACT)


def answered(time, *contenders, seconds=1000.0):
    rng = np.random.default_rng(0)
    beginning = lambda o, exact: o  # noqa: E731
    return gpu.answered(asked(time, *contenders), H200, time.seconds_of, beginning, gpu.Clock(seconds, time), rng)


def test_right_answers_are_timed_and_others_told():
    time = Time()
    entry = answered(
        time,
        Contender("good", time.work(0.002, EXACT), detail="how"),
        Contender("wrong", time.work(0.001, EXACT * 1.1)),
        Contender("nan", time.work(0.001, EXACT * np.nan)),
        Contender("broken", time.work(0.001, OSError("no such kernel\nand more"))),
        Skipped("absent", "is not installed"),
    )
    (found,) = entry["results"]
    assert found["contender"] == "good" and found["seconds"]["median"] == pytest.approx(0.002)
    assert found["over_floor"] == pytest.approx(0.002 / entry["floor_seconds"])
    assert found["bytes_per_second"] == pytest.approx((8 * 64 + 8) * 2000 / 0.002)
    reasons = {each["contender"]: each["reason"] for each in entry["skipped"]}
    assert reasons["wrong"] == "wrong: error 1.0e-01, allowed 3e-02" and "inf" in reasons["nan"]
    assert reasons["broken"] == "OSError: no such kernel" and reasons["absent"] == "is not installed"
    told = set()
    table = gpu.table_of(entry, told)
    assert "delta: 1x1000x2x64; floor" in table and "good" in table and "skipped: broken" in table and "how" in table
    assert "skipped: absent" not in gpu.table_of(entry, told)
    json.dumps(entry, allow_nan=False)


def test_rounds_end_with_the_time_and_the_slow_sit_out():
    time = Time()
    slow, endless = Contender("slow", time.work(0.3, EXACT)), Contender("endless", time.work(30.0, EXACT))
    quick = Contender("quick", time.work(1e-4, EXACT))
    found = {each["contender"]: each["seconds"] for each in answered(time, slow, endless, quick)["results"]}
    assert {name: each["samples"] for name, each in found.items()} == {"slow": 4, "endless": 1, "quick": gpu.ROUNDS}
    assert found["endless"]["median"] == pytest.approx(30.0)
    assert time.now < 2 * 30 + 2 * 0.3 + gpu.QUESTION_SHARE + 0.3  # a first call, a warm one, and shares


def test_without_time_everybody_has_the_sample_that_is_there():
    time = Time()
    entry = answered(time, *(Contender(name, time.work(1.0, EXACT)) for name in "ab"), seconds=1.0)
    assert [found["seconds"]["samples"] for found in entry["results"]] == [1, 1] and time.now == pytest.approx(4.0)


def test_nobody_is_no_error():
    assert "nobody" in gpu.table_of(answered(Time(), Skipped("cupy", "no driver")), set())


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """The command with everything on a GPU played by a clock."""
    time = Time()

    def question(kind, shape, seed):
        time.now += 10.0
        if kind == "KDA":
            raise MemoryError("too large")
        contenders = [Contender("cupy", time.work(1e-3, EXACT))]
        return SimpleNamespace(kind=kind, shape=shape, contenders=contenders, exact=EXACT)

    rates = lambda: Rates(1e12, 1e14)  # noqa: E731
    begin = lambda o, exact: o  # noqa: E731
    peers = SimpleNamespace(question=question, measured_rates=rates, seconds_of=time.seconds_of, beginning=begin)
    monkeypatch.setitem(sys.modules, "benchmarks.gpu_peers", peers)
    monkeypatch.setattr("benchmarks.gpu_peers", peers, raising=False)
    path = tmp_path / "gpu.json"
    arguments = gpu.chosen(["--json", str(path), "--shapes", "1x64x2x64,1x1x2x64"])
    return time, arguments, path


def test_questions_are_asked_while_there_is_time_and_written_one_by_one(stage, capsys, monkeypatch):
    time, arguments, path = stage
    result, kept = gpu.begun(arguments), []
    known = gpu.keep
    monkeypatch.setattr(gpu, "keep", lambda found, where: (known(found, where), kept.append(len(found["questions"]))))
    gpu.timed(result, arguments, gpu.Clock(85.0, time))
    written = json.loads(path.read_text())
    assert kept == list(range(1, len(written["questions"]) + 1))
    all_of_them = len(gpu.questions_of(arguments.shapes, arguments.kinds))
    assert len(written["questions"]) + len(result["unasked"]) == all_of_them > len(written["questions"]) >= 6
    (nobody,) = next(q for q in written["questions"] if q["kind"] == "KDA")["skipped"]
    assert nobody["reason"] == "MemoryError: too large"
    assert written["rates"]["bytes"] == 1e12 and "cupy" in capsys.readouterr().out


COMMITTED = sorted((Path(gpu.__file__).parent / "results").glob("gpu-*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.name)
def test_committed_results_have_the_form_that_is_written_today(stage, path):
    time, arguments, _ = stage
    result = gpu.begun(arguments)
    gpu.timed(result, arguments, gpu.Clock(85.0, time))
    committed = json.loads(path.read_text(encoding="utf-8"))
    assert committed.keys() - {"about"} == result.keys() and committed["device"].startswith("GPU 0: ")
    for entry in committed["questions"]:
        assert entry.keys() == result["questions"][0].keys() and entry["kind"] in KINDS
        for found in entry["results"]:
            assert found.keys() == result["questions"][0]["results"][0].keys() and found["error"] <= gpu.TOLERANCE


# ---- the tests on the device -----------------------------------------------------------------------------------------


def said(text, code=0):
    return [sys.executable, "-c", f"import sys; print({text!r}); sys.exit({code})"]


def test_what_the_tests_said_is_counted():
    text = "..s.F\nFAILED tests/x.py::y\n  [ 50%]\n..E   [100%]\nFAILED tests/x.py::y - why\n"
    found = gpu.tested(30, said(text, 1))
    assert [found[name] for name in ("passed", "failed", "errors", "skipped")] == [5, 1, 1, 1] and found["finished"]
    assert found["failures"] == ["tests/x.py::y - why"] and "FAILED" in found["end"]
    assert "5 passed, 1 failed, 1 errors, 1 skipped" in gpu.tests_line(found) and "why" in gpu.tests_line(found)
    assert gpu.tests_line({"reason": "pytest is not installed"}).endswith("skipped: pytest is not installed")


def test_tests_that_take_too_long_are_cut_off_and_what_they_said_is_kept():
    endless = [sys.executable, "-uc", "print('...F', 'FAILED a::b', sep='\\n', flush=True)\nwhile True: pass"]
    found = gpu.tested(2, endless)
    assert (found["passed"], found["finished"]) == (3, False) and "cut off" in gpu.tests_line(found)
    assert found["failures"] == ["a::b"]


def test_a_test_that_fails_on_a_gpu_is_named_at_once(tmp_path):
    for name in ("conftest.py", "cudaemu"):
        (tmp_path / name).symlink_to(Path(__file__).parent / name)
    (tmp_path / "test_it.py").write_text("def test_bad():\n    assert False\n")
    options = ["-q", "-p", "no:cacheprovider", "--no-summary", "--rootdir"]
    found = gpu.tested(60, [sys.executable, "-m", "pytest", *options, *[str(tmp_path)] * 2])
    assert found["failures"] == ["test_it.py::test_bad"]


TESTED = {
    "all passed": (said("..  [100%]"), 30, True),
    "pytest is not installed": (None, 0, True),
    "one failed": (said("F.  [100%]", 1), 30, False),
    "one failed before the time was over": ([sys.executable, "-uc", "print('F.')\nwhile True: pass"], 2, False),
    "nothing could be collected": (said("no tests ran", 5), 30, False),
    "the process crashed": ([sys.executable, "-uc", "import os; print('..'); os.kill(os.getpid(), 9)"], 30, False),
}


@pytest.mark.parametrize("name", TESTED)
def test_the_exit_code_tells_of_tests_that_failed(name, monkeypatch, tmp_path, capsys):
    command, seconds, right = TESTED[name]
    found = gpu.tested(seconds, command) if command else {"reason": name}
    monkeypatch.setattr(gpu, "missing", lambda: "")
    monkeypatch.setattr(gpu, "times_apart", lambda *_: None)
    monkeypatch.setattr(gpu, "tested", lambda _: found)
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == (not right)
    assert ("ended with code" in capsys.readouterr().out) == (not right and "time was over" not in name)


def test_the_tests_for_the_device_are_there():
    assert all((Path(gpu.__file__).parent.parent / name).exists() for name in gpu.TESTS)


def test_a_process_that_does_not_end_is_ended():
    assert gpu.ends(said("quick"), 30)
    assert not gpu.ends([sys.executable, "-c", "while True: pass"], 1)


# ---- the peers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("torch")
    return import_module("benchmarks.gpu_peers")


@pytest.fixture(scope="module")
def fla(peers):
    try:
        return {name: import_module(f"fla.ops.{name}") for name in MODULES}
    except Exception as problem:  # without Triton it fails in its own ways
        pytest.skip(f"flash-linear-attention does not import: {problem}")


MODULES = ("linear_attn", "simple_gla", "gla", "delta_rule", "gated_delta_rule", "kda", "mesa_net")
SMALL = Shape(2, 300, 3, 16)  # more tokens than are checked


def exact_of(peers, kind, arrays):
    return reference(peers.KINDS[kind].exact(peers.KINDS[kind], arrays))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_is_what_the_solver_answers(peers, kind, monkeypatch):
    about = peers.KINDS[kind]
    arrays = peers.drawn(about, SMALL, 0, "cpu")
    exact = exact_of(peers, kind, arrays)
    asked = peers.CHECKED if about.exact is peers.first else about.queries or peers.AMONG_ALL
    assert exact.shape == (1, 2, asked, 16)
    monkeypatch.setattr(peers, "heads_first", lambda x: x.transpose(1, 2).float().numpy())
    o = about.ours("numpy", about, SMALL, arrays)[0].call()
    assert o.shape == (2, 3, about.queries or 300, 16)
    assert relative_error(o[:1, :2, :asked], exact) < (2e-3 if "tolerance" in about.how else 2e-5)


@pytest.mark.slow
def test_one_token_finds_the_state_that_was_drawn(peers):
    about, shape = peers.KINDS["scalar gate"], Shape(2, 1, 3, 16)
    arrays = peers.drawn(about, shape, 0, "cpu")
    q, k, v = (arrays[name].double().numpy()[:1, 0, :2] for name in "qkv")
    kept = np.exp(arrays["log_decay"].double().numpy()[:1, 0, :2])
    S = kept[..., None, None] * arrays["S"].double().numpy()[:1, :2] + k[..., :, None] * v[..., None, :]
    o = np.einsum("bhk,bhkv->bhv", q, S)[..., None, :]
    assert relative_error(o, exact_of(peers, "scalar gate", arrays)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", gpu.SOFTMAX)
def test_torch_answers_the_same_question(peers, kind):
    about = peers.KINDS[kind]
    arrays = peers.drawn(about, SMALL, 0, "cpu")
    contender, _ = about.peers["torch flash"](about, SMALL, arrays)
    exact = exact_of(peers, kind, arrays)
    assert contender.name == "torch flash" and relative_error(peers.beginning(contender.call(), exact), exact) < 2e-2
    assert about.peers["torch cuDNN"](about, SMALL, arrays)[0].name == "torch cuDNN"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_kind_has_a_peer_that_takes_our_arrays(peers, fla):
    assert tuple(peers.KINDS) == tuple(KINDS)
    asked = [peer for kind in peers.KINDS.values() for peer in kind.peers.values() if isinstance(peer, peers.Triton)]
    assert len(asked) == 6
    for peer in asked:
        for name in (peer.chunk, peer.token):
            takes = inspect.signature(getattr(fla[peer.module], name)).parameters
            wanted = {peer.name_of(name, array) for array in peer.names} | {*peer.options, "scale"}
            assert wanted <= takes.keys(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_mesa_layer_of_others_is_ours(peers, fla, monkeypatch):
    about, shape = peers.KINDS["mesa"], Shape(1, 64, 2, 16)
    arrays = peers.drawn(about, shape, 0, "cpu")
    takes = inspect.signature(fla["mesa_net"].chunk_mesa_net)
    naive = fla["mesa_net"].naive_mesa_net_exact

    def played(**given):
        takes.bind(**given)
        assert given.pop("max_CG_iteration") == 30 and given["lamb"].shape == (2, 16)
        return naive(**given)

    monkeypatch.setattr(fla["mesa_net"], "chunk_mesa_net", played)
    contender, _ = about.peers["fla"](about, shape, arrays)
    exact = exact_of(peers, "mesa", arrays)
    assert relative_error(peers.beginning(contender.call(), exact), exact) < 1e-5


@pytest.mark.slow
def test_a_backend_without_tensor_cores_is_not_asked_for_the_largest(peers, monkeypatch):
    monkeypatch.setattr(peers, "available_backends", lambda: {"cupy": "ok", "numba-cuda": "ok"})
    assert peers.refusals("softmax", Shape(1, 2048, 32, 128)) == {}
    assert "not asked beyond 4e+11" in peers.refusals("softmax", Shape(1, 8192, 32, 128))["numba-cuda"]
    monkeypatch.setattr(peers, "available_backends", lambda: {"cupy": "no driver", "numba-cuda": "no driver"})
    assert set(peers.refusals("softmax", Shape(1, 8192, 32, 128)).values()) == {"no driver"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_whoever_cannot_be_made_is_skipped_with_the_reason(peers, monkeypatch):
    kda = peers.KINDS["KDA"]
    (skipped,) = peers.attempted("fla", kda.peers["fla"]._replace(chunk="nothing"), kda, SHAPE, {})
    assert skipped.name == "fla"
    assert any(why in skipped.reason for why in ("nothing", "import", "No module named"))
    (skipped,) = peers.attempted("torch", peers.naive, kda, SHAPE, {})
    assert skipped.name == "torch" and "whole chunks" in skipped.reason
    monkeypatch.setattr(peers, "seconds_of", lambda call, calls: 0.01)
    make = lambda *_: (Contender("x", lambda: 1), lambda call: lambda: call() + 1)  # noqa: E731
    contender, graph = peers.attempted("x", make, None, None, {})
    assert (contender.name, graph.name, contender.call(), graph.call(), graph.call()) == ("x", "x, graph", 1, 2, 2)


@pytest.mark.slow
def test_no_graph_of_what_takes_long_or_cannot_be_recorded(peers, monkeypatch):
    monkeypatch.setattr(peers, "seconds_of", lambda call, calls: 0.2)
    with pytest.raises(RuntimeError, match="spares launches only"):
        peers.Graph(lambda: 1, lambda call: call)()
    said = []
    stream = SimpleNamespace(begin_capture=lambda: said.append("begin"), end_capture=lambda: said.append("end"))
    with pytest.raises(ZeroDivisionError):
        peers.captured(stream, lambda: 1 / 0)
    assert peers.captured(stream, lambda: 1) == (1, None) and said == ["begin", "end"] * 2
