// Delta rule on the tensor cores of Hopper, second launch: the walk of delta_rule_chunks.cu for bfloat16 and queries of
// one group. With what delta_rule_prepare.cu has made of a chunk,
//
//     E = U - W S,    o = Q S + M E,    S = decay S + K^T E,
//
// see wgmma.cuh for the products. A block has one memory and 32 of its value columns. A warpgroup learns: it finds the
// errors E. Another reads: it finds the answers. The first keeps the state of 64 keys in its registers, the other that
// of 64 more, and it lies in shared memory for the products that read it. One more warpgroup brings the next chunk.
//
// Whatever is computed is kept in two bfloat16, never in one. Both terms of a matrix with 32 columns are side by side,
// so one product of 64 columns takes them both, and their sums are added where they are wanted. What a chunk adds to the
// state is summed from zero and then added, because tensor cores cut what they add instead of rounding it.
//
// Zero times NaN is NaN, so products would carry a bad number into the past. An error that is not finite, or what the
// first launch could not make, sends the chunk another way: answers before its first bad token are made as ever, and
// then its tokens are taken one after the other.

constexpr int WARPS = 8, PRODUCERS = 128;  // warps that compute; threads that bring
constexpr int KEEPERS = KEYS / 16;         // warps that keep the state
constexpr int EARLY = 2;                   // chunks under way: of what errors and answers begin with
constexpr int LATE = KEY_TERMS * KEYS > 128 ? 1 : 2;  // and of what they end with, where there is room
constexpr int BOTH = 2 * VALUES;           // columns of two terms
static_assert((KEYS == 64 || KEYS == 128) && CHUNK == 64 && BOTH == 64, "products have 64 rows and columns");

typedef Swizzled<bfloat16, CHUNK, KEYS> Vectors;  // of a chunk's tokens, or one term of them
typedef Swizzled<bfloat16, CHUNK, CHUNK> Scores;  // one term of them
typedef Swizzled<bfloat16, CHUNK, BOTH> Errors;
typedef Swizzled<bfloat16, KEYS, BOTH> States;
typedef float Sums[BOTH / 2];     // of a warpgroup: 64 rows, columns of both terms
typedef float Totals[VALUES / 2]; // columns of their sum

// ---- what all warpgroups share -------------------------------------------------------------------------------------

// The dynamic shared memory.
struct Room {
    unsigned char* at;

    static constexpr int targets = CHUNK * VALUES * sizeof(float);
    static constexpr int early = (2 + KEY_TERMS) * Vectors::bytes + targets;
    static constexpr int late = KEY_TERMS * Vectors::bytes + 2 * Scores::bytes;

    __device__ __forceinline__ unsigned char* early_of(int n) const { return at + n % EARLY * early; }
    __device__ __forceinline__ unsigned char* late_of(int n) const { return at + EARLY * early + n % LATE * late; }
    __device__ __forceinline__ unsigned char* rest() const { return at + EARLY * early + LATE * late; }
    __device__ __forceinline__ Vectors recalls(int n, int term) const { return {early_of(n) + term * Vectors::bytes}; }
    __device__ __forceinline__ Vectors queries(int n, int term) const {
        return {early_of(n) + (2 + term) * Vectors::bytes};
    }
    // A row of targets is as long as one of errors in two terms, and its pieces of four change places in the same way.
    __device__ __forceinline__ Errors targets_of(int n) const {
        return {early_of(n) + (2 + KEY_TERMS) * Vectors::bytes};
    }
    __device__ __forceinline__ Vectors keys(int n, int term) const { return {late_of(n) + term * Vectors::bytes}; }
    __device__ __forceinline__ Scores scores(int n, int term) const {
        return {late_of(n) + KEY_TERMS * Vectors::bytes + term * Scores::bytes};
    }
    __device__ __forceinline__ States state() const { return {rest()}; }
    __device__ __forceinline__ Errors errors() const { return {rest() + States::bytes}; }
    // As they are at the end of the chunk.
    __device__ __forceinline__ Errors faded() const {
        return {rest() + States::bytes + (GATE == STEP ? int(Errors::bytes) : 0)};
    }
};

