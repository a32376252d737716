// Diagonal plus low rank, token by token:  S = diag(d_t) S + b_t (S^T a_t)^T + k_t v_t^T,  o_t = S^T q_t.
//
// A block has one memory and some of its value columns. PARTS neighbouring lanes share a column: lane `part` owns the
// rows part, part + PARTS, ... of it, in registers, from the first token to the last. What all columns need of a token
// is staged in shared memory while the token before it is worked on.

enum { Q, KEY, V, A, B, GATE, STATE, O };

extern "C" __global__ void __launch_bounds__(128)
dplr(const data* q, const data* k, const data* v, const data* a, const data* b, const real* log_decay, real* S,
     data* o, const long long* table, int axes, int tokens, int columns, int groups, int blocks, real scale) {
    __shared__ real keys[2][ROWS * PARTS];
    __shared__ real reads[2][ROWS * PARTS];
    __shared__ real writes[2][ROWS * PARTS];
    __shared__ real decays[2][ROWS * PARTS];
    const int part = threadIdx.x % PARTS, memory = blockIdx.x / blocks;
    const int column = blockIdx.x % blocks * (blockDim.x / PARTS) + threadIdx.x / PARTS;
    const bool mine = column < columns;
    const auto key = rows(k, table, axes, KEY, memory);
    const auto value = rows(v, table, axes, V, memory);
    const auto read = rows(a, table, axes, A, memory);
    const auto write = rows(b, table, axes, B, memory);
    const auto gate = rows(log_decay, table, axes, GATE, memory);
    const auto query = rows(q, table, axes, Q, memory);
    const auto answer = rows(o, table, axes, O, memory);
    const auto state = rows(S, table, axes, STATE, memory);

    real own[ROWS];
    load_column(own, state, part, column, mine);

    auto stage = [&](int t) {
        #pragma unroll 1
        for (int row = threadIdx.x; row < K; row += blockDim.x) {
            keys[t % 2][row] = widened(key.at(t, row));
            reads[t % 2][row] = widened(read.at(t, row));
            writes[t % 2][row] = widened(write.at(t, row));
            decays[t % 2][row] = log_decay ? exp(gate.at(t, row)) : real(1);
        }
    };
    stage(0);
    #pragma unroll 1
    for (int t = 0; t < tokens; t++) {
        __syncthreads();  // token t is staged, and nobody is left at t - 1, in whose place t + 1 goes
        if (t + 1 < tokens) stage(t + 1);

        real reading = 0;  // of the state before its decay
        for (int r = 0; r < ROWS; r++) {
            const int row = part + r * PARTS;
            if (row < K) reading = fma(reads[t % 2][row], own[r], reading);
        }
        reading = over_parts(reading);
        const real value_t = mine ? widened(value.at(t, column)) : real(0);
        for (int r = 0; r < ROWS; r++) {
            const int row = part + r * PARTS;
            if (row >= K) continue;
            own[r] = fma(writes[t % 2][row], reading, decays[t % 2][row] * own[r]);
            own[r] = fma(keys[t % 2][row], value_t, own[r]);
        }

        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            const auto asked = query.of(g).line(t);
            real total = 0;
            for (int r = 0; r < ROWS; r++) {
                const int row = part + r * PARTS;
                if (row < K) total = fma(widened(asked[row]), own[r], total);
            }
            total = over_parts(total);
            if (mine && part == 0) put(answer.of(g).at(t, column), scale * total);
        }
    }

    store_column(own, state, part, column, mine);
}
