// Linear attention on the tensor cores of Hopper, chunk by chunk, for bfloat16 and one gate per channel of the keys:
//
//   O = P V + Q S,  P = tril(Q K^T) decayed,  S = decay S + K^T V,
//
// with queries Q decayed since the chunk began and keys K decayed to its end. See wgmma.cuh for the products. As in
// linear_attention_wgmma.cu the state never leaves the registers of the warpgroups that multiply, each with 64 value
// columns of it, as the left matrix of O^T = S^T Q^T + V^T P^T.
//
// What is done number by number is another warpgroup's, which works on later chunks meanwhile: a warp has 8 tokens of a
// chunk, a lane four channels of them. It decays the rows of Q and K where they lie, with what they lack of two
// bfloat16 in the place of their gates, and makes P. One more warpgroup brings the chunks.
//
// Decays are products of powers of two of gates, never of differences. As a factor of the key and one of the query, the
// decay between the two needs a place to meet. Among its 8 tokens a warp multiplies pair by pair. Others meet in the
// middle of the smaller of the blocks of 16 and 32 tokens that holds both: so each token is there once as a query or as
// a key, and products of a warp take queries with keys.
//
// Whatever is computed is kept in two bfloat16, never in one. What a chunk adds to the state is summed from zero and
// then added, because tensor cores cut what they add instead of rounding it.
//
// Zero times NaN is NaN, so a product would carry a bad number into the past. Where answers are not finite, the chunk
// is taken again without the values that are not, which gives the tokens before the first of them the bits that they
// have without it; and all from there on comes from one token after the other, in the registers where the state is.
//
// STATES: the first of two launches, if the sequence is cut in pieces. It makes what each piece adds to the state, and
// its decays; the second launch begins each piece with the sum over those before it.

constexpr int CARRIERS = 128, DECAYERS = PRODUCERS - CARRIERS;  // threads that bring chunks, and that decay them
constexpr int OCTETS = CHUNK / 8, LEVELS = 2;                   // blocks of 16 tokens and of 32
constexpr float LOG2E = 1.44269504f;
static_assert(CHUNK == 32 && KEYS == 128 && DECAYERS == 32 * OCTETS, "a warp has 8 tokens, a lane four channels");

typedef Swizzled<float, CHUNK, KEYS> Gates;
typedef Swizzled<bfloat16, CHUNK, 2 * CHUNK> Scores;  // both terms, side by side

// ---- what all warpgroups share -------------------------------------------------------------------------------------

// A matrix in two terms.
struct Terms {
    Keys term[2];
};

// The dynamic shared memory.
struct Room {
    unsigned char* at;

    static constexpr int asking = STATES ? 0 : Keys::bytes + Scores::bytes;
    static constexpr int stage = Keys::bytes + Gates::bytes + Values::bytes + asking;
    static constexpr int answers = 16 * CHUNK * 2;

    __device__ __forceinline__ unsigned char* stage_of(int n) const { return at + n % STAGES * stage; }
    __device__ __forceinline__ Gates gates(int n) const { return {stage_of(n)}; }
    __device__ __forceinline__ Terms keys(int n) const {
        return {{{stage_of(n) + Gates::bytes}, {stage_of(n) + Keys::bytes}}};
    }
    __device__ __forceinline__ Values values(int n) const { return {stage_of(n) + Gates::bytes + Keys::bytes}; }
    __device__ __forceinline__ Terms queries(int n) const {
        return {{{stage_of(n) + Gates::bytes + Keys::bytes + Values::bytes}, {stage_of(n)}}};
    }
    __device__ __forceinline__ Scores scores(int n) const { return {stage_of(n) + stage - Scores::bytes}; }
    // Answers of a warp, or a token.
    __device__ __forceinline__ unsigned char* answers_of(int warp) const {
        return at + STAGES * stage + warp * answers;
    }
    // Queries and keys that meet in the middle of blocks of 16 tokens, or of 32.
    __device__ __forceinline__ Terms level(int number) const {
        unsigned char* begin = answers_of(WARPS) + 2 * number * Keys::bytes;
        return {{{begin}, {begin + Keys::bytes}}};
    }
    // What a chunk leaves of each channel; and 8 tokens of it.
    __device__ __forceinline__ float* total(int n) const {
        unsigned char* begin = answers_of(WARPS) + (STATES ? 0 : 2 * LEVELS * Keys::bytes);
        return reinterpret_cast<float*>(begin) + n % STAGES * KEYS;
    }
    __device__ __forceinline__ float* whole(int octet) const { return total(0) + (STAGES + octet) * KEYS; }
};

