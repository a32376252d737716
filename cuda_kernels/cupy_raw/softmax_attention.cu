// Softmax attention, tile by tile, newest pairs first:  x = width q . k + bias,  top' = max(top, x),  p = exp(x - top'),
// weight' = weight exp(top - top') + sum p,  o' = o exp(top - top') + p v,  at the end o / weight.
//
// A block has ROWS queries of one memory, some value columns, and takes in PAIRS pairs at a time; LANES neighbouring lanes
// share R rows: each weighs W of the pairs and answers for C columns of every slab. Keys and queries pass through shared
// memory by slabs of SLAB channels, values by slabs of WIDTH columns, so that heads may have any size. If not PLAIN, x is
// the log of any kernel of q and k.

enum { Q, KEY, V, POSITION, COUNT, LEFT, GATE, O };
enum { R = ROWS * LANES / 128, W = PAIRS / LANES, WIDTH = C * LANES };

// Values of a tile by their weights, which are below zero where a pair is HIDDEN: of that not even a NaN comes through.
template <bool HIDDEN>
__device__ __forceinline__ void add_values(real (&sums)[R][C], const real (&weights)[PAIRS][ROWS + 4],
                                           const real (&values)[PAIRS][WIDTH], int mine, int lane) {
    #pragma unroll 2
    for (int j = 0; j < PAIRS; j++)
        for (int r = 0; r < R; r++) {
            const real p = weights[j][mine + r];
            for (int c = 0; c < C; c++) {
                const real next = fma(p, values[j][lane + c * LANES], sums[r][c]);
                sums[r][c] = HIDDEN && p < 0 ? sums[r][c] : next;
            }
        }
}

