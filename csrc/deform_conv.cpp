// Deformable convolution: dynaconv_native::deform_conv and its gradients.
#include "deform_conv.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>

#include "binding.h"

namespace dynaconv {
namespace {

using torch::stable::parallel_for;
using MaybeTensor = std::optional<Tensor>;

int64_t rounded_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }
int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Positions that a task copies between layouts.
constexpr int64_t COPIED = 128;
// Fewer channels than this are not worth a slice of their own.
constexpr int64_t NARROW = 8;

// All tensors are (batch, channels, positions).
DeformShape shape_of(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const Ints& length, const Ints& size, const Ints& kernel, const Ints& stride,
                     const Ints& padding, const Ints& dilation, int64_t groups) {
  DeformShape shape{};
  shape.rank = length.size();
  shape.batch = input.size(0);
  shape.channels = input.size(1);
  shape.inputs = input.size(2);
  shape.positions = offset.size(2);
  shape.out_channels = weight.size(0);
  shape.taps = weight.size(2);
  shape.groups = groups;
  shape.offset_groups = offset.size(1) / (shape.taps * shape.rank);
  shape.group_in = shape.channels / groups;
  shape.group_out = shape.out_channels / groups;
  shape.offset_channels = shape.channels / shape.offset_groups;
  std::copy(length.begin(), length.end(), shape.length);
  std::copy(size.begin(), size.end(), shape.size);
  std::copy(kernel.begin(), kernel.end(), shape.kernel);
  std::copy(stride.begin(), stride.end(), shape.stride);
  std::copy(padding.begin(), padding.end(), shape.padding);
  std::copy(dilation.begin(), dilation.end(), shape.dilation);
  STD_TORCH_CHECK(shape.inputs < std::numeric_limits<int32_t>::max(),
                  "deform_conv: one sample has ", shape.inputs,
                  " positions; the native backend takes up to 2^31");
  return shape;
}

int64_t tile_of(int64_t positions, int64_t parts) {
  const int64_t tiles = std::max(ceil_div(positions, DEFORM_TILE), parts);
  return std::min(DEFORM_TILE, rounded_up(std::max<int64_t>(1, ceil_div(positions, tiles)), 14));
}

// `slices` as equal as can be.
int64_t slice_of(int64_t channels, int64_t slices) {
  return std::min(channels, rounded_up(ceil_div(channels, slices), NARROW));
}

// Fills in `taps`, as equal chunks as can be and at least `chunks`.
DeformCut with_taps(const DeformShape& shape, DeformCut cut, int64_t chunks) {
  chunks = std::max(chunks, ceil_div(shape.taps, std::min(shape.taps, DEFORM_COLUMNS / cut.slice)));
  cut.taps = ceil_div(shape.taps, std::min(chunks, shape.taps));
  return cut;
}

// Channels of a slice with all taps, but not too few to be worth it.
int64_t widest_slice(const DeformShape& shape, int64_t least) {
  return std::max(least, DEFORM_COLUMNS / shape.taps / 16 * 16);
}

DeformCut cut_of(const DeformShape& shape, int64_t parts, int64_t ranges) {
  DeformCut cut{};
  cut.tile = tile_of(shape.positions, parts);
  cut.slice = slice_of(shape.channels,
                       std::max(ranges, ceil_div(shape.channels, widest_slice(shape, 64))));
  cut.ranges = std::min(ranges, ceil_div(shape.channels, cut.slice));
  return with_taps(shape, cut, 1);
}

DeformCut forward_cut(const DeformShape& shape) {
  return cut_of(shape, ceil_div(threads(), std::max<int64_t>(1, shape.batch)), 1);
}

// Samples go to the threads; channels too, where samples do not come out even.
DeformCut data_cut(const DeformShape& shape) {
  const bool even = shape.batch % threads() == 0 || shape.batch >= 4 * threads();
  return cut_of(shape, 1, even ? 1 : std::min(threads(), ceil_div(shape.channels, NARROW)));
}

// All threads get as many chunks of slices and taps.
DeformCut weight_cut(const DeformShape& shape) {
  const int64_t widest = widest_slice(shape, 32);
  const int64_t slices = rounded_up(ceil_div(shape.channels, widest), threads());
  DeformCut cut{};
  cut.tile = tile_of(shape.positions, 1);
  cut.slice = std::clamp(slice_of(shape.channels, slices), std::min<int64_t>(32, shape.channels),
                         widest);
  cut.ranges = 1;
  return with_taps(shape, cut, ceil_div(threads(), ceil_div(shape.channels, cut.slice)));
}

// Numbers of scratch: columns twice, sums of outputs, and the plan of a chunk.
int64_t scratch_of(const DeformShape& shape, const DeformCut& cut) {
  const int64_t corners = int64_t{1} << shape.rank, slack = 8 * DEFORM_PAD;
  const int64_t groups = std::min(shape.offset_groups, cut.slice / shape.offset_channels + 2);
  return 2 * DEFORM_POINTS * DEFORM_ROW + slack +
         groups * cut.taps * DEFORM_POINTS * (2 * corners + 1);
}
int64_t forward_scratch(const DeformShape& shape, const DeformCut& cut) {
  return scratch_of(shape, cut) +
         DEFORM_POINTS * (rounded_up(shape.out_channels, DEFORM_PAD) + DEFORM_PAD);
}
int64_t data_scratch(const DeformShape& shape, const DeformCut& cut) {
  const int64_t corners = int64_t{1} << shape.rank;
  return scratch_of(shape, cut) + shape.offset_groups * shape.taps * corners * DEFORM_POINTS;
}
int64_t weight_scratch(const DeformShape& shape, const DeformCut& cut) {
  const int64_t row = rounded_up(shape.group_out, DEFORM_PAD);
  return scratch_of(shape, cut) + (DEFORM_POINTS + cut.slice * cut.taps) * row;
}

template <class T>
Planes<T> planes(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}
template <class T>
Planes<T> planes(const MaybeTensor& t) {
  return t ? planes<T>(*t) : Planes<T>{};
}

// Memory for so many numbers, for as long as it is held.
using Held = std::unique_ptr<Scratch>;
template <class C>
Held numbers(int64_t count) {
  return std::make_unique<Scratch>(static_cast<size_t>(count) * sizeof(C));
}

// A tensor as rows of its channels: as it lies where it has them without a gap, otherwise room for
// a copy.
template <class T, class C>
class AsRows {
 public:
  explicit AsRows(const Tensor& t) : tensor_(t), channels_(t.size(1)), positions_(t.size(2)) {
    const bool dense = t.stride(2) == channels_ && (t.stride(1) == 1 || channels_ == 1);
    if (std::is_same_v<T, C> && dense) {
      rows_ = {static_cast<C*>(t.data_ptr()), t.stride(0), channels_};
      return;
    }
    copy_ = numbers<C>(t.size(0) * channels_ * positions_);
    rows_ = {copy_->as<C>(), channels_ * positions_, channels_};
  }

