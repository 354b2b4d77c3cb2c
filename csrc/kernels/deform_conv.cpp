#include "deform_conv.h"

#include "gemm.h"
#include "wide.h"

namespace dynaconv {
namespace DYNACONV_ISA {
namespace {

constexpr int64_t POINTS = DEFORM_POINTS, ROW = DEFORM_ROW;

DYNACONV_INLINE int64_t padded(int64_t columns) {
  return ceil_div(columns, DEFORM_PAD) * DEFORM_PAD;
}

// Scratch handed out piece by piece, each at the start of a cache line.
template <class C>
struct Pieces {
  C* next;
  DYNACONV_INLINE C* take(int64_t count) {
    C* piece = next;
    next += ceil_div(count, DEFORM_PAD) * DEFORM_PAD;
    return piece;
  }
};

struct Range {
  int64_t begin, end;
  DYNACONV_INLINE int64_t count() const { return end - begin; }
  DYNACONV_INLINE bool operator==(const Range& other) const {
    return begin == other.begin && end == other.end;
  }
};

// The groups of `size` channels that a range of channels touches, and what it has of one.
DYNACONV_INLINE Range groups_of(Range channels, int64_t size) {
  return {channels.begin / size, ceil_div(channels.end, size)};
}
DYNACONV_INLINE Range shared(Range channels, int64_t group, int64_t size) {
  return {most(channels.begin, group * size), least(channels.end, (group + 1) * size)};
}

// Some positions of one sample, and where their first tap lies without offset.
template <class O>
struct Tile {
  int64_t sample, first, count;
  O start[3][POINTS];

  Tile(const DeformShape& shape, int64_t tile, int64_t sample, int64_t index)
      : sample(sample), first(index * tile), count(least(tile, shape.positions - first)) {
    int64_t at[3] = {}, rest = first;
    for (int64_t d = shape.rank - 1; d >= 0; --d) {
      at[d] = rest % shape.size[d];
      rest /= shape.size[d];
    }
    for (int64_t p = 0; p < POINTS; ++p) {
      for (int64_t d = 0; d < shape.rank; ++d)
        start[d][p] = static_cast<O>(at[d] * shape.stride[d] - shape.padding[d]);
      if (p + 1 >= count) continue;
      for (int64_t d = shape.rank - 1; d >= 0 && ++at[d] == shape.size[d]; --d) at[d] = 0;
    }
  }
};

template <class O>
struct IntOf {
  typedef int32_t type;
};
template <>
struct IntOf<double> {
  typedef int64_t type;
};

// Along one dimension, for a vector of positions: the lower and the upper neighbour.
template <class O>
struct Axis {
  typedef Vector<typename IntOf<O>::type> Ints;
  Vector<O> share[2];
  Ints index[2], outside[2];

  DYNACONV_INLINE Axis(Vector<O> position, int64_t length) {
    const Ints nan = position != position;
    const O end = static_cast<O>(length), last = static_cast<O>(length - 1);
    const Vector<O> zero = {}, least = zero - 2, most = zero + (end + 1);
    Vector<O> near = nan ? zero : position;
    near = near < least ? least : near > most ? most : near;
    const Ints whole = __builtin_convertvector(near, Ints);
    const Vector<O> cut = __builtin_convertvector(whole, Vector<O>);
    const Vector<O> lower = cut > near ? cut - 1 : cut;
    const Vector<O> above = (nan ? position : near) - lower;
    const Vector<O> parts[2] = {1 - above, above};
    for (int u = 0; u < 2; ++u) {
      const Vector<O> point = lower + static_cast<O>(u);
      outside[u] = ((point < zero) | (point > last)) & ~nan;
      share[u] = outside[u] ? zero : parts[u];
      Ints at = __builtin_convertvector(point, Ints);
      const Ints none = {}, greatest = none + static_cast<typename IntOf<O>::type>(length - 1);
      at = (at < none) | nan ? none : at;
      index[u] = at > greatest ? greatest : at;
    }
  }
};

// The shifts of a tile's positions at one tap, one row a dimension; zero beyond the last.
template <int D, class O>
DYNACONV_INLINE void read_shifts(const Planes<const O>& offset, const Tile<O>& tile,
                                 int64_t group_tap, O shifts[D][POINTS]) {
  const int64_t step = offset.position;
  for (int d = 0; d < D; ++d) {
    const O* from = offset.data + tile.sample * offset.sample +
                    (group_tap * D + d) * offset.channel + tile.first * step;
    for (int64_t p = 0; p < tile.count; ++p) shifts[d][p] = from[p * step];
    for (int64_t p = tile.count; p < POINTS; ++p) shifts[d][p] = 0;
  }
}

// Whether corner j is the upper neighbour along dimension d.
template <int D>
DYNACONV_INLINE int upper(int j, int d) {
  return j >> (D - 1 - d) & 1;
}

// How far each tap is from the first.
DYNACONV_INLINE void tap_steps(const DeformShape& shape, int64_t tap, int64_t steps[3]) {
  for (int64_t d = shape.rank - 1; d >= 0; --d) {
    steps[d] = tap % shape.kernel[d] * shape.dilation[d];
    tap /= shape.kernel[d];
  }
}

template <class T, class C, class O>
DYNACONV_INLINE void read_modulation(const Planes<const T>& modulation, const Tile<O>& tile,
                                     int64_t group_tap, C* to) {
  const int64_t step = modulation.position;
  const T* from = modulation.data + tile.sample * modulation.sample +
                  group_tap * modulation.channel + tile.first * step;
  for (int64_t p = 0; p < POINTS; ++p) to[p] = 1;
  if (!modulation.data) return;
  for (int64_t p = 0; p < tile.count; ++p) to[p] = widen(from[p * step]);
}

// Where one tap samples at one point, and with which shares: corner j is j * POINTS further on.
template <int D, class C>
struct Corners {
  const int32_t* index;
  const C *share, *modulation;

