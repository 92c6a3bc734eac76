// Batch normalisation. Maps are (outer, channels, inner): inner is 1 where the channels of a pixel lie beside each
// other, outer the batch where they do not.

#include "common.cuh"

// Values that are added up in the type of the maps before they go to a sum in double precision.
constexpr int CHUNK = 16;

// Two sums a channel, over a part of the values.
struct Sums { double first, second; };

// Terms of the statistics of x: deviations from a value near the mean, and their squares. With the channel's first
// value in that place little is lost to cancellation as long as it is as near as the others, however large the mean.
template <typename T> struct Deviations {
    static constexpr bool LINES = false;
    using C = typename Computed<T>::type;
    const T *x;
    const T *near;
    __device__ C about(int channel, long long apart) const { return computed(near[channel * apart]); }
    __device__ void add(long long i, C about, C, C, C &first, C &second) const {
        C d = computed(x[i]) - about;
        first += d;
        second += d * d;
    }
};

// What comes from above, through the activation, whose argument is computed anew as the forward pass has it.
template <typename C> __device__ inline C normalised(C x, C mean, C scale, C shift) {
    if constexpr (sizeof(C) == 8) return __fma_rn(x - mean, scale, shift);
    else return __fmaf_rn(x - mean, scale, shift);
}

template <typename T> struct Gradients {
    static constexpr bool LINES = true;
    using C = typename Computed<T>::type;
    const T *x;
    const T *dy;
    const C *lines; // mean, scale, shift: `channels` values each
    int channels;
    Clip<C> clip;
    __device__ C about(int channel, long long) const { return lines[channel]; }
    __device__ void add(long long i, C mean, C scale, C shift, C &first, C &second) const {
        C value = computed(x[i]), g = computed(dy[i]);
        if (clip.on) g = clip.gradient(normalised(value, mean, scale, shift), g);
        first += g;
        second += g * (value - mean);
    }
};

