// Local linear regression in many channels, solved directly:
//
//     o = sum_j p_j (1 + s_j) v_j,    s_j = (k_j - kbar) . x,    A x = q - kbar,    A = Ckk + ridge I
//
// for weights p of sum 1, the mean kbar of the keys under them, and their covariance Ckk. That is vbar + Cvk x.
//
// A block has some QUERIES at a time and takes in tiles of 32 pairs, newest first, which all of them share: for the
// mean keys, for A, and for the answers. TEAM warps hold the A of one query, in sums of tensor cores in double
// precision. What these add is centred already, so that A loses no digit where weights look at few of many keys. Then
// A = L L^T in shared memory, in the place of the tiles, with a thread for each row. Keys are measured from the oldest
// one, so that a common offset costs no digit either.
//
// If this is the REST, only those rows are answered that the launch before has left undone.

enum { Q, KEY, V, POSITION, COUNT, LEFT, GATE, UNDONE, O };
enum { PAIRS = 32, TEAM = KD / 32, THREADS = QUERIES * KD, WARPS = THREADS / 32, BLOCKS = KD / 16 };
enum { EACH = (PAIRS + WARPS - 1) / WARPS };           // pairs that a warp brings
enum { SPLITS = WARPS / 2, HALVES = WARPS / BLOCKS };  // warps that share a sum over channels, and one over pairs
enum { MEANS, MOMENTS, ANSWERS };                      // what a pass is for
typedef Panel<double, KD + 2> Keys;                    // a row for each pair
typedef Panel<double, KD + 8> Lines;                   // a row for each query
typedef Panel<double, PAIRS + 8> Weights;              // the same
typedef Sum Moments[2 * (BLOCKS + 1)];

// ---- what all threads share -----------------------------------------------------------------------------------------

struct Shared {
    Rows<const data> query;
    Rows<const stored> key, value;
    Rows<data> answer;
    Pairs seen;
    double from[KD];                                // the oldest key
    double norms[PAIRS];                            // of keys, squared: for a kernel of the distance
    bool bad[PAIRS];                                // whether a key is not finite
    bool wanted[QUERIES], visible[QUERIES][PAIRS];  // whether a row is to be answered; what it sees of a tile
    double kept[QUERIES], total[QUERIES];           // share of the sums before that a higher logit leaves; of weights
    alignas(16) double queries[QUERIES][KD + 8], solutions[QUERIES][KD + 8], weights[QUERIES][PAIRS + 8];
    double centres[QUERIES][KD], rest[QUERIES][KD], scales[QUERIES][KD];
    double scores[2][SPLITS][QUERIES][PAIRS], sums[HALVES][QUERIES][KD];
};

// What a warp brings of a tile, some of its pairs, a lane some columns: all is on its way before any is looked at.
struct Piece {
    stored x[EACH][TEAM];

