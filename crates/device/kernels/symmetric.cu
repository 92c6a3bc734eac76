// Products of the covariance layer: sums of A'B over one or two pairs of operands that lie with the
// inner index in rows, as symmetric matrices do either way. Of a symmetric result only the tiles on and
// above the diagonal are computed; the others are mirrored.
//
// A block makes a tile of 64 x 64 with 128 threads of 8 x 4 values each, or with four warps on tensor cores; operands come by asynchronous
// copies, three tiles deep. Epilogues are linear: scale * (alpha * product + terms + diagonal).

#include "common.cuh"

constexpr int TILE = 64, DEPTH = 16, STAGES = 3, THREADS = 128;
// How products are made: by multiply-adds of the type, or on tensor cores, whose operands are rounded to TF32 (10 bits
// of mantissa): once, or in two parts of which three products are added, which is f32 up to its last bits.
enum Way { PLAIN, TF32, TF32X3 };
constexpr int MOST_TERMS = 4;

struct Pair {
    const void *a, *b;
    // Distances of images and of rows, in values; rows are a multiple of 16 bytes.
    long long a_image, b_image;
    int a_row, b_row;
    int inner;
    int unused;
};

struct Target {
    // Where the result goes, where its transpose goes, where its upper triangle goes, or null.
    void *direct, *transposed, *triangle;
    const void *terms[MOST_TERMS];
    double weights[MOST_TERMS];
    double alpha, diagonal;
    // A factor of each image, or null.
    const double *scale;
    long long scale_image;
    long long direct_image, transposed_image, triangle_image, term_image;
    int direct_row, transposed_row, term_row;
    int count;
    // Columns that are written: those after the result's are zero.
    int direct_width, transposed_width;
    // Whether `direct` or `transposed` is of bf16, by which the host chooses the kernel: a branch costs registers.
    int narrow;
    int unused;
};

struct Product {
    Pair pairs[2];
    Target targets[2];
    int pair_count, target_count;
    int rows, columns;
    int symmetric;
    int tiles_down, tiles_across;
    int unused;
};

__device__ inline void copy16(void *to, const void *from, bool there) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> __device__ inline void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// Distance of rows in shared memory: for tensor cores such that the 8 by 4 values of a fragment lie in 32 banks.
template <Way WAY> constexpr int ROW = WAY == PLAIN ? TILE : TILE + 8;

// A tile of DEPTH rows by TILE columns; what lies outside is zero.
template <Way WAY, typename T>
__device__ void fetch(T *tile, const T *from, int row_distance, int inner, int row, int column) {
    constexpr int VALUES = 16 / sizeof(T), ACROSS = TILE / VALUES;
    for (int at = threadIdx.x; at < DEPTH * ACROSS; at += THREADS) {
        int r = at / ACROSS, c = at % ACROSS * VALUES;
        bool there = row + r < inner && column + c < row_distance;
        const T *source = there ? from + (long long)(row + r) * row_distance + column + c : from;
        copy16(tile + r * ROW<WAY> + c, source, there);
    }
}

// Neighbours from shared memory, 16 bytes at a time.
template <int COUNT> __device__ inline void load(float (&to)[COUNT], const float *from) {
#pragma unroll
    for (int at = 0; at < COUNT; at += 4) {
        float4 values = *reinterpret_cast<const float4 *>(from + at);
        to[at] = values.x, to[at + 1] = values.y, to[at + 2] = values.z, to[at + 3] = values.w;
    }
}
template <int COUNT> __device__ inline void load(double (&to)[COUNT], const double *from) {
#pragma unroll
    for (int at = 0; at < COUNT; at += 2) {
        double2 values = *reinterpret_cast<const double2 *>(from + at);
        to[at] = values.x, to[at + 1] = values.y;
    }
}

