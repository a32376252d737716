// Kernel ridge regression, the factor:  L L^T = K + ridge I,  Y = L^-1 V.
//
// One block per memory. The factor of a prefix is the leading block of the factor of the whole, so one factorisation
// serves every query. A slot without a pair is a key that no other key knows. `real` is double whatever the data;
// `width` is 1 / bandwidth^2.

enum { KEY, PRESENT, FACTOR, VALUES, BAD };

extern "C" __global__ void __launch_bounds__(128)
kernel_ridge(const real* k, const bool* present, real* factor, real* Y, bool* bad, const long long* table, int axes,
             int pairs, int width_of_values, double ridge, double width) {
    const int memory = blockIdx.x;
    const real* key = rows(k, table, axes, KEY, memory).begin;
    const auto here = rows(present, table, axes, PRESENT, memory);
    real* L = rows(factor, table, axes, FACTOR, memory).begin;
    const auto value = rows(Y, table, axes, VALUES, memory);
    #pragma unroll 1
    for (int i = 0; i < pairs; i++)
        for (int j = threadIdx.x; j <= i; j += blockDim.x) {
            const bool both = here.at(0, i) && here.at(0, j);
            const real alike = both ? similar(key + (long long)i * K, key + (long long)j * K, width) : real(0);
            L[(long long)i * pairs + j] = alike + (i != j ? real(0) : both ? ridge : real(1));
        }
    double lost = !cholesky(L, pairs);
    for (int j = threadIdx.x; j < pairs && lost == 0; j += blockDim.x) {  // a pivot that is but rounding
        const real* own = key + (long long)j * K;
        const real pivot = L[(long long)j * (pairs + 1)], whole = here.at(0, j) ? similar(own, own, width) + ridge : real(1);
        lost += pivot * pivot <= 4 * EPS * whole;
    }
    if (over_block(lost) > 0) {
        if (threadIdx.x == 0) rows(bad, table, axes, BAD, memory).at(0, 0) = true;
        return;
    }
    for (int j = threadIdx.x; j < width_of_values; j += blockDim.x)  // a thread substitutes in a column of its own
        for (int i = 0; i < pairs; i++) {
            real y = value.at(i, j);
            for (int m = 0; m < i; m++) y = fma(-L[(long long)i * pairs + m], value.at(m, j), y);
            value.at(i, j) = y / L[(long long)i * pairs + i];
        }
}
