// Mesa layer by conjugate gradients:  (H_t + diag(ridge)) x_t = q_t,  H_t = g_t H_{t-1} + beta_t k_t k_t^T.
//
// One block per piece of PIECE tokens, whose Gram matrix at the start is in `starts`. To PRECONDITION, a Cholesky factor
// of H + ridge / reference at one token is carried to the next ones by the recursion of least squares, in which that
// ridge decays with the data: exact without decay, near where little has decayed. A token that has lost more than half
// of what the factor knows goes without, until enough of them have come for another one. The reference is foretold from
// the first gate, so that what is done for a token never depends on later ones. All in double precision.

enum { Q, KEY, GATE, BETA, RIDGE, STARTS, FACTORS, X, WORST };

constexpr real HALF = 0.5;
constexpr int FRESH = 8;  // tokens for which a factor pays

struct Vectors {
    real ridge[K], key[K], x[K], r[K], p[K], z[K], along[K], shift[K];
};

// Y = L^-1 for H + ridge / reference = L L^T, so that Y^T Y is its inverse; false if there is none.
__device__ bool factorise(real* L, real* Y, const real* H, const Vectors& all, real reference) {
    for (int i = 0; i < K; i++)
        for (int j = threadIdx.x; j < K; j += blockDim.x) {
            L[i * K + j] = H[i * K + j] + (i == j ? all.ridge[i] / reference : real(0));
            if (i < j) Y[i * K + j] = 0;
        }
    return cholesky(L, K) && trace_of_inverse(L, Y, K) < infinity();
}

// The same after one more pair and one more decay.
__device__ void carry(real* Y, Vectors& all, real left) {
    for (int i = threadIdx.x / 32; i < K; i += blockDim.x / 32) {
        const real a = dot_of_warp(Y + i * K, all.key, K);
        if (threadIdx.x % 32 == 0) all.along[i] = a;
    }
    __syncthreads();  // a = Y k is there
    const real s = left + dot_of_warp(all.along, all.along, K), share = 1 / (s + sqrt(left * s));
    for (int j = threadIdx.x; j < K; j += blockDim.x) {
        real total = 0;
        for (int i = 0; i < K; i++) total = fma(Y[i * K + j], all.along[i], total);
        for (int i = 0; i < K; i++) Y[i * K + j] = fma(-share * all.along[i], total, Y[i * K + j]) / sqrt(left);
    }
}

// z = Y^T Y r, or r itself.
__device__ void precondition(const real* Y, Vectors& all, bool factored) {
    __syncthreads();  // r is there
    for (int i = threadIdx.x / 32; i < K && factored; i += blockDim.x / 32) {
        const real known = dot_of_warp(Y + i * K, all.r, K);
        if (threadIdx.x % 32 == 0) all.along[i] = known;
    }
    if (factored) __syncthreads();  // what is known along the rows of Y is there
    for (int j = threadIdx.x; j < K; j += blockDim.x) {
        real total = factored ? real(0) : all.r[j];
        for (int i = 0; i < K && factored; i++) total = fma(Y[i * K + j], all.along[i], total);
        all.z[j] = total;
    }
}

__device__ real dot(const real* x, const real* y) {  // of what each thread has itself
    real total = 0;
    for (int j = threadIdx.x; j < K; j += blockDim.x) total = fma(x[j], y[j], total);
    return over_block(total);
}

// x from zero; the relative residual.
__device__ real solve(const real* H, const real* Y, Vectors& all, bool factored, int most, real tolerance) {
    precondition(Y, all, factored);
    for (int j = threadIdx.x; j < K; j += blockDim.x) all.x[j] = 0, all.p[j] = all.z[j];
    const real start = dot(all.r, all.r);
    real error = start, slope = dot(all.r, all.z);
    for (int step = 0; step < most && error > tolerance * tolerance * start; step++) {
        __syncthreads();  // p is there
        for (int j = threadIdx.x; j < K; j += blockDim.x) {
            real total = all.ridge[j] * all.p[j];
            for (int i = 0; i < K; i++) total = fma(H[i * K + j], all.p[i], total);
            all.shift[j] = total;
        }
        const real length = ratio(slope, dot(all.p, all.shift));
        for (int j = threadIdx.x; j < K; j += blockDim.x) {
            all.x[j] = fma(length, all.p[j], all.x[j]);
            all.r[j] = fma(-length, all.shift[j], all.r[j]);
        }
        precondition(Y, all, factored);
        error = dot(all.r, all.r);
        const real before = slope, share = ratio(slope = dot(all.r, all.z), before);
        for (int j = threadIdx.x; j < K; j += blockDim.x) all.p[j] = fma(share, all.p[j], all.z[j]);
    }
    return sqrt(ratio(error, start));
}

extern "C" __global__ void __launch_bounds__(128)
mesa_cg(const data* q, const data* k, const gate* log_decay, const gate* beta, const real* ridge, real* starts,
        real* factors, real* x, real* worst, const long long* table, int axes, int tokens, int groups, int blocks,
        int iterations, double tolerance) {
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
    real* L = rows(factors, table, axes, FACTORS, memory).begin + 2LL * piece * K * K;
    real* Y = L + K * K;
    for (int p = thread; p < K; p += blockDim.x) all.ridge[p] = fixed.at(0, p);
    bool factored = false, regular = true;
    for (int p = 0; p < K; p++) regular &= fixed.at(0, p) > 0;
    real known = 0, residual = 0;  // share that is left of what the factor knows; the worst residual
    int age = FRESH;

    #pragma unroll 1
    for (int t = piece * PIECE; t < tokens && t < (piece + 1) * PIECE; t++) {
        const real left = decay_of(decay, log_decay, t);
        stage_key(all.key, key, weight, beta, t);
        __syncthreads();  // the key is there
        learn(H, all.key, left);
        known *= left, age++;
        if (factored && known >= HALF) {
            carry(Y, all, left);
        } else if (PRECONDITION && regular && age > FRESH) {
            const real last = log_decay ? exp(real(decay.at(t, 0)) * ((piece + 1) * PIECE - t)) : real(1);
            factored = factorise(L, Y, H, all, sqrt(fmax(last, HALF)));
            known = 1, age = 1;
        } else {
            factored = false;
        }
        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            for (int p = thread; p < K; p += blockDim.x) all.r[p] = widened(query.of(g).at(t, p));
            const real rest = solve(H, Y, all, factored, iterations, tolerance);
            for (int p = thread; p < K; p += blockDim.x)
                solution.of(g).at(t, p) = rest - rest == 0 ? all.x[p] : real(not_a_number());
            residual = fmax(residual, rest);
        }
    }
    if (thread == 0) report.at(piece, 0) = residual, report.at(piece, 1) = iterations;
}
