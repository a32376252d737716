// What both walks of the chunked delta rule share, beside the records of delta_chunks.cuh: sending for chunks ahead,
// writing answers, and the recurrence for the tokens of a chunk that has a bad number.

// The arrays of a memory.
struct Arrays {
    Rows<const data> q, k, p, v;
    Rows<const real> beta, gate;
    Rows<data> o;
};

__device__ __forceinline__ bool bad(float x) { return x - x != 0; }

// Lines of memory that will be asked for go to the cache.
#ifdef __CUDACC_RTC__
__device__ __forceinline__ void prefetch(const void* line) { asm volatile("prefetch.global.L2 [%0];" :: "l"(line)); }
#else
inline void prefetch(const void*) {}
#endif
constexpr int LINE = 128;  // bytes

// Who sends for what: a thread among those of all blocks that need the same.
struct Senders {
    int thread, count;
};
__device__ __forceinline__ void prefetch_record(const Record& record, const Senders& senders) {
    const int lines = int(record.numbers() * sizeof(float) / LINE);
    #pragma unroll 1
    for (int line = senders.thread; line < lines; line += senders.count)
        prefetch(record.begin + size_t(line) * (LINE / sizeof(float)));
}
__device__ __forceinline__ void prefetch_tokens(const Rows<const data>& from, long long t, int count,
                                                const Senders& senders) {
    constexpr int lines = (K * int(sizeof(data)) + LINE - 1) / LINE;
    #pragma unroll 1
    for (int i = senders.thread; i < lines * count; i += senders.count)
        prefetch(&from.at(t + i / lines, i % lines * (LINE / int(sizeof(data)))));
}

// The place of a number of a state, if it is there; found anew each time, for across the walk it would take registers.
template <class T>
__device__ __forceinline__ T* place_of(const Rows<T>& state, int key, int column, int columns) {
    return key < K && column < columns ? &state.at(key, column) : nullptr;
}

// Answers of 16 tokens and 8 columns, as far as they are there; two at once where that is possible.
__device__ __forceinline__ void write(const Sum& sum, const Rows<data>& to, long long t, int column, int count,
                                      int columns, real scale) {
    const int line = threadIdx.x % 32 / 4, first = column + threadIdx.x % 4 * 2;
    data* at = to.begin + (t + line) * to.row + first * to.column;
    #pragma unroll
    for (int half = 0; half < 2; half++, at += 8 * to.row) {
        if (line + 8 * half >= count) return;
        Vector<data, 2> two;
        for (int i = 0; i < 2; i++) put(two.x[i], scale * sum.x[2 * half + i]);
        if (to.column == 1 && first + 1 < columns && size_t(at) % sizeof(two) == 0) {
            *reinterpret_cast<Vector<data, 2>*>(at) = two;
        } else {
            if (first < columns) *at = two.x[0];
            if (first + 1 < columns) at[to.column] = two.x[1];
        }
    }
}

// The warps that take tokens one by one, a lane for each column of the state; `Team` has
//
//     warps, warp()         how many there are, and which this one is
//     number(key, column)   the state, in shared memory
//     parts                 32 numbers of each warp there
//     meet()                a barrier of all of them

// A sum over all keys of a column, of which a thread has some.
template <class Team>
__device__ __forceinline__ float over_keys(const Team& team, float mine) {
    const int lane = threadIdx.x % 32;
    team.parts[32 * team.warp() + lane] = mine;
    team.meet();  // all parts are there
    float sum = 0;
    for (int warp = 0; warp < Team::warps; warp++) sum += team.parts[32 * warp + lane];
    team.meet();  // nobody looks at these any more
    return sum;
}

// A chunk whose answers before token `good` are written. A thread has one key of as many as there are warps.
template <class Team>
__device__ void walk(const Team& team, const Arrays& arrays, long long t, int good, int count, int first_column,
                     int columns, int groups, real scale) {
    const int first = team.warp(), own = threadIdx.x % 32, column = first_column + own;
    const bool mine = column < columns;
    #pragma unroll 1
    for (int i = 0; i < count; i++, t++) {
        float mine_of_all = 0;
        #pragma unroll 1
        for (int key = first; key < K; key += Team::warps) {
            float& x = team.number(key, own);
            if (GATE) x = kept(exp2f(LOG2E * arrays.gate.at(t, GATE == STEP ? 0 : key)), x);
            mine_of_all = fma(widened(arrays.p.at(t, key)), x, mine_of_all);
        }
        const float recalled = over_keys(team, mine_of_all);
        const float error = arrays.beta.at(t, 0) * ((mine ? widened(arrays.v.at(t, column)) : 0) - recalled);
        #pragma unroll 1
        for (int key = first; key < K; key += Team::warps)
            team.number(key, own) = fma(widened(arrays.k.at(t, key)), error, team.number(key, own));
        #pragma unroll 1
        for (int group = 0; group < groups; group++) {
            const auto q = arrays.q.of(group);
            mine_of_all = 0;
            #pragma unroll 1
            for (int key = first; key < K; key += Team::warps)
                mine_of_all = fma(widened(q.at(t, key)), team.number(key, own), mine_of_all);
            const float answer = over_keys(team, mine_of_all);
            if (first == 0 && mine && i >= good) put(arrays.o.of(group).at(t, column), scale * answer);
        }
    }
}
