// What both texts of linear attention on Hopper share, linear_attention_wgmma.cu and linear_attention_channels.cu:
// where a block is and what a thread has of it, bringing chunks, values and the state as left matrices, answers.

enum { Q, KEY, V, GATE_OF, STATE, STATE_NEXT, O };

constexpr int GROUPS = VALUES / 64, WARPS = 4 * GROUPS;  // of warps that have the state
constexpr int PART = 64, PARTS = KEYS / PART;  // keys of the state that a product has, and how often
static_assert(GROUPS == 1 || GROUPS == 2, "the warpgroup that brings tiles has whole rows of them");

typedef Swizzled<data, CHUNK, KEYS> Keys;
typedef Swizzled<data, CHUNK, VALUES> Values;
typedef float State[KEYS / 2];     // S^T: 64 columns of the state, KEYS keys
typedef float Answers[CHUNK / 2];  // O^T: 64 columns, CHUNK tokens
typedef float Added[PART / 2];     // what a chunk adds to a part of the state
typedef unsigned LeftPart[4];
typedef LeftPart LeftValues[CHUNK / 16];  // V^T

// ---- where a block is ----------------------------------------------------------------------------------------------

// Which sequence a block has and where it lies. In shared memory, because registers are for the state.
struct Places {
    int which, column_block, first_column, group, piece, begin, end;  // begin, end: tokens
    int columns, stored;
    Rows<const data> q, k, v;
    Rows<const real> gate;
    Rows<data> o;

    __device__ __forceinline__ int chunks() const { return (end - begin + CHUNK - 1) / CHUNK; }
    __device__ __forceinline__ int first_of(int n) const { return begin + n * CHUNK; }
    __device__ __forceinline__ int tokens_of(int n) const { return min(int(CHUNK), end - first_of(n)); }
};
__device__ __forceinline__ void find(Places& places, const data* q, const data* k, const data* v, const real* log_decay,
                                     data* o, const long long* table, int axes, int tokens, int columns, int groups,
                                     int pieces, int stored, int length) {
    const int column_blocks = (columns + VALUES - 1) / VALUES, number = blockIdx.x / pieces;
    const int which = number / column_blocks / groups, group = number / column_blocks % groups;
    places.which = which, places.group = group, places.piece = blockIdx.x % pieces;
    places.column_block = number % column_blocks, places.first_column = places.column_block * VALUES;
    places.begin = places.piece * length, places.end = min(tokens, places.begin + length);
    places.columns = columns, places.stored = stored;
    places.q = rows(q, table, axes, Q, which).of(group);
    places.k = rows(k, table, axes, KEY, which);
    places.v = rows(v, table, axes, V, which);
    places.o = rows(o, table, axes, O, which).of(group);
    places.gate = rows(log_decay, table, axes, GATE_OF, which);
}

// ---- bringing chunks -----------------------------------------------------------------------------------------------

// Chunks under way, and places that nobody needs any more.
struct Ring {
    Barrier there[STAGES], free[STAGES];
};
// All chunks of an array to the tiles of its name.
template <class Tile, class T, class TileOf>
__device__ __forceinline__ void carry(Carrier<Tile, T> carrier, Ring& ring, const Places& places, TileOf tile_of) {
    const int chunks = places.chunks();
    #pragma unroll 1
    for (int n = 0; n < chunks; n++) {
        if (n >= STAGES)
            wait(ring.free[n % STAGES], n / STAGES - 1 & 1);
        carrier.bring(tile_of(n), places.tokens_of(n));
        carrier.hand_over(ring.there[n % STAGES]);
    }
}

// ---- what a thread of a warpgroup has ------------------------------------------------------------------------------

// Who a thread is. Asked anew for every chunk, so that what follows from it does not wait in registers.
struct Self {
    int group, warp, lane, line, pair;  // warp: of the warpgroup

    __device__ __forceinline__ Self() {
        const unsigned thread = this_thread() - PRODUCERS, warps = __shfl_sync(0xffffffffu, thread / 32, 0);
        group = warps / 4 & GROUPS - 1, warp = warps % 4;
        lane = thread % 32, line = lane / 4, pair = lane % 4 * 2;
    }
    __device__ __forceinline__ int all_warps() const { return 4 * group + warp; }
    __device__ __forceinline__ int thread() const { return 32 * all_warps() + lane; }  // of all consumers
    __device__ __forceinline__ int first_value() const { return 64 * group + 16 * warp; }  // of its warp
};
// All lanes of a warp have come.
__device__ __forceinline__ void arrive_as_warp(Barrier& barrier, const Self& self) {
    __syncwarp();
    if (self.lane == 0) arrive(barrier);
}
// For each number of sums of 64 rows: use(row of the warp, column, x).
template <int R, class Use>
__device__ __forceinline__ void each_sum(float (&sum)[R], const Self& self, Use use) {
    #pragma unroll
    for (int i = 0; i < R; i++) use(self.line + i / 2 % 2 * 8, i / 4 * 8 + self.pair + i % 2, sum[i]);
}
struct alignas(8) Pair {
    float x[2];
};
__device__ __forceinline__ Pair two(const float* at) { return *reinterpret_cast<const Pair*>(at); }
__device__ __forceinline__ bool bad(float x) { return x - x != 0; }
// Zero, or NaN if any number is not finite.
template <int R>
__device__ __forceinline__ float spoilt(const float (&x)[R]) {
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < R; i++) sum = fma(0.0f, x[i], sum);
    return sum;
}

