// Linear attention on the tensor cores of Hopper, chunk by chunk, for bfloat16 and at most one gate per step:
//
//   O = (tril(Q K^T) * decay) V + decay Q S,  S = decay S + (decay K)^T V.
//
// See linear_attention_channels.cu for one gate per channel, linear_attention_chunks.cu for other data, wgmma.cuh for
// the products. All is transposed, so that the state is a left matrix and never leaves the registers: a warpgroup has
// 64 value columns of it, which are the rows of its sums, and answers O^T = S^T Q^T + V^T P^T for them. It makes all
// scores P for itself, though another has the same: so none waits for another, and one multiplies while another does
// what is between products. One more warpgroup brings the next chunks and sums their gates.
//
// Whatever is computed is kept in two bfloat16, never in one. What a chunk adds to the state is summed from zero and
// then added, because tensor cores cut what they add instead of rounding it.
//
// Decays are powers of two of sums of gates that all have one sign, never of differences. Tokens come in blocks of 16:
// from a key to a query of a later block lead the rest of the key's block, the blocks between, and the query's block up
// to itself.
//
// Zero times NaN is NaN, so a product would carry a bad number into the past. Where answers are not finite, the chunk
// is taken again without the values that are not, which gives the tokens before the first of them the bits that they
// have without it; and all from there on comes from one token after the other, in the registers where the state is.
//
// STATES: the first of two launches, if the sequence is cut in pieces. It makes what each piece adds to the state, and
// its decay; the second launch begins each piece with the sum over those before it.

constexpr int TOGETHER = KEYS == 64 && GROUPS == 1 ? 2 : 1;  // blocks that share a multiprocessor
constexpr float LOG2E = 1.44269504f;

typedef Swizzled<bfloat16, CHUNK, CHUNK> Scores;  // one of their two terms
typedef float OwnScores[CHUNK / 2];  // of a warpgroup: all queries and keys
constexpr int TERMS = GATE ? 2 : 1;
typedef LeftValues Decayed[TERMS];  // what is left of V^T at the end of the chunk

// ---- what all warpgroups share -------------------------------------------------------------------------------------

// One gate per step: the decays of a chunk, but `log` and `total` are for all that a token and the chunk leave.
struct alignas(16) Decays {
    float log[CHUNK];                       // gates, in log 2
    float since[CHUNK];                     // from the start of its block of 16 to each token
    float rest[CHUNK / 16 - 1][CHUNK];      // from each token to the start of block 1, 2, 3
    float within[16][CHUNK + 8];            // from token j to token i of one block, at [i % 16][j]
    float from_start[CHUNK], to_end[CHUNK]; // from the chunk's start to a token and from it to the end
    float total;
};

// The dynamic shared memory.
struct Room {
    unsigned char* at;

    static constexpr int stage = (STATES ? 1 : 2) * Keys::bytes + Values::bytes, terms = 2 * Scores::bytes;
    static constexpr int answers = 16 * CHUNK * 2;  // of a warp

    __device__ __forceinline__ Keys keys(int n) const { return {at + n % STAGES * stage}; }
    __device__ __forceinline__ Values values(int n) const { return {at + n % STAGES * stage + Keys::bytes}; }
    __device__ __forceinline__ Keys queries(int n) const {
        return {at + n % STAGES * stage + Keys::bytes + Values::bytes};
    }
    __device__ __forceinline__ Scores scores(int group, int term) const {
        return {at + STAGES * stage + group * terms + term * Scores::bytes};
    }
    __device__ __forceinline__ unsigned char* answers_of(int warp) const {
        return at + STAGES * stage + GROUPS * terms + warp * answers;
    }
    __device__ __forceinline__ Decays& decays(int n) const {
        unsigned char* begin = at + STAGES * stage + (STATES ? 0 : GROUPS * terms + WARPS * answers);
        return reinterpret_cast<Decays*>(begin)[n % STAGES];
    }
};

struct Barriers {
    Ring ring;
    Barrier scores[GROUPS], votes[GROUPS];

