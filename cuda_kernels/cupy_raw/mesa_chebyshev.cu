// Mesa layer by Chebyshev's iteration:  (H_t + diag(ridge)) x_t = q_t,  H_t = g_t H_{t-1} + beta_t k_t k_t^T.
//
// One block per piece of PIECE tokens, whose Gram matrix at the start is in `starts`. Eigenvalues lie between the
// smallest ridge and the largest one plus the norm of H. All in double precision; `eps` is that of the caller's numbers.

enum { Q, KEY, GATE, BETA, RIDGE, STARTS, X, WORST };

struct Vectors {
    real ridge[K], key[K], x[K], r[K], d[K];
};

__device__ real norm(const real* H) {
    real total = 0;
    for (int i = 0; i < K; i++)
        for (int j = threadIdx.x; j < K; j += blockDim.x) total = fma(H[i * K + j], H[i * K + j], total);
    return sqrt(over_block(total));
}

// x from zero; the relative residual.
__device__ real solve(const real* H, Vectors& all, real least, real largest, real eps, int most, real tolerance) {
    const real middle = (largest + least) / 2, half = fmax((largest - least) / 2, eps * middle);
    real start = 0, rho = half / middle;
    for (int j = threadIdx.x; j < K; j += blockDim.x) {
        all.x[j] = 0, all.d[j] = all.r[j] / middle;
        start = fma(all.r[j], all.r[j], start);
    }
    real error = start = over_block(start);
    for (int step = 0; step < most && error > tolerance * tolerance * start; step++) {
        for (int j = threadIdx.x; j < K; j += blockDim.x) {
            real total = all.ridge[j] * all.d[j];
            for (int i = 0; i < K; i++) total = fma(H[i * K + j], all.d[i], total);
            all.x[j] += all.d[j];
            all.r[j] -= total;
        }
        const real before = rho;
        rho = 1 / (2 * middle / half - before);
        __syncthreads();  // nobody reads d any more
        error = 0;
        for (int j = threadIdx.x; j < K; j += blockDim.x) {
            all.d[j] = rho * before * all.d[j] + 2 * rho / half * all.r[j];
            error = fma(all.r[j], all.r[j], error);
        }
        error = over_block(error);  // and all of d is there
    }
    return sqrt(ratio(error, start));
}

extern "C" __global__ void __launch_bounds__(128)
mesa_chebyshev(const data* q, const data* k, const gate* log_decay, const gate* beta, const real* ridge, real* starts,
               real* x, real* worst, const long long* table, int axes, int tokens, int groups, int blocks,
               int iterations, double tolerance, double eps) {
    __shared__ Vectors all;
    const int memory = blockIdx.x / blocks, piece = blockIdx.x % blocks, thread = threadIdx.x;
    const auto query = rows(q, table, axes, Q, memory);
    const auto key = rows(k, table, axes, KEY, memory);
    const auto decay = rows(log_decay, table, axes, GATE, memory);
    const auto weight = rows(beta, table, axes, BETA, memory);
    const auto solution = rows(x, table, axes, X, memory);
    const auto fixed = rows(ridge, table, axes, RIDGE, memory);
    const auto report = rows(worst, table, axes, WORST, memory);
    real* H = rows(starts, table, axes, STARTS, memory).begin + (long long)piece * K * K;
    for (int p = thread; p < K; p += blockDim.x) all.ridge[p] = fixed.at(0, p);
    real least = infinity(), largest = 0, residual = 0, needed = iterations;
    for (int p = 0; p < K; p++) least = fmin(least, fixed.at(0, p)), largest = fmax(largest, fixed.at(0, p));

    #pragma unroll 1
    for (int t = piece * PIECE; t < tokens && t < (piece + 1) * PIECE; t++) {
        stage_key(all.key, key, weight, beta, t);
        __syncthreads();  // the key is there
        learn(H, all.key, decay_of(decay, log_decay, t));
        const real bound = norm(H) + largest;
        real most = iterations;
        if (!iterations) {  // what the bounds ask for
            const real spread = (bound < infinity() ? bound : least) / least;
            most = fmin(ceil(sqrt(spread) / 2 * log(2 / fmax(tolerance, eps))) + 1, real(1000));
        }
        needed = fmax(needed, most);
        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            for (int p = thread; p < K; p += blockDim.x) all.r[p] = widened(query.of(g).at(t, p));
            const real rest = solve(H, all, least, bound, eps, int(most), tolerance);
            for (int p = thread; p < K; p += blockDim.x)
                solution.of(g).at(t, p) = rest - rest == 0 ? all.x[p] : real(not_a_number());
            residual = fmax(residual, rest);
        }
    }
    if (thread == 0) report.at(piece, 0) = residual, report.at(piece, 1) = needed;
}