// ---- values and the state, as left matrices ------------------------------------------------------------------------

// V^T, as it is.
__device__ __forceinline__ void load_values(LeftValues& left, const Values& values, const Self& self) {
    const int token = self.lane / 16 * 8 + self.lane % 8, column = self.first_value() + self.lane / 8 % 2 * 8;
    #pragma unroll
    for (int i = 0; i < CHUNK / 16; i++) load_transposed_matrices(left[i], values.piece(16 * i + token, column));
}
// For each number of V^T: use(token, x), where x may be changed.
template <class Use>
__device__ __forceinline__ void each_value(LeftValues& left, const Self& self, Use use) {
    #pragma unroll
    for (int i = 0; i < CHUNK / 16; i++)
        for (int r = 0; r < 4; r++) {
            const int token = 16 * i + self.pair + r / 2 * 8;
            float low = low_of<bfloat16>(left[i][r]), high = high_of<bfloat16>(left[i][r]);
            use(token, low), use(token + 1, high);
            left[i][r] = packed<bfloat16>(low, high);
        }
}

// A part of S^T, in two terms.
struct StateTerms {
    LeftPart term[PART / 16][2];

    __device__ __forceinline__ StateTerms(const State& state, int part) {
        #pragma unroll
        for (int c = 0; c < PART / 16; c++)
            for (int r = 0; r < 4; r++) {
                const float* x = &state[PART / 2 * part + 8 * c + 2 * r];
                set_pair<bfloat16>(term[c], r, x[0], x[1]);
            }
    }
};

// ---- answers -------------------------------------------------------------------------------------------------------

struct alignas(16) Piece {
    data x[8];
};
// Through shared memory of the warp, where they change rows and columns, to global memory, for tokens before `count`.
__device__ __forceinline__ void put_answers(unsigned char* own, const Answers& answers, const Places& places, int first,
                                            int count, float scale, const Self& self) {
    const auto piece = [&](int token, int half) { return own + token * 32 + (half ^ token / 4 & 1) * 16; };
    #pragma unroll
    for (int n = 0; n < CHUNK / 8; n += 2) {
        unsigned x[4];
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            const float* pair = &answers[4 * n + 2 * r];
            x[r] = packed<data>(scale * pair[0], scale * pair[1]);
        }
        store_transposed_matrices(x, piece(8 * n + self.lane / 16 * 8 + self.lane % 8, self.lane / 8 % 2));
    }
    __syncwarp();  // the answers are there
    const int column = places.first_column + self.first_value() + self.lane % 2 * 8;
    const bool vectors = in_vectors(places.o) && column + 8 <= places.columns;
    #pragma unroll
    for (int i = 0; i < CHUNK / 16; i++) {
        const int token = 16 * i + self.lane / 2;
        const Piece found = *reinterpret_cast<const Piece*>(piece(token, self.lane % 2));
        data* at = places.o.begin + (first + token) * places.o.row + column * places.o.column;
        if (token >= count) continue;
        if (vectors)
            *reinterpret_cast<Piece*>(at) = found;
        else
            #pragma unroll 1
            for (int j = 0; j < min(places.columns - column, 8); j++)
                at[j * places.o.column] = reinterpret_cast<const data*>(piece(token, self.lane % 2))[j];
    }
}
// The first token that has a bad number, by a warp together.
struct First {
    int token = CHUNK;

    __device__ __forceinline__ void look(int where, float x) { token = bad(x) ? min(token, where) : token; }
    __device__ __forceinline__ int of_warp() const {
        int first = token;
        for (int distance = 1; distance < 32; distance *= 2)
            first = min(first, __shfl_xor_sync(0xffffffffu, first, distance));
        return first;
    }
};

// ---- the state in global memory ------------------------------------------------------------------------------------

// The numbers of the state that a thread has: use(key, column, x).
template <class Use>
__device__ __forceinline__ void each_stored(State& state, const Places& places, const Self& self, Use use) {
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        for (int i = 0; i < 4; i++) {
            const int column = places.first_column + self.first_value() + self.line + i / 2 * 8;
            const int key = 8 * n + self.pair + i % 2;
            if (key < K && column < places.columns) use(key, column, state[4 * n + i]);
        }
        if (n % 8 == 7) __syncwarp();  // not all addresses at once: they need registers
    }
}
// What earlier pieces add to the state lies as the threads have it; the decays of a piece follow once.
struct Stored {
    real *sums, *piece_decays;

    __device__ __forceinline__ real* sum_of(const Places& at, int columns, int p, const Self& self) const {
        const int column_blocks = (columns + VALUES - 1) / VALUES;
        const size_t block = (size_t(at.which) * column_blocks + at.column_block) * at.stored + p;
        return sums + block * (KEYS / 2) * (128 * GROUPS) + self.thread();
    }
    __device__ __forceinline__ real* decays_of(const Places& at, int p) const {
        return piece_decays + (size_t(at.which) * at.stored + p) * KEYS;
    }
};