struct Barriers {
    Ring ring;
    Barrier ready[STAGES];  // chunks are decayed
    Barrier votes[GROUPS];

    __device__ __forceinline__ void set_up_all() {
        for (int i = 0; i < STAGES; i++)
            set_up(ring.there[i], (STATES ? 3 : 4) * 32), set_up(ring.free[i], WARPS), set_up(ready[i], OCTETS);
        for (int i = 0; i < GROUPS; i++) set_up(votes[i], 4);
    }
};

// ---- bringing chunks, by a warpgroup: a warp for each array ---------------------------------------------------------

__device__ __forceinline__ void produce(const Room& room, Barriers& barriers, const Places& places) {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), begin = places.begin, first = places.first_column;
    if (warp == 0) {
        const Carrier<Gates, real> carrier(places.gate, begin, 0, K);
        carry(carrier, barriers.ring, places, [&](int n) { return room.gates(n); });
    } else if (warp == 1) {
        const Carrier<Keys> carrier(places.k, begin, 0, K);
        carry(carrier, barriers.ring, places, [&](int n) { return room.keys(n).term[0]; });
    } else if (warp == 2) {
        const Carrier<Values> carrier(places.v, begin, first, places.columns - first);
        carry(carrier, barriers.ring, places, [&](int n) { return room.values(n); });
    } else if (!STATES) {
        const Carrier<Keys> carrier(places.q, begin, 0, K);
        carry(carrier, barriers.ring, places, [&](int n) { return room.queries(n).term[0]; });
    }
    close_copies();
    finish_copies<0>();  // no thread ends before its copies are there
}

// ---- decaying a chunk ----------------------------------------------------------------------------------------------

// Four channels of a token.
struct alignas(16) Four {
    float x[4];

    __device__ __forceinline__ Four operator*(const Four& other) const {
        return {x[0] * other.x[0], x[1] * other.x[1], x[2] * other.x[2], x[3] * other.x[3]};
    }
    // Or ones.
    __device__ __forceinline__ Four if_so(bool so) const {
        return {so ? x[0] : 1, so ? x[1] : 1, so ? x[2] : 1, so ? x[3] : 1};
    }
    __device__ __forceinline__ float dot(const Four& other) const {
        return fma(x[3], other.x[3], fma(x[2], other.x[2], fma(x[1], other.x[1], x[0] * other.x[0])));
    }
};
constexpr Four ONES = {1, 1, 1, 1};
__device__ __forceinline__ Four& four_at(float* channels, int lane) {
    return reinterpret_cast<Four*>(channels)[lane];
}
// The same as numbers of 16 bits.
struct alignas(8) Packed {
    unsigned x[2];

    __device__ __forceinline__ Four widened() const {
        return {low_of<bfloat16>(x[0]), high_of<bfloat16>(x[0]), low_of<bfloat16>(x[1]), high_of<bfloat16>(x[1])};
    }
};
__device__ __forceinline__ Packed& packed_at(const Keys& tile, int token, int lane) {
    return reinterpret_cast<Packed*>(tile.piece(token, lane / 2 * 8))[lane % 2];
}

// Adds what all lanes have of N numbers, which leaves the first of them with number lane / (32 / N).
template <int N, int DISTANCE = 16>
__device__ __forceinline__ void over_lanes(float (&x)[N], int lane) {
    if constexpr (N > 1) {
        const bool upper = lane & DISTANCE;
        float left[N / 2];
        #pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float given = upper ? x[i] : x[i + N / 2];
            left[i] = (upper ? x[i + N / 2] : x[i]) + __shfl_xor_sync(0xffffffffu, given, DISTANCE);
        }
        over_lanes<N / 2, DISTANCE / 2>(left, lane);
        x[0] = left[0];
    } else {
        #pragma unroll
        for (int distance = DISTANCE; distance > 0; distance /= 2) x[0] += __shfl_xor_sync(0xffffffffu, x[0], distance);
    }
}

// 8 tokens in four channels.
struct Octet {
    Four q[8], k[8], whole;  // queries since the first of them, keys to the end of the last; what all of them leave
    float scores[36];        // of token i with token j <= i, at i (i + 1) / 2 + j: what these channels add