  DYNACONV_INLINE Corners tap(int64_t t) const {
    const int64_t step = t * POINTS << D;
    return {index + step, share + step, modulation + t * POINTS};
  }
};

// Where some taps of some offset groups sample, and with which shares: for each offset group, tap
// and corner a row of POINTS.
template <int D, class C, class O>
struct Plan {
  static constexpr int corners = 1 << D;
  int32_t* index;
  C *share, *modulation;
  Range groups = {}, taps = {};
  const void* tile = nullptr;

  static DYNACONV_INLINE int64_t numbers(int64_t groups, int64_t taps) {
    return groups * taps * POINTS * (2 * corners + 1);
  }
  DYNACONV_INLINE Plan(Pieces<C>& pieces, int64_t groups, int64_t taps)
      : index(reinterpret_cast<int32_t*>(pieces.take(groups * taps * POINTS * corners))),
        share(pieces.take(groups * taps * POINTS * corners)),
        modulation(pieces.take(groups * taps * POINTS)) {}

  DYNACONV_INLINE int64_t row(int64_t group, int64_t tap) const {
    return ((group - groups.begin) * taps.count() + tap - taps.begin) * POINTS;
  }

  // At the first tap.
  DYNACONV_INLINE Corners<D, C> at(int64_t group, int64_t point) const {
    const int64_t first = row(group, taps.begin);
    return {index + first * corners + point, share + first * corners + point,
            modulation + first + point};
  }

  // Nothing to do where it is for that already.
  template <class Call>
  void make(const Call& call, const Tile<O>& of, Range new_groups, Range new_taps) {
    if (tile == &of && groups == new_groups && taps == new_taps) return;
    tile = &of, groups = new_groups, taps = new_taps;
    for (int64_t g = groups.begin; g < groups.end; ++g)
      for (int64_t t = taps.begin; t < taps.end; ++t) {
        const int64_t group_tap = g * call.shape.taps + t;
        read_modulation(call.modulation, of, group_tap, modulation + row(g, t));
        place(call, of, t, group_tap, row(g, t) * corners);
      }
  }

