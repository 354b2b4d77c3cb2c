// Every product here is one of a panel of weights, lanes side by side, with numbers that are
// broadcast: the innermost loop keeps a tile of sums in registers (`multiply`).
//
// The output and the input's gradient have output channels as lanes: a few input channels' weights
// are brought into that order once, in a piece that stays in the cache, while they are read from
// memory for the first and only time, or while they are mixed. The kernels' gradient has (input
// channel, tap) as lanes, as it lies in memory, and sums over the positions.
#include "../conv_per_sample.h"

#include "../move.h"

namespace dynaconv {
namespace DYNACONV_ISA {
namespace {

// Positions in a tile, with two vectors of channels and with four: what the registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kLong = 14, kShort = 7;
#else
constexpr int kLong = 6, kShort = 3;
#endif
// Bytes of a piece of weights, of the sums of the samples that share mixed ones, and of the
// window's columns that are held at once.
constexpr int64_t kPiece = 36 << 10, kSums = 256 << 10, kColumns = 384 << 10;
// Samples at most that are mixed for at a time, and together.
constexpr int64_t kSlice = 32, kTogether = 4;

DYNACONV_INLINE int64_t down(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Transposing -------------------------------------------------------------------------------------

// The first `columns` columns of as many rows as there are lanes: to[column][lane].
template <class S, int columns, class T = Compute<S>>
DYNACONV_INLINE void turn_square(const S* from, int64_t row_step, T* to, int64_t to_step) {
  constexpr int n = VectorOf<T>::lanes;
  Vector<T> square[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) square[i] = load_first(from + i * row_step, n);
  transpose<T>(square);
#pragma GCC unroll 16
  for (int i = 0; i < (columns < n ? columns : n); ++i) store(to + i * to_step, square[i]);
}

// to[column][lane] = from[lane][column] for up to as many rows as there are lanes, zero beyond.
// Nothing is read at or after `end`.
template <class S, class T = Compute<S>>
void turn(const S* from, int64_t row_step, int64_t rows, int64_t columns, const S* end, T* to,
          int64_t to_step) {
  constexpr int n = VectorOf<T>::lanes;
  for (int64_t c = 0; c < columns; c += n, from += n, to += n * to_step) {
    const int64_t count = least<int64_t>(n, columns - c);
    const bool square = rows == n && from + (n - 1) * row_step + n <= end;
    if (square && count == n)
      turn_square<S, n>(from, row_step, to, to_step);
    else if (square && count == 9)
      turn_square<S, 9>(from, row_step, to, to_step);
    else if (square && count == 5)
      turn_square<S, 5>(from, row_step, to, to_step);
    else if (square && count == 3)
      turn_square<S, 3>(from, row_step, to, to_step);
    else
      for (int64_t i = 0; i < count; ++i)
        for (int64_t lane = 0; lane < n; ++lane)
          to[i * to_step + lane] = lane < rows ? widen(from[lane * row_step + i]) : T(0);
  }
}

// Rows of the input -------------------------------------------------------------------------------

// The last dimension with zeros around it, so that no tap leaves it; positions that are `phases`
// apart lie side by side. The dimensions before it have no zeros: their taps outside are left out.
struct Rows {
  int64_t length, first;  // of one phase; the shift of its first number
  int64_t phases, plane;  // of what is read; numbers in a channel
  int64_t out_phases, width;  // positions written that are this far apart make a row of their own
  int64_t count, positions;   // rows and positions written
};

Rows rows_of(const Axis* axes, bool transposed) {
  const Axis& x = axes[2];
  const int64_t reach = (x.taps - 1) * x.dilation;
  Rows rows;
  rows.phases = transposed ? 1 : x.stride;
  rows.out_phases = transposed ? x.stride : 1;
  rows.width = ceil_div(x.to, rows.out_phases);
  rows.first = transposed ? down(x.padding - reach, x.stride) : down(-x.padding, x.stride);
  const int64_t last = transposed ? down(x.stride - 1 + x.padding, x.stride)
                                  : down(reach - x.padding, x.stride);
  rows.length = rows.width + last - rows.first;
  rows.plane = axes[0].from * axes[1].from * rows.phases * rows.length;
  rows.count = axes[0].to * axes[1].to * rows.out_phases;
  rows.positions = axes[0].to * axes[1].to * x.to;
  return rows;
}

// Positions in a row of this phase.
DYNACONV_INLINE int64_t width_of(const Axis& x, const Rows& rows, int64_t phase) {
  return phase < x.to ? ceil_div(x.to - phase, rows.out_phases) : 0;
}

template <class S>
void spread(const S* from, const int64_t* strides, int64_t channels, const Axis* axes,
            const Rows& rows, Compute<S>* to) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t z = 0; z < axes[0].from; ++z)
      for (int64_t y = 0; y < axes[1].from; ++y) {
        const S* const line = from + c * strides[0] + z * strides[1] + y * strides[2];
        for (int64_t phase = 0; phase < rows.phases; ++phase, to += rows.length) {
          const int64_t real = ceil_div(most<int64_t>(axes[2].from - phase, 0), rows.phases);
          const int64_t begin = least(most<int64_t>(-rows.first, 0), rows.length);
          const int64_t end = most(least(real - rows.first, rows.length), begin);
          const S* const start = line + phase * strides[3];
          const int64_t step = rows.phases * strides[3];
          for (int64_t i = 0; i < begin; ++i) to[i] = 0;
          if (step == 1)
            for (int64_t i = begin; i < end; ++i) to[i] = widen(start[i + rows.first]);
          else
            for (int64_t i = begin; i < end; ++i) to[i] = widen(start[(i + rows.first) * step]);
          for (int64_t i = end; i < rows.length; ++i) to[i] = 0;
        }
      }
}

// Where a tap of position q reads along a dimension, -1 for nowhere.
DYNACONV_INLINE int64_t at(const Axis& a, bool transposed, int64_t q, int64_t tap) {
  if (!transposed) {
    const int64_t p = q * a.stride + tap * a.dilation - a.padding;
    return p < a.from ? p : -1;
  }
  const int64_t p = q + a.padding - tap * a.dilation;
  return p % a.stride == 0 && p / a.stride < a.from ? p / a.stride : -1;
}

// For each row written and each tap, where in a channel its first number lies; negative: nowhere.
void locate(const Axis* axes, bool transposed, const Rows& rows, int64_t* where) {
  const Axis &z = axes[0], &y = axes[1], &x = axes[2];
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t phase = row % rows.out_phases, line = row / rows.out_phases;
    for (int64_t kz = 0; kz < z.taps; ++kz)
      for (int64_t ky = 0; ky < y.taps; ++ky)
        for (int64_t kx = 0; kx < x.taps; ++kx, ++where) {
          const int64_t from_z = at(z, transposed, line / y.to, kz);
          const int64_t from_y = at(y, transposed, line % y.to, ky);
          const int64_t t = transposed ? phase + x.padding - kx * x.dilation
                                       : kx * x.dilation - x.padding;
          const int64_t shift = down(t, x.stride), rest = t - shift * x.stride;
          const bool nowhere = from_z < 0 || from_y < 0 || (transposed && rest);
          const int64_t line_from = (from_z * y.from + from_y) * rows.phases + rest;
          *where = nowhere ? -1 : line_from * rows.length + shift - rows.first;
        }
  }
}

// The tile of sums --------------------------------------------------------------------------------

// Asks for what will be read next, a few lines at a time, while the work at hand goes on.
struct Ahead {
  const char* from;
  int64_t rows, lines, step;
  int64_t row = 0, line = 0;

