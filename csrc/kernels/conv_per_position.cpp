// y[n, c, p] = sum_k weight[n, group(c), k, p] * x[n, c, p * stride + k * dilation], and gradients.
//
// A task copies what its box of positions sees into scratch, padded with zeros and laid out for the
// vectors; the loops then know no borders. With channels as lanes, a weight is broadcast to the
// channels of its group, and K neighbouring taps share each position that they load. With positions
// as lanes (few channels a group, and always for the weight's gradient, which sums over channels),
// the taps are shifted loads; a stride is taken out by keeping its phases apart.

#include "../conv_per_position.h"

#include "../move.h"

namespace dynaconv {
namespace DYNACONV_ISA {
namespace per_position {

// Vectors of channels that share a broadcast weight: as many as the registers hold.
constexpr int PAIR = DYNACONV_BYTES == 64 ? 2 : 1;

template <class C>
DYNACONV_INLINE int64_t whole(int64_t n) {
  constexpr int64_t lanes = VectorOf<C>::lanes;
  return (n + lanes - 1) / lanes * lanes;
}

// Whether a group fills the lanes of a vector well enough.
template <class T>
bool many_channels(const PerPosition& a) {
  return 2 * a.channels >= VectorOf<Compute<T>>::lanes;
}

// What one task computes: channels [c, c + channels) of each of its groups, a box of positions.
struct Piece {
  int64_t n, g, groups, c, channels, from[3], size[3];
  int64_t all() const { return groups * channels; }
};

inline Piece piece_of(const PerPosition& a, const int64_t (&space)[3], int64_t task) {
  Piece p;
  for (int d = 2; d >= 0; --d) {
    const int64_t count = ceil_div(space[d], a.tile[d]);
    p.from[d] = task % count * a.tile[d];
    p.size[d] = least(a.tile[d], space[d] - p.from[d]);
    task /= count;
  }
  const int64_t chunks = ceil_div(a.channels, a.chunk);
  p.c = task % chunks * a.chunk;
  p.channels = least(a.chunk, a.channels - p.c);
  task /= chunks;
  const int64_t bundles = ceil_div(a.groups, a.bundle);
  p.g = task % bundles * a.bundle;
  p.groups = least(a.bundle, a.groups - p.g);
  p.n = task / bundles;
  return p;
}

// A box of scratch: positions (d, h, w) of channels. In channels-as-lanes layout a position is
// `channels` numbers, step 1; in positions-as-lanes layout the last dimension is unit.
struct Box {
  int64_t size[3], row, plane;  // positions along each dimension; numbers from row to row ...
  Steps step;
};

// Positions of the input that `n` outputs along dimension d see.
inline int64_t seen(const PerPosition& a, int d, int64_t n) {
  return n ? (n - 1) * a.stride[d] + (a.kernel[d] - 1) * a.dilation[d] + 1 : 0;
}

inline int64_t taps(const PerPosition& a) { return a.kernel[0] * a.kernel[1] * a.kernel[2]; }

template <class C>
Box by_channel(const int64_t (&size)[3], int64_t channels) {
  const int64_t pitch = whole<C>(channels), row = size[2] * pitch;
  return {{size[0], size[1], size[2]}, row, size[1] * row, {1, pitch}};
}

template <class C>
Box by_position(const int64_t (&size)[3], int64_t width) {
  const int64_t plane = size[1] * width;
  return {{size[0], size[1], size[2]}, width, plane, {size[0] * plane, 1}};
}

// Width of a row of positions-as-lanes scratch, a phase of the stride: vectors read beyond it.
template <class C>
int64_t phase_width(const PerPosition& a, int64_t outputs) {
  return whole<C>(outputs) + (a.kernel[2] - 1) * a.dilation[2] / a.stride[2] + 1;
}

template <class C>
void clear(C* at, int64_t n) {
  for (int64_t i = 0; i < n; ++i) at[i] = 0;
}

// A tensor as (channel, d, h, w) from one sample and group on.
template <class T>
struct View {
  T* data;
  int64_t channel, space[3];
};

template <class T>
View<T> view(void* data, const int64_t (&stride)[5], const PerPosition& a, const Piece& p) {
  T* at = static_cast<T*>(data) + p.n * stride[0] + (p.g * a.channels + p.c) * stride[1];
  return {at, stride[1], {stride[2], stride[3], stride[4]}};
}

// Copies to scratch the box that starts at `from` (perhaps outside of the tensor: zeros there).
// Every `every`-th position of a row, so many of them; what the tensor has is `have`.
template <class C, class T>
void fill(const View<T>& x, const int64_t (&have)[3], const int64_t (&from)[3], const Box& box,
          int64_t channels, int64_t every, int64_t width, C* to) {
  const bool lanes_are_channels = box.step.channel == 1;
  int64_t left = from[2] < 0 ? (-from[2] + every - 1) / every : 0;
  int64_t right = from[2] < have[2] ? (have[2] - 1 - from[2]) / every + 1 : 0;
  right = least(right, width);
  left = least(left, right);
  const auto zero = [&](C* row, int64_t begin, int64_t end) {
    if (lanes_are_channels) return clear(row + begin * box.step.position,
                                         (end - begin) * box.step.position);
    for (int64_t c = 0; c < channels; ++c) clear(row + c * box.step.channel + begin, end - begin);
  };
  for (int64_t d = 0; d < box.size[0]; ++d)
    for (int64_t h = 0; h < box.size[1]; ++h) {
      C* row = to + d * box.plane + h * box.row;
      const int64_t z = from[0] + d, y = from[1] + h;
      const bool inside = z >= 0 && z < have[0] && y >= 0 && y < have[1] && left < right;
      if (!inside) {
        zero(row, 0, width);
        continue;
      }
      zero(row, 0, left);
      const T* source = x.data + z * x.space[0] + y * x.space[1] +
                        (from[2] + left * every) * x.space[2];
      move(channels, right - left, source, {x.channel, every * x.space[2]},
           row + left * box.step.position, box.step, lanes_are_channels);
      zero(row, right, width);
    }
}

// The taps' weights along one row of output positions, and how far on the next row's lie: too many
// streams for the hardware to foresee, so that they are fetched a row ahead. Either the positions
// or the taps of a row of the kernel are next to each other.
template <class C>
struct Row {
  const C* data;
  int64_t tap[3], at, ahead;
};

// One row of the kernel's taps, with that known to the compiler.
template <class C, bool together>
struct Taps {
  const C* data;
  int64_t tap, at, ahead;
  DYNACONV_INLINE Taps from(int64_t k) const {
    return {data + k * (together ? 1 : tap), tap, at, ahead};
  }
  template <int P>
  DYNACONV_INLINE void prefetch(int64_t taps) const {
    if (together)
      for (int p = 0; p < P; ++p) __builtin_prefetch(data + p * at + ahead);
    else
      for (int64_t k = 0; k < taps; ++k) __builtin_prefetch(data + k * tap + ahead);
  }
};

// K of these taps at P positions: where each line of them starts, in registers.
template <class C, bool together, int P, int K>
struct Lines {
  const C* line[together ? P : K];
  DYNACONV_INLINE explicit Lines(const Taps<C, together>& w) {
#pragma GCC unroll 8
    for (int i = 0; i < (together ? P : K); ++i) line[i] = w.data + i * (together ? w.at : w.tap);
  }
  DYNACONV_INLINE C operator()(int k, int p) const { return together ? line[p][k] : line[k][p]; }
};

// Where the tensor itself holds the row as it is computed with, that; otherwise a copy.
template <class T, class C>
Row<C> weights(const PerPosition& a, const Piece& p, int64_t g, const int64_t (&at)[3],
               int64_t count, C* scratch) {
  const T* w = static_cast<const T*>(a.weight) + p.n * a.w_stride[0] + (p.g + g) * a.w_stride[1] +
               at[0] * a.at[0] + at[1] * a.at[1] + at[2] * a.at[2];
  if constexpr (sizeof(T) == sizeof(C))
    if (a.at[2] == 1 || (a.tap[2] == 1 && many_channels<T>(a)))
      return {w, {a.tap[0], a.tap[1], a.tap[2]}, a.at[2], a.at[1]};
  const int64_t pitch = whole<C>(count), k1 = a.kernel[1], k2 = a.kernel[2];
  if (a.tap[0] == k1 * a.tap[1] && a.tap[1] == k2 * a.tap[2]) {
    move(taps(a), count, w, {a.tap[2], a.at[2]}, scratch, {pitch, 1}, false);
  } else {
    for (int64_t k = 0; k < a.kernel[0] * k1; ++k)
      move(k2, count, w + k / k1 * a.tap[0] + k % k1 * a.tap[1], {a.tap[2], a.at[2]},
           scratch + k * k2 * pitch, {pitch, 1}, false);
  }
  return {scratch, {k1 * k2 * pitch, k2 * pitch, pitch}, 1, 0};
}

// Channels as lanes --------------------------------------------------------------------------

template <bool together, class C>
DYNACONV_INLINE Taps<C, together> taps_of(const Row<C>& w, int64_t i, int64_t j, int64_t p) {
  return {w.data + i * w.tap[0] + j * w.tap[1] + p * w.at, w.tap[2], w.at, w.ahead};
}

// P positions and N vectors of channels meet K taps at stride and dilation 1.
template <int K, class C, int P, int N, bool U>
DYNACONV_INLINE void slide(Vector<C> (&sum)[P][N], const C* x, int64_t pitch, Taps<C, U> taps) {
  const Lines<C, U, P, K> w(taps);
#pragma GCC unroll 16
  for (int i = 0; i < P + K - 1; ++i, x += pitch)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const Vector<C> v = load(x + n * VectorOf<C>::lanes);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k)
        if (i - k >= 0 && i - k < P) sum[i - k][n] += v * w(k, i - k);
    }
}

// Its transpose: adds to x.
template <int K, class C, int P, int N, bool U>
DYNACONV_INLINE void slide(const Vector<C> (&g)[P][N], C* x, int64_t pitch, Taps<C, U> taps) {
  const Lines<C, U, P, K> w(taps);
#pragma GCC unroll 16
  for (int i = 0; i < P + K - 1; ++i, x += pitch)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      C* at = x + n * VectorOf<C>::lanes;
      Vector<C> v = load(at);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k)
        if (i - k >= 0 && i - k < P) v += g[i - k][n] * w(k, i - k);
      store(at, v);
    }
}

