// Vectors of fp32 for the instruction set this file is compiled for, by the compiler's portable vector extension.
//
// Everything lives in an unnamed namespace: forward.cpp is compiled once per instruction set, and no symbol of one of
// its objects may be shared with another by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "params/operands.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace lite_attention {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

constexpr int kLanes = kVectorBytes / 4;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Ints = int32_t __attribute__((vector_size(kVectorBytes)));
using Words = uint32_t __attribute__((vector_size(kVectorBytes)));  // for arithmetic on bits, which may wrap

inline Floats load(const float* source) {
  Floats vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

inline void store(float* target, Floats vector) { std::memcpy(target, &vector, sizeof(vector)); }

inline Floats broadcast(float value) { return value - Floats{}; }

// NaN if either is: a row with a score of NaN has a maximum of NaN.
inline Floats max(Floats current, Floats candidate) {
  return (candidate > current) | (candidate != candidate) ? candidate : current;
}

inline bool any(Ints mask) {
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= mask[lane];
  return bits != 0;
}

inline Ints lane_numbers() {
  Ints lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// 2^x for x <= 0, relative error below 3e-7; 0 for x under -125, NaN for NaN.
inline Floats exp2_nonpositive(Floats x) {
  const Floats smallest = broadcast(-125.0f);
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const Floats magic = broadcast(12582912.0f);
  const Floats shifted = x + magic;
  const Floats fraction = x - (shifted - magic);  // in [-0.5, 0.5]
  // Minimax fit of 2^f in relative error on [-0.5, 0.5], constant term held at 1.
  Floats power = broadcast(1.326472731e-3f);
  power = power * fraction + 9.671512991e-3f;
  power = power * fraction + 5.550733581e-2f;
  power = power * fraction + 2.402224243e-1f;
  power = power * fraction + 6.931470037e-1f;
  power = power * fraction + 1.0f;
  const Floats result =
      reinterpret_cast<Floats>(reinterpret_cast<Words>(power) + (reinterpret_cast<Words>(shifted) << 23));
  const Floats outside = x < smallest ? Floats{} : x;
  return x >= smallest ? result : outside;
}

// Four rows of four become four columns; strides in floats.
inline void transpose_4x4(const float* __restrict source, int64_t source_stride, float* __restrict target,
                          int64_t target_stride) {
  using Quad = float __attribute__((vector_size(16)));
  Quad rows[4];
  for (int row = 0; row < 4; ++row) std::memcpy(&rows[row], source + row * source_stride, sizeof(Quad));
#if defined(__clang__)
  const auto interleave_low = [](Quad a, Quad b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); };
  const auto interleave_high = [](Quad a, Quad b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); };
#else
  using QuadIndex = int32_t __attribute__((vector_size(16)));
  const auto interleave_low = [](Quad a, Quad b) { return __builtin_shuffle(a, b, QuadIndex{0, 4, 1, 5}); };
  const auto interleave_high = [](Quad a, Quad b) { return __builtin_shuffle(a, b, QuadIndex{2, 6, 3, 7}); };
#endif
  const Quad low_02 = interleave_low(rows[0], rows[2]);    // a0 c0 a1 c1
  const Quad low_13 = interleave_low(rows[1], rows[3]);    // b0 d0 b1 d1
  const Quad high_02 = interleave_high(rows[0], rows[2]);  // a2 c2 a3 c3
  const Quad high_13 = interleave_high(rows[1], rows[3]);  // b2 d2 b3 d3
  const Quad columns[4] = {interleave_low(low_02, low_13), interleave_high(low_02, low_13),
                           interleave_low(high_02, high_13), interleave_high(high_02, high_13)};
  for (int column = 0; column < 4; ++column) {
    std::memcpy(target + column * target_stride, &columns[column], sizeof(Quad));
  }
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// 16-bit storage formats, branch-free so that loops over them vectorise.
template <DataType dtype>
struct Element;

template <>
struct Element<DataType::kFloat32> {
  using Storage = float;
  static inline float widen(float value) { return value; }
  static inline float narrow(float value) { return value; }
};

template <>
struct Element<DataType::kBFloat16> {
  using Storage = uint16_t;
  static inline float widen(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }
  static inline uint16_t narrow(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded >> 16);
  }
};

template <>
struct Element<DataType::kFloat16> {
  using Storage = uint16_t;
  static inline float widen(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(value & 0x7fffu) << 13;
    // The exponent's bias differs by 112; multiplying also normalises what is subnormal in fp16.
    const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
    const uint32_t bits = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : finite;
    return bits_to_float(bits | sign);
  }
  static inline uint16_t narrow(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and more
    if (magnitude < 0x38800000u) {                                               // subnormal in fp16
      const float aligned = bits_to_float(magnitude) + 0.5f;  // the sum's last bit is 2^-24, fp16's smallest step
      return static_cast<uint16_t>(sign | (float_to_bits(aligned) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
  }
};

// kLanes elements in fp32.
template <DataType dtype>
inline Floats widen_vector(const typename Element<dtype>::Storage* source) {
  if constexpr (dtype == DataType::kFloat32) {
    return load(source);
  } else if constexpr (dtype == DataType::kBFloat16) {
    using Halves = uint16_t __attribute__((vector_size(kLanes * 2)));
    Halves halves;
    std::memcpy(&halves, source, sizeof(halves));
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
  } else {
#if defined(__AVX512F__)
    // The masked form: GCC 12 takes the plain one's undefined third operand for an uninitialised variable.
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    Floats vector;
    for (int lane = 0; lane < kLanes; ++lane) vector[lane] = Element<dtype>::widen(source[lane]);
    return vector;
#endif
  }
}

template <DataType dtype>
inline void widen_row(const typename Element<dtype>::Storage* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, widen_vector<dtype>(source + i));
  for (; i < count; ++i) target[i] = Element<dtype>::widen(source[i]);
}

}  // namespace
}  // namespace lite_attention
