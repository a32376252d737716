// What the texts of least squares in chunks share: blocks of WARPS warps, of which each has 16 value columns; numbers in
// double precision whatever the data. Pairs come CHUNK at a time, weighted by the roots of their weights; one of weight
// zero is not even looked at.

constexpr int WARPS = 8, THREADS = 32 * WARPS, VALUES = 16 * WARPS;
constexpr int OCTETS = KEYS / 8, BLOCKS = KEYS / 16, TILES = BLOCKS * (BLOCKS + 1);  // of a symmetric matrix

typedef Panel<float, KEYS + 8> Tokens;     // rows of keys or queries, as they are
typedef Panel<double, KEYS + 8> Square;    // keys x keys
typedef Panel<double, CHUNK + 2> Columns;  // keys x tokens
typedef Panel<double, CHUNK + 8> Pairs;    // tokens x tokens

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
    double factor[2 * CHUNK];
    bool spoilt[CHUNK];    // its key or one of its values is not finite
};

// Where the pairs of a memory lie.
struct PairArrays {
    Rows<const data> key, value;
    Rows<const gate> decay, weight;
    bool decays, weighted;

    // Whether nothing is left at a token of what came before, not even of a NaN, which zero times it would keep.
    __device__ __forceinline__ bool resets(int token) const {
        constexpr bool ever = FAINTEST <= -104;  // its exponential is zero in single precision, that of all gates here
        return ever && decays && decay.at(token, 0) <= FAINTEST;
    }
};
// The arrays follow each other in the table, from number `first`.
__device__ __forceinline__ PairArrays pairs_of(const data* k, const data* v, const gate* log_decay, const gate* beta,
                                               const long long* table, int axes, int first, int memory) {
    return {rows(k, table, axes, first, memory), rows(v, table, axes, first + 1, memory),
            rows(log_decay, table, axes, first + 2, memory), rows(beta, table, axes, first + 3, memory),
            log_decay != nullptr, beta != nullptr};
}

// Lines of memory that will be asked for go to the cache.
#ifdef __CUDACC_RTC__
__device__ __forceinline__ void prefetch(const void* line) { asm volatile("prefetch.global.L2 [%0];" :: "l"(line)); }
#else
inline void prefetch(const void*) {}
#endif
// Of the tokens of a chunk, of which eight threads have one.
template <class T>
__device__ __forceinline__ void prefetch_tokens(const Rows<T>& from, int low, int end, int first, int last) {
    const int token = low + threadIdx.x / WARPS, line = 128 / int(sizeof(T));
    #pragma unroll 1
    for (int j = first + threadIdx.x % WARPS * line; j < last && token < end; j += WARPS * line) prefetch(&from.at(token, j));
}

