// Delta rule, chunk by chunk:  E = (I + tril(beta P K^T, -1))^-1 beta (V - P S),  o = Q S + tril(Q K^T) E,
// S = S + K^T E, with every product decayed; P are the keys that erase.
//
// A block has one memory and some of its value columns, and walks over the sequence. Warp w owns 16 of the columns: its
// part of the state, transposed, stays in the registers of its lanes as Sums of 16 columns x 8 keys, and is laid out in
// shared memory for the products that read it, as are the errors of a chunk. What all columns share lies there too: the
// tokens, the scores, and the inverse. What is computed is kept in SUM_TERMS bfloat16, the inverse in three, never in one.
//
// The inverse is made by block doubling: blocks of 16 by substitution, then twice as many at a time from two blocks on
// the diagonal, -(lower inverse) (what is between) (upper inverse). No power of a matrix is ever formed.
//
// Decays are powers of two of sums of gates that all have one sign, never of differences. With one gate per channel they
// are factors of the tokens of a product: of those behind, since their block of 16 began; of those before, to the end of
// theirs. Inside a block they are multiplied up pair by pair.
//
// Zero times NaN is NaN, so a product would carry a bad number into the past. A chunk whose answers are not finite is
// taken again: first the most tokens whose answers are, with zeros behind them, then one token after the other.

enum { Q, KEY, V, BETA, GATE_OF, ERASE_OF, STATE, O };

enum { NO_GATE, STEP, CHANNEL };

constexpr int BLOCKS = CHUNK / 16, WARPS = VALUES / 16, THREADS = 32 * WARPS;
constexpr bool DIRECT = DATA_TERMS == 1 && GATE != CHANNEL;  // products read the data as they are
constexpr int KEY_TERMS = GATE == CHANNEL ? SUM_TERMS : DATA_TERMS;
constexpr float LOG2E = 1.44269504f;

typedef Tile<data, CHUNK, KEYS> Tokens;
typedef Tile<data, CHUNK, VALUES> Values;
typedef Tile<float, CHUNK, CHUNK> Square;
typedef Tile<float, CHUNK, KEYS> Channels;
typedef Split<SUM_TERMS, VALUES, KEYS> States;
typedef Split<SUM_TERMS, VALUES, CHUNK> Errors;
typedef Tile<float, VALUES, KEYS> Numbers;  // of a state on its way, in the place of its terms
static_assert(GATE != CHANNEL || BLOCKS <= 2, "no block lies between two others");

// The places where tiles arrive, in turn.
template <class TileType>
struct Arrivals {
    TileType first;

    __device__ __forceinline__ Arrivals(unsigned char*& at, bool needed) : first{} {
        if (needed) first = tile_of<TileType>(at);
        if (needed && STAGES == 2) tile_of<TileType>(at);
    }
    __device__ __forceinline__ TileType operator[](int stage) const {
        return {first.begin + stage * TileType::rows * TileType::stride};
    }
};

// What a block keeps in shared memory.
struct Room {
    unsigned char* at = dynamic_shared();
    Arrivals<Tokens> q{at, true}, k{at, true}, p{at, ERASE};  // side by side, as `bring_tokens` takes them
    Arrivals<Values> v{at, true};  // then the answers
    States state;                  // the memory before the chunk
    Errors errors;                 // first what is to be learnt and is not recalled
    Square inverse, scores;        // inverse: first what is inverted
    Square between;                // STEP: decay from one token to another
    Channels steps, since, rest;   // CHANNEL: decays of a token; since its block began; from it to the end of its block
    float *beta, *gates, *from_start, *to_end;  // of each token; decays from the chunk's start to it, from it to the end
    float *whole, *total;                       // CHANNEL: decays of each block; of the chunk
    float* verdicts;                            // of each warp

