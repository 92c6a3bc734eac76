// The kernels of the tests; `make_ptx.sh` turns them into kernels.ptx.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" {

// A block's sum by a tree in shared memory.
__global__ void block_sum(const float *x, float *sums, int n) {
    __shared__ float part[256];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    part[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
}

// A warp's sum by shuffles, and what the vote and shuffle instructions say.
__global__ void warp_ops(const int *x, int *out) {
    int v = x[threadIdx.x], lane = threadIdx.x;
    int sum = v;
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    out[lane] = sum;
    out[32 + lane] = __shfl_up_sync(0xffffffffu, v, 3);
    out[64 + lane] = __shfl_down_sync(0xffffffffu, v, 5, 16);
    out[96 + lane] = __shfl_sync(0xffffffffu, v, lane + 1, 8);
    out[128 + lane] = __ballot_sync(0xffffffffu, v & 1);
    out[160 + lane] = __any_sync(0xffffffffu, v == 7) + 2 * __all_sync(0xffffffffu, v >= 0);
    if (lane & 1) out[192 + lane] = __shfl_sync(0xaaaaaaaau, v, 31);
    else out[192 + lane] = __popc(__activemask());
}

// Steps of the Collatz sequence: a loop of another length in every thread.
__global__ void collatz(unsigned *out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned long long v = i + 1;
    unsigned steps = 0;
    while (v != 1) {
        v = v % 2 ? 3 * v + 1 : v / 2;
        steps++;
    }
    out[i] = steps;
}

// A histogram, a float sum, a largest value and a count by compare and swap.
__global__ void atomics(const unsigned *x, int n, unsigned *bins, float *sum, double *sum64,
                        int *largest, unsigned *count) {
    __shared__ unsigned local[16];
    if (threadIdx.x < 16) local[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        atomicAdd(&local[x[i] % 16], 1u);
        atomicAdd(sum, (float)(x[i] % 8));
        atomicAdd(sum64, (double)x[i]);
        atomicMax(largest, (int)x[i]);
        unsigned old = *count, seen;
        do {
            seen = old;
            old = atomicCAS(count, seen, seen + 1);
        } while (old != seen);
    }
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&bins[threadIdx.x], local[threadIdx.x]);
}

// Elementary functions, which call slow paths for large arguments.
__global__ void functions(const double *x, double *out, int n) {
    int i = threadIdx.x;
    if (i >= n) return;
    out[i] = sin(x[i]);
    out[n + i] = exp(x[i] * 1e-3);
    out[2 * n + i] = x[i] / 3.0;
    out[3 * n + i] = sqrt(fabs(x[i]));
    out[4 * n + i] = sinf((float)x[i]);
    out[5 * n + i] = expf((float)x[i] * 1e-3f);
    out[6 * n + i] = __half2float(__float2half((float)x[i]));
    out[7 * n + i] = __bfloat162float(__float2bfloat16((float)x[i]));
    out[8 * n + i] = __float2int_rn((float)x[i]);
    out[9 * n + i] = (double)(long long)x[i];
    out[10 * n + i] = __fadd_rz((float)x[i], 0.1f);
    out[11 * n + i] = __fadd_rd((float)x[i], 0.1f);
}

// d = a * b, 16 x 8 by 8 x 8, through TF32.
__global__ void mma_tf32(const float *a, const float *b, float *d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    unsigned ra[4], rb[2];
    float c[4] = {0, 0, 0, 0};
    float va[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    float vb[2] = {b[t * 8 + g], b[(t + 4) * 8 + g]};
    for (int i = 0; i < 4; i++) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(ra[i]) : "f"(va[i]));
    for (int i = 0; i < 2; i++) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rb[i]) : "f"(vb[i]));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
    for (int i = 0; i < 4; i++) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

