// Delta rule, chunk by chunk, first launch: what the walk over chunks needs of each of them, all at the same time. With
// queries Q, keys K, keys that erase P, and T = (I + tril(beta P K^T, -1))^-1 it makes
//
//     W = T beta P,    U = T beta V,    M = tril(Q K^T),
//
// all decayed. A block has one chunk of one memory.
//
// The inverse is made by block doubling: blocks of 16 by substitution, then twice as many at a time from two blocks on
// the diagonal, -(lower inverse) (what is between) (upper inverse). No power of a matrix is ever formed.
//
// Decays are powers of two of sums of gates that all have one sign, never of differences. With one gate per channel
// they are factors of the tokens of a product: of those behind, since their block of 16 began; of those before, to the
// end of theirs. Inside a block they are multiplied up pair by pair.
//
// Zero times NaN is NaN, so a product would carry a bad number into the past. A chunk of which not all is finite is
// made again of the most tokens of which it is, with zeros behind them; the walk takes the others one by one.

// With one gate per channel a block has a multiprocessor for itself.
constexpr int BLOCKS = CHUNK / 16;
constexpr int THREADS = (GATE == CHANNEL ? 128 : 64) * (BLOCKS > 2 ? BLOCKS : 2), WARPS = THREADS / 32;
constexpr bool OWN_P = !DIRECT && (ERASE || GATE == CHANNEL);  // erasing keys are not the keys that are read
constexpr int VALUES_AT_ONCE = sizeof(data) == 2 && !(GATE == CHANNEL && ERASE) ? 128 : 64;

typedef Tile<data, CHUNK, KEYS> Raw;
typedef Tile<data, CHUNK, VALUES_AT_ONCE> Values;
typedef Tile<float, CHUNK, CHUNK> Square;
typedef Tile<float, CHUNK, KEYS> Channels;

// What a block keeps in shared memory.
struct Room {
    unsigned char* at = dynamic_shared();
    Raw raw_q, raw_k, raw_p;  // as they arrive
    Tokens q, k, p;           // as products take them
    Values v;
    Square inverse;     // first what is inverted
    Square between;     // STEP: decay from one token to another
    Channels steps;     // CHANNEL: decays of a token
    float *total, *whole, *before;  // CHANNEL: decays of the chunk, a block, those before it
    float* middle;                          // CHANNEL: of the two in the middle
    float *gates, *from_start, *to_end;     // STEP: of each token; decays from the chunk's start to it, and on to its end
    float* beta;

    __device__ __forceinline__ Room() {
        raw_q = tile_of<Raw>(at), raw_p = raw_k = tile_of<Raw>(at);
        if (ERASE) raw_p = tile_of<Raw>(at);
        if constexpr (DIRECT) {
            q.term[0].begin = as_terms(raw_q.begin), k.term[0].begin = as_terms(raw_k.begin);
            p.term[0].begin = as_terms(raw_p.begin);
        } else {
            q = split_of<KEY_TERMS, CHUNK, KEYS>(at), p = k = split_of<KEY_TERMS, CHUNK, KEYS>(at);
            if (OWN_P) p = split_of<KEY_TERMS, CHUNK, KEYS>(at);
        }
        v = tile_of<Values>(at), inverse = tile_of<Square>(at);
        if (GATE == STEP) between = tile_of<Square>(at);
        if (GATE == CHANNEL) steps = tile_of<Channels>(at);
        float* number = reinterpret_cast<float*>(at);
        const auto numbers = [&](int count) { return (number += count) - count; };
        constexpr int channels = GATE == CHANNEL ? KEYS : 0, steps_of = GATE == STEP ? CHUNK : 0;
        total = numbers(GATE == STEP ? 4 : channels), whole = numbers(BLOCKS * channels);
        before = numbers(BLOCKS * channels), middle = numbers(channels);
        gates = numbers(steps_of), from_start = numbers(steps_of), to_end = numbers(steps_of), beta = numbers(CHUNK);
    }
    static __device__ __forceinline__ bfloat16* as_terms(void* x) { return static_cast<bfloat16*>(x); }
};

