// SPDX-License-Identifier: Apache-2.0
// __half and __nv_bfloat16 as storage types: conversions only, rounding to nearest even, NaN as CUDA writes
// it (0x7fff). No arithmetic: medaccel's kernels compute in fp32, and other uses do not compile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vector_types.h"

namespace medaccel::emulation {

template <class To, class From>
inline To bit_cast(const From& value) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast: the sizes differ");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

inline std::uint16_t half_from_float(float value) {
    const auto bits = bit_cast<std::uint32_t>(value);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;                         // NaN
    if (magnitude >= 0x477ff000u) return sign | std::uint16_t{0x7c00};  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {  // below 2^-14: a subnormal, a multiple of 2^-24
        const float multiple = std::nearbyint(std::ldexp(bit_cast<float>(magnitude), 24));
        return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(multiple));
    }
    const std::uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);  // 13 bits go, ties to even
    return static_cast<std::uint16_t>(sign | (rounded - (112u << 23)) >> 13);   // exponent bias 127 to 15
}

inline float float_from_half(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    const std::uint32_t exponent = bits >> 10 & 31u;
    const std::uint32_t fraction = bits & 1023u;
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), sign ? -1.f : 1.f);
    if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | fraction << 13);
    return bit_cast<float>(sign | (exponent + 112u) << 23 | fraction << 13);
}

inline std::uint16_t bfloat16_from_float(float value) {
    const auto bits = bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float float_from_bfloat16(std::uint16_t bits) {
    return bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

}  // namespace medaccel::emulation

struct alignas(2) __half {
    __half() = default;
    explicit __half(float value) : bits(medaccel::emulation::half_from_float(value)) {}
    explicit operator float() const { return medaccel::emulation::float_from_half(bits); }
    std::uint16_t bits;
};

struct alignas(2) __nv_bfloat16 {
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float value) : bits(medaccel::emulation::bfloat16_from_float(value)) {}
    explicit operator float() const { return medaccel::emulation::float_from_bfloat16(bits); }
    std::uint16_t bits;
};

struct alignas(4) __half2 {
    __half x, y;
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return medaccel::emulation::bit_cast<__half>(bits); }

inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    return medaccel::emulation::bit_cast<__nv_bfloat16>(bits);
}
