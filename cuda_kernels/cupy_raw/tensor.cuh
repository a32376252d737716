// Tensor cores: products of small matrices whose numbers are spread over the 32 lanes of a warp.
//
// A product is 16 x 16 times 16 x 8, of numbers of 16 bits, added in float. With line = lane / 4, pair = lane % 4 * 2:
//
//   Left    a[i], rows x inner:      row line + 8 (i % 2),  inner pair + 8 (i / 2)  and the one after it
//   Right   b[i], inner x columns:   inner pair + 8 i and the one after it,  column line
//   Sum     x[i], rows x columns:    row line + 8 (i / 2),  column pair + i % 2
//
// A register of Left or Right holds two numbers, the first in its low half. So the Sum of 16 x 16 numbers is laid out as
// Left, and the Sum of columns x inner, 8 columns of it, as Right: `left_of` and `right_of` go from the one to the other
// without leaving the registers.
//
// A float is the sum of up to three bfloat16, which keep 8, 16 and 24 of its bits. A matrix of TERMS of them is
// multiplied term by term, and what is smaller than the last term kept is left out: 3 by 3 terms take 6 products, with
// an error like that of float; 3 by 1 take 3, 2 by 1 take 2. So float never becomes anything narrower.

#ifdef __CUDACC_RTC__
__device__ __forceinline__ unsigned shared_address(const void* at) { return unsigned(__cvta_generic_to_shared(at)); }

