// Images on their way into a network, and what of a step is kept for later.

#include "common.cuh"

// Bytes (image, pixel, 3) to normalised maps (image, 3, pixel): a thread a pixel.
template <typename T>
__device__ void normalise_bytes(const unsigned char *bytes, const float *levels, T *out, long long pixels, int plane) {
    EACH(i, pixels) {
        long long image = i / plane, pixel = i % plane;
        for (int c = 0; c < 3; ++c) out[(image * 3 + c) * plane + pixel] = static_cast<T>(levels[256 * c + bytes[3 * i + c]]);
    }
}

// What is kept: sum of losses, right answers, values that are not finite, norm of the last gradients, and what they are
// multiplied with.
struct Ledger { double loss, right, bad, norm, factor; };

template <typename T> __device__ void note_loss(const T *loss, Ledger *ledger, double count) {
    if (threadIdx.x != 0) return;
    double value = loss[0];
    ledger->loss += value * count;
    if (!isfinite(value)) ledger->bad += 1;
}

// Rows whose largest value, the first of equals, is that of the label: a warp a row.
template <typename T>
__device__ void count_right(const T *logits, const unsigned *labels, Ledger *ledger, int rows, int classes) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const T *values = logits + (long long)row * classes;
    T most = values[0];
    int best = 0;
    for (int c = lane; c < classes; c += 32)
        if (values[c] > most) {
            most = values[c];
            best = c;
        }
    for (int offset = 16; offset > 0; offset /= 2) {
        T other = __shfl_down_sync(0xffffffffu, most, offset);
        int place = __shfl_down_sync(0xffffffffu, best, offset);
        if (other > most || (other == most && place < best)) {
            most = other;
            best = place;
        }
    }
    // Whole numbers: exact in any order.
    if (lane == 0 && best == (int)labels[row]) atomicAdd(&ledger->right, 1.0);
}

// The norm of gradients from their sums of squares, and the factor that brings it to the limit: one block.
template <typename T> __device__ void limit_norm(const double *squares, Ledger *ledger, int tensors, double limit) {
    double sum = 0;
    for (int i = threadIdx.x; i < tensors; i += blockDim.x) sum += squares[i];
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    double norm = sqrt(sum), factor = limit / (norm + 1e-6);
    ledger->norm = norm;
    ledger->factor = factor < 1 ? factor : 1;
    if (!isfinite(sum)) ledger->bad += 1;
}

#define IMAGES(T, NAME)                                                                                               \
    extern "C" __global__ void normalise_bytes_##NAME(const unsigned char *bytes, const float *levels, T *out,        \
                                                      long long pixels, int plane) {                                  \
        normalise_bytes(bytes, levels, out, pixels, plane);                                                           \
    }                                                                                                                 \
    extern "C" __global__ void note_loss_##NAME(const T *loss, Ledger *ledger, double count) {                        \
        note_loss(loss, ledger, count);                                                                               \
    }                                                                                                                 \
    extern "C" __global__ void count_right_##NAME(const T *logits, const unsigned *labels, Ledger *ledger, int rows,  \
                                                  int classes) {                                                      \
        count_right(logits, labels, ledger, rows, classes);                                                           \
    }                                                                                                                 \
    extern "C" __global__ void limit_norm_##NAME(const double *squares, Ledger *ledger, int tensors, double limit) {  \
        limit_norm<T>(squares, ledger, tensors, limit);                                                               \
    }
INSTANCES(IMAGES)