  void ask(int64_t count) {
    for (; count && row < rows; --count) {
      __builtin_prefetch(from + row * step + line * 64, 0, 2);
      if (++line == lines) line = 0, ++row;
    }
  }
};

struct Tap {
  int64_t input, weight;
};

// sum[p][lanes] (+)= sum over steps and taps of input[step, tap][p] * weight[step, tap][lanes].
template <class T>
struct Tile {
  const T* input;
  const T* weight;
  int64_t input_step, weight_step, steps;
  const Tap* taps;
  int64_t count;
  T* sum;
  int64_t sum_step;
  bool fresh;  // from zero, not from what is there
  Ahead* ahead = nullptr;
  int64_t lines = 0;  // to ask for at each step
};

template <class T, int vectors, int positions>
void multiply(const Tile<T>& tile) {
  constexpr int n = VectorOf<T>::lanes;
  Vector<T> sum[positions][vectors];
#pragma GCC unroll 16
  for (int p = 0; p < positions; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      sum[p][v] = tile.fresh ? Vector<T>{} : load(tile.sum + p * tile.sum_step + v * n);
  const T *input = tile.input, *weight = tile.weight;
  for (int64_t step = tile.steps; step; --step) {
    if (tile.ahead) tile.ahead->ask(tile.lines);
    for (const Tap *tap = tile.taps, *end = tap + tile.count; tap != end; ++tap) {
      const T *x = input + tap->input, *w = weight + tap->weight;
      Vector<T> column[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) column[v] = load(w + v * n);
#pragma GCC unroll 16
      for (int p = 0; p < positions; ++p) {
        const Vector<T> value = x[p] - Vector<T>{};  // unlike x + 0 the same for -0
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[p][v] += value * column[v];
      }
    }
    input += tile.input_step;
    weight += tile.weight_step;
  }
#pragma GCC unroll 16
  for (int p = 0; p < positions; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(tile.sum + p * tile.sum_step + v * n, sum[p][v]);
}

template <class T, int vectors, int positions>
DYNACONV_INLINE void multiply_few(const Tile<T>& tile, int64_t count) {
  if constexpr (positions == 1)
    multiply<T, vectors, 1>(tile);
  else if (count == positions)
    multiply<T, vectors, positions>(tile);
  else
    multiply_few<T, vectors, positions - 1>(tile, count);
}

// `count` positions at most kLong with two vectors, kShort with four.
template <class T>
DYNACONV_INLINE void multiply(const Tile<T>& tile, int64_t vectors, int64_t count) {
  if (vectors == 4)
    multiply_few<T, 4, kShort>(tile, count);
  else
    multiply_few<T, 2, kLong>(tile, count);
}

// `total` in equal parts of at most `most`: where part i begins.
DYNACONV_INLINE int64_t part(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

// Mixing ------------------------------------------------------------------------------------------

// to[g] = sum_e coefficients[g][e] * experts[e], each of `count` numbers: `row` of them for each
// tap in turn, whose coefficients are next to each other where there are several `kinds`.
template <class T, int group>
void mix(const T* experts, int64_t count, int64_t row, int64_t many, int64_t kinds,
         const T* coefficients, T* to) {
  constexpr int n = VectorOf<T>::lanes;
  if (kinds == 1) row = count;
  for (int64_t first = 0, tap = 0; first < count; first += row, tap = (tap + 1) % kinds)
    for (int64_t i = first; i < first + row; i += n) {
      Vector<T> sum[group] = {};
      for (int64_t e = 0; e < many; ++e) {
        const Vector<T> expert = load(experts + e * count + i);
#pragma GCC unroll 4
        for (int g = 0; g < group; ++g)
          sum[g] += (coefficients[(g * many + e) * kinds + tap] - Vector<T>{}) * expert;
      }
#pragma GCC unroll 4
      for (int g = 0; g < group; ++g) store(to + g * count + i, sum[g]);
    }
}

// The output, and the input's gradient ------------------------------------------------------------

// How a ConvPerSample is cut: blocks of `width` channels written, pieces of `chunk` channels read,
// slices of samples that share mixed weights (one sample where each has its own).
struct Plan {
  Rows rows;
  int64_t vectors, width, blocks, chunk, pieces, slice, slices;
  int64_t inputs, sums, piece, where;  // numbers: a sample's input, its sums, a piece; places

  Plan(const ConvPerSample& job, int64_t lanes, int64_t bytes)
      : rows(rows_of(job.axes, job.transposed)) {
    vectors = rows.width <= kShort && job.to_channels > 2 * lanes ? 4 : 2;
    width = vectors * lanes;
    blocks = ceil_div(job.to_channels, width);
    const int64_t most_channels = most<int64_t>(kPiece / (width * job.taps * bytes), 1);
    pieces = ceil_div(job.from_channels, most_channels);
    chunk = ceil_div(job.from_channels, pieces);
    sums = rows.positions * width;
    const int64_t fit = most<int64_t>(kSums / (sums * bytes), 1);
    slice = job.experts ? least(least(fit, kSlice), job.batch) : 1;
    slices = ceil_div(job.batch, slice);
    slice = ceil_div(job.batch, slices);
    inputs = ceil_div(job.from_channels * rows.plane, lanes) * lanes;
    piece = chunk * job.taps * width;
    where = rows.count * job.taps;
  }
  int64_t scratch(const ConvPerSample& job, int64_t bytes) const {
    const int64_t weights = job.experts ? (job.experts + kTogether) * piece : piece;
    const int64_t places = ceil_div((where + 2 * job.taps) * 8, bytes);
    const int64_t coefficients = kTogether * job.experts * most<int64_t>(job.kinds, 1);
    return slice * (inputs + sums) + weights + coefficients + places + 64;
  }
};

template <class S>
struct Convolution {
  typedef Compute<S> T;
  static constexpr int n = VectorOf<T>::lanes;
  const ConvPerSample& job;
  const Plan plan;
  T *inputs, *sums, *packed, *experts, *coefficients;
  int64_t* where;
  Tap* taps;
  int64_t held = -1;  // the slice whose inputs are at hand

  Convolution(const ConvPerSample& job, void* scratch) : job(job), plan(job, n, sizeof(T)) {
    inputs = static_cast<T*>(scratch);
    sums = inputs + plan.slice * plan.inputs;
    packed = sums + plan.slice * plan.sums;
    experts = packed + (job.experts ? kTogether : 1) * plan.piece;
    coefficients = experts + job.experts * plan.piece;
    const int64_t numbers = job.experts ? kTogether * job.experts * job.kinds : 0;
    where = reinterpret_cast<int64_t*>(coefficients +
                                       ceil_div(numbers * sizeof(T), 8) * 8 / sizeof(T));
    taps = reinterpret_cast<Tap*>(where + plan.where);
    locate(job.axes, job.transposed, plan.rows, where);
  }

  void task(int64_t index) {
    const int64_t slice = index / plan.blocks, block = index % plan.blocks;
    const int64_t first = slice * plan.slice;
    const int64_t samples = least(plan.slice, job.batch - first);
    if (slice != held) {
      for (int64_t i = 0; i < samples; ++i)
        spread(static_cast<const S*>(job.input) + (first + i) * job.input_strides[0],
               job.input_strides + 1, job.from_channels, job.axes, plan.rows,
               inputs + i * plan.inputs);
      held = slice;
    }
    for (int64_t piece = 0; piece < plan.pieces; ++piece) {
      const int64_t begin = part(job.from_channels, plan.pieces, piece);
      const int64_t count = part(job.from_channels, plan.pieces, piece + 1) - begin;
      if (job.experts)
        mixed(first, samples, block, begin, count);
      else
        own(first, block, begin, count);
    }
    for (int64_t i = 0; i < samples; ++i) write(first + i, block, sums + i * plan.sums);
  }

  // A piece of the sample's own kernel.
  void own(int64_t sample, int64_t block, int64_t begin, int64_t count) {
    pack(sample, block, begin, count, packed);
    Ahead ahead = following(sample, block, begin + count);
    accumulate(inputs, packed, begin, count, sums, &ahead);
  }

  // A piece of the experts, mixed for a few samples at a time.
  void mixed(int64_t first, int64_t samples, int64_t block, int64_t begin, int64_t count) {
    const int64_t numbers = count * job.taps * plan.width;
    for (int64_t e = 0; e < job.experts; ++e) pack(e, block, begin, count, experts + e * numbers);
    for (int64_t i = 0; i < samples; i += kTogether) {
      const int64_t together = least(kTogether, samples - i);
      const int64_t each = job.experts * job.kinds;
      const S* const given = static_cast<const S*>(job.coefficients) + (first + i) * each;
      for (int64_t j = 0; j < together * each; ++j) coefficients[j] = widen(given[j]);
      if (together == kTogether)
        mix<T, kTogether>(experts, numbers, plan.width, job.experts, job.kinds, coefficients,
                          packed);
      else
        for (int64_t g = 0; g < together; ++g)
          mix<T, 1>(experts, numbers, plan.width, job.experts, job.kinds, coefficients + g * each,
                    packed + g * numbers);
      // One after the other, the experts' next pieces.
      const int64_t expert = i / kTogether;
      Ahead ahead = following(expert < job.experts ? expert : 0, block, begin + count);
      for (int64_t g = 0; g < together; ++g)
        accumulate(inputs + (i + g) * plan.inputs, packed + g * numbers, begin, count,
                   sums + (i + g) * plan.sums, expert < job.experts && !g ? &ahead : nullptr);
    }
  }

  // Lanes of `block` from kernel `index`, channels read from `begin`: to[channel, tap][lane].
  void pack(int64_t index, int64_t block, int64_t begin, int64_t count, T* to) {
    const int64_t taps = job.taps, all = job.to_channels * job.from_channels * taps;
    const S* const kernels = static_cast<const S*>(job.weight);
    const S* const kernel = kernels + index * all;
    const S* const end = kernels + (job.experts ? job.experts : job.batch) * all;
    for (int64_t lane = 0; lane < plan.width; lane += n) {
      const int64_t channel = block * plan.width + lane;
      const int64_t rows = least<int64_t>(n, job.to_channels - channel);
      if (!job.transposed) {
        const S* const from = kernel + (channel * job.from_channels + begin) * taps;
        turn(from, job.from_channels * taps, rows, count * taps, end, to + lane, plan.width);
        continue;
      }
      for (int64_t r = 0; r < count; ++r)
        turn(kernel + ((begin + r) * job.to_channels + channel) * taps, taps, rows, taps, end,
             to + r * taps * plan.width + lane, plan.width);
    }
  }

  // The piece of weights that comes after the one before `begin`.
  Ahead following(int64_t index, int64_t block, int64_t begin) const {
    const int64_t taps = job.taps;
    if (begin == job.from_channels) begin = 0, ++block;
    if (block == plan.blocks) block = 0, index += job.experts ? 0 : 1;
    if (index == job.batch && !job.experts) return {nullptr, 0, 0, 0};
    const S* const kernel =
        static_cast<const S*>(job.weight) + index * job.to_channels * job.from_channels * taps;
    const int64_t channel = block * plan.width;
    const int64_t channels = least(plan.width, job.to_channels - channel);
    const int64_t count = least(plan.chunk, job.from_channels - begin);
    const int64_t rows = job.transposed ? count : channels, run = job.transposed ? channels : count;
    const int64_t step = taps * (job.transposed ? job.to_channels : job.from_channels);
    const int64_t outer = job.transposed ? begin : channel;
    const int64_t inner = job.transposed ? channel : begin;
    const int64_t offset = outer * step + inner * taps;
    return {reinterpret_cast<const char*>(kernel + offset), rows,
            ceil_div(run * taps * sizeof(S), 64),
            step * static_cast<int64_t>(sizeof(S))};
  }

  // Adds what `count` channels from `begin` give to all positions of a sample.
  void accumulate(const T* input, const T* weight, int64_t begin, int64_t count, T* sum,
                  Ahead* ahead) {
    const int64_t longest = plan.vectors == 4 ? kShort : kLong;
    const int64_t tiles = ceil_div(plan.rows.width, longest) * plan.rows.count;
    const int64_t lines = ahead ? ceil_div(ahead->rows * ahead->lines, tiles * count) : 0;
    for (int64_t row = 0; row < plan.rows.count; ++row) {
      const int64_t width = width_of(job.axes[2], plan.rows, row % plan.rows.out_phases);
      int64_t used = 0;
      for (int64_t t = 0; t < job.taps; ++t) {
        const int64_t place = where[row * job.taps + t];
        if (place >= 0) taps[used++] = {place, t * plan.width};
      }
      const int64_t parts = ceil_div(width, longest);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t start = part(width, parts, i), positions = part(width, parts, i + 1) - start;
        const Tile<T> tile = {input + begin * plan.rows.plane + start,
                              weight,
                              plan.rows.plane,
                              job.taps * plan.width,
                              count,
                              taps,
                              used,
                              sum,
                              plan.width,
                              begin == 0,
                              ahead,
                              lines};
        multiply<T>(tile, plan.vectors, positions);
        sum += positions * plan.width;
      }
    }
  }

  void write(int64_t sample, int64_t block, const T* sum) const {
    const int64_t* const steps = job.output_strides;
    const int64_t first = block * plan.width, channels = least(plan.width, job.to_channels - first);
    S* const output = static_cast<S*>(job.output) + sample * steps[0] + first * steps[1];
    const S* const bias =
        job.bias ? static_cast<const S*>(job.bias) + sample * job.bias_strides[0] +
                       first * job.bias_strides[1]
                 : nullptr;
    const bool channels_inside = steps[1] == 1;
    // Channels last: all channels at once; otherwise each channel over all positions.
    const int64_t stride = channels_inside ? channels : 1;
    for (int64_t c = 0; c < channels; c += stride) {
      const T* from = sum + c;
      for (int64_t row = 0; row < plan.rows.count; ++row) {
        const int64_t phase = row % plan.rows.out_phases, line = row / plan.rows.out_phases;
        const int64_t width = width_of(job.axes[2], plan.rows, phase);
        const int64_t z = line / job.axes[1].to, y = line % job.axes[1].to;
        S* to = output + c * steps[1] + z * steps[2] + y * steps[3] + phase * steps[4];
        const int64_t step = plan.rows.out_phases * steps[4];
        for (int64_t i = 0; i < width; ++i, from += plan.width, to += step)
          for (int64_t k = 0; k < stride; ++k)
            to[k] = narrow<S>(from[k] + (bias ? widen(bias[(c + k) * job.bias_strides[1]]) : T(0)));
      }
    }
  }
};

// The kernels' gradient ---------------------------------------------------------------------------

// Panels of `width` (channel, tap) pairs; a task has `span` of them, of one sample or, where
// kernels are mixed, of all samples, a slice at a time; tiles of at most kLong output channels.
struct GradientPlan {
  Rows rows;
  int64_t width, pairs, panels, span, tasks_each, tiles, slice;
  int64_t inputs, column, columns, gradients, tile;  // numbers

  GradientPlan(const KernelGradient& job, int64_t lanes, int64_t bytes)
      : rows(rows_of(job.axes, false)) {
    width = 2 * lanes;
    pairs = job.in_channels * job.taps;
    panels = ceil_div(pairs, width);
    column = rows.positions * width;
    span = job.experts ? 1 : least(most<int64_t>(kColumns / (column * bytes), 1), panels);
    tasks_each = ceil_div(panels, span);
    span = ceil_div(panels, tasks_each);
    tiles = ceil_div(job.out_channels, kLong);
    slice = job.experts ? least(kSlice, job.batch) : 1;
    const int64_t channels = least(span * width / job.taps + 2, job.in_channels);
    inputs = ceil_div(channels * rows.plane + lanes, lanes) * lanes;
    columns = slice * span * column;
    gradients = slice * ceil_div(rows.positions * job.out_channels, lanes) * lanes;
    tile = kLong * width;
  }
  int64_t tasks(const KernelGradient& job) const {
    return job.experts ? tasks_each : job.batch * tasks_each;
  }
  int64_t scratch(const KernelGradient& job, int64_t bytes, int64_t lanes) const {
    const int64_t zeros = rows.length + 2 * lanes;
    const int64_t tiles = job.experts ? (2 * job.experts + kTogether) * tile : tile;
    const int64_t places = ceil_div(rows.count * job.taps * 8, bytes);
    return inputs + columns + gradients + tiles + zeros + places + 64;
  }
};

template <class S>
struct Gradient {
  typedef Compute<S> T;
  static constexpr int n = VectorOf<T>::lanes;
  const KernelGradient& job;
  const GradientPlan plan;
  T *inputs, *columns, *gradients, *tiles, *zeros;
  int64_t* where;
  int64_t held = -1;  // the first sample of the slice whose gradients are at hand

  Gradient(const KernelGradient& job, void* scratch) : job(job), plan(job, n, sizeof(T)) {
    columns = static_cast<T*>(scratch);
    tiles = columns + plan.columns;
    gradients = tiles + (job.experts ? 2 * job.experts + kTogether : 1) * plan.tile;
    inputs = gradients + plan.gradients;
    zeros = inputs + plan.inputs;
    where = reinterpret_cast<int64_t*>(zeros + ceil_div(plan.rows.length + n, n) * n);
    for (int64_t i = 0; i < plan.rows.length + n; ++i) zeros[i] = 0;
    locate(job.axes, false, plan.rows, where);
  }

  void tasks(int64_t begin, int64_t end) {
    if (!job.experts) {
      for (int64_t i = begin; i < end; ++i) own(i);
      return;
    }
    for (int64_t first = 0; first < job.batch; first += plan.slice) {
      const int64_t samples = least(plan.slice, job.batch - first);
      hold(first, samples);
      for (int64_t panel = begin; panel < end; ++panel) mixed(panel, first, samples);
    }
  }

  void own(int64_t index) {
    const int64_t sample = index / plan.tasks_each, first = index % plan.tasks_each * plan.span;
    const int64_t last = least(first + plan.span, plan.panels);
    hold(sample, 1);
    lay_columns(sample, first, last, columns);
    S* const to = static_cast<S*>(job.kernel_gradient) + sample * job.out_channels * plan.pairs;
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      const int64_t row = part(job.out_channels, plan.tiles, tile);
      const int64_t rows = part(job.out_channels, plan.tiles, tile + 1) - row;
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t pair = panel * plan.width, count = least(plan.width, plan.pairs - pair);
        const T* const column = columns + (panel - first) * plan.column;
        put(gradients + row * plan.rows.positions, rows, column, count,
            to + row * plan.pairs + pair);
      }
    }
  }

  // One tile's product over all positions into `sum`.
  void product(const T* gradient, int64_t rows, const T* column, T* sum, int64_t step) {
    const Tap once = {0, 0};
    const int64_t steps = plan.rows.positions;
    multiply<T>({gradient, column, rows, plan.width, steps, &once, 1, sum, step, true}, 2, rows);
  }

  // ... into rows of the kernels' gradient: straight there, or what of it is real by way of a tile.
  void put(const T* gradient, int64_t rows, const T* column, int64_t count, T* to) {
    if (count == plan.width) return product(gradient, rows, column, to, plan.pairs);
    put_narrow(gradient, rows, column, count, to);
  }
  void put(const T* gradient, int64_t rows, const T* column, int64_t count, bfloat16* to) {
    put_narrow(gradient, rows, column, count, to);
  }
  template <class To>
  void put_narrow(const T* gradient, int64_t rows, const T* column, int64_t count, To* to) {
    product(gradient, rows, column, tiles, plan.width);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < count; ++i)
        to[r * plan.pairs + i] = narrow<To>(tiles[r * plan.width + i]);
  }

