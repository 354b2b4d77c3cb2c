// Vectors as the compiler knows them (GCC and Clang), as wide as the instruction set has them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "types.h"

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
