// What a memory recalls at given points, chunk by chunk:  G = g_t G + beta_t k_t v_t^T,  o_t = G^T x_t: linear attention
// with x as the queries, in double precision whatever the data. G, transposed, lies in registers; a block has one memory,
// up to 128 value columns and one piece of the sequence, and begins with what pair_sums.cu has left of those before.

enum { X, KEY, V, GATE, BETA, STATE, STATE_NEXT, O };

// What a block keeps in shared memory.
struct Room {
    Panel<double, KEYS + 8> x;  // as it comes: what it lacks of a large G would be missed
    Tokens k;
    Panel<float, VALUES + 8> v;
    Pairs scores;

    __device__ __forceinline__ explicit Room(unsigned char* at) {
        scores.begin = reinterpret_cast<double*>(at);
        x.begin = scores.begin + CHUNK * Pairs::stride;
        k.begin = reinterpret_cast<float*>(x.begin + CHUNK * decltype(x)::stride);
        v.begin = k.begin + CHUNK * Tokens::stride;
    }
};

// tril(X K^T), each score with what is left of its pair at the token.
__device__ __forceinline__ void score(const Room& room, const Weights& all) {
    each_pair_tile([&](int row, int column) {
        Sum sum = {};
        #pragma unroll 2
        for (int inner = 0; inner < KEYS; inner += 8) sum.add(room.x.left(row, inner), room.k.transposed(column, inner));
        each(sum, [&](int i, int j, double& x) {
            const int token = row + i, other = column + j;
            const double share = all.root[other] * all.root[other];
            x = other <= token ? share * exp(all.decay[token] - all.decay[other]) * x : 0;
        });
        room.scores.store(sum, row, column);
    });
}

// What the memory recalls at each token of a chunk of what came before it.
__device__ __forceinline__ void recall_earlier(Sum (&answers)[CHUNK / 8], const Memory& memory, const Room& room,
                                               const Weights& all) {
    memory.recall(answers, room.x);
    for (int tile = 0; tile < CHUNK / 8; tile++)
        each(answers[tile], [&](int, int j, double& x) { x *= all.left[8 * tile + j]; });
}
// What the pairs of the chunk itself add, by their scores; a warp has values from column `column` on.
__device__ __forceinline__ void recall_chunk(Sum (&answers)[CHUNK / 8], const Room& room, int column) {
    #pragma unroll
    for (int inner = 0; inner < CHUNK / 8; inner++) {
        const Left left = left_of_columns(room.v, column, 8 * inner);
        for (int tile = inner; tile < CHUNK / 8; tile++)
            answers[tile].add(left, room.scores.transposed(8 * tile, 8 * inner));
    }
}

// Answers of n tokens from `low` on to the array, where a warp has columns from `first` on.
__device__ __forceinline__ void store(Sum (&answers)[CHUNK / 8], const Rows<data>& to, int low, int n, int first,
                                      int columns) {
    for (int tile = 0; tile < CHUNK / 8; tile++)
        each(answers[tile], [&](int i, int j, double x) {
            const int token = 8 * tile + j, column = first + i;
            if (token < n && column < columns) put(to.at(low + token, column), float(x));
        });
}

// Memory, of values from column `column` on, as the pairs of the chunk leave it.
__device__ __forceinline__ void learn(Memory& memory, const Room& room, const Weights& all, int column) {
    const double left = all.left[CHUNK - 1];
    for (int m = 0; m < OCTETS && left != 1; m++)
        for (int i = 0; i < 4; i++) memory.own[m].x[i] *= left;
    #pragma unroll 1
    for (int token = 0; token < CHUNK; token += 8) {
        const Left own = left_of_columns(room.v, column, token);
        double share[2];
        for (int i = 0; i < 2; i++) {
            const int pair = token + threadIdx.x % 4 * 2 + i;
            share[i] = all.root[pair] * all.root[pair] * exp(all.decay[CHUNK - 1] - all.decay[pair]);
        }
        #pragma unroll
        for (int m = 0; m < OCTETS; m++) {
            Right right = room.k.right(token, 8 * m);
            for (int i = 0; i < 2; i++) right.x[i] *= share[i];
            memory.own[m].add(own, right);
            if (m % 2) __syncwarp();  // what the next ones need is not loaded before
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 1)
recall_chunks(const real* x, const data* k, const data* v, const gate* log_decay, const gate* beta, const gate* G,
              gate* G_next, data* o, float* sums, const long long* table, int axes, int tokens, int columns, int length,
              int pieces, int groups, int blocks) {
    __shared__ Weights all;
    __shared__ PairArrays pairs;
    const Room room(dynamic_shared());
    Memory memory;
    const int which = blockIdx.x / blocks, column_block = blockIdx.x % blocks / pieces, piece = blockIdx.x % pieces;
    const int own = threadIdx.x / 32 * 16, first = column_block * VALUES + own;  // column of this warp, of the array
    const auto point = rows(x, table, axes, X, which);
    const auto answer = rows(o, table, axes, O, which);

    if (threadIdx.x == 0) pairs = pairs_of(k, v, log_decay, beta, table, axes, KEY, which);
    memory.load(rows(G, table, axes, STATE, which), first, columns);
    for (int p = 0; p < piece; p++)
        Sums(reinterpret_cast<double*>(sums), size_t(blockIdx.x / pieces) * (pieces - 1) + p).add_to(memory);
    __syncthreads();  // places are known

    #pragma unroll 1
    for (int low = piece * length, end = min(tokens, low + length), n; low < end; low += n) {
        n = min(CHUNK, end - low);
        load_pairs(room.k, all, pairs, low, n, column_block * VALUES, columns);
        prefetch_tokens(pairs.key, low + CHUNK, end, 0, K);
        prefetch_tokens(pairs.value, low + CHUNK, end, column_block * VALUES, min(columns, (column_block + 1) * VALUES));
        prefetch_tokens(point, low + CHUNK, end, 0, K);
        __syncthreads();  // keys and weights are there
        const int count = tokens_together(all, pairs, low, n, false);
        if (count < n) shorten(room.k, all, count);
        n = count;
        if (pairs.resets(low)) memory = {};
        load_values(room.v, all, pairs, low, n, column_block * VALUES, columns);
        #pragma unroll 1
        for (int group = 0; group < groups; group++) {  // the points that share this memory
            load_rows(room.x, point.of(group), low, n);
            __syncthreads();  // points and values are there
            score(room, all);
            Sum answers[CHUNK / 8] = {};
            recall_earlier(answers, memory, room, all);
            __syncthreads();  // scores are there
            recall_chunk(answers, room, own);
            store(answers, answer.of(group), low, n, first, columns);
        }
        learn(memory, room, all, own);
        __syncthreads();  // nobody is left at these pairs
    }
    if (piece == pieces - 1) memory.store(rows(G_next, table, axes, STATE_NEXT, which), first, columns);
}
