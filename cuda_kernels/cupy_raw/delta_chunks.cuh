// What the two texts of the chunked delta rule share: delta_rule_prepare.cu leaves a record of each chunk to
// delta_rule_chunks.cu. All in it that products take is in terms of bfloat16, in rows without gaps.

enum { Q, KEY, V, BETA, GATE_OF, ERASE_OF, STATE, STATE_NEXT, O, ARRAYS };

enum { NO_GATE, STEP, CHANNEL };

constexpr int VALUES = 32;  // columns of the state that a block walks with
constexpr bool DIRECT = DATA_TERMS == 1 && GATE != CHANNEL;  // products take queries and keys as they are
constexpr int KEY_TERMS = GATE == CHANNEL ? SUM_TERMS : DATA_TERMS;
constexpr float LOG2E = 1.44269504f;

typedef Split<KEY_TERMS, CHUNK, KEYS> Tokens;

struct Record {
    static constexpr int floats = CHUNK * KEYS / 2;  // of one term of a chunk's tokens
    static constexpr int keys_at = SUM_TERMS * floats;
    static constexpr int numbers_at = keys_at + (DIRECT ? 0 : KEY_TERMS * floats);
    static constexpr int groups_at = numbers_at + 2 * CHUNK + KEYS + 4;
    static constexpr int scores_at = DIRECT ? 0 : KEY_TERMS * floats;  // of a group
    static constexpr int group_size = scores_at + SUM_TERMS * CHUNK * CHUNK / 2;
    float* begin;
    int groups, wide;  // columns of the values, rounded up

    __device__ __forceinline__ Record(float* records, size_t number, int groups, int columns)
        : groups(groups), wide((columns + VALUES - 1) / VALUES * VALUES) {
        begin = records + number * numbers();
    }
    __device__ __forceinline__ size_t numbers() const {
        return size_t(groups_at) + size_t(groups) * group_size + size_t(CHUNK) * wide;
    }
    __device__ __forceinline__ bfloat16* terms(size_t at) const { return reinterpret_cast<bfloat16*>(begin + at); }
    // What the errors lose to the memory: T beta P, decayed since the chunk began.
    __device__ __forceinline__ bfloat16* recalls() const { return terms(0); }
    __device__ __forceinline__ bfloat16* keys() const { return terms(keys_at); }  // CHANNEL: decayed to the chunk's end
    __device__ __forceinline__ bfloat16* queries(int group) const {  // CHANNEL: decayed since the chunk began
        return terms(groups_at + size_t(group) * group_size);
    }
    __device__ __forceinline__ bfloat16* scores(int group) const {
        return terms(groups_at + size_t(group) * group_size + scores_at);
    }
    __device__ __forceinline__ float* from_start() const { return begin + numbers_at; }     // STEP: decays to a token
    __device__ __forceinline__ float* to_end() const { return begin + numbers_at + CHUNK; }  // STEP: and from it on
    __device__ __forceinline__ float* total() const { return begin + numbers_at + 2 * CHUNK; }  // decay of the chunk
    __device__ __forceinline__ float* good() const { return total() + KEYS; }  // so many tokens are as they should be
    // What is to be learnt: T beta V.
    __device__ __forceinline__ float* targets() const { return begin + groups_at + size_t(groups) * group_size; }
};

// Where one array of a memory lies; `of` makes its rows.
struct Place {
    long long at, group, row, column;

    template <class T>
    __device__ __forceinline__ Rows<T> of(T* array) const {
        return {array + at, group, row, column};
    }
};
// A thread finds one array, so that none waits for all.
__device__ __forceinline__ void find_places(Place (&places)[ARRAYS], const long long* table, int axes, int memory) {
    const int array = threadIdx.x;
    if (array >= ARRAYS) return;
    const char* const origin = reinterpret_cast<const char*>(table);
    const auto found = rows(origin, table, axes, array, memory);
    places[array] = {found.begin - origin, found.group, found.row, found.column};
}