    __device__ __forceinline__ void set_up_all() {
        const int arrivals = (STATES ? 2 : 3) * 32 + GATE;  // of lanes that bring tiles, and of the warp with decays
        for (int i = 0; i < STAGES; i++) set_up(ring.there[i], arrivals), set_up(ring.free[i], WARPS);
        for (int i = 0; i < GROUPS; i++) set_up(scores[i], 4), set_up(votes[i], 4);
    }
};

// ---- decays, by the first warp of those that bring chunks -----------------------------------------------------------

// Two gates of each lane, of tokens lane and lane + 32, and sums over their blocks of 16.
struct Gates {
    float log[2], until[2], rest[2], block[4];  // until: this token among them; rest: those behind it

    __device__ __forceinline__ void read(const Places& places, int n) {
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = threadIdx.x % 32 + 32 * half;
            log[half] = n < places.chunks() && i < places.tokens_of(n) ? places.gate.at(places.first_of(n) + i, 0) : 0;
        }
    }
    __device__ __forceinline__ void sum() {
        const int lane = threadIdx.x % 32, place = lane % 16;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            until[half] = rest[half] = log[half] *= LOG2E;
            for (int distance = 1; distance < 16; distance *= 2) {
                const float earlier = __shfl_up_sync(0xffffffffu, until[half], distance);
                const float later = __shfl_sync(0xffffffffu, rest[half], min(lane + distance, 31));
                until[half] += place >= distance ? earlier : 0, rest[half] += place + distance < 16 ? later : 0;
            }
            const float later = __shfl_sync(0xffffffffu, rest[half], min(lane + 1, 31));
            rest[half] = place < 15 ? later : 0;
            for (int i = 0; i < 2; i++) block[2 * half + i] = __shfl_sync(0xffffffffu, until[half], 16 * i + 15);
        }
    }
};

// The sum of all blocks from `first` to `last - 1`.
__device__ __forceinline__ float blocks_between(const Gates& gates, int first, int last) {
    float sum = 0;
    #pragma unroll
    for (int b = 0; b < CHUNK / 16; b++) sum += b >= first && b < last ? gates.block[b] : 0;
    return sum;
}
// From each token to later ones of its block.
__device__ __forceinline__ void put_within(Decays& decays, const Gates& gates) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = 0;
        #pragma unroll
        for (int place = 0; place < 16; place++) {
            const float gate = __shfl_sync(0xffffffffu, gates.log[half], (lane & 16) + place);
            sum += place > lane % 16 ? gate : 0;
            decays.within[place][32 * half + lane] = place >= lane % 16 ? exp2f(sum) : 0;
        }
    }
}
__device__ __forceinline__ void put_decays(Decays& decays, const Gates& gates) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int token = lane + 32 * half, own = token / 16;
        decays.log[token] = gates.log[half];
        decays.to_end[token] = exp2f(gates.rest[half] + blocks_between(gates, own + 1, CHUNK / 16));
        if (STATES) continue;
        decays.since[token] = exp2f(gates.until[half]);
        decays.from_start[token] = exp2f(blocks_between(gates, 0, own) + gates.until[half]);
        #pragma unroll
        for (int block = 2 * half + 1; block < CHUNK / 16; block++)
            if (own < block)
                decays.rest[block - 1][token] = exp2f(gates.rest[half] + blocks_between(gates, own + 1, block));
    }
    if (lane == 0) decays.total = exp2f((gates.block[0] + gates.block[1]) + (gates.block[2] + gates.block[3]));
    if (!STATES) put_within(decays, gates);
}
// The decays of all chunks. Gates are read two chunks at a time, while those before them are worked on.
__device__ __forceinline__ void produce_decays(const Room& room, Barriers& barriers, const Places& places) {
    const int chunks = places.chunks();
    Gates next[2];
    for (int i = 0; i < 2; i++) next[i].read(places, i);
    #pragma unroll 1
    for (int n = 0; n < chunks;) {
        const Gates now[2] = {next[0], next[1]};
        for (int i = 0; i < 2; i++) next[i].read(places, n + 2 + i);
        #pragma unroll 1
        for (int i = 0; i < 2 && n < chunks; i++, n++) {
            Gates gates = {{i ? now[1].log[0] : now[0].log[0], i ? now[1].log[1] : now[0].log[1]}};
            if (n >= STAGES)
                wait(barriers.ring.free[n % STAGES], n / STAGES - 1 & 1);
            gates.sum(), put_decays(room.decays(n), gates);
            __syncwarp();  // all decays are there
            if (threadIdx.x % 32 == 0) arrive(barriers.ring.there[n % STAGES]);
        }
    }
}