// One tap over P positions, at any stride: `apart` numbers of x from one position to the next.
template <class C, int P, int N, bool U>
DYNACONV_INLINE void one_tap(Vector<C> (&sum)[P][N], const C* x, int64_t apart, Taps<C, U> taps) {
  const Lines<C, U, P, 1> w(taps);
#pragma GCC unroll 8
  for (int j = 0; j < P; ++j)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n)
      sum[j][n] += load(x + j * apart + n * VectorOf<C>::lanes) * w(0, j);
}

template <class C, int P, int N, bool U>
DYNACONV_INLINE void one_tap(const Vector<C> (&g)[P][N], C* x, int64_t apart, Taps<C, U> taps) {
  const Lines<C, U, P, 1> w(taps);
#pragma GCC unroll 8
  for (int j = 0; j < P; ++j)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      C* at = x + j * apart + n * VectorOf<C>::lanes;
      store(at, load(at) + g[j][n] * w(0, j));
    }
}

// One row of taps over P positions: adds x to `values`, or (where they are const) these to x.
template <class Values, class X, class W>
DYNACONV_INLINE void row_of_taps(const PerPosition& a, Values& values, X* x, int64_t pitch, W w) {
  const int64_t s = a.stride[2], d = a.dilation[2], K = a.kernel[2];
  int64_t k = 0;
  w.template prefetch<sizeof(values) / sizeof(values[0])>(K);
  if (s == 1 && d == 1) {
    for (; k + 7 <= K; k += 7) slide<7>(values, x + k * pitch, pitch, w.from(k));
    if (k + 5 <= K) slide<5>(values, x + k * pitch, pitch, w.from(k)), k += 5;
    if (k + 3 <= K) slide<3>(values, x + k * pitch, pitch, w.from(k)), k += 3;
  }
  for (; k < K; ++k) one_tap(values, x + k * d * pitch, s * pitch, w.from(k));
}