// `direct` and `transposed` are of type O.
template <typename T, typename O>
__device__ void write_tile(const Target &target, const Product &job, long long image, int top, int left,
                           const T (&acc)[8][4], int row, int column, T *staged) {
    double scale = target.scale ? target.scale[image * target.scale_image] : 1.0;
    T alpha = static_cast<T>(target.alpha * scale), diagonal = static_cast<T>(target.diagonal * scale);
    T weights[MOST_TERMS];
#pragma unroll
    for (int t = 0; t < MOST_TERMS; ++t) weights[t] = static_cast<T>(target.weights[t] * scale);
    bool mirrored = target.transposed && !(job.symmetric && top == left);
    if (mirrored) __syncthreads();
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        int i = top + row + r;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            int j = left + column + c;
            T value = 0;
            if (i < job.rows && j < job.columns) {
                // A factor of zero means zero, also of what is not finite.
                value = alpha == T(0) ? T(0) : alpha * acc[r][c];
#pragma unroll
                for (int t = 0; t < MOST_TERMS; ++t) {
                    if (t >= target.count) continue;
                    const T *term = static_cast<const T *>(target.terms[t]) + image * target.term_image;
                    value += weights[t] * term[(long long)i * target.term_row + j];
                }
                if (i == j) value += diagonal;
                if (target.triangle && i <= j) {
                    long long n = job.columns, start = i * n - (long long)i * (i - 1) / 2 - i;
                    static_cast<T *>(target.triangle)[image * target.triangle_image + start + j] = value;
                }
            }
            if (target.direct && i < job.rows && j < target.direct_width)
                static_cast<O *>(
                    target.direct)[image * target.direct_image + (long long)i * target.direct_row + j] = stored<O>(value);
            if (mirrored) staged[(column + c) * (TILE + 1) + row + r] = value;
        }
    }
    if (!mirrored) return;
    __syncthreads();
    for (int at = threadIdx.x; at < TILE * TILE; at += THREADS) {
        int j = left + at / TILE, i = top + at % TILE;
        if (j < job.columns && i < target.transposed_width)
            static_cast<O *>(
                target.transposed)[image * target.transposed_image + (long long)j * target.transposed_row + i] =
                stored<O>(staged[at / TILE * (TILE + 1) + at % TILE]);
    }
}

// D += A B of 16 x 8 x 8 values in a warp. With g = lane / 4 and t = lane % 4, A has rows g and g + 8, columns t and
// t + 4; B rows t and t + 4, column g; D rows g and g + 8, columns 2t and 2t + 1.
__device__ inline void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline unsigned to_tf32(float value) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
    return rounded;
}

// A fragment in TF32, and what is left of it.
template <Way WAY, int COUNT>
__device__ inline void split(const float (&values)[COUNT], unsigned (&high)[COUNT], unsigned (&low)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        high[i] = to_tf32(values[i]);
        if (WAY == TF32X3) low[i] = to_tf32(values[i] - __uint_as_float(high[i]));
    }
}

// A warp's 32 x 32 values of a step, on tensor cores.
template <Way WAY>
__device__ void step_on_tensor_cores(const float *left_tile, const float *right_tile, float (&acc)[2][4][4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 8) {
        const float *left = left_tile + (k + t) * ROW<WAY> + g, *right = right_tile + (k + t) * ROW<WAY> + g;
        unsigned a[2][4], a_rest[2][4], b[4][2], b_rest[4][2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            float values[4] = {left[16 * m], left[16 * m + 8], left[4 * ROW<WAY> + 16 * m], left[4 * ROW<WAY> + 16 * m + 8]};
            split<WAY>(values, a[m], a_rest[m]);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            float values[2] = {right[8 * n], right[4 * ROW<WAY> + 8 * n]};
            split<WAY>(values, b[n], b_rest[n]);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                // The small ones first.
                if (WAY == TF32X3) {
                    multiply(acc[m][n], a_rest[m], b[n]);
                    multiply(acc[m][n], a[m], b_rest[n]);
                }
                multiply(acc[m][n], a[m], b[n]);
            }
    }
}

