// Recursive least squares on data of 16 bits, chunk by chunk on tensor cores in single precision: P = R R^T is carried as
// its root R, so it is positive definite by construction, and numbers are multiplied as the terms of tensor.cuh. With R
// and S at the start of a chunk, and what is `left` at each of its tokens of the information there,
//
//     A = K R,   L L^T = diag(left) + A A^T,   B = L^-1 A,   W = B R^T,   E = L^-1 (V - K S),
//     O = Q S + tril(Q W^T) E,   S = S + W^T E,   Y = (L + diag(left)^1/2)^-1 A,   R = (R - W^T Y) / left^1/2
//
// (Andrews 1968 for R). The products from A to B and Y are in double precision: where A is large, repeated keys leave
// little of A in B, and single precision nothing of that.
//
// Eight warps have the keys and the value columns, 16 of each; two others invert L and L + diag(left)^1/2 while those
// bring S up to date, which nothing waits for. What single precision does not hold to the digits that are promised is
// given up, and recursive_least_squares_chunks.cu solves that memory in double precision: keys of which P knows next to
// nothing, so that A is large; a P that has to be capped before a pair; numbers that are not finite. Where only the P that
// the caller gets may have to be capped, that kernel finds the root of it in the place of what this one began with.

enum { Q, KEY, V, GATE, BETA, COVARIANCE, STATE_NEXT, COVARIANCE_NEXT, O };

constexpr int WARPS = 8, WORKERS = 32 * WARPS, THREADS = WORKERS + 64, VALUES = 16 * WARPS;
constexpr int BLOCKS = KEYS / 16, OCTETS = KEYS / 8, HALVES = CHUNK / 16;
constexpr double LEAST_LEFT = 1e-30;  // in a chunk: no pivot is less
static_assert(CHUNK == 32, "a lane has a token");

// Numbers of double precision for each pair of tokens.
struct Pairs {
    static constexpr int stride = CHUNK + 2, bytes = 8 * CHUNK * stride;
    double* begin;

    __device__ __forceinline__ double& at(int i, int j) const { return begin[i * stride + j]; }
};

// What is known of each pair of a chunk.
struct Weights {
    float root[CHUNK];   // of its weight; zero beyond the last pair
    double left[CHUNK];  // of what was known before the chunk, once this pair has come
};

// Bytes of a place for Y and for B, in which others lie at other times.
__device__ constexpr int most(int x, int y) { return x > y ? x : y; }
constexpr int BESIDE = most(Pairs::bytes, Tile<bfloat16, CHUNK, VALUES>::bytes);
constexpr int PLACE = most(3 * Tile<bfloat16, CHUNK, KEYS>::bytes, BESIDE);

// What a block keeps in shared memory.
struct Room {
    Split<3, KEYS, KEYS> R;
    Split<3, CHUNK, KEYS> W, Y, B;
    Tile<bfloat16, CHUNK, KEYS> k, q;
    Tile<float, CHUNK, KEYS> A;
    Tile<bfloat16, CHUNK, VALUES> v;  // in the place of B
    Pairs gram;                       // in the place of Y
    Pairs inverses;  // L^-1 and, transposed, one column further, (L + diag(left)^1/2)^-1
    Split<2, CHUNK, CHUNK> scores;  // in the same place

    __device__ __forceinline__ explicit Room(unsigned char* at) {
        R = split_of<3, KEYS, KEYS>(at), W = split_of<3, CHUNK, KEYS>(at);
        unsigned char *lower = at, *upper = at + PLACE;
        gram.begin = reinterpret_cast<double*>(at), Y = split_of<3, CHUNK, KEYS>(lower);
        v.begin = reinterpret_cast<bfloat16*>(upper), B = split_of<3, CHUNK, KEYS>(upper);
        at += 2 * PLACE;
        k = tile_of<Tile<bfloat16, CHUNK, KEYS>>(at), q = tile_of<Tile<bfloat16, CHUNK, KEYS>>(at);
        A = tile_of<Tile<float, CHUNK, KEYS>>(at);
        inverses.begin = reinterpret_cast<double*>(at);
        scores = split_of<2, CHUNK, CHUNK>(at);
    }
};

