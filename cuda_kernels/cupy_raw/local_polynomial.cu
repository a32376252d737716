// Local polynomial regression:  o = vbar + B^T R^-T (1, f(q - c)),  [R B] the triangle of the rows
// sqrt(p_i) [1 f(k_i - c) | v_i - vbar] under sqrt(ridge) I, made by reflections, 32 rows at a time.
//
// A warp has one query and some value columns. Monomials are an earlier one times a channel, by tables.

enum { Q, KEY, V, POSITION, COUNT, LEFT, GATE, O, BOUNDS, PARENTS, FACTORS, SCALES };
enum { BOTH = P + COLUMNS };

extern "C" __global__ void __launch_bounds__(32)
local_polynomial(const data* q, const stored* k, const stored* v, const long long* position, const long long* count,
                 const logs* left, const logs* log_decay, data* o, const long long* bounds, const long long* parents,
                 const long long* factors, const real* scales, const long long* table, int axes, int tokens,
                 int columns, int pairs, int cached, int groups, int blocks, int parts, int causal, int window, int kind,
                 real width, real ridge) {
    __shared__ real query[D], centre[D], mean[COLUMNS], weights[32], read[P];
    __shared__ real lines[32][BOTH], R[P][BOTH];
    __shared__ int fresh[P];

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
    #pragma unroll 1
    for (int i = lane; i < P * BOTH; i += 32) R[i / BOTH][i % BOTH] = 0;
    __syncthreads();  // the query and an empty triangle are there
    #pragma unroll 1
    for (int i = 1 + lane; i < P; i += 32) R[i][i] = sqrt(ridge);
    real top, weight;
    near.average(mean, centre, low, columns, top, weight);
    #pragma unroll 1
    for (int c = lane; c < D; c += 32)
        if (DEGREE > 1) centre[c] = query[c];  // monomials of higher degree, and their ridge, are those around the query
    __syncthreads();  // the means and the centre are there

    double since = 0;
    #pragma unroll 1
    for (int tile = near.newest; tile >= near.lowest; tile--) {
        const real x = near.logit(tile, since), root = root_of(x, top, weight);
        const bool there = x != -infinite();
        lines[lane][0] = 1;
        #pragma unroll 1
        for (int i = 1; i < P; i++) {
            const int c = int(factors[i]);
            const real z = there ? widened(near.key.at(tile * 32 + lane, c)) - centre[c] : real(0);
            lines[lane][i] = lines[lane][parents[i]] * z;
        }
        #pragma unroll 1
        for (int i = 0; i < P; i++) lines[lane][i] *= root * scales[i];
        #pragma unroll 1
        for (int c = 0; c < COLUMNS; c++) {
            const bool here = there && low + c < columns;
            lines[lane][P + c] = here ? root * (widened(near.value.at(tile * 32 + lane, low + c)) - mean[c]) : real(0);
        }
        __syncthreads();  // the rows of this tile are staged

        #pragma unroll 1
        for (int i = 0; i < P; i++) {  // one reflection for each column; the rows are used up
            const real own = lines[lane][i], diagonal = R[i][i], below = over_row(own * own);
            const real norm = sqrt(fma(diagonal, diagonal, below)), size = diagonal > 0 ? -norm : norm;
            const real head = diagonal - size, factor = below == 0 ? real(0) : -1 / (size * head);  // 2 / |(head, x)|^2
            #pragma unroll 1
            for (int j = i + 1 + lane; j < BOTH; j += 32) {
                real share = head * R[i][j];
                #pragma unroll 8
                for (int r = 0; r < 32; r++) share = fma(lines[r][i], lines[r][j], share);
                share *= factor;
                R[i][j] = fma(-share, head, R[i][j]);
                #pragma unroll 8
                for (int r = 0; r < 32; r++) lines[r][j] = fma(-share, lines[r][i], lines[r][j]);
            }
            __syncthreads();  // column i is used up, the next one is final
            if (lane == 0 && !(below == 0)) R[i][i] = size;
        }
    }

    __syncthreads();  // the triangle is final
    #pragma unroll 1
    for (int j = lane; j < P; j += 32) {
        real square = 0;
        for (int i = 0; i <= j; i++) square = fma(R[i][j], R[i][j], square);
        fresh[j] = !(fabs(R[j][j]) <= UNDETERMINED * sqrt(square));
    }
    if (lane == 0) {
        read[0] = 1;
        #pragma unroll 1
        for (int i = 1; i < P; i++) read[i] = read[parents[i]] * (query[factors[i]] - centre[factors[i]]);
        #pragma unroll 1
        for (int i = 0; i < P; i++) read[i] *= scales[i];
    }
    __syncthreads();  // all columns are judged, and what is read is there
    int use = 0;  // all coefficients of the highest degree that the rows determine
    bool known = true;
    for (int degree = 0; degree <= DEGREE && known; degree++) {
        for (int j = use; j < int(bounds[degree]); j++) known = known && fresh[j];
        if (known) use = int(bounds[degree]);
    }
    #pragma unroll 1
    for (int i = 0; i < use; i++) {
        if (i) __syncthreads();  // entry i of what is read is final
        const real share = read[i] / R[i][i];
        #pragma unroll 1
        for (int j = i + 1 + lane; j < use; j += 32) read[j] = fma(-share, R[i][j], read[j]);
        #pragma unroll 1
        for (int c = lane; c < COLUMNS; c += 32) mean[c] = fma(share, R[i][P + c], mean[c]);
    }
    const auto out = rows(o, table, axes, O, memory).of(group);
    #pragma unroll 1
    for (int c = lane; c < COLUMNS; c += 32)
        if (low + c < columns) put(out.at(step, low + c), mean[c]);
}
