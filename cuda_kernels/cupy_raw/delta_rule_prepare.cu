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
// Decays are powers of two of sums of gates that all have one sign, never of differences. With one gate per channel they
// are factors of the tokens of a product: of those behind, since their block of 16 began; of those before, to the end of
// theirs. Inside a block they are multiplied up pair by pair.
//
// Zero times NaN is NaN, so a product would carry a bad number into the past. A chunk of which not all is finite is made
// again of the most tokens of which it is, with zeros behind them; the walk takes the others one by one.

constexpr int THREADS = 64 * (BLOCKS > 2 ? BLOCKS : 2), WARPS = THREADS / 32;
constexpr int VALUES_AT_ONCE = 64;

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
    float *total, *whole, *before, *after;  // CHANNEL: decays of the chunk, of a block, of those before it, of those after
    float *gates, *from_start, *to_end;     // STEP: of each token; decays from the chunk's start to it, from it to the end
    float* beta;

    __device__ __forceinline__ Room() {
        raw_q = tile_of<Raw>(at), raw_p = raw_k = tile_of<Raw>(at);
        if (ERASE) raw_p = tile_of<Raw>(at);
        if constexpr (DIRECT) {
            q.term[0].begin = as_terms(raw_q.begin), k.term[0].begin = as_terms(raw_k.begin);
            p.term[0].begin = as_terms(raw_p.begin);
        } else {
            q = split_of<KEY_TERMS, CHUNK, KEYS>(at), p = k = split_of<KEY_TERMS, CHUNK, KEYS>(at);
            if (ERASE || GATE == CHANNEL) p = split_of<KEY_TERMS, CHUNK, KEYS>(at);
        }
        v = tile_of<Values>(at), inverse = tile_of<Square>(at);
        if (GATE == STEP) between = tile_of<Square>(at);
        if (GATE == CHANNEL) steps = tile_of<Channels>(at);
        float* number = reinterpret_cast<float*>(at);
        const auto numbers = [&](int count) { return (number += count) - count; };
        constexpr int channels = GATE == CHANNEL ? KEYS : 0, steps_of = GATE == STEP ? CHUNK : 0;
        total = numbers(GATE == STEP ? 4 : channels), whole = numbers(BLOCKS * channels);
        before = numbers(BLOCKS * channels), after = numbers(BLOCKS * channels);
        gates = numbers(steps_of), from_start = numbers(steps_of), to_end = numbers(steps_of), beta = numbers(CHUNK);
    }
    static __device__ __forceinline__ bfloat16* as_terms(void* x) { return static_cast<bfloat16*>(x); }
};

// ---- decays -----------------------------------------------------------------------------------------------------------