    __device__ __forceinline__ Room() {
        state = split_of<SUM_TERMS, VALUES, KEYS>(at), errors = split_of<SUM_TERMS, VALUES, CHUNK>(at);
        inverse = tile_of<Square>(at), scores = tile_of<Square>(at);
        if (GATE == STEP) between = tile_of<Square>(at);
        if (GATE == CHANNEL) steps = tile_of<Channels>(at), since = tile_of<Channels>(at), rest = tile_of<Channels>(at);
        float* number = reinterpret_cast<float*>(at);
        const auto numbers = [&](int count) { return (number += count) - count; };
        beta = numbers(CHUNK), gates = numbers(CHUNK), from_start = numbers(CHUNK), to_end = numbers(CHUNK);
        whole = numbers(BLOCKS * KEYS), total = numbers(KEYS), verdicts = numbers(WARPS);
    }
};

// Where the sequence of a block lies. In shared memory, because registers are for the state.
struct Places {
    Rows<const data> tokens[3], v;  // queries, keys, and keys that erase
    Rows<const real> beta, gate;
    Rows<data> o;
    bool wide[3], wide_v, wide_gate;  // rows can be copied in vectors
};

__device__ __forceinline__ bool bad(float x) { return x - x != 0; }

// Tokens as the right matrix of a product, [key][token] or (below) [token][key]: as they are, or decayed.
template <bool AS_THEY_ARE, int TERMS, class TileType, class Decay>
__device__ __forceinline__ void tokens_as_columns(Right<bfloat16, TERMS> (&right)[2], const TileType& tile, int token,
                                                  int key, Decay decay) {
    if constexpr (AS_THEY_ARE)
        load_right_transposed(right, tile, token, key);
    else
        load_right_transposed(right, tile, token, key,
                              [&](int i, int j, float x) { return x * decay(token + j, key + i); });
}
template <bool AS_THEY_ARE, int TERMS, class TileType, class Decay>
__device__ __forceinline__ void tokens_as_rows(Right<bfloat16, TERMS> (&right)[2], const TileType& tile, int token,
                                               int key, Decay decay) {
    if constexpr (AS_THEY_ARE)
        load_right(right, tile, token, key);
    else
        load_right(right, tile, token, key, [&](int i, int j, float x) { return x * decay(token + i, key + j); });
}
template <bool AS_THEY_ARE, int TERMS, class TileType, class Decay>
__device__ __forceinline__ void tokens_on_the_left(Left<bfloat16, TERMS>& left, const TileType& tile, int token,
                                                   int key, Decay decay) {
    if constexpr (AS_THEY_ARE)
        load_left(left, tile, token, key);
    else
        load_left(left, tile, token, key, [&](int i, int j, float x) { return x * decay(token + i, key + j); });
}

// ---- decays -----------------------------------------------------------------------------------------------------------

// One gate per step: a thread walks from its token to the end of the chunk; one of them walks from the start.
__device__ __forceinline__ void decay_by_steps(const Room& room) {
    #pragma unroll 1
    for (int j = int(threadIdx.x) - 1; j < CHUNK; j += THREADS) {
        float sum = 0, left = 1;
        if (j >= 0) room.between.at(j, j) = 1;
        #pragma unroll 1
        for (int i = j + 1; i < CHUNK; i++) {
            sum += room.gates[i];
            left = exp2f(sum);
            (j < 0 ? room.from_start[i] : room.between.at(i, j)) = left;
        }
        (j < 0 ? room.total[0] : room.to_end[j]) = left;
    }
}

// One gate per channel: logs become decays of a token, of its block until it, and of its block after it.
__device__ __forceinline__ void decay_by_channels(const Room& room) {
    #pragma unroll 1
    for (int item = threadIdx.x; item < BLOCKS * KEYS; item += THREADS) {
        const int channel = item % KEYS, first = item / KEYS * 16;
        float since = 1, rest = 1;
        #pragma unroll 1
        for (int i = first; i < first + 16; i++) {
            const float step = exp2f(LOG2E * room.steps.at(i, channel));
            room.steps.at(i, channel) = step;
            room.since.at(i, channel) = since *= step;
        }
        #pragma unroll 1
        for (int i = first + 15; i >= first; i--) {
            room.rest.at(i, channel) = rest;
            rest *= room.steps.at(i, channel);
        }
        room.whole[item] = since;
    }
}

