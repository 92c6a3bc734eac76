// Products of the covariance layer: sums of A'B over one or two pairs of operands that lie with the
// inner index in rows, as symmetric matrices do either way. Of a symmetric result only the tiles on and
// above the diagonal are computed; the others are mirrored.
//
// A block makes a tile of 64 x 64, or of 72 x 72 where that computes less outside of the result. Operands come by
// asynchronous copies, three steps deep. Without tensor cores the multiply-adds are what takes the time, so a thread has
// 8 x 8 (9 x 9) values for few loads from shared memory, and its places in operands are worked out once, not each step.
// It has 8 x 4 in f64, and where there are so few blocks that they would leave schedulers of multiprocessors idle.
// Epilogues are linear: scale * (alpha * product + terms + diagonal).

#include "common.cuh"

constexpr int DEPTH = 16, STAGES = 3;
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

// Where value `at` of the thread that is `thread` along a side of a tile lies: in groups of four, 32 apart, which are
// read 16 bytes at a time without a conflict of banks, and a ninth value after all of them.
__device__ constexpr int place(int at, int thread) {
    return at < 8 ? at / 4 * 32 + thread * 4 + at % 4 : 64 + thread;
}

// A side of a tile, as threads share it.
template <int ROWS, int COLUMNS> struct Shares {
    static constexpr int TILE = 8 * ROWS, ACROSS = TILE / COLUMNS, THREADS = 8 * ACROSS;
};

// Four neighbours, in vectors of at most 16 bytes, whose places must be multiples of that.
template <typename T> constexpr int VECTOR = sizeof(T) == 8 ? 2 : 4;
template <typename T> __device__ inline void load4(T *to, const T *from) {
#pragma unroll
    for (int at = 0; at < 4 / VECTOR<T>; ++at) {
        auto vector = values_of<VECTOR<T>>(from, at);
#pragma unroll
        for (int v = 0; v < VECTOR<T>; ++v) to[at * VECTOR<T> + v] = vector.v[v];
    }
}
template <typename O, typename T> __device__ inline void store4(O *to, const T *from) {
#pragma unroll
    for (int at = 0; at < 4 / VECTOR<O>; ++at) {
        Values<O, VECTOR<O>> vector;
#pragma unroll
        for (int v = 0; v < VECTOR<O>; ++v) vector.v[v] = stored<O>(from[at * VECTOR<O> + v]);
        reinterpret_cast<Values<O, VECTOR<O>> *>(to)[at] = vector;
    }
}

// A thread's values of a row of shared memory.
template <int COUNT, typename T> __device__ inline void load(T (&to)[COUNT], const T *row, int thread) {
#pragma unroll
    for (int at = 0; at + 4 <= COUNT; at += 4) load4(to + at, row + place(at, thread));
    if (COUNT == 9) to[COUNT - 1] = row[place(8, thread)];
}

// What a thread of THREADS copies of an operand: pieces of 16 bytes at the same places of each step, ACROSS of them from
// column FIRST of a tile on.
template <typename T, int ROW, int THREADS, int ACROSS, int FIRST> struct Operand {
    static constexpr int VALUES = 16 / sizeof(T), APART = THREADS / ACROSS;
    const T *from;
    int jump;
    // Rows from the thread's first one on, none where it is past the columns.
    int rest;

    static __device__ int row() { return threadIdx.x % THREADS / ACROSS; }
    static __device__ int column() { return FIRST + threadIdx.x % ACROSS * VALUES; }
    __device__ void open(const T *matrix, int distance, int inner, int edge) {
        from = matrix + (long long)row() * distance + edge + column();
        jump = APART * distance;
        rest = edge + column() < distance ? inner - row() : 0;
    }
    // What is not there is zero.
    __device__ void fetch(T *stage) {
        T *to = stage + row() * ROW + column();
#pragma unroll
        for (int row = 0; row < DEPTH; row += APART) {
            copy16(to + row * ROW, from, row < rest);
            from += jump;
        }
        rest -= DEPTH;
    }
};

// Where a column of a tile lies in shared memory, and its rows in fours, which go and come without a conflict of banks.
template <int TILE> __device__ inline int staged_at(int column, int four) {
    return column * TILE + 4 * (four < 16 ? four ^ column / 4 % 8 : four);
}