// f(P, first position) over `count` positions, in blocks of 8 or 7 and what is left.
template <class F>
DYNACONV_INLINE void in_blocks(int64_t count, const F& f) {
  int64_t p = 0;
  if (count % 7 == 0 && count % 8)
    for (; p < count; p += 7) f.template operator()<7>(p);
  for (; p + 8 <= count; p += 8) f.template operator()<8>(p);
  if (p + 4 <= count) f.template operator()<4>(p), p += 4;
  if (p + 2 <= count) f.template operator()<2>(p), p += 2;
  if (p < count) f.template operator()<1>(p);
}

// f(N, first lane) over the vectors of channels.
template <class C, class F>
DYNACONV_INLINE void in_vectors(int64_t channels, const F& f) {
  constexpr int lanes = VectorOf<C>::lanes;
  int64_t c = 0;
  for (; c + (PAIR - 1) * lanes < channels; c += PAIR * lanes) f.template operator()<PAIR>(c);
  if (c < channels) f.template operator()<1>(c);
}

// A row of outputs: x at the first position that its first tap sees, y at its first position.
template <bool together, class C>
void output_row(const PerPosition& a, int64_t count, int64_t channels, const C* x, const Box& seen,
                const Row<C>& w, C* y) {
  constexpr int lanes = VectorOf<C>::lanes;
  const int64_t pitch = seen.step.position;
  in_vectors<C>(channels, [&]<int N>(int64_t c) {
    in_blocks(count, [&]<int P>(int64_t p) {
      Vector<C> sum[P][N] = {};
      for (int64_t i = 0; i < a.kernel[0]; ++i)
        for (int64_t j = 0; j < a.kernel[1]; ++j)
          row_of_taps(a, sum,
                      x + i * a.dilation[0] * seen.plane + j * a.dilation[1] * seen.row +
                          p * a.stride[2] * pitch + c,
                      pitch, taps_of<together>(w, i, j, p));
#pragma GCC unroll 8
      for (int j = 0; j < P; ++j)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) store(y + (p + j) * pitch + c + n * lanes, sum[j][n]);
    });
  });
}

