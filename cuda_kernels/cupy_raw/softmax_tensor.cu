// Softmax attention on tensor cores, for data of 16 bits: tiles of ROWS queries meet tiles of PAIRS pairs, newest
// first, while the next pairs are on their way.
//
// Each of four warps has ROWS / 4 queries. Logits, weights and answers stay in registers, spread as tensor.cuh says;
// what a query sees, and the sum of its gates, is kept by the lane of its number. Weights are rounded to the format of
// the data before they are added up, so that the answer is a mean.
//
// A weight is exp2(slope x - shift). The shift of a row is its top so far, or up to 2^SLACK less: so answers are scaled
// seldom, and by what the row itself has seen. Whatever spares work where a tile is seen by all gives the same bits.

enum { Q, KEY, V, POSITION, COUNT, GATE, O };
enum { TALL = ROWS / 64, SLACK = 8, CROWD = 16 };
const real LOG2E = real(1.4426950408889634), FAR = 1 << 24, SMALLEST = real(1.17549435e-38);
typedef Tile<data, ROWS, KD> Queries;
typedef Tile<data, PAIRS, KD> Keys;
typedef Tile<data, PAIRS, VD> Values;
#if PAIRS == 32
typedef unsigned Bits;  // one for each pair of a tile
#else
typedef unsigned long long Bits;
#endif
typedef Sum Scores[TALL][PAIRS / 8];
typedef Sum Answers[TALL][VD / 8];
struct Ages {  // of the pairs of a tile: gates, the sum of those after each, of all, and of all down to this tile
    double gates[PAIRS], whole, deepest;
    real after[PAIRS];
};

// ---- copies ---------------------------------------------------------------------------------------------------------

// A tile, 16 bytes a lane and eight lanes a row, so that every address is another and a constant. Rows of a thread are
// 16 apart: those i below its first begin at row_at(i).
template <class TileType, class RowAt>
__device__ __forceinline__ void copy_rows(TileType tile, RowAt row_at) {
    const int column = threadIdx.x % 8 * 8;
    data* to = &tile.at(threadIdx.x / 8, column);
    #pragma unroll
    for (int i = 0; i < TileType::rows; i += 16) {
        const unsigned char* at = row_at(i);
        #pragma unroll
        for (int c = 0; c < TileType::columns; c += 64)
            if (c + 64 <= TileType::columns || c + column < TileType::columns)
                copy_later(to + (i * TileType::stride + c), at + c * sizeof(data), 16);
    }
}
// What a thread copies of the tiles of an array: its own 16 bytes of the first row, and bytes from row to row.
struct Lane {
    const unsigned char* at;
    int row;

    template <class TileType>
    __device__ __forceinline__ void copy(TileType tile, int start) const {
        const unsigned char* first = at + (long long)start * row;
        copy_rows(tile, [&](int i) { return first + (long long)i * row; });
    }
};
// Keys, or the values of this block, of all pairs of a memory: columns from `first` on, up to so many.
struct Source {
    Rows<const data> rows;
    int first, columns;

    template <class TileType>
    __device__ __forceinline__ bool whole() const {  // whether tiles are copied 16 bytes at a time
        return in_vectors(rows) && first + TileType::columns <= columns && rows.row < 1 << 30 && rows.row > -(1 << 30);
    }
    __device__ __forceinline__ Lane lane() const {
        const data* at = rows.begin + threadIdx.x / 8 * rows.row + first + threadIdx.x % 8 * 8;
        return {reinterpret_cast<const unsigned char*>(at), int(rows.row) * int(sizeof(data))};
    }
    template <class TileType>
    __device__ __forceinline__ void bring(TileType tile, int start, int pairs) const {  // zeros beyond the last
        fetch(tile, rows, start, first, pairs - start, columns - first, in_vectors(rows));
    }
};
// Row r of the block is step r / groups of sequence r % groups; nobody looks at rows beyond the last.
__device__ __forceinline__ void bring_queries(Queries tile, const Rows<const data>& from, int first, int end,
                                              int groups, int channels) {
    const auto row_at = [&](int row) { return &from.of((first + row) % groups).at((first + row) / groups, 0); };
    const auto lane_at = [&](int i) {
        const data* at = row_at(min(int(threadIdx.x) / 8 + i, end - 1 - first)) + threadIdx.x % 8 * 8;
        return reinterpret_cast<const unsigned char*>(at);
    };
    if (channels == KD && in_vectors(from) && from.group % 8 == 0) return copy_rows(tile, lane_at);
    #pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * KD; i += 128) {
        const int row = i / KD, c = i % KD;
        tile.at(row, c) = first + row < end && c < channels ? row_at(row)[c * from.column] : data{};
    }
}