// A chunk of tokens to shared memory: keys where they count, and what is known of them. A warp has every eighth token,
// and reads all it has of them before it looks at anything: memory is slow.
__device__ __forceinline__ void load_pairs(const Tokens& to, Weights& all, const PairArrays& at, int low, int n,
                                           int first_column, int columns) {
    constexpr int mine = CHUNK / WARPS, wide = (KEYS + 31) / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float keys[mine][wide];
    double weight[mine];
    int spoilt[mine] = {};
    #pragma unroll
    for (int m = 0; m < mine; m++) {
        const int i = warp + m * WARPS;
        weight[m] = i < n ? 1 : 0;
        if (i < n && at.weighted) weight[m] = at.weight.at(low + i, 0);
        #pragma unroll
        for (int part = 0; part < wide; part++) {
            const int j = lane + 32 * part;
            keys[m][part] = i < n && j < K ? float(widened(at.key.at(low + i, j))) : 0;
        }
    }
    #pragma unroll 1
    for (int j = first_column + lane; j < min(columns, first_column + VALUES); j += 32)
        #pragma unroll
        for (int m = 0; m < mine; m++)
            if (warp + m * WARPS < n) spoilt[m] |= bad(widened(at.value.at(low + warp + m * WARPS, j)));
    #pragma unroll
    for (int m = 0; m < mine; m++) {
        const int i = warp + m * WARPS;
        double energy = 0;
        #pragma unroll
        for (int part = 0; part < wide; part++) {
            const float x = weight[m] != 0 ? keys[m][part] : 0;
            energy = fma(double(x), double(x), energy), spoilt[m] |= bad(x);
            if (lane + 32 * part < KEYS) to.at(i, lane + 32 * part) = x;
        }
        energy = over_warp(energy), spoilt[m] = __any_sync(0xffffffffu, spoilt[m] && weight[m] != 0);
        if (lane == 0) all.root[i] = sqrt(weight[m]), all.energy[i] = weight[m] * energy, all.spoilt[i] = spoilt[m];
    }
    if (warp != WARPS - 1) return;
    double total = at.decays && lane < n ? fmax(double(at.decay.at(low + lane, 0)), double(FAINTEST)) : 0;
    for (int distance = 1; distance < 32; distance *= 2) {
        const double earlier = __shfl_up_sync(0xffffffffu, total, distance);
        total += lane >= distance ? earlier : 0;
    }
    all.decay[lane] = total, all.left[lane] = exp(total);
}
// Rows of a chunk to shared memory, as they are; all are read before one is written.
template <class Number, class T>
__device__ __forceinline__ void load_rows(const Panel<Number, KEYS + 8>& to, const Rows<T>& from, int low, int n) {
    constexpr int mine = CHUNK / WARPS, wide = (KEYS + 31) / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Number x[mine][wide];
    #pragma unroll
    for (int m = 0; m < mine; m++)
        for (int part = 0; part < wide; part++) {
            const int i = warp + m * WARPS, j = lane + 32 * part;
            x[m][part] = i < n && j < K ? Number(widened(from.at(low + i, j))) : 0;
        }
    #pragma unroll
    for (int m = 0; m < mine; m++)
        for (int part = 0; part < wide; part++)
            if (lane + 32 * part < KEYS) to.at(warp + m * WARPS, lane + 32 * part) = x[m][part];
}
// Values of a chunk to shared memory, where they count. A thread has one column of every second token.
template <class Tile>
__device__ __forceinline__ void load_values(const Tile& to, const Weights& all, const PairArrays& at, int low, int n,
                                            int first_column, int columns) {
    const int j = threadIdx.x % VALUES, first = threadIdx.x / VALUES, column = first_column + j;
    #pragma unroll
    for (int i = 0; i < CHUNK; i += THREADS / VALUES) {
        const int token = i + first;
        const bool there = column < columns && token < n;
        const float x = there ? float(widened(at.value.at(low + token, column))) : 0;
        to.at(token, j) = all.root[token] != 0 ? x : 0;
    }
}

// The tiles of the lower triangle of a symmetric matrix, 16 x 8 each, that are this warp's: use(number, row, column).
// Rows of tiles are paired, long ones with short ones, and the columns of a row are shared by two warps. Only where a warp
// has all of its tiles in registers are their numbers known to the compiler.
constexpr int OWN_TILES = WARPS + 1;
static_assert(BLOCKS <= WARPS, "two rows of tiles for each pair of warps");
template <int AT_ONCE = OWN_TILES, class Use>
__device__ __forceinline__ void each_tile(Use use) {
    const int pair = threadIdx.x / 64, half = threadIdx.x / 32 % 2;
    #pragma unroll AT_ONCE
    for (int number = 0; number < OWN_TILES; number++) {
        const bool second = number > pair;
        const int block = second ? WARPS - 1 - pair : pair, column = second ? number - pair - 1 : number;
        if (block < BLOCKS) use(number, 16 * block, 16 * column + 8 * half);
    }
}

// The solution, or what it is made of: 16 value columns of a warp, transposed.
struct Memory {
    Sum own[OCTETS];

    // use(x, where it is, whether there is such a place), for columns from `first` on of an array that has so many.
    // Addresses are found from each other, and not all at once, for they would need all registers.
    template <class T, class Use>
    __device__ __forceinline__ void each_number(const Rows<T>& array, int first, int columns, Use use) {
        const int column = first + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        T* at = &array.at(pair, column);
        const long long across = 8 * array.column, down = 8 * array.row;
        #pragma unroll
        for (int n = 0; n < OCTETS; n++, at += down) {
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool there = (K == KEYS || 8 * n + pair + i % 2 < K) && column + i / 2 * 8 < columns;
                use(own[n].x[i], at + (i / 2 * across + i % 2 * array.row), there);
            }
            __syncwarp();
        }
    }
    // From an array, with zeros beyond it; and back.
    __device__ __forceinline__ void load(const Rows<const gate>& from, int first, int columns) {
        each_number(from, first, columns, [](double& x, const gate* at, bool there) { x = there ? double(*at) : 0; });
    }
    __device__ __forceinline__ void store(const Rows<gate>& to, int first, int columns) {
        each_number(to, first, columns, [](double& x, gate* at, bool there) {
            if (there) *at = gate(x);
        });
    }
    // own x, for 8 tokens at a time.
    template <class Number>
    __device__ __forceinline__ void recall(Sum (&sums)[CHUNK / 8], const Panel<Number, KEYS + 8>& x) const {
        #pragma unroll
        for (int n = 0; n < OCTETS; n++) {
            const Left left = own[n].left();
            #pragma unroll
            for (int tile = 0; tile < CHUNK / 8; tile++) sums[tile].add(left, x.transposed(8 * tile, 8 * n));
            if (n % 2) __syncwarp();  // what the next ones need is not loaded before
        }
    }
};

