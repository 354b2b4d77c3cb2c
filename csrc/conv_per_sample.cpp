#include "conv_per_sample.h"

#include "binding.h"

namespace dynaconv {
namespace {

using Optional = std::optional<Tensor>;

// Sizes (N, C, *L) or strides with the spatial ones last of three, `missing` before them.
void spatial(const Ints& given, int64_t missing, int64_t* to) {
  const size_t rank = given.size() - 2;
  for (size_t d = 0; d < 3; ++d) to[d] = d + rank < 3 ? missing : given[2 + d + rank - 3];
}

void set_strides(const Tensor& tensor, int64_t* to) {
  const Ints strides = strides_of(tensor);
  to[0] = strides[0];
  to[1] = strides[1];
  spatial(strides, 0, to + 2);
}

// The spatial dimensions of a kernel (N, C_out, C_in, *K) that reads `from` and writes `to`.
void set_axes(const Tensor& from, const Tensor& to, const Ints& kernel, const Ints& stride,
              const Ints& padding, const Ints& dilation, Axis* axes) {
  int64_t read[3], written[3];
  spatial(sizes_of(from), 1, read);
  spatial(sizes_of(to), 1, written);
  const size_t rank = stride.size();
  for (size_t d = 0; d < 3; ++d) {
    axes[d] = {1, 1, 1, 1, 0, 1};
    if (d + rank < 3) continue;
    const size_t i = d + rank - 3;
    axes[d] = {read[d], written[d], kernel[3 + i], stride[i], padding[i], dilation[i]};
  }
}

int64_t taps(const Ints& kernel) {
  int64_t product = 1;
  for (size_t i = 3; i < kernel.size(); ++i) product *= kernel[i];
  return product;
}

// Coefficients of an expert.
int64_t kinds(const Tensor& coefficients, int64_t taps) {
  return coefficients.dim() > 2 ? taps : 1;
}

// Runs every task; a thread takes neighbours, which share what it has at hand.
template <class Job>
void run_all(const Job& job, const Tensor& data) {
  with_dtype(data, [&](auto number) {
    using T = decltype(number);
    const int64_t bytes = sizeof(T) < 4 ? 4 : sizeof(T);
    Cut cut_into;
    DYNACONV_RUN(cut(job, bytes, &cut_into));
    torch::stable::parallel_for(0, cut_into.tasks, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(cut_into.scratch * bytes);
      DYNACONV_RUN(run<T>(job, begin, end, scratch.as<void>()));
    });
  });
}

void conv_per_sample(const Tensor input, const Tensor weight, const Optional coefficients,
                     const Optional bias, Tensor output, const Ints stride, const Ints padding,
                     const Ints dilation, bool transposed) {
  const Ints kernel = sizes_of(weight);
  ConvPerSample job{};
  job.batch = input.size(0);
  job.from_channels = input.size(1);
  job.to_channels = output.size(1);
  job.taps = taps(kernel);
  job.experts = coefficients ? kernel[0] : 0;
  job.transposed = transposed;
  set_axes(input, output, kernel, stride, padding, dilation, job.axes);
  job.input = input.const_data_ptr();
  set_strides(input, job.input_strides);
  job.weight = weight.const_data_ptr();
  if (coefficients) {
    job.coefficients = coefficients->const_data_ptr();
    job.kinds = kinds(*coefficients, job.taps);
  }
  if (bias) {
    job.bias = bias->const_data_ptr();
    job.bias_strides[0] = bias->stride(0);
    job.bias_strides[1] = bias->stride(1);
  }
  job.output = output.mutable_data_ptr();
  set_strides(output, job.output_strides);
  run_all(job, input);
}

KernelGradient gradient_job(const Tensor& grad, const Tensor& input, const Ints& kernel,
                            const Ints& stride, const Ints& padding, const Ints& dilation) {
  KernelGradient job{};
  job.batch = input.size(0);
  job.in_channels = input.size(1);
  job.out_channels = grad.size(1);
  job.taps = taps(kernel);
  set_axes(input, grad, kernel, stride, padding, dilation, job.axes);
  job.input = input.const_data_ptr();
  set_strides(input, job.input_strides);
  job.grad = grad.const_data_ptr();
  set_strides(grad, job.grad_strides);
  return job;
}

void conv_per_sample_weight(const Tensor grad, const Tensor input, Tensor gradient,
                            const Ints stride, const Ints padding, const Ints dilation) {
  KernelGradient job = gradient_job(grad, input, sizes_of(gradient), stride, padding, dilation);
  job.kernel_gradient = gradient.mutable_data_ptr();
  run_all(job, input);
}

// How many parts of the coefficients' gradient there will be.
int64_t conv_mixture_parts(const Tensor grad, const Tensor input, const Tensor weight,
                           const Ints stride, const Ints padding, const Ints dilation) {
  const Ints kernel = sizes_of(weight);
  KernelGradient job = gradient_job(grad, input, kernel, stride, padding, dilation);
  job.experts = kernel[0];
  Cut cut_into;
  const bool wide = input.scalar_type() == torch::headeronly::ScalarType::Double;
  DYNACONV_RUN(cut(job, wide ? 8 : 4, &cut_into));
  return cut_into.tasks;
}

void conv_mixture_weight(const Tensor grad, const Tensor input, const Tensor weight,
                         const Tensor coefficients, Tensor gradient, Tensor parts,
                         const Ints stride, const Ints padding, const Ints dilation) {
  const Ints kernel = sizes_of(weight);
  KernelGradient job = gradient_job(grad, input, kernel, stride, padding, dilation);
  job.experts = kernel[0];
  job.weight = weight.const_data_ptr();
  job.coefficients = coefficients.const_data_ptr();
  job.kinds = kinds(coefficients, job.taps);
  job.kernel_gradient = gradient.mutable_data_ptr();
  job.coefficient_gradient = parts.mutable_data_ptr();
  run_all(job, input);
}

}  // namespace
}  // namespace dynaconv

STABLE_TORCH_LIBRARY_FRAGMENT(dynaconv_native, m) {
  m.def(
      "conv_per_sample(Tensor input, Tensor weight, Tensor? coefficients, Tensor? bias, "
      "Tensor(a!) output, int[] stride, int[] padding, int[] dilation, bool transposed) -> ()");
  m.def(
      "conv_per_sample_weight(Tensor grad, Tensor input, Tensor(a!) gradient, "
      "int[] stride, int[] padding, int[] dilation) -> ()");
  m.def(
      "conv_mixture_parts(Tensor grad, Tensor input, Tensor weight, "
      "int[] stride, int[] padding, int[] dilation) -> int");
  m.def(
      "conv_mixture_weight(Tensor grad, Tensor input, Tensor weight, Tensor coefficients, "
      "Tensor(a!) gradient, Tensor(b!) parts, int[] stride, int[] padding, int[] dilation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynaconv_native, CPU, m) {
  m.impl("conv_per_sample", TORCH_BOX(&dynaconv::conv_per_sample));
  m.impl("conv_per_sample_weight", TORCH_BOX(&dynaconv::conv_per_sample_weight));
  m.impl("conv_mixture_parts", TORCH_BOX(&dynaconv::conv_mixture_parts));
  m.impl("conv_mixture_weight", TORCH_BOX(&dynaconv::conv_mixture_weight));
}