// Sums of the terms over `outer` rows of channels beside each other. A block has `lanes` channels of `256 / lanes` rows
// at a time; blocks along y share the rows out. `partial` gets (split, channel) sums.
template <typename T, typename Terms>
__device__ void sums_beside(const Terms &terms, Sums *partial, long long outer, int channels, int lanes) {
    using C = typename Computed<T>::type;
    __shared__ Sums shared[256];
    int lane = threadIdx.x % lanes, row = threadIdx.x / lanes, rows = 256 / lanes;
    int channel = blockIdx.x * lanes + lane;
    Sums sum = {0, 0};
    if (channel < channels) {
        C about = terms.about(channel, 1), scale = C(0), shift = C(0);
        if constexpr (Terms::LINES) {
            scale = terms.lines[channels + channel];
            shift = terms.lines[2 * channels + channel];
        }
        long long each = (outer + gridDim.y - 1) / gridDim.y, from = blockIdx.y * each;
        long long to = from + each < outer ? from + each : outer;
        for (long long r = from + row; r < to; r += (long long)rows * CHUNK) {
            C first = C(0), second = C(0);
#pragma unroll 4
            for (int k = 0; k < CHUNK; ++k) {
                long long at = r + (long long)k * rows;
                if (at < to) terms.add(at * channels + channel, about, scale, shift, first, second);
            }
            sum.first += first;
            sum.second += second;
        }
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (row != 0 || channel >= channels) return;
    for (int r = 1; r < rows; ++r) {
        sum.first += shared[r * lanes + lane].first;
        sum.second += shared[r * lanes + lane].second;
    }
    partial[(long long)blockIdx.y * channels + channel] = sum;
}

// The same where the pixels of a channel lie beside each other: a block a channel and a share of the images.
template <typename T, typename Terms>
__device__ void sums_apart(const Terms &terms, Sums *partial, long long outer, int channels, int inner) {
    using C = typename Computed<T>::type;
    int channel = blockIdx.x;
    C about = terms.about(channel, inner), scale = C(0), shift = C(0);
    if constexpr (Terms::LINES) {
        scale = terms.lines[channels + channel];
        shift = terms.lines[2 * channels + channel];
    }
    Sums sum = {0, 0};
    for (long long image = blockIdx.y; image < outer; image += gridDim.y) {
        long long start = (image * channels + channel) * inner;
        for (int i = threadIdx.x; i < inner; i += 256 * CHUNK) {
            C first = C(0), second = C(0);
            for (int k = 0; k < CHUNK; ++k) {
                int at = i + 256 * k;
                if (at < inner) terms.add(start + at, about, scale, shift, first, second);
            }
            sum.first += first;
            sum.second += second;
        }
    }
    sum.first = block_sum(sum.first);
    sum.second = block_sum(sum.second);
    if (threadIdx.x == 0) partial[(long long)blockIdx.y * channels + channel] = sum;
}

__device__ inline Sums over_splits(const Sums *partial, int channel, int channels, int splits) {
    Sums sum = {0, 0};
    for (int s = 0; s < splits; ++s) {
        sum.first += partial[(long long)s * channels + channel].first;
        sum.second += partial[(long long)s * channels + channel].second;
    }
    return sum;
}

// Of each channel: mean, 1/sqrt(variance + epsilon) to `facts`; mean, scale, shift to `lines`; and the running
// statistics moved towards those of the batch, where `mean_out` is given. A thread a channel.
template <typename T>
__device__ void finish_statistics(const Sums *partial, const T *x, const typename Computed<T>::type *gamma,
                                  const typename Computed<T>::type *beta, const typename Computed<T>::type *running_mean,
                                  const typename Computed<T>::type *running_variance, double *facts,
                                  typename Computed<T>::type *lines, typename Computed<T>::type *mean_out,
                                  typename Computed<T>::type *variance_out, int channels, int inner, int splits,
                                  double count, double epsilon, double momentum) {
    using C = typename Computed<T>::type;
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    double mean, variance;
    if (partial) {
        Sums sum = over_splits(partial, c, channels, splits);
        double off = sum.first / count;
        mean = computed(x[(long long)c * inner]) + off;
        variance = fmax(sum.second - count * off * off, 0.0) / count;
        // What is not finite must show.
        if (!isfinite(sum.second)) variance = NAN;
    } else {
        mean = running_mean[c];
        variance = running_variance[c];
    }
    double inverse = 1 / sqrt(variance + epsilon);
    facts[c] = mean;
    facts[channels + c] = inverse;
    lines[c] = static_cast<C>(mean);
    lines[channels + c] = static_cast<C>(gamma[c] * inverse);
    lines[2 * channels + c] = beta[c];
    if (mean_out) {
        double unbiased = variance * (count / (count - 1));
        mean_out[c] = static_cast<C>(running_mean[c] + momentum * (mean - running_mean[c]));
        variance_out[c] = static_cast<C>(running_variance[c] + momentum * (unbiased - running_variance[c]));
    }
}

// Gradients of scale and shift, and the lines of that of x: mean, scale, shift, then offset and slope, which are 0
// where the statistics are constants.
template <typename T>
__device__ void finish_gradients(const Sums *partial, const double *facts, typename Computed<T>::type *lines,
                                 typename Computed<T>::type *dgamma, typename Computed<T>::type *dbeta, int channels,
                                 int splits, double count, int constant) {
    using C = typename Computed<T>::type;
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    Sums sum = over_splits(partial, c, channels, splits);
    double inverse = facts[channels + c];
    dgamma[c] = static_cast<C>(sum.second * inverse);
    dbeta[c] = static_cast<C>(sum.first);
    lines[3 * channels + c] = static_cast<C>(constant ? 0 : sum.first / count);
    lines[4 * channels + c] = static_cast<C>(constant ? 0 : sum.second * inverse * inverse / count);
}

// y = (x - mean) scale + shift, and what lies beside where that is given, and the activation after it. Channels beside
// each other come V at a time, others one.
template <typename T, int V>
__device__ void apply(const T *x, const typename Computed<T>::type *lines, T *y, long long count, int channels, int inner,
                      const T *beside, Clip<typename Computed<T>::type> clip) {
    using C = typename Computed<T>::type;
    EACH(i, count / V) {
        Values<T, V> in = values_of<V>(x, i), other = in, out;
        if (beside) other = values_of<V>(beside, i);
        int first = V > 1 ? i % (channels / V) * V : i / inner % channels;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            int c = first + k;
            C value = normalised(computed(in.v[k]), lines[c], lines[channels + c], lines[2 * channels + c]);
            if (beside) value += computed(other.v[k]);
            out.v[k] = stored<T>(clip.of(value));
        }
        reinterpret_cast<Values<T, V> *>(y)[i] = out;
    }
}

// dx = scale (g - offset - (x - mean) slope).
template <typename T, int V>
__device__ void spread_gradient(const T *x, const T *dy, const typename Computed<T>::type *lines, T *dx, long long count,
                                int channels, int inner, Clip<typename Computed<T>::type> clip) {
    using C = typename Computed<T>::type;
    EACH(i, count / V) {
        Values<T, V> in = values_of<V>(x, i), up = values_of<V>(dy, i), out;
        int first = V > 1 ? i % (channels / V) * V : i / inner % channels;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            int c = first + k;
            C value = computed(in.v[k]), g = computed(up.v[k]), mean = lines[c], scale = lines[channels + c];
            if (clip.on) g = clip.gradient(normalised(value, mean, scale, lines[2 * channels + c]), g);
            out.v[k] = stored<T>(scale * (g - lines[3 * channels + c] - (value - mean) * lines[4 * channels + c]));
        }
        reinterpret_cast<Values<T, V> *>(dx)[i] = out;
    }
}

