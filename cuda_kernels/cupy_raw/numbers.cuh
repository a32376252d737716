// Number formats. Data are read and written in the format in which they come; all between is `real`, float or double.
// Products that are added are written as fma, so that every format of the data gives the bits of the others.

struct float16 {
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(bfloat16 x) {
    const unsigned bits = unsigned(x.bits) << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}
__device__ __forceinline__ void put(float& at, float x) { at = x; }
__device__ __forceinline__ void put(double& at, double x) { at = x; }
__device__ __forceinline__ void put(bfloat16& at, float x) {  // to nearest, ties to even; NaN stays NaN
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    at.bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#ifdef __CUDACC_RTC__
// The shared memory that the launch asks for.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    return shared_bytes;
}
__device__ __forceinline__ float widened(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ void put(float16& at, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(at.bits) : "f"(x));
}
#else  // a compiler of the CPU
__device__ __forceinline__ float widened(float16 x) {
    _Float16 y;
    memcpy(&y, &x.bits, sizeof y);
    return float(y);
}
__device__ __forceinline__ void put(float16& at, float x) {
    const _Float16 y = _Float16(x);
    memcpy(&at.bits, &y, sizeof y);
}
#endif

// What a decay leaves of a number; where it leaves nothing, not even a NaN is left.
__device__ __forceinline__ real kept(real decay, real x) { return decay == 0 ? real(0) : decay * x; }
