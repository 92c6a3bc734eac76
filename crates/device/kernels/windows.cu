// Pooling over windows, and local response normalisation. A thread a value of what is written, so sums have one order.

#include "common.cuh"

// Windows along an axis, as `Axis` of the ops has them.
struct Axis {
    int input, output, kernel, stride, padding, adaptive;
    // Places of the input that a window covers.
    __device__ int from(int o) const {
        if (adaptive) return (long long)o * input / output;
        int at = o * stride - padding;
        return at < 0 ? 0 : at;
    }
    __device__ int to(int o) const {
        if (adaptive) return ((long long)(o + 1) * input + output - 1) / output;
        int at = o * stride - padding + kernel;
        return at > input ? input : at;
    }
    // Places of the input and the padding that it covers.
    __device__ int padded(int o) const {
        int at = o * stride, end = at + kernel, most = input + 2 * padding;
        return (end < most ? end : most) - at;
    }
    // Windows that may cover a place: the first and the one after the last.
    __device__ int first(int i) const {
        if (adaptive) return (long long)i * output / input;
        int past = i + padding - kernel;
        return past < 0 ? 0 : past / stride + 1;
    }
    __device__ int last(int i) const {
        int end = adaptive ? ((long long)(i + 1) * output + input - 1) / input : (i + padding) / stride + 1;
        return end < output ? end : output;
    }
};

struct Windows {
    Axis rows, columns;
    // Channels, and whether those of a pixel lie beside each other.
    int channels, beside;
    int include_padding;
    int unused;
};

// A value's pixel and where its plane's first value lies; `step` is the distance of pixels.
struct Place { int row, column; long long plane, step; };

__device__ inline Place place(long long i, int channels, int height, int width, int beside) {
    Place p;
    if (beside) {
        long long pixel = i / channels;
        p.column = pixel % width;
        p.row = pixel / width % height;
        p.step = channels;
        p.plane = i % channels;
    } else {
        p.column = i % width;
        p.row = i / width % height;
        p.step = 1;
        p.plane = 0;
    }
    return p;
}

// Where the plane of a value's image and channel begins in a tensor of planes of so many pixels.
__device__ inline long long start(long long i, int channels, long long own, long long other, int beside) {
    if (beside) return i / (own * channels) * other * channels + i % channels;
    return i / own * other;
}

template <typename T> __device__ void max_pool(const T *x, T *y, int *winners, long long count, const Windows &w) {
    long long out = (long long)w.rows.output * w.columns.output, in = (long long)w.rows.input * w.columns.input;
    EACH(i, count) {
        Place p = place(i, w.channels, w.rows.output, w.columns.output, w.beside);
        const T *plane = x + start(i, w.channels, out, in, w.beside);
        int best = w.rows.from(p.row) * w.columns.input + w.columns.from(p.column);
        auto most = computed(plane[best * p.step]);
        for (int r = w.rows.from(p.row); r < w.rows.to(p.row); ++r)
            for (int c = w.columns.from(p.column); c < w.columns.to(p.column); ++c) {
                int at = r * w.columns.input + c;
                auto value = computed(plane[at * p.step]);
                // Not a number wins, the last one of several.
                if (value > most || value != value) {
                    most = value;
                    best = at;
                }
            }
        y[i] = plane[best * p.step];
        winners[i] = best;
    }
}

template <typename T>
__device__ void max_pool_gradient(const T *dy, const int *winners, T *dx, long long count, const Windows &w) {
    using C = typename Computed<T>::type;
    long long out = (long long)w.rows.output * w.columns.output, in = (long long)w.rows.input * w.columns.input;
    EACH(i, count) {
        Place p = place(i, w.channels, w.rows.input, w.columns.input, w.beside);
        long long plane = start(i, w.channels, in, out, w.beside);
        int self = p.row * w.columns.input + p.column;
        C sum = C(0);
        for (int r = w.rows.first(p.row); r < w.rows.last(p.row); ++r)
            for (int c = w.columns.first(p.column); c < w.columns.last(p.column); ++c) {
                long long at = plane + (r * (long long)w.columns.output + c) * p.step;
                if (winners[at] == self) sum += computed(dy[at]);
            }
        dx[i] = stored<T>(sum);
    }
}

template <typename C> __device__ inline C divisor(const Windows &w, int row, int column) {
    if (w.include_padding) return C(w.rows.padded(row)) * C(w.columns.padded(column));
    return C(w.rows.to(row) - w.rows.from(row)) * C(w.columns.to(column) - w.columns.from(column));
}

template <typename T> __device__ void average_pool(const T *x, T *y, long long count, const Windows &w) {
    using C = typename Computed<T>::type;
    long long out = (long long)w.rows.output * w.columns.output, in = (long long)w.rows.input * w.columns.input;
    EACH(i, count) {
        Place p = place(i, w.channels, w.rows.output, w.columns.output, w.beside);
        const T *plane = x + start(i, w.channels, out, in, w.beside);
        C sum = C(0);
        for (int r = w.rows.from(p.row); r < w.rows.to(p.row); ++r)
            for (int c = w.columns.from(p.column); c < w.columns.to(p.column); ++c)
                sum += computed(plane[(r * (long long)w.columns.input + c) * p.step]);
        y[i] = stored<T>(sum / divisor<C>(w, p.row, p.column));
    }
}

