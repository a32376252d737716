// Test-time training, token by token: gradient descent on a memory of LAYERS layers while the sequence is read.
//
//     S = momentum_t S - step_size_t g_t,    M = (1 - weight_decay_t) M + S,    o_t = m(q_t) with parameters M
//
// with gradients g_t at the start of each mini-batch, where the parameters are kept as `anchor`. One block per memory:
// threads take turns at the columns of a layer, and a warp at a row on the way back. `real` is double whatever the data:
// the parameters are rounded at every token. Vectors lie in `vectors`, which one block has to itself.

enum { Q, KEY, V, STEP, MOMENTUM, DECAY, MASK, SCALE, OFFSET, STATE, ROLL, ANCHOR, COUNT, VECTORS, O };
enum { NONE, GELU, SILU, RELU, TANH };
enum { SQUARED, HUBER, EACH, POWER };

constexpr real ROOT = 0.7978845608028654, CUBE = 0.044715, NORM_EPS = 1e-6;  // of gelu; of the layer norm

__device__ __forceinline__ int width(int layer) { return layer == 0 ? KEYS : layer == LAYERS ? VALUES : HIDDEN; }
// Where a layer's parameters begin, what it is given, and what it sums.
__device__ __forceinline__ int first(int layer) {
    return layer == 0 ? 0 : (KEYS + BIAS) * HIDDEN + (layer - 1) * (HIDDEN + BIAS) * HIDDEN;
}
__device__ __forceinline__ int given(int layer) { return layer == 0 ? 0 : KEYS + (layer - 1) * HIDDEN; }
__device__ __forceinline__ int summed(int layer) { return KEYS + (LAYERS - 1) * HIDDEN + layer * HIDDEN; }
constexpr int ALL = KEYS + 2 * (LAYERS - 1) * HIDDEN + VALUES;  // numbers of inputs and sums; slopes come after them

__device__ real sigmoid(real x) { return 1 / (1 + exp(-x)); }
__device__ real activated(real x) {
    if (ACTIVATION == GELU) return x * sigmoid(2 * ROOT * (x + CUBE * x * x * x));
    if (ACTIVATION == SILU) return x * sigmoid(x);
    if (ACTIVATION == RELU) return x <= 0 ? real(0) : x;
    return tanh(x);
}
__device__ real slope(real x) {  // of the activation
    if (ACTIVATION == RELU) return x > 0 ? real(1) : x * 0;
    if (ACTIVATION == TANH) return 1 - tanh(x) * tanh(x);
    const real s = sigmoid(ACTIVATION == GELU ? 2 * ROOT * (x + CUBE * x * x * x) : x);
    const real inner = ACTIVATION == GELU ? 2 * ROOT * (1 + 3 * CUBE * x * x) : real(1);
    return s + x * s * (1 - s) * inner;
}

// What every layer is given and sums, from the inputs of the first.
__device__ void forward(const real* parameters, real* vectors) {
    for (int layer = 0; layer < LAYERS; layer++) {
        const int rows = width(layer), columns = width(layer + 1);
        const real* weight = parameters + first(layer);
        __syncthreads();  // what this layer is given is there
        for (int j = threadIdx.x; j < columns; j += blockDim.x) {
            real total = BIAS ? weight[rows * columns + j] : real(0);
            for (int i = 0; i < rows; i++) total = fma(vectors[given(layer) + i], weight[i * columns + j], total);
            vectors[summed(layer) + j] = total;
            if (layer + 1 < LAYERS) vectors[given(layer + 1) + j] = activated(total);
        }
    }
}

// Sum over the values of what each thread finds for its own; their deviation around a mean.
template <class F>
__device__ real over_values(F number) {
    real total = 0;
    for (int j = threadIdx.x; j < VALUES; j += blockDim.x) total += number(j);
    return over_block(total);
}

struct Normal {
    real mean, deviation;
};

__device__ Normal normal(const real* z) {
    if (!LAYER_NORM) return {0, 1};
    const real mean = over_values([&](int j) { return z[j]; }) / VALUES;
    const real variance = over_values([&](int j) { return (z[j] - mean) * (z[j] - mean); }) / VALUES;
    return {mean, sqrt(variance + NORM_EPS)};
}

struct Affine {  // of the layer norm
    Rows<const real> scale, offset;
    bool scaled, moved;

    __device__ real of(real z, Normal n, int j) const {
        if (!LAYER_NORM) return z;
        z = (z - n.mean) / n.deviation;
        z = scaled ? z * scale.at(0, j) : z;
        return moved ? z + offset.at(0, j) : z;
    }
};

// Slope of the loss in what the last layer sums; `error` holds the error and then the slope.
__device__ void last_slope(const real* z, real* error, Normal n, const Affine& affine, real number) {
    real length = 1;
    if (LOSS == HUBER) length = fmax(sqrt(over_values([&](int j) { return error[j] * error[j]; })), number);
    for (int j = threadIdx.x; j < VALUES; j += blockDim.x) {
        const real e = error[j];
        if (LOSS == HUBER) error[j] = e * (number / length);
        if (LOSS == EACH) error[j] = e * (number / fmax(fabs(e), number));
        if (LOSS == POWER) error[j] = e == 0 ? real(0) : copysign(number * pow(fabs(e), number - 1), e);
        if (LAYER_NORM && affine.scaled) error[j] *= affine.scale.at(0, j);
    }
    if (!LAYER_NORM) return;  // its mean and its part along the normalised sums change nothing
    const real mean = over_values([&](int j) { return error[j]; }) / VALUES;
    const real along = over_values([&](int j) { return error[j] * (z[j] - n.mean) / n.deviation; }) / VALUES;
    for (int j = threadIdx.x; j < VALUES; j += blockDim.x)
        error[j] = (error[j] - mean - (z[j] - n.mean) / n.deviation * along) / n.deviation;
}

