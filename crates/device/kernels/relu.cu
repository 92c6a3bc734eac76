// Rectifiers; NaN stays NaN, and the derivative at 0 is 0. Each kernel takes values one by one, or (`wide`) those of
// 16 bytes at once.

#include "common.cuh"

// y = min(max(x, 0), upper).
template <int V, typename T> __device__ void clip(const T *x, T *y, long long count, double upper) {
    Clip<T> clip{1, static_cast<T>(upper)};
    EACH(i, count / V) {
        Values<T, V> values = values_of<V>(x, i);
#pragma unroll
        for (int k = 0; k < V; ++k) values.v[k] = clip.of(values.v[k]);
        reinterpret_cast<Values<T, V> *>(y)[i] = values;
    }
}

// y = max(a + b, 0).
template <int V, typename T> __device__ void add_relu(const T *a, const T *b, T *y, long long count) {
    EACH(i, count / V) {
        Values<T, V> first = values_of<V>(a, i), second = values_of<V>(b, i);
#pragma unroll
        for (int k = 0; k < V; ++k) {
            T sum = first.v[k] + second.v[k];
            first.v[k] = sum <= T(0) ? T(0) : sum;
        }
        reinterpret_cast<Values<T, V> *>(y)[i] = first;
    }
}

// dx = dy where y lies between 0 and the bound.
template <int V, typename T> __device__ void clip_gradient(const T *y, const T *dy, T *dx, long long count, double upper) {
    Clip<T> clip{1, static_cast<T>(upper)};
    EACH(i, count / V) {
        Values<T, V> value = values_of<V>(y, i), up = values_of<V>(dy, i);
#pragma unroll
        for (int k = 0; k < V; ++k) up.v[k] = clip.gradient(value.v[k], up.v[k]);
        reinterpret_cast<Values<T, V> *>(dx)[i] = up;
    }
}

#define RELU_OF(T, NAME, V)                                                                                           \
    extern "C" __global__ void clip##NAME(const T *x, T *y, long long count, double upper) {                          \
        clip<V>(x, y, count, upper);                                                                                  \
    }                                                                                                                 \
    extern "C" __global__ void add_relu##NAME(const T *a, const T *b, T *y, long long count) {                        \
        add_relu<V>(a, b, y, count);                                                                                  \
    }                                                                                                                 \
    extern "C" __global__ void clip_gradient##NAME(const T *y, const T *dy, T *dx, long long count, double upper) {   \
        clip_gradient<V>(y, dy, dx, count, upper);                                                                    \
    }
#define RELU(T, NAME) RELU_OF(T, _##NAME, 1) RELU_OF(T, _wide_##NAME, 16 / sizeof(T))
INSTANCES_OF_MAPS(RELU)