// Adds what a row of outputs sends back along one row of taps.
template <bool together, class C>
void input_row(const PerPosition& a, int64_t count, int64_t channels, C* x, int64_t pitch,
               const Row<C>& w, int64_t i, int64_t k, const C* g) {
  constexpr int lanes = VectorOf<C>::lanes;
  in_vectors<C>(channels, [&]<int N>(int64_t c) {
    in_blocks(count, [&]<int P>(int64_t p) {
      Vector<C> up[P][N];
#pragma GCC unroll 8
      for (int j = 0; j < P; ++j)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) up[j][n] = load(g + (p + j) * pitch + c + n * lanes);
      const Vector<C>(&values)[P][N] = up;
      row_of_taps(a, values, x + p * a.stride[2] * pitch + c, pitch, taps_of<together>(w, i, k, p));
    });
  });
}

// Positions as lanes -------------------------------------------------------------------------

// Where tap k of a row lies in positions-as-lanes scratch: its phase, then its shift.
inline int64_t shift(const PerPosition& a, int64_t k, int64_t width) {
  const int64_t step = k * a.dilation[2];
  return step % a.stride[2] * width + step / a.stride[2];
}

template <class C, int M>
DYNACONV_INLINE void output_vector(const PerPosition& a, const C* x, const Box& seen,
                                   int64_t width, const Row<C>& w, int64_t count, C* y,
                                   int64_t y_channel) {
  Vector<C> sum[M] = {};
  for (int64_t i = 0; i < a.kernel[0]; ++i)
    for (int64_t j = 0; j < a.kernel[1]; ++j) {
      const C* row = x + i * a.dilation[0] * seen.plane + j * a.dilation[1] * seen.row;
      const C* weight = w.data + i * w.tap[0] + j * w.tap[1];
      for (int64_t k = 0; k < a.kernel[2]; ++k) {
        const Vector<C> v = load_first(weight + k * w.tap[2], count);
        const C* at = row + shift(a, k, width);
#pragma GCC unroll 4
        for (int c = 0; c < M; ++c) sum[c] += v * load(at + c * seen.step.channel);
      }
    }
#pragma GCC unroll 4
  for (int c = 0; c < M; ++c) store(y + c * y_channel, sum[c]);
}

// One row of taps over a vector of positions: adds to x.
template <class C>
DYNACONV_INLINE void input_vector(const PerPosition& a, C* x, const Box& seen, int64_t width,
                                  const C* w, int64_t tap, int64_t count, const C* g,
                                  int64_t g_channel, int64_t channels) {
  for (int64_t k = 0; k < a.kernel[2]; ++k) {
    const Vector<C> v = load_first(w + k * tap, count);
    C* at = x + shift(a, k, width);
    for (int64_t c = 0; c < channels; ++c) {
      C* one = at + c * seen.step.channel;
      store(one, load(one) + v * load(g + c * g_channel));
    }
  }
}

// sum_c g[c] x[c, tap] of K taps over a vector of positions.
template <class C, int K>
DYNACONV_INLINE void weight_vector(const PerPosition& a, const C* x, const Box& seen,
                                   int64_t width, int64_t k, const C* g, int64_t g_channel,
                                   int64_t channels, bool add, C* w, int64_t tap, int64_t count) {
  Vector<C> sum[K];
  int64_t at[K];
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) {
    __builtin_prefetch(w + i * tap + a.at[1], 1);
    sum[i] = add ? load_first(w + i * tap, count) : Vector<C>{};
    at[i] = shift(a, k + i, width);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const Vector<C> v = load(g + c * g_channel);
    const C* row = x + c * seen.step.channel;
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) sum[i] += v * load(row + at[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) store_first(w + i * tap, sum[i], count);
}