// Sums of a map over all but the channels: the gradient of a bias.
template <typename T> struct Plain {
    static constexpr bool LINES = false;
    using C = typename Computed<T>::type;
    const T *x;
    __device__ C about(int, long long) const { return C(0); }
    __device__ void add(long long i, C, C, C, C &first, C &) const { first += computed(x[i]); }
};

template <typename T>
__device__ void finish_sums(const Sums *partial, typename Computed<T>::type *sums, int channels, int splits) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < channels) sums[c] = static_cast<typename Computed<T>::type>(over_splits(partial, c, channels, splits).first);
}

template <typename T, typename Terms>
__device__ void sums(const Terms &terms, Sums *partial, long long outer, int channels, int inner, int lanes) {
    if (inner == 1) sums_beside<T>(terms, partial, outer, channels, lanes);
    else sums_apart<T>(terms, partial, outer, channels, inner);
}

#define NORM(T, NAME)                                                                                                 \
    extern "C" __global__ void statistics_##NAME(const T *x, Sums *partial, long long outer, int channels, int inner, \
                                                 int lanes) {                                                         \
        sums<T>(Deviations<T>{x, x}, partial, outer, channels, inner, lanes);                                         \
    }                                                                                                                 \
    extern "C" __global__ void finish_statistics_##NAME(                                                              \
        const Sums *partial, const T *x, const Computed<T>::type *gamma, const Computed<T>::type *beta,               \
        const Computed<T>::type *running_mean, const Computed<T>::type *running_variance, double *facts,              \
        Computed<T>::type *lines, Computed<T>::type *mean_out, Computed<T>::type *variance_out, int channels,         \
        int inner, int splits, double count, double epsilon, double momentum) {                                       \
        finish_statistics(partial, x, gamma, beta, running_mean, running_variance, facts, lines, mean_out,            \
                          variance_out, channels, inner, splits, count, epsilon, momentum);                           \
    }                                                                                                                 \
    extern "C" __global__ void gradients_##NAME(const T *x, const T *dy, const Computed<T>::type *lines,              \
                                                Sums *partial, long long outer, int channels, int inner, int lanes,   \
                                                int clips, double upper) {                                            \
        sums<T>(Gradients<T>{x, dy, lines, channels, CLIP(T)}, partial, outer, channels, inner, lanes);               \
    }                                                                                                                 \
    extern "C" __global__ void finish_gradients_##NAME(const Sums *partial, const double *facts,                      \
                                                       Computed<T>::type *lines, Computed<T>::type *dgamma,           \
                                                       Computed<T>::type *dbeta, int channels, int splits,            \
                                                       double count, int constant) {                                  \
        finish_gradients<T>(partial, facts, lines, dgamma, dbeta, channels, splits, count, constant);                 \
    }                                                                                                                 \
    extern "C" __global__ void apply_##NAME(const T *x, const Computed<T>::type *lines, T *y, long long count,        \
                                            int channels, const T *beside, int clips, double upper, int inner) {      \
        apply<T, 1>(x, lines, y, count, channels, inner, beside, CLIP(T));                                            \
    }                                                                                                                 \
    extern "C" __global__ void apply_wide_##NAME(const T *x, const Computed<T>::type *lines, T *y, long long count,   \
                                                 int channels, const T *beside, int clips, double upper) {            \
        apply<T, 16 / sizeof(T)>(x, lines, y, count, channels, 1, beside, CLIP(T));                                   \
    }                                                                                                                 \
    extern "C" __global__ void spread_gradient_##NAME(const T *x, const T *dy, const Computed<T>::type *lines, T *dx, \
                                                      long long count, int channels, int inner, int clips,            \
                                                      double upper) {                                                 \
        spread_gradient<T, 1>(x, dy, lines, dx, count, channels, inner, CLIP(T));                                     \
    }                                                                                                                 \
    extern "C" __global__ void spread_gradient_wide_##NAME(const T *x, const T *dy, const Computed<T>::type *lines,   \
                                                           T *dx, long long count, int channels, int clips,           \
                                                           double upper) {                                            \
        spread_gradient<T, 16 / sizeof(T)>(x, dy, lines, dx, count, channels, 1, CLIP(T));                            \
    }                                                                                                                 \
    extern "C" __global__ void channel_sums_##NAME(const T *x, Sums *partial, long long outer, int channels,          \
                                                   int inner, int lanes) {                                            \
        sums<T>(Plain<T>{x}, partial, outer, channels, inner, lanes);                                                 \
    }                                                                                                                 \
    extern "C" __global__ void finish_sums_##NAME(const Sums *partial, Computed<T>::type *sums, int channels,         \
                                                  int splits) {                                                       \
        finish_sums<T>(partial, sums, channels, splits);                                                              \
    }
INSTANCES_OF_MAPS(NORM)
