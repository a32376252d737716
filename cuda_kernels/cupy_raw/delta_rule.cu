// Delta rule, token by token:  S' = diag(a_t) S,  S = S' + beta_t k_t (v_t - S'^T p_t)^T,  o_t = S^T q_t.
//
// A block has one memory and some of its value columns. PARTS neighbouring lanes share a column: lane `part` owns the
// rows part, part + PARTS, ... of it, in registers, from the first token to the last. What all columns need of a token
// is staged in shared memory while the token before it is worked on.

enum { Q, KEY, V, BETA, GATE, ERASE, STATE, STATE_NEXT, O };

extern "C" __global__ void __launch_bounds__(128)
delta_rule(const data* q, const data* k, const data* v, const real* beta, const real* log_decay,
           const data* erase_key, const real* S, real* S_next, data* o, const long long* table, int axes, int tokens,
           int columns, int groups, int blocks, real scale) {
    __shared__ real keys[2][ROWS * PARTS];
    __shared__ real erased[2][ROWS * PARTS];
    __shared__ real decays[2][ROWS * PARTS];
    __shared__ real queries[2][ROWS * PARTS];  // of the first group
    const int part = threadIdx.x % PARTS, memory = blockIdx.x / blocks;
    const int column = blockIdx.x % blocks * (blockDim.x / PARTS) + threadIdx.x / PARTS;
    const bool mine = column < columns;
    const auto key = rows(k, table, axes, KEY, memory);
    const auto erase = rows(erase_key ? erase_key : k, table, axes, erase_key ? ERASE : KEY, memory);
    const auto value = rows(v, table, axes, V, memory);
    const auto step = rows(beta, table, axes, BETA, memory);
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
            erased[t % 2][row] = widened(erase.at(t, row));
            decays[t % 2][row] = log_decay ? exp(gate.at(t, row)) : real(1);
            queries[t % 2][row] = widened(query.at(t, row));
        }
    };
    stage(0);
    #pragma unroll 1
    for (int t = 0; t < tokens; t++) {
        const real value_t = mine ? widened(value.at(t, column)) : real(0);  // on its way while others are waited for
        const real step_t = step.at(t, 0);
        __syncthreads();  // token t is staged, and nobody is left at t - 1, in whose place t + 1 goes
        if (t + 1 < tokens) stage(t + 1);

        real recalled = 0;
        for (int r = 0; r < ROWS; r++) {
            const int row = part + r * PARTS;
            if (row >= K) continue;
            own[r] = kept(decays[t % 2][row], own[r]);
            recalled = fma(erased[t % 2][row], own[r], recalled);
        }
        recalled = over_parts(recalled);
        const real error = mine ? step_t * (value_t - recalled) : real(0);
        for (int r = 0; r < ROWS; r++) {
            const int row = part + r * PARTS;
            if (row < K) own[r] = fma(keys[t % 2][row], error, own[r]);
        }

        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            const auto asked = query.of(g).line(t);
            real total = 0;
            for (int r = 0; r < ROWS; r++) {
                const int row = part + r * PARTS;
                if (row < K) total = fma(g ? widened(asked[row]) : queries[t % 2][row], own[r], total);
            }
            total = over_parts(total);
            if (mine && part == 0) put(answer.of(g).at(t, column), scale * total);
        }
    }

    store_column(own, rows(S_next, table, axes, STATE_NEXT, memory), part, column, mine);
}
