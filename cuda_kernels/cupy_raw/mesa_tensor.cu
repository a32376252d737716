// Mesa layer by conjugate gradients on tensor cores, for data of bfloat16 and tolerances that single precision is enough
// for:  (H_t + diag(ridge)) x_t = q_t,  H_t = g_t H_{t-1} + beta_t k_t k_t^T, chunk by chunk:
//
//     H_t p_t = left_t H p_t + sum over j <= t of beta_j (decay from j to t) (p_t . k_j) k_j,
//
// with H at the start of the chunk. A warp has 16 tokens and all of their vectors: x in a place of its own in shared
// memory, the others in registers, so nobody waits for anybody until the tokens of a warp are solved. H is a float, in
// three terms of bfloat16, its upper triangle only.
//
// Steps take two terms of H and of their directions, and end where the residual that they carry along is below the
// tolerance. Then the residual is found anew, with three terms, whose error is no more than EPSILON |H + ridge| |x|;
// what it is too large for takes steps again, from there. A token whose tolerance is below that error, or which does not
// get on, is left to mesa_chunks.cu, in double precision, and so are numbers that are not finite: TO_DO in place of its
// residual says so. A token's steps depend on no other's.

enum { Q, KEY, GATE, BETA, RIDGE, STATE, STATE_NEXT, STARTS, X, RESIDUAL };
enum { OCTETS = KEYS / 8, ROUNDS = 4, TO_DO = -1 };
const float EPSILON = 1.0f / (1 << 22), FAINT = 1e-24f;

typedef Sum Line[OCTETS];

// What a block keeps in shared memory.
struct Room {
    Terms<BLOCKS * (BLOCKS + 1) / 2> gram;
    Keys k;
    struct alignas(16) Four {
        float x[4];
    };
    Four* solution;  // this thread's
    float* ridge;

    __device__ __forceinline__ explicit Room(unsigned char* at) {
        gram.begin = reinterpret_cast<data*>(at), at += decltype(gram)::bytes;
        k = tile_of<Keys>(at);
        solution = reinterpret_cast<Four*>(at) + threadIdx.x;
        ridge = reinterpret_cast<float*>(at + sizeof(Four) * OCTETS * THREADS);
    }
    __device__ __forceinline__ Four& x(int octet) const { return solution[octet * THREADS]; }

    // Where block (row, column) of H lies, for row <= column.
    static __device__ __forceinline__ int block(int row, int column) { return row * BLOCKS - row * (row + 1) / 2 + column; }
    template <int TERMS>
    __device__ __forceinline__ void load(Right<data, TERMS> (&right)[2], int row, int column) const {
        if (row <= column) gram.load<false>(right, block(row, column));
        else gram.load<true>(right, block(column, row));
    }
};

// Where the arrays of a block lie, in shared memory: registers are short.
struct Arrays {
    Source keys;
    Gates gates;
    Rows<const data> query;
    Rows<float> solution, residual;
};

// ---- a warp's tokens ------------------------------------------------------------------------------------------------

// The numbers of a Line: use(half, n, i).
template <class Use>
__device__ __forceinline__ void along_rows(Use use) {
    #pragma unroll
    for (int n = 0; n < OCTETS; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) use(i / 2, n, i);
}
// Sums over the four lanes that have a row.
__device__ __forceinline__ void over_lanes(float (&x)[2]) {
    for (float& one : x) {
        one += __shfl_xor_sync(0xffffffffu, one, 1);
        one += __shfl_xor_sync(0xffffffffu, one, 2);
    }
}
__device__ __forceinline__ bool any_of_row(bool any) {
    float found[2] = {any ? 1.0f : 0.0f, 0};
    over_lanes(found);
    return found[0] > 0;
}

// A direction, in registers: two terms of it are all that counts.
struct Direction {
    static constexpr bool at_hand = true;  // in registers, whose numbers are fixed
    Left<data, 2> x[BLOCKS];

    __device__ __forceinline__ const Left<data, 2>& matrix(int c) const { return x[c]; }
    __device__ __forceinline__ float number(int n, int i) const {
        const unsigned high = x[n / 2].x[0][i / 2 + n % 2 * 2], low = x[n / 2].x[1][i / 2 + n % 2 * 2];
        return half_of<data>(low, i % 2) + half_of<data>(high, i % 2);
    }
    // What was read of it is not kept in registers, which are short, until it is read again.
    __device__ __forceinline__ void forget() {
#ifdef __CUDACC_RTC__
        #pragma unroll
        for (Left<data, 2>& one : x)
            for (int i = 0; i < 4; i++) asm volatile("" : "+r"(one.x[0][i]), "+r"(one.x[1][i]));
#endif
    }
};
// A solution, in its place.
struct Solution {
    static constexpr bool at_hand = false;
    const Room& room;

