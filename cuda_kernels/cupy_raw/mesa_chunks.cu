// Mesa layer, the solutions of a chunk at once:  (H_t + diag(ridge)) x_t = q_t,  H_t = g_t H_{t-1} + beta_t k_t k_t^T, by
// conjugate gradients whose products are those of linear attention with p as the queries,
//
//     H_t p_t = left_t H p_t + sum over j <= t of beta_j (decay from j to t) (p_t . k_j) k_j,
//
// with H at the start of the chunk. A block walks over one piece of one sequence with H in shared memory; of the vectors
// of a token a warp has 16 numbers, in registers. All in double precision.
//
// EXACT: until nothing is left to solve, and never where an eigenvalue may be lost in the rounding of the caller's
// numbers. FALLBACK: a chunk that is not done in so many steps is solved token by token. REST: of tokens that
// mesa_tensor.cu has left, which has gone the same way and says where H was at the start of each piece.

enum { Q, KEY, V, GATE, BETA, RIDGE, STATE, STATE_NEXT, WORST, X, STARTS, RESIDUAL };

constexpr int HALVES = KEYS > 64 ? 1 : 2, OWN = CHUNK / 8 / HALVES;  // tiles of 8 tokens that a warp has

typedef Panel<double, KEYS + 8> Vectors64;  // tokens x keys

// What a block keeps in shared memory.
struct Room {
    Square H;
    Vectors64 p;
    Tokens k;
    Pairs scores, decays;  // decays: from a token to a later one, times the weight of the first
    double* partial;       // of a sum over keys: BLOCKS x CHUNK
    double* ridge;

    __device__ __forceinline__ explicit Room(unsigned char* at) {
        H.begin = reinterpret_cast<double*>(at);
        p.begin = H.begin + KEYS * Square::stride;
        scores.begin = p.begin + CHUNK * Vectors64::stride;
        decays.begin = scores.begin + CHUNK * Pairs::stride;
        partial = decays.begin + CHUNK * Pairs::stride;
        ridge = partial + BLOCKS * CHUNK;
        k.begin = reinterpret_cast<float*>(ridge + KEYS);
    }
};

// Of each token, where its solution is.
struct Progress {
    double start[CHUNK], error[CHUNK], along[CHUNK], share[CHUNK];
    double rest[CHUNK];  // of the right side, once all is done
    int todo[CHUNK], going;
};

// The keys and the tokens of which this warp has vectors.
struct Part {
    int block = threadIdx.x / 32 / HALVES, first = threadIdx.x / 32 % HALVES * 8 * OWN;

    __device__ __forceinline__ bool there() const { return block < BLOCKS; }
    // use(key, token, number of the tile, place in it)
    template <class Use>
    __device__ __forceinline__ void each(Use use) const {
        const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        #pragma unroll
        for (int tile = 0; tile < OWN; tile++)
            #pragma unroll
            for (int i = 0; i < 4; i++) use(16 * block + line + i / 2 * 8, first + 8 * tile + pair + i % 2, tile, i);
    }
    // a . b of each token, as far as this warp has it.
    __device__ __forceinline__ void leave_dots(const Room& room, const Sum (&a)[OWN], const Sum (&b)[OWN]) const {
        #pragma unroll
        for (int tile = 0; tile < OWN && there(); tile++)
            for (int i = 0; i < 2; i++) {
                double sum = fma(a[tile].x[i], b[tile].x[i], a[tile].x[i + 2] * b[tile].x[i + 2]);
                for (int distance = 4; distance < 32; distance *= 2)
                    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
                const int lane = threadIdx.x % 32;
                if (lane < 4) room.partial[block * CHUNK + first + 8 * tile + 2 * lane + i] = sum;
            }
    }
};
// The whole of it, by a lane for its token.
__device__ __forceinline__ double dot_of_token(const Room& room, int token) {
    double sum = 0;
    for (int block = 0; block < BLOCKS; block++) sum += room.partial[block * CHUNK + token];
    return sum;
}

// What is left of each key at each later token.
__device__ __forceinline__ void find_decays(const Room& room, const Weights& all) {
    #pragma unroll 1
    for (int n = threadIdx.x; n < CHUNK * CHUNK; n += THREADS) {
        const int i = n / CHUNK, j = n % CHUNK;
        room.decays.at(i, j) = j <= i ? all.root[j] * all.root[j] * exp(all.decay[i] - all.decay[j]) : 0;
    }
}