extern "C" __global__ void __launch_bounds__(128)
softmax_attention(const data* q, const stored* k, const stored* v, const long long* position, const long long* count,
                  const logs* left, const logs* log_decay, data* o, const long long* table, int axes, int tokens,
                  int columns, int channels, int pairs, int cached, int groups, int blocks, int parts, int causal,
                  int window, int sinks, int kind, real width) {
    const int code = PLAIN ? DOT : kind;
    __shared__ real queries[SLAB][ROWS + 4], keys[SLAB][PAIRS + 4];
    __shared__ real values[PAIRS][WIDTH];
    __shared__ real weights[PAIRS][ROWS + 4];  // at first the biases
    __shared__ const data* asked[ROWS];        // each row's query, null beyond the last
    __shared__ long long oldest[ROWS];         // each row's window begins at this place
    __shared__ int last[ROWS];                 // each row's newest pair
    __shared__ double since[ROWS];             // sum of each row's gates that are newer than this tile

    const int memory = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;  // the longest pasts come first
    const int part = block % parts, first = block / parts * ROWS;
    const int mine = threadIdx.x / LANES * R, lane = threadIdx.x % LANES, end_of_rows = groups * tokens;
    const auto query = rows(q, table, axes, Q, memory);
    const auto key = rows(k, table, axes, KEY, memory);
    const auto value = rows(v, table, axes, V, memory);
    const Pairs seen{rows(position, table, axes, POSITION, memory), rows(count, table, axes, COUNT, memory),
                     rows(log_decay, table, axes, GATE, memory), rows(left, table, axes, LEFT, memory),
                     position != nullptr, count != nullptr, log_decay != nullptr, cached, pairs, tokens, window, sinks};
    const int low = first / groups, high = (min(first + ROWS, end_of_rows) - 1) / groups;  // steps

    if (threadIdx.x < ROWS) {
        const int row = first + threadIdx.x, step = row / groups;
        const bool there = row < end_of_rows;
        asked[threadIdx.x] = there ? &query.of(row % groups).at(step, 0) : nullptr;
        last[threadIdx.x] = !there ? -1 : causal ? cached + step : pairs - 1;
        oldest[threadIdx.x] = there && window ? seen.memorised(step) - window : 0;
        since[threadIdx.x] = 0;
    }
    real top[R], weight[R], answer[R][SLABS * C];
    for (int r = 0; r < R; r++) {
        top[r] = -infinite(), weight[r] = 0;
        for (int c = 0; c < SLABS * C; c++) answer[r][c] = 0;
    }

    // Row by row the biases of a tile, and then the gates of all that is newer than the next one.
    auto age = [&](int start, bool keep) {
        double total = since[threadIdx.x];
        #pragma unroll 1
        for (int j = PAIRS - 1; j >= 0; j--) {
            const int pair = start + j;
            if (keep) weights[j][threadIdx.x] = pair < pairs ? bias_of(total + seen.left_of(pair)) : real(0);
            if (pair <= last[threadIdx.x] && !(total < NOTHING / 2)) total += seen.gate_of(pair);
        }
        since[threadIdx.x] = total;
    };
    auto sees = [&](int row, int pair) {
        if (pair > last[row]) return false;
        const long long place = seen.place(pair);
        return place >= 0 && (place >= oldest[row] || place < sinks);
    };

    const int begin = seen.begin(low), front = seen.front(), end = causal ? cached + high + 1 : pairs;
    const int lowest = front ? 0 : begin / PAIRS;
    #pragma unroll 1
    for (int tile = (end - 1) / PAIRS; tile >= lowest; tile--) {
        const int start = tile * PAIRS;
        if (start + PAIRS <= begin && start >= front) {  // not seen
            if (GATED && threadIdx.x < ROWS) age(start, false);
            continue;
        }
        const bool all = !position && start + PAIRS <= (causal ? cached + low + 1 : pairs) &&
                         (!window || start >= seen.memorised(high) - window);
        real x[R][W] = {};
        #pragma unroll 1
        for (int channel = 0; channel == 0 || channel < channels; channel += SLAB) {
            __syncthreads();  // nobody is left at what is staged anew
            if (GATED && channel == 0 && threadIdx.x < ROWS) age(start, true);
            const int c = channel + threadIdx.x % SLAB, own = threadIdx.x / SLAB;  // all loads are under way at a time
            #pragma unroll
            for (int row = own; row < own + ROWS; row += 128 / SLAB) {
                const bool there = c < channels && first + row < end_of_rows;
                queries[c - channel][row] = there ? widened(asked[row][c * query.column]) : real(0);
            }
            const real from = code == EXPONENTIAL && c < channels ? origin(widened(key.at(0, c))) : real(0);
            #pragma unroll
            for (int j = own; j < own + PAIRS; j += 128 / SLAB) {
                const bool there = c < channels && start + j < pairs;
                keys[c - channel][j] = there ? widened(key.at(start + j, c)) - from : real(0);
            }
            __syncthreads();  // a slab of channels is staged
            #pragma unroll 4
            for (int c = 0; c < SLAB; c++)
                for (int r = 0; r < R; r++)
                    for (int w = 0; w < W; w++)
                        x[r][w] = joined(code, queries[c][mine + r], keys[c][lane + w * LANES], x[r][w]);
        }

        real kept[R];
        int hidden = 0;  // whether a row does not see a pair
        #pragma unroll
        for (int r = 0; r < R; r++) {
            real higher = -infinite();
            for (int w = 0; w < W; w++) {
                const int j = lane + w * LANES;
                const real bias = GATED ? weights[j][mine + r] : real(0);
                const bool none = (!all && !sees(mine + r, start + j)) || bias == -infinite();
                x[r][w] = none ? -infinite() : log_kernel(code, x[r][w], width) + bias;
                higher = x[r][w] > higher ? x[r][w] : higher;
            }
            higher = top_of_row(higher);
            higher = higher > top[r] ? higher : top[r];
            const real shift = higher == -infinite() ? real(0) : higher;
            kept[r] = exp(top[r] - shift), top[r] = higher;
            real sum = 0;
            for (int w = 0; w < W; w++) {
                const real p = exp(x[r][w] - shift);
                sum += p;
                const bool none = x[r][w] == -infinite();
                weights[lane + w * LANES][mine + r] = none ? real(-1) : p, hidden |= none;
            }
            weight[r] = fma(kept[r], weight[r], over_row(sum));
        }

        #pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
            if (slab) __syncthreads();  // the slab before is used up
            #pragma unroll 8
            for (int i = threadIdx.x; i < PAIRS * WIDTH; i += 128) {
                const int c = i % WIDTH, j = i / WIDTH, column = (part * SLABS + slab) * WIDTH + c;
                const bool there = column < columns && start + j < pairs;
                values[j][c] = there ? number(widened(value.at(start + j, column))) : real(0);
            }
            hidden = __syncthreads_or(hidden);  // weights and a slab of columns are staged
            real sums[R][C] = {};
            if (hidden)
                add_values<true>(sums, weights, values, mine, lane);
            else
                add_values<false>(sums, weights, values, mine, lane);
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C; c++) answer[r][slab * C + c] = fma(kept[r], answer[r][slab * C + c], sums[r][c]);
        }
    }

    #pragma unroll
    for (int r = 0; r < R; r++) {
        const int row = first + mine + r, step = row / groups;
        if (row >= end_of_rows) continue;
        const auto out = rows(o, table, axes, O, memory).of(row % groups);
        #pragma unroll
        for (int c = 0; c < SLABS * C; c++) {
            const int column = part * SLABS * WIDTH + c * LANES + lane;
            if (column < columns) put(out.at(step, column), weight[r] != 0 ? answer[r][c] / weight[r] : answer[r][c]);
        }
    }
}
