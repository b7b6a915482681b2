// The vector instructions of ops/cpu.cpp, for the processor that this is compiled for: AVX-512 VNNI, AVX2 with or
// without VNNI, NEON with dotprod, or none of them (-DPORTABLE). Vectors are those of GCC and Clang; what is here is
// what the compilers do not find by themselves.
//
// A line is 64 bytes, 16 lanes of 4; a part is one register of it.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(PORTABLE)
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define AVX512
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define AVX2
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#define NEON
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")  // unrolled, it would take minutes to compile
#if defined(AVX512)
#define UNROLL_TILES UNROLL
#else
#define UNROLL_TILES ROLLED  // the sums of several tiles would not fit in the registers
#endif

#if defined(AVX512)
constexpr int WIDTH = 64;  // bytes of a register
#elif defined(AVX2)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int LINE = 64, PARTS = LINE / WIDTH, LANES = WIDTH / 4;

typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
typedef uint16_t Words __attribute__((vector_size(WIDTH)));
typedef int16_t Shorts __attribute__((vector_size(WIDTH)));
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef float Floats __attribute__((vector_size(WIDTH)));

template <typename V> INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// dot: adds to each lane the products of 4 weights by 4 numbers of x. int8 weights lie in memory + OFFSET.
// dot_words: the products of two 16-bit numbers by two.
// Sums<BITS>: what `dot` adds up over a block; total: its int32 lanes.

#if defined(AVX512)

constexpr int OFFSET = 128;  // the instruction takes unsigned weights
template <int BITS> using Sums = Ints;
INLINE Ints dot(Ints sum, Bytes w, Bytes x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps(a, b, c); }
INLINE Floats load_halves(const void* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE Ints dot_words(Ints sum, Ints a, Ints b) {
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#if defined(__AVX512BF16__)
#define BF16_DOT
INLINE Floats dot_bf16(Floats sum, Bytes w, Bytes x) {  // a lane: two products of bfloat16
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}
#endif

#elif defined(AVX2)

INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps(a, b, c); }
INLINE Floats load_halves(const void* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE Ints dot_words(Ints sum, Ints a, Ints b) { return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#if defined(__AVXVNNI__)
constexpr int OFFSET = 128;
template <int BITS> using Sums = Ints;
INLINE Ints dot(Ints sum, Bytes w, Bytes x) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
}
#else
constexpr int OFFSET = 0;
template <int BITS> using Sums = std::conditional_t<BITS == 4, Shorts, Ints>;
INLINE Shorts dot(Shorts sum, Bytes w, Bytes x) {  // nibbles: a block's sum, at most 16 * 15 * 127, fits in 16 bits
  return sum + (Shorts)_mm256_maddubs_epi16((__m256i)w, (__m256i)x);
}
INLINE Ints dot(Ints sum, Bytes w, Bytes x) {  // the sign goes over to x, so that 2 * 128 * 127 does not saturate
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
  return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
INLINE Ints total(Shorts sum) { return (Ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#endif

#elif defined(NEON)

constexpr int OFFSET = 0;
template <int BITS> using Sums = Ints;
INLINE Ints dot(Ints sum, Bytes w, Bytes x) { return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE Floats load_halves(const void* p) { return (Floats)vcvt_f32_f16(vld1_f16((const float16_t*)p)); }

#else

constexpr int OFFSET = 0;
template <int BITS> using Sums = Ints;
template <typename To, typename V> INLINE To odd(V v, int bits) { return (To)v >> bits; }
template <typename To, typename V> INLINE To even(V v, int bits) { return (To)((To)v << bits) >> bits; }
INLINE Ints dot(Ints sum, Bytes w, Bytes x) {  // a pair of products, at most 2 * 128 * 127, fits in 16 bits
  Ints pairs = (Ints)(even<Shorts>(w, 8) * even<Shorts>(x, 8) + odd<Shorts>(w, 8) * odd<Shorts>(x, 8));
  return sum + even<Ints>(pairs, 16) + odd<Ints>(pairs, 16);
}
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE Floats load_halves(const void* p) {
  Floats v;
  for (int i = 0; i < LANES; i++) v[i] = ((const c10::Half*)p)[i];
  return v;
}

#endif

#if !defined(AVX512) && !defined(AVX2)
INLINE Ints dot_words(Ints sum, Ints a, Ints b) {
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
#endif

INLINE Ints total(Ints sum) { return sum; }

INLINE float sum_lanes(Floats v) {  // halves onto halves: the same order on all processors but for their width
  typedef float Fours __attribute__((vector_size(16)));
#if defined(AVX512)
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  Fours four = (Fours)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(AVX2)
  Fours four = (Fours)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  Fours four = (Fours)v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}