// A p of every token, for p in shared memory and this warp's part of it in registers.
__device__ __forceinline__ void apply(Sum (&product)[OWN], const Sum (&p)[OWN], const Room& room, const Weights& all,
                                      const Part& part) {
    each_pair_tile([&](int row, int column) {
        Sum sums[2] = {};  // a product waits for the sum it is added to
        #pragma unroll 2
        for (int inner = 0; inner < KEYS; inner += 16)
            for (int n = 0; n < 2; n++)
                sums[n].add(room.p.left(row, inner + 8 * n), room.k.transposed(column, inner + 8 * n));
        const Sum decays = room.decays.sum(row, column);
        for (int i = 0; i < 4; i++) sums[0].x[i] = decays.x[i] * (sums[0].x[i] + sums[1].x[i]);
        room.scores.store(sums[0], row, column);
    });
    for (Sum& sum : product) sum = {};
    #pragma unroll 2
    for (int inner = 0; inner < KEYS && part.there(); inner += 8) {
        const Left left = room.H.left(16 * part.block, inner);
        #pragma unroll
        for (int tile = 0; tile < OWN; tile++) product[tile].add(left, room.p.transposed(part.first + 8 * tile, inner));
    }
    part.each([&](int key, int token, int tile, int i) {
        double& x = product[tile].x[i];
        if (part.there()) x = all.left[token] * x + room.ridge[key] * p[tile].x[i];
    });
    __syncthreads();  // scores are there
    #pragma unroll 1
    for (int inner = 0; inner < CHUNK && part.there(); inner += 8) {
        const Left left = left_of_columns(room.k, 16 * part.block, inner);
        #pragma unroll
        for (int tile = 0; tile < OWN; tile++)
            if (inner <= part.first + 8 * tile) product[tile].add(left, room.scores.transposed(part.first + 8 * tile, inner));
    }
}

// x from zero; r is q at first. Whether a token is not done; `progress` tells what is left.
__device__ __forceinline__ bool descend(Sum (&x)[OWN], Sum (&r)[OWN], const Room& room, const Weights& all,
                                        const Part& part, Progress& now, int most, double tolerance) {
    Sum p[OWN], product[OWN];
    for (int tile = 0; tile < OWN; tile++) p[tile] = r[tile], x[tile] = {};
    const auto is_open = [&](int token, int step) {
        return now.error[token] > tolerance * tolerance * now.start[token] && step < most;
    };
    const int token = threadIdx.x;  // of the first warp
    #pragma unroll 1
    for (int step = 0;; step++) {  // none at first
        if (step) {
            part.each([&](int key, int token, int tile, int i) {
                if (part.there()) room.p.at(token, key) = p[tile].x[i];
            });
            __syncthreads();  // p is there
            apply(product, p, room, all, part);
            part.leave_dots(room, p, product);
            __syncthreads();  // all parts are there
            if (token < CHUNK) now.along[token] = now.todo[token] ? ratio(now.error[token], dot_of_token(room, token)) : 0;
            __syncthreads();  // lengths of steps are there
            part.each([&](int, int token, int tile, int i) {
                x[tile].x[i] = fma(now.along[token], p[tile].x[i], x[tile].x[i]);
                r[tile].x[i] = fma(-now.along[token], product[tile].x[i], r[tile].x[i]);
            });
        }
        part.leave_dots(room, r, r);
        __syncthreads();  // all parts are there
        if (token < CHUNK) {
            const double before = step ? now.error[token] : 0;
            const double error = step == 0 || now.todo[token] ? dot_of_token(room, token) : before;
            if (step == 0) now.start[token] = error;
            now.share[token] = ratio(error, before), now.error[token] = error;
            now.todo[token] = is_open(token, step);
            const int any = __any_sync(0xffffffffu, now.todo[token]);
            if (token == 0) now.going = any;
        }
        __syncthreads();  // everyone knows what is left
        if (!now.going) break;
        part.each([&](int, int token, int tile, int i) {
            if (step) p[tile].x[i] = fma(now.share[token], p[tile].x[i], r[tile].x[i]);
        });
    }
    if (token < CHUNK) now.rest[token] = sqrt(ratio(now.error[token], now.start[token]));
    __syncthreads();  // what is left of each is there
    const int lane = threadIdx.x % 32;
    return __any_sync(0xffffffffu, now.error[lane] > tolerance * tolerance * now.start[lane]);
}