// ---- gates ----------------------------------------------------------------------------------------------------------

// The gates of a tile, by one warp: those of pairs `lane` and lane + 32.
struct Gates {
    real of[PAIRS / 32];

    __device__ __forceinline__ void look(const Pairs& pairs, int start) {
        for (int part = 0; part < PAIRS / 32; part++) {
            const int pair = start + 32 * part + int(threadIdx.x % 32);
            of[part] = start >= 0 && pair < pairs.pairs ? real(pairs.gate_of(pair)) : real(0);
        }
    }
    __device__ __forceinline__ void add_up(Ages& ages, double newer) const {  // the sum of those newer than the tile
        const int lane = threadIdx.x % 32;
        double whole = 0;
        #pragma unroll
        for (int part = PAIRS / 32 - 1; part >= 0; part--) {
            double total = of[part], after = 0;
            for (int distance = 1; distance < 32; distance *= 2) {
                const double other = __shfl_xor_sync(0xffffffffu, total, distance);
                after += lane & distance ? 0.0 : other;
                total += other;
            }
            ages.gates[32 * part + lane] = of[part], ages.after[32 * part + lane] = real(after + whole) * LOG2E;
            whole += total;
        }
        if (lane == 0) ages.whole = whole, ages.deepest = newer + whole;
    }
};

// ---- what a row sees ------------------------------------------------------------------------------------------------

// A row of the warp, with the lane of its number: its newest pair, where its window begins, and the sum of the gates
// newer than the tile.
struct Sight {
    int last;
    long long oldest;
    double since;

    // Which pairs of a tile it sees, a bit each.
    __device__ __forceinline__ Bits seen(const Pairs& pairs, const Ages& ages, int start) const {
        Bits bits = 0;
        double total = since;
        long long place_of_lane = 0;
        #pragma unroll 8
        for (int j = PAIRS - 1; j >= 0; j--) {
            if (j % 32 == 31) place_of_lane = pairs.place(min(start + j - 31 + int(threadIdx.x % 32), pairs.pairs - 1));
            const long long place = __shfl_sync(0xffffffffu, place_of_lane, j % 32);
            if (start + j > last) continue;
            const bool inside = place >= 0 && (place >= oldest || place < pairs.sinks);
            if (inside && !(total < NOTHING / 2)) bits |= Bits(1) << j;
            if (GATED) total += ages.gates[j];
        }
        return bits;
    }
    __device__ __forceinline__ void pass(const Ages& ages, int start) {
        if (last >= start + PAIRS - 1)
            since += ages.whole;
        else
            for (int j = 0; j <= last - start; j++) since += ages.gates[j];
    }
};
// Row 16 m + 8 half + lane / 4 of the warp, of which this lane has a share.
template <class T>
__device__ __forceinline__ T of_row(T x, int m, int half) {
    return __shfl_sync(0xffffffffu, x, 16 * m + 8 * half + threadIdx.x % 32 / 4);
}

// ---- products -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void multiply_keys(Scores& score, Queries all, Keys keys) {
    const Tile<data, 16 * TALL, KD> queries = {&all.at(threadIdx.x / 32 * (16 * TALL), 0)};  // of this warp
    #pragma unroll
    for (int c = 0; c < KD; c += 16) {
        Left<data, 1> left[TALL];
        #pragma unroll
        for (int m = 0; m < TALL; m++) load_left(left[m], queries, 16 * m, c);
        #pragma unroll
        for (int n = 0; n < PAIRS / 8; n += 2) {
            Right<data, 1> right[2];
            load_right_transposed(right, keys, n * 8, c);
            #pragma unroll
            for (int m = 0; m < TALL; m++)
                for (int i = 0; i < 2; i++) multiply_onto(score[m][n + i], left[m], right[i]);
        }
    }
}
// And the sums of the weights, as products with ones: what tensor cores cut, they cut from both.
__device__ __forceinline__ void multiply_values(Answers& answer, Sum (&weight)[TALL], const Scores& score,
                                                Values values) {
    Right<data, 1> ones;
    ones.x[0][0] = ones.x[0][1] = packed<data>(1, 1);
    #pragma unroll
    for (int j = 0; j < PAIRS / 8; j += 2) {
        Left<data, 1> left[TALL];
        #pragma unroll
        for (int m = 0; m < TALL; m++) {
            left_of(left[m], score[m][j], score[m][j + 1]);
            multiply_onto(weight[m], left[m], ones);
        }
        #pragma unroll
        for (int n = 0; n < VD / 8; n += 2) {
            Right<data, 1> right[2];
            load_right(right, values, j * 8, n * 8);
            #pragma unroll
            for (int m = 0; m < TALL; m++)
                for (int i = 0; i < 2; i++) multiply_onto(answer[m][n + i], left[m], right[i]);
        }
    }
}

