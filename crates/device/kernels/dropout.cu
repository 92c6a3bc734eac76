// Dropout by Philox4x32-10 (Salmon et al. 2011), with the masks of the CPU: word w of lane l of block b of 64 values
// is value 64 b + 16 w + l, the counter (16 b + l, step).

#include "common.cuh"

__device__ inline uint4 philox(unsigned long long number, unsigned long long step, unsigned long long key) {
    unsigned c0 = number, c1 = number >> 32, c2 = step, c3 = step >> 32, k0 = key, k1 = key >> 32;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        unsigned long long a = 0xd2511f53ull * c0, b = 0xcd9e8d57ull * c2;
        c0 = (unsigned)(b >> 32) ^ c1 ^ k0;
        c1 = (unsigned)b;
        c2 = (unsigned)(a >> 32) ^ c3 ^ k1;
        c3 = (unsigned)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// A thread a counter: four values, 16 apart.
template <typename T>
__device__ void dropout(const T *x, T *y, long long count, long long key, long long step, long long threshold, double scale) {
    using C = typename Computed<T>::type;
    EACH(number, (count + 63) / 64 * 16) {
        uint4 words = philox(number, step, key);
        unsigned word[4] = {words.x, words.y, words.z, words.w};
        long long first = number / 16 * 64 + number % 16;
        for (int w = 0; w < 4; ++w) {
            long long i = first + 16 * w;
            if (i < count) y[i] = word[w] >= (unsigned)threshold ? stored<T>(computed(x[i]) * C(scale)) : stored<T>(C(0));
        }
    }
}

#define DROPOUT(T, NAME)                                                                                              \
    extern "C" __global__ void dropout_##NAME(const T *x, T *y, long long count, long long key, long long step,       \
                                              long long threshold, double scale) {                                    \
        dropout(x, y, count, key, step, threshold, scale);                                                            \
    }
INSTANCES_OF_MAPS(DROPOUT)