// Whether no eigenvalue of any token's matrix can be lost in rounding: see mesa_exact.cuh.
__device__ bool all_safe(const Room& room, const Weights& all, double eps) {
    double lost = 0;
    for (int key = threadIdx.x; key < K; key += THREADS) {
        double most = 0, sum = 0;
        for (int j = 0; j < CHUNK; j++) {
            const double x = room.k.at(j, key);
            sum = fma(all.root[j] * all.root[j] * x, x, sum), most = fmax(most, all.decay[j]);
        }
        const double ridge = room.ridge[key];
        lost += most > 0 || !(ridge >= K * K * eps * (room.H.at(key, key) + sum + ridge)) || ridge == 0;
    }
    return over_block(lost) == 0;
}

// H = left H + the pairs of the chunk.
__device__ __forceinline__ void learn_chunk(const Room& room, const Weights& all) {
    each_tile<1>([&](int, int row, int column) {
        Sum sum = room.H.sum(row, column);
        for (double& x : sum.x) x *= all.left[CHUNK - 1];
        #pragma unroll 1
        for (int token = 0; token < CHUNK; token += 8) {
            Right right = room.k.right(token, column);
            for (int i = 0; i < 2; i++) right.x[i] *= room.decays.at(CHUNK - 1, token + threadIdx.x % 4 * 2 + i);
            sum.add(left_of_columns(room.k, row, token), right);
        }
        store_symmetric(room.H, sum, row, column);
    });
}

// H before a piece, from that before all pairs and what the earlier pieces add.
__device__ __forceinline__ void load_gram(const Room& room, const Rows<const gate>& from, double* sums, size_t first,
                                          int piece) {
    each_of_square(KEYS, [&](int i, int j) { room.H.at(i, j) = i < K && j < K ? double(from.at(i, j)) : 0; });
    #pragma unroll 1
    for (int p = 0; p < piece; p++) {
        __syncthreads();  // H is there
        Sums(sums, first + p).add_to(room.H);
    }
}

// Keys and weights of a chunk that begins at token `low`, and H as its first token finds it; how many tokens it has.
__device__ __forceinline__ int load_chunk(const Room& room, Weights& all, const PairArrays& pairs, int low, int end) {
    const int n = min(CHUNK, end - low);
    if (pairs.resets(low)) each_of_square(KEYS, [&](int i, int j) { room.H.at(i, j) = 0; });
    load_pairs(room.k, all, pairs, low, n, 0, 0);
    prefetch_tokens(pairs.key, low + CHUNK, end, 0, K);
    __syncthreads();  // keys and weights are there, and H is what the last chunk left
    const int count = tokens_together(all, pairs, low, n, false);
    if (count < n) shorten(room.k, all, count);
    return count;
}

// Whether the solution of a token is asked for.
__device__ __forceinline__ bool asked(const Rows<const float>& residual, int token) {
    return !REST || residual.at(token, 0) < 0;
}
// Whether that of one of n tokens is, the same for all threads.
__device__ __forceinline__ bool any_asked(const Rows<const float>& residual, int low, int n, int groups) {
    bool any = false;
    for (int i = threadIdx.x; i < n * groups; i += THREADS) any |= asked(residual.of(i % groups), low + i / groups);
    return __syncthreads_or(any);
}

// The solutions of the first n tokens of a chunk at once; whether one of them is not done.
__device__ __forceinline__ bool solve_together(const Rows<const data>& query, const Rows<answer>& solution,
                                               const Rows<const float>& residual, const Room& room, const Weights& all,
                                               const Part& part, Progress& now, int low, int n, int most,
                                               double tolerance) {
    Sum own[OWN], rest[OWN];
    part.each([&](int key, int token, int tile, int i) {
        const bool there = part.there() && key < K && token < n;
        rest[tile].x[i] = there ? double(widened(query.at(low + token, key))) : 0;
    });
    const bool open = descend(own, rest, room, all, part, now, most, tolerance);
    part.each([&](int key, int token, int tile, int i) {
        const double left = now.rest[token];
        if (part.there() && key < K && token < n && asked(residual, low + token))
            solution.at(low + token, key) = answer(left - left == 0 ? own[tile].x[i] : not_a_number());
    });
    return open;
}
// The largest residual among them.
__device__ __forceinline__ double worst_of(const Progress& now, const Rows<const float>& residual, int low, int n) {
    double worst = 0;
    for (int token = 0; token < n; token++)
        if (asked(residual, low + token)) worst = fmax(worst, now.rest[token]);
    return worst;
}