// ---- logits ---------------------------------------------------------------------------------------------------------

// Numbers of a row: use(number, column).
template <class Use>
__device__ __forceinline__ void along_row(Scores& score, int m, int half, Use use) {
    #pragma unroll
    for (int n = 0; n < PAIRS / 4; n++)
        use(score[m][n / 2].x[2 * half + n % 2], n / 2 * 8 + int(threadIdx.x) % 4 * 2 + n % 2);
}
// The gates between a pair and a row whose newest pair is in the tile, one after the other.
__device__ __forceinline__ void add_own_gates(Scores& score, int m, int half, real width, const Ages& ages,
                                              int newest) {
    const int pair = threadIdx.x % 4 * 2;
    double total = 0;
    #pragma unroll
    for (int n = PAIRS / 8 - 1; n >= 0; n--) {
        real first = 0, second = 0;
        #pragma unroll 1
        for (int i = 7; i >= 0; i--) {
            if (i == pair + 1) second = real(total) * LOG2E;
            if (i == pair) first = real(total) * LOG2E;
            if (8 * n + i <= newest) total += ages.gates[8 * n + i];
        }
        real(&x)[4] = score[m][n].x;
        x[2 * half] = fma(width, x[2 * half], first), x[2 * half + 1] = fma(width, x[2 * half + 1], second);
    }
}
__device__ __forceinline__ void add_gates(Scores& score, real width, const Ages& ages, const Sight& sight, int start) {
    const real own = bias_of(sight.since) * LOG2E;
    #pragma unroll
    for (int r = 0; r < 2 * TALL; r++) {
        const real since = of_row(own, r / 2, r % 2);
        const int newest = of_row(sight.last, r / 2, r % 2) - start;
        if (newest < PAIRS - 1)
            add_own_gates(score, r / 2, r % 2, width, ages, newest);
        else
            along_row(score, r / 2, r % 2, [&](real& x, int j) { x = fma(width, x, since + ages.after[j]); });
    }
}

__device__ __forceinline__ void scale(Scores& score, real factor) {
    for (int m = 0; m < TALL; m++)
        for (int n = 0; n < PAIRS / 8; n++)
            for (int i = 0; i < 4; i++) score[m][n].x[i] *= factor;
}
// What rows do not see; `own` says what that of this lane does.
__device__ __forceinline__ void hide(Scores& score, Bits own) {
    #pragma unroll
    for (int r = 0; r < 2 * TALL; r++) {
        const Bits seen = of_row(own, r / 2, r % 2);
        along_row(score, r / 2, r % 2, [&](real& x, int j) { x = seen >> j & 1 ? x : -infinite(); });
    }
}

// ---- weights --------------------------------------------------------------------------------------------------------

struct Softmax {
    Answers answer;
    Sum weight[TALL];
    real sign, width;  // scale = sign width, and the width is above zero
    real slope[TALL][2], shift[TALL][2], limit[TALL][2];
    bool far;  // whether a row of this thread is; it rounds its logits, lest a product less its rounded value be large

