// What follows a product of cuBLAS in the baselines of the covariance layer: a factor of each image, the triangle,
// the transpose, bf16. Our own product (symmetric.cu) does the same where it writes.

#include "common.cuh"

template <typename T> __device__ inline void put(void *to, long long at, T value, int narrow) {
    if (narrow)
        static_cast<__nv_bfloat16 *>(to)[at] = __float2bfloat16(static_cast<float>(value));
    else
        static_cast<T *>(to)[at] = value;
}

// A thread a value; `direct`, `transposed` and `triangle` may be null.
template <typename T>
__device__ void epilogue(const T *from, const double *scale, void *direct, void *transposed, T *triangle, int rows,
                         int columns, int from_row, int scale_image, int direct_row, int transposed_row, int narrow) {
    long long image = blockIdx.y, count = (long long)rows * columns;
    T factor = scale ? static_cast<T>(scale[image * scale_image]) : T(1);
    for (long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x; at < count; at += (long long)gridDim.x * blockDim.x) {
        long long i = at / columns, j = at % columns;
        // A factor of zero means zero, also of what is not finite.
        T value = factor == T(0) ? T(0) : factor * from[(image * rows + i) * from_row + j];
        if (direct) put(direct, (image * rows + i) * direct_row + j, value, narrow);
        if (transposed) put(transposed, (image * columns + j) * transposed_row + i, value, narrow);
        if (triangle && i <= j) {
            long long n = columns;
            triangle[image * (n * (n + 1) / 2) + i * n - i * (i - 1) / 2 - i + j] = value;
        }
    }
}

#define EPILOGUE(T, NAME)                                                                                             \
    extern "C" __global__ void epilogue_##NAME(const T *from, const double *scale, void *direct, void *transposed,    \
                                               T *triangle, int rows, int columns, int from_row, int scale_image,     \
                                               int direct_row, int transposed_row, int narrow) {                      \
        epilogue(from, scale, direct, transposed, triangle, rows, columns, from_row, scale_image, direct_row,         \
                 transposed_row, narrow);                                                                             \
    }
INSTANCES(EPILOGUE)
