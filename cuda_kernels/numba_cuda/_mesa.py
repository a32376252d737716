"""The solvers of the Mesa layer on the GPU: one block has all of one memory and walks over its tokens.

Everything is in double precision. ``H`` is the Gram matrix, a state; matrices are in memory of the block, vectors in
shared memory. ``eps`` is that of the caller's numbers.
"""

from __future__ import annotations

from math import ceil, exp, frexp, inf, isfinite, ldexp, log, nan, sqrt

from numba import float64

from .._calls import LONGEST
from ._columns import kept
from ._factors import along_columns, along_rows, cholesky, dot, orthogonalise, over_block, trace_of_inverse
from ._launch import cuda

__all__ = ["SOLVERS"]

HALF = 0.5  # share of what a factor knows below which a token does without it
FRESH = 8  # tokens for which a factor pays
NOTHING = exp(-104.0)  # a decay that is zero in single precision leaves nothing, not even of a NaN


@cuda.jit(device=True)
def learn(H, key, k, log_decay, beta, t):
    """H = g_t H + beta_t k_t k_t^T; the share g_t. A pair of weight zero is not even looked at."""
    root = sqrt(float64(beta[t])) if beta.size else float64(1)
    left = exp(float64(log_decay[t])) if log_decay.size else float64(1)
    if log_decay.itemsize == 4 and left <= NOTHING:
        left = float64(0)
    for j in range(cuda.threadIdx.x, H.shape[0], cuda.blockDim.x):
        key[j] = root * k[t, j] if root != 0 else float64(0)
    cuda.syncthreads()  # the key is there
    for i in range(H.shape[0]):
        for j in range(cuda.threadIdx.x, H.shape[0], cuda.blockDim.x):
            H[i, j] = kept(left, H[i, j]) + key[i] * key[j]
    return left


@cuda.jit(device=True)
def ratio(x, y):
    """x / y, and 0 where y is not positive; a NaN stays."""
    return x * 0 if y <= 0 else x / y


@cuda.jit(device=True)
def safe(H, ridge, eps, parts):
    """Whether no eigenvalue can be lost in rounding: with a unit diagonal, none is below the share of the ridge."""
    n, lost = H.shape[0], 0
    for p in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        if ridge[p] == 0 or not ridge[p] >= n * n * eps * (H[p, p] + ridge[p]):
            lost += 1
    return over_block(lost, parts) == 0