    __device__ __forceinline__ void begin(real scale) {
        const real size = fabsf(scale);
        sign = size < SMALLEST ? 0 : scale < 0 ? -1 : 1, width = sign == 0 ? real(1) : size, far = false;
        for (int m = 0; m < TALL; m++) {
            weight[m] = {};
            for (int n = 0; n < VD / 8; n++) answer[m][n] = {};
            for (int half = 0; half < 2; half++)
                slope[m][half] = GATED ? real(1) : width, shift[m][half] = 0, limit[m][half] = -infinite();
        }
    }
    // Gates come with logits that are scaled; `own` says what the row of this lane sees, and `plain` that all rows see
    // all.
    __device__ __forceinline__ void logits(Scores& score, Bits own, bool plain, const Ages& ages, const Sight& sight,
                                           int start) {
        if (sign != 1) scale(score, sign);
        if (GATED) add_gates(score, width, ages, sight, start);
        if (!plain) hide(score, own);
        if (!GATED && far)
            for (int r = 0; r < 2 * TALL; r++) settle(score, r / 2, r % 2);
    }
    __device__ __forceinline__ void weigh(Scores& score) {
        real top[TALL][2];
        bool higher = false;
        #pragma unroll
        for (int r = 0; r < 2 * TALL; r++) {
            real& highest = top[r / 2][r % 2] = -infinite();
            along_row(score, r / 2, r % 2, [&](real x, int) { highest = fmaxf(highest, x); });
            highest *= slope[r / 2][r % 2];
            higher |= highest > limit[r / 2][r % 2];
        }
        if (__any_sync(0xffffffffu, higher)) {
            #pragma unroll
            for (int r = 0; r < 2 * TALL; r++) raise(score, r / 2, r % 2, top_of_row(top[r / 2][r % 2]));
        }
        #pragma unroll
        for (int r = 0; r < 2 * TALL; r++) {
            const real a = slope[r / 2][r % 2], b = shift[r / 2][r % 2];
            along_row(score, r / 2, r % 2, [&](real& x, int) { x = exp2(fma(a, x, -b)); });
        }
    }
    __device__ __forceinline__ void settle(Scores& score, int m, int half) {
        if (fabsf(shift[m][half]) < FAR) return;
        along_row(score, m, half, [&](real& x, int) { x *= width; });
        slope[m][half] = 1;
    }
    __device__ __forceinline__ void raise(Scores& score, int m, int half, real top) {
        if (!(top > limit[m][half])) return;
        const real kept = limit[m][half] == -infinite() ? real(0) : exp2(shift[m][half] - top);
        const bool settled = fabsf(shift[m][half]) >= FAR;
        shift[m][half] = top, limit[m][half] = top + SLACK;
        #pragma unroll
        for (int n = 0; n < VD / 8; n++)
            for (int i = 0; i < 2; i++) answer[m][n].x[2 * half + i] *= kept;
        for (int i = 0; i < 2; i++) weight[m].x[2 * half + i] *= kept;
        if (!GATED && !settled && fabsf(top) >= FAR) far = true, settle(score, m, half);
    }
};

// ---- values that are not finite -------------------------------------------------------------------------------------

// Zeros in their place, so that no weight of zero meets them; `bad` says of which pairs, and the answer whether of any
// here.
__device__ __forceinline__ bool clean(Values values, bool (&bad)[PAIRS]) {
    struct alignas(16) Eight {
        data x[8];
    };
    int any = 0;
    #pragma unroll 1
    for (int pair = threadIdx.x / 4; pair < PAIRS; pair += 32) {
        int found = 0;
        #pragma unroll 1
        for (int c = threadIdx.x % 4 * 8; c < VD; c += 32) {
            const Eight eight = reinterpret_cast<const Eight&>(values.at(pair, c));
            for (int i = 0; i < 8; i++) {
                const real x = widened(eight.x[i]);
                if (x - x != 0) found = 1, values.at(pair, c + i) = data{};
            }
        }
        for (int distance = 1; distance < 4; distance *= 2) found |= __shfl_xor_sync(0xffffffffu, found, distance);
        if (threadIdx.x % 4 == 0) bad[pair] = found;
        any |= found;
    }
    return any;
}
// Such a value turns to NaN those queries that see it, and no others.
__device__ __forceinline__ void spoil(Answers& answer, const bool (&bad)[PAIRS], Bits own, const Source& value,
                                      int start) {
    Bits seen[2 * TALL];
    for (int r = 0; r < 2 * TALL; r++) seen[r] = of_row(own, r / 2, r % 2);
    const int column = value.first + threadIdx.x % 4 * 2;
    #pragma unroll 1
    for (int j = 0; j < PAIRS; j++) {
        if (!bad[j]) continue;
        const data* at = &value.rows.at(start + j, column);
        #pragma unroll
        for (int n = 0; n < VD / 4; n++) {
            const bool there = column + n / 2 * 8 + n % 2 < value.columns;
            const real x = there ? widened(at[n % 2 * value.rows.column]) : real(0), nan = x - x;
            if (n % 2) at += 8 * value.rows.column;
            for (int r = 0; r < 2 * TALL; r++)
                answer[r / 2][n / 2].x[r % 2 * 2 + n % 2] += seen[r] >> j & 1 ? nan : real(0);
        }
    }
}

