// Tensor cores in double precision: products of 16 x 8 times 8 x 8, spread over the 32 lanes of a warp.
//
// With line = lane / 4, pair = lane % 4 * 2, and the inner axis in an order that lets a lane read neighbours:
//
//   Left    x[i], rows x inner:      row line + 8 (i % 2),  inner pair + i / 2
//   Right   x[i], inner x columns:   inner pair + i,        column line
//   Sum     x[i], rows x columns:    row line + 8 (i / 2),  column pair + i % 2
//
// So a Sum is laid out as Left, and each half of its rows, transposed, as Right: what one product makes, the next takes.

struct Left {
    double x[4];
};
struct Right {
    double x[2];
};
struct Sum {
    double x[4];

    __device__ __forceinline__ void add(const Left& left, const Right& right) { mma_f64(x, left.x, right.x); }
    __device__ __forceinline__ Left left() const { return {x[0], x[2], x[1], x[3]}; }
};

// Two neighbours that are read or written at once.
template <class T>
struct alignas(2 * sizeof(T)) Two {
    T x[2];
};

// A matrix in shared memory, row by row.
template <class T, int STRIDE>
struct Panel {
    T* begin;

    static constexpr int stride = STRIDE;
    static_assert(STRIDE % 2 == 0, "neighbours lie together");

    __device__ __forceinline__ T& at(int i, int j) const { return begin[i * STRIDE + j]; }
    __device__ __forceinline__ Two<T>& two(int i, int j) const { return reinterpret_cast<Two<T>&>(at(i, j)); }

    // Left[i][j] = panel[row + i][column + j].
    __device__ __forceinline__ Left left(int row, int column) const {
        const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        const Two<T> low = two(row + line, column + pair), high = two(row + line + 8, column + pair);
        return {in_double(low.x[0]), in_double(high.x[0]), in_double(low.x[1]), in_double(high.x[1])};
    }
    // Right[i][j] = panel[row + j][column + i].
    __device__ __forceinline__ Right transposed(int row, int column) const {
        const Two<T> both = two(row + threadIdx.x % 32 / 4, column + threadIdx.x % 4 * 2);
        return {in_double(both.x[0]), in_double(both.x[1])};
    }
    // Sum[i][j] = panel[row + i][column + j], and back.
    __device__ __forceinline__ Sum sum(int row, int column) const {
        const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        const Two<T> low = two(row + line, column + pair), high = two(row + line + 8, column + pair);
        return {low.x[0], low.x[1], high.x[0], high.x[1]};
    }
    __device__ __forceinline__ void store(const Sum& sum, int row, int column) const {
        const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        two(row + line, column + pair) = {sum.x[0], sum.x[1]};
        two(row + line + 8, column + pair) = {sum.x[2], sum.x[3]};
    }
    // Right[i][j] = panel[row + i][column + j].
    __device__ __forceinline__ Right right(int row, int column) const {
        const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        return {in_double(at(row + pair, column + line)), in_double(at(row + pair + 1, column + line))};
    }
};

// For each number of a Sum: use(i, j, x), where x may be changed.
template <class Use>
__device__ __forceinline__ void each(Sum& sum, Use use) {
    const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    #pragma unroll
    for (int i = 0; i < 4; i++) use(line + i / 2 * 8, pair + i % 2, sum.x[i]);
}