// What the warps tell each other.
struct Shared {
    Weights weights[2];    // of this chunk and the next
    double energy[CHUNK];  // weight |k|^2
    double sizes[WARPS];   // of R R^T, the parts of its trace
    double factors[2][2 * CHUNK];
    double information;  // trace of H
    bool moved;          // whether anything was learnt or forgotten
};

// Where arrays lie. In shared memory, because registers are for the solution.
struct Places {
    Rows<const data> query, key, value;
    Rows<const gate> decay, weight;
    Rows<data> answer;
    bool decays, weighted;
    int begin, end, first, columns;  // tokens and value columns of this block
};

__device__ __forceinline__ int warp_of() { return threadIdx.x / 32; }

// The first terms of a number, as they are.
template <int R, int C>
__device__ __forceinline__ Split<2, R, C> shortened(const Split<3, R, C>& x) {
    return {{x.term[0], x.term[1]}};
}
template <int TERMS, int R, int C>
__device__ __forceinline__ void read_two(const Split<TERMS, R, C>& x, int i, int j, float& low, float& high) {
    low = high = 0;
    #pragma unroll
    for (int n = TERMS - 1; n >= 0; n--) {
        float a, b;
        read_two(x.term[n], i, j, a, b);
        low += a, high += b;
    }
}
// A number that is longer than a float, x + rest: three terms have room for some bits more. R is rounded chunk after
// chunk, and where nothing else happens to it that is all its error.
struct Long {
    float x, rest;

    __device__ __forceinline__ void take_off(float y) {
        const float sum = x - y, taken = sum - x;
        rest += (x - (sum - taken)) - (y + taken), x = sum;
    }
    __device__ __forceinline__ void multiply(float y, float y_rest) {
        const float product = x * y;
        rest = fmaf(rest, y, fmaf(x, y_rest, fmaf(x, y, -product))), x = product;
    }
};
template <int R, int C>
__device__ __forceinline__ void read_long(const Split<3, R, C>& from, int i, int j, Long& low, Long& high) {
    float a, b;
    read_two(from.term[0], i, j, low.x, high.x);
    read_two(from.term[1], i, j, a, b);
    read_two(from.term[2], i, j, low.rest, high.rest);
    low.x += a, high.x += b;
}
template <int R, int C>
__device__ __forceinline__ void set_long(const Split<3, R, C>& to, int i, int j, Long low, Long high) {
    #pragma unroll
    for (int n = 0; n < 3; n++) {
        if (n == 1) low.x += low.rest, high.x += high.rest;
        const unsigned both = packed<bfloat16>(low.x, high.x);
        *reinterpret_cast<unsigned*>(&to.term[n].at(i, j)) = both;
        low.x -= low_of<bfloat16>(both), high.x -= high_of<bfloat16>(both);
    }
}
// 16 columns of 16 rows.
template <int TERMS, int R, int C>
__device__ __forceinline__ void store_two(const Split<TERMS, R, C>& to, Sum (&sums)[2], int row, int column) {
    #pragma unroll
    for (int n = 0; n < 2; n++)
        each_pair(sums[n], [&](int i, int j, float low, float high) {
            to.set_two(row + i, column + 8 * n + j, low, high);
        });
}

// ---- a chunk arrives ---------------------------------------------------------------------------------------------------

// Weights of the chunk that begins at token `low`, by one warp.
__device__ __forceinline__ void load_weights(Weights& to, const Places& at, int low) {
    const int lane = threadIdx.x % 32, n = at.end - low;
    const float weight = lane < n ? at.weighted ? at.weight.at(low + lane, 0) : 1 : 0;
    double total = at.decays && lane < n ? fmax(double(at.decay.at(low + lane, 0)), double(FAINTEST)) : 0;
    for (int distance = 1; distance < 32; distance *= 2) {
        const double earlier = __shfl_up_sync(0xffffffffu, total, distance);
        total += lane >= distance ? earlier : 0;
    }
    to.root[lane] = sqrtf(weight), to.left[lane] = exp(total);
}
// Weight |k|^2 of every second pair, by each of two warps.
__device__ __forceinline__ void find_energies(const Room& room, const Weights& weights, double* energies) {
    const int lane = threadIdx.x % 32;
    #pragma unroll 4
    for (int i = warp_of() - WARPS; i < CHUNK; i += 2) {
        float energy = 0;
        const float root = weights.root[i];
        for (int j = lane; j < KEYS; j += 32) {
            const float x = root * widened(room.k.at(i, j));
            energy = fmaf(x, x, energy);
        }
        const double total = over_warp(energy);
        if (lane == 0) energies[i] = root != 0 ? total : 0;
    }
}

