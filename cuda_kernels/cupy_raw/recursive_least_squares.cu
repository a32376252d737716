// Recursive least squares, the chain of covariances: the gains of all tokens, from a square root R of P.
//
// With a_i = R_{i-1}^T k_i,  s_i = left_i + |a_i|^2  and what is `left` of the information at the start of a segment,
//
//     R_i = R_{i-1} - w_i a_i^T,    w_i = R_{i-1} a_i / (s_i + sqrt(left_i s_i)),    gain_i = R_{i-1} a_i / s_i:
//
// reflections, which a segment of up to CHUNK tokens applies together. Its three products with R read each number of R
// once; a_i, and the products of the a by which the w follow, are found in shared memory. Nothing is subtracted from P.
// A segment ends where a decay or a cap has to act on R. One block per memory; innovations.cu does the rest. `real` is
// double whatever the data: R is rounded at every step, and nothing forgets what is lost there.

enum { KEY, GATE, BETA, COVARIANCE, ROOT, SCRATCH, GAINS, BAD };

constexpr real FAINTEST = -60, FADED = 0.25;

// Mean eigenvalue of R R^T.
__device__ double spread(const real* R) {
    double total = 0;
    for (int i = 0; i < K; i++)
        for (int j = threadIdx.x; j < K; j += blockDim.x) total += double(R[i * K + j]) * R[i * K + j];
    return over_block(total) / K;
}

// R of orthogonal columns in whose directions no eigenvalue of R R^T is above `largest` or `ratio` times the smallest.
__device__ void cap(real* R, real* X, double largest, double ratio) {
    __shared__ double values[K];
    transpose(R, X, K);
    orthogonalise(X, K);
    for (int i = threadIdx.x / 32; i < K; i += blockDim.x / 32) {
        double value = 0;
        for (int j = threadIdx.x % 32; j < K; j += 32) value += double(X[i * K + j]) * X[i * K + j];
        value = over_warp(value);
        if (threadIdx.x % 32 == 0) values[i] = value;
    }
    __syncthreads();  // the smallest is among them
    double smallest = values[0];
    #pragma unroll 4
    for (int i = 1; i < K; i++) smallest = fmin(smallest, values[i]);
    largest = fmin(largest, ratio * smallest);
    for (int i = 0; i < K; i++)
        for (int j = threadIdx.x; j < K && values[i] > largest; j += blockDim.x) X[i * K + j] *= sqrt(largest / values[i]);
    transpose(X, R, K);
}

__device__ bool finite(Rows<real> P) {
    double total = 0;
    for (int i = 0; i < K; i++)
        for (int j = threadIdx.x; j < K; j += blockDim.x) total += P.at(i, j) - P.at(i, j);
    return over_block(total) == 0;
}

// The lower triangle of P into R; false if P is not symmetric up to rounding.
__device__ bool load(real* R, Rows<real> P, double eps) {
    __shared__ real largest[128], gaps[128];
    real size = 0, gap = 0;
    for (int j = threadIdx.x; j < K; j += blockDim.x)
        for (int i = 0; i < K; i++) {
            R[i * K + j] = j <= i ? P.at(i, j) : real(0);
            size = fmax(size, fabs(P.at(i, j)));
            gap = fmax(gap, fabs(P.at(i, j) - P.at(j, i)));
        }
    largest[threadIdx.x] = size, gaps[threadIdx.x] = gap;
    __syncthreads();  // the largest is among them
    for (int i = 0; i < int(blockDim.x); i++) size = fmax(size, largest[i]), gap = fmax(gap, gaps[i]);
    return gap <= 1000 * eps * size;
}

// P = R R^T, exactly symmetric, and its norm.
__device__ double store(Rows<real> P, const real* R, real* X) {
    transpose(R, X, K);
    double norm = 0;
    for (int j = threadIdx.x; j < K; j += blockDim.x)
        for (int i = 0; i <= j; i++) {
            real total = 0;
            for (int m = 0; m < K; m++) total = fma(X[m * K + i], X[m * K + j], total);
            P.at(i, j) = P.at(j, i) = total;
            norm += (i < j ? 2.0 : 1.0) * total * total;
        }
    return sqrt(over_block(norm));
}

