// What the threads of a block do together, in double precision.

__device__ __forceinline__ double of_bits(unsigned long long bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
__device__ __forceinline__ double infinity() { return of_bits(0x7ffull << 52); }
__device__ __forceinline__ double not_a_number() { return of_bits(0xfffull << 51); }

constexpr double EPS = 0x1p-52;

__device__ double over_warp(double x) {  // a sum over the lanes, the same for each
    for (int distance = 1; distance < 32; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// A dot product by one warp; the lanes take turns along the vectors.
__device__ real dot_of_warp(const real* x, const real* y, int n) {
    real total = 0;
    for (int i = threadIdx.x % 32; i < n; i += 32) total = fma(x[i], y[i], total);
    return over_warp(total);
}

// The same over all threads.
__device__ double over_block(double x) {
    __shared__ double parts[32];
    x = over_warp(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();  // every warp has left its part
    double total = 0;
    for (int i = 0; i < int(blockDim.x / 32); i++) total += parts[i];
    __syncthreads();  // everyone has read them before the next sum
    return total;
}
