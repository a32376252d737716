// The covariance before all pairs, and its inverse, by all threads of a block.

constexpr double SURE = 1e8;  // condition of H, at least, from which on its inverse has too few digits

__device__ double trace(const Square& A) {
    double total = 0;
    for (int i = threadIdx.x % 32; i < K; i += 32) total += A.at(i, i);
    return over_warp(total);
}

// A = A^-1 for a symmetric A, pivot by pivot; false if one is not positive. Nothing is searched for: A is definite. Rows
// and columns are left in `lines`, for two pivots in turn; a thread has the same columns every time.
__device__ bool invert(const Square& A, double* lines) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    #pragma unroll 1
    for (int p = 0; p < K; p++) {
        double *row = lines + p % 2 * 2 * KEYS, *column = row + KEYS;
        __syncthreads();  // A is what pivot p - 1 left
        for (int i = threadIdx.x; i < KEYS; i += THREADS) row[i] = A.at(p, i), column[i] = A.at(i, p);
        __syncthreads();  // its row and its column are there
        const double pivot = row[p], share = 1 / pivot;
        if (!(pivot > 0)) return false;
        double along[(KEYS + 31) / 32];
        #pragma unroll
        for (int m = 0; m < (KEYS + 31) / 32; m++) {
            const int j = min(lane + 32 * m, KEYS - 1);
            along[m] = j == p ? share : share * row[j];
        }
        #pragma unroll 4
        for (int i = warp; i < KEYS; i += WARPS) {
            const double factor = -column[i];
            #pragma unroll
            for (int m = 0; m < (KEYS + 31) / 32; m++) {
                const int j = lane + 32 * m;
                if (KEYS % 32 && j >= KEYS) continue;
                double& x = A.at(i, j);
                x = i == p ? along[m] : fma(factor, along[m], j == p ? 0 : x);
            }
        }
    }
    __syncthreads();  // A is whole
    each_of_square(K, [&](int i, int j) { if (j > i) A.at(i, j) = A.at(j, i); });
    __syncthreads();  // and symmetric
    return true;
}

// P as the caller gave it, made symmetric; whether it is up to rounding. Pairs teach nothing of what P is not symmetric
// by, and every decay lets that grow: the least of it ends, hundreds of tokens later, in a P that is not positive.
__device__ bool load_covariance(const Square& P, Rows<const gate> from, double eps) {
    __shared__ double sizes[WARPS], gaps[WARPS];
    double size = 0, gap = 0;
    each_of_square(KEYS, [&](int i, int j) {
        const bool there = i < K && j < K;
        const double x = there ? double(from.at(i, j)) : 0, across = there ? double(from.at(j, i)) : 0;
        P.at(i, j) = (x + across) / 2, size = fmax(size, fabs(x)), gap = fmax(gap, fabs(x - across));
    });
    for (int distance = 1; distance < 32; distance *= 2) {
        size = fmax(size, __shfl_xor_sync(0xffffffffu, size, distance));
        gap = fmax(gap, __shfl_xor_sync(0xffffffffu, gap, distance));
    }
    if (threadIdx.x % 32 == 0) sizes[threadIdx.x / 32] = size, gaps[threadIdx.x / 32] = gap;
    __syncthreads();  // the largest is among them
    for (int i = 0; i < WARPS; i++) size = fmax(size, sizes[i]), gap = fmax(gap, gaps[i]);
    return gap <= 1000 * eps * size;
}
__device__ bool finite(const Square& P) {
    double total = 0;
    each_of_square(K, [&](int i, int j) { total += P.at(i, j) - P.at(i, j); });
    return over_block(total) == 0;
}