// ---- the root of the covariance, by the warps of the keys --------------------------------------------------------------

// A = K R, weighted.
__device__ __forceinline__ void meet_keys(const Room& room, const Weights& weights) {
    const int column = 16 * warp_of();
    Sum sums[HALVES][2] = {};
    #pragma unroll 2
    for (int inner = 0; inner < KEYS; inner += 16) {
        Right<bfloat16, 3> right[2];
        load_right(right, room.R, inner, column);
        #pragma unroll
        for (int half = 0; half < HALVES; half++) {
            Left<bfloat16, 1> left;
            load_left(left, room.k, 16 * half, inner);
            for (int n = 0; n < 2; n++) multiply(sums[half][n], left, right[n]);
        }
    }
    for (int half = 0; half < HALVES; half++)
        for (int n = 0; n < 2; n++)
            each(sums[half][n], [&](int i, int j, float x) {
                const float root = weights.root[16 * half + i];
                room.A.at(16 * half + i, column + 8 * n + j) = root != 0 ? root * x : 0;
            });
}

// diag(left) + A A^T, of which a warp has 16 x 8.
__device__ __forceinline__ void meet_pairs(const Room& room, const Weights& weights) {
    const int row = warp_of() / 4 * 16, column = warp_of() % 4 * 8;
    const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    double sums[2][4] = {};  // a product waits for the sum it is added to
    #pragma unroll 2
    for (int inner = 0; inner < KEYS; inner += 16)
        #pragma unroll
        for (int n = 0; n < 2; n++) {
            float near[2], far[2], other[2];
            read_two(room.A, row + line, inner + 8 * n + pair, near[0], near[1]);
            read_two(room.A, row + line + 8, inner + 8 * n + pair, far[0], far[1]);
            read_two(room.A, column + line, inner + 8 * n + pair, other[0], other[1]);
            const double left[4] = {in_double(near[0]), in_double(far[0]), in_double(near[1]), in_double(far[1])};
            const double right[2] = {in_double(other[0]), in_double(other[1])};
            mma_f64(sums[n], left, right);
        }
    for (int i = 0; i < 4; i++) {
        const int token = row + line + i / 2 * 8, other = column + pair + i % 2;
        room.gram.at(token, other) = sums[0][i] + sums[1][i] + (token == other ? weights.left[token] : 0);
    }
}

// Part of what `invert_factor` does: pivots from `first` on, while there are up to ROWS rows.
template <int ROWS>
__device__ __forceinline__ void take_pivots(double (&x)[CHUNK], double& pivot, int first, int last, double* factors,
                                            const Weights& weights, bool with_roots, const Pairs& to) {
    const int own = threadIdx.x % 32;
    #pragma unroll 1
    for (int p = first; p < last; p++) {
        double* const factor = factors + p % 2 * CHUNK;
        if (own == p)
            #pragma unroll
            for (int i = 1; i < ROWS; i++) factor[i] = x[i];
        const double share = 1 / pivot, root = sqrt(pivot);
        const double scale = with_roots ? 1 / (root + sqrt(weights.left[p])) : root * share;
        __syncwarp();  // column p is there
        const double known = own == p ? scale : scale * x[0];
        const double along = own > p ? share * x[0] : known * root * share;
        if (own <= p) to.at(with_roots ? own : p, with_roots ? p + 1 : own) = known;
        x[0] = fma(-factor[1], along, own == p ? 0 : x[1]);
        pivot = __shfl_sync(0xffffffffu, x[0], (p + 1) % CHUNK);  // on its way while the others follow
        #pragma unroll
        for (int i = 2; i < ROWS; i++) x[i - 1] = fma(-factor[i], along, own == p ? 0 : x[i]);
        x[ROWS - 1] = 0;
    }
}
// L^-1 by one warp, (L + diag(left)^1/2)^-1 by another. A lane has a column in registers, from row p on: of what is left
// of L L^T, and once its own pivot has come of the inverse. Columns that rows are taken off by go through shared memory,
// two in turn.
__device__ __forceinline__ void invert_factor(const Room& room, const Weights& weights, double* factors,
                                              bool with_roots) {
    const int own = threadIdx.x % 32;
    double x[CHUNK];
    #pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = room.gram.at(i, own);
    double pivot = __shfl_sync(0xffffffffu, x[0], 0);
    take_pivots<CHUNK>(x, pivot, 0, CHUNK / 2, factors, weights, with_roots, room.inverses);
    take_pivots<CHUNK / 2>(x, pivot, CHUNK / 2, CHUNK, factors, weights, with_roots, room.inverses);
}