// ---- decays -----------------------------------------------------------------------------------------------------------

// One gate per step: a thread adds up from its token on, and writes 16 of the sums as decays; some do so from the start.
__device__ __forceinline__ void decay_by_steps(const Room& room) {
    #pragma unroll 1
    for (int item = threadIdx.x; item < BLOCKS * (CHUNK + 1); item += THREADS) {
        const int j = item % (CHUNK + 1) - 1, last = item / (CHUNK + 1) * 16 + 16;
        float sum = 0;
        int i = j + 1;
        #pragma unroll 4
        for (; i < last - 16; i++) sum += room.gates[i];
        #pragma unroll 4
        for (; i < last; i++) {
            sum += room.gates[i];
            (j < 0 ? room.from_start[i] : room.between.at(i, j)) = exp2f(sum);
        }
        if (j >= last - 16 && j < last) room.between.at(j, j) = 1;
        if (last == CHUNK) (j < 0 ? room.total[0] : room.to_end[j]) = exp2f(sum);
    }
}

// One gate per channel: logs become decays of a token, and of a block.
__device__ __forceinline__ void decay_by_channels(const Room& room) {
    #pragma unroll 1
    for (int item = threadIdx.x; item < BLOCKS * KEYS; item += THREADS) {
        const int channel = item % KEYS, first = item / KEYS * 16;
        float product = 1;
        #pragma unroll 4
        for (int i = first; i < first + 16; i++) {
            const float step = exp2f(LOG2E * room.steps.at(i, channel));
            room.steps.at(i, channel) = step;
            product *= step;
        }
        room.whole[item] = product;
    }
}

// Threads in an order in which those come first that have made fewer scores inside blocks.
__device__ __forceinline__ int from_behind() { return THREADS - 1 - threadIdx.x; }

// Decays of all blocks before one; of the two in the middle.
__device__ __forceinline__ void decay_over_blocks(const Room& room) {
    #pragma unroll 1
    for (int channel = from_behind(); channel < KEYS; channel += THREADS) {
        float product = 1;
        for (int block = 0; block < BLOCKS; block++) {
            room.before[block * KEYS + channel] = product;
            product *= room.whole[block * KEYS + channel];
        }
        room.total[channel] = product;
        if (BLOCKS == 4) room.middle[channel] = room.whole[KEYS + channel] * room.whole[2 * KEYS + channel];
    }
}

// ---- tokens as products take them -------------------------------------------------------------------------------------

// A pair of numbers as terms, where a term has so many numbers.
__device__ __forceinline__ void put_pair(bfloat16* to, int numbers, float low, float high) {
    unsigned pair[KEY_TERMS][1];
    set_pair<bfloat16>(pair, 0, low, high);
    #pragma unroll
    for (int term = 0; term < KEY_TERMS; term++) *reinterpret_cast<unsigned*>(to + term * numbers) = pair[term][0];
}

// Decays of two channels over all blocks before one, or after it.
template <bool AFTER>
__device__ __forceinline__ Vector<float, 2> over_blocks(const Room& room, int block, int key) {
    Vector<float, 2> decay = {1, 1};
    #pragma unroll 1
    for (int other = AFTER ? BLOCKS - 1 : 0; other != block; other += AFTER ? -1 : 1) {
        const auto more = Vector<float, 2>::at(room.whole + other * KEYS + key);
        for (int side = 0; side < 2; side++) decay.x[side] *= more.x[side];
    }
    return decay;
}

