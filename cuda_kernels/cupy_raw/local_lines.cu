// Local linear regression in many channels, by conjugate gradients:
//
//     o = sum_j p_j (1 + s_j) v_j,    s_j = (k_j - kbar) . x,    (Ckk + ridge I) x = q - kbar
//
// for weights p of sum 1, the mean kbar of the keys under them, and their covariance Ckk. That is vbar + Cvk x. A
// product with Ckk passes over the keys, so that it is never formed.
//
// A block has 16 queries for each of its WARPS warps, and takes in tiles of PAIRS pairs, newest first, which all of
// them share: logits, products of keys with a direction, and what these add up to are products of tensor cores in
// double precision. It passes over the pairs for the highest logits, for the mean keys, for every step of conjugate
// gradients, and for the answers. Each query stops by itself, a block when all of them have. Keys are measured from the
// oldest one, so that a common offset costs no digit.

enum { Q, KEY, V, POSITION, COUNT, LEFT, GATE, O, RESIDUAL };
enum { ROWS = 16 * WARPS, THREADS = 32 * WARPS, OCTETS = PAIRS / 8, UNDER_WAY = KD <= 64 ? 2 : 1 };
enum { TO_DO = -1 };  // residual of what the launch before has left, if this is the REST
enum { TOPS, MEANS, SLOPES, ANSWERS };  // what a pass is for
typedef Panel<double, KD + 8> Lines;     // a row for each query
typedef Panel<narrow, KD + 8> Queries;   // the same, as they came: narrow is float where that holds the data
typedef Panel<double, KD + 2> Keys;      // a row for each pair
typedef Sum Scores[OCTETS];

// ---- what all threads share -----------------------------------------------------------------------------------------

struct Room {
    Queries queries;
    Lines centres, along, residuals, solutions;
    Keys keys, values;  // of a tile; values in as many columns as keys have channels

    __device__ __forceinline__ Room(unsigned char* at) {
        centres.begin = reinterpret_cast<double*>(at);
        along.begin = centres.begin + ROWS * Lines::stride;
        residuals.begin = along.begin + ROWS * Lines::stride;
        solutions.begin = residuals.begin + ROWS * Lines::stride;
        keys.begin = solutions.begin + ROWS * Lines::stride;
        values.begin = keys.begin + PAIRS * Keys::stride;
        queries.begin = reinterpret_cast<narrow*>(values.begin + PAIRS * Keys::stride);
    }
};

struct Shared {
    Rows<const stored> key, value;
    Pairs seen;
    double from[KD];                   // the oldest key
    int last[ROWS];                    // each row's newest pair
    long long oldest[ROWS];            // each row's window begins at this place
    double since[ROWS];                // sum of each row's gates that are newer than this tile
    double biases[GATED ? PAIRS : 1][ROWS];
    double lengths[ROWS];              // of queries from the oldest key, squared: for a kernel of the distance
    double norms[PAIRS], offsets[PAIRS];  // the same of keys; and their products with the oldest key
    bool bad[PAIRS];                   // whether a key is not finite
    double width;
    bool wanted[ROWS];                 // whether a row is there, and not answered yet

    // Whether nobody wants an answer of this warp.
    __device__ __forceinline__ bool spares() const {
        return !__any_sync(0xffffffffu, wanted[threadIdx.x / 32 * 16 + threadIdx.x % 16]);
    }
    __device__ __forceinline__ bool sees(int row, int pair) const {
        if (pair > last[row]) return false;
        const long long place = seen.place(pair);
        return place >= 0 && place >= oldest[row];
    }
    // The same of two neighbours in every eight pairs, a bit for each.
    __device__ __forceinline__ unsigned look(int row, int pair) const {
        unsigned bits = 0;
        #pragma unroll 4
        for (int n = 0; n < 2 * OCTETS; n++) bits |= unsigned(sees(row, pair + n / 2 * 8 + n % 2)) << n;
        return bits;
    }
    // What the gates have left of a tile's pairs for a row, and then the gates of all that is newer than the next tile.
    __device__ __forceinline__ void age(int row, int start) {
        double total = since[row];
        #pragma unroll 1
        for (int j = PAIRS - 1; j >= 0; j--) {
            const int pair = start + j;
            const double bias = total + (pair < seen.pairs ? seen.left_of(pair) : 0.0);
            biases[j][row] = bias < NOTHING / 2 ? -infinite() : bias;
            if (pair <= last[row] && !(total < NOTHING / 2)) total += seen.gate_of(pair);
        }
        since[row] = total;
    }
};