    __device__ __forceinline__ Piece(const Rows<const stored>& from, int pairs, int start, int low, int columns) {
        #pragma unroll
        for (int i = 0; i < EACH; i++)
            #pragma unroll
            for (int c = 0; c < TEAM; c++)
                x[i][c] = from.at(min(start + pair(i), pairs - 1), min(low + column(c), columns - 1));
    }
    static __device__ __forceinline__ int pair(int i) { return threadIdx.x / 32 + i * WARPS; }
    static __device__ __forceinline__ int column(int c) { return threadIdx.x % 32 + 32 * c; }
};
// The keys of a tile, from the oldest one; what is not finite is marked, and zero. Zeros beyond the last pair. Whether
// any is marked.
__device__ __forceinline__ bool bring_keys(Keys keys, Shared& all, int start) {
    const Piece piece(all.key, all.seen.pairs, start, 0, D);
    bool any = false;
    #pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int j = Piece::pair(i);
        if (PAIRS % WARPS != 0 && j >= PAIRS) break;
        double norm = 0;
        bool wrong = false;
        #pragma unroll
        for (int c = 0; c < TEAM; c++) {
            const int column = Piece::column(c);
            const bool there = start + j < all.seen.pairs && column < D;
            const double x = there ? in_double(widened(piece.x[i][c])) - all.from[column] : 0.0;
            wrong |= !(x - x == 0);
            keys.at(j, column) = x - x == 0 ? x : 0;
            norm = fma(x, x, norm);
        }
        wrong = __any_sync(0xffffffffu, wrong);
        if (KIND == GAUSSIAN) norm = over_row(norm);
        if (threadIdx.x % 32 == 0) all.bad[j] = wrong, all.norms[j] = norm;
        any |= wrong;
    }
    return any;
}
// The values of a tile in some columns; whether any is not finite, and so zero.
__device__ __forceinline__ bool bring_values(Keys values, const Shared& all, int start, int low, int columns) {
    const Piece piece(all.value, all.seen.pairs, start, low, columns);
    bool wrong = false;
    #pragma unroll
    for (int i = 0; i < EACH; i++)
        #pragma unroll
        for (int c = 0; c < TEAM; c++) {
            const int j = Piece::pair(i), column = Piece::column(c);
            const bool there = start + j < all.seen.pairs && low + column < columns;
            const double x = there ? in_double(widened(piece.x[i][c])) : 0.0;
            wrong |= !(x - x == 0);
            if (PAIRS % WARPS == 0 || j < PAIRS) values.at(j, column) = x - x == 0 ? x : 0;
        }
    return wrong;
}

// The lower triangle of a matrix, in blocks of 16 x 16. Rows of a block lie in different banks: two numbers of a row,
// which stay together, are in the place of two others.
struct Lower {
    double* begin;

    static constexpr int size = BLOCKS * (BLOCKS + 1) / 2 * 256;

    __device__ __forceinline__ double* block(int i, int j) const { return begin + (i * (i + 1) / 2 + j) * 256; }
    static __device__ __forceinline__ int place(int i, int j) { return i * 16 + ((j / 2) ^ (i % 8)) * 2 + j % 2; }
    __device__ __forceinline__ double& at(int i, int j) const { return block(i / 16, j / 16)[place(i % 16, j % 16)]; }
    __device__ __forceinline__ Two<double>& two(int i, int j) const { return reinterpret_cast<Two<double>&>(at(i, j)); }
};

// ---- products -------------------------------------------------------------------------------------------------------

// Right[i][j] = lines[j][column + i], of as many lines as there are queries, over and over.
template <class PanelType>
__device__ __forceinline__ Right over_queries(PanelType lines, int column) {
    const Two<double> both = lines.two(threadIdx.x % 32 / 4 % QUERIES, column + threadIdx.x % 4 * 2);
    return {both.x[0], both.x[1]};
}
// Left[i][j] = panel[row + j][column + i].
__device__ __forceinline__ Left turned(Keys panel, int row, int column) {
    const Right low = panel.right(row, column), high = panel.right(row, column + 8);
    return {low.x[0], high.x[0], low.x[1], high.x[1]};
}
// Products of the keys of a tile with a line for each query: 16 pairs and some channels for each warp.
__device__ __forceinline__ void multiply(double (&scores)[SPLITS][QUERIES][PAIRS], Lines lines, Keys keys) {
    const int row = threadIdx.x / 32 % 2 * 16, split = threadIdx.x / 64;
    Sum sum = {};
    #pragma unroll
    for (int c = 0; c < KD / SPLITS; c += 8) {
        const int column = split * (KD / SPLITS) + c;
        sum.add(keys.left(row, column), over_queries(lines, column));
    }
    each(sum, [&](int pair, int query, double x) {
        if (query < QUERIES) scores[split][query][row + pair] = x;
    });
}
// sum += weights x: 16 columns of x and some pairs for each warp.
__device__ __forceinline__ void gather(Sum& sum, Weights weights, Keys x) {
    const int column = threadIdx.x / 32 % BLOCKS * 16, half = threadIdx.x / 32 / BLOCKS;
    #pragma unroll
    for (int j = 0; j < PAIRS / HALVES; j += 8) {
        const int pair = half * (PAIRS / HALVES) + j;
        sum.add(turned(x, pair, column), over_queries(weights, pair));
    }
}