  // The output's gradient as tiles of channels: to[tile][position][channel].
  void hold(int64_t first, int64_t samples) {
    if (first == held) return;
    held = first;
    const int64_t each = plan.gradients / plan.slice;
    for (int64_t i = 0; i < samples; ++i)
      for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        const int64_t row = part(job.out_channels, plan.tiles, tile);
        const int64_t rows = part(job.out_channels, plan.tiles, tile + 1) - row;
        hold_tile(first + i, row, rows, gradients + i * each + row * plan.rows.positions);
      }
  }
  void hold_tile(int64_t sample, int64_t first, int64_t rows, T* to) {
    const int64_t* const s = job.grad_strides;
    const S* const from = static_cast<const S*>(job.grad) + sample * s[0] + first * s[1];
    for (int64_t z = 0; z < job.axes[0].to; ++z)
      for (int64_t y = 0; y < job.axes[1].to; ++y)
        for (int64_t x = 0; x < job.axes[2].to; ++x)
          for (int64_t r = 0; r < rows; ++r)
            *to++ = widen(from[r * s[1] + z * s[2] + y * s[3] + x * s[4]]);
  }

  // What the window shows at each position for panels `first` to `last`: to[panel][position][pair].
  void lay_columns(int64_t sample, int64_t first, int64_t last, T* to) {
    const int64_t begin = first * plan.width / job.taps;
    const int64_t end = ceil_div(least(last * plan.width, plan.pairs), job.taps);
    const S* const from = static_cast<const S*>(job.input) + sample * job.input_strides[0] +
                          begin * job.input_strides[1];
    spread(from, job.input_strides + 1, end - begin, job.axes, plan.rows, inputs);
    for (int64_t panel = first; panel < last; ++panel, to += plan.column)
      for (int64_t lane = 0; lane < plan.width; lane += n)
        lay_lanes(panel * plan.width + lane, begin, to + lane);
  }
  void lay_lanes(int64_t pair, int64_t begin, T* to) {
    for (int64_t row = 0; row < plan.rows.count; ++row) {
      const T* lines[n];
      int64_t channel = pair / job.taps, tap = pair % job.taps;
      for (int lane = 0; lane < n; ++lane) {
        const int64_t place = where[row * job.taps + tap];
        const bool real = pair + lane < plan.pairs && place >= 0;
        lines[lane] = real ? inputs + (channel - begin) * plan.rows.plane + place : zeros;
        if (++tap == job.taps) tap = 0, ++channel;
      }
      for (int64_t x = 0; x < plan.rows.width; x += n) {
        Vector<T> square[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) square[i] = load(lines[i] + x);
        transpose<T>(square);
        const int64_t count = least<int64_t>(n, plan.rows.width - x);
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          if (i < count) store(to + i * plan.width, square[i]);
        }
        to += count * plan.width;
      }
    }
  }

  // A panel of a slice of samples: the experts' gradient there, and the coefficients' share.
  void mixed(int64_t panel, int64_t first, int64_t samples) {
    for (int64_t i = 0; i < samples; ++i)
      lay_columns(first + i, panel, panel + 1, columns + i * plan.column);
    T* const part_of =
        static_cast<T*>(job.coefficient_gradient) + (panel * job.batch + first) * each_sample();
    for (int64_t i = 0; i < samples * each_sample(); ++i) part_of[i] = 0;
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      const int64_t row = part(job.out_channels, plan.tiles, tile);
      const int64_t rows = part(job.out_channels, plan.tiles, tile + 1) - row;
      mixed_tile(panel, first, samples, row, rows, part_of);
    }
  }

  void mixed_tile(int64_t panel, int64_t first, int64_t samples, int64_t row, int64_t rows,
                  T* part_of) {
    const int64_t numbers = rows * plan.width, each = plan.gradients / plan.slice;
    T *const weight = tiles, *const gradient = tiles + job.experts * plan.tile;
    T* const product_of = gradient + job.experts * plan.tile;
    exchange(panel, row, rows, first > 0, weight, gradient, false);
    const S* const given = static_cast<const S*>(job.coefficients) + first * each_sample();
    for (int64_t i = 0; i < samples; i += kTogether) {
      const int64_t together = least(kTogether, samples - i);
      if (i / kTogether < job.experts) ask(i / kTogether, row + rows, panel);
      for (int64_t g = 0; g < together; ++g)
        product(gradients + (i + g) * each + row * plan.rows.positions, rows,
                columns + (i + g) * plan.column, product_of + g * plan.tile, plan.width);
      if (together == kTogether)
        share_all<kTogether>(panel, product_of, weight, given + i * each_sample(), numbers,
                             gradient, part_of + i * each_sample());
      else
        for (int64_t g = 0; g < together; ++g)
          share_all<1>(panel, product_of + g * plan.tile, weight, given + (i + g) * each_sample(),
                       numbers, gradient, part_of + (i + g) * each_sample());
    }
    exchange(panel, row, rows, true, weight, gradient, true);
  }

  int64_t each_sample() const { return job.experts * job.kinds; }

  template <int group>
  void share_all(int64_t panel, const T* product, const T* weight, const S* coefficients,
                 int64_t numbers, T* gradient, T* part_of) {
    int64_t e = 0;
    const auto run = [&]<int experts>() {
      for (; e + experts <= job.experts; e += experts) {
        const int64_t tile = e * plan.tile, kind = e * job.kinds;
        if (job.kinds == 1)
          share<group, experts, 1>(panel, product, weight + tile, coefficients + kind, numbers,
                                   gradient + tile, part_of + kind);
        else
          share<group, experts, 2>(panel, product, weight + tile, coefficients + kind, numbers,
                                   gradient + tile, part_of + kind);
      }
    };
    run.template operator()<2>();
    run.template operator()<1>();
  }

  // Of a few samples and experts: gradient[e] += sum_g coefficients[g, e] * product[g], and
  // part_of[g, e] += <product[g], weight[e]>. Where taps have coefficients of their own, a row's
  // two vectors of (channel, tap) pairs are kept apart (`apart` is 2).
  template <int group, int experts, int apart>
  void share(int64_t panel, const T* product, const T* weight, const S* coefficients,
             int64_t numbers, T* gradient, T* part_of) {
    Vector<T> sum[apart][group][experts] = {}, coefficient[apart][group][experts];
    for (int v = 0; v < apart; ++v)
      for (int g = 0; g < group; ++g)
        for (int e = 0; e < experts; ++e)
          for (int i = 0; i < n; ++i)
            coefficient[v][g][e][i] =
                widen(coefficients[g * each_sample() + e * job.kinds + kind_of(panel, v * n + i)]);
    for (int64_t i = 0; i < numbers; i += apart * n)
#pragma GCC unroll 2
      for (int v = 0; v < apart; ++v) {
        const int64_t at = i + v * n;
        Vector<T> p[group];
#pragma GCC unroll 4
        for (int g = 0; g < group; ++g) p[g] = load(product + g * plan.tile + at);
#pragma GCC unroll 2
        for (int e = 0; e < experts; ++e) {
          const Vector<T> w = load(weight + e * plan.tile + at);
          Vector<T> total = load(gradient + e * plan.tile + at);
#pragma GCC unroll 4
          for (int g = 0; g < group; ++g) {
            total += coefficient[v][g][e] * p[g];
            sum[v][g][e] += p[g] * w;
          }
          store(gradient + e * plan.tile + at, total);
        }
      }
    for (int v = 0; v < apart; ++v)
      for (int g = 0; g < group; ++g)
        for (int e = 0; e < experts; ++e)
          for (int i = 0; i < n; ++i)
            part_of[g * each_sample() + e * job.kinds + kind_of(panel, v * n + i)] +=
                sum[v][g][e][i];
  }

  // Which of an expert's coefficients a lane of a panel has.
  int64_t kind_of(int64_t panel, int64_t lane) const {
    return job.kinds == 1 ? 0 : (panel * plan.width + lane) % job.taps;
  }

  // Asks for an expert's tile from `row` on, and for the place of its gradient.
  void ask(int64_t expert, int64_t row, int64_t panel) const {
    const int64_t rows = least<int64_t>(kLong, job.out_channels - row);
    const int64_t start = (expert * job.out_channels + row) * plan.pairs + panel * plan.width;
    const S* const weights = static_cast<const S*>(job.weight) + start;
    const T* const gradient = static_cast<const T*>(job.kernel_gradient) + start;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < plan.width; i += 64 / sizeof(T)) {
        __builtin_prefetch(weights + r * plan.pairs + i, 0, 2);
        __builtin_prefetch(gradient + r * plan.pairs + i, 1, 2);
      }
  }

  // Brings the experts' tiles and their gradient so far in (`out` false), or the gradient out.
  void exchange(int64_t panel, int64_t row, int64_t rows, bool begun, T* weight, T* gradient,
                bool out) {
    const int64_t pair = panel * plan.width, count = least(plan.width, plan.pairs - pair);
    const S* const weights = static_cast<const S*>(job.weight);
    T* const total = static_cast<T*>(job.kernel_gradient);
    for (int64_t e = 0; e < job.experts; ++e)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = (e * job.out_channels + row + r) * plan.pairs + pair;
        const int64_t to = e * plan.tile + r * plan.width;
        if (out) {
          for (int64_t i = 0; i < count; ++i) total[from + i] = gradient[to + i];
          continue;
        }
        for (int64_t i = 0; i < plan.width; ++i) {
          weight[to + i] = i < count ? widen(weights[from + i]) : T(0);
          gradient[to + i] = begun && i < count ? total[from + i] : T(0);
        }
      }
  }
};

}  // namespace