// Two channels of a block as terms; with one gate per channel decayed since the block began, or to its end. A record,
// if there is one, has them in rows without gaps, decayed since the chunk began, or to its end.
template <bool TO_END>
__device__ __forceinline__ void spread(const Room& room, const Raw& from, const Tokens& to, bfloat16* record,
                                       int first, int key) {
    float decay[2] = {1, 1};
    Vector<float, 2> border = {1, 1};
    if (GATE == CHANNEL && record) border = over_blocks<TO_END>(room, first / 16, key);
    #pragma unroll 4
    for (int n = 0; n < 16; n++) {
        const int i = first + (TO_END ? 15 - n : n);
        const auto raw = two_of(&from.at(i, key));
        Vector<float, 2> step = {1, 1};
        if (GATE == CHANNEL) step = Vector<float, 2>::at(&room.steps.at(i, key));
        for (int side = 0; side < 2 && !TO_END; side++) decay[side] *= step.x[side];
        const float low = decay[0] * raw.x[0], high = decay[1] * raw.x[1];
        put_pair(&to.term[0].at(i, key), CHUNK * to.term[0].stride, low, high);
        if (record) put_pair(record + i * KEYS + key, CHUNK * KEYS, border.x[0] * low, border.x[1] * high);
        for (int side = 0; side < 2 && TO_END; side++) decay[side] *= step.x[side];
    }
}
// Of three kinds, which are keys, queries, and erasing keys.
__device__ __forceinline__ void spread(const Room& room, const Record& record, int group, int first_kind, int kinds) {
    constexpr int items = BLOCKS * KEYS / 2;
    #pragma unroll 1
    for (int item = first_kind * items + from_behind(); item < kinds * items; item += THREADS) {
        const int first = item % items / (KEYS / 2) * 16, key = item % (KEYS / 2) * 2;
        if (item < items)
            spread<true>(room, room.raw_k, room.k, record.keys(), first, key);
        else if (item < 2 * items)
            spread<false>(room, room.raw_q, room.q, record.queries(group), first, key);
        else
            spread<false>(room, room.raw_p, room.p, nullptr, first, key);
    }
}

// Erasing keys decayed since the chunk began, instead of the block.
__device__ __forceinline__ void lead(const Room& room) {
    typedef Vector<unsigned, 4> Eight;
    #pragma unroll 1
    for (int i = threadIdx.x; i < CHUNK * KEYS / 8; i += THREADS) {
        const int token = i / (KEYS / 8), key = i % (KEYS / 8) * 8;
        const auto at = [&](int n) { return reinterpret_cast<Eight*>(&room.p.term[n].at(token, key)); };
        Eight terms[KEY_TERMS];
        #pragma unroll
        for (int n = 0; n < KEY_TERMS; n++) terms[n] = *at(n);
        const float* const decay = room.before + token / 16 * KEYS + key;
        #pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            float low = 0, high = 0;
            #pragma unroll
            for (int n = KEY_TERMS - 1; n >= 0; n--)
                low += low_of<bfloat16>(terms[n].x[pair]), high += high_of<bfloat16>(terms[n].x[pair]);
            const auto two = Vector<float, 2>::at(decay + 2 * pair);
            unsigned both[KEY_TERMS][1];
            set_pair<bfloat16>(both, 0, two.x[0] * low, two.x[1] * high);
            #pragma unroll
            for (int n = 0; n < KEY_TERMS; n++) terms[n].x[pair] = both[n][0];
        }
        #pragma unroll
        for (int n = 0; n < KEY_TERMS; n++) *at(n) = terms[n];
    }
}

// ---- scores -----------------------------------------------------------------------------------------------------------

// Scores of 16 x 8 tokens where they belong: of erasing keys, times the step, into what is inverted, or of queries.
__device__ __forceinline__ void keep_scores(const Room& room, Sum sum, bfloat16* scores, int query, int key) {
    each(sum, [&](int i, int j, float& x) {
        const int behind = query + i - key - j;  // so many tokens
        if (GATE == STEP) x *= behind < 0 ? 0 : room.between.at(query + i, key + j);
        if (!scores) x *= room.beta[query + i];
        if (behind < !scores) x = 0;
    });
    if (scores)
        store_terms<SUM_TERMS>(sum, scores, CHUNK, CHUNK, query, key);
    else
        store(sum, room.inverse, query, key);
}

