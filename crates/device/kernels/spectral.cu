// Functions of second moments by eigendecomposition, but for the decomposition (cuSOLVER) and the products
// (symmetric.cu): the features that the moment is made of, its scale, eigenvalues, divided differences.
//
// cuSOLVER's eigenvectors are columns of matrices that lie column by column: here they are rows.

#include "common.cuh"

// Features less a share of their means, times a factor, as (channel, position) and as (position, channel);
// either may be null, and so may the means. Rows after the channels are ones (times the factor), up to `size`;
// columns after the last one are zero. A block of 256 a tile of 32 x 32.
template <typename T>
__device__ void shifted(const T *features, const T *means, T *plain, T *turned, int channels, int positions, int size,
                        int plain_row, int turned_row, double share, double factor) {
    __shared__ T tile[32][33];
    int across = (positions + 31) / 32, down = (size + 31) / 32;
    long long image = blockIdx.x / (across * down);
    int at = blockIdx.x % (across * down);
    int top = at / across * 32, left = at % across * 32;
    T scale = static_cast<T>(factor), part = static_cast<T>(share);
    const T *x = features + image * channels * positions;
    int quick = threadIdx.x % 32, slow = threadIdx.x / 32;
    for (int step = slow; step < 32; step += 8) {
        int row = top + step, column = left + quick;
        T value = 0;
        if (row < size && column < positions) {
            value = scale;
            if (row < channels) {
                T feature = x[(long long)row * positions + column];
                value = (means ? feature - part * means[image * channels + row] : feature) * scale;
            }
        }
        tile[step][quick] = value;
    }
    __syncthreads();
    for (int step = slow; step < 32; step += 8) {
        if (plain && top + step < size && left + quick < plain_row)
            plain[image * size * plain_row + (long long)(top + step) * plain_row + left + quick] = tile[step][quick];
        if (turned && left + step < positions && top + quick < turned_row)
            turned[image * positions * turned_row + (long long)(left + step) * turned_row + top + quick] =
                tile[quick][step];
    }
}

// The transpose of a square matrix, with zeros after its last column. A block of 256 a tile of 32 x 32.
template <typename T> __device__ void turned(const T *from, T *to, int n, int row) {
    __shared__ T tile[32][33];
    int side = (n + 31) / 32;
    long long image = blockIdx.x / (side * side), start = image * n * row;
    int at = blockIdx.x % (side * side);
    int top = at / side * 32, left = at % side * 32;
    int quick = threadIdx.x % 32, slow = threadIdx.x / 32;
    for (int step = slow; step < 32; step += 8) {
        bool there = top + step < n && left + quick < n;
        tile[step][quick] = there ? from[start + (long long)(top + step) * row + left + quick] : T(0);
    }
    __syncthreads();
    for (int step = slow; step < 32; step += 8)
        if (left + step < n && top + quick < row)
            to[start + (long long)(left + step) * row + top + quick] = tile[quick][step];
}

// Brings each matrix near 1 by a power of two, from its largest diagonal value: the decomposition squares. Where
// the diagonal is not finite `flags` says so, and the matrix becomes zero, for which the decomposition ends.
// A block an image.
template <typename T> __device__ void near_one(T *matrices, double *scales, double *flags, int n, int row) {
    long long image = blockIdx.x;
    T *matrix = matrices + image * n * row;
    double most = 0, sum = 0;
    for (int at = threadIdx.x; at < n; at += blockDim.x) {
        double value = wide(matrix[(long long)at * row + at]);
        most = fmax(most, value);
        sum += value;
    }
    most = block_max(most);
    sum = block_sum(sum);
    bool finite = isfinite(sum);
    double scale = finite && most > 0 ? exp2(floor(log2(most))) : 1;
    if (threadIdx.x == 0) {
        scales[image] = scale;
        flags[image] = finite ? 0 : 1;
    }
    for (long long at = threadIdx.x; at < (long long)n * row; at += blockDim.x)
        matrix[at] = finite && at % row < n ? static_cast<T>(wide(matrix[at]) / scale) : T(0);
}

