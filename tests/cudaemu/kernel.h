// What the text of a kernel sees when g++ compiles it: the CUDA C++ that our kernels use, and no more.
#pragma once
#include "runtime.h"

#include <algorithm>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static __attribute__((section("runner_shared")))  // blocks run one after another: one copy is enough

#define threadIdx (::runner::builtins.thread)
#define blockIdx (::runner::builtins.block)
#define blockDim (::runner::builtins.block_size)
#define gridDim (::runner::builtins.grid_size)

using std::max;
using std::min;
static inline double rsqrt(double x) { return 1 / std::sqrt(x); }

static inline void __syncthreads(int line = __builtin_LINE()) { runner::block_barrier(line); }

static inline int __syncthreads_or(int any, int line = __builtin_LINE()) { return runner::block_vote(any, line); }

namespace runner {
// A vote that a launch may leave out: each thread then hears itself alone.
struct Vote {
    int number;
    int operator()(int any, int line = __builtin_LINE()) const { return keeps(number) ? block_vote(any, line) : any; }
};
}  // namespace runner
static inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    runner::warp_barrier(mask, line);
}

template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a register or two");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = runner::exchange(bits, source % 32, mask, line);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
    return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ distance, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
    const int lane = int(threadIdx.x % 32);
    return __shfl_sync(mask, value, lane < distance ? lane : lane - distance, line);
}
static inline int __any_sync(unsigned mask, int any, int line = __builtin_LINE()) {
    for (int distance = 1; distance < 32; distance *= 2) any |= __shfl_xor_sync(mask, any, distance, line);
    return any;
}

static inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(runner::dynamic_shared()); }

// What tensor.cuh and doubles.cuh write as PTX; their comments say what each does.
struct DoubleFactors {
    double a[4], b[2], sum[4];
};
static inline void mma_f64(double (&sum)[4], const double (&a)[4], const double (&b)[2], int line = __builtin_LINE()) {
    const DoubleFactors factors = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {sum[0], sum[1], sum[2], sum[3]}};
    runner::together(runner::mma_f64, &factors, sum, 0xffffffffu, line);
}

struct Factors {
    unsigned a[4], b[2];
    float sum[4];
};
static inline void mma(runner::Together work, float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line) {
    const Factors factors = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {sum[0], sum[1], sum[2], sum[3]}};
    runner::together(work, &factors, sum, 0xffffffffu, line);
}
static inline void mma_bf16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line = __builtin_LINE()) {
    mma(runner::mma_bf16, sum, a, b, line);
}
static inline void mma_f16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line = __builtin_LINE()) {
    mma(runner::mma_f16, sum, a, b, line);
}
static inline void load_matrices(unsigned (&x)[4], const void* row, int line = __builtin_LINE()) {
    runner::note_read(row, 16, line);
    runner::together(runner::load_matrices, row, x, 0xffffffffu, line);
}
static inline void load_transposed_matrices(unsigned (&x)[4], const void* row, int line = __builtin_LINE()) {
    runner::note_read(row, 16, line);
    runner::together(runner::load_transposed_matrices, row, x, 0xffffffffu, line);
}
static inline void copy_later(void* to, const void* from, int bytes, int line = __builtin_LINE()) {
    runner::copy_later(to, from, bytes, line);
}
static inline void close_copies() { runner::close_copies(); }
template <int GROUPS>
static inline void finish_copies(int line = __builtin_LINE()) {
    runner::finish_copies(GROUPS, line);
}

// What wgmma.cuh writes as PTX.
typedef unsigned long long Barrier;
typedef unsigned long long Matrix;
static inline unsigned shared_address(const void* at) { return runner::shared_address(at); }
static inline void show_to_products() { runner::show_to_products(); }
static inline void begin_products(int line = __builtin_LINE()) { runner::begin_products(line); }
static inline void close_products() { runner::close_products(); }
template <int GROUPS>
static inline void finish_products(int line = __builtin_LINE()) {
    runner::finish_products(GROUPS, line);
}
template <int R>
static inline void done(float (&)[R]) {}
template <int REGISTERS>
static inline void take_registers() {}
template <int REGISTERS>
static inline void leave_registers() {}
static inline unsigned this_thread() { return threadIdx.x; }
static inline void warpgroup_barrier(int group, int line = __builtin_LINE()) {
    runner::named_barrier(group + 1, 128, line);
}
static inline void both_warpgroups(int line = __builtin_LINE()) { runner::named_barrier(1, 256, line); }
static inline void set_up(Barrier& barrier, int arrivals, int line = __builtin_LINE()) {
    runner::set_up(&barrier, arrivals, line);
}
static inline void arrive(Barrier& barrier, int line = __builtin_LINE()) { runner::arrive(&barrier, line); }
static inline void arrive_with_copies(Barrier& barrier, int line = __builtin_LINE()) {
    runner::arrive_with_copies(&barrier, line);
}
static inline void wait(Barrier& barrier, int phase, int line = __builtin_LINE()) {
    runner::wait_for_phase(&barrier, phase, line);
}
#define RUNNER_PRODUCTS(format, half)                                                                              \
    RUNNER_FROM_MEMORY(wgmma_##format, half, 0, 0)                                                                 \
    RUNNER_FROM_MEMORY(wgmma_##format##_rows, half, 1, 0)                                                          \
    RUNNER_FROM_MEMORY(wgmma_##format##_tokens, half, 1, 1)                                                        \
    template <int N>                                                                                               \
    static inline void wgmma_##format(float (&sum)[N / 2], const unsigned (&left)[4], Matrix right, int onto = 1,  \
                                      int line = __builtin_LINE()) {                                               \
        const runner::Product product = {sum, left, 0, right, N, onto, half, 1, 0};                                \
        runner::multiply_shared(&product, line);                                                                   \
    }                                                                                                              \
    template <int N>                                                                                               \
    static inline void wgmma_##format##_columns(float (&sum)[N / 2], const unsigned (&left)[4], Matrix right,      \
                                                int onto, int line = __builtin_LINE()) {                           \
        const runner::Product product = {sum, left, 0, right, N, onto, half, 0, 0};                                \
        runner::multiply_shared(&product, line);                                                                   \
    }
#define RUNNER_FROM_MEMORY(name, half, rows, left_columns)                                                         \
    template <int N>                                                                                               \
    static inline void name(float (&sum)[N / 2], Matrix left, Matrix right, int onto,                              \
                            int line = __builtin_LINE()) {                                                         \
        const runner::Product product = {sum, nullptr, left, right, N, onto, half, rows, left_columns};            \
        runner::multiply_shared(&product, line);                                                                   \
    }
RUNNER_PRODUCTS(bf16, false)
RUNNER_PRODUCTS(f16, true)

static inline void store_matrices(const unsigned (&x)[4], void* row, int line = __builtin_LINE()) {
    runner::note_write(row, 16, line);
    runner::together(runner::store_matrices, &x, row, 0xffffffffu, line);
}
static inline void store_transposed_matrices(const unsigned (&x)[4], void* row, int line = __builtin_LINE()) {
    runner::note_write(row, 16, line);
    runner::together(runner::store_transposed_matrices, &x, row, 0xffffffffu, line);
}