    __device__ __forceinline__ Octet(const Room& room, int n, int first, int lane) : whole(ONES) {
        const auto step_of = [&](int i) {
            Four step = *reinterpret_cast<const Four*>(room.gates(n).piece(first + i, 4 * lane));
            for (float& x : step.x) x = exp2f(LOG2E * x);
            return step;
        };
        const auto widened = [&](const Terms& rows, int i) {
            return packed_at(rows.term[0], first + i, lane).widened();
        };
        #pragma unroll
        for (int i = 7; i >= 0 && STATES; i--) k[i] = widened(room.keys(n), i) * whole, whole = whole * step_of(i);
        #pragma unroll
        for (int i = 0; i < 8 && !STATES; i++) {
            const Four step = step_of(i);
            whole = whole * step;
            #pragma unroll
            for (int j = 0; j < i; j++) k[j] = k[j] * step;
            k[i] = widened(room.keys(n), i), q[i] = widened(room.queries(n), i);
            #pragma unroll
            for (int j = 0; j <= i; j++) scores[i * (i + 1) / 2 + j] = q[i].dot(k[j]);
            q[i] = q[i] * whole;
        }
    }
};

// A thread of those that decay. Asked anew for every chunk, so that no address waits in registers.
struct Decayer {
    const Room& room;
    int octet, lane;

    __device__ __forceinline__ explicit Decayer(const Room& room) : room(room) {
        const unsigned thread = this_thread() - CARRIERS;
        octet = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32;
    }