// The same before the first token, in a room of device memory: what is done once is not worth the time to compile it for
// registers. A thread reads and writes its own numbers only.
struct Kept {
    Sum* begin;

    __device__ __forceinline__ explicit Kept(double* room) : begin(reinterpret_cast<Sum*>(room) + threadIdx.x) {}
    __device__ __forceinline__ Sum& own(int n) const { return begin[n * THREADS]; }

    // From an array, with zeros beyond it.
    __device__ __forceinline__ void load(const Rows<const gate>& from, int first, int columns) const {
        const int column = first + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        #pragma unroll 2
        for (int n = 0; n < OCTETS; n++)
            for (int i = 0; i < 4; i++) {
                const int key = 8 * n + pair + i % 2, value = column + i / 2 * 8;
                own(n).x[i] = key < K && value < columns ? double(from.at(key, value)) : 0;
            }
    }
    // x M, for a symmetric M.
    __device__ __forceinline__ void multiply(const Kept& x, const Square& M) const {
        #pragma unroll 1
        for (int n = 0; n < OCTETS; n++) {
            Sum sum = {};
            #pragma unroll 2
            for (int inner = 0; inner < OCTETS; inner++)
                sum.add(x.own(inner).left(), M.transposed(8 * n, 8 * inner));
            own(n) = sum;
        }
    }
    __device__ __forceinline__ void take_to(Memory& memory) const {
        #pragma unroll
        for (int n = 0; n < OCTETS; n++) memory.own[n] = own(n);
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

// A tile of the lower triangle, to both triangles.
__device__ __forceinline__ void store_symmetric(const Square& A, Sum& sum, int row, int column) {
    A.store(sum, row, column);
    if (column < row) each(sum, [&](int i, int j, double x) { A.at(column + j, row + i) = x; });
}

// Left[i][j] = x[token + j][row + i], of tokens in rows.
template <class T, int STRIDE>
__device__ __forceinline__ Left left_of_columns(const Panel<T, STRIDE>& x, int row, int token) {
    const Right low = x.right(token, row), high = x.right(token, row + 8);
    return {low.x[0], high.x[0], low.x[1], high.x[1]};
}

// Of a chunk that ends before a reset, and before or with a pair which is not finite: how many of n tokens it has.
__device__ __forceinline__ int tokens_together(const Weights& all, const PairArrays& at, int low, int n,
                                               bool ends_before) {
    const int lane = threadIdx.x % 32;
    const bool after = lane > 0 && lane < n && (all.spoilt[lane] || all.spoilt[lane - 1] || at.resets(low + lane));
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
        each_tile<1>([&](int, int row, int column) {
            Sum sum = H.sum(row, column);
            for (int i = 0; i < 4; i++) sum.x[i] = fma(left, left == 0 ? 0 : sum.x[i], tile(row, column).x[i]);
            store_symmetric(H, sum, row, column);
        });
    }
    __device__ __forceinline__ void add_to(Memory& G) const {
        const double left = decay();
        for (int n = 0; n < OCTETS; n++)
            for (int i = 0; i < 4; i++) G.own[n].x[i] = fma(left, left == 0 ? 0 : G.own[n].x[i], memory(n).x[i]);
    }
    __device__ __forceinline__ void add_to(const Kept& G) const {
        const double left = decay();
        #pragma unroll 2
        for (int n = 0; n < OCTETS; n++) {
            Sum sum = G.own(n);
            for (int i = 0; i < 4; i++) sum.x[i] = fma(left, left == 0 ? 0 : sum.x[i], memory(n).x[i]);
            G.own(n) = sum;
        }
    }
    __device__ __forceinline__ double& decay() const { return begin[numbers_at]; }
    __device__ __forceinline__ double& moved() const { return begin[numbers_at + 1]; }  // not zero if anything was learnt
};