    __device__ __forceinline__ Left<data, 3> matrix(int c) const {
        const Room::Four first = room.x(2 * c), second = room.x(2 * c + 1);
        Left<data, 3> left;
        left_of(left, Sum{first.x[0], first.x[1], first.x[2], first.x[3]},
                Sum{second.x[0], second.x[1], second.x[2], second.x[3]});
        return left;
    }
    __device__ __forceinline__ float number(int n, int i) const { return room.x(n).x[i]; }
    __device__ __forceinline__ void forget() const {}
};

// A p of every token. Of p, `matrix(c)` is 16 columns as a left matrix, `number(n, i)` one of its numbers.
template <int TERMS, class Vector>
__device__ __forceinline__ void apply(Line& product, Vector& p, const Room& room, const Chunk& all) {
    for (Sum& sum : product) sum = {};
    #pragma unroll (Vector::at_hand ? BLOCKS : 1)
    for (int c = 0; c < BLOCKS; c++) {
        const Left<data, TERMS> left = p.matrix(c);
        #pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
            Right<data, TERMS> right[2];
            room.load(right, c, n);
            for (int i = 0; i < 2; i++) add(product[2 * n + i], left, right[i]);
        }
    }
    const float left[2] = {all.left[token_of(0)], all.left[token_of(1)]};
    along_rows([&](int half, int n, int i) {
        float& x = product[n].x[i];
        x = fma(left[half], x, room.ridge[8 * n + column_of() + i % 2] * p.number(n, i));
    });
    p.forget();
    attend<TERMS>(product, p, room.k, room.k, all);
}

// Where the two tokens of a lane are.
struct Progress {
    float wanted[2], error[2], steepest[2];  // squares: of the residual asked for, of that, of the largest |A p| / |p|
    int steps[2];
    bool active[2], left[2];

    __device__ __forceinline__ bool any() const { return __any_sync(0xffffffffu, active[0] || active[1]); }
};

// Queries of n tokens from `low` on minus what is in the places of x, there, and the squares of it.
__device__ __forceinline__ void subtract(const Rows<const data>& query, float (&square)[2], const Room& room, int low,
                                         int n) {
    square[0] = square[1] = 0;
    #pragma unroll 4
    for (int octet = 0; octet < OCTETS; octet++) {
        Room::Four x = room.x(octet);
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = token_of(i / 2), column = 8 * octet + column_of() + i % 2;
            x.x[i] = (token < n && column < K ? widened(query.at(low + token, column)) : 0.0f) - x.x[i];
            square[i / 2] = fma(x.x[i], x.x[i], square[i / 2]);
        }
        room.x(octet) = x;
    }
    over_lanes(square);
}
// Numbers in registers and those in places change places.
__device__ __forceinline__ void swap(Line& line, const Room& room) {
    #pragma unroll
    for (int n = 0; n < OCTETS; n++) {
        const Room::Four x = room.x(n);
        room.x(n) = {line[n].x[0], line[n].x[1], line[n].x[2], line[n].x[3]};
        for (int i = 0; i < 4; i++) line[n].x[i] = x.x[i];
    }
}

// Of each row p.Ap, |p|^2 and |Ap|^2.
__device__ __forceinline__ void measure(float (&slope)[2], float (&size)[2], float (&image)[2], Direction& p,
                                        const Line& product) {
    along_rows([&](int half, int n, int i) {
        const float u = p.number(n, i), x = product[n].x[i];
        slope[half] = fma(u, x, slope[half]), size[half] = fma(u, u, size[half]), image[half] = fma(x, x, image[half]);
    });
    p.forget();
    over_lanes(slope), over_lanes(size), over_lanes(image);
}
// x and what is left of its right side after a step of so many p, and their squares; only rows that are active move.
__device__ __forceinline__ void move(Line& rest, float (&next)[2], float (&reached)[2], const float (&length)[2],
                                     Direction& p, const Line& product, const Progress& now, const Room& room) {
    #pragma unroll
    for (int n = 0; n < OCTETS; n++) {
        Room::Four x = room.x(n);
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int half = i / 2;
            x.x[i] = fma(length[half], p.number(n, i), x.x[i]);
            float& r = rest[n].x[i];
            if (now.active[half]) r = fma(-length[half], product[n].x[i], r);
            next[half] = fma(r, r, next[half]), reached[half] = fma(x.x[i], x.x[i], reached[half]);
        }
        room.x(n) = x;
    }
    p.forget();
    over_lanes(next), over_lanes(reached);
}
// p = rest + share p.
__device__ __forceinline__ void turn(Direction& p, const Line& rest, const float (&share)[2]) {
    #pragma unroll
    for (int c = 0; c < BLOCKS; c++) {
        Sum both[2];
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            const int n = 2 * c + i / 4;
            both[i / 4].x[i % 4] = fma(share[i % 4 / 2], p.number(n, i % 4), rest[n].x[i % 4]);
        }
        left_of(p.x[c], both[0], both[1]);
    }
}