// Places for chunks under way.
template <int STAGES>
struct Ring {
    Barrier there[STAGES], free[STAGES];  // a chunk, and a place that nobody needs any more

    __device__ __forceinline__ void set_up_all(int bringers) {
        for (int i = 0; i < STAGES; i++) set_up(there[i], bringers), set_up(free[i], WARPS);
    }
    __device__ __forceinline__ Barrier& there_of(int n) { return there[n % STAGES]; }
    __device__ __forceinline__ Barrier& free_of(int n) { return free[n % STAGES]; }
    static __device__ __forceinline__ int phase(int n) { return n / STAGES & 1; }
};
struct Barriers {
    Ring<EARLY> early;
    Ring<LATE> late;
    Barrier state, recalled;  // the state is there; nobody is left at it
    Barrier lost;             // products for errors are done, which all others wait for
    Barrier errors, answered; // the errors are there; nobody is left at them

    __device__ __forceinline__ void set_up_all() {
        early.set_up_all(3 * 32), late.set_up_all(3 * 32);
        set_up(state, KEEPERS), set_up(recalled, 4), set_up(lost, 4), set_up(errors, 4), set_up(answered, 4);
    }
};

// What a block has: in shared memory, because few registers are left for it.
struct Walk {
    Arrays arrays;
    Place state, state_next;
    const float* records;
    int which, first_column, tokens, columns, chunks, sharers;  // sharers: blocks with the same memory

    __device__ __forceinline__ Record record(int n) const {
        return Record(const_cast<float*>(records), size_t(which) * chunks + n, 1, columns);
    }
    __device__ __forceinline__ int first_of(int n) const { return n * CHUNK; }
    __device__ __forceinline__ int tokens_of(int n) const { return min(int(CHUNK), tokens - first_of(n)); }
};

// ---- bringing chunks, by a warpgroup -------------------------------------------------------------------------------

// All rows of a tile, from rows of so many bytes, by a warp; in scores nothing comes from blocks of later keys.
template <class Tile>
__device__ __forceinline__ void bring_rows_of(const Tile& tile, const void* rows, long long bytes, bool scores) {
    constexpr int pieces = Tile::columns / 8, step = 32 / pieces;
    const int first = threadIdx.x % 32 / pieces, piece = threadIdx.x % pieces;
    const char* from = static_cast<const char*>(rows) + first * bytes + piece * 16;
    #pragma unroll
    for (int i = 0; i < 8; i += step, from += step * bytes) {  // rows of one place among eight
        unsigned char* to = tile.piece(first + i, piece * 8);
        #pragma unroll
        for (int far = 0; far < CHUNK; far += 8)
            if (!scores || piece / 2 <= far / 16) copy_later(to + far * 128, from + far * bytes, 16);
    }
}

// Tokens as they are, or what the first launch made of them: what a warp brings of each chunk.
struct Bringer {
    Carrier<Vectors> tokens;