// d = a * b, 16 x 16 by 16 x 8, in bf16; a and b come by cp.async and ldmatrix.
__global__ void mma_bf16(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *d) {
    __shared__ __align__(16) __nv_bfloat16 sa[16 * 16], sb[16 * 8];
    int lane = threadIdx.x;
    unsigned ta = (unsigned)__cvta_generic_to_shared(&sa[lane * 8]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(ta), "l"(a + lane * 8));
    unsigned tb = (unsigned)__cvta_generic_to_shared(&sb[lane / 2 * 8]);
    if (lane % 2 == 0)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(tb), "l"(b + lane / 2 * 8));
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;");
    __syncwarp();
    unsigned ra[4], rb[2];
    float c[4] = {0, 0, 0, 0};
    unsigned pa = (unsigned)__cvta_generic_to_shared(&sa[lane % 16 * 16 + lane / 16 * 8]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(ra[0]), "=r"(ra[1]), "=r"(ra[2]), "=r"(ra[3]) : "r"(pa));
    unsigned pb = (unsigned)__cvta_generic_to_shared(&sb[lane % 16 * 8]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
        : "=r"(rb[0]), "=r"(rb[1]) : "r"(pb));
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

// d = a * b, 8 x 4 by 4 x 8, in doubles.
__global__ void mma_f64(const double *a, const double *b, double *d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    double c0 = 0, c1 = 0;
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+d"(c0), "+d"(c1) : "d"(a[g * 4 + t]), "d"(b[t * 8 + g]));
    d[g * 8 + 2 * t] = c0;
    d[g * 8 + 2 * t + 1] = c1;
}

// Copies 12 of 16 bytes of each quadruple, the rest being zeros, and doubles them.
__global__ void async_copy(const float4 *x, float4 *y) {
    extern __shared__ float4 tile[];
    unsigned to = (unsigned)__cvta_generic_to_shared(&tile[threadIdx.x]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        ::"r"(to), "l"(x + threadIdx.x), "r"(12));
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    float4 v = tile[blockDim.x - 1 - threadIdx.x];
    y[threadIdx.x] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}

// Writes `extra` elements past the end.
__global__ void out_of_bounds(float *x, int n, int extra) {
    int i = threadIdx.x;
    if (i < n + extra) x[i] = 1.0f;
}

// Half of the block waits at one barrier, the other half at another.
__global__ void deadlock(int *x) {
    if (threadIdx.x < 32) asm volatile("barrier.sync 1, 64;");
    else asm volatile("barrier.sync 2, 64;");
    x[threadIdx.x] = 1;
}

// Two halves of the block that hand over to each other at named barriers.
__global__ void named_barriers(int *x) {
    __shared__ int box;
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) box = 41;
        asm volatile("barrier.arrive 1, 64;" ::: "memory");
        asm volatile("barrier.sync 2, 64;" ::: "memory");
        x[threadIdx.x] = box;
    } else {
        asm volatile("barrier.sync 1, 64;" ::: "memory");
        if (threadIdx.x == 32) box = box + 1;
        asm volatile("barrier.arrive 2, 64;" ::: "memory");
        x[threadIdx.x] = __syncthreads_count(0);
        return;
    }
    __syncthreads_count(1);
}

// Each block of a cluster of two reads what the other one wrote to its shared memory.
__global__ void __cluster_dims__(2, 1, 1) clusters(int *x) {
    __shared__ int box[32];
    unsigned rank, other, address, value;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    box[threadIdx.x] = 100 * rank + threadIdx.x;
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    other = rank ^ 1;
    address = (unsigned)__cvta_generic_to_shared(&box[threadIdx.x]);
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(other));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    x[blockIdx.x * 32 + threadIdx.x] = value;
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__constant__ float table[4] = {1.0f, 2.0f, 4.0f, 8.0f};
__device__ int counter = 5;

// Constant and global variables, local memory and a recursive function.
__device__ __noinline__ int factorial(int n) { return n < 2 ? 1 : n * factorial(n - 1); }

__global__ void variables(float *x, int *y, int turns) {
    float local[8];
    for (int i = 0; i < 8; i++) local[(i * turns) % 8] = table[i % 4] * i;
    x[threadIdx.x] = local[threadIdx.x % 8];
    y[threadIdx.x] = factorial(threadIdx.x % 8) + counter;
}

// For timing: a long chain of multiply-adds.
__global__ void chain(float *x, int turns) {
    float v = threadIdx.x;
    for (int i = 0; i < turns; i++) v = v * 0.999f + 0.5f * (float)(i & 7);
    x[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
}