// Steps from x on, whose residual is `rest`, until what they carry along of it says that they are done.
__device__ __forceinline__ void descend(Line& rest, Progress& now, const Room& room, const Chunk& all, int most) {
    Direction p = {};
    Line product;
    float share[2] = {};
    turn(p, rest, share);
    #pragma unroll 1
    while (now.any()) {
        apply<2>(product, p, room, all);
        float slope[2] = {}, size[2] = {}, image[2] = {}, length[2], next[2] = {}, reached[2] = {};
        measure(slope, size, image, p, product);
        for (int half = 0; half < 2; half++) length[half] = now.active[half] ? now.error[half] / slope[half] : 0;
        move(rest, next, reached, length, p, product, now, room);
        for (int half = 0; half < 2; half++) {
            share[half] = now.active[half] ? next[half] / now.error[half] : 0;
            if (!now.active[half]) continue;
            now.error[half] = next[half], now.steps[half]++;
            now.steepest[half] = fmaxf(now.steepest[half], image[half] / size[half]);
            now.left[half] = !(EPSILON * EPSILON * now.steepest[half] * reached[half] <= now.wanted[half]);
            now.active[half] = !now.left[half] && next[half] > now.wanted[half] && now.steps[half] < most;
        }
        turn(p, rest, share);
    }
}

// x of this warp's tokens, of which the chunk that begins at token `low` has n, from zero.
__device__ __forceinline__ void solve(Progress& now, const Arrays& at, int group, const Room& room, const Chunk& all,
                                      int low, int n, int most, float tolerance) {
    Line rest = {};
    bool open[2], there[2] = {};
    now = {};
    #pragma unroll
    for (int octet = 0; octet < OCTETS; octet++) room.x(octet) = {};
    subtract(at.query.of(group), now.error, room, low, n);
    swap(rest, room);
    along_rows([&](int half, int octet, int i) { there[half] |= rest[octet].x[i] != 0; });
    for (int half = 0; half < 2; half++) {  // squares must not be lost, nor too large
        const float start = now.error[half];
        now.left[half] = any_of_row(there[half]) && !(start >= FAINT && start * FAINT <= 1);
        now.active[half] = open[half] = start > 0 && !now.left[half];
        now.wanted[half] = tolerance * tolerance * start;
    }
    #pragma unroll 1
    for (int round = 0; round < ROUNDS && now.any(); round++) {
        float error[2];
        descend(rest, now, room, all, most);
        Solution x = {room};
        apply<3>(rest, x, room, all);
        swap(rest, room);
        subtract(at.query.of(group), error, room, low, n);
        swap(rest, room);
        for (int half = 0; half < 2; half++) {
            if (!open[half] || now.left[half]) continue;
            now.error[half] = error[half], open[half] = !(error[half] <= now.wanted[half]);
            now.active[half] = open[half] && now.steps[half] < most;
        }
    }
    for (int half = 0; half < 2; half++) now.left[half] |= open[half];
}

__device__ __forceinline__ void store(const Progress& now, const Rows<float>& to, const Rows<float>& residual,
                                      const Room& room, int low, int n, float tolerance) {
    #pragma unroll 1
    for (int octet = 0; octet < OCTETS; octet++) {
        const Room::Four x = room.x(octet);
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = token_of(i / 2), column = 8 * octet + column_of() + i % 2;
            if (token < n && column < K) (&to.at(low + token, 0))[column] = x.x[i];  // an array of ours has its rows dense
        }
    }
    for (int half = 0; half < 2; half++) {
        const float share = now.wanted[half] > 0 ? tolerance * sqrt(now.error[half] / now.wanted[half]) : 0;
        if (token_of(half) < n && threadIdx.x % 4 == 0)
            residual.at(low + token_of(half), 0) = now.left[half] ? float(TO_DO) : share;
    }
}

// ---- H --------------------------------------------------------------------------------------------------------------

// use(i, j) for all numbers of the tiles of its upper triangle, by all threads.
template <class Use>
__device__ __forceinline__ void each_of_gram(Use use) {
    #pragma unroll 1
    for (int at = threadIdx.x; at < KEYS * KEYS; at += THREADS)
        if (at / KEYS / 16 <= at % KEYS / 16) use(at / KEYS, at % KEYS);
}