  template <class Call>
  DYNACONV_INLINE void place(const Call& call, const Tile<O>& of, int64_t tap, int64_t group_tap,
                             int64_t first) {
    typedef typename Axis<O>::Ints Ints;
    typedef typename IntOf<O>::type Int;
    constexpr int lanes = VectorOf<O>::lanes;
    const DeformShape& shape = call.shape;
    O shifts[D][POINTS];
    read_shifts<D>(call.offset, of, group_tap, shifts);
    int64_t steps[3];
    tap_steps(shape, tap, steps);
    for (int64_t p = 0; p < of.count; p += lanes) {
      Ints at[corners];
      Vector<O> part[corners];
#pragma GCC unroll 8
      for (int j = 0; j < corners; ++j) {
        at[j] = Ints{};
        part[j] = Vector<O>{} + 1;
      }
#pragma GCC unroll 3
      for (int d = 0; d < D; ++d) {
        const Vector<O> start = load(of.start[d] + p) + static_cast<O>(steps[d]);
        const Axis<O> axis(load(shifts[d] + p) + start, shape.length[d]);
#pragma GCC unroll 8
        for (int j = 0; j < corners; ++j) {
          at[j] = at[j] * static_cast<Int>(shape.length[d]) + axis.index[upper<D>(j, d)];
          part[j] *= axis.share[upper<D>(j, d)];
        }
      }
      for (int j = 0; j < corners; ++j) {
        const int64_t to = first + j * POINTS + p;
        put<lanes>(index + to, __builtin_convertvector(at[j], Wide<int32_t, lanes>));
        put<lanes>(share + to, __builtin_convertvector(part[j], Wide<C, lanes>));
      }
    }
  }
};

// What the taps of a plan see of some channels at some points of the tile:
// columns[point, tap, channel].
template <int D, class C, class O>
void sample(const DeformShape& shape, const Plan<D, C, O>& plan, const Tile<O>& tile,
            const Rows<const C>& input, Range points, Range channels, C* columns) {
  constexpr int corners = 1 << D;
  const int64_t width = channels.count(), input_row = input.row;
  for (int64_t g = plan.groups.begin; g < plan.groups.end; ++g) {
    const Range mine = shared(channels, g, shape.offset_channels);
    const C* rows = input.data + tile.sample * input.sample + mine.begin;
    const int64_t count = mine.count();
    for (int64_t p = points.begin; p < points.end; ++p) {
      const Corners<D, C> first = plan.at(g, p);
      C* to = columns + (p - points.begin) * ROW + mine.begin - channels.begin;
      for (int64_t t = 0; t < plan.taps.count(); ++t, to += width) {
        const Corners<D, C> here = first.tap(t);
        const C modulation = *here.modulation;
        const C* from[corners];
#pragma GCC unroll 8
        for (int j = 0; j < corners; ++j) from[j] = rows + here.index[j * POINTS] * input_row;
        for_vectors<C>(count, [&]<int W>(int64_t i) {
          auto sum = get<W>(from[0] + i) * here.share[0];
#pragma GCC unroll 8
          for (int j = 1; j < corners; ++j) sum += get<W>(from[j] + i) * here.share[j * POINTS];
          put<W>(to + i, sum * modulation);
        });
      }
    }
  }
}

// The chunks of a call one after the other: f(channels, taps).
template <class F>
DYNACONV_INLINE void for_chunks(const DeformShape& shape, const DeformCut& cut, Range slices,
                                const F& f) {
  for (int64_t s = slices.begin; s < slices.end; ++s)
    for (int64_t t = 0; t < shape.taps; t += cut.taps)
      f(Range{s * cut.slice, least((s + 1) * cut.slice, shape.channels)},
        Range{t, least(t + cut.taps, shape.taps)});
}

// Points of a tile in blocks, few enough for their columns to stay in the first cache: f(points).
template <class C, class F>
DYNACONV_INLINE void for_blocks(int64_t count, const F& f) {
  constexpr int64_t rows = 14;
  for (int64_t p = 0; p < count; p += rows) f(Range{p, least(p + rows, count)});
}

template <class T, class C>
void write_tile(const C* values, int64_t row, const Planes<T>& output, int64_t sample,
                int64_t first, int64_t count, int64_t channels) {
  T* to = output.data + sample * output.sample + first * output.position;
  if (output.position == 1) return transpose(values, row, to, output.channel, count, channels);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < channels; ++c)
      to[p * output.position + c * output.channel] = narrow<T>(values[p * row + c]);
}

template <class C>
DYNACONV_INLINE Packed<const C> packed_group(const DeformShape& shape, const C* weight,
                                             int64_t group) {
  const int64_t depth = shape.taps * shape.group_in;
  return {weight + group * depth * padded(shape.group_out), depth, shape.group_out};
}

// Adds to the sums of all outputs what a chunk's columns give.
template <class Call, class C>
void add_outputs(const Call& call, int64_t count, Range channels, Range taps, const C* columns,
                 C* sums, int64_t row) {
  const DeformShape& shape = call.shape;
  const Range groups = groups_of(channels, shape.group_in);
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const Range mine = shared(channels, g, shape.group_in);
    Depth depth{taps.count(), mine.count(), channels.count()};
    if (mine == channels) depth = {1, taps.count() * mine.count(), 0};
    const int64_t first = (mine.begin - g * shape.group_in) * shape.taps +
                          taps.begin * mine.count();
    multiply<C, ROW, 1>(count, columns + mine.begin - channels.begin, depth,
                        packed_group(shape, call.weight, g), first, sums + g * shape.group_out,
                        row, true);
  }
}

template <int D, class T, class C, class O>
void forward(const DeformForward<T, C, O>& call, int64_t begin, int64_t end, C* scratch) {
  const DeformShape& shape = call.shape;
  const DeformCut& cut = call.cut;
  const int64_t tiles = ceil_div(shape.positions, cut.tile);
  const int64_t row = padded(shape.out_channels) + DEFORM_PAD;
  const Range slices = {0, ceil_div(shape.channels, cut.slice)};
  Pieces<C> pieces{scratch};
  C *columns = pieces.take(POINTS * ROW), *sums = pieces.take(POINTS * row);
  const int64_t most_groups = least(shape.offset_groups, cut.slice / shape.offset_channels + 2);
  Plan<D, C, O> plan(pieces, most_groups, cut.taps);
  for (int64_t task = begin; task < end; ++task) {
    const Tile<O> tile(shape, cut.tile, task / tiles, task % tiles);
    plan.tile = nullptr;
    for (int64_t p = 0; p < tile.count; ++p)
      for (int64_t c = 0; c < shape.out_channels; ++c)
        sums[p * row + c] = call.bias ? static_cast<C>(widen(call.bias[c])) : 0;
    for_chunks(shape, cut, slices, [&](Range channels, Range taps) {
      plan.make(call, tile, groups_of(channels, shape.offset_channels), taps);
      for_blocks<C>(tile.count, [&](Range points) {
        sample(shape, plan, tile, call.input, points, channels, columns);
        add_outputs(call, points.count(), channels, taps, columns, sums + points.begin * row, row);
      });
    });
    write_tile(sums, row, call.output, tile.sample, tile.first, tile.count, shape.out_channels);
  }
}

// The gradient of the columns of some slice and tap: a packed matrix of its own each.
template <class C>
DYNACONV_INLINE Packed<C> packed_part(const DeformShape& shape, const DeformCut& cut, C* weight,
                                      int64_t slice, int64_t group, int64_t tap, int64_t columns) {
  const int64_t size = shape.group_out * padded(least(cut.slice, shape.group_in));
  return {weight + ((slice + group) * shape.taps + tap) * size, shape.group_out, columns};
}

// Gradient of the columns: columns[p, tap, channel] = sum_o grad[p, o] * weight[o, channel, tap].
template <class C, class Call, class O>
void columns_gradient(const Call& call, const Tile<O>& tile, Range points, Range channels,
                      Range taps, C* grad, C* columns) {
  const DeformShape& shape = call.shape;
  const Range groups = groups_of(channels, shape.group_in);
  const Range outputs = {groups.begin * shape.group_out, groups.end * shape.group_out};
  for (int64_t o = outputs.begin; o < outputs.end; o += DEFORM_COLUMNS) {
    const Range part = {o, least(o + DEFORM_COLUMNS, outputs.end)};
    const C* from = call.grad.data + tile.sample * call.grad.sample +
                    (tile.first + points.begin) * call.grad.row + o;
    for (int64_t p = 0; p < points.count(); ++p)
      convert(from + p * call.grad.row, grad + p * ROW, part.count());
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const Range depth = shared(part, g, shape.group_out);
      if (depth.count() <= 0) continue;
      const Range mine = shared(channels, g, shape.group_in);
      for (int64_t t = taps.begin; t < taps.end; ++t)
        multiply<C, ROW, 1>(points.count(), grad + depth.begin - o, {1, depth.count(), 0},
                            packed_part(shape, call.cut, call.weight,
                                        channels.begin / call.cut.slice, g, t, mine.count()),
                            depth.begin - g * shape.group_out,
                            columns + (t - taps.begin) * channels.count() + mine.begin -
                                channels.begin,
                            ROW, depth.begin > g * shape.group_out);
    }
  }
}

