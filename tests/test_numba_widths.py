"""The compiled kernels at the register width that this machine does not have.

Tiles, blocks of sums and vectors of sequences are chosen by it when the package is imported. LLVM makes wide vectors of
narrow registers where it must, and narrow ones anywhere, so both choices can be proved on any machine.
"""

import os
import subprocess
import sys

import pytest

SWITCHED = """
import sys
import llvmlite.binding as binding

import numpy as np

own = binding.get_host_cpu_features
features = own()
features["avx512f"] = not features.get("avx512f", False)
binding.get_host_cpu_features = lambda: features
from ttr_np.numba_cpu import _vectors

binding.get_host_cpu_features = own
assert _vectors.WIDE == features["avx512f"] and _vectors.BYTES == (64 if _vectors.WIDE else 32)

import ttr_np
from ttr_np.notation import draw

name, dtype, *gates = sys.argv[1:]
operator, optional = getattr(ttr_np, name), ("log_decay",) if gates else ()
for sizes in (dict(t=70, k=20, v=7), dict(t=33, k=64, v=33), dict(t=50, k=5, v=1), dict(t=200, k=9, v=3)):
    options = {"lead": (19,), "dtype": np.float64, "per_channel": gates == ["channel"], "optional": optional}
    arrays = draw(name, np.random.default_rng(0), **options, **sizes)
    exact = operator(**arrays, backend="numpy")
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    found = operator(**arrays, backend="numba")
    alone = operator(**{name: x[3:4] for name, x in arrays.items()}, backend="numba")
    assert found.dtype == dtype and np.array_equal(found[3:4], alone), sizes
    error = np.max(np.abs(found - exact)) / max(1.0, np.max(np.abs(exact)))
    assert error < 200 * np.finfo(dtype).eps, (sizes, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "question",
    [
        "linear_attention float32 channel", "delta_rule float64 step", "recursive_least_squares float32 step",
        "softmax_attention float32 step",
    ],
)  # fmt: skip
def test_answers_are_right_and_alone_as_in_a_batch(question, tmp_path):
    command = [sys.executable, "-c", SWITCHED, *question.split()]
    apart = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}  # files name the processor, not the tiles
    done = subprocess.run(command, env=apart, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