// All blocks on and below the diagonal; with one gate per channel those below it.
__device__ __forceinline__ void score(const Room& room, const Tokens& asking, bfloat16* scores) {
    constexpr int before = GATE == CHANNEL;
    int task = (threadIdx.x / 32 + WARPS - 2) % WARPS;  // the first two warps invert blocks, so they come last
    #pragma unroll 1
    for (int row = BLOCKS - 1; row >= 0; row--)
        #pragma unroll 1
        for (int column = 0; column <= row - before; column++) {
            if (task--) continue;  // tasks go around
            task = WARPS - 1;
            const float* const between = row - column == 2 ? room.whole + (column + 1) * KEYS : room.middle;
            Gathered gathered[2] = {};
            #pragma unroll 2
            for (int key = 0; key < KEYS; key += 16) {
                Left<bfloat16, KEY_TERMS> left;
                Right<bfloat16, KEY_TERMS> right[2];
                load_left(left, asking, 16 * row, key);
                load_right_transposed(right, room.k, 16 * column, key);
                if (GATE == CHANNEL && row - column > 1)
                    change_left(left, [&](int, int j, float x) { return x * between[key + j]; });
                #pragma unroll
                for (int n = 0; n < 2; n++) gathered[n].add(left, right[n]);
            }
            for (int n = 0; n < 2; n++)
                keep_scores(room, gathered[n].total(), scores, 16 * row, 16 * column + 8 * n);
        }
}

// Of sums of 16 rows, of which the eight lanes of a key have a part each, lane `part` keeps rows 2 part and 2 part + 1.
template <int ROWS = 8>
__device__ __forceinline__ void sum_of_parts(float (&x)[16]) {
    const bool upper = threadIdx.x & (2 * ROWS);
    #pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float given = upper ? x[i] : x[i + ROWS];
        x[i] = (upper ? x[i + ROWS] : x[i]) + __shfl_xor_sync(0xffffffffu, given, 2 * ROWS);
    }
    if constexpr (ROWS > 2) sum_of_parts<ROWS / 2>(x);
}

// Nothing above the first of four keys of a block.
__device__ __forceinline__ void clear_above(const Room& room, int first, int border, bool erasing, bfloat16* scores) {
    for (int item = threadIdx.x % 32; item < 4 * border; item += 32) {
        const int query = first + item / 4, key = first + border + item % 4;
        if (erasing) room.inverse.at(query, key) = 0;
        for (int n = 0; n < SUM_TERMS; n++) put(scores[(n * CHUNK + query) * CHUNK + key], 0);
    }
}

// Blocks on the diagonal with one gate per channel, of queries and perhaps of erasing keys. A warp has four keys of a
// block: a lane walks down from one of them, with every eighth of the channels, four at a time.
template <bool ERASING>
__device__ __forceinline__ void score_in_blocks(const Room& room, bfloat16* scores) {
    const int own = threadIdx.x % 4, part = threadIdx.x % 32 / 4;
    #pragma unroll 1
    for (int task = threadIdx.x / 32; task < 4 * BLOCKS; task += WARPS) {
        const int border = task / BLOCKS * 4, first = task % BLOCKS * 16 + border, j = first + own;
        float read[16] = {}, erased[16] = {};
        #pragma unroll 1
        for (int channel = 4 * part; channel < KEYS; channel += 32) {
            Vector<float, 4> key = four_of(&room.raw_k.at(j, channel));  // at token i
            #pragma unroll
            for (int i = 0; i < 16; i++) {
                if (border + i / 4 * 4 >= 16) continue;
                const auto step = Vector<float, 4>::at(&room.steps.at(first + i, channel));
                const auto query = four_of(&room.raw_q.at(first + i, channel));
                const auto eraser = four_of(&(ERASING ? room.raw_p : room.raw_q).at(first + i, channel));
                if (i > own) {
                    #pragma unroll
                    for (int n = 0; n < 4; n++) key.x[n] *= step.x[n];
                }
                #pragma unroll
                for (int n = 0; n < 4; n++) {
                    read[i] = fma(query.x[n], key.x[n], read[i]);
                    if (ERASING) erased[i] = fma(eraser.x[n], key.x[n], erased[i]);
                }
            }
        }
        sum_of_parts(read);
        if (ERASING) sum_of_parts(erased);
        #pragma unroll
        for (int n = 0; n < 2; n++) {
            const int i = 2 * part + n;
            if (border + i >= 16) continue;
            if (ERASING) room.inverse.at(first + i, j) = i > own ? room.beta[first + i] * erased[n] : 0;
            unsigned terms[SUM_TERMS][1];
            set_pair<bfloat16>(terms, 0, i >= own ? read[n] : 0, 0);
            for (int term = 0; term < SUM_TERMS; term++)
                scores[(term * CHUNK + first + i) * CHUNK + j].bits = (unsigned short)(terms[term][0] & 0xffff);
        }
        clear_above(room, task % BLOCKS * 16, border, ERASING, scores);
    }
}