// sum += a b, of bfloat16.
__device__ __forceinline__ void mma_bf16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// sum += a b, of float16.
__device__ __forceinline__ void mma_f16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four matrices of 8 x 8 from shared memory: lane i gives the address of row i % 8 of matrix i / 8, a multiple of 16
// bytes. x[m] of a lane holds, of matrix m, row `line`, columns pair and pair + 1.
__device__ __forceinline__ void load_matrices(unsigned (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}
// The same, x[m] holds column `line`, rows pair and pair + 1.
__device__ __forceinline__ void load_transposed_matrices(unsigned (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}
// 16 bytes to shared memory, the last 16 - bytes of them zeros, while the program goes on. Nobody may look at them before
// this thread has finished its copies, and other threads not before the barrier after that.
__device__ __forceinline__ void copy_later(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
// The copies since the last call are a group.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for all groups of this thread but the newest.
template <int GROUPS>
__device__ __forceinline__ void finish_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(GROUPS) : "memory");
}
#endif  // for the CPU, the header that defines threads defines these too

// ---- numbers in pairs -------------------------------------------------------------------------------------------------

// Two numbers in one register, the first in its low half.
template <class T>
__device__ __forceinline__ unsigned packed(float low, float high) {
    T x, y;
    put(x, low);
    put(y, high);
    return x.bits | unsigned(y.bits) << 16;
}
#ifdef __CUDACC_RTC__
template <>
__device__ __forceinline__ unsigned packed<bfloat16>(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <>
__device__ __forceinline__ unsigned packed<float16>(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#endif
template <class T>
__device__ __forceinline__ float low_of(unsigned both) {
    return widened(T{(unsigned short)(both & 0xffff)});
}
template <class T>
__device__ __forceinline__ float high_of(unsigned both) {
    return widened(T{(unsigned short)(both >> 16)});
}

// ---- matrices in registers --------------------------------------------------------------------------------------------

// The numbers that products are made of, for data of a type: data of 16 bits as they are, float as bfloat16.
template <class T> struct Factor { typedef T type; };
template <> struct Factor<float> { typedef bfloat16 type; };
// How many of them make one number.
template <class T> constexpr int terms_of = 1;
template <> constexpr int terms_of<float> = 3;

template <class T, int TERMS>
struct Left {
    unsigned x[TERMS][4];
};
template <class T, int TERMS>
struct Right {
    unsigned x[TERMS][2];
};
struct Sum {
    float x[4];
};

// One register of each term of two floats.
template <class T, int TERMS, int REGISTERS>
__device__ __forceinline__ void set_pair(unsigned (&x)[TERMS][REGISTERS], int i, float low, float high) {
    #pragma unroll
    for (int term = 0; term < TERMS; term++) {
        x[term][i] = packed<T>(low, high);
        if (term + 1 < TERMS) low -= low_of<T>(x[term][i]), high -= high_of<T>(x[term][i]);
    }
}

template <class T>
__device__ __forceinline__ void multiply_once(Sum& sum, const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ __forceinline__ void multiply_once<bfloat16>(Sum& sum, const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_bf16(sum.x, a, b);
}
template <>
__device__ __forceinline__ void multiply_once<float16>(Sum& sum, const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_f16(sum.x, a, b);
}

// sum += left right, small terms first. Tensor cores cut what they add instead of rounding it, and over many products that
// is an error of one sign; so they begin at zero, and the sum of all is rounded (Ootomo and Yokota 2022, arXiv:2203.03341).
template <class T, int M, int N>
__device__ __forceinline__ void multiply(Sum& sum, const Left<T, M>& left, const Right<T, N>& right) {
    constexpr int last = (M > N ? M : N) - 1;
    Sum part = {};
    #pragma unroll
    for (int order = last; order >= 0; order--)
        #pragma unroll
        for (int i = 0; i <= order; i++)
            if (i < M && order - i < N) multiply_once<T>(part, left.x[i], right.x[order - i]);
    for (int i = 0; i < 4; i++) sum.x[i] += part.x[i];
}

// The same in the sums of the tensor cores, which cut what they add: fewer registers, where answers are of 16 bits.
template <class T, int M, int N>
__device__ __forceinline__ void multiply_onto(Sum& sum, const Left<T, M>& left, const Right<T, N>& right) {
    constexpr int last = (M > N ? M : N) - 1;
    #pragma unroll
    for (int order = last; order >= 0; order--)
        #pragma unroll
        for (int i = 0; i <= order; i++)
            if (i < M && order - i < N) multiply_once<T>(sum, left.x[i], right.x[order - i]);
}

// A Sum of 16 x 16, as two of 16 x 8, as the left matrix of the next product.
template <class T, int TERMS>
__device__ __forceinline__ void left_of(Left<T, TERMS>& left, const Sum& first, const Sum& second) {
    set_pair<T>(left.x, 0, first.x[0], first.x[1]);
    set_pair<T>(left.x, 1, first.x[2], first.x[3]);
    set_pair<T>(left.x, 2, second.x[0], second.x[1]);
    set_pair<T>(left.x, 3, second.x[2], second.x[3]);
}
// A Sum of 16 columns x 16 inner, as two of 16 x 8, as the right matrix of the next product; `half` picks 8 columns.
template <class T, int TERMS>
__device__ __forceinline__ void right_of(Right<T, TERMS>& right, const Sum& first, const Sum& second, int half) {
    set_pair<T>(right.x, 0, half ? first.x[2] : first.x[0], half ? first.x[3] : first.x[1]);
    set_pair<T>(right.x, 1, half ? second.x[2] : second.x[0], half ? second.x[3] : second.x[1]);
}

// ---- matrices in shared memory ----------------------------------------------------------------------------------------

// Rows in shared memory, 8 numbers apart, so that the eight rows of a small matrix lie in different banks.
template <class T, int ROWS_, int COLUMNS_>
struct Tile {
    static constexpr int rows = ROWS_, columns = COLUMNS_, stride = COLUMNS_ + 8;
    static constexpr int bytes = ROWS_ * stride * int(sizeof(T));
    static_assert(COLUMNS_ % 8 == 0, "rows begin at multiples of 16 bytes");
    T* begin;

    __device__ __forceinline__ T& at(int i, int j) const { return begin[i * stride + j]; }
    // The same at (i + row, j + column), where these two are constants: one address for all of them.
    __device__ __forceinline__ const T* from(int i, int j, int row, int column) const {
        return &at(i, j) + (row * stride + column);
    }
};

// Two neighbours of a row, j even.
template <class T, int R, int C>
__device__ __forceinline__ void read_two(const Tile<T, R, C>& tile, int i, int j, float& low, float& high) {
    const unsigned both = *reinterpret_cast<const unsigned*>(&tile.at(i, j));
    low = low_of<T>(both), high = high_of<T>(both);
}
template <int R, int C>
__device__ __forceinline__ void read_two(const Tile<float, R, C>& tile, int i, int j, float& low, float& high) {
    struct alignas(8) Both {
        float low, high;
    };
    const Both both = *reinterpret_cast<const Both*>(&tile.at(i, j));
    low = both.low, high = both.high;
}

// Takes tiles, one after the other, out of a piece of shared memory.
template <class TileType>
__device__ __forceinline__ TileType tile_of(unsigned char*& at) {
    static_assert(TileType::bytes % 16 == 0, "the next tile begins at a multiple of 16 bytes");
    TileType tile;
    tile.begin = reinterpret_cast<decltype(tile.begin)>(at);
    at += TileType::bytes;
    return tile;
}

// Loads of numbers as they are.
// Left[i][j] = tile[row + i][column + j].
template <class T, int R, int C>
__device__ __forceinline__ void load_left(Left<T, 1>& left, Tile<T, R, C> tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    load_matrices(left.x[0], tile.from(lane % 16, lane / 16 * 8, row, column));
}
// Left[i][j] = tile[row + j][column + i].
template <class T, int R, int C>
__device__ __forceinline__ void load_left_transposed(Left<T, 1>& left, Tile<T, R, C> tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    load_transposed_matrices(left.x[0], tile.from(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8, row, column));
}
// Two neighbours: Right n [i][j] = tile[row + i][column + 8 n + j].
template <class T, int R, int C>
__device__ __forceinline__ void load_right(Right<T, 1> (&right)[2], Tile<T, R, C> tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    unsigned x[4];
    load_transposed_matrices(x, tile.from(lane % 16, lane / 16 * 8, row, column));
    for (int i = 0; i < 4; i++) right[i / 2].x[0][i % 2] = x[i];
}
// Two neighbours: Right n [i][j] = tile[row + 8 n + j][column + i].
template <class T, int R, int C>
__device__ __forceinline__ void load_right_transposed(Right<T, 1> (&right)[2], Tile<T, R, C> tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    unsigned x[4];
    load_matrices(x, tile.from(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8, row, column));
    for (int i = 0; i < 4; i++) right[i / 2].x[0][i % 2] = x[i];
}

// The same four with every number changed on its way, and as terms: x at (i, j) of the matrix becomes change(i, j, x).
// Places are those of the matrix: for both halves of a right pair, j runs from 0 to 15.
struct AsItIs {
    __device__ __forceinline__ float operator()(int, int, float x) const { return x; }
};
template <int TERMS, class Number>
__device__ __forceinline__ void make_left(Left<bfloat16, TERMS>& left, Number number) {  // number(i, j, register, high)
    const int lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
    #pragma unroll
    for (int r = 0; r < 4; r++) {
        const int i = line + r % 2 * 8, j = pair + r / 2 * 8;
        set_pair<bfloat16>(left.x, r, number(i, j, r, false), number(i, j + 1, r, true));
    }
}
template <int TERMS, class Number>
__device__ __forceinline__ void make_right(Right<bfloat16, TERMS> (&right)[2], Number number) {
    const int lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
    #pragma unroll
    for (int r = 0; r < 4; r++) {
        const int i = pair + r % 2 * 8, j = line + r / 2 * 8;
        set_pair<bfloat16>(right[r / 2].x, r % 2, number(i, j, r, false), number(i + 1, j, r, true));
    }
}
template <class T>
__device__ __forceinline__ float half_of(unsigned both, bool high) {
    return high ? high_of<T>(both) : low_of<T>(both);
}

// The same with what is in registers already.
template <int TERMS, class Change>
__device__ __forceinline__ void change_left(Left<bfloat16, TERMS>& left, Change change) {
    const Left<bfloat16, TERMS> known = left;
    make_left(left, [&](int i, int j, int r, bool high) {
        float x = 0;
        #pragma unroll
        for (int n = TERMS - 1; n >= 0; n--) x += half_of<bfloat16>(known.x[n][r], high);
        return change(i, j, x);
    });
}

template <class T, int TERMS, int R, int C, class Change>
__device__ __forceinline__ void load_left(Left<bfloat16, TERMS>& left, Tile<T, R, C> tile, int row, int column,
                                          Change change) {
    Left<T, 1> as_it_is;
    load_left(as_it_is, tile, row, column);
    make_left(left, [&](int i, int j, int r, bool high) { return change(i, j, half_of<T>(as_it_is.x[0][r], high)); });
}
template <int TERMS, int R, int C, class Change>
__device__ __forceinline__ void load_left(Left<bfloat16, TERMS>& left, Tile<float, R, C> tile, int row, int column,
                                          Change change) {
    make_left(left, [&](int i, int j, int, bool) { return change(i, j, tile.at(row + i, column + j)); });
}
template <class T, int TERMS, int R, int C, class Change>
__device__ __forceinline__ void load_left_transposed(Left<bfloat16, TERMS>& left, Tile<T, R, C> tile, int row,
                                                     int column, Change change) {
    Left<T, 1> as_it_is;
    load_left_transposed(as_it_is, tile, row, column);
    make_left(left, [&](int i, int j, int r, bool high) { return change(i, j, half_of<T>(as_it_is.x[0][r], high)); });
}
template <int TERMS, int R, int C, class Change>
__device__ __forceinline__ void load_left_transposed(Left<bfloat16, TERMS>& left, Tile<float, R, C> tile, int row,
                                                     int column, Change change) {
    make_left(left, [&](int i, int j, int, bool) { return change(i, j, tile.at(row + j, column + i)); });
}
template <class T, int TERMS, int R, int C, class Change>
__device__ __forceinline__ void load_right(Right<bfloat16, TERMS> (&right)[2], Tile<T, R, C> tile, int row, int column,
                                           Change change) {
    Right<T, 1> as_it_is[2];
    load_right(as_it_is, tile, row, column);
    make_right(right, [&](int i, int j, int r, bool high) {
        return change(i, j, half_of<T>(as_it_is[r / 2].x[0][r % 2], high));
    });
}
template <int TERMS, int R, int C, class Change>
__device__ __forceinline__ void load_right(Right<bfloat16, TERMS> (&right)[2], Tile<float, R, C> tile, int row,
                                           int column, Change change) {
    make_right(right, [&](int i, int j, int, bool) { return change(i, j, tile.at(row + i, column + j)); });
}
template <class T, int TERMS, int R, int C, class Change>
__device__ __forceinline__ void load_right_transposed(Right<bfloat16, TERMS> (&right)[2], Tile<T, R, C> tile, int row,
                                                      int column, Change change) {
    Right<T, 1> as_it_is[2];
    load_right_transposed(as_it_is, tile, row, column);
    make_right(right, [&](int i, int j, int r, bool high) {
        return change(i, j, half_of<T>(as_it_is[r / 2].x[0][r % 2], high));
    });
}
template <int TERMS, int R, int C, class Change>
__device__ __forceinline__ void load_right_transposed(Right<bfloat16, TERMS> (&right)[2], Tile<float, R, C> tile, int row,
                                                      int column, Change change) {
    make_right(right, [&](int i, int j, int, bool) { return change(i, j, tile.at(row + j, column + i)); });
}

// A matrix of floats in shared memory as its terms, one tile each.
template <int TERMS, int R, int C>
struct Split {
    Tile<bfloat16, R, C> term[TERMS];

    __device__ __forceinline__ float at(int i, int j) const {
        float x = 0;
        #pragma unroll
        for (int n = TERMS - 1; n >= 0; n--) x += widened(term[n].at(i, j));
        return x;
    }
    __device__ __forceinline__ void set(int i, int j, float x) const {
        #pragma unroll
        for (int n = 0; n < TERMS; n++) {
            bfloat16& at = term[n].at(i, j);
            put(at, x);
            x -= widened(at);
        }
    }
    // Two neighbours, j even.
    __device__ __forceinline__ void set_two(int i, int j, float low, float high) const {
        unsigned both[TERMS][1];
        set_pair<bfloat16>(both, 0, low, high);
        #pragma unroll
        for (int n = 0; n < TERMS; n++) *reinterpret_cast<unsigned*>(&term[n].at(i, j)) = both[n][0];
    }
};
template <int TERMS, int R, int C>
__device__ __forceinline__ Split<TERMS, R, C> split_of(unsigned char*& at) {
    Split<TERMS, R, C> split;
    for (int n = 0; n < TERMS; n++) split.term[n] = tile_of<Tile<bfloat16, R, C>>(at);
    return split;
}
// The four loads of it.
template <int TERMS, int R, int C>
__device__ __forceinline__ void load_left(Left<bfloat16, TERMS>& left, const Split<TERMS, R, C>& split, int row,
                                          int column) {
    #pragma unroll
    for (int n = 0; n < TERMS; n++) {
        Left<bfloat16, 1> one;
        load_left(one, split.term[n], row, column);
        for (int i = 0; i < 4; i++) left.x[n][i] = one.x[0][i];
    }
}
template <int TERMS, int R, int C>
__device__ __forceinline__ void load_left_transposed(Left<bfloat16, TERMS>& left, const Split<TERMS, R, C>& split,
                                                     int row, int column) {
    #pragma unroll
    for (int n = 0; n < TERMS; n++) {
        Left<bfloat16, 1> one;
        load_left_transposed(one, split.term[n], row, column);
        for (int i = 0; i < 4; i++) left.x[n][i] = one.x[0][i];
    }
}
template <int TERMS, int R, int C>
__device__ __forceinline__ void load_right(Right<bfloat16, TERMS> (&right)[2], const Split<TERMS, R, C>& split, int row,
                                           int column) {
    #pragma unroll
    for (int n = 0; n < TERMS; n++) {
        Right<bfloat16, 1> one[2];
        load_right(one, split.term[n], row, column);
        for (int i = 0; i < 4; i++) right[i / 2].x[n][i % 2] = one[i / 2].x[0][i % 2];
    }
}
template <int TERMS, int R, int C>
__device__ __forceinline__ void load_right_transposed(Right<bfloat16, TERMS> (&right)[2],
                                                      const Split<TERMS, R, C>& split, int row, int column) {
    #pragma unroll
    for (int n = 0; n < TERMS; n++) {
        Right<bfloat16, 1> one[2];
        load_right_transposed(one, split.term[n], row, column);
        for (int i = 0; i < 4; i++) right[i / 2].x[n][i % 2] = one[i / 2].x[0][i % 2];
    }
}

// For each number of a Sum: use(i, j, x), where x may be changed.
template <class Use>
__device__ __forceinline__ void each(Sum& sum, Use use) {
    const int lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
    #pragma unroll
    for (int i = 0; i < 4; i++) use(line + i / 2 * 8, pair + i % 2, sum.x[i]);
}
// The same for neighbours, two at a time: use(i, j, x at j, x at j + 1).
template <class Use>
__device__ __forceinline__ void each_pair(Sum& sum, Use use) {
    const int lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
    #pragma unroll
    for (int i = 0; i < 4; i += 2) use(line + i / 2 * 8, pair, sum.x[i], sum.x[i + 1]);
}
// tile[row + i][column + j] = Sum[i][j].
template <class T, int R, int C>
__device__ __forceinline__ void store(Sum& sum, Tile<T, R, C> tile, int row, int column) {
    each(sum, [&](int i, int j, float& x) { put(tile.at(row + i, column + j), x); });
}

// ---- between global and shared memory, by all threads of the block ----------------------------------------------------

// Whether rows of an array can be copied 16 bytes at a time.
template <class T>
__device__ __forceinline__ bool in_vectors(const Rows<T>& from) {
    return from.column == 1 && (size_t)from.begin % 16 == 0 && from.row * (long long)sizeof(T) % 16 == 0;
}

// tile[i][j] = from[first + i][first_column + j] for i < rows and j < columns, zero elsewhere. In vectors, these are copies
// that the caller closes and finishes; first_column is then a multiple of 16 bytes.
template <class T, int R, int C>
__device__ __forceinline__ void fetch(Tile<T, R, C> tile, const Rows<const T>& from, long long first, int first_column,
                                      int rows, int columns, bool vectors) {
    constexpr int wide = 16 / int(sizeof(T)), pieces = C / wide;
    if (vectors) {
        #pragma unroll 1
        for (int i = threadIdx.x; i < R * pieces; i += blockDim.x) {
            const int row = i / pieces, column = i % pieces * wide;
            const int bytes = row < rows ? max(min(columns - column, wide), 0) * int(sizeof(T)) : 0;
            const T* at = bytes ? from.begin + (first + row) * from.row + first_column + column : from.begin;
            copy_later(&tile.at(row, column), at, bytes);
        }
    } else {
        #pragma unroll 4
        for (int i = threadIdx.x; i < R * C; i += blockDim.x) {
            const int row = i / C, column = i % C;
            const bool there = row < rows && column < columns;
            tile.at(row, column) = there ? from.begin[(first + row) * from.row + (first_column + column) * from.column] : T{};
        }
    }
}

// The same by a number of threads known beforehand. Where they hold whole rows, an address leads to the next.
template <int THREADS_, class T, int R, int C>
__device__ __forceinline__ void fetch(Tile<T, R, C> tile, const Rows<const T>& from, long long first, int first_column,
                                      int rows, int columns, bool vectors) {
    constexpr int wide = 16 / int(sizeof(T)), pieces = C / wide, together = THREADS_ / pieces;
    if constexpr (THREADS_ % pieces == 0) {
        if (vectors) {
            const int column = threadIdx.x % pieces * wide;
            const int bytes = max(min(columns - column, wide), 0) * int(sizeof(T));
            int row = threadIdx.x / pieces;
            const T* at = from.begin + (first + row) * from.row + first_column + column;
            #pragma unroll 4
            for (int i = 0; i < (R + together - 1) / together; i++, row += together, at += together * from.row) {
                const int wanted = row < rows ? bytes : 0;
                if (R % together == 0 || row < R) copy_later(&tile.at(row, column), wanted ? at : from.begin, wanted);
            }
            return;
        }
    }
    fetch(tile, from, first, first_column, rows, columns, vectors);
}

// to[first + i][first_column + j] = tile[i][j] for i < rows and j < columns.
template <class T, int R, int C>
__device__ __forceinline__ void write_back(Tile<T, R, C> tile, const Rows<T>& to, long long first, int first_column,
                                           int rows, int columns) {
    struct alignas(16) Piece {
        T x[16 / sizeof(T)];
    };
    constexpr int wide = 16 / int(sizeof(T));
    const bool vectors = in_vectors(to) && columns % wide == 0 && first_column % wide == 0;
    if (vectors) {
        const int pieces = columns / wide;
        for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
            const int row = i / pieces, column = i % pieces * wide;
            T* at = to.begin + (first + row) * to.row + first_column + column;
            *reinterpret_cast<Piece*>(at) = *reinterpret_cast<Piece*>(&tile.at(row, column));
        }
    } else {
        for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
            const int row = i / columns, column = i % columns;
            to.begin[(first + row) * to.row + (first_column + column) * to.column] = tile.at(row, column);
        }
    }
}

// to[first + i][first_column + j] = Sum[i][j] of 16 x 16 for i < rows, where `to` is in vectors: each lane writes
// 8 bytes and its neighbours the rest of 32, for which they trade columns if numbers have 16 bits.
template <class T>
__device__ __forceinline__ void store_columns(const Sum (&sum)[2], const Rows<T>& to, long long first, int first_column,
                                              int rows) {
    struct alignas(8) Piece {
        unsigned x[2];
    };
    const int lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2, odd = lane % 2;
    T* at = to.begin + (first + line) * to.row + first_column + (odd ? 6 + pair : pair);
    #pragma unroll
    for (int i = 0; i < 4; i += 2, at += 8 * to.row) {
        const unsigned near = packed<T>(sum[0].x[i], sum[0].x[i + 1]), far = packed<T>(sum[1].x[i], sum[1].x[i + 1]);
        const unsigned other = __shfl_xor_sync(0xffffffffu, odd ? near : far, 1);
        if (line + 4 * i < rows) *reinterpret_cast<Piece*>(at) = odd ? Piece{other, far} : Piece{near, other};
    }
}
template <>
__device__ __forceinline__ void store_columns<float>(const Sum (&sum)[2], const Rows<float>& to, long long first,
                                                     int first_column, int rows) {
    struct alignas(8) Piece {
        float x[2];
    };
    const int lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
    float* at = to.begin + (first + line) * to.row + first_column + pair;
    #pragma unroll
    for (int i = 0; i < 4; i += 2, at += 8 * to.row)
        for (int n = 0; n < 2; n++)
            if (line + 4 * i < rows) *reinterpret_cast<Piece*>(at + 8 * n) = {sum[n].x[i], sum[n].x[i + 1]};
}
