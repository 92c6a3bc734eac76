// The iteration of the covariance layer by a cluster of blocks an image, for compute capability 9.0 and later: all
// products of the program, or of its tangent, in one launch. Each block holds its rows of every matrix in shared
// memory, and reads those of the others there when it multiplies.
//
// A block of 256 makes its rows of the product, a thread 8 rows by 4 columns; both operands come by chunks of
// CHUNK inner indices. Products are whole, not half: rows of a symmetric result are in several blocks.

#include "common.cuh"
#include "program.cuh"

constexpr int BLOCKS = 8, CHUNK = 16, ROWS = 8, COLUMNS = 4, ACROSS = 64, THREADS = 256;

__device__ inline unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The same place in the shared memory of another block of the cluster.
__device__ inline const float *of_block(const float *own, unsigned rank) {
    unsigned long long address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(own), "r"(rank));
    return reinterpret_cast<const float *>(address);
}

// Of all threads of the cluster, which need not be converged; writes before it are seen after it.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

// An operand: a slot of all blocks, or a kept register in global memory, or the sum of two.
struct Operand {
    const float *slot, *first, *second;
    float weights[2];
};

struct Rows {
    const Fused &job;
    float *memory;
    long long image;
    int first, count, width;

    __device__ float *slot(int which) const { return memory + which * job.slab * job.stride; }

    __device__ float kept(const Operand &operand, int i, int j) const {
        long long place = image + (long long)i * job.row + j;
        float value = operand.weights[0] * operand.first[place];
        if (operand.second) value += operand.weights[1] * operand.second[place];
        return value;
    }

    __device__ Operand of_slot(int which) const { return {slot(which), nullptr, nullptr, {1, 0}}; }

    __device__ Operand of_register(int which) const {
        for (int at = 0; at < job.derived_count; ++at) {
            const Derived &sum = job.derived[at];
            if (sum.which != which) continue;
            const void *second = sum.from[1] < 0 ? nullptr : job.registers[sum.from[1]];
            return {nullptr,
                    static_cast<const float *>(job.registers[sum.from[0]]),
                    static_cast<const float *>(second),
                    {static_cast<float>(sum.weights[0]), static_cast<float>(sum.weights[1])}};
        }
        return {nullptr, static_cast<const float *>(job.registers[which]), nullptr, {1, 0}};
    }

    // acc += the block's rows of left, times right.
    __device__ void accumulate(float (&acc)[ROWS][COLUMNS], const Operand &left, const Operand &right, int row,
                               int column) const {
        float *across = memory + job.buffer_slot * job.slab * job.stride, *down = across + CHUNK * job.stride;
        for (int start = 0; start < job.n; start += CHUNK) {
            for (int at = threadIdx.x; at < CHUNK * width; at += THREADS) {
                int k = start + at / width, j = at % width;
                float value = 0;
                if (k < job.n) {
                    if (right.slot)
                        value = of_block(right.slot, k / job.slab)[k % job.slab * job.stride + j];
                    else if (j < job.n)
                        value = kept(right, k, j);
                }
                across[at / width * job.stride + j] = value;
            }
            for (int at = threadIdx.x; at < job.slab * CHUNK; at += THREADS) {
                int i = at / CHUNK, k = start + at % CHUNK;
                float value = 0;
                if (i < count && k < job.n)
                    value = left.slot ? left.slot[i * job.stride + k] : kept(left, first + i, k);
                down[i * (CHUNK + 4) + at % CHUNK] = value;
            }
            __syncthreads();
            if (row < job.slab && column < width) {
#pragma unroll
                for (int k = 0; k < CHUNK; k += 4) {
                    float4 b[4];
#pragma unroll
                    for (int q = 0; q < 4; ++q)
                        b[q] = *reinterpret_cast<const float4 *>(across + (k + q) * job.stride + column);
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
                        if (row + r >= job.slab) continue;
                        float4 a = *reinterpret_cast<const float4 *>(down + (row + r) * (CHUNK + 4) + k);
                        float parts[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
                        for (int q = 0; q < 4; ++q) {
                            acc[r][0] += parts[q] * b[q].x, acc[r][1] += parts[q] * b[q].y;
                            acc[r][2] += parts[q] * b[q].z, acc[r][3] += parts[q] * b[q].w;
                        }
                    }
                }
            }
            __syncthreads();
        }
    }