// What a product with the state takes of a token's channel: since the chunk began, and to its end.
struct Since {
    const Room& room;
    __device__ __forceinline__ float operator()(int token, int channel) const {
        if (GATE != CHANNEL) return 1;
        return room.since.at(token, channel) * (token < 16 ? 1 : room.whole[channel]);
    }
};
struct Rest {
    const Room& room;
    __device__ __forceinline__ float operator()(int token, int channel) const {
        if (GATE != CHANNEL) return 1;
        return room.rest.at(token, channel) * (token < CHUNK - 16 ? room.whole[KEYS + channel] : 1);
    }
};

// ---- scores and the inverse -------------------------------------------------------------------------------------------

// A score of a query and a key, where it belongs: of erasing keys (into what is inverted) or of queries.
__device__ __forceinline__ void keep_score(const Room& room, bool erases, int query, int key, int count, float x) {
    const float decay = GATE == STEP && key <= query ? room.between.at(query, key) : 1;
    if (erases)
        room.inverse.at(query, key) = key < query && query < count ? room.beta[query] * (x * decay) : 0;
    else
        room.scores.at(query, key) = key <= query && query < count ? x * decay : 0;
}

// All blocks on and below the diagonal; with one gate per channel those below it.
__device__ __forceinline__ void score(const Room& room, const Tokens& q, const Tokens& k, bool erases, int count) {
    constexpr int before = GATE == CHANNEL;
    int task = threadIdx.x / 32;
    #pragma unroll 1
    for (int row = 0; row < BLOCKS; row++)
        #pragma unroll 1
        for (int column = 0; column <= row - before; column++) {
            if (task--) continue;  // tasks go around
            task = WARPS - 1;
            const auto since = [&](int token, int key) { return GATE == CHANNEL ? room.since.at(token, key) : 1; };
            const auto rest = [&](int token, int key) { return GATE == CHANNEL ? room.rest.at(token, key) : 1; };
            Sum sum[2] = {};
            #pragma unroll 1
            for (int key = 0; key < KEYS; key += 16) {
                Left<bfloat16, KEY_TERMS> left;
                Right<bfloat16, KEY_TERMS> right[2];
                tokens_on_the_left<DIRECT>(left, q, 16 * row, key, since);
                tokens_as_columns<DIRECT>(right, k, 16 * column, key, rest);
                for (int n = 0; n < 2; n++) multiply(sum[n], left, right[n]);
            }
            for (int n = 0; n < 2; n++)
                each(sum[n], [&](int i, int j, float& x) {
                    keep_score(room, erases, 16 * row + i, 16 * column + 8 * n + j, count, x);
                });
        }
}

// Blocks on the diagonal with one gate per channel: eight lanes walk down a column, each with some of the channels.
__device__ __forceinline__ void score_in_blocks(const Room& room, const Tokens& q, const Tokens& k, bool erases,
                                                int count) {
    const int lane = threadIdx.x % 32, part = lane % 8;
    #pragma unroll 1
    for (int task = threadIdx.x / 32; task < 4 * BLOCKS; task += WARPS) {
        const int first = task / 4 * 16, j = task % 4 * 4 + lane / 8;
        float sums[16] = {};
        #pragma unroll 1
        for (int channel = part; channel < KEYS; channel += 8) {
            const float key = widened(k.at(first + j, channel));
            float left = 0;  // of the key, at token i
            #pragma unroll
            for (int i = 0; i < 16; i++) {
                left = i > j ? left * room.steps.at(first + i, channel) : i == j ? key : 0;
                if (i >= j) sums[i] = fma(widened(q.at(first + i, channel)), left, sums[i]);
            }
        }
        #pragma unroll
        for (int i = 0; i < 16; i++) {
            for (int distance = 1; distance < 8; distance *= 2)
                sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
            if (i % 8 == part) keep_score(room, erases, first + i, first + j, count, sums[i]);
        }
    }
}

