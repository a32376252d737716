// Where the walk of recursive_least_squares_tensor.cu begins: a root R of the covariance P = R R^T before a piece of a
// sequence, and the solution there, in single precision; all between is in double. Of a piece in the middle they are
// those of all pairs before it, of which pair_sums.cu has left the sums: H = P^-1, and S = P G.
//
// What has no root with digits enough is left to recursive_least_squares_chunks.cu, and so is what is no covariance. One
// block per memory, value columns and piece.

enum { STATE, COVARIANCE };

// P = L L^T in place, its lower triangle only; false if a pivot is not positive.
__device__ bool take_root(const Square& P, double* column) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    #pragma unroll 1
    for (int p = 0; p < K; p++) {
        __syncthreads();  // P is what column p - 1 left
        const double pivot = P.at(p, p), share = 1 / sqrt(pivot);
        if (!(pivot > 0)) return false;
        for (int i = p + threadIdx.x; i < K; i += THREADS) column[i] = share * P.at(i, p);
        __syncthreads();  // column p is there
        #pragma unroll 4
        for (int i = p + warp; i < K; i += WARPS)
            for (int j = p + lane; j <= i; j += 32)
                P.at(i, j) = j == p ? column[i] : fma(-column[i], column[j], P.at(i, j));
    }
    __syncthreads();  // the root is there
    return true;
}

// H and G of all pairs before a piece, from those before all pairs; then P = H^-1 and S = P G. False where H has not
// digits enough.
__device__ __forceinline__ bool begin_later(const Kept& S, const Kept& G, const Square& H, double& information,
                                            const Sums& earlier, int piece, double* lines) {
    G.multiply(S, H);
    #pragma unroll 1
    for (int p = 0; p < piece; p++) {
        const Sums sum(earlier.begin, p);
        sum.add_to(G);
        __syncthreads();  // nobody is left at H
        sum.add_to(H);
    }
    __syncthreads();  // H of all of them is there
    information = trace(H);
    if (!(invert(H, lines) && trace(H) * information < SURE)) return false;
    S.multiply(G, H);
    return true;
}

extern "C" __global__ void __launch_bounds__(256, 1)
least_squares_begin(const gate* S, const gate* P, float* sums, float* begun, float* rooms, const long long* table,
                    int axes, int columns, int pieces, int blocks, double eps) {
    const Square square = {reinterpret_cast<double*>(dynamic_shared())};
    double* const lines = square.begin + KEYS * Square::stride;
    double* const own_room = reinterpret_cast<double*>(rooms) + size_t(blockIdx.x) * 2 * ROOM;
    const int which = blockIdx.x / blocks, piece = blockIdx.x % pieces;
    const int first = blockIdx.x % blocks / pieces * VALUES + threadIdx.x / 32 * 16;
    const Rows<const gate> covariance = rows(P, table, axes, COVARIANCE, which);
    const Sums earlier(reinterpret_cast<double*>(sums), size_t(blockIdx.x / pieces) * (pieces - 1));
    float* const root = begun + size_t(blockIdx.x) * BEGUN;

    const Kept solution(own_room), sum(own_room + ROOM);
    solution.load(rows(S, table, axes, STATE, which), first, columns);
    bool moved = false, good = load_covariance(square, covariance, eps);
    for (int p = 0; p < piece; p++) moved |= Sums(earlier.begin, p).moved() != 0;
    good = finite(square) && good && invert(square, lines);
    double information = good ? trace(square) : 0;
    if (good && moved) good = begin_later(solution, sum, square, information, earlier, piece, lines);
    __syncthreads();  // nobody is left at H
    if (good && !moved) load_covariance(square, covariance, eps);
    good = good && take_root(square, lines);

    if (threadIdx.x == 0) root[0] = good, root[1] = moved, root[2] = float(information);
    if (!good) return;
    each_of_square(KEYS, [&](int i, int j) {
        root[4 + i * KEYS + j] = i < K && j <= i ? float(square.at(i, j)) : 0;
    });
    #pragma unroll 2
    for (int n = 0; n < OCTETS; n++)
        for (int i = 0; i < 4; i++)
            root[4 + KEYS * KEYS + (n * THREADS + threadIdx.x) * 4 + i] = float(solution.own(n).x[i]);
}
