// Delta rule, chunk by chunk, second launch: the walk. With what delta_rule_prepare.cu has made of a chunk,
//
//     E = U - W S,    o = Q S + M E,    S = decay S + K^T E,
//
// where products with Q, K and W are decayed. A block has one memory and 32 of its value columns, and two teams of
// warps that work at the same time: learners find errors and keep the state, readers find answers. A warp of either has
// 16 of the chunk's tokens and half of the columns. Learners share the keys for what is written, 16 of them at a time
// with all columns: that part of the state stays in registers, and lies in shared memory as terms for the products that
// read it. While one half of a chunk is worked on, what the other half needs is on its way; a team brings what it
// multiplies.
//
// Zero times NaN is NaN, so products would carry a bad number into the past. An error that is not finite, or what the
// first launch could not make, sends the chunk another way: answers before its first bad token are made as ever, and
// then its tokens are taken one after the other.

constexpr int TEAM_WARPS = CHUNK / 8, TEAM = 32 * TEAM_WARPS;  // a power of two
constexpr int WARPS = 2 * TEAM_WARPS, THREADS = 2 * TEAM;
constexpr int KEY_TILES = KEYS / 16, OWN_TILES = (KEY_TILES + TEAM_WARPS - 1) / TEAM_WARPS;

typedef Split<SUM_TERMS, CHUNK, VALUES> Errors;

// What a block keeps in shared memory.
struct Room {
    unsigned char* at = dynamic_shared();
    Split<SUM_TERMS, CHUNK, KEYS> w;
    Tokens q, k;
    Split<SUM_TERMS, CHUNK, CHUNK> m;
    Split<SUM_TERMS, KEYS, VALUES> state;  // the memory before the chunk
    Errors errors, faded;                  // STEP: faded as they are at the end of the chunk
    float* parts;                          // what the threads of a block tell one another

    __device__ __forceinline__ Room() {
        parts = reinterpret_cast<float*>(at), at += 4 * THREADS;
        w = split_of<SUM_TERMS, CHUNK, KEYS>(at);
        q = split_of<KEY_TERMS, CHUNK, KEYS>(at), k = split_of<KEY_TERMS, CHUNK, KEYS>(at);
        m = split_of<SUM_TERMS, CHUNK, CHUNK>(at), state = split_of<SUM_TERMS, KEYS, VALUES>(at);
        faded = errors = split_of<SUM_TERMS, CHUNK, VALUES>(at);
        if (GATE == STEP) faded = split_of<SUM_TERMS, CHUNK, VALUES>(at);
    }
    // For tokens taken one by one: the state in float, in the place of what products read.
    static constexpr int warps = WARPS;
    __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
    __device__ __forceinline__ void meet() const { __syncthreads(); }
    __device__ __forceinline__ float& number(int key, int column) const {
        return reinterpret_cast<float*>(w.term[0].begin)[key * VALUES + column];
    }
};

__device__ __forceinline__ bool reads() { return threadIdx.x >= TEAM; }  // or learns
// Numbers of a team's threads, at least TEAM for others.
__device__ __forceinline__ int learner() { return threadIdx.x; }
__device__ __forceinline__ int reader() { return threadIdx.x ^ TEAM; }

// ---- what arrives -----------------------------------------------------------------------------------------------------

// Scores of a record: those on and below the diagonal.
__device__ __forceinline__ void bring_scores(const Split<SUM_TERMS, CHUNK, CHUNK>& to, const bfloat16* from) {
    constexpr int pieces = CHUNK / 8, step = TEAM / pieces;
    const int row = reader() / pieces, column = reader() % pieces * 8;
    if (!reads()) return;
    bfloat16* const first = &to.term[0].at(row, column);
    #pragma unroll
    for (int n = 0; n < SUM_TERMS * CHUNK / step; n++)
        if (column / 16 <= (row + n * step) % CHUNK / 16)
            copy_later(first + n * step * to.term[0].stride, from + (row + n * step) * CHUNK + column, 16);
}
// Tokens as they are, or what the first launch made of them; a thread is one of a team.
template <class T>
__device__ __forceinline__ void bring_tokens(const Tokens& to, Rows<const T> from, const bfloat16* made, long long t,
                                             int count, int thread) {
    if constexpr (DIRECT)
        bring_rows<TEAM>(to.term[0], from, t, count, K, thread);
    else
        copy_rows<TEAM, KEY_TERMS * CHUNK>(to.term[0], made, KEYS, thread);  // terms lie behind one another
}

