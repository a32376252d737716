// What the texts of least squares in chunks share: blocks of WARPS warps, of which each has 16 value columns; numbers in
// double precision whatever the data. Pairs come CHUNK at a time, weighted by the roots of their weights; one of weight
// zero is not even looked at.

constexpr int WARPS = 8, THREADS = 32 * WARPS, VALUES = 16 * WARPS;
constexpr int OCTETS = KEYS / 8, BLOCKS = KEYS / 16, TILES = BLOCKS * (BLOCKS + 1);  // of a symmetric matrix
constexpr double FAINTEST = -60;

typedef Matrix<float, KEYS + 8> Tokens;     // rows of keys or queries, as they are
typedef Matrix<double, KEYS + 8> Square;    // keys x keys
typedef Matrix<double, CHUNK + 2> Columns;  // keys x tokens
typedef Matrix<double, CHUNK + 8> Pairs;    // tokens x tokens

__device__ __forceinline__ bool bad(double x) { return x - x != 0; }

// The smallest of what the lanes of a warp have.
__device__ __forceinline__ int least_of_warp(int x) {
    for (int distance = 1; distance < 32; distance *= 2) x = min(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}

// What is known of each pair of a chunk.
struct Weights {
    double root[CHUNK];    // of its weight; zero beyond the last pair
    double decay[CHUNK];   // log of what is left of what was known before the chunk, once this pair has come
    double left[CHUNK];    // and its exponential
    double energy[CHUNK];  // weight |k|^2
    double share[CHUNK];   // what one row takes off each
    bool spoilt[CHUNK];    // its key or one of its values is not finite
};

// Where the pairs of a memory lie.
struct PairArrays {
    Rows<const data> key, value;
    Rows<const gate> decay, weight;
    bool decays, weighted;
};
// The arrays follow each other in the table, from number `first`.
__device__ __forceinline__ PairArrays pairs_of(const data* k, const data* v, const gate* log_decay, const gate* beta,
                                               const long long* table, int axes, int first, int memory) {
    return {rows(k, table, axes, first, memory), rows(v, table, axes, first + 1, memory),
            rows(log_decay, table, axes, first + 2, memory), rows(beta, table, axes, first + 3, memory),
            log_decay != nullptr, beta != nullptr};
}

// A chunk of tokens to shared memory: keys where they count, and what is known of them. A warp has every eighth token.
__device__ void load_pairs(const Tokens& to, Weights& all, const PairArrays& at, int low, int n, int first_column,
                           int columns) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    #pragma unroll 1
    for (int i = warp; i < CHUNK; i += WARPS) {
        const double root = i >= n ? 0 : at.weighted ? sqrt(double(at.weight.at(low + i, 0))) : 1;
        double energy = 0;
        int spoilt = 0;
        #pragma unroll 4
        for (int j = lane; j < KEYS; j += 32) {
            const float x = root != 0 && j < K ? float(widened(at.key.at(low + i, j))) : 0;
            to.at(i, j) = x, energy = fma(double(x), double(x), energy), spoilt |= bad(x);
        }
        #pragma unroll 4
        for (int j = first_column + lane; j < min(columns, first_column + VALUES) && root != 0; j += 32)
            spoilt |= bad(widened(at.value.at(low + i, j)));
        energy = over_warp(energy), spoilt = __any_sync(0xffffffffu, spoilt);
        if (lane == 0) all.root[i] = root, all.energy[i] = root * root * energy, all.spoilt[i] = spoilt;
    }
    if (warp != WARPS - 1) return;
    double total = at.decays && lane < n ? fmax(double(at.decay.at(low + lane, 0)), FAINTEST) : 0;
    for (int distance = 1; distance < 32; distance *= 2) {
        const double earlier = __shfl_up_sync(0xffffffffu, total, distance);
        total += lane >= distance ? earlier : 0;
    }
    all.decay[lane] = total, all.left[lane] = exp(total);
}

// The tiles of the lower triangle of a symmetric matrix, 16 x 8 each, that are this warp's: use(number, row, column).
// Rows of tiles are paired, long ones with short ones, and the columns of a row are shared by two warps.
constexpr int OWN_TILES = WARPS + 1;
static_assert(BLOCKS <= WARPS, "two rows of tiles for each pair of warps");
template <class Use>
__device__ __forceinline__ void each_tile(Use use) {
    const int pair = threadIdx.x / 64, half = threadIdx.x / 32 % 2;
    #pragma unroll
    for (int number = 0; number < OWN_TILES; number++) {
        const bool second = number > pair;
        const int block = second ? WARPS - 1 - pair : pair, column = second ? number - pair - 1 : number;
        if (block < BLOCKS) use(number, 16 * block, 16 * column + 8 * half);
    }
}

// The solution, or what it is made of: 16 value columns of a warp, transposed.
struct Memory {
    Sum own[OCTETS];

