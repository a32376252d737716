// Diagonal plus low rank, token by token:  S = diag(d_t) S + b_t (S^T a_t)^T + k_t v_t^T,  o_t = S^T q_t.
//
// A block has one memory and some of its value columns. PARTS neighbouring lanes share a column: lane `part` owns the
// rows part, part + PARTS, ... of it, in registers, from the first token to the last. What all columns need of a token
// is staged in shared memory, for STAGED tokens at once: one waits for many loads as long as for one.

enum { Q, KEY, V, A, B, GATE, STATE, O };

struct Rest {  // of what a column needs of a token; the query is that of the first group
    real key, read, write, decay, asked;
};
constexpr int ROOM = 40 * 1024 / (2 * ROWS * PARTS * int(sizeof(Rest))), MOST = 16 / int(sizeof(real));
constexpr int STAGED = ROOM >= MOST ? MOST : ROOM >= 2 ? 2 : 1;  // more would leave no registers

extern "C" __global__ void __launch_bounds__(128)
dplr(const data* q, const data* k, const data* v, const data* a, const data* b, const real* log_decay, real* S,
     data* o, const long long* table, int axes, int tokens, int columns, int groups, int blocks, real scale) {
    __shared__ real keys[2][STAGED][ROWS * PARTS];
    __shared__ real reads[2][STAGED][ROWS * PARTS];
    __shared__ real writes[2][STAGED][ROWS * PARTS];
    __shared__ real decays[2][STAGED][ROWS * PARTS];
    __shared__ real queries[2][STAGED][ROWS * PARTS];
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

    auto stage = [&](int side, int first) {
        #pragma unroll 1
        for (int row = threadIdx.x; row < K; row += blockDim.x) {
            Rest token[STAGED];
            #pragma unroll
            for (int i = 0; i < STAGED; i++) {
                const int t = min(first + i, tokens - 1);
                token[i].key = widened(key.at(t, row)), token[i].read = widened(read.at(t, row));
                token[i].write = widened(write.at(t, row)), token[i].asked = widened(query.at(t, row));
                token[i].decay = log_decay ? gate.at(t, row) : real(0);
            }
            #pragma unroll
            for (int i = 0; i < STAGED; i++) {
                keys[side][i][row] = token[i].key, reads[side][i][row] = token[i].read;
                writes[side][i][row] = token[i].write, queries[side][i][row] = token[i].asked;
                decays[side][i][row] = exp(token[i].decay);
            }
        }
    };
    // One token: `side` and `i` say where it is staged.
    auto take = [&](int t, int side, int i, real value_t) {
        real reading = 0;  // of the state before its decay
        for (int r = 0; r < ROWS; r++) {
            const int row = part + r * PARTS;
            if (row < K) reading = fma(reads[side][i][row], own[r], reading);
        }
        reading = over_parts(reading);
        for (int r = 0; r < ROWS; r++) {
            const int row = part + r * PARTS;
            if (row >= K) continue;
            own[r] = fma(writes[side][i][row], reading, decays[side][i][row] * own[r]);
            own[r] = fma(keys[side][i][row], value_t, own[r]);
        }

        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            const auto asked = query.of(g).line(t);
            real total = 0;
            for (int r = 0; r < ROWS; r++) {
                const int row = part + r * PARTS;
                if (row < K) total = fma(g ? widened(asked[row]) : queries[side][i][row], own[r], total);
            }
            total = over_parts(total);
            if (mine && part == 0) put(answer.of(g).at(t, column), scale * total);
        }
    };

    stage(0, 0);
    #pragma unroll 1
    for (int first = 0, side = 0; first < tokens; first += STAGED, side = 1 - side) {
        __syncthreads();  // these tokens are staged, and nobody is left at the last ones, in whose place the next go
        real values[STAGED];
        #pragma unroll
        for (int i = 0; i < STAGED; i++)
            values[i] = mine ? widened(value.at(min(first + i, tokens - 1), column)) : real(0);
        if (first + STAGED < tokens) stage(1 - side, first + STAGED);
        #pragma unroll 1
        for (int i = 0; i < STAGED && first + i < tokens; i++) {
            take(first + i, side, i, values[0]);
            #pragma unroll
            for (int j = 0; j + 1 < STAGED; j++) values[j] = values[j + 1];  // registers have no places to count
        }
    }

    store_column(own, state, part, column, mine);
}