// Blocks of 16 on the diagonal: a thread solves for one column of one of them.
__device__ __forceinline__ void invert_blocks(const Room& room) {
    const int first = int(threadIdx.x) / 16 * 16, column = threadIdx.x % 16;
    const bool mine = first < CHUNK;
    static_assert(16 * BLOCKS <= THREADS, "a thread has one column at most");
    float x[16];
    #pragma unroll
    for (int i = 0; i < 16; i++) {
        x[i] = i == column;
        #pragma unroll
        for (int j = 0; j < i; j++)
            if (mine) x[i] = fma(-room.inverse.at(first + i, first + j), x[j], x[i]);
    }
    __syncthreads();  // all of a block has been read before its inverse takes its place
    #pragma unroll
    for (int i = 0; i < 16; i++)
        if (mine) room.inverse.at(first + i, first + column) = x[i];
}

// From inverses of blocks to those of blocks twice as large; above the diagonal is room for what is in between.
__device__ __forceinline__ void double_blocks(const Room& room) {
    const Square& tile = room.inverse;
    #pragma unroll 1
    for (int size = 1; size < BLOCKS; size *= 2)
        #pragma unroll 1
        for (int half = 0; half < 2; half++) {  // (what is between) (upper inverse), then -(lower inverse) (that)
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
            __syncthreads();  // the products are there, and what they were made of may be written over
        }
}

// ---- what a warp does with its columns --------------------------------------------------------------------------------

// Numbers of 16 x 8 into a split tile, two at a time.
template <int TERMS, int R, int C>
__device__ __forceinline__ void store_pairs(const Sum& sum, const Split<TERMS, R, C>& split, int row, int column) {
    const int lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        unsigned both[TERMS][1];
        set_pair<bfloat16>(both, 0, sum.x[2 * half], sum.x[2 * half + 1]);
        for (int n = 0; n < TERMS; n++)
            *reinterpret_cast<unsigned*>(&split.term[n].at(row + line + 8 * half, column + pair)) = both[n][0];
    }
}

// 16 columns of the state, transposed.
struct Memory {
    Sum part[KEYS / 8];

    template <class Use>
    __device__ __forceinline__ void each_number(Use use) {  // use(key, column of the warp, x)
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            each(part[n], [&](int column, int key, float& x) { use(8 * n + key, column, x); });
    }
    __device__ __forceinline__ void decay(const float* total) {
        if (GATE == NO_GATE) return;
        each_number([&](int key, int, float& x) { x = kept(total[GATE == STEP ? 0 : key], x); });
    }
    // Where products read it.
    __device__ __forceinline__ void lay_out(const Room& room, int own) {
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++) store_pairs(part[n], room.state, own, 8 * n);
    }
    // The pairs of a chunk, added.
    __device__ __forceinline__ void memorise(const Room& room, const Tokens& k, int own) {
        #pragma unroll 1
        for (int token = 0; token < CHUNK; token += 16) {
            Left<bfloat16, SUM_TERMS> left;
            load_left(left, room.errors, own, token);
            #pragma unroll
            for (int key = 0; key < KEYS; key += 16) {
                Right<bfloat16, KEY_TERMS> right[2];
                tokens_as_rows<DIRECT>(right, k, token, key, Rest{room});
                for (int n = 0; n < 2; n++) multiply(part[key / 8 + n], left, right[n]);
            }
        }
    }
};

