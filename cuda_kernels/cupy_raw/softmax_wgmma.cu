// Softmax attention on the tensor cores of Hopper, for data of 16 bits: see wgmma.cuh for its products.
//
// A block has 64 rows of queries for each of CONSUMERS warpgroups, and one more warpgroup brings tiles of PAIRS keys
// and values, newest first, to STAGES places each. The products of a tile's weights with its values go on while the
// logits of the next tile become weights. Logits, weights and answers stay in registers.
//
// A weight is exp2(width x - shift), where the shift is the top of the row so far. It is rounded to the format of the
// data where it meets the values, but not where weights are added up: the errors are of either sign.

enum { Q, KEY, V, O };
enum { ROWS = 64 * CONSUMERS, CROWD = 16, BLIND = (ROWS - 2) / PAIRS + 2 };  // the last: tiles that rows see in part
const real FAR = 1 << 24;
typedef Swizzled<data, ROWS, KD> Queries;
typedef Swizzled<data, PAIRS, KD> Keys;
typedef Swizzled<data, PAIRS, VD> Values;
typedef Swizzled<data, ROWS, VD> Results;
typedef float Scores[PAIRS / 2];
typedef float Answers[VD / 2];
typedef unsigned Weights[PAIRS / 16][4];

// ---- what all warpgroups share --------------------------------------------------------------------------------------

struct Room {  // the shared memory of a launch
    static constexpr int rows = Queries::bytes > Results::bytes ? Queries::bytes : Results::bytes;
    unsigned char* at;

    __device__ __forceinline__ Queries queries() const { return {at}; }
    __device__ __forceinline__ Results results() const { return {at}; }  // of a warp where its queries were
    __device__ __forceinline__ Keys keys(int stage) const { return {at + rows + stage * Keys::bytes}; }
    __device__ __forceinline__ Values values(int stage) const {
        return {at + rows + STAGES * Keys::bytes + stage * Values::bytes};
    }
};
struct Barriers {
    Barrier keys[STAGES], values[STAGES];            // what is there
    Barrier free_keys[STAGES], free_values[STAGES];  // places that nobody needs any more

    __device__ __forceinline__ void set_up_all() {
        for (int i = 0; i < STAGES; i++) {
            set_up(keys[i], 128), set_up(values[i], 128);
            set_up(free_keys[i], 4 * CONSUMERS), set_up(free_values[i], 4 * CONSUMERS);
        }
    }
};
struct Bad {  // pairs of tiles that some rows see in part, whose values are not finite
    bool pair[BLIND][PAIRS];
    int any[BLIND][4];  // for each warp that has looked
};
// What a block does: rows of a memory, and the tiles that any of them sees.
struct Work {
    int first, end, groups, pairs;
    bool causal;

    __device__ __forceinline__ int newest(int row) const {  // the newest pair that a row sees
        return causal ? min(row / groups, pairs - 1) : pairs - 1;
    }
    __device__ __forceinline__ int tiles() const { return newest(min(first + ROWS, end) - 1) / PAIRS + 1; }
    // Tiles of which rows from one on see all.
    __device__ __forceinline__ int whole(int row) const { return (newest(row) + 1) / PAIRS; }
};
// Which memory a block has, and its number there; see softmax_tensor.cu.
struct Place {
    int memory, number;
};
__device__ __forceinline__ Place place_of(int block, int memories, int blocks) {
    const int crowds = (memories + CROWD - 1) / CROWD, even = (memories + crowds - 1) / crowds;
    const int first = block / (even * blocks) * even, rest = block % (even * blocks);
    const int size = min(even, memories - first);
    return {first + rest % size, blocks - 1 - rest / size};
}

// ---- bringing tiles, by 128 threads ---------------------------------------------------------------------------------

struct alignas(16) Piece {
    data x[8];
};
// Rows of an array, from the first of a memory to `end`, and its columns.
struct Source {
    Rows<const data> rows;
    int end, columns;

