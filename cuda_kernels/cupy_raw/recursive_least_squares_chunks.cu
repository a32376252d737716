// Recursive least squares, chunk by chunk. With S and P at the start of a chunk, and what is `left` at each of its tokens
// of the information there,
//
//     L L^T = diag(left) + K P K^T,    W = L^-1 K P,    E = L^-1 (V - K S),
//     O = Q S + tril(Q W^T) E,         S = S + W^T E,   P = (P - W^T W) / left:
//
// linear attention with whitened keys W and innovations E. P lies in shared memory and S, transposed, in registers; a
// block has one memory, up to 128 value columns and one piece of the sequence. A chunk ends early where a cap has to act
// on P, and around a pair that is not finite, because zero times NaN is NaN. `real` is double whatever the data: P is
// subtracted from, and its caps leave ten digits for that.
//
// A piece begins at the solution of all pairs before it: P = H^-1 and S = P G, of which pair_sums.cu has left the sums.
// That has no digits where some directions have faded long before others, of which P keeps track by its caps: such a
// piece walks over all tokens before it, too, and leaves their answers to others.

enum { Q, KEY, V, GATE, BETA, STATE, COVARIANCE, STATE_NEXT, COVARIANCE_NEXT, BAD, O };

// What a block keeps in shared memory.
struct Room {
    Square P;
    Columns W;  // transposed: K P at first
    Tokens k, q;
    Pairs pairs;  // diag(left) + K P K^T, then L^-1, then scores
    Weights& all;

    __device__ __forceinline__ Room(unsigned char* at, Weights& all) : all(all) {
        P.begin = reinterpret_cast<double*>(at);
        W.begin = P.begin + KEYS * Square::stride;
        pairs.begin = W.begin + KEYS * Columns::stride;
        k.begin = reinterpret_cast<float*>(pairs.begin + CHUNK * Pairs::stride);
        q.begin = k.begin + CHUNK * Tokens::stride;
    }
};

// What is known of all pairs so far.
struct Known {
    double information;  // trace of H; infinite once a cap has acted
    bool moved;          // whether anything was learnt or forgotten
};

// Where arrays lie, and where a piece begins. In shared memory, because registers are for the solution.
struct Places {
    PairArrays pairs;
    Rows<const data> query;
    Rows<data> answer;
    Rows<const gate> state, covariance;
    int begin, first;  // token that this block begins with, and the first of its piece
    Known known;       // before that token
};

// Rows of X become eigenvectors, as long as the eigenvalues. A function of its own, which is compiled once for both caps.
__device__ __noinline__ void find_eigenvectors(double* X) { orthogonalise(X, K); }

// No eigenvalue of P above `largest` or `ratio` times the smallest. X is K x K.
__device__ void cap(const Square& P, double* X, double largest, double ratio) {
    __shared__ double values[K];
    __syncthreads();  // P is there
    each_of_square(K, [&](int i, int j) { X[i * K + j] = P.at(i, j); });
    __syncthreads();  // its copy is there
    find_eigenvectors(X);
    for (int i = threadIdx.x / 32; i < K; i += WARPS) {
        const double length = sqrt(dot_of_warp(X + i * K, X + i * K, K));
        if (threadIdx.x % 32 == 0) values[i] = length;
    }
    __syncthreads();  // the smallest is among them
    double smallest = values[0];
    #pragma unroll 4
    for (int i = 1; i < K; i++) smallest = fmin(smallest, values[i]);
    largest = fmin(largest, ratio * smallest);
    __syncthreads();  // everyone has seen the values
    for (int i = threadIdx.x; i < K; i += THREADS) {
        const double value = values[i];
        values[i] = value > 0 ? fmin(value, largest) / value / value : 0;
    }
    __syncthreads();  // what is left of squares of eigenvectors is there
    each_of_square(K, [&](int i, int j) {
        const int row = max(i, j), column = min(i, j);  // to the last bit symmetric, see load_covariance
        double sum = 0;
        #pragma unroll 4
        for (int m = 0; m < K; m++) sum = fma(values[m] * X[m * K + row], X[m * K + column], sum);
        P.at(i, j) = sum;
    });
    __syncthreads();  // P is there
}

