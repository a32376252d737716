"""Every test starts from the same choice of backend: none."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported: test processes run side by side

import pytest

import ttr_np


@pytest.fixture(autouse=True)
def no_choice_of_backend(monkeypatch):
    monkeypatch.delenv("TTR_BACKEND", raising=False)
    yield
    ttr_np.set_backend(None)