// A is symmetric, and a warp has BLOCKS + 1 of its blocks of 16 x 16: in two rows of blocks, which lie half of all rows
// apart, those on the diagonal and before it, around the corner, up to the column of the other row. Both rows together
// have every column once, but one twice; this is number m of them, the first on the diagonal of the one row, number
// BLOCKS / 2 on that of the other:
__device__ __forceinline__ int block_column(int m) {
    return (threadIdx.x / 32 % TEAM + BLOCKS / 2 + BLOCKS - m) % BLOCKS;
}
// use(number of the column that is the row's own, number of the column, first of two moments) for each block.
template <class Use>
__device__ __forceinline__ void each_block(Use use) {
    #pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
        if (m <= BLOCKS / 2) use(0, m, 2 * m);
        if (m >= BLOCKS / 2) use(BLOCKS / 2, m, 2 * (m + 1));
    }
}
// moments += sum_j p_j (k_j - centre) (k_j - centre)^T over a tile.
__device__ __forceinline__ void square(Moments& moments, const Shared& all, int query, Weights weights, Keys keys) {
    const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    double centre[BLOCKS][2];
    #pragma unroll
    for (int m = 0; m < BLOCKS; m++)
        for (int h = 0; h < 2; h++) centre[m][h] = all.centres[query][16 * block_column(m) + 8 * h + line];
    #pragma unroll 1
    for (int j = 0; j < PAIRS; j += 8) {
        const Two<double> p = weights.two(query, j + pair);
        Left weighted = {};
        const auto weigh = [&](const Left& x) {
            for (int i = 0; i < 4; i++) weighted.x[i] = x.x[i] * p.x[i / 2];
        };
        #pragma unroll
        for (int m = 0; m < BLOCKS; m++) {
            Left x = turned(keys, j, 16 * block_column(m));
            for (int i = 0; i < 4; i++) x.x[i] -= centre[m][i % 2];
            const Right low = {x.x[0], x.x[2]}, high = {x.x[1], x.x[3]};
            if (m == 0) weigh(x);
            if (m <= BLOCKS / 2) moments[2 * m].add(weighted, low), moments[2 * m + 1].add(weighted, high);
            if (m == BLOCKS / 2) weigh(x);
            if (m >= BLOCKS / 2) moments[2 * m + 2].add(weighted, low), moments[2 * m + 3].add(weighted, high);
        }
    }
}
// A = moments + ridge I; blocks above the diagonal go below it.
__device__ __forceinline__ void store(Lower A, Moments& moments, double ridge) {
    each_block([&](int behind, int m, int at) {
        const int row = block_column(behind), column = block_column(m);
        double* block = A.block(max(row, column), min(row, column));
        #pragma unroll
        for (int h = 0; h < 2; h++)
            each(moments[at + h], [&](int i, int j, double x) {
                j += 8 * h;
                block[column > row ? Lower::place(j, i) : Lower::place(i, j)] = m == behind && i == j ? x + ridge : x;
            });
    });
}

// ---- the solution ---------------------------------------------------------------------------------------------------

