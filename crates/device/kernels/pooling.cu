// The covariance layer, but for its products (symmetric.cu): statistics, centring, the divisor, what the
// gradient starts from and ends in. Matrices of the layer have rows that are a multiple of 16 bytes apart,
// with zeros after their last column.
//
// Each image has a row of FACTS doubles, which are computed on the device and never read back:
//   DIVISOR   s, 0 for constant features, 1 for the plain covariance
//   EXPONENT  2^e: features were divided by it
//   FORWARD   what the last product of the forward pass is multiplied by
//   UPSTREAM  what the gradient of the output is multiplied by
//   DELTA     the part of the gradient that goes through the divisor
//   INVERSE   1/s
//   LAST      what the gradient of the features is multiplied by
//   OUT       what the scaled output was multiplied by, 2^e where it is compensated

#include "common.cuh"

constexpr int FACTS = 8;
enum { DIVISOR, EXPONENT, FORWARD, UPSTREAM, DELTA, INVERSE, LAST, OUT };

// Means of the channels, and the largest distance of a feature from them: a block a channel of an image.
// From the first value on, so that the mean of equal values is exact.
template <typename F, typename T>
__device__ void row_statistics(const F *features, T *means, double *distances, int positions) {
    long long row = blockIdx.x;
    const F *x = features + row * positions;
    double sum = 0, first = wide(x[0]);
    for (int at = threadIdx.x; at < positions; at += blockDim.x) sum += wide(x[at]) - first;
    T mean = static_cast<T>(first + block_sum(sum) / positions);
    double most = 0;
    for (int at = threadIdx.x; at < positions; at += blockDim.x) most = fmax(most, fabs(wide(x[at]) - wide(mean)));
    most = block_max(most);
    if (threadIdx.x == 0) {
        means[row] = mean;
        distances[row] = most;
    }
}

// The scale 2^e of each image, from the largest distance: squares neither overflow nor vanish. A block an image.
__device__ inline void exponent(const double *distances, double *facts, int channels) {
    long long image = blockIdx.x;
    double most = 0;
    for (int at = threadIdx.x; at < channels; at += blockDim.x) most = fmax(most, distances[image * channels + at]);
    most = block_max(most);
    if (threadIdx.x != 0) return;
    double e = most > 0 && isfinite(most) ? ceil(log2(most)) : 0;
    facts[image * FACTS + EXPONENT] = exp2(fmin(fmax(e, -100.0), 100.0));
}
extern "C" __global__ void exponent_f64(const double *distances, double *facts, int channels) {
    exponent(distances, facts, channels);
}

// Centred features times `factor / 2^e`, as (channel, position) and as (position, channel); either may be null.
// A block of 256 a tile of 32 x 32.
template <typename F, typename T>
__device__ void centre(const F *features, const T *means, const double *facts, T *plain, T *transposed, int channels,
                       int positions, int plain_row, int transposed_row, double factor) {
    __shared__ T tile[32][33];
    int across = (positions + 31) / 32, down = (channels + 31) / 32;
    long long image = blockIdx.x / (across * down);
    int at = blockIdx.x % (across * down);
    int top = at / across * 32, left = at % across * 32;
    T scale = static_cast<T>(factor / facts[image * FACTS + EXPONENT]);
    const F *x = features + image * channels * positions;
    // Neighbours in memory go to neighbouring threads, before and after the tile is turned.
    int quick = threadIdx.x % 32, slow = threadIdx.x / 32;
    for (int step = slow; step < 32; step += 8) {
        T value = 0;
        if (top + step < channels && left + quick < positions) {
            T feature = computed(x[(long long)(top + step) * positions + left + quick]);
            value = (feature - means[image * channels + top + step]) * scale;
        }
        tile[step][quick] = value;
    }
    __syncthreads();
    for (int step = slow; step < 32; step += 8) {
        if (plain && top + step < channels && left + quick < plain_row)
            plain[image * channels * plain_row + (long long)(top + step) * plain_row + left + quick] = tile[step][quick];
        if (transposed && left + step < positions && top + quick < transposed_row)
            transposed[image * positions * transposed_row + (long long)(left + step) * transposed_row + top + quick] =
                tile[quick][step];
    }
}

