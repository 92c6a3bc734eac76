// What the kernels share.
#pragma once

#include <cuda_bf16.h>

#define INSTANCES(KERNEL) KERNEL(float, f32) KERNEL(double, f64)
// Of feature maps, which may be bf16; parameters are then f32.
#define INSTANCES_OF_MAPS(KERNEL) INSTANCES(KERNEL) KERNEL(__nv_bfloat16, bf16)
// For each value of a tensor: a thread a value, striding where there are more.
#define EACH(i, count)                                                                                                \
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (count);                                 \
         i += (long long)gridDim.x * blockDim.x)

__device__ inline double wide(float value) { return value; }
__device__ inline double wide(double value) { return value; }
__device__ inline double wide(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T> __device__ inline T narrow(double value) { return static_cast<T>(value); }
template <> __device__ inline __nv_bfloat16 narrow(double value) {
    return __float2bfloat16(static_cast<float>(value));
}

// The type that values of a type are computed in.
template <typename T> struct Computed { using type = T; };
template <> struct Computed<__nv_bfloat16> { using type = float; };
__device__ inline float computed(float value) { return value; }
__device__ inline double computed(double value) { return value; }
__device__ inline float computed(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T> __device__ inline T stored(float value) { return static_cast<T>(value); }
template <typename T> __device__ inline T stored(double value) { return static_cast<T>(value); }
template <> __device__ inline __nv_bfloat16 stored(float value) { return __float2bfloat16(value); }

// An activation: where it is on, values are cut off at 0 and above; NaN stays NaN, and as the bound above bounds nothing.
template <typename C> struct Clip {
    int on;
    C upper;
    __device__ C of(C x) const { return !on ? x : x <= C(0) ? C(0) : x >= upper ? upper : x; }
    // What comes from above, where it let x pass; its result tells that as well.
    __device__ C gradient(C x, C dy) const { return on && (x <= C(0) || x >= upper) ? C(0) : dy; }
};

// That of the arguments of a kernel on maps.
#define CLIP(T) Clip<Computed<T>::type>{clips, static_cast<Computed<T>::type>(upper)}

// V values beside each other, which one instruction loads.
template <typename T, int V> struct alignas(sizeof(T) * V) Values { T v[V]; };

template <int V, typename T> __device__ inline Values<T, V> values_of(const T *x, long long i) {
    return reinterpret_cast<const Values<T, V> *>(x)[i];
}

// The sum over a block of at most 1024 threads, in all of them; the order is fixed.
template <typename T> __device__ inline T block_sum(T value) {
    __shared__ T parts[33];
    for (int offset = 16; offset > 0; offset /= 2)
        value += __shfl_down_sync(0xffffffffu, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        T sum = parts[0];
        for (int warp = 1; warp < blockDim.x / 32; ++warp) sum += parts[warp];
        parts[32] = sum;
    }
    __syncthreads();
    return parts[32];
}

// The largest over a block, in all of its threads; NaN is ignored.
template <typename T> __device__ inline T block_max(T value) {
    __shared__ T parts[33];
    for (int offset = 16; offset > 0; offset /= 2)
        value = fmax(value, __shfl_down_sync(0xffffffffu, value, offset));
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        T most = parts[0];
        for (int warp = 1; warp < blockDim.x / 32; ++warp) most = fmax(most, parts[warp]);
        parts[32] = most;
    }
    __syncthreads();
    return parts[32];
}