// COUNT (four or one) values from column `at` of a row on, those before `width`; `together` where four may go as vectors.
template <int COUNT, typename O, typename T>
__device__ inline void write(O *row, int at, int width, const T *values, bool together) {
    if (COUNT == 4 && together && at + 4 <= width) return store4(row + at, values);
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
        if (at + c < width) row[at + c] = stored<O>(values[c]);
}
template <typename O> __device__ inline bool together(const O *from, int row) {
    constexpr int BYTES = sizeof(O) * VECTOR<O>;
    return (reinterpret_cast<unsigned long long>(from) | row * sizeof(O)) % BYTES == 0;
}

// `direct` and `transposed` are of type O.
template <typename T, typename O, int ROWS, int COLUMNS>
__device__ void write_tile(const Target &target, const Product &job, long long image, int top, int left,
                           const T (&acc)[ROWS][COLUMNS], T *staged) {
    constexpr int TILE = Shares<ROWS, COLUMNS>::TILE, ACROSS = Shares<ROWS, COLUMNS>::ACROSS;
    constexpr int THREADS = Shares<ROWS, COLUMNS>::THREADS;
    int down = threadIdx.x / ACROSS, across = threadIdx.x % ACROSS;
    double scale = target.scale ? target.scale[image * target.scale_image] : 1.0;
    T alpha = static_cast<T>(target.alpha * scale), diagonal = static_cast<T>(target.diagonal * scale);
    T weights[MOST_TERMS];
#pragma unroll
    for (int t = 0; t < MOST_TERMS; ++t) weights[t] = static_cast<T>(target.weights[t] * scale);
    O *direct = target.direct ? static_cast<O *>(target.direct) + image * target.direct_image : nullptr;
    bool direct_together = together(direct, target.direct_row);
    bool mirrored = target.transposed && !(job.symmetric && top == left);
    if (mirrored) __syncthreads();
#pragma unroll
    for (int r0 = 0; r0 < ROWS; r0 += 4) {
#pragma unroll
        for (int c0 = 0; c0 < COLUMNS; c0 += 4) {
            constexpr int FOUR = 4;
            int height = ROWS - r0 < FOUR ? 1 : FOUR, width = COLUMNS - c0 < FOUR ? 1 : FOUR;
            int j = left + place(c0, across);
            T values[FOUR][FOUR];
#pragma unroll
            for (int r = 0; r < height; ++r) {
                int i = top + place(r0 + r, down);
#pragma unroll
                // A factor of zero means zero, also of what is not finite. Columns after the result's are zero, as those
                // of the operands are, which are read that far.
                for (int c = 0; c < width; ++c) values[r][c] = alpha == T(0) ? T(0) : alpha * acc[r0 + r][c0 + c];
                if (i >= job.rows) continue;
#pragma unroll
                for (int t = 0; t < MOST_TERMS; ++t) {
                    if (t >= target.count) continue;
                    const T *term = static_cast<const T *>(target.terms[t]) + image * target.term_image +
                                    (long long)i * target.term_row + j;
                    // Rows are of whole vectors, with zeros after the columns.
#pragma unroll
                    for (int v = 0; v < width; v += VECTOR<T>) {
                        if (j + v >= job.columns) continue;
                        auto vector = width == 1 ? Values<T, VECTOR<T>>{{term[0]}} : values_of<VECTOR<T>>(term + v, 0);
#pragma unroll
                        for (int c = v; c < width && c < v + VECTOR<T>; ++c) values[r][c] += weights[t] * vector.v[c - v];
                    }
                }
#pragma unroll
                for (int c = 0; c < width; ++c)
                    if (i == j + c && i < job.columns) values[r][c] += diagonal;
                if (target.triangle) {
                    long long n = job.columns, start = i * n - (long long)i * (i - 1) / 2 - i;
                    T *row = static_cast<T *>(target.triangle) + image * target.triangle_image + start;
#pragma unroll
                    for (int c = 0; c < width; ++c)
                        if (i <= j + c && j + c < job.columns) row[j + c] = values[r][c];
                }
                if (direct) {
                    O *row = direct + (long long)i * target.direct_row;
                    if (width == 4) write<4>(row, j, target.direct_width, values[r], direct_together);
                    else write<1>(row, j, target.direct_width, values[r], false);
                }
            }
            if (!mirrored) continue;
#pragma unroll
            for (int c = 0; c < width; ++c) {
                int column = place(c0, across) + c;
                if (height == 4) {
                    T four[4] = {values[0][c], values[1][c], values[2][c], values[3][c]};
                    store4(staged + staged_at<TILE>(column, place(r0, down) / 4), four);
                } else {
                    staged[staged_at<TILE>(column, place(r0, down) / 4) + place(r0, down) % 4] = values[0][c];
                }
            }
        }
    }
    if (!mirrored) return;
    __syncthreads();
    O *transposed = static_cast<O *>(target.transposed) + image * target.transposed_image;
    bool transposed_together = together(transposed, target.transposed_row);
    for (int at = threadIdx.x; at < TILE * TILE / 4; at += THREADS) {
        int column = at / (TILE / 4), four = at % (TILE / 4), j = left + column, i = top + 4 * four;
        if (j >= job.columns || i >= target.transposed_width) continue;
        T values[4];
        load4(values, staged + staged_at<TILE>(column, four));
        O *row = transposed + (long long)j * target.transposed_row;
        write<4>(row, i, target.transposed_width, values, transposed_together);
    }
}

