// Diagonal scan, token by token:  h = exp(log_decay_t + i phase_t) h + x_t.
//
// A thread owns one channel of one piece of a sequence, in registers, from the first token of the piece to the last. Real
// and imaginary parts are arrays of their own; without a phase there are no imaginary parts.
//
// Where there are several pieces, a first launch (STATES) makes what each but the last adds to an empty state, and what it
// leaves of the state before it. Every piece begins with those before it.

enum { X, X_IMAG, GATE, PHASE, STATE, STATE_IMAG, O, O_IMAG, STATE_NEXT, STATE_NEXT_IMAG };

// What a channel needs of a token.
struct Token {
    data x, x_imag;
    real gate, angle;
};

// A number of the scan; without a phase its imaginary part is zero and nobody asks for it.
struct Number {
    real re, im;
};

// decay h + x; where the decay leaves nothing, not even a NaN is left.
__device__ __forceinline__ Number moved(Number decay, Number h, Number x, bool turns) {
    if (decay.re == 0 && decay.im == 0) return x;
    if (!turns) return {fma(decay.re, h.re, x.re), 0};
    return {fma(decay.re, h.re, -(decay.im * h.im)) + x.re, fma(decay.re, h.im, decay.im * h.re) + x.im};
}

extern "C" __global__ void __launch_bounds__(128, 1)
diagonal_scan(const data* x, const data* x_imag, const real* log_decay, const real* phase, const real* h,
              const real* h_imag, real* h_next, real* h_next_imag, answer* o, answer* o_imag, real* sums,
              const long long* table, int axes, int tokens, int columns, int blocks, int pieces, int stored, int length) {
    const int memory = blockIdx.x / blocks, piece = blockIdx.x % pieces;
    const int channel = blockIdx.x % blocks / pieces * blockDim.x + threadIdx.x;
    const int begin = piece * length, count = min(length, tokens - begin);
    if (channel >= columns) return;
    const auto input = rows(x, table, axes, X, memory);
    const auto input_imag = rows(x_imag, table, axes, X_IMAG, memory);
    const auto gate = rows(log_decay, table, axes, GATE, memory);
    const auto angle = rows(phase, table, axes, PHASE, memory);
    const auto output = rows(o, table, axes, O, memory);
    const auto output_imag = rows(o_imag, table, axes, O_IMAG, memory);
    // Of a piece: what it adds, then what it leaves.
    const auto sum_of = [&](int p, int which) -> Number* {
        return reinterpret_cast<Number*>(sums) + ((size_t(memory) * stored + p) * 2 + which) * columns + channel;
    };

    Number own = {0, 0}, left = {1, 0};
    if (!STATES) {
        own.re = rows(h, table, axes, STATE, memory).at(0, channel);
        if (phase) own.im = rows(h_imag, table, axes, STATE_IMAG, memory).at(0, channel);
        #pragma unroll 1
        for (int p = 0; p < piece; p++) own = moved(*sum_of(p, 1), own, *sum_of(p, 0), phase);
    }

    const auto fetch = [&](Token& token, int i) {
        const int t = begin + i;
        token.x = input.at(t, channel), token.gate = gate.at(t, channel);
        if (phase) token.angle = angle.at(t, channel);
        if (x_imag) token.x_imag = input_imag.at(t, channel);
    };
    walk<Token, 8>(count, fetch, [&](const Token& token, int i) {
        const real size = exp(token.gate);
        Number decay = {size, 0}, x_t = {widened(token.x), 0};
        if (phase) decay = {size * cos(token.angle), size * sin(token.angle)};
        if (x_imag) x_t.im = widened(token.x_imag);
        if (size == 0) decay = {0, 0};  // whatever the angle
        own = moved(decay, own, x_t, phase);
        if (STATES) left = moved(decay, left, {0, 0}, phase);
        if (STATES) return;
        put(output.at(begin + i, channel), own.re);
        if (phase) put(output_imag.at(begin + i, channel), own.im);
    });

    if (STATES) {
        *sum_of(piece, 0) = own, *sum_of(piece, 1) = left;
    } else if (begin + count == tokens) {
        rows(h_next, table, axes, STATE_NEXT, memory).at(0, channel) = own.re;
        if (phase) rows(h_next_imag, table, axes, STATE_NEXT_IMAG, memory).at(0, channel) = own.im;
    }
}