// What 16 tokens read of the state, transposed: 16 columns x 16 tokens.
__device__ __forceinline__ void recall(Sum (&read)[2], const Room& room, const Tokens& tokens, int token, int own) {
    read[0] = read[1] = Sum{};
    #pragma unroll 1
    for (int key = 0; key < KEYS; key += 16) {
        Left<bfloat16, SUM_TERMS> left;
        Right<bfloat16, KEY_TERMS> right[2];
        load_left(left, room.state, own, key);
        tokens_as_columns<DIRECT>(right, tokens, token, key, Since{room});
        for (int n = 0; n < 2; n++) multiply(read[n], left, right[n]);
    }
    if (GATE == STEP)
        for (int n = 0; n < 2; n++)
            each(read[n], [&](int, int j, float& x) { x *= room.from_start[token + 8 * n + j]; });
}

// sum += errors^T square^T for 16 tokens; the square is lower triangular.
__device__ __forceinline__ void weigh(Sum (&sum)[2], const Room& room, const Square& square, int token, int own) {
    #pragma unroll 1
    for (int from = 0; from <= token; from += 16) {
        Left<bfloat16, SUM_TERMS> left;
        Right<bfloat16, SUM_TERMS> right[2];
        load_left(left, room.errors, own, from);
        load_right_transposed(right, square, token, from, AsItIs());
        for (int n = 0; n < 2; n++) multiply(sum[n], left, right[n]);
    }
}

// Numbers of 16 tokens: use(token, column of the warp, x).
template <class Use>
__device__ __forceinline__ void each_of_tokens(Sum (&sum)[2], int token, Use use) {
    for (int n = 0; n < 2; n++)
        each(sum[n], [&](int column, int j, float& x) { use(token + 8 * n + j, column, x); });
}

// The errors of a chunk: what is not recalled of the values, then what the tokens before each have not corrected.
__device__ __forceinline__ void correct(const Room& room, const Tokens& erasing, const Values& values, int own,
                                        int count) {
    Sum sum[2];
    #pragma unroll 1
    for (int token = 0; token < CHUNK; token += 16) {
        recall(sum, room, erasing, token, own);
        each_of_tokens(sum, token, [&](int i, int column, float& x) {
            x = i < count ? room.beta[i] * (widened(values.at(i, own + column)) - x) : 0;
        });
        for (int n = 0; n < 2; n++) store_pairs(sum[n], room.errors, own, token + 8 * n);
    }
    #pragma unroll 1
    for (int token = CHUNK - 16; token >= 0; token -= 16) {  // from the end: a block needs those before it
        __syncwarp();  // what is read here was written by other lanes
        sum[0] = sum[1] = Sum{};
        weigh(sum, room, room.inverse, token, own);
        __syncwarp();  // it has been read
        each_of_tokens(sum, token, [&](int i, int, float& x) { x = i < count ? x : 0; });
        for (int n = 0; n < 2; n++) store_pairs(sum[n], room.errors, own, token + 8 * n);
    }
}

// The answers of a chunk, in the place of its values; whether any of them is not finite.
__device__ __forceinline__ bool answer(const Room& room, const Tokens& queries, const Values& values, int own, int count,
                                       real scale) {
    bool any_bad = false;
    #pragma unroll 1
    for (int token = 0; token < CHUNK; token += 16) {
        Sum sum[2];
        recall(sum, room, queries, token, own);
        weigh(sum, room, room.scores, token, own);
        each_of_tokens(sum, token, [&](int i, int column, float x) {
            any_bad |= i < count && bad(x);
            put(values.at(i, own + column), scale * x);
        });
    }
    return any_bad;
}

// One gate per step: errors as they are at the end of the chunk.
__device__ __forceinline__ void decay_errors(const Room& room, int own) {
    #pragma unroll 1
    for (int i = threadIdx.x % 32; i < 16 * CHUNK; i += 32) {
        const int column = own + i / CHUNK, token = i % CHUNK;
        room.errors.set(column, token, room.to_end[token] * room.errors.at(column, token));
    }
    __syncwarp();  // they are decayed
}

