// What a memory recalls at the solutions of the Mesa layer, in products of bfloat16:  G = g_t G + beta_t k_t v_t^T,
// o_t = G^T x_t: linear attention with x as the queries. Both are floats, in three terms: where a ridge is small, an answer
// is little beside what it is a sum of. A block has one memory, PANEL of its columns and one piece of the sequence, a warp
// has 16 tokens of a chunk.

enum { X, KEY, V, GATE, BETA, STATE, STATE_NEXT, O };

constexpr int TILES = PANEL / 16, KEY_PANELS = (KEYS + PANEL - 1) / PANEL;
typedef Sum Answers[PANEL / 8];

// The points of a warp's tokens.
struct Point {
    static constexpr bool at_hand = true;
    Left<data, 3> x[BLOCKS];

    __device__ __forceinline__ const Left<data, 3>& matrix(int c) const { return x[c]; }
};

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

// use(i, j) for all numbers of G, by all threads.
template <class Use>
__device__ __forceinline__ void each_of_memory(Use use) {
    #pragma unroll 1
    for (int at = threadIdx.x; at < KEYS * PANEL; at += THREADS) use(at / PANEL, at % PANEL);
}

__device__ __forceinline__ void load(Point& to, const Rows<const float>& from, int low, int n) {
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
        left_of(to.x[c], part[0], part[1]);
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
            for (int i = 0; i < 2; i++) multiply(answers[2 * n + i], x.x[c], right[i]);
            if (c % 2) __syncwarp();  // what the next ones need is not loaded before
        }
    for (Sum& sum : answers)
        for (int i = 0; i < 4; i++) sum.x[i] *= all.left[token_of(i / 2)];
    attend<3>(answers, x, room.k, room.v, all);
}
__device__ __forceinline__ void store(const Answers& answers, const Rows<data>& to, int low, int n, int first_column,
                                      int columns) {
    #pragma unroll
    for (int octet = 0; octet < PANEL / 8; octet++)
        for (int i = 0; i < 4; i++) {
            const int token = token_of(i / 2), column = first_column + 8 * octet + column_of() + i % 2;
            if (token < n && column < columns) put(to.at(low + token, column), answers[octet].x[i]);
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

// Pairs of a chunk that begins at token `low`, and G as its first token finds it; how many tokens it has.
__device__ __forceinline__ int load_chunk(const Room& room, Chunk& all, const Arrays& at, int low, int end,
                                          int first_column) {
    const int n = min(CHUNK, end - low);
    at.keys.bring(room.k, low, n, 0), at.values.bring(room.v, low, n, first_column);
    close_copies();
    prefetch_rows(at.keys.rows, low + CHUNK, end, 0, K), prefetch_rows(at.point, low + CHUNK, end, 0, K);
    prefetch_rows(at.values.rows, low + CHUNK, end, first_column, min(at.values.columns, first_column + PANEL));
    if (threadIdx.x < 32) find_decays(all, at.gates, low, n);
    finish_copies<0>();
    __syncthreads();  // pairs are there, and G is what the last chunk left
    if (at.gates.resets(low))
        each_of_memory([&](int i, int j) { room.memory.set(i / 16 * TILES + j / 16, i % 16, j % 16, 0); });
    return settle(all, n, room.k, room.v);
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
        n = load_chunk(room, all, arrays, low, end, first_column);
        __syncthreads();  // what they weigh is there
        #pragma unroll 1
        for (int group = 0; group < groups; group++) {  // the points that share this memory
            Point x;
            Answers answers = {};
            load(x, arrays.point.of(group), low, n);
            recall(answers, x, room, all);
            store(answers, arrays.answer.of(group), low, n, first_column, columns);
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
