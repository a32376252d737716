// Softmax attention on tensor cores, for data of 16 bits: tiles of 64 queries meet tiles of 64 pairs, newest first, while
// the next pairs are on their way.
//
// Each of four warps has 16 queries. Logits, weights and answers stay in registers, spread as tensor.cuh says: a thread has
// two rows, `line` and line + 8 of its warp. Weights are rounded to the format of the data before they are added up, so
// that the answer is a mean.

enum { Q, KEY, V, POSITION, COUNT, GATE, O };
enum { ROWS = 64, PAIRS = 64 };
const real LOG2E = real(1.4426950408889634);
typedef Tile<data, ROWS, KD> Queries;
typedef Tile<data, PAIRS, KD> Keys;
typedef Tile<data, PAIRS, VD> Values;

extern "C" __global__ void __launch_bounds__(128, 2)
softmax_tensor(const data* q, const data* k, const data* v, const long long* position, const long long* count,
               const logs* log_decay, data* o, const long long* table, int axes, int tokens, int columns, int channels,
               int pairs, int groups, int blocks, int parts, int causal, int window, int sinks, real width) {
    __shared__ long long oldest[ROWS];  // each row's window begins at this place
    __shared__ int last[ROWS];          // each row's newest pair
    __shared__ bool bad[PAIRS];         // whether a value of a pair is not finite
    __shared__ double gates[PAIRS], left[PAIRS], halves[2];  // of a tile: gates, the sum after each in its half, both sums
    unsigned char* at = dynamic_shared();
    const Queries queries = tile_of<Queries>(at);
    const auto keys_of = [=](int turn) { return Keys{(data*)(at + turn * (Keys::bytes + Values::bytes))}; };
    const auto values_of = [=](int turn) { return Values{keys_of(turn).begin + Keys::bytes / sizeof(data)}; };

    const int memory = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;  // the longest pasts come first
    const int part = block % parts, first = block / parts * ROWS, end_of_rows = groups * tokens;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, mine = warp * 16 + lane / 4;
    const auto query = rows(q, table, axes, Q, memory);
    const auto key = rows(k, table, axes, KEY, memory);
    const auto value = rows(v, table, axes, V, memory);
    const Pairs seen{rows(position, table, axes, POSITION, memory), rows(count, table, axes, COUNT, memory),
                     rows(log_decay, table, axes, GATE, memory), {},
                     position != nullptr, count != nullptr, bool(GATED), 0, pairs, tokens, window, sinks};
    const int low = first / groups, high = (min(first + ROWS, end_of_rows) - 1) / groups;  // steps
    const int begin = seen.begin(low), front = seen.front(), end = causal ? high + 1 : pairs;
    const bool key_vectors = in_vectors(key), value_vectors = in_vectors(value);

    auto stage = [&](int tile, int into) {
        const int start = tile * PAIRS;
        fetch(keys_of(into), key, start, 0, pairs - start, channels, key_vectors);
        fetch(values_of(into), value, start, part * VD, pairs - start, columns - part * VD, value_vectors);
        close_copies();
    };
    auto before = [&](int tile) {  // the tile to look at next; gates are added up over all
        const bool gap = !GATED && tile * PAIRS <= begin && (tile - 1) * PAIRS >= front;
        return gap ? (front + PAIRS - 1) / PAIRS - 1 : tile - 1;
    };
    auto age = [&](int start) {
        if (threadIdx.x >= PAIRS) return;
        double total = start + threadIdx.x < pairs ? seen.gate_of(start + threadIdx.x) : 0.0, after = 0;
        gates[threadIdx.x] = total;
        for (int distance = 1; distance < 32; distance *= 2) {
            const double other = __shfl_xor_sync(0xffffffffu, total, distance);
            after += lane & distance ? 0.0 : other;
            total += other;
        }
        left[threadIdx.x] = after;
        if (lane == 0) halves[warp] = total;
    };
    // The sum of a tile's gates from pair i up to pair `newest`; and after pair j.
    auto between = [&](int i, int newest) {
        double total = 0;
        #pragma unroll 1
        for (; i <= newest; i++) total += gates[i];
        return total;
    };
    auto until = [&](int newest) { return newest < PAIRS - 1 ? between(0, newest) : halves[0] + halves[1]; };
    auto after = [&](int j, int newest) {
        return newest < PAIRS - 1 ? between(j + 1, newest) : j < 32 ? left[j] + halves[1] : left[j];
    };
    auto sees = [&](int row, int pair) {
        if (pair > last[row]) return false;
        const long long place = seen.place(pair);
        return place >= 0 && (place >= oldest[row] || place < sinks);
    };

    int tile = (end - 1) / PAIRS, turn = 0;
    stage(tile, 0);
    #pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * KD; i += 128) {
        const int row = first + i / KD, c = i % KD;
        const bool there = row < end_of_rows && c < channels;
        queries.at(i / KD, c) = there ? query.of(row % groups).at(row / groups, c) : data{};
    }
    if (threadIdx.x < ROWS) {
        const int row = first + threadIdx.x, step = row / groups;
        const bool there = row < end_of_rows;
        last[threadIdx.x] = !there ? -1 : causal ? step : pairs - 1;
        oldest[threadIdx.x] = there && window ? seen.memorised(step) - window : 0;
    }
    real top[2] = {-infinite(), -infinite()}, weight[2] = {};
    double since[2] = {}, deepest = 0;  // sums of the gates newer than this tile, of each row and of the last of all
    Sum answer[VD / 8] = {};

    #pragma unroll 1
    for (; tile >= 0; turn ^= 1) {
        const int next = before(tile), start = tile * PAIRS;
        const Keys keys = keys_of(turn);
        const Values values = values_of(turn);
        bool all = !position && start + PAIRS <= (causal ? low + 1 : pairs) &&
                         (!window || start >= seen.memorised(high) - window);
        if (next >= 0) stage(next, turn ^ 1);
        if (next >= 0)
            finish_copies<1>();
        else
            finish_copies<0>();
        if (GATED) age(start);
        __syncthreads();  // the queries and the pairs of this tile are staged
        if (GATED) {
            deepest += until(high - start);
            all = all && deepest >= NOTHING / 2;
        }
        if (!all) {
            if (threadIdx.x < PAIRS) {
                bool found = false;
                #pragma unroll 1
                for (int c = 0; c < VD; c++) {
                    const real x = widened(values.at(threadIdx.x, c));
                    if (x - x != 0) found = true, values.at(threadIdx.x, c) = data{};
                }
                bad[threadIdx.x] = found;
            }
            __syncthreads();  // no weight of zero meets what is not finite
        }

        Sum score[PAIRS / 8] = {};
        #pragma unroll
        for (int c = 0; c < KD; c += 16) {
            Left<data, 1> left;
            load_left(left, queries, warp * 16, c);
            #pragma unroll
            for (int n = 0; n < PAIRS / 16; n++) {
                Right<data, 1> right[2];
                load_right_transposed(right, keys, n * 16, c);
                multiply_onto(score[2 * n], left, right[0]);
                multiply_onto(score[2 * n + 1], left, right[1]);
            }
        }

        const auto bias = [&](int half, int j) {
            if (!GATED) return real(0);
            return bias_of(since[half] + after(j, last[mine + 8 * half] - start)) * LOG2E;
        };
        real kept[2];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            real higher = -infinite();
            #pragma unroll
            for (int n = 0; n < PAIRS / 4; n++) {
                real& x = score[n / 2].x[2 * half + n % 2];
                const int pair = start + n / 2 * 8 + lane % 4 * 2 + n % 2;
                const real more = all || sees(mine + 8 * half, pair) ? bias(half, pair - start) : -infinite();
                x = more == -infinite() ? more : fma(width, x, more);
                higher = x > higher ? x : higher;
            }
            higher = top_of_row(higher);
            higher = higher > top[half] ? higher : top[half];
            const real shift = higher == -infinite() ? real(0) : higher;
            kept[half] = exp2(top[half] - shift), top[half] = higher;
            #pragma unroll
            for (int n = 0; n < PAIRS / 4; n++) {
                real& x = score[n / 2].x[2 * half + n % 2];
                x = exp2(x - shift);
            }
            weight[half] *= kept[half];
        }
        #pragma unroll
        for (int n = 0; n < VD / 8; n++)
            for (int i = 0; i < 4; i++) answer[n].x[i] *= kept[i / 2];

        #pragma unroll
        for (int m = 0; m < PAIRS / 16; m++) {
            Left<data, 1> left;
            left_of(left, score[2 * m], score[2 * m + 1]);
            for (int r = 0; r < 4; r++) weight[r % 2] += low_of<data>(left.x[0][r]) + high_of<data>(left.x[0][r]);
            #pragma unroll
            for (int n = 0; n < VD / 16; n++) {
                Right<data, 1> right[2];
                load_right(right, values, m * 16, n * 16);
                multiply_onto(answer[2 * n], left, right[0]);
                multiply_onto(answer[2 * n + 1], left, right[1]);
            }
        }
        if (!all) {  // a value that is not finite turns to NaN those queries that see it, and no others
            #pragma unroll 1
            for (int j = 0; j < PAIRS; j++) {
                if (!bad[j]) continue;
                bool there[2];
                #pragma unroll
                for (int half = 0; half < 2; half++)
                    there[half] = sees(mine + 8 * half, start + j) && bias(half, j) != -infinite();
                #pragma unroll
                for (int n = 0; n < VD / 2; n++) {
                    const int i = n % 4, column = part * VD + n / 4 * 8 + lane % 4 * 2 + i % 2;
                    const real x = column < columns && there[i / 2] ? widened(value.at(start + j, column)) : real(0);
                    answer[n / 4].x[i] += x - x;
                }
            }
        }
        for (int half = 0; GATED && half < 2; half++)
            if (!(since[half] < NOTHING / 2)) since[half] += until(last[mine + 8 * half] - start);
        __syncthreads();  // nobody is left at this tile, whose place the one after the next takes
        tile = next;
    }

    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const real total = over_row(weight[half]);
        const int row = first + mine + 8 * half;
        if (row >= end_of_rows) continue;
        const auto out = rows(o, table, axes, O, memory).of(row % groups);
        #pragma unroll
        for (int n = 0; n < VD / 4; n++) {
            const int column = part * VD + n / 2 * 8 + lane % 4 * 2 + n % 2;
            const real x = answer[n / 2].x[2 * half + n % 2];
            if (column < columns) put(out.at(row / groups, column), total != 0 ? number(x / total) : x);
        }
    }
}
