// Short causal convolution, token by token:  o_t = act(bias + sum_{s<W} weight_{W-1-s} x_{t-s}).
//
// A thread owns one channel of one sequence: its taps and its last W inputs stay in registers. A masked token answers,
// but does not enter the window. One block may fill a multiprocessor: registers come before the number of threads.

enum { X, WEIGHT, BIAS, MASK, WINDOW, O };

// What a channel needs of a token.
struct Token {
    data x;
    bool enters;
};

extern "C" __global__ void __launch_bounds__(128, 1)
short_convolution(const data* x, const data* weight, const real* bias, const bool* mask, real* window, data* o,
                  const long long* table, int axes, int tokens, int columns, int groups, int blocks, int silu) {
    const int memory = blockIdx.x / blocks;
    const int channel = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    if (channel >= columns) return;
    const auto input = rows(x, table, axes, X, memory);
    const auto tap = rows(weight, table, axes, WEIGHT, memory);
    const auto offset = rows(bias, table, axes, BIAS, memory);
    const auto enters = rows(mask, table, axes, MASK, memory);
    const auto past = rows(window, table, axes, WINDOW, memory);
    const auto answer = rows(o, table, axes, O, memory);

    real taps[W], seen[W];
    for (int s = 0; s < W; s++) taps[s] = widened(tap.at(s, channel));
    for (int s = 0; s < W - 1; s++) seen[s] = past.at(s, channel);

    const auto fetch = [&](Token& token, int t) {
        token.x = input.at(t, channel), token.enters = !mask || enters.at(t, 0);
    };
    walk<Token, 8>(tokens, fetch, [&](const Token& token, int t) {
        seen[W - 1] = widened(token.x);
        real total = 0;
        for (int s = 0; s < W; s++) total = fma(taps[s], seen[s], total);
        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the offsets that share these inputs
            const real y = total + (bias ? offset.of(g).at(0, channel) : real(0));
            put(answer.of(g).at(t, channel), silu ? y / (1 + exp(-y)) : y);
        }
        if (token.enters)
            for (int s = 0; s < W - 1; s++) seen[s] = seen[s + 1];
    });
    for (int s = 0; s < W - 1; s++) past.at(s, channel) = seen[s];
}
