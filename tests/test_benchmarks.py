"""The measuring machinery: what it refuses, what it says of those it skips, what it writes. No time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

import ttr_np
from ttr_np import measure
from ttr_np.cli import main
from ttr_np.measure import Case, Contender, Skipped, contest, ours, prefix, reference, relative_error, sample, spread
from ttr_np.notation import draw

benchmarks = pytest.importorskip("benchmarks", reason="the benchmarks are not installed with the package")
from benchmarks import filter_peers, fla_peers, lengths, questions, report, run, summary, torch_peers  # noqa: E402

TINY = questions.Setting(lengths=(8,), widths=(4,), heads=2, compiled=False)
RESULT = {"contender", "detail", "error", "first_call_seconds", "seconds", "peak_bytes"}
RNG = np.random.default_rng(0)


class Counted:
    """A contender's call that counts how often it is made."""

    def __init__(self, o: Any) -> None:
        self.o, self.calls = o, 0

    def __call__(self) -> Any:
        self.calls += 1
        if isinstance(self.o, Exception):
            raise self.o
        return self.o


def case(t: int = 6) -> Case:
    return Case("delta_rule", "", draw("delta_rule", np.random.default_rng(0), lead=(2,), t=t))


# Right first


EXACT = np.ones((2, 3))


@pytest.mark.parametrize(
    ("o", "words"),
    [
        (EXACT * 1.01, "wrong: error 1.0e-02, allowed 1e-03"),
        (EXACT[:, :2], "wrong: error inf"),
        (np.where(EXACT.cumsum(0) > 1, np.nan, EXACT), "wrong: error inf"),
        (OSError("no such thing\nin two lines"), "OSError: no such thing"),
    ],
)
def test_who_is_wrong_is_told_and_not_timed(o, words):
    wrong, right = Counted(o), Counted(EXACT * (1 + 1e-6))
    found = contest([Contender("wrong", wrong), Contender("right", right)], EXACT, tolerance=1e-3, rounds=4, rng=RNG)
    assert [entry["contender"] for entry in found["results"]] == ["right"]
    (skipped,) = found["skipped"]
    assert skipped["contender"] == "wrong" and words in skipped["reason"] and "\n" not in skipped["reason"]
    assert wrong.calls == 1 and right.calls > 4


def test_a_result_has_its_error_spread_and_memory():
    (entry,) = contest([Contender("one", Counted(EXACT))], EXACT, tolerance=0, rounds=3, rng=RNG)["results"]
    assert entry.keys() == RESULT and entry["error"] == 0
    assert entry["seconds"].keys() == {"median", "p20", "p80", "least", "samples"} and entry["seconds"]["samples"] == 3
    assert 0 < entry["seconds"]["p20"] <= entry["seconds"]["median"] <= entry["seconds"]["p80"]


def test_the_error_is_relative_to_the_largest_answer():
    assert relative_error(np.array([4.0, 1.5]), np.array([4.0, 1.0])) == 0.125
    assert relative_error((np.array([4.0]), "state"), np.array([4.0])) == 0
    assert relative_error(np.array([]), np.array([])) == 0


def test_spread_is_median_and_fifths():
    found = spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert found == {"median": 3.5, "p20": 2.0, "p80": 5.0, "least": 1.0, "samples": 6}