// ---- the inverse ------------------------------------------------------------------------------------------------------

// Blocks of 16 on the diagonal: a thread solves for one column of one of them.
__device__ __forceinline__ void invert_blocks(const Room& room) {
    const int first = int(threadIdx.x) / 16 * 16, column = threadIdx.x % 16;
    if (first / 32 * 32 >= CHUNK) return;
    const bool mine = first < CHUNK;
    float x[16];
    #pragma unroll
    for (int i = 0; i < 16; i++) {
        x[i] = i == column;
        #pragma unroll
        for (int j = 0; j < i; j++)
            if (mine) x[i] = fma(-room.inverse.at(first + i, first + j), x[j], x[i]);
    }
    __syncwarp();  // all of a block has been read before its inverse takes its place
    #pragma unroll
    for (int i = 0; i < 16; i++)
        if (mine) room.inverse.at(first + i, first + column) = x[i];
    __syncwarp();  // the warp goes on with these two blocks
}

// From inverses of blocks to those of blocks twice as large; above the diagonal is room for what is in between.
template <int SIZE>
__device__ __forceinline__ void double_blocks(const Room& room) {
    if constexpr (SIZE < BLOCKS) {
        const Square& tile = room.inverse;
        constexpr int pieces = SIZE * SIZE, tasks = BLOCKS / (2 * SIZE) * pieces;
        #pragma unroll
        for (int half = 0; half < 2; half++) {  // (what is between) (upper inverse), then -(lower inverse) (that)
            if (half || SIZE > 1) __syncthreads();  // the last products are there, and nobody is left at their factors
            #pragma unroll 1
            for (int task = threadIdx.x / 32; task < tasks; task += WARPS) {
                const int upper = task / pieces * 32 * SIZE, lower = upper + 16 * SIZE;
                const int row = task % pieces / SIZE * 16, column = task % SIZE * 16;
                const int first = half ? 0 : column, last = half ? row : 16 * SIZE - 16;  // all else is zero
                Gathered sum[2] = {};
                #pragma unroll 1
                for (int i = first; i <= last; i += 16) {
                    Left<bfloat16, SUM_TERMS> left;
                    Right<bfloat16, SUM_TERMS> right[2];
                    load_left(left, tile, lower + row, (half ? lower : upper) + i, AsItIs());
                    load_right(right, tile, upper + i, (half ? lower : upper) + column, AsItIs());
                    #pragma unroll
                    for (int n = 0; n < 2; n++) sum[n].add(left, right[n]);
                }
                const int to_row = half ? lower : upper, to_column = half ? upper : lower;
                #pragma unroll
                for (int n = 0; n < 2; n++) {
                    Sum product = sum[n].total();
                    each(product, [&](int, int, float& x) { x = half ? -x : x; });
                    store(product, tile, to_row + row, to_column + column + 8 * n);
                }
            }
        }
        double_blocks<2 * SIZE>(room);
    }
}

// 16 rows of T with its columns scaled, as a warp multiplies them.
struct Inverse {
    static constexpr int shares = WARPS / BLOCKS;
    Left<bfloat16, SUM_TERMS> left[BLOCKS];
    int row, share;

