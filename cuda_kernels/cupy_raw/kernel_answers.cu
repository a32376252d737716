// Kernel ridge regression, the answers:  x = L_t^-1 kappa_t,  o_t = Y_t^T x,  both up to the last pair that t may see.
//
// A thread has one query after another and a column of `scratch` for its x, so that no thread waits for another. All of a
// warp read the same numbers of L. The value of a slot without a pair is zero. `real` is double whatever the data.

enum { Q, KEY, FACTOR, VALUES, SCRATCH, O };

extern "C" __global__ void __launch_bounds__(128)
kernel_answers(const data* q, const real* k, const real* factor, const real* Y, real* scratch, data* o,
               const long long* table, int axes, int tokens, int groups, int blocks, int pairs, int past,
               int width_of_values, double width) {
    const int memory = blockIdx.x / blocks, lanes = blocks * blockDim.x;
    const int lane = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    const auto query = rows(q, table, axes, Q, memory);
    const real* key = rows(k, table, axes, KEY, memory).begin;
    const real* L = rows(factor, table, axes, FACTOR, memory).begin;
    const auto value = rows(Y, table, axes, VALUES, memory);
    const auto answer = rows(o, table, axes, O, memory);
    real* x = rows(scratch, table, axes, SCRATCH, memory).begin + lane;

    #pragma unroll 1
    for (long long job = lane; job < (long long)tokens * groups; job += lanes) {
        const int t = job / groups, g = job % groups, seen = CAUSAL ? past + t + 1 : pairs;
        const auto asked = query.of(g).line(t);
        #pragma unroll 1
        for (int i = 0; i < seen; i++) {
            real total = similar(key + (long long)i * K, asked, width);
            for (int m = 0; m < i; m++) total = fma(-L[(long long)i * pairs + m], x[(long long)m * lanes], total);
            x[(long long)i * lanes] = total / L[(long long)i * pairs + i];
        }
        #pragma unroll 1
        for (int j = 0; j < width_of_values; j++) {
            real total = 0;
            for (int i = 0; i < seen; i++) total = fma(x[(long long)i * lanes], value.at(i, j), total);
            put(answer.of(g).at(t, j), gate(total));
        }
    }
}
