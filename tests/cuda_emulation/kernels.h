// SPDX-License-Identifier: Apache-2.0
// Kernels that use what the emulator offers. Pointers are to device memory; stream is a cudaStream_t.
#pragma once

#include <cstdint>

namespace kernels {

// out = 6-neighbour Laplacian of in, zero outside. in, out: [depth, height, width]
void laplacian(const float* in, float* out, int depth, int height, int width, void* stream);

// out[r] = Σ in[r, :]. in: [rows, columns]
template <class T>
void row_sums(const T* in, T* out, int rows, std::int64_t columns, void* stream);

// out = inclusive prefix sums within each group of `threads` elements.
void scan(const int* in, int* out, int n, int threads, void* stream);

// out = scale · in, four elements at a time. in, out: [n], aligned to 16 bytes
void scale_by_four(const float* in, float* out, std::int64_t n, float scale, void* stream);

// half: 16-bit numbers as the GPU would store them
void to_half(const float* in, std::uint16_t* half, int n, bool bfloat16, void* stream);
void from_half(const std::uint16_t* half, float* out, int n, bool bfloat16, void* stream);

// *out = Σ in in a fixed order: the last block to finish adds up the blocks' sums. partial: [blocks], arrived: [1], 0
void sum_in_one_pass(const float* in, float* partial, unsigned* arrived, float* out, int n, void* stream);

// What the warp functions give to each lane of one warp. out: [kWarpResults, 32]
constexpr int kWarpResults = 12;
void warp_functions(const int* in, int* out, void* stream);

// Σ, minimum and maximum of in by atomics. out: [3], holding 0, INT_MAX, INT_MIN
void atomic_functions(const int* in, int* out, int n, void* stream);

// out[i] = i, with every coordinate of a 3-D grid of 3-D blocks taking part, and 100 KiB of shared memory
void number_cells(std::int64_t* out, int size, void* stream);

}  // namespace kernels