// From the gradient of the columns, what each corner's row gets of it, and the products with each
// corner's row: dots[group, tap, p, corner] of all taps.
template <int D, bool INPUT, bool DOTS, class C, class Call, class O>
void spread(const Call& call, const Plan<D, C, O>& plan, const Tile<O>& tile, Range points,
            Range channels, const C* columns, C* dots, int64_t first_group) {
  constexpr int corners = 1 << D, lanes = VectorOf<C>::lanes;
  const DeformShape& shape = call.shape;
  const int64_t width = channels.count(), input_row = call.input.row;
  for (int64_t g = plan.groups.begin; g < plan.groups.end; ++g) {
    const Range mine = shared(channels, g, shape.offset_channels);
    const C* rows = call.input.data + tile.sample * call.input.sample + mine.begin;
    C* grads = call.grad_input.data + tile.sample * call.grad_input.sample + mine.begin;
    const int64_t count = mine.count();
    for (int64_t p = points.begin; p < points.end; ++p) {
      const Corners<D, C> first = plan.at(g, p);
      const C* grad = columns + (p - points.begin) * ROW + mine.begin - channels.begin;
      C* dot = dots + (((g - first_group) * shape.taps + plan.taps.begin) * POINTS + p) * corners;
      for (int64_t t = 0; t < plan.taps.count(); ++t, grad += width, dot += POINTS * corners) {
        const Corners<D, C> here = first.tap(t);
        int64_t at[corners];
        C share[corners], rest[corners];
        Vector<C> sums[corners];
#pragma GCC unroll 8
        for (int j = 0; j < corners; ++j) {
          at[j] = here.index[j * POINTS] * input_row;
          share[j] = here.share[j * POINTS] * *here.modulation;
          sums[j] = Vector<C>{};
          rest[j] = 0;
        }
        for_vectors<C>(count, [&]<int W>(int64_t i) {
          const auto value = get<W>(grad + i);
#pragma GCC unroll 8
          for (int j = 0; j < corners; ++j) {
            const int64_t from = at[j] + i;
            if constexpr (DOTS && W == lanes) sums[j] += value * get<W>(rows + from);
            if constexpr (DOTS && W < lanes) rest[j] += sum_of<C, W>(value * get<W>(rows + from));
            if constexpr (INPUT) put<W>(grads + from, get<W>(grads + from) + value * share[j]);
          }
        });
        if constexpr (DOTS) add_sums<C, corners>(sums, rest, dot);
      }
    }
  }
}

