// Softmax attention over pieces of the past as one:  o = sum_c e_c o_c / sum_c e_c weight_c,  e_c = exp(top_c - top).
//
// A block has a query and 32 value columns, each of its four warps every fourth piece. A piece is a row: values, then
// its top and its weight.

enum { PIECES, O };

extern "C" __global__ void __launch_bounds__(128)
softmax_merge(const real* pieces, data* o, const long long* table, int axes, int tokens, int columns, int groups,
              int blocks, int cuts) {
    __shared__ real tops[4], totals[4][32], weights[4];
    const int memory = blockIdx.x / blocks, block = blockIdx.x % blocks, widths = (columns + 31) / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = block / widths, step = row / groups, column = block % widths * 32 + lane;
    const auto piece = rows(pieces, table, axes, PIECES, memory).of(row % groups);

    real top = -infinite();
    #pragma unroll 1
    for (int cut = threadIdx.x; cut < cuts; cut += 128) {
        const real higher = piece.at(cut * tokens + step, columns);
        top = higher > top ? higher : top;
    }
    top = top_of_row(top);
    if (lane == 0) tops[warp] = top;
    __syncthreads();  // the tops of all warps are there
    for (int w = 0; w < 4; w++) top = tops[w] > top ? tops[w] : top;
    top = top == -infinite() ? real(0) : top;

    real total = 0, weight = 0;
    #pragma unroll 4
    for (int cut = warp; cut < cuts; cut += 4) {
        const real left = exp(piece.at(cut * tokens + step, columns) - top);
        if (column < columns) total = fma(left, piece.at(cut * tokens + step, column), total);
        weight = fma(left, piece.at(cut * tokens + step, columns + 1), weight);
    }
    totals[warp][lane] = total;
    if (lane == 0) weights[warp] = weight;
    __syncthreads();  // and their sums
    if (warp > 0 || column >= columns) return;
    total = totals[0][lane] + totals[1][lane] + totals[2][lane] + totals[3][lane];
    weight = weights[0] + weights[1] + weights[2] + weights[3];
    put(rows(o, table, axes, O, memory).of(row % groups).at(step, column), weight != 0 ? total / weight : total);
}
