// SPDX-License-Identifier: Apache-2.0
// check_kernels [name…]: each kernel of kernels.cu against plain loops on the host.
#include <climits>
#include <numeric>

#include "driver.h"
#include "kernels.h"

namespace {

using driver::DeviceArray;
using driver::expect;

// Small whole numbers: every sum of them is exact in fp32, in any order.
template <class T>
std::vector<T> numbers(int n) {
    std::vector<T> values(n);
    for (int i = 0; i < n; ++i) values[i] = static_cast<T>(i * 7919LL % 201 - 100);
    return values;
}

void laplacian() {
    const int depth = 3, height = 11, width = 19;
    const auto host = numbers<float>(depth * height * width);
    DeviceArray<float> in(host), out(host.size());
    kernels::laplacian(in.data(), out.data(), depth, height, width, nullptr);
    std::vector<double> expected(host.size());
    const auto at = [&](int z, int y, int x) -> double {
        const bool inside = z >= 0 && z < depth && y >= 0 && y < height && x >= 0 && x < width;
        return inside ? host[(z * height + y) * width + x] : 0.;
    };
    for (int z = 0; z < depth; ++z) {
        for (int y = 0; y < height; ++y) {
            for (int x = 0; x < width; ++x) {
                expected[(z * height + y) * width + x] = at(z - 1, y, x) + at(z + 1, y, x) + at(z, y - 1, x) +
                                                         at(z, y + 1, x) + at(z, y, x - 1) + at(z, y, x + 1) -
                                                         6 * at(z, y, x);
            }
        }
    }
    driver::expect_near(out.host(), expected, 0);
}

template <class T>
void row_sums() {
    const int rows = 4, columns = 333;
    const auto host = numbers<T>(rows * columns);
    DeviceArray<T> in(host), out(rows);
    kernels::row_sums(in.data(), out.data(), rows, columns, nullptr);
    for (int r = 0; r < rows; ++r) {
        expect(out.host()[r] == std::accumulate(&host[r * columns], &host[r * columns] + columns, T{0}), "row sums");
    }
}

void scan() {
    const int n = 150, threads = 64;
    const auto host = numbers<int>(n);
    DeviceArray<int> in(host), out(n);
    kernels::scan(in.data(), out.data(), n, threads, nullptr);
    int sum = 0;
    for (int i = 0; i < n; ++i) {
        sum = i % threads ? sum + host[i] : host[i];
        expect(out.host()[i] == sum, "prefix sums");
    }
}

void scale_by_four() {
    const int n = 131;
    const auto host = numbers<float>(n);
    DeviceArray<float> in(host), out(n);
    kernels::scale_by_four(in.data(), out.data(), n, 0.5f, nullptr);
    std::vector<double> expected(host.begin(), host.end());
    for (double& e : expected) e *= 0.5;
    driver::expect_near(out.host(), expected, 0);
}

void sum_in_one_pass() {
    const auto host = numbers<float>(100);
    DeviceArray<float> in(host), partial(5), out(1);
    DeviceArray<unsigned> arrived(std::vector<unsigned>{0});
    kernels::sum_in_one_pass(in.data(), partial.data(), arrived.data(), out.data(), 100, nullptr);
    driver::expect_near(out.host(), {std::accumulate(host.begin(), host.end(), 0.)}, 0);
}

void warp_functions() {
    std::vector<int> v(32);
    for (int i = 0; i < 32; ++i) v[i] = i * 7 % 32 - 9;
    DeviceArray<int> in(v), out(kernels::kWarpResults * 32);
    kernels::warp_functions(in.data(), out.data(), nullptr);
    int negative = 0, sum = 0;
    for (int i = 0; i < 32; ++i) {
        negative |= static_cast<int>(unsigned{v[i] < 0} << i);
        sum += v[i];
    }
    const auto result = out.host();
    for (int lane = 0; lane < 32; ++lane) {
        const int segment = lane / 8 * 8;
        const int expected[kernels::kWarpResults] = {
            v[5],
            v[lane < 3 ? lane : lane - 3],
            v[lane > 28 ? lane : lane + 3],
            v[lane ^ 6],
            v[segment + 1],
            v[lane % 8 > 4 ? lane : lane + 3],
            negative,
            3,
            sum,
            -9,
            22,
            v[lane ^ 1],
        };
        for (int k = 0; k < kernels::kWarpResults; ++k) {
            expect(result[k * 32 + lane] == expected[k], "warp function " + std::to_string(k));
        }
    }
}

void atomic_functions() {
    const auto host = numbers<int>(300);
    DeviceArray<int> in(host), out(std::vector<int>{0, INT_MAX, INT_MIN});
    kernels::atomic_functions(in.data(), out.data(), 300, nullptr);
    expect(out.host()[0] == std::accumulate(host.begin(), host.end(), 0), "atomicAdd");
    expect(out.host()[1] == -100 && out.host()[2] == 100, "atomicMin, atomicMax");
}

void number_cells() {
    const int size = 8;
    DeviceArray<std::int64_t> out(size * size * size);
    kernels::number_cells(out.data(), size, nullptr);
    const auto result = out.host();
    for (std::size_t i = 0; i < result.size(); ++i) expect(result[i] == static_cast<std::int64_t>(i), "numbered");
}

}  // namespace

int main(int argc, char** argv) {
    return driver::run_cases({{"laplacian", laplacian},
                              {"row_sums_fp32", row_sums<float>},
                              {"row_sums_fp64", row_sums<double>},
                              {"scan", scan},
                              {"scale_by_four", scale_by_four},
                              {"sum_in_one_pass", sum_in_one_pass},
                              {"warp_functions", warp_functions},
                              {"atomic_functions", atomic_functions},
                              {"number_cells", number_cells}},
                             argc, argv);
}
