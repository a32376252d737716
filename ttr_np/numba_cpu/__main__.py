"""Compile kernels before they are needed: ``python -m ttr_np.numba_cpu [operator ...] [--dtypes float32,float64]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..backends import operators_of
from ._ahead import compile_ahead


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    every = operators_of("numba")
    parser = argparse.ArgumentParser(prog="python -m ttr_np.numba_cpu", description=__doc__.split(":")[0])
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"among {', '.join(every)}; default: all")
    parser.add_argument("--dtypes", default="float32,float64", help="default float32,float64")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.operators if name not in every]
    if unknown:
        parser.error(f"unknown operator {unknown[0]!r}; choose among {', '.join(every)}")
    dtypes = arguments.dtypes.split(",")
    if not {*dtypes} <= {"float32", "float64"}:
        parser.error(f"--dtypes takes float32 and float64, got {arguments.dtypes!r}")
    compile_ahead(arguments.operators or every, dtypes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