def test_all_take_turns_in_an_order_that_changes(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "LEAST", 0)
    monkeypatch.setattr(measure, "SETTLED", 0)
    contenders = [Contender(name, lambda name=name: order.append(name)) for name in "abc"]
    times = sample(contenders, 8, np.random.default_rng(0))
    assert order[3::2] == order[4::2]  # each warms up before it is timed
    rounds = [tuple(order[3 + 6 * i : 9 + 6 * i : 2]) for i in range(8)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len(set(rounds)) > 1
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abc", 8)


def test_threads_settle_before_a_sample(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "LEAST", 0)
    monkeypatch.setattr(measure, "SETTLED", 0.05)
    sample([Contender("a", lambda: (calls.append(1), sleep(0.01)))], 1, np.random.default_rng(0))
    assert 5 <= len(calls) <= 7  # one that tells how long it takes, three to five untimed, the sample


def test_who_has_used_up_the_budget_sits_out_but_is_timed_once():
    slow = Counted(EXACT)
    times = sample([Contender("slow", slow)], 5, RNG, budget=0.0)
    assert len(times["slow"]) == slow.calls == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_counts_what_a_call_frees_again():
    def hungry() -> float:
        return float(np.ones(8_000_000).sum())  # 61 MiB, freed at the end of the call

    peak = measure.peak_bytes(Contender("hungry", hungry))
    assert peak is None or 55 < peak / 2**20 < 90


def test_a_prefix_is_the_beginning_of_every_array_with_time():
    short = prefix(case(), 4)
    assert {name: x.shape for name, x in short.arrays.items()} == {
        **dict.fromkeys("qk", (2, 4, 5)),
        "v": (2, 4, 3),
        "beta": (2, 4),
    }
    np.testing.assert_array_equal(reference(short), reference(case())[:, :4])
    scan = Case("selective_scan", "", draw("selective_scan", np.random.default_rng(0)))
    assert prefix(scan, 2).arrays["A"].shape == scan.arrays["A"].shape


def test_our_contender_is_the_operator():
    mine = ours(case(), "numpy")
    assert mine.name == "numpy" and relative_error(mine.call(), reference(case())) == 0


def test_a_yardstick_is_timed_in_the_same_rounds_and_is_no_contender():
    stick = Counted(None)
    found = contest([], EXACT, tolerance=0, rounds=3, rng=RNG, yardsticks=[Contender("stick", stick)])
    assert found["results"] == [] and found["yardsticks"]["stick"]["samples"] == 3 and stick.calls > 3


def test_matrix_products_have_a_rate(monkeypatch):
    monkeypatch.setattr(measure, "GEMM", 32)
    assert measure.gemm_rate(1) > 0


# Who is asked


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", questions.QUESTIONS)
def test_every_peer_answers_our_question(name):
    for question in questions.QUESTIONS[name](TINY):
        peers = [c for c in question.contenders if c.name not in questions.OURS]
        exact = reference(question.case)
        for peer in peers:
            if isinstance(peer, Skipped):
                assert peer.reason
            else:
                assert relative_error(peer.call(), exact) <= question.tolerance, peer.name


VARIANTS = {kind: lengths.LINEAR.get(kind, ("",)) for kind in torch_peers.FORMS if kind in ttr_np.notation.OPERATORS}


@pytest.mark.parametrize("t", [32, 512, 96])
@pytest.mark.parametrize(
    ("kind", "variant"), [(kind, variant) for kind, found in VARIANTS.items() for variant in found]
)
def test_every_form_of_torch_is_right_whatever_its_chunk(kind, variant, t):
    pytest.importorskip("torch")
    is_mesa = kind == "mesa"
    sizes = {"t": t, "k": 4, "v": 4, "d": 4}
    if kind == "selective_scan":
        arrays = questions.channels(TINY, t, 4)
    else:
        arrays = questions.arrays_of(kind, TINY, variant, ("beta",) * is_mesa, **sizes)
    options = {"memory": ttr_np.Linear()} if kind == "test_time_training" else {"ridge": 1.0} if is_mesa else {}
    one = Case(kind, variant, arrays, options)
    exact = reference(one)
    bound = torch_peers.partial_of(torch_peers.tensors(one, "cpu"), {"ridge": 1.0} if is_mesa else {})
    for forms in torch_peers.FORMS[kind].values():
        for form, chunks in forms:
            for way in torch_peers.ways_of(form, chunks, t, bound):
                assert relative_error(torch_peers.answers(way.call, exact.shape)(), exact) < 2e-5, way.label


def form(name: str, o: float, seconds: float) -> torch_peers.Form:
    def call() -> Any:
        sleep(seconds)
        return EXACT * o

    return torch_peers.Form(name, None, call, "not")


def test_a_form_that_is_fast_and_wrong_is_not_torchs_best():
    pytest.importorskip("torch")
    ways = [form("plain", 1, 0), form("wrong", 2, 0), form("not finite", np.nan, 0), form("right", 1 + 1e-5, 0)]
    assert [way.name for way in torch_peers.agreeing(ways)] == ["plain", "right"]


def test_compiling_is_left_out_or_says_why_it_fails(monkeypatch):
    pytest.importorskip("torch")
    one = form("scan_loop", 1, 0)
    assert "too long to unroll" in torch_peers.compiled_of("torch compiled", [one], (2, 3), measure.at_once).reason
    broken = one._replace(compiles="whole")
    monkeypatch.setattr(torch_peers, "compiled_call", lambda way: Counted(OSError("no compiler")))
    found = torch_peers.compiled_of("torch compiled", [broken], (2, 3), measure.at_once)
    assert found == Skipped("torch compiled", "OSError: no compiler")


def test_who_is_not_installed_is_skipped_with_a_reason(monkeypatch):
    for module in (torch_peers, filter_peers):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for module in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "fla", None)
    x, d = questions.series(1, 4, 2, 0)
    linear = Case("linear_attention", "", questions.arrays_of("linear_attention", TINY))
    peers = [
        *torch_peers.torch_peers(linear, "linear_attention", False),
        *fla_peers.fla_peers(linear),
        *filter_peers.recursive_least_squares(x, d, 1.0),
        *filter_peers.ridge_refits(x, d, 1.0),
        *filter_peers.nlms(x, d, 0.5, 1e-3),
        *filter_peers.kernel_regression(x, d, 1.0),
        *filter_peers.kernel_ridge(x, d, 1.0, 1.0),
        *filter_peers.affine_projection(x, d, 0.5, 1e-3, 2),
    ]
    assert len(peers) == 9 and all(isinstance(peer, Skipped) for peer in peers)
    assert all("is not installed" in peer.reason or "does not import" in peer.reason for peer in peers)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(questions, "available_backends", lambda: {"numpy": "ok", "cupy": "no driver"})
    first, second = questions.backends_of(case())
    assert isinstance(first, Contender) and second == Skipped("cupy", "no driver")