// The same, token by token, as mesa_exact.cu does it. `own` has room for H and for what solves with it.
__device__ __forceinline__ void solve_one_by_one(const Rows<const data>& query, const Rows<answer>& solution,
                                                 const Rows<const float>& residual, const PairArrays& pairs,
                                                 const Room& room, double* own, Vectors& alone, int low, int n, int groups,
                                                 bool unbound, double eps) {
    double *const H = own, *const solver = own + K * K;
    each_of_square(K, [&](int i, int j) { H[i * K + j] = room.H.at(i, j); });
    for (int p = threadIdx.x; p < K; p += THREADS) alone.ridge[p] = room.ridge[p];
    #pragma unroll 1
    for (int t = low; t < low + n; t++) {
        stage_key(alone.key, pairs.key, pairs.weight, pairs.weighted, t);
        __syncthreads();  // the key is there
        learn(H, alone.key, decay_of(pairs.decay, pairs.decays, t));
        const bool factored = factorise(solver, H, alone, unbound, eps);
        #pragma unroll 1
        for (int group = 0; group < groups; group++) {
            for (int p = threadIdx.x; p < K; p += THREADS) alone.right[p] = widened(query.of(group).at(t, p));
            solve(solver, alone, factored);
            for (int p = threadIdx.x; p < K && asked(residual.of(group), t); p += THREADS)
                solution.of(group).at(t, p) = answer(alone.x[p]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 1)
mesa_chunks(const data* q, const data* k, const data* v, const gate* log_decay, const gate* beta, const real* ridge,
            const gate* H, gate* H_next, real* worst_of_all, answer* x, const float* starts, const float* residual,
            float* sums, float* rooms, const long long* table, int axes, int tokens, int column_blocks, int length,
            int pieces, int groups, int blocks, int iterations, double tolerance, double eps) {
    __shared__ Weights all;
    __shared__ Progress now;
    __shared__ PairArrays pairs;
    __shared__ Vectors alone;
    const Room room(dynamic_shared());
    const Part part;
    const int which = blockIdx.x / blocks, piece = blockIdx.x % blocks;
    const auto query = rows(q, table, axes, Q, which);
    const auto solution = rows(x, table, axes, X, which);
    const auto residuals = rows(residual, table, axes, RESIDUAL, which);
    const auto fixed = rows(ridge, table, axes, RIDGE, which);
    double* const own_room = reinterpret_cast<double*>(rooms) + size_t(blockIdx.x) * 2 * K * K;
    double worst = 0;

    if (REST && !any_asked(residuals, piece * length, min(length, tokens - piece * length), groups)) return;
    if (threadIdx.x == 0) pairs = pairs_of(k, v, log_decay, beta, table, axes, KEY, which);
    for (int i = threadIdx.x; i < KEYS; i += THREADS) room.ridge[i] = i < K ? double(fixed.at(0, i)) : 1;
    if (REST) {
        const auto start = rows(starts, table, axes, STARTS, which);
        each_of_square(KEYS, [&](int i, int j) { room.H.at(i, j) = i < K && j < K ? start.at(piece * K + i, j) : 0.0f; });
    } else {
        load_gram(room, rows(H, table, axes, STATE, which), reinterpret_cast<double*>(sums),
                  size_t(which) * column_blocks * (pieces - 1), piece);
    }
    __syncthreads();  // places are known
    bool unbound = false;
    #pragma unroll 4
    for (int i = 0; i < K; i++) unbound |= room.ridge[i] == 0;

    #pragma unroll 1
    for (int low = piece * length, end = min(tokens, low + length), n; low < end; low += n) {
        n = load_chunk(room, all, pairs, low, end);
        prefetch_tokens(query, low + CHUNK, end, 0, K);
        find_decays(room, all);
        const bool wanted = !REST || any_asked(residuals, low, n, groups);
        bool solved = !EXACT || all_safe(room, all, eps);
        #pragma unroll 1
        for (int group = 0; group < groups && solved && wanted; group++) {  // the queries that share this memory
            const auto left = residuals.of(group);
            const bool open = solve_together(query.of(group), solution.of(group), left, room, all, part, now, low, n,
                                             iterations, tolerance);
            solved = !(FALLBACK && open);
            if (solved) worst = fmax(worst, worst_of(now, left, low, n));
        }
        if (FALLBACK && !solved)
            solve_one_by_one(query, solution, residuals, pairs, room, own_room, alone, low, n, groups, unbound, eps);
        learn_chunk(room, all);
        __syncthreads();  // nobody is left at these pairs
    }
    if (threadIdx.x == 0) {
        const auto report = rows(worst_of_all, table, axes, WORST, which);
        report.at(piece, 0) = worst, report.at(piece, 1) = iterations;
    }
    if (REST || piece < pieces - 1) return;
    const auto state_next = rows(H_next, table, axes, STATE_NEXT, which);
    each_of_square(K, [&](int i, int j) { state_next.at(i, j) = gate(room.H.at(i, j)); });
}
