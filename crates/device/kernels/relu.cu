// Rectifiers; NaN stays NaN, and the derivative at 0 is 0.

#include "common.cuh"

template <typename T> __device__ inline T clipped(T x, T upper) { return x <= T(0) ? T(0) : x >= upper ? upper : x; }

// y = min(max(x, 0), upper); an upper bound that is not a number bounds nothing.
template <typename T> __device__ void clip(const T *x, T *y, long long count, double upper) {
    T bound = static_cast<T>(upper);
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += (long long)gridDim.x * blockDim.x)
        y[i] = clipped(x[i], bound);
}

// y = max(a + b, 0).
template <typename T> __device__ void add_relu(const T *a, const T *b, T *y, long long count) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += (long long)gridDim.x * blockDim.x) {
        T sum = a[i] + b[i];
        y[i] = sum <= T(0) ? T(0) : sum;
    }
}

// dx = dy where y lies between 0 and the bound.
template <typename T> __device__ void clip_gradient(const T *y, const T *dy, T *dx, long long count, double upper) {
    T bound = static_cast<T>(upper);
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += (long long)gridDim.x * blockDim.x)
        dx[i] = y[i] <= T(0) || y[i] >= bound ? T(0) : dy[i];
}

#define RELU(T, NAME)                                                                                                 \
    extern "C" __global__ void clip_##NAME(const T *x, T *y, long long count, double upper) {                        \
        clip(x, y, count, upper);                                                                                     \
    }                                                                                                                 \
    extern "C" __global__ void add_relu_##NAME(const T *a, const T *b, T *y, long long count) {                       \
        add_relu(a, b, y, count);                                                                                     \
    }                                                                                                                 \
    extern "C" __global__ void clip_gradient_##NAME(const T *y, const T *dy, T *dx, long long count, double upper) {  \
        clip_gradient(y, dy, dx, count, upper);                                                                       \
    }
INSTANCES_OF_MAPS(RELU)