    template <class Scale>
    __device__ __forceinline__ Inverse(const Room& room, Scale scale)  // scale(token)
        : row(threadIdx.x / 32 % BLOCKS), share(threadIdx.x / 32 / BLOCKS) {
        if (share % 2) row = BLOCKS - 1 - row;  // low rows are short: a scheduler has long ones too
        #pragma unroll
        for (int from = 0; from < BLOCKS; from++)
            if (from <= row)
                load_left(left[from], room.inverse, 16 * row, 16 * from, [&](int i, int j, float x) {
                    return 16 * from + j > 16 * row + i ? 0 : x * scale(16 * from + j);
                });
    }
    // T x, for x of so many columns, 16 of them at a time: load(right, token, column) brings 16 tokens of x, and
    // use(sum, token, column) takes 8 columns.
    template <int TERMS, class Load, class Use>
    __device__ __forceinline__ void apply(int columns, Load load, Use use) const {
        #pragma unroll 1
        for (int column = 16 * share; column < columns; column += 16 * shares) {
            Gathered sum[2] = {};
            constexpr int together = TERMS == 1 ? BLOCKS : BLOCKS > 1 ? 2 : 1;  // on their way to registers
            #pragma unroll
            for (int first = 0; first < BLOCKS; first += together) {
                Right<bfloat16, TERMS> right[together][2];
                #pragma unroll
                for (int i = 0; i < together; i++)
                    if (first + i <= row) load(right[i], 16 * (first + i), column);
                #pragma unroll
                for (int i = 0; i < together; i++)
                    for (int n = 0; n < 2 && first + i <= row; n++) sum[n].add(left[first + i], right[i][n]);
            }
            for (int n = 0; n < 2; n++) use(sum[n].total(), 16 * row, column + 8 * n);
        }
    }
};

// Values as terms.
__device__ __forceinline__ void load_values(Right<bfloat16, 1> (&right)[2],
                                            const Tile<bfloat16, CHUNK, VALUES_AT_ONCE>& v, int token, int column) {
    load_right(right, v, token, column);
}
template <int TERMS, class T>
__device__ __forceinline__ void load_values(Right<bfloat16, TERMS> (&right)[2], const Tile<T, CHUNK, VALUES_AT_ONCE>& v,
                                            int token, int column) {
    load_right(right, v, token, column, AsItIs());
}