// What a thread will need of the next chunk, on its way to registers.
struct Ahead {
    Sum target[2];
    float decay[2];  // of its tokens, since the start for what is read, to the end for what is learnt
    float good;

    __device__ __forceinline__ void look(const Record& record, int token, int column) {
        const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        good = *record.good();
        const float* const decays = (reads() ? record.from_start() : record.to_end()) + token + line;
        for (int half = 0; half < 2 && GATE == STEP; half++) decay[half] = decays[8 * half];
        if (reads()) return;
        const float* const targets = record.targets() + size_t(token + line) * record.wide + column + pair;
        for (int n = 0; n < 2; n++)
            for (int half = 0; half < 2; half++) {
                const auto two = Vector<float, 2>::at(targets + half * 8 * record.wide + 8 * n);
                target[n].x[2 * half] = two.x[0], target[n].x[2 * half + 1] = two.x[1];
            }
    }
};

// ---- products ---------------------------------------------------------------------------------------------------------

// sum += tokens S, for 16 tokens and 16 columns.
template <int TERMS>
__device__ __forceinline__ void recall(Gathered (&sum)[2], const Split<TERMS, CHUNK, KEYS>& tokens, const Room& room,
                                       int token, int column) {
    #pragma unroll 4
    for (int key = 0; key < KEYS; key += 16) {
        Left<bfloat16, TERMS> left;
        Right<bfloat16, SUM_TERMS> right[2];
        load_left(left, tokens, token, key);
        load_right(right, room.state, key, column);
        #pragma unroll
        for (int n = 0; n < 2; n++) sum[n].add(left, right[n]);
    }
}

// sum += M E.
__device__ __forceinline__ void weigh(Gathered (&sum)[2], const Room& room, int token, int column) {
    #pragma unroll
    for (int from = 0; from < CHUNK; from += 16)
        if (from <= token) {
            Left<bfloat16, SUM_TERMS> left;
            Right<bfloat16, SUM_TERMS> right[2];
            load_left(left, room.m, token, from);
            load_right(right, room.errors, from, column);
            #pragma unroll
            for (int n = 0; n < 2; n++) sum[n].add(left, right[n]);
        }
}

// Rows of a Sum times one factor each, of which a lane has those of its two rows.
__device__ __forceinline__ void scale_rows(Sum& sum, const float (&factor)[2]) {
    for (int i = 0; i < 4; i++) sum.x[i] *= factor[i / 2];
}

// What is read of a memory that fades.
__device__ __forceinline__ void fade(Gathered (&sum)[2], const Ahead& now) {
    for (int n = 0; n < 2 && GATE == STEP; n++)
        scale_rows(sum[n].large, now.decay), scale_rows(sum[n].small, now.decay);
}

// Errors of 16 tokens and 16 columns, where products take them; so many tokens, at most `good`, come before a bad one.
__device__ __forceinline__ int learn(const Gathered (&lost)[2], const Ahead& now, const Room& room, int token,
                                     int column, int good) {
    #pragma unroll
    for (int n = 0; n < 2; n++) {
        Sum error = lost[n].total();
        for (int i = 0; i < 4; i++) error.x[i] = now.target[n].x[i] - error.x[i];
        each(error, [&](int i, int, float x) { good = bad(x) ? min(good, token + i) : good; });
        store_terms(error, room.errors, token, column + 8 * n);
        if (GATE == STEP) scale_rows(error, now.decay), store_terms(error, room.faded, token, column + 8 * n);
    }
    return good;
}

// The part of the state that a warp of learners owns: tiles of 16 keys, all columns.
struct Memory {
    Sum part[OWN_TILES][VALUES / 8];
    float decay[OWN_TILES][2];  // over the chunk, of a lane's keys

    __device__ __forceinline__ void look(const Record& record) {
        for (int tile = 0; tile < OWN_TILES && GATE && !reads(); tile++)
            for (int half = 0; half < 2; half++) {
                const int key = (threadIdx.x / 32 + tile * TEAM_WARPS) * 16 + threadIdx.x % 32 / 4 + 8 * half;
                decay[tile][half] = key < KEYS ? record.total()[GATE == STEP ? 0 : key] : 0;
            }
    }