// What the norm of the layer is made of, and what follows from it, a block an image.
//   order 0: s = 2^-2e; 1: s = tr K; 2: s = |K|; 8: first 1/tr K, then (stage 1) the norm of K^4 to the 1/4
// `gram`: the result is (c/s) X q(K) X', else c f(A). `compensated`: c = sqrt(s), else 1.
template <typename T>
__device__ void divisor(const T *k, double *facts, int n, int row, int order, int stage, int gram, int compensated,
                        double factor) {
    long long image = blockIdx.x;
    const T *matrix = k + image * n * row;
    double *fact = facts + image * FACTS;
    double sum = 0;
    if (order == 2 || stage == 1) {
        for (long long at = threadIdx.x; at < (long long)n * row; at += blockDim.x) sum += wide(matrix[at]) * wide(matrix[at]);
    }
    sum = block_sum(sum);
    double trace = 0;
    for (int at = threadIdx.x; at < n; at += blockDim.x) trace += wide(matrix[(long long)at * row + at]);
    trace = block_sum(trace);
    if (threadIdx.x != 0) return;
    double scale = fact[EXPONENT], s = trace;
    if (order == 0) s = 1 / (scale * scale);
    if (order == 2) s = sqrt(sum);
    if (stage == 1) s = fact[DIVISOR] * pow(sum, 1.0 / 8.0);
    // Constant features: zeros, and zero gradients. A trace that is not a number stays one.
    if (stage == 0 ? trace <= 0 : fact[DIVISOR] == 0) s = 0;
    double c = compensated ? sqrt(s) : 1, out = compensated ? scale : 1;
    // For the scaling that follows: by stage 1 the matrix has been divided by the trace already.
    fact[INVERSE] = s == 0 ? 0 : stage == 1 ? fact[DIVISOR] / s : 1 / s;
    fact[DIVISOR] = s;
    fact[FORWARD] = s == 0 ? 0 : gram ? c / s * out : c * out;
    fact[UPSTREAM] = s == 0 ? 0 : gram ? c / s : c;
    fact[LAST] = s == 0 ? 0 : 2 * out * factor / scale;
    fact[OUT] = out;
}

// K <- K / s.
template <typename T> __device__ void normalise(T *k, const double *facts, long long values) {
    long long image = blockIdx.y;
    double inverse = facts[image * FACTS + INVERSE];
    T scale = static_cast<T>(inverse);
    T *matrix = k + image * values;
    for (long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x; at < values; at += (long long)gridDim.x * blockDim.x)
        matrix[at] = inverse == 0 ? T(0) : matrix[at] * scale;
}

// Facts of the plain covariance: a thread an image.
__device__ inline void plain_facts(double *facts, int images, double factor) {
    long long image = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (image >= images) return;
    double *fact = facts + image * FACTS, scale = fact[EXPONENT];
    fact[DIVISOR] = fact[UPSTREAM] = fact[INVERSE] = 1;
    fact[FORWARD] = scale * scale;
    fact[OUT] = scale * scale;
    fact[LAST] = 2 * scale * factor;
}
extern "C" __global__ void plain_facts_f64(double *facts, int images, double factor) {
    plain_facts(facts, images, factor);
}

// The gradient of the output as a symmetric matrix, times UPSTREAM where there are facts.
template <typename T>
__device__ void upstream(const T *gradient, const double *facts, T *matrix, int d, int row, int triangle) {
    long long image = blockIdx.y, values = (long long)d * row;
    T scale = facts ? static_cast<T>(facts[image * FACTS + UPSTREAM]) : T(1);
    const T *g = gradient + image * (triangle ? (long long)d * (d + 1) / 2 : (long long)d * d);
    for (long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x; at < values; at += (long long)gridDim.x * blockDim.x) {
        long long i = at / row, j = at % row;
        T value = 0;
        if (j < d && scale != T(0)) {
            if (triangle) {
                long long low = i < j ? i : j, high = i < j ? j : i;
                value = g[low * d - low * (low - 1) / 2 + high - low];
                if (i != j) value *= T(0.5);
            } else {
                value = T(0.5) * (g[i * d + j] + g[j * d + i]);
            }
            value *= scale;
        }
        matrix[image * values + at] = value;
    }
}

