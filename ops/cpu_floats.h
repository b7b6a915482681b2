// Numbers of a cache and of a softmax in vector registers, for ops/cpu_attention.cpp. A piece is what a register holds
// of the numbers of a cache; it becomes WIDE registers of float32.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu_vectors.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

template <typename T> constexpr int PIECE = WIDTH / sizeof(T);
template <typename T> constexpr int WIDE = 4 / sizeof(T);

#if defined(BF16_DOT)
template <typename T> constexpr bool PAIRED = std::is_same_v<T, c10::BFloat16>;  // products are added two by two
INLINE Floats add_pairs(Floats sum, Bytes a, Bytes b) { return dot_bf16(sum, a, b); }
INLINE Floats store_bfloat16(Floats v, uint16_t* p) {  // returns what was stored
  __m256i narrow = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  _mm256_storeu_si256((__m256i*)p, narrow);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}
#else
template <typename T> constexpr bool PAIRED = false;
INLINE Floats add_pairs(Floats sum, Bytes, Bytes) { return sum; }
INLINE Floats store_bfloat16(Floats v, uint16_t*) { return v; }
#endif

template <typename T> INLINE void fetch(const T* p, int64_t first, int64_t numbers) {  // into the second cache
  if (p)
    for (int64_t i = 0; i < numbers * (int64_t)sizeof(T); i += LINE) __builtin_prefetch((char*)(p + first) + i, 0, 2);
}

#if defined(AVX512)
INLINE void store_words(Ints v, int16_t* p) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v)); }
INLINE Bytes load_lanes(const void* p, int lanes) { return (Bytes)_mm512_maskz_loadu_epi32((1u << lanes) - 1, p); }
INLINE Floats widen_half(Bytes v, int half) {
  return (Floats)_mm512_cvtph_ps(half ? _mm512_extracti64x4_epi64((__m512i)v, 1) : _mm512_castsi512_si256((__m512i)v));
}
#elif defined(AVX2)
INLINE void store_words(Ints v, int16_t* p) {
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v, (__m256i)v), 8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
INLINE Bytes load_lanes(const void* p, int lanes) {
  Ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (Bytes)_mm256_maskload_epi32((const int*)p, (__m256i)(lane < lanes));
}
INLINE Floats widen_half(Bytes v, int half) {
  return (Floats)_mm256_cvtph_ps(half ? _mm256_extracti128_si256((__m256i)v, 1) : _mm256_castsi256_si128((__m256i)v));
}
#else
INLINE void store_words(Ints v, int16_t* p) {
  for (int i = 0; i < LANES; i++) p[i] = v[i];
}
INLINE Bytes load_lanes(const void* p, int lanes) {
  Bytes v = {};
  std::memcpy(&v, p, 4 * lanes);
  return v;
}
INLINE Floats widen_half(Bytes v, int half) {
  uint16_t words[2 * LANES];
  std::memcpy(words, &v, sizeof v);
  return load_halves(words + half * LANES);
}
#endif

// Piece number `piece` of a head of E numbers, zeros behind them.
template <typename C, bool WHOLE> INLINE Bytes load_piece(int64_t E, const C* p, int64_t piece) {
  if constexpr (WHOLE) return load<Bytes>(p + piece * PIECE<C>);
  else return load_lanes(p + piece * PIECE<C>, std::min<int64_t>(LANES, (E - piece * PIECE<C>) * sizeof(C) / 4));
}

// A piece in float32. Of bfloat16 the even numbers come first, then the odd ones: that takes no shuffle.
template <typename T> struct Wide { Floats at[WIDE<T>]; };

template <typename T> INLINE Wide<T> widen(Bytes v) {
  if constexpr (std::is_same_v<T, float>) return {(Floats)v};
  else if constexpr (std::is_same_v<T, c10::Half>) return {widen_half(v, 0), widen_half(v, 1)};
  else return {(Floats)((Ints)v << 16), (Floats)((Ints)v & ~0xffff)};
}

typedef uint32_t Unsigned __attribute__((vector_size(WIDTH)));
INLINE Ints upper(Ints v) { return (Ints)((Unsigned)v >> 16); }

INLINE Ints round_to_bfloat16(Floats v) {  // in the upper half of each lane; to nearest even
  Ints bits = (Ints)v;
  return bits + 0x7fff + (bits >> 16 & 1);
}

