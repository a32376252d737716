// Selective scan, token by token:  h = exp(delta_t A) h + (delta_t u_t) B_t^T,  o_t = h C_t + D u_t.
//
// A block has one memory and some of its channels. PARTS neighbouring lanes share a channel: lane `part` owns the entries
// part, part + PARTS, ... of its row of h, in registers, from the first token to the last. Lanes meet only in sums.

enum { U, DELTA, RATE, KEY, QUERY, DIRECT, STATE, O };

// What a lane needs of a token; the query is that of the first group.
struct Token {
    data input;
    real length;
    data key[ROWS], asked[ROWS];
};

extern "C" __global__ void __launch_bounds__(128, 1)
selective_scan(const data* u, const real* delta, const real* A, const data* B, const data* C, const real* D, real* h,
               data* o, const long long* table, int axes, int tokens, int columns, int groups, int blocks) {
    const int part = threadIdx.x % PARTS, memory = blockIdx.x / blocks;
    const int channel = blockIdx.x % blocks * (blockDim.x / PARTS) + threadIdx.x / PARTS;
    const bool mine = channel < columns;
    const auto input = rows(u, table, axes, U, memory);
    const auto length = rows(delta, table, axes, DELTA, memory);
    const auto rate = rows(A, table, axes, RATE, memory);
    const auto key = rows(B, table, axes, KEY, memory);
    const auto query = rows(C, table, axes, QUERY, memory);
    const auto direct = rows(D, table, axes, DIRECT, memory);
    const auto state = rows(h, table, axes, STATE, memory);
    const auto answer = rows(o, table, axes, O, memory);

    real own[ROWS], own_rate[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const int entry = part + r * PARTS;
        own[r] = entry < N && mine ? state.at(channel, entry) : real(0);
        own_rate[r] = entry < N && mine ? rate.at(channel, entry) : real(0);
    }

    const auto fetch = [&](Token& token, int t) {
        if (mine) token.input = input.at(t, channel), token.length = length.at(t, channel);
        const auto key_t = key.line(t), asked = query.line(t);
        for (int r = 0; r < ROWS; r++) {
            const int entry = part + r * PARTS;
            if (entry < N) token.key[r] = key_t[entry], token.asked[r] = asked[entry];
        }
    };
    walk<Token, 4>(tokens, fetch, [&](const Token& token, int t) {
        const real u_t = mine ? widened(token.input) : real(0), length_t = mine ? token.length : real(0);
        for (int r = 0; r < ROWS; r++) {
            const int entry = part + r * PARTS;
            if (entry >= N) continue;
            own[r] = fma(length_t * u_t, widened(token.key[r]), exp(length_t * own_rate[r]) * own[r]);
        }

        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            real total = 0;
            for (int r = 0; r < ROWS; r++) {
                const int entry = part + r * PARTS;
                if (entry < N) total = fma(widened(g ? query.of(g).at(t, entry) : token.asked[r]), own[r], total);
            }
            total = over_parts(total);
            if (!mine || part != 0) continue;
            if (D) total = fma(direct.of(g).at(0, channel), u_t, total);
            put(answer.of(g).at(t, channel), total);
        }
    });

    for (int r = 0; r < ROWS; r++) {
        const int entry = part + r * PARTS;
        if (entry < N && mine) state.at(channel, entry) = own[r];
    }
}
