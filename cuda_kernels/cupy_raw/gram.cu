// The Gram matrix of weighted keys at the start of each piece of PIECE tokens:  H = g_t H + beta_t k_t k_t^T.
//
// A block has one memory and some columns of H. PARTS neighbouring lanes share a column: lane `part` owns the rows
// part, part + PARTS, ... of it, in registers, from the first token to the last.

enum { KEY, GATE, BETA, STATE, STARTS };

extern "C" __global__ void __launch_bounds__(128)
gram(const data* k, const gate* log_decay, const gate* beta, real* H, real* starts, const long long* table, int axes,
     int tokens, int columns, int blocks) {
    __shared__ real keys[2][ROWS * PARTS];
    const int part = threadIdx.x % PARTS, memory = blockIdx.x / blocks;
    const int column = blockIdx.x % blocks * (blockDim.x / PARTS) + threadIdx.x / PARTS;
    const bool mine = column < columns;
    const auto key = rows(k, table, axes, KEY, memory);
    const auto decay = rows(log_decay, table, axes, GATE, memory);
    const auto weight = rows(beta, table, axes, BETA, memory);
    const auto state = rows(H, table, axes, STATE, memory);
    const auto start = rows(starts, table, axes, STARTS, memory);

    real own[ROWS];
    load_column(own, state, part, column, mine);

    stage_key(keys[0], key, weight, beta, 0);
    #pragma unroll 1
    for (int t = 0; t < tokens; t++) {
        __syncthreads();  // token t is staged, and nobody is left at t - 1, in whose place t + 1 goes
        if (t + 1 < tokens) stage_key(keys[(t + 1) % 2], key, weight, beta, t + 1);
        const real left = decay_of(decay, log_decay, t);
        for (int r = 0; r < ROWS; r++) {
            const int row = part + r * PARTS;
            if (row >= K || !mine) continue;
            if (t % PIECE == 0) start.at(t / PIECE * K + row, column) = own[r];
            own[r] = fma(keys[t % 2][row], keys[t % 2][column], kept(left, own[r]));
        }
    }

    store_column(own, state, part, column, mine);
}