// D = A B + D of 16 x 8 x 8 values in a warp. With g = lane / 4 and t = lane % 4, A has rows g and g + 8, columns t and
// t + 4; B rows t and t + 4, column g; D rows g and g + 8, columns 2t and 2t + 1.
__device__ inline void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline unsigned to_tf32(float value) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
    return rounded;
}

// A fragment in TF32, and what is left of it. Tensor cores pass over the last 13 bits. Three products need no more
// than a sum of integers to round the first part, which takes a NaN for a number: the second part keeps it.
template <Way WAY, int COUNT>
__device__ inline void split(const float (&values)[COUNT], unsigned (&high)[COUNT], unsigned (&low)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        if (WAY == TF32X3) {
            high[i] = (__float_as_uint(values[i]) + 0x1000u) & 0xffffe000u;
            low[i] = __float_as_uint(values[i] - __uint_as_float(high[i]));
        } else {
            high[i] = to_tf32(values[i]);
        }
    }
}

// A warp's 32 x 32 values of a step, on tensor cores. These cut sums off where f32 would round them, which over many
// steps draws values to zero; three products, which are to be as good as f32, are therefore summed from zero each step
// and added by the rounding adder (Ootomo and Yokota 2022).
template <Way WAY, int ROW>
__device__ void step_on_tensor_cores(const float *left_tile, const float *right_tile, float (&acc)[2][4][4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float sums[2][4][4] = {};
    auto multiply_all = [](float (&d)[2][4][4], const unsigned (&a)[2][4], const unsigned (&b)[4][2]) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n) multiply(d[m][n], a[m], b[n]);
    };
#pragma unroll
    for (int k = 0; k < DEPTH; k += 8) {
        const float *left = left_tile + (k + t) * ROW + g, *right = right_tile + (k + t) * ROW + g;
        unsigned a[2][4], a_rest[2][4], b[4][2], b_rest[4][2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            float values[4] = {left[16 * m], left[16 * m + 8], left[4 * ROW + 16 * m], left[4 * ROW + 16 * m + 8]};
            split<WAY>(values, a[m], a_rest[m]);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            float values[2] = {right[8 * n], right[4 * ROW + 8 * n]};
            split<WAY>(values, b[n], b_rest[n]);
        }
        if (WAY == TF32X3) {
            // The small ones first.
            multiply_all(sums, a_rest, b);
            multiply_all(sums, a, b_rest);
            multiply_all(sums, a, b);
        } else {
            multiply_all(acc, a, b);
        }
    }
    if (WAY == TF32X3) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int v = 0; v < 4; ++v) acc[m][n][v] += sums[m][n][v];
    }
}