// B = L^-1 A or Y = (L + diag(left)^1/2)^-1 A, 16 columns by each warp.
__device__ __forceinline__ void find_factor(const Room& room, bool with_roots) {
    unsigned char* at = reinterpret_cast<unsigned char*>(room.Y.term[0].begin) + (with_roots ? 0 : PLACE);
    const Split<3, CHUNK, KEYS> to = split_of<3, CHUNK, KEYS>(at);
    const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2, column = 16 * warp_of();
    const double* const from = room.inverses.begin + with_roots;
    const int down = with_roots ? 1 : Pairs::stride, along = with_roots ? Pairs::stride : 1;
    const auto inverse = [&](int i, int j) {
        const double x = from[i * down + j * along];
        return j <= i ? x : 0;
    };
    #pragma unroll 1
    for (int half = 0; half < HALVES; half++) {
        const int row = 16 * half + line;
        double sums[2][4] = {};
        #pragma unroll 1
        for (int token = 0; token < 16 * half + 16; token += 8) {
            const int inner = token + pair;
            const double left[4] = {inverse(row, inner), inverse(row + 8, inner), inverse(row, inner + 1),
                                    inverse(row + 8, inner + 1)};
            #pragma unroll
            for (int n = 0; n < 2; n++) {
                const int other = column + 8 * n + line;
                const double right[2] = {in_double(room.A.at(inner, other)), in_double(room.A.at(inner + 1, other))};
                mma_f64(sums[n], left, right);
            }
        }
        Sum rounded[2];
        for (int n = 0; n < 2; n++)
            for (int i = 0; i < 4; i++) rounded[n].x[i] = float(sums[n][i]);
        store_two(to, rounded, 16 * half, column);
    }
}

// W = B R^T.
__device__ __forceinline__ void whiten_keys(const Room& room) {
    const int column = 16 * warp_of();
    Sum sums[HALVES][2] = {};
    #pragma unroll 1
    for (int inner = 0; inner < KEYS; inner += 16) {
        Right<bfloat16, 3> right[2];
        load_right_transposed(right, room.R, column, inner);
        #pragma unroll
        for (int half = 0; half < HALVES; half++) {
            Left<bfloat16, 3> left;
            load_left(left, room.B, 16 * half, inner);
            for (int n = 0; n < 2; n++) multiply(sums[half][n], left, right[n]);
        }
    }
    for (int half = 0; half < HALVES; half++) store_two(room.W, sums[half], 16 * half, column);
}

// R = (R - W^T Y) / left^1/2, 16 rows by each warp; what these add to the trace of R R^T. The factor is that of double
// precision: a factor that is rounded the same way chunk after chunk is an error that grows.
__device__ __forceinline__ double learn(const Room& room, double left) {
    const int row = 16 * warp_of();
    const double factor = 1 / sqrt(left);
    const float main = float(factor), rest = float(factor - main);
    float size = 0;
    #pragma unroll 1
    for (int column = 0; column < KEYS; column += 16) {
        Sum sums[2] = {};
        #pragma unroll
        for (int half = 0; half < HALVES; half++) {
            Left<bfloat16, 3> known;  // loaded anew: registers are for the solution
            Right<bfloat16, 3> right[2];
            load_left_transposed(known, room.W, 16 * half, row);
            load_right(right, room.Y, 16 * half, column);
            for (int n = 0; n < 2; n++) multiply(sums[n], known, right[n]);
        }
        #pragma unroll
        for (int n = 0; n < 2; n++)
            each_pair(sums[n], [&](int i, int j, float low, float high) {
                Long near, far;
                read_long(room.R, row + i, column + 8 * n + j, near, far);
                near.take_off(low), far.take_off(high);
                near.multiply(main, rest), far.multiply(main, rest);
                size = fmaf(near.x, near.x, fmaf(far.x, far.x, size));
                set_long(room.R, row + i, column + 8 * n + j, near, far);
            });
    }
    return over_warp(size);
}

