"""Every test starts from the same choice of backend: none."""

import gc
import os
import sys
from time import process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported: test processes run side by side

import pytest

import ttr_np
from ttr_np.cli.experiment import NAMES


def pytest_collection_modifyitems(items):
    """What each process compiles or runs anew comes first: with ``--dist worksteal`` one of them has nearly all of it.

    That is Numba's kernels for GPUs, then the experiments.
    """
    items.sort(key=lambda item: ("numba-cuda" not in item.nodeid, "results" not in getattr(item, "fixturenames", ())))


def pytest_collection_finish():
    """Tests that count memory collect garbage each time: twenty thousand tests need not be looked through for that."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def frozen_after_each_file():
    """What the tests of a file have compiled and imported need not be looked through either, from the next file on."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_choice_of_backend(monkeypatch):
    monkeypatch.delenv("TTR_BACKEND", raising=False)
    yield
    ttr_np.set_backend(None)


def pytest_runtest_logreport(report):
    """On a GPU whose time is short, a test that fails is named at once: nobody may be there to see the summary."""
    if report.failed and os.environ.get("TTR_TESTS_ON") == "gpu":
        print(f"\nFAILED {report.nodeid}", flush=True)


@pytest.fixture
def cupy(monkeypatch):
    """A machine with a GPU, as far as the backend ``cupy`` can tell."""
    import cudaemu
    from cudaemu import cupy as stand_in

    if cudaemu.ON_GPU:
        pytest.skip("CuPy itself is here")

    from cuda_kernels.cupy_raw import _launch
    from ttr_np import backends

    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    known = backends.reason
    monkeypatch.setattr(backends, "reason", lambda name: "ok" if name == "cupy" else known(name))
    monkeypatch.setattr(_launch, "machine", _launch.Gpu())
    _launch.compiled.cache_clear()
    yield stand_in
    _launch.compiled.cache_clear()


@pytest.fixture(scope="session")
def results():
    """Every experiment with its own settings, run once, with the processor's seconds; nothing is compiled for it."""
    from ttr_np import experiments

    found = {}
    for name in NAMES:
        begin = process_time()
        found[name] = getattr(experiments, name)(backend="numpy")
        found[name]["processor seconds"] = process_time() - begin
    return found
