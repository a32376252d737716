"""The ``ttr`` command: what it prints, what it refuses, and that its scores are those of the definition."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ttr_np
from ttr_np.cli import main
from ttr_np.text_recall import (
    DISTANCES,
    BadInput,
    breaks,
    compile_ahead,
    continuations,
    decode,
    default_text,
    embeddings,
    inside,
    last_seen,
    stream,
    text_recall,
    tokenize,
)

TEXT = "the cat saw the dog. the cat saw the bird; the dog saw the cat. a bird saw a dog, the cat saw it all."


@dataclass(frozen=True)
class Stub:
    """A layer small enough to predict."""

    answer: Any
    operator: str | None = "linear_attention"
    data: tuple[str, ...] = ("q", "k", "v")
    reason: str = ""
    weights: str | None = "uniform"
    regressor: str | None = "linear"
    optimizer: str | None = "one step"
    paper: str = "Author et al. (2020), arXiv:2006.16236"
    gates: dict[str, Any] = field(default_factory=dict)
    carries: tuple[str, ...] = ()
    route: Any = None

    def __call__(self, q: Any, k: Any, v: Any, **common: Any) -> Any:
        return self.answer(q, k, v)


def superpose(q: Any, k: Any, v: Any) -> np.ndarray:
    """Linear attention, written out."""
    return np.stack([sum((q[t] @ k[i]) * v[i] for i in range(t + 1)) for t in range(len(q))])


def latest(q: Any, k: Any, v: Any) -> np.ndarray:
    """A perfect memory of the last pair stored under each key."""
    return np.stack([max((np.round(q[t] @ k[i], 3), i, v[i].tolist()) for i in range(t + 1))[2] for t in range(len(q))])


def interrupted(q: Any, k: Any, v: Any) -> Any:
    raise KeyboardInterrupt


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stub]:
    """A table of layers that holds every case."""
    layers = {
        "superpose": Stub(superpose),
        "latest": Stub(
            latest,
            "delta_rule",
            weights="decaying",
            optimizer="online",
            gates={"beta": SimpleNamespace(text="sigmoid(x)")},
        ),
        "silent": Stub(lambda q, k, v: np.full_like(v, np.nan)),
        "zero": Stub(lambda q, k, v: np.zeros_like(v)),
        "scan": Stub(superpose, "diagonal_scan", data=("x",)),
        "pairless": Stub(superpose, data=("q", "k")),
        "unserved": Stub(superpose, None, reason="its loss | is not a square"),
        "unknown": Stub(superpose, None, weights=None, regressor=None, optimizer=None, reason="nobody knows how"),
    }
    monkeypatch.setattr(ttr_np, "layers", layers, raising=False)
    monkeypatch.setattr(sys.modules["ttr_np.text_recall"], "compile_ahead", lambda names: None)  # nobody calls a kernel
    return layers


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A small text on disk."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line with which the command refuses."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ttr: ") and printed.err.count("\n") == 1
    return printed.err


# The experiment


def brute_force(name: str, layers: dict[str, Stub], dimension: int, seed: int) -> tuple[float, list[float | None], int]:
    """The score as its docstring defines it, one token at a time, by distances between vectors."""
    tokens = tokenize(TEXT)
    words = list(dict.fromkeys(tokens))
    E = embeddings(len(words), dimension, seed)
    e = np.stack([E[words.index(token)] for token in tokens])
    hits: dict[int, list[bool]] = {}
    for t in range(1, len(tokens) - 1):
        if tokens[t] not in tokens[:t]:
            continue
        o = layers[name](e[1 : t + 1], e[:t], e[1 : t + 1])[-1]
        o = o / np.linalg.norm(o)
        nearest = min(range(len(words)), key=lambda i, o=o: np.sum((o - E[i]) ** 2))
        since = next(d for d in range(1, t + 1) if tokens[t - d] == tokens[t])
        hits.setdefault(since, []).append(words[nearest] == tokens[t + 1])
    every = [hit for group in hits.values() for hit in group]
    bins = [[hit for d, group in hits.items() if low <= d <= high for hit in group] for low, high in BINS]
    return float(np.mean(every)), [float(np.mean(group)) if group else None for group in bins], len(every)


BINS = ((1, 3), (4, 15), (16, 63), (64, 255), (256, 10**9))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["superpose", "latest"])
def test_scores_are_those_of_the_definition(table, name, seed):
    recall, by_distance, count = brute_force(name, table, 6, seed)
    result = text_recall(TEXT, layers=[name], dimension=6, seed=seed)
    (entry,) = result["layers"]
    assert entry["recall"] == pytest.approx(recall, abs=1e-12)
    assert entry["by_distance"] == pytest.approx(by_distance, abs=1e-12)
    assert result["text"]["scored"] == count
    assert [x["scored"] for x in result["distances"]][-2:] == [0, 0]


def test_a_perfect_memory_of_the_last_pair_is_the_first_baseline(table):
    result = text_recall(TEXT, layers=["latest"], dimension=256)
    assert result["layers"][0]["recall"] == result["baselines"][0]["recall"] > 0
    assert result["layers"][0]["by_distance"] == result["baselines"][0]["by_distance"]


def test_baselines_count_only_the_past():
    ids = [0, 1, 0, 2, 0, 1, 0, 2, 0]
    counted = continuations(ids)
    assert counted["last continuation seen"].tolist() == [-1, -1, 1, -1, 2, 0, 1, 0, 2]
    #                              at 4 one each: the latest; at 6 two of 1; at 8 two each: the latest
    assert counted["most frequent continuation seen"].tolist() == [-1, -1, 1, -1, 2, 0, 1, 0, 2]
    ids = [0, 1, 0, 1, 0, 2, 0]
    assert continuations(ids)["last continuation seen"][-1] == 2
    assert continuations(ids)["most frequent continuation seen"][-1] == 1
    for cut in range(len(ids)):
        for name, guess in continuations(ids[:cut]).items():
            assert guess.tolist() == continuations(ids)[name][:cut].tolist()


def test_a_distance_counts_tokens_since_the_last_occurrence():
    assert last_seen([3, 3, 5, 3, 5]).tolist() == [0, 1, 0, 2, 2]
    assert last_seen([]).tolist() == []


def test_both_ends_of_a_bin_belong_to_it_and_every_distance_to_one_bin():
    since = np.arange(1, 1000)
    found = np.stack([inside(since, low, high) for low, high in DISTANCES])
    assert found.sum(axis=0).tolist() == [1] * len(since)
    assert found.argmax(axis=0)[[0, 2, 3, 14, 15, 62, 63, 254, 255]].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_decoding_in_blocks_is_decoding_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    E, o = embeddings(50, 8, 0), rng.standard_normal((37, 8))
    o[5], o[6, 2], o[7, 0] = 0, np.nan, np.inf
    whole = decode(o, E)
    monkeypatch.setattr(sys.modules["ttr_np.text_recall"], "BLOCK", 150)
    assert decode(o, E).tolist() == whole.tolist()
    assert whole[5:8].tolist() == [-1, -1, -1]
    for t in set(range(37)) - {5, 6, 7}:
        assert whole[t] == np.argmin(np.sum((o[t] - E) ** 2, axis=1))


def test_scaling_an_output_changes_no_answer():
    E, o = embeddings(50, 8, 0), np.random.default_rng(1).standard_normal((20, 8))
    assert decode(1e-6 * o, E).tolist() == decode(o, E).tolist() == decode(1e6 * o, E).tolist()


def test_the_memory_is_asked_as_the_issue_says(table):
    data = stream(tokenize(TEXT), 6, 0)
    asked = {}

    def record(q, k, v):
        asked.update(q=q, k=k, v=v)
        return v

    table["record"] = Stub(record)
    text_recall(TEXT, layers=["record"], dimension=6)
    e = data.E[data.ids]
    np.testing.assert_array_equal(asked["k"], e[:-1])
    np.testing.assert_array_equal(asked["v"], e[1:])
    np.testing.assert_array_equal(asked["q"], e[1:])


def test_the_same_seed_gives_the_same_recall_and_another_seed_another_embedding(table):
    first, again = (text_recall(TEXT, dimension=5, seed=7) for _ in range(2))
    for result in (first, again):
        result.pop("seconds")
        for entry in result["layers"]:
            for run in entry["runs"]:
                run.pop("seconds"), run.pop("tokens_per_second")
    assert first == again
    assert not np.array_equal(embeddings(9, 5, 7), embeddings(9, 5, 8))


def test_layers_are_sorted_by_recall_and_the_others_have_reasons(table):
    result = text_recall(TEXT, dimension=64)
    recalls = [entry["recall"] for entry in result["layers"]]
    assert recalls == sorted(recalls, reverse=True)
    assert {entry["name"] for entry in result["not_run"]} == {"scan", "pairless", "unserved", "unknown"}
    assert all(entry["reason"] for entry in result["not_run"])
    silent = {entry["name"]: entry for entry in result["layers"]}["silent"]
    assert silent["recall"] == 0 and silent["unanswered"] == result["text"]["scored"]


def test_a_layer_without_an_operator_runs_when_it_is_named(table):
    result = text_recall(TEXT, layers=["unserved", "superpose"], dimension=32)
    (a, b) = result["layers"]
    assert a["recall"] == b["recall"]
    assert {run["backend"] for entry in (a, b) for run in entry["runs"]} > {"definition"}


def test_a_layer_beyond_the_budget_is_told_and_not_run(table):
    result = text_recall(TEXT, budget=0.0)
    assert not result["layers"]
    assert "allowed" in {entry["name"]: entry["reason"] for entry in result["not_run"]}["superpose"]
    assert text_recall(TEXT, budget=0.0, layers=["superpose"])["layers"]


@pytest.mark.parametrize(("power", "fits"), [(1, True), (2, False), (3, False)])
def test_the_budget_holds_for_layers_whose_time_grows_faster_than_the_text(table, monkeypatch, power, fits):
    """A clock that only the layer moves: a full pass of 4000 pairs takes 4, 32 and 32 s, a linear guess sees 4 s."""
    now = [0.0]
    cost = {1: lambda t: t / 1000, 2: lambda t: 2e-6 * t**2, 3: lambda t: 5e-10 * t**3}[power]

    def slow(q: Any, k: Any, v: Any) -> Any:
        now[0] += cost(len(q))
        return v

    monkeypatch.setattr(sys.modules["ttr_np.text_recall"], "perf_counter", lambda: now[0])
    monkeypatch.setattr(ttr_np, "layers", {"slow": Stub(slow)})
    result = text_recall(" ".join("ab" * 2001), length=4001, budget=15.0, backends=["numpy"], dimension=4)
    assert bool(result["layers"]) is fits
    assert fits or now[0] < 15.0 and "15 s allowed" in result["not_run"][0]["reason"]


@pytest.mark.parametrize(("scale", "longest"), [(1e-6, 4), (1e-4, 16), (5e-4, 64), (4e-3, 256)])
def test_no_longer_beginning_is_run_than_is_needed_to_judge(scale, longest):
    asked: list[int] = []
    assert not breaks(15.0, 1024, lambda count: asked.append(count) or scale * count)
    assert max(asked) == longest


def test_what_is_compiled_ahead_is_this_package_and_no_copy_in_the_working_directory(monkeypatch, tmp_path):
    (tmp_path / "ttr_np").mkdir()
    (tmp_path / "ttr_np" / "__init__.py").write_text("raise SystemExit('the copy')")
    monkeypatch.chdir(tmp_path)
    asked, start = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: asked.append((command, options)))
    compile_ahead(["linear_attention", "softmax", "delta_rule", "ttt_linear", "rwkv7"])
    ((command, options),) = asked
    done = start([*command[:3], "--help"], **options | {"text": True})
    assert done.returncode == 0 and "the copy" not in done.stderr


def test_a_backend_without_the_operator_is_a_reason(table, monkeypatch):
    monkeypatch.setattr(sys.modules["ttr_np.text_recall"], "has_operator", lambda backend, operator: False)
    reasons = {entry["reason"] for entry in text_recall(TEXT, layers=["superpose"])["not_run"]}
    assert reasons == {"no 'linear_attention' in " + ", ".join(text_recall(TEXT, layers=["superpose"])["backends"])}


def test_the_default_text_is_long_and_the_same_each_time():
    assert default_text() == default_text()
    assert len(tokenize(default_text())) > 20_000


@pytest.mark.parametrize(
    "options",
    [
        {"dimension": 0},
        {"dimension": 2.5},
        {"dimension": True},
        {"length": 1},
        {"seed": -1},
        {"layers": ["nosuch"]},
        {"backends": ["nosuch"]},
        {"text": "one"},
        {"text": ""},
    ],
)
def test_bad_arguments_are_value_errors(table, options):
    with pytest.raises(BadInput):
        text_recall(**{"text": TEXT} | options)
    assert issubclass(BadInput, ValueError)


def test_progress_counts_every_layer(table):
    steps = []
    text_recall(TEXT, dimension=4, progress=lambda *step: steps.append(step))
    assert [step[0] for step in steps] == list(range(len(table) + 1))
    assert [step[2] for step in steps] == [*table, ""]


def test_the_environment_names_the_backend_where_the_caller_names_none(table, monkeypatch):
    everything = text_recall(TEXT, layers=["superpose"])["backends"]
    assert everything == [name for name, state in ttr_np.available_backends().items() if state == "ok"]
    monkeypatch.setenv("TTR_BACKEND", "auto")
    result = text_recall(TEXT, layers=["superpose", "latest"])
    assert result["backends"] == ["auto"]
    able = {entry["name"]: [run["backend"] for run in entry["runs"]] for entry in result["layers"]}
    assert able["superpose"] == [ttr_np.resolve_backend("linear_attention", backend="auto")]
    assert able["latest"] == [ttr_np.resolve_backend("delta_rule", backend="auto")]
    monkeypatch.setenv("TTR_BACKEND", "numpy")
    assert text_recall(TEXT, layers=["superpose"])["backends"] == ["numpy"]
    assert text_recall(TEXT, layers=["superpose"], backends=["auto"])["backends"] == ["auto"]
    monkeypatch.setenv("TTR_BACKEND", "")
    assert text_recall(TEXT, layers=["superpose"])["backends"] == everything


def test_a_backend_is_not_run_twice_under_its_name_and_as_auto(table):
    name = ttr_np.resolve_backend("linear_attention", backend="auto")
    (entry,) = text_recall(TEXT, layers=["superpose"], backends=["auto", name])["layers"]
    assert [run["backend"] for run in entry["runs"]] == [name]


# ttr recall


def test_the_table_is_aligned_sorted_and_fits(table, file, capsys):
    table["a_layer_with_quite_a_long_name"] = Stub(superpose, weights="w" * 40, regressor="r" * 40, optimizer="o" * 40)
    assert main(["recall", "--text", file, "--dimension", "32"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 120
    head = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    end = lines.index("", head)
    rows = lines[head + 2 : end]
    assert "a_layer_with_quite_a_long_name" in printed.out
    place = lines[head].index("recall") + len("recall")
    recalls = [float(row[:place].split()[-1]) for row in rows]
    assert recalls == sorted(recalls, reverse=True) and len(rows) == 5 + 2
    assert "not run: scan: takes x" in printed.out and "not run: unserved" in printed.out


def test_json_has_all_of_the_result(table, file, capsys, tmp_path):
    assert main(["recall", "--text", file, "--dimension", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        *("ttr_np", "python", "numpy", "platform", "cores", "text", "dimension", "seed", "dtype", "backends"),
        *("distances", "baselines", "layers", "not_run", "seconds"),
    }
    assert set(result["text"]) == {"source", "tokens", "used", "words", "scored"}
    for entry in result["layers"]:
        assert set(entry) == {
            *("name", "weights", "regressor", "optimizer", "operator", "paper"),
            *("recall", "by_distance", "unanswered", "runs"),
        }
        assert len(entry["by_distance"]) == len(result["distances"])
        for run in entry["runs"]:
            assert run["seconds"] > 0
            assert run["tokens_per_second"] == pytest.approx((result["text"]["used"] - 1) / run["seconds"])
    path = tmp_path / "result.json"
    assert main(["recall", "--text", file, "--dimension", "8", "--json", str(path)]) == 0
    assert capsys.readouterr().out.startswith("Recall")
    assert json.loads(path.read_text())["baselines"] == result["baselines"]


def test_layers_and_backends_are_named_with_commas_or_again(table, file, capsys):
    names = ["--layers", "latest, zero", "--layers", "superpose", "--layers", "latest"]
    assert main(["recall", "--text", file, *names, "--backend", "numpy", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(entry["name"] for entry in result["layers"]) == ["latest", "superpose", "zero"]
    assert result["backends"] == ["numpy"]


def test_length_and_mark_of_the_file(table, tmp_path, capsys):
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert main(["recall", "--text", str(path), "--length", "12", "--json", "-"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text["used"] == 12 and text["tokens"] == len(tokenize(TEXT))


def test_two_tokens_are_enough_to_run_and_too_few_to_score(table, tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("a b", encoding="utf-8")
    assert main(["recall", "--text", str(path)]) == 0
    assert main(["recall", "--text", str(path), "--json"]) == 0
    assert '"recall": null' in capsys.readouterr().out


def test_standard_input_is_a_text(table, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert main(["recall", "--text", "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"]["tokens"] == len(tokenize(TEXT))


def test_bad_files_get_one_line(table, tmp_path, capsys):
    assert "cannot read nosuch.txt: No such file" in refused(capsys, "recall", "--text", "nosuch.txt")
    assert "s a directory" in refused(capsys, "recall", "--text", str(tmp_path))
    path = tmp_path / "bad.txt"
    for content, words in [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"word", "has 1 token;"),
        (b"good \xff bad", "not UTF-8: byte 0xff at offset 5"),
        (b"\xef\xbb\xbfgood \xff bad", "not UTF-8: byte 0xff at offset 8"),
        ("\N{EURO SIGN}".encode()[:2], "not UTF-8: byte 0xe2 at offset 0"),
        ("mixed".encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
    ]:
        path.write_bytes(content)
        assert words in refused(capsys, "recall", "--text", str(path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "superpoze"], "unknown layer 'superpoze'; did you mean superpose?"),
        (["--layers", "xyzzy"], "unknown layer 'xyzzy'; `ttr layers` lists them"),
        (["--layers", ","], "was given none"),
        (["--layers", ""], "was given none"),
        (["--dimension", "0"], "dimension must be an integer of at least 1, got 0"),
        (["--dimension", "1.5"], "--dimension: invalid int value: '1.5'"),
        (["--length", "1"], "length must be an integer of at least 2, got 1"),
        (["--length", "many"], "--length: invalid int value"),
        (["--seed", "-1"], "seed must be an integer of at least 0, got -1"),
        (["--backend", "cudnn"], "unknown backend 'cudnn'; the backends are numpy"),
        (["--json", "nosuch/result.json"], "cannot write nosuch/result.json: No such file"),
        (["--json", "."], "cannot write .: Is a directory"),
        (["--plot", "figure.gif"], "--plot writes .png"),
        (["--nosuch"], "unrecognized arguments: --nosuch"),
        (["--layers", "scan"], "no layer can run: scan: takes x: a scan has no keys to recall by"),
        (["--layers", "scan", "--json"], "no layer can run: scan: takes x"),
        (["--layers", "scan,unknown"], "recall by; unknown: not expressed yet"),
        (["--budget", "-3"], "budget must be a number of seconds, got -3"),
        (["--budget", "nan"], "budget must be a number of seconds, got nan"),
        (["--budget", "0"], "and 3 others: one pass needs more than the 0 s allowed"),
    ],
)
def test_bad_options_get_one_line(table, file, capsys, arguments, words):
    assert words in refused(capsys, "recall", "--text", file, *arguments)


def hungry(q: Any, k: Any, v: Any) -> Any:
    raise MemoryError("Unable to allocate 36.4 PiB")


def test_what_does_not_fit_in_memory_gets_one_line(table, file, capsys, monkeypatch):
    table["hungry"] = Stub(hungry)
    line = refused(capsys, "recall", "--text", file, "--layers", "hungry")
    assert "hungry: not enough memory: Unable to allocate 36.4 PiB" in line
    assert {entry["name"] for entry in text_recall(TEXT, layers=["zero", "hungry"])["layers"]} == {"zero"}
    line = refused(capsys, "recall", "--text", file, "--dimension", str(10**14))
    assert f"dimension {10**14} needs more memory than there is: Unable to allocate" in line
    monkeypatch.setattr(sys.modules["ttr_np.cli.config"], "run", lambda arguments: hungry(0, 0, 0))
    assert "not enough memory: Unable to allocate" in refused(capsys, "config")


@pytest.mark.parametrize("command", ["recall", "layers", "config"])
def test_an_unknown_backend_in_the_environment_gets_one_line(table, capsys, monkeypatch, command):
    monkeypatch.setenv("TTR_BACKEND", "foo")
    assert "unknown backend 'foo' in the environment variable TTR_BACKEND" in refused(capsys, command)


def test_auto_is_a_backend(table, file, capsys):
    assert main(["recall", "--text", file, "--backend", "auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"] == ["auto"]


def test_a_backend_that_cannot_run_says_why(table, file, capsys):
    states = ttr_np.available_backends()
    for name in [name for name, state in states.items() if state != "ok"]:
        assert states[name] in refused(capsys, "recall", "--text", file, "--backend", name)


def test_paths_are_checked_before_the_work_and_left_alone(table, file, capsys, tmp_path):
    table["superpose"] = Stub(interrupted)
    assert "cannot write" in refused(capsys, "recall", "--text", file, "--json", str(tmp_path / "no" / "x.json"))
    path = tmp_path / "kept.json"
    path.write_text("kept")
    for name in ("kept.json", "new.json"):
        assert main(["recall", "--text", file, "--json", str(tmp_path / name)]) == 130
    assert path.read_text() == "kept" and not (tmp_path / "new.json").exists()


def test_ctrl_c_is_130_without_a_traceback(table, file, capsys):
    table["superpose"] = Stub(interrupted)
    assert main(["recall", "--text", file]) == 130
    assert capsys.readouterr().err == "\nttr: interrupted\n"


def test_progress_only_on_a_terminal(table, file, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["recall", "--text", file]) == 0
    assert "superpose" in sys.stderr.getvalue() and sys.stderr.getvalue().endswith("\r\033[K")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert main(["recall", "--text", file]) == 0
    assert sys.stderr.getvalue() == ""


def test_a_plot_without_matplotlib_names_the_extra(table, file, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "ttr_np.cli.recall_plot", raising=False)
    monkeypatch.setattr(ttr_np.cli, "recall_plot", None, raising=False)
    monkeypatch.delattr(ttr_np.cli, "recall_plot")
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    line = refused(capsys, "recall", "--text", file, "--plot", "figure.png")
    assert "pip install 'ttr_np[plot]'" in line and not os.path.exists("figure.png")


def test_a_plot_has_a_bar_for_each_layer_and_a_line_for_each_baseline(table, file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from ttr_np.cli.recall_plot import figure

    path = tmp_path / "figure.png"
    assert main(["recall", "--text", file, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    capsys.readouterr()
    assert main(["recall", "--text", file, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    bars, lines, _ = figure(result).axes
    assert len(bars.patches) == len(result["layers"])
    assert len(lines.lines) == 2 + len({(entry["regressor"], entry["optimizer"]) for entry in result["layers"]})
    empty = text_recall("a b", layers=["scan"])
    empty["text"]["source"] = "text"
    figure(empty).canvas.draw()


# ttr layers, ttr config, ttr


def test_layers_print_the_table_and_the_reasons(table, capsys):
    assert main(["layers"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in table)
    assert "unserved: its loss | is not a square" in out and "beta: sigmoid(x)" in out


def test_layers_as_markdown_has_one_row_each_with_escaped_bars(table, capsys):
    assert main(["layers", "--markdown"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(table)
    assert {row.replace("\\|", "").count("|") for row in rows} == {8}
    assert "(https://arxiv.org/abs/2006.16236)" in rows[2]


def test_layers_as_json_is_the_table(table, capsys):
    assert main(["layers", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == list(table)
    assert entries[1]["gates"] == {"beta": "sigmoid(x)"}
    assert entries[-1]["operator"] is None and entries[-1]["weights"] == "-"


def test_layers_as_json_says_where_each_runs_and_whether_its_memories_merge(capsys):
    assert main(["layers", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["kda"]["backends"] == ["numpy", "numba", "numba-cuda", "cupy"]
    assert entries["affine_projection"]["backends"] == ["numpy", "numba"] and entries["hla"]["backends"] == []
    assert entries["kda"]["why_not_merged"] == "" and "pairs" in entries["qknorm"]["why_not_merged"]


def test_config_says_what_a_bug_report_needs(capsys):
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    assert "numpy" in out and ttr_np.__version__ in out


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ttr_np {ttr_np.__version__}\n"
    for arguments in (["--help"], ["recall", "--help"], ["layers", "--help"], ["config", "--help"]):
        assert main(arguments) == 0
        assert "usage: ttr" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["recal"], ["layers", "--json", "--markdown"]])
def test_a_wrong_command_gets_one_line(capsys, arguments):
    assert "ttr" in refused(capsys, *arguments)


# As a process


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600, **options)


def test_the_module_runs_as_the_command():
    done = python("-m", "ttr_np", "recall", "--layers", "linear_attention,delta_rule", "--length", "200", "--json", "-")
    assert done.returncode == 0 and done.stderr == ""
    assert {entry["name"] for entry in json.loads(done.stdout)["layers"]} == {"linear_attention", "delta_rule"}
    refused = python("-m", "ttr_np", "recall", "--layers", "delta_rulle")
    assert refused.returncode == 2 and "did you mean delta_rule" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "ttr_np", "config"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_gets_one_line(file, tmp_path, capsys):
    figure = tmp_path / "full.png"
    figure.symlink_to("/dev/full")
    for option in (["--json", "/dev/full"], ["--plot", str(figure)]):
        assert main(["recall", "--text", str(file), "--layers", "retnet", *option]) == 2
        assert re.fullmatch(r"ttr: .*No space left on device.*\n", capsys.readouterr().err)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ttr_np", "layers"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and re.fullmatch(r"ttr: .*No space left on device.*\n", done.stderr)


def test_streams_that_a_daemon_has_closed_are_not_missed(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["layers"]) == 0
    assert main(["recall", "--text", "-"]) == main(["recall", "--layers", "no_such_layer"]) == 2
    for opened in (sys.stdin, sys.stdout, sys.stderr):
        opened.close()


def test_matplotlib_is_imported_for_a_plot_only():
    code = "import sys; from ttr_np.cli import main; main(['config']); import ttr_np.cli.recall; "
    done = python("-c", code + "sys.exit('matplotlib' in sys.modules)")
    assert done.returncode == 0, done.stderr
