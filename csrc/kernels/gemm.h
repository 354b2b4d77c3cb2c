// Small matrix products with the sums held in registers: c[m, n] (+)= sum_k a[m, k] * b[k, n].
#pragma once

#include "simd.h"

namespace dynaconv {
namespace DYNACONV_ISA {

template <class T>
struct Block {
#if defined(__AVX512F__)
  static constexpr int rows = 14;
#else
  static constexpr int rows = 6;
#endif
  static constexpr int lanes = VectorOf<T>::lanes;
  static constexpr int panel = 2 * lanes;
};

// How the k of a row of `a` lie in memory: `runs` times `length` numbers, from run to run `step`.
struct Depth {
  int64_t runs, length, step;
};

// b in panels of two vectors of columns one after the other, each panel [k][columns] without gaps;
// where one vector or less remains, the last panel is that wide. Columns beyond the last are
// computed, so they must be there, but not stored.
template <class T>
struct Packed {
  T* data;
  int64_t depth, columns;

  DYNACONV_INLINE int64_t width(int64_t column) const {
    return columns - column / Block<T>::panel * Block<T>::panel > Block<T>::lanes
               ? Block<T>::panel
               : Block<T>::lanes;
  }
  DYNACONV_INLINE T* at(int64_t k, int64_t column) const {
    const int64_t first = column / Block<T>::panel * Block<T>::panel;
    return data + first * depth + k * width(column) + column - first;
  }
};

// M rows and V vectors of c; a[m, k] is at a[m * ROW + k * STEP].
template <class T, int M, int V, int64_t ROW, int64_t STEP>
void multiply_block(const T* a, Depth depth, const T* b, T* c, int64_t c_row, int64_t columns,
                    bool add) {
  constexpr int lanes = VectorOf<T>::lanes;
  Vector<T> sums[M][V] = {};
  for (int64_t run = 0; run < depth.runs; ++run, a += depth.step) {
    const T* at = a;
    for (int64_t k = 0; k < depth.length; ++k, at += STEP, b += V * lanes) {
      Vector<T> right[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) right[v] = load(b + v * lanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[m][v] += at[m * ROW] * right[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* to = c + m * c_row + v * lanes;
      const int64_t count = columns - v * lanes;
      if (add) sums[m][v] += load_first(to, count);
      store_first(to, sums[m][v], count);
    }
}

template <class T, int V, int64_t ROW, int64_t STEP>
void multiply_panel(int64_t rows, const T* a, Depth depth, const T* b, T* c, int64_t c_row,
                    int64_t columns, bool add) {
  int64_t m = 0;
  const auto blocks_of = [&]<int M>() {
    for (; m + M <= rows; m += M)
      multiply_block<T, M, V, ROW, STEP>(a + m * ROW, depth, b, c + m * c_row, c_row, columns, add);
  };
  blocks_of.template operator()<Block<T>::rows>();
  blocks_of.template operator()<4>();
  blocks_of.template operator()<1>();
}

// The rows of b from `first` on.
template <class T, int64_t ROW, int64_t STEP>
void multiply(int64_t rows, const T* a, Depth depth, Packed<const T> b, int64_t first, T* c,
              int64_t c_row, bool add) {
  constexpr int panel = Block<T>::panel;
  for (int64_t n = 0; n < b.columns; n += panel) {
    const int64_t left = b.columns - n;
    const auto run = b.width(n) == panel ? multiply_panel<T, 2, ROW, STEP>
                                         : multiply_panel<T, 1, ROW, STEP>;
    run(rows, a, depth, b.at(first, n), c + n, c_row, left, add);
  }
}

}  // namespace DYNACONV_ISA
}  // namespace dynaconv