template <typename T, typename O, Way WAY, int ROWS, int COLUMNS> __device__ void product(const Product &job) {
    constexpr int TILE = Shares<ROWS, COLUMNS>::TILE, ACROSS = Shares<ROWS, COLUMNS>::ACROSS;
    constexpr int THREADS = Shares<ROWS, COLUMNS>::THREADS;
    // Distance of rows in shared memory: for tensor cores such that the 8 by 4 values of a fragment lie in 32 banks.
    constexpr int ROW = WAY == PLAIN ? TILE : TILE + 8;
    constexpr int STAGE = 2 * DEPTH * ROW;
    __shared__ __align__(16) T memory[STAGES * STAGE];
    static_assert(STAGES * STAGE >= TILE * (TILE + 4), "a whole tile fits, with its rows apart");

    int tiles = job.symmetric ? job.tiles_down * (job.tiles_down + 1) / 2 : job.tiles_down * job.tiles_across;
    long long image = blockIdx.x / tiles;
    int tile = blockIdx.x % tiles, tile_down = 0, tile_across = 0;
    if (job.symmetric) {
        int length = job.tiles_down;
        for (; tile >= length; --length, ++tile_down) tile -= length;
        tile_across = tile_down + tile;
    } else {
        tile_down = tile / job.tiles_across;
        tile_across = tile % job.tiles_across;
    }
    int top = tile_down * TILE, left = tile_across * TILE;

    Operand<T, ROW, THREADS, 64 * sizeof(T) / 16, 0> a, b;
    // The columns after the first 64, by one half of the threads for each operand.
    Operand<T, ROW, 32, 8 * sizeof(T) / 16, 64> rest;
    bool rest_of_a = threadIdx.x < 32;
    auto open = [&](const Pair &pair) {
        const T *a_matrix = static_cast<const T *>(pair.a) + image * pair.a_image;
        const T *b_matrix = static_cast<const T *>(pair.b) + image * pair.b_image;
        a.open(a_matrix, pair.a_row, pair.inner, top);
        b.open(b_matrix, pair.b_row, pair.inner, left);
        if constexpr (TILE > 64) {
            if (rest_of_a) rest.open(a_matrix, pair.a_row, pair.inner, top);
            else rest.open(b_matrix, pair.b_row, pair.inner, left);
        }
    };
    int steps = (job.pairs[0].inner + DEPTH - 1) / DEPTH, next_pair = steps;
    if (job.pair_count > 1) steps += (job.pairs[1].inner + DEPTH - 1) / DEPTH;
    int fetched = 0, writing = 0;
    auto fetch = [&] {
        if (fetched < steps) {
            if (fetched == next_pair) open(job.pairs[1]);
            a.fetch(memory + writing);
            b.fetch(memory + writing + STAGE / 2);
            if constexpr (TILE > 64) rest.fetch(memory + writing + (rest_of_a ? 0 : STAGE / 2));
            writing = writing == (STAGES - 1) * STAGE ? 0 : writing + STAGE;
        }
        ++fetched;
        commit();
    };

    int down = threadIdx.x / ACROSS, across = threadIdx.x % ACROSS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    T acc[ROWS][COLUMNS] = {};
    float fragments[2][4][4] = {};
    open(job.pairs[0]);
    for (int step = 0; step < STAGES - 1; ++step) fetch();
    for (int step = 0, reading = 0; step < steps; ++step) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch();
        const T *left_tile = memory + reading, *right_tile = left_tile + STAGE / 2;
        if constexpr (WAY == PLAIN) {
#pragma unroll 8
            for (int k = 0; k < DEPTH; ++k) {
                T x[ROWS], y[COLUMNS];
                load(x, left_tile + k * ROW, down);
                load(y, right_tile + k * ROW, across);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c) acc[r][c] += x[r] * y[c];
            }
        } else {
            step_on_tensor_cores<WAY, ROW>(left_tile + warp / 2 * 32, right_tile + warp % 2 * 32, fragments);
        }
        reading = reading == (STAGES - 1) * STAGE ? 0 : reading + STAGE;
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
        for (int r = 0; r < ROWS; ++r) load(acc[r], memory + place(r, down) * APART, across);
    }
    for (int t = 0; t < job.target_count; ++t)
        write_tile<T, O>(job.targets[t], job, image, top, left, acc, memory);
}

// BLOCKS: what a multiprocessor shall hold at once, which bounds the registers.
#define PRODUCT(NAME, T, O, WAY, ROWS, COLUMNS, BLOCKS)                                                               \
    extern "C" __global__ void __launch_bounds__(Shares<ROWS, COLUMNS>::THREADS, BLOCKS)                              \
        NAME(const __grid_constant__ Product job) {                                                                   \
        product<T, O, WAY, ROWS, COLUMNS>(job);                                                                       \
    }
PRODUCT(product_f32, float, float, PLAIN, 8, 8, 6)
PRODUCT(product_bf16, float, __nv_bfloat16, PLAIN, 8, 8, 6)
PRODUCT(product_few_f32, float, float, PLAIN, 8, 4, 4)
PRODUCT(product_few_bf16, float, __nv_bfloat16, PLAIN, 8, 4, 4)
PRODUCT(product_wide_f32, float, float, PLAIN, 9, 9, 5)
PRODUCT(product_wide_bf16, float, __nv_bfloat16, PLAIN, 9, 9, 5)
PRODUCT(product_f64, double, double, PLAIN, 8, 4, 2)
PRODUCT(product_tf32_f32, float, float, TF32, 8, 4, 3)
PRODUCT(product_tf32_bf16, float, __nv_bfloat16, TF32, 8, 4, 3)
PRODUCT(product_tf32x3_f32, float, float, TF32X3, 8, 4, 3)
PRODUCT(product_tf32x3_bf16, float, __nv_bfloat16, TF32X3, 8, 4, 3)