// Of one tap at the positions of a tile, in rows of POINTS: the gradient of the offset along each
// dimension, then that of the modulation.
template <int D, class Call, class C, class O>
void slopes(const Call& call, const Tile<O>& tile, int64_t tap, int64_t group_tap, const C* dots,
            C* gradients) {
  constexpr int corners = 1 << D, lanes = VectorOf<O>::lanes;
  const DeformShape& shape = call.shape;
  O shifts[D][POINTS];
  C modulation[POINTS], by_corner[corners * POINTS];
  transpose(dots, corners, by_corner, POINTS, tile.count, corners);
  read_shifts<D>(call.offset, tile, group_tap, shifts);
  read_modulation(call.modulation, tile, group_tap, modulation);
  int64_t steps[3];
  tap_steps(shape, tap, steps);
  typedef Wide<C, lanes> V;
  for (int64_t p = 0; p < tile.count; p += lanes) {
    V share[D][2], sums[D + 1];
#pragma GCC unroll 4
    for (int d = 0; d <= D; ++d) sums[d] = V{};
    decltype(V{} != V{}) outside[D][2];
    for (int d = 0; d < D; ++d) {
      const Vector<O> start = load(tile.start[d] + p) + static_cast<O>(steps[d]);
      const Axis<O> axis(load(shifts[d] + p) + start, shape.length[d]);
      for (int u = 0; u < 2; ++u) {
        share[d][u] = __builtin_convertvector(axis.share[u], V);
        outside[d][u] = __builtin_convertvector(axis.outside[u], decltype(V{} != V{}));
      }
    }
    const V factor = get<lanes>(modulation + p);
#pragma GCC unroll 8
    for (int j = 0; j < corners; ++j) {
      const V dot = get<lanes>(by_corner + j * POINTS + p);
      V whole = dot;
#pragma GCC unroll 3
      for (int d = 0; d < D; ++d) {
        whole *= share[d][upper<D>(j, d)];
        V slope = dot * factor;
#pragma GCC unroll 3
        for (int e = 0; e < D; ++e)
          if (e != d) slope *= share[e][upper<D>(j, e)];
        slope = outside[d][upper<D>(j, d)] ? V{} : slope;
        sums[d] = upper<D>(j, d) ? sums[d] + slope : sums[d] - slope;
      }
      sums[D] += whole;
    }
    for (int d = 0; d <= D; ++d) put<lanes>(gradients + d * POINTS + p, sums[d]);
  }
}

// A row of a gradient, where its tensor has it.
template <class C, class T>
DYNACONV_INLINE void write_row(const C* from, const Planes<T>& to, int64_t sample, int64_t channel,
                               int64_t first, int64_t count) {
  T* at = to.data + sample * to.sample + channel * to.channel + first * to.position;
  for (int64_t p = 0; p < count; ++p) at[p * to.position] = narrow<T>(from[p]);
}

template <int D, class Call, class C>
DYNACONV_INLINE void write_gradients(const Call& call, int64_t sample, int64_t group_tap,
                                     int64_t first, int64_t count, const C* from, int64_t row) {
  if (call.grad_offset.data)
    for (int d = 0; d < D; ++d) {
      const int64_t channel = group_tap * D + d;
      write_row(from + d * row, call.grad_offset, sample, channel, first, count);
    }
  if (call.grad_modulation.data)
    write_row(from + D * row, call.grad_modulation, sample, group_tap, first, count);
}

// The gradients of offset and modulation from the dots of a tile's offset groups; or, where several
// tasks have parts of the channels, this one's parts of them.
template <int D, class Call, class C, class O>
void finish_tile(const Call& call, const Tile<O>& tile, Range groups, int64_t range,
                 const C* dots) {
  const DeformShape& shape = call.shape;
  C gradients[(D + 1) * POINTS];
  for (int64_t g = groups.begin; g < groups.end; ++g)
    for (int64_t t = 0; t < shape.taps; ++t) {
      const int64_t group_tap = g * shape.taps + t;
      const C* mine = dots + ((g - groups.begin) * shape.taps + t) * (1 << D) * POINTS;
      slopes<D>(call, tile, t, group_tap, mine, gradients);
      if (!call.parts) {
        write_gradients<D>(call, tile.sample, group_tap, tile.first, tile.count, gradients, POINTS);
        continue;
      }
      const int64_t sample = range * shape.batch + tile.sample;
      const int64_t row = sample * shape.offset_groups * shape.taps + group_tap;
      for (int d = 0; d <= D; ++d)
        convert(gradients + d * POINTS,
                call.parts + (row * (D + 1) + d) * shape.positions + tile.first, tile.count);
    }
}

