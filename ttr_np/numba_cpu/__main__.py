"""Compile kernels before they are needed.

    python -m ttr_np.numba_cpu [operator ...] [--layers name,name] [--dtypes float32,float64]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import ttr_np

from ..backends import operators_of
from ._ahead import compile_ahead, compile_layers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    every = operators_of("numba")
    parser = argparse.ArgumentParser(prog="python -m ttr_np.numba_cpu", description=__doc__.split("\n")[0])
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"among {', '.join(every)}; default: all")
    parser.add_argument("--layers", help="instead: what these layers of q, k and v call, names with commas between")
    parser.add_argument("--dtypes", default="float32,float64", help="default float32,float64")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.operators if name not in every]
    if unknown:
        parser.error(f"unknown operator {unknown[0]!r}; choose among {', '.join(every)}")
    dtypes = arguments.dtypes.split(",")
    if not {*dtypes} <= {"float32", "float64"}:
        parser.error(f"--dtypes takes float32 and float64, got {arguments.dtypes!r}")
    if arguments.layers is None:
        compile_ahead(arguments.operators or every, dtypes)
        return 0
    if arguments.operators:
        parser.error(f"--layers stands alone, got operators too: {' '.join(arguments.operators)}")
    layers = arguments.layers.split(",")
    other = [name for name in layers if not compiles(name)]
    if other:
        parser.error(f"{other[0]!r} is no layer of q, k and v that backend 'numba' runs; `ttr layers` lists all")
    compile_layers(layers, dtypes)
    return 0


def compiles(name: str) -> bool:
    """Whether a name is that of a layer of queries, keys and values with an operator here."""
    layer = ttr_np.layers.get(name)
    return layer is not None and tuple(layer.data) == ("q", "k", "v") and layer.operator in operators_of("numba")


if __name__ == "__main__":
    sys.exit(main())
