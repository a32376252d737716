// Local linear regression in many channels on tensor cores, for data of bfloat16: the lines of local_lines.cu, where
// single precision is enough for them.
//
// A number between data is a float, and three terms of bfloat16 where it meets keys or values, which are one. Weights
// are the same in all passes, so what they are rounded to is the weights of a fit next to the one asked for. What
// remains is the error of solving for the line x: a product with A = Ckk + ridge I is off by EPSILON |A| |u|, and it
// reaches the answer, in values of size 1, by no more than
//
//     EPSILON |x| reach (1 + reach sqrt(trace)),    reach = |kbar| + sqrt(|A|)
//
// where the trace is that of the inverse of A over the directions that conjugate gradients have taken, which is the sum
// of |u|^2 / u.Au over them. A query of which this is more than SMALL is left to local_lines.cu: those that see few
// pairs, or pairs beside a plane. So are those that see a number that is not finite, or take more than TURNS steps.
// They are marked as undone, and their answers are not written.
//
// A warp has 16 queries, all warps share tiles of PAIRS pairs, newest first, while the next is on its way. A lane has
// its share of each line, spread as tensor.cuh says, in registers or in a place of its own.

enum { Q, KEY, V, POSITION, COUNT, O, UNDONE };
enum { ROWS = 16 * WARPS, THREADS = 32 * WARPS, PAIRS = 32, OCTETS = KD / 8, TURNS = KD };
const real LOG2E = real(1.4426950408889634), FAR = 1024, EPSILON = real(1) / (1 << 23), SMALL = real(1) / (1 << 9);
typedef Tile<data, PAIRS, KD> Panel;
typedef Sum Scores[PAIRS / 8];
typedef Sum Line[OCTETS];
typedef Left<data, 1> Query[KD / 16];
typedef Left<data, 3> Direction[KD / 16];

// ---- tiles ----------------------------------------------------------------------------------------------------------

// The numbers of a Line in shared memory, each in a place of this thread's own.
struct Own {
    real* begin;

    __device__ __forceinline__ real& at(int n, int i) const { return begin[(4 * n + i) * THREADS]; }
};

// Keys or values of a memory, some columns of them, in two tiles: one at hand, one on its way.
struct Source {
    Rows<const data> rows;
    Panel tiles[2];
    int pairs, columns;
    bool vectors;  // whether they come 16 bytes at a time

    __device__ __forceinline__ Source(Rows<const data> rows, Panel first, Panel second, int pairs, int columns)
        : rows(rows), tiles{first, second}, pairs(pairs), columns(columns), vectors(in_vectors(rows)) {}
    __device__ __forceinline__ Panel tile(int stage) const { return stage ? tiles[1] : tiles[0]; }
    __device__ __forceinline__ void bring(int stage, int start, int column) const {
        fetch<THREADS>(tile(stage), rows, start, column, pairs - start, columns - column, vectors);
    }
    // Zeros for what is not finite of the numbers that this thread has brought; whether there is any.
    __device__ __forceinline__ bool clean(int stage) const {
        const int wide = vectors ? 8 : 1;
        bool wrong = false;
        #pragma unroll 1
        for (int i = threadIdx.x * wide; i < PAIRS * KD; i += THREADS * wide) {
            data* at = &tile(stage).at(i / KD, i % KD);
            if (vectors && !any_bad(reinterpret_cast<const Eight&>(*at))) continue;
            #pragma unroll 1
            for (int j = 0; j < wide; j++) {
                const real x = widened(at[j]);
                if (x - x != 0) at[j] = data{}, wrong = true;
            }
        }
        return wrong;
    }
    struct alignas(16) Eight {
        unsigned x[4];
    };
    // Whether one of the exponents is all ones: then one more carries.
    static __device__ __forceinline__ bool any_bad(const Eight& eight) {
        unsigned found = 0;
        for (int i = 0; i < 4; i++) found |= (eight.x[i] & 0x7f807f80u) + 0x00800080u;
        return found & 0x80008000u;
    }
};

// ---- a warp's queries -----------------------------------------------------------------------------------------------

