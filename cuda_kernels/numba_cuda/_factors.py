"""What the threads of a block do together with the matrices of one memory. All threads call; a matrix is square.

Shared arrays are those of the kernel, handed down: numba-cuda gives those of two functions the same name. ``parts`` has
room for a number of each warp, in double precision.
"""

from __future__ import annotations

from math import copysign, sqrt

from numba import float64

from ._launch import cuda

__all__ = [
    "along_columns", "along_rows", "cholesky", "dot", "orthogonalise", "over_block", "over_warp", "trace_of_inverse",
    "transpose",
]  # fmt: skip


@cuda.jit(device=True)
def over_warp(x):
    """A sum over the lanes, the same for each."""
    distance = 1
    while distance < 32:
        x += cuda.shfl_xor_sync(0xFFFFFFFF, x, distance)
        distance *= 2
    return x


@cuda.jit(device=True)
def over_block(x, parts):
    """A sum over the threads in double precision, the same for each."""
    x = over_warp(float64(x))
    if cuda.threadIdx.x % 32 == 0:
        parts[cuda.threadIdx.x // 32] = x
    cuda.syncthreads()  # every warp has left its part
    total = float64(0)
    for i in range(cuda.blockDim.x // 32):
        total += parts[i]
    cuda.syncthreads()  # everyone has read them before the next sum
    return total


@cuda.jit(device=True)
def dot(x, y, n, parts):
    """Of the first n numbers of two vectors; a thread may bring its own, and finds all when this returns."""
    total = float64(0)
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        total += x[i] * y[i]
    return over_block(total, parts)


@cuda.jit(device=True)
def along_columns(A, x, j):
    """x A at place j."""
    total = float64(0)
    for i in range(A.shape[0]):
        total += A[i, j] * x[i]
    return total


@cuda.jit(device=True)
def along_rows(A, x, into):
    """A x: a warp takes a row."""
    for i in range(cuda.threadIdx.x // 32, A.shape[0], cuda.blockDim.x // 32):
        total = float64(0)
        for j in range(cuda.threadIdx.x % 32, A.shape[1], 32):
            total += A[i, j] * x[j]
        total = over_warp(total)
        if cuda.threadIdx.x % 32 == 0:
            into[i] = total


@cuda.jit(device=True)
def cholesky(A):
    """A = L L^T in place, its lower triangle only; False if a pivot is not positive.

    Products are summed before they are taken off a number that may be much larger.
    """
    n, lane, warp = A.shape[0], cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
    for j in range(n):
        cuda.syncthreads()  # the columns before j are whole
        for i in range(j + warp, n, cuda.blockDim.x // 32):
            taken = A.dtype.type(0)
            for m in range(lane, j, 32):
                taken += A[i, m] * A[j, m]
            taken = over_warp(taken)
            if lane == 0:
                A[i, j] -= taken
        cuda.syncthreads()  # the pivot is there
        pivot = A[j, j]
        if not pivot > 0:
            return False
        for i in range(j + 1 + cuda.threadIdx.x, n, cuda.blockDim.x):
            A[i, j] /= sqrt(pivot)
    cuda.syncthreads()  # everyone has seen the last pivot
    for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        A[j, j] = sqrt(A[j, j])
    cuda.syncthreads()  # the factor is whole
    return True


@cuda.jit(device=True)
def trace_of_inverse(L, X, parts):
    """Sum of the squares of L^-1, the trace of (L L^T)^-1, column by column into X."""
    total = float64(0)
    for j in range(cuda.threadIdx.x, L.shape[0], cuda.blockDim.x):
        for i in range(j, L.shape[0]):
            x = L.dtype.type(i == j)
            for m in range(j, i):
                x -= L[i, m] * X[m, j]
            x /= L[i, i]
            X[i, j] = x
            total += float64(x) * x
    return over_block(total, parts)


@cuda.jit(device=True)
def transpose(A, B):
    """B = A^T; a thread reads columns of A, and may do so while others still write theirs."""
    for i in range(A.shape[0]):
        for j in range(cuda.threadIdx.x, A.shape[1], cuda.blockDim.x):
            B[j, i] = A[i, j]
    cuda.syncthreads()  # B is there


@cuda.jit(device=True)
def rotate(x, y, small):
    """One warp rotates two rows until they are orthogonal; 0 if they are, or if they hold a bad number."""
    a, b, c = float64(0), float64(0), float64(0)
    for i in range(cuda.threadIdx.x % 32, x.shape[0], 32):
        a += float64(x[i]) * x[i]
        b += float64(y[i]) * y[i]
        c += float64(x[i]) * y[i]
    a, b, c = over_warp(a), over_warp(b), over_warp(c)
    if not abs(c) > small * sqrt(a) * sqrt(b):
        return 0
    slope = (b - a) / (2 * c)
    tangent = copysign(1.0, slope) / (abs(slope) + sqrt(1 + slope * slope))
    cosine = 1 / sqrt(1 + tangent * tangent)
    for i in range(cuda.threadIdx.x % 32, x.shape[0], 32):
        before = x[i]
        x[i] = cosine * (before - tangent * y[i])
        y[i] = cosine * (tangent * before + y[i])
    return 1


@cuda.jit(device=True)
def orthogonalise(X, small, parts):
    """Rotate the rows of X until they are orthogonal to ``small``, so that their lengths are its singular values.

    One-sided Jacobi rotations. In each round all pairs meet when one row sits still and the others move around the
    table; a warp takes a pair.
    """
    n, warps = X.shape[0], cuda.blockDim.x // 32
    seats = n + n % 2
    others = seats - 1
    for _ in range(30):
        moved = 0
        for turn in range(others):
            for pair in range(cuda.threadIdx.x // 32, seats // 2, warps):
                p = (turn + pair) % others if pair else others
                q = (turn - pair + others) % others
                if p < n and q < n:
                    moved += rotate(X[p], X[q], small)
            cuda.syncthreads()  # rows meet others in the next round
        if over_block(moved, parts) == 0:
            break
