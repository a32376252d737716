// What the texts of the Mesa layer in products of bfloat16 share: chunks of CHUNK tokens, of which each of the four warps
// of a block has 16. Pairs are data as they come, which are bfloat16; what is computed from them is a float, and two or
// three terms of bfloat16 where it is multiplied.

static_assert(sizeof(data) == 2 && sizeof(gate) == 4, "data of bfloat16, gates of single precision");
constexpr int WARPS = 4, THREADS = 32 * WARPS, BLOCKS = KEYS / 16;
constexpr double LOG2E = 1.4426950408889634, FAINTEST = -104;  // a log decay whose exponential is zero in a float

typedef Tile<data, CHUNK, KEYS> Keys;
typedef Tile<data, CHUNK, PANEL> Values;

// ---- pairs ----------------------------------------------------------------------------------------------------------

// Rows of pairs that come to a tile, some columns of them.
struct Source {
    Rows<const data> rows;
    int columns;
    bool vectors;  // whether they come 16 bytes at a time

    template <class TileType>
    __device__ __forceinline__ void bring(TileType tile, int low, int n, int column) const {
        fetch<THREADS>(tile, rows, low, column, n, columns - column, vectors);
    }
};

__device__ __forceinline__ Source source_of(Rows<const data> rows, int columns) {
    return {rows, columns, in_vectors(rows)};
}

// Lines of memory that the next chunk will ask for go to the cache, by two threads for each token.
#ifdef __CUDACC_RTC__
__device__ __forceinline__ void prefetch(const void* line) { asm volatile("prefetch.global.L2 [%0];" :: "l"(line)); }
#else
inline void prefetch(const void*) {}
#endif
template <class T>
__device__ __forceinline__ void prefetch_rows(const Rows<T>& from, int low, int end, int first, int last) {
    const int token = low + threadIdx.x / 2, line = 128 / int(sizeof(T));
    for (int j = first + threadIdx.x % 2 * line; j < last && token < end; j += 2 * line) prefetch(&from.at(token, j));
}

// The gates and the weights of a memory's pairs.
struct Gates {
    Rows<const gate> decay, weight;
    bool decays, weighted;

    // The arrays are two of the table, the first of which is number `first`.
    static __device__ __forceinline__ Gates of(const gate* log_decay, const gate* beta, const long long* table, int axes,
                                               int first, int memory) {
        return {rows(log_decay, table, axes, first, memory), rows(beta, table, axes, first + 1, memory),
                log_decay != nullptr, beta != nullptr};
    }
    // Whether nothing is left at a token of what came before, not even of a NaN, which zero times it would keep.
    __device__ __forceinline__ bool resets(int token) const { return decays && decay.at(token, 0) <= float(FAINTEST); }
};

// What is known of each pair of a chunk, in shared memory.
struct Chunk {
    double decay[CHUNK];            // log of what is left of what was known before the chunk, once this pair has come
    float high[CHUNK], low[CHUNK];  // the same in powers of two, a sum of two floats: differences lose nothing
    float left[CHUNK];              // and its exponential
    float weight[CHUNK];            // zero beyond the last pair
    float to_end[CHUNK];            // the weight times what is left of the pair at the end of the chunk
    int resets[CHUNK], spoilt[CHUNK];
};

// Gates of n tokens from `low` on, by the lanes of one warp, two tokens each.
__device__ __forceinline__ void find_decays(Chunk& all, const Gates& at, int low, int n) {
    const int lane = threadIdx.x % 32;
    double own[2] = {};
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const int token = 2 * lane + i;
        const float log = at.decays && token < n ? at.decay.at(low + token, 0) : 0;
        const float one = token < n ? 1 : 0;
        own[i] = fmax(double(log), FAINTEST), all.resets[token] = log <= float(FAINTEST);
        all.weight[token] = at.weighted && token < n ? at.weight.at(low + token, 0) : one;
    }
    double before = own[0] + own[1];
    for (int distance = 1; distance < 32; distance *= 2) {
        const double earlier = __shfl_up_sync(0xffffffffu, before, distance);
        before += lane >= distance ? earlier : 0;
    }
    all.decay[2 * lane + 1] = before, all.decay[2 * lane] = before - own[1];
}
// The rest of it, for a chunk of `count` tokens, by a thread for each.
__device__ __forceinline__ void weigh(Chunk& all, int count) {
    const int token = threadIdx.x;
    if (token >= CHUNK) return;
    const double decay = all.decay[min(token, count - 1)], in_twos = decay * LOG2E;
    all.high[token] = float(in_twos), all.low[token] = float(in_twos - double(float(in_twos)));
    all.left[token] = float(exp(decay));
    if (token >= count && all.weight[token] != 0) all.weight[token] = 0;
    all.to_end[token] = all.weight[token] * float(exp(all.decay[count - 1] - decay));
}