template <class C>
void clear_rows(const Rows<C>& rows, int64_t sample, int64_t points, Range channels) {
  for (int64_t i = 0; i < points; ++i) {
    C* row = rows.data + sample * rows.sample + i * rows.row;
    for (int64_t c = channels.begin; c < channels.end; ++c) row[c] = 0;
  }
}

// The slices of one of `ranges` tasks, and their channels.
DYNACONV_INLINE Range slices_of(const DeformShape& shape, const DeformCut& cut, int64_t range) {
  const int64_t slices = ceil_div(shape.channels, cut.slice);
  return {slices * range / cut.ranges, slices * (range + 1) / cut.ranges};
}
DYNACONV_INLINE Range channels_of(const DeformShape& shape, const DeformCut& cut, Range slices) {
  return {slices.begin * cut.slice, least(slices.end * cut.slice, shape.channels)};
}

template <int D, class T, class C, class O>
void backward_data(const DeformBackward<T, C, O>& call, int64_t begin, int64_t end, C* scratch) {
  const DeformShape& shape = call.shape;
  const DeformCut& cut = call.cut;
  const bool input = call.grad_input.data;
  const bool offset = call.grad_offset.data || call.grad_modulation.data;
  Pieces<C> pieces{scratch};
  C *columns = pieces.take(POINTS * ROW), *grad = pieces.take(POINTS * ROW);
  const int64_t most_groups = least(shape.offset_groups, cut.slice / shape.offset_channels + 2);
  Plan<D, C, O> plan(pieces, most_groups, cut.taps);
  C* dots = pieces.next;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / cut.ranges, range = task % cut.ranges;
    const Range slices = slices_of(shape, cut, range), all = channels_of(shape, cut, slices);
    const Range groups = groups_of(all, shape.offset_channels);
    if (input) clear_rows(call.grad_input, sample, shape.inputs, all);
    for (int64_t i = 0; i < ceil_div(shape.positions, cut.tile); ++i) {
      const Tile<O> tile(shape, cut.tile, sample, i);
      plan.tile = nullptr;
      if (offset) memset(dots, 0, groups.count() * shape.taps * (1 << D) * POINTS * sizeof(C));
      for_chunks(shape, cut, slices, [&](Range channels, Range taps) {
        plan.make(call, tile, groups_of(channels, shape.offset_channels), taps);
        for_blocks<C>(tile.count, [&](Range points) {
          columns_gradient(call, tile, points, channels, taps, grad, columns);
          const auto run = !offset ? spread<D, true, false, C, DeformBackward<T, C, O>, O>
                           : input ? spread<D, true, true, C, DeformBackward<T, C, O>, O>
                                   : spread<D, false, true, C, DeformBackward<T, C, O>, O>;
          run(call, plan, tile, points, channels, columns, dots, groups.begin);
        });
      });
      if (offset) finish_tile<D>(call, tile, groups, range, dots);
    }
  }
}

template <int D, class T, class C, class O>
void add_parts(const DeformBackward<T, C, O>& call, int64_t begin, int64_t end) {
  const DeformShape& shape = call.shape;
  const int64_t rows = shape.offset_groups * shape.taps;
  C sums[(D + 1) * POINTS];
  for (int64_t task = begin; task < end; ++task)
    for (int64_t first = 0; first < shape.positions; first += POINTS) {
      const int64_t count = least(POINTS, shape.positions - first);
      const int64_t sample = task / rows, group_tap = task % rows, group = group_tap / shape.taps;
      for (int64_t i = 0; i < (D + 1) * POINTS; ++i) sums[i] = 0;
      for (int64_t range = 0; range < call.cut.ranges; ++range) {
        const Range slices = slices_of(shape, call.cut, range);
        const Range channels = channels_of(shape, call.cut, slices);
        if (shared(channels, group, shape.offset_channels).count() <= 0) continue;
        const int64_t row = (range * shape.batch + sample) * rows + group_tap;
        for (int d = 0; d <= D; ++d)
          for (int64_t p = 0; p < count; ++p)
            sums[d * POINTS + p] += call.parts[(row * (D + 1) + d) * shape.positions + first + p];
      }
      write_gradients<D>(call, sample, group_tap, first, count, sums, POINTS);
    }
}

// The gradient of a group's outputs at some positions as the right side of a product over them.
template <class Call, class C>
Packed<const C> pack_grad(const Call& call, int64_t sample, int64_t first, int64_t count,
                          int64_t group, C* to) {
  constexpr int lanes = Block<C>::lanes;
  const int64_t columns = call.shape.group_out;
  const Packed<C> packed{to, count, columns};
  const C* from = call.grad.data + sample * call.grad.sample + first * call.grad.row +
                  group * columns;
  for (int64_t n = 0; n < columns; n += lanes)
    for (int64_t p = 0; p < count; ++p)
      store(packed.at(p, n), load_first(from + p * call.grad.row + n, columns - n));
  return {to, count, columns};
}

