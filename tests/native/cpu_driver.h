// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels' drivers share: numbers, buffers without slack, plain vectors, and the verdict.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace driver {

// "races": only what runs in several threads, for ThreadSanitizer.
inline bool only_races(int argc, char** argv) { return argc > 1 && std::strcmp(argv[1], "races") == 0; }

inline double random_value() {  // xorshift: the same numbers everywhere
    static uint64_t state = 88172645463325252ull;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<double>(state >> 11) / 9007199254740992.0 - 0.5;
}

template <class T>
struct Buffer {  // exactly as long as the tensor, so that a sanitizer sees the first element too many
    int64_t n;
    std::unique_ptr<T[]> data;
    explicit Buffer(int64_t size) : n(size), data(new T[size]) {
        for (int64_t i = 0; i < n; ++i) data[i] = std::numeric_limits<T>::quiet_NaN();
    }
    void randomize(double spread) {
        for (int64_t i = 0; i < n; ++i) data[i] = static_cast<T>(spread * random_value());
    }
    T* get() const { return data.get(); }
    T& operator[](int64_t i) const { return data[i]; }
    std::vector<double> doubles() const { return std::vector<double>(get(), get() + n); }
};

inline double dot(const double* a, const double* b, int64_t channels) {
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += a[c] * b[c];
    return sum;
}

// The rows of x [n][channels], each over its length; a zero vector stays zero.
inline std::vector<double> unit(std::vector<double> x, int64_t channels) {
    for (size_t i = 0; i < x.size(); i += channels) {
        const double length = std::sqrt(dot(&x[i], &x[i], channels));
        for (int64_t c = 0; c < channels; ++c) x[i + c] = length == 0 ? 0 : x[i + c] / length;
    }
    return x;
}

// g: gradients by the unit vectors of x; becomes those by x.
inline void through_norm(const std::vector<double>& x, std::vector<double>& g, int64_t channels) {
    const auto u = unit(x, channels);
    for (size_t i = 0; i < x.size(); i += channels) {
        const double length = std::sqrt(dot(&x[i], &x[i], channels)), along = dot(&u[i], &g[i], channels);
        for (int64_t c = 0; c < channels; ++c) g[i + c] = length == 0 ? 0 : (g[i + c] - along * u[i + c]) / length;
    }
}

struct Verdict {
    int checked = 0, failed = 0;
    template <class T>
    void compare(const char* what, const Buffer<T>& ours, const std::vector<double>& truth, double allowed) {
        double largest = 1, worst = 0;
        for (double t : truth) largest = std::max(largest, std::fabs(t));
        for (int64_t i = 0; i < ours.n; ++i) {
            const double e = std::fabs(ours[i] - truth[i]) / largest;
            if (!(e <= worst)) worst = e;
        }
        ++checked;
        if (worst <= allowed) return;
        ++failed;
        std::printf("FAILED %s: error %g, allowed %g\n", what, worst, allowed);
    }
    int finish() const {
        std::printf("%d checked, %d failed\n", checked, failed);
        return failed != 0;
    }
};

}  // namespace driver
