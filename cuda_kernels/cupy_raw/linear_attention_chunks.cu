// Linear attention, chunk by chunk:  o = (tril(Q K^T) * decay) V + decay Q S,  S = decay S + (decay K)^T V.
//
// A block has one memory (or one group of queries on it), some value columns and one piece of the sequence; without
// pieces that is all of it. Warp w owns 16 of the columns: its part of the state, transposed, stays in the registers of
// its lanes as Sums of 16 columns x 8 keys, where it can be the right matrix of a product at once. Scores are made by all
// warps, 16 x 16 at a time, and lie in shared memory. Whatever is computed is kept in SUM_TERMS bfloat16, never in one.
//
// Decays are powers of two of sums of gates that all have one sign, never of differences. With one gate per step,
// tokens come in blocks of 16: from a key to a query lead the rest of the key's block and the query's block up to
// itself. With one gate per channel these are factors of the key and of the query, so the path needs a place to meet:
// the middle of the smallest of the blocks of 2, 4, 8, 16 and 32 tokens that holds both. A lane has the numbers of its
// tokens as products take them; what a block twice as large needs is what both halves have, times the decay of one.
//
// Zero times NaN is NaN, so a product would carry a bad number into the past. A chunk whose answers are not finite is
// taken again: first the tokens before the bad one, with zeros behind them, then one token after the other.
//
// STATES: the first of two launches, if the sequence is cut in pieces. It makes what each piece adds to the state, and
// its decay; the second launch begins each piece with the sum over those before it.
//
// TOGETHER blocks share a multiprocessor: while one waits, for data or at a barrier, another works.
//
// DIRECT: products read the data where they arrive, in two places in turn. Otherwise the data are split into terms, or
// decayed (keys and queries with one gate per channel), and the next ones arrive where they were.

enum { Q, KEY, V, GATE_OF, BONUS_OF, STATE, STATE_NEXT, Z, Z_NEXT, O };

enum { NO_GATE, STEP, CHANNEL };

constexpr int BLOCKS = CHUNK / 16, WARPS = VALUES / 16, THREADS = 32 * WARPS;
constexpr int OCTETS = CHUNK / 8, TILES = OCTETS * (OCTETS + 1) / 2;
constexpr int SLICES = KEYS / 16, SHARERS = SLICES < WARPS ? SLICES : WARPS;
constexpr bool DIRECT_KEYS = DIRECT && GATE != CHANNEL;
constexpr float LOG2E = 1.44269504f;
static_assert(BLOCKS <= 2, "a lane of one warp has each gate, and no block lies between two others");

typedef Split<DATA_TERMS, CHUNK, VALUES> Values;
typedef Split<KEY_TERMS, CHUNK, KEYS> Keys;

// The places where tiles arrive.
template <int STAGES, class TileType>
struct Arrivals {
    TileType first;

    __device__ __forceinline__ explicit Arrivals(unsigned char*& at, bool needed) : first{} {
        if (needed) first = tile_of<TileType>(at);
        if (needed && STAGES == 2) tile_of<TileType>(at);
    }
    __device__ __forceinline__ TileType operator[](int stage) const {
        return {first.begin + (STAGES == 2 ? stage : 0) * TileType::rows * TileType::stride};
    }
};

// Two of the scores of 8 queries and 8 keys, of query `line` with keys pair and pair + 1.
struct alignas(8) Two {
    float x[2];
};

// What a block keeps in shared memory.
struct Room {
    int keys;  // not less than KEYS, but the compiler does not know: what an unrolled loop loads does not pile up
    unsigned char* at = dynamic_shared();
    Arrivals<1 + DIRECT_KEYS, Tile<data, CHUNK, KEYS>> q_in{at, !STATES}, k_in{at, true};
    Arrivals<1 + DIRECT, Tile<data, CHUNK, VALUES>> v_in{at, true};
    Arrivals<1 + DIRECT, Tile<float, 1, CHUNK>> gates{at, GATE == STEP};  // logs, one per token
    Arrivals<1, Tile<float, CHUNK, KEYS>> decays{at, GATE == CHANNEL};    // logs
    Keys q, k;
    Values v;
    Split<SUM_TERMS, CHUNK, CHUNK> scores;
    float *since, *rest;            // STEP: sums of gates in log 2, from the block's start and to its end
    float* within;                  // STEP: from token j to token i of one block, at i % 16 (CHUNK + 8) + j
    Tile<float, OCTETS - 1, KEYS> whole;  // CHANNEL: decays of 8 tokens, but not the first 8; where scores will be
    Two* parts;                     // CHANNEL: of scores, 8 x 8 at a time, by warps that have some of the channels each
    float *from_start, *to_end;     // STEP: factors, from the chunk's start to a token and from it to the end
    float *own, *weights;           // BONUS: score of a token with itself; NORMALIZE: sum of the scores of a query
    float *z, *total, *product;     // of each key: weight in memory; decay of the chunk; STATES: decay of the piece

