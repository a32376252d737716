// Where a sequence lies: see _sequences.py for the table.

#ifndef EVEN
#define EVEN 0
#endif

template <class T>
struct Row {
    T* begin;
    long long column;

    __device__ __forceinline__ T& operator[](int j) const { return begin[j * column]; }
};

template <class T>
struct Rows {
    T* begin;
    long long group, row, column;  // strides, in numbers

    __device__ __forceinline__ T& at(int i, int j) const { return begin[i * row + j * column]; }
    // One row; its numbers are neighbours if EVEN, and then their addresses need no registers.
    __device__ __forceinline__ Row<T> line(int i) const { return {begin + i * row, EVEN ? 1 : column}; }
    __device__ __forceinline__ Rows of(int g) const { return {begin + g * group, group, row, column}; }
};

// The rows of array number `array` that belong to a memory.
template <class T>
__device__ __forceinline__ Rows<T> rows(T* array_begin, const long long* table, int axes, int array, unsigned memory) {
    const long long* strides = table + (1 + array) * (axes + 3);
    long long at = 0;
    #pragma unroll 1
    for (int axis = axes - 1; axis >= 0; axis--) {
        const unsigned size = unsigned(table[axis]);  // 32 bits: a grid has no more blocks, and division is slow
        at += memory % size * strides[axis];
        memory /= size;
    }
    return {array_begin + at, strides[axes], strides[axes + 1], strides[axes + 2]};
}

// All tokens in their order, each fetched while AHEAD others are worked on: memory is slow, and one waits for many as
// long as for one. fetch(token, t) reads what is needed of it, use(token, t) needs no more.
template <class Token, int AHEAD, class Fetch, class Use>
__device__ __forceinline__ void walk(int tokens, Fetch fetch, Use use) {
    Token ahead[AHEAD];
    #pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (i < tokens) fetch(ahead[i], i);
    #pragma unroll 1
    for (int t = 0; t < tokens; t += AHEAD) {
        #pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (t + i < tokens) use(ahead[i], t + i);
            if (t + AHEAD + i < tokens) fetch(ahead[i], t + AHEAD + i);
        }
    }
}

#ifdef PARTS
// PARTS neighbouring lanes share a column: each holds some of its rows, and a sum over all rows is theirs together.
__device__ __forceinline__ real over_parts(real x) {
    for (int distance = 1; distance < PARTS; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

#ifdef K
// What lane `part` owns of a column, zero beyond the last row; and back.
template <class T>
__device__ __forceinline__ void load_column(real (&own)[ROWS], Rows<T> state, int part, int column, bool mine) {
    for (int r = 0; r < ROWS; r++) {
        const int row = part + r * PARTS;
        own[r] = row < K && mine ? state.at(row, column) : real(0);
    }
}

__device__ __forceinline__ void store_column(real (&own)[ROWS], Rows<real> state, int part, int column, bool mine) {
    for (int r = 0; r < ROWS; r++) {
        const int row = part + r * PARTS;
        if (row < K && mine) state.at(row, column) = own[r];
    }
}
#endif
#endif
