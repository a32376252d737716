// What the text of a kernel sees when g++ compiles it: the CUDA C++ that our kernels use, and no more.
#pragma once
#include "runtime.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static __attribute__((section("runner_shared")))  // blocks run one after another: one copy is enough

#define threadIdx (::runner::builtins.thread)
#define blockIdx (::runner::builtins.block)
#define blockDim (::runner::builtins.block_size)
#define gridDim (::runner::builtins.grid_size)

static inline int min(int x, int y) { return x < y ? x : y; }
static inline int max(int x, int y) { return x < y ? y : x; }
static inline void __syncthreads(int line = __builtin_LINE()) { runner::block_barrier(line); }

template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a register or two");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = runner::exchange(bits, int(threadIdx.x % 32) ^ distance, mask, line);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
