// One token of the mesa layer, solved exactly by the threads of a block:  x = (H + diag(ridge))^-1 q, from a Cholesky
// factor. Where a ridge is zero or lost in rounding, the solution of minimum norm from the eigenvectors, as in the solver;
// `eps` is that of the caller's numbers. Each matrix is K x K.

// Right sides and what is known along eigenvectors; the units in which channels are measured.
struct Vectors {
    real ridge[K], key[K], right[K], x[K], along[K], values[K], units[K];
};

// A = (H + ridge) in units of the channels.
__device__ void load(real* A, const real* H, const Vectors& all, bool scaled) {
    for (int i = 0; i < K; i++)
        for (int j = threadIdx.x; j < K; j += blockDim.x) {
            const real here = H[i * K + j] + (i == j ? all.ridge[i] : real(0));
            A[i * K + j] = scaled ? here * all.units[i] * all.units[j] : here;
        }
}

// Whether no eigenvalue can be lost in rounding: with a unit diagonal, none is below the share of the ridge.
__device__ bool safe(const real* H, const Vectors& all, real eps) {
    real lost = 0;
    for (int p = threadIdx.x; p < K; p += blockDim.x)
        lost += !(all.ridge[p] >= K * K * eps * (H[p * K + p] + all.ridge[p])) || all.ridge[p] == 0;
    return over_block(lost) == 0;
}

// Units of the channels times a power of two with which H + ridge is near one: its squares overflow nothing.
__device__ void tame(const real* H, Vectors& all) {
    __syncthreads();  // units are there
    real largest = 0;
    #pragma unroll 4
    for (int p = 0; p < K; p++)
        largest = fmax(largest, (H[p * K + p] + all.ridge[p]) * all.units[p] * all.units[p]);
    const real factor = largest > 0 && largest - largest == 0 ? ldexp(real(1), -(ilogb(largest) / 2)) : real(1);
    __syncthreads();  // everyone has seen the units
    for (int p = threadIdx.x; p < K; p += blockDim.x) all.units[p] *= factor;
    __syncthreads();  // units are there again
}

// Eigenvectors of H + ridge as unit rows of A, and the eigenvalues, zero where they count as zero; whether none does.
__device__ bool diagonalise(real* A, const real* H, Vectors& all, real eps) {
    tame(H, all);
    load(A, H, all, true);
    __syncthreads();  // rows are there
    orthogonalise(A, K);
    for (int i = threadIdx.x / 32; i < K; i += blockDim.x / 32) {
        const real length = sqrt(dot_of_warp(A + i * K, A + i * K, K));
        if (threadIdx.x % 32 == 0) all.values[i] = length;
    }
    __syncthreads();  // the largest is among them
    real largest = 0, cut = 0;
    #pragma unroll 4
    for (int i = 0; i < K; i++) largest = fmax(largest, all.values[i]);
    for (int i = 0; i < K; i++) {
        const bool none = !(all.values[i] > K * eps * largest);
        cut += none;
        for (int j = threadIdx.x; j < K; j += blockDim.x) A[i * K + j] = none ? real(0) : A[i * K + j] / all.values[i];
    }
    __syncthreads();  // eigenvectors are there, and everyone has seen the values
    for (int i = threadIdx.x; i < K; i += blockDim.x)
        if (!(all.values[i] > K * eps * largest)) all.values[i] *= 0;  // a NaN stays
    return cut == 0;
}

// Units in which the matrix has a unit diagonal; or, `by_ridge`, those in which all ridges are the same.
__device__ void measure(const real* H, Vectors& all, bool by_ridge) {
    real largest = 0;
    #pragma unroll 4
    for (int p = 0; p < K; p++) largest = fmax(largest, all.ridge[p]);
    for (int p = threadIdx.x; p < K; p += blockDim.x)
        all.units[p] = by_ridge ? sqrt(largest / all.ridge[p]) : 1 / sqrt(H[p * K + p] + all.ridge[p]);
}

// x = what a pseudoinverse makes of the right side.
__device__ void solve_least(const real* A, Vectors& all) {
    for (int p = threadIdx.x; p < K; p += blockDim.x) all.right[p] *= all.units[p];
    __syncthreads();  // the right side and the values are there
    for (int i = threadIdx.x / 32; i < K; i += blockDim.x / 32) {
        const real known = dot_of_warp(A + i * K, all.right, K);
        if (threadIdx.x % 32 == 0) all.along[i] = all.values[i] > 0 ? known / all.values[i] : all.values[i];
    }
    __syncthreads();  // what is known along eigenvectors is there
    for (int p = threadIdx.x; p < K; p += blockDim.x) {
        real found = 0;
        for (int i = 0; i < K; i++) found = fma(all.along[i], A[i * K + p], found);
        all.x[p] = all.units[p] * found;
    }
}

// x = L^-T L^-1 right. Number 0 is the last and that of the thread which wrote it: nobody waits for x.
__device__ void solve_factored(const real* L, Vectors& all) {
    for (int j = 0; j < K; j++) {
        __syncthreads();  // right side j is what the numbers before it left
        const real x = all.right[j] / L[j * K + j];
        for (int i = j + 1 + threadIdx.x; i < K; i += blockDim.x) all.right[i] = fma(-L[i * K + j], x, all.right[i]);
        if (threadIdx.x == 0) all.along[j] = x;
    }
    for (int j = K - 1; j >= 0; j--) {
        __syncthreads();  // and from the end
        const real x = all.along[j] / L[j * K + j];
        for (int i = threadIdx.x; i < j; i += blockDim.x) all.along[i] = fma(-L[j * K + i], x, all.along[i]);
        if (threadIdx.x == 0) all.x[j] = x;
    }
}

// A is what `solve` needs for one token; whether it is a Cholesky factor. `unbound`: a ridge is zero.
__device__ bool factorise(real* A, const real* H, Vectors& all, bool unbound, real eps) {
    load(A, H, all, false);
    if (safe(H, all, eps) && cholesky(A, K)) return true;
    for (int p = threadIdx.x; p < K; p += blockDim.x) all.units[p] = 1;
    #pragma unroll 1
    for (bool by_ridge = false;; by_ridge = true) {
        if (!unbound) measure(H, all, by_ridge);
        if (diagonalise(A, H, all, eps) || unbound || by_ridge) return false;
    }
}
// x for the right side, of which a thread has found the numbers that it looks at first.
__device__ void solve(const real* A, Vectors& all, bool factored) {
    if (factored) solve_factored(A, all);
    else solve_least(A, all);
}
