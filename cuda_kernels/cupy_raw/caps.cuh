// The caps on the covariance of recursive least squares, as in the solver.

constexpr double LARGEST = 1e28, SLACK = 16;

// The cap on P before a pair of this energy.
__device__ double largest_before(double energy, double limit) {
    return fmin(LARGEST, limit / fmax(energy, limit / LARGEST));
}