// Slopes of all layers before the last, from the last to the first.
__device__ void backward(const real* parameters, const real* vectors, real* slopes) {
    for (int layer = LAYERS - 1; layer > 0; layer--) {
        const int columns = width(layer + 1);
        const real* weight = parameters + first(layer);
        __syncthreads();  // the slopes of this layer are there
        for (int i = threadIdx.x / 32; i < HIDDEN; i += blockDim.x / 32) {
            const real total = dot_of_warp(weight + i * columns, slopes + layer * HIDDEN, columns);
            if (threadIdx.x % 32 == 0)
                slopes[(layer - 1) * HIDDEN + i] = total * slope(vectors[summed(layer - 1) + i]);
        }
    }
}

// One step of the descent, of one number; it belongs to the same thread every time.
__device__ void step(real& m, real* roll, real gradient, real size, real again, real keep) {
    const real pushed = roll ? fma(again, *roll, -size * gradient) : -size * gradient;
    if (roll) *roll = pushed;
    m = fma(keep, m, pushed);
}

extern "C" __global__ void __launch_bounds__(128)
test_time_training(const data* q, const data* k, const data* v, const gate* step_size, const gate* momentum,
                   const gate* weight_decay, const bool* mask, const real* scale, const real* offset,
                   real* parameters, real* roll, real* anchor, long long* count, real* vectors, data* o,
                   const long long* table, int axes, int tokens, int groups, int batch_size, double number) {
    const int memory = blockIdx.x, thread = threadIdx.x;
    const auto query = rows(q, table, axes, Q, memory);
    const auto key = rows(k, table, axes, KEY, memory);
    const auto value = rows(v, table, axes, V, memory);
    const auto size = rows(step_size, table, axes, STEP, memory);
    const auto again = rows(momentum, table, axes, MOMENTUM, memory);
    const auto decay = rows(weight_decay, table, axes, DECAY, memory);
    const auto seen = rows(mask, table, axes, MASK, memory);
    const auto answer = rows(o, table, axes, O, memory);
    const Affine affine = {rows(scale, table, axes, SCALE, memory), rows(offset, table, axes, OFFSET, memory),
                           scale != nullptr, offset != nullptr};
    real* M = rows(parameters, table, axes, STATE, memory).begin;
    real* S = roll ? rows(roll, table, axes, ROLL, memory).begin : nullptr;
    real* A = rows(anchor, table, axes, ANCHOR, memory).begin;
    real* x = rows(vectors, table, axes, VECTORS, memory).begin;
    real* z = x + summed(LAYERS - 1);
    real* slopes = x + ALL;
    real* error = slopes + (LAYERS - 1) * HIDDEN;
    auto& taken = rows(count, table, axes, COUNT, memory).at(0, 0);
    long long batch = taken;

    #pragma unroll 1
    for (int t = 0; t < tokens; t++) {
        __syncthreads();  // nobody is left at the token before
        if (!mask || seen.at(t, 0)) {
            for (int i = thread; i < KEYS; i += blockDim.x) x[i] = widened(key.at(t, i));
            forward(A, x);
            const Normal n = normal(z);
            for (int j = thread; j < VALUES; j += blockDim.x)
                error[j] = affine.of(z[j], n, j) + (RESIDUAL ? x[j] : real(0)) - widened(value.at(t, j));
            last_slope(z, error, n, affine, number);
            backward(A, x, slopes);
            __syncthreads();  // all slopes are there
            const real length = size.at(t, 0), again_t = momentum ? real(again.at(t, 0)) : real(0);
            const real keep = 1 - (weight_decay ? real(decay.at(t, 0)) : real(0));
            batch++;
            for (int layer = 0; layer < LAYERS; layer++) {
                const int height = width(layer), columns = width(layer + 1), begin = first(layer);
                for (int j = thread; j < columns; j += blockDim.x) {
                    const real delta = slopes[layer * HIDDEN + j];
                    for (int i = 0; i < height + BIAS; i++) {
                        const int at = begin + i * columns + j;
                        const real input = i < height ? x[given(layer) + i] : real(1);
                        step(M[at], S ? S + at : nullptr, input * delta, length, again_t, keep);
                        if (batch == batch_size) A[at] = M[at];
                    }
                }
            }
            batch = batch == batch_size ? 0 : batch;
        }
        #pragma unroll 1
        for (int g = 0; g < groups; g++) {  // the queries that share this memory
            __syncthreads();  // nobody reads the vectors of the token, or of the query before
            for (int i = thread; i < KEYS; i += blockDim.x) x[i] = widened(query.of(g).at(t, i));
            forward(M, x);
            const Normal n = normal(z);
            for (int j = thread; j < VALUES; j += blockDim.x)
                put(answer.of(g).at(t, j), gate(affine.of(z[j], n, j) + (RESIDUAL ? x[j] : real(0))));
        }
    }
    if (thread == 0) taken = batch;
}