    __device__ __forceinline__ explicit Room(int tokens) : keys(tokens | KEYS) {
        if (!DIRECT_KEYS && !STATES) q = split_of<KEY_TERMS, CHUNK, KEYS>(at);
        if (!DIRECT_KEYS) k = split_of<KEY_TERMS, CHUNK, KEYS>(at);
        if (!DIRECT) v = split_of<DATA_TERMS, CHUNK, VALUES>(at);
        whole.begin = reinterpret_cast<float*>(at);
        static_assert(decltype(whole)::bytes <= SUM_TERMS * Tile<bfloat16, CHUNK, CHUNK>::bytes, "scores are larger");
        scores = split_of<SUM_TERMS, CHUNK, CHUNK>(at);
        float* number = reinterpret_cast<float*>(at);
        const auto numbers = [&](int count) { return (number += count) - count; };
        if (GATE == CHANNEL) parts = reinterpret_cast<Two*>(numbers(64 * SHARERS * TILES));
        if (GATE == STEP) since = numbers(CHUNK), rest = numbers(CHUNK), within = numbers(16 * (CHUNK + 8));
        if (GATE == STEP) from_start = numbers(CHUNK), to_end = numbers(CHUNK);
        own = numbers(CHUNK), weights = numbers(CHUNK);
        z = numbers(KEYS), total = numbers(KEYS), product = numbers(KEYS);
    }
};

// Which sequence a block has and where it lies. In shared memory, because registers are for the state.
struct Places {
    int which, column_block, first_column, group, piece, begin, end;  // begin, end: tokens
    Rows<const data> q, k, v;
    Rows<const real> bonus, gate, gate_row;  // gate_row: all tokens are one row
    Rows<data> o;
    bool wide_q, wide_k, wide_v, wide_gate, wide_o;  // rows can be copied in vectors
};

// Data as products read them: where they arrive, or from a copy in terms.
template <bool DIRECTLY, class SplitType, class TileType>
__device__ __forceinline__ SplitType source(const SplitType& split, const TileType& tile) {
    if constexpr (DIRECTLY)
        return {{tile}};
    else
        return split;
}
template <int TERMS_, class T, int R, int C>
__device__ __forceinline__ void copy(const Split<TERMS_, R, C>& to, const Tile<T, R, C>& from) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < R * C; i += THREADS) to.set(i / C, i % C, widened(from.at(i / C, i % C)));
}

__device__ __forceinline__ bool bad(float x) { return x - x != 0; }

// sum += left right. Answers of 16 bits need no more than tensor cores keep; sums over many chunks are added outside.
template <int M, int N>
__device__ __forceinline__ void add(Sum& sum, const Left<bfloat16, M>& left, const Right<bfloat16, N>& right) {
    if constexpr (sizeof(data) == 2)
        multiply_onto(sum, left, right);
    else
        multiply(sum, left, right);
}

// ---- decays -----------------------------------------------------------------------------------------------------------

// One gate per step: sums over blocks of 16 tokens, and the factors that lead through the whole chunk, by one warp.
__device__ __forceinline__ void sum_gates(const Room& room, const float* gates) {
    const int i = threadIdx.x % 32, place = i % 16;
    const float gate = i < CHUNK ? LOG2E * gates[i] : 0;
    float until = gate, rest = gate;  // of the block, this token among them
    #pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
        const float earlier = __shfl_up_sync(0xffffffffu, until, distance);
        const float later = __shfl_sync(0xffffffffu, rest, min(i + distance, 31));
        until += place >= distance ? earlier : 0, rest += place + distance < 16 ? later : 0;
    }
    const float earlier = __shfl_up_sync(0xffffffffu, until, 1), later = __shfl_sync(0xffffffffu, rest, min(i + 1, 31));
    const float before = __shfl_sync(0xffffffffu, rest, 0), behind = __shfl_sync(0xffffffffu, rest, 16);
    const float since = !BONUS ? until : place ? earlier : 0;  // the bonus reads the state before its decay
    const float after = place < 15 ? later : 0;
    if (i == 0) room.total[0] = exp2f(before + behind);
    if (i >= CHUNK) return;
    room.since[i] = since, room.from_start[i] = exp2f(i < 16 ? since : before + since);
    room.rest[i] = after, room.to_end[i] = exp2f(i < 16 ? after + behind : after);
}
// And from each token to those behind it in its block, by another warp.
__device__ __forceinline__ void sum_gates_within(const Room& room, const float* gates) {
    const int j = threadIdx.x % 32;
    if (j >= CHUNK) return;
    float sum = 0;
    #pragma unroll
    for (int place = 0; place < 16; place++) {
        const float gate = place > j % 16 ? LOG2E * gates[j / 16 * 16 + place] : 0;
        room.within[place * (CHUNK + 8) + j] = BONUS ? sum : sum + gate;
        sum += gate;
    }
}

