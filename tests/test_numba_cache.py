"""Compiled kernels are kept on disk, and whatever happens to the files, a kernel is right or is compiled anew."""

import os
import subprocess
import sys

import numpy as np
import pytest

import ttr_np
from ttr_np.backends import operators_of
from ttr_np.numba_cpu import _ahead, _cache
from ttr_np.numba_cpu.__main__ import main

SCRIPT = """
import sys
import numpy as np, ttr_np
x = np.ones((3, 2), sys.argv[1])
assert ttr_np.short_convolution(x, x[:1], backend="numba").tolist() == x.tolist()
from ttr_np.numba_cpu.short_convolution import kernel
print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def start(folder, dtype="float32"):
    """A process that calls a kernel."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", SCRIPT, dtype]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    """Hits and misses of its cache."""
    out, problem = process.communicate(timeout=600)
    assert process.returncode == 0, problem
    return tuple(map(int, out.split()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache that was filled by two processes at once, for two dtypes."""
    folder = tmp_path_factory.mktemp("cache")
    for process in [start(folder), start(folder, "float64"), start(folder)]:
        hits, misses = finish(process)
        assert hits + misses == 1
    return folder


def files(folder):
    return sorted(folder.rglob("short_convolution.kernel*.nbc"))


def test_processes_that_fill_one_cold_cache_leave_one_whole_file_for_each_dtype(folder):
    assert len(files(folder)) == 2
    assert not list(folder.rglob("tmp*"))
    assert finish(start(folder)) == finish(start(folder, "float64")) == (1, 0)


@pytest.mark.parametrize("harm", ["cut", "empty", "changed", "gone"])
def test_a_harmed_file_is_compiled_anew_and_replaced(folder, harm):
    for path in files(folder):
        content = path.read_bytes()
        spoilt = {"cut": content[: len(content) // 2], "empty": b"", "changed": b"x" + content[1:], "gone": None}[harm]
        path.unlink() if spoilt is None else path.write_bytes(spoilt)
    assert finish(start(folder)) == (0, 1)
    assert finish(start(folder)) == (1, 0)


def test_an_edit_of_any_file_of_the_folder_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "_panels.py").write_text("a = 1")
    monkeypatch.setattr(_cache, "HERE", tmp_path)
    _cache.sources.cache_clear()
    store = _cache.Files(str(tmp_path), "kernel")
    store.save("key", "code")
    assert store.load("key") == "code" and store.load("another key") is None
    (tmp_path / "_panels.py").write_text("a = 23")
    _cache.sources.cache_clear()
    assert store.load("key") is None
    store.save("key", "new code")
    assert store.load("key") == "new code" and len(list(tmp_path.glob("*.nbc"))) == 1
    store.flush()
    assert store.load("key") is None
    monkeypatch.undo()
    _cache.sources.cache_clear()


def test_what_cannot_be_kept_is_said_and_runs(monkeypatch, tmp_path):
    with pytest.warns(RuntimeWarning, match="kernel is compiled but not kept"):
        _cache.Files(str(tmp_path / "nowhere"), "kernel").save("key", "code")

    def nowhere(dispatcher):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(_cache, "kept", nowhere)
    with pytest.warns(RuntimeWarning, match="set NUMBA_CACHE_DIR"):
        assert _cache.compiled(abs_)(-2) == 2


def abs_(x):
    return -x if x < 0 else x


def test_what_is_compiled_ahead_leaves_nothing_to_compile():
    """Every kernel of every operator is called by the jobs, in a process that has called none before."""
    script = """
from importlib import import_module
from pkgutil import iter_modules
import ttr_np.numba_cpu as package
from ttr_np.backends import operators_of
from ttr_np.numba_cpu._ahead import compile_one, jobs_of
for job in jobs_of(operators_of("numba"), ["float32"]):
    compile_one(*job)
modules = [import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)]
kernels = {id(x): x for module in modules for x in vars(module).values() if hasattr(x, "stats")}
kept = [kernel for kernel in kernels.values() if hasattr(kernel._cache, "_cache_file")]
assert len(kept) > 12
print(*[kernel.py_func.__name__ for kernel in kept if not kernel.signatures])
import numpy as np, ttr_np
from ttr_np.numba_cpu.recursive_least_squares import narrow
k, before = np.ones((3, 2), np.float32), len(narrow.signatures)
ttr_np.recursive_least_squares(k, k, k, log_decay=-k[:, 0], backend="numba")
assert len(narrow.signatures) == before == 1  # forgetting has no kernel of its own
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["within"]  # of threads, not of an operator


@pytest.fixture
def jobs(monkeypatch):
    """What the command would run, in place of processes that run it."""
    found = []
    monkeypatch.setattr(_ahead, "side_by_side", lambda call, jobs: found.extend((call, *job) for job in jobs))
    return found


def test_layers_are_compiled_by_operator_the_longest_first(jobs):
    assert main(["--layers", "softmax,lms,retnet,qknorm,mesanet,moneta", "--dtypes", "float32"]) == 0
    calls, names, dtypes = zip(*jobs, strict=True)
    assert names == (["mesanet"], ["lms"], ["retnet"], ["moneta"], ["softmax", "qknorm"])
    assert {*calls} == {_ahead.call_layers} and {*dtypes} == {"float32"}


def test_what_layers_compile_ahead_is_what_their_calls_need(jobs):
    from ttr_np.numba_cpu.affine_projection import kernel  # one that no other test of this file compiles

    main(["--layers", "affine_projection,moneta", "--dtypes", "float32"])
    for call, *arguments in jobs:
        call(*arguments)  # moneta has a retention that cannot be compiled, and is passed over
    before = len(kernel.signatures)
    x = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    ttr_np.layers["affine_projection"](x, x, x, backend="numba")
    assert len(kernel.signatures) == before > 0


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["nosuch"], "unknown operator 'nosuch'"),
        (["--layers", "softmax,nosuch"], "'nosuch' is no layer"),
        (["--layers", "hgrn"], "'hgrn' is no layer of q, k and v"),
        (["--layers", "hla"], "'hla' is no layer"),
        (["mesa", "--layers", "softmax"], "stands alone, got operators too: mesa"),
        (["--dtypes", "float16"], "got 'float16'"),
    ],
)
def test_the_command_says_what_it_cannot_compile(jobs, capsys, arguments, word):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert word in capsys.readouterr().err and not jobs


def test_without_names_the_command_compiles_every_operator(jobs):
    main([])
    assert {job[1] for job in jobs} == {*operators_of("numba")} and {job[2] for job in jobs} == {"float32", "float64"}