// Tasks --------------------------------------------------------------------------------------

// The box of input that a piece of the output sees, in the layout for outputs and weights.
template <class T>
Box input_box(const PerPosition& a, const int64_t (&size)[3], int64_t channels, bool lanes) {
  typedef Compute<T> C;
  const int64_t box[3] = {seen(a, 0, size[0]), seen(a, 1, size[1]), seen(a, 2, size[2])};
  if (lanes) return by_channel<C>(box, channels);
  return by_position<C>(box, a.stride[2] * phase_width<C>(a, size[2]));
}

template <class T>
Box output_box(const int64_t (&size)[3], int64_t channels, bool lanes) {
  typedef Compute<T> C;
  return lanes ? by_channel<C>(size, channels) : by_position<C>(size, whole<C>(size[2]));
}

inline int64_t numbers(const Box& box, int64_t channels) {
  return box.step.channel == 1 ? box.size[0] * box.plane : channels * box.step.channel;
}

// Room for the weights of one row of outputs.
template <class C>
int64_t row_numbers(const PerPosition& a, int64_t count) {
  return taps(a) * whole<C>(count);
}

template <class T>
int64_t output_scratch(const PerPosition& a) {
  typedef Compute<T> C;
  const bool lanes = many_channels<T>(a);
  const int64_t channels = a.chunk * a.bundle;
  return sizeof(C) * (numbers(input_box<T>(a, a.tile, channels, lanes), channels) +
                      numbers(output_box<T>(a.tile, channels, lanes), channels) +
                      row_numbers<C>(a, a.tile[2]));
}

// Fills the input that a piece sees; each phase of the stride apart where positions are lanes.
template <class T, class C>
void fill_input(const PerPosition& a, const Piece& p, const int64_t (&size)[3], const Box& box,
                C* to) {
  const View<T> x = view<T>(a.input, a.x_stride, a, p);
  int64_t from[3];
  for (int d = 0; d < 3; ++d) from[d] = p.from[d] * a.stride[d] - a.padding[d];
  if (box.step.channel == 1) return fill(x, a.in, from, box, p.all(), 1, box.size[2], to);
  const int64_t width = phase_width<C>(a, size[2]);
  for (int64_t phase = 0; phase < a.stride[2]; ++phase, ++from[2])
    fill(x, a.in, from, box, p.all(), a.stride[2], width, to + phase * width);
}

// Writes a box of scratch to the tensor.
template <class T, class C>
void write(const View<T>& y, const Piece& p, const Box& box, const C* from) {
  for (int64_t d = 0; d < p.size[0]; ++d)
    for (int64_t h = 0; h < p.size[1]; ++h)
      move(p.all(), p.size[2], from + d * box.plane + h * box.row, box.step,
           y.data + (p.from[0] + d) * y.space[0] + (p.from[1] + h) * y.space[1] +
               p.from[2] * y.space[2],
           {y.channel, y.space[2]}, false);
}

// A row of one group's outputs, positions as lanes.
template <class C>
void output_row_by_position(const PerPosition& a, const Piece& p, const C* x, const Box& seen,
                            const Row<C>& w, C* y, const Box& made) {
  const int64_t width = phase_width<C>(a, p.size[2]);
  for (int64_t i = 0; i < p.size[2]; i += VectorOf<C>::lanes) {
    const Row<C> here = {w.data + i, {w.tap[0], w.tap[1], w.tap[2]}, 1, w.ahead};
    int64_t c = 0;
    const auto run = [&]<int M>() {
      for (; c + M <= p.channels; c += M)
        output_vector<C, M>(a, x + i + c * seen.step.channel, seen, width, here, p.size[2] - i,
                            y + i + c * made.step.channel, made.step.channel);
    };
    run.template operator()<4>();
    run.template operator()<1>();
  }
}