// DELTA from <gradient, output> and <tangent, K>: a block an image. `through` is what the first has a share of.
template <typename T>
__device__ void delta(const T *gradient, const T *output, const T *tangent, const T *k, double *facts, long long outputs,
                      long long values, double through) {
    long long image = blockIdx.x;
    double first = 0, second = 0;
    for (long long at = threadIdx.x; at < outputs; at += blockDim.x)
        first += wide(gradient[image * outputs + at]) * wide(output[image * outputs + at]);
    for (long long at = threadIdx.x; at < values; at += blockDim.x)
        second += wide(tangent[image * values + at]) * wide(k[image * values + at]);
    first = block_sum(first);
    second = block_sum(second);
    if (threadIdx.x != 0) return;
    double *fact = facts + image * FACTS;
    first /= fact[OUT];
    fact[DELTA] = fact[DIVISOR] == 0 ? 0 : (through * first - second) / fact[DIVISOR];
}

// tangent <- tangent / s + DELTA * power, or DELTA * I where there is no power; without either, tangent / s.
template <typename T>
__device__ void through_divisor(T *tangent, const T *power, const double *facts, int n, int row, int order) {
    long long image = blockIdx.y, values = (long long)n * row;
    double s = facts[image * FACTS + DIVISOR], part = facts[image * FACTS + DELTA];
    T inverse = static_cast<T>(s == 0 ? 0 : 1 / s), delta = static_cast<T>(part);
    for (long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x; at < values; at += (long long)gridDim.x * blockDim.x) {
        long long place = image * values + at;
        T value = s == 0 ? T(0) : tangent[place] * inverse;
        if (order == 1 && at / row == at % row) value += delta;
        if (order > 1) value += delta * power[place];
        tangent[place] = value;
    }
}

// target <- first * a + second * b + diagonal * I; b may be null.
template <typename T>
__device__ void combine(T *target, const T *a, const T *b, int n, int row, double first, double second, double diagonal) {
    long long image = blockIdx.y, values = (long long)n * row;
    for (long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x; at < values; at += (long long)gridDim.x * blockDim.x) {
        long long place = image * values + at;
        T value = a ? static_cast<T>(first) * a[place] : T(0);
        if (b) value += static_cast<T>(second) * b[place];
        if (at / row == at % row) value += static_cast<T>(diagonal);
        target[place] = value;
    }
}

// Features of type F, computed with in type T.
#define FEATURES(F, T, NAME)                                                                                          \
    extern "C" __global__ void row_statistics_##NAME(const F *features, T *means, double *distances, int positions) { \
        row_statistics(features, means, distances, positions);                                                        \
    }                                                                                                                 \
    extern "C" __global__ void centre_##NAME(const F *features, const T *means, const double *facts, T *plain,        \
                                             T *transposed, int channels, int positions, int plain_row,               \
                                             int transposed_row, double factor) {                                     \
        centre(features, means, facts, plain, transposed, channels, positions, plain_row, transposed_row, factor);    \
    }
FEATURES(float, float, f32)
FEATURES(double, double, f64)
FEATURES(__nv_bfloat16, float, bf16)

#define MATRICES(T, NAME)                                                                                             \
    extern "C" __global__ void divisor_##NAME(const T *k, double *facts, int n, int row, int order, int stage,        \
                                              int gram, int compensated, double factor) {                             \
        divisor(k, facts, n, row, order, stage, gram, compensated, factor);                                           \
    }                                                                                                                 \
    extern "C" __global__ void normalise_##NAME(T *k, const double *facts, long long values) {                        \
        normalise(k, facts, values);                                                                                  \
    }                                                                                                                 \
    extern "C" __global__ void upstream_##NAME(const T *gradient, const double *facts, T *matrix, int d, int row,     \
                                               int triangle) {                                                        \
        upstream(gradient, facts, matrix, d, row, triangle);                                                          \
    }                                                                                                                 \
    extern "C" __global__ void delta_##NAME(const T *gradient, const T *output, const T *tangent, const T *k,         \
                                            double *facts, long long outputs, long long values, double through) {     \
        delta(gradient, output, tangent, k, facts, outputs, values, through);                                         \
    }                                                                                                                 \
    extern "C" __global__ void through_divisor_##NAME(T *tangent, const T *power, const double *facts, int n,         \
                                                      int row, int order) {                                           \
        through_divisor(tangent, power, facts, n, row, order);                                                        \
    }                                                                                                                 \
    extern "C" __global__ void combine_##NAME(T *target, const T *a, const T *b, int n, int row, double first,        \
                                              double second, double diagonal) {                                       \
        combine(target, a, b, n, row, first, second, diagonal);                                                       \
    }
INSTANCES(MATRICES)