// ---- the whole ------------------------------------------------------------------------------------------------------

// Some rows next to each other: which tiles all of them see without looking, and the newest pair of any.
struct Band {
    int full, recent, newest;

    __device__ __forceinline__ bool sees(int start) const { return start + PAIRS <= full && start >= recent; }
};
__device__ __forceinline__ Band band_of(const Pairs& pairs, int first, int rows, int groups, bool causal) {
    const int end = groups * pairs.tokens, low = first / groups, high = (min(first + rows, end) - 1) / groups;
    return {pairs.placed ? 0 : causal ? low + 1 : pairs.pairs, pairs.window ? high + 1 - pairs.window : 0,
            first >= end ? -1 : causal ? high : pairs.pairs - 1};
}
__device__ __forceinline__ Sight sight_of(const Pairs& pairs, int row, int groups, bool causal) {
    const bool there = row < groups * pairs.tokens;
    const int step = row / groups;
    return {!there ? -1 : causal ? step : pairs.pairs - 1,
            there && pairs.window ? pairs.memorised(step) - pairs.window : 0, 0.0};
}
// Answers of a row of the block, and what they are divided by.
__device__ __forceinline__ void write(const Rows<data>& out, int step, const Sum* answer, int half, real weight,
                                      int first, int columns) {
    const real share = weight != 0 ? 1 / weight : real(1);
    const bool twos = out.column == 1 && (size_t)out.begin % 4 == 0 && out.row % 2 == 0 && columns % 2 == 0;
    const int whole = twos ? columns : 0, single = twos ? 0 : columns;  // columns that are written so
    int column = first + threadIdx.x % 4 * 2;
    data* at = &out.at(step, column);
    #pragma unroll
    for (int n = 0; n < VD / 8; n++, column += 8, at += 8 * out.column) {
        real x[2];
        for (int i = 0; i < 2; i++) x[i] = answer[n].x[2 * half + i] * share, x[i] = fma(x[i], real(0), x[i]);
        const unsigned both = packed<data>(x[0], x[1]);  // of infinities, which became NaN
        if (column < whole) *reinterpret_cast<unsigned*>(at) = both;
        if (column < single) at->bits = both & 0xffff;
        if (column + 1 < single) at[out.column].bits = both >> 16;
    }
}

// Which memory a block has, and its number there. The longest pasts of CROWD memories or fewer come first, so that the
// last blocks to begin are short; and blocks that run at a time share keys and values in the cache.
struct Place {
    int memory, number;
};
__device__ __forceinline__ Place place_of(int block, int memories, int blocks) {
    const int crowds = (memories + CROWD - 1) / CROWD, even = (memories + crowds - 1) / crowds;
    const int first = block / (even * blocks) * even, rest = block % (even * blocks);
    const int size = min(even, memories - first);
    return {first + rest % size, blocks - 1 - rest / size};
}

// What all threads share. It is in shared memory, for what is seldom needed should not be in registers.
struct Block {
    Source keys, values;
    Pairs pairs;
    Band all;
    int begin, front;  // of the window of the first row; behind the sinks
    bool whole;        // whether tiles come as whole rows of 16 bytes

    __device__ __forceinline__ void look(int first, int groups, bool causal) {
        begin = pairs.begin(first / groups), front = pairs.front();
        all = band_of(pairs, first, ROWS, groups, causal);
        whole = keys.whole<Keys>() && values.whole<Values>();
    }
    __device__ __forceinline__ int before(int tile) const {  // the tile to look at next; gates are added up over all
        const bool gap = !GATED && tile * PAIRS <= begin && (tile - 1) * PAIRS >= front;
        return gap ? (front + PAIRS - 1) / PAIRS - 1 : tile - 1;
    }
};
// The shared memory of a launch.
struct Room {
    Queries queries;
    unsigned char* at;

    __device__ __forceinline__ Keys keys(int turn) const {
        return {(data*)(at + turn * (Keys::bytes + Values::bytes))};
    }
    __device__ __forceinline__ Values values(int turn) const { return {keys(turn).begin + Keys::bytes / sizeof(data)}; }
};
struct Stream {
    Lane keys, values;