# Over lengths


def rows(**times: list[float]) -> list[dict[str, Any]]:
    return [
        {"T": 64 << i, "seconds": {name: {"median": each[i]} for name, each in times.items()}}
        for i in range(len(next(iter(times.values()))))
    ]


def test_the_crossover_is_where_it_stays_faster():
    linear = [2.0, 2.0, 2.0, 2.0]
    assert lengths.faster_from(rows(linear_attention=linear, other=[3.0, 1.0, 3.0, 4.0]), "other") == 256
    assert lengths.faster_from(rows(linear_attention=linear, other=[3.0, 3.0, 3.0, 2.0]), "other") is None
    assert lengths.faster_from(rows(linear_attention=linear, other=[3.0, 3.0, 3.0, 3.0]), "other") == 64


def test_growth_counts_from_4096_on():
    costs = [{"T": t, "ns_per_token_head": ns} for t, ns in ((1024, 90.0), (4096, 10.0), (8192, 11.0), (65536, 12.0))]
    assert lengths.growth(costs) == pytest.approx(0.2)
    assert lengths.growth(costs[:2]) is None


def test_a_wrong_operator_is_not_timed_over_lengths(monkeypatch):
    monkeypatch.setattr(lengths, "reference", lambda case: np.zeros(1))
    monkeypatch.setattr(lengths, "best_backend", lambda operator: "numpy")
    found = lengths.scaling("delta_rule", "", TINY, [8, 16], 1, RNG, 1.0)
    assert found["rows"] == [] and "wrong" in found["reason"]