// One gate per step: a thread adds up from its token on, and writes some of the sums as decays; one of them from the start.
__device__ __forceinline__ void decay_by_steps(const Room& room) {
    #pragma unroll 1
    for (int item = threadIdx.x; item < BLOCKS * (CHUNK + 1); item += THREADS) {
        const int j = item % (CHUNK + 1) - 1, last = item / (CHUNK + 1) * 16 + 16;
        float sum = 0;
        #pragma unroll 1
        for (int i = j + 1; i < last; i++) {
            sum += room.gates[i];
            if (i >= last - 16) (j < 0 ? room.from_start[i] : room.between.at(i, j)) = exp2f(sum);
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

// Decays of all blocks before one, and after it.
__device__ __forceinline__ void decay_over_blocks(const Room& room) {
    #pragma unroll 1
    for (int channel = threadIdx.x; channel < KEYS; channel += THREADS) {
        float product = 1;
        for (int block = 0; block < BLOCKS; block++) {
            room.before[block * KEYS + channel] = product;
            product *= room.whole[block * KEYS + channel];
        }
        room.total[channel] = product;
        product = 1;
        for (int block = BLOCKS - 1; block >= 0; block--) {
            room.after[block * KEYS + channel] = product;
            product *= room.whole[block * KEYS + channel];
        }
    }
}

// ---- tokens as products take them -------------------------------------------------------------------------------------

// As terms; with one gate per channel decayed since their block began, or to the end of it.
template <bool TO_END>
__device__ __forceinline__ void spread(const Room& room, const Raw& from, const Tokens& to) {
    #pragma unroll 1
    for (int item = threadIdx.x; item < BLOCKS * KEYS; item += THREADS) {
        const int channel = item % KEYS, first = item / KEYS * 16;
        float decay = 1;
        #pragma unroll 4
        for (int n = 0; n < 16; n++) {
            const int i = first + (TO_END ? 15 - n : n);
            if (GATE == CHANNEL && !TO_END) decay *= room.steps.at(i, channel);
            to.set(i, channel, decay * widened(from.at(i, channel)));
            if (GATE == CHANNEL && TO_END) decay *= room.steps.at(i, channel);
        }
    }
}

// Numbers (token, key) and (token, key + 1) times the decays of their block, as terms again.
__device__ __forceinline__ void decayed_pair(unsigned (&pair)[KEY_TERMS][1], const Tokens& tokens, const float* decays,
                                             int token, int key) {
    float low = 0, high = 0;
    #pragma unroll
    for (int n = KEY_TERMS - 1; n >= 0; n--) {
        pair[n][0] = *reinterpret_cast<const unsigned*>(&tokens.term[n].at(token, key));
        low += low_of<bfloat16>(pair[n][0]), high += high_of<bfloat16>(pair[n][0]);
    }
    if (GATE != CHANNEL) return;
    const float* const decay = decays + token / 16 * KEYS + key;
    set_pair<bfloat16>(pair, 0, decay[0] * low, decay[1] * high);
}

// Tokens to rows without gaps in the record, or to where they are; decayed from the border of the block to the chunk's.
__device__ __forceinline__ void lead(const Tokens& tokens, const float* decays, bfloat16* to, int stride) {
    #pragma unroll 2
    for (int i = threadIdx.x; i < CHUNK * KEYS / 2; i += THREADS) {
        const int token = i / (KEYS / 2), key = i % (KEYS / 2) * 2;
        unsigned pair[KEY_TERMS][1];
        decayed_pair(pair, tokens, decays, token, key);
        #pragma unroll
        for (int n = 0; n < KEY_TERMS; n++)
            *reinterpret_cast<unsigned*>(to + (n * CHUNK + token) * stride + key) = pair[n][0];
    }
}

// ---- scores -----------------------------------------------------------------------------------------------------------

// A score of an erasing key, times the step; nothing on and above the diagonal.
__device__ __forceinline__ float erased(const Room& room, int query, int key, float x) {
    return key < query ? room.beta[query] * x : 0;
}

// All blocks on and below the diagonal; with one gate per channel those below it. `scores` is where those of queries
// belong; without it these are erasing keys.
__device__ __forceinline__ void score(const Room& room, const Tokens& asking, bfloat16* scores) {
    constexpr int before = GATE == CHANNEL;
    int task = (threadIdx.x / 32 + WARPS - 2) % WARPS;  // the first two warps invert blocks, so they come last
    #pragma unroll 1
    for (int row = BLOCKS - 1; row >= 0; row--)
        #pragma unroll 1
        for (int column = 0; column <= row - before; column++) {
            if (task--) continue;  // tasks go around
            task = WARPS - 1;
            Gathered gathered[2] = {};
            #pragma unroll 2
            for (int key = 0; key < KEYS; key += 16) {
                Left<bfloat16, KEY_TERMS> left;
                Right<bfloat16, KEY_TERMS> right[2];
                load_left(left, asking, 16 * row, key);
                load_right_transposed(right, room.k, 16 * column, key);
                if (GATE == CHANNEL && column + 1 < row)
                    change_left(left, [&](int, int j, float x) {
                        for (int block = column + 1; block < row; block++) x *= room.whole[block * KEYS + key + j];
                        return x;
                    });
                for (int n = 0; n < 2; n++) gathered[n].add(left, right[n]);
            }
            for (int n = 0; n < 2; n++) {
                Sum sum = gathered[n].total();
                each(sum, [&](int i, int j, float& x) {
                    const int query = 16 * row + i, key = 16 * column + 8 * n + j;
                    if (GATE == STEP) x *= key <= query ? room.between.at(query, key) : 0;
                    x = scores ? key <= query ? x : 0 : erased(room, query, key, x);
                });
                if (scores)
                    store_terms<SUM_TERMS>(sum, scores, CHUNK, CHUNK, 16 * row, 16 * column + 8 * n);
                else
                    store(sum, room.inverse, 16 * row, 16 * column + 8 * n);
            }
        }
}

// Blocks on the diagonal with one gate per channel. A warp has eight keys of a block: a lane walks down from one of them,
// with every fourth of the channels, four at a time.
__device__ __forceinline__ void score_in_blocks(const Room& room, const Raw& asking, bfloat16* scores) {
    const int lane = threadIdx.x % 32, part = lane / 8;
    #pragma unroll 1
    for (int task = threadIdx.x / 32; task < 2 * BLOCKS; task += WARPS) {
        const int first = task / 2 * 16, border = task % 2 * 8, j = border + lane % 8;
        float sums[16] = {};
        #pragma unroll 1
        for (int channel = 4 * part; channel < KEYS; channel += 16) {
            float key[4];  // at token i
            for (int n = 0; n < 4; n++) key[n] = widened(room.raw_k.at(first + j, channel + n));
            #pragma unroll
            for (int i = 0; i < 16; i++) {
                if (i < border) continue;
                #pragma unroll
                for (int n = 0; n < 4; n++) {
                    if (i > j) key[n] *= room.steps.at(first + i, channel + n);
                    sums[i] = fma(widened(asking.at(first + i, channel + n)), key[n], sums[i]);
                }
            }
        }
        #pragma unroll
        for (int i = 0; i < 16; i++) {
            for (int distance = 8; distance < 32; distance *= 2)
                sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
            if (i % 4 != part) continue;
            float x = i >= j ? sums[i] : 0;
            for (int n = 0; n < SUM_TERMS && scores; n++) {
                bfloat16& at = scores[(n * CHUNK + first + i) * CHUNK + first + j];
                put(at, x);
                x -= widened(at);
            }
            if (!scores) room.inverse.at(first + i, first + j) = erased(room, first + i, first + j, x);
        }
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
__device__ __forceinline__ void double_blocks(const Room& room) {
    const Square& tile = room.inverse;
    #pragma unroll 1
    for (int size = 1; size < BLOCKS; size *= 2)
        #pragma unroll 1
        for (int half = 0; half < 2; half++) {  // (what is between) (upper inverse), then -(lower inverse) (that)
            if (half || size > 1) __syncthreads();  // the last products are there, and nobody is left at their factors
            const int pieces = size * size, tasks = BLOCKS / (2 * size) * pieces;
            #pragma unroll 1
            for (int task = threadIdx.x / 32; task < tasks; task += WARPS) {
                const int upper = task / pieces * 32 * size, lower = upper + 16 * size;
                const int row = task % pieces / size * 16, column = task % size * 16;
                const int first = half ? 0 : column, last = half ? row : 16 * size - 16;  // all else is zero
                Sum sum[2] = {};
                #pragma unroll 1
                for (int i = first; i <= last; i += 16) {
                    Left<bfloat16, 3> left;
                    Right<bfloat16, 3> right[2];
                    load_left(left, tile, lower + row, (half ? lower : upper) + i, AsItIs());
                    load_right(right, tile, upper + i, (half ? lower : upper) + column, AsItIs());
                    for (int n = 0; n < 2; n++) multiply(sum[n], left, right[n]);
                }
                const int to_row = half ? lower : upper, to_column = half ? upper : lower;
                for (int n = 0; n < 2; n++)
                    each(sum[n], [&](int i, int j, float& x) {
                        tile.at(to_row + row + i, to_column + column + 8 * n + j) = half ? -x : x;
                    });
            }
        }
}

// 16 tokens of T beta x, for x of so many columns: a warp has every so-many-th 16 of them. scale(j) is of token j;
// right(x, j, column) loads 16 tokens of x; use(sum, column) takes 8 columns.
template <int TERMS, class Scale, class Load, class Use>
__device__ __forceinline__ void apply_inverse(const Room& room, int columns, Scale scale, Load load, Use use) {
    constexpr int shares = WARPS / BLOCKS;
    const int warp = threadIdx.x / 32, row = warp % BLOCKS;
    Left<bfloat16, SUM_TERMS> left[BLOCKS];
    #pragma unroll
    for (int from = 0; from < BLOCKS; from++)
        if (from <= row)
            load_left(left[from], room.inverse, 16 * row, 16 * from,
                      [&](int i, int j, float x) { return 16 * from + j > 16 * row + i ? 0 : x * scale(16 * from + j); });
    #pragma unroll 1
    for (int column = warp / BLOCKS * 16; column < columns; column += 16 * shares) {
        Gathered sum[2] = {};
        #pragma unroll
        for (int from = 0; from < BLOCKS; from++) {
            if (from > row) break;
            Right<bfloat16, TERMS> right[2];
            load(right, 16 * from, column);
            for (int n = 0; n < 2; n++) sum[n].add(left[from], right[n]);
        }
        for (int n = 0; n < 2; n++) use(sum[n].total(), 16 * row, column + 8 * n);
    }
}

// Values as terms.
__device__ __forceinline__ void load_values(Right<bfloat16, 1> (&right)[2], const Tile<bfloat16, CHUNK, VALUES_AT_ONCE>& v,
                                            int token, int column) {
    load_right(right, v, token, column);
}
template <int TERMS, class T>
__device__ __forceinline__ void load_values(Right<bfloat16, TERMS> (&right)[2], const Tile<T, CHUNK, VALUES_AT_ONCE>& v,
                                            int token, int column) {
    load_right(right, v, token, column, AsItIs());
}

// ---- a chunk ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
delta_rule_prepare(const data* q, const data* k, const data* v, const real* beta, const real* log_decay,
                   const data* erase_key, float* records, const long long* table, int axes, int tokens, int columns,
                   int groups, int blocks) {
    const Room room;
    const int which = blockIdx.x / blocks, t = blockIdx.x % blocks * CHUNK, count = min(CHUNK, tokens - t);
    const Record record(records, blockIdx.x, groups, columns);
    __shared__ Place places[8];
    find_places(places, table, axes, which);
    __syncthreads();  // places are known

    const auto bring = [&](const Raw& tile, const Rows<const data>& from, int some) {
        bring_rows<THREADS>(tile, from, t, some, K);
    };
    const auto bring_values = [&](int first, int some) {
        auto from = places[V].of(v);
        from.begin += first * from.column;
        bring_rows<THREADS>(room.v, from, t, some, columns - first);
        close_copies();
    };
    int known = 0, limit = count + 1, some = count;  // so many tokens are finite; so many are not; these are tried
    #pragma unroll 1
    while (true) {
        const auto gate = places[GATE_OF].of(log_decay);
        bring(room.raw_k, places[KEY].of(k), some);
        bring(room.raw_q, places[Q].of(q), some);
        if (ERASE) bring(room.raw_p, places[ERASE_OF].of(erase_key), some);
        if (GATE == CHANNEL) bring_rows<THREADS>(room.steps, gate, t, some, K);
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
            score_in_blocks(room, room.raw_p, nullptr);
            decay_over_blocks(room);
        }
        if constexpr (!DIRECT) {
            spread<true>(room, room.raw_k, room.k);
            if (ERASE || GATE == CHANNEL) spread<false>(room, room.raw_p, room.p);
            __syncthreads();  // keys are terms
        }
        score(room, room.p, nullptr);
        __syncthreads();  // all that is inverted is there
        #pragma unroll 1
        for (int group = 0; group < groups; group++) {
            if (group) {
                __syncthreads();  // nobody is left at the last queries
                bring(room.raw_q, places[Q].of(q).of(group), some);
                close_copies();
                finish_copies<0>();
                __syncthreads();  // these queries are there
            }
            if (GATE == CHANNEL) score_in_blocks(room, room.raw_q, record.scores(group));
            if constexpr (!DIRECT) {
                spread<false>(room, room.raw_q, room.q);
                __syncthreads();  // queries are terms
                lead(room.q, room.before, record.queries(group), KEYS);
            }
            score(room, room.q, record.scores(group));
        }
        invert_blocks(room);
        if constexpr (!DIRECT) lead(room.k, room.after, record.keys(), KEYS);
        if (GATE == CHANNEL) lead(room.p, room.before, room.p.term[0].begin, Tile<bfloat16, CHUNK, KEYS>::stride);
        double_blocks(room);
        __syncthreads();  // the inverse is there, and erasing keys lead to the border

        float poison = 0;  // or NaN, if anything is not finite
        const auto check = [&](const Sum& sum) {
            for (int i = 0; i < 4; i++) poison = fma(sum.x[i], 0.0f, poison);
        };
        apply_inverse<KEY_TERMS>(
            room, KEYS, [&](int j) { return room.beta[j] * (GATE == STEP ? room.from_start[j] : 1); },
            [&](Right<bfloat16, KEY_TERMS> (&right)[2], int token, int column) { load_right(right, room.p, token, column); },
            [&](const Sum& sum, int token, int column) {
                check(sum);
                store_terms<SUM_TERMS>(sum, record.recalls(), KEYS, CHUNK, token, column);
            });
        #pragma unroll 1
        for (int first = 0; first < columns; first += VALUES_AT_ONCE) {
            if (first) {
                __syncthreads();  // nobody is left at the last values
                bring_values(first, some);
                finish_copies<0>();
                __syncthreads();  // these values are there
            }
            const int left = record.wide - first;
            apply_inverse<DATA_TERMS>(
                room, left < VALUES_AT_ONCE ? left : VALUES_AT_ONCE, [&](int j) { return room.beta[j]; },
                [&](Right<bfloat16, DATA_TERMS> (&right)[2], int token, int column) {
                    load_values(right, room.v, token, column);
                },
                [&](Sum sum, int token, int column) {
                    check(sum);
                    each(sum, [&](int i, int j, float x) {
                        record.targets()[size_t(token + i) * record.wide + first + column + j] = x;
                    });
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
