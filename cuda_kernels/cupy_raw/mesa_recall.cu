// What a memory recalls at the solutions of the Mesa layer, in products of bfloat16:  G = g_t G + beta_t k_t v_t^T,
// o_t = G^T x_t: linear attention with x as the queries. Both are floats, in three terms: where a ridge is small, an answer
// is little beside what it is a sum of. A block has one memory, PANEL of its columns and one piece of the sequence, a warp
// has 16 tokens of a chunk.

enum { X, KEY, V, GATE, BETA, STATE, STATE_NEXT, O };

constexpr int TILES = PANEL / 16, KEY_PANELS = (KEYS + PANEL - 1) / PANEL;
typedef Sum Answers[PANEL / 8];
typedef Left<data, 3> Point[BLOCKS];

struct Room {
    Terms<BLOCKS * TILES> memory;
    Keys k;
    Values v;

    __device__ __forceinline__ explicit Room(unsigned char* at) {
        memory.begin = reinterpret_cast<data*>(at), at += decltype(memory)::bytes;
        k = tile_of<Keys>(at), v = tile_of<Values>(at);
    }
};

// Where the arrays of a block lie, in shared memory: registers are short.
struct Arrays {
    Source keys, values;
    Gates gates;
    Rows<const float> point;
    Rows<data> answer;
};

__device__ __forceinline__ int token_of(int half) { return threadIdx.x / 32 * 16 + 8 * half + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int column_of() { return threadIdx.x % 4 * 2; }
// use(i, j) for all numbers of G, by all threads.
template <class Use>
__device__ __forceinline__ void each_of_memory(Use use) {
    #pragma unroll 1
    for (int at = threadIdx.x; at < KEYS * PANEL; at += THREADS) use(at / PANEL, at % PANEL);
}

__device__ __forceinline__ void load(Point& x, const Rows<const float>& from, int low, int n) {
    const float* row[2] = {&from.at(low + token_of(0), column_of()), &from.at(low + token_of(1), column_of())};
    const bool there[2] = {token_of(0) < n, token_of(1) < n};
    #pragma unroll
    for (int c = 0; c < BLOCKS; c++) {
        Sum part[2];
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            const int half = i % 4 / 2, column = 16 * c + i / 4 * 8 + i % 2;  // an array of ours has its rows dense
            part[i / 4].x[i % 4] = there[half] && column + column_of() < K ? row[half][column] : 0.0f;
        }
        left_of(x[c], part[0], part[1]);
    }
}

// G^T x of every token.
__device__ __forceinline__ void recall(Answers& answers, const Point& x, const Room& room, const Chunk& all) {
    #pragma unroll
    for (int n = 0; n < TILES; n++)
        #pragma unroll
        for (int c = 0; c < BLOCKS; c++) {
            Right<data, 3> right[2];
            room.memory.template load<false>(right, c * TILES + n);
            for (int i = 0; i < 2; i++) multiply(answers[2 * n + i], x[c], right[i]);
            if (c % 2) __syncwarp();  // what the next ones need is not loaded before
        }
    const int token[2] = {token_of(0), token_of(1)};
    const float high[2] = {all.high[token[0]], all.high[token[1]]}, low[2] = {all.low[token[0]], all.low[token[1]]};
    for (Sum& sum : answers)
        for (int i = 0; i < 4; i++) sum.x[i] *= all.left[token[i / 2]];
    #pragma unroll 1
    for (int pairs = 0; pairs <= int(threadIdx.x / 32 * 16); pairs += 16) {
        Sum scores[2] = {};
        #pragma unroll
        for (int c = 0; c < BLOCKS; c++) {
            Right<data, 1> right[2];
            load_right_transposed(right, room.k, pairs, 16 * c);
            for (int i = 0; i < 2; i++) multiply(scores[i], x[c], right[i]);
        }
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            const int half = i % 4 / 2, pair = pairs + i / 4 * 8 + column_of() + i % 2;
            const float share = share_of(all, token[half], high[half], low[half], pair);
            float& score = scores[i / 4].x[i % 4];
            score = share == 0 ? 0.0f : share * score;
        }
        Left<data, 3> shares;
        left_of(shares, scores[0], scores[1]);
        #pragma unroll
        for (int n = 0; n < TILES; n++) {
            Right<data, 1> right[2];
            load_right(right, room.v, pairs, 16 * n);
            for (int i = 0; i < 2; i++) multiply(answers[2 * n + i], shares, right[i]);
        }
    }
}