def test_the_cost_of_a_sum_stands_beside_those_of_operators():
    found = lengths.sums(TINY, [8, 16], 1, RNG, 1.0)
    assert [row["T"] for row in found["rows"]] == [8, 16] and found["growth"] is None
    for row in found["rows"]:
        assert row["ns_per_token_head"] * row["T"] * TINY.heads == pytest.approx(1e9 * row["seconds"]["median"])


# What a result says


def answer(contender: str, ms: float, around: float = 0.0, gemm_share: float | None = None) -> dict[str, Any]:
    seconds = {"median": 1e-3 * ms, "p20": 1e-3 * (ms - around), "p80": 1e-3 * (ms + around)}
    return {"contender": contender, "seconds": seconds, "gemm_share": gemm_share}


def test_a_summary_compares_our_best_with_each_peers_best():
    entry = {
        "operator": "mesa",
        "variant": "scalar",
        "shape": {"B": 1, "H": 8, "T": 2048, "D": 64},
        "results": [
            *(answer("numpy", 9.0), answer("numba", 4.0, 1.0, 0.5)),
            *(answer("torch 30 CG", 24.0), answer("torch 30 CG compiled", 22.0), answer("fla naive", 6.0, 2.0)),
        ],
        "yardsticks": {"empty compiled call": answer("", 1.0)["seconds"]},
    }
    scales = [{"operator": name, "variant": "", "growth": growth} for name, growth in (("dplr", 0.1), ("mesa", None))]
    crossover = {"D": 64, "from": {"torch SDPA": 512, "other": None}}
    found = {"questions": [entry], "crossover": crossover, "scaling": scales}
    found["summary"] = summary.summary(found)
    text = " ".join(report.summary_table(found).split())
    assert "mesa scalar, D 64 T 2048 numba 4.00 50 % of GEMM, 5.5x torch 30 CG compiled (goal 5x)" in text
    assert ", ~1.5x fla naive, 4.0x the time of an empty compiled call" in text
    assert "512 tokens on: torch SDPA, never tokens on: other" in text and "10 % dplr" in text and len(scales) == 2
    assert [claim["sure"] for claim in found["summary"]][:3] == [None, True, False]


def test_every_goal_is_of_a_question_and_a_contender_that_exist():
    setting = questions.Setting(lengths=(16,), widths=(8,), heads=1, compiled=False)
    for (operator, variant), goals in summary.GOALS.items():
        name = "nlms" if "NLMS" in variant else operator
        every = questions.QUESTIONS[name](setting)
        asked = [question for question in every if variant in (question.case.variant, summary.EVERY)]
        names = {"of GEMM", *torch_peers.FORMS.get(operator, ()), *(c.name for q in asked for c in q.contenders)}
        assert asked and {*goals} <= names


def test_a_reason_is_told_once_and_once_for_all_it_holds_for():
    skipped = [{"contender": name, "reason": "no driver"} for name in ("cupy", "numba-cuda")]
    entry = {"operator": "mesa", "variant": "", "shape": dict.fromkeys("BHTD", 1), "dtype": "float32", "results": []}
    entry |= {"skipped": skipped, "yardsticks": {}, "gemm_flop_per_second": 1e9}
    told: set[str] = set()
    assert "skipped: cupy, numba-cuda: no driver" in report.entry_table(entry, told)
    assert "no driver" not in report.entry_table(entry, told)


# python -m benchmarks.run


@pytest.fixture
def numpy_only(monkeypatch):
    """No compiling: the machinery is the same."""
    only = {"numpy": "ok", "numba": "left out here"}
    for module in (questions, lengths):
        monkeypatch.setattr(module, "available_backends", lambda: only)
    monkeypatch.setattr(measure, "GEMM", 32)
    monkeypatch.setattr(torch_peers, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "LINEAR", {"linear_attention": ("", "channel")})


