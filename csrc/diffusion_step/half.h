// SPDX-License-Identifier: Apache-2.0
// bfloat16 and float16 to float and back on the CPU, rounding to nearest even, without branches: loops over these
// become vector code on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace medaccel::diffusion_step {

inline uint32_t bits_of(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    return b;
}

inline float float_of(uint32_t b) {
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}

struct BFloat16 {
    uint16_t bits;
    operator float() const { return float_of(uint32_t{bits} << 16); }
    BFloat16() = default;
    explicit BFloat16(float x) {
        const uint32_t b = bits_of(x), rounded = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
        bits = static_cast<uint16_t>((b & 0x7FFFFFFFu) > 0x7F800000u ? (b >> 16) | 0x40u : rounded);
    }
};

struct Float16 {
    uint16_t bits;
    operator float() const {
        const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
        // 2^112 moves the exponent's bias from 15 to 127, subnormals included; infinity and NaN keep all ones.
        const uint32_t number = bits_of(float_of(magnitude << 13) * 5.192296858534828e33f);
        return float_of(sign | (magnitude >= 0x7C00u ? 0x7F800000u | (magnitude << 13) : number));
    }
    Float16() = default;
    explicit Float16(float x) {
        const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7FFFFFFFu;
        // Adding ½ rounds a subnormal to a multiple of 2^−24 in the float's last bits.
        const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
        const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
        const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
        const uint32_t number = magnitude < 0x38800000u ? subnormal : normal;
        bits = static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? large : number));
    }
};

}  // namespace medaccel::diffusion_step