void cut(const ConvPerSample& job, int64_t number_bytes, Cut* answer) {
  const int64_t lanes = DYNACONV_BYTES / number_bytes;
  const Plan plan(job, lanes, number_bytes);
  *answer = {plan.slices * plan.blocks, plan.scratch(job, number_bytes)};
}

void cut(const KernelGradient& job, int64_t number_bytes, Cut* answer) {
  const int64_t lanes = DYNACONV_BYTES / number_bytes;
  const GradientPlan plan(job, lanes, number_bytes);
  *answer = {plan.tasks(job), plan.scratch(job, number_bytes, lanes)};
}

template <class S>
void run(const ConvPerSample& job, int64_t begin, int64_t end, void* scratch) {
  Convolution<S> convolution(job, scratch);
  for (int64_t i = begin; i < end; ++i) convolution.task(i);
}

template <class S>
void run(const KernelGradient& job, int64_t begin, int64_t end, void* scratch) {
  Gradient<S> gradient(job, scratch);
  gradient.tasks(begin, end);
}

template void run<float>(const ConvPerSample&, int64_t, int64_t, void*);
template void run<double>(const ConvPerSample&, int64_t, int64_t, void*);
template void run<bfloat16>(const ConvPerSample&, int64_t, int64_t, void*);
template void run<float>(const KernelGradient&, int64_t, int64_t, void*);
template void run<double>(const KernelGradient&, int64_t, int64_t, void*);
template void run<bfloat16>(const KernelGradient&, int64_t, int64_t, void*);

}  // namespace DYNACONV_ISA
}  // namespace dynaconv