// The keys of a tile, from the oldest one; what is not finite is marked, and zero. Zeros beyond the last pair. Whether
// any is marked.
__device__ __forceinline__ bool bring_keys(Keys keys, Shared& all, int start) {
    bool any = false;
    #pragma unroll 4
    for (int j = threadIdx.x / 32; j < PAIRS; j += WARPS) {
        const int pair = start + j;
        double norm = 0, offset = 0;
        bool wrong = false;
        #pragma unroll
        for (int c = threadIdx.x % 32; c < KD; c += 32) {
            const double x = pair < all.seen.pairs && c < D ? double(widened(all.key.at(pair, c))) - all.from[c] : 0.0;
            wrong |= !(x - x == 0);
            keys.at(j, c) = x - x == 0 ? x : 0;
            norm = fma(x, x, norm), offset = fma(x, all.from[c], offset);
        }
        wrong = __any_sync(0xffffffffu, wrong);
        if (KIND == GAUSSIAN) norm = over_row(norm), offset = over_row(offset);
        if (threadIdx.x % 32 == 0) all.bad[j] = wrong, all.norms[j] = norm, all.offsets[j] = offset;
        any |= wrong;
    }
    return any;
}
// The values of a tile in some columns; whether any is not finite, and so zero.
__device__ __forceinline__ bool bring_values(Keys values, const Shared& all, int start, int low, int columns) {
    bool wrong = false;
    #pragma unroll 4
    for (int i = threadIdx.x; i < PAIRS * KD; i += THREADS) {
        const int j = i / KD, c = i % KD, pair = start + j;
        const bool there = pair < all.seen.pairs && low + c < columns;
        const double x = there ? double(widened(all.value.at(pair, low + c))) : 0.0;
        wrong |= !(x - x == 0);
        values.at(j, c) = x - x == 0 ? x : 0;
    }
    return wrong;
}

// ---- a warp's queries -----------------------------------------------------------------------------------------------