// Eight columns of A less what those before them make of theirs, 16 rows at a time. Products are summed before they are
// taken off a number that may be much larger.
__device__ __forceinline__ void take_off(Lower A, int first) {
    const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    #pragma unroll 1
    for (int block = threadIdx.x / 32 % TEAM; block < BLOCKS; block += TEAM) {
        if (block < first / 16) continue;
        Sum taken = {};
        #pragma unroll 2
        for (int c = 0; c < first; c += 8) {
            const Two<double> low = A.two(16 * block + line, c + pair), high = A.two(16 * block + line + 8, c + pair);
            const Two<double> right = A.two(first + line, c + pair);
            taken.add({low.x[0], high.x[0], low.x[1], high.x[1]}, {right.x[0], right.x[1]});
        }
        each(taken, [&](int i, int j, double x) { A.at(16 * block + i, first + j) -= x; });
    }
}
// x of A x = b, which is used up, as is A. A thread has one row; what all rows need of eight columns it finds itself.
// No pivot is less than the ridge but by rounding.
__device__ __forceinline__ void solve(Lower A, double* b, double* scales, double* x, double ridge) {
    const int row = threadIdx.x % KD;
    #pragma unroll 1
    for (int first = 0; first < KD; first += 8) {
        __syncthreads();  // A is there, or its columns before these are final
        take_off(A, first);
        __syncthreads();  // these columns are there
        double corner[8][8], own[8], y[8], mine = 0, scale = 0;
        #pragma unroll
        for (int c = 0; c < 8; c++) {
            own[c] = row < first ? 0 : A.at(row, first + c), y[c] = b[first + c];
            for (int i = c; i < 8; i++) corner[i][c] = A.at(first + i, first + c);
        }
        #pragma unroll
        for (int c = 0; c < 8; c++) {
            const double inverse = rsqrt(corner[c][c] < ridge ? ridge : corner[c][c]);
            own[c] *= inverse, y[c] *= inverse;
            if (row == first + c) mine = y[c], scale = inverse;
            for (int i = c + 1; i < 8; i++) corner[i][c] *= inverse;
            for (int i = c + 1; i < 8; i++) {
                own[i] = fma(-own[c], corner[i][c], own[i]), y[i] = fma(-y[c], corner[i][c], y[i]);
                for (int k = i; k < 8; k++) corner[k][i] = fma(-corner[k][c], corner[i][c], corner[k][i]);
            }
        }
        __syncthreads();  // everyone has read them
        if (row < first) continue;
        double taken = 0;
        #pragma unroll
        for (int c = 0; c < 8; c++) A.at(row, first + c) = own[c], taken = fma(own[c], y[c], taken);
        if (row < first + 8)
            b[row] = mine, scales[row] = scale;
        else
            b[row] -= taken;
    }
    #pragma unroll 1
    for (int first = KD - 8; first >= 0; first -= 8) {
        __syncthreads();  // b has lost what the later rows of x make of it
        double y[8], taken = 0;
        #pragma unroll
        for (int c = 7; c >= 0; c--) y[c] = b[first + c];
        #pragma unroll
        for (int c = 7; c >= 0; c--) {
            y[c] *= scales[first + c];
            for (int i = 0; i < c; i++) y[i] = fma(-A.at(first + c, first + i), y[c], y[i]);
            if (row == first + c) x[row] = y[c];
            if (row < first) taken = fma(A.at(first + c, row), y[c], taken);
        }
        if (row < first) b[row] -= taken;
    }
    __syncthreads();  // x is there, and nobody is left at A
}

// ---- the whole ------------------------------------------------------------------------------------------------------

// A query and a key that is not finite, joined channel by channel.
__device__ __forceinline__ double joined_with_bad(const Shared& all, int query, int pair) {
    double x = 0;
    #pragma unroll 1
    for (int c = 0; c < D; c++)
        x = joined(KIND, all.queries[query][c], double(widened(all.key.at(pair, c))) - all.from[c], x);
    return x;
}
// A value that is not finite turns to NaN those answers that see it, and no others.
__device__ __forceinline__ void spoil(Sum& sum, const Shared& all, int start, int low, int columns) {
    each(sum, [&](int i, int query, double& sum_of_query) {
        const int column = low + threadIdx.x / 32 % BLOCKS * 16 + i;
        #pragma unroll 1
        for (int j = 0; j < PAIRS && query < QUERIES && column < columns; j++) {
            if (!all.visible[query][j]) continue;
            const double x = double(widened(all.value.at(start + j, column)));
            sum_of_query += x - x;
        }
    });
}

// What a warp knows of its query, as it weighs pairs for it: each lane one of a tile.
struct Weigher {
    int query, last;             // which, and its newest pair
    long long oldest;            // its window begins at this place
    double length;               // squared, from the oldest key
    double top, share, across;   // highest logit, share of a weight of one, product of solution and mean key
    double total, since;         // of a pass: weights, and gates that are newer than the tile