template <typename T> INLINE void store_piece(T* y, const Wide<T>& v, int64_t most) {  // the inverse of widen
  T piece[PIECE<T>];
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    Ints both = upper(round_to_bfloat16(v.at[0])) | (round_to_bfloat16(v.at[1]) & ~0xffff);
    std::memcpy((void*)piece, &both, sizeof piece);
  } else {
    for (int i = 0; i < PIECE<T>; i++) piece[i] = v.at[i / LANES][i % LANES];
  }
  std::memcpy((void*)y, piece, std::min<int64_t>(PIECE<T>, most) * sizeof(T));
}

// A register of float32 from as many numbers of any type, and back.

typedef uint16_t Halves __attribute__((vector_size(WIDTH / 2)));

template <typename T> INLINE Floats load_as_floats(const T* p) {
  if constexpr (std::is_same_v<T, float>) return load<Floats>(p);
  else if constexpr (std::is_same_v<T, c10::Half>) return load_halves(p);
  else return (Floats)(__builtin_convertvector(load<Halves>(p), Ints) << 16);
}

template <typename T> INLINE Floats load_some(const T* p, int64_t n) {  // zeros behind the n first
  if (n >= LANES) return load_as_floats(p);
  T some[LANES] = {};
  std::memcpy((void*)some, p, n * sizeof(T));
  return load_as_floats(some);
}

template <typename T> INLINE void store_some(T* p, Floats v, int64_t n) {  // the n first
  n = std::min<int64_t>(n, LANES);
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    Halves narrow = __builtin_convertvector(upper(round_to_bfloat16(v)), Halves);
    std::memcpy((void*)p, &narrow, n * sizeof(T));
  } else if constexpr (std::is_same_v<T, float>) {
    std::memcpy(p, &v, n * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
  }
}

#if defined(__clang__)
template <typename V, int... I> INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, I...);
}
#else
template <typename V, int... I> INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, Ints{I...});
}
#endif

// f of a[i] and a[i + D] in lanes whose bit D is unset, of b[i] and b[i - D] in the others.
template <int D, typename V, typename F, int... I>
INLINE V fold(V a, V b, const F& f, std::integer_sequence<int, I...>) {
  return f(Ints{(I & D)...} == 0 ? a : b,
           shuffle(a, b, std::integer_sequence<int, (I & D ? LANES + I - D : I + D)...>()));
}

constexpr auto ALL_LANES = std::make_integer_sequence<int, LANES>();
constexpr auto plus = [](auto a, auto b) __attribute__((always_inline)) { return a + b; };
constexpr auto greater = [](Floats a, Floats b) __attribute__((always_inline)) { return a > b ? a : b; };

template <int D = LANES / 2, typename V> INLINE V totals(V* sums) {  // lane i: that of sums[i]
  UNROLL for (int i = 0; i < D; i++) sums[i] = fold<D>(sums[i], sums[i + D], plus, ALL_LANES);
  if constexpr (D > 1) return totals<D / 2>(sums);
  else return sums[0];
}

template <int D = LANES / 2, typename F> INLINE Floats reduced(Floats v, const F& f) {  // in every lane
  v = fold<D>(v, v, f, ALL_LANES);
  if constexpr (D > 1) return reduced<D / 2>(v, f);
  else return v;
}

INLINE Floats power_of_two(Floats x) {  // 2 ** x for x <= 0, to 2e-7 of it; 0 below -126.5; 1 for 0, NaN for NaN
  constexpr float MAGIC = 12582912;  // 1.5 * 2^23: a small number added to it is rounded, in its lowest bits
  constexpr float SERIES[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
                              6.9314718e-1f, 1};  // ln(2) ** k / k!
  x = x < -127 ? Floats{} - 127 : x;
  Floats shifted = x + MAGIC, rest = x - (shifted - MAGIC), y = Floats{} + SERIES[0];
  for (int i = 1; i < 7; i++) y = multiply_add(y, rest, Floats{} + SERIES[i]);
  return y * (Floats)(((Ints)shifted << 23) + 0x3f800000);
}

INLINE float power_of_two(float x) { return power_of_two(Floats{} + x)[0]; }

}  // namespace