    template <class TileOf>  // tile_of(term)
    __device__ __forceinline__ void bring(const bfloat16* made, int rows, Barrier& there, TileOf tile_of) {
        if constexpr (DIRECT) {
            tokens.bring(tile_of(0), rows);
            if (tokens.vectors) return arrive_with_copies(there);
            close_copies();
            finish_copies<0>();  // an arrival of its own does not wait for copies
            tokens.hand_over(there);
        } else {
            for (int term = 0; term < KEY_TERMS; term++)
                bring_rows_of(tile_of(term), made + term * CHUNK * KEYS, 2 * KEYS, false);
            arrive_with_copies(there);
        }
    }
};
__device__ __forceinline__ void prefetch_chunk(const Walk& walk, int n) {
    const int mine = int(blockIdx.x) % walk.sharers * PRODUCERS + threadIdx.x;
    const Senders senders = {mine, walk.sharers * PRODUCERS};
    prefetch_record(walk.record(n), senders);
    if (!DIRECT) return;
    prefetch_tokens(walk.arrays.q, walk.first_of(n), walk.tokens_of(n), senders);
    prefetch_tokens(walk.arrays.k, walk.first_of(n), walk.tokens_of(n), senders);
}
// Two warps bring a term each of what the first launch has made, one has queries and targets, one has keys.
__device__ __forceinline__ void produce(const Room& room, Barriers& barriers, const Walk& walk) {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    Bringer bringer = {{warp == 2 ? walk.arrays.q : walk.arrays.k, 0, 0, K}};
    #pragma unroll 1
    for (int n = 0; n < walk.chunks; n++) {
        const Record record = walk.record(n);
        Barrier &early = barriers.early.there_of(n), &late = barriers.late.there_of(n);
        if (n >= EARLY)
            wait(barriers.early.free_of(n), barriers.early.phase(n - EARLY));
        if (warp < 2) {
            bring_rows_of(room.recalls(n, warp), record.recalls() + warp * CHUNK * KEYS, 2 * KEYS, false);
            arrive_with_copies(early);
        } else if (warp == 2) {
            bring_rows_of(room.targets_of(n), record.targets() + walk.first_column, 4ll * record.wide, false);
            bringer.bring(record.queries(0), walk.tokens_of(n), early, [&](int term) { return room.queries(n, term); });
        }
        if (n >= LATE)
            wait(barriers.late.free_of(n), barriers.late.phase(n - LATE));
        if (warp < 2) {
            bring_rows_of(room.scores(n, warp), record.scores(0) + warp * CHUNK * CHUNK, 2 * CHUNK, true);
            arrive_with_copies(late);
        } else if (warp == 3) {
            bringer.bring(record.keys(), walk.tokens_of(n), late, [&](int term) { return room.keys(n, term); });
        }
        if (n + EARLY < walk.chunks) prefetch_chunk(walk, n + EARLY);
    }
    close_copies();
    finish_copies<0>();  // no thread ends before its copies are there
}

// ---- what a thread of a warpgroup has ------------------------------------------------------------------------------

// Who a thread is.
struct Self {
    int warp, lane, line, pair;  // warp: of the warpgroup

    __device__ __forceinline__ Self() {
        warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) % 4;
        lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
    }
};
// All lanes of a warp have come.
__device__ __forceinline__ void arrive_as_warp(Barrier& barrier, const Self& self) {
    __syncwarp();
    if (self.lane == 0) arrive(barrier);
}
// use(row of the warpgroup, column, x) for each number of its 64 rows.
template <class Use>
__device__ __forceinline__ void each_total(Totals& x, const Self& self, Use use) {
    #pragma unroll
    for (int i = 0; i < VALUES / 2; i++)
        use(16 * self.warp + self.line + i / 2 % 2 * 8, i / 4 * 8 + self.pair + i % 2, x[i]);
}
// The same with the place of a state's number, and whether it is there; places are found from each other.
template <class T, class Use>
__device__ __forceinline__ void each_place(Totals& x, const Self& self, const Rows<T>& state, int key, int column,
                                           int columns, Use use) {
    key += 16 * self.warp + self.line, column += self.pair;
    T* at = &state.at(key, column);
    const long long down = 8 * state.row;
    #pragma unroll
    for (int i = 0; i < VALUES / 2; i++) {
        const bool there = key + i / 2 % 2 * 8 < K && column + i / 4 * 8 + i % 2 < columns;
        use(x[i], at + (i / 2 % 2 * down + i % 2 * state.column), there);
        if (i % 4 == 3) at += 8 * state.column;
    }
}
__device__ __forceinline__ float total(const Sums& sum, int i) { return sum[i] + sum[i + VALUES / 2]; }

// Both terms of 64 rows, where products take them.
template <class Tile>
__device__ __forceinline__ void put_terms(const Tile& tile, int first_row, const Totals& x, const Self& self) {
    const int row = first_row + 16 * self.warp + self.lane % 16;
    #pragma unroll
    for (int block = 0; block < VALUES / 16; block++) {
        unsigned terms[2][4];
        for (int r = 0; r < 4; r++) set_pair<bfloat16>(terms, r, x[8 * block + 2 * r], x[8 * block + 2 * r + 1]);
        for (int term = 0; term < 2; term++)
            store_matrices(terms[term], tile.piece(row, VALUES * term + 16 * block + self.lane / 16 * 8));
    }
}

// ---- products ------------------------------------------------------------------------------------------------------