__device__ __forceinline__ void produce(const Room& room, Barriers& barriers, const Places& places) {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), begin = places.begin;
    if (warp == 0 && GATE) {  // with warps that have few scores
        produce_decays(room, barriers, places);
    } else if (warp == 1) {
        carry(Carrier<Keys>(places.k, begin, 0, K), barriers.ring, places, [&](int n) { return room.keys(n); });
    } else if (warp == 2) {
        const int first = places.first_column;
        const Carrier<Values> carrier(places.v, begin, first, places.columns - first);
        carry(carrier, barriers.ring, places, [&](int n) { return room.values(n); });
    } else if (warp == 3 && !STATES) {
        carry(Carrier<Keys>(places.q, begin, 0, K), barriers.ring, places, [&](int n) { return room.queries(n); });
    }
    close_copies();
    finish_copies<0>();  // no thread ends before its copies are there
}

// ---- scores --------------------------------------------------------------------------------------------------------

// Q K^T.
__device__ __forceinline__ void begin_scores(OwnScores& scores, const Keys& queries, const Keys& keys) {
    const Matrix q = queries.matrix(), k = keys.matrix();
    #pragma unroll
    for (int c = 0; c < KEYS; c += 16) wgmma_bf16<CHUNK>(scores, Keys::part(q, 0, c), Keys::part(k, 0, c), c > 0);
    close_products();
}
// What is left at the queries of this warp of what was stored at keys of a block up to theirs; where nothing is, not
// even a NaN is.
__device__ __forceinline__ void decay_scores(OwnScores& scores, int block, const Decays& decays, const Self& self) {
    #pragma unroll
    for (int n = 2 * block; n < 2 * block + 2; n++) {
        const int key = 8 * n + self.pair;
        const Pair rest = GATE && block < self.warp ? two(&decays.rest[self.warp - 1][key]) : Pair{};
        for (int half = 0; half < 2; half++) {
            const int row = self.line + 8 * half, query = 16 * self.warp + row;
            float* x = &scores[4 * n + 2 * half];
            if (!GATE) {
                if (block < self.warp) continue;
                for (int i = 0; i < 2; i++) x[i] = key + i <= query ? x[i] : 0;
            } else if (block < self.warp) {
                for (int i = 0; i < 2; i++) x[i] = kept(decays.since[query] * rest.x[i], x[i]);
            } else {
                const Pair within = two(&decays.within[row][key]);
                for (int i = 0; i < 2; i++) x[i] = kept(within.x[i], x[i]);
            }
        }
    }
}
__device__ __forceinline__ void put_block(const Room& room, const unsigned (&terms)[2][4], int block,
                                          const Self& self) {
    const int row = 16 * self.warp + self.lane % 16, column = 16 * block + self.lane / 16 * 8;
    for (int term = 0; term < 2; term++)
        store_matrices(terms[term], room.scores(self.group, term).piece(row, column));
}
// Nothing comes from keys of later blocks: so it is for all chunks.
__device__ __forceinline__ void put_zeros(const Room& room, const Self& self) {
    #pragma unroll 1
    for (int block = self.warp + 1; block < CHUNK / 16; block++) put_block(room, {}, block, self);
}
__device__ __forceinline__ void put_scores(const Room& room, OwnScores& scores, const Decays& decays,
                                           const Self& self) {
    #pragma unroll
    for (int block = 0; block < CHUNK / 16; block++) {
        if (block > self.warp) continue;
        decay_scores(scores, block, decays, self);
        unsigned terms[2][4];
        const float* x = &scores[8 * block];
        for (int r = 0; r < 4; r++) set_pair<bfloat16>(terms, r, x[2 * r], x[2 * r + 1]);
        put_block(room, terms, block, self);
    }
}

// ---- products with values and the state ----------------------------------------------------------------------------