@cuda.jit(device=True)
def tame(H, ridge, units):
    """Units of the channels times a power of two with which H + ridge is near one: its squares overflow nothing."""
    largest = float64(0)
    cuda.syncthreads()  # units are there
    for p in range(H.shape[0]):
        largest = max(largest, (H[p, p] + ridge[p]) * units[p] * units[p])
    factor = ldexp(1.0, -(frexp(largest)[1] // 2)) if isfinite(largest) else 1.0
    cuda.syncthreads()  # everyone has seen the units
    for p in range(cuda.threadIdx.x, H.shape[0], cuda.blockDim.x):
        units[p] *= factor
    cuda.syncthreads()  # units are there again


@cuda.jit(device=True)
def diagonalise(A, H, ridge, units, values, eps, parts):
    """Eigenvectors of H + ridge, in units of the channels, as unit rows of A; False if a value counts as zero."""
    n, largest, regular = A.shape[0], float64(0), True
    tame(H, ridge, units)
    for i in range(n):
        for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
            A[i, j] = (H[i, j] + (ridge[i] if i == j else float64(0))) * units[i] * units[j]
    cuda.syncthreads()  # rows are there
    orthogonalise(A, 2.0**-50, parts)
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        total = float64(0)
        for j in range(n):
            total += A[i, j] * A[i, j]
        values[i] = sqrt(total)
    cuda.syncthreads()  # the largest value is among them
    for i in range(n):
        largest = max(largest, values[i])
    for i in range(n):
        none = not values[i] > n * eps * largest
        regular = regular and not none
        for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
            A[i, j] = float64(0) if none else A[i, j] / values[i]
    cuda.syncthreads()  # eigenvectors are there, and everyone has seen the values
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        if not values[i] > n * eps * largest:
            values[i] *= 0  # a NaN stays
    return regular


@cuda.jit(device=True)
def solve_least(A, units, values, right, x, along):
    """What a pseudoinverse makes of the right side."""
    for p in range(cuda.threadIdx.x, A.shape[0], cuda.blockDim.x):
        right[p] *= units[p]
    cuda.syncthreads()  # the right side and the values are there
    along_rows(A, right, along)
    cuda.syncthreads()  # what is known along eigenvectors is there
    for p in range(cuda.threadIdx.x, A.shape[0], cuda.blockDim.x):
        found = float64(0)
        for i in range(A.shape[0]):
            found += A[i, p] * (along[i] / values[i] if values[i] > 0 else values[i])
        x[p] = units[p] * found


@cuda.jit(device=True)
def solve_factored(L, right, x, along):
    """x = L^-T L^-1 right. Number 0 is the last and that of the thread which wrote it: nobody waits for x."""
    n = L.shape[0]
    for j in range(n):
        cuda.syncthreads()  # right side j is what the numbers before it left
        here = right[j] / L[j, j]
        for i in range(j + 1 + cuda.threadIdx.x, n, cuda.blockDim.x):
            right[i] -= L[i, j] * here
        if cuda.threadIdx.x == 0:
            along[j] = here
    for j in range(n - 1, -1, -1):
        cuda.syncthreads()  # and from the end
        here = along[j] / L[j, j]
        for i in range(cuda.threadIdx.x, j, cuda.blockDim.x):
            along[i] -= L[j, i] * here
        if cuda.threadIdx.x == 0:
            x[j] = here


@cuda.jit(device=True)
def find_eigenvectors(A, G, weights, units, values, eps, parts):
    """Eigenvectors with a unit diagonal and, if an eigenvalue is lost, with all ridges the same; plain for no ridge."""
    largest, unbound, attempt = float64(0), False, 1
    for p in range(G.shape[0]):
        largest, unbound = max(largest, weights[p]), unbound or weights[p] == 0
    while attempt:
        for p in range(cuda.threadIdx.x, G.shape[0], cuda.blockDim.x):
            unit = 1 / sqrt(G[p, p] + weights[p]) if attempt == 1 else sqrt(largest / weights[p])
            units[p] = float64(1) if unbound else unit
        regular = diagonalise(A, G, weights, units, values, eps, parts)
        attempt = 0 if regular or unbound or attempt == 2 else 2


def exact(q, k, log_decay, beta, ridge, H, factors, worst, x, iterations, tolerance, eps, blocks):
    """A Cholesky factor per token; eigenvectors where a ridge is zero or lost in rounding."""
    key = cuda.shared.array(LONGEST, float64)
    right = cuda.shared.array(LONGEST, float64)
    found = cuda.shared.array(LONGEST, float64)
    along = cuda.shared.array(LONGEST, float64)
    values = cuda.shared.array(LONGEST, float64)
    units = cuda.shared.array(LONGEST, float64)
    parts = cuda.shared.array(32, float64)
    b, h = cuda.blockIdx.x // k.shape[1], cuda.blockIdx.x % k.shape[1]
    G, A, n, weights = H[b, h, 0], factors[b, h, 0, 0], k.shape[4], ridge[b, h, 0]
    for t in range(k.shape[3]):
        learn(G, key, k[b, h, 0], log_decay[b, h, 0], beta[b, h, 0], t)
        factored = safe(G, weights, eps, parts)
        if factored:
            for i in range(n):
                for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
                    A[i, j] = G[i, j] + (weights[i] if i == j else float64(0))
            factored = cholesky(A)
        if not factored:
            find_eigenvectors(A, G, weights, units, values, eps, parts)
        for g in range(q.shape[2]):  # the queries that share this memory
            for p in range(cuda.threadIdx.x, n, cuda.blockDim.x):
                right[p] = q[b, h, g, t, p]
            if factored:
                solve_factored(A, right, found, along)
            else:
                solve_least(A, units, values, right, found, along)
            for p in range(cuda.threadIdx.x, n, cuda.blockDim.x):
                x[b, h, g, t, p] = found[p]


@cuda.jit(device=True)
def factorise(L, Y, H, ridge, reference, parts):
    """Y = L^-1 for H + ridge / reference = L L^T, so that Y^T Y is its inverse; False if there is none."""
    for i in range(H.shape[0]):
        for j in range(cuda.threadIdx.x, H.shape[0], cuda.blockDim.x):
            L[i, j] = H[i, j] + (ridge[i] / reference if i == j else float64(0))
            Y[i, j] = 0
    return cholesky(L) and trace_of_inverse(L, Y, parts) < inf


@cuda.jit(device=True)
def carry(Y, key, along, left, parts):
    """The same after one more pair and one more decay, by the recursion of least squares."""
    along_rows(Y, key, along)
    cuda.syncthreads()  # a = Y k is there
    s = left + dot(along, along, Y.shape[0], parts)
    share = 1 / (s + sqrt(left * s))
    for j in range(cuda.threadIdx.x, Y.shape[0], cuda.blockDim.x):
        total = along_columns(Y, along, j)
        for i in range(Y.shape[0]):
            Y[i, j] = (Y[i, j] - share * along[i] * total) / sqrt(left)


@cuda.jit(device=True)
def precondition(Y, r, z, along, factored):
    """z = Y^T Y r, or r itself."""
    cuda.syncthreads()  # r and Y are there
    if factored:
        along_rows(Y, r, along)
        cuda.syncthreads()  # what is known along the rows of Y is there
    for j in range(cuda.threadIdx.x, Y.shape[0], cuda.blockDim.x):
        z[j] = along_columns(Y, along, j) if factored else r[j]


@cuda.jit(device=True)
def conjugate_gradients(G, weights, Y, factored, r, x, p, z, along, shift, parts, most, tolerance):
    """x from zero, with what is left of the right side in r; the relative residual."""
    n = G.shape[0]
    precondition(Y, r, z, along, factored)
    for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        x[j], p[j] = 0, z[j]
    start, slope, step = dot(r, r, n, parts), dot(r, z, n, parts), 0
    error = start
    while step < most and error > tolerance * tolerance * start:
        cuda.syncthreads()  # p is there
        for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
            shift[j] = along_columns(G, p, j) + weights[j] * p[j]
        length = ratio(slope, dot(p, shift, n, parts))
        for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
            x[j] += length * p[j]
            r[j] -= length * shift[j]
        precondition(Y, r, z, along, factored)
        error, before = dot(r, r, n, parts), slope
        slope = dot(r, z, n, parts)
        for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
            p[j] = z[j] + ratio(slope, before) * p[j]
        step += 1
    return sqrt(ratio(error, start))


def cg(q, k, log_decay, beta, ridge, H, factors, worst, x, iterations, tolerance, eps, blocks):
    """Conjugate gradients, preconditioned by a factor of one token that is carried to the next ones.

    The factor is of H + ridge / reference, and that ridge decays with the data: exact without decay, near where little
    has decayed. A token that has lost more than half of what the factor knows goes without, until enough of them have
    come for another one. With a tolerance of zero the steps are plain.
    """
    key = cuda.shared.array(LONGEST, float64)
    found = cuda.shared.array(LONGEST, float64)
    r = cuda.shared.array(LONGEST, float64)
    p = cuda.shared.array(LONGEST, float64)
    z = cuda.shared.array(LONGEST, float64)
    along = cuda.shared.array(LONGEST, float64)
    shift = cuda.shared.array(LONGEST, float64)
    parts = cuda.shared.array(32, float64)
    b, h = cuda.blockIdx.x // k.shape[1], cuda.blockIdx.x % k.shape[1]
    G, L, Y, n, weights = H[b, h, 0], factors[b, h, 0, 0], factors[b, h, 0, 1], k.shape[4], ridge[b, h, 0]
    factored, regular, known, age, residual = False, tolerance > 0, float64(0), FRESH, float64(0)
    for j in range(n):
        regular = regular and weights[j] > 0
    for t in range(k.shape[3]):
        left = learn(G, key, k[b, h, 0], log_decay[b, h, 0], beta[b, h, 0], t)
        known, age = known * left, age + 1
        if factored and known >= HALF:
            carry(Y, key, along, left, parts)
        elif regular and age > FRESH:
            factored = factorise(L, Y, G, weights, sqrt(max(left**FRESH, HALF)), parts)
            known, age = float64(1), 1
        else:
            factored = False
        for g in range(q.shape[2]):  # the queries that share this memory
            for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
                r[j] = q[b, h, g, t, j]
            rest = conjugate_gradients(
                G, weights, Y, factored, r, found, p, z, along, shift, parts, iterations, tolerance
            )
            residual = max(residual, rest)
            for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
                x[b, h, g, t, j] = found[j] if isfinite(rest) else nan
    if cuda.threadIdx.x == 0:
        worst[b, h, 0, 0], worst[b, h, 0, 1] = residual, iterations


@cuda.jit(device=True)
def norm(G, parts):
    """|G|_F."""
    total = float64(0)
    for i in range(G.shape[0]):
        for j in range(cuda.threadIdx.x, G.shape[0], cuda.blockDim.x):
            total += G[i, j] * G[i, j]
    return sqrt(over_block(total, parts))


@cuda.jit(device=True)
def iterate(G, weights, least, bound, r, x, d, parts, most, tolerance, eps):
    """x from zero by Chebyshev's iteration, with what is left of the right side in r; the relative residual."""
    n, middle = G.shape[0], (bound + least) / 2
    half = max((bound - least) / 2, eps * middle)
    for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        x[j], d[j] = 0, r[j] / middle
    start, rho, step = dot(r, r, n, parts), half / middle, 0
    error = start
    while step < most and error > tolerance * tolerance * start:
        for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
            x[j] += d[j]
            r[j] -= along_columns(G, d, j) + weights[j] * d[j]
        before = rho
        rho = 1 / (2 * middle / half - before)
        cuda.syncthreads()  # nobody reads d any more
        for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
            d[j] = rho * before * d[j] + 2 * rho / half * r[j]
        error = dot(r, r, n, parts)
        step += 1
    return sqrt(ratio(error, start))


def chebyshev(q, k, log_decay, beta, ridge, H, factors, worst, x, iterations, tolerance, eps, blocks):
    """Chebyshev's iteration: eigenvalues lie between the least ridge and the largest one plus the norm of H."""
    key = cuda.shared.array(LONGEST, float64)
    found = cuda.shared.array(LONGEST, float64)
    r = cuda.shared.array(LONGEST, float64)
    d = cuda.shared.array(LONGEST, float64)
    parts = cuda.shared.array(32, float64)
    b, h = cuda.blockIdx.x // k.shape[1], cuda.blockIdx.x % k.shape[1]
    G, n, weights = H[b, h, 0], k.shape[4], ridge[b, h, 0]
    least, largest, residual, needed = inf, float64(0), float64(0), float64(iterations)
    for j in range(n):
        least, largest = min(least, weights[j]), max(largest, weights[j])
    for t in range(k.shape[3]):
        learn(G, key, k[b, h, 0], log_decay[b, h, 0], beta[b, h, 0], t)
        bound, most = norm(G, parts) + largest, float64(iterations)
        if iterations == 0:  # what the bounds ask for
            spread = (bound if bound < inf else least) / least
            most = min(ceil(sqrt(spread) / 2 * log(2 / max(tolerance, eps))) + 1.0, 1000.0)
        needed = max(needed, most)
        for g in range(q.shape[2]):  # the queries that share this memory
            for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
                r[j] = q[b, h, g, t, j]
            rest = iterate(G, weights, least, bound, r, found, d, parts, most, tolerance, eps)
            residual = max(residual, rest)
            for j in range(cuda.threadIdx.x, n, cuda.blockDim.x):
                x[b, h, g, t, j] = found[j] if isfinite(rest) else nan
    if cuda.threadIdx.x == 0:
        worst[b, h, 0, 0], worst[b, h, 0, 1] = residual, needed


SOLVERS = {"exact": exact, "cg": cg, "chebyshev": chebyshev}