    __device__ __forceinline__ void put_terms(const Terms& to, const Four (&rows)[8], const Four& decay) const {
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            const Four x = rows[i] * decay;
            unsigned terms[2][2];
            for (int r = 0; r < 2; r++) set_pair<bfloat16>(terms, r, x.x[2 * r], x.x[2 * r + 1]);
            for (int n = 0; n < 2; n++) packed_at(to.term[n], 8 * octet + i, lane) = {terms[n][0], terms[n][1]};
        }
    }
    // A score of the octet, by its number there.
    __device__ __forceinline__ void put_score(int n, int number, float x) const {
        int i = 0;
        #pragma unroll
        for (int row = 1; row < 8; row++) i += number >= row * (row + 1) / 2;
        const int query = 8 * octet + i, key = 8 * octet + number - i * (i + 1) / 2;
        unsigned terms[2][1];
        set_pair<bfloat16>(terms, 0, x, 0);
        for (int term = 0; term < 2; term++) {
            unsigned char* const piece = room.scores(n).piece(query, CHUNK * term + key);
            reinterpret_cast<bfloat16*>(piece)[key % 8].bits = (unsigned short)(terms[term][0] & 0xffff);
        }
    }
    // So many scores of the octet, from one of them on.
    template <int N>
    __device__ __forceinline__ void put_scores(int n, const Octet& tokens, int first) const {
        float sum[N];
        #pragma unroll
        for (int i = 0; i < N; i++) sum[i] = tokens.scores[first + i];
        over_lanes<N>(sum, lane);
        if (lane % (32 / N) == 0) put_score(n, first + lane / (32 / N), sum[0]);
    }
    __device__ __forceinline__ void put_two(int n, int query, int key, float low, float high) const {
        unsigned terms[2][1];
        set_pair<bfloat16>(terms, 0, low, high);
        for (int term = 0; term < 2; term++) {
            unsigned char* const piece = room.scores(n).piece(query, CHUNK * term + key);
            reinterpret_cast<unsigned*>(piece)[key % 8 / 2] = terms[term][0];
        }
    }
    // All 16 queries of the later half, with 8 keys.
    __device__ __forceinline__ void score_halves(int n, int first_key) const {
        const Terms level = room.level(1);
        Sum sum[3] = {};
        #pragma unroll 2
        for (int c = 0; c < KEYS; c += 32) {
            unsigned k[2][4];
            for (int i = 0; i < 2; i++)
                load_matrices(k[i], level.term[i].piece(first_key + lane % 8, c + lane / 8 * 8));
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                unsigned q[2][4];
                for (int i = 0; i < 2; i++)
                    load_matrices(q[i], level.term[i].piece(16 + lane % 16, c + 16 * half + lane / 16 * 8));
                const auto multiply = [&](Sum& sum, int i, int j) {
                    multiply_once<bfloat16>(sum, q[i], {k[j][2 * half], k[j][2 * half + 1]});
                };
                multiply(sum[0], 0, 0), multiply(sum[1], 0, 1), multiply(sum[2], 1, 0);
            }
        }
        float x[4];
        for (int i = 0; i < 4; i++) x[i] = sum[0].x[i] + (sum[1].x[i] + sum[2].x[i]);
        for (int half = 0; half < 2; half++)
            put_two(n, 16 + 8 * half + lane / 4, first_key + lane % 4 * 2, x[2 * half], x[2 * half + 1]);
    }
    // 8 queries with the 8 keys before them; both terms of the queries are rows of one left matrix.
    __device__ __forceinline__ void score_quarters(int n, int first_key) const {
        const Terms level = room.level(0);
        Sum sum[2] = {};
        #pragma unroll 2
        for (int c = 0; c < KEYS; c += 32) {
            unsigned k[2][4];
            for (int i = 0; i < 2; i++)
                load_matrices(k[i], level.term[i].piece(first_key + lane % 8, c + lane / 8 * 8));
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                unsigned q[4];
                const Keys mine = {lane & 8 ? level.term[1].begin : level.term[0].begin};
                load_matrices(q, mine.piece(first_key + 8 + lane % 8, c + 16 * half + lane / 16 * 8));
                for (int i = 0; i < 2; i++)
                    multiply_once<bfloat16>(sum[i], q, {k[i][2 * half], k[i][2 * half + 1]});
            }
        }
        float x[4];
        for (int i = 0; i < 4; i++) x[i] = sum[0].x[i] + sum[1].x[i];
        put_two(n, first_key + 8 + lane / 4, first_key + lane % 4 * 2, x[0] + x[2], x[1] + x[3]);
    }
    // What meets in the middle of the blocks of 16 and of 32 tokens.
    __device__ __forceinline__ void put_levels(const Octet& tokens) const {
        if (octet % 2)
            put_terms(room.level(0), tokens.q, ONES);
        else
            put_terms(room.level(0), tokens.k, ONES);
        const Four between = four_at(room.whole(octet / 2 ? 2 : 1), lane).if_so(octet % 3 == 0);
        if (octet / 2)
            put_terms(room.level(1), tokens.q, between);
        else
            put_terms(room.level(1), tokens.k, between);
    }
    // Chunk n; what it leaves of the lane's channels.
    __device__ __forceinline__ Four take(int n) const {
        const Octet tokens(room, n, 8 * octet, lane);
        if (!STATES) put_scores<16>(n, tokens, 0), put_scores<16>(n, tokens, 16), put_scores<4>(n, tokens, 32);
        four_at(room.whole(octet), lane) = tokens.whole;
        warpgroup_barrier(GROUPS);  // all decays are there, all gates are read, and nobody is left at the last levels
        Four before = ONES, behind = ONES;
        #pragma unroll
        for (int i = 0; i < OCTETS; i++) {
            const Four whole = four_at(room.whole(i), lane);
            before = before * whole.if_so(i < octet), behind = behind * whole.if_so(i > octet);
        }
        const Four total = before * tokens.whole * behind;
        if (octet == 0) four_at(room.total(n), lane) = total;
        put_terms(room.keys(n), tokens.k, behind);
        if (!STATES) put_terms(room.queries(n), tokens.q, before), put_levels(tokens);
        warpgroup_barrier(GROUPS);  // all levels are there, and nobody is left at the decays
        if (!STATES && octet < 2) score_halves(n, 8 * octet);
        if (!STATES && octet >= 2) score_quarters(n, 16 * (octet - 2));
        return total;
    }
};
// All chunks of a piece; what the piece leaves of each channel, if that is asked for.
__device__ __forceinline__ void decay(const Room& room, Barriers& barriers, const Places& places, real* piece_decays) {
    const int chunks = places.chunks();
    Four product = ONES;
    #pragma unroll 1
    for (int n = 0; n < chunks; n++) {
        const Decayer decayer(room);
        wait(barriers.ring.there[n % STAGES], n / STAGES & 1);
        const Four total = decayer.take(n);
        if (STATES) product = product * total;
        show_to_products();
        __syncwarp();  // all lanes have done so
        if (decayer.lane == 0) arrive(barriers.ready[n % STAGES]);
    }
    const Decayer decayer(room);
    if (STATES && decayer.octet == 0 && places.column_block == 0) four_at(piece_decays, decayer.lane) = product;
}