extern "C" __global__ void __launch_bounds__(128)
recursive_least_squares(const data* k, const gate* log_decay, const gate* beta, real* P, real* root, real* scratch,
                        real* gains, bool* bad, const long long* table, int axes, int tokens, double limit, double eps) {
    __shared__ real keys[CHUNK][K];     // weighted
    __shared__ real vectors[CHUNK][K];  // k_i as the reflections before it leave it, then a_i
    __shared__ real shifts[CHUNK][K];   // w_i
    __shared__ real products[CHUNK][CHUNK], energies[CHUNK], left[CHUNK], roots[CHUNK];
    const int memory = blockIdx.x, thread = threadIdx.x, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const auto key = rows(k, table, axes, KEY, memory);
    const auto decay = rows(log_decay, table, axes, GATE, memory);
    const auto weight = rows(beta, table, axes, BETA, memory);
    const auto covariance = rows(P, table, axes, COVARIANCE, memory);
    const auto gain = rows(gains, table, axes, GAINS, memory);
    real* R = rows(root, table, axes, ROOT, memory).begin;
    real* X = rows(scratch, table, axes, SCRATCH, memory).begin;

    const bool whole = finite(covariance), even = load(R, covariance, eps);
    if (whole && !(even && cholesky(R, K))) {
        if (thread == 0) rows(bad, table, axes, BAD, memory).at(0, 0) = true;
        return;
    }
    for (int i = 0; i < K && !whole; i++)  // a bad number spoils the whole memory
        for (int j = thread; j < K; j += blockDim.x) R[i * K + j] = not_a_number();
    // What P tells of the trace of its inverse, a bound of its mean eigenvalue, and whether anything moves it.
    double information = whole ? trace_of_inverse(R, X, K) : infinity(), size = spread(R);
    bool moved = !whole;

    #pragma unroll 1
    for (int low = 0, n; low < tokens; low += n) {
        n = tokens - low < CHUNK ? tokens - low : CHUNK;
        for (int i = 0; i < CHUNK; i++) {
            const real share = i < n && beta ? sqrt(real(weight.at(low + i, 0))) : real(1);
            for (int j = thread; j < K; j += blockDim.x)  // a pair of weight zero is not even looked at
                keys[i][j] = i < n && share != 0 ? share * real(widened(key.at(low + i, j))) : real(0);
        }
        for (int i = thread; i < n; i += blockDim.x) {
            real total = 0;
            for (int j = 0; j <= i && log_decay; j++) total += fmax(real(decay.at(low + j, 0)), FAINTEST);
            left[i] = exp(total);
            roots[i] = beta ? sqrt(real(weight.at(low + i, 0))) : real(1);
        }
        __syncthreads();  // keys are there
        for (int i = warp; i < n; i += warps) {
            const real energy = dot_of_warp(keys[i], keys[i], K);
            if (thread % 32 == 0) energies[i] = energy;
        }
        __syncthreads();  // energies are there

        const double most = largest_before(energies[0], limit) * left[0];
        if (size > SLACK * most) size = spread(R);
        if (size > SLACK * most && size < infinity()) {
            cap(R, X, most, infinity());
            size = spread(R), information = infinity();
        }
        int end = 1;
        while (end < n && left[end] >= FADED && !(size > SLACK * largest_before(energies[end], limit) * left[end])) end++;
        n = end;
        for (int i = 0; i < n; i++) {
            information = information * (i ? left[i] / left[i - 1] : left[i]) + energies[i];
            moved |= left[i] != 1 || energies[i] != 0;
        }
        size /= left[n - 1];

        for (int j = thread; j < K; j += blockDim.x) {
            real sums[CHUNK] = {};
            #pragma unroll 1
            for (int p = 0; p < K; p++)
                for (int i = 0; i < CHUNK; i++) sums[i] = fma(R[p * K + j], keys[i][p], sums[i]);
            for (int i = 0; i < CHUNK; i++) vectors[i][j] = sums[i];
        }
        #pragma unroll 1
        for (int i = 0; i < n; i++) {
            __syncthreads();  // row i is what the reflections before it left
            const real* a = vectors[i];
            const real s = left[i] + dot_of_warp(a, a, K), share = 1 / (s + sqrt(left[i] * s));
            for (int m = i + 1 + warp; m < n; m += warps) {
                const real along = share * dot_of_warp(a, vectors[m], K);
                for (int j = thread % 32; j < K; j += 32) vectors[m][j] = fma(-along, a[j], vectors[m][j]);
            }
        }
        for (int pair = warp; pair < n * n; pair += warps) {
            const int m = pair / n, i = pair % n;
            if (m > i) continue;
            const real product = dot_of_warp(vectors[m], vectors[i], K);
            if (thread % 32 == 0) products[m][i] = product;
        }
        __syncthreads();  // products are there

        for (int p = thread; p < K; p += blockDim.x) {
            real own[CHUNK] = {};
            #pragma unroll 1
            for (int j = 0; j < K; j++)
                for (int i = 0; i < CHUNK; i++) own[i] = fma(R[p * K + j], vectors[i][j], own[i]);
            for (int i = 0; i < CHUNK; i++) {
                if (i >= n) break;
                for (int m = 0; m < i; m++) own[i] = fma(-own[m], products[m][i], own[i]);
                const real s = left[i] + products[i][i];
                gain.at(low + i, p) = roots[i] * own[i] / s;
                shifts[i][p] = own[i] = own[i] / (s + sqrt(left[i] * s));
            }
        }
        const real rest = 1 / sqrt(left[n - 1]);
        __syncthreads();  // shifts are there, and nobody reads R along its rows any more
        for (int j = thread; j < K; j += blockDim.x) {
            real own[CHUNK];
            for (int i = 0; i < CHUNK; i++) own[i] = i < n ? vectors[i][j] : real(0);
            #pragma unroll 1
            for (int p = 0; p < K; p++) {
                real taken = 0;  // summed before they are taken off: R is rounded once
                for (int i = 0; i < CHUNK; i++) taken = i < n ? fma(shifts[i][p], own[i], taken) : taken;
                R[p * K + j] = rest * (R[p * K + j] - taken);
            }
        }
    }

    if (!moved) return;
    if (2 * store(covariance, R, X) * information < limit) return;
    cap(R, X, infinity(), limit);
    store(covariance, R, X);
}