template <class T>
void output(const PerPosition& a, int64_t begin, int64_t end, void* scratch) {
  typedef Compute<T> C;
  const bool lanes = many_channels<T>(a);
  for (int64_t task = begin; task < end; ++task) {
    const Piece p = piece_of(a, a.out, task);
    const Box seen = input_box<T>(a, p.size, p.all(), lanes);
    const Box made = output_box<T>(p.size, p.all(), lanes);
    C* x = static_cast<C*>(scratch);
    C* y = x + numbers(seen, p.all());
    C* buffer = y + numbers(made, p.all());
    fill_input<T>(a, p, p.size, seen, x);
    for (int64_t d = 0; d < p.size[0]; ++d)
      for (int64_t h = 0; h < p.size[1]; ++h)
        for (int64_t g = 0; g < p.groups; ++g) {
          const Row<C> w = weights<T>(a, p, g, {p.from[0] + d, p.from[1] + h, p.from[2]},
                                      p.size[2], buffer);
          const int64_t c = g * p.channels;
          const C* from = x + d * a.stride[0] * seen.plane + h * a.stride[1] * seen.row +
                          c * seen.step.channel;
          C* to = y + d * made.plane + h * made.row + c * made.step.channel;
          if (!lanes)
            output_row_by_position(a, p, from, seen, w, to, made);
          else if (w.at == 1)
            output_row<false>(a, p.size[2], p.channels, from, seen, w, to);
          else
            output_row<true>(a, p.size[2], p.channels, from, seen, w, to);
        }
    write(view<T>(a.output, a.y_stride, a, p), p, made, y);
  }
}

// Outputs that see positions [from, from + size) of the input along dimension d.
struct Range {
  int64_t from, size;
};

inline Range seeing(const PerPosition& a, int d, int64_t from, int64_t size) {
  const int64_t s = a.stride[d], span = (a.kernel[d] - 1) * a.dilation[d];
  const int64_t first = from + a.padding[d] - span, last = from + size - 1 + a.padding[d];
  const int64_t low = first > 0 ? (first + s - 1) / s : 0;
  const int64_t high = least(a.out[d], last / s + 1);
  return {low, most<int64_t>(high - low, 0)};
}

template <class T>
int64_t input_scratch(const PerPosition& a) {
  typedef Compute<T> C;
  const bool lanes = many_channels<T>(a);
  int64_t up[3];
  for (int d = 0; d < 3; ++d)
    up[d] = (a.tile[d] - 1 + (a.kernel[d] - 1) * a.dilation[d]) / a.stride[d] + 2;
  const int64_t width = lanes ? seen(a, 2, up[2]) : a.stride[2] * phase_width<C>(a, up[2]);
  const int64_t size[3] = {a.tile[0], a.tile[1], width};
  const int64_t channels = a.chunk * a.bundle;
  const Box box = lanes ? by_channel<C>(size, channels) : by_position<C>(size, width);
  return sizeof(C) * (numbers(box, channels) +
                      numbers(output_box<T>(up, channels, lanes), channels) +
                      row_numbers<C>(a, up[2]));
}

// Adds the gradients that one row of outputs of a group sends to the rows of a piece.
template <class T, class C>
void send_back(const PerPosition& a, const Piece& p, const Range (&up)[3], int64_t d, int64_t h,
               int64_t group, const Box& box, const Box& given, C* x, const C* g, C* buffer) {
  const Row<C> w = weights<T>(a, p, group, {up[0].from + d, up[1].from + h, up[2].from},
                              up[2].size, buffer);
  const C* from = g + d * given.plane + h * given.row + group * p.channels * given.step.channel;
  for (int64_t i = 0; i < a.kernel[0]; ++i)
    for (int64_t j = 0; j < a.kernel[1]; ++j) {
      const int64_t z =
          (up[0].from + d) * a.stride[0] - a.padding[0] + i * a.dilation[0] - p.from[0];
      const int64_t y =
          (up[1].from + h) * a.stride[1] - a.padding[1] + j * a.dilation[1] - p.from[1];
      if (z < 0 || z >= p.size[0] || y < 0 || y >= p.size[1]) continue;
      C* row = x + z * box.plane + y * box.row + group * p.channels * box.step.channel;
      const C* weight = w.data + i * w.tap[0] + j * w.tap[1];
      if (box.step.channel == 1) {
        (w.at == 1 ? input_row<false, C> : input_row<true, C>)(
            a, up[2].size, p.channels, row, box.step.position, w, i, j, from);
        continue;
      }
      const int64_t width = phase_width<C>(a, up[2].size);
      for (int64_t v = 0; v < up[2].size; v += VectorOf<C>::lanes)
        input_vector(a, row + v, box, width, weight + v, w.tap[2], up[2].size - v, from + v,
                     given.step.channel, p.channels);
    }
}