// ---- a chunk ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, GATE == CHANNEL ? 1 : 2)
delta_rule_prepare(const data* q, const data* k, const data* v, const real* beta, const real* log_decay,
                   const data* erase_key, float* records, const long long* table, int axes, int tokens, int columns,
                   int groups, int blocks) {
    const Room room;
    const int which = blockIdx.x / blocks, t = blockIdx.x % blocks * CHUNK, count = min(CHUNK, tokens - t);
    const Record record(records, blockIdx.x, groups, columns);
    __shared__ Place places[ARRAYS];
    find_places(places, table, axes, which);
    __syncthreads();  // places are known

    const auto bring = [&](const Raw& tile, const Rows<const data>& from, int some) {
        bring_rows<THREADS>(tile, from, t, some, K, threadIdx.x);
    };
    const auto bring_values = [&](int first, int some) {
        auto from = places[V].of(v);
        from.begin += first * from.column;
        bring_rows<THREADS>(room.v, from, t, some, columns - first, threadIdx.x);
        close_copies();
    };
    int known = 0, limit = count + 1, some = count;  // so many tokens are finite; so many are not; these are tried
    #pragma unroll 1
    while (true) {
        const auto gate = places[GATE_OF].of(log_decay);
        bring(room.raw_k, places[KEY].of(k), some);
        bring(room.raw_q, places[Q].of(q), some);
        if (ERASE) bring(room.raw_p, places[ERASE_OF].of(erase_key), some);
        if (GATE == CHANNEL) bring_rows<THREADS>(room.steps, gate, t, some, K, threadIdx.x);
        bring_values(0, some);
        for (int i = threadIdx.x; i < CHUNK; i += THREADS) {
            room.beta[i] = i < some ? places[BETA].of(beta).at(t + i, 0) : 0;
            if (GATE == STEP) room.gates[i] = i < some ? LOG2E * gate.at(t + i, 0) : 0;
        }
        finish_copies<0>();
        __syncthreads();  // tokens, gates and values are there
        if (GATE == STEP) decay_by_steps(room);
        if (GATE == CHANNEL) decay_by_channels(room);
        if (GATE) __syncthreads();  // decays are there
        if (GATE == CHANNEL) {
            score_in_blocks<true>(room, record.scores(0));
            decay_over_blocks(room);
        }
        if constexpr (!DIRECT) {
            spread(room, record, 0, 0, 2 + OWN_P);
            __syncthreads();  // tokens are terms
        }
        score(room, room.p, nullptr);
        __syncthreads();  // all that is inverted is there
        #pragma unroll 1
        for (int group = 0; group < groups; group++) {
            if (GROUPED && group) {
                __syncthreads();  // nobody is left at the last queries
                bring(room.raw_q, places[Q].of(q).of(group), some);
                close_copies();
                finish_copies<0>();
                __syncthreads();  // these queries are there
                if (GATE == CHANNEL) score_in_blocks<false>(room, record.scores(group));
                if constexpr (!DIRECT) {
                    spread(room, record, group, 1, 2);
                    __syncthreads();  // these are terms
                }
            }
            score(room, room.q, record.scores(group));
        }
        invert_blocks(room);
        if (GATE == CHANNEL) lead(room);
        double_blocks<1>(room);
        __syncthreads();  // the inverse is there, and erasing keys lead to the border

        float poison = 0;  // or NaN, if anything is not finite
        const auto check = [&](const Sum& sum) {
            for (int i = 0; i < 4; i++) poison = fma(sum.x[i], 0.0f, poison);
        };
        const auto prepare_recalls = [&](const Inverse& inverse) {
            inverse.apply<KEY_TERMS>(
                KEYS,
                [&](Right<bfloat16, KEY_TERMS> (&right)[2], int token, int column) {
                    load_right(right, room.p, token, column);
                },
                [&](const Sum& sum, int token, int column) {
                    check(sum);
                    store_terms<SUM_TERMS>(sum, record.recalls(), KEYS, CHUNK, token, column);
                });
        };
        if (GATE == STEP) prepare_recalls(Inverse(room, [&](int j) { return room.beta[j] * room.from_start[j]; }));
        const Inverse inverse(room, [&](int j) { return room.beta[j]; });
        if (GATE != STEP) prepare_recalls(inverse);
        #pragma unroll 1
        for (int first = 0; first < columns; first += VALUES_AT_ONCE) {
            if (first) {
                __syncthreads();  // nobody is left at the last values
                bring_values(first, some);
                finish_copies<0>();
                __syncthreads();  // these values are there
            }
            const int left = record.wide - first;
            inverse.apply<DATA_TERMS>(
                left < VALUES_AT_ONCE ? left : VALUES_AT_ONCE,
                [&](Right<bfloat16, DATA_TERMS> (&right)[2], int token, int column) {
                    load_values(right, room.v, token, column);
                },
                [&](const Sum& sum, int token, int column) {
                    check(sum);
                    float* to = record.targets() + (token + threadIdx.x % 32 / 4) * record.wide + first + column;
                    to += threadIdx.x % 4 * 2;
                    for (int half = 0; half < 2; half++, to += 8 * record.wide)
                        *reinterpret_cast<Vector<float, 2>*>(to) = {sum.x[2 * half], sum.x[2 * half + 1]};
                });
        }
        const bool spoilt = __syncthreads_or(poison != 0) && some;  // nobody is left at this chunk
        (spoilt ? limit : known) = some;
        if (!spoilt && limit - known == 1) break;
        some = limit - known > 1 ? (known + limit) / 2 : known;
    }
    for (int i = threadIdx.x; i < max(CHUNK, KEYS); i += THREADS) {
        if (GATE == STEP && i < CHUNK) record.from_start()[i] = room.from_start[i], record.to_end()[i] = room.to_end[i];
        if (GATE && i < (GATE == STEP ? 1 : KEYS)) record.total()[i] = room.total[i];
    }
    if (threadIdx.x == 0) *record.good() = float(known);
}