// Adds to sums[tap, channel, output of the group] what one tile gives.
template <class C, class Call>
void add_products(const Call& call, int64_t sample, int64_t first, int64_t count, Range channels,
                  Range taps, const C* columns, C* grad, C* sums) {
  const DeformShape& shape = call.shape;
  const int64_t row = padded(shape.group_out);
  const Range groups = groups_of(channels, shape.group_in);
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const Range mine = shared(channels, g, shape.group_in);
    const Packed<const C> right = pack_grad(call, sample, first, count, g, grad);
    const bool whole = mine == channels;  // then taps follow each other without a gap
    for (int64_t t = 0; t < (whole ? 1 : taps.count()); ++t) {
      const int64_t at = t * channels.count() + mine.begin - channels.begin;
      multiply<C, 1, ROW>(mine.count() * (whole ? taps.count() : 1), columns + at, {1, count, 0},
                          right, 0, sums + at * row, row, true);
    }
  }
}

template <class T, class C>
void write_weight(const DeformShape& shape, Range channels, Range taps, const C* sums,
                  T* grad_weight) {
  const int64_t row = padded(shape.group_out);
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const int64_t group = c / shape.group_in, channel = c % shape.group_in;
    for (int64_t o = 0; o < shape.group_out; ++o) {
      T* to = grad_weight + ((group * shape.group_out + o) * shape.group_in + channel) * shape.taps;
      for (int64_t t = taps.begin; t < taps.end; ++t)
        to[t] = narrow<T>(
            sums[((t - taps.begin) * channels.count() + c - channels.begin) * row + o]);
    }
  }
}

template <int D, class T, class C, class O>
void backward_weight(const DeformBackward<T, C, O>& call, int64_t begin, int64_t end, C* scratch) {
  const DeformShape& shape = call.shape;
  const DeformCut& cut = call.cut;
  const int64_t chunks = ceil_div(shape.taps, cut.taps), row = padded(shape.group_out);
  Pieces<C> pieces{scratch};
  C *columns = pieces.take(POINTS * ROW), *grad = pieces.take(POINTS * row);
  C* sums = pieces.take(cut.slice * cut.taps * row);
  const int64_t most_groups = least(shape.offset_groups, cut.slice / shape.offset_channels + 2);
  Plan<D, C, O> plan(pieces, most_groups, cut.taps);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t s = task / chunks, t = task % chunks * cut.taps;
    const Range channels = {s * cut.slice, least((s + 1) * cut.slice, shape.channels)};
    const Range taps = {t, least(t + cut.taps, shape.taps)};
    memset(sums, 0, channels.count() * taps.count() * row * sizeof(C));
    for (int64_t n = 0; n < shape.batch; ++n)
      for (int64_t i = 0; i < ceil_div(shape.positions, cut.tile); ++i) {
        const Tile<O> tile(shape, cut.tile, n, i);
        plan.tile = nullptr;
        plan.make(call, tile, groups_of(channels, shape.offset_channels), taps);
        sample(shape, plan, tile, call.input, {0, tile.count}, channels, columns);
        add_products(call, n, tile.first, tile.count, channels, taps, columns, grad, sums);
      }
    write_weight(shape, channels, taps, sums, call.grad_weight);
  }
}

}  // namespace

template <class T, class C>
void planes_to_rows(Planes<const T> from, Rows<C> to, int64_t channels, int64_t positions,
                    int64_t step, int64_t begin, int64_t end) {
  const int64_t parts = ceil_div(positions, step);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / parts, first = task % parts * step;
    const int64_t count = least(step, positions - first);
    const T* at = from.data + n * from.sample + first * from.position;
    C* rows = to.data + n * to.sample + first * to.row;
    if (from.position == 1) {
      transpose(at, from.channel, rows, to.row, channels, count);
      continue;
    }
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < channels; ++c)
        rows[p * to.row + c] = widen(at[p * from.position + c * from.channel]);
  }
}

template <class T, class C>
void rows_to_planes(Rows<const C> from, Planes<T> to, int64_t channels, int64_t positions,
                    int64_t step, int64_t begin, int64_t end) {
  const int64_t parts = ceil_div(positions, step);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / parts, first = task % parts * step;
    const C* rows = from.data + n * from.sample + first * from.row;
    write_tile(rows, from.row, to, n, first, least(step, positions - first), channels);
  }
}