// tril(Q W^T) by two warps.
__device__ __forceinline__ void score(const Room& room) {
    const Split<2, CHUNK, KEYS> W = shortened(room.W);
    #pragma unroll 1
    for (int task = warp_of() - WARPS; task < 3; task += 2) {
        const int row = task > 0 ? 16 : 0, column = task > 1 ? 16 : 0;
        Sum sums[2] = {};
        #pragma unroll 2
        for (int inner = 0; inner < KEYS; inner += 16) {
            Left<bfloat16, 1> left;
            Right<bfloat16, 2> right[2];
            load_left(left, room.q, row, inner);
            load_right_transposed(right, W, column, inner);
            for (int n = 0; n < 2; n++) multiply(sums[n], left, right[n]);
        }
        for (int n = 0; n < 2; n++)
            each(sums[n], [&](int i, int j, float& x) { x = column + 8 * n + j <= row + i ? x : 0; });
        store_two(room.scores, sums, row, column);
    }
}

// ---- the solution, transposed, 16 value columns by each warp -----------------------------------------------------------

typedef Sum Answers[CHUNK / 8];  // of 16 columns, 8 tokens each

struct Memory {
    Sum own[OCTETS];

    // own k and own q, for tokens in rows; the second to the digits of an answer.
    __device__ __forceinline__ void recall(Answers& keys, Answers& queries, const Room& room) const {
        #pragma unroll
        for (int n = 0; n < OCTETS; n += 2) {
            Left<bfloat16, 3> left;
            Left<bfloat16, 2> first;
            left_of(left, own[n], own[n + 1]);
            for (int i = 0; i < 8; i++) first.x[i / 4][i % 4] = left.x[i / 4][i % 4];
            #pragma unroll
            for (int half = 0; half < HALVES; half++) {
                Right<bfloat16, 1> right[2];
                load_right_transposed(right, room.k, 16 * half, 8 * n);
                for (int m = 0; m < 2; m++) multiply(keys[2 * half + m], left, right[m]);
                load_right_transposed(right, room.q, 16 * half, 8 * n);
                for (int m = 0; m < 2; m++) multiply(queries[2 * half + m], first, right[m]);
            }
        }
    }
    // S = S + W^T E.
    __device__ __forceinline__ void learn(const Answers& errors, const Split<3, CHUNK, KEYS>& W) {
        Left<bfloat16, 3> left[HALVES];
        for (int half = 0; half < HALVES; half++) left_of(left[half], errors[2 * half], errors[2 * half + 1]);
        #pragma unroll
        for (int n = 0; n < OCTETS; n += 2) {
            #pragma unroll
            for (int half = 0; half < HALVES; half++) {
                Right<bfloat16, 3> right[2];
                load_right(right, W, 16 * half, 8 * n);
                for (int m = 0; m < 2; m++) multiply(own[n + m], left[half], right[m]);
            }
        }
    }
};

// E = L^-1 (V - K S), of which the last is in `errors`, once L^-1 is there. What a tile needs is not beyond its own
// tokens, so the last one goes first.
__device__ __forceinline__ void whiten(Answers& errors, const Pairs& inverses) {
    #pragma unroll
    for (int half = HALVES - 1; half >= 0; half--) {
        Sum sums[2] = {};
        #pragma unroll
        for (int inner = 0; inner <= half; inner++) {
            Left<bfloat16, 3> left;
            Right<bfloat16, 3> right[2];
            __syncwarp();  // not all is loaded at once
            left_of(left, errors[2 * inner], errors[2 * inner + 1]);
            make_right(right, [&](int i, int j, int, bool) {
                const int token = 16 * half + j, other = 16 * inner + i;
                return other <= token ? float(inverses.at(token, other)) : 0;
            });
            for (int n = 0; n < 2; n++) multiply(sums[n], left, right[n]);
        }
        for (int n = 0; n < 2; n++) errors[2 * half + n] = sums[n];
    }
}