__device__ __forceinline__ void decay_values(Decayed& terms, const LeftValues& left, const Decays& decays,
                                             const Self& self) {
    #pragma unroll
    for (int i = 0; i < CHUNK / 16; i++)
        for (int r = 0; r < 4; r++) {
            const Pair to_end = GATE ? two(&decays.to_end[16 * i + self.pair + r / 2 * 8]) : Pair{};
            unsigned both[TERMS][1] = {{left[i][r]}};
            if (GATE)
                set_pair<bfloat16>(both, 0, low_of<bfloat16>(left[i][r]) * to_end.x[0],
                                   high_of<bfloat16>(left[i][r]) * to_end.x[1]);
            for (int term = 0; term < TERMS; term++) terms[term][i][r] = both[term][0];
        }
}

// S^T Q^T of a part of the keys.
__device__ __forceinline__ void begin_recall(Answers& answers, const StateTerms& terms, const Keys& queries, int part) {
    const Matrix q = queries.matrix();
    #pragma unroll
    for (int c = 0; c < PART / 16; c++)
        for (int term = 0; term < 2; term++)
            wgmma_bf16_columns<CHUNK>(answers, terms.term[c][term], Keys::part(q, 0, PART * part + 16 * c),
                                      part + c + term > 0);
    close_products();
}
// What is left of the state at each token.
__device__ __forceinline__ void decay_answers(Answers& answers, const Decays& decays, const Self& self) {
    #pragma unroll
    for (int n = 0; n < CHUNK / 8; n++) {
        const Pair decay = two(&decays.from_start[8 * n + self.pair]);
        for (int i = 0; i < 4; i++) answers[4 * n + i] *= decay.x[i % 2];
    }
}
// V^T P^T, added.
__device__ __forceinline__ void begin_weighing(Answers& answers, const LeftValues& values, const Room& room,
                                               int group) {
    const Scores terms[2] = {room.scores(group, 0), room.scores(group, 1)};
    const Matrix scores[2] = {terms[0].matrix(), terms[1].matrix()};
    #pragma unroll
    for (int i = 0; i < CHUNK / 16; i++)
        for (int term = 0; term < 2; term++)
            wgmma_bf16_columns<CHUNK>(answers, values[i], Scores::part(scores[term], 0, 16 * i), 1);
    close_products();
}
// V^T K, of a part of the keys.
__device__ __forceinline__ void begin_memorising(Added& added, const Decayed& values, const Keys& keys, int part) {
    const Matrix k = keys.matrix();
    #pragma unroll
    for (int i = 0; i < CHUNK / 16; i++)
        for (int term = TERMS - 1; term >= 0; term--)
            wgmma_bf16<PART>(added, values[term][i], Keys::part(k, 16 * i, PART * part),
                                 i > 0 || term < TERMS - 1);
    close_products();
}
__device__ __forceinline__ void add(State& state, const Added& added, int part, float total) {
    const bool all = total != 0;  // where nothing is left, not even a NaN is
    #pragma unroll
    for (int i = 0; i < PART / 2; i++) {
        float& x = state[PART / 2 * part + i];
        if (GATE)
            x = all ? fma(total, x, added[i]) : added[i];
        else
            x += added[i];
    }
}

// ---- answers -------------------------------------------------------------------------------------------------------