    __device__ __forceinline__ bool in_pieces() const { return in_vectors(rows) && rows.group % 8 == 0; }
    __device__ __forceinline__ int numbers(int column) const { return max(min(columns - column, 8), 0); }
    // 16 bytes of a row, so many numbers and then zeros: while the program goes on, or at once.
    __device__ __forceinline__ void copy(unsigned char* to, const data* at, int numbers) const {
        copy_later(to, at, numbers * int(sizeof(data)));
    }
    __device__ __forceinline__ void copy_now(unsigned char* to, const data* at, int numbers) const {
        #pragma unroll 1
        for (int i = 0; i < 8; i++, at += rows.column) reinterpret_cast<data*>(to)[i] = i < numbers ? *at : data{};
    }
};
// What a thread brings of a tile: 16 bytes of its first row and of every one `step` rows further down.
template <class Tile>
struct Hand {
    static constexpr int pieces = Tile::columns / 8, step = 128 / pieces;
    int row, column;

    __device__ __forceinline__ Hand() : row(threadIdx.x % 128 / pieces), column(threadIdx.x % pieces * 8) {}
    __device__ __forceinline__ unsigned char* first(Tile tile) const { return tile.piece(row, column); }
};
template <class Tile>
__device__ __forceinline__ void copy(Tile tile, const Source& from, int start, bool pieces) {
    const Hand<Tile> hand;
    unsigned char* to = hand.first(tile);
    const data* at = from.rows.begin + (start + hand.row) * from.rows.row + hand.column * from.rows.column;
    const int left = from.end - start - hand.row, numbers = from.numbers(hand.column);
    if (pieces) {
        #pragma unroll 4
        for (int i = 0; i < Tile::rows; i += Hand<Tile>::step, at += Hand<Tile>::step * from.rows.row)
            from.copy(to + i * 128, at, i < left ? numbers : 0);
    } else {
        #pragma unroll 1
        for (int i = 0; i < Tile::rows; i += Hand<Tile>::step, at += Hand<Tile>::step * from.rows.row)
            from.copy_now(to + i * 128, at, i < left ? numbers : 0);
    }
}
// Say that a thread has brought its part, with copies that may be under way or without.
__device__ __forceinline__ void hand_over(Barrier& there, bool under_way) {
    if (under_way) return arrive_with_copies(there);
    show_to_products();
    arrive(there);
}
// Zeros in place of values that are not finite, so that no weight of zero meets them: each thread in its own part.
__device__ __forceinline__ void clean(Values tile, bool (&bad)[PAIRS], int (&any)[4]) {
    const Hand<Values> hand;
    int found_any = 0;
    close_copies();
    finish_copies<0>();
    #pragma unroll 4
    for (int i = 0; i < PAIRS; i += Hand<Values>::step) {
        Piece& at = reinterpret_cast<Piece&>(*(hand.first(tile) + i * 128));
        Piece piece = at;
        int found = 0;
        for (int j = 0; j < 8; j++) {
            const real x = widened(piece.x[j]);
            if (x - x != 0) found = 1, piece.x[j] = data{};
        }
        if (found) at = piece;
        for (int distance = 1; distance < VD / 8; distance *= 2) found |= __shfl_xor_sync(0xffffffffu, found, distance);
        if (hand.column == 0) bad[hand.row + i] = found;
        found_any |= found;
    }
    found_any = __any_sync(0xffffffffu, found_any);
    if (threadIdx.x % 32 == 0) any[threadIdx.x % 128 / 32] = found_any;
}
// The queries of a warpgroup, by itself.
__device__ __forceinline__ void bring_queries(Queries tile, const Source& from, const Work& work, int group) {
    const Hand<Queries> hand;
    const int numbers = from.numbers(hand.column), first = 64 * group + hand.row;
    const bool pieces = from.in_pieces();
    #pragma unroll 1
    for (int i = first; i < first + 64; i += Hand<Queries>::step) {
        const int row = min(work.first + i, work.end - 1);  // nobody looks at rows beyond the last
        const data* at = &from.rows.of(row % work.groups).at(row / work.groups, hand.column);
        if (pieces)
            from.copy(tile.piece(i, hand.column), at, numbers);
        else
            from.copy_now(tile.piece(i, hand.column), at, numbers);
    }
    close_copies();
    finish_copies<0>();
    show_to_products();
    warpgroup_barrier(group);  // all of them are there
}

