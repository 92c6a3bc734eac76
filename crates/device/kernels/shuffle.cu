// The channels of two maps as those of one: in turns (2c is channel c of the first, 2c + 1 of the second), or one
// after the other. A thread a value of each. Maps are rows of channels of `inner` values: images of planes, or, with
// the channels of a pixel beside each other, pixels of single values.

#include "common.cuh"

struct Shuffled {
    long long rows;
    int channels, inner, turns;
    // Where channel 0 of the second lies in both, and the distance of channels there.
    __device__ int second() const { return turns ? 1 : channels; }
    __device__ int step() const { return turns ? 2 : 1; }
};

// A value of a half: its place there, and that of the value of the first in both.
struct Place { long long row; int in_row; long long both; };

__device__ inline Place place(long long i, const Shuffled &s) {
    int values = s.channels * s.inner;
    Place p;
    p.row = i / values;
    p.in_row = i - p.row * values;
    int channel = s.inner == 1 ? p.in_row : p.in_row / s.inner;
    p.both = (2 * p.row * s.channels + s.step() * channel) * s.inner + (p.in_row - channel * s.inner);
    return p;
}

// Rows of the first lie `apart` values from each other.
template <typename T>
__device__ void join(const T *first, long long apart, const T *second, T *both, const Shuffled &s) {
    long long gap = (long long)s.second() * s.inner;
    EACH(i, s.rows * s.channels * s.inner) {
        Place p = place(i, s);
        both[p.both] = first[p.row * apart + p.in_row];
        both[p.both + gap] = second[i];
    }
}

// The first only where there is a place for it.
template <typename T> __device__ void part(const T *both, T *first, T *second, const Shuffled &s) {
    long long gap = (long long)s.second() * s.inner;
    EACH(i, s.rows * s.channels * s.inner) {
        Place p = place(i, s);
        if (first) first[i] = both[p.both];
        second[i] = both[p.both + gap];
    }
}

#define SHUFFLE(T, NAME)                                                                                              \
    extern "C" __global__ void join_##NAME(const T *first, long long apart, const T *second, T *both,                 \
                                           long long rows, int channels, int inner, int turns) {                      \
        join(first, apart, second, both, Shuffled{rows, channels, inner, turns});                                     \
    }                                                                                                                 \
    extern "C" __global__ void part_##NAME(const T *both, T *first, T *second, long long rows, int channels,          \
                                           int inner, int turns) {                                                    \
        part(both, first, second, Shuffled{rows, channels, inner, turns});                                            \
    }
INSTANCES_OF_MAPS(SHUFFLE)