// What is left at a query of what was stored at a key before it.
__device__ __forceinline__ float decay_between(const Room& room, int query, int key) {
    if (GATE != STEP) return 1;
    if (query / 16 == key / 16) return exp2f(room.within[query % 16 * (CHUNK + 8) + key]);
    return exp2f(room.since[query] + room.rest[key]);
}

// What a lane has of 8 tokens and 16 channels, as products take it: token `line` in channels pair + 0, 1, 8, 9.
struct Four {
    float x[4];

    template <class T, int R, int C>
    __device__ __forceinline__ static Four of_row(const Tile<T, R, C>& tile, int row, int slice) {
        const int channel = 16 * slice + threadIdx.x % 4 * 2;
        Four four;
        for (int n = 0; n < 2; n++) read_two(tile, row, channel + 8 * n, four.x[2 * n], four.x[2 * n + 1]);
        return four;
    }
    template <class T, int R, int C>
    __device__ __forceinline__ static Four of(const Tile<T, R, C>& tile, int octet, int slice) {
        return of_row(tile, 8 * octet + threadIdx.x % 32 / 4, slice);
    }
    __device__ __forceinline__ Four operator*(const Four& other) const {
        return {x[0] * other.x[0], x[1] * other.x[1], x[2] * other.x[2], x[3] * other.x[3]};
    }
    __device__ __forceinline__ Four from(int lanes_away) const {
        Four other;
        for (int n = 0; n < 4; n++) other.x[n] = __shfl_xor_sync(0xffffffffu, x[n], lanes_away);
        return other;
    }
    // As the right matrix of a product.
    __device__ __forceinline__ Right<bfloat16, KEY_TERMS> right() const {
        Right<bfloat16, KEY_TERMS> right;
        for (int n = 0; n < 2; n++) set_pair<bfloat16>(right.x, n, x[2 * n], x[2 * n + 1]);
        return right;
    }
    __device__ __forceinline__ void put_into(const Keys& keys, int octet, int slice) const {
        const int lane = threadIdx.x % 32, token = 8 * octet + lane / 4, channel = 16 * slice + lane % 4 * 2;
        for (int n = 0; n < 2; n++) keys.set_two(token, channel + 8 * n, x[2 * n], x[2 * n + 1]);
    }
};
constexpr Four ONES = {1, 1, 1, 1};

// Of queries and keys that are both right matrices, so that half of a left one is free.
template <int TERMS>
__device__ __forceinline__ Two scores_of(const Right<bfloat16, TERMS>& q, const Right<bfloat16, TERMS>& k) {
    Left<bfloat16, TERMS> left = {};
    for (int n = 0; n < TERMS; n++) left.x[n][0] = q.x[n][0], left.x[n][2] = q.x[n][1];
    Sum sum = {};
    add(sum, left, k);
    return {sum.x[0], sum.x[1]};
}
// The second of two terms is there.
__device__ __forceinline__ Two scores_of(const Right<bfloat16, 2>& q, const Right<bfloat16, 2>& k) {
    const unsigned left[4] = {q.x[0][0], q.x[1][0], q.x[0][1], q.x[1][1]};
    Sum sum = {};
    for (int n = 1; n >= 0; n--) multiply_once<bfloat16>(sum, left, k.x[n]);
    return {sum.x[0] + sum.x[2], sum.x[1] + sum.x[3]};
}
// What the channels of a slice add to scores.
__device__ __forceinline__ void leave_part(const Room& room, int query, int key, int slice, const Two& part) {
    const int tile = query * (query + 1) / 2 + key, warp = threadIdx.x / 32;
    Two& all = room.parts[(warp * TILES + tile) * 32 + threadIdx.x % 32];
    all = slice == warp ? part : Two{all.x[0] + part.x[0], all.x[1] + part.x[1]};
}

// How 8 tokens decay: each since the first of them and to the last, and all of them.
struct Decays {
    Four since, rest, all;
};
// Scores of 8 tokens among themselves, and their decays.
__device__ __forceinline__ Two score_octet(const Room& room, Decays& decays, const Four& q, const Four& k, float own) {
    const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    Two scores = {line == pair ? own : 0, line == pair + 1 ? own : 0};
    #pragma unroll
    for (int half = 1; half < 8 && half < room.keys; half *= 2) {  // of a block
        const bool later = line & half;
        if (!STATES) {
            Four mine = k * decays.rest;
            if (later) mine = q * decays.since;
            const auto both = mine.right();
            const Two found = scores_of(both, both);
            for (int n = 0; n < 2; n++)
                if (later && (line ^ (pair + n)) / half == 1) scores.x[n] = found.x[n];
        }
        const Four other = decays.all.from(4 * half);
        if (later)
            decays.since = decays.since * other;
        else
            decays.rest = decays.rest * other;
        decays.all = decays.all * other;
    }
    return scores;
}