def check_entry(entry: dict[str, Any]) -> None:
    """One question of a result."""
    assert entry.keys() == {
        *("operator", "variant", "shape", "dtype", "flop_per_token_head", "gemm_flop_per_second"),
        *("results", "skipped", "yardsticks"),
    }
    assert entry["operator"] in ttr_np.operators.__all__ and entry["shape"].keys() == set("BHTD")
    for found in entry["results"]:
        assert found.keys() == RESULT | {"ns_per_token_head", "gemm_share", "over_ours"}
        assert found["error"] >= 0 and found["seconds"]["median"] > 0
    for found in entry["skipped"]:
        assert found.keys() == {"contender", "reason"} and found["reason"]


def check_result(result: dict[str, Any]) -> None:
    """A whole result, as it is committed."""
    assert result.keys() == {
        *("date", "commit", "command", "machine", "threads", "rounds", "seed", "gemm_flop_per_second"),
        *("questions", "crossover", "scaling", "summary"),
    }
    assert {"ttr_np", "python", "packages", "platform", "processor", "cores", "load"} <= result["machine"].keys()
    assert {"1", str(result["threads"])} == result["gemm_flop_per_second"].keys()
    for entry in result["questions"]:
        check_entry(entry)
    for entry in result["scaling"]:
        assert {"operator", "variant", "backend", "D", "rows", "growth"} <= entry.keys()
    for claim in result["summary"]:
        assert claim.keys() == {"about", "ours", "seconds", "what", "reached", "unit", "goal", "sure"}