// Writes the gradient's row: position q lies at q + padding - first * stride of the scratch.
template <class T, class C>
void write_row(const PerPosition& a, const Piece& p, const Range& up, const Box& box, const C* row,
               T* to, const View<T>& x) {
  const int64_t s = a.stride[2], start = p.from[2] + a.padding[2] - up.from * s;
  const bool lanes = box.step.channel == 1;
  const int64_t reach = up.size ? seen(a, 2, up.size) : 0;
  const int64_t left = least(most<int64_t>(-start, 0), p.size[2]);
  const int64_t right = most(left, least(p.size[2], reach - start));
  for (int64_t c = 0; c < p.all(); ++c) {
    for (int64_t q = 0; q < left; ++q) to[c * x.channel + q * x.space[2]] = narrow<T>(C(0));
    for (int64_t q = right; q < p.size[2]; ++q)
      to[c * x.channel + q * x.space[2]] = narrow<T>(C(0));
  }
  if (lanes || s == 1)
    return move(p.all(), right - left, row + (start + left) * box.step.position, box.step,
                to + left * x.space[2], {x.channel, x.space[2]}, false);
  const int64_t width = phase_width<C>(a, up.size);
  for (int64_t phase = 0; phase < s; ++phase) {
    const int64_t first = left + (phase - (start + left) % s + s) % s;
    if (first >= right) continue;
    move(p.all(), (right - 1 - first) / s + 1, row + phase * width + (start + first) / s,
         box.step, to + first * x.space[2], {x.channel, s * x.space[2]}, false);
  }
}

template <class T>
void input(const PerPosition& a, int64_t begin, int64_t end, void* scratch) {
  typedef Compute<T> C;
  const bool lanes = many_channels<T>(a);
  for (int64_t task = begin; task < end; ++task) {
    const Piece p = piece_of(a, a.in, task);
    Range up[3];
    for (int d = 0; d < 3; ++d) up[d] = seeing(a, d, p.from[d], p.size[d]);
    const int64_t from[3] = {up[0].from, up[1].from, up[2].from};
    const int64_t outputs[3] = {up[0].size, up[1].size, up[2].size};
    const int64_t width = lanes ? seen(a, 2, outputs[2])
                                : a.stride[2] * phase_width<C>(a, outputs[2]);
    const int64_t size[3] = {p.size[0], p.size[1], width};
    const Box box = lanes ? by_channel<C>(size, p.all()) : by_position<C>(size, width);
    const Box given = output_box<T>(outputs, p.all(), lanes);
    C* x = static_cast<C*>(scratch);
    C* g = x + numbers(box, p.all());
    C* buffer = g + numbers(given, p.all());
    clear(x, numbers(box, p.all()));
    fill(view<T>(a.output, a.y_stride, a, p), a.out, from, given, p.all(), 1,
         lanes ? outputs[2] : whole<C>(outputs[2]), g);
    for (int64_t d = 0; d < outputs[0]; ++d)
      for (int64_t h = 0; h < outputs[1]; ++h)
        for (int64_t i = 0; i < p.groups; ++i)
          send_back<T>(a, p, up, d, h, i, box, given, x, g, buffer);
    const View<T> target = view<T>(a.input, a.x_stride, a, p);
    for (int64_t d = 0; d < p.size[0]; ++d)
      for (int64_t h = 0; h < p.size[1]; ++h)
        write_row(a, p, up[2], box, x + d * box.plane + h * box.row,
                  target.data + (p.from[0] + d) * target.space[0] +
                      (p.from[1] + h) * target.space[1] + p.from[2] * target.space[2],
                  target);
  }
}

template <class T>
int64_t weight_scratch(const PerPosition& a) {
  typedef Compute<T> C;
  const int64_t channels = a.chunk * a.bundle;
  return sizeof(C) * (numbers(input_box<T>(a, a.tile, channels, false), channels) +
                      numbers(output_box<T>(a.tile, channels, false), channels) +
                      a.tile[0] * a.tile[1] * row_numbers<C>(a, a.tile[2]));
}

// One row of the weight's gradient from one chunk of channels; w as in Row.
template <class C>
void weight_row(const PerPosition& a, const Piece& p, const C* x, const Box& seen, const C* g,
                int64_t g_channel, bool add, C* w, const int64_t (&tap)[3]) {
  const int64_t width = phase_width<C>(a, p.size[2]);
  for (int64_t v = 0; v < p.size[2]; v += VectorOf<C>::lanes)
    for (int64_t i = 0; i < a.kernel[0]; ++i)
      for (int64_t j = 0; j < a.kernel[1]; ++j) {
        const C* row = x + i * a.dilation[0] * seen.plane + j * a.dilation[1] * seen.row + v;
        C* to = w + i * tap[0] + j * tap[1] + v;
        int64_t k = 0;
        const auto run = [&]<int K>() {
          for (; k + K <= a.kernel[2]; k += K)
            weight_vector<C, K>(a, row, seen, width, k, g + v, g_channel, p.channels, add,
                                to + k * tap[2], tap[2], p.size[2] - v);
        };
        run.template operator()<7>();
        run.template operator()<5>();
        run.template operator()<3>();
        run.template operator()<1>();
      }
}