// Rows to a tile, all of them, 16 bytes at a time, by the first so many threads; the caller closes and finishes these
// copies. A thread has one column, so that every address but its first is the last one and a constant.
template <int THREADS, int ROWS, class T, int R, int C>
__device__ __forceinline__ void copy_rows(const Tile<T, R, C>& tile, const T* from, long long stride, int thread) {
    constexpr int wide = 16 / int(sizeof(T)), pieces = C / wide, step = THREADS / pieces;
    static_assert(step > 0, "a row is not longer than all threads together");
    const int row = thread / pieces, column = thread % pieces * wide;
    if (row >= step) return;
    from += row * stride + column;
    T* const to = &tile.at(row, column);
    #pragma unroll
    for (int n = 0; n < (ROWS + step - 1) / step; n++)
        if (ROWS % step == 0 || row + n * step < ROWS)
            copy_later(to + n * step * tile.stride, from + n * step * stride, 16);
}
// tile[i][j] = from[t + i][j] for i < rows and j < columns, zero elsewhere; all threads call it.
template <int THREADS, class T, int R, int C>
__device__ __forceinline__ void bring_rows(const Tile<T, R, C>& tile, Rows<const T> from, long long t, int rows,
                                           int columns, int thread) {
    const bool vectors = in_vectors(from);
    if (vectors && rows == R && columns >= C)
        copy_rows<THREADS, R>(tile, from.begin + t * from.row, from.row, thread);
    else
        fetch(tile, from, t, 0, rows, columns, vectors);
}

// A sum of products in the tensor cores' own sums, small terms apart from large ones; three terms are added in float.
struct Gathered {
    Sum large, small;

    template <int M, int N>
    __device__ __forceinline__ void add(const Left<bfloat16, M>& left, const Right<bfloat16, N>& right) {
        if constexpr (SUM_TERMS == 3) {
            multiply(large, left, right);
        } else {
            if constexpr (N > 1) multiply_once<bfloat16>(small, left.x[0], right.x[1]);
            if constexpr (M > 1) multiply_once<bfloat16>(small, left.x[1], right.x[0]);
            multiply_once<bfloat16>(large, left.x[0], right.x[0]);
        }
    }
    __device__ __forceinline__ Sum total() const {
        Sum sum;
        for (int i = 0; i < 4; i++) sum.x[i] = large.x[i] + small.x[i];
        return sum;
    }
};

// Numbers of 16 x 8 as terms, two at a time; a term has so many rows.
template <int TERMS>
__device__ __forceinline__ void store_terms(const Sum& sum, bfloat16* begin, int stride, int rows, int row,
                                            int column) {
    const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    bfloat16* const at = begin + ((row + line) * stride + column + pair);
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        unsigned both[TERMS][1];
        set_pair<bfloat16>(both, 0, sum.x[2 * half], sum.x[2 * half + 1]);
        #pragma unroll
        for (int n = 0; n < TERMS; n++) *reinterpret_cast<unsigned*>(at + (n * rows + 8 * half) * stride) = both[n][0];
    }
}
template <int TERMS, int R, int C>
__device__ __forceinline__ void store_terms(const Sum& sum, const Split<TERMS, R, C>& split, int row, int column) {
    store_terms<TERMS>(sum, split.term[0].begin, Tile<bfloat16, R, C>::stride, R, row, column);
}

// Neighbouring numbers that are read or written at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
    T x[N];

    template <class From>
    static __device__ __forceinline__ const Vector& at(const From* begin) {
        return *reinterpret_cast<const Vector*>(begin);
    }
};
// Neighbouring numbers of the data.
__device__ __forceinline__ Vector<float, 4> four_of(const float* begin) { return Vector<float, 4>::at(begin); }
__device__ __forceinline__ Vector<float, 2> two_of(const float* begin) { return Vector<float, 2>::at(begin); }
template <class T>
__device__ __forceinline__ Vector<float, 4> four_of(const T* begin) {
    const auto words = Vector<unsigned, 2>::at(begin);
    return {low_of<T>(words.x[0]), high_of<T>(words.x[0]), low_of<T>(words.x[1]), high_of<T>(words.x[1])};
}
template <class T>
__device__ __forceinline__ Vector<float, 2> two_of(const T* begin) {
    const auto word = Vector<unsigned, 1>::at(begin);
    return {low_of<T>(word.x[0]), high_of<T>(word.x[0])};
}
