// The types of the Metal Shading Language that C++ lacks: bfloat, half, and vectors of 2, 3 and 4 numbers.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

template <class T> constexpr bool is_number = std::is_arithmetic_v<T> || std::is_same_v<T, half>;

// -- bfloat -----------------------------------------------------------------------------------------------------------

// The upper half of a float. Every operation is done in float and rounded to the nearest, ties to even.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <class T, class = std::enable_if_t<is_number<T>>> explicit constexpr bfloat(T value) : bits(0) {
    const uint32_t wide = std::bit_cast<uint32_t>(float(value));
    const bool nan = (wide & 0x7fffffff) > 0x7f800000;
    bits = nan ? wide >> 16 | 64 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  constexpr operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

#define BFLOAT_OPERATOR(op) \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  constexpr bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }
BFLOAT_OPERATOR(+) BFLOAT_OPERATOR(-) BFLOAT_OPERATOR(*) BFLOAT_OPERATOR(/)
#undef BFLOAT_OPERATOR

// -- vectors ----------------------------------------------------------------------------------------------------------

template <class T, int N> struct Named;
template <class T> struct Named<T, 2> { union { T of[2]; struct { T x, y; }; }; };
template <class T> struct Named<T, 3> { union { T of[4]; struct { T x, y, z; }; }; };
template <class T> struct Named<T, 4> { union { T of[4]; struct { T x, y, z, w; }; }; };

template <class T, int N> struct alignas(sizeof(T) * (N == 3 ? 4 : N)) Vector : Named<T, N> {
  Vector() = default;
  template <class S, class = std::enable_if_t<std::is_convertible_v<S, T>>> Vector(S all) {
    for (int i = 0; i < N; i++) this->of[i] = T(all);
  }
  template <class S> explicit Vector(const Vector<S, N>& other) {
    for (int i = 0; i < N; i++) this->of[i] = T(other.of[i]);
  }
  template <class... S, class = std::enable_if_t<sizeof...(S) == N && N != 1>> Vector(S... each) {
    const T values[N] = {T(each)...};
    for (int i = 0; i < N; i++) this->of[i] = values[i];
  }
  T& operator[](int i) { return this->of[i]; }
  const T& operator[](int i) const { return this->of[i]; }
};

#define VECTOR_OPERATOR(op) \
  template <class T, int N> Vector<T, N> operator op(Vector<T, N> a, Vector<T, N> b) { \
    for (int i = 0; i < N; i++) a[i] = T(a[i] op b[i]); \
    return a; \
  } \
  template <class T, int N, class S, class = std::enable_if_t<std::is_convertible_v<S, T>>> \
  Vector<T, N> operator op(Vector<T, N> a, S b) { return a op Vector<T, N>(b); } \
  template <class T, int N, class S, class = std::enable_if_t<std::is_convertible_v<S, T>>> \
  Vector<T, N> operator op(S a, Vector<T, N> b) { return Vector<T, N>(a) op b; } \
  template <class T, int N, class S> Vector<T, N>& operator op##=(Vector<T, N>& a, S b) { return a = a op b; }
VECTOR_OPERATOR(+) VECTOR_OPERATOR(-) VECTOR_OPERATOR(*) VECTOR_OPERATOR(/)
#undef VECTOR_OPERATOR

#define VECTORS(T) typedef Vector<T, 2> T##2; typedef Vector<T, 3> T##3; typedef Vector<T, 4> T##4;
VECTORS(float) VECTORS(half) VECTORS(bfloat) VECTORS(char) VECTORS(uchar) VECTORS(short) VECTORS(ushort)
VECTORS(int) VECTORS(uint) VECTORS(long) VECTORS(ulong) VECTORS(bool)
#undef VECTORS

template <class D, class S> D as_type(S source) {
  static_assert(sizeof(D) == sizeof(S));
  D target;
  memcpy(&target, &source, sizeof target);
  return target;
}