@pytest.mark.filterwarnings("ignore")
def test_a_run_prints_and_writes_json_and_a_figure(numpy_only, capsys, tmp_path):
    options = ["--quick", "--lengths", "16", "--widths", "4", "--heads", "2", "--rounds", "2", "--threads", "1"]
    files = ["--json", str(tmp_path / "r.json")]
    if has_matplotlib():
        files += ["--plot", str(tmp_path / "r.png")]
    assert run.main(["linear_attention", "nlms", "decode", "lengths", *options, *files]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    check_result(result)
    assert len(result["questions"]) == 3 + 2 + 3 and result["crossover"]["rows"] and len(result["scaling"]) == 3
    assert not has_matplotlib() or (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "linear_attention, channel: B 1 H 2 T 16 D 4 float32" in out
    assert "skipped: numba: left out here" in out and "skipped: torch: torch is not installed" in out
    assert "linear_attention is " in out and "growth from 4k" in out and "\nSummary" in out
    assert result["command"][:4] == ["linear_attention", "nlms", "decode", "lengths"]


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    "arguments",
    [
        *(["nosuch"], ["--lengths", "0"], ["--rounds", "0"], ["--threads", "0"], ["--widths", "x"], ["--seed", "-1"]),
        *(["--json", "nosuch/r.json"], ["--plot", "r.gif"], ["--budget", "nan"]),
    ],
)
def test_a_wrong_option_is_refused_before_the_work(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        run.main(arguments)
    assert refused.value.code == 2 and "error:" in capsys.readouterr().err


COMMITTED = sorted((Path(run.__file__).parent / "results").glob("cpu-*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.name)
def test_committed_results_have_the_form_that_is_written_today(path):
    check_result(json.loads(path.read_text(encoding="utf-8")))


# ttr compare


COMPARE = ["compare", "--shape", "1,2,8,4", "--rounds", "2", "--backends", "numpy"]


def test_compare_prints_every_operator_and_writes_json_and_a_figure(capsys, tmp_path):
    files = ["--json", str(tmp_path / "c.json")]
    if has_matplotlib():
        files += ["--plot", str(tmp_path / "c.png")]
    assert main([*COMPARE, *files]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "c.json").read_text())
    assert [entry["operator"] for entry in result["operators"]] == list(ttr_np.notation.OPERATORS)
    for entry in result["operators"]:
        assert entry["skipped"] == [] and entry["operator"] in out
        (found,) = entry["results"]
        assert found.keys() == RESULT and found["error"] <= measure.TOLERANCE["float32"]
    for name, reason in ttr_np.available_backends().items():
        assert reason == "ok" or (result["unavailable"][name] == reason and reason in " ".join(out.split()))
    assert not has_matplotlib() or (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, out.splitlines())) <= 120


def test_compare_prints_json_alone(capsys):
    assert main([*COMPARE, "--operators", "delta_rule,mesa", "--decay", "none", "--dtype", "float64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dtype"] == "float64" and [entry["variant"] for entry in result["operators"]] == ["", ""]
    assert all(entry["results"][0]["error"] == 0 for entry in result["operators"])


def test_compare_says_what_does_not_run(capsys, monkeypatch):
    compare = sys.modules["ttr_np.cli.compare"]
    monkeypatch.setattr(compare, "has_operator", lambda backend, operator: operator != "mesa")
    assert main([*COMPARE, "--operators", "mesa,delta_rule"]) == 0
    assert "not run: mesa: numpy: has no such operator" in capsys.readouterr().out
    assert main([*COMPARE, "--operators", "softmax_attention", "--decay", "channel"]) == 0
    out = capsys.readouterr().out
    assert "not run: softmax_attention: reference: " in out and "log_decay" in out
    assert main([*COMPARE, "--shape", "1,1,64,4", "--operators", "delta_rule", "--budget", "0"]) == 0
    assert "needs more than the 0 s allowed" in capsys.readouterr().out


def test_compare_takes_a_beginning_where_all_would_break_the_budget(capsys, monkeypatch):
    compare = sys.modules["ttr_np.cli.compare"]

    def slow(case: Case) -> np.ndarray:
        sleep(1e-3 * case.arrays["q"].shape[-2])
        return reference(case)

    monkeypatch.setattr(compare, "reference", slow)
    options = ["--operators", "delta_rule", "--budget", "0.4", "--json", "-"]
    assert main([*COMPARE, "--shape", "1,1,4000,4", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    (entry,) = result["operators"]
    assert 0 < entry["T"] <= 40 and entry["results"]
    out = compare.report(result)
    assert f"delta_rule, T {entry['T']} numpy" in out and "on a beginning: delta_rule: the float64 solver" in out


@pytest.mark.parametrize("d", [64, 256])
def test_gates_are_soft_enough_for_least_squares_in_float32(d):
    arrays = draw("recursive_least_squares", RNG, optional=("log_decay",), per_channel=False, t=6 * d, k=d)
    one = Case("recursive_least_squares", "", measure.softened({n: x.astype(np.float32) for n, x in arrays.items()}))
    assert all(x.dtype == np.float32 for x in one.arrays.values())
    assert relative_error(ours(one, "numpy").call(), reference(one)) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "1,2,3"], "--shape needs four integers B,H,T,D, got '1,2,3'"),
        (["--shape", "1,2,x,4"], "--shape needs four integers"),
        (["--shape", "1,0,8,4"], "H is 0"),
        (["--operators", "delta_rul"], "unknown operator 'delta_rul'"),
        (["--backends", "cudnn"], "unknown backend 'cudnn'"),
        (["--rounds", "0"], "rounds must be an integer of at least 1"),
        (["--budget", "-1"], "budget must be a number of seconds, got -1"),
        (["--budget", "nan"], "budget must be a number of seconds, got nan"),
        (["--threads", "0"], "threads must be an integer of at least 1"),
        (["--seed", "-1"], "seed must be an integer of at least 0"),
        (["--dtype", "int8"], "--dtype"),
        (["--json", "nosuch/x.json"], "cannot write nosuch/x.json"),
        (["--plot", "x.gif"], "--plot writes .png"),
    ],
)
def test_compare_refuses_in_one_line(arguments, words, capsys):
    assert main(["compare", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and words in printed.err
