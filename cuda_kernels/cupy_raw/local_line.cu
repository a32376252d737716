// Local linear regression in many channels, by conjugate gradients:  o = vbar + Cvk x,  (Ckk + ridge I) x = q - kbar.
// A product with the covariance passes over the keys, so that it is never formed.
//
// A warp has one query and some value columns: lanes share pairs, then channels.

enum { Q, KEY, V, POSITION, COUNT, LEFT, GATE, O, RESIDUAL };

extern "C" __global__ void __launch_bounds__(32)
local_line(const data* q, const stored* k, const stored* v, const long long* position, const long long* count,
           const logs* left, const logs* log_decay, data* o, real* residual, const long long* table, int axes,
           int tokens, int columns, int pairs, int cached, int groups, int blocks, int parts, int causal, int window,
           int kind, int steps, real width, real ridge, real tolerance) {
    __shared__ real query[D], centre[D], mean[COLUMNS], weights[32];
    __shared__ real x[D], r[D], u[D], y[D], gained[COLUMNS];

    const int memory = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;  // the longest pasts come first
    const int row = block / parts, step = row / groups, group = row % groups, low = block % parts * COLUMNS;
    const int lane = threadIdx.x;
    const auto asked = rows(q, table, axes, Q, memory).of(group);
    Neighbours near{{rows(position, table, axes, POSITION, memory), rows(count, table, axes, COUNT, memory),
                     rows(log_decay, table, axes, GATE, memory), rows(left, table, axes, LEFT, memory),
                     position != nullptr, count != nullptr, log_decay != nullptr, cached, pairs, tokens, window, 0},
                    rows(k, table, axes, KEY, memory), rows(v, table, axes, V, memory), query, weights, kind};
    near.width = width;
    look(near, step, causal);
    #pragma unroll 1
    for (int c = lane; c < D; c += 32) query[c] = widened(asked.at(step, c));
    __syncthreads();  // the query is there
    real top, weight, square = 0;
    near.average(mean, centre, low, columns, top, weight);
    #pragma unroll 1
    for (int c = lane; c < D; c += 32) {
        x[c] = 0, r[c] = u[c] = query[c] - centre[c];
        square = fma(r[c], r[c], square);
    }
    square = over_row(square);
    const real first = square;

    #pragma unroll 1
    for (int turn = 0;; turn++) {  // the last one multiplies values by x
        const bool done = turn == steps || !(square > tolerance * tolerance * first);
        const real* along = done ? x : u;
        #pragma unroll 1
        for (int c = lane; c < D; c += 32) y[c] = ridge * u[c];
        #pragma unroll 1
        for (int c = lane; c < COLUMNS; c += 32) gained[c] = 0;
        __syncthreads();  // the vector is there
        double since = 0;
        #pragma unroll 1
        for (int tile = near.newest; tile >= near.lowest; tile--) {
            const real root = root_of(near.logit(tile, since), top, weight);
            real total = 0;
            if (root != 0) {
                #pragma unroll 2
                for (int c = 0; c < D; c++)
                    total = fma(along[c], widened(near.key.at(tile * 32 + lane, c)) - centre[c], total);
            }
            weights[lane] = root * root * total;
            __syncthreads();  // the weights of this tile are staged
            const auto moved = done ? near.value : near.key;
            const real* behind = done ? mean : centre;
            real* sum = done ? gained : y;
            const int begin = done ? low : 0, size = done ? min(COLUMNS, columns - low) : D;
            #pragma unroll 1
            for (int c = lane; c < size; c += 32)
                #pragma unroll 4
                for (int j = 0; j < 32; j++)
                    if (weights[j] != 0)
                        sum[c] = fma(weights[j], widened(moved.at(tile * 32 + j, begin + c)) - behind[c], sum[c]);
            __syncthreads();  // nobody is left at the weights
        }
        if (done) break;

        real curvature = 0, next = 0;
        #pragma unroll 1
        for (int c = lane; c < D; c += 32) curvature = fma(u[c], y[c], curvature);
        const real length = square / over_row(curvature);
        #pragma unroll 1
        for (int c = lane; c < D; c += 32) {
            x[c] = fma(length, u[c], x[c]);
            r[c] = fma(-length, y[c], r[c]);
            next = fma(r[c], r[c], next);
        }
        next = over_row(next);
        #pragma unroll 1
        for (int c = lane; c < D; c += 32) u[c] = fma(next / square, u[c], r[c]);
        square = next;
    }

    const auto out = rows(o, table, axes, O, memory).of(group);
    #pragma unroll 1
    for (int c = lane; c < COLUMNS; c += 32)
        if (low + c < columns) put(out.at(step, low + c), mean[c] + gained[c]);
    if (lane == 0 && low == 0)
        rows(residual, table, axes, RESIDUAL, memory).of(group).at(step, 0) = first > 0 ? sqrt(square / first) : real(0);
}