// Of the rows of a tile: zeros where the pair has no weight, which is not even looked at; whether one is not finite.
template <bool FIRST, class TileType>
__device__ __forceinline__ void look(TileType tile, Chunk& all) {
    const int lane = threadIdx.x % 32;
    #pragma unroll 1
    for (int token = threadIdx.x / 32; token < CHUNK; token += WARPS) {
        const bool counts = all.weight[token] != 0;
        unsigned found = 0;
        for (int j = 2 * lane; j < TileType::columns; j += 64) {
            unsigned& two = reinterpret_cast<unsigned&>(tile.at(token, j));
            if (!counts) two = 0;
            found |= (two & 0x7f807f80u) + 0x00800080u;  // where an exponent is all ones, one more carries
        }
        const int wrong = __any_sync(0xffffffffu, (found & 0x80008000u) != 0);
        if (lane == 0) all.spoilt[token] = FIRST ? wrong : all.spoilt[token] | wrong;
    }
}

// Of a chunk that ends before a reset, and before or with a pair which is not finite: how many of n tokens it has.
__device__ __forceinline__ int tokens_together(const Chunk& all, int n) {
    int count = n;
    for (int token = threadIdx.x % 32; token < n; token += 32)
        if (token > 0 && (all.spoilt[token] || all.spoilt[token - 1] || all.resets[token])) count = min(count, token);
    for (int distance = 1; distance < 32; distance *= 2)
        count = min(count, __shfl_xor_sync(0xffffffffu, count, distance));
    return count;
}
// Zeros for the rows of a tile from `count` on.
template <class TileType>
__device__ __forceinline__ void shorten(TileType tile, int count) {
    for (int i = count * TileType::columns + threadIdx.x; i < CHUNK * TileType::columns; i += THREADS)
        tile.at(i / TileType::columns, i % TileType::columns) = data{};
}

// A chunk of n tokens whose gates and tiles are there: how many of them it has, and what these weigh.
template <class... TileTypes>
__device__ __forceinline__ int settle(Chunk& all, int n, Keys keys, TileTypes... others) {
    look<true>(keys, all), (look<false>(others, all), ...);
    __syncthreads();  // everyone knows which are not finite
    const int count = tokens_together(all, n);
    if (count < n) shorten(keys, count), (shorten(others, count), ...);
    weigh(all, count);
    return count;
}

// The transposed pairs of 16 columns, each weighed as it is at the end of the chunk, as left matrices.
typedef Left<data, 3> Weighed[CHUNK / 16];
__device__ __forceinline__ void load_weighed(Weighed& left, Keys keys, const Chunk& all, int column) {
    #pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        load_left_transposed(left[t], keys, 16 * t, column, [&](int, int j, float x) { return all.to_end[16 * t + j] * x; });
}
// sums = the weighed pairs times 16 columns of the tile `right` of theirs.
template <class TileType>
__device__ __forceinline__ void multiply_pairs(Sum (&sums)[2], const Weighed& left, TileType right, int column) {
    #pragma unroll
    for (int t = 0; t < CHUNK / 16; t++) {
        Right<data, 1> pairs[2];
        load_right(pairs, right, 16 * t, column);
        for (int i = 0; i < 2; i++) multiply(sums[i], left[t], pairs[i]);
    }
}

// ---- a warp's tokens ------------------------------------------------------------------------------------------------

// Token and column of a lane's numbers 2 half and 2 half + 1 of a Sum; the second is in the next column.
__device__ __forceinline__ int token_of(int half) { return threadIdx.x / 32 * 16 + 8 * half + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int column_of() { return threadIdx.x % 4 * 2; }

// sum += left right: sums of tensor cores are cut, which three terms are too good for.
template <int TERMS, int N>
__device__ __forceinline__ void add(Sum& sum, const Left<data, TERMS>& left, const Right<data, N>& right) {
    if constexpr (TERMS == 2) multiply_onto(sum, left, right);
    else multiply(sum, left, right);
}

// Scores of 16 pairs from pair `first` on, each times what the pair weighs at the token, zero if that is earlier.
__device__ __forceinline__ void weigh_scores(Sum (&scores)[2], const Chunk& all, int first) {
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        const int token = token_of(i % 4 / 2), pair = first + i / 4 * 8 + column_of() + i % 2;
        const float gone = all.high[token] - all.high[pair] + (all.low[token] - all.low[pair]);
        const float share = pair <= token ? all.weight[pair] * exp2(gone) : 0.0f;
        float& x = scores[i / 4].x[i % 4];
        x = share == 0 ? 0.0f : share * x;
    }
}
// sums += what the pairs of the chunk itself say at each token: their values by their scores with p, of which
// `p.matrix(c)` is 16 columns as a left matrix.
template <int TERMS, int COLUMNS, class Vector, class TileType>
__device__ __forceinline__ void attend(Sum (&sums)[COLUMNS], const Vector& p, Keys keys, TileType values,
                                       const Chunk& all) {
    #pragma unroll 1
    for (int pairs = 0; pairs <= int(threadIdx.x / 32 * 16); pairs += 16) {
        Sum scores[2] = {};
        #pragma unroll (Vector::at_hand ? BLOCKS : 1)
        for (int c = 0; c < BLOCKS; c++) {
            const Left<data, TERMS> left = p.matrix(c);
            Right<data, 1> right[2];
            load_right_transposed(right, keys, pairs, 16 * c);
            for (int i = 0; i < 2; i++) add(scores[i], left, right[i]);
        }
        weigh_scores(scores, all, pairs);
        Left<data, TERMS> shares;
        left_of(shares, scores[0], scores[1]);
        #pragma unroll
        for (int n = 0; n < COLUMNS; n += 2) {
            Right<data, 1> right[2];
            load_right(right, values, pairs, 8 * n);
            for (int i = 0; i < 2; i++) add(sums[n + i], shares, right[i]);
        }
    }
}

