"""Compile kernels before they are needed: ``python -m ttr_np.numba_cpu [operator ...] [--dtypes float32,float64]``.

One process compiles one kernel at a time, so they are dealt out to as many processes as there are cores. What is on
disk already is only read.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

import ttr_np

from ..backends import operators_of
from ..notation import draw

# Those that take longest come first, so that no process is left with a long one at the end.
LONGEST_FIRST = ("mesa", "linear_attention", "test_time_training", "recursive_least_squares", "softmax_attention")
OPTIONS = {"test_time_training": {"memory": ttr_np.Linear()}}


def compile_here(operators: Sequence[str], dtypes: Sequence[str]) -> None:
    """Call each kernel once for each dtype, on a few tokens."""
    for operator in operators:
        for dtype in dtypes:
            arrays = draw(operator, np.random.default_rng(0), dtype=dtype)
            getattr(ttr_np, operator)(**arrays, **OPTIONS.get(operator, {}), backend="numba")


def compile_ahead(operators: Sequence[str], dtypes: Sequence[str]) -> None:
    """The same in several processes.

    Raises
    ------
    subprocess.CalledProcessError
        If one of them fails.
    """
    order = sorted(operators, key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else 99)
    count = min(os.cpu_count() or 1, len(order))
    command = [sys.executable, "-m", __spec__.name, "--here", "--dtypes", ",".join(dtypes)]
    running = [subprocess.Popen(command + order[i::count]) for i in range(count)]
    for process in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    every = operators_of("numba")
    parser = argparse.ArgumentParser(prog="python -m ttr_np.numba_cpu", description=__doc__.split(":")[0])
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"among {', '.join(every)}; default: all")
    parser.add_argument("--dtypes", default="float32,float64", help="default float32,float64")
    parser.add_argument("--here", action="store_true", help="in this process, one after the other")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.operators if name not in every]
    if unknown:
        parser.error(f"unknown operator {unknown[0]!r}; choose among {', '.join(every)}")
    dtypes = arguments.dtypes.split(",")
    if not {*dtypes} <= {"float32", "float64"}:
        parser.error(f"--dtypes takes float32 and float64, got {arguments.dtypes!r}")
    (compile_here if arguments.here else compile_ahead)(arguments.operators or every, dtypes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
