// The iteration of the covariance layer for small matrices, a block an image: all products of the program, or of
// its tangent, in one launch, with the iterates in shared memory. See program.rs for what a program is.
//
// A thread makes a tile of 4 x 4 on or above the diagonal, and mirrors it. Matrices in shared memory have rows
// `stride` apart, with zeros after their last column; slots serve again as soon as their register has been read for
// the last time, also for what the step itself makes: results are in registers until all operands have been read.

#include "common.cuh"
#include "program.cuh"

constexpr int SIDE = 4;

__device__ inline void load(float (&to)[SIDE], const float *from) {
    float4 values = *reinterpret_cast<const float4 *>(from);
    to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
}
__device__ inline void load(double (&to)[SIDE], const double *from) {
    double2 first = *reinterpret_cast<const double2 *>(from), second = *reinterpret_cast<const double2 *>(from + 2);
    to[0] = first.x, to[1] = first.y, to[2] = second.x, to[3] = second.y;
}
__device__ inline void store(float *to, float a, float b, float c, float d) {
    *reinterpret_cast<float4 *>(to) = make_float4(a, b, c, d);
}
__device__ inline void store(double *to, double a, double b, double c, double d) {
    *reinterpret_cast<double2 *>(to) = make_double2(a, b);
    *reinterpret_cast<double2 *>(to + 2) = make_double2(c, d);
}

// acc += A'B of the thread's tile.
template <typename T>
__device__ inline void accumulate(T (&acc)[SIDE][SIDE], const T *a, const T *b, int n, int stride, int i, int j) {
#pragma unroll 4
    for (int k = 0; k < n; ++k) {
        T left[SIDE], right[SIDE];
        load(left, a + k * stride + i);
        load(right, b + k * stride + j);
#pragma unroll
        for (int r = 0; r < SIDE; ++r)
#pragma unroll
            for (int c = 0; c < SIDE; ++c) acc[r][c] += left[r] * right[c];
    }
}

template <typename T> struct Block {
    const Fused &job;
    T *memory;

    __device__ T *slot(int which) const { return memory + (long long)which * job.n * job.stride; }

    // A matrix of global memory, weighted, or the sum of two.
    __device__ void fetch(T *to, const void *a, const void *b, double first, double second) const {
        long long start = blockIdx.x * job.image;
        T one = static_cast<T>(first), other = static_cast<T>(second);
        for (int at = threadIdx.x; at < job.n * job.stride; at += blockDim.x) {
            int i = at / job.stride, j = at % job.stride;
            T value = 0;
            if (j < job.n) {
                long long place = start + (long long)i * job.row + j;
                value = one * static_cast<const T *>(a)[place];
                if (b) value += other * static_cast<const T *>(b)[place];
            }
            to[at] = value;
        }
    }

    // The value of a register, which is kept or a sum of kept ones.
    __device__ void fetch_value(T *to, int which) const {
        for (int at = 0; at < job.derived_count; ++at) {
            const Derived &sum = job.derived[at];
            if (sum.which != which) continue;
            fetch(to, job.registers[sum.from[0]], sum.from[1] < 0 ? nullptr : job.registers[sum.from[1]],
                  sum.weights[0], sum.weights[1]);
            return;
        }
        fetch(to, job.registers[which], nullptr, 1, 0);
    }

    __device__ void keep(void *to, const T *from) const {
        T *start = static_cast<T *>(to) + blockIdx.x * job.image;
        for (int at = threadIdx.x; at < job.n * job.row; at += blockDim.x) {
            int i = at / job.row, j = at % job.row;
            start[at] = j < job.n ? from[i * job.stride + j] : T(0);
        }
    }
};