// Keys are one tile ahead of values.
__device__ __forceinline__ void produce(const Room& room, Barriers& barriers, const Work& work, const Source& keys,
                                        const Source& values, Bad& bad) {
    const bool keys_in_pieces = keys.in_pieces(), values_in_pieces = values.in_pieces();
    const int tiles = work.tiles(), whole = work.whole(work.first);
    #pragma unroll 1
    for (int turn = 0; turn <= tiles; turn++) {
        if (turn < tiles) {
            const int stage = turn % STAGES;
            if (turn >= STAGES) wait(barriers.free_keys[stage], turn / STAGES - 1 & 1);
            copy(room.keys(stage), keys, (tiles - 1 - turn) * PAIRS, keys_in_pieces);
            hand_over(barriers.keys[stage], keys_in_pieces);
        }
        const int before = turn - 1, stage = before % STAGES, tile = tiles - turn;
        if (before < 0) continue;
        if (before >= STAGES) wait(barriers.free_values[stage], before / STAGES - 1 & 1);
        copy(room.values(stage), values, tile * PAIRS, values_in_pieces);
        const bool blind = work.causal && tile >= whole;
        if (blind) clean(room.values(stage), bad.pair[before], bad.any[before]);
        hand_over(barriers.values[stage], values_in_pieces && !blind);
    }
}

// ---- products, by a warpgroup ---------------------------------------------------------------------------------------

__device__ __forceinline__ void multiply_keys(Scores& score, Matrix queries, Matrix keys) {
    #pragma unroll
    for (int c = 0; c < KD; c += 16)
        Product<data, PAIRS>::begin(score, Queries::part(queries, 0, c), Keys::part(keys, 0, c), int(c > 0));
    close_products();
}
__device__ __forceinline__ void multiply_values(Answers& answer, const Weights& weights, Matrix values) {
    #pragma unroll
    for (int j = 0; j < PAIRS / 16; j++)
        Product<data, VD>::begin(answer, weights[j], Values::part(values, 16 * j, 0));
    close_products();
}

// ---- weights --------------------------------------------------------------------------------------------------------

// Numbers of a row: use(number, column).
template <class Use>
__device__ __forceinline__ void along_row(Scores& score, int half, Use use) {
    #pragma unroll
    for (int n = 0; n < PAIRS / 4; n++) use(score[n / 2 * 4 + 2 * half + n % 2], n / 2 * 8 + n % 2);
}
// What rows `row` and row + 8 of all do not see, of pairs that begin at `start` for this thread.
__device__ __forceinline__ void hide(Scores& score, const Work& work, int row, int start) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int newest = work.newest(row + 8 * half) - start;
        along_row(score, half, [&](real& x, int j) { x = j <= newest ? x : -infinite(); });
    }
}
struct Softmax {
    real width, top[2], weight[2], kept[2];  // of this thread's two rows; weights are those of its own columns

    __device__ __forceinline__ void begin(real scale) {
        width = scale;
        for (int half = 0; half < 2; half++) top[half] = -infinite(), weight[half] = 0;
    }
    // The top of both rows; several numbers at a time, for one waits for the one before it.
    __device__ __forceinline__ void raise(Scores& score, real (&base)[2]) {
        real highest[2][2];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            highest[half][0] = highest[half][1] = top[half];
            along_row(score, half, [&](real x, int j) { highest[half][j % 2] = fmaxf(highest[half][j % 2], x); });
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            real all = fmaxf(highest[half][0], highest[half][1]);
            for (int distance = 1; distance < 4; distance *= 2)
                all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, distance));
            base[half] = all == -infinite() ? real(0) : all;
            kept[half] = exp2((top[half] - base[half]) * width), top[half] = all;
        }
    }
    // Logits to weights, and what is kept of those before.
    __device__ __forceinline__ void weigh(Scores& score) {
        real base[2];
        raise(score, base);
        real shift[2] = {base[0] * width, base[1] * width};
        const bool far[2] = {!(fabsf(shift[0]) < FAR), !(fabsf(shift[1]) < FAR)};
        if (__any_sync(0xffffffffu, far[0] | far[1])) {  // a product less its rounded value would be large
            for (int half = 0; half < 2; half++) {
                along_row(score, half, [&](real& x, int) { x -= far[half] ? base[half] : real(0); });
                shift[half] = far[half] ? real(0) : shift[half];
            }
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            real sum = 0;
            along_row(score, half, [&](real& x, int) { x = exp2(fma(width, x, -shift[half])), sum += x; });
            weight[half] = fma(weight[half], kept[half], sum);
        }
    }
};
__device__ __forceinline__ void keep(Answers& answer, const real (&kept)[2]) {
    #pragma unroll
    for (int i = 0; i < VD / 2; i++) answer[i] *= kept[i / 2 % 2];
}
__device__ __forceinline__ void round_weights(Weights& weights, const Scores& score) {
    #pragma unroll
    for (int i = 0; i < PAIRS / 4; i++) weights[i / 4][i % 4] = packed<data>(score[2 * i], score[2 * i + 1]);
}