    __device__ __forceinline__ void weigh(Shared& all, int mode, int start, double width, bool spoilt) {
        const int lane = threadIdx.x % 32, pair = start + lane;
        const double left = GATED ? all.seen.left_of_lane(pair, last, since) : 0.0;
        const long long place = pair <= last ? all.seen.place(pair) : -1;
        const bool seen = place >= 0 && place >= oldest && !(left < NOTHING / 2);
        double x = 0, along = 0;
        #pragma unroll
        for (int i = 0; i < SPLITS; i++) x += all.scores[0][i][query][lane];
        if (KIND == GAUSSIAN) {
            const double apart = fma(-2.0, x, length + all.norms[lane]);
            x = apart < 0 ? 0 : apart;
        }
        if (spoilt && seen && all.bad[lane]) x = joined_with_bad(all, query, pair);
        x = seen ? log_kernel(KIND, x, width) + left : -infinite();
        if (mode == MEANS) {
            const double highest = top_of_row(x), kept = highest > top ? exp(top - highest) : 1;
            top = highest > top ? highest : top, total *= kept;
            if (lane == 0) all.kept[query] = kept;
        }
        double p = x == -infinite() ? 0 : exp(x - top) * share;
        if (mode == ANSWERS) {
            #pragma unroll
            for (int i = 0; i < SPLITS; i++) along += all.scores[1][i][query][lane];
            p = p == 0 ? 0 : p * (1 + (along - across));
            all.visible[query][lane] = seen;
        }
        all.weights[query][lane] = p, total += p;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
local_lines(const data* q, const stored* k, const stored* v, const long long* position, const long long* count,
            const logs* left, const logs* log_decay, const bool* undone, data* answers, const long long* table,
            int axes, int tokens, int columns, int pairs, int cached, int groups, int blocks, int causal, int window,
            double width, double ridge) {
    __shared__ Shared all;
    const Keys keys = {reinterpret_cast<double*>(dynamic_shared())}, values = {keys.begin + PAIRS * Keys::stride};
    const Lines queries = {all.queries[0]}, solutions = {all.solutions[0]};
    const Weights weights = {all.weights[0]};
    const int memory = blockIdx.x / blocks, end_of_rows = groups * tokens, warp = threadIdx.x / 32;
    const int own = threadIdx.x / KD, channel = threadIdx.x % KD;  // of a query, where each thread has a number of one
    const Lower A = {keys.begin + own * Lower::size};              // in the place of the tiles
    if (threadIdx.x == 0) {
        all.query = rows(q, table, axes, Q, memory), all.answer = rows(answers, table, axes, O, memory);
        all.key = rows(k, table, axes, KEY, memory), all.value = rows(v, table, axes, V, memory);
        all.seen = {rows(position, table, axes, POSITION, memory), rows(count, table, axes, COUNT, memory),
                    rows(log_decay, table, axes, GATE, memory), rows(left, table, axes, LEFT, memory),
                    position != nullptr, count != nullptr, log_decay != nullptr, cached, pairs, tokens, window, 0};
    }
    if (own == 0) {
        const double oldest = double(widened(rows(k, table, axes, KEY, memory).at(0, channel < D ? channel : 0)));
        all.from[channel] = channel < D ? origin(oldest) : 0.0;
    }

    // The longest pasts come first.
    #pragma unroll 1
    for (int part = (end_of_rows - 1) / QUERIES - blockIdx.x % blocks; part >= 0; part -= blocks) {
        const int first = part * QUERIES, end = min(first + QUERIES, end_of_rows), row = first + own;
        bool wanted = row < end;
        if (REST) wanted = wanted && rows(undone, table, axes, UNDONE, memory).of(row % groups).at(row / groups, 0);
        if (!__syncthreads_or(wanted)) continue;  // the arrays and the oldest key are known, nobody is left behind
        if (channel == 0) all.wanted[own] = wanted;
        const bool there = wanted && channel < D;
        const double asked = there ? double(widened(all.query.of(row % groups).at(row / groups, channel))) : 0.0;
        const double from = there ? all.from[channel] : 0.0;
        all.queries[own][channel] = KIND == GAUSSIAN ? asked - from : asked;
        const int low = first / groups, high = (end - 1) / groups;  // steps
        const int newest = ((causal ? cached + high + 1 : pairs) - 1) / PAIRS, lowest = all.seen.begin(low) / PAIRS;
        __syncthreads();  // the queries are there

        Weigher mine = {warp, -1, 0, 0, -infinite(), 1, 0, 0, 0};
        if (warp < QUERIES && all.wanted[warp]) {
            const int step = (first + warp) / groups;
            mine.last = causal ? cached + step : pairs - 1;
            mine.oldest = window ? all.seen.memorised(step) - window : 0;
            for (int c = threadIdx.x % 32; KIND == GAUSSIAN && c < KD; c += 32)
                mine.length = fma(all.queries[warp][c], all.queries[warp][c], mine.length);
            mine.length = over_row(mine.length);
        }
        int mode = MEANS, column = 0;
        #pragma unroll 1
        while (column < columns) {
            Moments moments = {};
            Sum sum = {};
            mine.total = mine.since = 0;
            #pragma unroll 1
            for (int tile = newest; tile >= lowest; tile--) {
                const int start = tile * PAIRS;
                __syncthreads();  // nobody is left at the tile before
                bool wrong = bring_keys(keys, all, start);
                if (mode == ANSWERS) wrong |= bring_values(values, all, start, column, columns);
                const bool spoilt = __syncthreads_or(wrong);  // the tile is there
                multiply(all.scores[0], queries, keys);
                if (mode == ANSWERS) multiply(all.scores[1], solutions, keys);
                __syncthreads();  // the scores are there
                if (warp < QUERIES) mine.weigh(all, mode, start, width, spoilt);
                __syncthreads();  // the weights are there
                if (mode == MOMENTS) {
                    if (all.wanted[own]) square(moments, all, own, weights, keys);
                    continue;
                }
                if (mode == MEANS)
                    each(sum, [&](int, int j, double& x) { x *= all.kept[j % QUERIES]; });
                gather(sum, weights, mode == MEANS ? keys : values);
                if (mode == ANSWERS && spoilt) spoil(sum, all, start, column, columns);
            }

            if (mode == MOMENTS) {
                __syncthreads();  // nobody is left at the keys, where A goes
                store(A, moments, ridge);
                solve(A, all.rest[own], all.scales[own], all.solutions[own], ridge);
                if (warp < QUERIES) {
                    for (int c = threadIdx.x % 32; c < KD; c += 32)
                        mine.across = fma(all.solutions[warp][c], all.centres[warp][c], mine.across);
                    mine.across = over_row(mine.across);
                }
                mode = ANSWERS;
                continue;
            }
            each(sum, [&](int i, int j, double x) {
                if (j < QUERIES) all.sums[warp / BLOCKS][j][warp % BLOCKS * 16 + i] = x;
            });
            mine.total = over_row(mine.total);
            if (warp < QUERIES && threadIdx.x % 32 == 0) all.total[warp] = mine.total;
            __syncthreads();  // the sums are there
            double x = 0;
            #pragma unroll
            for (int half = 0; half < HALVES; half++) x += all.sums[half][own][channel];
            const double total = all.total[own];
            if (mode == MEANS) {
                const double mean = total == 0 ? 0 : x / total;
                all.centres[own][channel] = mean;
                all.rest[own][channel] = total == 0 ? 0 : asked - from - mean;
                mine.top = mine.top == -infinite() ? 0 : mine.top;
                mine.share = mine.total == 0 ? 0 : 1 / mine.total;
                mode = MOMENTS;
            } else {
                if (wanted && column + channel < columns)
                    put(all.answer.of(row % groups).at(row / groups, column + channel), total == 0 ? x : x / total);
                column += KD;
            }
        }
    }
}