// One token after the other, from the state before the chunk; answers are written from token `good` on.
__device__ __forceinline__ void walk(State& state, const Room& room, int n, const Places& places, int good, float scale,
                                     const Self& self) {
    const Keys keys = room.keys(n), queries = room.queries(n);
    const Values values = room.values(n);
    const int column = self.first_value() + self.line;
    #pragma unroll 1
    for (int t = 0; t < places.tokens_of(n); t++) {
        const float decay = GATE ? exp2f(room.decays(n).log[t]) : 1;
        float answer[2] = {}, value[2];
        for (int half = 0; half < 2; half++) {
            const int j = column + 8 * half;
            value[half] = widened(reinterpret_cast<const data*>(values.piece(t, j))[j % 8]);
        }
        #pragma unroll
        for (int c = 0; c < KEYS / 8; c++) {
            const unsigned k = reinterpret_cast<const unsigned*>(keys.piece(t, 8 * c))[self.pair / 2];
            const unsigned q = STATES ? 0 : reinterpret_cast<const unsigned*>(queries.piece(t, 8 * c))[self.pair / 2];
            for (int i = 0; i < 4; i++) {
                float& x = state[4 * c + i];
                x = fma(half_of<data>(k, i % 2), value[i / 2], kept(decay, x));
                answer[i / 2] = fma(half_of<data>(q, i % 2), x, answer[i / 2]);
            }
        }
        for (int half = 0; half < 2 && !STATES; half++) {
            for (int distance = 1; distance < 4; distance *= 2)
                answer[half] += __shfl_xor_sync(0xffffffffu, answer[half], distance);
            const int j = places.first_column + column + 8 * half;
            if (t >= good && self.pair == 0 && j < places.columns)
                put(places.o.at(places.first_of(n) + t, j), scale * answer[half]);
        }
    }
}

// ---- the walk over chunks ------------------------------------------------------------------------------------------

struct Consumer {
    const Room& room;
    Barriers& barriers;
    const Places& places;
    int* votes;  // of each warp
    float scale;
    Self self;

    __device__ __forceinline__ float total(int n) const { return GATE ? room.decays(n).total : 1; }
    // Whether any warp of the warpgroup votes for it.
    __device__ __forceinline__ bool any(bool vote, int n) const {
        const int found = __any_sync(0xffffffffu, vote);
        if (self.lane == 0) votes[self.all_warps()] = found;
        arrive_as_warp(barriers.votes[self.group], self);
        wait(barriers.votes[self.group], n & 1);
        const int* all = votes + 4 * self.group;
        return all[0] | all[1] | all[2] | all[3];
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
        if (GATE) decay_answers(answers, room.decays(n), by);
        begin_products();
        begin_weighing(answers, values, room, by.group);
        finish_products<0>();
        done(answers);
        warpgroup_barrier(by.group);  // then the next scores may come
        each_sum(answers, by, [&](int, int token, float x) { answer.look(token, x); });
        return min(good, answer.of_warp());
    }
    __device__ __forceinline__ void answer_one_by_one(Answers& answers, State& state, int n) const {
        const Self anew;
        // For the compiler these are other numbers: so no term of the state waits in registers for this to happen.
        for (float& x : state) x = __shfl_sync(0xffffffffu, x, anew.lane);
        const int good = min(answer_again(answers, state, n, anew), places.tokens_of(n));
        put(answers, n, good, anew);
        walk(state, room, n, places, good, scale, anew);
    }

