// What a memory recalls at given points:  G = g_t G + beta_t k_t v_t^T,  o_t = G^T x_t.
//
// A block has one memory and some of its value columns. PARTS neighbouring lanes share a column: lane `part` owns the
// rows part, part + PARTS, ... of it, in registers, from the first token to the last. `real` is double whatever the data.

enum { X, KEY, V, GATE, BETA, STATE, O };

extern "C" __global__ void __launch_bounds__(128)
recall(const real* x, const data* k, const data* v, const gate* log_decay, const gate* beta, real* G, data* o,
       const long long* table, int axes, int tokens, int columns, int groups, int blocks) {
    __shared__ real keys[2][ROWS * PARTS];
    const int part = threadIdx.x % PARTS, memory = blockIdx.x / blocks;
    const int column = blockIdx.x % blocks * (blockDim.x / PARTS) + threadIdx.x / PARTS;
    const bool mine = column < columns;
    const auto key = rows(k, table, axes, KEY, memory);
    const auto value = rows(v, table, axes, V, memory);
    const auto decay = rows(log_decay, table, axes, GATE, memory);
    const auto weight = rows(beta, table, axes, BETA, memory);
    const auto point = rows(x, table, axes, X, memory);
    const auto answer = rows(o, table, axes, O, memory);
    const auto state = rows(G, table, axes, STATE, memory);

    real own[ROWS];
    load_column(own, state, part, column, mine);

    stage_key(keys[0], key, weight, beta, 0);
    #pragma unroll 1
    for (int t = 0; t < tokens; t++) {
        __syncthreads();  // token t is staged, and nobody is left at t - 1, in whose place t + 1 goes
        if (t + 1 < tokens) stage_key(keys[(t + 1) % 2], key, weight, beta, t + 1);
        const real left = decay_of(decay, log_decay, t), root = root_of(weight, beta, t);
        const real value_t = mine && root != 0 ? root * widened(value.at(t, column)) : real(0);
        for (int r = 0; r < ROWS; r++) {
            const int row = part + r * PARTS;
            if (row < K) own[r] = fma(keys[t % 2][row], value_t, kept(left, own[r]));
        }

        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            const auto point_t = point.of(g).line(t);
            real total = 0;
            for (int r = 0; r < ROWS; r++) {
                const int row = part + r * PARTS;
                if (row < K) total = fma(point_t[row], own[r], total);
            }
            total = over_parts(total);
            if (mine && part == 0) put(answer.of(g).at(t, column), gate(total));
        }
    }

    store_column(own, state, part, column, mine);
}