// G = left G + the pairs of the chunk.
__device__ __forceinline__ void learn(const Room& room, const Chunk& all) {
    #pragma unroll 1
    for (int row = threadIdx.x / 32; row < BLOCKS; row += WARPS) {
        Weighed left;
        load_weighed(left, room.k, all, 16 * row);
        #pragma unroll 1
        for (int n = 0; n < TILES; n++) {
            Sum sums[2] = {};
            multiply_pairs(sums, left, room.v, 16 * n);
            room.memory.update(row * TILES + n, sums, all.left[CHUNK - 1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER)
mesa_recall(const float* x, const data* k, const data* v, const gate* log_decay, const gate* beta, const gate* G,
            gate* G_next, data* o, const float* sums, const long long* table, int axes, int tokens, int columns,
            int length, int pieces, int panels, int groups, int blocks) {
    __shared__ Chunk all;
    __shared__ Arrays arrays;
    const Room room(dynamic_shared());
    const int which = blockIdx.x / blocks, panel = blockIdx.x % blocks / pieces, piece = blockIdx.x % pieces;
    const int first_column = panel * PANEL;
    if (threadIdx.x == 0)
        arrays = {source_of(rows(k, table, axes, KEY, which), K), source_of(rows(v, table, axes, V, which), columns),
                  Gates::of(log_decay, beta, table, axes, GATE, which), rows(x, table, axes, X, which),
                  rows(o, table, axes, O, which)};

    const auto start = rows(G, table, axes, STATE, which);
    const Sums earlier = {sums + size_t(which) * (pieces - 1) * panels * Sums::size, panels};
    each_of_memory([&](int i, int j) {
        const float number = i < K && first_column + j < columns ? start.at(i, first_column + j) : 0.0f;
        room.memory.set(i / 16 * TILES + j / 16, i % 16, j % 16, earlier.before(piece, number, i, KEY_PANELS + panel, j));
    });

    __syncthreads();  // arrays are known
    #pragma unroll 1
    for (int low = piece * length, end = min(tokens, low + length), n; low < end; low += n) {
        n = min(CHUNK, end - low);
        arrays.keys.bring(room.k, low, n, 0), arrays.values.bring(room.v, low, n, first_column);
        close_copies();
        prefetch_rows(arrays.keys.rows, low + CHUNK, end, 0, K), prefetch_rows(arrays.point, low + CHUNK, end, 0, K);
        prefetch_rows(arrays.values.rows, low + CHUNK, end, first_column, min(columns, first_column + PANEL));
        if (threadIdx.x < 32) find_decays(all, arrays.gates, low, n);
        finish_copies<0>();
        __syncthreads();  // pairs are there, and G is what the last chunk left
        look<true>(room.k, all), look<false>(room.v, all);
        __syncthreads();  // everyone knows which are not finite
        const int count = tokens_together(all, n);
        if (count < n) shorten(room.k, count), shorten(room.v, count);
        weigh(all, count), n = count;
        if (arrays.gates.resets(low))
            each_of_memory([&](int i, int j) { room.memory.set(i / 16 * TILES + j / 16, i % 16, j % 16, 0); });
        __syncthreads();  // what they weigh is there
        #pragma unroll 1
        for (int group = 0; group < groups; group++) {  // the points that share this memory
            Point x;
            Answers answers = {};
            load(x, arrays.point.of(group), low, n);
            recall(answers, x, room, all);
            #pragma unroll
            for (int n8 = 0; n8 < PANEL / 8; n8++)
                for (int i = 0; i < 4; i++) {
                    const int token = token_of(i / 2), column = first_column + 8 * n8 + column_of() + i % 2;
                    if (token < n && column < columns) put(arrays.answer.of(group).at(low + token, column), answers[n8].x[i]);
                }
        }
        __syncthreads();  // nobody is left at this G
        learn(room, all);
        __syncthreads();  // nobody is left at these pairs
    }
    if (piece < pieces - 1) return;
    const auto next = rows(G_next, table, axes, STATE_NEXT, which);
    each_of_memory([&](int i, int j) {
        if (i < K && first_column + j < columns)
            next.at(i, first_column + j) = room.memory.get(i / 16 * TILES + j / 16, i % 16, j % 16);
    });
}