// ---- products with values and the state ----------------------------------------------------------------------------

// Nothing comes from later keys: so it is for all chunks.
__device__ __forceinline__ void put_zeros(const Room& room) {
    #pragma unroll 1
    for (int n = 0; n < STAGES; n++)
        for (int i = threadIdx.x; i < Scores::bytes / 16; i += blockDim.x)
            reinterpret_cast<Four*>(room.scores(n).begin)[i] = {};
    show_to_products();
}
// S^T Q^T of a part of the keys.
__device__ __forceinline__ void begin_recall(Answers& answers, const StateTerms& state, const Terms& queries,
                                             int part) {
    const Matrix q[2] = {queries.term[0].matrix(), queries.term[1].matrix()};
    #pragma unroll
    for (int c = 0; c < PART / 16; c++)
        #pragma unroll
        for (int term = 0; term < 3; term++) {  // without the product of both small ones
            const Matrix right = Keys::part(q[term == 2], 0, PART * part + 16 * c);
            wgmma_bf16_columns<CHUNK>(answers, state.term[c][term == 1], right, part + c + term > 0);
        }
    close_products();
}
// V^T P^T, added.
__device__ __forceinline__ void begin_weighing(Answers& answers, const LeftValues& values, const Scores& scores) {
    const Matrix both = scores.matrix();
    #pragma unroll
    for (int i = 0; i < CHUNK / 16; i++)
        for (int term = 0; term < 2; term++)
            wgmma_bf16_columns<CHUNK>(answers, values[i], Scores::part(both, 0, CHUNK * term + 16 * i), 1);
    close_products();
}
// V^T K, of a part of the keys.
__device__ __forceinline__ void begin_memorising(Added& added, const LeftValues& values, const Terms& keys, int part) {
    const Matrix k[2] = {keys.term[0].matrix(), keys.term[1].matrix()};
    #pragma unroll
    for (int i = 0; i < CHUNK / 16; i++)
        for (int term = 1; term >= 0; term--)
            wgmma_bf16<PART>(added, values[i], Keys::part(k[term], 16 * i, PART * part), i > 0 || term < 1);
    close_products();
}
// Where nothing is left, not even a NaN is; but where answers were finite, the state is.
__device__ __forceinline__ void add(State& state, const Added& added, int part, const float* total, const Self& self) {
    #pragma unroll
    for (int i = 0; i < PART / 2; i += 4) {
        const Pair left = two(total + PART * part + 2 * i + self.pair);
        for (int j = 0; j < 4; j++) {
            float& x = state[PART / 2 * part + i + j];
            x = fma(left.x[j % 2], STATES && left.x[j % 2] == 0 ? 0 : x, added[i + j]);
        }
    }
}

// ---- the walk over chunks ------------------------------------------------------------------------------------------

// A token for a warp, in the place of its answers.
struct Token {
    float decay[KEYS];
    data k[KEYS], q[KEYS];

    __device__ __forceinline__ void bring(const Places& places, int t, const Self& self) {
        #pragma unroll 1
        for (int key = self.lane; key < KEYS; key += 32) {
            decay[key] = key < K ? exp2f(LOG2E * places.gate.at(t, key)) : 0;
            k[key] = key < K ? places.k.at(t, key) : data{};
            if (!STATES) q[key] = key < K ? places.q.at(t, key) : data{};
        }
    }
};
// One token after the other, from the state before the chunk; answers are written from token `good` on.
__device__ __forceinline__ void walk(State& state, Token& token, int n, const Places& places, int good, float scale,
                                     const Self& self) {
    const int column = places.first_column + self.first_value() + self.line;
    #pragma unroll 1
    for (int i = 0; i < places.tokens_of(n); i++) {
        const int t = places.first_of(n) + i;
        __syncwarp();  // nobody is left at what lies there
        token.bring(places, t, self);
        __syncwarp();  // the token is there
        float answer[2] = {}, value[2];
        for (int half = 0; half < 2; half++)
            value[half] = column + 8 * half < places.columns ? widened(places.v.at(t, column + 8 * half)) : 0;
        #pragma unroll
        for (int c = 0; c < KEYS / 8; c++) {
            const int key = 8 * c + self.pair;
            const Pair decay = two(token.decay + key);
            const unsigned k = *reinterpret_cast<const unsigned*>(token.k + key);
            const unsigned q = STATES ? 0 : *reinterpret_cast<const unsigned*>(token.q + key);
            for (int m = 0; m < 4; m++) {
                float& x = state[4 * c + m];
                x = fma(half_of<data>(k, m % 2), value[m / 2], kept(decay.x[m % 2], x));
                answer[m / 2] = fma(half_of<data>(q, m % 2), x, answer[m / 2]);
            }
        }
        for (int half = 0; half < 2 && !STATES; half++) {
            for (int distance = 1; distance < 4; distance *= 2)
                answer[half] += __shfl_xor_sync(0xffffffffu, answer[half], distance);
            const int j = column + 8 * half;
            if (i >= good && self.pair == 0 && j < places.columns) put(places.o.at(t, j), scale * answer[half]);
        }
    }
}

