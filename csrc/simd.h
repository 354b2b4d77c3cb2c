// Vectors as the compiler knows them (GCC and Clang), as wide as the instruction set has them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "types.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define DYNACONV_BYTES 64
#elif defined(__AVX__)
#define DYNACONV_BYTES 32
#else
#define DYNACONV_BYTES 16
#endif
#define DYNACONV_INLINE inline __attribute__((always_inline))

namespace dynaconv {
namespace DYNACONV_ISA {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(DYNACONV_BYTES)));
  static constexpr int lanes = DYNACONV_BYTES / sizeof(T);
};
template <class T>
using Vector = typename VectorOf<T>::type;

// 0 ... n - 1 as a type, and a signed integer of as many bytes as a number has.
template <int... i>
struct Indices {};
template <int n, int... i>
struct IndicesTo : IndicesTo<n - 1, n - 1, i...> {};
template <int... i>
struct IndicesTo<0, i...> {
  typedef Indices<i...> type;
};
template <int bytes>
struct IntegerOf {
  typedef int32_t type;
};
template <>
struct IntegerOf<8> {
  typedef int64_t type;
};
template <int bytes>
using Integer = typename IntegerOf<bytes>::type;

// What a dtype is computed in: bfloat16 in float.
template <class T>
struct ComputeOf {
  typedef T type;
};
template <>
struct ComputeOf<bfloat16> {
  typedef float type;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class T>
DYNACONV_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
DYNACONV_INLINE void store(T* to, Vector<T> v) {
  memcpy(to, &v, sizeof v);
}

template <class T>
DYNACONV_INLINE Vector<T> broadcast(T value) {
  return Vector<T>{} + value;
}

DYNACONV_INLINE float widen(float x) { return x; }
DYNACONV_INLINE double widen(double x) { return x; }
DYNACONV_INLINE float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
DYNACONV_INLINE T narrow(Compute<T> x) {
  return x;
}
template <>
DYNACONV_INLINE bfloat16 narrow<bfloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest even
}

typedef uint16_t Halves __attribute__((vector_size(DYNACONV_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(DYNACONV_BYTES)));

DYNACONV_INLINE Vector<float> widen_all(const bfloat16* from) {
  Halves h;
  memcpy(&h, from, sizeof h);
  return (Vector<float>)(__builtin_convertvector(h, Words) << 16);
}

DYNACONV_INLINE void narrow_all(bfloat16* to, Vector<float> v) {
  const Words bits = (Words)v;
  const Words nan = (Words)(v != v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves h = __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & rounded), Halves);
  memcpy(to, &h, sizeof h);
}

// The first n numbers from memory, computed with as Compute<T>; the other lanes are 0.
template <class T>
DYNACONV_INLINE Vector<Compute<T>> load_first(const T* from, int64_t n) {
  constexpr int lanes = VectorOf<Compute<T>>::lanes;
  if (n >= lanes) n = lanes;
  if constexpr (sizeof(T) == sizeof(Compute<T>))
    if (n == lanes) return load(from);
  if constexpr (sizeof(T) == 2)
    if (n == lanes) return widen_all(from);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vector<Compute<T>>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
  if constexpr (sizeof(T) == 8)
    return (Vector<Compute<T>>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), from);
#endif
  Compute<T> numbers[lanes] __attribute__((aligned(DYNACONV_BYTES))) = {};
  for (int64_t i = 0; i < n; ++i) numbers[i] = widen(from[i]);
  return load(numbers);
}

// The first n lanes to memory.
template <class T>
DYNACONV_INLINE void store_first(T* to, Vector<Compute<T>> v, int64_t n) {
  constexpr int lanes = VectorOf<Compute<T>>::lanes;
  if (n >= lanes) n = lanes;
  if constexpr (sizeof(T) == sizeof(Compute<T>))
    if (n == lanes) return store(to, v);
  if constexpr (sizeof(T) == 2)
    if (n == lanes) return narrow_all(to, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  if constexpr (sizeof(T) == 8)
    return _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
#endif
  Compute<T> numbers[lanes] __attribute__((aligned(DYNACONV_BYTES)));
  store(numbers, v);
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(numbers[i]);
}

template <class T>
DYNACONV_INLINE T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
DYNACONV_INLINE T most(T a, T b) {
  return a < b ? b : a;
}

}  // namespace DYNACONV_ISA
}  // namespace dynaconv
