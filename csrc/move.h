// Copies a matrix of channels by positions from one layout and dtype to another.
#pragma once

#include "simd.h"

namespace dynaconv {
namespace DYNACONV_ISA {

// a0 b0 a1 b1 ... of the lower (half = 0) or upper halves of two vectors.
template <class C, int half, int... i>
DYNACONV_INLINE Vector<C> interleaved(Vector<C> a, Vector<C> b, Indices<i...>) {
  constexpr int lanes = VectorOf<C>::lanes;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (half * lanes / 2 + i / 2 + i % 2 * lanes)...);
#else
  typedef Integer<sizeof(C)> Mask __attribute__((vector_size(DYNACONV_BYTES)));
  return __builtin_shuffle(a, b, Mask{(half * lanes / 2 + i / 2 + i % 2 * lanes)...});
#endif
}

// A square of vectors, transposed: log2 rounds of perfect shuffles.
template <class C>
DYNACONV_INLINE void transpose(Vector<C> (&rows)[VectorOf<C>::lanes]) {
  constexpr int lanes = VectorOf<C>::lanes;
  constexpr typename IndicesTo<lanes>::type all;
  Vector<C> next[lanes];
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleaved<C, 0>(rows[i], rows[i + lanes / 2], all);
      next[2 * i + 1] = interleaved<C, 1>(rows[i], rows[i + lanes / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// At most a square of numbers, its rows becoming columns.
template <class To, class From>
DYNACONV_INLINE void move_square(int rows, int columns, const From* from, int64_t from_row, To* to,
                                 int64_t to_row, bool padded) {
  typedef Compute<From> C;
  constexpr int lanes = VectorOf<C>::lanes;
  Vector<C> square[lanes];
  if (rows == lanes && columns == lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i] = load_first(from + i * from_row, lanes);
    transpose<C>(square);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) store_first(to + i * to_row, square[i], lanes);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
    square[i] = i < rows ? load_first(from + i * from_row, columns) : Vector<C>{};
  transpose<C>(square);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
    if (i < columns) store_first(to + i * to_row, square[i], padded ? lanes : rows);
}

// How far one number lies from the next, along the channels and along the positions.
struct Steps {
  int64_t channel, position;
};

// to[c, p] = from[c, p]. The one dtype is To, the other From; both are computed with as C.
// padded: `to` is scratch whose channels may be written up to a whole number of vectors.
template <class To, class From>
inline void move(int64_t channels, int64_t positions, const From* from, Steps f, To* to, Steps t,
                 bool padded) {
  typedef Compute<From> C;
  constexpr int lanes = VectorOf<C>::lanes;
  if (f.position == 1 && t.position == 1) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < positions; p += lanes)
        store_first(to + c * t.channel + p,
                    load_first(from + c * f.channel + p, positions - p), positions - p);
  } else if (f.channel == 1 && t.channel == 1) {
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t c = 0; c < channels; c += lanes)
        store_first(to + p * t.position + c,
                    load_first(from + p * f.position + c, channels - c),
                    padded ? lanes : channels - c);
  } else if (f.position == 1 && t.channel == 1) {
    for (int64_t c = 0; c < channels; c += lanes)
      for (int64_t p = 0; p < positions; p += lanes)
        move_square(least<int64_t>(lanes, channels - c), least<int64_t>(lanes, positions - p),
                    from + c * f.channel + p, f.channel, to + p * t.position + c, t.position,
                    padded);
  } else if (f.channel == 1 && t.position == 1) {
    move(positions, channels, from, {f.position, f.channel}, to, {t.position, t.channel}, false);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < positions; ++p)
        to[c * t.channel + p * t.position] =
            narrow<To>(widen(from[c * f.channel + p * f.position]));
  }
}

}  // namespace DYNACONV_ISA
}  // namespace dynaconv
