// Updates of all parameters in one launch, in double precision as on the CPU; and norms of their gradients.

#include "common.cuh"

// A tensor of a launch: where it and what goes with it lie, and its factors.
struct Entry {
    void *tensors[4];
    long long count;
    long long first_block; // of those that work on it
    double factors[4];
};

// Values that a block works on.
constexpr long long BLOCK = 4096;

// Which tensor this block has: the last one whose first block is not after it.
__device__ inline const Entry &entry(const Entry *entries, int tensors) {
    int low = 0, high = tensors - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (entries[middle].first_block <= blockIdx.x) low = middle;
        else high = middle - 1;
    }
    return entries[low];
}

#define EACH_OF_BLOCK(i, e)                                                                                           \
    for (long long i = (blockIdx.x - e.first_block) * BLOCK + threadIdx.x, end_of_##i = min(e.count, i - threadIdx.x + BLOCK); \
         i < end_of_##i; i += blockDim.x)

// Tensors: parameter, velocity, gradient. Factors: rate, decay.
template <typename T> __device__ void sgd(const Entry *entries, int tensors, double momentum, int nesterov) {
    const Entry &e = entry(entries, tensors);
    T *p = (T *)e.tensors[0], *v = (T *)e.tensors[1];
    const T *g = (const T *)e.tensors[2];
    double rate = e.factors[0], decay = e.factors[1];
    EACH_OF_BLOCK(i, e) {
        double gradient = g[i], parameter = p[i];
        v[i] = static_cast<T>(momentum * v[i] + gradient + decay * parameter);
        double velocity = v[i];
        p[i] = static_cast<T>(nesterov ? parameter - rate * (gradient + decay * parameter + momentum * velocity)
                                       : parameter - rate * velocity);
    }
}

// Tensors: parameter, mean, square, gradient. Factors: what is kept, size of the step, sqrt of the unbiasing of squares.
template <typename T>
__device__ void adamw(const Entry *entries, int tensors, double beta1, double beta2, double epsilon) {
    const Entry &e = entry(entries, tensors);
    T *p = (T *)e.tensors[0], *m = (T *)e.tensors[1], *s = (T *)e.tensors[2];
    const T *g = (const T *)e.tensors[3];
    EACH_OF_BLOCK(i, e) {
        double gradient = g[i];
        m[i] = static_cast<T>(beta1 * m[i] + (1 - beta1) * gradient);
        s[i] = static_cast<T>(beta2 * s[i] + (1 - beta2) * gradient * gradient);
        double mean = m[i], square = s[i];
        p[i] = static_cast<T>(e.factors[0] * p[i] - e.factors[1] * mean / (sqrt(square) * e.factors[2] + epsilon));
    }
}

// Tensors: average, value.
template <typename T> __device__ void average(const Entry *entries, int tensors, double decay) {
    const Entry &e = entry(entries, tensors);
    T *a = (T *)e.tensors[0];
    const T *p = (const T *)e.tensors[1];
    EACH_OF_BLOCK(i, e) a[i] = static_cast<T>(decay * a[i] + (1 - decay) * p[i]);
}

// Tensors: gradient. The sum of squares of each block's values.
template <typename T> __device__ void squares(const Entry *entries, int tensors, double *partial) {
    const Entry &e = entry(entries, tensors);
    const T *g = (const T *)e.tensors[0];
    double sum = 0;
    EACH_OF_BLOCK(i, e) {
        double value = g[i];
        sum += value * value;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Of each tensor: a block each.
template <typename T> __device__ void sum_squares(const Entry *entries, const double *partial, double *sums) {
    const Entry &e = entries[blockIdx.x];
    long long blocks = (e.count + BLOCK - 1) / BLOCK;
    double sum = 0;
    for (long long b = threadIdx.x; b < blocks; b += blockDim.x) sum += partial[e.first_block + b];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Tensors: gradient, what becomes of it: times a factor (of this memory, where that is given), then between -limit and
// limit; NaN stays.
template <typename T>
__device__ void clip(const Entry *entries, int tensors, double factor, const double *known, double limit) {
    if (known) factor = *known;
    const Entry &e = entry(entries, tensors);
    const T *g = (const T *)e.tensors[0];
    T *to = (T *)e.tensors[1];
    EACH_OF_BLOCK(i, e) {
        double value = g[i] * factor;
        to[i] = static_cast<T>(value > limit ? limit : value < -limit ? -limit : value);
    }
}

#define OPTIMISER(T, NAME)                                                                                            \
    extern "C" __global__ void sgd_##NAME(const Entry *entries, int tensors, double momentum, int nesterov) {         \
        sgd<T>(entries, tensors, momentum, nesterov);                                                                 \
    }                                                                                                                 \
    extern "C" __global__ void adamw_##NAME(const Entry *entries, int tensors, double beta1, double beta2,            \
                                            double epsilon) {                                                         \
        adamw<T>(entries, tensors, beta1, beta2, epsilon);                                                            \
    }                                                                                                                 \
    extern "C" __global__ void average_##NAME(const Entry *entries, int tensors, double decay) {                      \
        average<T>(entries, tensors, decay);                                                                          \
    }                                                                                                                 \
    extern "C" __global__ void squares_##NAME(const Entry *entries, int tensors, double *partial) {                   \
        squares<T>(entries, tensors, partial);                                                                        \
    }                                                                                                                 \
    extern "C" __global__ void sum_squares_##NAME(const Entry *entries, const double *partial, double *sums) {        \
        sum_squares<T>(entries, partial, sums);                                                                       \
    }                                                                                                                 \
    extern "C" __global__ void clip_##NAME(const Entry *entries, int tensors, double factor,                          \
                                           const double *known, double limit) {                                       \
        clip<T>(entries, tensors, factor, known, limit);                                                                     \
    }
INSTANCES(OPTIMISER)