    // use(key, column of the warp, x). Not all addresses are found at once, for they would need all registers.
    template <class Use>
    __device__ __forceinline__ void each_number(Use use) {
        #pragma unroll
        for (int n = 0; n < OCTETS; n++) {
            each(own[n], [&](int column, int key, double& x) { use(8 * n + key, column, x); });
            __syncwarp();
        }
    }
    // own M, for a symmetric M, of numbers that have been left in `room`.
    __device__ __forceinline__ void multiply(const Square& M, double* room) {
        Sum* const rows = reinterpret_cast<Sum*>(room) + threadIdx.x;
        #pragma unroll
        for (int n = 0; n < OCTETS; n++) rows[n * THREADS] = own[n];
        #pragma unroll
        for (int n = 0; n < OCTETS; n++) {
            Sum sum = {};
            #pragma unroll 1
            for (int inner = 0; inner < OCTETS; inner++)
                sum.add(rows[inner * THREADS].left(), M.transposed(8 * n, 8 * inner));
            own[n] = sum;
        }
    }
    // own x, for 8 tokens at a time.
    __device__ __forceinline__ void recall(Sum (&sums)[CHUNK / 8], const Tokens& x) const {
        #pragma unroll
        for (int n = 0; n < OCTETS; n++) {
            const Left left = own[n].left();
            #pragma unroll
            for (int tile = 0; tile < CHUNK / 8; tile++) sums[tile].add(left, x.transposed(8 * tile, 8 * n));
            if (n % 2) __syncwarp();  // what the next ones need is not loaded before
        }
    }
};

// use(i, j) for all numbers of a square, by all threads.
template <class Use>
__device__ __forceinline__ void each_of_square(int size, Use use) {
    #pragma unroll 1
    for (int i = threadIdx.x / 32; i < size; i += WARPS)
        #pragma unroll 1
        for (int j = threadIdx.x % 32; j < size; j += 32) use(i, j);
}

// Tiles of 16 x 8 on and below the diagonal of tokens x tokens, one per warp: use(row, column).
constexpr int PAIR_TILES = CHUNK / 16 * (CHUNK / 16 + 1);
template <class Use>
__device__ __forceinline__ void each_pair_tile(Use use) {
    #pragma unroll 1
    for (int task = threadIdx.x / 32; task < PAIR_TILES; task += WARPS) {
        int block = 0;
        while ((block + 1) * (block + 2) <= task) block++;
        use(16 * block, 8 * (task - block * (block + 1)));
    }
}

// Left[i][j] = x[token + j][row + i], of tokens in rows.
template <class T, int STRIDE>
__device__ __forceinline__ Left left_of_columns(const Matrix<T, STRIDE>& x, int row, int token) {
    const Right low = x.right(token, row), high = x.right(token, row + 8);
    return {low.x[0], high.x[0], low.x[1], high.x[1]};
}

// Of a chunk that ends before a pair which is not finite, or with it: how many of n tokens it has.
__device__ __forceinline__ int tokens_together(const Weights& all, int n, bool ends_before) {
    const int lane = threadIdx.x % 32;
    const bool after = lane > 0 && (all.spoilt[lane] || all.spoilt[lane - 1]);
    return least_of_warp(lane < n && (ends_before || after) ? lane : n);
}
// Only so many tokens; the others weigh nothing.
__device__ __forceinline__ void shorten(const Tokens& keys, Weights& all, int count) {
    __syncthreads();  // everyone has seen what will not be there any more
    for (int i = count * KEYS + threadIdx.x; i < CHUNK * KEYS; i += THREADS) keys.at(i / KEYS, i % KEYS) = 0;
    for (int i = count + threadIdx.x; i < CHUNK; i += THREADS)
        all.root[i] = 0, all.decay[i] = all.decay[count - 1], all.left[i] = all.left[count - 1];
    __syncthreads();  // only these tokens are left
}

// Sums of the pairs of earlier pieces, as pair_sums.cu leaves them, in numbers of double precision.
struct Sums {
    static constexpr int memory_at = TILES * 128, numbers_at = memory_at + OCTETS * THREADS * 4;
    static constexpr int size = numbers_at + 2;
    double* begin;

    __device__ __forceinline__ Sums(double* all, size_t number) : begin(all + number * size) {}
    __device__ __forceinline__ Sum& tile(int row, int column) const {  // of the Gram matrix
        const int block = row / 16, tile = block * (block + 1) + column / 8;
        return reinterpret_cast<Sum*>(begin)[tile * 32 + threadIdx.x % 32];
    }
    __device__ __forceinline__ Sum& memory(int n) const {
        return reinterpret_cast<Sum*>(begin + memory_at)[n * THREADS + threadIdx.x];
    }
    // H = decay H + what this piece adds.
    __device__ __forceinline__ void add_to(const Square& H) const {
        const double left = decay();
        each_tile([&](int, int row, int column) {
            each(tile(row, column), [&](int i, int j, double x) {
                double& h = H.at(row + i, column + j);
                h = fma(left, h, x);
                if (column < row) H.at(column + j, row + i) = h;
            });
        });
    }
    __device__ __forceinline__ void add_to(Memory& G) const {
        const double left = decay();
        for (int n = 0; n < OCTETS; n++)
            for (int i = 0; i < 4; i++) G.own[n].x[i] = fma(left, G.own[n].x[i], memory(n).x[i]);
    }
    __device__ __forceinline__ double& decay() const { return begin[numbers_at]; }
    __device__ __forceinline__ double& moved() const { return begin[numbers_at + 1]; }  // not zero if anything was learnt
};
