"""Powers of two and of e for a whole vector, as code that kernels build into their loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.polynomial import Chebyshev, Polynomial

from ._vectors import Vectors

__all__ = ["LN2", "LOG2E", "RANGE", "TAYLOR", "exp2", "exponential"]

LOG2E = 1.0 / math.log(2.0)
LN2 = {32: (0.693359375, -2.12194440e-4), 64: (0.693147180369123816490, 1.90821492927058770002e-10)}  # in two parts
RANGE = {32: (-87.0, 88.0), 64: (-708.0, 709.0)}  # of the exponents whose powers of e are numbers
DIGITS, EXPONENT = {32: 23, 64: 52}, {32: 127, 64: 1023}  # of a number: bits behind the point, offset of the exponent
SHIFT = {bits: 1.5 * 2.0 ** DIGITS[bits] + EXPONENT[bits] for bits in (32, 64)}
NEAR = Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1])
# Of e^r for |r| <= ln 2 / 2, highest power first.
TAYLOR = {bits: tuple(1.0 / math.factorial(n) for n in range(last, -1, -1)) for bits, last in ((32, 7), (64, 13))}
SERIES = {  # of 2^r for |r| <= 1/2, highest power first: 0.9 units in the last place
    32: tuple(NEAR.coef[::-1]),
    64: tuple(math.log(2.0) ** n * term for n, term in zip(range(13, -1, -1), TAYLOR[64], strict=True)),
}


def exp2(vectors: Vectors, x: Any) -> Any:
    """Code of 2^x for a vector x <= 0 of floats; 0 below the smallest normal number.

    x = n + r: adding a large number rounds to the integer n, in the last bits of the sum, with the offset of exponents;
    2^n is these bits shifted into the exponent of a number, and 2^r is a polynomial.
    """
    builder, constant, bits = vectors.builder, vectors.constant, vectors.bits
    shift, largest = constant(SHIFT[bits]), EXPONENT[bits]
    rounded = builder.fadd(x, shift)
    r = builder.fsub(x, builder.fsub(rounded, shift))
    power = builder.fmul(polynomial(vectors, SERIES[bits], r), power_of(vectors, rounded))
    return builder.select(builder.fcmp_ordered("<", x, constant(1.0 - largest)), constant(0.0), power)


def exponential(vectors: Vectors, x: Any) -> Any:
    """Code of e^x, two roundings; 0 below the smallest normal number, infinity above the largest.

    x = n ln 2 + r as above: ln 2 is subtracted in two parts, the first of so few digits that n times it is exact.
    """
    builder, constant, bits = vectors.builder, vectors.constant, vectors.bits
    (least, most), (high, low) = RANGE[bits], LN2[bits]
    faint, vast = (builder.fcmp_ordered(sign, x, constant(end)) for sign, end in (("<", least), (">", most)))
    y = builder.select(builder.or_(faint, vast), constant(0.0), x)
    shift = constant(SHIFT[bits])
    rounded = vectors.multiply_add(y, constant(LOG2E), shift)
    n = builder.fsub(rounded, shift)
    r = vectors.multiply_add(n, constant(-low), vectors.multiply_add(n, constant(-high), y))
    power = builder.fmul(polynomial(vectors, TAYLOR[bits], r), power_of(vectors, rounded))
    return builder.select(faint, constant(0.0), builder.select(vast, constant(math.inf), power))


def polynomial(vectors: Vectors, terms: Sequence[float], r: Any) -> Any:
    """Code of a polynomial, its highest power first."""
    total = vectors.constant(terms[0])
    for term in terms[1:]:
        total = vectors.multiply_add(total, r, vectors.constant(term))
    return total


def power_of(vectors: Vectors, rounded: Any) -> Any:
    """Code of 2^n from a sum with the shift, whose last bits are n and the offset of exponents."""
    builder, integers = vectors.builder, ir.VectorType(ir.IntType(vectors.bits), vectors.count)
    digits = ir.Constant(integers, [DIGITS[vectors.bits]] * vectors.count)
    return builder.bitcast(builder.shl(builder.bitcast(rounded, integers), digits), vectors.type)