// W S, small terms of W first.
__device__ __forceinline__ void begin_losses(Sums& sum, const Room& room, int n) {
    const Matrix state = room.state().matrix();
    #pragma unroll
    for (int term = 1; term >= 0; term--) {
        const Matrix recalls = room.recalls(n, term).matrix();
        #pragma unroll
        for (int c = 0; c < KEYS; c += 16)
            wgmma_bf16_rows<BOTH>(sum, Vectors::part(recalls, 0, c), States::part(state, c, 0), c > 0 || term < 1);
    }
    close_products();
}
// Q S.
__device__ __forceinline__ void begin_recall(Sums& sum, const Room& room, int n) {
    const Matrix state = room.state().matrix();
    #pragma unroll
    for (int term = KEY_TERMS - 1; term >= 0; term--) {
        const Matrix queries = room.queries(n, term).matrix();
        #pragma unroll
        for (int c = 0; c < KEYS; c += 16)
            wgmma_bf16_rows<BOTH>(sum, Vectors::part(queries, 0, c), States::part(state, c, 0),
                                  c > 0 || term < KEY_TERMS - 1);
    }
    close_products();
}
// M E, added.
__device__ __forceinline__ void begin_weighing(Sums& sum, const Room& room, int n) {
    const Matrix errors = room.errors().matrix();
    #pragma unroll
    for (int term = 1; term >= 0; term--) {
        const Matrix scores = room.scores(n, term).matrix();
        #pragma unroll
        for (int i = 0; i < CHUNK; i += 16)
            wgmma_bf16_rows<BOTH>(sum, Scores::part(scores, 0, i), Errors::part(errors, i, 0), 1);
    }
    close_products();
}
// K^T E, of 64 keys.
__device__ __forceinline__ void begin_memorising(Sums& sum, const Room& room, int n, int group) {
    const Matrix errors = room.faded().matrix();
    #pragma unroll
    for (int term = KEY_TERMS - 1; term >= 0; term--) {
        const Matrix keys = room.keys(n, term).matrix();
        #pragma unroll
        for (int i = 0; i < CHUNK; i += 16)
            wgmma_bf16_tokens<BOTH>(sum, Vectors::part(keys, i, 64 * group), Errors::part(errors, i, 0),
                                    i > 0 || term < KEY_TERMS - 1);
    }
    close_products();
}

// ---- the walk over chunks ------------------------------------------------------------------------------------------

// One gate per step: decays of a lane's two tokens, on their way while others work.
struct Fading {
    float of[2];

    __device__ __forceinline__ Fading(const float* decays, const Self& self) {
        for (int half = 0; half < 2; half++)
            of[half] = GATE == STEP ? decays[16 * self.warp + self.line + 8 * half] : 1;
    }
    template <int R>
    __device__ __forceinline__ void scale(float (&x)[R]) const {
        #pragma unroll
        for (int i = 0; i < R; i++) x[i] *= of[i / 2 % 2];
    }
};

// A warp that reads, or one that learns.
template <bool READS>
struct Consumer {
    const Room& room;
    Barriers& barriers;
    const Walk& walks;
    int* votes;    // of each warp that learns: so many tokens come before a bad one
    float* parts;  // for tokens taken one by one, as all below
    real scale;
    Self self;

    static constexpr bool keeps = 64 * READS < KEYS;
    static constexpr int warps = WARPS;
    __device__ __forceinline__ int warp() const { return 4 * READS + self.warp; }
    __device__ __forceinline__ void meet() const { both_warpgroups(); }
    // The state in float, in the place of what products read.
    __device__ __forceinline__ float& number(int key, int column) const {
        return reinterpret_cast<float*>(room.state().begin)[key * VALUES + column];
    }

