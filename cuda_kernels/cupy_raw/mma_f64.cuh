// The product of 16 x 8 times 8 x 8 numbers of double precision by the lanes of a warp; doubles.cuh says which lane has what.

#ifdef __CUDACC_RTC__
// sum += a b; devices before Hopper have products of 8 x 4 times 4 x 8.
__device__ __forceinline__ void mma_f64(double (&sum)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+d"(sum[0]), "+d"(sum[1]), "+d"(sum[2]), "+d"(sum[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
    #pragma unroll
    for (int i = 0; i < 4; i++)
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
            : "+d"(sum[i % 2 * 2]), "+d"(sum[i % 2 * 2 + 1]) : "d"(a[i]), "d"(b[i / 2]));
#endif
}
// Without the detour that a compiler takes when it flushes what is too small for a float.
__device__ __forceinline__ double in_double(float x) {
    double y;
    asm("cvt.f64.f32 %0, %1;" : "=d"(y) : "f"(x));
    return y;
}
#else  // the header that defines threads for the CPU defines mma_f64 too
inline double in_double(float x) { return x; }
#endif
__device__ __forceinline__ double in_double(double x) { return x; }
