"""Powers of two for a whole vector, as code that kernels build into their loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numpy.polynomial import Chebyshev, Polynomial

from ._panels import VECTOR

__all__ = ["LOG2E", "VECTOR", "constant", "exp2"]

LOG2E = 1.0 / math.log(2.0)
NEAR = Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1])
SERIES = {  # of 2^r for |r| <= 1/2, highest power first: 0.9 units in the last place
    32: tuple(NEAR.coef[::-1]),
    64: tuple(math.log(2.0) ** n / math.factorial(n) for n in range(13, -1, -1)),
}


def exp2(builder: Any, x: Any, bits: int) -> Any:
    """Code of 2^x for a vector x <= 0 of floats; 0 below the smallest normal number.

    x = n + r: adding a large number rounds to the integer n, in the last bits of the sum; 2^n is written into the
    exponent of a number, and 2^r is a polynomial.
    """
    digits, largest = {32: (23, 127), 64: (52, 1023)}[bits]
    integers = ir.VectorType(ir.IntType(bits), x.type.count)
    multiply_add = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(x.type, [x.type] * 3), f"llvm.fmuladd.v{x.type.count}f{bits}"
    )
    shift = constant(x.type, 1.5 * 2.0**digits)
    rounded = builder.fadd(x, shift)
    r = builder.fsub(x, builder.fsub(rounded, shift))
    series = constant(x.type, SERIES[bits][0])
    for term in SERIES[bits][1:]:
        series = builder.call(multiply_add, [series, r, constant(x.type, term)])
    n = builder.add(builder.bitcast(rounded, integers), constant(integers, largest))
    power = builder.bitcast(builder.shl(n, constant(integers, digits)), x.type)
    faint = builder.fcmp_ordered("<", x, constant(x.type, 1.0 - largest))
    return builder.select(faint, constant(x.type, 0.0), builder.fmul(series, power))


def constant(vector: Any, value: float) -> Any:
    """The same number everywhere in a vector."""
    value = float(np.float32(value)) if isinstance(vector.element, ir.FloatType) else value
    return ir.Constant(vector, [value] * vector.count)
