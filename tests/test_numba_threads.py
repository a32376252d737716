"""Kernels run wherever Python runs: in threads that outlive the main one, at exit, and after a fork."""

import os
import subprocess
import sys

import pytest

BIG = """
import threading, time, atexit, os
import numpy as np, numba, ttr_np
numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
k, beta = np.ones((8, 200, 64)) / 8, np.full((8, 200), 0.5)
def work():
    o = ttr_np.delta_rule(k, k, k, beta, backend="numba")
    os.write(1, b"%.6g\\n" % o[0, -1, 0])  # in one go: two processes share the pipe
"""
ENDINGS = {
    "after the main thread": "threading.Thread(target=lambda: (time.sleep(0.5), work())).start()",
    "at exit": "atexit.register(work)",
    "after a fork": "work()\nchild = os.fork()\nwork()\nif child:\n    os.waitpid(child, 0)",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.filterwarnings("ignore")
def test_a_call_on_two_threads(ending):
    if "fork" in ending and not hasattr(os, "fork"):
        return
    script = [sys.executable, "-W", "ignore", "-c", BIG + ENDINGS[ending]]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"0.125"} and len(done.stdout.split()) == (3 if "fork" in ending else 1)
