// Products of the covariance layer: sums of A'B over one or two pairs of operands that lie with the
// inner index in rows, as symmetric matrices do either way. Of a symmetric result only the tiles on and
// above the diagonal are computed; the others are mirrored.
//
// A block makes a tile of 64 x 64 with 128 threads of 8 x 4 values each; operands come by asynchronous
// copies, three tiles deep. Epilogues are linear: scale * (alpha * product + terms + diagonal).

#include "common.cuh"

constexpr int TILE = 64, DEPTH = 16, STAGES = 3, THREADS = 128;
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
    // Whether `direct` or `transposed` is of bf16.
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

// A tile of DEPTH rows by TILE columns; what lies outside is zero.
template <typename T>
__device__ void fetch(T *tile, const T *from, int row_distance, int inner, int row, int column) {
    constexpr int VALUES = 16 / sizeof(T), ACROSS = TILE / VALUES;
    for (int at = threadIdx.x; at < DEPTH * ACROSS; at += THREADS) {
        int r = at / ACROSS, c = at % ACROSS * VALUES;
        bool there = row + r < inner && column + c < row_distance;
        const T *source = there ? from + (long long)(row + r) * row_distance + column + c : from;
        copy16(tile + r * TILE + c, source, there);
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

template <typename T> __device__ inline void put(void *to, long long at, T value, bool narrow) {
    if (narrow)
        static_cast<__nv_bfloat16 *>(to)[at] = __float2bfloat16(static_cast<float>(value));
    else
        static_cast<T *>(to)[at] = value;
}

template <typename T>
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
                put(target.direct, image * target.direct_image + (long long)i * target.direct_row + j, value,
                    target.narrow);
            if (mirrored) staged[(column + c) * (TILE + 1) + row + r] = value;
        }
    }
    if (!mirrored) return;
    __syncthreads();
    for (int at = threadIdx.x; at < TILE * TILE; at += THREADS) {
        int j = left + at / TILE, i = top + at % TILE;
        if (j < job.columns && i < target.transposed_width)
            put(target.transposed, image * target.transposed_image + (long long)j * target.transposed_row + i,
                staged[at / TILE * (TILE + 1) + at % TILE], target.narrow);
    }
}

template <typename T> __device__ void product(const Product &job) {
    __shared__ __align__(16) T memory[STAGES * 2 * DEPTH * TILE];
    static_assert(STAGES * 2 * DEPTH >= TILE + 1, "the tile to be mirrored fits");

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
            T *to = memory + step % STAGES * 2 * DEPTH * TILE;
            const T *a = static_cast<const T *>(pair.a) + image * pair.a_image;
            const T *b = static_cast<const T *>(pair.b) + image * pair.b_image;
            fetch(to, a, pair.a_row, pair.inner, row, top);
            fetch(to + DEPTH * TILE, b, pair.b_row, pair.inner, row, left);
        }
        commit();
    };

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int row = warp / 2 * 32 + lane / 8 * 8, column = warp % 2 * 32 + lane % 8 * 4;
    T acc[8][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) fetch_step(step);
    for (int step = 0; step < steps; ++step) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch_step(step + STAGES - 1);
        const T *left_tile = memory + step % STAGES * 2 * DEPTH * TILE + row;
        const T *right_tile = memory + step % STAGES * 2 * DEPTH * TILE + DEPTH * TILE + column;
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            T a[8], b[4];
            load(a, left_tile + k * TILE);
            load(b, right_tile + k * TILE);
#pragma unroll
            for (int r = 0; r < 8; ++r)
#pragma unroll
                for (int c = 0; c < 4; ++c) acc[r][c] += a[r] * b[c];
        }
    }
    wait<0>();
    for (int t = 0; t < job.target_count; ++t)
        write_tile(job.targets[t], job, image, top, left, acc, row, column, memory);
}

// Blocks that a multiprocessor shall hold at once, which bounds the registers.
template <typename T> constexpr int BLOCKS = sizeof(T) == 4 ? 3 : 2;

#define PRODUCT(T, NAME)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS<T>)                                           \
        product_##NAME(const __grid_constant__ Product job) {                                                         \
        product<T>(job);                                                                                              \
    }
INSTANCES(PRODUCT)
