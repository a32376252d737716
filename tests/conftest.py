"""Every test starts from the same choice of backend: none."""

import os
from time import process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported: test processes run side by side

import pytest

import ttr_np
from ttr_np.cli.experiment import NAMES


@pytest.fixture(autouse=True)
def no_choice_of_backend(monkeypatch):
    monkeypatch.delenv("TTR_BACKEND", raising=False)
    yield
    ttr_np.set_backend(None)


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
