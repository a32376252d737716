// Softmax attention over pieces of the past as one:  o = sum_c e_c o_c / sum_c e_c weight_c,  e_c = exp(top_c - top).
//
// A thread has one value column of all queries of a memory. A piece is a row: values, then its top and its weight.

enum { PIECES, O };

extern "C" __global__ void __launch_bounds__(128)
softmax_merge(const real* pieces, data* o, const long long* table, int axes, int tokens, int columns, int groups,
              int blocks, int cuts) {
    const int memory = blockIdx.x / blocks, column = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    #pragma unroll 1
    for (int row = 0; row < groups * tokens; row++) {
        const auto piece = rows(pieces, table, axes, PIECES, memory).of(row % groups);
        const int step = row / groups;
        real top = -infinite(), total = 0, weight = 0;
        #pragma unroll 1
        for (int cut = 0; cut < cuts; cut++) {
            const real higher = piece.at(cut * tokens + step, columns);
            top = higher > top ? higher : top;
        }
        top = top == -infinite() ? real(0) : top;
        #pragma unroll 1
        for (int cut = 0; cut < cuts; cut++) {
            const real left = exp(piece.at(cut * tokens + step, columns) - top);
            total = fma(left, piece.at(cut * tokens + step, column), total);
            weight = fma(left, piece.at(cut * tokens + step, columns + 1), weight);
        }
        put(rows(o, table, axes, O, memory).of(row % groups).at(step, column), weight != 0 ? total / weight : total);
    }
}
