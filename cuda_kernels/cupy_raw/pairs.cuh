// Pairs of keys and values as blocks of queries look at them: which are seen, and what the gates have left of each.
//
// The rows of a block are queries that share a memory: row r is step r / groups of sequence r % groups. Gates are added up
// newest first and in double precision: numbers of one sign, so that no gate costs the mild ones after it a digit.

constexpr double NOTHING = -1e30;  // a gate of this size or more is a full reset: it leaves exactly nothing
__device__ __forceinline__ real infinite() {
    const unsigned bits = 0x7f800000;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

struct Pairs {
    Rows<const long long> position, count;  // of each pair, -1 where nothing is memorised; of each step, see _attention.py
    Rows<const logs> gate, past;            // of each step; what was left of each cached pair
    bool placed, counted, gated;            // whether those are given
    int cached, pairs, tokens, window, sinks;

    __device__ __forceinline__ long long place(int pair) const { return placed ? position.at(pair, 0) : pair; }
    __device__ __forceinline__ long long memorised(int step) const { return counted ? count.at(step, 0) : step + 1; }

    // How many of the first steps have memorised no more than a number of pairs.
    __device__ __forceinline__ int first_steps(long long number) const {
        int low = 0, high = tokens;
        #pragma unroll 1
        while (low < high) {
            const int middle = low + (high - low) / 2;
            if (memorised(middle) > number)
                high = middle;
            else
                low = middle + 1;
        }
        return low;
    }
    // The first pair of the window of a step. All cached pairs are looked at: there are few where there is a window.
    __device__ __forceinline__ int begin(int step) const {
        const int steps = window ? first_steps(memorised(step) - window) : 0;
        return steps ? cached + steps : 0;
    }
    __device__ __forceinline__ int front() const { return sinks ? cached + first_steps(sinks) : 0; }  // behind the sinks
    __device__ __forceinline__ double gate_of(int pair) const {
        const double x = gated && pair >= cached && pair < cached + tokens ? double(gate.at(pair - cached, 0)) : 0.0;
        return x < NOTHING ? NOTHING : x;
    }
    __device__ __forceinline__ double left_of(int pair) const { return pair < cached ? double(past.at(pair, 0)) : 0.0; }
    // The same of 32 pairs, one for each lane, for a query of which this is the last one, with the gates that are newer.
    // `since` is the sum of those that are newer than all 32, and then of those that are newer than the 32 before.
    __device__ __forceinline__ double left_of_lane(int pair, int last, double& since) const {
        double total = pair <= last && !(since < NOTHING / 2) ? gate_of(pair) : 0.0, after = 0;
        for (int distance = 1; distance < 32; distance *= 2) {  // gates of later lanes: of a neighbour, of two, and so on
            const double other = __shfl_xor_sync(0xffffffffu, total, distance);
            after += threadIdx.x & distance ? 0.0 : other;
            total += other;
        }
        const double left = since + after + (pair <= last ? left_of(pair) : 0.0);
        since += total;
        return left;
    }
};

// What the gates have left, as it joins a logit.
__device__ __forceinline__ real bias_of(double total) { return total < NOTHING / 2 ? -infinite() : real(total); }

// A number, or NaN where it is not finite.
__device__ __forceinline__ real number(real x) { return x - x == 0 ? x : x - x; }

// A kernel of queries and keys, by its code: a dot product (DOT, EXPONENTIAL) or a squared distance, channel by channel,
// then the log of the kernel; `width` is the scale, or 1 / bandwidth.
enum { DOT = -1, EXPONENTIAL, GAUSSIAN, BOXCAR = 5 };

__device__ __forceinline__ real joined(int code, real q, real k, real x) {
    const real apart = q - k;
    return code <= EXPONENTIAL ? fma(q, k, x) : fma(apart, apart, x);
}
__device__ __forceinline__ real log_kernel(int code, real x, real width) {
    if (code <= EXPONENTIAL) return width * x;
    if (code == GAUSSIAN) return -x * (width * width) / 2;
    const real u = sqrt(x) * width, none = -infinite();
    if (!(u <= 1)) return (code == BOXCAR && u - u != 0) || u != u ? u - u : none;
    const real inside = (1 - u) * (1 + u);
    return code == BOXCAR ? 0 * inside : inside > 0 ? (code - 1) * log(inside) : none;
}
// What a channel of all keys is measured from: the oldest key, in the past of all queries. Zero if it is no number.
__device__ __forceinline__ real origin(real key) { return key - key == 0 ? key : real(0); }

// Sums and maxima over the LANES neighbouring lanes that share a row; NaN is no maximum.
__device__ __forceinline__ real over_row(real x) {
    for (int distance = 1; distance < LANES; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}
__device__ __forceinline__ real top_of_row(real x) {
    for (int distance = 1; distance < LANES; distance *= 2) {
        const real other = __shfl_xor_sync(0xffffffffu, x, distance);
        x = other > x || x != x ? other : x;
    }
    return x;
}