    __device__ __forceinline__ void states_of(State& state, int n) const {
        Added added[PARTS];
        LeftValues values;
        Decayed decayed;
        load_values(values, room.values(n), self);
        decay_values(decayed, values, room.decays(n), self);
        begin_products();
        for (int part = 0; part < PARTS; part++) begin_memorising(added[part], decayed, room.keys(n), part);
        finish_products<0>();
        for (int part = 0; part < PARTS; part++) done(added[part]);
        if (GATE && __any_sync(0xffffffffu, spoilt(added[0]) + spoilt(added[PARTS - 1]) != 0))
            return walk(state, room, n, places, CHUNK, scale, self);  // a gate may forget what no product forgets
        for (int part = 0; part < PARTS; part++) add(state, added[part], part, total(n));
    }
    // Scores, and what the state answers; without gates its last products may be under way at the end.
    __device__ __forceinline__ void recall(Answers& answers, LeftValues& values, const State& state, int n) const {
        OwnScores scores;
        begin_products();
        begin_scores(scores, room.queries(n), room.keys(n));
        const StateTerms early(state, 0);
        begin_products();
        begin_recall(answers, early, room.queries(n), 0);
        finish_products<1>();
        done(scores);
        put_scores(room, scores, room.decays(n), self);
        show_to_products();
        arrive_as_warp(barriers.scores[self.group], self);
        if constexpr (PARTS == 2) {
            const StateTerms late(state, 1);
            begin_products();
            begin_recall(answers, late, room.queries(n), 1);
        }
        load_values(values, room.values(n), self);
        if (!GATE) return;  // sums go on
        finish_products<0>();
        done(answers);
        decay_answers(answers, room.decays(n), self);
    }
    __device__ __forceinline__ void answer(State& state, int n) const {
        Answers answers;
        LeftValues values;
        Decayed decayed;
        Added added[PARTS];
        recall(answers, values, state, n);
        wait(barriers.scores[self.group], n & 1);
        begin_products();
        begin_weighing(answers, values, room, self.group);
        decay_values(decayed, values, room.decays(n), self);
        if (!GATE) finish_products<1>();  // the terms of the state leave their registers
        begin_products();
        for (int part = 0; part < PARTS; part++) begin_memorising(added[part], decayed, room.keys(n), part);
        finish_products<PARTS>();  // sums of the state may be under way
        done(answers);
        if (any(spoilt(answers) != 0, n)) {
            finish_products<0>();  // sums that nobody wants leave their registers
            for (int part = 0; part < PARTS; part++) done(added[part]);
            return answer_one_by_one(answers, state, n);
        }
        put(answers, n, places.tokens_of(n), self);
        finish_products<0>();
        for (int part = 0; part < PARTS; part++) done(added[part]), add(state, added[part], part, total(n));
    }
    // All chunks of the piece; and what the piece leaves of a state.
    __device__ __forceinline__ float take(State& state) const {
        float product = 1;
        const int chunks = places.chunks();
        #pragma unroll 1
        for (int n = 0; n < chunks; n++) {
            const Consumer now = {room, barriers, places, votes, scale, Self()};
            wait(barriers.ring.there[n % STAGES], n / STAGES & 1);
            show_to_products();
            if (STATES)
                now.states_of(state, n);
            else
                now.answer(state, n);
            if (GATE && STATES) product = kept(room.decays(n).total, product);
            arrive_as_warp(barriers.ring.free[n % STAGES], self);
        }
        return product;
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
        const float decay = GATE ? *stored.decays_of(places, p) : 1;
        const real* sum = stored.sum_of(places, places.columns, p, self);
        #pragma unroll
        for (int i = 0; i < KEYS / 2; i++) state[i] = kept(decay, state[i]) + sum[i * stride];
    }
    if (!STATES) put_zeros(consumer.room, self);
    const float product = consumer.take(state);
    if (STATES) {
        real* sum = stored.sum_of(places, places.columns, places.piece, self);
        #pragma unroll
        for (int i = 0; i < KEYS / 2; i++) sum[i * stride] = state[i];
        if (GATE && self.thread() == 0 && places.column_block == 0) *stored.decays_of(places, places.piece) = product;
    } else if (after) {
        each_stored(state, places, self, [&](int key, int column, float& x) { after[place(key, column)] = x; });
    }
}

extern "C" __global__ void __launch_bounds__(PRODUCERS + 128 * GROUPS, TOGETHER)
linear_attention_wgmma(const data* q, const data* k, const data* v, const real* log_decay, const real* S, real* S_next,
                       data* o, real* sums, real* piece_decays, const long long* table, int axes, int tokens,
                       int columns, int groups, int pieces, int stored, int length, real scale) {
    __shared__ Barriers barriers;
    __shared__ Places places;
    __shared__ int votes[WARPS];
    const Room room = {dynamic_shared() + (-shared_address(dynamic_shared()) & 1023)};
    if (threadIdx.x == 0) {
        find(places, q, k, v, log_decay, o, table, axes, tokens, columns, groups, pieces, stored, length);
        barriers.set_up_all();
    }
    __syncthreads();  // the places are known, and the barriers are there
    if (threadIdx.x < PRODUCERS) {
        leave_registers<56>();
        produce(room, barriers, places);
    } else {
        take_registers<GROUPS == 2 ? 224 : 200>();
        const bool last = places.end == tokens && places.group == 0;
        const real* before = STATES ? nullptr : rows(S, table, axes, STATE, places.which).begin;
        real* after = STATES || !last ? nullptr : rows(S_next, table, axes, STATE_NEXT, places.which).begin;
        consume({room, barriers, places, votes, scale, {}}, {sums, piece_decays}, before, after);
    }
}