// The decays of 8 tokens, in some channels.
__device__ __forceinline__ void sum_channel_gates(const Room& room, int slice) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int octet = 1; octet < OCTETS; octet++) {
        Four sum = Four::of(room.decays[0], octet, slice);
        for (int distance = 4; distance < 32; distance *= 2) {
            const Four other = sum.from(distance);
            for (int n = 0; n < 4; n++) sum.x[n] += other.x[n];
        }
        for (int n = 0; n < 4; n++) {
            const int channel = 16 * slice + lane % 4 * 2 + n % 2 + n / 2 * 8;
            if (lane < 4) room.whole.at(octet - 1, channel) = exp2f(LOG2E * sum.x[n]);
        }
    }
    __syncwarp();  // all lanes see them
}
// Score of a token with itself, in some channels.
__device__ __forceinline__ float score_alone(Four product, const Rows<const real>& bonus, int slice) {
    for (int n = 0; n < 4 && BONUS; n++) {
        const int channel = 16 * slice + threadIdx.x % 4 * 2 + n % 2 + n / 2 * 8;
        product.x[n] *= channel < K ? bonus.at(0, channel) : 0;
    }
    float sum = (product.x[0] + product.x[1]) + (product.x[2] + product.x[3]);
    for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    return sum;
}

// One gate per channel: queries since the start of the chunk, keys to its end, and scores. A warp has 16 channels.
__device__ __forceinline__ void decay_channels(const Room& room, const Rows<const real>& bonus) {
    const auto whole = [&](int octet, int slice) { return Four::of_row(room.whole, octet - 1, slice); };
    #pragma unroll 1
    for (int slice = threadIdx.x / 32; slice < SLICES; slice += WARPS) {
        Four before = ONES;
        Right<bfloat16, KEY_TERMS> early[2], near;  // keys of the first 16 tokens, and of 8 tokens before 8 queries
        sum_channel_gates(room, slice);
        #pragma unroll
        for (int octet = 0; octet < OCTETS && octet < room.keys; octet++) {
            const Four k = Four::of(room.k_in[0], octet, slice);
            const Four q = STATES ? k : Four::of(room.q_in[0], octet, slice);
            Four decay = Four::of(room.decays[0], octet, slice), behind = ONES;
            for (int n = 0; n < 4; n++) decay.x[n] = exp2f(LOG2E * decay.x[n]);
            Decays decays = {BONUS ? ONES : decay, ONES, decay};
            const Two among = score_octet(room, decays, q, k, STATES ? 0 : score_alone(q * k, bonus, slice));
            if (!STATES) {
                leave_part(room, octet, octet, slice, among);
                const Four asked = q * decays.since;
                if (octet % 2) leave_part(room, octet, octet - 1, slice, scores_of(asked.right(), near));
                near = (k * decays.rest).right();
                if (octet < 2) early[octet] = octet ? near : (k * decays.rest * whole(1, slice)).right();
                if (octet >= 2) {
                    const auto late = (octet > 2 ? asked * whole(2, slice) : asked).right();
                    for (int n = 0; n < 2; n++) leave_part(room, octet, n, slice, scores_of(late, early[n]));
                }
                (asked * before).put_into(room.q, octet, slice);
            }
            for (int later = octet + 1; later < OCTETS; later++) behind = behind * whole(later, slice);
            (k * decays.rest * behind).put_into(room.k, octet, slice);
            before = before * decays.all;
        }
        #pragma unroll
        for (int n = 0; n < 4; n++) {
            const int lane = threadIdx.x % 32, channel = 16 * slice + lane % 4 * 2 + n % 2 + n / 2 * 8;
            if (lane < 4) room.total[channel] = channel < K ? before.x[n] : 0;  // even zero times NaN, behind the keys
        }
    }
}

// Scores are what all channels add to them; a warp has 8 queries and 8 keys.
__device__ __forceinline__ void add_parts(const Room& room) {
    const int lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
    #pragma unroll 1
    for (int task = threadIdx.x / 32; task < OCTETS * OCTETS; task += WARPS) {
        const int query = task / OCTETS, key = task % OCTETS;
        Two sum = {};
        #pragma unroll
        for (int warp = 0; warp < SHARERS && key <= query; warp++) {
            const Two part = room.parts[(warp * TILES + query * (query + 1) / 2 + key) * 32 + lane];
            for (int n = 0; n < 2; n++) sum.x[n] += part.x[n];
        }
        if (key / 2 <= query / 2) room.scores.set_two(8 * query + line, 8 * key + pair, sum.x[0], sum.x[1]);
    }
}

// ---- scores -----------------------------------------------------------------------------------------------------------

