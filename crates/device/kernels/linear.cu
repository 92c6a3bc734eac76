// What a linear layer and the loss need beside products.

#include "common.cuh"

// y[row][column] = bias[column], which the product is added to.
template <typename T> __device__ void spread(const T *bias, T *y, long long count, int columns) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += (long long)gridDim.x * blockDim.x)
        y[i] = bias[i % columns];
}

// sums[column] = sum over rows of x: a thread a column, in the order of the rows.
template <typename T> __device__ void column_sums(const T *x, T *sums, int rows, int columns) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    T sum = 0;
    for (int row = 0; row < rows; ++row) sum += x[(long long)row * columns + column];
    sums[column] = sum;
}

// Of each row: its largest value, the logarithm of the sum of exponentials above it, and its share of the loss.
// A block a row.
template <typename T>
__device__ void log_sums(const T *logits, const unsigned *labels, double *facts, int classes, double smoothing) {
    const T *row = logits + (long long)blockIdx.x * classes;
    double largest = -INFINITY;
    for (int k = threadIdx.x; k < classes; k += blockDim.x) largest = fmax(largest, wide(row[k]));
    largest = block_max(largest);
    double exponentials = 0, all = 0;
    for (int k = threadIdx.x; k < classes; k += blockDim.x) {
        exponentials += exp(wide(row[k]) - largest);
        all += wide(row[k]) - largest;
    }
    double log_sum = log(block_sum(exponentials));
    all = block_sum(all) - classes * log_sum;
    if (threadIdx.x != 0) return;
    double share = smoothing / classes, right = wide(row[labels[blockIdx.x]]) - largest - log_sum;
    double *fact = facts + 3ll * blockIdx.x;
    fact[0] = largest;
    fact[1] = log_sum;
    // A share of nothing is nothing, also of what is not finite.
    fact[2] = -(1 - smoothing) * right - (share == 0 ? 0 : share * all);
}

// The mean of the rows' shares: one block.
template <typename T> __device__ void mean_loss(const double *facts, T *loss, int rows) {
    double sum = 0;
    for (int row = threadIdx.x; row < rows; row += blockDim.x) sum += facts[3ll * row + 2];
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[0] = static_cast<T>(sum / rows);
}

// The gradient of the mean loss by the logits, times the gradient of the loss.
template <typename T>
__device__ void loss_gradient(const T *logits, const unsigned *labels, const double *facts, const T *upstream, T *gradient,
                              int rows, int classes, double smoothing) {
    long long count = (long long)rows * classes;
    double factor = wide(upstream[0]) / rows, share = smoothing / classes;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += (long long)gridDim.x * blockDim.x) {
        long long row = i / classes;
        double target = share + (i % classes == labels[row] ? 1 - smoothing : 0);
        double probability = exp(wide(logits[i]) - facts[3 * row] - facts[3 * row + 1]);
        gradient[i] = static_cast<T>(factor * (probability - target));
    }
}

#define LINEAR(T, NAME)                                                                                               \
    extern "C" __global__ void spread_##NAME(const T *bias, T *y, long long count, int columns) {                     \
        spread(bias, y, count, columns);                                                                              \
    }                                                                                                                 \
    extern "C" __global__ void column_sums_##NAME(const T *x, T *sums, int rows, int columns) {                       \
        column_sums(x, sums, rows, columns);                                                                          \
    }                                                                                                                 \
    extern "C" __global__ void log_sums_##NAME(const T *logits, const unsigned *labels, double *facts, int classes,   \
                                               double smoothing) {                                                    \
        log_sums(logits, labels, facts, classes, smoothing);                                                          \
    }                                                                                                                 \
    extern "C" __global__ void mean_loss_##NAME(const double *facts, T *loss, int rows) {                             \
        mean_loss(facts, loss, rows);                                                                                 \
    }                                                                                                                 \
    extern "C" __global__ void loss_gradient_##NAME(const T *logits, const unsigned *labels, const double *facts,     \
                                                    const T *upstream, T *gradient, int rows, int classes,            \
                                                    double smoothing) {                                               \
        loss_gradient(logits, labels, facts, upstream, gradient, rows, classes, smoothing);                           \
    }
INSTANCES(LINEAR)
