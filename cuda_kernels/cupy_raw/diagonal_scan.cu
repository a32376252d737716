// Diagonal scan, token by token:  h = exp(log_decay_t + i phase_t) h + x_t.
//
// A thread owns one channel of one sequence, in registers, from the first token to the last. Real and imaginary parts
// are arrays of their own; without a phase there are no imaginary parts.

enum { X, X_IMAG, GATE, PHASE, STATE, STATE_IMAG, O, O_IMAG };

// What a channel needs of a token.
struct Token {
    data x, x_imag;
    real gate, angle;
};

extern "C" __global__ void __launch_bounds__(128, 1)
diagonal_scan(const data* x, const data* x_imag, const real* log_decay, const real* phase, real* h, real* h_imag,
              answer* o, answer* o_imag, const long long* table, int axes, int tokens, int columns, int blocks) {
    const int memory = blockIdx.x / blocks;
    const int channel = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    if (channel >= columns) return;
    const auto input = rows(x, table, axes, X, memory);
    const auto input_imag = rows(x_imag, table, axes, X_IMAG, memory);
    const auto gate = rows(log_decay, table, axes, GATE, memory);
    const auto angle = rows(phase, table, axes, PHASE, memory);
    const auto state = rows(h, table, axes, STATE, memory);
    const auto state_imag = rows(h_imag, table, axes, STATE_IMAG, memory);
    const auto output = rows(o, table, axes, O, memory);
    const auto output_imag = rows(o_imag, table, axes, O_IMAG, memory);

    real re = state.at(0, channel), im = phase ? state_imag.at(0, channel) : real(0);
    const auto fetch = [&](Token& token, int t) {
        token.x = input.at(t, channel), token.gate = gate.at(t, channel);
        if (phase) token.angle = angle.at(t, channel);
        if (x_imag) token.x_imag = input_imag.at(t, channel);
    };
    walk<Token, 8>(tokens, fetch, [&](const Token& token, int t) {
        const real size = exp(token.gate), x_t = widened(token.x);
        if (phase) {
            const real c = size * cos(token.angle), s = size * sin(token.angle);
            const real turned = fma(c, re, -(s * im)), turned_imag = fma(c, im, s * re);
            re = size == 0 ? x_t : turned + x_t;
            im = (size == 0 ? real(0) : turned_imag) + (x_imag ? widened(token.x_imag) : real(0));
        } else {
            re = size == 0 ? x_t : fma(size, re, x_t);
        }
        put(output.at(t, channel), re);
        if (phase) put(output_imag.at(t, channel), im);
    });
    state.at(0, channel) = re;
    if (phase) state_imag.at(0, channel) = im;
}
