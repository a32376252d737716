"""Every test starts from the same choice of backend: none."""

import pytest

import ttr_np


@pytest.fixture(autouse=True)
def no_choice_of_backend(monkeypatch):
    monkeypatch.delenv("TTR_BACKEND", raising=False)
    yield
    ttr_np.set_backend(None)
