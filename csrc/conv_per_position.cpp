// The operators of conv_per_position: shapes, tiles, threads.
#include "conv_per_position.h"

#include "binding.h"

namespace dynaconv {
namespace {

// What a task's scratch should fit into: most of a core's second-level cache.
constexpr int64_t BUDGET = 448 * 1024;
// Channels that a task takes at once.
constexpr int64_t CHUNK = 64;

void in_three(const Tensor& t, int64_t (&stride)[5]) {
  const int64_t rank = t.dim() - 2;
  stride[0] = t.stride(0), stride[1] = t.stride(1);
  for (int64_t d = 0; d < 3; ++d) stride[2 + d] = d < 3 - rank ? 0 : t.stride(d - 3 + rank + 2);
}

PerPosition call(const Tensor& input, const Tensor& weight, const Tensor& output,
                 const Ints& stride, const Ints& padding, const Ints& dilation) {
  PerPosition a = {};
  const int64_t rank = input.dim() - 2;
  STD_TORCH_CHECK(rank >= 1 && rank <= 3 && weight.dim() == 2 + 2 * rank,
                  "conv_per_position: not a shape that the kernels know");
  a.batch = input.size(0), a.groups = weight.size(1), a.channels = input.size(1) / a.groups;
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t d = i - 3 + rank;  // along which spatial dimension; the first ones may not exist
    const bool has = d >= 0;
    a.in[i] = has ? input.size(2 + d) : 1, a.out[i] = has ? output.size(2 + d) : 1;
    a.kernel[i] = has ? weight.size(2 + d) : 1;
    a.stride[i] = has ? stride[d] : 1, a.padding[i] = has ? padding[d] : 0;
    a.dilation[i] = has ? dilation[d] : 1;
    a.tap[i] = has ? weight.stride(2 + d) : 0, a.at[i] = has ? weight.stride(2 + rank + d) : 0;
  }
  in_three(input, a.x_stride);
  in_three(output, a.y_stride);
  a.w_stride[0] = weight.stride(0), a.w_stride[1] = weight.stride(1);
  a.input = input.data_ptr(), a.weight = weight.data_ptr(), a.output = output.data_ptr();
  return a;
}

int64_t count_tasks(const PerPosition& a, const int64_t (&space)[3], bool chunked) {
  int64_t tasks = a.batch * ceil_div(a.groups, a.bundle);
  if (chunked) tasks *= ceil_div(a.channels, a.chunk);
  for (int d = 0; d < 3; ++d) tasks *= ceil_div(space[d], a.tile[d]);
  return tasks;
}

// Where a channel's positions do not lie together, groups of few channels are taken in bundles:
// what is read of a position then fills a vector.
constexpr int64_t BUNDLE = 16;

// Halves the box of a task until its scratch fits and there is work for every thread.
template <class T>
int64_t cut(Wanted wanted, PerPosition& a) {
  const bool chunked = wanted != Wanted::weight_gradient;
  const auto& space = wanted == Wanted::input_gradient ? a.in : a.out;
  a.chunk = std::min(a.channels, CHUNK);
  bool by_channels = false;
  DYNACONV_CALL(by_channels, per_position::by_channels<T>(wanted, a));
  const bool apart = a.x_stride[4] != 1 && a.channels < BUNDLE && !by_channels;
  a.bundle = apart ? std::min(a.groups, BUNDLE / a.channels) : 1;
  for (int d = 0; d < 3; ++d) a.tile[d] = space[d];
  const auto halve = [&](int d, int64_t least) {
    if (a.tile[d] <= least) return false;
    a.tile[d] = std::max(least, (a.tile[d] + 1) / 2);
    return true;
  };
  int64_t bytes = 0;
  do {
    DYNACONV_CALL(bytes, per_position::scratch<T>(wanted, a));
  } while (bytes > BUDGET && (halve(0, 1) || halve(1, 4) || halve(2, 64) || halve(1, 1)));
  const int64_t enough = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  while (count_tasks(a, space, chunked) < enough && (halve(0, 1) || halve(1, 4) || halve(2, 64)))
    ;
  a.tasks = count_tasks(a, space, chunked);
  return bytes;
}

void compute(Wanted wanted, PerPosition a, const Tensor& data) {
  with_dtype(data, [&](auto type) {
    using T = decltype(type);
    const int64_t bytes = cut<T>(wanted, a);
    torch::stable::parallel_for(0, a.tasks, 1, [&](int64_t begin, int64_t end) {
      const Scratch memory(bytes);
      DYNACONV_RUN(per_position::run<T>(wanted, a, begin, end, memory.as<void>()));
    });
  });
}

void output(Tensor output, const Tensor input, const Tensor weight, Ints stride, Ints padding,
            Ints dilation) {
  compute(Wanted::output, call(input, weight, output, stride, padding, dilation), input);
}

void input_gradient(Tensor gradient, const Tensor grad, const Tensor weight, Ints stride,
                    Ints padding, Ints dilation) {
  compute(Wanted::input_gradient, call(gradient, weight, grad, stride, padding, dilation), grad);
}

void weight_gradient(Tensor gradient, const Tensor grad, const Tensor input, Ints stride,
                     Ints padding, Ints dilation) {
  compute(Wanted::weight_gradient, call(input, gradient, grad, stride, padding, dilation), grad);
}

}  // namespace
}  // namespace dynaconv

STABLE_TORCH_LIBRARY_FRAGMENT(dynaconv_native, m) {
  m.def(
      "conv_per_position(Tensor(a!) output, Tensor input, Tensor weight, int[] stride, "
      "int[] padding, int[] dilation) -> ()");
  m.def(
      "conv_per_position_input(Tensor(a!) gradient, Tensor grad, Tensor weight, int[] stride, "
      "int[] padding, int[] dilation) -> ()");
  m.def(
      "conv_per_position_weight(Tensor(a!) gradient, Tensor grad, Tensor input, int[] stride, "
      "int[] padding, int[] dilation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynaconv_native, CPU, m) {
  m.impl("conv_per_position", TORCH_BOX(&dynaconv::output));
  m.impl("conv_per_position_input", TORCH_BOX(&dynaconv::input_gradient));
  m.impl("conv_per_position_weight", TORCH_BOX(&dynaconv::weight_gradient));
}