// ---- a chunk ----------------------------------------------------------------------------------------------------------

// W = (K P)^T, weighted.
__device__ __forceinline__ void meet_keys(const Room& room) {
    constexpr int tiles = KEYS > 64 ? CHUNK / 8 : CHUNK / 16, halves = CHUNK / 8 / tiles;
    #pragma unroll 1
    for (int task = threadIdx.x / 32; task < BLOCKS * halves; task += WARPS) {
        const int row = task / halves * 16, first = task % halves * 8 * tiles;
        Sum sums[tiles] = {};
        #pragma unroll 2
        for (int inner = 0; inner < KEYS; inner += 8) {
            const Left left = room.P.left(row, inner);
            #pragma unroll
            for (int tile = 0; tile < tiles; tile++) sums[tile].add(left, room.k.transposed(first + 8 * tile, inner));
        }
        for (int tile = 0; tile < tiles; tile++) {
            each(sums[tile], [&](int, int j, double& x) { x *= room.all.root[first + 8 * tile + j]; });
            room.W.store(sums[tile], row, first + 8 * tile);
        }
    }
}

// x W^T, one tile of it.
__device__ __forceinline__ Sum meet(const Tokens& x, const Columns& W, int row, int column) {
    Sum sums[2] = {};  // a product waits for the sum it is added to
    #pragma unroll 2
    for (int inner = 0; inner < KEYS; inner += 16)
        for (int n = 0; n < 2; n++) sums[n].add(x.left(row, inner + 8 * n), W.right(inner + 8 * n, column));
    for (int i = 0; i < 4; i++) sums[0].x[i] += sums[1].x[i];
    return sums[0];
}
__device__ __forceinline__ void meet_pairs(const Room& room) {
    #pragma unroll 1
    for (int task = threadIdx.x / 32; task < CHUNK / 16 * (CHUNK / 8); task += WARPS) {
        const int row = task / (CHUNK / 8) * 16, column = task % (CHUNK / 8) * 8;
        Sum sum = meet(room.k, room.W, row, column);
        each(sum, [&](int i, int j, double& x) {
            const int token = row + i;
            x = room.all.root[token] * x + (token == column + j ? room.all.left[token] : 0);
        });
        room.pairs.store(sum, row, column);
    }
}
__device__ __forceinline__ void score(const Room& room) {
    each_pair_tile([&](int row, int column) {
        Sum sum = meet(room.q, room.W, row, column);
        each(sum, [&](int i, int j, double& x) { x = column + j <= row + i ? x : 0; });
        room.pairs.store(sum, row, column);
    });
}

// L^-1 in the place of L L^T, by one warp. A lane has a column in registers, from row p on: of what is left of L L^T, and
// once its own pivot has come of L^-1, in units of its own until all rows are there. Columns that rows are taken off by go
// through shared memory, two in turn.
__device__ __forceinline__ void invert_factor(const Pairs& A, double* factors) {
    const int own = threadIdx.x % 32;
    double x[CHUNK], unit = 0;  // 1 / pivot of this lane's row
    #pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = A.at(i, own);
    double share = 1 / __shfl_sync(0xffffffffu, x[0], 0);  // 1 / the next pivot
    #pragma unroll 1
    for (int p = 0; p < CHUNK; p++) {
        double* const factor = factors + p % 2 * CHUNK;
        #pragma unroll
        for (int i = 0; i < CHUNK; i++)
            if (own == p) factor[i] = x[i];
        __syncwarp();  // column p is there
        const double along = own == p ? 0 : share * x[0];
        unit = own == p ? share : unit;
        A.at(p, own) = own < p ? x[0] : own == p ? -x[0] : 0;
        x[0] = fma(-factor[1], along, x[1]);
        const double next = __shfl_sync(0xffffffffu, x[0], (p + 1) % CHUNK);  // on its way while the others follow
        #pragma unroll
        for (int i = 2; i < CHUNK; i++) x[i - 1] = fma(-factor[i], along, x[i]);
        x[CHUNK - 1] = 0, share = 1 / next;
    }
    const double root = sqrt(unit);
    #pragma unroll 8
    for (int i = 0; i < CHUNK; i++) A.at(i, own) *= -unit * __shfl_sync(0xffffffffu, root, i);
}