// Where a lane's numbers of a Sum are: the row of numbers 2 half and 2 half + 1 in the block, the column of the first.
__device__ __forceinline__ int row_of(int half) { return threadIdx.x / 32 * 16 + 8 * half + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int column_of() { return threadIdx.x % 4 * 2; }

// Products of the warp's rows of some lines with the keys of a tile.
template <class PanelType>
__device__ __forceinline__ void multiply(Scores& score, PanelType lines, Keys keys) {
    const int row = threadIdx.x / 32 * 16;
    #pragma unroll UNDER_WAY
    for (int c = 0; c < KD; c += 8) {
        const Left left = lines.left(row, c);
        #pragma unroll
        for (int n = 0; n < OCTETS; n++) score[n].add(left, keys.transposed(8 * n, c));
    }
}
// sums += weights x, where x has a row for each pair of a tile.
template <int N, class PanelType>
__device__ __forceinline__ void gather(Sum (&sums)[N], const Scores& weights, PanelType x) {
    #pragma unroll
    for (int m = 0; m < OCTETS; m++) {
        const Left left = weights[m].left();
        #pragma unroll
        for (int n = 0; n < N; n++) sums[n].add(left, x.right(8 * m, 8 * n));
    }
}
// Sums and maxima over the four lanes that share a row; NaN is no maximum.
__device__ __forceinline__ double over_four(double x) {
    for (int distance = 1; distance < 4; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}
__device__ __forceinline__ double top_of_four(double x) {
    for (int distance = 1; distance < 4; distance *= 2) {
        const double other = __shfl_xor_sync(0xffffffffu, x, distance);
        x = other > x ? other : x;
    }
    return x;
}
// Numbers of a tile's scores: use(half, row, pair, x).
template <class Use>
__device__ __forceinline__ void each_score(Scores& score, Use use) {
    #pragma unroll
    for (int n = 0; n < OCTETS; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) use(i / 2, row_of(i / 2), 8 * n + column_of() + i % 2, score[n].x[i]);
}

// The logit of a key that is not finite.
__device__ __forceinline__ double logit_of_bad(const Shared& all, const narrow* query, int pair) {
    double x = 0;
    #pragma unroll 1
    for (int c = 0; c < D; c++) {
        const double key = double(widened(all.key.at(pair, c))), q = query[c];
        x = joined(KIND, KIND == GAUSSIAN ? q - all.from[c] : q, key - all.from[c], x);
    }
    return log_kernel(KIND, x, all.width);
}
// Logits of a tile, minus infinity where a row does not see a pair; if `plain` all rows see all.
__device__ __forceinline__ void find_logits(Scores& score, const Room& room, const Shared& all, int start, bool plain,
                                            bool spoilt) {
    multiply(score, room.queries, room.keys);
    each_score(score, [&](int, int row, int j, double& x) {
        if (KIND == GAUSSIAN) {
            const double square = fma(-2.0, x - all.offsets[j], all.lengths[row] + all.norms[j]);
            x = square < 0 ? 0 : square;
        }
        x = log_kernel(KIND, x, all.width);
        if (spoilt && all.bad[j]) x = logit_of_bad(all, &room.queries.at(row, 0), start + j);
        if (GATED) x = all.biases[j][row] == -infinite() ? -infinite() : x + all.biases[j][row];
    });
    if (plain) return;
    unsigned seen[2];
    for (int half = 0; half < 2; half++) seen[half] = all.look(row_of(half), start + column_of());
    each_score(score, [&](int half, int, int j, double& x) {
        if (!(seen[half] >> (j / 8 * 2 + j % 2) & 1)) x = -infinite();
    });
}
// Not worth more digits than the answer has.
__device__ __forceinline__ double weight_of(double x) { return sizeof(data) == 2 ? double(expf(float(x))) : exp(x); }

// A warp's lines as Sums: use(half, column, number of n, and i).
template <class Use>
__device__ __forceinline__ void along_rows(Use use) {
    #pragma unroll
    for (int n = 0; n < KD / 8; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) use(i / 2, row_of(i / 2), 8 * n + column_of() + i % 2, n, i);
}

// A value that is not finite turns to NaN those answers that see it, and no others.
__device__ __forceinline__ void spoil(Sum (&sum)[KD / 8], const Shared& all, int start, int low, int columns) {
    #pragma unroll 1
    for (int j = 0; j < PAIRS && start + j < all.seen.pairs; j++) {
        bool seen[2];
        for (int half = 0; half < 2; half++) {
            const int row = row_of(half);
            seen[half] = all.sees(row, start + j) && !(GATED && all.biases[j][row] == -infinite());
        }
        int column = low + column_of();
        const stored* at = &all.value.at(start + j, column);
        #pragma unroll
        for (int n = 0; n < KD / 8; n++, column += 8, at += 8 * all.value.column)
            for (int i = 0; i < 2; i++) {
                if (column + i >= columns) continue;
                const double x = double(widened(at[i * all.value.column]));
                for (int half = 0; half < 2; half++)
                    if (seen[half]) sum[n].x[2 * half + i] += x - x;
            }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
local_lines(const data* q, const stored* k, const stored* v, const long long* position, const long long* count,
            const logs* left, const logs* log_decay, data* answers, double* residual, const long long* table, int axes,
            int tokens, int columns, int pairs, int cached, int groups, int blocks, int causal, int window,
            int steps, double width, double ridge, double tolerance) {
    __shared__ Shared all;
    const Room room(dynamic_shared());
    const int memory = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;  // the longest pasts come first
    const int first = block * ROWS, end_of_rows = groups * tokens, warp = threadIdx.x / 32;
    const auto query = rows(q, table, axes, Q, memory);
    if (threadIdx.x == 0) {
        all.key = rows(k, table, axes, KEY, memory), all.value = rows(v, table, axes, V, memory);
        all.seen = {rows(position, table, axes, POSITION, memory), rows(count, table, axes, COUNT, memory),
                    rows(log_decay, table, axes, GATE, memory), rows(left, table, axes, LEFT, memory),
                    position != nullptr, count != nullptr, log_decay != nullptr, cached, pairs, tokens, window, 0};
        all.width = width;
    }
    bool wanted = false;
    if (threadIdx.x < ROWS) {
        const int row = first + threadIdx.x;
        const auto before = rows(residual, table, axes, RESIDUAL, memory).of(row % groups);
        wanted = row < end_of_rows && (!REST || before.at(row / groups, 0) == TO_DO);
        all.wanted[threadIdx.x] = wanted;
    }
    const auto oldest_key = rows(k, table, axes, KEY, memory);
    for (int c = threadIdx.x; c < KD; c += THREADS)
        all.from[c] = c < D ? double(origin(widened(oldest_key.at(0, c)))) : 0.0;
    for (int i = threadIdx.x; i < ROWS * KD; i += THREADS) {
        const int r = i / KD, c = i % KD, row = first + r;
        const bool there = row < end_of_rows && c < D;
        room.queries.at(r, c) = there ? narrow(widened(query.of(row % groups).at(row / groups, c))) : narrow(0);
    }
    if (!__syncthreads_or(wanted) && REST) return;  // the pairs, the oldest key and the queries are known
    if (threadIdx.x < ROWS) {
        const int r = threadIdx.x, row = first + r, step = row / groups;
        const bool there = row < end_of_rows;
        all.last[r] = !there ? -1 : causal ? cached + step : pairs - 1;
        all.oldest[r] = there && window ? all.seen.memorised(step) - window : 0;
        double length = 0;
        for (int c = 0; c < D; c++) {
            const double x = double(room.queries.at(r, c)) - all.from[c];
            length = fma(x, x, length);
        }
        all.lengths[r] = length;
    }
    const int low = first / groups, high = (min(first + ROWS, end_of_rows) - 1) / groups;  // steps
    const int newest = ((causal ? cached + high + 1 : pairs) - 1) / PAIRS, lowest = all.seen.begin(low) / PAIRS;
    const int own_high = (min(first + 16 * (warp + 1), end_of_rows) - 1) / groups;
    const int own_last = first + 16 * warp >= end_of_rows ? -1 : causal ? cached + own_high : pairs - 1;
    const int in_sight = position || window ? 0 : causal ? cached + low + 1 : pairs;
    const auto out = rows(answers, table, axes, O, memory);

    // Of the two rows of this lane: highest logit, share of a weight of one, product of direction and mean key.
    double top[2] = {-infinite(), -infinite()}, share[2] = {1, 1}, across[2] = {}, start_square[2] = {}, square[2] = {};
    bool active[2] = {true, true}, idle = REST && all.spares();
    int mode = TOPS, turn = 0, column = 0;
    #pragma unroll 1
    while (true) {
        Sum sum[KD / 8] = {};
        double total[2] = {};
        if (GATED && threadIdx.x < ROWS) all.since[threadIdx.x] = 0;
        #pragma unroll 1
        for (int tile = newest; tile >= lowest; tile--) {
            const int start = tile * PAIRS;
            __syncthreads();  // nobody is left at the tile before
            bool wrong = bring_keys(room.keys, all, start);
            if (mode == ANSWERS) wrong |= bring_values(room.values, all, start, column, columns);
            if (GATED && threadIdx.x < ROWS) all.age(threadIdx.x, start);
            const bool spoilt = __syncthreads_or(wrong);  // the tile is there
            if (idle || start > own_last) continue;
            Scores score = {}, moved = {};
            find_logits(score, room, all, start, start + PAIRS <= in_sight, spoilt);
            if (mode == TOPS) {
                each_score(score, [&](int half, int, int, double& x) { top[half] = x > top[half] ? x : top[half]; });
                continue;
            }
            if (mode != MEANS) multiply(moved, mode == SLOPES ? room.along : room.solutions, room.keys);
            #pragma unroll
            for (int n = 0; n < OCTETS; n++)
                for (int i = 0; i < 4; i++) {
                    const int half = i / 2;
                    const double x = score[n].x[i], base = mode == SLOPES ? 0 : 1;
                    const double p = x == -infinite() ? 0 : weight_of(x - top[half]) * share[half];
                    moved[n].x[i] = p == 0 ? 0 : p * (base + (moved[n].x[i] - across[half]));
                    total[half] += moved[n].x[i];
                }
            gather(sum, moved, mode == ANSWERS ? room.values : room.keys);
            if (mode == ANSWERS && spoilt) spoil(sum, all, start, column, columns);
        }

        for (int half = 0; half < 2; half++) total[half] = over_four(total[half]);
        if (mode == TOPS) {
            for (int half = 0; half < 2; half++) top[half] = top_of_four(top[half]);
            for (int half = 0; half < 2; half++) top[half] = top[half] == -infinite() ? 0 : top[half];
            mode = MEANS;
            continue;
        }
        if (mode == ANSWERS) {
            along_rows([&](int half, int row, int c, int n, int i) { room.residuals.at(row, c) = sum[n].x[i]; });
            for (int half = 0; half < 2; half++)
                if (threadIdx.x % 4 == 0) room.along.at(row_of(half), 0) = total[half];
            __syncwarp();  // the rows of this warp are there
            #pragma unroll 2
            for (int i = threadIdx.x % 32; i < 16 * KD; i += 32) {
                const int r = 16 * warp + i / KD, c = i % KD, row = first + r;
                if ((REST ? !all.wanted[r] : row >= end_of_rows) || column + c >= columns) continue;
                const double whole = room.along.at(r, 0), x = room.residuals.at(r, c);
                put(out.of(row % groups).at(row / groups, column + c), whole == 0 ? x : x / whole);
            }
            column += KD;
            if (column >= columns) break;
            continue;
        }
        if (mode == MEANS) {
            for (int half = 0; half < 2; half++)
                share[half] = total[half] == 0 ? 0 : 1 / total[half];
            along_rows([&](int half, int row, int c, int n, int i) {
                const double centre = sum[n].x[i] * share[half];
                const double away = share[half] == 0 ? 0 : double(room.queries.at(row, c)) - all.from[c] - centre;
                room.centres.at(row, c) = centre, room.solutions.at(row, c) = 0;
                room.residuals.at(row, c) = room.along.at(row, c) = away;
                start_square[half] = fma(away, away, start_square[half]);
            });
            for (int half = 0; half < 2; half++) square[half] = start_square[half] = over_four(start_square[half]);
        } else {
            double curvature[2] = {}, length[2], next[2] = {};
            along_rows([&](int half, int row, int c, int n, int i) {
                const double u = room.along.at(row, c);
                sum[n].x[i] = fma(ridge, u, fma(-total[half], room.centres.at(row, c), sum[n].x[i]));
                curvature[half] = fma(u, sum[n].x[i], curvature[half]);
            });
            for (int half = 0; half < 2; half++) {
                curvature[half] = over_four(curvature[half]);
                length[half] = active[half] ? square[half] / curvature[half] : 0;
            }
            along_rows([&](int half, int row, int c, int n, int i) {
                if (!active[half]) return;
                double &x = room.solutions.at(row, c), &r = room.residuals.at(row, c);
                x = fma(length[half], room.along.at(row, c), x), r = fma(-length[half], sum[n].x[i], r);
                next[half] = fma(r, r, next[half]);
            });
            double ratio[2];
            for (int half = 0; half < 2; half++) {
                next[half] = over_four(next[half]), ratio[half] = next[half] / square[half];
                square[half] = active[half] ? next[half] : square[half];
            }
            along_rows([&](int half, int row, int c, int, int) {
                double& u = room.along.at(row, c);
                if (active[half]) u = fma(ratio[half], u, room.residuals.at(row, c));
            });
        }
        for (int half = 0; half < 2; half++)
            active[half] = (!REST || all.wanted[row_of(half)]) &&
                           square[half] > tolerance * tolerance * start_square[half];
        idle = !__any_sync(0xffffffffu, active[0] || active[1]);
        mode = __syncthreads_or(!idle && turn++ < steps) ? SLOPES : ANSWERS;
        if (mode == ANSWERS) idle = REST && all.spares();
        across[0] = across[1] = 0;
        const Lines lines = mode == SLOPES ? room.along : room.solutions;
        along_rows([&](int half, int row, int c, int, int) {
            across[half] = fma(lines.at(row, c), room.centres.at(row, c), across[half]);
        });
        for (int half = 0; half < 2; half++) across[half] = over_four(across[half]);
    }

    const auto left_over = rows(residual, table, axes, RESIDUAL, memory);
    for (int half = 0; half < 2; half++) {
        const int row = first + row_of(half);
        if ((REST ? all.wanted[row_of(half)] : row < end_of_rows) && threadIdx.x % 4 == 0)
            left_over.of(row % groups).at(row / groups, 0) =
                start_square[half] > 0 ? sqrt(square[half] / start_square[half]) : 0.0;
    }
}
