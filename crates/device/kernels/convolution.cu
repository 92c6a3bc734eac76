// What convolutions need beside cuDNN: filters and maps in another layout, bias and activation.

#include "common.cuh"

// Filters (out, in, taps) in the type of the parameters to (out, taps, in) in that of the maps, and gradients back.
// A filter of one tap, or channels first, is only converted: then `inputs` is 1.
template <typename T>
__device__ void pack_filter(const typename Computed<T>::type *from, T *to, long long count, int inputs, int taps) {
    EACH(i, count) {
        long long filter = i / (inputs * (long long)taps);
        int tap = i / inputs % taps, input = i % inputs;
        to[i] = stored<T>(from[(filter * inputs + input) * taps + tap]);
    }
}

template <typename T>
__device__ void unpack_filter(const T *from, typename Computed<T>::type *to, long long count, int inputs, int taps) {
    EACH(i, count) {
        long long filter = i / (inputs * (long long)taps);
        int input = i / taps % inputs, tap = i % taps;
        to[i] = computed(from[(filter * taps + tap) * inputs + input]);
    }
}

// y = y + bias, and the activation after it; `inner` values of a channel lie beside each other.
template <typename T>
__device__ void add_bias(T *y, const typename Computed<T>::type *bias, long long count, int channels, int inner,
                         Clip<typename Computed<T>::type> clip) {
    using C = typename Computed<T>::type;
    EACH(i, count) {
        C value = computed(y[i]);
        if (bias) value += bias[i / inner % channels];
        y[i] = stored<T>(clip.of(value));
    }
}

// Each image's (rows, columns) to (columns, rows): between channels first and channels last. Blocks of 32 x 8 threads
// for tiles of 32 x 32; `across` tiles beside each other.
template <typename T> __device__ void transpose(const T *from, T *to, int rows, int columns, int across) {
    __shared__ T tile[32][33];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int left = blockIdx.x % across * 32, top = blockIdx.x / across * 32;
    long long image = (long long)blockIdx.y * rows * columns;
    for (int r = warp; r < 32; r += 8)
        if (top + r < rows && left + lane < columns)
            tile[r][lane] = from[image + (long long)(top + r) * columns + left + lane];
    __syncthreads();
    for (int c = warp; c < 32; c += 8)
        if (left + c < columns && top + lane < rows)
            to[image + (long long)(left + c) * rows + top + lane] = tile[lane][c];
}

// y += x.
template <typename T> __device__ void add_to(const T *x, T *y, long long count) {
    EACH(i, count) y[i] = stored<T>(computed(y[i]) + computed(x[i]));
}

#define CONVOLUTION(T, NAME)                                                                                          \
    extern "C" __global__ void pack_filter_##NAME(const Computed<T>::type *from, T *to, long long count, int inputs,  \
                                                  int taps) {                                                         \
        pack_filter(from, to, count, inputs, taps);                                                                   \
    }                                                                                                                 \
    extern "C" __global__ void unpack_filter_##NAME(const T *from, Computed<T>::type *to, long long count,            \
                                                    int inputs, int taps) {                                           \
        unpack_filter(from, to, count, inputs, taps);                                                                 \
    }                                                                                                                 \
    extern "C" __global__ void add_bias_##NAME(T *y, const Computed<T>::type *bias, long long count, int channels,    \
                                               int inner, int clips, double upper) {                                  \
        add_bias(y, bias, count, channels, inner, CLIP(T));                                                           \
    }                                                                                                                 \
    extern "C" __global__ void transpose_##NAME(const T *from, T *to, int rows, int columns, int across) {            \
        transpose(from, to, rows, columns, across);                                                                   \
    }                                                                                                                 \
    extern "C" __global__ void add_to_##NAME(const T *x, T *y, long long count) { add_to(x, y, count); }
INSTANCES_OF_MAPS(CONVOLUTION)