    __device__ __forceinline__ void bring(const Room& room, const Block& block, int tile, int turn) const {
        const int start = tile * PAIRS, pairs = block.pairs.pairs;
        if (block.whole && start + PAIRS <= pairs) {
            keys.copy(room.keys(turn), start), values.copy(room.values(turn), start);
        } else {
            block.keys.bring(room.keys(turn), start, pairs);
            block.values.bring(room.values(turn), start, pairs);
        }
        close_copies();
    }
};

extern "C" __global__ void __launch_bounds__(128, 2)
softmax_tensor(const data* q, const data* k, const data* v, const long long* position, const long long* count,
               const logs* log_decay, data* o, const long long* table, int axes, int tokens, int columns, int channels,
               int pairs, int groups, int blocks, int parts, int causal, int window, int sinks, real width) {
    __shared__ Block block;
    __shared__ Sight sights[128];
    __shared__ bool bad[PAIRS];
    __shared__ Ages ages[2];
    Room room;
    room.at = dynamic_shared(), room.queries = tile_of<Queries>(room.at);
    const Place place = place_of(blockIdx.x, gridDim.x / blocks, blocks);
    const int memory = place.memory, first_column = place.number % parts * VD, first = place.number / parts * ROWS;
    const int lane = threadIdx.x % 32, own_first = first + threadIdx.x / 32 * (16 * TALL);
    if (threadIdx.x == 0) {
        block.keys = {rows(k, table, axes, KEY, memory), 0, channels};
        block.values = {rows(v, table, axes, V, memory), first_column, columns};
        block.pairs = {rows(position, table, axes, POSITION, memory), rows(count, table, axes, COUNT, memory),
                       rows(log_decay, table, axes, GATE, memory), {},
                       position != nullptr, count != nullptr, bool(GATED), 0, pairs, tokens, window, sinks};
        block.look(first, groups, causal);
    }
    bring_queries(room.queries, rows(q, table, axes, Q, memory), first, groups * tokens, groups, channels);
    __syncthreads();  // what all share is there

    const Band mine = band_of(block.pairs, own_first, 16 * TALL, groups, causal);
    const Stream stream = {block.keys.lane(), block.values.lane()};
    Sight& sight = sights[threadIdx.x] = sight_of(block.pairs, own_first + lane, groups, causal);
    Softmax softmax;
    softmax.begin(width);
    Gates gates;
    int tile = block.all.newest / PAIRS, turn = 0;
    stream.bring(room, block, tile, 0);
    if (GATED && threadIdx.x < 32) gates.look(block.pairs, tile * PAIRS), gates.add_up(ages[0], 0);

    #pragma unroll 1
    for (; tile >= 0; turn ^= 1) {
        const int next = block.before(tile), start = tile * PAIRS;
        finish_copies<0>();
        __syncthreads();  // the tile is there, and nobody is left at the one before it, whose place the next one takes
        if (next >= 0) stream.bring(room, block, next, turn ^ 1);
        if (GATED && threadIdx.x < 32) gates.look(block.pairs, next * PAIRS);
        const bool level = !GATED || ages[turn].deepest >= NOTHING / 2, plain = level && mine.sees(start);
        // Behind this barrier no weight of zero meets what is not finite.
        const bool spoilt = !(level && block.all.sees(start)) && __syncthreads_or(clean(room.values(turn), bad));
        if (start <= mine.newest) {
            Scores score = {};
            const Bits own = plain ? ~Bits(0) : sight.seen(block.pairs, ages[turn], start);
            multiply_keys(score, room.queries, room.keys(turn));
            softmax.logits(score, own, plain, ages[turn], sight, start);
            softmax.weigh(score);
            multiply_values(softmax.answer, softmax.weight, score, room.values(turn));
            if (spoilt) spoil(softmax.answer, bad, own, block.values, start);
            if (GATED) sight.pass(ages[turn], start);
        }
        if (GATED && threadIdx.x < 32) gates.add_up(ages[turn ^ 1], ages[turn].deepest);
        tile = next;
    }
    const auto out = rows(o, table, axes, O, memory);
    #pragma unroll
    for (int r = 0; r < 2 * TALL; r++) {
        const int m = r / 2, half = r % 2, row = own_first + 16 * m + 8 * half + lane / 4;
        if (row < groups * tokens)
            write(out.of(row % groups), row / groups, softmax.answer[m], half, softmax.weight[m].x[2 * half],
                  block.values.first, columns);  // which the walk need not keep in a register
    }
}