// W = L^-1 W, transposed. What a tile needs is not beyond its own columns, so the last one goes first.
__device__ __forceinline__ void whiten(const Room& room) {
    #pragma unroll 1
    for (int row = threadIdx.x / 32 * 16; row < KEYS; row += 16 * WARPS)
        #pragma unroll
        for (int tile = CHUNK / 8 - 1; tile >= 0; tile--) {
            Sum sum = {};
            for (int inner = 0; inner <= tile; inner++)
                sum.add(room.W.left(row, 8 * inner), room.pairs.transposed(8 * tile, 8 * inner));
            __syncwarp();  // all lanes have read them
            room.W.store(sum, row, 8 * tile);
        }
}

// P = (P - W^T W) / left.
__device__ __forceinline__ void learn(const Room& room, double rest) {
    const int pair = threadIdx.x / 64, half = threadIdx.x / 32 % 2;
    #pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        const int block = turn ? WARPS - 1 - pair : pair, row = 16 * block;
        if (block >= BLOCKS) continue;
        Left known[CHUNK / 8];
        for (int n = 0; n < CHUNK / 8; n++) {
            known[n] = room.W.left(row, 8 * n);
            for (double& x : known[n].x) x = -x;
        }
        #pragma unroll 1
        for (int column = 8 * half; column < row + 16; column += 16) {
            Sum sum = room.P.sum(row, column);
            for (int n = 0; n < CHUNK / 8; n++) sum.add(known[n], room.W.transposed(column, 8 * n));
            for (double& x : sum.x) x *= rest;
            store_symmetric(room.P, sum, row, column);
        }
    }
}

// What the memory misses at the tokens of a chunk, weighted, in `errors`; a warp has columns from `first` on.
__device__ __forceinline__ void find_errors(Sum (&errors)[CHUNK / 8], const Memory& memory, const Room& room,
                                            const Rows<const data>& value, int low, int first, int columns) {
    memory.recall(errors, room.k);
    for (int tile = 0; tile < CHUNK / 8; tile++)
        each(errors[tile], [&](int i, int j, double& x) {
            const int token = 8 * tile + j, column = first + i;
            const double root = room.all.root[token];
            x = root != 0 && column < columns ? root * (double(widened(value.at(low + token, column))) - x) : 0;
        });
}
// E = L^-1 E, transposed, with the last tile first, as above.
__device__ __forceinline__ void whiten(Sum (&errors)[CHUNK / 8], const Pairs& inverse) {
    #pragma unroll
    for (int tile = CHUNK / 8 - 1; tile >= 0; tile--) {
        Sum sum = {};
        for (int inner = 0; inner <= tile; inner++)
            sum.add(errors[inner].left(), inverse.transposed(8 * tile, 8 * inner));
        errors[tile] = sum;
    }
}
// O = Q S + tril(Q W^T) E, of which the first is in `answers`, to the array; but not of tokens before `from`, which
// another block answers.
__device__ __forceinline__ void answer(Sum (&answers)[CHUNK / 8], const Sum (&errors)[CHUNK / 8], const Pairs& scores,
                                       const Rows<data>& to, int low, int from, int n, int first, int columns) {
    #pragma unroll
    for (int tile = 0; tile < CHUNK / 8; tile++) {
        for (int inner = 0; inner <= tile; inner++)
            answers[tile].add(errors[inner].left(), scores.transposed(8 * tile, 8 * inner));
        each(answers[tile], [&](int i, int j, double x) {
            const int token = 8 * tile + j, column = first + i;
            if (token >= from && token < n && column < columns) put(to.at(low + token, column), float(x));
        });
    }
}
// S = S + W^T E.
__device__ __forceinline__ void learn(Memory& memory, const Sum (&errors)[CHUNK / 8], const Columns& W) {
    #pragma unroll
    for (int m = 0; m < OCTETS; m++) {
        for (int inner = 0; inner < CHUNK / 8; inner++)
            memory.own[m].add(errors[inner].left(), W.transposed(8 * m, 8 * inner));
        if (m % 2) __syncwarp();  // what the next ones need is not loaded before
    }
}