// ---- states ---------------------------------------------------------------------------------------------------------

// Floats in shared memory, in blocks of 16 x 16, as three terms, so that a float is its exact sum. A block is four
// matrices of 8 x 8, those of the left columns first, of which a product takes each as 128 bytes side by side.
template <int COUNT>
struct Terms {
    static constexpr int bytes = 3 * 512 * COUNT;
    data* begin;

    __device__ __forceinline__ data* at(int term, int block) const { return begin + (term * COUNT + block) * 256; }
    __device__ __forceinline__ void set(int block, int i, int j, float x) const {
        #pragma unroll
        for (int term = 0; term < 3; term++) {
            data& to = at(term, block)[(i / 8 + j / 8 * 2) * 64 + i % 8 * 8 + j % 8];
            put(to, x);
            x -= widened(to);
        }
    }
    __device__ __forceinline__ float get(int block, int i, int j) const {
        float x = 0;
        #pragma unroll
        for (int term = 2; term >= 0; term--) x += widened(at(term, block)[(i / 8 + j / 8 * 2) * 64 + i % 8 * 8 + j % 8]);
        return x;
    }
    // The block, or if FLIPPED its transpose, as a right matrix.
    template <bool FLIPPED, int TERMS>
    __device__ __forceinline__ void load(Right<data, TERMS> (&right)[2], int block) const {
        #pragma unroll
        for (int term = 0; term < TERMS; term++) {
            unsigned x[4];
            const data* row = at(term, block) + threadIdx.x % 32 * 8;
            if (FLIPPED) load_matrices(x, row);
            else load_transposed_matrices(x, row);
            #pragma unroll
            for (int i = 0; i < 4; i++) (FLIPPED ? right[i % 2].x[term][i / 2] : right[i / 2].x[term][i % 2]) = x[i];
        }
    }
    // The block = left block + sums.
    __device__ __forceinline__ void update(int block, const Sum (&sums)[2], float left) const {
        #pragma unroll
        for (int m = 0; m < 4; m++) {  // matrices
            float low = 0, high = 0;
            unsigned* const two = reinterpret_cast<unsigned*>(at(0, block)) + 32 * m + threadIdx.x % 32;
            #pragma unroll
            for (int term = 2; term >= 0; term--)
                low += low_of<data>(two[128 * COUNT * term]), high += high_of<data>(two[128 * COUNT * term]);
            unsigned both[3][1];
            const Sum& sum = sums[m / 2];
            set_pair<data>(both, 0, fma(left, low, sum.x[m % 2 * 2]), fma(left, high, sum.x[m % 2 * 2 + 1]));
            for (int term = 0; term < 3; term++) two[128 * COUNT * term] = both[term][0];
        }
    }
};

// What the pairs of earlier pieces add, as mesa_sums.cu leaves it: of each piece and panel of columns KEYS x PANEL
// floats, and what is left at its end of what was known before.
struct Sums {
    static constexpr int size = KEYS * PANEL + 16;
    const float* begin;
    int panels;

    __device__ __forceinline__ const float* panel(int piece, int panel) const {
        return begin + (size_t(piece) * panels + panel) * size;
    }
    // A number of a state before a piece, from that before all pairs.
    __device__ __forceinline__ float before(int piece, float x, int row, int panel_, int column) const {
        #pragma unroll 3  // so many are asked for at once: a thread has few numbers, and each waits for memory
        for (int p = 0; p < piece; p++) {
            const float* at = panel(p, panel_);
            const float left = at[KEYS * PANEL], sum = at[row * PANEL + column];
            x = left == 0 ? sum : fma(left, x, sum);
        }
        return x;
    }
};
