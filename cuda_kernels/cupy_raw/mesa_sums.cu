// What the pairs of a piece of a sequence add to the states of the Mesa layer, in products of bfloat16:
//
//     H = sum w k k^T,  G = sum w k v^T,
//
// where w is the weight of a pair times the decays behind it, and the decay of the whole piece. One block per memory,
// piece and panel of PANEL columns: those of keys first, then those of values.

enum { KEY, V, GATE, BETA };

constexpr int ROWS_OF_WARP = (BLOCKS + WARPS - 1) / WARPS, KEY_PANELS = (KEYS + PANEL - 1) / PANEL;

// Where they lie, in shared memory: registers are short.
struct Arrays {
    Source keys, columns;
    Gates gates;
};

// The last token of a piece before which all is forgotten; if there is none, its first.
__device__ __forceinline__ int last_reset(const Gates& at, int first, int end) {
    int last = first;
    #pragma unroll 1
    for (int token = first + threadIdx.x % 32; token < end; token += 32)
        if (at.resets(token)) last = token;
    for (int distance = 1; distance < 32; distance *= 2) last = max(last, __shfl_xor_sync(0xffffffffu, last, distance));
    return last;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
mesa_sums(const data* k, const data* v, const gate* log_decay, const gate* beta, float* sums, const long long* table,
          int axes, int tokens, int columns, int length, int panels, int blocks) {
    __shared__ Chunk all;
    __shared__ Arrays arrays;
    unsigned char* at = dynamic_shared();
    const Keys k_tile = tile_of<Keys>(at);
    const Values tile = tile_of<Values>(at);
    const int memory = blockIdx.x / blocks, piece = blockIdx.x % blocks / panels, panel = blockIdx.x % panels;
    const bool of_keys = panel < KEY_PANELS;
    const int first_column = PANEL * (of_keys ? panel : panel - KEY_PANELS), warp = threadIdx.x / 32;
    if (threadIdx.x == 0)
        arrays = {source_of(rows(k, table, axes, KEY, memory), K),
                  source_of(of_keys ? rows(k, table, axes, KEY, memory) : rows(v, table, axes, V, memory),
                            of_keys ? K : columns),
                  Gates::of(log_decay, beta, table, axes, GATE, memory)};
    __syncthreads();  // arrays are known

    Sum own[ROWS_OF_WARP][PANEL / 8] = {};
    const int end = (piece + 1) * length, begin = last_reset(arrays.gates, piece * length, end);
    float left = 1;
    #pragma unroll 1
    for (int low = begin; low < end; low += CHUNK) {
        const int n = min(CHUNK, end - low);
        arrays.keys.bring(k_tile, low, n, 0), arrays.columns.bring(tile, low, n, first_column);
        close_copies();
        if (warp == 0) find_decays(all, arrays.gates, low, n);
        finish_copies<0>();
        __syncthreads();  // pairs are there
        look<true>(k_tile, all), look<false>(tile, all);
        weigh(all, n);
        __syncthreads();  // what they weigh is there
        const float rest = all.left[CHUNK - 1];
        left = fmaxf(left * rest, 0x1p-126f);  // zero only after a reset
        #pragma unroll
        for (int m = 0; m < ROWS_OF_WARP; m++) {
            const int row = warp + m * WARPS;
            if (row >= BLOCKS) continue;
            Weighed weighed;
            load_weighed(weighed, k_tile, all, 16 * row);
            #pragma unroll
            for (int n = 0; n < PANEL / 8; n += 2) {
                Sum part[2] = {};
                multiply_pairs(part, weighed, tile, 8 * n);
                for (int i = 0; i < 8; i++) {
                    float& x = own[m][n + i / 4].x[i % 4];
                    x = fma(rest, x, part[i / 4].x[i % 4]);
                }
                __syncwarp();  // what the next ones need is not loaded before
            }
        }
        __syncthreads();  // nobody is left at these pairs
    }
    float* const to = sums + ((size_t(memory) * (blocks / panels) + piece) * panels + panel) * Sums::size;
    #pragma unroll
    for (int m = 0; m < ROWS_OF_WARP; m++)
        for (int n = 0; n < PANEL / 8 && warp + m * WARPS < BLOCKS; n++)
            each(own[m][n], [&](int i, int j, float x) { to[(16 * (warp + m * WARPS) + i) * PANEL + 8 * n + j] = x; });
    if (threadIdx.x == 0) to[KEYS * PANEL] = arrays.gates.resets(begin) ? 0.0f : left;
}