// ---- the walk ---------------------------------------------------------------------------------------------------------

// The solution and P before a piece, from the sums of the pairs before it, where H has digits enough; whether it has. P is
// H = P^-1 before all pairs at first. The solution is as it was where there are not.
__device__ __forceinline__ bool begin_from_sums(const Kept& S, const Kept& G, const Room& room, Known& known,
                                                const Sums& earlier, int piece) {
    G.multiply(S, room.P);
    #pragma unroll 1
    for (int p = 0; p < piece; p++) {
        const Sums sum(earlier.begin, p);
        sum.add_to(G);
        __syncthreads();  // nobody is left at H
        sum.add_to(room.P);
    }
    __syncthreads();  // H is there
    known.information = trace(room.P);
    if (!(invert(room.P, room.W.begin) && trace(room.P) * known.information < SURE)) return false;
    S.multiply(G, room.P);
    return true;
}

// P and what is known before a piece, with the solution left in `own_room`; false if P is not a covariance. Where the sums
// of earlier pairs do not tell, a piece begins with the first of all tokens, and with P as the caller gave it. A function
// of its own, which takes no registers from the walk, and from the compiler half its time.
__device__ __noinline__ bool begin_piece(Weights& all, Places& at, Sums earlier, int piece, double* own_room, int first,
                                         int columns, double eps) {
    const Room room(dynamic_shared(), all);
    const bool even = load_covariance(room.P, at.covariance, eps), whole = finite(room.P);
    if (whole && !(even && invert(room.P, room.W.begin))) return false;
    const double information = trace(room.P);
    Known known = {information, !whole};
    for (int p = 0; p < piece; p++) known.moved |= Sums(earlier.begin, p).moved() != 0;
    const Kept S(own_room), G(own_room + ROOM);
    S.load(at.state, first, columns);
    const bool begun = known.moved && whole && begin_from_sums(S, G, room, known, earlier, piece);
    __syncthreads();  // nobody is left at H
    if (!begun) known.information = information, load_covariance(room.P, at.covariance, eps);
    each_of_square(K, [&](int i, int j) { if (!whole) room.P.at(i, j) = not_a_number(); });
    if (threadIdx.x == 0) at.known = known, at.begin = known.moved && whole && !begun ? 0 : at.first;
    __syncthreads();  // all of it is there
    return true;
}

// How many of n tokens make a chunk: it ends where a cap has to act on P, which acts here before the first one, and
// around a pair that is not finite. `known` becomes what is known after them.
__device__ __forceinline__ int cut_chunk(const Room& room, Known& known, const PairArrays& pairs, double* own_room,
                                         int low, int n, double limit) {
    const Weights& all = room.all;
    const int lane = threadIdx.x % 32;
    double size = trace(room.P) / K;
    const double most = largest_before(all.energy[0], limit) * all.left[0];
    if (size > SLACK * most && size < infinity()) {
        cap(room.P, own_room, most, infinity());
        size = trace(room.P) / K, known.information = infinity();
    }
    const bool crossed = lane > 0 && size > SLACK * largest_before(all.energy[lane], limit) * all.left[lane];
    const int count = tokens_together(all, pairs, low, n, crossed);
    const bool counts = lane < count;
    const double learnt = over_warp(counts ? all.energy[lane] / all.left[lane] : 0);
    known.information = all.left[count - 1] * (known.information + learnt);
    known.moved |= __any_sync(0xffffffffu, counts && (all.left[lane] != 1 || all.energy[lane] != 0));
    return count;
}