// ---- answers --------------------------------------------------------------------------------------------------------

// Where a warp of a warpgroup is: it has 16 rows of the block, and each lane `row` and row + 8 of them.
struct Consumer {
    int group, warp, lane;

    __device__ __forceinline__ int first() const { return 64 * group + 16 * warp; }
    __device__ __forceinline__ int row() const { return first() + lane / 4; }
    __device__ __forceinline__ void free(Barrier& place) const {
        if (lane == 0) arrive(place);
    }
};
// Answers to shared memory, and from there to global memory, 16 bytes at a time where they lie so.
__device__ __forceinline__ void stage(Results to, const Answers& answer, const real (&share)[2], const Consumer& self) {
    #pragma unroll
    for (int i = 0; i < VD / 4; i++) {
        const real part = share[i % 2], x = number(answer[2 * i] * part), y = number(answer[2 * i + 1] * part);
        unsigned char* at = to.piece(self.row() + i % 2 * 8, i / 2 * 8) + self.lane % 4 * 4;
        reinterpret_cast<unsigned&>(*at) = packed<data>(x, y);
    }
}
__device__ __forceinline__ void write(Results from, const Rows<data>& out, const Work& work, int columns,
                                      const Consumer& self) {
    const bool pieces = in_vectors(out) && out.group % 8 == 0;
    #pragma unroll 1
    for (int i = self.lane; i < 16 * (VD / 8); i += 32) {
        const int row = work.first + self.first() + i / (VD / 8), column = i % (VD / 8) * 8;
        if (row >= work.end || column >= columns) continue;
        const Piece& piece = reinterpret_cast<const Piece&>(*from.piece(self.first() + i / (VD / 8), column));
        data* at = &out.of(row % work.groups).at(row / work.groups, column);
        if (pieces && column + 8 <= columns) {
            reinterpret_cast<Piece&>(*at) = piece;
            continue;
        }
        for (int j = 0; j < 8; j++)
            if (column + j < columns) at[j * out.column] = piece.x[j];
    }
}
// A value that is not finite turns to NaN those queries that see it, and no others.
__device__ __forceinline__ void spoil(const Rows<data>& out, const Work& work, const Bad& bad, const Source& values,
                                      const Consumer& self) {
    const int tiles = work.tiles(), whole = work.whole(work.first);
    #pragma unroll 1
    for (int turn = 0; work.causal && tiles - 1 - turn >= whole; turn++) {
        if (!(bad.any[turn][0] | bad.any[turn][1] | bad.any[turn][2] | bad.any[turn][3])) continue;
        #pragma unroll 1
        for (int j = 0; j < 16 * PAIRS; j++) {
            const int row = work.first + self.first() + j % 16, pair = (tiles - 1 - turn) * PAIRS + j / 16;
            if (!bad.pair[turn][j / 16] || row >= work.end || pair > work.newest(row)) continue;
            for (int column = self.lane; column < values.columns; column += 32) {
                const real x = widened(values.rows.at(pair, column));
                if (x - x != 0) put(out.of(row % work.groups).at(row / work.groups, column), x - x);
            }
        }
    }
}

