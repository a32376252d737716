"""Memory stays O(t (k + v)): long sequences fit, whatever the operator."""

import json
import subprocess
import sys

import pytest

from ttr_np.notation import OPERATORS

LONG = 16384
GIGABYTES = 0.24  # less than one truth value for each pair of tokens, which takes 0.25

# Quadratic operators run with one head so that the test ends; their memory does not depend on it.
SHAPES = {
    "dplr": ((4,), 64, {}),  # two arrays more than others
    "softmax_attention": ((1,), 64, {}),
    "local_polynomial": ((1,), 2, {}),
    "sparse_attention": ((1,), 4, {}),
    "path_attention": ((1,), 4, {}),
    "stick_breaking_attention": ((1,), 4, {}),
    "wall_attention": ((1,), 4, {}),
    "delta_attention": ((1,), 4, {}),
}
SKIPPED = {
    "kernel_ridge": "its exact answer needs the Cholesky factor of all pairs: t^2 numbers by definition",
    "short_convolution": "no memory but the window",
}
OPTIONS = {
    "mesa": {"ridge": 1.0, "solver": "cg", "iterations": 2, "tolerance": 1.0},
    "local_polynomial": {"degree": 1, "window": 512},
    "sparse_attention": {"window": 512},
    "softmax_attention": {},
}

SCRIPT = """
import json, sys, warnings
import numpy as np, ttr_np
from ttr_np.notation import draw
warnings.simplefilter("ignore")
operator, lead, size, t, options = json.loads(sys.argv[1])
if operator == "test_time_training":
    options["memory"] = ttr_np.Linear()
sizes = {name: size for name in "kvd"} | {"n": 16, "l": 20}
x = draw(operator, np.random.default_rng(0), lead=tuple(lead), t=t, dtype=np.float32, **sizes)
if operator == "dplr":
    x["a"] = -x["b"]  # a contraction: a random pair of directions would grow without bound
o = getattr(ttr_np, operator)(**x, **options, backend="numpy")
assert np.all(np.isfinite(o))
with open("/proc/self/status") as status:  # ru_maxrss begins with what the parent had
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20)
"""


def peak(operator):
    lead, size, _ = SHAPES.get(operator, ((8,), 64, {}))
    question = json.dumps([operator, lead, size, LONG, OPTIONS.get(operator, {})])
    done = subprocess.run([sys.executable, "-c", SCRIPT, question], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in SKIPPED])
def test_a_long_sequence_fits(operator):
    assert peak(operator) < GIGABYTES