template <class T, class C>
void pack_forward(const DeformShape& shape, const DeformCut& cut, const T* weight, C* packed,
                  int64_t begin, int64_t end) {
  const int64_t blocks = ceil_div(shape.group_out, DEFORM_BLOCK);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t g = task / blocks, first = task % blocks * DEFORM_BLOCK;
    const Packed<const C> group = packed_group(shape, static_cast<const C*>(packed), g);
    const int64_t last = least(first + DEFORM_BLOCK, padded(shape.group_out));
    int64_t k = 0;
    const int64_t start = g * shape.group_in;
    for (int64_t c0 = start; c0 < start + shape.group_in;) {
      const int64_t c1 = least((c0 / cut.slice + 1) * cut.slice, start + shape.group_in);
      for (int64_t t = 0; t < shape.taps; ++t)
        for (int64_t c = c0; c < c1; ++c, ++k)
          for (int64_t o = first; o < last; ++o) {
            const T* from = weight + ((start / shape.group_in * shape.group_out + o) *
                                          shape.group_in + c - start) * shape.taps + t;
            if (o / Block<C>::panel * Block<C>::panel >= shape.group_out) continue;
            if (o % Block<C>::panel >= group.width(o)) continue;
            *const_cast<C*>(group.at(k, o)) = o < shape.group_out ? widen(*from) : 0;
          }
      c0 = c1;
    }
  }
}

template <class T, class C>
void pack_backward(const DeformShape& shape, const DeformCut& cut, const T* weight, C* packed,
                   int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t s = task / shape.taps, t = task % shape.taps;
    const Range channels = {s * cut.slice, least((s + 1) * cut.slice, shape.channels)};
    const Range groups = groups_of(channels, shape.group_in);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const Range mine = shared(channels, g, shape.group_in);
      const Packed<C> part = packed_part(shape, cut, packed, s, g, t, mine.count());
      for (int64_t o = 0; o < shape.group_out; ++o) {
        const T* from = weight + ((g * shape.group_out + o) * shape.group_in + mine.begin -
                                  g * shape.group_in) * shape.taps + t;
        const int64_t width = ceil_div(mine.count(), Block<C>::lanes) * Block<C>::lanes;
        for (int64_t c = 0; c < width; ++c)
          *part.at(o, c) = c < mine.count() ? widen(from[c * shape.taps]) : 0;
      }
    }
  }
}

template <class T, class C, class O>
void deform_forward(const DeformForward<T, C, O>& call, int64_t begin, int64_t end, C* scratch) {
  switch (call.shape.rank) {
    case 1: return forward<1>(call, begin, end, scratch);
    case 2: return forward<2>(call, begin, end, scratch);
    default: return forward<3>(call, begin, end, scratch);
  }
}

template <class T, class C, class O>
void deform_backward_data(const DeformBackward<T, C, O>& call, int64_t begin, int64_t end,
                          C* scratch) {
  switch (call.shape.rank) {
    case 1: return backward_data<1>(call, begin, end, scratch);
    case 2: return backward_data<2>(call, begin, end, scratch);
    default: return backward_data<3>(call, begin, end, scratch);
  }
}

template <class T, class C, class O>
void deform_add_parts(const DeformBackward<T, C, O>& call, int64_t begin, int64_t end) {
  switch (call.shape.rank) {
    case 1: return add_parts<1>(call, begin, end);
    case 2: return add_parts<2>(call, begin, end);
    default: return add_parts<3>(call, begin, end);
  }
}

template <class T, class C, class O>
void deform_backward_weight(const DeformBackward<T, C, O>& call, int64_t begin, int64_t end,
                            C* scratch) {
  switch (call.shape.rank) {
    case 1: return backward_weight<1>(call, begin, end, scratch);
    case 2: return backward_weight<2>(call, begin, end, scratch);
    default: return backward_weight<3>(call, begin, end, scratch);
  }
}

#define DYNACONV_OF_DATA(T, C)                                                                   \
  template void planes_to_rows(Planes<const T>, Rows<C>, int64_t, int64_t, int64_t, int64_t,     \
                               int64_t);                                                         \
  template void rows_to_planes(Rows<const C>, Planes<T>, int64_t, int64_t, int64_t, int64_t,     \
                               int64_t);                                                         \
  template void pack_forward(const DeformShape&, const DeformCut&, const T*, C*, int64_t,        \
                             int64_t);                                                           \
  template void pack_backward(const DeformShape&, const DeformCut&, const T*, C*, int64_t,       \
                              int64_t);
#define DYNACONV_OF_CALL(T, C, O)                                                                \
  template void deform_forward(const DeformForward<T, C, O>&, int64_t, int64_t, C*);             \
  template void deform_backward_data(const DeformBackward<T, C, O>&, int64_t, int64_t, C*);      \
  template void deform_add_parts(const DeformBackward<T, C, O>&, int64_t, int64_t);              \
  template void deform_backward_weight(const DeformBackward<T, C, O>&, int64_t, int64_t, C*);
DYNACONV_OF_DATA(float, float)
DYNACONV_OF_DATA(double, double)
DYNACONV_OF_DATA(bfloat16, float)
DYNACONV_OF_CALL(float, float, float)
DYNACONV_OF_CALL(double, double, double)
DYNACONV_OF_CALL(double, double, float)
DYNACONV_OF_CALL(bfloat16, float, float)

}  // namespace DYNACONV_ISA
}  // namespace dynaconv
