// Functions of eigenvalues, around cuSOLVER's decompositions. Eigenvectors come as rows.

#include "common.cuh"

// f(x) = (x + epsilon)^power, or log(x + epsilon) for a power of 0.
struct Function { double power, epsilon; };

__device__ inline double value_of(const Function &f, double x) {
    double shifted = x + f.epsilon;
    return f.power == 0 ? log(shifted) : f.power == 0.5 ? sqrt(shifted) : pow(shifted, f.power);
}

// (f(a) - f(b)) / (a - b), and f'(a) where they meet, without the difference of the eigenvalues in the denominator.
__device__ inline double divided_difference(const Function &f, double a, double b) {
    double low = fmin(a, b), high = fmax(a, b), bottom = low + f.epsilon, top = high + f.epsilon;
    if (f.power == 0) return high == low ? 1 / bottom : log1p((high - low) / bottom) / (high - low);
    if (top == 0) return 0;
    if (f.power == 0.5) return 1 / (sqrt(bottom) + sqrt(top));
    double delta = (high - low) / top;
    double ratio = bottom == 0 ? 1 : delta == 0 ? f.power : -expm1(f.power * log1p(-delta)) / delta;
    return pow(top, f.power - 1) * ratio;
}

// Each matrix over the power of two next below its largest diagonal entry, which goes to `scales`: decompositions
// square, which f32 does not bear at both ends. A matrix that is not finite has a scale that is not. A block a matrix.
template <typename T> __device__ void near_one(const T *from, T *to, double *scales, int n) {
    const T *a = from + (long long)blockIdx.x * n * n;
    double most = 0, sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) most = fmax(most, wide(a[(long long)i * n + i]));
    most = block_max(most);
    // Not a number must show, which a maximum hides.
    for (long long i = threadIdx.x; i < (long long)n * n; i += blockDim.x) sum += wide(a[i]) * 0;
    sum = block_sum(sum);
    double scale = most > 0 ? exp2(floor(log2(most))) : 1;
    for (long long i = threadIdx.x; i < (long long)n * n; i += blockDim.x)
        to[(long long)blockIdx.x * n * n + i] = static_cast<T>(wide(a[i]) / scale);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale + sum;
}

// Eigenvalues of the matrices themselves, those set to zero that are it up to rounding. A block a matrix.
template <typename T>
__device__ void true_values(const T *raw, const double *scales, double *values, int n, double epsilon) {
    const T *w = raw + (long long)blockIdx.x * n;
    double most = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) most = fmax(most, wide(w[i]));
    most = block_max(most);
    double floor = most * n * epsilon;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        double value = wide(w[i]);
        values[(long long)blockIdx.x * n + i] = value > floor ? value * scales[blockIdx.x] : 0;
    }
}

// Row i of each matrix times f of eigenvalue i.
template <typename T>
__device__ void scale_rows(const T *vectors, const double *values, T *to, long long count, int n, double power, double epsilon) {
    EACH(i, count) {
        long long row = i / n;
        to[i] = static_cast<T>(wide(vectors[i]) * value_of(Function{power, epsilon}, values[row]));
    }
}

// Entry (i, j) times the divided difference of eigenvalues i and j.
template <typename T>
__device__ void times_differences(T *inside, const double *values, long long count, int n, double power, double epsilon) {
    EACH(k, count) {
        long long row = k / n, matrix = row / n;
        double a = values[row], b = values[matrix * n + k % n];
        inside[k] = static_cast<T>(wide(inside[k]) * divided_difference(Function{power, epsilon}, a, b));
    }
}

#define SPECTRAL(T, NAME)                                                                                             \
    extern "C" __global__ void near_one_##NAME(const T *from, T *to, double *scales, int n) {                         \
        near_one(from, to, scales, n);                                                                                \
    }                                                                                                                 \
    extern "C" __global__ void true_values_##NAME(const T *raw, const double *scales, double *values, int n,          \
                                                  double epsilon) {                                                   \
        true_values(raw, scales, values, n, epsilon);                                                                 \
    }                                                                                                                 \
    extern "C" __global__ void scale_rows_##NAME(const T *vectors, const double *values, T *to, long long count,      \
                                                 int n, double power, double epsilon) {                               \
        scale_rows(vectors, values, to, count, n, power, epsilon);                                                    \
    }                                                                                                                 \
    extern "C" __global__ void times_differences_##NAME(T *inside, const double *values, long long count, int n,      \
                                                        double power, double epsilon) {                               \
        times_differences(inside, values, count, n, power, epsilon);                                                  \
    }
INSTANCES(SPECTRAL)
