// Whether gates keep within their limits: *found becomes 1 where one does not, and is left alone otherwise.
//
// A gate is so many numbers, one after the other, in whatever order; a NaN is nowhere outside. All threads of all blocks
// walk over each gate together. Several blocks may write the same 1.

__device__ __forceinline__ bool outside(const real* gate, long long size, real low, real high) {
    const long long step = (long long)gridDim.x * blockDim.x;
    bool any = false;
    #pragma unroll 8
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const real x = gate[i];
        any |= x < low || x > high;
    }
    return any;
}

extern "C" __global__ void __launch_bounds__(256)
gates(const real* gate_0, const real* gate_1, const real* gate_2, long long size_0, long long size_1, long long size_2,
      real low_0, real low_1, real low_2, real high_0, real high_1, real high_2, int* found) {
    const bool any = outside(gate_0, size_0, low_0, high_0) || outside(gate_1, size_1, low_1, high_1) ||
                     outside(gate_2, size_2, low_2, high_2);
    if (__syncthreads_or(any) && threadIdx.x == 0) *found = 1;
}