template <typename T> __device__ void fused(const Fused &job) {
    extern __shared__ __align__(16) unsigned char bytes[];
    Block<T> block = {job, reinterpret_cast<T *>(bytes)};
    int n = job.n, stride = job.stride;

    int length = (n + SIDE - 1) / SIDE, tile = threadIdx.x, down = 0;
    for (; length > 0 && tile >= length; --length, ++down) tile -= length;
    bool works = length > 0;
    int i = down * SIDE, j = (down + tile) * SIDE;

    block.fetch(block.slot(job.input_slot), job.input, nullptr, 1, 0);
    __syncthreads();
    for (int at = 0; at < job.count; ++at) {
        const Step &step = job.steps[at];
        T acc[SIDE][SIDE] = {};
        if (step.left >= 0) {
            const T *left = block.slot(step.left), *right = block.slot(step.right);
            if (!job.tangent) {
                if (works) accumulate(acc, left, right, n, stride, i, j);
            } else {
                // dL R + L dR
                T *value = block.slot(job.buffer_slot);
                block.fetch_value(value, step.right_value);
                __syncthreads();
                if (works) accumulate(acc, left, value, n, stride, i, j);
                if (step.left_value != step.right_value) {
                    __syncthreads();
                    block.fetch_value(value, step.left_value);
                    __syncthreads();
                }
                if (works) accumulate(acc, value, right, n, stride, i, j);
            }
        }
        T made[2][SIDE][SIDE];
        if (works) {
#pragma unroll
            for (int o = 0; o < 2; ++o) {
                if (o >= step.outs) continue;
                const Out &out = step.out[o];
                T alpha = static_cast<T>(out.alpha), diagonal = static_cast<T>(out.diagonal);
                T weights[2] = {static_cast<T>(out.weights[0]), static_cast<T>(out.weights[1])};
#pragma unroll
                for (int r = 0; r < SIDE; ++r)
#pragma unroll
                    for (int c = 0; c < SIDE; ++c) {
                        T value = alpha == T(0) ? T(0) : alpha * acc[r][c];
                        bool there = i + r < n;
#pragma unroll
                        for (int t = 0; t < 2; ++t)
                            if (out.terms[t] >= 0 && there)
                                value += weights[t] * block.slot(out.terms[t])[(i + r) * stride + j + c];
                        if (i + r == j + c && there) value += diagonal;
                        made[o][r][c] = value;
                    }
            }
        }
        __syncthreads();
        if (works) {
#pragma unroll
            for (int o = 0; o < 2; ++o) {
                if (o >= step.outs) continue;
                T *to = block.slot(step.out[o].slot);
                const T(&value)[SIDE][SIDE] = made[o];
#pragma unroll
                for (int r = 0; r < SIDE; ++r) {
                    if (i + r < n) store(to + (i + r) * stride + j, value[r][0], value[r][1], value[r][2], value[r][3]);
                    if (i != j && j + r < n)
                        store(to + (j + r) * stride + i, value[0][r], value[1][r], value[2][r], value[3][r]);
                }
            }
        }
        __syncthreads();
        for (int o = 0; o < step.outs; ++o)
            if (step.out[o].keep >= 0) block.keep(job.registers[step.out[o].keep], block.slot(step.out[o].slot));
    }

    const T *result = block.slot(job.result_slot);
    if (job.result) block.keep(job.result, result);
    if (!job.output) return;
    T *output = static_cast<T *>(job.output) + blockIdx.x * job.output_image;
    T scale = static_cast<T>(job.scale[blockIdx.x * (long long)job.scale_image]);
    for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
        int row = at / n, column = at % n;
        // A factor of zero means zero, also of what is not finite.
        T value = scale == T(0) ? T(0) : scale * result[row * stride + column];
        if (!job.triangle)
            output[at] = value;
        else if (row <= column)
            output[row * n - row * (row - 1) / 2 - row + column] = value;
    }
}

#define FUSED(T, NAME)                                                                                                \
    extern "C" __global__ void __launch_bounds__(160) fused_##NAME(const __grid_constant__ Fused job) { fused<T>(job); }
INSTANCES(FUSED)
