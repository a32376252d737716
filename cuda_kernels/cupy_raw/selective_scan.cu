// Selective scan, token by token:  h = exp(delta_t A) h + (delta_t u_t) B_t^T,  o_t = h C_t + D u_t.
//
// A block has one memory, some of its channels and one piece of the sequence. PARTS neighbouring lanes share a channel:
// lane `part` owns the entries part, part + PARTS, ... of its row of h, in registers, from the first token of the piece to
// the last. Lanes meet only in sums.
//
// Where there are several pieces, a first launch (STATES) makes what each but the last adds to an empty state, and the
// sum of its step lengths, which says what it leaves of the state before it. Every piece begins with those before it.

enum { U, DELTA, RATE, KEY, QUERY, DIRECT, STATE, STATE_NEXT, O };

// What a lane needs of a token; the query is that of the first group.
struct Token {
    data input;
    real length;
    data key[ROWS], asked[ROWS];
};

// What a decay leaves of a number that many tokens decayed: of what is infinite or no number, all.
__device__ __forceinline__ real left_of(real decay, real x) { return x - x == 0 ? decay * x : x; }

extern "C" __global__ void __launch_bounds__(128, 1)
selective_scan(const data* u, const real* delta, const real* A, const data* B, const data* C, const real* D,
               const real* h, real* h_next, data* o, real* sums, real* lengths, const long long* table, int axes,
               int tokens, int columns, int groups, int blocks, int pieces, int stored, int length) {
    const int part = threadIdx.x % PARTS, memory = blockIdx.x / blocks, piece = blockIdx.x % pieces;
    const int channel = blockIdx.x % blocks / pieces * (blockDim.x / PARTS) + threadIdx.x / PARTS;
    const int begin = piece * length, count = min(length, tokens - begin);
    const bool mine = channel < columns;
    const auto input = rows(u, table, axes, U, memory);
    const auto step = rows(delta, table, axes, DELTA, memory);
    const auto rate = rows(A, table, axes, RATE, memory);
    const auto key = rows(B, table, axes, KEY, memory);
    const auto query = rows(C, table, axes, QUERY, memory);
    const auto direct = rows(D, table, axes, DIRECT, memory);
    const auto state = rows(h, table, axes, STATE, memory);
    const auto state_next = rows(h_next, table, axes, STATE_NEXT, memory);
    const auto answer = rows(o, table, axes, O, memory);
    const auto number_of = [&](int p) { return (size_t(memory) * stored + p) * columns + channel; };

    real own[ROWS], own_rate[ROWS], whole_length = 0;
    for (int r = 0; r < ROWS; r++) {
        const int entry = part + r * PARTS;
        own[r] = !STATES && entry < N && mine ? state.at(channel, entry) : real(0);
        own_rate[r] = entry < N && mine ? rate.at(channel, entry) : real(0);
    }
    #pragma unroll 1
    for (int p = 0; p < piece && !STATES && mine; p++) {
        const real before = lengths[number_of(p)];
        for (int r = 0; r < ROWS; r++) {
            const int entry = part + r * PARTS;
            if (entry < N) own[r] = left_of(exp(before * own_rate[r]), own[r]) + sums[number_of(p) * N + entry];
        }
    }

    const auto fetch = [&](Token& token, int i) {
        const int t = begin + i;
        if (mine) token.input = input.at(t, channel), token.length = step.at(t, channel);
        const auto key_t = key.line(t), asked = query.line(t);
        for (int r = 0; r < ROWS; r++) {
            const int entry = part + r * PARTS;
            if (entry < N) token.key[r] = key_t[entry];
            if (entry < N && !STATES) token.asked[r] = asked[entry];
        }
    };
    walk<Token, 4>(count, fetch, [&](const Token& token, int i) {
        const int t = begin + i;
        const real u_t = mine ? widened(token.input) : real(0), length_t = mine ? token.length : real(0);
        for (int r = 0; r < ROWS; r++) {
            const int entry = part + r * PARTS;
            if (entry >= N) continue;
            own[r] = fma(length_t * u_t, widened(token.key[r]), exp(length_t * own_rate[r]) * own[r]);
        }
        whole_length += length_t;

        #pragma unroll 1
        for (int g = 0; g < groups && !STATES; g++) {  // the queries that share this memory
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
        if (entry >= N || !mine) continue;
        if (STATES) sums[number_of(piece) * N + entry] = own[r];
        if (!STATES && begin + count == tokens) state_next.at(channel, entry) = own[r];
    }
    if (STATES && mine && part == 0) lengths[number_of(piece)] = whole_length;
}