    // use(key, column, x), of keys that are there
    template <class Use>
    __device__ __forceinline__ void each_number(Use use) {
        #pragma unroll
        for (int tile = 0; tile < OWN_TILES && !reads(); tile++) {
            const int key = (threadIdx.x / 32 + tile * TEAM_WARPS) * 16;
            #pragma unroll
            for (int n = 0; n < VALUES / 8; n++)
                each(part[tile][n], [&](int i, int j, float& x) {
                    if (key < KEYS) use(key + i, 8 * n + j, x);
                });
        }
    }
    // Where products read it.
    __device__ __forceinline__ void lay_out(const Room& room) {
        #pragma unroll
        for (int tile = 0; tile < OWN_TILES && !reads(); tile++) {
            const int key = (threadIdx.x / 32 + tile * TEAM_WARPS) * 16;
            for (int n = 0; n < VALUES / 8 && key < KEYS; n++) store_terms(part[tile][n], room.state, key, 8 * n);
        }
    }
    // The pairs of a chunk.
    __device__ __forceinline__ void memorise(const Room& room) {
        #pragma unroll
        for (int tile = 0; tile < OWN_TILES && !reads(); tile++) {
            const int key = (threadIdx.x / 32 + tile * TEAM_WARPS) * 16;
            if (key >= KEYS) break;
            Gathered sum[VALUES / 8] = {};
            #pragma unroll 4
            for (int token = 0; token < CHUNK; token += 16) {
                Left<bfloat16, KEY_TERMS> left;
                load_left_transposed(left, room.k, token, key);
                for (int column = 0; column < VALUES; column += 16) {
                    Right<bfloat16, SUM_TERMS> right[2];
                    load_right(right, room.faded, token, column);
                    for (int n = 0; n < 2; n++) sum[column / 8 + n].add(left, right[n]);
                }
            }
            for (int n = 0; n < VALUES / 8; n++) {
                const Sum more = sum[n].total();
                for (int i = 0; i < 4; i++)
                    part[tile][n].x[i] = fma(GATE ? decay[tile][i / 2] : 1, part[tile][n].x[i], more.x[i]);
            }
        }
    }
};

// ---- tokens one by one ------------------------------------------------------------------------------------------------

// The least of what the threads of a block say.
__device__ __forceinline__ int least_of_block(const Room& room, int mine) {
    for (int distance = 1; distance < 32; distance *= 2) mine = min(mine, __shfl_xor_sync(0xffffffffu, mine, distance));
    if (threadIdx.x % 32 == 0) room.parts[threadIdx.x / 32] = float(mine);
    __syncthreads();  // every warp has said so
    for (int warp = 0; warp < WARPS; warp++) mine = min(mine, int(room.parts[warp]));
    return mine;
}