// H = left H + the pairs of the chunk; long rows of tiles are paired with short ones.
__device__ __forceinline__ void learn(const Room& room, const Chunk& all) {
    #pragma unroll 1
    for (int turn = threadIdx.x / 32; turn < (BLOCKS + 1) / 2 * 2; turn += WARPS) {
        const int row = turn < (BLOCKS + 1) / 2 ? turn : BLOCKS - 1 - (turn - (BLOCKS + 1) / 2);
        if (BLOCKS % 2 && turn >= (BLOCKS + 1) / 2 && row == BLOCKS / 2) continue;  // the row in the middle is one
        Weighed left;
        load_weighed(left, room.k, all, 16 * row);
        #pragma unroll 1
        for (int column = row; column < BLOCKS; column++) {
            Sum sums[2] = {};
            multiply_pairs(sums, left, room.k, 16 * column);
            room.gram.update(Room::block(row, column), sums, all.left[CHUNK - 1]);
        }
    }
}

// H before a piece, from that before all pairs and what the earlier pieces add; and it is left to those who go on.
__device__ __forceinline__ void begin(const Room& room, const Rows<const gate>& from, const Rows<float>& to,
                                      const Sums& earlier, int piece) {
    each_of_gram([&](int i, int j) {
        const int row = min(i, j), column = max(i, j);
        float number = column < K ? from.at(row, column) : 0.0f;
        number = earlier.before(piece, number, row, column / PANEL, column % PANEL);
        room.gram.set(Room::block(i / 16, j / 16), i % 16, j % 16, number);
        if (i <= j && j < K) to.at(piece * K + i, j) = to.at(piece * K + j, i) = number;
    });
}

// Pairs of a chunk that begins at token `low`, and H as its first token finds it; how many tokens it has.
__device__ __forceinline__ int load_chunk(const Room& room, Chunk& all, const Arrays& at, int low, int end) {
    const int n = min(CHUNK, end - low);
    at.keys.bring(room.k, low, n, 0);
    close_copies();
    prefetch_rows(at.keys.rows, low + CHUNK, end, 0, K), prefetch_rows(at.query, low + CHUNK, end, 0, K);
    if (threadIdx.x < 32) find_decays(all, at.gates, low, n);
    finish_copies<0>();
    __syncthreads();  // pairs are there, and H is what the last chunk left
    if (at.gates.resets(low))
        each_of_gram([&](int i, int j) { room.gram.set(Room::block(i / 16, j / 16), i % 16, j % 16, 0); });
    return settle(all, n, room.k);
}

extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER)
mesa_tensor(const data* q, const data* k, const gate* log_decay, const gate* beta, const double* ridge, const gate* H,
            gate* H_next, float* starts, float* x, float* residual, const float* sums, const long long* table, int axes,
            int tokens, int length, int pieces, int panels, int groups, int blocks, int iterations, double tolerance) {
    __shared__ Chunk all;
    __shared__ Arrays at;
    const Room room(dynamic_shared());
    const int which = blockIdx.x / blocks, piece = blockIdx.x % blocks;
    if (threadIdx.x == 0)
        at = {source_of(rows(k, table, axes, KEY, which), K),
              Gates::of(log_decay, beta, table, axes, GATE, which),
              rows(q, table, axes, Q, which), rows(x, table, axes, X, which),
              rows(residual, table, axes, RESIDUAL, which)};
    const auto fixed = rows(ridge, table, axes, RIDGE, which);

    for (int i = threadIdx.x; i < KEYS; i += THREADS) room.ridge[i] = i < K ? float(fixed.at(0, i)) : 0.0f;
    begin(room, rows(H, table, axes, STATE, which), rows(starts, table, axes, STARTS, which),
          {sums + size_t(which) * (pieces - 1) * panels * Sums::size, panels}, piece);
    __syncthreads();  // arrays are known
    #pragma unroll 1
    for (int low = piece * length, end = min(tokens, low + length), n; low < end; low += n) {
        n = load_chunk(room, all, at, low, end);
        __syncthreads();  // what they weigh is there
        #pragma unroll 1
        for (int group = 0; group < groups; group++) {  // the queries that share this memory
            Progress now;
            solve(now, at, group, room, all, low, n, iterations, float(tolerance));
            store(now, at.solution.of(group), at.residual.of(group), room, low, n, float(tolerance));
        }
        __syncthreads();  // nobody is left at this H
        learn(room, all);
        __syncthreads();  // nobody is left at these pairs
    }
    if (piece < pieces - 1) return;
    const auto next = rows(H_next, table, axes, STATE_NEXT, which);
    each_of_gram([&](int i, int j) {
        const float number = room.gram.get(Room::block(i / 16, j / 16), i % 16, j % 16);
        if (i <= j && j < K) next.at(i, j) = next.at(j, i) = number;
    });
}