// Whether any thread of the block says so.
__device__ __forceinline__ bool any_of_block(const Room& room, bool mine) {
    int any = mine;
    for (int distance = 1; distance < 32; distance *= 2) any |= __shfl_xor_sync(0xffffffffu, any, distance);
    if (threadIdx.x % 32 == 0) room.verdicts[threadIdx.x / 32] = float(any);
    __syncthreads();  // every warp has said so
    for (int warp = 0; warp < WARPS; warp++) any |= room.verdicts[warp] != 0;
    return any;
}

// All numbers of a block's part of the state, neighbouring columns by neighbouring threads: use(is it there, key, column).
template <class Use>
__device__ __forceinline__ void each_number_of_block(int columns, Use use) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < KEYS * VALUES; i += THREADS)
        use(i / VALUES < K && i % VALUES < columns, i / VALUES, i % VALUES);
}

// ---- the walk ---------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
delta_rule_chunks(const data* q, const data* k, const data* v, const real* beta, const real* log_decay,
                  const data* erase_key, real* S, data* o, const long long* table, int axes, int tokens, int columns,
                  int groups, int blocks, real scale) {
    const Room room;
    Memory memory;
    const int which = blockIdx.x / blocks, first_column = blockIdx.x % blocks * VALUES;
    const int own = threadIdx.x / 32 * 16;
    const auto state = rows(S, table, axes, STATE, which);

    __shared__ Places places;
    if (threadIdx.x == 0) {
        places.tokens[0] = rows(q, table, axes, Q, which), places.tokens[1] = rows(k, table, axes, KEY, which);
        places.tokens[2] = rows(erase_key, table, axes, ERASE_OF, which), places.v = rows(v, table, axes, V, which);
        places.beta = rows(beta, table, axes, BETA, which), places.gate = rows(log_decay, table, axes, GATE_OF, which);
        places.o = rows(o, table, axes, O, which);
        for (int i = 0; i < 3; i++) places.wide[i] = in_vectors(places.tokens[i]);
        places.wide[0] = places.wide[0] && places.tokens[0].group * sizeof(data) % 16 == 0;
        places.wide_v = in_vectors(places.v), places.wide_gate = GATE == CHANNEL && in_vectors(places.gate);
    }
    const Numbers numbers = {reinterpret_cast<float*>(room.state.term[0].begin)};
    each_number_of_block(columns - first_column, [&](bool there, int key, int column) {
        numbers.at(column, key) = there ? state.at(key, first_column + column) : 0;
    });
    __syncthreads();  // the state is there
    memory.each_number([&](int key, int column, float& x) { x = numbers.at(own + column, key); });

    const auto bring_tokens = [&](int stage, int t, int count, int kinds, int group) {
        #pragma unroll 1
        for (int kind = 0; kind < kinds; kind++) {  // queries of a group, keys, keys that erase
            const Tokens tile = {room.q[kind * STAGES + stage].begin};
            fetch(tile, places.tokens[kind].of(kind ? 0 : group), t, 0, count, K, places.wide[kind]);
        }
    };
    const auto bring = [&](int stage, int t, int count) {
        bring_tokens(stage, t, count, 2 + ERASE, 0);
        fetch(room.v[stage], places.v, t, first_column, count, columns - first_column, places.wide_v);
        close_copies();
    };
    // The decay of one token before all else: where it leaves nothing, not even a NaN is left.
    const auto decay_now = [&](int t) {
        for (int row = threadIdx.x; row < (GATE == STEP ? 1 : KEYS); row += THREADS)
            room.total[row] = row < K ? exp2f(LOG2E * places.gate.at(t, row)) : 0;
        __syncthreads();  // the decay is there
        memory.decay(room.total);
    };

    int t = 0, count = min(CHUNK, tokens), stage = 0;
    int known = 0, limit = 0;  // a chunk is taken again: so many tokens have finite answers, so many have not
    bool here = false, alone = false;  // the tokens are on their way; a token is taken alone
    #pragma unroll 1
    while (t < tokens) {
        const int chunk_end = min(tokens, (t / CHUNK + 1) * CHUNK), next = min(CHUNK, tokens - chunk_end);
        const bool again = limit > 0 || alone;
        const int gated = alone ? 0 : count;
        if (!here || GATE == CHANNEL) __syncthreads();  // the places are known; nobody is left at the last tokens
        if (GATE && alone) decay_now(t);
        if (GATE == CHANNEL) fetch(room.steps, places.gate, t, 0, gated, K, places.wide_gate);
        #pragma unroll 1
        for (int turn = here; turn < 2; turn++) {  // these tokens, then the next
            if (turn) {
                close_copies();
                finish_copies<0>();
                __syncthreads();  // these tokens are there, and nobody is left at the last ones
                if (STAGES == 1 || !next || again) break;
            }
            bring(turn ? 1 - stage : stage, turn ? chunk_end : t, turn ? next : count);
        }
        const Tokens keys = room.k[stage], erasing = ERASE ? room.p[stage] : keys, queries = room.q[stage];
        const Values values = room.v[stage];
        for (int i = threadIdx.x; i < CHUNK; i += THREADS) {
            room.beta[i] = i < count ? places.beta.at(t + i, 0) : 0;
            if (GATE == STEP) room.gates[i] = i < gated ? LOG2E * places.gate.at(t + i, 0) : 0;
        }
        if (GATE == CHANNEL) decay_by_channels(room);
        __syncthreads();  // step sizes and gates are there, or decays of channels
        if (GATE == STEP) {
            decay_by_steps(room);
            __syncthreads();  // decays between tokens are there
        }

        memory.lay_out(room, own);
        bool any_bad = false;
        #pragma unroll 1
        for (int group = -1; group < groups; group++) {  // erasing keys, then the queries that share this memory
            if (group > 0) {
                bring_tokens(stage, t, count, 1, group);
                close_copies();
                finish_copies<0>();
                __syncthreads();  // these queries are there
            }
            const Tokens asking = group < 0 ? erasing : queries;
            if (GATE == CHANNEL) score_in_blocks(room, asking, keys, group < 0, count);
            score(room, asking, keys, group < 0, count);
            __syncthreads();  // all scores are there
            if (group < 0) {
                invert_blocks(room);
                __syncthreads();  // the blocks on the diagonal are inverted
                double_blocks(room);
                correct(room, erasing, values, own, count);
            } else {
                any_bad |= answer(room, queries, values, own, count, scale);
                __syncthreads();  // the answers are there, and nobody is left at the queries
                const int wide = min(VALUES, columns - first_column);
                write_back(values, places.o.of(group), t, first_column, count, wide);
            }
        }

        const bool failed = any_of_block(room, any_bad) && !alone;
        if (failed || (limit > 0 && known < count && limit - count > 1)) {  // another number of tokens
            (failed ? limit : known) = count;
            if (known + 1 == limit && !known) alone = true, limit = 0;
            count = limit - known > 1 ? (known + limit) / 2 : max(known, 1);
            here = false;
            continue;
        }
        if (GATE == STEP) decay_errors(room, own);
        if (!alone) {
            if (GATE == CHANNEL)
                memory.each_number([&](int key, int, float& x) {  // behind the keys, zero times NaN is forgotten too
                    x = kept(key < K ? room.whole[key] * (BLOCKS > 1 ? room.whole[KEYS + key] : 1) : 0, x);
                });
            else
                memory.decay(room.total);
        }
        memory.memorise(room, keys, own);
        t += count;
        alone = again && t < chunk_end, limit = known = 0;
        count = alone ? 1 : next ? min(CHUNK, tokens - t) : 0;
        here = STAGES == 2 && t == chunk_end;
        if (t == chunk_end && STAGES == 2) stage = 1 - stage;
    }
    memory.each_number([&](int key, int column, float& x) { numbers.at(own + column, key) = x; });
    __syncthreads();  // the state is there
    each_number_of_block(columns - first_column, [&](bool there, int key, int column) {
        if (there) state.at(key, first_column + column) = numbers.at(column, key);
    });
}