// ---- the walk over chunks ---------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
delta_rule_chunks(const data* q, const data* k, const data* v, const real* beta, const real* log_decay,
                  const data* erase_key, const real* S, real* S_next, data* o, const float* records, const long long* table, int axes,
                  int tokens, int columns, int groups, int blocks, real scale) {
    const Room room;
    Memory memory;
    const int which = blockIdx.x / blocks, first_column = blockIdx.x % blocks * VALUES;
    const int token = threadIdx.x % TEAM / 64 * 16, column = threadIdx.x / 32 % 2 * 16;
    const int chunks = (tokens + CHUNK - 1) / CHUNK;

    __shared__ Place places[ARRAYS];
    __shared__ Arrays arrays;
    find_places(places, table, axes, which);
    __syncthreads();  // places are known
    if (threadIdx.x == 0) {
        arrays.q = places[Q].of(q), arrays.k = places[KEY].of(k), arrays.v = places[V].of(v);
        arrays.p = ERASE ? places[ERASE_OF].of(erase_key) : arrays.k, arrays.o = places[O].of(o);
        arrays.beta = places[BETA].of(beta), arrays.gate = places[GATE_OF].of(log_decay);
    }
    memory.each_number([&](int key, int j, float& x) {
        const real* const at = place_of(places[STATE].of(S), key, first_column + j, columns);
        x = at ? *at : 0;
    });
    memory.lay_out(room);
    __syncthreads();  // arrays are known

    const auto record_of = [&](int chunk) {
        return Record(const_cast<float*>(records), size_t(which) * chunks + chunk, groups, columns);
    };
    const auto bring_first = [&](int chunk, int group) {
        const Record record = record_of(chunk);
        if (group == 0) copy_rows<TEAM, SUM_TERMS * CHUNK>(room.w.term[0], record.recalls(), KEYS, learner());
        bring_tokens(room.q, arrays.q.of(group), record.queries(group), (long long)chunk * CHUNK,
                     min(CHUNK, tokens - chunk * CHUNK), reader());
        close_copies();
    };
    const auto bring_second = [&](int chunk, int group) {
        const Record record = record_of(chunk);
        bring_scores(room.m, record.scores(group));
        if (group == 0)
            bring_tokens(room.k, arrays.k, record.keys(), (long long)chunk * CHUNK,
                         min(CHUNK, tokens - chunk * CHUNK), learner());
        close_copies();
    };

    const auto prefetch_chunk = [&](int chunk) {
        const long long t = (long long)chunk * CHUNK;
        const int count = min(CHUNK, tokens - chunk * CHUNK);
        const Senders senders = {int(blockIdx.x % blocks) * TEAM + reader(), blocks * TEAM};
        prefetch_record(record_of(chunk), senders);
        if (!DIRECT) return;
        prefetch_tokens(arrays.q, t, count, senders);
        prefetch_tokens(arrays.k, t, count, senders);
    };

    Ahead now;
    const auto begin = [&](int chunk) {
        now.look(record_of(chunk), token, first_column + column);
        bring_first(chunk, 0);
    };
    begin(0);
    #pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        const int count = min(CHUNK, tokens - chunk * CHUNK);
        const long long t = (long long)chunk * CHUNK;
        finish_copies<0>();
        __syncthreads();  // the state and what reads it are there, and nobody is left at the last chunk
        bring_second(chunk, 0);
        memory.look(record_of(chunk));
        Gathered sum[2] = {};
        int good = min(int(now.good), count);
        if (reads()) {
            if (chunk + 2 < chunks) prefetch_chunk(chunk + 2);
            recall(sum, room.q, room, token, column);
            fade(sum, now);
        } else {
            recall(sum, room.w, room, token, column);
            good = learn(sum, now, room, token, column, good);
        }
        finish_copies<0>();
        const bool spoilt = __syncthreads_or(good < count);  // errors, scores and keys are there
        if (spoilt) {
            good = least_of_block(room, good);
            for (int i = good * VALUES + threadIdx.x; i < CHUNK * VALUES; i += THREADS)
                room.errors.set(i / VALUES, i % VALUES, 0);
            __syncthreads();  // no bad error is left
        }
        const bool more = chunk + 1 < chunks, done = groups == 1 && !spoilt;  // done: with what came first
        if (more && done) begin(chunk + 1);
        #pragma unroll 1
        for (int group = 0; group < groups; group++) {
            if (group) {
                __syncthreads();  // nobody is left at the last queries and scores
                bring_first(chunk, group);
                bring_second(chunk, group);
                finish_copies<0>();
                __syncthreads();  // these are there
                sum[0] = sum[1] = Gathered{};
                if (reads()) recall(sum, room.q, room, token, column), fade(sum, now);
            }
            if (!reads()) continue;
            weigh(sum, room, token, column);
            #pragma unroll
            for (int n = 0; n < 2; n++)
                write(sum[n].total(), arrays.o.of(group), t + token, first_column + column + 8 * n, good - token,
                      columns, scale);
        }
        if (!done) __syncthreads();  // nobody is left at the state and what reads it
        if (spoilt) {
            memory.each_number([&](int key, int j, float& x) { room.number(key, j) = x; });
            __syncthreads();  // all numbers are there
            walk(room, arrays, t, good, count, first_column, columns, groups, scale);
            memory.each_number([&](int key, int j, float& x) { x = room.number(key, j); });
            __syncthreads();  // nobody is left at the numbers
        }
        if (more && !done) begin(chunk + 1);
        if (!spoilt) memory.memorise(room);
        memory.lay_out(room);
    }
    memory.each_number([&](int key, int j, float& x) {
        if (real* const at = place_of(places[STATE_NEXT].of(S_next), key, first_column + j, columns)) *at = x;
    });
}