// ---- the whole ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void consume(const Room& room, Barriers& barriers, const Work& work, const Source& given,
                                        const Source& values, const Bad& bad, real width, const Rows<data>& o) {
    const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128 - 1, 0);  // the same for all, and known to be
    const Consumer self = {group, int(threadIdx.x) % 128 / 32, int(threadIdx.x) % 32};
    const int tiles = work.tiles(), whole = work.whole(work.first + 64 * self.group);
    const Matrix queries = Queries::part(room.queries().matrix(), 64 * group, 0);
    Scores score;
    Answers answer;
    Weights weights;
    Softmax softmax;
    softmax.begin(width);
    for (int i = 0; i < VD / 2; i++) answer[i] = 0;
    const auto weigh = [&](int tile) {
        if (tile >= whole) hide(score, work, work.first + self.row(), tile * PAIRS + self.lane % 4 * 2);
        softmax.weigh(score);
    };

    bring_queries(room.queries(), given, work, group);
    wait(barriers.keys[0], 0);
    show_to_products();
    begin_products();
    multiply_keys(score, queries, room.keys(0).matrix());
    finish_products<0>();
    done(score);
    self.free(barriers.free_keys[0]);
    weigh(tiles - 1);
    round_weights(weights, score);

    #pragma unroll 1
    for (int turn = 1; turn < tiles; turn++) {
        const int stage = turn % STAGES, last = (turn - 1) % STAGES;
        wait(barriers.keys[stage], turn / STAGES & 1);
        wait(barriers.values[last], (turn - 1) / STAGES & 1);
        show_to_products();
        begin_products();
        multiply_keys(score, queries, room.keys(stage).matrix());
        multiply_values(answer, weights, room.values(last).matrix());
        finish_products<1>();
        done(score);
        self.free(barriers.free_keys[stage]);
        weigh(tiles - 1 - turn);
        finish_products<0>();
        done(answer);
        self.free(barriers.free_values[last]);
        keep(answer, softmax.kept);
        round_weights(weights, score);
    }
    const int last = (tiles - 1) % STAGES;
    wait(barriers.values[last], (tiles - 1) / STAGES & 1);
    show_to_products();
    begin_products();
    multiply_values(answer, weights, room.values(last).matrix());
    finish_products<0>();
    done(answer);

    real share[2];
    for (int half = 0; half < 2; half++) {
        const real weight = over_row(softmax.weight[half]);
        share[half] = weight != 0 ? 1 / weight : real(1);
    }
    warpgroup_barrier(self.group);  // nobody is left at the queries
    stage(room.results(), answer, share, self);
    __syncwarp();
    write(room.results(), o, work, values.columns, self);
    __syncwarp();  // what is not finite comes last
    spoil(o, work, bad, values, self);
}

extern "C" __global__ void __launch_bounds__(128 + 128 * CONSUMERS, 1)
softmax_wgmma(const data* q, const data* k, const data* v, data* o, const long long* table, int axes, int tokens,
              int columns, int channels, int pairs, int groups, int blocks, int causal, real width) {
    __shared__ Barriers barriers;
    __shared__ Bad bad;
    Room room;
    room.at = dynamic_shared() + (-shared_address(dynamic_shared()) & 1023);
    const Place place = place_of(blockIdx.x, gridDim.x / blocks, blocks);
    const int memory = place.memory;
    const Work work = {place.number * ROWS, groups * tokens, groups, pairs, causal != 0};
    const Source values = {rows(v, table, axes, V, memory), pairs, columns};
    if (threadIdx.x == 0) barriers.set_up_all();
    __syncthreads();  // the barriers are there
    if (threadIdx.x < 128) {
        leave_registers<CONSUMERS == 2 ? 40 : 32>();
        const Source keys = {rows(k, table, axes, KEY, memory), pairs, channels};
        produce(room, barriers, work, keys, values, bad);
    } else {
        take_registers<CONSUMERS == 2 ? 232 : 160>();
        const Source queries = {rows(q, table, axes, Q, memory), tokens, channels};
        consume(room, barriers, work, queries, values, bad, width, rows(o, table, axes, O, memory));
    }
}