template <typename T> __device__ void average_pool_gradient(const T *dy, T *dx, long long count, const Windows &w) {
    using C = typename Computed<T>::type;
    long long out = (long long)w.rows.output * w.columns.output, in = (long long)w.rows.input * w.columns.input;
    EACH(i, count) {
        Place p = place(i, w.channels, w.rows.input, w.columns.input, w.beside);
        const T *plane = dy + start(i, w.channels, in, out, w.beside);
        C sum = C(0);
        for (int r = w.rows.first(p.row); r < w.rows.last(p.row); ++r)
            for (int c = w.columns.first(p.column); c < w.columns.last(p.column); ++c) {
                bool covers = r >= 0 && p.row >= w.rows.from(r) && p.row < w.rows.to(r) && p.column >= w.columns.from(c) &&
                              p.column < w.columns.to(c);
                if (covers) sum += computed(plane[(r * (long long)w.columns.output + c) * p.step]) / divisor<C>(w, r, c);
            }
        dx[i] = stored<T>(sum);
    }
}

// The mean of each plane: a warp a plane.
template <typename T> __device__ void plane_means(const T *x, T *y, long long planes, int pixels) {
    using C = typename Computed<T>::type;
    long long plane = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (plane >= planes) return;
    C sum = C(0);
    for (int i = lane; i < pixels; i += 32) sum += computed(x[plane * pixels + i]);
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (lane == 0) y[plane] = stored<T>(sum / C(pixels));
}

template <typename T> __device__ void plane_means_gradient(const T *dy, T *dx, long long count, int pixels) {
    using C = typename Computed<T>::type;
    EACH(i, count) dx[i] = stored<T>(computed(dy[i / pixels]) / C(pixels));
}

// Local response normalisation of (batch, channels, pixels).
struct Response {
    double alpha, beta, k; // alpha over the size already
    int size, channels, pixels, unused;
};

__device__ inline float power(float s, double e) { return powf(s, static_cast<float>(e)); }
__device__ inline double power(double s, double e) { return pow(s, e); }

template <typename T>
__device__ inline typename Computed<T>::type response(const T *image, int c, int pixel, const Response &w) {
    using C = typename Computed<T>::type;
    int from = c - w.size / 2, to = c + (w.size - 1) / 2 + 1;
    C sum = C(0);
    for (int j = from < 0 ? 0 : from; j < (to < w.channels ? to : w.channels); ++j) {
        C value = computed(image[(long long)j * w.pixels + pixel]);
        sum += value * value;
    }
    return C(w.alpha) * sum + C(w.k);
}

template <typename T> __device__ void response_norm(const T *x, T *y, long long count, const Response &w) {
    EACH(i, count) {
        int pixel = i % w.pixels, c = i / w.pixels % w.channels;
        const T *image = x + i / ((long long)w.channels * w.pixels) * w.channels * w.pixels;
        y[i] = stored<T>(computed(x[i]) * power(response(image, c, pixel, w), -w.beta));
    }
}

template <typename T>
__device__ void response_norm_gradient(const T *x, const T *dy, T *dx, long long count, const Response &w) {
    using C = typename Computed<T>::type;
    EACH(i, count) {
        int pixel = i % w.pixels, c = i / w.pixels % w.channels;
        long long begin = i / ((long long)w.channels * w.pixels) * w.channels * w.pixels;
        const T *image = x + begin;
        C own = C(0), others = C(0);
        int from = c - (w.size - 1) / 2, to = c + w.size / 2 + 1;
        for (int j = from < 0 ? 0 : from; j < (to < w.channels ? to : w.channels); ++j) {
            long long at = begin + (long long)j * w.pixels + pixel;
            C s = response(image, j, pixel, w), scaled = computed(dy[at]) * power(s, -w.beta);
            others += scaled * computed(x[at]) / s;
            if (j == c) own = scaled;
        }
        dx[i] = stored<T>(own - C(2 * w.alpha * w.beta) * computed(x[i]) * others);
    }
}

// Structures come as pointers' values: one argument each.
template <typename T> struct MaxPool { const T *x; T *y; int *winners; long long count; Windows w; };
template <typename T> struct Pooled { const T *x; T *y; long long count; Windows w; };
template <typename T> struct Responded { const T *x; const T *dy; T *y; long long count; Response w; };

#define WINDOWS(T, NAME)                                                                                              \
    extern "C" __global__ void max_pool_##NAME(MaxPool<T> a) { max_pool(a.x, a.y, a.winners, a.count, a.w); }         \
    extern "C" __global__ void max_pool_gradient_##NAME(MaxPool<T> a) {                                               \
        max_pool_gradient(a.x, a.winners, a.y, a.count, a.w);                                                         \
    }                                                                                                                 \
    extern "C" __global__ void average_pool_##NAME(Pooled<T> a) { average_pool(a.x, a.y, a.count, a.w); }             \
    extern "C" __global__ void average_pool_gradient_##NAME(Pooled<T> a) {                                            \
        average_pool_gradient(a.x, a.y, a.count, a.w);                                                                \
    }                                                                                                                 \
    extern "C" __global__ void plane_means_##NAME(const T *x, T *y, long long planes, int pixels) {                   \
        plane_means(x, y, planes, pixels);                                                                            \
    }                                                                                                                 \
    extern "C" __global__ void plane_means_gradient_##NAME(const T *dy, T *dx, long long count, int pixels) {         \
        plane_means_gradient(dy, dx, count, pixels);                                                                  \
    }                                                                                                                 \
    extern "C" __global__ void response_norm_##NAME(Responded<T> a) { response_norm(a.x, a.y, a.count, a.w); }        \
    extern "C" __global__ void response_norm_gradient_##NAME(Responded<T> a) {                                        \
        response_norm_gradient(a.x, a.dy, a.y, a.count, a.w);                                                         \
    }
INSTANCES_OF_MAPS(WINDOWS)
