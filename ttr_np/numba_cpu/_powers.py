"""Powers of two for a whole vector, as code that kernels build into their loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.polynomial import Chebyshev, Polynomial

from ._vectors import Vectors

__all__ = ["LOG2E", "exp2"]

LOG2E = 1.0 / math.log(2.0)
NEAR = Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1])
SERIES = {  # of 2^r for |r| <= 1/2, highest power first: 0.9 units in the last place
    32: tuple(NEAR.coef[::-1]),
    64: tuple(math.log(2.0) ** n / math.factorial(n) for n in range(13, -1, -1)),
}


def exp2(vectors: Vectors, x: Any) -> Any:
    """Code of 2^x for a vector x <= 0 of floats; 0 below the smallest normal number.

    x = n + r: adding a large number rounds to the integer n, in the last bits of the sum, with the offset of exponents;
    2^n is these bits shifted into the exponent of a number, and 2^r is a polynomial.
    """
    builder, constant, bits = vectors.builder, vectors.constant, vectors.bits
    digits, largest = {32: (23, 127), 64: (52, 1023)}[bits]
    integers = ir.VectorType(ir.IntType(bits), vectors.count)
    shift = constant(1.5 * 2.0**digits + largest)
    rounded = builder.fadd(x, shift)
    r = builder.fsub(x, builder.fsub(rounded, shift))
    series = constant(SERIES[bits][0])
    for term in SERIES[bits][1:]:
        series = vectors.multiply_add(series, r, constant(term))
    n = builder.bitcast(rounded, integers)
    power = builder.bitcast(builder.shl(n, ir.Constant(integers, [digits] * vectors.count)), vectors.type)
    faint = builder.fcmp_ordered("<", x, constant(1.0 - largest))
    return builder.select(faint, constant(0.0), builder.fmul(series, power))