// What is missed at the tokens of a chunk, weighted, in the place of what is recalled; true where that is no number.
__device__ __forceinline__ bool find_errors(Answers& errors, const Room& room, const Weights& weights) {
    bool bad = false;
    #pragma unroll
    for (int half = 0; half < HALVES; half++) {
        Left<bfloat16, 1> values;
        load_left_transposed(values, room.v, 16 * half, 16 * warp_of());
        #pragma unroll
        for (int m = 0; m < 4; m++) {
            Sum& sum = errors[2 * half + m / 2];
            const int token = 16 * half + m / 2 * 8 + threadIdx.x % 4 * 2, i = m % 2 * 2;
            const unsigned both = values.x[0][m];
            const float near = weights.root[token], far = weights.root[token + 1];
            sum.x[i] = near != 0 ? near * (low_of<bfloat16>(both) - sum.x[i]) : 0;
            sum.x[i + 1] = far != 0 ? far * (high_of<bfloat16>(both) - sum.x[i + 1]) : 0;
            bad |= sum.x[i] - sum.x[i] != 0 || sum.x[i + 1] - sum.x[i + 1] != 0;
        }
    }
    return bad;
}
// O = Q S + tril(Q W^T) E, of which the first is in `answers`, to the array.
__device__ __forceinline__ void answer(Answers& answers, const Answers& errors, const Room& room, const Places& places,
                                       int low) {
    const int pair = threadIdx.x % 4 * 2, n = places.end - low, column = 16 * warp_of() + threadIdx.x % 32 / 4;
    const bool near = column < places.columns, far = column + 8 < places.columns;
    const Rows<data>& to = places.answer;
    data* at = &to.at(low + pair, places.first + column);
    #pragma unroll
    for (int half = 0; half < HALVES; half++) {
        for (int inner = 0; inner <= half; inner++) {
            Left<bfloat16, 2> left;
            Right<bfloat16, 2> right[2];
            left_of(left, errors[2 * inner], errors[2 * inner + 1]);
            load_right_transposed(right, room.scores, 16 * half, 16 * inner);
            for (int m = 0; m < 2; m++) multiply(answers[2 * half + m], left, right[m]);
        }
        #pragma unroll
        for (int m = 0; m < 2; m++, at += 7 * to.row)
            for (int i = 0; i < 2; i++, at += i < 2 ? to.row : 0) {
                if (16 * half + 8 * m + pair + i >= n) continue;
                if (near) put(at[0], answers[2 * half + m].x[i]);
                if (far) put(at[8 * to.column], answers[2 * half + m].x[i + 2]);
            }
    }
}

// ---- the walk ---------------------------------------------------------------------------------------------------------

// Whether a chunk has to be left to double precision, and what is known after it; by one warp.
__device__ __forceinline__ bool look(const Room& room, Shared& all, const Weights& weights, int n, double limit) {
    const int lane = threadIdx.x % 32;
    double size = 0;
    for (int i = 0; i < BLOCKS; i++) size += all.sizes[i];
    const double left = weights.left[lane], energy = all.energy[lane];
    const bool fits = left >= LEAST_LEFT && room.gram.at(lane, lane) <= MOST * left &&
                      size <= K * SLACK * largest_before(energy, limit) * left;
    const double learnt = over_warp(energy / left);
    const bool moves = lane < n && (left != 1 || energy != 0);
    if (__any_sync(0xffffffffu, moves) && lane == 0) all.moved = true;
    if (lane == 0) all.information = weights.left[CHUNK - 1] * (all.information + learnt);
    return !fits;
}