  AsRows& fill() {
    if (copy_)
      parallel_for(0, tasks(), 1, [&](int64_t begin, int64_t end) {
        DYNACONV_RUN(planes_to_rows(planes<const T>(tensor_), rows_, channels_, positions_,
                                     COPIED, begin, end));
      });
    return *this;
  }

  void write_back() const {
    if (copy_)
      parallel_for(0, tasks(), 1, [&](int64_t begin, int64_t end) {
        DYNACONV_RUN(rows_to_planes(Rows<const C>(rows()), planes<T>(tensor_), channels_,
                                     positions_, COPIED, begin, end));
      });
  }

  Rows<const C> rows() const { return {rows_.data, rows_.sample, rows_.row}; }
  Rows<C> writable() const { return rows_; }

 private:
  int64_t tasks() const { return tensor_.size(0) * ceil_div(positions_, COPIED); }
  Tensor tensor_;
  int64_t channels_, positions_;
  Rows<C> rows_;
  Held copy_;
};

// f(T, C, O) with the dtypes of the data, of what is computed in, and of the offset.
template <class F>
void with_dtypes(const Tensor& data, const Tensor& offset, const F& f) {
  with_dtype(data, [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, double>) {
      if (offset.scalar_type() == torch::headeronly::ScalarType::Double)
        return f(t, double{}, double{});
      return f(t, double{}, float{});
    } else {
      return f(t, float{}, float{});
    }
  });
}

template <class T, class C>
Held packed_forward(const DeformShape& shape, const DeformCut& cut, const Tensor& weight) {
  auto packed = numbers<C>(shape.taps * shape.channels * rounded_up(shape.group_out, DEFORM_PAD));
  const int64_t tasks = shape.groups * ceil_div(shape.group_out, DEFORM_BLOCK);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    DYNACONV_RUN(pack_forward(shape, cut, static_cast<const T*>(weight.data_ptr()),
                               packed->template as<C>(), begin, end));
  });
  return packed;
}

template <class T, class C>
Held packed_backward(const DeformShape& shape, const DeformCut& cut, const Tensor& weight) {
  const int64_t slices = ceil_div(shape.channels, cut.slice);
  const int64_t columns = rounded_up(std::min(cut.slice, shape.group_in), DEFORM_PAD);
  auto packed = numbers<C>((slices + shape.groups) * shape.taps * shape.group_out * columns);
  parallel_for(0, slices * shape.taps, 1, [&](int64_t begin, int64_t end) {
    DYNACONV_RUN(pack_backward(shape, cut, static_cast<const T*>(weight.data_ptr()),
                                packed->template as<C>(), begin, end));
  });
  return packed;
}

template <class T, class C, class O>
void run_forward(DeformForward<T, C, O>& call) {
  const int64_t tasks = call.shape.batch * ceil_div(call.shape.positions, call.cut.tile);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = numbers<C>(forward_scratch(call.shape, call.cut));
    DYNACONV_RUN(deform_forward(call, begin, end, scratch->template as<C>()));
  });
}