    // The block's rows to global memory.
    __device__ void keep(void *to, const float *from) const {
        float *start = static_cast<float *>(to) + image + (long long)first * job.row;
        for (int at = threadIdx.x; at < count * job.row; at += THREADS) {
            int i = at / job.row, j = at % job.row;
            start[at] = j < job.n ? from[i * job.stride + j] : 0.0f;
        }
    }
};

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS)
    cluster_f32(const __grid_constant__ Fused job) {
    extern __shared__ __align__(16) float memory[];
    int n = job.n, stride = job.stride, slab = job.slab, number = blockIdx.x / BLOCKS;
    int first = cluster_rank() * slab;
    Rows rows = {job, memory, number * job.image, first, max(0, min(slab, n - first)), (n + 3) / 4 * 4};
    int column = threadIdx.x % ACROSS * COLUMNS, row = threadIdx.x / ACROSS * ROWS;
    bool works = column < rows.width && row < rows.count;

    Operand input = {nullptr, static_cast<const float *>(job.input), nullptr, {1, 0}};
    float *start = rows.slot(job.input_slot);
    for (int at = threadIdx.x; at < slab * stride; at += THREADS) {
        int i = at / stride, j = at % stride;
        start[at] = i < rows.count && j < n ? rows.kept(input, first + i, j) : 0.0f;
    }
    cluster_sync();
    for (int at = 0; at < job.count; ++at) {
        const Step &step = job.steps[at];
        float acc[ROWS][COLUMNS] = {};
        if (step.left >= 0) {
            Operand left = rows.of_slot(step.left), right = rows.of_slot(step.right);
            if (job.tangent) {
                // dL R + L dR
                rows.accumulate(acc, left, rows.of_register(step.right_value), row, column);
                left = rows.of_register(step.left_value);
            }
            rows.accumulate(acc, left, right, row, column);
        }
        float made[2][ROWS][COLUMNS];
#pragma unroll
        for (int o = 0; o < 2; ++o) {
            if (o >= step.outs || !works) continue;
            const Out &out = step.out[o];
            float alpha = static_cast<float>(out.alpha), diagonal = static_cast<float>(out.diagonal);
            float weights[2] = {static_cast<float>(out.weights[0]), static_cast<float>(out.weights[1])};
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    bool there = row + r < rows.count;
                    float value = alpha == 0 ? 0.0f : alpha * acc[r][c];
#pragma unroll
                    for (int t = 0; t < 2; ++t)
                        if (out.terms[t] >= 0 && there)
                            value += weights[t] * rows.slot(out.terms[t])[(row + r) * stride + column + c];
                    if (first + row + r == column + c && there) value += diagonal;
                    made[o][r][c] = value;
                }
        }
        // All blocks have read what they read: slots can be written.
        cluster_sync();
#pragma unroll
        for (int o = 0; o < 2; ++o) {
            if (o >= step.outs || !works) continue;
            float *to = rows.slot(step.out[o].slot);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (row + r < rows.count)
                    *reinterpret_cast<float4 *>(to + (row + r) * stride + column) =
                        make_float4(made[o][r][0], made[o][r][1], made[o][r][2], made[o][r][3]);
        }
        cluster_sync();
        for (int o = 0; o < step.outs; ++o)
            if (step.out[o].keep >= 0) rows.keep(job.registers[step.out[o].keep], rows.slot(step.out[o].slot));
    }

    const float *result = rows.slot(job.result_slot);
    if (job.result) rows.keep(job.result, result);
    if (!job.output) return;
    float *output = static_cast<float *>(job.output) + number * job.output_image;
    float scale = static_cast<float>(job.scale[number * (long long)job.scale_image]);
    for (int at = threadIdx.x; at < rows.count * n; at += THREADS) {
        int i = first + at / n, j = at % n;
        // A factor of zero means zero, also of what is not finite.
        float value = scale == 0 ? 0.0f : scale * result[at / n * stride + j];
        if (!job.triangle)
            output[i * n + j] = value;
        else if (i <= j)
            output[i * n - i * (i - 1) / 2 - i + j] = value;
    }
}