template <typename T, typename O, Way WAY> __device__ void product(const Product &job) {
    constexpr int STAGE = DEPTH * ROW<WAY>;
    __shared__ __align__(16) T memory[STAGES * 2 * STAGE];
    static_assert(STAGES * 2 * DEPTH >= TILE + 4, "a whole tile fits, with its rows apart");

    int tiles = job.symmetric ? job.tiles_down * (job.tiles_down + 1) / 2 : job.tiles_down * job.tiles_across;
    long long image = blockIdx.x / tiles;
    int tile = blockIdx.x % tiles, down = 0, across = 0;
    if (job.symmetric) {
        int length = job.tiles_down;
        for (; tile >= length; --length, ++down) tile -= length;
        across = down + tile;
    } else {
        down = tile / job.tiles_across;
        across = tile % job.tiles_across;
    }
    int top = down * TILE, left = across * TILE;

    int first_steps = (job.pairs[0].inner + DEPTH - 1) / DEPTH;
    int steps = first_steps;
    if (job.pair_count > 1) steps += (job.pairs[1].inner + DEPTH - 1) / DEPTH;
    auto fetch_step = [&](int step) {
        if (step < steps) {
            const Pair &pair = job.pairs[step >= first_steps];
            int row = (step >= first_steps ? step - first_steps : step) * DEPTH;
            T *to = memory + step % STAGES * 2 * STAGE;
            const T *a = static_cast<const T *>(pair.a) + image * pair.a_image;
            const T *b = static_cast<const T *>(pair.b) + image * pair.b_image;
            fetch<WAY>(to, a, pair.a_row, pair.inner, row, top);
            fetch<WAY>(to + STAGE, b, pair.b_row, pair.inner, row, left);
        }
        commit();
    };

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int row = warp / 2 * 32 + lane / 8 * 8, column = warp % 2 * 32 + lane % 8 * 4;
    T acc[8][4] = {};
    float fragments[2][4][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) fetch_step(step);
    for (int step = 0; step < steps; ++step) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch_step(step + STAGES - 1);
        const T *tiles_of_step = memory + step % STAGES * 2 * STAGE;
        if constexpr (WAY == PLAIN) {
            const T *left_tile = tiles_of_step + row, *right_tile = tiles_of_step + STAGE + column;
#pragma unroll
            for (int k = 0; k < DEPTH; ++k) {
                T a[8], b[4];
                load(a, left_tile + k * ROW<WAY>);
                load(b, right_tile + k * ROW<WAY>);
#pragma unroll
                for (int r = 0; r < 8; ++r)
#pragma unroll
                    for (int c = 0; c < 4; ++c) acc[r][c] += a[r] * b[c];
            }
        } else {
            step_on_tensor_cores<WAY>(tiles_of_step + warp / 2 * 32, tiles_of_step + STAGE + warp % 2 * 32, fragments);
        }
    }
    wait<0>();
    if constexpr (WAY != PLAIN) {
        // Over shared memory to the threads' usual places.
        constexpr int APART = TILE + 4;
        int g = lane / 4, t = lane % 4;
        __syncthreads();
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int v = 0; v < 4; ++v) {
                    int i = warp / 2 * 32 + 16 * m + g + v / 2 * 8, j = warp % 2 * 32 + 8 * n + 2 * t + v % 2;
                    memory[i * APART + j] = fragments[m][n][v];
                }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 8; ++r) load(acc[r], memory + (row + r) * APART + column);
    }
    for (int t = 0; t < job.target_count; ++t)
        write_tile<T, O>(job.targets[t], job, image, top, left, acc, row, column, memory);
}

// Blocks that a multiprocessor shall hold at once, which bounds the registers.
template <typename T> constexpr int BLOCKS = sizeof(T) == 4 ? 3 : 2;

#define PRODUCT(T, O, NAME)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS<T>)                                           \
        product_##NAME(const __grid_constant__ Product job) {                                                         \
        product<T, O, PLAIN>(job);                                                                                    \
    }
PRODUCT(float, float, f32)
PRODUCT(double, double, f64)
PRODUCT(float, __nv_bfloat16, bf16)

extern "C" __global__ void __launch_bounds__(THREADS, 3) product_tf32_f32(const __grid_constant__ Product job) {
    product<float, float, TF32>(job);
}
extern "C" __global__ void __launch_bounds__(THREADS, 3) product_tf32x3_f32(const __grid_constant__ Product job) {
    product<float, float, TF32X3>(job);
}
extern "C" __global__ void __launch_bounds__(THREADS, 3) product_tf32_bf16(const __grid_constant__ Product job) {
    product<float, __nv_bfloat16, TF32>(job);
}
extern "C" __global__ void __launch_bounds__(THREADS, 3) product_tf32x3_bf16(const __grid_constant__ Product job) {
    product<float, __nv_bfloat16, TF32X3>(job);
}