template <class T, class C, class O>
void run_backward_data(DeformBackward<T, C, O>& call, const Tensor& weight) {
  const DeformShape& shape = call.shape;
  call.cut = data_cut(shape);
  const Held packed = packed_backward<T, C>(shape, call.cut, weight);
  call.weight = packed->template as<C>();
  Held parts;
  const bool offset = call.grad_offset.data || call.grad_modulation.data;
  const int64_t taps = shape.batch * shape.offset_groups * shape.taps;
  if (offset && call.cut.ranges > 1) {
    const int64_t count = call.cut.ranges * taps * (shape.rank + 1) * shape.positions;
    parts = numbers<C>(count);
    call.parts = parts->template as<C>();
  }
  parallel_for(0, shape.batch * call.cut.ranges, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = numbers<C>(data_scratch(shape, call.cut));
    DYNACONV_RUN(deform_backward_data(call, begin, end, scratch->template as<C>()));
  });
  if (parts)
    parallel_for(0, taps, 1, [&](int64_t begin, int64_t end) {
      DYNACONV_RUN(deform_add_parts(call, begin, end));
    });
}

template <class T, class C, class O>
void run_backward_weight(DeformBackward<T, C, O>& call) {
  const DeformShape& shape = call.shape;
  call.cut = weight_cut(shape);
  const int64_t slices = ceil_div(shape.channels, call.cut.slice);
  const int64_t tasks = slices * ceil_div(shape.taps, call.cut.taps);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = numbers<C>(weight_scratch(shape, call.cut));
    DYNACONV_RUN(deform_backward_weight(call, begin, end, scratch->template as<C>()));
  });
}

void deform_conv(const Tensor& input, const Tensor& offset, const Tensor& weight,
                 const MaybeTensor& bias, const MaybeTensor& modulation, const Ints& length,
                 const Ints& size, const Ints& kernel, const Ints& stride, const Ints& padding,
                 const Ints& dilation, int64_t groups, const Tensor& output) {
  with_dtypes(input, offset, [&](auto t, auto c, auto o) {
    using T = decltype(t);
    using C = decltype(c);
    using O = decltype(o);
    DeformForward<T, C, O> call{};
    call.shape = shape_of(input, offset, weight, length, size, kernel, stride, padding, dilation,
                          groups);
    call.cut = forward_cut(call.shape);
    AsRows<T, C> rows(input);
    call.input = rows.fill().rows();
    call.offset = planes<const O>(offset);
    call.modulation = planes<const T>(modulation);
    const Held packed = packed_forward<T, C>(call.shape, call.cut, weight);
    call.weight = packed->template as<C>();
    call.bias = bias ? static_cast<const T*>(bias->data_ptr()) : nullptr;
    call.output = planes<T>(output);
    run_forward(call);
  });
}

void deform_conv_backward(const Tensor& grad, const Tensor& input, const Tensor& offset,
                          const Tensor& weight, const MaybeTensor& modulation, const Ints& length,
                          const Ints& size, const Ints& kernel, const Ints& stride,
                          const Ints& padding, const Ints& dilation, int64_t groups,
                          const MaybeTensor& grad_input, const MaybeTensor& grad_offset,
                          const MaybeTensor& grad_weight, const MaybeTensor& grad_modulation) {
  with_dtypes(input, offset, [&](auto t, auto c, auto o) {
    using T = decltype(t);
    using C = decltype(c);
    using O = decltype(o);
    DeformBackward<T, C, O> call{};
    call.shape = shape_of(input, offset, weight, length, size, kernel, stride, padding, dilation,
                          groups);
    AsRows<T, C> rows(input), grads(grad);
    call.input = rows.fill().rows();
    call.grad = grads.fill().rows();
    call.offset = planes<const O>(offset);
    call.modulation = planes<const T>(modulation);
    call.grad_offset = planes<O>(grad_offset);
    call.grad_modulation = planes<T>(grad_modulation);
    if (grad_weight) {
      call.grad_weight = static_cast<T*>(grad_weight->data_ptr());
      run_backward_weight(call);
    }
    if (grad_input) {
      AsRows<T, C> to(*grad_input);
      call.grad_input = to.writable();
      run_backward_data(call, weight);
      to.write_back();
    } else if (grad_offset || grad_modulation) {
      run_backward_data(call, weight);
    }
  });
}

}  // namespace
}  // namespace dynaconv

STABLE_TORCH_LIBRARY_FRAGMENT(dynaconv_native, m) {
  m.def(
      "deform_conv(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? modulation, "
      "int[] length, int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "int groups, Tensor(a!) output) -> ()");
  m.def(
      "deform_conv_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, "
      "Tensor? modulation, int[] length, int[] size, int[] kernel, int[] stride, int[] padding, "
      "int[] dilation, int groups, Tensor(a!)? grad_input, Tensor(b!)? grad_offset, "
      "Tensor(c!)? grad_weight, Tensor(d!)? grad_modulation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynaconv_native, CPU, m) {
  m.impl("deform_conv", TORCH_BOX(&dynaconv::deform_conv));
  m.impl("deform_conv_backward", TORCH_BOX(&dynaconv::deform_conv_backward));
}
