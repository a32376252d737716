// A pair of a regression with weights, in double precision whatever the data: its key times the root of its weight.
// A pair of weight zero is not even looked at.
__device__ __forceinline__ real root_of(Rows<const gate> beta, bool weighted, int t) {
    return weighted ? sqrt(real(beta.at(t, 0))) : real(1);
}

// A decay that is zero in the precision of the gates leaves nothing, not even of a NaN: see `kept`.
__device__ __forceinline__ real decay_of(Rows<const gate> log_decay, bool decays, int t) {
    if (!decays) return 1;
    const real x = log_decay.at(t, 0);
    return sizeof(gate) == sizeof(float) && x <= -104 ? real(0) : exp(x);
}

// The key of a pair times the root of its weight, by all threads of a block.
__device__ __forceinline__ void stage_key(real* to, Rows<const data> key, Rows<const gate> beta, bool weighted, int t) {
    const real root = root_of(beta, weighted, t);
    #pragma unroll 1
    for (int p = threadIdx.x; p < K; p += blockDim.x) to[p] = root == 0 ? real(0) : root * widened(key.at(t, p));
}

// H = left H + key key^T; a thread has the same columns every time.
__device__ void learn(real* H, const real* key, real left) {
    for (int i = 0; i < K; i++)
        for (int j = threadIdx.x; j < K; j += blockDim.x)
            H[i * K + j] = fma(key[i], key[j], kept(left, H[i * K + j]));
}

__device__ __forceinline__ real ratio(real x, real y) { return y <= 0 ? real(0) : x / y; }  // a NaN stays