// Adds one chunk of channels to the gradient of one group's weight.
template <class T, class C>
void weight_rows(const PerPosition& a, const Piece& p, int64_t group, const C* x, const Box& seen,
                 const C* g, const Box& given, C* buffer) {
  T* to = static_cast<T*>(a.weight) + p.n * a.w_stride[0] + (p.g + group) * a.w_stride[1] +
          p.from[0] * a.at[0] + p.from[1] * a.at[1] + p.from[2] * a.at[2];
  const int64_t pitch = whole<C>(p.size[2]), row = taps(a) * pitch, first = group * p.channels;
  const int64_t tap[3] = {a.kernel[1] * a.kernel[2] * pitch, a.kernel[2] * pitch, pitch};
  const bool add = p.c > 0, last = p.c + p.channels == a.channels;
  for (int64_t d = 0; d < p.size[0]; ++d)
    for (int64_t h = 0; h < p.size[1]; ++h) {
      const C* from = x + d * a.stride[0] * seen.plane + h * a.stride[1] * seen.row +
                      first * seen.step.channel;
      const C* up = g + d * given.plane + h * given.row + first * given.step.channel;
      T* at = to + d * a.at[0] + h * a.at[1];
      if constexpr (sizeof(T) == sizeof(C))
        if (a.at[2] == 1) {
          weight_row(a, p, from, seen, up, given.step.channel, add, at, a.tap);
          continue;
        }
      C* sums = buffer + (d * p.size[1] + h) * row;
      weight_row(a, p, from, seen, up, given.step.channel, add, sums, tap);
      for (int64_t k = 0; last && k < a.kernel[0] * a.kernel[1]; ++k)
        move(a.kernel[2], p.size[2], sums + k * tap[1], {pitch, 1},
             at + k / a.kernel[1] * a.tap[0] + k % a.kernel[1] * a.tap[1], {a.tap[2], a.at[2]},
             false);
    }
}

template <class T>
void weight(const PerPosition& a, int64_t begin, int64_t end, void* scratch) {
  typedef Compute<T> C;
  PerPosition all = a;  // a task takes every channel, chunk by chunk
  all.chunk = a.channels;
  for (int64_t task = begin; task < end; ++task) {
    Piece p = piece_of(all, a.out, task);
    const Box seen = input_box<T>(a, p.size, a.chunk, false);
    const Box given = output_box<T>(p.size, a.chunk, false);
    C* x = static_cast<C*>(scratch);
    C* g = x + numbers(seen, a.chunk * a.bundle);
    C* buffer = g + numbers(given, a.chunk * a.bundle);
    for (p.c = 0; p.c < a.channels; p.c += a.chunk) {
      p.channels = least(a.chunk, a.channels - p.c);
      fill_input<T>(a, p, p.size, seen, x);
      fill(view<T>(a.output, a.y_stride, a, p), a.out, p.from, given, p.all(), 1,
           whole<C>(p.size[2]), g);
      for (int64_t group = 0; group < p.groups; ++group)
        weight_rows<T>(a, p, group, x, seen, g, given, buffer);
    }
  }
}

template <class T>
bool by_channels(Wanted wanted, const PerPosition& a) {
  return wanted != Wanted::weight_gradient && many_channels<T>(a);
}

template <class T>
int64_t scratch(Wanted wanted, const PerPosition& a) {
  switch (wanted) {
    case Wanted::output: return output_scratch<T>(a);
    case Wanted::input_gradient: return input_scratch<T>(a);
    default: return weight_scratch<T>(a);
  }
}

template <class T>
void run(Wanted wanted, const PerPosition& a, int64_t begin, int64_t end, void* scratch) {
  switch (wanted) {
    case Wanted::output: return output<T>(a, begin, end, scratch);
    case Wanted::input_gradient: return input<T>(a, begin, end, scratch);
    default: return weight<T>(a, begin, end, scratch);
  }
}

#define INSTANTIATE(T)                                      \
  template bool by_channels<T>(Wanted, const PerPosition&); \
  template int64_t scratch<T>(Wanted, const PerPosition&);  \
  template void run<T>(Wanted, const PerPosition&, int64_t, int64_t, void*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)

}  // namespace per_position
}  // namespace DYNACONV_ISA
}  // namespace dynaconv
