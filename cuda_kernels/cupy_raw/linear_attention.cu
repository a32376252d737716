// Linear attention, token by token:  S = diag(a_t) S + k_t v_t^T,  o_t = S^T q_t,  a_t = exp(log_decay_t).
//
// A block has one memory and some of its value columns. PARTS neighbouring lanes share a column: lane `part` owns the
// rows part, part + PARTS, ... of it, in registers, from the first token to the last. The key of a token, its decays and
// its query (of the first group) are staged in shared memory while the token before it is worked on. To NORMALIZE, each
// column keeps the weights z itself.

enum { Q, KEY, V, GATE, BONUS, STATE, STATE_NEXT, Z, Z_NEXT, O };

extern "C" __global__ void __launch_bounds__(128)
linear_attention(const data* q, const data* k, const data* v, const real* log_decay, const real* bonus,
                 const real* S, real* S_next, const real* z, real* z_next, data* o, const long long* table, int axes,
                 int tokens, int columns, int groups, int blocks, real scale) {
    __shared__ real keys[2][ROWS * PARTS];
    __shared__ real decays[2][ROWS * PARTS];
    __shared__ real queries[2][ROWS * PARTS];
    const int part = threadIdx.x % PARTS, memory = blockIdx.x / blocks;
    const int column = blockIdx.x % blocks * (blockDim.x / PARTS) + threadIdx.x / PARTS;
    const bool mine = column < columns;
    const auto key = rows(k, table, axes, KEY, memory);
    const auto value = rows(v, table, axes, V, memory);
    const auto gate = rows(log_decay, table, axes, GATE, memory);
    const auto query = rows(q, table, axes, Q, memory);
    const auto extra = rows(bonus, table, axes, BONUS, memory);
    const auto answer = rows(o, table, axes, O, memory);

    const auto state = rows(S, table, axes, STATE, memory);
    const auto weights = rows(z, table, axes, Z, memory);
    real own[ROWS], own_z[NORMALIZE ? ROWS : 1];
    for (int r = 0; r < ROWS; r++) {
        const int row = part + r * PARTS;
        own[r] = row < K && mine ? state.at(row, column) : real(0);
        if (NORMALIZE) own_z[r] = row < K ? weights.at(0, row) : real(0);
    }

    auto stage = [&](int t) {
        #pragma unroll 1
        for (int row = threadIdx.x; row < K; row += blockDim.x) {
            keys[t % 2][row] = widened(key.at(t, row));
            decays[t % 2][row] = log_decay ? exp(gate.at(t, row)) : real(1);
            queries[t % 2][row] = widened(query.at(t, row));
        }
    };
    stage(0);
    #pragma unroll 1
    for (int t = 0; t < tokens; t++) {
        const real value_t = mine ? widened(value.at(t, column)) : real(0);  // on its way while others are waited for
        __syncthreads();  // token t is staged, and nobody is left at t - 1, in whose place t + 1 goes
        if (t + 1 < tokens) stage(t + 1);
        const real* key_t = keys[t % 2];
        const real* decay_t = decays[t % 2];

        auto memorise = [&]() {
            for (int r = 0; r < ROWS; r++) {
                const int row = part + r * PARTS;
                if (row >= K) continue;
                own[r] = fma(key_t[row], value_t, kept(decay_t[row], own[r]));
                if (NORMALIZE) own_z[r] = kept(decay_t[row], own_z[r]) + key_t[row];
            }
        };
        if (!bonus) memorise();
        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            const auto asked = query.of(g).line(t);
            const auto query_at = [&](int row) { return g ? widened(asked[row]) : queries[t % 2][row]; };
            const auto weight_of_pair = extra.of(g);  // of the pair of keys and values that comes with this token
            real total = 0, weight = 0, pair = 0;
            for (int r = 0; r < ROWS; r++) {
                const int row = part + r * PARTS;
                if (row >= K) continue;
                const real q_t = query_at(row);
                total = fma(q_t, own[r], total);
                if (NORMALIZE) weight = fma(q_t, own_z[r], weight);
            }
            if (bonus) {
                #pragma unroll 1
                for (int row = part; row < K; row += PARTS)
                    pair = fma(query_at(row) * weight_of_pair.at(0, row), key_t[row], pair);
            }
            total = over_parts(fma(pair, value_t, total));
            if (NORMALIZE) {
                weight = over_parts(weight + pair);
                total = weight == 0 ? real(0) : total / weight;
            }
            if (mine && part == 0) put(answer.of(g).at(t, column), NORMALIZE ? total : scale * total);
        }
        if (bonus) memorise();
    }

    const auto state_next = rows(S_next, table, axes, STATE_NEXT, memory);
    const auto weights_next = rows(z_next, table, axes, Z_NEXT, memory);
    for (int r = 0; r < ROWS; r++) {
        const int row = part + r * PARTS;
        if (row < K && mine) state_next.at(row, column) = own[r];
        if (NORMALIZE && row < K && column == 0) weights_next.at(0, row) = own_z[r];
    }
}
