"""Recursive least squares of many small memories, one to a lane: every number of a memory is a row of as many lanes as a
tile is wide, and a step of all of them takes the instructions of one. A lane does not know what the others hold.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ._panels import Matrix, apart, fill, inner, lanes, real, row

__all__ = ["Lanes", "answer_lanes", "load_lane", "step_lanes", "store_lane"]


class Lanes(NamedTuple):
    """Panels whose columns are memories."""

    S: Matrix  # k v
    R: Matrix  # k k
    k: Matrix  # k: weighted
    v: Matrix  # v: weighted, then the error
    q: Matrix  # k
    o: Matrix  # v
    along: Matrix  # k
    scale: Matrix  # what R is divided by at a step; 1 + |along|^2; the gain
    trace: Matrix  # at least that of P; trace of P^-1; whether R has moved


@inner
def load_lane(into, lane, x, rows, columns):
    """A matrix into one lane."""
    apart()
    for i in range(rows):
        for j in range(columns):
            row(into, i * columns + j)[lane] = row(x, i)[j * x.column]


@inner
def store_lane(x, rows, columns, source, lane):
    """One lane into a matrix."""
    apart()
    for i in range(rows):
        for j in range(columns):
            row(x, i)[j * x.column] = row(source, i * columns + j)[lane]


@inner
def step_lanes(x, d, w, like):
    """One pair of every memory by the recursion; first R is scaled by ``scale``."""
    apart()
    size, s, gain = lanes(like), row(x.scale, 1), row(x.scale, 2)
    fill(s, real(like, 0), size)
    for j in range(d):
        fill(row(x.along, j), real(like, 0), size)
    for p in range(d):
        k, scale = row(x.k, p), row(x.scale, 0)
        for j in range(d):
            R, along = row(x.R, p * d + j), row(x.along, j)
            for lane in range(size):
                R[lane] *= scale[lane]
                along[lane] += k[lane] * R[lane]
        for j in range(w):
            S, error = row(x.S, p * w + j), row(x.v, j)
            for lane in range(size):
                error[lane] -= k[lane] * S[lane]
    for j in range(d):
        along = row(x.along, j)
        for lane in range(size):
            s[lane] += along[lane] * along[lane]
    for lane in range(size):
        s[lane] += real(like, 1)
    for p in range(d):
        fill(gain, real(like, 0), size)
        for j in range(d):
            R, along = row(x.R, p * d + j), row(x.along, j)
            for lane in range(size):
                gain[lane] += R[lane] * along[lane]
        turn(x, p, d, w, like)


@inner
def turn(x, p, d, w, like):
    """Row p of R and S after a step, from its gain."""
    size, s, gain = lanes(like), row(x.scale, 1), row(x.scale, 2)
    shrunk = row(x.scale, 3)
    for lane in range(size):
        shrunk[lane] = gain[lane] / (s[lane] + math.sqrt(s[lane]))
        gain[lane] /= s[lane]
    for j in range(d):
        R, along = row(x.R, p * d + j), row(x.along, j)
        for lane in range(size):
            R[lane] -= shrunk[lane] * along[lane]
    for j in range(w):
        S, error = row(x.S, p * w + j), row(x.v, j)
        for lane in range(size):
            S[lane] += gain[lane] * error[lane]


@inner
def answer_lanes(x, d, w, like):
    """One answer of every memory."""
    apart()
    size = lanes(like)
    for j in range(w):
        fill(row(x.o, j), real(like, 0), size)
    for p in range(d):
        q = row(x.q, p)
        for j in range(w):
            S, o = row(x.S, p * w + j), row(x.o, j)
            for lane in range(size):
                o[lane] += q[lane] * S[lane]