// Keys and weights of a chunk that begins at token `low`, and P as its first token finds it; how many tokens it has.
__device__ __forceinline__ int load_chunk(const Room& room, Known& known, const Places& at, int low, int end,
                                          int first_column, int columns, double* own_room, double limit) {
    const int n = min(CHUNK, end - low), last_column = min(columns, first_column + VALUES);
    load_pairs(room.k, room.all, at.pairs, low, n, first_column, columns);
    __syncthreads();  // keys and weights are there, and P is what the last chunk left
    const int count = cut_chunk(room, known, at.pairs, own_room, low, n, limit);
    if (count < n) shorten(room.k, room.all, count);
    prefetch_tokens(at.pairs.key, low + CHUNK, end, 0, K);
    prefetch_tokens(at.query, low + CHUNK, end, 0, K);
    prefetch_tokens(at.pairs.value, low + CHUNK, end, first_column, last_column);
    return count;
}

// E, and what S recalls to the first queries; whitened keys are in the place of W. With W, E and S come all answers.
__device__ __forceinline__ void innovate(Sum (&errors)[CHUNK / 8], Sum (&answers)[CHUNK / 8], const Memory& memory,
                                         const Room& room, const Places& at, int low, int n, int first, int columns) {
    load_rows(room.q, at.query.of(0), low, n);
    meet_keys(room);
    __syncthreads();  // K P is there
    meet_pairs(room);
    __syncthreads();  // what is to be inverted is there
    if (threadIdx.x < 32) invert_factor(room.pairs, room.all.factor);
    find_errors(errors, memory, room, at.pairs.value, low, first, columns);
    memory.recall(answers, room.q);
    __syncthreads();  // the inverse is there
    whiten(room);
    whiten(errors, room.pairs);
    __syncthreads();  // whitened keys are there, and nobody is left at the inverse
}
// The answers of all queries that share this memory; those of the first begin with what `answers` holds.
__device__ __forceinline__ void answer_all(Sum (&answers)[CHUNK / 8], const Sum (&errors)[CHUNK / 8],
                                           const Memory& memory, const Room& room, const Places& at, int low, int n,
                                           int groups, int first, int columns) {
    #pragma unroll 1
    for (int group = 0; group < groups; group++) {  // the queries that share this memory
        if (GROUPED && group) {
            load_rows(room.q, at.query.of(group), low, n);
            __syncthreads();  // these queries are there
            for (Sum& sum : answers) sum = {};
            memory.recall(answers, room.q);
        }
        score(room);
        __syncthreads();  // scores are there
        answer(answers, errors, room.pairs, at.answer.of(group), low, at.first - low, n, first, columns);
    }
}

// P as the caller gets it: capped; or as the caller gave it, where nothing has moved.
__device__ __forceinline__ void store_covariance(const Square& P, const Known& known, const Rows<const gate>& given,
                                                 const Rows<gate>& to, double* own_room, double limit) {
    double norm = 0;
    each_of_square(K, [&](int i, int j) { norm = fma(P.at(i, j), P.at(i, j), norm); });
    norm = sqrt(over_block(norm));
    if (known.moved && norm < infinity() && !(2 * norm * known.information < limit)) cap(P, own_room, infinity(), limit);
    each_of_square(K, [&](int i, int j) { to.at(i, j) = known.moved ? gate(P.at(i, j)) : given.at(i, j); });
}

