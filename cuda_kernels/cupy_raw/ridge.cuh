// The kernels of kernel ridge regression, between rows of keys in double precision and points of any format.
enum { GAUSSIAN, EXPONENTIAL, LINEAR, POLYNOMIAL };

template <class Point>
__device__ real similar(const real* key, const Point& point, real width) {
    real total = 0;
    for (int p = 0; p < K; p++) {
        const real x = widened(point[p]);
        total = KIND == GAUSSIAN ? fma(x - key[p], x - key[p], total) : fma(x, key[p], total);
    }
    if (KIND == GAUSSIAN) return exp(-total / 2 * width);
    if (KIND == EXPONENTIAL) return exp(total * width);
    return KIND == POLYNOMIAL ? (1 + total) * (1 + total) : total;
}
