// The caps on the covariance of recursive least squares, as in the solver.

constexpr double LARGEST = 1e28, SLACK = 16;

// The cap on P before a pair of this energy.
__device__ double largest_before(double energy, double limit) {
    return fmin(LARGEST, limit / fmax(energy, limit / LARGEST));
}

// What recursive_least_squares_tensor.cu leaves to double precision of a memory, the greatest of what its blocks say.
constexpr float CAP = 1, REDO = 2;  // the cap at the end, everything