    // The state where products take it.
    __device__ __forceinline__ void lay_out(const Totals& state) const {
        if (!keeps) return;
        put_terms(room.state(), 64 * READS, state, self);
        show_to_products();
        arrive_as_warp(barriers.state, self);
    }
    // Errors of chunk n, where products take them.
    __device__ __forceinline__ void learn(int n) const {
        const Record record = walks.record(n);
        const Fading fading(record.to_end(), self);
        const float known = *record.good();
        Sums lost;
        begin_products();
        begin_losses(lost, room, n);
        finish_products<0>();
        done(lost);
        arrive_as_warp(barriers.lost, self);
        if (n)
            wait(barriers.answered, n - 1 & 1);
        Totals errors;
        int good = int(known);
        const Errors targets = room.targets_of(n);
        #pragma unroll
        for (int i = 0; i < VALUES / 2; i++) errors[i] = total(lost, i);
        each_total(errors, self, [&](int token, int column, float& x) {
            x = reinterpret_cast<const float*>(targets.piece(token, column / 4 * 8))[column % 4] - x;
            good = bad(x) ? min(good, token) : good;
        });
        put_terms(room.errors(), 0, errors, self);
        if (GATE == STEP) fading.scale(errors), put_terms(room.faded(), 0, errors, self);
        for (int distance = 1; distance < 32; distance *= 2)
            good = min(good, __shfl_xor_sync(0xffffffffu, good, distance));
        if (self.lane == 0) votes[self.warp] = good;
        show_to_products();
        arrive_as_warp(barriers.errors, self);
        arrive_as_warp(barriers.early.free_of(n), self);
    }
    // What the state answers to the queries of chunk n, so far.
    __device__ __forceinline__ void recall(Sums& sum, int n) const {
        const Fading fading(walks.record(n).from_start(), self);
        wait(barriers.lost, n & 1);  // not beside what all wait for, but while errors are computed
        begin_products();
        begin_recall(sum, room, n);
        finish_products<0>();
        done(sum);
        arrive_as_warp(barriers.recalled, self);
        arrive_as_warp(barriers.early.free_of(n), self);
        if (GATE == STEP) fading.scale(sum);
    }
    __device__ __forceinline__ void answer(const Sums& sum, int n, int good) const {
        #pragma unroll
        for (int column = 0; column < VALUES; column += 8) {
            Sum found;
            for (int i = 0; i < 4; i++) found.x[i] = total(sum, column / 2 + i);
            write(found, walks.arrays.o, walks.first_of(n) + 16 * self.warp, walks.first_column + column,
                  good - 16 * self.warp, walks.columns, scale);
        }
    }
    // The pairs of chunk n; of one who reads, answers are on their way meanwhile.
    __device__ __forceinline__ void memorise(Totals& state, Sums& sum, int n, const float (&left)[2]) const {
        Sums added;
        begin_products();
        if (keeps) begin_memorising(added, room, n, READS);
        if (READS) begin_weighing(sum, room, n);
        finish_products<READS>();
        if (!keeps) return;
        done(added);
        #pragma unroll
        for (int i = 0; i < VALUES / 2; i++) state[i] = fma(left[i / 2 % 2], state[i], total(added, i));
        wait(barriers.recalled, n & 1);
    }
    // Errors from a bad one on are zero for the answers before it; then one token after the other.
    __device__ __forceinline__ void one_by_one(Totals& state, Sums& sum, int n, int good) const {
        const Errors errors = room.errors();
        for (int i = good * BOTH + 32 * self.warp + self.lane; i < CHUNK * BOTH && !READS; i += 128)
            put(reinterpret_cast<bfloat16*>(errors.piece(i / BOTH, i % BOTH))[i % 8], 0);
        show_to_products();
        both_warpgroups();  // no bad error is left
        if (READS) {
            begin_products();
            begin_weighing(sum, room, n);
            finish_products<0>();
            done(sum);
            answer(sum, n, good);
        }
        const auto number_of = [&](int row, int column) -> float& { return number(64 * READS + row, column); };
        if (keeps) each_total(state, self, [&](int row, int column, float& x) { number_of(row, column) = x; });
        both_warpgroups();  // all numbers are there
        walk(*this, walks.arrays, walks.first_of(n), good, walks.tokens_of(n), walks.first_column, walks.columns, 1,
             scale);
        if (keeps) each_total(state, self, [&](int row, int column, float& x) { x = number_of(row, column); });
        both_warpgroups();  // nobody is left at the numbers
    }
    __device__ __forceinline__ void take(Totals& state, int n) const {
        float left[2] = {1, 1};  // of the state, at a lane's rows
        const int row = 64 * READS + 16 * self.warp + self.line;
        for (int half = 0; half < 2 && GATE && keeps; half++)
            left[half] = walks.record(n).total()[GATE == STEP ? 0 : row + 8 * half];
        Sums sum;
        wait(barriers.early.there_of(n), barriers.early.phase(n));
        wait(barriers.state, n & 1);
        show_to_products();
        if (READS)
            recall(sum, n);
        else
            learn(n);
        wait(barriers.late.there_of(n), barriers.late.phase(n));
        wait(barriers.errors, n & 1);
        show_to_products();
        const int good = min(min(votes[0], votes[1]), min(votes[2], votes[3])), count = walks.tokens_of(n);
        const bool spoilt = good < count;
        if (spoilt)
            one_by_one(state, sum, n, good);
        else
            memorise(state, sum, n, left);
        lay_out(state);
        if (READS) {
            finish_products<0>();
            done(sum);
            arrive_as_warp(barriers.answered, self);
        }
        arrive_as_warp(barriers.late.free_of(n), self);
        if (READS && !spoilt) answer(sum, n, count);
    }
};