// All blocks on and below the diagonal.
__device__ __forceinline__ void score(const Room& room, const Keys& q, const Keys& k) {
    int task = threadIdx.x / 32;
    #pragma unroll 1
    for (int row = 0; row < BLOCKS; row++)
        #pragma unroll 1
        for (int column = 0; column <= row; column++) {
            if (task--) continue;  // tasks go around
            task = WARPS - 1;
            Sum sum[2][2] = {};  // two of each, because a product waits for the sum it is added to
            #pragma unroll 1
            for (int inner = 0; inner < KEYS; inner += 32)
                #pragma unroll
                for (int half = 0; half < 2 && inner + 16 * half < KEYS; half++) {
                    Left<bfloat16, KEY_TERMS> left;
                    Right<bfloat16, KEY_TERMS> right[2];
                    load_left(left, q, 16 * row, inner + 16 * half);
                    load_right_transposed(right, k, 16 * column, inner + 16 * half);
                    for (int n = 0; n < 2; n++) add(sum[half][n], left, right[n]);
                }
            for (int n = 0; n < 2; n++) {
                for (int i = 0; i < 4; i++) sum[0][n].x[i] += sum[1][n].x[i];
                each_pair(sum[0][n], [&](int i, int j, float low, float high) {
                    const int query = 16 * row + i, key = 16 * column + 8 * n + j;
                    const auto decayed = [&](int key, float x) {
                        const bool past = BONUS ? key < query : key <= query;
                        const float own = BONUS && key == query ? room.own[query] : 0;
                        return past ? x * decay_between(room, query, key) : own;
                    };
                    room.scores.set_two(query, key, decayed(key, low), decayed(key + 1, high));
                });
            }
        }
}

// Sums of `count` numbers for each token, by four lanes together: use(token, sum of number(token, 0 ...)).
template <class Number, class Use>
__device__ __forceinline__ void sum_rows(int count, Number number, Use use) {
    #pragma unroll 1
    for (int item = threadIdx.x; item < 4 * CHUNK; item += THREADS) {
        const int i = item / 4, part = item % 4;
        float sum = 0;
        for (int n = part; n < count; n += 4) sum += number(i, n);
        for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (part == 0) use(i, sum);
    }
}

// ---- the state --------------------------------------------------------------------------------------------------------

// Values, transposed; with one gate per step, what is left of them at the end of the chunk.
template <int TERMS>
__device__ __forceinline__ void load_values(Left<bfloat16, TERMS>& left, const Room& room, const Values& v, int token,
                                            int column) {
    if constexpr (GATE == STEP || TERMS != DATA_TERMS) {
        Left<bfloat16, DATA_TERMS> as_it_is;
        load_left_transposed(as_it_is, v, token, column);
        make_left(left, [&](int, int j, int r, bool high) {
            float x = 0;
            for (int n = DATA_TERMS - 1; n >= 0; n--) x += half_of<bfloat16>(as_it_is.x[n][r], high);
            return x * room.to_end[token + j];
        });
    } else {
        load_left_transposed(left, v, token, column);
    }
}

// What a warp keeps: 16 columns of the state, transposed, as KEYS / 8 Sums.
struct Memory {
    Sum part[KEYS / 8];

    template <class Use>
    __device__ __forceinline__ void each_number(Use use) {  // use(key, column of the warp, x)
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            each(part[n], [&](int column, int key, float& x) { use(8 * n + key, column, x); });
    }
    // The same where numbers are in global memory: not all at once, or their addresses would need all registers.
    template <class Use>
    __device__ __forceinline__ void each_stored(Use use) {
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            each(part[n], [&](int column, int key, float& x) { use(8 * n + key, column, x); });
            if (n % 8 == 7) __syncwarp();
        }
    }
    __device__ __forceinline__ void decay(const float* total) {  // of each key, alike or not
        if (GATE == NO_GATE) return;
        each_number([&](int key, int, float& x) { x = kept(total[key], x); });
    }
    __device__ __forceinline__ bool is_bad() {
        bool any = false;
        each_number([&](int, int, float& x) { any |= bad(x); });
        return any;
    }
    // V^T K, added to what a decay leaves.
    __device__ __forceinline__ void memorise(const Room& room, const Keys& k, const Values& v) {
        constexpr int terms = GATE == STEP ? SUM_TERMS : DATA_TERMS;
        const int column = threadIdx.x / 32 * 16;
        Left<bfloat16, terms> left[BLOCKS];
        #pragma unroll
        for (int block = 0; block < BLOCKS; block++) load_values(left[block], room, v, 16 * block, column);
        #pragma unroll
        for (int key = 0; key < KEYS && key < room.keys; key += 16) {
            Sum sum[2] = {};
            #pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                Right<bfloat16, KEY_TERMS> right[2];
                load_right(right, k, 16 * block, key);
                for (int n = 0; n < 2; n++) add(sum[n], left[block], right[n]);
            }
            for (int n = 0; n < 2; n++) {
                int i = 0;
                each(part[key / 8 + n], [&](int, int j, float& x) {
                    const float decay = !GATE ? 1 : room.total[GATE == STEP ? 0 : key + 8 * n + j];
                    x = fma(decay, decay == 0 ? 0 : x, sum[n].x[i++]);
                });
            }
        }
    }
    // Q S, of all tokens of a chunk.
    __device__ __forceinline__ void recall(Sum (&answers)[BLOCKS][2], const Room& room, const Keys& q) const {
        #pragma unroll
        for (int key = 0; key < KEYS && key < room.keys; key += 16) {
            Right<bfloat16, SUM_TERMS> right[2];
            for (int n = 0; n < 2; n++) right_of(right[n], part[key / 8], part[key / 8 + 1], n);
            #pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                Left<bfloat16, KEY_TERMS> left;
                load_left(left, q, 16 * block, key);
                for (int n = 0; n < 2; n++) add(answers[block][n], left, right[n]);
            }
        }
    }
};

