// What one query makes of its past, 32 pairs at a time: a warp has the query, and each lane weighs a pair for it.

struct Neighbours {
    Pairs seen;
    Rows<const stored> key, value;
    const real* query;   // D numbers
    real* weights;       // 32, of the tile at hand; below 0 where nothing is seen
    int code, last, newest, lowest;
    long long oldest;
    real width;

    // Logit of this lane's pair in a tile, and the sum of the gates that are newer than the next one; call it in all lanes.
    __device__ __forceinline__ real logit(int tile, double& since) const {
        const int pair = tile * 32 + threadIdx.x;
        const double bias = seen.left_of_lane(pair, last, since);
        const long long place = pair <= last ? seen.place(pair) : -1;
        if (bias < NOTHING / 2 || place < 0 || place < oldest) return -infinite();
        real x = 0;
        #pragma unroll 2
        for (int c = 0; c < D; c++) {
            const real k = widened(key.at(pair, c)), first = code == EXPONENTIAL ? origin(widened(key.at(0, c))) : real(0);
            x = joined(code, query[c], k - first, x);
        }
        return log_kernel(code, x, width) + bias;
    }

    // Add the weighted numbers of a tile to a mean; lanes share the columns.
    __device__ __forceinline__ void gather(real* mean, const Rows<const stored>& x, int tile, int columns, int low, int end,
                                           real kept) const {
        #pragma unroll 1
        for (int c = threadIdx.x; c < columns; c += 32) {
            real total = 0;
            #pragma unroll 4
            for (int j = 0; j < 32; j++)
                if (!(weights[j] < 0) && low + c < end)
                    total = fma(weights[j], number(widened(x.at(tile * 32 + j, low + c))), total);
            mean[c] = fma(kept, mean[c], total);
        }
    }

    // Means of some value columns and of the keys, each in the lane that has the column; the highest logit and the
    // weight of all.
    __device__ __forceinline__ void average(real* mean, real* centre, int low, int columns, real& top, real& weight) const {
        #pragma unroll 1
        for (int c = threadIdx.x; c < COLUMNS; c += 32) mean[c] = 0;
        #pragma unroll 1
        for (int c = threadIdx.x; c < D; c += 32) centre[c] = 0;
        double since = 0;
        top = -infinite(), weight = 0;
        #pragma unroll 1
        for (int tile = newest; tile >= lowest; tile--) {
            const real x = logit(tile, since), highest = top_of_row(x), higher = highest > top ? highest : top;
            const real shift = higher == -infinite() ? real(0) : higher, p = exp(x - shift), kept = exp(top - shift);
            weight = fma(kept, weight, over_row(p)), top = higher;
            weights[threadIdx.x] = x == -infinite() ? real(-1) : p;
            __syncthreads();  // the weights of this tile are staged
            gather(mean, value, tile, COLUMNS, low, columns, kept);
            gather(centre, key, tile, D, 0, D, kept);
            __syncthreads();  // nobody is left at the weights
        }
        #pragma unroll 1
        for (int c = threadIdx.x; c < COLUMNS; c += 32) mean[c] = weight != 0 ? mean[c] / weight : mean[c];
        #pragma unroll 1
        for (int c = threadIdx.x; c < D; c += 32) centre[c] = weight != 0 ? centre[c] / weight : centre[c];
        top = top == -infinite() ? real(0) : top;
    }
};

// Square root of a pair's share of the weight.
__device__ __forceinline__ real root_of(real x, real top, real weight) {
    if (x == -infinite()) return 0;
    const real root = exp((x - top) / 2);
    return weight <= 0 ? root : root / sqrt(weight);
}

// The tiles and the window of a step.
__device__ __forceinline__ void look(Neighbours& near, int step, bool causal) {
    near.last = causal ? near.seen.cached + step : near.seen.pairs - 1;
    near.newest = near.last / 32;
    near.lowest = near.seen.begin(step) / 32;
    near.oldest = near.seen.window ? near.seen.memorised(step) - near.seen.window : 0;
}