// What is left of this memory to do.
__device__ __forceinline__ float left_to_do(const float* doubts, int blocks) {
    float most = 0;
    for (int i = 0; i < blocks; i++) most = fmaxf(most, doubts[blockIdx.x / blocks * blocks + i]);
    return most;
}
// P = R R^T, of R transposed.
__device__ __forceinline__ void multiply_root(const Square& P, const float* root) {
    each_of_square(K, [&](int i, int j) {
        double sum = 0;
        #pragma unroll 4
        for (int m = 0; m < K; m++) sum = fma(double(root[m * KEYS + i]), double(root[m * KEYS + j]), sum);
        P.at(i, j) = sum;
    });
}

extern "C" __global__ void __launch_bounds__(256, 1)
recursive_least_squares_chunks(const data* q, const data* k, const data* v, const gate* log_decay, const gate* beta,
                               const gate* S, const gate* P, gate* S_end, gate* P_end, bool* bad_next, data* answers,
                               float* sums, float* rooms, float* begun, float* doubts, const long long* table, int axes,
                               int tokens, int columns, int length, int pieces, int groups, int blocks,
                               double limit, double eps) {
    const float doubt = doubts ? left_to_do(doubts, blocks) : REDO;
    if (doubt == 0) return;
    __shared__ Weights all;
    __shared__ Places at;
    const Room room(dynamic_shared(), all);
    const int which = blockIdx.x / blocks, column_block = blockIdx.x % blocks / pieces, piece = blockIdx.x % pieces;
    const int warp = threadIdx.x / 32, first = column_block * VALUES + 16 * warp;
    if (threadIdx.x == 0) {
        at.query = rows(q, table, axes, Q, which), at.answer = rows(answers, table, axes, O, which);
        at.pairs = pairs_of(k, v, log_decay, beta, table, axes, KEY, which);
        at.state = rows(S, table, axes, STATE, which), at.covariance = rows(P, table, axes, COVARIANCE, which);
        at.first = piece * length;
    }
    double* const own_room = reinterpret_cast<double*>(rooms) + size_t(blockIdx.x) * 2 * ROOM;
    const Sums earlier(reinterpret_cast<double*>(sums), size_t(blockIdx.x / pieces) * (pieces - 1));
    __syncthreads();  // places are known

    Memory memory;
    Known known = {0, true};
    if (doubt == REDO) {
        if (!begin_piece(all, at, earlier, piece, own_room, first, columns, eps)) {
            if (threadIdx.x == 0 && piece == 0) rows(bad_next, table, axes, BAD, which).at(0, 0) = true;
            return;
        }
        Kept(own_room).take_to(memory);
        known = at.known;

        #pragma unroll 1
        for (int low = at.begin, end = min(tokens, (piece + 1) * length), n; low < end; low += n) {
            n = load_chunk(room, known, at, low, end, column_block * VALUES, columns, own_room, limit);
            const double left = all.left[n - 1];
            Sum errors[CHUNK / 8] = {}, answers[CHUNK / 8] = {};
            innovate(errors, answers, memory, room, at, low, n, first, columns);
            answer_all(answers, errors, memory, room, at, low, n, groups, first, columns);
            learn(memory, errors, room.W);
            learn(room, 1 / left);
        }
    } else if (piece == pieces - 1 && column_block == 0) {
        const float* const root = begun + size_t(blockIdx.x) * BEGUN;
        multiply_root(room.P, root + 4), known.information = root[2];
    }

    if (piece < pieces - 1) return;
    if (doubt == REDO) memory.store(rows(S_end, table, axes, STATE_NEXT, which), first, columns);
    if (column_block > 0) return;
    __syncthreads();  // P is there
    store_covariance(room.P, known, at.covariance, rows(P_end, table, axes, COVARIANCE_NEXT, which), own_room, limit);
}