struct Consumer {
    const Room& room;
    Barriers& barriers;
    const Places& places;
    int* votes;  // of each warp, of two chunks in turn
    float scale;
    Self self;

    // Whether any warp of the warpgroup votes for it.
    __device__ __forceinline__ bool any(bool vote, int n) const {
        const int found = __any_sync(0xffffffffu, vote);
        int* const all = votes + n % 2 * WARPS + 4 * self.group;  // others may still look at those of the last chunk
        if (self.lane == 0) all[self.warp] = found;
        arrive_as_warp(barriers.votes[self.group], self);
        wait(barriers.votes[self.group], n & 1);
        return all[0] | all[1] | all[2] | all[3];
    }
    __device__ __forceinline__ Token& token_of(const Self& by) const {
        return *reinterpret_cast<Token*>(room.answers_of(by.all_warps()));
    }
    __device__ __forceinline__ void put(const Answers& answers, int n, int count, const Self& by) const {
        put_answers(room.answers_of(by.all_warps()), answers, places, places.first_of(n), count, scale, by);
    }
    // The answers again, without the values that are not finite and those behind them; the first token that needs more.
    __device__ __forceinline__ int answer_again(Answers& answers, const State& state, int n, const Self& by) const {
        First value, answer;
        LeftValues values;
        load_values(values, room.values(n), by);
        each_value(values, by, [&](int token, float& x) { value.look(token, x); });
        const int good = value.of_warp();
        each_value(values, by, [&](int token, float& x) { x = token < good ? x : 0; });
        #pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const StateTerms terms(state, part);
            begin_products();
            begin_recall(answers, terms, room.queries(n), part);
            finish_products<0>();
            done(answers);
        }
        begin_products();
        begin_weighing(answers, values, room.scores(n));
        finish_products<0>();
        done(answers);
        each_sum(answers, by, [&](int, int token, float x) { answer.look(token, x); });
        return min(good, answer.of_warp());
    }
    __device__ __forceinline__ void answer_one_by_one(Answers& answers, State& state, int n) const {
        const Self anew;
        // For the compiler these are other numbers: so no term of the state waits in registers for this to happen.
        for (float& x : state) x = __shfl_sync(0xffffffffu, x, anew.lane);
        const int good = min(answer_again(answers, state, n, anew), places.tokens_of(n));
        put(answers, n, good, anew);
        walk(state, token_of(anew), n, places, good, scale, anew);
    }

    __device__ __forceinline__ void states_of(State& state, int n) const {
        Added added[PARTS];
        LeftValues values;
        load_values(values, room.values(n), self);
        begin_products();
        for (int part = 0; part < PARTS; part++) begin_memorising(added[part], values, room.keys(n), part);
        finish_products<0>();
        for (int part = 0; part < PARTS; part++) done(added[part]);
        if (__any_sync(0xffffffffu, spoilt(added[0]) + spoilt(added[PARTS - 1]) != 0))
            return walk(state, token_of(self), n, places, CHUNK, scale, self);  // gates forget what no product does
        for (int part = 0; part < PARTS; part++) add(state, added[part], part, room.total(n), self);
    }
    __device__ __forceinline__ void answer(State& state, int n) const {
        Answers answers;
        LeftValues values;
        Added added[PARTS];
        const StateTerms early(state, 0);
        begin_products();
        begin_recall(answers, early, room.queries(n), 0);
        const StateTerms late(state, 1);
        begin_products();
        begin_recall(answers, late, room.queries(n), 1);
        load_values(values, room.values(n), self);
        begin_products();
        begin_weighing(answers, values, room.scores(n));
        finish_products<1>();  // terms of the state leave their registers
        begin_products();
        for (int part = 0; part < PARTS; part++) begin_memorising(added[part], values, room.keys(n), part);
        finish_products<PARTS>();  // sums of the state may be under way
        done(answers);
        if (any(spoilt(answers) != 0, n)) {
            finish_products<0>();  // sums that nobody wants leave their registers
            for (int part = 0; part < PARTS; part++) done(added[part]);
            return answer_one_by_one(answers, state, n);
        }
        put(answers, n, places.tokens_of(n), self);
        finish_products<0>();
        for (int part = 0; part < PARTS; part++) done(added[part]), add(state, added[part], part, room.total(n), self);
    }
    // All chunks of the piece.
    __device__ __forceinline__ void take(State& state) const {
        const int chunks = places.chunks();
        #pragma unroll 1
        for (int n = 0; n < chunks; n++) {
            const Consumer now = {room, barriers, places, votes, scale, Self()};
            wait(barriers.ready[n % STAGES], n / STAGES & 1);  // those who decay have waited for all of it
            if (STATES)
                now.states_of(state, n);
            else
                now.answer(state, n);
            arrive_as_warp(barriers.ring.free[n % STAGES], self);
        }
    }
};