// R and S of a piece, as least_squares_begin.cu leaves them.
__device__ __forceinline__ void begin_piece(Memory& memory, const Room& room, Shared& all, const float* from) {
    if (threadIdx.x == 0) all.moved = from[1] != 0, all.information = from[2];
    if (warp_of() < BLOCKS) {
        float size = 0;
        #pragma unroll 1
        for (int i = threadIdx.x; i < KEYS * KEYS / 2; i += 32 * BLOCKS) {
            const float low = from[4 + 2 * i], high = from[5 + 2 * i];
            size = fmaf(low, low, fmaf(high, high, size));
            room.R.set_two(2 * i / KEYS, 2 * i % KEYS, low, high);
        }
        const double part = over_warp(size);
        if (threadIdx.x % 32 == 0) all.sizes[warp_of()] = part;
    }
    if (warp_of() >= WARPS) return;
    #pragma unroll
    for (int n = 0; n < OCTETS; n++)
        for (int i = 0; i < 4; i++) memory.own[n].x[i] = from[4 + KEYS * KEYS + (n * WORKERS + threadIdx.x) * 4 + i];
}

__device__ __forceinline__ void store(const Memory& memory, const Rows<gate>& to, int first, int columns) {
    const int column = first + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    gate* at = &to.at(pair, column);
    #pragma unroll
    for (int n = 0; n < OCTETS; n++, at += 8 * to.row)
        for (int i = 0; i < 4; i++)
            if (8 * n + pair + i % 2 < K && column + i / 2 * 8 < columns)
                at[i % 2 * to.row + i / 2 * 8 * to.column] = memory.own[n].x[i];
}

// P = R R^T, or as the caller gave it where nothing has moved; whether its condition is one that the caller's numbers hold.
__device__ __forceinline__ bool store_covariance(const Room& room, const Shared& all, const Rows<const gate>& given,
                                                 const Rows<gate>& to, double limit) {
    float norm = 0;
    #pragma unroll 1
    for (int task = warp_of(); task < BLOCKS * BLOCKS; task += WARPS + 2) {
        const int row = task / BLOCKS * 16, column = task % BLOCKS * 16;
        if (column > row) continue;
        Sum sums[2] = {};
        #pragma unroll 1
        for (int inner = 0; inner < KEYS; inner += 16) {
            Left<bfloat16, 3> left;
            Right<bfloat16, 3> right[2];
            load_left(left, room.R, row, inner);
            load_right_transposed(right, room.R, column, inner);
            for (int n = 0; n < 2; n++) multiply(sums[n], left, right[n]);
        }
        #pragma unroll
        for (int n = 0; n < 2; n++)
            each(sums[n], [&](int i, int j, float x) {
                i += row, j += column + 8 * n;
                if (j > i || i >= K) return;
                norm = fmaf(j < i ? 2 * x : x, x, norm);
                to.at(i, j) = all.moved ? x : given.at(i, j);
                if (j < i) to.at(j, i) = all.moved ? x : given.at(j, i);
            });
    }
    const double size = sqrt(over_block(norm));
    return !all.moved || 2 * size * all.information < limit;
}

