// Softmax attention of few queries over a long past, which is read once and where it lies:
//   top' = max(top, x),  p = exp(x - top'),  weight' = weight exp(top - top') + sum p,  o' = o exp(top - top') + p v
//
// A block has ROWS queries of a memory, some value columns, and a piece of the cached pairs; the last piece also has
// the new ones. LANES neighbouring lanes share a pair, four channels or columns of it each at a time, and TOGETHER
// pairs are under way together; each such crew has a mean of its own, and these are joined at the end. If not PLAIN, x
// is the log of any kernel of q and k.

enum { Q, KEY, V, PAST_K, PAST_V, PLACED, LEFT, POSITION, COUNT, GATE, O, PIECES };
enum { CREWS = 128 / LANES, SPAN = 4 * LANES, C = 4 * SLABS };
enum { UNDER_WAY = ROWS < 8 ? 2 : 1 };  // slabs of channels, as registers allow

template <class T>
struct Four {
    T x[4];
};
template <class T>
struct alignas(16) Whole {
    T x[16 / sizeof(T)];
};
// Four numbers of a row from a column on, zero beyond the last; in pieces of 16 bytes if FOURS.
template <bool FOURS, class T>
__device__ __forceinline__ void load(Four<T>& four, const Rows<const T>& from, int row, int column, int columns) {
    if (FOURS) {
        constexpr int each = sizeof(T) < 4 ? 4 : 16 / sizeof(T);
        const T* at = from.begin + row * from.row + column;
        #pragma unroll
        for (int i = 0; i < 4; i += each) {
            const Whole<T> piece = *reinterpret_cast<const Whole<T>*>(at + i);
            for (int j = 0; j < each; j++) four.x[i + j] = piece.x[j];
        }
    } else {
        #pragma unroll
        for (int i = 0; i < 4; i++)
            if (column + i < columns) four.x[i] = from.at(row, column + i);
    }
}
// Whether that can be.
template <class T>
__device__ __forceinline__ bool in_fours(const Rows<const T>& from, int columns) {
    return columns > 0 && columns % 4 == 0 && from.column == 1 && (size_t)from.begin % 16 == 0 &&
           from.row * (long long)sizeof(T) % 16 == 0;
}