template <bool READS>
__device__ __forceinline__ void consume(const Consumer<READS>& consumer, const real* S, real* S_next) {
    const Walk& walks = consumer.walks;
    const Self& self = consumer.self;
    const int first_key = 64 * READS, first = walks.first_column;
    Totals state;
    each_place(state, self, walks.state.of(S), first_key, first, walks.columns,
               [](float& x, const real* at, bool there) { x = there ? *at : 0; });
    consumer.lay_out(state);
    #pragma unroll 1
    for (int n = 0; n < walks.chunks; n++) consumer.take(state, n);
    each_place(state, self, walks.state_next.of(S_next), first_key, first, walks.columns,
               [](float& x, real* at, bool there) {
                   if (there) *at = x;
               });
}

extern "C" __global__ void __launch_bounds__(PRODUCERS + 32 * WARPS, 1)
delta_rule_wgmma(const data* q, const data* k, const data* v, const real* beta, const real* log_decay,
                 const data* erase_key, const real* S, real* S_next, data* o, const float* records,
                 const long long* table, int axes, int tokens, int columns, int groups, int blocks, real scale) {
    __shared__ Barriers barriers;
    __shared__ Place places[ARRAYS];
    __shared__ Walk walks;
    __shared__ int votes[4];
    __shared__ float parts[32 * WARPS];
    const Room room = {dynamic_shared() + (-shared_address(dynamic_shared()) & 1023)};
    find_places(places, table, axes, blockIdx.x / blocks);
    for (int n = 0; n < LATE; n++)  // nothing comes from keys of later blocks: so it is for all chunks
        for (int i = threadIdx.x; i < int(2 * Scores::bytes / sizeof(float)); i += blockDim.x)
            reinterpret_cast<float*>(room.scores(n, 0).begin)[i] = 0;
    show_to_products();
    __syncthreads();  // places are known
    if (threadIdx.x == 0) {
        walks.which = blockIdx.x / blocks, walks.first_column = blockIdx.x % blocks * VALUES, walks.sharers = blocks;
        walks.tokens = tokens, walks.columns = columns, walks.chunks = (tokens + CHUNK - 1) / CHUNK;
        walks.records = records, walks.state = places[STATE], walks.state_next = places[STATE_NEXT];
        Arrays& arrays = walks.arrays;
        arrays.q = places[Q].of(q), arrays.k = places[KEY].of(k), arrays.v = places[V].of(v);
        arrays.p = ERASE ? places[ERASE_OF].of(erase_key) : arrays.k, arrays.o = places[O].of(o);
        arrays.beta = places[BETA].of(beta), arrays.gate = places[GATE_OF].of(log_decay);
        barriers.set_up_all();
    }
    __syncthreads();  // the walk is known, and the barriers are there
    if (threadIdx.x < PRODUCERS)
        produce(room, barriers, walks);
    else if (threadIdx.x < PRODUCERS + 128)
        consume<false>({room, barriers, walks, votes, parts, scale, {}}, S, S_next);
    else
        consume<true>({room, barriers, walks, votes, parts, scale, {}}, S, S_next);
}