extern "C" __global__ void __launch_bounds__(320, 1)
recursive_least_squares_tensor(const data* q, const data* k, const data* v, const gate* log_decay, const gate* beta,
                               const gate* P, gate* S_next, gate* P_next, data* o, float* begun, float* doubts,
                               const long long* table, int axes, int tokens, int columns, int length, int pieces,
                               int blocks, double limit) {
    __shared__ Shared all;
    __shared__ Places at;
    const Room room(dynamic_shared());
    const int warp = warp_of();
    const bool worker = warp < WARPS, keeper = warp < BLOCKS;  // of values, and of keys
    float* const from = begun + size_t(blockIdx.x) * BEGUN;
    if (threadIdx.x == 0) {
        const int which = blockIdx.x / blocks, piece = blockIdx.x % pieces;
        at.query = rows(q, table, axes, Q, which), at.key = rows(k, table, axes, KEY, which);
        at.value = rows(v, table, axes, V, which), at.answer = rows(o, table, axes, O, which);
        at.decay = rows(log_decay, table, axes, GATE, which), at.weight = rows(beta, table, axes, BETA, which);
        at.decays = log_decay != nullptr, at.weighted = beta != nullptr;
        at.begin = piece * length, at.end = min(tokens, (piece + 1) * length);
        at.first = blockIdx.x % blocks / pieces * VALUES, at.columns = min(columns, at.first + VALUES) - at.first;
        doubts[blockIdx.x] = from[0] == 0 ? REDO : 0;
    }
    if (from[0] == 0) return;
    Memory memory;
    begin_piece(memory, room, all, from);
    __syncthreads();  // places are known

    const auto bring = [&](const Tile<bfloat16, CHUNK, KEYS>& to, const Rows<const data>& rows, int low) {
        fetch<THREADS>(to, rows, low, 0, min(CHUNK, at.end - low), K, in_vectors(rows));
        close_copies();
    };
    const auto bring_values = [&](int low) {
        fetch<THREADS>(room.v, at.value, low, at.first, min(CHUNK, at.end - low), at.columns, in_vectors(at.value));
        close_copies();
    };
    bring(room.k, at.key, at.begin);
    bring(room.q, at.query, at.begin);
    bring_values(at.begin);
    if (warp == WARPS) load_weights(all.weights[at.begin / CHUNK % 2], at, at.begin);
    finish_copies<0>();
    __syncthreads();  // the first keys, their weights and R are there

    Answers errors = {}, answers;
    #pragma unroll 1
    for (int low = at.begin;; low += CHUNK) {
        const Weights& weights = all.weights[low / CHUNK % 2];
        if (low < at.end) {
            if (keeper) meet_keys(room, weights);
            if (!worker) find_energies(room, weights, all.energy);
            __syncthreads();  // A and energies are there, and nobody is left at Y
            if (worker) meet_pairs(room, weights);
            finish_copies<0>();
            __syncthreads();  // what is to be inverted and queries are there
        }
        bool doubt = false;
        if (worker) {
            if (low > at.begin) memory.learn(errors, room.W);  // of the chunk before
            if (low >= at.end) break;
            for (int i = 0; i < CHUNK / 8; i++) errors[i] = answers[i] = {};
            memory.recall(errors, answers, room);
            doubt = find_errors(errors, room, weights);
        } else {
            if (low >= at.end) break;
            if (warp == WARPS) doubt = look(room, all, weights, at.end - low, limit);
            invert_factor(room, weights, all.factors[warp - WARPS], warp > WARPS);
            memory = {};  // these warps have none, and need its registers
            for (int i = 0; i < CHUNK / 8; i++) errors[i] = answers[i] = {};
        }
        if (__syncthreads_or(doubt)) {  // inverses are there, and nobody is left at W, keys and values
            if (threadIdx.x == 0) doubts[blockIdx.x] = REDO;
            return;
        }

        bring(room.k, at.key, low + CHUNK);
        #pragma unroll 1
        for (int both = 0; both < 2 * keeper; both++) find_factor(room, both != 0);
        if (worker) whiten(errors, room.inverses);
        if (warp == WARPS) load_weights(all.weights[(low / CHUNK + 1) % 2], at, low + CHUNK);
        __syncthreads();  // B and Y are there, and nobody is left at inverses
        if (keeper) whiten_keys(room);
        __syncthreads();  // whitened keys are there, and nobody is left at B
        bring_values(low + CHUNK);
        if (keeper) {
            const double size = learn(room, weights.left[CHUNK - 1]);
            if (threadIdx.x % 32 == 0) all.sizes[warp] = size;
        }
        if (!worker) score(room);
        finish_copies<0>();
        __syncthreads();  // scores, R, the next keys and values are there
        if (worker) answer(answers, errors, room, at, low);
        bring(room.q, at.query, low + CHUNK);
    }
    finish_copies<0>();
    const int which = blockIdx.x / blocks;
    if (at.end < tokens) return;
    if (worker) store(memory, rows(S_next, table, axes, STATE_NEXT, which), at.first + 16 * warp, columns);
    if (at.first > 0) return;
    const Rows<const gate> given = rows(P, table, axes, COVARIANCE, which);
    const Rows<gate> to = rows(P_next, table, axes, COVARIANCE_NEXT, which);
    if (store_covariance(room, all, given, to, limit)) return;
    for (int i = threadIdx.x; i < KEYS * KEYS; i += THREADS) from[4 + i] = room.R.at(i % KEYS, i / KEYS);
    if (threadIdx.x == 0) from[2] = float(all.information), doubts[blockIdx.x] = CAP;
}