// Eigenvalues as they were before the scale; those that are zero up to rounding are set to it. A block an image.
template <typename T>
__device__ void spectrum(const T *raw, const double *scales, double *values, int n, double epsilon) {
    long long image = blockIdx.x;
    double most = 0;
    for (int at = threadIdx.x; at < n; at += blockDim.x) most = fmax(most, wide(raw[image * n + at]) * scales[image]);
    most = block_max(most);
    double floor = most * n * epsilon;
    for (int at = threadIdx.x; at < n; at += blockDim.x) {
        double value = wide(raw[image * n + at]) * scales[image];
        values[image * n + at] = value > floor ? value : 0;
    }
}

// The functions: (x + shift)^power, log(x + shift), and sqrt(max(x, shift)), which is flat below.
enum { POWER, LOG, FLOORED_ROOT };

__device__ inline double function(int kind, double x, double power, double shift) {
    if (kind == LOG) return log(x + shift);
    if (kind == FLOORED_ROOT) return sqrt(fmax(x, shift));
    return power == 0.5 ? sqrt(x + shift) : pow(x + shift, power);
}

// (f(a) - f(b)) / (a - b), and f' where they meet, without cancellation.
__device__ inline double divided_difference(int kind, double a, double b, double power, double shift) {
    double low = fmin(a, b), high = fmax(a, b);
    if (kind == FLOORED_ROOT)
        return high > shift ? 1 / (function(kind, a, power, shift) + function(kind, b, power, shift)) : 0;
    double bottom = low + shift, top = high + shift, gap = high - low;
    if (kind == LOG) return gap == 0 ? 1 / bottom : log1p(gap / bottom) / gap;
    // Pairs of zeros, where features have no part and the derivative is infinite.
    if (top == 0) return 0;
    if (power == 0.5) return 1 / (sqrt(bottom) + sqrt(top));
    double delta = gap / top;
    double ratio = bottom == 0 ? 1 : delta == 0 ? power : -expm1(power * log1p(-delta)) / delta;
    return pow(top, power - 1) * ratio;
}

// Row j of the eigenvectors times f of its eigenvalue.
template <typename T>
__device__ void weighted(const T *vectors, const double *values, T *to, int n, int row, int kind, double power,
                         double shift) {
    long long image = blockIdx.y, count = (long long)n * row;
    for (long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x; at < count; at += (long long)gridDim.x * blockDim.x) {
        T factor = static_cast<T>(function(kind, values[image * n + at / row], power, shift));
        to[image * count + at] = at % row < n ? vectors[image * count + at] * factor : T(0);
    }
}

// The gradient in the basis of eigenvectors, times the divided differences.
template <typename T>
__device__ void divided(T *inside, const double *values, int n, int row, int kind, double power, double shift) {
    long long image = blockIdx.y, count = (long long)n * row;
    const double *of = values + image * n;
    for (long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x; at < count; at += (long long)gridDim.x * blockDim.x) {
        int i = at / row, j = at % row;
        if (j < n) inside[image * count + at] *= static_cast<T>(divided_difference(kind, of[i], of[j], power, shift));
    }
}

#define SPECTRAL(T, NAME)                                                                                             \
    extern "C" __global__ void shifted_##NAME(const T *features, const T *means, T *plain, T *turned, int channels,   \
                                              int positions, int size, int plain_row, int turned_row, double share,   \
                                              double factor) {                                                        \
        shifted(features, means, plain, turned, channels, positions, size, plain_row, turned_row, share, factor);     \
    }                                                                                                                 \
    extern "C" __global__ void turned_##NAME(const T *from, T *to, int n, int row) { turned(from, to, n, row); }      \
    extern "C" __global__ void near_one_##NAME(T *matrices, double *scales, double *flags, int n, int row) {          \
        near_one(matrices, scales, flags, n, row);                                                                    \
    }                                                                                                                 \
    extern "C" __global__ void spectrum_##NAME(const T *raw, const double *scales, double *values, int n,             \
                                               double epsilon) {                                                      \
        spectrum(raw, scales, values, n, epsilon);                                                                    \
    }                                                                                                                 \
    extern "C" __global__ void weighted_##NAME(const T *vectors, const double *values, T *to, int n, int row,         \
                                               int kind, double power, double shift) {                                \
        weighted(vectors, values, to, n, row, kind, power, shift);                                                    \
    }                                                                                                                 \
    extern "C" __global__ void divided_##NAME(T *inside, const double *values, int n, int row, int kind,              \
                                              double power, double shift) {                                           \
        divided(inside, values, n, row, kind, power, shift);                                                          \
    }
INSTANCES(SPECTRAL)