// Sums over the crews of a warp.
__device__ __forceinline__ real over_crews(real x) {
    for (int distance = LANES; distance < 32; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

struct Mean {
    real top[ROWS], weight[ROWS], value[ROWS][C];

    __device__ __forceinline__ void begin() {
        for (int r = 0; r < ROWS; r++) {
            top[r] = -infinite(), weight[r] = 0;
            for (int c = 0; c < C; c++) value[r][c] = 0;
        }
    }
    // Some pairs more, by their logits: of what is hidden not even a NaN comes through.
    template <int N, class T>
    __device__ __forceinline__ void add(const real (&x)[N][ROWS], const Four<T> (&values)[N][SLABS]) {
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            real higher = top[r];
            for (int i = 0; i < N; i++) higher = x[i][r] > higher ? x[i][r] : higher;
            const real shift = higher == -infinite() ? real(0) : higher, kept = exp(top[r] - shift);
            top[r] = higher, weight[r] *= kept;
            for (int c = 0; c < C; c++) value[r][c] *= kept;
            #pragma unroll
            for (int i = 0; i < N; i++) {
                const real p = exp(x[i][r] - shift);
                const bool seen = x[i][r] != -infinite();
                weight[r] += p;
                for (int c = 0; c < C; c++) {
                    const real next = fma(p, number(widened(values[i][c / 4].x[c % 4])), value[r][c]);
                    value[r][c] = seen ? next : value[r][c];
                }
            }
        }
    }
};

// What all threads know of the queries.
struct Asked {
    real queries[ROWS][CHANNELS], from[CHANNELS];  // from: what keys are measured from
    double since[ROWS];                            // sum of the gates of all new pairs that a row sees
    real biases[ROWS][8];                          // what joins the logit of a new pair
    long long oldest[ROWS];                        // each row's window begins at this place
};

// Keys and values of the pairs of one side.
template <class T>
struct Side {
    Rows<const T> key, value;
    int channels, columns, first_column, code;
    real width;

    // N pairs from this crew's first one on, every CREWS of them, meet all queries; FOURS also says that all are there,
    // else those before `end` are. bias(pair, row) joins the logit, minus infinity where the pair is hidden.
    template <bool FOURS, int N, class Bias>
    __device__ __forceinline__ void meet(Mean& mean, const Asked& asked, int pair, int end, Bias bias) const {
        const int lane = threadIdx.x % LANES;
        Four<T> values[N][SLABS] = {};
        real x[N][ROWS] = {};
        #pragma unroll
        for (int i = 0; i < N; i++)
            for (int s = 0; s < SLABS; s++) {
                const int column = first_column + s * SPAN + 4 * lane, row = pair + i * CREWS;
                if (column < columns && (FOURS || row < end)) load<FOURS>(values[i][s], value, row, column, columns);
            }
        #pragma unroll UNDER_WAY
        for (int c = 4 * lane; c < CHANNELS; c += SPAN) {
            Four<T> keys[N] = {};
            #pragma unroll
            for (int i = 0; i < N; i++)
                if (FOURS || pair + i * CREWS < end) load<FOURS>(keys[i], key, pair + i * CREWS, c, channels);
            #pragma unroll
            for (int e = 0; e < 4; e++)
                for (int i = 0; i < N; i++) {
                    const real one = widened(keys[i].x[e]) - (PLAIN ? real(0) : asked.from[c + e]);
                    for (int r = 0; r < ROWS; r++) x[i][r] = joined(code, asked.queries[r][c + e], one, x[i][r]);
                }
        }
        #pragma unroll
        for (int i = 0; i < N; i++)
            for (int r = 0; r < ROWS; r++) {
                const real sum = over_row(x[i][r]), own = FOURS || pair < end ? bias(pair + i * CREWS, r) : -infinite();
                x[i][r] = own == -infinite() ? -infinite() : log_kernel(code, sum, width) + own;
            }
        mean.add(x, values);
    }
};

extern "C" __global__ void __launch_bounds__(128, BLOCKS)
softmax_decode(const data* q, const data* k, const data* v, const stored* past_k, const stored* past_v,
               const long long* placed, const logs* left, const long long* position, const long long* count,
               const logs* log_decay, data* o, real* pieces, const long long* table, int axes, int tokens, int columns,
               int channels, int cached, int groups, int blocks, int parts, int cuts, int causal, int window, int sinks,
               int kind, real width) {
    const int code = PLAIN ? DOT : kind;
    __shared__ Asked asked;
    __shared__ real tops[4][ROWS], weights[4][ROWS], values[4][ROWS][SLABS * SPAN];

    const int memory = blockIdx.x / blocks, block = blockIdx.x % blocks, cut = block % cuts;
    const int part = block / cuts % parts, first = block / cuts / parts * ROWS, end_of_rows = groups * tokens;
    const int crew = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int first_column = part * SLABS * SPAN;
    const auto query = rows(q, table, axes, Q, memory);
    const auto place_of = rows(placed, table, axes, PLACED, memory);
    const auto place_of_new = rows(position, table, axes, POSITION, memory);
    const auto past = rows(left, table, axes, LEFT, memory);
    const Side<stored> old{rows(past_k, table, axes, PAST_K, memory), rows(past_v, table, axes, PAST_V, memory),
                           channels, columns, first_column, code, width};
    const Side<data> fresh{rows(k, table, axes, KEY, memory), rows(v, table, axes, V, memory), channels, columns,
                           first_column, code, width};

    for (int i = threadIdx.x; i < ROWS * CHANNELS; i += 128) {
        const int row = first + i / CHANNELS, c = i % CHANNELS;
        const bool there = row < end_of_rows && c < channels;
        asked.queries[i / CHANNELS][c] = there ? widened(query.of(row % groups).at(row / groups, c)) : real(0);
    }
    for (int c = threadIdx.x; c < CHANNELS; c += 128) {
        const bool any = code == EXPONENTIAL && c < channels;
        const real first_key = !any ? 0 : cached ? real(widened(old.key.at(0, c))) : real(widened(fresh.key.at(0, c)));
        asked.from[c] = origin(first_key);
    }
    if (threadIdx.x < ROWS) {
        const int r = threadIdx.x, row = first + r, step = row / groups, last = causal ? step : tokens - 1;
        const auto gate = rows(log_decay, table, axes, GATE, memory);
        const auto counted = rows(count, table, axes, COUNT, memory);
        asked.oldest[r] = window && row < end_of_rows ? counted.at(step, 0) - window : 0;
        double total = 0;
        #pragma unroll 1
        for (int j = tokens - 1; j >= 0; j--) {  // newest first
            const long long place = position ? place_of_new.at(j, 0) : 0;
            const bool seen = j <= last && place >= 0 && (!window || place >= asked.oldest[r] || place < sinks);
            asked.biases[r][j] = seen && row < end_of_rows ? bias_of(total) : -infinite();
            const double x = log_decay && j <= last && !(total < NOTHING / 2) ? double(gate.at(j, 0)) : 0.0;
            total += x < NOTHING ? NOTHING : x;
        }
        asked.since[r] = total;
    }
    __syncthreads();  // queries, and what each sees of the new pairs

    Mean mean;
    mean.begin();
    const auto of_cached = [&](int pair, int r) {
        const long long place = place_of.at(pair, 0);
        const bool seen = place >= 0 && (!window || place >= asked.oldest[r] || place < sinks);
        return seen ? bias_of(asked.since[r] + double(past.at(pair, 0))) : -infinite();
    };
    const int span = (cached + cuts - 1) / cuts, end = min((cut + 1) * span, cached);
    int start = cut * span;
    if (in_fours(old.key, channels) && in_fours(old.value, columns)) {
        #pragma unroll 1
        for (; start + CREWS * TOGETHER <= end; start += CREWS * TOGETHER)
            old.template meet<true, TOGETHER>(mean, asked, start + crew, end, of_cached);
    }
    #pragma unroll 1
    for (; start < end; start += CREWS) old.template meet<false, 1>(mean, asked, start + crew, end, of_cached);
    #pragma unroll 1
    for (int j = 0; cut == cuts - 1 && j < tokens; j += CREWS) {
        const auto of_new = [&](int pair, int r) { return asked.biases[r][pair]; };
        fresh.template meet<false, 1>(mean, asked, j + crew, tokens, of_new);
    }

    // The means of the crews of a warp, then of the warps.
    const auto out = rows(o, table, axes, O, memory);
    const int warp = threadIdx.x / 32;
    #pragma unroll
    for (int r = 0; r < ROWS; r++) {
        real top = mean.top[r];
        for (int distance = LANES; distance < 32; distance *= 2) {
            const real other = __shfl_xor_sync(0xffffffffu, top, distance);
            top = other > top ? other : top;
        }
        const real kept = exp(mean.top[r] - (top == -infinite() ? real(0) : top));
        const real weight = over_crews(kept * mean.weight[r]);
        if (threadIdx.x % 32 == 0) tops[warp][r] = top, weights[warp][r] = weight;
        #pragma unroll
        for (int c = 0; c < C; c++) {
            const real total = over_crews(kept * mean.value[r][c]);
            if (threadIdx.x % 32 < LANES) values[warp][r][c / 4 * SPAN + 4 * lane + c % 4] = total;
        }
    }
    __syncthreads();  // the means of all warps are there
    for (int i = threadIdx.x; i < ROWS * SLABS * SPAN; i += 128) {
        const int r = i / (SLABS * SPAN), c = i % (SLABS * SPAN), column = first_column + c;
        const int row = first + r, step = row / groups;
        if (row >= end_of_rows) continue;
        real top = -infinite(), weight = 0, total = 0;
        for (int w = 0; w < 4; w++) top = tops[w][r] > top ? tops[w][r] : top;
        const real shift = top == -infinite() ? real(0) : top;
        #pragma unroll
        for (int w = 0; w < 4; w++) {
            const real kept = exp(tops[w][r] - shift);
            weight = fma(kept, weights[w][r], weight), total = fma(kept, values[w][r][c], total);
        }
        const auto piece = rows(pieces, table, axes, PIECES, memory).of(row % groups);
        if (pieces && c == 0 && part == 0)
            piece.at(cut * tokens + step, columns) = top, piece.at(cut * tokens + step, columns + 1) = weight;
        if (column >= columns) continue;
        if (pieces)
            piece.at(cut * tokens + step, column) = total;
        else
            put(out.of(row % groups).at(step, column), weight != 0 ? total / weight : total);
    }
}
