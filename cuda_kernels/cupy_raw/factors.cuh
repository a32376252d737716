// Factors of symmetric matrices by the threads of a block. A matrix is (n, n), row by row; all threads call together.

// A = L L^T in place, its lower triangle only; false if a pivot is not positive. Products are summed before they are
// taken off a number that may be much larger.
__device__ bool cholesky(real* A, long long n) {
    for (int j = 0; j < n; j++) {
        __syncthreads();  // the columns before j are whole
        #pragma unroll 1
        for (int i = j + threadIdx.x / 32; i < n; i += blockDim.x / 32) {
            const real taken = dot_of_warp(A + i * n, A + j * n, j);
            if (threadIdx.x % 32 == 0) A[i * n + j] -= taken;
        }
        __syncthreads();  // the pivot is there
        const real pivot = A[j * n + j];
        if (!(pivot > 0)) return false;
        for (int i = j + 1 + threadIdx.x; i < n; i += blockDim.x) A[i * n + j] /= sqrt(pivot);
    }
    __syncthreads();  // everyone has seen the last pivot
    for (int j = threadIdx.x; j < n; j += blockDim.x) A[j * n + j] = sqrt(A[j * n + j]);
    __syncthreads();  // the factor is whole
    return true;
}

// Sum of the squares of L^-1, the trace of (L L^T)^-1, column by column into X.
__device__ double trace_of_inverse(const real* L, real* X, int n) {
    double total = 0;
    for (int j = threadIdx.x; j < n; j += blockDim.x)
        for (int i = j; i < n; i++) {
            real x = i == j;
            for (int m = j; m < i; m++) x = fma(-L[i * n + m], X[m * n + j], x);
            X[i * n + j] = x = x / L[i * n + i];
            total += double(x) * x;
        }
    return over_block(total);
}

// B = A^T; a thread reads columns of A, and may do so while others still write theirs.
__device__ void transpose(const real* A, real* B, int n) {
    for (int i = 0; i < n; i++)
        for (int j = threadIdx.x; j < n; j += blockDim.x) B[j * n + i] = A[i * n + j];
    __syncthreads();  // B is there
}

// One warp rotates two rows until they are orthogonal; false if they are, or if they hold a bad number.
__device__ bool rotate(real* x, real* y, int n) {
    double a = 0, b = 0, c = 0;
    for (int i = threadIdx.x % 32; i < n; i += 32) {
        a += double(x[i]) * x[i];
        b += double(y[i]) * y[i];
        c += double(x[i]) * y[i];
    }
    a = over_warp(a), b = over_warp(b), c = over_warp(c);
    if (!(fabs(c) > 4 * EPS * sqrt(a) * sqrt(b))) return false;
    const double slope = (b - a) / (2 * c);
    const double tangent = copysign(1.0, slope) / (fabs(slope) + sqrt(1 + slope * slope));
    const real cosine = real(1 / sqrt(1 + tangent * tangent)), sine = real(tangent / sqrt(1 + tangent * tangent));
    for (int i = threadIdx.x % 32; i < n; i += 32) {
        const real before = x[i];
        x[i] = cosine * before - sine * y[i];
        y[i] = sine * before + cosine * y[i];
    }
    return true;
}

// Rotate the rows of X until they are orthogonal, so that their lengths are its singular values: one-sided Jacobi
// rotations, in each round of all pairs that meet when one row sits still and the others move around the table.
__device__ void orthogonalise(real* X, int n) {
    const int seats = n + n % 2, others = seats - 1;
    for (int sweep = 0; sweep < 30; sweep++) {
        int moved = 0;
        for (int round = 0; round < others; round++) {
            for (int pair = threadIdx.x / 32; pair < seats / 2; pair += blockDim.x / 32) {
                const int p = pair ? (round + pair) % others : others, q = (round - pair + others) % others;
                if (p < n && q < n) moved += rotate(X + p * n, X + q * n, n);
            }
            __syncthreads();  // rows meet others in the next round
        }
        if (over_block(moved) == 0) break;
    }
}
