// Vectors of any power of two of lanes: loops over rows with tails, sums across lanes, transposes.
#pragma once

#include "simd.h"

namespace dynaconv {
namespace DYNACONV_ISA {

// W numbers side by side; one is a plain number.
template <class T, int W>
struct WideOf {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T>
struct WideOf<T, 1> {
  typedef T type;
};
template <class T, int W>
using Wide = typename WideOf<T, W>::type;

template <int W, class T>
DYNACONV_INLINE Wide<T, W> get(const T* from) {
  Wide<T, W> v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <int W, class T>
DYNACONV_INLINE void put(T* to, const Wide<T, W>& v) {
  memcpy(to, &v, sizeof v);
}

// The same in the dtype that T is computed in.
template <int W, class T>
  requires(sizeof(T) > 2)
DYNACONV_INLINE Wide<Compute<T>, W> get_wide(const T* from) {
  return get<W>(from);
}
template <int W>
DYNACONV_INLINE Wide<float, W> get_wide(const bfloat16* from) {
  Wide<uint16_t, W> narrow;
  memcpy(&narrow, from, sizeof narrow);
  const Wide<uint32_t, W> bits = __builtin_convertvector(narrow, Wide<uint32_t, W>) << 16;
  Wide<float, W> v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

template <int W, class T>
  requires(sizeof(T) > 2)
DYNACONV_INLINE void put_wide(T* to, Wide<Compute<T>, W> v) {
  put<W>(to, v);
}
template <int W>
DYNACONV_INLINE void put_wide(bfloat16* to, Wide<float, W> v) {
  Wide<uint32_t, W> bits;
  memcpy(&bits, &v, sizeof bits);
  const Wide<uint32_t, W> even = bits + 0x7fff + ((bits >> 16) & 1);
  const Wide<uint32_t, W> rounded = (v != v ? bits | 0x400000 : even) >> 16;
  const Wide<uint16_t, W> narrow = __builtin_convertvector(rounded, Wide<uint16_t, W>);
  memcpy(to, &narrow, sizeof narrow);
}

// f<W>(i) over [0, count): whole vectors, then ever narrower ones, never beyond the end.
template <class T, class F>
DYNACONV_INLINE void for_vectors(int64_t count, const F& f) {
  constexpr int W = VectorOf<T>::lanes;
  int64_t i = 0;
  for (; i + W <= count; i += W) f.template operator()<W>(i);
  if (i == count) return;
  if constexpr (W > 8)
    if (i + 8 <= count) f.template operator()<8>(i), i += 8;
  if constexpr (W > 4)
    if (i + 4 <= count) f.template operator()<4>(i), i += 4;
  if constexpr (W > 2)
    if (i + 2 <= count) f.template operator()<2>(i), i += 2;
  if (i < count) f.template operator()<1>(i);
}

template <class From, class To>
DYNACONV_INLINE void convert(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) put_wide<8>(to + i, get_wide<8>(from + i));
  for (; i < count; ++i) to[i] = narrow<To>(widen(from[i]));
}

// Lane i of the result is lane PICK(i) of a and b one after the other.
template <class Pick, class V, int... I>
DYNACONV_INLINE V shuffled(V a, V b, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::lane(I)...);
#else
  typedef decltype(a != a) Ints;
  return __builtin_shuffle(a, b, Ints{Pick::lane(I)...});
#endif
}

// Within each 16 bytes of E lanes: those of a from FIRST on in steps of two, then those of b.
template <int E, int W, int FIRST>
struct EveryOther {
  static constexpr int lane(int i) {
    const int within = i % E * 2 + FIRST;
    return i / E * E + (within < E ? within : W + within - E);
  }
};

template <class T, int W>
DYNACONV_INLINE T sum_of(Wide<T, W> v) {
  if constexpr (W == 1) {
    return v;
  } else {
    Wide<T, W / 2> halves[2];
    memcpy(halves, &v, sizeof v);
    return sum_of<T, W / 2>(halves[0] + halves[1]);
  }
}

// The sums over each 16 bytes' place: to 16 bytes.
template <class T, int W>
DYNACONV_INLINE Wide<T, 16 / sizeof(T)> fold(Wide<T, W> v) {
  if constexpr (W * sizeof(T) == 16) {
    return v;
  } else {
    Wide<T, W / 2> halves[2];
    memcpy(halves, &v, sizeof v);
    return fold<T, W / 2>(halves[0] + halves[1]);
  }
}

// to[j] += all lanes of sums[j], and rest[j].
template <class T, int N>
DYNACONV_INLINE void add_sums(Vector<T>* sums, const T* rest, T* to) {
  constexpr int W = VectorOf<T>::lanes, E = 16 / sizeof(T);
  if constexpr (N % E != 0) {
    for (int j = 0; j < N; ++j) to[j] += sum_of<T, W>(sums[j]) + rest[j];
  } else {
    const typename IndicesTo<W>::type all;
    for (int first = 0; first < N; first += E) {
      Vector<T>* v = sums + first;
      for (int left = E; left > 1; left /= 2)
        for (int j = 0; j < left / 2; ++j)
          v[j] = shuffled<EveryOther<E, W, 0>>(v[2 * j], v[2 * j + 1], all) +
                 shuffled<EveryOther<E, W, 1>>(v[2 * j], v[2 * j + 1], all);
      put<E>(to + first, get<E>(to + first) + fold<T, W>(v[0]) + get<E>(rest + first));
    }
  }
}

// The halves FIRST of pairs of lanes of a and b: a0 b0 a1 b1, or a2 b2 a3 b3.
template <int FIRST>
struct Zip {
  static constexpr int lane(int i) { return FIRST + i / 2 + i % 2 * 4; }
};
// Two lanes of a, then two of b.
template <int FIRST>
struct Pairs {
  static constexpr int lane(int i) { return FIRST + i % 2 + i / 2 * 4; }
};

// to[j, i] = from[i, j] of 4 times 4.
template <class From, class To>
DYNACONV_INLINE void transpose_block(const From* from, int64_t from_row, To* to, int64_t to_row) {
  typedef Wide<Compute<From>, 4> V;
  const typename IndicesTo<4>::type all;
  V row[4];
  for (int i = 0; i < 4; ++i) row[i] = get_wide<4>(from + i * from_row);
  const V low = shuffled<Zip<0>>(row[0], row[1], all), high = shuffled<Zip<2>>(row[0], row[1], all);
  const V lower = shuffled<Zip<0>>(row[2], row[3], all);
  const V higher = shuffled<Zip<2>>(row[2], row[3], all);
  put_wide<4>(to, shuffled<Pairs<0>>(low, lower, all));
  put_wide<4>(to + to_row, shuffled<Pairs<2>>(low, lower, all));
  put_wide<4>(to + 2 * to_row, shuffled<Pairs<0>>(high, higher, all));
  put_wide<4>(to + 3 * to_row, shuffled<Pairs<2>>(high, higher, all));
}

// to[j, i] = from[i, j], both with rows of their own step. Goes along the rows that are farther
// apart: the cache then fetches ahead.
constexpr int64_t SIDE = 16;  // whole cache lines
template <class From, class To>
void transpose(const From* from, int64_t from_row, To* to, int64_t to_row, int64_t rows,
               int64_t columns) {
  const auto plain = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t i = i0; i < i1; ++i)
        to[j * to_row + i] = narrow<To>(widen(from[i * from_row + j]));
  };
  const int64_t even_rows = rows / 4 * 4, even_columns = columns / 4 * 4;
  const auto block = [&](int64_t i0, int64_t j0) {
    for (int64_t j = j0; j < least(j0 + SIDE, even_columns); j += 4)
      for (int64_t i = i0; i < least(i0 + SIDE, even_rows); i += 4)
        transpose_block(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
  };
  if (from_row > to_row)
    for (int64_t i = 0; i < even_rows; i += SIDE)
      for (int64_t j = 0; j < even_columns; j += SIDE) block(i, j);
  else
    for (int64_t j = 0; j < even_columns; j += SIDE)
      for (int64_t i = 0; i < even_rows; i += SIDE) block(i, j);
  plain(0, even_rows, even_columns, columns);
  plain(even_rows, rows, 0, columns);
}

}  // namespace DYNACONV_ISA
}  // namespace dynaconv
