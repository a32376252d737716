// What the pairs of a piece of a sequence add to exact least squares:  H = sum w k k^T,  G = sum w k v^T,  where w is the
// weight of a pair times the decays behind it, and the decay of the whole piece. One block per memory, value columns
// and piece.

enum { KEY, V, GATE, BETA };

// The last token of a piece before which all is forgotten; if there is none, its first.
__device__ __forceinline__ int last_reset(const PairArrays& at, int first, int end) {
    int last = first;
    #pragma unroll 1
    for (int token = first + threadIdx.x % 32; token < end; token += 32)
        if (at.resets(token)) last = token;
    return -least_of_warp(-last);
}

extern "C" __global__ void __launch_bounds__(256, 1)
pair_sums(const data* k, const data* v, const gate* log_decay, const gate* beta, float* sums, const long long* table,
          int axes, int tokens, int columns, int length, int stored, int blocks) {
    __shared__ Weights all;
    __shared__ PairArrays arrays;
    __shared__ double left, moved;  // of the first thread
    unsigned char* const at = dynamic_shared();
    const Tokens keys = {reinterpret_cast<float*>(at)};
    const Panel<float, VALUES + 8> values = {keys.begin + CHUNK * Tokens::stride};
    const int memory = blockIdx.x / blocks, piece = blockIdx.x % stored, warp = threadIdx.x / 32;
    const int first_column = blockIdx.x % blocks / stored * VALUES;
    if (threadIdx.x == 0) arrays = pairs_of(k, v, log_decay, beta, table, axes, KEY, memory), left = 1, moved = 0;
    __syncthreads();  // arrays are known
    const Sums sum(reinterpret_cast<double*>(sums), blockIdx.x);

    Memory G = {};
    Sum H[OWN_TILES] = {};
    const int end = (piece + 1) * length, begin = last_reset(arrays, piece * length, end);
    #pragma unroll 1
    for (int low = begin; low < end; low += CHUNK) {
        load_pairs(keys, all, arrays, low, min(CHUNK, end - low), first_column, columns);
        prefetch_tokens(arrays.key, low + CHUNK, end, 0, K);
        prefetch_tokens(arrays.value, low + CHUNK, end, first_column, min(columns, first_column + VALUES));
        __syncthreads();  // weights are there
        load_values(values, all, arrays, low, min(CHUNK, end - low), first_column, columns);
        __syncthreads();  // pairs are there
        const double rest = all.left[CHUNK - 1];
        if (threadIdx.x == 0) {
            left = fmax(left * rest, 0x1p-1022);  // zero only after a reset
            for (int i = 0; i < CHUNK; i++) moved += all.left[i] != 1 || all.energy[i] != 0;
        }
        for (int n = 0; n < OCTETS && rest != 1; n++)
            for (int i = 0; i < 4; i++) G.own[n].x[i] *= rest;
        if (rest != 1) each_tile([&](int number, int, int) { for (double& x : H[number].x) x *= rest; });
        #pragma unroll 1
        for (int token = 0; token < CHUNK; token += 8) {
            const int pair = token + threadIdx.x % 4 * 2;
            double share[2];
            for (int i = 0; i < 2; i++) {
                const double root = all.root[pair + i];
                share[i] = root * root * exp(all.decay[CHUNK - 1] - all.decay[pair + i]);
            }
            const auto weighed = [&](int n) {
                Right right = keys.right(token, n);
                for (int i = 0; i < 2; i++) right.x[i] *= share[i];
                return right;
            };
            const Left own = left_of_columns(values, 16 * warp, token);
            #pragma unroll
            for (int n = 0; n < OCTETS; n++) G.own[n].add(own, weighed(8 * n));
            each_tile([&](int number, int row, int column) {
                H[number].add(left_of_columns(keys, row, token), weighed(column));
            });
        }
        __syncthreads();  // nobody is left at these pairs
    }
    for (int n = 0; n < OCTETS; n++) sum.memory(n) = G.own[n];
    each_tile([&](int number, int row, int column) { sum.tile(row, column) = H[number]; });
    if (threadIdx.x == 0) sum.decay() = arrays.resets(begin) ? 0 : left, sum.moved() = moved;
}