__device__ __forceinline__ void consume(const Consumer& consumer, const Stored& stored, const real* before,
                                        real* after) {
    constexpr int stride = 128 * GROUPS;
    const Places& places = consumer.places;
    const Self& self = consumer.self;
    State state = {};
    const auto place = [&](int key, int column) { return key * places.columns + column; };
    if (!STATES)
        each_stored(state, places, self, [&](int key, int column, float& x) { x = before[place(key, column)]; });
    #pragma unroll 1
    for (int p = 0; p < places.piece && !STATES; p++) {
        const float* decays = stored.decays_of(places, p) + self.pair;
        const real* sum = stored.sum_of(places, places.columns, p, self);
        #pragma unroll
        for (int i = 0; i < KEYS / 2; i++) state[i] = kept(decays[i / 4 * 8 + i % 2], state[i]) + sum[i * stride];
    }
    consumer.take(state);
    if (STATES) {
        real* sum = stored.sum_of(places, places.columns, places.piece, self);
        #pragma unroll
        for (int i = 0; i < KEYS / 2; i++) sum[i * stride] = state[i];
    } else if (after) {
        each_stored(state, places, self, [&](int key, int column, float& x) { after[place(key, column)] = x; });
    }
}

extern "C" __global__ void __launch_bounds__(PRODUCERS + 128 * GROUPS, 1)
linear_attention_channels(const data* q, const data* k, const data* v, const real* log_decay, const real* S,
                          real* S_next, data* o, real* sums, real* piece_decays, const long long* table, int axes,
                          int tokens, int columns, int groups, int pieces, int stored, int length, real scale) {
    __shared__ Barriers barriers;
    __shared__ Places places;
    __shared__ int votes[2 * WARPS];
    const Room room = {dynamic_shared() + (-shared_address(dynamic_shared()) & 1023)};
    if (threadIdx.x == 0) {
        find(places, q, k, v, log_decay, o, table, axes, tokens, columns, groups, pieces, stored, length);
        barriers.set_up_all();
    }
    if (!STATES) put_zeros(room);
    __syncthreads();  // the places are known, the barriers are there, and zeros where they stay
    const Stored before_this = {sums, piece_decays};
    if (threadIdx.x < CARRIERS) {
        leave_registers<40>();
        produce(room, barriers, places);
    } else if (threadIdx.x < PRODUCERS) {
        take_registers<136>();
        decay(room, barriers, places, STATES ? before_this.decays_of(places, places.piece) : nullptr);
    } else {
        take_registers<168>();
        const bool last = places.end == tokens && places.group == 0;
        const real* before = STATES ? nullptr : rows(S, table, axes, STATE, places.which).begin;
        real* after = STATES || !last ? nullptr : rows(S_next, table, axes, STATE_NEXT, places.which).begin;
        consume({room, barriers, places, votes, scale, {}}, before_this, before, after);
    }
}