// Scores times values, added to the answers.
__device__ __forceinline__ void weigh(Sum (&answers)[BLOCKS][2], const Room& room, const Values& v) {
    const int column = threadIdx.x / 32 * 16;
    #pragma unroll
    for (int key = 0; key < BLOCKS; key++) {
        Right<bfloat16, DATA_TERMS> right[2];
        load_right(right, v, 16 * key, column);
        #pragma unroll
        for (int block = key; block < BLOCKS; block++) {
            Left<bfloat16, SUM_TERMS> left;
            load_left(left, room.scores, 16 * block, 16 * key);
            for (int n = 0; n < 2; n++) add(answers[block][n], left, right[n]);
        }
    }
}

// ---- the walk ---------------------------------------------------------------------------------------------------------

// What a product may read once this is done and the block has met: everything but scores.
__device__ __forceinline__ void prepare(const Room& room, int stage, const Rows<const real>& bonus) {
    if (GATE == STEP && threadIdx.x / 32 == 0) sum_gates(room, room.gates[stage].begin);
    if (GATE == STEP && threadIdx.x / 32 == WARPS - 1) sum_gates_within(room, room.gates[stage].begin);
    if (BONUS && !STATES && GATE != CHANNEL)
        sum_rows(
            K,
            [&](int i, int n) {
                const float asked = widened(room.q_in[stage].at(i, n)) * bonus.at(0, n);
                return asked * widened(room.k_in[stage].at(i, n));
            },
            [&](int i, float sum) { room.own[i] = sum; });
    if (!DIRECT) copy(room.v, room.v_in[0]);
    if (!DIRECT && GATE != CHANNEL) {
        if (!STATES) copy(room.q, room.q_in[0]);
        copy(room.k, room.k_in[0]);
    }
    if (GATE == CHANNEL) decay_channels(room, bonus);
}

extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER)
linear_attention_chunks(const data* q, const data* k, const data* v, const real* log_decay, const real* bonus,
                        const real* S, real* S_next, const real* z, real* z_next, data* o, real* sums,
                        real* piece_decays, real* z_sums, const long long* table, int axes, int tokens, int columns,
                        int groups, int pieces, int stored, int length, real scale) {
    const Room room(tokens);
    Memory memory;
    __shared__ Places places;
    if (threadIdx.x == 0) {
        const int column_blocks = (columns + VALUES - 1) / VALUES, number = blockIdx.x / pieces;
        const int which = number / column_blocks / groups, group = number / column_blocks % groups;
        places.which = which, places.group = group, places.piece = blockIdx.x % pieces;
        places.column_block = number % column_blocks, places.first_column = places.column_block * VALUES;
        places.begin = places.piece * length, places.end = min(tokens, places.begin + length);
        const auto gate = rows(log_decay, table, axes, GATE_OF, which);
        places.q = rows(q, table, axes, Q, which).of(group);
        places.k = rows(k, table, axes, KEY, which);
        places.v = rows(v, table, axes, V, which);
        places.o = rows(o, table, axes, O, which).of(group);
        places.bonus = rows(bonus, table, axes, BONUS_OF, which).of(group);
        places.gate = gate, places.gate_row = {gate.begin, 0, 0, gate.row};
        places.wide_q = in_vectors(places.q), places.wide_k = in_vectors(places.k);
        places.wide_v = in_vectors(places.v), places.wide_o = in_vectors(places.o);
        places.wide_gate = in_vectors(GATE == STEP ? places.gate_row : places.gate);
    }
    __syncthreads();  // the places are known

    // What earlier pieces add to the state, and their decays.
    const auto sum_of = [&](int p, int i) -> real& {
        const int column_blocks = (columns + VALUES - 1) / VALUES;
        const size_t block = (size_t(places.which) * column_blocks + places.column_block) * stored + p;
        return sums[(block * (KEYS / 2) + i) * THREADS + threadIdx.x];
    };
    const auto of_keys = [&](real* x, int p) { return x + (size_t(places.which) * stored + p) * KEYS; };
    const auto warp_column = [&]() { return places.first_column + int(threadIdx.x) / 32 * 16; };

    const auto begin_piece = [&]() {
        const real* state = rows(S, table, axes, STATE, places.which).begin;
        const auto weights = rows(z, table, axes, Z, places.which);
        const int first = warp_column();
        memory.each_stored([&](int row, int column, float& x) {
            x = !STATES && row < K && first + column < columns ? state[row * columns + first + column] : 0;
        });
        #pragma unroll 1
        for (int row = threadIdx.x; row < KEYS; row += THREADS) {
            room.z[row] = NORMALIZE && !STATES && row < K ? weights.at(0, row) : 0;
            room.product[row] = 1;
        }
        #pragma unroll 1
        for (int p = 0; p < places.piece && !STATES; p++) {
            #pragma unroll 1
            for (int row = threadIdx.x; row < KEYS; row += THREADS) {
                room.total[row] = GATE ? of_keys(piece_decays, p)[row] : 1;
                if (NORMALIZE) room.z[row] = kept(room.total[row], room.z[row]) + of_keys(z_sums, p)[row];
            }
            __syncthreads();  // the decay of the piece is there
            int i = 0;
            memory.each_stored([&](int key, int, float& x) { x = kept(room.total[key], x) + sum_of(p, i++); });
            __syncthreads();  // and nobody looks at it any more
        }
    };
    const auto bring = [&](int stage, int t, int count, int gates) {
        const Places& at = places;
        if (!STATES) fetch<THREADS>(room.q_in[stage], at.q, t, 0, count, K, at.wide_q);
        fetch<THREADS>(room.k_in[stage], at.k, t, 0, count, K, at.wide_k);
        fetch<THREADS>(room.v_in[stage], at.v, t, at.first_column, count, columns - at.first_column, at.wide_v);
        if (GATE == STEP) fetch(room.gates[stage], at.gate_row, 0, t, 1, gates, at.wide_gate && t % 4 == 0);
        if (GATE == CHANNEL) fetch<THREADS>(room.decays[stage], at.gate, t, 0, gates, K, at.wide_gate);
        close_copies();
    };
    // The decay of one token before all else: where it leaves nothing, not even a NaN is left.
    const auto decay_now = [&](int t) {
        #pragma unroll 1
        for (int row = threadIdx.x; row < KEYS; row += THREADS) {
            const float decay = row < K ? exp2f(LOG2E * places.gate.at(t, GATE == STEP ? 0 : row)) : 0;
            room.z[row] = kept(decay, room.z[row]);
            room.product[row] = kept(decay, room.product[row]);
            room.total[row] = decay;
        }
        __syncthreads();  // the decay is there
        memory.decay(room.total);
    };

    begin_piece();
    const auto border_after = [&](int t) {  // of chunks
        return min(places.end, places.begin + ((t - places.begin) / CHUNK + 1) * CHUNK);
    };
    int t = places.begin, count = min(CHUNK, places.end - t), stage = 0;
    bool missing = true;  // the tokens have not been sent for
    bool one_by_one = false, alone = false;  // a token is taken alone; alone: the whole piece is taken so
    while (t < places.end) {
        const int chunk_end = border_after(t), next = min(CHUNK, places.end - chunk_end);
        if (missing) {
            const bool decayed = GATE && one_by_one && !BONUS;
            if (decayed) decay_now(t);
            bring(stage, t, count, decayed ? 0 : count);
        }
        const bool part = t + count < chunk_end || (t - places.begin) % CHUNK != 0 || one_by_one;
        finish_copies<0>();
        __syncthreads();  // this chunk is there, and nobody is left at the last one
        if (DIRECT_KEYS && next && !part) bring(1 - stage, chunk_end, next, next);
        prepare(room, stage, places.bonus);
        const Keys keys = source<DIRECT_KEYS>(room.k, room.k_in[stage]);
        const Keys queries = source<DIRECT_KEYS>(room.q, room.q_in[stage]);
        const Values values = source<DIRECT>(room.v, room.v_in[stage]);
        if (!DIRECT || GATE || BONUS) __syncthreads();  // sums, terms and parts of scores are there
        if (!DIRECT_KEYS && next && !part) bring(DIRECT ? 1 - stage : stage, chunk_end, next, next);

        Sum answers[BLOCKS][2] = {};
        const auto since = [&](int i) { return GATE == STEP ? room.from_start[i] : 1; };
        if (!STATES && GATE != CHANNEL) score(room, queries, keys);
        if (!STATES && GATE == CHANNEL) add_parts(room);
        if (!STATES) {
            memory.recall(answers, room, queries);  // while others make scores
            #pragma unroll
            for (int block = 0; block < BLOCKS; block++)
                for (int n = 0; n < 2; n++)
                    each(answers[block][n], [&](int i, int, float& x) { x *= since(16 * block + i); });
            __syncthreads();  // all scores are there
            if (NORMALIZE) {
                sum_rows(
                    KEYS + CHUNK,
                    [&](int i, int n) {
                        if (n < KEYS) return since(i) * queries.at(i, n) * room.z[n];
                        return n - KEYS <= i ? room.scores.at(i, n - KEYS) : 0;
                    },
                    [&](int i, float sum) { room.weights[i] = sum; });
                __syncthreads();  // all weights are there
            }
            weigh(answers, room, values);
            float spoilt = 0;  // zero times each answer, added up
            #pragma unroll
            for (int block = 0; block < BLOCKS; block++)
                for (int n = 0; n < 2; n++)
                    each(answers[block][n], [&](int i, int, float& x) {
                        const int token = 16 * block + i;
                        const float weight = NORMALIZE ? room.weights[token] : 1;
                        x = !NORMALIZE ? scale * x : weight == 0 ? 0 : x / weight;
                        if (token < count) spoilt = fma(0.0f, x, spoilt);
                    });
            const auto bad_answer = [&](int token) {
                bool found = false;
                #pragma unroll
                for (int block = 0; block < BLOCKS; block++)
                    for (int n = 0; n < 2; n++)
                        each(answers[block][n], [&](int i, int, float& x) { found |= 16 * block + i == token && bad(x); });
                return found;
            };
            const auto bad_value = [&](int token) {
                return threadIdx.x < VALUES && bad(values.at(token, threadIdx.x));
            };
            if (__syncthreads_or(spoilt != 0) && !one_by_one) {
                int good = 0;
                while (good < count && !__syncthreads_or(bad_value(good))) good++;
                if (good == count)  // no value is to blame
                    for (good = 0; good < count && !__syncthreads_or(bad_answer(good));) good++;
                finish_copies<0>();  // they go where this chunk is sent again
                missing = true, one_by_one = good == 0, count = max(good, 1);
                continue;
            }
            const Rows<data>& answer = places.o;
            const int first = warp_column();
            #pragma unroll
            for (int block = 0; block < BLOCKS; block++)
                if (places.wide_o && first + 16 <= columns)
                    store_columns(answers[block], answer, t + 16 * block, first, count - 16 * block);
                else
                    for (int n = 0; n < 2; n++)
                        each(answers[block][n], [&](int i, int j, float& x) {
                            const int token = 16 * block + i, column = first + 8 * n + j;
                            if (token < count && column < columns) put(answer.at(t + token, column), x);
                        });
        }

        const float* total = room.total;
        memory.memorise(room, keys, values);
        #pragma unroll 1
        for (int row = threadIdx.x; row < KEYS; row += THREADS) {
            const float decay = GATE ? total[GATE == STEP ? 0 : row] : 1;
            float sum = 0;
            for (int i = 0; i < CHUNK && NORMALIZE; i++) sum += (GATE == STEP ? room.to_end[i] : 1) * keys.at(i, row);
            room.z[row] = kept(decay, room.z[row]) + sum;
            room.product[row] = kept(decay, room.product[row]);
        }
        const int border = border_after(t);
        t += count;
        if (part) __syncthreads();  // nobody looks at this part any more
        if (STATES && GATE && !alone && t == places.end && __syncthreads_or(memory.is_bad())) {
            begin_piece();  // a gate may forget what is bad, if it is not multiplied by zero
            alone = true, t = places.begin;
        } else if (DIRECT && t == border) {
            stage = 1 - stage;
        }
        missing = part || alone;
        one_by_one = alone || t < border;
        count = one_by_one ? 1 : min(CHUNK, places.end - border);
    }

    const int which = places.which, group = places.group, first = warp_column();
    const bool last = places.end == tokens;
    real* state_next = rows(S_next, table, axes, STATE_NEXT, which).begin;
    const auto weights_next = rows(z_next, table, axes, Z_NEXT, which);
    if (STATES) {
        int i = 0;
        memory.each_stored([&](int, int, float& x) { sum_of(places.piece, i++) = x; });
    } else if (last && group == 0) {
        memory.each_stored([&](int row, int column, float& x) {
            if (row < K && first + column < columns) state_next[row * columns + first + column] = x;
        });
    }
    #pragma unroll 1
    for (int row = threadIdx.x; row < KEYS && places.column_block == 0 && group == 0; row += THREADS) {
        if (STATES && GATE) of_keys(piece_decays, places.piece)[row] = room.product[row];
        if (STATES && NORMALIZE) of_keys(z_sums, places.piece)[row] = room.z[row];
        if (!STATES && NORMALIZE && last && row < K) weights_next.at(0, row) = room.z[row];
    }
}