// Row of the block of a lane's numbers 2 half and 2 half + 1 of a Sum, and the column of the first.
__device__ __forceinline__ int row_of(int half) { return threadIdx.x / 32 * 16 + 8 * half + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int column_of() { return threadIdx.x % 4 * 2; }

// Number i of octet n of lines that are factors.
template <int TERMS>
__device__ __forceinline__ real number_of(const Left<data, TERMS> (&line)[KD / 16], int n, int i) {
    real x = 0;
    #pragma unroll
    for (int term = TERMS - 1; term >= 0; term--) x += half_of<data>(line[n / 2].x[term][i / 2 + n % 2 * 2], i % 2);
    return x;
}
__device__ __forceinline__ void set(Direction& along, const Line& line) {
    #pragma unroll
    for (int c = 0; c < KD / 16; c++) left_of(along[c], line[2 * c], line[2 * c + 1]);
}
// Numbers of lines: use(half, n, i).
template <class Use>
__device__ __forceinline__ void along_rows(Use use) {
    #pragma unroll
    for (int n = 0; n < OCTETS; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) use(i / 2, n, i);
}
// Numbers of a tile: use(half, pair of the tile, score, the other score).
template <class Use>
__device__ __forceinline__ void each_score(Scores& score, Scores& other, Use use) {
    #pragma unroll
    for (int n = 0; n < PAIRS / 8; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) use(i / 2, 8 * n + column_of() + i % 2, score[n].x[i], other[n].x[i]);
}
__device__ __forceinline__ void over_lanes(real (&x)[2]) {
    for (int half = 0; half < 2; half++) x[half] = over_row(x[half]);
}

// Products of queries, and if MOVED of a direction, with the keys of a tile.
template <bool MOVED>
__device__ __forceinline__ void multiply_keys(Scores& score, Scores& moved, const Query& query, const Direction& along,
                                              Panel keys) {
    #pragma unroll
    for (int c = 0; c < KD / 16; c++)
        #pragma unroll
        for (int n = 0; n < PAIRS / 8; n += 2) {
            Right<data, 1> right[2];
            load_right_transposed(right, keys, 8 * n, 16 * c);
            for (int i = 0; i < 2; i++) multiply_onto(score[n + i], query[c], right[i]);
            if (MOVED)
                for (int i = 0; i < 2; i++) multiply_onto(moved[n + i], along[c], right[i]);
        }
}
// sum += weights x, for x a row for each pair of a tile.
__device__ __forceinline__ void gather(Line& sum, const Scores& weights, Panel x) {
    Left<data, 3> left[PAIRS / 16];
    #pragma unroll
    for (int m = 0; m < PAIRS / 16; m++) left_of(left[m], weights[2 * m], weights[2 * m + 1]);
    #pragma unroll
    for (int n = 0; n < OCTETS; n += 2) {
        Sum part[2] = {};
        #pragma unroll
        for (int m = 0; m < PAIRS / 16; m++) {
            Right<data, 1> right[2];
            load_right(right, x, 16 * m, 8 * n);
            for (int i = 0; i < 2; i++) multiply_onto(part[i], left[m], right[i]);
        }
        for (int i = 0; i < 4; i++) sum[n].x[i] += part[0].x[i], sum[n + 1].x[i] += part[1].x[i];
    }
}

// What the two rows of a lane see.
struct Sight {
    int last[2];          // newest pair
    long long oldest[2];  // the window begins at this place

    __device__ __forceinline__ bool sees(const Pairs& seen, int half, int pair) const {
        if (pair > last[half]) return false;
        const long long place = seen.place(pair);
        return place >= 0 && place >= oldest[half];
    }
    // Whether a row sees a number that is not finite in a tile: then it is left to do.
    __device__ __forceinline__ void look(bool (&left)[2], const Pairs& seen, const Rows<const data>& rows, int start,
                                         int columns) const {
        #pragma unroll 1
        for (int j = start; j < start + PAIRS && j < seen.pairs; j++) {
            bool wrong = false;
            #pragma unroll 1
            for (int c = 0; c < columns; c++) {
                const real x = widened(rows.at(j, c));
                wrong |= x - x != 0;
            }
            for (int half = 0; half < 2; half++) left[half] |= wrong && sees(seen, half, j);
        }
    }
};

// All tiles that a block sees, again and again.
struct Tour {
    const Source &keys, &values;
    int newest, lowest, own_last;  // tiles, and the newest pair of this warp
    int stage;                     // where the tile at hand is, and the next one is not
    bool idle;                     // whether this warp has nothing to do

    __device__ __forceinline__ void bring(int place, int tile, int column) const {
        keys.bring(place, tile * PAIRS, 0);
        if (column >= 0) values.bring(place, tile * PAIRS, column);
        close_copies();
    }
    // Newest first: use(first pair, keys, values, whether any was not finite). Values from a column on, or none.
    template <class Use>
    __device__ __forceinline__ void pass(int column, Use use) {
        #pragma unroll 1
        for (int tile = newest + 1; tile >= lowest; tile--) {
            bool spoilt = false;
            if (tile <= newest) {  // at first there is none
                finish_copies<0>();
                bool wrong = keys.clean(stage);
                if (column >= 0) wrong |= values.clean(stage);
                spoilt = __syncthreads_or(wrong);  // the tile is there, and nobody is left at the one before
            }
            if (tile > lowest) bring(stage ^ 1, tile - 1, column);
            if (tile <= newest && !idle && tile * PAIRS <= own_last)
                use(tile * PAIRS, keys.tile(stage), values.tile(stage), spoilt);
            stage ^= tile > lowest;  // the last one may still be in use when the next pass begins
        }
    }
};

// ---- the whole ------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER)
local_lines_tensor(const data* q, const data* k, const data* v, const long long* position, const long long* count,
                   data* o, bool* undone, const long long* table, int axes, int tokens, int columns, int pairs,
                   int groups, int blocks, int causal, int window, double width, double ridge, double tolerance) {
    const int memory = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;  // the longest pasts come first
    const int first = block * ROWS, end_of_rows = groups * tokens, own = first + threadIdx.x / 32 * 16;
    unsigned char* room = dynamic_shared();
    Panel panels[4];
    for (int i = 0; i < 4; i++) panels[i] = tile_of<Panel>(room);
    const Source keys(rows(k, table, axes, KEY, memory), panels[0], panels[1], pairs, D);
    const Source values(rows(v, table, axes, V, memory), panels[2], panels[3], pairs, columns);
    Own centre, rest, solution;
    centre.begin = reinterpret_cast<real*>(room) + threadIdx.x;
    rest.begin = centre.begin + 4 * OCTETS * THREADS, solution.begin = rest.begin + 4 * OCTETS * THREADS;
    const Pairs seen = {rows(position, table, axes, POSITION, memory), rows(count, table, axes, COUNT, memory), {}, {},
                        position != nullptr, count != nullptr, false, 0, pairs, tokens, window, 0};

    Sight sight;
    Query query;
    const auto asked = rows(q, table, axes, Q, memory);
    for (int half = 0; half < 2; half++) {
        const int row = first + row_of(half), step = row / groups;
        const bool there = row < end_of_rows;
        const Row<const data> line = asked.of(row % groups).line(step);
        sight.last[half] = !there ? -1 : causal ? step : pairs - 1;
        sight.oldest[half] = there && window ? seen.memorised(step) - window : 0;
        #pragma unroll
        for (int c = 0; c < KD / 8; c++) {
            const int column = 8 * c + column_of();
            data x[2] = {};
            for (int i = 0; i < 2; i++)
                if (there && column + i < D) x[i] = line[column + i];
            query[c / 2].x[0][half + c % 2 * 2] = x[0].bits | unsigned(x[1].bits) << 16;
        }
    }
    const int low = first / groups, high = (min(first + ROWS, end_of_rows) - 1) / groups;  // steps
    const int newest = ((causal ? high + 1 : pairs) - 1) / PAIRS, lowest = seen.begin(low) / PAIRS;
    const int own_high = (min(own + 16, end_of_rows) - 1) / groups;
    Tour tour = {keys, values, newest, lowest, own >= end_of_rows ? -1 : causal ? own_high : pairs - 1, 0, false};
    const int in_sight = position || window ? 0 : causal ? own / groups + 1 : pairs;
    const real slope = real(width) * LOG2E;

    Direction along;
    real top[2] = {-infinite(), -infinite()}, share[2] = {1, 1}, across[2] = {}, middle[2] = {}, asking[2] = {};
    real start_square[2] = {}, square[2] = {}, steepest[2] = {}, trace[2] = {};
    bool left[2] = {};

    // Logits of a tile in powers of two, minus infinity where a row does not see a pair.
    const auto find_logits = [&](Scores& score, int start) {
        for (int n = 0; n < PAIRS / 8; n++)
            for (int i = 0; i < 4; i++) score[n].x[i] *= slope;
        if (start + PAIRS <= in_sight) return;
        each_score(score, score, [&](int half, int j, real& x, real&) {
            x = sight.sees(seen, half, start + j) ? x : -infinite();
        });
    };

    // The mean keys, by weights of which the highest so far is one.
    Line sum = {};
    real total[2] = {};
    tour.pass(-1, [&](int start, Panel key, Panel, bool spoilt) {
        Scores score = {}, none = {};
        if (spoilt) sight.look(left, seen, keys.rows, start, D);
        multiply_keys<false>(score, none, query, along, key);
        find_logits(score, start);
        real highest[2] = {-infinite(), -infinite()}, kept[2];
        each_score(score, none, [&](int half, int, real& x, real&) { highest[half] = fmaxf(highest[half], x); });
        for (int half = 0; half < 2; half++) {
            highest[half] = fmaxf(top[half], top_of_row(highest[half]));
            kept[half] = highest[half] == top[half] ? real(1) : exp2(top[half] - highest[half]);
            top[half] = highest[half], total[half] *= kept[half];
        }
        along_rows([&](int half, int n, int i) { sum[n].x[i] *= kept[half]; });
        each_score(score, none, [&](int half, int, real& x, real&) {
            x = x == -infinite() ? real(0) : exp2(x - top[half]);
            total[half] += x;
        });
        gather(sum, score, key);
    });
    over_lanes(total);
    for (int half = 0; half < 2; half++) {
        top[half] = top[half] == -infinite() ? real(0) : top[half];
        share[half] = total[half] == 0 ? real(0) : 1 / total[half];
    }
    along_rows([&](int half, int n, int i) {
        const real asked = number_of(query, n, i), mean = sum[n].x[i] * share[half];
        const real away = share[half] == 0 ? real(0) : asked - mean;
        centre.at(n, i) = mean, solution.at(n, i) = 0, rest.at(n, i) = sum[n].x[i] = away;
        start_square[half] = fma(away, away, start_square[half]);
        middle[half] = fma(mean, mean, middle[half]), asking[half] = fma(asked, asked, asking[half]);
        across[half] = fma(away, mean, across[half]);
    });
    set(along, sum);
    over_lanes(start_square), over_lanes(middle), over_lanes(asking), over_lanes(across);
    bool active[2];
    for (int half = 0; half < 2; half++) {
        square[half] = start_square[half], middle[half] = sqrt(middle[half]);
        left[half] |= !(fabs(top[half]) + fabs(slope) * sqrt(asking[half]) * middle[half] < FAR);
        active[half] = square[half] > 0 && !left[half];
    }

    // Steps, each of which ends with a direction; then the answers, KD columns at a time, whose direction is the line.
    bool answering = false;
    int turn = 0, column = 0;
    #pragma unroll 1
    while (column < columns) {
        if (!answering) {
            tour.idle = !__any_sync(0xffffffffu, active[0] || active[1]);
            answering = !__syncthreads_or(!tour.idle && turn++ < TURNS);
            if (answering) {
                across[0] = across[1] = 0;
                along_rows([&](int half, int n, int i) {
                    sum[n].x[i] = solution.at(n, i);
                    across[half] = fma(sum[n].x[i], centre.at(n, i), across[half]);
                });
                over_lanes(across);
                set(along, sum);
                for (int half = 0; half < 2; half++) left[half] |= active[half];
                tour.idle = !__any_sync(0xffffffffu, !left[0] || !left[1]);
            }
        }
        for (int n = 0; n < OCTETS; n++) sum[n] = {};
        total[0] = total[1] = 0;
        const real base = answering;
        tour.pass(answering ? column : -1, [&](int start, Panel key, Panel value, bool spoilt) {
            Scores score = {}, moved = {};
            if (answering && spoilt) sight.look(left, seen, values.rows, start, columns);
            multiply_keys<true>(score, moved, query, along, key);
            find_logits(score, start);
            each_score(score, moved, [&](int half, int, real& x, real& s) {
                s = x == -infinite() ? real(0) : exp2(x - top[half]) * share[half] * (base + (s - across[half]));
                total[half] += s;
            });
            gather(sum, moved, answering ? value : key);
        });
        over_lanes(total);
        if (answering) {
            const auto out = rows(o, table, axes, O, memory);
            along_rows([&](int half, int n, int i) { rest.at(n, i) = sum[n].x[i]; });  // nobody needs the old ones
            for (int half = 0; half < 2; half++) {
                const int row = first + row_of(half);
                if (row >= end_of_rows || left[half]) continue;
                const Row<data> line = out.of(row % groups).line(row / groups);
                #pragma unroll 1
                for (int n = 0; n < OCTETS; n++)
                    for (int i = 0; i < 2; i++) {
                        const int at = column + 8 * n + column_of() + i;
                        const real x = rest.at(n, 2 * half + i);
                        if (at < columns) put(line[at], total[half] == 0 ? real(0) : x / total[half]);
                    }
            }
            column += KD;
            continue;
        }
        real curvature[2] = {}, size[2] = {}, image[2] = {}, length[2], next[2] = {}, reached[2] = {}, ratio[2];
        along_rows([&](int half, int n, int i) {
            const real u = number_of(along, n, i);
            const real image_of_u = fma(real(ridge), u, fma(-total[half], centre.at(n, i), sum[n].x[i]));
            curvature[half] = fma(u, image_of_u, curvature[half]), size[half] = fma(u, u, size[half]);
            image[half] = fma(image_of_u, image_of_u, image[half]), sum[n].x[i] = image_of_u;
        });
        over_lanes(curvature), over_lanes(size), over_lanes(image);
        for (int half = 0; half < 2; half++) length[half] = active[half] ? square[half] / curvature[half] : real(0);
        along_rows([&](int half, int n, int i) {
            real &x = solution.at(n, i), &r = rest.at(n, i);
            x = fma(length[half], number_of(along, n, i), x);
            if (active[half]) r = fma(-length[half], sum[n].x[i], r);
            next[half] = fma(r, r, next[half]), reached[half] = fma(x, x, reached[half]);
        });
        over_lanes(next), over_lanes(reached);
        for (int half = 0; half < 2; half++) {
            ratio[half] = active[half] ? next[half] / square[half] : real(0);
            if (!active[half]) continue;
            square[half] = next[half];
            steepest[half] = fmaxf(steepest[half], sqrt(image[half] / size[half]));
            trace[half] += size[half] / curvature[half];
            const real reach = middle[half] + sqrt(steepest[half]);
            left[half] |= !(EPSILON * sqrt(reached[half]) * reach * fma(reach, sqrt(trace[half]), real(1)) <= SMALL);
            active[half] = !left[half] && square[half] > real(tolerance) * real(tolerance) * start_square[half];
        }
        across[0] = across[1] = 0;
        along_rows([&](int half, int n, int i) {
            sum[n].x[i] = fma(ratio[half], number_of(along, n, i), rest.at(n, i));
            across[half] = fma(sum[n].x[i], centre.at(n, i), across[half]);
        });
        over_lanes(across);
        set(along, sum);
    }
    const auto left_over = rows(undone, table, axes, UNDONE, memory);
    for (int half = 0; half < 2; half++) {
        const int row = first + row_of(half);
        if (row < end_of_rows && threadIdx.x % 4 == 0) left_over.of(row % groups).at(row / groups, 0) = left[half];
    }
}
