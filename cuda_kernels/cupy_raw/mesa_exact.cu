// Mesa layer, solved exactly:  x_t = (H_t + diag(ridge))^-1 q_t,  H_t = g_t H_{t-1} + beta_t k_t k_t^T.
//
// One block per piece of PIECE tokens, whose Gram matrix at the start is in `starts`; each token is solved by itself, in
// memory of this block.

enum { Q, KEY, GATE, BETA, RIDGE, STARTS, FACTORS, X };

extern "C" __global__ void __launch_bounds__(128)
mesa_exact(const data* q, const data* k, const gate* log_decay, const gate* beta, const real* ridge, real* starts,
           real* factors, real* x, const long long* table, int axes, int tokens, int groups, int blocks, double eps) {
    __shared__ Vectors all;
    const int memory = blockIdx.x / blocks, piece = blockIdx.x % blocks, thread = threadIdx.x;
    const auto query = rows(q, table, axes, Q, memory);
    const auto key = rows(k, table, axes, KEY, memory);
    const auto decay = rows(log_decay, table, axes, GATE, memory);
    const auto weight = rows(beta, table, axes, BETA, memory);
    const auto solution = rows(x, table, axes, X, memory);
    const auto fixed = rows(ridge, table, axes, RIDGE, memory);
    real* H = rows(starts, table, axes, STARTS, memory).begin + (long long)piece * K * K;
    real* A = rows(factors, table, axes, FACTORS, memory).begin + (long long)piece * K * K;
    for (int p = thread; p < K; p += blockDim.x) all.ridge[p] = fixed.at(0, p);
    real unbound = 0;
    for (int p = 0; p < K; p++) unbound += fixed.at(0, p) == 0;

    #pragma unroll 1
    for (int t = piece * PIECE; t < tokens && t < (piece + 1) * PIECE; t++) {
        const real left = decay_of(decay, log_decay, t);
        stage_key(all.key, key, weight, beta, t);
        __syncthreads();  // the key is there
        learn(H, all.key, left);
        const bool factored = factorise(A, H, all, unbound != 0, eps);
        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            for (int p = thread; p < K; p += blockDim.x) all.right[p] = widened(query.of(g).at(t, p));
            solve(A, all, factored);
            for (int p = thread; p < K; p += blockDim.x) solution.of(g).at(t, p) = all.x[p];
        }
    }
}
